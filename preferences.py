"""
Pairs of answers of which one is preferred: from LLaVA-RLHF's JSON to samples, DPO's loss, and the file of what the
reference thinks of them. dpo.py trains on them.
"""
import hashlib
import os

import numpy as np
import torch
import torch.nn.functional as F

from errors import NUMBER, BadSample, Field, UserError, check, reading
from files import reading_item, write_whole
from instruct import InstructSource, _clean, _turns
from kernels import IGNORE_INDEX
from mixture import Sample
from weights import read_json


class PreferenceSource(InstructSource):
    """
    Pairs of answers from LLaVA-RLHF's human-preference JSON: {'image', 'conversations', whose last answer is only a
    place, 'output_1': {'value'}, 'output_2', 'preference': 1 or 2}. A Sample has two rows, the preferred answer first;
    both begin with the same image and turns, and only the answer with its sep carries loss.
    Raises BadSample for an entry that is no such pair, or does not fit seq_len: an answer without its end, or without
    the beginning of its question, is not the one that was judged.
    """
    def id(self, index):
        return self._name(index)

    def _entry(self, index):
        entry, (stamp, r) = super()._entry(index), self.shards.locate(index)
        with reading_item(f"{stamp[0]}: entry {r}"):
            turns = _turns(entry) and entry['conversations']
            outputs = [entry.get(key) for key in ('output_1', 'output_2')]
            texts = [_clean(output.get('value') if isinstance(output, dict) else None) for output in outputs]
            preference = entry.get('preference')
            if len(turns) % 2:
                raise BadSample("the last turn is a question, expected the place of its answer")
            if type(preference) is not int or preference not in (1, 2):
                raise BadSample(f"preference={preference!r}, expected 1 or 2")
            if texts[0] == texts[1]:
                raise BadSample(f"output_1 and output_2 are equal: {texts[0][:60]!r}")
        better, worse = ({'from': 'gpt', 'value': text} for text in (texts if preference == 1 else texts[::-1]))
        return dict(entry, conversations=[*turns[:-1], better, turns[-2], worse])

    def _layout(self, pairs, n_token):
        rows = []
        for pair in pairs[-2:]:                                          # what comes before is both answers' prompt
            row = super()._layout(pairs[:-2] + [pair], n_token)
            if row.n_truncated:
                raise BadSample(f"an answer with its prompt does not fit seq_len={self.seq_len}")
            row.targets[:-1 - len(self.tokenizer.encode(_clean(pair[1])))] = IGNORE_INDEX
            rows.append(row)
        shape = 2, max(len(row.tokens) for row in rows)
        tokens, targets = np.full(shape, self.tokenizer.pad_id), np.full(shape, IGNORE_INDEX)
        for i, row in enumerate(rows):
            tokens[i, :len(row.tokens)], targets[i, :len(row.tokens)] = row.tokens, row.targets
        return Sample(tokens, targets, n_image_token=n_token, image_id=self.tokenizer.image_id)


def dpo_loss(logp, reference, beta):
    """
    DPO's loss of pairs (arXiv 2305.18290, equation 7): -ln sigmoid(reward of the better - reward of the worse).
    logp, reference  (P,2) float: ln p of the better and of the worse answer, its end included, by model and reference
    returns  losses (P,), and rewards (P,2): beta (logp - reference)
    """
    rewards = beta * (logp - reference)
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1]), rewards


class Reference:
    """
    The reference's log-probabilities of the answers, in a JSON file that is rewritten whole as they come: .pairs is
    {id of a pair: [better, worse], or None of a pair that cannot be used}.
    about    dict of what they depend on; UserError for a file under another
    """
    def __init__(self, path, about):
        self.path, self.about, self.pairs = path, about, {}
        if os.path.exists(path):
            content = read_json(path)
            check(content, Field(dict, of={'about': Field(dict), 'pairs': Field(
                dict, of=Field(list, 2, 2, of=Field(NUMBER), optional=True))}), path)
            for key, now in about.items():
                if (then := content['about'].get(key)) != now:
                    raise UserError(f"{path}: log-probabilities under another {key}, {then!r}, this run's is {now!r}: "
                                    "move the file away, or give another --reference, which is made anew")
            self.pairs = content['pairs']

    def of(self, ids):
        """ln p (P,2) float32; UserError for a pair that is not there."""
        for id in ids:
            if not self.pairs.get(id):
                raise UserError(f"{self.path} lacks {id}, which could not be used when it was made: move the file away")
        return torch.tensor([self.pairs[id] for id in ids])

    def write(self):
        write_whole(self.path, dict(about=self.about, pairs=self.pairs))


def sha256_of(path):
    with reading(path, 'a file'), open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()
