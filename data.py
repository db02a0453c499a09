"""
From files to samples: tokenizers, and the sources of text, captions and instructions.
    files -> source[i] -> Sample -> Mixture[n] -> collate -> Batch -> Loader          (from Sample on: mixture.py)

Formats: `.bin` files of uint16 ids (nanoGPT), tars of tokenised rows (OpenLM, DCLM), WebDataset tars of captioned
images, LLaVA JSON. They are read in place through an index of byte offsets kept beside them. No file is trusted and
nothing is unpickled: a file that cannot be read raises UserError, an item BadSample, and both say which. Samples ([sep]
is an id of its own):
    text         a window of documents joined by end-of-text                  loss on every target
    caption      [image x N] [sep] caption [eot]                              loss on the caption and the eot
    instruction  [image x N] [sep] [system] question [sep] answer [sep] ...   loss on each answer and the sep after it
"""
import hashlib
import io
import json
import os
import re
import resource
import stat
import tarfile
import zipfile
import zlib
from bisect import bisect_right
from contextlib import contextmanager
from functools import lru_cache
from glob import escape, glob

import numpy as np

from errors import Field, UserError, check, first_line, reading
from kernels import IGNORE_INDEX
from mixture import BadSample, Batch, Loader, Mixture, Sample, collate  # noqa: F401 (names of this module too)
from vision import RESIZE, open_image
from weights import MAX_JSON_BYTES

IMAGE_SUFFIXES = ('jpg', 'jpeg', 'png', 'webp')
COMPRESSED_TARS = ('.tar.gz', '.tgz', '.tar.bz2', '.tar.xz', '.tar.zst')
CAPTION_FIELDS = ('auto', 'txt', 'json', 'syn')
ROW_LEN = 2048                       # positions of a row, as in OpenLM's shards
ROWS_PER_SHARD = 8192                # a .bin file is shuffled as if cut into shards of so many rows (OpenLM's tars)
# What is larger is refused before it is read or unpacked. Beside each bound: what real data needs.
MAX_ROW_BYTES = 64 << 20             # a row of ids, unpacked: OpenLM's 2,049 ids are 14 KB of JSON
MAX_TEXT_BYTES = 4 << 20             # a caption, a .json of a tar, an entry of LLaVA JSON: its 665k average 1.5 KB
MAX_IMAGE_BYTES = 512 << 20          # an image file: vision.MAX_PIXELS of RGB are 268 MB before compression
MAX_TOKENIZER_BYTES = 256 << 20      # GPT-NeoX-20B's tokenizer.json has 2 MB, a vocabulary of 256k ids 34 MB
MAX_HEADER_BYTES = 1 << 16           # a header inside a tar: a path has at most 4 KB


# --- tokenizer ------------------------------------------------------------------------------------
class Tokenizer:
    """
    A sentencepiece `.model` or Hugging Face `tokenizer.json` with four special ids; use load_tokenizer.
    eot_id is the tokenizer's own end-of-text; image_id, sep_id, pad_id are the first free ids above its own, so text
    can never contain them (GPT-NeoX-20B: 0, 50277, 50278, 50279). vocab_size counts them all.
    """
    def __init__(self, path):
        self.path, self.content = path, read_whole(path, MAX_TOKENIZER_BYTES)
        self.sha256 = hashlib.sha256(self.content).hexdigest()
        self.hf = path.endswith('.json')
        if self.hf:
            os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')     # its threads and forked workers do not mix
            import tokenizers
            parts = json.loads(self.content.decode('utf-8'))
            if not isinstance(parts, dict) or not isinstance(parts.get('model'), dict):
                raise UserError(f"{path}: not a Hugging Face tokenizer.json: it has no 'model'")
            self.engine = tokenizers.Tokenizer.from_buffer(self.content)
            self.engine.no_truncation()                                  # a file may ask for each of these three, and
            self.engine.no_padding()                                     # texts would be cut, or grow, without a word
            self.engine.post_processor = None
            self.engine.encode_special_tokens = True                     # '<|endoftext|>' in a text is text
            n_own = max(self.engine.get_vocab(with_added_tokens=True).values()) + 1
            known = [self.engine.token_to_id(t) for t in ('<|endoftext|>', '</s>', '<|end_of_text|>', '<eos>')]
            eot = next((i for i in known if i is not None), -1)
        else:
            import sentencepiece
            self.engine = sentencepiece.SentencePieceProcessor()
            self.engine.LoadFromSerializedProto(self.content)
            n_own, eot = self.engine.get_piece_size(), self.engine.eos_id()
        first = self.engine.encode('a').tokens[0] if self.hf else self.engine.id_to_piece(self.engine.encode('a')[0])
        self.leading_space = first.startswith('\u2581')       # sentencepiece's own: 'a' is encoded as ' a'
        self.eot_id = eot if eot >= 0 else n_own
        free = max(n_own, self.eot_id + 1)
        self.image_id, self.sep_id, self.pad_id, self.vocab_size = free, free + 1, free + 2, free + 3

    def encode(self, text):
        """Return the ids of a text as a list of int, never a special id, whatever the text says."""
        if not text.isascii():
            text = text.encode('utf-8', 'replace').decode('utf-8')       # json may hold lone surrogates
        ids = self.engine.encode(text, add_special_tokens=False).ids if self.hf else self.engine.encode(text)
        return [i for i in ids if i != self.eot_id] if self.eot_id in ids else ids

    def encode_next(self, text):
        """Return the ids of a text as it goes on after a word: with the space between them, once."""
        return self.encode(text if self.leading_space else ' ' + text)

    def decode(self, ids):
        """Return the text of a sequence of ids; special ids and ids beyond the tokenizer's are dropped."""
        return self.engine.decode([int(i) for i in ids if 0 <= i < self.image_id and i != self.eot_id])


