"""
Stage 1: text-only pre-training that keeps checkpoints at 20, 40, 60, 80 and 100 % of its schedule (paper 2.1.1).
Stage 2: a checkpoint resumed at its own learning rate, with a share of image-caption sequences (paper 2.1.2).

    python pretrain.py config/text.py config/tiny.py                             # stage 1 on a laptop
    python pretrain.py config/ckpt80_img10.py config/tiny.py                     # stage 2 on a laptop
    torchrun --nproc_per_node=8 pretrain.py config/ckpt80_img10.py               # 8 x A100-80GB
    python pretrain.py config/ckpt80_img10.py --dry_run=true                     # what it would do and cost

Sections, tables and appendices named below are those of arXiv 2503.07603.
"""
import os
import sys

import torch

import checkpoint
import common
import costs
from adapters import set_trained, trains_decoder
from configurator import configure
from data import CaptionSource, InstructSource, Mixture, load_tokenizer
from errors import UserError, leave, user_error_hook
from model import FRESH_CROSS, build_vlm, load_openlm, openlm_moments, vlm_spec
from schedules import lr_at, top_lr
from text_cond import FRESH_TEXT_COND
from vision import encoder_files, fill_encoder

sys.excepthook = user_error_hook

# --- config: change with a file and --key=value -----------------------------------------------------------------------
# In brackets: the allowed range or words; `pairs`: ((text, number), ...); `free`: may change when a run is resumed.
stage = 'text'                          # ['text' | 'mix'] stage 1, or stage 2 (a model with images, at any ratio)
scale = '1b'                            # names the folder; '{scale}' in init_from is replaced by it
name = 'text'                           # the recipe's name
out_dir = ''                            # [free] '' = out/{scale}/{name}
data_dir = 'data'                       # relative data paths below start here
cache_dir = ''                          # [free] for indexes of tars and JSON whose own folder is read-only
data_hint = 'README.md, "Your own data", says what goes there'  # [free] what the error for missing data says to do
tokenizer = 'tokenizer.json'            # in data_dir: HF tokenizer.json, or sentencepiece .model
text = (('text', 1.0),)                 # [pairs] (folder or glob of .bin or .tar shards, weight), in data_dir
captions = (('captions', 1.0),)         # [pairs] (folder or glob of WebDataset tars, weight), in data_dir
caption_field = 'auto'                  # ['auto' | 'txt' | 'json' | 'syn'] which member of a tar is the caption
instruct = 'instruct/llava_v1_5_mix665k.json'  # LLaVA JSON for instruct_share, in data_dir
instruct_images = 'instruct/images'     # its image root, in data_dir
boxes = 'original'                      # ['original' | 'letterbox'] its boxes are shares of the photo, or of its square
val_text = ''                           # [free] glob of shards for val_text_loss, in data_dir; '' = none
val_captions = ''                       # [free] glob of tars for val_caption_loss, in data_dir; '' = none
init_from = ''                          # '' = from scratch, a checkpoint folder, or OpenLM weights (.pt, HF folder)
n_layer = 24                            # [>= 1] 1.4B (appendix A)
n_head = 16                             # [>= 1]
n_embd = 2048                           # [>= 1]
n_ffn = 0                               # [>= 0] SwiGLU hidden; 0 = OpenLM's rule
vocab_size = 50432                      # [>= 1] rows of the embedding; special ids live in its free rows
seq_len = 2048                          # [>= 1] positions of a row with its image; stage 2: 1024 (appendix C)
document_mask = False                   # text sees its own document only: attention starts anew after an end-of-text
image_mask = 'causal'                   # ['causal' | 'prefix'] 'prefix': the positions of an image see each other
encoder = 'siglip'                      # ['siglip' | 'dinov2' | 'dinosiglip' | 'patch'] 'patch' = none, pixels (J.2)
encoder_path = 'siglip-so400m-patch14-384'  # in data_dir: the SigLIP folder or file
dinov2_path = 'dinov2-with-registers-large'  # in data_dir: the DINOv2 folder
encoder_fusion = 'channel'              # ['channel' | 'interleave'] of 'dinosiglip': its features side by side
                                        # (Prismatic), or two tokens a patch in turn
