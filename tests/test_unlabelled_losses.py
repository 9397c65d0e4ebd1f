"""Entropies and pseudo-labels against their formulas in float64."""
import math

import pytest
import torch
import torch.nn.functional as F
from common import run_ranks

from timm_multilabel.losses import (
    binary_entropy,
    binary_marginal_entropy,
    binary_pseudo_label_loss,
    categorical_entropy,
    marginal_entropy,
    pseudo_label_loss,
)

LOGITS = 3 * torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def entropy(p):
    return -sum(q * math.log(q) for q in p if q > 0)


def test_entropies():
    expected = [entropy(row) for row in LOGITS.softmax(1).tolist()]
    assert categorical_entropy(LOGITS).tolist() == pytest.approx(expected, rel=1e-12)
    expected = [sum(entropy((p, 1 - p)) for p in row) / 4 for row in LOGITS.sigmoid().tolist()]
    assert binary_entropy(LOGITS).tolist() == pytest.approx(expected, rel=1e-12)
    p = LOGITS.softmax(1)
    assert marginal_entropy(p).item() == pytest.approx(entropy(p.mean(0).tolist()), rel=1e-12)
    p = LOGITS.sigmoid()
    assert binary_marginal_entropy(p).item() == pytest.approx(
        sum(entropy((q, 1 - q)) for q in p.mean(0).tolist()) / 4, rel=1e-12)


@pytest.mark.parametrize('function', [categorical_entropy, binary_entropy, lambda x: marginal_entropy(x.softmax(1)),
                                      lambda x: binary_marginal_entropy(x.sigmoid())])
def test_gradients(function):
    assert torch.autograd.gradcheck(function, LOGITS.clone().requires_grad_())


@pytest.mark.parametrize('function', [categorical_entropy, binary_entropy])
def test_sure_predictions_have_no_entropy_and_finite_gradients(function):
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    function(logits).sum().backward()
    assert function(logits).tolist() == [0, 0] and logits.grad.isfinite().all()


def test_marginal_entropy_is_0_for_the_collapsed_prediction():
    p = torch.tensor([[1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    value = marginal_entropy(p)
    value.backward()
    assert value == 0 and p.grad.isfinite().all()


def test_pseudo_labels_pass_the_threshold_row_by_row():
    weak = torch.tensor([[3.0, 0, 0], [0, 0.5, 0], [0, 0, 4.0]], dtype=torch.float64, requires_grad=True)
    strong = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    total, passed = pseudo_label_loss(strong, weak, 0.9)
    expected = F.cross_entropy(strong[[0, 2]], torch.tensor([0, 2]), reduction='sum')
    assert passed.item() == 2 and total.item() == pytest.approx(expected.item(), rel=1e-12)
    total.backward()
    assert weak.grad is None and (strong.grad[1] == 0).all() and (strong.grad[[0, 2]] != 0).all()


def test_tags_pass_one_by_one_as_there_or_as_not_there():
    weak = torch.tensor([[4.0, 0.1], [-4.0, 5.0]], dtype=torch.float64)
    strong = torch.randn(2, 2, dtype=torch.float64)
    total, passed = binary_pseudo_label_loss(strong, weak, 0.95)
    softplus = F.softplus(torch.stack([-strong[0, 0], strong[1, 0], -strong[1, 1]]))
    assert passed.item() == 1.5 and total.item() == pytest.approx(softplus.sum().item() / 2, rel=1e-12)


def _rank(rank):
    mine = LOGITS.chunk(2)[rank].clone().requires_grad_()
    value = marginal_entropy(mine.softmax(1)) + binary_marginal_entropy(mine.sigmoid())
    value.backward()
    return value.item(), mine.grad.tolist()


@pytest.mark.slow
def test_marginal_entropy_of_two_ranks_is_that_of_one_process():
    whole = LOGITS.clone().requires_grad_()
    value = marginal_entropy(whole.softmax(1)) + binary_marginal_entropy(whole.sigmoid())
    value.backward()
    results = run_ranks(_rank, 2)
    assert [each for each, _ in results] == pytest.approx([value.item()] * 2, rel=1e-12)
    # Each rank's gradient is twice its part: DDP averages over the two.
    gradient = torch.tensor(sum((part for _, part in results), []), dtype=torch.float64) / 2
    torch.testing.assert_close(gradient, whole.grad, rtol=1e-10, atol=1e-14)
