"""
What a run costs, from its config and its model's description alone: FLOPs, GPU hours, memory, disk, passes over data.

FLOPs are two for each multiply-add of a matrix product that the loss needs, forward and backward: attention at the
pairs that the causal mask lets through (also where document_mask hides some of them, or image_mask='prefix' adds those
inside an image), the last feed-forward and the output matrix at kept targets only, a frozen encoder once (but backward,
too, where text_cond's weights are behind it; a question counts as QUESTION tokens). What activation checkpointing
computes again does not count: the share of a peak is PaLM's MFU (arXiv 2204.02311).
"""
import math
import os

import torch

import loss
from adapters import AdaptedLinear, adapter_spec, set_trained
from configurator import config_keys
from connectors import projector_spec
from model import build_vlm, fusion_spec, vlm_spec, with_view
from text_cond import text_cond_spec
from vision import SigLIP, SigLIPConfig, encoder_files, resolution, sides

# peak dense bf16 FLOP/s; the first key that the device's name contains
PEAK_FLOPS = {'A100': 312e12, 'H100 PCIe': 756e12, 'H100 NVL': 835e12, 'H200 NVL': 835e12, 'H100': 989e12,
              'H200': 989e12, 'B200': 2250e12}
ASSUMED_UTILISATION = 0.45      # of an A100's peak, for GPU hours before anything is measured
LLAVA_ROWS = 665_298            # of llava_v1_5_mix665k.json
QUESTION = 32                   # assumed tokens of a first question, where text_cond reads it


def model_flops_utilisation(flops_per_s, device):
    """A GPU's share of its bf16 peak, or None for a device whose peak is not in PEAK_FLOPS."""
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else ''
    peak = next((v for k, v in PEAK_FLOPS.items() if k in name), None)
    return flops_per_s / peak if peak else None


# --- FLOPs ------------------------------------------------------------------------------------------------------------

def decoder_flops(c, n_row, n_position, n_kept, frozen=False, rank=0):
    """
    FLOPs of forward and backward of the decoder and the loss on one micro-batch, as the module's docstring counts.
    c        ModelConfig; n_row rows of n_position positions, n_kept kept targets in all
    frozen   its own weights have no gradient; rank of its adapters, 0 = none (DoRA's norms, below 1 %, do not count)
    """
    layer, ffn = 4 * c.n_embd ** 2 + 3 * c.n_embd * c.n_ffn, 3 * c.n_embd * c.n_ffn
    positions, pairs = n_row * n_position, n_row * n_position * (n_position + 1) // 2
    products = positions * (c.n_layer * layer - ffn) + n_kept * (ffn + c.n_embd * c.vocab_size)
    low, low_ffn = rank * (8 * c.n_embd + 3 * c.n_ffn), rank * (2 * c.n_embd + 3 * c.n_ffn)
    low = positions * (c.n_layer * low - low_ffn) + n_kept * low_ffn
    return (4 if frozen else 6) * products + 6 * (low + c.n_layer * 2 * c.n_embd * pairs)


def cross_flops(model, n_position, n_image):
    """The same of a VLM's cross blocks, on rows of n_position positions in all that all see an image of n_image."""
    if model.cross is None:
        return 0
    c, features = model.decoder.config, n_image * model.n_token
    products = n_position * (2 * c.n_embd ** 2 + 3 * c.n_embd * c.n_ffn) + features * 2 * c.n_embd ** 2
    return 6 * len(model.cross) * (products + n_position * model.n_token * 2 * c.n_embd)


def what_trains(decoder):
    """decoder_flops' frozen and rank, of a Decoder after set_trained."""
    layer = decoder.layers[0].attention.in_proj
    return dict(frozen=not decoder.output.weight.requires_grad,
                rank=len(layer.lora_A) if isinstance(layer, AdaptedLinear) else 0)


def meta_vlm(spec, config):
    """A description's model without memory, with adapters and frozen as a config says; no random number is drawn."""
    model = build_vlm(dict(spec, adapters=spec.get('adapters') or adapter_spec(config))).to('meta')
    set_trained(model, config.get('freeze', 'encoder'))
    return model


