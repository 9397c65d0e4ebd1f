"""One evaluator for every head, and the running metrics of a training epoch.

Both gather on the device, without a host sync a batch, and talk to the other ranks once, at the end. Accuracies are
percentages.
"""
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from timm_multilabel.distributed import sum_over_ranks
from timm_multilabel.heads import Head, group_heads
from timm_multilabel.labels import MISSING, LabelSet, LabelSpace
from timm_multilabel.metric_names import in_summary, of_head

MEANS = ('loss', 'score', 'top1', 'top5')
"""The metrics that have a mean over heads: over those that have the metric."""


def _zeros(*shape: int, device: torch.device) -> torch.Tensor:
    """Running totals: float64 where the device has it."""
    return torch.zeros(*shape, dtype=torch.float32 if device.type == 'mps' else torch.float64, device=device)


def mean_over_heads(values: dict[str, float], weights: dict[str, float]) -> float:
    """The weighted mean over the heads that have a value; NaN where no head with a weight has one."""
    total = sum(weights[name] for name in values)
    return float(sum(weights[name] * value for name, value in values.items()) / total) if total else float('nan')


def default_metric(heads: Iterable[Head]) -> str:
    """The metric that ranks checkpoints: 'top1', or 'score' where not every head has a top-1 accuracy."""
    return 'top1' if all(head.metric_names[0] == 'top1' for head in heads) else 'score'


def less_is_better(metric: str, heads: Mapping[str, Head]) -> bool:
    """Whether a metric of the evaluation, such as 'top1' or '<head>/mae', is better when it is less."""
    of_heads = {of_head(name, each) for name, head in heads.items() for each in ('loss', *head.lower_is_better)}
    return metric in ('loss', 'simclr_loss', 'teacher_features_loss') or metric in of_heads


