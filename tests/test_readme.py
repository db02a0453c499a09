"""README.md: the files, scripts, configs and keys that it names are there."""
import os
import re
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import prepare
from configurator import config_keys

with open(os.path.join(ROOT, 'README.md'), encoding='utf-8') as f:
    README = f.read()
KEYS = {name: config_keys(os.path.join(ROOT, f'{name}.py')) for name in ('pretrain', 'finetune', 'evaluate')}
COMMANDS = re.findall(r'^ *(?:\$mix|(?:torchrun|python) .*?\w+\.py\b).*?(?<!\\)$', README.replace('\\\n', ' '), re.M)


def test_every_file_it_names_is_there():
    named = set(re.findall(r'\b(?:config/|tests/)?\w+\.(?:py|sh|txt)\b', README))
    own = {name for name in named if not name.startswith(('photo', 'OCR', 'config/mine', 'table.'))}
    missing = [name for name in own if not os.path.exists(os.path.join(ROOT, name))]
    assert len(own) > 20 and not missing, missing
    assert {name for name in os.listdir(ROOT) if name.endswith('.py')} <= named              # none is left out


@pytest.mark.parametrize('command', COMMANDS)
def test_every_key_of_a_command_exists(command):
    script = 'pretrain' if '$mix' in command else re.search(r'(\w+)\.py', command).group(1)
    keys = re.findall(r' --(\w+)', command.split('.py', 1)[-1])
    if script in KEYS:
        assert set(keys) <= set(KEYS[script]), command
    if script == 'prepare':
        prepare.parse(re.sub(r' +#.*', '', command).replace("'", '').split()[2:])


def test_every_key_in_its_prose_exists():
    known = set().union(*KEYS.values())
    named = set(re.findall(r'`(?:--)?([a-z]\w*)=', README)) - {'key', 'ipc', 'impl'}          # not keys of ours
    assert len(named) > 5 and named <= known, named - known