def load_tokenizer(path):
    """Return the Tokenizer of a sentencepiece .model, a tokenizer.json or a folder holding one; raises UserError."""
    file = path
    if os.path.isdir(path):
        found = sorted(glob(os.path.join(escape(path), 'tokenizer.json'))
                       or glob(os.path.join(escape(path), '*.model')))
        if len(found) != 1:
            raise UserError(f"tokenizer {path}: expected a tokenizer.json or one .model in this folder, found {found}")
        file = found[0]
    if not os.path.isfile(file):
        raise UserError(f"tokenizer {path}: no such file; `python prepare.py train_tokenizer` makes one, or give the "
                        "path of a sentencepiece .model or a Hugging Face tokenizer.json")
    try:
        with reading(file, 'a tokenizer'):
            return Tokenizer(file)
    except BaseException as e:                                           # Rust's panic is no Exception
        if type(e).__name__ != 'PanicException':
            raise
        raise UserError(f"{file}: not readable as a tokenizer ({first_line(e)})") from None


# --- files: found, indexed once, read in place ----------------------------------------------------
def find(paths, *suffixes):
    """
    Return the files of a path, folder or pattern, or of a list of them; the files of each are sorted.
    A folder stands for the files below it that end in a suffix, *, ? and [] for what is there, and braces, as in
    {00000..00009}.tar and {a,b}.bin, for files that must all be there. Raises UserError naming what is missing.
    """
    found = []
    for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
        path, hits, missing = os.fspath(path), [], []
        for name in [path] if os.path.exists(path) else expand_braces(path):
            if os.path.isdir(name):
                here = [p for p in glob(escape(name) + '/**/*', recursive=True) if p.endswith(suffixes)]
                if not here:
                    raise UserError(f"{name}: this folder holds no file that ends in {' or '.join(suffixes)}")
            else:
                here = [name] if os.path.isfile(name) else [p for p in glob(name) if os.path.exists(p)]
            hits += here
            missing += [] if here else [name]
        if missing:
            names = ', '.join(missing[:10]) + (f" and {len(missing) - 10} more" if missing[10:] else '')
            raise UserError(f"{path}: no such file" + (f": {names}" if missing != [path] else ''))
        other = [p for p in hits if not os.path.isfile(p)]
        if other:
            raise UserError(f"{other[0]}: not a file")
        packed = [p for p in hits if '.tar' in suffixes and p.endswith(COMPRESSED_TARS)]
        if packed:
            raise UserError(f"{packed[0]}: compressed tars cannot be read in place; unpack it first (gunzip for .gz)")
        found += sorted(hits)
    return found


def expand_braces(pattern):
    """Return the names that {08..11} and {a,b} in a pattern stand for, as in a shell, each once."""
    braces = re.search(r'\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}', pattern)      # a pair with none inside it
    if not braces:
        return [pattern]
    first, last, words = braces.groups()
    if words is None:
        padded = re.match('0.', first) or re.match('0.', last)
        width = max(len(first), len(last)) if padded else 0
        low, high = sorted((int(first), int(last)))
        words = ','.join(f'{i:0{width}d}' for i in range(low, high + 1))
    before, after = pattern[:braces.start()], pattern[braces.end():]
    names = [name for word in words.split(',') for name in expand_braces(before + word + after)]
    return list(dict.fromkeys(names))


@contextmanager
def _item(where):
    """errors.reading for one item of a file: whatever is raised inside becomes a BadSample that says where."""
    try:
        yield
    except Exception as e:
        raise BadSample(f"{where}: {first_line(e)}") from e


def regular(path, flags=os.O_RDONLY):
    """The opener for open(): raises UserError for a pipe, a device or a folder; a pipe might never end."""
    fd = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UserError(f"{path}: not a file")
    return fd


def read_whole(path, limit):
    """Return the bytes of a file; raises UserError for what is no file, or above `limit` bytes."""
    with open(path, 'rb', opener=regular) as f:
        return f.read(_bounded(os.fstat(f.fileno()).st_size, limit, f"{path}: "))


def _bounded(size, limit, where=''):
    if size > limit:
        raise UserError(f"{where}{size:,} bytes, expected at most {limit:,}")
    return size


