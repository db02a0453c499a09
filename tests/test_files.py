"""files.py: patterns, tars indexed once by any number of processes, indexes that lie, more files than may be open."""
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tracemalloc
import zlib

import numpy as np
import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data
import files
from conftest import child_env
from data import BadSample, CaptionSource, InstructSource, Mixture, TextSource
from errors import UserError
from images import View
from test_data import CHILD, jpeg, talk, tok, write_llava, write_rows, write_tar  # noqa: F401 (tok is a fixture)


# --- patterns ---
def test_braces_mean_files_that_all_must_be_there(tmp_path):
    for name in ('00008', '00009', '00010', '00011', 'a1', 'a2', 'b', 'odd{1}'):
        (tmp_path / f'{name}.bin').touch()

    def found(pattern):
        return [os.path.basename(p)[:-4] for p in data.find(f'{tmp_path}/{pattern}.bin', '.bin')]
    assert found('{00008..00011}') == ['00008', '00009', '00010', '00011']
    assert found('000{11..10}') == ['00010', '00011']
    assert files.expand_braces('{9..10}{0..1}') == '90 91 100 101'.split()
    assert found('{a{1..2},b}') == ['a1', 'a2', 'b'] and found('{a?,b}') == ['a1', 'a2', 'b']
    assert found('odd{1}') == ['odd{1}']                                 # a name with braces is itself
    with pytest.raises(UserError, match='no such file: .*/00012.bin, .*/00013.bin$'):
        found('{00010..00013}')
    os.symlink('nowhere', tmp_path / 'dangling.bin')
    with pytest.raises(UserError, match='dangling.bin: no such file'):
        found('dangling')
    with pytest.raises(UserError, match='x.tar.gz: compressed tars cannot be read in place; unpack it first'):
        (tmp_path / 'x.tar.gz').touch()
        data.find(f'{tmp_path}/*.gz', '.tar')


# --- tars and their index ---
def members_of(path):
    """([(name, offset, size)], what is wrong with the tar), from its index."""
    index = files.tar_index(files.stamp_of(path), '')
    return [(index.name(i), *index.place(i)) for i in range(len(index))], index.damage


@pytest.mark.parametrize('cut', ['member', 'header', 'boundary', 'noise'])
def test_a_damaged_tar_is_named_and_its_whole_rows_survive(tmp_path, tok, cut):
    rows = np.arange(6)[:, None] + np.arange(3, 36)[None]
    path = write_rows(tmp_path / 'a.tar', rows, '.json')                 # 512 header + 512 content for each member
    content = bytearray(open(path, 'rb').read())
    end = {'member': 3 * 1024 - 400, 'header': 3 * 1024 + 100, 'boundary': 3 * 1024, 'noise': len(content)}[cut]
    if cut == 'noise':
        content[3 * 1024:3 * 1024 + 512] = b'x' * 512
    open(path, 'wb').write(content[:end])
    n_whole = 2 if cut == 'member' else 3
    source = TextSource(path, tok, 32)
    assert len(source) == n_whole + 1
    assert [source[i].tokens[0] for i in range(n_whole)] == [3 + i for i in range(n_whole)]
    with pytest.raises(BadSample, match=r'a.tar: damaged or truncated tar at offset \d+ of'):
        source[n_whole]
    with pytest.raises(ValueError, match='a.tar: damaged or truncated'):
        Mixture([source], [1], seed=0)                                   # before the first step, not when it is drawn
    lenient = Mixture([source], [1], seed=0, max_bad_samples=100)
    drawn = [lenient[i] for i in range(n_whole + 1)]
    assert sum(len(s.bad) > 0 for s in drawn) == 1


def member(name, content=b'', size=None, **fields):
    """The blocks of one member of a tar; its header may say anything."""
    info = tarfile.TarInfo(name)
    info.size = len(content) if size is None else size
    for key, value in fields.items():
        setattr(info, key, value)
    header = info.tobuf(tarfile.PAX_FORMAT if info.pax_headers else tarfile.GNU_FORMAT)
    return header + content + bytes(-len(content) % 512)


ROW = json.dumps([5] * 9).encode()


@pytest.mark.parametrize('blocks, words', [
    (member('b.json', ROW, pax_headers={'size': str(1 << 40)}), '1,099,511,627,776 bytes does not end inside'),
    (member('b.json', ROW, pax_headers={'size': '-4096'}), 'b.json of -4,096 bytes does not end inside'),
    (member('b.json', ROW, pax_headers={'size': str(10 ** 30)}), r'1,000,.* bytes does not end inside'),
    (member('b', size=1 << 40, type=tarfile.XHDTYPE), '1,099,511,627,776 bytes, expected at most 65,536'),
    (member('b', size=1 << 40, type=tarfile.GNUTYPE_LONGNAME), '1,099,511,627,776 bytes, expected at most 65,536'),
    (bytes(1024) + member('b.json', ROW), 'more data behind the end-of-archive marker there: a second archive')])
