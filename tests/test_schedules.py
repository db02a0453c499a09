"""schedules.py: the published values, and how one schedule goes on where another stood."""
import json
import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from schedules import cooldown_lr, lr_at, main_lr, remaining_lr, top_lr


@pytest.mark.parametrize('total, final, expected', [
    (4_119_287, 1e-5, (9.055e-3, 6.559e-3, 3.469e-3, 9.662e-4)),             # paper.md, batch 512
    (8_238_574, 1e-5, (9.0505e-3, 6.5540e-3, 3.4651e-3, 9.6508e-4)),         # batch 256 (table 2)
    (4_119_287, 3e-5, (9.057e-3, 6.566e-3, 3.482e-3, 9.843e-4))])            # the DCLM records
def test_main_schedule_has_the_published_values(total, final, expected):
    for share, value in zip((0.2, 0.4, 0.6, 0.8), expected):
        lr = main_lr(round(share * total), peak=1e-2, final=final, warmup=5000, total=total)
        digits = 4 if total > 5_000_000 else 3
        assert f'{lr:.{digits}e}' == f'{value:.{digits}e}', share


def test_main_schedule_from_end_to_end():
    main = dict(peak=1.0, final=0.1, warmup=4, total=20)
    assert [main_lr(s, **main) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert main_lr(12, **main) == pytest.approx(0.55) and main_lr(20, **main) == main_lr(999, **main) == 0.1
    lrs = [main_lr(s, **main) for s in range(4, 21)]
    assert lrs == sorted(lrs, reverse=True)
    assert main_lr(0, peak=1.0, final=0.0, warmup=0, total=9) == 1.0
    assert [main_lr(s, peak=1.0, final=0.0, warmup=3, total=3) for s in (2, 3)] == [1.0, 0.0]
    assert [main_lr(s, **main, from_zero=True) for s in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert all(main_lr(s, **main, from_zero=True) == main_lr(s, **main) for s in range(4, 30))


def test_cooldown_goes_on_where_the_main_schedule_stood():
    main = dict(peak=1e-2, final=1e-5, warmup=50, total=1000)
    start = main_lr(800, **main)
    assert cooldown_lr(0, start=start, final=1e-5, total=300) == start
    assert cooldown_lr(150, start=start, final=1e-5, total=300) == pytest.approx((start + 1e-5) / 2)
    assert all(cooldown_lr(step, start=start, final=1e-5, total=300) == 1e-5 for step in (300, 400))
    assert start - cooldown_lr(1, start=start, final=1e-5, total=300) < 1e-3 * start         # a flat start
    assert remaining_lr(0, main=main, at=800, total=300) == start
    assert remaining_lr(150, main=main, at=800, total=300) == main_lr(900, **main)
    assert remaining_lr(300, main=main, at=800, total=300) == remaining_lr(301, main=main, at=800, total=300) == 1e-5
    for step in range(201):                              # uncompressed, it is the main schedule itself
        assert remaining_lr(step, main=main, at=800, total=200) == pytest.approx(main_lr(800 + step, **main))


def test_a_schedule_is_a_dict_that_json_keeps():
    main = dict(peak=1e-2, final=1e-5, warmup=50, total=1000)
    for schedule, expected in (
            (dict(kind='main', **main), lambda s: main_lr(s, **main)),
            (dict(kind='rewarm', **main), lambda s: main_lr(s, **main)),
            (dict(kind='cooldown', start=1e-3, final=1e-5, total=300),
             lambda s: cooldown_lr(s, start=1e-3, final=1e-5, total=300)),
            (dict(kind='remaining', main=main, at=800, total=300),
             lambda s: remaining_lr(s, main=main, at=800, total=300))):
        kept = json.loads(json.dumps(schedule))
        assert [lr_at(s, kept) for s in range(0, 1200, 7)] == [expected(s) for s in range(0, 1200, 7)]
        warmed = dict(kept, moments_warmup=4)
        assert [lr_at(s, warmed) for s in range(6)] == [min(1, (s + 1) / 4) * expected(s) for s in range(6)]
        assert top_lr(warmed) == (1e-2 if 'peak' in kept else expected(0))
