"""
SMART-101 (arXiv 2212.09993), second-graders' puzzles about pictures: the released files, the four splits, answers as
numbers, S_acc and O_acc. smart101.py trains on it, benchmarks.py asks a VLM, prepare.py makes conversations of it.

    files = read_puzzles('data/SMART101-Data')           # {puzzle: its rows in the file's order}
    rows = split_rows(files, 'instance', 'test')         # {puzzle: those of one part}
    accuracies(rows[2], predictions)                     # of all, by category, by puzzle

The folder is the release's: <puzzle>/puzzle_<puzzle>.csv and <puzzle>/img/, the puzzles 1 to 101, 2000 rows each.
"""
import csv
import io
import itertools
import math
import os
import re
from typing import NamedTuple

import numpy as np

from errors import BadSample, UserError, reading
from files import Shards, read_whole, stamp_of
from images import letterbox, open_image
from kernels import IGNORE_INDEX
from mixture import Sample

LETTERS = tuple('ABCDE')
COLUMNS = ('Question', 'image', *LETTERS, 'Answer')
MAX_CSV_BYTES = 64 << 20                 # of one puzzle: 2000 rows have 1 MB
MAX_VALUE = 99_999                       # of an answer: each value up to the largest of a puzzle is a class
N_STEP = 10                              # of a sequence; shorter ones are padded
CATEGORIES = {                           # "math" is the paper's Arithmetic; "order" is in none of its eight columns
    'counting': (2, 3, 4, 5, 8, 13, 14, 23, 24, 29, 33, 34, 36, 41, 42, 45, 50, 52, 53, 57, 60, 79, 80, 89, 97, 99),
    'math': (6, 11, 30, 31, 38, 43, 46, 58, 59, 67, 71, 88, 90, 98),
    'logic': (40, 56, 62, 64, 74, 81, 87, 91, 100),
    'path': (1, 16, 19, 32, 35, 37, 39, 48, 54, 65, 66, 73),
    'algebra': (7, 9, 10, 12, 15, 27, 28, 47, 49, 61, 63, 72, 76, 85, 101),
    'measure': (20, 21, 22, 25, 26, 92, 93, 94),
    'spatial': (17, 44, 55, 68, 69, 70, 75, 95, 96),
    'pattern': (77, 78, 83, 84, 86),
    'order': (18, 51, 82)}
CATEGORY = {puzzle: name for name, puzzles in CATEGORIES.items() for puzzle in puzzles}
PADS = {16: 26, 39: 26, 100: 26, 18: 5, 35: 5, 63: MAX_VALUE}            # sequences: the class that follows the last
SPELT = (35, 39, 100)                                                    # item; 63's is its largest. These have letters
BY_LETTER = {32, 44, 51, 66, 68, 69, 82, 84, 95, 98}                     # O_acc compares their class with the letter
VALIDATION = {7, 43, 64}                                                 # of the puzzle split
TEST = {61, 62, 65, 66, 67, *range(69, 78), *range(94, 100), 101}
ICONS = """airplane arrow_directions ball biking bird blade boat books building bunny_ears cartwheeling clock cloud disk
drinks emotion_face envelope family fast_train feline flag flower footwear golfing hand hat heart holding_hands
japanese_ideograph kiss lock mailbox marine_animals medal money monkey moon mountain numbers phone prohibit_sign
README.txt star surfing tree umbrella vehicle water_polo worker wrestling writing_utensil""".split()     # of puzzle 1


class Row(NamedTuple):
    """One instance of a puzzle. value is an int, of a sequence N_STEP of them; values has each option's, or None."""
    puzzle: int
    number: int          # its place in the file
    question: str
    image: str           # path
    options: list
    answer: int          # the right option, 0..4
    value: object
    values: list


# --- the files --------------------------------------------------------------------------------------------------------

def answer_value(puzzle, text):
    """
    What an option says, encoded as the release does: an int, of a sequence a list of up to N_STEP ints, not padded. A
    letter is its place from 0; of puzzle 1 an icon's place; of 25 the hour, 12 more for PM (12:00 PM is 24); of 58 ten
    times the place of + - x / from 1, and a number. Raises ValueError for a text that is none of this.
    """
    text = text.strip()
    if puzzle in PADS:
        items = re.sub(r'\b(and|or|only)\b|[\s,-]', ' ', text).split()
        items = [ord(letter) - 65 for letter in ''.join(items)] if puzzle in SPELT else [*map(int, items)]
        if not (1 <= len(items) <= N_STEP and 0 <= min(items) and max(items) <= PADS[puzzle]):
            raise ValueError(f"{text!r}: expected 1 to {N_STEP} items from 0 to {PADS[puzzle]}")
        return items
    if puzzle == 58 and text:
        return 10 * (1 + '+-x/'.index(text[0])) + int(text[1:])
    if puzzle == 25:
        return int(re.sub(':00( [AP]M)?$', '', text)) + 12 * text.endswith('PM')
    icon = '_'.join(text.split())
    if puzzle == 1 and (icon in ICONS or icon + 's' in ICONS):
        return ICONS.index(icon if icon in ICONS else icon + 's')
    if re.fullmatch('[A-Za-z]', text):
        return ord(text.upper()) - 65
    return int(re.sub(' ?(hours?|cm|km)$', '', text).replace('Impossible', '0'))