def image_costs(model, config=None):
    """
    What one image, the largest where aspects are kept, costs in encoder and projector, counted on a meta_vlm: (FLOPs of
    forward and backward, bytes that the backward keeps in float32); (0, 0) for text.
    config  a stage's, for a model with text_cond: of stage 2's images only the instruct_share have a question, and
            FLOPs are the mean; None = all have one
    """
    if model.encoder is None:
        return 0, 0
    if model.text_cond is None:
        return _image_costs(model, None)
    asked = (config or {}).get('instruct_share', 1.0)
    (flops, kept), (plain, _) = (_image_costs(model, text) for text in ([[0] * QUESTION], None))
    return round(asked * flops + (1 - asked) * plain), kept


def _image_costs(model, image_text):
    from torch.utils.flop_counter import FlopCounterMode                     # half a second of imports
    n, kept = model.n_token // (5 if model.split else 1), {}
    weights = {p.untyped_storage()._cdata for p in model.parameters()}       # saved as views, too: W transposed
    shape = (1, *(5,) * model.split, 3, *sides(model.encoder.image_size))

    def keep(t):                       # but no table of attention weights: the fused kernels of real devices keep none
        if t.ndim < 3 or t.shape[-1] != t.shape[-2] and t.shape[-2:] != (n, model.encoder.n_token + n):
            storage = t.untyped_storage()
            kept[storage._cdata] = 0 if storage._cdata in weights else storage.nbytes()
        return t
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        features = model.image_features(torch.empty(shape, dtype=torch.uint8, device='meta'), image_text)
        features.sum().backward()
    return counter.get_total_flops(), sum(kept.values())


# --- memory -----------------------------------------------------------------------------------------------------------

def memory(model, *, n_row, n_position, n_image=0, per_image=0, n_kept=None, width=2, checkpointing=False,
           parallel='ddp', n_process=1):
    """
    Peak bytes that tensors take in one process, in parts; with gradients held over micro-steps, eager, on a GPU's loss
    path for width 2, a CPU's for 4. A process needs more: CUDA's context, NCCL, what the allocator cannot use.
    model      a meta_vlm
    n_row, n_position, n_kept, n_image  of a micro-batch; n_kept None = all; per_image bytes: what image_costs says
    width      bytes of an activation: 2 under bfloat16 autocast, 4 in float32
    parallel   'ddp' or 'fsdp' over n_process
    returns    dict: 'weights' (with gradients and AdamW moments), 'frozen' (an encoder's also in 16 bits, if used),
               'whole' (what fsdp gathers, or autocast's copies of the weights), 'activations', 'work' (the largest of
               what the loss and one block need on top)
    """
    c, N = model.decoder.config, n_row * n_position
    K = N if n_kept is None else n_kept
    size = lambda module, trained=True: sum(p.numel() for p in module.parameters() if p.requires_grad == trained) \
        if module else 0
    cross = len(model.cross or ())
    trained, frozen, copied = size(model), size(model, False), size(model.encoder, False)
    how, blocks_trained = what_trains(model.decoder), size(model.decoder.layers) + size(model.cross)
    blocks = blocks_trained + size(model.decoder.layers, False)
    if parallel == 'fsdp':
        # the root group is whole; so are the block that runs, the next on its way, what is copied, a block's gradients
        root, frozen = trained + frozen - copied - blocks, copied + (frozen - copied) / n_process
        block = (3 * width * blocks + 4 * blocks_trained) // (c.n_layer + cross)
        weights, whole = 16 * trained / n_process, 4 * root + block
    else:
        weights, whole = 16 * trained, 2 * (blocks + size(model.projector) + size(model.text_cond)) if width == 2 else 0
    # attention keeps its input, the norm's output, q, k, v, both rotated, its own output: 8 C; the feed-forward its
    # input, the norm's output, gate, up, silu(gate) and their product: 2 C + 4 F
    attention, ffn = 8 * c.n_embd * width, (2 * c.n_embd + 4 * c.n_ffn) * width
    if getattr(model.decoder.layers[0].attention.in_proj, 'magnitude', None) is not None:
        # what the magnitudes scale: every linear layer's output
        attention, ffn = attention + 4 * c.n_embd * width, ffn + (c.n_embd + 2 * c.n_ffn) * width
    elif how['frozen'] and not how['rank']:                  # no linear layer's input
        attention, ffn = attention - c.n_embd * width, ffn - (c.n_embd + c.n_ffn) * width
    layers = (c.n_layer * attention + (c.n_layer - 1) * ffn) * N + ffn * K
    if cross:                                                # q's norms and scatter, gates and residual: 12 C + 4 F
        seen = n_image * (n_position * (12 * c.n_embd + 4 * c.n_ffn) + model.n_token * 5 * c.n_embd) * width
        layers += cross * (seen + N * c.n_embd * 4)
    block_work = N * (2 * c.n_ffn + c.n_embd) * width        # gradients of gate and up, and of the residual stream
    if checkpointing:
        layers, block_work = (c.n_layer + cross) * 4 * c.n_embd * N, block_work + N * (attention + ffn)
    logits, head = K * c.vocab_size * width, 4 * c.vocab_size * c.n_embd
    gradient = head * (not how['frozen'])
    if parallel == 'fsdp':
        block_work += gradient                               # the output matrix's gradient waits for the root's end
    kept = logits <= loss.KEEP_LOGITS_BYTES                  # and a quarter of what is free, which is not known here
    columns = loss.CHUNK_COLUMNS if width == 2 else 0
    chunk = min(logits, max(loss.CHUNK_BYTES, columns * K * width))
    # the loss keeps its logits, and then has the output matrix's gradient beside them, or a copy of it in 16 bits
    loss_work = logits * kept + max(chunk * (1 if kept else 2), gradient + head / 2 * (width == 2))
    low = 2 * copied * (width == 2 and not size(model.encoder))          # a frozen encoder's weights in 16 bits
    return {'weights': weights, 'frozen': 4 * frozen + low, 'whole': whole,
            'activations': layers + 2 * K * c.n_embd * width + n_image * per_image * width / 4,
            'work': max(loss_work, block_work)}


