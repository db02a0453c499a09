"""
report.py: the ladder of scores and the training curves, from run folders that are whole, young, or not runs; the page
of a checkpoint, parsed and, where one is installed, in a browser.
"""
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import report
from errors import UserError
from scorers import Example, Task, caption_task, same, score_box, stable_scores, summarise, vqa_task
from test_page import HOSTILE, Document, assert_self_contained


def make_run(folder, scores, sources=('text',), n_step=30, torn=False):
    """A run folder as the stages leave it: scores {ckpt: {task: (score, n)}}, a log with losses and a validation."""
    for ckpt, tasks in scores.items():
        path = Path(folder, ckpt, 'eval', 'results.json')
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({'tasks': {task: dict(
            score=s, n=n, low=s, high=s, chance=0.0, constant=0.0, types={}, kind='', variant='', malformed=0)
            for task, (s, n) in tasks.items()}}))
    lines = [{'step': i, 'loss': 8 / i, 'lr': 1e-3 / i, 'grad_norm': 9 / i,
              'sources': {name: {'loss': 8 / i if i % 2 else None} for name in sources}} for i in range(1, n_step + 1)]
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
    assert whole['norm'] == [(i, 9 / i) for i in range(1, 31)]
    assert whole['validation'] == {'val_text_loss': [(30, 1.5)], 'val_caption_loss': [(30, 2.5)]}


def test_a_loss_that_is_not_finite_has_no_point(tmp_path):
    folder = make_run(tmp_path / 'a', {})
    with open(os.path.join(folder, 'log.jsonl'), 'a') as f:
        f.write('{"step": 31, "loss": NaN, "grad_norm": Infinity, "lr": 0.001, "sources": {"text": {"loss": NaN}}}\n')
    assert report.read_log(folder)['norm'][-1][0] == 30
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


# --- the page of a checkpoint -------------------------------------------------------------------------------------

def make_results(run, texts=('what', 'a cat', 'animal'), blank=False, ckpt='ckpt_100'):
    """A run with one checkpoint that was evaluated, by scorers.summarise, on five tasks whose texts are given."""
    rng, (question, answer, label) = random.Random(7), texts
    data, out = Path(run, 'data'), Path(run, ckpt, 'eval')
    (data / 'images').mkdir(parents=True)
    for i in range(3):
        Image.new('RGB', (60, 40), (90 * i, 50, 200)).save(data / 'images' / f'{i}.png')

    def examples(n, answers, choices=None):
        return [Example(f'{label}{i}', f'{question} {i}?', answers, str(data / 'images' / f'{i % 4}.png'), (label,),
                        choices) for i in range(n)]
    vqa = vqa_task('vqav2', 'vqav2', examples(60, [answer] * 5 + ['no'] * 5), 'vlm-eval', ('official',))
    box = Task('refcoco', 'refcoco', examples(5, ['[0.1, 0.1, 0.5, 0.9]']), score_box, variant='IoU>=0.5')
    pope = Task('pope', 'pope', examples(6, [0], ['yes', 'no']), same, variant='first token')
    text = Task('copa', 'text', [Example('0', question, [1], '', (), [answer, label])], same, 'text', variant='acc')
    said = [(vqa, rng.choices([answer, 'no', 'wrong', ''], k=60)), (pope, [0, 1, 0, 0, 1, None]), (text, [1]),
            (box, ['[0.1, 0.1, 0.5, 0.8]', '[0.7, 0, 1, 1]', 'there', '', '[0, 0, 1, 1]']),
            (caption_task('captions', examples(2, [answer])), [answer, ''])]
    tasks = {}
    for task, predictions in said:
        predictions = [type(p)() if blank and isinstance(p, str) else p for p in predictions]
        nats = task.examples[0].choices and [[0.3, 1.4]] * len(predictions)
        tasks[task.name], records = summarise(task, predictions, nats, nats and [[1, 2]] * len(nats))
        path = out / 'predictions' / f'{task.name}.jsonl'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(''.join(json.dumps(r) + '\n' for r in records))
    meta = {'stage': 'finetune', 'step': 1500, 'tokens': 3955672, 'commit': 'f2f39926+', 'config': {'name': label}}
    content = {'schema': 1, 'ckpt': str(Path(run, ckpt)), 'config': {'eval_dir': str(data), 'box_frame': 'original'},
               'meta': meta, 'torch': '2', 'tasks': tasks, 'stable': stable_scores(tasks)}
    (out / 'results.json').write_text(json.dumps(content))
    return str(out / 'results.json'), content


