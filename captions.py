"""
Captions that were published without images (DataCompDR) onto images that were downloaded (img2dataset), as new tars.
    python prepare.py merge images/ --captions datacompdr/ --synthetic 0.5 --out data/captions --n_process 8
    images/      img2dataset's tars: <key>.jpg, .png or .webp, .txt, .json with the 'uid'
    datacompdr/  tars of <key>.syn.json {"syn_text": [...]} and .json {"uid"}; without a uid the key is it
Each tar of images becomes one of the same images, untouched, each with its chosen caption as .txt.
"""
import hashlib
import itertools
import json
import os
from bisect import bisect_left
from collections import Counter

import numpy as np
from tqdm import tqdm

import data
import files
from data import caption_of, image_suffix, json_member
from errors import BadSample, UserError
from files import whole, write_whole
from images import open_image
from shards import about_files, in_order, new_folder, write_tar
from weights import read_json


def merge(images, captions, out, synthetic=1.0, n_process=1):
    """
    Write the images of tars with one caption each as tars of the same numbers into the new folder `out`.
    captions   tars with .syn.json; '' when synthetic is 0
    synthetic  the share of images that get a synthetic caption, one of 'syn_text'; the others keep their own (.txt, or
               'caption' or 'text' of the .json). Both choices follow from the uid's hash alone.
    An image without the caption chosen for it, or that cannot be decoded, is left out and named in report.jsonl, whose
    last line has the totals. When stopped, the same call goes on behind the last whole tar. Memory: 20 bytes a caption
    in a file that all processes map (48 while they are sorted).
    Returns the totals, a dict. Raises UserError for a share beyond 0..1 and when no image finds its caption.
    """
    if not 0 <= synthetic <= 1 or synthetic and not captions:
        raise UserError(f"merge: synthetic={synthetic}: expected a share from 0 to 1; above 0 it needs --captions, the "
                        "tars of .syn.json")
    tars, sources = files.find(images, '.tar'), files.find(captions, '.tar') if synthetic else []
    settings = dict(images=about_files(tars), captions=about_files(sources), synthetic=synthetic)
    with new_folder(out, settings) as partial:
        found = _index(partial, sources, n_process) if sources else dict(totals={}, left_out=[])
        sides = [os.path.join(partial, f'{i:08d}.json') for i in range(len(tars))]
        jobs = [job for job in zip(tars, sides) if not os.path.exists(job[1])]
        total, left = (sum(os.path.getsize(path) for path in paths) for paths in (tars, [path for path, _ in jobs]))
        if len(jobs) < len(tars):
            print(f"{out}: goes on behind {len(tars) - len(jobs):,} whole tars")
        bar = tqdm(total=total, initial=total - left, unit='B', unit_scale=True, disable=None)
        with files.processes(n_process, _load, partial, sources, synthetic) as pool:
            for (path, _), _ in in_order(pool, _merge_tar, jobs, 2 * n_process):
                bar.update(os.path.getsize(path))
        with whole(os.path.join(partial, 'report.jsonl')) as temporary:
            totals = _report(temporary, sides, found)
        if not totals['samples']:
            raise UserError(f"merge: no sample of {len(tars)} tars can be used; {partial}/report.jsonl says why of "
                            "each (img2dataset keeps the uid with --save_additional_columns '[\"uid\"]')")
    return totals


def _report(path, sides, found):
    """Write what was left out, a line each, and the totals; return these."""
    totals, left_out = Counter(), Counter({'no image': 0, 'no caption': 0, 'bad image': 0, 'damaged': 0})
    with open(path, 'w', encoding='utf-8') as f:
        for about in itertools.chain([found], map(read_json, sides)):
            totals.update(about['totals'])
            left_out.update(line['why'] for line in about['left_out'])
            f.writelines(json.dumps(line) + '\n' for line in about['left_out'])
        totals = dict(totals, left_out=dict(left_out))
        f.write(json.dumps(totals) + '\n')
    return totals


# --- which caption --------------------------------------------------------------------------------
# a .syn.json: the number of its uid, the tar that holds it, where there (in blocks of 512 bytes), its size
PLACE = np.dtype([('number', '<u8'), ('tar', '<u4'), ('block', '<u4'), ('size', '<u4')])


def number_of(uid):
    """64 bits of a uid's hash: of 10^9 captions and 10^9 images, 0.05 would be paired wrongly in all."""
    return int.from_bytes(hashlib.blake2b(uid.encode('utf-8', 'surrogateescape'), digest_size=8).digest(), 'little')


