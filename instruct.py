"""
Conversations from LLaVA JSON and folders of images; the layout of prompts. data.py offers these names too.
"""
import collections
import json
import os
import re
from functools import cached_property

import numpy as np
from tqdm import tqdm

from errors import BadSample, UserError, first_line, reading
from files import Index, Shards, cached_index, find, read_at, read_whole, reading_item, stamp_of
from images import RESIZE, open_image
from kernels import IGNORE_INDEX
from mixture import Sample, permute
from weights import MAX_JSON_BYTES

# What is larger is refused before it is read or unpacked. Beside each bound: what real data needs.
MAX_TEXT_BYTES = 4 << 20             # a caption, a .json of a tar, an entry of LLaVA JSON: its 665k average 1.5 KB
MAX_IMAGE_BYTES = 512 << 20          # an image file: images.MAX_PIXELS of RGB are 268 MB before compression
SUFFIXES = ('.jpg', '.png', '.gif', '.jpeg', '.webp')    # LLaVA says .jpg of all of ocr_vqa, whose files are of three
JSON_COLUMNS = ('offsets', 'sizes', 'n_char', 'n_first')
# a box: four shares of width and height in brackets, 2 or 3 decimals, trailing zeros perhaps left out
BOX = re.compile(r'\[([01]\.\d{1,3}(?:, ?[01]\.\d{1,3}){3})\]')


def check_room(name, seq_len, view):
    if seq_len < view.n_slot + 2:
        raise UserError(f"{name}: seq_len={seq_len} does not hold image_tokens={view.n_slot}, a separator and text; "
                        f"expected at least {view.n_slot + 2}")
    if view.resize not in RESIZE:
        raise UserError(f"{name}: resize={view.resize!r}: expected one of {', '.join(RESIZE)}")


def _clean(text):
    if not isinstance(text, str):
        raise BadSample(f"the text of a turn is {type(text).__name__}, not a string")
    return text.replace('<image>', '').strip()


def caption_prompt(n_token, tokenizer):
    """Return the ids in front of a caption: [image x N] [sep]; none without an image."""
    return [tokenizer.image_id] * n_token + [tokenizer.sep_id] if n_token else []


def instruct_prompt(question, n_token, tokenizer, system_prompt=''):
    """
    Return the ids in front of an answer: [image x N] [sep] [system] question [sep]; n_token=0 = text only. A tuple of
    texts stands for a question with the turns before it, each with its [sep].
    """
    ids = caption_prompt(n_token, tokenizer) + (tokenizer.encode(system_prompt) if system_prompt else [])
    for text in question if isinstance(question, tuple) else (question,):
        ids += question_ids(text, tokenizer) + [tokenizer.sep_id]
    return ids


def question_ids(question, tokenizer):
    """Return the ids of a question alone, which are also what text_cond encodes its image with."""
    return tokenizer.encode(_clean(question))


