"""
From files to samples: tokenizers, and the sources of text and captions; those of conversations are in instruct.py.
    files -> source[i] -> Sample -> Mixture[n] -> collate -> Batch -> Loader          (from Sample on: mixture.py)

Formats: `.bin` files of uint16 ids (nanoGPT), tars of tokenised rows (OpenLM, DCLM), WebDataset tars of captioned
images, LLaVA JSON. They are read in place through an index of byte offsets kept beside them. No file is trusted and
nothing is unpickled: a file that cannot be read raises UserError, an item BadSample, and both say which. Samples ([sep]
is an id of its own):
    text         a window of documents joined by end-of-text                  loss on every target
    caption      [image x N] [sep] caption [eot]                              loss on the caption and the eot
    instruction  [image x N] [sep] [system] question [sep] answer [sep] ...   loss on each answer and the sep after it
"""
import hashlib
import json
import os
import zlib
from collections import Counter
from contextlib import suppress
from glob import escape, glob

import numpy as np

from errors import BadSample, Field, UserError, check, first_line, reading
from files import Shards, find, open_tars, read_at, read_whole, reading_item, sample_key, stamp_of, tar_index
from images import View, open_image
from instruct import (MAX_IMAGE_BYTES, MAX_TEXT_BYTES, InstructSource, caption_prompt,  # noqa: F401
                      check_room, instruct_prompt, safe_join)
from kernels import IGNORE_INDEX
from mixture import Batch, Loader, Mixture, Sample, collate  # noqa: F401 (names of this module, too)
from weights import MAX_JSON_BYTES, read_json

IMAGE_SUFFIXES = ('jpg', 'jpeg', 'png', 'webp')
CAPTION_FIELDS = ('auto', 'txt', 'json', 'syn')
ROW_LEN = 2048                       # positions of a row, as in OpenLM's shards
ROWS_PER_SHARD = 8192                # a .bin file is shuffled as if cut into shards of so many rows (OpenLM's tars)
# What is larger is refused before it is read or unpacked. Beside each bound: what real data needs.
MAX_ROW_BYTES = 64 << 20             # a row of ids, unpacked: OpenLM's 2,049 ids are 14 KB of JSON
MAX_TOKENIZER_BYTES = 256 << 20      # GPT-NeoX-20B's tokenizer.json has 2 MB, a vocabulary of 256k ids 34 MB


