"""
What only a GPU can show: our kernels against PyTorch's, the search of their config tables, and all of it as one page.
bench.py's commands kernels, tune, curve and gpu are functions here.
"""
import ast
import contextlib
import functools
import os
import platform
import subprocess
import sys
import tempfile
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import checkpoint
import common
import costs
import fused
import kernels
import policy
from errors import UserError
from model import build_vlm

HERE = os.path.dirname(os.path.abspath(__file__))


def options(argv, **defaults):
    """The --key=value of argv whose keys are in defaults, of their types, as a dict; and the rest of argv."""
    rest, found = [], dict(defaults)
    for arg in argv:
        key, _, text = arg.removeprefix('--').partition('=')
        if not arg.startswith('--') or key not in defaults:
            rest.append(arg)
            continue
        try:
            value = text if isinstance(defaults[key], str) else ast.literal_eval(text.capitalize())
            found[key] = type(defaults[key])(value)
        except (ValueError, TypeError, SyntaxError) as e:
            raise UserError(f"{arg}: expected a value such as {defaults[key]!r}") from e
    return found, rest


def conditions(device):
    """One line: device, versions, commit, date."""
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.processor() or platform.machine()
    version = policy.triton.__version__ if policy.triton else 'absent'
    return (f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, triton {version}, python "
            f"{platform.python_version()}, commit {checkpoint.git_commit()[:12]}, {time.strftime('%Y-%m-%d')}")


# --- kernels ----------------------------------------------------------------------------------------------------------

# the kept shares of caption rows, the main recipe (10 % images) and plain text; larger micro-batches, the 79M recipe's
LOSS_CASES = [*(dict(N=8192, C=2048, V=50432, share=share) for share in (0.29, 0.91, 1.0)),
              dict(N=16384, C=2048, V=50432, share=1.0), dict(N=65536, C=512, V=50432, share=1.0)]
# plain causal, the image prefix of a caption row, documents in a text row
ATTENTION_CASES = [dict(B=8, H=16, D=128, T=T, mask=mask)
                   for T, mask in ((2048, 'causal'), (1024, 'prefix'), (2048, 'documents'))]

FUSED_CASES = [*(dict(op='qk-norm', B=4, T=2048, C=C, D=128) for C in (1024, 2048, 4096)),
               dict(op='add-norm', B=4, T=2048, C=2048), dict(op='swiglu', B=4, T=2048, C=5632)]


def loss_candidates(case, device, dtype):
    """Inputs and implementations of one loss case: (leaves, {name: f(leaves) -> summed nats}, useful FLOPs)."""
    generator = torch.Generator(device).manual_seed(0)
    N, C, V = case['N'], case['C'], case['V']
    x = torch.randn(N, C, generator=generator, device=device, dtype=dtype).requires_grad_()
    w = (torch.randn(V, C, generator=generator, device=device) * C ** -0.5).requires_grad_()         # float32 master
    targets = torch.randint(0, V, (N,), generator=generator, device=device)
    targets[torch.rand(N, generator=generator, device=device) >= case['share']] = kernels.IGNORE_INDEX
    rows = (targets != kernels.IGNORE_INDEX).nonzero().squeeze(1)

    def eager(x, w):
        return F.cross_entropy((x @ w.to(x.dtype).T).float(), targets, reduction='sum')

    @torch.compile
    def compact(x, w):
        return F.cross_entropy((x[rows] @ w.to(x.dtype).T).float(), targets[rows], reduction='sum')

    def ours(impl):
        return lambda x, w: kernels.linear_cross_entropy(x, w, targets, rows=rows, impl=impl)[0].sum()
    names = {'eager': eager, 'compact + torch.compile': compact}
    names.update({f"ours, impl='{impl}'": ours(impl) for impl in ('torch', 'triton', 'triton-keep', 'auto')})
    names.update({name: lambda x, w, f=f: f(x, w.to(x.dtype), targets) for name, f in rivals().items()})
    return (x, w), names, 6 * len(rows) * C * V


