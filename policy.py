"""
Which implementation of an operation runs, with which block sizes, and what its Triton kernels need around them.

`impl='auto'` picks by the tables below and prints one line per situation on a GPU. CKPT80_KERNELS=off runs the
references everywhere; CKPT80_KERNELS=debug checks targets on the GPU, too. Importing needs neither triton nor a GPU.
The operations: kernels.py (attention), loss.py, fused.py.
"""
import contextlib
import functools
import os

import torch

try:
    import triton
except ImportError:                                       # the references need torch only
    triton = None

# large CPU tensors in pages of 2 MiB, where the system gives them on request: their first touch is 3 times faster
os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')

SWITCH = os.environ.get('CKPT80_KERNELS', '')             # '', 'off' or 'debug'
INTERPRET = os.environ.get('TRITON_INTERPRET') == '1'     # tests: the kernels run on the CPU, in Triton's interpreter
if triton is not None and not INTERPRET:
    os.environ.setdefault('TRITON_DEFAULT_FP_FUSION', '1')                   # triton 3.10 changes the default


# === which implementation runs ==============================================================================
#
# All measured knowledge sits in these two tables; `bench.py kernels` on a GPU says what to change.
# No kernel has run on a GPU yet: 'torch' stands wherever published numbers say that PyTorch's own kernel
# wins, a Triton kernel only where PyTorch has nothing but a mask or float32 logits in memory.

POLICY = {
    # situation: {major compute capability: implementation}, why
    'attention, no mask': ({8: 'torch', 9: 'torch'}, 'SDPA has its own kernel for it'),
    'attention, causal': ({8: 'torch', 9: 'torch'},
                          'flash/cuDNN SDPA: published 198 against 173 TFLOP/s (A100), 518 against 353 (H100)'),
    'attention, one prefix': ({8: 'torch-split', 9: 'torch-split'}, 'two dense SDPA calls, exact'),
    'attention, documents': ({8: 'torch-varlen', 9: 'torch-varlen'}, 'without prefixes torch has its own kernel'),
    'attention, intervals': ({8: 'triton', 9: 'triton'}, 'SDPA would read a mask of T x T and skip no tile'),
    'attention, cache': ({8: 'torch', 9: 'torch'}, 'generation has no backward and short queries'),
    'loss, logits fit': ({8: 'triton-keep', 9: 'triton-keep'}, '3 cuBLAS products, 16-bit logits, one pass over them'),
    'loss, logits too large': ({8: 'triton', 9: 'triton'}, '4 products, logits never in memory'),
    'loss, no gradient': ({8: 'triton', 9: 'triton'}, '1 product, float32 logits: 16 bits cost 1e-2 nats a token'),
    'qk-norm, rotary': ({8: 'torch', 9: 'torch'}, 'triton moves a seventh of the bytes, but is not measured'),
    'swiglu, packed': ({8: 'torch', 9: 'torch'}, 'triton moves 4 of 9 bytes, but is not measured'),
    'add-norm, residual': ({8: 'torch', 9: 'torch'}, 'triton moves half of the bytes, but is not measured'),
}
NO_TABLE = 'POLICY has no entry for this GPU'

