"""
Numbers with their conditions, on whatever device is there.

    python bench.py step config/tiny.py                  # tokens/s of stage 1 and where a step's time goes
    python bench.py step config/ckpt80_img10.py config/tiny.py                    # the same with images
    python bench.py step --peer=true                     # on a CPU, one fixed shape against transformers' Llava
    python bench.py fit config/ckpt80_img10.py --gpu_gib=80 --n_gpu=8             # which micro-batch fits, estimated
    python bench.py data data/tiny --image_size=56       # images/s and tokens/s that one core makes of a data folder
    python bench.py kernels                              # our kernels against eager, torch.compile, SDPA, FlexAttention
    python bench.py tune                                 # search the kernels' config tables on this GPU, print them
    python bench.py curve                                # 200 steps with our kernels and the same with plain PyTorch
    python bench.py gpu --out=DIR                        # all that a GPU can show, in nine minutes, as one page

step and fit take pretrain.py's keys. step's batches are synthetic in pretrain.py's layout, so it needs no data: the
loader's own cost is in every log.jsonl as data_wait_s. kernels, tune and gpu need an NVIDIA GPU and say so without one.
"""
import glob
import math
import os
import statistics
import sys
import time

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import common
import costs
import kernels
from adapters import adapter_spec, set_trained
from bench_gpu import HERE, bench_kernels, conditions, curve, gpu, options, tune
from configurator import configure
from data import CaptionSource, InstructSource, Mixture, TextSource, collate, load_tokenizer
from errors import UserError, user_error_hook
from model import ModelConfig, build_vlm
from vision import SigLIP, SigLIPConfig, sides


def stage_config(argv, script='pretrain.py'):
    """A stage's config from its script's keys."""
    return configure({'__file__': os.path.join(HERE, script), '__doc__': __doc__}, argv)


def synthetic_batch(c, model, image_id, device):
    """A micro-batch in pretrain.py's layout: text rows, and image_ratio caption rows of 40 tokens, the rest pads."""
    B, T = c['micro_batch_size'], c['seq_len']
    generator = torch.Generator().manual_seed(c['seed'])
    ids = torch.randint(0, image_id, (B, T + 1), generator=generator)
    tokens, targets = ids[:, :-1].clone(), ids[:, 1:].clone()
    n_image, n = round(B * c['image_ratio']) * bool(model.n_slot), model.n_slot
    images = None
    if n_image:
        tokens[:n_image, :n] = image_id
        targets[:n_image, :n] = targets[:n_image, n + 41:] = kernels.IGNORE_INDEX
        size = sides(model.encoder.image_size)
        images = torch.randint(0, 256, (n_image, 3, *size), generator=generator, dtype=torch.uint8).to(device)
    kept = (targets.flatten() != kernels.IGNORE_INDEX).nonzero().squeeze(1)
    return tokens.to(device), targets.to(device), images, kept.to(device)


