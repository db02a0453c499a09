"""
Scores as functions of scores: choices, intervals, what guessers score, the paper's stable score (arXiv 2503.07603,
section 2.2, tables 8 and 9), the results entry of one benchmark. Nothing here reads a file or asks a model.
"""
import functools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import numpy as np

from errors import NUMBER, Field, UserError
from metrics import box_iou, letterbox_box, normalize_caption, parse_box, phrase_f1, vqa_accuracy

# --- intervals ----------------------------------------------------------------------------------------------------

Z95 = 1.959963984540054


def wilson_interval(share, n):
    """95 % Wilson interval of a share of n yes/no outcomes, as (low, high) in 0..1."""
    z2 = Z95 ** 2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # the share lies inside; rounding could put it outside by its last bit
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def mean_interval(scores):
    """
    95 % interval of a mean of scores in 0..1: Wilson when all are 0 or 1 or all alike, else normal with the sample's
    deviation. Questions count as independent; several on one image make the true interval somewhat wider.
    """
    n, mean = len(scores), sum(scores) / len(scores)
    if all(s in (0, 1) for s in scores) or len(set(scores)) == 1:
        return wilson_interval(mean, n)
    half = Z95 * math.sqrt(sum((s - mean) ** 2 for s in scores) / (n - 1)) / math.sqrt(n)
    return max(0.0, mean - half), min(1.0, mean + half)


def paired_bootstrap(a, b, seed=21, n_draw=10_000, strata=None):
    """
    How much better b is than a: two models' scores of the same questions, in the same order.
    a, b     lists of scores, 0..1
    strata   a label per question: then each label's questions are drawn apart and the labels weigh the same (POPE)
    returns  {'n', 'a', 'b': means, 'difference': b - a, 'low', 'high': its 95 % interval, of means over n_draw draws of
             as many questions with replacement, 'differs': 0 lies outside}
    Raises ValueError for no scores or lists of different lengths.
    """
    if not a or len(a) != len(b):
        raise ValueError(f"paired_bootstrap: given {len(a)} and {len(b)} scores, expected as many, at least one")
    groups = defaultdict(list)
    for i, label in enumerate(strata or [''] * len(a)):
        groups[label].append(i)
    rng, drawn, means = np.random.default_rng(seed), np.zeros(n_draw), np.zeros(2)
    for _, rows in sorted(groups.items()):
        # few differences are distinct, so how often each is drawn is drawn at once
        values, counts = np.unique([b[i] - a[i] for i in rows], return_counts=True)
        drawn += rng.multinomial(len(rows), counts / len(rows), n_draw) @ values / len(rows) / len(groups)
        means += np.array([sum(a[i] for i in rows), sum(b[i] for i in rows)]) / len(rows) / len(groups)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {'n': len(a), 'a': float(means[0]), 'b': float(means[1]), 'difference': float(means[1] - means[0]),
            'low': float(low), 'high': float(high), 'differs': bool(low > 0 or high < 0)}


# --- what guessers score ------------------------------------------------------------------------------------------

def constant_baseline(test, score, n_candidate=20, max_fit=1000):
    """
    What the best constant answer per question type scores, chosen on the test questions themselves: an upper bound.
    test         list of (type, answers)
    score        score(candidate, answers) -> 0..1
    returns      (mean score on test, {type: constant}); the n_candidate most common answers of a type are tried on up
                 to max_fit of its questions
    """
    groups, best, total = defaultdict(list), {}, 0.0
    for kind, answers in test:
        groups[kind].append(tuple(answers))
    for kind, rows in groups.items():
        fit = Counter(rows if len(rows) <= max_fit else Random(21).sample(rows, max_fit)).items()   # many are alike
        common = Counter(answer for answers, n in fit for answer in answers * n)
        best[kind] = max((answer for answer, _ in common.most_common(n_candidate)), default='',
                         key=lambda c: sum(n * score(c, answers) for answers, n in fit))
        total += sum(n * score(best[kind], answers) for answers, n in Counter(rows).items())
    return total / max(len(test), 1), best


