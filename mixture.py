"""
From samples to batches: Sample, Mixture[n] -> Sample, collate -> Batch, Loader. data.py offers these names too.

The state of the data is one integer, the number of samples consumed: sample n is a pure function of (seed, n).
So a run resumes exactly, with any number of processes, micro-batches and workers.
"""
import atexit
import hashlib
import multiprocessing
import signal
import sys
import traceback
from bisect import bisect_right
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from errors import BadSample, UserError
from files import start_worker
from images import batched, each
from kernels import IGNORE_INDEX

SHARDS_TOGETHER = 16    # shards whose rows are shuffled with each other: few, so that reads stay local (16 x 8192 rows)
N_AHEAD = 4             # batches that each worker makes before they are needed
COUNTS = ('n_sample', 'n_kept', 'n_text', 'n_image_position', 'n_image', 'n_pad', 'n_truncated')  # per source


# --- samples and batches --------------------------------------------------------------------------
@dataclass
class Sample:
    """
    One item of a source: one row, or R rows that share their images (a conversation cut into its questions).
    tokens, targets  (T,) or (R,T) int64 numpy; targets are shifted, IGNORE_INDEX = no loss
    weights          the same shape float32, or None = 1 per kept target
    images           list of what images.View gives; each fills n_image_token positions of image_id, in every row
    """
    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray = None
    images: list = field(default_factory=list)
    source: str = ''
    id: str = ''
    n_image_token: int = 0
    image_id: int = -1
    image_keys: list = field(default_factory=list)       # equal keys of a source are one image; empty = all differ
    n_truncated: int = 0                                 # 1 when the item was cut to seq_len
    bad: list = field(default_factory=list)              # messages of the bad items that this one replaces
    key: int = 0                                         # 64 bits of this draw: what is random in it follows from them
    prompts: list = field(default_factory=list)          # of each row the ids that its images are encoded with; empty
                                                         # = images alone


