"""Text-aware encoding: append against a loop in float64, prefix against peft, what conditions on what, whole runs."""
import signal
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import meta_of, mix, same_weights, steps
from PIL import Image
from test_finetune import chat
from test_data import talk, write_llava
from test_pretrain import KILL, equal, tensors
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import ask
import costs
from adapters import set_trained
from checkpoint import META, check_spec, load_vlm
from data import InstructSource, collate, instruct_prompt, load_tokenizer
from errors import UserError, check
from evaluate import default_options
from images import View
from model import build_vlm
from scorers import Example, Task
from text_cond import TextCond, text_cond_spec
from vision import DINOv2, DINOv2Config, PatchProjection, SigLIP, SigLIPConfig
from vit import Text

SIGLIP = SigLIPConfig(48, 96, 3, 3, 14, 42)                              # 9 tokens; two of three blocks run
DINOV2 = DINOv2Config(48, 96, 3, 3, 14, 42)
IMAGE = 299
QUESTIONS = [[5, 7, 9, 11], [5], [17, 3]]
KINDS = pytest.mark.parametrize('kind', ['append', 'prefix'])


def spec_of(kind, tower=SIGLIP, image_id=IMAGE, **more):
    eye = (DINOv2 if isinstance(tower, DINOv2Config) else SigLIP)(tower)
    decoder = dict(n_layer=2, n_head=4, n_embd=32, vocab_size=image_id + 20, seq_len=64, n_ffn=64)
    return dict(decoder=decoder, encoder=eye.spec(), projector=dict(kind='mlp2'), image_id=image_id,
                **(dict(text_cond=dict(kind=kind)) if kind else {}), **more)


def vlm(kind, tower=SIGLIP, gate=0.0, freeze='encoder', **more):
    model = build_vlm(spec_of(kind, tower, **more), 3)
    if kind == 'prefix':
        nn.init.constant_(model.text_cond.gates, gate)
    set_trained(model, freeze)
    return model


def pictures(n, seed=0):
    return torch.randint(0, 256, (n, 3, 42, 42), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# --- against other code ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize('tower', [SIGLIP, DINOV2])
def test_append_is_a_loop_over_images_whose_questions_have_no_pads(tower):
    torch.manual_seed(1)
    encoder = (DINOv2 if tower is DINOV2 else SigLIP)(tower).double()
    for p in encoder.parameters():
        nn.init.normal_(p, std=0.2)
    blocks = encoder.layers if tower is DINOV2 else encoder.encoder['layers'][:2]
    seen = []                                                            # what enters the first block, in float64
    hook = blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    words, x = [torch.randn(n, 48, dtype=torch.double) for n in (4, 1, 2)], torch.randn(3, 3, 42, 42).double()
    text = Text(nn.utils.rnn.pad_sequence(words, batch_first=True, padding_value=1e3),
                torch.tensor([4, 1, 2], dtype=torch.int32), None)        # pads would not go unnoticed
    ours = encoder(x.float(), text)
    hook.remove()
    expected = []
    for row, own in zip(seen[0], words):
        n = len(row) - 4
        z = torch.cat((row[:n], own))[None]                              # (1, n + P, C)
        for block in blocks:
            a = block.self_attn
            q, k, v = (proj(block.layer_norm1(z)).unflatten(2, (3, 16)).transpose(1, 2)
                       for proj in (a.q_proj, a.k_proj, a.v_proj))
            o = a.out_proj(((q @ k.mT / 4).softmax(-1) @ v).transpose(1, 2).flatten(2))
            z = z + (o if block.scale1 is None else block.scale1 * o)
            h = F.gelu(block.mlp['fc1'](block.layer_norm2(z)), approximate=block.approximate)
            z = z + (1 if block.scale2 is None else block.scale2) * block.mlp['fc2'](h)
        expected.append(z[0, n - 9:n])                                   # without CLS and registers
    expected = torch.stack(expected)
    assert ours.shape == (3, 9, 48)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=1e-5)       # ours is float32 at the end alone


