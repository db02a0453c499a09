"""
What of a VLM trains: whole parts, or low-rank adapters on linear layers that stay as they are.

    add_adapters(model, dict(rank=16, alpha=32.0, rslora=False, dora=True, on='decoder', base=sha256))
    set_trained(model, freeze='encoder')
    merge_adapters(model)                                # an ordinary model again, that computes the same

LoRA: arXiv 2106.09685; its scale alpha / sqrt(rank): rsLoRA, arXiv 2312.03732; DoRA: arXiv 2402.09353.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from errors import NUMBER, Field, UserError

PARTS = {'decoder': ('decoder',), 'encoder': ('encoder',), 'both': ('decoder', 'encoder')}
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
        n_out, n_in = linear.weight.shape
        self.weight, self.bias, self.scale, self.magnitude = linear.weight, linear.bias, scale, None
        self.lora_A = nn.Parameter(linear.weight.new_empty(rank, n_in))
        self.lora_B = nn.Parameter(linear.weight.new_zeros(n_out, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if dora:
            self.magnitude = nn.Parameter(linear.weight.detach().norm(dim=1))

    @torch.no_grad()
    def changed(self):
        """V (n_out,n_in), in float32 also where autocast or FSDP2 compute in bfloat16."""
        W, A, B = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (self.weight, self.lora_A, self.lora_B))
        with torch.autocast('cuda' if W.is_cuda else 'cpu', enabled=False):            # costs.py's is on neither
            return torch.addmm(W, B, A, alpha=self.scale)

    def merged(self):
        """W' (n_out,n_in), without a graph."""
        V = self.changed()
        return V if self.magnitude is None else V * (self.magnitude.detach() / V.norm(dim=1))[:, None]

    def forward(self, x):
        late = self.magnitude is not None and self.bias is not None
        y = F.linear(x, self.weight, None if late else self.bias)                      # (...,n_out)
        y = y + F.linear(F.linear(x, self.lora_A), self.scale * self.lora_B)
        if self.magnitude is not None:
            y = y * (self.magnitude / self.changed().norm(dim=1)).to(y.dtype)
        return y + self.bias.to(y.dtype) if late else y


def adapter_spec(config):
    """
    A description's 'adapters', but for their base, that a stage's config asks for; None for lora_rank=0.
    Raises UserError for settings of adapters without any.
    """
    given = {key: config[key] for key in ('lora_alpha', 'rslora', 'dora') if config.get(key)}
    if not config.get('lora_rank'):
        if given:
            raise UserError(f"{', '.join(f'{key}={value}' for key, value in given.items())} without adapters: give "
                            "--lora_rank=N, too")
        return None
    rank = config['lora_rank']
    return dict(rank=rank, alpha=config['lora_alpha'] or 2.0 * rank, rslora=config['rslora'], dora=config['dora'],
                on=config['lora_on'], base='')


def add_adapters(model, spec, seed=None):
    """
    Put adapters in place on every linear layer of the decoder's blocks, of the encoder, or both.
    spec  dict, see SPEC; seed of lora_A, None = the generator as it is
    Raises UserError for a part that has no linear layer.
    """
    if spec['on'] not in PARTS:
        raise UserError(f"adapters on {spec['on']!r}: expected one of {', '.join(PARTS)}")
    if seed is not None:
        torch.manual_seed(seed)
    scale = spec['alpha'] / (math.sqrt(spec['rank']) if spec['rslora'] else spec['rank'])
    found = {part: _children(model.decoder.layers if part == 'decoder' else model.encoder, nn.Linear)
             for part in PARTS[spec['on']]}
    for part, layers in found.items():
        if not layers:
            raise UserError(f"lora_on={spec['on']!r}: this model has no {part} with linear layers")
    for parent, name, linear in sum(found.values(), []):
        setattr(parent, name, AdaptedLinear(linear, spec['rank'], scale, spec['dora']))


@torch.no_grad()
def merge_adapters(model):
    """Put what a model's adapters have learned into the weights, in place: its layers are plain again."""
    for parent, name, layer in _children(model, AdaptedLinear):
        linear = nn.Linear(*reversed(layer.weight.shape), device='meta')
        linear.weight, linear.bias = layer.weight, layer.bias
        linear.weight.copy_(layer.merged())
        setattr(parent, name, linear)


def _children(module, kind):
    parents = [] if module is None else module.modules()
    return [(parent, name, child) for parent in parents for name, child in parent.named_children()
            if isinstance(child, kind)]


def set_trained(model, freeze):
    """
    Say what of a VLM trains. A part with adapters trains these alone, whatever freeze says; the projector always does.
    freeze  'none', 'decoder', 'encoder' or 'both': which parts without adapters stay as they are
    """
    for part in PARTS['both']:
        module = getattr(model, part)
        if module is not None:
            adapters = [p for name, p in module.named_parameters() if name.endswith(NAMES)]
            module.requires_grad_(not adapters and freeze not in (part, 'both'))
            for p in adapters:
                p.requires_grad_()
