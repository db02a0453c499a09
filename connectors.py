"""
What stands between an image encoder and a decoder: projectors of features to the decoder's width, and how many tokens
they make of an image.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from errors import UserError
from fused import layer_norm
from images import token_grid
from kernels import Intervals, attention
from vision import EncoderBlock, SigLIPConfig


class Projector(nn.Module):
    """Image features to the decoder's width: Linear to 4 x the encoder's width, GELU, Linear down (appendix B)."""
    def __init__(self, n_in, n_out):
        super().__init__()
        self.fc1 = nn.Linear(n_in, 4 * n_in)
        self.fc2 = nn.Linear(4 * n_in, n_out)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class MLP4(nn.Sequential):
    """Linear to the decoder's width, then three of GELU and Linear: LLaVA's mlp4x_gelu. Weights as torch draws them."""
    def __init__(self, n_in, n_out):
        super().__init__(nn.Linear(n_in, n_out), *(m for _ in range(3) for m in (nn.GELU(), nn.Linear(n_out, n_out))))


def head_count(width):
    """The number of heads, a divisor of width, that brings a head's width closest to SigLIP so400m's: 16 of 72."""
    return min((n for n in range(1, width + 1) if width % n == 0), key=lambda n: abs(width / n - 72))


class AttentionProjector(nn.Sequential):
    """
    Two pre-norm, bidirectional transformer blocks over an image's features at the encoder's width, feed-forward GELU of
    4 x that, without further positions; then Linear. Weights as torch draws them.
    """
    def __init__(self, n_in, n_out):
        shape = SigLIPConfig(n_in, 4 * n_in, num_attention_heads=head_count(n_in), hidden_act='gelu')
        super().__init__(EncoderBlock(shape), EncoderBlock(shape), nn.Linear(n_in, n_out))


class PerceiverBlock(nn.Module):
    """Latents read features and each other, then a SwiGLU of 4 x the width; parameter names are transformers'."""
    def __init__(self, width):
        super().__init__()
        linear = lambda n_in, n_out: nn.Linear(n_in, n_out, bias=False)
        self.n_head = head_count(width)
        self.input_latents_norm, self.input_context_norm, self.post_attention_layernorm = (
            nn.RMSNorm(width, eps=1e-6) for _ in range(3))
        self.self_attn = nn.ModuleDict({f'{name}_proj': linear(width, width) for name in 'qkvo'})
        self.mlp = nn.ModuleDict({'gate_proj': linear(width, 4 * width), 'up_proj': linear(width, 4 * width),
                                  'down_proj': linear(4 * width, width)})

    def forward(self, z, x):
        """z (N,n,C) latents, x (N,T,C) features -> (N,n,C)"""
        own = self.input_latents_norm(z)
        both = torch.cat((self.input_context_norm(x), own), 1)                   # (N,T+n,C)
        q, k, v = (self.self_attn[f'{name}_proj'](y).unflatten(2, (self.n_head, -1)).transpose(1, 2)
                   for name, y in (('q', own), ('k', both), ('v', both)))        # (N,H,n,D), twice (N,H,T+n,D)
        z = z + self.self_attn['o_proj'](attention(q, k, v).transpose(1, 2).flatten(2))
        h = self.post_attention_layernorm(z)
        return z + self.mlp['down_proj'](F.silu(self.mlp['gate_proj'](h)) * self.mlp['up_proj'](h))


class Perceiver(nn.Module):
    """
    n_token learned latents that read an image's features in three blocks at the encoder's width, then Linear:
    Idefics2's resampler (arXiv 2405.02246), but with as many heads of keys and values as of queries.
    features (N,T,n_in), any T -> (N,n_token,n_out)
    Weights as torch draws them; latents normal of std 0.02: all equal, as transformers begins, they can stay so.
    """
    def __init__(self, n_in, n_out, n_token):
        super().__init__()
        self.latents = nn.Parameter(torch.empty(n_token, n_in))
        nn.init.normal_(self.latents, std=0.02)
        self.layers = nn.ModuleList(PerceiverBlock(n_in) for _ in range(3))
        self.norm = nn.RMSNorm(n_in, eps=1e-6)
        self.output = nn.Linear(n_in, n_out)

    def forward(self, x):
        z = self.latents.expand(len(x), -1, -1)                                  # (N,n_token,n_in)
        for layer in self.layers:
            z = layer(z, x)
        return self.output(self.norm(z))


