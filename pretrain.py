"""
Stage 1: text-only pre-training that keeps checkpoints at 20-100 % of its schedule (paper 2.1.1).
Stage 2: a checkpoint resumed at its own learning rate, with a share of image-caption sequences (paper 2.1.2).

    python pretrain.py config/text.py config/tiny.py                             # stage 1 on a laptop
    python pretrain.py config/ckpt80_img10.py config/tiny.py                     # stage 2 on a laptop
    torchrun --nproc_per_node=8 pretrain.py config/ckpt80_img10.py               # 8 x A100-80GB
    python pretrain.py config/ckpt80_img10.py --dry_run=true                     # what it would do and cost

Sections, tables and appendices named below are those of arXiv 2503.07603.
"""
import dataclasses
import os
import sys
import time
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError

import checkpoint
import common
from common import cooldown_lr, main_lr, remaining_lr
from configurator import configure
from data import (BadSample, CaptionSource, InstructSource, Loader, Mixture, TextSource, find, load_tokenizer)
from errors import user_error_hook
from model import VLM, Decoder, ModelConfig, Projector, load_openlm
from vision import load_encoder

sys.excepthook = user_error_hook

# --- config: change with a file and --key=value -----------------------------------------------------------------------
scale = '1b'                            # names the folder; '{scale}' in init_from is replaced by it
name = 'text'                           # the recipe's name
out_dir = ''                            # '' = out/{scale}/{name}
data_dir = 'data'                       # relative data paths below start here
cache_dir = ''                          # for indexes of tars and JSON whose own folder is read-only
data_hint = 'README.md, "Your own data", says what goes there'                   # shown when data is missing
tokenizer = 'tokenizer.json'            # in data_dir: HF tokenizer.json, or sentencepiece .model
text = (('text', 1.0),)                 # ((folder or glob of .bin or .tar shards, weight), ...), in data_dir
captions = (('captions', 1.0),)         # ((folder or glob of WebDataset tars, weight), ...), in data_dir
instruct = 'instruct/llava_v1_5_mix665k.json'  # LLaVA JSON for instruct_share, in data_dir
instruct_images = 'instruct/images'     # its image root, in data_dir
val_text = ''                           # glob of shards for val_text_loss, in data_dir; '' = none
val_captions = ''                       # glob of tars for val_caption_loss, in data_dir; '' = none
init_from = ''                          # '' = from scratch, a checkpoint folder, or OpenLM weights (.pt, HF folder)
n_layer = 24                            # 1.4B (appendix A)
n_head = 16
n_embd = 2048
n_ffn = 0                               # SwiGLU hidden; 0 = OpenLM's rule
vocab_size = 50432                      # rows of the embedding; special ids live in its free rows
seq_len = 2048                          # positions a row; stage 2: 1024 (2.1.2)
encoder_path = 'siglip-so400m-patch14-384'  # in data_dir: a SigLIP folder or file; 'patch' = no encoder (J.2)
encoder_layer = -2                      # which block's output; -2 without norm = Prismatic's choice
encoder_norm = False                    # the encoder's final norm; with encoder_layer=-1: last_hidden_state
image_size = 384                        # pixels a side for encoder_path='patch'; other encoders know theirs
resize = 'letterbox'                    # 'letterbox' (the paper's), 'naive', 'crop'
image_ratio = 0.0                       # share of sequences with an image, 0..1; 0 and no init_from = stage 1
instruct_share = 0.0                    # share of instruction data inside the image share, 0..1 (3.4)
loss_weight = 'source'               # 'source' = mean per source times its share of rows, 'token' = all alike
train_encoder = False                   # frozen is the paper's choice (appendix I)
max_tokens = 4_319_385_600_000          # positions with images and pads; DCLM-1B's record
max_steps = 0                           # the schedule's length in steps; 0 = from max_tokens
stop_after = 0                          # end at this step with a checkpoint, schedule unchanged; 0 = off
global_batch_size = 256                 # sequences per optimizer step (table 2)
micro_batch_size = 8                    # sequences per process per micro-step; accumulation follows
schedule = 'main'                       # 'main', 'cooldown' (from the checkpoint's own lr), 'rewarm' (0 % and 100 %)
lr = 1e-2                               # peak of the main schedule
final_lr = 1e-5                         # paper; the DCLM records say 3e-5
warmup_steps = 5000                     # of 'main'
cooldown_shape = 'cosine'         # 'cosine' = flat start from lr(x), 'remaining' = the rest of the main arc
start_lr = 0.0                          # of 'cooldown'; 0 = what the checkpoint's schedule says
rewarm_lr = 0.0                         # peak of 'rewarm'; 0 = 0.3 x lr, as 3e-3 is to 1e-2 (2.1.2)
rewarm_steps = 1000                     # warmup of 'rewarm'; the paper gives none
moments_warmup_steps = 100              # warmup of 'cooldown' when the checkpoint has no AdamW moments
projector_lr = 0.0                  # the projector's lr where the schedule starts or peaks; 0 = the decoder's
encoder_lr = 0.0                        # the same for a trained encoder; 0 = the decoder's
weight_decay = 0.01                     # on all parameters (OpenLM's rule)
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0                         # of the global norm; 0 = off
z_loss = 1e-6                           # times logsumexp^2 over kept rows
seed = 7                                # initial weights, order of the data
device = 'auto'                         # 'auto', 'cpu', 'cuda'
dtype = ''                              # autocast: 'bfloat16', 'float32', '' = bfloat16 on CUDA, float32 on CPU
n_thread = 0                            # CPU threads a process; 0 = all, divided among the processes
compile = False                         # torch.compile, block by block
activation_checkpointing = False        # recompute the blocks in backward: less memory, a third more work
n_worker = 2                            # loader processes per rank; 0 = inline
resume = 'auto'                         # 'auto' = go on from ckpt_last, which wins over init_from; 'never'
max_bad_samples = 0                     # replace, count and list up to N unreadable samples; 0 = stop at the first
save_every = 1000                       # steps between ckpt_step_N; 0 = off
keep_percent = (20, 40, 60, 80, 100)    # keep ckpt_NNN at these percents of max_steps
keep_steps = 2                          # how many ckpt_step_N stay
keep_optimizer = 'percent'              # whose optim.pt stays: 'all', 'percent', 'last', 'none'
save_encoder = True                     # False stores the encoder's path and digest only
eval_every = 0                          # steps between validations; 0 = off
eval_rows = 512                         # rows per validation set
log_every = 10                          # steps between printed lines; log.jsonl has every step
wandb = False                           # also log to Weights & Biases (pip install wandb)
tensorboard = False                     # also log to TensorBoard (pip install tensorboard)
dry_run = False                         # say what would happen, then exit
# --- config end -------------------------------------------------------------------------------------------------------
config = configure(globals())

