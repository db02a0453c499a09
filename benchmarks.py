"""
Benchmark files to Tasks: the official releases as they are, found under a folder (NEEDS). Nothing here asks a model.

    for task in find_tasks(opt): ...            # opt: evaluate.default_options(eval_dir='data/eval', tasks='pope,copa')

A new benchmark is one function, which reads its rows with read_table and returns a Task, and its line in READERS.
"""
import functools
import glob
import json
import os
import string

from benchmark_files import ROWS, check_known, check_rows, example_of, find_images, read_refs, read_table
from errors import Field, UserError, check, reading
from metrics import gqa_match, pope_answer, pope_metrics
from scorers import (TEXT_ALIAS, TEXT_BASELINES_10, VISION_BASELINES, Task, caption_task, same, score_box, subset,
                     unit_box, vqa_task)
from textbench import ACC_NORM, DCLM_DELIMITER, FORMS


# --- benchmarks: each function gets the first file of a benchmark, the task's name and the options ------------------

def read_vqav2(path, name, opt):
    """VQAv2 val, scored by opt.vqa_variant; the other variant is reported beside it."""
    folder = os.path.dirname(path)
    questions_file = os.path.join(folder, 'v2_OpenEnded_mscoco_val2014_questions.json')
    answers_file = os.path.join(folder, 'v2_mscoco_val2014_annotations.json')
    questions = read_table(questions_file, 'questions', ROWS['vqav2 question'], unique='question_id')
    rows = read_table(answers_file, 'annotations', ROWS['vqav2 answers'], unique='question_id')
    text = {row['question_id']: row['question'] for row in questions}
    check_known(rows, answers_file, 'question_id', text, questions_file)
    examples = [example_of(row, row['question_id'], text[row['question_id']] + opt.short_suffix,
                           [answer['answer'] for answer in row['answers']], f"COCO_val2014_{row['image_id']:012d}")
                for row in rows]
    return vqa_task(name, 'vqav2', examples, opt.vqa_variant, ('official', 'vlm-eval'))


def read_textvqa(path, name, opt):
    """TextVQA val by M4C's score. Where `path` is the file with OCR tokens, they are part of the question."""
    folder = os.path.dirname(path)
    file = os.path.join(folder, 'TextVQA_0.5.1_val.json')
    ocr_file = os.path.join(folder, 'textvqa_val_v051_ocr.jsonl')
    rows = read_table(file, 'data', ROWS['textvqa'], unique='question_id')
    questions = [row['question'] for row in rows]
    if os.path.exists(ocr_file):
        questions = [row['text'] for row in read_table(ocr_file, None, ROWS['textvqa ocr'])]
        if len(questions) != len(rows):
            raise UserError(f"{ocr_file}: {len(questions)} lines, expected one per question of {file}: {len(rows)}")
        if path != ocr_file:
            questions = [question.split('\nReference OCR token:')[0] for question in questions]
    examples = [example_of(row, row['question_id'], question + opt.short_suffix, row['answers'], str(row['image_id']))
                for row, question in zip(rows, questions)]
    return vqa_task(name, 'textvqa', examples, 'm4c')


def read_pope(path, name, opt):
    """POPE: the mean accuracy of the splits that are there; the answer is by opt.pope_by."""
    words = [word.lower() for word in opt.pope_words if isinstance(word, str)]
    if len(opt.pope_words) != 2 or len(set(words)) != 2:
        raise UserError(f"pope_words={opt.pope_words}: expected two different words, the one for yes first")
    labels, by_text = ('yes', 'no'), opt.pope_by == 'text'
    examples = []
    for split in ('adversarial', 'popular', 'random'):       # vlm-evaluation's order
        file = os.path.join(os.path.dirname(path), f'coco_pope_{split}.json')
        if not os.path.exists(file):
            continue
        for i, row in enumerate(read_table(file, None, ROWS['pope'], unique='question_id')):
            if row['label'] not in labels:
                raise UserError(f"{file}: entry {i} has label {row['label']!r}, expected 'yes' or 'no'")
            choices = None if by_text else list(opt.pope_words)
            gold = row['label'] if by_text else labels.index(row['label'])
            examples.append(example_of(row, f"{split}-{row['question_id']}", row['text'] + opt.short_suffix, [gold],
                                       row['image'], (split,), choices, choices and labels))

    def metrics(records):
        read = pope_answer if by_text else lambda word: labels[words.index(word.lower())]
        return pope_metrics([read(r['prediction']) if r['prediction'] else '' for r in records],
                            [read(r['answers'][0]) for r in records])

    def by_llava(prediction, answers):
        return float(pope_answer(prediction) == answers[0])
    return Task(name, 'pope', examples, by_llava if by_text else same, by_label=True,
                variant="text, LLaVA's rule" if by_text else 'first token', extra={'yes_no': metrics})