class InstructSource:
    """
    Conversations from LLaVA JSON (a list, or one object per line) and a folder of images, laid out as in data.py's
    docstring. Entries without 'image' are text only. Turns alternate human, gpt; '<image>' is taken out of every text.
    An image that is not there under its name is looked for under the other SUFFIXES.
    What does not fit seq_len is cut at the end; of a first question that leaves no room for its answer the beginning
    is, so that the answer, or what fits half of the room, always carries loss (Sample.n_truncated tells of both).
    view          an images.View: how an image is read, and the positions that it takes
    loss_average  'token' = every kept target weighs 1; 'answer' = each answer with its sep weighs 1 in total (less
                  where seq_len cuts it)
    split_turns   True = a row per question, each with image and system prompt; they share one encoded image
    shuffle_turns True = the questions, each with its answer, come in the order of draw's key; the image stays first
    boxes         the frame of boxes such as [0.25, 0.10, 0.75, 0.90] in the texts: 'original' = shares of the photo,
                  left as they are; 'letterbox' = shares of the photo padded to a square (original_box)
    text_cond     True = samples say what their images are encoded with (Sample.prompts): each row's first question
    .note         lines for the user about missing images and questions that are cut; else ''
    .damaged      a line about missing images: without max_bad_samples a Mixture raises it
    Raises UserError for a missing file or broken JSON, BadSample for an unusable entry.
    """
    items_per_row = 1

    def __init__(self, json, image_root, tokenizer, seq_len, view, system_prompt='', loss_average='token',
                 split_turns=False, name='instruct', cache_dir='', boxes='original', shuffle_turns=False,
                 text_cond=False):
        check_room(name, seq_len, view)
        for key, value, words in (('loss_average', loss_average, ('token', 'answer')),
                                  ('boxes', boxes, ('original', 'letterbox'))):
            if value not in words:
                raise UserError(f"{name}: {key}={value!r}: expected {words[0]!r} or {words[1]!r}")
        if shuffle_turns and split_turns:
            raise UserError(f"{name}: shuffle_turns with split_turns: a question alone in its row has no order")
        self.shuffle_turns, self.text_cond = shuffle_turns, text_cond
        self.name, self.image_root, self.tokenizer, self.seq_len = name, image_root, tokenizer, seq_len
        self.view, self.system_prompt = view, system_prompt
        self.loss_average, self.split_turns, self.boxes, self.shards = loss_average, split_turns, boxes, Shards()
        entries, images, paths = [], [], find(json, '.json', '.jsonl')
        for path in paths:
            stamp = stamp_of(path)
            index = cached_index(stamp, cache_dir, _build_json_index, JSON_COLUMNS)
            names = index.names.tobytes().decode('utf-8', 'surrogateescape').split('\0')[:-1]
            has_image = np.array([name != '' for name in names], np.int64)
            entries.append(np.stack([*(index.columns[column] for column in JSON_COLUMNS), has_image], 1))
            images += filter(None, names)
            self.shards.add(stamp, len(index))
        self.entries = np.concatenate(entries)                           # (n, 5)
        self.group_sizes = [len(self.entries)]                           # one group: shuffled as a whole
        if not len(self.entries):
            raise UserError(f"{json}: no entries")
        missing = missing_images(images, image_root)
        self.damaged = [f"{paths[0]}: {missing}"] if missing else []

    @cached_property
    def note(self):
        lines, room = self.damaged[:], self.seq_len - len(instruct_prompt('', 0, self.tokenizer, self.system_prompt))
        maybe = np.flatnonzero(self.entries[:, 3] + (self.view.n_slot + 1) * self.entries[:, 4] >= room)
        cut = []
        for i in tqdm(maybe.tolist(), desc='long questions', delay=2, disable=None):
            try:                                                         # a token has at least a byte
                question = _turns(self._entry(i))[0]
                n = len(instruct_prompt(question, self.view.n_slot * int(self.entries[i, 4]), self.tokenizer,
                                        self.system_prompt))
            except BadSample:                                            # told when it is drawn
                continue
            cut += [self._name(i)] if n > self.seq_len else []
        if cut:
            lines.append(f"{self.name}: {len(cut)} first question(s) leave no room for an answer in seq_len="
                         f"{self.seq_len}: their beginning is cut: {_few(cut)}")
        return '\n'.join(lines)

    def __len__(self):
        return len(self.entries)

    def outline(self, index):
        """Return (has it an image, a cheap estimate of its positions: characters / 4, and the image)."""
        n_char, has_image = self.entries[index, [2, 4]].tolist()
        return bool(has_image), min(n_char // 4 + self.view.n_slot * has_image, self.seq_len)

    def _name(self, index):
        stamp, r = self.shards.locate(index)
        return f"{os.path.basename(stamp[0])}:{r}"

    def _entry(self, index):
        stamp, r = self.shards.locate(index)
        with reading_item(f"{stamp[0]}: entry {r}"):
            return json.loads(read_at(stamp, *self.entries[index, :2].tolist(), MAX_TEXT_BYTES))

    def __getitem__(self, index):
        return self.draw(index)

    def draw(self, index, key=None):
        """Return the Sample of an entry; key: 64 bits that the order of shuffle_turns follows, None = as they are."""
        entry = self._entry(index)
        stamp, r = self.shards.locate(index)
        with reading_item(f"{stamp[0]}: entry {r}"):
            turns, name = self.turns_of(entry), entry.get('image') or None
            image = self._open_image(name) if name else None
            if image and self.boxes == 'letterbox':
                turns = [original_boxes(text, *image.size) for text in turns]
            pairs = [turns[i:i + 2] for i in range(0, len(turns), 2)]
            if self.shuffle_turns and key is not None:
                pairs = [pairs[permute(i, len(pairs), key)] for i in range(len(pairs))]
            image, n_token = self.view(image) if image else (None, 0)
            sample = self._layout(pairs, n_token)
            if name:
                sample.images, sample.image_keys = [image], [name]
        sample.source, sample.id = self.name, self._name(index)
        return sample

    def conversation(self, index):
        """Return (an entry as it is, its first question without '<image>', its image's name, '' = none)."""
        entry, (stamp, r) = self._entry(index), self.shards.locate(index)
        with reading_item(f"{stamp[0]}: entry {r}"):
            image = entry.get('image') or ''
            return entry, _clean(_turns(entry)[0]), image and safe_join('', image)

    def turns_of(self, entry):
        """The texts of an entry's turns as they are laid out; BadSample for an unusable entry."""
        return _turns(entry)

    def _open_image(self, name):
        path = safe_join(self.image_root, name)
        if not os.path.lexists(path):
            stem = os.path.splitext(path)[0]
            path = next((stem + suffix for suffix in SUFFIXES if os.path.lexists(stem + suffix)), path)
        content = read_whole(path, MAX_IMAGE_BYTES)
        with reading_item(path):
            return open_image(content, size=self.view.decode)

    def _layout(self, pairs, n_token):
        encode, sep = self.tokenizer.encode, self.tokenizer.sep_id
        rows, shortened = [], False
        for p, (question, answer) in enumerate(pairs):
            if p == 0 or self.split_turns:
                ids = instruct_prompt(question, n_token, self.tokenizer, self.system_prompt)
                if len(ids) > self.seq_len:                              # no room: the question keeps its end
                    fixed = len(instruct_prompt('', n_token, self.tokenizer, self.system_prompt))
                    room = self.seq_len + 1 - fixed
                    keep = max(0, room - min(len(encode(_clean(answer))) + 1, (room + 1) // 2))
                    ids, shortened = ids[:fixed - 1] + ids[-1 - keep:], True
                before = len(instruct_prompt('', n_token, self.tokenizer, self.system_prompt)) - 1
                if isinstance(question, tuple):                          # the question is the last of these turns
                    before = len(ids) - 1 - len(question_ids(question[-1], self.tokenizer))
                rows.append(([], [], ids[before:-1]))                    # ids, a weight for each as a target, question
            else:
                ids = encode(_clean(question)) + [sep]
            rows[-1][0].extend(ids)
            rows[-1][1].extend([0.0] * len(ids))
            ids = encode(_clean(answer)) + [sep]
            rows[-1][0].extend(ids)
            rows[-1][1].extend([1 / len(ids) if self.loss_average == 'answer' else 1.0] * len(ids))
        cut = int(shortened or max(len(ids) for ids, *_ in rows) > self.seq_len + 1)
        rows = [(ids[:self.seq_len + 1], w[:self.seq_len + 1], asked) for ids, w, asked in rows]
        rows = [row for row in rows if any(row[1])]
        if not rows:
            raise BadSample(f"no answer is left within seq_len={self.seq_len}: the system prompt fills it")
        shape = len(rows), max(len(ids) for ids, *_ in rows) - 1
        tokens, targets = np.full(shape, self.tokenizer.pad_id, np.int64), np.full(shape, IGNORE_INDEX, np.int64)
        weights = np.zeros(shape, np.float32)
        for b, (ids, w, _) in enumerate(rows):
            n = len(ids) - 1
            tokens[b, :n], weights[b, :n] = ids[:-1], w[1:]
            targets[b, :n] = np.where(weights[b, :n] > 0, ids[1:], IGNORE_INDEX)
        if not self.split_turns:
            tokens, targets, weights = tokens[0], targets[0], weights[0]
        return Sample(tokens, targets, weights if self.loss_average == 'answer' else None, n_image_token=n_token,
                      image_id=self.tokenizer.image_id, n_truncated=cut,
                      prompts=[asked for *_, asked in rows] if self.text_cond else [])


def safe_join(root, path):
    """Return root/path; raises BadSample for a path from a data file that is absolute or leaves the root."""
    if not isinstance(path, str) or os.path.isabs(path) or '..' in path.replace('\\', '/').split('/'):
        raise BadSample(f"image {path!r}: expected a path inside {root or 'the image folder'}")
    return os.path.join(root, path)


def missing_images(images, root):
    """
    Return a line about the images of data that are not below root, by folder, '' where all are there; folders are
    listed once, whatever the number of images.
    """
    by_folder = collections.defaultdict(list)
    for image in dict.fromkeys(images):
        by_folder[os.path.dirname(image)].append(os.path.basename(image))
    lines, n_missing = [], 0
    for folder, names in sorted(by_folder.items()):
        try:
            here = set(os.listdir(safe_join(root, folder) or '.'))
        except (OSError, ValueError):                                    # none there, or no folder of the root
            here = set()
        stems = {stem for stem, suffix in map(os.path.splitext, here) if suffix in SUFFIXES}
        gone = [name for name in names if name not in here and os.path.splitext(name)[0] not in stems]
        n_missing += len(gone)
        lines += [f"{folder or '.'} {len(gone):,} of {len(names):,} ({_few(gone)})"] if gone else []
    total = sum(map(len, by_folder.values()))
    if not n_missing:
        return ''
    more = f"; and in {len(lines) - 8} more folders" if lines[8:] else ''
    return (f"{n_missing:,} of {total:,} images are not in {root}: {'; '.join(lines[:8])}{more}: fetch them, or "
            "--max_bad_samples=N replaces and counts up to N of them as they are drawn")


def _few(names):
    return ', '.join(names[:3]) + ', ...' * (len(names) > 3)


def original_boxes(text, width, height):
    """
    Return a text with its boxes, [x1, y1, x2, y2] as shares of the padded square of a photo of width x height, mapped
    to shares of the photo. A box that reaches into the padding was none of the square and stays, as does all that is
    no box.
    """
    def mapped(match):
        texts = re.split(', ?', match[1])
        n_digit = max(len(t) - 2 for t in texts)
        box = [(float(t) * side - (side - of) // 2) / of for t, of in zip(texts, (width, height) * 2)]
        slack = [0.01 * side / of for of in (width, height) * 2]         # rounding, and annotators' hands
        if n_digit < 2 or box[0] > box[2] or box[1] > box[3] or any(not -s <= v <= 1 + s for v, s in zip(box, slack)):
            return match[0]
        zeros = any(len(t) > 3 and t[-1] == '0' for t in texts)          # written as 0.50, not as Python's 0.5
        values = [round(min(max(v, 0.0), 1.0), n_digit) for v in box]
        return '[' + ', '.join(f'{v:.{n_digit}f}' if zeros else str(v) for v in values) + ']'
    side = max(width, height)
    return BOX.sub(mapped, text) if isinstance(text, str) and width != height else text


def _turns(entry):
    """Return the texts of an entry's turns, question and answer alternating; raises BadSample for anything else."""
    turns = entry.get('conversations') if isinstance(entry, dict) else None
    if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(t, dict) for t in turns):
        raise BadSample("no 'conversations' with a question and an answer")
    for i, turn in enumerate(turns):
        if turn.get('from') != ('human', 'gpt')[i % 2]:
            raise BadSample(f"turn {i} is from {turn.get('from')!r}, expected {('human', 'gpt')[i % 2]!r}")
    return [turn.get('value') for turn in turns[:len(turns) // 2 * 2]]  # a last question without an answer has no loss


def _json_entry(text, at):
    """Return (entry, end) of the JSON that begins at `at`; no more than MAX_TEXT_BYTES of it are parsed."""
    decoder, n = json.JSONDecoder(), 8192
    try:
        entry, n = decoder.raw_decode(text[at:at + n])                   # most are short, and a slice is a copy
    except (ValueError, RecursionError):
        pass
    if n == 8192:
        entry, n = decoder.raw_decode(text[at:at + MAX_TEXT_BYTES])
    return entry, at + n


def _build_json_index(path):
    with reading(path, 'JSON'):
        text = read_whole(path, MAX_JSON_BYTES).decode('latin-1')        # a character a byte: positions are offsets
    skip, entries, images, at = re.compile(r'[\s,\[]*(?:\xef\xbb\xbf)?[\s,\[]*'), [], [], 0
    while (at := skip.match(text, at).end()) < len(text) and text[at] != ']':
        try:
            entry, end = _json_entry(text, at)
        except (ValueError, RecursionError) as e:
            line = text.count('\n', 0, at + getattr(e, 'pos', 0)) + 1
            long = f" or an entry above {MAX_TEXT_BYTES:,} bytes" * (len(text) - at > MAX_TEXT_BYTES)
            raise UserError(f"{path}: line {line}, entry {len(entries)}: broken JSON{long}: "
                            f"{first_line(getattr(e, 'msg', e))}") from None
        turns = entry.get('conversations') if isinstance(entry, dict) else None
        texts = [str(t.get('value')) for t in turns if isinstance(t, dict)] if isinstance(turns, list) else []
        n_first = len(texts[0].encode('utf-8', 'replace')) if texts else 0
        entries.append((at, end - at, sum(map(len, texts)), n_first))
        image = entry.get('image') if isinstance(entry, dict) else None
        images.append(_raw_name(image) if isinstance(image, str) else b'')
        at = end
    is_list = re.match(r'(\s|\xef\xbb\xbf)*\[', text) is not None
    if at == len(text) and is_list:
        raise UserError(f"{path}: broken JSON: the list has no end after entry {len(entries) - 1}: truncated?")
    if at < len(text) and (not is_list or text[at + 1:].strip()):
        line = text.count('\n', 0, at) + 1
        raise UserError(f"{path}: line {line}: broken JSON: text behind entry {len(entries) - 1}, the last of the list")
    columns = np.array(entries, np.int64).reshape(-1, 4).T
    return Index(dict(zip(JSON_COLUMNS, columns)), np.frombuffer(b''.join(n + b'\0' for n in images), np.uint8))


def _raw_name(image):
    """Return the UTF-8 of a name whose JSON was read with a character for each byte; an escape may give others."""
    name = image.replace('\0', '')
    try:
        raw = name.encode('latin-1')
        raw.decode('utf-8')
        return raw
    except UnicodeError:
        return name.encode('utf-8', 'replace')
