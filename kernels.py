"""
The two operations that decide the cost of a training step, each told three times: the maths, the plain reference, the kernel.

    nll, lse = linear_cross_entropy(x, weight, targets)      # output projection and loss, only at the rows that carry loss
    o = attention(q, k, v, Intervals.causal(B, T, device))   # softmax attention under an interval mask

Importing needs neither triton nor a GPU.
"""
import os
from dataclasses import dataclass
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100                                       # a target that carries no loss

# logits of the kept rows are kept for the backward while they fit here (3 matrix products), else recomputed (4)
KEEP_LOGITS_BYTES = {'cpu': 256 << 20, 'cuda': 2 << 30}
CHUNK_BYTES = 64 << 20                                    # workspace of one chunk of logits when they are recomputed


# === masked linear cross-entropy ===========================================================================
#
# For a row i with features x_i (C,), target t_i and the output matrix W (V, C):
#     z_i   = W x_i                        logits, (V,)
#     lse_i = log sum_v exp z_iv
#     nll_i = lse_i - z_{i,t_i}
# and with upstream gradients a_i of nll_i and b_i of lse_i (b comes from a z-loss):
#     dz_iv = (a_i + b_i) exp(z_iv - lse_i) - a_i [v = t_i],    dx = dz W,    dW = dz^T x
# Returning nll and lse per row keeps token weights, the z-loss and the mean in plain PyTorch. Rows without loss are dropped before
# the first product: at 29 % kept rows that alone is worth 3.45x, and their gradient is zero by construction, not by masking.

