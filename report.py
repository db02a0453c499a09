"""
What one looks at after a run: a ladder of scores over the checkpoints, and the training curves of the stages.

    python report.py out/tiny/text out/tiny/ckpt80_img10 out/tiny/finetune          # run folders, in their order
    python report.py out/tiny/text --out=curves.pdf                                 # .png, .pdf or .svg

Prints the ladder and writes curves.png into the last folder. Reads eval/results.json of each checkpoint and log.jsonl
of each run, nothing else.
"""
import json
import math
import os
import re
import sys
from itertools import accumulate

from errors import UserError, reading, user_error_hook

# Okabe and Ito's colours, apart for every kind of colour vision; the line styles tell them apart in grey print, too
STYLES = (('#0072B2', '-'), ('#D55E00', '--'), ('#009E73', '-.'), ('#CC79A7', ':'), ('#56B4E9', '-'), ('#E69F00', '--'))
VALIDATION = {'val_text_loss': 'o', 'val_caption_loss': 's'}              # key in log.jsonl -> marker


def titles(folders):
    """Short names of run folders: the last part of each, or all of it where two would be called the same."""
    short = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    return short if len(set(short)) == len(short) else list(folders)


# --- scores -------------------------------------------------------------------------------------------------------

def read_scores(folder, title):
    """The (column title, {task: (score in percent, n)}) of each ckpt_NNN of a run that was evaluated, in order."""
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder; expected the folder of a run, such as out/tiny/text")
    columns = []
    for ckpt in sorted(name for name in os.listdir(folder) if re.fullmatch(r'ckpt_\d{3}', name)):
        path = os.path.join(folder, ckpt, 'eval', 'results.json')
        if os.path.exists(path):
            with reading(path, 'a results.json of evaluate.py'), open(path, encoding='utf-8') as f:
                scores = {name: (100 * float(task['score']), int(task['n']))
                          for name, task in json.load(f)['tasks'].items()}
            columns.append((f'{title}/{ckpt[5:]}', scores))
    return columns


def ladder(folders):
    """
    One table of the scores that lie in run folders: a row per task, a column per checkpoint.
    folders  run folders, in the order of the columns
    returns  str; cells in percent, '-' where a checkpoint was not asked; n is a range where it was not the same
    Raises UserError for a folder that is not there, a file that is not evaluate.py's, or no score at all.
    """
    columns = [column for run in zip(folders, titles(folders)) for column in read_scores(*run)]
    if not columns:
        raise UserError(f"{', '.join(folders)}: no ckpt_NNN there has eval/results.json; evaluate.py makes it")
    rows = [['task', 'n'] + [title for title, _ in columns]]
    for task in dict.fromkeys(task for _, scores in reversed(columns) for task in scores):      # the last run's order
        n = sorted({scores[task][1] for _, scores in columns if task in scores})
        rows.append([task, str(n[0]) if len(n) == 1 else f'{n[0]}-{n[-1]}']
                    + [f'{scores[task][0]:.1f}' if task in scores else '-' for _, scores in columns])
    width = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join('  '.join([row[0].ljust(width[0])] + [cell.rjust(w) for cell, w in zip(row[1:], width[1:])])
                     for row in rows)


# --- curves -------------------------------------------------------------------------------------------------------

def read_log(folder):
    """
    The curves of a run: {'lr': ..., 'sources': {name: ...}, 'validation': {key: ...}}, each a list of (step, value).
    A source has a point where the step held a row of it and its loss is finite. Torn lines are skipped.
    Raises UserError for a log that is not there, is not a run's, or holds no step.
    """
    path, found = os.path.join(folder, 'log.jsonl'), {'lr': [], 'sources': {}, 'validation': {}}
    with reading(path, 'a log of a run'), open(path, encoding='utf-8', errors='replace') as f:
        for line in f:
            try:
                row = json.loads(line)
            except ValueError:                                    # the run is writing it, or was killed there
                continue
            for key in VALIDATION.keys() & row.keys():
                found['validation'].setdefault(key, []).append((int(row['step']), float(row[key])))
            if 'loss' in row:
                found['lr'].append((int(row['step']), float(row['lr'])))
                for name, source in row['sources'].items():
                    if source['loss'] is not None and math.isfinite(source['loss']):
                        found['sources'].setdefault(name, []).append((int(row['step']), float(source['loss'])))
    if not found['lr']:
        raise UserError(f"{path}: holds no step yet")
    return found


