"""
pretrain.py as processes on one tiny data set: what stages 1 and 2 compute and leave, on any number of processes and
workers, through kills, bad input and full disks. The runs come from conftest.py.
"""
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import RECORD, free_port, meta_of, mix, read_log, recorded_ids, same_weights, steps, write_captions, write_tar
from safetensors.torch import load_file, save_file

from checkpoint import load_vlm
from connectors import Projector
from data import TextSource
from model import save_openlm
from schedules import cooldown_lr, main_lr, remaining_lr
from vision import SigLIP

MAIN = dict(peak=5e-3, final=1e-5, warmup=2, total=20, from_zero=False)                   # stage_1's schedule

# dies by SIGKILL when the named function is called for the n-th time; 'torn' leaves a part of its file behind first
KILL = """
import importlib, os, signal
where, count = os.environ['KILL'].split(':')
module, name = where.removeprefix('torn ').rsplit('.', 1)
module, left = importlib.import_module(module), [int(count)]
plain = getattr(module, name)
def deadly(*args, **options):
    left[0] -= 1
    if left[0] == 0:
        if where.startswith('torn'):
            open(args[1], 'wb').write(b'x' * 1000)
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(*args, **options)
setattr(module, name, deadly)
"""
# makes a step last at least $SLOW seconds
SLOW = """
import common, os, time
plain = common.optimizer_step
def slow(*args):
    time.sleep(float(os.environ['SLOW']))
    return plain(*args)
common.optimizer_step = slow
"""


def text(world, *more):
    return ['pretrain.py', 'config/text.py', world / 'tiny.py', *more]


def tensors(folder, part):
    file = 'encoder.safetensors' if part == 'encoder' else 'model.safetensors'
    return {k: v for k, v in load_file(folder / file).items() if k.startswith(part + '.')}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def wait_for_lines(out, n, run, timeout=120):
    end = time.monotonic() + timeout
    while not (out / 'log.jsonl').exists() or len((out / 'log.jsonl').read_text().splitlines()) < n:
        assert time.monotonic() < end, f"no {n} lines in {out}/log.jsonl:\n{run.out}\n{run.err}"
        time.sleep(0.01)


# --- what a run leaves ------------------------------------------------------------------------------------------------

def test_stage_1_leaves_its_ladder_log_and_resumable_checkpoints(stage_1):
    assert sorted(os.listdir(stage_1)) == ['.lock', 'ckpt_020', 'ckpt_040', 'ckpt_060', 'ckpt_080', 'ckpt_100',
                                           'ckpt_last', 'log.jsonl']
    assert os.readlink(stage_1 / 'ckpt_last') == 'ckpt_100'
    lines = steps(stage_1)
    assert len(lines) == 20 and lines[-1]['loss'] < lines[0]['loss'] - 1
    for i, line in enumerate(lines):
        assert line['lr'] == main_lr(i, **MAIN) and line['tokens'] == (i + 1) * 8 * 48 and line['n_kept'] == 8 * 48
        assert line['sources']['text']['n_sample'] == 8 * (i + 1) and line['sources']['text']['share'] == 1
        assert {'z_loss', 'grad_norm', 'tokens_per_s', 'mfu', 'mem_gib', 'data_wait_s'} <= line.keys()
    meta = meta_of(stage_1 / 'ckpt_080')
    assert (meta['step'], meta['samples'], meta['stage'], meta['cursor']) == (16, 128, 'text', {'text': 64})
    assert meta['schedule'] == dict(kind='main', **MAIN)
    moments = torch.load(stage_1 / 'ckpt_080' / 'optim.pt', weights_only=True)
    assert {k.split('.')[0] for k in moments} == {'decoder'} and all(m['step'] == 16 for m in moments.values())
    assert (stage_1 / 'ckpt_080' / 'tokenizer.model').exists()


def test_stage_2_goes_on_where_stage_1_stopped(world, scripts, stage_1, stage_2, tmp_path):
    lines = steps(stage_2)
    start = main_lr(16, **MAIN)
    assert [line['lr'] for line in lines] == [cooldown_lr(i, start=start, final=1e-5, total=12) for i in range(12)]
    # the text cursor: no window of stage 1's first 16 steps comes again, and the next ones come in stage 1's own order
    before, after = recorded_ids(world / 'ids_text'), recorded_ids(world / 'ids_mix')
    words = [i for i in after if ':' in i and i.count(':') == 2]
    assert not set(before[:128]) & set(words) and len(set(words)) == len(words) == 72
    assert before[128:] == words[:32]
    # exact image ratio, at every step and over the run
    for i, line in enumerate(lines):
        counts = line['sources']
        assert counts['captions']['n_sample'] == counts['captions']['n_image'] == 2 * (i + 1)
        assert counts['text']['n_sample'] == 6 * (i + 1)
    meta = meta_of(stage_2 / 'ckpt_100')
    assert meta['cursor']['text'] == 64 + 36 and meta['moments'] == 'loaded' and meta['stage'] == 'mix'
    # moments by name: the decoder's step count goes on, the projector has its own
    moments = torch.load(stage_2 / 'ckpt_100' / 'optim.pt', weights_only=True)
    assert {m['step'].item() for k, m in moments.items() if k.startswith('decoder.')} == {28}
    assert {m['step'].item() for k, m in moments.items() if k.startswith('projector.')} == {12}
    assert not any(k.startswith('encoder.') for k in moments)
    # the encoder is frozen: the bits of the folder it came from
    saved = {k: v for k, v in load_vlm(str(stage_2 / 'ckpt_100'))[0].encoder.state_dict().items()}
    assert equal({f'encoder.{k}': v for k, v in saved.items()}, tensors(stage_2 / 'ckpt_100', 'encoder'))
    assert equal(saved, SigLIP.from_pretrained(str(world / 'data' / 'encoder')).state_dict())
    # and all checkpoints share its file
    scripts('pretrain.py', *mix(world, stage_1), '--save_every=4', '--keep_steps=9', f'--out_dir={tmp_path}')
    files = [tmp_path / name / 'encoder.safetensors' for name in ('ckpt_step_4', 'ckpt_step_8', 'ckpt_100')]
    assert len({os.stat(file).st_ino for file in files}) == 1


def test_other_ratio_and_instructions_leave_the_kth_text_and_caption_alone(world, scripts, stage_1, stage_2, tmp_path):
    out = tmp_path / 'half'
    scripts('pretrain.py', *mix(world, stage_1, ratio=0.5), '--instruct_share=0.5', '--loss_weight=token',
            '--freeze=none',
            '--encoder_lr=1e-3', '--keep_percent=()', f'--out_dir={out}', hook=RECORD,
            env={'IDS': str(tmp_path / 'ids')})
    here, there = recorded_ids(tmp_path / 'ids'), recorded_ids(world / 'ids_mix')
    for kind in (lambda i: i.count(':') == 2, lambda i: i.startswith('0.tar:') and i.count(':') == 1):
        a, b = [i for i in here if kind(i)], [i for i in there if kind(i)]
        assert min(len(a), len(b)) >= 24 and all(x == y for x, y in zip(a, b))
    line = steps(out)[-1]
    assert {k: v['n_sample'] for k, v in line['sources'].items()} == {'text': 48, 'captions': 24, 'instruct': 24}
    # loss_weight='token': a source's share is its share of targets; 'source' (stage_2's): its share of sequences
    total = sum(v['n_kept_now'] for v in line['sources'].values())
    assert all(v['share'] == pytest.approx(v['n_kept_now'] / total) for v in line['sources'].values())
    assert {k: v['share'] for k, v in steps(stage_2)[-1]['sources'].items()} == {'text': 0.75, 'captions': 0.25}
    # a trained encoder: other bits, its moments saved; without a percent the end is a step checkpoint
    assert os.readlink(out / 'ckpt_last') == 'ckpt_step_12'
    assert not equal(tensors(out / 'ckpt_last', 'encoder'), tensors(stage_2 / 'ckpt_100', 'encoder'))
    assert any(k.startswith('encoder.') for k in torch.load(out / 'ckpt_last' / 'optim.pt', weights_only=True))


