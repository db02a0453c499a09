"""
Configuration as plain Python: a script's keys are the literals between its two `# --- config` lines.

    python pretrain.py config/text.py config/tiny.py --seed=7        # files and --key=value; later wins
    python pretrain.py --help                                        # every key, its default, its rule, what it means

A key's line says all about it, `seq_len = 2048  # [>= 1] positions a row`: name, default, rule, meaning. The rule in
brackets holds bounds (`>= 1`), the allowed words (`'auto' | 'cpu'`), `pairs` for ((text, number), ...), and `free`
where a resumed run may have another value. Bounds of a tuple are those of its items.

A config file is Python that assigns some of the script's keys (names that start with `_` are free). It sees the values
so far and `stage` ('text', 'mix', 'finetune', 'dpo', 'evaluate', 'study', 'smart101'), so that one file can hold a
scale for all. Files that read `stage` come after the others, wherever they stand on the command line, whose --stage=
holds for all of them.
Config files are code, like the scripts: run only those you would run as a script.
"""
import ast
import contextlib
import difflib
import operator
import os
import re
import sys
import warnings
from typing import NamedTuple

from errors import UserError, first_line

MARK = '# --- config'
HELP = '''

keys ([...]: allowed range or words; pairs: ((text, number), ...); free: may change when a run is resumed):'''
BOUNDS = {'>=': operator.ge, '<=': operator.le, '>': operator.gt, '<': operator.lt}


class Key(NamedTuple):
    """One key of a config block: its default, what its comment says, and the rule in that comment's brackets."""
    default: object
    comment: str
    rule: str
    bounds: tuple = ()          # ((operator, number), ...)
    words: tuple = ()
    pairs: bool = False
    free: bool = False          # may differ when a run is resumed


def parse_key(default, comment):
    """The Key of a line's default and comment; ValueError for a rule outside the notation."""
    match = re.match(r'\[(.*?)\](?: |$)', comment)
    if match is None:
        return Key(default, comment, '')
    bounds, words, flags = [], (), {'pairs': False, 'free': False}
    for part in match[1].split(', '):
        bound = re.fullmatch(r'([<>]=?) (\S+)', part)
        if part in flags:
            flags[part] = True
        elif bound:
            bounds.append((bound[1], float(bound[2])))
        elif part.startswith("'"):
            words = tuple(ast.literal_eval(word) for word in part.split(' | '))
        else:
            raise ValueError(f"rule [{match[1]}]: {part!r} is not a bound, a list of words, 'pairs' or 'free'")
    return Key(default, comment[match.end():], match[1], tuple(bounds), words, **flags)


def config_keys(path):
    """
    The keys of a script, read from its source.
    path     a Python file with exactly two lines that start with `# --- config`
    returns  dict key -> Key, in source order
    Raises ValueError for a block that is missing, holds anything but `name = literal`, or a rule nobody could check.
    """
    with open(path, encoding='utf-8') as f:
        lines = f.read().split('\n')
    marks = [i for i, line in enumerate(lines) if line.startswith(MARK)]
    if len(marks) != 2:
        raise ValueError(f"{path}: expected two lines that start with '{MARK}', found {len(marks)}")
    keys = {}
    for node in ast.parse('\n'.join(lines[marks[0]:marks[1]])).body:
        where = f"{path}:{marks[0] + node.lineno}"
        try:
            (target,) = node.targets
            key, value = target.id, ast.literal_eval(node.value)
        except (AttributeError, ValueError, TypeError) as e:
            raise ValueError(f"{where}: a config block holds `name = literal` lines only") from e
        if type(value) not in (bool, int, float, str, tuple):
            raise ValueError(f"{where}: {key} is a {type(value).__name__}: expected bool, int, float, str or tuple")
        if key in keys:
            raise ValueError(f"{where}: {key} is there twice")
        comments = []
        for line in lines[marks[0] + node.lineno - 1:marks[1]]:            # the comment, and the comment lines below it
            code, _, comment = line.partition('  # ') if not comments else ('', '', line.strip().removeprefix('#'))
            if comments and not line.lstrip().startswith('#'):
                break
            comments.append(comment.strip())
        try:
            keys[key] = parse_key(value, ' '.join(comments).strip())
            check_value(key, value, keys[key], 'its default')
        except ValueError as e:
            raise ValueError(f"{where}: {key}: {e}") from e
    return keys


