"""
The one error that a user can cause, the one line it ends in, and the one wrapper around reading untrusted files.

    raise UserError(f"lr={lr}: expected above 0")        # anywhere; its message is what the user reads
    sys.excepthook = user_error_hook                     # in a script: such an error is one line and status 1
    with reading(path, 'JSON'):                          # whatever a parser raises becomes a UserError that names path
    check(meta, Field(dict, of=META), path)              # a schema: types and ranges, declared once

A traceback always means a bug of this code.
"""
import atexit
import contextlib
import errno
import math
import os
import sys
from typing import NamedTuple


class UserError(ValueError):
    """A mistake that the user can mend; the message is one line: what was given, what was expected, what to do."""


class BadSample(UserError):
    """One item of a data set cannot be used; the message names the file, the item and the reason."""


def first_line(error):
    """What an exception says, on one line, without control characters, at most 300 characters."""
    text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return printable(text.strip())[:300]


def printable(text):
    """A text on one line of the terminal: names and values from files may hold line breaks and control characters."""
    return ''.join(c if c.isprintable() else repr(c)[1:-1] for c in text)


@contextlib.contextmanager
def reading(path, what):
    """
    Around everything that opens or parses an untrusted file.
    what     'JSON', 'a tokenizer', ...: the message says that path is not readable as it
    Raises UserError for any exception of any library inside; a UserError passes through, behind path where it names
    neither it nor a file beside it.
    """
    try:
        yield
    except UserError as e:
        if os.fspath(path) in str(e) or os.path.dirname(path) + os.sep in str(e):
            raise
        raise type(e)(f"{path}: {e}") from e
    except Exception as e:
        reason = f"{e.strerror}" if isinstance(e, OSError) and e.strerror else first_line(e)
        raise UserError(f"{path}: not readable as {what} ({reason})") from e


class Field(NamedTuple):
    """What a schema says of one value that was read: its type, its range, and the same of what it holds."""
    kind: object                # a type, or a tuple of types
    low: float = -math.inf      # of a number; of a list, a dict or a str: of its length
    high: float = math.inf
    of: object = None           # Field of a list's items or a dict's values, or a dict name -> Field of a dict's keys
    optional: bool = False      # may be missing, or None


NUMBER = (int, float)
LARGEST = 2.0 ** 63             # of any number that is read: what torch and numpy hold


def check(value, field, where):
    """
    Raise UserError, naming `where`, unless a value read from JSON keeps its Field; numbers have to be within LARGEST.
    Keys that no schema names are free.
    """
    kinds = field.kind if isinstance(field.kind, tuple) else (field.kind,)
    if value is None and field.optional:
        return
    if type(value) not in kinds:
        expected = ' or '.join(kind.__name__ for kind in kinds)
        raise UserError(f"{where} is {_short(value)}, expected {expected}" if value is not None else
                        f"{where} is missing, expected {expected}")
    size = value if type(value) in NUMBER else len(value) if isinstance(value, (list, dict, str)) else 0
    low, high = max(field.low, -LARGEST), min(field.high, LARGEST)
    if not low <= size <= high:                                          # nan is not
        what = '' if size is value else f' {size} long'
        raise UserError(f"{where} is{what or ' ' + _short(value)}, expected from {low:g} to {high:g}")
    if isinstance(field.of, dict):
        for key, inner in field.of.items():
            check(value.get(key), inner, f"{where}: '{key}'")
    elif field.of is not None and type(value) not in NUMBER:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            check(item, field.of, f"{where}: {key}")


def _short(value):
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + '...'


def world_size():
    """How many processes torchrun started; 1 where its variable is absent or no number."""
    text = os.environ.get('WORLD_SIZE', '1')
    return int(text) if text.isdecimal() else 1


def leave(code):
    """
    End this process. One of several skips the interpreter's own teardown after the exit handlers: a gloo thread that
    still holds a tensor would ask for the GIL there, and abort (pytorch issue 190489).
    """
    if world_size() == 1:
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.__stderr__):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.flush()
    os._exit(code)


# errors of the machine, not of the code: stdout's reader is gone, a disk is full, too many files are open
ENVIRONMENT = {errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.EIO}


def user_error_hook(kind, error, trace):
    """A sys.excepthook: one line on stderr and status 1 for a UserError, Ctrl-C or a sick machine; else as usual."""
    if issubclass(kind, KeyboardInterrupt):
        line = 'stopped by Ctrl-C'
    elif issubclass(kind, OSError) and error.errno in ENVIRONMENT:
        line = f"stopped: {error.filename or 'stdout or another stream'}: {error.strerror}; what was saved is whole"
    elif issubclass(kind, UserError):
        line = printable(str(error))
    elif world_size() > 1 and 'gloo/transport' in str(error):
        line = f"another process of this run has ended, its own message says why ({first_line(error)})"
    else:
        sys.__excepthook__(kind, error, trace)
        return
    if issubclass(kind, OSError) and sys.stdout is not None:             # what stdout still holds cannot be written
        with contextlib.suppress(OSError):                               # no file can be opened any more
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if sys.__stderr__ is not None:               # torch.distributed's own hook holds sys.stderr back
        with contextlib.suppress(OSError):
            print(line, file=sys.__stderr__, flush=True)
    if world_size() > 1:
        leave(1)
