"""
Checkpoint folders: written whole or not at all, pruned, read back by name, and checked against the run that reads them.

Inside one: model.safetensors (OpenLM's names under `decoder.`), optim.pt (moments by name), meta.json, the tokenizer.
Nothing is unpickled: safetensors, weights_only, JSON.
"""
import base64
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from data import load_tokenizer
from model import VLM, Decoder, ModelConfig, Projector, first_line, read_pt, read_safetensors
from vision import encoder_from_config, load_encoder

LOCK = []                       # the open lock file of this process's run folder
SCHEMA = 1                      # of meta.json; raised when an old checkpoint could be misread
# on resume these may differ; any other difference is refused
MAY_DIFFER = {'out_dir', 'device', 'n_worker', 'n_thread', 'micro_batch_size', 'save_every', 'stop_after', 'resume',
              'log_every', 'wandb', 'tensorboard', 'dry_run', 'compile', 'keep_optimizer', 'keep_steps',
              'max_bad_samples', 'eval_every', 'eval_rows', 'data_hint', 'cache_dir', 'activation_checkpointing'}


# --- write ------------------------------------------------------------------------------------------------------------

def save_checkpoint(out_dir, names, model, optimizer, tokenizer, meta, *, save_encoder=True):
    """
    Write one checkpoint, whole or not at all, under the first of `names`; the others become links to it.
    out_dir    the run's folder; ckpt_last then points at the new one (a relative symlink, swapped at once)
    model      VLM; optimizer AdamW or None; tokenizer data.Tokenizer
    meta       dict, completed here with schema, shapes, digests and versions
    Raises OSError (a full disk, say) after removing what it had begun; older checkpoints are untouched.
    """
    final = os.path.join(out_dir, names[0])
    tmp = os.path.join(out_dir, f'.tmp_{names[0]}')
    newest = os.path.realpath(os.path.join(out_dir, 'ckpt_last'))
    try:
        if not os.path.exists(final) or newest != os.path.realpath(final):          # else it is this very checkpoint
            shutil.rmtree(tmp, ignore_errors=True)
            os.makedirs(tmp)
            _write_checkpoint(tmp, model, optimizer, tokenizer, meta, save_encoder)
            if os.path.lexists(final):                                # an older run's, or one that a kill left unlinked
                os.rename(final, os.path.join(out_dir, f'.tmp_old_{names[0]}'))
            os.rename(tmp, final)
            _fsync(out_dir)
            shutil.rmtree(os.path.join(out_dir, f'.tmp_old_{names[0]}'), ignore_errors=True)
    except (OSError, SafetensorError, RuntimeError) as e:                 # torch reports a failed write as RuntimeError
        shutil.rmtree(tmp, ignore_errors=True)
        full = '; is the disk full?' if getattr(e, 'errno', None) in (None, errno.ENOSPC, errno.EDQUOT) else ''
        raise OSError(f"saving {final} failed ({first_line(e)}{full}); the checkpoints before it are untouched") from e
    for name in (*names[1:], 'ckpt_last'):
        link = os.path.join(out_dir, f'.link_{name}')
        if os.path.lexists(link):
            os.remove(link)
        os.symlink(names[0], link)
        os.replace(link, os.path.join(out_dir, name))
    _fsync(out_dir)


def _write_checkpoint(folder, model, optimizer, tokenizer, meta, save_encoder):
    """The files of one checkpoint, each fsynced."""
    meta = dict(meta, schema=SCHEMA, model=dataclasses.asdict(model.decoder.config), image_id=model.image_id,
                tokenizer_path=os.path.basename(tokenizer.path), tokenizer_sha256=tokenizer.sha256,
                commit=git_commit(), torch=torch.__version__,
                rng=base64.b64encode(bytes(torch.get_rng_state())).decode())
    if model.encoder is not None:
        meta['encoder'] = model.encoder.config_dict()
        if not save_encoder:
            meta['encoder_sha256'] = tensor_digest(model.encoder)
    state = {k: v for k, v in model.state_dict().items() if save_encoder or not k.startswith('encoder.')}
    save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, os.path.join(folder, 'model.safetensors'))
    if optimizer is not None:
        torch.save(optimizer_state(optimizer), os.path.join(folder, 'optim.pt'))
    with open(os.path.join(folder, meta['tokenizer_path']), 'wb') as f:
        f.write(tokenizer.content)                           # its file may be gone by now, with a base that was pruned
    with open(os.path.join(folder, 'meta.json'), 'w', encoding='utf-8') as f:
        json.dump(meta, f, indent=1)
    for name in os.listdir(folder):
        _fsync(os.path.join(folder, name))
    _fsync(folder)


