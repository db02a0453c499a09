"""checkpoint.py: folders that come back whole, that survive full disks and damage, and retention."""
import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import child_env
from safetensors.torch import load_file, save_file
from test_common import give_gradients, one_line, tiny_optimizer, tiny_vlm, trained

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import checkpoint
import common
from configurator import Key
from data import load_tokenizer
from errors import UserError
from connectors import Projector
from model import VLM
from vision import PatchProjection, SigLIP, SigLIPConfig


@pytest.fixture(scope='module')
def vocabulary(tmp_path_factory):
    """A tokenizer.json of ten words."""
    import tokenizers
    words = {w: i for i, w in enumerate(['<|endoftext|>', *'abcdefgh'])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='a'))
    path = str(tmp_path_factory.mktemp('tokenizer') / 'tokenizer.json')
    tokenizer.save(path)
    return path


def meta_for(model=None):
    shape = dataclasses.asdict((model or tiny_vlm()).decoder.config)
    spec = dict(decoder=shape, encoder=PatchProjection(4, 2).spec(), projector=dict(kind='mlp2'), image_id=9)
    if model is not None and model.encoder is None:
        spec.update(encoder=None, projector=None)
    elif model is not None:
        spec.update(encoder=model.encoder.spec())
    return dict(stage='mix', spec=spec, config=dict(seed=7, text=[['a', 1.0]]), step=2, tokens=0, samples=0, seen={},
                cursor={}, start_cursor={}, text_seed=7, text_rows={}, bad_samples=[], moments='', init_from='',
                schedule=dict(kind='main'), sources={})


def same_weights(a, b):
    b = b.state_dict()
    return all(torch.equal(v, b[k]) for k, v in a.state_dict().items())


def test_a_checkpoint_comes_back(tmp_path, vocabulary):
    model, optimizer = trained()
    checkpoint.save_checkpoint(str(tmp_path), 'ckpt_020', model, optimizer, load_tokenizer(vocabulary), meta_for())
    assert sorted(os.listdir(tmp_path)) == ['ckpt_020', 'ckpt_last']
    assert os.readlink(tmp_path / 'ckpt_last') == 'ckpt_020'                                 # relative
    for name in ('ckpt_020', 'ckpt_last'):
        loaded, tokenizer, meta = checkpoint.load_vlm(str(tmp_path / name))
        assert same_weights(model, loaded) and not loaded.training and tokenizer.encode('b') == [2]
        assert meta['step'] == 2 and not any(p.requires_grad for p in loaded.parameters())
    keys = load_file(tmp_path / 'ckpt_020' / 'model.safetensors').keys()
    assert {k.split('.')[0] for k in keys} == {'decoder', 'projector'}
    assert torch.load(tmp_path / 'ckpt_020' / 'optim.pt', weights_only=True)['decoder.norm.weight']['step'] == 2
    other = tiny_vlm(1)
    again = tiny_optimizer(other)
    assert checkpoint.load_weights(other, str(tmp_path / 'ckpt_last'), meta) == []
    assert checkpoint.load_optimizer(again, str(tmp_path / 'ckpt_last'), meta) == []
    for m, o in ((model, optimizer), (other, again)):    # and both go on alike, to the bit
        give_gradients(m, 9)
        common.optimizer_step(o, 0.01, 1.0)
    assert same_weights(model, other)


def test_a_frozen_encoder_is_stored_once(tmp_path, vocabulary):
    torch.manual_seed(0)
    eye = SigLIP(SigLIPConfig(8, 8, 2, 2, 2, 4))
    model = VLM(tiny_vlm().decoder, eye, Projector(8, 8), image_id=9)
    tokenizer, meta, file = load_tokenizer(vocabulary), meta_for(model), ''
    eye.requires_grad_(False)
    with torch.autocast('cpu', torch.bfloat16):          # what is cast for autocast is not what is stored
        model.image_features(torch.zeros(1, 3, 4, 4))
    assert model.low[1].embeddings['patch_embedding'].weight.dtype == torch.bfloat16
    for name in ('ckpt_step_1', 'ckpt_step_2', 'ckpt_step_3'):
        checkpoint.save_checkpoint(str(tmp_path), name, model, None, tokenizer, meta, encoder_file=file)
        file = str(tmp_path / name / 'encoder.safetensors')
    assert os.stat(file).st_nlink == 3
    keys = load_file(tmp_path / 'ckpt_step_3' / 'model.safetensors').keys()
    assert not any(k.startswith('encoder.') for k in keys)
    checkpoint.prune_checkpoints(str(tmp_path), keep_optimizer='all', keep_steps=1)          # the last one has it still
    assert same_weights(model, checkpoint.load_vlm(str(tmp_path / 'ckpt_last'))[0])
    checkpoint.save_checkpoint(str(tmp_path), 'ckpt_step_4', model, None, tokenizer, meta,   # a base that is gone
                               encoder_file=str(tmp_path / 'ckpt_step_1' / 'encoder.safetensors'))
    assert same_weights(model, checkpoint.load_vlm(str(tmp_path / 'ckpt_last'))[0])
    os.remove(tmp_path / 'ckpt_step_4' / 'encoder.safetensors')
    with pytest.raises(UserError, match='ckpt_step_4/encoder.safetensors: no such file; the checkpoint is damaged'):
        checkpoint.load_vlm(str(tmp_path / 'ckpt_step_4'))


