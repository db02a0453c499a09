"""
Between a block's products, each as the maths, the plain reference, the kernels:

    q, k, v = qk_norm_rotary(qkv, q_gain, k_gain, cos, sin, n_head, eps)     # LayerNorm of q and k, rotary
    s, n = add_norm(x, y, gain, eps)                                         # residual stream and its LayerNorm
    h = swiglu(packed)                                                       # silu(gate) * up

Which one runs is policy.POLICY's matter.
"""
import operator
from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from policy import _aligned, _choose, _config, _launch_on, _strides, triton

if triton is not None:
    import triton.language as tl

N_PROGRAM = 256                 # of the norms' backward, each with a share of the rows: gains' gradients add up by it


def layer_norm(x, weight, eps):
    """LayerNorm of x (..., C) with a gain and no bias; under autocast in the low precision, as OpenLM's LPLayerNorm."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return F.layer_norm(x, weight.shape, weight, None, eps)
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        return F.layer_norm(x.to(dtype), weight.shape, weight.to(dtype), None, eps)


def _dense(x):
    return _aligned(x.contiguous())


# === LayerNorm of q and k, rotary ===========================================================================
#
# For each token, u its q or k over all heads (C,), g the gain, at head h and feature d < D/2 with angle theta_td:
#     n = g (u - mean u) / sqrt(var u + eps)
#     y_h,d = n_h,d cos - n_h,d+D/2 sin,   y_h,d+D/2 = n_h,d+D/2 cos + n_h,d sin
# With the gradient dy of y, the rotation back gives dn, and with the normalised x = (u - mean) rstd:
#     dg = sum over tokens of dn x,   du = rstd (g dn - mean(g dn) - x mean(g dn x))
# Counted in tensors (B,T,C) of 16 bits, forward and backward: eager PyTorch moves 99, most of them the rotation's
# float32, the kernel 14: it reads q, k, v, dq, dk, dv, and q and k again, and writes q, k, v and dqkv.

# --- reference
def rotate(x, cos, sin):
    """Rotary embedding, half-split ("rotate half"): x (B,H,T,D), cos and sin broadcastable to it, in x's dtype."""
    x1, x2 = x.chunk(2, -1)
    return (x * cos + torch.cat((-x2, x1), -1) * sin).to(x.dtype)


def _qk_norm_rotary_torch(qkv, q_gain, k_gain, cos, sin, n_head, eps):
    q, k, v = qkv.chunk(3, -1)                                               # (B,T,C) each
    if q_gain is not None:
        q, k = layer_norm(q, q_gain, eps), layer_norm(k, k_gain, eps)
    q, k, v = (y.unflatten(-1, (n_head, -1)).transpose(1, 2) for y in (q, k, v))             # (B,H,T,D)
    return rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype), v


