"""adapters.py: LoRA and DoRA against their formulas and peft, what trains, merging, whole runs with adapters."""
import copy
import json
import os
import shutil
import signal
import sys

import pytest
import torch
from conftest import meta_of, mix, same_weights, steps
from safetensors import safe_open
from safetensors.torch import load_file
from test_finetune import chat
from test_pretrain import KILL, equal, tensors

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import checkpoint
import common
import loss
from adapters import AdaptedLinear, adapter_spec, add_adapters, merge_adapters, set_trained
from errors import UserError
from model import build_vlm
from vision import SigLIP, SigLIPConfig

TOWER = SigLIP(SigLIPConfig(16, 32, 2, 2, 14, 28)).spec()
VARIANTS = pytest.mark.parametrize('dora, rslora', [(False, False), (False, True), (True, False), (True, True)])


def spec_of(images=True):
    return dict(decoder=dict(n_layer=2, n_head=2, n_embd=32, n_ffn=48, vocab_size=60, seq_len=32), image_id=59,
                encoder=TOWER if images else None, projector=dict(kind='mlp2') if images else None)


def asked(**changed):
    return dict(rank=4, alpha=6.0, rslora=False, dora=False, on='decoder', base='') | changed


def adapted(seed=0, spread=0.3, images=True, **changed):
    """A VLM with adapters that have learned something: B and the magnitudes are random, not at their start."""
    model = build_vlm(spec_of(images), seed)
    torch.manual_seed(seed + 4)
    add_adapters(model, asked(**changed))
    g = torch.Generator().manual_seed(seed + 99)
    for name, p in model.named_parameters():
        if name.endswith('.lora_B'):
            p.data.normal_(generator=g).mul_(spread)
        if name.endswith('.magnitude'):
            p.data.mul_(1 + spread * torch.rand(p.shape, generator=g, dtype=p.dtype))
    return model


def batch_of(seed=0, images=True):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 59, (3, 20), generator=g)
    targets = torch.randint(0, 59, (3, 20), generator=g)
    if not images:
        return tokens, targets, None
    tokens[:2, :4] = 59
    return tokens, targets, torch.randint(0, 256, (2, 3, 28, 28), generator=g, dtype=torch.uint8)


# --- the formulas ---

@VARIANTS
@pytest.mark.parametrize('bias', [True, False])
def test_output_and_gradients_are_the_formulas(dora, rslora, bias):
    torch.manual_seed(1)
    plain = torch.nn.Linear(7, 5, bias=bias).double()
    W, b = plain.weight.detach().clone(), plain.bias.detach().clone() if bias else 0
    s = 6 / 3 ** 0.5 if rslora else 6 / 3
    layer = AdaptedLinear(plain, 3, s, dora)
    assert torch.equal(layer(x := torch.randn(4, 2, 7).double()), plain(x)) or dora and bias
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-14, atol=1e-14)
    assert not layer.lora_B.any() and layer.lora_A.abs().max() <= 7 ** -0.5
    layer.lora_B.data.normal_()
    if dora:
        assert torch.equal(layer.magnitude, W.norm(dim=1))               # one an output, over the inputs
        layer.magnitude.data.mul_(torch.rand(5) + 0.5)
    A, B = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    V, m = W + s * B @ A, None
    if dora:
        m = layer.magnitude.detach().clone().requires_grad_()
        V = (m / V.detach().norm(dim=1))[:, None] * V                    # no gradient through the norm
    expected, seen = x @ V.T + b, torch.randn(4, 2, 5).double()
    (expected * seen).sum().backward()
    (layer(x) * seen).sum().backward()
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    for ours, truth in ((layer.lora_A, A), (layer.lora_B, B), (layer.magnitude, m)):
        assert ours is truth or torch.allclose(ours.grad, truth.grad, rtol=1e-12, atol=1e-12)
    inside = torch.nn.Sequential(layer)
    merge_adapters(inside)
    torch.testing.assert_close(inside[0].weight, V, rtol=1e-12, atol=1e-12)
    assert inside[0].bias is plain.bias and inside[0].weight is plain.weight and inside[0].in_features == 7