# --- derived values and checks ----------------------------------------------------------------------------------------
init_from = config['init_from'] = init_from.replace('{scale}', scale)
out_dir = out_dir or os.path.join('out', scale, name)
data_path = lambda path: os.path.join(data_dir, path)
common.check_config(config)
if schedule == 'cooldown' and not init_from:
    sys.exit("schedule='cooldown' goes on from a checkpoint: give --init_from=FOLDER, or --schedule=rewarm from "
             "scratch")
multimodal = image_ratio > 0 or bool(init_from)     # at ratio 0 stage 2 has a projector too: the axis changes one thing
tokens_per_step = global_batch_size * seq_len
max_steps = max_steps or round(max_tokens / tokens_per_step)
if max_steps < 1:
    sys.exit(f"max_tokens={max_tokens}: less than one step of {tokens_per_step} tokens; give more, or --max_steps=N")
if train_encoder and not save_encoder:
    sys.exit("train_encoder=True with save_encoder=False would lose what the encoder learns: give --save_encoder=true")
percent_steps = {}                                                                       # step: its checkpoints' names
for p in dict.fromkeys(keep_percent):
    percent_steps.setdefault(round(p / 100 * max_steps), []).append(f'ckpt_{p:03d}')
if 0 in percent_steps:
    print(f"!!! max_steps={max_steps} is too short for {', '.join(percent_steps.pop(0))}: not kept")
