"""finetune.py as processes on the tiny data set of conftest.py: masks, averages, epochs, text rows, kills, bases."""
import os
import shutil
import signal
from pathlib import Path

import pytest
from conftest import RECORD, meta_of, recorded_ids, same_weights, steps
from test_pretrain import KILL, equal, tensors

from checkpoint import load_vlm
from schedules import main_lr


def chat(world, base, *more):
    return ['finetune.py', 'config/finetune.py', world / 'tiny.py', f'--init_from={base}', *more]




@pytest.fixture(scope='module')
def tuned(world, scripts, stage_2):
    """Two epochs of the 30 conversations, uninterrupted: rows grouped by length in windows of 3 steps."""
    out = world / 'out' / 'tuned'
    scripts(*chat(world, stage_2 / 'ckpt_100', '--max_steps=0', '--n_epoch=2', '--length_window=3', f'--out_dir={out}'),
            hook=RECORD, env={'IDS': str(world / 'ids_tuned')})
    return out


def test_epochs_under_one_cosine(world, stage_2, tuned):
    lines = steps(tuned)
    assert len(lines) == 8                                               # round(2 x 30 / 8)
    assert [line['lr'] for line in lines] == [main_lr(i, peak=3e-3, final=0.0, warmup=0, total=8) for i in range(8)]
    assert lines[-1]['loss'] < lines[0]['loss']
    ids = recorded_ids(world / 'ids_tuned')
    assert len(ids) == 64 and len(set(ids)) == 30 and {ids.count(i) for i in ids} == {2, 3}  # the last window is short
    meta = meta_of(tuned / 'ckpt_100')
    assert meta['stage'] == 'finetune' and meta['epochs'] == {'instruct': 64 / 30} and meta['config']['n_epoch'] == 2
    assert meta['base']['stage'] == 'mix' and meta['cursor'] == meta_of(stage_2 / 'ckpt_100')['cursor']
    assert equal(tensors(tuned / 'ckpt_100', 'encoder'), tensors(stage_2 / 'ckpt_100', 'encoder'))
    for part in ('decoder', 'projector'):
        assert not equal(tensors(tuned / 'ckpt_100', part), tensors(stage_2 / 'ckpt_100', part))


def test_stage_3_warms_up_from_zero_and_spares_gains_as_prismatic_does(world, scripts, stage_2, tmp_path):
    lrs, weights = {}, {}
    for name, more in (('default', ()), ('openlm', ('--warmup_from_zero=false', '--decay=all'))):
        scripts(*chat(world, stage_2 / 'ckpt_100', '--warmup_ratio=0.5', '--weight_decay=0.9', '--stop_after=4', *more,
                      f'--out_dir={tmp_path / name}'))
        lrs[name] = [line['lr'] for line in steps(tmp_path / name)]
        weights[name] = tensors(tmp_path / name / 'ckpt_last', 'decoder')
    assert lrs == {'default': [0.0, 3e-3 / 4, 3e-3 / 2, 3e-3 * 3 / 4], 'openlm': [3e-3 / 4, 3e-3 / 2, 3e-3 * 3 / 4, 3e-3]}
    scripts(*chat(world, stage_2 / 'ckpt_100', '--warmup_ratio=0.5', '--weight_decay=0.0', '--stop_after=4',
                  f'--out_dir={tmp_path / "none"}'))
    apart = tensors(tmp_path / 'none' / 'ckpt_last', 'decoder')
    change = {k: float((weights['default'][k] - v).norm() / v.norm()) for k, v in apart.items() if 'inv_freq' not in k}
    gains = [v for k, v in change.items() if 'norm' in k]
    assert max(gains) < 1e-3 < min(v for k, v in change.items() if 'norm' not in k)          # decay moved matrices alone


def test_killed_and_resumed_gives_the_same_bits_without_its_base(world, scripts, stage_2, tuned, tmp_path):
    shutil.copytree(stage_2 / 'ckpt_100', tmp_path / 'base')
    args = chat(world, tmp_path / 'base', '--max_steps=0', '--n_epoch=2', '--length_window=3', '--save_every=2',
                f'--out_dir={tmp_path / "run"}')
    for i, place in enumerate(('common.optimizer_step:4', 'torn torch.save:1', 'os.symlink:1')):
        run = scripts.start(*args, f'--n_worker={i % 2}', hook=KILL, env={'KILL': place})
        assert run.wait() == -signal.SIGKILL, f"{place}: {run.out}{run.err}"
    shutil.rmtree(tmp_path / 'base')                                     # a run that goes on needs its own folder only
    scripts(*args)
    assert same_weights(tuned / 'ckpt_100', tmp_path / 'run' / 'ckpt_100')
    assert [a['loss'] for a in steps(tmp_path / 'run')] == [b['loss'] for b in steps(tuned)]
    assert 'finished: 8 of 8 steps' in scripts(*args).out
    line = scripts.refuses(*args, '--lr=1e-4')
    assert 'lr=0.003' in line and '0.0001' in line


