"""
What the training stages share: the optimizer, one run's bookkeeping. Nothing here decides what is trained. Checkpoint
folders are checkpoint.py's, the log is log.py's, what a run costs is costs.py's. The names of schedules.py, and those
of processes.py (processes, devices), are names here, too.
"""
import glob
import itertools
import math
import os
import time

import torch

import checkpoint
import costs
from adapters import NAMES, adapter_spec, add_adapters
from configurator import config_keys
from data import TextSource
from errors import BadSample, UserError, leave
from files import expand_braces
from kernels import IGNORE_INDEX
from log import Logger, StepReader, memory_gib
from mixture import COUNTS, Loader, Mixture
from processes import Process, StopSignal, accumulation, distribute, pick_device, setup_process  # noqa: F401
from schedules import check_schedule, cooldown_lr, lr_at, main_lr, remaining_lr, top_lr  # noqa: F401


# --- the optimizer ----------------------------------------------------------------------------------------------------

def make_optimizer(model, shares, *, weight_decay, betas, decay='all'):
    """
    AdamW over the parts of a VLM that train.
    shares   dict part ('decoder', 'projector', 'encoder', 'cross', 'text_cond') -> its share of the scheduled lr
    decay    'all' = every parameter decays, gains and embeddings too (OpenLM); 'matrices' = those of two or more
             dimensions, so gains and biases do not (Prismatic); adapters and gates never do
    returns  torch.optim.AdamW (fused), groups with 'share' and 'names'
    """
    groups = []
    for part, share in shares.items():
        module = getattr(model, part)
        named = [(f'{part}.{n}', p) for n, p in module.named_parameters() if p.requires_grad] if module else []
        decayed = {n for n, p in named if (decay == 'all' or p.ndim >= 2) and not n.endswith((*NAMES, '.gates'))}
        for strength, falls in ((weight_decay, True), (0.0, False)):
            if pairs := [(n, p) for n, p in named if (n in decayed) == falls]:
                names, params = zip(*pairs)
                groups.append(dict(params=list(params), names=list(names), share=share, weight_decay=strength))
    if not groups:
        raise UserError("freeze='decoder' leaves nothing to train in a model without images: give --freeze=none")
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, fused=True)


def optimizer_step(optimizer, lr, clip):
    """
    Clip, then update, all on the device: a step whose gradient norm is not finite changes nothing.
    returns  (norm () float32 before clipping, bad () float32: 1 where the step was skipped)
    """
    params = [p for group in optimizer.param_groups for p in group['params'] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in params])
    norm = norm.full_tensor() if hasattr(norm, 'full_tensor') else norm          # fsdp: of all processes, on the device
    norm = norm.to(optimizer.param_groups[0]['params'][0].device)                # of no gradients it is on the CPU
    torch.nn.utils.clip_grads_with_norm_(params, clip if clip > 0 else math.inf, norm)
    bad = (~norm.isfinite()).float()
    for group in optimizer.param_groups:
        group['lr'] = lr * group['share']
    optimizer.grad_scale, optimizer.found_inf = None, bad      # the fused kernel's own skip: no host wait
    optimizer.step()
    return norm, bad


def drop_gradients(*modules):
    """Set gradients to None: what a step did not use is neither decayed nor moved by old moments."""
    for module in filter(None, modules):
        for p in module.parameters():
            p.grad = None


# --- one step's numbers -----------------------------------------------------------------------------------------------

def count(process, micro, names, *flags):
    """
    What a global step holds, on the host.
    micro    this rank's Batches; names the mixture's sources; flags numbers to sum along
    returns  (dict of COUNTS and 'weight', the sum of the targets' weights -> (len(names),) float64, *flags summed over
             ranks as ints)
    """
    local = [sum(batch.stats.get(name, {}).get(key, 0) for batch in micro) for key in COUNTS for name in names]
    weight = torch.zeros(len(names), dtype=torch.float64)
    for batch in micro:
        kept = batch.targets != IGNORE_INDEX if batch.weights is None else batch.weights
        weight.index_add_(0, batch.source, kept.sum(1).double())
    total = process.host_sum([float(x) for x in (*local, *weight, *flags)])
    n = len(local) + len(names)
    counts = torch.tensor(total[:n], dtype=torch.float64).view(-1, len(names))
    return (dict(zip((*COUNTS, 'weight'), counts)), *(int(f) for f in total[n:]))


