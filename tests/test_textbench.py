"""textbench.py on rows as they are released; lm-evaluation-harness, where installed, judges prompts and scores."""
import json
import sys
from pathlib import Path
from random import Random

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import scorers
from benchmarks import find_tasks
from errors import UserError
from test_benchmarks import options
from textbench import FORMS, hellaswag, math_qa

WORDS = 'the red Dog of Ω sat near a blue; [title] and [step] two  cats, then [substeps] left 3.5 été'.split(' ')


def text(draw, low=1, high=8):
    return ' '.join(draw.choices(WORDS, k=draw.randint(low, high)))


def make_rows(name, draw, n=12):
    """n rows of one benchmark in its own layout, of random words."""
    rows = []
    for i in range(n):
        options = [f'{text(draw)} {k}' for k in range(4)]
        gold = draw.randrange(4)
        rows.append({
            'agieval': {'query': text(draw) + ' \nA: Among A through D, the answer is', 'choices': options,
                        'gold': [gold]},
            'arc_easy': {'id': str(i), 'question': text(draw), 'answerKey': 'ABCD'[gold],
                         'choices': {'text': options, 'label': list('ABCD')}},
            'conceptual_combinations': {'idx': i, 'inputs': text(draw) + '\nA: ', 'targets': [options[gold]],
                                        'multiple_choice_targets': options,
                                        'multiple_choice_scores': [int(k == gold) for k in range(4)]},
            'boolq': {'question': text(draw), 'passage': text(draw, 9, 20), 'idx': i, 'label': gold % 2},
            'copa': {'premise': text(draw).capitalize() + '.', 'choice1': 'The ' + text(draw),
                     'choice2': 'It ' + text(draw), 'question': ('cause', 'effect')[i % 2],
                     'label': gold % 2, 'idx': i},
            'hellaswag': {'ind': i, 'activity_label': text(draw, 1, 2), 'ctx_a': text(draw), 'ctx_b': text(draw),
                          'ctx': 'unused', 'endings': options, 'label': str(gold), 'split': 'val'},
            'math_qa': {'Problem': text(draw), 'Rationale': 'unused', 'correct': 'abcd'[gold],
                        'options': 'a ) 38 , b ) rs . 27.675 , c ) 1,000 , d ) 2 ) 3 , e ) none of these',
                        'annotated_formula': '', 'linear_formula': '', 'category': 'general'},
            'piqa': {'goal': text(draw), 'sol1': text(draw), 'sol2': text(draw), 'label': gold % 2},
            'pubmed_qa': {'QUESTION': text(draw), 'CONTEXTS': [text(draw), text(draw)], 'LABELS': [], 'MESHES': [],
                          'YEAR': None, 'final_decision': ('yes', 'no', 'maybe')[gold % 3], 'LONG_ANSWER': ''},
        }['conceptual_combinations' if name == 'cs_algorithms' else name])
    return rows


NAMES = ('agieval', *FORMS)


def write_rows(folder, name, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f'{name}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')


def read(tmp_path, name, rows, **changes):
    write_rows(tmp_path / 'text', name, rows)
    (task,) = find_tasks(options(str(tmp_path), tasks=name, **changes))
    return task


# --- the harness's own answer -------------------------------------------------------------------------------------

HARNESS = {'agieval': 'agieval/sat-en.yaml', 'arc_easy': 'arc/arc_easy.yaml', 'boolq': 'super_glue/boolq/default.yaml',
           'conceptual_combinations': 'bigbench/multiple_choice/conceptual_combinations.yaml', 'piqa': 'piqa/piqa.yaml',
           'cs_algorithms': 'bigbench/multiple_choice/cs_algorithms.yaml', 'copa': 'super_glue/copa/default.yaml',
           'hellaswag': 'hellaswag/hellaswag.yaml', 'math_qa': 'mathqa/mathqa.yaml',
           'pubmed_qa': 'pubmedqa/pubmedqa.yaml'}


