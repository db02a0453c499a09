"""Which implementation runs, what is said of it, and the self-check."""
import subprocess
import sys

import pytest
import torch

import kernels
import loss
import policy
from kernel_judge import DEVICE, DTYPE, ROOT, child, fresh_notices, needs_triton  # noqa: F401
pytestmark = pytest.mark.filterwarnings('ignore::RuntimeWarning')   # numpy on log(0) and nan in the interpreter


def test_importing_kernels_does_not_import_the_compiler():
    code = "import kernels, sys; sys.exit('torch._dynamo' in sys.modules)"                # 1 to 3 s of every command
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT, timeout=120).returncode == 0


def test_the_choice_is_marked_as_torch_marks_it():
    import torch._dynamo
    plain = lambda: 0                                                                        # noqa: E731
    assert vars(torch.compiler.assume_constant_result(plain)).items() <= vars(policy._choose).items()


def test_without_triton_the_references_run_and_say_so():
    out = child('''
import sys
sys.modules['triton'] = None                             # import triton raises ImportError
import torch, kernels
x, w, t = torch.randn(9, 64, requires_grad=True), torch.randn(20, 64), torch.arange(9)
for impl in ('auto', 'triton', 'triton', 'triton-keep'):
    kernels.linear_cross_entropy(x, w, t, impl=impl)[0].sum().backward()
q = torch.randn(1, 1, 9, 64)
kernels.attention(q, q, q, kernels.Intervals.causal(1, 9), impl='triton')
''')
    lines = out.splitlines()
    assert len(lines) == 3 and all('triton is not installed' in line for line in lines), out


def on_gpu(monkeypatch, capability, check=''):
    """Decide as on a GPU of that compute capability; nothing is launched."""
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: capability)
    monkeypatch.setattr(policy, '_self_check', lambda *a: check)
    monkeypatch.setattr(policy, 'triton', policy.triton or object())
    return lambda what, width=128, dtype=torch.bfloat16, impl='auto': policy._choose(
        *what.split(', ', 1), impl, torch.device('cuda', 0), dtype, width)


@pytest.mark.parametrize('capability', [(8, 0), (8, 9), (9, 0), (10, 0)], ids=str)
def test_auto_follows_the_table_and_says_so_once(capability, monkeypatch, capsys):
    choose = on_gpu(monkeypatch, capability)
    for situation, (table, why) in policy.POLICY.items():
        expected = table.get(capability[0], 'torch')
        assert choose(situation) == choose(situation) == expected
        why = why if capability[0] in table else policy.NO_TABLE
        assert capsys.readouterr().out == f'kernels: {situation}: {expected} ({why})\n'
    assert all(set(table) == {8, 9} for table, _ in policy.POLICY.values())


@pytest.mark.parametrize('arguments, reason', [
    (dict(width=72), 'head dim 72'), (dict(dtype=torch.float32), 'float32'), (dict(dtype=torch.float64), 'float64')])
@pytest.mark.parametrize('impl', ['auto', 'triton'])
def test_what_the_kernels_cannot_do_runs_the_reference_and_says_why(arguments, reason, impl, monkeypatch, capsys):
    choose = on_gpu(monkeypatch, (8, 0))
    monkeypatch.setattr(policy, 'INTERPRET', False)
    assert choose('attention, intervals', **arguments, impl=impl) == 'torch'
    said = capsys.readouterr().out
    assert said.count('\n') == 1 and reason in said and 'torch instead of triton' in said


def test_kill_switch_self_check_and_ranks(monkeypatch, capsys):
    choose = on_gpu(monkeypatch, (9, 0), check='self-check failed: dq is off by 0.3')
    assert choose('attention, intervals') == 'torch' and 'dq is off by 0.3' in capsys.readouterr().out
    assert choose('attention, documents') == 'torch' and 'instead of torch-varlen' in capsys.readouterr().out
    monkeypatch.setattr(policy, 'SWITCH', 'off')
    assert choose('loss, logits fit') == 'torch' and 'CKPT80_KERNELS=off' in capsys.readouterr().out
    monkeypatch.setenv('RANK', '1')
    policy._say.cache_clear()
    choose('attention, causal')
    assert capsys.readouterr().out == ''


@needs_triton
@pytest.mark.parametrize('op, width', [('attention', 64), ('loss', 64)])
def test_self_check_passes_and_catches_a_wrong_kernel(op, width, monkeypatch):
    device = torch.device(DEVICE)
    with torch.inference_mode(), torch.autocast(DEVICE, torch.bfloat16):    # whatever state the first call is made in
        assert policy._self_check(op, device, DTYPE, width) == ''
    policy._self_check.cache_clear()
    forward = loss._nll_triton
    monkeypatch.setattr(kernels, 'LOG2_E', 1.2)
    monkeypatch.setattr(loss, '_nll_triton', lambda *a: (forward(*a)[0] + 1, *forward(*a)[1:]))
    assert 'output is off by' in policy._self_check(op, device, DTYPE, width)


@needs_triton
@pytest.mark.parametrize('op', ['attention', 'loss'])
def test_self_check_of_a_machine_that_cannot_build_and_inside_checkpointing(op, monkeypatch):
    device, packed = torch.device(DEVICE), []
    with torch.autograd.graph.saved_tensors_hooks(packed.append, lambda x: x):    # as activation checkpointing does
        assert policy._self_check(op, device, DTYPE, 64) == '' and not packed
    for failure in (subprocess.CalledProcessError(1, 'gcc'), AssertionError('libcuda.so cannot found!')):
        def launch(*args, failure=failure):
            raise failure
        policy._self_check.cache_clear()
        monkeypatch.setattr(*((kernels, '_interval_attention') if op == 'attention' else (loss, '_nll_triton')), launch)
        assert f'self-check failed: {type(failure).__name__}' in policy._self_check(op, device, DTYPE, 64)