# (kernel, architecture, head dim or 0 for any): block sizes in the order of BLOCKS, num_warps, num_stages. All compiled
# for both architectures by tests/test_kernels_aot.py: none spills, all fit in shared memory; speeds are not measured.
# sm_80's entries also serve sm_86 and sm_89 (they need under 99 KiB).
BLOCKS = {
    'forward': ('BLOCK_M', 'BLOCK_N'),
    'dkdv': ('BLOCK_M', 'BLOCK_N'),
    'dq': ('BLOCK_M', 'BLOCK_N'),
    'delta': ('BLOCK_M',),
    'lse': ('BLOCK_M', 'BLOCK_V', 'BLOCK_C', 'GROUP'),
    'dz': ('BLOCK_M', 'BLOCK_V', 'BLOCK_C', 'GROUP'),
    'kept_lse': ('BLOCK_V',),
    'kept_dz': ('BLOCK_V',),
    'qk_forward': (), 'qk_backward': (), 'add_norm': (), 'add_norm_backward': (),
    'swiglu': ('BLOCK',), 'swiglu_backward': ('BLOCK',),
}
CONFIG = {
    ('forward', 80, 64): (128, 64, 4, 2), ('forward', 80, 128): (128, 64, 8, 2),
    ('dkdv', 80, 64): (32, 128, 8, 2), ('dkdv', 80, 128): (32, 64, 4, 2),
    ('dq', 80, 64): (64, 64, 4, 2), ('dq', 80, 128): (64, 64, 4, 2),
    ('delta', 80, 64): (64, 4, 1), ('delta', 80, 128): (64, 4, 1),
    ('lse', 80, 0): (128, 128, 32, 8, 4, 4), ('dz', 80, 0): (128, 128, 32, 8, 4, 4),
    ('kept_lse', 80, 0): (4096, 8, 1), ('kept_dz', 80, 0): (2048, 8, 1),
    ('qk_forward', 80, 64): (4, 1), ('qk_forward', 80, 128): (4, 1),
    ('qk_backward', 80, 64): (8, 1), ('qk_backward', 80, 128): (8, 1),
    ('swiglu', 80, 0): (1024, 4, 1), ('swiglu_backward', 80, 0): (1024, 4, 1),
    ('add_norm', 80, 0): (8, 1), ('add_norm_backward', 80, 0): (8, 1),
    ('forward', 90, 64): (128, 128, 8, 2), ('forward', 90, 128): (128, 128, 8, 2),
    ('dkdv', 90, 64): (64, 128, 8, 2), ('dkdv', 90, 128): (64, 64, 8, 2),
    ('dq', 90, 64): (128, 64, 8, 2), ('dq', 90, 128): (128, 64, 8, 2),
    ('delta', 90, 64): (64, 4, 1), ('delta', 90, 128): (64, 4, 1),
    ('lse', 90, 0): (128, 256, 64, 8, 8, 3), ('dz', 90, 0): (128, 128, 64, 8, 8, 3),
    ('kept_lse', 90, 0): (4096, 8, 1), ('kept_dz', 90, 0): (2048, 8, 1),
    ('qk_forward', 90, 64): (4, 1), ('qk_forward', 90, 128): (4, 1),
    ('qk_backward', 90, 64): (8, 1), ('qk_backward', 90, 128): (8, 1),
    ('swiglu', 90, 0): (1024, 4, 1), ('swiglu_backward', 90, 0): (1024, 4, 1),
    ('add_norm', 90, 0): (8, 1), ('add_norm_backward', 90, 0): (8, 1),
}


def _arch(device):
    """The architecture whose configs run on a device: 80, 90 or None. The interpreter uses 80's."""
    if device.type != 'cuda':
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 80 if major == 8 else 90 if (major, minor) == (9, 0) else None


def _config(kernel, device, width=0):
    """Block sizes and launch options of one kernel as keyword arguments."""
    *blocks, warps, stages = CONFIG[kernel, _arch(device), width]
    return dict(zip(BLOCKS[kernel], blocks), num_warps=warps, num_stages=stages)


def _why_not(op, device, dtype, width):
    """Why the Triton kernels cannot run here, '' if they can. width: head dim, or features of the other operations."""
    if triton is None:
        return 'triton is not installed'
    if SWITCH == 'off':
        return 'CKPT80_KERNELS=off'
    if device.type != 'cuda' and not INTERPRET:
        return f'device {device.type}'
    if _arch(device) is None:
        return 'no configs for compute capability %d.%d' % torch.cuda.get_device_capability(device)
    if dtype not in (torch.bfloat16, torch.float16) and not (INTERPRET and dtype == torch.float32):
        return f'dtype {dtype}, not bfloat16 or float16'
    if op in ('attention', 'qk-norm') and width not in (64, 128):
        return f'head dim {width}, not 64 or 128'
    if op == 'loss' and width % 64:
        return f'{width} features, not a multiple of 64'
    return ''


@functools.cache
def _say(line):
    """Print a line once, on the first process."""
    if os.environ.get('RANK', '0') == '0':
        print(f'kernels: {line}', flush=True)


def _choose(op, situation, impl, device, dtype, width, obstacle=''):
    """The implementation to run; `obstacle`: what the caller found against Triton."""
    if impl == 'auto' and device.type != 'cuda':
        return 'torch'
    table, why = POLICY[f'{op}, {situation}']
    obstacle = obstacle or _why_not(op, device, dtype, width)
    if impl == 'auto':
        major = torch.cuda.get_device_capability(device)[0]
        impl = table.get(major, 'torch')
        if SWITCH == 'off' or major not in table:
            impl, why = 'torch', 'CKPT80_KERNELS=off' if SWITCH == 'off' else NO_TABLE
        if impl == 'torch-varlen':
            obstacle = _self_check('varlen', device, dtype, width)
        elif impl.startswith('triton'):
            obstacle = obstacle or _self_check(op, device, dtype, width)
        else:
            obstacle = ''
        if not obstacle:
            _say(f'{op}, {situation}: {impl} ({why})')
    elif not impl.startswith('triton'):
        obstacle = ''
    if obstacle:
        _say(f'{op}, {situation}: torch instead of {impl} ({obstacle})')
        return 'torch'
    return impl