class MultiLabelEvaluator:
    """Loss and metrics of each head over its labelled rows, and their weighted means.

    It answers timm's evaluator contract (`timm.task.ClassificationEvaluator`). What each head keeps of a row
    (`Head.measure`) stays on the device until the end.

    Args:
        heads: The heads by name.
        head_weights: Weight of each head in the means.
        device: Where outputs and targets are.
        max_samples: Rows after these are padding and do not count.
    """

    def __init__(
            self,
            heads: Mapping[str, Head],
            head_weights: dict[str, float],
            device: torch.device | str = 'cpu',
            max_samples: int | None = None,
    ):
        self.heads = dict(heads)
        self.label_space = LabelSpace(tuple(head.labels for head in heads.values()))
        self.head_weights = head_weights
        self.device = torch.device(device)
        self.max_samples = max_samples
        self.default_metric = default_metric(heads.values())
        self.metric_names = tuple(dict.fromkeys(('loss', self.default_metric)))
        self.reset()

    def reset(self) -> None:
        self.samples = 0
        self.sums = _zeros(2, len(self.heads), device=self.device)
        self.targets: list[torch.Tensor] = []
        self.measured: list[torch.Tensor] = []
        self.of_tags: dict[str, dict[str, dict[str, float]]] = {}

    @torch.no_grad()
    def update(self, output: dict[str, torch.Tensor], target: torch.Tensor) -> None:
        """Add a batch: {head: output} and targets (B, W)."""
        if self.max_samples is not None:
            left = max(0, self.max_samples - self.samples)
            output, target = {name: values[:left] for name, values in output.items()}, target[:left]
        self.samples += len(target)
        if not len(target):
            return
        measured = []
        for column, ((name, head), its) in enumerate(
                zip(self.heads.items(), self.label_space.split(target), strict=True)):
            values = output[name].float()
            self.sums[:, column] += torch.stack(head.eval_loss(values, its))
            measured.append(head.measure(values))
        self.targets.append(target)
        if measured:
            self.measured.append(torch.cat(measured, dim=1))
            self.widths = [part.shape[1] for part in measured]

    def compute(self, distributed: bool = False) -> dict[str, float]:
        """'loss' and others of `MEANS` as means over heads, then '<head>/loss' and '<head>/<metric>' of each head.

        'score', the mean of the heads' main metrics (0 where one is less), is there where not every head's is 'top1'. A
        head without any label has NaN and stays out of the means, as does a metric that the labels do not allow.
        Afterwards `of_tags` has {head: {tag: {metric: value}}} of the heads of tags that have labels.
        """
        loss, count = (sum_over_ranks(self.sums) if distributed else self.sums).cpu().numpy()
        metrics, labelled, self.of_tags = {}, {}, {}
        for column, (name, (target, measured)) in enumerate(self.predictions(distributed).items()):
            head = self.heads[name]
            metrics[name] = dict.fromkeys(('loss', *head.metric_names), np.nan)
            if len(target):
                if np.isfinite(measured).all():  # else the loss tells
                    found: dict[str, Any] = head.metrics(target, measured)
                    self.of_tags |= {name: found['tags']} if 'tags' in found else {}
                    metrics[name] |= {metric: found[metric] for metric in head.metric_names}
                metrics[name]['loss'] = loss[column] / count[column]
                # A score goes down to 0, so that one head that is far off does not hide what the others do.
                labelled[name] = {**metrics[name], 'score': np.maximum(metrics[name][head.metric_names[0]], 0)}
        means = {}
        for metric in MEANS:
            having = {
                name: float(values[metric]) for name, values in labelled.items()
                if metric in values and (metric == 'loss' or not np.isnan(values[metric]))}
            if metric == 'score' and self.default_metric == 'top1':
                continue
            if having or metric in ('loss', self.default_metric):
                means[metric] = mean_over_heads(having, self.head_weights)
        return means | {
            of_head(name, metric): float(value) for name, its in metrics.items() for metric, value in its.items()}

    def summary(self) -> dict[str, float]:
        """The metrics of this rank so far."""
        return self.compute(distributed=False)

    def predictions(self, distributed: bool = False) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """{head: (targets (N, W), what the head kept (N, K))} of the labelled rows of all ranks."""
        mine = self._predictions()
        if not distributed:
            return mine
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, mine)
        found = {}
        for name in mine:  # a rank may have had no row, and then knows no K
            pairs = [part[name] for part in parts if len(part[name][0])] or [mine[name]]
            targets, measured = zip(*pairs, strict=True)
            found[name] = np.concatenate(targets), np.concatenate(measured)
        return found

    def _predictions(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The same of this rank."""
        if not self.measured:
            return {name: (np.empty((0, 1)), np.empty((0, 1))) for name in self.heads}
        targets = self.label_space.split(torch.cat(self.targets).cpu())
        measured = torch.cat(self.measured).cpu().split(self.widths, dim=1)
        found = {}
        for (name, head), target, kept in zip(self.heads.items(), targets, measured, strict=True):
            known = head.labels.known(target)
            found[name] = target[known].reshape(-1, head.labels.width).numpy(), kept[known].numpy()
        return found


def class_metrics(true: np.ndarray, predicted: np.ndarray) -> dict[str, Any]:
    """Metrics that weigh classes alike, as percentages.

    'balanced_accuracy' is the mean recall of the classes that occur among the labels; 'macro_f1' the mean F1 of the
    classes that occur among labels or predictions.
    """
    from sklearn.metrics import f1_score, recall_score  # here, since it takes a second to import

    if not len(true):
        return {'balanced_accuracy': float('nan'), 'macro_f1': float('nan')}
    recall = recall_score(true, predicted, labels=np.unique(true), average='macro', zero_division=0)
    f1 = f1_score(true, predicted, average='macro', zero_division=0)
    return {'balanced_accuracy': 100 * float(recall), 'macro_f1': 100 * float(f1)}


def _has_accuracy(head: Head) -> bool:
    """Whether a head has classes to choose from."""
    return isinstance(head.labels, LabelSet) and len(head.labels.classes) > 1


class TrainingMeter:
    """Losses and accuracies of the steps of an epoch, added up on the device.

    Args:
        terms: Names of the objective's terms.
        heads: The heads by name.
        device: Where the task is.
    """

    def __init__(self, terms: tuple[str, ...], heads: Mapping[str, Head], device: torch.device):
        self.terms, self.heads = terms, dict(heads)
        order = list(heads)
        self.groups = [
            (group, torch.tensor([order.index(name) for name in group.names], device=device))
            for group in group_heads({name: head for name, head in heads.items() if _has_accuracy(head)})]
        self.totals = _zeros(1 + len(terms), device=device)
        self.losses = _zeros(len(heads), device=device)
        self.hits = _zeros(2, len(heads), device=device)
        self.shares = _zeros(len(heads), device=device)
        self.steps = _zeros(1, device=device)

    @torch.no_grad()
    def update(self, result: dict[str, Any]) -> None:
        """Add a step: what `JointTask` returned; its losses only where the objective is a finite number."""
        finite = result['loss'].detach().isfinite()
        losses = torch.stack([result['loss'].detach(), *(result[f'{term}_loss'] for term in self.terms)])
        self.totals += torch.where(finite, losses, 0)
        self.losses += torch.where(finite, result['head_losses'], 0)
        if 'pseudo_label_shares' in result:
            self.shares += torch.where(finite, result['pseudo_label_shares'], 0)
        self.steps += finite
        hits = self._hits_together(result)
        for column, (name, target) in enumerate(result['target'].items()):
            head = self.heads[name]
            if name in hits or not _has_accuracy(head):
                continue
            if target.ndim == 2:  # mixed labels: score the larger share
                target = torch.where(target.sum(dim=1) > 0, target.argmax(dim=1), MISSING)
            self.hits[0, column] += (head.predict(result['output'][name]) == target).sum()
            self.hits[1, column] += (target != MISSING).sum()

    def _hits_together(self, result: Mapping[str, Any]) -> set[str]:
        """Count the hits of the heads that are computed together; their names."""
        counted: set[str] = set()
        for group, columns in self.groups:
            if all(name in result['target'] and result['target'][name].ndim == 1 for name in group.names):
                self.hits[:, columns] += torch.stack(group.hits(result['output'], result['target']))
                counted.update(group.names)
        return counted

    def state(self) -> dict[str, torch.Tensor]:
        """The sums so far."""
        return {name: getattr(self, name) for name in ('totals', 'losses', 'hits', 'shares', 'steps')}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from sums."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    @staticmethod
    def join(states: list[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The sums of several ranks as one."""
        return {name: torch.stack([state[name] for state in states]).sum(dim=0) for name in states[0]}

    def compute(self, distributed: bool = False) -> dict[str, float]:
        """'train_loss', its weighted terms '<term>_loss', 'train/<head>/loss', of classes 'train/<head>/top1', and with
        pseudo-labels 'train/<head>/pseudo_labelled', the percentage that passes; reads from the device.
        """
        tensors = list(self.state().values())
        if distributed:
            tensors = [sum_over_ranks(tensor) for tensor in tensors]
        (total, *terms), losses, (correct, labels), shares, (steps,) = (tensor.tolist() for tensor in tensors)
        steps = steps or math.nan
        metrics = {'train_loss': total / steps}
        metrics |= {f'{name}_loss': value / steps for name, value in zip(self.terms, terms, strict=True)}
        for column, (name, head) in enumerate(self.heads.items()):
            metrics[in_summary('train', of_head(name, 'loss'))] = losses[column] / steps
            if _has_accuracy(head):
                metrics[in_summary('train', of_head(name, 'top1'))] = (
                    100 * correct[column] / labels[column] if labels[column] else float('nan'))
            if 'pseudo_label' in self.terms and head.distribution:
                metrics[in_summary('train', of_head(name, 'pseudo_labelled'))] = 100 * shares[column] / steps
        return metrics
