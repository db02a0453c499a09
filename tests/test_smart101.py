"""reasoner.py, and smart101.py as a process on tinypuzzles.py's small puzzles: parts, heads, losses, kills."""
import json
import os
import re
import signal
import sys

import pytest
import torch
import torch.nn.functional as F

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import tinypuzzles
from conftest import meta_of, read_log, same_weights, steps
from model import VLM, Decoder, ModelConfig
from puzzles import N_STEP
from reasoner import QFormer, Reasoner, answer_loss
from test_pretrain import KILL
from vision import SigLIP, SigLIPConfig

PAD = 31
N_CLASS = {2: 5, 3: 7, 18: 6}


def reasoner(parts='both', qformer=True, shared=False, answer='class', width=8):
    torch.manual_seed(0)
    decoder = Decoder(ModelConfig(2, 2, 16, vocab_size=32, seq_len=16, n_ffn=32))
    vlm = VLM(decoder, SigLIP(SigLIPConfig(12, 24, 2, 2, 7, 14)) if parts != 'question' else None)
    n_class = {2: 5, 3: 7} if shared else N_CLASS
    return Reasoner(vlm, n_class, parts=parts, qformer=qformer, shared=shared, answer=answer,
                    width=width, n_query=3, dropout=0.0, pad_id=PAD)


def rows(seed=0, n=6):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 30, (n, 5), generator=g), torch.randint(0, 256, (n, 3, 14, 14), generator=g).byte()


def said(model, tokens, images, puzzles):
    """{row: its scores (S,n)} of a model's answers."""
    return {int(i): s for which, scores in model(tokens, images, puzzles) for i, s in zip(which, scores)}


def test_the_qformer_reads_the_question_and_the_patches():
    """The released layer gives the same for every text (its keys are one pooled image vector): this one must not."""
    g = torch.Generator().manual_seed(1)
    torch.manual_seed(2)
    layer = QFormer(8, 3, 0.0)
    patches, text = torch.randn(2, 4, 8, generator=g), torch.randn(2, 5, 8, generator=g)
    hidden = torch.zeros(2, 5, dtype=torch.bool)
    out = layer(patches, text, hidden)
    assert out.shape == (2, 3, 8)
    moved = text.clone()
    moved[0, 3] += torch.randn(8, generator=g)
    assert (layer(patches, moved, hidden)[0] - out[0]).abs().max() > 1e-3
    assert torch.equal(layer(patches, moved, hidden)[1], out[1])
    hidden[0, 3] = True                                                  # a pad: what it holds is not seen
    assert torch.allclose(layer(patches, moved, hidden), layer(patches, text, hidden), atol=1e-6)
    moved = patches.clone()
    moved[0, 1] += torch.randn(8, generator=g)                           # one patch, not their mean, is read
    hidden[:] = True
    assert (layer(moved, text, hidden)[0] - layer(patches, text, hidden)[0]).abs().max() > 1e-3
    out.square().sum().backward()
    grads = layer.queries.grad
    assert (grads[0] - grads[1]).abs().max() > 0                         # queries do not stay alike


def test_attention_is_softmax_over_queries_and_question():
    torch.manual_seed(3)
    layer, patches, text = QFormer(16, 3, 0.0).double(), torch.randn(1, 4, 16).double(), torch.randn(1, 5, 16).double()
    hidden = torch.tensor([[False, False, False, True, True]])
    heads = lambda y: y.unflatten(-1, (8, 2)).transpose(0, 1)            # (8,T,2)

    def attend(m, q, kv):
        (wq, wk, wv), (bq, bk, bv) = m.in_proj_weight.chunk(3), m.in_proj_bias.chunk(3)
        a = torch.softmax(heads(q @ wq.T + bq) @ heads(kv @ wk.T + bk).mT / 2 ** 0.5, -1)
        return m.out_proj((a @ heads(kv @ wv.T + bv)).transpose(0, 1).flatten(1))
    n, x = layer.norms, layer.queries
    keys = n[0](torch.cat((x, text[0, :3])))                             # without the pads
    x = x + attend(layer.to_text, keys[:3], keys)
    x = x + attend(layer.to_patches, n[2](x), n[1](patches[0]))
    x = x + layer.feed_forward(x)
    assert torch.allclose(layer(patches, text, hidden)[0], x, atol=1e-12)


@pytest.mark.parametrize('parts, qformer', [('both', True), ('both', False), ('image', True), ('image', False),
                                            ('question', True)])
