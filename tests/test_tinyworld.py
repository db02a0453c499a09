"""The tiny world: its bytes, its splits, the formats as our own readers see them, its encoder."""
import gzip
import hashlib
import json
import re
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import benchmark_files
import evaluate
import scorers
import tinyscenes as ts
import tinyworld as tw
from data import CaptionSource, InstructSource, TextSource, load_tokenizer
from images import View
from vision import SigLIP

SMALL = dict(study=True, n_row=48, n_caption=24, n_instruct=40, n_test=24, n_topic=2)    # the study's world holds more


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp('tiny') / 'world'
    tw.write_data(str(out), **SMALL)
    return out


def digests(folder):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob('*')) if path.is_file()}


def conversations(world):
    return json.loads((world / 'instruct/llava.json').read_text())


def captions(world, folder):
    """{key: caption} of the tars of a folder."""
    found = {}
    for path in sorted((world / folder).glob('*.tar')):
        with tarfile.open(path) as tar:
            found.update({member.name[:-4]: tar.extractfile(member).read().decode()
                          for member in tar if member.name.endswith('.txt')})
    return found


def scene_of(caption):
    """The listing of the scene that a caption tells in any order, of things and inside them: 'b1 red star . ...'"""
    things = []
    for thing in caption.removesuffix(' .').split(' . '):
        words = thing.split(' ')
        (cell,), (colour,) = set(words) & set(ts.CELLS), set(words) & {*ts.COLOURS, 'word'}
        (shape,) = set(words) - {cell, colour}
        things.append(f'{cell} {colour} {shape} .')
    return ' '.join(sorted(things))


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(world, tmp_path):
    tw.write_data(str(tmp_path / 'again'), **SMALL)
    assert digests(world) == digests(tmp_path / 'again')
    tw.write_data(str(tmp_path / 'other'), **SMALL, seed=8)
    first, other = digests(world), digests(tmp_path / 'other')
    assert first.keys() == other.keys()
    for name in ('text/00000.tar', 'captions/00000.tar', 'instruct/llava.json', 'eval/text/reading.jsonl'):
        assert first[name] != other[name], name


def test_a_finished_world_is_kept_and_anything_else_is_refused(world, tmp_path, capsys):
    before = digests(world)
    tw.write_data(str(world), **SMALL)
    assert 'already there' in capsys.readouterr().out and digests(world) == before
    with pytest.raises(ValueError, match='is there already; remove it or choose another --out'):
        tw.write_data(str(world), **SMALL, seed=9)
    (tmp_path / 'mine' / 'photos').mkdir(parents=True)
    with pytest.raises(ValueError, match='mine: is there already'):
        tw.write_data(str(tmp_path / 'mine'), **SMALL)


def test_splits_are_disjoint_and_every_file_keeps_to_its_own(world):
    split = {'captions': 'train', 'captions_val': 'choice'}
    for folder, name in split.items():
        for caption in captions(world, folder).values():
            rest = zlib.crc32(scene_of(caption).encode()) % 10
            assert rest in {'train': range(2, 10), 'choice': [1]}[name], caption
    for folder, rest in (('eval', 0), ('eval_choice', 1)):
        for line in (world / folder / 'text/reading.jsonl').read_text().splitlines():
            scene = re.match(r'.* \.(?= )', json.loads(line)['query']).group()
            assert zlib.crc32(scene.encode()) % 10 == rest, scene
    tokenizer = load_tokenizer(str(world / 'tokenizer.model'))
    source = TextSource([str(world / 'text')], tokenizer, 96, row_len=96)
    for i in range(len(source)):
        scene = re.match(r'([a-d][1-4] \w+ \w+ \. ?)+', tokenizer.decode(source[i].tokens.tolist()))
        if scene and scene.end() < 150:                   # a whole listing: what follows is no cell
            assert zlib.crc32(scene.group().strip().encode()) % 10 > 1, scene.group()


