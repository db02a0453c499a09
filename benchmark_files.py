"""
The files of benchmarks: their rows, checked, and where their images lie. What is asked about a row is benchmarks.py's.
"""
import functools
import json
import os
import pickle

from errors import NUMBER, Field, UserError, check, reading
from files import read_whole
from scorers import RESULT, Example

IMAGE_FOLDERS = ('', 'images', 'val2014', 'train2014', 'train_images', 'train2017', 'val2017', 'val', 'OCID-dataset')
IMAGE_ENDINGS = ('.jpg', '.png', '.jpeg')


# --- tables: files to checked rows --------------------------------------------------------------------------------

ID = Field((int, str))
TEXT = Field(str, 1, 20_000)
TEN = Field(list, 10, 10, of=Field(dict, of={'answer': Field(str)}))      # annotators, for whom the scores are defined
FREE = {                        # any row: labels by which it is also reported; what "blind" is, in no official file
    'question_type': Field((str, list), optional=True), 'blind_answers': Field(list, of=Field(str), optional=True)}
ROWS = {                        # what the rows of each official file have
    'vqav2 question': {'question_id': ID, 'question': TEXT},
    'vqav2 answers': {'question_id': ID, 'image_id': Field(int, 0), 'answers': TEN},
    'textvqa': {'question_id': ID, 'image_id': ID, 'question': TEXT, 'answers': Field(list, 10, 10, of=Field(str))},
    'textvqa ocr': {'text': Field(str, 1)},
    'pope': {'question_id': ID, 'image': TEXT, 'text': TEXT, 'label': Field(str)},
    'refcoco image': {'id': ID, 'width': Field(NUMBER, 1, 1e6), 'height': Field(NUMBER, 1, 1e6)},
    'refcoco object': {'id': ID, 'image_id': Field(int, 0), 'bbox': Field(list, 4, 4, of=Field(NUMBER, -1e6, 1e6))},
    'refcoco ref': {'ann_id': ID, 'image_id': Field(int, 0), 'split': Field(str),
                    'sentences': Field(list, of=Field(dict, of={'sent': TEXT}))},
    'gqa': {'question': TEXT, 'imageId': ID, 'answer': Field(str), 'isBalanced': Field(bool, optional=True),
            'types': Field(dict, of={'structural': Field(str)})},
    'vizwiz': {'image': TEXT, 'question': TEXT, 'answerable': Field(int, 0, 1), 'answers': TEN},
    'ocid_ref': {'scene_path': TEXT, 'sentence': TEXT, 'bbox': Field(str, 7, 99), 'take_id': Field(int, 0, 20)},
    'vsr': {'image': TEXT, 'caption': TEXT, 'label': Field(int, 0, 1), 'relation': Field(str)},
    'tallyqa': {'question_id': ID, 'image': TEXT, 'question': TEXT, 'answer': Field(int, 0, 15),
                'issimple': Field(bool)},
    'ai2d': {'imageName': TEXT, 'questions': Field(dict, of=Field(dict, of={
        'questionId': ID, 'correctAnswer': Field(int, 0, 3), 'answerTexts': Field(list, 4, 4, of=Field(str))}))},
    'captions': {'image': TEXT, 'caption': TEXT},
    'text': {'query': Field(str), 'choices': Field(list, 2, 999, of=Field(str)), 'gold': Field((int, list), 0)},
}


def read_table(path, key, fields, unique=''):
    """
    The rows of a benchmark's JSON file, checked.
    key      the list of rows stands under it; None = a file with one JSON object a line; '' = the file is the list, or
             an object id -> row, whose ids become the rows' `id`
    fields   what each row has, a dict name -> Field; unique: the field in which no two rows may agree
    returns  list of dicts
    Raises UserError that names the file, the entry and what is wrong with it.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: not a file")
    with reading(path, 'JSON'), open(path, encoding='utf-8') as f:
        if key is None:
            rows = []
            for i, line in enumerate(f, 1):
                if line.strip():
                    with reading(f'{path}:{i}', 'JSON'):
                        rows.append(json.loads(line))
        else:
            content = json.load(f)
            rows = content if not key else content.get(key) if isinstance(content, dict) else None
            if not key and isinstance(rows, dict):
                rows = [row | {'id': name} if isinstance(row, dict) else row for name, row in rows.items()]
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected " + (f"an object with a list under '{key}'" if key else 'a list of rows'))
    return check_rows(rows, path, fields, unique)


class PlainUnpickler(pickle.Unpickler):
    """RefCOCO releases refs as a pickle of lists, dicts, numbers and strings; anything that names code is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}, and a refs file holds only lists, dicts and strings")


