"""
Tensors on disk, by name, read one at a time.

    source = tensors('epoch_80.pt')                      # a .pt, a .safetensors, or a folder of safetensors
    source['tok_embeddings.weight'].shape                # known without reading
    fresh = fill(module, source, rename=our_name)        # copied into the module, no second copy in memory

Every message about a missing, misshapen or unreadable tensor is written here. Nothing is unpickled: safetensors, and
torch.load with weights_only.
"""
import json
import os
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import torch
from safetensors import safe_open

from errors import UserError, reading

FLOATS = {'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16}


class LazyTensor(NamedTuple):
    """A tensor of a file: what is known from the header, and read() -> the tensor on CPU."""
    file: str
    shape: tuple
    dtype: object               # torch.dtype, or safetensors' word for one that holds no floats
    read: Callable


MAX_JSON_BYTES = 4 << 30        # VQAv2's annotations have 0.4 GB


def read_json(path, key=None):
    """The object (dict) that a JSON file holds, or holds under `key`; UserError with the path and the reason."""
    with reading(path, 'JSON'):
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"{path}: not a file")       # a pipe would wait for ever
        if os.path.getsize(path) > MAX_JSON_BYTES:
            raise UserError(f"{path}: {os.path.getsize(path)} bytes, expected at most {MAX_JSON_BYTES}")
        with open(path, encoding='utf-8') as f:
            content = json.load(f)
        where = ''
        if key is not None:
            content, where = content.get(key) if isinstance(content, dict) else None, f' with one in {key!r}'
        if not isinstance(content, dict):
            raise UserError(f"{path}: expected a JSON object{where}, found {type(content).__name__}")
        return content


def read_pt(path):
    """What a .pt file holds, on CPU, tensors mapped into memory rather than read; UserError when it is unreadable."""
    with reading(path, 'a .pt file'):
        return torch.load(path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path))


def tensors(path):
    """
    The tensors of a .pt (bare or under 'state_dict'), of a .safetensors file, or of a folder with model.safetensors or
    its shards and their index.
    returns  dict name -> LazyTensor, names as the file has them
    Raises UserError for what is missing, unreadable, or holds something else than tensors.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        index = os.path.join(path, 'model.safetensors.index.json')
        names = ['model.safetensors']
        if not os.path.exists(os.path.join(path, names[0])) and os.path.exists(index):
            names = sorted(set(map(str, read_json(index, 'weight_map').values())))
            outside = [name for name in names if os.path.basename(name) != name]
            if outside:
                raise UserError(f"{index}: names {outside[0]}, a file outside its folder")
        files = [os.path.join(path, name) for name in names]
    else:
        files = [path]
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        raise UserError(f"{missing[0]}: no such file; expected a .pt, a .safetensors, or a folder with "
                        "model.safetensors or its index")
    found = {}
    for file in files:
        found.update(_safetensors(file) if file.endswith('.safetensors') else _pt(file))
    return found


def _safetensors(file):
    with reading(file, 'safetensors'):
        handle = safe_open(file, 'pt')                   # maps the file; lives as long as a tensor of it is wanted
        found = {}
        for name in handle.keys():
            header = handle.get_slice(name)
            dtype = header.get_dtype()
            found[name] = LazyTensor(file, tuple(header.get_shape()), FLOATS.get(dtype, dtype),
                                     lambda name=name: handle.get_tensor(name))
        return found


def _pt(file):
    state = read_pt(file)
    state = state.get('state_dict', state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"{file}: not weights: expected a dict of tensors, or one under 'state_dict'")
    return {str(name): LazyTensor(file, tuple(t.shape), t.dtype, lambda t=t: t) for name, t in state.items()}


def finite(tensor):
    """Are all values finite? Without the temporary copies that isfinite makes."""
    return tensor.numel() == 0 or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def fill(module, source, rename=None, may_lack=None):
    """
    Copy tensors into a module's parameters and buffers by name, each converted to the dtype it has there.
    source     dict name -> LazyTensor, from tensors()
    rename     function of a name in source: the module's name for it, or None for a tensor that is not wanted
    may_lack   prefixes of the module's names that source need not hold; None = any
    returns    names of the module's tensors left as they were, sorted
    Raises UserError naming file, tensor and both shapes for what does not fit, before anything is copied, and naming a
    tensor whose values are not finite.
    """
    own = module.state_dict()
    wanted = {}
    for name, tensor in source.items():
        name = name if rename is None else rename(name)
        if name is None:
            continue
        if name not in own:
            raise UserError(f"{tensor.file}: holds {name}, which this model does not have")
        if tensor.shape != tuple(own[name].shape):
            raise UserError(f"{tensor.file}: {name} is {tensor.shape}, this model's is {tuple(own[name].shape)}")
        if tensor.dtype not in FLOATS.values():
            raise UserError(f"{tensor.file}: {name} is {tensor.dtype}, expected floats of 16, 32 or 64 bits")
        wanted[name] = tensor
    fresh = sorted(own.keys() - wanted.keys())
    lacking = [name for name in fresh if may_lack is not None and not name.startswith(tuple(may_lack))]
    if lacking:
        files = sorted({tensor.file for tensor in source.values()}) or ['an empty file']
        more = f' and {len(lacking) - 1} more tensors' if len(lacking) > 1 else ''
        raise UserError(f"{files[0]}: lacks {lacking[0]}{more}")
    for name, tensor in wanted.items():
        with reading(tensor.file, f'the tensor {name}'), torch.no_grad():
            value = tensor.read()
            if not finite(value):
                raise UserError(f"{tensor.file}: {name} holds values that are not finite")
            own[name].copy_(value)
    return fresh
