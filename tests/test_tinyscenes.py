"""The tiny world's scenes: what is asked of them, how they are painted and told."""
import re

import numpy as np

import tinyscenes as ts


def test_answers_are_what_the_scene_shows():
    draw = ts.Draws(5)
    for _ in range(300):
        scene = ts.make_scene(draw, 'train')
        text = ts.listing(scene.things)
        for kind in (*ts.KINDS, 'read', 'box', 'fact'):
            got = ts.ask(kind, scene, draw)
            if got is None:
                continue
            question, answer, blind = got
            about = question.rstrip('?').split(' ')
            if kind == 'colour':
                assert re.findall(rf'(\w+) {about[-1]} ', text) == [answer]
            elif kind == 'shape':
                assert re.findall(rf'{about[-1]} (\w+) ', text) == [answer]
            elif kind == 'presence':
                assert (' '.join(about[-2:]) in text) == (answer == 'yes')
            elif kind == 'where':
                assert f"{answer} {' '.join(about[-2:])} " in text
            elif kind == 'at':
                assert f'{about[-1]} {answer} .' in text if answer != 'nothing' else f'{about[-1]} ' not in text
            elif kind == 'count':
                assert int(answer) == text.count('.') - text.count('word')
            elif kind == 'read':
                assert f'word {answer} ' in text
            elif kind == 'fact':
                shape, relation = question.removeprefix('the ').rstrip('?').split(' ', 1)
                (colour,) = re.findall(rf'(\w+) {shape} ', text)
                assert answer == f'{colour} {shape} {relation} {ts.pair_facts()[colour, shape, relation]}'
            assert kind == 'presence' or answer in blind


def test_boxes_are_tight_around_what_is_painted():
    draw = ts.Draws(6)
    for _ in range(40):
        scene = ts.make_scene(draw, 'train')
        differs = np.abs(ts.render([scene])[0].astype(int) - scene.grey).max(-1) > 3
        for thing in scene.objects:
            x1, y1, x2, y2 = thing.box
            cell = np.zeros((ts.SIZE, ts.SIZE), bool)
            y, x = thing.cell // ts.GRID * ts.CELL, thing.cell % ts.GRID * ts.CELL
            cell[y:y + ts.CELL, x:x + ts.CELL] = True
            ys, xs = np.nonzero(differs & cell)
            assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (x1, y1, x2, y2), thing


def test_a_scene_has_as_many_objects_as_asked_for_and_no_pair_twice():
    draw = ts.Draws(4)
    for split in ('train', 'choice', 'test'):
        for n in range(9):
            scene = ts.make_scene(draw, split, word=False, n_object=n)
            assert ts.split_of(scene) == split and not scene.words
            assert len({(thing.colour, thing.shape) for thing in scene.objects}) == len(scene.objects)
            assert len(scene.objects) in ((3, 4) if n == 0 else (n,))


def test_relistings_are_reversed_half_of_the_time_else_mostly_in_a_random_order():
    draw = ts.Draws(8)
    seen = [tuple(ts.field_order(draw)) for _ in range(4000)]
    share = {order: seen.count(order) / 4000 for order in set(seen)}     # five standard errors
    assert abs(share[2, 1, 0] - 0.5 - 0.35 / 6) < 0.04 and abs(share[0, 1, 2] - 0.15 - 0.35 / 6) < 0.033
