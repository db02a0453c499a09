"""connectors.py: each projector against an independent one on random weights, and how many tokens an image takes."""
import json
import math
import os
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from connectors import (AttentionProjector, MLP4, Perceiver, Pool, Projector, build_projector, head_count,
                        projector_spec)
from errors import UserError
from images import token_grid
from kernels import IGNORE_INDEX
from model import Undrawn, build_vlm, vlm_spec

KINDS = ('linear', 'mlp2', 'mlp4', 'attn', 'perceiver')
KEYS = dict(projector='mlp2', token_mode='', image_tokens=0)


def perturbed(module, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():                    # gains and biases away from 1 and 0, so that all count
            p += 0.1 * torch.randn(p.shape, generator=g)
    return module


# --- the modules ------------------------------------------------------------------------------------------------------

def test_parameters_at_the_papers_size():
    with torch.device('meta'), Undrawn():
        built = {kind: build_projector(dict(kind=kind, **({'n_token': 64} if kind == 'perceiver' else {})), 1152, 2048)
                 for kind in KINDS}
    n = {kind: sum(p.numel() for p in module.parameters()) for kind, module in built.items()}
    C, D = 1152, 2048
    assert n == {'linear': C * D + D, 'mlp2': 4 * C * C + 4 * C + 4 * C * D + D, 'mlp4': C * D + 3 * D * D + 4 * D,
                 'attn': 2 * (12 * C * C + 13 * C) + C * D + D,
                 'perceiver': 64 * C + 3 * (16 * C * C + 3 * C) + C + C * D + D}
    assert [round(n[kind] / 1e6, 1) for kind in KINDS] == [2.4, 14.8, 15.0, 34.2, 66.1]      # 63.8 before its Linear
    assert head_count(1152) == built['perceiver'].layers[0].n_head == built['attn'][0].self_attn.n_head == 16
    assert [head_count(width) for width in (1, 6, 24, 72, 144, 588, 1024)] == [1, 1, 1, 1, 2, 7, 16]


@pytest.mark.parametrize('width, n_token, T', [(144, 5, 9), (24, 3, 4), (150, 64, 16)])
def test_the_perceiver_is_idefics2s_resampler(width, n_token, T):
    transformers = pytest.importorskip('transformers')
    from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler
    n_head = head_count(width)
    theirs = perturbed(Idefics2PerceiverResampler(transformers.models.idefics2.Idefics2PerceiverConfig(
        hidden_size=width, resampler_n_latents=n_token, resampler_n_heads=n_head, resampler_head_dim=width // n_head,
        num_key_value_heads=n_head)).eval())
    ours, g = Perceiver(width, 32, n_token), torch.Generator().manual_seed(1)
    assert theirs.latents.std() > 0.05                                   # else the comparison would be empty
    wanted = {**ours.state_dict(), **theirs.state_dict()}
    ours.load_state_dict(wanted)
    x, w = torch.randn(2, T, width, generator=g), torch.randn(2, n_token, 32, generator=g)
    expected = F.linear(theirs(x, torch.ones(2, T, dtype=torch.int64)), ours.output.weight, ours.output.bias)
    # float32, sums of up to 600 products in another order
    torch.testing.assert_close(ours(x), expected, atol=2e-5, rtol=2e-5)
    (ours(x) * w).sum().backward()
    (expected * w).sum().backward()
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name).grad, p.grad, atol=1e-3, rtol=1e-3)


def test_latents_differ_and_go_on_to_differ_where_order_tells_nothing():
    for start in ('ours', 'equal'):
        torch.manual_seed(0)
        perceiver, x = Perceiver(24, 8, 6), torch.randn(4, 9, 24)
        if start == 'equal':                                             # transformers' own beginning
            nn.init.ones_(perceiver.latents)
        optimizer = torch.optim.AdamW(perceiver.parameters(), lr=1e-2)
        before = perceiver.latents.detach().clone()
        for _ in range(3):
            loss = perceiver(x).mean(1).square().sum()                   # of a set: as cross-attention would read them
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert not torch.equal(before, perceiver.latents)
        steps = (perceiver.latents - before).detach()
        apart = [F.pdist(y).min() for y in (perceiver.latents.detach(), perceiver(x)[0].detach(), steps)]
        assert min(apart) > 1e-3 if start == 'ours' else max(apart) < 1e-5