def optimizer_state(optimizer):
    """The moments by parameter name: {name: {'step', 'exp_avg', 'exp_avg_sq'}}, CPU tensors."""
    return {name: {k: v.detach().cpu() for k, v in optimizer.state[p].items()}
            for group in optimizer.param_groups for name, p in zip(group['names'], group['params'])
            if p in optimizer.state}


def _fsync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def git_commit():
    """The commit of this code, with '+' when files differ from it; '' outside a checkout."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        head = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=here, capture_output=True, text=True, timeout=10)
        dirty = subprocess.run(['git', 'status', '--porcelain', '-uno'], cwd=here, capture_output=True, text=True,
                               timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ''
    return head.stdout.strip() + ('+' if dirty.stdout.strip() else '')


def prune_checkpoints(out_dir, *, keep_optimizer, keep_steps):
    """
    Bound the disk: drop all but the newest `keep_steps` ckpt_step_N, and optimizer states the policy does not keep.
    keep_optimizer  'all', 'percent' (ckpt_NNN and the last), 'last', 'none' (none but the last's: a run must resume)
    """
    folder_of = lambda name: os.path.basename(os.path.realpath(os.path.join(out_dir, name)))         # what a link means
    last = folder_of('ckpt_last')
    named = {folder_of(n) for n in os.listdir(out_dir) if re.fullmatch(r'ckpt_\d\d\d', n)}
    steps = [n for n in os.listdir(out_dir) if re.fullmatch(r'ckpt_step_\d+', n)]
    steps = sorted((n for n in steps if n not in named), key=lambda n: int(n[10:]))
    for name in steps[:-keep_steps or None]:
        if name != last:
            trash = os.path.join(out_dir, f'.tmp_{name}')
            os.rename(os.path.join(out_dir, name), trash)                 # gone at once, then deleted
            shutil.rmtree(trash, ignore_errors=True)
    keep = {'all': None, 'percent': named | {last}, 'last': {last}, 'none': {last}}[keep_optimizer]
    for name in os.listdir(out_dir):
        path = os.path.join(out_dir, name, 'optim.pt')
        if keep is not None and name.startswith('ckpt_') and folder_of(name) not in keep and os.path.exists(path):
            os.remove(path)


def open_folder(out_dir):
    """
    Make a run's folder, lock it until this process ends, however it ends, and delete what a killed process had begun
    there: temporary checkpoints and links. Exits with one line when it cannot be used, or another run uses it.
    """
    while LOCK:
        LOCK.pop().close()
    try:
        os.makedirs(out_dir, exist_ok=True)
        LOCK.append(open(os.path.join(out_dir, '.lock'), 'w'))
    except OSError as e:
        sys.exit(f"out_dir={out_dir} cannot be used ({e.strerror}): give another --out_dir")
    try:
        fcntl.flock(LOCK[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"out_dir={out_dir} is in use by another run: wait for its end, or give another --out_dir")
    except OSError:                                                       # a file system without locks
        pass
    for name in os.listdir(out_dir):
        if name.startswith('.tmp_'):
            shutil.rmtree(os.path.join(out_dir, name), ignore_errors=True)
        elif name.startswith('.link_'):
            os.remove(os.path.join(out_dir, name))


# --- read -------------------------------------------------------------------------------------------------------------

def read_meta(folder):
    """The meta.json of a checkpoint folder, its schema checked; ValueError with one line otherwise."""
    path = os.path.join(folder, 'meta.json')
    try:
        with open(path, encoding='utf-8') as f:
            meta = json.load(f)
    except FileNotFoundError as e:
        raise ValueError(f"{folder}: no meta.json there; expected a checkpoint folder such as "
                         "out/1b/text/ckpt_080") from e
    except NotADirectoryError as e:
        raise ValueError(f"{folder} is a file: expected a checkpoint folder such as out/1b/text/ckpt_080") from e
    except (OSError, ValueError) as e:
        raise ValueError(f"{path}: not readable as JSON ({e}); the checkpoint is damaged") from e
    schema = meta.get('schema') if isinstance(meta, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path}: schema {schema}, this code reads schema {SCHEMA}")
    for key, kind in (('model', dict), ('config', dict), ('tokenizer_path', str), ('image_id', int)):
        if not isinstance(meta.get(key), kind):
            raise ValueError(f"{path}: has no '{key}'; the checkpoint is damaged")
    try:
        ModelConfig(**meta['model'])
    except (TypeError, ValueError) as e:
        raise ValueError(f"{path}: 'model' is not a decoder's shape ({e}); the checkpoint is damaged") from e
    return meta


def load_weights(model, folder):
    """
    Copy a checkpoint's tensors into a VLM, by name; those of a part that the VLM does not have stay unread.
    returns  the names of the model's tensors that the checkpoint does not have (a fresh projector, say)
    Raises ValueError naming the first tensor whose shape differs, or that the model does not have.
    """
    path = os.path.join(folder, 'model.safetensors')
    saved = read_safetensors(path)
    own = model.state_dict()
    for key, value in saved.items():
        if getattr(model, key.split('.')[0], None) is not None:
            if key not in own:
                raise ValueError(f"{path}: holds {key}, which this model does not have")
            if own[key].shape != value.shape:
                raise ValueError(f"{path}: {key} is {tuple(value.shape)}, this model's is {tuple(own[key].shape)}")
    with torch.no_grad():
        for key in own.keys() & saved.keys():
            own[key].copy_(saved[key])
    return sorted(own.keys() - saved.keys())


def load_optimizer(optimizer, folder):
    """Load a checkpoint's moments by name; returns the names that start fresh, or None when it holds no optim.pt."""
    path = os.path.join(folder, 'optim.pt')
    if not os.path.exists(path):
        return None
    saved = read_pt(path)
    if not isinstance(saved, dict):
        raise ValueError(f"{path}: holds a {type(saved).__name__}, expected moments by parameter name")
    return load_moments(optimizer, saved)


def load_moments(optimizer, saved):
    """Put moments saved by name into an optimizer; returns the names of parameters that start fresh."""
    fresh = []
    for group in optimizer.param_groups:
        for name, p in zip(group['names'], group['params']):
            if name not in saved:
                fresh.append(name)
                continue
            if not isinstance(saved[name], dict) or saved[name].keys() != {'step', 'exp_avg', 'exp_avg_sq'}:
                raise ValueError(f"optimizer state of {name}: expected step, exp_avg and exp_avg_sq")
            if saved[name]['exp_avg'].shape != p.shape:
                raise ValueError(f"optimizer state of {name} is {tuple(saved[name]['exp_avg'].shape)}, "
                                 f"expected {tuple(p.shape)}")
            # the step count lives where the fused kernel wants it: beside the parameter
            optimizer.state[p] = {k: v.to(p.device, copy=True) for k, v in saved[name].items()}
    return fresh


def restore_rng(meta, folder):
    """Torch's CPU random state as it was saved. The stages draw nothing after the start; a fork's dropout would."""
    try:
        torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(meta['rng'])), dtype=torch.uint8))
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        raise ValueError(f"{folder}: meta.json holds no random state ({first_line(e)})") from e


