"""benchmarks.py on small benchmarks in the official formats: what they become, what they score, how they break."""
import json
import os
import pickle
import sys
from pathlib import Path
from random import Random

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import benchmark_files
import benchmarks
import metrics
import scorers
from benchmarks import find_tasks
from errors import Field, UserError
from evaluate import default_options

COLOURS = {'red': (220, 30, 30), 'blue': (30, 30, 220), 'green': (30, 200, 30)}


# --- a folder of every kind ---------------------------------------------------------------------------------------

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
    rows = [{'query': f'what is {i}', 'choices': ['red', 'blue green', 'no'], 'gold': i % 3,
             'blind_answers': ['red', 'no']} for i in range(n)]
    (folder / 'copa.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    (folder / 'boolq.jsonl').write_text(json.dumps({'query': 'is it', 'choices': ['no', 'yes'], 'gold': 1}) + '\n')
    return folder


def write_captions(root):
    folder = root / 'captions'
    rows = []
    for name in ('a.png', 'b.jpg'):
        save(folder / 'images', name, 'red')
        rows += [{'image': name, 'caption': 'A red wall. Nothing else.'}, {'image': name, 'caption': 'a wall'}]
    (folder / 'captions.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    return folder


def write_eval_dir(root):
    for write in (write_vqav2, write_pope, write_textvqa, write_refcoco, write_captions, write_text):
        write(root)
    return str(root)


@pytest.fixture(scope='module')
def eval_dir(tmp_path_factory):
    return write_eval_dir(tmp_path_factory.mktemp('eval'))


def options(eval_dir, **changes):
    opt = default_options(eval_dir=eval_dir, **changes)
    opt.device, opt.dtype, opt.resize, opt.system_prompt = 'cpu', 'float32', opt.resize or 'letterbox', ''
    return opt


# --- questions and what they score --------------------------------------------------------------------------------

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


def test_question_types_and_baselines_are_reported(eval_dir):
    (task,) = find_tasks(options(eval_dir, tasks='vqav2'))
    result, records = scorers.summarise(task, [e.answers[0] if e.id != '7001' else 'no' for e in task.examples])
    types = result['types']
    assert {k: v['n'] for k, v in types.items()} == {'colour': 5, 'held out': 4, 'is it': 4}
    assert (types['colour']['score'], types['held out']['score'], types['is it']['score']) == (1, .75, .75)
    assert types['colour']['low'] < 1 and types['colour']['high'] == pytest.approx(1)
    # colours of the five images: red, blue, green, red, blue
    assert types['colour']['constant'] == pytest.approx(2 / 5) and types['colour']['chance'] == pytest.approx(1 / 3)
    assert types['colour']['attribute'] == pytest.approx((2 * 1 + 3 * .5) / 5)
    assert types['is it']['constant'] == 1
    assert result['constant'] == pytest.approx((2 + 4) / 9) and records[1]['types'] == ['is it', 'held out']
    assert scorers.table({'vqav2': result}).count('\n') == 4


def test_blind_answers_of_choices(eval_dir):
    pope, copa = find_tasks(options(eval_dir, tasks='pope,copa'))
    assert scorers.summarise(pope, [0] * 12)[0]['attribute'] == .5
    assert scorers.summarise(copa, [0] * 6)[0]['attribute'] == pytest.approx(1 / 3)  # gold is there in 4 of 6


def test_subset_is_the_harness_s_shuffle(eval_dir):
    order = list(range(9))
    Random(21).shuffle(order)
    (task,) = find_tasks(options(eval_dir, tasks='vqav2', n_example=4))
    assert [int(e.id) - 7000 for e in task.examples] == order[:4]
    (task,) = find_tasks(options(eval_dir, tasks='pope', n_example=2))
    assert sorted(e.types[0] for e in task.examples) == ['adversarial'] * 2 + ['popular'] * 2 + ['random'] * 2


def test_pope_is_the_mean_of_its_splits(tmp_path):
    folder = write_pope(tmp_path)
    rows = (folder / 'coco_pope_random.json').read_text().splitlines()[:2]
    (folder / 'coco_pope_random.json').write_text('\n'.join(rows))
    (task,) = find_tasks(options(str(tmp_path)))
    by_split = {'random': [0, 0], 'popular': [1, 1, 0, 0], 'adversarial': [0, 0, 0, 0]}
    picks = {split: iter(v) for split, v in by_split.items()}
    result, _ = scorers.summarise(task, [next(picks[e.types[0]]) for e in task.examples])
    assert {s: v['score'] for s, v in result['types'].items()} == {'random': .5, 'popular': .5, 'adversarial': .5}
    assert result['score'] == .5 and result['yes_no']['yes_share'] == pytest.approx(8 / 10)


# --- RefCOCO ------------------------------------------------------------------------------------------------------

def test_gold_boxes_in_both_frames(eval_dir):
    (task,) = find_tasks(options(eval_dir, tasks='refcoco'))
    assert task.examples[1].answers == ['[0.5, 0.1, 0.78, 0.7]']         # x, w over 40; y, h over 20; two decimals
    (task,) = find_tasks(options(eval_dir, tasks='refcoco', box_frame='letterbox'))
    assert task.examples[1].answers == ['[0.5, 0.3, 0.78, 0.6]']         # y = (2 + 10) / 40


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
    with pytest.raises(UserError, match=r'refs\(unc\)\.p'):
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
    (write_vqav2, lambda f: (f / ANNOTATIONS).unlink(), r'annotations.json: not readable as JSON \(No such file'),
    (write_vqav2, lambda f: edit(f / ANNOTATIONS, lambda c: c['annotations'][2].pop('answers')),
     "annotations.json: entry 2: 'answers' is missing"),
    (write_vqav2, lambda f: edit(f / ANNOTATIONS, lambda c: c['annotations'][2].update(answers=['red'] * 10)),
     "annotations.json: entry 2: 'answers': 0 is 'red', expected dict"),
    (write_vqav2, lambda f: edit(f / QUESTIONS, lambda c: c['questions'].pop()), 'question_id 7000, which'),
    (write_pope, lambda f: (f / 'coco_pope_random.json').write_text('{}\n'), "entry 0: 'question_id' is missing"),
    (write_pope, lambda f: (f / 'coco_pope_random.json').write_text('x\n'), 'random.json:1: not readable as JSON'),
    (write_textvqa, lambda f: edit(f / 'TextVQA_0.5.1_val.json', lambda c: c['data'][1]['answers'].pop()),
     "entry 1: 'answers' is 9 long, expected from 10 to 10"),
    (write_textvqa, lambda f: (f / 'textvqa_val_v051_ocr.jsonl').write_text('{"text": "a"}\n'),
     '1 lines, expected one per'),
    (write_text, lambda f: (f / 'copa.jsonl').write_text(''), 'copa holds no question'),
    (write_vqav2, lambda f: [edit(f / QUESTIONS, lambda c: c.update(questions=[])),
                             edit(f / ANNOTATIONS, lambda c: c.update(annotations=[]))], 'vqav2 holds no question'),
    (write_text, lambda f: (f / 'copa.jsonl').write_text('{"query": "a", "choices": ["b", "c"], "gold": 2}'),
     'copa.jsonl: entry 0 has gold=2 for 2 choices')])
