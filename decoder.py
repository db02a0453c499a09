"""
The decoder: OpenLM's architecture as the DCLM checkpoints use it (arXiv 2406.11794; appendix A of arXiv 2503.07603).

    decoder = Decoder(ModelConfig(n_layer=24, n_head=16, n_embd=2048))            # 1.4B, the script's default scale
    logits = decoder(tokens)
"""
import dataclasses
import math

import torch
import torch.nn as nn
import torch.utils.checkpoint

from errors import NUMBER, Field, UserError, check
from fused import add_norm, layer_norm, qk_norm_rotary, swiglu
from kernels import Intervals, attention

ROPE_BASE = 10000.0             # OpenLM's rotary base


DECODER = {                     # what a ModelConfig holds: far above any model, below what hangs a machine
    'n_layer': Field(int, 1, 1000), 'n_head': Field(int, 0, 1 << 14), 'n_embd': Field(int, 1, 1 << 17),
    'vocab_size': Field(int, 1, 1 << 22), 'seq_len': Field(int, 1, 1 << 24), 'n_ffn': Field(int, 0, 1 << 20),
    'qk_norm': Field(bool), 'norm_eps': Field(NUMBER, 0, 1)}


@dataclasses.dataclass
class ModelConfig:
    """The decoder's shape; the defaults are DCLM's. n_ffn 0 = OpenLM's rule, 8/3 of the width rounded up to 256."""
    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int = 50432     # GPT-NeoX-20B's 50277 rows, padded to a multiple of 256
    seq_len: int = 2048         # what it is trained at; longer inputs are legal
    n_ffn: int = 0
    qk_norm: bool = True        # LayerNorm of q and k over the full width, before rotary
    norm_eps: float = 1e-5

    def __post_init__(self):
        check(vars(self), Field(dict, of=DECODER), "the decoder's shape")
        self.n_ffn = self.n_ffn or 256 * math.ceil(int(8 * self.n_embd / 3) / 256)
        if self.n_head < 1 or self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
            raise UserError(f"n_embd={self.n_embd}, n_head={self.n_head}: expected n_embd / n_head whole and even")


class Linear(nn.Linear):
    """nn.Linear without bias and without torch's own initialisation, which Decoder.init_weights would overwrite."""
    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def reset_parameters(self):
        pass


