"""vision.py: towers against transformers (test-only) on random weights, files that are wrong, and the loss."""
import json
import os
import random
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (BitImageProcessor, Dinov2Config, Dinov2ForImageClassification, Dinov2Model,
                          Dinov2WithRegistersConfig, Dinov2WithRegistersModel, Siglip2VisionConfig, Siglip2VisionModel,
                          SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipVisionConfig, SiglipVisionModel)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import vision
import vit
from test_hostile import retype
from vision import DINOv2, DINOv2Config, PatchProjection, SigLIP, SigLIPConfig

TINY = dict(hidden_size=48, intermediate_size=100, num_hidden_layers=3, num_attention_heads=3, patch_size=14,
            image_size=30)


def tiny(seed=0, **kw):
    torch.manual_seed(seed)
    model = SigLIP(SigLIPConfig(**{**TINY, **kw.pop('config', {})}), **kw)
    for p in model.parameters():                       # biases and gains away from 0 and 1, so that all count
        p.data += 0.1 * torch.randn_like(p)
    return model


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# --- SigLIP against transformers ---------------------------------------------------------------------------------

def hf_model(**kw):
    torch.manual_seed(1)
    model = SiglipVisionModel(SiglipVisionConfig(**{**TINY, **kw})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


@pytest.mark.parametrize('kw', [
    {}, {'image_size': 42}, {'image_size': 41},
    {'hidden_size': 64, 'num_attention_heads': 4, 'patch_size': 8, 'image_size': 39, 'num_hidden_layers': 2},
    {'hidden_size': 144, 'num_attention_heads': 2, 'intermediate_size': 538},               # so400m's head_dim 72
    {'hidden_act': 'gelu', 'layer_norm_eps': 1e-3}])
def test_features_match_transformers(kw, tmp_path):
    theirs = hf_model(**kw)
    theirs.save_pretrained(tmp_path)
    size = theirs.config.image_size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        out = theirs(images, output_hidden_states=True)
        penultimate = SigLIP.from_pretrained(tmp_path)
        last = SigLIP.from_pretrained(tmp_path, layer=-1, norm=True)
        torch.testing.assert_close(penultimate(images), out.hidden_states[-2], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(last(images), out.last_hidden_state, atol=1e-4, rtol=1e-4)
        first = SigLIP.from_pretrained(tmp_path, layer=0)
        torch.testing.assert_close(first(images), out.hidden_states[0], atol=1e-5, rtol=1e-5)
    assert penultimate(images).shape == (2, penultimate.n_token, penultimate.width)
    assert len(penultimate.encoder['layers']) == theirs.config.num_hidden_layers - 1
    assert penultimate.post_layernorm is None


def test_parameter_counts_of_so400m():
    config = SigLIPConfig()
    with torch.device('meta'):
        whole, used = SigLIP(config, layer=-1, norm=True), SigLIP(config)
        theirs = SiglipVisionModel(SiglipVisionConfig(
            hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, patch_size=14,
            image_size=384))
    towers = {'whole': whole, 'used': used, 'theirs': theirs}
    count = {name: sum(p.numel() for p in tower.parameters()) for name, tower in towers.items()}
    head = sum(p.numel() for name, p in theirs.named_parameters() if 'head.' in name)
    assert count == {'whole': 412_987_248, 'used': 397_745_440, 'theirs': 428_225_600}
    assert count['whole'] + head == 428_225_600
    names = {n.removeprefix('vision_model.') for n, _ in theirs.named_parameters()}
    assert {n for n, _ in whole.named_parameters()} == {n for n in names if not n.startswith('head.')}
    assert (used.n_token, used.width) == (729, 1152)


def test_saved_tower_is_read_by_transformers(tmp_path):
    ours = tiny(layer=-2, keep_all=True)
    ours.save_pretrained(tmp_path)
    theirs, info = SiglipVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info
    images = torch.randn(2, 3, 30, 30)
    with torch.no_grad():
        out = theirs.eval()(images, output_hidden_states=True)
        torch.testing.assert_close(ours(images), out.hidden_states[-2], atol=1e-5, rtol=1e-5)
        last = SigLIP.from_pretrained(tmp_path, layer=-1, norm=True)
        torch.testing.assert_close(last(images), out.last_hidden_state, atol=1e-5, rtol=1e-5)


# --- SigLIP files ------------------------------------------------------------------------------------------------

def test_round_trip_is_exact_and_keeps_mean_and_std(tmp_path):
    ours = tiny(layer=-1, norm=True)
    ours.mean, ours.std = (0.48, 0.45, 0.40), (0.2, 0.3, 0.25)
    ours.save_pretrained(tmp_path)
    images = torch.from_numpy(pixels(2, 3, 30, 30))
    again = SigLIP.from_pretrained(str(tmp_path), layer=-1, norm=True)
    assert (again.mean, again.std) == (ours.mean, ours.std)
    assert torch.equal(again(images), ours(images))
    normalised = (images / 255 - torch.tensor(ours.mean).view(3, 1, 1)) / torch.tensor(ours.std).view(3, 1, 1)
    torch.testing.assert_close(again(normalised), ours(images), atol=1e-5, rtol=1e-5)


def test_config_dict_rebuilds_the_encoder():
    ours = tiny(layer=-1, norm=True)
    ours.mean = (0.1, 0.2, 0.3)
    again = vision.build_encoder(json.loads(json.dumps(ours.spec())))
    again.load_state_dict(ours.state_dict())
    images = torch.from_numpy(pixels(1, 3, 30, 30))
    assert torch.equal(again(images), ours(images))
    patch = PatchProjection(30, 5)
    again = vision.build_encoder(json.loads(json.dumps(patch.spec())))
    assert torch.equal(again(images), patch(images))
    with pytest.raises(ValueError, match="encoder description: kind 'eye', expected one of"):
        vision.build_encoder({'kind': 'eye'})
    with pytest.raises(ValueError, match='encoder description'):
        vision.build_encoder({'kind': 'siglip', 'config': {'depth': 3}})


def test_cut_tower_reloads_at_its_layer_and_refuses_to_pass_for_whole(tmp_path):
    ours = tiny()
    ours.save_pretrained(tmp_path)
    assert json.load(open(tmp_path / 'config.json'))['num_hidden_layers'] == 2
    images = torch.randn(1, 3, 30, 30)
    assert torch.equal(SigLIP.from_pretrained(tmp_path)(images), ours(images))
    with pytest.raises(ValueError, match='layer=-1 of 3 needs 3 blocks, the file holds 2'):
        SigLIP.from_pretrained(tmp_path, layer=-1)
    with pytest.raises(ValueError, match='lacks post_layernorm'):
        SigLIP.from_pretrained(tmp_path, norm=True)


@pytest.mark.parametrize('layout', ['prefixed', 'plain', 'whole SigLIP', 'shards', 'bare file', 'half precision'])
def test_file_layouts(layout, tmp_path):
    ours = tiny(keep_all=True, config={'hidden_size': 128, 'num_attention_heads': 2})
    ours.save_pretrained(tmp_path)
    file = tmp_path / 'model.safetensors'
    tensors, config, path, tol = load_file(file), json.load(open(tmp_path / 'config.json')), tmp_path, 0
    if layout == 'plain':
        tensors = {k.removeprefix('vision_model.'): v for k, v in tensors.items()}
    if layout == 'whole SigLIP':
        tensors |= {'text_model.encoder.layers.0.layer_norm1.weight': torch.ones(3), 'logit_scale': torch.ones(1),
                    'vision_model.head.probe': torch.ones(1, 1, 128),
                    'vision_model.embeddings.position_ids': torch.arange(4)}
        config = {'model_type': 'siglip', 'text_config': {'hidden_size': 5}, 'vision_config': config}
    if layout == 'half precision':
        tensors, tol = {k: v.to(torch.bfloat16) for k, v in tensors.items()}, 0.1
    json.dump(config, open(tmp_path / 'config.json', 'w'))
    save_file(tensors, file)
    if layout == 'shards':
        names = sorted(tensors)
        parts = {'model-00001-of-00002.safetensors': names[::2], 'model-00002-of-00002.safetensors': names[1::2]}
        for name, keys in parts.items():
            save_file({k: tensors[k] for k in keys}, tmp_path / name)
        weight_map = {k: name for name, keys in parts.items() for k in keys}
        json.dump({'weight_map': weight_map}, open(tmp_path / 'model.safetensors.index.json', 'w'))
        file.unlink()
    images = torch.randn(1, 3, 30, 30)
    if layout == 'bare file':                           # of another name, its config.json beside it
        path = file.rename(tmp_path / 'tower.safetensors')
    loaded = SigLIP.from_pretrained(path)
    assert next(loaded.parameters()).dtype == torch.float32
    torch.testing.assert_close(loaded(images), ours(images), atol=tol, rtol=tol)


BIAS = 'vision_model.encoder.layers.1.mlp.fc1.bias'


@pytest.mark.parametrize('damage, message', [
    (lambda t, c: t.pop(BIAS), 'lacks encoder.layers.1.mlp.fc1.bias'),
    (lambda t, c: t.pop('vision_model.' + vit.PATCH_KEY), 'no siglip tower'),
    (lambda t, c: t.update({BIAS: torch.ones(7)}), r'fc1.bias is \(7,\), this model.s is \(100,\)'),
    (lambda t, c: t.update({BIAS: torch.ones(100).int()}), 'fc1.bias is I32'),
    (lambda t, c: c.update(num_hidden_layers=4), 'num_hidden_layers=4, the weights hold 3'),
    (lambda t, c: c.update(num_attention_heads=5), 'hidden_size=48 is not a multiple of num_attention_heads=5'),
    (lambda t, c: c.update(hidden_act='quick_gelu'), "hidden_act='quick_gelu'"),
    (lambda t, c: c.update(image_size='big'), "'image_size' is 'big', expected int"),
    (lambda t, c: c.update(vision_config=3), 'expected a JSON object'),
    (lambda t, c: c.update(model_type='clip'), "model_type 'clip'")])
def test_damaged_folder_is_named_in_one_line(damage, message, tmp_path):
    tiny(keep_all=True).save_pretrained(tmp_path)
    tensors, config = load_file(tmp_path / 'model.safetensors'), json.load(open(tmp_path / 'config.json'))
    damage(tensors, config)
    save_file(tensors, tmp_path / 'model.safetensors')
    json.dump(config, open(tmp_path / 'config.json', 'w'))
    with pytest.raises(ValueError, match=message) as error:
        SigLIP.from_pretrained(tmp_path)
    assert '\n' not in str(error.value) and str(tmp_path) in str(error.value)


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(ValueError, match='nothing is there'):
        SigLIP.from_pretrained(str(tmp_path / 'absent'))
    with pytest.raises(ValueError, match='model.safetensors: no such file'):
        SigLIP.from_pretrained(str(tmp_path))
    tiny().save_pretrained(tmp_path)
    (tmp_path / 'preprocessor_config.json').write_text('{"image_std": [0.5, 0, 0.5]}')
    with pytest.raises(ValueError, match="preprocessor_config.json: 'image_std'"):
        SigLIP.from_pretrained(str(tmp_path))
    (tmp_path / 'config.json').write_text('{"hidden_size":')
    with pytest.raises(ValueError, match='config.json: not readable as JSON'):
        SigLIP.from_pretrained(str(tmp_path))
    file = tmp_path / 'model.safetensors'
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match='model.safetensors: not readable as safetensors'):
        SigLIP.from_pretrained(str(tmp_path))


def test_config_defaults_are_transformers_where_the_file_is_silent():
    theirs = {'siglip': SiglipVisionConfig(), 'siglip_vision_model': SiglipVisionConfig(), 'dinov2': Dinov2Config(),
              'dinov2_with_registers': Dinov2WithRegistersConfig()}
    ours = {**vit.HF_DEFAULTS['siglip'], **vit.HF_DEFAULTS['dinov2']}
    assert ours == {kind: {key: getattr(theirs[kind], key) for key in keys} for kind, keys in ours.items()}


# --- SigLIP as a module ------------------------------------------------------------------------------------------

def test_wrong_images_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match=r'\(1, 3, 28, 30\): expected \(N, 3, 30, 30\)'):
        model(torch.zeros(1, 3, 28, 30))
    with pytest.raises(ValueError, match='int64: expected uint8'):
        model(torch.zeros(1, 3, 30, 30, dtype=torch.int64))
    for layer in (-5, 4):
        with pytest.raises(ValueError, match=f'layer={layer}: the tower has 3 blocks'):
            tiny(layer=layer)


