"""
What one looks at after a run: pages of scores, answers with their pictures, and training curves.

    python report.py out/tiny/finetune/ckpt_100                                     # or its eval/results.json
    python report.py out/tiny/text out/tiny/ckpt80_img10 out/tiny/finetune          # run folders, in their order
    python report.py out/tiny/text --out=curves.pdf                                 # .png, .pdf or .svg

Of a checkpoint that was evaluated: report.html beside results.json, one file with the scores, a sample of right and
wrong answers with their images (from the eval_dir that results.json names; --eval_dir=DIR where they lie elsewhere now)
and the curves of its run. Of runs: prints the ladder of their scores, and draws curves.png into the last folder.
"""
import io
import json
import math
import os
import re
import sys
from itertools import accumulate
from pathlib import Path

from tqdm import tqdm

from benchmark_files import RESULTS, read_results
from errors import NUMBER, Field, UserError, reading, user_error_hook
from files import write_whole
from gallery import STATES, TEXTS, cards, cut
from page import filters, fold, page, picture, table, tag
from scorers import PART, TABLE_NOTES

# Okabe and Ito's colours, apart for every kind of colour vision; the line styles tell them apart in grey print, too
STYLES = (('#0072B2', '-'), ('#D55E00', '--'), ('#009E73', '-.'), ('#CC79A7', ':'), ('#56B4E9', '-'), ('#E69F00', '--'))
VALIDATION = {'val_text_loss': 'o', 'val_caption_loss': 's'}              # key in log.jsonl -> marker


def titles(folders):
    """Short names of run folders: the last part of each, or all of it where two would be called the same."""
    short = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    return short if len(set(short)) == len(short) else list(folders)


# --- scores -------------------------------------------------------------------------------------------------------

def read_scores(folder, title):
    """The (column title, {task: (score in percent, n)}) of each ckpt_NNN of a run that was evaluated."""
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder; expected the folder of a run, such as out/tiny/text, or a "
                        "results.json")
    columns = []
    for ckpt in sorted(name for name in os.listdir(folder) if re.fullmatch(r'ckpt_\d{3}', name)):
        path = os.path.join(folder, ckpt, 'eval', 'results.json')
        if os.path.exists(path):
            tasks = read_results(path)['tasks']
            columns.append((f'{title}/{ckpt[5:]}', {name: (100 * t['score'], t['n']) for name, t in tasks.items()}))
    return columns


def ladder(folders):
    """
    The scores that lie in run folders as a text table: a row per task, a column per checkpoint, in percent, '-' where a
    checkpoint was not asked; n is a range where it was not the same.
    """
    columns = [column for run in zip(folders, titles(folders)) for column in read_scores(*run)]
    if not columns:
        raise UserError(f"{', '.join(folders)}: no ckpt_NNN there has eval/results.json; evaluate.py makes it")
    rows = [['task', 'n'] + [title for title, _ in columns]]
    for task in dict.fromkeys(task for _, scores in reversed(columns) for task in scores):       # the last run's order
        n = sorted({scores[task][1] for _, scores in columns if task in scores})
        rows.append([task, str(n[0]) if len(n) == 1 else f'{n[0]}-{n[-1]}']
                    + [f'{scores[task][0]:.1f}' if task in scores else '-' for _, scores in columns])
    width = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join('  '.join([row[0].ljust(width[0])] + [cell.rjust(w) for cell, w in zip(row[1:], width[1:])])
                     for row in rows)


# --- curves -------------------------------------------------------------------------------------------------------

def read_log(folder):
    """
    The curves of a run: {'lr': ..., 'norm': ..., 'sources': {name: ...}, 'validation': {key: ...}}, each a list of
    (step, value). A source has a point where the step held a row of it and its loss is finite. Torn lines are skipped.
    """
    path, found = os.path.join(folder, 'log.jsonl'), {'lr': [], 'norm': [], 'sources': {}, 'validation': {}}
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
                if 0 < float(row.get('grad_norm', 0)) < math.inf:
                    found['norm'].append((int(row['step']), float(row['grad_norm'])))
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


def new_figure(width, height):
    """A matplotlib Figure, in inches."""
    try:
        from matplotlib.figure import Figure                     # without pyplot: no window, nothing global
    except ImportError as e:
        raise UserError(f"figures need matplotlib ({e}): pip install -r requirements.txt") from e
    return Figure(figsize=(width, height), layout='constrained')


