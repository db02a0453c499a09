"""puzzles.py and tinypuzzles.py: the release's layout, encodings, splits and scores; SMART-101 as asked of a VLM."""
import csv
import itertools
import json
import os
import shutil
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import prepare
import puzzles
import tinypuzzles
from benchmarks import find_tasks
from data import InstructSource
from errors import UserError
from evaluate import default_options
from images import View
from puzzles import (N_STEP, PADS, Row, accuracies, answer_value, n_class, read_puzzles, same_value, score,
                     split_rows)
from scorers import score_predictions


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """eval/smart101/SMART101-Data with 20 rows of each of the twelve puzzles."""
    out = tmp_path_factory.mktemp('eval') / 'smart101' / 'SMART101-Data'
    tinypuzzles.write_puzzles(str(out), 20, seed=3)
    return out


def row(puzzle, answer, *options):
    """The Row of five options, encoded as read_puzzle does; without any they are pictures."""
    options = list(options or 'ABCDE')
    values = [answer_value(puzzle, option) for option in options]
    value = values['ABCDE'.index(answer)]
    if puzzle in PADS:
        value.extend([PADS[puzzle]] * (N_STEP - len(value)))
    return Row(puzzle, 0, '', '', options, 'ABCDE'.index(answer), value, values)


def test_the_facts_of_the_release():
    counts = {name: len(numbers) for name, numbers in puzzles.CATEGORIES.items()}
    assert counts == dict(counting=26, math=14, logic=9, path=12, algebra=15, measure=8, spatial=9, pattern=5, order=3)
    assert sorted(puzzles.CATEGORY) == list(range(1, 102)) and len(puzzles.ICONS) == 51
    assert len(puzzles.TEST) == 21 and not puzzles.TEST & puzzles.VALIDATION
    assert len(set(puzzles.CATEGORY) - puzzles.TEST - puzzles.VALIDATION - set(PADS)) == 71  # the shared head's


@pytest.mark.parametrize('puzzle, text, value', [
    (2, '12', 12), (44, 'C', 2), (21, '3 hours', 3), (21, '1 hour ', 1), (22, '45 cm', 45), (93, '16 km', 16),
    (101, 'Impossible', 0), (25, '12:00 PM', 24), (25, '12:00 AM', 12), (25, '1:00 PM', 13), (25, '11:00 AM', 11),
    (58, '+2', 12), (58, '-5', 25), (58, 'x6', 36), (58, '/4', 44), (58, '-38', 58), (1, 'airplane', 0),
    (1, 'fast train', 18), (1, 'book', 7), (1, 'wrestling', 49), (16, '4 and 5', [4, 5]),
    (18, '5-2-3-1-4', [5, 2, 3, 1, 4]), (35, 'A, C and E', [0, 2, 4]), (39, 'KNAO', [10, 13, 0, 14]),
    (63, '2, 3, or 4', [2, 3, 4]), (63, 'only 5', [5]), (100, 'MATH', [12, 0, 19, 7])])
def test_answers_are_encoded_as_the_release_does(puzzle, text, value):
    assert answer_value(puzzle, text) == value


@pytest.mark.parametrize('puzzle, text', [
    (2, 'many'), (2, ''), (2, '1' * 5000), (58, '*3'), (58, '+'), (58, ''), (25, 'noon'), (25, ':00 PM'), (16, ''),
    (16, 'gate four'), (18, '6-7'), (39, 'KNA0'), (39, 'ABCDEFGHIJK'), (1, 'unicorn head'), (63, '-')])
def test_a_text_that_is_no_answer_is_refused(puzzle, text):
    with pytest.raises(ValueError):
        answer_value(puzzle, text)


