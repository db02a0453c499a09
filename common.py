"""
What the training stages share: processes and devices, lr schedules, the optimizer, bookkeeping, dry runs, the log.
Nothing here decides what is trained. Checkpoint folders are checkpoint.py's.
"""
import atexit
import dataclasses
import glob
import importlib.util
import inspect
import itertools
import json
import math
import os
import resource
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import TextSource, find
from kernels import IGNORE_INDEX
from mixture import COUNTS
from model import Decoder

# dense bf16, by substring of the device's name: the first that fits
PEAK_FLOPS = {'A100': 312e12, 'H100 PCIe': 756e12, 'H100 NVL': 835e12, 'H200 NVL': 835e12, 'H100': 989e12,
              'H200': 989e12}
MAX_THREADS = 1024              # OpenMP crashes on absurd numbers instead of refusing them
AT_LEAST = {**dict.fromkeys('n_layer n_head n_embd vocab_size seq_len image_size global_batch_size micro_batch_size '
                            'eval_rows log_every'.split(), 1),
            **dict.fromkeys('n_ffn max_tokens max_steps stop_after n_epoch warmup_steps rewarm_steps '
                            'moments_warmup_steps final_lr start_lr rewarm_lr projector_lr encoder_lr weight_decay '
                            'grad_clip z_loss n_thread n_worker save_every keep_steps eval_every length_window '
                            'max_bad_samples'.split(), 0)}
ONE_OF = {'schedule': ('main', 'cooldown', 'rewarm'), 'cooldown_shape': ('cosine', 'remaining'),
          'loss_weight': ('source', 'token'), 'loss_average': ('token', 'answer'), 'resume': ('auto', 'never'),
          'keep_optimizer': ('all', 'percent', 'last', 'none')}


# --- configs ----------------------------------------------------------------------------------------------------------

def check_config(config):
    """Exit with one line for the first value of a training stage's config that no run could use."""
    for key, value in config.items():
        if key in AT_LEAST and value < AT_LEAST[key]:
            sys.exit(f"{key}={value}: expected at least {AT_LEAST[key]}")
        if key in ONE_OF and value not in ONE_OF[key]:
            sys.exit(f"{key}={value!r}: expected one of {', '.join(ONE_OF[key])}")
        if key == 'lr' and not value > 0:
            sys.exit(f"lr={value}: expected above 0")
        if key == 'seed' and not 0 <= value < 2 ** 63:
            sys.exit(f"seed={value}: expected from 0 to below 2**63")
        if key == 'n_thread' and value > MAX_THREADS:
            sys.exit(f"n_thread={value}: expected at most {MAX_THREADS}")
        if key in ('wandb', 'tensorboard') and value and importlib.util.find_spec(key) is None:
            sys.exit(f"{key}=True: the package is not there; pip install {key}")
        if key in ('beta1', 'beta2', 'warmup_ratio', 'text_share') and not 0 <= value < 1:
            sys.exit(f"{key}={value}: expected from 0 to below 1")
        if key in ('image_ratio', 'instruct_share') and not 0 <= value <= 1:
            sys.exit(f"{key}={value}: expected a share between 0 and 1")
        if key == 'keep_percent' and not all(type(p) is int and 0 < p <= 100 for p in value):
            sys.exit(f"{key}={value}: expected whole percents from 1 to 100, such as (20, 100)")
        pairs = key in ('text', 'captions') and [p if isinstance(p, (tuple, list)) else () for p in value]
        if pairs and not all(len(p) == 2 and isinstance(p[0], str) and isinstance(p[1], (int, float)) for p in pairs):
            sys.exit(f"{key}={value}: expected ((folder or glob, weight), ...), such as (('{key}', 1.0),)")


# --- learning-rate schedules ------------------------------------------------------------------------------------------