def load_vlm(folder, device='cpu'):
    """
    A checkpoint as a model for evaluation.
    folder   a checkpoint folder; returns (VLM in eval mode on device, float32, Tokenizer, meta dict)
    Raises ValueError with one line when something is missing or does not fit.
    """
    meta = read_meta(folder)
    with torch.device('meta'):
        decoder = Decoder(ModelConfig(**meta['model']))
    decoder.to_empty(device='cpu')
    encoder = projector = None
    if meta.get('encoder'):
        encoder = encoder_from_config(meta['encoder'])
        projector = Projector(encoder.width, decoder.config.n_embd)
    model = VLM(decoder, encoder, projector, image_id=meta['image_id'])
    missing = load_weights(model, folder)
    if any(k.startswith('encoder.') for k in missing) and not meta['config']['save_encoder']:
        missing = [k for k in missing if not k.startswith('encoder.')]
        config = meta['config']
        path = os.path.join(config['data_dir'], config['encoder_path'])
        model.encoder = load_encoder(path, config['encoder_layer'], config['encoder_norm'])
        if tensor_digest(model.encoder) != meta['encoder_sha256']:
            raise ValueError(f"{folder}: saved without its encoder, and {path} holds other weights than it was trained "
                             "with")
    if missing:
        raise ValueError(f"{folder}: model.safetensors lacks {missing[0]} ({len(missing)} tensors missing)")
    tokenizer = load_tokenizer(os.path.join(folder, os.path.basename(meta['tokenizer_path'])))
    return model.to(device).eval().requires_grad_(False), tokenizer, meta