encoder_layer = -2                      # index into its hidden states; -2 = all blocks but the last, as Prismatic
encoder_norm = False                    # apply its final norm; with encoder_layer=-1 that is last_hidden_state
encoder_weights = 'file'                # ['file' | 'random'] 'random' = an untrained tower of that shape (J.2)
projector = 'mlp2'                      # ['linear' | 'mlp2' | 'mlp4' | 'attn' | 'perceiver'] features to the decoder's
                                        # width; 'mlp2' is appendix B's
token_mode = ''                         # ['' | 'pool' | 'res' | 'query'] what makes image_tokens: the grid of features
                                        # pooled, patches at another image_size, or the queries of a perceiver
image_tokens = 0                        # [>= 0, <= 65536] positions of an image; 0 = as many as the encoder gives
image_size = 0                          # [>= 0] pixels a side; 0 = what the encoder was trained at ('dinosiglip': its
                                        # SigLIP; 'patch': 384), else its positions are resized to that (bicubic)
fusion = 'sequence'                     # ['sequence' | 'cross'] an image's features in the row, or one position for it
                                        # and gated cross-attention to them (Flamingo)
cross_every = 4                         # [>= 1] of 'cross': before every so many blocks; 6 of 51.4M at 1.4B
text_cond = 'none'                      # ['none' | 'append' | 'prefix'] an image of a question is encoded with it: its
                                        # tokens follow the patches, or are a gated prefix (text_cond.py)
cond_layers = 0                         # [>= 0] of 'prefix': in the encoder's last so many blocks; 0 = all
resize = 'letterbox'                    # ['letterbox' | 'naive' | 'crop'] 'letterbox' is the paper's
aspect = 'square'                       # ['square' | 'keep'] 'keep' = Idefics2's: a grid for each image, whose longer
                                        # edge is at most image_size, the other 27/70 of it at least; `resize` rests
split = False                           # each image becomes five, its quarters and the whole: 5 times the positions
image_ratio = 0.0                       # [>= 0, <= 1] share of sequences with an image
instruct_share = 0.0                    # [>= 0, <= 1] share of instruction data inside the image share (3.4)
loss_weight = 'source'                  # ['source' | 'token'] each source's mean loss by its share of rows, or one mean
freeze = 'encoder'                      # ['none' | 'decoder' | 'encoder' | 'both'] what stays as it is (appendix I)
lora_rank = 0                           # [>= 0, <= 65536] of adapters, which train in their part's stead; 0 = none
lora_alpha = 0.0                        # [>= 0] their scale is alpha / rank; 0 = 2 x rank, as LLaVA-1.5 (128 and 256)
rslora = False                          # True = alpha / sqrt(rank) (arXiv 2312.03732)
dora = False                            # True = DoRA, a magnitude and a direction (arXiv 2402.09353)
lora_on = 'decoder'                     # ['decoder' | 'encoder' | 'both'] every linear layer of its blocks
max_tokens = 4_319_385_600_000          # [>= 0] positions, those of images and padding included; DCLM-1B's record
max_steps = 0                           # [>= 0] the schedule's length in steps; 0 = from max_tokens
stop_after = 0                          # [>= 0, free] end at this step with a checkpoint, schedule unchanged; 0 = off
global_batch_size = 256                 # [>= 1] sequences per optimizer step (table 2)
micro_batch_size = 8                    # [>= 1, free] upper limit per process: the largest divisor up to it is taken
schedule = 'main'                       # ['main' | 'cooldown' | 'rewarm'] from a checkpoint: go on at its own lr
                                        # ('cooldown'), or warm up again ('rewarm', for starts at 0 % and 100 %)
lr = 1e-2                               # [> 0] peak of the main schedule; 'rewarm' peaks at 0.3 of it
final_lr = 1e-5                         # [>= 0] the paper's; the DCLM records say 3e-5
warmup_steps = 5000                     # [>= 0] of 'main'
warmup_from_zero = False                # True: the first step's lr is 0; False: peak / warmup steps (OpenLM)
cooldown_shape = 'cosine'               # ['cosine' | 'remaining'] its own cosine, or the rest of the main one
start_lr = 0.0                          # [>= 0] of 'cooldown'; 0 = what the checkpoint says: its schedule or optimizer
rewarm_lr = 0.0                         # [>= 0] peak of 'rewarm'; 0 = 0.3 x lr, as 3e-3 is to 1e-2 (2.1.2)
rewarm_steps = 1000                     # [>= 0] warmup of 'rewarm'; the paper gives none
moments_warmup_steps = 100              # [>= 0] warmup of 'cooldown' when the checkpoint has no AdamW moments
projector_lr = 0.0                      # [>= 0] the highest lr of projector, cross blocks, text_cond, where the decoder
                                        # has its own; 0 = the same