def test_attn_is_torchs_transformer_and_a_linear():
    ours = perturbed(AttentionProjector(144, 10))
    x = torch.randn(2, 9, 144, generator=torch.Generator().manual_seed(1))
    expected = x
    for block in list(ours)[:2]:
        layer = nn.TransformerEncoderLayer(144, 2, 4 * 144, dropout=0, activation='gelu', layer_norm_eps=1e-6,
                                           batch_first=True, norm_first=True)
        state, attention = block.state_dict(), [f'self_attn.{name}_proj' for name in 'qkv']
        layer.load_state_dict({
            **{f'self_attn.in_proj_{part}': torch.cat([state[f'{name}.{part}'] for name in attention])
               for part in ('weight', 'bias')},
            **{new + part: state[old + part] for part in ('weight', 'bias') for new, old in (
                ('self_attn.out_proj.', 'self_attn.out_proj.'), ('norm1.', 'layer_norm1.'), ('norm2.', 'layer_norm2.'),
                ('linear1.', 'mlp.fc1.'), ('linear2.', 'mlp.fc2.'))}})
        expected = layer(expected)
    torch.testing.assert_close(ours(x), F.linear(expected, ours[2].weight, ours[2].bias), atol=1e-5, rtol=1e-5)


def test_mlp4_is_llavas():
    ours, x = perturbed(MLP4(6, 10)), torch.randn(2, 4, 6)
    expected, weights = x, dict(ours.named_parameters())
    for i in (0, 2, 4, 6):                                               # the names of its mm_projector
        expected = F.linear(F.gelu(expected) if i else expected, weights.pop(f'{i}.weight'), weights.pop(f'{i}.bias'))
    torch.testing.assert_close(ours(x), expected)
    assert not weights


def weights_along(n, m):
    """(m, n) float64: what torch documents of averages and of bilinear lines, a row for each output."""
    w = torch.zeros(m, n, dtype=torch.float64)
    for i in range(m):
        if m <= n:
            first, last = i * n // m, -(-(i + 1) * n // m)
            w[i, first:last] = 1 / (last - first)
        else:
            at = max((i + 0.5) * n / m - 0.5, 0)
            low = min(int(at), n - 1)
            w[i, low] += 1 - (at - int(at))
            w[i, min(low + 1, n - 1)] += at - int(at)
    return w


@pytest.mark.parametrize('n_token', [256, 512, 729, 1024, 1536, 36])
def test_pooling_keeps_rows_and_columns(n_token):
    h, w = token_grid(n_token)
    x = torch.randn(2, 729, 3, generator=torch.Generator().manual_seed(n_token))
    grid = x.double().view(2, 27, 27, 3)
    expected = torch.einsum('hi,wj,nijc->nhwc', weights_along(27, h), weights_along(27, w), grid).flatten(1, 2)
    torch.testing.assert_close(Pool(h, w)(x).double(), expected, atol=1e-5, rtol=1e-5)
    assert n_token != 729 or torch.equal(Pool(h, w)(x), x)


# --- how many tokens --------------------------------------------------------------------------------------------------

def test_grids_are_the_most_square_ones():
    expected = {1: (1, 1), 2: (1, 2), 4: (2, 2), 8: (2, 4), 9: (3, 3), 12: (3, 4), 36: (6, 6), 64: (8, 8),
                256: (16, 16), 512: (16, 32), 729: (27, 27), 1024: (32, 32), 1536: (32, 48)}
    assert {n: token_grid(n) for n in expected} == expected
    for n in (3, 7, 10, 731):
        with pytest.raises(UserError, match=f'image_tokens={n}: a grid of .* at best, expected h <= w <= 2 h; take a'):
            token_grid(n)


@pytest.mark.parametrize('keys, expected', [
    (dict(), dict(kind='mlp2')), (dict(projector='attn'), dict(kind='attn')), (dict(image_tokens=9), dict(kind='mlp2')),
    (dict(projector='perceiver'), dict(kind='perceiver', n_token=9)),
    (dict(projector='perceiver', image_tokens=7), dict(kind='perceiver', n_token=7)),
    (dict(token_mode='query', image_tokens=64), dict(kind='perceiver', n_token=64)),
    (dict(token_mode='query'), dict(kind='perceiver', n_token=9)),
    (dict(token_mode='pool', image_tokens=4), dict(kind='mlp2', n_token=4)),
    (dict(token_mode='pool', image_tokens=9, projector='linear'), dict(kind='linear')),
    (dict(token_mode='res', image_tokens=9, projector='mlp4'), dict(kind='mlp4'))])
def test_what_a_config_asks_for(keys, expected):
    assert projector_spec({**KEYS, **keys}, 9) == expected


@pytest.mark.parametrize('keys, n_given, message', [
    (dict(token_mode='query', projector='attn'), 9, "projector='attn', token_mode='query', image_tokens=0: a perceiver "),
    (dict(token_mode='pool', projector='perceiver', image_tokens=4), 9, "projector='perceiver', token_mode='pool', im"),
    (dict(token_mode='res', projector='perceiver', image_tokens=4), 9, "a perceiver makes its tokens by 'query', and no"),
    (dict(token_mode='pool'), 9, "token_mode='pool', image_tokens=0: give --image_tokens=N"),
    (dict(token_mode='res'), 9, "token_mode='res', image_tokens=0: give --image_tokens=N"),
    (dict(image_tokens=4), 9, 'the encoder gives 9; give --token_mode=pool, res or query'),
    (dict(token_mode='pool', image_tokens=7), 9, 'image_tokens=7: a grid of 1 x 7 at best'),
    (dict(token_mode='pool', image_tokens=4), 18, 'the encoder gives 18; give another encoder_fusion, or'),
    (dict(token_mode='res', image_tokens=4), 8, 'the encoder gives 8; give another encoder_fusion, or')])
