"""
Zero-shot evaluation of a checkpoint on the official benchmark files (paper 2.2, appendix E), one photo, or text.

    python evaluate.py --ckpt=out/1b/finetune/ckpt_last                       # every benchmark found under eval_dir
    python evaluate.py config/tiny.py --ckpt=DIR --tasks=pope,vqav2 --n_example=1024
    python evaluate.py --ckpt=DIR --image=photo.jpg --prompt="What is on the table?"
    python evaluate.py --ckpt=DIR --prompt="Once upon a time"                 # continues the text

eval_dir holds one folder per benchmark; its files say which kind it is, its name is the name in the table:
    vqav2/     v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json; COCO_val2014_%012d.jpg
    pope/      coco_pope_{random,popular,adversarial}.json (an object a line; any of the three); `image` names the file
    textvqa/   TextVQA_0.5.1_val.json, {image_id}.jpg; with textvqa_val_v051_ocr.jsonl also the task textvqa_ocr
    refcoco/   instances.json, refs(unc).p or refs(umd).p; COCO_train2014_%012d.jpg
    text/      TASK.jsonl, one {"query", "choices", "gold"} a line; the name is TASK
Images are .jpg, .jpeg or .png in the folder itself, in images/, val2014/, train2014/ or train_images/ there, or in
those folders of eval_dir (COCO is needed once). A question may carry `question_type` (a string or a list of them, each
reported apart) and `blind_answers`, what somebody would guess among who sees the image but not what is asked about it.
The train annotations of VQAv2 and TextVQA, and RefCOCO's own train split, fit the blind baseline; without them it is
fitted on the test questions. A new benchmark is one function that reads its files into Tasks, and an entry in READERS.
"""
import json
import math
import os
import pickle
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

import checkpoint
import common
from configurator import config_keys, configure
from data import caption_prompt, instruct_prompt
from kernels import IGNORE_INDEX
from scorers import (Example, Task, box_iou, gqa_match, parse_box, pope_answer, pope_metrics, same, score_box,
                     stable_score, stable_scores, subset, summarise, table, unit_box, vqa_accuracy, vqa_task)
from vision import RESIZE, open_image, read_json

__all__ = ['box_iou', 'gqa_match', 'parse_box', 'pope_answer', 'stable_score', 'vqa_accuracy', 'default_options',
           'evaluate_task', 'find_tasks', 'READERS']

# --- config: change with a file and --key=value ---------------------------------------------
ckpt = ''                     # a checkpoint folder, such as out/1b/finetune/ckpt_last
eval_dir = 'data/eval'        # benchmark folders, see above
out_dir = ''                  # results.json, table.txt, predictions/; '' = eval/ in the checkpoint (of a ckpt_step_N,
                              # which its run will delete: eval/ckpt_step_N in the run's folder)
scale = '1b'                  # a scale file's name; recorded in results.json
name = ''                     # only recorded in results.json
tasks = ''                    # names separated by commas; '' = every benchmark found
n_example = 0                 # per task (per split for POPE), the first of one fixed shuffle; 0 = all. The shuffle is
                              # vlm-evaluation's, which however shuffles the three RefCOCOs together
batch_size = 16               # questions (or choices) per forward pass; in float32 the scores do not depend on it
max_new_tokens = 128          # of a generated answer
device = 'auto'               # 'auto', 'cpu', 'cuda', 'mps'
dtype = ''                    # 'float32', 'bfloat16'; '' = bfloat16 on CUDA, else float32
n_thread = 0                  # CPU threads of torch; 0 = torch's choice
n_worker = 2                  # threads that decode the next batch's images
resize = ''                   # 'letterbox', 'naive', 'crop'; '' = as the checkpoint was trained
short_suffix = '\nAnswer the question using a single word or phrase.'   # after each VQA and POPE question
box_prompt = 'Please provide the bounding box coordinate of the region this sentence describes: "{sent}"'
box_frame = 'original'        # gold boxes over the 'original' image (vlm-evaluation) or its 'letterbox' square
refcoco_split = 'val'         # which refs are asked
pope_words = ('Yes', 'No')    # the more probable first token is the answer
vqa_variant = 'vlm-eval'      # of VQAv2: 'vlm-eval' (the paper's harness) or 'official'; results.json has both
choice_norm = 'token'         # text choices by nats per 'token' (DCLM), 'sum' (lm-eval acc) or 'char' (acc_norm)
vqav2_baseline = 0.5          # in the vision stable score; the paper's tables fix only pope + vqav2 = 1.0
image = ''                    # answer about one photo ('' = benchmarks); without a prompt: its caption
prompt = ''                   # the question about image, or a text to continue
temperature = 0.0             # of image and prompt; 0 = greedy
top_k = 0                     # of image and prompt; 0 = all ids
seed = 7                      # of sampling
# --- config end -----------------------------------------------------------------------------

