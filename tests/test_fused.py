"""
What runs between a block's products against float64 truth, bound by PyTorch's own error in the same dtype; without a
GPU in Triton's interpreter.
"""
import re
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
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


# === residual and norm, SwiGLU ==============================================================================

def norm_out(x, y, gain):
    s = x + y
    d = s - s.mean(-1, keepdim=True)
    return s, gain * d / (d.square().mean(-1, keepdim=True) + EPS).sqrt()


def swiglu_out(packed):
    g, u = packed[..., :packed.shape[-1] // 2], packed[..., packed.shape[-1] // 2:]
    return g / (1 + (-g).exp()) * u,


OPS = {                         # name: (ours, the reference, written out, shapes of the leaves of a width)
    'add-norm': (lambda *a, impl: fused.add_norm(*a, EPS, impl=impl), lambda *a: fused._add_norm_torch(*a, EPS),
                 norm_out, lambda C: [(3, 5, C), (3, 5, C), (C,)]),
    'swiglu': (lambda *a, impl: (fused.swiglu(*a, impl=impl),), lambda *a: (fused._swiglu_torch(*a),), swiglu_out,
               lambda C: [(3, 5, 2 * C)])}


def outputs_and_gradients(run, leaves, upstream):
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = run(*leaves)
    grads = torch.autograd.grad(out, leaves, [u.to(y) for u, y in zip(upstream, out)])
    return [*(y.detach() for y in out), *grads]


def random_leaves(op, C, dtype):
    g = torch.Generator().manual_seed(C)
    shapes = OPS[op][3](C)
    leaves = [(2 * torch.randn(shape, generator=g) + 1).to(DEVICE, dtype) for shape in shapes]
    return leaves, [torch.randn(3, 5, C, generator=g).to(DEVICE, dtype) for _ in range(2)]


@pytest.mark.parametrize('op', OPS)
@pytest.mark.parametrize('impl', IMPLS)
@pytest.mark.parametrize('dtype', TRITON_DTYPES, ids=str)
@pytest.mark.parametrize('C', [64, 200, 1408])            # a power of two, masked, more than a block of SwiGLU
def test_norm_and_swiglu_are_no_worse_than_torch(op, impl, dtype, C):
    run, reference, written, _ = OPS[op]
    leaves, upstream = random_leaves(op, C, dtype)
    ours, torchs = (outputs_and_gradients(f, leaves, upstream) for f in (lambda *a: run(*a, impl=impl), reference))
    truth = outputs_and_gradients(written, [x.double() for x in leaves], upstream)
    for i, values in enumerate(zip(ours, torchs, truth)):
        no_worse(f'{op} {i}', *values, dtype)
    assert {y.dtype for y in ours} == {dtype}


@needs_triton
@pytest.mark.parametrize('op', OPS)
def test_norm_and_swiglu_under_autocast_any_strides_and_twice_the_same(op):
    """A float32 stream and gain beside a 16-bit update, as in a step; expanded gradients, odd views; equal bits."""
    leaves, _ = random_leaves(op, 200, torch.float32)
    if op == 'add-norm':
        leaves[1] = leaves[1].bfloat16()
    else:
        leaves[0] = leaves[0].bfloat16()
    odd = [torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape).transpose(0, -1).contiguous().transpose(0, -1)
           for x in leaves[:-1]] + leaves[-1:]            # neither dense nor aligned; the last is the gain
    results = []
    for impl, given in (('triton', leaves), ('triton', odd), ('torch', leaves)):
        given = [x.detach().requires_grad_() for x in given]
        with torch.autocast(DEVICE, torch.bfloat16):
            out = OPS[op][0](*given, impl=impl)
        results.append([*(y.detach() for y in out), *torch.autograd.grad(sum(y.sum() for y in out), given)])
    for y, same, plain in zip(*results):
        assert torch.equal(y, same) and y.dtype == plain.dtype
        assert (y - plain).float().norm() <= 0.02 * plain.float().norm()     # two roundings of 16 bits


@needs_triton
def test_norms_gain_gradient_adds_up_in_one_order_in_float32(monkeypatch):
    monkeypatch.setattr(fused, 'N_PROGRAM', 4)
    (x, y, gain), upstream = random_leaves('add-norm', 64, torch.float32)
    leaves = [x.bfloat16(), y.bfloat16(), gain]
    upstream = [u.bfloat16() + 1 for u in upstream]
    run = lambda *a: [t.bfloat16() for t in fused._add_norm(*a, EPS, torch.bfloat16)[:2]]    # noqa: E731
    first, second = (outputs_and_gradients(run, leaves, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second)) and first[4].dtype == torch.float32
    truth = outputs_and_gradients(norm_out, [t.double() for t in leaves], upstream)
    # z is kept in 16 bits: 45 terms with errors of random sign
    torch.testing.assert_close(first[4].double(), truth[4], rtol=2 ** -8, atol=0.1)


@pytest.mark.parametrize('impl', IMPLS)
def test_a_frozen_gain_gets_no_gradient_and_an_empty_batch_has_zeros(impl):
    (x, y, gain), _ = random_leaves('add-norm', 64, DTYPE)
    x.requires_grad_()
    for rows in (slice(0, 3), slice(0, 0)):
        s, n = fused.add_norm(x[rows], y[rows], gain, EPS, impl=impl)
        h = fused.swiglu(n, impl=impl)
        x.grad = None
        (s.sum() + h.sum()).backward()
        assert h.shape == (*n.shape[:2], 32) and x.grad.any() == bool(len(s)) and gain.grad is None


