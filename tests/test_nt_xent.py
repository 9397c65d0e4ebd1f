"""NT-Xent against the paper's formula, dense and in float64."""
import math
import resource

import pytest
import torch
from common import run_ranks

from timm_multilabel.losses import nt_xent, nt_xent_loss


def reference(view_a, view_b, temperature):
    """Chen et al. 2020, equation 1, over the whole matrix in float64."""
    z = torch.cat([view_a, view_b]).double()
    z = z / z.norm(dim=1, keepdim=True).clamp(min=1e-12)
    logits = z @ z.T / temperature
    positive = logits.diagonal(len(view_a)).repeat(2)
    itself = torch.eye(len(z), dtype=torch.bool)
    return (logits.masked_fill(itself, -math.inf).logsumexp(dim=1) - positive).mean()


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


def with_tiles_of(rows, monkeypatch):
    """Small tiles, of which the first is kept and the others are made twice."""
    monkeypatch.setattr(nt_xent, '_tile_rows', lambda device: rows)
    monkeypatch.setattr(nt_xent._Tiles, 'keep', rows * rows)


@pytest.mark.parametrize('temperature', [0.01, 0.05, 0.5, 1.0])
@pytest.mark.parametrize('kind', ['random', 'duplicated', 'close', 'opposite', 'zero'])
@pytest.mark.parametrize('n, dim', [(2, 3), (3, 1), (31, 512), (256, 128)])
def test_value_equals_reference(n, dim, kind, temperature):
    a, b = views(n, dim, kind)
    expected = reference(a, b, temperature).item()
    relative = 1e-6 if temperature >= 0.5 else 1e-5
    assert nt_xent_loss(a, b, temperature).item() == pytest.approx(expected, rel=relative, abs=1e-12)


@pytest.mark.parametrize('temperature', [0.01, 0.05, 0.5, 1.0])
@pytest.mark.parametrize('kind', ['random', 'duplicated', 'close', 'opposite', 'zero'])
@pytest.mark.parametrize('n, dim, tile', [(1, 4, 2), (2, 1, 2), (3, 16, 4), (31, 8, 62), (31, 8, 20), (256, 16, 128),
                                          (256, 16, 120)])
def test_tiles_change_neither_value_nor_gradient(n, dim, tile, kind, temperature, monkeypatch):
    with_tiles_of(tile, monkeypatch)
    a, b = (view.requires_grad_() for view in views(n, dim, kind, torch.float64))
    expected, actual = reference(a, b, temperature), nt_xent_loss(a, b, temperature)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
    for mine, theirs in zip(*(torch.autograd.grad(loss, (a, b)) for loss in (actual, expected)), strict=True):
        # Where a row is 0 both divide by 1e-12; elsewhere what cancels leaves round-off of that size.
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11 / temperature)


