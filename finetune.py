"""
Stage 3: instruction fine-tuning on LLaVA JSON (paper 2.1.3, appendix D): n_epoch passes under one cosine.

    python finetune.py config/finetune.py config/tiny.py                         # a laptop
    torchrun --nproc_per_node=8 finetune.py config/finetune.py                   # 8 x A100-80GB
    torchrun --nproc_per_node=8 finetune.py config/finetune.py --n_epoch=2 --name=finetune_2

Sections, tables and appendices named below are those of arXiv 2503.07603.
"""
import os
import sys

import torch

import checkpoint
import common
import costs
from adapters import set_trained
from configurator import config_keys, configure
from data import InstructSource, Mixture
from errors import UserError, leave, user_error_hook
from images import View
from model import FRESH_CROSS, add_images, fusion_spec, with_view
from schedules import lr_at
from text_cond import FRESH_TEXT_COND, text_cond_spec
from vision import encoder_files, fill_encoder

sys.excepthook = user_error_hook

# --- config: change with a file and --key=value -----------------------------------------------------------------------
# In brackets: the allowed range or words; `pairs`: ((text, number), ...); `free`: may change when a run is resumed.
scale = '1b'                            # names the folder; '{scale}' in init_from is replaced by it
name = 'finetune'                       # the recipe's name
out_dir = ''                            # [free] '' = out/{scale}/{name}
data_dir = 'data'                       # relative data paths below start here
cache_dir = ''                          # [free] for indexes of tars and JSON whose own folder is read-only
data_hint = 'README.md, "Your own data", says what goes there'  # [free] what the error for missing data says to do
instruct = 'instruct/llava_v1_5_mix665k.json'  # LLaVA JSON, in data_dir
instruct_images = 'instruct/images'     # its image root, in data_dir
boxes = 'original'                      # ['original' | 'letterbox'] its boxes are shares of the photo, or of its square
text = (('text', 1.0),)                 # [pairs] stage-1 text for text_share, in data_dir
text_share = 0.0                        # [>= 0, < 1] share of sequences that are stage-1 text; the paper mixes none
init_from = 'out/{scale}/ckpt80_img10/ckpt_100'  # a checkpoint folder; its tokenizer, encoder and shape are kept
encoder = 'siglip'                      # ['siglip' | 'dinov2' | 'dinosiglip' | 'patch'] this and the next ten are for a
                                        # base without an encoder, and as in pretrain.py
encoder_path = 'siglip-so400m-patch14-384'  # in data_dir
dinov2_path = 'dinov2-with-registers-large'  # in data_dir
encoder_fusion = 'channel'              # ['channel' | 'interleave']
encoder_layer = -2                      # as in pretrain.py
encoder_norm = False                    # as in pretrain.py
projector = 'mlp2'                      # ['linear' | 'mlp2' | 'mlp4' | 'attn' | 'perceiver'] as pretrain.py's
token_mode = ''                         # ['' | 'pool' | 'res' | 'query'] as pretrain.py's
image_tokens = 0                        # [>= 0, <= 65536] positions of an image; 0 = as many as the encoder gives
image_size = 0                          # [>= 0] pixels a side; 0 = what the encoder was trained at
image_mask = 'causal'                   # ['causal' | 'prefix'] as in pretrain.py
fusion = 'sequence'                     # ['sequence' | 'cross'] as in pretrain.py; a base without cross blocks gets
                                        # fresh ones, one with them keeps them
cross_every = 4                         # [>= 1] of 'cross', for fresh blocks
text_cond = 'none'                      # ['none' | 'append' | 'prefix'] as in pretrain.py, with a row's first question
                                        # (split_turns: with each its own); what the base has stays
