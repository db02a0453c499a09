"""model.py: OpenLM's equations re-written in float64, its files and their damage, the VLM's slots and loss, generation."""
import json
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import checkpoint
import common
import decoder as decoder_module
import model as model_module
from kernels import IGNORE_INDEX
from errors import UserError
from conftest import child_env
from connectors import Projector
from decoder import Norm
from model import (VLM, Decoder, ModelConfig, build_vlm, load_openlm, openlm_moments, save_openlm,
                   vlm_spec)
from vision import PatchProjection, SigLIP, SigLIPConfig

IMAGE = 39                      # the last row of the tiny vocabulary
STATE = 'state_dict'


def tiny_decoder(seed=0, spread=1.0, **kw):
    """A decoder of random gains; spread > 1 sharpens its predictions, so that greedy tokens have no near ties."""
    torch.manual_seed(seed)
    shape = dict(n_layer=3, n_head=2, n_embd=16, vocab_size=40, seq_len=12, n_ffn=24)
    decoder = Decoder(ModelConfig(**{**shape, **kw}))
    with torch.no_grad():
        for name, p in decoder.named_parameters():
            p.add_(0.2 * torch.randn_like(p)) if p.dim() == 1 else p.mul_(spread)
    return decoder.eval()


class TinyEncoder(nn.Module):
    """Patches through one linear layer; counts its calls and the images it saw."""
    image_size, patch_size, n_token, width = 4, 2, 4, 6

    def __init__(self):
        super().__init__()
        self.patches, self.linear = PatchProjection(4, 2), nn.Linear(12, 6)
        self.calls, self.n_image, self.graph = 0, 0, None

    def forward(self, images):
        self.calls, self.n_image, self.graph = self.calls + 1, self.n_image + len(images), torch.is_grad_enabled()
        return self.linear(self.patches(images).to(self.linear.weight.dtype))


def tiny_vlm(seed=0, spread=1.0, z_loss=0.0, frozen=True, n_part=0, **kw):
    """n_part 1 or 5: the aspect of images is kept, and they are split."""
    decoder = tiny_decoder(seed, spread, **kw)
    encoder = TinyEncoder()
    model = VLM(decoder, encoder, Projector(6, 16), image_id=IMAGE, z_loss=z_loss, shortest=int(n_part > 0),
                split=n_part == 5).eval()
    with torch.no_grad():
        model.projector.fc2.weight.mul_(8)              # images weigh as much as words
    encoder.requires_grad_(not frozen)
    return model