def running_mean(values, window):
    """Each value averaged with up to window - 1 before it, never with a later one."""
    sums = [0.0, *accumulate(values)]
    return [(sums[i] - sums[max(0, i - window)]) / min(i, window) for i in range(1, len(sums))]


def curves(folders, path):
    """
    Draw the training curves of run folders side by side: loss by source and validation losses, the lr below.
    folders  run folders, left to right; the loss axis is shared and logarithmic
    path     .png, .pdf or .svg, is overwritten
    Raises UserError for a log that is not there or not readable, or a path that cannot be written.
    """
    if not path.endswith(('.png', '.pdf', '.svg')):
        raise UserError(f"out={path}: expected a name that ends in .png, .pdf or .svg")
    logs = [read_log(folder) for folder in folders]
    try:
        from matplotlib.figure import Figure                     # without pyplot: no window, nothing global
        from matplotlib.ticker import LogLocator, MaxNLocator
    except ImportError as e:
        raise UserError(f"the curves need matplotlib ({e}): pip install -r requirements.txt") from e
    figure = Figure(figsize=(0.6 + 3.4 * len(logs), 4.8), layout='constrained')
    losses, rates = figure.subplots(2, len(logs), sharex='col', sharey='row', squeeze=False, height_ratios=(3, 1))
    names = list(dict.fromkeys(name for log in logs for name in log['sources']))
    style = {name: STYLES[i % len(STYLES)] for i, name in enumerate(names)}      # a source looks the same in each stage
    for title, log, loss, rate in zip(titles(folders), logs, losses, rates):
        for name, points in log['sources'].items():
            steps, values = zip(*points)
            window = max(1, len(values) // 50)
            color, line = style[name]
            loss.plot(steps, values, color=color, linewidth=0.5, alpha=0.2)
            loss.plot(steps, running_mean(values, window), color=color, linestyle=line, linewidth=1.8, label=name)
        for name, points in log['validation'].items():
            loss.plot(*zip(*points), color='black', linestyle='', marker=VALIDATION[name], markersize=5,
                      markerfacecolor='white', label=name)
        rate.plot(*zip(*log['lr']), color='black', linewidth=1.2)
        loss.set(title=title, yscale='log')
        loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        loss.yaxis.set_major_formatter('{x:g}')
        loss.yaxis.set_minor_formatter('')
        loss.grid(alpha=0.3)
        rate.grid(alpha=0.3)
        rate.set_xlabel('step')
        rate.set_ylim(bottom=0)
        rate.ticklabel_format(axis='y', scilimits=(0, 0))
        rate.xaxis.set_major_locator(MaxNLocator(4, steps=(1, 2, 5, 10)))
    losses[0].set_ylabel('loss (nats per target)\npale: a step, bold: running mean')
    rates[0].set_ylabel('learning rate')
    entries = {label: handle for loss in losses for handle, label in zip(*loss.get_legend_handles_labels())}
    figure.legend(entries.values(), entries.keys(), loc='outside lower center', ncols=2 * len(logs), frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except OSError as e:
        raise UserError(f"out={path}: cannot be written ({e.strerror})") from e


def main(argv):
    """The command line: run folders and at most one --out=PATH."""
    out = [arg.removeprefix('--out=') for arg in argv if arg.startswith('--out=')]
    folders = [arg for arg in argv if not arg.startswith('-')]
    if not folders or len(out) > 1 or len(folders) + len(out) < len(argv):
        raise UserError("usage: python report.py RUN_FOLDER [RUN_FOLDER ...] [--out=curves.png]")
    print(ladder(folders))
    path = out[0] if out else os.path.join(folders[-1], 'curves.png')
    curves(folders, path)
    print(f"training curves in {path}")


if __name__ == '__main__':
    sys.excepthook = user_error_hook
    main(sys.argv[1:])