def test_where_links_are_not_to_be_had_the_encoder_is_copied(tmp_path, vocabulary, monkeypatch):
    model = VLM(tiny_vlm().decoder, SigLIP(SigLIPConfig(8, 8, 2, 2, 2, 4)), Projector(8, 8), image_id=9)
    checkpoint.save_checkpoint(str(tmp_path), 'ckpt_step_1', model, None, load_tokenizer(vocabulary), meta_for(model))

    def refuse(*args):
        raise OSError(errno.EXDEV, 'Invalid cross-device link')
    monkeypatch.setattr(os, 'link', refuse)
    file = tmp_path / 'ckpt_step_1' / 'encoder.safetensors'
    checkpoint.save_checkpoint(str(tmp_path), 'ckpt_step_2', model, None, load_tokenizer(vocabulary), meta_for(model),
                               encoder_file=str(file))
    assert os.stat(file).st_nlink == 1 and same_weights(model, checkpoint.load_vlm(str(tmp_path / 'ckpt_last'))[0])


def test_a_text_checkpoint_leaves_the_projector_fresh(tmp_path, vocabulary):
    model, _ = trained()
    text = VLM(model.decoder, image_id=9)
    checkpoint.save_checkpoint(str(tmp_path), 'ckpt_080', text, None, load_tokenizer(vocabulary), meta_for(text))
    other = tiny_vlm(3)
    folder, meta = str(tmp_path / 'ckpt_080'), checkpoint.read_meta(str(tmp_path / 'ckpt_080'))
    with pytest.raises(UserError, match='lacks projector.fc1.bias and 3 more tensors'):
        checkpoint.load_weights(other, folder, meta)
    fresh = checkpoint.load_weights(other, folder, meta, ['projector.'])
    assert fresh == sorted(f'projector.{k}' for k in other.projector.state_dict())
    assert same_weights(model.decoder, other.decoder)
    assert checkpoint.load_optimizer(tiny_optimizer(other), folder, meta) is None
    assert checkpoint.load_vlm(str(tmp_path / 'ckpt_080'))[0].projector is None


def test_the_random_state_comes_back(tmp_path, vocabulary):
    torch.manual_seed(5)
    checkpoint.save_checkpoint(str(tmp_path), 'ckpt_100', tiny_vlm(), None, load_tokenizer(vocabulary), meta_for())
    expected = torch.randn(9)
    meta = checkpoint.read_meta(str(tmp_path / 'ckpt_100'))
    checkpoint.restore_rng(meta, 'here')
    assert torch.equal(torch.randn(9), expected)
    for rng in (None, 'a', 'AAAA', 3):
        with pytest.raises(ValueError, match='here: meta.json holds no random state'):
            checkpoint.restore_rng(dict(meta, rng=rng), 'here')


def test_a_save_needs_no_file_of_the_base(tmp_path, vocabulary):
    path = tmp_path / 'tokenizer.json'
    shutil.copy(vocabulary, path)
    tokenizer = load_tokenizer(str(path))
    path.unlink()                                        # the base's retention, or its user, was there
    checkpoint.save_checkpoint(str(tmp_path / 'run'), 'ckpt_100', tiny_vlm(), None, tokenizer, meta_for())
    assert (tmp_path / 'run' / 'ckpt_100' / 'tokenizer.json').read_bytes() == open(vocabulary, 'rb').read()


