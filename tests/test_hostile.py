"""
Every kind of file the project reads, damaged: exit status 0, or status 1 and one line on stderr that names the file.
And a hostile machine: processes killed, streams closed, a strange environment, folders that change while they are read.

    CKPT80_HOSTILE=10 pytest tests/test_hostile.py -k damaged          # ten times as many cases

A case is a pure function of its kind and its number, which a failure prints.
"""
import gzip
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import tarfile
import time
import zlib

import numpy as np
import pytest
import torch
from conftest import ROW, meta_of, mix, picture, same_weights, steps, write_captions, write_instructions, write_tar
from PIL import Image
from safetensors.torch import load_file, save_file
from test_benchmarks import VISION, write_eval_dir
from test_textbench import NAMES, make_rows, write_rows
from test_pretrain import KILL, SLOW, text, wait_for_lines

from checkpoint import load_vlm
from data import load_tokenizer
from model import Decoder, ModelConfig, save_openlm
from files import write_file

TIMES = int(os.environ.get('CKPT80_HOSTILE', 1))
LIMIT_S = 60                                             # a case that takes longer hangs; most take 0.1 s
TOGETHER = 3                                             # cases that run at a time


# --- damage: functions of (bytes, rng) -> (bytes, what was done) ------------------------------------------------------

def flip(data, rng):
    places = sorted(rng.randrange(len(data)) for _ in range(rng.choice((1, 1, 2, 8))))
    data = bytearray(data)
    for place in places:
        data[place] ^= rng.randrange(1, 256)
    return bytes(data), f'bytes {places} flipped'


def flip_header(data, rng):
    changed, what = flip(data[:200], rng)
    return changed + data[200:], what


def cut(data, rng):
    at = rng.choice((rng.randrange(len(data)), rng.randrange(min(len(data), 64)), len(data) - 1))
    return data[:at], f'cut to {at} of {len(data)} bytes'


def swap(data, rng):
    n = rng.choice((1, 16, 512))
    a, b = sorted(rng.randrange(max(1, len(data) - n)) for _ in range(2))
    n = min(n, max(1, b - a))
    return data[:a] + data[b:b + n] + data[a + n:b] + data[a:a + n] + data[b + n:], f'{n} bytes at {a} and {b} swapped'


def clear(data, rng):
    a, n = rng.randrange(len(data)), rng.choice((1, 64, 4096))
    return data[:a] + b'\0' * len(data[a:a + n]) + data[a + n:], f'{n} bytes at {a} zeroed'


def empty(data, rng):
    return b'', 'emptied'


def append(data, rng):
    return data + rng.choice((b'\0' * 100, b'{"', rng.randbytes(600))), 'garbage appended'


BYTES = (flip, flip, flip_header, cut, swap, clear, empty, append)
VALUES = (None, -5, 0, 3, 1e99, float('nan'), float('inf'), 'x', '', '../../etc/passwd', [], {}, [[]], {'x': 1}, True,
          10 ** 30, 10 ** 400, 1 << 62, 0.5, '\ud800', 'a\nb\0c')


def retype(value, rng):
    """One value somewhere in a tree of JSON: gone, or another."""
    value = json.loads(json.dumps(value))
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.03:
        new = rng.choice(VALUES)
        return new, f'all of it becomes {new!r:.60}'
    holder, path = value, []
    while True:                                          # one key of each level, so that long lists do not get it all
        key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        path.append(key)
        if not isinstance(holder[key], (dict, list)) or not holder[key] or rng.random() < 0.25:
            break
        holder = holder[key]
    if rng.random() < 0.25:
        del holder[key]
        return value, f'{path} removed'
    holder[key] = new = rng.choice(VALUES)
    return value, f'{path} becomes {new!r:.60}'


def json_value(data, rng):
    value, what = retype(json.loads(data), rng)
    return json.dumps(value).encode(), what


def task_value(data, rng):
    """In results.json only the tasks are read back, and only where all else is as it was."""
    content = json.loads(data)
    content['tasks'], what = retype(content['tasks'], rng)
    return json.dumps(content).encode(), f'tasks: {what}'


def json_text(data, rng):
    """What no parser gives back: nesting without end, a number without end, a byte order mark, a key twice."""
    what = rng.choice(('nesting', 'digits', 'mark', 'twice', 'nested'))
    spoilt = {'nesting': lambda: b'[' * 100_000, 'digits': lambda: b'9' * 5000, 'mark': lambda: b'\xef\xbb\xbf' + data,
              'twice': lambda: data + b'\n' + data,
              'nested': lambda: re.sub(rb'[0-9]+', lambda m: b'[' * 3000 + b']' * 3000, data, count=1)}
    return spoilt[what](), what


