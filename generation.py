"""
How a model goes on after what it has read: the cache of keys and values, continuations, and how probable given ones
are. VLM (model.py) has these functions as methods.

    new = model.generate(prompts, images, image_index)              # list of lists of ids
    for key, ids in model.generate_each(feed, 16, 900): ...         # rows that end make room for others
    nats, _ = model.choice_nats(contexts, choices)                  # each context is read once
"""
import copy

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from connectors import Sight
from images import each
from kernels import Intervals, linear_cross_entropy


class KVCache:
    """
    Keys and values of every layer, written at each row's own positions: rows of different lengths share a batch.
    cross    a model's CrossBlocks, whose keys and values of each row's last image are kept, too; or None
    """
    def __init__(self, config, batch, length, device, dtype, cross=None):
        shape = (config.n_layer, batch, config.n_head, length, config.n_embd // config.n_head)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.rows = None                                        # (B,) int64, or None = all
        self.cross, self.last = cross, {}       # from the first image on: 'images' (n_block,2,B,n,C), 'shown' (B,) bool

    def at(self, length, rows=None):
        """The same memory, of which only the first positions and the given rows are written and read."""
        part = copy.copy(self)
        part.k, part.v, part.rows = self.k[:, :, :, :length], self.v[:, :, :, :length], rows
        return part

    def update(self, layer, k, v, position):
        """Write k, v (B,H,T,D) at position (B,T) of a layer; returns that layer's whole (B,H,length,D) pair."""
        rows = torch.arange(k.shape[0], device=k.device) if self.rows is None else self.rows
        self.k[layer][rows[:, None], :, position] = k.transpose(1, 2).to(self.k.dtype)
        self.v[layer][rows[:, None], :, position] = v.transpose(1, 2).to(self.v.dtype)
        if self.rows is None:
            return self.k[layer], self.v[layer]
        return self.k[layer][rows], self.v[layer][rows]

    def fill(self, prefix, row, n):
        """Copy n positions of another cache's rows `row` (B,) to its start: a prefilled image serves many questions."""
        rows = slice(None) if self.rows is None else self.rows
        self.k[:, rows, :, :n] = prefix.k[:, row, :, :n]
        self.v[:, rows, :, :n] = prefix.v[:, row, :, :n]
        self.show(prefix.last.get('images'), row)

    def show(self, images, row):
        """From now on these rows see, of images (n_block,2,N,n,C) or None, the row-th (B,); -1 = none."""
        rows = slice(None) if self.rows is None else self.rows
        if images is not None and not self.last:
            (n_block, _, _, *shape), B = images.shape, self.k.shape[1]
            self.last.update(images=images.new_zeros(n_block, 2, B, *shape), shown=row.new_zeros(B, dtype=torch.bool))
        if images is not None:
            self.last['images'][:, :, rows] = images[:, :, row.clamp(min=0)]
        if self.last:
            self.last['shown'][rows] = row >= 0

    def sight(self, T):
        """What T further positions of each row see of images; None where there is none."""
        if not self.last:
            return None
        rows = slice(None) if self.rows is None else self.rows
        return Sight.cached(self.cross, self.last['images'][:, :, rows], self.last['shown'][rows], T)


def document_start(model, ids):
    """The position at which the document under way after ids began: 0 but for a model with document_end."""
    return max((i + 1 for i, token in enumerate(ids) if token == model.document_end), default=0)


def cached_mask(model, tokens, position, length, images, start=None):
    """
    Intervals: what tokens (B,T), side by side at position (B,T), see of a cache of `length` key slots.
    images  do the tokens hold any?
    start   (B,) where the document began that goes on at the first of them; None = 0
    """
    own = model.intervals(tokens, images)                       # counted from the first of the tokens
    if own is None:
        return Intervals.cached(position, length)
    first = position[:, :1]
    lo = torch.where(own.lo > 0, first + own.lo, 0 if start is None else start[:, None])
    return Intervals(lo.int(), (first + own.hi).int(), kind='cached')


def new_cache(model, batch, length):
    """A KVCache in the dtype that the model computes in now."""
    weight = model.decoder.output.weight
    autocast = torch.is_autocast_enabled(weight.device.type)
    dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
    return KVCache(model.decoder.config, batch, length, weight.device, dtype, model.cross)


def cross_cache(model, features):
    """Keys and values (n_block,2,N,n,C) that the cross blocks make of features (N,n,C)."""
    return torch.stack([torch.stack(block.keys_values(features)) for block in model.cross])


@torch.no_grad()
def prefill_images(model, images, image_text=None):
    """
    Read images once, for any number of calls of generate(prompts, prefix=..., image_index=...).
    images   as model.image_features takes them; and image_text, of a model with text_cond: to generate and choice_nats
             such a model's images come in this way
    returns  KVCache of N rows and as many positions as the largest image takes; .slots (N,), what each of them takes
    """
    slots = model.slots(images)
    N, n = len(slots), max(slots)
    prefix = new_cache(model, N, n)
    prefix.slots, device = torch.tensor(slots), prefix.k.device
    x = model.image_features(each(lambda t: t.to(device), images), image_text)         # (N,n,C), or a list of (n,C)
    x = pad_sequence(list(x), batch_first=True).to(model.decoder.tok_embeddings.weight.dtype)   # as embed
    if model.cross is not None:
        prefix.show(cross_cache(model, x), torch.arange(N, device=device))
        x = model.decoder.tok_embeddings(torch.full((N, 1), model.image_id, device=device))     # (N,1,C)
    position = torch.arange(n, device=device).expand(N, -1)
    unread = torch.zeros(1, dtype=torch.int64, device=device)          # only the cache is wanted: one row of output
    mask = cached_mask(model, torch.full_like(position, model.image_id), position, n, True)
    model.decoder.trunk(x, unread, mask, position, prefix)
    return prefix


def images_open_rows(model, tokens, length, slots):
    """Is every row of tokens (B,T) one image of so many slots (B,), then at least one id, and no further image?"""
    if model.encoder is None or len(slots) != len(tokens) or bool((length <= slots).any()):
        return False
    return torch.equal(tokens == model.image_id, torch.arange(tokens.shape[1]) < slots[:, None])


def read(model, prompts, images, image_index, prefix, cache):
    """
    Write prompts into a cache; prompts, images, image_index and prefix as in generate.
    returns  (B,C) the trunk's output at the last id of each prompt
    """
    if not prompts or not all(prompts):
        raise ValueError("generate: expected prompts of at least one token each")
    device, B = cache.k.device, len(prompts)
    length = torch.tensor([len(p) for p in prompts])
    tokens, start = torch.zeros(B, int(length.max()), dtype=torch.int64), 0
    for row, prompt in zip(tokens, prompts):
        row[:len(prompt)] = torch.tensor(prompt)
    if images is not None or prefix is not None:
        slots = prefix.slots if prefix is not None else torch.tensor(model.slots(images))
        image_index = torch.arange(len(slots)) if image_index is None else image_index.cpu()
        slots = slots[image_index]                                                     # (B,), where each row has one
        if images_open_rows(model, tokens, length, slots):
            if prefix is None:
                used, image_index = image_index.unique(return_inverse=True)
                used = used.tolist()
                prefix = prefill_images(model, [images[i] for i in used] if isinstance(images, list) else images[used])
            start = int(slots[0])
            if bool((slots != start).any()):                                           # rows of one size at a time
                rows = torch.arange(B, device=device) if cache.rows is None else cache.rows
                groups = [(slots == n).nonzero()[:, 0] for n in slots.unique()]
                hidden = [read(model, [prompts[i] for i in group], None, image_index[group], prefix,
                               cache.at(cache.k.shape[3], rows[group.to(device)])) for group in groups]
                return torch.cat(hidden)[torch.cat(groups).argsort().to(device)]
        elif prefix is not None:
            raise ValueError("generate: with a prefix, each prompt is one image and then text without images")
        image_index = image_index.to(device)
    tokens, sight = tokens.to(device), None
    if prefix is None:
        images = each(lambda t: t.to(device), images)
        x, sight = model.embed(tokens, images, image_index), model.see(tokens, images, image_index)
        if sight is not None:
            sight.images = cross_cache(model, sight.images[0])
            n_slot = (tokens == model.image_id).sum(1)                                 # (B,)
            cache.show(sight.images, torch.where(n_slot > 0, image_index[n_slot.cumsum(0) - 1], -1))
        else:
            cache.show(None, torch.full((B,), -1, device=device))
    else:
        cache.fill(prefix, image_index, start)
        x = model.decoder.tok_embeddings(tokens[:, start:])
    T = x.shape[1]
    position = start + torch.arange(T, device=device).expand(B, -1)                    # (B,T)
    ends = (torch.arange(B) * T + length - 1 - start).to(device)                       # where each prompt ends in x
    mask = cached_mask(model, tokens[:, start:], position, cache.k.shape[3], start == 0 and images is not None)
    return model.decoder.trunk(x, ends, mask, position, cache, sight)


@torch.no_grad()
def generate(model, prompts, images=None, image_index=None, *, max_new_tokens=128, stop_ids=(), temperature=0.0,
             top_k=0, generator=None, prefix=None):
    """
    Continue prompts of different lengths in one batch; greedy unless temperature > 0.
    prompts      list of B lists of ids; image_id at image slots
    images       (N,3,S,S) uint8 or None; image_index (M,) as in VLM.forward
    prefix       instead of images: what prefill_images(images) gave, for prompts that open with an image
    returns      list of B lists: the new ids, without the stop id that ended a row
    An image that opens several prompts is encoded and prefilled once.
    """
    batches = iter([(range(len(prompts)), prompts, images, image_index, prefix)])
    new = dict(generate_each(model, lambda n: next(batches, None), len(prompts), max(map(len, prompts), default=0),
                             max_new_tokens=max_new_tokens, stop_ids=stop_ids, temperature=temperature, top_k=top_k,
                             generator=generator))
    return [new[i] for i in range(len(prompts))]


@torch.no_grad()
def generate_each(model, feed, batch_size, length, *, max_new_tokens=128, stop_ids=(), temperature=0.0, top_k=0,
                  generator=None, until=None):
    """
    Continue any number of prompts, batch_size at a time: a row that ends makes room for another.
    feed     feed(n) -> (keys, prompts, images, image_index, prefix) of at most n further rows, the last four as
             in generate; None when there are no more
    length   of the longest prompt
    until    until(key, ids) -> True where a row is to end with these new ids, besides stop_ids and max_new_tokens
    yields   (key, new ids) as rows end
    """
    device = model.decoder.output.weight.device
    cache = new_cache(model, max(batch_size, 1), length + max_new_tokens)
    token, position, start = torch.zeros(3, max(batch_size, 1), dtype=torch.int64, device=device)
    place = [None] * max(batch_size, 1)                        # (key, new ids, length) of the row at each place
    more = True
    while True:
        free = [i for i, row in enumerate(place) if row is None]
        while more and len(free) >= max(1, batch_size // 4):    # to read a few at a time costs more than empty places
            given = feed(len(free))
            more = given is not None
            if more:
                keys, prompts, *pictures = given
                if max_new_tokens == 0:
                    yield from ((key, []) for key in keys)
                    continue
                taken, free = free[:len(keys)], free[len(keys):]
                rows = torch.tensor(taken, device=device)
                hidden = read(model, prompts, *pictures, cache.at(max(map(len, prompts), default=0), rows))
                token[rows] = _pick(model.decoder.output(hidden).float(), temperature, top_k, generator)
                position[rows] = torch.tensor([len(p) for p in prompts], device=device)
                start[rows] = torch.tensor([document_start(model, p) for p in prompts], device=device)
                for i, key, prompt in zip(taken, keys, prompts):
                    place[i] = key, [], len(prompt)
        for i, t in enumerate(token.tolist()):
            if place[i] is not None:
                key, new, _ = place[i]
                if t not in stop_ids:
                    new.append(t)
                if t in stop_ids or len(new) == max_new_tokens or until is not None and until(key, new):
                    place[i] = None
                    yield key, new
        alive = [row for row in place if row is not None]
        if alive:
            # the keys that anyone sees, rounded up so that few shapes occur
            part = cache.at(64 * -(-max(n + len(new) for _, new, n in alive) // 64))
            at = position.clamp(max=part.k.shape[3] - 1)[:, None]                      # (B,1); empty places anywhere
            mask = cached_mask(model, token[:, None], at, part.k.shape[3], False, start)
            hidden = model.decoder.trunk(model.decoder.tok_embeddings(token)[:, None],
                                         torch.arange(len(place), device=device), mask, at, part)              # (B,C)
            if model.document_end is not None:
                start = torch.where(token == model.document_end, position + 1, start)
            token = _pick(model.decoder.output(hidden).float(), temperature, top_k, generator)
            position = position + 1
        elif not more:
            return


def _pick(logits, temperature, top_k, generator):
    """The next id (B,) of logits (B,V): argmax, or a sample of the top_k at a temperature."""
    if temperature <= 0:
        return logits.argmax(-1)
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -torch.inf)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature                    # no inf - inf at a tiny one
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)


@torch.no_grad()
def choice_nats(model, contexts, choices, images=None, image_index=None, prefix=None, *, greedy=False):
    """
    How probable given continuations are. Each context is read once; its choices follow it one after the other at the
    same places of the cache, where each overwrites the one before it.
    contexts  list of B lists of ids; images, image_index and prefix as the prompts' of generate
    choices   list of B lists of choices, each a list of at least one id
    greedy    also say of each choice whether generate would write it
    returns   nats, list of B lists of float: summed over a choice's ids, each in float32; the same of bool, or None
    """
    weight, B = model.decoder.output.weight, len(contexts)
    length = torch.tensor([len(c) for c in contexts], device=weight.device)
    start = torch.tensor([document_start(model, c) for c in contexts], device=weight.device)
    longest = max(len(ids) for options in choices for ids in options)
    cache = new_cache(model, B, max(map(len, contexts)) + longest - 1)
    nats = [[0.0] * len(options) for options in choices]
    likely = [[True] * len(options) for options in choices]

    def add(hidden, targets):
        """hidden (K,C) and its K targets (row, choice, id)."""
        ids = torch.tensor([i for _, _, i in targets], device=hidden.device)
        if hidden.is_cpu:                    # the operator would import torch's compiler first: a second
            with torch.autocast('cpu', enabled=False):
                nll = torch.cat([F.cross_entropy(x.float() @ weight.float().T, i, reduction='none')
                                 for x, i in zip(hidden.split(256), ids.split(256))])
        else:
            nll, _ = linear_cross_entropy(hidden, weight, ids, rows=torch.arange(len(ids), device=hidden.device))
        for (b, j, _), value in zip(targets, nll.tolist()):
            nats[b][j] += value
        if greedy:
            best = torch.cat([model.decoder.output(part).argmax(-1) for part in hidden.split(256)])
            for (b, j, i), top in zip(targets, best.tolist()):
                likely[b][j] &= i == top
    hidden = read(model, contexts, images, image_index, prefix, cache.at(max(map(len, contexts))))     # (B,C)
    first = [(b, j, ids[0]) for b, options in enumerate(choices) for j, ids in enumerate(options)]
    add(hidden[torch.tensor([b for b, _, _ in first], device=hidden.device)], first)
    for j in range(max(map(len, choices))):
        rows = [b for b, options in enumerate(choices) if len(options) > j and len(options[j]) > 1]
        if not rows:
            continue
        T = max(len(choices[b][j]) for b in rows) - 1
        tokens = torch.zeros(B, T, dtype=torch.int64)
        for b in rows:
            tokens[b, :len(choices[b][j]) - 1] = torch.tensor(choices[b][j][:-1])
        targets = [(b, j, i) for b in rows for i in choices[b][j][1:]]
        kept = torch.tensor([b * T + t for b in rows for t in range(len(choices[b][j]) - 1)], device=weight.device)
        position = length[:, None] + torch.arange(T, device=weight.device)                             # (B,T)
        tokens = tokens.to(weight.device)
        mask = cached_mask(model, tokens, position, cache.k.shape[3], False, start)
        add(model.decoder.trunk(model.decoder.tok_embeddings(tokens), kept, mask, position, cache), targets)
    return nats, likely if greedy else None
