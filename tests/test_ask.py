"""ask.py: what reaches the model, how processes share it, and what stands in the journal."""
import json
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ask
from benchmarks import find_tasks
from errors import UserError
from evaluate import evaluate_task
from model import VLM
from scorers import Example, Task
from test_benchmarks import COLOURS, options
from test_evaluate import Oracle, eval_dir, tiny_model, tokenizer       # noqa: F401
from vision import PatchProjection


def everything(model, tokenizer, task, opt):
    return dict(ask.ask(model, tokenizer, task, opt, ask.share(task)))


# --- what is asked together ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('batch_size', [1, 2, 3, 16])
def test_each_image_is_encoded_once_and_reaches_its_own_questions(eval_dir, tokenizer, batch_size):
    (task,) = find_tasks(options(eval_dir, tasks='vqav2'))
    oracle = Oracle(tokenizer, [task])
    result, _ = evaluate_task(oracle, tokenizer, task, options(eval_dir, batch_size=batch_size))
    assert result['score'] == 1 and max(len(c[0]) for c in oracle.calls) <= batch_size
    assert oracle.encoded == 5                                           # 5 images with at most 2 questions each
    means = {tuple(tokenizer.encode(e.prompt)): torch.tensor(COLOURS[list(COLOURS)[(int(e.id) - 7000) // 2 % 3]])
             for e in task.examples}
    for prompts, images, index in oracle.calls:
        for prompt, i in zip(prompts, index.tolist()):
            near = images[i].float().mean((1, 2)) - means[oracle.question(prompt)]
            assert near.abs().max() < 8                                  # jpeg moves the colour a little


def test_processes_share_all_questions_and_no_image():
    rng = Random(0)
    for _ in range(50):
        task = Task('t', 't', [Example(str(i), 'x' * rng.randint(1, 9), [], rng.choice(['', 'a', 'b', 'c', 'd']))
                               for i in range(rng.randint(1, 30))], None)
        for world in (1, 2, 3, 40):
            shares = [ask.share(task, rank, world) for rank in range(world)]
            assert sorted(n for part in shares for group in part for n in group) == list(range(len(task.examples)))
            for part in shares:
                sizes = [max(len(task.examples[n].prompt) for n in group) for group in part]
                assert sizes == sorted(sizes, reverse=True)              # the longest first
                assert all(len({task.examples[n].image for n in group}) == 1 for group in part)
            seen = [{task.examples[n].image for group in part for n in group} - {''} for part in shares]
            assert sum(map(len, seen)) == len(set().union(*seen))        # no image is read by two processes


def test_an_image_that_cannot_be_read_ends_the_task_or_is_left_out(eval_dir, tokenizer, tmp_path):
    (task,) = find_tasks(options(eval_dir, tasks='vqav2'))
    bad = tmp_path / 'bad.jpg'
    bad.write_bytes(b'no image')
    for n in (2, 3):
        task.examples[n].image = str(bad)
    for allowed in (0, 1):
        with pytest.raises(UserError, match=f'bad.jpg.*max_bad_samples={allowed}, and vqav2 has 2'):
            evaluate_task(Oracle(tokenizer, [task]), tokenizer, task, options(eval_dir, max_bad_samples=allowed))
    for batch_size in (1, 3, 16):
        result, records = evaluate_task(Oracle(tokenizer, [task]), tokenizer, task,
                                        options(eval_dir, max_bad_samples=2, batch_size=batch_size))
        assert (result['n'], result['skipped'], result['score'], result['malformed']) == (7, 2, 1, 0)
        assert [r['id'] for r in records] == [e.id for i, e in enumerate(task.examples) if i not in (2, 3)]
    for e in task.examples:
        e.image = str(bad)
    with pytest.raises(UserError, match='no image of it can be read'):
        evaluate_task(Oracle(tokenizer, [task]), tokenizer, task, options(eval_dir, max_bad_samples=9))


@pytest.mark.parametrize('split', [False, True])
def test_photos_of_any_size_are_asked_about_together_as_alone(tokenizer, tmp_path, split):
    """Aspects kept and photos split, in any batch: written answers and the nats of choices."""
    plain, rng, examples = tiny_model(tokenizer), Random(3), []
    model = VLM(plain.decoder, PatchProjection(42), plain.projector, image_id=tokenizer.image_id, shortest=16,
                split=split).eval()
    with torch.no_grad():
        for p in model.parameters():                                     # far from ties
            p.mul_(3 if p.dim() > 1 else 1)
    for i in range(7):
        w, h = rng.randint(4, 90), rng.randint(10, 90)
        Image.effect_noise((w, h), 90).save(tmp_path / f'{i}.png')
        examples += [Example(f'{i}{q}', 'what is it' if q else 'the red box', [0], str(tmp_path / f'{i}.png'))
                     for q in range(1 + i % 2)]
    asked = {'written': Task('t', 'vqav2', examples, None),
             'chosen': Task('t', 'pope', [replace(e, choices=['yes', 'no']) for e in examples], None)}
    for name, task in asked.items():
        answers = {}
        for batch_size in (1, 3, 16):
            opt = options(str(tmp_path), batch_size=batch_size, max_new_tokens=6)
            answers[batch_size] = everything(model, tokenizer, task, opt)
        assert len(answers[1]) == len(examples)
        for n in answers[1]:
            for other in (3, 16):
                if name == 'written':
                    assert answers[other][n] == answers[1][n]
                else:
                    assert answers[other][n]['nats'] == pytest.approx(answers[1][n]['nats'], rel=1e-4)
    assert len({a['text'] for a in everything(model, tokenizer, asked['written'], opt).values()}) > 3
    Image.new('RGB', (400, 9)).save(tmp_path / '0.png')                   # 44 to 1: named, or left out and counted
    with pytest.raises(UserError, match="0.png: image of .* pixels: aspect='keep' takes up to 20 to 1"):
        everything(model, tokenizer, asked['written'], opt)
    opt.max_bad_samples = 1
    assert 'unreadable' in everything(model, tokenizer, asked['written'], opt)[0]


# --- POPE and multiple choice -------------------------------------------------------------------------------------

def test_choices_in_chat_end_at_the_first_token_that_differs(eval_dir, tokenizer):
    (task,) = find_tasks(options(eval_dir, tasks='pope', pope_words=('Zxa', 'Zxb')))
    a, b = ask.choice_ids(task.examples[0], task, tokenizer)
    assert a[:-1] == b[:-1] == tokenizer.encode('Zx') and a[-1] != b[-1]
    (task,) = find_tasks(options(eval_dir, tasks='pope', pope_words=('Z', 'Zx')))
    with pytest.raises(ValueError, match='pope.*start of another'):
        ask.choice_ids(task.examples[0], task, tokenizer)


def test_text_choices_are_tokenised_apart_with_a_space_or_as_one_text(tokenizer):
    e = Example('0', 'what is it ', [0], choices=['red', 'blue is it'])
    for delimiter, ids in ((None, [tokenizer.encode(' red'), tokenizer.encode(' blue is it')]),
                           (' ', [tokenizer.encode('  red'), tokenizer.encode('  blue is it')])):
        task = Task('t', 't', [e], None, layout='text', delimiter=delimiter)
        assert ask.choice_ids(e, task, tokenizer) == ids
        assert ask.prompt_ids(e, task, tiny_model(tokenizer), tokenizer, None) == tokenizer.encode('what is it')
    # a tokeniser that joins the end of the one and the start of the other: the choice gets what is left of the whole
    start, whole = tokenizer.encode('q wh'), tokenizer.encode('q what is it')
    assert whole[:len(start)] != start and ask.pair_ids('q wh', 'at is it', tokenizer) == (start, whole[len(start):])
    assert ask.pair_ids('', 'at', tokenizer) == ([tokenizer.eot_id], tokenizer.encode('at'))


@pytest.mark.parametrize('norm, best', [('acc', 0), ('token', 1), ('acc_norm', 2)])
def test_choice_normalisations(tmp_path, tokenizer, norm, best):
    (tmp_path / 'text').mkdir()
    choices = ['q', 'q' * 4, 'red' * 6]                                  # 2, 5 and more tokens; 1, 4 and 18 characters
    (tmp_path / 'text' / 't.jsonl').write_text(json.dumps({'query': 'x', 'choices': choices, 'gold': best}))
    (task,) = find_tasks(options(str(tmp_path), text_variant='dclm' if norm == 'token' else 'lm-eval'))
    task.norm = norm
    n = [len(ids) for ids in ask.choice_ids(task.examples[0], task, tokenizer)]
    nats = dict(zip(n, (1.0, .1 * n[1] + .5, .4 * n[2])))              # lowest in sum, per token, per char
    assert min(nats.values()) == 1.0 and len(nats) == 3
    oracle = Oracle(tokenizer, [task])
    oracle.choice_nats = lambda contexts, choices, *_: ([[nats[len(ids)] for ids in c] for c in choices], None)
    result, (record,) = evaluate_task(oracle, tokenizer, task, options(str(tmp_path)))
    assert record['n_token'] == n and record['nats'] == pytest.approx([nats[k] for k in n])
    assert record['prediction'] == choices[best] and result['score'] == 1


def test_long_contexts_lose_their_left_end_alike_for_every_checkpoint(tmp_path, tokenizer):
    """A longer choice leaves less of its context, as in lm-eval, whatever is scored together with it."""
    (tmp_path / 'text').mkdir()
    row = {'query': 'red blue ' * 50 + 'end', 'choices': ['no', 'yes', 'no no no'], 'gold': 0}
    (tmp_path / 'text' / 't.jsonl').write_text(json.dumps(row))
    (task,) = find_tasks(options(str(tmp_path)))
    full = tokenizer.encode(task.examples[0].prompt)
    ids = ask.choice_ids(task.examples[0], task, tokenizer)
    assert len(full) > 64 and len({len(choice) for choice in ids}) > 1
    for max_len in (20, 70, len(full) + 1, 2048):
        for seq_len in (16, 64):                                         # what a checkpoint was trained at
            model, seen = tiny_model(tokenizer, seq_len=seq_len), []
            plain = model.choice_nats
            model.choice_nats = lambda *args: seen.append(args[:2]) or plain(*args)
            (answer,) = everything(model, tokenizer, task, options(str(tmp_path), max_len=max_len)).values()
            ((contexts, choices),) = seen
            left = {tuple(choice): context for context, options_ in zip(contexts, choices) for choice in options_}
            assert len(contexts) == len({max(0, len(full) + len(c) - 1 - max_len) for c in ids})
            for choice, nats in zip(ids, answer['nats']):
                kept = full[max(0, len(full) + len(choice) - 1 - max_len):]          # the end is what counts
                assert left[tuple(choice)] == kept and len(kept) + len(choice) - 1 <= max_len
                assert nats == pytest.approx(plain([kept], [[choice]])[0][0][0], rel=1e-5)


# --- the journal --------------------------------------------------------------------------------------------------

def test_a_journal_gives_back_whole_answers_of_the_same_questions_and_settings(eval_dir, tokenizer, tmp_path):
    (task,) = find_tasks(options(eval_dir, tasks='copa'))
    assert ask.journal_files(str(tmp_path / 'j'), task) == []
    keys, paths = ask.question_keys(task, {'a': 1}), [str(tmp_path / 'j' / f'copa.{rank}.jsonl') for rank in (0, 1)]
    good = {'nats': [1.5, float(2 ** -60), 7.0], 'n_token': [1, 2, 3]}
    for key, path in zip(keys, paths):
        with ask.journal_open(path) as write:
            write(key, good)
    with open(paths[1], 'a') as f:
        f.write(f'["{keys[2]}", {{"nats": [7.0, 8.0], "n_tok')           # killed here
    with ask.journal_open(paths[1]) as write:                            # the next start writes on
        write(keys[-1], good)
    with open(paths[1], 'a') as f:
        f.write('\n7\n[]\n[[1], 2]\n\xff\n')
    assert ask.journal_files(str(tmp_path / 'j'), task) == paths
    before = ask.journal_read(paths)
    assert {key: before.get(key) for key in keys} == {key: good if key in (keys[0], keys[1], keys[-1]) else None
                                                      for key in keys}
    (other,) = find_tasks(options(eval_dir, tasks='vqav2'))
    assert not {*ask.question_keys(other, {'a': 1}), *ask.question_keys(task, {'a': 2})} & {*before}
    task.examples[0].prompt += '?'
    assert [a == b for a, b in zip(ask.question_keys(task, {'a': 1}), keys)] == [False] + [True] * (len(keys) - 1)
