"""
What vision towers are made of, under Hugging Face's names: shapes, positions, blocks, and what the files of a folder
say of them. The towers themselves: vision.py.
"""
import math
import os
from dataclasses import dataclass
from typing import NamedTuple, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from errors import NUMBER, Field, UserError, check, reading
from images import sides
from kernels import Intervals, attention
from weights import read_json, tensors

# --- shapes ------------------------------------------------------------------------------------------------------

# tanh is what the weights were trained with; exact GELU is what timm 0.9.10, hence Prismatic, ran them with
ACTIVATIONS = {'gelu_pytorch_tanh': 'tanh', 'gelu': 'none'}


SIDE = Field(int, 1, 1 << 14)                # of an image or a patch
SIZE = Field((int, list), 1, 1 << 14, of=SIDE)
SIGLIP = {                                   # of a SigLIPConfig: far above any tower, below what hangs a machine
    'hidden_size': Field(int, 1, 1 << 17), 'intermediate_size': Field(int, 1, 1 << 20), 'patch_size': SIDE,
    'num_hidden_layers': Field(int, 1, 1000), 'num_attention_heads': Field(int, 1, 1000), 'image_size': SIZE,
    'layer_norm_eps': Field(NUMBER, 0, 1), 'hidden_act': Field(str)}
DINOV2 = {**SIGLIP, 'num_register_tokens': Field(int, 0, 1000), 'use_swiglu_ffn': Field(bool)}
TOWER = {'layer': Field(int), 'norm': Field(bool), 'mean': Field(list, 3, 3, of=Field(NUMBER)),
         'std': Field(list, 3, 3, of=Field(NUMBER, 1e-9))}


