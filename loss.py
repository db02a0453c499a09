"""
The masked linear cross-entropy, told as a lesson: the maths, the plain reference, the kernels.

    nll, lse = linear_cross_entropy(x, weight, targets)      # output projection and loss, only at rows that carry loss
"""
import contextlib
import functools
import operator
import os
from typing import Optional, Tuple

import torch
from torch import Tensor

import policy
from policy import _aligned, _choose, _config, _launch_on, triton

if triton is not None:
    import triton.language as tl

IGNORE_INDEX = -100                                       # a target that carries no loss

# logits of the kept rows stay in memory for the backward while they take no more than this and than a quarter of the
# memory that is free (3 matrix products), else they are recomputed (4)
KEEP_LOGITS_BYTES = 8 << 30
CHUNK_BYTES = 128 << 20                                   # workspace for one chunk of logits or of their gradient
CHUNK_COLUMNS = 8192                                      # at least, on a GPU: dx is read and written once a chunk


# === masked linear cross-entropy ============================================================================
#
# For a row i with features x_i (C,), target t_i and the output matrix W (V, C):
#     z_i   = W x_i                        logits, (V,)
#     lse_i = log sum_v exp z_iv
#     nll_i = lse_i - z_{i,t_i}
# and with upstream gradients a_i of nll_i and b_i of lse_i (b comes from a z-loss):
#     dz_iv = (a_i + b_i) p_iv - a_i [v = t_i],    p_iv = exp(z_iv - lse_i),    dx = dz W,    dW = dz^T x
# A confident row has p near 1 at its target, and nll and dz are small differences of large numbers there. So nothing
# subtracts the rounded lse: with top the largest logit,
#     nll = (top - z_t) + log sum_v exp(z_v - top),    p = exp((z - z_t) - nll)
# The result is nll and lse of each row, so token weights, the z-loss and the mean stay plain PyTorch. Rows without loss
# are dropped before the first product: where 29 % of the rows are kept that alone is worth 3.45x, and the gradients of
# the others are 0 because nothing computes them.