class _File:
    def __init__(self, path):
        self.fd = regular(path)

    def __del__(self):
        if hasattr(self, 'fd'):
            os.close(self.fd)


# opened when first needed, in each process; the least recently used is closed, and most of `ulimit -n` left to others
_MAY_OPEN = resource.getrlimit(resource.RLIMIT_NOFILE)[0]


@lru_cache(maxsize=64 if _MAY_OPEN == resource.RLIM_INFINITY else min(64, _MAY_OPEN // 4))
def _open_file(stamp):
    return _File(stamp[0])


def _stamp(path):
    about = os.stat(path)
    return path, about.st_size, about.st_mtime_ns


def _read(stamp, offset, size, limit):
    """Every item of every file is read here: at most `limit` bytes, at a place that an index told."""
    if offset < 0:
        raise UserError("a link or a sparse member of the tar: it has no bytes of its own there")
    file = _open_file(stamp)                                             # named: it is open as long as someone has it
    data = os.pread(file.fd, _bounded(size, limit), offset)              # no shared file position: safe after a fork
    if len(data) != size:
        raise UserError(f"{size} bytes expected at offset {offset}, found {len(data)}: a truncated file")
    return data


def _cached_index(stamp, cache_dir, build, *names):
    """Return build(path), arrays by name, kept in `<path>.idx` or cache_dir while size and time of the file agree."""
    path, mark = stamp[0], np.array([2, *stamp[1:]])                     # 2 = the version of the index
    places = [path + '.idx']
    if cache_dir:
        places.append(os.path.join(cache_dir, hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:16] + '.idx'))
    for file in places:
        try:
            with reading(file, 'an index'), open(file, 'rb', opener=regular) as f:
                index = _load_index(f, stamp[1], {'mark', *names})
                if np.array_equal(index.pop('mark'), mark):
                    return index
        except UserError:                                                # absent or damaged: made anew
            continue
    index = build(path)
    for file in places:
        temporary = f'{file}.{os.getpid()}.tmp'
        try:
            os.makedirs(os.path.dirname(file) or '.', exist_ok=True)
            with open(temporary, 'wb') as f:
                np.savez(f, mark=mark, **index)
            os.replace(temporary, file)                                  # other ranks see a whole index or none
            break
        except OSError:                                                  # read-only data: try the next place
            if os.path.exists(temporary):
                os.remove(temporary)
    return index


def _load_index(f, total, names):
    """Return the arrays of an index of a file of `total` bytes; whoever wrote the data may have written it too."""
    limit = _bounded(os.fstat(f.fileno()).st_size, 16 * total + 65536)   # the two bytes of '7,' have an entry of 32
    with zipfile.ZipFile(f) as z:
        _bounded(sum(entry.file_size for entry in z.infolist()), limit)
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in z.infolist()):
            raise UserError("compressed")
    with np.load(f, allow_pickle=False) as z:
        index = dict(z)
    offsets, sizes = index['offsets'], index['sizes']
    for name in names - {'mark', 'names', 'damage'}:
        if index[name].dtype != np.int64 or index[name].shape != (len(offsets),):
            raise UserError(f"{name!r} is no list of {len(offsets)} whole numbers")
    if set(index) != names or ((offsets < -1) | (sizes < 0) | (sizes > total - offsets)).any():
        raise UserError(f"not of a file of {total} bytes")
    if 'names' in names and len(_split_names(index['names'])) != len(offsets):
        raise UserError("not a name for each item")
    return index


def _split_names(joined):
    return joined.tobytes().decode('utf-8', 'surrogateescape').split('\0')[:-1]


class _Headers(io.BufferedReader):
    """A tar as tarfile reads it, which takes the sizes of headers on trust, also those of 1 TB or of less than 0."""
    def read(self, size=-1):
        return super().read(_bounded(size % 2**64, MAX_HEADER_BYTES))    # -1, 'all there is', is beyond any bound


def _build_tar_index(path):
    names, offsets, sizes, damage, end = [], [], [], '', 0
    with reading(path, 'a tar'), _Headers(io.FileIO(path, opener=regular)) as f:
        total = os.fstat(f.fileno()).st_size
        try:
            with tarfile.open(fileobj=f, mode='r:') as tar:              # 'r:' = not compressed: its offsets hold
                for member in tar:
                    elsewhere = member.islnk() or member.issym() or member.issparse()
                    offset, size = (-1, 0) if elsewhere else (member.offset_data, member.size)
                    if tar.offset <= end or offset + size > total:
                        raise UserError(f"{member.name} of {member.size:,} bytes does not end inside the file")
                    if (member.isreg() or elsewhere) and not os.path.basename(member.name).startswith('.'):
                        names.append(member.name.replace('\0', '') + '\0')
                        offsets.append(offset)
                        sizes.append(size)
                    end = tar.offset
        except Exception as e:                                           # whatever tarfile raises: the rest is lost
            damage = first_line(e)
        f.seek(end)
        if not damage and f.read(512) != bytes(512):                     # tarfile takes a cut header for the end
            damage = "no end-of-archive marker there"
        while not damage and (block := f.read(MAX_HEADER_BYTES)):        # zeros may follow, of any number
            if block.count(0) < len(block):
                damage = "more data behind the end-of-archive marker there: a second archive?"
    if damage:
        damage = f"{path}: damaged or truncated tar at offset {end} of {total} bytes: {damage}"
    joined = ''.join(names).encode('utf-8', 'surrogateescape')
    return {'names': np.frombuffer(joined, np.uint8), 'offsets': np.array(offsets, np.int64),
            'sizes': np.array(sizes, np.int64), 'damage': np.array(damage)}