def test_held_out_pairs_are_in_no_training_image_and_in_every_held_out_question(world):
    names = [' '.join(pair) for pair in ts.HELD_OUT]
    asked = json.dumps([row for row in conversations(world) if 'image' in row])
    seen = asked + ' '.join(captions(world, 'captions').values())
    assert not [name for name in names if name in seen]
    _, shown = tw.encoder_batch(ts.Draws(1), 200)
    assert not set(shown.unique().tolist()) & {tw.NAMES.index(pair) for pair in ts.HELD_OUT}
    draw = ts.Draws(3)
    text = ' '.join(ts.scene_document(draw) for _ in range(100))
    assert all(name in text for name in names), 'text is where a model meets them'
    file = world / 'eval/vqav2_heldout/v2_mscoco_val2014_annotations.json'
    assert {row['question_type'] for row in json.loads(file.read_text())['annotations']} == set(ts.KINDS)


def test_a_caption_tells_the_same_scene_in_the_orders_of_the_text(world):
    orders = set()
    for caption in captions(world, 'captions').values():
        kind = lambda w: 'cell' if w in ts.CELLS else 'colour' if w in {*ts.COLOURS, 'word'} else 'shape'
        kinds = [[kind(w) for w in thing.split()]
                 for thing in caption.removesuffix(' .').split(' . ')]
        assert 3 <= len(kinds) <= 5 and all(one == kinds[0] and len(set(one)) == 3 for one in kinds), caption
        orders.add(tuple(kinds[0]))
    assert ('shape', 'colour', 'cell') in orders and len(orders) >= 3


def test_instructions_ask_facts_of_known_pairs_alone_and_answers_score_1_against_themselves(world):
    names = {what: [' '.join(pair) for pair in pairs] for what, pairs in (('known', ts.KNOWN), ('new', ts.NEW))}
    assert not set(names['known']) & set(names['new']) and len(names['new']) == 4
    assert not {*ts.KNOWN, *ts.NEW} & {*ts.HELD_OUT}, 'these are in no training image'
    relations = tuple(ts.PAIR_RELATIONS)
    answers = [turn['value'] for row in conversations(world) for turn in row['conversations'][1::2]]
    told = [a for a in answers if len(a.split()) > 3 and any(f' {r} ' in a for r in relations)]
    assert len(told) > SMALL['n_instruct'] / 2
    assert all(' '.join(a.split()[:2]) in names['known'] for a in told), 'a new pair is asked about'
    options = evaluate.default_options(eval_dir=str(world / 'eval'), short_suffix='')
    (task,) = [task for task in evaluate.find_tasks(options) if task.name == 'vqav2_facts']
    kinds = {example.types[0] for example in task.examples}
    assert kinds == {'known', 'new'}
    gold = []
    for example in task.examples:
        (answer,) = {a if isinstance(a, str) else a['answer'] for a in example.answers}
        assert ' '.join(answer.split()[:2]) in names[example.types[0]]
        assert answer.split()[1] in example.prompt and answer.split()[0] not in example.prompt.split()
        for variant in ('official', 'vlm-eval'):
            assert evaluate.vqa_accuracy(answer, example.answers, variant) == 1.0, answer
            assert evaluate.vqa_accuracy(answer + ' x', example.answers, variant) == 0.0
        gold.append(answer)
    result, _ = scorers.summarise(task, gold)
    assert result['score'] == result['types']['new']['score'] == 1.0
    # the text says every fact of a pair, in the words that the answer repeats
    said = {f'{text} {answer}' for text, answer, _ in ts.facts(study=True)}
    assert {f'the {answer}' for answer in gold} <= said and len(said) == 5 * 32 + 4 * 16


def test_halves_are_disjoint_and_together_the_instructions(world):
    halves = [json.loads((world / f'instruct/half_{k}.json').read_text()) for k in (1, 2)]
    assert halves[0] + halves[1] == conversations(world) and len(halves[0]) == len(halves[1])
    assert [sum('image' not in row for row in half) for half in halves] == [1, 1]