def test_broken_files_are_named_in_one_line(tmp_path, write, damage, message):
    damage(write(tmp_path))
    with pytest.raises(UserError, match=message) as e:
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


def test_a_new_benchmark_is_one_function_and_one_line(tmp_path, monkeypatch):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'gqa.json').write_text(json.dumps({'rows': [{'question': 'what is it?', 'answer': 'red'}]}))

    def read_gqa(path, name, opt):
        rows = benchmark_files.read_table(path, 'rows', {'question': Field(str), 'answer': Field(str)})
        return scorers.Task(name, 'gqa', [scorers.Example(str(i), row['question'], [row['answer']])
                                          for i, row in enumerate(rows)], lambda p, a: metrics.gqa_match(p, a[0]))
    monkeypatch.setitem(benchmarks.READERS, 'gqa', ('*/gqa.json', '{folder}', read_gqa))
    (task,) = find_tasks(options(str(tmp_path)))
    assert task.name == 'mine' and scorers.summarise(task, ['Red.'])[0]['score'] == 1


# --- which tasks are there ----------------------------------------------------------------------------------------

def test_any_name_that_is_there_can_be_asked_alone(eval_dir):
    names = [task.name for task in find_tasks(options(eval_dir))]
    assert names == ['vqav2', 'pope', 'textvqa', 'textvqa_ocr', 'refcoco', 'captions', 'boolq', 'copa']
    for name in names:
        assert [task.name for task in find_tasks(options(eval_dir, tasks=name))] == [name]
    both = find_tasks(options(eval_dir, tasks=' copa, textvqa_ocr,'))
    assert [task.name for task in both] == ['textvqa_ocr', 'copa']


