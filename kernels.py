"""
The two operations that decide the cost of a step, each told as a lesson: the maths, the plain reference, the kernel.
(A third, QK-norm with rotary: fused.py.)

    nll, lse = linear_cross_entropy(x, weight, targets)      # output projection and loss, only at rows that carry loss
    o = attention(q, k, v, Intervals.causal(B, T, device))   # softmax attention under an interval mask

`impl='auto'` picks by the tables below and prints one line per situation on a GPU. CKPT80_KERNELS=off runs the
references everywhere; CKPT80_KERNELS=debug checks targets on the GPU, too. Importing needs neither triton nor a GPU.
"""
import contextlib
import functools
import operator
import os
from dataclasses import dataclass
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:                                       # the references need torch only
    triton = None

# large CPU tensors in pages of 2 MiB, where the system gives them on request: their first touch is 3 times faster
os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')

IGNORE_INDEX = -100                                       # a target that carries no loss
SWITCH = os.environ.get('CKPT80_KERNELS', '')             # '', 'off' or 'debug'
INTERPRET = os.environ.get('TRITON_INTERPRET') == '1'     # tests: the kernels run on the CPU, in Triton's interpreter
if triton is not None and not INTERPRET:
    os.environ.setdefault('TRITON_DEFAULT_FP_FUSION', '1')                   # triton 3.10 changes the default


# === which implementation runs ==============================================================================
#
# All measured knowledge sits in these two tables; `bench.py kernels` on a GPU says what to change.
# No line of this file has run on a GPU yet: 'torch' stands wherever published numbers say that PyTorch's own kernel
# wins, a Triton kernel only where PyTorch has nothing but a mask or float32 logits in memory.

POLICY = {
    # situation: {major compute capability: implementation}, why
    'attention, no mask': ({8: 'torch', 9: 'torch'}, 'SDPA has its own kernel for it'),
    'attention, causal': ({8: 'torch', 9: 'torch'},
                          'flash/cuDNN SDPA: published 198 against 173 TFLOP/s (A100), 518 against 353 (H100)'),
    'attention, one prefix': ({8: 'torch-split', 9: 'torch-split'}, 'two dense SDPA calls, exact'),
    'attention, intervals': ({8: 'triton', 9: 'triton'}, 'SDPA would read a mask of T x T and skip no tile'),
    'attention, cache': ({8: 'torch', 9: 'torch'}, 'generation has no backward and short queries'),
    'loss, logits fit': ({8: 'triton-keep', 9: 'triton-keep'}, '3 cuBLAS products, 16-bit logits, one pass over them'),
    'loss, logits too large': ({8: 'triton', 9: 'triton'}, '4 products, logits never in memory'),
    'loss, no gradient': ({8: 'triton', 9: 'triton'}, '1 product, float32 logits: 16 bits cost 1e-2 nats a token'),
    'qk-norm, rotary': ({8: 'torch', 9: 'torch'}, 'triton moves a seventh of the bytes, but is not measured'),
}
NO_TABLE = 'POLICY has no entry for this GPU'

# (kernel, architecture, head dim or 0 for any): block sizes in the order of BLOCKS, num_warps, num_stages. All compiled
# for both architectures by tests/test_kernels_aot.py: none spills, all fit in shared memory; speeds are not measured.
# sm_80's entries also serve sm_86 and sm_89 (they need under 99 KiB).
BLOCKS = {
    'forward': ('BLOCK_M', 'BLOCK_N'),
    'dkdv': ('BLOCK_M', 'BLOCK_N'),
    'dq': ('BLOCK_M', 'BLOCK_N'),
    'delta': ('BLOCK_M',),
    'lse': ('BLOCK_M', 'BLOCK_V', 'BLOCK_C', 'GROUP'),
    'dz': ('BLOCK_M', 'BLOCK_V', 'BLOCK_C', 'GROUP'),
    'kept_lse': ('BLOCK_V',),
    'kept_dz': ('BLOCK_V',),
    'qk_forward': (),
    'qk_backward': (),
}
CONFIG = {
    ('forward', 80, 64): (128, 64, 4, 2), ('forward', 80, 128): (128, 64, 8, 2),
    ('dkdv', 80, 64): (32, 128, 8, 2), ('dkdv', 80, 128): (64, 64, 8, 2),
    ('dq', 80, 64): (64, 64, 4, 2), ('dq', 80, 128): (64, 64, 4, 2),
    ('delta', 80, 64): (64, 4, 1), ('delta', 80, 128): (64, 4, 1),
    ('lse', 80, 0): (128, 128, 64, 8, 8, 3), ('dz', 80, 0): (128, 128, 64, 8, 8, 3),
    ('kept_lse', 80, 0): (4096, 8, 1), ('kept_dz', 80, 0): (2048, 8, 1),
    ('qk_forward', 80, 64): (4, 1), ('qk_forward', 80, 128): (4, 1),
    ('qk_backward', 80, 64): (8, 1), ('qk_backward', 80, 128): (8, 1),
    ('forward', 90, 64): (128, 128, 8, 2), ('forward', 90, 128): (128, 128, 8, 2),
    ('dkdv', 90, 64): (64, 128, 8, 2), ('dkdv', 90, 128): (64, 64, 8, 2),
    ('dq', 90, 64): (128, 64, 8, 2), ('dq', 90, 128): (128, 64, 8, 2),
    ('delta', 90, 64): (64, 4, 1), ('delta', 90, 128): (64, 4, 1),
    ('lse', 90, 0): (128, 256, 64, 8, 8, 3), ('dz', 90, 0): (128, 128, 64, 8, 8, 3),
    ('kept_lse', 90, 0): (4096, 8, 1), ('kept_dz', 90, 0): (2048, 8, 1),
    ('qk_forward', 90, 64): (4, 1), ('qk_forward', 90, 128): (4, 1),
    ('qk_backward', 90, 64): (8, 1), ('qk_backward', 90, 128): (8, 1),
}

