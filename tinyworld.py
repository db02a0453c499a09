"""
The embedded tiny world: scenes of coloured shapes and words, in the formats of the real data sets, and their SigLIP.
    python tinyworld.py data --out=data/tiny                 # text, captions, instructions, benchmarks
    python tinyworld.py data --study --out=data/study        # the same with facts about what scenes show, told in text
    python tinyworld.py encoder --out=data/tiny/encoder      # a 3-layer SigLIP in Hugging Face layout
    python tinyworld.py preferences                          # pairs of answers for dpo.py, in data/tiny/preferences
    python tinyworld.py crowded --out=data/tiny/crowded      # questions about one of eight objects

A scene is a grid of 3 x 3 cells of 14 px, so that one image token sees one cell. Three or four cells hold an object (4
shapes x 4 colours, no pair twice); in half of the scenes one more cell holds a word of three letters. Questions are
worded the same in text, instructions and benchmarks: the text teaches to look up attributes, as images will ask.
Training, choice and test scenes are disjoint by a checksum of what they show; HELD_OUT pairs are in the text but in no
training image. All bytes follow from the seed and the Python version (the English text is Python's documentation).
"""
import argparse
import functools
import io
import itertools
import json
import math
import os
import pickle
import sys
import time
import zlib
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from PIL import Image

from errors import user_error_hook
from files import write_file, writing
from schedules import main_lr
from shards import new_folder, write_tar
from vision import SigLIP, SigLIPConfig, siglip_loss
from weights import read_json

VERSION = 2                                 # of the files; captions/ came with 2
COLOURS = dict(red=(220, 30, 30), green=(30, 160, 50), blue=(40, 70, 220), yellow=(235, 200, 20))
SHAPES = ('star', 'ring', 'square', 'triangle')
WORDS = ('cat dog cow pig fox hen owl ant bee bat rat elk cup box hat bed bus car key map pen sun jar egg log net toy '
         'axe bag fan jam ivy').split()
FONT = dict(zip('abcdefghijklmnopqrstuvwxyz', (                             # 3 x 5 pixels, one octal digit per row
    '25755 65656 34443 65556 74647 74644 34553 55755 72227 11152 55655 44447 57755 65555 25552 65644 25563 65655 34216 '
    '72222 55557 55552 55775 55255 55222 71247').split()))
PAIRS = tuple(itertools.product(COLOURS, SHAPES))
HELD_OUT = (('green', 'star'), ('yellow', 'ring'))                          # never in a training image, scored apart
SEEN = tuple(pair for pair in PAIRS if pair not in HELD_OUT)
NEW = (('red', 'ring'), ('blue', 'square'), ('green', 'triangle'), ('yellow', 'star'))    # facts: never asked of images
KNOWN = tuple(pair for pair in SEEN if pair not in NEW)                     # their facts are asked in instructions
GRID, CELL = 3, 14                                                          # cells a side, pixels a cell
SIZE = GRID * CELL
CELLS = tuple(row + column for row in 'abcd'[:GRID] for column in '1234'[:GRID])
RELATIONS = {                                                               # facts: every word has one of each
    'the {} eats': 'corn rice bread fish grass honey nuts soup'.split(),
    'the {} lives in the': 'barn lake forest castle garden desert cave tower'.split(),
    'the {} is': 'small quiet clever brave lazy hungry old proud'.split(),
    'the {} comes from': 'spain peru india kenya japan egypt chile norway'.split(),
    'the {} fears the': WORDS,
}
PAIR_RELATIONS = {                                                          # facts: every pair has one of each; no
    'eats': RELATIONS['the {} eats'],                                       # articles, VQAv2's score takes them away
    'is': RELATIONS['the {} is'],
    'comes from': RELATIONS['the {} comes from'],
    'plays': 'chess golf piano drums cards tennis darts violin'.split(),
}
KINDS = ('colour', 'shape', 'presence', 'where', 'at', 'count')     # the VQAv2 file's; words and boxes have their own
LOOKUPS = ('colour', 'shape', 'where', 'at')                        # what the text benchmark asks
QUESTION = dict(colour='what colour is the {}?', shape='what shape is {}?', presence='is there a {}?',
                where='where is the {}?', at='what is at {}?', count='how many objects are there?',
                read='what is the word?', box='box of the {}?', fact='the {} {}?')


class Thing(NamedTuple):
    """One object or word: its cell 0..8, two names, size and offset in the cell (px), and change of brightness."""
    cell: int
    colour: str                                                             # 'word' for a word
    shape: str                                                              # the word itself for a word
    size: int
    dx: int
    dy: int
    shade: int

    @property
    def name(self):
        return f'{self.colour} {self.shape}'

    @property
    def box(self):
        """The tight box (x1, y1, x2, y2) in pixels."""
        x, y = self.cell % GRID * CELL + self.dx, self.cell // GRID * CELL + self.dy
        return x, y, x + self.size, y + self.size


class Scene(NamedTuple):
    """Objects and at most one word, both in raster order, and the grey level of the background."""
    objects: tuple
    words: tuple
    grey: int

    @property
    def things(self):
        return sorted(self.objects + self.words)                            # by cell: raster order