def test_a_name_need_not_begin_with_its_folder_s_and_folders_may_share_a_beginning(tmp_path):
    write_pope(tmp_path).rename(tmp_path / 'objects')
    write_textvqa(tmp_path).rename(tmp_path / 'objects_2')
    tasks = find_tasks(options(str(tmp_path), tasks='objects_2_ocr'))
    assert [(task.name, task.kind) for task in tasks] == [('objects_2_ocr', 'textvqa')]
    assert [task.name for task in find_tasks(options(str(tmp_path), tasks='objects'))] == ['objects']


def test_files_of_tasks_that_are_not_asked_are_not_read(tmp_path):
    write_eval_dir(tmp_path)
    for path in tmp_path.rglob('*.json*'):
        if path.name != 'copa.jsonl':
            path.write_text('broken')
    (task,) = find_tasks(options(str(tmp_path), tasks='copa'))
    assert len(task.examples) == 6
    with pytest.raises(UserError, match='no nope found; there is boolq, captions, copa, pope, refcoco, textvqa, text'):
        find_tasks(options(str(tmp_path), tasks='copa,nope'))


def test_two_benchmarks_of_one_name_are_told(tmp_path):
    write_pope(tmp_path)
    (write_text(tmp_path) / 'pope.jsonl').write_text('{"query": "a", "choices": ["b", "c"], "gold": 1}')
    with pytest.raises(UserError, match=r'coco_pope_adversarial.json and .*pope.jsonl are both the task pope'):
        find_tasks(options(str(tmp_path)))


# --- tables and their optional fields -----------------------------------------------------------------------------

@pytest.mark.parametrize('content, key, message', [
    ('[1]', 'rows', "expected an object with a list under 'rows'"), ('{"rows": 3}', 'rows', 'a list under'),
    ('{"rows": [1]}', 'rows', 'entry 0 is 1, expected dict'),
    ('{"rows": [{"a": 1, "b": 2}, {"a": 1}]}', 'rows', "entry 1: 'b' is missing, expected int"),
    ('{"a": 1, "b": 2}\n\n{"a": 1', None, r't\.json:3: not readable as JSON'), ('[' * 100_000, 'rows', 'as JSON'),
    (b'\xff', 'rows', 'as JSON'), (b'{"a": "\xff"}', None, 'as JSON')])
def test_a_table_names_its_file_and_the_entry(tmp_path, content, key, message):
    path = tmp_path / 't.json'
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as e:
        benchmark_files.read_table(str(path), key, {'a': Field(int), 'b': Field(int)})
    assert str(path) in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('write, change, message', [
    (write_vqav2, lambda f: edit(f / QUESTIONS, lambda c: c['questions'].append(c['questions'][0])),
     "entry 9 has the question_id"),
    (write_refcoco, lambda f: edit(f / 'instances.json', lambda c: c['annotations'][0].update(bbox=[1, 2, 3])),
     "'bbox' is 3 long, expected from 4 to 4"),
    (write_refcoco, lambda f: edit(f / 'instances.json', lambda c: c['annotations'][0]['bbox'].__setitem__(2, float('nan'))),
     "entry 0: 'bbox': 2 is nan"),
    (write_refcoco, lambda f: edit(f / 'instances.json', lambda c: c['images'][0].update(width=0)), "'width' is 0"),
    (write_text, lambda f: (f / 'copa.jsonl').write_text('{"query": "a", "choices": ["b", 2], "gold": 1}'),
     "'choices': 1 is 2, expected str"),
    (write_text, lambda f: (f / 'copa.jsonl').write_text('{"query": "a", "choices": ["b", "c"], "gold": true}'),
     "'gold' is True, expected int"),
    (write_text, lambda f: ((f / 'copa.jsonl').unlink(), os.mkfifo(f / 'copa.jsonl')), 'copa.jsonl: not a file')])
