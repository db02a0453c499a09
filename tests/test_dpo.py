"""dpo.py as processes on the tiny data set of conftest.py: the start, the reference, kills, processes, bad pairs."""
import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import meta_of, picture, same_weights, steps
from test_preferences import entry
from test_pretrain import KILL, equal, tensors

from checkpoint import load_vlm
from data import Mixture, collate
from images import View
from preferences import PreferenceSource, dpo_loss


@pytest.fixture(scope='module')
def base(stage_2):
    return stage_2 / 'ckpt_100'


@pytest.fixture(scope='module')
def args(world, base):
    """The arguments of a run of 6 steps, two passes over 24 pairs, every fifth of them about text alone."""
    folder = world / 'data' / 'preferences'
    folder.mkdir()
    words = ('a red wall', 'no', 'two cats sat on a mat', 'yes , a photo')
    rows = [entry(i, words[i % 2], words[2 + i // 2 % 2], 1 + i % 2, image=i % 5 != 4, turns=1 + i % 3 // 2)
            for i in range(24)]
    for row in rows:
        (folder / f"{row['id']}.jpg").write_bytes(picture('white', 'JPEG', int(row['id'])))
    (folder / 'pairs.json').write_text(json.dumps(rows))
    (world / 'dpo.py').write_text((world / 'tiny.py').read_text().replace(', length_window = ', ' = ').replace(
        "instruct, instruct_images = 'instruct/llava.json', 'instruct/images'", "n_epoch = 2.0").replace(
        'encoder_path', '_').replace('seq_len, max_steps, lr = 96, 8, 3e-3, 0', 'seq_len, lr = 128, 3e-4'))
    return ['dpo.py', world / 'dpo.py', f'--init_from={base}', '--preferences=preferences/pairs.json',
            '--preference_images=preferences', '--save_every=2', '--beta=0.5']


@pytest.fixture(scope='module')
def run(world, scripts, args):
    out = world / 'out' / 'dpo'
    scripts(*args, f'--out_dir={out}')
    return out


def test_the_start_is_ln_2_and_the_pairs_are_learned(world, base, run):
    lines = steps(run)
    assert len(lines) == 6 and lines[0]['loss'] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[0]['accuracy'] == lines[0]['margin'] == lines[0]['reward'] == 0
    assert lines[-1]['loss'] < 0.6 and lines[-1]['accuracy'] > 0.7 and lines[-1]['margin'] > 0
    assert [line['sources']['preferences']['n_sample'] for line in lines] == [8 * (i + 1) for i in range(6)]
    meta = meta_of(run / 'ckpt_100')
    assert meta['stage'] == 'dpo' and meta['base']['stage'] == 'mix' and meta['epochs'] == {'preferences': 2.0}
    assert equal(tensors(run / 'ckpt_100', 'encoder'), tensors(base, 'encoder'))
    # the last checkpoint's loss on all pairs, computed here from plain logits
    model, tok, _ = load_vlm(str(run / 'ckpt_100'))
    folder = world / 'data' / 'preferences'
    source = PreferenceSource(str(folder / 'pairs.json'), str(folder), tok, 128, View(28, 4), split_turns=True)
    content = json.loads((run / 'reference.json').read_text())
    files = meta_of(base)['files']
    assert content['about']['model'] == {k: files[k]['sha256'] for k in ('model.safetensors', 'encoder.safetensors')}

    def answers(model, sample):
        batch = collate([sample], tok.pad_id)
        x = model.decoder.trunk(model.embed(batch.tokens, batch.images, batch.image_index))
        p = model.decoder.output(x).double().log_softmax(-1)
        return [sum(float(p[r, t, y]) for t, y in enumerate(row.tolist()) if y >= 0)
                for r, row in enumerate(batch.targets)]
    plain, _, _ = load_vlm(str(base))
    with torch.no_grad():
        before, after = ([answers(m, source[i]) for i in range(24)] for m in (plain, model))
    for i in range(24):
        assert content['pairs'][f'pairs.json:{i}'] == pytest.approx(before[i], rel=1e-4)
    losses, rewards = dpo_loss(torch.tensor(after), torch.tensor(before), 0.5)
    assert losses.mean() < lines[-1]['loss'] + 0.05 and (rewards[:, 0] > rewards[:, 1]).float().mean() > 0.8


def test_killed_and_resumed_gives_the_same_bits(scripts, base, args, run, tmp_path):
    shutil.copytree(base, tmp_path / 'base')
    mine = [*args[:2], f'--init_from={tmp_path / "base"}', *args[3:], f'--out_dir={tmp_path / "run"}']
    places = ('files.write_file:1', 'os.replace:3', 'common.optimizer_step:3', 'torn torch.save:1')
    for i, place in enumerate(places):                                   # in the reference's pass, then in training
        killed = scripts.start(*mine, f'--n_worker={i % 2}', hook=KILL, env={'KILL': place})
        assert killed.wait() == -signal.SIGKILL, f"{place}: {killed.out}{killed.err}"
    shutil.rmtree(tmp_path / 'base')                                     # the file is all that is needed of it
    scripts(*mine)
    assert same_weights(run / 'ckpt_100', tmp_path / 'run' / 'ckpt_100')
    assert same_weights(run, tmp_path / 'run', 'reference.json')
    assert [a['loss'] for a in steps(tmp_path / 'run')] == [b['loss'] for b in steps(run)]
    assert 'finished: 6 of 6 steps' in scripts(*mine).out
    os.remove(tmp_path / 'run' / 'reference.json')
    line = scripts.refuses(*mine, '--n_epoch=3')
    assert 'n_epoch=2.0' in line and '3.0' in line


def test_two_processes_and_a_shared_reference(scripts, args, run, tmp_path):
    for n, more in ((2, ()), (2, ('--parallel=fsdp',)), (1, (f'--reference={run / "reference.json"}',))):
        out = tmp_path / f'{n}{len(more)}{"fsdp" in str(more)}'
        scripts(*args, *more, '--micro_batch_size=2', f'--out_dir={out}', world_size=n)
        for a, b in zip(steps(out), steps(run), strict=True):
            assert a['loss'] == pytest.approx(b['loss'], rel=1e-5) and a['n_kept'] == b['n_kept']
            assert a['margin'] == pytest.approx(b['margin'], abs=1e-5) and a['accuracy'] == b['accuracy']
        assert (out / 'reference.json').exists() == (n == 2)
    ours, theirs = (json.loads((folder / 'reference.json').read_text())['pairs']
                    for folder in (run, tmp_path / '20False'))
    assert ours.keys() == theirs.keys() and all(theirs[i] == pytest.approx(ours[i], rel=1e-5) for i in ours)


def test_adapters_start_at_the_base_and_leave_it_alone(world, scripts, args, base, tmp_path):
    scripts(*args, '--lora_rank=4', '--lr=2e-2', '--sft_weight=0.5', f'--out_dir={tmp_path / "a"}')
    lines = steps(tmp_path / 'a')
    # ln 2, and half of the better answers' nats a token, under the reference
    folder, tok = world / 'data' / 'preferences', load_vlm(str(base))[1]
    source = PreferenceSource(str(folder / 'pairs.json'), str(folder), tok, 128, View(28, 4), split_turns=True,
                              name='preferences')
    mixture = Mixture([source], [1.0], 7)
    logp = json.loads((tmp_path / 'a' / 'reference.json').read_text())['pairs']
    first = [mixture[i] for i in range(8)]
    nats = sum(-logp[sample.id][0] / (sample.targets[0] >= 0).sum() for sample in first) / 8
    assert lines[0]['loss'] == pytest.approx(math.log(2) + nats / 2, rel=1e-5) and lines[0]['margin'] == 0
    assert lines[-1]['margin'] > 0 and lines[-1]['loss'] < lines[0]['loss'] - 0.1
    assert (tmp_path / 'a' / 'ckpt_100' / 'adapters.safetensors').exists()
    # a base that has adapters already: it goes on with them, and is its own reference
    scripts(*args[:2], f'--init_from={tmp_path / "a" / "ckpt_100"}', *args[3:], '--stop_after=1',
            f'--out_dir={tmp_path / "b"}')
    assert steps(tmp_path / 'b')[0]['loss'] == pytest.approx(math.log(2), abs=1e-6)
    assert meta_of(tmp_path / 'b' / 'ckpt_last')['spec'] == meta_of(tmp_path / 'a' / 'ckpt_100')['spec']


def test_bad_pairs_and_a_signal_in_the_reference(world, scripts, args, run, tmp_path):
    data = tmp_path / 'data'
    shutil.copytree(world / 'data' / 'preferences', data / 'preferences')
    file = data / 'preferences' / 'pairs.json'
    rows = json.loads(file.read_text())
    rows[3]['output_1'] = rows[3]['output_2']
    rows[6]['preference'] = 0
    file.write_text(json.dumps(rows))
    (data / 'preferences' / '7.jpg').write_bytes(b'no photo')
    mine = [*args, f'--data_dir={data}']
    line = scripts.refuses(*mine, f'--out_dir={tmp_path / "a"}')
    assert any(part in line for part in ('are equal', 'preference=0', '7.jpg')) and 'pairs.json: entry' in line, line
    hook = """
import mixture, os, signal
plain = mixture.Loader.__next__
def signalled(self):
    os.kill(os.getpid(), signal.SIGTERM)
    return plain(self)
mixture.Loader.__next__ = signalled
"""
    mine += [f'--out_dir={tmp_path / "c"}']
    assert 'asked to stop: ' in scripts(*mine, '--max_bad_samples=9', hook=hook).out and not (tmp_path / 'c').exists()
    assert '3 bad samples are more than max_bad_samples=2' in scripts.refuses(*mine, '--max_bad_samples=2')
    mine += ['--max_bad_samples=9']
    scripts(*mine)                                                       # the reference is there already
    bad = meta_of(tmp_path / 'c' / 'ckpt_last')['bad_samples']
    assert len(bad) == 6 and len(set(bad)) == 3                          # two passes
    pairs = json.loads((tmp_path / 'c' / 'reference.json').read_text())['pairs']
    assert {f'pairs.json:{i}' for i in range(24)} - pairs.keys() == {f'pairs.json:{i}' for i in (3, 6, 7)}
    (data / 'preferences' / '8.jpg').unlink()
    gone = scripts.refuses(*args, f'--data_dir={data}', f'--out_dir={tmp_path / "d"}')
    assert '1 of 20 images are not in' in gone


def test_refusals_and_dry_run(world, scripts, args, stage_1, run, tmp_path):
    out = f'--out_dir={tmp_path / "out"}'
    for more, *parts in (
            ((f'--init_from={stage_1 / "ckpt_080"}',), 'is not a checkpoint with an encoder'),
            (('--init_from=/nowhere/finetune/ckpt_100',), 'make it with: python finetune.py config/finetune.py'),
            (('--preferences=instruct',), 'is no file; expected one JSON file of pairs'),
            (('--beta=0',), 'beta=0.0', 'expected > 0'), (('--train_encoder=true',), "unknown key 'train_encoder'"),
            ((f'--reference={run / "reference.json"}', '--resize=crop'), "another resize, 'letterbox', this run's"),
            ((f'--reference={run / "reference.json"}', f'--init_from={run / "ckpt_100"}'), 'another model, ')):
        line = scripts.refuses(*args, out, *more)
        assert all(part in line for part in parts), line
    text = scripts(*args, out, '--dry_run=true').out
    assert '6 steps of 2,048 tokens' in text                             # 8 pairs of two rows of 128
    assert 'preferences: 48 of 48 sequences (100.0%), 2.00 passes over 24' in text and not (tmp_path / 'out').exists()
    text = scripts('dpo.py', '--data_dir=/nowhere', '--dry_run=true').out
    assert 'out/1b/finetune/ckpt_100 not found; make it with: python finetune.py config/finetune.py' in text
    assert Path(run / 'ckpt_last').exists()
