"""preferences.py: pairs from LLaVA-RLHF's JSON, DPO's loss beside TRL's and a formula, the reference's file."""
import json
import math
import types
from collections import defaultdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import picture

from data import Mixture, collate, load_tokenizer
from errors import BadSample, UserError
from files import write_whole
from images import View
from kernels import IGNORE_INDEX
from preferences import PreferenceSource, dpo_loss, read_reference


def entry(i, better='a red wall', worse='no , two cats', preference=1, image=True, turns=1, **more):
    asked = [{'from': who, 'value': f'{text} {i} ?'} for _ in range(turns) for who, text in (
        ('human', 'what is on the photo'), ('gpt', 'a wall'))]
    asked[0]['value'] = '<image>\n' + asked[0]['value']
    outputs = [{'from': 'llava', 'value': text} for text in (better, worse)[::3 - 2 * preference]]
    return dict({'id': str(i), 'conversations': asked[:-1] + [{'from': 'gpt', 'value': ''}], 'output_1': outputs[0],
                 'output_2': outputs[1], 'preference': preference, 'hallucination': True}
                | ({'image': f'{i}.jpg'} if image else {}) | more)


@pytest.fixture
def pairs(world, tmp_path):
    """source, tokenizer = pairs(entries): their images are there"""
    def make(entries, seq_len=128, **options):
        for row in entries:
            if 'image' in row:
                (tmp_path / row['image']).write_bytes(picture('red', 'JPEG', int(row['id'])))
        (tmp_path / 'pairs.json').write_text(json.dumps(entries))
        tokenizer = load_tokenizer(str(world / 'data' / 'tokenizer.model'))
        return PreferenceSource(str(tmp_path / 'pairs.json'), str(tmp_path), tokenizer, seq_len, View(28, 4),
                                split_turns=True, **options), tokenizer
    return make


def test_a_pair_is_two_rows_of_one_prompt_and_one_image(pairs):
    source, tok = pairs([entry(0), entry(1, preference=2, turns=2), entry(2, image=False)], system_prompt='a photo')
    for i, turns in enumerate((1, 2, 1)):
        sample = source[i]
        prompt = ([tok.image_id] * 4 + [tok.sep_id]) * (i != 2) + tok.encode('a photo')
        for k in range(turns):
            prompt += tok.encode(f'what is on the photo {i} ?') + [tok.sep_id]
            prompt += (tok.encode(f'a wall {i} ?') + [tok.sep_id]) * (k < turns - 1)     # earlier answers: no loss
        for row, answer in enumerate(('a red wall', 'no , two cats')):                  # the better one comes first
            ids = tok.encode(answer) + [tok.sep_id]
            whole, n = prompt + ids, len(prompt) + len(ids) - 1
            assert sample.tokens[row, :n].tolist() == whole[:-1] and (sample.tokens[row, n:] == tok.pad_id).all()
            kept = np.flatnonzero(sample.targets[row] != IGNORE_INDEX)
            assert kept.tolist() == list(range(len(prompt) - 1, n)) and sample.targets[row][kept].tolist() == ids
        assert sample.id == f'pairs.json:{i}'
    batch = collate([source[i] for i in range(3)], tok.pad_id)
    assert len(batch.images) == 2 and batch.image_index.tolist() == [0, 0, 1, 1]        # encoded once for both answers
    assert batch.ids == [f'pairs.json:{i}' for i in range(3) for _ in range(2)]
    assert batch.stats['instruct']['n_sample'] == 3


def test_text_cond_reads_the_question_whose_answers_are_compared(pairs):
    source, tok = pairs([entry(0), entry(1, turns=2)], system_prompt='a photo', text_cond=True)
    for i in range(2):
        assert source[i].prompts == 2 * [tok.encode(f'what is on the photo {i} ?')]
    batch = collate([source[0], source[1]], tok.pad_id)
    assert len(batch.images) == 2 and batch.image_text == [source[i].prompts[0] for i in range(2)]      # one a pair


def test_what_is_no_pair_is_a_bad_sample(pairs):
    rows = {
        'output_1 and output_2 are equal': entry(0, 'a wall', ' a wall\n'),
        'preference=3': entry(1) | {'preference': 3},
        'preference=True': entry(2) | {'preference': True}, "preference='1'": entry(3) | {'preference': '1'},
        'is NoneType, not a string': {k: v for k, v in entry(4).items() if k != 'output_2'},
        "no 'conversations'": entry(5) | {'conversations': []},
        'the last turn is a question': entry(6) | {'conversations': entry(6, turns=2)['conversations'][:-1]},
        'fit seq_len=128': entry(7, worse='cat ' * 150), 'does not fit': entry(8) | {'conversations': [
            {'from': 'human', 'value': 'wall ' * 150}, {'from': 'gpt', 'value': ''}]},
        "expected a path inside": entry(9, image=False) | {'image': '../9.jpg'}}
    source, _ = pairs(list(rows.values())[:9])
    for i, part in enumerate(list(rows)[:9]):
        with pytest.raises(BadSample, match=part) as caught:
            source[i]
        assert f'entry {i}' in str(caught.value) and '\n' not in str(caught.value)
    source, _ = pairs([*list(rows.values())[:8], entry(9)])
    mixture = Mixture([source], [1.0], 3, max_bad_samples=99)
    assert {mixture[n].id for n in range(9)} == {'pairs.json:8'}                        # the only one that can be used
    assert sum(len(mixture[n].bad) > 0 for n in range(9)) == 8