def test_a_row_outside_its_schema_is_named(tmp_path, write, change, message):
    change(write(tmp_path))
    with pytest.raises(UserError) as e:
        find_tasks(options(str(tmp_path)))
    assert message in str(e.value) and '\n' not in str(e.value), e.value


def test_labels_and_guesses_are_optional_in_every_row():
    def of(row, *names):
        e = benchmark_files.example_of(row, 1, '', [], choices=names or None)
        return e.types, e.guesses
    assert of({}) == ((), None)
    assert of({'question_type': 'colour', 'blind_answers': ['x']}) == (('colour',), ['x'])
    assert of({'question_type': ['a', 'b'], 'blind_answers': ['no']}, 'yes', 'no') == (('a', 'b'), [1])


def test_written_answers_are_texts(tmp_path):
    folder = write_textvqa(tmp_path)
    edit(folder / 'TextVQA_0.5.1_val.json', lambda c: c['data'][2].update(answers=[7] * 10))
    with pytest.raises(UserError, match="entry 2: 'answers': 0 is 7, expected str"):
        find_tasks(options(str(tmp_path)))


# --- captions -----------------------------------------------------------------------------------------------------

def test_an_image_has_all_its_captions_and_the_best_counts(eval_dir):
    (task,) = find_tasks(options(eval_dir, tasks='captions'))
    assert [e.answers for e in task.examples] == [['A red wall. Nothing else.', 'a wall']] * 2
    assert [os.path.basename(e.image) for e in task.examples] == ['a.png', 'b.jpg']
    assert task.layout == 'caption' and not task.boxes
    result, records = scorers.summarise(task, ['a red  wall .', 'A WALL'])
    assert [r['score'] for r in records] == [pytest.approx(2 / 3), 1] and result['exact_match'] == .5
    result, records = scorers.summarise(task, ['', '. .'])
    assert result['malformed'] == 1 and result['score'] == 0


def test_random_captions_earn_what_they_share_with_the_right_one(tmp_path):
    folder = tmp_path / 'captions'
    texts = ['red. blue.', 'red. green.', 'white. grey.']
    for i, text in enumerate(texts):
        save(folder, f'{i}.png', 'red')
    (folder / 'captions.jsonl').write_text('\n'.join(json.dumps({'image': f'{i}.png', 'caption': text})
                                                     for i, text in enumerate(texts)))
    (task,) = find_tasks(options(str(tmp_path)))
    result, _ = scorers.summarise(task, texts)
    assert result['score'] == result['exact_match'] == 1 and result['attribute'] is None
    assert result['chance'] == pytest.approx((1 + .5 + 1 + .5 + 1) / 9)       # every pair of a guess and an image
    assert result['constant'] == pytest.approx((1 + .5) / 3)


# --- the other vision benchmarks ----------------------------------------------------------------------------------

SUFFIX = '\nAnswer the question using a single word or phrase.'


def write_gqa(root):
    folder = root / 'gqa'
    rows = {f'20{i}': {'question': f'what is {i}?', 'imageId': f'n{i // 2}', 'answer': ['red', 'yes', 'left'][i % 3],
                       'fullAnswer': 'unused', 'isBalanced': i != 4, 'groups': {'global': None, 'local': 'x'},
                       'types': {'structural': ['query', 'verify', 'choose'][i % 3], 'semantic': 'attr'},
                       'semantic': [], 'entailed': [], 'equivalent': [f'20{i}']} for i in range(6)}
    for i in range(3):
        save(folder / 'images', f'n{i}.jpg', 'red')
    (folder / 'testdev_balanced_questions.json').write_text(json.dumps(rows))
    return folder


