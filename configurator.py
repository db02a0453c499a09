"""
Configuration as plain Python: a script's keys are the literals between its two `# --- config` lines.

    python pretrain.py config/text.py config/tiny.py --seed=7        # files and --key=value, in any order; later wins
    python pretrain.py --help                                        # every key, its default, what it means

A config file is Python that assigns some of the script's keys (names that start with `_` are free). It sees the values
so far and `stage` ('text', 'mix', 'finetune', 'evaluate'), so that one file can hold a scale for every stage; what
decides the stage comes before it.
Config files are code, like the scripts: run only those you would run as a script.
"""
import ast
import difflib
import os
import re
import sys

MARK = '# --- config'


def config_keys(path):
    """
    The keys of a script, read from its source.
    path     a Python file with exactly two lines that start with `# --- config`
    returns  dict key -> (default, trailing comment), in source order
    Raises ValueError for a block that is missing or holds anything but `name = literal`.
    """
    with open(path, encoding='utf-8') as f:
        lines = f.read().split('\n')
    marks = [i for i, line in enumerate(lines) if line.startswith(MARK)]
    if len(marks) != 2:
        raise ValueError(f"{path}: expected two lines that start with '{MARK}', found {len(marks)}")
    keys = {}
    for node in ast.parse('\n'.join(lines[marks[0]:marks[1]])).body:
        try:
            (target,) = node.targets
            key, value = target.id, ast.literal_eval(node.value)
        except (AttributeError, ValueError, TypeError) as e:
            where = f"{path}:{marks[0] + node.lineno}"
            raise ValueError(f"{where}: a config block holds `name = literal` lines only") from e
        if type(value) not in (bool, int, float, str, tuple):
            raise ValueError(f"{path}:{marks[0] + node.lineno}: {key} is a {type(value).__name__}: expected bool, int, "
                             "float, str or tuple")
        if key in keys:
            raise ValueError(f"{path}:{marks[0] + node.lineno}: {key} is there twice")
        comments = []
        for line in lines[marks[0] + node.lineno - 1:marks[1]]:            # the comment, and the comment lines below it
            code, _, comment = line.partition('  # ') if not comments else ('', '', line.strip().removeprefix('#'))
            if comments and not line.lstrip().startswith('#'):
                break
            comments.append(comment.strip())
        keys[key] = (value, ' '.join(comments).strip())
    return keys


def convert(key, given, default, source):
    """
    `given` as a value of `default`'s type, or one line to stderr and exit.
    given    a str from the command line, or any object from a config file
    Floats accept ints, ints accept whole floats such as 1e3, bools accept true/false in any case.
    """
    kind = type(default)
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
    if kind is tuple and type(value) is list:
        value = tuple(value)
    if type(value) is not kind:
        sys.exit(f"{source}: {key}={given!r}: expected {kind.__name__}, like the default {default!r}")
    if kind is float and value != value:
        sys.exit(f"{source}: {key}={given!r}: not a number")
    return value


def stage_of(script, values):
    """The stage a scale file sees: 'text' or 'mix' for pretrain.py, else the script's own name."""
    if script == 'pretrain':
        return 'text' if values['image_ratio'] == 0 and not values['init_from'] else 'mix'
    return script


def _unknown(key, keys, source):
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    hint = f"; did you mean '{near[0]}'?" if near else '; --help lists the keys'
    sys.exit(f"{source}: unknown key '{key}'{hint}")


def _run_file(path, keys, values, script):
    """Execute a config file over `values`; returns the keys it set, checked and converted, and if it uses stage."""
    try:
        with open(path, encoding='utf-8') as f:
            code = compile(f.read(), path, 'exec')
    except FileNotFoundError:
        folder = os.path.dirname(path) or '.'
        there = sorted(p for p in os.listdir(folder) if p.endswith('.py')) if os.path.isdir(folder) else []
        near = difflib.get_close_matches(os.path.basename(path), there, n=1)
        sys.exit(f"config file {path} not found" + (f"; did you mean {os.path.join(folder, near[0])}?" if near else ''))
    except (OSError, SyntaxError, ValueError, MemoryError, RecursionError) as e:
        sys.exit(f"config file {path}: {e}")
    scope = dict(values, stage=stage_of(script, values), __file__=path)
    try:
        exec(code, scope)
    except (NameError, TypeError, ValueError, LookupError, AttributeError, ImportError, ArithmeticError, AssertionError,
            OSError, RuntimeError, SyntaxError, MemoryError) as e:
        sys.exit(f"config file {path}: {type(e).__name__}: {e}")
    changed = {}
    for key, value in scope.items():
        if key.startswith('_') or key == 'stage' or (key in values and values[key] is value):
            continue
        if key not in keys:
            _unknown(key, keys, path)
        changed[key] = convert(key, value, keys[key][0], path)
    return changed, 'stage' in code.co_names


def configure(namespace, argv=None):
    """
    Apply config files and --key=value arguments to a script's globals and print what differs from the defaults.
    namespace  the script's globals(); its `__file__` is read for the config block, its keys are overwritten
    argv       arguments without the program's name; None = sys.argv[1:]
    returns    dict key -> value, every key in source order
    Every mistake exits with one line that names the key or file, what was given and what was expected.
    """
    keys = config_keys(namespace['__file__'])
    script = os.path.splitext(os.path.basename(namespace['__file__']))[0]
    values = {key: default for key, (default, _) in keys.items()}
    argv, scales = sys.argv[1:] if argv is None else argv, []
    if '--help' in argv or '-h' in argv:
        print((namespace.get('__doc__') or '').strip() + '\n\nkeys:')
        for key, (default, comment) in keys.items():
            print(f"  --{key}={default!r}".ljust(36) + f"  {comment}")
        sys.exit(0)
    for arg in argv:
        match = re.match(r'--([A-Za-z_][A-Za-z0-9_]*)=(.*)$', arg, re.S)
        if match:
            key, given = match.groups()
            if key not in keys:
                _unknown(key, keys, 'command line')
            values[key] = convert(key, given, keys[key][0], 'command line')
        elif arg.startswith('-'):
            sys.exit(f"command line: {arg}: expected --key=value (with the equals sign) or a config file")
        elif not arg.endswith('.py'):
            sys.exit(f"command line: {arg}: expected a config file that ends in .py, or --key=value")
        else:
            changed, uses_stage = _run_file(arg, keys, values, script)
            values.update(changed)
            for path, stage in scales:
                if stage != stage_of(script, values):
                    sys.exit(f"{path} was read for stage {stage!r}, but {arg} after it makes this stage "
                             f"{stage_of(script, values)!r}: give {path} after {arg}")
            scales += [(arg, stage_of(script, values))] if uses_stage else []
    if os.environ.get('RANK', '0') == '0':
        for path, stage in scales:
            if stage != stage_of(script, values):
                print(f"!!! {path} was read for stage {stage!r}, but later arguments make this stage "
                      f"{stage_of(script, values)!r}: to scale that, give image_ratio and init_from before it")
        for key, value in values.items():
            if value != keys[key][0]:
                print(f"config: {key} = {value!r} (default {keys[key][0]!r})")
    namespace.update(values)
    return values
