"""
The score of one answer: VQA soft accuracy in its four published variants, GQA, boxes, captions, POPE. Pure functions;
each number is the published evaluator's, with its quirks.
"""
import ast
import functools
import re
import string
import warnings
from collections import Counter

# --- VQA soft accuracy --------------------------------------------------------------------------------------------

NUMBERS = {word: str(i) for i, word in enumerate(
    'zero one two three four five six seven eight nine ten'.split())} | {'none': '0'}
ARTICLES = {'a', 'an', 'the'}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'                     # not . : ' & % $ # *
DIGIT_COMMA = re.compile(r'\d,\d')
# the official pattern: `(?!<=\d)` was meant as a lookbehind and always passes, so every '.' not before a digit goes
PERIOD = re.compile(r'(?!<=\d)(\.)(?!\d)')
PERIOD_LIMIT = 32                                           # the official sub() gets re.UNICODE (= 32) as its count

# the official table, 'dont' -> "don't", has 120 entries (GT-Vision-Lab/VQA, vqaEval.py); 117 of them are one of these
# words with one of its apostrophes left out
CONTRACTED = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
he'd he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am mightn't mightn't've might've
mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's
there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've""".split()
CONTRACTIONS = {"let's": "let's", "she's": "she's", "somebody'd": 'somebodyd'} | {
    word[:i] + word[i + 1:]: word for word in CONTRACTED for i, letter in enumerate(word) if letter == "'"}
# the same table as VizWiz's evaluator holds it: backticks instead of apostrophes, but for ten entries
KEPT_VALUES = {'aint', 'arent', 'cant', 'couldve', 'couldnt', 'weve', 'wheres', 'whove'}
KEPT_KEYS = {"couldn'tve", "hadn'tve"}
VIZWIZ_CONTRACTIONS = {k if k in KEPT_KEYS else k.replace("'", '`'): v if k in KEPT_VALUES else v.replace("'", '`')
                       for k, v in CONTRACTIONS.items()}


def clean_space(text):
    """Step 1 of the official normalisation: newlines and tabs become spaces, ends stripped."""
    return text.replace('\n', ' ').replace('\t', ' ').strip()


@functools.lru_cache(maxsize=1 << 16)                       # VQAv2 val has 2.1 M answers, few of them distinct
def clean_punctuation(text):
    """Step 2: punctuation deleted where it touches a space (or anywhere in a text with '1,000'), else made a space."""
    out, comma = text, DIGIT_COMMA.search(text) is not None
    for p in PUNCTUATION:
        out = out.replace(p, '' if comma or p + ' ' in text or ' ' + p in text else ' ')
    return PERIOD.sub('', out, count=PERIOD_LIMIT)


@functools.lru_cache(maxsize=1 << 16)
def clean_words(text, vizwiz=False):
    """Step 3: lower case, number words to digits, articles dropped, contractions given their apostrophe."""
    table = VIZWIZ_CONTRACTIONS if vizwiz else CONTRACTIONS
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return ' '.join(table.get(word, word) for word in words if word not in ARTICLES)


def normalize_m4c(text):
    """TextVQA's normalisation (M4C evaluator): lower, no ',' or '?', "'s" apart, then the official steps."""
    text = text.lower().replace(',', '').replace('?', '').replace("'s", " 's").strip()
    return clean_words(clean_punctuation(clean_space(text)))


def vqa_accuracy(prediction, answers, variant='official'):
    """
    VQA soft accuracy: mean over annotators of min(1, matches among the others / 3), after the variant's normalisation.
    prediction  str
    answers     the annotators' answers, str or dicts with 'answer'; never modified; 'm4c' takes exactly 10
    variant     'official' (VQA repository), 'vlm-eval' (TRI-ML/vlm-evaluation, VQAv2), 'm4c' (TextVQA), 'vizwiz'
    returns     0..1; with 10 annotators and k matches 0, .3, .6, .9, 1
    Raises ValueError for no answers, an unknown variant, or other than 10 answers with 'm4c'.
    """
    answers = [a['answer'] if isinstance(a, dict) else a for a in answers]
    if not answers:
        raise ValueError("vqa_accuracy: given no answers, expected the annotators' answers (10)")
    if variant == 'official':                               # only disagreeing annotators are normalised
        answers, prediction = [clean_space(a) for a in answers], clean_space(prediction)
        if len(set(answers)) > 1:
            answers = [clean_words(clean_punctuation(a)) for a in answers]
            prediction = clean_words(clean_punctuation(prediction))
    elif variant == 'vlm-eval':                             # answers keep case, digits and articles
        answers = [clean_punctuation(a) for a in answers]
        prediction = clean_words(clean_punctuation(clean_space(prediction)))
    elif variant == 'm4c':
        if len(answers) != 10:
            raise ValueError(f"vqa_accuracy: variant 'm4c' is defined for 10 answers, given {len(answers)}")
        answers, prediction = [normalize_m4c(a) for a in answers], normalize_m4c(prediction)
    elif variant == 'vizwiz':                               # answers stay raw
        prediction = clean_words(clean_punctuation(clean_space(prediction)), vizwiz=True)
    else:
        raise ValueError(f"vqa_accuracy: variant {variant!r}, expected 'official', 'vlm-eval', 'm4c' or 'vizwiz'")
    n_match = sum(a == prediction for a in answers)
    if n_match == 0:
        return 0.0
    # an annotator who agrees sees one match less among the others
    seen = n_match * min(3, n_match - 1) + (len(answers) - n_match) * min(3, n_match)
    return seen / (3 * len(answers))