def test_ten_rows_by_hand():
    letters = ('A', 'B', 'C', 'D', 'E')
    word = row(39, 'B', 'KNO', 'KNAO', 'KN', 'ARGO', 'KAO')
    asked = [  # row, prediction, S, O
        (row(2, 'C', '2', '3', '4', '5', '9'), 4, 1, 1),
        (row(2, 'E', '2', '3', '4', '5', '9'), 30, 0, 1),                        # nearest, however far
        (row(3, 'A', '4', '6', '8', '10', '12'), 5, 0, 1),                       # a tie of 4 and 6: the earlier letter
        (row(3, 'B', '4', '6', '8', '10', '12'), 5, 0, 0),                       # ... which is wrong here
        (row(25, 'D', '10:00 AM', '11:00 AM', '1:00 PM', '12:00 PM', '2:00 PM'), 24, 1, 1),  # 24, so 10, 11, 13, 14 ...
        (row(25, 'C', '10:00 AM', '11:00 AM', '1:00 PM', '12:00 PM', '2:00 PM'), 12, 0, 0),  # 12 is nearer to 11: B
        (row(58, 'A', '+2', '-5', 'x6', '/6', '/4'), 12, 1, 1),
        (row(58, 'B', '+2', '-5', 'x6', '/6', '/4'), 31, 0, 0),                  # 25 is 6 away, x6 = 36 only 5
        (word, answer_value(39, 'KNAO') + [26] * 6, 1, 1),
        (word, answer_value(39, 'KNAO') + [26] * 5 + [0], 0, 0)]                 # all ten steps count
    for (r, prediction, s, o), n in zip(asked, range(1, 11)):
        assert score(r, prediction) == (s, o), n
    result = accuracies([r for r, *_ in asked], [p for _, p, *_ in asked])
    assert (result['n'], result['S_acc'], result['O_acc']) == (10, 0.4, 0.6)
    assert result['puzzles'] == {2: (0.5, 1.0), 3: (0.0, 0.5), 25: (0.5, 0.5), 39: (0.5, 0.5), 58: (0.5, 0.5)}
    assert result['categories'] == dict(counting=(0.25, 0.75), math=(0.5, 0.5), path=(0.5, 0.5), measure=(0.5, 0.5))
    assert score(row(44, 'C'), 2) == (1, 1) and score(row(84, 'B', *letters), 2) == (0, 0)
    # an option without a number is never the nearest
    assert score(Row(2, 0, '', '', ['never', '9'], 1, 9, [None, 9]), 0) == (0, 1)


def test_a_category_weighs_its_puzzles_alike_and_the_whole_its_instances():
    rows = [row(2, 'A', *'12345')] * 3 + [row(3, 'A', *'12345')]
    result = accuracies(rows, [1, 1, 1, 2])
    assert result['categories']['counting'] == (0.5, 0.5) and result['S_acc'] == 0.75


def test_the_small_set_has_the_releases_layout(folder):
    files = read_puzzles(str(folder))
    assert list(files) == sorted(tinypuzzles.PUZZLES) and {len(rows) for rows in files.values()} == {20}
    assert not (folder / '62' / 'puzzle_62.csv').exists() and files[62][0].puzzle == 62      # the file named 63
    names = {puzzles.CATEGORY[puzzle] for puzzle in files} - {'order'}
    assert len(names) == 8
    for puzzle, rows in files.items():
        assert [r.number for r in rows] == list(range(20)) and all(os.path.isfile(r.image) for r in rows)
        assert all(r.values[r.answer] == r.value and len(r.options) == 5 for r in rows)
    assert files[44][0].options == list('ABCDE')                                             # pictures
    sizes = n_class(files)
    assert (sizes[16], sizes[18], sizes[58]) == (27, 6, 1 + max(r.value for r in files[58]))
    assert [len(r.value) for r in files[18]] == [N_STEP] * 20 and {r.value[-1] for r in files[18]} == {5}


def fake(n=40, puzzle=2):
    return [row(puzzle, 'A', str(i % 5), *'6789')._replace(puzzle=puzzle, number=i) for i in range(n)]


def test_splits_are_by_row_order():
    files = {puzzle: fake(2000, puzzle) for puzzle in (2, 7, 61)}
    part = lambda split, part: {puzzle: [r.number for r in rows]
                                for puzzle, rows in split_rows(files, split, part).items()}
    for name, numbers in (('train', range(1600)), ('val', range(1600, 1700)), ('test', range(1700, 2000))):
        assert part('instance', name) == dict.fromkeys((2, 7, 61), list(numbers))
    assert part('puzzle', 'train') == {2: list(range(1600))} and part('puzzle', 'val') == {7: list(range(1600, 1700))}
    assert part('puzzle', 'test') == {61: list(range(1700, 2000))}
    assert part('few_shot', 'train') == {2: list(range(1600)), 7: list(range(10)), 61: list(range(10))}
    assert part('few_shot', 'test') == part('puzzle', 'test')
    files = {2: fake(41)}                        # 32.8 and 34.85 rows: down where a part ends, up where one begins
    assert [part('instance', p)[2] for p in puzzles.PARTS] == [[*range(32)], [33], [*range(35, 41)]]
    with pytest.raises(UserError, match="no row for test in the puzzles 2"):
        part('puzzle', 'test')
    with pytest.raises(UserError, match="expected one of instance, puzzle, few_shot, answer"):
        part('random', 'test')