def test_each_part_sees_what_it_is_shown(parts, qformer):
    model, puzzles = reasoner(parts, qformer), [2, 3, 18, 3, 2, 2]
    tokens, images = rows()
    other_tokens, other_images = rows(1)
    images, other_images = (None, None) if parts == 'question' else (images, other_images)
    out = said(model, tokens, images, puzzles)
    assert [tuple(out[i].shape) for i in range(6)] == [(N_STEP if p == 18 else 1, N_CLASS[p]) for p in puzzles]
    same = lambda a, b: all(torch.allclose(a[i], b[i], atol=1e-3) for i in a)       # queries are small, their norm not
    assert same(out, said(model, other_tokens, images, puzzles)) == (parts == 'image')
    if images is not None:
        assert not same(out, said(model, tokens, other_images, puzzles))
    padded = F.pad(tokens, (0, 4), value=PAD)                            # pads and company change no answer
    assert same(out, said(model, padded, images, puzzles))
    alone = said(model, tokens[2:3], None if images is None else images[2:3], [18])
    assert torch.allclose(alone[0], out[2], atol=1e-3)
    model(torch.full_like(tokens, PAD), images, puzzles)                 # an empty question is no nan
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(n.startswith('reasoner.') for n in trained) and ('qformer' in model.reasoner) == (
        qformer and parts != 'question')
    targets = torch.zeros(6, N_STEP, dtype=torch.int64)
    loss, _ = answer_loss(model(tokens, images, puzzles), targets, torch.ones(6), 'class')
    loss.backward()
    idle = {n for n in trained if model.get_parameter(n).grad is None}
    assert not idle, idle


def test_heads_are_of_one_puzzle_or_of_all():
    tokens, images = rows()
    own, shared = reasoner(), reasoner(shared=True)
    a, b = (model(tokens, images, [2, 2, 3, 3, 2, 3]) for model in (own, shared))
    assert [w.tolist() for w, _ in a] == [[0, 1, 4], [2, 3, 5]] and [s.shape[-1] for _, s in a] == [5, 7]
    assert [w.tolist() for w, _ in b] == [[0, 1, 2, 3, 4, 5]] and b[0][1].shape == (6, 1, 7)
    shared(tokens, images, [61] * 6)                                     # a puzzle that was never trained on


@pytest.mark.parametrize('answer', ['class', 'value'])
def test_losses_against_a_loop(answer):
    g = torch.Generator().manual_seed(4)
    n = 6 if answer == 'class' else 1
    found = [(torch.tensor([0, 2]), torch.randn(2, 1, n, generator=g)),
             (torch.tensor([1]), torch.randn(1, N_STEP, n, generator=g))]
    targets, weights = torch.randint(0, 6, (3, 12), generator=g), torch.rand(3, generator=g)
    total, row_loss = answer_loss(found, targets, weights, answer)
    expected = torch.zeros(3)
    for which, scores in found:
        for i, s in zip(which, scores):
            for y, v in zip(targets[i], s):
                expected[i] += -torch.log_softmax(v, -1)[y] if answer == 'class' else abs(v[0] - y)
    assert torch.allclose(row_loss[0], expected, atol=1e-5) and torch.equal(row_loss[1], torch.zeros(3))
    assert torch.allclose(total, (weights * expected).sum(), atol=1e-5)


def test_it_learns():
    """Four rows by heart, of which neither question nor picture alone tells the answer."""
    model, (tokens, images) = reasoner(width=32), rows()
    tokens, images, targets = tokens[[0, 0, 1, 1]], images[[0, 1, 0, 1]], torch.tensor([[0], [1], [1], [0]])
    optimizer = torch.optim.Adam(model.reasoner.parameters(), 3e-3)
    for _ in range(30):
        loss, _ = answer_loss(model(tokens, images, [2] * 4), targets, torch.full((4,), 0.25), 'class')
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


# --- the script -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='session')
def smart(world, stage_2):
    """The arguments of a run of 6 steps of 12 rows on seven puzzles, its base being stage 2's."""
    folder = world / 'data' / 'SMART101-Data'
    tinypuzzles.write_puzzles(str(folder), 20, seed=5, puzzles=(2, 7, 18, 25, 44, 58, 62))
    return ['smart101.py', f'--data_dir={world / "data"}', f'--init_from={stage_2 / "ckpt_100"}', '--width=16',
            '--n_query=3', '--n_thread=1', '--n_worker=0', '--global_batch_size=12',
            '--micro_batch_size=6', '--max_steps=6', '--lr=3e-3', '--eval_every=3', '--log_every=1']


@pytest.fixture(scope='session')
def whole(smart, scripts, tmp_path_factory):
    out = tmp_path_factory.mktemp('smart101')
    scripts(*smart, f'--out_dir={out}')
    return out


