"""Cross-attention fusion: against transformers' Idefics layer, its gates, its layout, its cache, and whole runs."""
import signal

import pytest
import torch
import torch.nn as nn
from conftest import meta_of, mix, same_weights, steps
from test_finetune import chat
from test_model import IMAGE, WAITS, Watch, grads_of, pictures, random_batch, tiny_vlm
from test_pretrain import KILL, equal, tensors

import common
import costs
import model as model_module
from checkpoint import check_spec, load_vlm
from connectors import CrossBlock, CrossBlocks, Sight
from errors import UserError
from kernels import IGNORE_INDEX, attention
from decoder import Norm
from model import VLM, ModelConfig, build_vlm, vlm_spec
from vision import SigLIP, SigLIPConfig


def cross_vlm(seed=0, every=2, gate=0.0, **kw):
    """test_model's tiny VLM with cross blocks before its blocks 0 and 2."""
    model = tiny_vlm(seed, **kw)
    torch.manual_seed(seed + 3)
    model.cross = CrossBlocks(model.decoder.config, every)
    for block in model.cross:
        nn.init.constant_(block.gates, gate)
        nn.init.normal_(block.kv.weight, std=1.0)               # images differ in what they say
    return model.eval()


def rows_with(images_at, T=11, seed=0):
    """Random tokens (B,T) with an image at the given positions of each row, and targets."""
    tokens, targets = random_batch(len(images_at), T, seed=seed)
    for row, at in zip(tokens, images_at):
        row[list(at)] = IMAGE
    return tokens, targets


ROWS = [(), (0,), (3, 4, 8), (), (10,), (5,)]                   # none, first, several and adjacent, last


# --- one block ------------------------------------------------------------------------------------------------------

class OverHeads(nn.Module):
    """Our norm over the whole width where theirs has one over each head (B,H,T,D)."""
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.transpose(1, 2).flatten(2)).unflatten(-1, (x.shape[1], -1)).transpose(1, 2)


def test_a_block_is_transformers_gated_cross_attention_layer_with_our_norms():
    idefics = pytest.importorskip('transformers.models.idefics.modeling_idefics')
    torch.manual_seed(0)
    C, F, H, n, T = 24, 40, 3, 5, 11
    ours = CrossBlock(ModelConfig(1, H, C, 40, n_ffn=F)).double()
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(0.3 * torch.randn_like(p))
    config = idefics.IdeficsConfig(hidden_size=C, intermediate_size=F, num_attention_heads=H, qk_layer_norms=True,
                                   alpha_initializer='ones', alpha_type='float', vision_config=dict(embed_dim=C))
    config._attn_implementation = 'sdpa'                      # 'eager' takes its softmax in float32
    theirs = idefics.IdeficsGatedCrossAttentionLayer(config, 0).double()

    def norm(gain):
        module = Norm(C, ours.eps).double()
        module.weight = gain
        return module
    a, m = theirs.cross_attn, theirs.mlp
    theirs.input_layernorm, theirs.post_attention_layernorm = norm(ours.norm), norm(ours.ffn_norm)
    a.q_layer_norm, a.k_layer_norm = OverHeads(norm(ours.q_norm)), OverHeads(norm(ours.k_norm))
    with torch.no_grad():
        for linear, weight in ((a.q_proj, ours.q.weight), (a.o_proj, ours.out.weight), (m.down_proj, ours.w3.weight),
                               (a.k_proj, ours.kv.weight[:C]), (a.v_proj, ours.kv.weight[C:]),
                               (m.gate_proj, ours.w12.weight[:F]), (m.up_proj, ours.w12.weight[F:])):
            linear.weight.copy_(weight)
        theirs.alpha_cross_attn.copy_(ours.gates[:1])
        theirs.alpha_dense.copy_(ours.gates[1:])
    images, index = torch.randn(3, n, C, dtype=torch.float64), torch.tensor([2, 0, 1, 0, 2, 2])
    x = torch.randn(6, T, C, dtype=torch.float64)
    # theirs: every row has keys for three images, the mask says which are of the last one before a query
    row_images, mask, there = torch.zeros(6, 3 * n, C).double(), torch.full((6, 1, T, 3 * n), -1e30).double(), []
    slots, m = torch.zeros(6, T, dtype=torch.bool), 0
    for b, at in enumerate(ROWS):
        slots[b, list(at)] = True
        for j, first in enumerate(at):
            row_images[b, j * n:(j + 1) * n] = images[index[m]]
            last = at[j + 1] if j + 1 < len(at) else T
            mask[b, 0, first:last, j * n:(j + 1) * n] = 0
            m += 1
        there.append([at != () and t >= at[0] for t in range(T)])
    there = torch.tensor(there)
    expected = theirs(x, image_hidden_states=row_images, image_attention_mask=mask, cross_attention_gate=there.long())
    for given in (images, torch.stack(ours.keys_values(images))):                # features, or the keys of a cache
        y = ours(x, given, Sight.of([], [given], slots, 6, index))
        torch.testing.assert_close(y[there], expected[there], rtol=1e-10, atol=1e-10)
        # theirs runs its feed-forward for positions without an image, too; ours leaves them alone
        assert torch.equal(y[~there], x[~there])
    y.square().sum().backward()
    mine = ours.gates.grad.clone(), ours.q.weight.grad.clone()
    (expected[there].square().sum() + x[~there].square().sum()).backward()
    torch.testing.assert_close(torch.cat((theirs.alpha_cross_attn.grad, theirs.alpha_dense.grad)), mine[0])
    torch.testing.assert_close(theirs.cross_attn.q_proj.weight.grad, mine[1])


