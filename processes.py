"""
The processes of a run: what torchrun started, their devices and signals, and how they share a batch.
"""
import dataclasses
import inspect
import os
import signal
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from errors import UserError, reading


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
        if self.master and sys.stdout is not None:           # None: the shell closed it
            tqdm.write(' '.join(str(a) for a in args), file=sys.stdout)
            sys.stdout.flush()

    def gather(self, items):
        """The lists of all processes, joined in rank order, on every process."""
        if self.world_size == 1:
            return list(items)
        lists = [None] * self.world_size
        dist.all_gather_object(lists, list(items))
        return [item for part in lists for item in part]

    def barrier(self):
        self.host_sum([0.0])

    def start_device(self):
        """Touch the GPU for the first time: after the loader has forked its workers."""
        if self.device.type == 'cuda':
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision('high')


def pick_device(device):
    """The torch device that a config's `device` names; UserError when it is not there."""
    os.environ.setdefault('PYTORCH_NVML_BASED_CUDA_CHECK', '1')        # is_available() would start CUDA before the fork
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    there = {'cuda': torch.cuda.is_available, 'mps': torch.backends.mps.is_available}.get(device, lambda: True)
    if not there():
        raise UserError(f"device={device!r}: torch sees no such GPU; give --device=cpu")
    return device


def setup_process(device='auto', dtype='', n_thread=0):
    """
    Join the processes that torchrun started (or be the only one) and pick device and dtype.
    dtype    'float32', 'bfloat16' or '' = bfloat16 on CUDA, float32 on CPU; weights stay float32, dtype is autocast's
    returns  Process
    """
    device = pick_device(device)
    told = {key: os.environ.get(key, default) for key, default in
            (('RANK', '0'), ('WORLD_SIZE', '1'), ('LOCAL_RANK', '0'), ('LOCAL_WORLD_SIZE', '1'))}
    rank, world, local, local_world = (int(text) if text.isdecimal() else -1 for text in told.values())
    half = ('RANK' in os.environ) != ('WORLD_SIZE' in os.environ)
    if half or not 0 <= rank < world or not 0 <= local < local_world:
        raise UserError(f"{', '.join(f'{key}={text}' for key, text in told.items())}: not an environment that torchrun "
                        "makes; start the script by torchrun, or unset these")
    dtype = getattr(torch, dtype or ('bfloat16' if device == 'cuda' else 'float32'))
    if device == 'cpu':
        torch.set_num_threads(n_thread or max(1, (os.cpu_count() or 1) // local_world))
    if world > 1:
        where = ', '.join(f'{key}={os.environ.get(key, "")}' for key in ('WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'))
        with reading(where, 'where the first process listens'):
            dist.init_process_group('cpu:gloo,cuda:nccl' if device == 'cuda' else 'gloo')
    return Process(rank, world, torch.device(device, local) if device == 'cuda' else torch.device('cpu'), dtype)


def distribute(model, process, parallel):
    """
    Put a VLM, whole and on the CPU of every process, on their devices; the optimizer is made from it afterwards.
    parallel  'ddp': a copy each. 'fsdp' (FSDP2): weights, their gradients and moments are cut among the N processes, by
              rows, but for a frozen encoder's; a block's weights are whole only while the block runs
    returns   the module to call instead of model (itself, but for ddp): backward averages gradients over processes
    One process alone shares nothing. Until here each process holds 4 bytes a parameter in host memory (7B: 28 GB, on a
    node of 8 GPUs 224 GB); under fsdp a GPU then holds 16 / N bytes a parameter, embeddings and output whole in float32
    with their gradients (7B: 3.3 GB), and one or two blocks.
    """
    if process.world_size == 1 or parallel == 'ddp':
        model.to(process.device)
        # the buffers are constants: leave them alone; torch 2.13 renamed how to say so
        renamed = 'forward_sync_buffers' in inspect.signature(DistributedDataParallel.__init__).parameters
        return model if process.world_size == 1 else DistributedDataParallel(
            model, gradient_as_bucket_view=True, **{'forward_sync_buffers' if renamed else 'broadcast_buffers': False})
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard         # a second of imports
    mesh = init_device_mesh(process.device.type, (process.world_size,))
    # blocks travel in the low precision and their gradients are added up in float32: autocast's own roundings, but none
    # of the copies that it keeps for the backward (7B: 14 GB). The root, and the residual stream with it, stay float32.
    # Each micro-step reduces its gradients: kept whole until the last, those of 7B would be 28 GB
    policy = MixedPrecisionPolicy(param_dtype=process.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in (*model.decoder.layers, *(model.cross or ())):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # the root is the VLM, whose forward hands output.weight to the loss. The projector and a trained encoder are of its
    # group, whole in every step: blocks of their own would wait for ever for a process whose batch has no image (cross
    # blocks do not: they run on no row of it).
    # A frozen encoder is copied: 4 bytes a parameter (0.4B: 1.7 GB), and nothing to send
    copied = set()
    if model.encoder is not None:
        copied = {p for p in model.encoder.to(process.device).parameters() if not p.requires_grad}
    return fully_shard(model, mesh=mesh, ignored_params=copied)


class StopSignal:
    """`.set` turns True on SIGTERM or Ctrl-C (torchrun may send both); the same a second time ends as usual."""
    def __init__(self):
        self.set = False
        self.usual = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}

    def _handle(self, number, frame):
        self.set = True
        signal.signal(number, self.usual[number])


def accumulation(global_batch_size, micro_batch_size, world_size):
    """
    How a global batch is cut: (micro-steps, sequences per process and micro-step), the largest micro-batch that divides
    and is at most micro_batch_size. Raises UserError when the processes do not divide the batch.
    """
    per_process, rest = divmod(global_batch_size, world_size)
    if rest:
        fit = [n for n in range(1, global_batch_size + 1) if global_batch_size % n == 0]
        raise UserError(f"global_batch_size={global_batch_size} cannot be divided among {world_size} processes: "
                        f"start {max(n for n in fit if n <= world_size)}, or give another batch size")
    size = max(n for n in range(1, min(micro_batch_size, per_process) + 1) if per_process % n == 0)
    return per_process // size, size
