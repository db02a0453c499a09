"""
Zero-shot evaluation of a checkpoint on the official benchmark files (paper 2.2, appendix E), one photo, or text.

    python evaluate.py --ckpt=out/1b/finetune/ckpt_last                       # every benchmark found under eval_dir
    python evaluate.py config/tiny.py --ckpt=DIR --tasks=pope,vqav2 --n_example=1024
    torchrun --nproc_per_node=8 evaluate.py --ckpt=DIR                        # the processes share the questions
    python evaluate.py score gqa other_model.jsonl --out_dir=DIR              # its lines: {"id", "prediction"}
    python evaluate.py compare A B                                            # which tasks differ: paired bootstrap
    python evaluate.py --ckpt=DIR --image=photo.jpg                           # asks for questions, on a terminal
    python evaluate.py --ckpt=DIR --image=photo.jpg --prompt="What is on the table?"
    python evaluate.py --ckpt=DIR --prompt="Once upon a time"                 # continues the text

eval_dir holds a folder for each benchmark. The files in it say which kind it is; its name stands in the table:
FILES
    captions: captions/captions.jsonl, one {"image": file name, "caption": text} a line; needs a checkpoint of stage 2
    your own: text/NAME.jsonl, one {"query", "choices", "gold": index} a line
vsr, tallyqa, ai2d, mmvp, magnifier, scienceqa, smart101 and smart101_value are asked only when tasks names them. Images
are .jpg, .jpeg or .png in the folder itself or in one of those named above, there or in eval_dir (COCO is needed once).
A question may also carry
`question_type` (a string or a list of them, each reported apart) and `blind_answers` (what one could guess from the
image without knowing the question). Beside each score stands what guessers score; the best constant answers are chosen
on the test questions themselves.

out_dir gets table.txt, results.json and predictions/TASK.jsonl, a question a line; where there are choices, with nats
(-ln of its probability) and n_token of each. Until all is done, journal/ holds the answers so far: the same command
goes on after them.
"""
import contextlib
import functools
import json
import os
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

import checkpoint
from ask import (ask, autocast, check_bad, journal_files, journal_open, journal_read, load_image, question_keys,
                 share)
from benchmark_files import read_results, read_table
from benchmarks import NEEDS, READERS, find_tasks
from configurator import config_keys, configure
from errors import NUMBER, Field, UserError, leave, printable, reading, user_error_hook, world_size
from files import write_whole
from images import batched
from instruct import caption_prompt, instruct_prompt, question_ids
from metrics import box_iou, gqa_match, parse_box, pope_answer, vqa_accuracy
from processes import Process, pick_device, setup_process
from scorers import (TABLE_NOTES, choose, paired_bootstrap, score_predictions, stable_score, stable_scores,
                     summarise, table, whole_pairs)

__doc__ = __doc__.replace('FILES', '\n'.join(f'    {name}: {files}' for name, files in NEEDS.items()))
__all__ = ['box_iou', 'gqa_match', 'parse_box', 'pope_answer', 'stable_score', 'vqa_accuracy', 'default_options',
           'evaluate_task', 'find_tasks', 'READERS']

# --- config: change with a file and --key=value ---------------------------------------------
ckpt = ''                     # [free] a checkpoint folder, such as out/1b/finetune/ckpt_last
eval_dir = 'data/eval'        # benchmark folders, see above
out_dir = ''                  # [free] for results.json, table.txt, predictions/; '' = eval/ in the checkpoint (of a
                              # ckpt_step_N, which its run will delete: eval/ckpt_step_N in the run's folder)
scale = '1b'                  # [free] a scale file's name; recorded in results.json
name = ''                     # [free] only recorded in results.json
tasks = ''                    # [free] names separated by commas, or paper, vision, text; '' = every benchmark found
n_example = 0                 # [>= 0] per task (POPE, OCID-Ref, TallyQA: per split), in vlm-evaluation's order; 0 = all
batch_size = 16               # [>= 1, free] questions at a time; float32 scores do not depend on it
max_len = 2048                # [>= 1] tokens of a text's context and choice; a longer context loses its left end
max_new_tokens = 128          # [>= 1] the longest answer
device = 'auto'               # ['auto' | 'cpu' | 'cuda' | 'mps']
dtype = ''                    # ['' | 'float32' | 'bfloat16'] '' = bfloat16 on CUDA, else float32
n_thread = 0                  # [>= 0, <= 1024, free] CPU threads of torch; 0 = torch's choice
n_worker = 2                  # [>= 0, free] threads that decode the next images
resize = ''                   # ['' | 'letterbox' | 'naive' | 'crop'] of images; '' = as the checkpoint was trained
short_suffix = '\nAnswer the question using a single word or phrase.'   # after each VQA and POPE question
box_prompt = 'Please provide the bounding box coordinate of the region this sentence describes: "{sent}"'
box_frame = 'original'        # ['original' | 'letterbox'] gold boxes over the image (vlm-evaluation) or its square
refcoco_split = 'val'         # the split of RefCOCO whose expressions are asked
pope_words = ('Yes', 'No')    # the answers to POPE's questions: the one with the more probable first token is taken
vqa_variant = 'vlm-eval'      # ['vlm-eval' | 'official' | 'm4c' | 'vizwiz'] scoring of VQAv2: vlm-eval is the paper's
                              # harness; results.json always has it and 'official'
