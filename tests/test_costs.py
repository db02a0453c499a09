"""costs.py: FLOPs against torch's counter and by hand, memory against what the allocator gave out, the paper's hours."""
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import bench
import costs
import model as model_file
from adapters import set_trained
from configurator import configure
from conftest import child_env, free_port
from kernels import IGNORE_INDEX
from model import ModelConfig, build_vlm
from vision import SigLIP, SigLIPConfig

TOWER = SigLIPConfig(96, 384, 3, 3, 14, 112)                             # 64 tokens; two of its three blocks run


def spec_of(n_layer, n_embd, vocab_size, tower=None, **projector):
    decoder = dict(n_layer=n_layer, n_head=4, n_embd=n_embd, vocab_size=vocab_size, seq_len=512)
    return dict(decoder=decoder, encoder=tower and SigLIP(tower).spec(),
                projector=tower and {'kind': 'mlp2', **projector}, image_id=vocab_size - 1)


def batch_of(spec, n_row, n_position, n_image):
    """Random tokens, targets and images; image rows open with an image and keep 20 targets."""
    g = torch.Generator().manual_seed(n_row)
    V, n_token = spec['decoder']['vocab_size'], (spec['projector'] or {}).get('n_token', 64)
    tokens, targets = (torch.randint(0, V - 1, (n_row, n_position), generator=g) for _ in range(2))
    tokens[:n_image, :n_token] = V - 1
    targets[:n_image, :n_token] = targets[:n_image, n_token + 20:] = IGNORE_INDEX
    return tokens, targets, torch.zeros(n_image, 3, 112, 112, dtype=torch.uint8) if n_image else None


# --- FLOPs ---

def adapters(on='decoder', dora=False):
    return dict(rank=8, alpha=16.0, rslora=False, dora=dora, on=on, base='')


@pytest.mark.parametrize('n_image, freeze, adapted', [
    (0, 'encoder', None), (1, 'encoder', None), (2, 'none', None), (3, 'both', None), (3, 'encoder', adapters()),
    (3, 'encoder', adapters('both')), (3, 'encoder', adapters('both', dora=True))])
def test_flops_are_those_of_torchs_counter(n_image, freeze, adapted, monkeypatch, **projector):
    spec = spec_of(3, 64, 300, TOWER if n_image else None, **projector) | dict(adapters=adapted)
    model = build_vlm(spec, 0)
    set_trained(model, freeze)
    tokens, targets, images = batch_of(spec, 3, 128, n_image)

    def eager(x, weight, targets, rows=None):                            # our operator is opaque to the counter
        z = x @ weight.T
        return F.cross_entropy(z, targets, reduction='none'), z.logsumexp(1)
    monkeypatch.setattr(model_file, 'linear_cross_entropy', eager)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss, _, _ = model(tokens, targets, images)
        loss.backward()
    counted = counter.get_total_flops()
    c, n_kept = ModelConfig(**spec['decoder']), int((targets != IGNORE_INDEX).sum())
    per_image, _ = costs.image_costs(costs.meta_vlm(spec, dict(freeze=freeze)))
    ours = costs.decoder_flops(c, 3, 128, n_kept, **costs.what_trains(model.decoder)) + n_image * per_image
    # the one difference: the counter's attention computes all pairs, hidden ones too
    hidden = 128 * 128 - 128 * 129 // 2
    ours += 6 * c.n_layer * 2 * c.n_embd * 3 * hidden
    if adapted and adapted['dora']:
        # and DoRA's norms: B A of each layer, in the decoder not counted, in the encoder for three images at once
        tower = 2 * 2 * 8 * (4 * 96 ** 2 + 2 * 96 * 384)
        ours += 2 * 3 * 8 * (4 * c.n_embd ** 2 + 3 * c.n_embd * c.n_ffn) - 2 * tower
    assert ours == counted


PROJECTORS = [dict(kind='linear'), dict(kind='mlp4'), dict(kind='attn'), dict(kind='perceiver', n_token=50),
              dict(n_token=16), dict(kind='attn', n_token=100)]