def pictures(n, seed=0):
    return torch.randint(0, 256, (n, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def ragged(n, n_part=1, seed=0):
    """Images of 1 or 5 parts, each of 1 to 4 patches, as images.View gives them."""
    g = torch.Generator().manual_seed(seed)
    sizes = (2 * torch.randint(1, 3, (n, n_part, 2), generator=g)).tolist()
    return [[torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=g) for size in image] for image in sizes]


def random_batch(B, T, kept=0.5, seed=0, V=IMAGE):
    g = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(0, V, (2, B, T), generator=g)
    return tokens, targets.masked_fill(torch.rand(B, T, generator=g) > kept, IGNORE_INDEX)


def grads_of(model, *args, **kw):
    model.zero_grad(set_to_none=True)
    loss, weight, _ = model(*args, **kw)
    loss.backward()
    return loss.detach(), weight, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


# --- the decoder ----------------------------------------------------------------------------------------------------

def test_parameter_counts_are_the_papers():
    for shape, n_ffn, expected in [((8, 4, 512), 1536, 78_922_240), ((24, 16, 2048), 5632, 1_439_893_504),
                                   ((32, 32, 4096), 11008, 6_889_672_704), ((24, 8, 576), 1536, 153_705_024),
                                   ((24, 8, 1024), 2816, 411_665_408)]:
        with torch.device('meta'):
            decoder = Decoder(ModelConfig(*shape))
        assert (decoder.config.n_ffn, decoder.config.seq_len, decoder.config.vocab_size) == (n_ffn, 2048, 50432)
        assert sum(p.numel() for p in decoder.parameters()) == expected, shape
    with torch.device('meta'):
        plain = Decoder(ModelConfig(24, 16, 2048, qk_norm=False))
    assert sum(p.numel() for p in plain.parameters()) == 1_439_795_200             # 20 x this = stage 2's 28.8B tokens


def test_a_shape_without_a_whole_even_head_is_refused():
    for n_head, n_embd in [(3, 16), (16, 16), (0, 16)]:
        with pytest.raises(ValueError, match=f'n_head={n_head}: expected n_embd / n_head whole and even'):
            ModelConfig(2, n_head, n_embd)


def openlm_forward(state, tokens, n_head, freq, eps=1e-5):
    """OpenLM's equations from its checkpoint's tensors, one row and one head at a time, rotary as complex numbers."""
    w = {k: v.double() for k, v in state.items()}
    V, C = w['tok_embeddings.weight'].shape
    D = C // n_head
    n_layer = 1 + max(int(k.split('.')[1]) for k in w if k.startswith('layers.'))

    def norm(x, gain):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * gain

    def rotary(x):                                       # (T,D): dimension i pairs with i + D/2
        turn = torch.polar(torch.ones(len(x), D // 2, dtype=torch.float64),
                           torch.arange(len(x), dtype=torch.float64)[:, None] * freq.double())
        y = torch.complex(x[:, :D // 2], x[:, D // 2:]) * turn
        return torch.cat((y.real, y.imag), -1)

    logits = []
    for row in tokens:
        x = w['tok_embeddings.weight'][row]
        T = len(row)
        for i in range(n_layer):
            layer = {k.split('.', 2)[2]: v for k, v in w.items() if k.startswith(f'layers.{i}.')}
            y = norm(x, layer['attention_norm.weight'])
            q, k, v = (y @ layer['attention.in_proj.weight'][j * C:(j + 1) * C].T for j in range(3))
            if 'attention.q_norm.weight' in layer:       # over all heads together, before rotary
                q, k = norm(q, layer['attention.q_norm.weight']), norm(k, layer['attention.k_norm.weight'])
            heads = []
            for h in range(n_head):
                part = slice(h * D, (h + 1) * D)
                score = rotary(q[:, part]) @ rotary(k[:, part]).T / math.sqrt(D)
                score = score + torch.full((T, T), -math.inf, dtype=torch.float64).triu(1)
                heads.append(score.softmax(-1) @ v[:, part])
            x = x + torch.cat(heads, -1) @ layer['attention.out_proj.weight'].T
            both = norm(x, layer['ffn_norm.weight']) @ layer['feed_forward.w12.weight'].T
            gate, up = both[:, :both.shape[1] // 2], both[:, both.shape[1] // 2:]
            x = x + (gate * gate.sigmoid() * up) @ layer['feed_forward.w3.weight'].T
        logits.append(norm(x, w['norm.weight']) @ w['output.weight'].T)
    return torch.stack(logits)


@pytest.mark.parametrize('kw', [{}, dict(qk_norm=False), dict(n_head=1, n_layer=1), dict(n_head=4, norm_eps=1e-3)])
def test_forward_is_openlms(kw):
    decoder = tiny_decoder(1, spread=2.0, **kw).double()
    tokens, _ = random_batch(2, 20)                      # 20 > seq_len 12: longer rows are legal
    D = 16 // decoder.config.n_head
    freq = torch.tensor([10000.0 ** (-2 * i / D) for i in range(D // 2)])
    expected = openlm_forward(decoder.state_dict(), tokens, decoder.config.n_head, freq, decoder.config.norm_eps)
    # double() widens float32 frequencies, whose rounding is all that is left
    torch.testing.assert_close(decoder(tokens).double(), expected, atol=2e-6, rtol=1e-5)
    assert decoder.float()(tokens).dtype == torch.float32


def test_the_future_is_not_seen():
    decoder = tiny_decoder(2, spread=2.0)
    tokens, _ = random_batch(2, 10)
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 39
    before, after = decoder(tokens), decoder(changed)
    torch.testing.assert_close(after[:, :6], before[:, :6])
    assert ((after - before).abs().amax(-1)[:, 6:] > 1e-4).all()


def test_initialisation_is_openlms():
    torch.manual_seed(3)
    decoder = Decoder(ModelConfig(3, 4, 256, vocab_size=512))
    cut = 0.9866                                        # std of a unit normal cut at 3
    for name, p in decoder.state_dict().items():
        if name == 'inv_freq':
            continue
        if p.dim() == 1:
            assert (p == 1).all(), name
            continue
        std = 1 / math.sqrt(768 if 'w3' in name else 256)
        if 'out_proj' in name or 'w3' in name:          # residual outputs: by depth, counted from 1
            std /= math.sqrt(2 * (int(name.split('.')[1]) + 1))
        # 65,536 values at least: the std of the std is 0.28 %
        assert abs(float(p.std()) / (cut * std) - 1) < 0.015, (name, float(p.std()), cut * std)
        assert 2.9 * std < p.abs().max() <= 3 * std, name
        assert abs(float(p.mean())) < 0.02 * std, name


def test_initial_weights_follow_the_seed():
    a, b, c = (tiny_decoder(seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a['output.weight'], c['output.weight'])


def test_norm_runs_in_low_precision_under_autocast():
    torch.manual_seed(0)
    norm = Norm(64, 1e-5)
    nn.init.normal_(norm.weight)
    x = 3 * torch.randn(5, 64) + 1
    torch.testing.assert_close(norm(x), F.layer_norm(x, (64,), norm.weight, eps=1e-5), rtol=0, atol=0)
    low = F.layer_norm(x.bfloat16(), (64,), norm.weight.bfloat16(), eps=1e-5)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        y = norm(x)
        assert F.layer_norm(x, (64,)).dtype == torch.float32                  # what torch itself would do
    assert y.dtype == torch.bfloat16 and torch.equal(y, low)


def test_autocast_stays_near_float32():
    model = tiny_vlm(4)
    tokens, targets = random_batch(3, 9)
    tokens[0, :4] = IMAGE
    exact, n, _ = model(tokens, targets, pictures(1))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        low, _, _ = model(tokens, targets, pictures(1))
    low.backward()
    assert low.dtype == torch.float32 and abs(float((low - exact).detach()) / float(n)) < 0.05
    assert all(p.grad.dtype == torch.float32 for p in model.decoder.parameters())


def test_activation_checkpointing_changes_nothing():
    model = tiny_vlm(5)
    batch = random_batch(2, 8)
    plain = grads_of(model, *batch)
    model.decoder.activation_checkpointing = True
    again = grads_of(model, *batch)
    assert torch.equal(plain[0], again[0]) and plain[2].keys() == again[2].keys()
    for name, g in plain[2].items():
        torch.testing.assert_close(again[2][name], g, msg=name)


# --- the loss -------------------------------------------------------------------------------------------------------

def plain_loss(model, tokens, targets, weights=None):
    """The loss from full logits, and its weight: what the masked one must equal."""
    logits = model.decoder(tokens).double()
    keep = targets != IGNORE_INDEX
    weights = torch.ones_like(targets, dtype=torch.float64) if weights is None else weights.double()
    nll = F.cross_entropy(logits[keep], targets[keep], reduction='none')
    z = model.z_loss * logits[keep].logsumexp(-1).square()
    return (weights[keep] * (nll + z)).sum(), weights[keep].sum(), nll, z


def test_skipping_rows_without_loss_is_exact():
    model = tiny_vlm(6, z_loss=0.03).double()
    tokens, targets = random_batch(3, 7, kept=0.3)
    loss, weight, grads = grads_of(model, tokens, targets)
    model.zero_grad(set_to_none=True)
    x = model.decoder.trunk(model.embed(tokens))         # every row through every layer
    logits, keep = model.decoder.output(x)[targets != IGNORE_INDEX], targets[targets != IGNORE_INDEX]
    all_rows = F.cross_entropy(logits, keep, reduction='sum') + 0.03 * logits.logsumexp(-1).square().sum()
    all_rows.backward()
    # float64 throughout; the loss kernel's chunks only change the order of sums
    torch.testing.assert_close(loss, all_rows.detach(), rtol=1e-12, atol=1e-12)
    assert int(weight) == len(keep)
    for name, p in model.decoder.named_parameters():
        torch.testing.assert_close(grads[f'decoder.{name}'], p.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_given_rows_are_found_rows():
    model = tiny_vlm(6)
    tokens, targets = random_batch(3, 7)
    rows = (targets.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
    found, given = grads_of(model, tokens, targets), grads_of(model, tokens, targets, kept=rows)
    assert torch.equal(found[0], given[0])
    assert all(torch.equal(found[2][k], given[2][k]) for k in found[2])


def test_weights_and_z_loss():
    model = tiny_vlm(7, z_loss=0.01, spread=2.0)
    tokens, targets = random_batch(4, 6)
    weights = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) * 3
    for w in (None, weights):
        expected, n, nll, z = plain_loss(model, tokens, targets, w)
        loss, weight, row_loss = model(tokens, targets, weights=w)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(weight.double(), n, rtol=1e-6, atol=1e-6)
        # what is logged is the plain nats and z-loss of each row, whatever the weights
        per_row = torch.zeros(2, 4, dtype=torch.float64).index_add_(
            1, (targets != IGNORE_INDEX).nonzero()[:, 0], torch.stack((nll, z)))
        torch.testing.assert_close(row_loss.double(), per_row, rtol=1e-5, atol=1e-5)
    assert z.sum() > 0.1                                 # the term is really there


def test_a_batch_without_targets_costs_nothing():
    model = tiny_vlm(9, z_loss=0.1)
    tokens, targets = random_batch(2, 6)
    loss, weight, grads = grads_of(model, tokens, torch.full_like(targets, IGNORE_INDEX))
    assert loss == 0 and weight == 0 and (model(tokens, torch.full_like(targets, IGNORE_INDEX))[2] == 0).all()
    assert grads and all((g == 0).all() for g in grads.values())


def test_a_target_beyond_the_vocabulary_is_named():
    tokens, targets = random_batch(1, 4, kept=1)
    targets[0, 2] = 40
    with pytest.raises(ValueError, match='40, expected 0..39'):
        tiny_vlm()(tokens, targets)


# --- images in slots ------------------------------------------------------------------------------------------------

def rows_of(*rows):
    """Rows of ids where 'I' stands for an image's four slots, right-padded with 0."""
    flat = [[i for part in row for i in ([IMAGE] * 4 if part == 'I' else [part])] for row in rows]
    T = max(map(len, flat))
    return torch.tensor([row + [0] * (T - len(row)) for row in flat])


def test_images_fill_slots_in_reading_order():
    model = tiny_vlm(10)
    tokens = rows_of([1, 'I', 2, 'I'], [3, 4], ['I', 'I', 5])      # several, none, anywhere, side by side
    images = pictures(4)
    x = model.embed(tokens, images)
    expected = model.decoder.tok_embeddings(tokens).clone()
    for m, (row, start) in enumerate([(0, 1), (0, 6), (2, 0), (2, 4)]):
        expected[row, start:start + 4] = model.projector(model.encoder(images[m:m + 1]))[0]
    torch.testing.assert_close(x, expected)


def test_one_image_serves_several_slots():
    model = tiny_vlm(11)
    tokens, targets = rows_of(['I', 1, 2], ['I', 3], [4, 'I']), random_batch(3, 6, kept=1, seed=3)[1]
    images, index = pictures(2), torch.tensor([1, 0, 1])
    shared = grads_of(model, tokens, targets, images, index)
    assert model.encoder.n_image == 2 and model.encoder.calls == 1
    copied = grads_of(model, tokens, targets, images[index])
    torch.testing.assert_close(shared[0], copied[0])
    for name, g in copied[2].items():
        torch.testing.assert_close(shared[2][name], g, msg=name)


@pytest.mark.parametrize('n_part', [1, 5])
def test_images_of_different_sizes_fill_their_slots(n_part):
    model, images = tiny_vlm(13, n_part=n_part), ragged(4, n_part)
    sizes, index = model.slots(images), torch.tensor([2, 0, 1, 0, 3])
    assert sizes == [sum(part[0].numel() // 4 for part in image) for image in images] and len(set(sizes)) > 1
    rows = [[7], [IMAGE] * sizes[2] + [5] + [IMAGE] * sizes[0], [IMAGE] * (sizes[1] + sizes[0]) + [3],
            [8, 9] + [IMAGE] * sizes[3]]
    T = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (T - len(row)) for row in rows])
    expected = model.decoder.tok_embeddings(tokens).clone()
    expected[tokens == IMAGE] = torch.cat([model.projector(model.encoder(part[None]))[0]
                                           for i in index.tolist() for part in images[i]])
    model.encoder.calls = model.encoder.n_image = 0
    torch.testing.assert_close(model.embed(tokens, images, index), expected)
    parts = [part.shape for image in images for part in image]
    assert (model.encoder.calls, model.encoder.n_image) == (len(set(parts)), len(parts))
    targets = torch.zeros_like(tokens)
    shared = grads_of(model, tokens, targets, images, index)
    copied = grads_of(model, tokens, targets, [images[i] for i in index.tolist()])
    torch.testing.assert_close(shared[0], copied[0])
    for name, g in copied[2].items():
        torch.testing.assert_close(shared[2][name], g, msg=name)
    torn = tokens.clone()
    torn[1, 0], torn[3, 1] = 1, IMAGE                                    # the sum fits, the rows do not
    for row, which in ((torn, index), (tokens, index[:4]), (tokens, index.roll(1))):
        with pytest.raises(ValueError, match='image slots: expected whole images of'):
            model(row, targets, images, which)


def test_a_split_image_is_five():
    model, images = tiny_vlm(14), pictures(10)
    tokens = torch.tensor([[IMAGE] * 20 + [1, 2], [3] + [IMAGE] * 20 + [4]])
    expected = model.embed(tokens, images)
    model = VLM(model.decoder, model.encoder, model.projector, image_id=IMAGE, split=True)
    assert model.n_slot == 20
    assert torch.equal(model.embed(tokens, images.unflatten(0, (2, 5))), expected)


def test_slots_that_do_not_fit_are_named():
    model, targets = tiny_vlm(12), None
    short = rows_of(['I', 1, 2, 3], ['I', 4])
    targets = torch.zeros_like(short)
    cases = [(short, 1, r'rows hold \[4, 4\] image slots, 8 in all: expected 1 images x 4 = 4'),
             (short, 3, r'8 in all: expected 3 images x 4 = 12'),
             (short, 0, 'row 0 holds 4 image slots, got 0 images'),
             (torch.zeros_like(short), 1, '0 in all: expected 1 images')]
    torn = short.clone()
    torn[0, 3], torn[1, 5] = 1, IMAGE                    # 3 + 5 slots: the sum fits, the rows do not
    cases.append((torn, 2, 'row 0 holds 3 image slots: expected a multiple of 4'))
    for tokens, n, message in cases:
        with pytest.raises(ValueError, match=message):
            model(tokens, targets, pictures(n) if n else None)
    with pytest.raises(ValueError, match='text-only model'):
        VLM(tiny_decoder())(short, targets, pictures(2))


class Watch(TorchDispatchMode):
    """Collects the names of the operators that run, backward included."""
    def __init__(self):
        super().__init__()
        self.ran = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.ran.add(name)
        if name.startswith('index') and isinstance(args[1], (list, tuple)):
            self.ran |= {'nonzero' for i in args[1] if i is not None and i.dtype == torch.bool}         # inside it
            if args[3:4] == (True,) and any(len(i.unique()) < i.numel() for i in args[1] if i is not None):
                self.ran.add('unordered sum')            # on several threads its last bits differ from run to run
        return func(*args, **(kwargs or {}))


WAITS = {'_local_scalar_dense', 'item', 'nonzero', 'masked_select', 'masked_scatter_backward', '_unique2', 'equal'}


@pytest.mark.parametrize('frozen, image_mask, document_end', [(True, 'causal', None), (False, 'prefix', 1)])
def test_a_training_step_asks_the_device_for_nothing(frozen, image_mask, document_end, monkeypatch):
    """No operator of a step hands values or shapes to the host, so that on a GPU the loop runs ahead of the device."""
    monkeypatch.setattr(model_module, 'check_slots', lambda *_: None)     # reads values, on a CPU only
    model = masked_vlm(image_mask, document_end, 15, frozen=frozen)
    optimizer = common.make_optimizer(model, dict(decoder=1, projector=1, encoder=1), weight_decay=0.1,
                                      betas=(0.9, 0.95))
    tokens, targets = rows_of(['I', 1, 2], ['I', 3], [4, 'I']), random_batch(3, 6, kept=0.6, seed=3)[1]
    rows = (targets.flatten() != IGNORE_INDEX).nonzero()[:, 0]
    watch = Watch()
    with watch:
        loss, _, _ = model(tokens, targets, pictures(2), torch.tensor([1, 0, 1]), torch.rand(3, 6), rows)
        loss.backward()
        common.optimizer_step(optimizer, 1e-3, 1.0)
    assert {'linear_nll_backward', 'index_copy', '_fused_adamw_'} <= watch.ran, "the watch saw forward, backward, update"
    assert not watch.ran & {*WAITS, 'unordered sum'}


def test_a_batch_without_images_keeps_the_projector_in_the_graph():
    for frozen in (True, False):
        model = tiny_vlm(13, frozen=frozen)
        _, _, grads = grads_of(model, *random_batch(2, 6))
        assert model.encoder.calls == 0                  # and the encoder does not run
        idle = {k: g for k, g in grads.items() if not k.startswith('decoder.')}
        assert len(idle) == (4 if frozen else 6) and all((g == 0).all() for g in idle.values())
        text = VLM(model.decoder)
        assert torch.equal(text(*random_batch(2, 6))[0], model(*random_batch(2, 6))[0])


def test_noise_is_added_to_text_alone():
    model = tiny_vlm()
    tokens = torch.randint(0, IMAGE, (2, 9), generator=torch.Generator().manual_seed(1))
    tokens[:, 1:1 + model.encoder.n_token] = IMAGE
    noise = torch.randn(2, 9, model.decoder.config.n_embd)
    with torch.no_grad():
        x, y = (model.embed(tokens, pictures(2), noise=n) for n in (None, noise))
    there = (tokens != IMAGE)[..., None]
    assert torch.equal(y, torch.where(there, x + noise, x))


def test_a_frozen_encoder_builds_no_graph():
    tokens, targets = rows_of(['I', 1, 2], [3]), random_batch(2, 6, kept=1)[1]
    for frozen in (True, False):
        model = tiny_vlm(14, frozen=frozen)
        _, _, grads = grads_of(model, tokens, targets, pictures(1))
        assert model.encoder.graph is not frozen
        assert ('encoder.linear.weight' in grads) is not frozen
        assert grads['projector.fc1.weight'].abs().sum() > 0


def test_projector_is_the_papers():
    projector = Projector(1152, 2048)
    shapes = {k: tuple(v.shape) for k, v in projector.state_dict().items()}
    assert shapes == {'fc1.weight': (4608, 1152), 'fc1.bias': (4608,), 'fc2.weight': (2048, 4608), 'fc2.bias': (2048,)}
    x = torch.randn(2, 1152)
    h = F.linear(x, projector.fc1.weight, projector.fc1.bias)
    h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))      # exact gelu
    torch.testing.assert_close(projector(x), F.linear(h, projector.fc2.weight, projector.fc2.bias))


# --- who sees whom --------------------------------------------------------------------------------------------------

MASKS = [('prefix', None), ('causal', END := 7), ('prefix', END)]


def masked_vlm(image_mask, document_end, seed=30, **kw):
    model = tiny_vlm(seed, **kw)
    model.image_mask, model.document_end = image_mask, document_end
    return model


def visible(row, image_mask, document_end):
    """(T,T) bool of a list of ids, from the words of the keys: may position i see position j?"""
    document, image, n_image = [], [], 0
    for i, token in enumerate(row):
        document.append(row[:i].count(document_end))
        image.append(n_image // 4 if token == IMAGE else None)
        n_image += token == IMAGE
    together = lambda i, j: image_mask == 'prefix' and image[i] is not None and image[i] == image[j]
    return torch.tensor([[document[i] == document[j] and (j <= i or together(i, j)) for j in range(len(row))]
                         for i in range(len(row))])


# images that open a row, inside one, side by side, after an end-of-text; rows without images; ends in a row
ROWS = (['I', 1, END, 2, 3], ['I', 'I', 4, 5, END, 'I', 6], [1, 'I', 2, END], [3, END, END, 8, 9, 10, END, 11, 12], [1])


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('image_mask, document_end', MASKS)
def test_masks_are_a_table_of_who_sees_whom(image_mask, document_end, checkpointing, monkeypatch):
    """Loss and every gradient against softmax over such a table in float64."""
    model = masked_vlm(image_mask, document_end, frozen=False).double()
    model.decoder.activation_checkpointing = checkpointing
    tokens = rows_of(*ROWS)
    batch = tokens, random_batch(*tokens.shape, kept=0.8, seed=4)[1], pictures(5)
    ours = grads_of(model, *batch)
    table = torch.stack([visible(row, image_mask, document_end) for row in tokens.tolist()])[:, None]   # (B,1,T,T)

    def by_table(q, k, v, mask):
        return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~table, -torch.inf).softmax(-1) @ v
    causal = masked_vlm('causal', None, frozen=False).double()
    assert abs(causal(*batch)[0] - ours[0]) > 1e-3
    monkeypatch.setattr(decoder_module, 'attention', by_table)
    truth = grads_of(causal, *batch)
    torch.testing.assert_close(ours[0], truth[0], rtol=1e-6, atol=0)         # the loss itself adds up in float32
    assert ours[2].keys() == truth[2].keys()
    for name, g in truth[2].items():
        torch.testing.assert_close(ours[2][name], g, rtol=1e-5, atol=1e-6, msg=name)


@torch.no_grad()
def test_a_document_in_a_row_gives_what_it_gives_alone():
    """Though its rotary positions go on: scores depend on distances."""
    model = masked_vlm('causal', END).double()
    for row in ([3, END, END, 8, 9, 10, END, 11, 12], [1, 2, 3, 4], [END, 5], [5, 6, END]):
        tokens = torch.tensor([row])
        whole, at = model.decoder.trunk(model.embed(tokens), mask=model.intervals(tokens, False))[0], 0
        while at < len(row):
            end = row.index(END, at) + 1 if END in row[at:] else len(row)
            alone = model.decoder.trunk(model.embed(tokens[:, at:end]))[0]
            torch.testing.assert_close(whole[at:end], alone, rtol=0, atol=1e-6)      # inv_freq is float32
            at = end


def test_masks_that_are_off_cost_nothing_and_unknown_ones_are_refused():
    tokens = rows_of(*ROWS)
    assert masked_vlm('causal', None).intervals(tokens, True) is None
    assert masked_vlm('prefix', None).intervals(tokens, False) is None       # a batch without images
    spec = vlm_spec(dict(SHAPE, image_mask='prefix'), IMAGE, True, END)
    model = build_vlm(json.loads(json.dumps(spec)))
    assert (model.image_mask, model.document_end) == ('prefix', END)
    before = build_vlm({key: value for key, value in spec.items() if key not in ('image_mask', 'document_end')})
    assert (before.image_mask, before.document_end) == ('causal', None)
    with pytest.raises(UserError, match="image_mask='both': expected 'causal' or 'prefix'"):
        build_vlm({**spec, 'image_mask': 'both'})
    with pytest.raises(UserError, match="image_mask='prefix' and aspect='keep': give token_mode='query'"):
        build_vlm({**spec, 'view': {'shortest': 14}})


# --- a frozen encoder under autocast --------------------------------------------------------------------------------

@torch.no_grad()
def test_a_frozen_encoder_casts_its_weights_once_and_again_where_they_change():
    model, images, ran = tiny_vlm(31), pictures(3), []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ == '_to_copy' and isinstance(args[0], nn.Parameter):
                ran.append(args[0])
            return func(*args, **(kwargs or {}))

    def features():
        ran.clear()
        with Casts(), torch.autocast('cpu', torch.bfloat16):
            model.image_features(images)
            return model.encoder(images) if model.low[1] is None else model.low[1](images)
    own, before = {id(p) for p in model.encoder.parameters()}, model.state_dict()
    cast = lambda: len(own & {id(p) for p in ran})
    first = features()
    assert cast() == 2 and torch.equal(features(), first) and cast() == 0                   # linear: weight and bias
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(model.encoder(images), first)                     # autocast's own casts: the same bits
    assert before.keys() == model.state_dict().keys() and len(list(model.encoder.parameters())) == 2
    assert all(t.dtype == torch.float32 for t in model.state_dict().values())
    model.load_state_dict({**before, 'encoder.linear.bias': before['encoder.linear.bias'] + 1})
    assert not torch.equal(features(), first) and cast() == 2
    model.encoder.requires_grad_(True)
    with torch.autocast('cpu', torch.bfloat16), torch.enable_grad():
        low = model.low
        model.image_features(images).sum().backward()
    assert model.low is low and model.encoder.linear.weight.grad.dtype == torch.float32     # trained: its own weights


def test_compile_takes_the_blocks_of_decoder_and_encoder_lowered_or_not(monkeypatch):
    compiled, plain = [], nn.Module.compile
    monkeypatch.setattr(nn.Module, 'compile', lambda self, dynamic: (compiled.append(self), plain(
        self, dynamic=dynamic, backend='eager', fullgraph=True))[1])
    tower = SigLIP(SigLIPConfig(8, 12, 3, 2, 2, 4))
    model = VLM(tiny_decoder(), tower.requires_grad_(False), Projector(8, 16), image_id=IMAGE, image_mask='prefix')
    batch = rows_of(['I', 1, 2], ['I', 'I']), random_batch(2, 8, kept=1)[1], pictures(3)

    def both():
        with torch.autocast('cpu', torch.bfloat16):
            return grads_of(model, *batch), model(*batch)[0]
    expected = both()
    model.low = None, None
    model.compile_blocks()
    assert len(compiled) == 3 + 2
    (loss, _, grads), again = both()
    assert len(compiled) == 3 + 2 + 2 and {*model.low[1].encoder['layers']} <= {*compiled}
    assert torch.equal(loss, again) and torch.equal(loss, expected[0][0])
    for name, g in expected[0][2].items():
        torch.testing.assert_close(grads[name], g, msg=name)


# --- OpenLM's files -------------------------------------------------------------------------------------------------

def openlm_state(decoder):
    state = {k: v.clone() for k, v in decoder.state_dict().items() if k != 'inv_freq'}
    for i in range(decoder.config.n_layer):
        state[f'layers.{i}.attention.pos_embed.inv_freq'] = decoder.inv_freq.clone()
    return state


def same_decoder(a, b):
    return a.config == b.config and a.state_dict().keys() == b.state_dict().keys() and all(
        torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


@pytest.mark.parametrize('qk_norm', [True, False])
def test_save_and_load_round_trip(tmp_path, qk_norm):
    decoder = tiny_decoder(30, qk_norm=qk_norm, seq_len=2048)
    random_state = torch.get_rng_state()
    for name in ('epoch_1.pt', 'hf'):
        save_openlm(decoder, str(tmp_path / name))
        loaded = load_openlm(tmp_path / name)
        assert same_decoder(loaded, decoder), name
        assert not loaded.training and {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(torch.get_rng_state(), random_state)                  # reading a file draws no random numbers
    saved = torch.load(tmp_path / 'epoch_1.pt', weights_only=True)
    n = 9 if qk_norm else 7
    assert len(saved[STATE]) == n * 3 + 3 and 'epoch' in saved
    assert all(k.startswith('model.') for k in load_file(tmp_path / 'hf' / 'model.safetensors'))
    config = json.loads((tmp_path / 'hf' / 'config.json').read_text())
    assert (config['dim'], config['n_heads'], config['qk_norm'], config['model_type']) == (16, 2, qk_norm, 'openlm')


def test_every_layout_of_a_pt_file(tmp_path):
    decoder = tiny_decoder(31, seq_len=2048)
    state = openlm_state(decoder)
    path = str(tmp_path / 'epoch_3.pt')
    for prefix in ('', 'module.', '_orig_mod.', 'module._orig_mod.', '_orig_mod.module.', 'model.'):
        named = {prefix + k: v for k, v in state.items()}
        for content in (named, {'epoch': 3, 'name': 'x', 'state_dict': named, 'step': 9}):
            torch.save(content, path)
            assert same_decoder(load_openlm(path), decoder), prefix
    save_file(state, tmp_path / 'bare.safetensors')
    assert same_decoder(load_openlm(str(tmp_path / 'bare.safetensors')), decoder)
    torch.save({k: v.bfloat16() for k, v in state.items()}, path)            # lower precision becomes float32
    assert load_openlm(path).output.weight.dtype == torch.float32


OPENLM = dict(hidden_dim=16, n_layers=3, n_heads=2, seq_len=12, vocab_size=40, post_embed_norm=False, weight_tying=False)
HF = dict(architectures=['OpenLMModel'], model_type='openlm', params=None, hidden_size=16, num_hidden_layers=3,
          num_attention_heads=2, max_position_embeddings=12, vocab_size=40, torch_dtype='float32')
DCLM = dict(dim=16, n_layers=3, n_heads=2, seq_len=12, vocab_size=40, apply_qk_norm=True, qk_norm=True, norm_eps=1e-5,
            attn_name='auto', ffn_type='swiglu_torch', norm_type='gain_only_lp_layer_norm', params=None,
            model='open_lm_1b_swiglutorch', positional_embedding_type='rotary', weight_tying=False, moe_freq=0)
OLDER = dict(model_type='openlm', params_args_dict={
    **{k: v for k, v in DCLM.items() if k != 'norm_type'}, 'model_norm': 'gain_only_lp_layer_norm'})
OURS = dict(n_layer=3, n_head=2, n_embd=16, vocab_size=40, seq_len=12)


@pytest.mark.parametrize('config', [OPENLM, HF, DCLM, OLDER, OURS])
def test_every_config_spelling(tmp_path, config):
    decoder = tiny_decoder(32)
    state = openlm_state(decoder)
    torch.save(state, tmp_path / 'w.pt')
    (tmp_path / 'c.json').write_text(json.dumps(config))
    for given in (config, str(tmp_path / 'c.json'), tmp_path / 'c.json'):
        assert same_decoder(load_openlm(tmp_path / 'w.pt', given), decoder)
    folder = tmp_path / 'hf'                             # the folder's own config, in two shards
    folder.mkdir()
    names = sorted(state)
    where = {f'model.{k}': f'model-0000{1 + i % 2}-of-00002.safetensors' for i, k in enumerate(names)}
    for file in set(where.values()):
        save_file({k: state[k[6:]] for k in where if where[k] == file}, folder / file)
    (folder / 'model.safetensors.index.json').write_text(json.dumps(dict(metadata={}, weight_map=where)))
    (folder / 'config.json').write_text(json.dumps(config))
    assert same_decoder(load_openlm(folder), decoder)


def test_heads_without_a_table_come_from_the_config(tmp_path):
    decoder = tiny_decoder(33, n_head=4)
    state = {k: v for k, v in openlm_state(decoder).items() if 'inv_freq' not in k}
    torch.save(state, tmp_path / 'w.pt')
    with pytest.raises(ValueError, match=r'number of heads is unknown: give config=dict\(n_head='):
        load_openlm(tmp_path / 'w.pt')
    assert same_decoder(load_openlm(tmp_path / 'w.pt', dict(n_heads=4, seq_len=12)), decoder)


def test_rotary_comes_from_the_file(tmp_path):
    decoder = tiny_decoder(34, spread=2.0)
    exact = decoder.inv_freq.clone()
    rounded = exact.bfloat16()                           # a model trained in bf16 has only ever seen these
    assert not torch.equal(rounded.float(), exact)
    state = openlm_state(decoder)
    for i in range(3):
        state[f'layers.{i}.attention.pos_embed.inv_freq'] = rounded
    torch.save({STATE: state, 'epoch': 1}, tmp_path / 'w.pt')
    loaded = load_openlm(tmp_path / 'w.pt', dict(seq_len=12))
    assert loaded.inv_freq.dtype == torch.float32 and torch.equal(loaded.inv_freq, rounded.float())
    tokens, _ = random_batch(1, 64)
    expected = openlm_forward(decoder.state_dict(), tokens, 2, rounded)
    torch.testing.assert_close(loaded(tokens).double(), expected, atol=1e-4, rtol=1e-4)
    assert (decoder(tokens) - loaded(tokens)).abs().max() > 1e-3             # and it matters
    save_openlm(loaded, str(tmp_path / 'again.pt'))
    assert torch.equal(load_openlm(tmp_path / 'again.pt').inv_freq, rounded.float())


# --- files as OpenLM and TRI write them, by hand ----------------------------------------------------------------------

def released_state(n_layer=3, C=16, hidden=24, V=40, head=8, seed=0, dtype=torch.float32):
    """The tensors of an OpenLM checkpoint in its own order, random; the rotary table rounded as bf16 training has it."""
    torch.manual_seed(seed)
    inv_freq = (10000.0 ** (-torch.arange(0, head, 2) / head)).bfloat16()
    layer = {'attention.in_proj.weight': (3 * C, C), 'attention.out_proj.weight': (C, C),
             'attention.pos_embed.inv_freq': (head // 2,), 'attention.q_norm.weight': (C,),
             'attention.k_norm.weight': (C,), 'feed_forward.w12.weight': (2 * hidden, C),
             'feed_forward.w3.weight': (C, hidden), 'attention_norm.weight': (C,), 'ffn_norm.weight': (C,)}
    layers = {f'layers.{i}.{k}': v for i in range(n_layer) for k, v in layer.items()}
    shapes = {'tok_embeddings.weight': (V, C), **layers, 'norm.weight': (C,), 'output.weight': (V, C)}
    return {k: (inv_freq.clone() if k.endswith('inv_freq') else torch.randn(shape) / 3).to(dtype)
            for k, shape in shapes.items()}


def write_released(folder, state, config, n_shard=2):
    """A folder as on the Hub: shards, their index, config.json."""
    folder.mkdir(exist_ok=True)
    names = [f'model-{i + 1:05d}-of-{n_shard:05d}.safetensors' for i in range(n_shard)]
    where = {f'model.{k}': names[i * n_shard // len(state)] for i, k in enumerate(sorted(state))}
    for name in names:
        save_file({k: state[k[6:]] for k in where if where[k] == name}, folder / name, metadata={'format': 'pt'})
    size = sum(v.numel() * v.element_size() for v in state.values())
    index = dict(metadata={'total_size': size}, weight_map=where)
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
    (folder / 'config.json').write_text(json.dumps(config))
    return folder


def write_epoch(path, state, prefix=''):
    """epoch_N.pt as open_lm/main.py writes it."""
    torch.save({'epoch': 80, 'name': 'run', 'state_dict': {prefix + k: v for k, v in state.items()}, 'step': 9,
                'evaluation_metrics': [{'loss': 2.5, 'val_data': ['x']}], 'next_shard_per_source': [3, 4],
                'samples_seen': 99, 'shard_shuffle_seed': 124}, path)
    return path


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('layout', ['new', 'older', 'module._orig_mod.', '_orig_mod.module.'])
def test_released_layouts_compute_what_their_tensors_say_and_go_out_as_they_came(tmp_path, layout, dtype):
    state = released_state(dtype=dtype)
    if layout in ('new', 'older'):
        path = write_released(tmp_path / 'in', state, DCLM if layout == 'new' else OLDER)
    else:
        path = write_epoch(tmp_path / 'epoch_80.pt', state, layout)
    decoder = load_openlm(path)
    assert decoder.output.weight.dtype == torch.float32 and decoder.config.n_head == 2
    assert decoder.config.seq_len == (12 if layout in ('new', 'older') else 2048)
    tokens, _ = random_batch(2, 30)
    expected = openlm_forward(state, tokens, 2, state['layers.0.attention.pos_embed.inv_freq'])
    # float32 against float64, logits of size 5
    torch.testing.assert_close(decoder(tokens).double(), expected, atol=1e-4, rtol=1e-4)
    save_openlm(decoder, tmp_path / 'epoch_0.pt')
    save_openlm(decoder, tmp_path / 'out')
    again = torch.load(tmp_path / 'epoch_0.pt', weights_only=True)
    hf = load_file(tmp_path / 'out' / 'model.safetensors')
    assert set(again[STATE]) == set(state) and set(hf) == {f'model.{k}' for k in state}
    for k, v in state.items():
        assert torch.equal(again[STATE][k], v.float()) and torch.equal(hf[f'model.{k}'], v.float()), k
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    same = ('dim', 'n_layers', 'n_heads', 'vocab_size', 'norm_eps', 'qk_norm', 'apply_qk_norm', 'norm_type', 'ffn_type',
            'positional_embedding_type', 'weight_tying')                     # apply_qk_norm is what open_lm's class reads
    assert {k: config[k] for k in same} == {k: DCLM[k] for k in same}
    assert sorted(os.listdir(tmp_path / 'out')) == ['config.json', 'model.safetensors']      # no temporary name is left


def test_loading_into_a_decoder_takes_what_the_file_does_not_say_and_names_what_differs(tmp_path):
    state = {k: v for k, v in released_state(head=4).items() if 'inv_freq' not in k}
    path = write_epoch(tmp_path / 'epoch_80.pt', state)
    mine = tiny_decoder(3, n_head=4).train()
    assert load_openlm(path, into=mine) is mine and mine.training
    assert torch.equal(mine.output.weight, state['output.weight'])
    assert torch.equal(mine.inv_freq, tiny_decoder(4, n_head=4).inv_freq)
    before = mine.output.weight.clone()
    for change, words in ((dict(n_layer=2), 'n_layer=3, this run.s has 2'),
                          (dict(vocab_size=41), 'vocab_size=40, .* 41')):
        with pytest.raises(UserError, match=f'epoch_80.pt has a decoder with {words}'):
            load_openlm(path, into=tiny_decoder(3, n_head=4, **change))
    assert torch.equal(mine.output.weight, before)


SLACK = 16 << 20                # interpreter, headers of files, the sampling thread's stack


def test_loading_holds_the_model_and_its_largest_tensor(tmp_path):
    """
    Peak anonymous memory of a forked child for a decoder of 219 MB. A file's mapped pages are left out: they are the
    page cache's, given back without writing when memory is short; VmHWM and maxrss would count them. RssAnon has no
    high-water mark, so a thread samples it each millisecond; a copy of the largest tensor, 33 MB, takes longer to write.
    """
    with torch.device('meta'):
        like = released_state(12, 512, 1408, 16000, 64)
    state = {k: torch.full(v.shape, 1.0 if 'inv_freq' in k else i + 1.0) for i, (k, v) in enumerate(like.items())}
    write_epoch(tmp_path / 'epoch_1.pt', state, 'module.')
    write_released(tmp_path / 'shards', {k: v.bfloat16() for k, v in state.items()},
                   dict(DCLM, dim=512, n_layers=12, n_heads=8, vocab_size=16000))
    n = sum(v.numel() for k, v in state.items() if 'inv_freq' not in k)
    names = list(state)
    code = f'''
import os, sys, threading, time
sys.path.insert(0, {os.path.dirname(os.path.dirname(os.path.abspath(__file__)))!r})
import torch
from model import Decoder, ModelConfig, load_openlm
names = {names!r}
def anonymous():
    return int(next(line for line in open('/proc/self/status') if line.startswith('RssAnon')).split()[1]) << 10
with torch.device('meta'):                           # the first module to leave the meta device imports sympy
    Decoder(ModelConfig(1, 2, 8, 8)).to_empty(device='cpu')
for path in sys.argv[1:]:
    for into in (False, True):
        if os.fork():
            assert os.wait()[1] == 0
            continue
        mine = None
        if into:
            with torch.device('meta'):
                mine = Decoder(ModelConfig(12, 8, 512, 16000, n_ffn=1408))
            mine.to_empty(device='cpu')
            with torch.no_grad():
                [p.zero_() for p in mine.parameters()]
        peak, before, done = 0, anonymous(), threading.Event()
        def sample():
            global peak
            while not done.is_set():
                peak = max(peak, anonymous())
                time.sleep(1e-3)
        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        model = load_openlm(path, into=mine)
        done.set(); thread.join()
        for k, p in model.named_parameters():
            assert torch.aminmax(p) == (names.index(k) + 1, names.index(k) + 1), k
        print(os.path.basename(path), into, max(peak, anonymous()) - before, flush=True)
        os._exit(0)
'''
    paths = [str(tmp_path / name) for name in ('epoch_1.pt', 'shards')]
    done = subprocess.run([sys.executable, '-c', code, *paths], env=child_env(), capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 4
    for name, into, peak in lines:
        limit = (0 if into == 'True' else 4 * n) + 4 * 16000 * 512 + SLACK
        assert int(peak) <= limit, f"{name}, into={into}: {int(peak):,} bytes above the start, limit {limit:,}"


class OpenLMShape(nn.Module):
    """The modules of OpenLM in the order in which it registers them: what its optimizer counts parameters by."""
    def __init__(self, state):
        super().__init__()
        for name, value in state.items():
            *path, leaf = name.split('.')
            module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            if leaf == 'inv_freq':
                module.register_buffer(leaf, value)
            else:
                module.register_parameter(leaf, nn.Parameter(value))


def openlm_adamw(state, lr=7e-4):
    """(model, AdamW) after two steps on random gradients, grouped as open_lm/main.py groups."""
    model = OpenLMShape(state)
    assert list(model.state_dict()) == list(state)
    optimizer = torch.optim.AdamW([dict(params=[], weight_decay=0.0),
                                   dict(params=list(model.parameters()), weight_decay=0.01)], lr=lr, betas=(0.9, 0.95))
    g = torch.Generator().manual_seed(4)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=g)
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize('kind', ['by position', 'by name', 'by name, bfloat16'])
def test_openlms_moments_come_by_name(tmp_path, kind):
    model, optimizer = openlm_adamw(released_state())
    saved = optimizer.state_dict()
    if kind != 'by position':                            # as FSDP.optim_state_dict gives them
        names = [f'_orig_mod.{name}' for name, _ in model.named_parameters()]
        low = (lambda v: v) if kind == 'by name' else (lambda v: v.bfloat16() if v.ndim else v)
        saved['state'] = {names[i]: {k: low(v) for k, v in m.items()} for i, m in reversed(saved['state'].items())}
        saved['param_groups'][1]['params'] = names
    prefix = 'module.' if kind == 'by position' else ''
    path = write_epoch(tmp_path / 'epoch_80.pt', {k: v.detach() for k, v in model.state_dict().items()}, prefix)
    torch.save({'epoch': 80, 'name': 'run', 'optimizer': saved, 'evaluation_metrics': []}, tmp_path / 'optimizer_80.pt')
    file, moments, lr = openlm_moments(str(path))
    assert file == str(tmp_path / 'optimizer_80.pt') and lr == 7e-4
    vlm = VLM(load_openlm(path), image_id=IMAGE)
    ours = common.make_optimizer(vlm, dict(decoder=1.0), weight_decay=0.0, betas=(0.9, 0.95))
    assert checkpoint.load_moments(ours, moments) == []
    for name, p in model.named_parameters():
        mine = ours.state[vlm.decoder.get_parameter(name)]
        for key, value in optimizer.state[p].items():
            expected = value.bfloat16().float() if 'bfloat16' in kind and value.ndim else value
            assert mine[key].dtype == torch.float32 and torch.equal(mine[key], expected), (name, key)
    for p in vlm.parameters():
        p.grad = torch.ones_like(p)
    common.optimizer_step(ours, 1e-3, 0.0)               # the fused kernel takes them
    assert all(state['step'] == 3 for state in ours.state.values())


@pytest.mark.parametrize('case, words', [
    ('groups', '2 groups, 2 parameters in the first, expected one of the 27 of .*epoch_80.pt; move it away'),
    ('frozen', '1 groups, 26 parameters in the first, expected one of the 27'),
    ('empty', 'not readable as .*move it away'),
    ('no dict', 'not readable as .*move it away'), ('cut', 'not readable as'), ('lr', "'lr' is -1.0, expected from 0"),
    ('order', r'decoder.layers.0.attention.in_proj.weight are .*\(40, 16\).*expected floats of shapes .*\(48, 16\)'),
    ('nan', 'moments of decoder.norm.weight hold values that are not finite')])
def test_moments_of_another_layout_are_refused_in_one_line(tmp_path, case, words):
    model, optimizer = openlm_adamw(released_state())
    saved = optimizer.state_dict()
    group = saved['param_groups'][1]
    state = {k: v.detach() for k, v in model.state_dict().items()}
    if case == 'groups':
        saved['param_groups'][0]['params'] = [group['params'].pop(), group['params'].pop()]
    elif case == 'frozen':
        group['params'].pop()
    elif case == 'order':
        state = {k: state[k] for k in sorted(state)}
    elif case == 'lr':
        group['lr'] = -1.0
    elif case == 'nan':
        names = [k for k, _ in model.named_parameters()]
        saved['state'][names.index('norm.weight')]['exp_avg'][3] = math.nan
    path, file = write_epoch(tmp_path / 'epoch_80.pt', state), tmp_path / 'optimizer_80.pt'
    torch.save({'empty': {}, 'no dict': [saved]}.get(case, {'optimizer': saved}), file)
    if case == 'cut':
        file.write_bytes(file.read_bytes()[:-900])
    vlm = VLM(load_openlm(path), image_id=IMAGE)
    ours = common.make_optimizer(vlm, dict(decoder=1.0), weight_decay=0.0, betas=(0.9, 0.95))
    with pytest.raises(UserError, match=words) as caught:
        _, moments, _ = openlm_moments(str(path))
        checkpoint.load_moments(ours, moments)
    assert '\n' not in str(caught.value)


def test_no_moments_without_their_file(tmp_path):
    path = write_epoch(tmp_path / 'epoch_80.pt', released_state())
    assert openlm_moments(str(path)) == openlm_moments(str(tmp_path)) == openlm_moments('gone.pt') == ('', {}, 0.0)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('value', [math.nan, math.inf])
@pytest.mark.parametrize('layout', ['pt', 'folder'])
def test_a_weight_that_is_not_finite_is_named(tmp_path, layout, value, dtype):
    state = released_state(dtype=dtype)
    state['layers.1.feed_forward.w3.weight'][5, 7] = value
    pt = layout == 'pt'
    path = write_epoch(tmp_path / 'epoch_1.pt', state) if pt else write_released(tmp_path / 'a', state, DCLM)
    with pytest.raises(UserError, match='(epoch_1.pt|of-00002.safetensors): layers.1.feed_forward.w3.weight holds '
                                        'values that are not finite'):
        load_openlm(path)


class Evil:
    def __reduce__(self):
        return os.getenv, ('HOME',)


def damage(case, folder):
    """Write a damaged checkpoint for a case; returns (path, config)."""
    state, config, path = openlm_state(tiny_decoder(35)), None, folder / 'w.pt'
    whole = folder / 'whole.pt'
    torch.save({STATE: state}, whole)
    if case == 'missing file':
        return path, None
    if case in ('garbage', 'cut', 'empty'):
        data = whole.read_bytes()
        path.write_bytes({'garbage': b'not a checkpoint\n' * 9, 'cut': data[:len(data) // 2], 'empty': b''}[case])
        return path, None
    if case == 'code':
        torch.save({STATE: {**state, 'norm.weight': Evil()}}, path)
        return path, None
    if case in ('cut safetensors', 'missing safetensors'):
        path = folder / 'w.safetensors'
        if case == 'cut safetensors':
            save_file(state, path)
            path.write_bytes(path.read_bytes()[:-100])
        return path, None
    if case.startswith('hf '):
        save_openlm(tiny_decoder(35), str(folder / 'hf'))
        index = folder / 'hf' / 'model.safetensors.index.json'
        if case == 'hf no weights':
            (folder / 'hf' / 'model.safetensors').unlink()
        elif case == 'hf config':
            (folder / 'hf' / 'config.json').write_text('{"dim": 16,')
        elif case == 'hf config list':
            (folder / 'hf' / 'config.json').write_text('[1]')
        else:
            (folder / 'hf' / 'model.safetensors').unlink()
            index.write_text(json.dumps({'hf outside': {'weight_map': {'a': '../w.safetensors'}}, 'hf map': {'map': 1},
                                         'hf shard': {'weight_map': {'a': 'model-1.safetensors'}}}[case]))
        return folder / 'hf', None
    if case == 'a list':
        state = [state]
    elif case == 'not tensors':
        state['norm.weight'] = 'x'
    elif case == 'missing tensor':
        del state['layers.1.attention.k_norm.weight']
    elif case == 'extra tensor':
        state['layers.1.attention.in_proj.bias'] = torch.zeros(48)
    elif case == 'shape':
        state['layers.2.ffn_norm.weight'] = torch.zeros(15)
    elif case == 'tables differ':
        state['layers.1.attention.pos_embed.inv_freq'] = torch.ones(4)
    elif case == 'another model':
        state = {'transformer.wte.weight': torch.zeros(4, 4)}
    elif case == 'one dimension':
        state['layers.0.feed_forward.w3.weight'] = torch.zeros(4)
    else:
        config = {'layers': dict(OPENLM, n_layers=4), 'heads': dict(n_heads=4), 'no qk': dict(qk_norm=False),
                  'tied': dict(OPENLM, weight_tying=True), 'embed norm': dict(OPENLM, post_embed_norm=True),
                  'rms': dict(DCLM, norm_type='rms_norm'), 'no config': str(folder / 'none.json'),
                  'head rotary': dict(DCLM, positional_embedding_type='head_rotary')}[case]
    torch.save(state, path)
    return path, config


@pytest.mark.parametrize('case, message', [
    ('missing file', 'w.pt: no such file'), ('garbage', 'w.pt: not readable'), ('cut', 'w.pt: not readable'),
    ('empty', 'w.pt: not readable'), ('code', 'w.pt: not readable as a .pt file: damaged, or it holds more'),
    ('cut safetensors', 'w.safetensors: not readable'), ('missing safetensors', 'w.safetensors: no such file'),
    ('a list', 'expected a dict of tensors'), ('not tensors', 'expected a dict of tensors'),
    ('missing tensor', 'lacks layers.1.attention.k_norm.weight'),
    ('extra tensor', 'holds layers.1.attention.in_proj.bias, which this model does not have'),
    ('shape', r'layers.2.ffn_norm.weight is \(15,\), this model.s is \(16,\)'),
    ('tables differ', 'layers have different rotary frequencies'),
    ('another model', "not an OpenLM checkpoint .*it has .'transformer.wte.weight'"),
    ('one dimension', 'not an OpenLM checkpoint'),
    ('layers', 'config says n_layer=4, the tensors say 3'), ('heads', 'config says n_head=4, the tensors say 2'),
    ('no qk', 'config says qk_norm=False, the tensors say True'), ('tied', 'weight_tying=True'),
    ('embed norm', 'post_embed_norm=True'), ('rms', 'norm rms_norm: expected gain_only_lp_layer_norm'),
    ('head rotary', 'positional_embedding_type=head_rotary: expected rotary'), ('no config', 'none.json: not readable'),
    ('hf no weights', 'model.safetensors: no such file'), ('hf config', 'config.json: not readable as JSON'),
    ('hf config list', 'config.json: expected a JSON object, found list'), ('hf outside', 'names ../w.safetensors, a file outside its folder'),
    ('hf map', "expected a JSON object with one in 'weight_map'"), ('hf shard', 'model-1.safetensors: no such file')])
def test_a_damaged_checkpoint_is_named_in_one_line(tmp_path, case, message):
    path, config = damage(case, tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load_openlm(path, config)
    assert '\n' not in str(caught.value)


# --- build_vlm ------------------------------------------------------------------------------------------------------

SHAPE = dict(n_layer=2, n_head=2, n_embd=16, vocab_size=40, seq_len=12, n_ffn=24, encoder='patch', image_size=28,
             projector='mlp2', token_mode='', image_tokens=0)


def test_a_model_is_rebuilt_from_its_description():
    for images in (False, True):
        spec = json.loads(json.dumps(vlm_spec(SHAPE, IMAGE, images)))
        a, b = build_vlm(spec, seed=3), build_vlm(spec)
        assert (a.projector is None) == (not images) and a.image_id == b.image_id == IMAGE
        b.load_state_dict(a.state_dict())
        tokens, targets = random_batch(2, 6)
        assert torch.equal(a(tokens, targets)[0], b(tokens, targets)[0])
        assert a.encoder is None or a.encoder.spec() == spec['encoder'] == b.encoder.spec()


def test_initial_weights_follow_from_the_seed_alone():
    small = build_vlm(vlm_spec(SHAPE, 38, True), seed=3)
    deeper = build_vlm(vlm_spec(dict(SHAPE, n_layer=3), 38, True), seed=3)
    text = build_vlm(vlm_spec(SHAPE, 38, False), seed=3)
    for key, value in small.projector.state_dict().items():
        assert torch.equal(value, deeper.projector.state_dict()[key])
    assert same_decoder(small.decoder, text.decoder)
    torch.manual_seed(3)
    assert same_decoder(text.decoder, Decoder(text.decoder.config))


@pytest.mark.parametrize('change', [dict(decoder=None), dict(decoder={'depth': 3}), dict(encoder={'kind': 'eye'}),
                                    dict(projector={'kind': 'mlp9'}), dict(projector=None)])
def test_what_is_no_description_is_refused_in_one_line(change):
    spec = vlm_spec(SHAPE, 38, True)
    with pytest.raises(UserError) as caught:
        build_vlm({**spec, **change})
    assert '\n' not in str(caught.value)
