"""
Checkpoint folders: written whole or not at all, pruned, read back by name, and checked against the run that reads them.

    python checkpoint.py merge CHECKPOINT OUT            # a model with adapters as an ordinary one
    python checkpoint.py merge BASE OUT ADAPTERS         # the same of a run's adapters.safetensors beside its meta.json

Inside one: model.safetensors (OpenLM's names under `decoder.`, `projector.`, `cross.`), encoder.safetensors, optim.pt
(moments by name), meta.json, the tokenizer. A frozen encoder is one file with a link from every checkpoint. A model
with adapters has what trains once more, in adapters.safetensors. Nothing is unpickled: safetensors, weights_only, JSON.
"""
import base64
import contextlib
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
from safetensors.torch import save_file

from adapters import SPEC, merge_adapters
from data import load_tokenizer
from decoder import DECODER
from errors import Field, UserError, check, first_line, reading, user_error_hook
from files import writing
from mixture import COUNTS
from model import build_vlm
from shards import new_folder
from text_cond import SPEC as TEXT_COND
from vision import fit_positions
from weights import fill, finite, read_json, read_pt, tensors

LOCK = []                       # the open lock file of this process's run folder
SCHEMA = 2                      # of meta.json; raised when an old checkpoint could be misread
COUNT = Field(int, 0)
META = {                        # what every meta.json holds
    'stage': Field(str), 'config': Field(dict), 'base': Field(dict, optional=True), 'init_from': Field(str),
    'step': COUNT, 'tokens': COUNT, 'samples': COUNT, 'text_seed': COUNT,
    'seen': Field(dict, of=Field(dict, of={name: COUNT for name in COUNTS})),
    'cursor': Field(dict, of=COUNT), 'start_cursor': Field(dict, of=COUNT),
    'text_rows': Field(dict, of=Field(dict, of={'row_len': Field(int, 1), 'n_row': Field(int, 1)})),
    'bad_samples': Field(list, of=Field(str)), 'moments': Field(str),
    'schedule': Field(dict, of={'kind': Field(str)}),
    'spec': Field(dict, of={
        'decoder': Field(dict, of={key: DECODER[key] for key in (
            'n_layer', 'n_head', 'n_embd', 'n_ffn', 'vocab_size', 'seq_len')}),     # the others have defaults
        'encoder': Field(dict, of={'kind': Field(str)}, optional=True),
        'projector': Field(dict, of={'kind': Field(str), 'n_token': Field(int, 1, 1 << 16, optional=True)},
                           optional=True), 'image_id': COUNT,
        'image_mask': Field(str, optional=True), 'document_end': Field(int, 0, optional=True),
        'fusion': Field(dict, of={'kind': Field(str), 'every': Field(int, 1)}, optional=True),
        'adapters': Field(dict, of=SPEC, optional=True), 'text_cond': Field(dict, of=TEXT_COND, optional=True),
        'view': Field(dict, optional=True, of={'shortest': Field(int, 0, 1 << 14, optional=True),
                                               'split': Field(bool, optional=True)})}),
    'tokenizer_path': Field(str, 1), 'tokenizer_sha256': Field(str, 64, 64),
    'files': Field(dict, of=Field(dict, of={'size': COUNT, 'sha256': Field(str, 64, 64)})),
    'sources': Field(dict, of=Field(dict, of={'n_file': COUNT, 'n_row': COUNT, 'sha256': Field(str, 64, 64)})),
}


# --- write ------------------------------------------------------------------------------------------------------------