encoder_lr = 0.0                        # [>= 0] the same for a trained encoder
weight_decay = 0.01                     # [>= 0]
decay = 'all'                           # ['all' | 'matrices'] 'all' = gains and biases too (OpenLM's rule)
beta1 = 0.9                             # [>= 0, < 1]
beta2 = 0.95                            # [>= 0, < 1]
grad_clip = 1.0                         # [>= 0] of the global norm; 0 = off
z_loss = 1e-6                           # [>= 0] weight of the mean logsumexp^2 of the logits at kept targets
seed = 7                                # [>= 0, < 9.2e18] initial weights, order of the data
device = 'auto'                         # ['auto' | 'cpu' | 'cuda', free]
dtype = ''                              # ['' | 'bfloat16' | 'float32'] autocast; '' = bfloat16 on CUDA, float32 on CPU
n_thread = 0                            # [>= 0, <= 1024, free] CPU threads a process; 0 = all, divided among processes
parallel = 'ddp'                        # ['ddp' | 'fsdp', free] the model on every process, or cut among them (7B)
compile = False                         # [free] torch.compile, block by block; off until a GPU has measured it
activation_checkpointing = False        # [free] recompute the blocks in backward: less memory, a third more work
n_worker = 2                            # [>= 0, free] loader processes per rank; 0 = inline
resume = 'auto'                         # ['auto' | 'never', free] 'auto' = from ckpt_last, which wins over init_from
max_bad_samples = 0                     # [>= 0, free] replace, count and list up to N unreadable samples; 0 = stop
allow_changed_data = False              # [free] resume although data files have changed since the checkpoint
save_every = 1000                       # [>= 0, free] steps between ckpt_step_N; 0 = off
keep_percent = (20, 40, 60, 80, 100)    # [>= 1, <= 100] keep ckpt_NNN at these percents of max_steps
keep_steps = 2                          # [>= 0, free] how many ckpt_step_N stay
keep_optimizer = 'percent'              # ['all' | 'percent' | 'last' | 'none', free] whose optim.pt stays
eval_every = 0                          # [>= 0, free] steps between validations; 0 = off
eval_rows = 512                         # [>= 1, free] rows per validation set
log_every = 10                          # [>= 1, free] steps between printed lines; log.jsonl has every step
wandb = False                           # [free] also log to Weights & Biases (pip install wandb)
tensorboard = False                     # [free] also log to TensorBoard (pip install tensorboard)
dry_run = False                         # [free] say what would happen, then exit
# --- config end -------------------------------------------------------------------------------------------------------
config = configure(globals())

# --- derived values ---------------------------------------------------------------------------------------------------
init_from = config['init_from'] = init_from.replace('{scale}', scale)
out_dir = out_dir or os.path.join('out', scale, name)
data_path = lambda path: os.path.join(data_dir, path)
has_images = stage == 'mix'                      # also at ratio 0: runs of different ratio differ in nothing else
if image_ratio > 0 and not has_images:
    raise UserError(f"image_ratio={image_ratio} with stage='text': give --stage=mix, or a recipe of stage 2")
if has_images and encoder_path == 'patch':
    raise UserError("encoder_path='patch': an encoder of pixels alone is --encoder=patch; encoder_path is a folder")
if text_cond != 'none' and image_ratio > 0 and instruct_share == 0:
    raise UserError(f"text_cond={text_cond!r} with instruct_share=0: captions have no question, so nothing would train "
                    "it; give --instruct_share, or --text_cond in stage 3")
if lora_rank and not init_from:
    raise UserError(f"lora_rank={lora_rank} without a base: adapters go on trained weights; give --init_from=FOLDER")
if schedule == 'cooldown' and not init_from:
    raise UserError("schedule='cooldown' goes on from a checkpoint: give --init_from=FOLDER; --schedule=rewarm needs "
                    "none")
max_steps = max_steps or round(max_tokens / (global_batch_size * seq_len))
if max_steps < 1:
    raise UserError(f"max_tokens={max_tokens}: less than one step of {global_batch_size * seq_len}; give more, or "
                    "--max_steps=N")
