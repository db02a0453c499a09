"""
Learning-rate schedules. One is a dict: its kind, and the constants of that kind's function. meta.json keeps it; lr_at
reads it.
"""
import math

from errors import UserError, reading


def main_lr(step, *, peak, final, warmup, total, from_zero=False):
    """
    The lr of step 0, 1, ...: linear warmup to peak, cosine to final at `total`, final beyond (paper 2.1.1).
    from_zero  the first step's lr is 0 (Prismatic) instead of one part of the warmup (OpenLM)
    """
    if step < warmup:
        return peak * (step + (not from_zero)) / warmup
    if step >= total:
        return final
    return final + (peak - final) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def cooldown_lr(step, *, start, final, total):
    """Cosine from start at step 0 to final at `total`: how a checkpoint of mid-schedule cools down (figure 3)."""
    return final + (start - final) * (1 + math.cos(math.pi * min(step / total, 1))) / 2


def remaining_lr(step, *, main, at, total):
    """The rest of a main schedule's arc (dict of main_lr's arguments) from its step `at`, in `total` steps."""
    return main_lr(at + (main['total'] - at) * min(step / total, 1), **main)


SCHEDULES = {'main': main_lr, 'rewarm': main_lr, 'cooldown': cooldown_lr, 'remaining': remaining_lr}


def lr_at(step, schedule):
    """
    The lr at step 0, 1, ... of a run.
    schedule  dict: 'kind' names the function in SCHEDULES, the rest are its arguments; 'moments_warmup' (absent = 0)
              is the number of steps in which AdamW moments that start from nothing are warmed up
    """
    constants = {key: value for key, value in schedule.items() if key not in ('kind', 'moments_warmup')}
    lr = SCHEDULES[schedule['kind']](step, **constants)
    warmup = schedule.get('moments_warmup', 0)
    return min(1.0, (step + 1) / warmup) * lr if warmup else lr


def check_schedule(schedule, path):
    """Raise UserError unless a schedule that was read from path gives an lr at its start, at its end and at its top."""
    with reading(path, 'a learning-rate schedule'):
        for lr in (lr_at(0, schedule), lr_at(schedule['total'], schedule), top_lr(schedule)):
            if not 0 <= lr < math.inf:                                   # nan is not
                raise UserError(f"{path}: its schedule gives the lr {lr}")


def top_lr(schedule):
    """The lr at which a schedule starts or peaks, before any warmup: what projector_lr and encoder_lr compare with."""
    return schedule['peak'] if 'peak' in schedule else lr_at(0, {**schedule, 'moments_warmup': 0})