def test_what_a_header_declares_is_not_believed(tmp_path, tok, blocks, words):
    path = tmp_path / 'a.tar'
    path.write_bytes(member('a.json', ROW) + blocks + bytes(1024))
    source = TextSource(str(path), tok, 8)
    assert len(source) == 2 and source[0].tokens.tolist() == [5] * 8
    with pytest.raises(BadSample, match=f'a.tar: damaged or truncated tar at offset 1024 of .*{words}'):
        source[1]


def test_links_and_sparse_members_have_no_bytes_to_read(tmp_path, tok):
    sparse = {'GNU.sparse.major': '0', 'GNU.sparse.minor': '1', 'GNU.sparse.map': '0,1', 'GNU.sparse.size': '99',
              'GNU.sparse.name': 'd.json'}
    links = [member(name, type=kind, linkname='a.json')
             for name, kind in (('b.json', tarfile.LNKTYPE), ('c.json', tarfile.SYMTYPE))]
    path = tmp_path / 'a.tar'
    path.write_bytes(member('a.json', ROW) + b''.join(links) + member('d', b'1', pax_headers=sparse)
                     + member('folder', type=tarfile.DIRTYPE) + member('e.json', ROW) + bytes(20480))
    source = TextSource(str(path), tok, 8)
    assert len(source) == 5 and not source.damaged
    assert source[0].tokens.tolist() == source[4].tokens.tolist() == [5] * 8
    for i, name in enumerate('bcd', 1):
        with pytest.raises(BadSample, match=f'a.tar: {name}.json: .*a link or a sparse member of the tar'):
            source[i]
    path.write_bytes(member('a.jpg', jpeg()) + member('a.txt', type=tarfile.LNKTYPE, linkname='b.txt') + bytes(1024))
    with pytest.raises(BadSample, match='a.tar: a: a link or a sparse member'):
        CaptionSource(str(path), tok, 64, View(28, 4))[0]


def test_an_item_beyond_its_bound_is_refused_unread(tmp_path, tok, monkeypatch):
    path = tmp_path / 'a.tar'
    with open(path, 'wb') as f:
        f.write(member('a.jpg', size=3 << 30))
        f.seek(3 << 30, 1)
        f.write(member('a.txt', b'x') + member('b.txt', b'x' * (32 << 20)) + member('b.jpg', b'junk') + bytes(1024))
    source = CaptionSource(str(path), tok, 64, View(28, 4))
    read = []
    monkeypatch.setattr(os, 'pread', lambda fd, size, offset, pread=os.pread: read.append(size) or
                        pread(fd, size, offset))
    for i, words in enumerate(['a: 3,221,225,472 bytes, expected at most 536,870,912',
                               'b: 33,554,432 bytes, expected at most 4,194,304']):
        with pytest.raises(BadSample, match=f'a.tar: {words}'):
            source[i]
    assert read == [1]
    with open(tmp_path / 'big.jpg', 'wb') as f:
        f.truncate(3 << 30)
    files = write_llava(tmp_path, [talk('q', 'a', image='big.jpg')])
    files['image_root'] = str(tmp_path)
    with pytest.raises(BadSample, match='entry 0: .*big.jpg: 3,221,225,472 bytes, expected at most'):
        InstructSource(**files, tokenizer=tok, seq_len=64, view=View(28, 4))[0]


def forged(idx, change):
    """The bytes of an index after change(head, columns), with a checksum that fits."""
    with open(idx, 'rb') as f:
        head, body = json.loads(f.readline()), f.read()
    count, n = len(head['columns']), head['n']
    columns = dict(zip(head['columns'], np.frombuffer(body, '<i8', count * n).reshape(count, n).copy()))
    columns['names'] = np.frombuffer(body, np.uint8, offset=8 * count * n)
    change(head, columns)
    body = b''.join(column.tobytes() for column in columns.values())
    return json.dumps({**head, 'crc': zlib.crc32(body)}).encode() + b'\n' + body