# --- what is printed --------------------------------------------------------------------------------------------------

def print_config(config):
    """Say every key of a config."""
    for key, value in config.items():
        print(f'  {key} = {value!r}')


def described(config, image_id, images):
    """As vlm_spec, with SigLIP so400m/14 at 384 px for an encoder whose files are not there; that is said."""
    missing = [path for path in encoder_files(config).values() if not os.path.exists(path)] if images else []
    spec = vlm_spec(config, image_id, images and not missing)
    if missing:
        print(f"{missing[0]} not found: SigLIP so400m/14 at 384 px instead")
        with torch.device('meta'):
            shape = SigLIPConfig(image_size=resolution(config, 14) or 384)
            tower = SigLIP(shape, config['encoder_layer'], config['encoder_norm'])
        spec.update(encoder=tower.spec(), projector=projector_spec(config, tower.n_token), **fusion_spec(config),
                    **text_cond_spec(config), image_mask=config.get('image_mask', 'causal'))
        spec = with_view(spec, config)
    return spec


def paper_spec(config):
    """The paper's 1.4B model, pretrain.py's default shape with SigLIP, where stage 3 finds no base; it is said."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'pretrain.py')
    default = {key: rule.default for key, rule in config_keys(path).items()}
    print("no base yet: the shape of pretrain.py's defaults instead")
    return described({**default, **config}, 0, True)


def run_flops(config, model, per_image, max_steps):
    """FLOPs of a whole run, in parts; every row at seq_len, and every target kept but those at images."""
    images = config['image_ratio'] if 'image_ratio' in config else 1 - config.get('text_share', 0.0)
    T, G, c = config['seq_len'], config['global_batch_size'] * max_steps, model.decoder.config
    how = what_trains(model.decoder)
    with_image = decoder_flops(c, 1, T, max(1, T - model.n_slot), **how)
    without = decoder_flops(c, 1, T, T, **how)
    R = G * rows_of(config)
    parts = {'decoder': R * (images * with_image + (1 - images) * without), 'images': G * images * per_image}
    return {**parts, 'cross': R * images * cross_flops(model, T, 1)} if model.cross is not None else parts


def rows_of(config):
    """The rows of a sample: in dpo.py two, the answers to one question, which share their image."""
    return 2 if 'preferences' in config else 1


def memory_of(config, model, per_image, *, n_process=1, **changed):
    """memory() of a stage's config and a meta_vlm; `changed` keys of the config have another value."""
    config = {**config, **changed}
    images, B = config.get('image_ratio', 1.0), config['micro_batch_size']
    width = 2 if config['dtype'] == 'bfloat16' or (not config['dtype'] and config['device'] != 'cpu') else 4
    R = B * rows_of(config)
    return memory(model, n_row=R, n_position=config['seq_len'], n_image=math.ceil(B * images) if model.n_slot else 0,
                  per_image=per_image, n_kept=R * (config['seq_len'] - model.n_slot * (images == 1)), width=width,
                  checkpointing=config['activation_checkpointing'], parallel=config.get('parallel', 'ddp'),
                  n_process=n_process)


