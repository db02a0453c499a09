"""generation.py: continuations and choices against the whole row computed again for every token."""
import math
import sys
from pathlib import Path
from random import Random

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import generation
from connectors import build_projector
from errors import UserError
from model import VLM, Decoder, with_view
from test_model import END, IMAGE, MASKS, masked_vlm, pictures, ragged, tiny_vlm
from vision import PatchProjection


def slow_greedy(model, prompt, images, n, stop_ids=()):
    """One prompt, no cache: the whole row again for every token."""
    new = []
    for _ in range(n):
        token = int(whole_row(model, prompt, new, images)[-1].argmax())
        if token in stop_ids:
            break
        new.append(token)
    return new


def whole_row(model, ids, new, images):
    """Logits (T,V) of one row, read at once; an image_id among the new ids is no image."""
    tokens, new = torch.tensor([ids]), torch.tensor([new], dtype=torch.int64)
    x = torch.cat((model.embed(tokens, images), model.decoder.tok_embeddings(new)), 1)
    mask = model.intervals(torch.cat((tokens, new.masked_fill(new == IMAGE, 0)), 1), images is not None)
    return model.decoder.output(model.decoder.trunk(x, mask=mask))[0]


PROMPTS = [[7], [1, 2, 3, 4, 5], [9, 8], list(range(10, 25))]                # the last is beyond seq_len 12


@torch.no_grad()
def test_cache_and_batch_do_not_change_greedy_tokens():
    model = tiny_vlm(20, spread=3.0)
    expected = [slow_greedy(model, p, None, 9) for p in PROMPTS]
    assert len({tuple(row) for row in expected}) == 4 and max(len(set(row)) for row in expected) > 3
    assert model.generate(PROMPTS, max_new_tokens=9) == expected
    assert [model.generate([p], max_new_tokens=9)[0] for p in PROMPTS] == expected
    assert model.double().generate(PROMPTS, max_new_tokens=9) == expected    # the cache follows the weights' dtype
    assert len(model.bfloat16().generate(PROMPTS, max_new_tokens=2)[0]) == 2
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert len(model.float().generate(PROMPTS, max_new_tokens=2)[0]) == 2


@torch.no_grad()
def test_stop_ids_end_each_row_by_itself():
    model = tiny_vlm(20, spread=3.0)
    free = model.generate(PROMPTS, max_new_tokens=9)
    stop = (free[1][0], free[3][4])                      # row 1 stops at once
    new = model.generate(PROMPTS, max_new_tokens=9, stop_ids=stop)
    assert new == [slow_greedy(model, p, None, 9, stop) for p in PROMPTS]
    assert new[1] == [] and len({len(row) for row in new}) > 1
    assert model.generate(PROMPTS, max_new_tokens=0) == [[], [], [], []]
    for prompts in ([], [[1], []]):
        with pytest.raises(ValueError, match='at least one token'):
            model.generate(prompts)


@torch.no_grad()
def test_an_image_prefix_is_prefilled_once(monkeypatch):
    model, images = tiny_vlm(21, spread=3.0), pictures(3)
    I = [IMAGE] * 4
    prompts, index = [I + [1], I + [2, 3, 4], I + [5, 6], I + [1]], torch.tensor([2, 0, 2, 0])
    expected = [slow_greedy(model, p, images[i:i + 1], 7) for p, i in zip(prompts, index)]
    assert len({tuple(row) for row in expected}) > 2
    seen = []
    trunk = Decoder.trunk
    monkeypatch.setattr(Decoder, 'trunk', lambda self, x, *a, **kw: (seen.append(tuple(x.shape[:2])),
                                                                     trunk(self, x, *a, **kw))[1])
    model.encoder.calls = model.encoder.n_image = 0
    assert model.generate(prompts, images, index, max_new_tokens=7) == expected
    assert (model.encoder.calls, model.encoder.n_image) == (1, 2)            # image 1 is asked nothing
    assert seen[:2] == [(2, 4), (4, 3)]                  # two prefixes of 4, then 4 questions of at most 3 tokens
    monkeypatch.setattr(generation, 'images_open_rows', lambda *a: False)
    assert model.generate(prompts, images, index, max_new_tokens=7) == expected
    assert [model.generate([p], images[i:i + 1], max_new_tokens=7)[0] for p, i in zip(prompts, index)] == expected