@pytest.mark.parametrize('dtype, relative', [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize('temperature', [0.01, 0.05, 0.5])
@pytest.mark.parametrize('tile', [62, 16])
def test_gradient_of_lower_precision_equals_reference(tile, temperature, dtype, relative, monkeypatch):
    with_tiles_of(tile, monkeypatch)
    a, b = (view.requires_grad_() for view in views(31, 512, 'random', dtype))
    mine = torch.cat(torch.autograd.grad(nt_xent_loss(a, b, temperature), (a, b)))
    theirs = torch.cat(torch.autograd.grad(reference(a, b, temperature), (a, b)))
    assert mine.dtype == dtype
    assert (mine.double() - theirs).norm() <= relative / min(temperature, 0.5) * theirs.norm()


def test_rows_shorter_than_the_least_length_are_not_normalised():
    a, b = (view.requires_grad_() for view in views(4, 8, 'random', torch.float64))
    with torch.no_grad():
        a[1] *= 1e-13
    expected, actual = (torch.autograd.grad(loss(a, b, 0.5), (a, b)) for loss in (reference, nt_xent_loss))
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_gradcheck():
    a, b = (view.requires_grad_() for view in views(3, 4, 'random', torch.float64))
    assert torch.autograd.gradcheck(nt_xent_loss, (a, b))


def test_kept_tiles_change_nothing(monkeypatch):
    a, b = (view.requires_grad_() for view in views(40, 8, 'random', torch.float64))
    with_tiles_of(16, monkeypatch)
    gradients = []
    for keep in (0, 3 * 256, 1000 * 256):
        monkeypatch.setattr(nt_xent._Tiles, 'keep', keep)
        gradients.append(torch.autograd.grad(nt_xent_loss(a, b), a)[0])
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[1], gradients[2])


def test_there_is_no_second_derivative():
    a, b = (view.requires_grad_() for view in views(3, 4, 'random'))
    with pytest.raises(RuntimeError, match='no second derivative'):
        torch.autograd.grad(nt_xent_loss(a, b), a, create_graph=True)


def test_only_one_view_may_need_a_gradient():
    a, b = views(5, 4, 'random', torch.float64)
    expected, = torch.autograd.grad(reference(a, b.requires_grad_(), 0.5), b)
    torch.testing.assert_close(torch.autograd.grad(nt_xent_loss(a, b), b)[0], expected)
    assert not nt_xent_loss(a, b.detach()).requires_grad


def test_gradients_of_several_batches_add_up():
    a, b = (view.requires_grad_() for view in views(5, 4, 'random', torch.float64))
    expected = torch.autograd.grad(3 * reference(a, b, 0.5), a)[0]
    for factor in (1, 2):
        (factor * nt_xent_loss(a, b)).backward()
    torch.testing.assert_close(a.grad, expected)


@pytest.mark.slow
def test_within_a_compiled_function():
    a, b = (view.requires_grad_() for view in views(5, 4, 'random', torch.float64))

    @torch.compile(backend='aot_eager')
    def objective(a, b):
        return 2 * nt_xent_loss(a + 1, b + 1, 0.2) + 1

    torch.testing.assert_close(objective(a, b), 2 * reference(a + 1, b + 1, 0.2) + 1)
    actual = torch.autograd.grad(objective(a, b), a)[0]
    torch.testing.assert_close(actual, torch.autograd.grad(2 * reference(a + 1, b + 1, 0.2), a)[0])


def _peak_megabytes(rank, n):
    a, b = (view.requires_grad_() for view in views(n, 16, 'random'))
    nt_xent_loss(a[:1024], b[:1024]).backward()  # what is loaded and kept at first use does not count
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    nt_xent_loss(a, b).backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


@pytest.mark.slow
def test_memory_grows_linearly():
    small, large = (run_ranks(_peak_megabytes, 1, n)[0] for n in (4096, 12288))
    # One matrix of similarities would be 256 and 2,304 MB; what is (2N, D) is 0.5 and 1.5 MB, a tile 4 MB. The rest is
    # what malloc leaves between them.
    assert small < 100 and large < 100


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
    a.requires_grad_()
    with torch.autocast('cpu', torch.bfloat16):
        loss = nt_xent_loss(a, b, 0.5)
        gradient, = torch.autograd.grad(loss, a)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(gradient, torch.autograd.grad(reference(a, b, 0.5), a)[0], rtol=1e-5, atol=1e-8)
    assert loss.item() == pytest.approx(reference(a, b, 0.5).item(), rel=1e-6)


@pytest.mark.parametrize('a, b, temperature, message', [
    (torch.ones(2, 3), torch.ones(3, 3), 0.5, 'one shape'),
    (torch.ones(3), torch.ones(3), 0.5, 'one shape'),
    (torch.ones(0, 3), torch.ones(0, 3), 0.5, 'one shape'),
    (torch.ones(2, 3), torch.ones(2, 3), 0.0, 'temperature'),
    (torch.ones(2, 3), torch.ones(2, 3), float('nan'), 'temperature'),
    (torch.ones(2, 3), torch.ones(2, 3), float('inf'), 'temperature'),
])
def test_wrong_input_is_refused(a, b, temperature, message):
    with pytest.raises(ValueError, match=message):
        nt_xent_loss(a, b, temperature)


def _local_loss_and_gradient(rank, a, b, temperature, tile):
    nt_xent._tile_rows, nt_xent._Tiles.keep = lambda device: tile, tile * tile
    n = len(a) // torch.distributed.get_world_size()
    mine = [view[rank * n:(rank + 1) * n].clone().requires_grad_() for view in (a, b)]
    all_gather, met = torch.distributed.all_gather, []

    def count(parts, tensor):
        met.append(tuple(tensor.shape))
        return all_gather(parts, tensor)

    torch.distributed.all_gather = torch.distributed.all_reduce = count
    loss = nt_xent_loss(*mine, temperature)
    loss.backward()
    return loss.item(), *(view.grad.tolist() for view in mine), met


@pytest.mark.slow
@pytest.mark.parametrize('ranks, tile, temperature', [(1, 10, 0.2), (2, 10, 0.2), (3, 6, 0.01), (4, 64, 0.5)])
def test_ranks_equal_one_process(ranks, tile, temperature):
    a, b = (view.double().requires_grad_() for view in views(24, 8, 'random'))
    loss = reference(a, b, temperature)
    loss.backward()
    results = run_ranks(_local_loss_and_gradient, ranks, a.detach(), b.detach(), temperature, tile)
    assert sum(result[0] for result in results) / ranks == pytest.approx(loss.item(), rel=1e-12)
    for view, index in ((a, 1), (b, 2)):
        # The gradient of the sum of the ranks' losses; DDP divides by the number of ranks.
        gathered = torch.tensor([row for result in results for row in result[index]], dtype=torch.float64) / ranks
        torch.testing.assert_close(gathered, view.grad, rtol=1e-10, atol=1e-12)
    rows = 48 // ranks
    assert all(result[3] == ([(1,), (rows, 8), (rows,)] if ranks > 1 else []) for result in results)


def _unequal(rank):
    a, b = views(4 + rank, 8, 'random')
    with pytest.raises(RuntimeError, match=f'as many images on every rank; rank {rank} has {2 * (4 + rank)}'):
        nt_xent_loss(a, b)
    return True


@pytest.mark.slow
def test_ranks_of_unequal_batches_are_refused():
    assert run_ranks(_unequal, 2) == [True, True]