def check_value(key, value, rule, source):
    """Raise UserError, quoting the rule, unless a value of the right type keeps it; rule is the Key."""
    items = value if isinstance(value, tuple) else (value,)
    if rule.pairs:
        good = all(isinstance(p, tuple) and len(p) == 2 and isinstance(p[0], str)
                   and type(p[1]) in (int, float) and p[1] >= 0 for p in items)
        expected = f"pairs of a text and a number, such as (('{key}', 1.0),)"
    else:
        good = all(type(item) in (int, float) and BOUNDS[sign](item, limit)
                   for item in items for sign, limit in rule.bounds)
        good = good and (not rule.words or value in rule.words)
        expected = rule.rule.removesuffix(', free')
    if not good:
        meaning = f' ({rule.comment})' if rule.comment else ''
        raise UserError(f"{source}: {key}={value!r}: expected {expected}{meaning}")


def convert(key, given, rule, source):
    """
    `given` as a value of the default's type that keeps the key's rule; UserError otherwise.
    given    a str from the command line, or any object from a config file
    rule     the Key
    Floats accept ints, ints accept whole floats such as 1e3, bools accept true/false in any case.
    """
    kind = type(rule.default)
    value = given
    if isinstance(given, str) and kind is not str:
        text = given.strip()
        try:
            value = ast.literal_eval(text.capitalize() if text.lower() in ('true', 'false') else text)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            pass                                         # still a str, which the type check below refuses
    if kind is float and type(value) is int:
        value = float(value)
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)
    if kind is tuple and type(value) in (list, tuple):                     # as JSON gives it back, lists inside too
        value = tuple(tuple(item) if type(item) is list else item for item in value)
    if type(value) is not kind:
        raise UserError(f"{source}: {key}={given!r}: expected {kind.__name__}, like the default {rule.default!r}")
    if kind is float and value != value:
        raise UserError(f"{source}: {key}={given!r}: not a number")
    if kind is tuple and not rule.pairs and not {type(item) for item in value} <= {type(i) for i in rule.default}:
        raise UserError(f"{source}: {key}={given!r}: expected items like those of the default {rule.default!r}")
    check_value(key, value, rule, source)
    return value


def _unknown(key, keys, source, script):
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    hint = f"did you mean '{near[0]}'?" if near else '--help lists the keys'
    folder = os.path.dirname(os.path.abspath(script))
    for other in sorted(name for name in os.listdir(folder) if name.endswith('.py')):
        with contextlib.suppress(ValueError, SyntaxError):                 # most files have no config block
            if key in config_keys(os.path.join(folder, other)):
                hint = f'it is a key of {other}'
    raise UserError(f"{source}: unknown key '{key}'; {hint}")


def _compiled(path):
    """A config file's code, and whether it reads `stage`."""
    try:
        with open(path, encoding='utf-8') as f, warnings.catch_warnings():
            warnings.simplefilter('ignore')              # Python 3.12 tells of a stray backslash, on a line of its own
            tree = ast.parse(f.read(), path)
            reads = any(isinstance(node, ast.Name) and node.id == 'stage' and isinstance(node.ctx, ast.Load)
                        for node in ast.walk(tree))
            return compile(tree, path, 'exec'), reads
    except FileNotFoundError:
        folder = os.path.dirname(path) or '.'
        there = sorted(p for p in os.listdir(folder) if p.endswith('.py')) if os.path.isdir(folder) else []
        near = difflib.get_close_matches(os.path.basename(path), there, n=1)
        hint = f"; did you mean {os.path.join(folder, near[0])}?" if near else ''
        raise UserError(f"config file {path} not found{hint}") from None
    except (OSError, SyntaxError, ValueError, MemoryError, RecursionError) as e:
        raise UserError(f"config file {path}: {first_line(e)}") from None