def save_checkpoint(out_dir, name, model, optimizer, tokenizer, meta, *, encoder_file='', master=True):
    """
    Write the checkpoint `name`, whole or not at all. All processes of a run call it: where tensors are cut among them
    each is gathered, in turn, before the first file is begun, and the master holds them all (12 bytes a parameter in
    host memory; 7B: 84 GB).
    out_dir       the run's folder; ckpt_last then points at the new one (a relative symlink, swapped at once)
    model         VLM; optimizer AdamW or None; tokenizer data.Tokenizer
    meta          dict, completed here with schema, tokenizer, random state and versions
    encoder_file  an encoder.safetensors that holds this model's encoder, to be linked; '' = write one
    master        does this process write? The others only hand over their part
    Raises OSError (a full disk, say) after removing what it had begun; older checkpoints are untouched.
    """
    state = {k: v.contiguous() for k, v in _gathered(model.state_dict(), master).items()}
    moments = None if optimizer is None else optimizer_state(optimizer, master)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    if not master:
        return
    final = os.path.join(out_dir, name)
    tmp = os.path.join(out_dir, f'.tmp_{name}')
    newest = os.path.realpath(os.path.join(out_dir, 'ckpt_last'))
    try:
        if not os.path.exists(final) or newest != os.path.realpath(final):          # else it is there already
            shutil.rmtree(tmp, ignore_errors=True)
            os.makedirs(tmp)
            _write_checkpoint(tmp, state, moments, tokenizer, meta, encoder_file, trained)
            if os.path.lexists(final):                                # an older run's, or one that a kill left unlinked
                os.rename(final, os.path.join(out_dir, f'.tmp_old_{name}'))
            os.rename(tmp, final)
            _fsync(out_dir)
            shutil.rmtree(os.path.join(out_dir, f'.tmp_old_{name}'), ignore_errors=True)
    except Exception as e:                        # torch and safetensors report a full disk in their own ways
        shutil.rmtree(tmp, ignore_errors=True)
        full = '; is the disk full?' if getattr(e, 'errno', None) in (None, errno.ENOSPC, errno.EDQUOT) else ''
        raise OSError(f"saving {final} failed ({first_line(e)}{full}); the checkpoints before it are untouched") from e
    last = os.path.join(out_dir, 'ckpt_last')
    if os.path.isdir(last) and not os.path.islink(last):                  # of a run copied by cp -rL
        os.rename(last, os.path.join(out_dir, '.tmp_old_ckpt_last'))
        shutil.rmtree(os.path.join(out_dir, '.tmp_old_ckpt_last'), ignore_errors=True)
    link = os.path.join(out_dir, '.link_ckpt_last')
    if os.path.lexists(link):
        os.remove(link)
    os.symlink(name, link)
    os.replace(link, last)
    _fsync(out_dir)


def _write_checkpoint(folder, state, moments, tokenizer, meta, encoder_file='', trained=()):
    """The files of one checkpoint, each fsynced."""
    meta = dict(meta, schema=SCHEMA, tokenizer_path=os.path.basename(tokenizer.path),
                tokenizer_sha256=tokenizer.sha256, commit=git_commit(), torch=torch.__version__,
                rng=base64.b64encode(bytes(torch.get_rng_state())).decode())
    encoder = {k: v for k, v in state.items() if k.startswith('encoder.')}
    save_file({k: v for k, v in state.items() if k not in encoder}, os.path.join(folder, 'model.safetensors'))
    if encoder:
        _link_or_save(encoder, encoder_file, os.path.join(folder, 'encoder.safetensors'))
    if meta['spec'].get('adapters'):
        save_file({name: state[name] for name in trained}, os.path.join(folder, 'adapters.safetensors'),
                  {'adapters': json.dumps(meta['spec']['adapters'])})          # the small file says its base, too
    if moments is not None:
        torch.save(moments, os.path.join(folder, 'optim.pt'))
    with open(os.path.join(folder, meta['tokenizer_path']), 'wb') as f:
        f.write(tokenizer.content)                           # its file may be gone by now, with a base that was pruned
    meta['files'] = {name: digest(os.path.join(folder, name)) for name in sorted(os.listdir(folder)) if name[0] != '.'}
    with open(os.path.join(folder, 'meta.json'), 'w', encoding='utf-8') as f:
        json.dump(meta, f, indent=1)
    for name in os.listdir(folder):
        _fsync(os.path.join(folder, name))
    _fsync(folder)


def _link_or_save(encoder, existing, path):
    try:
        if existing:
            os.link(existing, path)
            return
    except OSError:                              # another file system, one without links, or a base that was removed
        pass
    save_file(encoder, path)


def _gathered(state, keep=True):
    """A dict's tensors, whole, on the CPU; what is cut among processes is gathered by all. {} where keep is false."""
    whole = {}
    for name, tensor in state.items():
        tensor = tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor
        if keep:
            whole[name] = tensor.detach().cpu()
    return whole


def optimizer_state(optimizer, keep=True):
    """The moments by parameter name: {name: {'step', 'exp_avg', 'exp_avg_sq'}}, CPU tensors; see _gathered."""
    return {name: _gathered(optimizer.state[p], keep)
            for group in optimizer.param_groups for name, p in zip(group['names'], group['params'])
            if p in optimizer.state}


