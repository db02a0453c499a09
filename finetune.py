"""
Stage 3: instruction fine-tuning on LLaVA JSON (paper 2.1.3, appendix D): n_epoch passes under one cosine.

    python finetune.py config/finetune.py config/tiny.py                         # a laptop
    torchrun --nproc_per_node=8 finetune.py config/finetune.py                   # 8 x A100-80GB
    torchrun --nproc_per_node=8 finetune.py config/finetune.py --n_epoch=2 --name=finetune_2

Sections, tables and appendices named below are those of arXiv 2503.07603.
"""
import os
import sys
import time

import torch

import checkpoint
import common
from common import main_lr
from configurator import configure
from data import BadSample, InstructSource, Loader, Mixture, TextSource
from errors import user_error_hook
from model import Projector
from vision import load_encoder

sys.excepthook = user_error_hook

# --- config: change with a file and --key=value -----------------------------------------------------------------------
scale = '1b'                            # names the folder; '{scale}' in init_from is replaced by it
name = 'finetune'                       # the recipe's name
out_dir = ''                            # '' = out/{scale}/{name}
data_dir = 'data'                       # relative data paths below start here
cache_dir = ''                          # for indexes of tars and JSON whose own folder is read-only
data_hint = 'README.md, "Your own data", says what goes there'                   # shown when data is missing
instruct = 'instruct/llava_v1_5_mix665k.json'  # LLaVA JSON, in data_dir
instruct_images = 'instruct/images'     # its image root, in data_dir
text = (('text', 1.0),)                 # stage-1 text for text_share, in data_dir
text_share = 0.0                        # share of sequences that are stage-1 text rows; the paper mixes none
init_from = 'out/{scale}/ckpt80_img10/ckpt_100'  # a checkpoint folder; its tokenizer, encoder and shape are kept
encoder_path = 'siglip-so400m-patch14-384'  # in data_dir, for a base without images; 'patch' = no encoder
encoder_layer = -2                      # as in pretrain.py
encoder_norm = False
image_size = 384                        # pixels a side for encoder_path='patch'
resize = 'letterbox'                    # 'letterbox' (appendix D), 'naive', 'crop'
system_prompt = ''                      # in front of the first question, without loss; the paper does not print its own
split_turns = False                     # True = a row per question, each sees the image and itself only
loss_average = 'token'                  # 'token' = every answer token alike, 'answer' = every answer alike
train_encoder = False                   # frozen is the paper's choice (appendix D)
seq_len = 2048                          # longest row with its image; longer conversations are cut
n_epoch = 4                             # the paper's runs: 1, 2, 3, 4 (figure 8: up to 6), each with its own cosine
max_steps = 0                           # the schedule's length in steps; 0 = from n_epoch
stop_after = 0                          # end at this step with a checkpoint, schedule unchanged; 0 = off
global_batch_size = 256                 # conversations per optimizer step (appendix D)
micro_batch_size = 4                    # conversations per process per micro-step; accumulation follows
length_window = 0                       # steps whose conversations are sorted by length into batches; 0 = off
lr = 3e-4                               # peak (appendix D)
final_lr = 0.0                          # the paper gives none
warmup_ratio = 0.05                     # of max_steps (appendix D)
projector_lr = 0.0                      # peak of the projector's lr; 0 = lr
encoder_lr = 0.0                        # peak of a trained encoder's lr; 0 = lr
weight_decay = 0.1                      # on all parameters; the paper gives none, Prismatic 0.1
beta1 = 0.9
beta2 = 0.95                            # appendix D
grad_clip = 1.0                         # of the global norm; 0 = off
z_loss = 0.0                            # times logsumexp^2 over kept rows
seed = 7                                # order of the data, weights of a fresh projector
device = 'auto'                         # 'auto', 'cpu', 'cuda'
dtype = ''                              # autocast: 'bfloat16', 'float32', '' = bfloat16 on CUDA, float32 on CPU
n_thread = 0                            # CPU threads a process; 0 = all, divided among the processes
compile = False                         # torch.compile, block by block
activation_checkpointing = False        # recompute the blocks in backward: less memory, a third more work
n_worker = 2                            # loader processes per rank; 0 = inline
resume = 'auto'                         # 'auto' = go on from ckpt_last, which wins over init_from; 'never'
max_bad_samples = 0                     # replace, count and list up to N unreadable samples; 0 = stop at the first
save_every = 500                        # steps between ckpt_step_N; 0 = off
keep_steps = 2                          # how many ckpt_step_N stay
keep_optimizer = 'last'                 # whose optim.pt stays: 'all', 'percent', 'last', 'none'
save_encoder = True                     # False stores the encoder's path and digest only
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
if train_encoder and not save_encoder:
    sys.exit("train_encoder=True with save_encoder=False would lose what the encoder learns: give --save_encoder=true")
