"""
LayerNorm of q and k with rotary against float64 truth, bound by PyTorch's own error in the same dtype; without a GPU in
Triton's interpreter.
"""
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fused
import policy
from fused import qk_norm_rotary
from model import Decoder, ModelConfig
from kernel_judge import (CAN_TRITON, DEVICE, DTYPE, IMPLS, TRITON_DTYPES, fresh_notices, leaf,  # noqa: F401
                          needs_triton, no_worse)

pytestmark = pytest.mark.filterwarnings('ignore::RuntimeWarning')          # numpy's, in the interpreter
EPS = 0.1                       # large, so that it shows


def problem(B=2, T=9, n_head=2, D=64, positions=False, seed=0):
    """qkv, gains, cos, sin, and upstream gradients of q, k, v."""
    g = torch.Generator().manual_seed(seed)
    C = n_head * D
    qkv = 3 * torch.randn(B, T, 3 * C, generator=g) + torch.randn(3 * C, generator=g)        # means that are not 0
    position = torch.randint(0, 3000, (B, 1, T), generator=g) if positions else torch.arange(T)
    angle = (position[..., None] * 1e4 ** (-torch.arange(0, D, 2) / D)).repeat_interleave(1, -1)
    angle = torch.cat((angle, angle), -1)
    gains = [1 + torch.randn(C, generator=g) / 4 for _ in range(2)]
    return qkv, *gains, angle.cos(), angle.sin(), [torch.randn(B, n_head, T, D, generator=g) for _ in range(3)]


