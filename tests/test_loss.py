"""The masked linear cross-entropy against float64 truth; numbers follow the complaint list of public trackers."""
import os
import socket

import pytest
import torch
import torch.nn.functional as F

import loss
import policy
from kernel_judge import (CAN_TRITON, DEVICE, DTYPE, IMPLS, child, fresh_notices, leaf, needs_triton,  # noqa: F401
                          no_worse)
from loss import IGNORE_INDEX, linear_cross_entropy

LOSS_IMPLS = [*IMPLS, pytest.param('triton-keep', marks=needs_triton)]
pytestmark = pytest.mark.filterwarnings('ignore::RuntimeWarning')   # numpy on log(0) and nan in the interpreter


def loss_problem(n, V, C, kept=0.7, logits='random', seed=0):
    """x (n, C), weight (V, C), targets (n,), upstream gradients of nll and lse (n,)."""
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(n, C, generator=g), torch.randn(V, C, generator=g)
    targets = torch.randint(V, (n,), generator=g)
    targets[0] = V - 1                                    # the last column, inside a partial tile
    x *= {'random': 1.5, 'flat': 0.02, 'confident': 1.0}[logits] * C ** -0.5
    if logits == 'confident':
        x = x + 20 * F.normalize(weight[targets], dim=1) * C ** -0.5        # p(target) near 1: the cancellation case
    targets[torch.rand(n, generator=g) >= kept] = IGNORE_INDEX
    targets[0] = V - 1
    return x, weight, targets, torch.rand(n, generator=g), torch.rand(n, generator=g) - 0.5


def loss_results(run, dtype, x, weight, targets, a, b):
    """[nll, lse, dx, dweight] of a loss whose upstream gradients are a and b."""
    leaves = [leaf(x, dtype), leaf(weight, dtype)]
    nll, lse = run(*leaves, targets.to(DEVICE))
    grads = torch.autograd.grad((nll * a.to(DEVICE) + lse * b.to(DEVICE)).sum(), leaves)
    return [y.detach() for y in (nll, lse)] + list(grads)


def eager_loss(x, weight, targets):
    """What one writes without this file: full logits, float32 loss."""
    z = (x @ weight.T).to(torch.promote_types(x.dtype, torch.float32))
    keep = targets != IGNORE_INDEX
    return F.cross_entropy(z, targets, reduction='none'), torch.where(keep, torch.logsumexp(z, 1), 0)


def small_chunks(monkeypatch, n_byte):
    """Several chunks of rows in the reference, of 128 columns in the kernels."""
    monkeypatch.setattr(loss, 'CHUNK_BYTES', n_byte)
    monkeypatch.setattr(loss, 'CHUNK_COLUMNS', 128)
    for arch in (80, 90):
        monkeypatch.setitem(policy.CONFIG, ('kept_dz', arch, 0), (128, 4, 1))


