"""The study's runner on small commands without torch, its jobs, and a seconds-long grid of the real stage scripts."""
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import HERE, child_env, meta_of, picture

import findings
import study
from configurator import configure
from errors import UserError

ROOT = os.path.dirname(HERE)
TINY = ['config/tiny.py', 'config/study.py']


# --- the runner, on commands of a few milliseconds --------------------------------------------------------------------

def job(folder, name, code='', needs=()):
    """A job whose command notes its name in `ran`, checks what it needs, runs `code`, then makes the file `name`."""
    code = textwrap.dedent(f'''
        import os, signal, sys, time
        signal.alarm(120)                                                # left behind by a test that broke
        with open('ran', 'a') as f: f.write({name!r} + chr(10))
        assert all(map(os.path.exists, {needs!r}))
        ''') + textwrap.dedent(code) + f"\nopen({name!r}, 'w')\n"
    code = f'import os; os.chdir({str(folder)!r})\n' + code
    return study.Job(name, (((sys.executable, '-c', code), str(folder / name)),), tuple(needs))


def ran(folder):
    return Counter((folder / 'ran').read_text().split()) if (folder / 'ran').exists() else Counter()


def until(condition, process=None):
    """Wait for a condition; AssertionError where it does not come true, or the process ends before."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end and (process is None or process.poll() is None), process and process.communicate()
        time.sleep(0.005)


def runner(folder, jobs, n_job=2):
    """A process of its own that runs the jobs."""
    code = f'import sys; sys.path.insert(0, {ROOT!r}); import study; jobs = {[*map(tuple, jobs)]}; ' \
           f'print(study.run([study.Job(*job) for job in jobs], {str(folder)!r}, {n_job}))'
    return subprocess.Popen([sys.executable, '-c', code],
                            env=child_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_jobs_run_once_after_what_they_need_and_never_again(tmp_path):
    jobs = [job(tmp_path, 'c', needs=('a', 'b')), job(tmp_path, 'a'), job(tmp_path, 'b', needs=('a',)),
            job(tmp_path, 'd')]
    assert study.run(jobs, str(tmp_path), 2) == {}
    assert ran(tmp_path) == Counter('abcd')
    assert study.run(jobs, str(tmp_path), 2) == {} and ran(tmp_path) == Counter('abcd')
    (tmp_path / 'c').unlink()
    assert study.run(jobs, str(tmp_path), 1) == {} and ran(tmp_path) == Counter('abcdc')


def test_of_several_commands_only_those_are_run_whose_file_is_missing(tmp_path):
    one, two = job(tmp_path, 'one'), job(tmp_path, 'two', needs=('one',))
    both = study.Job('both', (*one.commands, *two.commands), ())
    assert study.run([both], str(tmp_path), 1) == {} and ran(tmp_path) == Counter(['one', 'two'])
    (tmp_path / 'two').unlink()
    assert study.run([both], str(tmp_path), 1) == {} and ran(tmp_path) == Counter(['one', 'two', 'two'])


def test_a_failure_is_recorded_the_rest_goes_on_and_the_next_start_tries_again(tmp_path):
    jobs = [job(tmp_path, 'bad', "if not os.path.exists('mended'): print('line 1'); sys.exit('the disk is full')"),
            job(tmp_path, 'after', needs=('bad',)), job(tmp_path, 'last', needs=('after',)), job(tmp_path, 'good'),
            job(tmp_path, 'lazy', "if not os.path.exists('mended'): sys.exit(0)")]
    failed = study.run(jobs, str(tmp_path), 2)
    assert failed == {'bad': 'exit code 1: the disk is full', 'after': 'needs bad', 'last': 'needs after',
                      'lazy': f'{tmp_path / "lazy"} was not made'}
    record = (tmp_path / 'failed/bad.txt').read_text()
    assert record.splitlines() == ['bad', 'exit code 1: the disk is full', 'line 1', 'the disk is full']
    assert ran(tmp_path) == Counter(['bad', 'good', 'lazy'])
    (tmp_path / 'mended').touch()
    assert study.run(jobs, str(tmp_path), 2) == {} and not list((tmp_path / 'failed').iterdir())
    assert ran(tmp_path) == Counter(['bad', 'bad', 'good', 'lazy', 'lazy', 'after', 'last'])


def test_two_runners_at_once_run_every_job_once(tmp_path):
    jobs = [job(tmp_path, f'{i}', needs=(f'{i - 4}',) if i > 3 else ()) for i in range(8)]
    jobs.append(job(tmp_path, 'bad', 'sys.exit(3)'))
    jobs.append(job(tmp_path, 'lost', needs=('bad',)))
    # both begin before either can be through: the first jobs wait for both
    gate = """
        open(f'here{os.getppid()}', 'w')
        while len([n for n in os.listdir() if n.startswith('here')]) < 2: time.sleep(.01)"""
    jobs = [job(tmp_path, name, gate) for name in ('g1', 'g2')] + jobs
    both = [runner(tmp_path, jobs, 1) for _ in range(2)]
    failed = [eval(process.communicate(timeout=120)[0]) for process in both]
    assert all(f.keys() == {'bad', 'lost'} for f in failed)
    assert sorted(f['bad'] for f in failed) == ['exit code 3', 'failed in another process']
    assert ran(tmp_path) == Counter([j.name for j in jobs if j.name != 'lost'])


def test_after_kill_9_of_the_runner_the_next_waits_for_the_job_that_is_left(tmp_path):
    jobs = [job(tmp_path, 'long', "while not os.path.exists('go'): time.sleep(.01)"),
            job(tmp_path, 'next', needs=('long',))]
    first = runner(tmp_path, jobs)
    until(lambda: ran(tmp_path)['long'], first)
    first.kill()
    first.communicate()
    second = runner(tmp_path, [*jobs, job(tmp_path, 'other')])
    until((tmp_path / 'other').exists, second)                           # it looked at 'long' before, and left it alone
    assert ran(tmp_path) == Counter(['long', 'other'])
    (tmp_path / 'go').touch()
    assert second.communicate(timeout=60)[0] == '{}\n' and second.returncode == 0
    assert ran(tmp_path) == Counter(['long', 'other', 'next'])


SAVES = '''
    if not os.path.exists('saved'):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        os.kill(os.getppid(), signal.{0})
        signal.sigwait([signal.SIGTERM])
        open('saved', 'w')
        {1}
        sys.exit(0)
'''


@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM'])
def test_a_signal_lets_runs_save_and_starts_nothing_more(tmp_path, name):
    jobs = [job(tmp_path, 'run', SAVES.format(name, '')), job(tmp_path, 'more')]
    usual = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        study.run(jobs, str(tmp_path), 1)
    assert (tmp_path / 'saved').exists() and ran(tmp_path) == Counter(['run'])
    assert not (tmp_path / 'failed').exists() or not list((tmp_path / 'failed').iterdir())
    assert signal.getsignal(signal.SIGINT) == usual
    assert study.run(jobs, str(tmp_path), 1) == {} and ran(tmp_path) == Counter(['run', 'run', 'more'])


def test_a_second_signal_reaches_the_runs_again(tmp_path):
    again = "os.kill(os.getppid(), signal.SIGINT); signal.sigwait([signal.SIGTERM]); open('twice', 'w')"
    with pytest.raises(KeyboardInterrupt):
        study.run([job(tmp_path, 'run', SAVES.format('SIGINT', again))], str(tmp_path), 1)
    assert (tmp_path / 'twice').exists()


def test_runs_at_a_time_get_gpus_of_their_own(tmp_path, monkeypatch):
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    wait = "open('gpu' + os.environ.get('CUDA_VISIBLE_DEVICES', ''), 'w')\n" \
           "while len([n for n in os.listdir() if n.startswith('gpu')]) < 2: time.sleep(.01)"
    jobs = [job(tmp_path, name, wait) for name in 'ab']
    assert study.run(jobs, str(tmp_path), 2, n_gpu=2) == {}
    assert {p.name for p in tmp_path.glob('gpu*')} == {'gpu0,1', 'gpu2,3'}


# --- jobs -------------------------------------------------------------------------------------------------------------

def make_study(files, *options):
    return study.Study(configure({'__file__': study.__file__}, [*files, *options]), files)


@pytest.mark.parametrize('files', [[], TINY, [*TINY, 'config/study_w64.py']])
def test_the_jobs_of_all_grids_have_names_of_their_own_and_come_after_what_they_need(files, monkeypatch):
    monkeypatch.chdir(ROOT)
    all_of_it = make_study(files, '--seeds=(7,365)', '--n_order=2')
    jobs = all_of_it.jobs(study.GRIDS)                                   # asserts that names are unique
    before = set()
    for one in jobs:
        assert before.issuperset(one.needs)
        before.add(one.name)
    makes = [path for one in jobs for _, path in one.commands]
    assert len(set(makes)) == len(makes)
    cells = {tuple(sorted(c.items())) for g in study.GRIDS for c in all_of_it.cells_of(g).values()}
    read = {all_of_it.results(dict(cell), 7, 1) for cell in cells}
    assert len(read) == len(cells) and read <= {*makes}, 'each cell has scores of its own, which a job makes'
    assert all_of_it.results(all_of_it.reference, 7, 1, 50).endswith('_order1/eval/ckpt_step_50/results.json')
    stages = Counter(command[0][0][1] for one in jobs for command in [one.commands])
    n_cell = sum(dict(cell)['epochs'] != '0' for cell in cells)
    assert stages['finetune.py'] == 4 * n_cell                           # 2 seeds x 2 orders
    assert sum(one.name.endswith('/text') for one in jobs) == 2


def test_cells_of_figure_4_share_their_text_run_and_differ_in_their_files_alone(monkeypatch):
    monkeypatch.chdir(ROOT)
    tiny = make_study(TINY, '--seeds=7,', '--along=(200,500)')
    cells = tiny.cells_of('fig4')
    line = {label: tiny.chain(cells['', label], 7, 0) for label in ('0 %', '80 %', '100 %')}
    assert [len(chain) for chain in line.values()] == [2, 3, 3] and line['80 %'][0] == line['100 %'][0]
    words = lambda job: {w for w in job.commands[0][0] if not w.startswith(('--name', '--init_from'))}
    assert words(line['80 %'][1]) ^ words(line['100 %'][1]) == {'config/axes/ckpt100.py'}
    assert words(line['80 %'][2]) == words(line['100 %'][2]) >= {'--save_every=100', '--keep_steps=1000', '--seed=7'}
    assert [os.path.relpath(path, tiny.root) for _, path in line['80 %'][2].commands] == [
        f'seed7/ckpt80_img30_finetune_order0/{end}' for end in (
            'ckpt_100', 'ckpt_100/eval/results.json', 'eval/ckpt_step_500/results.json',
            'eval/ckpt_step_200/results.json')]
    text_only, none = (tiny.chain(cells[None, name], 7, 1) for name in (
        '100 %, text only in stage 2', '100 %, no stage 2'))
    assert {'config/axes/ckpt100.py', 'config/axes/img0.py'} <= words(text_only[1])
    assert [one.name for one in none] == ['seed7/text', 'seed7/ckpt100_only_finetune_order1']
    assert f'--init_from={tiny.root}/seed7/text/ckpt_100' in none[1].commands[0][0]
    assert '--seed=1007' in none[1].commands[0][0]


def test_a_half_of_the_conversations_is_evaluated_at_its_end_alone(monkeypatch):
    """It takes half the steps: a step inside the others' stage 3 may lie behind its end."""
    monkeypatch.chdir(ROOT)
    tiny = make_study(TINY, '--seeds=7,', '--along=(200,500)')
    cells = tiny.cells_of('fig7')
    whole, half = (tiny.chain(cells[line, '50 %'], 7, 0)[-1] for line in ('all of it in stage 3', 'one half in each stage'))
    ends = lambda one: [os.path.relpath(path, os.path.join(tiny.root, one.name)) for _, path in one.commands]
    assert 'eval/ckpt_step_200/results.json' in ends(whole)
    assert ends(half) == ['ckpt_100', 'ckpt_100/eval/results.json']
    assert not any(word.startswith('--save_every') for word in half.commands[0][0])


