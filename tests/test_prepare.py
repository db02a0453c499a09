"""prepare.py: every command on real formats, what it writes is what data.py reads, and bad input ends in one line."""
import gzip
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data
import prepare
from conftest import child_env
from errors import UserError

TEXTS = [f"document {i}:\n    the {c} {s} is  on the mat\n\tünïcode ☃" for i in range(30) for c in ('red', 'blue')
         for s in ('star', 'cat')]


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """A folder with texts/ in three formats and a tokenizer trained on them."""
    top = tmp_path_factory.mktemp('world')
    (top / 'texts/deep').mkdir(parents=True)
    lines = [json.dumps({'text': t, 'url': 'x'}) for t in TEXTS]
    (top / 'texts/a.txt').write_text(TEXTS[0])
    (top / 'texts/deep/b.jsonl').write_text('\n'.join(lines[1:60]) + '\n')
    (top / 'texts/deep/c.jsonl.gz').write_bytes(gzip.compress('\n'.join(lines[60:]).encode()))
    assert prepare.main(['train_tokenizer', f'{top}/texts', '--out', f'{top}/t.model', '--vocab_size', '400']) == 0
    return top


def test_the_tokenizer_keeps_every_character(world):
    tokenizer = data.load_tokenizer(f'{world}/t.model')
    for text in [*TEXTS[:3], ' two  spaces\n\n\nlines ', '日本', 'a\tb']:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    again = prepare.train_tokenizer(prepare.documents(f'{world}/texts'), f'{world}/again.model', 400)
    assert again is None and (world / 'again.model').read_bytes() == (world / 't.model').read_bytes()


@pytest.mark.parametrize('layout', ['bin', 'tar'])
def test_tokens_written_are_the_tokens_read(world, tmp_path, layout):
    tokenizer = data.load_tokenizer(f'{world}/t.model')
    want = [i for t in prepare.documents(f'{world}/texts') for i in tokenizer.encode(t) + [tokenizer.eot_id]]
    for n_process in (1, 2):
        out = str(tmp_path / f'{layout}{n_process}')
        prepare.main(['tokenize', f'{world}/texts', '--tokenizer', f'{world}/t.model', '--out', out, '--layout', layout,
                      '--row_len', '64', '--rows_per_shard', '8', '--n_process', str(n_process)])
        source = data.TextSource(out, tokenizer, 64, row_len=64)
        got = [s for s in map(source.__getitem__, range(len(source)))]
        ids = [i for s in got for i in ([s.tokens[0]] if layout == 'tar' or s.id.endswith('bin:0:0') else [])
               + s.targets.tolist()]                     # a row of a tar, and a .bin, begins with an id of its own
        assert ids == want and len(source.group_sizes) > 3
    one, two = ([(f.name, f.read_bytes()) for f in sorted((tmp_path / f'{layout}{n}').iterdir()) if f.suffix != '.idx']
                for n in (1, 2))
    assert one == two                                    # the same bytes with any number of processes
    if layout == 'tar':
        manifest = [json.loads(line) for line in open(f'{out}/manifest.jsonl')]
        assert sum(m['num_sequences'] for m in manifest) == sum(source.group_sizes)


CHILD = f"import sys; sys.path.insert(0, {os.path.dirname(prepare.__file__)!r}); import os, prepare\n"
WAITING = CHILD + """
def texts():
    yield from ['the red star'] * 600
    print('ready', flush=True)
    yield sys.stdin.readline()
prepare.tokenize(texts(), sys.argv[1], sys.argv[2], n_process=2)"""