def fail_at(monkeypatch, what):
    def full(*args, **kw):
        raise OSError(errno.ENOSPC, 'No space left on device')

    def torn(state, path, *args, **kw):
        with open(path, 'wb') as f:
            f.write(b'half')
        if what == 'torch':
            raise RuntimeError('PytorchStreamWriter failed writing file data/3: file write failed\nmore')
        full()
    owner, name, fake = {'weights': (checkpoint, 'save_file', torn), 'moments': (torch, 'save', torn),
                         'torch': (torch, 'save', torn),
                         'fsync': (os, 'fsync', full), 'meta': (json, 'dump', full),
                         'rename': (os, 'rename', full)}[what]
    monkeypatch.setattr(owner, name, fake)


@pytest.mark.parametrize('what', ['weights', 'moments', 'torch', 'meta', 'fsync', 'rename'])
def test_a_failed_save_leaves_nothing_behind(tmp_path, vocabulary, monkeypatch, what):
    model, optimizer = trained()
    checkpoint.save_checkpoint(str(tmp_path), 'ckpt_step_1', model, optimizer, load_tokenizer(vocabulary), meta_for())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    give_gradients(model)
    common.optimizer_step(optimizer, 0.01, 1.0)
    with monkeypatch.context() as patch:
        fail_at(patch, what)
        with pytest.raises(OSError) as caught:
            checkpoint.save_checkpoint(str(tmp_path), 'ckpt_step_2', model, optimizer, load_tokenizer(vocabulary), meta_for())
    one_line(caught, 'ckpt_step_2 failed', 'untouched')
    assert sorted(os.listdir(tmp_path)) == ['ckpt_last', 'ckpt_step_1']
    loaded = checkpoint.load_vlm(str(tmp_path / 'ckpt_last'))[0].state_dict()
    assert all(torch.equal(v, before[k]) for k, v in loaded.items())
    checkpoint.save_checkpoint(str(tmp_path), 'ckpt_step_2', model, optimizer, load_tokenizer(vocabulary), meta_for())
    assert os.readlink(tmp_path / 'ckpt_last') == 'ckpt_step_2'
    assert same_weights(model, checkpoint.load_vlm(str(tmp_path / 'ckpt_last'))[0])


def test_a_disk_that_is_really_full(tmp_path, vocabulary):
    """A child process may write files of 40 kB: the weights do not fit, and the checkpoint before still loads."""
    model, optimizer = trained()
    checkpoint.save_checkpoint(str(tmp_path), 'ckpt_step_1', model, optimizer, load_tokenizer(vocabulary), meta_for())
    code = f'''
import resource, signal, sys
sys.path.insert(0, {os.path.join(ROOT, 'tests')!r})
from test_checkpoint import *
from model import Decoder, ModelConfig
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)                               # then write() fails with EFBIG, an OSError
model = VLM(Decoder(ModelConfig(1, 2, 64, vocab_size=512)), image_id=9)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
try:
    tokenizer = load_tokenizer({vocabulary!r})
    checkpoint.save_checkpoint({str(tmp_path)!r}, 'ckpt_step_2', model, None, tokenizer, meta_for())
except OSError as e:
    sys.exit(f'named: {{e}}')
'''
    child = subprocess.run([sys.executable, '-c', code], env=child_env(), capture_output=True, text=True, timeout=300)
    assert child.returncode == 1, child.stderr
    assert child.stderr.startswith('named: saving') and 'untouched' in child.stderr, child.stderr
    assert sorted(os.listdir(tmp_path)) == ['ckpt_last', 'ckpt_step_1']
    assert same_weights(model, checkpoint.load_vlm(str(tmp_path / 'ckpt_last'))[0])


def fake_run(folder, names, last):
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / 'optim.pt').write_text('')
    (folder / 'ckpt_last').symlink_to(last)


@pytest.mark.parametrize('policy, kept', [
    ('all', {'ckpt_020', 'ckpt_040', 'ckpt_step_9', 'ckpt_step_10'}), ('percent', {'ckpt_020', 'ckpt_040', 'ckpt_step_10'}),
    ('last', {'ckpt_step_10'}), ('none', {'ckpt_step_10'})])