cond_layers = 0                         # [>= 0] of 'prefix', as in pretrain.py
resize = 'letterbox'                    # ['letterbox' | 'naive' | 'crop'] 'letterbox' is appendix D's
aspect = 'square'                       # ['square' | 'keep'] as in pretrain.py; what the base has on stays on
split = False                           # as in pretrain.py; Idefics2 splits in this stage only
system_prompt = ''                      # in front of the first question, without loss; the paper does not print its own
split_turns = False                     # True = each question is a row of its own, with its image, and sees no other
loss_average = 'token'                  # ['token' | 'answer'] every answer token weighs the same, or every answer
neftune = 0.0                           # [>= 0] noise on text, within neftune / sqrt(positions x width) (2310.05914)
shuffle_turns = False                   # True = the questions of a conversation in another order each epoch
freeze = 'encoder'                      # ['none' | 'decoder' | 'encoder' | 'both'] what stays as it is (appendix D)
lora_rank = 0                           # [>= 0, <= 65536] of adapters, which train in their part's stead; 0 = none
lora_alpha = 0.0                        # [>= 0] their scale is alpha / rank; 0 = 2 x rank, as LLaVA-1.5 (128 and 256)
rslora = False                          # True = alpha / sqrt(rank) (arXiv 2312.03732)
dora = False                            # True = DoRA, a magnitude and a direction (arXiv 2402.09353)
lora_on = 'decoder'                     # ['decoder' | 'encoder' | 'both'] every linear layer of its blocks
seq_len = 2048                          # [>= 1] longest row with its image; longer conversations are cut
n_epoch = 4                             # [>= 0] passes, under one cosine; the paper: 1, 2, 3, 4 (figure 8: up to 6)
max_steps = 0                           # [>= 0] the schedule's length in steps; 0 = from n_epoch
stop_after = 0                          # [>= 0, free] end at this step with a checkpoint, schedule unchanged; 0 = off
global_batch_size = 256                 # [>= 1] conversations per optimizer step (appendix D)
micro_batch_size = 4                    # [>= 1, free] upper limit per process: the largest divisor up to it is taken
length_window = 0                       # [>= 0] steps whose rows are grouped by image or none, and length; 0 = off
lr = 3e-4                               # [> 0] peak (appendix D)
final_lr = 0.0                          # [>= 0] the paper gives none
warmup_ratio = 0.05                     # [>= 0, < 1] of max_steps (appendix D)
warmup_from_zero = True                 # True: the first step's lr is 0 (Prismatic's rule; appendix D names none)
projector_lr = 0.0                      # [>= 0] peak of the lr of projector, cross blocks and text_cond; 0 = lr
encoder_lr = 0.0                        # [>= 0] peak of a trained encoder's lr; 0 = lr
weight_decay = 0.1                      # [>= 0] the paper gives none, Prismatic 0.1
decay = 'matrices'                      # ['all' | 'matrices'] gains and biases do not decay (Prismatic)
beta1 = 0.9                             # [>= 0, < 1]
beta2 = 0.95                            # [>= 0, < 1] appendix D
grad_clip = 1.0                         # [>= 0] of the global norm; 0 = off
z_loss = 0.0                            # [>= 0] weight of the mean logsumexp^2 of the logits at kept targets
seed = 7                                # [>= 0, < 9.2e18] order of the data, weights of a fresh projector
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
save_every = 500                        # [>= 0, free] steps between ckpt_step_N; 0 = off
keep_steps = 2                          # [>= 0, free] how many ckpt_step_N stay
keep_optimizer = 'last'                 # ['all' | 'percent' | 'last' | 'none', free] whose optim.pt stays
log_every = 10                          # [>= 1, free] steps between printed lines; log.jsonl has every step
wandb = False                           # [free] also log to Weights & Biases (pip install wandb)
tensorboard = False                     # [free] also log to TensorBoard (pip install tensorboard)
dry_run = False                         # [free] say what would happen, then exit
# --- config end -------------------------------------------------------------------------------------------------------
config = configure(globals())

# --- derived values and inputs ----------------------------------------------------------------------------------------
init_from = config['init_from'] = init_from.replace('{scale}', scale)
out_dir = out_dir or os.path.join('out', scale, name)
data_path = lambda path: os.path.join(data_dir, path)
inputs = {data_path(pattern): data_hint for pattern in (instruct, instruct_images)}
if text_share:
    inputs.update({data_path(pattern): data_hint for pattern in common.patterns_of('text', text)})
base = {} if os.path.exists(os.path.join(out_dir, 'ckpt_last')) else {
    init_from: checkpoint.how_to_make(init_from, scale)}