FREE = {'tasks', 'batch_size', 'n_thread', 'n_worker', 'ckpt', 'out_dir', 'scale', 'name'}    # do not change a score
IMAGE_FOLDERS = ('', 'images', 'val2014', 'train2014', 'train_images')
# what DCLM puts between query and choice, where it is not one space (llm-foundry ICL, heavy.yaml)
TEXT_DELIMITER = {'arc_easy': '\nAnswer: ', 'piqa': '\nAnswer: ', 'boolq': '\nAnswer: '}


def default_options(**changes):
    """The config block as a namespace, for callers other than the command line; unknown names raise ValueError."""
    values = {key: default for key, (default, _) in config_keys(__file__).items()}
    unknown = sorted(set(changes) - set(values))
    if unknown:
        raise ValueError(f"evaluate has no option {unknown[0]}; it has {', '.join(values)}")
    return SimpleNamespace(**{**values, **changes})


# --- files --------------------------------------------------------------------------------------------------------

def read_lines(path):
    """The objects of a file with one JSON object a line; ValueError names the line."""
    rows = []
    with open(path, encoding='utf-8') as f:
        for i, line in enumerate(f, 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except ValueError as e:
                    raise ValueError(f"{path}:{i}: not valid JSON ({e})") from e
    return rows


def take(row, path, i, *keys):
    """The values of `keys` in entry i of a benchmark file; ValueError names what is missing."""
    for key in keys:
        if not isinstance(row, dict) or key not in row:
            raise ValueError(f"{path}: entry {i} has no '{key}'; expected {', '.join(keys)}")
    return [row[key] for key in keys]


class PlainUnpickler(pickle.Unpickler):
    """RefCOCO releases refs as a pickle of lists, dicts, numbers and strings; anything that names code is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}, and a refs file holds only lists, dicts and strings")


def read_refs(path):
    """The refs of an official refs(unc).p file, read without running any code; ValueError when it is not one."""
    try:
        with open(path, 'rb') as f:
            refs = PlainUnpickler(f).load()
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, TypeError, AttributeError,
            OverflowError, MemoryError) as e:
        raise ValueError(f"{path}: not a RefCOCO refs file ({e})") from e
    if not isinstance(refs, list):
        raise ValueError(f"{path}: holds a {type(refs).__name__}, expected the list of refs")
    return refs


@lru_cache(maxsize=64)
def folder_names(folder):
    return frozenset(os.listdir(folder)) if os.path.isdir(folder) else frozenset()


def image_path(folder, stem):
    """The image called `stem` (jpg, jpeg or png) of a benchmark folder; '' when it is nowhere."""
    for base in (folder, os.path.dirname(folder)):
        for sub in IMAGE_FOLDERS:
            place = os.path.join(base, sub)
            for extension in ('.jpg', '.png', '.jpeg'):
                if stem + extension in folder_names(place):
                    return os.path.join(place, stem + extension)
    return ''


def with_images(folder, stems):
    """The path of each image; ValueError with the number missing and the first of them."""
    paths = [image_path(folder, stem) for stem in stems]
    missing = [stem for stem, path in zip(stems, paths) if not path]
    if missing:
        raise ValueError(f"{folder}: {len(set(missing))} of {len(set(stems))} images missing, first {missing[0]}.jpg; "
                         f"expected there or in {os.path.dirname(folder)}, or in the folders "
                         f"{', '.join(IMAGE_FOLDERS[1:])} of either")
    return paths


# --- benchmarks: folder -> list of Tasks, or None when it is not this kind ----------------------------------------

def read_vqav2(folder, opt):
    """VQAv2 val, scored by opt.vqa_variant (the other variant is reported beside it)."""
    files = [os.path.join(folder, f) for f in ('v2_OpenEnded_mscoco_val2014_questions.json',
                                               'v2_mscoco_val2014_annotations.json')]
    if not any(map(os.path.exists, files)):
        return None
    questions, annotations = [read_json(path) for path in files]
    (questions,) = take(questions, files[0], 0, 'questions')
    (annotations,) = take(annotations, files[1], 0, 'annotations')
    text = {}
    for i, row in enumerate(questions):
        qid, question = take(row, files[0], i, 'question_id', 'question')
        text[qid] = question
    rows = []
    for i, row in enumerate(annotations):
        qid, image_id, answers = take(row, files[1], i, 'question_id', 'image_id', 'answers')
        if qid not in text:
            raise ValueError(f"{files[1]}: entry {i} has question_id {qid}, which {files[0]} does not hold")
        rows.append((qid, f'COCO_val2014_{image_id:012d}', [a['answer'] for a in answers], row))
    images = with_images(folder, [stem for _, stem, _, _ in rows])
    examples = [Example(str(qid), text[qid] + opt.short_suffix, answers, path, type_labels(row),
                        blind=row.get('blind_answers')) for (qid, _, answers, row), path in zip(rows, images)]
    train = os.path.join(folder, 'v2_mscoco_train2014_annotations.json')
    fit = None
    if os.path.exists(train):
        fit = [(type_labels(row), [a['answer'] for a in row['answers']]) for row in read_json(train)['annotations']]
    return [vqa_task(os.path.basename(folder), 'vqav2', subset(examples, opt.n_example), opt.vqa_variant,
                     ('official', 'vlm-eval'), fit)]


def type_labels(row):
    """The labels under which a question is also reported: its optional question_type, a string or a list of them."""
    label = row.get('question_type') or ()
    return (label,) if isinstance(label, str) else tuple(label)


def read_textvqa(folder, opt):
    """TextVQA val without and, where the OCR file is there, with its OCR tokens in the question; M4C's score."""
    path = os.path.join(folder, 'TextVQA_0.5.1_val.json')
    if not os.path.exists(path):
        return None
    (rows,) = take(read_json(path), path, 0, 'data')
    fields = [take(row, path, i, 'question_id', 'image_id', 'question', 'answers') for i, row in enumerate(rows)]
    for i, (_, _, _, answers) in enumerate(fields):
        if len(answers) != 10:
            raise ValueError(f"{path}: entry {i} has {len(answers)} answers; the TextVQA score is defined for 10")
    images = with_images(folder, [str(image_id) for _, image_id, _, _ in fields])
    fit, train = None, os.path.join(folder, 'TextVQA_0.5.1_train.json')
    if os.path.exists(train):
        fit = [(type_labels(row), row['answers']) for row in read_json(train)['data']]

    def task(suffix, questions):
        examples = [Example(str(qid), question + opt.short_suffix, answers, image, type_labels(row),
                            blind=row.get('blind_answers'))
                    for (qid, _, _, answers), image, question, row in zip(fields, images, questions, rows)]
        return vqa_task(os.path.basename(folder) + suffix, 'textvqa', subset(examples, opt.n_example), 'm4c', (), fit)
    ocr = os.path.join(folder, 'textvqa_val_v051_ocr.jsonl')
    if not os.path.exists(ocr):
        return [task('', [question for _, _, question, _ in fields])]
    text = [take(row, ocr, i, 'text')[0] for i, row in enumerate(read_lines(ocr))]
    if len(text) != len(rows):
        raise ValueError(f"{ocr}: {len(text)} lines, expected one per question of {path}: {len(rows)}")
    return [task('', [t.split('\nReference OCR token:')[0] for t in text]), task('_ocr', text)]


def read_pope(folder, opt):
    """POPE: which of two first tokens is more probable; the mean accuracy of the splits that are there."""
    examples = []
    for split in ('adversarial', 'popular', 'random'):       # vlm-evaluation's order
        path = os.path.join(folder, f'coco_pope_{split}.json')
        if not os.path.exists(path):
            continue
        for i, row in enumerate(read_lines(path)):
            qid, stem, question, label = take(row, path, i, 'question_id', 'image', 'text', 'label')
            if label not in ('yes', 'no'):
                raise ValueError(f"{path}: entry {i} has label {label!r}, expected 'yes' or 'no'")
            blind = [('yes', 'no').index(b) for b in row.get('blind_answers') or ()]
            examples.append(Example(f'{split}-{qid}', question + opt.short_suffix, [int(label == 'no')],
                                    os.path.splitext(stem)[0], (split, *type_labels(row)), list(opt.pope_words), blind))
    if not examples:
        return None
    for example, path in zip(examples, with_images(folder, [e.image for e in examples])):
        example.image = path
    examples = subset(examples, opt.n_example, lambda e: e.types[0])

    def metrics(records):
        words = [w.lower() for w in opt.pope_words]
        answer = [('yes', 'no')[words.index(r['prediction'].lower())] if r['prediction'] else '' for r in records]
        return pope_metrics(answer, [('yes', 'no')[words.index(r['answers'][0].lower())] for r in records])
    return [Task(os.path.basename(folder), 'pope', examples, same, split_mean=True, variant='first token',
                 extra={'yes_no': metrics})]


def read_refcoco(folder, opt):
    """One split of RefCOCO, RefCOCO+ or RefCOCOg: boxes as text, right at IoU >= 0.5."""
    found = [os.path.join(folder, f'refs({by}).p') for by in ('unc', 'umd')
             if os.path.exists(os.path.join(folder, f'refs({by}).p'))]
    instances = os.path.join(folder, 'instances.json')
    if not found or not os.path.exists(instances):
        return None
    content = read_json(instances)
    annotations, sizes = take(content, instances, 0, 'annotations', 'images')
    sizes = {row['id']: (row['width'], row['height']) for row in sizes}
    by_id, by_image = {}, {}
    for i, row in enumerate(annotations):
        ann_id, image_id, xywh = take(row, instances, i, 'id', 'image_id', 'bbox')
        by_id[ann_id] = unit_box(xywh, sizes[image_id], opt.box_frame)
        by_image.setdefault(image_id, []).append(by_id[ann_id])
    rows, fit, splits = [], [], set()
    for i, ref in enumerate(read_refs(found[0])):
        ann_id, image_id, split, sentences = take(ref, found[0], i, 'ann_id', 'image_id', 'split', 'sentences')
        if ann_id not in by_id:
            raise ValueError(f"{found[0]}: ref {i} has ann_id {ann_id}, which {instances} does not hold")
        splits.add(split)
        if split == 'train':
            fit.append((type_labels(ref), [by_id[ann_id]]))
        if split == opt.refcoco_split:
            rows += [(f"{ref.get('ref_id', i)}-{s.get('sent_id', k)}", s['sent'], ref) for k, s in enumerate(sentences)]
    if not rows:
        raise ValueError(f"{found[0]}: no ref of split {opt.refcoco_split!r}; it has {sorted(splits)}")
    images = with_images(folder, [f"COCO_train2014_{ref['image_id']:012d}" for _, _, ref in rows])
    examples = [Example(name, opt.box_prompt.replace('{sent}', sent), [by_id[ref['ann_id']]], path, type_labels(ref),
                        blind=by_image[ref['image_id']]) for (name, sent, ref), path in zip(rows, images)]
    return [Task(os.path.basename(folder), 'refcoco', subset(examples, opt.n_example), score_box, train=fit or None,
                 variant=f'IoU>=0.5, {opt.box_frame} frame')]


def read_text(folder, opt):
    """Multiple choice: the least surprising choice after the plain query, zero-shot."""
    if os.path.basename(folder) != 'text':
        return None
    found = []
    for file in sorted(f for f in os.listdir(folder) if f.endswith('.jsonl')):
        path, examples = os.path.join(folder, file), []
        delimiter = TEXT_DELIMITER.get(file[:-6], ' ')
        for i, row in enumerate(read_lines(path)):
            query, choices, gold = take(row, path, i, 'query', 'choices', 'gold')
            if len(choices) < 2 or type(gold) is not int or not 0 <= gold < len(choices):
                raise ValueError(f"{path}: entry {i} has gold={gold!r} for {len(choices)} choices; expected an index")
            blind = [choices.index(b) for b in row.get('blind_answers') or ()]
            examples.append(Example(str(i), (query.strip() + delimiter).rstrip(), [gold], types=type_labels(row),
                                    choices=[choice.strip() for choice in choices], blind=blind))
        found.append(Task(file[:-6], 'text', subset(examples, opt.n_example), same, chat=False,
                          variant=f'nats per {opt.choice_norm}'))
    return found


READERS = {'vqav2': read_vqav2, 'pope': read_pope, 'textvqa': read_textvqa, 'refcoco': read_refcoco, 'text': read_text}


def find_tasks(opt):
    """
    The benchmarks under opt.eval_dir that opt.tasks asks for, as Tasks in the order of READERS.
    Raises ValueError for an eval_dir without any, an unknown name, or the first file or image missing or broken.
    """
    if not os.path.isdir(opt.eval_dir):
        raise ValueError(f"eval_dir={opt.eval_dir}: no such folder; evaluate.py's first lines say which files go there")
    asked = [name.strip() for name in opt.tasks.split(',') if name.strip()]
    folders = sorted(entry.path for entry in os.scandir(opt.eval_dir) if entry.is_dir())
    names = {os.path.basename(folder) for folder in folders} - {'text'}
    if asked:                                                # the others' files (but text's) are not read
        folders = [f for f in folders if any(a.startswith(os.path.basename(f)) for a in asked)
                   or os.path.basename(f) == 'text']
    found = []
    for read in READERS.values():
        for folder in folders:
            try:
                found += read(folder, opt) or ()
            except (KeyError, TypeError, AttributeError, IndexError) as e:
                raise ValueError(f"{folder}: not the official format ({type(e).__name__}: {e})") from e
    unknown = sorted(set(asked) - {task.name for task in found})
    if unknown or not found:
        raise ValueError(f"eval_dir={opt.eval_dir}: no {unknown[0] if unknown else 'benchmark'} found; there is "
                         f"{', '.join(sorted(names | {t.name for t in found})) or 'nothing that can be read'}; "
                         "evaluate.py's first lines say which files go there")
    found = [task for task in found if not asked or task.name in asked]
    empty = [task.name for task in found if not task.examples]
    if empty:
        raise ValueError(f"eval_dir={opt.eval_dir}: {empty[0]} holds no question: mend it or leave it out (--tasks)")
    return found


# --- asking the model ---------------------------------------------------------------------------------------------

def make_batches(images, lengths, batch_size):
    """
    Indices in batches of at most batch_size: rows of one image stay together, so that it is encoded once, and text
    rows go by length, so that little is padding.
    """
    groups = {}
    for i, path in enumerate(images):
        groups.setdefault(path, []).append(i)
    text = sorted(groups.pop('', []), key=lambda i: -lengths[i])
    batches = [text[i:i + batch_size] for i in range(0, len(text), batch_size)]
    batch = []
    for rows in groups.values():
        if batch and len(batch) + len(rows) > batch_size:
            batches.append(batch)
            batch = []
        batch = batch + rows
        while len(batch) >= batch_size:
            batches.append(batch[:batch_size])
            batch = batch[batch_size:]
    return batches + [batch] if batch else batches


def load_image(path, size, resize):
    return RESIZE[resize](open_image(path), size)


def load_images(images, lengths, model, opt):
    """Yield (batch, (N,3,S,S) uint8 or None, image_index (len(batch),) or None), decoding one batch ahead."""
    batches = make_batches(images, lengths, opt.batch_size)
    with ThreadPoolExecutor(max(1, opt.n_worker)) as pool:
        def submit(batch):
            paths = list(dict.fromkeys(images[i] for i in batch if images[i]))
            return paths, [pool.submit(load_image, path, model.encoder.image_size, opt.resize) for path in paths]
        ahead = submit(batches[0]) if batches else None
        for n, batch in enumerate(batches):
            (paths, loading), ahead = ahead, submit(batches[n + 1]) if n + 1 < len(batches) else None
            if not paths:
                yield batch, None, None
                continue
            stack = torch.stack([f.result() for f in loading]).to(opt.device)
            yield batch, stack, torch.tensor([paths.index(images[i]) for i in batch], device=opt.device)


def prompt_ids(example, task, model, tokenizer, opt):
    """The ids that the model reads before its answer."""
    if task.chat:
        n_token = model.encoder.n_token if example.image else 0
        return instruct_prompt(example.prompt, n_token, tokenizer, opt.system_prompt)
    return tokenizer.encode(example.prompt) or [tokenizer.eot_id]


def write_answers(model, tokenizer, task, opt):
    """Greedy answers, one str per example, up to sep or end of text; also how many ran into max_new_tokens."""
    prompts = [prompt_ids(e, task, model, tokenizer, opt) for e in task.examples]
    images, answers, cut = [e.image for e in task.examples], [''] * len(prompts), 0
    bar = progress(task, len(prompts))
    for batch, pixels, index in load_images(images, list(map(len, prompts)), model, opt):
        with autocast(opt):
            new = model.generate([prompts[i] for i in batch], pixels, index, max_new_tokens=opt.max_new_tokens,
                                 stop_ids=(tokenizer.sep_id, tokenizer.eot_id))
        for i, ids in zip(batch, new):
            answers[i] = tokenizer.decode(ids).strip()
            cut += len(ids) >= opt.max_new_tokens
        bar.update(len(batch))
    bar.close()
    return answers, cut


def choice_ids(example, task, tokenizer):
    """The continuations to compare. In chat: up to and with the first token that tells the choices apart."""
    if not task.chat:
        return [tokenizer.encode_next(choice) for choice in example.choices]
    ids = [tokenizer.encode(choice) for choice in example.choices]
    first = next((k for k, column in enumerate(zip(*ids)) if len(set(column)) > 1), None)
    if first is None:
        raise ValueError(f"{task.name}: the choices {example.choices} have the ids {ids}, where one is the start of "
                         "another: no first token tells them apart")
    return [c[:first + 1] for c in ids]


def pick_choices(model, tokenizer, task, opt):
    """The index of the most probable choice per example (None when the model gives nan), and every choice's nats."""
    rows, images, examples = [], [], task.examples
    for n, e in enumerate(examples):
        context = prompt_ids(e, task, model, tokenizer, opt)
        for k, ids in enumerate(choice_ids(e, task, tokenizer)):
            if not ids:
                raise ValueError(f"{task.name}: example {e.id} has a choice {e.choices[k]!r} without any token")
            # as DCLM: what does not fit is cut from the left of the context, never from the choice or an image
            over = max(0, len(context) + len(ids) - 1 - model.decoder.config.seq_len)
            start = 0 if e.image else min(over, len(context) - 1)
            size = {'token': len(ids), 'sum': 1, 'char': max(len(e.choices[k]), 1)}[opt.choice_norm]
            rows.append((n, context[start:], ids, 1 if task.chat else size))
            images.append(e.image)
    nats = [[] for _ in examples]
    bar, scored = progress(task, len(rows), 'choices'), [0.0] * len(rows)
    for batch, pixels, index in load_images(images, [len(c) + len(ids) for _, c, ids, _ in rows], model, opt):
        width = max(len(rows[i][1]) + len(rows[i][2]) for i in batch) - 1
        tokens = torch.full((len(batch), width), tokenizer.pad_id)
        targets = torch.full((len(batch), width), IGNORE_INDEX)
        for row, i in enumerate(batch):
            _, context, ids, _ = rows[i]
            tokens[row, :len(context) + len(ids) - 1] = torch.tensor(context + ids[:-1])
            targets[row, len(context) - 1:len(context) + len(ids) - 1] = torch.tensor(ids)
        with autocast(opt):
            nll, _ = model.row_nll(tokens.to(opt.device), targets.to(opt.device), pixels, index)
        for i, value in zip(batch, nll.tolist()):
            scored[i] = value / rows[i][3]
        bar.update(len(batch))
    bar.close()
    for (n, *_), value in zip(rows, scored):
        nats[n].append(value)
    best = [None if any(v != v for v in values) else values.index(min(values)) for values in nats]
    return best, nats


def progress(task, total, unit='questions'):
    return tqdm(total=total, desc=task.name, unit=f' {unit}', leave=False, disable=None)     # off where nobody watches


def autocast(opt):
    return torch.autocast(opt.device, dtype=torch.bfloat16, enabled=opt.dtype == 'bfloat16')


# --- scores -------------------------------------------------------------------------------------------------------

def evaluate_task(model, tokenizer, task, opt):
    """Ask and score one Task; returns (entry of results.json, records)."""
    start = time.perf_counter()
    if task.examples[0].choices is None:
        predictions, cut = write_answers(model, tokenizer, task, opt)
        result, records = summarise(task, predictions)
        result['reached_max_new_tokens'] = cut
    else:
        result, records = summarise(task, *pick_choices(model, tokenizer, task, opt))
    result['seconds'] = round(time.perf_counter() - start, 2)
    return result, records


def write_whole(path, text):
    """Write a file under a temporary name, then rename: whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + '.part')
    with open(part, 'w', encoding='utf-8') as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


# --- the two uses of the script -----------------------------------------------------------------------------------

def check(opt):
    """Raise ValueError for the first option that makes no sense."""
    if not opt.ckpt:
        raise ValueError("ckpt='': expected a checkpoint folder, such as --ckpt=out/1b/finetune/ckpt_last")
    for key, allowed in (('dtype', ('', 'float32', 'bfloat16')), ('box_frame', ('original', 'letterbox')),
                         ('choice_norm', ('token', 'sum', 'char')), ('resize', ('', *RESIZE)),
                         ('vqa_variant', ('official', 'vlm-eval', 'm4c', 'vizwiz'))):
        if getattr(opt, key) not in allowed:
            raise ValueError(f"{key}={getattr(opt, key)!r}: expected one of {', '.join(map(repr, allowed))}")
    for key, least, most in (('batch_size', 1, math.inf), ('max_new_tokens', 1, math.inf), ('n_example', 0, math.inf),
                             ('temperature', 0, math.inf), ('top_k', 0, math.inf), ('seed', 0, 2 ** 63 - 1),
                             ('n_thread', 0, common.MAX_THREADS)):
        if not least <= getattr(opt, key) <= most:
            raise ValueError(f"{key}={getattr(opt, key)}: expected from {least} to {most}")
    words = [word.lower() for word in opt.pope_words if isinstance(word, str)]
    if len(opt.pope_words) != 2 or len(set(words)) != 2:
        raise ValueError(f"pope_words={opt.pope_words}: expected two different words, the one for yes first")


def load(opt):
    """Return (model, tokenizer, meta) of opt.ckpt; fills in the options left to the device and the checkpoint."""
    opt.device = common.pick_device(opt.device, ('auto', 'cpu', 'cuda', 'mps'))
    opt.dtype = opt.dtype or ('bfloat16' if opt.device == 'cuda' else 'float32')
    if opt.n_thread:
        torch.set_num_threads(opt.n_thread)
    model, tokenizer, meta = checkpoint.load_vlm(opt.ckpt, opt.device)
    model.decoder.requires_grad_(opt.dtype == 'bfloat16')      # autocast then keeps its casts of weights over tokens
    torch.backends.cuda.enable_cudnn_sdp(False)                # it plans every new length; here they all differ
    scale = meta['config'].get('scale', opt.scale)
    if scale != opt.scale and os.path.exists(os.path.join(os.path.dirname(__file__), 'config', f'{scale}.py')):
        print(f"!!! {opt.ckpt} is of scale {scale!r}: its prompts and sizes may need config/{scale}.py")
    opt.resize = opt.resize or meta['config'].get('resize', 'letterbox')
    opt.system_prompt = meta['config'].get('system_prompt', '')
    return model, tokenizer, meta


def answer(opt):
    """The text that the model writes about opt.image, or after opt.prompt."""
    check(opt)
    model, tokenizer, _ = load(opt)
    if opt.image and model.encoder is None:
        raise ValueError(f"image={opt.image}: {opt.ckpt} is a text-only checkpoint; give one of stage 2 or 3")
    pixels = None
    if opt.image:
        pixels = load_image(opt.image, model.encoder.image_size, opt.resize)[None].to(opt.device)
        ids = instruct_prompt(opt.prompt, model.encoder.n_token, tokenizer, opt.system_prompt) if opt.prompt \
            else caption_prompt(model.encoder.n_token, tokenizer)
    else:
        ids = tokenizer.encode(opt.prompt) or [tokenizer.eot_id]
    generator = torch.Generator(opt.device).manual_seed(opt.seed)
    with autocast(opt):
        (new,) = model.generate([ids], pixels, max_new_tokens=opt.max_new_tokens, temperature=opt.temperature,
                                top_k=opt.top_k, stop_ids=(tokenizer.sep_id, tokenizer.eot_id), generator=generator)
    return tokenizer.decode(new)


def earlier_results(path, content):
    """The tasks of an earlier results.json of the same model and settings (tasks aside); else {} and a line why."""
    def essence(c):
        return {'torch': c['torch'], **c['meta'], **{k: v for k, v in c['config'].items() if k not in FREE}}
    try:
        before = read_json(path)
        old, new = essence(before), essence(json.loads(json.dumps(content)))
    except (ValueError, KeyError, TypeError, AttributeError):                # none, or not ours
        return {}
    changed = [key for key in new if key not in old or old[key] != new[key]]
    if changed:
        print(f"!!! {path} was made with another {changed[0]} and is replaced: give --out_dir to keep both")
    return {} if changed else before['tasks']


def run(opt):
    """Evaluate every task found, printing the table; writes results.json when all are done. Returns its content."""
    check(opt)
    found = find_tasks(opt)                                  # first: missing files should not wait for the model
    model, tokenizer, meta = load(opt)
    real = Path(os.path.realpath(opt.ckpt))
    beside = real.parent / 'eval' / real.name if real.name.startswith('ckpt_step_') else real / 'eval'
    out = Path(opt.out_dir) if opt.out_dir else beside
    content = {'schema': 1, 'ckpt': str(real), 'config': vars(opt),
               'meta': {k: v for k, v in meta.items() if k != 'rng'}, 'torch': torch.__version__}
    results = content['tasks'] = earlier_results(out / 'results.json', content)
    for task in found:
        if task.examples[0].image and model.encoder is None:
            print(f"{task.name}: skipped, {opt.ckpt} is text-only")
            continue
        results[task.name], records = evaluate_task(model, tokenizer, task, opt)
        print(f"{task.name}: {100 * results[task.name]['score']:.2f} on {results[task.name]['n']} "
              f"in {results[task.name]['seconds']:.0f} s", flush=True)
        content['stable'] = stable_scores(results, opt.vqav2_baseline)
        write_whole(out / 'predictions' / f'{task.name}.jsonl', ''.join(json.dumps(r) + '\n' for r in records))
        write_whole(out / 'results.part.json', json.dumps(content, indent=1))
    if 'stable' not in content:                              # no task was asked
        raise ValueError(f"{opt.ckpt} is a text-only checkpoint and {', '.join(t.name for t in found)} need images: "
                         "nothing to do")
    lines = [table(results),
             "chance: an even draw from the answers of a question's type",
             "blind: the better of the best constant answer per type and, where the files allow it, an even draw from",
             "what the image holds (results.json has both)"]
    for title, stable in content['stable'].items():
        n, names = len(stable['tasks']), ', '.join(stable['tasks'])
        lines.append(f"stable score, {title}: {100 * stable['score']:.2f} over {n} of {n + len(stable['missing'])}: "
                     f"{names}")
    lines.append(f"results and predictions in {out}")
    os.replace(out / 'results.part.json', out / 'results.json')          # there when all that was asked is done
    write_whole(out / 'table.txt', '\n'.join(lines) + '\n')
    print('\n'.join(lines))
    return content


if __name__ == '__main__':
    options = SimpleNamespace(**configure(globals()))
    try:
        if options.image or options.prompt:
            print(answer(options))
        else:
            run(options)
    except torch.OutOfMemoryError:
        sys.exit(f"evaluate: batch_size={options.batch_size} does not fit into the GPU's memory; give a smaller one")
    except (ValueError, OSError) as e:
        sys.exit(f"evaluate: {e}")
