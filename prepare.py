"""
Data preparation: from your own files to the formats that data.py reads, and a look at what is there.
    python prepare.py train_tokenizer texts/ --out data/tokenizer.model --vocab_size 8192
    python prepare.py tokenize texts/ more.jsonl.zst --tokenizer data/tokenizer.model --out data/text
    python prepare.py pair photos/ --out data/captions             # a.jpg + a.txt, or --captions captions.jsonl
    python prepare.py index data/captions                         # tar indexes, before many processes want them
    python prepare.py check data/captions --tokenizer data/tokenizer.model
    python prepare.py show llava.json --image_root images/ --tokenizer data/tokenizer.model
Texts are .txt .rst .md (a document each), .jsonl .jsonl.gz .jsonl.zst (a document a line), or folders of them.
"""
import argparse
import gzip
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import sys
import tarfile
from array import array

import numpy as np
from tqdm import tqdm

import data
from kernels import IGNORE_INDEX

OTHER_IMAGES = ('.gif', '.bmp', '.tif', '.tiff', '.ppm', '.jp2', '.heic', '.avif')
PLAIN = ('.txt', '.rst', '.md')
LINES = ('.jsonl', '.jsonl.gz', '.jsonl.zst', '.jsonl.zstd')


# --- documents in ---------------------------------------------------------------------------------
def documents(paths, key='text'):
    """Yield the texts of files, patterns and folders; raises ValueError naming file and line of what is no text."""
    for path in data.find(paths, *PLAIN, *LINES):
        if path.endswith(LINES):
            with _open_lines(path) as f:
                for n, line in enumerate(f, 1):
                    if line.strip():
                        yield _field(path, n, line, key)
        elif path.endswith(PLAIN):
            with open(path, encoding='utf-8-sig') as f:                              # -sig: an editor's mark is no text
                try:
                    yield f.read()
                except UnicodeDecodeError as e:
                    raise ValueError(f"{path}: not UTF-8 text: {e}") from None
        else:
            raise ValueError(f"{path}: expected one of {' '.join(PLAIN + LINES)}")


def _open_lines(path):
    if path.endswith('.gz'):
        return gzip.open(path, 'rt', encoding='utf-8-sig')
    if path.endswith(('.zst', '.zstd')):
        try:
            import zstandard
        except ImportError:
            raise ValueError(f"{path}: reading .zst needs `pip install zstandard`, or unpack it first") from None
        return io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(open(path, 'rb'), closefd=True),
                                encoding='utf-8-sig')
    return open(path, encoding='utf-8-sig')


def _field(path, n, line, key):
    try:
        value = json.loads(line)[key]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path}: line {n}: no JSON object with {key!r}: {type(e).__name__} {e}") from None
    if not isinstance(value, str):
        raise ValueError(f"{path}: line {n}: {key!r} is {type(value).__name__}, expected a string")
    return value


# --- tokenizer and tokens -------------------------------------------------------------------------
def train_tokenizer(texts, out, vocab_size=8192, model_type='bpe', max_lines=1_000_000):
    """
    Train a sentencepiece model on the lines of `texts` and write it to `out`, whole or not at all.
    Unknown characters become bytes and white space is kept, so that decoding gives the text back. Raises ValueError.
    """
    import sentencepiece
    if os.path.exists(out):
        raise ValueError(f"{out}: is there already; remove it or choose another --out")
    lines = (line[i:i + 1000] for text in texts for line in text.split('\n') for i in range(0, len(line), 1000))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.islice(lines, max_lines), model_writer=model, vocab_size=vocab_size,
            model_type=model_type, byte_fallback=True, normalization_rule_name='identity', num_threads=1, minloglevel=2,
            remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, unk_id=0, eos_id=1, bos_id=-1, pad_id=-1)
    except (RuntimeError, OSError) as e:
        raise ValueError(f"train_tokenizer: --vocab_size={vocab_size}: "
                         f"{str(e).strip().splitlines()[-1].split('] ')[-1]}") from None
    os.makedirs(os.path.dirname(out) or '.', exist_ok=True)
    with open(out + '.tmp', 'wb') as f:
        f.write(model.getvalue())
    os.replace(out + '.tmp', out)