def rivals():
    """What a user might take for the loss instead, if it is installed: {name: f(x, weight, targets) -> summed nats}."""
    found = {}
    if hasattr(F, 'linear_cross_entropy'):                                   # torch 2.13
        found['F.linear_cross_entropy'] = functools.partial(F.linear_cross_entropy, reduction='sum')
    with contextlib.suppress(ImportError):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
        found['liger-kernel'] = functools.partial(liger_fused_linear_cross_entropy, reduction='sum')
    with contextlib.suppress(ImportError):
        from cut_cross_entropy import linear_cross_entropy
        # without its filter of small gradients, which at the start of training are nearly all
        found['cut-cross-entropy'] = functools.partial(linear_cross_entropy, reduction='sum', filter_eps=None)
    return found


def attention_candidates(case, device, dtype):
    """Inputs and implementations of one attention case: (leaves, {name: f(leaves) -> o}, useful FLOPs)."""
    generator = torch.Generator(device).manual_seed(0)
    B, H, D, T = case['B'], case['H'], case['D'], case['T']
    q, k, v = (torch.randn(B, H, T, D, generator=generator, device=device, dtype=dtype).requires_grad_()
               for _ in range(3))
    n_prefix = T * 729 // 1024
    if case['mask'] == 'causal':
        mask = kernels.Intervals.causal(B, T, device)
    elif case['mask'] == 'prefix':
        mask = kernels.Intervals.prefix(torch.full((B,), n_prefix), T, device)
    else:
        segment = torch.rand(B, T, generator=generator, device=device).lt(4 / T).cumsum(1)  # about five documents a row
        mask = kernels.Intervals.documents(segment)
    key = torch.arange(T, device=device)
    seen = (key >= mask.lo[..., None]) & (key < mask.hi[..., None])                       # (B,T,T)
    names = {f"ours, impl='{impl}'": lambda q, k, v, impl=impl: kernels.attention(q, k, v, mask, impl=impl)
             for impl in ('triton', 'auto')}
    names['SDPA, boolean mask'] = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, seen[:, None])
    if case['mask'] == 'causal':
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            names[f'SDPA, {backend.name.lower()}'] = functools.partial(sdpa_with, backend)
    if case['mask'] == 'documents' and kernels.HAS_VARLEN:
        names['varlen_attn'] = lambda q, k, v: kernels.attention(q, k, v, mask, impl='torch-varlen')
    if case['mask'] == 'prefix':
        names['SDPA in two calls'] = lambda q, k, v: kernels.attention(q, k, v, mask, impl='torch-split')
    if device.type == 'cuda':
        lo, hi = mask.lo, mask.hi
        block_mask = create_block_mask(lambda b, h, i, j: (j >= lo[b, i]) & (j < hi[b, i]), B, None, T, T,
                                       device=device)
        flex = torch.compile(flex_attention)
        names['FlexAttention'] = lambda q, k, v: flex(q, k, v, block_mask=block_mask)
    return (q, k, v), names, 4 * H * D * int(seen.sum()) * 3.5