chats_per_step = global_batch_size * (1 - text_share)
no_base = not all(map(os.path.exists, base))
if dry_run:
    if os.environ.get('RANK', '0') != '0':
        sys.stdout = open(os.devnull, 'w')                       # one process speaks
    costs.print_config(config)
    there = os.path.exists(data_path(instruct))
    n_chat = len(InstructSource(data_path(instruct), '', None, seq_len, View(1, 0))) if there else costs.LLAVA_ROWS
    n_step = max_steps or round(n_epoch * n_chat / chats_per_step)
    print(f"{n_epoch} epochs of {n_chat:,} conversations{'' if there else ' (assumed)'}: {n_step:,} steps")
    if no_base and scale == '1b':
        costs.print_cost(config, costs.paper_spec(config), out_dir=out_dir, max_steps=n_step, n_keep=1)
if no_base or not dry_run:                                       # a base alone says what the run costs, see below
    common.require({**inputs, **base}, dry_run)

# --- where it starts --------------------------------------------------------------------------------------------------
process = common.setup_process(device, dtype, n_thread)
run = common.Run(process, __file__, config, out_dir, init_from, stages=('finetune',))
if not run.meta:
    raise UserError(f"{init_from} is not a checkpoint of these scripts: stage 3 needs one, of stage 2 or of stage 1")
tokenizer = checkpoint.read_tokenizer(run.folder, run.meta)
spec = dict(run.meta['spec'])
fresh_projector = spec['encoder'] is None                        # a base of stage 1: Prismatic's way
if fresh_projector:
    common.require(dict.fromkeys(encoder_files(config).values(), data_hint), dry_run)
    spec = add_images(spec, config)
    process.print(f"{run.folder} has no projector: a fresh one")
elif not run.resumed:
    default = {key: rule.default for key, rule in config_keys(__file__).items()}
    for key in ('encoder', 'encoder_path', 'dinov2_path', 'encoder_fusion', 'encoder_layer', 'encoder_norm',
                'projector', 'token_mode', 'image_tokens', 'image_size', 'image_mask'):
        if config[key] != default[key] and config[key] != run.meta['config'].get(key):
            process.print(f"!!! {key}={config[key]!r} has no effect: {run.folder} brings its own encoder, projector")
fresh_cross = fusion == 'cross' and not run.meta['spec'].get('fusion')
if fresh_cross:
    spec = {**spec, **fusion_spec(config)}
    process.print(FRESH_CROSS.format(run.folder, cross_every))
elif spec.get('fusion') and not run.resumed and spec['fusion']['every'] != cross_every:
    process.print(f"cross_every={spec['fusion']['every']}, as {run.folder} has it")
fresh_text_cond = text_cond != 'none' and not run.meta['spec'].get('text_cond')
asked_text_cond = text_cond_spec(config).get('text_cond')
if fresh_text_cond:
    spec['text_cond'] = asked_text_cond
    process.print(FRESH_TEXT_COND.format(run.folder, text_cond))
elif asked_text_cond not in (None, spec.get('text_cond')):
    process.print(f"!!! text_cond has no effect: {run.folder} brings its own, {spec['text_cond']}")
spec = with_view(spec, config)
if dry_run:
    costs.print_cost(config, spec, out_dir=out_dir, max_steps=n_step, n_keep=1)
    common.require(inputs, dry_run)
fresh = ('encoder.', 'projector.') * fresh_projector + ('cross.',) * fresh_cross + ('text_cond.',) * fresh_text_cond
model = checkpoint.build(run.folder, spec, seed if fresh and not dry_run else None)

# --- data -------------------------------------------------------------------------------------------------------------
chat = InstructSource(data_path(instruct), data_path(instruct_images), tokenizer, seq_len, model.view(resize),
                      system_prompt, loss_average, split_turns, cache_dir=cache_dir, boxes=boxes,
                      shuffle_turns=shuffle_turns, text_cond=model.text_cond is not None)
mixture = Mixture([chat], [1.0], seed, max_bad_samples=max_bad_samples)
if chat.note:
    process.print(chat.note)                                     # missing images, questions that are cut