def main_lr(step, *, peak, final, warmup, total):
    """The lr of step 0, 1, ...: linear warmup to peak, cosine to final at `total`, final beyond (paper 2.1.1)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if step >= total:
        return final
    return final + (peak - final) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def cooldown_lr(step, *, start, final, total):
    """Cosine from start at step 0 to final at `total`: how a checkpoint of mid-schedule cools down (figure 3)."""
    return final + (start - final) * (1 + math.cos(math.pi * min(step / total, 1))) / 2


def remaining_lr(step, *, main, at, total):
    """The rest of a main schedule's arc (dict of main_lr's arguments) from its step `at`, in `total` steps."""
    return main_lr(at + (main['total'] - at) * min(step / total, 1), **main)


# --- processes and devices --------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Process:
    """One process of a run. CPU tensors travel by gloo, CUDA tensors by NCCL: host counts never wait for the GPU."""
    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype

    @property
    def master(self):
        return self.rank == 0

    def autocast(self):
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def host_sum(self, values):
        """Sum a list of numbers over processes on the host, exactly below 2**53; the GPU is not waited for."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def send(self, tensor):
        """A tensor in host memory on the device; the GPU is not waited for."""
        tensor = tensor.pin_memory() if self.device.type == 'cuda' else tensor
        return tensor.to(self.device, non_blocking=True)

    def print(self, *args):
        if self.master:
            tqdm.write(' '.join(str(a) for a in args), file=sys.stdout)
            sys.stdout.flush()

    def gather(self, items):
        """The lists of all processes, joined in rank order, on every process."""
        if self.world_size == 1:
            return list(items)
        lists = [None] * self.world_size
        dist.all_gather_object(lists, list(items))
        return [item for part in lists for item in part]

    def exit(self, message=0):
        """
        End this process. One of several skips the interpreter's own teardown after the exit handlers: a gloo thread
        that still holds a tensor would ask for the GIL there, and abort (pytorch issue 190489).
        """
        if self.world_size == 1:
            sys.exit(message)
        if isinstance(message, str):
            print(message, file=sys.stderr)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1 if isinstance(message, str) else message)

    def barrier(self):
        self.host_sum([0.0])

    def start_device(self):
        """Touch the GPU for the first time: after the loader has forked its workers."""
        if self.device.type == 'cuda':
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision('high')


def pick_device(device, allowed=('auto', 'cpu', 'cuda')):
    """The torch device that a config's `device` names; exits with one line when it is not there."""
    if device not in allowed:
        sys.exit(f"device={device!r}: expected one of {', '.join(allowed)}")
    os.environ.setdefault('PYTORCH_NVML_BASED_CUDA_CHECK', '1')        # is_available() would start CUDA before the fork
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    there = {'cuda': torch.cuda.is_available, 'mps': torch.backends.mps.is_available}.get(device, lambda: True)
    if not there():
        sys.exit(f"device={device!r}: torch sees no such GPU; give --device=cpu")
    return device


def setup_process(device='auto', dtype='', n_thread=0):
    """
    Join the processes that torchrun started (or be the only one) and pick device and dtype.
    dtype    'float32', 'bfloat16' or '' = bfloat16 on CUDA, float32 on CPU; weights stay float32, dtype is autocast's
    returns  Process
    """
    device = pick_device(device)
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    local = int(os.environ.get('LOCAL_RANK', 0))
    if dtype not in ('', 'float32', 'bfloat16'):
        sys.exit(f"dtype={dtype!r}: expected float32, bfloat16 or '' (bfloat16 on CUDA, float32 on CPU)")
    dtype = getattr(torch, dtype or ('bfloat16' if device == 'cuda' else 'float32'))
    if device == 'cpu':
        torch.set_num_threads(n_thread or max(1, (os.cpu_count() or 1) // int(os.environ.get('LOCAL_WORLD_SIZE', 1))))
    if world > 1:
        dist.init_process_group('cpu:gloo,cuda:nccl' if device == 'cuda' else 'gloo')
    return Process(rank, world, torch.device(device, local) if device == 'cuda' else torch.device('cpu'), dtype)


def distributed(model):
    """DistributedDataParallel that leaves the buffers (constants) alone; torch 2.13 renamed how to say so."""
    renamed = 'forward_sync_buffers' in inspect.signature(DistributedDataParallel.__init__).parameters
    return DistributedDataParallel(model, gradient_as_bucket_view=True,
                                   **{'forward_sync_buffers' if renamed else 'broadcast_buffers': False})


class StopSignal:
    """`.set` turns True on SIGTERM or Ctrl-C (torchrun may send both); the same a second time ends as usual."""
    def __init__(self):
        self.set = False
        self.usual = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}

    def _handle(self, number, frame):
        self.set = True
        signal.signal(number, self.usual[number])


def accumulation(global_batch_size, micro_batch_size, world_size):
    """Micro-steps per optimizer step; exits with one line that says which sizes would divide the batch."""
    n, rest = divmod(global_batch_size, micro_batch_size * world_size)
    if rest:
        fit = [m for m in range(1, global_batch_size + 1) if global_batch_size % m == 0]
        near = min((m for m in fit if m * world_size in fit), key=lambda m: abs(m - micro_batch_size), default=None)
        hint = near or f"1 with a number of processes among {fit[:8]}"
        sys.exit(f"global_batch_size={global_batch_size} is not a multiple of micro_batch_size={micro_batch_size} x "
                 f"{world_size} processes; --micro_batch_size={hint} would")
    return n


# --- the optimizer ----------------------------------------------------------------------------------------------------

def make_optimizer(model, lrs, *, weight_decay, betas):
    """
    AdamW over the parts of a VLM that train, decay on every parameter, gains and embeddings too (OpenLM's rule).
    lrs      dict part ('decoder', 'projector', 'encoder') -> its share of the scheduled lr
    returns  torch.optim.AdamW (fused), one group a part with 'share' and 'names'
    """
    groups = []
    for part, share in lrs.items():
        named = [(f'{part}.{n}', p) for n, p in getattr(model, part).named_parameters() if p.requires_grad]
        if named:
            groups.append(dict(params=[p for _, p in named], names=[n for n, _ in named], share=share))
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, weight_decay=weight_decay, fused=True)