@pytest.mark.parametrize('impl', LOSS_IMPLS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('kept, logits', [(1.0, 'confident'), (0.29, 'random'), (0.01, 'random'), (0.7, 'flat')])
def test_loss_and_gradients_are_no_worse_than_torch(impl, dtype, kept, logits, monkeypatch):
    if impl != 'torch' and dtype == torch.float32 and DEVICE == 'cuda':
        pytest.skip('the kernels are for 16 bits')
    if dtype == torch.float16 and (kept, logits) != (0.29, 'random'):
        pytest.skip('float16 differs from bfloat16 by a cast only: one case')
    n = 131 if impl != 'triton-keep' or kept < 0.5 else 61                  # the interpreter runs a program per row
    problem = loss_problem(n, 397, 64, kept, logits)
    small_chunks(monkeypatch, 2 * 40 * 130)               # several, the last one partial
    monkeypatch.setattr(loss, 'KEEP_LOGITS_BYTES', 0)
    problem = [t.to(dtype) for t in problem[:2]] + [*problem[2:]]           # the truth starts from rounded inputs, too
    ours = loss_results(lambda *p: linear_cross_entropy(*p, impl=impl), dtype, *problem)
    torchs, truth = (loss_results(eager_loss, d, *problem) for d in (dtype, torch.float64))
    for name, *values in zip(('nll', 'lse', 'dx', 'dweight'), ours, torchs, truth):
        no_worse(name, *values, dtype)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    ignored = problem[2] == IGNORE_INDEX
    for y in ours[:3]:                                    # zero at ignored rows, exactly: value and gradient
        assert (y[ignored.to(DEVICE)] == 0).all()


@pytest.mark.parametrize('impl', LOSS_IMPLS)
@pytest.mark.parametrize('n', [40, 0])
def test_nothing_kept_gives_zero_loss_and_zero_gradients(impl, n):
    x, weight = leaf(torch.randn(n, 64), DTYPE), leaf(torch.randn(99, 64), DTYPE)
    targets = torch.full((n,), IGNORE_INDEX, device=DEVICE)
    nll, lse = linear_cross_entropy(x, weight, targets, impl=impl)
    (nll + lse ** 2).sum().backward()
    for y in (nll, lse, x.grad, weight.grad):             # zeros, never None: a rank without loss must still all-reduce
        assert y is not None and not y.detach().abs().sum().item()


@pytest.mark.parametrize('impl', LOSS_IMPLS)
def test_loss_rows_may_come_from_the_loader(impl):
    x, weight, targets, a, b = loss_problem(50, 130, 64)
    targets = targets.to(DEVICE)
    kept = (targets != IGNORE_INDEX).nonzero()[:, 0]
    plain = loss_results(lambda *p: linear_cross_entropy(*p, impl=impl), DTYPE, x, weight, targets, a, b)
    everything = torch.arange(50, device=DEVICE)          # names ignored rows, too: they still count 0
    for rows in (kept, kept.flip(0), everything):
        given = loss_results(lambda *p: linear_cross_entropy(*p, rows=rows, impl=impl), DTYPE, x, weight, targets, a, b)
        for y, z in zip(plain, given):
            torch.testing.assert_close(y, z, rtol=2e-5, atol=1e-5)
            assert (z[:50][targets == IGNORE_INDEX] == 0).all() or z is given[3]
    short = loss_results(lambda x, w, t: linear_cross_entropy(x, w, t.int(), impl=impl), DTYPE,
                         x, weight, targets, a, b)
    assert all(torch.equal(y, z) for y, z in zip(plain, short))             # int32 targets


@pytest.mark.parametrize('impl', LOSS_IMPLS)
def test_a_named_row_without_a_target_counts_nothing_however_large(impl):
    """Logits of 1e4: exp(z - z_t) overflows unless the kernels know that the row has no target."""
    x, weight, targets, a, b = loss_problem(12, 130, 64)
    targets[5] = IGNORE_INDEX
    x[5] = 1e4 * weight[77] / weight[77].square().sum()
    every = torch.arange(12, device=DEVICE)
    *values, dx, dw = loss_results(lambda *p: linear_cross_entropy(*p, rows=every, impl=impl), DTYPE,
                                   x, weight, targets, a, b)
    others = torch.where(torch.arange(12) != 5, targets, IGNORE_INDEX)
    truth = loss_results(eager_loss, torch.float64, x.to(DTYPE), weight.to(DTYPE), others, a, b)
    assert not any(y[5].any() for y in (*values, dx)) and dw.isfinite().all()
    torch.testing.assert_close(dw.double(), truth[3], rtol=0, atol=2e-2 if DTYPE == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize('impl', LOSS_IMPLS)
@pytest.mark.parametrize('bad', [-1, 130, 131, 1 << 40])
def test_a_target_out_of_range_on_a_gpu_makes_the_step_not_finite(impl, bad, monkeypatch):
    """A GPU is not waited for to check targets; nll and both gradients are then nan, and the optimizer skips."""
    monkeypatch.setattr(loss, '_check_targets', lambda *args: None)
    x, weight, targets, a, b = loss_problem(12, 130, 64, kept=1.0)
    targets[5] = bad
    x[6] = 50                                             # what a read beyond the row's end would find
    nll, lse, dx, dw = loss_results(lambda *p: linear_cross_entropy(*p, impl=impl), DTYPE, x, weight, targets, a, b)
    for y in (nll, dx.sum(1)):
        assert y.isnan().nonzero().flatten().tolist() == [5]
    assert lse.isfinite().all() and not dw.norm().isfinite()


@pytest.mark.parametrize('impl', LOSS_IMPLS)
def test_what_needs_no_gradient_costs_no_product(impl, monkeypatch):
    x, weight, targets, a, b = loss_problem(40, 200, 64)
    run = lambda *p: linear_cross_entropy(*p, impl=impl)                                     # noqa: E731
    *_, dx, dw = loss_results(run, DTYPE, x, weight, targets, a, b)
    shapes, plain = [], loss._product
    monkeypatch.setattr(loss, '_product', lambda p, q, *a, **k: shapes.append((len(p), q.shape[1])) or
                        plain(p, q, *a, **k))
    for frozen, grad in (('weight', dx), ('x', dw)):
        leaves = [leaf(x, DTYPE), leaf(weight, DTYPE)]
        leaves[frozen == 'weight'].requires_grad_(False)
        wanted = leaves[frozen == 'x']
        nll, lse = run(*leaves, targets.to(DEVICE))
        shapes.clear()
        (nll * a.to(DEVICE) + lse * b.to(DEVICE)).sum().backward()
        assert torch.equal(wanted.grad, grad) and leaves[frozen == 'weight'].grad is None
        other = (200, 64) if frozen == 'weight' else (int((targets != IGNORE_INDEX).sum()), 64)
        assert shapes and other not in shapes, shapes


def test_without_gradients_the_logits_are_not_rounded_and_not_kept(monkeypatch):
    asked = []
    choose = loss._choose
    monkeypatch.setattr(loss, '_choose', lambda *args: asked.append(args[1]) or choose(*args))
    x, weight, targets, _, _ = loss_problem(40, 200, 64)
    x, weight, targets = x.to(DEVICE, DTYPE).requires_grad_(), weight.to(DEVICE, DTYPE), targets.to(DEVICE)
    linear_cross_entropy(x, weight, targets)
    with torch.no_grad():
        linear_cross_entropy(x, weight, targets)
    linear_cross_entropy(x.detach(), weight, targets)
    assert asked == ['logits fit', 'no gradient', 'no gradient']
    assert all('keep' not in impl for impl in policy.POLICY['loss, no gradient'][0].values())


@pytest.mark.parametrize('impl', LOSS_IMPLS)
def test_a_master_weight_is_cast_once_and_no_row_is_gathered(impl, monkeypatch):
    """The operators get the 16-bit weight from outside, both times the same; with all rows kept, they gather none."""
    seen, plain = [], loss._kept

    def kept(x, weight, targets, rows, impl):
        out = plain(x, weight, targets, rows, impl)
        seen.append((weight.dtype, weight.data_ptr(), out[3] is None))
        return out

    monkeypatch.setattr(loss, '_kept', kept)
    x, weight, targets, _, _ = loss_problem(40, 200, 64, kept=1.0)
    x, weight, targets = leaf(x, torch.bfloat16), leaf(weight, torch.float32), targets.to(DEVICE)
    dtype = torch.float32 if impl == 'torch' and DEVICE == 'cpu' else torch.bfloat16         # which needs no cast
    results = []
    for rows in (None, torch.arange(40, device=DEVICE), torch.arange(39, device=DEVICE)):
        seen.clear()
        nll, _ = linear_cross_entropy(x, weight, targets, rows=rows, impl=impl)
        grads = torch.autograd.grad(nll.sum(), [x, weight])
        assert len(seen) == 2 and seen[0] == seen[1] and seen[0][::2] == (dtype, len(results) < 2), seen
        results.append([nll.detach(), *grads])
    assert all(torch.equal(y, z) for y, z in zip(*results[:2])) and results[0][2].dtype == torch.float32


@pytest.mark.parametrize('impl', LOSS_IMPLS)
def test_loss_accepts_any_strides(impl):
    x, weight, targets, _, _ = loss_problem(50, 130, 64)
    targets = targets.to(DEVICE)
    wide, tall = leaf(torch.randn(50, 67), DTYPE), leaf(torch.randn(64, 131), DTYPE)
    views = [wide[:, 3:], tall.T[1:]]                     # unaligned, transposed
    dense = [leaf(v, DTYPE) for v in views]
    grads = []
    for x, weight in (views, dense):
        nll, lse = linear_cross_entropy(x, weight, targets, impl=impl)
        # sum() hands down a stride-0 gradient, and none for lse
        grads.append(torch.autograd.grad(nll.sum(), [wide, tall] if x is views[0] else dense))
    torch.testing.assert_close(grads[0][0][:, 3:], grads[1][0])
    torch.testing.assert_close(grads[0][1].T[1:], grads[1][1])


@pytest.mark.parametrize('impl', LOSS_IMPLS)
def test_weight_gradient_adds_up_in_float32(impl, monkeypatch):
    """Thousands of rows, chunk after chunk, into few columns: a 16-bit sum would stall. Master weights are float32."""
    n = 3000 if impl != 'triton-keep' else 150            # the interpreter runs a program per row
    x, weight, targets, a, b = loss_problem(n, 48, 64, kept=1.0)
    x = x + 1                                             # so that the terms do not cancel
    small_chunks(monkeypatch, 4 * 48 * 100)
    monkeypatch.setattr(loss, 'KEEP_LOGITS_BYTES', 0)
    x16, w = leaf(x, torch.bfloat16), leaf(weight, torch.float32)
    nll, _ = linear_cross_entropy(x16, w, targets.to(DEVICE), impl=impl)
    nll.sum().backward()
    assert (x16.grad.dtype, w.grad.dtype) == (torch.bfloat16, torch.float32)
    used = w if impl == 'torch' and DEVICE == 'cpu' else w.bfloat16()       # the products run in x's dtype
    xd, wd = leaf(x16, torch.float64), leaf(used, torch.float64)
    eager_loss(xd, wd, targets.to(DEVICE))[0].sum().backward()
    # one rounding of dz to 16 bits per term, errors of random sign: far below eps times the largest entry
    assert (w.grad - wd.grad).abs().max() <= 2 ** -9 * wd.grad.abs().max()


@pytest.mark.parametrize('impl', LOSS_IMPLS)
def test_loss_is_deterministic_and_backward_may_run_twice(impl):
    problem = loss_problem(60, 260, 64)
    first, second = (loss_results(lambda *p: linear_cross_entropy(*p, impl=impl), DTYPE, *problem) for _ in range(2))
    assert all(torch.equal(y, z) for y, z in zip(first, second))
    leaves = [leaf(problem[0], DTYPE), leaf(problem[1], DTYPE)]
    total = linear_cross_entropy(*leaves, problem[2].to(DEVICE), impl=impl)[0].sum()
    once = torch.autograd.grad(total, leaves, retain_graph=True)
    assert all(torch.equal(y, z) for y, z in zip(once, torch.autograd.grad(total, leaves)))
    total = linear_cross_entropy(*leaves, problem[2].to(DEVICE), impl=impl)[0].sum()
    grad = torch.autograd.grad(total, leaves, create_graph=True)
    with pytest.raises(RuntimeError):                     # no second derivative, and it says so
        grad[0].sum().backward()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_free_memory_changes_no_bit(dtype, monkeypatch):
    """A run and its resume may find different memory free: kept and recomputed logits give the same numbers."""
    monkeypatch.setattr(loss, 'CHUNK_BYTES', 4 * 70_000 * 100)
    *problem, a, b = loss_problem(260, 70_000, 64, kept=1.0)  # three chunks, the last one partial; 73 MB of logits
    results, kinds = [], []
    choose = loss._linear_nll
    monkeypatch.setattr(loss, '_linear_nll', lambda *args: kinds.append(args[-1]) or choose(*args))
    for free in (1 << 40, 0):
        monkeypatch.setattr(loss, '_free_memory', lambda device, free=free: free)
        results.append(loss_results(lambda *p: linear_cross_entropy(*p, impl='torch'), dtype, *problem, a, b))
    if DEVICE == 'cpu':
        assert kinds == ['torch-keep', 'torch']
    for name, kept, recomputed in zip(('nll', 'lse', 'dx', 'dweight'), *results):
        assert torch.equal(kept, recomputed), name


def test_free_memory_is_what_the_system_says():
    share = loss._free_memory(torch.device('cpu'))
    assert 0 <= share <= os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


def test_a_gpus_free_memory_is_asked_once_and_rounded_down(monkeypatch):
    """What a run and its resume find differs by little, so that both keep or both recompute."""
    loss._free_at_start.cache_clear()
    for free in ((37 << 30) + 5, 1 << 20):
        monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device, free=free: (free, 80 << 30))
        assert loss._free_memory(torch.device('cuda', 0)) == 32 << 30
    loss._free_at_start.cache_clear()


@pytest.mark.parametrize('impl', LOSS_IMPLS)
def test_tied_weight_and_nan_rows(impl):
    x, weight, targets, _, _ = loss_problem(30, 70, 64, kept=1.0)
    w = leaf(weight, DTYPE)
    tokens = torch.arange(30, device=DEVICE)
    linear_cross_entropy(w[tokens], w, targets.to(DEVICE), impl=impl)[0].sum().backward()
    wd = leaf(w.detach(), torch.float64)
    eager_loss(wd[tokens], wd, targets.to(DEVICE))[0].sum().backward()
    torch.testing.assert_close(w.grad.double(), wd.grad, rtol=0, atol=(0.05 if DTYPE == torch.bfloat16 else 1e-4))
    x[7] = float('nan')                                   # a broken sample must be seen, and only where it is
    nll, _ = linear_cross_entropy(x.to(DEVICE, DTYPE), w.detach(), targets.to(DEVICE), impl=impl)
    assert nll.isnan().nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize('bad', [97, -1, -101])
def test_a_target_out_of_range_is_named(bad, monkeypatch):
    monkeypatch.setattr(policy, 'SWITCH', 'debug')
    x, weight, targets, _, _ = loss_problem(30, 97, 64)
    targets[11] = bad
    with pytest.raises(ValueError, match=rf'targets\[11\] = {bad}, expected 0\.\.96 or -100'):
        linear_cross_entropy(x.to(DEVICE), weight.to(DEVICE), targets.to(DEVICE))


def test_wrong_shapes_and_sharded_weights_are_named():
    x, weight, targets, _, _ = loss_problem(30, 97, 64)
    with pytest.raises(ValueError, match=r'x \(30, 64\), weight \(97, 63\)'):
        linear_cross_entropy(x, weight[:, 1:], targets)
    with pytest.raises(ValueError, match=r'targets \(29,\)'):
        linear_cross_entropy(x, weight, targets[1:])
    weight.to_local = lambda: weight                      # what tells a DTensor
    with pytest.raises(ValueError, match='full_tensor'):
        linear_cross_entropy(x, weight, targets)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize('impl', LOSS_IMPLS)
def test_loss_under_autocast(impl, dtype):
    x, weight, targets, _, _ = loss_problem(40, 70, 64)
    x, weight, targets = leaf(x, dtype), leaf(weight, torch.float32), targets.to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        nll, lse = linear_cross_entropy(x, weight, targets, impl=impl)
        (nll + lse).sum().backward()
    assert (nll.dtype, x.grad.dtype, weight.grad.dtype) == (torch.float32, dtype, torch.float32)
    if impl != 'triton-keep':                             # its logits are 16-bit; elsewhere the operands alone
        used = weight if impl == 'torch' and DEVICE == 'cpu' else weight.bfloat16()
        truth = eager_loss(x.detach().bfloat16().double(), used.detach().double(), targets)[0]
        torch.testing.assert_close(nll.detach().double(), truth, rtol=1e-5, atol=1e-5)


@needs_triton
def test_loss_offsets_are_64_bit(tmp_path):
    """Rows 2^24 apart: from row 128 on, an offset counted in 32 bits is negative."""
    n, V, C, stride = 135, 5, 64, 1 << 24
    if DEVICE == 'cuda':
        storage = torch.empty(n * stride, dtype=torch.float16, device=DEVICE).untyped_storage()
    else:                                                 # a sparse file: 4.5 GB of addresses, 1 MB of pages
        storage = torch.UntypedStorage.from_file(str(tmp_path / 'sparse'), True, n * stride * 2)
    x = torch.empty(0, dtype=torch.float16, device=DEVICE).set_(storage, 0, (n, C), (stride, 1))
    weight, targets = torch.randn(V, C).to(DEVICE, torch.float16), torch.randint(V, (n,), device=DEVICE)
    x.copy_(torch.randn(n, C) / 8)
    nll, _, _ = loss._nll_triton(x, weight, targets, False)
    torch.testing.assert_close(nll.double(), eager_loss(x.double(), weight.double(), targets)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('impl, named', [('torch-keep', True), ('torch', False), ('triton-keep', True),
                                         ('triton', True)])
def test_opcheck(impl, named):
    """Schema, fake, autograd and AOT dispatch."""
    if 'triton' in impl and not CAN_TRITON:
        pytest.skip('triton is not installed')
    x, weight, targets, _, _ = loss_problem(20, 70, 64)
    rows = (targets != IGNORE_INDEX).nonzero()[:, 0].to(DEVICE) if named else None
    torch.library.opcheck(loss._linear_nll, (leaf(x, DTYPE), leaf(weight, DTYPE), None, targets.to(DEVICE), rows, impl))


@needs_triton
def test_sm_90_configs_give_the_same(monkeypatch):
    """The interpreter takes sm_80's tiles; those of sm_90 are larger than some of these lengths."""
    if DEVICE == 'cuda':
        pytest.skip('a GPU runs its own')
    run, problem = lambda *p: linear_cross_entropy(*p, impl='triton'), loss_problem(70, 300, 64)
    sm_80 = loss_results(run, DTYPE, *problem)
    monkeypatch.setattr(policy, '_arch', lambda device: 90)
    for y, z in zip(sm_80, loss_results(run, DTYPE, *problem)):
        torch.testing.assert_close(y, z, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize('impl', LOSS_IMPLS)
@pytest.mark.parametrize('with_rows', [True, False])
def test_loss_compiles_to_one_graph(impl, with_rows):
    def run(x, weight, targets, rows):
        nll, lse = linear_cross_entropy(x * 2, weight, targets, rows=rows, impl=impl)
        return (nll + 1e-2 * lse ** 2).sum()

    compiled = torch.compile(run, backend='aot_eager', fullgraph=True, dynamic=True)
    for seed in (1, 2):                                   # another number of kept rows
        x, weight, targets, _, _ = loss_problem(20, 70, 64, seed=seed)
        targets = targets.to(DEVICE)
        rows = (targets != IGNORE_INDEX).nonzero()[:, 0] if with_rows else None
        grads = []
        for f in (run, compiled):
            leaves = [leaf(x, DTYPE), leaf(weight, DTYPE)]
            grads.append([f(*leaves, targets, rows), *torch.autograd.grad(f(*leaves, targets, rows), leaves)])
        for y, z in zip(*grads):
            torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-4)


DDP_CHILD = '''
import torch, torch.distributed as dist, sys
import kernels
torch.set_num_threads(1)
class Head(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.output = torch.nn.Linear(8, 64), torch.nn.Linear(64, 50, bias=False)
    def forward(self, x, targets):
        return kernels.linear_cross_entropy(self.trunk(x), self.output.weight, targets)[0].sum()
def work(rank, port):
    dist.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
    torch.manual_seed(1)
    x, targets = torch.randn(12, 8), torch.randint(50, (12,))
    targets[6:] = -100                                   # rank 1 keeps nothing
    model = torch.nn.parallel.DistributedDataParallel(Head())
    mine = slice(6 * rank, 6 * rank + 6)
    kept = torch.tensor(float((targets[mine] != -100).sum()))
    dist.all_reduce(kept)                                # one denominator for all ranks
    (model(x[mine], targets[mine]) * 2 / kept).backward()
    alone = Head()
    (alone(x, targets) / 6).backward()
    for a, b in zip(model.parameters(), alone.parameters()):
        torch.testing.assert_close(a.grad, b.grad)
    print(f'ok{rank} ', end='', flush=True)
if __name__ == '__main__':
    torch.multiprocessing.start_processes(work, (int(sys.argv[1]),), nprocs=2, start_method='fork')
'''


def test_ddp_with_a_rank_that_keeps_nothing():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    assert sorted(child(DDP_CHILD, str(port)).split()) == ['ok0', 'ok1']


def test_auto_is_the_reference_and_silent_on_a_cpu(capsys):
    x, weight, targets, _, _ = loss_problem(9, 30, 64)
    auto, plain = (linear_cross_entropy(x, weight, targets, impl=impl) for impl in ('auto', 'torch'))
    assert all(torch.equal(y, z) for y, z in zip(auto, plain))
    assert capsys.readouterr().out == ''