def puzzle_file(folder, puzzle):
    """The path of a puzzle's CSV; the release calls that of 62 puzzle_63.csv."""
    path, misnamed = (os.path.join(folder, str(puzzle), f'puzzle_{n}.csv') for n in (puzzle, 63))
    return misnamed if puzzle == 62 and not os.path.exists(path) else path


def read_puzzle(folder, puzzle, n_row=2000):
    """
    The first n_row rows of a puzzle, in order: a list of Row, or of a str that says why a row cannot be used.
    Raises UserError for a file that is not there, is no CSV, or lacks a column.
    """
    path, rows = puzzle_file(folder, puzzle), []
    with reading(path, 'CSV'):
        images = set(os.listdir(os.path.join(os.path.dirname(path), 'img')))
        table = csv.DictReader(io.StringIO(read_whole(path, MAX_CSV_BYTES).decode('utf-8-sig'), newline=''))
        missing = [column for column in COLUMNS if column not in (table.fieldnames or ())]
        if missing:
            raise UserError(f"{path}: no column {', '.join(missing)}; expected id,{','.join(COLUMNS)}")
        for i, record in enumerate(itertools.islice(table, n_row)):
            try:
                rows.append(_row(record, puzzle, i, os.path.dirname(path), images))
            except ValueError as e:
                rows.append(f"{path}: row {i + 1}: {e}")
    if puzzle in PADS:
        sequences = [row.value for row in rows if isinstance(row, Row)]
        pad = PADS[puzzle] if puzzle != 63 else max(map(max, sequences), default=0)
        for value in sequences:
            value.extend([pad] * (N_STEP - len(value)))
    return rows


def _row(record, puzzle, i, folder, images):
    if None in (record[column] for column in COLUMNS):
        raise ValueError(f"fewer fields than columns, {','.join(COLUMNS)}")
    if record['image'] not in images:
        raise ValueError(f"its image {record['image']!r} is not in {folder}/img; is it of another puzzle?")
    letter, values = record['Answer'].strip(), []
    if letter not in LETTERS:
        raise ValueError(f"Answer {letter!r}, expected a letter from A to E")
    options = [record[option].strip() if record['A'] else option for option in LETTERS]      # none: they are pictures
    for option in options:
        try:
            values.append(answer_value(puzzle, option))
        except ValueError:
            values.append(None)
    answer = LETTERS.index(letter)
    if values[answer] is None or puzzle not in PADS and not 0 <= values[answer] <= MAX_VALUE:
        raise ValueError(f"its answer {options[answer]!r} is none that puzzle {puzzle} can have")
    image = os.path.join(folder, 'img', record['image'])
    return Row(puzzle, i, record['Question'].strip(), image, options, answer, values[answer], values)


def read_puzzles(folder, n_row=2000, max_bad=0):
    """
    {puzzle: read_puzzle's list} of the puzzles that a folder holds. UserError where it holds none, and with the first
    reason where more than max_bad rows cannot be used.
    """
    found = [puzzle for puzzle in sorted(CATEGORY) if os.path.isdir(os.path.join(folder, str(puzzle)))]
    if not found:
        raise UserError(f"{folder}: no puzzle there; expected the release's SMART101-Data, with folders 1 to 101")
    files = {puzzle: read_puzzle(folder, puzzle, n_row) for puzzle in found}
    if bad := [row for rows in files.values() for row in rows if isinstance(row, str)]:
        if len(bad) > max_bad:
            raise UserError(f"{bad[0]}; {len(bad)} rows cannot be used, max_bad_samples={max_bad}")
        print(f"!!! {len(bad)} rows left out, the first: {bad[0]}")
    return files


def n_class(files):
    """{puzzle: how many values its answers can have} of read_puzzles' result: one more than the largest of the file."""
    return {puzzle: 1 + max((int(np.max(row.value)) for row in rows if isinstance(row, Row)), default=0)
            for puzzle, rows in files.items()}


# --- splits -----------------------------------------------------------------------------------------------------------

PARTS, SPLITS = ('train', 'val', 'test'), ('instance', 'puzzle', 'few_shot', 'answer')
FEW_SHOT = 10                            # rows of each held-out puzzle in train


