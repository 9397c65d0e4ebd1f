"""The joint objective: its terms, its gradient over ranks, its part of timm's contract."""
import pytest
import timm.task
import torch
import torch.nn.functional as F
from common import SPACE, run_ranks, tiny_task

from timm_multilabel.losses import nt_xent_loss

# Six images, labels missing unevenly: ranks of two or three images see different numbers of labels of each head.
TARGET = torch.tensor([[0, 1], [2, 0], [1, -1], [-1, -1], [-1, 1], [2, -1]])


def batch(views=2, images=6):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(views * images, 3, 8, 8, generator=generator), TARGET[:images].repeat(views, 1)


def shard(images, target, rank, ranks):
    """A rank's part of a view-major batch of two views."""
    return tuple(
        torch.cat([view.chunk(ranks)[rank] for view in whole.chunk(2)]) for whole in (images, target))


def test_loss_is_the_weighted_sum_of_its_terms():
    images, target = batch()
    task = tiny_task(simclr_weight=0.3, classification_weight=0.7, temperature=0.2, smoothing=0.1)
    result = task(images, target)

    module = task.trainable_module
    features = module.model.backbone(images)
    simclr = nt_xent_loss(*module.projector(features).chunk(2), 0.2)
    heads = [
        F.cross_entropy(head(features), column, ignore_index=-1, label_smoothing=0.1)
        for head, column in zip(module.model.heads, target.unbind(1), strict=True)]
    torch.testing.assert_close(result['simclr_loss'], 0.3 * simclr)
    torch.testing.assert_close(result['head_losses'], torch.stack(heads))
    torch.testing.assert_close(result['classification_loss'], 0.7 * (heads[0] + heads[1]) / 2)
    torch.testing.assert_close(result['loss'], result['simclr_loss'] + result['classification_loss'])
    assert {name: tuple(logits.shape) for name, logits in result['output'].items()} == {
        'color': (12, 3), 'shape': (12, 2)}


def test_head_weights():
    images, target = batch()
    result = tiny_task(head_weights={'shape': 3, 'color': 0.5})(images, target)
    expected = 0.5 * (0.5 * result['head_losses'][0] + 3 * result['head_losses'][1])
    torch.testing.assert_close(result['classification_loss'], expected)


def test_first_view_only_classifies_the_first_views():
    images, target = batch()
    result = tiny_task(first_view_only=True)(images, target)
    alone = tiny_task(simclr_weight=0, classification_weight=1)(images[:6], target[:6])
    torch.testing.assert_close(result['head_losses'], alone['head_losses'])
    assert len(result['target']['shape']) == len(result['output']['color']) == 6


def test_without_simclr_there_is_no_projector_and_one_view():
    task = tiny_task(simclr_weight=0)
    assert task.views == 1 and task.trainable_module.projector is None
    result = task(*batch(views=1))
    assert result['simclr_loss'] == 0 and torch.equal(result['loss'], result['classification_loss'])


def test_without_classification_heads_stay_as_they_are():
    task = tiny_task(classification_weight=0)
    before = [parameter.clone() for parameter in task.trainable_module.model.heads.parameters()]
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=1.0)
    task(*batch())['loss'].backward()
    optimizer.step()
    heads = task.trainable_module.model.heads
    assert all(torch.equal(old, new) for old, new in zip(before, heads.parameters(), strict=True))
    assert task.trainable_module.model.backbone.fc.weight.grad.abs().sum() > 0


def test_a_head_without_labels_in_the_batch_gives_zero():
    images, target = batch()
    target[:, 1] = -1
    task = tiny_task()
    result = task(images, target)
    result['loss'].backward()
    assert result['head_losses'][1] == 0 and torch.isfinite(result['loss'])
    assert (task.trainable_module.model.heads[1].fc.weight.grad == 0).all()


