"""configurator.py: types, order, stages, and that every mistake of a user ends in one line."""
import os
import subprocess
import sys

import pytest
from conftest import child_env

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from configurator import config_keys, configure
from errors import UserError

SCRIPT = '''"""
A script for tests.
    python pretrain.py
"""
from configurator import configure
_private = 1

# --- config: keys ---
stage = 'text'              # ['text' | 'mix', free] what is trained
steps = 10                  # optimizer steps; 0 = none
lr = 1e-2                   # [> 0] peak
final_lr = 0.0
on = False                  # a switch
name = 'run'                # the recipe's name
init_from = ''              # '' = from scratch,
                            # or a checkpoint folder
image_ratio = 0.0           # [>= 0, <= 1] share
text = (('a', 1.0),)        # [pairs] (glob, weight)
percent = (20, 40)          # [> 0, <= 100, free]
offset = -3
# --- config end ---
config = configure(globals())
print(repr(config))
print(steps, _private)
'''


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*argv, script='pretrain') -> the config; files are written with run.file(name, text)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('RANK', raising=False)

    def run(*argv, script='pretrain'):
        path = tmp_path / f'{script}.py'
        path.write_text(SCRIPT)
        namespace = {'__file__': str(path), '__doc__': 'A script.', 'steps': 10, 'untouched': 5}
        config = configure(namespace, list(argv))
        assert all(namespace[key] == value for key, value in config.items()) and namespace['untouched'] == 5
        return config

    def file(name, text):
        (tmp_path / name).write_text(text)
        return name

    def fails(*argv, **kw):
        capsys.readouterr()
        with pytest.raises(UserError) as caught:
            run(*argv, **kw)
        message = str(caught.value)
        assert '\n' not in message, message
        return message
    run.file, run.fails, run.out = file, fails, lambda: capsys.readouterr().out
    return run


def test_defaults_and_order_of_keys(run):
    assert list(run().items()) == [
        ('stage', 'text'), ('steps', 10), ('lr', 0.01), ('final_lr', 0.0), ('on', False), ('name', 'run'), ('init_from', ''),
        ('image_ratio', 0.0), ('text', (('a', 1.0),)), ('percent', (20, 40)), ('offset', -3)]
    assert run.out() == ''                               # nothing differs, nothing is printed


@pytest.mark.parametrize('arg, value', [
    ('--steps=7', 7), ('--steps=1e3', 1000), ('--steps=2.0', 2), ('--steps=-4', -4),
    ('--steps=4_000_000_000', 4 * 10 ** 9),
    ('--lr=3', 3.0), ('--lr=3e-4', 3e-4), ('--final_lr=0', 0.0), ('--lr= 1 ', 1.0),
    ('--on=true', True), ('--on=True', True), ('--on=TRUE', True), ('--on=fAlse', False),
    ('--name=7', '7'), ('--name=true', 'true'), ('--name=', ''), ('--name=a=b c', 'a=b c'), ("--name='x'", "'x'"),
    ('--text=(("b/*.tar", 0.5), ("c", 0.5))', (('b/*.tar', 0.5), ('c', 0.5))), ('--text=()', ()), ('--text=[["b", 1]]', (('b', 1),)),
    ('--percent=5,10', (5, 10)), ('--percent=[5, 10]', (5, 10)), ('--percent=(5,)', (5,))])
def test_command_line_types_follow_the_default(run, arg, value):
    given = run(arg)[arg[2:].split('=')[0]]
    assert given == value and type(given) is type(value)


@pytest.mark.parametrize('line, key, value', [
    ('steps = 1e3', 'steps', 1000), ('lr = 1', 'lr', 1.0), ('on = True', 'on', True),
    ('percent = [1, 2]', 'percent', (1, 2)),
    ("name = 'x' * 2", 'name', 'xx'), ('steps *= 3', 'steps', 30), ('lr = lr / 2', 'lr', 0.005)])
def test_file_types_follow_the_default(run, line, key, value):
    given = run(run.file('c.py', line))[key]
    assert given == value and type(given) is type(value)


