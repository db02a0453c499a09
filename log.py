"""
A training step's numbers on their way to log.jsonl, the terminal and the trackers: read from the device one step late,
so that no step waits for them.
"""
import contextlib
import json
import math
import os
import resource
import sys
import time

import torch
import torch.distributed as dist
from tqdm import tqdm

from errors import UserError, leave, printable, reading
from files import write_whole, writing


class StepReader:
    """
    Turns a step's device numbers into a log line one step late, so that the loop never waits for the GPU, and stops the
    run when a step was not finite (such a step has changed nothing: see optimizer_step).
    """
    def __init__(self, process, logger, names, values=('z_loss',)):
        self.process, self.logger, self.names, self.values, self.pending = process, logger, names, values, None

    def push(self, line, micro, row_losses, norm, skipped):
        """
        Queue a step.
        line      its log line, all that the host knows; line['sources'] by the names of the sources
        micro     this rank's Batches; row_losses of each (1 + len(values),B), the loss of each row and its values, as
                  VLM gives them; norm, skipped () device tensors
        """
        row_loss = torch.cat(row_losses, 1)                                               # (1+V,R) this rank's rows
        source = self.process.send(torch.cat([batch.source for batch in micro]))         # (R,)
        finite = row_loss.isfinite().all(0)                                              # (R,)
        world = self.process.world_size
        nll = row_loss.new_zeros(len(self.names)).index_add_(0, source, row_loss[0])
        flags = row_loss.new_zeros(world)                                                # one of each rank
        flags[self.process.rank] = (~finite).any()
        sums = torch.cat([nll, row_loss[1:].sum(1), flags])
        if world > 1:
            dist.all_reduce(sums)
        norm = norm.detach().float()
        device = torch.cat([sums, norm[None], skipped[None], finite.float()])            # one copy to the host
        if device.device.type == 'cuda':
            host, event = torch.empty(device.shape, pin_memory=True), torch.cuda.Event()
            host.copy_(device, non_blocking=True)
            event.record()
        else:
            host, event = device, None
        sizes = [len(nll), len(self.values), world, 1, 1, len(finite)]
        previous, self.pending = self.pending, (line, host, sizes, event, [i for batch in micro for i in batch.ids])
        self._read(previous)

    def flush(self):
        """Read the step that is still pending."""
        previous, self.pending = self.pending, None
        self._read(previous)

    def _read(self, pending):
        if pending is None:
            return
        line, host, sizes, event, ids = pending
        if event is not None:
            event.synchronize()
        nll, values, flags, norm, skipped, finite = host.split(sizes)
        if skipped or flags.any():
            self._stop(line['step'], flags, norm, finite, ids)
        for name, nats in zip(self.names, nll.tolist()):
            about = line['sources'][name]
            about['loss'] = nats / about['n_kept_now'] if about['n_kept_now'] else None
        n_kept = max(1, line['n_kept'])
        values = {name: value / n_kept for name, value in zip(self.values, values.tolist())}
        self.logger.log(dict(line, loss=float(nll.sum()) / n_kept, **values, grad_norm=float(norm)))

    def _stop(self, step, flags, norm, finite, ids):
        """End the run at a step that was not finite; the ranks that know the samples name them."""
        bad = [i for i, ok in zip(ids, finite) if not ok]
        ranks = flags.nonzero().flatten().tolist()
        named = printable(', '.join([*dict.fromkeys(bad or ids)][:8]))     # a conversation may have several rows
        where = f"loss on ranks {ranks}" if ranks else f"gradient norm {float(norm)}"
        if not ranks or bad:                             # each rank with a bad row, or all when only the norm is bad
            print(f"step {step}: not finite: {where}; rank {self.process.rank}, samples {named}; "
                  "the step changed nothing and the run stops", file=sys.stderr)
        self.process.barrier()                           # nobody leaves before the others have read what they were sent
        leave(1)