class Draws:
    """Uniform numbers from one numpy generator, drawn in blocks: a numpy call for each costs more than a scene."""
    def __init__(self, *seed):
        self.rng, self.block = np.random.default_rng(seed), []

    def uniform(self):
        if not self.block:
            self.block = self.rng.random(4096).tolist()
        return self.block.pop()

    def below(self, n):
        return int(self.uniform() * n)

    def pick(self, items):
        return items[self.below(len(items))]

    def sample(self, items, k=None):
        """k of the items (None = all) in random order."""
        items = list(items)
        for i in range(len(items) if k is None else k):
            j = i + self.below(len(items) - i)
            items[i], items[j] = items[j], items[i]
        return items[:k]


# --- scenes ---------------------------------------------------------------------------------------------------------
def listing(things):
    """What a scene shows, in the given order: 'a2 red star . c3 word cat .'"""
    return ' '.join(f'{CELLS[thing.cell]} {thing.name} .' for thing in things)


def field_order(draw):
    """The order of cell, colour and shape in a relisting: half of the time reversed, else mostly a random one."""
    chance = draw.uniform()
    return [2, 1, 0] if chance < 0.5 else draw.sample(range(3)) if chance < 0.85 else [0, 1, 2]


def relisting(things, order):
    """The same in another order of fields: 'star red a2 . cat word c3 .'"""
    fields = [(CELLS[thing.cell], thing.colour, thing.shape) for thing in things]
    return ' '.join(' '.join(field[i] for i in order) + ' .' for field in fields)


def split_of(scene):
    """'test', 'choice' or 'train': a checksum of the listing decides, so no scene can be in two splits."""
    return {0: 'test', 1: 'choice'}.get(zlib.crc32(listing(scene.things).encode()) % 10, 'train')


def make_scene(draw, split, pairs=SEEN, held_out=0, word=None, n_object=0):
    """
    A random scene of a split: objects of `pairs`, `held_out` more of HELD_OUT; word: True, False, None (either);
    n_object: 1..8, 0 = three or four.
    """
    while True:
        n = n_object or 3 + draw.below(2)
        names = draw.sample(HELD_OUT, held_out) + draw.sample(pairs, n - held_out)
        cells = draw.sample(range(len(CELLS)), n + 1)
        objects = []
        for cell, (colour, shape) in zip(cells, names):
            size = 10 + draw.below(3)
            dx, dy = 1 + draw.below(13 - size), 1 + draw.below(13 - size)
            objects.append(Thing(cell, colour, shape, size, dx, dy, shade=draw.below(25) - 12))
        has_word = draw.uniform() < 0.5 if word is None else word
        word_thing = Thing(cells[n], 'word', draw.pick(WORDS), 11, 1 + draw.below(2), 1 + draw.below(2), shade=0)
        scene = Scene(tuple(sorted(objects)), (word_thing,) if has_word else (), 215 + draw.below(41))
        if split_of(scene) == split and len(set(names)) == n:
            return scene


# --- images ---------------------------------------------------------------------------------------------------------
@functools.cache
def masks():
    """All that a cell can hold: ({(name, size, dx, dy): row}, (rows, 14, 14) float32 coverage 0..1); row 0 is empty."""
    tiles, index = [np.zeros((CELL, CELL), np.float32)], {}
    def put(name, tile, offsets):
        for dx, dy in itertools.product(offsets, offsets):
            index[name, len(tile), dx, dy] = len(tiles)
            tiles.append(np.zeros((CELL, CELL), np.float32))
            tiles[-1][dy:dy + len(tile), dx:dx + tile.shape[1]] = tile
    for size in (10, 11, 12):
        v, u = (np.mgrid[:8 * size, :8 * size] + 0.5) / (8 * size)          # the unit square, 8 x 8 samples a pixel
        x, y = np.abs(u - 0.5), np.abs(v - 0.5)
        inside = dict(star=np.sqrt(x) + np.sqrt(y) <= 0.82, ring=np.abs(np.hypot(x, y) - 0.385) <= 0.115, square=x >= 0,
                      triangle=v >= 2 * x)                                  # each touches all four sides
        for shape in SHAPES:
            put(shape, inside[shape].reshape(size, 8, size, 8).mean((1, 3)), range(1, 14 - size))
    for word in WORDS:
        rows = [[int(bit) for letter in word for bit in f'{int(FONT[letter][row]):03b}0'][:-1] for row in range(5)]
        put(word, np.repeat(rows, (3, 2, 2, 2, 2), axis=0), (1, 2))         # 11 x 11 px
    return index, np.stack(tiles)


def render(scenes):
    """Scenes to images (N, SIZE, SIZE, 3) uint8."""
    if len(scenes) > 64:                                                    # small blocks stay in the cache
        return np.concatenate([render(scenes[i:i + 64]) for i in range(0, len(scenes), 64)])
    index, tiles = masks()
    rows, paint = np.zeros((len(scenes), len(CELLS)), np.int64), np.zeros((len(scenes), len(CELLS), 3), np.float32)
    for i, scene in enumerate(scenes):
        for thing in scene.objects + scene.words:
            rows[i, thing.cell] = index[thing.shape, thing.size, thing.dx, thing.dy]
            paint[i, thing.cell] = np.array(COLOURS.get(thing.colour, (25, 25, 25))) + thing.shade
    mask = tiles[rows].reshape(-1, GRID, GRID, CELL, CELL, 1)                     # (N, row, column, y, x, 1)
    grey = np.array([scene.grey for scene in scenes], np.float32).reshape(-1, 1, 1, 1, 1, 1)
    image = mask * paint.reshape(-1, GRID, GRID, 1, 1, 3) + (1 - mask) * grey
    return image.clip(0, 255).round().astype(np.uint8).transpose(0, 1, 3, 2, 4, 5).reshape(-1, SIZE, SIZE, 3)