def uniform_baseline(test, score, partial=False, n_draw=100):
    """
    Expected score of an answer drawn evenly from the distinct answers of its question type; test and score as above.
    partial  other questions' answers can earn a part of the score: n_draw answers are drawn and scored. Without it
             only a question's own answers count, and the result is exact
    """
    known = defaultdict(set)
    for kind, answers in test:
        known[kind].update(answers)
    pools, rng, total = {kind: sorted(answers) for kind, answers in known.items()}, Random(21), 0.0
    for kind, answers in test:
        drawn = rng.sample(pools[kind], min(n_draw, len(pools[kind]))) if partial else set(answers)
        total += sum(score(guess, answers) for guess in drawn) / len(drawn if partial else pools[kind])
    return total / max(len(test), 1)


# --- the stable score ---------------------------------------------------------------------------------------------

# random baselines that reproduce the paper's table 8 to rounding; only their sum, 2.7333, can be recovered from it
TEXT_BASELINES_9 = {'agieval': .20, 'arc_easy': .25, 'conceptual_combinations': .25, 'cs_algorithms': .25, 'copa': .50,
                    'hellaswag': .25, 'math_qa': .20, 'piqa': .50, 'pubmed_qa': 1 / 3}
TEXT_BASELINES_10 = TEXT_BASELINES_9 | {'boolq': .50}       # appendix E lists BoolQ, table 8 leaves it out
# table 9 says that the first five sum to 1.00 and OCID adds 0; POPE's .50 is certain, VQAv2's yes/no prior our choice
VISION_BASELINES = {'textvqa': 0.0, 'refcoco': 0.0, 'pope': .50, 'gqa': 0.0, 'vqav2': .50, 'ocid_ref': 0.0}


def stable_score(scores, baselines):
    """
    Mean over tasks of score - random baseline (section 2.2), between -1 and 1.
    scores, baselines  dicts task -> fraction; a mean over the keys of `scores`
    Raises ValueError for empty scores or a task without a baseline.
    """
    if not scores:
        raise ValueError('stable_score: given no scores, expected at least one task')
    missing = sorted(set(scores) - set(baselines))
    if missing:
        raise ValueError(f"stable_score: no baseline for {', '.join(missing)}; known: {', '.join(sorted(baselines))}")
    return sum(scores[task] - baselines[task] for task in scores) / len(scores)


# --- one benchmark: questions and predictions to its results entry ------------------------------------------------

# other names of a text benchmark, as the harness, DCLM or the data set's page call it; the paper's AGIEval is SAT-EN
TEXT_ALIAS = {'sat_en': 'agieval', 'agieval_sat_en': 'agieval', 'agi_eval_sat_en': 'agieval', 'mathqa': 'math_qa',
              'pubmedqa': 'pubmed_qa', 'pubmed_qa_labeled': 'pubmed_qa', 'bigbench_cs_algorithms': 'cs_algorithms',
              'bigbench_conceptual_combinations': 'conceptual_combinations', 'hellaswag_zeroshot': 'hellaswag'} | {
    f'{prefix}_lsat_{part}': f'lsat_{part}' for prefix in ('agieval', 'agi_eval') for part in ('ar', 'lr', 'rc')}


@dataclass
class Example:
    """One question of a benchmark."""
    id: str
    prompt: str                                 # the question as the model reads it
    answers: list                               # what the scorer compares with; [index] when there are choices
    image: str = ''                             # path; '' = text only
    types: tuple = ()                           # labels; scores are also reported by label
    choices: list = None                        # None = the model writes its answer
    guesses: list = None                        # answers (indices of choices) that somebody could guess who sees the
                                                # image, but not what is asked about it


@dataclass
class Task:
    """One benchmark: its questions and how an answer is scored."""
    name: str
    kind: str
    examples: list
    score: Callable                             # (prediction, answers) -> 0..1, or None when malformed; see `scored`
    layout: str = 'instruct'                    # how the model is asked: 'instruct' = a question, as in fine-tuning;
                                                # 'caption' = the image alone, as in stage 2; 'text' = plain text
    norm: str = 'acc'                           # how choices are compared: see `choose`
    delimiter: str = None                       # 'text': what stands between prompt and choice, which are tokenised as
                                                # one text (lm-eval); None = apart, the choice behind a space (DCLM)
    read: Callable = None                       # (what the model wrote, prompt) -> the answer in it, '' = none
    boxes: bool = False                         # answers are boxes, which count the pixels of images as stored: these
                                                # are not turned as their EXIF says
    by_label: bool = False                      # n_example counts the questions of each first label apart
    skipped: list = field(default_factory=list)  # ids of questions left out, their images being missing
    variant: str = ''                           # which published scoring rule
    extra: dict = field(default_factory=dict)   # name -> function(records) for results.json