@VARIANTS
def test_a_model_with_adapters_is_pefts(dora, rslora):
    peft = pytest.importorskip('peft')
    ours, theirs = adapted(dora=dora, rslora=rslora, on='both'), build_vlm(spec_of(), 0)
    for part in (theirs.decoder.layers, theirs.encoder):
        peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, use_dora=dora, lora_dropout=0.0,
                                                     target_modules=r'.*(in_proj|out_proj|w12|w3|[qkv]_proj|fc1|fc2)'), part)
    names = {'lora_A.default.weight': 'lora_A', 'lora_B.default.weight': 'lora_B',
             'lora_magnitude_vector.default.weight': 'magnitude', 'base_layer.weight': 'weight', 'base_layer.bias': 'bias'}

    def our_name(name):
        for end, mine in names.items():
            name = name.removesuffix(end) + mine if name.endswith(end) else name
        return name
    mine, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert {our_name(name) for name in other} == mine.keys()             # the same layers, the same shapes
    for name, p in other.items():
        p.data.copy_(mine[our_name(name)])
    set_trained(ours, 'encoder')
    tokens, targets, images = batch_of()
    losses = []
    for model in (ours, theirs):
        loss, _, _ = model(tokens, targets, images)
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    seen = [name for name in other if other[name].grad is not None and 'lora' in name]
    assert len(seen) == (2 + dora) * (2 * 4 + 6)                          # one of the encoder's two blocks runs
    for name in seen:
        error = mine[our_name(name)].grad - other[name].grad             # 4e-6 seen: float32, in another order
        assert error.norm() <= 3e-5 * other[name].grad.norm(), name
    for name, layer in theirs.named_modules():
        if hasattr(layer, 'merge') and hasattr(layer, 'base_layer'):
            layer.merge()
    merge_adapters(ours)
    merged, mine = dict(theirs.named_parameters()), dict(ours.named_parameters())
    for name, p in mine.items():
        end, start = name.rsplit('.', 1)[1], name.rsplit('.', 1)[0]
        torch.testing.assert_close(p, merged.get(f'{start}.base_layer.{end}', merged.get(name)), rtol=1e-5, atol=1e-6)


@VARIANTS
def test_fresh_adapters_change_nothing_and_leave_the_base_its_names_and_bits(dora, rslora):
    plain, tokens = build_vlm(spec_of(), 3), batch_of()[0][2:]
    names = set(plain.state_dict())
    before = plain.decoder(tokens), plain.image_features(batch_of()[2])
    together = build_vlm(spec_of() | dict(adapters=asked(dora=dora, rslora=rslora, on='both')), 3)
    assert equal(plain.state_dict(), {k: v for k, v in together.state_dict().items() if k in names})
    add_adapters(plain, asked(dora=dora, rslora=rslora, on='both'))
    assert plain.state_dict().keys() == together.state_dict().keys()
    assert torch.equal(plain.decoder(tokens), before[0])                 # exactly: no bias there
    torch.testing.assert_close(plain.image_features(batch_of()[2]), before[1], rtol=1e-5, atol=1e-6)
    new = set(plain.state_dict()) - names
    assert {name.rsplit('.', 1)[1] for name in new} == {'lora_A', 'lora_B'} | ({'magnitude'} if dora else set())
    assert len(new) == (2 + dora) * (2 * 4 + 6)


@VARIANTS
def test_merged_computes_the_same(dora, rslora):
    model = adapted(dora=dora, rslora=rslora, on='both')
    tokens, targets, images = batch_of()
    with torch.no_grad():
        x = model.decoder.output(model.decoder.trunk(model.embed(tokens, images)))
        merge_adapters(model)
        y = model.decoder.output(model.decoder.trunk(model.embed(tokens, images)))
    assert not any(isinstance(layer, AdaptedLinear) for layer in model.modules())
    assert (x - y).abs().max() < 1e-5 * x.abs().max()
    assert set(model.state_dict()) == set(build_vlm(spec_of(), 0).state_dict())


def test_recomputation_and_autocast(dora=True):
    model, (tokens, targets, images) = adapted(dora=dora), batch_of()
    set_trained(model, 'encoder')
    grads = []
    for again in (False, True):
        model.decoder.activation_checkpointing = again
        model.zero_grad()
        model(tokens, targets, images)[0].backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert equal(*grads)
    model.zero_grad()
    with torch.autocast('cpu', torch.bfloat16):
        loss = model(tokens, targets, images)[0]
        layer = model.decoder.layers[0].feed_forward.w12
        assert layer(torch.randn(2, 32)).dtype == torch.bfloat16 and layer.changed().dtype == torch.float32
    loss.backward()
    for name, p in model.named_parameters():
        if p.requires_grad:                                              # in float32, a few ulps (2 ** -8) from float32's
            assert p.dtype == p.grad.dtype == torch.float32
            assert (p.grad - grads[0][name]).norm() < 0.1 * grads[0][name].norm() + 1e-4, name


