"""
The paper's grids of runs, from one command: the cells that are missing are trained and evaluated, then drawn.

    python study.py fig4 config/tiny.py config/study.py --seeds=7,365,1       # run what is missing, then report
    python study.py all --print                                             # the commands, a line a run
    python study.py report config/tiny.py config/study.py                   # tables, figures, findings so far

A cell is one choice on each of AXES; a grid varies one or two of them. Runs that cells share are made once: a text run
and its checkpoints for a seed, one run of stage 2 under all its fine-tunings. Everything lies in out/{scale}/study: a
folder a seed, in it a folder a run; then logs/, failed/ and the report. Any number of these processes may work on one
folder, on any machines that see it: a run has one owner. Ctrl-C lets the runs under way save; the same command goes on.
Printed lines stand after those that they need. Sections, tables and figures are those of arXiv 2503.07603.
"""
import contextlib
import fcntl
import functools
import io
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from typing import NamedTuple

from tqdm import tqdm

import findings
from configurator import configure
from errors import UserError, user_error_hook

# --- config: change with a file and --key=value -----------------------------------------------------------------------
scale = '1b'                            # names the folder, out/{scale}/study
seeds = (7, 365)                        # [>= 0] of all three stages; the text run is drawn anew for each
n_order = 1                             # [>= 1] fine-tunings of each cell and seed, in different orders of the data
reference_ratio = '10 %'                # ['10 %' | '20 %' | '30 %' | '50 %'] image ratio of cells that do not vary it
n_job = 1                               # [>= 1] runs at a time
n_gpu = 0                               # [>= 0] GPUs of a run, with a process on each; 0 = a process that sees all
along = (0,)                            # [>= 0] steps inside stage 3 at which it is evaluated, too; 0 = none
vision_tasks = (('textvqa', 0.0), ('refcoco', 0.0), ('pope', 0.5), ('gqa', 0.0), ('vqav2', 0.5))  # [pairs] of the
                                        # stable score, and the baseline of each; task/type = one type of question
text_tasks = (('agieval', 0.2), ('arc_easy', 0.25), ('conceptual_combinations', 0.25), ('cs_algorithms', 0.25),
              ('copa', 0.5), ('hellaswag', 0.25), ('math_qa', 0.2), ('piqa', 0.5), ('pubmed_qa', 0.3333))  # [pairs]
vision_example = 'vqav2'                # the benchmark drawn beside the stable score of vision
text_example = 'arc_easy'               # the same for text
apart_tasks = ('vizwiz',)               # reported beside, never averaged
threshold = 0.7                         # [> 0, < 1] a score; when does a task reach it along stage 3?
blind_caption_loss = 0.0                # [>= 0] nats a token of who knows captions but sees no image; 0 = unknown
# --- config end -------------------------------------------------------------------------------------------------------

