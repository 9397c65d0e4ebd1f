"""What a model says of each row of a split, kept in a file, so that reports and comparisons need no second pass."""
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from timm_multilabel.arrays import check_array, read_arrays, write_arrays
from timm_multilabel.data.table import Rows
from timm_multilabel.errors import UserError
from timm_multilabel.files import reading
from timm_multilabel.heads import Head
from timm_multilabel.inference.loaded import check_finite
from timm_multilabel.labels import LabelSpace, Quantity
from timm_multilabel.model import MultiLabelModel

_ROUNDING = 1e-3
_CELLS = 2 ** 28  # numbers, of 4 bytes each, that the outputs of all rows are at most


@dataclass(frozen=True)
class Predictions:
    """Outputs of a model for the N rows of a split.

    Args:
        label_space: The heads.
        rows: Each row as messages name it, such as "val.csv row 17" (N,).
        images: The image files, by their real paths (N,).
        targets: Labels, as `LabelSpace.split` takes them (N, W).
        outputs: By head what `Head.probabilities` gives: of classes (N, C), of tags (N, C), or a standardised number
            (N, 1); float32.
        features: Pooled features of the backbone (N, F), float32.
        made_from: What tells the checkpoint and the table that they were made from; who keeps them compares it.
        own_metrics: The metrics, by name, of each head whose kind has no probabilities, and whose outputs are 1 for
            the class it predicts. None where a file from before these were kept does not say.
    """
    label_space: LabelSpace
    rows: np.ndarray
    images: np.ndarray
    targets: np.ndarray
    outputs: dict[str, np.ndarray]
    features: np.ndarray
    made_from: tuple[str, str] = ('', '')
    own_metrics: dict[str, dict[str, float]] | None = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def target(self, head: str) -> np.ndarray:
        """The labels of a head: class indices (N,) or tags (N, C), -1 where missing, or numbers (N,), NaN where so."""
        return self.label_space.of(torch.from_numpy(self.targets), head).numpy()

    def save(self, path: str | Path) -> None:
        """Write them as an npz file.

        Raises:
            UserError: They are not what `load` takes, or the file cannot be written.
        """
        try:
            self._check()
        except ValueError as error:
            raise UserError(f'{path}: cannot be written, since predictions of this model cannot be kept ({error})'
                            ) from error
        arrays = {name: getattr(self, name) for name in ('rows', 'images', 'targets', 'features')}
        # By number, since a head may be called anything.
        arrays |= {f'output_{number}': self.outputs[name] for number, name in enumerate(self.label_space.names)}
        arrays['made_from'] = np.array(self.made_from)
        arrays['own_metrics'] = np.array(json.dumps(self.own_metrics))
        arrays['label_space'] = np.array(json.dumps(self.label_space.to_dict()))
        write_arrays(path, arrays, compress=True)

    @classmethod
    def load(cls, path: str | Path) -> 'Predictions':
        """Read what `save` wrote, without running anything that it contains.

        Raises:
            UserError: The file is missing, damaged or something else.
        """
        with reading(path, 'stored predictions', 'remove it to have them made again'):
            stored = read_arrays(path)
            label_space = LabelSpace.from_dict(json.loads(str(stored['label_space'])))
            outputs = {name: stored[f'output_{number}'] for number, name in enumerate(label_space.names)}
            check_array('made_from', stored['made_from'], str, 2)
            own_metrics = json.loads(str(stored['own_metrics'])) if 'own_metrics' in stored else None
            _check_metrics(own_metrics, label_space)
            found = cls(label_space, *(stored[name] for name in ('rows', 'images', 'targets')), outputs,
                        stored['features'], tuple(stored['made_from'].tolist()), own_metrics)
            found._check()
        return found

    def _check(self) -> None:
        """Raise ValueError unless all parts fit each other and are finite."""
        count, heads = len(self.rows), self.label_space.heads
        if not count:
            raise ValueError('no rows')
        for name in ('rows', 'images'):
            check_array(name, getattr(self, name), str, count)
        check_array('targets', self.targets, np.float32, count, sum(labels.width for labels in heads))
        check_array('features', self.features, np.float32, count, None)
        if not np.isfinite(self.features).all():
            raise ValueError('features that are not finite')
        for labels, target in zip(heads, self.label_space.split(torch.from_numpy(self.targets)), strict=True):
            labels.check(target.numpy())
            output = self.outputs[labels.name]
            check_array(labels.name, output, np.float32, count, labels.outputs)
            if not np.isfinite(output).all():
                raise ValueError(f"head '{labels.name}': a number that is not finite")
            if not isinstance(labels, Quantity) and ((output < -_ROUNDING) | (output > 1 + _ROUNDING)).any():
                raise ValueError(f"head '{labels.name}': a probability that is not between 0 and 1")


