"""
Writing shards: tars, folders that a second start goes on with, work in order for several processes.

    with new_folder(out, settings) as partial:           # `<out>.partial`, which becomes `out` at the end
        with files.processes(n) as pool, files.whole(f'{partial}/00000000.bin') as temporary: ...

files.find refuses what lies in an unfinished folder, so nothing trains on half a data set.
"""
import fcntl
import hashlib
import io
import os
import shutil
import tarfile
from collections import deque
from contextlib import contextmanager

import files
from errors import UserError
from files import write_whole
from weights import read_json


def write_tar(path, members):
    """Write (name, bytes) pairs as a tar that holds nothing of the time, the user or the machine; makes the folder."""
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    with tarfile.open(path, 'w') as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@contextmanager
def new_folder(out, settings=None):
    """
    Yield `<out>.partial`, for this process alone; it becomes `out` at the end.
    settings  dict of all that its files follow from, as JSON. With it, what a run that ended early left there stays,
              and a run with the same settings finds it; with None it vanishes.
    Raises UserError when `out` holds anything, while another process writes it, and naming a setting that is another.
    """
    out = out.rstrip('/')
    partial = out + '.partial'
    lock, noted = os.path.join(partial, '.lock'), os.path.join(partial, '.settings.json')
    check_free(out)
    os.makedirs(partial, exist_ok=True)
    with open(lock, 'ab') as f:
        try:
            fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)                # ends with this process, and is not forked
            others = not os.path.samestat(os.fstat(f.fileno()), os.stat(lock))
        except (BlockingIOError, FileNotFoundError):
            others = True
        if others:                                                       # it has the lock, or had it until now
            raise UserError(f"{out}: another process is writing it")
        check_free(out)
        goes_on = os.path.exists(noted)
        if goes_on:
            _check_settings(partial, noted, settings or {})
        try:
            for name in set(os.listdir(partial)) - {'.lock'}:            # of a run that was killed
                if not goes_on or name.endswith('.tmp'):
                    path = os.path.join(partial, name)
                    shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
            if settings is not None and not goes_on:
                write_whole(noted, settings)
            yield partial
            os.replace(partial, out)
        except BaseException:
            if settings is None or not set(os.listdir(partial)) - {'.lock', '.settings.json'}:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        for name in os.listdir(out):
            if name.startswith('.'):                                     # ours, needed until now
                os.remove(os.path.join(out, name))


def check_free(out):
    if os.path.isfile(out) or os.path.isdir(out) and os.listdir(out):
        raise UserError(f"{out}: is there already; remove it or choose another --out")


def _check_settings(partial, noted, settings):
    before = read_json(noted)
    for key in settings | before:
        if before.get(key) != settings.get(key):
            raise UserError(f"{partial}: was begun with {key}={before.get(key)}, now {settings.get(key)}; give the "
                            "same to go on, or remove it to begin anew")


def about_files(paths):
    """What settings say of input files: a change of any name, size or time is noticed."""
    stamps = [files.stamp_of(path) for path in paths]
    digest = hashlib.sha256(repr([(os.path.basename(path), *rest) for path, *rest in stamps]).encode()).hexdigest()
    return f"{len(paths)} files of {sum(size for _, size, _ in stamps):,} bytes (sha256 {digest[:16]})"


def in_order(pool, function, jobs, n_ahead):
    """Yield (job, function(*job)) in the order of jobs; at most n_ahead of them are taken before they are needed."""
    waiting = deque()
    for job in jobs:
        waiting.append((job, pool.submit(function, *job)))
        if len(waiting) >= n_ahead:
            job, future = waiting.popleft()
            yield job, future.result()
    while waiting:
        job, future = waiting.popleft()
        yield job, future.result()