def test_retention(tmp_path, policy, kept):
    fake_run(tmp_path, ['ckpt_020', 'ckpt_040', 'ckpt_step_8', 'ckpt_step_9', 'ckpt_step_10'], 'ckpt_step_10')
    checkpoint.prune_checkpoints(str(tmp_path), keep_optimizer=policy, keep_steps=2)
    folders = {n for n in os.listdir(tmp_path) if not (tmp_path / n).is_symlink()}
    assert folders == {'ckpt_020', 'ckpt_040', 'ckpt_step_9', 'ckpt_step_10'}        # 10 is newer than 9
    assert {n for n in folders if (tmp_path / n / 'optim.pt').exists()} == kept


def test_pruning_never_removes_the_last(tmp_path):
    fake_run(tmp_path, ['ckpt_step_3', 'ckpt_step_5', 'ckpt_step_7'], 'ckpt_step_3')
    checkpoint.prune_checkpoints(str(tmp_path), keep_optimizer='last', keep_steps=0)
    assert sorted(os.listdir(tmp_path)) == ['ckpt_last', 'ckpt_step_3']
    assert (tmp_path / 'ckpt_last' / 'optim.pt').exists()


def test_leftovers_of_a_kill_are_removed(tmp_path):
    fake_run(tmp_path, ['ckpt_step_3', '.tmp_ckpt_step_4'], 'ckpt_step_3')
    (tmp_path / '.link_ckpt_last').symlink_to('ckpt_step_4')
    checkpoint.open_folder(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ['.lock', 'ckpt_last', 'ckpt_step_3']


def rewrite_meta(folder, **kw):
    meta = json.loads((folder / 'meta.json').read_text())
    (folder / 'meta.json').write_text(json.dumps({k: v for k, v in {**meta, **kw}.items() if v is not None}))


def resign(folder, *names):
    """Make meta.json vouch for files that a test has changed, so that what is behind its sums is tested."""
    files = json.loads((folder / 'meta.json').read_text())['files']
    rewrite_meta(folder, files={**files, **{name: checkpoint.digest(folder / name) for name in names}})


def cut(path):
    path.write_bytes(path.read_bytes()[:-50])


def drop_tensor(folder, name):
    state = load_file(folder / 'model.safetensors')
    del state[name]
    save_file(state, folder / 'model.safetensors')
    resign(folder, 'model.safetensors')


def respec(folder, **kw):
    meta = json.loads((folder / 'meta.json').read_text())
    rewrite_meta(folder, spec={**meta['spec'], **kw})


SHAPE = dict(n_layer=1, n_head=2, n_embd=8, vocab_size=12, n_ffn=8)
def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def poison(folder):
    state = load_file(folder / 'model.safetensors')
    state['decoder.norm.weight'][3] = float('nan')
    save_file(state, folder / 'model.safetensors')
    resign(folder, 'model.safetensors')


DAMAGE = {
    'schema': (lambda f: rewrite_meta(f, schema=1), 'schema 1, this code reads schema 2'),
    'no schema': (lambda f: rewrite_meta(f, schema=None), 'schema None'),
    'no spec': (lambda f: rewrite_meta(f, spec=None), "meta.json: 'spec' is missing, expected dict"),
    'spec of a list': (lambda f: rewrite_meta(f, spec=[1]), "'spec' is [1], expected dict"),
    'no decoder': (lambda f: respec(f, decoder=dict(n_layer=1)), "'spec': 'decoder': 'n_head' is missing"),
    'step': (lambda f: rewrite_meta(f, step=-5), "'step' is -5, expected from 0 to 9.22337e"),
    'step of true': (lambda f: rewrite_meta(f, step=True), "'step' is True, expected int"),
    'step of 2.0': (lambda f: rewrite_meta(f, step=2.0), "'step' is 2.0, expected int"),
    'no stage': (lambda f: rewrite_meta(f, stage=None), "'stage' is missing, expected str"),
    'seen': (lambda f: rewrite_meta(f, seen=dict(text=3)), "'seen': text is 3, expected dict"),
    'seen text': (lambda f: rewrite_meta(f, seen=dict(text=dict(n_sample='x'))), "'seen': text: 'n_sample' is 'x'"),
    'cursor': (lambda f: rewrite_meta(f, cursor=dict(text=None)), "'cursor': text is missing, expected int"),
    'schedule': (lambda f: rewrite_meta(f, schedule={}), "'schedule': 'kind' is missing"),
    'layers': (lambda f: respec(f, decoder=dict(SHAPE, seq_len=8, n_layer=10 ** 9)),
               "'n_layer' is 1000000000, expected from 1 to 1000"),
    'tokenizer 3': (lambda f: rewrite_meta(f, tokenizer_path=3), "'tokenizer_path' is 3, expected str"),
    'a list': (lambda f: (f / 'meta.json').write_text('[]'), 'expected a JSON object'),
    'meta cut': (lambda f: cut(f / 'meta.json'), 'meta.json: not readable as JSON'),
    'no meta': (lambda f: (f / 'meta.json').unlink(), 'no meta.json there'),
    'a pipe': (lambda f: ((f / 'meta.json').unlink(), os.mkfifo(f / 'meta.json')), 'no meta.json there'),
    'weights cut': (lambda f: cut(f / 'model.safetensors'), 'model.safetensors: '),
    'weights flipped': (lambda f: flip(f / 'model.safetensors'), 'damaged, or from another checkpoint'),
    'weights cut and signed': (lambda f: (cut(f / 'model.safetensors'), resign(f, 'model.safetensors')),
                               'model.safetensors: not readable as safetensors'),
    'no weights': (lambda f: (f / 'model.safetensors').unlink(), 'model.safetensors: no such file'),
    'weights empty': (lambda f: (f / 'model.safetensors').write_bytes(b''), 'model.safetensors: 0 bytes'),
    'nan': (poison, 'model.safetensors: decoder.norm.weight holds values that are not finite'),
    'no tokenizer': (lambda f: (f / 'tokenizer.json').unlink(), 'tokenizer.json: no such file'),
    'another tokenizer': (lambda f: flip(f / 'tokenizer.json'), 'tokenizer.json: '),
    'no tensor': (lambda f: drop_tensor(f, 'decoder.norm.weight'), 'lacks decoder.norm.weight'),
    'another shape': (lambda f: respec(f, decoder=dict(SHAPE, seq_len=8, n_embd=16)), "this model's is"),
    'fewer layers': (lambda f: respec(f, encoder=None, decoder=dict(SHAPE, seq_len=8, n_layer=1, n_ffn=4)),
                     "this model's is")}


@pytest.mark.parametrize('case', DAMAGE)
def test_a_damaged_checkpoint_is_named_in_one_line(tmp_path, vocabulary, case):
    checkpoint.save_checkpoint(str(tmp_path), 'ckpt_080', tiny_vlm(), None, load_tokenizer(vocabulary), meta_for())
    act, word = DAMAGE[case]
    act(tmp_path / 'ckpt_080')
    with pytest.raises(UserError) as caught:
        checkpoint.load_vlm(str(tmp_path / 'ckpt_080'))
    one_line(caught, word, 'ckpt_080')
    with pytest.raises(ValueError) as caught:            # a file instead of its folder
        checkpoint.read_meta(str(tmp_path / 'ckpt_080' / 'model.safetensors' / ''))
    one_line(caught, 'expected a checkpoint folder')


def loads(optimizer, folder):
    """load_optimizer of a folder that holds optim.pt alone, vouched for."""
    files = {'optim.pt': checkpoint.digest(folder / 'optim.pt')} if (folder / 'optim.pt').exists() else {}
    return checkpoint.load_optimizer(optimizer, str(folder), dict(files=files))


def test_a_damaged_optimizer_state_is_named(tmp_path):
    optimizer = tiny_optimizer(tiny_vlm())
    assert loads(optimizer, tmp_path) is None            # none: the caller decides
    path = tmp_path / 'optim.pt'
    torch.save({'decoder.norm.weight': {'step': torch.ones(())}}, path)
    with pytest.raises(UserError, match="moments of decoder.tok_embeddings.weight are None, expected floats of shapes"):
        loads(optimizer, tmp_path)
    meta = dict(files={'optim.pt': checkpoint.digest(path)})
    flip(path)
    with pytest.raises(UserError, match='optim.pt: .*damaged, or from another checkpoint'):
        checkpoint.load_optimizer(optimizer, str(tmp_path), meta)
    cut(path)
    for content in (path.read_bytes(), b'', b'garbage'):
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            loads(optimizer, tmp_path)
        one_line(caught, 'optim.pt: not readable')
    torch.save([1], path)
    with pytest.raises(UserError, match='holds a list'):
        loads(optimizer, tmp_path)


def test_moments_of_another_shape_or_type_never_reach_the_optimizer(tmp_path):
    model, optimizer = trained()
    good = checkpoint.optimizer_state(optimizer)
    for key, value in (('exp_avg_sq', torch.zeros(3)), ('exp_avg', torch.zeros(8, dtype=torch.int64)), ('step', 2.0),
                       ('step', torch.ones(2)), ('exp_avg', None), ('more', torch.zeros(())),
                       ('exp_avg', torch.full((8,), float('nan')))):
        bad = {**good, 'decoder.norm.weight': {**good['decoder.norm.weight'], key: value}}
        torch.save(bad, tmp_path / 'optim.pt')
        with pytest.raises(UserError) as caught:
            loads(tiny_optimizer(model), tmp_path)
        one_line(caught, 'optim.pt: moments of decoder.norm.weight')
    torch.save({}, tmp_path / 'optim.pt')
    with pytest.raises(UserError, match='optim.pt: moments of decoder.tok_embeddings.weight are None'):
        loads(tiny_optimizer(model), tmp_path)


def test_check_resume_names_the_difference():
    meta = {'stage': 'text', 'config': {'lr': 0.1, 'text': [['a', 1.0]], 'percent': [20, 40], 'n_worker': 2, 'seed': 7}}
    now = {'lr': 0.1, 'text': (('a', 1.0),), 'percent': (20, 40), 'n_worker': 9, 'seed': 7, 'new_key': 1}
    keys = {key: Key(1, '', '', free=key == 'n_worker') for key in now}
    checkpoint.check_resume(meta, now, 'out/x', ('text', 'mix'), keys)        # json's lists are tuples
    for key, value, old in [('lr', 0.2, '0.1'), ('text', (('b', 1.0),), "(('a', 1.0),)"), ('percent', (20,), '(20, 40)'),
                            ('text', (), ''), ('new_key', 2, 'new_key=1')]:        # unknown then: its default
        with pytest.raises(UserError) as caught:
            checkpoint.check_resume(meta, {**now, key: value}, 'out/x', ('text',), keys)
        one_line(caught, f'out/x was made with {key}=', old, f'now it is {value!r}')
    old, keys = dict(stage='mix', config=dict(train_encoder=True)), {'freeze': Key('encoder', '', '')}     # its old name
    checkpoint.check_resume(old, {'freeze': 'none'}, 'out/x', ('mix',), keys)
    with pytest.raises(UserError, match="made with freeze='none', now it is 'encoder'"):
        checkpoint.check_resume(old, {'freeze': 'encoder'}, 'out/x', ('mix',), keys)
    with pytest.raises(UserError) as caught:
        checkpoint.check_resume(meta, now, 'out/x', ('finetune',), keys)
    one_line(caught, "out/x is of stage 'text', expected finetune")


def test_a_base_of_another_shape_is_named():
    meta = meta_for()
    spec = json.loads(json.dumps(meta['spec']))
    checkpoint.check_spec(meta, {**spec, 'decoder': {**spec['decoder'], 'seq_len': 99}}, 'out/x')
    checkpoint.check_spec(meta, {**spec, 'encoder': None, 'projector': None}, 'out/x')        # a text run takes the decoder
    checkpoint.check_spec(meta, {**spec, 'encoder': {**spec['encoder'], 'image_size': 6}}, 'out/x')     # resized
    for part, key, value in (('decoder', 'n_head', 1), ('encoder', 'patch_size', 1), ('projector', 'kind', 'linear')):
        with pytest.raises(UserError) as caught:
            checkpoint.check_spec(meta, {**spec, part: {**spec[part], key: value}}, 'out/x')
        one_line(caught, f'out/x has a model whose {part} has {key}={spec[part][key]!r}', repr(value))
    with pytest.raises(UserError) as caught:
        checkpoint.check_spec(meta, {**spec, 'image_mask': 'prefix'}, 'out/x')
    one_line(caught, "out/x was trained with image_mask='causal', this run has 'prefix': give the same")
    text = {**spec, 'encoder': None, 'projector': None}
    checkpoint.check_spec({'spec': text}, {**spec, 'image_mask': 'prefix'}, 'out/x')
    pooled = {**spec, 'projector': {'kind': 'mlp2', 'n_token': 2}}               # an old mlp2 says no n_token
    for there, here, old in ((spec, pooled, 'None'), (pooled, spec, '2')):
        with pytest.raises(UserError) as caught:
            checkpoint.check_spec(dict(meta, spec=there), here, 'out/x')
        one_line(caught, f'out/x has a model whose projector has n_token={old}')