def written_out(qkv, q_gain, k_gain, cos, sin, n_head, eps):
    """Token by head, with complex numbers for the rotation: another way than the reference's."""
    turn = torch.complex(cos, sin)[..., :cos.shape[-1] // 2]                 # (T,D/2) or (B,1,T,D/2)
    out = []
    for x, gain in zip(qkv.split(qkv.shape[-1] // 3, -1), (q_gain, k_gain, None)):
        if gain is not None:
            x = gain * (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + eps).sqrt()
        x = x.reshape(*x.shape[:2], n_head, -1).transpose(1, 2)
        if gain is not None:
            half = x.shape[-1] // 2
            x = torch.complex(x[..., :half], x[..., half:]) * turn
            x = torch.cat((x.real, x.imag), -1)
        out.append(x)
    return out


def results(run, dtype, qkv, q_gain, k_gain, cos, sin, grads, n_head=2, gain_dtype=None):
    """[q, k, v, dqkv, dq_gain, dk_gain]"""
    leaves = [leaf(qkv, dtype), *(leaf(g, gain_dtype or dtype) for g in (q_gain, k_gain))]
    rotary = [y.to(DEVICE, torch.float64 if dtype == torch.float64 else torch.float32) for y in (cos, sin)]
    out = run(*leaves, *rotary, n_head, EPS)
    return [y.detach() for y in out] + list(torch.autograd.grad(out, leaves, [g.to(DEVICE, dtype) for g in grads]))


def cases():
    for impl in ('torch', 'triton'):
        for dtype in TRITON_DTYPES:
            for shape in (dict(), dict(n_head=3, T=5), dict(n_head=3, D=128, T=4, positions=True), dict(n_head=1, B=1),
                          dict(B=1, T=2, n_head=32, D=128), dict(B=3, T=1, n_head=8, positions=True)):
                yield impl, dtype, shape


@pytest.mark.parametrize('impl, dtype, shape', list(cases()), ids=str)
def test_values_and_gradients_are_no_worse_than_torch(impl, dtype, shape):
    if impl == 'triton' and not CAN_TRITON:
        pytest.skip('triton is not installed')
    *inputs, grads = problem(**shape)
    inputs = [x.to(dtype) for x in inputs[:3]] + inputs[3:]
    n_head = shape.get('n_head', 2)
    ours = results(lambda *a: qk_norm_rotary(*a, impl=impl), dtype, *inputs, grads, n_head)
    grads = [g.to(dtype) for g in grads]
    torchs, truth = (results(run, d, *inputs, grads, n_head) for run, d in
                     ((fused._qk_norm_rotary_torch, dtype), (written_out, torch.float64)))
    for name, *values in zip(('q', 'k', 'v', 'dqkv', 'dq_gain', 'dk_gain'), ours, torchs, truth):
        no_worse(name, *values, dtype)
    assert {y.dtype for y in ours} == {dtype}
    assert all(y.transpose(1, 2).is_contiguous() for y in ours[:2])          # heads join without a copy


@pytest.mark.parametrize('impl', IMPLS)
def test_without_gains_there_is_no_norm(impl, capsys):
    qkv, _, _, cos, sin, _ = problem()
    q, k, v = qk_norm_rotary(qkv, None, None, cos, sin, 2, EPS, impl=impl)
    torch.testing.assert_close(q.norm(dim=-1), qkv[..., :128].unflatten(-1, (2, 64)).transpose(1, 2).norm(dim=-1))
    assert ('no gains' in capsys.readouterr().out) == (impl == 'triton')


def test_wrong_shapes_are_named():
    qkv, q_gain, k_gain, cos, sin, _ = problem()
    with pytest.raises(ValueError, match=r'cos \(9, 64\).* 3 heads'):
        qk_norm_rotary(qkv, q_gain, k_gain, cos, sin, 3, EPS)
    with pytest.raises(ValueError, match=r'cos \(8, 64\)'):
        qk_norm_rotary(qkv, q_gain, k_gain, cos[1:], sin, 2, EPS)


@needs_triton
def test_gain_gradients_add_up_in_one_order_in_float32(monkeypatch):
    """Few programs for many rows; master gains in float32 beside 16-bit rows; two runs give the same bits."""
    monkeypatch.setattr(fused, 'N_PROGRAM', 3)
    *inputs, grads = problem(T=9, n_head=1)
    inputs = [inputs[0].bfloat16(), *inputs[1:]]
    grads = [g.bfloat16() + 1 for g in grads]             # so that the terms do not cancel
    run = lambda *a: qk_norm_rotary(*a, impl='triton')                                       # noqa: E731
    first, second = (results(run, torch.bfloat16, *inputs, grads, 1, torch.float32) for _ in range(2))
    assert all(torch.equal(y, z) for y, z in zip(first, second))
    truth = results(written_out, torch.float64, *inputs, grads, 1)
    for y, z in zip(first[4:], truth[4:]):
        assert y.dtype == torch.float32
        torch.testing.assert_close(y.double(), z, rtol=1e-4, atol=1e-4)


@needs_triton
def test_gradients_of_any_layout_and_64_bit_offsets(tmp_path):
    """sum() hands down stride 0; and tokens 2^27 apart, where from 16 on an offset of 32 bits is negative."""
    T, dtype, step = 18, torch.float16, 1 << 27
    qkv, q_gain, k_gain, cos, sin, _ = problem(B=1, T=T, n_head=1)
    inputs = [x.to(DEVICE, dtype) for x in (qkv, q_gain, k_gain)] + [x.to(DEVICE)[None] for x in (cos, sin)]
    stat = fused._qk_norm_rotary(*inputs, 1, EPS)[3]
    if DEVICE == 'cuda':
        storage = torch.empty(T * step, dtype=dtype, device=DEVICE).untyped_storage()
    else:                                                 # a sparse file: 4.8 GB of addresses, few pages
        storage = torch.UntypedStorage.from_file(str(tmp_path / 'sparse'), True, T * step * 2)
    far = [torch.empty(0, dtype=dtype, device=DEVICE).set_(storage, i * 64, (1, 1, T, 64), (64, 64, step, 1))
           for i in range(3)]
    near = [torch.randn(1, 1, T, 64).to(DEVICE, dtype) for _ in range(3)]
    for y, z in zip(far, near):
        y.copy_(z)
    flat = [torch.ones((), device=DEVICE, dtype=dtype).expand(1, 1, T, 64)] * 3
    for odd, plain in ((far, near), (flat, [y.contiguous() for y in flat])):
        ours, theirs = (fused._qk_norm_rotary_backward(*grads, *inputs, stat, 1) for grads in (odd, plain))
        assert all(torch.equal(y, z) for y, z in zip(ours, theirs))


@needs_triton
def test_each_gradient_has_its_own_strides():
    qkv, q_gain, k_gain, cos, sin, grads = problem(B=2, T=4)
    inputs = [x.to(DEVICE, DTYPE) for x in (qkv, q_gain, k_gain)] + [x.to(DEVICE)[None] for x in (cos, sin)]
    stat = fused._qk_norm_rotary(*inputs, 2, EPS)[3]
    plain = [g.to(DEVICE, DTYPE) for g in grads]                             # (B,H,T,D)
    dq = plain[0].transpose(1, 2).contiguous().transpose(1, 2)
    dk = torch.nn.functional.pad(plain[1], (0, 64, 0, 3, 0, 1))[:, :2, :4, :64]
    ours, theirs = (fused._qk_norm_rotary_backward(*g, *inputs, stat, 2) for g in ((dq, dk, plain[2]), plain))
    assert all(torch.equal(y, z) for y, z in zip(ours, theirs))


@needs_triton
@pytest.mark.parametrize('i', range(2))
def test_opcheck(i):
    *inputs, grads = problem(T=3)
    inputs = [leaf(x, DTYPE) for x in inputs[:3]] + [x.to(DEVICE)[None] for x in inputs[3:]]
    if i == 0:
        torch.library.opcheck(fused._qk_norm_rotary, (*inputs, 2, EPS))
    else:
        stat = fused._qk_norm_rotary(*inputs, 2, EPS)[3].detach()
        torch.library.opcheck(fused._qk_norm_rotary_backward, (
            *(g.to(DEVICE, DTYPE) for g in grads), *(x.detach() for x in inputs), stat, 2))


@pytest.mark.parametrize('impl', IMPLS)
def test_compiles_to_one_graph_and_checkpoints(impl):
    def block(qkv, q_gain, k_gain, cos, sin):
        return sum(y.sin() for y in qk_norm_rotary(qkv * 1.0, q_gain, k_gain, cos, sin, 2, EPS, impl=impl))

    compiled = torch.compile(block, backend='aot_eager', fullgraph=True, dynamic=True)
    for T in (5, 8):
        *inputs, _ = problem(T=T)
        plain, *others = ([f(*leaves), *torch.autograd.grad(f(*leaves).sum(), leaves[:3])] for f, leaves in (
            (f, [leaf(x, DTYPE) for x in inputs[:3]] + [x.to(DEVICE) for x in inputs[3:]]) for f in
            (block, compiled, lambda *a: checkpoint(block, *a, use_reentrant=False))))
        for other in others:
            for y, z in zip(plain, other):
                torch.testing.assert_close(y, z)


@needs_triton
@pytest.mark.parametrize('checkpointing', [False, True])
def test_the_decoder_gives_the_same_with_the_kernel(checkpointing, monkeypatch):
    """Forward and every gradient of two layers, plain and with recomputed blocks; under autocast, too."""
    torch.manual_seed(0)
    decoder = Decoder(ModelConfig(2, 2, 128, vocab_size=50, seq_len=16)).to(DEVICE)
    for name, p in decoder.named_parameters():
        if name.endswith('norm.weight'):
            p.data += torch.randn_like(p) / 4
    decoder.activation_checkpointing = checkpointing
    tokens = torch.randint(50, (2, 11), device=DEVICE)
    choose, chosen = fused._choose, []

    def run(impl, dtype):
        monkeypatch.setattr(fused, '_choose', lambda *a: chosen.append(choose(*a[:2], impl, *a[3:])) or chosen[-1])
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = decoder(tokens)
        grads = torch.autograd.grad((logits * logits.detach().roll(1, 2)).sum(), list(decoder.parameters()))
        return [logits.detach(), *grads]

    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        if dtype not in TRITON_DTYPES:
            continue
        ours, plain = run('triton', dtype), run('torch', dtype)
        for y, z in zip(ours, plain):
            assert (y - z).norm() <= tolerance * z.norm()
            assert dtype != torch.float32 or y.dtype == z.dtype
    assert chosen.count('triton') == chosen.count('torch') == 3 * len(TRITON_DTYPES) * 2 * (1 + checkpointing)


def test_auto_takes_no_kernel_that_was_not_measured(monkeypatch, capsys):
    for capability in ((8, 0), (9, 0)):
        policy._say.cache_clear()
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None, c=capability: c)
        assert policy._choose('qk-norm', 'rotary', 'auto', torch.device('cuda', 0), torch.bfloat16, 128) == 'torch'
        assert 'not measured' in capsys.readouterr().out


@needs_triton
def test_self_check_passes_and_catches_a_wrong_kernel(monkeypatch):
    policy._self_check.cache_clear()
    assert policy._self_check('qk-norm', torch.device(DEVICE), DTYPE, 64) == ''
    policy._self_check.cache_clear()
    backward = fused._qk_norm_rotary_backward
    monkeypatch.setattr(fused, '_qk_norm_rotary_backward', lambda *a: (*backward(*a)[:2], 2 * backward(*a)[2]))
    assert 'gradient 3 is off by' in policy._self_check('qk-norm', torch.device(DEVICE), DTYPE, 64)
    policy._self_check.cache_clear()