# --- what trains ---

@pytest.mark.parametrize('freeze, on, whole, low', [
    ('none', None, {'decoder', 'encoder', 'projector'}, set()), ('encoder', None, {'decoder', 'projector'}, set()),
    ('decoder', None, {'encoder', 'projector'}, set()), ('both', None, {'projector'}, set()),
    ('encoder', 'decoder', {'projector'}, {'decoder'}), ('none', 'decoder', {'encoder', 'projector'}, {'decoder'}),
    ('both', 'both', {'projector'}, {'decoder', 'encoder'}), ('encoder', 'encoder', {'decoder', 'projector'}, {'encoder'})])
def test_freeze_names_what_stays_and_adapters_train_alone(freeze, on, whole, low):
    model = adapted(on=on, dora=True) if on else build_vlm(spec_of(), 0)
    set_trained(model, freeze)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    for part in ('decoder', 'encoder', 'projector'):
        names = {name for name, _ in model.named_parameters() if name.startswith(part + '.')}
        low_rank = {name for name in names if name.rsplit('.', 1)[1] in ('lora_A', 'lora_B', 'magnitude')}
        assert trains & names == (low_rank if part in low else names if part in whole else set()), part
    optimizer = common.make_optimizer(model, dict.fromkeys(('decoder', 'projector', 'encoder'), 1.0), weight_decay=0.1,
                                      betas=(0.9, 0.95))
    for group in optimizer.param_groups:                                 # adapters do not decay
        assert {n.rsplit('.', 1)[1] in ('lora_A', 'lora_B', 'magnitude') for n in group['names']} == {
            group['weight_decay'] == 0}
    before = copy.deepcopy(model.state_dict())
    model(*batch_of())[0].backward()
    common.optimizer_step(optimizer, 1e-2, 1.0)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed <= trains and {name.split('.')[0] for name in changed} == whole | low
    # moments of what trains alone: 8 bytes a parameter, and a count each
    states = optimizer.state.values()
    n = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(t.numel() * t.element_size() for s in states for t in s.values()) == 8 * n + 4 * len(states)
    assert sum(p.grad.numel() for p in model.parameters() if p.grad is not None) <= n


def test_a_frozen_decoder_costs_no_product_for_the_weights(monkeypatch):
    wanted, plain = [], loss._nll_torch_backward

    def told(*args):
        wanted.append(args[-2:])                                         # need_x, need_w
        return plain(*args)
    monkeypatch.setattr(loss, '_nll_torch_backward', told)
    model = build_vlm(spec_of(), 0)
    for freeze in ('encoder', 'both'):
        set_trained(model, freeze)
        model.zero_grad()
        model(*batch_of())[0].backward()
        assert model.projector.fc1.weight.grad.any()                     # through the decoder
    assert wanted == [(True, True), (True, False)] and model.decoder.output.weight.grad is None
    # a step without an image has no gradient at all then, and changes nothing
    optimizer = common.make_optimizer(model, dict.fromkeys(('decoder', 'projector', 'encoder'), 1.0), weight_decay=0.1,
                                      betas=(0.9, 0.95))
    before = copy.deepcopy(model.state_dict())
    model(*batch_of(images=False))[0].backward()
    common.drop_gradients(model.projector, model.encoder)
    norm, bad = common.optimizer_step(optimizer, 1e-2, 1.0)
    assert norm == bad == 0 and equal(before, model.state_dict())


def test_what_makes_no_sense_is_one_line():
    config = dict(lora_rank=0, lora_alpha=0.0, rslora=False, dora=False, lora_on='decoder')
    assert adapter_spec(config) is None and adapter_spec({}) is None
    assert adapter_spec(config | dict(lora_rank=8)) == asked(rank=8, alpha=16.0)
    for key, value in (('dora', True), ('rslora', True), ('lora_alpha', 3.0), ('lora_on', 'both')):
        with pytest.raises(UserError, match='are of adapters: give --lora_rank=N'):
            adapter_spec(config | {key: value})
    text = build_vlm(spec_of(images=False), 0)
    for on in ('both', 'encoder', 'none', 'projector'):
        with pytest.raises(UserError, match=f"adapters on '{on}': this model has no such part with linear layers"):
            add_adapters(text, asked(on=on))
    set_trained(text, 'decoder')
    with pytest.raises(UserError, match="freeze='decoder' leaves nothing to train"):
        common.make_optimizer(text, {'decoder': 1.0}, weight_decay=0, betas=(0.9, 0.95))