try:
    model_config = ModelConfig(n_layer, n_head, n_embd, vocab_size, seq_len, n_ffn)
except ValueError as e:
    sys.exit(str(e))
if dry_run:
    sets = {'text': [data_path(g) for g, _ in text], 'captions': [data_path(g) for g, _ in captions],
            'instruct': [data_path(instruct)]}
    shares = {'text': 1 - image_ratio, 'captions': image_ratio * (1 - instruct_share),
              'instruct': image_ratio * instruct_share}
    inputs = [data_path(tokenizer)] + [init_from] * bool(init_from)
    inputs += [data_path(encoder_path)] * (multimodal and encoder_path != 'patch')
    inputs += [data_path(instruct_images)] * (shares['instruct'] > 0)
    inputs += [data_path(p) for p in (val_text, val_captions) if p and eval_every]
    common.print_dry_run(config, model_config, out_dir=out_dir, max_steps=max_steps, tokens_per_step=tokens_per_step,
                         shares=shares, sets=sets,
                         inputs=inputs, n_checkpoint=len(percent_steps))
    sys.exit(0)
last = os.path.join(out_dir, 'ckpt_last')
resuming = resume == 'auto' and os.path.exists(last)
checkpoint.check_last(last)
if resume == 'never' and os.path.lexists(last):
    sys.exit(f"{out_dir} already holds a run and resume='never': remove it, or give another --out_dir")
if init_from and not resuming and not os.path.exists(init_from):
    sys.exit(f"init_from={init_from} not found{checkpoint.how_to_make(init_from, scale)}")
if init_from and os.path.lexists(os.path.join(init_from, 'ckpt_last')):
    sys.exit(f"init_from={init_from} is the folder of a run: give one of its checkpoints, such as "
             f"{os.path.join(init_from, 'ckpt_080')}")

# --- devices ----------------------------------------------------------------------------------------------------------
process = common.setup_process(device, dtype, n_thread)
n_micro = common.accumulation(global_batch_size, micro_batch_size, process.world_size)
stop_signal = common.StopSignal()

# --- where it starts --------------------------------------------------------------------------------------------------
try:
    ours = bool(init_from) and os.path.exists(os.path.join(init_from, 'meta.json'))       # else OpenLM weights, or none
    base = checkpoint.read_meta(init_from) if ours else None
    meta = checkpoint.read_meta(last) if resuming else None
except ValueError as e:
    sys.exit(str(e))
first_step, bad_before, seen = (meta['step'], meta['bad_samples'], meta['seen']) if resuming else (0, [], None)
checkpoint.check_same_start(process, first_step, out_dir)
text_rows = (meta or base or {}).get('text_rows', {})                                    # what the cursors count
if resuming:
    checkpoint.check_resume(meta, config, last, ('text', 'mix'))
    start_cursor, text_seed = meta['start_cursor'], meta['text_seed']
    main, begin = meta['schedule']['main'], meta['schedule']['begin']
    base_lr = meta['schedule']['top']
    if first_step >= max_steps:
        process.print(f"{out_dir} is finished: {first_step} of {max_steps} steps")
        sys.exit(0)
    process.print(f"resuming {out_dir} at step {first_step} of {max_steps}")
else:
    # text goes on where the base stopped, in the base's own order; a base without a cursor starts at row 0
    start_cursor, text_seed = (base['cursor'], base['text_seed']) if base else ({}, seed)
    on_main = base is not None and base['schedule']['kind'] == 'main'
    main, begin = (base['schedule']['main'], base['schedule']['step']) if on_main else (None, None)
    base_lr = base['schedule'].get('lr') if base else None

