"""
What a study's finished cells say: a table and figures for each grid, and the paper's findings as tests on seeds.

All is read from the runs' folders: log.jsonl, and eval/results.json and meta.json of checkpoints. The unit of
replication is the seed: it counts for a cell when all orders of fine-tuning are there, and their mean is its value.
Sections and findings are those of arXiv 2503.07603.
"""
import functools
import glob
import json
import math
import os
import textwrap
from pathlib import Path

import numpy as np

from benchmark_files import read_results
from errors import reading
from files import write_whole
from page import link, page, picture, table, tag
from report import STYLES, curves, new_figure, read_log, save_figure
from schedules import lr_at
from scorers import TEXT_BASELINES_9

# a finding of the paper: its name, the cell that should be higher, the cell it is compared with, and the scores it is
# about; a cell says only where it differs from the reference
BOTH = ('vision', 'text')
CONTRASTS = (
    ('F0 80 % against 100 % re-warmed', {}, {'start': '100 %'}, BOTH),
    ('F0 the same, 80 % re-warmed too', {'schedule': 're-warmed'}, {'start': '100 %'}, BOTH),
    ('F0 80 % against 100 % and text only', {}, {'start': '100 %', 'ratio': '0 %'}, BOTH),
    ('F0 80 % against 100 % without stage 2', {}, {'start': '100 %', 'stage 2': 'none'}, BOTH),
    ('F1 80 % against 20 %', {}, {'start': '20 %'}, BOTH),
    ('F2 images against none', {}, {'ratio': '0 %'}, ('vision',)),
    ('F2 none against 1 %', {'ratio': '0 %'}, {'ratio': '1 %'}, ('vision',)),
    ('F2 some images against only images', {}, {'ratio': '100 %'}, BOTH),
    ('F3 from scratch, none against images', {'start': '0 %', 'ratio': '0 %'}, {'start': '0 %'}, BOTH),
    ('F3 from scratch, none against 1 %', {'start': '0 %', 'ratio': '0 %'}, {'start': '0 %', 'ratio': '1 %'}, BOTH),
    ('F4 captions against instructions in stage 2', {}, {'share': '100 %'}, ('vision',)),
    ('F4 instructions against captions in stage 2', {'share': '100 %'}, {}, ('text',)),
    ('F5 4 epochs against 1', {}, {'epochs': '1'}, ('vision',)),
    ('F5 4 epochs against 6', {}, {'epochs': '6'}, BOTH),
    ('F5 no epoch against 1', {'epochs': '0'}, {'epochs': '1'}, ('text',)),
    ('F7 SigLIP + DINOv2 against SigLIP', {'encoder': 'SigLIP + DINOv2'}, {}, ('vision',)),
    ('F7 SigLIP against patches', {}, {'encoder': 'patches'}, ('vision',)),
)
ALPHA = 0.05
# what the paper prints, in percent, for the tables of a study whose benchmarks are the paper's
SIX = ('vqav2', 'gqa', 'textvqa', 'refcoco', 'pope', 'ocid_ref')
NINE = tuple(TEXT_BASELINES_9)
PUBLISHED = {
    'table3': ((*SIX, 'vizwiz'), {'images from 53 % on, 7B': (76.39, 61.08, 46.83, 64.17, 87.48, 46.11, 10.88),
                                  'text only from 53 % on, 7B': (74.69, 60.6, 41.62, 58.89, 87.11, 39.70, 11.69)}),
    'table5': (BOTH, {'DataComp': (46.03, 11.68), 'DataCompDR': (46.07, 15.03), 'CC12M': (45.56, 12.98),
                      'Shutterstock': (45.18, 13.10)}),
    'table6': (BOTH, {'SigLIP': (46.07, 15.03), 'SigLIP + DINOv2': (46.96, 13.47), 'patches': (15.64, 15.03)}),
    'table8': ((*NINE, 'text'), {
        'base 80 %': (19.4, 74.7, 40.8, 44.6, 86.0, 69.2, 26.9, 76.6, 66.2, 25.73),
        'base 100 %': (28.2, 77.1, 47.6, 46.7, 92.0, 72.8, 27.3, 79.1, 69.6, 29.67),
        'after stage 2': (27.7, 72.3, 30.1, 46.2, 83.0, 66.5, 25.9, 74.4, 38.6, 21.26),
        'after stage 3': (32.5, 59.3, 27.2, 35.8, 71.0, 58.2, 22.9, 70.5, 35.0, 15.44),
        'LLaMA 3.2 1B': (21.4, 69.5, 27.2, 46.5, 83.0, 65.1, 30.52, 76.0, 65.8, 23.52),
        'Qwen 2.5 1.5B': (63.6, 80.6, 57.3, 56.5, 85.0, 67.78, 40.84, 76.22, 66.6, 35.68)}),
    'table9': ((*SIX, 'vision'), {'1.4B': (76.82, 61.11, 49.05, 61.29, 87.33, 40.80, 47.13),
                                  'Prismatic 7B': (79.05, 64.16, 51.78, 73.62, 88.28, 50.56, 51.38),
                                  'PaliGemma 3B': (85.6, 67.0, 73.2, 77.9, 87.0, None, 58.14)}),
}