# --- kernels
# A program owns a token's q, k or v, whole, in float32 registers: (heads, D/2) twice. v is only copied, so that qkv has
# one gradient, written in place by one kernel. The gains' gradients are summed by program, then over the programs:
# no atomics, so two runs are bit-equal.
if triton is not None:
    @triton.jit
    def _load_halves(X, sh, n_head, H: tl.constexpr, D: tl.constexpr):
        """Both halves of each head of a row, (H, D/2) float32 each; heads beyond n_head are 0."""
        h, d = tl.arange(0, H)[:, None], tl.arange(0, D // 2)[None, :]
        there = (h < n_head) & (d >= 0)
        return (tl.load(X + h * sh + d, mask=there, other=0.0).to(tl.float32),
                tl.load(X + h * sh + D // 2 + d, mask=there, other=0.0).to(tl.float32))

    @triton.jit
    def _store_halves(X, x1, x2, n_head, H: tl.constexpr, D: tl.constexpr):
        h, d = tl.arange(0, H)[:, None], tl.arange(0, D // 2)[None, :]
        there = (h < n_head) & (d >= 0)
        tl.store(X + h * D + d, x1.to(X.dtype.element_ty), mask=there)
        tl.store(X + h * D + D // 2 + d, x2.to(X.dtype.element_ty), mask=there)

    @triton.jit(do_not_specialize=['T'])
    def _qk_forward_kernel(QKV, Q, K, V, QG, KG, COS, SIN, STAT, scb, T, n_head, eps, H: tl.constexpr, D: tl.constexpr):
        """Program (row, part): a token's q, k or v. STAT (B*T, 2, 2) float32: mean and 1/std of q, of k."""
        row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
        C = n_head * D
        x1, x2 = _load_halves(QKV + (3 * row + part) * C, D, n_head, H, D)
        if part == 2:
            _store_halves(V + row * C, x1, x2, n_head, H, D)
        else:
            there = (tl.arange(0, H) < n_head)[:, None]
            mean = (tl.sum(x1) + tl.sum(x2)) / C
            x1, x2 = tl.where(there, x1 - mean, 0.0), tl.where(there, x2 - mean, 0.0)
            rstd = 1.0 / tl.sqrt((tl.sum(x1 * x1) + tl.sum(x2 * x2)) / C + eps)
            tl.store(STAT + row * 4 + part * 2, mean)
            tl.store(STAT + row * 4 + part * 2 + 1, rstd)
            if part == 0:
                g1, g2 = _load_halves(QG, D, n_head, H, D)
            else:
                g1, g2 = _load_halves(KG, D, n_head, H, D)
            at = row // T * scb + row % T * D + tl.arange(0, D // 2)
            cos, sin = tl.load(COS + at)[None, :], tl.load(SIN + at)[None, :]
            x1, x2 = x1 * rstd * g1, x2 * rstd * g2
            y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
            if part == 0:
                _store_halves(Q + row * C, y1, y2, n_head, H, D)
            else:
                _store_halves(K + row * C, y1, y2, n_head, H, D)

    @triton.jit(do_not_specialize=['n_row', 'T'])
    def _qk_backward_kernel(DQ, DK, DV, QKV, DQKV, QG, KG, DG, COS, SIN, STAT, sqb, sqh, sqt, skb, skh, skt,
                            svb, svh, svt, scb, n_row, T, n_head, H: tl.constexpr, D: tl.constexpr):
        """Program (share of the rows, part): their gradients of q, k or v -> DQKV; the sum of the gains' -> DG
        (programs, 2, C) float32."""
        part = tl.program_id(1)
        C = n_head * D
        if part == 2:
            for i in range(tl.program_id(0), n_row, tl.num_programs(0)):
                row = tl.cast(i, tl.int64)
                d1, d2 = _load_halves(DV + row // T * svb + row % T * svt, svh, n_head, H, D)
                _store_halves(DQKV + (3 * row + 2) * C, d1, d2, n_head, H, D)
        else:
            if part == 0:
                g1, g2 = _load_halves(QG, D, n_head, H, D)
            else:
                g1, g2 = _load_halves(KG, D, n_head, H, D)
            there = (tl.arange(0, H) < n_head)[:, None]
            sum1, sum2 = tl.zeros((H, D // 2), tl.float32), tl.zeros((H, D // 2), tl.float32)
            for i in range(tl.program_id(0), n_row, tl.num_programs(0)):
                row = tl.cast(i, tl.int64)
                b, t = row // T, row % T
                if part == 0:
                    d1, d2 = _load_halves(DQ + b * sqb + t * sqt, sqh, n_head, H, D)
                else:
                    d1, d2 = _load_halves(DK + b * skb + t * skt, skh, n_head, H, D)
                at = b * scb + t * D + tl.arange(0, D // 2)
                cos, sin = tl.load(COS + at)[None, :], tl.load(SIN + at)[None, :]
                n1, n2 = d1 * cos + d2 * sin, d2 * cos - d1 * sin
                mean, rstd = tl.load(STAT + row * 4 + part * 2), tl.load(STAT + row * 4 + part * 2 + 1)
                x1, x2 = _load_halves(QKV + (3 * row + part) * C, D, n_head, H, D)
                x1, x2 = tl.where(there, (x1 - mean) * rstd, 0.0), tl.where(there, (x2 - mean) * rstd, 0.0)
                sum1, sum2 = sum1 + n1 * x1, sum2 + n2 * x2
                n1, n2 = n1 * g1, n2 * g2
                shift = (tl.sum(n1) + tl.sum(n2)) / C
                slope = (tl.sum(n1 * x1) + tl.sum(n2 * x2)) / C
                _store_halves(DQKV + (3 * row + part) * C, rstd * (n1 - shift - x1 * slope),
                              rstd * (n2 - shift - x2 * slope), n_head, H, D)
            _store_halves(DG + (tl.program_id(0) * 2 + part) * C, sum1, sum2, n_head, H, D)


def _heads(qkv, n_head):
    """Three empty (B,H,T,D) whose memory is (B,T,H,D)."""
    B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    return tuple(qkv.new_empty(B, T, n_head, C // n_head).transpose(1, 2) for _ in range(3))


def _padded(n_head):
    return 1 << (n_head - 1).bit_length()


# --- operator
@torch.library.custom_op('ckpt80::qk_norm_rotary', mutates_args=())
def _qk_norm_rotary(qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, n_head: int,
                    eps: float) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v (B,H,T,D); and mean and 1/std of q and of k, (B,T,2,2) float32. cos, sin (1 or B,T,D) float32."""
    (B, T, _), D = qkv.shape, cos.shape[-1]
    q, k, v = _heads(qkv, n_head)
    stat = qkv.new_empty(B, T, 2, 2, dtype=torch.float32)
    with _launch_on(qkv):
        if B * T:
            _qk_forward_kernel[(B * T, 3)](
                _dense(qkv), q, k, v, q_gain, k_gain, _dense(cos), _dense(sin), stat, T * D * (len(cos) > 1), T, n_head,
                eps, H=_padded(n_head), D=D, **_config('qk_forward', qkv.device, D))
    return q, k, v, stat


@_qk_norm_rotary.register_fake
def _(qkv, q_gain, k_gain, cos, sin, n_head, eps):
    return *_heads(qkv, n_head), qkv.new_empty(*qkv.shape[:2], 2, 2, dtype=torch.float32)


@torch.library.custom_op('ckpt80::qk_norm_rotary_backward', mutates_args=())
def _qk_norm_rotary_backward(dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, q_gain: Tensor, k_gain: Tensor,
                             cos: Tensor, sin: Tensor, stat: Tensor, n_head: int) -> Tuple[Tensor, Tensor, Tensor]:
    (B, T, width), D = qkv.shape, cos.shape[-1]
    n_program = min(N_PROGRAM, B * T)
    dqkv, dg = qkv.new_empty(qkv.shape), qkv.new_empty(n_program, 2, width // 3, dtype=torch.float32)
    dq, dk, dv = _aligned(dq), _aligned(dk), _aligned(dv)
    with _launch_on(qkv):
        if B * T:
            _qk_backward_kernel[(n_program, 3)](
                dq, dk, dv, _dense(qkv), dqkv, q_gain, k_gain, dg, _dense(cos), _dense(sin), stat,
                *_strides(dq, dk, dv), T * D * (len(cos) > 1), B * T, T, n_head, H=_padded(n_head), D=D,
                **_config('qk_backward', qkv.device, D))
        dg = dg.sum(0)
    return dqkv, dg[0].to(q_gain.dtype, copy=True), dg[1].to(k_gain.dtype, copy=True)


@_qk_norm_rotary_backward.register_fake
def _(dq, dk, dv, qkv, q_gain, k_gain, cos, sin, stat, n_head):
    return qkv.new_empty(qkv.shape), q_gain.new_empty(q_gain.shape), k_gain.new_empty(k_gain.shape)


def _setup(ctx, inputs, output):
    *tensors, ctx.n_head, _ = inputs
    ctx.save_for_backward(*tensors, output[3])
    ctx.mark_non_differentiable(output[3])


def _autograd(ctx, dq, dk, dv, _):
    return *_qk_norm_rotary_backward(dq, dk, dv, *ctx.saved_tensors, ctx.n_head), None, None, None, None


_qk_norm_rotary.register_autograd(_autograd, setup_context=_setup)


def qk_norm_rotary(qkv, q_gain, k_gain, cos, sin, n_head, eps, *, impl='auto'):
    """
    q, k and v for attention out of one projection: LayerNorm of q and k over all heads, then rotary.
    qkv             (B, T, 3 C) float: q, k, v side by side
    q_gain, k_gain  (C,) float, or None for no LayerNorm
    cos, sin        (T, D) or (B, 1, T, D) float32, both halves of D alike; no gradient
    n_head, eps     int, float
    impl            'auto', 'torch', 'triton' (D 64 or 128, C up to 4096, 16-bit)
    returns         q, k, v (B, H, T, D) in the dtype of qkv
    Raises ValueError for shapes that do not fit. The reference rounds between norm and rotation, the kernel does not.
    """
    B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    D = C // n_head
    if qkv.shape[2] != 3 * n_head * D or cos.shape[-2:] != (T, D) or sin.shape != cos.shape:
        raise ValueError(f'qk_norm_rotary: qkv {tuple(qkv.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}, '
                         f'{n_head} heads: expected (B, T, 3 * heads * D), (T, D) or (B, 1, T, D), twice')
    obstacle = ('no gains' if q_gain is None else f'width {C}, above 4096' if _padded(n_head) * D > 4096 else '')
    impl = _choose('qk-norm', 'rotary', impl, qkv.device, qkv.dtype, operator.index(D), obstacle)
    if impl == 'torch':
        return _qk_norm_rotary_torch(qkv, q_gain, k_gain, cos, sin, n_head, eps)
    cos, sin = (y.reshape(-1, T, D) for y in (cos, sin))
    return _qk_norm_rotary(qkv, q_gain, k_gain, cos, sin, n_head, eps)[:3]


# === residual and norm ======================================================================================
#
# For each token, with the stream x, the update y and the gain g, all (C,):
#     s = x + y,   n = g z,   z = (s - mean s) / sqrt(var s + eps)
# With the gradients ds of s and dn of n:
#     dg = sum over tokens of dn z,   dx = dy = ds + (g dn - mean(g dn) - z mean(g dn z)) / sqrt(var s + eps)
# What is saved is z in 16 bits, as much as eager PyTorch keeps. Counted in tensors (B,T,C) of 16 bits, forward and
# backward, with x, s in float32 as under autocast: eager PyTorch moves 25, the kernels 14: they read x, y and write s,
# n, z, then read ds, dn, z and write dx, dy.

# --- reference
def _add_norm_torch(x, y, gain, eps):
    s = x + y
    return s, layer_norm(s, gain, eps)


# --- kernels
if triton is not None:
    @triton.jit
    def _load_row(X, row, C, c):
        return tl.load(X + row * C + c, mask=c < C, other=0.0).to(tl.float32)

    @triton.jit
    def _store_row(X, x, row, C, c):
        tl.store(X + row * C + c, x.to(X.dtype.element_ty), mask=c < C)

    @triton.jit
    def _add_norm_kernel(X, Y, G, S, N, Z, RSTD, C, eps, BLOCK: tl.constexpr):
        """A token's s, n and z; 1/std -> RSTD (tokens,) float32."""
        row, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        s = _load_row(X, row, C, c) + _load_row(Y, row, C, c)
        _store_row(S, s, row, C, c)
        s = tl.where(c < C, s - tl.sum(s) / C, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(s * s) / C + eps)
        tl.store(RSTD + row, rstd)
        _store_row(Z, s * rstd, row, C, c)
        _store_row(N, s * rstd * _load_row(G, 0, C, c), row, C, c)

    @triton.jit(do_not_specialize=['n_row'])
    def _add_norm_backward_kernel(DS, DN, Z, RSTD, G, DX, DY, DG, n_row, C, BLOCK: tl.constexpr):
        """dx and dy of a share of the tokens; the sum of their dg -> DG (programs, C) float32."""
        c = tl.arange(0, BLOCK)
        g, total = _load_row(G, 0, C, c), tl.zeros((BLOCK,), tl.float32)
        for i in range(tl.program_id(0), n_row, tl.num_programs(0)):
            row = tl.cast(i, tl.int64)
            dn, z = _load_row(DN, row, C, c), _load_row(Z, row, C, c)
            total += dn * z
            dn *= g
            d = (dn - tl.sum(dn) / C - z * (tl.sum(dn * z) / C)) * tl.load(RSTD + row) + _load_row(DS, row, C, c)
            _store_row(DX, d, row, C, c)
            _store_row(DY, d, row, C, c)
        _store_row(DG, total, tl.program_id(0), C, c)


# --- operator
@torch.library.custom_op('ckpt80::add_norm', mutates_args=())
def _add_norm(x: Tensor, y: Tensor, gain: Tensor, eps: float, dtype: torch.dtype) -> Tuple[
        Tensor, Tensor, Tensor, Tensor]:
    """s; n and z in `dtype`; and 1/std."""
    s, n, z, rstd = _add_norm_empty(x, y, dtype)
    with _launch_on(x):
        if x.numel():
            _add_norm_kernel[(rstd.numel(),)](_dense(x), _dense(y), gain, s, n, z, rstd, x.shape[-1], eps,
                                              BLOCK=_padded(x.shape[-1]), **_config('add_norm', x.device))
    return s, n, z, rstd


@_add_norm.register_fake
def _(x, y, gain, eps, dtype):
    return _add_norm_empty(x, y, dtype)


def _add_norm_empty(x, y, dtype):
    return (x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, y.dtype)),
            *(x.new_empty(x.shape, dtype=dtype) for _ in range(2)), x.new_empty(x.shape[:-1], dtype=torch.float32))


@torch.library.custom_op('ckpt80::add_norm_backward', mutates_args=())
def _add_norm_backward(ds: Tensor, dn: Tensor, z: Tensor, rstd: Tensor, gain: Tensor, x_dtype: torch.dtype,
                       y_dtype: torch.dtype) -> Tuple[Tensor, Tensor, Tensor]:
    C, n_row = z.shape[-1], rstd.numel()
    dx, dy = (z.new_empty(z.shape, dtype=dtype) for dtype in (x_dtype, y_dtype))
    dg = z.new_empty(min(N_PROGRAM, n_row), C, dtype=torch.float32)
    with _launch_on(z):
        if n_row:
            _add_norm_backward_kernel[(len(dg),)](_dense(ds), _dense(dn), z, rstd, gain, dx, dy, dg, n_row, C,
                                                  BLOCK=_padded(C), **_config('add_norm_backward', z.device))
        return dx, dy, dg.sum(0).to(gain.dtype)


@_add_norm_backward.register_fake
def _(ds, dn, z, rstd, gain, x_dtype, y_dtype):
    return *(z.new_empty(z.shape, dtype=dtype) for dtype in (x_dtype, y_dtype)), gain.new_empty(gain.shape)


def _add_norm_setup(ctx, inputs, output):
    x, y, gain, *_ = inputs
    ctx.dtypes = x.dtype, y.dtype
    ctx.save_for_backward(*output[2:], gain)
    ctx.mark_non_differentiable(*output[2:])


def _add_norm_autograd(ctx, ds, dn, *_):
    return *_add_norm_backward(ds, dn, *ctx.saved_tensors, *ctx.dtypes), None, None


_add_norm.register_autograd(_add_norm_autograd, setup_context=_add_norm_setup)


def add_norm(x, y, gain, eps, *, impl='auto'):
    """
    The residual stream s = x + y and its LayerNorm, with a gain and no bias.
    x, y     (..., C) float, each in its dtype
    gain     (C,) float
    impl     'auto', 'torch', 'triton' (C up to 8192, a norm of 16 bits)
    returns  s (..., C) in the wider dtype of x and y; its norm (..., C), under autocast in the low precision
    Raises ValueError for shapes that do not fit. The reference rounds s before the norm, the kernel does not.
    """
    if x.shape != y.shape or gain.shape != x.shape[-1:]:
        raise ValueError(f'add_norm: x {tuple(x.shape)}, y {tuple(y.shape)}, gain {tuple(gain.shape)}: '
                         'expected (..., C) twice, (C,)')
    device, C = x.device, operator.index(x.shape[-1])
    low = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if low else torch.promote_types(x.dtype, y.dtype)
    obstacle = f'width {C}, above 8192' if C > 8192 else ''
    if _choose('add-norm', 'residual', impl, device, dtype, C, obstacle) == 'torch':
        return _add_norm_torch(x, y, gain, eps)
    return _add_norm(x, y, gain, eps, dtype)[:2]


# === SwiGLU =================================================================================================
#
# With the gate g and up u, the halves of one projection, and r = 1 / (1 + exp(-g)):
#     h = g r u,   du = dh g r,   dg = dh u r (1 + g (1 - r))
# The projection alone is saved, without silu(g). Counted in tensors (B,T,F) of 16 bits, forward and backward: eager
# PyTorch moves 18, the kernels 8: they read g, u and write h, then read dh, g, u and write dg, du.

# --- reference
def _swiglu_torch(packed):
    gate, up = packed.chunk(2, -1)
    return F.silu(gate) * up


# --- kernels
if triton is not None:
    @triton.jit
    def _swiglu_kernel(X, H, width, BLOCK: tl.constexpr):
        """Program (token, part): BLOCK features of its h; X is the packed projection, h has `width` features."""
        row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        g, u = _load_row(X, 2 * row, width, c), _load_row(X, 2 * row + 1, width, c)
        _store_row(H, g * u / (1.0 + tl.exp(-g)), row, width, c)

    @triton.jit
    def _swiglu_backward_kernel(DH, X, DX, width, BLOCK: tl.constexpr):
        row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        g, u, dh = _load_row(X, 2 * row, width, c), _load_row(X, 2 * row + 1, width, c), _load_row(DH, row, width, c)
        r = 1.0 / (1.0 + tl.exp(-g))
        _store_row(DX, dh * u * r * (1.0 + g * (1.0 - r)), 2 * row, width, c)
        _store_row(DX, dh * g * r, 2 * row + 1, width, c)


# --- operator
@torch.library.custom_op('ckpt80::swiglu', mutates_args=())
def _swiglu(packed: Tensor) -> Tensor:
    width, config = packed.shape[-1] // 2, _config('swiglu', packed.device)
    h = packed.new_empty(*packed.shape[:-1], width)
    with _launch_on(packed):
        if h.numel():
            grid = h.numel() // width, triton.cdiv(width, config['BLOCK'])
            _swiglu_kernel[grid](_dense(packed), h, width, **config)
    return h


@_swiglu.register_fake
def _(packed):
    return packed.new_empty(*packed.shape[:-1], packed.shape[-1] // 2)


@torch.library.custom_op('ckpt80::swiglu_backward', mutates_args=())
def _swiglu_backward(dh: Tensor, packed: Tensor) -> Tensor:
    dx, config = packed.new_empty(packed.shape), _config('swiglu_backward', packed.device)
    with _launch_on(packed):
        if dh.numel():
            grid = dh.numel() // dh.shape[-1], triton.cdiv(dh.shape[-1], config['BLOCK'])
            _swiglu_backward_kernel[grid](_dense(dh), _dense(packed), dx, dh.shape[-1], **config)
    return dx


@_swiglu_backward.register_fake
def _(dh, packed):
    return packed.new_empty(packed.shape)


_swiglu.register_autograd(lambda ctx, dh: _swiglu_backward(dh, *ctx.saved_tensors),
                          setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def swiglu(packed, *, impl='auto'):
    """
    silu(gate) * up of one projection (SwiGLU, arXiv 2002.05202).
    packed   (..., 2 F) float: gate and up side by side
    impl     'auto', 'torch', 'triton' (16-bit)
    returns  (..., F) in the dtype of packed
    Raises ValueError for an odd width.
    """
    width = operator.index(packed.shape[-1])
    if width % 2:
        raise ValueError(f'swiglu: packed {tuple(packed.shape)}: expected (..., 2 F)')
    if _choose('swiglu', 'packed', impl, packed.device, packed.dtype, width) == 'torch':
        return _swiglu_torch(packed)
    return _swiglu(packed)