def step(argv):
    """Time one optimizer step's phases for a recipe; prints a table."""
    own, argv = options(argv, peer=False)
    if own['peer']:
        return peer(argv)
    c = stage_config(argv)
    process = common.setup_process(c['device'], c['dtype'], c['n_thread'])
    process.start_device()
    device = process.device
    image_id = c['vocab_size'] - 1
    spec = costs.described(c, image_id, c['stage'] == 'mix')
    if spec['encoder'] and c['image_ratio'] > 0:
        n_token = costs.meta_vlm(spec, c).n_slot
        if n_token + 42 > c['seq_len']:
            raise UserError(f"seq_len={c['seq_len']} does not hold {n_token} positions of an image and a caption of "
                            "40: give another encoder, or --encoder=patch --image_size=42")
    spec['document_end'] = 0 if c['document_mask'] else None             # GPT-NeoX-20B's end-of-text
    model = build_vlm(dict(spec, adapters=adapter_spec(c)), c['seed']).to(device)
    model.z_loss, model.decoder.activation_checkpointing = c['z_loss'], c['activation_checkpointing']
    encoder, config = model.encoder, model.decoder.config
    set_trained(model, c['freeze'])
    if c['compile']:
        model.compile_blocks()
    optimizer = common.make_optimizer(model, dict.fromkeys(('decoder', 'projector', 'encoder', 'cross'), 1.0),
                                      weight_decay=c['weight_decay'], betas=(c['beta1'], c['beta2']), decay=c['decay'])
    tokens, targets, images, kept = synthetic_batch(c, model, image_id, device)

    marks = []                                                     # (name, when that phase of a step was over)

    def mark(name):
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
        marks.append((name, time.perf_counter()))
    for _ in range(23):
        mark('')
        optimizer.zero_grad(set_to_none=True)
        with process.autocast():
            if images is not None:
                with torch.no_grad():
                    encoder(images)                                # once more, only to time it
                mark('encoder')
            loss, weight, _ = model(tokens, targets, images, kept=kept)
        mark('forward')
        (loss / weight).backward()
        mark('backward')
        common.optimizer_step(optimizer, c['lr'], c['grad_clip'])
        mark('optimizer')
    times = {}
    for (_, begin), (name, end) in zip(marks, marks[1:]):
        times.setdefault(name, []).append(end - begin)
    times.pop('')
    median = {name: statistics.median(seconds[3:]) for name, seconds in times.items()}           # three warm up
    if 'encoder' in median:
        median['forward'] -= median['encoder']
    total = sum(median.values())
    n = tokens.numel()
    n_image = 0 if images is None else len(images)
    flops = costs.decoder_flops(config, *tokens.shape, len(kept), **costs.what_trains(model.decoder))
    flops += costs.cross_flops(model, n_image * tokens.shape[1], n_image)
    if n_image:
        flops += n_image * costs.image_costs(costs.meta_vlm(spec, c))[0]
    mfu = costs.model_flops_utilisation(flops / total, device)
    print(conditions(device))
    print(f"{n} positions, {len(kept)} with loss, {n_image} images, one process, one micro-step")
    for name, seconds in median.items():
        print(f"  {name:<10} {seconds * 1e3:9.2f} ms  {seconds / total:6.1%}")
    rate = f"{n / total:,.0f} tokens/s" + (f", MFU {mfu:.1%}" if mfu else '')
    print(f"  {'sum':<10} {total * 1e3:9.2f} ms          {rate}")


# --- against transformers ---------------------------------------------------------------------------------------------

# 79M's width and depth, a tower of 729 tokens small enough that the decoder and the loss decide
PEER = dict(n_layer=8, n_head=4, n_embd=512, vocab_size=50432, seq_len=1024, tower=(192, 768, 4, 3, 14, 384))


