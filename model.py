"""
The vision-language model around a decoder, a model from its description, OpenLM weights.

    decoder = Decoder(ModelConfig(n_layer=24, n_head=16, n_embd=2048))            # 1.4B, the script's default scale
    model = build_vlm(spec, seed=7)                                               # spec: a plain dict, see vlm_spec
    loss_sum, weight_sum, row_loss = model(tokens, targets, images)              # what a training step needs

Paper section 2.1, appendices A, B (arXiv 2503.07603); OpenLM's model as the DCLM checkpoints use it (arXiv 2406.11794).
"""
import contextlib
import dataclasses
import itertools
import math
import os
import re

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

import generation
from adapters import add_adapters
from connectors import CrossBlock, CrossBlocks, Sight, build_projector, projector_spec
from decoder import Block, Decoder, ModelConfig, inverse_frequencies
from errors import NUMBER, Field, UserError, check, reading
from files import whole, write_file
from images import View, sides
from kernels import IGNORE_INDEX, Intervals, linear_cross_entropy
from text_cond import TextCond, text_cond_spec
from vision import EncoderBlock, build_encoder, encoder_spec, lowered
from weights import fill, read_json, read_pt, tensors


class VLM(nn.Module):
    """
    A decoder that reads image features at the positions that hold image_id. encoder and projector are None for a
    text-only model.
    n_token       features of an image, 0 for text; None = as many as the encoder gives, else what the projector makes.
                  They stand in the row, or, with cross (CrossBlocks), are read by these blocks, and the image takes one
                  position
    shortest, split  see images.View
    image_mask    'causal' over images too (the paper's choice), or 'prefix': the positions of an image see each other
    text_cond     TextCond, where the encoder reads questions, too; None = it sees images alone
    document_end  None, or the id after which attention starts anew. Rotary positions go on: scores depend on distances
                  alone, so that a document inside a row gives what it gives by itself
    """
    def __init__(self, decoder, encoder=None, projector=None, *, image_id=None, z_loss=0.0, n_token=None, cross=None,
                 shortest=0, split=False, image_mask='causal', document_end=None, text_cond=None):
        super().__init__()
        self.decoder, self.encoder, self.projector, self.cross = decoder, encoder, projector, cross
        self.text_cond = text_cond
        self.fixed, self.shortest, self.split = bool(n_token), shortest, split       # fixed: whatever an image's size
        self.n_token = (n_token or (encoder.n_token if encoder is not None else 0)) * (5 if split else 1)
        self.image_id, self.z_loss, self.image_mask, self.document_end = image_id, z_loss, image_mask, document_end
        if image_mask not in ('causal', 'prefix'):
            raise UserError(f"image_mask={image_mask!r}: expected 'causal' or 'prefix'")
        if cross is not None and (shortest or image_mask == 'prefix'):
            raise UserError("fusion='cross', where an image is one position and all are of one size, goes with "
                            "image_mask='causal' and aspect='square' only")
        if image_mask == 'prefix' and self.per_patch:
            raise UserError("image_mask='prefix' and aspect='keep': give token_mode='query', too, so that all images "
                            "take the same number of positions")
        self.compiled, self.low = False, (None, None)           # low: see _low_encoder

    generate, generate_each = generation.generate, generation.generate_each
    choice_nats, prefill_images = generation.choice_nats, generation.prefill_images

    @property
    def n_slot(self):
        """Positions of an image in a row; of the largest, where the aspect is kept; 0 for text only."""
        return self.n_token if self.cross is None else 1

    @property
    def per_patch(self):
        """Positions of a patch, where images take different numbers of positions; else 0."""
        e = self.encoder
        if self.fixed or self.cross is not None or not self.shortest:
            return 0
        return e.n_token // math.prod(side // e.patch_size for side in sides(e.image_size))

    def view(self, resize='letterbox'):
        """How photos become this model's images."""
        e = self.encoder
        return View(e.image_size, self.n_slot, resize, self.shortest, e.patch_size, self.per_patch, self.split)

    def slots(self, images):
        """Positions in a row that each of N images takes: a list of int."""
        view = self.view()
        return [view.positions(image) for image in images]

    def compile_blocks(self):
        """Have torch.compile compile the blocks of decoder and encoder one by one, each when it first runs."""
        self.compiled = True
        for module in self.modules():
            if isinstance(module, (Block, CrossBlock, EncoderBlock)):
                module.compile(dynamic=None)

    def image_features(self, images, image_text=None):
        """
        Images encoded, those of one size together, and projected; a frozen encoder builds no graph but for text.
        images   (N,3,S,S) uint8 or normalised float, (N,5,3,S,S) split, or lists of parts (3,h,w) as images.View gives
        image_text  of a model with text_cond: N lists of ids, what is asked about each image; [] or None = nothing
        returns  (N,n_slot,C), or where images take different numbers of positions a list of (n,C)
        """
        if isinstance(images, list):
            parts, k = [part for image in images for part in image], len(images[0])
            text = image_text and [ids for ids in image_text for _ in range(k)]
            features = {}                                      # of the i-th part (n,C)
            for shape in dict.fromkeys(part.shape for part in parts):
                at = [i for i, part in enumerate(parts) if part.shape == shape]
                features.update(zip(at, self.image_features(torch.stack([parts[i] for i in at]),
                                                            text and [text[i] for i in at])))
            features = [torch.cat([features[k * i + j] for j in range(k)]) for i in range(len(images))]
            return torch.stack(features) if len({len(x) for x in features}) == 1 else features
        if images.ndim == 5:
            text = image_text and [ids for ids in image_text for _ in range(images.shape[1])]
            return self.image_features(images.flatten(0, 1), text).unflatten(0, images.shape[:2]).flatten(1, 2)
        return self.projector(self._encode(images, image_text))

    def _encode(self, images, image_text):
        """The encoder's features (N,T,width) of images (N,3,H,W); those that nothing is asked about are its own."""
        asked = [i for i, ids in enumerate(image_text or ()) if ids]
        if 0 < len(asked) < len(images):
            rest = [i for i, ids in enumerate(image_text) if not ids]
            parts = self._encode(images[asked], [image_text[i] for i in asked]), self._encode(images[rest], None)
            return torch.cat(parts).index_select(0, torch.tensor(asked + rest).argsort().to(images.device))
        trained = any(p.requires_grad for p in self.encoder.parameters())
        autocast = images.device.type != 'meta' and torch.is_autocast_enabled(images.device.type)
        encoder = self.encoder
        if autocast and not trained:
            encoder = self._low_encoder(torch.get_autocast_dtype(images.device.type))
        if asked:
            return encoder(images, self.text_cond(image_text, self.decoder.tok_embeddings.weight))
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            features = encoder(images)
        if self.text_cond is not None and torch.is_grad_enabled():       # ddp waits for its gradients: exact zeros
            features = features + 0.0 * sum(p.sum() for p in self.text_cond.parameters())
        return features

    def _low_encoder(self, dtype):
        """
        The frozen encoder with weights that autocast finds in its dtype: cast once, and again only where they changed.
        self.low is a tuple, so what it holds is no submodule: nothing saves, moves or trains it.
        """
        state = dtype, [(p.data_ptr(), p._version) for p in self.encoder.parameters()]
        if self.low[0] != state:
            self.low = state, lowered(self.encoder, dtype)
            for block in self.low[1].modules() if self.compiled else ():
                if isinstance(block, EncoderBlock):
                    block.compile(dynamic=None)
        return self.low[1]

    def intervals(self, tokens, images):
        """
        Who sees whom in rows of tokens (B,T), found where they are: Intervals, None where all of it is causal.
        images  do the rows hold any?
        """
        together = images and self.image_mask == 'prefix'
        if self.document_end is not None:
            ends = (tokens == self.document_end).int()
            mask = Intervals.documents(ends.cumsum(1) - ends)       # the id belongs to the document that it ends
        elif together:
            mask = Intervals.causal(*tokens.shape, tokens.device)
        else:
            return None
        return mask.joined(tokens == self.image_id, self.n_token) if together else mask

    def embed(self, tokens, images=None, image_index=None, noise=None, image_text=None):
        """
        Token embeddings with image features in the slots, where there are no cross blocks to read them.
        tokens (B,T) int64, images and image_text as image_features takes them or None, image_index (M,) int64 or None =
        arange(N); returns (B,T,C)
        noise  (B,T,C), added to what is no image, or None
        Raises ValueError (CPU only: a GPU would have to wait) when slots and images do not fit.
        """
        x = self.decoder.tok_embeddings(tokens)                                        # (B,T,C)
        x = x if noise is None else x + noise
        n_image = 0 if images is None else len(images) if image_index is None else len(image_index)
        if n_image and (self.encoder is None or self.image_id is None):
            raise ValueError(f"{n_image} images given to a text-only model: expected a checkpoint with an encoder")
        if tokens.device.type == 'cpu' and self.image_id is not None:
            n_slot = self.n_slot
            if n_image and isinstance(images, list):
                n_slot = self.slots(images)
                n_slot = n_slot if image_index is None else [n_slot[i] for i in image_index.tolist()]
            check_slots(tokens, self.image_id, n_image, n_slot)
        if n_image == 0:
            if self.projector is not None and torch.is_grad_enabled():
                # ddp waits for every parameter's gradient: a step without images gives exact zeros
                parts = filter(None, (self.projector, self.encoder, self.text_cond))
                idle = [p for part in parts for p in part.parameters() if p.requires_grad]
                x = x + 0.0 * sum(p.sum() for p in idle) if idle else x
            return x
        if self.cross is not None:
            return x
        features = self.image_features(images, image_text)                             # (N,n_slot,C)
        if isinstance(features, list):
            index = range(len(features)) if image_index is None else image_index.tolist()
            features = torch.cat([features[i] for i in index])[None]                   # (1,slots,C)
        elif image_index is not None:
            # (M,n_slot,C); the backward of features[image_index] would add in an order that threads decide
            features = F.embedding(image_index, features.flatten(1)).unflatten(1, features.shape[1:])
        # a stable sort puts the slots first; their number is known, so that a GPU is not waited for
        features = features.flatten(0, 1).to(x.dtype)                                  # (slots,C)
        at = (tokens != self.image_id).flatten().int().argsort(stable=True)[:len(features)]
        return x.flatten(0, 1).index_copy(0, at, features).view_as(x)                  # (B,T,C)

    def see(self, tokens, images=None, image_index=None, image_text=None):
        """The Sight of a batch for the cross blocks, arguments as embed's; None where they have nothing to do."""
        if self.cross is None or images is None and not torch.is_grad_enabled():
            return None
        if images is None:      # ddp and fsdp wait for every block: they run on no row, and their gradients are zeros
            features = self.decoder.tok_embeddings.weight.new_zeros(0, self.n_token, self.decoder.config.n_embd)
        else:
            features = self.image_features(images, image_text)                         # (N,n_token,C)
        n_image = len(features if image_index is None else image_index)
        return Sight.of(self.cross, [features] * len(self.cross), tokens == self.image_id, n_image, image_index)

    def forward(self, tokens, targets, images=None, image_index=None, weights=None, kept=None, noise=None,
                image_text=None):
        """
        The masked loss, summed.
        tokens, targets  (B,T) int64; targets are shifted, IGNORE_INDEX = no loss
        images           as image_features takes them, or None
        image_index      (M,) int64: which image fills the m-th slot group in reading order; None = arange(N)
        weights          (B,T) float32 per target; None = 1 per kept token
        kept             (K,) int64 flat indices of kept targets, if known (spares the GPU a wait)
        noise            as in embed
        image_text       as in image_features
        returns          loss_sum () nats with z-loss (arXiv 2204.02311) and weight_sum (), over kept tokens; row_loss
                         (2,B) float32, nats and z-loss per row, unweighted, with a graph: dpo.py's loss is made of it
        """
        B, T = tokens.shape
        if kept is None:
            kept = (targets.reshape(-1) != IGNORE_INDEX).nonzero().squeeze(1)          # (K,)
        x = self.embed(tokens, images, image_index, noise, image_text)                 # (B,T,C)
        x = self.decoder.trunk(x, kept, self.intervals(tokens, images is not None),
                               sight=self.see(tokens, images, image_index, image_text))                # (K,C)
        nll, lse = linear_cross_entropy(x, self.decoder.output.weight, targets.reshape(-1)[kept],
                                        rows=torch.arange(len(x), device=x.device))    # (K,) each, all of them kept
        z = self.z_loss * lse.square()
        both = torch.stack((nll, z)).float()                                           # (2,K)
        row_loss = both.new_zeros(2, B).index_add_(1, kept // T, both)                 # (2,B)
        w = torch.ones_like(nll) if weights is None else weights.reshape(-1)[kept]
        return (w * (nll + z)).sum(), w.sum(), row_loss


# --- a model from its description -----------------------------------------------------------------------------------

def vlm_spec(config, image_id, images, document_end=None):
    """
    The description of the model that a stage's config asks for: a plain dict of JSON values, kept in every checkpoint.
    config   dict with the config keys n_layer, n_head, ..., and those that vision.encoder_spec and
             connectors.projector_spec read
    images   False = text only, without encoder and projector
    document_end  see VLM
    """
    shape = ModelConfig(*(config[key] for key in ('n_layer', 'n_head', 'n_embd', 'vocab_size', 'seq_len', 'n_ffn')))
    spec = dict(decoder=dataclasses.asdict(shape), encoder=None, projector=None, image_id=image_id,
                document_end=document_end)
    return add_images(spec, config) if images else spec


def add_images(spec, config):
    """A text model's description with the encoder and the projector that a config asks for; as in vlm_spec."""
    encoder = encoder_spec(config)
    with torch.device('meta'), Undrawn():
        n_token = build_encoder(encoder).n_token
    spec = dict(spec, encoder=encoder, projector=projector_spec(config, n_token),
                image_mask=config.get('image_mask', 'causal'), **fusion_spec(config), **text_cond_spec(config))
    return with_view(spec, config)


def with_view(spec, config):
    """A description with a 'view', where aspect or split of a config turn it on; what is on stays on."""
    view, tower = dict(spec.get('view') or {}), spec['encoder'].get('siglip', spec['encoder'])
    if config.get('aspect') == 'keep':
        size, projector = tower.get('config', tower)['image_size'], spec['projector']
        if not isinstance(size, int) or projector['kind'] != 'perceiver' and projector.get('n_token'):
            raise UserError("aspect='keep' with image_tokens that are pooled, or of an image that is no square: give "
                            "token_mode='query', or aspect='square'")
        view['shortest'] = max(1, size * 27 // 70)                                            # Idefics2: 378 of 980
    if config.get('split'):
        view['split'] = True
    return dict(spec, view=view) if view else spec


FRESH_CROSS = '{} has no cross-attention blocks: fresh ones, their gates at 0, before every {}. block of the decoder'


def fusion_spec(config):
    """What a description says of fusion: nothing where features stand in the row, else its 'fusion'."""
    if config.get('fusion', 'sequence') == 'sequence':
        return {}
    return dict(fusion=dict(kind='cross', every=config['cross_every']))


class Undrawn(TorchFunctionMode):
    """On the meta device: nothing is drawn, for which torch would import its compiler first (a second)."""
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return None if function.__name__ == 'normal_' else function(*args, **(kwargs or {}))


def build_vlm(spec, seed=None):
    """
    The one place that assembles a decoder, an encoder, a projector and adapters.
    spec     what vlm_spec gave
    seed     of the initial weights: the decoder's from seed, the projector's from seed + 1 (so that they do not depend
             on the decoder's size), the encoder's from seed + 2, cross blocks' from seed + 3, text_cond's from seed + 5
             (+ 4 are adapters'); None = memory as it comes, for weights.fill
    returns  VLM, in train mode, on CPU
    Raises UserError for a dict that is no description of a model.
    """
    def draw(offset):
        if seed is not None:
            torch.manual_seed(seed + offset)
    try:
        with contextlib.ExitStack() as memory:
            if seed is None:
                memory.enter_context(torch.device('meta'))
                memory.enter_context(Undrawn())
            encoder = projector = n_token = cross = text_cond = None
            config = ModelConfig(**spec['decoder'])
            if spec['encoder'] is not None:
                draw(2)
                encoder = build_encoder(spec['encoder'])
                draw(1)
                projector = build_projector(spec['projector'], encoder.width, config.n_embd)
                n_token = spec['projector'].get('n_token')
                if spec.get('fusion') is not None:
                    draw(3)
                    cross = {'cross': CrossBlocks}[spec['fusion']['kind']](config, spec['fusion']['every'])
                if spec.get('text_cond'):
                    draw(5)
                    text_cond = TextCond(spec['text_cond'], encoder, config.n_embd)
            draw(0)
            model = VLM(Decoder(config), encoder, projector, image_id=spec['image_id'], n_token=n_token, cross=cross,
                        image_mask=spec.get('image_mask') or 'causal', document_end=spec.get('document_end'),
                        text_cond=text_cond, **spec.get('view') or {})
            if spec.get('adapters'):
                add_adapters(model, spec['adapters'])
    except (KeyError, TypeError) as e:
        raise UserError(f"not a model's description ({type(e).__name__} {e}): {spec}") from e
    # not to_empty, for which torch would import sympy
    return model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype)) if seed is None else model