# logits of the kept rows stay in memory for the backward while they fit here (3 matrix products), else recomputed (4);
# on a CPU they must also fit into a quarter of the memory that is free, which changes no bit (see the reference)
KEEP_LOGITS_BYTES = {'cpu': 8 << 30, 'cuda': 2 << 30}
CHUNK_BYTES = 128 << 20                                   # workspace for one chunk of logits or of their gradient
CHUNK_COLUMNS = 8192                                      # at least, on a GPU: dx is read and written once a chunk


def _arch(device):
    """The architecture whose configs run on a device: 80, 90 or None. The interpreter uses 80's."""
    if device.type != 'cuda':
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 80 if major == 8 else 90 if (major, minor) == (9, 0) else None


def _config(kernel, device, width=0):
    """Block sizes and launch options of one kernel as keyword arguments."""
    *blocks, warps, stages = CONFIG[kernel, _arch(device), width]
    return dict(zip(BLOCKS[kernel], blocks), num_warps=warps, num_stages=stages)


def _why_not(op, device, dtype, width):
    """Why the Triton kernels cannot run here, '' if they can. width: head dim, or features of the loss."""
    if triton is None:
        return 'triton is not installed'
    if SWITCH == 'off':
        return 'CKPT80_KERNELS=off'
    if device.type != 'cuda' and not INTERPRET:
        return f'device {device.type}'
    if _arch(device) is None:
        return 'no configs for compute capability %d.%d' % torch.cuda.get_device_capability(device)
    if dtype not in (torch.bfloat16, torch.float16) and not (INTERPRET and dtype == torch.float32):
        return f'dtype {dtype}, not bfloat16 or float16'
    if op != 'loss' and width not in (64, 128):
        return f'head dim {width}, not 64 or 128'
    if op == 'loss' and width % 64:
        return f'{width} features, not a multiple of 64'
    return ''


@functools.cache
def _say(line):
    """Print a line once, on the first process."""
    if os.environ.get('RANK', '0') == '0':
        print(f'kernels: {line}', flush=True)


def _choose(op, situation, impl, device, dtype, width, obstacle=''):
    """The implementation to run; `obstacle`: what the caller found against Triton."""
    if impl == 'auto' and device.type != 'cuda':
        return 'torch'
    table, why = POLICY[f'{op}, {situation}']
    obstacle = obstacle or _why_not(op, device, dtype, width)
    if impl == 'auto':
        major = torch.cuda.get_device_capability(device)[0]
        impl = table.get(major, 'torch')
        if SWITCH == 'off' or major not in table:
            impl, why = 'torch', 'CKPT80_KERNELS=off' if SWITCH == 'off' else NO_TABLE
        if impl.startswith('triton'):
            obstacle = obstacle or _self_check(op, device, dtype, width)
        if not (impl.startswith('triton') and obstacle):
            _say(f'{op}, {situation}: {impl} ({why})')
    if impl.startswith('triton') and obstacle:
        _say(f'{op}, {situation}: torch instead of {impl} ({obstacle})')
        return 'torch'
    return impl


# torch.compile runs _choose while it traces and takes the answer as a constant, so that a compiled model decides and
# prints as any other does. (operator.index, where it is called, makes a number of a size that the tracer holds as a
# symbol.)
# The mark is what torch.compiler.assume_constant_result sets in torch 2.11 to 2.13; calling that would import
# torch._dynamo, 1 to 3 s that commands without a model do not need.
_choose._dynamo_marked_constant = True