# --- statistics -------------------------------------------------------------------------------------------------------

def t_tail(t, df):
    """P(T > t) of Student's t with df degrees of freedom, t >= 0, by Simpson's rule on the angle atan(t / sqrt(df))."""
    # with t = sqrt(df) tan(a) the density is proportional to cos(a)^(df - 1): smooth, on a bounded interval
    def area(low, high, n=2000):
        a = np.linspace(low, high, 2 * n + 1)
        f = np.cos(a) ** (df - 1)
        return (high - low) / (6 * n) * (f[0] + f[-1] + 4 * f[1::2].sum() + 2 * f[2:-1:2].sum())
    return area(math.atan(t / math.sqrt(df)), math.pi / 2) / (2 * area(0.0, math.pi / 2))


@functools.cache
def t_quantile(p, df):
    """The t with P(T > t) = p < 1/2, by bisection of the angle."""
    low, high, t_of = 0.0, math.pi / 2, lambda angle: math.sqrt(df) * math.tan(angle)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(t_of(middle), df) > p else (low, middle)
    return t_of(low)


def mean_and_interval(values):
    """(mean, half the width of its 95 % t interval); nan for the width of a single value."""
    n = len(values)
    if n < 2:
        return values[0], math.nan
    return float(np.mean(values)), t_quantile(ALPHA / 2, n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)


def paired(differences):
    """
    A paired t test of differences, one a seed: dict mean, half (of the 95 % interval), p (two-sided), n. p is nan for
    fewer than two, and 1 where all are the same: no spread was seen, so nothing says how far chance reaches.
    """
    mean, half = mean_and_interval(differences)
    n, p = len(differences), math.nan
    if n > 1:
        error = float(np.std(differences, ddof=1)) / math.sqrt(n)
        p = 2 * t_tail(abs(mean) / error, n - 1) if error > 1e-9 else 1.0
    return dict(mean=mean, half=half, p=p, n=n)


def holm(p_values):
    """Holm's adjusted p values, in the order given; nan stays nan and counts for nothing."""
    order = sorted((i for i, p in enumerate(p_values) if p == p), key=lambda i: p_values[i])
    adjusted, worst = list(p_values), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = worst
    return adjusted


def seeds_needed(differences, n_test):
    """
    Seeds with which a mean difference like the one seen, at the spread seen, would be shown among n_test tests (the
    strictest step of Holm's), 1000 for that many or more. None where the mean or the spread is 0.
    """
    mean, sd = float(np.mean(differences)), float(np.std(differences, ddof=1)) if len(differences) > 1 else 0.0
    if abs(mean) < 1e-9 or sd < 1e-9:
        return None
    p = lambda n: 2 * t_tail(abs(mean) / sd * math.sqrt(n), n - 1)
    return next((n for n in range(2, 1000) if p(n) < ALPHA / n_test), 1000)


# --- what the runs left -----------------------------------------------------------------------------------------------

def score_names(settings):
    """The names of all scores of a study, the two stable scores first."""
    tasks = (*settings['vision_tasks'], *settings['text_tasks'])
    return list(dict.fromkeys([*BOTH, *(task for task, _ in tasks), *settings['apart_tasks'],
                               settings['vision_example'], settings['text_example']]))