def box_task(name, kind, examples, opt, threshold, split='', **more):
    return Task(name, kind, examples, functools.partial(score_box, threshold=threshold), boxes=True,
                variant=f'{split}IoU>={threshold:g}, {opt.box_frame} frame, images as stored', **more)


def read_refcoco(path, name, opt):
    """One split of RefCOCO, RefCOCO+ or RefCOCOg: the model writes a box, right at IoU >= 0.5."""
    instances = os.path.join(os.path.dirname(path), 'instances.json')
    images = read_table(instances, 'images', ROWS['refcoco image'], unique='id')
    objects = read_table(instances, 'annotations', ROWS['refcoco object'], unique='id')
    refs = read_refs(path)
    size = {row['id']: (row['width'], row['height']) for row in images}
    check_known(objects, instances, 'image_id', size, 'its list of images')
    box, in_image = {}, {}                                   # by object; the boxes of all objects by image
    for row in objects:
        box[row['id']] = unit_box(row['bbox'], size[row['image_id']], opt.box_frame)
        in_image.setdefault(row['image_id'], []).append(box[row['id']])
    check_known(refs, path, 'ann_id', box, instances)
    examples = []
    for i, ref in enumerate(refs):
        gold = [box[ref['ann_id']]]
        for k, sentence in enumerate(ref['sentences'] if ref['split'] == opt.refcoco_split else ()):
            prompt = opt.box_prompt.replace('{sent}', sentence['sent'])
            examples.append(example_of(ref, f"{ref.get('ref_id', i)}-{sentence.get('sent_id', k)}", prompt, gold,
                                       f"COCO_train2014_{ref['image_id']:012d}",
                                       guesses=in_image[ref['image_id']]))       # any object's box
    if not examples:
        splits = sorted({ref['split'] for ref in refs})
        raise UserError(f"{path}: no ref of split {opt.refcoco_split!r}; it has {splits}")
    return box_task(name, 'refcoco', examples, opt, 0.5, f'{opt.refcoco_split}, ',
                    extra={'split': lambda records: opt.refcoco_split})


def read_gqa(path, name, opt):
    """GQA testdev, balanced: one answer, compared as a whole."""
    examples = []
    for row in read_table(path, '', ROWS['gqa']):
        if row.get('isBalanced') is not False:
            label = 'open' if row['types']['structural'] == 'query' else 'binary'
            examples.append(example_of(row, row['id'], row['question'] + opt.short_suffix, [row['answer']],
                                       str(row['imageId']), (label,)))
    return Task(name, 'gqa', examples, lambda prediction, answers: gqa_match(prediction, answers[0]),
                variant='vlm-eval: lower case, punctuation deleted from the prediction')


VIZWIZ_HINT = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def read_vizwiz(path, name, opt):
    """VizWiz val: photos of blind people, some of whose questions cannot be answered from them."""
    examples = []
    for i, row in enumerate(read_table(path, '', ROWS['vizwiz'])):               # the id is the position there, too
        label = 'answerable' if row['answerable'] else 'unanswerable'
        answers = [answer['answer'] for answer in row['answers']]
        examples.append(example_of(row, i, row['question'] + VIZWIZ_HINT + opt.short_suffix, answers, row['image'],
                                   (label,)))
    return vqa_task(name, 'vizwiz', examples, 'vizwiz', ('official', 'vlm-eval'))