def _matmul32(a, b):
    """a @ b for equal dtypes, accumulated and returned in float32 (float64 stays float64)."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32)        # CUDA only: 16-bit operands, 32-bit result


def _kept(x, weight, targets, rows):
    """Gather the kept rows; returns x (n,C) and weight (V,C) in the dtype of the products, targets (n,), rows (n,)."""
    if rows is None:
        rows = (targets != IGNORE_INDEX).nonzero()[:, 0]  # on a GPU this waits for the device: give rows
    dtype = x.dtype if x.is_cuda or x.dtype == torch.float64 else torch.float32
    return x.index_select(0, rows).to(dtype), weight.to(dtype), targets.index_select(0, rows), rows


def _upstream(g_nll, g_lse, targets, rows):
    """Upstream gradients a, b (n,) of the kept rows; zero where the target is ignored (rows may name such a row)."""
    live = targets != IGNORE_INDEX
    return [torch.where(live, g.index_select(0, rows), 0) for g in (g_nll, g_lse)]


def _scatter(n, rows, values, dtype=None):
    """Rows back in their places, zeros elsewhere: (n_kept, ...) -> (n, ...)."""
    out = torch.zeros((n, *values.shape[1:]), dtype=dtype or values.dtype, device=values.device)
    return out.index_copy_(0, rows, values.to(out.dtype))


def _nll_torch(x, weight, targets, rows, keep):
    """Forward in plain PyTorch, in chunks of rows; returns nll, lse (n,) and the log-probabilities (n,V) if `keep`."""
    n, V = len(rows), len(weight)
    step = max(n, 1) if keep else max(1, CHUNK_BYTES // (4 * V))
    nll, lse, saved = [], [], None
    for i in range(0, max(n, 1), step):
        logits = _matmul32(x[i:i + step], weight.t())                        # (step, V)
        at = targets[i:i + step].clamp(min=0)[:, None]
        logp = torch.log_softmax(logits, 1)
        nll.append(-logp.gather(1, at)[:, 0])
        lse.append(logits.gather(1, at)[:, 0] + nll[-1])
        saved = logp if keep else None
    return torch.cat(nll), torch.cat(lse), saved


def _nll_torch_backward(a, b, x, weight, targets, lse, saved):
    """Backward of _nll_torch: dx (n,C) and dW (V,C) in float32 (float64)."""
    n, V = len(x), len(weight)
    step = max(n, 1) if saved is not None else max(1, CHUNK_BYTES // (4 * V))
    dx, dw = [], None
    for i in range(0, max(n, 1), step):
        rows = slice(i, i + step)
        if saved is not None:
            dz = saved.exp()                                                 # not in place: backward may run twice
        else:
            dz = _matmul32(x[rows], weight.t()).sub_(lse[rows, None]).exp_()
        at, a_i = targets[rows].clamp(min=0)[:, None], a[rows, None]
        dz.mul_(a_i + b[rows, None])
        dz.scatter_(1, at, dz.gather(1, at) - a_i)
        dz = dz.to(x.dtype)
        dx.append(_matmul32(dz, weight))
        part = _matmul32(dz.t(), x[rows])
        dw = part if dw is None else dw.add_(part)                           # float32 over chunks, whatever the weight's dtype
    return torch.cat(dx), dw


# One opaque operator for every implementation: torch.compile sees neither the kernels nor the data-dependent row count.
@torch.library.custom_op('ckpt80::linear_nll', mutates_args=())
def _linear_nll(x: Tensor, weight: Tensor, targets: Tensor, rows: Optional[Tensor],
                impl: str) -> Tuple[Tensor, Tensor, Tensor]:
    if not x.is_cuda or DEBUG:
        _check_targets(targets, len(weight))
    xk, w, t, rows = _kept(x, weight, targets, rows)
    nll, lse, saved = _nll_torch(xk, w, t, rows, impl.endswith('keep'))
    live = t != IGNORE_INDEX
    nll, lse = (_scatter(len(x), rows, torch.where(live, y, 0)) for y in (nll, lse))
    return nll, lse, x.new_empty(0, dtype=nll.dtype) if saved is None else saved


@_linear_nll.register_fake
def _(x, weight, targets, rows, impl):
    out = x.new_empty(len(x), dtype=torch.promote_types(x.dtype, torch.float32))
    saved = out.new_empty(0) if not impl.endswith('keep') else out.new_empty(len(rows), len(weight))
    return out, torch.empty_like(out), saved


@torch.library.custom_op('ckpt80::linear_nll_backward', mutates_args=())
def _linear_nll_backward(g_nll: Tensor, g_lse: Tensor, x: Tensor, weight: Tensor, targets: Tensor, rows: Optional[Tensor],
                         lse: Tensor, saved: Tensor, impl: str) -> Tuple[Tensor, Tensor]:
    xk, w, t, rows = _kept(x, weight, targets, rows)
    a, b = _upstream(g_nll, g_lse, t, rows)
    dx, dw = _nll_torch_backward(a, b, xk, w, t, lse.index_select(0, rows), saved if impl.endswith('keep') else None)
    return _scatter(len(x), rows, dx, x.dtype), dw.to(weight.dtype)


@_linear_nll_backward.register_fake
def _(g_nll, g_lse, x, weight, targets, rows, lse, saved, impl):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight, memory_format=torch.contiguous_format)


def _linear_nll_setup(ctx, inputs, output):
    x, weight, targets, rows, ctx.impl = inputs
    ctx.save_for_backward(x, weight, targets, rows, output[1], output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)                      # else a missing gradient of `saved` becomes zeros of its size


def _linear_nll_autograd(ctx, g_nll, g_lse, _):
    x, weight, targets, rows, lse, saved = ctx.saved_tensors
    g_nll, g_lse = (torch.zeros_like(lse) if g is None else g for g in (g_nll, g_lse))
    dx, dw = _linear_nll_backward(g_nll, g_lse, x, weight, targets, rows, lse, saved, ctx.impl)
    return dx, dw, None, None, None


_linear_nll.register_autograd(_linear_nll_autograd, setup_context=_linear_nll_setup)


def _check_targets(targets, V):
    bad = (targets != IGNORE_INDEX) & ((targets < 0) | (targets >= V))
    if bad.any():
        i = int(bad.nonzero()[0])
        raise ValueError(f'linear_cross_entropy: targets[{i}] = {int(targets[i])}, expected 0..{V - 1} or {IGNORE_INDEX} (no loss)')


def linear_cross_entropy(x, weight, targets, *, rows=None, impl='auto'):
    """
    Negative log-likelihood and log-sum-exp of softmax(x @ weight.T) per row, computed only where a target carries loss.
    x        (N, C) float; float64 is computed in float64 (for tests), everything else in float32 or with float32 accumulation
    weight   (V, C) float, may have another dtype than x (float32 master weights); its gradient comes in its own dtype
    targets  (N,) int, 0..V-1 or IGNORE_INDEX
    rows     (n,) int64 or None: the rows that carry loss, each once; saves a wait for the device on a GPU
    impl     'auto', 'torch', 'triton' (logits recomputed in the backward), 'triton-keep' (kept)
    returns  nll (N,), lse (N,) float32 in nats, 0 at ignored rows; gradients flow through both to x and weight
    Raises ValueError for shapes that do not fit and, on a CPU or with CKPT80_KERNELS=debug, for a target out of range.
    The loss is then plain PyTorch: (w * (nll + z * lse**2)).sum() / denominator.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or targets.shape != x.shape[:1]:
        raise ValueError(f'linear_cross_entropy: x {tuple(x.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}: '
                         'expected (N, C), (V, C), (N,)')
    if hasattr(weight, 'to_local'):
        raise ValueError('linear_cross_entropy: weight is a sharded DTensor: gather it first (weight.full_tensor())')
    if torch.is_autocast_enabled(x.device.type) and x.dtype == torch.float32:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    targets = targets.long()
    if rows is None and not torch.compiler.is_compiling():
        rows = (targets != IGNORE_INDEX).nonzero()[:, 0]
    bytes_kept = 0 if rows is None else rows.shape[0] * weight.shape[0] * 4
    keep = rows is not None and bytes_kept <= KEEP_LOGITS_BYTES['cuda' if x.is_cuda else 'cpu']
    return _linear_nll(x, weight, targets, rows, 'torch-keep' if keep else 'torch')[:2]


