"""common.py: the schedules' published values, the optimizer's rules, the log."""
import json
import math
import os
import sys

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import checkpoint
import common
from common import cooldown_lr, main_lr, remaining_lr
from configurator import config_keys
from model import VLM, Decoder, ModelConfig, Projector
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


# --- schedules ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('total, final, expected', [
    (4_119_287, 1e-5, (9.055e-3, 6.559e-3, 3.469e-3, 9.662e-4)),             # paper.md, batch 512
    (8_238_574, 1e-5, (9.0505e-3, 6.5540e-3, 3.4651e-3, 9.6508e-4)),         # batch 256 (table 2)
    (4_119_287, 3e-5, (9.057e-3, 6.566e-3, 3.482e-3, 9.843e-4))])            # the DCLM records
def test_main_schedule_has_the_published_values(total, final, expected):
    for share, value in zip((0.2, 0.4, 0.6, 0.8), expected):
        lr = main_lr(round(share * total), peak=1e-2, final=final, warmup=5000, total=total)
        digits = 4 if total > 5_000_000 else 3
        assert f'{lr:.{digits}e}' == f'{value:.{digits}e}', share


def test_main_schedule_from_end_to_end():
    main = dict(peak=1.0, final=0.1, warmup=4, total=20)
    assert [main_lr(s, **main) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert main_lr(12, **main) == pytest.approx(0.55) and main_lr(20, **main) == main_lr(999, **main) == 0.1
    lrs = [main_lr(s, **main) for s in range(4, 21)]
    assert lrs == sorted(lrs, reverse=True)
    assert main_lr(0, peak=1.0, final=0.0, warmup=0, total=9) == 1.0
    assert [main_lr(s, peak=1.0, final=0.0, warmup=3, total=3) for s in (2, 3)] == [1.0, 0.0]


def test_cooldown_goes_on_where_the_main_schedule_stood():
    main = dict(peak=1e-2, final=1e-5, warmup=50, total=1000)
    start = main_lr(800, **main)
    assert cooldown_lr(0, start=start, final=1e-5, total=300) == start
    assert cooldown_lr(150, start=start, final=1e-5, total=300) == pytest.approx((start + 1e-5) / 2)
    assert all(cooldown_lr(step, start=start, final=1e-5, total=300) == 1e-5 for step in (300, 400))
    assert start - cooldown_lr(1, start=start, final=1e-5, total=300) < 1e-3 * start         # a flat start
    assert remaining_lr(0, main=main, at=800, total=300) == start
    assert remaining_lr(150, main=main, at=800, total=300) == main_lr(900, **main)
    assert remaining_lr(300, main=main, at=800, total=300) == remaining_lr(301, main=main, at=800, total=300) == 1e-5
    for step in range(201):                              # uncompressed, it is the main schedule itself
        assert remaining_lr(step, main=main, at=800, total=200) == pytest.approx(main_lr(800 + step, **main))


# --- configs --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('key, value, expected', [
    ('seq_len', 0, 'at least 1'), ('n_layer', 0, 'at least 1'), ('n_worker', -1, 'at least 0'), ('lr', 0.0, 'above 0'),
    ('micro_batch_size', 0, 'at least 1'), ('global_batch_size', 0, 'at least 1'),
    ('lr', -1.0, 'above 0'), ('weight_decay', -0.1, 'at least 0'), ('beta1', 1.5, 'below 1'),
    ('warmup_ratio', 2.0, 'below 1'), ('text_share', 1.0, 'below 1'), ('image_ratio', 1.5, 'between 0 and 1'),
    ('keep_percent', (150,), 'from 1 to 100'), ('keep_percent', (0.5,), 'from 1 to 100'),
    ('seed', -1, 'below 2**63'), ('seed', 2 ** 63, 'below 2**63'), ('n_thread', 10 ** 8, 'at most'),
    ('wandb', True, 'pip install wandb'), ('text', ('text', 1.0), 'such as'), ('text', (('text',),), 'such as'), ('captions', (('a', 'b'),), 'such as')])