def check_slots(tokens, image_id, n_image, n_token):
    """
    ValueError unless each row of tokens (B,T) holds whole images, and all rows together n_image of n_token slots, or
    images of so many slots as the list n_token says, in its order.
    """
    in_row = (tokens == image_id).sum(1)                                               # (B,)
    if isinstance(n_token, list):
        ends = {0, *itertools.accumulate(n_token)}
        if in_row.sum() != sum(n_token) or not ends.issuperset(in_row.cumsum(0).tolist()):
            raise ValueError(f"rows hold {in_row.tolist()} image slots: expected whole images of {n_token} in turn")
        return
    torn = (in_row % n_token if n_image else in_row).nonzero()                         # an image may not span two rows
    if len(torn):
        row = int(torn[0])
        raise ValueError(f"row {row} holds {int(in_row[row])} image slots" +
                         (f": expected a multiple of {n_token}" if n_image else ", got 0 images"))
    if in_row.sum() != n_image * n_token:
        raise ValueError(f"rows hold {in_row.tolist()} image slots, {int(in_row.sum())} in all: expected "
                         f"{n_image} images x {n_token} = {n_image * n_token}")


# --- OpenLM weights -------------------------------------------------------------------------------------------------

CONFIG_NAMES = {                # ours: what OpenLM's JSON, its HF config and DCLM's command line call it
    'n_layer': ('n_layers', 'num_hidden_layers'), 'n_head': ('n_heads', 'num_attention_heads'),
    'n_embd': ('hidden_dim', 'dim', 'hidden_size'), 'vocab_size': (), 'seq_len': ('max_position_embeddings',),
    'qk_norm': ('apply_qk_norm',), 'norm_eps': (),
}
UNSUPPORTED = {'weight_tying': True, 'post_embed_norm': True}      # flags of OpenLM whose models are others