ocid_iou = 0.25               # [> 0, <= 1] a box of OCID-Ref is right from here: 0.25 is its authors', 0.5 RefCOCO's
pope_by = 'probability'       # ['probability' | 'text'] POPE's answer: see pope_words, or its text by LLaVA's rule
choice_by = 'text'            # ['text' | 'probability'] the answer to a question of MMVP or MagnifierBench: read in its
                              # text, or the most probable letter
text_variant = 'lm-eval'      # ['lm-eval' | 'dclm'] of text benchmarks: lm-evaluation-harness's prompts and scores (its
                              # acc_norm where it has one, else acc), or DCLM's files and nats per token
max_bad_samples = 0           # [>= 0, free] so many questions of a task without a readable image are left out, counted
vqav2_baseline = 0.5          # [>= 0, <= 1] our reading; table 9 fixes only the sum of its five baselines, 1.0
image = ''                    # ask about one photo ('' = benchmarks)
prompt = ''                   # the question about image, or a text to continue
temperature = 0.0             # [>= 0] with image or prompt: 0 = always the most probable token, else tokens are drawn
top_k = 0                     # [>= 0] draw among so many of the most probable tokens; 0 = among all
seed = 7                      # [>= 0, < 9.2e18] of these draws
# --- config end -----------------------------------------------------------------------------


def default_options(**changes):
    """The config block as a namespace, for callers other than the command line; unknown names raise UserError."""
    values = {key: rule.default for key, rule in config_keys(__file__).items()}
    unknown = sorted(set(changes) - set(values))
    if unknown:
        raise UserError(f"evaluate has no option {unknown[0]}; it has {', '.join(values)}")
    return SimpleNamespace(**{**values, **changes})


TUNED = ('finetune', 'dpo')         # the stages that teach to answer questions

# --- scores -------------------------------------------------------------------------------------------------------

ALONE = Process(0, 1, torch.device('cpu'), torch.float32)


def evaluate_task(model, tokenizer, task, opt, process=ALONE, journal='', settings=None, bar=None):
    """
    Ask and score one Task; returns (entry of results.json, records).
    process  the questions are shared among the processes, and each gets the same results
    journal  '' = none, else a folder in which answers are kept until all is done: what stands there under the same
             settings (any JSON value) is not asked again
    """
    start, groups, bar = time.perf_counter(), share(task, process.rank, process.world_size), bar or tqdm(disable=True)
    keys, before = question_keys(task, settings), journal_read(journal_files(journal, task)) if journal else {}
    answers = {n: before[keys[n]] for group in groups for n in group if keys[n] in before}
    unasked = [left for group in groups if (left := [n for n in group if n not in answers])]
    bar.update(len(answers) * process.world_size)
    path = os.path.join(journal, f'{task.name}.{process.rank}.jsonl')
    try:
        with journal_open(path) if journal else contextlib.nullcontext() as write:
            for n, answer in ask(model, tokenizer, task, opt, unasked):
                answers[n] = answer
                if write and 'unreadable' not in answer:
                    write(keys[n], answer)
                bar.update(process.world_size)
    except torch.OutOfMemoryError as e:
        raise UserError(f"batch_size={opt.batch_size} does not fit into the GPU's memory; give a smaller one") from e
    answers = dict(process.gather(answers.items()))
    unreadable = {n: answer['unreadable'] for n, answer in sorted(answers.items()) if 'unreadable' in answer}
    check_bad(task, unreadable, opt)                         # of all processes
    for reason, n in Counter(unreadable.values()).most_common(8):
        process.print(f"!!! {task.name}: {n} questions left out: {reason}")
    kept = [n for n in range(len(task.examples)) if n not in unreadable]
    if not kept:
        raise UserError(f"{task.name}: no image of it can be read")
    task = replace(task, examples=[task.examples[n] for n in kept],
                   skipped=task.skipped + [task.examples[n].id for n in unreadable])
    answers = [answers[n] for n in kept]
    if 'text' in answers[0]:
        result, records = summarise(task, [a['text'] for a in answers])
        result['reached_max_new_tokens'] = sum(a['cut'] for a in answers)
    else:
        nats, n_token = [a['nats'] for a in answers], [a['n_token'] for a in answers]
        best = [choose(a, e.choices, b, task.norm) for e, a, b in zip(task.examples, nats, n_token)]
        result, records = summarise(task, best, nats, n_token)
    result['seconds'] = round(time.perf_counter() - start, 2)
    return result, records


