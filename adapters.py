"""
What of a VLM trains: whole parts, or low-rank adapters on linear layers that stay as they are.
LoRA: arXiv 2106.09685; its scale alpha / sqrt(rank): rsLoRA, arXiv 2312.03732; DoRA: arXiv 2402.09353.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from errors import NUMBER, Field, UserError

PARTS = {'decoder': ('decoder',), 'encoder': ('encoder',), 'both': ('decoder', 'encoder'), 'none': ()}
NAMES = ('.lora_A', '.lora_B', '.magnitude')         # what the names of an adapter's parameters end in
SPEC = {                        # a description's 'adapters'; base: sha256 of the weights that they were put on
    'rank': Field(int, 1, 1 << 16), 'alpha': Field(NUMBER, 0), 'rslora': Field(bool), 'dora': Field(bool),
    'on': Field(str), 'base': Field(str, 0, 64)}


class AdaptedLinear(nn.Module):
    """
    A linear layer of weight W (n_out,n_in), which keeps its name and stays, and a change of rank r that is learned:
    lora_A (r,n_in) uniform as torch's own layers, lora_B (n_out,r) zeros, so that the start is the layer itself.
    LoRA  W' = V = W + s B A
    DoRA  W' = m V / |V|, norms of rows (of each output, over the inputs), no gradient through |V| (its section 4.3);
          magnitude m (n_out,) is |W| at the start. The bias is added after it.
    """
    def __init__(self, linear, rank, scale, dora):
        super().__init__()
        self.weight, self.bias, self.scale = linear.weight, linear.bias, scale
        n_out, n_in = self.weight.shape
        self.lora_A = nn.Parameter(self.weight.new_empty(rank, n_in).uniform_(-n_in ** -0.5, n_in ** -0.5))
        self.lora_B = nn.Parameter(self.weight.new_zeros(n_out, rank))
        W, self.magnitude = self.weight.detach(), None
        if dora:                 # on the meta device an operator would first import torch's compiler
            self.magnitude = nn.Parameter(W.new_empty(n_out) if W.is_meta else W.norm(dim=1))

    @torch.no_grad()
    def changed(self):
        """V (n_out,n_in), in float32 also where autocast or FSDP2 compute in bfloat16."""
        W, A, B = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (self.weight, self.lora_A, self.lora_B))
        with torch.autocast('cuda' if W.is_cuda else 'cpu', enabled=False):            # costs.py's is on neither
            return torch.addmm(W, B, A, alpha=self.scale)

    def forward(self, x):
        late = self.magnitude is not None and self.bias is not None
        y = F.linear(x, self.weight, None if late else self.bias)                      # (...,n_out)
        y = y + F.linear(F.linear(x, self.lora_A), self.scale * self.lora_B)
        if self.magnitude is not None:
            y = y * (self.magnitude / self.changed().norm(dim=1)).to(y.dtype)
        return y + self.bias.to(y.dtype) if late else y


def adapter_spec(config):
    """A description's 'adapters' that a stage's config asks for, their base still to be said; None for none."""
    rank = config.get('lora_rank')
    if not rank and (config.get('lora_alpha') or config.get('rslora') or config.get('dora')
                     or config.get('lora_on', 'decoder') != 'decoder'):
        raise UserError("lora_alpha, rslora, dora and lora_on are of adapters: give --lora_rank=N, too")
    return dict(rank=rank, alpha=config['lora_alpha'] or 2.0 * rank, rslora=config.get('rslora', False),
                dora=config.get('dora', False), on=config.get('lora_on', 'decoder'), base='') if rank else None


def add_adapters(model, spec):
    """
    Put adapters in place on every linear layer of the decoder's blocks, of the encoder, or both.
    spec  dict, see SPEC; UserError for a part that has no linear layer
    """
    scale = spec['alpha'] / (math.sqrt(spec['rank']) if spec['rslora'] else spec['rank'])
    found = {part: _layers(model.decoder.layers if part == 'decoder' else model.encoder, nn.Linear)
             for part in PARTS.get(spec['on'], ())}
    if not found or not all(found.values()):
        raise UserError(f"adapters on {spec['on']!r}: this model has no such part with linear layers")
    for parent, name, linear in sum(found.values(), []):
        setattr(parent, name, AdaptedLinear(linear, spec['rank'], scale, spec['dora']))


@torch.no_grad()
def merge_adapters(model):
    """Put what a model's adapters have learned into the weights, in place: W' for W, and plain layers again."""
    for parent, name, layer in _layers(model, AdaptedLinear):
        merged = layer.changed()
        if layer.magnitude is not None:
            merged *= (layer.magnitude / merged.norm(dim=1))[:, None]
        linear = nn.Linear(*reversed(merged.shape), device='meta')
        linear.weight, linear.bias = layer.weight, layer.bias
        linear.weight.copy_(merged)
        setattr(parent, name, linear)


def _layers(module, kind):
    parents = [] if module is None else module.modules()
    return [(parent, name, child) for parent in parents for name, child in parent.named_children()
            if isinstance(child, kind)]


def trains_decoder(config, spec):
    """Do the decoder's own weights train in a run of this config and description?"""
    frozen, adapted = PARTS.get(config.get('freeze'), ()), PARTS.get((spec.get('adapters') or {}).get('on'), ())
    return 'decoder' not in (*frozen, *adapted)


def set_trained(model, freeze):
    """
    Say what of a VLM trains. A part with adapters trains these alone, whatever freeze says; projector, cross blocks and
    text_cond always do.
    freeze  one of PARTS: which parts without adapters stay as they are
    """
    for part in PARTS['both']:
        named = [] if getattr(model, part) is None else list(getattr(model, part).named_parameters())
        adapted = any(name.endswith(NAMES) for name, _ in named)
        for name, p in named:
            p.requires_grad_(name.endswith(NAMES) if adapted else part not in PARTS[freeze])
