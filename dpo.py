"""
Preference training after stage 3: DPO (arXiv 2305.18290) on pairs of answers from LLaVA-RLHF's JSON (preferences.py).

    python tinyworld.py preferences && python dpo.py config/tiny.py                      # a laptop
    torchrun --nproc_per_node=8 dpo.py                                                   # 8 x A100-80GB
    torchrun --nproc_per_node=8 dpo.py --lora_rank=128 --lr=1e-7 --name=dpo_lora         # as SIMA, POVID

The reference, init_from, is asked once before training: its log-probabilities of all answers are kept in a file, and no
second model is in memory. That serves adapters and full training alike, and a base that has adapters of its own.
A pair is two rows that share their encoded image. Each computes the prompt: in one row for both, the worse answer would
have to see the prompt and itself but not the better answer between them, which is no interval (kernels.Intervals).
"""
import math
import os
import sys

import torch

import checkpoint
import common
import costs
from adapters import set_trained
from common import lr_at
from configurator import configure
from data import Mixture
from errors import UserError, leave, user_error_hook
from files import write_whole
from kernels import IGNORE_INDEX
from preferences import PreferenceSource, dpo_loss, read_reference

sys.excepthook = user_error_hook

# --- config: change with a file and --key=value -----------------------------------------------------------------------
# In brackets: the allowed range or words; `free`: may change when a run is resumed.
scale = '1b'                            # names the folder; '{scale}' in init_from is replaced by it
name = 'dpo'                            # the recipe's name
out_dir = ''                            # [free] '' = out/{scale}/{name}
data_dir = 'data'                       # relative data paths below start here
data_hint = 'README.md, "Your own data", says what goes there'  # [free] what the error for missing data says to do
preferences = 'preferences/llava_7b_v1_preference.json'  # LLaVA-RLHF's JSON, in data_dir
preference_images = 'preferences/images'  # its image root, in data_dir: COCO's train2017
init_from = 'out/{scale}/finetune/ckpt_100'  # the reference, and where training starts; its tokenizer and shape stay
reference = ''                          # [free] the file of its log-probabilities, made where it is not there, or
                                        # another run's of the same data; '' = reference.json in out_dir
beta = 0.1                              # [> 0] strength of the pull to the reference (arXiv 2305.18290, appendix B)
sft_weight = 0.0                        # [>= 0] of the better answer's nats a token, added to the loss: DPO alone may
                                        # make both answers unlikely (RPO, arXiv 2404.19733)
resize = 'letterbox'                    # ['letterbox' | 'naive' | 'crop'] as in finetune.py
system_prompt = ''                      # as in finetune.py
lora_rank = 0                           # [>= 0, <= 65536] of fresh adapters, trained in the decoder's stead; 0 = none
lora_alpha = 0.0                        # [>= 0] as in finetune.py
seq_len = 2048                          # [>= 1] a pair with a longer row is a bad sample
n_epoch = 1.0                           # [> 0] passes, under one cosine to 0 (SIMA, POVID: 1 to 3)
stop_after = 0                          # [>= 0, free] end at this step with a checkpoint, schedule unchanged; 0 = off
global_batch_size = 64                  # [>= 1] pairs per optimizer step (arXiv 2305.18290)
micro_batch_size = 2                    # [>= 1, free] pairs: the largest divisor up to it is taken
lr = 1e-6                               # [> 0] peak (arXiv 2305.18290)
warmup_ratio = 0.1                      # [>= 0, < 1] of the steps, the first lr 0 (Zephyr, arXiv 2310.16944)
seed = 7                                # [>= 0, < 9.2e18] order of the data, weights of adapters
device = 'auto'                         # ['auto' | 'cpu' | 'cuda', free]
dtype = ''                              # ['' | 'bfloat16' | 'float32'] autocast; '' = bfloat16 on CUDA, float32 on CPU
n_thread = 0                            # [>= 0, <= 1024, free] CPU threads a process; 0 = all, divided among processes
parallel = 'ddp'                        # ['ddp' | 'fsdp', free] the model on every process, or cut among them (7B)
activation_checkpointing = False        # [free] recompute the blocks in backward: less memory, a third more work
n_worker = 2                            # [>= 0, free] loader processes per rank; 0 = inline
resume = 'auto'                         # ['auto' | 'never', free] 'auto' = from ckpt_last, which wins over init_from
max_bad_samples = 0                     # [>= 0, free] replace, count and list up to N unusable pairs; 0 = stop
allow_changed_data = False              # [free] resume although data files have changed since the checkpoint
save_every = 50                         # [>= 0, free] steps between ckpt_step_N; 0 = off
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
pairs_file, images = (os.path.join(data_dir, path) for path in (preferences, preference_images))
inputs = {pairs_file: data_hint, images: data_hint}
if not os.path.exists(os.path.join(out_dir, 'ckpt_last')):
    inputs[init_from] = checkpoint.how_to_make(init_from, scale)