def lies(size):
    def put(name, values, dtype='<i8', **keys):
        def change(head, columns):
            columns[name] = np.array(values, dtype)
            head.update(keys)
        return change
    yield from (put('offsets', v) for v in ([0, -2], [0, size], [-2**63, 0], [2**63 - 1, 0], [0]))
    yield from (put('sizes', v) for v in ([512, size], [1, -1], [1, 2**63 - 1], [1, 2, 3]))
    yield from (put('group', v, n_group=n) for v, n in (([0, 2], 3), ([0, -1], 1), ([0, 2**62], 2**62 + 1), ([5, 5], 1)))
    yield put('names', np.frombuffer(b'a\0b.json\0', np.uint8), np.uint8, n_byte=9, n=1)
    yield put('names', np.zeros(1000, np.uint8), np.uint8, n_byte=1000)
    for keys in (dict(n=1), dict(n=10**15), dict(n_byte=2**62), dict(n=-1), dict(version=2), dict(columns=['offsets']),
                 dict(columns=7), dict(damage=None), dict(n_group=1), dict(time=1.5), dict(size=10**30)):
        yield lambda head, columns, keys=keys: head.update(keys)


def test_an_index_is_believed_only_where_it_can_be_true(tmp_path):
    path = write_rows(tmp_path / 'a.tar', [[5] * 9, [6] * 9], '.json')
    want = members_of(path)
    whole = open(path + '.idx', 'rb').read()
    for content in [forged(path + '.idx', change) for change in lies(os.path.getsize(path))]:
        assert content != whole
        open(path + '.idx', 'wb').write(content)
        files.tar_index.cache_clear()
        tracemalloc.start()
        assert members_of(path) == want and files.open_tars([path])[0][1:] == (2, 2, '')
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()
        assert open(path + '.idx', 'rb').read() == whole                 # made anew


def test_an_index_that_shrinks_while_a_run_goes_on_is_one_bad_row(tmp_path, tok):
    path = write_rows(tmp_path / 'a.tar', [[5] * 9, [6] * 9], '.json')
    members_of(path)

    with open(path + '.idx', 'rb') as f:
        head = json.loads(f.readline())
    head.update(n=9, n_group=9, n_byte=0)                                # the line alone is believed at first
    open(path + '.idx', 'wb').write(json.dumps(head).encode() + b'\n' + bytes(9 * 24))
    files.tar_index.cache_clear()
    source = TextSource(path, tok, 8)
    assert len(source) == 9 and source[1].tokens[0] == 6
    with pytest.raises(BadSample, match='a.tar: its index has changed: start again'):
        source[8]


def test_the_index_is_cached_and_follows_the_tar(tmp_path, tok, monkeypatch):
    path = write_rows(tmp_path / 'a.tar', [[5] * 9] * 3)
    TextSource(path, tok, 8)
    files.tar_index.cache_clear()
    monkeypatch.setattr(files, '_build_tar_index', lambda path: pytest.fail('built again'))
    assert len(TextSource(path, tok, 8)) == 3 and os.path.exists(path + '.idx')
    monkeypatch.undo()
    write_rows(tmp_path / 'a.tar', [[7] * 9] * 4)
    source = TextSource(path, tok, 8)
    assert len(source) == 4 and source[0].tokens[0] == 7  # neither the old index nor the old file handle
    whole = open(path + '.idx', 'rb').read()
    for junk in (b'', b'junk', whole[:200], whole[:-1], whole[:-9] + b'x' * 9, whole.replace(b'json', b'jsox', 1)):
        open(path + '.idx', 'wb').write(junk)
        files.tar_index.cache_clear()
        assert len(TextSource(path, tok, 8)) == 4
        assert open(path + '.idx', 'rb').read() == whole


@pytest.mark.skipif(not shutil.which('tar'), reason='no tar command here')
@pytest.mark.parametrize('style', ['gnu', 'pax', 'ustar'])
def test_tars_of_another_writer(tmp_path, style):
    content = {f"{'long ' * n}/{i:03d}.{kind}": os.urandom(i * 37) for n in (1, 12, 26) for i in range(5)
               for kind in ('jpg', 'txt', 'syn.json') if style != 'ustar' or n < 26}
    for name, data_ in content.items():
        os.makedirs(os.path.dirname(tmp_path / 'in' / name), exist_ok=True)
        (tmp_path / 'in' / name).write_bytes(data_)
    subprocess.run(['tar', f'--format={style}', '-cf', tmp_path / 'a.tar', '-C', tmp_path / 'in', '.'], check=True)
    stamp = files.stamp_of(str(tmp_path / 'a.tar'))
    members, damage = members_of(stamp[0])
    assert not damage and {name.removeprefix('./'): files.read_at(stamp, offset, size, 1 << 20)
                           for name, offset, size in members} == content
    index = files.tar_index(stamp, '')
    samples = dict(index.sample(r) for r in range(index.n_group))
    assert len(samples) == index.n_group == len(content) // 3
    assert {f'{key.removeprefix("./")}.{suffix}': files.read_at(stamp, *place, 1 << 20)
            for key, members in samples.items() for suffix, place in members.items()} == content


