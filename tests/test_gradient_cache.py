"""Batches in pieces: the gradient of the whole batch, the memory of a piece."""
import resource

import pytest
import torch
from common import SPACE, TinyBackbone, run_ranks, tiny_task
from torch import nn

from timm_multilabel import task as task_module
from timm_multilabel.gradient_cache import run_with_gradient_cache
from timm_multilabel.model import MultiLabelModel
from timm_multilabel.task import JointTask, Pool

TARGET = torch.tensor([[0, 1], [2, 0], [1, -1], [-1, -1], [-1, 1], [2, -1], [0, 0]])
POOL = Pool(3, entropy_weight=0.3, marginal_entropy_weight=0.2, pseudo_label_weight=0.4, pseudo_label_threshold=0.95,
            pseudo_label_reference='labelled', pseudo_label_alignment=True)


def batch(images=10, views=2, dtype=torch.float64):
    """Images, of which the first seven have targets."""
    generator = torch.Generator().manual_seed(1)
    target = torch.full((images, 2), -1)
    target[:7] = TARGET[:images]
    return torch.randn(views * images, 3, 8, 8, generator=generator, dtype=dtype), target.repeat(views, 1)


def step(task, images, target):
    """Result and gradients of a step."""
    result = task(images, target)
    result['loss'].backward()
    return result, {name: p.grad.clone() for name, p in task.trainable_module.named_parameters()}


def compare(task, whole, **tolerance):
    """Compare a task that takes pieces with one that does not."""
    result, gradients = step(task, *batch())
    expected, whole_gradients = step(whole, *batch())
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value, **tolerance)
    assert len(gradients) == len(whole_gradients) > 4
    for mine, theirs in zip(gradients.values(), whole_gradients.values(), strict=True):
        assert theirs.abs().sum() > 0
        torch.testing.assert_close(mine, theirs, **tolerance)


@pytest.mark.parametrize('size', [1, 3, 5, 9])
@pytest.mark.parametrize('options', [
    {'pool': POOL},
    {'pool': POOL, 'first_view_only': True, 'head_options': {'color': {'loss': 'arcface', 'input': 'projection'}}},
    {'simclr_weight': 0, 'pool': POOL},
    {'classification_weight': 0.7},
], ids=['all terms', 'arcface', 'without simclr', 'without a pool'])
def test_a_step_equals_that_of_the_whole_batch(options, size):
    compare(tiny_task(dtype=torch.float64, micro_batch=size, **options), tiny_task(dtype=torch.float64, **options),
            rtol=1e-10, atol=1e-12)