@lru_cache(maxsize=64)
def _tar_members(stamp, cache_dir):
    """Return ([(name, offset, size)], damage) of one tar."""
    index = _cached_index(stamp, cache_dir, _build_tar_index, 'names', 'offsets', 'sizes', 'damage')
    names, places = _split_names(index['names']), (index['offsets'].tolist(), index['sizes'].tolist())
    return list(zip(names, *places)), str(index['damage'])


def tar_members(path, cache_dir=''):
    """Index a tar, unless that has been done, and return ([(name, offset, size)], what is wrong with it or '')."""
    return _tar_members(_stamp(path), cache_dir)


class _Shards:
    """Which shard holds row i. Of each shard: its file's stamp, its rows, and the row of the file it begins with."""
    def __init__(self):
        self.stamps, self.sizes, self.first, self.ends = [], [], [], [0]

    def add(self, stamp, n_row, first=0):
        self.stamps.append(stamp)
        self.sizes.append(n_row)
        self.first.append(first)
        self.ends.append(self.ends[-1] + n_row)

    def describe(self):
        """What a checkpoint remembers of its data, so that a change is noticed: files, rows, and a digest of both."""
        files = [(os.path.basename(path), size, n) for (path, size, _), n in zip(self.stamps, self.sizes)]
        return dict(n_file=len({stamp[0] for stamp in self.stamps}), n_row=sum(self.sizes),
                    sha256=hashlib.sha256(repr(files).encode()).hexdigest())

    def locate(self, row):
        if not 0 <= row < self.ends[-1]:
            raise IndexError(f"row {row}: expected 0..{self.ends[-1] - 1}")
        s = bisect_right(self.ends, row) - 1
        return self.stamps[s], self.first[s] + row - self.ends[s]