def test_a_run_is_scored_logged_and_kept(whole, stage_2):
    lines = steps(whole)
    assert len(lines) == 6 and sum(s['n_sample'] for s in lines[-1]['sources'].values()) == 72
    assert set(lines[0]['sources']) == {f'puzzle_{n}' for n in (2, 7, 18, 25, 44, 58, 62)} and lines[0]['mfu'] is None
    scores = [line for line in read_log(whole) if 'S_acc' in line]
    result = json.loads((whole / 'smart101.json').read_text())
    assert [line['step'] for line in scores] == [3, 6] and scores[-1]['S_acc'] == result['val']['S_acc']
    assert result['test']['n'] == 21 and set(result['test']['puzzles']) == set('2 7 18 25 44 58 62'.split())
    assert result['config']['parts'] == 'both'
    meta = meta_of(whole / 'ckpt_100')
    assert meta['stage'] == 'smart101' and meta['base']['stage'] == 'mix'
    assert (whole / 'ckpt_100' / 'encoder.safetensors').stat().st_size > 0


def test_killed_and_resumed_gives_the_same_bits(smart, scripts, whole, tmp_path):
    args = [*smart, '--save_every=1', f'--out_dir={tmp_path}']
    for i, place in enumerate(('common.optimizer_step:3', 'torn torch.save:1')):
        run = scripts.start(*args, f'--n_worker={i % 2}', hook=KILL, env={'KILL': place})
        assert run.wait() == -signal.SIGKILL, f'{place}: {run.out}{run.err}'
    scripts(*args, '--micro_batch_size=6')
    for name in ('model.safetensors', 'encoder.safetensors', 'optim.pt'):
        assert same_weights(whole / 'ckpt_100', tmp_path / 'ckpt_100', name)
    assert [line['loss'] for line in steps(tmp_path)] == [line['loss'] for line in steps(whole)]
    a, b = (json.loads((out / 'smart101.json').read_text()) for out in (whole, tmp_path))
    assert a['test'] == b['test'] and 'finished: 6 of 6 steps' in scripts(*args).out
    files = [os.stat(tmp_path / name / 'encoder.safetensors').st_ino for name in ('ckpt_100', 'ckpt_step_5')]
    assert files[0] == files[1]                                          # the frozen parts are one file


@pytest.mark.parametrize('options', [
    ['--parts=question', '--split=answer', '--answer=value'],
    ['--parts=image', '--qformer=false', '--split=few_shot'],
    ['--split=puzzle', '--encoder=siglip', '--encoder_path=encoder']])
def test_parts_splits_and_encoders(smart, scripts, tmp_path, options):
    scripts(*smart, *options, '--max_steps=2', f'--out_dir={tmp_path}')
    result = json.loads((tmp_path / 'smart101.json').read_text())['test']
    if '--split=puzzle' in options:                                      # one head, for a puzzle not trained on
        assert set(result['puzzles']) == {'62'} and result['n'] == 3
    assert (meta_of(tmp_path / 'ckpt_100')['spec']['encoder'] is None) == ('--parts=question' in options)


def test_bad_rows_stop_a_run_or_are_replaced_and_counted(smart, scripts, tmp_path):
    data = tmp_path / 'SMART101-Data'
    tinypuzzles.write_puzzles(str(data), 20, seed=6, puzzles=(2, 44))
    path = data / '2' / 'puzzle_2.csv'
    lines = path.read_text().splitlines()
    lines[3] = re.sub('puzzle_2_3', 'puzzle_44_3', lines[3])             # of another puzzle, in train
    path.write_text('\n'.join(lines) + '\n')
    (data / '44' / 'img' / 'puzzle_44_1.png').write_bytes(b'no image')   # in train
    args = [*smart, f'--data_dir={tmp_path}', f'--out_dir={tmp_path / "out"}']
    assert 'row 3: its image' in scripts.refuses(*args)
    assert '1 rows left out' in scripts(*args, '--max_bad_samples=9').out
    bad = meta_of(tmp_path / 'out' / 'ckpt_100')['bad_samples']
    assert bad and all('puzzle_44_1.png' in message for message in bad)
    (data / '44' / 'img' / 'puzzle_44_20.png').write_bytes(b'no image')  # in test, whose scores are of all rows
    assert 'puzzle_44_20.png' in scripts.refuses(*args, '--max_bad_samples=9', f'--out_dir={tmp_path / "two"}')
    assert not (tmp_path / 'two').exists(), 'before the first step'


def test_mistakes_are_one_line(smart, scripts, stage_1, tmp_path):
    out = f'--out_dir={tmp_path / "x"}'
    for options, words in ((['--width=15'], 'width=15: expected a multiple of 8'), (['--puzzles=none'], 'zenodo'),
                           ([f'--init_from={stage_1 / "ckpt_100"}'], 'text-only: give --encoder=siglip')):
        assert words in scripts.refuses(*smart, out, *options)
    dry = scripts(*smart, out, '--dry_run=true').out
    assert '7 puzzles, 112 rows to train on: 6 steps' in dry and not (tmp_path / 'x').exists()