def _start_process(path):
    global _tokenizer
    _tokenizer = data.load_tokenizer(path)


def _encode(text):
    return _tokenizer.encode(text)


def tokenize(texts, tokenizer_path, out, layout='bin', row_len=2048, rows_per_shard=8192, n_process=1):
    """
    Write the token ids of `texts`, each followed by end-of-text, as shards into the new folder `out`.
    layout 'bin': uint16 files that end where a document ends; 'tar': OpenLM rows of row_len + 1 ids, the last shorter.
    A shard has about rows_per_shard * row_len tokens and a .json naming the tokenizer. Returns (documents, tokens).
    Raises ValueError when `out` holds anything, or for 'bin' with ids beyond uint16.
    """
    if layout not in ('bin', 'tar'):
        raise ValueError(f"tokenize: layout={layout!r}: expected 'bin' or 'tar'")
    tokenizer = data.load_tokenizer(tokenizer_path)
    if layout == 'bin' and tokenizer.vocab_size > 65536:
        raise ValueError(f"tokenize: {tokenizer.vocab_size} ids do not fit the uint16 of .bin; use --layout tar")
    partial, texts, n_document, shards, ids = _new_folder(out), iter(texts), 0, [], array('I')
    size = rows_per_shard * (row_len if layout == 'bin' else row_len + 1)
    with multiprocessing.Pool(n_process, _start_process, (tokenizer_path,)) as pool, \
            tqdm(unit=' documents', disable=None) as bar:
        while block := list(itertools.islice(texts, 256 * n_process)):       # Pool.imap alone would read everything
            for document in pool.imap(_encode, block, chunksize=16):
                ids.extend(document + [tokenizer.eot_id])
                n_document += 1
                while len(ids) >= size:
                    n = len(ids) if layout == 'bin' else size
                    shards.append(_write_shard(partial, len(shards), ids[:n], layout, row_len, tokenizer))
                    del ids[:n]
            bar.update(len(block))
    if len(ids) > 1:                                                     # one id alone predicts nothing
        shards.append(_write_shard(partial, len(shards), ids, layout, row_len, tokenizer))
    if not shards:
        shutil.rmtree(partial)
        raise ValueError("tokenize: no text in the input")
    if layout == 'tar':
        with open(os.path.join(partial, 'manifest.jsonl'), 'w') as f:    # OpenLM's --dataset-manifest
            f.writelines(json.dumps({'shard': f'{i:08d}', 'num_sequences': s[1]}) + '\n' for i, s in enumerate(shards))
    os.replace(partial, out)
    return n_document, sum(s[0] for s in shards)


def _new_folder(out):
    """Return a fresh `<out>.partial`, to be renamed to `out` when complete."""
    if os.path.isfile(out) or os.path.isdir(out) and os.listdir(out):
        raise ValueError(f"{out}: is there already; remove it or choose another --out")
    partial = out.rstrip('/') + '.partial'
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)
    return partial


def _write_shard(folder, i, ids, layout, row_len, tokenizer):
    name, n_row = os.path.join(folder, f'{i:08d}'), 1
    if layout == 'bin':
        np.array(ids, '<u2').tofile(name + '.bin')
    else:
        rows = [ids[j:j + row_len + 1] for j in range(0, len(ids), row_len + 1)]
        rows = [row for row in rows if len(row) > 1]
        n_row = len(rows)
        with tarfile.open(name + '.tar', 'w') as tar:
            for j, row in enumerate(rows):
                _add(tar, f'{i:08d}_{j:08d}.json.gz', gzip.compress(json.dumps(row.tolist()).encode(), 6, mtime=0))
    with open(name + '.json', 'w') as f:
        json.dump({'tokenizer_sha256': tokenizer.sha256, 'vocab_size': tokenizer.vocab_size, 'n_token': len(ids)}, f)
    return len(ids), n_row


