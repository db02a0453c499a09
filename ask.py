"""
Asks a model a Task's questions, many at a time. Questions about one image share its features and its part of the
cache, choices share their context; a question that is answered makes room for another.

    for n, answer in ask(model, tokenizer, task, opt, share(task)): ...    # n: the number of the question in the task

An answer is a plain dict: {'text', 'cut'} of a written one, {'nats', 'n_token'} of choices, {'unreadable'} where the
image cannot be read. float32 answers do not depend on what else is asked at the same time.
"""
import contextlib
import glob
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

import torch

from errors import UserError, reading
from images import batched, open_image
from instruct import caption_prompt, instruct_prompt, question_ids


def share(task, rank=0, world_size=1):
    """
    The questions of one of several processes: lists of their numbers, those about one image together, the longest
    first, so that batches hold little padding and a lack of memory shows at once.
    """
    groups = {}
    for n, e in enumerate(task.examples):
        groups.setdefault(e.image or n, []).append(n)

    def size(group):
        return max(len(task.examples[n].prompt) + sum(map(len, task.examples[n].choices or ())) for n in group)
    return sorted(groups.values(), key=size, reverse=True)[rank::world_size]


def load_image(path, view, upright=True):
    """What an images.View makes of an image file: (pixels, positions in a row); UserError names it."""
    with reading(path, 'an image'):
        return view(open_image(path, upright))


def autocast(opt):
    return torch.autocast(opt.device, dtype=torch.bfloat16, enabled=opt.dtype == 'bfloat16')


def prompt_ids(example, task, model, tokenizer, opt, n_slot=None):
    """The ids that the model reads before its answer; n_slot: positions of its image, None = of the largest."""
    n_token = (n_slot or model.n_slot) if example.image else 0
    if task.layout == 'text':
        return tokenizer.encode(example.prompt.rstrip()) or [tokenizer.eot_id]
    if task.layout == 'caption':
        return caption_prompt(n_token, tokenizer)
    return instruct_prompt(example.prompt, n_token, tokenizer, opt.system_prompt)


def image_prompt(example, task, tokenizer):
    """The ids that text_cond encodes an example's image with: its question, or nothing before a caption."""
    return [] if task.layout == 'caption' else question_ids(example.prompt, tokenizer)


def pair_ids(context, continuation, tokenizer):
    """Two texts tokenised as one, as lm-eval does it: the ids of context without its last spaces, and what follows."""
    start = context.rstrip()
    if not start:
        return [tokenizer.eot_id], tokenizer.encode(context + continuation)
    ids = tokenizer.encode(start)
    return ids, tokenizer.encode(context + continuation)[len(ids):]


def choice_ids(example, task, tokenizer):
    """The ids of each choice; after a question only up to the first one that tells the choices apart."""
    if task.layout == 'text' and task.delimiter is not None:
        return [pair_ids(example.prompt, task.delimiter + choice, tokenizer)[1] for choice in example.choices]
    if task.layout == 'text':
        return [tokenizer.encode_next(choice) for choice in example.choices]
    ids = [tokenizer.encode(choice) for choice in example.choices]
    first = next((k for k, column in enumerate(zip(*ids)) if len(set(column)) > 1), None)
    if first is None:
        raise UserError(f"{task.name}: the choices {example.choices} have the ids {ids}, where one is the start of "
                        "another: no first token tells them apart")
    return [c[:first + 1] for c in ids]


def prefilled(model, tokenizer, task, opt, groups, unreadable):
    """
    Yield ({number: (row of its image, positions)}, the images' prefix) of at least batch_size questions at a time.
    Images are decoded in threads while others are asked about; each is encoded and prefilled once, with text_cond once
    for each question. What cannot be read goes into `unreadable`, {number: why}.
    """
    if model.text_cond is not None:                             # an image serves those who ask the same of it
        alike = {}
        for g, n in ((g, n) for g, group in enumerate(groups) for n in group):
            alike.setdefault((g, *image_prompt(task.examples[n], task, tokenizer)), []).append(n)
        groups = [*alike.values()]
    batches = [[]]                                              # of groups
    for group in groups:
        if sum(map(len, batches[-1])) >= opt.batch_size:
            batches.append([])
        batches[-1].append(group)
    with ThreadPoolExecutor(max(1, opt.n_worker)) as pool:
        def load(batch):
            paths = [task.examples[group[0]].image for group in batch]
            return [path and pool.submit(load_image, path, model.view(opt.resize), not task.boxes) for path in paths]
        ahead = load(batches[0])
        for batch, following in zip(batches, [*batches[1:], []]):
            loading, ahead = ahead, load(following)
            rows, images, texts = {}, [], []
            for group, image in zip(batch, loading):
                try:
                    pixels, n_slot = image.result() if image else (None, 0)
                except UserError as e:
                    unreadable.update(dict.fromkeys(group, str(e)))
                    check_bad(task, unreadable, opt)
                else:
                    images += [pixels] if image else []
                    if image and model.text_cond is not None:
                        texts.append(image_prompt(task.examples[group[0]], task, tokenizer))
                    rows.update(dict.fromkeys(group, (len(images) - 1, n_slot)))
            if rows:
                yield rows, model.prefill_images(batched(images), texts or None) if images else None