def test_split_turns_answer_average_and_two_processes(world, scripts, stage_2, tmp_path):
    base, lines = stage_2 / 'ckpt_100', {}
    for name, more in (('turns', ()), ('split', ('--split_turns=true',)), ('answer', ('--loss_average=answer',)),
                       ('both', ('--split_turns=true', '--loss_average=answer'))):
        scripts(*chat(world, base, *more, '--stop_after=2', f'--out_dir={tmp_path / name}'), hook=RECORD,
                env={'IDS': str(tmp_path / f'ids_{name}')})
        lines[name] = [line['sources']['instruct'] | line for line in steps(tmp_path / name)]
    for i in range(2):
        a, b = lines['turns'][i], lines['split'][i]
        # a row a question: the same targets, the image's positions once more for each further question, encoded once
        assert a['n_kept'] == b['n_kept'] and a['n_image'] == b['n_image'] and a['n_sample'] == b['n_sample']
        assert b['n_image_position'] > a['n_image_position'] == 4 * a['n_image']
    # the first loss is logged per token in both averages; then the models part
    assert lines['turns'][0]['loss'] == pytest.approx(lines['answer'][0]['loss'], rel=1e-6)
    assert lines['turns'][1]['loss'] != lines['answer'][1]['loss']
    assert lines['split'][0]['loss'] != lines['turns'][0]['loss']        # what a second question sees has changed
    scripts(*chat(world, base, '--split_turns=true', '--loss_average=answer', '--stop_after=2', '--micro_batch_size=2',
                  f'--out_dir={tmp_path / "two"}'), world_size=2, hook=RECORD, env={'IDS': str(tmp_path / 'ids_two')})
    assert recorded_ids(tmp_path / 'ids_two', 2) == recorded_ids(tmp_path / 'ids_both')
    for a, b in zip(steps(tmp_path / 'two'), lines['both'], strict=True):
        assert a['loss'] == pytest.approx(b['loss'], rel=1e-5) and a['n_kept'] == b['n_kept']


def test_both_kinds_of_sharing_give_one_loss_curve(world, scripts, stage_2, tmp_path):
    """Every fifth row has no image: micro-steps of one row differ between the processes."""
    hook = """
import common
plain = common.make_optimizer
def told(*args, **options):
    optimizer = plain(*args, **options)
    params = [p for group in optimizer.param_groups for p in group['params']]
    mine = [p.to_local() if hasattr(p, 'to_local') else p for p in params]
    print('share', sum(p.numel() for p in mine) / sum(p.numel() for p in params))
    return optimizer
common.make_optimizer = told
"""
    logs, args = {}, chat(world, stage_2 / 'ckpt_100', '--micro_batch_size=1')
    for n, parallel, dtype, more in (
            (1, 'fsdp', 'float32', ['--max_steps=20']), (2, 'ddp', 'float32', ['--max_steps=20']),
            (4, 'fsdp', 'float32', ['--max_steps=20']),
            (2, 'ddp', 'bfloat16', ['--freeze=none']), (2, 'fsdp', 'bfloat16', ['--freeze=none'])):
        out = tmp_path / f'{n} {parallel} {dtype}'
        run = scripts(*args, *more, f'--parallel={parallel}', f'--dtype={dtype}', f'--out_dir={out}', world_size=n,
                      hook=hook)
        share = 1 / n if parallel == 'fsdp' else 1
        assert float(run.out.split('share ')[1].split()[0]) == pytest.approx(share, rel=0.01)
        logs[out.name] = [line['loss'] for line in steps(out)]
    assert logs['2 ddp float32'] == pytest.approx(logs['1 fsdp float32'], rel=1e-5)
    assert logs['4 fsdp float32'] == pytest.approx(logs['1 fsdp float32'], rel=1e-5)
    # the same roundings; sums over processes come in another order, and an ulp of bfloat16 is 2 ** -8
    assert logs['2 fsdp bfloat16'] == pytest.approx(logs['2 ddp bfloat16'], rel=1e-3)