def test_the_size_is_51_million_a_block_at_14b():
    with torch.device('meta'):
        blocks = CrossBlocks(ModelConfig(24, 16, 2048), 4)
    assert len(blocks) == 6 and sum(p.numel() for p in blocks[0].parameters()) == 51_388_418
    assert [len(CrossBlocks(ModelConfig(5, 1, 4, 8), k)) for k in (1, 2, 4, 9)] == [5, 3, 2, 1]


def test_the_mask_is_one_relation_in_both_directions_and_the_kernel_takes_it():
    slots = torch.zeros(6, 11, dtype=torch.bool)
    for row, at in zip(slots, ROWS):
        row[list(at)] = True
    g = torch.Generator().manual_seed(0)
    n, M = 5, int(slots.sum())
    sight = Sight.of([], [torch.zeros(M, n, 4)], slots, M)
    i, j = torch.arange(11)[:, None], torch.arange(n)
    mask = sight.mask
    seen = (j >= mask.lo[..., None]) & (j < mask.hi[..., None])                              # (M,T,n)
    assert torch.equal(seen, (i >= mask.qlo[:, None]) & (i < mask.qhi[:, None]))
    assert seen.any(2).sum() == sight.seeing.sum() == 11 + 8 + 1 + 6       # each position sees one image at most
    q, k, v = (torch.randn(M, 2, T, 64, generator=g).requires_grad_() for T in (11, n, n))
    o = [attention(q, k, v, mask, impl=impl) for impl in ('torch', 'triton')]
    torch.testing.assert_close(*o, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), (q, k, v)) for y in o), rtol=1e-4, atol=1e-5)


# --- in the model ---------------------------------------------------------------------------------------------------

def test_a_gate_of_0_changes_no_bit_and_is_no_dead_end():
    model = cross_vlm(1, frozen=False)
    tokens, targets = rows_with(ROWS)
    index = torch.tensor([2, 0, 1, 0, 2, 2])
    loss, _, grads = grads_of(model, tokens, targets, pictures(3), index)
    plain, _, alone = grads_of(VLM(model.decoder), tokens, targets)
    assert torch.equal(loss, plain) and all(torch.equal(g, grads[k]) for k, g in alone.items())
    moved = {k for k, g in grads.items() if not k.startswith('decoder.') and g.abs().max() > 0}
    assert moved == {'cross.0.gates', 'cross.1.gates'}          # they alone learn in the first step
    with torch.no_grad():
        for block in model.cross:
            block.gates -= 0.1 * block.gates.grad
    assert all(block.gates.abs().min() > 0 for block in model.cross)
    later = grads_of(model, tokens, targets, pictures(3), index)[2]
    assert all(g.abs().max() > 0 for g in later.values()) and len(later) == len(list(model.parameters()))


