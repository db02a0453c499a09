"""evaluate.py on small benchmarks in the official formats, with an oracle model and with a real (untrained) one."""
import json
import os
import pickle
import runpy
import shutil
import sys
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from checkpoint import save_checkpoint
import evaluate
import scorers
from data import load_tokenizer
from evaluate import default_options, evaluate_task, find_tasks
from model import VLM, Decoder, ModelConfig, Projector
from vision import PatchProjection

COLOURS = {'red': (220, 30, 30), 'blue': (30, 30, 220), 'green': (30, 200, 30)}


# --- fixtures -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    """A byte-level BPE in the released GPT-NeoX form, small."""
    import tokenizers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    words = 'Yes No yes no red blue green what colour is it Answer the question using a single word or phrase'
    engine.train_from_iterator([words] * 50, trainers.BpeTrainer(
        vocab_size=400, special_tokens=['<|endoftext|>'], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    path = tmp_path_factory.mktemp('tokenizer') / 'tokenizer.json'
    engine.save(str(path))
    assert tokenizers
    return load_tokenizer(str(path))


def save(folder, name, colour, size=(28, 28)):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, COLOURS[colour]).save(folder / name)


def write_vqav2(root, n=9):
    folder = root / 'vqav2'
    names = list(COLOURS)
    questions, annotations = [], []
    for i in range(n):
        image_id, colour = 100 + i // 2, names[(i // 2) % 3]
        save(folder / 'val2014', f'COCO_val2014_{image_id:012d}.{"png" if image_id % 2 else "jpg"}', colour)
        gold = colour if i % 2 == 0 else 'yes'
        questions.append({'image_id': image_id, 'question': f'what colour is it {i}?', 'question_id': 7000 + i})
        annotations.append({'question_id': 7000 + i, 'image_id': image_id, 'answer_type': 'other',
                            'question_type': 'colour' if i % 2 == 0 else ['is it', 'held out'],
                            'multiple_choice_answer': gold, 'blind_answers': ['red', gold] if i % 2 == 0 else None,
                            'answers': [{'answer': gold, 'answer_id': k} for k in range(10)]})
    (folder / 'v2_OpenEnded_mscoco_val2014_questions.json').write_text(json.dumps({'questions': questions[::-1]}))
    (folder / 'v2_mscoco_val2014_annotations.json').write_text(json.dumps({'annotations': annotations}))
    return folder


def write_pope(root, n=4):
    folder = root / 'pope'
    for split in ('random', 'popular', 'adversarial'):
        rows = [{'question_id': i, 'image': f'COCO_val2014_{100 + i // 2:012d}.jpg',
                 'text': f'Is there a {split} dog {i}?', 'label': 'yes' if i % 2 else 'no',
                 'blind_answers': ['yes']} for i in range(n)]
        save(folder, 'COCO_val2014_000000000100.png', 'red')
        save(folder, 'COCO_val2014_000000000101.jpg', 'blue')
        (folder / f'coco_pope_{split}.json').write_text('\n'.join(map(json.dumps, rows)) + '\n')
    return folder


def write_textvqa(root, ocr=True):
    folder = root / 'textvqa'
    rows = [{'question_id': i, 'image_id': f'0a{i}', 'question': f'which word {i}?', 'answers': [f'word{i}'] * 10}
            for i in range(4)]
    for row in rows:
        save(folder / 'train_images', row['image_id'] + '.jpg', 'green')
    (folder / 'TextVQA_0.5.1_val.json').write_text(json.dumps({'data': rows}))
    if ocr:
        (folder / 'textvqa_val_v051_ocr.jsonl').write_text(''.join(json.dumps(
            {'text': row['question'] + f"\nReference OCR token: word{row['question_id']}, x"}) + '\n' for row in rows))
    return folder


def write_refcoco(root, refs=None, name='refs(unc).p'):
    folder = root / 'refcoco'
    folder.mkdir(parents=True)
    images = [{'id': i, 'width': 40, 'height': 20, 'file_name': 'unused'} for i in range(3)]
    annotations = [{'id': 10 * i + k, 'image_id': i, 'bbox': [20 * k, 2, 10 + i, 12]}
                   for i in range(3) for k in range(2)]
    for image in images:
        save(folder / 'train2014', f"COCO_train2014_{image['id']:012d}.jpg", 'blue', (40, 20))
    if refs is None:
        refs = [{'ref_id': i, 'ann_id': 10 * i + 1, 'image_id': i, 'category_id': 1, 'split': split, 'sent_ids': [i],
                 'file_name': 'ignored.jpg', 'sentences': [{'sent_id': i, 'sent': f'the thing {i}', 'tokens': []}]}
                for i, split in enumerate(['val', 'val', 'train'])]
    (folder / 'instances.json').write_text(json.dumps({'images': images, 'annotations': annotations, 'categories': []}))
    (folder / name).write_bytes(refs if isinstance(refs, bytes) else pickle.dumps(refs, protocol=2))
    return folder


def write_text(root, n=6):
    folder = root / 'text'
    folder.mkdir(parents=True)
    rows = [{'query': f' what is {i} ', 'choices': ['red', 'blue green', 'no'], 'gold': i % 3,
             'blind_answers': ['red', 'no']} for i in range(n)]
    (folder / 'copa.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    (folder / 'boolq.jsonl').write_text(json.dumps({'query': 'is it', 'choices': ['no', 'yes'], 'gold': 1}) + '\n')
    return folder


@pytest.fixture(scope='module')
def eval_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp('eval')
    for write in (write_vqav2, write_pope, write_textvqa, write_refcoco, write_text):
        write(root)
    return str(root)


class Oracle:
    """Answers from the gold of a task: what a perfect model would do, to test everything around it."""

    def __init__(self, tokenizer, tasks, wrong=(), written=None):
        self.tokenizer, self.calls, self.encoded = tokenizer, [], 0
        self.encoder = SimpleNamespace(n_token=3, image_size=28)
        self.decoder = SimpleNamespace(config=SimpleNamespace(seq_len=2048))
        self.gold, self.best = {}, {}
        for task in tasks:
            for e in task.examples:
                text = tuple(tokenizer.encode(e.prompt))
                if e.choices is None:
                    self.gold[text] = written if e.id in wrong else e.answers[0]
                else:
                    self.best[text] = (e, task)

    def question(self, ids):
        special = (self.tokenizer.image_id, self.tokenizer.sep_id)
        return tuple(i for i in ids if i not in special)

    def generate(self, prompts, images=None, image_index=None, *, max_new_tokens, stop_ids):
        self.calls.append((prompts, images, image_index))
        self.encoded += 0 if images is None else len(images)
        assert stop_ids == (self.tokenizer.sep_id, self.tokenizer.eot_id)
        return [self.tokenizer.encode(self.gold[self.question(p)])[:max_new_tokens] for p in prompts]

    def row_nll(self, tokens, targets, images=None, image_index=None):
        self.calls.append((tokens, targets, images, image_index))
        nll = []
        for row, target in zip(tokens.tolist(), targets.tolist()):
            first = next(i for i, t in enumerate(target) if t != -100)
            kept = [t for t in target if t != -100]
            e, task = self.best[self.question(row[:first + 1])]
            gold = e.choices[e.answers[0]]
            ids = self.tokenizer.encode(gold if task.chat else ' ' + gold)
            nll.append(0.0 if kept == ids[:len(kept)] else 1.0 * len(kept))
        return torch.tensor(nll), (targets != -100).sum(1)


def options(eval_dir, **changes):
    opt = default_options(eval_dir=eval_dir, **changes)
    opt.device, opt.dtype, opt.resize, opt.system_prompt = 'cpu', 'float32', opt.resize or 'letterbox', ''
    return opt


def tiny_model(tokenizer, vision=True):
    torch.manual_seed(3)
    decoder = Decoder(ModelConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=tokenizer.vocab_size, seq_len=64))
    decoder.init_weights()
    encoder = PatchProjection(28) if vision else None
    projector = Projector(encoder.width, 32) if vision else None
    return VLM(decoder, encoder, projector, image_id=tokenizer.image_id).eval()


@pytest.fixture(scope='module')
def checkpoint(tokenizer, tmp_path_factory):
    """(vision, text-only) checkpoint folders as the training stages write them."""
    folders = []
    for vision in (True, False):
        out = tmp_path_factory.mktemp('run')
        meta = {'config': {'save_encoder': True, 'resize': 'naive', 'system_prompt': 'be short'}, 'step': 5}
        save_checkpoint(str(out), ['ckpt_100'], tiny_model(tokenizer, vision), None, tokenizer, meta)
        folders.append(str(out / 'ckpt_100'))
    return folders


def script(*args):
    """Run `python evaluate.py ARGS` in this process; returns what sys.exit was given, None if it ended normally."""
    before, sys.argv = sys.argv, ['evaluate.py', *args]
    try:
        runpy.run_path(str(ROOT / 'evaluate.py'), run_name='__main__')
    except SystemExit as e:
        return e.code
    finally:
        sys.argv = before


# --- readers and scores, with the oracle --------------------------------------------------------------------------

def test_a_perfect_model_scores_100_on_every_format(eval_dir, tokenizer):
    opt = options(eval_dir)
    tasks = find_tasks(opt)
    assert [t.name for t in tasks] == ['vqav2', 'pope', 'textvqa', 'textvqa_ocr', 'refcoco', 'boolq', 'copa']
    for task in tasks:
        result, records = evaluate_task(Oracle(tokenizer, [task]), tokenizer, task, opt)
        assert (result['score'], result['malformed'], result['n']) == (1.0, 0, len(task.examples)), task.name
        assert len(records) == result['n'] and all(r['score'] == 1 for r in records)


def test_prompts_are_the_harness_s(eval_dir):
    tasks = {t.name: t.examples for t in find_tasks(options(eval_dir))}
    suffix = '\nAnswer the question using a single word or phrase.'
    assert tasks['vqav2'][0].prompt == 'what colour is it 0?' + suffix
    assert tasks['pope'][0].prompt == 'Is there a adversarial dog 0?' + suffix
    assert tasks['textvqa'][1].prompt == 'which word 1?' + suffix
    assert tasks['textvqa_ocr'][1].prompt == 'which word 1?\nReference OCR token: word1, x' + suffix
    assert tasks['refcoco'][0].prompt == ('Please provide the bounding box coordinate of the region this sentence '
                                          'describes: "the thing 0"')
    assert tasks['copa'][0].prompt == 'what is 0' and tasks['boolq'][0].prompt == 'is it\nAnswer:'


def test_chat_rows_are_image_sep_question_sep(eval_dir, tokenizer):
    (task,) = find_tasks(options(eval_dir, tasks='vqav2'))
    oracle = Oracle(tokenizer, [task])
    evaluate_task(oracle, tokenizer, task, options(eval_dir))
    row = oracle.calls[0][0][0]
    question = tokenizer.encode(task.examples[0].prompt)
    assert row == [tokenizer.image_id] * 3 + [tokenizer.sep_id] + question + [tokenizer.sep_id]


@pytest.mark.parametrize('batch_size', [1, 2, 3, 16])
def test_each_image_is_encoded_once_and_reaches_its_own_questions(eval_dir, tokenizer, batch_size):
    (task,) = find_tasks(options(eval_dir, tasks='vqav2'))
    oracle = Oracle(tokenizer, [task])
    result, _ = evaluate_task(oracle, tokenizer, task, options(eval_dir, batch_size=batch_size))
    assert result['score'] == 1 and max(len(c[0]) for c in oracle.calls) <= batch_size
    assert oracle.encoded == (9 if batch_size == 1 else 5)               # 5 images with at most 2 questions each
    means = {tuple(tokenizer.encode(e.prompt)): torch.tensor(COLOURS[list(COLOURS)[(int(e.id) - 7000) // 2 % 3]])
             for e in task.examples}
    for prompts, images, index in oracle.calls:
        for prompt, i in zip(prompts, index.tolist()):
            near = images[i].float().mean((1, 2)) - means[oracle.question(prompt)]
            assert near.abs().max() < 8                                  # jpeg moves the colour a little


def test_batches_cover_everything_once():
    rng = Random(0)
    for _ in range(50):
        images = [rng.choice(['', 'a', 'b', 'c', 'd']) for _ in range(rng.randint(1, 30))]
        size = rng.randint(1, 8)
        batches = evaluate.make_batches(images, [rng.randint(1, 9) for _ in images], size)
        assert sorted(i for b in batches for i in b) == list(range(len(images)))
        assert all(0 < len(b) <= size for b in batches)
        assert all(len({bool(images[i]) for i in b}) == 1 for b in batches)


def test_question_types_and_baselines_are_reported(eval_dir, tokenizer):
    (task,) = find_tasks(options(eval_dir, tasks='vqav2'))
    result, records = scorers.summarise(task, [e.answers[0] if e.id != '7001' else 'no' for e in task.examples])
    types = result['types']
    assert {k: v['n'] for k, v in types.items()} == {'colour': 5, 'held out': 4, 'is it': 4}
    assert (types['colour']['score'], types['held out']['score'], types['is it']['score']) == (1, .75, .75)
    assert types['colour']['low'] < 1 and types['colour']['high'] == pytest.approx(1)
    # colours of the five images: red, blue, green, red, blue
    assert types['colour']['constant'] == pytest.approx(2 / 5) and types['colour']['chance'] == pytest.approx(1 / 3)
    assert types['colour']['attribute'] == pytest.approx((2 * 1 + 3 * .5) / 5)
    assert types['is it']['constant'] == 1 and result['constant_fitted_on'].startswith('these test questions')
    assert result['constant'] == pytest.approx((2 + 4) / 9) and records[1]['types'] == ['is it', 'held out']
    assert scorers.table({'vqav2': result}).count('\n') == 4


def test_blind_answers_of_choices(eval_dir):
    pope, copa = find_tasks(options(eval_dir, tasks='pope,copa'))
    assert scorers.summarise(pope, [0] * 12)[0]['attribute'] == .5
    assert scorers.summarise(copa, [0] * 6)[0]['attribute'] == pytest.approx(1 / 3)  # gold is there in 4 of 6


def test_train_annotations_fit_the_blind_constant(tmp_path):
    folder = write_vqav2(tmp_path)
    (folder / 'v2_mscoco_train2014_annotations.json').write_text(json.dumps({'annotations': [
        {'question_type': 'colour', 'answers': [{'answer': 'green'}] * 10}]}))
    (task,) = find_tasks(options(str(tmp_path)))
    result, _ = scorers.summarise(task, [''] * 9)
    assert result['constant_fitted_on'] == 'train answers' and result['constant_answers'] == {'colour': 'green'}
    assert result['types']['colour']['constant'] == pytest.approx(1 / 5)


def test_malformed_predictions_are_counted_and_wrong(eval_dir, tokenizer):
    for name, written in (('vqav2', ''), ('refcoco', 'left'), ('refcoco', '[0.1, 0.1, 0.9]')):
        (task,) = find_tasks(options(eval_dir, tasks=name))
        bad = task.examples[0].id
        result, records = evaluate_task(Oracle(tokenizer, [task], wrong=[bad], written=written), tokenizer, task,
                                        options(eval_dir))
        n = result['n']
        assert result['malformed'] == 1 and result['score'] == pytest.approx((n - 1) / n)
        assert [r['id'] for r in records if r['malformed']] == [bad] and records[0]['prediction'] == written


def test_nan_is_malformed_not_a_choice(eval_dir, tokenizer):
    (task,) = find_tasks(options(eval_dir, tasks='copa'))
    oracle = Oracle(tokenizer, [task])
    oracle.row_nll = lambda tokens, *_: (torch.full((len(tokens),), float('nan')), None)
    result, records = evaluate_task(oracle, tokenizer, task, options(eval_dir))
    assert result['malformed'] == result['n'] and result['score'] == 0 and records[0]['prediction'] is None


def test_answers_that_never_stop_are_counted(eval_dir, tokenizer):
    (task,) = find_tasks(options(eval_dir, tasks='textvqa'))
    result, _ = evaluate_task(Oracle(tokenizer, [task]), tokenizer, task, options(eval_dir, max_new_tokens=2))
    assert result['reached_max_new_tokens'] == result['n'] and result['score'] == 0


def test_subset_is_the_harness_s_shuffle(eval_dir):
    order = list(range(9))
    Random(21).shuffle(order)
    (task,) = find_tasks(options(eval_dir, tasks='vqav2', n_example=4))
    assert [int(e.id) - 7000 for e in task.examples] == order[:4]
    (task,) = find_tasks(options(eval_dir, tasks='pope', n_example=2))
    assert sorted(e.types[0] for e in task.examples) == ['adversarial'] * 2 + ['popular'] * 2 + ['random'] * 2


# --- POPE and multiple choice -------------------------------------------------------------------------------------

def test_pope_is_the_mean_of_its_splits_and_looks_at_the_first_token(tmp_path, tokenizer):
    folder = write_pope(tmp_path)
    rows = (folder / 'coco_pope_random.json').read_text().splitlines()[:2]
    (folder / 'coco_pope_random.json').write_text('\n'.join(rows))
    (task,) = find_tasks(options(str(tmp_path)))
    by_split = {'random': [0, 0], 'popular': [1, 1, 0, 0], 'adversarial': [0, 0, 0, 0]}
    picks = {split: iter(v) for split, v in by_split.items()}
    result, _ = scorers.summarise(task, [next(picks[e.types[0]]) for e in task.examples])
    assert {s: v['score'] for s, v in result['types'].items()} == {'random': .5, 'popular': .5, 'adversarial': .5}
    assert result['score'] == .5 and result['yes_no']['yes_share'] == pytest.approx(8 / 10)
    ids = evaluate.choice_ids(task.examples[0], task, tokenizer)
    assert ids == [[tokenizer.encode('Yes')[0]], [tokenizer.encode('No')[0]]]


def test_choices_in_chat_end_at_the_first_token_that_differs(eval_dir, tokenizer):
    (task,) = find_tasks(options(eval_dir, tasks='pope', pope_words=('Zxa', 'Zxb')))
    a, b = evaluate.choice_ids(task.examples[0], task, tokenizer)
    assert a[:-1] == b[:-1] == tokenizer.encode('Zx') and a[-1] != b[-1]
    (task,) = find_tasks(options(eval_dir, tasks='pope', pope_words=('Z', 'Zx')))
    with pytest.raises(ValueError, match='pope.*start of another'):
        evaluate.choice_ids(task.examples[0], task, tokenizer)


def test_text_choices_are_tokenised_apart_with_a_space(eval_dir, tokenizer):
    (task,) = find_tasks(options(eval_dir, tasks='copa'))
    oracle = Oracle(tokenizer, [task])
    evaluate_task(oracle, tokenizer, task, options(eval_dir, batch_size=100))
    tokens, targets, images, _ = oracle.calls[0]
    expected = [tokenizer.encode(e.prompt) + tokenizer.encode(' ' + c) for e in task.examples for c in e.choices]
    seen = []
    for row, target in zip(tokens.tolist(), targets.tolist()):
        kept = [i for i, t in enumerate(target) if t != -100]
        seen.append(row[:kept[-1] + 1] + target[kept[-1]:kept[-1] + 1])
        assert [target[i] for i in kept] == seen[-1][kept[0] + 1:]       # targets are the tokens, shifted
    assert sorted(seen) == sorted(expected) and images is None


@pytest.mark.parametrize('norm, best', [('sum', 0), ('token', 1), ('char', 2)])
def test_choice_normalisations(tmp_path, tokenizer, norm, best):
    folder = tmp_path / 'text'
    folder.mkdir()
    choices = ['q', 'q' * 4, 'red' * 6]                                  # 2, 5 and more tokens; 1, 4 and 18 characters
    (folder / 't.jsonl').write_text(json.dumps({'query': 'x', 'choices': choices, 'gold': best}))
    (task,) = find_tasks(options(str(tmp_path)))
    n = [len(ids) for ids in evaluate.choice_ids(task.examples[0], task, tokenizer)]
    nats = dict(zip(n, (1.0, .1 * n[1] + .5, .4 * n[2])))              # lowest in sum, per token, per char
    assert min(nats.values()) == 1.0 and len(nats) == 3
    oracle = Oracle(tokenizer, [task])
    oracle.row_nll = lambda tokens, targets, *_: (
        torch.tensor([nats[int(k)] for k in (targets != -100).sum(1)]), None)
    (picked,), (values,) = evaluate.pick_choices(oracle, tokenizer, task, options(str(tmp_path), choice_norm=norm))
    sizes = {'sum': [1, 1, 1], 'token': n, 'char': [len(c) for c in choices]}[norm]
    assert values == pytest.approx([nats[k] / size for k, size in zip(n, sizes)])
    assert picked == values.index(min(values)) == best


def test_long_contexts_lose_their_left_end(tmp_path, tokenizer):
    folder = tmp_path / 'text'
    folder.mkdir()
    row = {'query': 'red blue ' * 50 + 'end', 'choices': ['no', 'yes'], 'gold': 0}
    (folder / 't.jsonl').write_text(json.dumps(row))
    (task,) = find_tasks(options(str(tmp_path)))
    oracle = Oracle(tokenizer, [task])
    oracle.decoder.config.seq_len = 20
    shapes = []
    oracle.row_nll = lambda tokens, targets, *_: (shapes.append(tokens) or torch.zeros(len(tokens)), None)
    evaluate.pick_choices(oracle, tokenizer, task, options(str(tmp_path)))
    assert shapes[0].shape[1] == 20
    assert tokenizer.decode(shapes[0][0].tolist()).startswith(('red', ' red', ' blue', 'blue', ' '))
    full = tokenizer.encode(task.examples[0].prompt)
    assert full[-5:] == shapes[0][0].tolist()[20 - len(tokenizer.encode(' no')) - 4:][:5]


# --- RefCOCO ------------------------------------------------------------------------------------------------------

def test_gold_boxes_in_both_frames(eval_dir):
    (task,) = find_tasks(options(eval_dir, tasks='refcoco'))
    assert task.examples[1].answers == ['[0.5, 0.1, 0.78, 0.7]']         # x, w over 40; y, h over 20; two decimals
    (task,) = find_tasks(options(eval_dir, tasks='refcoco', box_frame='letterbox'))
    assert task.examples[1].answers == ['[0.5, 0.3, 0.78, 0.6]']         # y = (2 + 10) / 40
    assert task.train == [((), ['[0.5, 0.3, 0.8, 0.6]'])]


def test_any_object_s_box_is_the_attribute_blind_guess(eval_dir):
    (task,) = find_tasks(options(eval_dir, tasks='refcoco'))
    result, _ = scorers.summarise(task, ['[0, 0, 1, 1]'] * 2)
    assert result['attribute'] == .5                                     # two objects an image, far apart


class Attack:
    def __reduce__(self):
        return os.mkdir, ('attacked',)


@pytest.mark.parametrize('content', [pickle.dumps([Attack()]), b'', b'not a pickle', pickle.dumps({'a': 1}),
                                     pickle.dumps([1]), pickle.dumps([{}])[:-3]])
def test_refs_never_run_code(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    write_refcoco(tmp_path, content)
    with pytest.raises(ValueError, match=r'refs\(unc\)\.p'):
        find_tasks(options(str(tmp_path)))
    assert not (tmp_path / 'attacked').exists()


def test_umd_refs_and_unknown_split(tmp_path):
    write_refcoco(tmp_path, name='refs(umd).p')
    assert len(find_tasks(options(str(tmp_path)))[0].examples) == 2
    with pytest.raises(ValueError, match=r"split 'testA'.*\['train', 'val'\]"):
        find_tasks(options(str(tmp_path), refcoco_split='testA'))


# --- broken files -------------------------------------------------------------------------------------------------

def edit(path, function):
    content = json.loads(path.read_text())
    function(content)
    path.write_text(json.dumps(content))


QUESTIONS, ANNOTATIONS = 'v2_OpenEnded_mscoco_val2014_questions.json', 'v2_mscoco_val2014_annotations.json'


@pytest.mark.parametrize('write, damage, message', [
    (write_vqav2, lambda f: next((f / 'val2014').iterdir()).unlink(), 'vqav2: 1 of 5 images missing, first COCO_val'),
    (write_vqav2, lambda f: (f / ANNOTATIONS).write_text('{"a'), 'annotations.json: not readable as JSON'),
    (write_vqav2, lambda f: (f / ANNOTATIONS).unlink(), 'No such file.*annotations.json'),
    (write_vqav2, lambda f: edit(f / ANNOTATIONS, lambda c: c['annotations'][2].pop('answers')),
     "annotations.json: entry 2 has no 'answers'"),
    (write_vqav2, lambda f: edit(f / ANNOTATIONS, lambda c: c['annotations'][2].update(answers=['red'] * 10)),
     'vqav2: not the official'),
    (write_vqav2, lambda f: edit(f / QUESTIONS, lambda c: c['questions'].pop()), 'question_id 7000, which'),
    (write_pope, lambda f: (f / 'coco_pope_random.json').write_text('{}\n'), "entry 0 has no 'question_id'"),
    (write_pope, lambda f: (f / 'coco_pope_random.json').write_text('x\n'), 'random.json:1: not valid JSON'),
    (write_textvqa, lambda f: edit(f / 'TextVQA_0.5.1_val.json', lambda c: c['data'][1]['answers'].pop()),
     'entry 1 has 9'),
    (write_textvqa, lambda f: (f / 'textvqa_val_v051_ocr.jsonl').write_text('{"text": "a"}\n'),
     '1 lines, expected one per'),
    (write_text, lambda f: (f / 'copa.jsonl').write_text(''), 'copa holds no question'),
    (write_vqav2, lambda f: [edit(f / QUESTIONS, lambda c: c.update(questions=[])),
                             edit(f / ANNOTATIONS, lambda c: c.update(annotations=[]))], 'vqav2 holds no question'),
    (write_text, lambda f: (f / 'copa.jsonl').write_text('{"query": "a", "choices": ["b", "c"], "gold": 2}'),
     'copa.jsonl: entry 0 has gold=2 for 2 choices')])
def test_broken_files_are_named_in_one_line(tmp_path, write, damage, message):
    damage(write(tmp_path))
    evaluate.folder_names.cache_clear()
    with pytest.raises((ValueError, OSError), match=message) as e:
        find_tasks(options(str(tmp_path)))
    assert '\n' not in str(e.value)


def test_unknown_task_empty_folder_and_unknown_option(tmp_path, eval_dir):
    with pytest.raises(ValueError, match='no gqa found; there is .*eval'):
        find_tasks(options(eval_dir, tasks='gqa'))
    with pytest.raises(ValueError, match='no benchmark found'):
        find_tasks(options(str(tmp_path)))
    with pytest.raises(ValueError, match='no such folder'):
        find_tasks(options(str(tmp_path / 'none')))
    with pytest.raises(ValueError, match='no option batchsize'):
        default_options(batchsize=2)


def test_a_new_benchmark_is_one_function_and_one_entry(tmp_path, tokenizer, monkeypatch):
    (tmp_path / 'gqa').mkdir()
    monkeypatch.setitem(evaluate.READERS, 'gqa', lambda folder, opt: [evaluate.Task(
        'gqa', 'gqa', [evaluate.Example('1', 'what is it?', ['red'])], lambda p, a: evaluate.gqa_match(p, a[0]))])
    (task,) = find_tasks(options(str(tmp_path)))
    assert evaluate_task(Oracle(tokenizer, [task]), tokenizer, task, options(str(tmp_path)))[0]['score'] == 1


# --- a real model -------------------------------------------------------------------------------------------------

def test_same_scores_at_any_batch_size(eval_dir, tokenizer):
    model, reference = tiny_model(tokenizer), {}
    for batch_size in (1, 3, 64):
        opt = options(eval_dir, batch_size=batch_size, max_new_tokens=4, tasks='vqav2,pope,refcoco,copa')
        for task in find_tasks(opt):
            result, records = evaluate_task(model, tokenizer, task, opt)
            nats = [r.pop('nats', None) for r in records]
            first = reference.setdefault(task.name, (result['score'], records, nats))
            assert (result['score'], records) == first[:2], f'{task.name} at batch {batch_size}'
            for ours, theirs in zip(nats, first[2]):
                assert ours is None or ours == pytest.approx(theirs, abs=1e-4)
    assert len({r['prediction'] for r in reference['vqav2'][1]}) > 1     # not one answer whatever the input


def test_run_writes_results_and_predictions(eval_dir, checkpoint, tmp_path, capsys):
    opt = default_options(ckpt=checkpoint[0], eval_dir=eval_dir, max_new_tokens=4, device='cpu', out_dir=str(tmp_path))
    evaluate.run(opt)
    content = json.loads((tmp_path / 'results.json').read_text())
    assert content['schema'] == 1 and content['meta']['step'] == 5 and 'rng' not in content['meta']
    assert content['config']['resize'] == 'naive' and content['config']['system_prompt'] == 'be short'
    assert content['config']['dtype'] == 'float32' and content['ckpt'] == checkpoint[0]
    assert list(content['tasks']) == ['vqav2', 'pope', 'textvqa', 'textvqa_ocr', 'refcoco', 'boolq', 'copa']
    for name, result in content['tasks'].items():
        assert {'score', 'n', 'low', 'high', 'chance', 'constant', 'malformed', 'variant', 'types'} <= set(result)
        assert 0 <= result['low'] <= result['score'] <= result['high'] <= 1
        lines = (tmp_path / 'predictions' / f'{name}.jsonl').read_text().splitlines()
        assert len(lines) == result['n']
        assert {'id', 'prompt', 'prediction', 'answers', 'score'} <= set(json.loads(lines[0]))
        assert sum(json.loads(line)['score'] for line in lines) / len(lines) == pytest.approx(result['score'])
    vision = content['stable']['vision']
    assert vision['missing'] == ['gqa'] and vision['tasks'] == ['pope', 'refcoco', 'textvqa', 'vqav2']
    expected = sum(content['tasks'][t]['score'] for t in vision['tasks']) - 1
    assert vision['score'] == pytest.approx(expected / 4)
    assert content['stable']['text, 9 tasks']['tasks'] == ['copa']
    assert content['stable']['text, 10 tasks']['tasks'] == ['boolq', 'copa']
    assert not list(tmp_path.glob('**/*.part'))
    printed = capsys.readouterr().out
    assert 'malformed' in printed and 'stable score, vision' in printed and 'over 4 of 5: pope, refcoco' in printed


def test_results_are_kept_across_tasks_and_out_of_retentions_way(eval_dir, checkpoint, tmp_path, capsys):
    step = tmp_path / 'run' / 'ckpt_step_5'
    shutil.copytree(checkpoint[1], step)
    (step.parent / 'ckpt_last').symlink_to('ckpt_step_5')
    out = step.parent / 'eval' / 'ckpt_step_5'
    args = f"--ckpt={step.parent / 'ckpt_last'}", f'--eval_dir={eval_dir}', '--device=cpu'
    for task in ('copa', 'boolq'):
        assert script(*args, f'--tasks={task}') is None
    tasks = lambda: list(json.loads((out / 'results.json').read_text())['tasks'])
    assert tasks() == ['copa', 'boolq'] and 'copa' in (out / 'table.txt').read_text()
    assert script(*args, '--tasks=copa', '--choice_norm=sum') is None
    assert tasks() == ['copa'] and 'made with another choice_norm and is replaced' in capsys.readouterr().out
    assert 'nothing to do' in script(*args, '--tasks=pope')
    assert not (out / 'results.part.json').exists() and tasks() == ['copa']


def test_an_evaluation_that_is_killed_leaves_no_results(eval_dir, checkpoint, tmp_path, monkeypatch):
    plain = evaluate.evaluate_task
    monkeypatch.setattr(evaluate, 'evaluate_task', lambda model, tokenizer, task, opt: (
        pytest.fail('killed') if task.name == 'copa' else plain(model, tokenizer, task, opt)))
    with pytest.raises(pytest.fail.Exception):
        evaluate.run(default_options(ckpt=checkpoint[1], eval_dir=eval_dir, device='cpu', out_dir=str(tmp_path),
                                     tasks='boolq,copa'))
    assert not (tmp_path / 'results.json').exists() and not (tmp_path / 'table.txt').exists()
    assert list(json.loads((tmp_path / 'results.part.json').read_text())['tasks']) == ['boolq']


def test_a_checkpoint_of_another_scale_is_told(eval_dir, checkpoint, tmp_path, capsys):
    shutil.copytree(checkpoint[1], tmp_path / 'ckpt')
    meta = json.loads((tmp_path / 'ckpt' / 'meta.json').read_text())
    meta['config']['scale'] = 'tiny'
    (tmp_path / 'ckpt' / 'meta.json').write_text(json.dumps(meta))
    script(f"--ckpt={tmp_path / 'ckpt'}", f'--eval_dir={eval_dir}', '--device=cpu', '--tasks=copa')
    assert "!!!" in (out := capsys.readouterr().out) and 'may need config/tiny.py' in out


def test_text_only_checkpoint_skips_vision_and_names_it(eval_dir, checkpoint, capsys):
    assert script(f'--ckpt={checkpoint[1]}', f'--eval_dir={eval_dir}', '--device=cpu', '--tasks=pope,copa') is None
    assert 'pope: skipped' in capsys.readouterr().out
    content = json.loads((Path(checkpoint[1]) / 'eval' / 'results.json').read_text())
    assert list(content['tasks']) == ['copa'] and 'vision' not in content['stable']


def test_one_photo_and_plain_text(checkpoint, tmp_path, capsys):
    photo = tmp_path / 'photo.webp'
    Image.radial_gradient('L').resize((90, 40)).save(photo)
    vision, text = (f'--ckpt={folder}' for folder in checkpoint)
    common_args = ('--device=cpu', '--max_new_tokens=5')
    printed = []
    asked = (vision, f'--image={photo}', '--prompt=what is it?')
    for args in (asked, asked, (vision, f'--image={photo}'), (vision, '--prompt=what is'), (text, '--prompt=what is'),
                 (text, '--prompt=what is', '--temperature=5', '--seed=1'),
                 (text, '--prompt=what is', '--temperature=5', '--seed=1'),
                 (text, '--prompt=what is', '--temperature=5', '--seed=2')):
        assert script(*args, *common_args) is None
        printed.append([line for line in capsys.readouterr().out.split('\n') if not line.startswith('config:')])
    assert printed[0] == printed[1] and printed[5] == printed[6] != printed[7]
    message = script(text, f'--image={photo}', '--prompt=x', *common_args)
    assert 'text-only checkpoint' in message and '\n' not in message
    message = script(vision, f'--image={tmp_path}/none.jpg', '--prompt=x', *common_args)
    assert 'none.jpg' in message and '\n' not in message


def test_user_mistakes_end_in_one_line(tmp_path, eval_dir, checkpoint):
    for args, words in (((), "ckpt=''"), ((f'--ckpt={tmp_path}/no',), 'no meta.json'),
                        (('--choice_norm=x',), 'choice_norm'),
                        (('--batch_size=0',), 'batch_size=0'), (('--n_thread=-3',), 'n_thread=-3'),
                        (('--pope_words=(1, 2)',), 'pope_words'),
                        (('--tasks=nope',), 'there is boolq, copa, pope, refcoco, textvqa'), (('--resize=big',), 'resize'),
                        (('--eval_dir=nowhere',), 'nowhere'), (("--pope_words=('Yes', 'yes')",), 'pope_words'),
                        (("--pope_words=('Yes', 'No', 'no')",), 'pope_words')):
        given = args if not args or args[0].startswith('--ckpt') else (f'--ckpt={checkpoint[0]}', *args)
        message = script(f'--eval_dir={eval_dir}', *given, '--device=cpu')
        assert isinstance(message, str) and words in message and '\n' not in message, args


def test_a_failed_write_leaves_the_old_results(tmp_path, monkeypatch):
    path = tmp_path / 'results.json'
    evaluate.write_whole(path, 'old')

    def fail(*_):
        raise OSError('disk full')
    monkeypatch.setattr(os, 'fsync', fail)
    with pytest.raises(OSError):
        evaluate.write_whole(path, 'new')
    assert path.read_text() == 'old'


def test_importing_has_no_side_effects_and_keeps_the_promised_names():
    for name in ('vqa_accuracy', 'box_iou', 'stable_score', 'parse_box'):
        assert getattr(evaluate, name) is getattr(scorers, name)
