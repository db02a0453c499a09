"""
Files of data: found by path, pattern and braces, never a pipe, indexed once, read in place and only up to a bound.

    for path in find('captions/{0000..0099}.tar', '.tar'): ...
    members, damage = tar_members(path)                  # [(name, offset, size)] from an index kept beside the tar
    read_at(stamp_of(path), offset, size, limit)         # the one place where an item's bytes come from

Nobody vouches for these files: what they declare is compared with a bound before it is believed.
"""
import functools
import hashlib
import io
import json
import multiprocessing
import os
import re
import resource
import signal
import stat
import tarfile
import threading
import zlib
from bisect import bisect_right
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext, suppress
from functools import lru_cache
from glob import escape, glob

import numpy as np
from tqdm import tqdm

from errors import BadSample, Field, UserError, check, first_line, reading

COMPRESSED_TARS = ('.tar.gz', '.tgz', '.tar.bz2', '.tar.xz', '.tar.zst')
MAX_HEADER_BYTES = 1 << 16           # a header inside a tar: a path has at most 4 KB


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
        begun = [p for p in hits if os.path.dirname(os.path.abspath(p)).endswith('.partial')]
        if begun:
            raise UserError(f"{min(begun)}: of a preparation that has not finished; start the same command again")
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
def reading_item(where):
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
        return f.read(bounded(os.fstat(f.fileno()).st_size, limit, f"{path}: "))


def write_file(path, content):
    """Write bytes, a str, a dict as JSON, or a list as one JSON object a line; makes the folder."""
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    if isinstance(content, list):
        content = ''.join(json.dumps(row) + '\n' for row in content)
    elif isinstance(content, dict):
        content = json.dumps(content)
    with open(path, 'wb') as f:
        f.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole(path):
    """Yield a temporary name; what is written there becomes `path`, on the disk, or vanishes with an error."""
    temporary = f'{path}.{os.getpid()}.tmp'
    try:
        yield temporary
        with open(temporary, 'rb') as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            os.remove(temporary)