def peer_models(shape):
    """{'ours', 'peer'}: a function of a batch that returns the loss, and its model."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig
    tower, image_id = SigLIPConfig(*shape['tower']), shape['vocab_size'] - 1
    spec = dict(decoder={k: v for k, v in shape.items() if k != 'tower'}, encoder=SigLIP(tower).spec(),
                projector=dict(kind='mlp2'), image_id=image_id)
    ours = build_vlm(spec, 0)
    vision = {key: value for key, value in vars(tower).items() if key != 'hidden_act'}
    text = LlamaConfig(hidden_size=shape['n_embd'], intermediate_size=ours.decoder.config.n_ffn,
                       num_hidden_layers=shape['n_layer'], num_attention_heads=shape['n_head'],
                       vocab_size=shape['vocab_size'], max_position_embeddings=shape['seq_len'],
                       tie_word_embeddings=False)
    theirs = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=SiglipVisionConfig(**vision), text_config=text, image_token_index=image_id,
        vision_feature_layer=-2, vision_feature_select_strategy='full', image_seq_length=ours.n_token)).train()
    ours.encoder.requires_grad_(False)
    theirs.model.vision_tower.requires_grad_(False)

    def loss_of_ours(tokens, targets, images):
        loss, weight, _ = ours(tokens, targets, images)
        return loss / weight

    def loss_of_theirs(tokens, targets, images):
        pixels = None if images is None else images.float() / 127.5 - 1
        labels = torch.cat((targets.new_full((len(targets), 1), kernels.IGNORE_INDEX), targets[:, :-1]), 1)
        return theirs(input_ids=tokens, pixel_values=pixels, labels=labels, use_cache=False).loss
    return {'ours': (loss_of_ours, ours), 'peer': (loss_of_theirs, theirs)}


def peer(argv, shape=None):
    """
    A training step's time and peak memory against transformers' Llava of one fixed shape, in float32 on the CPU: two
    rows a micro-batch, in turns, the shortest of --repeat. 10 % is four micro-batches of text and one of a row of each.
    """
    own, argv = options(argv, repeat=3)
    if argv:
        raise UserError(f"bench.py step --peer=true knows --repeat=N only, not {argv[0]}")
    shape = shape or PEER
    torch.set_num_threads(os.cpu_count() or 1)
    models, times, peaks = peer_models(shape), {}, {}
    optimizers = {name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
                  for name, (_, model) in models.items()}
    n_token, T = models['ours'][1].n_token, shape['seq_len']
    for repeat in tqdm(range(own['repeat'] + 1), unit='round', disable=None):
        for n_image in (0, 1, 2):
            c = dict(micro_batch_size=2, seq_len=T, seed=repeat, image_ratio=n_image / 2)
            tokens, targets, images, _ = synthetic_batch(c, models['ours'][1], shape['vocab_size'] - 1,
                                                         torch.device('cpu'))
            used = min(T, -(-(n_token + 41) // 8) * 8)                       # the columns that collate leaves in
            cut = (tokens[:, :used], targets[:, :used], images)
            for kind, batch in (('ours', cut if n_image == 2 else (tokens, targets, images)),
                                ('peer', (tokens, targets, images)), *([('peer, cut', cut)] if n_image == 2 else [])):
                loss_of, model = models[kind[:4]]
                train, update = lambda: loss_of(*batch).backward(), optimizers[kind[:4]].step
                if repeat == 0:                                              # warms up, and its memory is watched
                    peaks[kind, n_image] = allocated_at_peak(train)
                else:
                    keep_shortest(times, (kind, n_image), train)
                keep_shortest(times, (kind, 'optimizer'), update)
                model.zero_grad(set_to_none=True)
    held = {name: sum(p.numel() * (12 if p.requires_grad else 4) for p in model.parameters())      # and moments
            for name, (_, model) in models.items()}
    print(conditions(torch.device('cpu')))
    print(f"rows of {T}, 2 a micro-batch, float32, forward, backward and AdamW; shortest of {own['repeat']}, in turns")
    print(f"{'image rows':<12}{'ours s':>9}{'peer s':>9}{'time':>8}{'memory':>8}{'peer without its pads':>24}")
    for share, parts in (('0 %', {0: 1}), ('10 %', {0: 4, 1: 1}), ('100 %', {2: 1})):
        total = {kind: times[kind[:4], 'optimizer'] + sum(n * times[kind, k] for k, n in parts.items())
                 for kind in ('ours', 'peer', 'peer, cut') if all((kind, k) in times for k in parts)}
        memory = [held[name] + max(peaks[name, k] for k in parts) for name in ('ours', 'peer')]
        print(f"{share:<12}{total['ours']:9.2f}{total['peer']:9.2f}{total['ours'] / total['peer']:8.2f}"
              f"{memory[0] / memory[1]:8.2f}"
              + (f"{total['ours'] / total['peer, cut']:24.2f}" if 'peer, cut' in total else ''))


def keep_shortest(times, key, f):
    begin = time.perf_counter()
    f()
    times[key] = min(time.perf_counter() - begin, times.get(key, math.inf))


def allocated_at_peak(f):
    """
    The most bytes that CPU tensors took at once while f ran, beyond those before: from the profiler's records of every
    allocation, those inside of operators included. (Resident memory has what the C library keeps, too.)
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        f()
    now = peak = 0
    for event in sorted(p.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == '[memory]':
            now += event.nbytes()
            peak = max(peak, now)
    return peak


# --- fit: arithmetic --------------------------------------------------------------------------------------------------

ROOM = 0.9                       # of a GPU's memory for tensors: CUDA, NCCL and what the allocator cannot use take some


def fit(argv):
    """Which micro-batch fits into a GPU, for DDP and FSDP2, with and without recomputation: costs.memory's estimate."""
    own, argv = options(argv, gpu_gib=80.0, n_gpu=8, script='pretrain.py')
    c = stage_config(argv, own['script'])
    if own['n_gpu'] < 1 or c['global_batch_size'] % own['n_gpu']:
        raise UserError(f"n_gpu={own['n_gpu']}: expected a divisor of global_batch_size={c['global_batch_size']}")
    spec = costs.paper_spec(c) if own['script'] == 'finetune.py' else costs.described(c, 0, c['stage'] == 'mix')
    model = costs.meta_vlm(spec, c)
    _, per_image = costs.image_costs(model)
    per_gpu = c['global_batch_size'] // own['n_gpu']
    sizes = [n for n in range(1, per_gpu + 1) if per_gpu % n == 0]
    print(f"rows of {c['seq_len']} on {own['n_gpu']} GPUs of {own['gpu_gib']:g} GiB, {ROOM:.0%} of it for tensors; an "
          f"estimate, {per_gpu} rows a GPU and step")
    print(f"{'parallel':<10}{'recompute':<11}{'micro_batch_size':>17}{'GiB':>8}{'GiB at 1':>10}")
    for parallel in ('ddp', 'fsdp'):
        for recompute in (False, True):
            gib = {n: sum(costs.memory_of(c, model, per_image, n_process=own['n_gpu'], parallel=parallel,
                                          micro_batch_size=n, activation_checkpointing=recompute).values()) / 2 ** 30
                   for n in sizes}
            best = max((n for n in sizes if gib[n] <= ROOM * own['gpu_gib']), default=0)
            print(f"{parallel:<10}{'yes' if recompute else 'no':<11}{best or 'none fits':>17}"
                  f"{gib[best] if best else math.nan:8.1f}{gib[1]:10.1f}")


# --- data: what a core can read ---------------------------------------------------------------------------------------

def data(argv):
    """Images/s and tokens/s of one core through the sources of a data folder: text/, captions/, instruct/*.json."""
    own, folders = options(argv, seconds=5.0, seq_len=1024, image_size=384, n_token=0, resize='letterbox', seed=7)
    if len(folders) != 1 or not os.path.isdir(folders[0]):
        raise UserError(f"bench.py data {' '.join(folders)}: expected one data folder, as the README lays it out")
    there = lambda pattern: sorted(glob.glob(os.path.join(glob.escape(folders[0]), pattern)))
    if not there('tokenizer.*'):
        raise UserError(f"{folders[0]} has no tokenizer.json or tokenizer.model")
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(there('tokenizer.*')[0])
    size, T = own['image_size'], own['seq_len']
    n_token = own['n_token'] or (size // 14) ** 2
    sources = [TextSource(path, tokenizer, T) for path in there('text')]
    sources += [CaptionSource(path, tokenizer, T, n_token, size, own['resize']) for path in there('captions')]
    root = (there('instruct/images') or there('instruct') or [''])[0]
    sources += [InstructSource(path, root, tokenizer, T, n_token, size, own['resize'])
                for path in there('instruct/*.json')]
    if not sources:
        raise UserError(f"{folders[0]} has none of text/, captions/, instruct/*.json")
    print(conditions(torch.device('cpu')))
    for source in sources:
        mixture, n, seen = Mixture([source], [1.0], own['seed'], max_bad_samples=1 << 30), 0, {}
        begin = time.perf_counter()
        while time.perf_counter() - begin < own['seconds']:
            batch = collate([mixture[i] for i in range(n, n + 8)], tokenizer.pad_id, names=mixture.names)
            n += 8
            for key, count in batch.stats[source.name].items():
                seen[key] = seen.get(key, 0) + count
        wall = time.perf_counter() - begin
        print(f"  {source.name:<10} {n / wall:10,.1f} rows/s {seen['n_image'] / wall:10,.1f} images/s "
              f"{(seen['n_text'] + seen['n_image_position']) / wall:14,.0f} positions/s, one core")
    # stage 2 at 1.4B: rows of 1024, one in ten with an image
    row = costs.decoder_flops(ModelConfig(24, 16, 2048), 1, 1024, 1024)
    rows = costs.PEAK_FLOPS['A100'] * costs.ASSUMED_UTILISATION / row
    print(f"an A100 at {costs.ASSUMED_UTILISATION:.0%} in config/ckpt80_img10.py takes {rows:.1f} rows/s: "
          f"{0.1 * rows:.1f} images/s, {0.9 * rows * 1024:,.0f} text tokens/s")


COMMANDS = {'step': step, 'fit': fit, 'data': data, 'kernels': bench_kernels, 'tune': tune, 'curve': curve, 'gpu': gpu}

if __name__ == '__main__':
    sys.excepthook = user_error_hook
    if sys.argv[1:2] in (['--help'], ['-h']):
        sys.exit(print(__doc__.strip()))
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(__doc__.strip() + f"\n\nexpected one of: {', '.join(COMMANDS)}")
    COMMANDS[sys.argv[1]](sys.argv[2:])
