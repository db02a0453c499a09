"""
Data preparation: from your own files to the formats that data.py reads, and a look at what is there.
    python prepare.py train_tokenizer texts/ --out data/tokenizer.model --vocab_size 8192
    python prepare.py tokenize texts/ more.jsonl.zst --tokenizer data/tokenizer.model --out data/text
    python prepare.py pair photos/ more/ --out data/captions       # a.jpg + a.txt, or --captions captions.jsonl
    python prepare.py merge images/ --captions datacompdr/ --synthetic 0.5 --out data/captions         # see captions.py
    python prepare.py join mix665k.json llavar.json --folder coco/train2017 --out data/instruct/joined.json
    python prepare.py smart101 data/SMART101-Data --out smart101.json          # its training rows as conversations
    python prepare.py index data/captions                         # tar indexes, before many processes want them
    python prepare.py check data/captions --tokenizer data/tokenizer.model
    python prepare.py show llava.json --image_root images/ --tokenizer data/tokenizer.model
Texts are .txt .rst .md (a document each), .jsonl .jsonl.gz .jsonl.zst (a document a line), or folders of them.
"""
import argparse
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import sys
from array import array
from collections import Counter, deque

import numpy as np
from tqdm import tqdm

import captions
import data
import files
import puzzles
from benchmarks import lettered
from errors import UserError, first_line, reading, user_error_hook
from files import whole, write_whole, writing
from images import View
from kernels import IGNORE_INDEX
from shards import about_files, check_free, in_order, new_folder, write_tar
from weights import read_json

OTHER_IMAGES = ('.gif', '.bmp', '.tif', '.tiff', '.ppm', '.jp2', '.heic', '.avif')
PLAIN = ('.txt', '.rst', '.md')
LINES = ('.jsonl', '.jsonl.gz', '.jsonl.zst', '.jsonl.zstd')
MAX_LINE = 256 << 20                 # characters of a line of .jsonl, a document: a novel has 1 million
MAX_TEXT = 4 << 30                   # characters of a text file: enwik9 has 1,000 million
CHUNK = 1 << 18                      # characters that a process is given at once


# --- documents in ---------------------------------------------------------------------------------
def documents(paths, key='text'):
    """Yield the texts of files, patterns and folders; raises UserError naming file and line of what is not text."""
    yield from (text for *_, text in located(find_texts(paths), key))


def find_texts(paths):
    """Return the files of text of paths, patterns and folders; raises UserError for a file that is none."""
    found = files.find(paths, *PLAIN, *LINES)
    other = [path for path in found if not path.endswith(PLAIN + LINES)]
    if other:
        raise UserError(f"{other[0]}: expected one of {' '.join(PLAIN + LINES)}")
    return found


def located(found, key='text', first=(0, 0)):
    """
    Yield (file, line, bytes of all files read until then, text) of each document in a list of files. Files count from
    0, lines from 1; first = (file, lines of it to skip), and the files before it are not opened.
    """
    n_byte = 0
    for i, path in enumerate(found):
        skip = first[1] if i == first[0] else 0
        if i >= first[0] and path.endswith(LINES):
            for n, here, line in _json_lines(path, skip):
                yield i, n, n_byte + here, _field(f"{path}: line {n}", line, key)
        n_byte += os.path.getsize(path)
        if i >= first[0] and path.endswith(PLAIN) and not skip:
            yield i, 1, n_byte, _read_text(path, MAX_TEXT)


def _read_text(path, limit):
    with reading(path, 'UTF-8 text'), open(path, encoding='utf-8-sig', opener=files.regular) as f:
        return _at_most(limit, f.read(limit + 1), path)                  # -sig drops a byte order mark


def _at_most(limit, text, where):
    if len(text) > limit:
        raise UserError(f"{where}: more than {limit:,} characters; cut it into several documents")
    return text


