"""Figures: known values, missing labels, several ranks."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import SPACE, run_ranks, tiny_task

from timm_multilabel.heads import NumericHead, SoftmaxHead
from timm_multilabel.labels import Quantity
from timm_multilabel.metrics import (
    MultiLabelEvaluator,
    TrainingMeter,
    class_metrics,
    less_is_better,
    mean_over_heads,
)

HEADS = {head.name: SoftmaxHead(head, 4) for head in SPACE.heads}
WEIGHTS = {'color': 0.5, 'shape': 0.5}
COLOR = torch.tensor([[5., 0., 0.], [0., 5., 0.], [0., 5., 0.], [0., 0., 5.]])
SHAPE = torch.tensor([[3., 0.], [3., 0.], [0., 3.], [0., 3.]])
TARGET = torch.tensor([[0, 0], [1, -1], [2, 0], [-1, 1]])


def test_scores_of_labelled_rows():
    evaluator = MultiLabelEvaluator(HEADS, {'color': 3.0, 'shape': 1.0})
    for part in (slice(0, 1), slice(1, 4)):
        evaluator.update({'color': COLOR[part], 'shape': SHAPE[part]}, TARGET[part])
    figures = evaluator.compute()
    assert figures['color/top1'] == pytest.approx(200 / 3) and figures['shape/top1'] == pytest.approx(200 / 3)
    assert figures['color/top5'] == figures['shape/top5'] == 100  # fewer than five classes
    expected = F.cross_entropy(COLOR[:3], TARGET[:3, 0]).item()
    assert figures['color/loss'] == pytest.approx(expected, rel=1e-6)
    assert figures['loss'] == pytest.approx(0.75 * figures['color/loss'] + 0.25 * figures['shape/loss'])
    assert figures == evaluator.summary()


def test_which_metrics_are_better_when_they_are_less():
    heads = {**HEADS, 'price': NumericHead(Quantity('price', 0.0, 1.0), 4)}
    less = ['loss', 'simclr_loss', 'color/loss', 'price/mae']
    assert [metric for metric in (*less, 'top1', 'score', 'color/top1', 'price/r2') if less_is_better(
        metric, heads)] == less


def test_top5_of_many_classes():
    from timm_multilabel.labels import LabelSet, LabelSpace
    space = LabelSpace((LabelSet('n', tuple('abcdefg')),))
    evaluator = MultiLabelEvaluator({'n': SoftmaxHead(space.heads[0], 4)}, {'n': 1.0})
    evaluator.update({'n': torch.arange(7.0).repeat(3, 1)}, torch.tensor([[6], [2], [1]]))
    figures = evaluator.compute()
    assert figures['top1'] == pytest.approx(100 / 3) and figures['top5'] == pytest.approx(200 / 3)


def test_a_head_without_labels_stays_out_of_the_means():
    evaluator = MultiLabelEvaluator(HEADS, WEIGHTS)
    evaluator.update({'color': COLOR, 'shape': SHAPE}, torch.tensor([[0, -1]] * 4))
    figures = evaluator.compute()
    assert math.isnan(figures['shape/top1']) and figures['top1'] == figures['color/top1'] == 25
    assert math.isnan(MultiLabelEvaluator(HEADS, WEIGHTS).compute()['top1'])
    assert math.isnan(mean_over_heads({}, {'a': 1.0}))


def test_a_head_whose_loss_is_nan_is_not_passed_over():
    evaluator = MultiLabelEvaluator(HEADS, WEIGHTS)
    evaluator.update({'color': COLOR * float('nan'), 'shape': SHAPE}, TARGET)
    assert math.isnan(evaluator.compute()['loss'])


def test_padding_does_not_count():
    evaluator = MultiLabelEvaluator(HEADS, WEIGHTS, max_samples=3)
    for _ in range(2):
        evaluator.update({'color': COLOR[:2], 'shape': SHAPE[:2]}, TARGET[:2])
    assert len(evaluator.predictions()['color'][0]) == 3
    assert evaluator.compute()['color/top1'] == 100


def test_class_metrics():
    true, predicted = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])
    figures = class_metrics(true, predicted)
    assert figures == {
        'balanced_accuracy': pytest.approx(100 * (2 / 3 + 1) / 2),
        'macro_f1': pytest.approx(100 * (0.8 + 2 / 3) / 2)}
    assert class_metrics(np.array([0, 0]), np.array([0, 5]))['balanced_accuracy'] == 50
    assert math.isnan(class_metrics(np.array([]), np.array([]))['macro_f1'])


def test_training_meter_adds_steps_up():
    task, meter = tiny_task(), TrainingMeter(('simclr', 'classification'), HEADS, torch.device('cpu'))
    torch.manual_seed(0)
    target = torch.tensor([[0, -1], [2, -1]]).repeat(2, 1)
    results = [task(torch.randn(4, 3, 8, 8), target) for _ in range(3)]
    for result in results:
        meter.update(result)
    figures = meter.compute()
    assert figures['train_loss'] == pytest.approx(sum(r['loss'].item() for r in results) / 3, rel=1e-6)
    assert figures['train_loss'] == pytest.approx(figures['simclr_loss'] + figures['classification_loss'], rel=1e-6)
    assert math.isnan(figures['train/shape/top1']) and 0 <= figures['train/color/top1'] <= 100


def test_training_meter_scores_the_larger_share_of_mixed_labels():
    meter = TrainingMeter(('simclr', 'classification'), HEADS, torch.device('cpu'))
    zero = torch.zeros(())
    target = torch.tensor([[.7, .3, 0, 0, 0], [0, .4, .6, 0, 0], [0, 0, 0, 0, 0]])
    meter.update({
        'loss': zero, 'simclr_loss': zero, 'classification_loss': zero, 'head_losses': torch.zeros(2),
        'output': {'color': COLOR[:3], 'shape': SHAPE[:3]}, 'target': dict(zip(HEADS, SPACE.split(target)))})
    assert meter.compute()['train/color/top1'] == 50


def _evaluate_rank(rank):
    evaluator = MultiLabelEvaluator(HEADS, WEIGHTS)
    mine = slice(0, 3) if rank == 0 else slice(3, 4)
    evaluator.update({'color': COLOR[mine], 'shape': SHAPE[mine]}, TARGET[mine])
    pairs = evaluator.predictions(distributed=True)
    first = {name: [part[:, 0].tolist() for part in pair] for name, pair in pairs.items()}
    return evaluator.compute(distributed=True), first


@pytest.mark.slow
def test_ranks_score_as_one_process():
    whole = MultiLabelEvaluator(HEADS, WEIGHTS)
    whole.update({'color': COLOR, 'shape': SHAPE}, TARGET)
    for figures, pairs in run_ranks(_evaluate_rank, 2):
        assert figures == pytest.approx(whole.compute())
        assert pairs == {'color': [[0, 1, 2], [0, 1, 1]], 'shape': [[0, 0, 1], [0, 1, 1]]}