# --- data -------------------------------------------------------------------------------------------------------------
def paths_of(pattern):
    try:
        return find(data_path(pattern), '.bin', '.tar')
    except ValueError as e:
        sys.exit(f"{e}; {data_hint}")


def text_mixture(patterns, start):
    names = [common.text_name(g, patterns) for g, _ in patterns]
    sources = [TextSource(paths_of(g), codec, seq_len, name, text_rows.get(name, {}).get('row_len', 0), cache_dir)
               for (g, _), name in zip(patterns, names)]
    return Mixture(sources, [w for _, w in patterns], text_seed, start=start, max_bad_samples=max_bad_samples)


def caption_mixture(patterns):
    sources = [CaptionSource(paths_of(g), codec, seq_len, encoder.n_token, encoder.image_size, resize, g, cache_dir)
               for g, _ in patterns]
    return Mixture(sources, [w for _, w in patterns], seed, max_bad_samples=max_bad_samples)


def loader(mixture, start, stop, batch, n_worker):
    return Loader(mixture, start=start, stop=stop, global_batch_size=batch, micro_batch_size=micro_batch_size,
                  rank=process.rank, world_size=process.world_size, pad_id=codec.pad_id, pad_to=seq_len,
                  n_worker=n_worker, pin_memory=process.device.type == 'cuda')


if not os.path.exists(data_path(tokenizer)):
    sys.exit(f"tokenizer {data_path(tokenizer)} not found; {data_hint}")
try:
    codec = load_tokenizer(data_path(tokenizer))
    if codec.vocab_size > vocab_size:
        sys.exit(f"tokenizer {data_path(tokenizer)} needs {codec.vocab_size} rows, vocab_size={vocab_size}: give more "
                 "rows")
    encoder = None
    if multimodal:
        path = 'patch' if encoder_path == 'patch' else data_path(encoder_path)
        if path != 'patch' and not os.path.exists(path):
            sys.exit(f"encoder {path} not found; {data_hint}")
        encoder = load_encoder(path, encoder_layer, encoder_norm, image_size)
    parts = [(text_mixture(text, start_cursor), 1 - image_ratio)] if image_ratio < 1 else []
    if image_ratio > 0:
        images = [(caption_mixture(captions), 1 - instruct_share)] if instruct_share < 1 else []
        if instruct_share > 0:
            if not os.path.exists(data_path(instruct)):
                sys.exit(f"instructions {data_path(instruct)} not found; {data_hint}")
            chat = InstructSource(data_path(instruct), data_path(instruct_images), codec, seq_len, encoder.n_token,
                                  encoder.image_size, resize, cache_dir=cache_dir)
            images.append((chat, instruct_share))
        images = Mixture([m for m, _ in images], [w for _, w in images], seed, max_bad_samples=max_bad_samples)
        parts.append((images, image_ratio))
    mixture = Mixture([m for m, _ in parts], [w for _, w in parts], seed)
    for shuffled in parts[0][0].sources.values() if start_cursor and image_ratio < 1 else []:
        if shuffled.name not in start_cursor:
            process.print(f"!!! text source {shuffled.name!r} is new: it starts at its first row; {init_from} knows "
                          f"{', '.join(map(repr, start_cursor))}")
        elif text_rows.get(shuffled.name, {}).get('n_row', shuffled.n_row) != shuffled.n_row:
            process.print(f"!!! text source {shuffled.name!r} has {shuffled.n_row} rows, in "
                          f"{last if resuming else init_from} it had {text_rows[shuffled.name]['n_row']}: their order "
                          "is new, so text may come again")
    validation = {}
    if eval_every and val_text:
        validation['val_text_loss'] = text_mixture(((val_text, 1.0),), None)
    if eval_every and val_captions and multimodal:
        validation['val_caption_loss'] = caption_mixture(((val_captions, 1.0),))