def _json_lines(path, skip=0):
    """Yield (its number, bytes of the file read until then, line) of each line behind `skip` that is not blank."""
    with reading(path, 'lines of UTF-8 text'), open(path, 'rb', opener=files.regular) as f:
        lines = io.TextIOWrapper(_unpacked(f, path), encoding='utf-8-sig')
        for n, line in enumerate(iter(lambda: lines.readline(MAX_LINE + 1), ''), 1):
            if _at_most(MAX_LINE, line, f"{path}: line {n}").strip() and n > skip:
                yield n, f.tell(), line


def _unpacked(f, path):
    if path.endswith('.gz'):
        return gzip.GzipFile(fileobj=f)
    if path.endswith(('.zst', '.zstd')):
        try:
            import zstandard
        except ImportError:
            raise UserError(f"{path}: reading .zst needs `pip install zstandard`, or unpack it first") from None
        return io.BufferedReader(_Unzstd(f, zstandard.ZstdDecompressor()))
    return f


class _Unzstd(io.RawIOBase):
    """What the frames of a .zst hold. zstandard's own reader takes a file that was cut short for a whole one."""
    def __init__(self, f, decompressor):
        self.f, self.decompressor = f, decompressor
        self.frame, self.packed, self.left = None, b'', memoryview(b'')

    def readable(self):
        return True

    def readinto(self, out):
        while not self.left:
            self.packed = self.packed or self.f.read(1024)               # they unpack to 32 MB at most
            if not self.packed and self.frame:
                raise EOFError("cut short")
            if not self.packed:
                return 0
            self.frame = self.frame or self.decompressor.decompressobj()
            self.left = memoryview(self.frame.decompress(self.packed))
            self.packed = self.frame.unused_data
            self.frame = None if self.frame.eof else self.frame
        n = min(len(out), len(self.left))
        out[:n], self.left = self.left[:n], self.left[n:]
        return n


def _field(where, line, key):
    with reading(where, f'a JSON object with {key!r}'):
        value = json.loads(line)[key]
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} is {type(value).__name__}, expected a string")
    return value


# --- tokenizer and tokens -------------------------------------------------------------------------
def train_tokenizer(texts, out, vocab_size=8192, model_type='bpe', max_lines=1_000_000):
    """
    Train a sentencepiece model on the lines of `texts` and write it to `out`, whole or not at all.
    Unknown characters become bytes and white space is kept, so that decoding gives the text back. Raises UserError when
    `out` exists, or what the trainer says.
    """
    import sentencepiece
    check_free(out)
    lines = (line[i:i + 1000] for text in texts for line in text.split('\n') for i in range(0, len(line), 1000))
    lines = list(itertools.islice(lines, max_lines))                     # the trainer hides what reading raises
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, vocab_size=vocab_size,
            model_type=model_type, byte_fallback=True, normalization_rule_name='identity', num_threads=1, minloglevel=2,
            remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, unk_id=0, eos_id=1, bos_id=-1, pad_id=-1)
    except (RuntimeError, OSError) as e:
        raise UserError(f"train_tokenizer: --vocab_size={vocab_size}: "
                        f"{first_line(str(e).strip().splitlines()[-1].split('] ')[-1])}") from None
    write_whole(out, model.getvalue())