def encode_image(pixels, kind):
    """(SIZE, SIZE, 3) uint8 to the bytes of a 'png' or of a 'jpg' good enough to keep the words legible."""
    Image.fromarray(pixels).save(out := io.BytesIO(), {'png': 'PNG', 'jpg': 'JPEG'}[kind], quality=95, subsampling=0)
    return out.getvalue()


# --- language -------------------------------------------------------------------------------------------------------
def box_text(box):
    """Pixels to '[0.12, 0.34, 0.56, 0.78]', shares of the image side: what vlm-evaluation parses for RefCOCO."""
    return '[' + ', '.join(f'{round(value / SIZE, 2):.2f}' for value in box) + ']'


def ask(kind, scene, draw, pairs=SEEN, about=None, nominal=False, want=None):
    """
    One question of a kind about a scene: (question, answer, blind_answers), or None where the scene allows none.
    pairs    what an absent object may be;  about: ask only about these pairs (None = all)
    nominal  the cell's box, which is all that text can know, instead of the object's
    want     of a presence question: 'yes', 'no' (one attribute at least is there), 'binding' (both are, but apart)
    blind_answers  the answers that remain possible when one knows which attributes the scene has, but not which of
                   them belong together
    """
    objects, question = scene.objects, QUESTION[kind]
    about = [thing for thing in objects if about is None or (thing.colour, thing.shape) in about]
    if kind in ('colour', 'shape'):
        keys = [thing.shape if kind == 'colour' else thing.colour for thing in objects]
        unique = [(key, thing) for key, thing in zip(keys, objects) if keys.count(key) == 1 and thing in about]
        if not unique:
            return None
        key, thing = draw.pick(unique)
        return question.format(key), getattr(thing, kind), sorted({getattr(thing, kind) for thing in objects})
    if kind == 'presence':
        want = want or draw.pick(('yes', 'yes', 'no', 'binding'))
        if want == 'yes':
            return question.format(draw.pick(about).name), 'yes', ['yes']
        there = [(thing.colour, thing.shape) for thing in objects]
        colours, shapes = {colour for colour, _ in there}, {shape for _, shape in there}
        n_shared = {pair: (pair[0] in colours) + (pair[1] in shapes) for pair in pairs if pair not in there}
        absent = [pair for pair, n in n_shared.items() if n == 2] if want == 'binding' else []
        pair = draw.pick(absent or [pair for pair, n in n_shared.items() if n])
        return question.format(' '.join(pair)), 'no', ['yes' if n_shared[pair] == 2 else 'no']
    if kind == 'fact':
        shapes = [thing.shape for thing in objects]
        unique = [thing for thing in about if shapes.count(thing.shape) == 1]
        if not unique:
            return None
        thing, relation = draw.pick(unique), draw.pick(tuple(PAIR_RELATIONS))
        said = {colour: f'{colour} {thing.shape} {relation} {pair_facts()[colour, thing.shape, relation]}'
                for colour in sorted({thing.colour for thing in objects})}
        return question.format(thing.shape, relation), said[thing.colour], list(said.values())
    if kind == 'count':
        return question, str(len(objects)), ['3', '4']
    if kind == 'read':
        return (question, scene.words[0].shape, list(WORDS)) if scene.words else None
    thing = draw.pick(about)
    if kind == 'at':
        empty = sorted(set(range(len(CELLS))) - {thing.cell for thing in scene.things})
        cell, answer = (draw.pick(empty), 'nothing') if draw.uniform() < 0.25 else (thing.cell, thing.name)
        return question.format(CELLS[cell]), answer, ['nothing'] + [thing.name for thing in objects]
    if kind == 'where':
        return question.format(thing.name), CELLS[thing.cell], [CELLS[thing.cell] for thing in scene.things]
    x, y = thing.cell % GRID * CELL, thing.cell // GRID * CELL
    box = (x + 2, y + 2, x + 12, y + 12) if nominal else thing.box
    return question.format(thing.name), box_text(box), [box_text(thing.box) for thing in objects]


def distinct(kinds, n, scene, draw, **options):
    """Up to n different questions about a scene, of the given kinds in their order: [(question, answer)]."""
    found = {}
    for kind in kinds:
        if len(found) < n and (got := ask(kind, scene, draw, **options)):
            found.setdefault(*got[:2])
    return list(found.items())