class Pool(nn.Module):
    """The square grid of an image's features as one of h x w: averaged along a side that shrinks, else bilinear."""
    def __init__(self, h, w):
        super().__init__()
        self.h, self.w = h, w

    def forward(self, x):
        side = math.isqrt(x.shape[1])
        x = x.transpose(1, 2).unflatten(2, (side, side))                         # (N,C,side,side)
        x = F.adaptive_avg_pool2d(x, (min(self.h, side), min(self.w, side)))
        x = F.interpolate(x, (self.h, self.w), mode='bilinear', align_corners=False)
        return x.flatten(2).transpose(1, 2)                                      # (N,h*w,C)


PROJECTORS = {'linear': nn.Linear, 'mlp2': Projector, 'mlp4': MLP4, 'attn': AttentionProjector}


def projector_spec(config, n_given):
    """
    The description of the projector that a config asks for: a dict of kind and, unless it is n_given, n_token.
    config    dict with the keys projector, token_mode, image_tokens
    n_given   tokens of an image that the encoder gives, at the resolution of token_mode='res'
    Raises UserError for keys that contradict each other and for image_tokens that the mode cannot make.
    """
    kind, mode, n_token = config['projector'], config['token_mode'], config['image_tokens']
    if mode == 'query' and kind == 'mlp2':                                       # the default gives way
        kind = 'perceiver'
    if kind == 'perceiver' and mode in ('', 'query'):
        return dict(kind=kind, n_token=n_token or n_given)
    if kind == 'perceiver' or mode == 'query':
        wrong = "a perceiver makes its tokens by 'query', and no other projector does"
    elif mode and not n_token:
        wrong = 'give --image_tokens=N, the positions of an image'
    elif n_token in (0, n_given):
        return dict(kind=kind)
    elif mode == 'pool' and math.isqrt(n_given) ** 2 == n_given:
        return dict(kind=kind, n_token=math.prod(token_grid(n_token)))
    else:
        wrong = f"the encoder gives {n_given}; give " + ('another encoder_fusion, or --token_mode=query' if mode else
                                                         '--token_mode=pool, res or query to have others')
    raise UserError(f"projector={kind!r}, token_mode={mode!r}, image_tokens={n_token}: {wrong}")


def build_projector(spec, n_in, n_out):
    """The module of a description: an image's features (N,T,n_in) to tokens (N,n_token,n_out)."""
    kind, n_token = spec['kind'], spec.get('n_token')
    if kind == 'perceiver':
        return Perceiver(n_in, n_out, n_token)
    projector = PROJECTORS[kind](n_in, n_out)
    return nn.Sequential(Pool(*token_grid(n_token)), projector) if n_token else projector


# --- cross-attention to images --------------------------------------------------------------------------------------

@dataclass(eq=False)
class Sight:
    """
    What the rows of a batch see of M image slots, for all blocks. A position sees the last image at or before it in its
    row; one before any image sees nothing and passes every block as it is, so a text row is the decoder's own.
    blocks  CrossBlocks
    images  what each block reads: features (N,n,C), or a cache's keys and values (2,N,n,C)
    index   (M,) int64: which image is in the m-th slot; None = arange(M)
    rows    (R,) int64: the rows computed, all those with an image
    place   (M,) int64: where the row of the m-th slot stands in rows
    seeing  (R,T,1) bool: the positions that see an image
    mask    Intervals: what the T queries of a slot's row see of the slot's n keys
    """
    blocks: nn.ModuleList
    images: list
    index: torch.Tensor
    rows: torch.Tensor
    place: torch.Tensor
    seeing: torch.Tensor
    mask: Intervals

    @staticmethod
    def of(blocks, images, slots, n_image, index=None):
        """slots (B,T) bool: where the images of a batch are, n_image of them; a GPU is not waited for."""
        (B, T), M, n = slots.shape, n_image, images[0].shape[-2]
        at = (~slots).flatten().int().argsort(stable=True)[:M]                         # (M,) in reading order
        row = at // T
        order = (~slots.any(1)).int().argsort(stable=True)                             # (B,) rows with an image first
        shown = slots.cumsum(1)                                                        # (B,T) images so far
        here = shown[row] == shown.flatten()[at][:, None]                              # (M,T) the last one is mine
        rows, keys = order[:min(B, M)], torch.zeros(M, n, dtype=torch.int32, device=slots.device)
        first, hi = (at % T).int()[:, None], n * here.int()
        mask = Intervals(torch.zeros_like(hi), hi, keys + first, keys + first + here.sum(1, keepdim=True).int())
        return Sight(blocks, images, index, rows, order.argsort()[row], shown[rows, :, None] > 0, mask)

    @staticmethod
    def cached(blocks, images, shown, T):
        """One image a row: images (n_block,2,B,n,C), shown (B,) bool: has the row any; all T new positions see it."""
        every, n = torch.arange(len(shown), device=shown.device), images.shape[3]
        seeing = shown[:, None].expand(-1, T)                                          # (B,T)
        hi = n * seeing.int()
        return Sight(blocks, images, None, every, every, seeing[..., None],
                     Intervals(torch.zeros_like(hi), hi, kind='cached'))


