"""Before anything imports kernels: without a GPU, Triton kernels run in Triton's interpreter, in this process only."""
import os

import torch

if not torch.cuda.is_available():
    os.environ['TRITON_INTERPRET'] = '1'                  # read where @triton.jit executes, that is when kernels is imported
torch.set_num_threads(1)


def child_env(**extra):
    """The environment for a child process: no interpreter, one thread, plus `extra`."""
    env = {k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'}
    return {**env, 'OMP_NUM_THREADS': '1', **extra}
