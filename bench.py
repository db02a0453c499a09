"""
Numbers with their conditions, on whatever device is there.

    python bench.py step config/tiny.py                  # tokens/s of stage 1 and where a step's time goes
    python bench.py step config/ckpt80_img10.py config/tiny.py --init_from=x      # the same with images
    python bench.py kernels                              # our kernels against eager, torch.compile, SDPA, FlexAttention
    python bench.py tune                                 # search the kernels' config tables on this GPU, print them

step takes pretrain.py's keys. Its batches are synthetic in pretrain.py's layout, so it needs no data: the loader's own cost
is in every log.jsonl as data_wait_s. kernels and tune need an NVIDIA GPU and say so without one.
"""
import os
import platform
import statistics
import subprocess
import sys
import time

import torch

import common
from configurator import configure
from model import VLM, Decoder, ModelConfig, Projector
from vision import SigLIP, SigLIPConfig, load_encoder


def conditions(device):
    """One line: device, versions, commit, date."""
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.processor() or platform.machine()
    try:
        import triton
        version = triton.__version__
    except ImportError:
        version = 'absent'
    return (f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, triton {version}, python "
            f"{platform.python_version()}, commit {common.git_commit()[:12]}, {time.strftime('%Y-%m-%d')}")


class Phases:
    """Wall time of named phases, the GPU waited for at each boundary."""
    def __init__(self, device):
        self.device, self.times = device, {}
        self.last = self._now()

    def _now(self):
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def mark(self, name):
        now = self._now()
        self.times.setdefault(name, []).append(now - self.last)
        self.last = now


def synthetic_batch(c, encoder, image_id, device):
    """A micro-batch in pretrain.py's layout: text rows, and image_ratio caption rows of 40 tokens, the rest pads."""
    B, T = c['micro_batch_size'], c['seq_len']
    generator = torch.Generator().manual_seed(c['seed'])
    ids = torch.randint(0, image_id, (B, T + 1), generator=generator)
    tokens, targets = ids[:, :-1].clone(), ids[:, 1:].clone()
    n_image = round(B * c['image_ratio'])
    images = None
    if n_image:
        n, size = encoder.n_token, encoder.image_size
        tokens[:n_image, :n] = image_id
        targets[:n_image, :n] = targets[:n_image, n + 41:] = -100
        images = torch.randint(0, 256, (n_image, 3, size, size), generator=generator, dtype=torch.uint8).to(device)
    rows = (targets.flatten() != -100).nonzero().squeeze(1)
    return tokens.to(device), targets.to(device), images, rows.to(device)


def step(argv):
    """Time one optimizer step's phases for a recipe; prints a table and the share of Python in the step."""
    c = configure({'__file__': os.path.join(os.path.dirname(os.path.abspath(__file__)), 'pretrain.py')}, argv)
    process = common.setup_process(c['device'], c['dtype'], c['n_thread'])
    process.start_device()
    device = process.device
    encoder = None
    if c['image_ratio'] > 0 or c['init_from']:
        path = c['encoder_path'] if c['encoder_path'] == 'patch' else os.path.join(c['data_dir'], c['encoder_path'])
        if path == 'patch' or os.path.exists(path):
            encoder = load_encoder(path, c['encoder_layer'], c['encoder_norm'], c['image_size'])
        else:
            print(f"{path} not found: SigLIP so400m/14 at 384 px with random weights instead")
            encoder = SigLIP(SigLIPConfig(), c['encoder_layer'], c['encoder_norm'])
        encoder.requires_grad_(c['train_encoder'])
    config = ModelConfig(c['n_layer'], c['n_head'], c['n_embd'], c['vocab_size'], c['seq_len'], c['n_ffn'])
    projector = None if encoder is None else Projector(encoder.width, c['n_embd'])
    image_id = c['vocab_size'] - 1
    model = VLM(Decoder(config), encoder, projector, image_id=image_id, z_loss=c['z_loss']).to(device)
    model.decoder.activation_checkpointing = c['activation_checkpointing']
    if c['compile']:
        for block in model.decoder.layers:
            block.compile(dynamic=None)
    shares = {'decoder': 1.0} if encoder is None else {'decoder': 1.0, 'projector': 1.0, 'encoder': 1.0}
    optimizer = common.make_optimizer(model, shares, weight_decay=c['weight_decay'], betas=(c['beta1'], c['beta2']))
    tokens, targets, images, rows = synthetic_batch(c, encoder, image_id, device)

    def one(phases):
        optimizer.zero_grad(set_to_none=True)
        with process.autocast():
            if images is not None:
                with torch.no_grad():
                    encoder(images)                                # once more, only to time it
                phases.mark('encoder')
            loss, weight = model(tokens, targets, images, rows=rows)
        phases.mark('forward')
        (loss / weight).backward()
        phases.mark('backward')
        common.optimizer_step(optimizer, c['lr'], c['grad_clip'])
        phases.mark('optimizer')

    for _ in range(3):
        one(Phases(device))
    phases = Phases(device)
    for _ in range(20):
        one(phases)
    median = {name: statistics.median(times) for name, times in phases.times.items()}
    if 'encoder' in median:
        median['forward'] -= median['encoder']
    total = sum(median.values())
    n = tokens.numel()
    mfu = common.model_flops_utilisation(config.flops_per_token(c['seq_len']) * n / total, device, 1)
    print(conditions(device))
    print(f"{n} positions, {len(rows)} with loss, {0 if images is None else len(images)} images, one process, one micro-step")
    for name, seconds in median.items():
        print(f"  {name:<10} {seconds * 1e3:9.2f} ms  {seconds / total:6.1%}")
    print(f"  {'sum':<10} {total * 1e3:9.2f} ms          {n / total:,.0f} tokens/s" + (f", MFU {mfu:.1%}" if mfu else ''))
    if device.type == 'cpu':
        from torch.profiler import ProfilerActivity, profile
        with profile(activities=[ProfilerActivity.CPU]) as p:
            begin = time.perf_counter()
            for _ in range(5):
                one(phases)
            wall = time.perf_counter() - begin
        inside = sum(e.self_cpu_time_total for e in p.key_averages() if '::' in e.key and 'autograd' not in e.key) / 1e6
        print(f"  outside torch's operators (Python, autograd, the profiler itself): {1 - inside / wall:.1%} of the step")


COMMANDS = {'step': step}

if __name__ == '__main__':
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(__doc__.strip() + f"\n\nexpected one of: {', '.join(COMMANDS)}")
    COMMANDS[sys.argv[1]](sys.argv[2:])