@pytest.mark.parametrize('key, given, kind', [
    ('steps', '1.5', 'int'), ('steps', 'many', 'int'), ('steps', 'true', 'int'), ('steps', '1e999', 'int'),
    ('steps', '', 'int'),
    ('lr', 'fast', 'float'), ('lr', 'nan', 'float'), ('lr', '(1,)', 'float'), ('lr', 'True', 'float'),
    ('lr', '{[]: 1}', 'float'),
    ('on', '1', 'bool'), ('on', 'yes', 'bool'), ('on', '', 'bool'), ('percent', '5', 'tuple'),
    ('percent', '(5', 'tuple'),
    ('text', 'a', 'tuple'), ('steps', '(' * 300, 'int'), ('steps', '9' * 5000, 'int'),
    ('steps', '__import__("os")', 'int')])
def test_another_type_is_refused(run, key, given, kind):
    message = run.fails(f'--{key}={given}')
    assert message.startswith(f'command line: {key}={given!r}: expected {kind}, like the default ')


def test_another_type_in_a_file_is_refused(run):
    for line, kind in [('steps = 1.5', 'int'), ('name = 3', 'str'), ('on = 1', 'bool'),
                       ('steps = True', 'int'), ('percent = 3', 'tuple'), ('name = None', 'str')]:
        message = run.fails(run.file('c.py', line))
        assert message.startswith('c.py: ') and f'expected {kind}' in message, line
    assert 'not a number' in run.fails(run.file('c.py', "lr = float('nan')"))


def test_unknown_keys_get_a_suggestion(run):
    assert run.fails('--step=5') == "command line: unknown key 'step'; did you mean 'steps'?"
    assert run.fails('--final_Lr=5').endswith("did you mean 'final_lr'?")
    assert run.fails('--qqq=5') == "command line: unknown key 'qqq'; --help lists the keys"
    assert run.fails(run.file('c.py',
        'imagen_ratio = 0.1')) == "c.py: unknown key 'imagen_ratio'; did you mean 'image_ratio'?"
    assert "unknown key 'math'" in run.fails(run.file('c.py', 'import math'))
    assert "unknown key '_private'" in run.fails('--_private=2')             # outside the block: no key


def test_a_key_of_another_script_is_told(run, tmp_path):
    (tmp_path / 'finetune.py').write_text('# --- config\nn_epoch = 4\n# --- config end\n')
    (tmp_path / 'other.py').write_text('n_epoch = (')
    assert run.fails(run.file('c.py', 'n_epoch = 3')) == "c.py: unknown key 'n_epoch'; it is a key of finetune.py"


def test_a_file_that_overrides_a_key_given_before_it_says_so(run):
    run(run.file('a.py', 'steps = 20'), '--steps=5')
    assert '!!!' not in run.out()
    run('--steps=5', '--lr=2', 'a.py')
    assert '!!! a.py sets steps=20 over the --steps= before it: later wins' in run.out()


def test_names_with_an_underscore_are_free_in_files(run):
    text = 'import math as _math\n_n = 4\nsteps = _n * int(_math.sqrt(9))\n'
    assert run(run.file('c.py', text))['steps'] == 12


def test_later_wins_and_files_see_what_came_before(run):
    run.file('a.py', "steps = 20\nname = 'a'\n")
    run.file('b.py', "steps = steps + 1\nname = name + 'b'\n")
    assert run('a.py', 'b.py')['name'] == 'ab' and run('a.py', 'b.py')['steps'] == 21
    assert run('b.py', 'a.py')['name'] == 'a' and run('b.py', 'a.py')['steps'] == 20
    assert run('--steps=5', 'b.py')['steps'] == 6
    assert run('b.py', '--steps=5', '--steps=6')['steps'] == 6
    assert run('a.py', '--steps=5', 'b.py')['steps'] == 6


def test_a_file_cannot_reach_the_scripts_own_names(run):
    assert 'NameError' in run.fails(run.file('c.py', 'steps = untouched'))