@pytest.mark.parametrize('freeze', ['encoder', 'none'])
@pytest.mark.parametrize('projector', PROJECTORS)
def test_flops_of_every_projector_are_those_of_torchs_counter(projector, freeze, monkeypatch):
    test_flops_are_those_of_torchs_counter(2, freeze, None, monkeypatch, **projector)


def test_flops_of_an_image_by_hand():
    C, hidden, n, width = 96, 384, 64, 64
    forward = 2 * n * (3 * 14 ** 2 * C + 2 * (4 * C * C + 2 * C * hidden)) + 2 * 4 * n * n * C
    projector = 2 * n * (C * 4 * C * 2 + 4 * C * width * 3)              # no gradient of a frozen encoder's features
    per_image, _ = costs.image_costs(costs.meta_vlm(spec_of(3, width, 300, TOWER), dict(freeze='encoder')))
    assert per_image == forward + projector
    assert costs.image_costs(costs.meta_vlm(spec_of(3, width, 300), dict(freeze='encoder'))) == (0, 0)
    split = costs.meta_vlm(dict(spec_of(3, width, 300, TOWER), view={'shortest': 43, 'split': True}), dict(freeze='encoder'))
    assert costs.image_costs(split)[0] == 5 * per_image and split.n_slot == 5 * n        # of the largest image


@pytest.mark.parametrize('freeze', ['none', 'encoder'])
def test_weights_are_no_part_of_what_an_image_keeps(freeze):
    one_patch = SigLIPConfig(96, 384, 3, 3, 14, 14)
    described = costs.meta_vlm(spec_of(2, 64, 300, one_patch), dict(freeze=freeze))
    weights = 4 * sum(p.numel() for p in described.projector.parameters())
    assert 0 < costs.image_costs(described)[1] < weights / 4


def test_counting_draws_no_random_number():
    spec, before = spec_of(2, 64, 300, TOWER), torch.get_rng_state()
    costs.image_costs(costs.meta_vlm(spec, dict(freeze='none')))
    assert torch.equal(torch.get_rng_state(), before)


def config_of(*argv, script='pretrain.py'):
    return configure({'__file__': os.path.join(ROOT, script), '__doc__': ''}, list(argv))


def test_the_papers_stage_1_is_74_000_a100_hours(capsys):
    config = config_of('config/text.py')
    costs.print_cost(config, model_file.vlm_spec(config, 0, False), out_dir='out', max_steps=8_238_574, n_keep=5)
    out = capsys.readouterr().out
    assert 'decoder 1,439,893,504' in out and '4,319,385,485,312 tokens' in out
    hours = float(out.split('GPU hours: ')[1].split()[0].replace(',', ''))
    # 8 FLOPs a parameter and token with attention at 2048, as PaLM counts, within a percent
    c = ModelConfig(**model_file.vlm_spec(config, 0, False)['decoder'])
    per_token = 6 * (1_439_893_504 - c.vocab_size * c.n_embd) + 6 * c.n_layer * c.n_embd * 2048
    assert hours == pytest.approx(4.3193854e12 * per_token / (312e12 * 0.45 * 3600), rel=0.01)
    assert hours == pytest.approx(74_000, rel=0.01) and '45%' in out


def test_the_share_of_a_gpus_peak(monkeypatch):
    for name, peak in (('NVIDIA A100-SXM4-80GB', 312e12), ('NVIDIA H100 PCIe', 756e12), ('NVIDIA H200', 989e12)):
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device, name=name: name)
        assert costs.model_flops_utilisation(peak / 2, torch.device('cuda')) == 0.5
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'an unknown GPU')
    assert costs.model_flops_utilisation(1e12, torch.device('cuda')) is None
    assert costs.model_flops_utilisation(1e12, torch.device('cpu')) is None


# --- memory ---

