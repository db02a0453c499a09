"""
Right and wrong answers of an evaluation with their images, as cards of a page. What is shown comes from predictions
files and image files, which nobody vouches for: all of it is checked, cut and escaped.
"""
import io
import json
import os
from collections import Counter
from itertools import zip_longest
from random import Random

from benchmark_files import IMAGE_ENDINGS, image_path
from errors import NUMBER, Field, UserError, check, reading
from files import regular
from metrics import box_iou, parse_box
from page import data_url, tag

MAX_ITEMS = 48                # of a task
MAX_CHARS = 2000              # of a text; of a choice or a label a tenth
THUMBNAIL = 320               # longest side of an image, pixels
MAX_LINE = 1 << 22            # characters of a line of predictions
TEXTS = Field(list, of=Field(str))
RECORD = {'id': Field(str), 'prompt': Field(str), 'prediction': Field(str, optional=True), 'answers': TEXTS,
          'score': Field(NUMBER, 0, 1), 'malformed': Field(bool), 'image': Field(str),
          'types': Field(list, 0, 99, of=Field(str, 0, 999)),
          'choices': Field(list, optional=True, of=Field(str)), 'nats': Field(list, optional=True)}
STATES = {'wrong': '✗ wrong', 'partly': '◐ partly right', 'right': '✓ right'}
GOLD, SAID = '#E69F00', '#0072B2'


def cut(text, limit=MAX_CHARS):
    """At most `limit` characters of a text, and how many more there are."""
    return text if len(text) <= limit else f'{text[:limit]} ... ({len(text) - limit:,} more characters)'


def sample_records(path, name):
    """
    At most MAX_ITEMS answers of a predictions file, drawn evenly with a fixed seed, in turns of STATES as long as there
    are such; returns (list of (state, record), Counter of the states of all records).
    """
    kept, seen, rng = {state: [] for state in STATES}, Counter(), Random(f'gallery of {name}')
    with reading(path, 'predictions'), open(path, encoding='utf-8', opener=regular) as f:
        for i, line in enumerate(iter(lambda: f.readline(MAX_LINE), ''), 1):
            record = json.loads(line)
            check(record, Field(dict, of=RECORD), f'{path}:{i}')
            state = 'right' if record['score'] == 1 else 'partly' if record['score'] else 'wrong'
            seen[state] += 1
            k = rng.randrange(seen[state])                   # each of the records so far is kept with the same chance
            if len(kept[state]) < MAX_ITEMS:
                kept[state].append((state, record))
            elif k < MAX_ITEMS:
                kept[state][k] = state, record
    return [item for turn in zip_longest(*kept.values()) for item in turn if item][:MAX_ITEMS], seen


def find_image(name, task, was, now):
    """
    The path of a record's image, or ''. What a record has is a path under the eval_dir that `was`, or the benchmark's
    own name; it is looked for by benchmark_files.image_path under the eval_dir that is `now`, nowhere else.
    """
    inside = os.path.relpath(name, was or '.')
    return image_path(name if inside.startswith('..') else inside, (now, os.path.join(now, task.removesuffix('_ocr'))),
                      ('', *IMAGE_ENDINGS))


def thumbnail(path, boxes, frame):
    """
    An image as SVG, at most THUMBNAIL pixels wide and high, with boxes drawn on it; without any, turned as the model
    saw it. boxes: list of ([x1, y1, x2, y2] in shares of the frame, colour, dashes); frame: evaluate.py's box_frame.
    """
    from images import open_image                            # imports torch
    image, packed = open_image(path, not boxes, THUMBNAIL), io.BytesIO()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    small = max(image.size) <= 128                           # is shown enlarged, so that every pixel counts
    image.save(packed, 'WEBP', quality=80, lossless=small)
    w, h = image.size
    width, height = (max(w, h), max(w, h)) if frame == 'letterbox' and boxes else (w, h)
    drawn = [tag('rect', x=round(x1 * width, 2), y=round(y1 * height, 2), width=round((x2 - x1) * width, 2),
                 height=round((y2 - y1) * height, 2), fill='none', stroke=color, stroke_width=line,
                 stroke_dasharray=dash, vector_effect='non-scaling-stroke')
             for (x1, y1, x2, y2), *ink in boxes for color, line, dash in (('#fff', 5, 'none'), (ink[0], 3, ink[1]))]
    return tag('svg', tag('title', os.path.basename(path)),
               tag('rect', width=width, height=height, fill='#7f7f7f'),
               tag('image', href=data_url(packed.getvalue(), 'webp'), x=(width - w) / 2, y=(height - h) / 2, width=w,
                   height=h, style='image-rendering: pixelated' if small else ''),
               *drawn, viewBox=f'0 0 {width} {height}')


def card(task, state, record, was, now, frame):
    """One question with its image, the gold answers, the answer and its score; `was`, `now`: see find_image."""
    said, gold = record.get('prediction'), [box for text in record['answers'] if (box := parse_box(text))]
    box = parse_box(said) if gold and said else None
    parts = []
    if record['image']:
        try:
            path = find_image(record['image'], task, was, now)
            if not path:
                raise UserError(f"not found under eval_dir={now}")
            boxes = [(b, GOLD, 'none') for b in gold] + [(b, SAID, '6 4') for b in (box,) if b]
            parts.append(thumbnail(path, boxes, frame))
        except UserError as e:
            parts.append(tag('div', f"no image {cut(record['image'], 200)}: {cut(str(e), 300)}", class_='missing'))
    answers = [text if n == 1 else f'{text} (x {n})' for text, n in Counter(record['answers']).items()]
    choices = [f'{cut(choice, MAX_CHARS // 10)} ({nats:.2f} nats)' if type(nats) is float else choice
               for choice, nats in zip_longest(record.get('choices') or (), record.get('nats') or ()) if choice]
    facts = {'score': f"{STATES[state]}, {record['score']:.2f}" + ', malformed' * record['malformed'],
             'choices': cut(' | '.join(choices)), 'gold': cut(' | '.join(answers)) + ' (orange)' * bool(gold),
             'answer': (cut(said or '') or ('(none)' if said is None else '(empty)')) + ' (blue, dashed)' * bool(box),
             'IoU': f'{box_iou(gold[0], box):.3f}' if box else '',
             'type': cut(', '.join(record['types']), MAX_CHARS // 10), 'id': cut(record['id'], MAX_CHARS // 10)}
    return tag('article', *parts, tag('div', cut(record['prompt']) or '(no question: a caption)', class_='asked'),
               tag('dl', *(part for key, v in facts.items() if v for part in (tag('dt', key), tag('dd', v)))),
               class_=state, data_task=json.dumps([task]), data_result=json.dumps([state]),
               data_type=json.dumps(record['types']))


def cards(task, folder, was, now, frame):
    """
    The gallery of one task whose predictions/ are in `folder`: (list of blocks for page, set of its question types).
    was, now: see find_image. Raises UserError for a line that is no prediction of evaluate.py's.
    """
    path = os.path.join(folder, 'predictions', f'{task}.jsonl')
    if os.path.basename(path) != f'{task}.jsonl' or not os.path.exists(path):
        return [tag('p', f'No answers to show: there is no {path}')], set()
    items, seen = sample_records(path, task)
    shown, types = Counter(state for state, _ in items), {label for _, record in items for label in record['types']}
    counts = ', '.join(f'{shown[state]} of {seen[state]} {state}' for state in STATES if seen[state])
    made = [card(task, state, record, was, now, frame) for state, record in items]
    return [tag('p', f'A sample of the answers: {counts}.'), tag('div', *made, class_='cards')], types