def test_scale_files_see_the_stage_wherever_they_stand(run):
    run.file('scale.py', "name = stage\nsteps = 5 if stage == 'text' else 6\nlr = 3.0")
    run.file('recipe.py', "stage = 'mix'\nimage_ratio = 0.1\nlr = 1.0")
    assert run('scale.py')['name'] == 'text'
    for argv in (['recipe.py', 'scale.py'], ['scale.py', 'recipe.py']):
        config = run(*argv)
        assert config['name'] == 'mix' and config['steps'] == 6 and config['lr'] == 3.0      # the scale file wins
    assert run('scale.py', 'recipe.py', '--lr=2')['lr'] == 2.0
    assert run('--image_ratio=0.2', 'scale.py')['name'] == 'text'             # no guess from other values
    assert run('--stage=mix', 'scale.py')['name'] == 'mix'
    assert run('scale.py', '--stage=mix')['name'] == 'mix'                    # it is known wherever it stands
    for argv in (['recipe.py', 'scale.py', '--stage=text'], ['--stage=text', 'recipe.py', 'scale.py']):
        config = run(*argv)                                                   # the command line's stage is every file's
        assert config['stage'] == config['name'] == 'text' and config['steps'] == 5


def test_a_script_without_a_stage_key_is_its_own_stage(tmp_path, run):
    run.file('scale.py', 'name = stage')
    for script in ('finetune', 'evaluate'):
        path = tmp_path / f'{script}.py'
        path.write_text(SCRIPT.replace("stage = 'text' ", "other = 'text' "))
        assert configure({'__file__': str(path)}, ['scale.py'])['name'] == script


@pytest.mark.parametrize('arg, rule', [
    ('--lr=0', '> 0 (peak)'), ('--lr=-1', '> 0'), ('--image_ratio=1.5', '>= 0, <= 1 (share)'),
    ('--image_ratio=-0.1', '>= 0, <= 1'), ('--stage=cook', "'text' | 'mix' (what is trained)"),
    ('--percent=(0,)', '> 0, <= 100'), ('--percent=(50, 101)', '> 0, <= 100'),
    ('--percent=(0.5,)', 'items like those of the default (20, 40)'),
    ("--text=('a', 1.0)", 'pairs of a text and a number, such as'), ("--text=(('a',),)", 'such as'),
    ("--text=(('a', 'b'),)", "such as (('text', 1.0),)"), ("--text=(('a', -1),)", 'such as')])
def test_a_value_outside_its_rule_is_refused_and_the_rule_quoted(run, arg, rule):
    message = run.fails(arg)
    assert message.startswith(f"command line: {arg[2:].split('=')[0]}=") and rule in message, message


def test_a_rule_holds_in_files_and_for_each_setting(run):
    assert run.fails(run.file('c.py', 'lr = 0')).startswith('c.py: lr=0.0: expected > 0')
    assert run('--image_ratio=1', '--percent=100,1', '--text=()')['percent'] == (100, 1)


def test_rules_tell_what_may_differ_on_resume(tmp_path):
    path = tmp_path / 's.py'
    path.write_text(SCRIPT)
    assert {key for key, rule in config_keys(path).items() if rule.free} == {'stage', 'percent'}


def test_what_differs_is_printed_in_one_line_by_rank_0_only(run, monkeypatch):
    run('--steps=11', '--lr=0.01', '--name=x')
    assert run.out() == "config: steps=11, name='x'\n"
    monkeypatch.setenv('RANK', '1')
    run('--steps=11')
    assert run.out() == ''


def test_help_prints_every_key(run):
    for flag in ('--help', '-h'):
        with pytest.raises(SystemExit) as caught:
            run('missing.py', flag)
        assert caught.value.code == 0
        out = run.out()
        assert out.startswith('A script.')
        lines = {line.split('=')[0].strip(): line for line in out.split('resumed):\n')[1].splitlines()}
        assert list(lines) == [f'--{k}' for k in run()] and len(lines) == 11
        assert '--steps=10' in lines['--steps'] and lines['--steps'].endswith('  optimizer steps; 0 = none')
        assert lines['--init_from'].endswith("'' = from scratch, or a checkpoint folder")
        assert "--text=(('a', 1.0),)" in lines['--text'] and '  [> 0] peak' in lines['--lr']