@dataclass
class SigLIPConfig:
    """A vision tower's shape under Hugging Face's names; the defaults are so400m/14 at 384 px, the paper's encoder."""
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    patch_size: int = 14
    image_size: int = 384         # pixels a side, or [height, width]; what fills no patch is not read: 384 // 14 = 27
    layer_norm_eps: float = 1e-6
    hidden_act: str = 'gelu_pytorch_tanh'
    schema = SIGLIP

    def __post_init__(self):
        what = type(self).__name__
        check(vars(self), Field(dict, of=self.schema), what)
        if self.hidden_size % self.num_attention_heads:
            raise UserError(f"{what}: hidden_size={self.hidden_size} is not a multiple of "
                            f"num_attention_heads={self.num_attention_heads}")
        if self.hidden_act not in ACTIVATIONS:
            raise UserError(f"{what}: hidden_act={self.hidden_act!r}, expected one of {list(ACTIVATIONS)}")
        if self.patch_size > min(sides(self.image_size)):
            raise UserError(f"{what}: patch_size={self.patch_size} exceeds image_size={self.image_size}")

    @property
    def grid(self):
        """Rows and columns of patches."""
        return tuple(side // self.patch_size for side in sides(self.image_size))


@dataclass
class DINOv2Config(SigLIPConfig):
    """The same of a DINOv2 tower; the defaults are ViT-L/14 with 4 registers (arXiv 2309.16588), Prismatic's choice."""
    hidden_size: int = 1024
    intermediate_size: int = 4096     # of the product, where the feed-forward is a SwiGLU (ViT-g)
    num_hidden_layers: int = 24
    image_size: int = 518
    hidden_act: str = 'gelu'
    num_register_tokens: int = 4
    use_swiglu_ffn: bool = False
    schema = DINOV2


# --- positions and blocks ----------------------------------------------------------------------------------------

def position_ids(h, w, n, device=None):
    """
    Which rows of a table of n x n positions a grid of h x w patches takes, the nearest: (h * w,) int64. Row i of h has
    floor(i * n / h) but for n = 70 and h = 25, 49, 50 or 55, where float32 puts some one off: the numbers are those of
    Idefics2 (arXiv 2405.02246), whose weights have seen them.
    """
    edges = torch.arange(1 / n, 1.0, 1 / n)
    row, column = (torch.bucketize((torch.arange(k) * (1.0 / torch.tensor(k))).clamp(max=1 - 1e-6), edges, right=True)
                   for k in (h, w))
    return (n * row[:, None] + column).flatten().to(device)


def nearest_positions(table, h, w):
    # (h * w, C) of a table (n * n, C), for its own grid the whole: ids kept as bfloat16 would end at 256
    if h * w == len(table):
        return table
    return F.embedding(position_ids(h, w, math.isqrt(len(table)), table.device), table)


class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.hidden_size
        self.n_head = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(C, C) for _ in range(4))

    def forward(self, x, mask=None, prefix=None, gate=None):
        B, T, C = x.shape
        x = x.to(self.q_proj.weight.dtype)                                       # of lowered weights: once for all 3
        q, k, v = (proj(x).view(B, T, self.n_head, -1).transpose(1, 2)           # (B, H, T, D)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        o = attention(q, k, v, mask if prefix is None else None)                 # (B, H, T, D), bidirectional
        if prefix is not None:
            k, v = (proj(prefix.to(x.dtype)).unflatten(2, (self.n_head, -1)).transpose(1, 2)
                    for proj in (self.k_proj, self.v_proj))                      # (B, H, P, D)
            o = o + gate.tanh()[:, None, None] * attention(q, k, v, mask)
            o = o.to(x.dtype)
        return self.out_proj(o.transpose(1, 2).reshape(B, T, C))


class EncoderBlock(nn.Module):
    """A block of either tower; DINOv2's scales what it adds (LayerScale), and ViT-g's feed-forward is a SwiGLU."""

    def __init__(self, config):
        super().__init__()
        C, hidden = config.hidden_size, config.intermediate_size
        scaled = isinstance(config, DINOv2Config)
        self.approximate, self.swiglu = ACTIVATIONS[config.hidden_act], scaled and config.use_swiglu_ffn
        self.layer_norm1 = nn.LayerNorm(C, eps=config.layer_norm_eps)
        self.self_attn = SelfAttention(config)
        self.layer_norm2 = nn.LayerNorm(C, eps=config.layer_norm_eps)
        self.mlp = nn.ModuleDict({'fc1': nn.Linear(C, hidden * (1 + self.swiglu)), 'fc2': nn.Linear(hidden, C)})
        self.scale1, self.scale2 = (nn.Parameter(torch.ones(C)) if scaled else None for _ in range(2))

    def forward(self, x, mask=None, prefix=None, gate=None):
        """x (B,T,C) -> (B,T,C); mask: Intervals of the T keys, or of a prefix (B,P,C) with its gate (H,); see Text"""
        h = self.self_attn(self.layer_norm1(x), mask, prefix, gate)
        x = x + (h if self.scale1 is None else self.scale1 * h)
        h = self.mlp['fc1'](self.layer_norm2(x).to(self.mlp['fc1'].weight.dtype))
        if self.swiglu:
            gate, up = h.chunk(2, -1)                                            # the gate is the first half
            h = F.silu(gate) * up
        else:
            h = F.gelu(h, approximate=self.approximate)
        h = self.mlp['fc2'](h)
        return x + (h if self.scale2 is None else self.scale2 * h)


class Text(NamedTuple):
    """
    What a tower reads of N images' questions, made by text_cond.TextCond.
    tokens  (N,P,C), of which the first length (N,) int32 are the question's and the others pads, which nobody sees
    gates   None = they follow the patches through every block; (L,H) = they are a prefix of the last L blocks
    """
    tokens: torch.Tensor
    length: torch.Tensor
    gates: Optional[torch.Tensor]

    def mask(self, n_query, n_patch=0):
        """Intervals of n_query queries, which see n_patch patches and then the question."""
        N, P = self.tokens.shape[:2]
        n_seen = self.length[:, None] + n_patch                                  # (N, 1)
        hi = n_seen.repeat(1, n_query)
        seen = torch.arange(n_patch + P, device=hi.device) < n_seen              # (N, n_patch + P)
        return Intervals(torch.zeros_like(hi), hi, torch.zeros_like(seen, dtype=torch.int32), n_query * seen.int())


def run_blocks(blocks, x, text=None):
    """The patches x (N,n,C), and whatever stands before them, through a tower's blocks; text: Text or None."""
    n = x.shape[1]
    if text is None:
        for block in blocks:
            x = block(x)
    elif text.gates is None:
        x = torch.cat((x, text.tokens.to(x.dtype)), 1)                           # (N, n + P, C)
        mask = text.mask(x.shape[1], n)
        for block in blocks:
            x = block(x, mask)
        x = x[:, :n]
    else:
        mask = text.mask(n)
        for block, gate in zip(blocks, (*[None] * (len(blocks) - len(text.gates)), *text.gates)):
            x = block(x) if gate is None else block(x, mask, text.tokens, gate)
    return x                                                                     # (N, n, C)


def blocks_run(config, layer):
    n = config.num_hidden_layers
    if not -(n + 1) <= layer <= n:
        raise UserError(f"layer={layer}: the tower has {n} blocks, so expected {-(n + 1)}..{n}")
    return layer % (n + 1)


# --- reading Hugging Face folders --------------------------------------------------------------------------------

PATCH_KEY = 'embeddings.patch_embedding.weight'
POSITIONS = {'siglip': 'embeddings.position_embedding.weight', 'dinov2': 'position_embeddings'}
MEAN_STD = {'siglip': ((0.5,) * 3, (0.5,) * 3), 'dinov2': ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}
# what transformers 5.23 assumes where config.json is silent; SigLIP's published base/16 is silent on everything
_BASE = {'hidden_size': 768, 'num_hidden_layers': 12, 'num_attention_heads': 12, 'image_size': 224,
         'layer_norm_eps': 1e-6}
_DINOV2 = {**_BASE, 'mlp_ratio': 4, 'hidden_act': 'gelu', 'qkv_bias': True, 'use_swiglu_ffn': False}
_SIGLIP = {**_BASE, 'intermediate_size': 3072, 'patch_size': 16, 'hidden_act': 'gelu_pytorch_tanh'}
HF_DEFAULTS = {'siglip': {'siglip': _SIGLIP, 'siglip_vision_model': _SIGLIP},        # by kind and model_type
               'dinov2': {'dinov2': {**_DINOV2, 'patch_size': 14},
                          'dinov2_with_registers': {**_DINOV2, 'patch_size': 16, 'num_register_tokens': 4}}}
# DINOv2's names on disk and ours, replaced in this order
DINOV2_NAMES = {
    'embeddings.patch_embeddings.projection.': 'patch_embedding.', 'embeddings.': '', 'encoder.layer.': 'layers.',
    'attention.attention.query.': 'self_attn.q_proj.', 'attention.attention.key.': 'self_attn.k_proj.',
    'attention.attention.value.': 'self_attn.v_proj.', 'attention.output.dense.': 'self_attn.out_proj.',
    'norm1.': 'layer_norm1.', 'norm2.': 'layer_norm2.', 'layer_scale1.lambda1': 'scale1',
    'layer_scale2.lambda1': 'scale2', 'weights_in.': 'fc1.', 'weights_out.': 'fc2.'}


def read_config(kind, path, n_saved):
    content = read_json(path)
    model_type = str(content.get('model_type', kind))
    if model_type not in HF_DEFAULTS[kind]:
        naflex = ' (NaFlex, of any resolution: take a SigLIP 2 of one)' if model_type.startswith('siglip2') else ''
        raise UserError(f"{path}: model_type {model_type!r}{naflex}, expected one of {list(HF_DEFAULTS[kind])}")
    if kind == 'siglip' and 'vision_config' in content:                          # a whole SigLIP: text and vision
        content = read_json(path, 'vision_config')
    values = {key: content.get(key, default) for key, default in HF_DEFAULTS[kind][model_type].items()}
    if values['num_hidden_layers'] != n_saved:
        raise UserError(f"{path}: num_hidden_layers={values['num_hidden_layers']}, the weights hold {n_saved} blocks")
    values['num_hidden_layers'] = content.get('full_num_hidden_layers', n_saved)
    check(values['image_size'], SIDE, f"{path}: 'image_size'")
    with reading(path, f'a {kind} config'):
        if kind == 'siglip':
            return SigLIPConfig(**values)
        if values.pop('qkv_bias') is not True:
            raise UserError(f"{path}: qkv_bias={content['qkv_bias']}, expected true")
        hidden = int(values['hidden_size'] * values.pop('mlp_ratio'))
        if values['use_swiglu_ffn']:                                             # two thirds, up to a multiple of 8
            hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        return DINOv2Config(**{'num_register_tokens': 0, **values}, intermediate_size=hidden)


def read_mean_std(path, default):
    content = read_json(path) if os.path.exists(path) else {}
    found = []
    for key, usual in zip(('mean', 'std'), default):
        values = content.get(f'image_{key}', list(usual))
        check(values, TOWER[key], f"{path}: 'image_{key}'")
        found.append(list(map(float, values)))
    return found


def find_tower(kind, path):
    """{our name: LazyTensor} of the tower of a kind among the tensors of a file or folder."""
    found = tensors(path)
    keys = {'siglip': PATCH_KEY, 'dinov2': 'embeddings.patch_embeddings.projection.weight'}
    prefixes = {'siglip': ('vision_model.', ''), 'dinov2': ('', 'dinov2.', 'dinov2_with_registers.')}
    there = {k: prefix for k in keys for prefix in prefixes[k] if prefix + keys[k] in found}
    if kind not in there:
        raise UserError(f"{path}: no {kind} tower in it: {prefixes[kind][0]}{keys[kind]} is missing"
                        + ''.join(f"; it is a {other} tower" for other in there))
    ours = {}
    for name, tensor in found.items():
        if name.startswith(there[kind]):
            name = name[len(there[kind]):]
            for theirs, our in DINOV2_NAMES.items() if kind == 'dinov2' else ():
                name = name.replace(theirs, our)
            ours[name] = tensor
    return ours