def test_an_image_that_is_not_there_is_told_before_the_start(pairs, tmp_path):
    pairs([entry(0), entry(1)])
    (tmp_path / '1.jpg').unlink()
    source = PreferenceSource(str(tmp_path / 'pairs.json'), str(tmp_path), None, 64, View(28, 4))
    with pytest.raises(UserError, match=r'1 of 2 images are not in .*1.jpg'):
        Mixture([source], [1.0], 3)


def test_loss_is_ln_2_where_nothing_was_learned_and_the_formula_elsewhere():
    g = torch.Generator().manual_seed(5)
    logp, before = -200 * torch.rand(2, 64, 2, generator=g, dtype=torch.float64)
    losses, rewards = dpo_loss(before, before, 0.3)
    assert not rewards.any() and torch.allclose(losses, torch.full_like(losses, math.log(2)))
    beta = 0.07
    losses, rewards = dpo_loss(logp.requires_grad_(), before, beta)
    ratio = [(logp[:, i] - before[:, i]).exp() ** beta for i in (0, 1)]                 # equation 7, by exponentials
    torch.testing.assert_close(losses, -(ratio[0] / (ratio[0] + ratio[1])).log(), rtol=1e-9, atol=1e-12)
    losses.sum().backward()
    wrong = (rewards[:, 1] - rewards[:, 0]).sigmoid() * beta             # the paper's gradient: more where it is wrong
    torch.testing.assert_close(logp.grad, torch.stack((-wrong, wrong), 1), rtol=1e-9, atol=1e-12)
    losses, _ = dpo_loss(torch.tensor([[-900.0, 0.0]]), torch.zeros(1, 2), 1.0)         # no overflow far away
    assert losses.item() == 900


def test_equals_trl(pairs):
    """TRL's own _compute_loss on the same batch in its layout: all better answers, then all worse ones."""
    dpo = pytest.importorskip('trl.trainer.dpo_trainer', exc_type=Exception)
    source, tok = pairs([entry(0), entry(1, preference=2, turns=2), entry(2, 'yes yes yes yes', image=False)])
    batch = collate([source[i] for i in range(3)], tok.pad_id)
    g = torch.Generator().manual_seed(9)
    tables = torch.randn(2, tok.vocab_size, tok.vocab_size, generator=g, dtype=torch.float64)    # two models: bigrams
    logits, before = (table[batch.tokens] for table in tables)                          # (2P,T,V)

    def summed(logits):
        nats = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction='none')
        return -nats.view(batch.tokens.shape).sum(1).view(-1, 2)
    ours, rewards = dpo_loss(summed(logits), summed(before), 0.1)
    order = [0, 2, 4, 1, 3, 5]
    last = torch.full((6, 1), tok.pad_id)                                # TRL shifts by itself
    ids = torch.cat((batch.tokens, last), 1)
    kept = batch.targets != IGNORE_INDEX
    ids[:, 1:][kept] = batch.targets[kept]
    mask = torch.cat((torch.zeros(6, 1), kept), 1).long()

    def model(table):
        def forward(input_ids, labels=None, **_):
            nll = F.cross_entropy(table[input_ids[:, :-1]].flatten(0, 1), labels[:, 1:].flatten(), reduction='none')
            like = -nll.view(len(input_ids), -1)
            zero = torch.zeros_like(like)
            return types.SimpleNamespace(log_probs=like, entropy=zero, mean_logits=zero, is_top1=zero.bool())
        return forward
    accelerator = types.SimpleNamespace(device='cpu', gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = types.SimpleNamespace(
        model=torch.nn.Identity(), accelerator=accelerator, aux_loss_enabled=False, ld_alpha=None, beta=0.1,
        precompute_ref_logps=True, f_divergence_type='reverse_kl', loss_types=['sigmoid'], loss_weights=[1.0],
        use_weighting=False, _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1)
    inputs = dict(input_ids=ids[order], attention_mask=torch.ones_like(mask), completion_mask=mask[order],
                  ref_chosen_logps=summed(before)[:, 0], ref_rejected_logps=summed(before)[:, 1])
    theirs = dpo.DPOTrainer._compute_loss(trainer, model(tables[0]), inputs, False)
    torch.testing.assert_close(ours.mean(), theirs, rtol=1e-9, atol=0)
    metrics = trainer._metrics['train']
    assert metrics['rewards/chosen'][0] == pytest.approx(float(rewards[:, 0].mean()), rel=1e-9)
    assert metrics['rewards/rejected'][0] == pytest.approx(float(rewards[:, 1].mean()), rel=1e-9)


def test_a_reference_file_is_whole_and_of_one_model_and_data(tmp_path):
    path = str(tmp_path / 'a' / 'reference.json')
    about = dict(model={'model.safetensors': 'ab'}, data='cd', resize='crop')
    assert read_reference(path, about) == {}
    pairs = {'x:0': [float(torch.tensor(-12.345, dtype=torch.float32)), -1.0]}
    write_whole(path, dict(about=about, pairs=pairs))
    assert read_reference(path, about) == pairs                          # the same bits
    for key, other in (('model', {'model.safetensors': 'ff'}), ('data', 'ee'), ('resize', 'naive')):
        with pytest.raises(UserError, match=f'another {key}, .*: move the file away') as caught:
            read_reference(path, about | {key: other})
        assert path in str(caught.value) and '\n' not in str(caught.value)
    for text, part in (('{', 'JSON'), ('[]', 'object'), ('{"about": {}}', "'pairs' is missing"),
                       ('{"about": {}, "pairs": {"x": [1]}}', '1 long'),
                       ('{"pairs": {"x": [1, 2]}, "about": {}}', 'another model'),
                       ('{"about": {}, "pairs": {"x": [1, NaN]}}', 'nan')):
        (tmp_path / 'a' / 'reference.json').write_text(text)
        with pytest.raises(UserError, match=part):
            read_reference(path, about)
