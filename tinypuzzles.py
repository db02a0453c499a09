"""
A small SMART-101 in the release's layout, of the tiny world's scenes (tinyworld.py): twelve puzzles of all categories.
    python tinypuzzles.py data --out=data/tiny/SMART101-Data           # the release's slip included: 62/puzzle_63.csv
    python tinypuzzles.py table out/tiny/smart101_*                    # means of runs over seeds, with 95 % t intervals

Most questions name a colour or a shape, so that neither the picture nor the question is enough.
"""
import argparse
import csv
import io
import itertools
import json
import os
import sys

from errors import UserError, reading, user_error_hook
from files import write_file, writing
from findings import mean_and_interval
from puzzles import COLUMNS, LETTERS
from shards import new_folder
from tinyworld import COLOURS, CELLS, GRID, SHAPES, Draws, encode_image, make_scene, render

ICON = dict(star='star', ring='ball', square='books', triangle='tree')
DIGITS = [str(n) for n in range(5)]


def tiny_puzzle(puzzle, scene, draw):
    """One instance of a puzzle about a scene: (question, right option, what options are drawn from; () = pictures)."""
    things, thing = scene.objects, draw.pick(scene.objects)
    row, column = divmod(thing.cell, GRID)
    colour, shape = draw.pick(list(COLOURS)), draw.pick(SHAPES)
    n = sum(other.colour == colour for other in things)
    if puzzle == 1:
        return f'what shape is at {CELLS[thing.cell]}?', ICON[thing.shape], ['hat', 'moon', *ICON.values()]
    if puzzle == 2:
        return f'how many {shape} are there?', str(sum(other.shape == shape for other in things)), DIGITS
    if puzzle == 3:
        return f'how many {colour} are there?', str(n), DIGITS
    if puzzle == 7:
        k = draw.pick((2, 3))
        return f'how many {colour} are there? times {k}', str(k * n), [str(k * i) for i in range(5)]
    if puzzle == 16:                                                     # sequences: 16 and 18
        ends = [f'{a} and {b}' for a, b in itertools.combinations(range(1, 10), 2)]
        return 'where are the objects?', f'{things[0].cell + 1} and {things[-1].cell + 1}', ends
    if puzzle == 18:
        order = ['-'.join(map(str, draw.sample((1, 2, 3, 1, 2, 3), len(things)))) for _ in range(40)]
        return 'where are the objects?', '-'.join(str(other.cell % GRID + 1) for other in things), order
    if puzzle == 25:
        half = draw.pick(('AM', 'PM'))
        return (f'where is the {thing.name}? {"early" if half == "AM" else "late"}', f'{thing.cell + 1}:00 {half}',
                [f'{hour}:00 {half}' for hour in range(1, 13)])
    if puzzle == 44:
        return f'where is the {thing.name}?', LETTERS[column], ()
    if puzzle == 58:
        sign = draw.pick('+-x/')
        word = {'+': 'and', '-': 'but', 'x': 'of', '/': 'or'}[sign]
        return f'{word} how many {colour} are there?', f'{sign}{n}', [sign + digit for digit in DIGITS]
    if puzzle == 62:
        return f'what is the row of the {thing.name}?', str(row + 1), [str(i) for i in range(1, 8)]
    if puzzle == 77:
        return f'what colour is at {CELLS[thing.cell]}?', LETTERS[list(COLOURS).index(thing.colour)], ()
    other = draw.pick([other for other in things if other != thing])
    steps = abs(row - other.cell // GRID) + abs(column - other.cell % GRID)
    return f'from the {thing.name} to the {other.name}?', f'{steps} cm', [f'{i} cm' for i in range(1, 8)]


PUZZLES = (1, 2, 3, 7, 16, 18, 25, 44, 58, 62, 77, 92)


def write_puzzles(out, n_row, seed, puzzles=PUZZLES):
    """Write n_row instances of each puzzle into a new folder `out`."""
    with writing(out), new_folder(out) as part:
        for puzzle in puzzles:
            draw, table = Draws(seed, 9, puzzle), io.StringIO(newline='')
            writer = csv.writer(table)
            writer.writerow(['id', *COLUMNS, 'Note'])
            for i in range(n_row):
                scene = make_scene(draw, 'train')
                question, right, others = tiny_puzzle(puzzle, scene, draw)
                options = draw.sample([right] + draw.sample(sorted({*others} - {right}), 4)) if others else [''] * 5
                letter = LETTERS[options.index(right)] if others else right
                image = f'puzzle_{puzzle}_{i + 1}.png'
                write_file(f'{part}/{puzzle}/img/{image}', encode_image(render([scene])[0], 'png'))
                writer.writerow([i + 1, question, image, *options, letter, ''])
            write_file(f'{part}/{puzzle}/puzzle_{63 if puzzle == 62 else puzzle}.csv', table.getvalue())


def table(folders):
    """Lines with the test scores of runs of smart101.py, those alike but for their seed taken together."""
    groups = {}
    for folder in folders:
        path = os.path.join(folder, 'smart101.json')
        with reading(path, 'results of smart101.py'), open(path, encoding='utf-8') as f:
            content = json.load(f)
            shown = content['config']['parts'], 'Q-Former' if content['config']['qformer'] else 'means'
            groups.setdefault(shown, []).append([100 * content['test'][key] for key in ('S_acc', 'O_acc')])
    return [f"{'shown':<10}{'by':<10}{'seeds':>5}   S_acc           O_acc"] + [
        f'{what:<10}{by:<10}{len(scores):>5}   '
        + '   '.join('{:5.1f} +- {:4.1f}'.format(*mean_and_interval(column)) for column in zip(*scores))
        for (what, by), scores in groups.items()]


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('command', choices=('data', 'table'))
    parser.add_argument('folders', nargs='*', help='of runs, for the table')
    parser.add_argument('--out', default='data/tiny/SMART101-Data')
    parser.add_argument('--n_row', type=int, default=2000)
    parser.add_argument('--seed', type=int, default=7)
    args = parser.parse_args()
    sys.excepthook = user_error_hook
    if args.command == 'data':
        write_puzzles(args.out, args.n_row, args.seed)
    else:
        print('\n'.join(table(args.folders)))