def loss_weights(counts, rule):
    """
    The factor on a target's own weight, by source, so that a step's weighted nats sum to its loss.
    rule     'token': every target alike; 'source': a mean per source times its share of sequences, OpenLM's effect
    returns  ((n_source,) float32, share of the loss per source (n_source,) float64); a source without a kept target
             weighs 0
    """
    weight = counts['weight']
    share = weight if rule == 'token' else counts['n_sample'] * (weight > 0)
    share = share / share.sum().clamp(min=1e-9)
    return (share / weight.clamp(min=1e-9)).float(), share


# --- one run ----------------------------------------------------------------------------------------------------------

class Run:
    """
    A run of one stage: its folder, the checkpoint it goes on from, its position, and what it has counted so far. The
    loops of the stage scripts show its methods in their order; plan() and finish() may end the process.
    """
    def __init__(self, process, script, config, out_dir, init_from, stages):
        """
        script   the stage's file, whose config block says which keys may differ on resume; stages the stages of
                 checkpoints that it may go on from
        Sets .resumed; .folder, where the weights come from ('' = nowhere); .meta, its meta.json (None where there is
        no checkpoint of ours); .base, what is known of init_from; and where text goes on: .start_cursor, .text_seed,
        .text_rows. ckpt_last is looked up once, after the folder's lock is taken.
        """
        self.process, self.config, self.out_dir, self.init_from = process, config, out_dir, init_from
        self.stop_signal, self.asked_adapters = StopSignal(), adapter_spec(config)
        self.n_micro, self.micro_batch_size = accumulation(config['global_batch_size'], config['micro_batch_size'],
                                                           process.world_size)
        self.folder = self._lock_and_find_last()
        self.resumed, self.meta = bool(self.folder), None
        if self.resumed:
            self.meta = checkpoint.read_meta(self.folder)
            keys = config_keys(script)
            checkpoint.check_resume(self.meta, config, self.folder, stages, keys)
            self.base = self.meta.get('base')
        elif init_from:
            self.folder = os.path.realpath(init_from)                # once: a run that goes on may swap its ckpt_last
            weights = glob.glob(os.path.join(glob.escape(self.folder), '*.safetensors'))
            foreign = os.path.isfile(init_from) or weights       # such as OpenLM's
            if os.path.exists(os.path.join(self.folder, 'meta.json')) or not foreign:
                self.meta = checkpoint.read_meta(self.folder)
            self.base = self.meta and {key: value for key, value in self.meta.items() if key != 'rng'}
        else:
            self.base = None
        meta = self.meta or {}
        if meta:
            check_schedule(meta['schedule'], os.path.join(self.folder, 'meta.json'))
        self.first_step = self.step = meta['step'] if self.resumed else 0
        self.seen = meta['seen'] if self.resumed else {}
        self.bad_before = meta['bad_samples'] if self.resumed else []
        # text goes on where the base stopped, in the base's own order
        self.start_cursor = meta.get('start_cursor' if self.resumed else 'cursor', {})
        self.text_seed, self.text_rows = meta.get('text_seed', config['seed']), meta.get('text_rows', {})
        self._check_same_start()

    def _lock_and_find_last(self):
        """
        The folder that ckpt_last points to, '' for a new run; the lock of a folder that holds a run is taken, but for a
        dry run, which changes nothing.
        """
        last, problem, folder = os.path.join(self.out_dir, 'ckpt_last'), '', ''
        if self.process.master and os.path.lexists(last) and not self.config['dry_run']:
            try:
                checkpoint.open_folder(self.out_dir)
                if self.config['resume'] == 'never':
                    raise UserError(f"{self.out_dir} already holds a run and resume='never': remove it, or give "
                                    "another --out_dir")
                if not os.path.exists(last):
                    raise UserError(f"{last} points to {os.readlink(last)}, which is gone: link it to a checkpoint "
                                    "that is there, or remove it to start over")
            except UserError as e:
                problem = str(e)
        self.process.barrier()
        if os.path.exists(last) and not problem:
            folder = os.path.realpath(last)
        for told in self.process.gather([problem]):
            if told:
                raise UserError(told)
        return folder

    def _check_same_start(self):
        steps = self.process.gather([self.first_step])
        if len(set(steps)) > 1:
            raise UserError(f"process {self.process.rank} starts at step {self.first_step}, others do not: "
                            f"out_dir={self.out_dir} has to be one folder that every node sees")

    def plan(self, max_steps, keep):
        """Fix the run's length; keep: {step: name of the checkpoint kept there}. A finished run ends here."""
        self.max_steps, self.keep = max_steps, keep
        stop_after = self.config['stop_after']
        self.last_step = max(self.first_step, min(max_steps, stop_after)) if stop_after else max_steps
        if self.first_step >= max_steps:
            self.process.print(f"{self.out_dir} is finished: {self.first_step} of {max_steps} steps")
            leave(0)
        if self.resumed:
            self.process.print(f"resuming {self.out_dir} at step {self.first_step} of {max_steps}")
        if self.micro_batch_size != self.config['micro_batch_size']:
            self.process.print(f"micro_batch_size={self.micro_batch_size}, the largest up to "
                               f"{self.config['micro_batch_size']} that divides {self.config['global_batch_size']} "
                               f"sequences among {self.process.world_size} processes")

    def add_adapters(self, model, spec):
        """
        Put the adapters that the config asks for on a model whose base is loaded, drawn from seed + 4, and into its
        description. Those of a base stay, alone. Returns whether there are fresh ones.
        """
        asked, theirs = self.asked_adapters, spec.get('adapters')
        if asked and theirs and theirs != dict(asked, base=theirs['base']):
            self.process.print(f"!!! the lora keys have no effect: {self.folder} brings its own adapters")
        elif theirs and not asked and not self.resumed:
            self.process.print(f"{self.folder} has adapters on {theirs['on']}, which alone train there; checkpoint.py "
                               "merge makes an ordinary checkpoint of it")
        if theirs or not asked:
            return False
        base = self.meta['files']['model.safetensors']['sha256'] if self.meta else ''      # '': OpenLM's own file
        spec['adapters'] = dict(asked, base=base)
        torch.manual_seed(self.config['seed'] + 4)
        add_adapters(model, spec['adapters'])
        return True

    def text_mixture(self, patterns, tokenizer, seq_len, start=None):
        """
        A config's text as a Mixture, in the order that stage 1 gave it.
        patterns  ((folder or glob in data_dir, weight), ...); start {source: row}, where an earlier stage stopped
        """
        sources = []
        for pattern, _ in patterns:
            name = text_name(pattern, patterns)
            row_len = self.text_rows.get(name, {}).get('row_len', 0)             # rows are cut as they were before
            path = os.path.join(self.config['data_dir'], pattern)
            sources.append(TextSource(path, tokenizer, seq_len, name, row_len, self.config['cache_dir']))
            if doubt := tokenizer.doubt(sources[-1]):
                self.process.print(doubt)
        return Mixture(sources, [weight for _, weight in patterns], self.text_seed, start=start,
                       max_bad_samples=self.config['max_bad_samples'])

    def compare_text(self, mixture):
        """Say in one loud line which text does not go on where the checkpoint stopped: new or changed files."""
        for name, text in mixture.sources.items() if self.start_cursor else ():
            n_row = self.text_rows.get(name, {}).get('n_row', text.n_row)
            if name not in self.start_cursor:
                self.process.print(f"!!! text source {name!r} is new: it starts at its first row; {self.init_from} "
                                   f"knows {', '.join(map(repr, self.start_cursor))}")
            elif n_row != text.n_row:
                self.process.print(f"!!! text source {name!r} has {text.n_row} rows, in {self.folder} it had {n_row}: "
                                   "their order is new, so text may come again")

    def _compare_sources(self, mixture):
        """The description of each source for meta.json; UserError where a resumed run would read other data."""
        sources = {name: shuffled.source.shards.describe() for name, shuffled in mixture.sources.items()}
        for name, now in sources.items() if self.resumed else ():
            then = self.meta['sources'].get(name, now)
            if now != then:
                alike = (now['n_file'], now['n_row']) == (then['n_file'], then['n_row'])
                line = (f"the data of {name!r} has changed: {now['n_file']} files with {now['n_row']} rows now, "
                        f"{then['n_file']} with {then['n_row']} when {self.folder} was saved"
                        + (' (of other names or sizes)' if alike else ''))
                if not self.config['allow_changed_data']:
                    raise UserError(f"{line}: put it back, or go on with --allow_changed_data=true")
                self.process.print(f"!!! {line}")
        return sources

    def load_moments(self, optimizer, untouched=()):
        """
        AdamW's moments of the checkpoint that this run goes on from, and for a resumed run the random state. Parts that
        a base lacks start with fresh moments, and so may `untouched`, prefixes of what no step may have needed yet.
        Raises UserError when a resumed run finds none, or not all: it could not go on exactly.
        """
        seen_images = any(counts['n_image'] for counts in self.seen.values())
        # untouched without images
        may_lack = untouched if self.resumed and seen_images else (
            'projector.', 'encoder.', 'cross.', 'text_cond.', *untouched)
        fresh = checkpoint.load_optimizer(optimizer, self.folder, self.meta, may_lack)
        if fresh is None:
            raise UserError(f"{self.folder}: optim.pt is gone, so the run cannot go on exactly; use it as --init_from "
                            "of a new run")
        if self.resumed:
            checkpoint.restore_rng(self.meta, self.folder)
        else:
            self.process.print(f"AdamW moments from {self.folder}; fresh for {len(fresh)} tensors")

    def loader(self, mixture, pad_id, *, start=None, stop=None, global_batch_size=0, n_worker=None, **options):
        """Loader of this rank's batches: of the steps of this run, unless another range is given."""
        return Loader(mixture, start=self.first_step if start is None else start,
                      stop=self.last_step if stop is None else stop,
                      global_batch_size=global_batch_size or self.config['global_batch_size'],
                      micro_batch_size=self.micro_batch_size, rank=self.process.rank,
                      world_size=self.process.world_size, pad_id=pad_id,
                      n_worker=self.config['n_worker'] if n_worker is None else n_worker,
                      pin_memory=self.process.device.type == 'cuda', **options)

    def begin(self, *, stage, model, optimizer, tokenizer, mixture, spec, schedule, moments='', values=('z_loss',)):
        """
        Open the folder and the log; what is given here goes into every checkpoint, moments as a word for meta.
        values   the names of what the rows of record's row_losses hold behind the loss
        """
        self.model, self.optimizer, self.tokenizer, self.mixture = model, optimizer, tokenizer, mixture
        self.schedule, self.saved = schedule, None
        self.about = dict(stage=stage, spec=spec, schedule=schedule, moments=moments, init_from=self.init_from,
                          base=self.base, config=self.config, sources=self._compare_sources(mixture))
        self.seen = self.seen or {name: dict.fromkeys(COUNTS, 0) for name in mixture.names}
        self.bad_samples, self.n_bad_sample = [], len(self.bad_before)
        self.image_flops, self.trains = 0, costs.what_trains(model.decoder)
        # else no share of a peak is logged
        self.counts_flops = self.process.device.type == 'cuda' and hasattr(model, 'projector')
        if self.counts_flops:
            self.image_flops, _ = costs.image_costs(costs.meta_vlm(spec, self.config), self.config)
        frozen = model.encoder is not None and not any(p.requires_grad for p in model.encoder.parameters())
        kept = os.path.join(self.folder, 'encoder.safetensors')
        same = self.meta and frozen and self.meta['spec']['encoder'] == spec['encoder']        # not so at another size
        self.encoder_file = kept if same and os.path.exists(kept) else ''
        self.frozen = frozen
        if frozen and self.config.get('encoder_lr'):
            self.process.print(f"!!! encoder_lr has no effect: freeze={self.config['freeze']!r}")
        if self.process.master:
            if not self.resumed:
                checkpoint.open_folder(self.out_dir)
                if os.path.lexists(os.path.join(self.out_dir, 'ckpt_last')):
                    raise UserError(f"out_dir={self.out_dir}: another run has begun there meanwhile; start again to go "
                                    "on with it")
        self.process.barrier()
        config = self.config
        self.logger = Logger(self.process, self.out_dir, self.first_step, self.max_steps, every=config['log_every'],
                             wandb=config['wandb'], tensorboard=config['tensorboard'], config=config)
        self.reader, self.time = StepReader(self.process, self.logger, mixture.names, values), time.perf_counter()
        self.process.print(
            f"{config['name']}: {sum(p.numel() for p in model.parameters()):,} parameters, of which "
            f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} train, {self.max_steps} steps of "
            f"{config['global_batch_size']} sequences, {self.n_micro} micro-steps, {self.process.world_size} processes "
            f"on {self.process.device.type} in {str(self.process.dtype)[6:]}, lr {lr_at(0, schedule):.3e} -> "
            f"{lr_at(self.max_steps - 1, schedule):.3e}")
        if model.n_slot:                                         # whatever their number: the same samples, and seq_len
            self.process.print(f"an image takes {model.n_slot} of a row's {config['seq_len']} positions: "
                               f"{config['seq_len'] - model.n_slot} are left for text")

    def take(self, batches):
        """
        The next step's micro-batches of this rank, on the host, and what the global step holds (see count). No GPU is
        waited for. (None, None) when a signal asks to stop: at the same step on every rank.
        """
        begin = time.perf_counter()
        try:
            micro = [next(batches) for _ in range(self.n_micro)]
        except UserError as e:
            self.reader.flush()                                  # the last step's line is still to be written
            limit = f" (max_bad_samples={self.config['max_bad_samples']})" if isinstance(e, BadSample) else ''
            raise UserError(f"{e}{limit}") from e
        self.waited = time.perf_counter() - begin
        bad = [message for batch in micro for message in batch.bad]
        counts, n_bad, stop = count(self.process, micro, self.mixture.names, len(bad), self.stop_signal.set)
        if stop:
            self.process.print(f"asked to stop (SIGTERM, Ctrl-C): stopping after step {self.step}")
            self.last_step = self.step
            return None, None
        self.bad_samples, self.n_bad_sample = self.bad_samples + bad, self.n_bad_sample + n_bad
        if self.n_bad_sample > self.config['max_bad_samples']:
            self.reader.flush()
            raise UserError(f"{self.n_bad_sample} bad samples are more than max_bad_samples="
                            f"{self.config['max_bad_samples']}; on this process: {'; '.join(self.bad_samples[-3:])}")
        self.micro, self.counts = micro, counts
        return micro, counts

    def record(self, *, lr, row_losses, norm, skipped, loss_share):
        """Count the step that take() began and queue its line of the log; loss_share: of each source."""
        self.step += 1
        names, counts = self.mixture.names, self.counts
        for i, name in enumerate(names):
            for key in COUNTS:
                self.seen[name][key] += round(float(counts[key][i]))
        now, before = time.perf_counter(), self.time
        self.time = now
        tokens = float(sum(counts[k].sum() for k in ('n_text', 'n_image_position', 'n_pad')))
        rate = tokens / (now - before)
        flops = sum(costs.decoder_flops(self.model.decoder.config, *batch.tokens.shape, len(batch.kept), **self.trains)
                    + self.image_flops * (0 if batch.images is None else len(batch.images)) for batch in self.micro)
        line = dict(step=self.step, tokens=self.tokens(), lr=lr, data_wait_s=self.waited,
                    mem_gib=memory_gib(self.process.device), n_kept=int(counts['n_kept'].sum()), tokens_per_s=rate,
                    mfu=None)
        if self.counts_flops:
            line['mfu'] = costs.model_flops_utilisation(flops / (now - before), self.process.device)     # of this GPU
        line['sources'] = {name: dict(self.seen[name], n_kept_now=int(counts['n_kept'][i]), share=float(loss_share[i]))
                           for i, name in enumerate(names)}
        line['time'] = now
        self.reader.push(line, self.micro, row_losses, norm, skipped)

    def tokens(self):
        """Positions consumed so far, with images and pads."""
        return sum(c['n_text'] + c['n_image_position'] + c['n_pad'] for c in self.seen.values())

    def due(self):
        """Is a checkpoint due after the step just recorded?"""
        every = self.config['save_every']
        return self.step in self.keep or self.step == self.last_step or bool(every and self.step % every == 0)

    def save(self):
        """One checkpoint of this moment, handed over by all ranks, written by rank 0; the log reaches it first."""
        self.reader.flush()
        every_bad = self.bad_before + self.process.gather(self.bad_samples)
        n = self.step * self.config['global_batch_size']
        texts = {name: source for name, source in self.mixture.sources.items() if isinstance(source.source, TextSource)}
        cursor = {name: row for name, row in self.mixture.cursor(n).items() if name in texts}
        rows = {name: dict(row_len=text.source.row_len, n_row=text.n_row) for name, text in texts.items()}
        info = dict(self.about, step=self.step, samples=n, tokens=self.tokens(), seen=self.seen,
                    epochs=self.mixture.epochs(n), bad_samples=every_bad, cursor={**self.start_cursor, **cursor},
                    start_cursor=self.start_cursor, text_seed=self.text_seed, text_rows={**self.text_rows, **rows})
        name = self.keep.get(self.step, f'ckpt_step_{self.step}')
        try:
            checkpoint.save_checkpoint(self.out_dir, name, self.model, self.optimizer, self.tokenizer, info,
                                       encoder_file=self.encoder_file, master=self.process.master)
            if self.process.master:
                checkpoint.prune_checkpoints(self.out_dir, keep_optimizer=self.config['keep_optimizer'],
                                             keep_steps=self.config['keep_steps'])
        except OSError as e:
            raise UserError(str(e)) from e
        if self.frozen:
            self.encoder_file = os.path.join(self.out_dir, name, 'encoder.safetensors')
        self.saved = self.step
        self.process.barrier()
        self.time = time.perf_counter()

    def flush(self):
        """Write the pending line of the log, before something that takes its time."""
        self.reader.flush()
        self.time = time.perf_counter()

    def finish(self):
        """After the loop: the last line, a checkpoint where a signal stopped the run, and the end of the process."""
        self.reader.flush()
        if self.step > self.first_step and self.saved != self.step:
            self.save()
        self.logger.close()
        self.process.print(f"{self.out_dir}: {self.step} of {self.max_steps} steps done")
        leave(0)


