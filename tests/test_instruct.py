"""instruct.py: layouts token by token, LLaVA-665K's five image roots, boxes in two frames, rows that do not fit."""
import json
import os
import sys

import numpy as np
import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data
import instruct
import mixture
from data import BadSample, InstructSource, Mixture, collate
from errors import UserError
from test_data import SENTENCES, X, jpeg, talk, tok, write_llava  # noqa: F401 (tok is a fixture)


# --- instructions ---
def test_instruction_layout_token_by_token(tmp_path, tok):
    files = write_llava(tmp_path,
                        [talk('<image>\nthe red', 'star', 'the blue\n<image>', 'cat', image='0.jpg'),
                         talk('the box', 'mat')])
    source = InstructSource(**files, tokenizer=tok, seq_len=64, n_token=3, image_size=28, system_prompt='the')
    q1, a1, q2, a2, system, sep = *map(tok.encode, ('the red', 'star', 'the blue', 'cat', 'the')), tok.sep_id
    row = [tok.image_id] * 3 + [sep] + system + q1 + [sep] + a1 + [sep] + q2 + [sep] + a2 + [sep]
    kept = [X] * 4 + [X] * len(system + q1) + [X] + a1 + [sep] + [X] * len(q2) + [X] + a2 + [sep]
    s = source[0]
    assert s.tokens.tolist() == row[:-1] and s.targets.tolist() == kept[1:] and s.weights is None and len(s.images) == 1
    prompt = data.instruct_prompt('<image> the red', 3, tok, 'the')
    assert row[:len(prompt)] == prompt
    assert len(prompt) == 5 + len(system + q1)  # what evaluate feeds ends before the answer
    s = source[1]                                                        # text only: no image and no leading sep
    row = system + tok.encode('the box') + [sep] + tok.encode('mat') + [sep]
    assert s.tokens.tolist() == row[:-1] and s.images == [] and s.n_image_token == 0


def test_an_answer_weighs_one_in_total(tmp_path, tok):
    files = write_llava(tmp_path, [talk('the red', 'star', 'the', 'the blue cat is on the box', image='0.jpg')])
    s = InstructSource(**files, tokenizer=tok, seq_len=64, n_token=3, image_size=28, loss_average='answer')[0]
    assert s.weights.dtype == np.float32 and ((s.weights > 0) == (s.targets != X)).all()
    assert abs(s.weights.sum() - 2) < 1e-6
    n = len(tok.encode('star')) + 1
    assert np.allclose(s.weights[s.targets != X][:n], 1 / n)


def test_split_turns_share_one_image(tmp_path, tok):
    files = write_llava(tmp_path, [talk('the red', 'star', 'the blue cat', 'box', image='0.jpg'),
                                   talk('the mat', 'star', image='0.jpg'), talk('the mat', 'cat', image='sub/1.jpg'),
                                   talk('the mat', 'cat', 'red', 'box')])
    source = InstructSource(**files, tokenizer=tok, seq_len=64, n_token=3, image_size=28, system_prompt='the',
                            split_turns=True)
    s = source[0]
    assert s.tokens.shape == s.targets.shape and s.tokens.shape[0] == 2 and len(s.images) == 1
    for r, (q, a) in enumerate([('the red', 'star'), ('the blue cat', 'box')]):
        row = data.instruct_prompt(q, 3, tok, 'the') + tok.encode(a) + [tok.sep_id]
        n = len(row) - 1
        assert s.tokens[r, :n].tolist() == row[:-1] and (s.tokens[r, n:] == tok.pad_id).all()
        kept = s.targets[r] != X
        assert s.targets[r][kept].tolist() == tok.encode(a) + [tok.sep_id] and not kept[n:].any()
    batch = collate([source[i] for i in range(4)], tok.pad_id)
    assert batch.tokens.shape[0] == 6 and batch.images.shape == (2, 3, 28, 28)       # 0.jpg twice: encoded once
    assert batch.image_index.tolist() == [0, 0, 0, 1]
    assert batch.stats['instruct']['n_image_position'] == 4 * 3


