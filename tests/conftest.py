"""Fixtures, and the seed of the fuzz tests' other draws."""
import os
import secrets

import pytest
import torch
from common import leave_curves_undrawn, write_data

os.environ.setdefault('FUZZ_SEED', str(secrets.randbits(32)))  # before xdist starts its processes
os.environ['OMP_NUM_THREADS'] = '1'  # of the processes that tests start, which run side by side
os.environ.pop('COLUMNS', None)  # xdist's processes have 80; lines are as wide as they are outside of a terminal


def pytest_report_header():
    return f'other draws of tests/test_fuzz.py: FUZZ_SEED={os.environ["FUZZ_SEED"]}'


@pytest.fixture(autouse=True, scope='session')
def one_thread():
    """Tiny models are fastest on one thread, and tests run side by side; fixtures of modules train too."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope='session')
def no_curves():
    """tests/test_curves.py draws curves, and real processes do."""
    leave_curves_undrawn()


@pytest.fixture
def data_dir(tmp_path):
    """A tiny data directory: 12 training and 6 validation pictures."""
    return write_data(tmp_path / 'data')
