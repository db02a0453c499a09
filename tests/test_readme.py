"""README.md and docs/*.md: the files, links, commands and keys that they name exist; the example of a config works."""
import glob
import os
import re
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import prepare
from configurator import config_keys, configure

DOCS = {}
for path in ['README.md'] + sorted(glob.glob('docs/*.md', root_dir=ROOT)):
    with open(os.path.join(ROOT, path), encoding='utf-8') as f:
        DOCS[path] = f.read()
README = DOCS['README.md']
KEYS = {name: config_keys(os.path.join(ROOT, f'{name}.py')) for name in ('pretrain', 'finetune', 'dpo', 'evaluate')}
COMMAND = re.compile(r'^ *(?:\$mix|(?:torchrun|python) .*?\w+\.py\b).*?(?<!\\)$', re.M)
COMMANDS = [command for text in DOCS.values() for command in COMMAND.findall(text.replace('\\\n', ' '))]
each_document = pytest.mark.parametrize('path', DOCS)


def files_named(text):
    """The files of this project that a text names."""
    text = re.sub(r'https?://\S+', '', text)
    named = set(re.findall(r'(?<![\w*])(?:config/(?:axes/)?|tests/|launch/)?[\w-]+\.(?:py|sh|txt)\b', text))
    return {name for name in named if not name.startswith(('photo', 'OCR', 'config/mine', 'table.'))}


@each_document
def test_every_file_it_names_is_there(path):
    assert not [name for name in files_named(DOCS[path]) if not os.path.exists(os.path.join(ROOT, name))]


def test_the_readme_names_every_file():
    named = files_named(README) | set(re.findall(r'docs/\w+\.\w+', README))
    assert {name for name in os.listdir(ROOT) if name.endswith(('.py', '.sh', '.txt'))} <= named
    assert set(DOCS) - {'README.md'} <= named


@each_document
def test_every_link_to_a_file_leads_there(path):
    links = [link for link in re.findall(r'\]\(([^)]+)\)', DOCS[path]) if not link.startswith('http')]
    here = os.path.join(ROOT, os.path.dirname(path))
    assert not [link for link in links if not os.path.exists(os.path.join(here, link.split('#')[0]))]


@pytest.mark.parametrize('command', COMMANDS)
def test_every_key_of_a_command_exists(command):
    script = 'pretrain' if '$mix' in command else re.search(r'(\w+)\.py', command).group(1)
    keys = re.findall(r' --(\w+)', command.split('.py', 1)[-1])
    assert '$mix' in command or os.path.exists(os.path.join(ROOT, f'{script}.py')), command
    if script in KEYS:
        assert set(keys) <= set(KEYS[script]), command
    if script == 'prepare':
        prepare.parse(re.sub(r' +#.*', '', command).replace("'", '').split()[2:])


@each_document
def test_every_key_in_its_prose_exists(path):
    known = set().union(*KEYS.values())
    named = set(re.findall(r'`(?:--)?([a-z]\w*)=', DOCS[path])) - {'key', 'ipc', 'impl'}          # not keys of ours
    assert named <= known, named - known
    assert path != 'README.md' or len(named) > 5


# --- the example of "Your own data" -----------------------------------------------------------------------------------

@pytest.mark.parametrize('script, recipe, expected', [
    ('pretrain', ['config/text.py'], dict(name='text', vocab_size=4352, schedule='main', max_steps=400)),
    ('pretrain', ['config/ckpt80_img10.py'], dict(vocab_size=4352, encoder='patch', image_ratio=0.1)),
    ('finetune', ['config/finetune.py'], dict(instruct='instruct/mine.json', seq_len=256, n_epoch=3)),
    ('evaluate', [], dict(scale='mine')),
])
def test_its_config_of_ones_own_is_read_by_every_stage(script, recipe, expected, tmp_path):
    blocks = re.findall(r'^```\n(.*?)^```', README, re.M | re.S)
    (example,) = [block for block in blocks if block.startswith("scale = 'mine'")]
    mine = tmp_path / 'mine.py'
    mine.write_text(example)
    argv = [os.path.join(ROOT, path) for path in recipe] + [str(mine)]
    values = configure({'__file__': os.path.join(ROOT, f'{script}.py')}, argv)        # an unknown key would end it here
    assert {key: values[key] for key in expected} == expected
    assert values['scale'] == 'mine'


def test_ci_runs_the_test_command_of_the_readme():
    with open(os.path.join(ROOT, '.ci', 'run'), encoding='utf-8') as f:
        (command,) = re.findall(r"grep -m1 -o '([^']+)'", f.read())
    assert command in README and 'requirements-test.txt' in command