def write_vizwiz(root):
    folder = root / 'vizwiz'
    rows = [{'image': f'VizWiz_val_0000000{i}.jpg', 'question': f'what is it {i}?', 'answer_type': 'other',
             'answerable': int(i != 1), 'answers': [{'answer': answer, 'answer_confidence': 'yes'}
                                                    for answer in ([f'The can {i}'] * 4 + ['can'] * 6
                                                                   if i != 1 else ['unanswerable'] * 10)]}
            for i in range(3)]
    for row in rows:
        save(folder / 'val', row['image'], 'blue')
    (folder / 'val.json').write_text(json.dumps(rows))
    return folder


def write_ocid_ref(root, **change):
    folder, rows = root / 'ocid_ref', {}
    for i, take in enumerate((0, 9, 10, 16, 17, 20)):
        scene = f'ARID20/table/top/seq{i // 2:02d}/rgb/result_2018-08-2{i // 2}.png'
        save(folder / 'OCID-dataset' / os.path.dirname(scene), os.path.basename(scene), 'green', (64, 48))
        rows[str(900 + i)] = {'seq_id': 1, 'scene_id': i, 'take_id': take, 'scene_path': scene, 'sub_dataset': 'ARID20',
                              'class': 'apple', 'sentence': f'The apple {i}.', 'tokens': [], 'sentence_type': 'x',
                              'bbox': f'[{64 * i}, 48, {64 * i + 64}, 96]', **change}
    (folder / 'val_expressions.json').write_text(json.dumps(rows))
    return folder


