"""
The text benchmarks of the paper (appendix E): rows of the files that lm-evaluation-harness 0.4 reads, a JSON object a
line, to its prompts and choices. The prompt and the choice are compared as the harness compares them: Task.norm.
Nothing here reads a file. Texts are joined with +, which refuses what is no text.

    prompt, choices, gold = FORMS['piqa'].question(row)      # gold: the indices of the right choices

A text benchmark with a layout of its own is one function and its line in FORMS; one with {"query", "choices", "gold"}
needs neither.
"""
import re
from collections.abc import Callable
from typing import NamedTuple


def arc(row):
    """ARC: allenai/ai2_arc's rows, or those of the first release, whose question holds the choices."""
    question, choices = row['question'], row.get('choices')
    if isinstance(question, dict):
        question, choices = question['stem'], {key: [choice[key] for choice in question['choices']]
                                               for key in ('text', 'label')}
    return 'Question: ' + question + '\nAnswer:', choices['text'], [choices['label'].index(row['answerKey'])]


def bigbench(row):
    """BIG-bench: the zero-shot inputs of hails/bigbench; a row without choices is no question (None)."""
    choices = row['multiple_choice_targets']
    return (row['inputs'], choices, [choices.index(row['targets'][0])]) if choices else None


def boolq(row):
    """BoolQ: SuperGLUE's rows have `label`, those of the first release `answer`."""
    gold = row['label'] if row.get('label') is not None else row['answer']
    return row['passage'] + '\nQuestion: ' + row['question'] + '?\nAnswer:', ['no', 'yes'], [int(gold)]


def copa(row):
    """COPA (SuperGLUE): the premise loses its last letter, a full stop. The harness has two spaces before a choice."""
    link = {'cause': 'because', 'effect': 'therefore'}[row['question']]
    choices = [' ' + text[:1].lower() + text[1:] for text in (row['choice1'], row['choice2'])]
    return f"{row['premise'].strip()[:-1]} {link}", choices, [row['label']]


def hellaswag(row):
    """HellaSwag: WikiHow's marks in brackets go, and of two spaces one."""
    def clean(text):
        return re.sub(r'\[.*?\]', '', text.strip().replace(' [title]', '. ')).replace('  ', ' ')
    context = row['activity_label'] + ': ' + row['ctx_a'] + ' ' + row['ctx_b'].capitalize()
    return clean(context), [clean(ending) for ending in row['endings']], [int(row['label'])]


def math_qa(row):
    """MathQA: one text holds the five options, 'a ) 38 , b ) 27.675 , ...'."""
    choices = [option[4:].rstrip(' ,') for option in re.findall(r'[abcd] \) .*?, |e \) .*?$', row['options'])]
    return 'Question: ' + row['Problem'] + '\nAnswer:', choices, ['abcde'.index(row['correct'])]


def piqa(row):
    """PIQA: validation rows with their `label`, which the first release has in a file of its own."""
    return 'Question: ' + row['goal'] + '\nAnswer:', [row['sol1'], row['sol2']], [row['label']]


def pubmed_qa(row):
    """PubMedQA: the expert-labelled rows (PQA-L)."""
    prompt = 'Abstract: ' + '\n'.join(row['CONTEXTS']) + '\nQuestion: ' + row['QUESTION'] + '\nAnswer:'
    return prompt, ['yes', 'no', 'maybe'], [('yes', 'no', 'maybe').index(row['final_decision'])]


class Form(NamedTuple):
    """How one benchmark's own rows become questions."""
    question: Callable          # row -> (prompt, choices, gold); whatever it raises is the row's fault
    source: str                 # the data set and split that the harness asks, on the Hugging Face hub,
    n: int                      # and its questions


FORMS = {
    'arc_easy': Form(arc, 'allenai/ai2_arc ARC-Easy test', 2376),
    'conceptual_combinations': Form(bigbench, 'hails/bigbench conceptual_combinations_zero_shot', 103),
    'cs_algorithms': Form(bigbench, 'hails/bigbench cs_algorithms_zero_shot', 1320),
    'boolq': Form(boolq, 'aps/super_glue boolq validation', 3270),
    'copa': Form(copa, 'aps/super_glue copa validation', 100),
    'hellaswag': Form(hellaswag, 'Rowan/hellaswag validation', 10042),
    'math_qa': Form(math_qa, 'regisss/math_qa test', 2985),
    'piqa': Form(piqa, 'baber/piqa validation', 1838),
    'pubmed_qa': Form(pubmed_qa, 'bigbio/pubmed_qa pubmed_qa_labeled_fold0_source test', 500),
}
# where the harness reports both acc and acc_norm, the score is acc_norm; every norm stands in results.json
ACC_NORM = {'agieval', 'lsat_ar', 'lsat_lr', 'lsat_rc', 'arc_easy', 'hellaswag', 'math_qa', 'piqa'}
# what DCLM puts between query and choice, where it is not one space (llm-foundry ICL, heavy.yaml)
DCLM_DELIMITER = {'arc_easy': '\nAnswer: ', 'piqa': '\nAnswer: ', 'boolq': '\nAnswer: '}