def json_lines(data, rng):
    lines = data.splitlines()
    i = rng.randrange(len(lines))
    lines[i], what = rng.choice((json_value, json_value, json_text))(lines[i], rng)
    return b'\n'.join(lines) + b'\n', f'line {i}: {what}'


def unpickled(data, rng):
    value, what = retype(pickle.loads(data), rng)
    return pickle.dumps(value, protocol=2), what


def tar_member(data, rng):
    """One member of a tar: another content or name, twice, or not at all."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar]
    i = rng.randrange(len(members))
    name, content = members[i]
    what = rng.choice(('content', 'content', 'content', 'gone', 'name', 'twice'))
    if what == 'content':
        packed = name.endswith('.gz')
        plain = gzip.decompress(content) if packed else content
        is_json = name.removesuffix('.gz').endswith('.json')
        change = rng.choice((json_value, json_value, json_text) if is_json else BYTES)
        plain, what = change(plain, rng)
        members[i] = name, gzip.compress(plain, mtime=0) if packed else plain
    elif what == 'gone':
        del members[i]
    elif what == 'name':
        odd = (name + 'x', '../' + name, '.' + name, 'a' * 300, name.replace('.', ''), 'a.b.c')
        members[i] = rng.choice(odd), content
    else:
        members.append(members[i])
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w', format=tarfile.GNU_FORMAT) as tar:
        for member, content in members:
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue(), f'member {name}: {what}'


def safetensors_header(data, rng):
    n = int.from_bytes(data[:8], 'little')
    header, what = rng.choice((json_value, json_value, json_text))(data[8:8 + n], rng)
    return len(header).to_bytes(8, 'little') + header + data[8 + n:], f'header: {what}'


def tensors_of(data, rng):
    """Tensors that fit the format, but are no weights."""
    state = torch.load(io.BytesIO(data), weights_only=True)
    held = state.get('state_dict', state)
    name = rng.choice(sorted(held))
    t = held[name]
    values = {'nan': t * float('nan'), 'int': t.long(), 'complex': t.to(torch.complex64), 'half': t.half(), 'list': [1],
              'flat': t.flatten(), 'empty': t[:0] if t.ndim else t, 'strided': t[:1].expand(t.shape) if t.ndim else t,
              'sparse': t.to_sparse() if t.ndim else t, 'meta': t.to('meta'), 'bool': t.bool(), 'none': None,
              'parameter': torch.nn.Parameter(t), 'huge': torch.empty(1).expand(1 << 40)}
    what = rng.choice(sorted(values))
    held[name] = values[what]
    if rng.random() < 0.1:
        held[17] = held.pop(name)
    out = io.BytesIO()
    torch.save(state, out)
    return out.getvalue(), f'{name} becomes {what}'


def index_of(data, rng):
    """An index that keeps its mark and whose checksum fits, so that it is believed."""
    line, _, body = data.partition(b'\n')
    head = json.loads(line)
    shape = len(head['columns']), head['n']
    columns, names = np.frombuffer(body, '<i8', shape[0] * shape[1]).reshape(shape).copy(), body[8 * shape[0] * shape[1]:]
    what = rng.choice(('number', 'number', 'number', 'column', 'names', 'cut', 'head'))
    if what == 'number':
        columns[rng.randrange(shape[0]), rng.randrange(shape[1])] = rng.choice((-1, 0, 1, 7, 5000, -2**63, 2**63 - 1, 1 << 61))
    elif what == 'column':
        columns[rng.randrange(shape[0])] += rng.choice((1, -1, 512, 5000))
    elif what == 'names':
        names, _ = flip(names, rng)
    body = columns.tobytes() + names
    if what == 'cut':
        body, head['n'] = body[:8 * shape[0] * (shape[1] - 1)], shape[1] - 1
        head['n_byte'] = 0
    if what == 'head':
        head, what = retype({key: value for key, value in head.items() if key not in ('version', 'size', 'time')}, rng)
        head = {**json.loads(line), **head} if isinstance(head, dict) else head
    if isinstance(head, dict):
        head['crc'] = zlib.crc32(body)
    return json.dumps(head).encode() + b'\n' + body, f'index: {what}'


def python_value(data, rng):
    lines = data.decode().splitlines()
    i = rng.choice([i for i, line in enumerate(lines) if '=' in line])
    left, _, _ = lines[i].partition('=')
    lines[i] = f'{left}= ' + rng.choice(('None', '-5', '1e99', 'float("nan")', '"x"', '[]', '{}', 'True', '10 ** 400', '1 / 0',
                                         'undefined', '__import__("nothing")', '(', '(' * 500, 'next(iter(()))', 'exit(3)',
                                         'lambda: 1', 'b"x"', '(1,) * 3', '"\\d"', 'open("/nowhere")', 'input()',
                                         'object()', '(("a", float("nan")),)', '(("a", 1), ("a",))', '1j'))
    return '\n'.join(lines).encode(), f'line {i} becomes {lines[i]:.60}'


# --- what is damaged: kind: (a folder's maker, {pattern of its files: damages}, how a run reads it) --------------------

def read(kind):
    return lambda world, folder: ['tests/hostile_read.py', kind, folder]


def files_of(*names):
    """Copies of files and folders of the tiny world."""
    def make(world, folder):
        for name in names:
            source, target = world / name, folder / os.path.basename(name)
            shutil.copytree(source, target, symlinks=True) if source.is_dir() else shutil.copy2(source, target)
    return make


def make_text_bin(world, folder):
    files_of('data/tokenizer.model')(world, folder)
    codec = load_tokenizer(str(folder / 'tokenizer.model'))
    for n in (2000, 700):
        np.random.default_rng(n).integers(5, 300, n, dtype='<u2').tofile(folder / f'{n}.bin')
        write_file(str(folder / f'{n}.json'), {'tokenizer_sha256': codec.sha256, 'vocab_size': codec.vocab_size})


def make_text_tar(world, folder):
    files_of('data/tokenizer.model')(world, folder)
    rows = [[5 + (r * i) % 300 for i in range(ROW)] for r in range(4)]
    write_tar(folder / '0.tar', [(f'{r}.json', json.dumps(row).encode()) for r, row in enumerate(rows)])
    write_tar(folder / '1.tar', [(f'{r}.json.gz', gzip.compress(json.dumps(row).encode(), mtime=0))
                                 for r, row in enumerate(rows)])


def make_captions(world, folder):
    files_of('data/tokenizer.model')(world, folder)
    write_captions(folder / '0.tar', 3)
    about = {'caption': 'a wall', 'url': 'x', 'width': 3}
    write_tar(folder / '1.tar', [(f'{i}.{kind}', content) for i in range(2) for kind, content in (
        ('webp', picture('red', 'WEBP', i)), ('json', json.dumps(about).encode()),
        ('syn.json', json.dumps({'syn_text': ['a red wall', 'one wall']}).encode()))])


def make_instructions(world, folder):
    write_instructions(folder, 4)
    files_of('data/tokenizer.model')(world, folder)
    rows = json.loads((folder / 'llava.json').read_text())
    (folder / 'llava.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))


def make_index(world, folder):
    for name, make in (('text', make_text_tar), ('captions', make_captions), ('instruct', make_instructions)):
        (folder / name).mkdir()
        make(world, folder / name)
    import hostile_read
    hostile_read.index(folder)                           # writes the indexes


def make_json_tokenizer(world, folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    engine.train_from_iterator(['a red wall , 7', 'the cat sat on the mat'], trainers.BpeTrainer(
        vocab_size=280, special_tokens=['<|endoftext|>'], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    engine.save(str(folder / 'tokenizer.json'))


def make_images(world, folder):
    for kind, name in (('JPEG', 'a.jpg'), ('PNG', 'b.png'), ('WEBP', 'c.webp'), ('GIF', 'd.gif'), ('BMP', 'e.bmp'),
                       ('TIFF', 'f.tif'), ('PPM', 'g.ppm'), ('JPEG2000', 'h.jp2')):
        (folder / name).write_bytes(picture('red', kind, 1))
    grey = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 99)
    grey.save(folder / 'i.png')
    exif = Image.Exif()
    exif[0x0112], exif[0x010e] = 6, 'a wall'
    Image.new('RGBA', (30, 20), (200, 30, 30, 99)).save(folder / 'j.webp', exif=exif)
    Image.new('RGB', (30, 20), (200, 30, 30)).save(folder / 'k.jpg', exif=exif)


def make_sharded_encoder(world, folder):
    files_of('data/encoder/config.json', 'data/encoder/preprocessor_config.json')(world, folder)
    state = load_file(world / 'data' / 'encoder' / 'model.safetensors')
    names = {name: f'model-0000{i % 2 + 1}-of-00002.safetensors' for i, name in enumerate(sorted(state))}
    for file in set(names.values()):
        save_file({k: v for k, v in state.items() if names[k] == file}, folder / file)
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'metadata': {'total_size': 1}, 'weight_map': names}))


def make_openlm(world, folder):
    torch.manual_seed(0)
    decoder = Decoder(ModelConfig(2, 2, 16, vocab_size=50, seq_len=16, n_ffn=32))
    save_openlm(decoder, str(folder))
    save_openlm(decoder, str(folder / 'open.pt'))


def make_benchmarks(world, folder):
    write_eval_dir(folder)


def make_more_benchmarks(world, folder):
    for write in VISION.values():
        write(folder)
    for name in NAMES:
        write_rows(folder / 'text', name, make_rows(name, random.Random(1), 3))


def make_report(world, folder):
    files_of('out/two/log.jsonl')(world, folder)
    (folder / 'ckpt_100').mkdir()
    shutil.copytree(world / 'out' / 'results', folder / 'ckpt_100' / 'eval')


def make_corpus(world, folder):
    import zstandard
    lines = ''.join(json.dumps({'text': f'the wall {i} is red\n', 'id': i}) + '\n' for i in range(20)).encode()
    (folder / 'a.jsonl').write_bytes(lines)
    (folder / 'b.jsonl.gz').write_bytes(gzip.compress(lines, mtime=0))
    (folder / 'c.jsonl.zst').write_bytes(zstandard.compress(lines))
    (folder / 'd.txt').write_bytes('a wall \u20ac\n'.encode())


def resumed(world, folder):
    return ['pretrain.py', *mix(world, world / 'out' / 'tiny' / 'text'), '--save_every=0', '--stop_after=4',
            f'--out_dir={folder}']


def tuned(world, folder):
    return ['finetune.py', 'config/finetune.py', world / 'tiny.py', f'--init_from={folder / "ckpt_last"}',
            '--max_steps=2', '--stop_after=1', f'--out_dir={folder / "tuned"}']


def asked(world, folder):
    return ['evaluate.py', f'--ckpt={folder / "ckpt_last"}', '--prompt=a wall', '--max_new_tokens=2', '--n_thread=1',
            f'--image={world / "data" / "instruct" / "images" / "0.jpg"}']


def evaluated(world, folder):
    """Another task than the one whose results are there already."""
    return ['evaluate.py', f'--ckpt={world / "out" / "two" / "ckpt_last"}', f'--eval_dir={world / "eval"}', '--tasks=boolq',
            '--n_thread=1', '--max_new_tokens=2', f'--out_dir={folder / "results"}']


JSON = (json_value, json_value, json_value, json_text, flip, cut)
LINES = (json_lines, json_lines, flip, cut, append)
META = {'ckpt_last/meta.json': (json_value,) * 8 + (json_text, flip, cut, empty)}
WHOLE = {f'ckpt_last/{name}': BYTES for name in ('model.safetensors', 'encoder.safetensors', 'optim.pt', 'tokenizer.model')}
SAFETENSORS = (safetensors_header, safetensors_header, *BYTES)
run_folder, data = files_of(*(f'out/two/{name}' for name in ('ckpt_step_2', 'ckpt_last', 'log.jsonl'))), 'data/'

KINDS = {                                                # kind: (cases, maker, damages by file, reader, all are refused)
    'meta of a run': (24, run_folder, META, resumed),
    'meta of a base': (16, run_folder, META, tuned),
    'meta of an evaluated model': (24, run_folder, META, asked),
    'files of a run': (16, run_folder, WHOLE, resumed),
    'files of a checkpoint': (32, run_folder, {k: v for k, v in WHOLE.items() if 'optim' not in k},
                              lambda world, folder: read('checkpoint')(world, folder / 'ckpt_last')),
    'log': (6, run_folder, {'log.jsonl': LINES}, resumed),
    'tokenizer.model': (16, files_of('data/tokenizer.model'), {'tokenizer.model': BYTES}, read('tokenizer')),
    'tokenizer.json': (32, make_json_tokenizer, {'tokenizer.json': JSON}, read('tokenizer')),
    'text tar': (24, make_text_tar, {'*.tar': (tar_member, tar_member, *BYTES)}, read('text_tar')),
    'text bin': (20, make_text_bin, {'*.bin': BYTES, '*00.json': JSON}, read('text_bin')),
    'captions': (28, make_captions, {'*.tar': (tar_member, tar_member, tar_member, *BYTES)}, read('captions')),
    'instructions': (28, make_instructions, {'llava.json': JSON, 'llava.jsonl': LINES, 'images/*': BYTES}, read('instruct')),
    'index': (24, make_index, {'*/*.idx': (index_of, index_of, *BYTES)}, read('index')),
    'image': (40, make_images, {'*.*': (*BYTES, flip_header)}, read('images')),
    'encoder': (28, files_of('data/encoder'), {'encoder/config.json': JSON, 'encoder/preprocessor_config.json': JSON,
                                               'encoder/model.safetensors': SAFETENSORS},
                lambda world, folder: read('encoder')(world, folder / 'encoder')),
    'sharded encoder': (12, make_sharded_encoder, {'*.index.json': JSON, 'model-*': SAFETENSORS}, read('encoder')),
    'OpenLM .pt': (24, make_openlm, {'open.pt': (tensors_of, tensors_of, *BYTES)}, read('openlm_pt')),
    'OpenLM folder': (16, make_openlm, {'config.json': JSON, 'model.safetensors': SAFETENSORS}, read('openlm_folder')),
    'benchmark': (60, make_benchmarks, {
        'vqav2/*.json': JSON, 'textvqa/*.json': JSON, 'textvqa/*.jsonl': LINES, 'pope/coco*.json': LINES,
        'refcoco/*.json': JSON, 'refcoco/*.p': (unpickled, unpickled, *BYTES), 'captions/*.jsonl': LINES,
        'text/*.jsonl': LINES, '*/*/*.jpg': BYTES}, read('benchmarks')),
    'benchmark, more': (40, make_more_benchmarks, {
        '[gota]*/*.json': JSON, 'vizwiz/val.json': JSON, 'vsr/test.jsonl': LINES, 'ai2d/questions/*.json': JSON,
        'text/*.jsonl': LINES}, read('benchmarks')),
    'results': (16, files_of('out/results'),
                {'results/results.json': (task_value,) * 5 + JSON}, evaluated),
    'report': (24, make_report, {'log.jsonl': LINES, 'ckpt_100/eval/results.json': (task_value, *JSON),
                                 'ckpt_100/eval/predictions/*.jsonl': LINES}, read('report')),
    'corpus': (20, make_corpus, {'*.jsonl': LINES, '*.gz': BYTES, '*.zst': BYTES, '*.txt': BYTES}, read('corpus')),
    'config': (24, files_of('tiny.py'), {'tiny.py': (python_value,) * 4 + (flip, cut, swap)}, read('config')),
}
REFUSED = {'files of a run', 'files of a checkpoint'}    # kinds of which every change is noticed


@pytest.fixture(scope='module')
def hostile(world, scripts, stage_1, stage_2):
    """world/out/two: a run of stage 2, stopped at step 2; world/out/results: an evaluation of it."""
    scripts('pretrain.py', *mix(world, stage_1), '--stop_after=2', f'--out_dir={world / "out" / "two"}')
    eval_dir = world / 'eval'
    make_benchmarks(world, eval_dir)
    scripts('evaluate.py', f'--ckpt={world / "out" / "two" / "ckpt_last"}', f'--eval_dir={eval_dir}', '--n_thread=1',
            '--tasks=copa', f'--out_dir={world / "out" / "results"}', '--max_new_tokens=2')
    return world


def spoil(folder, damages, i, rng):
    """Damage one file of a folder: every pattern and every damage in its turn. Returns (its path, what was done)."""
    pattern, changes = list(damages.items())[i % len(damages)]
    file = rng.choice(sorted(folder.glob(pattern)))
    change = changes[(i // len(damages)) % len(changes)] if rng.random() < 0.7 else rng.choice(changes)
    before, stat = file.read_bytes(), file.stat()
    after, what = change(before, rng)
    os.remove(file)                                      # files of a checkpoint have links
    file.write_bytes(after)
    if file.suffix == '.idx':
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return file, f'{file.relative_to(folder)}: {what}', after != before


def verdict(run, code, folder, file, changed, kind):
    """What is wrong with the way in which a case ended; '' = nothing."""
    err = run.err
    if 'Traceback' in err + run.out or 'xception ignored' in err:
        return 'a traceback'
    if code == 0:
        return 'accepted' if kind in REFUSED and changed else ''
    if code != 1:
        return f'exit status {code}'
    if err.count('\n') != 1 or not err.endswith('\n'):
        return f'{err.count(chr(10))} lines'
    names = (file.name, file.parent.name + '/', str(folder), os.path.basename(os.path.realpath(file.parent)))
    return '' if any(name in err for name in names) else 'the file is not named'


@pytest.mark.parametrize('kind', KINDS)
def test_damaged_files_end_in_one_line_that_names_them(kind, hostile, scripts, tmp_path):
    n_case, make, damages, reader = KINDS[kind]
    (tmp_path / 'whole').mkdir()
    make(hostile, tmp_path / 'whole')
    assert scripts.start(*reader(hostile, tmp_path / 'whole'), quick=True).wait() == 0, 'the undamaged files are refused'
    shutil.rmtree(tmp_path / 'whole')
    (tmp_path / 'whole').mkdir()
    make(hostile, tmp_path / 'whole')
    running, wrong = [], []

    def finish():
        case, run, folder, file, what, changed = running.pop(0)
        code = run.wait(timeout=LIMIT_S)
        problem = verdict(run, code, folder, file, changed, kind)
        if problem:
            wrong.append(f'{kind!r} case {case}: {what}: {problem} (status {code})\n{run.err[-1500:]}')
        shutil.rmtree(folder)
    for case in range(n_case * TIMES):
        folder, rng = tmp_path / str(case), random.Random(f'{kind}: {case}')
        shutil.copytree(tmp_path / 'whole', folder, symlinks=True)
        file, what, changed = spoil(folder, damages, case, rng)
        running.append((case, scripts.start(*reader(hostile, folder), quick=True), folder, file, what, changed))
        if len(running) == TOGETHER:
            finish()
    while running:
        finish()
    assert not wrong, f'{len(wrong)} of {n_case * TIMES} cases:\n' + '\n'.join(wrong)


# --- processes that die -----------------------------------------------------------------------------------------------

def same_run(a, b, name='ckpt_100'):
    """Do two finished runs hold the same bits and the same log?"""
    same = ('step', 'loss', 'lr', 'grad_norm', 'n_kept', 'sources')
    return (same_weights(a / name, b / name) and same_weights(a / name, b / name, 'optim.pt')
            and [[x[k] for k in same] for x in steps(a)] == [[x[k] for k in same] for x in steps(b)])


def test_ranks_killed_anywhere_and_resumed_give_the_same_bits(world, scripts, stage_1, tmp_path):
    """One of two processes dies, torchrun kills the other; on one of them, a worker too."""
    rng = random.Random(5)
    args = ['pretrain.py', *mix(world, stage_1), '--keep_steps=2']
    scripts(*args, f'--out_dir={tmp_path / "whole"}', world_size=2)
    args += ['--save_every=1', f'--out_dir={tmp_path / "killed"}']
    deaths = [(0, 'torn checkpoint.save_file:2'), (1, f'common.optimizer_step:{rng.randint(2, 3)}'), (0, 'os.rename:1'),
              (1, f'common.count:{rng.randint(2, 4)}'), (0, 'os.symlink:2'), (0, 'torn torch.save:1'),
              (1, f'torch.distributed.all_reduce:{rng.randint(3, 9)}')]
    for i, (dies, place) in enumerate(deaths):
        hook = KILL.replace('left[0] == 0', f'left[0] == 0 and os.environ["RANK"] == "{dies}"')
        ranks = scripts.start_ranks(2, *args, f'--n_worker={i % 2}', hook=hook, env={'KILL': place})
        assert ranks[dies].wait() == -signal.SIGKILL, f'{place}: {ranks[dies].out}{ranks[dies].err}'
        os.kill(ranks[1 - dies].pid, signal.SIGKILL)
        ranks[1 - dies].wait()
        if (tmp_path / 'killed' / 'ckpt_last').exists():
            load_vlm(str(tmp_path / 'killed' / 'ckpt_last'))             # whole, or absent
    scripts(*args, world_size=2)
    assert same_run(tmp_path / 'whole', tmp_path / 'killed')


# --- a strange machine ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('env', [
    dict(WORLD_SIZE='2'), dict(RANK='0'), dict(WORLD_SIZE='2', RANK='2'), dict(WORLD_SIZE='2', RANK='-1'),
    dict(WORLD_SIZE='two', RANK='0'), dict(WORLD_SIZE='1', RANK='zero'), dict(WORLD_SIZE='0', RANK='0'),
    dict(WORLD_SIZE='', RANK=''), dict(WORLD_SIZE='2', RANK='0', LOCAL_RANK='x'), dict(WORLD_SIZE='2', RANK='0'),
    dict(WORLD_SIZE='2', RANK='0', MASTER_ADDR='127.0.0.1', MASTER_PORT='port')], ids=str)
def test_an_environment_that_torchrun_does_not_make_is_one_line(env, world, scripts, tmp_path):
    hook = "import os\nfor key in ('MASTER_ADDR', 'MASTER_PORT'): os.environ.get(key) or os.environ.pop(key, None)\n"
    run = scripts.start(*text(world, f'--out_dir={tmp_path / "out"}'), env=env, hook=hook, quick=True)
    assert run.wait(timeout=60) == 1 and run.err.count('\n') == 1 and 'Traceback' not in run.err, run.err
    assert any(f'{key}=' in run.err for key in env) and not (tmp_path / 'out').exists(), run.err


# what becomes of stdout, in the process itself
STREAMS = {'closed': 'import os, sys\nos.close(1)\nsys.stdout = sys.__stdout__ = None\n',
           'full': 'import os\nos.dup2(os.open("/dev/full", os.O_WRONLY), 1)\n',
           'without a reader': 'import os\nos.dup2(os.open(os.environ["FIFO"], os.O_WRONLY), 1)\n'}


@pytest.mark.parametrize('stream', STREAMS)
def test_a_lost_stdout_costs_at_most_one_line(stream, world, scripts, stage_1, tmp_path):
    args = text(world, f'--out_dir={tmp_path / "run"}', '--keep_optimizer=all', '--log_every=1', '--save_every=2')
    scripts(*args, '--stop_after=3')
    os.mkfifo(tmp_path / 'fifo')
    for argv in (args, ['evaluate.py', f'--ckpt={stage_1 / "ckpt_100"}', '--prompt=a wall', '--max_new_tokens=2',
                        '--n_thread=1']):
        run = scripts.start(*argv, hook=STREAMS[stream], env={'FIFO': str(tmp_path / 'fifo')}, quick=False)
        if stream == 'without a reader':
            with open(tmp_path / 'fifo', encoding='utf-8') as f:         # | head -1
                f.readline()
        code = run.wait()
        assert code == 0 and not run.err or code == 1 and run.err.count('\n') == 1 and 'stdout' in run.err, run.err
        assert 'Traceback' not in run.err and 'ignored' not in run.err, run.err
        load_vlm(str(tmp_path / 'run' / 'ckpt_last'))
    scripts(*args)
    assert same_run(stage_1, tmp_path / 'run')


def test_few_open_files(world, scripts, stage_1, tmp_path):
    args = text(world, f'--out_dir={tmp_path}', '--keep_optimizer=all', '--save_every=5')
    for limit, n_worker, enough in ((64, 2, True), (24, 0, True), (12, 0, False), (9, 0, False)):
        hook = f'import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))\n'
        run = scripts.start(*args, f'--n_worker={n_worker}', hook=hook)
        code = run.wait(timeout=60)
        assert code in (0, 1) and run.err.count('\n') == code and 'Traceback' not in run.err, f'{limit}: {code} {run.err}'
        assert code == 0 or not enough, run.err
        if code == 0:
            assert same_run(stage_1, tmp_path)
            shutil.rmtree(tmp_path)


def test_a_run_copied_with_its_links_followed_goes_on_with_the_same_bits(world, scripts, stage_1, tmp_path):
    args = text(world, '--keep_optimizer=all', '--save_every=4')
    scripts(*args, f'--out_dir={tmp_path / "a"}', '--stop_after=7')
    shutil.copytree(tmp_path / 'a', tmp_path / 'b', symlinks=False)                      # cp -rL
    assert not (tmp_path / 'b' / 'ckpt_last').is_symlink()
    run = scripts(*args, f'--out_dir={tmp_path / "b"}')
    assert 'at step 7 of 20' in run.out and os.readlink(tmp_path / 'b' / 'ckpt_last') == 'ckpt_100'
    assert same_run(stage_1, tmp_path / 'b')


# --- people who are in a hurry ----------------------------------------------------------------------------------------

def test_ctrl_c_during_an_evaluation_is_one_line(hostile, scripts, tmp_path):
    hook = """
