"""ArcFace against its formula in float64."""
import math

import pytest
import torch
import torch.nn.functional as F

from timm_multilabel.heads import ArcFaceHead
from timm_multilabel.labels import LabelSet
from timm_multilabel.losses import arcface_logits

LABELS = LabelSet('article', ('a', 'b', 'c'))


def reference(cosine, margin):
    """cos(theta + m), and cos(theta) - m sin(m) where theta + m is beyond pi; value and slope over the cosine."""
    theta = math.acos(cosine)
    if theta + margin > math.pi:
        return cosine - margin * math.sin(margin), 1.0
    return math.cos(theta + margin), math.sin(theta + margin) / math.sin(theta)


@pytest.mark.parametrize('margin', [0.0, 0.3, 0.5, 1.2])
@pytest.mark.parametrize('cosine', [0.0, 0.2, 0.999, -0.5, -0.85, -0.9, -0.999])
def test_margin_at_the_label_only(cosine, margin):
    given = torch.tensor([[cosine, 0.1, -0.3]], dtype=torch.float64, requires_grad=True)
    made = arcface_logits(given, torch.tensor([0]), margin)
    expected, slope = reference(cosine, margin)
    assert made[0, 0].item() == pytest.approx(expected, rel=1e-9)
    assert made[0, 1:].tolist() == [0.1, -0.3]
    made[0, 0].backward()
    assert given.grad.tolist() == [[pytest.approx(slope, rel=1e-6), 0, 0]]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('cosine, slope', [
    (1.0, math.cos(0.5)), (-1.0, 1.0), (0.0, math.cos(0.5)), (1.0001, math.cos(0.5))])
def test_ends_of_the_cosine(cosine, slope, dtype):
    """At 1 the slope, infinite by the formula, is cos(m); at -1 that of the fallback; beyond 1 (rounding) as at 1."""
    given = torch.tensor([[cosine, 0.0]], dtype=dtype, requires_grad=True)
    made = arcface_logits(given, torch.tensor([0]), 0.5)
    made[0, 0].backward()
    expected, _ = reference(max(-1.0, min(1.0, cosine)), 0.5) if cosine < 1 else (math.cos(0.5), None)
    assert made[0, 0].item() == pytest.approx(expected, abs=2e-4)  # sin(m) * sqrt(1e-7) at 1
    assert given.grad[0, 0].item() == pytest.approx(slope, rel=1e-5)


def test_harder_angles_never_give_larger_logits():
    cosine = torch.linspace(-1, 1, 2001, dtype=torch.float64)[:, None]
    made = arcface_logits(cosine, torch.zeros(2001, dtype=torch.long), 0.5)[:, 0]
    assert (made.diff() > 0).all() and (made <= cosine[:, 0] + 1e-3).all()


def test_head_is_scaled_cosines_and_its_loss_has_the_margin():
    torch.manual_seed(0)
    head = ArcFaceHead(LABELS, 5, scale=20.0, margin=0.4).double()
    features, target = torch.randn(4, 5, dtype=torch.float64), torch.tensor([2, 0, -1, 1])
    cosine = torch.stack([
        torch.stack([f @ w / f.norm() / w.norm() for w in head.weight]) for f in features])
    output = head(features)
    torch.testing.assert_close(output, 20 * cosine)
    total = 0.0
    for row, label in zip(cosine, target.tolist(), strict=True):
        if label >= 0:
            moved = [reference(c.item(), 0.4)[0] if k == label else c.item() for k, c in enumerate(row)]
            total += torch.logsumexp(20 * torch.tensor(moved, dtype=torch.float64), 0).item() - 20 * moved[label]
    loss, count = head.loss(output, target)
    assert (loss.item(), count.item()) == (pytest.approx(total, rel=1e-9), 3)
    plain, _ = head.eval_loss(output, target)
    assert plain.item() == pytest.approx(F.cross_entropy(20 * cosine, target, ignore_index=-1, reduction='sum').item())
    assert plain < loss


@pytest.mark.parametrize('features', [[[3., 4.]], [[-3., -4.]], [[0., 0.]], [[4., -3.]]])
def test_gradients_are_numbers_at_cosine_1_and_minus_1_and_0(features):
    head = ArcFaceHead(LabelSet('x', ('a', 'b')), 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.6, 0.8], [0.8, -0.6]]))
    given = torch.tensor(features, requires_grad=True)
    head.loss(head(given), torch.tensor([0]))[0].backward()
    assert given.grad.isfinite().all() and head.weight.grad.isfinite().all()


def test_computed_in_float32_under_autocast():
    head = ArcFaceHead(LABELS, 8)
    features = torch.randn(2, 8)
    with torch.autocast('cpu', torch.bfloat16):
        output = head(features.bfloat16())
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, head(features.bfloat16().float()))


def test_smoothing_is_off_by_default_and_remarked_on():
    assert ArcFaceHead(LABELS, 4).smoothing == 0 and 'smoothing' not in ArcFaceHead.inherits
    assert 'works against' in ArcFaceHead(LABELS, 4, smoothing=0.1).remark and not ArcFaceHead(LABELS, 4).remark


@pytest.mark.parametrize('options, message', [
    ({'scale': 0}, 'scale is 0'), ({'margin': -1}, 'margin is -1'), ({'margin': 4}, 'margin is 4'),
    ({'drop': 2}, 'drop is 2'), ({'class_weights': [1, 2]}, 'for each class')])
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        ArcFaceHead(LABELS, 4, **options)