def _check_metrics(metrics: Any, label_space: LabelSpace) -> None:
    """Raise ValueError unless these are numbers by head and name, or None."""
    if metrics is not None and not (isinstance(metrics, dict) and set(metrics) <= set(label_space.names) and all(
            isinstance(of_head, dict) and all(isinstance(value, float) for value in of_head.values())
            for of_head in metrics.values())):
        raise ValueError('metrics that are not numbers of its heads')


def check_size(rows: int, label_space: LabelSpace, path: str | Path) -> None:
    """Raise UserError where the predictions of so many rows would take too much memory."""
    outputs = sum(label_space.sizes)
    if rows * outputs > _CELLS:
        raise UserError(
            f'{path}: predictions of {rows:,} rows x {outputs:,} classes, tags and numbers would take '
            f'{4 * rows * outputs / 1e9:.1f} GB, and {4 * _CELLS / 1e9:.1f} GB is the most; take a split of at most '
            f'{_CELLS // outputs:,} rows, or score it with validate, which keeps no predictions')


@torch.no_grad()
def predict_rows(
        model: MultiLabelModel,
        loader: Iterable[tuple[torch.Tensor, torch.Tensor]],
        rows: Rows,
        precision: Any,
        progress: Any,
        path: str | Path = 'the model',
) -> Predictions:
    """Run a model over all rows, in order, in one process.

    Args:
        model: In evaluation mode, on the device of the loader's batches.
        loader: Of `create_eval_loader`, over these rows.
        rows: The rows.
        precision: `training.trainer.Precision`.
        progress: Has `advance()`, called after each batch.
        path: The checkpoint, for messages.

    Raises:
        UserError: What the model says is not finite, or takes too much memory.
    """
    check_size(len(rows), model.label_space, path)
    features, outputs = [], {name: [] for name in model.named_heads}
    measured = {name: [] for name in model.without_probabilities}
    for images, _ in loader:
        with precision.autocast():
            pooled = model.backbone(precision.layout(images))
            made = model.forward_heads(pooled)
        features.append(pooled.float().cpu())
        for name, head in model.named_heads.items():
            outputs[name].append(head.probabilities(made[name]).cpu())
            if name in measured:
                measured[name].append(head.measure(made[name].float()).cpu())
        check_finite([features[-1], *(parts[-1] for parts in outputs.values())], path)
        progress.advance()
    return Predictions(
        model.label_space,
        np.array([rows.where(index) for index in range(len(rows))]),
        np.array([os.path.realpath(image) for image in rows.images]),
        rows.targets.numpy().astype(np.float32),
        {name: torch.cat(parts).numpy() for name, parts in outputs.items()},
        torch.cat(features).numpy(),
        own_metrics={
            name: _own_metrics(model.named_heads[name], model.label_space.of(rows.targets, name), torch.cat(parts))
            for name, parts in measured.items()},
    )


def _own_metrics(head: Head, target: torch.Tensor, measured: torch.Tensor) -> dict[str, float]:
    """The metrics of a head over its labelled rows; none where there is no such row."""
    known = head.labels.known(target)
    if not known.any():
        return {}
    made = head.metrics(target[known].reshape(-1, head.labels.width).numpy(), measured[known].numpy())
    return {name: float(made[name]) for name in head.metric_names}