@pytest.mark.parametrize('argv, message', [
    (['--steps', '5'], 'command line: --steps: expected --key=value (with the equals sign)'),
    (['-x'], 'command line: -x: expected'),
    (['--=3'], 'command line: --=3: expected'),
    (['config/tiny'], 'command line: config/tiny: expected a config file that ends in .py'), ([''], 'command line: '),
    (['recipy.py'], 'config file recipy.py not found; did you mean ./recipe.py?'),
    (['none/x.py'], 'config file none/x.py not found'),
    (['folder.py'], 'config file folder.py: ')])
def test_other_arguments_are_refused(run, argv, message, tmp_path):
    run.file('recipe.py', '')
    (tmp_path / 'folder.py').mkdir()
    assert run.fails(*argv).startswith(message)


@pytest.mark.parametrize('text, message', [
    ('steps = ', 'invalid syntax'), ('steps = undefined', 'NameError'), ('steps = 1 / 0', 'ZeroDivisionError'),
    ('steps = [][0]', 'IndexError'),
    ("open('nothing')", 'FileNotFoundError'), ('assert False, "no"', 'AssertionError: no'),
    ('raise RuntimeError("x")', 'RuntimeError: x'),
    ('import no_such_module as _m', 'ModuleNotFoundError'), ('def _f(): return _f()\nsteps = _f()', 'RecursionError'),
    ("steps = 'a' + 1", 'TypeError'), ('steps = lr.x', 'AttributeError'), ("eval('1 +')", 'SyntaxError'),
    ('x = "\0"', 'null bytes'),
    ('steps = 1\n  lr = 2', 'unexpected indent')])
def test_a_broken_config_file_is_named(run, text, message):
    found = run.fails(run.file('c.py', text))
    assert found.startswith('config file c.py: ') and message in found


def test_a_file_that_is_not_text(run, tmp_path):
    (tmp_path / 'c.py').write_bytes(b'\xff\xfe\x00bad')
    assert run.fails('c.py').startswith('config file c.py: ')


@pytest.mark.parametrize('block, message', [
    ('a = 1\nb = a', ':3: a config block holds `name = literal` lines only'), ('import os', 'literal'),
    ('a = b = 1', 'literal'),
    ('x.y = 1', 'literal'), ('a, b = 1, 2', 'literal'), ('a: int = 1', 'literal'), ('"words"', 'literal'),
    ('a = [1]', ':2: a is a list'),
    ('a = None', 'a is a NoneType: expected bool, int, float, str or tuple'),
    ('a = 1\na = 2', ':3: a is there twice'), ('a = 1  # [>1] x', "a: rule [>1]: '>1' is not a bound"),
    ('a = 1  # [> 1] x', 'a: its default: a=1: expected > 1'), ("a = 'c'  # ['a' | 'b'] x", "expected 'a' | 'b'")])
def test_a_wrong_block_is_named(tmp_path, block, message):
    path = tmp_path / 's.py'
    path.write_text(f'# --- config\n{block}\n# --- config end\n')
    with pytest.raises(ValueError) as caught:
        config_keys(path)
    assert message in str(caught.value) and str(path) in str(caught.value) and '\n' not in str(caught.value)


def test_a_block_needs_its_two_lines(tmp_path):
    path = tmp_path / 's.py'
    for text, n in [('a = 1\n', 0), ('# --- config\na = 1\n', 1), ('# --- config\n' * 3, 3)]:
        path.write_text(text)
        with pytest.raises(ValueError, match=f'found {n}'):
            config_keys(path)


@pytest.mark.parametrize('script', ['pretrain', 'finetune', 'evaluate'])
def test_the_scripts_own_blocks(script):
    """Each key has a type that the command line can set, and shared keys have one type in every script."""
    keys = config_keys(os.path.join(ROOT, f'{script}.py'))
    assert {'seed', 'device', 'dtype', 'n_thread'} <= set(keys) or script == 'evaluate'
    first = config_keys(os.path.join(ROOT, 'pretrain.py'))
    for key, rule in keys.items():
        assert type(rule.default) is type(first.get(key, rule).default), key
        assert type(rule.default) not in (int, float) or rule.bounds or key == 'encoder_layer', key