# --- tokenizer ------------------------------------------------------------------------------------
class Tokenizer:
    """
    A sentencepiece `.model` or Hugging Face `tokenizer.json` with four special ids; use load_tokenizer.
    eot_id is the tokenizer's own end-of-text; image_id, sep_id, pad_id are the first free ids above its own, so text
    can never contain them (GPT-NeoX-20B: 0, 50277, 50278, 50279). vocab_size counts them all.
    """
    def __init__(self, path):
        self.path, self.content = path, read_whole(path, MAX_TOKENIZER_BYTES)
        self.sha256 = hashlib.sha256(self.content).hexdigest()
        self.hf = path.endswith('.json')
        if self.hf:
            os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')     # its threads and forked workers do not mix
            import tokenizers
            parts = json.loads(self.content.decode('utf-8'))
            if not isinstance(parts, dict) or not isinstance(parts.get('model'), dict):
                raise UserError(f"{path}: not a Hugging Face tokenizer.json: it has no 'model'")
            self.engine = tokenizers.Tokenizer.from_buffer(self.content)
            self.engine.no_truncation()                                  # a file may ask for each of these three, and
            self.engine.no_padding()                                     # texts would be cut, or grow, without a word
            self.engine.post_processor = None
            self.engine.encode_special_tokens = True                     # '<|endoftext|>' in a text is text
            n_own = max(self.engine.get_vocab(with_added_tokens=True).values()) + 1
            known = [self.engine.token_to_id(t) for t in ('<|endoftext|>', '</s>', '<|end_of_text|>', '<eos>')]
            eot = next((i for i in known if i is not None), -1)
        else:
            import sentencepiece
            self.engine = sentencepiece.SentencePieceProcessor()
            self.engine.LoadFromSerializedProto(self.content)
            n_own, eot = self.engine.get_piece_size(), self.engine.eos_id()
        first = self.engine.encode('a').tokens[0] if self.hf else self.engine.id_to_piece(self.engine.encode('a')[0])
        self.leading_space = first.startswith('\u2581')       # sentencepiece's own: 'a' is encoded as ' a'
        self.eot_id = eot if eot >= 0 else n_own
        free = max(n_own, self.eot_id + 1)
        self.image_id, self.sep_id, self.pad_id, self.vocab_size = free, free + 1, free + 2, free + 3

    def encode(self, text):
        """Return the ids of a text as a list of int, never a special id, whatever the text says."""
        if not text.isascii():
            text = text.encode('utf-8', 'replace').decode('utf-8')       # json may hold lone surrogates
        ids = self.engine.encode(text, add_special_tokens=False).ids if self.hf else self.engine.encode(text)
        return [i for i in ids if i != self.eot_id] if self.eot_id in ids else ids

    def encode_next(self, text):
        """Return the ids of a text as it goes on after a word: with the space between them, once."""
        return self.encode(text if self.leading_space else ' ' + text)

    def decode(self, ids):
        """Return the text of a sequence of ids; special ids and ids beyond the tokenizer's are dropped."""
        return self.engine.decode([int(i) for i in ids if 0 <= i < self.image_id and i != self.eot_id])

    def check_same(self, other):
        """Raise UserError naming the first id that means something else in another Tokenizer."""
        ours, theirs = self._pieces(), other._pieces()
        differ = min((i for i in ours.keys() & theirs.keys() if ours[i] != theirs[i]), default=None)
        if differ is not None:
            raise UserError(f"{self.path}: id {differ} is {ours[differ]!r}, in {other.path} it is {theirs[differ]!r}: "
                            "give that tokenizer")

    def doubt(self, source):
        """
        A line for the user where the first windows of a TextSource do not look like this tokenizer's ids, else ''.
        Its own ids come back when their text is encoded again (0.1 % do not, at cuts); of another tokenizer's 3 to 25 %
        do not, though all may lie in range. Half of the windows decide: DCLM's shards hold rows of padding.
        """
        n, off = min(8, len(source)), 0
        for i in range(n):
            with suppress(BadSample):                                    # those are counted when they are drawn
                ids, lost = source[i].tokens, 0
                for part in np.split(ids, np.flatnonzero(ids == self.eot_id)):
                    again = Counter(self.encode(self.decode(part)))
                    lost += (Counter(part[part != self.eot_id].tolist()) - again).total()
                off += lost > 8 + 0.02 * len(ids)
        return '' if 2 * off <= n else (
            f"!!! text source {source.name!r}: in {off} of its first {n} windows ids change when their text is encoded "
            f"again: was it tokenised with {self.path}?")

    def _pieces(self):
        if self.hf:
            return {i: piece for piece, i in self.engine.get_vocab(with_added_tokens=True).items()}
        return {i: self.engine.id_to_piece(i) for i in range(self.engine.get_piece_size())}


def load_tokenizer(path):
    """Return the Tokenizer of a sentencepiece .model, a tokenizer.json or a folder holding one; raises UserError."""
    file = path
    if os.path.isdir(path):
        found = sorted(glob(os.path.join(escape(path), 'tokenizer.json'))
                       or glob(os.path.join(escape(path), '*.model')))
        if len(found) != 1:
            raise UserError(f"tokenizer {path}: expected a tokenizer.json or one .model in this folder, found {found}")
        file = found[0]
    if not os.path.isfile(file):
        raise UserError(f"tokenizer {path}: no such file; `python prepare.py train_tokenizer` makes one, or give the "
                        "path of a sentencepiece .model or a Hugging Face tokenizer.json")
    try:
        with reading(file, 'a tokenizer'):
            return Tokenizer(file)
    except BaseException as e:                                           # Rust's panic is no Exception
        if type(e).__name__ != 'PanicException':
            raise
        raise UserError(f"{file}: not readable as a tokenizer ({first_line(e)})") from None