def test_the_speedruns_world_knows_no_facts_about_pairs(tmp_path):
    tw.write_data(str(tmp_path / 'world'), **{**SMALL, 'study': False})
    names = {path.name for path in (tmp_path / 'world').rglob('*')}
    assert 'llava.json' in names and not names & {'half_1.json', 'half_2.json', 'vqav2_facts'}
    said = captions(tmp_path / 'world', 'captions').values()
    assert all(re.fullmatch(r'([abc][123] \w+ \w+ \. ?)+', caption) for caption in said)
    assert not re.search(r' (eats|plays|comes from)\b', json.dumps(conversations(tmp_path / 'world')))
    assert len(ts.facts()) == 5 * 32
    assert not re.search(r'(eats|plays)\?', ' '.join(ts.scene_document(ts.Draws(i)) for i in range(60)))


def test_the_blind_guessers_caption_loss_is_the_entropy_of_what_is_drawn(world):
    """An independent judge: the probability of each drawn caption, thing by thing, averaged over many captions."""
    draw, nats, n_word = ts.Draws(12), [], []
    for _ in range(3000):
        scene = ts.make_scene(draw, 'train')
        order = ts.field_order(draw)
        things = draw.sample(scene.things)
        p = 0.5 * 0.5                                                    # 3 or 4 objects; a word or none
        p *= {(2, 1, 0): 0.5, (0, 1, 2): 0.15}.get(tuple(order), 0) + 0.35 / 6
        cells, pairs, left = 9, 14, len(things)
        is_word = [thing.colour == 'word' for thing in things]
        p *= 1 / left if any(is_word) else 1                             # where in the order it comes
        for word in is_word:
            p *= 1 / cells / (32 if word else pairs)
            cells, pairs = cells - 1, pairs - (not word)
        nats.append(-np.log(p))
        n_word.append(4 * len(things) + 1)
    error = np.std(np.array(nats) - tw.blind_caption_loss() * np.array(n_word)) / 3000 ** 0.5 / np.mean(n_word)
    assert abs(sum(nats) / sum(n_word) - tw.blind_caption_loss()) < 5 * error < 0.02
    tokenizer = load_tokenizer(str(world / 'tokenizer.model'))
    for caption in captions(world, 'captions').values():                 # as many tokens as it says
        assert len(tokenizer.encode(caption)) == len(caption.split()) == 4 * caption.count(' .'), caption
    values = {}
    exec(Path(tw.__file__).with_name('config').joinpath('study.py').read_text(), {'stage': 'study'}, values)
    assert values['blind_caption_loss'] == round(tw.blind_caption_loss(), 2)


def test_training_files_are_read_by_the_sources(world):
    tokenizer = load_tokenizer(str(world / 'tokenizer.model'))
    rows = TextSource([str(world / 'text')], tokenizer, 96, row_len=96)
    assert len(rows) == SMALL['n_row'] and rows[0].tokens.shape == (96,)
    with tarfile.open(world / 'text/00000.tar') as tar:
        assert len(json.loads(gzip.decompress(tar.extractfile('00000000.json.gz').read()))) == 97
    english = TextSource([str(world / 'english')], tokenizer, 96, row_len=96)
    assert 'assert' in tokenizer.decode(english[0].tokens.tolist()).lower()
    pairs = CaptionSource([str(world / 'captions')], tokenizer, 96, View(ts.SIZE, len(ts.CELLS)))
    assert len(pairs) == SMALL['n_caption'] and not pairs.damaged
    kinds = {'png': 0, 'jpg': 0}
    for i in range(len(pairs)):
        assert pairs[i].images[0].shape == (3, ts.SIZE, ts.SIZE)
    with tarfile.open(world / 'captions/00000.tar') as tar:
        for name in tar.getnames():
            kinds[name[-3:]] = kinds.get(name[-3:], 0) + 1
    assert kinds['png'] == 6 and kinds['jpg'] == 18
    chats = InstructSource(str(world / 'instruct/llava.json'), str(world / 'instruct'), tokenizer, 128,
                           View(ts.SIZE, len(ts.CELLS)))
    assert len(chats) == SMALL['n_instruct']
    lengths = [int((chats[i].tokens != tokenizer.pad_id).sum()) for i in range(len(chats))]
    assert max(lengths) < 128, 'a conversation is cut at 128 tokens'
    assert sum(not sample.images for sample in map(chats.__getitem__, range(len(chats)))) == 2
    for row in conversations(world):
        asked = [turn['value'].replace('<image>\n', '') for turn in row['conversations'][::2]]
        assert len(set(asked)) == len(asked) >= 3


