"""
EleutherAI's lm-evaluation-harness on our checkpoints, which is how the paper scored text (2.2).

    pip install lm_eval==0.4.13
    python harness.py --ckpt=out/1b/finetune/ckpt_last --tasks=arc_easy,piqa,hellaswag
    python harness.py --ckpt=DIR --tasks=mine --include_path=my_tasks         # one's own tasks, as YAML files

The harness fetches its data sets from the network; evaluate.py asks the paper's questions from local files, with the
same prompts and the same scores. Metrics that the harness loads from the package `evaluate` do not work here, since
evaluate.py has that name; none of the paper's tasks has one.
"""
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

import checkpoint
from ask import autocast, pair_ids
from configurator import configure
from errors import UserError, first_line, user_error_hook
from files import write_whole
from processes import pick_device

try:
    from lm_eval.api.model import LM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    sys.exit(f"{error}: harness.py needs a package that is installed by hand: pip install lm_eval==0.4.13")

# --- config: change with a file and --key=value ---------------------------------------------
ckpt = ''                     # a checkpoint folder
tasks = ''                    # the harness's names, separated by commas
include_path = ''             # a folder with further tasks
n_shot = -1                   # [>= -1] examples before each question; -1 = as each task says
n_example = 0                 # [>= 0] the first so many questions of each task; 0 = all
batch_size = 16               # [>= 1] contexts at a time
max_len = 2048                # [>= 1] tokens of a context and its continuation; a longer context loses its left end
device = 'auto'               # ['auto' | 'cpu' | 'cuda' | 'mps']
dtype = ''                    # ['' | 'float32' | 'bfloat16'] '' = bfloat16 on CUDA, else float32
out = ''                      # a file for the results as JSON; '' = only the table
# --- config end -----------------------------------------------------------------------------


class CheckpointLM(LM):
    """One of our models as the harness asks it; opt as evaluate.py's: batch_size, max_len, device, dtype."""
    def __init__(self, model, tokenizer, opt):
        super().__init__()
        self.model, self.tokenizer, self.opt = model, tokenizer, opt

    def score_pairs(self, pairs):
        """(log probability, would be written) of each (context, continuation), lists of ids; a context is read once."""
        keys, rows, found = [], {}, {}                                      # rows: context -> its continuations
        for context, ids in pairs:
            over = max(0, len(context) + len(ids) - 1 - self.opt.max_len)
            keys.append((tuple(context[min(over, len(context) - 1):]), tuple(ids)))
            if ids:
                rows.setdefault(keys[-1][0], {})[keys[-1][1]] = None
        rows = sorted(rows.items(), key=lambda row: -len(row[0]))
        for start in tqdm(range(0, len(rows), self.opt.batch_size), disable=None):
            batch = rows[start:start + self.opt.batch_size]
            with autocast(self.opt):
                nats, greedy = self.model.choice_nats([list(context) for context, _ in batch],
                                                      [[list(ids) for ids in asked] for _, asked in batch], greedy=True)
            for (context, asked), values, likely in zip(batch, nats, greedy):
                found.update(((context, ids), (-value, would)) for ids, value, would in zip(asked, values, likely))
        return [found.get(key, (0.0, True)) for key in keys]

    def loglikelihood(self, requests):
        return self.score_pairs([pair_ids(*request.args, self.tokenizer) for request in requests])

    def loglikelihood_rolling(self, requests):
        """Windows of max_len positions, each token predicted once with as much before it as fits."""
        each = [[*map(make_disjoint_window, get_rolling_token_windows(
            self.tokenizer.encode(request.args[0]), self.tokenizer.eot_id, self.opt.max_len, 1))]
            for request in requests]
        found = iter(self.score_pairs([pair for pairs in each for pair in pairs]))
        return [sum(next(found)[0] for _ in pairs) for pairs in each]

    def generate_until(self, requests):
        """Greedy; a text ends before the first of its `until`, at max_gen_toks (256) or at end of text."""
        stops, limit, rows = [], [], []
        for i, request in enumerate(requests):
            context, how = request.args
            if how.get('do_sample') and how.get('temperature', 1) > 0:
                raise UserError(f"a task asks for drawn text ({how}); expected a greedy one")
            until = how.get('until') or []
            stops.append([until] if isinstance(until, str) else until)
            limit.append(how.get('max_gen_toks', 256))
            ids = self.tokenizer.encode(context) or [self.tokenizer.eot_id]
            rows.append((i, ids[-max(1, self.opt.max_len - limit[-1]):]))
        rows.sort(key=lambda row: -len(row[1]))
        longest, waiting = max(len(ids) for _, ids in rows), iter(rows)

        def feed(n):
            given = list(itertools.islice(waiting, n))
            return ([i for i, _ in given], [ids for _, ids in given], None, None, None) if given else None

        def ended(i, new):
            text = self.tokenizer.decode(new)
            return len(new) >= limit[i] or any(stop in text for stop in stops[i])
        texts = [''] * len(rows)
        with autocast(self.opt):
            for i, new in tqdm(self.model.generate_each(
                    feed, min(self.opt.batch_size, len(rows)), longest, max_new_tokens=max(limit), until=ended,
                    stop_ids=(self.tokenizer.sep_id, self.tokenizer.eot_id)), total=len(rows), disable=None):
                texts[i] = self.tokenizer.decode(new)
                for stop in filter(None, stops[i]):
                    texts[i] = texts[i].split(stop)[0]
        return texts


def run(opt):
    """Ask opt.ckpt the tasks and print the harness's table; returns the harness's results."""
    import lm_eval
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable, make_table
    names = [name.strip() for name in opt.tasks.split(',') if name.strip()]
    if not opt.ckpt or not names:
        raise UserError(f"ckpt={opt.ckpt!r}, tasks={opt.tasks!r}: expected a checkpoint folder and names of tasks")
    opt.device = pick_device(opt.device)
    opt.dtype = opt.dtype or ('bfloat16' if opt.device == 'cuda' else 'float32')
    for defaults in (False, True):                             # to list the harness's own tasks takes a while
        manager = TaskManager(include_path=opt.include_path or None, include_defaults=defaults)
        unknown = [name for name in names if name not in manager.all_tasks]
        if not unknown:
            break
    if unknown:
        raise UserError(f"tasks={opt.tasks}: the harness knows no task {unknown[0]}")
    model, tokenizer, _ = checkpoint.load_vlm(opt.ckpt, opt.device)
    model.decoder.requires_grad_(opt.dtype == 'bfloat16')      # autocast keeps its copy of such weights
    try:
        results = lm_eval.simple_evaluate(
            CheckpointLM(model, tokenizer, opt), tasks=names, num_fewshot=None if opt.n_shot < 0 else opt.n_shot,
            limit=opt.n_example or None, task_manager=manager, log_samples=False)
    except ConnectionError as e:
        raise UserError(f"tasks={opt.tasks}: {first_line(e)}; evaluate.py asks local files") from e
    print(make_table(results))
    if opt.out:
        content = {'ckpt': opt.ckpt, 'config': vars(opt), **{key: results[key] for key in ('results', 'versions')}}
        write_whole(Path(opt.out), json.dumps(content, indent=1, default=handle_non_serializable))
    return results


if __name__ == '__main__':
    sys.excepthook = user_error_hook
    run(SimpleNamespace(**configure(globals())))
