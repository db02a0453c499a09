"""data.py and mixture.py: layouts token by token, exact shares, every row once, the same data anyhow, hostile files."""
import gzip
import hashlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import threading
from fractions import Fraction

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data
import mixture
from conftest import child_env
from data import BadSample, CaptionSource, InstructSource, Loader, Mixture, Sample, TextSource, collate, load_tokenizer
from errors import UserError
from images import RESIZE, View, grid_of, open_image

X = -100
SENTENCES = [f"the {a} {b} is on the {c}, {n} times" for a in ('red', 'blue') for b in ('star', 'cat')
             for c in ('mat', 'box')
             for n in range(30)]


@pytest.fixture(scope='module')
def tok(tmp_path_factory):
    prefix = str(tmp_path_factory.mktemp('tok') / 't')
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(SENTENCES), model_prefix=prefix, vocab_size=300,
                                             model_type='bpe', byte_fallback=True, num_threads=1, minloglevel=2)
    return load_tokenizer(prefix + '.model')


def write_tar(path, members):
    with tarfile.open(path, 'w') as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def write_rows(path, rows, suffix='.json.gz'):
    pack = gzip.compress if suffix.endswith('gz') else bytes
    return write_tar(path,
                     [(f'{i:05d}{suffix}', pack(json.dumps(list(map(int, r))).encode())) for i, r in enumerate(rows)])


def jpeg(seed=0, size=(40, 30)):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, 'JPEG')
    return out.getvalue()


def write_llava(tmp_path, entries):
    for name in ('0.jpg', 'sub/1.jpg'):
        os.makedirs(tmp_path / 'images/sub', exist_ok=True)
        (tmp_path / 'images' / name).write_bytes(jpeg(len(name)))
    (tmp_path / 'llava.json').write_text(json.dumps(entries, indent=1))
    return dict(json=str(tmp_path / 'llava.json'), image_root=str(tmp_path / 'images'))


def talk(*texts, **keys):
    return {'id': 'x', **keys,
            'conversations': [{'from': ('human', 'gpt')[i % 2], 'value': t} for i, t in enumerate(texts)]}


class Numbers:
    """A source whose i-th item is the number i: rows of `per_row` windows in shards of the given sizes."""
    damaged = []

    def __init__(self, name, sizes, per_row=1, bad=(), length=None):
        self.name, self.group_sizes, self.items_per_row, self.bad = name, list(sizes), per_row, set(bad)
        self.outline = lambda i: (False, length(i) if length else 8)

    def __len__(self):
        return sum(self.group_sizes) * self.items_per_row

    def __getitem__(self, i):
        if i in self.bad:
            raise BadSample(f"{self.name}.tar: item {i}: is bad")
        ids = np.arange(9, dtype=np.int64) + i
        return Sample(ids[:-1], ids[1:], source=self.name, id=str(i))


def ids_of(mix, n):
    return [mix[i].id for i in range(n)]


# --- tokenizer ---
def test_special_ids_lie_above_the_tokenizers_own_and_text_never_contains_them(tok):
    assert tok.eot_id == 2 and (tok.image_id, tok.sep_id, tok.pad_id, tok.vocab_size) == (300, 301, 302, 303)
    ids = tok.encode('</s> <image> <sep> the red star \ud800')
    assert not set(ids) & {tok.eot_id, tok.image_id, tok.sep_id, tok.pad_id}
    ids = [tok.image_id] * 4 + tok.encode('the red star') + [tok.sep_id, tok.eot_id, 5000]
    assert tok.decode(ids) == 'the red star'


def test_hf_tokenizer_json_with_an_end_of_text_in_the_text(tmp_path):
    import tokenizers
    hf = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None))
    hf.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=320, special_tokens=['<|endoftext|>', '<|padding|>'],
                                             show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    hf.train_from_iterator(SENTENCES, trainer)
    hf.save(str(tmp_path / 'tokenizer.json'))
    t = load_tokenizer(str(tmp_path))                                    # the folder works too
    n = hf.get_vocab_size()
    assert t.eot_id == 0 and (t.image_id, t.sep_id, t.pad_id, t.vocab_size) == (n, n + 1, n + 2, n + 3)
    text = 'a <|endoftext|> in the <|padding|> text'
    assert min(t.encode(text)) > 1 and t.decode(t.encode(text)) == text
    parts = json.loads((tmp_path / 'tokenizer.json').read_text())
    parts['added_tokens'][0]['special'] = False                          # then the engine itself would find it
    (tmp_path / 'tokenizer.json').write_text(json.dumps(parts))
    assert 0 not in load_tokenizer(str(tmp_path)).encode(text)