def save_figure(figure, path, n_column):
    """Write a figure to a path or a file object (PNG), with one legend below for the labels of all its axes."""
    if isinstance(path, str) and not path.endswith(('.png', '.pdf', '.svg')):
        raise UserError(f"out={path}: expected a name that ends in .png, .pdf or .svg")
    entries = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(entries.values(), entries.keys(), loc='outside lower center', ncols=n_column, frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except OSError as e:
        raise UserError(f"out={path}: cannot be written ({e.strerror})") from e


def curves(folders, path):
    """
    Draw the training curves of run folders side by side: loss by source and validation losses, gradient norm, lr. The
    axes of losses and norms are shared and logarithmic. path: see save_figure.
    """
    logs = [read_log(folder) for folder in folders]
    figure = new_figure(0.6 + 3.4 * len(logs), 5.8)
    from matplotlib.ticker import LogLocator, MaxNLocator
    losses, norms, rates = figure.subplots(3, len(logs), sharex='col', sharey='row', squeeze=False,
                                           height_ratios=(3, 1, 1))
    names = list(dict.fromkeys(name for log in logs for name in log['sources']))
    style = {name: STYLES[i % len(STYLES)] for i, name in enumerate(names)}      # a source looks the same in each stage
    for title, log, loss, norm, rate in zip(titles(folders), logs, losses, norms, rates):
        noisy = [(loss, name, points, *style[name]) for name, points in log['sources'].items()]
        for axis, name, points, color, line in noisy + [(norm, None, log['norm'], 'black', '-')] * bool(log['norm']):
            steps, values = zip(*points)
            window = max(1, len(values) // 50)
            axis.plot(steps, values, color=color, linewidth=0.5, alpha=0.2)
            axis.plot(steps, running_mean(values, window), color=color, linestyle=line, linewidth=1.8, label=name)
        for name, points in log['validation'].items():
            loss.plot(*zip(*points), color='black', linestyle='', marker=VALIDATION[name], markersize=5,
                      markerfacecolor='white', label=name)
        rate.plot(*zip(*log['lr']), color='black', linewidth=1.2)
        loss.set_title(title)
        for axis in (loss, norm):
            axis.set_yscale('log')
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if axis is loss else LogLocator(numticks=6))
            axis.yaxis.set_major_formatter('{x:g}')
            axis.yaxis.set_minor_formatter('')
            axis.grid(alpha=0.3)
        rate.grid(alpha=0.3)
        rate.set_xlabel('step')
        rate.set_ylim(bottom=0)
        rate.ticklabel_format(axis='y', scilimits=(0, 0))
        rate.xaxis.set_major_locator(MaxNLocator(4, steps=(1, 2, 5, 10)))
    losses[0].set_ylabel('loss (nats per target)\npale: a step, bold: running mean')
    norms[0].set_ylabel('gradient\nnorm')
    rates[0].set_ylabel('learning\nrate')
    save_figure(figure, path, 2 * len(logs))


# --- the page of a checkpoint -------------------------------------------------------------------------------------

STABLE = Field(dict, of={'score': Field(NUMBER), 'tasks': TEXTS, 'missing': TEXTS})
CONTENT = {**RESULTS, 'config': Field(dict), 'ckpt': Field(str), 'meta': Field(dict), 'stable': Field(dict, of=STABLE)}
HEAD = ['', '0 to 100', 'score', '95 % interval', 'n', 'chance', 'blind']
LEGEND = ('dot: score; blue bar: its 95 % interval; orange tick: chance; diamond: blind; cut: answers that '
          'max_new_tokens ended; skipped: questions without an image that can be read')


def dots(low, score, high, chance, blind):
    """A score with its interval, chance and blind on a line from 0 to 1, as SVG; their shapes tell them apart."""
    low, score, high, chance, blind = (round(5 + 190 * min(max(v, 0), 1), 1) for v in (low, score, high, chance, blind))
    return tag('svg', tag('path', d='M5 10H195M5 6V14M100 7V13M195 6V14', stroke='#bbb'),
               tag('path', d=f'M{low} 10H{high}', stroke='#56B4E9', stroke_width=6),
               tag('path', d=f'M{chance} 3V17', stroke='#D55E00', stroke_width=2),
               tag('path', d=f'M{blind - 5} 10l5 -5 5 5 -5 5z', stroke='#222', fill='none'),
               tag('circle', cx=score, cy=10, r=4, fill='#0072B2'), width=200, height=20)


def score_cells(name, part):
    """The row of a task, or of a type of its questions, below HEAD."""
    low, score, high, chance = (part[key] for key in ('low', 'score', 'high', 'chance'))
    blind = max(part['constant'], part.get('attribute') or 0)
    return [name, dots(low, score, high, chance, blind), f'{100 * score:.2f}', f'{100 * low:.1f}-{100 * high:.1f}',
            part['n'], f'{100 * chance:.2f}', f'{100 * blind:.2f}']


def score_blocks(content):
    """The tables of scores and of stable scores."""
    counts = ('malformed', 'empty', 'skipped')
    rows = [[*score_cells(tag('a', name, href=f'#task{i}'), result), *(result.get(key, '-') for key in counts),
             result.get('reached_max_new_tokens', '-'), result['variant']]
            for i, (name, result) in enumerate(content['tasks'].items())]
    stable = [[title, f"{100 * s['score']:.2f}", ', '.join(s['tasks']), ', '.join(s['missing']) or '-']
              for title, s in content['stable'].items()]
    return [table([[*HEAD, *counts, 'cut', 'rule'], *rows]), LEGEND,
            fold('what the words mean', tag('pre', TABLE_NOTES)),
            table([['stable score', 'score', 'over', 'missing'], *stable])]


def about_blocks(path, content):
    """What results.json says of the checkpoint."""
    with reading(path, 'results'):                           # nested too deeply, it could be read and not be written
        texts = [cut(json.dumps(content[key], indent=1), 200_000) for key in ('meta', 'config')]
    return [content['ckpt'], fold('meta.json, with the config of its run', tag('pre', texts[0])),
            fold('config of the evaluation', tag('pre', texts[1]))]


def other_numbers(result):
    """What a task's entry has beyond that of every task, such as other scoring rules, as a folded table."""
    known = {*PART, 'types', 'constant_answers'}
    flat = {f'{key} {inner}'.strip(): number for key, value in result.items() if key not in known
            for inner, number in (value.items() if isinstance(value, dict) else [('', value)])}
    rows = [[key, f'{value:.5g}'] for key, value in flat.items() if type(value) in NUMBER and abs(value) < 1e15]
    return fold('other numbers', table([['', ''], *rows]))


def curve_blocks(folder, ckpt):
    """The curves of the run of an evaluation's folder as a picture, or why there are none."""
    # in a run: RUN/ckpt_100/eval, and RUN/eval/ckpt_step_5 of checkpoints that it will delete; else where ckpt was
    places, png = [os.path.dirname(os.path.dirname(folder)), os.path.dirname(ckpt)], io.BytesIO()
    run = [place for place in places if place and os.path.isfile(os.path.join(place, 'log.jsonl'))][:1]
    if not run:
        return ['No log.jsonl of its run was found.']
    try:
        curves(run, png)
    except UserError as e:                                   # the scores are worth a page all the same
        return [f'No curves: {e}']
    return [picture(png.getvalue(), 'png', 'loss, gradient norm and learning rate by step')]


def results_page(path, eval_dir=''):
    """Write report.html beside a results.json, and return its path; eval_dir: where images lie now, '' = as then."""
    folder = os.path.dirname(os.path.abspath(path))
    content = read_results(path, CONTENT)
    tasks, frame, was = content['tasks'], content['config'].get('box_frame'), str(content['config'].get('eval_dir', ''))
    galleries, types = [], set()
    for i, (name, result) in enumerate(tqdm(tasks.items(), desc='gallery', leave=False, disable=None)):
        blocks, found = cards(name, folder, was, eval_dir or was, frame)
        by_type = [fold('by type', table([HEAD, *(score_cells(*item) for item in result['types'].items())]))]
        galleries.append(tag('section', tag('h3', name), *by_type * bool(result['types']), other_numbers(result),
                             *blocks, id=f'task{i}'))
        types |= found
    form = filters({'task': list(tasks), 'result': list(STATES), 'type': sorted(types)})
    title = f"{os.path.basename(content['ckpt']) or 'predictions'}, {content['meta'].get('stage')}"
    out = os.path.join(folder, 'report.html')
    write_whole(Path(out), page(title, [
        ('Scores', score_blocks(content)), ('Checkpoint', about_blocks(path, content)),
        ('Training curves', curve_blocks(folder, content['ckpt'])),
        ('Answers', [form, *galleries])]))
    return out


# --- the command line ---------------------------------------------------------------------------------------------

def find_results(path):
    """The results.json that a path means, the file or the one in a checkpoint's or an evaluation's folder, or ''."""
    places = (path, os.path.join(path, 'results.json'), os.path.join(path, 'eval', 'results.json'))
    return next((place for place in places if os.path.isfile(place)), '')


def main(argv):
    """The command line: run folders and at most one --out=PATH, or checkpoints and at most one --eval_dir=DIR."""
    paths = [arg for arg in argv if not arg.startswith('-')]
    results = [found for path in paths if (found := find_results(path))]
    key = '--eval_dir=' if results else '--out='
    given = [arg.removeprefix(key) for arg in argv if arg.startswith(key)]
    if not paths or len(given) > 1 or len(paths) + len(given) < len(argv) or len(results) not in (0, len(paths)):
        raise UserError("usage: python report.py RUN_FOLDER [RUN_FOLDER ...] [--out=curves.png], or "
                        "python report.py CHECKPOINT_OR_RESULTS [...] [--eval_dir=DIR]")
    for path in results:
        out = results_page(path, *given)
        print(f"scores and answers in {out} ({os.path.getsize(out) / 2 ** 20:.1f} MiB)")
    if not results:
        print(ladder(paths))
        path = given[0] if given else os.path.join(paths[-1], 'curves.png')
        curves(paths, path)
        print(f"training curves in {path}")


if __name__ == '__main__':
    sys.excepthook = user_error_hook
    main(sys.argv[1:])