RATIOS = {f'{n} %': f'img{n}' for n in (0, 1, 5, 10, 20, 30, 50, 100)} | {'10 %': ''}
AXES = {        # axis: (scripts whose runs it changes, {label: the file under config/axes; '' = the recipe as it is})
    'start': (('pretrain',), {f'{n} %': f'ckpt{n}' for n in (0, 20, 40, 60, 80, 100)} | {'80 %': ''}),
    'ratio': (('pretrain',), RATIOS),
    'schedule': (('pretrain',), {'own': '', 're-warmed': 'rewarm'}),
    'share': (('pretrain',), {'0 %': '', **{f'{n} %': f'instruct{n}' for n in (25, 50, 75, 100)}}),
    'captions': (('pretrain',), {'DataCompDR': '', 'DataComp': 'captions_datacomp', 'CC12M': 'captions_cc12m',
                                 'Shutterstock': 'captions_shutterstock'}),
    'encoder': (('pretrain',), {'SigLIP': '', 'SigLIP + DINOv2': 'encoder_dinosiglip', 'patches': 'encoder_patch',
                                'untrained': 'encoder_untrained'}),
    'trained': (('pretrain', 'finetune'), {'frozen': '', 'trained': 'trained_encoder'}),
    'documents': (('pretrain',), {'joined': '', 'apart': 'document_mask'}),            # in stages 1 and 2
    'image mask': (('pretrain', 'finetune'), {'causal': '', 'prefix': 'image_prefix'}),
    'projector': (('pretrain',), {'mlp2': '', **{kind: f'projector_{kind}' for kind in (
        'linear', 'mlp4', 'attn', 'perceiver')}}),
    'image tokens': (('pretrain',), {'all': '', '9 pooled': 'pool9', '4 pooled': 'pool4', '9 queries': 'query9',
                                     '4 queries': 'query4'}),
    'fusion': (('pretrain',), {'sequence': '', 'cross': 'fusion_cross'}),
    'decoder': (('pretrain', 'finetune'), {'trained': '', 'frozen': 'frozen_decoder', 'LoRA': 'lora'}),
    'tokens': (('pretrain',), {'x1': '', 'x2': 'tokens_x2', 'x4': 'tokens_x4'}),
    'half': (('pretrain', 'finetune'), {'all': '', 'halves': 'instruct_halves'}),
    'stage 2': (('pretrain',), {'yes': '', 'none': ''}),                 # none: stage 3 follows stage 1
    'epochs': (('finetune',), {'4': '', '0': '', **{str(n): f'epochs{n}' for n in (1, 2, 3, 5, 6)}}),    # 0: no stage 3
}
# a grid: the axis along x and its labels, fixed choices, a line for each choice of other axes, cells beside the curve
GRIDS = {
    'fig4': dict(x='start', beside={
        '80 % re-warmed': {'start': '80 %', 'schedule': 're-warmed'},
        '100 %, text only in stage 2': {'start': '100 %', 'ratio': '0 %'},
        '100 %, no stage 2': {'start': '100 %', 'stage 2': 'none'}}),
    'fig5': dict(x='ratio'),
    'fig6': dict(x='ratio', fixed={'start': '0 %'}),
    'fig7': dict(x='share', lines={'all of it in stage 3': {}, 'one half in each stage': {'half': 'halves'}}),
    'fig8': dict(x='epochs', labels=('0', '1', '2', '3', '4', '5', '6')),
    **{f'fig14_{m}': dict(x='ratio', fixed={'start': '60 %', 'tokens': m}, lines={
        f'{n} epochs': {'epochs': n} for n in ('1', '2', '3')}) for m in ('x1', 'x2', 'x4')},
    'table3': dict(x='ratio', labels=(), beside={                # of the paper's 7B model, at 53 % of its schedule
        'images from 60 % on': {'start': '60 %'}, 'text only from 60 % on': {'start': '60 %', 'ratio': '0 %'}}),
    'table4': dict(x='ratio', labels=('5 %', '30 %', '50 %'), fixed={'epochs': '3'}, lines={
        'frozen': {}, 'trained': {'trained': 'trained'}}),
    'table5': dict(x='captions'),
    'table6': dict(x='encoder'),
    'table7': dict(x='ratio', labels=('1 %', '5 %', '10 %'), fixed={'start': '20 %'}, lines={
        '1 epoch': {'epochs': '1'}, '2 epochs': {'epochs': '2'}}),
    'table8': dict(x='epochs', labels=(), beside={
        'base 80 %': {'stage 2': 'none', 'epochs': '0'},
        'base 100 %': {'start': '100 %', 'stage 2': 'none', 'epochs': '0'},
        'after stage 2': {'epochs': '0'}, 'after stage 3': {}}),
    'table9': dict(x='epochs', labels=(), beside={'ours': {}}),
    # not the paper's: connectors and image tokens, Idefics2's table (arXiv 2405.02246); on config/study_tokens.py
    'projectors': dict(x='projector'),
    'image_tokens': dict(x='image tokens'),
    'idefics2': dict(x='fusion', labels=(), beside={
        'in the row, frozen decoder': {'decoder': 'frozen'},
        'in the row, perceiver, frozen decoder': {'image tokens': '9 queries', 'decoder': 'frozen'},
        'cross-attention, perceiver, frozen decoder': {'fusion': 'cross', 'image tokens': '9 queries',
                                                       'decoder': 'frozen'},
        'cross-attention, perceiver, LoRA': {'fusion': 'cross', 'image tokens': '9 queries', 'decoder': 'LoRA'},
        'in the row, perceiver, LoRA': {'image tokens': '9 queries', 'decoder': 'LoRA'}}),
}


class Job(NamedTuple):
    """One run and its evaluation: what it makes, how, and after which."""
    name: str               # seed7/ckpt80_img10
    commands: tuple         # ((argv, path that this command makes), ...): all are there when it is done
    needs: tuple            # names of jobs

    @property
    def done(self):
        return all(os.path.exists(path) for _, path in self.commands)