def _add(tar, name, content):
    info = tarfile.TarInfo(name)                                         # time 0: the same input gives the same bytes
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


# --- images and captions --------------------------------------------------------------------------
def pair(folder, out, captions='', samples_per_shard=1000):
    """
    Write images and their captions as WebDataset tars into the new folder `out`; image files are stored as they are.
    Captions stand in `<image>.txt` beside each image, or in a .jsonl of {"image": path in folder, "caption": text}.
    A sample's key ends in the image's name, so that bad items can be told. Other formats than IMAGE_SUFFIXES are left
    out, with a line. Returns the number of samples. Raises ValueError for an image without a caption, an empty caption,
    or a path outside the folder.
    """
    if captions:
        with open(captions, encoding='utf-8-sig') as f:
            pairs = [(_field(captions, n, line, 'image'), _field(captions, n, line, 'caption'))
                     for n, line in enumerate(f, 1) if line.strip()]
    else:
        suffixes = tuple('.' + s for s in data.IMAGE_SUFFIXES)
        pairs = [(os.path.relpath(p, folder), None) for p in data.find(folder, *suffixes, *map(str.upper, suffixes))]
        other = [p for _, _, names in os.walk(folder) for p in names if p.lower().endswith(OTHER_IMAGES)]
        if other:
            print(f"!!! {len(other)} images left out, such as {other[0]}: expected {' '.join(suffixes)}")
    partial = _new_folder(out)
    for first in tqdm(range(0, len(pairs), samples_per_shard), unit=' shards', disable=None):
        with tarfile.open(os.path.join(partial, f'{first // samples_per_shard:06d}.tar'), 'w') as tar:
            for i, (image, caption) in enumerate(pairs[first:first + samples_per_shard], first):
                path, (stem, suffix) = data.safe_join(folder, image), os.path.splitext(image)
                key = f"{i:09d}_{re.sub(r'[^0-9A-Za-z_-]', '_', stem)[-60:]}"
                try:
                    with open(path, 'rb') as f:
                        _add(tar, key + suffix.lower(), f.read())
                    if caption is None:
                        with open(os.path.splitext(path)[0] + '.txt', encoding='utf-8-sig') as f:
                            caption = f.read()
                except (OSError, UnicodeDecodeError) as e:
                    raise ValueError(f"{path}: needs a caption of its own beside it, a readable .txt: {e}") from None
                if not caption.strip():
                    raise ValueError(f"{path}: its caption is empty")
                _add(tar, key + '.txt', caption.strip().encode('utf-8'))
    os.replace(partial, out)
    return len(pairs)


# --- a look at a data set -------------------------------------------------------------------------
def open_source(paths, tokenizer, seq_len=2048, image_root='', n_token=729, image_size=384, kind='auto', **instruct):
    """Return the source that reads `paths`: 'text', 'caption' or 'instruct', by their contents when kind is 'auto'."""
    if kind == 'auto':
        files = data.find(paths, '.bin', '.tar', '.json', '.jsonl')      # text shards have a .json beside them
        tars = [f for f in files if f.endswith('.tar')]
        kind = 'text' if tars or any(f.endswith('.bin') for f in files) else 'instruct'
        if tars:
            suffixes = [name.rsplit('.', 1)[-1].lower() for name, *_ in data.tar_members(tars[0])[0][:8]]
            kind = 'caption' if set(suffixes) & set(data.IMAGE_SUFFIXES) else 'text'
    if kind not in ('text', 'caption', 'instruct'):
        raise ValueError(f"kind={kind!r}: expected 'auto', 'text', 'caption' or 'instruct'")
    if kind == 'text':
        return data.TextSource(paths, tokenizer, seq_len)
    if kind == 'caption':
        return data.CaptionSource(paths, tokenizer, seq_len, n_token, image_size)
    image_root = image_root or os.path.dirname(data.find(paths, '.json', '.jsonl')[0])
    return data.InstructSource(paths, image_root, tokenizer, seq_len, n_token, image_size, **instruct)