def test_rewarm_and_remaining_schedules(world, scripts, stage_1, tmp_path):
    scripts('pretrain.py', *mix(world, stage_1), '--schedule=rewarm', '--rewarm_steps=3', '--stop_after=5',
            f'--out_dir={tmp_path / "a"}')
    expected = [main_lr(i, peak=0.3 * 5e-3, final=1e-5, warmup=3, total=12) for i in range(5)]
    assert [line['lr'] for line in steps(tmp_path / 'a')] == expected
    assert meta_of(tmp_path / 'a' / 'ckpt_last')['moments'] == 'fresh'
    scripts('pretrain.py', *mix(world, stage_1), '--cooldown_shape=remaining', '--stop_after=3',
            f'--out_dir={tmp_path / "b"}')
    expected = [remaining_lr(i, main=MAIN, at=16, total=12) for i in range(3)]
    assert [line['lr'] for line in steps(tmp_path / 'b')] == expected and expected[0] == main_lr(16, **MAIN)
    # from a checkpoint of stage 2: its own lr, not the main schedule's at that step number
    scripts('pretrain.py', *mix(world, stage_1), f'--init_from={tmp_path / "b" / "ckpt_last"}', '--stop_after=1',
            f'--out_dir={tmp_path / "c"}')
    assert steps(tmp_path / 'c')[0]['lr'] == remaining_lr(3, main=MAIN, at=16, total=12)


# --- the same run, anyhow ---------------------------------------------------------------------------------------------

def test_masks_reach_every_stage_its_validation_and_any_number_of_processes(world, scripts, stage_1, tmp_path):
    scripts(*text(world, f'--out_dir={tmp_path / "text"}', '--document_mask=true', '--max_steps=5', '--eval_every=5',
                  '--val_text=val/*.tar'))
    before, after = (steps(out)[0]['loss'] for out in (stage_1, tmp_path / 'text'))
    assert before != after and before == pytest.approx(after, rel=1e-2)      # the same rows and weights, other masks
    # the loss of its validation, document by document
    model, tokenizer, meta = load_vlm(str(tmp_path / 'text' / 'ckpt_100'))
    assert meta['spec']['document_end'] == model.document_end == tokenizer.eot_id and 'image_mask' not in meta['spec']
    nats, n = 0.0, 0
    for sample in (rows := TextSource(str(world / 'data' / 'val' / '*.tar'), tokenizer, 48)):
        ends = [i + 1 for i, token in enumerate(sample.tokens[:-1]) if token == tokenizer.eot_id]
        for a, b in zip([0, *ends], [*ends, len(sample.tokens)]):
            logits = model.decoder(torch.tensor(sample.tokens[None, a:b]))[0].double()
            nats, n = nats + float(F.cross_entropy(logits, torch.tensor(sample.targets[a:b]), reduction='sum')), n + b - a
        n_end = len(ends)
    assert len(rows) == 16 and n == 16 * 48 and n_end > 1
    held_out = [line['val_text_loss'] for line in read_log(tmp_path / 'text') if 'val_text_loss' in line]
    assert held_out == [pytest.approx(nats / n, rel=1e-5)]
    # stage 2 with both, at 1 and 2 processes, recomputed or not
    base = tmp_path / 'text' / 'ckpt_080'
    args = ['config/ckpt80_img10.py', world / 'tiny.py', f'--init_from={base}', '--image_ratio=0.25', '--max_steps=6',
            '--micro_batch_size=2', '--eval_every=6', '--val_captions=val_captions/*.tar']
    masks, logs = ['--document_mask=true', '--image_mask=prefix'], {}
    for name, n, more in (('off', 1, []), ('1', 1, masks), ('2', 2, [*masks, '--activation_checkpointing=true'])):
        scripts('pretrain.py', *args, *more, f'--out_dir={tmp_path / name}', world_size=n)
        logs[name] = [line.get('loss') or line['val_caption_loss'] for line in read_log(tmp_path / name)]
    assert logs['2'] == pytest.approx(logs['1'], rel=1e-5) and len(logs['1']) == 7
    assert all(a != b for a, b in zip(logs['off'], logs['1']))
    # what goes on from there follows, without being told; text rows of stage 3, too
    line = scripts.refuses('pretrain.py', *args[:2], f'--init_from={tmp_path / "1" / "ckpt_100"}')
    assert "was trained with image_mask='prefix', this run has 'causal': give the same" in line
    run = scripts('finetune.py', 'config/finetune.py', world / 'tiny.py', f'--init_from={tmp_path / "1" / "ckpt_100"}',
                  '--text_share=0.5', '--stop_after=1', f'--out_dir={tmp_path / "3"}')
    spec = meta_of(tmp_path / '3' / 'ckpt_last')['spec']
    assert (spec['image_mask'], spec['document_end']) == ('prefix', tokenizer.eot_id) and '!!!' not in run.out
    # and stage 3 has a key of its own for a base without images
    scripts('finetune.py', 'config/finetune.py', world / 'tiny.py', f'--init_from={stage_1 / "ckpt_100"}',
            '--image_mask=prefix', '--stop_after=1', f'--out_dir={tmp_path / "own"}')
    assert load_vlm(str(tmp_path / 'own' / 'ckpt_last'))[0].image_mask == 'prefix'


def test_workers_validation_and_saving_change_no_bit(world, scripts, stage_1, tmp_path):
    scripts(*text(world, f'--out_dir={tmp_path}', '--n_worker=2', '--eval_every=6', '--eval_rows=8',
                  '--val_text=val/*.tar',
                  '--save_every=3', '--keep_optimizer=last'))
    assert same_weights(stage_1 / 'ckpt_100', tmp_path / 'ckpt_100')
    held_out = [line for line in read_log(tmp_path) if 'val_text_loss' in line]
    assert [line['step'] for line in held_out] == [6, 12, 18, 20] and not any('loss' in line for line in held_out)
    assert held_out[-1]['val_text_loss'] < held_out[0]['val_text_loss'] < steps(tmp_path)[0]['loss']
    # retention: two step checkpoints, and one optimizer state in all
    assert {n for n in os.listdir(tmp_path) if n.startswith('ckpt_step')} == {'ckpt_step_15', 'ckpt_step_18'}
    assert [path.parent.name for path in tmp_path.glob('ckpt_[0-9s]*/optim.pt')] == ['ckpt_100']


def test_killed_anywhere_and_resumed_gives_the_same_bits(world, scripts, stage_1, stage_2, tmp_path):
    rng = random.Random(3)
    args = ['pretrain.py', *mix(world, stage_1), '--save_every=1', '--eval_every=4', '--eval_rows=4', '--keep_steps=2',
            '--val_captions=val_captions/*.tar', f'--out_dir={tmp_path}']
    places = [f'common.optimizer_step:{rng.randint(2, 3)}',             # between checkpoints
              'torn checkpoint.save_file:2', 'torn torch.save:1',           # in the middle of a file
              'json.dump:2', 'os.rename:1', 'os.symlink:1',       # before the rename, between rename and link
              'shutil.rmtree:4',                                        # while old ones are removed
              f'common.count:{rng.randint(1, 3)}']
    for i, place in enumerate(places):
        run = scripts.start(*args, f'--n_worker={i % 2}', hook=KILL, env={'KILL': place})
        assert run.wait() == -signal.SIGKILL, f"{place}: {run.out}{run.err}"
        if (tmp_path / 'ckpt_last').exists():
            load_vlm(str(tmp_path / 'ckpt_last'))                        # whole, or absent
    run = scripts.start(*args, hook=SLOW, env={'SLOW': '0.03'})          # and from outside, whatever it does
    time.sleep(rng.uniform(0.4, 1.2))
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    scripts(*args)
    assert same_weights(stage_2 / 'ckpt_100', tmp_path / 'ckpt_100')
    assert same_weights(stage_2 / 'ckpt_100', tmp_path / 'ckpt_100', 'optim.pt')
    same = ('step', 'loss', 'lr', 'grad_norm', 'n_kept', 'sources')
    assert [[a[k] for k in same] for a in steps(tmp_path)] == [[b[k] for k in same] for b in steps(stage_2)]
    assert [line['step'] for line in read_log(tmp_path) if 'val_caption_loss' in line] == [4, 8, 12]
    assert not [n for n in os.listdir(tmp_path) if n.startswith('.') and n != '.lock']
    # once more: finished, nothing touched
    stamp = (tmp_path / 'log.jsonl').stat().st_mtime_ns
    assert 'finished: 12 of 12 steps' in scripts(*args).out
    assert (tmp_path / 'log.jsonl').stat().st_mtime_ns == stamp