def gqa_match(prediction, answer):
    """GQA as vlm-evaluation scores it: punctuation deleted and lower case on the prediction alone, then equality."""
    return float(prediction.translate(str.maketrans('', '', string.punctuation)).lower() == answer)


# --- boxes --------------------------------------------------------------------------------------------------------

MAX_BOX_CHARS = 200                                         # a box takes about 30; nothing longer reaches the parser


def parse_box(text):
    """
    A predicted box as vlm-evaluation reads it: the whole text is a literal list [x1, y1, x2, y2] inside [0, 1].
    returns  list of 4 numbers with x1 < x2 and y1 < y2, or None for anything else
    """
    if len(text) > MAX_BOX_CHARS:
        return None
    try:
        with warnings.catch_warnings():                     # '[1](2)' makes the parser warn on stderr
            warnings.simplefilter('ignore')
            box = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    if not isinstance(box, list) or len(box) != 4 or not all(type(v) in (int, float) and 0 <= v <= 1 for v in box):
        return None
    return box if box[0] < box[2] and box[1] < box[3] else None


def box_iou(a, b):
    """Intersection over union of two xyxy boxes, plain areas (no +1); 0.0 when either is degenerate or inverted."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    sides = (a[2] - a[0], a[3] - a[1], b[2] - b[0], b[3] - b[1])
    if not (width > 0 and height > 0 and all(s > 0 for s in sides)):          # `not >` so that nan gives 0 too
        return 0.0
    inside = width * height
    return inside / (sides[0] * sides[1] + sides[2] * sides[3] - inside)


def letterbox_box(box, width, height):
    """A box relative to a (width, height) image, given relative to the centred square that the image is padded to."""
    side = max(width, height)
    left, top = (side - width) / 2, (side - height) / 2
    return [(box[0] * width + left) / side, (box[1] * height + top) / side,
            (box[2] * width + left) / side, (box[3] * height + top) / side]


# --- captions -----------------------------------------------------------------------------------------------------

def normalize_caption(text):
    """Lower case, single spaces."""
    return ' '.join(text.lower().split())


def phrases(text):
    """The set of a caption's phrases, each of which a full stop ends: 'A dog.  a red ball .' has two."""
    return {normalize_caption(phrase) for phrase in text.split('.')} - {''}


def phrase_f1(prediction, references):
    """
    F1 of the phrases of a caption: the harmonic mean of the share of its phrases that are right and the share of the
    right phrases that it has. Order, case, spaces and repetitions do not matter.
    prediction  str
    references  list of str, the captions that the image has; the one that fits best counts
    returns     0..1
    """
    said = phrases(prediction)
    return max((2 * len(said & right) / (len(said) + len(right)) for right in map(phrases, references) if said & right),
               default=0.0)


# --- POPE ---------------------------------------------------------------------------------------------------------

def pope_answer(text):
    """'yes' or 'no' from a free answer by LLaVA's rule: 'no' if the first sentence holds No, not or no, else 'yes'."""
    words = text.split('.')[0].replace(',', '').split(' ')
    return 'no' if {'No', 'not', 'no'} & set(words) else 'yes'


def mmvp_choice(text, prompt):
    """
    'a' or 'b' of a free answer to a question of MMVP, '' where it says neither or both: the letter in brackets or alone
    at the beginning, else the option that it names. A parser offline in the stead of GPT-4, which the authors ask.
    """
    text = text.lower()
    said = {*re.findall(r'\(([ab])\)', text)} or {*re.findall(r'^\s*([ab])(?:[.):,]|\s*$)', text)}
    said = said or {letter for letter, option in re.findall(r'\(([ab])\)\s*([^()]+)', prompt.lower())
                    if re.search(rf'(?<!\w){re.escape(option.strip())}(?!\w)', text)}
    return said.pop() if len(said) == 1 else ''


def magnifier_choice(text, prompt):
    """
    The letter of a free answer by MagnifierBench's own rule, '' for none: after 'The answer is', else the first capital
    A to D anywhere, so that 'A red car' is A whatever the options are, else the first option that it names.
    """
    if match := re.search(r'The answer is ([A-D])', text) or re.search('([A-D])', text):
        return match[1]
    options = re.findall(r'\b([A-D])\. (.*?)(?=,? [A-D]\. |$)', prompt)
    return next((letter for letter, option in options if option.strip(' .').lower() in text.lower()), '')


def pope_metrics(predictions, labels):
    """Accuracy, precision, recall, F1 of 'yes' and the share of 'yes' (arXiv 2305.10355) from lists of 'yes'/'no'."""
    pairs = Counter(zip(predictions, labels))
    hit, false_alarm, miss = pairs['yes', 'yes'], pairs['yes', 'no'], pairs['no', 'yes']
    n = len(labels)
    return {'accuracy': sum(p == y for p, y in zip(predictions, labels)) / max(n, 1),
            'precision': hit / max(hit + false_alarm, 1), 'recall': hit / max(hit + miss, 1),
            'f1': 2 * hit / max(2 * hit + false_alarm + miss, 1), 'yes_share': (hit + false_alarm) / max(n, 1)}