def scores(tasks, settings):
    """
    {one of score_names: (score 0..1, its standard error from the questions)}, of those that the `tasks` of a
    results.json have, 'task/type' for a type of question; a stable score when all of its tasks are there.
    """
    entries = tasks | {f'{name}/{label}': part for name, task in tasks.items() for label, part in task['types'].items()}
    found = {name: (entry['score'], (entry['high'] - entry['low']) / (2 * 1.96))
             for name in score_names(settings)[2:] if (entry := entries.get(name))}
    for title in BOTH:
        tasks = settings[f'{title}_tasks']
        if tasks and found.keys() >= dict(tasks).keys():
            found[title] = (sum(found[task][0] - baseline for task, baseline in tasks) / len(tasks),
                            math.sqrt(sum(found[task][1] ** 2 for task, _ in tasks)) / len(tasks))
    return found


class Cells:
    """The scores of a study's cells, each file read once."""

    def __init__(self, study):
        self.study, self.read, self.commits = study, {}, set()

    def seeds(self, cell, step=0):
        """{seed: {score: (mean over orders, standard error from the questions)}}; step of stage 3, 0 = its end."""
        key = (*sorted(cell.items()), step)
        if key not in self.read:
            self.read[key] = {seed: found for seed in self.study.settings['seeds']
                              if (found := self._seed(cell, seed, step))}
        return self.read[key]

    def _seed(self, cell, seed, step):
        paths = [self.study.results(cell, seed, order, step) for order in range(self.study.settings['n_order'])]
        if not all(map(os.path.exists, paths)):
            return {}
        each = [scores(read_results(path)['tasks'], self.study.settings) for path in paths]
        # the questions are the same in every order, so their error does not shrink with the number of orders
        return {name: tuple(np.mean([one[name] for one in each], axis=0).tolist())
                for name in each[0] if all(name in one for one in each)}

    def values(self, cell, score, step=0):
        """{seed: value} of one score."""
        return {seed: found[score][0] for seed, found in self.seeds(cell, step).items() if score in found}

    def runs(self, cell, seed=None):
        """{stage: (run folder, its last checkpoint's meta.json)} of a seed; None = the cell's first finished seed."""
        seeds = [*self.seeds(cell)][:1] if seed is None else [seed]
        folders = [job.commands[0][1] for seed in seeds for job in self.study.chain(cell, seed, 0)]
        metas = [read_json(f'{folder}/meta.json', 'a checkpoint') for folder in folders]
        self.commits |= {str(meta.get('commit', 'not recorded')) for meta in metas}
        return {meta['stage']: (os.path.dirname(folder), meta) for folder, meta in zip(folders, metas)}

    def along(self, cell, score):
        """{step of stage 3: {seed: value}} of one score, its end included."""
        last = self.runs(cell).get('finetune', ('', {'step': 0}))[1]['step']
        found = {step: self.values(cell, score, step if step < last else 0)
                 for step in (*self.study.along, last) if 0 < step <= last}
        return {step: values for step, values in found.items() if values}

    def cost(self, cell):
        """
        What the cell's runs read, of its first finished seed, and the range of the caption losses over all of them:
        values for COST, '-' where it has no such run.
        """
        runs, row = self.runs(cell), ['-'] * len(COST)
        if 'mix' in runs:
            meta = runs['mix'][1]
            shown = {name: counts for name, counts in meta['seen'].items() if counts['n_image']}
            captions = shown.keys() - {'instruct'}
            logs = [read_log(self.runs(cell, seed)['mix'][0])['validation'] for seed in self.seeds(cell)]
            losses = sorted(log['val_caption_loss'][-1][1] for log in logs if log.get('val_caption_loss'))
            ends = dict.fromkeys(f'{loss:.2f}' for loss in (*losses[:1], *losses[-1:]))
            row[:5] = (f"{meta['tokens']:,}", f"{sum(counts['n_image'] for counts in shown.values()):,}",
                       f"{sum(shown[name]['n_kept'] for name in captions):,}",
                       f"{max([meta['epochs'][name] for name in captions], default=0):.2f}", ' to '.join(ends) or '-')
        if 'finetune' in runs:
            _, meta = runs['finetune']
            row[5:] = f"{meta['step']:,}", f"{max(meta['epochs'].values()):.2f}"
        return row


COST = ('tokens of stage 2', 'images', 'caption loss tokens', 'caption epochs', 'caption loss', 'steps of stage 3',
        'epochs of stage 3')