def test_gates_never_decay_and_the_blocks_train_at_the_projectors_lr():
    model = cross_vlm()
    for decay in ('all', 'matrices'):
        optimizer = common.make_optimizer(model, dict(decoder=1.0, projector=0.5, encoder=0.1, cross=0.5),
                                          weight_decay=0.3, betas=(0.9, 0.95), decay=decay)
        found = {n: (g['weight_decay'], g['share']) for g in optimizer.param_groups for n in g['names'] if 'cross' in n}
        assert len(found) == 20 and {share for _, share in found.values()} == {0.5}
        assert {n for n, (strength, _) in found.items() if strength == 0} == {
            n for n in found if 'gates' in n or decay == 'matrices' and 'norm' in n}


def test_a_row_depends_on_nothing_else_in_its_batch_and_sees_the_last_image_only():
    model, index = cross_vlm(2, gate=0.8), torch.tensor([2, 0, 1, 0, 2, 2])
    tokens, targets = rows_with(ROWS)
    nats = model(tokens, targets, pictures(3), index)[2][0]
    own = torch.split(index, list(map(len, ROWS)))
    for b, mine in enumerate(own):
        images = pictures(3)[mine] if len(mine) else None
        alone = model(tokens[b:b + 1], targets[b:b + 1], images)[2][0]
        torch.testing.assert_close(alone, nats[b:b + 1], rtol=1e-5, atol=1e-5)
        if not len(mine):                                       # the decoder's own
            assert torch.equal(alone, VLM(model.decoder)(tokens[b:b + 1], targets[b:b + 1])[2][0])
    # a block moves what sees the changed image and nothing else
    sight, pixels = model.see(tokens, pictures(3), index), pictures(3)
    x, pixels[0] = model.embed(tokens, pictures(3), index), 255 - pixels[0]
    other = model.see(tokens, pixels, index)
    changed = (model.cross[0](x, sight.images[0], sight) != model.cross[0](x, other.images[0], other)).any(2)
    expected = torch.zeros(6, 11, dtype=torch.bool)
    expected[2, 3], expected[2, 8:] = True, True                # image 0 is the first and the third of row 2
    assert torch.equal(changed, expected)
    with pytest.raises(ValueError, match='7 image slots, 7 in all|6 images x 1'):
        model(torch.full((1, 7), IMAGE), targets[:1, :7], pictures(6))


def test_a_batch_without_images_gives_every_block_a_gradient_of_0():
    model = cross_vlm(3, gate=0.5)
    tokens, targets = random_batch(3, 8)
    loss, _, grads = grads_of(model, tokens, targets)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert grads.keys() == trained and model.encoder.calls == 0
    assert all((g == 0).all() for n, g in grads.items() if not n.startswith('decoder.'))
    assert torch.equal(loss, VLM(model.decoder)(tokens, targets)[0])
    common.drop_gradients(model.projector, model.encoder, model.cross)
    assert all(p.grad is None for p in model.cross.parameters())
    with torch.no_grad():
        assert model.see(tokens) is None                        # and in evaluation there is nothing to do


def test_recomputed_and_compiled_blocks_give_the_same_gradients():
    tokens, targets = rows_with(ROWS)
    results = []
    for how in ('plain', 'again', 'compiled'):
        model = cross_vlm(4, gate=0.5)
        model.decoder.activation_checkpointing = how == 'again'
        if how == 'compiled':
            for block in model.cross:
                block.compile(backend='eager', fullgraph=True)
        results.append(grads_of(model, tokens, targets, pictures(6)))
    for loss, _, grads in results[1:]:
        assert torch.equal(loss, results[0][0])
        torch.testing.assert_close(grads, results[0][2], rtol=1e-6, atol=1e-6)


def test_a_step_asks_the_device_for_nothing(monkeypatch):
    monkeypatch.setattr(model_module, 'check_slots', lambda *_: None)
    model = cross_vlm(5, gate=0.5)
    tokens, targets = rows_with([(0,), (), (0,), (4,)])
    rows = (targets.flatten() != IGNORE_INDEX).nonzero()[:, 0]
    with Watch() as watch:
        model(tokens, targets, pictures(2), torch.tensor([1, 0, 1]), torch.rand(4, 11), rows)[0].backward()
    assert 'index_add' in watch.ran and not watch.ran & {*WAITS, 'unordered sum'}