def test_benchmarks_are_read_by_evaluate_with_balanced_answers(world):
    options = evaluate.default_options(eval_dir=str(world / 'eval'), short_suffix='', box_prompt='box of the {sent}?',
                                       pope_words=('yes', 'no'))
    tasks = {task.name: task for task in evaluate.find_tasks(options)}
    assert set(tasks) == {'vqav2', 'vqav2_heldout', 'vqav2_facts', 'pope', 'textvqa', 'refcoco', 'captions', 'reading',
                          'facts'}
    pope = tasks['pope'].examples
    assert np.mean([example.answers == [0] for example in pope]) == 0.5 and len(pope) == 3 * SMALL['n_test']
    captions, asked = tasks['captions'].examples, {example.image for example in tasks['vqav2'].examples}
    assert len(captions) == SMALL['n_test'] and {example.image for example in captions} == asked
    for example in captions:                              # in each of the orders that a caption may have
        assert len(set(example.answers)) == 6 and len(set(map(scene_of, example.answers))) == 1
    box = tasks['refcoco'].examples[0]
    assert re.fullmatch(r'box of the \w+ \w+\?', box.prompt)
    for task in tasks.values():
        assert all(Image.open(example.image).size == (ts.SIZE, ts.SIZE) for example in task.examples if example.image)
    refs = benchmark_files.read_refs(str(world / 'eval/refcoco/refs(unc).p'))
    assert {'ref_id', 'ann_id', 'image_id', 'category_id', 'split', 'sent_ids', 'sentences'} <= refs[0].keys()


def test_crowded_scenes_ask_about_one_of_eight_objects(world, tmp_path):
    for name in 'ab':
        tw.write_crowded(str(tmp_path / name), 5, 4, seed=(3, 9))
    assert digests(tmp_path / 'a') == digests(tmp_path / 'b') and len(digests(tmp_path / 'a')) == 5 + 1 + 4 + 2
    tokenizer = load_tokenizer(str(world / 'tokenizer.model'))
    rows, images = (str(tmp_path / name) for name in ('a/instruct/llava.json', 'a/instruct'))
    source = InstructSource(rows, images, tokenizer, 128, View(42, 9), split_turns=True, text_cond=True)
    samples = [source[i] for i in range(len(source))]
    assert len(samples) == 5 and all(s.tokens.shape[0] == len({tuple(p) for p in s.prompts}) == 4 for s in samples)
    (task,) = evaluate.find_tasks(evaluate.default_options(eval_dir=str(tmp_path / 'a/eval')))
    assert len(task.examples) == 8 and {e.types[0] for e in task.examples} == {'at', 'where'}