def start_waiting(world, out):
    """A tokenize into out that has begun, holds what two processes made, and waits for the rest of its input."""
    child = subprocess.Popen([sys.executable, '-c', WAITING, f'{world}/t.model', str(out)], env=child_env(), text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout.readline() == 'ready\n'
    return child


def test_of_two_at_once_the_second_is_refused_and_the_first_is_whole(world, tmp_path):
    child = start_waiting(world, tmp_path / 'out')
    with pytest.raises(UserError, match='out: another process is writing it'):
        prepare.tokenize(TEXTS, f'{world}/t.model', str(tmp_path / 'out'))
    with pytest.raises(UserError, match='out: another process is writing it'):
        prepare.pair(str(write_photos(tmp_path / 'photos')), f'{tmp_path}/out/')
    child.communicate('the end')
    assert child.returncode == 0 and sorted(os.listdir(tmp_path)) == ['out', 'photos']
    assert sorted(os.listdir(tmp_path / 'out')) == ['00000000.bin', '00000000.json']
    tokenizer = data.load_tokenizer(f'{world}/t.model')
    want = [i for t in ['the red star'] * 600 + ['the end'] for i in tokenizer.encode(t) + [tokenizer.eot_id]]
    assert np.fromfile(tmp_path / 'out/00000000.bin', '<u2').tolist() == want


def test_a_killed_run_does_not_block_the_next_and_leaves_no_process(world, tmp_path):
    child = start_waiting(world, tmp_path / 'out')
    workers = open(f'/proc/{child.pid}/task/{child.pid}/children').read().split()
    (tmp_path / 'out.partial/00000007.bin').write_text('of the killed run')
    child.kill()
    child.wait()
    assert prepare.tokenize(TEXTS, f'{world}/t.model', str(tmp_path / 'out'))[0] == len(TEXTS)
    assert os.listdir(tmp_path) == ['out'] and '00000007.bin' not in os.listdir(tmp_path / 'out')
    deadline = time.time() + 20
    while any(os.path.exists(f'/proc/{pid}') and open(f'/proc/{pid}/stat').read().split()[2] != 'Z' for pid in workers):
        assert time.time() < deadline, workers
        time.sleep(0.05)
    assert len(workers) == 2


def test_a_killed_process_of_the_pool_is_one_line(world, tmp_path):
    others = multiprocessing.active_children()           # loaders of other tests

    def texts():
        yield from TEXTS * 6
        os.kill(next(p.pid for p in multiprocessing.active_children() if p not in others), signal.SIGKILL)
        yield from TEXTS * 60
    with pytest.raises(UserError, match='tokenize: one of the processes died: killed, or out of memory'):
        prepare.tokenize(texts(), f'{world}/t.model', str(tmp_path / 'out'), n_process=2)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize('suffix', ['.txt', '.jsonl', '.jsonl.gz', '.jsonl.zst'])
def test_a_document_beyond_its_bound_is_refused(tmp_path, monkeypatch, suffix):
    pack = gzip.compress if suffix.endswith('.gz') else bytes
    pack = pytest.importorskip('zstandard').compress if suffix.endswith('.zst') else pack
    path = tmp_path / f'a{suffix}'
    monkeypatch.setattr(prepare, 'MAX_LINE', 50)
    monkeypatch.setattr(prepare, 'MAX_TEXT', 50)
    path.write_bytes(pack(b'{"text": "%s"}' % (b'x' * 38)))
    assert len(list(prepare.documents(str(path)))) == 1
    path.write_bytes(pack(b'{"text": "x"}\n' + b'x' * 51))
    with pytest.raises(UserError, match=r'a\..*: more than 50 characters; cut it'):
        list(prepare.documents(str(path)))


def test_every_frame_of_a_zst_is_read_and_a_cut_one_is_named(tmp_path):
    zstandard, path = pytest.importorskip('zstandard'), tmp_path / 'a.jsonl.zst'
    lines = [b'{"text": "%d %s"}\n' % (i, os.urandom(40).hex().encode()) for i in range(9000)]
    frames = [zstandard.compress(b''.join(lines[i:i + 3000])) for i in (0, 3000, 6000)]
    path.write_bytes(b''.join(frames[:2]) + b'\x50\x2a\x4d\x18\x03\0\0\0abc' + frames[2])     # a skippable one too
    assert list(prepare.documents(str(path))) == [json.loads(line)['text'] for line in lines]
    path.write_bytes(frames[0] + frames[1][:-2000])
    with pytest.raises(UserError, match='a.jsonl.zst: not readable as lines of UTF-8 text .cut short'):
        list(prepare.documents(str(path)))


@pytest.mark.parametrize('name', ['a.txt', 'a.jsonl', 'a.jsonl.gz', 'a.jsonl.zst'])
def test_a_pipe_is_no_text(tmp_path, name):
    os.mkfifo(tmp_path / name)
    signal.alarm(20)                                     # ends the tests rather than waiting
    with pytest.raises(UserError, match=f'{name}: not a file'):
        list(prepare.documents(str(tmp_path / name)))
    with pytest.raises(UserError, match=f'{name}: not a file'):
        prepare.pair(str(tmp_path), f'{tmp_path}/out', str(tmp_path / name))
    signal.alarm(0)


def test_an_interrupted_tokenize_leaves_nothing_that_looks_whole(world, tmp_path):
    def texts():
        yield from TEXTS
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        prepare.tokenize(texts(), f'{world}/t.model', str(tmp_path / 'out'), row_len=64, rows_per_shard=1)
    assert not os.path.exists(tmp_path / 'out')
    assert prepare.tokenize(TEXTS, f'{world}/t.model', str(tmp_path / 'out'))[0] == len(TEXTS)
    assert os.listdir(tmp_path) == ['out']
    with pytest.raises(ValueError, match='out: is there already'):
        prepare.tokenize(TEXTS, f'{world}/t.model', str(tmp_path / 'out'))


@pytest.mark.parametrize('name, content, words', [
    ('a.jsonl', b'{"text": "x"}\n{"text": 5}\n', "a.jsonl: line 2: 'text' is int"),
    ('a.jsonl', b'{"text": "x"}\n\n{"te', "a.jsonl: line 3: not readable as a JSON object with 'text'"),
    ('a.jsonl', b'{"body": "x"}', "a.jsonl: line 1: not readable as a JSON object with 'text'"),
    ('a.txt', b'\xff\xfe', 'a.txt: not readable as UTF-8 text'), ('a.pdf', b'x', 'a.pdf: expected one of .txt'),
    ('a.jsonl.gz', b'junk', 'a.jsonl.gz: not readable .* .Not a gzipped file'),
    ('a.jsonl.zst', b'junk', 'a.jsonl.zst: not readable|pip install zstandard')])
def test_what_is_no_text_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        list(prepare.documents(str(tmp_path / name)))


def test_a_tokenizer_is_not_overwritten_and_its_size_is_named(tmp_path):
    (tmp_path / 't.model').write_text('mine')
    with pytest.raises(ValueError, match='is there already'):
        prepare.train_tokenizer(['a text'], str(tmp_path / 't.model'), 300)
    with pytest.raises(ValueError, match='--vocab_size=9999'):
        prepare.train_tokenizer(['a short text'], str(tmp_path / 'u.model'), 9999)
    assert (tmp_path / 't.model').read_text() == 'mine' and not (tmp_path / 'u.model').exists()


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / 'a.txt').write_bytes(b'\xef\xbb\xbfone')
    (tmp_path / 'b.jsonl').write_bytes(b'\xef\xbb\xbf{"text": "two"}\n')
    assert list(prepare.documents(str(tmp_path))) == ['one', 'two']