def settings_of(content):
    """What the scores of a results.json depend on: the model and the config but for the keys whose rule says `free`."""
    rules = config_keys(__file__)
    config = {key: value for key, value in content['config'].items() if key not in rules or not rules[key].free}
    return json.loads(json.dumps({'torch': content['torch'], **content['meta'], **config}))


def earlier_results(path, content):
    """The tasks of an earlier results.json that this one goes on with, those under its settings; {} where none are."""
    if not os.path.exists(path):
        return {}
    try:
        with reading(path, 'results'):
            before = read_results(path)
            old = settings_of(before)
    except UserError as e:
        print(f"!!! {printable(str(e))} and is replaced")
        return {}
    new = settings_of(content)
    changed = [key for key in new if key not in old or old[key] != new[key]]
    if changed:
        print(f"!!! {path} was made with another {changed[0]} and is replaced: give --out_dir to keep both")
    return {} if changed else before['tasks']


def write_results(out, content, asked, opt):
    """Add the entries `asked` to the results.json of a folder; print and write the table of all that stand there."""
    with checkpoint.locked(out):                             # another evaluation may have written here meanwhile
        results = content['tasks'] = {**earlier_results(out / 'results.json', content), **asked}
        content['stable'] = stable_scores(results, opt.vqav2_baseline)
        write_whole(out / 'results.json', json.dumps(content, indent=1))         # there when all that was asked is done
    lines = [table(results), TABLE_NOTES]
    for title, stable in content['stable'].items():
        n, names = len(stable['tasks']), ', '.join(stable['tasks'])
        lines.append(f"stable score, {title}: {100 * stable['score']:.2f} over {n} of {n + len(stable['missing'])}: "
                     f"{names}")
    lines.append(f"results and predictions in {out}")
    write_whole(out / 'table.txt', '\n'.join(lines) + '\n')
    print('\n'.join(lines))


# --- the uses of the script -----------------------------------------------------------------------------------

def start(opt):
    """This Process, alone or one of torchrun's; fills in the options left to the device."""
    opt.device, many = pick_device(opt.device), world_size() > 1
    opt.dtype = opt.dtype or ('bfloat16' if opt.device == 'cuda' else 'float32')
    if many and opt.device == 'mps':
        raise UserError("device='mps': expected one process; torchrun needs cuda or cpu")
    process = setup_process(opt.device, opt.dtype, opt.n_thread) if many else ALONE
    if opt.device == 'cuda':
        torch.cuda.set_device(process.device.index or 0)
    if opt.n_thread:
        torch.set_num_threads(opt.n_thread)
    return process


def load(opt):
    """Return (model, tokenizer, meta) of opt.ckpt; fills in the options left to the checkpoint."""
    if not opt.ckpt:
        raise UserError("ckpt='': expected a checkpoint folder, such as --ckpt=out/1b/finetune/ckpt_last")
    opt.ckpt = os.path.realpath(opt.ckpt)                      # once: a run that goes on swaps its ckpt_last
    model, tokenizer, meta = checkpoint.load_vlm(opt.ckpt, opt.device)
    # autocast keeps its bfloat16 copy of a weight only where the weight requires a gradient
    for part in filter(None, (model.decoder, model.cross)):
        part.requires_grad_(opt.dtype == 'bfloat16')
    torch.backends.cuda.enable_cudnn_sdp(False)                # slow here: it makes a plan for each new length
    scale = meta['config'].get('scale', opt.scale)
    if scale != opt.scale and os.path.exists(os.path.join(os.path.dirname(__file__), 'config', f'{scale}.py')):
        print(f"!!! {opt.ckpt} is of scale {scale!r}: its prompts and sizes may need config/{scale}.py")
    opt.resize = opt.resize or meta['config'].get('resize', 'letterbox')
    opt.system_prompt = meta['config'].get('system_prompt', '')
    return model, tokenizer, meta