def test_as_a_process(tmp_path):
    """Globals are overwritten, and a mistake ends with status 1, one line on stderr and no traceback."""
    (tmp_path / 'pretrain.py').write_text(SCRIPT.replace('_private = 1', '''_private = 1
import sys
from errors import user_error_hook
sys.excepthook = user_error_hook'''))
    (tmp_path / 'c.py').write_text('steps = 1 + None')

    def child(*argv):
        return subprocess.run([sys.executable, 'pretrain.py', *argv], cwd=tmp_path, env=child_env(PYTHONPATH=ROOT,
            RANK='0'),
                              capture_output=True, text=True, timeout=60)
    good = child('--steps=1e2')
    assert good.returncode == 0 and good.stdout.endswith('100 1\n') and good.stderr == ''
    for argv in (['--stepz=1'], ['c.py'], ['--steps=x']):
        bad = child(*argv)
        assert bad.returncode == 1 and bad.stdout == '' and bad.stderr.count('\n') == 1 and 'Traceback' not in bad.stderr


def test_figure_6s_cell_without_images_is_of_stage_2():
    """Ratio 0 from scratch (F.4) trains stage 2's tokens, 20 per parameter, not stage 1's."""
    argv = ['config/ckpt80_img10.py', 'config/79m.py', '--init_from=', '--image_ratio=0', '--schedule=rewarm']
    cell = configure({'__file__': os.path.join(ROOT, 'pretrain.py')}, [os.path.join(ROOT, a) if a.endswith('.py') else a
                                                                       for a in argv])
    assert cell['max_tokens'] == 20 * 78_914_048 and cell['n_embd'] == 512
    text = configure({'__file__': os.path.join(ROOT, 'pretrain.py')}, [os.path.join(ROOT, 'config/79m.py')])
    assert text['max_tokens'] == 237_000_000_000


def test_each_axis_file_changes_the_name_and_its_axis_alone():
    axes = sorted(name for name in os.listdir(os.path.join(ROOT, 'config/axes')) if name.endswith('.py'))
    names = set()
    for axis in axes:
        script, recipe = ('finetune', 'finetune') if axis.startswith('epochs') else ('pretrain', 'ckpt80_img10')
        before, after = (configure({'__file__': os.path.join(ROOT, f'{script}.py')},
                                   [os.path.join(ROOT, 'config', f'{file}.py') for file in files])
                         for files in ([recipe], [recipe, f'axes/{axis[:-3]}']))
        changed = {key for key in after if after[key] != before[key]}
        assert 'name' in changed and 2 <= len(changed) <= 3, axis
        names.add(after['name'])
    assert len(names) == len(axes)


def test_two_resolutions_are_two_runs():
    files = ['config/ckpt80_img10.py', 'config/79m.py', 'config/res384.py', 'config/res980.py']
    first, second = (configure({'__file__': os.path.join(ROOT, 'pretrain.py')}, [os.path.join(ROOT, f) for f in files[:n]])
                     for n in (3, 4))
    assert (first['name'], first['image_size'], first['aspect'], first['image_tokens']) == ('ckpt80_img10_384', 384, 'keep', 64)
    assert second['init_from'] == 'out/{scale}/ckpt80_img10_384/ckpt_100' and second['name'] == 'ckpt80_img10_980'
    assert {key for key in second if second[key] != first[key]} == {'name', 'init_from', 'image_size', 'schedule', 'rewarm_lr'}


def test_axis_files_compose():
    files = [f'config/{name}.py' for name in ('79m', 'ckpt80_img10', 'axes/ckpt20', 'axes/img5', 'axes/tokens_x2')]
    config = configure({'__file__': os.path.join(ROOT, 'pretrain.py')}, [os.path.join(ROOT, file) for file in files])
    assert config['name'] == 'ckpt20_img5_x2' and config['init_from'] == 'out/{scale}/text/ckpt_020'
    assert config['image_ratio'] == 0.05 and config['max_tokens'] == 2 * 20 * 78_914_048