def test_stop_after_then_other_place_workers_and_logging(world, scripts, stage_1, tmp_path):
    args = text(world, '--keep_optimizer=all')
    scripts(*args, f'--out_dir={tmp_path / "a"}', '--stop_after=7')
    assert os.readlink(tmp_path / 'a' / 'ckpt_last') == 'ckpt_step_7' and len(steps(tmp_path / 'a')) == 7
    with open(tmp_path / 'a' / 'log.jsonl', 'a') as f:
        f.write('{"step": 8, "loss": 1.0}\n{"step": 9, "lo')              # beyond the checkpoint, and torn
    os.rename(tmp_path / 'a', tmp_path / 'b')
    shutil.copytree(tmp_path / 'b', tmp_path / 'c', symlinks=True)
    out = scripts(*args, f'--out_dir={tmp_path / "b"}', '--n_worker=1', '--log_every=1', '--save_every=5',
                  '--keep_steps=1').out
    assert 'resuming' in out and 'at step 7 of 20' in out
    assert same_weights(stage_1 / 'ckpt_100', tmp_path / 'b' / 'ckpt_100') and len(steps(tmp_path / 'b')) == 20
    # another micro-batch and number of processes may resume too: the same data, rounding aside
    scripts(*args, f'--out_dir={tmp_path / "c"}', '--micro_batch_size=2', world_size=2)
    for a, b in zip(steps(tmp_path / 'c'), steps(stage_1), strict=True):
        assert a['loss'] == pytest.approx(b['loss'], rel=1e-5) and a['tokens'] == b['tokens']
    # anything else may not differ
    for key, given, old, new in (('lr', '0.1', '0.005', '0.1'), ('seed', '8', '=7', '8'),
                                 ('global_batch_size', '16', '=8', '16'),
                                 ('text', "(('val',1.0),)", "('text', 1.0)", "('val', 1.0)")):
        line = scripts.refuses(*args, f'--out_dir={tmp_path / "b"}', f'--{key}={given}')
        assert key in line and old in line and new in line, line
    assert "resume='never'" in scripts.refuses(*args, f'--out_dir={tmp_path / "b"}', '--resume=never')


@pytest.mark.parametrize('ratio, others', [(0.1, ('2 ddp', '4 ddp', '2 fsdp', '4 fsdp', 'each in turn')),
                                           (0, ('4 ddp', '2 fsdp'))])
def test_1_2_and_4_processes_train_on_the_same_samples(world, scripts, stage_1, tmp_path, ratio, others):
    """Of either kind, and where a run goes on as another kind; at a ratio of 0.1 every fifth step has no image."""
    args = ['pretrain.py', *mix(world, stage_1, ratio), '--max_steps=20', '--micro_batch_size=2']
    ids, logs = {}, {}
    for how in ('1 ddp', *others):
        for i, turn in enumerate(('1 ddp', '4 fsdp', '2 fsdp', '4 ddp') if how == 'each in turn' else (how,)):
            n, parallel = turn.split()
            scripts(*args, f'--out_dir={tmp_path / how}', f'--parallel={parallel}',
                    f'--stop_after={5 * (i + 1) if turn != how else 0}', world_size=int(n), hook=RECORD,
                    env={'IDS': str(tmp_path / f'ids {turn}')})
        ids[how] = recorded_ids(tmp_path / f'ids {how}', int(n)) if turn == how else ids['1 ddp']
        logs[how] = steps(tmp_path / how)
    assert len(ids['1 ddp']) == 160 and all(found == ids['1 ddp'] for found in ids.values())
    n_image = [line['sources']['captions']['n_image'] for line in logs['1 ddp']] if ratio else [0]
    assert {b - a for a, b in zip(n_image, n_image[1:])} == ({0, 1} if ratio else set())
    counts = ('n_sample', 'n_kept', 'n_text', 'n_image', 'n_image_position', 'n_pad')
    for how in others:
        for a, b in zip(logs['1 ddp'], logs[how], strict=True):
            assert b['loss'] == pytest.approx(a['loss'], rel=1e-5) and b['lr'] == a['lr'] and b['n_kept'] == a['n_kept']
            assert b['grad_norm'] == pytest.approx(a['grad_norm'], rel=1e-3)
            for name in a['sources']:
                assert [a['sources'][name][k] for k in counts] == [b['sources'][name][k] for k in counts]
    torch.manual_seed(7 + 1)
    fresh = {f'projector.{k}': v for k, v in Projector(24, 32).state_dict().items()}
    for how in logs:                                                     # at ratio 0 it neither decays nor moves
        assert equal(tensors(tmp_path / how / 'ckpt_100', 'projector'), fresh) == (ratio == 0)




def test_killed_while_it_gathers_and_saves_a_sharded_run_gives_the_same_bits(world, scripts, stage_1, tmp_path):
    args = ['pretrain.py', *mix(world, stage_1), '--parallel=fsdp', '--max_steps=5', '--activation_checkpointing=true']
    scripts(*args, f'--out_dir={tmp_path / "whole"}', world_size=2)
    args += ['--save_every=1', '--eval_every=1', '--eval_rows=4', '--val_captions=val_captions/*.tar',
             f'--out_dir={tmp_path / "killed"}']
    for dies, place in (('1', 'checkpoint._gathered:5'), ('0', 'torn torch.save:2'), ('01', 'checkpoint._gathered:60')):
        hook = KILL.replace('left[0] == 0', f'left[0] == 0 and os.environ["RANK"] in "{dies}"')
        ranks = scripts.start_ranks(2, *args, hook=hook, env={'KILL': place})
        for rank, run in zip('01', ranks):               # who is left ends by itself, with one line
            assert run.wait() == (-signal.SIGKILL if rank in dies else 1), f'{place}: {run.out}{run.err}'
            assert run.err.count('\n') == (rank not in dies), run.err
            assert rank in dies or 'another process of this run has ended' in run.err, run.err
        assert not list((tmp_path / 'killed').glob('ckpt_last')) or load_vlm(str(tmp_path / 'killed' / 'ckpt_last'))
    assert (tmp_path / 'killed' / 'ckpt_last').exists()
    scripts(*args, world_size=2)
    for name in ('model.safetensors', 'optim.pt'):
        assert same_weights(tmp_path / 'whole' / 'ckpt_100', tmp_path / 'killed' / 'ckpt_100', name)
    assert [line['loss'] for line in steps(tmp_path / 'killed')] == [line['loss'] for line in steps(tmp_path / 'whole')]


def test_sigterm_to_one_rank_stops_all_at_the_same_step(world, scripts, stage_1, tmp_path):
    args = ['pretrain.py', *mix(world, stage_1), '--n_worker=1']
    ranks = scripts.start_ranks(2, *args, f'--out_dir={tmp_path / "a"}', hook=SLOW, env={'SLOW': '0.1'})
    wait_for_lines(tmp_path / 'a', 2, ranks[0])
    os.kill(ranks[1].pid, signal.SIGTERM)
    os.kill(ranks[1].pid, signal.SIGINT)                     # torchrun's Ctrl-C sends both
    assert [run.wait() for run in ranks] == [0, 0], ranks[0].err + ranks[1].err
    n = len(steps(tmp_path / 'a'))
    assert 2 <= n < 12 and os.readlink(tmp_path / 'a' / 'ckpt_last') == f'ckpt_step_{n}', ranks[0].out
    assert f'stopping after step {n}' in ranks[0].out and meta_of(tmp_path / 'a' / 'ckpt_last')['step'] == n
    scripts(*args, f'--out_dir={tmp_path / "a"}', world_size=2)
    scripts(*args, f'--out_dir={tmp_path / "b"}', world_size=2)
    assert same_weights(tmp_path / 'a' / 'ckpt_100', tmp_path / 'b' / 'ckpt_100') and len(steps(tmp_path / 'a')) == 12


