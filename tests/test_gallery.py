"""gallery.py: which answers are shown, where their images come from, and the boxes on them."""
import json
import os
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gallery
from errors import UserError
from scorers import unit_box
from test_page import HOSTILE, Document


def record(**changes):
    return {'id': '1', 'prompt': 'what is it?', 'prediction': 'a cat', 'answers': ['a cat'] * 10, 'score': 1.0,
            'malformed': False, 'types': [], 'image': '', **changes}


def write(folder, task, records):
    path = Path(folder, 'predictions', f'{task}.jsonl')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps(r) + '\n' for r in records))
    return str(path)


def save(path, size=(40, 30), **options):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    pixels = np.random.default_rng(3).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)


def shown(record, tmp_path, frame='original', task='vqav2'):
    return gallery.card(task, 'right', {**record}, str(tmp_path), str(tmp_path), frame)


# --- which answers ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('n_wrong, n_partly, n_right', [(0, 0, 5), (3, 0, 400), (300, 300, 300), (0, 70, 2), (1, 0, 0)])
def test_the_sample_holds_rights_and_wrongs(tmp_path, n_wrong, n_partly, n_right):
    scores = [0.0] * n_wrong + [0.6] * n_partly + [1.0] * n_right
    random.Random(n_right).shuffle(scores)
    path = write(tmp_path, 't', [record(id=str(i), score=s) for i, s in enumerate(scores)])
    items, seen = gallery.sample_records(path, 't')
    assert items == gallery.sample_records(path, 't')[0]
    assert len({r['id'] for _, r in items}) == len(items) == min(gallery.MAX_ITEMS, len(scores))
    assert all(state == {0: 'wrong', 1: 'right'}.get(r['score'], 'partly') for state, r in items)
    assert seen == Counter(wrong=n_wrong, partly=n_partly, right=n_right)
    have, shares = Counter(state for state, _ in items), sum(n > 0 for n in seen.values())
    for state, n in seen.items():                            # an even share of the places, or all that there are
        assert have[state] >= min(n, gallery.MAX_ITEMS // shares)


def test_every_answer_can_be_drawn_and_the_order_of_the_file_gives_no_advantage(tmp_path):
    path = write(tmp_path, 't', [record(id=str(i)) for i in range(480)])
    drawn = [int(r['id']) for name in map(str, range(40)) for _, r in gallery.sample_records(path, name)[0]]
    # 1920 even draws of 0..479: the mean's deviation is 139 / sqrt(1920) = 3.2
    assert abs(np.mean(drawn) - 239.5) < 5 * 3.2 and len(set(drawn)) > 460


@pytest.mark.parametrize('line, says', [('{"id": "1"', 'predictions'), ('[]', 'expected dict'), ('{"id": 1}', "'id'"),
                                        (json.dumps(record(score=2)), "'score'"), ('[' * 9000, 'predictions'),
                                        (json.dumps(record(answers=[{}])), "'answers'")])
def test_a_line_that_is_no_prediction_is_named(tmp_path, line, says):
    path = write(tmp_path, 't', [record()])
    with open(path, 'a') as f:
        f.write(line + '\n')
    with pytest.raises(UserError, match=says) as caught:
        gallery.cards('t', str(tmp_path), '', '', 'original')
    assert path in str(caught.value) and '\n' not in str(caught.value)


def test_a_task_without_predictions_or_with_a_path_as_its_name_shows_none(tmp_path):
    write(tmp_path / 'eval', 't', [record()])
    write(tmp_path, 'x', [record()])
    for task in ('other', '../../predictions/x'):
        (block,), types = gallery.cards(task, str(tmp_path / 'eval'), '', '', 'original')
        assert 'No answers to show' in block and not types


def test_the_cards_are_as_many_as_the_limit_and_what_is_cut_is_said(tmp_path):
    long = record(prediction='long ' * 9000, prompt='q' * 5000, types=['a', 'b'])
    write(tmp_path, 't', [{**long, 'id': str(i)} for i in range(60)])
    blocks, types = gallery.cards('t', str(tmp_path), '', '', 'original')
    assert blocks[1].count('<article') == gallery.MAX_ITEMS and f'{gallery.MAX_ITEMS} of 60 right' in blocks[0]
    assert types == {'a', 'b'} and len(blocks[1]) < 1 << 20
    assert '43,000 more characters' in blocks[1] and '3,000 more characters' in blocks[1]


# --- images and boxes ---------------------------------------------------------------------------------------------

def test_images_are_found_where_the_evaluation_found_them_and_nowhere_else(tmp_path):
    was, now = str(tmp_path / 'was'), str(tmp_path / 'now')
    for name in ('val2014/COCO_1.jpg', 'textvqa/train_images/b.png', 'ocid_ref/OCID-dataset/s/1/c.png', 'd.jpeg'):
        save(os.path.join(now, name))
    save(str(tmp_path / 'private.png'))

    def found(name, task='textvqa'):
        path = gallery.find_image(name, task, was, now)
        return os.path.relpath(path, now) if path else ''
    assert found(f'{was}/val2014/COCO_1.jpg') == found('COCO_1') == found('COCO_1.jpg') == 'val2014/COCO_1.jpg'
    assert found('b') == found('b', 'textvqa_ocr') == 'textvqa/train_images/b.png' and found('b', 'gqa') == ''
    scene = 'ocid_ref/OCID-dataset/s/1/c.png'
    assert found('s/1/c', 'ocid_ref') == found(f'{was}/{scene}') == scene
    for name in ('../private.png', str(tmp_path / 'private.png'), f'{was}/../private.png', f'{was}/../../private.png',
                 'val2014', 'a\0b', '\ud800', 'x' * 9000, f'{was}/s/../../private'):
        assert found(name) == '', name


@pytest.mark.parametrize('size', [(40, 30), (600, 200), (90, 700)])
@pytest.mark.parametrize('frame', ['original', 'letterbox'])
def test_boxes_are_drawn_over_the_pixels_that_they_count(tmp_path, size, frame):
    save(str(tmp_path / 'a.jpg'), size)
    w, h = size
    gold, said = [w * .25, h * .5, w * .25, h * .25], [0, h * .125, w * .75, h * .375]        # x, y, width, height
    texts = [unit_box(xywh, size, frame) for xywh in (gold, said)]
    svg = Document(shown(record(image='a.jpg', answers=texts[:1], prediction=texts[1]), tmp_path, frame))
    (view,), (image,) = svg.named('svg'), svg.named('image')
    x, y, width, height = (float(image[key]) for key in ('x', 'y', 'width', 'height'))
    assert width / height == pytest.approx(w / h, rel=0.02) and max(width, height) <= gallery.THUMBNAIL
    view = [float(v) for v in view['viewbox'].split()]
    assert view[2:] == ([width, height] if frame == 'original' else [max(width, height)] * 2)
    drawn = [r for r in svg.named('rect') if 'stroke' in r]
    assert [r['stroke'] for r in drawn] == ['#fff', gallery.GOLD, '#fff', gallery.SAID]
    for rect, xywh in zip(drawn[1::2], (gold, said)):
        got = [(float(rect['x']) - x) / width, (float(rect['y']) - y) / height, float(rect['width']) / width,
               float(rect['height']) / height]
        # boxes are written with two decimals, of the longer side in the letterbox frame
        unit = 0.011 * (max(w, h) / min(w, h) if frame == 'letterbox' else 1)
        assert got == pytest.approx([xywh[0] / w, xywh[1] / h, xywh[2] / w, xywh[3] / h], abs=unit)


def test_an_answer_that_is_no_box_is_shown_without_one_and_other_tasks_have_none(tmp_path):
    save(str(tmp_path / 'a.jpg'))
    for answers, prediction, n in ((['[0, 0, 0.5, 0.5]'], 'left', 2), (['[0, 0, 0.5, 0.5]'], '[0.5, 0, 0.1, 1]', 2),
                                   (['left'], '[0, 0, 0.5, 0.5]', 0), (['[0, 0, 0.5, 0.5]'], None, 2)):
        card = shown(record(image='a.jpg', answers=answers, prediction=prediction), tmp_path)
        assert card.count('stroke=') == n and 'IoU' not in card
    assert '>0.250</dd>' in shown(record(answers=['[0, 0, 0.5, 0.5]'], prediction='[0, 0, 1.0, 1.0]'), tmp_path)


def test_an_image_is_turned_as_the_model_saw_it(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                         # a quarter turn
    save(str(tmp_path / 'a.jpg'), (400, 200), exif=exif)
    (upright,) = Document(shown(record(image='a.jpg'), tmp_path)).named('image')
    (stored,) = Document(shown(record(image='a.jpg', answers=['[0, 0, 0.5, 0.5]']), tmp_path)).named('image')
    assert (upright['width'], stored['width']) == ('160', '320')


def test_a_thumbnail_s_size_is_bounded_and_small_images_keep_their_pixels(tmp_path):
    save(str(tmp_path / 'a.png'), (3000, 2000))
    save(str(tmp_path / 'b.png'), (42, 42))
    assert len(shown(record(image='a.png'), tmp_path)) < 120_000                     # of noise, the worst case
    import base64
    import io
    (image,) = Document(shown(record(image='b.png'), tmp_path)).named('image')
    packed = Image.open(io.BytesIO(base64.b64decode(image['href'].split(',')[1])))
    assert packed.format == 'WEBP' and packed.info.get('exif') is None
    assert np.array_equal(np.asarray(packed.convert('RGB')), np.asarray(Image.open(tmp_path / 'b.png')))


@pytest.mark.parametrize('content', [None, b'', b'GIF89a', b'<svg xmlns="http://www.w3.org/2000/svg"/>'])
def test_an_image_that_is_missing_or_damaged_is_a_placeholder_with_its_name(tmp_path, content):
    if content is not None:
        (tmp_path / 'gone.png').write_bytes(content)
    document = Document(shown(record(image='gone.png'), tmp_path))
    (text,) = [data for element, data in document.texts if 'no image' in data]
    assert 'gone.png' in text and not document.named('image') and ('div', 'what is it?') in document.texts


# --- what a card says ---------------------------------------------------------------------------------------------

def test_choices_stand_with_their_nats(tmp_path):
    card = shown(record(answers=['b'], prediction='a', score=0.0, choices=['a', 'b', 'c'],
                        nats=[0.5, float('nan'), 2.0], n_token=[1, 2, 3]), tmp_path)
    assert ('dd', 'a (0.50 nats) | b (nan nats) | c (2.00 nats)') in Document(card).texts
    assert '0 | 1 | 2' in shown(record(answers=['1'], choices=list(map(str, range(23))), nats=None), tmp_path)
    assert 'a | b</dd>' in shown(record(choices=['a', 'b'], nats=[{}, 'x', 3], n_token=[None]), tmp_path)  # other types


def test_what_is_empty_hostile_or_not_ascii_is_shown_as_it_is(tmp_path):
    assert '(empty)' in shown(record(prediction='', malformed=True), tmp_path)
    assert ', malformed' in shown(record(prediction='', malformed=True), tmp_path)
    assert '(none)' in shown(record(prediction=None), tmp_path)
    assert '(none)' in shown({k: v for k, v in record(choices=['a']).items() if k != 'prediction'}, tmp_path)
    assert '(x 7)' in shown(record(answers=['a'] * 7 + ['b'] * 3), tmp_path)
    rng = random.Random(11)
    for _ in range(20):
        texts = [rng.choice(HOSTILE) for _ in range(6)]
        document = Document(shown(record(id=texts[0], prompt=texts[1], prediction=texts[2], answers=[texts[3]],
                                         types=[texts[4]], image=texts[5]), tmp_path, task=texts[1]))
        assert document.balanced and {name for name, _ in document.elements} <= {'article', 'div', 'dl', 'dt', 'dd'}
        (article,) = document.named('article')
        assert json.loads(article['data-type']) == [texts[4]] and json.loads(article['data-task']) == [texts[1]]
        assert set(article) == {'class', 'data-task', 'data-result', 'data-type'}
        said = ''.join(data for _, data in document.texts)
        assert all(re.sub('\0', '', text) in re.sub('[\0\ufffd]', '', said) for text in texts)