def _aligned(t):
    """t if its rows can be loaded 16 bytes at a time (last dimension dense, the rest 16-aligned), else a dense copy."""
    fine = t.stride(-1) == 1 and all(s % 16 == 0 for s in t.stride()[:-1]) and t.data_ptr() % 16 == 0
    return t if fine else t.clone(memory_format=torch.contiguous_format)      # contiguous() keeps an odd address


def _matmul32(a, b):
    """a @ b of equal dtypes, accumulated and returned in float32 (float64 stays float64)."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


@contextlib.contextmanager
def _launch_on(x):
    """Inside an operator: Triton launches on the current device; autocast must not round float32 work to 16 bits."""
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        yield


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
    z = torch.mm(x, weight.t(), out=z) if z.dtype == x.dtype else _matmul32(x, weight.t())
    top, best = z.max(1)
    torch.softmax(z, 1, out=q)
    log_sum = -q.gather(1, best[:, None])[:, 0].log()                        # of exp(z - top), at least 1
    nll, lse = top - z.gather(1, at)[:, 0] + log_sum, top + log_sum
    q.scatter_(1, at, torch.expm1(-nll)[:, None])
    return nll, lse


def _room(x, n, V):
    return x.new_empty(n, V, dtype=torch.promote_types(x.dtype, torch.float32))


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
    scaled, dx, dw = (both * x).to(x.dtype), [], None
    for rows in chunks:
        n = rows.stop - rows.start
        if not keep:
            _softmax_chunk(x[rows], weight, at[rows, None], z[:n], q[:n])
        part = (saved[rows] if keep else q[:n]).to(x.dtype)
        if need_x:
            dx.append(_matmul32(part, weight))
        if not need_w:
            continue
        if dw is None:
            dw = _matmul32(part.t(), scaled[rows])                           # float32 whatever the weight's dtype
        elif dw.dtype == x.dtype:
            dw.addmm_(part.t(), scaled[rows])
        else:
            dw += _matmul32(part.t(), scaled[rows])
    dx = torch.cat(dx).mul_(both).add_(b[:, None] * weight[at]) if need_x else None
    return dx, dw.index_add_(0, at, (b[:, None] * x).to(dw.dtype)) if need_w else None


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
            dx += _matmul32(dz[:, :n_col], rows)
        if need_w:
            dw[col0:col0 + step] = _matmul32(dz[:, :n_col].t(), x)           # each row of dW is written once
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
    if not x.is_cuda or SWITCH == 'debug':
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


def _free_memory():
    """Bytes that are free on this machine or in this container, by the processes that torchrun began here."""
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
    budget = KEEP_LOGITS_BYTES['cuda' if x.is_cuda else 'cpu']
    if wanted and not x.is_cuda and n_logit is not None and n_logit * 4 > 64 << 20:
        budget = min(budget, _free_memory() // 4)
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


# === attention under an interval mask =======================================================================
#
# Query i of row b sees the keys [lo_bi, hi_bi), an interval. Causal attention, PrefixLM, packed documents, padding and
# their products are all of this form, so two int32 vectors describe every mask of this project, and no new batch
# recompiles anything:
#     s_ij = scale q_i . k_j,   p_ij = exp(s_ij - lse_i) if lo_i <= j < hi_i else 0,   o_i = sum_j p_ij v_j
# A query that sees nothing (padding) gives o = 0. With the gradient do of o:
#     ds_ij = p_ij (do_i . v_j - do_i . o_i)
#     dv_j = sum_i p_ij do_i,   dq_i = scale sum_j ds_ij k_j,   dk_j = scale sum_i ds_ij q_i

@dataclass(frozen=True, eq=False)
class Intervals:
    """
    Which keys each query sees, and which queries see each key: intervals in both directions.
    lo, hi    (B, Tq) int32: query i of row b sees the keys [lo, hi)
    qlo, qhi  (B, Tk) int32 or None: key j is seen by the queries [qlo, qhi); the same relation, for the backward kernel
    kind      'causal', 'prefix', 'documents', 'cached' or '' (anything else)
    n_prefix  'prefix' only: the prefix length if it is one number, known on the host, for all rows; else None
    """
    lo: Tensor
    hi: Tensor
    qlo: Optional[Tensor] = None
    qhi: Optional[Tensor] = None
    kind: str = ''
    n_prefix: Optional[int] = None

    @staticmethod
    def causal(B, T, device=None):
        """Query i sees the keys 0..i. B, T ints."""
        i = torch.arange(T, dtype=torch.int32, device=device).repeat(B, 1)                   # (B, T)
        return Intervals(torch.zeros_like(i), i + 1, i, torch.full_like(i, T), 'causal')

    @staticmethod
    def prefix(prefix_len, T, device=None):
        """Causal, but the first prefix_len[b] positions of row b all see each other. prefix_len (B,) int, beyond T
        counts as T; equal lengths in host memory let attention use two dense calls. T int."""
        one = prefix_len.device.type == 'cpu' and bool((prefix_len == prefix_len[:1]).all())
        n_prefix = min(max(int(prefix_len[0]), 0), T) if one else None
        p = prefix_len.clamp(0, T).to(device or prefix_len.device, torch.int32)[:, None]     # (B, 1)
        i = torch.arange(T, dtype=torch.int32, device=p.device).repeat(len(p), 1)            # (B, T)
        qlo = torch.where(i < p, 0, i)
        return Intervals(torch.zeros_like(i), torch.maximum(i + 1, p), qlo, torch.full_like(i, T), 'prefix', n_prefix)

    @staticmethod
    def documents(segment_ids, prefix_len=None):
        """Causal inside each document. segment_ids (B, T) int: a run of equal ids is a document, a negative id padding
        (sees nothing, is seen by nothing). prefix_len None, (B,) or (B, T) int: the first so many positions of the
        document all see each other."""
        B, T = segment_ids.shape
        i = torch.arange(T, device=segment_ids.device).expand(B, T)
        first = torch.ones_like(segment_ids, dtype=torch.bool)
        first[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
        last = first.roll(-1, 1)
        last[:, -1:] = True
        start = torch.where(first, i, 0).cummax(1).values                                    # (B, T) my document starts
        end = torch.where(last, i + 1, T).flip(1).cummin(1).values.flip(1)                   # (B, T) and ends
        p = start if prefix_len is None else torch.minimum(start + prefix_len.reshape(B, -1).clamp(min=0), end)
        hi, qlo = torch.maximum(i + 1, p), torch.where(i < p, start, i)
        lo, hi, qlo, qhi = (torch.where(segment_ids >= 0, y, 0).int() for y in (start, hi, qlo, end))
        return Intervals(lo, hi, qlo, qhi, 'documents')

    @staticmethod
    def cached(position, Tk):
        """Generation with a cache of Tk key slots: the query at `position` (B, Tq) int sees the slots 0..position."""
        hi = (position + 1).clamp(max=Tk).int()
        return Intervals(torch.zeros_like(hi), hi, kind='cached')

    def joined(self, slots, n):
        """The same, and the slots (B, T) bool of each image see each other: n of them in a row, so that images side by
        side stay apart. Here T is both Tq and Tk."""
        rank = slots.cumsum(1, dtype=torch.int32) - 1                                        # (B, T) of a row's slots
        first = torch.arange(slots.shape[1], dtype=torch.int32, device=slots.device) - rank % n
        return Intervals(self.lo, torch.where(slots, first + n, self.hi), torch.where(slots, first, self.qlo), self.qhi)

    @staticmethod
    def full(B, Tq, Tk, device=None):
        """Every query sees every key."""
        q, k = (torch.zeros(B, T, dtype=torch.int32, device=device) for T in (Tq, Tk))
        return Intervals(q, torch.full_like(q, Tk), k, torch.full_like(k, Tq))


# --- reference
def _attention_torch(q, k, v, mask, scale):
    """PyTorch's own scaled_dot_product_attention, with a boolean mask where it has nothing better."""
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    if mask.kind == 'causal' and q.shape[2] == k.shape[2]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)          # no mask in memory
    j = torch.arange(k.shape[2], dtype=torch.int32, device=q.device)
    lo, hi = mask.lo[:, None, :, None], mask.hi[:, None, :, None]                            # (B, 1, Tq, 1)
    empty = hi <= lo
    # a query that sees nothing is shown everything, then erased: softmax over no key would be nan, gradients too
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=(j >= lo) & (j < hi) | empty, scale=scale)
    return o.masked_fill(empty, 0)


