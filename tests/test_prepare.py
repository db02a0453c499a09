"""prepare.py: every command on real formats, what it writes is what data.py reads, and bad input ends in one line."""
import errno
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
from images import View

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
    assert tokens(tmp_path / f'{layout}1') == tokens(tmp_path / f'{layout}2')    # with any number of processes
    if layout == 'tar':
        manifest = [json.loads(line) for line in open(f'{out}/manifest.jsonl')]
        assert sum(m['num_sequences'] for m in manifest) == sum(source.group_sizes)


def tokens(folder):
    """Every file of a folder, but the indexes that readers leave."""
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.suffix != '.idx'}


WAITING = f"""
import sys; sys.path.insert(0, {os.path.dirname(prepare.__file__)!r}); import prepare
located, prepare.CHUNK = prepare.located, 100
def waiting(*a):
    for i, document in enumerate(located(*a)):
        if i == 100:
            print('ready', flush=True)
            sys.stdin.readline()
        yield document
prepare.located = waiting
prepare.tokenize(sys.argv[1], sys.argv[2], sys.argv[3], row_len=64, rows_per_shard=4, n_process=2)"""


def start_waiting(world, out):
    """A tokenize into out that has whole shards, and waits for the rest of its input."""
    child = subprocess.Popen([sys.executable, '-c', WAITING, f'{world}/texts', f'{world}/t.model', str(out)], text=True,
                             env=child_env(), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout.readline() == 'ready\n'
    until(lambda: os.path.exists(f'{out}.partial/00000003.json'))
    return child


def until(condition, seconds=60):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.02)


def test_of_two_at_once_the_second_is_refused_and_the_first_is_whole(world, tmp_path):
    small = dict(row_len=64, rows_per_shard=4)
    child = start_waiting(world, tmp_path / 'out')
    with pytest.raises(UserError, match='out: another process is writing it'):
        prepare.tokenize(f'{world}/texts', f'{world}/t.model', str(tmp_path / 'out'), **small)
    with pytest.raises(UserError, match='out: another process is writing it'):
        prepare.pair(str(write_photos(tmp_path / 'photos')), f'{tmp_path}/out/')
    child.communicate('the end')
    assert child.returncode == 0 and sorted(os.listdir(tmp_path)) == ['out', 'photos']
    prepare.tokenize(f'{world}/texts', f'{world}/t.model', str(tmp_path / 'alone'), **small)
    assert tokens(tmp_path / 'out') == tokens(tmp_path / 'alone')


def test_a_killed_run_goes_on_where_it_was_and_leaves_no_process(world, tmp_path):
    out, partial = str(tmp_path / 'out'), tmp_path / 'out.partial'
    child = start_waiting(world, out)
    workers = open(f'/proc/{child.pid}/task/{child.pid}/children').read().split()
    assert len(workers) == 2
    child.kill()
    child.wait()
    until(lambda: not any(os.path.exists(f'/proc/{pid}') and open(f'/proc/{pid}/stat').read().split()[2] != 'Z'
                          for pid in workers))
    tokenizer = data.load_tokenizer(f'{world}/t.model')
    for path in (partial, tmp_path, partial / '00000000.bin'):           # what is not whole is never trained on
        with pytest.raises(UserError, match='00000000.bin: of a preparation that has not finished'):
            data.TextSource(str(path), tokenizer, 64)
    args = f'{world}/texts', f'{world}/t.model', out
    for other, words in ((dict(rows_per_shard=8), 'out.partial: was begun with rows_per_shard=4, now 8; give the same'),
                         (dict(layout='tar'), 'layout=bin, now tar'), (dict(key='url'), 'key=text, now url')):
        with pytest.raises(UserError, match=words):
            prepare.tokenize(*args, **{**dict(row_len=64, rows_per_shard=4), **other})
    with pytest.raises(UserError, match='was begun with inputs=3 files of .* now 1 files of .*; give the same'):
        prepare.tokenize(f'{world}/texts/deep/b.jsonl', *args[1:], row_len=64, rows_per_shard=4)
    with pytest.raises(UserError, match='was begun with inputs=3 files of .* now None'):
        prepare.pair(str(write_photos(tmp_path / 'photos')), out)
    (partial / '00000009.bin.77.tmp').write_text('of the killed run')
    whole = {f.stem: os.stat(partial / f'{f.stem}.bin').st_ino for f in partial.glob('0*.json')}
    n, n_token = prepare.tokenize(*args, row_len=64, rows_per_shard=4)
    assert prepare.tokenize(*args[:2], f'{tmp_path}/alone', row_len=64, rows_per_shard=4) == (n, n_token)
    assert tokens(tmp_path / 'out') == tokens(tmp_path / 'alone') and n == len(TEXTS) and len(whole) >= 4
    assert {stem: os.stat(f'{out}/{stem}.bin').st_ino for stem in whole} == whole
    assert sorted(os.listdir(tmp_path)) == ['alone', 'out', 'photos']


