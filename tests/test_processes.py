"""processes.py: how a batch is divided, devices that are not there, environments that nobody made."""
import os
import sys

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import processes
from errors import UserError
from test_common import one_line


def test_the_largest_micro_batch_that_divides_is_taken():
    found = {given: processes.accumulation(*given) for given in [(256, 8, 8), (8, 8, 1), (16, 16, 2), (12, 5, 1), (12, 5, 2),
                                                              (12, 1, 3), (7, 4, 1), (6, 100, 6)]}
    assert found == {(256, 8, 8): (4, 8), (8, 8, 1): (1, 8), (16, 16, 2): (1, 8), (12, 5, 1): (3, 4), (12, 5, 2): (2, 3),
                     (12, 1, 3): (4, 1), (7, 4, 1): (7, 1), (6, 100, 6): (1, 1)}
    for given, hint in [((12, 2, 5), 'start 4'), ((4, 8, 3), 'start 2'), ((1, 8, 2), 'start 1')]:
        with pytest.raises(UserError) as caught:
            processes.accumulation(*given)
        one_line(caught, f'global_batch_size={given[0]} cannot be divided among {given[2]} processes', hint)


def test_a_device_that_is_not_there():
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match='--device=cpu'):
            processes.pick_device('cuda')
    process = processes.setup_process('cpu', n_thread=1)
    assert process.master and process.dtype == torch.float32 and process.host_sum([1, 2.5]) == [1, 2.5]


@pytest.mark.parametrize('env', [dict(WORLD_SIZE='2'), dict(RANK='0'), dict(RANK='2', WORLD_SIZE='2'),
                                 dict(RANK='-1', WORLD_SIZE='2'), dict(RANK='x', WORLD_SIZE='2'),
                                 dict(RANK='0', WORLD_SIZE=''), dict(RANK='0', WORLD_SIZE='1', LOCAL_RANK='1')])
def test_an_environment_that_torchrun_would_not_make(env, monkeypatch):
    for key in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE'):
        monkeypatch.delenv(key, raising=False)
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError) as caught:
        processes.setup_process('cpu')
    one_line(caught, 'not an environment that torchrun makes', *(f'{key}={value}' for key, value in env.items()))