# --- generation -----------------------------------------------------------------------------------------------------

def slow_greedy(model, prompt, images, n):
    """One prompt, no cache: the whole row again for every token."""
    new = []
    for _ in range(n):
        tokens = torch.tensor([prompt + new])
        x = model.embed(tokens, images)
        new.append(int(model.decoder.output(model.decoder.trunk(x, sight=model.see(tokens, images)))[0, -1].argmax()))
    return new


PROMPTS = [[IMAGE, 1, 2, 3], [5, 6], [IMAGE, 4], [7, IMAGE, 8, IMAGE, 9], [IMAGE], [1, 2, IMAGE, 3]]


@torch.no_grad()
def test_the_cache_changes_no_token(monkeypatch):
    model, images = cross_vlm(6, gate=0.9, spread=3.0), pictures(3)
    index = torch.tensor([2, 0, 1, 0, 2, 2])
    own = iter(index)
    mine = [torch.stack([images[next(own)] for _ in range(p.count(IMAGE))]) if IMAGE in p else None for p in PROMPTS]
    expected = [slow_greedy(model, p, i, 7) for p, i in zip(PROMPTS, mine)]
    blind = [slow_greedy(model, p, None if i is None else 255 - i, 7) for p, i in zip(PROMPTS, mine)]
    assert sum(a != b for a, b in zip(expected, blind)) >= 4 and expected[1] == blind[1]     # what is seen matters
    assert model.generate(PROMPTS, images, index, max_new_tokens=7) == expected
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert len(model.generate(PROMPTS, images, index, max_new_tokens=2)[0]) == 2
    read, plain = [], CrossBlock.keys_values
    monkeypatch.setattr(CrossBlock, 'keys_values', lambda self, x: (read.append(len(x)), plain(self, x))[1])
    opening = [[IMAGE, *p] for p in ([1, 2, 3], [4], [9, 9], [1, 2, 3], [8])]
    index = torch.tensor([2, 0, 2, 0, 2])
    expected = [slow_greedy(model, p, images[i:i + 1], 6) for p, i in zip(opening, index)]
    read.clear()
    assert model.generate(opening, images, index, max_new_tokens=6) == expected
    assert read == [2, 2]                                       # two blocks, the two images that are asked about, once
    prefix = model.prefill_images(images)
    read.clear()
    assert model.generate(opening, None, index, prefix=prefix, max_new_tokens=6) == expected and read == []
    # text rows take the places of rows with an image, and the other way round
    rows = [(n, p, i) for n, (p, i) in enumerate(zip([*opening, *([[5, 6], [7], [1, 2]])], [*index, None, None, None]))]
    turns = [rows[0:2], rows[5:7], rows[2:4], rows[7:], rows[4:5]]

    def feed(n):
        if not turns:
            return None
        given, text = turns.pop(0), False
        text = given[0][2] is None
        return ([k for k, _, _ in given], [p for _, p, _ in given], None, None if text else torch.stack(
            [i for _, _, i in given]), None if text else prefix)
    expected += [slow_greedy(model, p, None, 6) for p in ([5, 6], [7], [1, 2])]
    assert dict(model.generate_each(feed, 2, 4, max_new_tokens=6)) == dict(enumerate(expected))


@torch.no_grad()
def test_choices_are_scored_as_whole_rows():
    model, images, index = cross_vlm(7, gate=0.9, spread=2.0), pictures(2), torch.tensor([1, 0, 1])
    contexts = [[IMAGE, 1, 2], [IMAGE, 3], [IMAGE, 4, 5, 6]]
    choices = [[[1, 2, 3], [4]], [[9, 8]], [[7], [7, 7, 7], [2, 1]]]
    nats, _ = model.choice_nats(contexts, choices, None, index, model.prefill_images(images))
    for context, options, values, i in zip(contexts, choices, nats, index):
        for ids, value in zip(options, values):
            row = torch.tensor([context + ids])
            targets = torch.full_like(row, IGNORE_INDEX)
            targets[0, len(context) - 1:-1] = row[0, len(context):]
            assert value == pytest.approx(float(model(row, targets, images[i:i + 1])[0]), rel=1e-5, abs=1e-5)