def test_text_rows_go_on_from_the_base_and_a_text_only_base_gets_a_projector(world, scripts, stage_1, stage_2,
                                                                             tmp_path):
    run = scripts(*chat(world, stage_1 / 'ckpt_080', '--text_share=0.5', '--freeze=none', '--encoder_lr=1e-3',
                        '--system_prompt=a photo', f'--out_dir={tmp_path / "a"}', '--stop_after=3'), hook=RECORD,
                  env={'IDS': str(tmp_path / 'ids')})
    assert 'no projector' in run.out
    line = steps(tmp_path / 'a')[-1]
    assert {k: v['n_sample'] for k, v in line['sources'].items()} == {'text': 12, 'instruct': 12}
    assert {k: v['share'] for k, v in line['sources'].items()} == {'text': 0.5, 'instruct': 0.5}
    # stage 1 used 64 rows of text; its next windows come now, in its order
    words = [i for i in recorded_ids(tmp_path / 'ids') if i.count(':') == 2]
    assert words == recorded_ids(world / 'ids_text')[128:140]
    assert meta_of(tmp_path / 'a' / 'ckpt_last')['cursor'] == {'text': 64 + 6}               # two windows a row
    assert not equal(tensors(tmp_path / 'a' / 'ckpt_last', 'encoder'), tensors(stage_2 / 'ckpt_100', 'encoder'))
    scripts(*chat(world, stage_1 / 'ckpt_080', '--encoder=patch', '--image_size=28',
                  f'--out_dir={tmp_path / "b"}', '--stop_after=1'))
    model, _, meta = load_vlm(str(tmp_path / 'b' / 'ckpt_last'))
    assert model.n_token == 4 and meta['base']['stage'] == 'text'
    scripts(*chat(world, stage_1 / 'ckpt_080', '--token_mode=query', '--image_tokens=6',
                  f'--out_dir={tmp_path / "c"}', '--stop_after=1'))
    model, _, meta = load_vlm(str(tmp_path / 'c' / 'ckpt_last'))
    assert model.n_token == 6 and meta['spec']['projector'] == {'kind': 'perceiver', 'n_token': 6}


def test_noise_and_shuffled_turns_follow_the_sample(world, scripts, stage_2, tmp_path):
    args = chat(world, stage_2 / 'ckpt_100', '--neftune=20', '--shuffle_turns=true', '--micro_batch_size=2')
    scripts(*args, f'--out_dir={tmp_path / "one"}')
    for i in range(2):                                                   # killed once, other workers
        more = dict(hook=KILL, env={'KILL': 'common.optimizer_step:5'}) if i == 0 else {}
        run = scripts.start(*args, '--save_every=3', f'--n_worker={i}', f'--out_dir={tmp_path / "killed"}', **more)
        assert run.wait() == (0 if i else -signal.SIGKILL), run.err
    assert same_weights(tmp_path / 'one' / 'ckpt_100', tmp_path / 'killed' / 'ckpt_100')
    scripts(*args, '--micro_batch_size=4', f'--out_dir={tmp_path / "two"}', world_size=2)
    scripts(*args, '--neftune=0', f'--out_dir={tmp_path / "quiet"}', '--stop_after=1')
    loss = {name: [line['loss'] for line in steps(tmp_path / name)] for name in ('one', 'two', 'quiet')}
    assert loss['one'] == pytest.approx(loss['two'], rel=1e-5)
    assert abs(loss['quiet'][0] - loss['one'][0]) > 1e-4