NORMS = ('acc', 'acc_norm', 'acc_bytes', 'token')


def choose(nats, choices, n_token, norm):
    """
    The index of the most probable choice, the first of equals; None where any of nats is nan.
    nats      per choice -ln p(choice | prompt), summed over its tokens
    n_token   per choice the number of its tokens
    norm      lm-eval's 'acc' (the sum), 'acc_norm' (per character of the choice, without delimiter), 'acc_bytes' (per
              byte of it in UTF-8), or DCLM's 'token' (per token)
    """
    if any(value != value for value in nats):
        return None
    size = {'acc': lambda choice, n: 1, 'acc_norm': lambda choice, n: len(choice),
            'acc_bytes': lambda choice, n: len(choice.encode(errors='replace')), 'token': lambda choice, n: n}[norm]
    values = [value / max(size(choice, n), 1) for value, choice, n in zip(nats, choices, n_token)]
    return values.index(min(values))


SUBSET_SEED = 21              # vlm-evaluation shuffles the questions once with Random(21) and takes the first n


def subset(examples, n, split=lambda e: ''):
    """The first n per split of vlm-evaluation's fixed shuffle; all of them, in file order, for n = 0."""
    if not n:
        return examples
    order, taken, kept = list(range(len(examples))), Counter(), []
    Random(SUBSET_SEED).shuffle(order)
    for i in order:
        if taken[split(examples[i])] < n:
            taken[split(examples[i])] += 1
            kept.append(examples[i])
    return kept


def vqa_task(name, kind, examples, variant, others=()):
    """A Task scored by VQA soft accuracy; `others` are variants reported beside it."""
    def under(other):
        return lambda records: sum(vqa_accuracy(r['prediction'] or '', r['answers'], other)
                                   for r in records) / max(len(records), 1)
    extra = {f'accuracy_{other}': under(other) for other in others}
    return Task(name, kind, examples, functools.partial(vqa_accuracy, variant=variant), variant=variant, extra=extra)


def caption_task(name, examples):
    """A Task scored by phrase_f1; beside it stands how many equal one of the image's captions as a whole."""
    def exact_match(records):
        right = [normalize_caption(r['prediction']) in map(normalize_caption, r['answers']) for r in records]
        return sum(right) / max(len(right), 1)
    return Task(name, 'captions', examples, phrase_f1, layout='caption',
                variant='F1 of the phrases between full stops', extra={'exact_match': exact_match})


def scored(task, prediction, answers):
    """task.score; None (malformed) of an empty answer, and where the model could not choose."""
    return None if prediction is None or prediction == '' else task.score(prediction, answers)


def same(prediction, answers):
    """1.0 when the index of the chosen answer is a gold one."""
    return float(prediction in answers)


def unit_box(xywh, size, frame):
    """A COCO [x, y, w, h] in pixels as '[x1, y1, x2, y2]' over the image or its square, two decimals."""
    x, y, w, h = xywh
    box = [x / size[0], y / size[1], (x + w) / size[0], (y + h) / size[1]]
    box = letterbox_box(box, *size) if frame == 'letterbox' else box
    return json.dumps([round(v, 2) for v in box])


read_box, read_gold = (functools.lru_cache(maxsize=1 << 16)(reader) for reader in (parse_box, json.loads))


def score_box(prediction, answers, threshold=0.5):
    """1.0 at IoU >= threshold with the gold box, None when the prediction is not a box."""
    box = read_box(prediction)
    return None if box is None else float(box_iou(box, read_gold(answers[0])) >= threshold)


def blind_baselines(task, examples):
    """
    What guessers score on `examples`, to compare a model with.
    returns  ({'chance', 'constant', 'attribute'}, {types: the constant answer})
             chance     any of the choices or, without choices, any answer that questions of this type have
             constant   always the one answer that is best for this type of question, whatever the image
             attribute  any of the example's `guesses`, else the constant; None where no example has guesses
    """
    def score(prediction, answers):
        return scored(task, prediction, answers) or 0.0
    test = [(e.types, e.answers) for e in examples]
    # nearly every gold box is another one, so a constant box needs more candidates than a constant word
    constant, answers = constant_baseline(test, score, *((100, 300) if task.boxes else ()))
    if examples[0].choices:
        chance = sum(len(set(e.answers)) / len(e.choices) for e in examples) / len(test)
    else:
        chance = uniform_baseline(test, score, partial=task.layout == 'caption')
    attribute = None
    if any(e.guesses for e in examples):
        total = 0.0
        for e in examples:
            guesses = e.guesses or [answers.get(e.types, '')]
            total += sum(score(guess, e.answers) for guess in guesses) / len(guesses)
        attribute = total / len(test)
    return {'chance': chance, 'constant': constant, 'attribute': attribute}, answers