if text_share:
    text_rows = run.text_mixture(text, tokenizer, min(spec['decoder']['seq_len'], seq_len), run.start_cursor)
    mixture = Mixture([text_rows, mixture], [text_share, 1 - text_share], seed)
max_steps = max_steps or round(n_epoch * len(chat) / chats_per_step)
if max_steps < 1:
    raise UserError(f"n_epoch={n_epoch} of {len(chat)} conversations is less than one step of {chats_per_step:g}: give "
                    "more epochs, or --max_steps=N")
if dry_run:
    costs.print_passes(mixture, max_steps * global_batch_size)
    print("rows are padded to the longest of their micro-batch: the tokens above are an upper bound")
    leave(0)
run.plan(max_steps, {max_steps: 'ckpt_100'})
batches = run.loader(mixture, tokenizer.pad_id, group_window=length_window, total=max_steps, seed=seed)
process.start_device()                                           # after the loader has forked its workers
torch.backends.cuda.enable_cudnn_sdp(False)                      # it plans every new length; here they all differ

# --- model ------------------------------------------------------------------------------------------------------------
if fresh_projector:
    fill_encoder(model.encoder, encoder_files(config))
checkpoint.load_weights(model, run.folder, run.meta, fresh)
run.add_adapters(model, spec)
model.z_loss, model.decoder.activation_checkpointing = z_loss, activation_checkpointing
set_trained(model, freeze)
network = common.distribute(model, process, parallel)
if compile:
    model.compile_blocks()

# --- optimizer --------------------------------------------------------------------------------------------------------
curve = dict(kind='main', peak=lr, final=final_lr, warmup=int(warmup_ratio * max_steps), total=max_steps,
             from_zero=warmup_from_zero)
lr_factors = {'decoder': 1.0, 'projector': (projector_lr or lr) / lr, 'encoder': (encoder_lr or lr) / lr}
lr_factors['cross'] = lr_factors['text_cond'] = lr_factors['projector']
optimizer = common.make_optimizer(model, lr_factors, weight_decay=weight_decay, betas=(beta1, beta2), decay=decay)
if run.resumed:
    run.load_moments(optimizer)

# --- the loop ---------------------------------------------------------------------------------------------------------
run.begin(stage='finetune', model=model, optimizer=optimizer, tokenizer=tokenizer, mixture=mixture, spec=spec,
          schedule=curve)
for step in range(run.first_step, run.last_step):
    micro, counts = run.take(batches)                                    # on the host: the GPU is not waited for
    if micro is None:
        break                                                            # asked to stop: the same step on every rank
    # with text rows each source weighs its share of sequences; without, this is the mean over targets (or answers)
    source_weight, loss_share = common.loss_weights(counts, 'source' if text_share else 'token')
    source_weight = process.send(source_weight)
    optimizer.zero_grad(set_to_none=True)
    row_losses = []
    for i, batch in enumerate(micro):
        network.require_backward_grad_sync = i == len(micro) - 1         # ddp reads it in forward; fsdp always adds up
        batch = batch.to(process.device, non_blocking=True)
        weights = source_weight[batch.source][:, None].expand_as(batch.tokens)                           # (B,T)
        weights = weights if batch.weights is None else weights * batch.weights
        noise = batch.noise(neftune, model.decoder.config.n_embd) if neftune else None                   # (B,T,C)
        with process.autocast():
            loss_sum, _, row_loss = network(batch.tokens, batch.targets, batch.images, batch.image_index, weights,
                                        batch.kept, noise, batch.image_text)
        (loss_sum * process.world_size).backward()                       # ranks are averaged: undo 1/world_size
        row_losses.append(row_loss.detach())
    if counts['n_image'].sum() == 0:
        # AdamW is not to touch them without an image
        common.drop_gradients(model.projector, model.encoder, model.cross, model.text_cond)
    lr_now = lr_at(step, curve)
    norm, skipped = common.optimizer_step(optimizer, lr_now, grad_clip)
    run.record(lr=lr_now, row_losses=row_losses, norm=norm, skipped=skipped, loss_share=loss_share)
    if run.due():
        run.save()
run.finish()