def print_cost(config, spec, *, out_dir, max_steps, n_keep):
    """
    Say what a run will do and need, from its config and its model's description; nothing is read or written.
    n_keep   checkpoints that stay for good; ckpt_step_N come on top
    """
    tokens = config['global_batch_size'] * rows_of(config) * config['seq_len']
    print(f"{max_steps:,} steps of {tokens:,} tokens = {max_steps * tokens:,} tokens, into {out_dir}")
    model = meta_vlm(spec, config)
    flops, kept = image_costs(model, config)
    n = {part: sum(p.numel() for p in module.parameters()) for part, module in model.named_children()}
    trained = {part: sum(p.numel() for p in module.parameters() if p.requires_grad)
               for part, module in model.named_children()}
    total = sum(trained.values())
    stored = sum(n.values()) - n.get('encoder', 0)
    steps = (config['keep_steps'] + 1) * bool(config['save_every'])                # one more while the next is written
    states = {'all': n_keep + steps, 'percent': n_keep + 1, 'last': 2, 'none': 2}[config['keep_optimizer']]
    gib = lambda n_byte: f'{n_byte / 2 ** 30:.2f} GiB'
    print('parameters: ' + ', '.join(f'{part} {count:,}' for part, count in n.items())
          + f'; {total:,} train')
    parts = run_flops(config, model, flops, max_steps)
    print(f"FLOPs: {sum(parts.values()):.3e} ({', '.join(f'{part} {count:.3e}' for part, count in parts.items())})")
    hours = sum(parts.values()) / (PEAK_FLOPS['A100'] * ASSUMED_UTILISATION * 3600)
    print(f"GPU hours: {hours:,.{0 if hours >= 100 else 3}f} on A100s at an assumed {ASSUMED_UTILISATION:.0%} of "
          f"{PEAK_FLOPS['A100'] / 1e12:.0f} TFLOP/s")
    print(f"disk: up to {n_keep + steps} checkpoints of {gib(4 * stored)}, {states} optimizer states of "
          f"{gib(8 * total)}, the encoder {gib(4 * n.get('encoder', 0))}"
          + (' in each' if trained.get('encoder') else ' once'))
    print(f"memory per process at micro_batch_size={config['micro_batch_size']}, an estimate of its tensors (plain, "
          "with activation_checkpointing):")
    for parallel, n_process in (('ddp', 1), ('fsdp', 8)):
        both = [memory_of(config, model, kept, n_process=n_process, parallel=parallel, activation_checkpointing=c)
                for c in (False, True)]
        print(f"  {parallel}{f', {n_process} processes' if n_process > 1 else '':<14} "
              + ', '.join(gib(sum(part.values())) for part in both))
    now = memory_of(config, model, kept, n_process=1 if config.get('parallel', 'ddp') == 'ddp' else 8)
    print('  this config: ' + ', '.join(f'{part} {gib(n_byte)}' for part, n_byte in now.items()))


def print_passes(mixture, n):
    """Say how often the first n samples of a mixture go through each source."""
    for name, count in mixture.counts(n).items():
        source = mixture.sources[name]
        passes = count / source.per_row / source.n_row
        print(f"{name}: {count:,} of {n:,} sequences ({count / n:.1%}), {passes:,.2f} passes over "
              f"{len(source.source):,}")