def read_ocid_ref(path, name, opt):
    """OCID-Ref val: a box among clutter, right at IoU >= opt.ocid_iou; the photos are 640 x 480."""
    rows, in_image = read_table(path, '', ROWS['ocid_ref']), {}
    for i, row in enumerate(rows):
        with reading(f'{path}: entry {i}', 'a box'):
            x1, y1, x2, y2 = json.loads(row['bbox'])         # its authors say x, y, width, height, but it is corners
            if not (0 <= x1 < x2 <= 640 and 0 <= y1 < y2 <= 480):
                raise UserError(f"{path}: entry {i} has bbox {row['bbox']}, expected x1 < x2 <= 640, y1 < y2 <= 480")
            row['box'] = unit_box((x1, y1, x2 - x1, y2 - y1), (640, 480), opt.box_frame)
        in_image.setdefault(row['scene_path'], {})[row['box']] = None
    examples = []
    for row in rows:
        clutter = 'minimum' if row['take_id'] <= 9 else 'medium' if row['take_id'] <= 16 else 'maximum'
        examples.append(example_of(row, row['id'], opt.box_prompt.replace('{sent}', row['sentence']), [row['box']],
                                   row['scene_path'], (clutter,), guesses=list(in_image[row['scene_path']])))
    return box_task(name, 'ocid_ref', examples, opt, opt.ocid_iou, by_label=True)


def read_vsr(path, name, opt):
    """VSR, zero-shot test: is a statement about places true? The more probable of two first tokens is the answer."""
    examples = []
    for i, row in enumerate(read_table(path, None, ROWS['vsr'])):
        prompt = f'Based on the image, is this statement "True" or "False"? {row["caption"]}\n'
        examples.append(example_of(row, i, prompt + 'Respond with "True" or "False" directly.', [1 - row['label']],
                                   row['image'], choices=['True', 'False']))
    return Task(name, 'vsr', examples, same, variant='first token')


def lettered(question, choices):
    """(prompt, letters) of a question whose answer is the letter of a choice, as LLaVA asks it."""
    letters = string.ascii_uppercase[:len(choices)]
    lines = [f'{letter}. {choice}' for letter, choice in zip(letters, choices)]
    return '\n'.join([question, *lines, "Answer with the option's letter from the given choices directly."]), [*letters]


def read_tallyqa(path, name, opt):
    """TallyQA test: how many? The choices are 0 to 15, asked by letter."""
    examples = []
    for row in read_table(path, '', ROWS['tallyqa'], unique='question_id'):
        prompt, letters = lettered(row['question'], range(16))
        label = 'simple' if row['issimple'] else 'complex'
        examples.append(example_of(row, row['question_id'], prompt, [row['answer']], row['image'], (label,), letters))
    return Task(name, 'tallyqa', examples, same, by_label=True, variant='first token, letters')


def read_ai2d(path, name, opt):
    """AI2D, all questions: four choices about a diagram, asked by letter. A file holds the questions of one image."""
    examples = []
    for file in sorted(glob.glob(os.path.join(glob.escape(os.path.dirname(path)), '*.json'))):
        with reading(file, 'JSON'), open(file, encoding='utf-8') as f:
            content = json.load(f)
        check(content, Field(dict, of=ROWS['ai2d']), file)
        for question, row in content['questions'].items():
            prompt, letters = lettered(question, row['answerTexts'])
            examples.append(example_of(row, row['questionId'], prompt, [row['correctAnswer']], content['imageName'],
                                       choices=letters))
    return Task(name, 'ai2d', examples, same, variant='first token, letters')


def read_captions(path, name, opt):
    """Captions: what the model writes about an image without being asked; an image may have several captions."""
    captions = {}
    for row in read_table(path, None, ROWS['captions']):
        captions.setdefault(row['image'], []).append(row['caption'])
    return caption_task(name, [example_of({}, image, '', texts, image) for image, texts in captions.items()])


