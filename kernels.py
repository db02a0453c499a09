"""
The two operations that decide the cost of a step, each told as a lesson: the maths, the plain reference, the kernel.

    o = attention(q, k, v, Intervals.causal(B, T, device))   # softmax attention under an interval mask: here
    nll, lse = linear_cross_entropy(x, weight, targets)      # output projection and loss: loss.py

Smaller ones, between the products: fused.py. Which implementation runs: policy.py.
"""
import functools
import importlib.util
import operator
from dataclasses import dataclass
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from loss import IGNORE_INDEX, linear_cross_entropy  # noqa: F401 (callers find both operations here)
from policy import _aligned, _choose, _config, _launch_on, _strides, triton

if triton is not None:
    import triton.language as tl

HAS_VARLEN = importlib.util.find_spec('torch.nn.attention.varlen') is not None


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
    ends      None, or of 'documents' without prefixes, on a GPU: what _ends returns
    """
    lo: Tensor
    hi: Tensor
    qlo: Optional[Tensor] = None
    qhi: Optional[Tensor] = None
    kind: str = ''
    n_prefix: Optional[int] = None
    ends: Optional[Tensor] = None

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
        document all see each other; None on a GPU waits for it once, to learn where the documents end."""
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
        varlen = prefix_len is None and HAS_VARLEN and first.is_cuda and not torch.compiler.is_compiling()
        return Intervals(lo, hi, qlo, qhi, 'documents', ends=_ends(last) if varlen else None)

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


def _ends(last):
    """last (B, T) bool, where a document or padding ends -> 0 and these ends in the rows laid end to end, int32."""
    return F.pad(last.flatten().nonzero()[:, 0] + 1, (1, 0)).int()


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


def _attention_varlen(q, k, v, mask, scale):
    """Causal inside each document, by torch's flash attention: rows end to end, padding as documents, then erased."""
    from torch.nn.attention.varlen import varlen_attn                        # here: it imports torch._dynamo
    T = q.shape[2]
    flat = [y.transpose(1, 2).flatten(0, 1) for y in (q, k, v)]              # (B*T, H, D)
    o = varlen_attn(*flat, mask.ends, mask.ends, T, T, scale=scale, window_size=(-1, 0))
    empty = (mask.hi <= mask.lo)[:, None, :, None]                           # (B, 1, T, 1)
    return o.unflatten(0, (-1, T)).transpose(1, 2).masked_fill(empty, 0)


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
    impl     'auto', 'torch', 'torch-split' (one prefix length only), 'torch-varlen' (documents without prefixes, on a
             GPU, 16-bit), 'triton' (D 64 or 128, 16-bit)
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
    autocast = q.device.type != 'meta' and torch.is_autocast_enabled(q.device.type)
    dtype = torch.get_autocast_dtype(q.device.type) if autocast else q.dtype
    situation, obstacle = 'no mask', ''
    if mask is not None:
        situation = ('cache' if mask.kind == 'cached' else 'causal' if mask.kind == 'causal' and square else
                     'one prefix' if mask.n_prefix is not None and square else
                     'documents' if mask.ends is not None and square and dtype.itemsize == 2 else 'intervals')
        if mask.qlo is None and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            obstacle = 'the mask has no qlo, qhi for the backward'
        elif mask.qlo is not None and mask.qlo.shape != (B, k.shape[2]):
            raise ValueError(f'attention: mask for {tuple(mask.qlo.shape)} (B, Tk) keys, k has {(B, k.shape[2])}')
    if 0 in (B, H, Tq, k.shape[2]) or B * H > 65535:
        obstacle = f'shapes {tuple(q.shape)}, {tuple(k.shape)}'
    impl = _choose('attention', situation, impl, q.device, dtype, operator.index(D), obstacle)
    scale = D ** -0.5 if scale is None else scale
    if impl == 'torch-split':
        if mask is None or mask.n_prefix is None or not square:
            raise ValueError("attention: impl='torch-split' needs Intervals.prefix with equal lengths in host memory")
        return _attention_split(q, k, v, mask.n_prefix, scale)
    if impl == 'torch':
        return _attention_torch(q, k, v, mask, scale)
    if impl == 'torch-varlen':
        if mask is None or mask.ends is None or not square:
            raise ValueError("attention: impl='torch-varlen' needs Intervals.documents without prefixes, on a GPU")
        return _attention_varlen(q.to(dtype), k.to(dtype), v.to(dtype), mask, scale)
    mask = Intervals.full(B, Tq, k.shape[2], q.device) if mask is None else mask
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    return _interval_attention(q, k, v, mask.lo, mask.hi, mask.qlo, mask.qhi, scale)[0]
