"""report.py: the ladder of scores and the training curves, from run folders that are whole, young, or not runs."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import report
from errors import UserError


def make_run(folder, scores, sources=('text',), n_step=30, torn=False):
    """A run folder as the stages leave it: scores {ckpt: {task: (score, n)}}, a log with losses and a validation."""
    for ckpt, tasks in scores.items():
        path = Path(folder, ckpt, 'eval', 'results.json')
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({'tasks': {task: {'score': s, 'n': n} for task, (s, n) in tasks.items()}}))
    lines = [{'step': i, 'loss': 8 / i, 'lr': 1e-3 / i, 'sources': {name: {'loss': 8 / i if i % 2 else None}
                                                                    for name in sources}} for i in range(1, n_step + 1)]
    lines += [{'step': n_step, 'val_text_loss': 1.5, 'val_caption_loss': 2.5}]
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, 'log.jsonl').write_text('\n'.join(map(json.dumps, lines)) + ('\n{"step": 31, "lo' if torn else '\n'))
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    return [make_run(tmp_path / 'text', {'ckpt_020': {'facts': (0.5, 120)}, 'ckpt_100': {'facts': (1.0, 60)},
                                         'ckpt_step_90': {'facts': (0.0, 120)}}),
            make_run(tmp_path / 'finetune', {'ckpt_100': {'vqav2': (0.98765, 40), 'facts': (0.25, 120)}})]


def test_ladder_has_a_row_per_task_and_a_column_per_checkpoint(runs):
    table = [line.split() for line in report.ladder(runs).splitlines()]
    assert table == [['task', 'n', 'text/020', 'text/100', 'finetune/100'],
                     ['vqav2', '40', '-', '-', '98.8'],
                     ['facts', '60-120', '50.0', '100.0', '25.0']]
    assert len({len(line) for line in report.ladder(runs).splitlines()}) == 1


def test_checkpoints_without_scores_have_no_column(runs):
    os.mkdir(os.path.join(runs[0], 'ckpt_040'))
    os.symlink('ckpt_100', os.path.join(runs[0], 'ckpt_last'))
    assert '040' not in report.ladder(runs) and 'last' not in report.ladder(runs)


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [make_run(tmp_path / seed / 'text', {'ckpt_100': {'facts': (0.5, 9)}}) for seed in ('tiny', 'tiny_365')]
    assert [f'{folder}/100' for folder in folders] == report.ladder(folders).split()[2:4]
    assert report.titles(['out/tiny/text', 'out/tiny/finetune/']) == ['text', 'finetune']


def test_a_torn_line_of_a_log_is_skipped(tmp_path):
    whole = report.read_log(make_run(tmp_path / 'a', {}))
    assert report.read_log(make_run(tmp_path / 'b', {}, torn=True)) == whole
    assert [step for step, _ in whole['sources']['text']] == list(range(1, 31, 2))        # null: no row in that step
    assert whole['validation'] == {'val_text_loss': [(30, 1.5)], 'val_caption_loss': [(30, 2.5)]}


def test_a_loss_that_is_not_finite_has_no_point(tmp_path):
    folder = make_run(tmp_path / 'a', {})
    with open(os.path.join(folder, 'log.jsonl'), 'a') as f:
        f.write('{"step": 31, "loss": NaN, "lr": 0.001, "sources": {"text": {"loss": NaN}}}\n')
    assert report.read_log(folder)['sources']['text'][-1][0] == 29
    report.curves([folder], str(tmp_path / 'a.png'))


def test_running_mean_looks_back_only():
    values = [3.0, 1.0, 2.0, 6.0, 4.0]
    expected = [sum(values[max(0, i - 2):i + 1]) / min(3, i + 1) for i in range(5)]
    assert report.running_mean(values, 3) == pytest.approx(expected)


def test_the_script_prints_the_ladder_and_draws_into_the_last_folder(runs):
    done = subprocess.run([sys.executable, report.__file__, *runs], capture_output=True, text=True)
    assert done.returncode == 0 and 'finetune/100' in done.stdout, done.stderr
    with Image.open(os.path.join(runs[-1], 'curves.png')) as image:
        assert image.width > 1000 and len(image.convert('RGB').getcolors(1 << 20)) > 50


def test_mistakes_are_one_line(runs, tmp_path):
    bad = make_run(tmp_path / 'bad', {'ckpt_100': {'facts': (0.5, 1)}})
    Path(bad, 'ckpt_100', 'eval', 'results.json').write_text('{"tasks": []}')
    empty, young = tmp_path / 'empty', make_run(tmp_path / 'young', {}, n_step=0)
    empty.mkdir()
    for call, says in ((lambda: report.ladder([str(tmp_path / 'none')]), 'no such folder'),
                       (lambda: report.ladder([str(empty)]), 'evaluate.py makes it'),
                       (lambda: report.ladder([bad]), 'results.json'),
                       (lambda: report.curves([str(empty)], 'a.png'), 'log.jsonl'),
                       (lambda: report.curves([young], 'a.png'), 'no step yet'),
                       (lambda: report.curves(runs, 'a.txt'), '.png'),
                       (lambda: report.curves(runs, str(tmp_path / 'none' / 'a.png')), 'cannot be written'),
                       (lambda: report.main(['--seed=3', *runs]), 'usage')):
        with pytest.raises(UserError, match=says) as caught:
            call()
        assert '\n' not in str(caught.value)
    done = subprocess.run([sys.executable, report.__file__, str(empty)], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count('\n') == 1 and 'Traceback' not in done.stderr