def read_json(path, what):
    with reading(path, what), open(path, encoding='utf-8') as f:
        return json.load(f)


# --- findings ---------------------------------------------------------------------------------------------------------

def findings(study, cells):
    """The paper's contrasts as far as the cells are there, with verdicts after Holm's adjustment over all of them."""
    rows = []
    for name, better, other, about in CONTRASTS:
        a, b = ({**study.reference, **cell} for cell in (better, other))
        for score in about:
            first, second = cells.values(a, score), cells.values(b, score)
            differences = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
            if differences:
                rows.append(dict(name=name, score=score, differences=differences, **paired(differences)))
    for row, adjusted in zip(rows, holm([row['p'] for row in rows])):
        row['adjusted'] = adjusted
        row['verdict'] = ('one seed' if row['n'] < 2 else 'not shown' if adjusted >= ALPHA else
                          'shown' if row['mean'] > 0 else 'opposite')
        row['needed'] = seeds_needed(row['differences'], len(rows))
    return rows


def findings_table(rows):
    """The findings as rows of a table."""
    known = lambda value, form: form.format(value) if value == value else '-'
    return [['finding', 'score', 'difference, points', '95 % interval', 'seeds', 'p, Holm', 'verdict',
             'seeds it would take'],
            *([row['name'], row['score'], f"{100 * row['mean']:+.1f}", known(100 * row['half'], '+-{:.1f}'),
               str(row['n']), known(row['adjusted'], '{:.3f}'), row['verdict'],
               '>=1000' if row['needed'] == 1000 else str(row['needed'] or '-')]
              for row in rows)]


# --- tables: lists of rows, the first one its head ------------------------------------------------------------------

def markdown(rows):
    return '\n'.join('| ' + ' | '.join(row) + ' |' for row in [rows[0], ['---'] * len(rows[0]), *rows[1:]])


def title_of(line, label):
    return f'{line}, {label}' if line else label


def grid_table(study, cells, grid):
    """The table of a grid's finished cells: scores with their 95 % intervals over seeds, and what they read."""
    rows, names, settings = [], score_names(study.settings), study.settings
    for (line, label), cell in study.cells_of(grid).items():
        if found := cells.seeds(cell):
            row = [title_of(line, label), str(len(found))]
            for name in names:
                mean, half = mean_and_interval([*cells.values(cell, name).values()] or [math.nan])
                spread = f' +-{100 * half:.1f}' if half == half else ''
                row.append(f'{100 * mean:.1f}{spread}' if mean == mean else '-')
            rows.append(row + cells.cost(cell))
    tasks, published = PUBLISHED.get(grid, ((), {}))
    if rows and {*SIX[:5], *NINE} <= {*names}:                   # only beside scores on the same questions
        for title, values in published.items():
            value = dict(zip(tasks, values))
            row = ['-' if value.get(name) is None else f'{value[name]:.1f}' for name in names]
            rows.append([f'paper: {title}', '-', *row, *('-' for _ in COST)])
    blind = settings['blind_caption_loss']
    cost = [f'{name} (blind: {blind:.2f})' if name == 'caption loss' and blind else name for name in COST]
    return [['cell', 'seeds', *names, *cost], *rows] if rows else []


def steps_table(study, cells, grid):
    """
    A table: the first evaluated step of stage 3 at which a task reaches the threshold, seed by seed; <= the first
    evaluated one, > the last.
    """
    names, threshold, rows = score_names(study.settings)[2:], study.settings['threshold'], []
    for (line, label), cell in study.cells_of(grid).items():
        row = [title_of(line, label)]
        for name in names:
            found = cells.along(cell, name)
            name_of = lambda step: f'<={step}' if step == min(found) else str(step)
            first = [next((name_of(step) for step in found if found[step].get(seed, 0) >= threshold), f'>{max(found)}')
                     for seed in study.settings['seeds'] if any(seed in values for values in found.values())]
            row.append(' '.join(first) or '-')
        if {*row[1:]} != {'-'}:
            rows.append(row)
    return [[f'step at which a task reaches {100 * threshold:g}', *names], *rows] if rows else []


# --- figures ----------------------------------------------------------------------------------------------------------