import model, os, time
def slow(*args, **options):
    open(os.environ['MARK'], 'w').close()
    time.sleep(60)
model.VLM.generate = model.VLM.generate_each = model.VLM.choice_nats = slow
"""
    base = ['evaluate.py', f'--ckpt={hostile / "out" / "two" / "ckpt_last"}', '--n_thread=1']
    for i, more in enumerate((['--tasks=copa'], ['--tasks=vqav2'], ['--prompt=a wall'])):
        mark = tmp_path / str(i)
        run = scripts.start(*base, f'--eval_dir={hostile / "eval"}', *more, f'--out_dir={tmp_path / "out"}', hook=hook,
                            env={'MARK': str(mark)})
        wait_until(mark.exists, run)
        os.kill(run.pid, signal.SIGINT)
        assert run.wait(timeout=30) in (-signal.SIGINT, 1) and run.err == 'stopped by Ctrl-C\n', run.err
    assert not (tmp_path / 'out' / 'results.json').exists()


def wait_until(there, run, timeout=60):
    end = time.monotonic() + timeout
    while not there():
        assert time.monotonic() < end, run.out + run.err
        time.sleep(0.01)


def test_a_start_while_another_run_stops_is_refused_or_goes_on_from_a_whole_checkpoint(world, scripts, stage_1, tmp_path):
    args = text(world, f'--out_dir={tmp_path}', '--keep_optimizer=all', '--save_every=3', '--keep_steps=1')
    slow_save = SLOW + """