# --- its description and its cost -----------------------------------------------------------------------------------

SHAPE = dict(n_layer=3, n_head=4, n_embd=64, vocab_size=300, seq_len=512, n_ffn=0)
CROSS = dict(kind='cross', every=2)


def spec_of(tower=SigLIPConfig(96, 384, 3, 3, 14, 112)):
    return dict(decoder=SHAPE, encoder=SigLIP(tower).spec(), projector=dict(kind='mlp2'), image_id=299)


def test_fresh_blocks_leave_all_other_weights_as_they_were():
    plain, cross = build_vlm(spec_of(), 7).state_dict(), build_vlm(dict(spec_of(), fusion=CROSS), 7).state_dict()
    assert all(torch.equal(cross.pop(k), v) for k, v in plain.items())
    again = build_vlm(dict(spec_of(), fusion=CROSS), 7).state_dict()
    assert len(cross) == 20 and all(k.startswith('cross.') and torch.equal(v, again[k]) for k, v in cross.items())
    with pytest.raises(UserError, match='not a model'):
        build_vlm(dict(spec_of(), fusion=dict(kind='sum', every=2)))


def test_descriptions_that_do_not_fit_are_refused():
    config = dict(SHAPE, encoder='patch', image_size=28, encoder_path='', dinov2_path='', encoder_layer=-2,
                  encoder_norm=False, encoder_fusion='channel', fusion='cross', cross_every=2, projector='mlp2',
                  token_mode='', image_tokens=0)
    spec = vlm_spec(config, 299, True)
    assert spec['fusion'] == CROSS and 'fusion' not in vlm_spec(config, 299, False)
    sequence = vlm_spec(dict(config, fusion='sequence'), 299, True)
    assert 'fusion' not in sequence
    for other in (dict(image_mask='prefix'), dict(view=dict(shortest=9))):
        with pytest.raises(UserError, match="fusion='cross'.* goes with image_mask='causal' and aspect='square' only"):
            build_vlm(dict(spec, **other))
    check_spec(dict(spec=sequence), spec, 'base')               # its blocks start fresh
    check_spec(dict(spec=spec), vlm_spec(config, 299, False), 'base')                        # text goes on without
    for other, words in ((sequence, "fusion has kind='cross', this run's has 'sequence'"),
                         (dict(spec, fusion=dict(CROSS, every=4)), "fusion has every=2, this run's has 4")):
        with pytest.raises(UserError, match=words):
            check_spec(dict(spec=spec), other, 'base')


@pytest.mark.parametrize('n_image', [0, 2])
def test_flops_and_memory_are_counted(n_image, monkeypatch):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    import bench
    spec = dict(spec_of(), fusion=CROSS)
    model = build_vlm(spec, 0)
    model.encoder.requires_grad_(False)
    tokens, targets = random_batch(3, 128, V=299)
    tokens[:n_image, 0] = 299
    images, c = torch.zeros(n_image, 3, 112, 112, dtype=torch.uint8) if n_image else None, model.decoder.config

    def eager(x, weight, targets, rows=None):                            # our operator is opaque to the counter
        z = x @ weight.T
        return torch.nn.functional.cross_entropy(z, targets, reduction='none'), z.logsumexp(1)
    with monkeypatch.context() as m, FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        m.setattr(model_module, 'linear_cross_entropy', eager)
        model(tokens, targets, images)[0].backward()
    described, n_kept = costs.meta_vlm(spec, dict(freeze='encoder')), int((targets != IGNORE_INDEX).sum())
    per_image, kept = costs.image_costs(described)
    ours = costs.decoder_flops(c, 3, 128, n_kept) + n_image * per_image + costs.cross_flops(described, 128 * n_image,
                                                                                           n_image)
    hidden = 128 * 128 - 128 * 129 // 2                                  # the counter's attention computes all pairs
    assert ours + 6 * c.n_layer * 2 * c.n_embd * 3 * hidden == counter.get_total_flops()
    measured = bench.allocated_at_peak(lambda: model(tokens, targets, images)[0].backward())
    parts = costs.memory(described, n_row=3, n_position=128, n_image=n_image, per_image=kept, width=4, n_kept=n_kept)
    assert parts['activations'] + parts['work'] == pytest.approx(measured, rel=0.1)


