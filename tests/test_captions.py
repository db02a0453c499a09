"""captions.py: DataCompDR's captions onto img2dataset's images, against tars of an independent writer; nothing lost."""
import io
import json
import os
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import captions
import data
import prepare
from errors import UserError
from images import View
from test_prepare import full_disk, tokens


def write(path, members):
    with tarfile.open(path, 'w', format=tarfile.GNU_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uname = len(content), 1_700_000_000, 'img2dataset'
            tar.addfile(info, io.BytesIO(content))


def photo(i, suffix):
    out, pixels = io.BytesIO(), np.full((20 + i % 5, 30, 3), (i * 37) % 256, np.uint8)
    Image.fromarray(pixels).save(out, {'jpg': 'JPEG'}.get(suffix, suffix))
    return out.getvalue()


def write_released(top, n=60, seed=11):
    """
    images/ as img2dataset writes it (three tars, keys of its own, members of a sample in any order) and dr/ as
    DataCompDR is released (two tars in another order, no images); returns {key: (uid, own caption, synthetic ones)}.
    """
    rng, samples = np.random.default_rng(seed), {}
    (top / 'images').mkdir()
    (top / 'dr').mkdir()
    for i in range(n):
        synthetic = [f'synthetic {i} {j}' for j in range(1 + i % 5)]
        samples[f'{i // 20:05d}{i % 20:04d}'] = rng.bytes(16).hex(), f'own caption {i}', synthetic
    for shard in range(3):
        members = []
        for key in [key for key in samples if key.startswith(f'{shard:05d}')]:
            uid, own, _ = samples[key]
            suffix = ('jpg', 'webp', 'png')[int(key) % 3]
            about = dict(uid=uid, caption=own, url='http://x', key=key, status='success', sha256='0' * 64, exif='{}')
            sample = [(f'{key}.{suffix}', photo(int(key), suffix)), (f'{key}.txt', own.encode()),
                      (f'{key}.json', json.dumps(about).encode())]
            members += [sample[j] for j in rng.permutation(3)]
        write(top / f'images/{shard:05d}.tar', members)
    order = [list(samples.values())[i] for i in rng.permutation(n)]
    for shard in range(2):
        members = []
        for uid, _, synthetic in order[shard::2]:
            key = rng.bytes(16).hex() if shard else uid                  # the .json's uid counts, whatever the key
            about = [json.dumps(x).encode() for x in (dict(syn_text=synthetic), dict(uid=uid, sha256='0' * 64))]
            members += [(f'{key}.url.txt', b'http://x'), (f'{key}.syn.json', about[0]), (f'{key}.json', about[1]),
                        (f'{key}.paug.json', b'{"param_aug": ""}'), (f'{key}.npz', rng.bytes(2000))]
        write(top / f'dr/{shard:08d}.tar', members)
    return samples


def merged(folder):
    """{key: (suffix of the image, its bytes, caption)}, as plain tarfile reads it."""
    found = {}
    for path in sorted(folder.glob('*.tar')):
        with tarfile.open(path) as tar:
            for member in tar:
                key, suffix = member.name.split('.', 1)
                found.setdefault(key, {})[suffix] = tar.extractfile(member).read()
    return {key: (*[x for x in sample.items() if x[0] != 'txt'][0], sample['txt'].decode())
            for key, sample in found.items()}


@pytest.mark.parametrize('share', [0, 0.4, 1])
def test_every_image_has_the_caption_of_its_own_uid(tmp_path, share, capsys):
    samples = write_released(tmp_path)
    command = ['merge', f'{tmp_path}/images', '--captions', f'{tmp_path}/dr', '--synthetic', str(share), '--out']
    for n_process in (1, 2):
        assert prepare.main([*command, f'{tmp_path}/out{n_process}', '--n_process', str(n_process)]) == 0
    found = merged(tmp_path / 'out1')
    assert list(found) == list(samples) and tokens(tmp_path / 'out1') == tokens(tmp_path / 'out2')
    n_synthetic = sum(caption != samples[key][1] for key, (_, _, caption) in found.items())
    for key, (suffix, image, caption) in found.items():
        uid, own, synthetic = samples[key]
        assert image == photo(int(key), suffix) and caption in [own, *synthetic]
    low, high = {0: (0, 0), 0.4: (12, 36), 1: (60, 60)}[share]           # 0.4 of 60: 24 +- 3.8
    assert low <= n_synthetic <= high
    picked = {caption.split()[-1] for _, _, caption in found.values() if caption.startswith('synthetic')}
    assert picked >= {'0', '1', '2'} or share < 1                        # not always the first
    line = capsys.readouterr().out.splitlines()[-1]
    assert f'out2: 60 samples, {n_synthetic} of them with synthetic captions of {60 if share else 0}; left ' in line
    assert json.loads((tmp_path / 'out1/report.jsonl').read_text().splitlines()[-1])['samples'] == 60


def test_what_it_writes_is_what_training_reads(tmp_path):
    samples = write_released(tmp_path)
    prepare.train_tokenizer([c for _, own, synthetic in samples.values() for c in (own, *synthetic)],
                            f'{tmp_path}/t.model', 300)
    captions.merge(f'{tmp_path}/images', f'{tmp_path}/dr', f'{tmp_path}/out', 0.5)
    tokenizer = data.load_tokenizer(f'{tmp_path}/t.model')
    source = data.CaptionSource(f'{tmp_path}/out', tokenizer, 64, View(28, 4))
    assert len(source) == 60 and not source.damaged and not source.note
    for i in range(60):
        sample, (uid, own, synthetic) = source[i], samples[f'{i // 20:05d}{i % 20:04d}']
        assert tokenizer.decode(sample.targets[4:-1]) in [own, *synthetic]


def test_what_is_left_out_is_counted_and_named(tmp_path, capsys):
    samples = write_released(tmp_path)
    with tarfile.open(tmp_path / 'images/00000.tar') as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar]
    damage = {'000000000.jpg': b'no image', '000000001.webp': photo(1, 'webp')[:-9], '000000002.png': b''}
    members = [(name, damage.get(name, content)) for name, content in members if not name.startswith('000000003')]
    members += [('000000003.json', json.dumps(dict(uid=samples['000000003'][0])).encode()),      # its download failed
                ('000000099.jpg', photo(3, 'jpg')), ('000000099.json', b'{"uid": "never captioned"}')]
    write(tmp_path / 'images/00000.tar', members)
    whole = (tmp_path / 'images/00002.tar').read_bytes()
    (tmp_path / 'images/00002.tar').write_bytes(whole[:len(whole) // 2 + 100])
    uid = samples['000000005'][0]
    write(tmp_path / 'dr/00000002.tar', [(f'{uid}.syn.json', b'{"syn_text": ["the same uid again"]}')])
    write(tmp_path / 'dr/00000003.tar', [('a.syn.json', b'{}'), ('a.json', b'{"uid'), ('b.json', b'{}')])
    with tarfile.open(tmp_path / 'dr/00000003.tar', 'a') as tar:
        link = tarfile.TarInfo('c.syn.json')
        link.type, link.linkname = tarfile.SYMTYPE, '/etc/hostname'
        tar.addfile(link)
    write(tmp_path / 'dr/00000004.tar', [('d.syn.json', b' ' * (data.MAX_TEXT_BYTES + 1))])
    captions_in = ['--captions', f'{tmp_path}/dr']
    assert prepare.main(['merge', f'{tmp_path}/images', *captions_in, '--out', f'{tmp_path}/out']) == 0
    report = [json.loads(line) for line in (tmp_path / 'out/report.jsonl').read_text().splitlines()]
    found, totals = merged(tmp_path / 'out'), report.pop()
    lost = set(samples) - set(found)
    assert {key for key in lost if not key.startswith('00002')} == {f'00000000{i}' for i in range(4)}
    assert found['000000005'][2] in samples['000000005'][2]              # the first tar's captions
    n_damaged = sum(line['why'] == 'damaged' for line in report)
    assert totals == dict(captions=61, repeated_captions=1, samples=len(found), synthetic=len(found), left_out={
        'no image': sum(line['why'] == 'no image' for line in report), 'bad image': 3,
        'no caption': sum(line['why'] == 'no caption' for line in report), 'damaged': n_damaged})
    text = '\n'.join(f"{line['why']}: {line['what']}" for line in report)
    for words in ('bad image: {0}/images/00000.tar: 000000000: image of 8 bytes: not an image',
                  '00000.tar: 000000001: ', '00000.tar: 000000002: ',
                  'no image: {0}/images/00000.tar: 000000003: no image (jpg',
                  'no caption: {0}/images/00000.tar: 000000099: no synthetic caption of uid never captioned',
                  'damaged: {0}/images/00002.tar: damaged or truncated tar', 'damaged: {0}/dr/00000003.tar: a: ',
                  '00000003.tar: c: its .syn.json is a link',
                  '00000004.tar: d: 4,194,305 bytes, expected at most'):
        assert words.format(tmp_path) in text, words
    line = capsys.readouterr().out.splitlines()[-1]
    assert '3 bad image' in line and f'{n_damaged} damaged' in line and 'out/report.jsonl names them' in line


def test_a_stopped_merge_goes_on_and_other_inputs_are_refused(tmp_path, monkeypatch):
    write_released(tmp_path)
    args = f'{tmp_path}/images', f'{tmp_path}/dr'
    captions.merge(*args, f'{tmp_path}/want', 0.5)
    for limit in (2, 6):                                                 # while indexing, and between two tars
        with monkeypatch.context() as m:
            full_disk(m, limit)
            with pytest.raises((OSError, UserError), match='No space left'):
                captions.merge(*args, f'{tmp_path}/out', 0.5)
        assert not list(tmp_path.rglob('*.tmp')) and not (tmp_path / 'out').exists()
        assert (tmp_path / 'out.partial/.captions.json').exists() == (limit == 6)
    with pytest.raises(UserError, match='00000000.tar: of a preparation that has not finished'):
        data.find(f'{tmp_path}/out.partial', '.tar')
    for other, words in (((*args, f'{tmp_path}/out', 0.25), 'out.partial: was begun with synthetic=0.5, now 0.25;'),
                         ((args[0], f'{args[1]}/00000000.tar', f'{tmp_path}/out', 0.5),
                          'was begun with captions=2 files of .* now 1 files of')):
        with pytest.raises(UserError, match=words):
            captions.merge(*other)
    monkeypatch.setattr(captions, '_captions_of', None)                  # the captions need not be indexed again
    captions.merge(*args, f'{tmp_path}/out', 0.5, n_process=2)
    assert tokens(tmp_path / 'out') == tokens(tmp_path / 'want')
    assert not [name for name in os.listdir(tmp_path / 'out') if name.startswith('.')]


@pytest.mark.parametrize('given, words', [
    (('images', '', 'out', 0.5), 'synthetic=0.5: expected a share from 0 to 1; above 0 it needs --captions'),
    (('images', 'dr', 'out', 1.5), 'synthetic=1.5: expected a share'), (('gone', 'dr', 'out'), 'gone: no such file'),
    (('images', 'images', 'out'), 'images/00000.tar: no .syn.json in 3 tars'),
    (('dr', 'dr', 'out'), 'no sample of 2 tars can be used; .*out.partial/report.jsonl says why')])
def test_mistakes_of_merge(tmp_path, given, words):
    write_released(tmp_path)
    with pytest.raises(UserError, match=words):
        captions.merge(*(f'{tmp_path}/{x}' if isinstance(x, str) and x else x for x in given))
    assert not (tmp_path / 'out').exists()
