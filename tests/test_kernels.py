"""Attention under interval masks against float64 truth."""
import dataclasses
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import kernels
import policy
from kernel_judge import (CAN_TRITON, DEVICE, DTYPE, IMPLS, TRITON_DTYPES, fresh_notices, leaf,  # noqa: F401
                          needs_triton, no_worse)
from kernels import Intervals, attention
pytestmark = pytest.mark.filterwarnings('ignore::RuntimeWarning')   # numpy on log(0) and nan in the interpreter


def mask_cases():
    """name -> (Intervals, Tq, Tk) for 3 rows: odd lengths, shorter than a tile, boundaries inside tiles, empty rows."""
    T = 133
    i = torch.arange(T)
    packed = torch.stack([i // 50, torch.where(i < 70, 0, 1), torch.where(i < 100, 3, -1)])
    slots = torch.stack([(i >= 5) & (i < 45), (i >= 40) & (i < 60) | (i >= 100) & (i < 120), i < 0])
    lo = torch.randint(0, 40, (3, 37), generator=torch.Generator().manual_seed(1)).sort(1).values.int()
    hi = (lo + 9).clamp(max=45)
    hi[1, 5:9] = 0                                        # sees nothing
    j = torch.arange(45)[None, :, None]
    seen = ((j >= lo[:, None]) & (j < hi[:, None])).int()                   # (3, Tk, Tq)
    n = torch.arange(160)
    low, end = torch.where((n >= 33) & (n < 95), 0, 128), torch.full((160,), 160)            # who sees the first tile
    band = [low, end, torch.where(n < 128, 33, 0), torch.where(n < 128, 95, 160)]
    return {
        'a tile that 33 to 94 see': (Intervals(*(y.int().repeat(3, 1) for y in band)), 160, 160),
        'causal': (Intervals.causal(3, T), T, T),
        'causal, short': (Intervals.causal(3, 7), 7, 7),
        'one': (Intervals.causal(3, 1), 1, 1),
        'none': (None, 20, 70),
        'prefix': (Intervals.prefix(torch.tensor([0, 61, 999]), T), T, T),
        'one prefix': (Intervals.prefix(torch.tensor([72, 72, 72]), T), T, T),
        'documents': (Intervals.documents(packed), T, T),
        'documents with prefix': (Intervals.documents(packed, torch.tensor([7, 64, 999])), T, T),
        'prefix 63': (Intervals.prefix(torch.tensor([63, 64, 65]), T), T, T),
        'documents from 63 to 65': (Intervals.documents((torch.arange(256) >= torch.tensor([[65], [64], [63]])).int()),
                                    256, 256),
        'documents of length 1': (Intervals.documents(i.expand(3, T)), T, T),
        'only padding in a row': (Intervals.documents(torch.stack([i * 0, i * 0 - 1, i // 64])), T, T),
        'images': (Intervals.causal(3, T).joined(slots, 20), T, T),
        'images in documents': (Intervals.documents(packed).joined(slots, 20), T, T),
        'sliding, Tq != Tk': (Intervals(lo, hi, *column_intervals(seen)), 37, 45),
    }


def column_intervals(seen):
    """(B, Tk, Tq) of 0/1 -> qlo, qhi of an interval that holds every query that sees the key."""
    Tq = seen.shape[2]
    any_, first, last = seen.any(2), seen.argmax(2), Tq - seen.flip(2).argmax(2)
    return torch.where(any_, first, 0).int(), torch.where(any_, last, 0).int()


def dense(mask, Tk):
    j = torch.arange(Tk)
    return (j >= mask.lo[..., None]) & (j < mask.hi[..., None])             # (B, Tq, Tk)


CASES = mask_cases()
# with empty queries in the middle, the queries that see a key are no interval: only the reference takes such a mask
BY_COLUMNS = [name for name in CASES if name != 'sliding, Tq != Tk']


def to_device(mask):
    if mask is None or DEVICE == 'cpu':
        return mask
    vectors = (None if t is None else t.to(DEVICE) for t in (mask.lo, mask.hi, mask.qlo, mask.qhi))
    return Intervals(*vectors, mask.kind, mask.n_prefix)


def truth_attention(q, k, v, mask, scale=None):
    """softmax(scale q k^T) v, written out, in the dtype given."""
    s = q @ k.mT * (scale or q.shape[-1] ** -0.5)
    if mask is None:
        return torch.softmax(s, -1) @ v
    seen = dense(mask, k.shape[2])[:, None].to(q.device)
    return torch.softmax(s.masked_fill(~seen, torch.finfo(s.dtype).min), -1) * seen @ v


def attention_problem(Tq, Tk, D, H=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(3, H, T, D, generator=g) for T in (Tq, Tk, Tk, Tq)]     # q, k, v, do


def attention_results(run, dtype, q, k, v, do):
    leaves = [leaf(t, dtype) for t in (q, k, v)]
    o = run(*leaves)
    return [o.detach(), *torch.autograd.grad(o, leaves, do.to(DEVICE, dtype))]


@pytest.mark.parametrize('name', BY_COLUMNS)
def test_rows_and_columns_of_a_mask_agree(name):
    mask, Tq, Tk = CASES[name]
    if mask is None:
        mask = Intervals.full(3, Tq, Tk)
    i = torch.arange(Tq)[:, None]
    assert torch.equal(dense(mask, Tk), (i >= mask.qlo[:, None]) & (i < mask.qhi[:, None]))
    assert all(t.dtype == torch.int32 for t in (mask.lo, mask.hi, mask.qlo, mask.qhi))


def test_masks_are_what_they_say():
    T = 9
    i, j = torch.arange(T)[:, None], torch.arange(T)
    assert torch.equal(dense(Intervals.causal(2, T), T)[1], j <= i)
    prefix = Intervals.prefix(torch.tensor([4, 99]), T)
    assert torch.equal(dense(prefix, T)[0], (j <= i) | (j < 4)) and dense(prefix, T)[1].all()
    assert prefix.n_prefix is None
    assert Intervals.prefix(torch.tensor([4, 4]), T).n_prefix == 4
    ids = torch.tensor([[5, 5, 5, 2, 2, 5, 5, -1, -1]])   # an id may come again: a document is a run
    run = torch.tensor([0, 0, 0, 1, 1, 2, 2, -1, -1])
    same = (run[:, None] == run) & (run >= 0)[:, None]
    assert torch.equal(dense(Intervals.documents(ids), T)[0], same & (j <= i))
    both = dense(Intervals.documents(ids, torch.tensor([2])), T)[0]
    start = torch.tensor([0, 0, 0, 3, 3, 5, 5, 7, 7])
    assert torch.equal(both, same & ((j <= i) | (j < start[:, None] + 2)))
    image = torch.tensor([0, 1, 1, 2, 2, 0, 0, 3, 3])     # two side by side
    for mask in (Intervals.causal(2, T), Intervals.documents(torch.tensor([run.tolist()] * 2).abs())):
        seen = dense(mask, T)[0]
        together = dense(mask.joined(image.expand(2, T) > 0, 2), T)
        assert torch.equal(together[1], seen | (image[:, None] == image) & (image > 0))
    cached = Intervals.cached(torch.tensor([[3], [8]]), T)
    assert dense(cached, T)[:, 0].sum(1).tolist() == [4, 9]


def attention_runs():
    """Every mask at head dim 64 in float32; the main ones at head dim 128 and in 16 bits."""
    for name in CASES:
        yield 'torch', torch.float32, 64, name
    for name in BY_COLUMNS:
        for dtype in TRITON_DTYPES[:1]:
            yield 'triton', dtype, 64, name
    for name in ('causal', 'documents with prefix', 'prefix'):
        yield 'torch', torch.bfloat16, 128, name
        yield 'triton', torch.bfloat16, 128, name
    yield 'triton', torch.float16, 64, 'documents'
    yield 'torch-split', torch.float32, 64, 'one prefix'


@pytest.mark.parametrize('impl, dtype, D, name', list(attention_runs()), ids=str)
def test_attention_and_gradients_are_no_worse_than_torch(impl, dtype, D, name):
    if impl == 'triton' and not CAN_TRITON:
        pytest.skip('triton is not installed')
    mask, Tq, Tk = CASES[name]
    mask = to_device(mask)
    problem = [t.to(dtype) for t in attention_problem(Tq, Tk, D)]
    ours = attention_results(lambda q, k, v: attention(q, k, v, mask, impl=impl), dtype, *problem)
    torchs, truth = (attention_results(lambda q, k, v: truth_attention(q, k, v, mask), d, *problem)
                     for d in (dtype, torch.float64))
    for what, *values in zip(('o', 'dq', 'dk', 'dv'), ours, torchs, truth):
        no_worse(what, *values, dtype, floor=4e-6)        # a key alone has gradient 0: rounding of sums of size 10
    assert ours[0].dtype == dtype
    if mask is not None:                                  # a query that sees nothing: exactly 0, value and gradient
        empty = (mask.hi <= mask.lo)[:, None, :, None].expand_as(ours[0])
        assert (ours[0][empty] == 0).all() and (ours[1][empty] == 0).all()


def test_documents_in_torchs_kernel_for_sequences(monkeypatch):
    """varlen_attn needs a GPU; a loop over the documents in its place shows what it is given, padding and all."""
    varlen = pytest.importorskip('torch.nn.attention.varlen')

    def loop(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        assert window_size == (-1, 0) and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        ends = cu_seq_q.tolist()
        assert ends[0] == 0 and ends[-1] == len(q) and cu_seq_k.tolist() == ends
        assert all(0 < stop - start <= min(max_q, max_k) for start, stop in zip(ends, ends[1:]))
        parts = [[y[start:stop].transpose(0, 1) for y in (q, k, v)] for start, stop in zip(ends, ends[1:])]
        out = [F.scaled_dot_product_attention(*p, is_causal=True, scale=scale) for p in parts]
        return torch.cat([o.transpose(0, 1) for o in out])

    inspect.signature(varlen.varlen_attn).bind(*'qkvabmn', scale=1, window_size=(-1, 0))     # of this torch
    ids = torch.stack([torch.arange(40) // 9, torch.where(torch.arange(40) < 21, 3, -1), torch.full((40,), 2)])
    mask = Intervals.documents(ids)
    last = torch.cat((ids[:, 1:] != ids[:, :-1], torch.ones(3, 1, dtype=torch.bool)), 1)
    problem = attention_problem(40, 40, 64, H=2)
    if DEVICE == 'cpu':
        monkeypatch.setattr(varlen, 'varlen_attn', loop)
        mask = dataclasses.replace(mask, ends=kernels._ends(last))
    else:
        mask = Intervals.documents(ids.to(DEVICE))
    ours = attention_results(lambda *p: attention(*p, mask, scale=0.2, impl='torch-varlen'), DTYPE, *problem)
    torchs, truth = (attention_results(lambda *p: truth_attention(*p, mask, 0.2), d, *problem)
                     for d in (DTYPE, torch.float64))
    for what, *values in zip(('o', 'dq', 'dk', 'dv'), ours, torchs, truth):
        no_worse(what, *values, DTYPE, floor=4e-6)
    assert not ours[0][1, :, 21:].any()
    with pytest.raises(ValueError, match='without prefixes'):
        attention(*(t.to(DEVICE, DTYPE) for t in problem[:3]), to_device(Intervals.causal(3, 40)), impl='torch-varlen')


@pytest.mark.parametrize('impl', IMPLS)
def test_attention_with_its_own_scale_heads_and_layouts(impl):
    """q, k and v each laid out in another way, several heads, a scale that is not D ** -0.5."""
    T, D = 70, 64
    mask = to_device(Intervals.documents((torch.arange(T) // 30).expand(3, T)))
    problem = [t.to(DTYPE) for t in attention_problem(T, T, D, H=3)]
    layouts = [lambda t: t, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
               lambda t: F.pad(t, (0, 0, 0, 0, 0, 2))[:, :3]]

    def run(f, dtype):
        lay = lambda *p: f(*(layout(t) for layout, t in zip(layouts, p)))                    # noqa: E731
        return attention_results(lay, dtype, *problem)

    ours = run(lambda *p: attention(*p, mask, scale=0.3, impl=impl), DTYPE)
    torchs, truth = (run(lambda *p: truth_attention(*p, mask, 0.3), d) for d in (DTYPE, torch.float64))
    for what, *values in zip(('o', 'dq', 'dk', 'dv'), ours, torchs, truth):
        no_worse(what, *values, DTYPE, floor=4e-6)


@needs_triton
def test_intervals_may_pass_the_last_key():
    """hi > Tk and lo < 0 mean the ends: nothing beyond them is read."""
    T = 70
    inside = Intervals.full(3, T, T)
    wide = Intervals(inside.lo - 9, inside.hi + 64, inside.qlo - 9, inside.qhi + 64)
    storage = torch.full((3, 4, 1, 80, 64), float('nan'))                   # q, k, v, do with nan behind their rows
    storage[:, :, :, :T] = torch.randn(3, 4, 1, T, 64, generator=torch.Generator().manual_seed(0))
    padded = storage.to(DEVICE, DTYPE)
    results = [[], []]
    for mask, to in ((inside, results[0]), (wide, results[1])):
        leaves = [padded[:, i, :, :T].detach().requires_grad_() for i in range(3)]
        o = attention(*leaves, to_device(mask), impl='triton')
        to += [o.detach(), *torch.autograd.grad(o, leaves, padded[:, 3, :, :T])]
    assert all(y.isfinite().all() and torch.equal(y, z) for y, z in zip(*results))


def test_a_dense_copy_repairs_an_odd_address():
    base = torch.randn(1 + 8 * 64, dtype=torch.float32).to(DTYPE)
    odd = base[1:].view(8, 64)
    assert odd.data_ptr() % 16 and not policy._aligned(odd).data_ptr() % 16
    assert torch.equal(policy._aligned(odd), odd) and policy._aligned(odd.clone()).shape == (8, 64)


@needs_triton
def test_sm_90_configs_give_the_same(monkeypatch):
    """The interpreter takes sm_80's tiles; those of sm_90 are larger than some of these lengths."""
    if DEVICE == 'cuda':
        pytest.skip('a GPU runs its own')
    mask, T, _ = CASES['documents with prefix']
    run, problem = lambda q, k, v: attention(q, k, v, mask, impl='triton'), attention_problem(T, T, 64)
    sm_80 = attention_results(run, DTYPE, *problem)
    monkeypatch.setattr(policy, '_arch', lambda device: 90)
    for y, z in zip(sm_80, attention_results(run, DTYPE, *problem)):
        torch.testing.assert_close(y, z, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize('impl', IMPLS)
def test_attention_takes_views_of_one_projection(impl):
    """q, k, v as views of a packed qkv; an expanded (stride-0) gradient; an unaligned slice."""
    B, T, H, D = 2, 40, 2, 64
    packed = leaf(torch.randn(B, T, 3, H, D), DTYPE)
    mask = to_device(Intervals.documents(torch.arange(B * T).reshape(B, T) // 30))
    views = [packed[:, :, i].transpose(1, 2) for i in range(3)]             # (B, H, T, D)
    o = attention(*views, mask, impl=impl)
    assert o.transpose(1, 2).is_contiguous() or impl == 'torch'             # heads join without a copy
    ours, = torch.autograd.grad(o.sum(), packed)
    other = leaf(packed.detach(), DTYPE)
    views = [other[:, :, i].transpose(1, 2) for i in range(3)]
    theirs, = torch.autograd.grad(truth_attention(*views, mask).sum(), other)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-2 if DTYPE == torch.bfloat16 else 2e-5)
    odd = torch.randn(B, H, T, D + 1, device=DEVICE).to(DTYPE)[..., 1:]
    again = attention(*[odd.contiguous()] * 3, mask, impl=impl)
    torch.testing.assert_close(attention(odd, odd, odd, mask, impl=impl), again)


@pytest.mark.parametrize('impl', IMPLS)
def test_attention_is_deterministic_and_backward_may_run_twice(impl):
    if impl == 'torch' and DEVICE == 'cuda':
        pytest.skip("SDPA's backends do not promise equal bits on a GPU")
    mask, T, _ = CASES['documents with prefix']
    mask, problem = to_device(mask), attention_problem(T, T, 64)
    first, second = (attention_results(lambda q, k, v: attention(q, k, v, mask, impl=impl), DTYPE, *problem)
                     for _ in range(2))
    assert all(torch.equal(y, z) for y, z in zip(first, second))
    leaves = [leaf(t[:, :, :20], DTYPE) for t in problem[:3]]
    o = attention(*leaves, to_device(Intervals.causal(3, 20)), impl=impl).square().sum()
    once = torch.autograd.grad(o, leaves, retain_graph=True)
    assert all(torch.equal(y, z) for y, z in zip(once, torch.autograd.grad(o, leaves)))


@needs_triton
def test_tiles_outside_the_intervals_are_never_touched():
    """nan in another document's tiles would come through 0 * nan if the kernels read them."""
    T = 256
    mask = to_device(Intervals.documents((torch.arange(T) // 128).expand(3, T)))
    q, k, v, do = attention_problem(T, T, 64)
    for t in (q, k, v, do):
        t[:, :, 128:] = float('nan')
    for y in attention_results(lambda q, k, v: attention(q, k, v, mask, impl='triton'), DTYPE, q, k, v, do):
        assert y[:, :, :128].isfinite().all() and y[:, :, 128:].isnan().all()


@needs_triton
def test_attention_offsets_are_64_bit(tmp_path):
    """Tokens 2^24 apart: from position 128 on, an offset counted in 32 bits is negative. q, k, v in one sparse file."""
    T, D, stride = 131, 64, 1 << 24
    if DEVICE == 'cuda':
        storage = torch.empty(T * stride, dtype=torch.float16, device=DEVICE).untyped_storage()
    else:
        storage = torch.UntypedStorage.from_file(str(tmp_path / 'sparse'), True, T * stride * 2)
    empty = [torch.empty(0, dtype=torch.float16, device=DEVICE) for _ in range(3)]
    views = [t.set_(storage, i * D, (1, 1, T, D), (T * stride, D, stride, 1)) for i, t in enumerate(empty)]
    for view in views:
        view.copy_(torch.randn(1, 1, T, D))
    leaves = [v.detach().requires_grad_() for v in views]
    mask, do = to_device(Intervals.causal(1, T)), torch.randn(1, 1, T, D, dtype=torch.float16, device=DEVICE)
    o = attention(*leaves, mask, impl='triton')
    dense_leaves = [leaf(v, torch.float64) for v in views]
    truth = truth_attention(*dense_leaves, mask)
    grads, true_grads = torch.autograd.grad(o, leaves, do), torch.autograd.grad(truth, dense_leaves, do.double())
    for y, z in zip((o, *grads), (truth, *true_grads)):
        torch.testing.assert_close(y.double(), z, rtol=1e-2, atol=1e-2)


def test_a_cache_gives_the_same_as_the_whole_row():
    q, k, v, _ = attention_problem(12, 12, 32)
    whole = attention(q, k, v, Intervals.causal(3, 12))
    position = torch.tensor([[9, 10], [3, 4], [0, 1]])
    padded = [F.pad(t, (0, 0, 0, 4), value=7.0) for t in (k, v)]            # slots that are not filled yet
    rows = torch.stack([q[b, :, position[b]] for b in range(3)])
    o = attention(rows, *padded, Intervals.cached(position, 16))
    torch.testing.assert_close(o, torch.stack([whole[b, :, position[b]] for b in range(3)]))


def test_wrong_shapes_are_named():
    q = torch.zeros(2, 2, 5, 8)
    with pytest.raises(ValueError, match=r'k \(2, 2, 4, 8\)'):
        attention(q, q[:, :, 1:], q)
    with pytest.raises(ValueError, match=r'\(2, 6\)'):
        attention(q, q, q, Intervals.causal(2, 6))


@needs_triton
@pytest.mark.parametrize('i', range(2))
def test_opcheck(i):
    """Schema, fake, autograd and AOT dispatch."""
    q, k, v, do = attention_problem(9, 9, 64)
    mask = to_device(Intervals.causal(3, 9))
    qkv = [leaf(t, DTYPE) for t in (q, k, v)]
    if i == 0:
        torch.library.opcheck(kernels._interval_attention, (*qkv, mask.lo, mask.hi, mask.qlo, mask.qhi, 0.125))
    else:
        o, lse = kernels._interval_attention(*qkv, mask.lo, mask.hi, mask.qlo, mask.qhi, 0.125)
        torch.library.opcheck(kernels._interval_attention_backward, (
            do.to(DEVICE, DTYPE), *(t.detach() for t in (*qkv, o, lse)), mask.lo, mask.hi, mask.qlo, mask.qhi, 0.125))


@pytest.mark.parametrize('impl', IMPLS)
def test_attention_compiles_once_for_all_masks_and_checkpoints(impl):
    def block(q, k, v, mask):
        return attention(q * 1.0, k, v, mask, impl=impl).sin()

    n_compile = [0]

    def backend(graph, inputs):
        n_compile[0] += 1
        return graph

    compiled = torch.compile(block, backend=backend, fullgraph=True)
    segments = torch.arange(30).expand(2, 30)
    masks = [to_device(Intervals.documents(*a)) for a in ((segments // 9,), (segments // 20, torch.tensor([3, 5])))]
    q, k, v = (torch.randn(2, 1, 30, 64).to(DEVICE, DTYPE) for _ in range(3))
    for mask in masks:
        results = []
        for f in (block, compiled, lambda *a: checkpoint(block, *a, use_reentrant=False)):
            leaves = [leaf(t, DTYPE) for t in (q, k, v)]
            o = f(*leaves, mask)
            results.append([o.detach(), *torch.autograd.grad(o.sum(), leaves)])
        for other in results[1:]:
            for y, z in zip(results[0], other):
                torch.testing.assert_close(y, z)
    assert n_compile[0] == 1


def test_two_dense_calls_give_the_same_compiled():
    mask = Intervals.prefix(torch.tensor([9, 9]), 30, DEVICE)
    q, k, v = (torch.randn(2, 1, 30, 64).to(DEVICE, DTYPE) for _ in range(3))
    run = lambda *x: attention(*x, mask, impl='torch-split').sin()                           # noqa: E731
    compiled = torch.compile(run, backend='aot_eager')                       # not one graph: torch's CausalBias is none
    torch.testing.assert_close(compiled(q, k, v), run(q, k, v))


@pytest.mark.parametrize('impl', IMPLS)
def test_attention_under_autocast(impl):
    q, k, v = (leaf(torch.randn(2, 1, 30, 64), torch.float32) for _ in range(3))
    with torch.autocast(DEVICE, torch.bfloat16):
        o = attention(q, k, v, to_device(Intervals.documents(torch.arange(30).expand(2, 30) // 9)), impl=impl)
    o.sum().backward()
    assert (o.dtype, q.grad.dtype) == (torch.bfloat16, torch.float32)


def test_a_mask_without_columns_runs_the_reference(capsys):
    mask, Tq, Tk = CASES['sliding, Tq != Tk']
    q, k, v, do = attention_problem(Tq, Tk, 64)
    q.requires_grad_()
    no_columns = Intervals(mask.lo, mask.hi)
    o = attention(q, k, v, no_columns, impl='triton')
    torch.testing.assert_close(o, truth_attention(q, k, v, mask), atol=1e-5, rtol=1e-5)
    assert 'no qlo' in capsys.readouterr().out