def tensor_digest(module):
    """sha256 over a module's tensors by name: the same weights, whatever file they came from."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# --- check ------------------------------------------------------------------------------------------------------------

def check_last(last):
    """Exit with one line when ckpt_last is a link to nothing: starting over would overwrite the run's log."""
    if os.path.islink(last) and not os.path.exists(last):
        sys.exit(f"{last} points to {os.readlink(last)}, which is gone: link it to a checkpoint that is there, or "
                 "remove it to start over")


def check_resume(meta, config, folder, stages):
    """Exit with one line when a checkpoint is of none of `stages`, or for the first key that differs and may not."""
    if meta['stage'] not in stages:
        sys.exit(f"{folder} is of stage {meta['stage']!r}, expected {' or '.join(stages)}: give another --out_dir")
    for key, value in config.items():
        old = _tuples(meta['config'].get(key, value))
        if key not in MAY_DIFFER and old != value:
            sys.exit(f"{folder} was made with {key}={old!r}, now it is {value!r}: give the old value, or another "
                     "out_dir")


def _tuples(value):
    """A config's value as it was before JSON made lists of its tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def check_same_start(process, first_step, out_dir):
    """Exit with one line when the processes would start at different steps: they do not see the same out_dir."""
    if len(set(process.gather([first_step]))) > 1:
        process.exit(f"process {process.rank} starts at step {first_step}, others do not: out_dir={out_dir} has to be "
                     "one folder that every node sees")


def check_encoder_file(encoder, path, *how):
    """Exit with one line unless load_encoder(path, *how) gives this encoder back: save_encoder=False relies on it."""
    if path != 'patch' and (not os.path.exists(path) or
                            tensor_digest(load_encoder(path, *how)) != tensor_digest(encoder)):
        sys.exit(f"save_encoder=False, but {path} does not hold the encoder of this run: give --save_encoder=true")


def check_model(meta, model_config, folder):
    """Exit with one line naming the first number of the decoder that differs; seq_len may."""
    for key, value in dataclasses.asdict(model_config).items():
        if key != 'seq_len' and meta['model'].get(key, value) != value:
            sys.exit(f"{folder} has a decoder with {key}={meta['model'][key]!r}, this run's has {value!r}: give the "
                     "same, or the same scale file")


def how_to_make(path, scale):
    """The command that makes a checkpoint folder out/{scale}/{name}/ckpt..., '' when no recipe has that name."""
    name = os.path.basename(os.path.dirname(os.path.normpath(path)))
    here = os.path.dirname(os.path.abspath(__file__))
    if not os.path.exists(os.path.join(here, 'config', f'{name}.py')):
        return ''
    scale_file = f' config/{scale}.py' if os.path.exists(os.path.join(here, 'config', f'{scale}.py')) else ''
    script = 'finetune.py' if name.startswith('finetune') else 'pretrain.py'
    return f'; make it with: python {script} config/{name}.py{scale_file}'