# what is read again of an entry of results.json
PART = {'n': Field(int, 1), 'score': Field(NUMBER), 'low': Field(NUMBER), 'high': Field(NUMBER),
        'chance': Field(NUMBER), 'constant': Field(NUMBER), 'attribute': Field(NUMBER, optional=True)}
RESULT = {**PART, 'types': Field(dict, of=Field(dict, of=PART)), 'kind': Field(str), 'variant': Field(str),
          'split': Field(str, optional=True), 'malformed': Field(int, 0)}


def summarise(task, predictions, nats=None, n_token=None):
    """
    One task's results entry, and its records, one dict per question.
    predictions  per example a str or the index of a choice; None when the model could not choose. What task.score
                 cannot read is counted as malformed and scores 0
    nats         per example what `choose` got for each choice, and n_token the same: recorded, and text choices are
                 also scored by every other norm
    """
    read = [task.read(p, e.prompt) if task.read and p else p for p, e in zip(predictions, task.examples)]
    scores = [scored(task, p, e.answers) for p, e in zip(read, task.examples)]
    records, labels = [], {}
    for n, (e, p, s) in enumerate(zip(task.examples, predictions, scores)):
        record = {'id': e.id, 'prompt': e.prompt, 'prediction': p, 'answers': e.answers, 'score': s or 0.0,
                  'malformed': s is None, 'types': list(e.types), 'image': e.image}
        if e.choices:
            record |= {'prediction': None if p is None else e.choices[p], 'answers': [e.choices[a] for a in e.answers],
                       'choices': e.choices, 'nats': nats[n] if nats else None,
                       'n_token': n_token[n] if n_token else None}
        records.append(record)
        for label in e.types:
            labels.setdefault(label, []).append(n)
    values = [s or 0.0 for s in scores]

    def part(rows):
        chosen = [values[n] for n in rows]
        low, high = mean_interval(chosen)
        blind, constants = blind_baselines(task, [task.examples[n] for n in rows])
        return {'n': len(chosen), 'score': sum(chosen) / len(chosen), 'low': low, 'high': high, **blind}, constants
    result, constants = part(range(len(values)))
    result['types'] = {label: part(rows)[0] for label, rows in sorted(labels.items())}
    if task.kind == 'pope':                                  # the unweighted mean of its splits
        splits = {e.types[0] for e in task.examples}
        result['score'] = sum(result['types'][split]['score'] for split in splits) / len(splits)
        result['low'], result['high'] = wilson_interval(result['score'], len(values))
    if task.kind == 'mmvp':                                  # both questions of a pair right (arXiv 2401.06209)
        of_id = {str(e.id): (value, e.answers[0]) for e, value in zip(task.examples, values)}
        whole = [(of_id[a], of_id[b]) for a, b in whole_pairs(of_id)]
        if not whole:
            raise UserError(f"{task.name}: none of its pairs is whole: ask all questions, with --n_example=0")
        right, alike = [min(a, b) for (a, _), (b, _) in whole], Counter(a for (_, a), (_, b) in whole if a == b)
        low, high = mean_interval(right)
        result |= dict(accuracy=result['score'], n=len(whole), score=sum(right) / len(whole), low=low, high=high,
                       chance=0.25, constant=max(alike.values(), default=0) / len(whole), attribute=None)
    if task.layout == 'text' and n_token:
        for norm in NORMS:
            picked = [choose(a, e.choices, b, norm) for e, a, b in zip(task.examples, nats, n_token)]
            result[norm] = sum(same(p, e.answers) for e, p in zip(task.examples, picked)) / len(picked)
    result |= {'kind': task.kind, 'variant': task.variant, 'malformed': sum(s is None for s in scores),
               'empty': sum(p == '' for p in predictions), 'skipped': len(task.skipped),
                'constant_answers': {'/'.join(types): answer for types, answer in constants.items()}}
    return result | {key: function(records) for key, function in task.extra.items()}, records


