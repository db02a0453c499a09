"""
What the tiny world shows and says: scenes of coloured shapes and words, their images, and questions about them.

A scene is a grid of 3 x 3 cells of 14 px, so that one image token sees one cell. Three or four cells hold an object (4
shapes x 4 colours, no pair twice); in half of the scenes one more cell holds a word of three letters. Questions are
worded the same in text, instructions and benchmarks: the text teaches to look up attributes, as images will ask.
Training, choice and test scenes are disjoint by a checksum of what they show. All follows from a seed.
"""
import functools
import io
import itertools
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image

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