keep = {}                                        # step: name of the checkpoint that is kept there
for percent in dict.fromkeys(keep_percent):
    step = round(percent / 100 * max_steps)
    if step == 0 or step in keep:
        taken = f", as is {keep[step]}" if step in keep else ''
        raise UserError(f"keep_percent={keep_percent}: {percent} % of {max_steps} steps is step {step}{taken}: give "
                        "fewer, such as --keep_percent=(100,), or more steps")
    keep[step] = f'ckpt_{percent:03d}'

# --- inputs -----------------------------------------------------------------------------------------------------------
towers = encoder_files(config) if has_images else {}
needed = [tokenizer]                             # in data_dir
needed += common.patterns_of('text', text) if image_ratio < 1 else []
needed += common.patterns_of('captions', captions) if image_ratio > 0 and instruct_share < 1 else []
needed += [instruct, instruct_images] if image_ratio * instruct_share > 0 else []
needed += [pattern for pattern in (val_text, val_captions if has_images else '') if pattern and eval_every]
inputs = dict.fromkeys([*towers.values(), *map(data_path, needed)], data_hint)
if init_from and not os.path.exists(os.path.join(out_dir, 'ckpt_last')):
    inputs[init_from] = checkpoint.how_to_make(init_from, scale)
if dry_run:
    if os.environ.get('RANK', '0') != '0':
        sys.stdout = open(os.devnull, 'w')                       # one process speaks
    costs.print_config(config)
    costs.print_cost(config, costs.described(config, 0, has_images), out_dir=out_dir, max_steps=max_steps,
                     n_keep=len(keep))
common.require(inputs, dry_run)

# --- where it starts --------------------------------------------------------------------------------------------------
process = common.setup_process(device, dtype, n_thread)
run = common.Run(process, __file__, config, out_dir, init_from, stages=('text', 'mix'))
run.plan(max_steps, keep)
tokenizer = load_tokenizer(data_path(tokenizer))
if tokenizer.vocab_size > vocab_size:
    raise UserError(f"tokenizer {tokenizer.path} needs {tokenizer.vocab_size} rows, vocab_size={vocab_size}: give more "
                    "rows")
spec = vlm_spec(config, tokenizer.image_id, has_images, tokenizer.eot_id if document_mask else None)
if run.meta:
    spec['adapters'] = run.meta['spec'].get('adapters')          # a base's own stay
    checkpoint.check_spec(run.meta, spec, run.folder)
    if tokenizer.sha256 != checkpoint.read_tokenizer(run.folder, run.meta).sha256:
        raise UserError(f"{run.folder} was trained with another tokenizer than {tokenizer.path} (their sha256 differ)")
elif init_from and os.path.exists(os.path.join(init_from, 'tokenizer.json')):     # DCLM's folder holds its own
    tokenizer.check_same(load_tokenizer(os.path.join(init_from, 'tokenizer.json')))
model = build_vlm(spec, None if run.resumed or dry_run else seed)       # a resumed run's weights are all in its file

# --- data -------------------------------------------------------------------------------------------------------------
view = model.view(resize) if has_images else None


def caption_mixture(patterns):
    sources = [CaptionSource(data_path(pattern), tokenizer, seq_len, view, pattern, cache_dir, caption_field)
               for pattern, _ in patterns]
    for source in sources:
        if source.note:
            process.print(source.note)           # which of several captions is read
    return Mixture(sources, [w for _, w in patterns], seed, max_bad_samples=max_bad_samples)


parts = []                                       # (source or mixture, its share of the sequences)
if image_ratio < 1:
    text_rows = run.text_mixture(text, tokenizer, seq_len, run.start_cursor)
    run.compare_text(text_rows)
    parts.append((text_rows, 1 - image_ratio))
if image_ratio > 0:
    with_image = [(caption_mixture(captions), 1 - instruct_share)] if instruct_share < 1 else []
    if instruct_share > 0:
        chat = InstructSource(data_path(instruct), data_path(instruct_images), tokenizer, seq_len, view,
                              cache_dir=cache_dir, boxes=boxes, text_cond=model.text_cond is not None)
        with_image.append((chat, instruct_share))
    sources, weights = zip(*with_image)
    parts.append((Mixture(sources, weights, seed, max_bad_samples=max_bad_samples), image_ratio))
    if instruct_share > 0 and chat.note:
        process.print(chat.note)                 # missing images, questions that are cut
sources, weights = zip(*parts)
mixture = Mixture(sources, weights, seed)
validation = {}
if eval_every and val_text:
    validation['val_text_loss'] = run.text_mixture(((val_text, 1.0),), tokenizer, seq_len)