class Study:
    """The jobs of cells, under the settings of one study. files: the config files and keys for the stage scripts."""

    grids = GRIDS

    def __init__(self, settings, files):
        self.settings, self.files = settings, files
        self.root = os.path.join('out', settings['scale'], 'study')
        self.reference = {axis: next(label for label, file in files.items() if not file)
                          for axis, (_, files) in AXES.items()} | {'ratio': settings['reference_ratio']}
        self.along = sorted({step for step in settings['along'] if step})

    def cells_of(self, grid):
        """
        The cells of a grid: {(line, x label): {axis: label}}, one label for each of AXES. '' is the line of a grid with
        one line; the cells beside the curve have the line None.
        """
        grid = self.grids[grid]
        axis, fixed = grid['x'], {**self.reference, **grid.get('fixed', {})}
        found = {(line, label): {**fixed, **choice, axis: label}
                 for line, choice in grid.get('lines', {'': {}}).items() for label in grid.get('labels', AXES[axis][1])}
        return found | {(None, name): {**fixed, **choice} for name, choice in grid.get('beside', {}).items()}

    def train(self, script, seed, recipe, cell, *options):
        """(the run's name, its command): what the config files make of the recipe, and options."""
        axes = [files[cell[axis]] for axis, (scripts, files) in AXES.items() if script in scripts and axis in cell]
        argv = [f'config/{recipe}.py', *self.files, *(f'config/axes/{name}.py' for name in axes if name)]
        n = self.settings['n_gpu']
        start = ['torchrun', '--standalone', f'--nproc_per_node={n}'] if n > 1 else ['python']
        return resolved(script, tuple(argv))['name'], [
            *start, f'{script}.py', *argv, f"--scale={self.settings['scale']}/study/seed{seed}", *options]

    def job(self, seed, name, argv, needs, kept=('ckpt_100',), tasks=''):
        """A Job that trains by argv and evaluates the checkpoints `kept`, the last of which is there at the end."""
        folders = [os.path.join(self.root, f'seed{seed}', name, ckpt) for ckpt in kept]
        asked = ['python', 'evaluate.py', *self.files, *([f'--tasks={tasks}'] if tasks else [])]
        scores = (([*asked, f'--ckpt={folder}'], results_of(folder)) for folder in reversed(folders))    # the end first
        return Job(f'seed{seed}/{name}', ((argv, folders[-1]), *scores), tuple(job.name for job in needs))

    def chain(self, cell, seed, order):
        """The jobs that a cell needs, each after the one that it needs itself."""
        jobs, start = [], int(cell['start'].split()[0])
        texts = ','.join(sorted({task.partition('/')[0] for task, _ in self.settings['text_tasks']}))
        if start > 0 or cell['stage 2'] == 'none':
            name, argv = self.train('pretrain', seed, 'text', {'documents': cell['documents']}, f'--seed={seed}')
            jobs = [self.job(seed, name, argv, (), [f'ckpt_{n:03d}' for n in (20, 40, 60, 80, 100)], texts)]
            base, name = f'{name}/ckpt_{start:03d}', name.replace('text', f'ckpt{start}_only')
        if cell['stage 2'] == 'yes':
            name, argv = self.train('pretrain', seed, 'ckpt80_img10', cell, f'--seed={seed}')
            jobs.append(self.job(seed, name, argv, jobs, tasks=texts))
            base = f'{name}/ckpt_100'
        if cell['epochs'] != '0':
            as_long = all(cell[axis] == self.reference[axis] for axis in ('epochs', 'half'))       # as many steps
            steps = self.along if as_long else []
            tuning, _ = self.train('finetune', seed, 'finetune', cell)
            name = f'{name}_{tuning}_order{order}'
            _, argv = self.train('finetune', seed, 'finetune', cell, f'--name={name}', f'--seed={seed + 1000 * order}',
                                 f"--init_from={os.path.join(self.root, f'seed{seed}', base)}",
                                 *([f'--save_every={math.gcd(*steps)}', '--keep_steps=1000'] if steps else []))
            jobs.append(self.job(seed, name, argv, jobs[-1:], [*(f'ckpt_step_{n}' for n in steps), 'ckpt_100']))
        return jobs

    def results(self, cell, seed, order, step=0):
        """The results.json of a cell: at its end, or at a step of its stage 3."""
        job = self.chain(cell, seed, order)[-1]
        only_text = cell['stage 2'] == 'none' and cell['epochs'] == '0'
        name = f"ckpt_{int(cell['start'].split()[0]):03d}" if only_text else f'ckpt_step_{step}' if step else 'ckpt_100'
        return results_of(os.path.join(self.root, job.name, name))

    def jobs(self, grids):
        """All jobs of some grids, each once and after those that it needs; all cells of a seed, then the next seed."""
        found = {}
        for seed in self.settings['seeds']:
            for order in range(self.settings['n_order']):
                for cell in (cell for grid in grids for cell in self.cells_of(grid).values()):
                    for job in self.chain(cell, seed, order):
                        assert found.setdefault(job.name, job) == job, f"two runs are called {job.name}"
        return list(found.values())