def style_of(k):
    """(colour, line style) of line k: 24 different ones, the first six those of all figures."""
    return STYLES[k % len(STYLES)][0], STYLES[(k + k // len(STYLES)) % len(STYLES)][1]


MARKERS = 'os^DvPX<>'


def panel(axes, study, cells, grid, names):
    """
    One or two scores of a grid, the second on an axis of its own at the right. Bars are 95 % intervals over seeds; the
    pale ones come from the number of questions alone. Hollow: the start at 100 %.
    """
    of_grid = study.cells_of(grid)
    ticks = list(dict.fromkeys(label for line, label in of_grid if line is not None))
    beside = [label for line, label in of_grid if line is None]
    x_of = {label: i for i, label in enumerate(ticks)} | {
        label: len(ticks) + 0.5 + 1.5 * i for i, label in enumerate(beside)}
    for i, name in enumerate(names):
        side = axes.twinx() if i else axes
        for k, line in enumerate(dict.fromkeys(line for line, _ in of_grid)):
            k = k if line is not None else 0                                     # beside it: like the first line
            color = STYLES[i if len(names) > 1 else k % len(STYLES)][0]
            points = []
            for label, cell in ((label, cell) for (its, label), cell in of_grid.items() if its == line):
                if found := [one[name] for one in cells.seeds(cell).values() if name in one]:
                    values, errors = zip(*found)
                    points.append((x_of[label] + 0.07 * i, *mean_and_interval(values), np.mean(errors),
                                   cell['start'] == '100 %'))
            if not points:
                continue
            x, mean, half, error, hollow = map(np.array, zip(*points))
            side.errorbar(x, 100 * mean, 196 * error, fmt='none', ecolor=color, alpha=0.25, elinewidth=5)
            style = dict(color=color, marker=MARKERS[(i + k) % 9], capsize=3)
            drawn = dict(linestyle='') if line is None else dict(
                linestyle=('-', '--', '-.', ':')[k % 4],
                label=', '.join(filter(None, (name if len(names) > 1 else '', line))) or None)
            side.errorbar(x, 100 * mean, 100 * np.nan_to_num(half), **style, **drawn)
            side.errorbar(x[hollow], 100 * mean[hollow], **style, linestyle='', markerfacecolor='white')
        side.set_ylabel(f"{'stable score, ' * (name in BOTH)}{name} (percent)",
                        color=STYLES[i][0] if len(names) > 1 else 'black')
    axes.set_xticks([*x_of.values()], [textwrap.fill(label, 11) for label in x_of], fontsize=7)
    x = study.grids[grid]['x']
    axes.set_xlabel(AXIS_TITLES.get(x, x))
    axes.grid(alpha=0.3)


AXIS_TITLES = {'start': 'share of the text schedule before images', 'ratio': 'share of image sequences in stage 2',
               'share': 'share of instructions among the image sequences', 'epochs': 'epochs of fine-tuning'}


def draw(study, cells, grid, panels, path, draw_panel=panel):
    """A figure of panels, each the scores it shows."""
    n_column = min(4, len(panels))
    n_row = math.ceil(len(panels) / n_column)
    figure = new_figure(max(5.5, 12 / n_column) * n_column, 4.2 * n_row)
    spaces = figure.subplots(n_row, n_column, squeeze=False).flat
    for names, axes in zip(panels, spaces):
        draw_panel(axes, study, cells, grid, names)
    for axes in spaces:
        axes.set_axis_off()
    n, settings = max(len(cells.seeds(cell)) for cell in study.cells_of(grid).values()), study.settings
    figure.suptitle(f"{grid}, {settings['scale']}: seeds {n}, orders of fine-tuning {settings['n_order']}", fontsize=10)
    save_figure(figure, path, 4)
    return figure


def steps_panel(axes, study, cells, grid, names):
    """One score along stage 3, a line a cell: means over seeds and their 95 % intervals."""
    for k, ((line, label), cell) in enumerate(study.cells_of(grid).items()):
        points = [(step + 0.005 * k * study.along[-1], *mean_and_interval([*values.values()]))
                  for step, values in cells.along(cell, names[0]).items()]
        if points:
            x, mean, half = map(np.array, zip(*points))
            color, style = style_of(k)
            axes.errorbar(x, 100 * mean, 100 * np.nan_to_num(half), color=color, linestyle=style, capsize=2,
                          marker=MARKERS[k % 9], markerfacecolor='white' if cell['start'] == '100 %' else color,
                          label=title_of(line, label))
    axes.set(xlabel='step of fine-tuning', ylabel=f'{names[0]} (percent)')
    axes.grid(alpha=0.3)


def draw_schedules(study, cells, path):
    """Figure 3: the lr of stage 1 and of figure 4's stage 2, by the runs' own meta.json; returns what it drew."""
    figure, drawn = new_figure(7, 4.5), set()
    axes = figure.subplots()
    for (_, label), cell in study.cells_of('fig4').items():
        schedules = {stage: meta['schedule'] for stage, (_, meta) in cells.runs(cell).items()}
        begin = int(cell['start'].split()[0]) / 100 * schedules.get('text', {}).get('total', 0)
        for stage, title, shift in (('text', 'stage 1', 0), ('mix', f'stage 2, {label}', begin)):
            if stage in schedules and title not in drawn:
                steps = np.unique(np.linspace(0, schedules[stage]['total'] - 1, 400).astype(int))
                color, style = style_of(len(drawn))
                axes.plot(shift + steps, [lr_at(step, schedules[stage]) for step in steps], color=color,
                          linestyle=style, linewidth=2.5 if stage == 'text' else 1.5, label=title)
                drawn.add(title)
    axes.set(xlabel='step', ylabel='learning rate', yscale='log')
    axes.grid(alpha=0.3)
    save_figure(figure, path, 3)
    return figure


# --- all of it --------------------------------------------------------------------------------------------------------

def report(study, grids):
    """
    Write tables and pictures for each grid that has a finished cell, then findings.md, and print that. Returns [(title,
    its tables, names of its pictures in study.root)], empty where no cell is finished.
    """
    cells, parts, names = Cells(study), [], score_names(study.settings)
    examples = study.settings['vision_example'], study.settings['text_example']
    path = lambda name: os.path.join(study.root, name)
    for grid in grids:
        if not (rows := grid_table(study, cells, grid)):
            continue
        tables, pictures = [rows], []
        if grid.startswith('fig') and len(rows) > 2:                 # two cells at least
            pictures = [f'{grid}.png', f'{grid}_tasks.png']
            draw(study, cells, grid, [BOTH, examples], path(pictures[0]))
            draw(study, cells, grid, [(name,) for name in names[2:]], path(pictures[1]))
        if steps := pictures and study.along and steps_table(study, cells, grid):
            pictures.append(f'{grid}_steps.png')
            draw(study, cells, grid, [(name,) for name in names], path(pictures[-1]), steps_panel)
            tables.append(steps)
        parts.append((grid, tables, pictures))
    if parts:
        if any(cells.runs(cell) for cell in study.cells_of('fig4').values()):
            draw_schedules(study, cells, path('fig3.png'))
            parts.append(('fig3', [], ['fig3.png']))
        if len(runs := cells.runs(study.reference)) == 3:
            curves([runs[stage][0] for stage in ('text', 'mix', 'finetune')], path('curves.png'))
            parts.append(('curves', [], ['curves.png']))
        parts.append(('findings', [findings_table(findings(study, cells))], []))
        for title, tables, _ in parts:
            text = '\n\n'.join(map(markdown, tables)) + '\n'
            if tables:
                write_whole(Path(path(f'{title}.md')), text)
        write_page(study, cells, parts)
        print(f"{text}{', '.join(title for title, *_ in parts)}: in {path('study.html')} and beside it")
    return parts


def write_page(study, cells, parts):
    """study.html: what report() made, links to the pages that report.py wrote for cells, and the settings."""
    sections = []
    for title, tables, pictures in parts:
        shown = [picture(Path(study.root, name).read_bytes(), 'png', name) for name in pictures]
        sections.append((title, [*shown, *map(table, tables)]))
    pages = [os.path.relpath(path, study.root) for seed in study.settings['seeds'] for path in sorted(glob.glob(
        os.path.join(glob.escape(study.root), f'seed{seed}', '*', '*', 'eval', 'report.html')))]
    about = json.dumps(dict(study.settings, files=study.files, commits=sorted(cells.commits)), indent=1)
    sections += [('Answers', [tag('p', link(one, one)) for one in pages]), ('Settings', [tag('pre', about)])]
    write_whole(Path(study.root, 'study.html'), page(f"study, {study.settings['scale']}", sections))