if dry_run:
    if os.environ.get('RANK', '0') != '0':
        sys.stdout = open(os.devnull, 'w')                       # one process speaks
    costs.print_config(config)
common.require(inputs, dry_run)
if not os.path.isfile(pairs_file):
    raise UserError(f"preferences={preferences!r}: {pairs_file} is no file; expected one JSON file of pairs")

# --- where it starts --------------------------------------------------------------------------------------------------
process = common.setup_process(device, dtype, n_thread)
run = common.Run(process, __file__, config, out_dir, init_from, stages=('dpo',))
if not run.meta or run.meta['spec']['encoder'] is None:
    raise UserError(f"{init_from} is not a checkpoint with an encoder: give one of stage 3, or of stage 2")
tokenizer = checkpoint.read_tokenizer(run.folder, run.meta)
spec = dict(run.meta['spec'])
model = checkpoint.build(run.folder, spec)

# --- data -------------------------------------------------------------------------------------------------------------
source = PreferenceSource(pairs_file, images, tokenizer, seq_len, model.view(resize), system_prompt, split_turns=True,
                          name='preferences', text_cond=model.text_cond is not None)
mixture = Mixture([source], [1.0], seed, max_bad_samples=max_bad_samples)
if source.damaged:
    process.print(source.damaged[0])                             # missing images
max_steps = round(n_epoch * len(source) / global_batch_size)
if max_steps < 1:
    raise UserError(f"n_epoch={n_epoch} of {len(source)} pairs is less than one step of {global_batch_size}: give more")
if dry_run:
    costs.print_cost(config, spec, out_dir=out_dir, max_steps=max_steps, n_keep=1)
    costs.print_passes(mixture, max_steps * global_batch_size)
    leave(0)
run.plan(max_steps, {max_steps: 'ckpt_100'})
reference = reference or os.path.join(out_dir, 'reference.json')
about = dict(model={name: file['sha256'] for name, file in run.base['files'].items() if name.endswith('.safetensors')},
             data=checkpoint.digest(pairs_file)['sha256'], resize=resize, system_prompt=system_prompt,
             dtype=str(process.dtype))
logp = read_reference(reference, about)
if run.resumed and not logp:
    raise UserError(f"{reference}, with which this run began, is gone: put it back, or give another --out_dir")
batches = run.loader(mixture, tokenizer.pad_id)
asked = () if logp else run.loader(mixture, tokenizer.pad_id, stop=math.ceil(len(source) / global_batch_size))
process.start_device()                                           # after the loaders have forked their workers
torch.backends.cuda.enable_cudnn_sdp(False)                      # it plans every new length; here they all differ

# --- model ------------------------------------------------------------------------------------------------------------
checkpoint.load_weights(model, run.folder, run.meta)
run.add_adapters(model, spec)
model.decoder.activation_checkpointing = activation_checkpointing
set_trained(model, 'encoder')                                    # it stays as it is
network = common.distribute(model, process, parallel)