@pytest.mark.parametrize('given, words', [
    (['tokenize', 'x', '--tokenizer', 't', '--out', 'o', '--row_len', '0'], "--row_len: '0': expected a whole number"),
    (['pair', 'x', '--out', 'o', '--samples_per_shard', '-1'], "--samples_per_shard: '-1': expected a whole number")])
def test_counts_that_would_never_end(given, words, capsys):
    with pytest.raises(SystemExit):
        prepare.main(given)
    assert words in capsys.readouterr().err


def test_unknown_layouts_and_kinds_are_refused(world, tmp_path):
    with pytest.raises(ValueError, match="layout='zip': expected 'bin' or 'tar'"):
        prepare.tokenize(TEXTS, f'{world}/t.model', str(tmp_path / 'out'), layout='zip')
    with pytest.raises(ValueError, match="kind='video': expected 'auto'"):
        prepare.open_source(str(tmp_path), None, kind='video')


def test_zst_needs_zstandard_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'zstandard', None)
    (tmp_path / 'a.jsonl.zst').write_bytes(b'x')
    with pytest.raises(ValueError, match='pip install zstandard'):
        list(prepare.documents(str(tmp_path)))


def write_photos(folder, n=5):
    folder.mkdir()
    for i in range(n):
        Image.fromarray(np.full((20 + i, 30, 3), 20 * i, np.uint8)).save(folder / f'p{i}.jpg')
        (folder / f'p{i}.txt').write_text(f' the cat {i}\n')
    return folder