# --- sources --------------------------------------------------------------------------------------
# A source has len(source) and source[i] -> Sample. It tells Mixture its name, items_per_row (windows of a stored row),
# group_sizes (rows of each shard), damaged (a line for each damaged file), and outline(i): whether item i shows an
# image, and an estimate of its positions.
class TextSource:
    """
    Windows of seq_len positions from `.bin` files of little-endian uint16 ids, or from OpenLM/DCLM tars of rows of
    ids. A stored row of P + 1 ids has P targets and feeds ceil(P / seq_len) consecutive windows that overlap by one
    id. No target is lost: where seq_len does not divide P the last window is shorter, and a row shorter than the others
    (at the end of a file) is divided evenly over its windows.
    row_len  P of a `.bin`, which has no rows of its own; 0 = as many whole windows as come near ROW_LEN
    Raises UserError for missing files, another tokenizer's, or tars that are not as the manifest.jsonl beside them
    says, BadSample for a row that cannot be read.
    """
    def __init__(self, paths, tokenizer, seq_len, name='text', row_len=0, cache_dir=''):
        self.name, self.seq_len, self.tokenizer, self.cache_dir = name, seq_len, tokenizer, cache_dir
        self.shards, self.damaged, self.last = Shards(), [], (-1, None)
        files = find(paths, '.bin', '.tar')
        self.binary = files[0].endswith('.bin')
        if self.binary:
            longest = max(os.path.getsize(path) // 2 - 1 for path in files)
            self.row_len = row_len or seq_len * max(1, min(round(ROW_LEN / seq_len), -(-longest // seq_len)))
        for path in files:
            if path.endswith('.bin') != self.binary:
                raise UserError(f"{path}: a text source reads .bin files or .tar files, not both; use two sources")
            stamp = stamp_of(path)
            _check_sidecar(stamp, tokenizer)
            if self.binary:
                if stamp[1] % 2:
                    raise UserError(f"{path}: {stamp[1]} bytes, expected two for each id: truncated?")
                n_row = -(-max(stamp[1] // 2 - 1, 0) // self.row_len)
                for first in range(0, n_row, ROWS_PER_SHARD):
                    self.shards.add(stamp, min(ROWS_PER_SHARD, n_row - first), first)
        if not self.binary:
            manifests = _read_manifests(files, paths)
            for stamp, n, _, damage in open_tars(files, cache_dir):
                file, expected = manifests.get(stamp[0], ('', n))
                if n != expected and not damage:
                    raise UserError(f"{stamp[0]}: {n} rows, expected {expected} ({file}): a shard or a manifest of "
                                    "another data set? Fetch both again, or remove the manifest")
                self.damaged += [damage] if damage else []
                self.shards.add(stamp, n + bool(damage))                 # all that is lost counts as one bad row
        self.group_sizes = self.shards.sizes
        if sum(self.group_sizes) == 0:
            raise UserError(f"{files[0]}: no row of text in {len(files)} file(s)")
        if not self.binary:
            self.row_len = self._longest_row() - 1                       # 2048 in OpenLM's shards of 2049 ids
        self.items_per_row = -(-self.row_len // seq_len)

    def __len__(self):
        return sum(self.group_sizes) * self.items_per_row

    def outline(self, index):
        return False, self.seq_len

    def __getitem__(self, index):
        row, w = divmod(index, self.items_per_row)
        (path, *_), r = self.shards.locate(row)
        ids, n_window = self._row(row), self.items_per_row
        n = len(ids) - 1                                                 # positions of the row
        if n > self.row_len:
            raise BadSample(f"{path}: row {r} has {len(ids)} ids, the first rows {self.row_len + 1}")
        lo, hi = w * self.seq_len, min((w + 1) * self.seq_len, n)
        if n < self.row_len:                                             # divided evenly, no window empty
            hi = max(n * (w + 1) // n_window, 1)
            lo = min(n * w // n_window, hi - 1)
        return Sample(ids[lo:hi], ids[lo + 1:hi + 1], source=self.name, id=f"{os.path.basename(path)}:{r}:{w}")

    def _longest_row(self):
        """Return the number of ids in the longest of the first rows, or in a shard's first row that can be read."""
        lengths, n_first = [], min(8, self.shards.ends[-1])
        for i, row in enumerate([*range(n_first), *self.shards.ends[1:-1]]):
            if i < n_first or not lengths:
                with suppress(BadSample):
                    lengths.append(len(self._row(row)))
        return max(lengths, default=0) or len(self._row(0))              # none can be read: the first one says why

    def _row(self, row):
        if self.last[0] == row:  # the windows of a row are drawn one after another
            return self.last[1]
        stamp, r = self.shards.locate(row)
        if self.binary:
            first, where = r * self.row_len, f"{stamp[0]}: row {r}"
            with reading_item(where):
                n_byte = 2 * min(self.row_len + 1, stamp[1] // 2 - first)
                ids = np.frombuffer(read_at(stamp, 2 * first, n_byte, n_byte), '<u2').astype(np.int64)
        else:
            index = tar_index(stamp, self.cache_dir)
            if r >= len(index):
                raise BadSample(f"{stamp[0]}: {index.damage or 'its index has changed: start again'}")
            where = f"{stamp[0]}: {index.name(r)}"
            with reading_item(f"{where}: not a row of token ids"):
                data = read_at(stamp, *index.place(r), MAX_ROW_BYTES)
                if where.endswith('.gz'):
                    unpack = zlib.decompressobj(31)                      # 31 = gzip
                    data = unpack.decompress(data, MAX_ROW_BYTES)
                    if not unpack.eof:
                        raise UserError(f"gzip data cut short or beyond {MAX_ROW_BYTES} bytes")
                ids = np.array(json.loads(data))
                if ids.dtype.kind != 'i' or ids.ndim != 1 or len(ids) < 2:
                    raise UserError(f"{len(ids) if ids.ndim else 0} items of type {ids.dtype}")
        low, high, limit = int(ids.min()), int(ids.max()), self.tokenizer.image_id
        if low < 0 or high >= limit:
            raise BadSample(f"{where}: id {low if low < 0 else high} is beyond the tokenizer's {limit} ids; was this "
                            f"text tokenised with {self.tokenizer.path}?")
        self.last = (row, ids)
        return ids


def _check_sidecar(stamp, tokenizer):
    """Raise UserError when the .json beside a shard says that it was longer, or that another tokenizer wrote it."""
    path, side = stamp[0], os.path.splitext(stamp[0])[0] + '.json'
    if not os.path.lexists(side):
        return
    info = read_json(side)
    check(info, Field(dict, of=SIDECAR), side)
    sha, n_token = info.get('tokenizer_sha256'), info.get('n_token')
    if sha and sha != tokenizer.sha256:
        raise UserError(f"{path}: written with another tokenizer (sha256 {sha[:12]}..., vocabulary "
                        f"{info.get('vocab_size')}) than {tokenizer.path} ({tokenizer.sha256[:12]}..., "
                        f"{tokenizer.vocab_size}); tokenise again, or remove {side} if the two are the same")
    if path.endswith('.bin') and n_token is not None and stamp[1] != 2 * n_token:
        raise UserError(f"{path}: {stamp[1]} bytes, expected {2 * n_token} for the {n_token} ids of {side}: truncated?")


def _read_manifests(files, paths):
    """
    Return {tar: (manifest, its rows)} of the manifest.jsonl of OpenLM and DCLM beside tars, with or without a final
    newline; raises UserError where one names a tar that is not in a folder that was given as a whole.
    """
    rows, wanted = {}, [paths] if isinstance(paths, (str, os.PathLike)) else paths
    there, whole = set(files), {os.path.normpath(path) for path in wanted if os.path.isdir(path)}
    for folder in dict.fromkeys(map(os.path.dirname, files)):
        manifest = os.path.join(folder, 'manifest.jsonl')
        if not os.path.exists(manifest):
            continue
        with reading(manifest, 'lines of {"shard": name, "num_sequences": rows}'):
            lines = [json.loads(line) for line in read_whole(manifest, MAX_JSON_BYTES).splitlines() if line.strip()]
            for line in lines:                                           # num_chunks: older tools
                n = line['num_sequences'] if 'num_sequences' in line else line['num_chunks']
                rows[os.path.join(folder, line['shard'].removesuffix('.tar') + '.tar')] = manifest, int(n)
        gone = sorted(path for path in rows if rows[path][0] == manifest and path not in there)
        if gone and os.path.normpath(folder) in whole:
            raise UserError(f"{manifest} names {len(gone)} of {len(lines)} shards that are not there: "
                            f"{', '.join(gone[:3])}{', ...' if gone[3:] else ''}; fetch them, or give the shards as a "
                            f"pattern such as {os.path.join(folder, '*.tar')} to use those that are there")
    return rows


SIDECAR = {'tokenizer_sha256': Field(str, optional=True), 'vocab_size': Field(int, 1, optional=True),
           'n_token': Field(int, 0, optional=True)}


def json_member(stamp, members, suffix):
    """Return the object (dict) that a .json member of a sample holds; {} where there is none, or something else."""
    value = json.loads(read_at(stamp, *members[suffix], MAX_TEXT_BYTES)) if suffix in members else None
    return value if isinstance(value, dict) else {}


def image_suffix(members):
    """Return the suffix of a sample's image; raises UserError where it has none."""
    for suffix in IMAGE_SUFFIXES:
        if suffix in members:
            return suffix
    raise UserError(f"no image ({', '.join(IMAGE_SUFFIXES)}) among its members: {', '.join(members)}")


def caption_of(stamp, members, field, pick=0):
    """
    Return the caption of a sample, stripped; pick: a number that chooses among synthetic ones. `field` as in
    CaptionSource. Raises UserError where it is not there, or empty.
    """
    text = None
    if field == 'txt' or field == 'auto' and 'txt' in members:
        field = 'txt'
        text = read_at(stamp, *members['txt'], MAX_TEXT_BYTES).decode('utf-8') if 'txt' in members else None
    if field in ('json', 'auto'):
        about = json_member(stamp, members, 'json' if 'json' in members or field == 'json' else 'syn.json')
        text = about.get('caption') or about.get('text')
    if field == 'syn' or field == 'auto' and text is None:
        options = json_member(stamp, members, 'syn.json').get('syn_text')
        if isinstance(options, list) and options:
            text = options[pick % len(options)]
    if not isinstance(text, str) or not text.strip():
        expected = {'txt': ".txt", 'json': ".json 'caption' or 'text'", 'syn': ".syn.json 'syn_text'"}
        wanted = ', '.join(expected.values()) if field == 'auto' else expected[field]
        raise UserError(f"no caption ({wanted}), or an empty one, among its members: {', '.join(members)}")
    return text.strip()


class CaptionSource:
    """
    Image-caption samples from WebDataset tars: [image x N] [sep] caption [eot], loss on the caption and the eot.
    Members are one sample when their names agree up to the first dot of the base name, in any order. A sample has an
    image (.jpg .jpeg .png .webp) and a caption. A caption that does not fit is cut and its eot left out
    (Sample.n_truncated).
    caption_field  'txt' = the .txt; 'json' = 'caption' or 'text' of the .json; 'syn' = one entry of 'syn_text' of the
                   .syn.json (DataCompDR; a checksum of the key picks it); 'auto' = the first of these that is there.
                   A mix of original and synthetic captions is made by `prepare.py merge`
    view           an images.View, in place of encoder_n_token, image_size and resize
    .note          what 'auto' means here, a line for the user, where a sample has other captions too; else ''
    Raises UserError when seq_len < encoder_n_token + 2 and for tars without any image or any caption of that kind,
    BadSample for an item without a readable image or caption.
    """
    items_per_row = 1

    def __init__(self, paths, tokenizer, seq_len, encoder_n_token, image_size, resize='letterbox', name='caption',
                 cache_dir='', caption_field='auto', view=None):
        self.name, self.tokenizer, self.seq_len, self.cache_dir = name, tokenizer, seq_len, cache_dir
        self.view = view or View(image_size, encoder_n_token, resize)
        self.caption_field = caption_field
        check_room(name, seq_len, encoder_n_token, resize)
        if caption_field not in CAPTION_FIELDS:
            raise UserError(f"{name}: caption_field={caption_field!r}: expected one of {', '.join(CAPTION_FIELDS)}")
        self.shards, self.damaged = Shards(), []
        for stamp, _, n, damage in open_tars(find(paths, '.tar'), cache_dir):
            self.damaged += [damage] if damage else []
            self.shards.add(stamp, n + bool(damage))
        self.group_sizes = self.shards.sizes
        self.note = self._look()

    def _look(self):
        """Look at the names in the first tar: is there what is to be read? Returns the note."""
        index = tar_index(self.shards.stamps[0], self.cache_dir)
        there = {sample_key(index.name(i))[1] for i in range(len(index))}
        wanted = [('image', set(IMAGE_SUFFIXES))]
        wanted += [('synthetic caption', {'syn.json'})] if self.caption_field == 'syn' else []
        for what, suffixes in wanted if there else []:
            if not there & suffixes:
                raise UserError(f"{self.shards.stamps[0][0]}: no {what} (.{', .'.join(sorted(suffixes))}) in this tar, "
                                f"only .{', .'.join(sorted(there)[:8])}; DataCompDR's tars hold captions without "
                                "images: `python prepare.py merge` puts the two together")
        if self.caption_field != 'auto' or 'syn.json' not in there or not there & {'txt', 'json'}:
            return ''
        taken = '.txt of each sample' if 'txt' in there else "'caption' or 'text' of the .json that have one"
        return (f"{self.name}: captions: {taken} (.syn.json is there too: --caption_field=syn reads the synthetic "
                "captions)")

    def __len__(self):
        return sum(self.group_sizes)

    def outline(self, index):
        return True, self.seq_len

    def __getitem__(self, index):
        stamp, r = self.shards.locate(index)
        index = tar_index(stamp, self.cache_dir)
        if r >= index.n_group:
            raise BadSample(f"{stamp[0]}: {index.damage or 'its index has changed: start again'}")
        key, members = index.sample(r)
        with reading_item(f"{stamp[0]}: {key}"):
            image = members[image_suffix(members)]
            pick = zlib.crc32(key.encode('utf-8', 'surrogateescape'))
            caption = caption_of(stamp, members, self.caption_field, pick)
            image, n = self.view(open_image(read_at(stamp, *image, MAX_IMAGE_BYTES), size=self.view.decode))
        ids = caption_prompt(n, self.tokenizer) + self.tokenizer.encode(caption) + [self.tokenizer.eot_id]
        cut = len(ids) > self.seq_len + 1
        ids = np.array(ids[:self.seq_len + 1], np.int64)
        targets = ids[1:].copy()
        targets[:n] = IGNORE_INDEX                                       # image positions, and the sep as a target
        return Sample(ids[:-1], targets, None, [image], self.name, f"{os.path.basename(stamp[0])}:{key}", n,
                      self.tokenizer.image_id, [f"{stamp[0]}:{r}"], int(cut))

