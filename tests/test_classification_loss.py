"""The heads' losses against plain formulas in float64."""
import pytest
import torch

from timm_multilabel.heads import SoftmaxHead
from timm_multilabel.labels import LabelSet
from timm_multilabel.losses import dense_cross_entropy, index_cross_entropy


def reference(logits, target, smoothing):
    """Sum over labelled rows of -sum_c q_c log p_c, with q the smoothed one-hot label."""
    log_p = logits.double().log_softmax(1)
    total = torch.zeros((), dtype=torch.float64)
    for row, label in zip(log_p, target.tolist(), strict=True):
        if label >= 0:
            q = torch.full_like(row, smoothing / len(row))
            q[label] += 1 - smoothing
            total = total - (q * row).sum()
    return total


@pytest.mark.parametrize('smoothing', [0.0, 0.1, 0.5])
def test_sum_and_count_leave_missing_labels_out(smoothing):
    torch.manual_seed(0)
    logits = torch.randn(6, 4, requires_grad=True)
    target = torch.tensor([0, 3, -1, 2, -1, 1])
    total, count = index_cross_entropy(logits, target, smoothing)
    assert count.item() == 4
    assert total.item() == pytest.approx(reference(logits, target, smoothing).item(), rel=1e-6)
    total.backward()
    assert (logits.grad[[2, 4]] == 0).all() and (logits.grad[[0, 1, 3, 5]] != 0).all()


def test_no_label_at_all_gives_zero_with_a_gradient_of_zero():
    logits = torch.randn(3, 4, requires_grad=True)
    total, count = index_cross_entropy(logits, torch.tensor([-1, -1, -1]), 0.1)
    assert (total.item(), count.item()) == (0, 0)
    total.backward()
    assert (logits.grad == 0).all()


def test_half_precision_is_computed_in_float32():
    logits = torch.randn(4, 3).bfloat16()
    target = torch.tensor([0, 1, 2, 0])
    total, _ = index_cross_entropy(logits, target, 0.1)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(reference(logits, target, 0.1).item(), rel=1e-6)


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_mixed_labels_mix_the_losses(smoothing):
    torch.manual_seed(0)
    logits = torch.randn(3, 4)
    first, second = torch.tensor([0, 1, -1]), torch.tensor([2, -1, -1])
    share = 0.7
    one_hot = torch.zeros(3, 4)
    one_hot[0, 0], one_hot[0, 2], one_hot[1, 1] = share, 1 - share, share  # row 1: its partner has no label
    total, mass = dense_cross_entropy(logits, one_hot, smoothing)
    expected = share * reference(logits, first, smoothing) + (1 - share) * reference(logits, second, smoothing)
    assert mass.item() == pytest.approx(1.7)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)


def test_head_takes_either_form_of_target():
    logits, target = torch.randn(2, 3), torch.tensor([1, -1])
    one_hot = torch.tensor([[0., 1., 0.], [0., 0., 0.]])
    head = SoftmaxHead(LabelSet('x', ('a', 'b', 'c')), 4, smoothing=0.1)
    by_index, by_mass = (head.loss(logits, form) for form in (target, one_hot))
    torch.testing.assert_close(by_index, by_mass)