last = os.path.join(out_dir, 'ckpt_last')
resuming = resume == 'auto' and os.path.exists(last) and not dry_run
checkpoint.check_last(last)
missing = [p for p in (init_from, data_path(instruct), data_path(instruct_images)) if not os.path.exists(p)]
if dry_run and missing:
    sys.exit(common.print_missing(config, out_dir, missing))
if not os.path.exists(init_from) and not resuming:
    sys.exit(f"init_from={init_from or repr('')} not found{checkpoint.how_to_make(init_from, scale)}")
if resume == 'never' and os.path.lexists(last) and not dry_run:
    sys.exit(f"{out_dir} already holds a run and resume='never': remove it, or give another --out_dir")

# --- devices ----------------------------------------------------------------------------------------------------------
process = common.setup_process(device, dtype, n_thread)
n_micro = common.accumulation(global_batch_size, micro_batch_size, process.world_size)
stop_signal = common.StopSignal()

# --- model ------------------------------------------------------------------------------------------------------------
try:
    meta = checkpoint.read_meta(last) if resuming else None
    if resuming:
        checkpoint.check_resume(meta, config, last, ('finetune',))
    first_step, bad_before, seen = (meta['step'], meta['bad_samples'], meta['seen']) if resuming else (0, [], None)
    checkpoint.check_same_start(process, first_step, out_dir)
    model, codec, base = checkpoint.load_vlm(last if resuming else init_from)
    base = meta['base'] if resuming else base
    path = 'patch' if encoder_path == 'patch' else data_path(encoder_path)
    torch.manual_seed(seed + 1)
    if model.encoder is None:                           # a base that never saw images: Prismatic's way
        if path != 'patch' and not os.path.exists(path):
            sys.exit(f"encoder {path} not found; {data_hint}")
        model.encoder = load_encoder(path, encoder_layer, encoder_norm, image_size)
        model.projector = Projector(model.encoder.width, model.decoder.config.n_embd)
        process.print(f"{last if resuming else init_from} has no projector: a fresh one")
    if not save_encoder and not resuming:
        checkpoint.check_encoder_file(model.encoder, path, encoder_layer, encoder_norm, image_size)
except ValueError as e:
    sys.exit(str(e))
model.z_loss = z_loss
model.decoder.activation_checkpointing = activation_checkpointing
model.train().requires_grad_(True)
model.encoder.requires_grad_(train_encoder)

# --- data -------------------------------------------------------------------------------------------------------------
try:
    chat = InstructSource(data_path(instruct), data_path(instruct_images), codec, seq_len, model.encoder.n_token,
                          model.encoder.image_size, resize, system_prompt, loss_average, split_turns,
                          cache_dir=cache_dir)
    mixture = Mixture([chat], [1.0], seed, max_bad_samples=max_bad_samples)
    if text_share:
        names = [common.text_name(g, text) for g, _ in text]
        sources = [TextSource(data_path(g), codec, min(base['config']['seq_len'], seq_len), name,
                              base.get('text_rows', {}).get(name, {}).get('row_len', 0), cache_dir)
                   for (g, _), name in zip(text, names)]
        rows = Mixture(sources, [w for _, w in text], base['text_seed'], start=base['cursor'],
                       max_bad_samples=max_bad_samples)
        mixture = Mixture([rows, mixture], [text_share, 1 - text_share], seed)
except (ValueError, OSError) as e:
    sys.exit(f"{e}; {data_hint}")
chats_per_step = global_batch_size * (1 - text_share)
max_steps = max_steps or round(n_epoch * len(chat) / chats_per_step)
if max_steps < 1:
    sys.exit(f"n_epoch={n_epoch} of {len(chat)} conversations is less than one step of {chats_per_step:g}: give more "
             "epochs, or --max_steps=N")
if dry_run:
    common.print_dry_run(config, model.decoder.config, out_dir=out_dir, max_steps=max_steps,
                         tokens_per_step=global_batch_size * seq_len, shares={}, sets={}, inputs=[init_from],
                         n_checkpoint=1)
    print(f"{max_steps * chats_per_step / len(chat):.2f} passes over {len(chat)} conversations; rows are padded to the "
          f"longest of their micro-batch, so the tokens above are an upper bound")
    sys.exit(0)
if resuming and first_step >= max_steps:
    process.print(f"{out_dir} is finished: {first_step} of {max_steps} steps")
    sys.exit(0)
# the workers fork here, before this process holds GPU memory
last_step = max(first_step, min(max_steps, stop_after)) if stop_after else max_steps
batches = Loader(mixture, start=first_step, stop=last_step, global_batch_size=global_batch_size,
                 micro_batch_size=micro_batch_size, rank=process.rank, world_size=process.world_size,
                 pad_id=codec.pad_id, n_worker=n_worker, group_window=length_window, total=max_steps, seed=seed,
                 pin_memory=process.device.type == 'cuda')