def test_what_cannot_be_made_is_refused_in_one_line(keys, n_given, message):
    with pytest.raises(UserError, match=message) as caught:
        projector_spec({**KEYS, **keys}, n_given)
    assert '\n' not in str(caught.value)


SHAPE = dict(n_layer=2, n_head=2, n_embd=16, vocab_size=40, seq_len=64, n_ffn=24, encoder='patch', image_size=42)
IMAGE = 39
ARMS = {'linear': dict(projector='linear'), 'mlp4': dict(projector='mlp4'), 'attn': dict(projector='attn'),
        'perceiver': dict(projector='perceiver', image_tokens=7), 'query': dict(token_mode='query', image_tokens=2),
        'pool': dict(token_mode='pool', image_tokens=4), 'pool up': dict(token_mode='pool', image_tokens=12),
        'attn pool': dict(projector='attn', token_mode='pool', image_tokens=2),
        'res': dict(token_mode='res', image_tokens=36), 'res long': dict(token_mode='res', image_tokens=8)}


def model_of(arm, seed=3):
    spec = json.loads(json.dumps(vlm_spec({**SHAPE, **KEYS, **ARMS[arm]}, IMAGE, True)))
    model = build_vlm(spec, seed)
    return spec, model


@pytest.mark.parametrize('arm', ARMS)
def test_every_arm_trains_and_generates_as_it_reads(arm):
    spec, model = model_of(arm)
    n = model.n_token
    assert n == (ARMS[arm].get('image_tokens') or 9) and spec['projector'].get('n_token', model.encoder.n_token) == n
    h, w = {36: (84, 84), 8: (28, 56)}.get(n, (42, 42))
    g = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2, 3, h, w), generator=g, dtype=torch.uint8)
    tokens = torch.randint(0, IMAGE, (2, n + 5), generator=g)
    targets = tokens.roll(-1, 1)
    tokens[:, :n], targets[:, :n] = IMAGE, IGNORE_INDEX
    model(tokens, targets, images)[0].backward()
    for name, p in model.projector.named_parameters():
        assert p.grad is not None and p.grad.any(), name
    other = build_vlm(spec)
    other.load_state_dict(model.state_dict())                            # the spec alone rebuilds it
    model, other = model.eval(), other.eval()
    assert torch.equal(model(tokens, targets, images)[0], other(tokens, targets, images)[0])
    with pytest.raises(ValueError, match=f'expected a multiple of {n}|x {n} = '):
        model(tokens[:, 1:], targets[:, 1:], images)

    # generation, batched and with the cache, against a whole forward pass for every token
    with torch.no_grad():
        for p in other.decoder.parameters():
            p.mul_(1.5)                                                  # no near ties
        other.decoder.output.weight[IMAGE] = 0                           # and no image among what it writes
        prompts = [[IMAGE] * n + [5, 6], [IMAGE] * n + [7]]
        batched = other.generate(prompts, images, max_new_tokens=4)
        prefix = other.prefill_images(images)
        assert other.generate(prompts, prefix=prefix, max_new_tokens=4) == batched and prefix.k.shape[3] == n
        for i, ids in enumerate(prompts):
            for _ in range(4):
                x = other.decoder.trunk(other.embed(torch.tensor([ids]), images[i:i + 1]))
                ids = ids + [int(other.decoder.output(x[0, -1]).argmax())]
            assert ids[n + 2 - i:] == batched[i]


def test_initial_weights_follow_from_the_seed_and_mlp2s_are_as_they_were():
    torch.manual_seed(4)
    plain = Projector(588, 16).state_dict()
    default = build_vlm(vlm_spec({**SHAPE, **KEYS}, IMAGE, True), 3)
    assert vlm_spec({**SHAPE, **KEYS}, IMAGE, True)['projector'] == {'kind': 'mlp2'}         # as in old checkpoints
    _, pooled = model_of('pool')
    for name, value in plain.items():
        assert torch.equal(default.projector.state_dict()[name], value)
        assert torch.equal(pooled.projector.state_dict()[f'1.{name}'], value)
    _, a = model_of('perceiver')
    spec, b = model_of('perceiver')
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert not torch.equal(a.projector.latents, build_vlm(spec, 4).projector.latents)
    assert all(torch.equal(x, y) for x, y in zip(a.decoder.parameters(), default.decoder.parameters()))
    assert math.isclose(float(a.projector.latents.detach().std()), 0.02, rel_tol=0.1)