def _attention_split(q, k, v, n_prefix, scale):
    """PrefixLM with one prefix length as two dense calls: the prefix sees itself, the rest is causal. Exact."""
    P, T = n_prefix, q.shape[2]
    if P == 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    head = F.scaled_dot_product_attention(q[:, :, :P], k[:, :, :P], v[:, :, :P], scale=scale)
    if P == T:
        return head
    from torch.nn.attention.bias import causal_lower_right                   # here: it imports torch._dynamo
    rest = F.scaled_dot_product_attention(q[:, :, P:], k, v, attn_mask=causal_lower_right(T - P, T), scale=scale)
    return torch.cat([head, rest], 2)


# --- kernels
# FlashAttention-2 (arXiv 2307.08691). A program owns a tile of queries (or of keys) and walks over the tiles of the
# other side that any of its rows sees; the rest is never touched. A tile that every row sees whole needs no mask. The
# backward has one kernel for dk and dv and one for dq: 7 products instead of 5, but no atomics, so two runs are bit-
# equal.
if triton is not None:
    @triton.jit
    def _load_rows(X, b, h, first, sb, sh, st, T, BLOCK: tl.constexpr, D: tl.constexpr):
        """X[b, h, first:first + BLOCK, :] (BLOCK, D). Rows beyond T repeat the last one (clamping takes 10 to 80
        registers less than masking); every use masks them by the intervals. 64-bit base, 32-bit offsets in the tile."""
        r, d = tl.minimum(tl.arange(0, BLOCK), T - 1 - first), tl.arange(0, D)
        return tl.load(X + b * sb + h * sh + tl.cast(first, tl.int64) * st + r[:, None] * st + d[None, :])

    @triton.jit
    def _store_rows(X, x, b, h, first, sb, sh, st, T, BLOCK: tl.constexpr, D: tl.constexpr):
        r, d = tl.arange(0, BLOCK), tl.arange(0, D)
        to = X + b * sb + h * sh + tl.cast(first, tl.int64) * st + r[:, None] * st + d[None, :]
        tl.store(to, x.to(X.dtype.element_ty), mask=(first + r < T)[:, None])

    @triton.jit
    def _interval(LO, HI, b, first, n_own, n_other, BLOCK: tl.constexpr):
        """
        Intervals of BLOCK rows, and what they say of whole tiles: lo, hi (BLOCK,); [start, stop): what any row sees;
        [all_start, all_stop): what every row sees.
        """
        r = first + tl.arange(0, BLOCK)
        lo = tl.maximum(tl.load(LO + b * n_own + r, mask=r < n_own, other=0), 0)
        hi = tl.minimum(tl.load(HI + b * n_own + r, mask=r < n_own, other=0), n_other)
        lo = tl.where(hi > lo, lo, n_other)               # a row that sees nothing: [n_other, 0), which widens nothing
        hi = tl.where(lo < n_other, hi, 0)
        return lo, hi, tl.min(lo, 0), tl.max(hi, 0), tl.max(lo, 0), tl.min(hi, 0)

    @triton.jit(do_not_specialize=['Tq', 'Tk'])
    def _forward_kernel(Q, K, V, O, LSE, LO, HI, sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, sob, soh, sot,
                        n_head, Tq, Tk, scale_log2, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
        """o and lse (in base 2) of a tile of queries."""
        first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M        # causal: the longest rows start first
        bh = tl.program_id(1).to(tl.int64)
        b, h = bh // n_head, bh % n_head
        lo, hi, start, stop, all_start, all_stop = _interval(LO, HI, b, first, Tq, Tk, BLOCK_M)
        q = _load_rows(Q, b, h, first, sqb, sqh, sqt, Tq, BLOCK_M, D)
        top = tl.full((BLOCK_M,), -1e30, tl.float32)      # running maximum; finite, so that no row computes inf - inf
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, D), tl.float32)
        for j in range(start // BLOCK_N * BLOCK_N, stop, BLOCK_N):
            k = _load_rows(K, b, h, j, skb, skh, skt, Tk, BLOCK_N, D)
            s = tl.dot(q, tl.trans(k), input_precision='ieee') * scale_log2  # (BLOCK_M, BLOCK_N)
            if (j < all_start) | (j + BLOCK_N > all_stop):
                n = j + tl.arange(0, BLOCK_N)
                s = tl.where((n[None, :] >= lo[:, None]) & (n[None, :] < hi[:, None]), s, float('-inf'))
            new = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2(s - new[:, None])
            shrink = tl.exp2(top - new)
            total = total * shrink + tl.sum(p, 1)
            v = _load_rows(V, b, h, j, svb, svh, svt, Tk, BLOCK_N, D)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision='ieee')
            top = new
        empty = total == 0.0
        acc = acc / tl.where(empty, 1.0, total)[:, None]
        _store_rows(O, acc, b, h, first, sob, soh, sot, Tq, BLOCK_M, D)
        m = first + tl.arange(0, BLOCK_M)
        # +inf makes every probability of an empty row 0 in the backward
        tl.store(LSE + bh * Tq + m, tl.where(empty, float('inf'), top + tl.log2(total)), mask=m < Tq)

    @triton.jit(do_not_specialize=['Tq'])
    def _delta_kernel(O, DO, DELTA, sob, soh, sot, sdb, sdh, sdt, n_head, Tq, D: tl.constexpr, BLOCK_M: tl.constexpr):
        """delta_i = do_i . o_i"""
        first = tl.program_id(0) * BLOCK_M
        bh = tl.program_id(1).to(tl.int64)
        o = _load_rows(O, bh // n_head, bh % n_head, first, sob, soh, sot, Tq, BLOCK_M, D).to(tl.float32)
        do = _load_rows(DO, bh // n_head, bh % n_head, first, sdb, sdh, sdt, Tq, BLOCK_M, D).to(tl.float32)
        m = first + tl.arange(0, BLOCK_M)
        tl.store(DELTA + bh * Tq + m, tl.sum(o * do, 1), mask=m < Tq)

    @triton.jit(do_not_specialize=['Tq', 'Tk'])
    def _dkdv_kernel(Q, K, V, DO, DK, DV, LSE, DELTA, QLO, QHI, sqb, sqh, sqt, skb, skh, skt, svb, svh, svt,
                     sdb, sdh, sdt, sob, soh, sot, n_head, Tq, Tk, scale, scale_log2,
                     D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
        """dk and dv of a tile of keys, which meets every query that sees any of them. Scores are (keys, queries)."""
        first = tl.program_id(0) * BLOCK_N                # causal: early keys are seen by most, and start first
        bh = tl.program_id(1).to(tl.int64)
        b, h = bh // n_head, bh % n_head
        qlo, qhi, start, stop, all_start, all_stop = _interval(QLO, QHI, b, first, Tk, Tq, BLOCK_N)
        k = _load_rows(K, b, h, first, skb, skh, skt, Tk, BLOCK_N, D)
        v = _load_rows(V, b, h, first, svb, svh, svt, Tk, BLOCK_N, D)
        dk = tl.zeros((BLOCK_N, D), tl.float32)
        dv = tl.zeros((BLOCK_N, D), tl.float32)
        for i in range(start // BLOCK_M * BLOCK_M, stop, BLOCK_M):
            m = i + tl.arange(0, BLOCK_M)
            q = _load_rows(Q, b, h, i, sqb, sqh, sqt, Tq, BLOCK_M, D)
            lse = tl.load(LSE + bh * Tq + m, mask=m < Tq, other=float('inf'))
            p = tl.exp2(tl.dot(k, tl.trans(q), input_precision='ieee') * scale_log2 - lse[None, :])
            if (i < all_start) | (i + BLOCK_M > all_stop):
                p = tl.where((m[None, :] >= qlo[:, None]) & (m[None, :] < qhi[:, None]), p, 0.0)
            do = _load_rows(DO, b, h, i, sdb, sdh, sdt, Tq, BLOCK_M, D)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision='ieee')
            delta = tl.load(DELTA + bh * Tq + m, mask=m < Tq, other=0.0)
            ds = p * (tl.dot(v, tl.trans(do), input_precision='ieee') - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision='ieee')
        _store_rows(DK, dk * scale, b, h, first, sob, soh, sot, Tk, BLOCK_N, D)
        _store_rows(DV, dv, b, h, first, sob, soh, sot, Tk, BLOCK_N, D)

    @triton.jit(do_not_specialize=['Tq', 'Tk'])
    def _dq_kernel(Q, K, V, DO, DQ, LSE, DELTA, LO, HI, sqb, sqh, sqt, skb, skh, skt, svb, svh, svt,
                   sdb, sdh, sdt, sob, soh, sot, n_head, Tq, Tk, scale, scale_log2,
                   D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
        """dq of a tile of queries: the forward's loop again."""
        first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
        bh = tl.program_id(1).to(tl.int64)
        b, h = bh // n_head, bh % n_head
        lo, hi, start, stop, all_start, all_stop = _interval(LO, HI, b, first, Tq, Tk, BLOCK_M)
        q = _load_rows(Q, b, h, first, sqb, sqh, sqt, Tq, BLOCK_M, D)
        do = _load_rows(DO, b, h, first, sdb, sdh, sdt, Tq, BLOCK_M, D)
        m = first + tl.arange(0, BLOCK_M)
        lse = tl.load(LSE + bh * Tq + m, mask=m < Tq, other=float('inf'))
        delta = tl.load(DELTA + bh * Tq + m, mask=m < Tq, other=0.0)
        dq = tl.zeros((BLOCK_M, D), tl.float32)
        for j in range(start // BLOCK_N * BLOCK_N, stop, BLOCK_N):
            k = _load_rows(K, b, h, j, skb, skh, skt, Tk, BLOCK_N, D)
            v = _load_rows(V, b, h, j, svb, svh, svt, Tk, BLOCK_N, D)
            p = tl.exp2(tl.dot(q, tl.trans(k), input_precision='ieee') * scale_log2 - lse[:, None])
            if (j < all_start) | (j + BLOCK_N > all_stop):
                n = j + tl.arange(0, BLOCK_N)
                p = tl.where((n[None, :] >= lo[:, None]) & (n[None, :] < hi[:, None]), p, 0.0)
            ds = p * (tl.dot(do, tl.trans(v), input_precision='ieee') - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision='ieee')
        _store_rows(DQ, dq * scale, b, h, first, sob, soh, sot, Tq, BLOCK_M, D)


LOG2_E = 1.4426950408889634


def _bhtd(like, T):
    """An empty (B, H, T, D) whose memory is (B, T, H, D), so that heads join again without a copy."""
    B, H, _, D = like.shape
    return like.new_empty(B, T, H, D).transpose(1, 2)


def _strides(*tensors):
    return [s for t in tensors for s in t.stride()[:3]]


# --- operator
@torch.library.custom_op('ckpt80::interval_attention', mutates_args=())
def _interval_attention(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, qlo: Optional[Tensor],
                        qhi: Optional[Tensor], scale: float) -> Tuple[Tensor, Tensor]:
    (B, H, Tq, D), Tk = q.shape, k.shape[2]
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    o, lse = _bhtd(q, Tq), q.new_empty(B, H, Tq, dtype=torch.float32)
    config = _config('forward', q.device, D)
    with _launch_on(q):
        _forward_kernel[(triton.cdiv(Tq, config['BLOCK_M']), B * H)](
            q, k, v, o, lse, lo.contiguous(), hi.contiguous(), *_strides(q, k, v, o), H, Tq, Tk, scale * LOG2_E,
            D=D, **config)
    return o, lse


@_interval_attention.register_fake
def _(q, k, v, lo, hi, qlo, qhi, scale):
    return _bhtd(q, q.shape[2]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op('ckpt80::interval_attention_backward', mutates_args=())
def _interval_attention_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, lo: Tensor,
                                 hi: Tensor, qlo: Tensor, qhi: Tensor, scale: float) -> Tuple[Tensor, Tensor, Tensor]:
    (B, H, Tq, D), Tk = q.shape, k.shape[2]
    do, q, k, v = _aligned(do), _aligned(q), _aligned(k), _aligned(v)
    dq, dk, dv, delta = _bhtd(q, Tq), _bhtd(k, Tk), _bhtd(k, Tk), torch.empty_like(lse)
    config = functools.partial(_config, device=q.device, width=D)
    inputs, scales = _strides(q, k, v, do), (scale, scale * LOG2_E)
    with _launch_on(q):
        c = config('delta')
        _delta_kernel[(triton.cdiv(Tq, c['BLOCK_M']), B * H)](o, do, delta, *_strides(o, do), H, Tq, D=D, **c)
        c = config('dkdv')
        _dkdv_kernel[(triton.cdiv(Tk, c['BLOCK_N']), B * H)](
            q, k, v, do, dk, dv, lse, delta, qlo.contiguous(), qhi.contiguous(), *inputs, *_strides(dk), H, Tq, Tk,
            *scales, D=D, **c)
        c = config('dq')
        _dq_kernel[(triton.cdiv(Tq, c['BLOCK_M']), B * H)](
            q, k, v, do, dq, lse, delta, lo.contiguous(), hi.contiguous(), *inputs, *_strides(dq), H, Tq, Tk,
            *scales, D=D, **c)
    return dq, dk, dv


@_interval_attention_backward.register_fake
def _(do, q, k, v, o, lse, lo, hi, qlo, qhi, scale):
    return _bhtd(q, q.shape[2]), _bhtd(k, k.shape[2]), _bhtd(k, k.shape[2])


def _interval_attention_setup(ctx, inputs, output):
    q, k, v, lo, hi, qlo, qhi, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, lo, hi, qlo, qhi)
    ctx.mark_non_differentiable(output[1])


def _interval_attention_autograd(ctx, do, _):
    return *_interval_attention_backward(do, *ctx.saved_tensors, ctx.scale), None, None, None, None, None


_interval_attention.register_autograd(_interval_attention_autograd, setup_context=_interval_attention_setup)


def attention(q, k, v, mask=None, *, scale=None, impl='auto'):
    """
    Softmax attention under an interval mask.
    q        (B, H, Tq, D) float; k, v (B, H, Tk, D) in the same dtype; any strides, so views of one projection are fine
    mask     Intervals or None (every query sees every key)
    scale    float, None = D ** -0.5
    impl     'auto', 'torch', 'torch-split' (one prefix length only), 'triton' (D 64 or 128, 16-bit)
    returns  o (B, H, Tq, D) in q's dtype; 0 where a query sees nothing, with gradient 0
    Raises ValueError for shapes that do not fit. FlashAttention-2 (arXiv 2307.08691) with intervals for a mask.
    """
    B, H, Tq, D = q.shape
    if k.shape != v.shape or k.shape[:2] != (B, H) or k.shape[3] != D:
        raise ValueError(f'attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: '
                         'expected (B, H, Tq, D) and twice (B, H, Tk, D)')
    if mask is not None and mask.lo.shape != (B, Tq):
        raise ValueError(f'attention: mask for {tuple(mask.lo.shape)} (B, Tq) queries, q has {(B, Tq)}')
    square = Tq == k.shape[2]
    situation, obstacle = 'no mask', ''
    if mask is not None:
        situation = ('cache' if mask.kind == 'cached' else 'causal' if mask.kind == 'causal' and square else
                     'one prefix' if mask.n_prefix is not None and square else 'intervals')
        if mask.qlo is None and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            obstacle = 'the mask has no qlo, qhi for the backward'
        elif mask.qlo is not None and mask.qlo.shape != (B, k.shape[2]):
            raise ValueError(f'attention: mask for {tuple(mask.qlo.shape)} (B, Tk) keys, k has {(B, k.shape[2])}')
    if 0 in (B, H, Tq, k.shape[2]) or B * H > 65535:
        obstacle = f'shapes {tuple(q.shape)}, {tuple(k.shape)}'
    autocast = q.device.type != 'meta' and torch.is_autocast_enabled(q.device.type)
    dtype = torch.get_autocast_dtype(q.device.type) if autocast else q.dtype
    impl = _choose('attention', situation, impl, q.device, dtype, operator.index(D), obstacle)
    scale = D ** -0.5 if scale is None else scale
    if impl == 'torch-split':
        if mask is None or mask.n_prefix is None or not square:
            raise ValueError("attention: impl='torch-split' needs Intervals.prefix with equal lengths in host memory")
        return _attention_split(q, k, v, mask.n_prefix, scale)
    if impl == 'torch':
        return _attention_torch(q, k, v, mask, scale)
    mask = Intervals.full(B, Tq, k.shape[2], q.device) if mask is None else mask
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    return _interval_attention(q, k, v, mask.lo, mask.hi, mask.qlo, mask.qhi, scale)[0]


# === the first use on a GPU checks itself ===================================================================

@functools.cache
@torch.inference_mode(False)
def _self_check(op, device, dtype, width):
    """
    Run a kernel, forward and backward, on a small problem against the float32 reference; '' or what is wrong.
    'auto' asks this before it trusts a kernel on a GPU. It takes seconds, most of them compilation that the run needs
    anyway.
    """
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g).to(device, dtype)                 # noqa: E731
    if op == 'loss':
        leaves = [rand(300, width), rand(2560, width) * width ** -0.5]        # a V that 16 divides, as real ones
        targets = torch.randint(2560, (300,), generator=g)
        targets[::3] = IGNORE_INDEX
        impls = ('triton', 'triton-keep')
        run = lambda impl, x: sum(linear_cross_entropy(*x, targets.to(device), impl=impl))   # noqa: E731
    elif op == 'qk-norm':
        from fused import qk_norm_rotary                  # here: it imports this file
        leaves = [rand(2, 9, 9 * width), 1 + rand(3 * width) / 4, 1 + rand(3 * width) / 4]
        angle = rand(9, width // 2).float().repeat(1, 2)
        impls, other = ('triton',), rand(3, 1, 1, 1, width).float()
        run = lambda impl, x: sum(y * z for y, z in zip(                                     # noqa: E731
            qk_norm_rotary(*x, angle.cos(), angle.sin(), 3, 1e-5, impl=impl), other))
    else:
        leaves = [rand(2, 2, 200, width) for _ in range(3)]
        segments, prefix = torch.arange(400, device=device).reshape(2, 200) // 77, torch.tensor([9, 50], device=device)
        mask = Intervals.documents(segments, prefix)
        impls = ('triton',)
        run = lambda impl, x: attention(*x, mask, impl=impl)                                 # noqa: E731

    def with_gradients(impl, leaves):
        leaves = [x.detach().requires_grad_() for x in leaves]
        keep = lambda x: x  # noqa: E731 (our own hooks: activation checkpointing must not count what is saved here)
        with (torch.enable_grad(), torch.autocast(device.type, enabled=False),
              torch.autograd.graph.saved_tensors_hooks(keep, keep)):
            y = run(impl, leaves)
            return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)]

    global CHUNK_BYTES, CHUNK_COLUMNS                     # so that a small loss, too, has two chunks of columns
    chunk, CHUNK_BYTES, CHUNK_COLUMNS = (CHUNK_BYTES, CHUNK_COLUMNS), 1 << 19, 2048
    try:
        truth = with_gradients('torch', [x.float() for x in leaves])
        for impl in impls:
            names = ('output', 'gradient 1', 'gradient 2', 'gradient 3')
            for name, a, b in zip(names, with_gradients(impl, leaves), truth):
                error = float((a.float() - b).norm() / b.norm())
                if not error < 0.02:                      # 16-bit rounding gives 0.002 to 0.01; nan fails, too
                    return f'self-check failed: {impl} {name} is off by {error:.3g}'
    except Exception as e:                # Triton builds its launcher here: no compiler, no Python.h, no libcuda
        return f'self-check failed: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ""}'
    finally:
        CHUNK_BYTES, CHUNK_COLUMNS = chunk
    return ''