if eval_every and val_captions and has_images:
    validation['val_caption_loss'] = caption_mixture(((val_captions, 1.0),))
if eval_every and not validation:
    process.print("!!! eval_every has no effect: val_text and val_captions name nothing that this run can be asked")
for key, held_out in validation.items():
    n_row = min(eval_rows, sum(len(shuffled.source) for shuffled in held_out.sources.values()))
    if n_row < run.micro_batch_size * process.world_size:
        process.print(f"!!! {key}: {n_row} rows do not fill a micro-step ({run.micro_batch_size} on each of "
                      f"{process.world_size} processes): some rows count more than once")
if dry_run:
    costs.print_passes(mixture, max_steps * global_batch_size)
    leave(0)
batches = run.loader(mixture, tokenizer.pad_id, pad_to=seq_len)        # forks workers, which must not inherit CUDA
process.start_device()

# --- model ------------------------------------------------------------------------------------------------------------
if has_images and encoder_weights == 'file' and not (run.meta and run.meta['spec']['encoder']):
    fill_encoder(model.encoder, towers)
if run.meta:
    fresh = checkpoint.load_weights(model, run.folder, run.meta, *((), None) if run.resumed else
                                    (('encoder.', 'projector.', 'cross.', 'text_cond.'), process.print))
    if any(name.startswith('cross.') for name in fresh):
        process.print(FRESH_CROSS.format(run.folder, cross_every))
    if any(name.startswith('text_cond.') for name in fresh):
        process.print(FRESH_TEXT_COND.format(run.folder, text_cond))
elif init_from:
    load_openlm(init_from, into=model.decoder)
fresh_adapters = run.add_adapters(model, spec)
model.z_loss, model.decoder.activation_checkpointing = z_loss, activation_checkpointing
set_trained(model, freeze)
network = common.distribute(model, process, parallel)
if compile:
    model.compile_blocks()

# --- learning rate ----------------------------------------------------------------------------------------------------
# the schedule itself is a dict, kept in meta.json: lr_at(step, curve) is the decoder's lr
moments, foreign, lr_there = 'fresh', {}, 0.0    # whose AdamW moments this run begins with, a word for meta.json
if run.resumed:
    moments = run.meta['moments']
elif schedule == 'cooldown':
    if not run.meta:
        foreign_file, foreign, lr_there = openlm_moments(init_from)
    moments = 'loaded' if foreign or run.meta and os.path.exists(os.path.join(run.folder, 'optim.pt')) else 'none'
    thaws = run.meta and trains_decoder(config, spec) and not trains_decoder(run.meta['config'], run.meta['spec'])
    if fresh_adapters or thaws:                  # what the base has are not those of what trains here
        moments, foreign = 'none', {}
if run.resumed:
    curve = run.meta['schedule']
elif schedule == 'main':
    curve = dict(kind='main', peak=lr, final=final_lr, warmup=warmup_steps, total=max_steps,
                 from_zero=warmup_from_zero)
elif schedule == 'rewarm':
    curve = dict(kind='rewarm', peak=rewarm_lr or 0.3 * lr, final=final_lr, warmup=rewarm_steps, total=max_steps,
                 from_zero=warmup_from_zero)
else:
    before = run.meta and run.meta['schedule']                   # the checkpoint's own
    start_lr = start_lr or lr_there
    if not start_lr and not before:
        raise UserError(f"{init_from} does not say its lr: give --start_lr=LR (figure 3: 9.7e-4 at 80 % of the 1.4B "
                        "run)")
    curve = dict(kind='cooldown', start=start_lr or lr_at(run.meta['step'], before), final=final_lr, total=max_steps)
    if cooldown_shape == 'remaining':
        if not before or before['kind'] != 'main':
            raise UserError(f"cooldown_shape='remaining' needs a checkpoint of a main schedule; {init_from} is none")
        arc = {key: value for key, value in before.items() if key != 'kind'}
        curve = dict(kind='remaining', main=arc, at=run.meta['step'], total=max_steps)
    if moments == 'none':
        curve['moments_warmup'] = moments_warmup_steps
top = top_lr(curve)
if top <= 0:
    raise UserError(f"schedule={schedule!r} starts from lr {top}: expected above 0 (lr, start_lr or rewarm_lr)")