except (ValueError, OSError) as e:
    sys.exit(str(e))

# the workers fork here, before this process holds GPU memory
last_step = max(first_step, min(max_steps, stop_after)) if stop_after else max_steps
batches = loader(mixture, first_step, last_step, global_batch_size, n_worker)
process.start_device()

# --- model ------------------------------------------------------------------------------------------------------------
torch.manual_seed(seed)
decoder = Decoder(model_config)
torch.manual_seed(seed + 1)                        # the projector's initial weights do not depend on the decoder's size
projector = Projector(encoder.width, n_embd) if multimodal else None
model = VLM(decoder, encoder, projector, image_id=codec.image_id, z_loss=z_loss)
decoder.activation_checkpointing = activation_checkpointing
try:
    if resuming:
        fresh = [k for k in checkpoint.load_weights(model, last) if save_encoder or not k.startswith('encoder.')]
        if fresh:
            sys.exit(f"{last}: lacks {fresh[0]}")
    elif base:
        checkpoint.check_model(base, model_config, init_from)
        fresh = checkpoint.load_weights(model, init_from)
        if [k for k in fresh if k.startswith('decoder.')]:
            sys.exit(f"{init_from}: its decoder has other layers than this one (n_layer={n_layer})")
        if codec.sha256 != base['tokenizer_sha256']:
            sys.exit(f"{init_from} was trained with another tokenizer than {data_path(tokenizer)} (their sha256 "
                     "differ)")
    elif init_from:
        try:
            imported = load_openlm(init_from)
        except (OSError, RuntimeError, UnpicklingError, SafetensorError) as e:
            sys.exit(f"{init_from}: not readable as OpenLM weights ({str(e).splitlines()[0]})")
        if dataclasses.replace(imported.config, seq_len=seq_len) != model_config:
            sys.exit(f"{init_from} is {imported.config}, this run's decoder is {model_config}")
        decoder.load_state_dict(imported.state_dict())
except ValueError as e:
    sys.exit(str(e))
if encoder is not None:
    sha = (meta or base or {}).get('encoder_sha256')  # of a checkpoint saved without its encoder
    if sha and checkpoint.tensor_digest(encoder) != sha:
        sys.exit(f"{last if resuming else init_from} was trained with another encoder than {path} (their sha256 "
                 "differ)")
    if not save_encoder and not resuming:
        checkpoint.check_encoder_file(encoder, path, encoder_layer, encoder_norm, image_size)
    encoder.requires_grad_(train_encoder)
model.to(process.device)
if compile:
    for block in decoder.layers:
        block.compile(dynamic=None)

# --- schedule ---------------------------------------------------------------------------------------------------------
if schedule == 'cooldown':
    if not start_lr and base_lr is None:
        sys.exit(f"{init_from} does not say its lr: give --start_lr=LR (figure 3: 9.7e-4 at 80 % of the 1.4B run)")
    top = start_lr or base_lr
    if cooldown_shape == 'remaining' and main is None:
        sys.exit(f"cooldown_shape='remaining' needs a checkpoint of a main schedule; {init_from} is none")
elif schedule == 'rewarm':
    top = rewarm_lr or 0.3 * lr
else:
    top, begin = lr, None
    main = dict(peak=lr, final=final_lr, warmup=warmup_steps, total=max_steps)
if top <= 0:
    sys.exit(f"schedule={schedule!r} starts from lr {top}: expected above 0 (lr, start_lr or rewarm_lr)")