import checkpoint
fsync = checkpoint._fsync
def slow_fsync(path):
    time.sleep(0.05)
    fsync(path)
checkpoint._fsync = slow_fsync
"""
    first = scripts.start(*args, hook=slow_save, env={'SLOW': '0.05'})
    wait_for_lines(tmp_path, 4, first)
    os.kill(first.pid, signal.SIGTERM)
    refused = 0
    while True:
        second = scripts.start(*args, '--stop_after=18', quick=True)
        if second.wait() == 0:
            break
        refused += 1
        assert 'is in use by another run' in second.err and second.err.count('\n') == 1, second.err
    assert first.wait() == 0 and refused, first.err
    at = int(re.search(r'at step (\d+) of', second.out)[1])
    assert f'{at} of 20 steps done' in first.out and meta_of(tmp_path / 'ckpt_last')['step'] == 18
    scripts(*args)
    assert same_run(stage_1, tmp_path)


def test_a_checkpoint_that_is_replaced_while_an_evaluation_loads_it(hostile, scripts, stage_1, tmp_path):
    """The link moves on: the old checkpoint is evaluated. A folder is pruned or replaced: one line."""
    hook = """
import checkpoint, os, shutil
plain, last = checkpoint.load_weights, os.environ['LAST']
def replaced(*args):
    {}
    return plain(*args)