def check(source):
    """Read every item of a source; return (bad messages, {'samples', 'positions', 'kept', 'images', 'truncated'})."""
    bad, total = [], dict.fromkeys(('samples', 'positions', 'kept', 'images', 'truncated'), 0)
    for i in tqdm(range(len(source)), unit=' items', disable=None):
        try:
            sample = source[i]
        except data.BadSample as e:
            bad.append(str(e))
            continue
        for name, n in (('samples', 1), ('positions', sample.tokens.size),
                        ('kept', (sample.targets != IGNORE_INDEX).sum()),
                        ('images', len(sample.images)), ('truncated', sample.n_truncated)):
            total[name] += int(n)
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
            kind = int if option == 'seed' else _count if isinstance(default, int) else str
            p.add_argument('--' + option, default=default, required=default is None, help=text, type=kind)
    out = ('out', None, 'new file or folder')
    key = ('key', 'text', 'field of .jsonl lines that holds the text')
    look = [('tokenizer', None, '.model, tokenizer.json or a folder with one'),
            ('kind', 'auto', 'auto, text, caption, instruct'), ('seq_len', 2048, 'positions'),
            ('image_root', '', "folder of LLaVA JSON's images; empty = the JSON's own"),
            ('n_token', 729, 'image positions'), ('image_size', 384, 'pixels'),
            ('system_prompt', '', 'in front of questions')]
    command('train_tokenizer', out, key, ('vocab_size', 8192, 'pieces'), ('model_type', 'bpe', 'bpe or unigram'),
            ('max_lines', 1_000_000, 'lines to train on'))
    command('tokenize', out, key, look[0], ('layout', 'bin', 'bin (uint16) or tar (OpenLM rows)'),
            ('row_len', 2048, 'positions of a row'), ('rows_per_shard', 8192, 'rows'), ('n_process', 1, 'processes'))
    command('pair', out, ('captions', '', '.jsonl of image and caption; empty = a .txt beside each image'),
            ('samples_per_shard', 1000, 'images'))
    command('index', ('cache_dir', '', 'for indexes of read-only data'))
    command('check', *look)
    command('show', *look, ('n', 4, 'samples'), ('seed', 0, 'of the order'), ('image_out', '', 'folder for PNGs'))
    return top.parse_args(argv)


def main(argv=None):
    a = parse(argv)
    if a.command == 'train_tokenizer':
        train_tokenizer(documents(a.paths, a.key), a.out, a.vocab_size, a.model_type, a.max_lines)
        print(f"{a.out}: {data.load_tokenizer(a.out).vocab_size} ids with the four special ones")
    elif a.command == 'tokenize':
        n, tokens = tokenize(documents(a.paths, a.key), a.tokenizer, a.out, a.layout, a.row_len, a.rows_per_shard,
                             a.n_process)
        print(f"{a.out}: {n:,} documents, {tokens:,} tokens")
    elif a.command == 'pair':
        print(f"{a.out}: {pair(a.paths[0], a.out, a.captions, a.samples_per_shard):,} samples")
    elif a.command == 'index':
        damage = [data.tar_members(path, a.cache_dir)[1] for path in tqdm(data.find(a.paths, '.tar'), disable=None)]
        damaged = [d for d in damage if d]
        print('\n'.join(damaged) or "every tar is whole and indexed")
        return 1 if damaged else 0
    else:
        tokenizer = data.load_tokenizer(a.tokenizer)
        source = open_source(a.paths, tokenizer, a.seq_len, a.image_root, a.n_token, a.image_size, a.kind,
                             system_prompt=a.system_prompt)
        if a.command == 'show':
            show(source, tokenizer, a.n, a.seed, a.image_out)
            return 0
        bad, total = check(source)
        print('\n'.join([f"bad: {m}" for m in bad] + [f"{source.name}: {len(bad)} bad; " + json.dumps(total)]))
        return 1 if bad else 0
    return 0


if __name__ == '__main__':
    try:
        sys.exit(main())
    except (ValueError, OSError) as e:
        sys.exit(f"prepare.py: {e}")