def read_refs(path):
    """The rows of an official refs(unc).p file, checked as in read_table and read without running any code."""
    with reading(path, 'RefCOCO refs'), open(path, 'rb') as f:
        refs = PlainUnpickler(f).load()
    if not isinstance(refs, list):
        raise UserError(f"{path}: holds a {type(refs).__name__}, expected the list of refs")
    return check_rows(refs, path, ROWS['refcoco ref'])


RESULTS = {'tasks': Field(dict, 1, of=Field(dict, of=RESULT))}


def read_results(path, fields=RESULTS):
    """The content of evaluate.py's results.json, with these fields."""
    with reading(path, 'a results.json of evaluate.py'):
        content = json.loads(read_whole(path, 64 << 20))
        check(content, Field(dict, of=fields), path)
    return content


def check_rows(rows, path, fields, unique=''):
    """`rows` if each has the fields and no two agree in the field `unique`; else UserError."""
    seen = set()
    for i, row in enumerate(rows):
        check(row, Field(dict, of=FREE | fields), f"{path}: entry {i}")
        if unique and row[unique] in seen:
            raise UserError(f"{path}: entry {i} has the {unique} {row[unique]!r} of an entry before it")
        seen.add(row[unique] if unique else i)
    return rows


def check_known(rows, path, field, known, other):
    """UserError unless the `field` of every row is among `known`, which the file `other` holds."""
    for i, row in enumerate(rows):
        if row[field] not in known:
            raise UserError(f"{path}: entry {i} has {field} {row[field]}, which {other} does not hold")


def example_of(row, id, prompt, answers, image='', labels=(), choices=None, names=None, guesses=None):
    """
    The Example of a row, with the two fields that any row of any benchmark may have: FREE.
    image    a file's name, whose ending does not matter
    labels   stand before the row's own
    names    of the choices in the row, where they differ from `choices`
    """
    types = row.get('question_type') or ()
    types = (types,) if isinstance(types, str) else types
    if row.get('blind_answers') and not guesses:
        guesses, names = row['blind_answers'], names or choices
        guesses = [names.index(guess) for guess in guesses] if names else guesses
    return Example(str(id), prompt, answers, os.path.splitext(image)[0], (*labels, *types), choices, guesses)


# --- images -------------------------------------------------------------------------------------------------------

def image_path(name, folders, endings, there=os.path.isfile):
    """The first name + ending that is there in one of the folders or their IMAGE_FOLDERS; '' = none, or elsewhere."""
    if os.path.isabs(name) or '..' in name.split('/'):       # not among the benchmark's files, whatever it is
        return ''
    paths = (os.path.join(folder, sub, name + ending) for folder in folders for sub in IMAGE_FOLDERS
             for ending in endings)
    return next(filter(there, paths), '')


def find_images(folder, task, max_missing=0):
    """
    Replace the `image` of each example, a file's name without its ending, by the file's path. At most max_missing
    examples without one are left out, into task.skipped; else UserError says how many they are, and the first.
    """
    @functools.cache
    def names(place):
        return frozenset(os.listdir(place)) if os.path.isdir(place) else frozenset()

    def there(path):
        return os.path.basename(path) in names(os.path.dirname(path))
    paths = {e.image: image_path(e.image, (folder, os.path.dirname(folder)), IMAGE_ENDINGS, there)
             for e in task.examples if e.image}
    missing = [stem for stem, path in paths.items() if not path]
    task.skipped = [e.id for e in task.examples if e.image and not paths[e.image]]
    if len(task.skipped) > max_missing:
        raise UserError(f"{folder}: {len(missing)} of {len(paths)} images missing, first {missing[0][:99]}.jpg; "
                        f"expected there or in {os.path.dirname(folder)}, or in the folders "
                        f"{', '.join(IMAGE_FOLDERS[1:])} of either, or max_bad_samples={len(task.skipped)} to leave "
                        "their questions out")
    if missing:
        print(f"!!! {task.name}: {len(task.skipped)} questions left out, {len(missing)} images missing, first "
              f"{missing[0][:99]}.jpg in {folder}")
        task.examples = [e for e in task.examples if not e.image or paths[e.image]]
    for example in task.examples:
        example.image = paths.get(example.image, '')