def fused_candidates(case, device, dtype):
    """Inputs and implementations of one case of fused.py: (leaves, {name: f(leaves)}, bytes that must move)."""
    generator = torch.Generator(device).manual_seed(0)
    B, T, C = case['B'], case['T'], case['C']
    rand = lambda *shape: torch.randn(*shape, generator=generator, device=device)            # noqa: E731
    gain = torch.ones(C, device=device)                                                      # a float32 master
    if case['op'] == 'qk-norm':
        angle = rand(T, case['D'] // 2).repeat(1, 2)
        leaves, n_unit = [rand(B, T, 3 * C).to(dtype), gain, gain.clone()], 14
        op = lambda *x, impl: fused.qk_norm_rotary(                                          # noqa: E731
            *x, angle.cos(), angle.sin(), C // case['D'], 1e-5, impl=impl)
    elif case['op'] == 'add-norm':
        leaves, n_unit = [rand(B, T, C), rand(B, T, C).to(dtype), gain], 14                  # a float32 stream
        op = lambda *x, impl: fused.add_norm(*x, 1e-5, impl=impl)                            # noqa: E731
    else:
        leaves, n_unit, op = [rand(B, T, 2 * C).to(dtype)], 8, fused.swiglu

    def run(*leaves, impl='torch'):
        with torch.autocast(device.type, dtype, enabled=any(x.dtype == dtype for x in leaves)):
            return op(*leaves, impl=impl)
    names = {'eager': run, 'torch.compile': torch.compile(run),
             "ours, impl='triton'": functools.partial(run, impl='triton')}
    return [x.requires_grad_() for x in leaves], names, n_unit * B * T * C * dtype.itemsize


def sdpa_with(backend, q, k, v):
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@functools.cache
def output_gradient(shape, dtype, device):
    """Random numbers, the same for every implementation, drawn outside of what is timed."""
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(1), device=device).to(dtype)


def gradients(f, leaves, dtype=None):
    """The outputs and the leaves' gradients of f at random output gradients, float32 or in another dtype throughout."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in leaves]
    out = f(*leaves)
    outs = (out,) if isinstance(out, torch.Tensor) else out
    grads = [output_gradient(y.shape, y.dtype, y.device) for y in outs]
    return [*(y.detach() for y in outs), *torch.autograd.grad(outs, leaves, grads)]


def compare(title, leaves, names, flops, truth, peak):
    """Time forward and backward of each implementation, its memory and its error against `truth`; print a table."""
    print(f"\n{title}\n{'':<28} {'fwd ms':>8} {'fwd+bwd':>8} {'TFLOP/s':>8} {'of peak':>8} {'GiB':>7} {'error':>8}")
    for name, f in names.items():
        try:
            error = max(float((a.float() - b.float()).norm() / b.float().norm())
                        for a, b in zip(gradients(f, leaves), truth))
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            gradients(f, leaves)
            extra = (torch.cuda.max_memory_allocated() - held) / 2 ** 30
            forward, both = timed(lambda: f(*leaves)), timed(lambda: gradients(f, leaves))
            rate = flops / both / 1e9
            share = rate * 1e12 / peak
            print(f'{name:<28} {forward:8.3f} {both:8.3f} {rate:8.1f} {share:8.1%} {extra:7.2f} {error:8.1e}')
        except Exception as e:                                  # no such backend here, no memory, no compiler, ...
            print(f'{name:<28} not run: {type(e).__name__} {str(e).splitlines()[0][:80] if str(e) else ""}')


def timed(f):
    """Median milliseconds of a call on the GPU."""
    from triton.testing import do_bench
    return do_bench(f, return_mode='median')


def bench_kernels(argv):
    """Our kernels against PyTorch's, in one run, each checked against float32 eager before it is timed."""
    if not torch.cuda.is_available():
        print('bench.py kernels: torch sees no GPU here, so there is nothing to time (the tests check the arithmetic)')
        return
    device = torch.device('cuda')
    print(conditions(device))
    name = torch.cuda.get_device_name(device)
    peak = next((v for k, v in costs.PEAK_FLOPS.items() if k in name), float('nan'))
    for case in LOSS_CASES:
        leaves, names, flops = loss_candidates(case, device, torch.bfloat16)
        truth = gradients(names["ours, impl='torch'"], leaves, torch.float32)     # in chunks: eager's would not fit
        compare(f"masked loss, {case}", leaves, names, flops, truth, peak)
    for case in ATTENTION_CASES:
        leaves, names, flops = attention_candidates(case, device, torch.bfloat16)
        truth = gradients(names['SDPA, boolean mask'], leaves, torch.float32)
        compare(f"attention, {case}", leaves, names, flops, truth, peak)
    for case in FUSED_CASES:
        leaves, names, n_byte = fused_candidates(case, device, torch.bfloat16)
        truth = gradients(names['eager'], leaves, torch.float32)
        compare(f"{case}; TB/s of what must move, not TFLOP/s", leaves, names, n_byte, truth, float('nan'))


TILES = [(m, v, c, g, w, s) for m, v, w in ((64, 128, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8))
         for c in (32, 64) for g in (4, 8, 16) for s in (3, 4)]
TUNE = {                                        # block sizes, num_warps, num_stages to try for each kernel
    'forward': [(m, n, w, s) for m in (64, 128) for n in (32, 64, 128) for w in (4, 8) for s in (2, 3)],
    'dkdv': [(m, n, w, s) for m in (32, 64) for n in (32, 64, 128) for w in (4, 8) for s in (1, 2)],
    'dq': [(m, n, w, s) for m in (64, 128) for n in (32, 64) for w in (4, 8) for s in (1, 2)],
    'lse': TILES, 'dz': TILES,
    'kept_lse': [(v, w, 1) for v in (1024, 2048, 4096, 8192) for w in (4, 8)],
    'kept_dz': [(v, w, 1) for v in (1024, 2048, 4096, 8192) for w in (4, 8)],
    'qk_forward': [(w, 1) for w in (2, 4, 8)],
    'qk_backward': [(w, 1) for w in (2, 4, 8, 16)],
    'add_norm': [(w, 1) for w in (4, 8, 16)], 'add_norm_backward': [(w, 1) for w in (4, 8, 16)],
    'swiglu': [(b, w, 1) for b in (512, 1024, 2048) for w in (4, 8)],
    'swiglu_backward': [(b, w, 1) for b in (512, 1024, 2048) for w in (4, 8)],
}


def tune(argv):
    """Try TUNE's configs on this GPU, a kernel at a time, and print the entries of policy.CONFIG that were fastest."""
    if not torch.cuda.is_available():
        print('bench.py tune: torch sees no GPU here, so there is nothing to tune')
        return
    device = torch.device('cuda')
    obstacle = policy._why_not('loss', device, torch.bfloat16, 64)
    if obstacle:
        print(f"bench.py tune: {obstacle}, so there is nothing to tune")
        return
    arch = policy._arch(device)
    print(conditions(device))
    for kernel, candidates in TUNE.items():
        for width in sorted(w for k, a, w in policy.CONFIG if (k, a) == (kernel, arch)):
            op = dict(qk='qk-norm', add='add-norm', swiglu='swiglu').get(kernel.split('_')[0])
            if op:
                case = dict(op=op, B=4, T=2048, C=5632 if op == 'swiglu' else 2048, D=width)
                leaves, names, _ = fused_candidates(case, device, torch.bfloat16)
                f = names["ours, impl='triton'"]
            elif width:
                case = dict(B=8, H=2048 // width, D=width, T=2048, mask='documents')
                leaves, names, _ = attention_candidates(case, device, torch.bfloat16)
                f = names["ours, impl='triton'"]
            else:
                case = dict(N=8192, C=2048, V=50432, share=1.0)
                leaves, names, _ = loss_candidates(case, device, torch.bfloat16)
                f = names[f"ours, impl='triton{'-keep' if kernel.startswith('kept') else ''}'"]
            best = fastest((kernel, arch, width), candidates, lambda: gradients(f, leaves))
            print(f'    {(kernel, arch, width)}: {best},', flush=True)


def fastest(key, candidates, f):
    """The config of policy.CONFIG[key] with which f runs fastest; those that do not compile or fit are passed over."""
    before, times = policy.CONFIG[key], {}
    for config in (before, *candidates):
        policy.CONFIG[key] = config
        try:
            times[config] = timed(f)
        except Exception as e:                                  # too large for this GPU, not compiled, ...
            failure = e
    policy.CONFIG[key] = before
    if not times:
        sys.exit(f"bench.py tune: no config of {key} runs here: {type(failure).__name__} {failure}")
    return min(times, key=times.get)


# --- everything a GPU can show ----------------------------------------------------------------------------------------

def curve(argv, n_step=200, spec=None, n_row=8):
    """Losses of the same run with our kernels wherever they can run and with plain PyTorch, and how far they part."""
    process = common.setup_process()
    process.start_device()
    spec = spec or dict(decoder=dict(n_layer=8, n_head=4, n_embd=512, vocab_size=50432, seq_len=1024), encoder=None,
                        projector=None, image_id=None)
    T, before, losses = spec['decoder']['seq_len'], dict(policy.POLICY), {}
    for impl in ('triton', 'torch'):
        chosen = {key: 'triton-keep' if impl == 'triton' and key == 'loss, logits fit' else impl for key in before}
        policy.POLICY.update({key: ({8: chosen[key], 9: chosen[key]}, 'bench.py curve') for key in before})
        model = build_vlm(spec, 0).to(process.device)
        optimizer = common.make_optimizer(model, {'decoder': 1.0}, weight_decay=0.01, betas=(0.9, 0.95))
        generator = torch.Generator().manual_seed(0)
        losses[impl] = []
        for i in range(n_step):
            skewed = torch.rand(n_row, T + 1, generator=generator) ** 4      # small ids are frequent
            ids = (skewed * spec['decoder']['vocab_size']).long().to(process.device)
            optimizer.zero_grad(set_to_none=True)
            with process.autocast():
                loss, weight, _ = model(ids[:, :-1], ids[:, 1:].contiguous())
            (loss / weight).backward()
            common.optimizer_step(optimizer, 3e-3 * min(1, (i + 1) / 20), 1.0)
            losses[impl].append((loss / weight).detach())
        losses[impl] = torch.stack(losses[impl]).tolist()
    policy.POLICY.update(before)
    print(conditions(process.device))
    for i in sorted({0, n_step - 1, *range(9, n_step, 10)}):
        print(f"  step {i + 1:>4}  ours {losses['triton'][i]:.4f}  PyTorch {losses['torch'][i]:.4f}")
    apart = max(abs(a - b) for a, b in zip(*losses.values()))
    print(f"  largest difference of a step's loss: {apart:.4f} nats")


RECIPE = ['step', 'config/ckpt80_img10.py', '--data_dir=/nowhere', '--micro_batch_size=8']       # one row with an image
GPU_PARTS = [                    # name, seconds at most, command: the dearest knowledge first, tune with what is left
    ('1.4B step', 60, RECIPE), ('1.4B step, compiled', 90, [*RECIPE, '--compile=true']),
    ('1.4B step, recomputed', 45, [*RECIPE, '--activation_checkpointing=true']),
    ('kernels', 150, ['kernels']), ('loss curves', 90, ['curve']),
    ('kernel tests', 150, ['-m', 'pytest', '-q', *(f'tests/test_{name}.py' for name in ('kernels', 'loss', 'fused'))]),
    ('tune', 540, ['tune'])]


def run_parts(parts, out, seconds, title):
    """
    Run bench.py's commands (or, after '-m', modules) as processes, each within its own limit and the `seconds` of all;
    after each, out/page.md holds what there is.
    """
    os.makedirs(out, exist_ok=True)
    path, page, begin = os.path.join(out, 'page.md'), f"# {title}\n", time.monotonic()
    for name, limit, command in parts:
        limit = max(0, min(limit, seconds - (time.monotonic() - begin)))
        command = command if command[0] == '-m' else [os.path.join(HERE, 'bench.py'), *command]
        note, start = '', time.monotonic()
        with tempfile.TemporaryFile('w+', encoding='utf-8', errors='replace') as f:
            try:
                subprocess.run([sys.executable, '-u', *command], cwd=HERE, stdout=f, stderr=subprocess.STDOUT,
                               timeout=limit, check=True)
            except subprocess.SubprocessError as e:
                note = f', stopped after {limit:.0f} s' if isinstance(e, subprocess.TimeoutExpired) else ', failed'
            f.seek(0)
            text = f.read()[-20_000:].strip()
        page += f"\n## {name} ({time.monotonic() - start:.0f} s{note})\n\n```\n{text}\n```\n"
        with open(path + '.tmp', 'w', encoding='utf-8') as f:
            f.write(page)
        os.replace(path + '.tmp', path)
    print(page)


def gpu(argv):
    """One Markdown page of everything that an A100, H100 or H200 can show, in under nine minutes, part by part."""
    own, argv = options(argv, out='', seconds=520)
    if argv or not own['out']:
        raise UserError(f"bench.py gpu {' '.join(argv)}: expected --out=DIR, and perhaps --seconds=520")
    if not torch.cuda.is_available():
        print('bench.py gpu: torch sees no GPU here, so there is nothing to show')
        return
    run_parts(GPU_PARTS, own['out'], own['seconds'], conditions(torch.device('cuda')))