# --- optimizer --------------------------------------------------------------------------------------------------------
lr_factors = {'decoder': 1.0, 'projector': (projector_lr or top) / top, 'encoder': (encoder_lr or top) / top}
lr_factors['cross'] = lr_factors['text_cond'] = lr_factors['projector']
optimizer = common.make_optimizer(model, lr_factors, weight_decay=weight_decay, betas=(beta1, beta2), decay=decay)
if foreign:
    fresh = checkpoint.load_moments(optimizer, foreign, ('projector.', 'encoder.', 'cross.', 'text_cond.'),
                                    f'{foreign_file} (move it away to start with fresh moments)')
    process.print(f"AdamW moments from {foreign_file}; fresh for {len(fresh)} tensors")
elif run.resumed or moments == 'loaded':
    # by name; the projector of a text-only checkpoint starts fresh, text_cond until an instruction has come
    run.load_moments(optimizer, () if run.seen.get('instruct', {}).get('n_image') else ('text_cond.',))
elif moments == 'none':
    process.print(f"no AdamW moments for this in {init_from}: fresh ones, {moments_warmup_steps} steps of warmup")
warmup = curve.get('warmup', curve.get('moments_warmup', 0))
if warmup >= max_steps:
    process.print(f"!!! a warmup of {warmup} steps is not over after all {max_steps}: lr never reaches its peak")

# --- validation -------------------------------------------------------------------------------------------------------
@torch.no_grad()
def validate():
    """Log each validation set's mean nats per kept target; its own loader leaves training undisturbed."""
    run.flush()
    model.eval()
    line, per_micro = {'step': run.step}, run.micro_batch_size * process.world_size
    for key, held_out in validation.items():
        n_row = sum(len(shuffled.source) for shuffled in held_out.sources.values())
        n_row = max(1, min(eval_rows, n_row) // per_micro) * per_micro   # whole micro-batches, at least one
        nll = n_kept = 0
        for batch in run.loader(held_out, tokenizer.pad_id, start=0, stop=1, global_batch_size=n_row, n_worker=0,
                                pad_to=seq_len):                         # one "step" that holds all rows
            batch = batch.to(process.device)
            with process.autocast():
                _, _, row_loss = model(batch.tokens, batch.targets, batch.images, batch.image_index, kept=batch.kept)
            nll, n_kept = nll + float(row_loss[0].sum()), n_kept + len(batch.kept)
        nll, n_kept = process.host_sum([nll, n_kept])
        line[key] = nll / n_kept
    model.train()
    run.logger.log(line)


# --- the loop ---------------------------------------------------------------------------------------------------------
run.begin(stage=stage, model=model, optimizer=optimizer, tokenizer=tokenizer, mixture=mixture, spec=spec,
          schedule=curve, moments=moments)
for step in range(run.first_step, run.last_step):
    micro, counts = run.take(batches)                                    # on the host: the GPU is not waited for
    if micro is None:
        break                                                            # asked to stop: the same step on every rank
    source_weight, loss_share = common.loss_weights(counts, loss_weight)  # (n_source,) of one kept target, of all
    source_weight = process.send(source_weight)
    optimizer.zero_grad(set_to_none=True)
    row_losses = []
    for i, batch in enumerate(micro):
        network.require_backward_grad_sync = i == len(micro) - 1         # ddp reads it in forward; fsdp always adds up
        batch = batch.to(process.device, non_blocking=True)
        weights = source_weight[batch.source][:, None].expand_as(batch.tokens)                           # (B,T)
        with process.autocast():
            loss_sum, _, row_loss = network(batch.tokens, batch.targets, batch.images, batch.image_index, weights,
                                        batch.kept, image_text=batch.image_text)
        (loss_sum * process.world_size).backward()                       # ranks are averaged: undo 1/world_size
        row_losses.append(row_loss.detach())
    if has_images and counts['n_image'].sum() == 0:
        # AdamW is not to touch them without an image
        common.drop_gradients(model.projector, model.encoder, model.cross, model.text_cond)
    elif has_images and model.text_cond is not None and counts['n_image'][mixture.names.index('instruct')] == 0:
        common.drop_gradients(model.text_cond)                           # captions alone
    lr_now = lr_at(step, curve)
    norm, skipped = common.optimizer_step(optimizer, lr_now, grad_clip)
    run.record(lr=lr_now, row_losses=row_losses, norm=norm, skipped=skipped, loss_share=loss_share)
    if validation and (run.step % eval_every == 0 or run.step == max_steps):
        validate()                                                       # before saving, so that no resume repeats it
    if run.due():
        run.save()
run.finish()
