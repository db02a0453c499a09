"""bench_gpu.py: what it times agrees first (on CPU, small sizes), and a page is written whatever becomes of its parts."""
import pytest
import torch

import bench
import bench_gpu
from conftest import child_env
from errors import UserError


@pytest.mark.parametrize('argv', (['kernels'], ['tune'], ['gpu', '--out=x']))
@pytest.mark.skipif(torch.cuda.is_available(), reason='says what happens without a GPU')
def test_gpu_commands_say_so_without_one(argv, capsys):
    bench.COMMANDS[argv[0]](argv[1:])
    assert 'no GPU' in capsys.readouterr().out


def test_tune_on_a_gpu_without_configs(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: (12, 0))
    monkeypatch.setattr(bench_gpu.policy, 'triton', bench_gpu.policy.triton or object())
    bench_gpu.tune([])
    assert 'no configs for compute capability 12.0' in capsys.readouterr().out


def test_loss_candidates_agree_with_float64():
    leaves, names, flops = bench_gpu.loss_candidates(dict(N=40, C=64, V=100, share=0.5), torch.device('cpu'), torch.float32)
    truth = bench_gpu.gradients(names['eager'], leaves, torch.float64)
    assert flops > 0
    for name in ('eager', "ours, impl='torch'", "ours, impl='auto'", *({'F.linear_cross_entropy'} & set(names))):
        for a, b in zip(bench_gpu.gradients(names[name], leaves), truth):
            assert (a - b).abs().max() <= 1e-4 * b.abs().max(), name                     # float32 sums of 100 terms


@pytest.mark.parametrize('mask', ('causal', 'prefix', 'documents'))
def test_attention_candidates_agree_with_float64(mask):
    case = dict(B=2, H=2, D=64, T=48, mask=mask)
    leaves, names, flops = bench_gpu.attention_candidates(case, torch.device('cpu'), torch.float32)
    truth = bench_gpu.gradients(names['SDPA, boolean mask'], leaves, torch.float64)
    assert flops > 0
    for name in ('SDPA, boolean mask', "ours, impl='auto'", *(['SDPA in two calls'] if mask == 'prefix' else [])):
        for a, b in zip(bench_gpu.gradients(names[name], leaves), truth):
            assert (a - b).abs().max() <= 1e-4 * b.abs().max(), name


@pytest.mark.parametrize('op, n_unit', (('qk-norm', 14), ('add-norm', 14), ('swiglu', 8)))
def test_fused_candidates_agree_with_float64(op, n_unit):
    case = dict(op=op, B=2, T=5, C=128, D=64)
    leaves, names, n_byte = bench_gpu.fused_candidates(case, torch.device('cpu'), torch.bfloat16)
    leaves = [x.detach().float().requires_grad_() for x in leaves]
    truth = bench_gpu.gradients(names['eager'], leaves, torch.float64)
    assert n_byte == n_unit * 2 * 5 * 128 * 2 and set(names) > {'eager', "ours, impl='triton'"}
    for a, b in zip(bench_gpu.gradients(names['eager'], leaves), truth):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()               # float32 sums of 128 terms


def test_the_cases_cover_every_kernel_and_tune_every_config():
    assert {case['op'] for case in bench_gpu.FUSED_CASES} == {'qk-norm', 'add-norm', 'swiglu'}
    assert set(bench_gpu.TUNE) == {kernel for kernel, _, _ in bench_gpu.policy.CONFIG} - {'delta'}


def test_the_loss_curve_of_a_small_model(capsys):
    spec = dict(decoder=dict(n_layer=2, n_head=2, n_embd=32, vocab_size=300, seq_len=64), encoder=None, projector=None,
                image_id=None)
    before = dict(bench_gpu.policy.POLICY)
    bench_gpu.curve([], n_step=12, spec=spec, n_row=2)
    out = capsys.readouterr().out
    assert 'step    1' in out and 'step   12' in out and bench_gpu.policy.POLICY == before
    if not torch.cuda.is_available():
        assert 'largest difference of a step\'s loss: 0.0000' in out   # both are the reference here


def test_a_page_of_parts_that_end_fail_and_take_too_long(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    for key, value in child_env().items():
        monkeypatch.setenv(key, value)
    tiny = ['step', '--stage=mix', 'config/tiny.py', '--encoder=patch', '--image_size=42', '--device=cpu',
            '--image_ratio=0.25', '--n_thread=1']
    parts = [('a step', 120, tiny), ('no command', 120, ['stepp']), ('too long', 0.2, ['-m', 'timeit', '-n1', 'while 1: 0']),
             ('a module', 120, ['-m', 'this'])]
    bench_gpu.run_parts(parts, str(tmp_path / 'out'), 400, 'a title')
    page = (tmp_path / 'out' / 'page.md').read_text()
    assert page.startswith('# a title\n') and capsys.readouterr().out.startswith(page)
    names = [line.split(' (')[0] for line in page.splitlines() if line.startswith('## ')]
    assert names == ['## a step', '## no command', '## too long', '## a module']
    assert 'tokens/s' in page and 's, failed)' in page and 'stopped after 0 s' in page and 'Beautiful is better' in page
    assert [p.name for p in (tmp_path / 'out').iterdir()] == ['page.md']
    bench_gpu.run_parts(parts[:1], str(tmp_path / 'out'), 0, 'late')
    assert 'stopped after 0 s' in (tmp_path / 'out' / 'page.md').read_text()


def test_gpu_wants_a_folder():
    with pytest.raises(UserError, match='expected --out=DIR'):
        bench_gpu.gpu([])