def optimizer_step(optimizer, lr, clip):
    """
    Clip, then update, all on the device: a step whose gradient norm is not finite changes nothing.
    returns  (norm () float32 before clipping, bad () float32: 1 where the step was skipped)
    """
    params = [p for group in optimizer.param_groups for p in group['params'] if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(params, clip if clip > 0 else math.inf)
    bad = (~norm.isfinite()).float()
    for group in optimizer.param_groups:
        group['lr'] = lr * group['share']
    optimizer.grad_scale, optimizer.found_inf = None, bad      # the fused kernel's own skip: no host wait
    optimizer.step()
    return norm, bad


def drop_gradients(*modules):
    """Set gradients to None: what a step did not use is neither decayed nor moved by old moments."""
    for module in modules:
        for p in module.parameters():
            p.grad = None


# --- one step's bookkeeping -------------------------------------------------------------------------------------------

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
    returns  ((n_leaf,) float32, share of the loss per source (n_leaf,) float64); sources without a kept target weigh 0
    """
    weight = counts['weight']
    share = weight if rule == 'token' else counts['n_sample'] * (weight > 0)
    share = share / share.sum().clamp(min=1e-9)
    return (share / weight.clamp(min=1e-9)).float(), share


def text_name(pattern, patterns):
    """A text source's name, the key of its cursor: 'text' for 'text/*.tar'; the pattern where there are several."""
    folders = itertools.takewhile(lambda part: not glob.has_magic(part), pattern.split('/'))
    return '/'.join(folders) or pattern if len(patterns) == 1 else pattern


def text_rows(mixture):
    """How a mixture's text is cut, {source: {'row_len', 'n_row'}}: what a cursor counts, so that it holds later."""
    return {name: dict(row_len=shuffled.source.row_len, n_row=shuffled.n_row)
            for name, shuffled in mixture.sources.items() if isinstance(shuffled.source, TextSource)}


def add_counts(seen, counts, names):
    """Add a step's counts to the run's cumulative ones: {source: {COUNTS: int}}."""
    for i, name in enumerate(names):
        for key in COUNTS:
            seen[name][key] += round(float(counts[key][i]))


class StepReader:
    """
    Turns a step's device numbers into a log line one step late, so that the loop never waits for the GPU, and stops the
    run when a step was not finite (such a step has changed nothing: see optimizer_step).
    """
    def __init__(self, process, logger, names):
        self.process, self.logger, self.names = process, logger, names
        self.pending, self.time = None, time.perf_counter()

    def push(self, line, micro, row_loss, norm, skipped, counts, share, seen, flops_per_token):
        """Queue step `line['step']`; row_loss list of (2,B) device tensors, norm and skipped () device tensors."""
        row_loss = torch.cat(row_loss, 1)                                                # (2,R) this rank's rows
        source = self.process.send(torch.cat([batch.source for batch in micro]))         # (R,)
        finite = row_loss.isfinite().all(0)                                              # (R,)
        sums = row_loss.new_zeros(len(self.names) + 1 + self.process.world_size)
        sums[:len(self.names)].index_add_(0, source, row_loss[0])
        sums[len(self.names)] = row_loss[1].sum()
        sums[len(self.names) + 1 + self.process.rank] = (~finite).any()
        if self.process.world_size > 1:
            dist.all_reduce(sums)
        device = torch.cat([sums, norm.detach().float().reshape(1), skipped.reshape(1), finite.float()])
        if device.device.type == 'cuda':
            host, event = torch.empty(device.shape, pin_memory=True), torch.cuda.Event()
            host.copy_(device, non_blocking=True)
            event.record()
        else:
            host, event = device, None
        now, before = time.perf_counter(), self.time
        self.time = now
        rate = 1 / (now - before)
        tokens = float(sum(counts[k].sum() for k in ('n_text', 'n_image_position', 'n_pad')))
        mfu = model_flops_utilisation(flops_per_token * tokens * rate, device.device, self.process.world_size)
        line.update(n_kept=int(counts['n_kept'].sum()), tokens_per_s=tokens * rate, mfu=mfu)
        sources = {name: dict(seen[name], n_kept_now=int(counts['n_kept'][i]), share=float(share[i]))
                   for i, name in enumerate(self.names)}
        previous, self.pending = self.pending, (line, host, event, sources, [i for batch in micro for i in batch.ids])
        self._read(previous)

    def flush(self):
        """Read the step that is still pending."""
        previous, self.pending = self.pending, None
        self._read(previous)
        self.time = time.perf_counter()

    def _read(self, pending):
        if pending is None:
            return
        line, host, event, sources, ids = pending
        if event is not None:
            event.synchronize()
        n, world = len(self.names), self.process.world_size
        nll, z, flags, (norm, skipped), finite = host.split((n, 1, world, 2, len(host) - n - 3 - world))
        if skipped or flags.any():
            bad = [i for i, ok in zip(ids, finite) if not ok]
            ranks = flags.nonzero().flatten().tolist()
            named = ', '.join([*dict.fromkeys(bad or ids)][:8])            # a conversation may have several rows
            where = f"loss on ranks {ranks}" if ranks else f"gradient norm {float(norm)}"
            if not ranks or bad:
                print(f"step {line['step']}: not finite: {where}; rank {self.process.rank}, samples {named}; "
                      "the step changed nothing and the run stops", file=sys.stderr)
            self.process.barrier()                       # nobody leaves before the others have read what they were sent
            self.process.exit(1)
        for i, name in enumerate(self.names):
            sources[name]['loss'] = float(nll[i]) / sources[name]['n_kept_now'] if sources[name]['n_kept_now'] else None
        self.logger.log(dict(line, loss=float(nll.sum()) / max(1, line['n_kept']),
                             z_loss=float(z) / max(1, line['n_kept']), grad_norm=float(norm), sources=sources))


# --- dry runs ---------------------------------------------------------------------------------------------------------

def print_missing(config, out_dir, missing):
    """What a dry run can say without its inputs: the config and what is not there."""
    for key, value in config.items():
        print(f'  {key} = {value!r}')
    print('\n'.join(f"MISSING {path}" for path in missing))
    print(f"into {out_dir}; steps and cost are known when these are there")


def print_dry_run(config, model_config, *, out_dir, max_steps, tokens_per_step, shares, sets, inputs, n_checkpoint):
    """Say what a run would do and cost, from the config alone; missing files are named, nothing is written."""
    with torch.device('meta'):
        n = sum(p.numel() for p in Decoder(model_config).parameters())
    for key, value in config.items():
        print(f'  {key} = {value!r}')
    print(f"{max_steps:,} steps of {tokens_per_step:,} tokens = {max_steps * tokens_per_step:,} tokens, into {out_dir}")
    for kind, paths in sets.items():
        tokens = shares[kind] * max_steps * tokens_per_step
        if not tokens:
            continue
        print(f"{kind}: {tokens:,.0f} positions ({shares[kind]:.1%}) from {', '.join(paths) or 'nothing'}")
        for path in paths:
            try:
                files = find(path, '.bin', '.tar')
            except ValueError:
                files = []
            size = sum(os.path.getsize(f) for f in files)
            passes = f", {tokens / (size / 2):,.2f} passes" if size and all(f.endswith('.bin') for f in files) else ''
            print(f"    {path}: {len(files)} files, {size / 2 ** 30:.2f} GiB{passes}" if files else
                  f"    MISSING {path}")
    for path in inputs:
        print(f"{'found' if os.path.exists(path) or glob.glob(path) else 'MISSING'} {path}")
    micro = config['micro_batch_size'] * config['seq_len']
    width = 2 if config['dtype'] == 'bfloat16' or (not config['dtype'] and config['device'] != 'cpu') else 4
    # per position and layer: residual, norms, q, k, v, attention out, gate, up, product, as the backward needs them
    layer = (10 * model_config.n_embd + 4 * model_config.n_ffn) * width
    activations = micro * (model_config.n_layer * layer if not config['activation_checkpointing'] else
                           model_config.n_layer * model_config.n_embd * 4 + layer)
    print(f"decoder: {n:,} parameters; disk: {n_checkpoint} checkpoints of {4 * n / 2 ** 30:.1f} GiB, optimizer states "
          f"{8 * n / 2 ** 30:.1f} GiB each (keep_optimizer={config['keep_optimizer']!r})")
    print(f"memory per process, an estimate: weights, gradients, moments {16 * n / 2 ** 30:.1f} GiB + activations "
          f"{activations / 2 ** 30:.1f} GiB" + ", and the encoder (so400m/14: 1.6 GiB)" * (shares.get('text', 0) < 1))


# --- the log ----------------------------------------------------------------------------------------------------------

class Logger:
    """
    log.jsonl, and a progress bar on a terminal or plain lines elsewhere; on other ranks than 0 it does nothing.
    On resume, torn lines and lines beyond `step` are cut.
    """
    def __init__(self, process, out_dir, step, max_steps, *, every=10, wandb=False, tensorboard=False, config=None):
        self.on, self.every, self.start, self.time = process.master, every, step, time.time()
        self.max_steps, self.tracker, self.writer, self.bar, self.mark = max_steps, None, None, None, None
        if not self.on:
            return
        path = os.path.join(out_dir, 'log.jsonl')
        lines = []
        if step and os.path.exists(path):
            with open(path, encoding='utf-8', errors='replace') as f:
                lines = [line for line in f if line.endswith('\n') and _step_of(line) <= step]
        try:
            with open(path + '.tmp', 'w', encoding='utf-8') as f:
                f.writelines(lines)
            os.replace(path + '.tmp', path)
            self.file = open(path, 'a', encoding='utf-8', buffering=1)
        except OSError as e:
            sys.exit(f"{path}: cannot be written ({e}); nothing is lost")
        if sys.stderr.isatty():
            self.bar = tqdm(total=max_steps, initial=step, unit='step', dynamic_ncols=True)
        if wandb:
            import wandb as tracker                                        # optional: pip install wandb
            self.tracker = tracker.init(project='ckpt80', name=config['name'], config=config, dir=out_dir)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter             # optional: pip install tensorboard
            self.writer = SummaryWriter(out_dir)

    def log(self, line):
        """Append one dict with a 'step'; show it."""
        if not self.on:
            return
        try:
            self.file.write(json.dumps(line) + '\n')
        except OSError as e:
            sys.exit(f"{self.file.name}: cannot be written ({e}) at step {line['step']}; the checkpoints are untouched")
        numbers = {k: v for k, v in line.items() if isinstance(v, (int, float)) and k != 'step'}
        if self.tracker is not None:
            self.tracker.log(numbers, step=line['step'])
        if self.writer is not None:
            for key, value in numbers.items():
                self.writer.add_scalar(key, value, line['step'])
        if 'loss' not in line:
            text = ', '.join(f'{k} {v:.4f}' for k, v in numbers.items())
            tqdm.write(f"step {line['step']}: {text}", file=sys.stdout)
        elif self.bar is not None:
            self.bar.update(line['step'] - self.bar.n)
            self.bar.set_postfix(loss=f"{line['loss']:.3f}", lr=f"{line['lr']:.1e}")
        elif line['step'] % self.every == 0 or line['step'] in (self.start + 1, self.max_steps):
            now, tokens, rate = time.time(), line['tokens'], line['tokens_per_s']
            if self.mark:                                                  # the rate since the line before
                rate = (tokens - self.mark[1]) / (now - self.mark[0])
            self.mark = now, tokens
            eta = (now - self.time) / (line['step'] - self.start) * (self.max_steps - line['step'])
            print(f"step {line['step']}/{self.max_steps}  loss {line['loss']:.4f}  lr {line['lr']:.2e}  norm "
                  f"{line['grad_norm']:.2f}  {rate:.0f} tok/s  eta {eta:.0f} s", flush=True)

    def close(self):
        if self.on:
            self.file.close()
            if self.bar is not None:
                self.bar.close()
            if self.writer is not None:
                self.writer.close()
            if self.tracker is not None:
                self.tracker.finish()


def _step_of(line):
    try:
        return int(json.loads(line)['step'])
    except (ValueError, KeyError, TypeError):
        return math.inf                                                    # a torn line: cut


def memory_gib(device):
    """Peak memory of this process in GiB: the GPU's allocator, or resident memory on CPU."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform != 'darwin' else 30)


def model_flops_utilisation(flops_per_s, device, world_size):
    """Share of the GPUs' bf16 peak, or None for a device whose peak is not in PEAK_FLOPS."""
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else ''
    peak = next((v for k, v in PEAK_FLOPS.items() if k in name), None)
    return flops_per_s / (peak * world_size) if peak else None