def test_pair_check_and_show_photos(world, tmp_path, capsys):
    photos = write_photos(tmp_path / 'photos')
    assert prepare.main(['pair', str(photos), '--out', f'{tmp_path}/tars', '--samples_per_shard', '2']) == 0
    look = ['--tokenizer', f'{world}/t.model', '--n_token', '4', '--image_size', '28', '--seq_len', '64']
    assert prepare.main(['index', f'{tmp_path}/tars']) == 0 and prepare.main(['check', f'{tmp_path}/tars', *look]) == 0
    assert '"samples": 5' in capsys.readouterr().out
    assert prepare.main(['show', f'{tmp_path}/tars', *look, '--n', '2', '--image_out', f'{tmp_path}/png']) == 0
    shown = capsys.readouterr().out
    assert shown.count('no loss | <image> x 4 <sep>\n') == 2 and 'loss    | "the cat' in shown and '<eot>' in shown
    assert len(os.listdir(tmp_path / 'png')) == 2
    captions = tmp_path / 'captions.jsonl'
    captions.write_text('{"image": "p1.jpg", "caption": "one"}\n{"image": "../p2.jpg", "caption": "two"}\n')
    with pytest.raises(ValueError, match="'../p2.jpg': expected a path inside"):
        prepare.pair(str(photos), f'{tmp_path}/more', str(captions))
    captions.write_text('{"image": "p1.jpg", "caption": "one"}\n\n{"image": "gone.jpg", "caption": "two"}\n')
    with pytest.raises(UserError, match="captions.jsonl: line 3: no image 'gone.jpg' in .*photos"):
        prepare.pair(str(photos), f'{tmp_path}/more', str(captions))
    captions.write_text(json.dumps({'image': 'p1.jpg', 'caption': 'a lone surrogate \ud800'}))
    assert prepare.pair(str(photos), f'{tmp_path}/lone', str(captions)) == 1
    captions.write_text('{"image": "p1.jpg", "caption": " "}\n')
    with pytest.raises(ValueError, match='p1.jpg: its caption is empty'):
        prepare.pair(str(photos), f'{tmp_path}/more', str(captions))
    (photos / 'p3.txt').unlink()
    with pytest.raises(ValueError, match='p3.jpg: needs a caption of its own beside it'):
        prepare.pair(str(photos), f'{tmp_path}/more')


def test_check_names_every_bad_item_and_exits_1(world, tmp_path, capsys):
    photos = write_photos(tmp_path / 'photos')
    (photos / 'p1.jpg').write_bytes((photos / 'p1.jpg').read_bytes()[:200])
    (photos / 'p3.jpg').write_text('no image')
    (photos / 'p9.gif').write_bytes(b'GIF89a')
    prepare.main(['pair', str(photos), '--out', f'{tmp_path}/tars'])
    assert '!!! 1 images left out, such as p9.gif' in capsys.readouterr().out
    look = ['--tokenizer', f'{world}/t.model', '--n_token', '4', '--image_size', '28', '--seq_len', '64']
    assert prepare.main(['check', f'{tmp_path}/tars', *look]) == 1
    out = capsys.readouterr().out
    assert out.count('bad: ') == 2 and '000000001_p1: ' in out and '000000003_p3: image of 8 bytes: not an image' in out
    assert '2 bad; {"samples": 3' in out
    tar = tmp_path / 'tars/000000.tar'
    tar.write_bytes(tar.read_bytes()[:2500])
    assert prepare.main(['index', f'{tmp_path}/tars']) == 1 and 'damaged or truncated' in capsys.readouterr().out
    assert prepare.main(['check', f'{tmp_path}/tars', *look]) == 1 and 'damaged or truncated' in capsys.readouterr().out