# --- whole runs ---

def lora(world, base, *more):
    return chat(world, base, '--lora_rank=4', '--dora=true', '--lora_on=both', '--lr=1e-2', *more)


@pytest.fixture(scope='module')
def tuned(world, scripts, stage_2):
    """Stage 3 with DoRA on decoder and encoder, 8 steps, uninterrupted."""
    out = world / 'out' / 'dora'
    scripts(*lora(world, stage_2 / 'ckpt_100', f'--out_dir={out}'))
    return out


def test_adapters_alone_are_a_small_file_that_names_its_base(tuned, stage_2):
    folder, meta = tuned / 'ckpt_100', meta_of(tuned / 'ckpt_100')
    sha256 = meta_of(stage_2 / 'ckpt_100')['files']['model.safetensors']['sha256']
    assert meta['spec']['adapters'] == asked(rank=4, alpha=8.0, dora=True, on='both', base=sha256)
    small = load_file(folder / 'adapters.safetensors')
    with safe_open(folder / 'adapters.safetensors', 'pt') as file:
        assert json.loads(file.metadata()['adapters']) == meta['spec']['adapters']
    assert {name.split('.')[-1] for name in small} == {'lora_A', 'lora_B', 'magnitude', 'weight', 'bias'}
    assert {name.split('.')[0] for name in small if name.endswith(('weight', 'bias'))} == {'projector'}
    moments = torch.load(folder / 'optim.pt', weights_only=True)
    assert moments.keys() == small.keys()                                # and no other parameter has any
    for part in ('decoder', 'encoder'):                                  # the base's own bits
        base = tensors(stage_2 / 'ckpt_100', part)
        now = tensors(folder, part)
        assert equal(base, {name: now[name] for name in base})
    assert all(value.any() for name, value in small.items() if name.endswith('lora_B'))
    assert steps(tuned)[-1]['loss'] < steps(tuned)[0]['loss']


def test_killed_and_resumed_gives_the_same_bits(world, scripts, stage_2, tuned, tmp_path):
    shutil.copytree(stage_2 / 'ckpt_100', tmp_path / 'base')
    args = lora(world, tmp_path / 'base', '--save_every=2', f'--out_dir={tmp_path / "run"}')
    for i, place in enumerate(('common.optimizer_step:4', 'os.symlink:1')):
        run = scripts.start(*args, f'--n_worker={i % 2}', hook=KILL, env={'KILL': place})
        assert run.wait() == -signal.SIGKILL, f"{place}: {run.out}{run.err}"
    shutil.rmtree(tmp_path / 'base')
    scripts(*args)
    for name in ('model.safetensors', 'encoder.safetensors', 'adapters.safetensors'):
        assert same_weights(tuned / 'ckpt_100', tmp_path / 'run' / 'ckpt_100', name)
    assert 'lora_rank=4, now it is 8' in scripts.refuses(*args, '--lora_rank=8')