def test_returns_float32_under_autocast_and_in_bfloat16():
    images = torch.from_numpy(pixels(2, 3, 30, 30))
    model = tiny()
    truth = model(images)
    with torch.autocast('cpu', torch.bfloat16):
        mixed = model(images)
    low = model.bfloat16()(images)
    assert mixed.dtype == low.dtype == torch.float32
    scale = truth.std()
    assert (mixed - truth).std() < 0.02 * scale and (low - truth).std() < 0.04 * scale


def test_bfloat16_keeps_more_than_256_positions_apart():
    model = SigLIP(SigLIPConfig(8, 8, 1, 1, patch_size=2, image_size=36), layer=0).bfloat16()      # 324 positions
    model.embeddings['position_embedding'].weight.data = torch.arange(324.).repeat(8, 1).T.bfloat16()
    model.embeddings['patch_embedding'].weight.data.zero_()
    assert torch.equal(model(torch.zeros(1, 3, 36, 36))[0, :, 0], torch.arange(324.).bfloat16().float())


def test_compiles_without_graph_breaks():
    model = tiny()
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    images = torch.from_numpy(pixels(2, 3, 30, 30))
    torch.testing.assert_close(compiled(images), model(images))


def test_every_parameter_of_a_trained_tower_gets_a_gradient():
    model = tiny(layer=-1, norm=True)
    model(torch.from_numpy(pixels(2, 3, 30, 30))).square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name