def read_text(path, name, opt):
    """
    Which choice goes on best after the prompt? The rows are what lm-evaluation-harness reads (textbench.py), or
    {"query", "choices", "gold": index or list of indices}: AGIEval's there, DCLM's, one's own.
    """
    known = TEXT_ALIAS.get(name, name)
    dclm = opt.text_variant == 'dclm'
    rows = read_table(path, None, {})
    own = bool(rows) and 'query' not in rows[0] and known in FORMS
    if own and dclm:
        raise UserError(f"{path}: text_variant='dclm' asks DCLM's own files, with query, choices and gold in each row")
    if not own:
        check_rows(rows, path, ROWS['text'])
    delimiter = DCLM_DELIMITER.get(known, ' ')
    examples = []
    for i, row in enumerate(rows):
        if own:
            with reading(f'{path}: entry {i}', f'a row of {known}'):
                question = FORMS[known].question(row)
            if question is None:
                continue
            prompt, choices, gold = question
            check(prompt, Field(str, 1), f"{path}: entry {i}: prompt")
            check(choices, Field(list, 2, 999, of=Field(str)), f"{path}: entry {i}: choices")
        else:
            prompt, choices, gold = row['query'], row['choices'], row['gold']
            gold = gold if isinstance(gold, list) else [gold]
            prompt = (prompt.strip() + delimiter).rstrip() if dclm else prompt + delimiter[:-1]
        if not gold or not all(type(g) is int and 0 <= g < len(choices) for g in gold):
            raise UserError(f"{path}: entry {i} has gold={row.get('gold', gold)!r} for {len(choices)} choices; "
                            "expected an index")
        examples.append(example_of(row, i, prompt, gold, choices=[c.strip() for c in choices] if dclm else choices,
                                   names=choices))
    if own and len(examples) != FORMS[known].n:
        print(f"!!! {path}: {len(examples)} questions, lm-evaluation-harness asks {FORMS[known].n}")
    norm = 'token' if dclm else 'acc_norm' if known in ACC_NORM else 'acc'
    return Task(name, 'text', examples, same, layout='text', norm=norm, delimiter=None if dclm else ' ',
                variant='DCLM: nats per token' if dclm else f'lm-eval: {norm}')


# kind: the files under eval_dir that show that it is there, the name of its task, and what reads it
READERS = {
    'vqav2': ('*/v2_*mscoco_val2014_*.json', '{folder}', read_vqav2),
    'pope': ('*/coco_pope_*.json', '{folder}', read_pope),
    'textvqa': ('*/TextVQA_0.5.1_val.json', '{folder}', read_textvqa),
    'textvqa_ocr': ('*/textvqa_val_v051_ocr.jsonl', '{folder}_ocr', read_textvqa),
    'gqa': ('*/testdev_balanced_questions.json', '{folder}', read_gqa),
    'refcoco': ('*/refs(u*).p', '{folder}', read_refcoco),
    'ocid_ref': ('*/val_expressions.json', '{folder}', read_ocid_ref),
    'vizwiz': ('vizwiz*/val.json', '{folder}', read_vizwiz),
    'vsr': ('vsr*/test.jsonl', '{folder}', read_vsr),
    'tallyqa': ('tallyqa*/test.json', '{folder}', read_tallyqa),
    'ai2d': ('ai2d*/questions/*.json', '{folder}', read_ai2d),
    'captions': ('*/captions.jsonl', '{folder}', read_captions),
    'text': ('text/*.jsonl', '{file}', read_text),
}


# only when named: the paper leaves them out
NAMED_ONLY = ('vsr', 'tallyqa', 'ai2d')
# task: the files under eval_dir that it needs; the paper's tasks are the first sixteen and VizWiz
NEEDS = {
    'vqav2': 'vqav2/v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json, val2014/',
    'pope': 'pope/coco_pope_{random,popular,adversarial}.json or some of them, val2014/',
    'textvqa': 'textvqa/TextVQA_0.5.1_val.json, train_images/',
    'gqa': 'gqa/testdev_balanced_questions.json, images/',
    'refcoco': 'refcoco/refs(unc).p, instances.json, train2014/',
    'ocid_ref': 'ocid_ref/val_expressions.json, OCID-dataset/',
    **{name: f'text/{name}.jsonl, the rows of ' + (FORMS[name].source if name in FORMS else 'hails/agieval-sat-en test')
       for name in TEXT_BASELINES_10},
    'vizwiz': 'vizwiz/val.json, val/',
    'textvqa_ocr': 'textvqa/TextVQA_0.5.1_val.json, textvqa_val_v051_ocr.jsonl, train_images/',
    'refcoco+': 'refcoco+/refs(unc).p, instances.json, train2014/',
    'refcocog': 'refcocog/refs(umd).p, instances.json, train2014/',
    'vsr': 'vsr/test.jsonl, train2017/, val2017/',
    'tallyqa': 'tallyqa/test.json, train2014/, val2014/, VG_100K/, VG_100K_2/',
    'ai2d': 'ai2d/questions/, images/',
}
PAPER = (*VISION_BASELINES, 'vizwiz', *TEXT_BASELINES_10)


