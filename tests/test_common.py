"""common.py: inputs, the optimizer's rules, a step's numbers."""
import math
import os
import sys

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import checkpoint
import common
from errors import UserError
from connectors import Projector
from model import VLM, Decoder, ModelConfig
from vision import PatchProjection

PARTS = {'decoder': 1.0, 'projector': 2.0}


def tiny_vlm(seed=0, n_embd=8):
    torch.manual_seed(seed)
    encoder = PatchProjection(4, 2)
    return VLM(Decoder(ModelConfig(1, 2, n_embd, vocab_size=12, seq_len=8, n_ffn=8)), encoder, Projector(12, n_embd),
               image_id=9)


def tiny_optimizer(model, shares=PARTS):
    return common.make_optimizer(model, shares, weight_decay=0.1, betas=(0.9, 0.95))


def give_gradients(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=g)


def trained(seed=0, steps=2):
    model = tiny_vlm(seed)
    optimizer = tiny_optimizer(model)
    for i in range(steps):
        give_gradients(model, i)
        common.optimizer_step(optimizer, 0.01, 1.0)
    return model, optimizer


def one_line(caught, *words):
    message = str(caught.value.code if caught.type is SystemExit else caught.value)
    assert '\n' not in message and all(w in message for w in words), message


# --- inputs ---------------------------------------------------------------------------------------------------------

def test_all_missing_inputs_are_named_at_once(tmp_path):
    (tmp_path / 'a.tar').touch()
    common.require({str(tmp_path / 'a.tar'): 'x', str(tmp_path / '*.tar'): 'x'})
    with pytest.raises(UserError) as caught:
        common.require({'no/a': 'make them', str(tmp_path): '', 'no/*.tar': 'make them', 'no/b': 'fetch it'})
    assert str(caught.value) == 'no/a, no/*.tar not found; make them; no/b not found; fetch it'


def test_a_text_source_keeps_its_name_and_others_do_not_get_it():
    names = {'text': 'text', 'text/*.tar': 'text', 'text/a': 'text/a', '/x/text/*.bin': '/x/text', '*.tar': '*.tar'}
    assert {pattern: common.text_name(pattern, [pattern]) for pattern in names} == names
    assert common.text_name('a/*.tar', ['a/*.tar', 'b']) == 'a/*.tar'


# --- the optimizer --------------------------------------------------------------------------------------------------

def test_adamw_decays_every_parameter_and_scales_each_part():
    model = tiny_vlm()
    optimizer = tiny_optimizer(model)
    names = [n for g in optimizer.param_groups for n in g['names']]
    assert names == [n for n, _ in model.named_parameters()]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    common.optimizer_step(optimizer, 0.01, 1.0)
    for n, p in model.named_parameters():                # a zero gradient leaves decay alone: lr x share x 0.1
        share = 2.0 if n.startswith('projector') else 1.0
        torch.testing.assert_close(p, before[n] * (1 - 0.01 * share * 0.1), msg=n)


def test_matrices_alone_decay_where_gains_and_biases_do_not():
    model = tiny_vlm()
    optimizer = common.make_optimizer(model, PARTS, weight_decay=0.1, betas=(0.9, 0.95), decay='matrices')
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    common.optimizer_step(optimizer, 0.01, 1.0)
    for n, p in model.named_parameters():
        share = 2.0 if n.startswith('projector') else 1.0
        torch.testing.assert_close(p, before[n] * (1 - 0.01 * share * 0.1 * (p.ndim >= 2)), msg=n)
    assert {p.ndim for p in model.parameters()} == {1, 2}