@pytest.mark.parametrize('name', NAMES)
def test_prompts_choices_and_scores_are_the_harness_s(tmp_path, monkeypatch, name):
    lm_eval = pytest.importorskip('lm_eval', reason='lm-evaluation-harness is not installed')
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml
    for variable in ('HF_DATASETS_OFFLINE', 'HF_HUB_OFFLINE'):
        monkeypatch.setenv(variable, '1')
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    draw = Random(3)
    rows = make_rows(name, draw)
    task = read(tmp_path, name, rows)
    config = load_yaml(Path(lm_eval.__file__).parent / 'tasks' / HARNESS[name], resolve_func=True)
    split = config.get('test_split') or config.get('validation_split')
    config |= {'dataset_path': 'json', 'dataset_name': None, 'task': name,
               'dataset_kwargs': {'data_files': {split: str(tmp_path / 'text' / f'{name}.jsonl')},
                                  'cache_dir': str(tmp_path / 'cache')}}
    for key in ('training_split', 'validation_split', 'test_split'):
        config[key] = split if config.get(key) == split else None
    judge = ConfigurableTask(config=config)
    for doc, example in zip(judge.eval_docs, task.examples, strict=True):
        requests = judge.construct_requests(doc, judge.doc_to_text(doc))
        assert [r.args for r in requests] == [(example.prompt, task.delimiter + choice) for choice in example.choices]
        for _ in range(20):                                  # near equals by length: characters are no bytes
            nats = [len(choice) * draw.uniform(.9, 1.1) for choice in example.choices]
            metrics = judge.process_results(doc, [(-value, False) for value in nats])
            assert ('acc_norm' if 'acc_norm' in metrics else 'acc') == task.norm
            for norm in set(metrics) & {'acc', 'acc_norm', 'acc_bytes'}:
                picked = scorers.choose(nats, example.choices, [1] * len(nats), norm)
                assert scorers.same(picked, example.answers) == metrics[norm], norm


# --- by hand ------------------------------------------------------------------------------------------------------

def test_hellaswag_is_cleaned_and_math_qa_s_options_are_taken_apart():
    row = {'activity_label': 'Roof', 'ctx_a': ' A man [title] works. [step] Hard.', 'ctx_b': 'he IS', 'label': '1',
           'endings': ['goes [substeps]  up.', ' down  [title] on.']}
    assert hellaswag(row) == ('Roof: A man. works. Hard. He is', ['goes  up.', 'down . on.'], [1])
    row = {'Problem': 'how many?', 'correct': 'b',
           'options': 'a ) 3 , b ) 1,000 , c ) rs . 5 , d ) 2 ) 3 , e ) none , '}
    assert math_qa(row) == ('Question: how many?\nAnswer:', ['3', '1,000', 'rs . 5', '2 ) 3', 'none'], [1])


@pytest.mark.parametrize('name, row, prompt, choices, gold', [
    ('copa', {'premise': 'The man fell. ', 'choice1': 'He was Tall.', 'choice2': 'It rained.', 'question': 'cause',
              'label': 1}, 'The man fell because', [' he was Tall.', ' it rained.'], [1]),
    ('copa', {'premise': 'The man fell.', 'choice1': 'He was.', 'choice2': 'It rained.', 'question': 'effect',
              'label': 0}, 'The man fell therefore', [' he was.', ' it rained.'], [0]),
    ('boolq', {'passage': 'A. B.', 'question': 'is it', 'answer': True}, 'A. B.\nQuestion: is it?\nAnswer:',
     ['no', 'yes'], [1]),
    ('boolq', {'passage': 'A.', 'question': 'is it', 'label': 0}, 'A.\nQuestion: is it?\nAnswer:', ['no', 'yes'], [0]),
    ('piqa', {'goal': 'how', 'sol1': 'a', 'sol2': 'b', 'label': 1}, 'Question: how\nAnswer:', ['a', 'b'], [1]),
    ('pubmedqa', {'QUESTION': 'is it?', 'CONTEXTS': ['A.', 'B.'], 'final_decision': 'maybe'},
     'Abstract: A.\nB.\nQuestion: is it?\nAnswer:', ['yes', 'no', 'maybe'], [2]),
    ('arc_easy', {'question': 'Why?', 'choices': {'text': ['x', 'y'], 'label': ['1', '2']}, 'answerKey': '2'},
     'Question: Why?\nAnswer:', ['x', 'y'], [1]),
    ('arc_easy', {'question': {'stem': 'Why?', 'choices': [{'text': 'x', 'label': 'A'}, {'text': 'y', 'label': 'B'}]},
                  'answerKey': 'A'}, 'Question: Why?\nAnswer:', ['x', 'y'], [0]),
    ('bigbench_cs_algorithms', {'inputs': 'Is ( ] ok?\nA: ', 'targets': ['Invalid'],
                                'multiple_choice_targets': ['Valid', 'Invalid']}, 'Is ( ] ok?\nA: ',
     ['Valid', 'Invalid'], [1]),
    ('sat_en', {'query': 'Text. \nA: Among A through D, the answer is', 'choices': ['(A)x', '(B)y'], 'gold': [1]},
     'Text. \nA: Among A through D, the answer is', ['(A)x', '(B)y'], [1])])