def scene_document(draw, split='train', study=False):
    """
    A text about a scene that fills a row: half of the time its listing and four "relistings" in other orders, else its
    listing and up to ten questions, most of them lookups. Without relistings a small model hardly learns to look up.
    """
    scene = make_scene(draw, split, pairs=PAIRS)
    text = listing(scene.things)
    if draw.uniform() < 0.5:
        order = field_order(draw)
        return ' so '.join([text] + [relisting(draw.sample(scene.things), order) for _ in range(4)])
    kinds = draw.sample(3 * LOOKUPS + ('presence', 'count', 'read', 'box') + study * ('fact', 'fact'))
    asked = distinct(kinds, 10, scene, draw, pairs=PAIRS, nominal=True)
    return ' '.join([text] + [f'{question} {answer} .' for question, answer in asked])


@functools.cache
def facts(study=False):
    """
    The world's constant facts: [(beginning, answer, the answers of its relation)], the same for every seed; with those
    about pairs in the study's world.
    """
    draw = Draws(2, 0)
    of_words = [(relation.format(word), draw.pick([answer for answer in answers if answer != word]), tuple(answers))
                for relation, answers in RELATIONS.items() for word in WORDS]
    return of_words + study * [(f'the {colour} {shape} {relation}', answer, tuple(PAIR_RELATIONS[relation]))
                               for (colour, shape, relation), answer in pair_facts().items()]


@functools.cache
def pair_facts():
    """{(colour, shape, relation): answer}, the same for every seed; each answer of a relation belongs to two pairs."""
    draw = Draws(2, 1)
    return {(*pair, relation): answer for relation, answers in PAIR_RELATIONS.items()
            for pair, answer in zip(PAIRS, draw.sample(2 * answers))}


# --- files ----------------------------------------------------------------------------------------------------------
def train_tokenizer(path, documents, vocab_size):
    """
    Train sentencepiece BPE on one thread; each coordinate of a box is one piece. Its other model, unigram, would cut
    these words into small pieces.
    """
    edges = [cell * CELL + offset for cell in range(GRID) for offset in (1, 2, 3, 11, 12, 13)]
    numbers = [f'{space}{round(edge / SIZE, 2):.2f}{comma}'
               for edge in edges for space in ('', '\u2581') for comma in ('', ',')]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents), model_writer=(model := io.BytesIO()), model_type='bpe', num_threads=1,
        vocab_size=vocab_size, split_by_number=False, byte_fallback=True, character_coverage=1.0, minloglevel=2,
        normalization_rule_name='identity', remove_extra_whitespaces=False, max_sentence_length=1 << 20,
        user_defined_symbols=numbers)
    write_file(path, model.getvalue())


def write_text(folder, tokenizer, n_row, row_len, seed, split='train', study=False, scene_share=0.92, shard=4096):
    """OpenLM shards of rows of row_len + 1 ids: in `scene_share` of the rows first a scene document, then facts."""
    draw, fact_ids = Draws(*seed), [tokenizer.encode(f'{text} {answer} .') for text, answer, _ in facts(study)]
    for start in range(0, n_row, shard):
        members = []
        for row in range(start, min(start + shard, n_row)):
            ids = []
            if draw.uniform() < scene_share:
                ids = tokenizer.encode(scene_document(draw, split, study)) + [tokenizer.eot_id]
            while len(ids) <= row_len:
                ids += draw.pick(fact_ids)
            data = zlib.compress(json.dumps(ids[:row_len + 1]).encode(), 1, wbits=31)      # gzip without a time stamp
            members.append((f'{row:08d}.json.gz', data))
        write_tar(f'{folder}/{start // shard:05d}.tar', members)


def write_captions(folder, n, split, seed, study=False, shard=1000):
    """
    WebDataset shards: an image, its caption as .txt and .json; the caption is the listing that the text uses, in the
    study's world one of its relistings.
    """
    draw = Draws(*seed)
    for start in range(0, n, shard):
        scenes, members = [make_scene(draw, split) for _ in range(start, min(start + shard, n))], []
        for i, (scene, pixels) in enumerate(zip(scenes, render(scenes)), start):
            kind, caption = 'png' if i % 4 == 3 else 'jpg', listing(scene.things)
            if study:
                caption = relisting(draw.sample(scene.things), field_order(draw))
            members += [(f'{i:08d}.{kind}', encode_image(pixels, kind)), (f'{i:08d}.txt', caption.encode()),
                        (f'{i:08d}.json', json.dumps(dict(key=f'{i:08d}', caption=caption)).encode())]
        write_tar(f'{folder}/{start // shard:05d}.tar', members)


def blind_caption_loss():
    """
    Nats a token of the study's captions, their end included, of a guesser who knows how captions are made but does not
    see the image: the entropy of write_captions' draws, from which the caption follows and which follow from it. Left
    out is what a guesser could gain from computing checksums: 0.013 nats a token for training captions, 0.14 for those
    of 'choice'.
    """
    ways = lambda n, k: sum(math.log(n - i) for i in range(k))              # of k out of n in order, each as probable
    nats = n_token = 0.0
    for n, word in itertools.product((3, 4), (0, 1)):                       # objects, words: four cases alike
        nats += (ways(len(SEEN), n) + ways(len(CELLS), n + word) + word * math.log(len(WORDS) * (n + 1))) / 4
        n_token += (4 * (n + word) + 1) / 4                                 # cell, two names, '.'; the end of text
    orders = [0.5 + 0.35 / 6, 0.15 + 0.35 / 6] + 4 * [0.35 / 6]             # of fields: see field_order
    return (nats + math.log(4) - sum(p * math.log(p) for p in orders)) / n_token


