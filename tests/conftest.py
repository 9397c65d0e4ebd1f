"""Fixtures."""
import pytest
import torch
from common import write_data


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models are fastest on one thread, and tests run side by side."""
    torch.set_num_threads(1)


@pytest.fixture
def data_dir(tmp_path):
    """A tiny data directory: 12 training and 6 validation pictures."""
    return write_data(tmp_path / 'data')