def split_rows(files, split, part):
    """
    The Rows of one of PARTS, {puzzle: list}, of read_puzzles' result; UserError where none are left.
    split    'instance': 80, 5 and 15 % of each puzzle's rows, in order. 'puzzle': the same, but VALIDATION's and TEST's
             are all that 'val' and 'test' have, and 'train' has none of these. 'few_shot': 'train' has their first
             rows, too. 'answer': the rows with a puzzle's median answer are the test, the others 95 and 5 % (sequences
             and 58, whose answers hardly recur, are split as by 'instance')
    """
    if split not in SPLITS:
        raise UserError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
    at, found = PARTS.index(part), {}

    def cut(rows, ends=(0, 80, 85, 100)):
        return rows[-(-len(rows) * ends[at] // 100):len(rows) * ends[at + 1] // 100]
    for puzzle, rows in files.items():
        home = 2 if puzzle in TEST else 1 if puzzle in VALIDATION else 0
        if split == 'answer' and puzzle not in PADS and puzzle != 58:
            # the release's code takes the largest answer of those that are no more frequent than the median frequency
            values = sorted(row.value for row in rows if isinstance(row, Row))
            tested = [isinstance(row, Row) and row.value == values[len(values) // 2] for row in rows]
            rest = [row for row, held_out in zip(rows, tested) if held_out == (part == 'test')]
            found[puzzle] = rest if part == 'test' else cut(rest, (0, 95, 100))
        elif split in ('instance', 'answer') or at == home:
            found[puzzle] = cut(rows)
        elif split == 'few_shot' and part == 'train':
            found[puzzle] = cut(rows)[:FEW_SHOT]
    found = {puzzle: kept for puzzle, rows in found.items() if (kept := [row for row in rows if isinstance(row, Row)])}
    if not found:
        raise UserError(f"split={split!r}: no row for {part} in the puzzles {', '.join(map(str, files))}")
    return found


# --- scores -----------------------------------------------------------------------------------------------------------

def score(row, prediction):
    """
    (S, O), 1.0 or 0.0: is the predicted value the answer's, and is the option nearest to it the right one?
    prediction  a number, of a sequence N_STEP of them. Of equally near options the first counts; a sequence has to be
                equal; BY_LETTER's values count as letters, as the release scores them
    """
    right = float(prediction == row.value)
    if row.puzzle in PADS:
        return right, right
    if row.puzzle in BY_LETTER:
        return right, float(prediction == row.answer)
    far = [math.inf if value is None else abs(value - prediction) for value in row.values]
    return right, float(far.index(min(far)) == row.answer)


def same_value(prediction, answers):
    """
    1.0 when a written answer has the value of '<option> (puzzle <number>)', answers[0], else 0.0; None when it is none
    that the puzzle can have. (What stands in brackets may follow the prediction, too: another row's answer.)
    """
    option, number = answers[0].removesuffix(')').split(' (puzzle ')
    try:
        said = answer_value(int(number), prediction.split(' (puzzle ')[0].strip().rstrip('.'))
    except ValueError:
        return None
    return float(said == answer_value(int(number), option))


def accuracies(rows, predictions):
    """
    S_acc (the value) and O_acc (the option) of Rows, as section 5 of the paper defines them.
    returns  dict n; S_acc and O_acc, means over all instances; puzzles {number: (S, O)}; categories {name: (S, O)},
             means over their puzzles
    The release's plots have the two labels exchanged. Its "variance" divides an error by the number of classes of
    another row's puzzle; it is not computed here.
    """
    mean = lambda pairs: tuple(sum(column) / len(pairs) for column in zip(*pairs))
    pairs = [score(row, prediction) for row, prediction in zip(rows, predictions, strict=True)]
    puzzles = {number: mean([pair for row, pair in zip(rows, pairs) if row.puzzle == number])
               for number in sorted({row.puzzle for row in rows})}
    categories = {name: mean(inside) for name, numbers in CATEGORIES.items()
                  if (inside := [puzzles[number] for number in numbers if number in puzzles])}
    return dict(zip(('n', 'S_acc', 'O_acc'), (len(pairs), *mean(pairs))), categories=categories, puzzles=puzzles)


# --- for training -----------------------------------------------------------------------------------------------------

class PuzzleSource:
    """
    One puzzle's rows as a source of mixture.py: the ids of the question, at most seq_len; the first target is the
    answer's value, the first N_STEP those of a sequence. image_size 0 = without the picture.
    """
    def __init__(self, puzzle, rows, folder, tokenizer, seq_len, image_size):
        self.name, self.rows, self.tokenizer = f'puzzle_{puzzle}', rows, tokenizer
        self.seq_len, self.image_size = seq_len, image_size
        self.shards = Shards()
        self.shards.add(stamp_of(puzzle_file(folder, puzzle)), len(rows))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        ids, values = self.tokenizer.encode(row.question)[:self.seq_len], np.atleast_1d(row.value)
        tokens = np.full(max(len(ids), len(values)), self.tokenizer.pad_id, np.int64)
        targets = np.full(len(tokens), IGNORE_INDEX, np.int64)
        tokens[:len(ids)], targets[:len(values)] = ids, values
        try:
            images = [letterbox(open_image(row.image), self.image_size)] if self.image_size else []
        except UserError as e:
            raise BadSample(str(e)) from e
        return Sample(tokens, targets, images=images, source=self.name, id=f'{row.puzzle}-{row.number}')