# --- reference
# The products go through the rows in chunks, kept or recomputed alike, so both give the same bits: how much memory is
# there decides the time only. What the backward needs is q = p - [v = t], with q_t = expm1(-nll): dz = (a + b) q +
# b [v = t], so a row's factors go into the small sides of the products and no pass over (n, V) numbers is left.
def _chunks(n, V):
    """Slices of at most CHUNK_BYTES of float32 logits; one empty slice for no rows."""
    step = max(1, CHUNK_BYTES // (4 * V))
    return [slice(i, min(i + step, n)) for i in range(0, max(n, 1), step)]


def _softmax_chunk(x, weight, at, z, q):
    """nll, lse (n,) of a chunk and q (n, V), given room for its logits z and for q."""
    _product(x, weight.t(), z)
    top, best = z.max(1)
    torch.softmax(z, 1, out=q)
    log_sum = -q.gather(1, best[:, None])[:, 0].log()                        # of exp(z - top), at least 1
    nll, lse = top - z.gather(1, at)[:, 0] + log_sum, top + log_sum
    q.scatter_(1, at, torch.expm1(-nll)[:, None])
    return nll, lse


def _room(x, n, V):
    return x.new_empty(n, V, dtype=torch.promote_types(x.dtype, torch.float32))


def _product(a, b, out, add=False):
    """a @ b of equal dtypes, accumulated in the float32 (float64) of `out`: written there or added to what is there."""
    if not (a.is_cuda or a.dtype == out.dtype):
        a, b = a.float(), b.float()
    dtype = () if a.dtype == out.dtype else (out.dtype,)
    torch.addmm(out, a, b, *dtype, out=out) if add else torch.mm(a, b, *dtype, out=out)


def _nll_torch(x, weight, targets, keep):
    """nll, lse (n,) of n kept rows; and for the backward q (n, V) if `keep`, else the targets' logits z_t (n,)."""
    V, chunks = len(weight), _chunks(len(x), len(weight))
    at, z = targets.clamp(0, V - 1)[:, None], _room(x, chunks[0].stop, V)
    saved = _room(x, len(x) if keep else chunks[0].stop, V)
    parts = [_softmax_chunk(x[rows], weight, at[rows], z[:rows.stop - rows.start],
                            saved[rows] if keep else saved[:rows.stop - rows.start]) for rows in chunks]
    nll, lse = (torch.cat(part) for part in zip(*parts))
    nll = torch.where(targets == at[:, 0], nll, float('nan'))                # a target out of range must be seen
    return nll, lse, saved if keep else lse - nll


def _nll_torch_backward(a, b, x, weight, targets, nll, saved, keep, need_x, need_w):
    """dx (n, C), dW (V, C) in float32 (float64), None if not needed; `saved` as _nll_torch returned it."""
    V, chunks = len(weight), _chunks(len(x), len(weight))
    at, a = targets.clamp(0, V - 1), torch.where(nll.isnan(), nll, a)        # a broken row's gradient is not finite
    both = (a + b)[:, None]
    z, q = (None, None) if keep else (_room(x, chunks[0].stop, V) for _ in range(2))
    scaled = (both * x).to(x.dtype)
    dx, dw = (_room(x, n, x.shape[1]) if need else None for n, need in ((len(x), need_x), (V, need_w)))
    for rows in chunks:
        n = rows.stop - rows.start
        if not keep:
            _softmax_chunk(x[rows], weight, at[rows, None], z[:n], q[:n])
        part = (saved[rows] if keep else q[:n]).to(x.dtype)
        if need_x:
            _product(part, weight, dx[rows])
        if need_w:
            _product(part.t(), scaled[rows], dw, add=rows.start > 0)
    return (dx.mul_(both).add_(b[:, None] * weight[at]) if need_x else None,
            dw.index_add_(0, at, (b[:, None] * x).to(dw.dtype)) if need_w else None)


# --- kernels
# Two ways, by memory. Recompute: one GEMM-shaped kernel reduces each tile of logits to a maximum and a sum; the
# tiles' results are combined by a second small reduction, so there are no locks and no atomics, and two runs are bit-
# equal. The backward computes the logits of one chunk of the vocabulary again, turns them into 16-bit dz, and leaves
# both products to cuBLAS. Keep: cuBLAS writes 16-bit logits, and only the passes over them are ours. Gradients are
# never filtered by size: at initialisation every probability is 2e-5, and a threshold would drop all of them.
if triton is not None:
    @triton.jit
    def _logits_tile(X, W, tile_row, tile_col, n, n_vocab, width, sx, sw,
                     BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr):
        """One tile (BLOCK_M, BLOCK_V) of x @ weight.T in float32. Rows and columns beyond the end repeat the last one:
        clamping an index costs fewer registers than masking a load, and the caller ignores them."""
        m, v, c = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_C)
        m, v = tl.minimum(m, n - 1 - tile_row * BLOCK_M), tl.minimum(v, n_vocab - 1 - tile_col * BLOCK_V)
        # 64-bit base, 32-bit offsets inside the tile: n * width and n_vocab * width may pass 2^31
        x = X + tl.cast(tile_row, tl.int64) * BLOCK_M * sx + m[:, None] * sx + c[None, :]
        w = W + tl.cast(tile_col, tl.int64) * BLOCK_V * sw + v[:, None] * sw + c[None, :]
        z = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
        for k in range(0, width, BLOCK_C):                # width is a multiple of BLOCK_C
            z = tl.dot(tl.load(x + k), tl.trans(tl.load(w + k)), z, input_precision='ieee')
        return z

    @triton.jit
    def _grouped(pid, n_tile_row, n_tile_col, GROUP: tl.constexpr):
        """Program number -> (row tile, column tile), GROUP row tiles together, so that neighbours share W in L2."""
        first = pid // (GROUP * n_tile_col) * GROUP
        size = tl.minimum(n_tile_row - first, GROUP)
        return first + pid % (GROUP * n_tile_col) % size, pid % (GROUP * n_tile_col) // size

    # n, how many rows are kept, changes from step to step: Triton would compile again where 16 divides it
    @triton.jit(do_not_specialize=['n'])
    def _lse_kernel(X, W, T, TOP, SUM, ZT, n, n_vocab, width, sx, sw,
                    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, GROUP: tl.constexpr):
        """Over this tile's columns, each row's largest logit -> TOP and sum of exp(z - top) -> SUM (column tiles, n);
        the target's logit -> ZT (n,)."""
        tile_row, tile_col = _grouped(tl.program_id(0), tl.cdiv(n, BLOCK_M), tl.cdiv(n_vocab, BLOCK_V), GROUP)
        z = _logits_tile(X, W, tile_row, tile_col, n, n_vocab, width, sx, sw, BLOCK_M, BLOCK_V, BLOCK_C)
        row, col = tile_row * BLOCK_M + tl.arange(0, BLOCK_M), tile_col * BLOCK_V + tl.arange(0, BLOCK_V)
        z = tl.where((col < n_vocab)[None, :], z, float('-inf'))
        top = tl.max(z, 1)
        part = tl.cast(tile_col, tl.int64) * n + row
        tl.store(TOP + part, top, mask=row < n)
        tl.store(SUM + part, tl.sum(tl.exp(z - top[:, None]), 1), mask=row < n)
        t = tl.load(T + row, mask=row < n, other=-1)
        zt = tl.sum(tl.where(t[:, None] == col[None, :], z, 0.0), 1)
        mine = (t >= tile_col * BLOCK_V) & (t < (tile_col + 1) * BLOCK_V) & (t < n_vocab)
        tl.store(ZT + row, zt, mask=mine)                 # one tile owns each target; no tile one out of range

    @triton.jit(do_not_specialize=['n'])
    def _dz_kernel(X, W, T, ZT, NLL, A, B, DZ, n, n_vocab, width, col0, sx, sw, sdz,
                   BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, GROUP: tl.constexpr):
        """dz (n, whole tiles) in 16 bits for a chunk of the n_vocab columns: W holds its rows, from column col0 on."""
        n_tile_row = tl.cdiv(n, BLOCK_M)
        tile_row, tile_col = _grouped(tl.program_id(0), n_tile_row, tl.num_programs(0) // n_tile_row, GROUP)
        z = _logits_tile(X, W, tile_row, tile_col, n, n_vocab - col0, width, sx, sw, BLOCK_M, BLOCK_V, BLOCK_C)
        m, col = tl.arange(0, BLOCK_M), tile_col * BLOCK_V + tl.arange(0, BLOCK_V)
        row = tile_row * BLOCK_M + m
        a, b = tl.load(A + row, mask=row < n, other=0.0), tl.load(B + row, mask=row < n, other=0.0)
        t = tl.load(T + row, mask=row < n, other=-1)
        zt, nll = tl.load(ZT + row, mask=row < n, other=0.0), tl.load(NLL + row, mask=row < n, other=0.0)
        onehot = t[:, None] == (col0 + col)[None, :]
        dz = (a + b)[:, None] * tl.exp(z - zt[:, None] - nll[:, None]) - tl.where(onehot, a[:, None], 0.0)
        to = DZ + tl.cast(tile_row, tl.int64) * BLOCK_M * sdz + m[:, None] * sdz + col[None, :]
        tl.store(to, dz.to(DZ.dtype.element_ty), mask=(row < n)[:, None] & (col0 + col < n_vocab)[None, :])

    @triton.jit
    def _kept_lse_kernel(Z, T, LSE, NLL, n_vocab, sz, BLOCK_V: tl.constexpr):
        """lse and nll of one row of kept logits, in one pass."""
        row = tl.program_id(0).to(tl.int64)
        top, total = -1e30, 0.0
        for v in range(0, n_vocab, BLOCK_V):
            col = v + tl.arange(0, BLOCK_V)
            z = tl.load(Z + row * sz + col, mask=col < n_vocab, other=float('-inf')).to(tl.float32)
            new = tl.maximum(top, tl.max(z, 0))
            total = total * tl.exp(top - new) + tl.sum(tl.exp(z - new), 0)
            top = new
        t = tl.load(T + row)
        zt = tl.load(Z + row * sz + t, mask=(t >= 0) & (t < n_vocab), other=float('nan')).to(tl.float32)
        tl.store(LSE + row, top + tl.log(total))
        tl.store(NLL + row, top - zt + tl.log(total))

    @triton.jit
    def _kept_dz_kernel(Z, T, NLL, A, B, DZ, n_vocab, col0, sz, sdz, BLOCK_V: tl.constexpr):
        """dz of one row in a chunk of the n_vocab columns that starts at col0, from kept logits."""
        row, col = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
        z = tl.load(Z + row * sz + col0 + col, mask=col0 + col < n_vocab, other=float('-inf')).to(tl.float32)
        a, b, t, nll = tl.load(A + row), tl.load(B + row), tl.load(T + row), tl.load(NLL + row)
        zt = tl.load(Z + row * sz + t, mask=(t >= 0) & (t < n_vocab), other=float('inf')).to(tl.float32)
        dz = (a + b) * tl.exp(z - zt - nll) - tl.where(t == col0 + col, a, 0.0)
        tl.store(DZ + row * sdz + col, dz.to(DZ.dtype.element_ty), mask=col0 + col < n_vocab)


def _nll_triton(x, weight, targets, keep):
    """As _nll_torch; keeps the 16-bit logits themselves."""
    n, V = len(x), len(weight)
    nll, lse = (x.new_zeros(n, dtype=torch.float32) for _ in range(2))
    zt = torch.full_like(nll, float('nan'))               # stays nan where a target is out of range
    if keep:
        z = x @ weight.t()                                                   # (n, V)
        if n:
            _kept_lse_kernel[(n,)](z, targets, lse, nll, V, z.stride(0), **_config('kept_lse', x.device))
        return nll, lse, z
    if n:
        config = _config('lse', x.device)
        n_tile = triton.cdiv(V, config['BLOCK_V'])
        top, total = nll.new_empty(n_tile, n), nll.new_empty(n_tile, n)
        _lse_kernel[(triton.cdiv(n, config['BLOCK_M']) * n_tile,)](
            x, weight, targets, top, total, zt, n, V, x.shape[1], x.stride(0), weight.stride(0), **config)
        best = top.amax(0)
        log_total = (total * (top - best).exp()).sum(0).log()
        nll, lse = best - zt + log_total, best + log_total
    return nll, lse, zt


def _nll_triton_backward(a, b, x, weight, targets, nll, saved, keep, need_x, need_w):
    """As _nll_torch_backward."""
    (n, C), V = x.shape, len(weight)
    dx = x.new_zeros(n, C, dtype=torch.float32) if need_x else None
    dw = (weight.new_empty if n else weight.new_zeros)(V, C, dtype=torch.float32) if need_w else None
    config = _config('kept_dz' if keep else 'dz', x.device)
    block = config['BLOCK_V']                             # whole tiles: a store needs no second mask
    step = block * min(triton.cdiv(V, block), triton.cdiv(max(CHUNK_COLUMNS, CHUNK_BYTES // (2 * max(n, 1))), block))
    dz = x.new_empty(n, step)
    for col0 in range(0, V if n else 0, step):
        rows, n_col = weight[col0:col0 + step], min(step, V - col0)
        n_tile = triton.cdiv(n_col, block)
        if keep:
            _kept_dz_kernel[(n, n_tile)](
                saved, targets, nll, a, b, dz, V, col0, saved.stride(0), dz.stride(0), **config)
        else:
            _dz_kernel[(triton.cdiv(n, config['BLOCK_M']) * n_tile,)](
                x, rows, targets, saved, nll, a, b, dz, n, V, C, col0, x.stride(0), rows.stride(0), dz.stride(0),
                **config)
        if need_x:
            _product(dz[:, :n_col], rows, dx, add=True)
        if need_w:
            _product(dz[:, :n_col].t(), x, dw[col0:col0 + step])             # each row of dW is written once
    return dx, dw


# --- operator: one for every implementation; torch.compile sees neither the kernels nor how many rows are kept
def _product_dtype(x, impl):
    """The dtype of the operands of the three products."""
    on_cpu = not impl.startswith('triton') and not x.is_cuda
    return torch.float32 if on_cpu and x.dtype != torch.float64 else x.dtype


def _kept(x, weight, targets, rows, impl):
    """The kept rows: x (n, C) and weight (V, C) in the dtype of the products, targets (n,), rows (n,) or None = all."""
    if rows is None:
        rows = (targets != IGNORE_INDEX).nonzero()[:, 0]  # on a GPU this waits for the device: give rows
    rows = None if len(rows) == len(x) else rows          # each comes once, so these are all, and nothing is gathered
    dtype = _product_dtype(x, impl)
    return (_aligned(_take(x, rows).to(dtype)), _aligned(weight.to(dtype)), _take(targets, rows), rows)


def _take(y, rows):
    return y if rows is None else y.index_select(0, rows)


def _scatter(n, rows, values, dtype):
    """Rows back in their places, zeros elsewhere: (n_kept, ...) -> (n, ...)."""
    if rows is None:
        return values.to(dtype)
    out = torch.zeros((n, *values.shape[1:]), dtype=dtype, device=values.device)
    return out.index_copy_(0, rows, values.to(dtype))


@torch.library.custom_op('ckpt80::linear_nll', mutates_args=())
def _linear_nll(x: Tensor, weight: Tensor, cast: Optional[Tensor], targets: Tensor, rows: Optional[Tensor],
                impl: str) -> Tuple[Tensor, Tensor, Tensor]:
    """cast: weight in the dtype of the products, where that differs and the backward is to find it."""
    if not x.is_cuda or policy.SWITCH == 'debug':
        _check_targets(targets, len(weight))
    with _launch_on(x):
        xk, w, t, rows = _kept(x, weight if cast is None else cast, targets, rows, impl)
        forward = _nll_triton if impl.startswith('triton') else _nll_torch
        nll, lse, saved = forward(xk, w, t, impl.endswith('keep'))
        live = t != IGNORE_INDEX                          # `rows` may name an ignored row
        nll, lse = (_scatter(len(x), rows, torch.where(live, y, 0), y.dtype) for y in (nll, lse))
        if not impl.endswith('keep'):                     # z_t = inf there makes p = 0 in the backward
            saved = _scatter(len(x), rows, torch.where(live, saved, float('inf')), saved.dtype)
    return nll, lse, saved


@_linear_nll.register_fake
def _(x, weight, cast, targets, rows, impl):
    nll = x.new_empty(len(x), dtype=torch.promote_types(x.dtype, torch.float32))
    saved = torch.empty_like(nll)
    if impl.endswith('keep'):
        saved = (x if impl.startswith('triton') else nll).new_empty(len(rows), len(weight))
    return nll, torch.empty_like(nll), saved


@torch.library.custom_op('ckpt80::linear_nll_backward', mutates_args=())
def _linear_nll_backward(g_nll: Tensor, g_lse: Tensor, x: Tensor, weight: Tensor, targets: Tensor,
                         rows: Optional[Tensor], nll: Tensor, saved: Tensor, impl: str, need_x: bool, need_w: bool,
                         dtype: torch.dtype) -> Tuple[Tensor, Tensor]:
    """dx and, in `dtype`, dW; one that is not needed costs no product and is empty."""
    with _launch_on(x):
        xk, w, t, rows = _kept(x, weight, targets, rows, impl)
        a, b = (torch.where(t != IGNORE_INDEX, _take(g, rows), 0) for g in (g_nll, g_lse))
        backward = _nll_triton_backward if impl.startswith('triton') else _nll_torch_backward
        keep = impl.endswith('keep')
        nll, saved = _take(nll, rows), saved if keep else _take(saved, rows)
        dx, dw = backward(a, b, xk, w, t, nll, saved, keep, need_x, need_w)
        return (_scatter(len(x), rows, dx, x.dtype) if need_x else x.new_empty(0),
                dw.to(dtype) if need_w else weight.new_empty(0, dtype=dtype))


@_linear_nll_backward.register_fake
def _(g_nll, g_lse, x, weight, targets, rows, nll, saved, impl, need_x, need_w, dtype):
    return x.new_empty(x.shape if need_x else 0), weight.new_empty(weight.shape if need_w else 0, dtype=dtype)


def _linear_nll_setup(ctx, inputs, output):
    x, weight, cast, targets, rows, ctx.impl = inputs
    ctx.dtype = weight.dtype
    ctx.save_for_backward(x, weight if cast is None else cast, targets, rows, output[0], output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)                      # else a missing gradient of `saved` becomes zeros of its size


def _linear_nll_autograd(ctx, g_nll, g_lse, _):
    nll, need = ctx.saved_tensors[4], ctx.needs_input_grad[:2]
    g_nll, g_lse = (torch.zeros_like(nll) if g is None else g for g in (g_nll, g_lse))
    grads = _linear_nll_backward(g_nll, g_lse, *ctx.saved_tensors, ctx.impl, *need, ctx.dtype)
    return *(g if needed else None for g, needed in zip(grads, need)), None, None, None, None


_linear_nll.register_autograd(_linear_nll_autograd, setup_context=_linear_nll_setup)


def _check_targets(targets, V):
    bad = (targets != IGNORE_INDEX) & ((targets < 0) | (targets >= V))
    if bad.any():
        i = int(bad.nonzero()[0])
        raise ValueError(f'linear_cross_entropy: targets[{i}] = {int(targets[i])}, expected 0..{V - 1} '
                         f'or {IGNORE_INDEX} (no loss)')


@functools.cache
def _free_at_start(device):
    """Bytes of a GPU that are free at the first loss, down to a power of two: there a kept logit is rounded to 16 bits,
    so that a resumed run should decide as the first."""
    return 1 << torch.cuda.mem_get_info(device)[0].bit_length() >> 1


def _free_memory(device):
    """Bytes that are free on a GPU at the first call; or now on this machine or in this container, by the processes
    that torchrun began here: on a CPU the reference keeps or recomputes the same bits."""
    if device.type == 'cuda':
        return _free_at_start(device)
    free = []
    with contextlib.suppress(OSError, ValueError, IndexError):               # not Linux: nothing is known
        with open('/proc/meminfo') as f:
            free.append(1024 * int(f.read().split('MemAvailable:')[1].split()[0]))
    with contextlib.suppress(OSError, ValueError, KeyError):                 # no limit, or not version 2 of cgroups
        limit, used, stat = (open(f'/sys/fs/cgroup/memory.{name}').read() for name in ('max', 'current', 'stat'))
        cached = dict(line.split() for line in stat.splitlines())['inactive_file']        # given back when asked for
        free.append(int(limit) - int(used) + int(cached))
    return max(0, min(free, default=1 << 30)) // int(os.environ.get('LOCAL_WORLD_SIZE', 1))


_free_memory._dynamo_marked_constant = True               # as _choose


def linear_cross_entropy(x, weight, targets, *, rows=None, impl='auto'):
    """
    Negative log-likelihood and log-sum-exp of softmax(x @ weight.T) per row, computed only where a target carries loss.
    x        (N, C) float; float64 is computed in float64 (tests), everything else with float32 accumulation
    weight   (V, C) float, may have another dtype than x (float32 master weights); its gradient comes in its own dtype
    targets  (N,) int, 0..V-1 or IGNORE_INDEX
    rows     (n,) int64 or None: the rows that carry loss, each once; given, a GPU need not wait to learn how many
    impl     'auto', 'torch', 'triton' (recomputes logits in the backward), 'triton-keep' (keeps them)
    returns  nll (N,), lse (N,) float32 in nats, 0 at ignored rows; gradients flow through both to x and weight
    Raises ValueError for shapes that do not fit and, on a CPU or with CKPT80_KERNELS=debug, for a target out of range.
    The loss is then plain PyTorch: (w * (nll + z * lse**2)).sum() / denominator. Dropping rows without loss first is
    torchtune's way; working in chunks is Cut Cross-Entropy's (arXiv 2411.09009), whose filter of small gradients we
    leave out.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or targets.shape != x.shape[:1]:
        raise ValueError(f'linear_cross_entropy: x {tuple(x.shape)}, weight {tuple(weight.shape)}, '
                         f'targets {tuple(targets.shape)}: expected (N, C), (V, C), (N,)')
    if hasattr(weight, 'to_local'):
        raise ValueError('linear_cross_entropy: weight is a sharded DTensor: gather it first (weight.full_tensor())')
    if torch.is_autocast_enabled(x.device.type) and x.dtype == torch.float32:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    targets = targets.long()
    if rows is None and not torch.compiler.is_compiling():
        rows = (targets != IGNORE_INDEX).nonzero()[:, 0]
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    # compiled without `rows`, the size of the logits is not known, and they are recomputed
    n_logit = None if rows is None else rows.shape[0] * weight.shape[0]
    budget = KEEP_LOGITS_BYTES
    if wanted and n_logit is not None and n_logit * 4 > 64 << 20:
        budget = min(budget, _free_memory(x.device) // 4)
    fit = wanted and n_logit is not None and n_logit * (x.element_size() if x.is_cuda else 4) <= budget
    situation = 'logits fit' if fit else 'logits too large' if wanted else 'no gradient'
    impl = _choose('loss', situation, impl, x.device, x.dtype, operator.index(x.shape[1]))
    if impl == 'torch' and wanted and n_logit is not None and n_logit * 4 <= budget:
        impl = 'torch-keep'
    if impl == 'triton-keep' and rows is None:
        impl = 'triton'
    dtype = _product_dtype(x, impl)                       # float32 on a CPU, where nothing of the kind is saved
    cast = weight.detach().to(dtype) if wanted and weight.dtype != dtype and dtype == x.dtype else None
    return _linear_nll(x, weight, cast, targets, rows, impl)[:2]
