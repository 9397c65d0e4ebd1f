"""Softmax heads that are computed together give what each gives by itself."""
import copy

import pytest
import torch
from common import TinyBackbone

from timm_multilabel.heads import SoftmaxHead, group_heads, losses_of_heads
from timm_multilabel.labels import MISSING, LabelSet, LabelSpace
from timm_multilabel.metrics import TrainingMeter
from timm_multilabel.model import MultiLabelModel
from timm_multilabel.task import JointTask, Pool, Teaching

SIZES = {'a': 5, 'b': 7, 'c': 4, 'd': 40, 'e': 6}  # d has no head of its size
SPACE = LabelSpace(tuple(LabelSet(name, tuple(f'{name}{number}' for number in range(size)))
                         for name, size in SIZES.items()))
OPTIONS = {'b': {'class_weights': [0.5, 2, 1, 0, 3, 1, 1]}, 'c': {'smoothing': 0.0}}


class Own(SoftmaxHead):
    """A kind of the user's that inherits from one of ours."""
    kind = 'own'


def task_of(**settings):
    torch.manual_seed(0)
    model = MultiLabelModel(TinyBackbone(), SPACE, smoothing=0.1, head_options=OPTIONS, projection_dim=5)
    return JointTask(model, projection_dim=5, **settings).double()


def batch_of(rows):
    generator = torch.Generator().manual_seed(1)
    target = torch.stack([torch.randint(size, (rows,), generator=generator) for size in SIZES.values()], dim=1)
    target[torch.rand(target.shape, generator=generator) < 0.3] = MISSING
    target[:, 2] = MISSING  # c has no label at all
    return torch.randn(rows, 3, 8, 8, generator=generator, dtype=torch.float64), target


def by_itself(monkeypatch):
    """Each head computes its own output and loss, as a kind of the user's does."""
    for module in ('model', 'task', 'metrics'):
        monkeypatch.setattr(f'timm_multilabel.{module}.group_heads', lambda heads: [])


@pytest.mark.parametrize('settings', [
    {}, {'simclr_weight': 0.0}, {'first_view_only': True}, {'pool': Pool(batch_size=4, entropy_weight=0.1)},
    {'teaching': Teaching(('e', 'd', 'a', 'b'), 0.7, 2.0)},
    {'micro_batch': 3}], ids=str)
def test_a_step_is_that_of_each_head_by_itself(monkeypatch, settings):
    images, target = batch_of(24)
    if 'teaching' in settings:
        answers = torch.randn(24, 58, generator=torch.Generator().manual_seed(2))
        answers[:, 1] = float('-inf')
        target = torch.cat([target, answers], dim=1)
    results = []
    for alone in (False, True):
        if alone:
            by_itself(monkeypatch)
        task = task_of(**settings)
        result = task(images, target)
        result['loss'].backward()
        meter = TrainingMeter(task.terms, task.heads, torch.device('cpu'))
        meter.update(result)
        results.append((result, {name: p.grad for name, p in task.named_parameters()}, meter.compute()))
    (ours, gradients, metrics), (theirs, expected, expected_metrics) = results
    assert ours['output'].keys() == theirs['output'].keys() == SIZES.keys()
    for name in SIZES:
        torch.testing.assert_close(ours['output'][name], theirs['output'][name], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours['head_losses'], theirs['head_losses'], rtol=1e-10, atol=1e-12)
    assert ours['head_losses'][2] == 0
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-12)
    assert metrics == pytest.approx(expected_metrics, rel=1e-6, nan_ok=True)


def test_what_is_grouped():
    heads = task_of().heads
    assert [group.names for group in group_heads(heads)] == [('a', 'b', 'c', 'e')]
    own = Own(SPACE.heads[0], 6)
    assert [group.names for group in group_heads({**heads, 'a': own})] == [('b', 'c', 'e')]


def test_dropout_draws_for_each_head():
    heads = copy.deepcopy(task_of().heads)
    group, = group_heads(heads)
    features = torch.randn(3, 6, dtype=torch.float64)
    assert group.logits(heads, features) is not None
    heads['e'].drop.p = 0.5
    assert group.logits(heads, features) is None
    heads['e'].eval()
    assert [len(each[0]) for each in group.logits(heads, features)] == [5, 7, 4, 6]


def test_mixed_labels_are_those_of_each_head():
    task = task_of(simclr_weight=0.0)
    images, _ = batch_of(6)
    shares = torch.rand(6, sum(SIZES.values()), dtype=torch.float64)
    found = task(images, shares)
    parts = dict(zip(SIZES, shares.split(list(SIZES.values()), dim=1)))
    expected = [head.loss(found['output'][name], parts[name]) for name, head in task.heads.items()]
    sums, counts = losses_of_heads(group_heads(task.heads), task.heads, found['output'], parts)
    torch.testing.assert_close(sums, torch.stack([each[0] for each in expected]))
    torch.testing.assert_close(counts, torch.stack([each[1] for each in expected]))


def test_hooks_of_a_head_are_called():
    task, seen = task_of(), []
    task.heads['b'].fc.register_forward_hook(lambda *_: seen.append('b'))
    task(*batch_of(4))
    assert seen == ['b']


def test_other_heads_compute_their_losses_in_their_order(monkeypatch):
    called = []
    loss = SoftmaxHead.loss
    monkeypatch.setattr(SoftmaxHead, 'loss', lambda self, *args: called.append(self.labels.name) or loss(self, *args))
    spaces = [LabelSet(f'h{size}', tuple(map(str, range(size)))) for size in (2, 4, 8, 16, 32)]
    heads = {labels.name: SoftmaxHead(labels, 6) for labels in spaces}
    outputs = {name: head(torch.ones(1, 6)) for name, head in heads.items()}
    losses_of_heads(group_heads(heads), heads, outputs, dict.fromkeys(heads, torch.tensor([1])))
    assert called == list(heads)