# === attention under an interval mask ======================================================================
#
# Query i of row b sees the keys [lo_bi, hi_bi), an interval. Causal attention, PrefixLM, packed documents, padding and their products
# are all of this form, so two int32 vectors describe every mask of this project, and a new batch never recompiles anything:
#     s_ij = scale q_i . k_j,   p_ij = exp(s_ij - lse_i) if lo_i <= j < hi_i else 0,   o_i = sum_j p_ij v_j
# A query that sees nothing (padding) gives o = 0. With the gradient do:
#     dv_j = sum_i p_ij do_i,   ds_ij = p_ij (do_i . v_j - do_i . o_i),   dq_i = scale sum_j ds_ij k_j,   dk_j = scale sum_i ds_ij q_i

@dataclass(frozen=True, eq=False)
class Intervals:
    """
    Which keys each query sees, and which queries see each key: intervals in both directions.
    lo, hi    (B, Tq) int32: query i of row b sees the keys [lo, hi)
    qlo, qhi  (B, Tk) int32 or None: key j is seen by the queries [qlo, qhi); the same relation, needed by the backward kernel
    kind      'causal', 'prefix', 'documents', 'cached' or '' (anything else)
    n_prefix  'prefix' only: the prefix length when it is one number, known on the host, for all rows; else None
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
        i = torch.arange(T, dtype=torch.int32, device=device).expand(B, T)
        return Intervals(torch.zeros_like(i), i + 1, i.contiguous(), torch.full_like(i, T), 'causal')

    @staticmethod
    def prefix(prefix_len, T, device=None):
        """Causal, but the first prefix_len[b] positions of row b see each other both ways. prefix_len (B,) int on the host or the
        device; lengths beyond T count as T. A host tensor of equal lengths lets attention use two dense calls."""
        n = prefix_len[0].item() if prefix_len.device.type == 'cpu' and (prefix_len == prefix_len[:1]).all() else None
        p = prefix_len.clamp(0, T).to(device or prefix_len.device, torch.int32)[:, None]                     # (B, 1)
        i = torch.arange(T, dtype=torch.int32, device=p.device).expand(len(p), T)
        qlo = torch.where(i < p, 0, i)
        return Intervals(torch.zeros_like(i), torch.maximum(i + 1, p), qlo, torch.full_like(i, T), 'prefix',
                         None if n is None else min(max(n, 0), T))

    @staticmethod
    def documents(segment_ids, prefix_len=None):
        """Causal inside each document. segment_ids (B, T) int: a run of equal ids is a document, a negative id is padding (sees nothing,
        seen by nothing). prefix_len None, (B,) or (B, T) int: the first so many positions of the document see each other both ways."""
        B, T = segment_ids.shape
        i = torch.arange(T, device=segment_ids.device).expand(B, T)
        first = torch.ones_like(segment_ids, dtype=torch.bool)
        first[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
        start = torch.where(first, i, 0).cummax(1).values                                                  # (B, T) where my document starts
        last = first.roll(-1, 1)
        last[:, -1:] = True
        end = torch.where(last, i + 1, T).flip(1).cummin(1).values.flip(1)                                 # (B, T) and ends
        p = start if prefix_len is None else torch.minimum(start + prefix_len.reshape(B, -1).clamp(min=0), end)
        hi, qlo = torch.maximum(i + 1, p), torch.where(i < p, start, i)
        real = segment_ids >= 0
        lo, hi, qlo, qhi = (torch.where(real, y, 0).int() for y in (start, hi, qlo, end))
        return Intervals(lo, hi, qlo, qhi, 'documents')

    @staticmethod
    def cached(position, Tk):
        """Generation with a key-value cache of Tk slots: query at `position` (B, Tq) int sees the slots 0..position. No backward kernel."""
        hi = (position + 1).clamp(max=Tk).int()
        return Intervals(torch.zeros_like(hi), hi, kind='cached')


def _attention_torch(q, k, v, mask, scale):
    """The reference: PyTorch's own scaled_dot_product_attention, with a boolean mask where it has nothing better."""
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    if mask.kind == 'causal' and q.shape[2] == k.shape[2]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)                        # no mask in memory
    j = torch.arange(k.shape[2], dtype=torch.int32, device=q.device)
    empty = (mask.hi <= mask.lo)[:, None, :, None]                                                         # (B, 1, Tq, 1)
    seen = (j >= mask.lo[:, None, :, None]) & (j < mask.hi[:, None, :, None])                              # (B, 1, Tq, Tk)
    # a query that sees nothing is shown everything and then erased: softmax over no key would be nan, in the gradients too
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen | empty, scale=scale)
    return o.masked_fill(empty, 0)


def attention(q, k, v, mask=None, *, scale=None, impl='auto'):
    """
    Softmax attention under an interval mask.
    q        (B, H, Tq, D) float; k, v (B, H, Tk, D): any strides, so views of one packed projection are fine
    mask     Intervals or None (every query sees every key)
    scale    float, None = D ** -0.5
    impl     'auto', 'torch', 'triton'
    returns  o (B, H, Tq, D) in q's dtype; 0 where a query sees nothing, with zero (finite) gradients
    Raises ValueError for shapes that do not fit. FlashAttention-2 (arXiv 2307.08691) with intervals for a mask.
    """
    B, H, Tq, D = q.shape
    if k.shape != v.shape or k.shape[:2] != (B, H) or k.shape[3] != D:
        raise ValueError(f'attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: expected (B, H, Tq, D) and twice (B, H, Tk, D)')
    if mask is not None and mask.lo.shape != (B, Tq):
        raise ValueError(f'attention: mask of shape {tuple(mask.lo.shape)} for queries {(B, Tq)} (B, Tq)')
    return _attention_torch(q, k, v, mask, scale)


DEBUG = os.environ.get('CKPT80_KERNELS') == 'debug'       # check targets on the GPU, too (waits for the device every call)