def test_ranks_that_see_different_folders_do_not_start(world, scripts, tmp_path):
    """Two nodes without a shared out_dir: only the first finds its checkpoint."""
    args = text(world, '--max_steps=4', '--save_every=2', '--keep_percent=(100,)')
    scripts(*args, f'--out_dir={tmp_path / "0"}', '--stop_after=2', world_size=2)
    shared = dict(WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()))
    ranks = [scripts.start(*args, f'--out_dir={tmp_path / str(r)}', env=dict(shared, RANK=str(r), LOCAL_RANK=str(r)))
             for r in (0, 1)]
    assert [run.wait() for run in ranks] == [1, 1], [run.err for run in ranks]
    for r, run in enumerate(ranks):
        assert f'process {r} starts at step {2 - 2 * r}' in run.err and run.err.count('\n') == 1, run.err


def test_a_folder_belongs_to_one_run(world, scripts, tmp_path):
    args = text(world, f'--out_dir={tmp_path}', '--keep_percent=(50,50,100)')
    first = scripts.start(*args, hook=SLOW, env={'SLOW': '0.2'})
    wait_for_lines(tmp_path, 1, first)
    assert 'is in use by another run' in scripts.refuses(*args)
    assert first.wait() == 0, first.err
    assert sorted(p.name for p in tmp_path.glob('ckpt_*')) == ['ckpt_050', 'ckpt_100', 'ckpt_last']
    line = scripts.refuses('finetune.py', 'config/finetune.py', world / 'tiny.py', f'--out_dir={tmp_path}',
                           f'--init_from={tmp_path / "ckpt_100"}')
    assert "is of stage 'text', expected finetune" in line


def test_text_goes_on_at_another_length_and_other_text_is_told(world, scripts, tmp_path):
    """A .bin is cut into rows; the cursor counts them, so stage 2 cuts alike at its own seq_len."""
    data = tmp_path / 'data'
    shutil.copytree(world / 'data', data)
    ids = np.random.default_rng(0).integers(5, 300, 2000, dtype='<u2')
    (data / 'words').mkdir()
    ids.tofile(data / 'words' / '0.bin')
    args = [world / 'tiny.py', f'--data_dir={data}', "--text=(('words',1.0),)"]
    scripts('pretrain.py', 'config/text.py', *args, '--max_steps=3', '--keep_percent=(100,)', '--seq_len=36',
            f'--out_dir={tmp_path / "a"}')
    base = f'--init_from={tmp_path / "a" / "ckpt_100"}'
    meta = meta_of(tmp_path / 'a' / 'ckpt_100')
    assert meta['text_rows'] == {'words': {'row_len': 36 * 56, 'n_row': 1}} and meta['cursor'] == {'words': 1}
    mixed = ['pretrain.py', 'config/ckpt80_img10.py', *args, base, '--image_ratio=0', '--max_steps=2']
    run = scripts(*mixed, f'--out_dir={tmp_path / "b"}')
    assert meta_of(tmp_path / 'b' / 'ckpt_100')['text_rows'] == meta['text_rows'] and 'may come again' not in run.out
    ids.tofile(data / 'words' / '1.bin')                     # more text: the same name, another order
    run = scripts(*mixed, f'--out_dir={tmp_path / "c"}')
    assert "!!! text source 'words' has 2 rows" in run.out and 'may come again' in run.out


def test_an_untrained_tower_and_pixels_are_the_two_readings_of_a_patch_projection(world, scripts, stage_1, tmp_path):
    args = ['pretrain.py', *mix(world, stage_1), '--stop_after=1']
    for seed in (7, 8):
        scripts(*args, '--encoder_weights=random', f'--seed={seed}', f'--out_dir={tmp_path / str(seed)}')
    scripts(*args, '--encoder_weights=random', f'--out_dir={tmp_path / "again"}')
    random = [tensors(tmp_path / name / 'ckpt_last', 'encoder') for name in ('7', '8', 'again')]
    assert equal(random[0], random[2]) and not equal(random[0], random[1])
    scripts(*args, '--encoder=patch', '--image_size=28', f'--out_dir={tmp_path / "p"}')
    assert load_vlm(str(tmp_path / 'p' / 'ckpt_last'))[0].encoder.n_token == 4
    assert not (tmp_path / 'p' / 'ckpt_last' / 'encoder.safetensors').exists()               # pixels have no weights


@pytest.mark.parametrize('n_token, size, keys', [
    (3, 28, ('--projector=perceiver', '--image_tokens=3')),
    (2, 28, ('--projector=attn', '--token_mode=pool', '--image_tokens=2')),
    (8, [28, 56], ('--token_mode=res', '--image_tokens=8', '--resize=letterbox'))])
def test_another_number_of_image_tokens_goes_through_every_stage(world, scripts, stage_1, tmp_path, n_token, size, keys):
    run = ['pretrain.py', *mix(world, stage_1, ratio=0.5), *keys]
    out = scripts(*run, '--stop_after=4', f'--out_dir={tmp_path / "a"}', hook=RECORD,
                  env={'IDS': str(tmp_path / 'ids')}).out
    assert f"an image takes {n_token} of a row's 48 positions: {48 - n_token} are left for text" in out
    counts = steps(tmp_path / 'a')[-1]['sources']['captions']
    assert counts['n_image'] == 16 and counts['n_image_position'] == 16 * n_token
    if n_token == 8:                                     # whatever an image takes: the same samples, the same targets
        scripts('pretrain.py', *mix(world, stage_1, ratio=0.5), '--stop_after=4', f'--out_dir={tmp_path / "plain"}',
                hook=RECORD, env={'IDS': str(tmp_path / 'ids_plain')})
        assert recorded_ids(tmp_path / 'ids') == recorded_ids(tmp_path / 'ids_plain')
        plain = steps(tmp_path / 'plain')[-1]['sources']['captions']
        assert all(plain[key] == counts[key] for key in ('n_image', 'n_kept_now', 'n_sample'))
    for world_size, stops in ((1, (2, 4)), (2, (4,))) if n_token == 3 else ():
        for stop in stops:
            scripts(*run, f'--stop_after={stop}', f'--out_dir={tmp_path / str(world_size)}', world_size=world_size)
    if n_token == 3:
        assert same_weights(tmp_path / 'a' / 'ckpt_last', tmp_path / '1' / 'ckpt_last')
        losses = [[line['loss'] for line in steps(tmp_path / name)] for name in ('a', '2')]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    model, _, meta = load_vlm(str(tmp_path / 'a' / 'ckpt_last'))
    assert (model.n_token, model.encoder.image_size) == (n_token, size)
    base = tmp_path / 'a' / 'ckpt_last'
    tune = ('finetune.py', 'config/finetune.py', world / 'tiny.py', f'--init_from={base}', '--stop_after=2')
    out = scripts(*tune, f'--out_dir={tmp_path / "tuned"}', '--image_tokens=4').out
    assert '!!! image_tokens=4 has no effect' in out and f'an image takes {n_token} of' in out
    assert meta_of(tmp_path / 'tuned' / 'ckpt_last')['spec'] == meta['spec']
    scripts('evaluate.py', f'--ckpt={tmp_path / "tuned" / "ckpt_last"}', '--prompt=what colour is the wall ?',
            f'--image={world / "data" / "instruct" / "images" / "0.jpg"}')
    line = scripts.refuses(*run, '--projector=linear', '--token_mode=', '--image_tokens=0', f'--init_from={base}',
                           f'--out_dir={tmp_path / "b"}')
    assert "has a model whose" in line and "give the same" in line


def test_image_tokens_that_cannot_be_made_or_do_not_fit_are_refused(world, scripts, stage_1, tmp_path):
    run = ['pretrain.py', *mix(world, stage_1), f'--out_dir={tmp_path}']
    for keys, said in ((('--image_tokens=64',), 'the encoder gives 4; give --token_mode=pool'),
                       (('--projector=perceiver', '--image_tokens=47'), 'seq_len=48 does not hold image_tokens=47, a')):
        assert said in scripts.refuses(*run, *keys)