def answer(opt):
    """Print what the model writes about opt.image or after opt.prompt; without a prompt, questions on a terminal."""
    model, tokenizer, meta = load(opt)
    if opt.image and model.encoder is None:
        raise UserError(f"image={opt.image}: {opt.ckpt} is a text-only checkpoint; give one of stage 2 or 3")
    generator = torch.Generator(opt.device).manual_seed(opt.seed)
    pixels, n_token = load_image(opt.image, model.view(opt.resize)) if opt.image else (None, 0)

    @functools.lru_cache(maxsize=1)
    def look(*asked):
        with autocast(opt):
            return model.prefill_images(batched([pixels]), [asked] if asked else None)   # once for all questions

    def write(ids, *asked):
        prefix = look(*asked) if opt.image else None
        with autocast(opt):
            (new,) = model.generate([ids], prefix=prefix, max_new_tokens=opt.max_new_tokens, generator=generator,
                                    temperature=opt.temperature, top_k=opt.top_k,
                                    stop_ids=(tokenizer.sep_id, tokenizer.eot_id))
        return tokenizer.decode(new)

    def reply(question):
        asked = question_ids(question, tokenizer) if model.text_cond is not None else ()       # or once for each
        return write(instruct_prompt(question, n_token, tokenizer, opt.system_prompt), *asked)
    if not opt.image:
        print(write(tokenizer.encode(opt.prompt) or [tokenizer.eot_id]))
    elif opt.prompt:
        print(reply(opt.prompt))
    else:
        if meta['stage'] not in TUNED:
            print(write(caption_prompt(n_token, tokenizer)))
        if sys.stdin.isatty():
            print(f"ask about {opt.image}; an empty line ends")
            converse(reply)
        elif meta['stage'] in TUNED:
            print(f"!!! {opt.ckpt} was fine-tuned to answer questions: give it one with --prompt=...")


def converse(reply):
    """Print the reply to each line that is typed, until an empty one, the end of input or Ctrl-C."""
    try:
        while question := input('> ').strip():
            print(reply(question))
    except (EOFError, KeyboardInterrupt):
        print()                                              # the shell goes on on a line of its own


def run(opt):
    """Evaluate every task found, printing the table; writes results.json when all are done, and returns its content."""
    found = find_tasks(opt)                                  # first: missing files should not wait for the model
    process = start(opt)
    model, tokenizer, meta = load(opt)
    real = Path(opt.ckpt)
    beside = real.parent / 'eval' / real.name if real.name.startswith('ckpt_step_') else real / 'eval'
    out = Path(opt.out_dir) if opt.out_dir else beside
    content = {'schema': 1, 'ckpt': str(real), 'config': vars(opt),
               'meta': {k: v for k, v in meta.items() if k != 'rng'}, 'torch': torch.__version__}
    settings, journal = settings_of(content), str(out / 'journal')
    tasks, asked = [], {}
    for task in found:
        if task.examples[0].image and model.encoder is None:
            process.print(f"{task.name}: skipped, {opt.ckpt} is text-only")
        elif task.layout == 'caption' and meta['stage'] in TUNED and not opt.tasks:
            process.print(f"{task.name}: skipped, a fine-tuned model answers questions; --tasks={task.name} asks all "
                          "the same")
        else:
            tasks.append(task)
    if not tasks:
        names = ', '.join(task.name for task in found)
        raise UserError(f"nothing to do: {opt.ckpt} can be asked none of {names}, see above")
    with tqdm(total=sum(len(task.examples) for task in tasks), unit=' questions', leave=False,
              disable=None if process.master else True) as bar:                  # off where nobody watches
        for task in tasks:
            bar.set_description(task.name)
            result, records = evaluate_task(model, tokenizer, task, opt, process, journal, settings, bar)
            asked[task.name] = result
            process.print(f"{task.name}: {100 * result['score']:.2f} on {result['n']} in {result['seconds']:.0f} s")
            if process.master:
                write_whole(out / 'predictions' / f'{task.name}.jsonl', records)
    if process.master:
        write_results(out, content, asked, opt)
        for file in (file for task in tasks for file in journal_files(journal, task)):
            with contextlib.suppress(OSError):
                os.remove(file)
        with contextlib.suppress(OSError):                   # another evaluation's answers may be there
            os.rmdir(journal)
    process.barrier()
    return content


