"""
What stands between an image encoder and a decoder: projectors of features to the decoder's width.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from fused import layer_norm
from kernels import Intervals, attention


class Projector(nn.Module):
    """Image features to the decoder's width: Linear to 4 x the encoder's width, GELU, Linear down (appendix B)."""
    def __init__(self, n_in, n_out):
        super().__init__()
        self.fc1 = nn.Linear(n_in, 4 * n_in)
        self.fc2 = nn.Linear(4 * n_in, n_out)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


PROJECTORS = {'mlp2': Projector}


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