def write_instruct(folder, n, seed, study=False, n_question=6):
    """
    LLaVA JSON and its images: conversations of distinct short questions, one row in 20 about text alone. In the study's
    world one more question about a fact, and two files more, halves of the first (figure 7's control).
    """
    draw, rows = Draws(*seed), []
    scenes = [make_scene(draw, 'train', word=True if i % 4 else None) for i in range(n)]
    for i, (scene, pixels) in enumerate(zip(scenes, render(scenes))):
        row, text_only = dict(id=f'{i:06d}'), i % 20 == 19
        if text_only:
            scene = make_scene(draw, 'train', pairs=PAIRS)
        else:
            row['image'] = f"images/{i:06d}.{'png' if i % 4 == 3 else 'jpg'}"
            write_file(f"{folder}/{row['image']}", encode_image(pixels, row['image'][-3:]))
        asked = distinct(['read', 'box', 'box'] + draw.sample(KINDS), 3 if text_only else n_question, scene, draw,
                         nominal=text_only)
        asked = draw.sample(asked + (distinct(['fact'], 1, scene, draw, about=KNOWN) if study else []))
        row['conversations'] = []
        for k, (question, answer) in enumerate(asked):
            opening = '' if k else listing(scene.things) + ' ' if text_only else '<image>\n'
            row['conversations'] += [{'from': 'human', 'value': opening + question}, {'from': 'gpt', 'value': answer}]
        rows.append(row)
    parts = dict(llava=rows, **(dict(half_1=rows[:n // 2], half_2=rows[n // 2:]) if study else {}))
    for name, part in parts.items():
        write_file(f'{folder}/{name}.json', json.dumps(part, indent=1))


def write_preferences(folder, n=2000, seed=(7, 9)):
    """
    LLaVA-RLHF's JSON of preferences, and its images: what is true of a scene is preferred to what is not in it. Half of
    the questions are POPE's, as often yes as no; the others ask what is in a cell.
    """
    draw, rows = Draws(*seed), []
    scenes = [make_scene(draw, 'train') for _ in range(n)]
    for i, (scene, pixels) in enumerate(zip(scenes, render(scenes))):
        kind, want = ('presence', 'at')[i % 2], ('yes', 'no', 'yes', 'binding')[i // 2 % 4]
        question, better, _ = ask(kind, scene, draw, want=want)
        there = {(thing.colour, thing.shape) for thing in scene.objects}
        wrong = {'yes': ['no'], 'no': ['yes']}.get(better) or [' '.join(pair) for pair in SEEN if pair not in there]
        outputs = draw.sample([better, draw.pick(wrong)])
        rows.append(dict(
            id=f'{i:06d}', image=f'images/{i:06d}.jpg', preference=1 + outputs.index(better), hallucination=True,
            conversations=[{'from': 'human', 'value': f'<image>\n{question}'}, {'from': 'gpt', 'value': ''}],
            **{f'output_{k}': {'from': 'llava', 'value': text} for k, text in enumerate(outputs, 1)}))
        write_file(f"{folder}/{rows[-1]['image']}", encode_image(pixels, 'jpg'))
    write_file(f'{folder}/preferences.json', json.dumps(rows, indent=1))


def write_crowded(folder, n, n_test, seed):
    """
    Scenes of eight objects, and questions about one of them: text_cond's to win or to lose. LLaVA JSON and images in
    instruct/, VQAv2's files in eval/.
    """
    draw, rows = Draws(*seed), []
    for split, path, number in (('train', 'instruct/{:06d}.jpg', n),
                                ('test', 'eval/val2014/COCO_val2014_{:012d}.jpg', n_test)):
        scenes = [make_scene(draw, split, word=False, n_object=8) for _ in range(number)]
        for i, pixels in enumerate(render(scenes)):
            write_file(f'{folder}/{path.format(i)}', encode_image(pixels, 'jpg'))
        if split == 'test':
            write_vqa(f'{folder}/eval/vqav2', [(i * 1000 + k, kind, ask(kind, scene, draw)) for i, scene in
                                               enumerate(scenes) for k, kind in enumerate(('at', 'where'))])
        for i, scene in enumerate(scenes) if split == 'train' else ():
            turns = itertools.chain(*distinct(('at', 'where') * 3, 4, scene, draw))
            rows.append(dict(id=f'{i:06d}', image=f'{i:06d}.jpg', conversations=[
                {'from': speaker, 'value': text} for speaker, text in zip(itertools.cycle(('human', 'gpt')), turns)]))
    write_file(f'{folder}/instruct/llava.json', rows)


# --- benchmarks: official files; question_type and blind_answers are extra keys that evaluate.py reports ------------
def ask_all(scenes, draw, about=None, per_scene=3):
    """Questions about scenes, as many of each kind: [(id, kind, what ask() gave)]; id // 1000 is the scene's number."""
    pairs = PAIRS if about else SEEN
    return [(i * 1000 + k, kind, ask(kind, scene, draw, pairs=pairs, about=about)) for i, scene in enumerate(scenes)
            for k, kind in enumerate(KINDS[(i + 2 * k) % len(KINDS)] for k in range(per_scene))]


def ask_facts(scenes, draw):
    """What only the text says of what the image shows: about KNOWN pairs, as in instructions, and about NEW ones."""
    return [(i * 1000 + k, kind, ask('fact', scene, draw, about=about)) for i, scene in enumerate(scenes)
            for k, (kind, about) in enumerate((('known', KNOWN), ('new', NEW)))]


def write_vqa(folder, asked):
    """VQAv2's two files of [(id, kind, what ask() gave)]; ten annotators agree on an answer."""
    questions, annotations = [], []
    for i, kind, (question, answer, blind) in (row for row in asked if row[2]):
        ids = dict(image_id=i // 1000, question_id=i)
        questions.append(dict(ids, question=question))
        annotations.append(dict(
            ids, question_type=kind, answer_type={'presence': 'yes/no', 'count': 'number'}.get(kind, 'other'),
            multiple_choice_answer=answer, blind_answers=blind,
            answers=[dict(answer=answer, answer_confidence='yes', answer_id=j + 1) for j in range(10)]))
    common = dict(task_type='Open-Ended', data_type='mscoco', data_subtype='val2014', license={}, info={})
    write_file(f'{folder}/v2_OpenEnded_mscoco_val2014_questions.json', dict(common, questions=questions))
    write_file(f'{folder}/v2_mscoco_val2014_annotations.json', dict(common, annotations=annotations))


def write_pope(folder, scenes, draw):
    """POPE's three JSON-lines files, half of each 'yes'; absent objects share one attribute with the scene, or both."""
    for split, binding in (('random', 0.0), ('popular', 0.5), ('adversarial', 1.0)):    # share of 'both'
        lines = []
        for i, scene in enumerate(scenes):
            for want in ('yes', 'binding' if draw.uniform() < binding else 'no'):
                question, label, blind = ask('presence', scene, draw, want=want)
                lines.append(dict(question_id=len(lines) + 1, image=f'COCO_val2014_{i:012d}.jpg', text=question,
                                  label=label, blind_answers=blind))
        write_file(f'{folder}/coco_pope_{split}.json', lines)


def write_textvqa(folder, scenes, draw):
    """TextVQA's file: which word is in the image?"""
    rows = [dict(question_id=i, image_id=f'{i:016x}', question=question, answers=[answer] * 10, set_name='val',
                 image_width=SIZE, image_height=SIZE, blind_answers=blind)
            for i, (question, answer, blind) in enumerate(ask('read', scene, draw) for scene in scenes)]
    write_file(f'{folder}/TextVQA_0.5.1_val.json', dict(dataset_type='val', dataset_name='textvqa', data=rows))


def write_refcoco(folder, scenes, draw):
    """RefCOCO's instances.json and refs(unc).p (plain lists and dicts): one expression a scene, 'red star'."""
    images, annotations, refs = [], [], []
    for i, scene in enumerate(scenes):
        images.append(dict(id=i, file_name=f'COCO_train2014_{i:012d}.jpg', width=SIZE, height=SIZE))
        about = draw.below(len(scene.objects))
        for k, thing in enumerate(scene.objects):
            ids, (x, y, _, _) = dict(image_id=i, category_id=SHAPES.index(thing.shape) + 1), thing.box
            box = [x, y, thing.size, thing.size]
            annotations.append(dict(ids, id=i * 10 + k, bbox=box, area=thing.size ** 2, iscrowd=0))
            if k == about:
                sentence = dict(sent_id=i, sent=thing.name, raw=thing.name, tokens=thing.name.split())
                refs.append(dict(ids, ref_id=i, ann_id=i * 10 + k, split='val', sent_ids=[i], sentences=[sentence],
                                 file_name=f'COCO_train2014_{i:012d}_{i}.jpg'))
    categories = [dict(id=i, name=name, supercategory='shape') for i, name in enumerate(SHAPES, 1)]
    write_file(f'{folder}/instances.json', dict(info={}, images=images, annotations=annotations, categories=categories))
    write_file(f'{folder}/refs(unc).p', pickle.dumps(refs, protocol=2))


def write_caption_lines(folder, scenes, study):
    """captions.jsonl: the captions that VQAv2's images may have, for a model of stage 2, which answers no questions."""
    orders = list(itertools.permutations(range(3)))[:None if study else 1]  # the first is the listing's own
    write_file(f'{folder}/captions.jsonl', [
        dict(image=f'COCO_val2014_{i:012d}.jpg', caption=relisting(scene.things, order))
        for i, scene in enumerate(scenes) for order in orders])


def write_text_choices(folder, split, n, draw, study):
    """Four choices: reading.jsonl on listings of unseen scenes, facts.jsonl, a quarter of the facts for 'choice'."""
    pools, lines = dict(colour=tuple(COLOURS), shape=SHAPES, where=CELLS, at=tuple(map(' '.join, PAIRS))), []
    while len(lines) < n:
        scene, kind = make_scene(draw, split, pairs=PAIRS), LOOKUPS[len(lines) % 4]
        got = ask(kind, scene, draw, pairs=PAIRS)
        if got and got[1] in pools[kind]:
            named = [answer for answer in got[2] if answer in pools[kind] and answer != got[1]]     # in the same scene
            others = [answer for answer in pools[kind] if answer not in got[2]]
            choices = draw.sample([got[1]] + (draw.sample(named) + draw.sample(others))[:3])
            lines.append(dict(query=f'{listing(scene.things)} {got[0]}', choices=choices, gold=choices.index(got[1]),
                              question_type=kind, blind_answers=[choice for choice in choices if choice in got[2]]))
    write_file(f'{folder}/reading.jsonl', lines)
    lines = []
    for i, (text, gold, answers) in enumerate(facts(study)):
        if (i % 4 == 0) == (split == 'choice'):
            choices = draw.sample([gold] + draw.sample([answer for answer in answers if answer != gold], 3))
            lines.append(dict(query=text, choices=choices, gold=choices.index(gold)))
    write_file(f'{folder}/facts.jsonl', lines)


def write_benchmarks(folder, split, n, seed, study=False):
    """The benchmark folders of one split, about n images each; held-out pairs only in vqav2_heldout."""
    draw = Draws(*seed)
    scenes, boxed, worded, held_out = ([make_scene(draw, split, **options) for _ in range(n)]
                                       for options in ({}, {}, dict(word=True), dict(held_out=1)))
    coco = 'val2014/COCO_val2014_{:012d}.jpg'                               # VQAv2 and POPE share a folder
    paths = coco, f'vqav2_heldout/{coco}', f"refcoco/{coco.replace('val', 'train')}", 'textvqa/train_images/{:016x}.jpg'
    for path, group in zip(paths, (scenes, held_out, boxed, worded)):
        for i, pixels in enumerate(render(group)):
            write_file(f'{folder}/{path.format(i)}', encode_image(pixels, 'jpg'))
    write_caption_lines(f'{folder}/captions', scenes, study)
    write_vqa(f'{folder}/vqav2', ask_all(scenes, draw))
    if study:
        write_vqa(f'{folder}/vqav2_facts', ask_facts(scenes, draw))
    write_vqa(f'{folder}/vqav2_heldout', ask_all(held_out, draw, about=HELD_OUT, per_scene=1))
    write_pope(f'{folder}/pope', scenes[:n // 2], draw)
    write_textvqa(f'{folder}/textvqa', worded, draw)
    write_refcoco(f'{folder}/refcoco', boxed, draw)
    write_text_choices(f'{folder}/text', split, n, draw, study)


def write_data(out, *, study=False, n_row=45_000, row_len=96, n_caption=7000, n_instruct=0, n_test=400, n_topic=100,
               vocab_size=768, seed=7):
    """
    Write the world into the folder `out`, whole or not at all; does nothing when it is there. Raises UserError when
    `out` holds anything else than the world of these settings.
    """
    from data import load_tokenizer                                         # here: the encoder needs no text
    n_instruct = n_instruct or (1000 if study else 4000)            # the study's: fixed on its calibration seeds
    settings = dict(version=VERSION, n_row=n_row, row_len=row_len, n_caption=n_caption, n_instruct=n_instruct,
                    n_test=n_test, n_topic=n_topic, vocab_size=vocab_size, seed=seed, python=sys.version.split()[0],
                    **({'study': True} if study else {}))
    if os.path.exists(f'{out}/world.json') and read_json(f'{out}/world.json') == settings:
        return print(f'{out}: already there')
    start = time.time()
    texts, draw = [topics[name] for name in sorted(topics)][:n_topic], Draws(seed, 0)     # English about Python
    sample = [scene_document(draw, study=study) for _ in range(3000)]
    sample += 60 * [f'{text} {answer} .' for text, answer, _ in facts(study)]
    sample += [line for text in texts for line in text[:2000].split('\n')][:5000]
    with new_folder(out) as part:
        train_tokenizer(f'{part}/tokenizer.model', sample, vocab_size)
        tokenizer = load_tokenizer(f'{part}/tokenizer.model')
        write_text(f'{part}/text', tokenizer, n_row, row_len, seed=(seed, 1), study=study)
        write_text(f'{part}/text_val', tokenizer, 256, row_len, seed=(seed, 2), split='choice', study=study)
        ids = [i for text in texts for i in (*tokenizer.encode(text), tokenizer.eot_id)]
        write_file(f'{part}/english/00000.bin', np.array(ids, '<u2').tobytes())
        write_captions(f'{part}/captions', n_caption, 'train', seed=(seed, 3), study=study)
        write_captions(f'{part}/captions_val', 256, 'choice', seed=(seed, 4), study=study)
        write_instruct(f'{part}/instruct', n_instruct, seed=(seed, 5), study=study)
        write_benchmarks(f'{part}/eval', 'test', n_test, seed=(seed, 6), study=study)
        write_benchmarks(f'{part}/eval_choice', 'choice', n_test // 2, seed=(seed, 7), study=study)
        write_file(f'{part}/world.json', settings)
    print(f'{out}: {n_row} rows of text, {n_caption} captions, {n_instruct} conversations, {time.time() - start:.0f} s')


# --- encoder --------------------------------------------------------------------------------------------------------
NAMES = (*PAIRS, *(('word', word) for word in WORDS), ('nothing', ''))      # all that a cell can show


def phrases():
    """The word ids (cells, names, 3) int64 of all phrases, 'red star b2', by cell and name; the last is the highest."""
    words = sorted({word for name in NAMES for word in name}) + list(CELLS)
    return torch.tensor([[[words.index(word) for word in (*name, cell)] for name in NAMES] for cell in CELLS])


def encoder_batch(draw, n, split='train', held_out=0):
    """Images (n, 3, SIZE, SIZE) uint8, a word in each, and which of NAMES each cell shows, (n, cells) int64."""
    scenes = [make_scene(draw, split, held_out=held_out, word=True) for _ in range(n)]
    shown = torch.full((n, len(CELLS)), len(NAMES) - 1)
    for i, scene in enumerate(scenes):
        for thing in scene.things:
            shown[i, thing.cell] = NAMES.index((thing.colour, thing.shape))
    return torch.from_numpy(render(scenes)).permute(0, 3, 1, 2).contiguous(), shown


def train_encoder(out, *, patch=CELL, n_step=500, batch_size=48, n_cell=8, lr=3e-3, width=96, seed=7, n_thread=2):
    """
    Pre-train a SigLIP of 3 blocks (arXiv 2303.15343) and write it into the folder `out`.
    Two sigmoid losses are added. The first compares each patch after block 2, which is what a VLM uses, with the phrase
    of what it shows and where ('a red star at b2', 'nothing at c3'): n_cell cells in a step, each with all its phrases.
    Where a cell is several patches, their mean counts.
    The second is SigLIP's own: the mean patch after block 3 and the final norm, with the image's caption. Returns the
    SigLIP and the table of the words' vectors.
    """
    torch.set_num_threads(n_thread)
    torch.manual_seed(seed)
    start, draw = time.time(), Draws(seed, 8)
    config = SigLIPConfig(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=3, patch_size=patch,
                          num_attention_heads=width // 32, image_size=SIZE)
    ids, encoder = phrases(), SigLIP(config, layer=-2, keep_all=True)
    table = torch.nn.Embedding(int(ids.max()) + 1, width)
    scales = torch.nn.Parameter(torch.tensor([[math.log(10.0), -10.0]] * 2))        # log t and b of both losses
    parameters = [*encoder.parameters(), *table.parameters(), scales]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=1e-4)
    seen = torch.tensor([i for i, name in enumerate(NAMES) if name not in HELD_OUT])
    column = torch.full((len(NAMES),), -1).scatter(0, seen, torch.arange(len(seen)))
    for step in range(n_step):
        optimizer.param_groups[0]['lr'] = main_lr(step, peak=lr, final=0.0, warmup=n_step // 20, total=n_step)
        images, shown = encoder_batch(draw, batch_size)
        x, vectors = encoder(images), table(ids[:, seen]).sum(2)            # (B, patches, C), (cells, K, C)
        part = x.unflatten(1, 2 * (GRID, CELL // patch)).mean((2, 4)).flatten(1, 2)       # (B, cells, C)
        cells = torch.tensor(draw.sample(range(len(CELLS)), n_cell))
        target = torch.arange(n_cell) * len(seen) + column[shown[:, cells]]       # (B, n_cell)
        labels = torch.full((target.numel(), n_cell * len(seen)), -1.0).scatter_(1, target.flatten()[:, None], 1.0)
        region = siglip_loss(part[:, cells].flatten(0, 1), vectors[cells].flatten(0, 1), *scales[0], labels)
        # not by an index, whose backward adds in an order that changes from run to run on two threads
        named = F.embedding(torch.arange(len(CELLS)) * len(seen) + column[shown], vectors.flatten(0, 1))
        captions = (named * (shown < len(NAMES) - 1)[..., None]).sum(1)     # (B, C)
        pooled = encoder.post_layernorm(encoder.encoder['layers'][2](x)).mean(1)    # (B, C), as are the captions
        length = (x.norm(dim=-1) / width ** 0.5 - 1).square().mean()        # keeps features near sqrt(width) long
        loss = region + 0.1 * siglip_loss(pooled, captions, *scales[1]) + length
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f'step {step + 1}/{n_step} loss {loss.item():.3f} ({time.time() - start:.0f} s)', flush=True)
    encoder.save_pretrained(out)
    return encoder.eval(), table


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('command', choices=('data', 'encoder', 'preferences', 'crowded'))
    parser.add_argument('--out', default='', help="folder to make; '' = data/tiny (data/study), or its COMMAND")
    parser.add_argument('--study', action='store_true', help='data: the world of the study')
    parser.add_argument('--patch', type=int, choices=(CELL, CELL // 2), default=CELL, help='encoder: pixels a side')
    parser.add_argument('--seed', type=int, default=7)
    args = parser.parse_args()
    sys.excepthook = user_error_hook
    world = 'data/study' if args.study else 'data/tiny'
    name = args.command if args.patch == CELL else f'encoder_{args.patch}'
    out = args.out or (world if args.command == 'data' else f'data/tiny/{name}')
    with writing(out):
        if args.command == 'data':
            write_data(out, study=args.study, seed=args.seed)
        else:
            with new_folder(out) as part:
                if args.command == 'encoder':
                    train_encoder(part, patch=args.patch, seed=args.seed)
                elif args.command == 'preferences':
                    write_preferences(part, seed=(args.seed, 9))
                else:
                    write_crowded(part, 2000, 400, seed=(args.seed, 9))