def test_a_page_shows_scores_answers_and_curves(tmp_path):
    make_run(tmp_path / 'run', {})
    path, content = make_results(tmp_path / 'run')
    assert report.main([str(tmp_path / 'run' / 'ckpt_100')]) is None
    text = Path(path).with_name('report.html').read_text()
    document = assert_self_contained(text)
    cells, said = [t for element, t in document.texts if element == 'td'], ''.join(t for _, t in document.texts)
    for name, result in content['tasks'].items():
        assert f"{100 * result['score']:.2f}" in cells and str(result['n']) in cells and result['variant'] in cells
    assert 'accuracy_official' in said and f"{content['tasks']['vqav2']['accuracy_official']:.5g}" in cells
    assert all(text in said for text in ('"stage": "finetune"', '"step": 1500', 'f2f39926+'))
    assert len(document.named('img')) == 1                                               # the curves
    names = [json.loads(a['data-task'])[0] for a in document.named('article')]
    assert names.count('vqav2') == 48 and names.count('refcoco') == 5 and names.count('copa') == 1
    assert 'no image ' in said and '3.png' in said and len(document.named('image')) > 30     # of four, one is missing
    assert [o.get('value') for o in document.named('option')].count('animal') == 1
    ids = [s['id'] for s in document.named('section')]
    assert {a['href'][1:] for a in document.named('a')} <= set(ids) and len(set(ids)) == len(ids)


def test_a_page_is_the_same_each_time_and_for_any_form_of_its_path(tmp_path):
    path, _ = make_results(tmp_path / 'run')
    pages = []
    for given in (path, str(tmp_path / 'run' / 'ckpt_100'), os.path.dirname(path)):
        report.main([given])
        pages.append(Path(path).with_name('report.html').read_text())
    assert pages[0] == pages[1] == pages[2] and 'No log.jsonl' in pages[0]


def test_images_that_moved_are_found_with_eval_dir(tmp_path):
    path, _ = make_results(tmp_path / 'run')
    report.main([path])
    before = Path(path).with_name('report.html').read_text().count('<image')
    shutil.move(tmp_path / 'run' / 'data', tmp_path / 'moved')
    for argv, n in (([path], 0), ([path, f"--eval_dir={tmp_path / 'moved'}"], before)):
        report.main(argv)
        assert Path(path).with_name('report.html').read_text().count('<image') == n
    assert before > 20


def test_a_step_s_page_has_the_curves_of_its_run(tmp_path):
    make_run(tmp_path / 'run', {})
    path, _ = make_results(tmp_path / 'run')
    folder = tmp_path / 'run' / 'eval' / 'ckpt_step_90'
    shutil.copytree(os.path.dirname(path), folder)
    assert '<img' in Path(report.results_page(str(folder / 'results.json'))).read_text()
    away = tmp_path / 'elsewhere' / 'x'
    shutil.copytree(folder, away)
    assert '<img' in Path(report.results_page(str(away / 'results.json'))).read_text()           # by its `ckpt`
    Path(tmp_path, 'run', 'log.jsonl').write_text('{"step": 1, "loss": "x"}')
    assert 'No curves: ' in Path(report.results_page(str(folder / 'results.json'))).read_text()