@torch.no_grad()
def test_a_prefix_answers_as_its_image_does_and_is_encoded_no_more():
    model, images = tiny_vlm(21, spread=3.0), pictures(2)
    questions = [[IMAGE] * 4 + question for question in ([1], [2, 3, 4], [5, 6])]
    expected = [model.generate([q], images[:1], max_new_tokens=7)[0] for q in questions]
    other = model.generate(questions[:1], images[1:], max_new_tokens=7)[0]
    assert other != expected[0]
    both = model.prefill_images(images)
    prefix = model.prefill_images(images[:1])
    model.encoder.calls = 0
    assert [model.generate([q], prefix=prefix, max_new_tokens=7)[0] for q in questions] == expected
    same = torch.zeros(3, dtype=torch.int64)
    assert model.generate(questions, prefix=prefix, image_index=same, max_new_tokens=7) == expected
    assert model.generate(questions[:1] * 2, prefix=both, max_new_tokens=7) == [expected[0], other]
    assert model.encoder.calls == 0
    for wrong in ([1, 2], [1] + questions[0], [IMAGE] * 4, [IMAGE] * 8 + [1]):
        with pytest.raises(ValueError, match='one image and then text'):
            model.generate([wrong], prefix=prefix)


@torch.no_grad()
def test_under_autocast_the_residual_stream_stays_float32():
    """In the images' own prefill, too: a model answers with the arithmetic that it was trained with."""
    model, seen = tiny_vlm(4), []
    for layer in model.decoder.layers:
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.autocast('cpu', torch.bfloat16):
        model.generate([[IMAGE] * 4 + [5]], pictures(1), torch.tensor([0]), max_new_tokens=2)
    assert len(seen) == 3 * len(model.decoder.layers) and set(seen) == {torch.float32}


