"""
What test_hostile.py starts for each damaged file: the project's own way to read one kind of file, to its last item.
    tests/hostile_read.py KIND FOLDER
"""
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks import find_tasks, list_tasks
from checkpoint import load_vlm
from configurator import configure
from data import CaptionSource, InstructSource, TextSource, load_tokenizer
from errors import UserError, user_error_hook
from evaluate import default_options, load_image
from images import View
from mixture import BadSample, Mixture, collate
from model import load_openlm
from prepare import documents
from report import curves, ladder, results_page
from scorers import summarise
from vision import SigLIP

ROOT = Path(__file__).resolve().parent.parent


def codec(folder):
    """Any tokenizer will do where text is only counted."""
    return load_tokenizer(str(next(p for p in (folder / 'tokenizer.model', folder) if p.exists())))


def every_item(source):
    """Read a source to its end as a run does; what is bad comes last, so that each item is tried."""
    mixture = Mixture([source], [1], seed=1, max_bad_samples=1 << 30)
    bad = list(source.damaged)
    for n in range(len(source)):
        source.outline(n)
        try:
            sample = mixture[n]
        except BadSample as e:                   # a hundred in a row
            bad.append(str(e))
            continue
        bad += sample.bad
        collate([sample], source.tokenizer.pad_id, source.seq_len, [source.name])
    if bad:
        raise UserError(bad[0])


def text(folder, suffix):
    every_item(TextSource(str(folder / f'*.{suffix}'), codec(folder), 48))


def captions(folder):
    for field, pattern in (('auto', '*.tar'), ('syn', '1.tar')):
        every_item(CaptionSource(str(folder / pattern), codec(folder), 48, 4, 28, caption_field=field))


def instruct(folder):
    for file in ('llava.json', 'llava.jsonl'):
        for more in ({}, {'split_turns': True, 'loss_average': 'answer'}):
            every_item(InstructSource(str(folder / file), str(folder / 'images'), codec(folder), 96, 4, 28, **more))


def index(folder):
    text(folder / 'text', 'tar')
    captions(folder / 'captions')
    instruct(folder / 'instruct')


def tokenizer(folder):
    codec = load_tokenizer(str(folder))
    for words in ('a red wall , 7', '<|endoftext|> \u20ac \udc80', ''):
        codec.decode(codec.encode(words) + codec.encode_next(words) + [0, 1, 2, codec.image_id, 10 ** 6])


def images(folder):
    for path in sorted(folder.iterdir()):
        for resize in ('letterbox', 'naive', 'crop'):
            load_image(str(path), View(28, 4, resize))


def encoder(folder):
    with torch.no_grad():
        eye = SigLIP.from_pretrained(str(folder))
        eye(torch.zeros(1, 3, eye.image_size, eye.image_size, dtype=torch.uint8))


def openlm(path):
    with torch.no_grad():
        load_openlm(str(path))(torch.arange(8)[None])


def checkpoint(folder):
    load_vlm(str(folder))


def benchmarks(folder):
    for task in find_tasks(default_options(eval_dir=str(folder), tasks=','.join(list_tasks(str(folder))))):
        for example in task.examples:
            if example.image:
                load_image(example.image, View(28, 4), not task.boxes)
        if task.examples[0].choices is None:
            summarise(task, ['a red wall'] * len(task.examples))
        else:
            summarise(task, [0] * len(task.examples), *[[[1.0] * len(e.choices) for e in task.examples]] * 2)


def config(folder):
    configure(dict(__file__=str(ROOT / 'pretrain.py')), [str(path) for path in sorted(folder.glob('*.py'))])


def report(folder):
    ladder([str(folder)])
    curves([str(folder)], str(folder / 'curves.svg'))
    results_page(str(folder / 'ckpt_100' / 'eval' / 'results.json'))


def corpus(folder):
    assert all(isinstance(line, str) for line in documents(str(folder)))


READ = SimpleNamespace(
    text_tar=lambda folder: text(folder, 'tar'), text_bin=lambda folder: text(folder, 'bin'), captions=captions,
    instruct=instruct, index=index, tokenizer=tokenizer, images=images, encoder=encoder, openlm_folder=openlm,
    openlm_pt=lambda folder: openlm(folder / 'open.pt'), checkpoint=checkpoint, benchmarks=benchmarks, config=config,
    corpus=corpus, report=report)

if __name__ == '__main__':
    sys.excepthook = user_error_hook
    getattr(READ, sys.argv[1])(Path(sys.argv[2]))