@pytest.mark.parametrize('seed', range(4))
def test_hostile_results_stay_text(tmp_path, seed):
    rng = random.Random(seed)
    path, content = make_results(tmp_path / 'run', [rng.choice(HOSTILE).replace('\0', '') for _ in range(3)])
    for name in rng.sample(HOSTILE, 4):
        content['tasks'][name] = {**content['tasks']['copa'], 'variant': rng.choice(HOSTILE), rng.choice(HOSTILE): 0.5}
        content['meta'][name] = content['config'][name] = content['stable'][name] = content['stable']['vision']
    content['meta'] |= {'stage': rng.choice(HOSTILE), 'config': {'name': rng.choice(HOSTILE), 'x': [HOSTILE]}}
    content['ckpt'] = rng.choice(HOSTILE)
    Path(path).write_text(json.dumps(content))
    assert_self_contained(Path(report.results_page(path)).read_text())


def test_results_without_answers_or_with_empty_ones_have_a_page(tmp_path):
    path, content = make_results(tmp_path / 'run', blank=True)
    assert assert_self_contained(Path(report.results_page(path)).read_text()).named('article')
    shutil.rmtree(tmp_path / 'run' / 'ckpt_100' / 'eval' / 'predictions')
    content['tasks'] = {'copa': content['tasks']['copa']}                                # a text-only checkpoint
    content |= {'stable': {}, 'meta': {}, 'config': {}, 'ckpt': ''}
    Path(path).write_text(json.dumps(content))
    assert 'No answers to show' in Path(report.results_page(path)).read_text()


def test_results_that_are_not_ours_are_refused_in_one_line(tmp_path):
    path, content = make_results(tmp_path / 'run')
    run = make_run(tmp_path / 'other', {'ckpt_100': {'facts': (0.5, 1)}})
    for bad in ('[]', '{', '[' * 100_000, json.dumps({**content, 'tasks': {}}), json.dumps({**content, 'meta': 3}),
                json.dumps({**content, 'tasks': {'a': {**content['tasks']['copa'], 'n': '9'}}}),
                json.dumps({**content, 'stable': {'a': {'score': 1, 'tasks': 'b', 'missing': []}}})):
        Path(path).write_text(bad)
        with pytest.raises(UserError, match='results.json') as caught:
            report.main([path])
        assert '\n' not in str(caught.value)
    for argv in ([path, run], [path, '--out=a.png'], [run, '--eval_dir=x'], [path, '--eval_dir=a', '--eval_dir=b'], []):
        with pytest.raises(UserError, match='usage'):
            report.main(argv)


# --- in a browser -------------------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


@pytest.mark.skipif(BROWSER is None, reason='no chromium, chromium-browser or google-chrome on PATH')
def test_a_browser_filters_the_answers_and_runs_no_script_of_theirs(tmp_path):
    path, _ = make_results(tmp_path / 'run', ('</script><img src=x onerror="document.title=1">?', 'a&b', 'x="y" <&'))
    page = report.results_page(path)

    def cards(fragment):
        options = ['--no-sandbox', '--disable-gpu', f"--user-data-dir={tmp_path / 'p'}", '--virtual-time-budget=5000']
        done = subprocess.run([BROWSER, '--headless', *options, '--dump-dom', Path(page).as_uri() + fragment],
                              capture_output=True, text=True, timeout=120)
        document = Document(done.stdout)
        assert ('title', 'ckpt_100, finetune') in document.texts, done.stderr[-2000:]
        articles = document.named('article')
        (count,) = [text for element, text in document.texts if element == 'output']
        seen = [a for a in articles if 'hidden' not in a]
        assert count == f'{len(seen)} of {len(articles)}'
        hidden = [s['id'] for s in document.named('section') if 'hidden' in s]
        return [(json.loads(a['data-task'])[0], json.loads(a['data-result'])[0], a['data-type']) for a in seen], hidden
    everything, hidden = cards('')
    assert len(everything) == 48 + 5 + 6 + 1 + 2 and not hidden
    for fragment, wanted in (('#task=vqav2&result=wrong', lambda t, r, k: t == 'vqav2' and r == 'wrong'),
                             ('#type=x%3D%22y%22+%3C%26', lambda t, r, k: k != '[]')):
        found, hidden = cards(fragment)
        assert found == [card for card in everything if wanted(*card)] and 0 < len(found) < len(everything)
        assert len(hidden) == 5 - len({task for task, _, _ in found})