def test_values_that_no_run_could_use(key, value, expected, monkeypatch):
    monkeypatch.setattr(common.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(SystemExit) as caught:
        common.check_config({'seed': 7, key: value})
    one_line(caught, f'{key}=', expected)


def test_every_shipped_config_is_usable():
    for script in ('pretrain.py', 'finetune.py'):
        defaults = {key: value for key, (value, _) in config_keys(os.path.join(ROOT, script)).items()}
        common.check_config(defaults)
        numbers = {k for k, v in defaults.items() if type(v) in (int, float)} - {'encoder_layer'}
        assert numbers <= {*common.AT_LEAST, 'lr', 'beta1', 'beta2', 'warmup_ratio', 'text_share', 'image_ratio',
                           'instruct_share', 'seed'}                                 # no number is left unchecked


def test_a_text_source_keeps_its_name_and_others_do_not_get_it():
    names = {'text': 'text', 'text/*.tar': 'text', 'text/a': 'text/a', '/x/text/*.bin': '/x/text', '*.tar': '*.tar'}
    assert {pattern: common.text_name(pattern, [pattern]) for pattern in names} == names
    assert common.text_name('a/*.tar', ['a/*.tar', 'b']) == 'a/*.tar'


# --- processes ------------------------------------------------------------------------------------------------------

def test_accumulation_says_what_would_divide():
    assert [common.accumulation(*x) for x in [(256, 8, 8), (8, 8, 1), (12, 2, 3)]] == [4, 1, 2]
    for given, words in [((12, 5, 1), '--micro_batch_size=4 would'), ((12, 5, 2), '--micro_batch_size=6 would'),
                         ((12, 2, 5), '--micro_batch_size=1 with a number of processes among [1, 2, 3, 4, 6, 12]'),
                         ((4, 8, 3), '--micro_batch_size=1 with a number of processes among [1, 2, 4] would')]:
        with pytest.raises(SystemExit) as caught:
            common.accumulation(*given)
        G, mb, W = given
        one_line(caught, f'global_batch_size={G} is not a multiple of micro_batch_size={mb} x {W} processes', words)


@pytest.mark.parametrize('message, code', [('the reason', 1), (1, 1), (0, 0)])
def test_one_of_several_processes_ends_without_a_teardown(scripts, message, code):
    """Exit handlers run and nothing printed is lost, but no object lives to see the interpreter go (see exit)."""
    hook = f"""
import atexit, os, sys, torch, common
class Witness:
    def __del__(self, write=os.write):
        write(2, b'torn down')
sys.witness = Witness()
atexit.register(print, 'handled')
print('no newline', end='; ')
common.Process(1, {{n}}, torch.device('cpu'), torch.float32).exit({message!r})
"""
    for n, torn in ((2, ''), (1, 'torn down')):
        run = scripts.start('pretrain.py', hook=hook.replace('{n}', str(n)))
        assert run.wait() == code
        assert (run.out, run.err) == ('no newline; handled\n', (message + '\n' if code and message != 1 else '') + torn)


def test_devices_and_dtypes_that_are_not_there():
    for call, word in [(lambda: common.pick_device('tpu'), "device='tpu': expected one of"),
                       (lambda: common.setup_process('cpu', 'float16'), "dtype='float16'")]:
        with pytest.raises(SystemExit) as caught:
            call()
        one_line(caught, word)
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match='--device=cpu'):
            common.pick_device('cuda')
    process = common.setup_process('cpu', n_thread=1)
    assert process.master and process.dtype == torch.float32 and process.host_sum([1, 2.5]) == [1, 2.5]


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
    assert checkpoint.load_moments(second, saved) == [f'projector.{n}' for n, _ in other.projector.named_parameters()]
    give_gradients(other)
    common.optimizer_step(second, 0.01, 1.0)
    steps = {n: int(m['step']) for n, m in checkpoint.optimizer_state(second).items()}
    assert {steps[n] for n in saved} == {4} and {v for n, v in steps.items() if n not in saved} == {1}
    for name in saved:                                   # loading copies: the saved tensors did not move
        assert int(saved[name]['step']) == 3
    saved['decoder.norm.weight'] = {k: torch.zeros(3) for k in ('step', 'exp_avg', 'exp_avg_sq')}
    with pytest.raises(ValueError, match=r'decoder.norm.weight is \(3,\), expected \(8,\)'):
        checkpoint.load_moments(tiny_optimizer(tiny_vlm()), saved)


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


# --- the log --------------------------------------------------------------------------------------------------------

def test_the_log_is_cut_to_its_checkpoint(tmp_path, capsys):
    process = common.setup_process('cpu', n_thread=1)
    line = lambda step: dict(step=step, tokens=8 * step, loss=1.0 / step, lr=0.1, grad_norm=1.0, tokens_per_s=5.0)
    logger = common.Logger(process, str(tmp_path), 0, 9)
    for step in (1, 2, 3, 4):
        logger.log(line(step))
    logger.close()
    path = tmp_path / 'log.jsonl'
    whole = path.read_text().splitlines()
    torn = ['{"step": 3, "lo', '', '[3]', '{"loss": 1}']
    path.write_text('\n'.join([*whole[:2], *torn, *whole[2:], '{"step": 2']))
    logger = common.Logger(process, str(tmp_path), 3, 9)
    logger.log(dict(step=3, val_text_loss=2.0))
    logger.log(line(4))
    logger.close()
    logged = [json.loads(text) for text in path.read_text().splitlines()]
    assert [l['step'] for l in logged] == [1, 2, 3, 3, 4] and logged[2] == line(3) and 'loss' not in logged[3]
    assert 'val_text_loss 2.0' in capsys.readouterr().out
    common.Logger(process, str(tmp_path), 0, 9).close()  # a new run starts a new log
    assert path.read_text() == '' and os.listdir(tmp_path) == ['log.jsonl']


def test_other_ranks_do_not_log(tmp_path):
    process = common.Process(1, 2, torch.device('cpu'), torch.float32)
    logger = common.Logger(process, str(tmp_path), 0, 9)
    logger.log(dict(step=1, loss=1.0))
    logger.close()
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_a_log_on_a_full_disk_ends_in_one_line(tmp_path):
    logger = common.Logger(common.setup_process('cpu', n_thread=1), str(tmp_path), 0, 9)
    logger.file = open('/dev/full', 'w', buffering=1)
    with pytest.raises(SystemExit) as caught:
        logger.log(dict(step=4, loss=1.0))
    one_line(caught, '/dev/full: cannot be written', 'step 4')