def test_sigterm_and_bad_conversations(world, scripts, stage_2, tmp_path):
    data = tmp_path / 'data'
    shutil.copytree(world / 'data', data)
    (data / 'instruct' / 'images' / '7.jpg').write_bytes(b'\xff\xd8 not a photo')
    args = chat(world, stage_2 / 'ckpt_100', f'--data_dir={data}')
    line = scripts.refuses(*args, f'--out_dir={tmp_path / "a"}')
    assert 'llava.json: entry 7' in line and '7.jpg' in line, line
    os.rename(data / 'instruct' / 'images' / '8.jpg', data / '8.jpg')
    gone = scripts.refuses(*args, f'--out_dir={tmp_path / "c"}')
    assert 'llava.json: 1 of 24 images are not in' in gone and '. 1 of 24 (8.jpg): fetch them, or' in gone, gone
    run = scripts(*args, '--max_bad_samples=9', '--boxes=letterbox', '--max_steps=1', f'--out_dir={tmp_path / "c"}')
    assert gone in run.out and len(steps(tmp_path / 'c')) == 1
    os.rename(data / '8.jpg', data / 'instruct' / 'images' / '8.jpg')
    hook = """
import common, os, signal
plain, n = common.optimizer_step, [0]
def signalled(*args):
    n[0] += 1
    if n[0] == 5 and os.environ['RANK'] == '0':
        os.kill(os.getpid(), signal.SIGTERM)
    return plain(*args)
common.optimizer_step = signalled
"""
    scripts(*args, f'--out_dir={tmp_path / "b"}', '--max_bad_samples=1', '--micro_batch_size=2', world_size=2,
            hook=hook)
    assert os.readlink(tmp_path / 'b' / 'ckpt_last') == 'ckpt_step_5' and len(steps(tmp_path / 'b')) == 5
    bad = meta_of(tmp_path / 'b' / 'ckpt_last')['bad_samples']
    assert len(bad) == 1 and bad[0] in line


def test_refusals_and_dry_run(world, scripts, stage_2, tuned, tmp_path):
    base, out = stage_2 / 'ckpt_100', f'--out_dir={tmp_path / "out"}'
    hint = 'make it with: python tinyworld.py data'
    for argv, *parts in (
            (chat(world, base, out, '--data_dir=/nowhere'), '/nowhere/instruct/llava.json', hint),
            (chat(world, 'out/tiny_no/ckpt80_img10/ckpt_100', out, '--scale=tiny'), 'out/tiny_no/ckpt80_img10/ckpt_100',
             'python pretrain.py config/ckpt80_img10.py config/tiny.py'),
            (chat(world, base, out, '--micro_batch_size=0'), 'micro_batch_size=0'),
            (chat(world, base, out, '--loss_average=mean'), "loss_average='mean'"),
            (chat(world, base, out, '--text_share=1'), 'text_share=1.0'),
            (chat(world, base, out, '--text_share=0.5', '--text=()'), 'text=(): expected a pair with a weight above 0'),
            (chat(world, base, out, '--dora=true'), 'dora and lora_on are of adapters: give --lora_rank=N'),
            (chat(world, base, out, '--freeze=all'), "freeze='all'"),
            (chat(world, base, out, '--seq_len=4'), 'seq_len=4'),
            (chat(world, base, out, '--n_epoch=0', '--max_steps=0'), 'n_epoch=0')):
        line = scripts.refuses(*argv)
        assert all(part in line for part in parts), line
    out = scripts(*chat(world, base, f'--out_dir={tmp_path / "out"}', '--dry_run=true')).out
    assert 'instruct: 64 of 64 sequences (100.0%), 2.13 passes over 30' in out and 'upper bound' in out
    out = scripts('finetune.py', 'config/finetune.py', '--data_dir=/nowhere', '--dry_run=true').out
    assert 'out/1b/ckpt80_img10/ckpt_100 not found; make it with' in out and '/nowhere/instruct/' in out
    assert '4 epochs of 665,298 conversations (assumed): 10,395 steps' in out and 'decoder 1,439,893,504' in out
    out = scripts(*chat(world, '/nowhere/ckpt', '--scale=tiny', '--max_steps=0', '--dry_run=true')).out
    assert '4 epochs of 30 conversations: 15 steps' in out and 'parameters' not in out
    out = scripts(*chat(world, base, '--instruct=gone.json', '--dry_run=true')).out         # the base alone says it
    assert 'parameters: decoder ' in out and 'gone.json not found' in out.splitlines()[-1]
    held = tmp_path / 'held'                                     # of a run that goes on, its base is not asked for
    held.mkdir()
    (held / 'ckpt_last').symlink_to(tuned / 'ckpt_last')
    base.rename(f'{base}.gone')
    try:
        out = scripts(*chat(world, base, '--max_steps=0', '--n_epoch=2', '--length_window=3', f'--out_dir={held}',
                            '--dry_run=true')).out
    finally:
        Path(f'{base}.gone').rename(base)
    assert '2.13 passes over 30' in out and os.listdir(held) == ['ckpt_last']
    assert not (tmp_path / 'out').exists()