def test_prefix_is_pefts_adaption_prompt():
    layer = pytest.importorskip('peft.tuners.adaption_prompt.layer')
    torch.manual_seed(2)
    ours = SigLIP(SIGLIP).double().encoder['layers'][0].self_attn
    for p in ours.parameters():
        nn.init.normal_(p, std=0.3)
    nn.init.zeros_(ours.out_proj.bias)                                   # a Llama has none: theirs would add it twice
    x, prefix, gate = torch.randn(2, 9, 48).double(), torch.randn(1, 4, 48).double(), torch.tensor([0.7]).double()

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj, self.o_proj = ours.q_proj, ours.k_proj, ours.v_proj, ours.out_proj
            self.config, self.head_dim = SimpleNamespace(hidden_size=48, num_attention_heads=3), 16

        def forward(self, hidden_states, **_):
            return ours(hidden_states), None
    theirs = layer.AdaptedAttention('llama', 4, Attention())
    theirs.adaption_prompt.data, theirs.adaption_gate.data = prefix, gate.tanh()      # theirs has no tanh
    expected, _ = theirs(hidden_states=x, position_embeddings=(torch.ones(1, 9, 16).double(),
                                                               torch.zeros(1, 9, 16).double()))      # no rotation
    text = Text(prefix.expand(2, -1, -1), torch.tensor([4, 4], dtype=torch.int32), gate.expand(1, 3))
    y = ours(x, text.mask(9), text.tokens, text.gates[0])
    assert (y - ours(x)).abs().max() > 0.1
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)        # their softmax is in float32
    padded = Text(torch.cat((text.tokens, 1e3 + torch.zeros(2, 3, 48)), 1), text.length, text.gates)
    torch.testing.assert_close(ours(x, padded.mask(9), padded.tokens, padded.gates[0]), y)


# --- what it changes, and what not ----------------------------------------------------------------------------------