# --- many tars ---
def many(folder, n=110):
    folder.mkdir()
    for i in range(n):
        write_tar(folder / f'{i:03d}.tar', [(f'{j}.json', b'[5, %d]' % i) for j in range(i % 3 + 1)])
    whole = (folder / '007.tar').read_bytes()
    (folder / '007.tar').write_bytes(whole[:700])                        # half a download
    return [str(folder / f'{i:03d}.tar') for i in range(n)]


def test_processes_index_as_one_does_and_once(tmp_path, monkeypatch):
    found = [[(os.path.basename(stamp[0]), n, n_group, damage.rpartition('/')[2]) for stamp, n, n_group, damage in
              files.open_tars(many(tmp_path / name), n_process=n)] for name, n in (('one', 1), ('two', 2))]
    assert found[0] == found[1] and found[0][8] == ('008.tar', 3, 3, '') and found[0][6] == ('006.tar', 1, 1, '')
    assert found[0][7][:3] == ('007.tar', 1, 1) and found[0][7][3].startswith('007.tar: damaged or truncated tar at')
    for name in os.listdir(tmp_path / 'one'):
        if name.endswith('.idx') and not name.startswith('007'):         # whose time differs
            one, two = (open(tmp_path / d / name, 'rb').read().partition(b'\n')[2] for d in ('one', 'two'))
            assert one == two
    assert len(os.listdir(tmp_path / 'two')) == 220
    for later in ('_build_tar_index', '_load_index'):                    # the second time, the heads are enough
        monkeypatch.setattr(files, later, lambda *_: pytest.fail('built or read again'))
    assert len(files.open_tars([str(p) for p in sorted((tmp_path / 'two').glob('*.tar'))], n_process=2)) == 110


def test_a_process_that_dies_while_indexing_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(files, '_build_tar_index', lambda path: os._exit(9))
    with pytest.raises(UserError, match='one of the processes died: killed, or out of memory'):
        files.open_tars(many(tmp_path / 'a'), n_process=2)


def test_ranks_that_start_together_share_the_indexing(tmp_path, monkeypatch):
    paths = many(tmp_path / 'a', 150)
    code = CHILD + f"""
import hashlib, files
made = []
build = files._build_tar_index
files._build_tar_index = lambda path: made.append(path) or build(path)
found = files.open_tars(files.find({str(tmp_path / 'a')!r}, '.tar'), n_process=1)
print(hashlib.sha256(repr(found).encode()).hexdigest(), len(made))"""
    ranks = [subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True, env=child_env(
        RANK=str(r), WORLD_SIZE='3', LOCAL_WORLD_SIZE='3')) for r in range(3)]
    said = [rank.communicate(timeout=120)[0].split() for rank in ranks]
    assert len({digest for digest, _ in said}) == 1 and sum(int(n) for _, n in said) >= 150
    assert not [name for name in os.listdir(tmp_path / 'a') if name.endswith('.tmp')]
    for path in paths:
        os.remove(path + '.idx')
    first = []
    monkeypatch.setattr(files, '_index_tar', lambda stamp, cache_dir: first.append(stamp[0]) or dict(n=1, n_group=1, damage=''))
    for rank in '012':
        monkeypatch.setenv('RANK', rank)
        monkeypatch.setenv('WORLD_SIZE', '3')
        files.open_tars(paths, n_process=1)
    assert first[::150] == [paths[0], paths[50], paths[100]] and len(set(first)) == 150


def test_the_index_goes_to_cache_dir_when_the_data_is_read_only(tmp_path, tok, monkeypatch):
    path = write_rows(tmp_path / 'a.tar', [[5] * 9] * 3)
    os.mkdir(path + '.idx')                                              # not writable, also for root
    TextSource(path, tok, 8, cache_dir=str(tmp_path / 'cache'))
    assert len(os.listdir(tmp_path / 'cache')) == 1 and not [f for f in os.listdir(tmp_path) if f.endswith('.tmp')]
    files.tar_index.cache_clear()
    monkeypatch.setattr(files, '_build_tar_index', lambda path: pytest.fail('built again'))
    TextSource(path, tok, 8, cache_dir=str(tmp_path / 'cache'))


def test_more_files_than_may_be_open(tmp_path, tok):
    code = CHILD + f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))              # files.py leaves three quarters to others
import data
source = data.TextSource({str(tmp_path)!r}, data.load_tokenizer({tok.path!r}), 8)
import os
print(len(source), sum(int(source[i].tokens[0]) for i in range(400)), len(os.listdir('/proc/self/fd')) < 32)"""
    for i in range(400):
        write_rows(tmp_path / f'{i:03d}.tar', [[i % 290] * 9])
    run = subprocess.run([sys.executable, '-c', code], env=child_env(), capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, f'400 {sum(i % 290 for i in range(400))} True\n', '')