# --- sources --------------------------------------------------------------------------------------
# A source has len(source) and source[i] -> Sample. It tells Mixture its name, items_per_row (windows of a stored row),
# group_sizes (rows of each shard), damaged (a line for each damaged file), and length(i), an estimate of positions.
class TextSource:
    """
    Windows of seq_len positions from `.bin` files of little-endian uint16 ids, or from OpenLM/DCLM tars of rows of
    ids. A stored row of P + 1 ids has P targets and feeds ceil(P / seq_len) consecutive windows that overlap by one
    id. No target is lost: where seq_len does not divide P the last window is shorter, and a row shorter than the others
    (at the end of a file) is divided evenly over its windows.
    row_len  P of a `.bin`, which has no rows of its own; 0 = as many whole windows as come near ROW_LEN
    Raises UserError for missing files or another tokenizer's, BadSample for a row that cannot be read.
    """
    def __init__(self, paths, tokenizer, seq_len, name='text', row_len=0, cache_dir=''):
        self.name, self.seq_len, self.tokenizer, self.cache_dir = name, seq_len, tokenizer, cache_dir
        self.shards, self.damaged, self.last = _Shards(), [], (-1, None)
        files = find(paths, '.bin', '.tar')
        self.binary = files[0].endswith('.bin')
        if self.binary:
            longest = max(os.path.getsize(path) // 2 - 1 for path in files)
            self.row_len = row_len or seq_len * max(1, min(round(ROW_LEN / seq_len), -(-longest // seq_len)))
        for path in files:
            if path.endswith('.bin') != self.binary:
                raise UserError(f"{path}: a text source reads .bin files or .tar files, not both; use two sources")
            stamp = _stamp(path)
            _check_sidecar(stamp, tokenizer)
            if self.binary:
                if stamp[1] % 2:
                    raise UserError(f"{path}: {stamp[1]} bytes, expected two for each id: truncated?")
                n_row = -(-max(stamp[1] // 2 - 1, 0) // self.row_len)
                for first in range(0, n_row, ROWS_PER_SHARD):
                    self.shards.add(stamp, min(ROWS_PER_SHARD, n_row - first), first)
            else:
                members, damage = _tar_members(stamp, cache_dir)
                self.damaged += [damage] if damage else []
                self.shards.add(stamp, len(members) + bool(damage))      # all that is lost counts as one bad row
        self.group_sizes = self.shards.sizes
        if sum(self.group_sizes) == 0:
            raise UserError(f"{files[0]}: no row of text in {len(files)} file(s)")
        if not self.binary:
            self.row_len = self._longest_row() - 1                       # 2048 in OpenLM's shards of 2049 ids
        self.items_per_row = -(-self.row_len // seq_len)

    def __len__(self):
        return sum(self.group_sizes) * self.items_per_row

    def length(self, index):
        return self.seq_len

    def __getitem__(self, index):
        row, w = divmod(index, self.items_per_row)
        stamp, r = self.shards.locate(row)
        if self.binary:
            start = r * self.row_len
            lo, hi = self._span(min(self.row_len, stamp[1] // 2 - 1 - start), w)
            n_byte = 2 * (hi - lo + 1)
            with _item(stamp[0]):
                ids = np.frombuffer(_read(stamp, 2 * (start + lo), n_byte, n_byte), '<u2').astype(np.int64)
            self._check_ids(ids, f"{stamp[0]}: position {start + lo + int(ids.argmax())}")
        else:
            ids = self._row(row)
            if len(ids) - 1 > self.row_len:
                raise BadSample(f"{stamp[0]}: row {r} has {len(ids)} ids, the first rows {self.row_len + 1}")
            lo, hi = self._span(len(ids) - 1, w)
            ids = ids[lo:hi + 1]
        return Sample(ids[:-1], ids[1:], source=self.name, id=f"{os.path.basename(stamp[0])}:{r}:{w}")

    def _span(self, n_position, w):
        if n_position == self.row_len:
            return w * self.seq_len, min((w + 1) * self.seq_len, n_position)
        hi = max(n_position * (w + 1) // self.items_per_row, 1)
        return min(n_position * w // self.items_per_row, hi - 1), hi

    def _longest_row(self):
        """Return the number of ids in the longest of the first rows, or in a shard's first row that can be read."""
        for rows in (range(min(8, self.shards.ends[-1])), *([row] for row in self.shards.ends[1:-1])):
            lengths = []
            for row in rows:
                try:
                    lengths.append(len(self._row(row)))
                except BadSample as e:
                    error = e
            if lengths:
                return max(lengths)
        raise BadSample(str(error))

    def _row(self, row):
        if self.last[0] == row:  # the windows of a row are drawn one after another
            return self.last[1]
        stamp, r = self.shards.locate(row)
        members, damage = _tar_members(stamp, self.cache_dir)
        if r == len(members):
            raise BadSample(damage)
        name, offset, size = members[r]
        where = f"{stamp[0]}: {name}"
        with _item(f"{where}: not a row of token ids"):
            data = _read(stamp, offset, size, MAX_ROW_BYTES)
            if name.endswith('.gz'):
                unpack = zlib.decompressobj(31)                          # 31 = gzip
                data = unpack.decompress(data, MAX_ROW_BYTES)
                if not unpack.eof:
                    raise UserError(f"gzip data cut short or beyond {MAX_ROW_BYTES} bytes")
            ids = np.array(json.loads(data))
            if ids.dtype.kind != 'i' or ids.ndim != 1 or len(ids) < 2:
                raise UserError(f"{len(ids) if ids.ndim else 0} items of type {ids.dtype}")
        self._check_ids(ids, where)
        self.last = (row, ids)
        return ids

    def _check_ids(self, ids, where):
        low, high, limit = int(ids.min()), int(ids.max()), self.tokenizer.image_id
        if low < 0 or high >= limit:
            raise BadSample(f"{where}: id {low if low < 0 else high} is beyond the tokenizer's {limit} ids; was this "
                            f"text tokenised with {self.tokenizer.path}?")


def _check_sidecar(stamp, tokenizer):
    """Raise UserError when the .json beside a shard says that it was longer, or that another tokenizer wrote it."""
    path, side = stamp[0], os.path.splitext(stamp[0])[0] + '.json'
    if not os.path.lexists(side):
        return
    with reading(side, 'JSON'):
        info = json.loads(read_whole(side, MAX_TEXT_BYTES))
    if not isinstance(info, dict):
        return
    check(info, Field(dict, of=SIDECAR), side)
    sha, n_token = info.get('tokenizer_sha256'), info.get('n_token')
    if sha and sha != tokenizer.sha256:
        raise UserError(f"{path}: written with another tokenizer (sha256 {sha[:12]}..., vocabulary "
                        f"{info.get('vocab_size')}) than {tokenizer.path} ({tokenizer.sha256[:12]}..., "
                        f"{tokenizer.vocab_size}); tokenise again, or remove {side} if the two are the same")
    if path.endswith('.bin') and n_token is not None and stamp[1] != 2 * n_token:
        raise UserError(f"{path}: {stamp[1]} bytes, expected {2 * n_token} for the {n_token} ids of {side}: truncated?")


SIDECAR = {'tokenizer_sha256': Field(str, optional=True), 'vocab_size': Field(int, 1, optional=True),
           'n_token': Field(int, 0, optional=True)}


class CaptionSource:
    """
    Image-caption samples from WebDataset tars: [image x N] [sep] caption [eot], loss on the caption and the eot.
    Members are one sample when their names agree up to the first dot of the base name, in any order. A sample has an
    image (.jpg .jpeg .png .webp) and a caption. A caption that does not fit is cut and its eot left out
    (Sample.n_truncated).
    caption_field  'txt' = the .txt; 'json' = 'caption' or 'text' of the .json; 'syn' = one entry of 'syn_text' of the
                   .syn.json (DataCompDR; a checksum of the key picks it); 'auto' = the first of these that is there
    .note          what 'auto' means here, a line for the user, where a sample has other captions too; else ''
    Raises UserError when seq_len < encoder_n_token + 2, BadSample for an item without a readable image or caption.
    """
    items_per_row = 1

    def __init__(self, paths, tokenizer, seq_len, encoder_n_token, image_size, resize='letterbox', name='caption',
                 cache_dir='', caption_field='auto'):
        self.name, self.tokenizer, self.seq_len, self.cache_dir = name, tokenizer, seq_len, cache_dir
        self.n_token, self.image_size, self.resize = encoder_n_token, image_size, resize
        self.caption_field = caption_field
        _check_room(name, seq_len, encoder_n_token, resize)
        if caption_field not in CAPTION_FIELDS:
            raise UserError(f"{name}: caption_field={caption_field!r}: expected one of {', '.join(CAPTION_FIELDS)}")
        self.prefix = caption_prompt(encoder_n_token, tokenizer)
        self.shards, self.damaged = _Shards(), []
        for path in find(paths, '.tar'):
            stamp = _stamp(path)
            groups, damage = _caption_groups(stamp, cache_dir)
            self.damaged += [damage] if damage else []
            self.shards.add(stamp, len(groups) + bool(damage))
        self.group_sizes = self.shards.sizes
        self.note = self._note()

    def _note(self):
        groups, _ = _caption_groups(self.shards.stamps[0], self.cache_dir)
        there = {suffix for _, members in groups for suffix in members}
        if self.caption_field != 'auto' or 'syn.json' not in there or not there & {'txt', 'json'}:
            return ''
        taken = '.txt of each sample' if 'txt' in there else "'caption' or 'text' of the .json that have one"
        return (f"{self.name}: captions: {taken} (.syn.json is there too: --caption_field=syn reads the synthetic "
                "captions)")

    def __len__(self):
        return sum(self.group_sizes)

    def length(self, index):
        return self.seq_len

    def __getitem__(self, index):
        stamp, r = self.shards.locate(index)
        groups, damage = _caption_groups(stamp, self.cache_dir)
        if r == len(groups):
            raise BadSample(damage)
        key, members = groups[r]
        with _item(f"{stamp[0]}: {key}"):
            image = next((members[s] for s in IMAGE_SUFFIXES if s in members), None)
            if image is None:
                raise UserError(f"no image ({', '.join(IMAGE_SUFFIXES)}) among its members: {', '.join(members)}")
            caption = self._caption(stamp, key, members)
            image = RESIZE[self.resize](open_image(_read(stamp, *image, MAX_IMAGE_BYTES)), self.image_size)
        ids = self.prefix + self.tokenizer.encode(caption) + [self.tokenizer.eot_id]
        cut = len(ids) > self.seq_len + 1
        ids = np.array(ids[:self.seq_len + 1], np.int64)
        targets = ids[1:].copy()
        targets[:self.n_token] = IGNORE_INDEX                            # image positions, and the sep as a target
        return Sample(ids[:-1], targets, None, [image], self.name, f"{os.path.basename(stamp[0])}:{key}", self.n_token,
                      self.tokenizer.image_id, [f"{stamp[0]}:{r}"], int(cut))

    def _caption(self, stamp, key, members):
        def json_of(suffix):
            about = json.loads(_read(stamp, *members[suffix], MAX_TEXT_BYTES)) if suffix in members else None
            return about if isinstance(about, dict) else {}
        field, text = self.caption_field, None
        if field == 'txt' or field == 'auto' and 'txt' in members:
            field = 'txt'
            text = _read(stamp, *members['txt'], MAX_TEXT_BYTES).decode('utf-8') if 'txt' in members else None
        if field in ('json', 'auto'):
            about = json_of('json' if 'json' in members or field == 'json' else 'syn.json')
            text = about.get('caption') or about.get('text')
        if field == 'syn' or field == 'auto' and text is None:
            options = json_of('syn.json').get('syn_text')
            if isinstance(options, list) and options:
                text = options[zlib.crc32(key.encode('utf-8', 'surrogateescape')) % len(options)]
        if not isinstance(text, str) or not text.strip():
            expected = {'txt': ".txt", 'json': ".json 'caption' or 'text'", 'syn': ".syn.json 'syn_text'"}
            wanted = ', '.join(expected.values()) if field == 'auto' else expected[field]
            raise UserError(f"no caption ({wanted}), or an empty one, among its members: {', '.join(members)}")
        return text.strip()


@lru_cache(maxsize=64)
def _caption_groups(stamp, cache_dir):
    members, damage = _tar_members(stamp, cache_dir)
    groups, last = [], {}
    for name, offset, size in members:
        folder, base = os.path.split(name)
        key, _, suffix = base.partition('.')
        key, suffix = os.path.join(folder, key), suffix.lower()
        if key not in last or suffix in last[key]:                       # a name that comes again begins another sample
            last[key] = {}
            groups.append((key, last[key]))
        last[key][suffix] = offset, size
    return groups, damage


def _check_room(name, seq_len, n_token, resize):
    if seq_len < n_token + 2:
        raise UserError(f"{name}: seq_len={seq_len} does not hold {n_token} image positions, a separator and text; "
                        f"expected at least {n_token + 2}")
    if resize not in RESIZE:
        raise UserError(f"{name}: resize={resize!r}: expected one of {', '.join(RESIZE)}")


def _clean(text):
    if not isinstance(text, str):
        raise BadSample(f"the text of a turn is {type(text).__name__}, not a string")
    return text.replace('<image>', '').strip()


def caption_prompt(n_token, tokenizer):
    """Return the ids in front of a caption: [image x N] [sep]; none without an image."""
    return [tokenizer.image_id] * n_token + [tokenizer.sep_id] if n_token else []


def instruct_prompt(question, n_token, tokenizer, system_prompt=''):
    """Return the ids in front of a first answer: [image x N] [sep] [system] question [sep]; n_token=0 = text only."""
    system = tokenizer.encode(system_prompt) if system_prompt else []
    return caption_prompt(n_token, tokenizer) + system + tokenizer.encode(_clean(question)) + [tokenizer.sep_id]


class InstructSource:
    """
    Conversations from LLaVA JSON (a list, or one object per line) and a folder of images, laid out as in the file's
    docstring. Entries without 'image' are text only. Turns alternate human, gpt; '<image>' is taken out of every text.
    loss_average  'token' = every kept target weighs 1; 'answer' = each answer with its sep weighs 1 in total (less
                  where seq_len cuts it)
    split_turns   True = a row per question, each with image and system prompt; they share one encoded image
    Raises UserError for a missing file or broken JSON, BadSample for an unusable entry or one cut before any answer.
    """
    items_per_row = 1

    def __init__(self, json, image_root, tokenizer, seq_len, n_token, image_size, resize='letterbox', system_prompt='',
                 loss_average='token', split_turns=False, name='instruct', cache_dir=''):
        _check_room(name, seq_len, n_token, resize)
        if loss_average not in ('token', 'answer'):
            raise UserError(f"{name}: loss_average={loss_average!r}: expected 'token' or 'answer'")
        self.name, self.image_root, self.tokenizer, self.seq_len = name, image_root, tokenizer, seq_len
        self.n_token, self.image_size, self.resize, self.system_prompt = n_token, image_size, resize, system_prompt
        self.loss_average, self.split_turns, self.damaged, self.shards = loss_average, split_turns, [], _Shards()
        self.entries, names = [], ('offsets', 'sizes', 'n_char', 'has_image')    # (n, 4) per file
        for path in find(json, '.json', '.jsonl'):
            stamp = _stamp(path)
            index = _cached_index(stamp, cache_dir, _build_json_index, *names)
            self.entries.append(np.stack([index[name] for name in names], 1))
            self.shards.add(stamp, len(self.entries[-1]))
        self.entries = np.concatenate(self.entries)
        self.group_sizes = [len(self.entries)]                           # one group: shuffled as a whole
        if not len(self.entries):
            raise UserError(f"{json}: no entries")

    def __len__(self):
        return len(self.entries)

    def length(self, index):
        """Return a cheap estimate of the item's positions: characters / 4, and the image."""
        return min(int(self.entries[index, 2]) // 4 + self.n_token * int(self.entries[index, 3]), self.seq_len)

    def __getitem__(self, index):
        stamp, r = self.shards.locate(index)
        offset, size = self.entries[index, :2].tolist()
        with _item(f"{stamp[0]}: entry {r}"):
            entry = json.loads(_read(stamp, offset, size, MAX_TEXT_BYTES))
            turns = _turns(entry)
            image = entry.get('image') or None
            sample = self._layout([turns[i:i + 2] for i in range(0, len(turns), 2)], self.n_token if image else 0)
            if image:
                sample.images = [RESIZE[self.resize](self._open_image(image), self.image_size)]
                sample.image_keys = [image]
        sample.source, sample.id = self.name, f"{os.path.basename(stamp[0])}:{r}"
        return sample

    def _open_image(self, image):
        path = safe_join(self.image_root, image)
        content = read_whole(path, MAX_IMAGE_BYTES)
        with _item(path):
            return open_image(content)

    def _layout(self, pairs, n_token):
        encode, sep = self.tokenizer.encode, self.tokenizer.sep_id
        rows = []
        for p, (question, answer) in enumerate(pairs):
            if p == 0 or self.split_turns:
                ids = instruct_prompt(question, n_token, self.tokenizer, self.system_prompt)
                rows.append(([], []))                                    # ids, and a weight for each id as a target
            else:
                ids = encode(_clean(question)) + [sep]
            rows[-1][0].extend(ids)
            rows[-1][1].extend([0.0] * len(ids))
            ids = encode(_clean(answer)) + [sep]
            rows[-1][0].extend(ids)
            rows[-1][1].extend([1 / len(ids) if self.loss_average == 'answer' else 1.0] * len(ids))
        cut = int(max(len(ids) for ids, _ in rows) > self.seq_len + 1)
        rows = [(ids[:self.seq_len + 1], w[:self.seq_len + 1]) for ids, w in rows]
        rows = [(ids, w) for ids, w in rows if any(w)]
        if not rows:
            raise BadSample(f"no answer is left within seq_len={self.seq_len}")
        shape = len(rows), max(len(ids) for ids, _ in rows) - 1
        tokens, targets = np.full(shape, self.tokenizer.pad_id, np.int64), np.full(shape, IGNORE_INDEX, np.int64)
        weights = np.zeros(shape, np.float32)
        for b, (ids, w) in enumerate(rows):
            n = len(ids) - 1
            tokens[b, :n], weights[b, :n] = ids[:-1], w[1:]
            targets[b, :n] = np.where(weights[b, :n] > 0, ids[1:], IGNORE_INDEX)
        if not self.split_turns:
            tokens, targets, weights = tokens[0], targets[0], weights[0]
        return Sample(tokens, targets, weights if self.loss_average == 'answer' else None, n_image_token=n_token,
                      image_id=self.tokenizer.image_id, n_truncated=cut)


def safe_join(root, path):
    """Return root/path; raises BadSample for a path from a data file that is absolute or leaves the root."""
    if not isinstance(path, str) or os.path.isabs(path) or '..' in path.replace('\\', '/').split('/'):
        raise BadSample(f"image {path!r}: expected a path inside {root or 'the image folder'}")
    return os.path.join(root, path)


def _turns(entry):
    """Return the texts of an entry's turns, question and answer alternating; raises BadSample for anything else."""
    turns = entry.get('conversations') if isinstance(entry, dict) else None
    if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(t, dict) for t in turns):
        raise BadSample("no 'conversations' with a question and an answer")
    for i, turn in enumerate(turns):
        if turn.get('from') != ('human', 'gpt')[i % 2]:
            raise BadSample(f"turn {i} is from {turn.get('from')!r}, expected {('human', 'gpt')[i % 2]!r}")
    return [turn.get('value') for turn in turns[:len(turns) // 2 * 2]]  # a last question without an answer has no loss


def _json_entry(text, at):
    """Return (entry, end) of the JSON that begins at `at`; no more than MAX_TEXT_BYTES of it are parsed."""
    decoder, n = json.JSONDecoder(), 8192
    try:
        entry, n = decoder.raw_decode(text[at:at + n])                   # most are short, and a slice is a copy
    except (ValueError, RecursionError):
        pass
    if n == 8192:
        entry, n = decoder.raw_decode(text[at:at + MAX_TEXT_BYTES])
    return entry, at + n


def _build_json_index(path):
    with reading(path, 'JSON'):
        text = read_whole(path, MAX_JSON_BYTES).decode('latin-1')        # a character a byte: positions are offsets
    skip, entries, at = re.compile(r'[\s,\[]*(?:\xef\xbb\xbf)?[\s,\[]*'), [], 0
    while (at := skip.match(text, at).end()) < len(text) and text[at] != ']':
        try:
            entry, end = _json_entry(text, at)
        except (ValueError, RecursionError) as e:
            line = text.count('\n', 0, at + getattr(e, 'pos', 0)) + 1
            long = f" or an entry above {MAX_TEXT_BYTES:,} bytes" * (len(text) - at > MAX_TEXT_BYTES)
            raise UserError(f"{path}: line {line}, entry {len(entries)}: broken JSON{long}: "
                            f"{first_line(getattr(e, 'msg', e))}") from None
        turns = entry.get('conversations') if isinstance(entry, dict) else None
        n = sum(len(str(t.get('value'))) for t in turns if isinstance(t, dict)) if isinstance(turns, list) else 0
        entries.append((at, end - at, n, bool(isinstance(entry, dict) and entry.get('image'))))
        at = end
    is_list = re.match(r'(\s|\xef\xbb\xbf)*\[', text) is not None
    if at == len(text) and is_list:
        raise UserError(f"{path}: broken JSON: the list has no end after entry {len(entries) - 1}: truncated?")
    if at < len(text) and (not is_list or text[at + 1:].strip()):
        line = text.count('\n', 0, at) + 1
        raise UserError(f"{path}: line {line}: broken JSON: text behind entry {len(entries) - 1}, the last of the list")
    columns = np.array(entries, np.int64).reshape(-1, 4).T
    return dict(zip(('offsets', 'sizes', 'n_char', 'has_image'), columns))
