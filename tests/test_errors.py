"""errors.py: a user's mistake is one line and status 1, from one process or from one of several; ours is a traceback."""
import os
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from errors import Field, UserError, check, first_line, printable, reading
from mixture import BadSample


@pytest.mark.parametrize('error, line', [
    (ValueError('a\nb'), 'a'), (ValueError(''), 'ValueError'), (ValueError('\n  x\ty\n'), 'x\\ty'),
    (ValueError('red \x1b[31m'), 'red \\x1b[31m'), (ValueError('a' * 999), 'a' * 300), (KeyError('k'), "'k'")])
def test_what_an_error_says_on_one_line(error, line):
    assert first_line(error) == line


@pytest.mark.parametrize('error, reason', [
    (FileNotFoundError(2, 'No such file or directory', 'x'), 'No such file or directory'), (KeyError('n'), "'n'"),
    (RecursionError('too deep'), 'too deep'), (ValueError('first\nsecond'), 'first'), (MemoryError(), 'MemoryError')])
def test_whatever_a_parser_raises_becomes_one_line_that_names_the_file(error, reason):
    with pytest.raises(UserError) as caught:
        with reading('data/x.json', 'JSON'):
            raise error
    assert str(caught.value) == f'data/x.json: not readable as JSON ({reason})' and caught.value.__cause__ is error


def test_what_is_no_parsers_error_passes():
    for line in ('data/x.json: my own line', 'data/x.json.idx: my own line', 'its neighbour data/y.bin'):
        with pytest.raises(UserError, match=f'^{line}$'):
            with reading('data/x.json', 'JSON'):
                raise UserError(line)
    with pytest.raises(BadSample, match='^data/x.json: a size that nobody can draw$'):           # it keeps its class
        with reading('data/x.json', 'an image'):
            raise BadSample('a size that nobody can draw')
    with pytest.raises(KeyboardInterrupt):
        with reading('x', 'JSON'):
            raise KeyboardInterrupt


@pytest.mark.parametrize('end, code, err', [
    ("raise errors.UserError('the reason')", 1, 'the reason\n'), ('errors.leave(0)', 0, ''), ('errors.leave(1)', 1, '')])
def test_one_of_several_processes_ends_without_a_teardown(scripts, end, code, err):
    """Exit handlers run and nothing printed is lost, but no object lives to see the interpreter go (see leave)."""
    hook = f"""
import atexit, errors, os, sys
class Witness:
    def __del__(self, write=os.write):
        write(2, b'torn down')
sys.witness = Witness()
sys.excepthook = errors.user_error_hook
atexit.register(print, 'handled')
print('no newline', end='; ')
{end}
"""
    for n, torn in (('2', ''), ('1', 'torn down')):
        run = scripts.start('pretrain.py', hook=hook, env={'WORLD_SIZE': n, 'RANK': '1'}, quick=False)
        assert run.wait() == code
        assert (run.out, run.err) == ('no newline; handled\n', err + torn)


def test_our_own_bug_is_a_traceback(scripts):
    run = scripts('pretrain.py', code=1, hook="import errors, sys; sys.excepthook = errors.user_error_hook; 1 / 0")
    assert 'Traceback' in run.err and 'ZeroDivisionError' in run.err


def test_numbers_beyond_what_torch_holds_and_line_breaks_from_files():
    for value in (10 ** 400, -10 ** 30, 1e99, float('inf'), float('nan')):
        with pytest.raises(UserError, match='^x is .*expected from'):
            check(value, Field((int, float)), 'x')
    assert printable('a\nb\x1b\ud800 \u20ac') == 'a\\nb\\x1b\\ud800 \u20ac'
