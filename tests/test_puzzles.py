"""puzzles.py and tinypuzzles.py: the release's layout, its encodings and splits, S_acc and O_acc by hand."""
import csv
import io
import json
import math
from pathlib import Path

import pytest

import prepare
import puzzles
import tinypuzzles
from conftest import printed_error
from errors import UserError
from evaluate import default_options
from benchmarks import find_tasks
from puzzles import Row, accuracies, answer_value, read_puzzle, read_puzzles, score, split_rows, usable
from scorers import score_predictions


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp('smart') / 'smart101' / 'SMART101-Data'
    tinypuzzles.write_puzzles(str(out), 20, seed=3)
    return out


def test_the_categories_are_the_releases():
    counts = {name: len(numbers) for name, numbers in puzzles.CATEGORIES.items()}
    assert counts == dict(counting=26, math=14, logic=9, path=12, algebra=15, measure=8, spatial=9, pattern=5, order=3)
    assert sorted(puzzles.CATEGORY) == list(range(1, 102)) and len(puzzles.TEST) == 21 and len(puzzles.ICONS) == 51
