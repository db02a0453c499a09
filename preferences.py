"""
Pairs of answers of which one is preferred: from LLaVA-RLHF's JSON to samples, DPO's loss, and the file of what the
reference thinks of them. dpo.py trains on them.
"""
import os

import torch.nn.functional as F

from errors import NUMBER, BadSample, Field, UserError, check
from instruct import InstructSource, _clean, _turns
from weights import read_json


class PreferenceSource(InstructSource):
    """
    Pairs of answers from LLaVA-RLHF's human-preference JSON: {'image', 'conversations', whose last answer is only a
    place, 'output_1': {'value'}, 'output_2', 'preference': 1 or 2}. A Sample has two rows, the preferred answer first;
    both begin with the same image and turns, and only the answer with its sep carries loss (split_turns=True).
    Raises BadSample for an entry that is no such pair, or does not fit seq_len: an answer without its end, or without
    the beginning of its question, is not the one that was judged.
    """
    def turns_of(self, entry):
        turns, preference = _turns(entry), entry.get('preference')
        outputs = [entry.get(key) for key in ('output_1', 'output_2')]
        texts = [_clean(output.get('value') if isinstance(output, dict) else None) for output in outputs]
        if len(entry['conversations']) % 2:
            raise BadSample("the last turn is a question, expected the place of its answer")
        if type(preference) is not int or preference not in (1, 2):
            raise BadSample(f"preference={preference!r}, expected 1 or 2")
        if texts[0] == texts[1]:
            raise BadSample(f"output_1 and output_2 are equal: {texts[0][:60]!r}")
        prompt, (better, worse) = tuple(turns[:-1]), texts if preference == 1 else texts[::-1]
        return [prompt, better, prompt, worse]                           # split_turns makes a row of each

    def _layout(self, pairs, n_token):
        sample = super()._layout(pairs, n_token)
        if sample.n_truncated:
            raise BadSample(f"an answer with its prompt does not fit seq_len={self.seq_len}")
        return sample


def dpo_loss(logp, reference, beta):
    """
    DPO's loss of pairs (arXiv 2305.18290, equation 7): -ln sigmoid(reward of the better - reward of the worse).
    logp, reference  (P,2) float: ln p of the better and of the worse answer, its end included, by model and reference
    returns  losses (P,), and rewards (P,2): beta (logp - reference)
    """
    rewards = beta * (logp - reference)
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1]), rewards


def read_reference(path, about):
    """
    The reference's log-probabilities of the answers: {id of a pair: [better, worse]}, {} where there is no such file.
    about    dict of what they depend on; UserError for a file under another
    """
    if not os.path.exists(path):
        return {}
    content = read_json(path)
    check(content, Field(dict, of={'about': Field(dict), 'pairs': Field(
        dict, 1, of=Field(list, 2, 2, of=Field(NUMBER)))}), path)
    for key, now in about.items():
        if (then := content['about'].get(key)) != now:
            raise UserError(f"{path}: log-probabilities under another {key}, {then!r}, this run's is {now!r}: move the "
                            "file away, or give another --reference, which is made anew")
    return content['pairs']