def test_the_answer_split_holds_a_puzzles_median_back():
    files = {2: fake(100), 18: [row(18, 'A', '1-2', '2-1', '3', '4', '5')] * 100}
    tested = split_rows(files, 'answer', 'test')
    assert {r.value for r in tested[2]} == {2} and len(tested[2]) == 20 and len(tested[18]) == 15
    train, val = (split_rows(files, 'answer', part)[2] for part in ('train', 'val'))
    assert {r.value for r in train} == {0, 1, 3, 4} and (len(train), len(val)) == (76, 4)


def edit(folder, out, puzzle, change):
    """A copy of the folder with one puzzle, whose rows (lists) `change` has changed."""
    shutil.copytree(folder / str(puzzle), out / str(puzzle))
    path = out / str(puzzle) / f'puzzle_{puzzle}.csv'
    with open(path, newline='') as f:
        rows = list(csv.reader(f))
    change(rows)
    with open(path, 'w', newline='') as f:
        csv.writer(f).writerows(rows)
    return str(out)


@pytest.mark.parametrize('puzzle, column, value, reason', [
    (2, 'Answer', 'F', "Answer 'F', expected a letter from A to E"),
    (2, 'Answer', '', "Answer '', expected"),
    (2, 'image', 'puzzle_3_1.png', "'puzzle_3_1.png' is not in .*of another puzzle"),
    (2, 'image', '../../3/img/puzzle_3_1.png', "is not in .*of another puzzle"),
    (2, 'options', 'later', "answer 'later' is none that puzzle 2 can have"),
    (2, 'options', '-3', "answer '-3' is none that puzzle 2 can have"),
    (2, 'options', '1000000', "answer '1000000' is none"),
    (18, 'options', '9-9', "answer '9-9' is none that puzzle 18 can have")])
def test_a_row_that_cannot_be_used_is_one_line_and_counted(folder, tmp_path, puzzle, column, value, reason, capsys):
    def change(rows):
        columns = range(3, 8) if column == 'options' else [rows[0].index(column)]
        for i in columns:
            rows[5][i] = value
    root = edit(folder, tmp_path, puzzle, change)
    with pytest.raises(UserError, match=f'row 5: .*{reason}.*1 rows cannot be used') as caught:
        read_puzzles(root)
    assert '\n' not in str(caught.value)
    rows = read_puzzles(root, max_bad=1)
    assert [isinstance(r, Row) for r in rows[puzzle]] == [True] * 4 + [False] + [True] * 15
    assert '!!! 1 rows left out' in capsys.readouterr().out
    train = split_rows(rows, 'instance', 'train')[puzzle]
    assert [r.number for r in train] == [0, 1, 2, 3, *range(5, 16)]                          # places are kept


def test_files_that_are_not_the_releases_are_one_line(folder, tmp_path):
    def drop(rows):
        for r in rows:
            del r[-2:]
    with pytest.raises(UserError, match=r'puzzle_2.csv: no column Answer; expected id,Question,image,A,B,C,D,E,Answer'):
        read_puzzles(edit(folder, tmp_path / 'a', 2, drop))
    (tmp_path / 'a' / '2' / 'puzzle_2.csv').rename(tmp_path / 'a' / '2' / 'puzzle_3.csv')
    with pytest.raises(UserError, match=r'puzzle_2.csv: not readable as CSV \(No such file'):
        read_puzzles(str(tmp_path / 'a'))
    for content in (b'\xff\xfe', b'id\0x', b'"' + b'x' * 200_000):
        (tmp_path / 'a' / '2' / 'puzzle_2.csv').write_bytes(content)
        with pytest.raises(UserError, match=r'puzzle_2.csv: (not readable as CSV|no column Question)'):
            read_puzzles(str(tmp_path / 'a'))
    with pytest.raises(UserError, match="no puzzle there; expected the release's SMART101-Data"):
        read_puzzles(str(tmp_path))

    def short(rows):
        del rows[1][4:]
    with pytest.raises(UserError, match='row 1: fewer fields than columns'):
        read_puzzles(edit(folder, tmp_path / 'b', 2, short))