def write_vsr(root):
    folder = root / 'vsr'
    rows = [{'image': f'00000000000{i}.jpg', 'image_link': 'x', 'caption': f'The cat is under table {i}.',
             'label': i % 2, 'relation': 'under', 'subj': 'cat', 'obj': 'table', 'annotator_id': 1} for i in range(3)]
    for row in rows:
        save(folder / 'val2017', row['image'], 'red')
    (folder / 'test.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return folder


def write_tallyqa(root):
    folder = root / 'tallyqa'
    rows = [{'image': f'VG_100K/{i}.jpg', 'image_id': i, 'question_id': 50 + i, 'answer': i, 'issimple': i % 2 == 0,
             'question': f'How many dogs {i}?', 'data_source': 'imported_genome'} for i in range(4)]
    for row in rows:
        save(folder / 'VG_100K', os.path.basename(row['image']), 'red')
    (folder / 'test.json').write_text(json.dumps(rows))
    return folder


def write_ai2d(root):
    folder = root / 'ai2d'
    (folder / 'questions').mkdir(parents=True)
    for i in (10, 2):
        save(folder / 'images', f'{i}.png', 'blue')
        questions = {f'What is {k} in {i}?': {'abcLabel': False, 'answerTexts': ['root', 'leaf', 'stem', 'soil'],
                                              'correctAnswer': k, 'questionId': f'{i}.png-{k}'} for k in range(2)}
        content = {'imageName': f'{i}.png', 'questions': questions}
        (folder / 'questions' / f'{i}.png.json').write_text(json.dumps(content))
    return folder


VISION = {'gqa': write_gqa, 'vizwiz': write_vizwiz, 'ocid_ref': write_ocid_ref, 'vsr': write_vsr,
          'tallyqa': write_tallyqa, 'ai2d': write_ai2d}


@pytest.fixture(scope='module')
def vision_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp('vision')
    for write in VISION.values():
        write(root)
    return str(root)


def one(eval_dir, name, **changes):
    (task,) = find_tasks(options(eval_dir, tasks=name, **changes))
    return task


def test_gqa(vision_dir):
    task = one(vision_dir, 'gqa')
    assert [e.id for e in task.examples] == ['200', '201', '202', '203', '205']          # 204 is not balanced
    assert task.examples[0].prompt == 'what is 0?' + SUFFIX and task.examples[0].image.endswith('images/n0.jpg')
    assert [e.types for e in task.examples] == [('open',), ('binary',), ('binary',), ('open',), ('binary',)]
    result, _ = scorers.summarise(task, ['Red.', 'Yes!', 'le-ft', '', 'the left'])
    assert result['score'] == 3 / 5 and result['malformed'] == result['empty'] == 1 and 'vlm-eval' in result['variant']


def test_vizwiz(vision_dir):
    task = one(vision_dir, 'vizwiz')
    assert task.examples[1].prompt == ("what is it 1?\nWhen the provided information is insufficient, respond with "
                                       "'Unanswerable'." + SUFFIX)
    assert [e.types for e in task.examples] == [('answerable',), ('unanswerable',), ('answerable',)]
    # answers are compared as they are: 'The can 0' is never said by a prediction that lost its article
    result, _ = scorers.summarise(task, ['The can 0', 'Unanswerable.', 'a can'])
    assert [result['types'][t]['score'] for t in ('answerable', 'unanswerable')] == [.5, 1]
    assert result['variant'] == 'vizwiz' and result['accuracy_official'] == pytest.approx((1 + 0 + 1) / 3)
    assert 'vizwiz' not in str(scorers.stable_scores({'vizwiz': result, 'gqa': result}))


def test_ocid_ref_s_boxes_are_corners_and_right_from_a_quarter(vision_dir):
    task = one(vision_dir, 'ocid_ref')
    assert task.examples[3].answers == ['[0.3, 0.1, 0.4, 0.2]'] and task.boxes     # 192, 48, 256, 96 of 640 x 480
    assert [e.types for e in task.examples] == [('minimum',)] * 2 + [('medium',)] * 2 + [('maximum',)] * 2
    assert task.examples[3].image.endswith('OCID-dataset/ARID20/table/top/seq01/rgb/result_2018-08-21.png')
    assert task.examples[0].prompt == options('').box_prompt.replace('{sent}', 'The apple 0.')
    half = '[0.3, 0.1, 0.4, 0.14]'                                                       # IoU 0.4
    assert task.score(half, task.examples[3].answers) == 1 and '0.25' in task.variant
    strict = one(vision_dir, 'ocid_ref', ocid_iou=.5)
    assert strict.score(half, task.examples[3].answers) == 0 and '0.5' in strict.variant
    result, _ = scorers.summarise(task, ['[0.0, 0.1, 0.1, 0.2]', 'here', '', '[0, 0, 1, 2]', half, half])
    assert result['malformed'] == 3 and result['empty'] == 1 and result['score'] == 1 / 6 and result['attribute'] == .5
    boxed = one(vision_dir, 'ocid_ref', box_frame='letterbox')
    assert boxed.examples[3].answers == ['[0.3, 0.2, 0.4, 0.28]'] and 'letterbox' in boxed.variant
    assert [e.types for e in one(vision_dir, 'ocid_ref', n_example=1).examples].count(('medium',)) == 1


@pytest.mark.parametrize('change, message', [
    ({'bbox': '[400, 48, 64, 96]'}, 'entry 0 has bbox [400, 48, 64, 96], expected x1 < x2'),      # x, y, width, height
    ({'bbox': '[1, 2, 3]'}, 'entry 0: not readable as a box'), ({'bbox': '[NaN, 1, 2, 3]'}, 'entry 0 has bbox'),
    ({'bbox': '["a", 1, 2, 3]'}, 'not readable as a box'), ({'take_id': 21}, "'take_id' is 21"),
    ({'scene_path': '../../etc/passwd.png'}, 'images missing'), ({'scene_path': '/etc/x.png'}, 'images missing')])
def test_a_broken_row_of_ocid_ref_is_named(tmp_path, change, message):
    write_ocid_ref(tmp_path, **change)
    (tmp_path / 'etc').mkdir()
    save(tmp_path / 'etc', 'passwd.png', 'red')
    with pytest.raises(UserError) as e:
        find_tasks(options(str(tmp_path)))
    assert message in str(e.value) and '\n' not in str(e.value), e.value


def test_vsr_tallyqa_and_ai2d(vision_dir):
    task = one(vision_dir, 'vsr')
    assert task.examples[1].prompt == ('Based on the image, is this statement "True" or "False"? The cat is under '
                                       'table 1.\nRespond with "True" or "False" directly.')
    assert task.examples[1].choices == ['True', 'False'] and [e.answers for e in task.examples] == [[1], [0], [1]]
    task = one(vision_dir, 'tallyqa')
    lines = task.examples[3].prompt.split('\n')
    assert lines[0] == 'How many dogs 3?' and lines[1] == 'A. 0' and lines[16] == 'P. 15' and len(lines) == 18
    assert lines[17] == "Answer with the option's letter from the given choices directly."
    assert task.examples[3].choices[3] == 'D' and task.examples[3].answers == [3] and task.by_label
    assert task.examples[3].image.endswith('tallyqa/VG_100K/3.jpg') and task.examples[3].types == ('complex',)
    task = one(vision_dir, 'ai2d')
    assert [e.id for e in task.examples] == ['10.png-0', '10.png-1', '2.png-0', '2.png-1']        # sorted by file
    assert task.examples[1].prompt.startswith('What is 1 in 10?\nA. root\nB. leaf\nC. stem\nD. soil\nAnswer with')
    assert task.examples[1].choices == list('ABCD') and task.examples[1].image.endswith('images/10.png')


def test_refcoco_s_sisters_are_found_by_their_folder(tmp_path):
    write_refcoco(tmp_path).rename(tmp_path / 'refcoco+')
    write_refcoco(tmp_path, name='refs(umd).p').rename(tmp_path / 'refcocog')
    write_refcoco(tmp_path)
    tasks = find_tasks(options(str(tmp_path)))
    assert [task.name for task in tasks] == ['refcoco', 'refcoco+', 'refcocog']
    result, _ = scorers.summarise(tasks[0], [tasks[0].examples[0].answers[0], 'no box'])
    assert result['score'] == .5 and result['variant'].startswith('val, IoU>=0.5, original')
    results = {task.name: result for task in tasks}
    assert scorers.stable_scores(results)['vision']['tasks'] == ['refcoco']
    assert 'vision' not in scorers.stable_scores({'refcoco': result | {'split': 'testA'}})


def test_pope_by_its_text(eval_dir):
    task = one(eval_dir, 'pope', pope_by='text')
    assert task.examples[0].choices is None and task.variant == "text, LLaVA's rule"
    answers = ['No, it is not.' if e.answers == ['no'] else 'Certainly.' for e in task.examples]
    result, _ = scorers.summarise(task, answers)
    assert result['score'] == result['yes_no']['f1'] == 1
    result, _ = scorers.summarise(task, [''] * 6 + answers[6:])                           # an empty answer is no 'yes'
    assert result['score'] == .5 and result['empty'] == result['malformed'] == 6


# --- groups of tasks ----------------------------------------------------------------------------------------------

def test_groups_of_tasks_say_what_is_not_there(tmp_path, capsys):
    write_eval_dir(tmp_path)
    for write in VISION.values():
        write(tmp_path)
    (tmp_path / 'text' / 'boolq.jsonl').rename(tmp_path / 'text' / 'sat_en.jsonl')
    write_refcoco(tmp_path / 'more')
    (tmp_path / 'more' / 'refcoco').rename(tmp_path / 'refcoco+')

    def names(tasks):
        return [task.name for task in find_tasks(options(str(tmp_path), tasks=tasks))]
    paper = ['vqav2', 'pope', 'textvqa', 'gqa', 'refcoco', 'ocid_ref', 'vizwiz', 'copa', 'sat_en']
    assert names('paper') == paper
    said = capsys.readouterr().out
    assert 'not found: boolq needs text/boolq.jsonl, the rows of aps/super_glue boolq validation\n' in said and 'not found: piqa' in said
    assert said.count('not found') == 8 and 'agieval' not in said
    vision = ['vqav2', 'pope', 'textvqa', 'textvqa_ocr', 'gqa', 'refcoco', 'refcoco+', 'ocid_ref', 'vizwiz', 'captions']
    assert names('vision') == vision
    assert capsys.readouterr().out == 'not found: refcocog needs refcocog/refs(umd).p, instances.json, train2014/\n'
    assert names('text') == ['copa', 'sat_en'] and names('text, vsr') == ['vsr', 'copa', 'sat_en']
    capsys.readouterr()
    assert sorted(names('')) == sorted(vision + ['copa', 'sat_en']) and capsys.readouterr().out == ''
    with pytest.raises(UserError, match='no ai2d found.*ai2d needs ai2d/questions/, images/'):
        find_tasks(options(str(tmp_path / 'more'), tasks='ai2d'))
    assert {kind for kind, _ in benchmarks.list_tasks(str(tmp_path)).values()} == set(benchmarks.READERS)


# --- missing images and other models' predictions -----------------------------------------------------------------

def test_questions_without_their_image_are_left_out_and_counted(tmp_path, capsys):
    folder = write_vqav2(tmp_path)
    next((folder / 'val2014').glob('*101.png')).unlink()
    with pytest.raises(UserError, match='1 of 5 images missing.*max_bad_samples=2'):
        find_tasks(options(str(tmp_path), max_bad_samples=1))
    (task,) = find_tasks(options(str(tmp_path), max_bad_samples=2))
    assert task.skipped == ['7002', '7003'] and len(task.examples) == 7
    assert 'vqav2: 2 questions left out, 1 images missing, first COCO_val2014_000000000101' in capsys.readouterr().out
    result, _ = scorers.summarise(task, ['red'] * 7)
    assert result['skipped'] == 2 and result['n'] == 7
    (task,) = find_tasks(options(str(tmp_path)), images=False)           # to score predictions no image is needed
    assert len(task.examples) == 9


def test_predictions_of_another_model_are_scored_as_ours(eval_dir):
    tasks = find_tasks(options(eval_dir), images=False)
    for task in tasks:
        choices = task.examples[0].choices
        rows = [{'id': e.id, 'prediction': f' {e.choices[e.answers[0]].upper()} ' if choices else e.answers[0]}
                for e in reversed(task.examples)]
        result, records = scorers.score_predictions(task, rows)
        assert result['score'] == 1 and result['malformed'] == result['empty'] == 0
        assert [r['id'] for r in records] == [e.id for e in task.examples]
        rows[0]['prediction'], rows[-1]['prediction'] = '', ' '
        result, _ = scorers.score_predictions(task, rows)
        assert result['empty'] == result['malformed'] == min(2, len(rows)) and result['score'] < 1, task.name
    task = next(task for task in tasks if task.name == 'copa')
    rows = [{'id': i, 'prediction': ['red', '', 'none of these'][i % 3]} for i in range(6)]
    result, _ = scorers.score_predictions(task, rows)
    assert (result['score'], result['malformed'], result['empty']) == (1 / 3, 4, 2)


@pytest.mark.parametrize('change, message', [
    (lambda rows: rows[1:], "1 ids are missing, first '7000'; expected the 9 ids of vqav2, such as '7000'"),
    (lambda rows: rows + rows[:1], "1 ids are there twice, first '7000'"),
    (lambda rows: rows + [{'id': 'x', 'prediction': 'a'}], "1 ids are of no question, first 'x'; expected")])
def test_predictions_need_every_id_once(eval_dir, change, message):
    (task,) = find_tasks(options(eval_dir, tasks='vqav2'))
    rows = [{'id': int(e.id), 'prediction': 'red'} for e in task.examples]
    with pytest.raises(UserError) as e:
        scorers.score_predictions(task, change(rows))
    assert message in str(e.value) and '\n' not in str(e.value), e.value
