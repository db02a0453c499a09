"""log.py: what a resume cuts, who writes, and a disk that is full."""
import json
import os
import sys

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import common
from errors import UserError
from log import Logger
from test_common import one_line

def test_the_log_is_cut_to_its_checkpoint(tmp_path, capsys):
    process = common.setup_process('cpu', n_thread=1)
    line = lambda step: dict(step=step, time=0.5 * step, tokens=8 * step, loss=1.0 / step, lr=0.1, grad_norm=1.0, tokens_per_s=5.0)
    logger = Logger(process, str(tmp_path), 0, 9)
    for step in (1, 2, 3, 4):
        logger.log(line(step))
    logger.close()
    path = tmp_path / 'log.jsonl'
    whole = path.read_text().splitlines()
    torn = ['{"step": 3, "lo', '', '[3]', '{"loss": 1}']
    path.write_text('\n'.join([*whole[:2], *torn, *whole[2:], '{"step": 2']))
    logger = Logger(process, str(tmp_path), 3, 9)
    logger.log(dict(step=3, val_text_loss=2.0))
    logger.log(line(4))
    logger.close()
    logged = [json.loads(text) for text in path.read_text().splitlines()]
    assert [l['step'] for l in logged] == [1, 2, 3, 3, 4] and logged[2] | {'time': 1.5} == line(3) and 'loss' not in logged[3]
    assert 'val_text_loss 2.0' in capsys.readouterr().out
    Logger(process, str(tmp_path), 0, 9).close()  # a new run starts a new log
    assert path.read_text() == '' and os.listdir(tmp_path) == ['log.jsonl']


def test_other_ranks_do_not_log(tmp_path):
    process = common.Process(1, 2, torch.device('cpu'), torch.float32)
    logger = Logger(process, str(tmp_path), 0, 9)
    logger.log(dict(step=1, loss=1.0))
    logger.close()
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_a_log_on_a_full_disk_ends_in_one_line(tmp_path):
    logger = Logger(common.setup_process('cpu', n_thread=1), str(tmp_path), 0, 9)
    logger.file = open('/dev/full', 'w', buffering=1)
    with pytest.raises(UserError) as caught:
        logger.log(dict(step=4, loss=1.0))
    one_line(caught, '/dev/full: cannot be written', 'step 4')