def score(opt, name, path):
    """Score another model's answers to one benchmark; with an out_dir they are written there as this one's are."""
    tasks = find_tasks(SimpleNamespace(**{**vars(opt), 'tasks': name}), images=False)
    if len(tasks) > 1:
        raise UserError(f"evaluate.py score {name!r}: expected one task, such as {tasks[0].name}")
    rows = read_table(path, None, {'id': Field((str, int)), 'prediction': Field(str, 0, 100_000)})
    with reading(path, 'predictions'):
        result, records = score_predictions(tasks[0], rows)
    if not opt.out_dir:
        print('\n'.join([table({tasks[0].name: result}), TABLE_NOTES]))
        return result
    out = Path(opt.out_dir)
    write_whole(out / 'predictions' / f'{tasks[0].name}.jsonl', records)
    content = {'schema': 1, 'ckpt': '', 'config': vars(opt), 'meta': {'stage': 'predictions'}, 'torch': ''}
    write_results(out, content, {tasks[0].name: result}, opt)
    return result


USES = {'score': 'score TASK predictions.jsonl, then config files and keys such as --eval_dir=data/eval',
        'compare': 'compare A B: two results.json, or folders that hold them, or checkpoints'}
RECORD = {'id': Field(str), 'score': Field(NUMBER, 0, 1), 'types': Field(list, of=Field(str))}


def compare(a, b):
    """
    Print, for each task that two results have in common, how much better the second is, with the 95 % interval of a
    paired bootstrap over the questions, of MMVP over its pairs.
    a, b: results.json, its folder, or a checkpoint with eval/results.json
    Returns {task: paired_bootstrap's dict}.
    """
    folders, found = [Path(p).parent if Path(p).is_file() else Path(p) for p in (a, b)], {}
    folders = [f / 'eval' if (f / 'eval' / 'results.json').is_file() else f for f in folders]
    tasks = [read_results(folder / 'results.json')['tasks'] for folder in folders]
    for i, (one, other) in enumerate((tasks, tasks[::-1])):
        if only := sorted(set(one) - set(other)):
            print(f"only in {folders[i]}: {', '.join(only)}")
    both = [name for name in tasks[0] if name in tasks[1]]
    if not both:
        raise UserError(f"{a} and {b} have no task in common")
    print(f"{'task':<28}{'n':>7}{'A':>8}{'B':>8}{'B - A':>8}   95 % interval")
    for name in both:
        files = [str(folder / 'predictions' / f'{name}.jsonl') for folder in folders]
        rows = [{row['id']: row for row in read_table(file, None, RECORD, 'id')} for file in files]
        ids = [i for i in rows[0] if i in rows[1]]
        kind = tasks[0][name]['kind']
        strata = [(rows[0][i]['types'] or [''])[0] for i in ids] if kind == 'pope' else None
        units = whole_pairs(ids) if kind == 'mmvp' else [(i,) for i in ids]
        if not units:
            raise UserError(f"{name}: {a} and {b} have no question in common")
        r = found[name] = paired_bootstrap(*([min(side[i]['score'] for i in unit) for unit in units] for side in rows),
                                           strata=strata)
        said = [f"{max(map(len, rows)) - len(ids)} questions are not in both"] * (len(ids) < max(map(len, rows)))
        said += ['scored by other rules'] * (tasks[0][name]['variant'] != tasks[1][name]['variant'])
        print(f"{name:<28}{r['n']:>7}{100 * r['a']:>8.2f}{100 * r['b']:>8.2f}{100 * r['difference']:>+8.2f}"
              f"   {100 * r['low']:+.2f} .. {100 * r['high']:+.2f}{'   differs' * r['differs']}"
              + ''.join(f'   ({text})' for text in said))
    print("differs: 0 lies outside the interval; of 20 tasks on which two models are alike, one does so by chance")
    return found


if __name__ == '__main__':
    sys.excepthook = user_error_hook
    if os.environ.get('RANK', '0') != '0':
        sys.stdout = open(os.devnull, 'w')                   # one process tells what all of them read
    command, argv = '', sys.argv[1:]
    if argv[:1] in (['score'], ['compare']):
        command, words, argv = argv[0], argv[1:3], argv[3:]
        if len(words) < 2 or any(word.startswith('-') for word in words) or command == 'compare' and argv:
            raise UserError(f"evaluate.py {command}: expected {USES[command]}")
    if command == 'compare':
        compare(*words)
        sys.exit()
    options = SimpleNamespace(**configure(globals(), argv))
    if command == 'score':
        score(options, *words)
    elif options.image or options.prompt:
        start(options)
        answer(options)
    else:
        run(options)
    if world_size() > 1:
        leave(0)