# --- asked of a VLM ---------------------------------------------------------------------------------------------------

def test_a_vlm_is_asked_for_letters_and_for_values(folder):
    opt = default_options(eval_dir=str(folder.parent.parent), tasks='smart101,smart101_value')
    letters, values = find_tasks(opt)
    asked = [*itertools.chain(*split_rows(read_puzzles(str(folder)), 'instance', 'test').values())]
    assert [e.id for e in letters.examples] == [f'{r.puzzle}-{r.number}' for r in asked] and len(asked) == 36
    assert all(os.path.isfile(e.image) for e in letters.examples) and letters.examples[0].choices == list('ABCDE')
    assert f'\nA. {asked[0].options[0]}\n' in letters.examples[0].prompt
    said = [{'id': e.id, 'prediction': 'ABCDE'[r.answer]} for e, r in zip(letters.examples, asked)]
    result, _ = score_predictions(letters, said)
    assert result['score'] == 1 and result['types']['puzzle 58']['n'] == 3 and result['types']['measure']['n'] == 6
    said = [{'id': e.id, 'prediction': r.options[r.answer].lower().replace('am', 'AM').replace('pm', 'PM') + '.'}
            for e, r in zip(values.examples, asked)]
    assert score_predictions(values, said)[0]['score'] == 1
    said[0]['prediction'] = 'no idea at all'
    result, _ = score_predictions(values, said)
    assert result['score'] == pytest.approx(35 / 36) and result['malformed'] == 1
    assert 'smart101' not in [t.name for t in find_tasks(default_options(
        eval_dir=str(folder.parent.parent), tasks='smart101_value'))]


@pytest.mark.parametrize('prediction, answer, expected', [
    ('24 cm', '24 cm (puzzle 92)', 1.0), ('24', '24 cm (puzzle 92)', 1.0), ('25 cm.', '24 cm (puzzle 92)', 0.0),
    ('12:00 PM', '12:00 PM (puzzle 25)', 1.0), ('12:00 AM', '12:00 PM (puzzle 25)', 0.0),
    ('b', 'B (puzzle 44)', 1.0), ('1-2', '1-2 (puzzle 18)', 1.0), ('2-1', '1-2 (puzzle 18)', 0.0),
    ('tall', '24 cm (puzzle 92)', None), ('3 (puzzle 2)', '3 (puzzle 3)', 1.0)])
def test_a_written_value_is_compared_as_a_value(prediction, answer, expected):
    assert same_value(prediction, [answer]) == expected


def test_prepare_makes_conversations_of_the_training_rows(folder, tmp_path):
    out = str(tmp_path / 'smart101.json')
    assert prepare.main(['smart101', str(folder), '--out', out, '--split', 'puzzle']) == 0
    entries = json.load(open(out))
    rows = [*itertools.chain(*split_rows(read_puzzles(str(folder)), 'puzzle', 'train').values())]
    assert len(entries) == 2 * len(rows) and {e['id'].split('-')[1] for e in entries} == {
        str(p) for p in tinypuzzles.PUZZLES if p not in (7, 62, 77)}
    letter, value = entries[:2]
    assert (folder / letter['image']).is_file() and letter['conversations'][1]['value'] == 'ABCDE'[rows[0].answer]
    assert value['conversations'][1]['value'] == rows[0].options[rows[0].answer]
    task = find_tasks(default_options(eval_dir=str(folder.parent.parent), tasks='smart101'))[0]
    assert letter['conversations'][0]['value'].splitlines()[-1] == task.examples[0].prompt.splitlines()[-1]
    source = InstructSource(out, str(folder), None, 64, View(42, 4))
    assert len(source) == len(entries) and not source.damaged                  # all images are there
    with pytest.raises(UserError, match='split=.other.: expected one of instance'):
        prepare.main(['smart101', str(folder), '--out', str(tmp_path / 'x'), '--split', 'other'])