class Batch(NamedTuple):
    """
    tokens, targets (B,T) int64; images as images.batched gives them, or None; image_index (M,) int64: which image fills
    the m-th slot, or None without images; weights (B,T) float32 or None; source (B,) int64 index into mixture.names;
    ids: B str; kept (K,) int64 positions of the targets that carry loss, in the flat (B*T) grid; bad: messages of the
    items that were replaced; stats {source: {one of COUNTS: int}}; rows: (Sample.key plus the row's place in it,
    positions without pads) of each row; image_text: a list of ids for each image as VLM takes it, or None.
    """
    tokens: torch.Tensor
    targets: torch.Tensor
    images: torch.Tensor
    image_index: torch.Tensor
    weights: torch.Tensor
    source: torch.Tensor
    ids: list[str]
    kept: torch.Tensor
    bad: list[str]
    stats: dict
    rows: list[tuple[int, int]]
    image_text: list = None

    def _map(self, f):
        batch = self._replace(images=None)
        batch = Batch(*[f(v) if isinstance(v, torch.Tensor) else v for v in batch])
        return batch._replace(images=each(f, self.images))

    def to(self, device, non_blocking=False):
        """Return the batch with its tensors on `device`."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self):
        """Return the batch in page-locked memory, so that to(device, non_blocking=True) overlaps with the GPU."""
        return self._map(lambda t: t.pin_memory())

    def noise(self, alpha, width):
        """
        NEFTune's noise (arXiv 2310.05914) on the rows' embeddings: uniform in +-alpha / sqrt(positions * width), drawn
        from each row's own key; returns (B,T,width) float32 on the batch's device, 0 at pads.
        """
        noise = torch.zeros(*self.tokens.shape, width, device=self.tokens.device)
        for row, (key, n) in zip(noise, self.rows):
            generator = torch.Generator(noise.device).manual_seed(key % 2 ** 63)
            row[:n].uniform_(-1, 1, generator=generator).mul_(alpha / (n * width) ** 0.5)
        return noise


def collate(samples, pad_id, pad_to=0, names=None):
    """
    Right-pad samples into one Batch as wide as its longest row, rounded up to a multiple of 8 and at most pad_to.
    pad_to  the positions that a row counts as, its pads included (0 = the batch's own width): columns of pads that no
            row needs are counted in n_pad and not computed
    names lists the sources in the order of Batch.source (None = order of appearance). An image that occurs twice
    (same source, key and prompt) is kept once. Raises BadSample for a row longer than pad_to, and for image positions
    that do not fit the images.
    """
    rows = [(s, *row) for s in samples for row in _rows_of(s)]
    width = max(len(t) for _, t, *_ in rows)
    T = -(-width // 8) * 8
    T = min(T, pad_to) if pad_to else T
    if width > T:
        long = next(s for s, t, *_ in rows if len(t) > T)
        raise BadSample(f"{long.source} {long.id}: a row of {width} positions does not fit pad_to={T}")
    tokens = np.full((len(rows), T), pad_id, np.int64)
    targets = np.full((len(rows), T), IGNORE_INDEX, np.int64)
    weights = np.zeros((len(rows), T), np.float32) if any(w is not None for *_, w, _ in rows) else None
    names = list(names) if names is not None else list(dict.fromkeys(s.source for s in samples))
    place, images, slots, texts = {}, [], [], []
    stats = {s.source: dict.fromkeys(COUNTS, 0) for s in samples}
    for b, (s, t, y, w, prompt) in enumerate(rows):
        n = len(t)
        tokens[b, :n], targets[b, :n] = t, y
        if weights is not None:
            weights[b, :n] = (y != IGNORE_INDEX) if w is None else w
        n_slot = int(np.count_nonzero(t == s.image_id)) if s.image_id >= 0 else 0
        if n_slot != len(s.images) * s.n_image_token:
            raise BadSample(f"{s.source} {s.id}: row {b} of the batch has {n_slot} image positions, its "
                            f"{len(s.images)} image(s) of {s.n_image_token} need {len(s.images) * s.n_image_token}")
        for j, image in enumerate(s.images):
            key = (s.source, s.image_keys[j], *prompt) if s.image_keys else (id(s), j, *prompt)
            if key not in place:
                place[key] = len(images)
                images.append(image)
                texts.append(prompt)
            slots.append(place[key])
        n_pad, count = int(np.count_nonzero(t == pad_id)) + (pad_to or T) - n, stats[s.source]
        count['n_text'] += (pad_to or T) - n_pad - n_slot
        count['n_image_position'] += n_slot
        count['n_kept'] += int(np.count_nonzero(y != IGNORE_INDEX))
        count['n_pad'] += n_pad
    for s in samples:
        stats[s.source]['n_sample'] += 1
        stats[s.source]['n_image'] += len(s.images)
        stats[s.source]['n_truncated'] += s.n_truncated
    kept = torch.from_numpy(np.flatnonzero(targets != IGNORE_INDEX))
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), batched(images) if images else None,
                 torch.tensor(slots, dtype=torch.int64) if images else None,
                 torch.from_numpy(weights) if weights is not None else None,
                 torch.tensor([names.index(s.source) for s, *_ in rows]), [s.id for s, *_ in rows], kept,
                 [message for s in samples for message in s.bad], stats,
                 [(s.key + r, int(np.count_nonzero(t != pad_id))) for s in samples
                  for r, (t, *_) in enumerate(_rows_of(s))], texts if any(texts) else None)


def _rows_of(s):
    prompts = s.prompts or [[]] * s.tokens[..., 0].size
    if s.tokens.ndim == 1:
        return [(s.tokens, s.targets, s.weights, prompts[0])]
    return [(t, y, None if s.weights is None else s.weights[r], prompts[r])
            for r, (t, y) in enumerate(zip(s.tokens, s.targets))]


# --- mixture: sample n is a pure function of (seed, n) --------------------------------------------
def _hash(*parts):
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), 'little')


def _mix(x):
    # splitmix64, written out: the order of the data may not depend on a version of numpy
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


def permute(i, n, key):
    """
    Return where a bijection of range(n), chosen by a 64-bit key, sends i.
    A Feistel network over the next power of four, applied again until the result is below n.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for r in range(1, 5):
            left, right = right, left ^ (_mix(key + r * 0x9E3779B97F4A7C15 + right & 0xFFFFFFFFFFFFFFFF) & mask)
        i = left << half | right
        if i < n:
            return i


class ShuffledSource:
    """
    A source in shuffled order: its shards are permuted in each epoch, and rows within SHARDS_TOGETHER of them.
    source   anything with a length and items; n_row: its rows; per_row: windows, that is items, of each row
    start    the row, counted over epochs, where the first item is taken
    lenient  a bad item is replaced instead of raised
    """
    def __init__(self, source, seed, name):
        self.source, self.seed, self.start, self.lenient = source, seed, 0, False
        self.name = getattr(source, 'name', name)
        self.per_row = getattr(source, 'items_per_row', 1)
        self.sizes = getattr(source, 'group_sizes', [len(source)])       # rows of each shard
        self.n_row = int(sum(self.sizes))
        self.first = np.cumsum([0, *self.sizes]).tolist()                # first row of each shard
        self.plan = lru_cache(maxsize=2)(self._plan)

    def _plan(self, epoch):
        key, sizes = _hash(self.seed, self.name, epoch), self.sizes
        order = sorted(range(len(sizes)), key=lambda s: _mix(key + s & 0xFFFFFFFFFFFFFFFF))
        ends = np.cumsum([0] + [sizes[s] for s in order]).tolist()       # in permuted order
        return key, order, ends

    def item(self, k):
        """Return which item of the source comes as the k-th."""
        row, window = divmod(k, self.per_row)
        epoch, row = divmod(self.start + row, self.n_row)
        key, order, ends = self.plan(epoch)
        group = (bisect_right(ends, row) - 1) // SHARDS_TOGETHER * SHARDS_TOGETHER
        lo, hi = ends[group], ends[min(group + SHARDS_TOGETHER, len(order))]
        row = lo + permute(row - lo, hi - lo, _mix(key ^ group))
        shard = bisect_right(ends, row) - 1
        return (self.first[order[shard]] + row - ends[shard]) * self.per_row + window


class Mixture:
    """
    An endless sequence of samples drawn from sources in exact shares: mixture[n] is a pure function of (seed, n).
    sources, weights  sources or other Mixtures, and their shares (0.1 means 1/10 exactly). Each source is split from
                      the ones after it, each split exact to within one sample in any window of samples. A source has
                      len(source) and source[i]; data.py's also say their name, shards, windows of a row, and damage
    start             {source name: first row}: where an earlier stage stopped (its cursor(n)); it counts rows, not
                      windows, so that it holds across sequence lengths
    max_bad_samples   0 = a bad item raises BadSample; else another item of its source takes its place (a pure function
                      of seed, position and attempt) and Sample.bad tells; whoever consumes the samples counts
    The k-th item of a source depends on (seed, its name, k) only, never on the shares. Every row comes once per epoch.
    .sources {name: ShuffledSource}, those of inner Mixtures too; .names their names.
    Raises UserError for weights that are no shares, empty sources, names that occur twice and, if no bad item is
    allowed, what a source knows of damaged tars and missing images.
    """
    def __init__(self, sources, weights, seed, start=None, max_bad_samples=0):
        shares = [Fraction(str(w)) if isinstance(w, float) else Fraction(w) for w in weights]
        if len(shares) != len(sources) or min(shares, default=-1) < 0 or not sum(shares):
            raise UserError(f"Mixture: weights={list(weights)}: expected {len(sources)} shares >= 0, not all 0")
        self.branches, self.shares, self.sources = [], [], {}
        for i, source in enumerate(sources):
            rest = sum(shares[i:])
            self.shares.append(shares[i] / rest if rest else Fraction(0))
            inner = isinstance(source, Mixture)
            branch = source if inner else ShuffledSource(source, int(seed), f'source {i}')
            self.branches.append(branch)
            for shuffled in branch.sources.values() if inner else [branch]:
                self._add(shuffled, start or {}, max_bad_samples > 0)
        self.names = list(self.sources)

    def _add(self, shuffled, start, lenient):
        if shuffled.n_row == 0:
            raise UserError(f"Mixture: source {shuffled.name!r} is empty")
        if shuffled.name in self.sources:
            raise UserError(f"Mixture: source {shuffled.name!r} occurs twice")
        shuffled.lenient |= lenient                                      # what an inner Mixture allows stays allowed
        damaged = getattr(shuffled.source, 'damaged', ())
        if damaged and not shuffled.lenient:
            raise UserError(damaged[0])
        shuffled.start = start.get(shuffled.name, shuffled.start)
        self.sources[shuffled.name] = shuffled

    def _split(self, n):
        """Return how many of samples [0, n) each branch got, and the branch that gets sample n."""
        taken, chosen = [], None
        for i, p in enumerate(self.shares):
            a, b = p.numerator, 2 * p.denominator
            last = i == len(self.shares) - 1
            mine = n if last else (2 * n * a + p.denominator) // b       # floor(n p + 1/2)
            if chosen is None and (last or (2 * (n + 1) * a + p.denominator) // b > mine):
                chosen = i
            taken.append(mine)
            n -= mine
        return taken, chosen

    def locate(self, n):
        """Return (ShuffledSource, k): sample n is the k-th item of that source."""
        taken, i = self._split(n)
        branch = self.branches[i]
        return branch.locate(taken[i]) if isinstance(branch, Mixture) else (branch, taken[i])

    def outline(self, n):
        """Return (does sample n show an image, a cheap estimate of its positions)."""
        shuffled, k = self.locate(n)
        return shuffled.source.outline(shuffled.item(k))

    def __getitem__(self, n):
        shuffled, k = self.locate(n)
        name, index, bad = shuffled.name, shuffled.item(k), []
        key = _hash(shuffled.seed, name, 'draw', k)
        draw = getattr(shuffled.source, 'draw', None)    # of a source whose items differ from draw to draw
        while True:
            try:
                sample = draw(index, key) if draw else shuffled.source[index]
            except BadSample as e:
                if not shuffled.lenient:
                    raise
                bad.append(str(e))
                if len(bad) > 100:
                    raise BadSample(f"{name}: 100 items in a row are bad, among them {e}") from None
                index = _hash(shuffled.seed, name, k, len(bad)) % len(shuffled.source)
                continue
            if isinstance(sample, Sample):
                sample.source, sample.bad, sample.key = name, bad, key
            return sample

    def counts(self, n):
        """Return {source name: how many of samples [0, n) came from it}."""
        result = {}
        for branch, k in zip(self.branches, self._split(n)[0]):
            result.update(branch.counts(k) if isinstance(branch, Mixture) else {branch.name: k})
        return result

    def cursor(self, n):
        """Return {source name: rows used up by samples [0, n) and before start}, a later stage's `start`."""
        counts, sources = self.counts(n), self.sources.items()
        return {name: s.start - (-counts[name] // s.per_row) for name, s in sources}

    def epochs(self, n):
        """Return {source name: passes over its rows made by samples [0, n), the rows before start included}."""
        counts, sources = self.counts(n), self.sources.items()
        return {name: (s.start + counts[name] / s.per_row) / s.n_row for name, s in sources}


# --- loader ---------------------------------------------------------------------------------------
class Loader:
    """
    The batches of one rank for optimizer steps [start, stop), in order, the same for any n_worker.
    Micro-step m of step s on rank r holds samples [s*G + (m*W + r)*mb, +mb) with G the global batch, W world_size, mb
    the micro batch. group_window > 0: the samples of that many steps, first those without an image, are sorted by
    estimated length and cut into batches, which are shuffled: rows pad less, and one micro-batch of a window at most
    holds rows with and without images (Prismatic's and LLaVA's samplers do alike). Still a pure function of seed, step
    and total (the steps of the whole run, which the last window does not pass).
    Workers are forked here: make it before CUDA starts. Raises UserError when W * mb does not divide G and when a
    worker dies, BadSample for a bad item.
    """
    def __init__(self, mixture, *, start, stop, global_batch_size, micro_batch_size, rank=0, world_size=1, pad_id,
                 pad_to=0, n_worker=0, seed=0, group_window=0, total=None, pin_memory=False):
        self.n_micro, rest = divmod(global_batch_size, world_size * micro_batch_size)
        if rest:
            raise UserError(f"global_batch_size={global_batch_size} is not a multiple of {world_size} processes x "
                            f"micro_batch_size={micro_batch_size}")
        self.mixture, self.rank, self.W = mixture, rank, world_size
        self.G, self.mb = global_batch_size, micro_batch_size
        self.pad_id, self.pad_to = pad_id, pad_to
        self.seed, self.group_window, self.total, self.pin_memory = seed, group_window, total or stop, pin_memory
        self._window = lru_cache(maxsize=2)(self._sorted_window)
        if n_worker and 'fork' not in multiprocessing.get_all_start_methods():
            print(f"!!! data: no fork on {sys.platform}: n_worker={n_worker} becomes 0, batches are made between steps")
            n_worker = 0
        self.next, self.end = start * self.n_micro, stop * self.n_micro
        context, self.workers, self.pipes = multiprocessing.get_context('fork' if n_worker else None), [], []
        for _ in range(n_worker):
            pipe, theirs = context.Pipe()
            self.workers.append(context.Process(target=_work, args=(self, theirs), daemon=True))
            self.workers[-1].start()
            theirs.close()                                               # so that recv() ends when the worker does
            self.pipes.append(pipe)
        if n_worker:
            # runs before multiprocessing's own exit handler, which would wait for workers that ignore SIGTERM
            atexit.register(self.close)
        for i in range(self.next, min(self.next + N_AHEAD * n_worker, self.end)):
            with suppress(OSError):                                      # has died: _receive tells
                self.pipes[i % n_worker].send(i)

    def __iter__(self):
        return self

    def __next__(self):
        if self.next >= self.end:
            self.close()
            raise StopIteration
        batch = self._receive(self.next) if self.workers else self[self.next]
        self.next += 1
        if isinstance(batch, str):                                       # a worker's traceback would bury the message
            raise BadSample(batch)
        if isinstance(batch, Exception):
            raise batch
        return batch.pin_memory() if self.pin_memory else batch

    def _receive(self, i):
        """Return batch i from its worker, and ask that one for another. Raises UserError when it has died."""
        w, n_worker = i % len(self.workers), len(self.workers)
        try:
            batch = self.pipes[w].recv()
            if i + N_AHEAD * n_worker < self.end:
                self.pipes[w].send(i + N_AHEAD * n_worker)
            return batch
        except Exception:                                                # many kinds, for it may die at any moment
            self.workers[w].join(3)                                      # it is ending: its exit code comes last
            if self.workers[w].exitcode is None:
                raise
            raise UserError(f"a loader worker died (exit code {self.workers[w].exitcode}): killed, or out of memory or "
                            "of /dev/shm; --n_worker=0 makes the batches in the training process") from None

    def __getitem__(self, i):
        step, m = divmod(i, self.n_micro)
        lo = (m * self.W + self.rank) * self.mb
        try:
            return collate([self.mixture[n] for n in self.samples(step)[lo:lo + self.mb]], self.pad_id, self.pad_to,
                           self.mixture.names)
        except BadSample as e:
            return str(e)

    def samples(self, step):
        """Return the numbers of the samples of one step, in order, over all ranks."""
        if not self.group_window:
            return range(step * self.G, (step + 1) * self.G)
        window, i = divmod(step, self.group_window)
        return self._window(window)[i]

    def _sorted_window(self, window):
        first = window * self.group_window
        end = min(first + self.group_window, self.total)
        order = sorted(range(first * self.G, end * self.G), key=self.mixture.outline)
        steps = [order[i:i + self.G] for i in range(0, len(order), self.G)]
        return sorted(steps, key=lambda s: _hash(self.seed, 'window', window, s[0]))

    def close(self):
        """End the workers; done at exit too."""
        atexit.unregister(self.close)
        for worker in self.workers:
            worker.kill()
            worker.join()
        self.workers, self.pipes, self.next = [], [], self.end


def _work(loader, pipe):
    """What a worker does: batches of the numbers that it is sent, on one thread, until it is killed."""
    start_worker()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)                        # for the main process, which saves
    torch.set_num_threads(1)
    while True:
        i = pipe.recv()
        try:
            batch = loader[i]
        except Exception as e:                                           # a bug, for the main process to raise
            e.add_note(traceback.format_exc())
            batch = e
        pipe.send(batch)
