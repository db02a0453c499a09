"""
A reasoner for SMART-101's puzzles (arXiv 2212.09993) on frozen features: a checkpoint's decoder reads the question, an
image encoder the picture; what trains is a Q-Former layer, or means over both, and heads for the puzzles' answers.

    python smart101.py --init_from=out/1b/ckpt80_img10/ckpt_100                  # its encoder; data/SMART101-Data
    python smart101.py --init_from=out/1b/text/ckpt_100 --encoder=dinosiglip     # the encoder of a file
    python smart101.py --parts=question --split=puzzle --name=smart101_question

At the end out_dir gets smart101.json: S_acc and O_acc of val and test, by puzzle and by category (see puzzles.py).
"""
import os
import sys

import torch
from tqdm import tqdm

import checkpoint
import common
import costs
from common import lr_at
from configurator import configure
from data import Mixture, collate
from errors import UserError, leave, user_error_hook
from files import write_whole
from puzzles import PADS, PARTS, PuzzleSource, accuracies, n_class, read_puzzles, split_rows
from reasoner import N_HEAD, Reasoner, answer_loss
from vision import build_encoder, encoder_files, encoder_spec, fill_encoder

sys.excepthook = user_error_hook

# --- config: change with a file and --key=value -----------------------------------------------------------------------
# In brackets: the allowed range or words; `free`: may change when a run is resumed.
scale = '1b'                            # names the folder; '{scale}' in init_from is replaced by it
name = 'smart101'                       # the recipe's name
out_dir = ''                            # [free] '' = out/{scale}/{name}
data_dir = 'data'                       # relative data paths below start here
puzzles = 'SMART101-Data'               # the release's folder, in data_dir
split = 'instance'                      # ['instance' | 'puzzle' | 'few_shot' | 'answer'] the paper's IS, PS, FS, AS;
                                        # 'puzzle': one head for all, without the sequences
rows_per_puzzle = 2000                  # [>= 1] the first rows of each puzzle; the release has 2000
init_from = 'out/{scale}/ckpt80_img10/ckpt_100'  # a checkpoint folder, for its tokenizer and its decoder's features
encoder = 'base'                        # ['base' | 'siglip' | 'dinov2' | 'dinosiglip'] init_from's, or that of a file
encoder_path = 'siglip-so400m-patch14-384'  # in data_dir
dinov2_path = 'dinov2-with-registers-large'  # in data_dir
parts = 'both'                          # ['both' | 'image' | 'question'] what the reasoner is shown
qformer = True                          # queries read the patches by the question; False = the patches' mean
answer = 'class'                        # ['class' | 'value'] cross-entropy over values, or |difference| and floor()
width = 256                             # [>= 8] of what trains, a multiple of 8, the heads of the Q-Former
n_query = 32                            # [>= 1] of the Q-Former
dropout = 0.2                           # [>= 0, < 1]
n_epoch = 3                             # [>= 0] passes over train, under one cosine
max_steps = 0                           # [>= 0] the schedule's length in steps; 0 = from n_epoch
stop_after = 0                          # [>= 0, free] end at this step with a checkpoint, schedule unchanged; 0 = off
global_batch_size = 128                 # [>= 1] rows per optimizer step
micro_batch_size = 128                  # [>= 1, free] upper limit: the largest divisor up to it is taken
lr = 3e-4                               # [> 0] peak, after 10 steps
eval_every = 500                        # [>= 1, free] steps between scores on val
seed = 7                                # [>= 0, < 9e12] order of the data, initial weights, dropout
device = 'auto'                         # ['auto' | 'cpu' | 'cuda', free]
dtype = ''                              # ['' | 'bfloat16' | 'float32'] autocast; '' = bfloat16 on CUDA, float32 on CPU
n_thread = 0                            # [>= 0, <= 1024, free] CPU threads; 0 = all
n_worker = 2                            # [>= 0, free] loader processes; 0 = inline
resume = 'auto'                         # ['auto' | 'never', free] 'auto' = from ckpt_last, which wins over init_from
max_bad_samples = 0                     # [>= 0, free] do without up to N unusable rows, or pictures in train; 0 = stop
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
init_from = config['init_from'] = init_from.replace('{scale}', scale)
out_dir = out_dir or os.path.join('out', scale, name)
shared = split == 'puzzle'                                       # its test puzzles have no head of their own
if width % N_HEAD:
    raise UserError(f"width={width}: expected a multiple of {N_HEAD}")

# --- data -------------------------------------------------------------------------------------------------------------
folder = os.path.join(data_dir, puzzles)
common.require({folder: "unpack SMART101-release-v1.zip of zenodo.org/record/7775984 there"}, dry_run)
files = read_puzzles(folder, rows_per_puzzle, max_bad_samples)
if shared:
    files = {puzzle: items for puzzle, items in files.items() if puzzle not in PADS}
rows = {part: split_rows(files, split, part) for part in PARTS}                        # {part: {puzzle: list}}
n_row = sum(map(len, rows['train'].values()))
max_steps = max_steps or round(n_epoch * n_row / global_batch_size)
if max_steps < 1:
    raise UserError(f"n_epoch={n_epoch} of {n_row} rows is less than a step of {global_batch_size}: give --max_steps=N")
if dry_run:
    costs.print_config(config)
    print(f"{len(rows['train'])} puzzles, {n_row:,} rows to train on: {max_steps:,} steps into {out_dir}")
    leave(0)

# --- where it starts --------------------------------------------------------------------------------------------------
process = common.setup_process(device, dtype, n_thread)
if process.world_size > 1:
    raise UserError("smart101.py runs on one device: start it without torchrun")
run = common.Run(process, __file__, config, out_dir, init_from, stages=('smart101',))
if not run.meta:
    raise UserError(f"{init_from} is not a checkpoint of these scripts: give one of stage 1, 2 or 3")