def test_a_fused_encoder_is_trained_saved_resumed_and_tuned(world, scripts, stage_1, tmp_path):
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel
    torch.manual_seed(5)
    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=70)
    ).save_pretrained(tmp_path / 'd')                    # 70 px, SigLIP's are 28
    run = ['pretrain.py', *mix(world, stage_1, ratio=0.5), '--encoder=dinosiglip', f'--dinov2_path={tmp_path / "d"}',
           '--encoder_fusion=interleave', '--encoder_lr=1e-3']
    for folder, stops in (('a', (2, 4)), ('b', (4,))):
        for stop in stops:
            scripts(*run, '--freeze=none', f'--stop_after={stop}', f'--out_dir={tmp_path / folder}')
    a, b = (tensors(tmp_path / folder / 'ckpt_last', 'encoder') for folder in 'ab')
    assert equal(a, b) and {name.split('.')[1] for name in a} == {'dinov2', 'siglip'}
    model, _, _ = load_vlm(str(tmp_path / 'a' / 'ckpt_last'))
    assert (model.encoder.n_token, model.encoder.width, model.encoder.image_size) == (8, 40, 28)
    scripts(*run, '--stop_after=1', f'--out_dir={tmp_path / "frozen"}')
    frozen = tensors(tmp_path / 'frozen' / 'ckpt_last', 'encoder')
    assert not any(torch.equal(a[name], frozen[name]) for name in a if a[name].dim() > 1)
    siglip = SigLIP.from_pretrained(str(world / 'data' / 'encoder')).state_dict()
    assert all(torch.equal(frozen[f'encoder.siglip.{name}'], value) for name, value in siglip.items())
    run = scripts('finetune.py', 'config/finetune.py', world / 'tiny.py', f'--init_from={tmp_path / "a" / "ckpt_last"}',
                  '--encoder=dinov2', '--stop_after=1', f'--out_dir={tmp_path / "tuned"}')
    assert "!!! encoder='dinov2' has no effect" in run.out
    assert equal(tensors(tmp_path / 'tuned' / 'ckpt_last', 'encoder'), a)


def test_kept_aspects_split_photos_and_two_resolutions(world, scripts, stage_1, tmp_path):
    """28 pixels with workers, then 42 from there; stage 3 and evaluation follow; quarters of a photo are images, too."""
    base = [*mix(world, stage_1, ratio=0.5), '--keep_percent=(100,)', '--freeze=none', '--encoder_lr=1e-3']
    first = ['pretrain.py', *base, '--max_steps=4', '--aspect=keep', '--split=true']
    for name, projector in (('a', 'mlp2'), ('perceiver', 'perceiver')):
        args = [*first, f'--projector={projector}', f'--out_dir={tmp_path / name}']
        run = scripts.start(*args, '--save_every=2', '--n_worker=2', hook=KILL, env={'KILL': 'common.optimizer_step:4'})
        assert run.wait() == -signal.SIGKILL and len(steps(tmp_path / name)) < 4
        scripts(*args)
        scripts(*args, f'--out_dir={tmp_path / "whole"}')
        for file in ('model.safetensors', 'encoder.safetensors', 'optim.pt'):
            assert same_weights(tmp_path / name / 'ckpt_100', tmp_path / 'whole' / 'ckpt_100', file)
        shutil.rmtree(tmp_path / 'whole')
    scripts(*first, '--micro_batch_size=2', f'--out_dir={tmp_path / "two"}', world_size=2)
    for a, b in zip(steps(tmp_path / 'two'), steps(tmp_path / 'a'), strict=True):
        assert a['loss'] == pytest.approx(b['loss'], rel=1e-5)
        assert a['sources']['captions'] == pytest.approx(b['sources']['captions'], rel=1e-4)
    meta = meta_of(tmp_path / 'a' / 'ckpt_100')
    assert meta['spec']['view'] == {'shortest': 10, 'split': True}
    seen = meta['seen']['captions']
    assert seen['n_image'] == 16 and 5 * 16 < seen['n_image_position'] < 20 * 16         # images, not their parts
    run = scripts('pretrain.py', *base, f'--init_from={tmp_path / "a" / "ckpt_100"}', '--schedule=rewarm', '--lr=1e-3',
                  '--aspect=keep', '--image_size=42', '--max_steps=2', f'--out_dir={tmp_path / "large"}', '--rewarm_steps=1')
    assert "encoder.embeddings.position_embedding.weight of" in run.out and "resized to this run's image_size" in run.out
    spec = meta_of(tmp_path / 'large' / 'ckpt_100')['spec']
    assert (spec['encoder']['config']['image_size'], spec['view']) == (42, {'shortest': 16})
    small, large = (tensors(tmp_path / name / 'ckpt_100', 'encoder')['encoder.embeddings.position_embedding.weight']
                    for name in ('a', 'large'))
    assert (len(small), len(large)) == (4, 9)
    tune = ['finetune.py', 'config/finetune.py', world / 'tiny.py', f'--init_from={tmp_path / "large" / "ckpt_100"}',
            '--split=true', '--max_steps=2']
    for name, stops in (('x', (1, 2)), ('y', (2,))):
        for stop in stops:
            scripts(*tune, f'--stop_after={stop}', f'--out_dir={tmp_path / name}')
    assert same_weights(tmp_path / 'x' / 'ckpt_100', tmp_path / 'y' / 'ckpt_100')
    tuned = meta_of(tmp_path / 'x' / 'ckpt_100')
    assert tuned['spec'] == {**spec, 'view': {'shortest': 16, 'split': True}} and tuned['seen']['instruct']['n_image'] < 16
    photo = world / 'data' / 'instruct' / 'images' / '0.jpg'
    args = [f'--ckpt={tmp_path / "x" / "ckpt_100"}', f'--image={photo}', '--prompt=what colour is the wall ?']
    assert scripts('evaluate.py', *args, '--max_new_tokens=4').out.strip()
    refused = scripts.refuses('pretrain.py', *base, '--aspect=keep', '--split=true', '--image_size=56', '--max_steps=2',
                              f'--out_dir={tmp_path / "no"}')
    assert 'seq_len=48 does not hold image_tokens=80' in refused


def test_a_frozen_encoder_at_another_size_is_the_runs_own_file(world, scripts, stage_2, tmp_path):
    """The base's encoder.safetensors has the other table of positions: a link to it would never be read again."""
    args = ['pretrain.py', 'config/ckpt80_img10.py', world / 'tiny.py', f'--init_from={stage_2 / "ckpt_100"}', '--max_steps=4',
            '--schedule=rewarm', '--rewarm_steps=1', '--image_ratio=0.5', '--image_size=42', f'--out_dir={tmp_path / "large"}']
    for stop in (2, 4):
        scripts(*args, f'--stop_after={stop}')
    folder = tmp_path / 'large' / 'ckpt_100'
    name = 'encoder.embeddings.position_embedding.weight'
    assert [len(tensors(one, 'encoder')[name]) for one in (stage_2 / 'ckpt_100', folder)] == [4, 9]
    model, _, meta = load_vlm(str(folder))
    assert model.encoder.image_size == meta['spec']['encoder']['config']['image_size'] == 42
    # at its own size it is a link
    scripts(*args[:-2], '--encoder_lr=1e-4', f'--out_dir={tmp_path / "same"}', '--max_steps=1')
    files = [(one / 'encoder.safetensors').stat() for one in (stage_2 / 'ckpt_100', tmp_path / 'same' / 'ckpt_100')]
    assert files[0].st_ino == files[1].st_ino


def test_a_decoder_that_thaws_warms_up(world, scripts, stage_1, tmp_path):
    """Its base froze it, so there are no moments for it: a cooldown at the full lr would begin with fresh ones."""
    scripts('pretrain.py', *mix(world, stage_1), '--freeze=both', '--max_steps=2', f'--out_dir={tmp_path / "frozen"}')
    more = ['pretrain.py', *mix(world, stage_1), f'--init_from={tmp_path / "frozen" / "ckpt_100"}', '--start_lr=1e-3']
    for freeze, words, moments in (('encoder', 'fresh ones, ', 'none'), ('both', 'AdamW moments from', 'loaded')):
        run = scripts(*more, f'--freeze={freeze}', '--moments_warmup_steps=1', '--max_steps=2', f'--out_dir={tmp_path / freeze}')
        assert words in run.out and meta_of(tmp_path / freeze / 'ckpt_100')['moments'] == moments