def _load(partial, sources, share):
    global _captions, _stamps, _share
    _stamps, _share = [files.stamp_of(path) for path in sources], share
    _captions = np.load(os.path.join(partial, '.captions.npy'), mmap_mode='r') if sources else None


def _samples(path):
    """Return ([(key, {suffix: (offset, size)})], what is wrong with the tar: [] or a line of the report)."""
    index = files.tar_index(files.stamp_of(path), '')
    damage = [dict(why='damaged', what=f"{path}: {index.damage}")] if index.damage else []
    return [index.sample(r) for r in range(index.n_group)], damage


def _uid(about, key):
    uid = about.get('uid')
    return uid if isinstance(uid, str) and uid else os.path.basename(key)


def _index(partial, sources, n_process):
    """
    Write .captions.npy, (n,) PLACE sorted by number, unless it is there; return how many, and what was left out.
    """
    noted = os.path.join(partial, '.captions.json')
    if not os.path.exists(noted):
        places, left_out = [], []
        jobs = tqdm(list(enumerate(sources)), desc='captions', unit=' tars', disable=None)
        with files.processes(n_process) as pool:
            for _, (place, bad) in in_order(pool, _captions_of, jobs, 2 * n_process):
                places.append(place)
                left_out += bad
        places = np.concatenate(places)
        if not len(places):
            raise UserError(f"{sources[0]}: no .syn.json in {len(sources)} tars")
        places = places[np.argsort(places['number'], kind='stable')]     # of a uid that comes again the first counts
        with whole(os.path.join(partial, '.captions.npy')) as temporary, open(temporary, 'wb') as f:
            np.save(f, places)
        n_repeated = int((places['number'][1:] == places['number'][:-1]).sum())
        write_whole(noted, dict(totals=dict(captions=len(places), repeated_captions=n_repeated), left_out=left_out))
    return read_json(noted)


def _captions_of(i, path):
    """Return ((n,) PLACE, what was left out) of one tar of captions."""
    stamp, places, (samples, left_out) = files.stamp_of(path), [], _samples(path)
    for key, members in samples:
        if 'syn.json' in members:
            try:
                with files.reading_item(f"{path}: {key}"):
                    (offset, size), uid = members['syn.json'], _uid(json_member(stamp, members, 'json'), key)
                    if offset < 0:
                        raise UserError("its .syn.json is a link")
                    places.append((number_of(uid), i, offset // 512, files.bounded(size, data.MAX_TEXT_BYTES)))
            except BadSample as e:
                left_out.append(dict(why='damaged', what=str(e)))
    return np.array(places, PLACE), left_out


def _synthetic(uid):
    number, numbers = number_of(uid), _captions['number']
    at = bisect_left(numbers, number)                                    # searchsorted would copy all of them
    if at == len(numbers) or numbers[at] != number:
        raise UserError(f"no synthetic caption of uid {uid}")
    _, tar, block, size = _captions[at].tolist()
    return caption_of(_stamps[tar], {'syn.json': (512 * block, size)}, 'syn', number)


# --- one tar --------------------------------------------------------------------------------------
def _merge_tar(path, side):
    about = dict(tar=os.path.basename(path), totals=dict(samples=0, synthetic=0), left_out=[])
    members = _members(path, about)
    first = next(members, None)
    if first:
        with whole(os.path.splitext(side)[0] + '.tar') as temporary:
            write_tar(temporary, itertools.chain([first], members))
    write_whole(side, about)                                             # last: with it the tar is whole


def _members(path, about):
    """Yield the members of the new tar, (name, bytes), and note in `about` what became of each sample."""
    stamp, (samples, damage) = files.stamp_of(path), _samples(path)
    about['left_out'] += damage
    for key, members in samples:
        why = 'no image'
        try:
            with files.reading_item(f"{path}: {key}"):
                suffix = image_suffix(members)
                why, uid = 'no caption', _uid(json_member(stamp, members, 'json'), key)
                synthetic = number_of(uid) / 2**64 < _share              # the high bits; _synthetic takes the low ones
                field = 'txt' if 'txt' in members else 'json'
                caption = _synthetic(uid) if synthetic else caption_of(stamp, members, field)
                why, image = 'bad image', files.read_at(stamp, *members[suffix], data.MAX_IMAGE_BYTES)
                open_image(image)                                        # decoded as in training: no surprise there
        except BadSample as e:
            about['left_out'].append(dict(why=why, what=str(e)))
            continue
        about['totals']['samples'] += 1
        about['totals']['synthetic'] += synthetic
        yield f'{key}.{suffix}', image
        yield f'{key}.txt', caption.encode('utf-8', 'replace')
