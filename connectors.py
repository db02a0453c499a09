"""
What stands between an image encoder and a decoder: projectors of features to the decoder's width, and how many tokens
they make of an image.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from errors import UserError
from images import token_grid
from kernels import attention
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