def logits_of(folder, merged):
    """Of a row with an image, from a checkpoint whose adapters are merged or stay."""
    meta = checkpoint.read_meta(str(folder))
    model = checkpoint.build(str(folder), meta['spec'])
    checkpoint.load_weights(model, str(folder), meta)
    if merged:
        model, _, _ = checkpoint.load_vlm(str(folder))
        assert not any(isinstance(layer, AdaptedLinear) for layer in model.modules())
    tokens = torch.arange(20)[None] % meta['spec']['decoder']['vocab_size']
    tokens[:, :4] = meta['spec']['image_id']
    images = torch.randint(0, 256, (1, 3, 28, 28), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    with torch.no_grad():
        return model.decoder.output(model.decoder.trunk(model.embed(tokens, images)))


def test_merged_is_an_ordinary_checkpoint_with_the_same_logits(world, scripts, stage_2, tuned, tmp_path):
    folder, out = tuned / 'ckpt_100', tmp_path / 'merged'
    scripts('checkpoint.py', 'merge', folder, out)
    assert 'adapters' not in meta_of(out)['spec'] and not (out / 'adapters.safetensors').exists()
    plain = logits_of(folder, merged=False)
    for found in (logits_of(out, merged=False), logits_of(folder, merged=True)):
        assert (found - plain).abs().max() < 1e-5 * plain.abs().max()
    assert (logits_of(stage_2 / 'ckpt_100', merged=True) - plain).abs().max() > 1e-2          # of other weights
    # the small file on its base says the same, bit for bit
    scripts('checkpoint.py', 'merge', stage_2 / 'ckpt_100', tmp_path / 'sent', folder / 'adapters.safetensors')
    for name in ('model.safetensors', 'encoder.safetensors'):
        assert same_weights(out, tmp_path / 'sent', name)
    line = scripts.refuses('checkpoint.py', 'merge', out, tmp_path / 'wrong', folder / 'adapters.safetensors')
    assert 'adapters of the base with sha256' in line and 'give the checkpoint that they were trained on' in line
    assert 'nothing to merge' in scripts.refuses('checkpoint.py', 'merge', out, tmp_path / 'again')
    assert 'is there already' in scripts.refuses('checkpoint.py', 'merge', folder, out)
    assert 'usage: python checkpoint.py merge' in scripts.refuses('checkpoint.py', 'merge', folder)
    shutil.copytree(folder, tmp_path / 'bad')
    bad = tmp_path / 'bad' / 'adapters.safetensors'
    for content in (b'', b'x' * 100, (folder / 'model.safetensors').read_bytes()):
        bad.write_bytes(content)
        line = scripts.refuses('checkpoint.py', 'merge', stage_2 / 'ckpt_100', tmp_path / 'wrong', bad)
        assert str(bad) in line and 'damaged, or from another checkpoint' in line
    (tmp_path / 'bad' / 'meta.json').unlink()
    assert 'no meta.json there' in scripts.refuses('checkpoint.py', 'merge', stage_2 / 'ckpt_100', tmp_path / 'wrong', bad)
    assert 'cannot be written' in scripts.refuses('checkpoint.py', 'merge', folder, '/proc/nope/out')
    assert not list(tmp_path.glob('wrong*'))


def test_a_merge_on_the_base_is_the_run_whatever_it_added(world, scripts, stage_1, stage_2, tmp_path):
    """What asks the encoder, how images are seen, the stage and its prompt are the run's; its tensors, too."""
    base, sent = stage_2 / 'ckpt_100', tmp_path / 'sent'
    scripts(*chat(world, base, '--lora_rank=2', '--text_cond=append', '--split=true', '--split_turns=true', '--max_steps=2',
                  '--system_prompt=be kind', f'--out_dir={tmp_path / "run"}'))
    folder = tmp_path / 'run' / 'ckpt_100'
    sent.mkdir()
    for name in ('adapters.safetensors', 'meta.json'):
        shutil.copy(folder / name, sent)
    scripts('checkpoint.py', 'merge', folder, tmp_path / 'whole')
    scripts('checkpoint.py', 'merge', base, tmp_path / 'two', sent / 'adapters.safetensors')
    for name in ('model.safetensors', 'encoder.safetensors'):
        assert same_weights(tmp_path / 'whole', tmp_path / 'two', name)
    whole, two = (meta_of(tmp_path / name) for name in ('whole', 'two'))
    for key in ('spec', 'stage', 'config', 'tokenizer_sha256'):
        assert whole[key] == two[key], key
    assert two['stage'] == 'finetune' and two['spec']['text_cond'] == {'kind': 'append'} and two['spec']['view']['split']
    assert two['config']['system_prompt'] == 'be kind'
    # an encoder that was frozen is in neither file
    scripts('pretrain.py', *mix(world, stage_1), '--lora_rank=2', '--max_steps=2', f'--out_dir={tmp_path / "mix"}')
    line = scripts.refuses('checkpoint.py', 'merge', stage_1 / 'ckpt_080', tmp_path / 'no',
                           tmp_path / 'mix' / 'ckpt_100' / 'adapters.safetensors')
    assert 'lack encoder.' in line and 'which was frozen' in line and not list(tmp_path.glob('no*'))


def test_what_a_base_with_adapters_trains_is_said(world, scripts, tuned, tmp_path):
    run = scripts(*chat(world, tuned / 'ckpt_100', '--max_steps=1', f'--out_dir={tmp_path}'))
    assert 'has adapters on both, which alone train there' in run.out


def test_a_later_stage_follows_its_base(world, scripts, tuned, tmp_path):
    run = scripts(*chat(world, tuned / 'ckpt_100', '--lora_rank=2', '--stop_after=2', '--lr=1e-2',
                        '--warmup_from_zero=false', f'--out_dir={tmp_path / "a"}'))
    assert '!!! the lora keys have no effect' in run.out
    a, b = tuned / 'ckpt_100', tmp_path / 'a' / 'ckpt_last'
    assert meta_of(a)['spec'] == meta_of(b)['spec']
    small = load_file(a / 'adapters.safetensors'), load_file(b / 'adapters.safetensors')
    assert small[0].keys() == small[1].keys() and not any(torch.equal(small[0][k], small[1][k]) for k in small[0])


def test_stage_2_adds_adapters_and_every_way_to_run_gives_one_loss(world, scripts, stage_1, tmp_path):
    logs, args = {}, ['pretrain.py', *mix(world, stage_1), '--lora_rank=4', '--freeze=none', '--stop_after=6']
    for n, parallel, dtype in ((1, 'ddp', 'float32'), (2, 'fsdp', 'float32'), (2, 'ddp', 'bfloat16'), (2, 'fsdp', 'bfloat16')):
        out = tmp_path / f'{n} {parallel} {dtype}'
        run = scripts(*args, '--micro_batch_size=2', f'--parallel={parallel}', f'--dtype={dtype}', f'--out_dir={out}',
                      world_size=n)
        logs[out.name] = [line['loss'] for line in steps(out)]
        assert 'no AdamW moments for this' in run.out
    assert meta_of(out / 'ckpt_last')['moments'] == 'none'
    one = logs.pop('1 ddp float32')
    for name, losses in logs.items():                                    # an ulp of bfloat16 is 2 ** -8
        assert losses == pytest.approx(one, rel=1e-2 if 'bfloat16' in name else 1e-5), name
    assert logs['2 fsdp bfloat16'] == pytest.approx(logs['2 ddp bfloat16'], rel=2e-3)
    out = tmp_path / '1 ddp float32' / 'ckpt_last'
    assert not equal(tensors(out, 'encoder'), tensors(tmp_path / '2 ddp bfloat16' / 'ckpt_last', 'encoder'))    # it trains
    assert 'without a base' in scripts.refuses(*args, '--init_from=', '--schedule=main', f'--out_dir={tmp_path / "x"}')


@pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])
def test_a_frozen_decoder_trains_a_projector_on_two_processes(world, scripts, stage_1, parallel, tmp_path):
    args = ['pretrain.py', *mix(world, stage_1, ratio=0.0625), '--freeze=both', '--micro_batch_size=2', '--stop_after=4']
    scripts(*args, f'--out_dir={tmp_path / "one"}')
    scripts(*args, f'--parallel={parallel}', f'--out_dir={tmp_path / "two"}', world_size=2)
    a, b = ([line['loss'] for line in steps(tmp_path / name)] for name in ('one', 'two'))
    assert a == pytest.approx(b, rel=1e-5)                               # every other step has no image, nor a gradient
    assert {line['grad_norm'] > 0 for line in steps(tmp_path / 'two')} == {True, False}
    assert equal(tensors(tmp_path / 'two' / 'ckpt_last', 'decoder'), tensors(stage_1 / 'ckpt_080', 'decoder'))
    # a decoder that was frozen has no moments: the next stage warms up fresh ones
    run = scripts('pretrain.py', *mix(world, stage_1), f'--init_from={tmp_path / "one" / "ckpt_last"}', '--stop_after=1',
                  f'--out_dir={tmp_path / "next"}')
    assert 'no AdamW moments for this in' in run.out and 'fresh ones, ' in run.out


def test_dry_run_counts_adapters(world, scripts, stage_2, tmp_path):
    run = scripts(*lora(world, stage_2 / 'ckpt_100', '--dry_run=true', f'--out_dir={tmp_path / "a"}'))
    projector = 24 * 96 + 96 + 96 * 32 + 32
    decoder = 4 * (32 * 4 + 32 * 2 + (32 + 128) + (64 + 32)) + 96 + 32 + 128 + 32            # A, B and magnitudes a layer
    encoder = 4 * (4 * 48 + 72 + 72) + 4 * 24 + 48 + 24
    assert f'; {2 * decoder + encoder + projector:,} train' in run.out