class Logger:
    """
    log.jsonl, and a progress bar on a terminal or plain lines elsewhere; on other ranks than 0 it does nothing.
    On resume, torn lines and lines beyond `step` are cut.
    """
    def __init__(self, process, out_dir, step, max_steps, *, every=10, wandb=False, tensorboard=False, config=None):
        self.process, self.on, self.every = process, process.master, every
        self.start, self.begin, self.max_steps = step, time.perf_counter(), max_steps
        self.tracker = self.writer = self.bar = None
        self.opened = contextlib.ExitStack()                               # what close() ends
        self.mark = None                                                   # (time, tokens) of the line printed before
        if not self.on:
            return
        path = os.path.join(out_dir, 'log.jsonl')
        lines = []
        if step and os.path.exists(path):
            with reading(path, 'a log'), open(path, encoding='utf-8', errors='replace') as f:
                lines = [line for line in f if line.endswith('\n') and _step_of(line) <= step]
        with writing(path):
            write_whole(path, ''.join(lines))
            self.file = self.opened.enter_context(open(path, 'a', encoding='utf-8', buffering=1))
        if sys.stderr.isatty():
            self.bar = self.opened.enter_context(tqdm(total=max_steps, initial=step, unit='step', dynamic_ncols=True))
        try:
            if wandb:
                import wandb as tracker
                self.tracker = tracker.init(project='ckpt80', name=config['name'], config=config, dir=out_dir)
                self.opened.callback(self.tracker.finish)
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter
                self.writer = self.opened.enter_context(SummaryWriter(out_dir))
        except ImportError as e:
            raise UserError(f"{e}: a package that is installed by hand (pip install wandb or tensorboard)") from e

    def log(self, line):
        """Append one dict with a 'step'; show it."""
        if not self.on:
            return
        kept = {key: value for key, value in line.items() if key != 'time'}
        try:
            self.file.write(json.dumps(kept) + '\n')
        except OSError as e:
            raise UserError(f"{self.file.name}: cannot be written ({e}) at step {line['step']}; the checkpoints are "
                            "untouched") from e
        numbers = {k: v for k, v in kept.items() if isinstance(v, (int, float)) and k != 'step'}
        by_source = {name: about['loss'] for name, about in line.get('sources', {}).items()
                     if about['loss'] is not None}
        numbers.update({f'loss_{name}': loss for name, loss in by_source.items()})
        if self.tracker is not None:
            self.tracker.log(numbers, step=line['step'])
        if self.writer is not None:
            for key, value in numbers.items():
                self.writer.add_scalar(key, value, line['step'])
        if 'loss' not in line:
            text = ', '.join(f'{k} {v:.4f}' for k, v in numbers.items())
            self.process.print(f"step {line['step']}: {text}")
        elif self.bar is not None:
            self.bar.update(line['step'] - self.bar.n)
            self.bar.set_postfix(loss=f"{line['loss']:.3f}", lr=f"{line['lr']:.1e}")
        elif line['step'] % self.every == 0 or line['step'] in (self.start + 1, self.max_steps):
            now, tokens, rate = line['time'], line['tokens'], line['tokens_per_s']
            if self.mark:                                                  # the rate since the line before
                rate = (tokens - self.mark[1]) / (now - self.mark[0])
            self.mark = now, tokens
            eta = (now - self.begin) / (line['step'] - self.start) * (self.max_steps - line['step'])
            split = ' '.join(f'{name} {loss:.3f}' for name, loss in by_source.items())
            split = f' ({split})' if 1 < len(by_source) < 9 else ''           # of SMART-101 one a puzzle
            self.process.print(f"step {line['step']}/{self.max_steps}  loss {line['loss']:.4f}{split}  "
                               f"lr {line['lr']:.2e}  norm {line['grad_norm']:.2f}  {rate:.0f} tok/s  eta {eta:.0f} s")

    def close(self):
        self.opened.close()


def _step_of(line):
    try:
        return int(json.loads(line)['step'])
    except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError):
        return math.inf                                                    # a torn or damaged line: cut


def memory_gib(device):
    """Peak memory of this process in GiB: the GPU's allocator, or resident memory on CPU."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform != 'darwin' else 30)
