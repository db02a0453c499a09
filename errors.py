"""
The one error that a user can cause, the one line it ends in, and the one boundary around files nobody vouches for.

    raise UserError(f"lr={lr}: expected above 0")        # anywhere; its message is what the user reads
    sys.excepthook = user_error_hook                     # in a script: such an error is one line and status 1
    with reading(path, 'JSON'):                          # whatever a parser raises becomes one UserError that names path

A traceback is what it should be: our bug.
"""
import atexit
import contextlib
import os
import sys


class UserError(ValueError):
    """A mistake that the user can mend; the message is one line: what was given, what was expected, what to do."""


def first_line(error):
    """What an exception says, on one line, without control characters, at most 300 characters."""
    text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return ''.join(c if c.isprintable() else repr(c)[1:-1] for c in text.strip())[:300]


@contextlib.contextmanager
def reading(path, what):
    """
    Around everything that opens or parses an untrusted file.
    what     'JSON', 'a tokenizer', ...: the message says that path is not readable as it
    Raises UserError for any exception of any library inside; a UserError passes through.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        reason = f"{e.strerror}" if isinstance(e, OSError) and e.strerror else first_line(e)
        raise UserError(f"{path}: not readable as {what} ({reason})") from e


def leave(code):
    """
    End this process. One of several skips the interpreter's own teardown after the exit handlers: a gloo thread that
    still holds a tensor would ask for the GIL there, and abort (pytorch issue 190489).
    """
    if int(os.environ.get('WORLD_SIZE', 1)) == 1:
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.__stderr__.flush()
    os._exit(code)


def user_error_hook(kind, error, trace):
    """A sys.excepthook: the line of a UserError on stderr and status 1; everything else as usual."""
    if not issubclass(kind, UserError):
        sys.__excepthook__(kind, error, trace)
        return
    print(error, file=sys.__stderr__, flush=True)        # torch.distributed's own hook holds sys.stderr back meanwhile
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        leave(1)