def digest(path):
    with open(path, 'rb') as f:
        return dict(size=os.path.getsize(path), sha256=hashlib.file_digest(f, 'sha256').hexdigest())


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
    last = os.path.basename(os.path.realpath(os.path.join(out_dir, 'ckpt_last')))
    folders = [n for n in os.listdir(out_dir) if re.fullmatch(r'ckpt_(\d\d\d|step_\d+)', n)]
    steps = sorted((n for n in folders if 'step' in n), key=lambda n: int(n[10:]))
    for name in steps[:-keep_steps or None]:
        if name != last:
            trash = os.path.join(out_dir, f'.tmp_{name}')
            os.rename(os.path.join(out_dir, name), trash)                 # gone at once, then deleted
            shutil.rmtree(trash, ignore_errors=True)
    for name in folders:
        keep = name == last or keep_optimizer == 'all' or (keep_optimizer == 'percent' and 'step' not in name)
        path = os.path.join(out_dir, name, 'optim.pt')
        if not keep and os.path.exists(path):
            os.remove(path)


def open_folder(out_dir):
    """
    Make a run's folder, lock it until this process ends, however it ends, and delete what a killed process had begun
    there: temporary checkpoints and links. Raises UserError when it cannot be used, or another run uses it.
    """
    while LOCK:
        os.close(LOCK.pop())
    try:
        os.makedirs(out_dir, exist_ok=True)
        LOCK.append(_open_lock(out_dir))
    except OSError as e:
        raise UserError(f"out_dir={out_dir} cannot be used ({e.strerror}): give another --out_dir") from e
    try:
        fcntl.lockf(LOCK[0], fcntl.LOCK_EX | fcntl.LOCK_NB)          # unlike flock's, not inherited by loader workers
    except (BlockingIOError, PermissionError):
        raise UserError(f"out_dir={out_dir} is in use by another run: wait for its end, or give another --out_dir"
                        ) from None
    except OSError:                                                       # a file system without locks
        pass
    for name in os.listdir(out_dir):
        if name.startswith('.tmp_'):
            shutil.rmtree(os.path.join(out_dir, name), ignore_errors=True)
        elif name.startswith('.link_'):
            os.remove(os.path.join(out_dir, name))