# --- names and inputs -------------------------------------------------------------------------------------------------

def patterns_of(key, pairs):
    """The patterns of a key's (pattern, weight) pairs; UserError where no pair weighs anything."""
    if not any(weight for _, weight in pairs):
        raise UserError(f"{key}={pairs}: expected a pair with a weight above 0, such as (('{key}', 1.0),)")
    return [pattern for pattern, _ in pairs]


def text_name(pattern, patterns):
    """A text source's name, the key of its cursor: 'text' for 'text/*.tar'; the pattern where there are several."""
    folders = itertools.takewhile(lambda part: not glob.has_magic(part), pattern.split('/'))
    return '/'.join(folders) or pattern if len(patterns) == 1 else pattern


def require(inputs, dry_run=False):
    """
    Raise one UserError for all inputs that are not there: {path or pattern: what to do then}. A dry run has said by now
    what needs none of them: it says the line, too, and ends well.
    """
    missing = {}
    for path, hint in inputs.items():
        if not os.path.exists(path) and not all(map(glob.glob, expand_braces(path))):
            missing.setdefault(hint, []).append(path)
    if missing:
        line = '; '.join(f"{', '.join(paths)} not found; {hint}" for hint, paths in missing.items())
        if not dry_run:
            raise UserError(line)
        print(f"no more can be said without its inputs: {line}")
        leave(0)