def test_show_marks_exactly_the_answers(world, tmp_path, capsys):
    turns = [{'from': ('human', 'gpt')[i % 2], 'value': v}
             for i, v in enumerate(['<image>\nthe red', 'star', 'the', 'cat'])]
    write_photos(tmp_path / 'photos')
    (tmp_path / 'l.json').write_text(json.dumps([{'image': 'p0.jpg', 'conversations': turns}, {'id': 'no turns'}]))
    look = ['--tokenizer', f'{world}/t.model', '--n_token', '4', '--image_size', '28',
            '--image_root', f'{tmp_path}/photos']
    assert prepare.main(['check', f'{tmp_path}/l.json', *look]) == 1
    assert "entry 1: no 'conversations'" in capsys.readouterr().out
    tokenizer = data.load_tokenizer(f'{world}/t.model')
    for split in (False, True):
        source = prepare.open_source(f'{tmp_path}/l.json', tokenizer, 64, f'{tmp_path}/photos', 4, 28,
                                     split_turns=split)
        lines = [line.strip() for line in prepare.describe(source[0], tokenizer)[1:]]
        head = 'no loss | <image> x 4 <sep> '
        want = [head + '"the red" <sep>', 'loss    | "star" <sep>', (head if split else 'no loss | ') + '"the" <sep>',
                'loss    | "cat" <sep>']
        assert [line for line in lines if '| <pad>' not in line] == want


def test_pair_takes_several_folders(world, tmp_path):
    folders = [str(write_photos(tmp_path / name, n)) for name, n in (('one', 2), ('two', 3))]
    assert prepare.main(['pair', *folders, '--out', f'{tmp_path}/tars', '--samples_per_shard', '4']) == 0
    source = data.CaptionSource(f'{tmp_path}/tars', data.load_tokenizer(f'{world}/t.model'), 64, 4, 28)
    assert [source[i].id.split(':')[1] for i in range(len(source))] == [
        f'{i:09d}_{stem}' for i, stem in enumerate(('p0', 'p1', 'p0', 'p1', 'p2'))]
    with pytest.raises(UserError, match='2 folders, expected one'):
        prepare.pair(folders, f'{tmp_path}/more', 'captions.jsonl')
    with pytest.raises(UserError, match='p0.jpg: expected a folder of images'):
        prepare.pair([f'{folders[0]}/p0.jpg'], f'{tmp_path}/more')


def test_an_error_of_the_input_reaches_the_user_through_the_trainer(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"text": "x"}\n{"text": 5}\n')
    with pytest.raises(UserError, match="a.jsonl: line 2: 'text' is int"):
        prepare.train_tokenizer(prepare.documents(str(tmp_path)), str(tmp_path / 'x.model'), 300)


@pytest.mark.parametrize('argv, line', [
    (['check', '{tmp}/gone', '--tokenizer', '{world}/t.model'], '{tmp}/gone: no such file'),
    (['check', '{tmp}/x.tar.gz', '--tokenizer', '{world}/t.model'],
     '{tmp}/x.tar.gz: compressed tars cannot be read in place; unpack it first (gunzip for .gz)'),
    (['tokenize', '{world}/texts', '--tokenizer', '{world}/t.model', '--out', '{tmp}/x.tar.gz/out'],
     '{tmp}/x.tar.gz/out: cannot be written ([Errno 20] Not a directory: \'{tmp}/x.tar.gz/out.partial\')')])
def test_mistakes_end_in_one_line(world, tmp_path, argv, line):
    (tmp_path / 'x.tar.gz').write_bytes(gzip.compress(b'x'))
    argv, line = ([text.format(tmp=tmp_path, world=world) for text in texts] for texts in (argv, [line]))
    run = subprocess.run([sys.executable, prepare.__file__, *argv], env=child_env(), capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (1, line[0] + '\n')


def test_an_impossible_vocabulary_is_named(tmp_path):
    with pytest.raises(ValueError, match='Vocabulary size too high'):
        prepare.train_tokenizer(TEXTS[:3], str(tmp_path / 'x.model'), 50_000)
    assert not os.listdir(tmp_path)