def _read_config(config):
    """The keys that a dict or JSON file gives, in our names; older HF configs nest them under params_args_dict."""
    config = {**config, **(config.get('params_args_dict') or {})}
    for key, value in UNSUPPORTED.items():
        if config.get(key) == value:
            raise UserError(f"OpenLM config with {key}={value}: only the DCLM models' {key}={not value} is supported")
    norm = config.get('norm_type') or config.get('model_norm') or 'gain_only_lp_layer_norm'
    if 'gain_only' not in norm or 'rms' in norm:
        raise UserError(f"OpenLM config with norm {norm}: expected gain_only_lp_layer_norm")
    rotary = config.get('positional_embedding_type') or 'rotary'
    if rotary != 'rotary':                              # head_rotary has the same tensors but counts over heads
        raise UserError(f"OpenLM config with positional_embedding_type={rotary}: expected rotary")
    found = {}
    for ours, theirs in CONFIG_NAMES.items():
        for name in (*theirs, ours):
            if config.get(name) is not None:
                found[ours] = config[name]
    return found


def load_openlm(path, config=None, into=None):
    """
    A Decoder from OpenLM weights, read tensor by tensor.
    path     `epoch_N.pt` / bare state dict (.pt, read with weights_only), .safetensors, or an HF folder
    config   dict or JSON path in OpenLM's, HF's or our names; None = the folder's, completed from tensor shapes
    into     a Decoder to fill in place of a new one; what the file does not say (heads) is taken from it
    returns  Decoder on CPU, float32, in eval mode; rotary frequencies are the file's own. With into: that Decoder
    Raises UserError naming the first key or shape that does not fit.
    """
    source = tensors(path)
    beside, given = os.path.join(path, 'config.json'), {}
    if config is None and os.path.exists(beside):
        config = beside
    if isinstance(config, (str, os.PathLike)):
        with reading(config, 'an OpenLM config'):
            given = _read_config(read_json(config))
    elif config is not None:
        given = _read_config(config)
    clean = {_openlm_name(name): t for name, t in source.items()}
    try:
        vocab_size, n_embd = clean['tok_embeddings.weight'].shape
        n_layer = 1 + max(int(key.split('.')[1]) for key in clean if key.startswith('layers.'))
        n_ffn = clean['layers.0.feed_forward.w3.weight'].shape[1]
    except (LookupError, ValueError) as e:
        raise UserError(f"{path}: not an OpenLM checkpoint ({e}); it has {sorted(clean)[:3]} ...") from e
    freq = [clean.pop(f'layers.{i}.attention.pos_embed.inv_freq', None) for i in range(n_layer)]
    inferred = dict(n_layer=n_layer, n_embd=n_embd, vocab_size=vocab_size,
                    qk_norm='layers.0.attention.q_norm.weight' in clean)
    if freq[0] is not None:
        inferred['n_head'] = n_embd // (2 * freq[0].shape[0])
        if any(f is None or not torch.equal(f.read(), freq[0].read()) for f in freq):
            raise UserError(f"{path}: layers have different rotary frequencies; expected one table")
        clean['inv_freq'] = freq[0]
    for key, value in inferred.items():
        if given.get(key, value) != value:
            raise UserError(f"{path}: config says {key}={given[key]}, the tensors say {value}")
    shape = {**(dict(n_head=into.config.n_head) if into else {}), **given, **inferred}
    if 'n_head' not in shape:
        raise UserError(f"{path}: holds no inv_freq, so the number of heads is unknown: give config=dict(n_head=...)")
    with reading(path, 'OpenLM weights'):
        shape = ModelConfig(**shape, n_ffn=n_ffn)
        with torch.device('meta'):
            decoder = into or Decoder(shape)
        if into is None:
            decoder.to_empty(device='cpu').eval()
    for key, ours in vars(decoder.config).items():
        if key != 'seq_len' and getattr(shape, key) != ours:             # longer or shorter rows are legal
            raise UserError(f"{path} has a decoder with {key}={getattr(shape, key)}, this run's has {ours}: give the "
                            "same, or the same scale file")
    decoder.inv_freq.copy_(inverse_frequencies(n_embd // shape.n_head))
    fill(decoder, clean, may_lack=['inv_freq'])
    return decoder


def _openlm_name(name):
    """A tensor's name without what DDP, torch.compile and the HF class put before it."""
    return re.sub(r'^(module\.|model\.)+', '', name.replace('_orig_mod.', ''))


def openlm_moments(path):
    """
    AdamW's moments that OpenLM saved beside its weights: optimizer_N.pt beside epoch_N.pt.
    path     as for load_openlm
    returns  (file, {our VLM's parameter name: {'step', 'exp_avg', 'exp_avg_sq'}} as checkpoint.load_moments takes
             them, the lr of the last step); ('', {}, 0) where there is no such file
    FSDP saves moments by name, others by position in an optimizer whose one filled group holds all parameters in the
    model's order (open_lm/main.py), which is epoch_N.pt's. Raises UserError for a file of another layout.
    """
    folder, name = os.path.split(path)
    file = os.path.join(folder, name.replace('epoch_', 'optimizer_', 1))
    if not re.fullmatch(r'epoch_.+\.pt', name) or not os.path.exists(file):
        return '', {}, 0.0
    with reading(file, f"OpenLM's {os.path.basename(file)}; move it away to start with fresh moments"):
        saved = read_pt(file)['optimizer']
        state, groups = saved['state'], [group for group in saved['param_groups'] if group['params']]
        names = [_openlm_name(name) for name in tensors(path) if not name.endswith('.inv_freq')]
        keys = groups[0]['params']
        if len(groups) > 1 or len(keys) != len(names):
            raise UserError(f"{file}: {len(groups)} groups, {len(keys)} parameters in the first, expected one of the "
                            f"{len(names)} of {path}; move it away to start with fresh moments")
        if all(isinstance(key, str) for key in keys):
            names = map(_openlm_name, keys)
        check(groups[0]['lr'], Field(NUMBER, 0), f"{file}: 'lr'")
        return file, {f'decoder.{name}': state.get(key) for name, key in zip(names, keys)}, float(groups[0]['lr'])


def save_openlm(decoder, path):
    """
    Write a Decoder in OpenLM's layout: `path` ending in .pt = {'epoch', 'name', 'state_dict'}, else an HF folder.
    Each file is whole or not there. Of a VLM with cross blocks this is the decoder alone, which is all of it for text.
    """
    path, c = os.fspath(path), decoder.config
    state = {k: v.detach().cpu().contiguous() for k, v in decoder.state_dict().items() if k != 'inv_freq'}
    for i in range(c.n_layer):
        state[f'layers.{i}.attention.pos_embed.inv_freq'] = decoder.inv_freq.detach().cpu().clone()
    if path.endswith('.pt'):
        with whole(path) as temporary:
            torch.save({'epoch': 0, 'name': 'ckpt80', 'state_dict': state}, temporary)
        return
    os.makedirs(path, exist_ok=True)
    state = {f'model.{k}': v for k, v in state.items()}
    with whole(os.path.join(path, 'model.safetensors')) as temporary:
        save_file(state, temporary, {'format': 'pt'})
    config = dict(architectures=['OpenLMModel'], model_type='openlm', dim=c.n_embd, n_layers=c.n_layer,
                  n_heads=c.n_head, vocab_size=c.vocab_size, seq_len=c.seq_len, norm_eps=c.norm_eps, qk_norm=c.qk_norm,
                  apply_qk_norm=c.qk_norm, attn_name='auto', norm_type='gain_only_lp_layer_norm',
                  ffn_type='swiglu_torch', positional_embedding_type='rotary', post_embed_norm=False,
                  weight_tying=False, torch_dtype='float32')     # open_lm reads apply_qk_norm
    with whole(os.path.join(path, 'config.json')) as temporary:
        write_file(temporary, config)