# --- whole runs -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def crossed(world, scripts, stage_1):
    """Stage 2 with a cross block before each of the two blocks."""
    out = world / 'out' / 'tiny' / 'cross'
    run = scripts('pretrain.py', *arguments(world, stage_1), f'--out_dir={out}')
    assert 'no cross-attention blocks: fresh ones' in run.out
    return out


def arguments(world, stage_1):
    return [*mix(world, stage_1), '--fusion=cross', '--cross_every=1', '--max_steps=6', '--projector_lr=5e-3']


def test_stage_2_resumes_bit_for_bit_and_shares_among_processes(world, scripts, stage_1, crossed, tmp_path):
    assert meta_of(crossed / 'ckpt_100')['spec']['fusion'] == dict(kind='cross', every=1)
    lines = steps(crossed)
    assert all(line['sources']['captions']['n_image_position'] == line['sources']['captions']['n_image']
               for line in lines)
    assert all(v.abs().min() > 0 for k, v in tensors(crossed / 'ckpt_100', 'cross').items() if 'gates' in k)
    args = ['pretrain.py', *arguments(world, stage_1), '--save_every=2', f'--out_dir={tmp_path / "killed"}']
    run = scripts.start(*args, hook=KILL, env={'KILL': 'common.optimizer_step:4'})
    assert run.wait() == -signal.SIGKILL
    scripts(*args)
    assert same_weights(crossed / 'ckpt_100', tmp_path / 'killed' / 'ckpt_100')
    for parallel in ('ddp', 'fsdp'):                            # micro-steps of one row: most have no image on a rank
        scripts('pretrain.py', *arguments(world, stage_1), '--micro_batch_size=1', f'--parallel={parallel}',
                f'--out_dir={tmp_path / parallel}', world_size=2)
        assert [line['loss'] for line in steps(tmp_path / parallel)] == pytest.approx(
            [line['loss'] for line in lines], rel=1e-5)
    line = scripts.refuses('pretrain.py', *mix(world, stage_1), f'--init_from={crossed / "ckpt_100"}',
                           f'--out_dir={tmp_path / "sequence"}')
    assert "fusion has kind='cross', this run's has 'sequence'" in line


def test_stage_3_follows_its_base_or_adds_blocks(world, scripts, stage_2, crossed, tmp_path):
    args = chat(world, crossed / 'ckpt_100', '--max_steps=2', '--lr=3e-3', '--warmup_ratio=0.0')
    scripts(*args, f'--out_dir={tmp_path / "a"}')
    assert meta_of(tmp_path / 'a' / 'ckpt_100')['spec']['fusion'] == dict(kind='cross', every=1)
    assert not equal(tensors(tmp_path / 'a' / 'ckpt_100', 'cross'), tensors(crossed / 'ckpt_100', 'cross'))
    run = scripts(*chat(world, stage_2 / 'ckpt_100', '--fusion=cross', '--max_steps=3', '--stop_after=1'),
                  f'--out_dir={tmp_path / "b"}')
    assert 'no cross-attention blocks: fresh ones' in run.out and 'no projector' not in run.out
    scripts(*chat(world, stage_2 / 'ckpt_100', '--fusion=cross', '--max_steps=3'), f'--out_dir={tmp_path / "b"}')
    assert len(steps(tmp_path / 'b')) == 3
    model, tokenizer, meta = load_vlm(str(tmp_path / 'b' / 'ckpt_last'))
    assert meta['spec']['fusion'] == dict(kind='cross', every=4) and model.n_slot == 1 and model.n_token == 4
    photo = next((world / 'data' / 'instruct' / 'images').iterdir())
    out = scripts('evaluate.py', f'--ckpt={tmp_path / "a" / "ckpt_100"}', f'--image={photo}', '--device=cpu',
                  '--prompt=is the wall red ?', '--max_new_tokens=4', '--n_thread=1').out
    assert out.strip()