def whole_pairs(ids):
    """MMVP's pairs of questions, '1' and '2', '3' and '4', ..., both of which are among ids: [(id, id)]."""
    pairs = defaultdict(list)
    for i in filter(str.isdecimal, map(str, ids)):
        pairs[(int(i) - 1) // 2].append(i)
    return [tuple(pair) for pair in pairs.values() if len(pair) == 2]


def score_predictions(task, rows):
    """
    summarise's result for another model's answers, rows of {'id': str or int, 'prediction': str}. Of a question with
    choices it is the text of one of them, whatever its case; another text is malformed, as an empty one is.
    Raises UserError for an id that is missing, there twice, or no question's.
    """
    given, ids = {str(row['id']): row['prediction'].strip() for row in rows}, [e.id for e in task.examples]
    count = Counter(str(row['id']) for row in rows)
    for what, names in (('there twice', [i for i in count if count[i] > 1]),
                        ('missing', [i for i in ids if i not in count]),
                        ('of no question', sorted(set(count) - set(ids)))):
        if names:
            raise UserError(f"{len(names)} ids are {what}, first {names[0]!r}; expected the {len(ids)} ids of "
                            f"{task.name}, such as {ids[0]!r}")
    predictions = [given[i] for i in ids]
    if task.examples[0].choices:
        known = [[choice.strip().lower() for choice in e.choices] for e in task.examples]
        picked = [names.index(p.lower()) if p.lower() in names else None for names, p in zip(known, predictions)]
        result, records = summarise(task, picked)
        return result | {'empty': predictions.count('')}, records
    return summarise(task, predictions)


def stable_scores(results, vqav2_baseline=0.5):
    """
    The paper's stable scores of results.json's tasks, each over those of its tasks that are there.
    returns  dict title -> {'score', 'tasks': names, 'missing': names}
    """
    six = VISION_BASELINES | {'vqav2': vqav2_baseline}
    five = {task: b for task, b in six.items() if task != 'ocid_ref'}
    named = {TEXT_ALIAS.get(name, name): r['score'] for name, r in results.items() if r.get('split', 'val') == 'val'}
    out = {}
    for title, known in (('vision', five), ('vision with OCID', six), ('text, 9 tasks', TEXT_BASELINES_9),
                         ('text, 10 tasks', TEXT_BASELINES_10)):
        scores = {task: s for task, s in named.items() if task in known}
        if scores:
            out[title] = {'score': stable_score(scores, known), 'tasks': sorted(scores),
                          'missing': sorted(set(known) - set(scores))}
    text = {name: r for name, r in results.items() if r['kind'] == 'text'}
    if text:                                                 # any text tasks, each against its own file's chance
        score = stable_score({n: r['score'] for n, r in text.items()}, {n: r['chance'] for n, r in text.items()})
        out['text, as found'] = {'score': score, 'tasks': sorted(text), 'missing': []}
    return out


def table(results):
    """The printed table, in percent; TABLE_NOTES says what its columns are."""
    lines = [f"{'task':<28}{'n':>7}{'score':>8}{'+-95%':>7}{'chance':>8}{'blind':>8}{'malformed':>11}"]
    for name, result in results.items():
        rows = [(name, result)] + [('  ' + label, row) for label, row in result['types'].items()]
        for title, row in rows:
            half_width = (row['high'] - row['low']) / 2
            blind = max(row['constant'], row['attribute'] or 0)
            malformed = f"{row['malformed']:>11}" if row is result else ''
            lines.append(f"{title:<28}{row['n']:>7}{100 * row['score']:>8.2f}{100 * half_width:>7.2f}"
                         f"{100 * row['chance']:>8.2f}{100 * blind:>8.2f}{malformed}")
    return '\n'.join(lines)


TABLE_NOTES = """\
score: in percent; +-95%: half the width of its 95 % confidence interval
chance: the score of random answers: any of the choices, or any answer that occurs for this type of question
blind: the score of the better of two guessers. One gives every question of a type the same answer, the best there is.
       The other picks at random among what the image shows; it is there where the files say what that is
malformed: answers that could not be read; they score 0
stable score: mean of score - random baseline; RefCOCO's val, TextVQA without OCR tokens, AGIEval's SAT-EN"""
