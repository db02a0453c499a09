"""
Images in, visual tokens out: the towers SigLIP (arXiv 2303.15343) and DINOv2 (arXiv 2304.07193) from Hugging Face's
files, both of them fused, a patch projection without any encoder, and SigLIP's loss.
"""
import copy
import json
import math
import os
from dataclasses import asdict, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

from errors import Field, UserError, check, reading
from images import RESIZE, letterbox, open_image, sides, token_grid  # noqa: F401 (names of this module as well)
from vit import (DINOV2, MEAN_STD, POSITIONS, SIDE, SIGLIP, SIZE, TOWER, DINOv2Config, EncoderBlock, SigLIPConfig,
                 blocks_run, find_tower, nearest_positions, read_config, read_mean_std, run_blocks)
from weights import fill

# --- images to visual tokens -------------------------------------------------------------------------------------

def _normalise(images, image_size, patch_size, mean, std):
    # (N,3,H,W) uint8 or float -> float32; plain floats instead of buffers, so .to(bfloat16) cannot round mean and std
    H, W = sides(image_size)
    whole = all(0 < side <= most and side % patch_size == 0 for side, most in zip(images.shape[2:], (H, W)))
    if images.ndim != 4 or images.shape[1] != 3 or not whole and tuple(images.shape[2:]) != (H, W):
        raise ValueError(f"images of shape {tuple(images.shape)}: expected (N, 3, {H}, {W}); "
                         f"resize with vision.letterbox(image, {image_size})")
    if images.dtype == torch.uint8:
        x = images.float()
        for c in range(3):                                                       # (x / 255 - mean) / std, in place
            x[:, c].sub_(255 * mean[c]).div_(255 * std[c])
        return x
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}: expected uint8 (0..255) or normalised floats")
    return images.float()