def test_validation_counts_no_row_twice(world, scripts, tmp_path):
    loss = {}
    for n in (16, 24, 512):                                  # of 16 windows
        scripts(*text(world, '--max_steps=1', '--keep_percent=(100,)', '--eval_every=1', '--val_text=val', f'--eval_rows={n}',
                      f'--out_dir={tmp_path / str(n)}'))
        loss[n] = [line['val_text_loss'] for line in read_log(tmp_path / str(n)) if 'loss' not in line]
    assert loss[16] == loss[24] == loss[512]
    one = text(world, '--max_steps=1', '--keep_percent=(100,)', '--eval_every=1')
    run = scripts(*one, '--val_text=val', '--eval_rows=3', f'--out_dir={tmp_path / "few"}')
    assert '!!! val_text_loss: 3 rows do not fill a micro-step' in run.out
    run = scripts(*one, f'--out_dir={tmp_path / "none"}')
    assert '!!! eval_every has no effect' in run.out


def test_indexes_of_read_only_data_go_elsewhere(world, scripts, stage_1, tmp_path):
    data, cache = tmp_path / 'data', tmp_path / 'cache'
    shutil.copytree(world / 'data', data, ignore=shutil.ignore_patterns('*.idx'))
    for path in data.glob('*/*.tar'):
        (path.parent / f'{path.name}.idx').mkdir()           # root may write anywhere, but not over a folder
    scripts('pretrain.py', *mix(world, stage_1), f'--data_dir={data}', f'--cache_dir={cache}', '--max_steps=1',
            '--instruct_share=0.5', f'--out_dir={tmp_path / "a"}')
    assert len(list(cache.glob('*.idx'))) == 3 and (data / 'instruct' / 'llava.json.idx').is_file()      # 2 text, 1 caption


def test_a_killed_loader_worker_is_one_line(world, scripts, tmp_path):
    hook = """
import mixture, os, signal
plain = mixture.Loader.__getitem__
def deadly(self, i):
    if i >= 4 and os.getpid() != self.main:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, i)
mixture.Loader.__getitem__, mixture.Loader.main = deadly, os.getpid()
"""
    line = scripts.refuses(*text(world, '--n_worker=1', f'--out_dir={tmp_path}'), hook=hook)
    assert 'a loader worker died' in line and '--n_worker=0' in line


def test_sigterm_in_the_last_step_does_not_part_the_ranks(world, scripts, tmp_path):
    hook = SLOW.replace('time.sleep(', 'os.environ.setdefault("N", "0"); os.environ["N"] += "1"; '
                        'os.environ["RANK"] == "1" and len(os.environ["N"]) == 4 and os.kill(os.getpid(), 15); '
                        'time.sleep(')
    args = text(world, '--max_steps=3', '--keep_percent=(100,)', f'--out_dir={tmp_path}')
    scripts(*args, world_size=2, hook=hook, env={'SLOW': '0'})
    assert len(steps(tmp_path)) == 3 and sorted(os.listdir(tmp_path)) == ['.lock', 'ckpt_100', 'ckpt_last', 'log.jsonl']


# --- bad input --------------------------------------------------------------------------------------------------------

def test_what_is_missing_or_does_not_fit_is_one_line(world, scripts, stage_1, stage_2, tmp_path):
    out, data = f'--out_dir={tmp_path / "out"}', world / 'data'
    hint = 'make it with: python tinyworld.py data'
    stage2 = ['pretrain.py', *mix(world, stage_1), out]
    for argv, *parts in (
            (text(world, out, '--data_dir=/nowhere'), '/nowhere/tokenizer.model', hint),
            (text(world, out, "--text=(('none/*.tar',1.0),)"), f'{data}/none/*.tar', hint),
            ([*stage2, "--captions=(('none/*.tar',1.0),)"], f'{data}/none/*.tar', hint),
            ([*stage2, '--encoder_path=gone'], f'{data}/gone', hint),
            ([*stage2, '--encoder_path=patch'], "encoder_path='patch'", '--encoder=patch'),
            (text(world, out, '--text=()'), "text=(): expected a pair with a weight above 0, such as (('text', 1.0),)"),
            ([*stage2, "--captions=(('captions',0),)"], "captions=(('captions', 0),): expected a pair with a weight"),
            ([*stage2, '--instruct_share=0.5', '--instruct=none.json'], f'{data}/none.json', hint),
            ([*stage2, '--scale=tiny', '--init_from=out/{scale}_no/text/ckpt_080'], 'out/tiny_no/text/ckpt_080',
             'python pretrain.py config/text.py config/tiny.py'),
            ([*stage2, f'--init_from={tmp_path}'], str(tmp_path)),
            (text(world, out, '--micro_batch_size=0'), 'micro_batch_size=0', '>= 1'),
            (text(world, out, '--vocab_size=300'), 'needs 323 rows', 'vocab_size=300'),
            (text(world, out, '--schedule=warm'), "schedule='warm'", 'cooldown'),
            (text(world, out, '--schedule=cooldown'), '--init_from'),
            (text(world, out, '--image_ratio=2'), 'image_ratio=2.0', '>= 0, <= 1'),
            (text(world, out, '--image_ratio=0.1'), "stage='text'", '--stage=mix'),
            (text(world, out, '--keep_percent=(50,50,100,1)'), '1 % of 20 steps is step 0'),
            (text(world, out, '--keep_percent=(50,52)'), '52 % of 20 steps is step 10, as is ckpt_050'),
            (text(world, out, '--n_head=5'), 'n_head=5'),
            (text(world, out, '--max_step=5'), "did you mean 'max_steps'"),
            ([*stage2, '--seq_len=5'], 'seq_len=5', 'at least 6'),
            ([*stage2, '--n_layer=3'], 'n_layer=2', '3'),
            ([*stage2, '--n_head=4'], 'n_head=2', '4'),
            (text(world, out, "--text=(('gone',1.0),)", '--tokenizer=none'), f'{data}/none, {data}/gone', hint),
            (text(world, out, '--device=tpu'), "device='tpu'"),
            (text(world, out, '--dtype=float16'), "dtype='float16'")):
        line = scripts.refuses(*argv)
        assert all(part in line for part in parts), line
    assert not (tmp_path / 'out').exists()


def test_broken_checkpoints_and_tokenizers_are_named(world, scripts, stage_1, tmp_path):
    def changed(name, change):
        shutil.copytree(stage_1 / 'ckpt_080', tmp_path / name)
        change(tmp_path / name)
        return scripts.refuses('pretrain.py', *mix(world, stage_1), f'--init_from={tmp_path / name}',
                               f'--out_dir={tmp_path / "out"}')

    def rewrite(file, f):
        return lambda folder: (folder / file).write_bytes(f((folder / file).read_bytes()))
    assert 'schema 99' in changed('a', rewrite('meta.json', lambda b: b.replace(b'"schema": 2', b'"schema": 99')))
    assert 'b/meta.json' in changed('b', rewrite('meta.json', lambda b: b[:100]))
    assert 'c/model.safetensors' in changed('c', rewrite('model.safetensors', lambda b: b[:-4000]))
    assert 'd/optim.pt' in changed('d', rewrite('optim.pt', lambda b: b[:-4000]))
    assert 'e/optim.pt' in changed('e', rewrite('optim.pt', lambda b: b'garbage'))
    sha = b'"tokenizer_sha256": "'
    other = lambda b: b[:b.index(sha) + len(sha)] + b'0' * 64 + b[b.index(sha) + len(sha) + 64:]
    assert 'another tokenizer' in changed('f', rewrite('meta.json', other))
    # a missing optim.pt is legal for a new run (fresh moments, warmed up), not for going on
    shutil.copytree(stage_1, tmp_path / 'g', symlinks=True)
    os.remove(tmp_path / 'g' / 'ckpt_080' / 'optim.pt')
    os.remove(tmp_path / 'g' / 'ckpt_last')
    (tmp_path / 'g' / 'ckpt_last').symlink_to('ckpt_080')
    assert 'optim.pt is gone' in scripts.refuses(*text(world, '--keep_optimizer=all', f'--out_dir={tmp_path / "g"}'))
    run = scripts('pretrain.py', *mix(world, stage_1), f'--init_from={tmp_path / "g" / "ckpt_080"}',
                  '--moments_warmup_steps=4',
                  f'--out_dir={tmp_path / "h"}', '--stop_after=1')
    assert 'no AdamW moments' in run.out and steps(tmp_path / 'h')[0]['lr'] == main_lr(16, **MAIN) / 4
    # ckpt_last to nowhere: starting over would overwrite the log
    (tmp_path / 'i').mkdir()
    (tmp_path / 'i' / 'ckpt_last').symlink_to('ckpt_060')
    assert 'ckpt_060, which is gone' in scripts.refuses(*text(world, f'--out_dir={tmp_path / "i"}'))