SHARDED = """
import json, sys
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import bench
from model import build_vlm
torch.set_num_threads(1)
dist.init_process_group('gloo')
mesh = init_device_mesh('cpu', (2,))
for spec, B, T, checkpointing in json.loads(sys.argv[1]):
    model = build_vlm(spec, 0)
    for module in (*model.decoder.layers, model):                            # a group a block, the rest the root's
        fully_shard(module, mesh=mesh)
    model.decoder.activation_checkpointing = checkpointing
    tokens = torch.randint(0, spec['decoder']['vocab_size'] - 1, (B, T))
    def micro_step():
        model(tokens, tokens)[0].backward()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    micro_step()
    optimizer.step()
    held = [p for p in model.parameters() for _ in range(2)] + [t for s in optimizer.state.values() for t in s.values()]
    held = sum(4 * (t.to_local() if hasattr(t, 'to_local') else t).numel() for t in held)
    print('measured', held + bench.allocated_at_peak(micro_step))
dist.destroy_process_group()
"""


def test_memory_of_a_sharded_model_is_what_two_processes_allocate():
    cases = [(spec_of(4, 256, 1000), 2, 64, False), (spec_of(4, 256, 1000), 2, 64, True),
             (spec_of(2, 128, 12000), 2, 100, False)]
    port = str(free_port())
    ranks = [subprocess.Popen([sys.executable, '-c', SHARDED, json.dumps(cases)], text=True, cwd=ROOT,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              env=child_env(RANK=str(r), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port,
                                            GLOO_SOCKET_IFNAME='lo', PYTHONPATH=ROOT)) for r in range(2)]
    for rank in ranks:
        out, err = rank.communicate(timeout=300)
        assert rank.returncode == 0, err
        measured = [int(line.split()[1]) for line in out.splitlines() if line.startswith('measured')]
        for (spec, B, T, checkpointing), number in zip(cases, measured, strict=True):
            parts = costs.memory(costs.meta_vlm(spec, dict(freeze='encoder')), n_row=B, n_position=T, width=4, parallel='fsdp',
                                 checkpointing=checkpointing, n_process=2)
            assert sum(parts.values()) == pytest.approx(number, rel=0.1), parts


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('shape, n_image, freeze', [
    ((4, 128, 512), 0, 'encoder'), ((2, 128, 12000), 0, 'encoder'), ((5, 192, 1000), 1, 'encoder'),
    ((5, 192, 1000), 3, 'none'), ((5, 192, 1000), 3, 'both'), ((5, 192, 1000), 3, 'lora'), ((5, 192, 1000), 3, 'dora'),
    ((2, 128, 12000), 0, 'lora')])
def test_memory_is_what_the_allocator_gives_out(shape, n_image, freeze, checkpointing, **projector):
    spec = spec_of(*shape, TOWER if n_image else None, **projector)
    if freeze in ('lora', 'dora'):
        spec, freeze = spec | dict(adapters=adapters(dora=freeze == 'dora')), 'encoder'
    model = build_vlm(spec, 0)
    set_trained(model, freeze)
    model.decoder.activation_checkpointing = checkpointing
    tokens, targets, images = batch_of(spec, 3, 200, n_image)

    def micro_step():
        loss, _, _ = model(tokens, targets, images)
        loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    micro_step()
    optimizer.step()                                                     # moments are there, and gradients stay
    held = sum(4 * p.numel() for p in [*model.parameters(), *trained])
    held += sum(t.numel() * t.element_size() for state in optimizer.state.values() for t in state.values())
    measured = held + bench.allocated_at_peak(micro_step)
    described = costs.meta_vlm(spec, dict(freeze=freeze))
    _, per_image = costs.image_costs(described)
    parts = costs.memory(described, n_row=3, n_position=200, n_image=n_image, per_image=per_image, width=4,
                         n_kept=int((targets != IGNORE_INDEX).sum()), checkpointing=checkpointing)
    assert sum(parts.values()) == pytest.approx(measured, rel=0.1), parts


@pytest.mark.parametrize('projector', PROJECTORS[1:5])
def test_memory_with_every_projector_is_what_the_allocator_gives_out(projector):
    test_memory_is_what_the_allocator_gives_out((5, 192, 1000), 3, 'none', False, **projector)