@contextmanager
def writing(path):
    """Around everything that writes into path; what is read inside raises UserErrors of its own."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({first_line(e)})") from e


def write_whole(path, content):
    """write_file, but the file is whole or not there; raises UserError when it cannot be written."""
    with writing(path), whole(path) as temporary:
        write_file(temporary, content)


def bounded(size, limit, where=''):
    if size > limit:
        raise UserError(f"{where}{size:,} bytes, expected at most {limit:,}")
    return size


# opened when first needed, in each process; the least recently used is closed, and most of `ulimit -n` left to others
_MAY_OPEN = resource.getrlimit(resource.RLIMIT_NOFILE)[0]


@lru_cache(maxsize=64 if _MAY_OPEN == resource.RLIM_INFINITY else min(64, _MAY_OPEN // 4))
def _open_file(stamp):
    return open(stamp[0], 'rb', buffering=0, opener=regular)


def stamp_of(path):
    about = os.stat(path)
    return path, about.st_size, about.st_mtime_ns


def read_at(stamp, offset, size, limit):
    """Every item of every file is read here: at most `limit` bytes, at a place that an index told."""
    if offset < 0:
        raise UserError("a link or a sparse member of the tar: it has no bytes of its own there")
    file = _open_file(stamp)                                             # named: it is open as long as someone has it
    data = os.pread(file.fileno(), bounded(size, limit), offset)        # no shared file position: safe after a fork
    if len(data) != size:
        raise UserError(f"{size} bytes expected at offset {offset}, found {len(data)}: a truncated file")
    return data


class Index:
    """
    What is where in one file: of item i, columns['offsets'][i] and so on, all int64, and name(i). A sample of a tar is
    the members of one number in columns['group'].
    damage   what is wrong with the file, '' = nothing; n_group = how many samples, 0 where nothing is grouped
    """
    def __init__(self, columns, names, damage=''):
        self.columns, self.names, self.damage = columns, names, damage
        self.ends = np.flatnonzero(names == 0)                           # each name ends with a zero byte
        self.n_group = int(columns['group'].max(initial=-1)) + 1 if 'group' in columns else 0

    def __len__(self):
        return len(self.ends)

    def name(self, i):
        first = self.ends[i - 1] + 1 if i else 0
        return self.names[first:self.ends[i]].tobytes().decode('utf-8', 'surrogateescape')

    def place(self, i):
        return int(self.columns['offsets'][i]), int(self.columns['sizes'][i])

    def sample(self, r):
        """Return (key, {suffix: (offset, size)}) of sample r."""
        members = np.flatnonzero(self.columns['group'] == r).tolist()
        return sample_key(self.name(members[0]))[0], {sample_key(self.name(i))[1]: self.place(i) for i in members}


# An index on disk: a line of JSON, the columns, the names. The line alone tells how much there is of what, so that
# thousands of files open without reading their indexes.
HEAD = {key: Field(int, 0) for key in ('size', 'n', 'n_group', 'n_byte', 'crc')}
HEAD |= {'version': Field(int), 'time': Field(int), 'columns': Field(list, of=Field(str)), 'damage': Field(str)}
VERSION = 3


def _places(stamp, cache_dir):
    """Return where the index of a file may lie: beside it, or in cache_dir."""
    place = hashlib.sha256(os.path.abspath(stamp[0]).encode()).hexdigest()[:16] + '.idx'
    return [stamp[0] + '.idx'] + [os.path.join(cache_dir, place)] * bool(cache_dir)


def _open_index(stamp, cache_dir, columns, head_only=False):
    """Return the first index that is one of this file, or its head alone, a dict; None where there is none."""
    for file in _places(stamp, cache_dir):
        try:
            with reading(file, 'an index'), open(file, 'rb', opener=regular) as f:
                head = json.loads(f.readline(MAX_HEADER_BYTES))
                check(head, Field(dict, of=HEAD), file)
                known = head['version'], head['size'], head['time'], head['columns']
                body = 8 * len(columns) * head['n'] + head['n_byte']
                # whoever wrote the data may have written it: the two bytes of '7,' have an entry of 33
                bounded(body, 20 * stamp[1] + 65536)
                if known != (VERSION, *stamp[1:], list(columns)) or os.fstat(f.fileno()).st_size != f.tell() + body:
                    raise UserError("of another file, or cut short")
                return head if head_only else _load_index(stamp, f.read(), head)
        except UserError:                                                # absent or damaged: made anew
            continue


def _load_index(stamp, content, head):
    if zlib.crc32(content) != head['crc']:
        raise UserError("its checksum is another")
    count, n = len(head['columns']), head['n']
    numbers = np.frombuffer(content, '<i8', count * n).reshape(count, n)
    index = Index(dict(zip(head['columns'], numbers)), np.frombuffer(content, np.uint8, offset=8 * count * n),
                  head['damage'])
    offsets, sizes = index.columns['offsets'], index.columns['sizes']
    if ((offsets < -1) | (sizes < 0) | (sizes > stamp[1] - offsets)).any() or len(index) != n:
        raise UserError(f"not of a file of {stamp[1]} bytes")
    if index.n_group != head['n_group'] or index.n_group != len(np.unique(index.columns.get('group', ()))):
        raise UserError("a sample without members")
    return index


def cached_index(stamp, cache_dir, build, columns):
    """Return build(path), an Index, kept in `<path>.idx` or cache_dir while size and time of the file agree."""
    index = _open_index(stamp, cache_dir, columns)
    if index is None:
        index = build(stamp[0])
        _write_index(stamp, cache_dir, index)
    return index


def _write_index(stamp, cache_dir, index):
    """Write an index where it can be written, and return its head."""
    body = b''.join(column.astype('<i8').tobytes() for column in index.columns.values()) + index.names.tobytes()
    head = dict(version=VERSION, size=stamp[1], time=stamp[2], columns=list(index.columns), n=len(index),
                n_group=index.n_group, n_byte=len(index.names), crc=zlib.crc32(body), damage=index.damage)
    for file in _places(stamp, cache_dir):
        temporary = f'{file}.{os.urandom(4).hex()}.tmp'                  # other ranks write theirs, on other nodes, too
        try:
            os.makedirs(os.path.dirname(file) or '.', exist_ok=True)
            with open(temporary, 'wb') as f:                             # not fsynced: the checksum tells
                f.write(json.dumps(head).encode() + b'\n' + body)
            os.replace(temporary, file)                                  # others see a whole index or none
            break
        except OSError:                                                  # read-only data: try the next place
            if os.path.exists(temporary):
                os.remove(temporary)
    return head


class _Headers(io.BufferedReader):
    """A tar as tarfile reads it, which takes the sizes of headers on trust, also those of 1 TB or of less than 0."""
    def read(self, size=-1):
        return super().read(bounded(size % 2**64, MAX_HEADER_BYTES))    # -1, 'all there is', is beyond any bound


def _build_tar_index(path):
    names, rows, damage, end, n_group, last = [], [], '', 0, 0, {}      # last: of a key, its group and suffixes
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
                        name = member.name.replace('\0', '')
                        key, suffix = sample_key(name)
                        if key not in last or suffix in last[key][1]:    # a name that comes again: another sample
                            last[key] = n_group, set()
                            n_group += 1
                        last[key][1].add(suffix)
                        names.append(name + '\0')
                        rows.append((offset, size, last[key][0]))
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
        damage = f"damaged or truncated tar at offset {end} of {total} bytes: {damage}"
    joined = np.frombuffer(''.join(names).encode('utf-8', 'surrogateescape'), np.uint8)
    return Index(dict(zip(TAR_COLUMNS, np.array(rows, np.int64).reshape(-1, 3).T)), joined, damage)


TAR_COLUMNS = ('offsets', 'sizes', 'group')


def sample_key(name):
    """Return (key, suffix) of a member of a WebDataset tar: its path up to the first dot of the base name, the rest."""
    folder, base = os.path.split(name)
    key, _, suffix = base.partition('.')
    return os.path.join(folder, key), suffix.lower()


@lru_cache(maxsize=128)                                                  # 8 sources x SHARDS_TOGETHER, 1 MB each
def tar_index(stamp, cache_dir):
    return cached_index(stamp, cache_dir, _build_tar_index, TAR_COLUMNS)


def open_tars(paths, cache_dir='', n_process=0):
    """
    Return [(stamp, members, samples, what is wrong with it or '')] of tars; those without an index get one, once, by
    n_process processes (0 = a share of the cores). Where several ranks start together, each begins at another tar and
    takes the indexes that others have made. Raises UserError for a file that cannot be read.
    """
    stamps = [stamp_of(path) for path in paths]
    heads = {stamp: _open_index(stamp, cache_dir, TAR_COLUMNS, head_only=True) for stamp in stamps}
    todo = [stamp for stamp, head in heads.items() if head is None]
    rank, n_rank, n_local = (int(text) if text.isdecimal() else 1 for text in map(
        os.environ.get, ('RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE'), '011'))
    first = len(todo) * rank // max(n_rank, 1)
    todo = todo[first:] + todo[:first]
    n_process = n_process or max(1, (os.cpu_count() or 1) // max(n_local, 1))
    work = functools.partial(_index_tar, cache_dir=cache_dir)
    alone = n_process == 1 or len(todo) < 100 and sum(stamp[1] for stamp in todo) < 1 << 28
    with nullcontext() if alone else processes(n_process) as pool:
        made = map(work, todo) if alone else pool.map(work, todo, chunksize=4)
        bar = tqdm(made, total=len(todo), desc='indexing tars, once', unit=' tars', delay=2,
                   disable=None if rank == 0 else True)
        heads.update(zip(todo, bar, strict=True))                            # strict: to the bar's end
    return [(stamp, head['n'], head['n_group'], head['damage'] and f"{stamp[0]}: {head['damage']}")
            for stamp, head in ((stamp, heads[stamp]) for stamp in stamps)]


def _index_tar(stamp, cache_dir):
    head = _open_index(stamp, cache_dir, TAR_COLUMNS, head_only=True)        # another rank's, by now
    return _write_index(stamp, cache_dir, _build_tar_index(stamp[0])) if head is None else head


@contextmanager
def processes(n_process, setup=None, *given):
    """Yield an executor of n_process processes, each of which has called setup(*given); they end with this one."""
    pool = ProcessPoolExecutor(n_process, multiprocessing.get_context('fork'), start_worker, (setup, given))
    try:
        yield pool
    except BrokenProcessPool:
        raise UserError("one of the processes died: killed, or out of memory; what is whole stays, start again"
                        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker(setup=None, given=()):
    """In a new process: it ends with its parent, however that ends, and not by Ctrl-C; then setup(*given)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)                         # Ctrl-C is for the main process
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    if setup:
        setup(*given)


class Shards:
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