def test_simclr_alone():
    images, target = batch()
    tasks = [tiny_task(dtype=torch.float64, classification_weight=0, micro_batch=size) for size in (4, None)]
    for task in tasks:
        task(images, target)['loss'].backward()
    for mine, theirs in zip(*(task.trainable_module.parameters() for task in tasks), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def test_one_view():
    images, target = batch(views=1)
    results = [step(tiny_task(dtype=torch.float64, simclr_weight=0, micro_batch=size), images, target)
               for size in (4, None)]
    for mine, theirs in zip(results[0][1].values(), results[1][1].values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_a_batch_that_fits_is_run_once():
    seen = []
    run_with_gradient_cache(Watch(seen), torch.zeros(20, 1, 1, 1), views=2, size=10)
    assert [len(images) for images in seen] == [20]


def test_the_teacher_sees_pieces_too():
    tasks = [tiny_task(dtype=torch.float64, micro_batch=size, pool=POOL) for size in (2, None)]
    for task in tasks:
        task.setup_ema()
        task.train()
    seen = []
    tasks[0].get_trainable_module(ema=True).module.model.backbone.register_forward_pre_hook(
        lambda module, inputs: seen.append(len(inputs[0])))
    results = [task(*batch()) for task in tasks]
    torch.testing.assert_close(results[0]['pseudo_label_loss'], results[1]['pseudo_label_loss'])
    torch.testing.assert_close(results[0]['pseudo_label_shares'], results[1]['pseudo_label_shares'])
    assert seen == [2] * 5 and results[0]['pseudo_label_loss'] > 0


class Restless(TinyBackbone):
    """A backbone with batch norm and dropout."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)

    def forward(self, images):
        return self.fc(self.drop(self.norm(self.conv(images)).relu().mean(dim=(2, 3))))


def restless_task(size, compiled=False, ema=False):
    torch.manual_seed(0)
    task = JointTask(MultiLabelModel(Restless(), SPACE, drop=0.3), micro_batch=size)
    if ema:
        task.setup_ema(decay=0.5)
    if compiled:
        task.compile(backend='aot_eager')
    return task.train()


def without_caching(module, images, views, size):
    """The same pieces, with all their activations."""
    pieces = -(-len(images) // views // size)
    parts = [torch.arange(len(images)).view(views, -1)[:, first::pieces].flatten() for first in range(pieces)]
    outputs, projections = zip(*(module(images[part]) for part in parts))
    back = torch.cat(parts).argsort()
    return {name: torch.cat([each[name] for each in outputs])[back] for name in outputs[0]}, torch.cat(
        projections)[back]


@pytest.mark.slow
@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize('size', [3, 5])
def test_the_second_run_repeats_the_first(size, compiled, monkeypatch):
    """Random numbers are drawn again, and batch norm takes each piece in once: as without gradient caching."""
    images, target = batch(dtype=torch.float32)
    outcomes = []
    for cached in (True, False):
        with monkeypatch.context() as patch:
            if not cached:
                patch.setattr(task_module, 'run_with_gradient_cache', without_caching)
            task = restless_task(size, compiled)
            torch.manual_seed(5)
            result, gradients = step(task, images, target)
            buffers = {name: value.clone() for name, value in task.trainable_module.named_buffers()}
            outcomes.append((result['loss'], gradients, buffers, torch.get_rng_state()))
    # Gradients of several pieces are added up in another order.
    torch.testing.assert_close(*outcomes, rtol=1e-5, atol=1e-7)
    tracked, = (value for name, value in outcomes[0][2].items() if name.endswith('num_batches_tracked'))
    assert tracked == {3: 4, 5: 2}[size]


class Watch(nn.Module):
    """Notes the images that it is given, and gives their values."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def forward(self, images):
        self.seen.append(images)
        return {'x': images[:, 0, 0, 0]}, images.flatten(1)


class DropAll(nn.Module):
    def forward(self, images):
        return {'x': nn.functional.dropout(images.flatten(1), 0.5)}, None


def test_dropout_differs_from_piece_to_piece():
    outputs, projections = run_with_gradient_cache(DropAll(), torch.ones(8, 3, 4, 4), views=2, size=2)
    assert projections is None
    assert len({tuple(row.tolist()) for row in outputs['x']}) > 4


def test_rows_come_back_in_their_order():
    images = torch.arange(14.0).view(14, 1, 1, 1)
    outputs, projections = run_with_gradient_cache(Watch([]), images, views=2, size=3)
    assert torch.equal(outputs['x'], images.flatten()) and torch.equal(projections, images.flatten(1))


def test_gradient_cache_have_all_views_and_their_share_of_the_last_images():
    seen = []
    run_with_gradient_cache(Watch(seen), torch.arange(14.0).view(14, 1, 1, 1), views=2, size=3)
    assert [images.flatten().tolist() for images in seen] == [[0, 3, 6, 7, 10, 13], [1, 4, 8, 11], [2, 5, 9, 12]]


@pytest.mark.parametrize('layout', [torch.channels_last, torch.contiguous_format])
def test_gradient_cache_keep_the_memory_layout(layout):
    seen = []
    run_with_gradient_cache(Watch(seen), torch.zeros(4, 3, 5, 5).contiguous(memory_format=layout), views=1, size=2)
    assert [images.is_contiguous(memory_format=layout) for images in seen] == [True, True]


def test_without_gradients():
    task = tiny_task(dtype=torch.float64, micro_batch=3)
    with torch.no_grad():
        result = task(*batch())
    torch.testing.assert_close(result['loss'], tiny_task(dtype=torch.float64)(*batch())['loss'])
    task = restless_task(3)
    with torch.no_grad():
        task(*batch(dtype=torch.float32))
    assert task.trainable_module.model.backbone.norm.num_batches_tracked == 4


def test_an_error_leaves_the_buffers_as_they_were():
    task = restless_task(3)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError('out of memory')

    task.trainable_module.model.backbone.drop.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match='out of memory'):
        task(*batch(dtype=torch.float32))
    assert task.trainable_module.model.backbone.norm.num_batches_tracked == 0


@pytest.mark.filterwarnings('ignore:Using backward')
def test_there_is_no_second_derivative():
    task = tiny_task(micro_batch=3, simclr_weight=0)
    result = task(*batch(views=1, dtype=torch.float32))
    with pytest.raises(RuntimeError, match='no second derivative'):
        result['loss'].backward(create_graph=True)


def _compiled_rank_step(rank, compiled):
    task = restless_task(2, compiled)
    task.prepare_distributed()
    torch.manual_seed(5)
    images, target = batch(images=4, dtype=torch.float32)
    return [gradient.tolist() for gradient in step(task, images, target)[1].values()]


@pytest.mark.slow
def test_compiled_ranks():
    compiled, plain = (run_ranks(_compiled_rank_step, 2, which) for which in (True, False))
    for mine, theirs in zip(compiled[0], plain[0], strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=1e-5, atol=1e-7)


def test_a_frozen_backbone():
    tasks = [tiny_task(dtype=torch.float64, simclr_weight=0, freeze_backbone=True, micro_batch=size)
             for size in (3, None)]
    for task in tasks:
        task(*batch(views=1))['loss'].backward()
    for mine, theirs in zip(*(task.trainable_module.parameters() for task in tasks), strict=True):
        assert mine.requires_grad == theirs.requires_grad
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def test_autocast_is_that_of_the_first_pass():
    images, target = batch(dtype=torch.float32)
    gradients = []
    for size in (3, None):
        task = tiny_task(micro_batch=size)
        with torch.autocast('cpu', torch.bfloat16):
            result = task(images, target)
        result['loss'].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in task.trainable_module.parameters()]))
    torch.testing.assert_close(*gradients, rtol=2e-2, atol=2e-3)