def asked_tasks(names, found):
    """
    The names of the tasks that are asked, and which of them are not there.
    names    of --tasks: tasks, or the groups 'paper', 'vision' and 'text'; none = all that were found, but NAMED_ONLY
    found    list_tasks's result
    returns  (set of names in found, sorted list of names)
    """
    free = {name for name, (kind, _) in found.items() if kind not in NAMED_ONLY}
    text = {name for name in free if found[name][0] == 'text'} | set(TEXT_BASELINES_10)
    groups = {'paper': set(PAPER), 'text': text, 'vision': (free | set(NEEDS)) - text - set(NAMED_ONLY)}
    asked, alias = set() if names else free, {TEXT_ALIAS.get(name, name): name for name in found}
    for name in names:
        asked |= groups.get(name, {name})
    asked = {name if name in found else alias.get(name, name) for name in asked}   # sat_en.jsonl is the paper's agieval
    return asked & set(found), sorted(asked - set(found))


def list_tasks(eval_dir):
    """What is there, known from the files' names alone: dict task name -> (kind, first file)."""
    found = {}
    for kind, (pattern, title, _) in READERS.items():
        for file in sorted(glob.glob(pattern, root_dir=eval_dir), key=os.path.split):
            folder, base = os.path.split(file)
            name = title.format(folder=file.split(os.sep)[0], file=os.path.splitext(base)[0])
            path = os.path.join(eval_dir, file)
            before = found.setdefault(name, (kind, path))
            if before[0] != kind or os.path.dirname(before[1]) != os.path.dirname(path):
                raise UserError(f"{before[1]} and {path} are both the task {name}: rename one")
    return found


def find_tasks(opt, images=True):
    """
    The tasks under opt.eval_dir that opt.tasks names (see asked_tasks), in the order of READERS, cut to
    opt.n_example questions each. Files of other tasks are not read; without `images` none is looked for.
    Raises UserError for a folder without any, an unknown name, or the first file or image that is missing or broken.
    """
    if not os.path.isdir(opt.eval_dir):
        raise UserError(f"eval_dir={opt.eval_dir}: no such folder; evaluate.py --help says which files go there")
    found = list_tasks(opt.eval_dir)
    names = [name.strip() for name in opt.tasks.split(',') if name.strip()]
    asked, missing = asked_tasks(names, found)
    lacking = [f"{name} needs {NEEDS[name]}" for name in missing if name in NEEDS]
    unknown = [name for name in missing if name in names]
    if unknown or not asked:
        raise UserError(f"eval_dir={opt.eval_dir}: no {unknown[0] if unknown else 'benchmark'} found; there is "
                        f"{', '.join(sorted(found)) or 'nothing that can be read'}; "
                        f"{lacking[0] + '; ' if len(lacking) == 1 else ''}evaluate.py --help says which files go there")
    for line in lacking:
        print(f"not found: {line}")
    tasks = []
    for name, (kind, path) in found.items():
        if name not in asked:
            continue
        folder = os.path.dirname(path)
        with reading(folder, f'a benchmark of the kind {kind}'):
            task = READERS[kind][2](path, name, opt)
            if len({e.id for e in task.examples}) < len(task.examples):
                raise UserError(f"{path}: two questions have the same id")
            task.examples = subset(task.examples, opt.n_example, lambda e: e.types[0] if task.by_label else '')
            if images:
                find_images(folder, task, opt.max_bad_samples)
            if not task.examples:
                raise UserError(f"eval_dir={opt.eval_dir}: {name} holds no question: mend it or leave it out (--tasks)")
        tasks.append(task)
    return tasks