class PatchProjection(nn.Module):
    """
    No encoder (the paper's ablation, J.2): each patch's normalised pixels are its token; the projector learns the rest.
    images (N,3,H,W) uint8 or normalised float -> (N, n_token, 3*p*p) float32, a patch flattened as channel, row, column
    """

    def __init__(self, image_size, patch_size=14):
        super().__init__()
        if not 1 <= patch_size <= min(sides(image_size)):
            raise UserError(f"patch_size={patch_size} with image_size={image_size}: expected 1 <= patch <= image")
        self.image_size, self.patch_size = image_size, patch_size
        self.mean, self.std = (0.5,) * 3, (0.5,) * 3
        self.grid = tuple(side // patch_size for side in sides(image_size))
        self.width, self.n_token = 3 * patch_size ** 2, math.prod(self.grid)

    def spec(self):
        """What build_encoder needs, as JSON values."""
        return {'kind': 'patch', 'image_size': self.image_size, 'patch_size': self.patch_size}

    def forward(self, images):
        p, x = self.patch_size, _normalise(images, self.image_size, self.patch_size, self.mean, self.std)
        h, w = (side // p for side in x.shape[2:])
        x = x[..., :h * p, :w * p].reshape(-1, 3, h, p, w, p).permute(0, 2, 4, 1, 3, 5)      # (N, row, column, 3, p, p)
        return x.reshape(-1, h * w, 3 * p * p)


ENCODERS = {                                 # what an encoder's spec() holds, by kind
    'patch': {'image_size': SIZE, 'patch_size': SIDE},
    'siglip': {'config': Field(dict, of=SIGLIP), 'keep_all': Field(bool), **TOWER},
    'dinov2': {'config': Field(dict, of=DINOV2), **TOWER}}
ENCODERS['dinosiglip'] = {'dinov2': Field(dict, of=ENCODERS['dinov2']), 'siglip': Field(dict, of=ENCODERS['siglip']),
                          'fusion': Field(str)}


class SigLIP(nn.Module):
    """
    SigLIP's vision tower (arXiv 2303.15343) up to the layer whose output is used; parameter names are Hugging Face's.
    images   (N,3,H,W) uint8, normalised inside with mean and std, or float, taken as normalised; of image_size a side,
             or of fewer patches, which take the nearest positions
    text     None, or vit.Text: what is asked about the images
    returns  (N, patches, width) float32
    layer    index into transformers' hidden_states: -2 = all blocks but the last (as Prismatic and LLaVA), 0 = patch
             embedding; norm=True adds the final LayerNorm, so layer=-1, norm=True is last_hidden_state
    keep_all also builds the blocks that are not run and the final LayerNorm, so that a saved tower is whole
    Raises UserError for a layer the tower does not have, ValueError for images of another size.
    """

    def __init__(self, config, layer=-2, norm=False, keep_all=False):
        super().__init__()
        self.config, self.layer, self.norm, self.keep_all = config, layer, norm, keep_all
        self.n_block = blocks_run(config, layer)
        n_built = config.num_hidden_layers if keep_all else self.n_block
        self.width, self.image_size, self.patch_size = config.hidden_size, config.image_size, config.patch_size
        self.n_token = math.prod(config.grid)
        self.mean, self.std = (0.5,) * 3, (0.5,) * 3
        self.embeddings = nn.ModuleDict({
            'patch_embedding': nn.Conv2d(3, self.width, config.patch_size, stride=config.patch_size),
            'position_embedding': nn.Embedding(self.n_token, self.width)})
        self.encoder = nn.ModuleDict({'layers': nn.ModuleList(EncoderBlock(config) for _ in range(n_built))})
        self.post_layernorm = nn.LayerNorm(self.width, eps=config.layer_norm_eps) if norm or keep_all else None
        self.reset_parameters()

    def spec(self):
        """What build_encoder needs to build the same module, as JSON values."""
        return {'kind': 'siglip', 'config': asdict(self.config), 'layer': self.layer, 'norm': self.norm,
                'keep_all': self.keep_all, 'mean': list(self.mean), 'std': list(self.std)}

    def reset_parameters(self):
        """big_vision's initialisation: Xavier uniform, LeCun normal patches, positions of norm one."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patch = self.embeddings['patch_embedding']
        nn.init.normal_(patch.weight, std=(3 * self.patch_size ** 2) ** -0.5)
        nn.init.zeros_(patch.bias)
        nn.init.normal_(self.embeddings['position_embedding'].weight, std=self.width ** -0.5)

    def forward(self, images, text=None):
        x = _normalise(images, self.image_size, self.patch_size, self.mean, self.std)        # (N, 3, H, W) float32
        patch = self.embeddings['patch_embedding']
        x = patch(x.to(patch.weight.dtype))                                      # (N, C, h, w)
        positions = nearest_positions(self.embeddings['position_embedding'].weight, *x.shape[2:])
        x = x.flatten(2).transpose(1, 2) + positions                             # (N, h*w, C)
        x = run_blocks([*self.encoder['layers']][:self.n_block], x, text)
        if self.norm:
            x = self.post_layernorm(x)
        return x.float()

    @classmethod
    def from_pretrained(cls, path, layer=-2, norm=False, keep_all=False, image_size=0):
        """
        Read a tower from a Hugging Face folder (config.json, model.safetensors or its shards) or one .safetensors file.
        path        SigLIP or SigLIP 2 of one resolution, or its vision half; text tower, head and unused blocks are
                    skipped. preprocessor_config.json gives mean and std (else 0.5).
        image_size  pixels a side; 0 = what it was trained at; else its positions are resized, as tower_spec says
        returns     SigLIP on the CPU, float32, eval()
        Raises UserError naming the file and the tensor that is missing or of another shape or dtype.
        """
        return _filled(dict(tower_spec('siglip', path, layer, norm, image_size), keep_all=keep_all), {'siglip': path})

    def save_pretrained(self, folder):
        """
        Write config.json, preprocessor_config.json and model.safetensors as transformers' SiglipVisionModel reads them.
        A cut tower states the blocks it holds, and in full_num_hidden_layers the count that `layer` indexes, so that it
        reloads with the layer it was cut at and refuses a higher one.
        """
        os.makedirs(folder, exist_ok=True)
        n_built, n_full = len(self.encoder['layers']), self.config.num_hidden_layers
        config = {'architectures': ['SiglipVisionModel'], 'model_type': 'siglip_vision_model', 'num_channels': 3,
                  'vision_use_head': False, 'attention_dropout': 0.0, **asdict(self.config),
                  'num_hidden_layers': n_built}
        if n_built != n_full:
            config['full_num_hidden_layers'] = n_full
        side = {'height': self.image_size, 'width': self.image_size}
        processor = {'image_processor_type': 'SiglipImageProcessor', 'size': side, 'resample': 3, 'do_resize': True,
                     'do_rescale': True, 'rescale_factor': 1 / 255, 'do_normalize': True,
                     'image_mean': list(self.mean), 'image_std': list(self.std)}
        for name, content in [('config.json', config), ('preprocessor_config.json', processor)]:
            with open(os.path.join(folder, name), 'w') as f:
                json.dump(content, f, indent=2)
        tensors = {'vision_model.' + k: v.detach().float().cpu().contiguous() for k, v in self.state_dict().items()}
        save_file(tensors, os.path.join(folder, 'model.safetensors'), metadata={'format': 'pt'})


class DINOv2(nn.Module):
    """
    DINOv2's vision tower (arXiv 2304.07193), with registers (arXiv 2309.16588) or without. Arguments, images and result
    are SigLIP's; the CLS token and the registers are run with the patches and dropped from the result.
    """

    def __init__(self, config, layer=-2, norm=False):
        super().__init__()
        C = config.hidden_size
        self.config, self.layer, self.norm = config, layer, norm
        self.n_block = blocks_run(config, layer)
        self.width, self.image_size, self.patch_size = C, config.image_size, config.patch_size
        self.n_token = math.prod(config.grid)
        self.mean, self.std = MEAN_STD['dinov2']
        self.patch_embedding = nn.Conv2d(3, C, config.patch_size, stride=config.patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, C))
        self.register_tokens = None
        if config.num_register_tokens:
            self.register_tokens = nn.Parameter(torch.empty(1, config.num_register_tokens, C))
        self.position_embeddings = nn.Parameter(torch.empty(1, 1 + self.n_token, C))     # CLS first, none of registers
        self.layers = nn.ModuleList(EncoderBlock(config) for _ in range(self.n_block))
        self.layernorm = nn.LayerNorm(C, eps=config.layer_norm_eps) if norm else None
        self.reset_parameters()

    def spec(self):
        """What build_encoder needs to build the same module, as JSON values."""
        return {'kind': 'dinov2', 'config': asdict(self.config), 'layer': self.layer, 'norm': self.norm,
                'mean': list(self.mean), 'std': list(self.std)}

    def reset_parameters(self):
        """Normals of std 0.02, biases zero, as transformers; gains and LayerScale stay at one."""
        for name, p in self.named_parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)
            elif name.endswith('bias'):
                nn.init.zeros_(p)

    def forward(self, images, text=None):
        x = _normalise(images, self.image_size, self.patch_size, self.mean, self.std)        # (N, 3, H, W) float32
        x = self.patch_embedding(x.to(self.patch_embedding.weight.dtype))        # (N, C, h, w)
        positions = nearest_positions(self.position_embeddings[0, 1:], *x.shape[2:])
        cls = self.cls_token + self.position_embeddings[:, :1]                   # (1, 1, C)
        extra = cls if self.register_tokens is None else torch.cat((cls, self.register_tokens), 1)
        x = x.flatten(2).transpose(1, 2) + positions                             # (N, h*w, C)
        x = torch.cat((extra.expand(len(x), -1, -1), x), 1)                      # (N, 1 + R + h*w, C)
        x = run_blocks(self.layers, x, text)
        x = x[:, extra.shape[1]:]                                                # (N, h*w, C)
        if self.norm:
            x = self.layernorm(x)
        return x.float()

    @classmethod
    def from_pretrained(cls, path, layer=-2, norm=False, image_size=0):
        """
        Read a tower from the Hugging Face folder of a Dinov2Model, a Dinov2WithRegistersModel, or a classifier on one.
        Arguments, result and errors are those of SigLIP.from_pretrained; without a preprocessor_config.json mean and
        std are ImageNet's.
        """
        return _filled(tower_spec('dinov2', path, layer, norm, image_size), {'dinov2': path})


class DINOSigLIP(nn.Module):
    """
    Both towers on one image, which each of them normalises its own way (Prismatic's dinosiglip, arXiv 2402.07865).
    images   (N,3,H,W) uint8
    fusion   'channel': each token is DINOv2's features, then SigLIP's (Prismatic); 'interleave': DINOv2's token and
             SigLIP's of each patch in turn (arXiv 2401.06209), each in its own channels and zeros in the other's, so
             that the projector's first layer has separate columns for the two
    returns  (N, n_token, width) float32, width that of both towers together
    Raises UserError for towers whose images or grids differ.
    """

    def __init__(self, dinov2, siglip, fusion='channel'):
        super().__init__()
        ours, theirs = ((tower.image_size, tower.n_token) for tower in (dinov2, siglip))
        if ours != theirs:
            raise UserError(f"DINOv2 makes {ours[1]} tokens of {ours[0]} px, SigLIP {theirs[1]} of {theirs[0]} px: "
                            "expected the same; give towers of one patch size")
        if fusion not in ('channel', 'interleave'):
            raise UserError(f"fusion={fusion!r}: expected 'channel' or 'interleave'")
        self.dinov2, self.siglip, self.fusion = dinov2, siglip, fusion
        self.image_size, self.patch_size, self.width = siglip.image_size, siglip.patch_size, dinov2.width + siglip.width
        self.n_token = siglip.n_token * (2 if fusion == 'interleave' else 1)

    def spec(self):
        """What build_encoder needs to build the same module, as JSON values."""
        return {'kind': 'dinosiglip', 'dinov2': self.dinov2.spec(), 'siglip': self.siglip.spec(), 'fusion': self.fusion}

    def forward(self, images):
        if images.dtype != torch.uint8:
            raise ValueError(f"images are {images.dtype}: expected uint8, which each tower normalises its own way")
        a, b = self.dinov2(images), self.siglip(images)
        if self.fusion == 'channel':
            return torch.cat((a, b), 2)
        a, b = F.pad(a, (0, self.siglip.width)), F.pad(b, (self.dinov2.width, 0))
        return torch.stack((a, b), 2).flatten(1, 2)                              # tokens: a0 b0 a1 b1 ...


# --- an encoder from a config, or from its description: a plain dict of JSON values, kept in every checkpoint --------

def encoder_files(config):
    """Where the towers of a config's `encoder` are read from: {kind: folder or file}, empty for 'patch'."""
    siglip, dinov2 = (os.path.join(config['data_dir'], config[key]) for key in ('encoder_path', 'dinov2_path'))
    return {'siglip': {'siglip': siglip}, 'dinov2': {'dinov2': dinov2}, 'patch': {},
            'dinosiglip': {'siglip': siglip, 'dinov2': dinov2}}[config['encoder']]


def encoder_spec(config):
    """
    The description of the encoder that a config names; of its files only the shapes are read.
    config   dict with the keys encoder, encoder_path, dinov2_path, encoder_fusion, encoder_layer, encoder_norm,
             image_size, token_mode, image_tokens, data_dir of pretrain.py
    """
    size = config['image_size']
    if config['encoder'] == 'patch':
        return PatchProjection(resolution(config, 14) or size or 384).spec()
    specs = {}
    for kind, path in encoder_files(config).items():
        specs[kind] = tower_spec(kind, path, config['encoder_layer'], config['encoder_norm'], size)
        shape = specs[kind]['config']
        size = resolution(config, shape['patch_size']) or shape['image_size']    # SigLIP's, to which DINOv2 is brought
        shape['image_size'] = size
    if len(specs) == 1:
        return specs[kind]
    return {'kind': 'dinosiglip', **specs, 'fusion': config['encoder_fusion']}


def resolution(config, patch_size):
    """The image_size at which a grid of patches makes image_tokens, of token_mode='res'; 0 for any other."""
    if config['token_mode'] != 'res' or not config['image_tokens']:
        return 0
    h, w = token_grid(config['image_tokens'])
    return h * patch_size if h == w else [h * patch_size, w * patch_size]


def build_encoder(spec):
    """
    The encoder of a description, weights untrained: a module with .width .n_token .image_size and .spec(), that maps
    images (N,3,H,W) to (N, n_token, width) float32.
    Raises UserError for a dict that no .spec() wrote.
    """
    kind = str(spec.get('kind'))
    with reading('encoder description', "what an encoder's spec() gives"):
        if kind not in ENCODERS:
            raise UserError(f"kind {kind!r}, expected one of {list(ENCODERS)}")
        check(spec, Field(dict, of=ENCODERS[kind]), 'encoder description')
        if kind == 'patch':
            return PatchProjection(spec['image_size'], spec['patch_size'])
        if kind == 'dinosiglip':
            return DINOSigLIP(*(build_encoder(dict(spec[tower], kind=tower)) for tower in ('dinov2', 'siglip')),
                              spec['fusion'])
        if kind == 'dinov2':
            encoder = DINOv2(DINOv2Config(**spec['config']), spec['layer'], spec['norm'])
        else:
            encoder = SigLIP(SigLIPConfig(**spec['config']), spec['layer'], spec['norm'], spec['keep_all'])
    encoder.mean, encoder.std = tuple(spec['mean']), tuple(spec['std'])
    return encoder


def lowered(encoder, dtype):
    """
    A copy of a frozen encoder whose products hold their weights in `dtype`; what else it has is shared. Under autocast
    to that dtype it gives the same bits, and casts no weight.
    """
    own = {id(p): p for p in encoder.parameters()}
    cast = {id(p): nn.Parameter(p.to(dtype), False) for module in encoder.modules()
            if isinstance(module, (nn.Linear, nn.Conv2d)) for p in module.parameters(recurse=False)}
    return copy.deepcopy(encoder, {**own, **cast})                               # these count as copied already


def fill_encoder(encoder, files):
    """Copy an encoder's weights from `files`, as encoder_files gives them, positions resized to the encoder's grid."""
    for kind, path in files.items():
        tower, found = getattr(encoder, kind, encoder), find_tower(kind, path)
        own = tower.state_dict()
        found = {name: tensor for name, tensor in found.items() if name in own or name == 'register_tokens'}
        fit_positions(tower, found)
        fill(tower, found, may_lack=())


def fit_positions(module, found):
    """Resize the position tables among {name: LazyTensor} to those of a module with a tower; returns their names."""
    own, names = module.state_dict(), []
    for kind, positions in POSITIONS.items():
        for name in [name for name in found if name.endswith(positions) and name in own]:
            if found[name].shape != tuple(own[name].shape):
                # antialiased for registers only, as transformers; timm, and so Prismatic, always is
                tower = module.get_submodule(name.removesuffix(positions).rstrip('.'))
                antialias = kind == 'dinov2' and tower.register_tokens is not None
                found[name] = _resized(found[name], own[name].shape, tower.config.grid, antialias)
                names.append(name)
    return names


def _filled(spec, files):
    with torch.device('meta'):
        encoder = build_encoder(spec)
    encoder.to_empty(device='cpu')
    fill_encoder(encoder, files)
    return encoder.eval()


def _resized(tensor, shape, grid, antialias):
    # a LazyTensor of positions (..., n_extra + side^2, C) as one of `shape` for a grid, the extra ones kept
    n_extra = shape[-2] - math.prod(grid)

    def read():
        table = tensor.read().float().flatten(0, -2)                             # (n_extra + side^2, C)
        side = math.isqrt(len(table) - n_extra)
        old = table[n_extra:].T.unflatten(1, (side, side))[None]                 # (1, C, side, side)
        new = F.interpolate(old, grid, mode='bicubic', align_corners=False, antialias=antialias)
        return torch.cat((table[:n_extra], new[0].flatten(1).T)).view(shape)
    return tensor._replace(shape=tuple(shape), read=read)


# --- a tower's description from a Hugging Face folder --------------------------------------------------------------

def tower_spec(kind, path, layer=-2, norm=False, image_size=0):
    """
    The description of a tower in a Hugging Face folder, or in a .safetensors file with its config.json beside it.
    kind        'siglip' or 'dinov2'
    image_size  pixels a side, or two, at which it will run; 0 = what it was trained at. fill_encoder resizes its
                positions to that grid as transformers does: bicubic, align_corners False, antialiased for DINOv2 with
                registers
    """
    path = os.fspath(path)
    if path and not os.path.isdir(path) and not path.endswith('.safetensors'):
        raise UserError(f"{path}: expected a folder with model.safetensors, or a .safetensors file"
                        + ('' if os.path.exists(path) else '; nothing is there'))
    saved = find_tower(kind, path)
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    n_saved = sum(key.endswith('.layer_norm1.weight') for key in saved)
    config = read_config(kind, os.path.join(folder, 'config.json'), n_saved)
    table = saved[POSITIONS[kind]].shape if POSITIONS[kind] in saved else ()
    n_position = (config.image_size // config.patch_size) ** 2 + (kind == 'dinov2')
    if table[-2:] != (n_position, config.hidden_size):
        raise UserError(f"{path}: {POSITIONS[kind]} is {table or 'missing'}, expected {n_position} x "
                        f"{config.hidden_size}: image_size={config.image_size} in patches of {config.patch_size}")
    mean, std = read_mean_std(os.path.join(folder, 'preprocessor_config.json'), MEAN_STD[kind])
    with reading(path, kind), torch.device('meta'):
        config = replace(config, image_size=image_size or config.image_size)
        tower = (DINOv2 if kind == 'dinov2' else SigLIP)(config, layer, norm)
    if tower.n_block > n_saved:
        raise UserError(f"{path}: layer={layer} of {config.num_hidden_layers} needs {tower.n_block} blocks, the file "
                        f"holds {n_saved}")
    return dict(tower.spec(), mean=mean, std=std)


# --- training a tower --------------------------------------------------------------------------------------------

def siglip_loss(image_emb, text_emb, logit_scale, logit_bias, labels=None):
    """
    Sigmoid loss over all image-text pairs, summed over texts and averaged over images (arXiv 2303.15343, algorithm 1).
    image_emb    (M, D) float, any length: normalised inside
    text_emb     (K, D) float
    logit_scale  () log of the temperature t (the paper starts at log 10);  logit_bias () (starts at -10)
    labels       (M, K) +1 for a pair that belongs together, else -1, several +1 per row allowed; None = the diagonal
    returns      () float32, nats per image
    Raises ValueError when the shapes do not fit.
    """
    M, K = len(image_emb), len(text_emb)
    if labels is None:
        if M != K:
            raise ValueError(f"{M} images and {K} texts: without labels (M, K) there must be as many texts as images")
        labels = 2 * torch.eye(M, device=image_emb.device) - 1                   # (M, K)
    elif tuple(labels.shape) != (M, K):
        raise ValueError(f"labels of shape {tuple(labels.shape)}, expected ({M}, {K}): images by texts")
    with torch.autocast(image_emb.device.type, enabled=False):                   # t = 10..100 magnifies bfloat16 error
        similarity = F.normalize(image_emb.float(), dim=-1) @ F.normalize(text_emb.float(), dim=-1).T
        logits = similarity * logit_scale.float().exp() + logit_bias.float()     # (M, K)
        return -F.logsigmoid(labels.to(logits.dtype) * logits).sum() / M