def test_bad_samples_stop_the_run_or_are_counted_replaced_and_listed(world, scripts, stage_1, tmp_path):
    data = tmp_path / 'data'
    shutil.copytree(world / 'data', data)
    write_captions(data / 'captions' / '0.tar', 60)
    whole = (data / 'captions' / '0.tar').read_bytes()
    at = whole.index(b'\xff\xd8\xff', len(whole) // 2)                   # one JPEG's header
    (data / 'captions' / '0.tar').write_bytes(whole[:at] + b'\0' * 40 + whole[at + 40:])
    # 60 captions: every one comes
    args = ['pretrain.py', *mix(world, stage_1, 0.75), f'--data_dir={data}', '--max_steps=10']
    line = scripts.refuses(*args, f'--out_dir={tmp_path / "a"}')
    assert '0.tar: 0' in line and 'max_bad_samples=0' in line, line
    scripts(*args, f'--out_dir={tmp_path / "b"}', '--max_bad_samples=2', '--n_worker=1', '--stop_after=9', world_size=2)
    scripts(*args, f'--out_dir={tmp_path / "b"}', '--max_bad_samples=2', world_size=2)
    bad = meta_of(tmp_path / 'b' / 'ckpt_100')['bad_samples']
    assert len(bad) == 1 and bad[0] in line and steps(tmp_path / 'b')[-1]['sources']['captions']['n_sample'] == 60
    # more than allowed: the tar loses its tail
    (data / 'captions' / '0.tar').write_bytes(whole[:at] + b'\0' * 40 + whole[at + 40:-9000])
    assert 'truncated' in scripts.refuses(*args, f'--out_dir={tmp_path / "c"}')
    line = scripts.refuses(*args, f'--out_dir={tmp_path / "c"}', '--max_bad_samples=1')
    assert '2 bad samples are more than max_bad_samples=1' in line and '0.tar' in line, line
    # ids that the tokenizer does not have
    write_tar(data / 'text' / '0.tar', [('0.json', json.dumps([400] * 97).encode())])
    assert 'id 400 is beyond' in scripts.refuses(*text(world, f'--data_dir={data}', f'--out_dir={tmp_path / "d"}'))


def test_data_that_changed_since_the_checkpoint_is_named(world, scripts, tmp_path):
    data = tmp_path / 'data'
    shutil.copytree(world / 'data', data)
    args = text(world, f'--data_dir={data}', f'--out_dir={tmp_path / "a"}')
    scripts(*args, '--stop_after=3')
    assert meta_of(tmp_path / 'a' / 'ckpt_last')['sources']['text']['n_file'] == 2
    shutil.copy(data / 'val' / '0.tar', data / 'text' / '2.tar')
    line = scripts.refuses(*args)
    assert "the data of 'text' has changed: 3 files with 168 rows now, 2 with 160 when" in line, line
    assert '--allow_changed_data=true' in line
    out = scripts(*args, '--allow_changed_data=true', '--stop_after=5').out
    assert "!!! the data of 'text' has changed" in out and len(steps(tmp_path / 'a')) == 5
    scripts(*args, '--stop_after=6')                                     # the new state is what is remembered


def test_a_line_of_the_log_is_not_lost_with_the_run(world, scripts, tmp_path):
    """The log is read one step late: what ends a run between two steps must not take the last line with it."""
    hook = """
import common
from errors import UserError
plain, n = common.Loader.__next__, [0]
def ending(self):
    n[0] += 1
    if n[0] == 7:
        raise UserError('the end')
    return plain(self)
common.Loader.__next__ = ending
"""
    assert scripts.refuses(*text(world, f'--out_dir={tmp_path}', '--micro_batch_size=8'), hook=hook) == 'the end\n'
    assert len(steps(tmp_path)) == 6


def test_a_step_that_is_not_finite_is_named_and_changes_nothing(world, scripts, stage_1, tmp_path):
    hook = """
import model
plain = model.VLM.forward
def poisoned(self, *args, **options):
    loss, weight, row_loss = plain(self, *args, **options)
    row_loss[0] *= float('nan')
    return loss * float('nan'), weight, row_loss
model.VLM.forward = poisoned
"""
    line = scripts.refuses('pretrain.py', *mix(world, stage_1), '--save_every=1', f'--out_dir={tmp_path / "a"}', hook=hook)
    assert 'step 1: not finite' in line and 'rank 0' in line and '0.tar:' in line, line
    assert sorted(os.listdir(tmp_path / 'a')) == ['.lock', 'log.jsonl'] and not read_log(tmp_path / 'a')
    # one rank's batch, in the middle of a run: the step before it is saved, the step itself changes nothing
    hook = """
import model, os, torch
plain, n = model.VLM.forward, [0]
def poisoned(self, *args, **options):
    loss, weight, row_loss = plain(self, *args, **options)
    n[0] += 1
    if n[0] == 4 and os.environ['RANK'] == '1':
        row_loss[0, 2] = loss = loss * float('nan')
    return loss, weight, row_loss
model.VLM.forward = poisoned
"""
    runs = scripts.start_ranks(2, 'pretrain.py', *mix(world, stage_1), f'--out_dir={tmp_path / "b"}', '--save_every=2',
                               hook=hook)
    assert [run.wait() for run in runs] == [1, 1], [run.err for run in runs]
    assert 'step 4: not finite: loss on ranks [1]; rank 1, samples' in runs[1].err and not runs[0].err, runs[0].err
    assert runs[1].err.split('samples ')[1].split(';')[0].count(',') == 0               # the row is known
    assert os.readlink(tmp_path / 'b' / 'ckpt_last') == 'ckpt_step_2' and len(steps(tmp_path / 'b')) == 3


def test_a_full_disk_costs_one_line_and_no_checkpoint(world, scripts, stage_1, tmp_path):
    args = text(world, f'--out_dir={tmp_path}', '--keep_optimizer=all', '--save_every=3')
    scripts(*args, '--stop_after=5')
    size = (tmp_path / 'ckpt_last' / 'model.safetensors').stat().st_size
    for limit in (size // 2, size + size // 2):                          # inside model.safetensors, inside optim.pt
        line = scripts.refuses(*args, limit=limit)
        assert 'ckpt_step_6 failed' in line and 'the checkpoints before it are untouched' in line, line
        assert sorted(os.listdir(tmp_path)) == ['.lock', 'ckpt_020', 'ckpt_last', 'ckpt_step_3', 'ckpt_step_5', 'log.jsonl']
        load_vlm(str(tmp_path / 'ckpt_last'))
    scripts(*args)
    assert same_weights(stage_1 / 'ckpt_100', tmp_path / 'ckpt_100')


# --- the other ways in and out ----------------------------------------------------------------------------------------

def test_openlm_weights_start_stage_2(world, scripts, stage_1, tmp_path):
    model, _, _ = load_vlm(str(stage_1 / 'ckpt_080'))
    save_openlm(model.decoder, str(tmp_path / 'open.pt'))
    args = ['pretrain.py', *mix(world, stage_1), f'--init_from={tmp_path / "open.pt"}', f'--out_dir={tmp_path / "out"}',
            '--moments_warmup_steps=2', '--stop_after=2']
    assert '--start_lr' in scripts.refuses(*args)
    assert 'n_layer' in scripts.refuses(*args, '--start_lr=1e-3', '--n_layer=1')
    scripts(*args, '--start_lr=1e-3')
    lines = steps(tmp_path / 'out')
    assert lines[0]['lr'] == 0.5e-3 and lines[1]['lr'] == cooldown_lr(1, start=1e-3, final=1e-5, total=12)
    assert lines[0]['loss'] < 4                                          # a fresh decoder begins above 5.7
    (tmp_path / 'open.pt').write_bytes(b'garbage')
    assert 'open.pt' in scripts.refuses(*args, '--start_lr=1e-3', f'--out_dir={tmp_path / "other"}')


def test_openlms_optimizer_goes_on_without_a_warmup(world, scripts, stage_1, tmp_path):
    """optimizer_80.pt by position, as OpenLM writes it, from the moments of ckpt_080: two groups, the first empty."""
    model, _, _ = load_vlm(str(stage_1 / 'ckpt_080'))
    save_openlm(model.decoder, str(tmp_path / 'epoch_80.pt'))
    before = torch.load(stage_1 / 'ckpt_080' / 'optim.pt', weights_only=True)
    names = [name for name, _ in model.named_parameters() if name.startswith('decoder.')]
    groups = [dict(params=[], lr=7e-4), dict(params=list(range(len(names))), lr=7e-4, betas=(0.9, 0.95))]
    saved = dict(state={i: before[name] for i, name in enumerate(names)}, param_groups=groups)
    torch.save({'epoch': 80, 'name': 'run', 'optimizer': saved, 'evaluation_metrics': []}, tmp_path / 'optimizer_80.pt')
    args = ['pretrain.py', *mix(world, stage_1), f'--init_from={tmp_path / "epoch_80.pt"}', '--keep_optimizer=all']
    run = scripts(*args, f'--out_dir={tmp_path / "out"}', '--stop_after=1')
    assert f"AdamW moments from {tmp_path / 'optimizer_80.pt'}; fresh for 4 tensors" in run.out and '!!!' not in run.out
    assert steps(tmp_path / 'out')[0]['lr'] == 7e-4                      # the file's own, and no warmup of moments
    assert meta_of(tmp_path / 'out' / 'ckpt_last')['moments'] == 'loaded'
    after = torch.load(tmp_path / 'out' / 'ckpt_last' / 'optim.pt', weights_only=True)
    for name in names:                                                   # v' = 0.95 v + 0.05 g^2, one step later
        assert after[name]['step'] == before[name]['step'] + 1
        assert (after[name]['exp_avg_sq'] >= 0.95 * before[name]['exp_avg_sq'] * (1 - 1e-5)).all()
    assert after['projector.fc1.weight']['step'] == 1
    scripts(*args, f'--out_dir={tmp_path / "out"}', '--stop_after=2')    # a resumed run reads its own moments
    assert steps(tmp_path / 'out')[1]['lr'] == cooldown_lr(1, start=7e-4, final=1e-5, total=12)
    groups[1]['params'].pop()
    torch.save({'optimizer': saved}, tmp_path / 'optimizer_80.pt')
    assert 'optimizer_80.pt: 1 groups, 18 parameters' in scripts.refuses(*args, f'--out_dir={tmp_path / "other"}')


def test_a_damaged_openlm_folder_is_named_before_any_step(world, scripts, stage_1, tmp_path):
    model, _, _ = load_vlm(str(stage_1 / 'ckpt_080'))
    save_openlm(model.decoder, str(tmp_path / 'whole'))
    state = load_file(tmp_path / 'whole' / 'model.safetensors')
    where = {k: f'model-0000{1 + ("layers.1" in k)}-of-00002.safetensors' for k in state}

    def refusal(case, change, dtype=torch.float32):
        folder = tmp_path / case
        folder.mkdir()
        shutil.copy(tmp_path / 'whole' / 'config.json', folder)
        values = {k: v.to(dtype) for k, v in state.items()}
        if case == 'nan':
            values['model.layers.1.ffn_norm.weight'][3] = float('nan')
        elif case == 'shape':
            values['model.layers.1.ffn_norm.weight'] = torch.ones(31)
        for file in set(where.values()):
            save_file({k: v for k, v in values.items() if where[k] == file}, folder / file)
        (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': where}))
        change(folder, folder / 'model-00002-of-00002.safetensors')
        return scripts.refuses('pretrain.py', *mix(world, stage_1), f'--init_from={folder}', '--start_lr=1e-3',
                               f'--out_dir={tmp_path / "out"}')

    def other_tokenizer(folder, shard):
        vocab = {'<|endoftext|>': 0, **{chr(97 + i): i + 1 for i in range(26)}}
        (folder / 'tokenizer.json').write_text(json.dumps(dict(
            version='1.0', added_tokens=[], model=dict(type='BPE', vocab=vocab, merges=[]))))
    for line, words in (
            (refusal('cut', lambda folder, shard: shard.write_bytes(shard.read_bytes()[:-7])),
             '00002.safetensors: not readable'),
            (refusal('gone', lambda folder, shard: shard.unlink()), 'no such file, but'),
            (refusal('nan', lambda folder, shard: None, torch.bfloat16),
             'ffn_norm.weight holds values that are not finite'),
            (refusal('shape', lambda folder, shard: None), "layers.1.ffn_norm.weight is (31,), this model's is (32,)"),
            (refusal('tokenizer', other_tokenizer), "tokenizer.model: id 0 is '<unk>', in")):
        assert words in line, line
    assert not (tmp_path / 'out').exists()


def test_dry_run_with_and_without_data(world, scripts, stage_1, tmp_path):
    out = scripts('pretrain.py', *mix(world, stage_1), f'--out_dir={tmp_path / "x"}', '--dry_run=true').out
    assert '12 steps of 384 tokens' in out and 'text: 72 of 96 sequences (75.0%), 0.23 passes over 320' in out
    assert 'captions: 24 of 96 sequences (25.0%), 0.40 passes over 60' in out
    model, _, _ = load_vlm(str(stage_1 / 'ckpt_080'))
    n = sum(p.numel() for p in model.parameters())
    eye = sum(p.numel() for p in SigLIP.from_pretrained(str(world / 'data' / 'encoder')).parameters())
    assert f'parameters: decoder {n:,}, encoder {eye:,}, projector {24 * 96 + 96 + 96 * 32 + 32:,}' in out
    assert 'the encoder 0.00 GiB once' in out and 'an estimate' in out
    runs = scripts.start_ranks(2, 'pretrain.py', *mix(world, stage_1), '--dry_run=true')
    assert [run.wait() for run in runs] == [0, 0], runs[1].err
    assert 'passes over 320' in runs[0].out and runs[1].out == ''
    # weights of sources divide the share; what is missing is named at once, after what can be said without it
    out = scripts('pretrain.py', *mix(world, stage_1), "--text=(('text', 0.01), ('val', 0.99))", '--dry_run=true').out
    assert 'val: 71 of 96 sequences' in out and 'text: 1 of 96 sequences (1.0%), 0.00 passes' in out
    run = scripts('pretrain.py', *mix(world, stage_1), '--instruct_share=0.5', '--instruct=a.json', '--encoder_path=b',
                  '--eval_every=1', '--val_text=val/*', '--dry_run=true')
    assert '12 steps of 384 tokens' in run.out and f'decoder {n:,}' in run.out
    data = world / 'data'
    assert run.out.endswith(f"its inputs: {data / 'b'}, {data / 'a.json'} not found; make it with: python tinyworld.py "
                            "data\n") and not run.err
    out = scripts('pretrain.py', 'config/ckpt80_img10.py', '--data_dir=/nowhere', '--dry_run=true').out
    assert 'decoder 1,439,893,504' in out and '/nowhere/tokenizer.json, /nowhere/text, ' in out.splitlines()[-1]
    assert 'SigLIP so400m/14 at 384 px instead' in out and 'python pretrain.py config/text.py' in out.splitlines()[-1]
    assert not (tmp_path / 'x').exists() and not Path('out/1b').exists()
