"""The tiny world: its bytes, its splits, the formats as our own readers see them, its encoder."""
import gzip
import hashlib
import json
import re
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import benchmarks
import evaluate
import tinyworld as tw
from data import CaptionSource, InstructSource, TextSource, load_tokenizer
from vision import SigLIP

SMALL = dict(n_row=48, n_caption=24, n_instruct=40, n_test=24, n_topic=2)


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
    with pytest.raises(ValueError, match='expected'):
        tw.write_data(str(world), **SMALL, seed=9)
    (tmp_path / 'mine').mkdir()
    with pytest.raises(ValueError, match='no tiny world'):
        tw.write_data(str(tmp_path / 'mine'), **SMALL)


def test_splits_are_disjoint_and_every_file_keeps_to_its_own(world):
    split = {'captions': 'train', 'captions_val': 'choice'}
    for folder, name in split.items():
        for caption in captions(world, folder).values():
            assert tw.zlib.crc32(caption.encode()) % 10 in {'train': range(2, 10), 'choice': [1]}[name], caption
    for folder, rest in (('eval', 0), ('eval_choice', 1)):
        for line in (world / folder / 'text/reading.jsonl').read_text().splitlines():
            scene = re.match(r'.* \.(?= )', json.loads(line)['query']).group()
            assert tw.zlib.crc32(scene.encode()) % 10 == rest, scene
    tokenizer = load_tokenizer(str(world / 'tokenizer.model'))
    source = TextSource([str(world / 'text')], tokenizer, 96, row_len=96)
    for i in range(len(source)):
        scene = re.match(r'([a-d][1-4] \w+ \w+ \. ?)+', tokenizer.decode(source[i].tokens.tolist()))
        if scene and scene.end() < 150:                   # a whole listing: what follows is no cell
            assert tw.zlib.crc32(scene.group().strip().encode()) % 10 > 1, scene.group()


def test_held_out_pairs_are_in_no_training_image_and_in_every_held_out_question(world):
    names = [' '.join(pair) for pair in tw.HELD_OUT]
    asked = json.dumps([row for row in conversations(world) if 'image' in row])
    seen = asked + ' '.join(captions(world, 'captions').values())
    assert not [name for name in names if name in seen]
    _, shown = tw.encoder_batch(tw.Draws(1), 200, word=True)
    assert not set(shown.unique().tolist()) & {tw.NAMES.index(pair) for pair in tw.HELD_OUT}
    draw = tw.Draws(3)
    text = ' '.join(tw.scene_document(draw) for _ in range(100))
    assert all(name in text for name in names), 'text is where a model meets them'
    file = world / 'eval/vqav2_heldout/v2_mscoco_val2014_annotations.json'
    assert {row['question_type'] for row in json.loads(file.read_text())['annotations']} == set(tw.KINDS)


def test_answers_are_what_the_scene_shows():
    draw = tw.Draws(5)
    for _ in range(300):
        scene = tw.make_scene(draw, 'train')
        text = tw.listing(scene.things)
        for kind in (*tw.KINDS, 'read', 'box'):
            got = tw.ask(kind, scene, draw)
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
            assert kind == 'presence' or answer in blind


def test_boxes_are_tight_around_what_is_painted():
    draw = tw.Draws(6)
    for _ in range(40):
        scene = tw.make_scene(draw, 'train')
        differs = np.abs(tw.render([scene])[0].astype(int) - scene.grey).max(-1) > 3
        for thing in scene.objects:
            x1, y1, x2, y2 = thing.box
            cell = np.zeros((tw.SIZE, tw.SIZE), bool)
            y, x = thing.cell // tw.GRID * tw.CELL, thing.cell % tw.GRID * tw.CELL
            cell[y:y + tw.CELL, x:x + tw.CELL] = True
            ys, xs = np.nonzero(differs & cell)
            assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (x1, y1, x2, y2), thing


