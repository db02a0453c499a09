"""
A small SMART-101 in the release's layout, of the tiny world's scenes (tinyscenes.py): twelve puzzles of all categories.
    python tinypuzzles.py --out=data/tiny/SMART101-Data                # the release's slip included: 62/puzzle_63.csv

Most questions name a colour or a shape, so that neither the picture nor the question is enough.
"""
import argparse
import csv
import io
import itertools
import sys

from errors import user_error_hook
from files import write_file, writing
from puzzles import COLUMNS, LETTERS
from shards import new_folder
from tinyscenes import COLOURS, CELLS, GRID, SHAPES, Draws, encode_image, make_scene, render

ICON = dict(star='star', ring='ball', square='books', triangle='tree')
WORD = {'+': 'and', '-': 'but', 'x': 'of', '/': 'or'}


def tiny_puzzle(puzzle, scene, draw):
    """One instance of a puzzle about a scene: (question, right option, what options are drawn from; () = pictures)."""
    things, thing = scene.objects, draw.pick(scene.objects)
    other = draw.pick([other for other in things if other != thing])
    (row, column), (row_2, column_2) = divmod(thing.cell, GRID), divmod(other.cell, GRID)
    colour, shape, k = draw.pick(list(COLOURS)), draw.pick(SHAPES), draw.pick((2, 3))
    half, sign = draw.pick(('AM', 'PM')), draw.pick('+-x/')
    n = sum(one.colour == colour for one in things)
    many, where, at = f'how many {colour} are there?', f'where is the {thing.name}?', CELLS[thing.cell]
    columns = ['-'.join(map(str, draw.sample((1, 2, 3, 1, 2, 3), len(things)))) for _ in range(40)]
    return {
        1: (f'what shape is at {at}?', ICON[thing.shape], ['hat', 'moon', *ICON.values()]),
        2: (f'how many {shape} are there?', str(sum(one.shape == shape for one in things)), [*'01234']),
        3: (many, str(n), [*'01234']),
        7: (f'{many} times {k}', str(k * n), [str(k * i) for i in range(5)]),
        16: ('where are the objects?', f'{things[0].cell + 1} and {things[-1].cell + 1}',
             [f'{a} and {b}' for a, b in itertools.combinations(range(1, 10), 2)]),
        18: ('where are the objects?', '-'.join(str(one.cell % GRID + 1) for one in things), columns),
        25: (f'{where} {"early" if half == "AM" else "late"}', f'{thing.cell + 1}:00 {half}',
             [f'{hour}:00 {half}' for hour in range(1, 13)]),
        44: (where, LETTERS[column], ()),
        58: (f'{WORD[sign]} {many}', f'{sign}{n}', [f'{sign}{i}' for i in range(5)]),
        62: (f'what is the row of the {thing.name}?', str(row + 1), [*'1234567']),
        77: (f'what colour is at {at}?', LETTERS[list(COLOURS).index(thing.colour)], ()),
        92: (f'from the {thing.name} to the {other.name}?', f'{abs(row - row_2) + abs(column - column_2)} cm',
             [f'{i} cm' for i in range(1, 8)])}[puzzle]


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


if __name__ == '__main__':
    sys.excepthook = user_error_hook
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', default='data/tiny/SMART101-Data')
    parser.add_argument('--n_row', type=int, default=2000, help='instances of each puzzle')
    parser.add_argument('--seed', type=int, default=7)
    parser.add_argument('--puzzles', type=int, nargs='+', choices=PUZZLES, default=PUZZLES)
    write_puzzles(**vars(parser.parse_args()))