class Norm(nn.Module):
    """LayerNorm with a gain and no bias; under autocast it runs in the low precision, as OpenLM's LPLayerNorm does."""
    def __init__(self, n, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.eps = eps

    def forward(self, x):
        return layer_norm(x, self.weight, self.eps)


def inverse_frequencies(head):
    """OpenLM's rotary frequencies (head/2,) float32 of a head of width `head`."""
    # device: under torch.device('meta') arange would first import torch._dynamo
    return ROPE_BASE ** (-torch.arange(0, head, 2, dtype=torch.float32, device='cpu') / head)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        n = config.n_embd
        self.n_head = config.n_head
        self.in_proj = Linear(n, 3 * n)                         # rows: q, k, v
        self.out_proj = Linear(n, n)
        self.norm_eps = config.norm_eps
        self.q_norm = Norm(n, config.norm_eps) if config.qk_norm else None       # their gains: fused.py has the rest
        self.k_norm = Norm(n, config.norm_eps) if config.qk_norm else None

    def forward(self, x, rotary, mask, cache=None):
        B, T, C = x.shape
        gains = [norm and norm.weight for norm in (self.q_norm, self.k_norm)]
        q, k, v = qk_norm_rotary(self.in_proj(x), *gains, *rotary, self.n_head, self.norm_eps)       # (B,H,T,D)
        if cache is not None:
            cache, layer, position = cache
            k, v = cache.update(layer, k, v, position)          # (B,H,length,D)
        return self.out_proj(attention(q, k, v, mask).transpose(1, 2).reshape(B, T, C))


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w12 = Linear(config.n_embd, 2 * config.n_ffn)      # the gate is the first half
        self.w3 = Linear(config.n_ffn, config.n_embd)

    def forward(self, x):
        return self.w3(swiglu(self.w12(x)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = Norm(config.n_embd, config.norm_eps)
        self.ffn_norm = Norm(config.n_embd, config.norm_eps)

    def forward(self, x, rotary, mask, cache=None, kept=None):
        """x (B,T,C) -> (B,T,C), or (K,C): with kept (K,) flat indices into B*T the feed-forward runs for these only."""
        y = self.attention(self.attention_norm(x), rotary, mask, cache)
        if kept is not None:
            x, y = x.flatten(0, 1)[kept], y.flatten(0, 1)[kept]            # (K,C)
        x, normed = add_norm(x, y, self.ffn_norm.weight, self.ffn_norm.eps)
        return x + self.feed_forward(normed)


class Decoder(nn.Module):
    """
    OpenLM's transformer: pre-norm, no biases, QK-norm over the full width, rotary, SwiGLU, untied output.
    Parameter names are OpenLM's, so its checkpoints load by name. inv_freq is a buffer: models trained in bf16 have
    seen rounded frequencies, so an imported checkpoint brings its own.
    """
    def __init__(self, config):
        super().__init__()
        self.config = config
        head = config.n_embd // config.n_head
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.n_embd, _weight=torch.empty(
            config.vocab_size, config.n_embd))
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = Norm(config.n_embd, config.norm_eps)
        self.output = Linear(config.n_embd, config.vocab_size)
        self.register_buffer('inv_freq', inverse_frequencies(head))
        self.activation_checkpointing = False
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """OpenLM's initialisation, torch's global generator: normals cut at 3 std, residual outputs scaled by depth."""
        def trunc(weight, std):
            nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)
        width_std = 1 / math.sqrt(self.config.n_embd)
        trunc(self.tok_embeddings.weight, width_std)
        trunc(self.output.weight, width_std)
        for i, block in enumerate(self.layers):
            depth = math.sqrt(2 * (i + 1))
            trunc(block.attention.in_proj.weight, width_std)
            trunc(block.attention.out_proj.weight, width_std / depth)
            trunc(block.feed_forward.w12.weight, width_std)
            trunc(block.feed_forward.w3.weight, 1 / math.sqrt(self.config.n_ffn) / depth)

    def rotary(self, position):
        """cos and sin (...,T,D) float32 of position (...,T)."""
        angle = position[..., None].float() * self.inv_freq
        angle = torch.cat((angle, angle), -1)
        return angle.cos(), angle.sin()

    def trunk(self, x, kept=None, mask=None, position=None, cache=None, sight=None):
        """
        The blocks and the final norm.
        x         (B,T,C) embeddings
        kept      (K,) flat indices into B*T whose outputs are wanted; None = all. The last block computes q, the output
                  projection and the feed-forward for these only; keys and values for all: exact, and less work
        mask      Intervals over the keys; None = causal
        position  (B,T) int64 of x in its row, with a cache; None = 0..T-1
        sight     what cross blocks see (connectors.Sight); None = what the cache says, without one nothing
        returns   (B,T,C), or (K,C) with kept
        """
        B, T, _ = x.shape
        mask = Intervals.causal(B, T, x.device) if mask is None else mask
        if position is None:
            rotary = self.rotary(torch.arange(T, device=x.device))                     # (T,D)
        else:
            rotary = tuple(y[:, None] for y in self.rotary(position))                  # (B,1,T,D)
        sight = cache.sight(T) if sight is None and cache is not None else sight

        def run(block, *args):
            if self.activation_checkpointing and torch.is_grad_enabled():
                return torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False)
            return block(*args)
        for i, block in enumerate(self.layers):
            if sight is not None and i % sight.blocks.every == 0:
                j = i // sight.blocks.every
                x = run(sight.blocks[j], x, sight.images[j], sight)
            x = run(block, x, rotary, mask, None if cache is None else (cache, i, position),
                    kept if i == len(self.layers) - 1 else None)
        return self.norm(x)

    def forward(self, tokens):
        """tokens (B,T) int64 -> logits (B,T,V) float32."""
        return self.output(self.trunk(self.tok_embeddings(tokens))).float()
