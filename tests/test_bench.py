"""bench.py: its commands end well on a CPU, and what they print is what they say."""
import subprocess
import sys

import pytest
import torch

import bench
from conftest import child_env
from errors import UserError


def test_unknown_command_ends_in_the_usage():
    done = subprocess.run([sys.executable, bench.__file__, 'stepp'], capture_output=True, text=True, env=child_env())
    assert done.returncode == 1 and 'expected one of: step, fit, data, kernels, tune, curve, gpu' in done.stderr


def test_step_prints_the_breakdown(capsys):
    bench.step(['--stage=mix', 'config/tiny.py', '--image_ratio=0.25', '--encoder=patch', '--image_size=42', '--n_thread=1',
                '--device=cpu'])
    out = capsys.readouterr().out
    for phase in ('encoder', 'forward', 'backward', 'optimizer', 'tokens/s'):
        assert phase in out, phase


def test_step_against_transformers_prints_its_ratios(capsys):
    shape = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=300, seq_len=64, tower=(24, 48, 3, 2, 14, 56))
    n_thread = torch.get_num_threads()
    bench.peer(['--repeat=1'], shape)
    torch.set_num_threads(n_thread)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
    assert [row[0] for row in rows] == ['0', '10', '100'] and [len(row) for row in rows] == [6, 6, 7]
    for row in rows:
        ours, peer, ratio, memory = map(float, row[2:6])
        assert min(ours, peer) >= 0 and ratio > 0 and 0 < memory < 2        # printed to a tenth: 0.0 is a time, too
    with pytest.raises(UserError, match='knows --repeat=N only'):
        bench.step(['--peer=true', 'config/tiny.py'])


def test_both_sides_of_the_comparison_are_one_model():
    """The same weights in both give the same loss: they do the same work, but for ours' norms of q and k."""
    shape = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=300, seq_len=64, tower=(24, 48, 3, 2, 14, 56))
    models = bench.peer_models(shape)
    ours, theirs = models['ours'][1], models['peer'][1]
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert count(theirs.model.language_model) + count(theirs.lm_head) == count(ours.decoder) - 2 * 2 * 32
    own = [p for name, p in ours.encoder.named_parameters()]
    assert count(theirs.model.vision_tower) >= sum(p.numel() for p in own)       # it also has the layer not used
    batch = bench.synthetic_batch(dict(micro_batch_size=2, seq_len=64, seed=1, image_ratio=0.5), ours, 299,
                                  torch.device('cpu'))[:3]
    losses = [run(*batch).item() for run, _ in models.values()]
    assert all(abs(loss - torch.tensor(300.).log()) < 0.7 for loss in losses), losses        # untrained: near log V


def test_fit_finds_the_largest_micro_batch(capsys):
    bench.fit(['config/ckpt80_img10.py', '--data_dir=/nowhere', '--gpu_gib=80', '--n_gpu=8'])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-4:]]
    assert [row[:2] for row in rows] == [['ddp', 'no'], ['ddp', 'yes'], ['fsdp', 'no'], ['fsdp', 'yes']]
    for row in rows:
        assert 32 % int(row[2]) == 0 and float(row[4]) <= float(row[3]) <= 72
    assert int(rows[0][2]) <= int(rows[1][2]) and float(rows[3][4]) < float(rows[1][4])
    bench.fit(['config/finetune.py', '--script=finetune.py', '--data_dir=/nowhere', '--gpu_gib=16'])
    assert 'none fits' in capsys.readouterr().out
    for given, message in (('--n_gpu=7', 'expected a divisor of global_batch_size=256'), ('--n_gpu=x', 'such as 8'),
                           ('--gpu_gib=', 'such as 80.0')):
        with pytest.raises(UserError, match=message):
            bench.fit(['config/text.py', given])


def test_data_reads_the_real_sources(world, capsys):
    bench.data([str(world / 'data'), '--seconds=0.1', '--image_size=28', '--seq_len=48'])
    out = capsys.readouterr().out
    rates = {line.split()[0]: float(line.split()[3].replace(',', '')) for line in out.splitlines()[1:-1]}
    assert rates['text'] == 0 and rates['caption'] > 0 and rates['instruct'] > 0
    assert 'an A100 at 45% in config/ckpt80_img10.py takes' in out
    for folder, message in (('/nowhere', 'expected one data folder'), (str(world), 'no tokenizer')):
        with pytest.raises(UserError, match=message):
            bench.data([folder])


def test_memory_is_counted_inside_of_operators():
    def work():
        a = torch.ones(1000, 250)                                        # 1 MB
        b = a + 1
        del a
        torch.ones(1000, 500)
        return b
    assert bench.allocated_at_peak(work) == 3_000_000