def test_the_tokenizer_spells_the_world_in_whole_words_and_bytes(world):
    tokenizer = load_tokenizer(str(world / 'tokenizer.model'))
    words = [*ts.COLOURS, *ts.SHAPES, *ts.WORDS, *ts.CELLS, 'yes', 'no', 'nothing', 'word', '3', '4']
    assert not [word for word in words if len(tokenizer.encode(word)) != 1]
    box = ts.box_text((1, 15, 13, 27))
    assert len(tokenizer.encode(box)) == 6, 'bracket, four numbers with their commas, bracket'
    for text in ('naïve café, 東京 🙂\n\tx = {1: 2}', f'a2 red star . box of the red star? {box}'):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_encoder_learns_is_reproducible_and_loads_at_both_layers(tmp_path):
    encoder, table = tw.train_encoder(str(tmp_path / 'a'), n_step=100, n_thread=1)
    images, shown = tw.encoder_batch(ts.Draws(0, 9), 200, 'choice', held_out=1)
    with torch.no_grad():                                 # which of all phrases is nearest to a patch?
        vectors = F.normalize(table(ids := tw.phrases()).sum(2), dim=-1).flatten(0, 1)           # (cells x names, C)
        best = (F.normalize(encoder(images), dim=-1) @ vectors.T).argmax(-1)                     # (n, cells)
    cell, name = best // len(tw.NAMES), best % len(tw.NAMES)
    same_colour, pair = ids[0, name, 0] == ids[0, shown, 0], shown < len(ts.PAIRS)
    assert same_colour[pair].float().mean() > 0.8 and (cell == torch.arange(len(ts.CELLS))).float().mean() > 0.9
    assert (name == shown)[shown == len(tw.NAMES) - 1].float().mean() > 0.9, 'nothing'
    images, _ = tw.encoder_batch(ts.Draws(4), 3, 'choice')
    middle, last = SigLIP.from_pretrained(str(tmp_path / 'a')), SigLIP.from_pretrained(str(tmp_path / 'a'), -1, True)
    assert middle(images).shape == last(images).shape == (3, len(ts.CELLS), 96)
    assert 0.8 < middle(images).norm(dim=-1).mean() / 96 ** 0.5 < 1.2, 'features near unit variance'


class AddsInOrder(TorchDispatchMode):
    """Fails where a sum over repeated indices leaves its order, and so its last bits, to the threads."""
    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if 'index_put' in func.name() and len(args) > 3 and args[3]:
            places = torch.stack(torch.broadcast_tensors(*[i for i in args[1] if i is not None])).flatten(1)
            assert places.unique(dim=1).shape == places.shape, f'{func.name()} adds to {places}'
            self.seen += 1
        return func(*args, **(kwargs or {}))


def test_the_encoder_has_the_same_bits_every_time(tmp_path):
    for name in 'ab':
        tw.train_encoder(str(tmp_path / name), n_step=2, batch_size=4, n_thread=1)
    assert digests(tmp_path / 'a') == digests(tmp_path / 'b')
    with AddsInOrder() as mode:
        tw.train_encoder(str(tmp_path / 'c'), n_step=1, n_thread=1)
    assert mode.seen > 0, 'the backward of an indexing, at least one'


def test_preferences_name_what_is_there_before_what_is_not(tmp_path):
    tw.write_preferences(str(tmp_path), n=48, seed=(3, 9))
    rows = json.loads((tmp_path / 'preferences.json').read_text())
    assert len({row['image'] for row in rows}) == 48 and {row['preference'] for row in rows} == {1, 2}
    draw = ts.Draws(3, 9)
    scenes = [ts.make_scene(draw, 'train') for _ in rows]
    said = []
    for row, scene in zip(rows, scenes):
        there = {thing.name for thing in scene.objects}
        outputs = [row[f'output_{k}']['value'] for k in (1, 2)]
        better, worse = outputs if row['preference'] == 1 else outputs[::-1]
        question = row['conversations'][0]['value'].removeprefix('<image>\n')
        if question.startswith('is there a '):
            yes = question[len('is there a '):-1] in there
            assert (better, worse) == (('yes', 'no') if yes else ('no', 'yes'))
            said.append(better)
        else:
            cell = ts.CELLS.index(question[len('what is at '):-1])
            shown = [thing.name for thing in scene.things if thing.cell == cell] or ['nothing']
            assert better == shown[0] and worse not in there and tuple(worse.split()) in ts.SEEN
        assert [turn['value'] for turn in row['conversations'][1:]] == [''] and (tmp_path / row['image']).exists()
    assert said.count('yes') == said.count('no') == 12