@pytest.mark.parametrize('layout', ['bin', 'tar'])
def test_stops_anywhere_change_no_byte(world, tmp_path, monkeypatch, layout):
    rng, located, stop = np.random.default_rng(8), prepare.located, [0]
    args = f'{world}/texts', f'{world}/t.model'
    small = dict(layout=layout, row_len=16, rows_per_shard=5)
    want = prepare.tokenize(*args, f'{tmp_path}/want', **small)

    def stopping(*a):
        for n, document in enumerate(located(*a)):
            if n == stop[0]:
                raise KeyboardInterrupt
            yield document
    monkeypatch.setattr(prepare, 'located', stopping)
    monkeypatch.setattr(prepare, 'CHUNK', 60)
    got, n_stop = None, 0
    while got is None:
        stop[0] = rng.integers(5, 60)
        try:
            got = prepare.tokenize(*args, f'{tmp_path}/got', n_process=int(rng.integers(1, 4)), **small)
        except KeyboardInterrupt:
            n_stop += 1
            assert n_stop < 100 and not os.path.exists(tmp_path / 'got')
    assert got == want and tokens(tmp_path / 'got') == tokens(tmp_path / 'want') and n_stop > 0


def test_a_killed_process_of_the_pool_is_one_line(world, tmp_path, monkeypatch):
    others = multiprocessing.active_children()           # loaders of other tests

    def located(*a):
        yield from ((0, 1, 0, text) for text in TEXTS * 6)
        os.kill(next(p.pid for p in multiprocessing.active_children() if p not in others), signal.SIGKILL)
        yield from ((0, 1, 0, text) for text in TEXTS * 60)
    monkeypatch.setattr(prepare, 'located', located)
    monkeypatch.setattr(prepare, 'CHUNK', 100)
    with pytest.raises(UserError, match='one of the processes died: killed, or out of memory'):
        prepare.tokenize(f'{world}/texts', f'{world}/t.model', str(tmp_path / 'out'), n_process=2)
    assert not os.listdir(tmp_path)


def full_disk(monkeypatch, limit):
    """The disk has no room for more than `limit` files, in any process that starts from here."""
    fsync, left = os.fsync, multiprocessing.Value('i', limit)

    def full(fd):
        left.value -= 1
        if left.value < 0:
            raise OSError(errno.ENOSPC, 'No space left on device')
        fsync(fd)
    monkeypatch.setattr(os, 'fsync', full)


def test_a_full_disk_is_one_line_and_what_is_whole_is_kept(world, tmp_path, monkeypatch):
    command = ['tokenize', f'{world}/texts', '--tokenizer', f'{world}/t.model', '--row_len', '64', '--rows_per_shard',
               '4', '--out']
    with monkeypatch.context() as m:
        full_disk(m, 6)
        with pytest.raises(UserError, match=r'out.*: cannot be written \(\[Errno 28\] No space left on device'):
            prepare.main([*command, f'{tmp_path}/out'])
    assert os.path.exists(tmp_path / 'out.partial/00000001.json') and not list(tmp_path.rglob('*.tmp'))
    assert prepare.main([*command, f'{tmp_path}/out']) == prepare.main([*command, f'{tmp_path}/alone']) == 0
    assert tokens(tmp_path / 'out') == tokens(tmp_path / 'alone')


def test_a_folder_that_may_not_be_written_is_named(world, tmp_path, monkeypatch):
    def denied(path, *args, **kw):
        raise PermissionError(errno.EACCES, 'Permission denied', path)   # root may write anywhere
    monkeypatch.setattr(os, 'makedirs', denied)
    with pytest.raises(UserError, match=r'out: cannot be written \(\[Errno 13\] Permission denied'):
        prepare.main(['tokenize', f'{world}/texts', '--tokenizer', f'{world}/t.model', '--out', f'{tmp_path}/out'])


def test_what_cannot_become_shards_is_refused(world, tmp_path):
    tokenizers = pytest.importorskip('tokenizers')
    for n in (65535, 65536):                             # of text; end-of-text is the id behind them
        words = {f'w{i}': i for i in range(n - 1)} | {'a': n - 1}
        tokenizers.Tokenizer(tokenizers.models.WordLevel(words, 'a')).save(f'{tmp_path}/{n}.json')
    assert prepare.tokenize(f'{world}/texts/a.txt', f'{tmp_path}/65535.json', f'{tmp_path}/fits') == (1, 2)
    assert np.fromfile(tmp_path / 'fits/00000000.bin', '<u2').tolist() == [65534, 65535]
    with pytest.raises(UserError, match='ids up to 65536 do not fit the uint16 of .bin; give --layout tar'):
        prepare.tokenize(f'{world}/texts', f'{tmp_path}/65536.json', f'{tmp_path}/out')
    (tmp_path / 'a.jsonl').write_text('\n \n')
    with pytest.raises(UserError, match='no text in the input'):
        prepare.tokenize(f'{tmp_path}/a.jsonl', f'{world}/t.model', f'{tmp_path}/out')
    (tmp_path / 'a.jsonl').write_text('{"text": "one"}\n' * 70 + '{"text": "cut')
    with pytest.raises(UserError, match="a.jsonl: line 71: not readable as a JSON object with 'text'"):
        prepare.tokenize(f'{tmp_path}/a.jsonl', f'{world}/t.model', f'{tmp_path}/out', n_process=2)
    assert sorted(os.listdir(tmp_path)) == ['65535.json', '65536.json', 'a.jsonl', 'fits']


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