def ask(model, tokenizer, task, opt, groups):
    """Yield (n, answer) for each question number in `groups`, a list of lists as share gives it, in any order."""
    if not groups:
        return
    unreadable, rows, prefix = {}, {}, None
    batches = prefilled(model, tokenizer, task, opt, groups, unreadable)

    def feed(n):
        """(numbers, prompts, None, image_index, prefix) of at most n further questions, or None."""
        nonlocal rows, prefix
        if not rows:
            rows, prefix = next(batches, ({}, None))
        if not rows:
            return None
        now = [*rows][:n]
        index, slots = zip(*(rows.pop(i) for i in now))
        prompts = [prompt_ids(task.examples[i], task, model, tokenizer, opt, n) for i, n in zip(now, slots)]
        return now, prompts, None, None if prefix is None else torch.tensor(index), prefix
    way = choose_each if task.examples[0].choices else write_each
    with autocast(opt):
        yield from way(model, tokenizer, task, opt, groups, feed)
    for n, reason in unreadable.items():
        yield n, {'unreadable': reason}


def check_bad(task, unreadable, opt):
    """UserError where more questions of a task have no readable image than opt.max_bad_samples; unreadable {n: why}"""
    bad = len(unreadable) + len(task.skipped)
    if unreadable and bad > opt.max_bad_samples:
        raise UserError(f"{next(iter(unreadable.values()))}; max_bad_samples={opt.max_bad_samples}, and {task.name} "
                        f"has {bad} such questions so far: give a larger one to leave them out")


def write_each(model, tokenizer, task, opt, groups, feed):
    """Greedy answers, up to sep or end of text; 'cut': max_new_tokens ended it."""
    longest = max(len(prompt_ids(task.examples[n], task, model, tokenizer, opt)) for group in groups for n in group)
    size = min(opt.batch_size, sum(map(len, groups)))
    for n, ids in model.generate_each(feed, size, longest, max_new_tokens=opt.max_new_tokens,
                                      stop_ids=(tokenizer.sep_id, tokenizer.eot_id)):
        yield n, {'text': tokenizer.decode(ids).strip(), 'cut': len(ids) >= opt.max_new_tokens}


def choose_each(model, tokenizer, task, opt, groups, feed):
    """The nats of each choice after its context, summed over its tokens, and the number of these."""
    while (given := feed(opt.batch_size)) is not None:
        numbers, prompts, *pictures = given
        contexts, choices, owner = [], [], []
        answers = {n: {} for n in numbers}
        for n, context in zip(numbers, prompts):
            e, by_start = task.examples[n], {}
            for j, ids in enumerate(choice_ids(e, task, tokenizer)):
                if not ids:
                    raise UserError(f"{task.name}: example {e.id} has a choice {e.choices[j]!r} without any token")
                # as lm-eval: what does not fit is cut from the left of the context, never from the choice or an image
                over = max(0, len(context) + len(ids) - 1 - opt.max_len)
                by_start.setdefault(0 if e.image else min(over, len(context) - 1), []).append((j, ids))
            for start, options in by_start.items():              # one, unless the context is cut
                contexts.append(context[start:])
                choices.append([ids for _, ids in options])
                owner.append((n, [j for j, _ in options]))
        nats, _ = model.choice_nats(contexts, choices, *pictures)
        for (n, which), options, values in zip(owner, choices, nats):
            answers[n].update((j, (value, len(ids))) for j, ids, value in zip(which, options, values))
        for n, found in answers.items():
            values, sizes = zip(*(found[j] for j in range(len(found))))
            yield n, {'nats': list(values), 'n_token': list(sizes)}


# --- a journal: an evaluation that was killed goes on -------------------------------------------------------------

def question_keys(task, settings):
    """What the answer to each question of a task depends on, as a hash; settings: any JSON value, part of it."""
    start = hashlib.sha256(json.dumps([settings, task.layout, task.delimiter]).encode())
    keys = []
    for e in task.examples:
        key = start.copy()
        key.update(json.dumps([e.prompt, e.image, e.choices]).encode())
        keys.append(key.hexdigest()[:24])
    return keys


def journal_files(folder, task):
    return sorted(glob.glob(os.path.join(glob.escape(folder), f'{glob.escape(task.name)}.*jsonl')))


def journal_read(files):
    """{one of question_keys: answer} of journals; what a kill has torn is passed over."""
    answers = {}
    for path in files:
        with reading(path, 'a journal'), open(path, encoding='utf-8', errors='replace') as f:
            for line in f:
                with contextlib.suppress(ValueError, TypeError, RecursionError):
                    key, answer = json.loads(line)
                    answers[str(key)] = answer
    return answers


@contextlib.contextmanager
def journal_open(path):
    """Gives write(key, answer), which appends a line to the journal; a kill leaves the lines before it."""
    with reading(path, 'a journal'):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        file = open(path, 'a', encoding='utf-8', buffering=1)
    with file:
        file.write('\n')                                     # ends a line that a kill has torn
        yield lambda key, answer: file.write(json.dumps([key, answer]) + '\n')
