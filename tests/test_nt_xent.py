"""NT-Xent against the paper's formula in float64."""
import math

import pytest
import torch
from common import run_ranks

from timm_multilabel.losses import nt_xent_loss


def reference(view_a, view_b, temperature):
    """Chen et al. 2020, equation 1, word for word, in float64."""
    z = torch.cat([view_a, view_b]).double()
    z = z / z.norm(dim=1, keepdim=True).clamp(min=1e-12)
    n = len(view_a)
    total = 0.0
    for i in range(2 * n):
        similarity = (z[i] @ z.T) / temperature
        others = torch.tensor([k for k in range(2 * n) if k != i])
        total = total + torch.logsumexp(similarity[others], 0) - similarity[(i + n) % (2 * n)]
    return total / (2 * n)


def views(n, dim, kind, dtype=torch.float32):
    generator = torch.Generator().manual_seed(n * 1000 + dim)
    a, b = torch.randn(2, n, dim, generator=generator)
    if kind == 'duplicated':
        a, b = a[:1].repeat(n, 1), torch.cat([a[:1], b[1:]])
    if kind == 'close':
        b = a + 0.1 * b
    if kind == 'opposite':
        b = -a
    if kind == 'zero':
        a[0] = 0
    return a.to(dtype), b.to(dtype)


@pytest.mark.parametrize('temperature', [0.01, 0.05, 0.5, 1.0])
@pytest.mark.parametrize('kind', ['random', 'duplicated', 'close', 'opposite', 'zero'])
@pytest.mark.parametrize('n, dim', [(2, 3), (7, 64), (33, 128)])
def test_value_equals_reference(n, dim, kind, temperature):
    a, b = views(n, dim, kind)
    expected = reference(a, b, temperature).item()
    relative = 1e-6 if temperature >= 0.5 else 1e-5
    assert nt_xent_loss(a, b, temperature).item() == pytest.approx(expected, rel=relative, abs=1e-12)


@pytest.mark.parametrize('temperature', [0.05, 0.5])
@pytest.mark.parametrize('kind', ['random', 'duplicated', 'opposite'])
def test_gradient_equals_reference(kind, temperature):
    a, b = (view.double().requires_grad_() for view in views(9, 16, kind))
    expected = torch.autograd.grad(reference(a, b, temperature), (a, b))
    actual = torch.autograd.grad(nt_xent_loss(a, b, temperature), (a, b))
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_gradcheck():
    a, b = (view.requires_grad_() for view in views(3, 4, 'random', torch.float64))
    assert torch.autograd.gradcheck(nt_xent_loss, (a, b))


def test_known_values():
    # Two images whose projections are orthogonal, each view equal to its other: log(1 + 2 exp(-1 / T)).
    eye = torch.eye(2)
    assert nt_xent_loss(eye, eye, 0.5).item() == pytest.approx(math.log1p(2 * math.exp(-2)), rel=1e-6)
    # All four equal: every other view is as close as the right one.
    ones = torch.ones(2, 3)
    assert nt_xent_loss(ones, ones, 0.1).item() == pytest.approx(math.log(3), rel=1e-6)


def test_default_temperature_is_half():
    a, b = views(4, 8, 'random')
    assert nt_xent_loss(a, b).item() == nt_xent_loss(a, b, 0.5).item()


def test_one_image_has_no_negatives():
    a, b = (view.requires_grad_() for view in views(1, 4, 'random'))
    loss = nt_xent_loss(a, b)
    assert loss.item() == 0
    loss.backward()
    assert (a.grad == 0).all() and (b.grad == 0).all()


def test_bfloat16_input_is_computed_in_float32():
    a, b = views(16, 32, 'random', torch.bfloat16)
    loss = nt_xent_loss(a, b, 0.5)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference(a, b, 0.5).item(), rel=1e-6)


def test_autocast_does_not_lower_the_precision():
    a, b = views(16, 32, 'random')
    with torch.autocast('cpu', torch.bfloat16):
        loss = nt_xent_loss(a, b, 0.5)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference(a, b, 0.5).item(), rel=1e-6)


@pytest.mark.parametrize('a, b, temperature, message', [
    (torch.ones(2, 3), torch.ones(3, 3), 0.5, 'one shape'),
    (torch.ones(3), torch.ones(3), 0.5, 'one shape'),
    (torch.ones(2, 3), torch.ones(2, 3), 0.0, 'temperature'),
    (torch.ones(2, 3), torch.ones(2, 3), float('nan'), 'temperature'),
])
def test_wrong_input_is_refused(a, b, temperature, message):
    with pytest.raises(ValueError, match=message):
        nt_xent_loss(a, b, temperature)


def _local_loss_and_gradient(rank, a, b, temperature):
    n = len(a) // torch.distributed.get_world_size()
    mine = [view[rank * n:(rank + 1) * n].clone().requires_grad_() for view in (a, b)]
    loss = nt_xent_loss(*mine, temperature)
    loss.backward()
    return loss.item(), *(view.grad.tolist() for view in mine)


@pytest.mark.parametrize('ranks', [2, 3])
def test_ranks_equal_one_process(ranks):
    a, b = (view.double().requires_grad_() for view in views(6, 8, 'random'))
    loss = nt_xent_loss(a, b, 0.2)
    loss.backward()
    results = run_ranks(_local_loss_and_gradient, ranks, a.detach(), b.detach(), 0.2)
    assert sum(result[0] for result in results) / ranks == pytest.approx(loss.item(), rel=1e-12)
    for view, index in ((a, 1), (b, 2)):
        # The gradient of the sum of the ranks' losses; DDP divides by the number of ranks.
        gathered = torch.tensor([row for result in results for row in result[index]], dtype=torch.float64) / ranks
        torch.testing.assert_close(gathered, view.grad, rtol=1e-10, atol=1e-14)
