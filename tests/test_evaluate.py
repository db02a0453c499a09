"""evaluate.py on small benchmarks in the official formats, with an oracle model and with a real (untrained) one."""
import dataclasses
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from checkpoint import save_checkpoint
from conftest import child_env
import evaluate
import scorers
from data import load_tokenizer
from errors import UserError
from evaluate import default_options, evaluate_task, find_tasks
from images import View
from connectors import Projector
from model import VLM, Decoder, ModelConfig
from test_benchmarks import options, write_captions, write_eval_dir, write_mmvp
from vision import PatchProjection


# --- fixtures -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    """A byte-level BPE in the released GPT-NeoX form, small."""
    import tokenizers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    words = 'Yes No yes no red blue green what colour is it Answer the question using a single word or phrase'
    engine.train_from_iterator([words] * 50, trainers.BpeTrainer(
        vocab_size=400, special_tokens=['<|endoftext|>'], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    path = tmp_path_factory.mktemp('tokenizer') / 'tokenizer.json'
    engine.save(str(path))
    assert tokenizers
    return load_tokenizer(str(path))


@pytest.fixture(scope='module')
def eval_dir(tmp_path_factory):
    return write_eval_dir(tmp_path_factory.mktemp('eval'))


class Oracle:
    """Answers from the gold of a task: what a perfect model would do, to test everything around it."""

    def __init__(self, tokenizer, tasks, wrong=(), written=None):
        self.tokenizer, self.calls, self.encoded = tokenizer, [], 0
        self.n_slot, self.view, self.text_cond = 3, lambda resize: View(28, 3, resize), None
        self.gold, self.best = {}, {}
        for task in tasks:
            for e in task.examples:
                text = tuple(tokenizer.encode(e.prompt))
                if e.choices is None:
                    self.gold[text] = written if e.id in wrong else e.answers[0]
                else:
                    self.best[text] = (e, task)

    def question(self, ids):
        special = (self.tokenizer.image_id, self.tokenizer.sep_id)
        return tuple(i for i in ids if i not in special)

    def prefill_images(self, images, image_text):
        assert image_text is None
        self.encoded += len(images)
        return images

    def generate_each(self, feed, batch_size, longest, *, max_new_tokens, stop_ids):
        assert stop_ids == (self.tokenizer.sep_id, self.tokenizer.eot_id)
        while (given := feed(batch_size)) is not None:
            keys, prompts, _, image_index, images = given
            assert max(map(len, prompts)) <= longest
            self.calls.append((prompts, images, image_index))
            for key, p in zip(keys, prompts):
                yield key, self.tokenizer.encode(self.gold[self.question(p)])[:max_new_tokens]

    def choice_nats(self, contexts, choices, _, image_index, images):
        self.calls.append((contexts, choices, images, image_index))
        nats = []
        for context, options in zip(contexts, choices):
            e, task = self.best[self.question(context)]
            gold = e.choices[e.answers[0]]
            ids = self.tokenizer.encode(' ' + gold if task.layout == 'text' else gold)
            nats.append([0.0 if option == ids[:len(option)] else 1.0 * len(option) for option in options])
        return nats, None


def tiny_model(tokenizer, vision=True, seq_len=64):
    torch.manual_seed(3)
    decoder = Decoder(ModelConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=tokenizer.vocab_size,
                                  seq_len=seq_len))
    decoder.init_weights()
    encoder = PatchProjection(28) if vision else None
    projector = Projector(encoder.width, 32) if vision else None
    return VLM(decoder, encoder, projector, image_id=tokenizer.image_id).eval()


@pytest.fixture(scope='module')
def checkpoint(tokenizer, tmp_path_factory):
    """(vision, text-only) checkpoint folders as the training stages write them."""
    folders = []
    for stage in ('mix', 'text'):
        out, model = tmp_path_factory.mktemp('run'), tiny_model(tokenizer, vision=stage == 'mix')
        spec = dict(decoder=dataclasses.asdict(model.decoder.config), encoder=None, projector=None,
                    image_id=tokenizer.image_id)
        if model.encoder is not None:
            spec.update(encoder=model.encoder.spec(), projector=dict(kind='mlp2'))
        meta = dict(stage=stage, spec=spec, config={'resize': 'naive', 'system_prompt': 'be short'}, step=5, tokens=0,
                    samples=0, seen={}, cursor={}, start_cursor={}, text_seed=7, text_rows={}, bad_samples=[], moments='',
                    init_from='', schedule=dict(kind='main'), sources={})
        save_checkpoint(str(out), 'ckpt_100', model, None, tokenizer, meta)
        folders.append(str(out / 'ckpt_100'))
    return folders


def script(*args):
    """Run `python evaluate.py ARGS` in this process; returns the line it ends in, None if it ended normally."""
    before, sys.argv = (sys.argv, sys.excepthook), ['evaluate.py', *args]
    try:
        runpy.run_path(str(ROOT / 'evaluate.py'), run_name='__main__')
    except SystemExit as e:
        return e.code
    except UserError as e:                                      # sys.excepthook prints it
        return str(e)
    finally:
        sys.argv, sys.excepthook = before


# --- readers and scores, with the oracle --------------------------------------------------------------------------

def test_a_perfect_model_scores_100_on_every_format(eval_dir, tokenizer):
    opt = options(eval_dir)
    tasks = find_tasks(opt)
    names = ['vqav2', 'pope', 'textvqa', 'textvqa_ocr', 'refcoco', 'captions', 'boolq', 'copa']
    assert [task.name for task in tasks] == names
    for task in tasks:
        result, records = evaluate_task(Oracle(tokenizer, [task]), tokenizer, task, opt)
        assert (result['score'], result['malformed'], result['n']) == (1.0, 0, len(task.examples)), task.name
        assert len(records) == result['n'] and all(r['score'] == 1 for r in records)


def test_chat_rows_are_image_sep_question_sep(eval_dir, tokenizer):
    (task,) = find_tasks(options(eval_dir, tasks='vqav2'))
    oracle = Oracle(tokenizer, [task])
    evaluate_task(oracle, tokenizer, task, options(eval_dir))
    row = oracle.calls[0][0][0]
    question = tokenizer.encode(task.examples[0].prompt)
    assert row == [tokenizer.image_id] * 3 + [tokenizer.sep_id] + question + [tokenizer.sep_id]


def test_malformed_predictions_are_counted_and_wrong(eval_dir, tokenizer):
    for name, written in (('vqav2', ''), ('refcoco', 'left'), ('refcoco', '[0.1, 0.1, 0.9]')):
        (task,) = find_tasks(options(eval_dir, tasks=name))
        bad = task.examples[0].id
        result, records = evaluate_task(Oracle(tokenizer, [task], wrong=[bad], written=written), tokenizer, task,
                                        options(eval_dir))
        n = result['n']
        assert result['malformed'] == 1 and result['score'] == pytest.approx((n - 1) / n)
        assert [r['id'] for r in records if r['malformed']] == [bad] and records[0]['prediction'] == written


def test_nan_is_malformed_not_a_choice(eval_dir, tokenizer):
    (task,) = find_tasks(options(eval_dir, tasks='copa'))
    oracle = Oracle(tokenizer, [task])
    oracle.choice_nats = lambda contexts, choices, *_: ([[float('nan')] * len(c) for c in choices], None)
    result, records = evaluate_task(oracle, tokenizer, task, options(eval_dir))
    assert result['malformed'] == result['n'] and result['score'] == 0 and records[0]['prediction'] is None


def test_answers_that_never_stop_are_counted(eval_dir, tokenizer):
    (task,) = find_tasks(options(eval_dir, tasks='textvqa'))
    result, _ = evaluate_task(Oracle(tokenizer, [task]), tokenizer, task, options(eval_dir, max_new_tokens=2))
    assert result['reached_max_new_tokens'] == result['n'] and result['score'] == 0


# --- a real model -------------------------------------------------------------------------------------------------

def test_same_scores_at_any_batch_size(eval_dir, tokenizer):
    model, reference = tiny_model(tokenizer), {}
    for batch_size in (1, 2, 7, 64):
        opt = options(eval_dir, batch_size=batch_size, max_new_tokens=4, tasks='vqav2,pope,refcoco,copa')
        for task in find_tasks(opt):
            result, records = evaluate_task(model, tokenizer, task, opt)
            nats = [r.pop('nats', None) for r in records]
            first = reference.setdefault(task.name, (result['score'], records, nats))
            assert (result['score'], records) == first[:2], f'{task.name} at batch {batch_size}'
            for ours, theirs in zip(nats, first[2]):
                assert ours is None or ours == pytest.approx(theirs, abs=1e-4)
    assert len({r['prediction'] for r in reference['vqav2'][1]}) > 1     # not one answer whatever the input


def test_run_writes_results_and_predictions(eval_dir, checkpoint, tmp_path, capsys):
    opt = default_options(ckpt=checkpoint[0], eval_dir=eval_dir, max_new_tokens=4, device='cpu', out_dir=str(tmp_path))
    evaluate.run(opt)
    content = json.loads((tmp_path / 'results.json').read_text())
    assert content['schema'] == 1 and content['meta']['step'] == 5 and 'rng' not in content['meta']
    assert content['config']['resize'] == 'naive' and content['config']['system_prompt'] == 'be short'
    assert content['config']['dtype'] == 'float32' and content['ckpt'] == checkpoint[0]
    assert list(content['tasks']) == ['vqav2', 'pope', 'textvqa', 'textvqa_ocr', 'refcoco', 'captions', 'boolq', 'copa']
    for name, result in content['tasks'].items():
        assert {'score', 'n', 'low', 'high', 'chance', 'constant', 'malformed', 'variant', 'types'} <= set(result)
        assert 0 <= result['low'] <= result['score'] <= result['high'] <= 1
        lines = (tmp_path / 'predictions' / f'{name}.jsonl').read_text().splitlines()
        assert len(lines) == result['n']
        assert {'id', 'prompt', 'prediction', 'answers', 'score'} <= set(json.loads(lines[0]))
        assert sum(json.loads(line)['score'] for line in lines) / len(lines) == pytest.approx(result['score'])
    vision = content['stable']['vision']
    assert vision['missing'] == ['gqa'] and vision['tasks'] == ['pope', 'refcoco', 'textvqa', 'vqav2']
    expected = sum(content['tasks'][t]['score'] for t in vision['tasks']) - 1
    assert vision['score'] == pytest.approx(expected / 4)
    assert content['stable']['text, 9 tasks']['tasks'] == ['copa']
    assert content['stable']['text, 10 tasks']['tasks'] == ['boolq', 'copa']
    assert not list(tmp_path.glob('**/*.part'))
    printed = capsys.readouterr().out
    assert 'malformed' in printed and 'stable score, vision' in printed and 'over 4 of 5: pope, refcoco' in printed


def test_results_are_kept_across_tasks_and_out_of_retentions_way(eval_dir, checkpoint, tmp_path, capsys):
    step = tmp_path / 'run' / 'ckpt_step_5'
    shutil.copytree(checkpoint[1], step)
    (step.parent / 'ckpt_last').symlink_to('ckpt_step_5')
    out = step.parent / 'eval' / 'ckpt_step_5'
    args = f"--ckpt={step.parent / 'ckpt_last'}", f'--eval_dir={eval_dir}', '--device=cpu'
    for task in ('copa', 'boolq'):
        assert script(*args, f'--tasks={task}') is None
    tasks = lambda: list(json.loads((out / 'results.json').read_text())['tasks'])
    assert tasks() == ['copa', 'boolq'] and 'copa' in (out / 'table.txt').read_text()
    assert script(*args, '--tasks=copa', '--text_variant=dclm') is None
    assert tasks() == ['copa'] and 'made with another text_variant and is replaced' in capsys.readouterr().out
    assert 'nothing to do' in script(*args, '--tasks=pope')
    assert not (out / 'results.part.json').exists() and tasks() == ['copa']


def test_two_evaluations_of_one_checkpoint_keep_each_others_results(eval_dir, checkpoint, tmp_path, monkeypatch):
    plain = evaluate.evaluate_task

    def ask(tasks):
        return evaluate.run(default_options(ckpt=checkpoint[1], eval_dir=eval_dir, device='cpu', tasks=tasks,
                                            out_dir=str(tmp_path)))

    def with_another_meanwhile(model, tokenizer, task, *rest):
        if task.name == 'boolq':
            ask('copa')                                      # begins after and ends before the one of boolq
        return plain(model, tokenizer, task, *rest)
    monkeypatch.setattr(evaluate, 'evaluate_task', with_another_meanwhile)
    assert set(ask('boolq')['tasks']) == {'boolq', 'copa'}
    assert set(json.loads((tmp_path / 'results.json').read_text())['tasks']) == {'boolq', 'copa'}


def test_asking_on_a_cpu_does_not_import_torchs_compiler(eval_dir, checkpoint, tmp_path):
    code = f'''
import sys; sys.path.insert(0, {str(ROOT)!r}); import evaluate
evaluate.run(evaluate.default_options(ckpt={checkpoint[0]!r}, eval_dir={eval_dir!r}, tasks='copa,pope,textvqa',
                                      max_new_tokens=2, device='cpu', out_dir={str(tmp_path)!r}))
print('imported', [name for name in ('torch._dynamo', 'sympy') if name in sys.modules])'''
    done = subprocess.run([sys.executable, '-c', code], env=child_env(), capture_output=True, text=True, timeout=120)
    assert done.stdout.endswith('imported []\n'), done.stdout + done.stderr      # two seconds, for nothing


def test_an_evaluation_that_is_killed_leaves_no_results(eval_dir, checkpoint, tmp_path, monkeypatch):
    plain = evaluate.evaluate_task
    monkeypatch.setattr(evaluate, 'evaluate_task', lambda model, tokenizer, task, *rest: (
        pytest.fail('killed') if task.name == 'copa' else plain(model, tokenizer, task, *rest)))
    with pytest.raises(pytest.fail.Exception):
        evaluate.run(default_options(ckpt=checkpoint[1], eval_dir=eval_dir, device='cpu', out_dir=str(tmp_path),
                                     tasks='boolq,copa'))
    assert not (tmp_path / 'results.json').exists() and not (tmp_path / 'table.txt').exists()
    assert os.listdir(tmp_path / 'predictions') == ['boolq.jsonl']


# --- processes, kills, other models' answers ----------------------------------------------------------------------

def outcome(folder):
    """What an evaluation found: results.json's tasks without times, and the records with their nats apart."""
    tasks = json.loads((folder / 'results.json').read_text())['tasks']
    records = {name: [json.loads(line) for line in (folder / 'predictions' / f'{name}.jsonl').read_text().splitlines()]
               for name in tasks}
    nats = [r.pop('nats', None) for rows in records.values() for r in rows]
    return {name: {**t, 'seconds': 0} for name, t in tasks.items()}, records, nats


KILL = """
import ask, contextlib, os, signal
plain, left = ask.journal_open, [{at}]
@contextlib.contextmanager
def journal_open(path):
    with plain(path) as write:
        def torn(key, answer):
            left[0] -= 1
            if left[0] == 0:
                with open(path, 'a') as f:
                    f.write('["%s", {{"te' % key)
                os.kill(os.getpid(), signal.SIGKILL)
            write(key, answer)
        yield torn
    print('written', -left[0])
ask.journal_open = journal_open
"""


def test_processes_and_kills_change_no_score(eval_dir, checkpoint, scripts, tmp_path):
    args = ['evaluate.py', f'--ckpt={checkpoint[0]}', f'--eval_dir={eval_dir}', '--device=cpu', '--n_thread=1',
            '--max_new_tokens=4', '--batch_size=3', '--n_worker=1']
    tasks = '--tasks=vqav2,pope,refcoco,copa'
    scripts(*args, tasks, f'--out_dir={tmp_path / "a"}')
    expected = outcome(tmp_path / 'a')
    n = sum(t['n'] for t in expected[0].values())
    assert len(expected[0]) == 4 and not (tmp_path / 'a' / 'journal').exists()
    two = scripts(*args, tasks, f'--out_dir={tmp_path / "b"}', world_size=2)
    assert outcome(tmp_path / 'b')[:2] == expected[:2] and two.out.count('stable score, vision:') == 1
    for ours, theirs in zip(outcome(tmp_path / 'b')[2], expected[2]):
        assert ours is None or ours == pytest.approx(theirs, rel=1e-4)                   # other batches
    out, done = f'--out_dir={tmp_path / "c"}', 0
    for at in (1, 5, n - 7):                                             # each goes on where the one before was killed
        run = scripts(*args, tasks, out, hook=KILL.format(at=at), code=-9)
        done += at - 1
        assert not (tmp_path / 'c' / 'results.json').exists()
    run = scripts(*args, '--tasks=copa,refcoco,pope,vqav2', out, hook=KILL.format(at=0))  # the tasks in another order
    assert sum(int(line.split()[1]) for line in run.out.splitlines() if line.startswith('written')) == n - done
    assert outcome(tmp_path / 'c')[:2] == expected[:2] and not (tmp_path / 'c' / 'journal').exists()
    run = scripts(*args, tasks, out, hook=KILL.format(at=0))             # what is done is asked again
    assert f'written {expected[0]["vqav2"]["n"]}' in run.out


def test_two_results_on_mmvp_are_compared_by_its_pairs(tmp_path):
    write_mmvp(tmp_path, 4)                                              # (b) (a) (b) (a) are right
    for name, said in (('a', 'baba'), ('b', 'bbba'), ('c', 'bbaa')):
        rows = [{'id': str(i), 'prediction': f'({letter})'} for i, letter in enumerate(said, 1)]
        (tmp_path / f'{name}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
        assert script('score', 'mmvp', str(tmp_path / f'{name}.jsonl'), f'--eval_dir={tmp_path}',
                      f'--out_dir={tmp_path / name}') is None
    for name, score in (('b', 0.5), ('c', 0.0)):                         # of single questions 3 and 2 of 4
        found = evaluate.compare(tmp_path / 'a', tmp_path / name)['mmvp']
        assert (found['n'], found['a'], found['b']) == (2, 1.0, score)
        table = json.loads((tmp_path / name / 'results.json').read_text())['tasks']['mmvp']
        assert (table['n'], table['score']) == (2, score)


def test_answers_of_another_model_are_scored_and_two_results_are_compared(eval_dir, checkpoint, tmp_path, capsys):
    (task,) = find_tasks(options(eval_dir, tasks='vqav2'))
    for name, wrong in (('a', 0), ('b', 8)):
        rows = [{'id': e.id, 'prediction': '' if i < wrong else e.answers[0]} for i, e in enumerate(task.examples)]
        (tmp_path / f'{name}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
        assert script('score', 'vqav2', str(tmp_path / f'{name}.jsonl'), f'--eval_dir={eval_dir}',
                      f'--out_dir={tmp_path / name}') is None
    entry = json.loads((tmp_path / 'b' / 'results.json').read_text())['tasks']['vqav2']
    assert (entry['score'], entry['empty'], entry['malformed']) == (pytest.approx(1 / 9), 8, 8)
    assert script('score', 'vqav2', str(tmp_path / 'b.jsonl'), f'--eval_dir={eval_dir}') is None   # only printed
    assert 'vqav2' in capsys.readouterr().out
    assert script('score', 'copa', str(tmp_path / 'b.jsonl'), f'--eval_dir={eval_dir}') == (
        f"{tmp_path / 'b.jsonl'}: 6 ids are missing, first '0'; expected the 6 ids of copa, such as '0'")
    own = evaluate.run(default_options(ckpt=checkpoint[0], eval_dir=eval_dir, device='cpu', tasks='vqav2,copa',
                                       max_new_tokens=3, out_dir=str(tmp_path / 'own')))
    # our own predictions as another model's: the same score
    assert script('score', 'copa', str(tmp_path / 'own' / 'predictions' / 'copa.jsonl'), f'--eval_dir={eval_dir}',
                  f'--out_dir={tmp_path / "again"}') is None
    again = json.loads((tmp_path / 'again' / 'results.json').read_text())
    assert again['tasks']['copa']['score'] == own['tasks']['copa']['score']
    capsys.readouterr()
    assert script('compare', str(tmp_path / 'a' / 'results.json'), str(tmp_path / 'b')) is None
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith('vqav2'))
    assert line.split()[:5] == ['vqav2', '9', '100.00', '11.11', '-88.89'] and line.endswith('differs')
    (tmp_path / 'ckpt').mkdir()                                          # a checkpoint, and results of an older version
    shutil.copytree(tmp_path / 'a', tmp_path / 'ckpt' / 'eval')
    edited = json.loads((tmp_path / 'a' / 'results.json').read_text())
    del edited['tasks']['vqav2']['empty'], edited['tasks']['vqav2']['skipped']
    (tmp_path / 'ckpt' / 'eval' / 'results.json').write_text(json.dumps(edited))
    assert evaluate.compare(tmp_path / 'ckpt', tmp_path / 'b')['vqav2']['difference'] == pytest.approx(-8 / 9)
    capsys.readouterr()
    found = evaluate.compare(tmp_path / 'own', tmp_path / 'a')
    assert list(found) == ['vqav2'] and f'only in {tmp_path / "own"}: copa' in capsys.readouterr().out
    lines = (tmp_path / 'b' / 'predictions' / 'vqav2.jsonl').read_text().splitlines()
    (tmp_path / 'b' / 'predictions' / 'vqav2.jsonl').write_text('\n'.join(lines[2:]))
    assert evaluate.compare(tmp_path / 'a', tmp_path / 'b')['vqav2']['n'] == 7
    assert '2 questions are not in both' in capsys.readouterr().out
    for args, words in ((('compare', 'x'), 'compare A B'), (('compare', 'x', 'y', 'z'), 'compare A B'),
                        (('compare', str(tmp_path), str(tmp_path)), 'results.json: not readable'),
                        (('score', '--tasks=x', 'y'), 'score TASK'), (('score',), 'score TASK'),
                        (('compare', str(tmp_path / 'again'), str(tmp_path / 'a')), 'no task in common'),
                        (('score', 'nope', 'x', f'--eval_dir={eval_dir}'), 'nope'),
                        (('score', 'vqav2,copa', 'x', f'--eval_dir={eval_dir}'), 'expected one task'),
                        (('score', '', 'x', f'--eval_dir={eval_dir}'), 'expected one task')):
        message = script(*args)
        assert isinstance(message, str) and words in message and '\n' not in message, args


def test_a_checkpoint_of_another_scale_is_told(eval_dir, checkpoint, tmp_path, capsys):
    shutil.copytree(checkpoint[1], tmp_path / 'ckpt')
    meta = json.loads((tmp_path / 'ckpt' / 'meta.json').read_text())
    meta['config']['scale'] = 'tiny'
    (tmp_path / 'ckpt' / 'meta.json').write_text(json.dumps(meta))
    script(f"--ckpt={tmp_path / 'ckpt'}", f'--eval_dir={eval_dir}', '--device=cpu', '--tasks=copa')
    assert "!!!" in (out := capsys.readouterr().out) and 'may need config/tiny.py' in out


def test_text_only_checkpoint_skips_vision_and_names_it(eval_dir, checkpoint, capsys):
    assert script(f'--ckpt={checkpoint[1]}', f'--eval_dir={eval_dir}', '--device=cpu', '--tasks=pope,copa') is None
    assert 'pope: skipped' in capsys.readouterr().out
    content = json.loads((Path(checkpoint[1]) / 'eval' / 'results.json').read_text())
    assert list(content['tasks']) == ['copa'] and 'vision' not in content['stable']


def test_one_photo_and_plain_text(checkpoint, tmp_path, capsys):
    photo = tmp_path / 'photo.webp'
    Image.radial_gradient('L').resize((90, 40)).save(photo)
    vision, text = (f'--ckpt={folder}' for folder in checkpoint)
    common_args = ('--device=cpu', '--max_new_tokens=5')
    printed = []
    asked = (vision, f'--image={photo}', '--prompt=what is it?')
    for args in (asked, asked, (vision, f'--image={photo}'), (vision, '--prompt=what is'), (text, '--prompt=what is'),
                 (text, '--prompt=what is', '--temperature=5', '--seed=1'),
                 (text, '--prompt=what is', '--temperature=5', '--seed=1'),
                 (text, '--prompt=what is', '--temperature=5', '--seed=2')):
        assert script(*args, *common_args) is None
        printed.append([line for line in capsys.readouterr().out.split('\n') if not line.startswith('config:')])
    assert printed[0] == printed[1] and printed[5] == printed[6] != printed[7]
    message = script(text, f'--image={photo}', '--prompt=x', *common_args)
    assert 'text-only checkpoint' in message and '\n' not in message
    message = script(vision, f'--image={tmp_path}/none.jpg', '--prompt=x', *common_args)
    assert 'none.jpg' in message and '\n' not in message


class Terminal(io.StringIO):
    def isatty(self):
        return True


def finetuned(checkpoint, folder):
    """A copy of the checkpoint that says it is fine-tuned."""
    shutil.copytree(checkpoint[0], folder)
    meta = json.loads((folder / 'meta.json').read_text())
    (folder / 'meta.json').write_text(json.dumps(meta | {'stage': 'finetune'}))
    return str(folder)


def lines_of(capsys):
    return [line for line in capsys.readouterr().out.split('\n') if not line.startswith('config:')]


def test_on_a_terminal_a_photo_is_asked_about_until_an_empty_line(checkpoint, tmp_path, capsys, monkeypatch):
    photo = tmp_path / 'photo.png'
    Image.radial_gradient('L').resize((90, 40)).save(photo)
    args = (f'--image={photo}', '--device=cpu', '--max_new_tokens=5')
    tuned = f'--ckpt={finetuned(checkpoint, tmp_path / "ckpt")}'
    expected = []
    for question in ('what is it?', 'is it red?'):
        assert script(tuned, *args, f'--prompt={question}') is None
        expected += lines_of(capsys)[:-1]
    encoded, plain = [], PatchProjection.forward
    monkeypatch.setattr(PatchProjection, 'forward', lambda self, x: encoded.append(len(x)) or plain(self, x))
    for end in ('\n', '  \nnot read\n', ''):                            # an empty line, a blank one, the end of input
        monkeypatch.setattr(sys, 'stdin', Terminal('what is it?\nis it red?\n' + end))
        assert script(tuned, *args) is None
        printed = lines_of(capsys)
        assert printed[0] == f'ask about {photo}; an empty line ends' and '> '.join(printed[1:]).startswith('> ')
        assert [line.removeprefix('> ') for line in printed[1:1 + len(expected)]] == expected
    assert encoded == [1, 1, 1]                                          # once for all questions
    monkeypatch.setattr(sys, 'stdin', Terminal('\n'))
    assert script(f'--ckpt={checkpoint[0]}', *args) is None              # stage 2: its caption first
    assert lines_of(capsys)[-2].startswith('ask about')


def test_a_fine_tuned_model_without_a_question_says_that_it_wants_one(checkpoint, tmp_path, capsys, monkeypatch):
    photo = tmp_path / 'photo.png'
    Image.radial_gradient('L').resize((90, 40)).save(photo)
    tuned = finetuned(checkpoint, tmp_path / 'ckpt')
    monkeypatch.setattr(VLM, 'generate', lambda self, prompts, **kw: [[]])
    for folder, printed in ((tuned, [f'!!! {tuned} was fine-tuned to answer questions: give it one with --prompt=...',
                                     '']),
                            (checkpoint[0], ['', ''])):
        assert script(f'--ckpt={folder}', f'--image={photo}', '--device=cpu') is None
        assert lines_of(capsys) == printed


# --- images and captions ------------------------------------------------------------------------------------------

def test_boxes_are_asked_on_the_image_as_stored_and_questions_on_it_upright(tmp_path, tokenizer):
    write_eval_dir(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6                                                     # stored lying on its side
    for path in tmp_path.glob('*/*/*.jpg'):
        image = Image.new('RGB', Image.open(path).size, 'black')
        image.paste('white', (0, 0, image.width // 2, image.height))     # the left half, which turns to the top
        image.save(path, exif=exif)
    opt = options(str(tmp_path), resize='naive')
    for name, half in (('refcoco', lambda image: image[:, :, :12]), ('textvqa', lambda image: image[:, :12])):
        (task,) = find_tasks(options(str(tmp_path), tasks=name))
        oracle = Oracle(tokenizer, [task])
        evaluate_task(oracle, tokenizer, task, opt)
        for _, images, _ in oracle.calls:
            assert all(half(image).float().mean() > 240 and image.float().mean() < 140 for image in images), name
    (task,) = find_tasks(options(str(tmp_path), tasks='refcoco'))
    assert 'as stored' in task.variant and task.boxes


def test_captions_are_asked_without_a_question_and_not_of_a_fine_tuned_model(eval_dir, checkpoint, tmp_path, tokenizer,
                                                                             capsys):
    (task,) = find_tasks(options(eval_dir, tasks='captions'))
    model, seen = tiny_model(tokenizer), []
    plain = model.generate_each

    def generate_each(feed, *args, **kw):
        return plain(lambda n: (given := feed(n)) and (seen.extend(given[1]) or given), *args, **kw)
    model.generate_each = generate_each
    evaluate_task(model, tokenizer, task, options(eval_dir))
    assert seen == [[tokenizer.image_id] * model.encoder.n_token + [tokenizer.sep_id]] * 2
    args = f'--eval_dir={tmp_path / "eval"}', '--device=cpu', '--max_new_tokens=3'
    write_captions(tmp_path / 'eval')
    assert script(f'--ckpt={checkpoint[0]}', f'--out_dir={tmp_path / "2"}', *args) is None
    entry = json.loads((tmp_path / '2' / 'results.json').read_text())
    assert entry['tasks']['captions']['n'] == 2 and entry['stable'] == {}
    tuned = f'--ckpt={finetuned(checkpoint, tmp_path / "ckpt")}'
    assert 'nothing to do' in script(tuned, *args)
    assert 'captions: skipped, a fine-tuned model' in capsys.readouterr().out
    assert script(tuned, '--tasks=captions', *args) is None
    assert 'nothing to do' in script(f'--ckpt={checkpoint[1]}', *args)
    assert 'captions: skipped' in capsys.readouterr().out


def test_user_mistakes_end_in_one_line(tmp_path, eval_dir, checkpoint):
    for args, words in (((), "ckpt=''"), ((f'--ckpt={tmp_path}/no',), 'no meta.json'),
                        (('--pope_words=(1, 2)',), 'pope_words'), (("--pope_words=('Yes', 'yes')",), 'pope_words'),
                        (("--pope_words=('Yes', 'No', 'no')",), 'pope_words'),
                        (('--tasks=nope',), 'there is boolq, captions, copa, pope, refcoco, textvqa'),
                        (('--eval_dir=nowhere',), 'nowhere')):
        given = args if not args or args[0].startswith('--ckpt') else (f'--ckpt={checkpoint[0]}', *args)
        message = script(f'--eval_dir={eval_dir}', *given, '--device=cpu')
        assert isinstance(message, str) and words in message and '\n' not in message, args


@pytest.mark.parametrize('key, value', [
    ('batch_size', 0), ('max_len', 0), ('max_new_tokens', 0), ('n_example', -1), ('n_thread', -3), ('n_worker', -1),
    ('temperature', -1), ('top_k', -1), ('seed', -1), ('seed', 2 ** 63), ('vqav2_baseline', 2), ('dtype', 'float16'),
    ('device', 'tpu'), ('resize', 'big'), ('box_frame', 'x'), ('text_variant', 'x'), ('pope_by', 'x'),
    ('ocid_iou', 2), ('vqa_variant', 'x')])
def test_a_value_outside_its_key_s_rule_is_refused(checkpoint, key, value):
    message = script(f'--ckpt={checkpoint[0]}', f'--{key}={value}')
    assert isinstance(message, str) and key in message and '\n' not in message


def test_a_failed_write_leaves_the_old_results(tmp_path, monkeypatch):
    path = tmp_path / 'results.json'
    evaluate.write_whole(path, 'old')

    def fail(*_):
        raise OSError('disk full')
    monkeypatch.setattr(os, 'fsync', fail)
    with pytest.raises(UserError, match='results.json: cannot be written .disk full'):
        evaluate.write_whole(path, 'new')
    assert path.read_text() == 'old'


def test_importing_has_no_side_effects_and_keeps_the_promised_names():
    for name in ('vqa_accuracy', 'box_iou', 'stable_score', 'parse_box'):
        assert getattr(evaluate, name) is getattr(scorers, name)