def test_shuffled_turns_keep_their_answers_and_follow_the_draw(tmp_path, tok):
    words = ('star', 'cat', 'mat', 'box')
    files = write_llava(tmp_path, [talk(*(text for w in words for text in (f'<image>\nthe {w}', w)), image='0.jpg'),
                                   talk('the red', 'star', 'the blue', 'cat')])
    build = lambda **keys: InstructSource(**files, tokenizer=tok, seq_len=64, n_token=3, image_size=28, **keys)
    source, plain = build(shuffle_turns=True), build()
    assert (source[0].tokens == plain[0].tokens).all() and (plain.draw(0, 5).tokens == plain[0].tokens).all()
    orders = set()
    for key in range(200):
        s = source.draw(0, key)
        row = [*s.tokens.tolist(), int(s.targets[-1])]
        assert row[:4] == [tok.image_id] * 3 + [tok.sep_id] and s.n_image_token == 3         # the image stays first
        texts = ' '.join(map(str, row[4:])).split(f' {tok.sep_id}')
        texts = [tok.engine.decode([int(i) for i in text.split()]) for text in texts[:8]]
        assert all(q == f'the {a}' for q, a in zip(texts[::2], texts[1::2]))                 # each with its own answer
        assert [t for t in s.targets.tolist() if t != X] == [t for a in texts[1::2] for t in (*tok.encode(a), tok.sep_id)]
        orders.add(tuple(texts[1::2]))
    assert {frozenset(order) for order in orders} == {frozenset(words)} and len(orders) > 18            # of 24
    first = sum(source.draw(1, mixture._hash('draw', k)).tokens[1] == plain[1].tokens[1] for k in range(400))
    assert 150 < first < 250                                             # of 400: 5 standard deviations
    mix = Mixture([source], [1.0], 7)
    again, other = Mixture([build(shuffle_turns=True)], [1.0], 7), Mixture([source], [1.0], 8)
    rows = [mix[n].tokens.tolist() for n in range(40)]                   # 20 epochs
    assert rows == [again[n].tokens.tolist() for n in range(40)]
    assert len({tuple(row) for row in rows if len(row) == len(plain[0].tokens)}) > 8
    assert rows != [other[n].tokens.tolist() for n in range(40)]
    with pytest.raises(UserError, match='shuffle_turns with split_turns'):
        build(shuffle_turns=True, split_turns=True)