def test_a_job_is_done_when_all_that_it_makes_is_there(tmp_path):
    paths = [tmp_path / name for name in 'abc']
    job = study.Job('seed7/x', tuple((['python'], str(path)) for path in paths), ())
    for path in reversed(paths):
        assert not job.done
        path.write_text('')
    assert job.done


def test_four_epochs_are_four_under_the_files_given(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match='config/tiny.py: n_epoch=6, which these grids call 4 epochs'):
        study.main(['fig8', 'config/tiny.py', '--print'])
    study.main(['fig4', 'config/tiny.py', '--print'])


def test_gpus_that_are_not_there_are_one_line(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr('torch.cuda.device_count', lambda: 3)
    with pytest.raises(UserError, match='expected 4 GPUs, this machine shows 3'):
        study.main(['fig4', *TINY, '--n_job=2', '--n_gpu=2'])


def test_masks_are_axes_and_that_of_documents_begins_in_stage_1(monkeypatch):
    monkeypatch.chdir(ROOT)
    tiny = make_study(TINY, '--seeds=7,')
    apart = {**tiny.reference, 'documents': 'apart'}
    names = [one.name for one in tiny.chain(apart, 7, 0)]
    assert names == ['seed7/text_documents', 'seed7/ckpt80_img30_documents', 'seed7/ckpt80_img30_documents_finetune_order0']
    argv = tiny.chain(apart, 7, 0)[1].commands[0][0]
    config = study.configure({'__file__': os.path.join(ROOT, 'pretrain.py')}, argv[2:])
    assert config['document_mask'] and config['init_from'] == 'out/{scale}/text_documents/ckpt_080'
    assert '{scale}' in config['init_from'] and f"--scale=tiny/study/seed7" in argv
    only = tiny.chain({**apart, 'stage 2': 'none'}, 7, 0)[-1]
    assert only.name == 'seed7/ckpt80_only_documents_finetune_order0'
    assert f'--init_from={tiny.root}/seed7/text_documents/ckpt_080' in only.commands[0][0]
    jobs = tiny.chain({**tiny.reference, 'image mask': 'prefix'}, 7, 0)
    assert ['config/axes/image_prefix.py' in one.commands[0][0] for one in jobs] == [False, True, True]


def test_several_gpus_take_torchrun_for_training_alone(monkeypatch):
    monkeypatch.chdir(ROOT)
    (text, mix, tune) = (lambda s: s.chain(s.reference, 7, 0))(make_study([], '--n_gpu=8'))
    for one in (text, mix, tune):
        (train, _), *scores = one.commands
        assert train[:3] == ['torchrun', '--standalone', '--nproc_per_node=8'], train
        assert all(argv[:2] == ['python', 'evaluate.py'] for argv, _ in scores)


def test_print_gives_what_is_missing_and_dependencies_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.symlink(f'{ROOT}/config', 'config')
    study.main(['fig4', 'fig8', *TINY, '--seeds=7,', '--n_order=1', '--print'])
    lines = capsys.readouterr().out.splitlines()
    stages = ['text' if 'config/text.py' in x else x.split()[1] for x in lines]
    n = Counter(stages)
    assert n == Counter({'text': 1, 'pretrain.py': 6 + 2, 'finetune.py': 9 + 5}) and 'config:' not in lines[0]
    made = set()
    for x in lines:
        start = next((w.split('=')[1] for w in x.split() if w.startswith('--init_from=')), '')
        assert not start or start.split('/')[4] in made or start.split('/')[4] == 'text'
        made |= {w.split('/')[4] for w in x.split() if w.startswith('--ckpt=')}
    for n in (20, 40, 60, 80, 100):
        Path(f'out/tiny/study/seed7/text/ckpt_{n:03d}/eval').mkdir(parents=True)
        Path(f'out/tiny/study/seed7/text/ckpt_{n:03d}/eval/results.json').touch()
    Path('out/tiny/study/seed7/ckpt80_img30/ckpt_100').mkdir(parents=True)            # trained, but not evaluated
    study.main(['fig4', 'fig8', *TINY, '--seeds=7,', '--n_order=1', '--print'])
    again = capsys.readouterr().out.splitlines()
    assert len(again) == len(lines) - 1
    assert [x for x in again if 'ckpt80_img30/' in x and 'finetune' not in x] == [
        'python evaluate.py config/tiny.py config/study.py --tasks=facts,reading '
        '--ckpt=out/tiny/study/seed7/ckpt80_img30/ckpt_100']


@pytest.mark.parametrize('argv, says', [
    ([], 'nothing: expected all, report'), (['fig3'], 'fig3: expected all, report, or some of fig4'),
    (['report', 'fig4'], 'report'), (['fig4', '--seeds=-1,'], 'seeds'), (['report', *TINY], 'no cell of fig4')])
def test_what_the_command_line_refuses(argv, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink(f'{ROOT}/config', 'config')
    with pytest.raises(UserError, match=says):
        study.main(argv)


# --- a grid of the real stage scripts ---------------------------------------------------------------------------------

@pytest.fixture
def small_study(tmp_path, monkeypatch, world, scripts):
    """The arguments of a study of seconds, whose commands start in the process server; `hooks` by the run's name."""
    monkeypatch.chdir(tmp_path)
    os.symlink(f'{ROOT}/config', 'config')
    (tmp_path / 'eval/text').mkdir(parents=True)
    rows = [{'query': 'the wall is', 'choices': ['red', 'blue', 'mat'], 'gold': i % 3} for i in range(6)]
    (tmp_path / 'eval/text/walls.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    (tmp_path / 'eval/pope').mkdir()
    lines = []
    for i in range(4):
        (tmp_path / f'eval/pope/{i}.jpg').write_bytes(picture('red', 'JPEG', i))
        lines.append(dict(question_id=i, image=f'{i}.jpg', text='is the wall red ?', label=('yes', 'no')[i % 2]))
    (tmp_path / 'eval/pope/coco_pope_random.json').write_text('\n'.join(map(json.dumps, lines)))
    (tmp_path / 'small.py').write_text(f'''
if stage == 'study':
    scale, n_job, along = 'small', 2, (1,)
    vision_tasks, text_tasks = (('pope', 0.5),), (('walls', 0.3333),)
    vision_example, text_example, apart_tasks = 'pope', 'walls', ()
elif stage == 'evaluate':
    eval_dir, short_suffix, pope_words, device = 'eval', '', ('yes', 'no'), 'cpu'
    max_len = 64
else:
    exec(open({str(world / 'tiny.py')!r}).read())
    max_steps, val_captions, eval_every = 5, 'val_captions', 5
    if stage == 'finetune':
        del eval_every, val_captions
''')
    hooks = {}

    def launch(argv, log, held, gpus):
        name = next((w.split('=')[1] for w in argv if w.startswith('--name=')), '')
        started = scripts.start(*argv[1:], hook=f"import os; os.chdir({str(tmp_path)!r}); {hooks.get(name, '')}")
        started.poll = lambda: scripts.ask(wait=started.pid, timeout=0)
        started.terminate = lambda: os.kill(started.pid, signal.SIGTERM)
        return started
    monkeypatch.setattr(study, 'launch', launch)
    monkeypatch.setattr(study.Study, 'grids', {'fig4': dict(x='start', labels=('80 %',), beside={
        '100 %, no stage 2': {'start': '100 %', 'stage 2': 'none'}})})
    monkeypatch.setattr(study, 'GRIDS', study.Study.grids)
    return ['fig4', 'small.py', '--seeds=7,8'], hooks


def test_a_grid_of_real_runs_with_a_failure_gives_tables_figures_and_findings(small_study, tmp_path, capsys,
                                                                              monkeypatch):
    argv, hooks = small_study
    drawn = []
    real = findings.draw, findings.curves, findings.draw_schedules

    def pretend(*args):                                                  # what takes long: once is enough
        drawn.append(next(arg for arg in args if str(arg).endswith('.png')))
        Path(drawn[-1]).touch()
    for name in ('draw', 'curves', 'draw_schedules'):
        monkeypatch.setattr(findings, name, pretend)
    hooks['ckpt100_only_finetune_order0'] = "import sys; sys.exit('no space left')"
    with pytest.raises(UserError, match=r'2 of 8 runs are missing: seed7/ckpt100_only_finetune_order0 \(exit code 1'):
        study.main(argv)
    assert 'no stage 2' not in (tmp_path / 'out/small/study/fig4.md').read_text()
    assert drawn
    hooks.clear()
    for name, function in zip(('draw', 'curves', 'draw_schedules'), real):
        monkeypatch.setattr(findings, name, function)
    study.main(argv)
    out = capsys.readouterr().out
    root = tmp_path / 'out/small/study'
    table = (root / 'fig4.md').read_text().split('\n\n')[0]
    head, _, *rows = [line.strip('| ').split(' | ') for line in table.splitlines()]
    assert [row[0] for row in rows] == ['80 %', '100 %, no stage 2'] and {row[1] for row in rows} == {'2'}
    runs = ['ckpt80_img10_finetune_order0', 'ckpt100_only_finetune_order0']
    for name, row in zip(runs, rows):
        row = dict(zip(head, row))
        each = [json.loads((root / f'seed{seed}/{name}/ckpt_100/eval/results.json').read_text())['tasks']
                for seed in (7, 8)]
        expected = {task: sum(100 * one[task]['score'] for one in each) / 2 for task in ('pope', 'walls')}
        for task, value in expected.items():
            assert row[task].split(' ')[0] == f'{value:.1f}'
        assert row['vision'].split(' ')[0] == f"{expected['pope'] - 50:.1f}"
        assert abs(float(row['text'].split(' ')[0]) - expected['walls'] + 33.33) < 0.06
        assert row['steps of stage 3'] == '5'
        if 'only' not in name:
            mix = root / 'seed7' / name[:name.index('_fine')] / 'ckpt_100'
            seen = meta_of(mix)['seen']['captions']
            assert row['images'] == str(seen['n_image']) and row['caption loss tokens'] == str(seen['n_kept'])
            assert float(row['caption loss']) > 1
    for name in ('fig4.png', 'fig4_tasks.png', 'fig4_steps.png', 'fig3.png', 'curves.png'):
        assert (root / name).read_bytes()[:4] == b'\x89PNG', name
    page = (root / 'study.html').read_text()
    assert page.count('<img') == 5 and '80 %' in page and '&quot;n_order&quot;: 1' in page
    assert 'F0 80 % against 100 % without stage 2 | vision' in out and 'step at which a task reaches 70' in (
        root / 'fig4.md').read_text()
    before, n_start = (root / 'fig4.md').read_text(), len(list((tmp_path.parent / 'scripts0').glob('*.err')))
    for name in ('draw', 'curves', 'draw_schedules'):
        monkeypatch.setattr(findings, name, pretend)
    study.main(['report', *argv[1:]])
    study.main(argv)                                                     # nothing is left to run
    assert (root / 'fig4.md').read_text() == before
    assert len(list((tmp_path.parent / 'scripts0').glob('*.err'))) == n_start
    assert capsys.readouterr().out.count('F0 80 % against 100 % without stage 2 | text') == 2