def test_patch_projection_is_a_convolution_waiting_for_its_weight():
    encoder = PatchProjection(30)
    images = torch.from_numpy(pixels(2, 3, 30, 30))
    assert (encoder.n_token, encoder.width) == (4, 588)
    assert not list(encoder.parameters())
    weight = torch.randn(7, 3, 14, 14)
    expected = F.conv2d((images / 255 - 0.5) / 0.5, weight, stride=14).flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder(images) @ weight.flatten(1).T, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match='patch_size=14 with image_size=10'):
        PatchProjection(10)


# --- resolutions, DINOv2, and the two together, against transformers --------------------------------------------------

def perturbed(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():                    # registers, CLS, biases and gains away from 0 and 1
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model.eval()


def hf_dino(registers, **kw):
    torch.manual_seed(1)
    shape = {**dict(hidden_size=40, num_hidden_layers=3, num_attention_heads=2, patch_size=14, image_size=70), **kw}
    if registers:
        return perturbed(Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**shape, num_register_tokens=registers)))
    return perturbed(Dinov2Model(Dinov2Config(**shape)))


def normalised(images, kind):
    """uint8 (N,3,H,W) through transformers' own image normalisation, nothing else of its preparation."""
    processor = SiglipImageProcessor(do_resize=False)
    if kind == 'dinov2':                                # as its published preprocessor_config.json
        processor = BitImageProcessor(do_resize=False, do_center_crop=False, image_mean=IMAGENET_DEFAULT_MEAN,
                                      image_std=IMAGENET_DEFAULT_STD)
    return processor(list(images), return_tensors='pt')['pixel_values']