def test_a_folder_that_is_there_is_not_overwritten(world, tmp_path):
    (tmp_path / 'out').mkdir()
    assert prepare.tokenize(f'{world}/texts', f'{world}/t.model', str(tmp_path / 'out'))[0] == len(TEXTS)
    assert sorted(os.listdir(tmp_path / 'out')) == ['00000000.bin', '00000000.json']
    with pytest.raises(ValueError, match='out: is there already'):
        prepare.tokenize(f'{world}/texts', f'{world}/t.model', str(tmp_path / 'out'))


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


def test_unknown_layouts_are_refused(world, tmp_path):
    with pytest.raises(ValueError, match="layout='zip': expected 'bin' or 'tar'"):
        prepare.tokenize(f'{world}/texts', f'{world}/t.model', str(tmp_path / 'out'), layout='zip')


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
    assert '"n_sample": 5' in capsys.readouterr().out
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
    assert '2 bad; {"n_sample": 3' in out
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
        source = prepare.open_source(f'{tmp_path}/l.json', tokenizer, 64, View(28, 4), f'{tmp_path}/photos',
                                     split_turns=split)
        lines = [line.strip() for line in prepare.describe(source[0], tokenizer)[1:]]
        head = 'no loss | <image> x 4 <sep> '
        want = [head + '"the red" <sep>', 'loss    | "star" <sep>', (head if split else 'no loss | ') + '"the" <sep>',
                'loss    | "cat" <sep>']
        assert [line for line in lines if '| <pad>' not in line] == want


def test_pair_takes_several_folders(world, tmp_path):
    folders = [str(write_photos(tmp_path / name, n)) for name, n in (('one', 2), ('two', 3))]
    assert prepare.main(['pair', *folders, '--out', f'{tmp_path}/tars', '--samples_per_shard', '4']) == 0
    source = data.CaptionSource(f'{tmp_path}/tars', data.load_tokenizer(f'{world}/t.model'), 64, View(28, 4))
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


def test_join_leaves_out_what_an_earlier_file_has(tmp_path, capsys):
    def row(image, *texts):
        turns = [{'from': ('human', 'gpt')[i % 2], 'value': text} for i, text in enumerate(texts)]
        return {'id': texts[-1], 'conversations': turns} | ({'image': image} if image else {})
    mix = [row('coco/train2017/1.jpg', '<image>\nwhat ?', 'a'), row('coco/train2017/1.jpg', 'where ?', 'b'),
           row('coco/train2017/1.jpg', 'what ?\n<image>', 'again'), row('', 'what ?', 'c', 'more ?', 'é')]
    llavar = [row('1.jpg', 'what ?\n<image>', 'd'), row('1.png', 'who ?', 'e'), row('2.jpg', 'what ?', 'f'),
              row('2.jpg', 'what ?', 'twice'), row('', 'what ?', 'g'), row('llavar/3.jpg', 'what ?', 'h')]
    (tmp_path / 'a.json').write_text(json.dumps(mix))
    (tmp_path / 'b.jsonl').write_text('\n'.join(map(json.dumps, llavar)))
    out = tmp_path / 'joined.json'
    paths = [str(tmp_path / 'a.json'), str(tmp_path / 'b.jsonl')]
    assert prepare.main(['join', *paths, '--folder', 'coco/train2017', '--out', str(out)]) == 0
    rows = json.loads(out.read_text())
    assert rows[:4] == mix and [r['id'] for r in rows[4:]] == ['e', 'f', 'twice', 'h']
    assert [r.get('image') for r in rows[4:]] == ['coco/train2017/1.png', *2 * ['coco/train2017/2.jpg'], 'llavar/3.jpg']
    told = capsys.readouterr().out
    assert '4 rows into' in told and '4 rows into' in told.splitlines()[1] and ', 2 left out' in told
    with pytest.raises(UserError, match='is there already'):
        prepare.join(paths, str(out))
    (tmp_path / 'b.jsonl').write_text(json.dumps(row('1.jpg', 'who ?', 'x')) + '\n{"image": "2.jpg"}')
    with pytest.raises(UserError, match="b.jsonl: entry 1: no 'conversations'"):
        prepare.join(paths, str(tmp_path / 'c.json'))
    assert not [p for p in os.listdir(tmp_path) if p.startswith('c.json')]              # whole or not at all