process.start_device()
torch.backends.cuda.enable_cudnn_sdp(False)                # it plans every new length; here they all differ

# --- optimizer and resume ---------------------------------------------------------------------------------------------
model.to(process.device)
if compile:
    for block in model.decoder.layers:
        block.compile(dynamic=None)
shares = {'decoder': 1.0, 'projector': (projector_lr or lr) / lr, 'encoder': (encoder_lr or lr) / lr}
optimizer = common.make_optimizer(model, shares, weight_decay=weight_decay, betas=(beta1, beta2))
try:
    if resuming:
        if checkpoint.load_optimizer(optimizer, last) is None:
            sys.exit(f"{last}: optim.pt is gone, so the run cannot go on exactly; use it as --init_from of a new run")
        checkpoint.restore_rng(meta, last)
except ValueError as e:
    sys.exit(str(e))
network = common.distributed(model) if process.world_size > 1 else model
schedule = dict(peak=lr, final=final_lr, warmup=int(warmup_ratio * max_steps), total=max_steps)

# --- the loop ---------------------------------------------------------------------------------------------------------
if process.master:
    checkpoint.open_folder(out_dir)
process.barrier()
logger = common.Logger(process, out_dir, first_step, max_steps, every=log_every, wandb=wandb, tensorboard=tensorboard,
                       config=config)
bad_samples, n_bad_sample = [], len(bad_before)
seen = seen or {leaf: dict.fromkeys(common.COUNTS, 0) for leaf in mixture.names}
process.print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, {max_steps} steps of "
              f"{global_batch_size} conversations, {n_micro} micro-steps, {process.world_size} processes on "
              f"{process.device.type} in {str(process.dtype)[6:]}")


def save(step, names):
    """One checkpoint after `step` steps, by rank 0."""
    every_bad = bad_before + process.gather(bad_samples)
    if process.master:
        n = step * global_batch_size
        cursor = {**base['cursor'], **{k: v for k, v in mixture.cursor(n).items() if k != chat.name}}
        info = dict(base, stage='finetune', config=config, step=step, samples=n, seen=seen, init_from=init_from,
                    cursor=cursor, base=base, bad_samples=every_bad, epochs=mixture.epochs(n),
                    schedule=dict(kind='finetune', main=schedule, step=step), tokens=tokens_seen())
        try:
            checkpoint.save_checkpoint(out_dir, names, model, optimizer, codec, info, save_encoder=save_encoder)
            checkpoint.prune_checkpoints(out_dir, keep_optimizer=keep_optimizer, keep_steps=keep_steps)
        except OSError as e:
            process.exit(str(e))
    process.barrier()


def tokens_seen():
    return sum(c['n_text'] + c['n_image_position'] + c['n_pad'] for c in seen.values())


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
        # with text rows each source weighs its share of sequences; without, this is the mean over targets (or answers)
        row_weight, share = common.loss_weights(counts, 'source' if text_share else 'token')
        row_weight = process.send(row_weight)
        optimizer.zero_grad(set_to_none=True)
        row_loss = []
        for i, batch in enumerate(micro):
            network.require_backward_grad_sync = i == n_micro - 1               # set before forward: ddp reads it there
            batch = batch.to(process.device, non_blocking=True)
            weights = row_weight[batch.source][:, None].expand_as(batch.tokens)                           # (B,T)
            weights = weights if batch.weights is None else weights * batch.weights
            with process.autocast():
                loss_sum, _ = network(batch.tokens, batch.targets, batch.images, batch.image_index, weights, batch.kept)
            (loss_sum * process.world_size).backward()                           # ddp averages ranks: undo 1/world_size
            row_loss.append(model.row_loss)
        if counts['n_image'].sum() == 0:
            common.drop_gradients(model.projector, model.encoder)                        # no decay, no moment update
        lr_now = main_lr(step, **schedule)
        norm, skipped = common.optimizer_step(optimizer, lr_now, grad_clip)
        common.add_counts(seen, counts, mixture.names)
        reader.push(dict(step=step + 1, tokens=tokens_seen(), lr=lr_now, data_wait_s=waited,
                         mem_gib=common.memory_gib(process.device)),
                    micro, row_loss, norm, skipped, counts, share, seen,
                    model.decoder.config.flops_per_token(micro[0].tokens.shape[1]))
        done = step + 1
        if done == last_step or (save_every and done % save_every == 0):
            reader.flush()                                                              # the log reaches the checkpoint
            save(done, ['ckpt_100' if done == max_steps else f'ckpt_step_{done}'])
    reader.flush()
    if stopped and last_step > first_step:
        save(last_step, [f'ckpt_step_{last_step}'])
except BadSample as e:
    process.exit(f"{e} (max_bad_samples={max_bad_samples})")
except (RuntimeError, EOFError, ConnectionError):
    batches.check_workers()
    raise
logger.close()
process.print(f"{out_dir}: {last_step} of {max_steps} steps done")
process.exit()