def results_of(folder):
    """Where evaluate.py puts the scores of a checkpoint folder."""
    run, name = os.path.split(folder)
    beside = os.path.join(run, 'eval', name) if name.startswith('ckpt_step_') else os.path.join(folder, 'eval')
    return os.path.join(beside, 'results.json')


@functools.cache
def resolved(script, argv):
    """A stage script's config under its files and keys; UserError as the script would raise it."""
    with contextlib.redirect_stdout(io.StringIO()):
        return configure({'__file__': os.path.join(os.path.dirname(os.path.abspath(__file__)), f'{script}.py')},
                         [*argv])


# --- running ----------------------------------------------------------------------------------------------------------

def lock(path):
    """The open lock file of a job, or None while another process has it."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    handle = open(path, 'a')
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return handle
    except BlockingIOError:
        handle.close()
        return None


def launch(argv, log, held, gpus):
    """Start a command whose output goes to the open file `log`; gpus: CUDA_VISIBLE_DEVICES, '' = as it is."""
    program = {'python': [], 'torchrun': ['-m', 'torch.distributed.run']}.get(argv[0])
    argv = [*argv] if program is None else [sys.executable, *program, *argv[1:]]
    # in a session of its own: Ctrl-C reaches the runner alone, which asks its runs to stop and waits for them. The lock
    # goes along: where the runner is killed, nobody else starts this job before the process that is left has ended
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                            start_new_session=True, pass_fds=[held.fileno()],
                            env={**os.environ, 'CUDA_VISIBLE_DEVICES': gpus} if gpus else None)


class Running:
    """A job under way: those of its commands whose file is missing, one after the other, with one log file."""

    def __init__(self, job, root, held, gpus=''):
        self.job, self.held, self.gpus = job, held, gpus
        self.log, self.failed = (os.path.join(root, kind, f"{job.name.replace('/', '_')}.txt")
                                 for kind in ('logs', 'failed'))

    def start(self):
        for path in (self.log, self.failed):
            os.makedirs(os.path.dirname(path), exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.remove(self.failed)
        argv, self.makes = next(command for command in self.job.commands if not os.path.exists(command[1]))
        with open(self.log, 'a', encoding='utf-8') as log:
            print('+', shlex.join(argv), file=log, flush=True)
            self.begin = log.tell()
            self.process = launch(argv, log, self.held, self.gpus)

    def poll(self, stopping):
        """'running', 'done', 'stopped', or why it failed, which is also written to failed/."""
        code = self.process.poll()
        if code is None:
            return 'running'
        good = code == 0 and os.path.exists(self.makes)
        if good and self.job.done:
            return 'done'
        if stopping:
            return 'stopped'
        if good:
            self.start()
            return 'running'
        with open(self.log, 'rb') as f:
            f.seek(max(self.begin, os.path.getsize(self.log) - 5000))
            lines = [line for line in f.read().decode('utf-8', 'replace').splitlines() if line.strip()][-12:]
        reason = f'exit code {code}' if code else f'{self.makes} was not made'
        reason += ''.join(f': {line}' for line in lines[-1:])
        with open(self.failed, 'w', encoding='utf-8') as f:
            f.write('\n'.join([self.job.name, reason, *lines]) + '\n')
        return reason


def run(jobs, root, n_job, n_gpu=0):
    """
    Run what is missing of the jobs, n_job at a time, each on n_gpu GPUs of its own; those that another process runs are
    waited for. Returns {name: reason} of those that failed, or were left out for one that did. Raises
    KeyboardInterrupt after Ctrl-C or SIGTERM, when all runs have saved; a second signal ends them where they are.
    """
    assert {name for job in jobs for name in job.needs} <= {job.name for job in jobs}, "a job needs one not given"
    running, failed, signals, n_sent, begin = {}, {}, [], 0, time.time()
    visible = (os.environ.get('CUDA_VISIBLE_DEVICES') or ','.join(map(str, range(n_job * n_gpu)))).split(',')
    free = [','.join(visible[i * n_gpu:(i + 1) * n_gpu]) for i in range(n_job)]
    usual = {s: signal.signal(s, lambda number, frame: signals.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    done = {job.name for job in jobs if job.done}
    bar = tqdm(total=len(jobs), initial=len(done), unit=' runs', desc=root)
    try:
        while running or (len(done) + len(failed) < len(jobs) and not signals):
            for job in jobs:
                if job.name in done or job.name in failed or job.name in running:
                    continue
                lost = next((name for name in job.needs if name in failed), None)
                if lost:
                    failed[job.name] = f'needs {lost}'
                elif free and not signals and done.issuperset(job.needs):
                    held = lock(os.path.join(root, 'locks', job.name.replace('/', '_')))
                    if held is None:
                        continue
                    one = Running(job, root, held)
                    if job.done:                                       # by another process, meanwhile
                        done.add(job.name)
                        bar.update()
                    elif os.path.exists(one.failed) and os.path.getmtime(one.failed) >= begin:
                        failed[job.name] = 'failed in another process'
                    else:
                        one.gpus, running[job.name] = free.pop(), one
                        one.start()
                        bar.set_postfix_str(', '.join(running))
                        continue
                    held.close()
            for name, one in list(running.items()):
                state = one.poll(bool(signals))
                if state == 'running':
                    continue
                del running[name]
                one.held.close()
                free.append(one.gpus)
                if state == 'done':
                    done.add(name)
                    bar.update()
                elif state != 'stopped':
                    failed[name] = state
                    bar.write(f'!!! {name}: {state}; see {one.log}', file=sys.stderr)
                bar.set_postfix_str(', '.join(running))
            while n_sent < len(signals):
                n_sent += 1
                bar.write(f'stopping: {len(running)} runs save and end; the same command goes on from there',
                          file=sys.stderr)
                for one in running.values():
                    one.process.terminate()                            # torchrun passes it on
            time.sleep(0.05 if running else 0.5)                       # without any: those of another process
    finally:
        bar.close()
        for s, handler in usual.items():
            signal.signal(s, handler)
    if signals:
        raise KeyboardInterrupt
    return failed


def main(argv):
    """The command line: what to do, config files, --key=value, --print."""
    words = [arg for arg in argv if not arg.startswith('-') and not arg.endswith('.py')]
    files = [arg for arg in argv if arg.endswith('.py') and not arg.startswith('-')]
    with contextlib.redirect_stdout(sys.stderr if '--print' in argv else sys.stdout):
        settings = configure({'__file__': os.path.abspath(__file__), '__doc__': __doc__},
                             [arg for arg in argv if arg not in words and arg != '--print'])
    grids = list(GRIDS) if words in (['all'], ['report']) else words
    unknown = [word for word in grids if word not in GRIDS]
    if not words or unknown:
        raise UserError(f"{' '.join(unknown) or 'nothing'}: expected all, report, or some of {', '.join(GRIDS)}")
    study, failed = Study(settings, files), {}
    if words != ['report']:
        n_epoch, said = resolved('finetune', ('config/finetune.py', *files))['n_epoch'], study.reference['epochs']
        varied = {cell['epochs'] for grid in grids for cell in study.cells_of(grid).values()} - {'0', said}
        if varied and n_epoch != int(said):
            raise UserError(f"{' '.join(files)}: n_epoch={n_epoch}, which these grids call {said} epochs: give a file "
                            f"with n_epoch = {said}, after it (config/study.py in the tiny world)")
        jobs = study.jobs(grids)
        if '--print' in argv:
            depth = lambda job: 1 + max((depth(other) for other in jobs if other.name in job.needs), default=0)
            for job in sorted((job for job in jobs if not job.done), key=depth):
                print(' && '.join(shlex.join(argv) for argv, makes in job.commands if not os.path.exists(makes)))
            return
        if need := settings['n_job'] * settings['n_gpu']:
            import torch                                           # a second to import, and only for this
            if need > (have := torch.cuda.device_count()):
                raise UserError(f"n_job={settings['n_job']} runs on n_gpu={settings['n_gpu']} GPUs each: expected "
                                f"{need} GPUs, this machine shows {have}")
        failed = run(jobs, study.root, settings['n_job'], settings['n_gpu'])
    written = findings.report(study, grids)
    if failed:
        raise UserError(f"{len(failed)} of {len(jobs)} runs are missing: "
                        + '; '.join(f'{name} ({why})' for name, why in failed.items()))
    if not written:
        raise UserError(f"{study.root}: no cell of {', '.join(grids)} is finished yet")


if __name__ == '__main__':
    sys.excepthook = user_error_hook
    main(sys.argv[1:])