def test_released_rows_become_the_harness_s_prompts(tmp_path, name, row, prompt, choices, gold):
    task = read(tmp_path, name, [row])
    (example,) = task.examples
    assert (example.prompt, example.choices, example.answers) == (prompt, choices, gold)
    norms = {'arc_easy': 'acc_norm', 'piqa': 'acc_norm', 'sat_en': 'acc_norm'}
    assert task.norm == norms.get(name, 'acc') and task.variant == f'lm-eval: {task.norm}' and task.delimiter == ' '


def test_a_number_of_questions_other_than_the_harness_s_is_told(tmp_path, capsys):
    rows = make_rows('piqa', Random(0), 3)
    read(tmp_path, 'piqa', rows)
    assert 'piqa.jsonl: 3 questions, lm-evaluation-harness asks 1838' in capsys.readouterr().out
    assert FORMS['pubmed_qa'].n == 500 and FORMS['math_qa'].n == 2985    # what the paper's table 8 was made on


def test_a_bigbench_row_without_choices_is_no_question(tmp_path):
    rows = make_rows('cs_algorithms', Random(0), 3)
    rows[1]['multiple_choice_targets'] = []
    assert [e.id for e in read(tmp_path, 'cs_algorithms', rows).examples] == ['0', '2']


def test_dclm_s_prompts_are_a_variant(tmp_path):
    row = {'query': ' Passage: A.\nQuestion: is it? ', 'choices': ['no', ' yes '], 'gold': 1}
    task = read(tmp_path, 'boolq', [row], text_variant='dclm')
    assert task.examples[0].prompt == 'Passage: A.\nQuestion: is it?\nAnswer:'
    assert task.examples[0].choices == ['no', 'yes']
    assert (task.norm, task.delimiter, task.variant) == ('token', None, 'DCLM: nats per token')
    task = read(tmp_path, 'boolq', [row])
    assert task.examples[0].prompt == ' Passage: A.\nQuestion: is it? \nAnswer:' and task.delimiter == ' '
    with pytest.raises(UserError, match="piqa.jsonl: text_variant='dclm' asks DCLM's own files"):
        read(tmp_path, 'piqa', make_rows('piqa', Random(0)), text_variant='dclm')


@pytest.mark.parametrize('name, change, message', [
    ('piqa', {'label': 2}, "entry 0 has gold=[2] for 2 choices"),
    ('piqa', {'sol2': None}, "entry 0: choices: 1 is missing"),
    ('piqa', {'goal': None}, 'entry 0: not readable as a row of piqa'),
    ('pubmed_qa', {'QUESTION': 3}, 'entry 0: not readable as a row of pubmed_qa'),
    ('cs_algorithms', {'inputs': 3}, 'entry 0: prompt is 3, expected str'),
    ('copa', {'question': 'why'}, 'entry 0: not readable as a row of copa'),
    ('arc_easy', {'answerKey': 'E'}, 'entry 0: not readable as a row of arc_easy'),
    ('arc_easy', {'choices': None}, 'entry 0: not readable as a row of arc_easy'),
    ('arc_easy', {'choices': {'text': ['a', 1e99], 'label': ['A', 'B']}, 'answerKey': 'A'},
     'entry 0: choices: 1 is 1e+99'),
    ('hellaswag', {'label': ''}, 'entry 0: not readable as a row of hellaswag'),
    ('hellaswag', {'label': 4}, 'entry 0 has gold=[4] for 4 choices'),
    ('math_qa', {'options': 'a, b, c'}, 'entry 0: choices is 0 long, expected from 2 to 999'),
    ('pubmed_qa', {'final_decision': 'perhaps'}, 'entry 0: not readable as a row of pubmed_qa'),
    ('cs_algorithms', {'targets': ['none of them']}, 'entry 0: not readable as a row of cs_algorithms'),
    ('agieval', {'gold': [9]}, 'entry 0 has gold=[9] for 4 choices'), ('agieval', {'gold': []}, 'entry 0 has gold=[]'),
    ('agieval', {'gold': ['A']}, "entry 0 has gold=['A']")])
def test_a_broken_row_is_named(tmp_path, name, change, message):
    rows = make_rows(name, Random(1), 2)
    rows[0] |= change
    if name == 'math_qa':
        rows[0]['correct'] = 'a'
    with pytest.raises(UserError) as e:
        read(tmp_path, name, rows)
    assert message in str(e.value) and f'{name}.jsonl' in str(e.value) and '\n' not in str(e.value), e.value