@pytest.mark.parametrize('saved, run', [(384, 224), (224, 384), (30, 58), (384, 380), (28, 28), (384, [224, 448]),
                                        (30, [42, 70]), (42, [71, 30])])
def test_siglip_at_other_resolutions_matches_transformers(saved, run, tmp_path):
    theirs = hf_model(image_size=saved)
    theirs.save_pretrained(tmp_path)
    images = torch.from_numpy(pixels(2, 3, *vision.sides(run)))
    with torch.no_grad():
        out = theirs(normalised(images, 'siglip'), interpolate_pos_encoding=True, output_hidden_states=True)
        penultimate = SigLIP.from_pretrained(tmp_path, image_size=run)
        last = SigLIP.from_pretrained(tmp_path, layer=-1, norm=True, image_size=run)
        torch.testing.assert_close(penultimate(images), out.hidden_states[-2], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(last(images), out.last_hidden_state, atol=1e-4, rtol=1e-4)
    h, w = vision.sides(run)
    assert penultimate.n_token == (h // 14) * (w // 14) and penultimate.spec()['config']['image_size'] == run


@pytest.mark.parametrize('registers, kw, run', [
    (4, {}, 70), (0, {}, 70), (4, {'image_size': 518}, 384), (0, {'image_size': 518}, 384), (2, {}, 101), (0, {}, 101),
    (4, {'image_size': 384}, 384), (4, {}, [42, 84]), (0, {}, [56, 28]), (3, {'use_swiglu_ffn': True, 'mlp_ratio': 3}, 56), (0, {'use_swiglu_ffn': True}, 70),
    (0, {'use_mask_token': False, 'layer_norm_eps': 1e-3, 'hidden_size': 144, 'patch_size': 8, 'image_size': 39}, 39)])
def test_dinov2_matches_transformers(registers, kw, run, tmp_path):
    theirs = hf_dino(registers, **kw)
    theirs.save_pretrained(tmp_path)
    images = torch.from_numpy(pixels(2, 3, *vision.sides(run)))
    with torch.no_grad():
        out = theirs(normalised(images, 'dinov2'), output_hidden_states=True)
        for layer, norm, expected in ((-2, False, out.hidden_states[-2]), (-1, True, out.last_hidden_state),
                                      (0, False, out.hidden_states[0])):
            ours = DINOv2.from_pretrained(tmp_path, layer=layer, norm=norm, image_size=run)
            expected = expected[:, 1 + registers:]                               # without CLS and registers
            torch.testing.assert_close(ours(images), expected, atol=1e-4, rtol=1e-4)
            assert expected.shape[1:] == (ours.n_token, ours.width)
            again = vision.build_encoder(json.loads(json.dumps(ours.spec())))
            again.load_state_dict(ours.state_dict())
            assert torch.equal(again(images), ours(images))


def test_parameter_counts_of_dinov2():
    with torch.device('meta'):
        whole, used = DINOv2(DINOv2Config(), layer=-1, norm=True), DINOv2(DINOv2Config())
        theirs = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(
            hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, patch_size=14, image_size=518))
    count = [sum(p.numel() for p in tower.parameters()) for tower in (whole, used, theirs)]
    block = sum(p.numel() for p in whole.layers[0].parameters())
    assert count == [304_372_736 - 1024, 304_372_736 - 1024 - block - 2048, 304_372_736]        # 1024: the mask token
    assert (used.n_token, used.width) == (37 ** 2, 1024)


def test_only_the_vision_half_of_a_whole_siglip_is_read(tmp_path):
    torch.manual_seed(2)
    text = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    theirs = perturbed(SiglipModel(SiglipConfig(text_config=text, vision_config=TINY)))
    theirs.text_model.requires_grad_(False)
    for p in theirs.text_model.parameters():
        p.fill_(torch.nan)                              # reading one of them would end in an error
    theirs.save_pretrained(tmp_path)
    images = torch.from_numpy(pixels(2, 3, 30, 30))
    ours = SigLIP.from_pretrained(tmp_path, layer=-1, norm=True)
    with torch.no_grad():
        expected = theirs.vision_model(normalised(images, 'siglip')).last_hidden_state
        torch.testing.assert_close(ours(images), expected, atol=1e-4, rtol=1e-4)


def towers(folder, siglip_size=42, dinov2_size=70, **kw):
    """A config that names a SigLIP and a DINOv2, both written by transformers; and these two."""
    siglip, dinov2 = hf_model(image_size=siglip_size), hf_dino(4, image_size=dinov2_size)
    siglip.save_pretrained(folder / 's')
    dinov2.save_pretrained(folder / 'd')
    config = dict(data_dir=str(folder), encoder='dinosiglip', encoder_path='s', dinov2_path='d', encoder_layer=-2,
                  encoder_norm=False, encoder_fusion='channel', image_size=0, token_mode='', image_tokens=0)
    return {**config, **kw}, siglip, dinov2


def from_config(config):
    encoder = vision.build_encoder(json.loads(json.dumps(vision.encoder_spec(config))))
    vision.fill_encoder(encoder, vision.encoder_files(config))
    return encoder


@pytest.mark.parametrize('siglip_size, dinov2_size, image_size', [(384, 518, 0), (42, 42, 0), (30, 70, 56)])
def test_fused_towers_read_one_image_each_its_own_way(siglip_size, dinov2_size, image_size, tmp_path):
    config, siglip, dinov2 = towers(tmp_path, siglip_size, dinov2_size, image_size=image_size)
    size = image_size or siglip_size                    # DINOv2 is brought to SigLIP's
    images, n = torch.from_numpy(pixels(2, 3, size, size)), (size // 14) ** 2
    with torch.no_grad():
        d = dinov2(normalised(images, 'dinov2'), output_hidden_states=True).hidden_states[-2][:, 5:]
        s = siglip(normalised(images, 'siglip'), interpolate_pos_encoding=True, output_hidden_states=True)
        s = s.hidden_states[-2]
        side_by_side, in_turn = (from_config({**config, 'encoder_fusion': word}) for word in ('channel', 'interleave'))
        torch.testing.assert_close(side_by_side(images), torch.cat((d, s), 2), atol=1e-4, rtol=1e-4)
        x = in_turn(images)
    assert (side_by_side.n_token, in_turn.n_token) == (n, 2 * n) == (n, x.shape[1])
    assert side_by_side.width == in_turn.width == 88 == x.shape[2] and in_turn.image_size == size
    torch.testing.assert_close(x[:, 0::2, :40], d, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(x[:, 1::2, 40:], s, atol=1e-4, rtol=1e-4)
    assert not x[:, 0::2, 40:].any() and not x[:, 1::2, :40].any()
    with pytest.raises(ValueError, match='float32: expected uint8'):
        in_turn(images.float())


@pytest.mark.parametrize('encoder', ['siglip', 'dinov2', 'dinosiglip'])
def test_every_parameter_of_trained_towers_gets_a_gradient(encoder, tmp_path):
    config, _, _ = towers(tmp_path, encoder=encoder, image_size=56, encoder_layer=-1, encoder_norm=True)
    eye = from_config(config)
    eye(torch.from_numpy(pixels(2, 3, 56, 56))).pow(3).mean().backward()
    for name, p in eye.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.any(), name
    save_file(eye.state_dict(), tmp_path / 'trained.safetensors')
    again = vision.build_encoder(eye.spec())
    again.load_state_dict(load_file(tmp_path / 'trained.safetensors'))
    images = torch.from_numpy(pixels(1, 3, 56, 56))
    assert torch.equal(again(images), eye(images))


class Operations(TorchDispatchMode):
    """Counts what runs: .casts by (is it a parameter?, elements), .names of all operators."""
    def __init__(self):
        super().__init__()
        self.casts, self.names = Counter(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.names.add(name)
        if name == '_to_copy':
            self.casts[isinstance(args[0], torch.nn.Parameter), args[0].numel()] += 1
        return func(*args, **(kwargs or {}))


def test_a_lowered_tower_gives_autocasts_bits_and_casts_no_weight_and_each_norm_once():
    shape = dict(hidden_size=144, intermediate_size=100, num_hidden_layers=4, num_attention_heads=2, patch_size=14,
                 image_size=42)                                              # heads of 72, as so400m's
    images = torch.from_numpy(pixels(2, 3, 42, 42))
    for tower in (SigLIP(SigLIPConfig(**shape), -1, True), DINOv2(DINOv2Config(**shape), -1, True),
                  DINOv2(DINOv2Config(**shape, use_swiglu_ffn=True, num_register_tokens=0))):
        tower = perturbed(tower).requires_grad_(False)
        low = vision.lowered(tower, torch.bfloat16)
        with Operations() as plain, torch.autocast('cpu', torch.bfloat16):
            truth = tower(images)
        with Operations() as ours, torch.autocast('cpu', torch.bfloat16):
            x = low(images)
        assert torch.equal(x, truth) and x.dtype == torch.float32
        n = 2 * (9 + (isinstance(tower, DINOv2) and 1 + tower.config.num_register_tokens)) * 144
        count = lambda ran: (sum(k for (own, _), k in ran.casts.items() if own), ran.casts[False, n])
        assert count(ours) == (0, 2 * tower.n_block), "two norms a block"
        assert count(plain)[0] == 2 + 12 * tower.n_block and count(plain)[1] == 4 * tower.n_block
        assert 'constant_pad_nd' not in ours.names and 'addmm' in ours.names               # q, k, v as they are
        shared = {p.data_ptr() for p in tower.parameters()} & {p.data_ptr() for p in low.parameters()}
        assert len(shared) == len([*tower.parameters()]) - count(plain)[0]


@pytest.mark.parametrize('encoder, image_tokens, size', [
    ('siglip', 36, 84), ('siglip', 8, [28, 56]), ('dinov2', 9, 42), ('dinosiglip', 18, [42, 84]), ('patch', 2, [14, 28]),
    ('siglip', 0, 42)])
def test_image_tokens_of_another_resolution(encoder, image_tokens, size, tmp_path):
    config = towers(tmp_path, encoder=encoder, token_mode='res', image_tokens=image_tokens)[0]
    eye = from_config(config)
    n_token = image_tokens or 9
    assert (eye.n_token, eye.image_size) == (n_token, size)
    assert eye(torch.from_numpy(pixels(2, 3, *vision.sides(size)))).shape == (2, n_token, eye.width)
    h, w = vision.token_grid(n_token)
    position = torch.zeros(1, 3, *vision.sides(size), dtype=torch.uint8)
    position[..., 14 * (h - 1):, :14] = 255                              # tokens are read row by row: the last row's first
    if encoder == 'patch':
        assert eye(position)[0].mean(1).argmax() == (h - 1) * w


def test_a_size_of_three_sides_and_a_files_own_pair_are_refused(tmp_path):
    with pytest.raises(ValueError, match='encoder description'):
        vision.build_encoder({'kind': 'patch', 'image_size': [28, 28, 28], 'patch_size': 14})
    config = towers(tmp_path, encoder='siglip')[0]
    edited(tmp_path / 's/config.json', image_size=[42, 42])
    with pytest.raises(ValueError, match=r"config.json: 'image_size' is .42, 42., expected int"):
        from_config(config)


def test_an_untrained_dinov2_has_features_of_ordinary_size():
    torch.manual_seed(0)
    eye = DINOv2(DINOv2Config(64, 256, 2, 2, 14, 42, use_swiglu_ffn=True), layer=-1, norm=True)
    x = eye(torch.from_numpy(pixels(2, 3, 42, 42)))
    assert x.shape == (2, 9, 64) and torch.isfinite(x).all() and 0.5 < x.std() < 2


def test_dinov2_compiles_and_keeps_its_precision():
    eye, images = DINOv2(DINOv2Config(48, 96, 2, 2, 14, 42)), torch.from_numpy(pixels(2, 3, 42, 42))
    truth = eye(images)
    torch.testing.assert_close(torch.compile(eye, backend='eager', fullgraph=True)(images), truth)
    with torch.autocast('cpu', torch.bfloat16):
        mixed = eye(images)
    low = eye.bfloat16()(images)
    assert mixed.dtype == low.dtype == torch.float32
    assert (mixed - truth).std() < 0.02 * truth.std() and (low - truth).std() < 0.04 * truth.std()


def test_a_classifier_on_dinov2_and_half_precision_are_read(tmp_path):
    torch.manual_seed(4)
    shape = dict(hidden_size=40, num_hidden_layers=2, num_attention_heads=2, image_size=70)
    theirs = perturbed(Dinov2ForImageClassification(Dinov2Config(**shape))).bfloat16()
    theirs.save_pretrained(tmp_path)
    (tmp_path / 'preprocessor_config.json').write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}')
    ours = DINOv2.from_pretrained(tmp_path, layer=-1, norm=True)
    assert ours.mean == (0.1, 0.2, 0.3) and ours.std == (1, 2, 3) and ours.cls_token.dtype == torch.float32
    images = torch.randn(2, 3, 70, 70)
    with torch.no_grad():
        expected = theirs.float().dinov2(images).last_hidden_state[:, 1:]
        torch.testing.assert_close(ours(images), expected, atol=1e-4, rtol=1e-4)


def edited(path, **changes):
    config = {**json.load(open(path)), **changes}
    json.dump({key: value for key, value in config.items() if value is not None}, open(path, 'w'))


@pytest.mark.parametrize('spoil, config, message', [
    (None, dict(encoder='dinov2', dinov2_path='s'), '/s: no dinov2 tower in it: .* is missing; it is a siglip tower'),
    (None, dict(encoder='siglip', encoder_path='d'), '/d: no siglip tower in it: .* is missing; it is a dinov2 tower'),
    (None, dict(encoder_path='d', dinov2_path='s'), '/d: no siglip tower'),
    (None, dict(dinov2_path='gone'), "/gone: expected a folder .*; nothing is there"),
    (None, dict(image_size=10), 'patch_size=14 exceeds image_size=10'),
    (None, dict(encoder_layer=7), 'layer=7: the tower has 3 blocks'),
    (None, dict(encoder_fusion='sum'), "fusion='sum': expected 'channel' or 'interleave'"),
    (lambda f: os.remove(f / 'd/config.json'), {}, 'd/config.json: not readable as JSON .No such file'),
    (lambda f: edited(f / 'd/config.json', hidden_size=None), {}, 'expected 26 x 768: image_size=70 in patches of 14'),
    (lambda f: edited(f / 'd/config.json', image_size=None), {}, 'expected 257 x 40: image_size=224'),
    (lambda f: edited(f / 's/config.json', image_size=56), {}, 'expected 16 x 48: image_size=56 in patches of 14'),
    (lambda f: edited(f / 'd/config.json', num_hidden_layers=None), {}, 'num_hidden_layers=12, the weights hold 3'),
    (lambda f: edited(f / 'd/config.json', num_attention_heads=None), {}, 'hidden_size=40 is not a multiple of'),
    (lambda f: edited(f / 'd/config.json', num_register_tokens=3), {}, r'register_tokens is \(1, 4, 40\)'),
    (lambda f: edited(f / 'd/config.json', mlp_ratio='big'), {}, 'd/config.json: not readable as a dinov2 config'),
    (lambda f: edited(f / 'd/config.json', mlp_ratio=3), {}, r'mlp.fc1.bias is \(160,\), this model.s is \(120,\)'),
    (lambda f: edited(f / 'd/config.json', use_swiglu_ffn=True), {}, 'mlp.fc1.bias'),
    (lambda f: edited(f / 'd/config.json', qkv_bias=False), {}, 'qkv_bias=False, expected true'),
    (lambda f: edited(f / 'd/config.json', model_type='dinov2'), {}, 'holds register_tokens, which this model does not have'),
    (lambda f: edited(f / 'd/config.json', model_type='dinov3_vit'), {}, "model_type 'dinov3_vit', expected one of")])
def test_wrong_towers_and_configs_are_named_in_one_line(spoil, config, message, tmp_path):
    config = {**towers(tmp_path)[0], **config}
    if spoil:
        spoil(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        from_config(config)
    assert '\n' not in str(error.value)


def test_a_spoilt_description_builds_an_encoder_or_ends_in_one_line():
    fused = vision.DINOSigLIP(DINOv2(DINOv2Config(48, 96, 2, 3, 14, 42)), tiny(config={'image_size': 42})).spec()
    rng, refused = random.Random(0), 0
    for _ in range(300):
        spec, what = retype(fused, rng)
        if isinstance(spec, dict):                       # what is none ends at the schema of meta.json
            try:
                with torch.device('meta'):
                    vision.build_encoder(spec)
            except ValueError as error:
                assert '\n' not in str(error), what
                refused += 1
    assert refused > 200


def test_towers_of_other_grids_and_of_any_resolution_are_refused(tmp_path):
    config, _, _ = towers(tmp_path)
    hf_model(patch_size=8, image_size=40).save_pretrained(tmp_path / 's')
    with pytest.raises(ValueError, match='DINOv2 makes 4 tokens of 40 px, SigLIP 25 of 40 px: expected the same'):
        from_config(config)
    torch.manual_seed(0)
    Siglip2VisionModel(Siglip2VisionConfig(hidden_size=48, intermediate_size=64, num_hidden_layers=1,
                                           num_attention_heads=3)).save_pretrained(tmp_path / 's')
    with pytest.raises(ValueError, match="'siglip2_vision_model' .NaFlex, of any resolution: take a SigLIP 2 of one."):
        SigLIP.from_pretrained(tmp_path / 's')


# --- aspect ratios that are kept ---------------------------------------------------------------------------------

def test_positions_of_a_grid_are_idefics2s():
    hf = pytest.importorskip('transformers.models.idefics2.modeling_idefics2')
    off = {}
    for n in (2, 3, 16, 27, 37, 70):
        embeddings = hf.Idefics2VisionEmbeddings(hf.Idefics2VisionConfig(hidden_size=1, patch_size=1, image_size=n))
        with torch.no_grad():
            embeddings.patch_embedding.weight.zero_()
            embeddings.patch_embedding.bias.zero_()
            embeddings.position_embedding.weight.copy_(torch.arange(n * n)[:, None])
            for h in range(1, n + 1):
                w = n + 1 - h
                theirs = embeddings(torch.zeros(1, 3, h, w), torch.ones(1, h, w, dtype=torch.bool))
                ours = vit.position_ids(h, w, n)
                assert ours.tolist() == theirs.flatten().tolist(), (n, h, w)
                if (ours.view(h, w)[:, 0] // n).tolist() != [i * n // h for i in range(h)]:
                    off.setdefault(n, []).append(h)
    assert off == {70: [25, 49, 50, 55]}
    assert vit.position_ids(27, 27, 27).tolist() == list(range(27 ** 2))


def test_images_of_their_own_grids_match_idefics2(tmp_path):
    """Bucketed by grid they need no mask; transformers pads them to one size and masks what is padded."""
    hf = pytest.importorskip('transformers.models.idefics2.modeling_idefics2')
    ours = tiny(layer=-1, norm=True, config={'image_size': 70})
    torch.manual_seed(4)
    theirs = hf.Idefics2VisionTransformer(hf.Idefics2VisionConfig(**{**TINY, 'image_size': 70})).eval()
    state = {k: v + 0.1 * torch.randn_like(v) for k, v in theirs.state_dict().items()}
    theirs.load_state_dict(state)
    ours.load_state_dict(state)
    grids = [(5, 5), (2, 5), (5, 3), (4, 2), (2, 5)]
    images = [torch.from_numpy(pixels(3, 14 * h, 14 * w, seed=i)) for i, (h, w) in enumerate(grids)]
    padded, mask = torch.zeros(5, 3, 70, 70), torch.zeros(5, 5, 5, dtype=torch.bool)
    for i, ((h, w), image) in enumerate(zip(grids, images)):
        padded[i, :, :14 * h, :14 * w], mask[i, :h, :w] = image / 127.5 - 1, True
    with torch.no_grad():
        expected = theirs(padded, patch_attention_mask=mask).last_hidden_state.view(5, 5, 5, -1)
        for i, ((h, w), image) in enumerate(zip(grids, images)):
            torch.testing.assert_close(ours(image[None])[0], expected[i, :h, :w].flatten(0, 1), atol=1e-4, rtol=1e-4)
    for wrong in ((15, 14), (84, 14)):
        with pytest.raises(ValueError, match='expected'):
            ours(torch.zeros(1, 3, *wrong))


@pytest.mark.parametrize('kind', ['patch', 'dinov2', 'dinosiglip'])
def test_every_encoder_keeps_aspects(kind):
    siglip, dinov2 = tiny(config={'image_size': 42}), DINOv2(DINOv2Config(48, 96, 2, 3, 14, 42))
    encoder = {'patch': PatchProjection(42), 'dinov2': dinov2,
               'dinosiglip': vision.DINOSigLIP(dinov2, siglip, 'interleave')}[kind].eval()
    image = torch.from_numpy(pixels(2, 3, 28, 42))
    with torch.no_grad():
        features = encoder(image)
        assert features.shape == (2, encoder.n_token * 6 // 9, encoder.width)
        if kind == 'patch':
            square = torch.cat((image, image[:, :, :14]), 2)
            torch.testing.assert_close(features, encoder(square)[:, :6])
        elif kind == 'dinov2':                       # rows 0 and 1 of two have those of 0 and 1 of three positions
            table = encoder.position_embeddings.view(-1, 48)[1:].view(3, 3, 48)
            encoder.layers, encoder.layernorm = torch.nn.ModuleList(), None
            expected = encoder.patch_embedding(vision._normalise(image, 42, 14, encoder.mean, encoder.std))
            torch.testing.assert_close(encoder(image), (expected.permute(0, 2, 3, 1) + table[:2]).flatten(1, 2))


# --- the loss ----------------------------------------------------------------------------------------------------

def test_siglip_loss_is_the_papers_sum_over_pairs():
    torch.manual_seed(0)
    image, text = torch.randn(3, 8, dtype=torch.float64) * 7, torch.randn(5, 8, dtype=torch.float64)
    labels = torch.tensor([[1, -1, -1, 1, -1], [-1, 1, -1, -1, -1], [-1, -1, -1, -1, -1]])
    t, b = torch.tensor(10.).log(), torch.tensor(-10.)
    expected = 0.0
    for i in range(3):
        for j in range(5):
            cosine = float(image[i] @ text[j] / image[i].norm() / text[j].norm())
            z = float(labels[i, j]) * (10 * cosine - 10)
            expected += np.log1p(np.exp(-z)) / 3
    assert abs(vision.siglip_loss(image, text, t, b, labels).item() - expected) < 1e-4
    square = vision.siglip_loss(image, text[:3], t, b)
    assert torch.equal(square, vision.siglip_loss(image, text[:3], t, b, 2 * torch.eye(3) - 1))
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(vision.siglip_loss(image, text[:3], t, b), square)


def test_siglip_loss_learns_pairs_and_names_wrong_shapes():
    torch.manual_seed(0)
    image, text = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    t, b = torch.tensor(10.).log().requires_grad_(), torch.tensor(-10.).requires_grad_()
    optimizer = torch.optim.Adam([image, text, t, b], lr=0.1)
    for _ in range(100):
        loss = vision.siglip_loss(image, text, t, b)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2
    assert (F.normalize(image) @ F.normalize(text).T).argmax(1).tolist() == list(range(6))
    with pytest.raises(ValueError, match='6 images and 5 texts'):
        vision.siglip_loss(image, text[:5], t, b)
    with pytest.raises(ValueError, match=r'labels of shape \(6, 6\), expected \(6, 5\)'):
        vision.siglip_loss(image, text[:5], t, b, torch.ones(6, 6))