@pytest.mark.parametrize('kwargs, message', [
    ({'simclr_weight': 0, 'classification_weight': 0}, 'nothing to train'),
    ({'head_weights': {'color': 1}}, "head 'shape' has no weight"),
    ({'head_weights': {'color': 1, 'shape': 1, 'size': 1}}, "no head 'size'"),
    ({'head_weights': {'color': 1, 'shape': -1}}, "weight of head 'shape'"),
    ({'head_weights': {'color': 0, 'shape': 0}}, 'all heads are 0'),
])
def test_weights_are_checked(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny_task(**kwargs)


def _train_rank(rank, kwargs, steps):
    task = tiny_task(dtype=torch.float64, **kwargs)
    ranks = torch.distributed.get_world_size()
    task.prepare_distributed()
    optimizer = torch.optim.SGD([p for p in task.trainable_module.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(steps):
        images, target = batch(views=task.views)
        if task.views == 2:
            images, target = shard(images, target, rank, ranks)
        else:
            images, target = images.chunk(ranks)[rank], target.chunk(ranks)[rank]
        result = task(images.double(), target)
        optimizer.zero_grad()
        result['loss'].backward()
        gradient = {name: p.grad.clone() for name, p in task.trainable_module.module.named_parameters()
                    if p.grad is not None}
        optimizer.step()
        losses.append(result['loss'].item())
    return losses, {name: value.tolist() for name, value in gradient.items()}


@pytest.mark.slow
@pytest.mark.parametrize('ranks', [2, 3])
@pytest.mark.parametrize('kwargs', [
    {}, {'simclr_weight': 0}, {'classification_weight': 0}, {'first_view_only': True}],
    ids=['joint', 'heads', 'simclr', 'first view'])
def test_ranks_train_as_one_process(ranks, kwargs):
    """Loss and gradient of two steps; with weight 0 on a term, DDP must not wait for its parameters."""
    task = tiny_task(dtype=torch.float64, **kwargs)
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.1)
    expected = []
    for _ in range(2):
        images, target = batch(views=task.views)
        result = task(images.double(), target)
        optimizer.zero_grad()
        result['loss'].backward()
        optimizer.step()
        expected.append(result['loss'].item())
    results = run_ranks(_train_rank, ranks, kwargs, 2)
    for step in range(2):
        mean = sum(losses[step] for losses, _ in results) / ranks
        assert mean == pytest.approx(expected[step], rel=1e-10)
    named = dict(task.trainable_module.named_parameters())
    for _, gradient in results:
        assert gradient.keys() == {name for name, p in named.items() if p.grad is not None}
        for name, value in gradient.items():
            torch.testing.assert_close(
                torch.tensor(value, dtype=torch.float64), named[name].grad, rtol=1e-9, atol=1e-12)


def test_checkpoint_state_round_trip():
    task, other = tiny_task(seed=0), tiny_task(seed=1)
    for each in (task, other):
        each.setup_ema(decay=0.5)
    with torch.no_grad():
        task.trainable_module.projector[0].weight.add_(1)
    task.update_ema()
    state, ema = task.get_checkpoint_state(), task.get_checkpoint_state(ema=True)
    assert not any('projector' in name for name in state['state_dict'])
    assert state['label_space'] == SPACE.to_dict()

    other.load_checkpoint_state(state['state_dict'], state['task_state'])
    other.load_checkpoint_state(ema['state_dict_ema'], ema['task_state_ema'], ema=True)
    images, target = batch()
    torch.testing.assert_close(task(images, target)['loss'], other(images, target)['loss'], rtol=0, atol=0)
    for ema in (False, True):
        mine, theirs = task.get_trainable_module(ema), other.get_trainable_module(ema)
        for name, value in mine.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name])


def test_ema_and_eval_model_leave_the_projector_out():
    task = tiny_task()
    task.setup_ema(decay=0.0)
    task.update_ema()
    images, _ = batch()
    for ema in (False, True):
        output = task.get_eval_model(ema=ema)(images)
        assert set(output) == {'color', 'shape'}
    assert isinstance(task, timm.task.TrainingTask)


def test_adaptive_clipping_spares_every_head():
    task = tiny_task()
    spared = {id(p) for p in task.trainable_module.model.heads.parameters()}
    clipped = {id(p) for p in task.get_clip_parameters(exclude_head=True)}
    everything = {id(p) for p in task.get_clip_parameters()}
    assert everything - clipped == spared and len(spared) == 4


def test_compiled_task_gives_the_same_loss():
    images, target = batch()
    expected = tiny_task()(images, target)['loss']
    task = tiny_task()
    task.compile(backend='eager')
    torch.testing.assert_close(task(images, target)['loss'], expected)
    assert set(task.get_checkpoint_state()['state_dict']) == set(tiny_task().get_checkpoint_state()['state_dict'])
    assert set(task.get_eval_model()(images)) == {'color', 'shape'}