@pytest.fixture(scope='module')
def neox(tmp_path_factory):
    """
    A tokenizer.json in GPT-NeoX-20B's layout: two special ids, 243 bytes (the 13 that UTF-8 never uses are left out),
    merges up to 50254, then added tokens of 24 to 2 spaces. The merges are ours: pairs of characters.
    """
    import tokenizers
    never = {chr(b) for b in (0xC0, 0xC1, *range(0xF5, 0x100))}
    alphabet = [c for c in sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()) if c not in never]
    letters = sorted(alphabet, key=lambda c: (not (c.isascii() and c.isalpha() or c == '\u0120'), c))
    merges = [(a, b) for a in letters for b in letters][:50254 - 2 - len(alphabet)]
    pieces = ['<|endoftext|>', '<|padding|>', *alphabet, *(a + b for a, b in merges)]
    hf = tokenizers.Tokenizer(tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    hf.normalizer = tokenizers.normalizers.NFC()
    hf.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    hf.decoder = tokenizers.decoders.ByteLevel()
    hf.add_special_tokens(pieces[:2])
    hf.add_tokens([tokenizers.AddedToken(' ' * n, normalized=True) for n in range(24, 1, -1)])
    folder = tmp_path_factory.mktemp('neox')
    hf.save(str(folder / 'tokenizer.json'))
    return folder


def test_gpt_neox_20b_has_its_published_ids_and_the_special_ids_live_in_free_rows(neox):
    from transformers import PreTrainedTokenizerFast
    t = load_tokenizer(str(neox))
    assert (t.eot_id, t.image_id, t.sep_id, t.pad_id, t.vocab_size) == (0, 50277, 50278, 50279, 50280)
    assert not t.leading_space and t.encode('\n') == [187]                            # as published
    for n in range(2, 25):                                                           # id = 50278 - n
        assert t.encode(' ' * n) == [50278 - n] and t.decode([50278 - n]) == ' ' * n
    judge = PreTrainedTokenizerFast(tokenizer_file=str(neox / 'tokenizer.json'))
    for text in ('def f(x):\n        return x', 'Fu\u00df  \u20ac \U0001f680', 'a\n\n\tb' + ' ' * 60 + 'c', ' a', ''):
        assert t.encode(text) == judge.encode(text, add_special_tokens=False) and t.decode(t.encode(text)) == text
    text = 'one <|endoftext|> two <|padding|>'                                       # in a text, text
    assert min(t.encode(text)) > 1 and t.decode(t.encode(text)) == text
    assert t.encode_next('cat') == t.encode(' cat')
    assert t.decode([0, 50277, *t.encode('cat'), 50278, 50279, 50431]) == 'cat'


@pytest.mark.parametrize('layout', ['bin', 'tar'])
def test_text_of_another_tokenizer_of_the_same_size_is_doubted(tmp_path, layout):
    import argparse

    import tokenizers
    texts = {name: open(module.__file__, encoding='utf-8').read() for name, module in (('a', argparse), ('b', tarfile))}
    for name, text in texts.items():
        hf = tokenizers.Tokenizer(tokenizers.models.BPE())
        hf.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        hf.decoder = tokenizers.decoders.ByteLevel()
        hf.train_from_iterator([text], tokenizers.trainers.BpeTrainer(
            vocab_size=1500, special_tokens=['<|endoftext|>'], show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
        hf.save(str(tmp_path / f'{name}.json'))
    a, b = (load_tokenizer(str(tmp_path / f'{name}.json')) for name in 'ab')
    assert a.vocab_size == b.vocab_size
    parts = [texts['b'][i:i + 3000] for i in range(0, 60000, 3000)]
    ids = [i for part in parts for i in (*a.encode(part), a.eot_id)]
    rows = [ids[i:i + 257] for i in range(0, len(ids) - 257, 257)]
    if layout == 'bin':
        np.array(ids, '<u2').tofile(tmp_path / 'x.bin')
        path = tmp_path / 'x.bin'
    else:
        rows[1:3] = [[77] * 257] * 2                      # padding does not decide
        path = write_rows(tmp_path / 'x.tar', rows)
    sources = [TextSource(str(path), t, 256) for t in (a, b)]
    assert a.doubt(sources[0]) == ''
    assert re.match(r"!!! text source 'text': in [5-8] of its first 8 windows .*b.json\?$", b.doubt(sources[1]))


def bytes_tokenizer(**parts):
    """A tokenizer.json whose ids are the bytes of a text."""
    import tokenizers
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    hf = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    hf.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return json.dumps({**json.loads(hf.to_str()), **parts})


def test_a_tokenizer_of_another_vocabulary_is_named_at_its_first_id(tmp_path, tok):
    def written(name, *added, swap=()):
        parts = json.loads(bytes_tokenizer(added_tokens=[dict(
            id=256 + i, content=piece, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
            for i, piece in enumerate(('<|endoftext|>', *added))]))
        names = {i: piece for piece, i in parts['model']['vocab'].items()}
        for a, b in (swap, swap[::-1]) if swap else ():
            parts['model']['vocab'][names[a]] = b
        (tmp_path / name).write_text(json.dumps(parts, indent=len(name)))
        return load_tokenizer(str(tmp_path / name))
    ours, same, more = written('ours.json'), written('again.json'), written('more.json', '[X]')
    assert same.sha256 != ours.sha256
    for other in (ours, same, more):                      # saved by another library, or with one more id: the same ids
        ours.check_same(other)
        other.check_same(ours)
    with pytest.raises(UserError, match="ours.json: id 60 is ']', in .*swapped.json it is '~': give that tokenizer"):
        ours.check_same(written('swapped.json', swap=(60, 93)))
    with pytest.raises(UserError, match="t.model: id 0 is '<unk>', in .*ours.json it is '!'"):
        tok.check_same(ours)


def test_truncation_padding_and_templates_of_a_tokenizer_file_are_off(tmp_path):
    (tmp_path / 'plain.json').write_text(bytes_tokenizer())
    want = load_tokenizer(str(tmp_path / 'plain.json')).encode('the red star')
    cut = {'direction': 'Right', 'max_length': 3, 'strategy': 'LongestFirst', 'stride': 0}
    pad = {'strategy': {'Fixed': 40}, 'direction': 'Right', 'pad_to_multiple_of': None, 'pad_id': 0, 'pad_type_id': 0,
           'pad_token': '!'}
    template = {'type': 'TemplateProcessing', 'pair': [], 'single': [{'SpecialToken': {'id': '!', 'type_id': 0}},
                                                                      {'Sequence': {'id': 'A', 'type_id': 0}}],
                'special_tokens': {'!': {'id': '!', 'ids': [0], 'tokens': ['!']}}}
    for parts in (dict(truncation=cut), dict(padding=pad), dict(post_processor=template)):
        (tmp_path / 'odd.json').write_text(bytes_tokenizer(**parts))
        t = load_tokenizer(str(tmp_path / 'odd.json'))
        assert t.encode('the red star') == want and len(want) == 12
        assert t.content == (tmp_path / 'odd.json').read_bytes() and t.sha256 == hashlib.sha256(t.content).hexdigest()


@pytest.mark.parametrize('parts, words', [
    (dict(model={'type': 'Nope'}), 'ModelUntagged'), (dict(truncation={'max_length': 3}), 'missing field'),
    (dict(pre_tokenizer={'type': 'Split', 'pattern': {'Regex': '(['}, 'behavior': 'Isolated', 'invert': False}),
     'Oniguruma error'),
    (dict(normalizer={'type': 'Precompiled', 'precompiled_charsmap': 'AAAA'}), 'Cannot parse precompiled_charsmap')])
def test_a_wrong_part_of_a_tokenizer_file_is_named(tmp_path, parts, words):
    (tmp_path / 'odd.json').write_text(bytes_tokenizer(**parts))
    with pytest.raises(UserError, match=f'odd.json: not readable as a tokenizer .*{words}'):
        load_tokenizer(str(tmp_path / 'odd.json'))


def test_a_missing_or_broken_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match='nothing.model: no such file.*train_tokenizer'):
        load_tokenizer(str(tmp_path / 'nothing.model'))
    with open(tmp_path / 'big.model', 'wb') as f:
        f.truncate(1 << 30)
    with pytest.raises(UserError, match='big.model: 1,073,741,824 bytes, expected at most 268,435,456'):
        load_tokenizer(str(tmp_path / 'big.model'))
    for name, content in [('bad.model', b'junk'), ('no.model', b''), ('bad.json', b'{'), ('list.json', b'[]')]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            load_tokenizer(str(tmp_path / name))


# --- text ---
@pytest.mark.parametrize('T', [2048, 1024, 100, 97, 3000])
def test_no_token_of_a_2049_row_is_lost(tmp_path, tok, T):
    rng = np.random.default_rng(T)
    rows = rng.integers(3, 300, (3, 2049))
    source = TextSource(write_rows(tmp_path / 'a.tar', rows), tok, T)
    assert source.items_per_row == -(-2048 // T)
    for r in range(3):
        windows = [source[r * source.items_per_row + w] for w in range(source.items_per_row)]
        assert np.concatenate([s.targets for s in windows]).tolist() == rows[r, 1:].tolist()
        assert np.concatenate([s.tokens for s in windows]).tolist() == rows[r, :-1].tolist()
        assert all(0 < len(s.tokens) <= T for s in windows)


@pytest.mark.parametrize('n, T', [(10_000, 96), (4097, 2048), (5000, 1024), (2050, 1000), (60, 17)])
def test_no_token_of_a_bin_file_is_lost(tmp_path, tok, n, T):
    ids = np.random.default_rng(n).integers(3, 300, n).astype('<u2')
    ids.tofile(tmp_path / 'a.bin')
    source = TextSource([str(tmp_path / 'a.bin')], tok, T)
    samples = [source[i] for i in range(len(source))]
    assert np.concatenate([s.targets for s in samples]).tolist() == ids[1:].tolist()
    assert all(0 < len(s.tokens) <= T and (s.tokens[1:] == s.targets[:-1]).all() for s in samples)


def test_a_last_row_shorter_than_its_windows_repeats_a_position(tmp_path, tok):
    (np.arange(4098) % 290 + 3).astype('<u2').tofile(tmp_path / 'a.bin')
    source = TextSource(str(tmp_path / 'a.bin'), tok, 1024)  # 2 + 2 windows, and 2 for the one position left over
    assert [len(source[i].tokens) for i in range(len(source))] == [1024] * 4 + [1, 1]


def test_rows_as_json_or_txt_and_a_short_last_row(tmp_path, tok):
    rows = [list(range(3, 36)), list(range(40, 73)), list(range(80, 85))]
    for suffix in ('.json', '.txt', '.json.gz'):
        source = TextSource(write_rows(tmp_path / f'a{suffix}.tar', rows, suffix), tok, 16)
        seen = [source[i].targets.tolist() for i in range(len(source))]
        assert sum(seen, []) == rows[0][1:] + rows[1][1:] + rows[2][1:] and len(seen) == 6


def test_both_sequence_lengths_see_the_same_row_order_and_a_cursor_carries_over(tmp_path, tok):
    paths = [write_rows(tmp_path / f'{s}.tar', np.full((7, 65), 10 * s + 3) + np.arange(7)[:, None]) for s in range(4)]
    long, short = [Mixture([TextSource(paths, tok, T)], [1], seed=5) for T in (64, 32)]
    assert [long[i].tokens[0] for i in range(28)] == [short[2 * i].tokens[0] for i in range(28)]
    assert [short[2 * i].id[:-1] for i in range(28)] == [short[2 * i + 1].id[:-1] for i in range(28)]
    start = long.cursor(11)
    assert start == {'text': 11} and short.cursor(5) == {'text': 3}      # a partly used row counts as used
    later = Mixture([TextSource(paths, tok, 32)], [1], seed=5, start=start)
    assert ids_of(later, 34) == ids_of(short, 56)[22:] and later.cursor(0) == start
    assert later.epochs(34) == {'text': 1.0}


def test_bad_rows_are_named(tmp_path, tok):
    good = gzip.compress(json.dumps([5] * 33).encode())
    bad = {'cut.json.gz': good[:-9], 'noise.json.gz': b'junk', 'float.json': b'[1.5, 2.5]',
           'nested.json': b'[[1, 2], [3, 4]]', 'big.json': json.dumps([5] * 32 + [302]).encode(),
           'negative.json': b'[5, -100, 7]', 'dict.json': b'{"a": 1}', 'deep.json': b'[' * 100_000, 'empty.json': b'',
           'long.json': json.dumps([5] * 34).encode(), 'huge.json': b'[5, 1e999]'}
    source = TextSource(write_tar(tmp_path / 'a.tar', [('first.json.gz', good), *bad.items()]), tok, 32)
    assert len(source[0].tokens) == 32
    for i, name in enumerate(bad, 1):
        with pytest.raises(BadSample, match='a.tar.*row 10' if name == 'long.json' else f'a.tar: {name}') as e:
            source[i]
        assert '\n' not in str(e.value)
    with pytest.raises(BadSample, match="big.json: id 302 is beyond the tokenizer's 300 ids"):
        source[5]
    np.array([5, 6, 7, 300, 5], '<u2').tofile(tmp_path / 'a.bin')
    with pytest.raises(BadSample, match='a.bin: row 0: id 300'):
        TextSource(str(tmp_path / 'a.bin'), tok, 8)[0]


def test_a_bad_first_row_or_tar_does_not_hide_the_rest(tmp_path, tok):
    (tmp_path / 'a.tar').write_bytes(b'junk' * 1000)
    write_tar(tmp_path / 'b.tar', [('0.json', b'junk'), ('1.json', json.dumps([5] * 33).encode())])
    source = TextSource(str(tmp_path), tok, 32)
    assert len(source) == 3 and source.row_len == 32 and len(source[2].tokens) == 32
    with pytest.raises(ValueError, match='a.tar: damaged or truncated tar at offset 0'):
        Mixture([source], [1], seed=0)
    with pytest.raises(BadSample, match='a.tar: damaged'):
        TextSource(str(tmp_path / 'a.tar'), tok, 32)


def test_text_of_another_tokenizer_is_refused(tmp_path, tok):
    np.arange(3, 50).astype('<u2').tofile(tmp_path / 'a.bin')
    (tmp_path / 'a.json').write_text(json.dumps({'tokenizer_sha256': tok.sha256, 'vocab_size': 303}))
    TextSource(str(tmp_path), tok, 8)
    (tmp_path / 'a.json').write_text(json.dumps({'tokenizer_sha256': '0' * 64, 'vocab_size': 50280}))
    with pytest.raises(ValueError, match='a.bin: written with another tokenizer.*50280'):
        TextSource(str(tmp_path), tok, 8)


def test_a_bin_shorter_than_it_was_written_is_named(tmp_path, tok):
    np.arange(3, 50).astype('<u2').tofile(tmp_path / 'a.bin')
    (tmp_path / 'a.json').write_text(json.dumps({'n_token': 47}))
    TextSource(str(tmp_path), tok, 8)
    whole = (tmp_path / 'a.bin').read_bytes()
    (tmp_path / 'a.bin').write_bytes(whole[:92])
    with pytest.raises(UserError, match='a.bin: 92 bytes, expected 94 for the 47 ids of .*a.json: truncated'):
        TextSource(str(tmp_path), tok, 8)
    (tmp_path / 'b.bin').write_bytes(whole[:93])
    with pytest.raises(UserError, match='b.bin: 93 bytes, expected two for each id: truncated'):
        TextSource(str(tmp_path / 'b.bin'), tok, 8)
    (tmp_path / 'a.json').write_text('{"n_token": "47"}')
    with pytest.raises(UserError, match="a.json: 'n_token' is '47', expected int"):
        TextSource(str(tmp_path), tok, 8)


def test_a_file_that_shrinks_while_a_run_goes_on_is_named(tmp_path, tok):
    np.tile(np.arange(3, 200), 25).astype('<u2').tofile(tmp_path / 'a.bin')              # three rows
    write_llava(tmp_path, [talk('the red', 'star')] * 9)
    rows = write_rows(tmp_path / 'a.tar', [[5] * 9] * 9)
    llava = dict(image_root='', seq_len=64, n_token=0, image_size=28)
    for source in (TextSource(str(tmp_path / 'a.bin'), tok, 8), TextSource(rows, tok, 8),
                   InstructSource(str(tmp_path / 'llava.json'), tokenizer=tok, **llava)):
        path = source.shards.stamps[0][0]
        source[0]                                                        # also one that is open already
        os.truncate(path, 100)
        with pytest.raises(BadSample, match=f'{path}.*found 0: a truncated file'):
            source[len(source) - 1]


def test_files_that_never_end_are_refused_instead_of_waited_for(tmp_path, tok):
    os.mkfifo(tmp_path / 'pipe')
    for name in ('a.bin', 'a.tar', 'a.json', 't.model'):
        os.symlink('pipe', tmp_path / name)
    llava = dict(image_root=str(tmp_path), tokenizer=tok, seq_len=64, n_token=3, image_size=28)
    signal.alarm(20)                                                     # ends the tests rather than waiting
    for source in (lambda: TextSource(str(tmp_path / '*.bin'), tok, 8), lambda: TextSource('/dev/zero', tok, 8),
                   lambda: CaptionSource(str(tmp_path / 'a.tar'), tok, 64, 4, 28),
                   lambda: InstructSource(str(tmp_path / 'a.json'), **llava)):
        with pytest.raises(UserError, match='not a file'):
            source()
    with pytest.raises(UserError, match='t.model: no such file'):
        load_tokenizer(str(tmp_path / 't.model'))
    np.arange(3, 50).astype('<u2').tofile(tmp_path / 'b.bin')
    os.symlink('pipe', tmp_path / 'b.json')
    with pytest.raises(UserError, match='b.json: not a file'):
        TextSource(str(tmp_path / 'b.bin'), tok, 8)
    (tmp_path / 'c.jsonl').write_text(json.dumps(talk('the red', 'star', image='pipe')))
    os.symlink('pipe', tmp_path / 'c.jsonl.idx')
    with pytest.raises(BadSample, match='c.jsonl: entry 0: .*pipe: not a file'):
        InstructSource(str(tmp_path / 'c.jsonl'), **llava)[0]
    assert os.path.isfile(tmp_path / 'c.jsonl.idx')
    signal.alarm(0)


@pytest.mark.parametrize('paths', ['missing.tar', 'miss*.bin', '.'])
def test_missing_files_are_named(tmp_path, tok, paths):
    with pytest.raises(ValueError, match='no such file|holds no file that ends in .bin or .tar'):
        TextSource(str(tmp_path / paths), tok, 8)


def dclm_shards(folder, sizes, first=3):
    """Shards as OpenLM's tools leave them: 2,049 ids a row, md5 names; rows begin with first, first + 1, ..."""
    folder.mkdir(parents=True)
    for i, n in enumerate(sizes):
        rows = [json.dumps([first + i * 8 + r] + [5] * 2048).encode() for r in range(n)]
        write_tar(folder / f'{i + 1:08d}.tar', [(f'{hashlib.md5(row).hexdigest()}.json.gz', gzip.compress(row))
                                                for row in rows])
    return [{'shard': f'{i + 1:08d}', 'num_sequences': n} for i, n in enumerate(sizes)]


@pytest.mark.parametrize('end', ['\n', ''])
def test_shards_are_as_many_and_as_long_as_their_manifest_says(tmp_path, tok, end):
    lines = dclm_shards(tmp_path / 'dclm', (3, 3, 2))
    manifest = tmp_path / 'dclm' / 'manifest.jsonl'

    def write(*rows):
        manifest.write_text('\n'.join(json.dumps(row) for row in rows) + end)
        return TextSource(str(tmp_path / 'dclm'), tok, 1024)
    source = write(*lines)
    assert len(source) == 16 and source.row_len == 2048 and source[14].tokens[0] == 3 + 2 * 8 + 1
    write(*lines[:2], {'shard': '00000003.tar', 'num_chunks': 2})        # older tools
    with pytest.raises(UserError, match=r'00000003.tar: 2 rows, expected 8 \(.*manifest.jsonl\): .* Fetch both again'):
        write(*lines[:2], {'shard': '00000003', 'num_sequences': 8})
    more = [{'shard': f'{i:08d}', 'num_sequences': 3} for i in (4, 5, 6, 7)]
    with pytest.raises(UserError, match='manifest.jsonl names 4 of 7 shards that are not there: .*00000004.tar, .*06.tar'
                                        r', ...; fetch them, or give the shards as a pattern such as .*/\*.tar'):
        write(*lines, *more)
    assert len(TextSource(str(tmp_path / 'dclm' / '*.tar'), tok, 1024)) == 16
    assert len(TextSource([str(tmp_path / 'dclm' / f'0000000{i}.tar') for i in (1, 3)], tok, 1024)) == 10
    for wrong in ('{"shard": "1"}', '{"shard": 1, "num_sequences": 2}', '7', '{', '{"shard": "1", "num_sequences": "x"}'):
        manifest.write_text(json.dumps(lines[0]) + '\n' + wrong)
        with pytest.raises(UserError, match='manifest.jsonl: not readable as lines of {"shard": name, "num_sequences": '):
            TextSource(str(tmp_path / 'dclm'), tok, 1024)
    write(*lines)
    half = tmp_path / 'dclm' / '00000002.tar'
    os.truncate(half, 1500)                                              # the download, not the manifest, is named
    with pytest.raises(UserError, match='00000002.tar: damaged or truncated tar'):
        Mixture([TextSource(str(tmp_path / 'dclm'), tok, 1024)], [1], seed=0)


def test_text_sets_keep_their_weights_and_each_its_place_in_the_next_stage(tmp_path, tok):
    weights = {'dclm': 0.7, 'starcoder': 0.2, 'proofpile': 0.1}
    for i, (name, n) in enumerate({'dclm': 7, 'starcoder': 4, 'proofpile': 3}.items()):
        dclm_shards(tmp_path / name, [n] * 3, first=3 + 40 * i)

    def mix(T, start=None):
        return Mixture([TextSource(str(tmp_path / name), tok, T, name) for name in weights], weights.values(), seed=5,
                       start=start)
    stage_1, n = mix(2048), 17
    assert stage_1.counts(1000) == {name: round(1000 * w) for name, w in weights.items()}
    assert all(abs(k - n * weights[name]) <= 1 for name, k in stage_1.counts(n).items())
    start = stage_1.cursor(n)
    assert start == stage_1.counts(n)
    stage_2 = mix(1024, start)                                           # half as long: two windows of each row
    for name, used in start.items():
        rows = [s.id for s in map(stage_1.__getitem__, range(200)) if s.source == name]
        later = [s.id for s in map(stage_2.__getitem__, range(200)) if s.source == name]
        k = len(later) // 2
        assert k >= 10 and [i[:-2] for i in later[0:2 * k:2]] == [i[:-2] for i in rows[used:used + k]]
        assert [i[:-1] for i in later[0:2 * k:2]] == [i[:-1] for i in later[1:2 * k:2]]
    assert stage_2.cursor(0) == start and mix(2048, stage_2.cursor(40)).cursor(0) == stage_2.cursor(40)


# --- captions ---
def test_caption_layout_token_by_token(tmp_path, tok):
    cap = tok.encode('the red star')
    members = [('x/b.txt', b'the blue cat'), ('x/a.jpg', jpeg(1)), ('x/a.txt', b' the red star\n'),
               ('x/b.c.txt', b'other'), ('x/b.JPG', jpeg(2))]            # any order, keys to the first dot
    path = write_tar(tmp_path / 'a.tar', members)
    source = CaptionSource(path, tok, 32, 4, 28)
    assert len(source) == 2
    by_id = {s.id: s for s in (source[0], source[1])}
    s, im, sep, eot = by_id['a.tar:x/a'], tok.image_id, tok.sep_id, tok.eot_id
    assert s.tokens.tolist() == [im, im, im, im, sep, *cap]
    assert s.targets.tolist() == [X, X, X, X, *cap, eot]
    assert s.images[0].shape == (3, 28, 28) and s.images[0].dtype == torch.uint8 and s.weights is None
    assert by_id['a.tar:x/b'].tokens.tolist() == [im] * 4 + [sep] + tok.encode('the blue cat')


def test_a_long_caption_is_cut_without_eot_and_counted(tmp_path, tok):
    cap = tok.encode(' '.join(SENTENCES[:9]))
    path = write_tar(tmp_path / 'a.tar', [('a.png', jpeg()), ('a.txt', ' '.join(SENTENCES[:9]).encode())])
    s = CaptionSource(path, tok, 20, 4, 28)[0]
    assert len(s.tokens) == 20 and s.targets[4:].tolist() == cap[:16] and s.n_truncated == 1
    exact = CaptionSource(path, tok, 5 + len(cap), 4, 28)[0]             # the eot just fits
    assert exact.targets[-1] == tok.eot_id and exact.n_truncated == 0
    with pytest.raises(ValueError, match='seq_len=5 .* at least 6'):
        CaptionSource(path, tok, 5, 4, 28)


def test_captions_from_json_and_syn_json(tmp_path, tok):
    syn = json.dumps({'syn_text': ['the red star', 'the blue cat']}).encode()
    members = [('a.jpg', jpeg()), ('a.json', json.dumps({'caption': 'the cat', 'url': 'x'}).encode()),
               ('b.jpg', jpeg()), ('b.json', json.dumps({'text': 'the box'}).encode()), ('b.syn.json', syn),
               ('c.jpg', jpeg()), ('c.json', json.dumps({'uid': '1', 'sha256': '2'}).encode()), ('c.syn.json', syn)]
    for i in range(20):
        members += [(f'k{i}.jpg', jpeg()), (f'k{i}.syn.json', syn), (f'k{i}.url.txt', b'http://x')]
    source = CaptionSource(write_tar(tmp_path / 'a.tar', members), tok, 64, 4, 28)
    texts = [tok.decode(source[i].targets) if (source[i].targets >= 0).all() else tok.decode(source[i].tokens)
             for i in range(len(source))]
    assert texts[:2] == ['the cat', 'the box'] and set(texts[2:]) == {'the red star', 'the blue cat'}


def test_the_caption_field_is_the_users_choice_and_what_auto_takes_is_said(tmp_path, tok):
    syn, info = json.dumps({'syn_text': ['the blue cat']}).encode(), json.dumps({'caption': 'the box'}).encode()
    path = write_tar(tmp_path / 'a.tar', [('a.jpg', jpeg()), ('a.txt', b'the red star'), ('a.json', info),
                                          ('a.syn.json', syn), ('b.jpg', jpeg()), ('b.txt', b'the mat')])
    options = dict(tokenizer=tok, seq_len=64, encoder_n_token=4, image_size=28)
    for field, words in dict(auto='the red star', txt='the red star', json='the box', syn='the blue cat').items():
        source = CaptionSource(path, caption_field=field, **options)
        assert tok.decode(source[0].tokens[5:]) == words
        assert source.note == (field == 'auto') * ('caption: captions: .txt of each sample (.syn.json is there too: '
                                                   '--caption_field=syn reads the synthetic captions)')
    with pytest.raises(BadSample, match=r"a.tar: b: no caption \(.syn.json 'syn_text'\).* among its members: jpg, txt"):
        source[1]
    path = write_tar(tmp_path / 'b.tar', [('a.jpg', jpeg()), ('a.txt', b'the red star'), ('a.json', info)])
    assert CaptionSource(path, **options).note == ''
    path = write_tar(tmp_path / 'c.tar', [('a.jpg', jpeg()), ('a.json', info), ('a.syn.json', syn)])
    assert "captions: 'caption' or 'text' of the .json that have one (.syn" in CaptionSource(path, **options).note
    with pytest.raises(UserError, match="caption_field='alt': expected one of auto, txt, json, syn$"):
        CaptionSource(path, caption_field='alt', **options)


def test_tars_without_images_or_without_the_captions_asked_for_are_refused_at_once(tmp_path, tok):
    options = dict(tokenizer=tok, seq_len=64, encoder_n_token=4, image_size=28)
    syn = json.dumps({'syn_text': ['the blue cat']}).encode()
    bare = write_tar(tmp_path / 'bare.tar', [('0.url.txt', b'http://x'), ('0.syn.json', syn), ('0.json', b'{}'),
                                             ('0.paug.json', b'{}'), ('0.npz', b'x')])       # DataCompDR as published
    with pytest.raises(UserError, match=r'bare.tar: no image \(.jpeg, .jpg, .png, .webp\) in this tar, only .json, .npz, '
                                        r'.paug.json, .syn.json, .url.txt; DataCompDR\'s tars hold captions without'):
        CaptionSource(bare, **options)
    plain = write_tar(tmp_path / 'plain.tar', [('0.jpg', jpeg()), ('0.txt', b'the red star')])
    with pytest.raises(UserError, match=r'plain.tar: no synthetic caption \(.syn.json\) in this tar, only .jpg, .txt'):
        CaptionSource(plain, caption_field='syn', **options)


def test_jpegs_of_many_times_the_target_are_decoded_smaller_where_nothing_shifts(tmp_path, tok):
    rng, members, want = np.random.default_rng(0), [], []
    for size in ((111, 112), (112, 116), (302, 240), (304, 224), (464, 480)):        # decoded at 1, 1/2, 1, 1/4, 1/8
        photo = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        for kind in ('jpeg', 'png'):
            out = io.BytesIO()
            photo.save(out, kind, **dict(jpeg={'quality': 90}, png={})[kind])
            members += [(f'{size[0]}{kind}.{kind}', out.getvalue()), (f'{size[0]}{kind}.txt', b'the red star')]
            want.append((kind, size, RESIZE['letterbox'](open_image(out.getvalue()), 28)))
    source = CaptionSource(write_tar(tmp_path / 'a.tar', members), tok, 32, 4, 28)
    for i, (kind, size, whole) in enumerate(want):
        image = source[i].images[0]
        assert image.equal(whole) == (kind == 'png' or size[0] in (111, 302)), (kind, size)
        change = (image.float() - whole.float()).abs()
        assert change.mean() < 1.5 and change.max() <= 12, (kind, size)  # of 255; photos at 384: 0.4 and 10


def test_names_that_are_there_twice_are_two_samples(tmp_path, tok):
    members = [(name, content) for seed, colour in enumerate(('red', 'blue')) for name, content in
               (('a.jpg', jpeg(seed)), ('a.txt', f'the {colour} cat'.encode()))]
    source = CaptionSource(write_tar(tmp_path / 'c.tar', members), tok, 32, 4, 28)
    assert len(source) == 2
    batch = collate([source[0], source[1]], tok.pad_id)
    assert len(batch.images) == 2 and not torch.equal(*batch.images)     # one key, not one image


def test_bad_captions_are_named(tmp_path, tok):
    image = jpeg()
    bad = {'corrupt': [('.jpg', image[:len(image) // 2]), ('.txt', b'x')], 'noise': [('.jpg', b'junk'), ('.txt', b'x')],
           'noimage': [('.txt', b'x')], 'nocaption': [('.jpg', image)], 'blank': [('.jpg', image), ('.txt', b' \n')],
           'latin': [('.jpg', image), ('.txt', b'\xff\xfe')], 'json': [('.jpg', image), ('.json', b'{')]}
    path = write_tar(tmp_path / 'a.tar', [(k + s, c) for k, v in bad.items() for s, c in v])
    source = CaptionSource(path, tok, 32, 4, 28)
    for i, key in enumerate(bad):
        with pytest.raises(BadSample, match=f'a.tar: {key}: ') as e:
            source[i]
        assert '\n' not in str(e.value)


# --- collate ---
def test_collate_pads_and_counts(tok):
    a = Sample(np.arange(5), np.array([1, 2, X, 4, 5]), source='a', id='a0')
    b = Sample(np.arange(3), np.array([1, X, 3]), np.array([.5, 0, .25], np.float32), source='b', id='b0')
    batch = collate([a, b], tok.pad_id, names=['b', 'a'])
    assert batch.tokens.shape == (2, 8) and batch.tokens[1, 3:].eq(tok.pad_id).all()
    assert batch.targets[1, 3:].eq(X).all()
    assert batch.source.tolist() == [1, 0] and batch.ids == ['a0', 'b0'] and batch.images is None
    assert batch.image_index is None
    assert batch.kept.tolist() == [0, 1, 3, 4, 8, 10] == (batch.targets.flatten() != X).nonzero().flatten().tolist()
    assert batch.weights[0].tolist() == [1, 1, 0, 1, 1, 0, 0, 0] and batch.weights[1, :3].tolist() == [.5, 0, .25]
    assert batch.stats['b'] == dict(n_sample=1, n_text=3, n_image_position=0, n_kept=2, n_pad=5, n_image=0,
                                    n_truncated=0)
    for pad_to, width in ((11, 8), (6, 6)):               # columns that no row needs count as pads and are not there
        cut = collate([a, b], tok.pad_id, pad_to=pad_to)
        assert cut.tokens.shape == (2, width) and cut.tokens.equal(batch.tokens[:, :width])
        assert (cut.stats['a']['n_pad'], cut.stats['b']['n_pad']) == (pad_to - 5, pad_to - 3)
        assert cut.stats['b']['n_text'] == 3
    with pytest.raises(ValueError, match='a a0: a row of 5 positions does not fit pad_to=4'):
        collate([a, b], tok.pad_id, pad_to=4)
    assert batch.to('cpu').tokens.equal(batch.tokens) and batch.to('cpu').ids == batch.ids


def test_columns_of_pads_that_are_left_out_change_nothing(tok):
    from model import Decoder, ModelConfig, VLM
    torch.manual_seed(0)
    model = VLM(Decoder(ModelConfig(2, 2, 32, 328, 64)))
    rng = np.random.default_rng(3)
    ids = [rng.integers(0, 300, n) for n in (13, 22)]
    samples = [Sample(row[:-1], np.where(np.arange(len(row) - 1) < 4, X, row[1:]), source='a') for row in ids]
    narrow = collate(samples, tok.pad_id, pad_to=64)
    wide = torch.full((2, 64), tok.pad_id)
    wide[:, :24] = narrow.tokens
    results = []
    for tokens, targets in ((narrow.tokens, narrow.targets), (wide, F.pad(narrow.targets, (0, 40), value=X))):
        loss, weight, row_loss = model(tokens, targets)
        results.append((loss, weight, row_loss, *torch.autograd.grad(loss, list(model.parameters()))))
    assert narrow.tokens.shape == (2, 24)
    for a, b in zip(*results):                            # sums of the same numbers in blocks of other sizes
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('n_slot', [0, 3, 5, 8])
def test_images_that_do_not_fit_their_slots_name_the_row(tok, n_slot):
    t = np.array([tok.image_id] * n_slot + [5, 6])
    s = Sample(t, t.copy(), None, [torch.zeros(3, 8, 8, dtype=torch.uint8)], 'caption', 'a.tar:k', 4, tok.image_id)
    with pytest.raises(ValueError,
                       match=f'caption a.tar:k: row 0 .* has {n_slot} image positions, its 1 image.* of 4 need 4'):
        collate([s], tok.pad_id)


def test_images_of_their_own_sizes_in_captions_and_conversations(tmp_path, tok):
    view = View(42, 45, shortest=16, patch=14, per_patch=1, split=True)
    sizes = [(60, 40), (40, 60), (30, 30), (90, 30), (420, 20), (60, 40)]
    for i, size in enumerate(sizes):
        (tmp_path / f'{i}.jpg').write_bytes(jpeg(i, size))
    tar = write_tar(tmp_path / 'a.tar', [x for i, size in enumerate(sizes)
                                         for x in ((f'{i}.jpg', jpeg(i, size)), (f'{i}.txt', b'the red star'))])
    (tmp_path / 'llava.json').write_text(json.dumps(
        [talk('the red', 'star', 'the blue', 'cat', image=f'{i % 5}.jpg') for i in range(6)]))
    files = dict(json=str(tmp_path / 'llava.json'), image_root=str(tmp_path))
    for source in (CaptionSource(tar, tok, 96, 45, 42, view=view),
                   InstructSource(**files, tokenizer=tok, seq_len=96, n_token=45, image_size=42, view=view, split_turns=True)):
        with pytest.raises(BadSample, match="4: image of 210 x 10 pixels: aspect='keep'"):
            source[4]
        samples = [source[i] for i in (0, 1, 2, 3, 5)]
        for size, s in zip([sizes[i] for i in (0, 1, 2, 3, 5)], samples, strict=True):
            grids = [grid_of(w, h, 42, 16, 14) for w, h in [(size[0] // 2, size[1] // 2)] * 4 + [size]]
            n = sum(rows * columns for rows, columns in grids)
            assert s.n_image_token == n and [p.shape for p in s.images[0]] == [(3, 14 * r, 14 * c) for r, c in grids]
            for row, targets in zip(np.atleast_2d(s.tokens), np.atleast_2d(s.targets)):
                assert (row == tok.image_id).sum() == n and row[n] == tok.sep_id and (targets[:n] == X).all()
        batch, n = collate(samples, tok.pad_id), sum(s.n_image_token for s in samples)
        rows, used = (1, 5) if samples[0].tokens.ndim == 1 else (2, 4)   # the last conversation has image 0 again
        index = [i for i in (0, 1, 2, 3, 4 if rows == 1 else 0) for _ in range(rows)]
        assert len(batch.images) == used and batch.image_index.tolist() == index
        assert all(len(image) == 5 for image in batch.images)
        (stats,) = batch.stats.values()
        assert (stats['n_image'], stats['n_image_position']) == (5, rows * n)
        moved = batch.to('cpu')
        assert all(torch.equal(a, b) for x, y in zip(moved.images, batch.images) for a, b in zip(x, y))
    lenient = Mixture([CaptionSource(tar, tok, 96, 45, 42, view=view)], [1], seed=1, max_bad_samples=1)
    assert sum(len(lenient[i].bad) for i in range(6)) == 1


# --- mixture ---
@pytest.mark.parametrize('share', [0, 0.01, 0.05, 0.1, 0.3, 0.5, 0.9, 1, Fraction(1, 3), 1 / 3])
def test_a_share_is_exact_to_one_sample_in_any_window(share):
    mix = Mixture([Numbers('a', [50]), Numbers('b', [50])], [share, 1 - Fraction(str(share))], seed=1)
    at = np.cumsum([0] + [mix.locate(n)[0].name == 'a' for n in range(1200)])
    rng, p = random.Random(0), Fraction(str(share))
    for _ in range(2000):
        lo, hi = sorted(rng.choices(range(1201), k=2))
        assert abs(int(at[hi] - at[lo]) - p * (hi - lo)) <= 1
    assert mix.counts(1200)['a'] == at[1200] and mix.counts(777)['a'] == at[777]


def test_nested_shares_count_what_they_deliver():
    text = Mixture([Numbers('t0', [9]), Numbers('t1', [8])], [0.7, 0.3], seed=2)
    mix = Mixture([text, Numbers('c', [10]), Numbers('i', [6])], [0.8, 0.15, 0.05], seed=2)
    names = [mix[n].source for n in range(400)]
    for n in (0, 1, 37, 400):
        assert mix.counts(n) == {name: names[:n].count(name) for name in mix.names}
    assert mix.counts(400) == {'t0': 224, 't1': 96, 'c': 60, 'i': 20} and mix.names == ['t0', 't1', 'c', 'i']


@pytest.mark.parametrize('sizes, per_row', [([1], 1), ([2], 3), ([5, 1, 9], 2), ([3] * 40, 1), ([1000], 1),
                                            ([7, 11] * 20, 4)])
def test_every_row_comes_once_per_epoch_and_epochs_differ(sizes, per_row):
    source = Numbers('a', sizes, per_row)
    mix, n = Mixture([source], [1], seed=3), len(source)
    epochs = [[int(mix[e * n + i].id) for i in range(n)] for e in range(3)]
    for order in epochs:
        assert sorted(order) == list(range(n))
        assert all(order[i + 1] == order[i] + 1
                   for i in range(n) if i % per_row < per_row - 1)  # windows of a row stay together
    assert n < 40 or len({tuple(o) for o in epochs}) == 3
    other = Mixture([source], [1], seed=4)
    assert n < 40 or [int(other[i].id) for i in range(n)] != epochs[0]


def test_reads_stay_local(monkeypatch):
    monkeypatch.setattr(mixture, 'SHARDS_TOGETHER', 4)
    mix = Mixture([Numbers('a', [10] * 20)], [1], seed=3)
    shards = [int(mix[i].id) // 10 for i in range(200)]
    assert all(len(set(shards[i:i + 40])) == 4 for i in range(0, 200, 40))
    assert shards[:40] != sorted(shards[:40]) and len(set(shards[:10])) > 1


def test_the_bijection_spreads():
    for n in (1, 2, 3, 5, 8, 100, 1025):
        for key in (0, 1, 2**64 - 1):
            assert sorted(mixture.permute(i, n, key) for i in range(n)) == list(range(n))
    first = [mixture.permute(0, 10, mixture._mix(key)) for key in range(5000)]
    assert max(abs(first.count(v) - 500) for v in range(10)) < 120       # 5.6 standard deviations of a fair draw


def test_the_kth_item_of_a_source_does_not_depend_on_the_shares():
    def stream(weights, name):
        mix = Mixture([Numbers('t', [30, 20], 2), Numbers('c', [40], bad=[3, 4, 5])], weights, seed=9,
                      max_bad_samples=99)
        return [s.id for s in map(mix.__getitem__, range(300)) if s.source == name]
    for name, weights in [('t', ([1, 0], [0.9, 0.1], [0.5, 0.5])), ('c', ([0, 1], [0.9, 0.1], [0.5, 0.5]))]:
        streams = sorted((stream(w, name) for w in weights), key=len)
        assert all(s[:len(streams[0])] == streams[0] for s in streams) and len(streams[0]) >= 30


PINNED = 't0 t5 c1 t3 t14 t9 c0 t11 t6 t2 c2 t1'.split()


def test_the_order_is_pinned():
    mix = Mixture([Numbers('t', [5, 6, 7]), Numbers('c', [4])], [0.75, 0.25], seed=7)
    assert [mix[n].source + mix[n].id for n in range(12)] == PINNED  # a change here breaks resuming every older run


def test_a_start_after_any_number_of_samples_does_the_same_work(tmp_path, tok, monkeypatch):
    rng = np.random.default_rng(0)
    paths = [write_rows(tmp_path / f'{s}.tar', rng.integers(3, 300, (7, 65))) for s in range(40)]
    members = [m for i in range(9) for m in ((f'{i}.jpg', jpeg(i)), (f'{i}.txt', b'the red star'))]
    caption = write_tar(tmp_path / 'c.tar', members)
    work = []
    for owner, name in ((os, 'pread'), (mixture, '_mix'), (mixture, '_hash')):
        monkeypatch.setattr(owner, name, lambda *a, f=getattr(owner, name), name=name: work.append(name) or f(*a))

    def start(n):
        work.clear()
        mix = Mixture([TextSource(paths, tok, 32), CaptionSource(caption, tok, 32, 4, 28)], [0.7, 0.3], seed=5)
        for i in range(n, n + 8):
            mix[i]
        return {name: work.count(name) for name in set(work)}
    first = start(0)
    for n in (10**3, 10**6, 10**9, 10**12):
        later = start(n)                                                 # a window more or less at the ends of 8 samples
        assert abs(later['pread'] - first['pread']) <= 6 and abs(later['_hash'] - first['_hash']) <= 2
        assert later['_mix'] < 2 * first['_mix']                         # the bijection walks a random few steps


@pytest.mark.parametrize('sources, weights, words', [
    (['a', 'b'], [1], 'expected 2 shares'), (['a'], [-1], 'shares >= 0'), (['a'], [0], 'not all 0'),
    (['a', 'a'], [1, 1], "'a' occurs twice")])
def test_impossible_mixtures_are_refused(sources, weights, words):
    with pytest.raises(ValueError, match=words):
        Mixture([Numbers(name, [3]) for name in sources], weights, seed=0)
    with pytest.raises(ValueError, match="'a' is empty"):
        Mixture([Numbers('a', [])], [1], seed=0)


def test_bad_items_stop_or_are_replaced_in_the_same_source():
    sources = [Numbers('t', [20]), Numbers('c', [20], bad=range(0, 20, 2))]
    with pytest.raises(BadSample, match='c.tar: item .* is bad'):
        ids_of(Mixture(sources, [0.5, 0.5], seed=1), 40)
    lenient = Mixture(sources, [0.5, 0.5], seed=1, max_bad_samples=5)
    samples = [lenient[n] for n in range(40)]
    assert [s.source for s in samples].count('c') == 20 and all(int(s.id) % 2 for s in samples if s.source == 'c')
    assert sum(bool(s.bad) for s in samples) == 10 and ids_of(lenient, 40) == [s.id for s in samples]
    batch = collate(samples[:8], 0)
    assert batch.bad == [m for s in samples[:8] for m in s.bad] and batch.bad
    nested = Mixture([sources[0], Mixture(sources[1:], [1], seed=1, max_bad_samples=5)], [0.5, 0.5], seed=1)
    assert ids_of(nested, 40) == ids_of(lenient, 40)                     # a Mixture inside keeps what it allows
    with pytest.raises(BadSample, match='c: 100 items in a row are bad'):
        Mixture([Numbers('c', [20], bad=range(20))], [1], seed=1, max_bad_samples=5)[0]


# --- loader ---
CHILD = f"import sys; sys.path[:0] = {[os.path.dirname(__file__), os.path.dirname(data.__file__)]!r}\n"


def loader(mix, **keys):
    defaults = dict(start=0, stop=6, global_batch_size=8, micro_batch_size=2, pad_id=0, n_worker=0)
    return Loader(mix, **{**defaults, **keys})


def numbers_mix(**keys):
    return Mixture([Numbers('t', [30, 20], 2), Numbers('c', [40], **keys)], [0.75, 0.25], seed=9)


def test_anything_with_a_length_and_items_is_a_source():
    mix = Mixture([[f'a{i}' for i in range(20)], [f'b{i}' for i in range(3)]], [0.9, 0.1], seed=1)
    drawn = [mix[n] for n in range(200)]
    assert sum(x[0] == 'b' for x in drawn) == 20 and drawn == [mix[n] for n in range(200)]
    assert sorted(x for x in drawn if x[0] == 'a')[::9] == sorted(f'a{i}' for i in range(20))    # 180 = 9 epochs
    ids = np.arange(9)
    batch = collate([Mixture([[Sample(ids[:-1], ids[1:])]], [1], seed=0)[0]], 0, names=['source 0'])
    assert batch.source.tolist() == [0] and list(batch.stats) == ['source 0']


def test_noise_follows_the_draw_of_a_row_and_its_length_alone(tok):
    class Texts(Numbers):
        def __getitem__(self, i):
            tokens = np.arange(5 + i % 3)
            return Sample(tokens, tokens + 1, source=self.name, id=str(i))
    mix = Mixture([Texts('a', [6])], [1.0], 7)
    alpha, width = 5.0, 400
    alone = [collate([mix[n]], tok.pad_id).noise(alpha, width)[0, :len(mix[n].tokens)] for n in range(12)]
    for samples in (range(12), range(11, -1, -1)):
        batch = collate([mix[n] for n in samples], tok.pad_id, pad_to=32)
        noise = batch.noise(alpha, width)
        assert noise.shape == (*batch.tokens.shape, width) and noise.dtype == torch.float32
        for row, n in zip(noise, samples):
            assert torch.equal(row[:len(alone[n])], alone[n]) and not row[len(alone[n]):].any()
    for noise in alone:                                                  # uniform, of NEFTune's size
        bound = alpha / (len(noise) * width) ** 0.5
        assert 0.99 * bound < noise.abs().max() <= bound and abs(noise.mean()) < 0.1 * bound
        assert noise.std() == pytest.approx(bound / 3 ** 0.5, rel=0.05)
    assert not any(torch.equal(a[:5], b[:5]) for i, a in enumerate(alone) for b in alone[:i])        # 2 epochs of 6
    split = Sample(np.array([[1, 2, 3], [1, tok.pad_id, tok.pad_id]]), np.full((2, 3), X), source='a', key=4)
    assert collate([split], tok.pad_id).rows == [(4, 3), (5, 1)]


def test_any_number_of_processes_splits_the_same_global_order():
    want = ids_of(numbers_mix(), 48)
    for world_size in (1, 2, 4):
        for mb in (1, 2):
            n_micro = 8 // (world_size * mb)
            ranks = [[b.ids for b in loader(numbers_mix(), rank=r, world_size=world_size, micro_batch_size=mb)]
                     for r in range(world_size)]
            assert all(len(r) == 6 * n_micro for r in ranks)
            assert [i for m in range(6 * n_micro) for r in ranks for i in r[m]] == want


@pytest.mark.parametrize('n_worker', [0, 1])
def test_batches_are_pinned_by_the_process_that_asked(n_worker, monkeypatch):
    """DataLoader's own thread would start CUDA on the current device, GPU 0 of every rank, before set_device."""
    who = []
    monkeypatch.setattr(mixture.Batch, 'pin_memory', lambda b: who.append((os.getpid(), threading.get_ident())) or b)
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: pytest.fail('asked for an accelerator'))
    batches = loader(numbers_mix(), n_worker=n_worker, pin_memory=True)
    assert len(list(batches)) == len(who) == 24
    assert set(who) == {(os.getpid(), threading.get_ident())}


@pytest.mark.parametrize('n_worker', [1, 2])
def test_any_number_of_workers_gives_the_same_batches(n_worker):
    state = torch.get_rng_state()
    a, b = list(loader(numbers_mix())), list(loader(numbers_mix(), n_worker=n_worker))
    assert len(a) == len(b) == 24 and torch.equal(state, torch.get_rng_state())
    for x, y in zip(a, b):
        assert x.tokens.equal(y.tokens) and x.kept.equal(y.kept) and x.ids == y.ids and x.stats == y.stats


def test_resuming_at_any_step_continues():
    whole = [b.ids for b in loader(numbers_mix())]
    for start in range(7):
        assert [b.ids for b in loader(numbers_mix(), start=start)] == whole[4 * start:]
    assert [b.ids for b in loader(numbers_mix(), start=2, stop=4)] == whole[8:16]


def test_a_bad_item_in_a_worker_is_one_clear_line():
    for n_worker in (0, 2):
        batches = loader(numbers_mix(bad=range(40)), n_worker=n_worker)
        with pytest.raises(BadSample) as e:
            list(batches)
        assert str(e.value).startswith('c.tar: item ') and '\n' not in str(e.value)
        batches.close()


@pytest.mark.parametrize('keys, words', [(dict(world_size=3), '3 processes x micro_batch_size=2'),
                                         (dict(micro_batch_size=3), '1 processes x micro_batch_size=3'),
                                         (dict(micro_batch_size=8, world_size=2), '2 processes x micro_batch_size=8')])
def test_batches_that_do_not_divide_are_refused(keys, words):
    with pytest.raises(ValueError, match=f'global_batch_size=8 is not a multiple of {words}'):
        loader(numbers_mix(), **keys)


def test_length_groups_hold_the_same_samples_in_each_window():
    source = Numbers('t', [200], length=lambda i: i * 37 % 101)
    mix = Mixture([source], [1], seed=9)
    grouped = loader(mix, stop=10, group_window=5)
    assert [b.ids for b in loader(mix, start=3, stop=10, group_window=5)] == [b.ids for b in grouped][12:]
    spread = []
    for window in range(2):
        steps = [list(grouped.samples(s)) for s in range(5 * window, 5 * window + 5)]
        assert sorted(sum(steps, [])) == list(range(40 * window, 40 * window + 40))
        spread += [max(map(mix.outline, s))[1] - min(map(mix.outline, s))[1] for s in steps]
    assert np.mean(spread) < 40  # of 100: an ungrouped batch of 8 spans about 78


def test_rows_with_and_without_images_do_not_meet(world, tok):
    """Windows of 3 steps, micro-batches of 2 on 2 ranks: one micro-batch of a window at most holds both kinds."""
    data = world / 'data' / 'instruct'
    source = InstructSource(str(data / 'llava.json'), str(data / 'images'), tok, 64, 4, 28)
    mix = Mixture([source], [1], seed=4)
    ranks = [list(loader(mix, stop=6, group_window=3, rank=r, world_size=2)) for r in range(2)]
    micro = [batch for pair in zip(*ranks) for batch in pair]             # 4 a step, 12 a window
    shows = {sample.id: bool(sample.images) for sample in (source[i] for i in range(len(source)))}
    assert 0 < sum(shows.values()) < len(shows)
    for first in (0, 12):
        kinds = [{shows[i] for i in batch.ids} for batch in micro[first:first + 12]]
        assert sum(len(kind) > 1 for kind in kinds) <= 1 and {True} in kinds and {False} in kinds
        assert sorted(mix[n].id for n in range(2 * first, 2 * first + 24)) == sorted(
            i for batch in micro[first:first + 12] for i in batch.ids)


def test_without_fork_the_loader_says_so_and_works(monkeypatch, capsys):
    monkeypatch.setattr(mixture.multiprocessing, 'get_all_start_methods', lambda: ['spawn'])
    assert len(list(loader(numbers_mix(), n_worker=2))) == 24
    assert 'no fork' in capsys.readouterr().out


def test_a_process_ends_although_its_workers_ignore_signals():
    code = CHILD + "from test_data import loader, numbers_mix\nx = loader(numbers_mix(), n_worker=2, stop=10**6)\n" \
                   "next(x)\nprint('ready', flush=True)\nsys.exit('one line')"
    run = subprocess.run([sys.executable, '-c', code], env=child_env(), capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout, run.stderr) == (1, 'ready\n', 'one line\n')


class LongNames(Numbers):
    """Samples whose batches are larger than a pipe holds, so that a worker is often in the middle of writing one."""
    def __getitem__(self, i):
        sample = super().__getitem__(i)
        sample.id = 'x' * 50_000
        return sample


def kill_workers(n_try, seed):
    """Kill a worker at random moments of three kinds of work; only next() may tell, in one line."""
    rng = random.Random(seed)
    for i in range(n_try):
        batches = loader(Mixture([LongNames('t', [50])], [1], seed=1), n_worker=1 + i % 2, stop=10 ** 6)
        next(batches)
        victim = rng.choice(batches.workers)
        timer = threading.Timer(rng.uniform(0, 0.02), os.kill, (victim.pid, signal.SIGKILL))
        timer.start()
        while i % 3 and victim.exitcode is None:
            if i % 3 == 1:
                sorted(str(k) for k in range(1000))
            else:
                torch.save({'x': torch.zeros(10_000)}, io.BytesIO())
        try:
            while True:
                next(batches)
        except UserError as e:
            assert str(e) == ('a loader worker died (exit code -9): killed, or out of memory or of /dev/shm; '
                              '--n_worker=0 makes the batches in the training process'), e
        timer.join()
        batches.close()
    print('killed', n_try)


def test_a_worker_killed_at_any_moment_is_one_line_from_next():
    code = CHILD + ("import faulthandler\nfaulthandler.dump_traceback_later(150, exit=True)          # should it hang: where\n"
                    "from test_data import kill_workers\nkill_workers(45, seed=3)")
    run = subprocess.run([sys.executable, '-c', code], env=child_env(), capture_output=True, text=True, timeout=300)
    assert (run.returncode, run.stdout, run.stderr) == (0, 'killed 45\n', '')


def test_the_death_of_another_child_is_not_a_workers():
    batches = loader(numbers_mix(), n_worker=2)
    for _ in range(8):
        assert subprocess.run([sys.executable, '-S', '-c', 'raise SystemExit(3)']).returncode == 3
        next(batches)
    assert len(list(batches)) == 16 and not batches.workers


def test_an_error_of_the_code_in_a_worker_stays_what_it_is(monkeypatch):
    monkeypatch.setattr(Numbers, '__getitem__', lambda self, i: {}['a bug'])
    batches = loader(numbers_mix(), n_worker=1)
    with pytest.raises(KeyError, match='a bug'):
        next(batches)
    batches.close()


def test_real_sources_survive_damage_in_workers(tmp_path, tok):
    members = [m for i in range(12)
               for m in ((f'{i:02d}.jpg', jpeg(i) if i % 4 else b'junk'), (f'{i:02d}.txt', SENTENCES[i].encode()))]
    text = TextSource(write_rows(tmp_path / 't.tar', np.random.default_rng(0).integers(3, 300, (20, 65))), tok, 64)
    caption = CaptionSource(write_tar(tmp_path / 'c.tar', members), tok, 64, 4, 28)
    mix = Mixture([text, caption], [0.5, 0.5], seed=1, max_bad_samples=9)
    a, b = [list(loader(mix, stop=3, pad_id=tok.pad_id, pad_to=64, n_worker=n)) for n in (0, 2)]
    for x, y in zip(a, b):
        assert x.tokens.equal(y.tokens) and x.bad == y.bad and (x.images is None or x.images.equal(y.images))
    assert sum(len(x.bad) for x in a) >= 3 and all('c.tar' in m for x in a for m in x.bad)
