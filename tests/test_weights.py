"""weights.py: every layout of tensors on disk, what fill copies, refuses and leaves, and that nothing is held twice."""
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import child_env
from safetensors.torch import save_file

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from errors import UserError
from weights import fill, read_json, tensors


def net(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))


def same(module, state):
    return all(torch.equal(v, state[k]) for k, v in module.state_dict().items())


@pytest.mark.parametrize('layout', ['.pt', 'state_dict', 'old .pt', '.safetensors', 'folder', 'shards'])
def test_every_layout_gives_names_shapes_and_types_before_any_tensor_is_read(tmp_path, layout):
    state = net().state_dict()
    state['1.bias'] = state['1.bias'].bfloat16()
    path = tmp_path / {'.safetensors': 'w.safetensors', 'folder': '', 'shards': ''}.get(layout, 'w.pt')
    if layout in ('.pt', 'old .pt'):
        torch.save(state, path, _use_new_zipfile_serialization=layout == '.pt')
    elif layout == 'state_dict':
        torch.save({'epoch': 3, 'state_dict': state}, path)
    elif layout == 'shards':
        where = {k: f'model-{i % 2}.safetensors' for i, k in enumerate(state)}
        for file in set(where.values()):
            save_file({k: v for k, v in state.items() if where[k] == file}, tmp_path / file)
        (tmp_path / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': where}))
    else:
        save_file(state, path if layout == '.safetensors' else tmp_path / 'model.safetensors')
    found = tensors(path)
    assert {k: (t.shape, t.dtype) for k, t in found.items()} == {k: (tuple(v.shape), v.dtype) for k, v in state.items()}
    assert all(torch.equal(t.read(), state[k]) for k, t in found.items())
    module = net(1)
    assert fill(module, found) == [] and same(module, {k: v.float() for k, v in state.items()})


def test_fill_renames_skips_and_names_what_is_left_fresh(tmp_path):
    state = net().state_dict()
    save_file({**{f'model.{k}': v for k, v in state.items() if k.startswith('0.')}, 'other': torch.ones(1)},
              tmp_path / 'w.safetensors')
    module, before = net(1), net(1).state_dict()
    source = tensors(tmp_path / 'w.safetensors')
    strip = lambda name: name[6:] if name.startswith('model.') else None
    assert fill(module, source, strip) == fill(module, source, strip, ['1.']) == ['1.bias', '1.weight']
    assert same(module, {**before, **{k: v for k, v in state.items() if k.startswith('0.')}})


@pytest.mark.parametrize('change, message', [
    (dict(drop='0.weight'), r'w.safetensors: lacks 0.weight$'), (dict(drop='0'), 'lacks 0.bias and 1 more tensors'),
    (dict(extra=torch.ones(1)), 'w.safetensors: holds extra, which this model does not have'),
    ({'0.bias': torch.ones(5)}, r"w.safetensors: 0.bias is \(5,\), this model's is \(4,\)"),
    ({'0.bias': torch.ones(4, dtype=torch.int64)}, 'w.safetensors: 0.bias is I64, expected floats'),
    ({'0.bias': torch.ones(4, dtype=torch.bool)}, '0.bias is BOOL, expected floats')])
def test_what_does_not_fit_is_named_and_nothing_is_copied(tmp_path, change, message):
    drop = change.pop('drop', '-')
    state = {k: v for k, v in {**net().state_dict(), **change}.items() if not k.startswith(drop)}
    save_file(state, tmp_path / 'w.safetensors')
    module = net(1)
    with pytest.raises(UserError, match=message):
        fill(module, tensors(tmp_path / 'w.safetensors'), may_lack=())
    assert same(module, net(1).state_dict())


def test_a_file_that_holds_no_tensors_is_named(tmp_path):
    for name, content in (('a.pt', [1]), ('b.pt', {'x': 3}), ('c.pt', {'state_dict': {'x': 'y'}})):
        torch.save(content, tmp_path / name)
        with pytest.raises(UserError, match=f'{name}: not weights: expected a dict of tensors'):
            tensors(tmp_path / name)
    (tmp_path / 'd.json').write_text('[' * 100_000)
    with pytest.raises(UserError, match='d.json: not readable as JSON'):
        read_json(tmp_path / 'd.json')


@pytest.mark.parametrize('suffix', ['pt', 'safetensors'])
def test_loading_holds_one_tensor_beside_the_model(tmp_path, suffix):
    """Peak memory of a child process that fills a model of 16 tensors of 8 MiB: the model and less than 4 more."""
    n, size = 16, 1 << 21
    state = {f'{i}.weight': torch.full((1, size), float(i)) for i in range(n)}
    path = str(tmp_path / f'w.{suffix}')
    torch.save(state, path) if suffix == 'pt' else save_file(state, path)
    code = f'''
import resource, sys
sys.path.insert(0, {ROOT!r})
import torch
from weights import fill, tensors
model = torch.nn.Sequential(*(torch.nn.Linear({size}, 1, bias=False) for _ in range({n})))
def anonymous():                                     # pages of mapped files are not this process's to keep
    return int(next(line for line in open('/proc/self/status') if line.startswith('RssAnon')).split()[1])
peak, before = [0], anonymous()
source = {{k: t._replace(read=lambda t=t: (t.read(), peak.append(anonymous()))[0]) for k, t in tensors({path!r}).items()}}
assert fill(model, source) == [] and float(model[7].weight[0, 3]) == 7
print(max(peak) - before)
'''
    done = subprocess.run([sys.executable, '-c', code], env=child_env(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 4 * 4 * size // 1024, done.stdout                              # KiB