def lr_at(step):
    """The decoder's lr at step 0, 1, ... of this run."""
    if schedule == 'main':
        return main_lr(step, **main)
    if schedule == 'rewarm':
        return main_lr(step, peak=top, final=final_lr, warmup=rewarm_steps, total=max_steps)
    warm = min(1.0, (step + 1) / moments_warmup_steps) if moments == 'none' and moments_warmup_steps else 1.0
    if cooldown_shape == 'remaining':
        return warm * remaining_lr(step, main=main, at=begin, total=max_steps)
    return warm * cooldown_lr(step, start=top, final=final_lr, total=max_steps)


# --- optimizer and resume ---------------------------------------------------------------------------------------------
shares = {'decoder': 1.0}
if multimodal:
    shares['projector'] = (projector_lr or top) / top
    shares['encoder'] = (encoder_lr or top) / top
optimizer = common.make_optimizer(model, shares, weight_decay=weight_decay, betas=(beta1, beta2))
moments = 'fresh'                                    # whose AdamW moments this run began with; recorded in meta.json
try:
    if resuming:
        moments = meta['moments']
        if checkpoint.load_optimizer(optimizer, last) is None:
            sys.exit(f"{last}: optim.pt is gone, so the run cannot go on exactly; use it as --init_from of a new run")
        checkpoint.restore_rng(meta, last)
    elif schedule == 'cooldown':
        fresh = checkpoint.load_optimizer(optimizer, init_from) if base else None
        moments = 'none' if fresh is None else 'loaded'
        process.print(f"no AdamW moments in {init_from}: fresh ones, {moments_warmup_steps} steps of warmup"
                      if fresh is None else f"AdamW moments from {init_from}; fresh for {len(fresh)} tensors")
except ValueError as e:
    sys.exit(str(e))
warmup = {'main': warmup_steps, 'rewarm': rewarm_steps}.get(schedule, moments_warmup_steps * (moments == 'none'))
if warmup >= max_steps:
    process.print(f"!!! a warmup of {warmup} steps is not over after all {max_steps}: lr never reaches its peak")
network = common.distributed(model) if process.world_size > 1 else model

# --- the loop ---------------------------------------------------------------------------------------------------------
if process.master:
    checkpoint.open_folder(out_dir)
process.barrier()
logger = common.Logger(process, out_dir, first_step, max_steps, every=log_every, wandb=wandb, tensorboard=tensorboard,
                       config=config)
bad_samples, n_bad_sample = [], len(bad_before)
seen = seen or {leaf: dict.fromkeys(common.COUNTS, 0) for leaf in mixture.names}
process.print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, {max_steps} steps of "
              f"{global_batch_size} x {seq_len}, {n_micro} micro-steps, {process.world_size} processes on "
              f"{process.device.type} in {str(process.dtype)[6:]}, lr {lr_at(0):.3e} -> {lr_at(max_steps - 1):.3e}")


def save(step, names):
    """One checkpoint after `step` steps, by rank 0."""
    every_bad = bad_before + process.gather(bad_samples)
    if process.master:
        n = step * global_batch_size
        text_cursor = {**start_cursor, **mixture.cursor(n)}
        info = dict(stage='text' if not multimodal else 'mix', config=config, step=step, tokens=step * tokens_per_step,
                    samples=n, seen=seen, cursor=text_cursor, start_cursor=start_cursor, text_seed=text_seed,
                    init_from=init_from, moments=moments, bad_samples=every_bad, epochs=mixture.epochs(n),
                    text_rows={**text_rows, **common.text_rows(mixture)},
                    schedule=dict(kind=schedule, main=main, begin=begin, step=step, top=top, lr=lr_at(step)))
        try:
            checkpoint.save_checkpoint(out_dir, names, model, optimizer, codec, info, save_encoder=save_encoder)
            checkpoint.prune_checkpoints(out_dir, keep_optimizer=keep_optimizer, keep_steps=keep_steps)
        except OSError as e:
            process.exit(str(e))
    process.barrier()