def log_probabilities(batch):
    """ln p (P,2) float32 of the better and the worse answers of a Batch's pairs, each with its end."""
    batch = batch.to(process.device, non_blocking=True)
    with process.autocast():
        _, _, row_loss = network(batch.tokens, batch.targets, batch.images, batch.image_index, kept=batch.kept,
                                 image_text=batch.image_text)
    return -row_loss[0].view(-1, 2)


# --- the reference ----------------------------------------------------------------------------------------------------
for batch in asked:                                                      # every pair; fresh adapters change nothing yet
    if any(process.gather([run.stop_signal.set])):
        process.print(f"asked to stop: {reference} is not made yet")
        leave(0)
    with torch.no_grad():
        logp.update(zip(batch.ids[::2], log_probabilities(batch).tolist()))
if asked:
    logp = dict(process.gather(logp.items()))
    if process.master:
        write_whole(reference, dict(about=about, pairs=logp))
    if hasattr(network, 'reshard'):
        network.reshard()    # fsdp: else the first backward loses gradients of parameters that no_grad left whole

# --- optimizer --------------------------------------------------------------------------------------------------------
curve = dict(kind='main', peak=lr, final=0.0, warmup=int(warmup_ratio * max_steps), total=max_steps, from_zero=True)
shares = dict.fromkeys(('decoder', 'projector', 'encoder', 'cross', 'text_cond'), 1.0)
optimizer = common.make_optimizer(model, shares, weight_decay=0.0, betas=(0.9, 0.999))       # TRL's defaults
if run.resumed:
    run.load_moments(optimizer)

# --- the loop ---------------------------------------------------------------------------------------------------------
run.begin(stage='dpo', model=model, optimizer=optimizer, tokenizer=tokenizer, mixture=mixture, spec=spec,
          schedule=curve, values=('accuracy', 'margin', 'reward'))
for step in range(run.first_step, run.last_step):
    micro, counts = run.take(batches)                                    # on the host: the GPU is not waited for
    if micro is None:
        break                                                            # asked to stop: the same step on every rank
    optimizer.zero_grad(set_to_none=True)
    n_kept, row_losses = float(counts['n_kept'].sum()), []
    for i, batch in enumerate(micro):
        network.require_backward_grad_sync = i == len(micro) - 1         # ddp reads it in forward; fsdp always adds up
        if lacking := set(batch.ids) - logp.keys():
            raise UserError(f"{reference} lacks {', '.join(sorted(lacking))}, unusable when it was made: move it away")
        before = process.send(torch.tensor([logp[id] for id in batch.ids[::2]]))                          # (P,2)
        now = log_probabilities(batch)                                                                    # (P,2)
        losses, rewards = dpo_loss(now, before, beta)
        n_token = process.send((batch.targets[::2] != IGNORE_INDEX).sum(1))
        losses = losses - sft_weight * now[:, 0] / n_token
        (losses.sum() * process.world_size / global_batch_size).backward()       # ranks are averaged
        margin = rewards[:, 0] - rewards[:, 1]
        numbers = torch.stack((losses, (margin > 0).float(), margin, rewards[:, 0])).detach()              # (4,P)
        # the log divides sums over rows by targets; these are means over pairs, of two rows
        row_losses.append(numbers.repeat_interleave(2, 1) * (n_kept / (2 * global_batch_size)))
    if counts['n_image'].sum() == 0:
        # AdamW is not to touch them without an image
        common.drop_gradients(model.projector, model.encoder, model.cross, model.text_cond)
    lr_now = lr_at(step, curve)
    norm, skipped = common.optimizer_step(optimizer, lr_now, clip=1.0)
    run.record(lr=lr_now, row_losses=row_losses, norm=norm, skipped=skipped, loss_share=torch.ones(1))
    if run.due():
        run.save()
run.finish()
