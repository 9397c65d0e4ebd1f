"""One evaluator for every head, and the running figures of a training epoch.

Both add up on the device, without a host sync a batch, and talk to the other ranks once, at the end. Accuracies are
percentages.
"""
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.metrics import f1_score, recall_score

from timm_multilabel.distributed import sum_over_ranks
from timm_multilabel.labels import MISSING, LabelSpace

_LOSS, _TOP1, _TOP5, _COUNT = range(4)


def _zeros(rows: int, heads: int, device: torch.device) -> torch.Tensor:
    """Running totals: float64 where the device has it."""
    return torch.zeros(rows, heads, dtype=torch.float32 if device.type == 'mps' else torch.float64, device=device)


def mean_over_heads(values: dict[str, float], weights: dict[str, float]) -> float:
    """The weighted mean over the heads that have a value; NaN where no head with a weight has one."""
    total = sum(weights[name] for name in values)
    return float(sum(weights[name] * value for name, value in values.items()) / total) if total else float('nan')


class MultiLabelEvaluator:
    """Loss and accuracy of each head over its labelled rows, and their weighted mean.

    It answers timm's evaluator contract (`timm.task.ClassificationEvaluator`).

    Args:
        label_space: The heads.
        head_weights: Weight of each head in the means.
        device: Where outputs and targets are.
        max_samples: Rows after these are padding and do not count.
        keep_predictions: Keep what was predicted for each row (needed by `predictions`).
    """

    default_metric = 'top1'
    metric_names = ('loss', 'top1', 'top5')

    def __init__(
            self,
            label_space: LabelSpace,
            head_weights: dict[str, float],
            device: torch.device | str = 'cpu',
            max_samples: int | None = None,
            keep_predictions: bool = False,
    ):
        self.label_space = label_space
        self.head_weights = head_weights
        self.device = torch.device(device)
        self.max_samples = max_samples
        self.keep_predictions = keep_predictions
        self.reset()

    def reset(self) -> None:
        self.samples = 0
        self.sums = _zeros(4, len(self.label_space.heads), self.device)
        self.kept: list[torch.Tensor] = []

    @torch.no_grad()
    def update(self, output: dict[str, torch.Tensor], target: torch.Tensor) -> None:
        """Add a batch: {head: logits (B, C)} and class indices (B, H), MISSING for no label."""
        if self.max_samples is not None:
            left = max(0, self.max_samples - self.samples)
            output, target = {name: logits[:left] for name, logits in output.items()}, target[:left]
        self.samples += len(target)
        if not len(target):
            return
        best = []
        for head, column in enumerate(target.unbind(1)):
            logits = output[self.label_space.names[head]].float()
            ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
            hits = ranked == column[:, None]  # a missing label equals no class
            self.sums[_LOSS, head] += F.cross_entropy(logits, column, ignore_index=MISSING, reduction='sum')
            self.sums[_TOP1, head] += hits[:, 0].sum()
            self.sums[_TOP5, head] += hits.sum()
            self.sums[_COUNT, head] += (column != MISSING).sum()
            best.append(ranked[:, 0])
        if self.keep_predictions:
            self.kept.append(torch.stack([target, torch.stack(best, dim=1)]))

    def compute(self, distributed: bool = False) -> dict[str, float]:
        """'loss', 'top1' and 'top5' as means over heads, then '<head>_loss', '<head>_top1', '<head>_top5'.

        A head without any label has NaN and stays out of the means.
        """
        loss, top1, top5, count = (sum_over_ranks(self.sums) if distributed else self.sums).cpu().numpy()
        with np.errstate(invalid='ignore'):
            columns = {'loss': loss / count, 'top1': 100 * top1 / count, 'top5': 100 * top5 / count}
        heads = {
            f'{name}_{metric}': float(values[head])
            for head, name in enumerate(self.label_space.names) for metric, values in columns.items()
        }
        labelled = [(head, name) for head, name in enumerate(self.label_space.names) if count[head]]
        means = {
            metric: mean_over_heads({name: values[head] for head, name in labelled}, self.head_weights)
            for metric, values in columns.items()
        }
        return {**means, **heads}

    def summary(self) -> dict[str, float]:
        """The figures of this rank so far."""
        return self.compute(distributed=False)

    def predictions(self, distributed: bool = False) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """{head: (classes, predicted classes)} of the labelled rows of all ranks."""
        empty = torch.empty(2, 0, len(self.label_space.heads), dtype=torch.int64)
        kept = torch.cat([rows.cpu() for rows in self.kept] or [empty], dim=1).numpy()
        if distributed:
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, kept)
            kept = np.concatenate(parts, axis=1)
        found = {}
        for head, name in enumerate(self.label_space.names):
            true, predicted = kept[..., head]
            found[name] = true[true != MISSING], predicted[true != MISSING]
        return found


def class_metrics(true: np.ndarray, predicted: np.ndarray) -> dict[str, Any]:
    """Figures that weigh classes alike, as percentages, and the number of labels.

    'balanced_accuracy' is the mean recall of the classes that occur among the labels; 'macro_f1' the mean F1 of the
    classes that occur among labels or predictions.
    """
    if not len(true):
        return {'balanced_accuracy': float('nan'), 'macro_f1': float('nan'), 'labels': 0}
    recall = recall_score(true, predicted, labels=np.unique(true), average='macro', zero_division=0)
    f1 = f1_score(true, predicted, average='macro', zero_division=0)
    return {'balanced_accuracy': 100 * float(recall), 'macro_f1': 100 * float(f1), 'labels': len(true)}


class TrainingMeter:
    """Losses and accuracies of the steps of an epoch, added up on the device.

    Args:
        label_space: The heads.
        device: Where the task is.
    """

    def __init__(self, label_space: LabelSpace, device: torch.device):
        self.names = label_space.names
        self.losses = _zeros(1, 3 + len(self.names), device)[0]
        self.hits = _zeros(2, len(self.names), device)
        self.steps = 0

    @torch.no_grad()
    def update(self, result: dict[str, Any]) -> None:
        """Add a step: what `JointTask` returned."""
        totals = torch.stack([result['loss'].detach(), result['simclr_loss'], result['classification_loss']])
        self.losses += torch.cat([totals, result['head_losses']])
        self.steps += 1
        target = result['target']
        sizes = [logits.shape[1] for logits in result['output'].values()]
        columns = target.split(sizes, dim=1) if target.is_floating_point() else target.unbind(1)
        for head, logits in enumerate(result['output'].values()):
            column = columns[head]
            if column.ndim == 2:  # mixed labels: score the larger share
                column = torch.where(column.sum(dim=1) > 0, column.argmax(dim=1), MISSING)
            self.hits[0, head] += (logits.argmax(dim=1) == column).sum()
            self.hits[1, head] += (column != MISSING).sum()

    def compute(self, distributed: bool = False) -> dict[str, float]:
        """'train_loss', its weighted parts, 'train_<head>_loss' and 'train_<head>_top1'; reads from the device."""
        losses, hits, ranks = self.losses, self.hits, 1
        if distributed:
            losses, hits, ranks = sum_over_ranks(losses), sum_over_ranks(hits), dist.get_world_size()
        steps = max(self.steps, 1) * ranks
        total, simclr, classification, *heads = (losses / steps).tolist()
        figures = {'train_loss': total, 'simclr_loss': simclr, 'classification_loss': classification}
        correct, labels = hits.tolist()
        for name, loss, hit, count in zip(self.names, heads, correct, labels, strict=True):
            figures[f'train_{name}_loss'] = loss
            figures[f'train_{name}_top1'] = 100 * hit / count if count else float('nan')
        return figures
