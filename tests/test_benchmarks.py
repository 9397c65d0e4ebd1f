"""What the benchmarks measure with: processes of their own, told apart by what becomes of them."""
import os
import time

import pytest
import torch

from benchmarks.nt_xent import dense_nt_xent, products
from benchmarks.processes import MEBIBYTE, Figures, measure
from timm_multilabel.losses import nt_xent_loss


def make(kind, small=False):
    kept = []
    if kind == 'missing':
        raise ImportError('no such library')
    if kind == 'killed' and not small:
        os._exit(9)

    def step():
        if kind == 'too large' and not small:
            torch.empty(2 ** 50)
        for _ in range(100):  # small enough for malloc's heap, where what is freed stays
            kept.append(torch.ones(MEBIBYTE // 4))
        kept.clear()
        time.sleep(0.05)

    return step


@pytest.mark.slow
def test_processes():
    kinds = ('good', 'missing', 'killed', 'too large')
    figures = measure({kind: (make, (kind,)) for kind in kinds}, rounds=2, device='cpu')
    assert [figures[kind].skipped[:14] for kind in kinds] == ['', 'not installed ', 'its process wa', 'out of memory']
    good = figures['good']
    assert len(good.seconds) == 2 and min(good.seconds) >= 0.05
    assert 95 * MEBIBYTE < good.peak < 130 * MEBIBYTE


def test_ratios_are_of_rounds():
    slow, fast = Figures([4.0, 2.0, 9.0]), Figures([2.0, 1.0, 3.0])
    assert slow.times_as_long_as(fast) == 2 and slow.median == 4


def test_the_dense_form_is_the_same_loss():
    a, b = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(dense_nt_xent(a, b, 0.2), nt_xent_loss(a, b, 0.2))
    torch.testing.assert_close(products(a), a @ a.T @ a)