def _run_file(path, code, keys, values, stage, script):
    """Execute a config file over `values`; returns the keys it set, checked and converted."""
    scope = dict(values, stage=stage, __file__=path)
    try:
        exec(code, scope)
    except (Exception, SystemExit) as e:
        raise UserError(f"config file {path}: {type(e).__name__}: {first_line(e)}") from None
    changed = {}
    for key, value in scope.items():
        if key.startswith('_') or (key == 'stage' and key not in keys) or (key in values and values[key] is value):
            continue
        if key not in keys:
            _unknown(key, keys, path, script)
        changed[key] = convert(key, value, keys[key], path)
    return changed


def _stage_last(argv, compiled):
    """argv with its files in another order: those that read `stage` after the others, `--key=value` where it was."""
    files = sorted((arg for arg in argv if arg in compiled), key=lambda arg: compiled[arg][1])
    return [files.pop(0) if arg in compiled else arg for arg in argv]


def say(line):
    """Print a line, on the first process only."""
    if os.environ.get('RANK', '0') == '0':
        print(line)


def configure(namespace, argv=None):
    """
    Apply config files and --key=value arguments to a script's globals; print what differs from the defaults.
    namespace  the script's globals(); its `__file__` is read for the config block, its keys are overwritten
    argv       arguments without the program's name; None = sys.argv[1:]
    returns    dict key -> value, every key in source order
    Raises UserError: one line that names the key or file, what was given and what was expected.
    """
    keys = config_keys(namespace['__file__'])
    script = os.path.splitext(os.path.basename(namespace['__file__']))[0]
    values = {key: rule.default for key, rule in keys.items()}
    argv = sys.argv[1:] if argv is None else argv
    if '--help' in argv or '-h' in argv:
        print((namespace.get('__doc__') or '').strip() + HELP)
        for key, rule in keys.items():
            print(f"  --{key}={rule.default!r}".ljust(36) + f"  {f'[{rule.rule}] ' if rule.rule else ''}{rule.comment}")
        sys.exit(0)
    compiled = {arg: _compiled(arg) for arg in argv if arg.endswith('.py') and not arg.startswith('-')}
    given_stage = [arg.partition('=')[2] for arg in argv if arg.startswith('--stage=')]
    if given_stage and 'stage' in keys:                  # files see it, and do not change it, wherever it stands
        values['stage'] = convert('stage', given_stage[-1], keys['stage'], 'command line')
    given_before = set()                                 # keys of the command line
    for arg in _stage_last(argv, compiled):
        match = re.match(r'--([A-Za-z_][A-Za-z0-9_]*)=(.*)$', arg, re.S)
        if match:
            key, given = match.groups()
            if key not in keys:
                _unknown(key, keys, 'command line', namespace['__file__'])
            values[key] = convert(key, given, keys[key], 'command line')
            given_before.add(key)
        elif arg.startswith('-'):
            raise UserError(f"command line: {arg}: expected --key=value (with the equals sign) or a config file")
        elif arg not in compiled:
            raise UserError(f"command line: {arg}: expected a config file that ends in .py, or --key=value")
        else:
            changed = _run_file(arg, compiled[arg][0], keys, values, values.get('stage', script), namespace['__file__'])
            if given_stage:
                changed.pop('stage', None)
            values.update(changed)
            for key in sorted(given_before & changed.keys()):
                say(f"!!! {arg} sets {key}={changed[key]!r} over the --{key}= before it: later wins, so give keys last")
    changed = [f'{key}={value!r}' for key, value in values.items() if value != keys[key].default]
    if changed:
        say('config: ' + ', '.join(changed))
    namespace.update(values)
    return values