@contextlib.contextmanager
def locked(folder):
    """Wait for the lock of a folder that is made where it is missing, and hold it inside the block."""
    with reading(folder, 'a folder for results'):
        os.makedirs(folder, exist_ok=True)
        handle = _open_lock(folder)
        with contextlib.suppress(OSError):                                # a file system without locks
            fcntl.lockf(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(handle)


def _open_lock(folder):
    return os.open(os.path.join(folder, '.lock'), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)


# --- read -------------------------------------------------------------------------------------------------------------

def read_meta(folder):
    """The meta.json of a checkpoint folder, its schema checked; UserError with one line otherwise."""
    path = os.path.join(folder, 'meta.json')
    if os.path.lexists(os.path.join(folder, 'ckpt_last')):
        raise UserError(f"{folder} is the folder of a run: give one of its checkpoints, such as "
                        f"{os.path.join(folder, 'ckpt_last')}")
    if not os.path.isfile(path):
        raise UserError(f"{folder}: no meta.json there; expected a checkpoint folder such as out/1b/text/ckpt_080")
    meta = read_json(path)
    if meta.get('schema') != SCHEMA:
        raise UserError(f"{path}: schema {meta.get('schema')}, this code reads schema {SCHEMA} only")
    check(meta, Field(dict, of=META), path)
    return meta


def checked_path(folder, meta, name):
    """The path of a checkpoint's file, its bytes compared with what meta.json says of them; UserError otherwise."""
    path = os.path.join(folder, name)
    with reading(path, f'a file of the checkpoint {folder}'):
        if not os.path.isfile(path):
            raise UserError(f"{path}: no such file; the checkpoint is damaged")
        found, expected = digest(path), meta['files'].get(name)
        if found != expected:
            was = f"{expected['size']} bytes with sha256 {expected['sha256'][:12]}..." if expected else 'no such file'
            raise UserError(f"{path}: {found['size']} bytes with sha256 {found['sha256'][:12]}..., meta.json says "
                            f"{was}: damaged, or from another checkpoint")
        return path


def read_tokenizer(folder, meta):
    """The Tokenizer of a checkpoint folder, checked against its meta."""
    tokenizer = load_tokenizer(checked_path(folder, meta, os.path.basename(meta['tokenizer_path'])))
    spec, sha256 = meta['spec'], meta['tokenizer_sha256']
    ours, said = (tokenizer.image_id, tokenizer.sha256), (spec['image_id'], sha256)
    if ours != said or tokenizer.vocab_size > spec['decoder']['vocab_size']:
        raise UserError(f"{tokenizer.path}: another tokenizer than meta.json says: image_id and sha256 are {ours}, "
                        f"there {said}; it needs {tokenizer.vocab_size} of {spec['decoder']['vocab_size']} rows")
    return tokenizer


def build(folder, spec, seed=None):
    """model.build_vlm of a checkpoint's description; UserError with the file's name for one that makes no model."""
    with reading(os.path.join(folder, 'meta.json'), "a model's description"):
        return build_vlm(spec, seed)


def load_weights(model, folder, meta, may_lack=(), tell=None):
    """
    Copy a checkpoint's tensors into a VLM, by name; those of a part that the VLM does not have stay unread.
    meta      its meta.json
    may_lack  prefixes of names that the checkpoint need not hold: ('encoder.', 'projector.') of a text-only base,
              ('cross.',) of one without cross blocks, ('text_cond.',) of one that encodes images alone
    tell      tell(line) of position tables that are resized to the model's image_size; None = none is
    returns   the names of the model's tensors that the checkpoint does not have
    Raises UserError naming the first tensor whose shape differs, that is missing, or that the model does not have.
    """
    source = tensors(checked_path(folder, meta, 'model.safetensors'))
    if 'encoder.safetensors' in meta['files'] and model.encoder is not None:
        source.update(tensors(checked_path(folder, meta, 'encoder.safetensors')))
    for name in fit_positions(model, source) if tell else ():
        tell(f"!!! {name} of {folder} is resized to this run's image_size")
    return fill(model, source, lambda name: name if getattr(model, name.split('.')[0], None) is not None else None,
                may_lack)


def load_optimizer(optimizer, folder, meta, may_lack=()):
    """
    Load a checkpoint's moments by parameter name.
    meta      its meta.json
    may_lack  prefixes of the names of parameters that may start fresh
    returns   the names that do, or None when the checkpoint holds no optim.pt
    Raises UserError for moments that are missing, misshapen or unreadable.
    """
    path = os.path.join(folder, 'optim.pt')
    if not os.path.exists(path):
        return None
    saved = read_pt(checked_path(folder, meta, 'optim.pt'))
    if not isinstance(saved, dict):
        raise UserError(f"{path}: holds a {type(saved).__name__}, expected moments by parameter name")
    return load_moments(optimizer, saved, may_lack, path)


def load_moments(optimizer, saved, may_lack=(), path='optim.pt'):
    """Put moments saved by name into an optimizer; arguments and result as in load_optimizer."""
    fresh = []
    for group in optimizer.param_groups:
        for name, p in zip(group['names'], group['params']):
            if name not in saved and name.startswith(tuple(may_lack)):
                fresh.append(name)
                continue
            shapes = {'step': (), 'exp_avg': tuple(p.shape), 'exp_avg_sq': tuple(p.shape)}
            found = saved.get(name)
            found = {k: tuple(v.shape) if isinstance(v, torch.Tensor) and v.is_floating_point() else type(v).__name__
                     for k, v in found.items()} if isinstance(found, dict) else found
            if found != shapes:
                raise UserError(f"{path}: moments of {name} are {found}, expected floats of shapes {shapes}")
            if not all(map(finite, saved[name].values())):
                raise UserError(f"{path}: moments of {name} hold values that are not finite")
            # the step count lives where the fused kernel wants it: beside the parameter; OpenLM's may be bfloat16
            optimizer.state[p] = {k: _beside(p, v.float()) for k, v in saved[name].items()}
    return fresh


def _beside(p, value):
    """A copy of a saved value of a parameter where the parameter is; of a cut one, this process's part alone."""
    if value.ndim == 0 or not hasattr(p, 'full_tensor'):
        return value.to(p.device, copy=True)
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None).clone()


def restore_rng(meta, folder):
    """Torch's CPU random state as it was saved. The stages draw nothing after the start; a fork's dropout would."""
    try:
        torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(meta['rng'])), dtype=torch.uint8))
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        raise UserError(f"{folder}: meta.json holds no random state ({first_line(e)})") from e


def load_vlm(folder, device='cpu'):
    """
    A checkpoint as a model for evaluation, its adapters merged.
    folder   a checkpoint folder; returns (VLM in eval mode on device, float32, Tokenizer, meta dict)
    Raises UserError with one line when something is missing or does not fit.
    """
    folder = os.path.realpath(folder)            # once: a run that goes on may swap ckpt_last while its files are read
    meta = read_meta(folder)
    model = build(folder, meta['spec'])
    load_weights(model, folder, meta)
    merge_adapters(model)
    return model.to(device).eval().requires_grad_(False), read_tokenizer(folder, meta), meta


def merge(folder, out, adapters=''):
    """
    Write a checkpoint with adapters as an ordinary one in a new folder; or what it was trained on with a run's
    adapters.safetensors, its meta.json beside it.
    Raises UserError for adapters of another base, and for those of a run with frozen parts that the base does not have.
    """
    with writing(out), new_folder(out) as part:
        model, tokenizer, meta = _with_adapters(folder, adapters) if adapters else load_vlm(folder)
        if not meta['spec'].pop('adapters', None):
            raise UserError(f"{folder} has no adapters: nothing to merge")
        _write_checkpoint(part, model.state_dict(), None, tokenizer, meta)