def tokenize(paths, tokenizer_path, out, key='text', layout='bin', row_len=2048, rows_per_shard=8192, n_process=1):
    """
    Write the token ids of all documents, each followed by end-of-text, as shards into the new folder `out`.
    layout 'bin': uint16 files that end where a document ends; 'tar': OpenLM rows of row_len + 1 ids, the last shorter.
    A shard has about rows_per_shard * row_len tokens and, as soon as it is whole, a .json: the tokenizer, and where the
    next shard begins, from which the same call goes on when it was stopped. The files do not depend on n_process, nor
    on stops. Returns (documents, tokens). Raises UserError when `out` holds anything, for other inputs or settings
    than those it was begun with, and for 'bin' with ids beyond uint16.
    """
    if layout not in ('bin', 'tar'):
        raise UserError(f"tokenize: layout={layout!r}: expected 'bin' or 'tar'")
    tokenizer, found = data.load_tokenizer(tokenizer_path), find_texts(paths)
    if layout == 'bin' and tokenizer.image_id > 65536:                   # the first id that no text has
        raise UserError(f"tokenize: {tokenizer.path}: ids up to {tokenizer.image_id - 1} do not fit the uint16 of "
                        ".bin; give --layout tar")
    size = rows_per_shard * (row_len if layout == 'bin' else row_len + 1)
    settings = dict(inputs=about_files(found), tokenizer=tokenizer.sha256, key=key, layout=layout, row_len=row_len,
                    rows_per_shard=rows_per_shard)
    with new_folder(out, settings) as partial, files.processes(n_process, _load_tokenizer, tokenizer_path) as pool:
        sides = (os.path.join(partial, f'{i:08d}.json') for i in itertools.count())
        done = [read_json(side) for side in itertools.takewhile(os.path.exists, sides)]     # of each whole shard
        file, line, n_id = done[-1]['next'] if done else (0, 0, 0)       # files, then lines of one, then ids of one
        if done:
            print(f"{out}: goes on behind {len(done):,} whole shards")
        bar = tqdm(total=sum(map(os.path.getsize, found)), unit='B', unit_scale=True, disable=None,
                   initial=sum(map(os.path.getsize, found[:file])))
        ids, writes, n_document, n_token = array('I'), deque(), 0, sum(shard['n_token'] for shard in done)

        def end_shard(n, following):
            nonlocal n_document
            done.append({'tokenizer_sha256': tokenizer.sha256, 'vocab_size': tokenizer.vocab_size, 'n_token': n,
                         'n_document': n_document, 'next': following})
            writes.append(pool.submit(_write_shard, partial, len(done) - 1, ids[:n], layout, row_len, done[-1]))
            del ids[:n]
            n_document = 0
            while len(writes) > 1 + n_process // 4:                      # of 67 MB each
                writes.popleft().result()

        for (chunk,), encoded in in_order(pool, _encode, _chunks(located(found, key, (file, line))), 4 * n_process):
            for (file, line, n_byte, _), packed in zip(chunk, encoded):
                ids.frombytes(packed[4 * n_id:])
                n_document, n_token, n_id = n_document + (not n_id), n_token + len(packed) // 4 - n_id, 0
                while len(ids) >= size:
                    left = 0 if layout == 'bin' else len(ids) - size     # ids of this document in the next shard
                    end_shard(len(ids) - left, [file, line - 1, len(packed) // 4 - left] if left else [file, line, 0])
            bar.set_postfix_str(f'{n_token:,} tokens', refresh=False)
            bar.update(n_byte - bar.n)
        if len(ids) > 1:                                                 # one id alone predicts nothing
            end_shard(len(ids), [len(found), 0, 0])
        for write in writes:
            write.result()
        if not done:
            raise UserError("tokenize: no text in the input")
        if layout == 'tar':                                              # OpenLM's --dataset-manifest
            write_whole(os.path.join(partial, 'manifest.jsonl'), [
                {'shard': f'{i:08d}', 'num_sequences': _n_row(shard['n_token'], row_len)}
                for i, shard in enumerate(done)])
    return sum(shard['n_document'] for shard in done), sum(shard['n_token'] for shard in done)


def _load_tokenizer(path):
    global _tokenizer
    _tokenizer = data.load_tokenizer(path)


def _chunks(found):
    """Yield lists of located documents of about CHUNK characters, each in a tuple: the jobs of _encode."""
    chunk, n_char = [], 0
    for document in found:
        chunk.append(document)
        n_char += len(document[-1])
        if n_char >= CHUNK:
            yield chunk,
            chunk, n_char = [], 0
    if chunk:
        yield chunk,


def _encode(chunk):
    """Return the ids of each text and of its end, as the bytes of uint32: far quicker to send than a list of int."""
    return [array('I', _tokenizer.encode(text) + [_tokenizer.eot_id]).tobytes() for *_, text in chunk]


def _n_row(n_token, row_len):
    return -(-n_token // (row_len + 1)) - (n_token % (row_len + 1) == 1)


def _write_shard(folder, i, ids, layout, row_len, about):
    name = os.path.join(folder, f'{i:08d}')
    with whole(f'{name}.{layout}') as temporary:
        if layout == 'bin':
            np.array(ids, '<u2').tofile(temporary)
        else:
            rows = (ids[j:j + row_len + 1].tolist() for j in range(0, len(ids) - 1, row_len + 1))
            packed = (gzip.compress(json.dumps(row).encode(), 6, mtime=0) for row in rows)       # no time stamp
            write_tar(temporary, ((f'{i:08d}_{j:08d}.json.gz', content) for j, content in enumerate(packed)))
    write_whole(f'{name}.json', about)                                   # last: with it the shard is whole


# --- images and captions --------------------------------------------------------------------------
def pair(folders, out, captions='', samples_per_shard=1000):
    """
    Write images and their captions as WebDataset tars into the new folder `out`; image files are stored as they are.
    folders   a folder or a list of them; each image has its caption beside it, `<image>.txt`
    captions  instead of these, a .jsonl of {"image": path in the one folder, "caption": text}
    A sample's key is its number and the image's name, so that a bad item is easily found. Formats other than
    IMAGE_SUFFIXES are left out, with a line. Returns the number of samples. Raises UserError for an image that is not
    there, a caption that is missing or empty, or a path outside the folder.
    """
    folders = [folders] if isinstance(folders, (str, os.PathLike)) else list(folders)
    for folder in folders:
        if not os.path.isdir(folder):
            raise UserError(f"{folder}: expected a folder of images")
    if captions and len(folders) > 1:
        raise UserError(f"pair: {len(folders)} folders, expected one: the images of {captions} are paths in it")
    pairs = _listed(folders[0], captions) if captions else [p for folder in folders for p in _beside(folder)]
    with new_folder(out) as partial:
        for first in tqdm(range(0, len(pairs), samples_per_shard), unit=' shards', disable=None):
            write_tar(os.path.join(partial, f'{first // samples_per_shard:06d}.tar'),
                      (member for i, found in enumerate(pairs[first:first + samples_per_shard], first)
                       for member in _members(i, *found)))
    return len(pairs)


def _listed(folder, captions):
    """Return [(folder, image, caption)] of the lines of a .jsonl."""
    pairs = []
    for n, _, line in _json_lines(captions):
        where = f"{captions}: line {n}"
        image = _field(where, line, 'image')
        if not os.path.isfile(data.safe_join(folder, image)):
            raise UserError(f"{where}: no image {image!r} in {folder}")
        pairs.append((folder, image, _field(where, line, 'caption')))
    return pairs


def _beside(folder):
    """Return [(folder, image, None)] of the images in a folder: their captions stand beside them."""
    suffixes = tuple('.' + s for s in data.IMAGE_SUFFIXES)
    other = [p for _, _, names in os.walk(folder) for p in names if p.lower().endswith(OTHER_IMAGES)]
    if other:
        print(f"!!! {len(other)} images left out, such as {other[0]}: expected {' '.join(suffixes)}")
    return [(folder, os.path.relpath(p, folder), None)
            for p in files.find(folder, *suffixes, *map(str.upper, suffixes))]


def _members(i, folder, image, caption):
    """Return the two members of sample i in its tar: [(name, bytes)]."""
    path, (stem, suffix) = data.safe_join(folder, image), os.path.splitext(image)
    key = f"{i:09d}_{re.sub(r'[^0-9A-Za-z_-]', '_', stem)[-60:]}"
    if caption is None:
        beside = os.path.splitext(path)[0] + '.txt'
        if not os.path.isfile(beside):
            raise UserError(f"{path}: needs a caption of its own beside it, {os.path.basename(beside)}")
        caption = _read_text(beside, data.MAX_TEXT_BYTES)
    if not caption.strip():
        raise UserError(f"{path}: its caption is empty")
    with reading(path, 'a file'):
        content = files.read_whole(path, data.MAX_IMAGE_BYTES)
    return [(key + suffix.lower(), content), (key + '.txt', caption.strip().encode('utf-8', 'replace'))]


def smart101(folder, out, split='instance', short_suffix=''):
    """
    Write a SMART-101 split's training rows as LLaVA JSON, its images under `folder`: a row is asked for the letter, and
    apart for the value, worded as in evaluate.py. Returns how many conversations there are.
    """
    entries = []
    for row in itertools.chain(*puzzles.split_rows(puzzles.read_puzzles(folder), split, 'train').values()):
        asked = {'letter': (lettered(row.question, row.options)[0], puzzles.LETTERS[row.answer]),
                 'value': (row.question + short_suffix, row.options[row.answer])}
        entries += [{'id': f'smart101-{row.puzzle}-{row.number}-{form}', 'image': os.path.relpath(row.image, folder),
                     'conversations': [{'from': 'human', 'value': f'<image>\n{question}'},
                                       {'from': 'gpt', 'value': answer}]}
                    for form, (question, answer) in asked.items()]
    write_whole(out, json.dumps(entries))
    return len(entries)


# --- conversations --------------------------------------------------------------------------------
def join(paths, out, folder=''):
    """
    Write the rows of LLaVA JSON files, as they are, into one list without those that an earlier file has: the same
    image, whatever its folder, and first question. (LLaVAR's files hold LLaVA's rows; rows alike within a file stay.)
    folder   put before the images of the later files that are in none, so that all are below one root
    returns  {file: (rows written, rows left out)}. Raises UserError when `out` exists, and for the first row that is
    no conversation. Memory: 16 bytes a row, and the largest file while its index is made.
    """
    check_free(out)
    known, counts, between = set(), {}, '[\n'
    with whole(out) as temporary, open(temporary, 'w', encoding='utf-8') as f:
        for path in files.find(paths, '.json', '.jsonl'):
            source, here, n_new = data.InstructSource(path, '', None, 2, View(1, 0)), set(), 0
            for i in tqdm(range(len(source)), unit=' rows', desc=path, disable=None):
                row, question, image = source.conversation(i)
                stem = os.path.splitext(os.path.basename(image))[0]
                key = hashlib.blake2b(f'{stem}\0{question}'.encode('utf-8', 'replace'), digest_size=16).digest()
                here.add(key)
                if key not in known:
                    if counts and image and '/' not in image:
                        row['image'] = os.path.join(folder, image)
                    f.write(between + json.dumps(row))
                    between, n_new = ',\n', n_new + 1
            known |= here
            counts[path] = n_new, len(source) - n_new
        f.write('\n]\n')
    return counts


# --- a look at a data set -------------------------------------------------------------------------
def open_source(paths, tokenizer, seq_len, view, image_root='', caption_field='auto', **instruct):
    """Return the source that reads `paths`: of text, of captions or of conversations, by what is there."""
    found = files.find(paths, '.bin', '.tar', '.json', '.jsonl')          # text shards have a .json beside them
    tars = [f for f in found if f.endswith('.tar')]
    if tars:
        index = files.tar_index(files.stamp_of(tars[0]), '')
        suffixes = {index.name(i).rsplit('.', 1)[-1].lower() for i in range(min(8, len(index)))}
        if suffixes & set(data.IMAGE_SUFFIXES):
            return data.CaptionSource(paths, tokenizer, seq_len, view, caption_field=caption_field)
    if tars or any(f.endswith('.bin') for f in found):
        return data.TextSource(paths, tokenizer, seq_len)
    image_root = image_root or os.path.dirname(found[0])
    return data.InstructSource(paths, image_root, tokenizer, seq_len, view, **instruct)


def check(source):
    """Read every item of a source, a batch each; return (bad messages, the sum of the batches' stats)."""
    bad, total = [], Counter()
    for i in tqdm(range(len(source)), unit=' items', disable=None):
        try:
            total.update(data.collate([source[i]], source.tokenizer.pad_id).stats[source.name])
        except data.BadSample as e:
            bad.append(str(e))
    return list(dict.fromkeys(bad)), total


def describe(sample, tokenizer):
    """Return lines that show a sample: a line for each run of ids that carries loss as targets, or does not."""
    n_kept = int((sample.targets != IGNORE_INDEX).sum())
    lines = [f"{sample.source} {sample.id}: {sample.tokens.size} positions, {n_kept} with loss, {len(sample.images)} "
             f"image(s){', cut to fit' if sample.n_truncated else ''}"]
    for tokens, targets in zip(np.atleast_2d(sample.tokens), np.atleast_2d(sample.targets)):
        kept = [False, *(targets != IGNORE_INDEX).tolist()]  # is id j predicted, with loss, by position j - 1
        ids = [tokens[0], *np.where(kept[1:-1], targets[:-1], tokens[1:]), *targets[-1:][kept[-1:]]]
        for has_loss, run in itertools.groupby(zip(kept, ids), lambda pair: pair[0]):
            what = _readable([int(i) for _, i in run], tokenizer)
            lines.append(f"  {'loss   ' if has_loss else 'no loss'} | {what}")
    return lines


def _readable(ids, tokenizer):
    special = {tokenizer.eot_id: '<eot>', tokenizer.image_id: '<image>', tokenizer.sep_id: '<sep>',
               tokenizer.pad_id: '<pad>'}
    parts = []
    for name, run in itertools.groupby(ids, lambda i: special.get(i, '')):
        run = list(run)
        parts.append(f'{name} x {len(run)}' if name and len(run) > 1 else name or json.dumps(tokenizer.decode(run)))
    return ' '.join(parts)


def show(source, tokenizer, n=4, seed=0, image_out=''):
    """Print n samples in shuffled order with their loss mask; save their images as PNG into image_out."""
    mixture = data.Mixture([source], [1], seed, max_bad_samples=1)
    for i in range(n):
        sample = mixture[i]
        print('\n'.join(describe(sample, tokenizer) + [f'  replaces | {m}' for m in sample.bad]))
        for j, image in enumerate(sample.images if image_out else []):
            from PIL import Image
            os.makedirs(image_out, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(os.path.join(image_out, f'{i:04d}_{j}.png'))


def _count(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number above 0")
    return int(text)


def parse(argv=None):
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest='command', required=True)

    def command(name, *options):
        p = commands.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        p.add_argument('paths', nargs='+')
        for option, default, text in options:
            kind = int if option == 'seed' else {int: _count, float: float}.get(type(default), str)
            p.add_argument('--' + option, default=default, required=default is None, help=text, type=kind)
    out = ('out', None, 'new file or folder')
    key = ('key', 'text', 'field of .jsonl lines that holds the text')
    n_process = ('n_process', 1, 'processes')
    look = [('tokenizer', None, '.model, tokenizer.json or a folder with one'),
            ('seq_len', 2048, 'positions'),
            ('image_root', '', "folder of LLaVA JSON's images; empty = the JSON's own"),
            ('n_token', 729, 'image positions'), ('image_size', 384, 'pixels'),
            ('caption_field', 'auto', ', '.join(data.CAPTION_FIELDS)), ('system_prompt', '', 'in front of questions')]
    command('train_tokenizer', out, key, ('vocab_size', 8192, 'pieces'), ('model_type', 'bpe', 'bpe or unigram'),
            ('max_lines', 1_000_000, 'lines to train on'))
    command('tokenize', out, key, look[0], ('layout', 'bin', 'bin (uint16) or tar (OpenLM rows)'),
            ('row_len', 2048, 'positions of a row'), ('rows_per_shard', 8192, 'rows'), n_process)
    command('pair', out, ('captions', '', '.jsonl of image and caption; empty = a .txt beside each image'),
            ('samples_per_shard', 1000, 'images'))
    command('merge', out, ('captions', '', 'tars of DataCompDR'), n_process,
            ('synthetic', 1.0, 'share of images with a synthetic caption'))
    command('join', out, ('folder', '', 'of images of later files that name none, such as coco/train2017'))
    command('smart101', out, ('split', 'instance', ', '.join(puzzles.SPLITS)),
            ('short_suffix', '\nAnswer the question using a single word or phrase.', 'after questions for the value'))
    command('index', ('cache_dir', '', 'for indexes of read-only data'))
    command('check', *look)
    command('show', *look, ('n', 4, 'samples'), ('seed', 0, 'of the order'), ('image_out', '', 'folder for PNGs'))
    return top.parse_args(argv)


def main(argv=None):
    a = parse(argv)
    with writing(getattr(a, 'out', '') or getattr(a, 'image_out', '') or 'output'):
        return run(a)


def run(a):
    """Run a parsed command; returns the exit status."""
    if a.command == 'join':
        for path, (n_new, n_known) in join(a.paths, a.out, a.folder).items():
            print(f"{path}: {n_new:,} rows into {a.out}, {n_known:,} left out that an earlier file has")
    elif a.command == 'train_tokenizer':
        train_tokenizer(documents(a.paths, a.key), a.out, a.vocab_size, a.model_type, a.max_lines)
        print(f"{a.out}: {data.load_tokenizer(a.out).vocab_size} ids with the four special ones")
    elif a.command == 'tokenize':
        n, tokens = tokenize(a.paths, a.tokenizer, a.out, a.key, a.layout, a.row_len, a.rows_per_shard, a.n_process)
        print(f"{a.out}: {n:,} documents, {tokens:,} tokens")
    elif a.command == 'pair':
        print(f"{a.out}: {pair(a.paths, a.out, a.captions, a.samples_per_shard):,} samples")
    elif a.command == 'merge':
        n = captions.merge(a.paths, a.captions, a.out, a.synthetic, a.n_process)
        left_out = ', '.join(f'{k:,} {why}' for why, k in n['left_out'].items())
        print(f"{a.out}: {n['samples']:,} samples, {n['synthetic']:,} of them with synthetic captions of "
              f"{n.get('captions', 0):,}; left out: {left_out}; {a.out}/report.jsonl names them")
    elif a.command == 'smart101':
        print(f"{a.out}: {smart101(a.paths[0], a.out, a.split, a.short_suffix):,} conversations")
    elif a.command == 'index':
        damaged = [d for *_, d in files.open_tars(files.find(a.paths, '.tar'), a.cache_dir) if d]
        print('\n'.join(damaged) or "every tar is whole and indexed")
        return 1 if damaged else 0
    else:
        tokenizer = data.load_tokenizer(a.tokenizer)
        source = open_source(a.paths, tokenizer, a.seq_len, View(a.image_size, a.n_token), a.image_root,
                             a.caption_field, system_prompt=a.system_prompt)
        if getattr(source, 'note', ''):
            print(source.note)
        if a.command == 'show':
            show(source, tokenizer, a.n, a.seed, a.image_out)
            return 0
        bad, total = check(source)
        print('\n'.join([f"bad: {m}" for m in bad] + [f"{source.name}: {len(bad)} bad; " + json.dumps(total)]))
        return 1 if bad else 0
    return 0


if __name__ == '__main__':
    sys.excepthook = user_error_hook
    sys.exit(main())