# torch.compile runs _choose while it traces and takes the answer as a constant, so that a compiled model decides and
# prints as any other does. (operator.index, where it is called, makes a number of a size that the tracer holds as a
# symbol.)
# The mark is what torch.compiler.assume_constant_result sets in torch 2.11 to 2.13; calling that would import
# torch._dynamo, 1 to 3 s that commands without a model do not need.
_choose._dynamo_marked_constant = True


def _aligned(t):
    """t if its rows can be loaded 16 bytes at a time (last dimension dense, the rest 16-aligned), else a dense copy."""
    fine = t.stride(-1) == 1 and all(s % 16 == 0 for s in t.stride()[:-1]) and t.data_ptr() % 16 == 0
    return t if fine else t.clone(memory_format=torch.contiguous_format)      # contiguous() keeps an odd address


def _strides(*tensors):
    return [s for t in tensors for s in t.stride()[:3]]


@contextlib.contextmanager
def _launch_on(x):
    """Inside an operator: Triton launches on the current device; autocast must not round float32 work to 16 bits."""
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        yield


# === the first use on a GPU checks itself ===================================================================

@functools.cache
@torch.inference_mode(False)
def _self_check(op, device, dtype, width):
    """
    Run a kernel, forward and backward, on a small problem against the float32 reference; '' or what is wrong.
    'auto' asks this before it trusts a kernel on a GPU. It takes seconds, most of them compilation that the run needs
    anyway.
    """
    import fused                                          # here: they import this file
    import kernels
    import loss
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g).to(device, dtype)                 # noqa: E731
    impls = ('triton',)
    if op == 'loss':
        leaves = [rand(300, width), rand(2560, width) * width ** -0.5]        # a V that 16 divides, as real ones
        targets = torch.randint(2560, (300,), generator=g)
        targets[::3] = loss.IGNORE_INDEX
        impls = ('triton', 'triton-keep')
        run = lambda impl, x: sum(loss.linear_cross_entropy(*x, targets.to(device), impl=impl))          # noqa: E731
    elif op == 'qk-norm':
        leaves = [rand(2, 9, 9 * width), 1 + rand(3 * width) / 4, 1 + rand(3 * width) / 4]
        angle, other = rand(9, width // 2).float().repeat(1, 2), rand(3, 1, 1, 1, width).float()
        run = lambda impl, x: sum(y * z for y, z in zip(                                     # noqa: E731
            fused.qk_norm_rotary(*x, angle.cos(), angle.sin(), 3, 1e-5, impl=impl), other))
    elif op == 'swiglu':
        leaves = [rand(40, width)]
        run = lambda impl, x: fused.swiglu(*x, impl=impl)                                    # noqa: E731
    elif op == 'add-norm':
        leaves, other = [rand(40, width), rand(40, width), 1 + rand(width) / 4], rand(2, 40, width).float()
        run = lambda impl, x: sum(y * z for y, z in zip(fused.add_norm(*x, 1e-5, impl=impl), other))     # noqa: E731
    else:
        leaves = [rand(2, 2, 200, width) for _ in range(3)]
        segments, prefix = torch.arange(400, device=device).reshape(2, 200) // 77, torch.tensor([9, 50], device=device)
        mask = kernels.Intervals.documents(segments, None if op == 'varlen' else prefix)
        impls = ('torch-varlen' if op == 'varlen' else 'triton',)
        run = lambda impl, x: kernels.attention(*x, mask, impl=impl)                         # noqa: E731

    def with_gradients(impl, leaves):
        leaves = [x.detach().requires_grad_() for x in leaves]
        keep = lambda x: x  # noqa: E731 (our own hooks: activation checkpointing must not count what is saved here)
        with (torch.enable_grad(), torch.autocast(device.type, enabled=False),
              torch.autograd.graph.saved_tensors_hooks(keep, keep)):
            y = run(impl, leaves)
            return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)]

    # so that a small loss, too, has two chunks of columns
    chunk, loss.CHUNK_BYTES, loss.CHUNK_COLUMNS = (loss.CHUNK_BYTES, loss.CHUNK_COLUMNS), 1 << 19, 2048
    try:
        truth = with_gradients('torch', [x.float() for x in leaves])
        for impl in impls:
            names = ('output', 'gradient 1', 'gradient 2', 'gradient 3')
            for name, a, b in zip(names, with_gradients(impl, leaves), truth):
                error = float((a.float() - b).norm() / b.norm())
                if not error < 0.02:                      # 16-bit rounding gives 0.002 to 0.01; nan fails, too
                    return f'self-check failed: {impl} {name} is off by {error:.3g}'
    except Exception as e:                # Triton builds its launcher here: no compiler, no Python.h, no libcuda
        return f'self-check failed: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ""}'
    finally:
        loss.CHUNK_BYTES, loss.CHUNK_COLUMNS = chunk
    return ''