@torch.no_grad()
def validate(step):
    """Mean nats per kept token of each validation set: own loader, no random numbers: training is undisturbed."""
    model.eval()
    line, per_micro = {'step': step}, micro_batch_size * process.world_size
    for key, held_out in validation.items():
        there = sum(len(s.source) for s in held_out.sources.values())  # no item comes twice if there are enough
        rows = max(1, min(eval_rows, there) // per_micro) * per_micro
        nll = kept = 0
        for batch in loader(held_out, 0, 1, rows, 0):
            batch = batch.to(process.device)
            with process.autocast():
                model(batch.tokens, batch.targets, batch.images, batch.image_index, rows=batch.kept)
            nll, kept = nll + float(model.row_loss[0].sum()), kept + len(batch.kept)
        nll, kept = process.host_sum([nll, kept])
        line[key] = nll / kept
    model.train()
    logger.log(line)


reader, stopped = common.StepReader(process, logger, mixture.names), False
try:
    for step in range(first_step, last_step):
        waited = time.perf_counter()
        micro = [next(batches) for _ in range(n_micro)]
        waited = time.perf_counter() - waited
        # what the global step holds, summed on the host: the GPU is not waited for
        bad = [message for batch in micro for message in batch.bad]
        counts, n_bad, stop = common.count(process, micro, mixture.names, len(bad), stop_signal.set)
        if stop:
            process.print(f"asked to stop (SIGTERM, Ctrl-C): stopping after step {step}")
            last_step, stopped = step, True                                              # the same on every rank
            break
        bad_samples, n_bad_sample = bad_samples + bad, n_bad_sample + n_bad
        if n_bad_sample > max_bad_samples:
            process.exit(f"{n_bad_sample} bad samples are more than max_bad_samples={max_bad_samples}; "
                         f"on this process: {'; '.join(bad_samples[-3:])}")
        row_weight, share = common.loss_weights(counts, loss_weight)                     # (n_leaf,) a target's weight
        row_weight = process.send(row_weight)
        optimizer.zero_grad(set_to_none=True)
        row_loss = []
        for i, batch in enumerate(micro):
            network.require_backward_grad_sync = i == n_micro - 1               # set before forward: ddp reads it there
            batch = batch.to(process.device, non_blocking=True)
            weights = row_weight[batch.source][:, None].expand_as(batch.tokens)                           # (B,T)
            with process.autocast():
                loss_sum, _ = network(batch.tokens, batch.targets, batch.images, batch.image_index, weights, batch.kept)
            (loss_sum * process.world_size).backward()                           # ddp averages ranks: undo 1/world_size
            row_loss.append(model.row_loss)
        if multimodal and counts['n_image'].sum() == 0:
            common.drop_gradients(model.projector, model.encoder)                        # no decay, no moment update
        norm, skipped = common.optimizer_step(optimizer, lr_at(step), grad_clip)
        common.add_counts(seen, counts, mixture.names)
        reader.push(dict(step=step + 1, tokens=(step + 1) * tokens_per_step, lr=lr_at(step), data_wait_s=waited,
                         mem_gib=common.memory_gib(process.device)),
                    micro, row_loss, norm, skipped, counts, share, seen,
                    model_config.flops_per_token(seq_len))
        done = step + 1
        names = percent_steps.get(done, [])
        if not names and (done == last_step or (save_every and done % save_every == 0)):
            names = [f'ckpt_step_{done}']
        if validation and (done % eval_every == 0 or done == max_steps):
            reader.flush()
            validate(done)
        if names:                                                              # after validation: a resume repeats none
            reader.flush()                                                              # the log reaches the checkpoint
            save(done, names)
    reader.flush()
    if stopped and last_step > first_step and last_step not in percent_steps:
        save(last_step, [f'ckpt_step_{last_step}'])
except BadSample as e:
    process.exit(f"{e} (max_bad_samples={max_bad_samples})")
except (RuntimeError, EOFError, ConnectionError):
    batches.check_workers()
    raise
logger.close()
process.print(f"{out_dir}: {last_step} of {max_steps} steps done")
process.exit()