if run.resumed:
    tokenizer, vlm = checkpoint.read_tokenizer(run.folder, run.meta), checkpoint.build(run.folder, run.meta['spec'])
else:
    vlm, tokenizer, _ = checkpoint.load_vlm(run.folder)
    if parts == 'question':
        vlm.encoder = None
    elif encoder != 'base':                                      # at the layer that pretrain.py takes
        common.require(dict.fromkeys(encoder_files(config).values(), 'a folder of Hugging Face'))
        vlm.encoder = build_encoder(encoder_spec(dict(
            config, encoder_fusion='channel', encoder_layer=-2, encoder_norm=False, image_size=0, token_mode='')))
        fill_encoder(vlm.encoder, encoder_files(config))
    elif vlm.encoder is None:
        raise UserError(f"{run.folder} is text-only: give --encoder=siglip and --encoder_path=FOLDER, or another base")
spec = dict(decoder=run.meta['spec']['decoder'], image_id=run.meta['spec']['image_id'],
            encoder=vlm.encoder and vlm.encoder.spec(), projector=vlm.encoder and dict(kind='mlp2'))     # not used
about = folder, tokenizer, vlm.decoder.config.seq_len, vlm.encoder.image_size if vlm.encoder else 0
sources = {part: {puzzle: PuzzleSource(puzzle, items, *about) for puzzle, items in groups.items()}
           for part, groups in rows.items()}
scored = [source for part in ('val', 'test') for source in sources[part].values()]
for source in tqdm(scored, 'pictures that are scored', disable=None):
    for i in range(len(source)):                                 # all can be read: not to be learned at the last step
        source[i]
train = list(sources['train'].values())                          # a source a puzzle: the log has the loss of each
mixture = Mixture(train, list(map(len, train)), seed, max_bad_samples=max_bad_samples)
run.plan(max_steps, {max_steps: 'ckpt_100'})
batches = run.loader(mixture, tokenizer.pad_id)
process.start_device()                                           # after the loader has forked its workers

# --- model and optimizer ----------------------------------------------------------------------------------------------
torch.manual_seed(seed)
model = Reasoner(vlm, n_class(files), parts=parts, qformer=qformer, shared=shared, answer=answer, width=width,
                 n_query=n_query, dropout=dropout, pad_id=tokenizer.pad_id)
if run.resumed:
    checkpoint.load_weights(model, run.folder, run.meta)
model.to(process.device).train()
curve = dict(kind='main', peak=lr, final=0.0, warmup=10, total=max_steps)
optimizer = common.make_optimizer(model, {'reasoner': 1.0}, weight_decay=0.2, betas=(0.9, 0.98), decay='matrices')
if run.resumed:
    run.load_moments(optimizer, ('reasoner.image_heads.', 'reasoner.answers.'))      # of puzzles that have not come yet

# --- scores -----------------------------------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(part):
    """accuracies() of a part's rows, all of them."""
    model.eval()
    asked, said = [], []
    for puzzle, source in sources[part].items():
        for first in range(0, len(source), micro_batch_size):
            samples = [source[i] for i in range(first, min(first + micro_batch_size, len(source)))]
            batch = collate(samples, tokenizer.pad_id).to(process.device)
            with process.autocast():
                ((_, scores),) = model(batch.tokens, batch.images, [puzzle] * len(samples))
            values = scores.argmax(-1) if answer == 'class' else scores[..., 0].floor().long()           # (b,S)
            said += values.tolist() if puzzle in PADS else values[:, 0].tolist()
        asked += source.rows
    model.train()
    return accuracies(asked, said)


# --- the loop ---------------------------------------------------------------------------------------------------------
run.begin(stage='smart101', model=model, optimizer=optimizer, tokenizer=tokenizer, mixture=mixture, spec=spec,
          schedule=curve)
if not run.resumed:
    run.encoder_file = ''                                        # the base's is another: here the decoder is in it, too
numbers = list(sources['train'])                                 # the puzzle of each source
for step in range(run.first_step, run.last_step):
    micro, counts = run.take(batches)
    if micro is None:
        break
    source_weight, loss_share = common.loss_weights(counts, 'source')            # of each puzzle a mean
    torch.manual_seed(seed * 1_000_000 + step)                   # of dropout: resumed, it is the same on any device
    optimizer.zero_grad(set_to_none=True)
    row_losses = []
    for batch in micro:
        weights, asked = process.send(source_weight[batch.source]), [numbers[i] for i in batch.source.tolist()]
        batch = batch.to(process.device, non_blocking=True)
        with process.autocast():
            found = model(batch.tokens, batch.images, asked)
        loss_sum, row_loss = answer_loss(found, batch.targets, weights, answer)
        loss_sum.backward()
        row_losses.append(row_loss)
    lr_now = lr_at(step, curve)
    norm, skipped = common.optimizer_step(optimizer, lr_now, 1.0)
    run.record(lr=lr_now, row_losses=row_losses, norm=norm, skipped=skipped, loss_share=loss_share)
    if run.step % eval_every == 0 or run.step == max_steps:      # before saving, so that no resume repeats it
        run.flush()
        val = evaluate('val')
        run.logger.log({'step': run.step, 'S_acc': val['S_acc'], 'O_acc': val['O_acc']})
    if run.step == max_steps:
        test = evaluate('test')
        write_whole(os.path.join(out_dir, 'smart101.json'), dict(config=config, val=val, test=test))
        for what, (s, o) in {'all': (test['S_acc'], test['O_acc']), **test['categories']}.items():
            process.print(f"test {what:<10} S_acc {100 * s:5.1f}  O_acc {100 * o:5.1f}")
    if run.due():
        run.save()
run.finish()