def test_training_files_are_read_by_the_sources(world):
    tokenizer = load_tokenizer(str(world / 'tokenizer.model'))
    rows = TextSource([str(world / 'text')], tokenizer, 96, row_len=96)
    assert len(rows) == SMALL['n_row'] and rows[0].tokens.shape == (96,)
    with tarfile.open(world / 'text/00000.tar') as tar:
        assert len(json.loads(gzip.decompress(tar.extractfile('00000000.json.gz').read()))) == 97
    english = TextSource([str(world / 'english')], tokenizer, 96, row_len=96)
    assert 'assert' in tokenizer.decode(english[0].tokens.tolist()).lower()
    pairs = CaptionSource([str(world / 'captions')], tokenizer, 96, len(tw.CELLS), tw.SIZE)
    assert len(pairs) == SMALL['n_caption'] and not pairs.damaged
    kinds = {'png': 0, 'jpg': 0}
    for i in range(len(pairs)):
        assert pairs[i].images[0].shape == (3, tw.SIZE, tw.SIZE)
    with tarfile.open(world / 'captions/00000.tar') as tar:
        for name in tar.getnames():
            kinds[name[-3:]] = kinds.get(name[-3:], 0) + 1
    assert kinds['png'] == 6 and kinds['jpg'] == 18
    chats = InstructSource(str(world / 'instruct/llava.json'), str(world / 'instruct'), tokenizer, 96, len(tw.CELLS),
                           tw.SIZE)
    assert len(chats) == SMALL['n_instruct']
    lengths = [int((chats[i].tokens != tokenizer.pad_id).sum()) for i in range(len(chats))]
    assert max(lengths) < 96, 'a conversation is cut at 96 tokens'
    assert sum(not sample.images for sample in map(chats.__getitem__, range(len(chats)))) == 2
    for row in conversations(world):
        asked = [turn['value'].replace('<image>\n', '') for turn in row['conversations'][::2]]
        assert len(set(asked)) == len(asked) >= 3


def test_benchmarks_are_read_by_evaluate_with_balanced_answers(world):
    options = evaluate.default_options(eval_dir=str(world / 'eval'), short_suffix='', box_prompt='box of the {sent}?',
                                       pope_words=('yes', 'no'))
    tasks = {task.name: task for task in evaluate.find_tasks(options)}
    assert set(tasks) == {'vqav2', 'vqav2_heldout', 'pope', 'textvqa', 'refcoco', 'captions', 'reading', 'facts'}
    pope = tasks['pope'].examples
    assert np.mean([example.answers == [0] for example in pope]) == 0.5 and len(pope) == 3 * SMALL['n_test']
    captions, asked = tasks['captions'].examples, {example.image for example in tasks['vqav2'].examples}
    assert len(captions) == SMALL['n_test'] and {example.image for example in captions} == asked
    assert all(re.fullmatch(r'([a-c][1-3] \w+ \w+ \. ?)+', example.answers[0]) for example in captions)
    box = tasks['refcoco'].examples[0]
    assert re.fullmatch(r'box of the \w+ \w+\?', box.prompt)
    for task in tasks.values():
        assert all(Image.open(example.image).size == (tw.SIZE, tw.SIZE) for example in task.examples if example.image)
    refs = benchmarks.read_refs(str(world / 'eval/refcoco/refs(unc).p'))
    assert {'ref_id', 'ann_id', 'image_id', 'category_id', 'split', 'sent_ids', 'sentences'} <= refs[0].keys()


def test_the_tokenizer_spells_the_world_in_whole_words_and_bytes(world):
    tokenizer = load_tokenizer(str(world / 'tokenizer.model'))
    words = [*tw.COLOURS, *tw.SHAPES, *tw.WORDS, *tw.CELLS, 'yes', 'no', 'nothing', 'word', '3', '4']
    assert not [word for word in words if len(tokenizer.encode(word)) != 1]
    box = tw.box_text((1, 15, 13, 27))
    assert len(tokenizer.encode(box)) == 6, 'bracket, four numbers with their commas, bracket'
    for text in ('naïve café, 東京 🙂\n\tx = {1: 2}', f'a2 red star . box of the red star? {box}'):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_encoder_learns_is_reproducible_and_loads_at_both_layers(tmp_path):
    scores = tw.train_encoder(str(tmp_path / 'a'), n_step=100, n_thread=1)
    assert scores['colour'] > 0.8 and scores['position'] > 0.9 and scores['nothing'] > 0.9, scores
    images, _ = tw.encoder_batch(tw.Draws(4), 3, 'choice')
    middle, last = SigLIP.from_pretrained(str(tmp_path / 'a')), SigLIP.from_pretrained(str(tmp_path / 'a'), -1, True)
    assert middle(images).shape == last(images).shape == (3, len(tw.CELLS), 96)
    assert 0.8 < middle(images).norm(dim=-1).mean() / 96 ** 0.5 < 1.2, 'features near unit variance'
    with pytest.raises(ValueError, match='already exists'):
        tw.train_encoder(str(tmp_path / 'a'), n_step=1)


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