def _with_adapters(folder, adapters):
    """The model of a run, from its base's folder and its adapters.safetensors; returns what load_vlm does."""
    base, run = read_meta(folder), os.path.dirname(adapters)
    meta = read_meta(run)
    there, here = (meta['spec'].get('adapters') or {}).get('base', ''), base['files']['model.safetensors']['sha256']
    if there != here:
        raise UserError(f"{adapters}: adapters of the base with sha256 {there[:12]}..., that of {folder} is "
                        f"{here[:12]}...: give the checkpoint that they were trained on")
    model, trained = build(run, meta['spec']), tensors(checked_path(run, meta, os.path.basename(adapters)))
    lacks = load_weights(model, folder, base, ('',), print)
    if missing := [name for name in lacks if name not in trained]:
        raise UserError(f"{folder} and {adapters} lack {missing[0]}, which was frozen: give the run's own checkpoint "
                        "(checkpoint.py merge CHECKPOINT OUT)")
    fill(model, trained)
    merge_adapters(model)
    return model, read_tokenizer(folder, base), meta


# --- check ------------------------------------------------------------------------------------------------------------

def check_resume(meta, config, folder, stages, keys):
    """
    Raise UserError when a checkpoint is of none of `stages`, or for the first key that differs and is not free.
    keys     {name: Key} of the script; a key that the checkpoint does not know counts as its default
    """
    if meta['stage'] not in stages:
        raise UserError(f"{folder} is of stage {meta['stage']!r}, expected {' or '.join(stages)}: give another "
                        "--out_dir")
    before = dict(meta['config'])
    if before.get('train_encoder'):              # the key's name before there was more to freeze
        before.setdefault('freeze', 'none')
    for key, value in config.items():
        old = _tuples(before.get(key, keys[key].default))
        if not keys[key].free and old != value:
            raise UserError(f"{folder} was made with {key}={old!r}, now it is {value!r}: give the old value, or "
                            "another out_dir")


def _tuples(value):
    """A config's value as it was before JSON made lists of its tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def check_spec(meta, spec, folder):
    """
    Raise UserError naming the first number in which a base's model differs from this run's; seq_len and image_size may.
    """
    masks = [one.get('image_mask') or 'causal' for one in (meta['spec'], spec) if one['encoder'] is not None]
    if len({*masks}) > 1:
        raise UserError(f"{folder} was trained with image_mask={masks[0]!r}, this run has {masks[1]!r}: give the same")
    off = {'fusion': dict(kind='sequence'), 'text_cond': dict(kind='none')} if spec['encoder'] else {}
    for part in ('decoder', 'encoder', 'projector', 'fusion', 'text_cond'):
        ours = spec.get(part) or off.get(part)
        there, here = _fixed(meta['spec'].get(part) or {}), _fixed(ours or {})
        keys = [*there, 'n_token'] if part == 'projector' and there else there   # n_token: only of some projectors
        for key in keys:
            old, new = there.get(key), here.get(key)
            if ours is not None and new != old:
                raise UserError(f"{folder} has a model whose {part} has {key}={old!r}, this run's has {new!r}: give "
                                "the same, or the same scale file")


def _fixed(spec):
    return {key: _fixed(value) if isinstance(value, dict) else value for key, value in spec.items()
            if key not in ('seq_len', 'image_size')}


def how_to_make(path, scale):
    """What to do when there is no checkpoint out/{scale}/{name}/ckpt...: the command that makes it, where one does."""
    name = os.path.basename(os.path.dirname(os.path.normpath(path)))
    here = os.path.dirname(os.path.abspath(__file__))
    if not os.path.exists(os.path.join(here, 'config', f'{name}.py')):
        return 'give another --init_from: a checkpoint folder'
    scale_file = f' config/{scale}.py' if os.path.exists(os.path.join(here, 'config', f'{scale}.py')) else ''
    script = 'finetune.py' if name.startswith('finetune') else 'pretrain.py'
    return f'make it with: python {script} config/{name}.py{scale_file}'


if __name__ == '__main__':
    sys.excepthook = user_error_hook
    if len(sys.argv) not in (4, 5) or sys.argv[1] != 'merge':
        raise UserError('usage: python checkpoint.py merge CHECKPOINT OUT, or merge BASE OUT ADAPTERS')
    merge(*sys.argv[2:])