@pytest.mark.parametrize('freeze', ['encoder', 'none'])
@pytest.mark.parametrize('tower', [SIGLIP, DINOV2])
def test_gates_of_0_and_images_without_a_question_change_no_bit(tower, freeze):
    plain, images = vlm(None, tower), pictures(3)
    for kind in ('append', 'prefix'):
        model = vlm(kind, tower, freeze=freeze)
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in plain.state_dict().items())
        for dtype in (torch.float32, torch.bfloat16):
            with torch.autocast('cpu', dtype, enabled=dtype is torch.bfloat16):
                expected = plain.image_features(images)
                for text in (None, [[], [], []]):
                    assert torch.equal(model.image_features(images, text), expected)
                assert torch.equal(model.image_features(images, QUESTIONS), expected) == (kind == 'prefix')
        with torch.no_grad():
            [nn.init.constant_(model.text_cond.gates, 0.5) for _ in range(kind == 'prefix')]
            alone = torch.cat([model.image_features(images[i:i + 1], [q]) for i, q in enumerate(QUESTIONS)])
            together = model.image_features(images, QUESTIONS)
            torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
            assert ((together - plain.image_features(images)).abs().amax((1, 2)) > 1e-3).all()
            some = model.image_features(images, [QUESTIONS[0], [], QUESTIONS[2]])                # captions among them
            torch.testing.assert_close(some[[0, 2]], alone[[0, 2]], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(some[1], plain.image_features(images)[1], rtol=1e-5, atol=1e-5)


@KINDS
def test_what_trains_is_the_conditioning_alone_and_every_step_reaches_it(kind):
    """A frozen encoder passes gradients on and gets none; a step without questions gives exact zeros, as ddp needs."""
    model = vlm(kind, gate=0.3, adapters=dict(rank=2, alpha=4.0, rslora=False, dora=False, on='encoder', base=''))
    tokens = torch.randint(0, 298, (2, 24))
    tokens[:, :9] = IMAGE
    own = dict(model.text_cond.named_parameters())
    for text in (QUESTIONS[:2], [[], QUESTIONS[1]], [[], []], None):
        model.zero_grad()
        images = None if text is None else pictures(2)
        model(tokens if images is not None else tokens.clamp(max=9), tokens.clamp(max=9), images,
              image_text=text)[0].backward()
        asked = any(text or ())
        assert all((p.grad.abs().max() > 0) == asked for p in own.values())
        trained = {name for name, p in model.encoder.named_parameters() if p.grad is not None and p.grad.any()}
        assert all('lora_' in name for name in trained) and bool(trained) == (images is not None)
    assert len(own) == (7 if kind == 'prefix' else 6)


def test_photos_of_many_sizes_and_parts_are_conditioned_each_with_its_own():
    model, g = vlm('append', view=dict(shortest=14, split=True)), torch.Generator().manual_seed(0)
    images = [[torch.randint(0, 256, (3, 14 * h, 28), dtype=torch.uint8, generator=g) for _ in range(5)]
              for h in (1, 2)]
    with torch.no_grad():
        both = model.image_features(images, QUESTIONS[:2])
        for image, question, ours in zip(images, QUESTIONS, both):
            expected = [model.image_features(part[None], [question])[0] for part in image]
            torch.testing.assert_close(ours, torch.cat(expected), rtol=1e-5, atol=1e-5)
        five = torch.stack([torch.stack([pictures(1, i)[0] for i in range(5)])] * 2)
        ours = model.image_features(five, QUESTIONS[:2])
        torch.testing.assert_close(ours[1, :9], model.image_features(five[1, :1], QUESTIONS[1:2])[0])


@KINDS
@pytest.mark.parametrize('other', [dict(fusion=dict(kind='cross', every=1)), dict(projector=dict(kind='attn')),
                                   dict(projector=dict(kind='perceiver', n_token=4)), dict(image_mask='prefix')])
def test_other_options_read_the_conditioned_features(kind, other):
    spec = spec_of(kind) | other
    model, losses = build_vlm(spec, 3), []
    for p in (*[model.text_cond.gates] * (kind == 'prefix'), *(block.gates for block in model.cross or ())):
        nn.init.constant_(p, 0.8)
    tokens = torch.arange(2 * 24).view(2, 24)
    tokens[:, :model.n_slot] = IMAGE
    for text in (QUESTIONS[:2], QUESTIONS[1:], None):
        losses.append(model(tokens, tokens.clamp(max=200), pictures(2), image_text=text)[0])
    assert len({loss.item() for loss in losses}) == 3
    losses[0].backward()
    assert all(p.grad.abs().max() > 0 for p in model.text_cond.parameters())


# --- the question, never an answer ----------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def tok(world):
    return load_tokenizer(str(world / 'data' / 'tokenizer.model'))


def test_samples_say_their_first_question_and_nothing_that_follows_it(tmp_path, tok):
    first, later = 'what colour is the wall ?', 'is the wall red ?'
    talks = [talk(f'<image>\n{first}', 'red', later, 'yes', image='0.jpg'),
             talk(first, 'no two more', 'what is on the mat ?', 'cat', image='0.jpg'),           # other answers, turns
             talk(later, 'yes', image='0.jpg'), talk(first, 'red')]
    files = write_llava(tmp_path, talks)
    keys = dict(files, tokenizer=tok, seq_len=64, view=View(28, 3), system_prompt='the cat', text_cond=True)
    build = lambda **more: InstructSource(**{**keys, **more})
    samples = [build()[i] for i in range(4)]
    one, other = tok.encode(first), tok.encode(later)
    assert [s.prompts for s in samples] == [[one], [one], [other], [one]]
    batch = collate(samples, tok.pad_id)
    assert len(batch.images) == 2 and batch.image_index.tolist() == [0, 0, 1]            # shared where it is the same
    assert batch.image_text == [one, other]
    assert collate(samples[3:], tok.pad_id).image_text is None                           # no image, nothing to say
    rows = collate([build(split_turns=True)[0]], tok.pad_id)
    assert rows.image_text == [one, other] and rows.image_index.tolist() == [0, 1]       # one photo, two questions
    plain = build(text_cond=False)[0]
    assert plain.prompts == [] and collate([plain, build(text_cond=False)[2]], tok.pad_id).image_text is None
    assert (plain.tokens == samples[0].tokens).all()
    shuffled = build(shuffle_turns=True)
    assert {tuple(shuffled.draw(0, key).prompts[0]) for key in range(9)} == {tuple(one), tuple(other)}
    cut = build(seq_len=14)[0]                                           # what is left of a question that is cut
    row = cut.tokens.tolist()
    start = len(instruct_prompt('', 3, tok, 'the cat')) - 1
    assert cut.n_truncated and cut.prompts[0] == row[start:start + len(cut.prompts[0])] == one[-len(cut.prompts[0]):]
    assert row[start + len(cut.prompts[0])] == tok.sep_id


@KINDS
def test_no_answer_and_no_later_turn_reaches_a_feature(kind, tmp_path, tok):
    model, features = vlm(kind, gate=0.7, image_id=tok.image_id), []
    for answer, turns in (('red', ()), ('no two more', ('is it ?', 'yes')), ('cat', ('what is it ?', 'mat'))):
        files = write_llava(tmp_path, [talk('what is on the mat ?', answer, *turns, image='0.jpg')])
        source = InstructSource(**files, tokenizer=tok, seq_len=64, view=View(42, 9), text_cond=True)
        batch = collate([source[0]], tok.pad_id)
        assert batch.tokens[0, :9].tolist() == [tok.image_id] * 9
        features.append(model.embed(batch.tokens, batch.images, batch.image_index, image_text=batch.image_text)[0, :9])
    assert torch.equal(features[0], features[1]) and torch.equal(features[0], features[2])
    other = model.embed(batch.tokens, batch.images, image_text=[QUESTIONS[2]])[0, :9]
    assert (other - features[0]).abs().max() > 1e-3


# --- evaluation -----------------------------------------------------------------------------------------------------

@KINDS
@torch.no_grad()
def test_questions_are_asked_together_as_alone_and_as_without_a_cache(kind, tmp_path, tok):
    model = build_vlm(spec_of(kind, image_id=tok.image_id), 5).eval()
    for name, p in model.named_parameters():
        p.mul_(3 if p.dim() > 1 and 'text_cond' not in name else 1)      # far from ties
    [nn.init.constant_(model.text_cond.gates, 0.9) for _ in range(kind == 'prefix')]
    texts, examples = ['what colour is the wall ?', 'is the wall red ?'], []
    for i in range(3):
        Image.effect_noise((42, 42), 90).save(tmp_path / f'{i}.png')
        examples += [Example(f'{i}{q}', texts[q % 2], [0], str(tmp_path / f'{i}.png')) for q in range(2 + i % 2)]
    written, chosen = Task('t', 'vqav2', examples, None), Task('t', 'pope', [
        Example(e.id, e.prompt, e.answers, e.image, choices=['yes', 'no']) for e in examples], None)
    encoded, encode = [], model._encode
    model._encode = lambda images, text: encoded.extend(text) or encode(images, text)
    for task in (written, chosen):
        answers = []
        for batch_size in (1, 3, 16):
            opt = default_options(batch_size=batch_size, max_new_tokens=6, device='cpu', dtype='float32',
                                  resize='letterbox', max_bad_samples=0)
            opt.system_prompt = 'the cat'
            encoded.clear()
            answers.append(dict(ask.ask(model, tok, task, opt, ask.share(task))))
            # each image once for each of its two questions, in whatever order, choices together
            assert sorted(encoded) == sorted(3 * [tok.encode(text) for text in texts])
        for n, e in enumerate(examples):
            pixels, n_slot = ask.load_image(e.image, model.view('letterbox'))
            prompt = instruct_prompt(e.prompt, n_slot, tok, 'the cat')

            def logits(ids):                                             # the whole row each time
                x = model.embed(torch.tensor([ids]), pixels[None], image_text=[tok.encode(e.prompt)])
                return model.decoder.output(model.decoder.trunk(x))[0, len(ids) - 1].float()
            if task is written:
                ids = list(prompt)
                for _ in range(6):
                    ids.append(int(logits(ids).argmax()))
                    if ids[-1] in (tok.sep_id, tok.eot_id):
                        ids.pop()
                        break
                assert {a[n]['text'] for a in answers} == {tok.decode(ids[len(prompt):]).strip()}
            else:
                for a in answers:
                    expected = [-float(logits(prompt).log_softmax(-1)[ids[0]]) for ids in ask.choice_ids(
                        chosen.examples[n], chosen, tok)]
                    assert a[n]['nats'] == pytest.approx(expected, rel=1e-4)
    caption = Task('t', 'captions', examples[:1], None, layout='caption')
    assert ask.image_prompt(examples[0], caption, tok) == []


# --- descriptions and costs -----------------------------------------------------------------------------------------

def test_what_makes_no_sense_is_one_line():
    spec = spec_of('prefix')
    for changed, words in ((dict(encoder=PatchProjection(42).spec()), 'one tower that has blocks'),
                           (dict(text_cond=dict(kind='prefix', layers=3)), 'cond_layers=3: the encoder runs 2'),
                           (dict(text_cond=dict(kind='sum')), "text_cond='sum': expected 'none', 'append' or 'prefix'"),
                           (dict(encoder=dict(kind='dinosiglip', dinov2=DINOv2(DINOV2).spec(), fusion='channel',
                                              siglip=SigLIP(SIGLIP).spec())), 'one tower')):
        with pytest.raises(UserError, match=words):
            build_vlm(dict(spec, **changed))
    assert build_vlm(dict(spec, text_cond=dict(kind='prefix', layers=1))).text_cond.gates.shape == (1, 3)
    for wrong in (dict(layers=2), dict(kind='prefix', layers=-1), dict(kind='prefix', layers='all'), 'prefix'):
        with pytest.raises(UserError, match='text_cond'):
            check(dict(spec, text_cond=wrong), META['spec'], 'meta.json')
    check(spec, META['spec'], 'meta.json')
    with pytest.raises(UserError, match="text_cond has kind='prefix', this run's has 'none'"):
        check_spec(dict(spec=spec), spec_of(None), 'base')
    check_spec(dict(spec=spec_of(None)), spec, 'base')                   # it starts fresh
    assert text_cond_spec(dict(text_cond='prefix', cond_layers=1)) == dict(text_cond=dict(kind='prefix', layers=1))
    for kind in ('append', 'none'):
        with pytest.raises(UserError, match=f"cond_layers is of text_cond='prefix', here it is '{kind}'"):
            text_cond_spec(dict(text_cond=kind, cond_layers=1))


def test_a_run_stopped_before_the_first_question_goes_on(world, scripts, stage_1, tmp_path):
    """Captions have moments by then, text_cond has none yet."""
    args = ['pretrain.py', *mix(world, stage_1, ratio=0.5), '--instruct_share=0.1', '--text_cond=append', '--max_steps=4',
            '--save_every=1', '--keep_optimizer=all']
    scripts(*args, '--stop_after=1', f'--out_dir={tmp_path / "run"}')
    seen = meta_of(tmp_path / 'run' / 'ckpt_last')['seen']
    assert seen['captions']['n_image'] and not seen['instruct']['n_image']
    scripts(*args, f'--out_dir={tmp_path / "run"}')
    scripts(*args, f'--out_dir={tmp_path / "whole"}')
    assert meta_of(tmp_path / 'run' / 'ckpt_100')['seen']['instruct']['n_image']
    assert same_weights(tmp_path / 'run' / 'ckpt_100', tmp_path / 'whole' / 'ckpt_100')
    resumed, whole = (torch.load(tmp_path / name / 'ckpt_100' / 'optim.pt', weights_only=True) for name in ('run', 'whole'))
    assert resumed.keys() == whole.keys() and all(equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize('freeze', ['encoder', 'none'])
@pytest.mark.parametrize('tower', [SIGLIP, DINOV2])
@KINDS
def test_flops_of_an_image_are_those_of_torchs_counter(kind, tower, freeze):
    model, n = vlm(kind, tower, gate=0.1, freeze=freeze), costs.QUESTION
    if kind == 'prefix':
        model.text_cond.gates = nn.Parameter(torch.full((1, 3), 0.1))    # of the last block alone
    spec = spec_of(kind, tower)
    spec['text_cond']['layers'] = int(kind == 'prefix')
    counted = []
    for text in ([list(range(n))] * 2, None):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model.image_features(pictures(2), text).sum().backward()
        counted.append(counter.get_total_flops() // 2)
    meta = costs.meta_vlm(spec, dict(freeze=freeze))
    flops, kept = costs.image_costs(meta)
    assert flops == counted[0] > counted[1]
    share = costs.image_costs(meta, dict(instruct_share=0.25))           # of stage 2
    assert share == (round(0.25 * counted[0] + 0.75 * counted[1]), kept)
    assert costs.image_costs(meta, dict(text_share=0.0)) == (flops, kept)                # stage 3
    assert kept > costs.image_costs(costs.meta_vlm(spec_of(None, tower), dict(freeze=freeze)))[1]


# --- whole runs -----------------------------------------------------------------------------------------------------

@KINDS
def test_stage_3_adds_it_resumes_bit_for_bit_and_shares_among_processes(kind, world, scripts, stage_2, tmp_path):
    more = ('--split_turns=true',) if kind == 'append' else ('--lora_rank=2', '--lora_on=encoder')
    args = chat(world, stage_2 / 'ckpt_100', f'--text_cond={kind}', '--max_steps=3', '--warmup_ratio=0.0', *more)
    run = scripts(*args, f'--out_dir={tmp_path / "whole"}')
    assert f"encodes images alone: fresh weights of text_cond='{kind}'" in run.out
    done = tmp_path / 'whole' / 'ckpt_100'
    spec = meta_of(done)['spec']['text_cond']
    assert spec == (dict(kind='prefix', layers=0) if kind == 'prefix' else dict(kind='append'))
    assert equal({k: v for k, v in tensors(done, 'encoder').items() if 'lora' not in k},
                 tensors(stage_2 / 'ckpt_100', 'encoder'))               # frozen, all the same
    own = tensors(done, 'text_cond')
    assert len(own) == 6 + (kind == 'prefix') and (kind == 'append' or own['text_cond.gates'].abs().min() > 0)
    killed = scripts.start(*args, '--save_every=1', f'--out_dir={tmp_path / "killed"}', hook=KILL,
                           env={'KILL': 'common.optimizer_step:3'})
    assert killed.wait() == -signal.SIGKILL
    scripts(*args, '--save_every=1', f'--out_dir={tmp_path / "killed"}')
    assert same_weights(done, tmp_path / 'killed' / 'ckpt_100')
    parallel = 'ddp' if kind == 'append' else 'fsdp'                     # rows of one: some without, some of text alone
    scripts(*args, '--micro_batch_size=1', f'--parallel={parallel}', f'--out_dir={tmp_path / "two"}', world_size=2)
    assert [a['loss'] for a in steps(tmp_path / 'two')] == pytest.approx(
        [a['loss'] for a in steps(tmp_path / 'whole')], rel=1e-5)
    model, tokenizer, _ = load_vlm(str(done))                            # adapters merged
    assert isinstance(model.text_cond, TextCond) and not any('lora' in name for name in model.state_dict())
    photo = next((world / 'data' / 'instruct' / 'images').iterdir())
    out = scripts('evaluate.py', f'--ckpt={done}', f'--image={photo}', '--device=cpu', '--prompt=is the wall red ?',
                  '--max_new_tokens=4', '--n_thread=1').out
    pixels, n = ask.load_image(str(photo), model.view('letterbox'))
    question = 'is the wall red ?'
    prefix = model.prefill_images(pixels[None], [tokenizer.encode(question)])
    (new,) = model.generate([instruct_prompt(question, n, tokenizer)], prefix=prefix, max_new_tokens=4,
                            stop_ids=(tokenizer.sep_id, tokenizer.eot_id))
    assert out.endswith(f'\n{tokenizer.decode(new)}\n')
    told = scripts(*chat(world, done, '--text_cond=prefix', '--cond_layers=1', '--max_steps=1'),
                   f'--out_dir={tmp_path / "next"}').out                 # a later run keeps what its base has
    assert 'text_cond has no effect' in told and meta_of(tmp_path / 'next' / 'ckpt_100')['spec']['text_cond'] == spec


def test_stage_2_conditions_instructions_and_no_captions(world, scripts, stage_1, tmp_path):
    line = scripts.refuses('pretrain.py', *mix(world, stage_1), '--text_cond=append', f'--out_dir={tmp_path / "none"}')
    assert 'instruct_share=0' in line and line.count('\n') == 1
    args = ['pretrain.py', *mix(world, stage_1), '--text_cond=prefix', '--image_ratio=0.5', '--instruct_share=0.25',
            '--max_steps=4', '--seq_len=48']
    run = scripts(*args, f'--out_dir={tmp_path / "whole"}')
    assert "fresh weights of text_cond='prefix'" in run.out
    done = tmp_path / 'whole' / 'ckpt_100'
    assert tensors(done, 'text_cond')['text_cond.gates'].abs().min() > 0
    killed = scripts.start(*args, '--save_every=1', f'--out_dir={tmp_path / "killed"}', hook=KILL,
                           env={'KILL': 'common.optimizer_step:3'})
    assert killed.wait() == -signal.SIGKILL
    scripts(*args, '--save_every=1', f'--out_dir={tmp_path / "killed"}')
    assert same_weights(done, tmp_path / 'killed' / 'ckpt_100')
    scripts(*args, '--micro_batch_size=1', f'--out_dir={tmp_path / "two"}', world_size=2)
    assert [a['loss'] for a in steps(tmp_path / 'two')] == pytest.approx(
        [a['loss'] for a in steps(tmp_path / 'whole')], rel=1e-5)
    line = scripts.refuses('pretrain.py', *mix(world, stage_1), f'--init_from={done}',
                           f'--out_dir={tmp_path / "plain"}')
    assert "text_cond has kind='prefix', this run's has 'none'" in line