@torch.no_grad()
def test_prompts_that_are_no_common_prefix_are_generated_plainly():
    model, images = tiny_vlm(22, spread=3.0), pictures(3)
    I = [IMAGE] * 4
    cases = [([I, I + [1, 2]], [0, 1]),                  # one prompt is its image and nothing else
             ([[3] + I, I + [1, 2]], [0, 1]),            # not at the start
             ([I + [1] + I, [5, 6]], [0, 1]),            # two images, and none
             ([I + I + [1], I + [2]], [2, 0, 1]),
             ([[1, 2], I + [2]], [1])]
    for prompts, index in cases:
        where = iter(index)
        own = [images[[next(where) for _ in range(p.count(IMAGE) // 4)]] for p in prompts]
        expected = [slow_greedy(model, p, i if len(i) else None, 5) for p, i in zip(prompts, own)]
        assert model.generate(prompts, images, torch.tensor(index), max_new_tokens=5) == expected, prompts


@torch.no_grad()
def test_sampling():
    model = tiny_vlm(23)
    draw = lambda seed, **kw: model.generate([[1], [2, 3]], max_new_tokens=8, temperature=1.0,
                                             generator=torch.Generator().manual_seed(seed), **kw)
    assert draw(0) == draw(0) and draw(0) != draw(1)
    greedy = model.generate([[1], [2, 3]], max_new_tokens=8)
    assert draw(0, top_k=1) == greedy
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]]).repeat(4000, 1)
    picked = generation._pick(logits, 0.5, 2, torch.Generator().manual_seed(0))
    share = float((picked == 1).float().mean())          # softmax of (6, 4): 0.881, three standard errors 0.015
    assert set(picked.tolist()) == {1, 2} and abs(share - 1 / (1 + math.exp(-2))) < 0.016
    assert generation._pick(logits, 1e-45, 0, None).unique().tolist() == [1]           # as good as greedy, not nan


# --- many rows ------------------------------------------------------------------------------------------------------

def feeder(rows, read=None):
    """feed(n) for generate_each: the next rows (key, prompt, image number or None), at most n at a time."""
    rows = list(rows)

    def feed(n):
        given = [rows.pop(0) for _ in range(min(n, len(rows)))]
        if not given:
            return None
        keys, prompts, numbers = zip(*given)
        return keys, prompts, None, None if read is None else torch.tensor(numbers), read
    return feed


@torch.no_grad()
@pytest.mark.parametrize('batch_size', [1, 2, 7, 40])
def test_rows_that_take_the_place_of_others_answer_as_they_would_alone(batch_size):
    model, rng, images = tiny_vlm(20, spread=3.0), Random(batch_size), pictures(3)
    rows = [(n, [rng.randrange(30) for _ in range(rng.randint(1, 14))], None) for n in range(25)]
    free = {n: model.generate([prompt], max_new_tokens=9)[0] for n, prompt, _ in rows}
    stop = {free[0][3], free[1][0], free[2][5]}
    given = {n: next((new[:i] for i, t in enumerate(new) if t in stop), new) for n, new in free.items()}
    assert len({len(new) for new in given.values()}) > 3
    done = list(model.generate_each(feeder(rows), batch_size, 14, max_new_tokens=9, stop_ids=stop))
    assert dict(done) == given and len(done) == 25
    done = model.generate_each(feeder(rows), batch_size, 14, max_new_tokens=9, until=lambda n, new: new[-1] % 3 == 0)
    assert dict(done) == {n: next((new[:i + 1] for i, t in enumerate(new) if t % 3 == 0), new)
                          for n, new in free.items()}
    prefix = model.prefill_images(images)
    rows = [(n, [IMAGE] * 4 + prompt, rng.randrange(3)) for n, prompt, _ in rows]
    expected = {n: slow_greedy(model, p, images[i:i + 1], 5) for n, p, i in rows}
    done = model.generate_each(feeder(rows, prefix), batch_size, 18, max_new_tokens=5)
    assert dict(done) == expected


def slow_nats(model, context, choice, images):
    """One row with nothing shared: nats of the choice, and whether it is what generate would write."""
    logits = whole_row(model, context, choice[:-1], images)[len(context) - 1:].double()
    nll = -logits.log_softmax(-1)[torch.arange(len(choice)), torch.tensor(choice)]
    return float(nll.sum()), logits.argmax(-1).tolist() == choice


@torch.no_grad()
def test_choices_after_a_context_that_is_read_once(monkeypatch):
    model, rng, images = tiny_vlm(21, spread=3.0), Random(3), pictures(2)
    for owns in ([None] * 5, [0, 1, 0, 1, 1]):
        contexts = [[IMAGE] * 4 * (own is not None) + [rng.randrange(30) for _ in range(rng.randint(1, 9))]
                    for own in owns]
        choices = [[[rng.randrange(30) for _ in range(rng.randint(1, 5))] for _ in range(rng.randint(1, 4))]
                   for _ in owns]
        index = None if owns[0] is None else torch.tensor(owns)
        for context, options, own in zip(contexts, choices, owns):                   # one is what it would write
            options.append(model.generate([context], None if own is None else images[own:own + 1],
                                          max_new_tokens=rng.randint(1, 3))[0])
        seen, trunk = [], Decoder.trunk
        monkeypatch.setattr(Decoder, 'trunk', lambda self, x, *a, **kw: (seen.append(x.shape[0] * x.shape[1]),
                                                                         trunk(self, x, *a, **kw))[1])
        prefix = None if index is None else model.prefill_images(images)
        nats, greedy = model.choice_nats(contexts, choices, None, index, prefix, greedy=True)
        monkeypatch.undo()
        assert len(seen) <= (prefix is not None) + 1 + max(map(len, choices))
        for n, (context, options, own) in enumerate(zip(contexts, choices, owns)):
            for j, choice in enumerate(options):
                expected, likely = slow_nats(model, context, choice, None if own is None else images[own:own + 1])
                assert nats[n][j] == pytest.approx(expected, rel=1e-5, abs=1e-5)     # float32, in other orders
                assert greedy[n][j] == likely
        assert all(row[-1] for row in greedy) and not all(all(row) for row in greedy)
        alone = [model.choice_nats([c], [o], None if own is None else images[own:own + 1])[0][0]
                 for c, o, own in zip(contexts, choices, owns)]
        assert [pytest.approx(row, rel=1e-5, abs=1e-5) for row in alone] == nats


# --- images of their own sizes ----------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize('n_part', [1, 5])
def test_images_of_different_sizes_share_a_batch_and_a_prefix(n_part):
    model, rng = tiny_vlm(23, spread=3.0, n_part=n_part), Random(n_part)
    images = ragged(7, n_part)
    slots = model.slots(images)
    assert len(set(slots)) > 1 and model.n_slot == 4 * n_part >= max(slots)
    prompts, index = [], []
    for i in (3, 0, 6, 0, 1, 5, 2):                                      # 4 is asked nothing, 0 twice
        prompts.append([IMAGE] * slots[i] + [rng.randrange(IMAGE) for _ in range(rng.randint(1, 9))])
        index.append(i)
    expected = [slow_greedy(model, p, [images[i]], 7) for p, i in zip(prompts, index)]
    assert len({tuple(row) for row in expected}) > 4
    model.encoder.calls = model.encoder.n_image = 0
    assert model.generate(prompts, images, torch.tensor(index), max_new_tokens=7) == expected
    sizes = {part.shape for i in set(index) for part in images[i]}
    assert (model.encoder.calls, model.encoder.n_image) == (len(sizes), 6 * n_part)          # one call for each grid
    prefix = model.prefill_images(images)
    for rows in ([0], [3, 4], list(range(7))):           # the largest image is in the prefix, perhaps not in the batch
        some = torch.tensor([index[r] for r in rows])
        assert model.generate([prompts[r] for r in rows], prefix=prefix, image_index=some, max_new_tokens=7) == \
            [expected[r] for r in rows]
        choices = [[expected[r][:k] for k in (1, 4)] + [[5, 6, 7]] for r in rows]
        nats, greedy = model.choice_nats([prompts[r] for r in rows], choices, None, some, prefix, greedy=True)
        alone = [model.choice_nats([prompts[r]], [c], [images[index[r]]])[0][0] for r, c in zip(rows, choices)]
        assert [g[:2] for g in greedy] == [[True, True]] * len(rows)
        for a, b in zip(nats, alone):
            assert a == pytest.approx(b, rel=1e-4)
    with pytest.raises(ValueError, match='one image and then text'):
        model.generate([prompts[0]], prefix=prefix, image_index=torch.tensor([slots.index(min(slots))]))
    # two images, one not at the start: read without a prefix
    mixed = [prompts[0] + [IMAGE] * slots[1] + [2], [3] + prompts[1]]
    assert model.generate(mixed, images, torch.tensor([3, 1, 0]), max_new_tokens=5) == [
        slow_greedy(model, mixed[0], [images[3], images[1]], 5), slow_greedy(model, mixed[1], [images[0]], 5)]


@torch.no_grad()
def test_a_perceiver_gives_images_of_any_size_the_same_slots():
    model, images = tiny_vlm(24, spread=3.0, n_part=5), ragged(4, 5)
    model = VLM(model.decoder, model.encoder, build_projector(dict(kind='perceiver', n_token=3), 6, 16), image_id=IMAGE,
                n_token=3, shortest=1, split=True).eval()
    assert model.slots(images) == [15] * 4 and model.n_slot == 15
    features = model.image_features(images)
    assert features.shape == (4, 15, 16)
    alone = torch.cat([model.image_features([image]) for image in images])
    torch.testing.assert_close(features, alone)
    prompts = [[IMAGE] * 15 + [i, 5] for i in range(4)]
    assert model.generate(prompts, images, max_new_tokens=5) == [
        slow_greedy(model, p, [image], 5) for p, image in zip(prompts, images)]


def test_kept_aspects_need_a_square_and_a_projector_that_takes_any_grid():
    spec = dict(encoder=PatchProjection(980).spec(), projector=dict(kind='mlp2'))
    assert with_view(spec, {'aspect': 'square', 'split': False}) == spec
    for kind in (dict(kind='mlp2'), dict(kind='attn'), dict(kind='perceiver', n_token=64)):
        view = with_view(dict(spec, projector=kind), {'aspect': 'keep', 'split': True})['view']
        assert view == {'shortest': 378, 'split': True}
    wide = dict(spec, encoder=PatchProjection([224, 448]).spec())
    for wrong in (dict(spec, projector=dict(kind='mlp2', n_token=64)), wide):
        with pytest.raises(UserError, match="aspect='keep' with image_tokens"):
            with_view(wrong, {'aspect': 'keep'})
        assert with_view(wrong, {'split': True})['view'] == {'split': True}


# --- masks ------------------------------------------------------------------------------------------------------------

def masked_rows(rng):
    """(prompt, images it needs, may its image be prefilled) of every kind, ends of documents among their ids."""
    I, some = [IMAGE] * 4, lambda: [END if rng.random() < 0.25 else rng.randrange(30) for _ in range(rng.randint(1, 6))]
    return [(some(), 0), (some() + [END], 0), (I + some(), 1), (I + some() + [END], 1), (I + I + some(), 2),
            (some() + I + some(), 1), (I + some() + I, 2), (I, 1)]


@torch.no_grad()
@pytest.mark.parametrize('image_mask, document_end', MASKS)
def test_with_masks_what_is_cached_answers_as_the_whole_row(image_mask, document_end):
    model, rng, images = masked_vlm(image_mask, document_end, 24, spread=3.0), Random(5), pictures(3)
    model.decoder.output.weight[END] *= 4                # some rows write it themselves
    rows = [(prompt, [rng.randrange(3) for _ in range(n)]) for _ in range(3) for prompt, n in masked_rows(rng)]
    own = [images[index] if index else None for _, index in rows]
    expected = [slow_greedy(model, prompt, i, 9) for (prompt, _), i in zip(rows, own)]
    assert any(END in new[:-1] for new in expected) and len({*map(tuple, expected)}) > 10
    model.image_mask, model.document_end = 'causal', None
    assert expected != [slow_greedy(model, prompt, i, 9) for (prompt, _), i in zip(rows, own)]
    model.image_mask, model.document_end = image_mask, document_end
    prompts, index = [prompt for prompt, _ in rows], torch.tensor([i for _, index in rows for i in index])
    assert model.generate(prompts, images, index, max_new_tokens=9) == expected             # read plainly, all at once
    assert [model.generate([p], images, torch.tensor(i), max_new_tokens=9)[0] if i else
            model.generate([p], max_new_tokens=9)[0] for p, i in rows] == expected          # some prefilled
    asked = [(n, p, i[0]) for n, (p, i) in enumerate(rows) if p[:4] == [IMAGE] * 4 and p.count(IMAGE) == 4 < len(p)]
    done = model.generate_each(feeder(asked, model.prefill_images(images)), 3, 12, max_new_tokens=9)
    assert dict(done) == {n: expected[n] for n, _, _ in asked}
    choices = [[[END if rng.random() < 0.3 else rng.randrange(30) for _ in range(rng.randint(1, 5))]
                for _ in range(rng.randint(1, 3))] for _ in rows]
    nats, greedy = model.choice_nats(prompts, choices, images, index, greedy=True)
    for n, (prompt, options) in enumerate(zip(prompts, choices)):
        for j, choice in enumerate(options):
            truth, likely = slow_nats(model, prompt, choice, own[n])
            assert nats[n][j] == pytest.approx(truth, rel=1e-5, abs=1e-5) and greedy[n][j] == likely