def test_truncation_always_leaves_an_answer_and_what_it_cuts_is_said(tmp_path, tok):
    long, n = ' '.join(SENTENCES[:10]), 40
    rows = [talk('the red', 'star', long, 'cat'), talk(long, 'star'), talk('red', long), talk(long, long, image='0.jpg'),
            talk('the red', 'star'), talk(long, 'star', 'the red', 'cat', image='0.jpg')]
    source = InstructSource(**write_llava(tmp_path, rows), tokenizer=tok, seq_len=n, n_token=3, image_size=28)
    q, sep, samples = tok.encode(long), tok.sep_id, [source[i] for i in range(len(source))]
    assert [s.n_truncated for s in samples] == [1, 1, 1, 1, 0, 1]
    assert all((s.targets != X).any() and len(s.tokens) <= n for s in samples)
    assert (samples[0].targets != X).sum() == len(tok.encode('star')) + 1
    assert len(samples[2].tokens) == n and sep not in samples[2].targets[2:]
    answer = tok.encode('star') + [sep]                                  # the question keeps its end, the answer is whole
    assert [*samples[1].tokens, sep] == q[-(n - len(answer)):] + [sep] + answer
    both = [tok.image_id] * 3 + [sep] + q[-18:] + [sep] + tok.encode(long)[:18]      # half of the room each
    assert [*samples[3].tokens, samples[3].targets[-1]] == both and (samples[3].targets != X).sum() == 18
    assert source.note == 'instruct: 3 first question(s) leave no room for an answer in seq_len=40: their beginning is cut: ' \
                          'llava.json:1, llava.json:3, llava.json:5'
    source = InstructSource(**write_llava(tmp_path, rows), tokenizer=tok, seq_len=n, n_token=3, image_size=28,
                            split_turns=True)
    for i in range(len(source)):
        rows_kept = (np.atleast_2d(source[i].targets) != X).sum(1)
        assert (rows_kept > 0).all() and len(rows_kept) == (2 if i in (0, 5) else 1)
    for system in range(28, 44):                                         # down to no room at all
        source = InstructSource(**write_llava(tmp_path, rows), tokenizer=tok, seq_len=n, n_token=3, image_size=28,
                                system_prompt='\u2603' * (system // 3))
        try:
            assert all((source[i].targets != X).any() for i in range(len(source)))
        except BadSample as e:
            assert 'no answer is left within seq_len=40: the system prompt fills it' in str(e)
            assert len(data.instruct_prompt('', source.n_token, tok, source.system_prompt)) > n


def test_bad_entries_are_named(tmp_path, tok):
    (tmp_path / 'secret.jpg').write_bytes(jpeg())
    bad = [{'id': 'x'}, 7, {'conversations': []}, talk('q'), {'conversations': [{'from': 'gpt', 'value': 'a'}] * 2},
           {'conversations': [{'from': 'human', 'value': 'a'}] * 2}, talk('q', 7), talk('q', 'a', image='gone.jpg'),
           *[talk('q', 'a', image=image) for image in
             ('../secret.jpg', 'sub/../../secret.jpg', 'sub\\..\\..\\x', f'{tmp_path}/secret.jpg', ['0.jpg'], 'a\0b')]]
    files = write_llava(tmp_path, bad)
    source = InstructSource(**files, tokenizer=tok, seq_len=40, n_token=3, image_size=28)
    for i in range(len(bad)):
        with pytest.raises(BadSample, match=f'llava.json: entry {i}: ') as e:
            source[i]
        assert '\n' not in str(e.value)


def test_json_of_any_shape_is_indexed_and_broken_json_named(tmp_path, tok):
    entries = [talk('the ünïcode ☃ star', 'red'), talk('b', '] , [ "'), talk('c', 'mat')]
    arguments = dict(image_root='', tokenizer=tok, seq_len=64, n_token=0, image_size=28)
    ways = {'a.json': json.dumps(entries), 'b.json': json.dumps(entries, indent=2, ensure_ascii=False),
            'c.jsonl': ''.join(json.dumps(e, ensure_ascii=False) + '\n' for e in entries),
            'd.json': '\ufeff' + json.dumps(entries)}
    want = None
    for name, text in ways.items():
        (tmp_path / name).write_text(text, encoding='utf-8')
        source = InstructSource(str(tmp_path / name), **arguments)
        got = [source[i].tokens.tolist() for i in range(len(source))]
        want = want or got
        assert got == want and len(got) == 3
    (tmp_path / 'e.json').write_text('[\n' + json.dumps(entries[0]) + ',\n' + '{"conversations": [')
    with pytest.raises(ValueError, match='e.json: line 3, entry 1: broken JSON'):
        InstructSource(str(tmp_path / 'e.json'), **arguments)
    (tmp_path / 'g.json').write_text(json.dumps(entries)[:-1])           # cut between two entries
    with pytest.raises(ValueError, match='g.json: broken JSON: the list has no end after entry 2'):
        InstructSource(str(tmp_path / 'g.json'), **arguments)
    for begin in ('', ' \n\t', '\ufeff', '\ufeff \n'):
        (tmp_path / 'h.json').write_text(begin + json.dumps(entries)[:-1] + '\n', encoding='utf-8')
        with pytest.raises(UserError, match='h.json: broken JSON: the list has no end after entry 2'):
            InstructSource(str(tmp_path / 'h.json'), **arguments)
    for text in (json.dumps(entries) + '\n' + json.dumps(entries[0]), json.dumps(entries) * 2, ways['c.jsonl'] + ']'):
        (tmp_path / 'i.json').write_text(text)
        with pytest.raises(UserError, match='i.json: line [14]: broken JSON: text behind entry 2, the last of the'):
            InstructSource(str(tmp_path / 'i.json'), **arguments)
    for n in (8180, 8192, 8200, 100_000, 5_000_000):                     # around the window in which an entry is parsed
        (tmp_path / 'j.json').write_text(json.dumps([*entries, 10 ** 19, 'x' * n, 'x' * (n - 24), 123]))
        if n < data.MAX_TEXT_BYTES:
            assert len(InstructSource(str(tmp_path / 'j.json'), **arguments)) == 7
        else:
            with pytest.raises(UserError, match='j.json: line 1, entry 4: broken JSON or an entry above 4,194,304'):
                InstructSource(str(tmp_path / 'j.json'), **arguments)
    (tmp_path / 'f.json').write_text('[]')
    with pytest.raises(ValueError, match='f.json: no entries'):
        InstructSource(str(tmp_path / 'f.json'), **arguments)


# --- LLaVA-665K: five roots ---
ROOTS = {'coco/train2017': '{:012d}.jpg', 'gqa/images': '{}.jpg', 'ocr_vqa/images': '{:010d}.jpg',
         'textvqa/train_images': '{:016x}.jpg', 'vg/VG_100K': '{}.jpg', 'vg/VG_100K_2': '{}.jpg'}


def mix665k(folder, n=5):
    """Rows of every root and of ShareGPT, which have no image; the images of ocr_vqa are of three kinds."""
    rows, names = [], [f'{root}/{name.format(1000 + i)}' for root, name in ROOTS.items() for i in range(n)]
    for i, name in enumerate(names):
        path = folder / 'images' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.startswith('ocr_vqa'):
            path = path.with_suffix(('.jpg', '.png', '.gif')[i % 3])
        path.write_bytes(jpeg(i))
        rows += [talk('<image>\nthe red', 'star', image=name), talk('the red\n<image>', 'star', 'the', 'cat', image=name)]
        rows += [talk('the box', 'mat')] * (i % 3 == 0)
    (folder / 'mix.json').write_text(json.dumps(rows))
    return dict(json=str(folder / 'mix.json'), image_root=str(folder / 'images')), rows, names


def test_the_five_roots_of_llava_are_looked_through_once(tmp_path, tok, monkeypatch):
    where, rows, names = mix665k(tmp_path)
    options = dict(tokenizer=tok, seq_len=64, n_token=3, image_size=28)
    for name in ('lexists', 'exists', 'isfile'):
        monkeypatch.setattr(os.path, name, lambda path, plain=getattr(os.path, name): plain(path) if 'images' not in
                            str(path) else pytest.fail(f'{path}: asked for alone'))
    listed = []
    monkeypatch.setattr(os, 'listdir', lambda path, plain=os.listdir: listed.append(path) or plain(path))
    source = InstructSource(**where, **options)
    assert not source.damaged and source.note == '' and sorted(listed) == sorted(f'{tmp_path}/images/{r}' for r in ROOTS)
    monkeypatch.undo()
    batch = collate([source[i] for i in range(len(rows))], tok.pad_id)   # .png and .gif of what is called .jpg, too
    assert len(batch.images) == len(names) and len(batch.tokens) == len(rows) == 70
    assert batch.stats['instruct']['n_image'] == 60


def test_missing_images_are_counted_and_named_before_training(tmp_path, tok):
    where, rows, names = mix665k(tmp_path)
    gone = [name for name in names if name.startswith('vg/VG_100K_2')] + names[:2] + names[12:13]
    for name in gone:
        os.remove(tmp_path / 'images' / name)
    os.rmdir(tmp_path / 'images' / 'vg/VG_100K_2')
    source = InstructSource(**where, tokenizer=tok, seq_len=64, n_token=3, image_size=28)
    line = (f'{tmp_path}/mix.json: 8 of 30 images are not in {tmp_path}/images: coco/train2017 2 of 5 (000000001000.jpg, '
            '000000001001.jpg); ocr_vqa/images 1 of 5 (0000001002.jpg); vg/VG_100K_2 5 of 5 (1000.jpg, 1001.jpg, 1002.jpg, '
            '...): fetch them, or --max_bad_samples=N replaces and counts up to N of them as they are drawn')
    assert source.note == line
    with pytest.raises(UserError) as e:
        Mixture([source], [1], seed=0)
    assert str(e.value) == line
    mix = Mixture([source], [1], seed=0, max_bad_samples=99)
    drawn = [mix[i] for i in range(len(rows))]
    assert sum(len(s.bad) > 0 for s in drawn) == 16 and all('images' in m for s in drawn for m in s.bad)
    assert not {key for s in drawn for key in s.image_keys} & set(gone)
    for i in range(12):                                                  # more folders than a line holds
        rows.append(talk('q', 'a', image=f'more/{i}/0.jpg'))
    (tmp_path / 'mix.json').write_text(json.dumps(rows))
    line, = InstructSource(**where, tokenizer=tok, seq_len=64, n_token=3, image_size=28).damaged
    assert '20 of 42 images' in line and '; and in 7 more folders: fetch' in line and '\n' not in line


def test_names_of_any_alphabet_are_found(tmp_path, tok):
    names = ['\u00e9.jpg', '\u96ea\u4eba.jpg', 'a b.jpg', '\u00c3\u00a9.jpg', 'sub/\u2603/0.jpg']
    for i, name in enumerate(names):
        (tmp_path / 'images' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'images' / name).write_bytes(jpeg(i))
    for raw in (False, True):
        (tmp_path / f'{raw}.json').write_text(json.dumps([talk('q', 'a', image=name) for name in names],
                                                         ensure_ascii=not raw), encoding='utf-8')
        source = InstructSource(str(tmp_path / f'{raw}.json'), str(tmp_path / 'images'), tok, 64, 3, 28)
        assert [source[i].image_keys for i in range(5)] == [[name] for name in names]
        assert source.damaged == [] if raw else all('\u00c3' in line for line in source.damaged)


# --- boxes ---
def padded(box, width, height, digits=2):
    """A box in pixels as shares of the padded square (LLaVA's expand2square), as Python writes it."""
    side = max(width, height)
    at = [(side - width) // 2, (side - height) // 2] * 2
    return str([round((int(v) + a) / side, digits) for v, a in zip(box, at)])


def test_boxes_of_the_square_become_boxes_of_the_photo():
    rng = np.random.default_rng(3)
    for digits, close in ((2, 0.5e-2), (3, 0.5e-3)):
        for _ in range(300):
            width, height = map(int, rng.integers(20, 900, 2))
            if max(width, height) > 4 * min(width, height) or width == height:
                continue                                                 # rounding grows with side / shorter side
            x, y = (np.sort(rng.integers(0, of + 1, 2)) for of in (width, height))
            box = [x[0], y[0], x[1], y[1]]
            text = padded(box, width, height, digits)
            if max(len(number) for number in text[1:-1].split(', ')) < 4:
                continue                                                 # one decimal each: not taken for a box
            mapped = instruct.original_boxes(f'at {text}.', width, height)
            got = json.loads(mapped[3:-1])
            grown = max(width, height) / np.array([width, height] * 2)
            assert (np.abs(np.array(got) - np.array(box) / ([width, height] * 2)) <= close * grown + close + 1e-9).all()
            assert all(len(repr(v)) <= 2 + digits and 0 <= v <= 1 for v in got)


@pytest.mark.parametrize('text, size, want', [
    ('[0.25, 0.35, 0.75, 0.6]', (400, 200), '[0.25, 0.2, 0.75, 0.7]'),
    ('[0.35, 0.25, 0.6, 0.75]', (200, 400), '[0.2, 0.25, 0.7, 0.75]'),
    ('two: [0.25,0.35,0.75,0.60] and [0.00, 0.25, 1.00, 0.75].', (400, 200),
     'two: [0.25, 0.20, 0.75, 0.70] and [0.00, 0.00, 1.00, 1.00].'),
    ('[0.251, 0.350, 0.752, 0.600]', (400, 200), '[0.251, 0.200, 0.752, 0.700]'),
    ('[0.25, 0.245, 0.75, 0.755]', (400, 200), '[0.25, 0.0, 0.75, 1.0]'),            # an annotator's hand: clipped
    *[(text, (400, 200), text) for text in (
        '[0.25, 0.05, 0.75, 0.60]', '[0.25, 0.35, 0.75, 0.90]',          # reach into the padding: none of the square
        '[0.75, 0.35, 0.25, 0.60]', '[0.25, 0.60, 0.75, 0.35]',          # corners in no order
        '[0.1, 0.3, 0.5, 0.7]', '[1, 2, 3, 4]', '[0.25, 0.35]', '[0.25, 0.35, 0.75]', '[0.25, 0.35, 0.75, 0.60, 0.90]',
        '(0.25, 0.35, 0.75, 0.60)', '[12.25, 0.35, 0.75, 0.60]', '[0.25, 0.35, 0.75, 1.60]', '[0.25, 0.35, 0.75, -0.60]',
        '[0.2512, 0.3512, 0.7512, 0.6012]', '[[0.25, 0.35], [0.75, 0.60]]', '[0.25 0.35 0.75 0.60]', 'x[.25, .35, .75, .60]')],
    ('[0.25, 0.35, 0.75, 0.60]', (300, 300), '[0.25, 0.35, 0.75, 0.60]')])
def test_what_is_no_box_of_the_square_stays(text, size, want):
    assert instruct.original_boxes(text, *size) == want


def test_the_frame_of_the_boxes_is_the_users_choice(tmp_path, tok):
    rows = [talk('where is [0.25, 0.35, 0.75, 0.6]?', '[0.25, 0.35, 0.75, 0.6]', image='wide.jpg'),
            talk('the list [0.25, 0.35, 0.75, 0.6]', '[0.25, 0.35, 0.75, 0.6]')]
    files = write_llava(tmp_path, rows)
    (tmp_path / 'images/wide.jpg').write_bytes(jpeg(1, (400, 200)))
    want = {'original': '[0.25, 0.35, 0.75, 0.6]', 'letterbox': '[0.25, 0.2, 0.75, 0.7]'}
    for boxes, text in want.items():
        source = InstructSource(**files, tokenizer=tok, seq_len=128, n_token=3, image_size=28, boxes=boxes)
        assert tok.decode(source[0].tokens).count(text) == 2
        assert tok.decode(source[1].tokens).count(want['original']) == 2     # text only: no photo, no frame
    with pytest.raises(UserError, match="instruct: boxes='square': expected 'original' or 'letterbox'"):
        InstructSource(**files, tokenizer=tok, seq_len=128, n_token=3, image_size=28, boxes='square')
