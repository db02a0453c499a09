"""
What the tests of the kernels share: where they run, and their error bound by PyTorch's own in the same dtype. Without a
GPU they run in Triton's interpreter, which shows logic, not races or speed.
"""
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import policy

ROOT = Path(__file__).resolve().parent.parent
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
if policy.INTERPRET and policy.triton is not None:
    import kernel_interpreter
    kernel_interpreter.install()

CAN_TRITON = policy.triton is not None and (DEVICE == 'cuda' or policy.INTERPRET)
needs_triton = pytest.mark.skipif(not CAN_TRITON, reason='triton is not installed')
IMPLS = ['torch', pytest.param('triton', marks=needs_triton)]
TRITON_DTYPES = [torch.bfloat16] if DEVICE == 'cuda' else [torch.float32, torch.bfloat16]
DTYPE = torch.bfloat16 if DEVICE == 'cuda' else torch.float32               # where exactness is not the point


@pytest.fixture(autouse=True)
def fresh_notices():
    policy._say.cache_clear()
    policy._self_check.cache_clear()


def leaf(x, dtype):
    return x.to(DEVICE, dtype).detach().requires_grad_()


def no_worse(name, ours, torchs, truth, dtype, floor=0.0):
    """Error at most 1.5 times PyTorch's own in the same dtype, plus one rounding of the largest value, plus `floor`."""
    assert torch.isfinite(ours).all(), name
    error, allowed = (ours.double() - truth).abs().max(), 1.5 * (torchs.double() - truth).abs().max()
    allowed += floor + truth.abs().max() * (torch.finfo(dtype).eps if dtype != torch.float32 else 2e-6)
    assert error <= allowed, f'{name}: error {error:.2e}, allowed {allowed:.2e}'


def child(code, *argv, **env):
    from conftest import child_env
    done = subprocess.run([sys.executable, '-c', code, *argv], cwd=ROOT, text=True, capture_output=True,
                          env=child_env(PYTHONPATH=str(ROOT), GLOO_SOCKET_IFNAME='lo', **env))
    assert done.returncode == 0, done.stderr
    return done.stdout