checkpoint.load_weights = replaced
"""
    move = "os.remove(last); os.symlink('ckpt_100', last)"
    ways = {'link': move, 'pruned': "old = os.path.realpath(last); " + move + "; shutil.rmtree(old)",
            'folder': "os.rename(last, last + '_old'); shutil.copytree(last[:-4] + '100', last)"}

    def nats(out):
        return [json.loads(line)['nats'] for line in (out / 'predictions' / 'copa.jsonl').read_text().splitlines()]
    base = ['evaluate.py', f'--eval_dir={hostile / "eval"}', '--tasks=copa', '--n_thread=1']
    for step in ('020', '100'):
        scripts(*base, f'--ckpt={stage_1 / f"ckpt_{step}"}', f'--out_dir={tmp_path / step}')
    assert nats(tmp_path / '020') != nats(tmp_path / '100')
    for name, code in ways.items():
        root = tmp_path / name
        for step in ('020', '100'):
            shutil.copytree(stage_1 / f'ckpt_{step}', root / f'ckpt_{step}')
        if name == 'folder':
            os.rename(root / 'ckpt_020', root / 'ckpt_last')
        else:
            os.symlink('ckpt_020', root / 'ckpt_last')
        run = scripts.start(*base, f'--ckpt={root / "ckpt_last"}', f'--out_dir={root / "out"}', hook=hook.format(code),
                            env={'LAST': str(root / 'ckpt_last')})
        status = run.wait()
        if name == 'link':
            assert status == 0 and nats(root / 'out') == nats(tmp_path / '020'), run.err
        else:
            assert status == 1 and run.err.count('\n') == 1 and 'model.safetensors' in run.err, run.err