def test_size_is_checked():
    with pytest.raises(ValueError, match='1 image or more, not 0'):
        tiny_task(micro_batch=0)


def _rank_step(rank, size):
    images, target = batch(images=6)
    views = images.chunk(2), target.chunk(2)
    mine = [torch.cat([view.chunk(2)[rank] for view in whole]) for whole in views]
    task = tiny_task(dtype=torch.float64, micro_batch=size)
    task.prepare_distributed()
    reductions = []

    def count(state, bucket):
        reductions.append(bucket.index())
        work = torch.distributed.all_reduce(bucket.buffer().div_(2), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    task.trainable_module.register_comm_hook(None, count)
    with task.no_sync():  # accumulated with another batch, whose gradient is the same
        task(*mine)['loss'].backward()
    before = list(reductions)
    result, gradients = step(task, *mine)
    return result['loss'].item(), [gradient.tolist() for gradient in gradients.values()], before, reductions


@pytest.mark.slow
@pytest.mark.parametrize('size', [2, None])
def test_ranks_equal_one_process_with_one_reduction_a_step(size):
    whole, gradients = step(tiny_task(dtype=torch.float64), *batch(images=6))
    results = run_ranks(_rank_step, 2, size)
    assert sum(result[0] for result in results) / 2 == pytest.approx(whole['loss'].item(), rel=1e-12)
    for _, of_rank, before, reductions in results:
        assert before == [] and reductions == [0]  # one bucket holds all
        for mine, theirs in zip(of_rank, gradients.values(), strict=True):
            torch.testing.assert_close(torch.tensor(mine, dtype=torch.float64), 2 * theirs, rtol=1e-9, atol=1e-12)


def _peak_megabytes(rank, images, size):
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    backbone.head_hidden_size = 32
    task = JointTask(MultiLabelModel(backbone, SPACE), micro_batch=size)
    photos, target = torch.randn(2 * images, 3, 32, 32), torch.zeros(2 * images, 2)
    step(task, photos[:16], target[:16])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(task, photos, target)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


@pytest.mark.slow
def test_memory_is_that_of_a_piece():
    whole, in_pieces = (run_ranks(_peak_megabytes, 1, 1024, size)[0] for size in (None, 16))
    # 2,048 images are 24 MB; of each the convolution alone keeps 0.12 MB twice.
    assert whole > 300 and in_pieces < whole / 4