class CrossBlock(nn.Module):
    """
    Gated cross-attention, then a gated SwiGLU (Flamingo, arXiv 2204.14198, in the shape of Idefics):
        x += tanh(a) out(attention(q(norm x), images));  x += tanh(b) ffn(norm x)
    Norms, heads and QK-norm are the decoder's, without rotary. Both gates start at 0, where the block changes no bit;
    nothing else may: a zero output matrix behind a gate of 0 would leave both without a gradient for ever.
    """
    def __init__(self, config):
        super().__init__()
        C, hidden = config.n_embd, config.n_ffn
        self.n_head, self.eps = config.n_head, config.norm_eps
        self.norm, self.ffn_norm = nn.Parameter(torch.ones(C)), nn.Parameter(torch.ones(C))
        self.q_norm, self.k_norm = (nn.Parameter(torch.ones(C)) if config.qk_norm else None for _ in range(2))
        self.q, self.kv, self.out = (nn.Linear(C, n * C, bias=False) for n in (1, 2, 1))
        self.w12, self.w3 = nn.Linear(C, 2 * hidden, bias=False), nn.Linear(hidden, C, bias=False)
        self.gates = nn.Parameter(torch.zeros(2))               # of attention and SwiGLU; without weight decay

    def keys_values(self, features):
        """features (N,n,C) -> keys, normalised, and values, (N,n,C) each."""
        k, v = self.kv(features).chunk(2, -1)
        return k if self.k_norm is None else layer_norm(k, self.k_norm, self.eps), v

    def forward(self, x, image, sight):
        """x (B,T,C), image: this block's part of sight.images -> (B,T,C)."""
        k, v = self.keys_values(image) if image.ndim == 3 else image                   # (N,n,C)
        if sight.index is not None:                             # once an image, and then for each slot that shows it
            k, v = (F.embedding(sight.index, y.flatten(1)).view(-1, *y.shape[1:]) for y in (k, v))     # (M,n,C)
        u = x[sight.rows]                                                              # (R,T,C)
        q = self.q(layer_norm(u, self.norm, self.eps))
        q = q if self.q_norm is None else layer_norm(q, self.q_norm, self.eps)
        q, k, v = (y.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for y in (q[sight.place], k, v))
        o = attention(q, k, v, sight.mask).transpose(1, 2).flatten(2)                  # (M,T,C)
        o = o.new_zeros(u.shape).index_add(0, sight.place, o)   # (R,T,C): all but one slot's are 0 at a position
        gate, ffn_gate = self.gates.tanh()
        u = u + gate * self.out(o)
        a, b = self.w12(layer_norm(u, self.ffn_norm, self.eps)).chunk(2, -1)
        u = u + (ffn_gate * self.w3(F.silu(a) * b)).masked_fill(~sight.seeing, 0)
        return x.index_copy(0, sight.rows, u)                                          # (B,T,C)


class CrossBlocks(nn.ModuleList):
    """A CrossBlock before every `every`-th block of a decoder, the first included. config: ModelConfig"""
    def __init__(self, config, every):
        super().__init__(CrossBlock(config) for _ in range(0, config.n_layer, every))
        self.every = every