def test_clipping():
    model = tiny_vlm()
    give_gradients(model)
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    got, bad = common.optimizer_step(tiny_optimizer(model), 0.0, 1.0)
    assert float(got) == pytest.approx(norm, rel=1e-5) and bad == 0
    assert math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters())) == pytest.approx(1.0, rel=1e-4)
    give_gradients(model)
    common.optimizer_step(tiny_optimizer(model), 0.0, 0.0)                   # 0 = off
    assert math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters())) == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(value):
    model, optimizer = trained()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    moments = {n: {k: v.clone() for k, v in m.items()} for n, m in checkpoint.optimizer_state(optimizer).items()}
    give_gradients(model)
    model.projector.fc1.weight.grad[0, 0] = value
    norm, bad = common.optimizer_step(optimizer, 0.01, 1.0)
    assert bad == 1 and not norm.isfinite()
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    for name, m in checkpoint.optimizer_state(optimizer).items():
        assert all(torch.equal(v, moments[name][k]) for k, v in m.items()), name
    give_gradients(model)
    assert common.optimizer_step(optimizer, 0.01, 1.0)[1] == 0               # and the next one counts
    assert float(checkpoint.optimizer_state(optimizer)['decoder.norm.weight']['step']) == 3


def test_moments_travel_by_name_and_a_projector_starts_its_own_count():
    model, optimizer = trained(steps=3)
    saved = {k: v for k, v in checkpoint.optimizer_state(optimizer).items() if k.startswith('decoder.')}
    other = tiny_vlm()
    other.load_state_dict(model.state_dict())
    second = tiny_optimizer(other, {'projector': 1.0, 'decoder': 1.0})       # other groups, other order
    with pytest.raises(UserError, match='moments of projector.fc1.weight are None'):     # never silently fresh
        checkpoint.load_moments(second, saved)
    assert checkpoint.load_moments(second, saved, ['projector.']) == [f'projector.{n}' for n, _ in other.projector.named_parameters()]
    give_gradients(other)
    common.optimizer_step(second, 0.01, 1.0)
    steps = {n: int(m['step']) for n, m in checkpoint.optimizer_state(second).items()}
    assert {steps[n] for n in saved} == {4} and {v for n, v in steps.items() if n not in saved} == {1}
    for name in saved:                                   # loading copies: the saved tensors did not move
        assert int(saved[name]['step']) == 3
    saved['decoder.norm.weight'] = {k: torch.zeros(3) for k in ('step', 'exp_avg', 'exp_avg_sq')}
    with pytest.raises(UserError, match=r"moments of decoder.norm.weight are .*\(3,\).*expected .*'step': \(\)"):
        checkpoint.load_moments(tiny_optimizer(tiny_vlm()), saved, ['projector.'])


def test_dropped_gradients_keep_their_bits():
    model, optimizer = trained()
    give_gradients(model)
    before = {k: v.clone() for k, v in model.projector.state_dict().items()}
    common.drop_gradients(model.projector, model.encoder)
    common.optimizer_step(optimizer, 0.01, 1.0)
    assert all(torch.equal(v, before[k]) for k, v in model.projector.state_dict().items())
    assert int(checkpoint.optimizer_state(optimizer)['projector.fc1.weight']['step']) == 2


def test_loss_weights():
    counts = dict(weight=torch.tensor([900.0, 10.0, 0.0], dtype=torch.float64),
                  n_sample=torch.tensor([9.0, 1.0, 2.0], dtype=torch.float64))
    nll = [torch.rand(900, dtype=torch.float64), torch.rand(10, dtype=torch.float64)]
    factor, share = common.loss_weights(counts, 'token')
    total = sum(float(f) * n.sum() for f, n in zip(factor, nll))
    assert total == pytest.approx(float(torch.cat(nll).mean()), rel=1e-6)    # one mean over all targets
    assert share.tolist() == pytest.approx([900 / 910, 10 / 910, 0])
    factor, share = common.loss_weights(counts, 'source')
    total = sum(float(f) * n.sum() for f, n in zip(factor, nll))
    assert total == pytest.approx(float(0.9 * nll[0].mean() + 0.1 * nll[1].mean()), rel=1e-6)
    assert share.tolist() == pytest.approx([0.9, 0.1, 0]) and float(share.sum()) == pytest.approx(1)
    nothing = dict(weight=torch.zeros(2, dtype=torch.float64), n_sample=torch.ones(2, dtype=torch.float64))
    for rule in ('token', 'source'):
        assert common.loss_weights(nothing, rule)[0].tolist() == [0, 0]