@needs_triton
@pytest.mark.parametrize('op', OPS)
def test_opcheck_of_norm_and_swiglu(op):
    leaves, upstream = random_leaves(op, 64, DTYPE)
    wanted = [x.requires_grad_() for x in leaves]
    if op == 'swiglu':
        torch.library.opcheck(fused._swiglu, wanted)
        torch.library.opcheck(fused._swiglu_backward, (upstream[0], leaves[0].detach()))
    else:
        torch.library.opcheck(fused._add_norm, (*wanted, EPS, DTYPE))
        z, rstd = (t.detach() for t in fused._add_norm(*leaves, EPS, DTYPE)[2:])
        torch.library.opcheck(fused._add_norm_backward, (*upstream, z, rstd, leaves[2].detach(), DTYPE, DTYPE))


@pytest.mark.parametrize('impl', IMPLS)
def test_norm_and_swiglu_compile_to_one_graph_and_checkpoint(impl):
    def block(x, y, gain):
        s, n = fused.add_norm(x * 1.0, y, gain, EPS, impl=impl)
        return s.sin() + torch.cat((fused.swiglu(n, impl=impl),) * 2, -1).cos()

    compiled = torch.compile(block, backend='aot_eager', fullgraph=True, dynamic=True)
    for T in (4, 5):
        leaves, upstream = random_leaves('add-norm', 64, DTYPE)
        leaves = [x[:, :T] if x.dim() == 3 else x for x in leaves]
        plain, *others = (outputs_and_gradients(lambda *a, f=f: (f(*a),), leaves, [upstream[0][:, :T]]) for f in (
            block, compiled, lambda *a: checkpoint(block, *a, use_reentrant=False)))
        for other in others:
            for a, b in zip(plain, other):
                torch.testing.assert_close(a, b)


def test_wrong_shapes_of_norm_and_swiglu_are_named():
    x = torch.zeros(2, 3, 8)
    with pytest.raises(ValueError, match=r'y \(2, 8\)'):
        fused.add_norm(x, x[:, 0], torch.ones(8), EPS)
    with pytest.raises(ValueError, match=r'gain \(7,\)'):
        fused.add_norm(x, x, torch.ones(7), EPS)
    with pytest.raises(ValueError, match=r'packed \(2, 3, 7\)'):
        fused.swiglu(x[..., 1:])


class Moved(TorchDispatchMode):
    """Counts the bytes of inputs and outputs of every operation that is no view and no allocation."""
    n_byte = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        if not (f.is_view or f.name().startswith(('aten::empty', 'aten::_unsafe_view', 'aten::detach'))):
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.n_byte += sum(t.numel() * t.element_size() for t in tensors)
        return out


@pytest.mark.parametrize('op', ['qk-norm', *OPS])
def test_what_eager_pytorch_moves_is_what_docs_kernels_md_says(op):
    """In tensors (B, T, width) of 16 bits, forward and backward, under autocast."""
    B, T, C = 2, 64, 2048
    said = Path(__file__).parent.parent.joinpath('docs/kernels.md').read_text()
    said = float(re.search(rf'^\| {op}\b.*?\| (\d+) \|', said, re.M)[1])
    if op == 'qk-norm':
        qkv, q_gain, k_gain, cos, sin, _ = problem(B, T, 16, 128)
        leaves = [qkv.bfloat16(), q_gain, k_gain]
        run = lambda *a: fused._qk_norm_rotary_torch(*a, cos, sin, 16, EPS)                  # noqa: E731
    else:
        leaves = [torch.randn(B, T, C), torch.randn(B, T, C).bfloat16(), torch.ones(C)] if op == 'add-norm' else \
            [torch.randn(B, T, 2 * C).bfloat16()]
        run = OPS[op][1]
    leaves = [x.requires_grad_() for x in leaves]
    with torch.autocast('cpu', torch.bfloat16), Moved() as moved:
        out = run(*leaves)
    upstream = [torch.ones_like(y) for y in out]
    with moved:
        torch.autograd.grad(out, leaves, upstream)
    units = moved.n_byte / (B * T * C * 2)
    assert abs(units - said) < 1, (units, said)           # gains, statistics, cos and sin are small beside it


def test_auto_takes_no_kernel_that_was_not_measured(monkeypatch, capsys):
    for capability in ((8, 0), (9, 0)):
        policy._say.cache_clear()
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None, c=capability: c)
        for what in (('qk-norm', 'rotary'), ('swiglu', 'packed'), ('add-norm', 'residual')):
            assert policy._choose(*what, 'auto', torch.device('cuda', 0), torch.bfloat16, 128) == 'torch'
            assert 'not measured' in capsys.readouterr().out


@needs_triton
def test_self_check_passes_and_catches_a_wrong_kernel(monkeypatch):
    policy._self_check.cache_clear()
    assert policy._self_check('qk-norm', torch.device(DEVICE), DTYPE, 64) == ''
    policy._self_check.cache_clear()
    backward = fused._qk_norm_rotary_backward
    monkeypatch.setattr(fused, '_qk_norm_rotary_backward', lambda *a: (*backward(*a)[:2], 2 * backward(*a)[2]))
    assert 'gradient 3 is off by' in policy._self_check('qk-norm', torch.device(DEVICE), DTYPE, 64)
    for op, name in (('swiglu', '_swiglu_backward'), ('add-norm', '_add_norm_backward')):
        assert policy._self_check(op, torch.device(DEVICE), DTYPE, 192) == ''
        policy._self_check.cache_clear()
        right = getattr(fused, name)
        wrong = lambda *a, f=right: tree_map(lambda t: t.roll(1, -1), f(*a))                 # noqa: E731
        monkeypatch.setattr(fused, name, wrong)
        assert 'gradient 1 is off by' in policy._self_check(op, torch.device(DEVICE), DTYPE, 192)
    policy._self_check.cache_clear()
