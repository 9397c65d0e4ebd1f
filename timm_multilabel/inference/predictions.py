"""What a model says of each row of a split, kept in a file, so that reports and comparisons need no second pass."""
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from timm_multilabel.arrays import check_array, read_arrays, write_arrays
from timm_multilabel.data.pool import real_paths
from timm_multilabel.data.table import Rows
from timm_multilabel.errors import CheckpointError
from timm_multilabel.files import reading
from timm_multilabel.heads import Head, has_own_metrics
from timm_multilabel.inference.loaded import Progress, check_finite
from timm_multilabel.labels import LabelSpace
from timm_multilabel.loading.batches import Batch
from timm_multilabel.metric_names import Metric, check_metric_names
from timm_multilabel.model import MultiLabelModel
from timm_multilabel.training.trainer import Precision

_ROUNDING = 1e-3
_CELLS = 2 ** 28  # numbers, of 4 bytes each, that the outputs of all rows are at most


@dataclass(frozen=True)
class OwnMetrics:
    """The metrics of a head of a kind that has its own ones, measured where the model was at hand.

    Args:
        metrics: What they are.
        values: By name over the rows that have a label; empty without such a row.
        of_rows: Those that are means over rows, by name: the values of the N rows, NaN where there is no label.
        has_probabilities: Whether the head has; else its outputs are 1 for the class it predicts.
    """
    metrics: tuple[Metric, ...]
    values: dict[str, float]
    of_rows: dict[str, np.ndarray]
    has_probabilities: bool

    @classmethod
    def of(cls, head: Head, target: torch.Tensor, measured: torch.Tensor) -> 'OwnMetrics':
        """Those of a head, from the labels of all rows and what it kept of them (N, K)."""
        known = head.labels.known(target)
        values: dict[str, float] = {}
        of_rows: dict[str, np.ndarray] = {}
        if known.any():
            labelled = target[known].reshape(-1, head.labels.width).numpy(), measured[known].numpy()
            found = head.metrics(*labelled)
            values = {name: float(found[name]) for name in head.metric_names}
            for name, those in head.row_metrics(*labelled).items():
                of_rows[name] = np.full(len(target), np.nan, dtype=np.float32)
                of_rows[name][known.numpy()] = those
        return cls(tuple(map(head.metric, head.metric_names)), values, of_rows, head.has_probabilities)

    def select(self, rows: np.ndarray, count: int) -> 'OwnMetrics':
        """Those of some of `count` rows, by number; a metric that is no mean over rows has no value then."""
        of_rows = {name: those[rows] for name, those in self.of_rows.items()}
        if len(rows) == count and len(np.unique(rows)) == count:  # the same rows in another order
            return replace(self, of_rows=of_rows)
        means = {name: float(np.nanmean(those, dtype=np.float64))
                 for name, those in of_rows.items() if not np.isnan(those).all()}
        return replace(self, values={**dict.fromkeys(self.values, np.nan), **means}, of_rows=of_rows)


@dataclass(frozen=True)
class Predictions:
    """Outputs of a model for the N rows of a split.

    Args:
        label_space: The heads that targets and outputs are of.
        rows: Each row as messages name it, such as "val.csv row 17" (N,).
        images: The image files, by their real paths (N,).
        targets: Labels, as `LabelSpace.split` takes them (N, W).
        outputs: By head what `Head.probabilities` gives: of classes (N, C), of tags (N, C), or a standardised number
            (N, 1); float32.
        features: Pooled features of the backbone (N, F), float32.
        made_from: What tells the checkpoint and the table that they were made from; who keeps them compares it.
        own_metrics: By head the metrics of those of kinds with their own ones. None where a file from before these
            were kept does not say.
    """
    label_space: LabelSpace
    rows: np.ndarray
    images: np.ndarray
    targets: np.ndarray
    outputs: dict[str, np.ndarray]
    features: np.ndarray
    made_from: tuple[str, str] = ('', '')
    own_metrics: dict[str, OwnMetrics] | None = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def target(self, head: str) -> np.ndarray:
        """The labels of a head: class indices (N,) or tags (N, C), -1 where missing, or numbers (N,), NaN where so."""
        return self.label_space.of(torch.from_numpy(self.targets), head).numpy()

    def select(self, rows: np.ndarray) -> 'Predictions':
        """Some rows, by number."""
        return replace(
            self, outputs={name: values[rows] for name, values in self.outputs.items()},
            own_metrics=self.own_metrics and {
                name: its.select(rows, len(self)) for name, its in self.own_metrics.items()},
            **{name: getattr(self, name)[rows] for name in ('rows', 'images', 'targets', 'features')})

    def save(self, path: str | Path) -> None:
        """Write them as an npz file.

        Raises:
            CheckpointError: They are not what `load` takes, or the file cannot be written.
        """
        try:
            self._check()
        except ValueError as error:
            raise CheckpointError(f'{path}: cannot be written, since predictions of this model cannot be kept ({error})'
                            ) from error
        arrays = {name: getattr(self, name) for name in ('rows', 'images', 'targets', 'features')}
        # By number, since a head may be called anything.
        arrays |= {f'output_{number}': self.outputs[name] for number, name in enumerate(self.label_space.names)}
        arrays['made_from'] = np.array(self.made_from)
        if self.own_metrics is not None:
            arrays |= _own_arrays(self.own_metrics, self.label_space)
        arrays['label_space'] = np.array(json.dumps(self.label_space.to_dict()))
        write_arrays(path, arrays, compress=True)

    @classmethod
    def load(cls, path: str | Path) -> 'Predictions':
        """Read what `save` wrote, without running anything that it contains.

        Raises:
            CheckpointError: The file is missing, damaged or something else.
        """
        with reading(path, 'stored predictions', 'remove it to have them made again'):
            stored = read_arrays(path)
            label_space = LabelSpace.from_dict(json.loads(str(stored['label_space'])))
            outputs = {name: stored[f'output_{number}'] for number, name in enumerate(label_space.names)}
            check_array('made_from', stored['made_from'], str, 2)
            own_metrics = _read_own_metrics(stored, label_space) if 'head_metrics' in stored else None
            checkpoint, table = stored['made_from'].tolist()
            found = cls(label_space, stored['rows'], stored['images'], stored['targets'], outputs, stored['features'],
                        (checkpoint, table), own_metrics)
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
            if labels.classes and ((output < -_ROUNDING) | (output > 1 + _ROUNDING)).any():
                raise ValueError(f"head '{labels.name}': a probability that is not between 0 and 1")


def _own_arrays(own_metrics: dict[str, OwnMetrics], label_space: LabelSpace) -> dict[str, np.ndarray]:
    """The arrays of a file that hold heads' own metrics: 'head_metrics', and those of the rows by the head's number."""
    arrays, described = {}, {}
    for name, own in own_metrics.items():
        described[name] = {
            'has_probabilities': own.has_probabilities, 'values': own.values, 'of_rows': list(own.of_rows),
            'metrics': [asdict(metric) for metric in own.metrics]}
        if own.of_rows:
            arrays[f'own_{label_space.names.index(name)}'] = np.stack(list(own.of_rows.values()), axis=1)
    return {**arrays, 'head_metrics': np.array(json.dumps(described))}


def _read_own_metrics(stored: dict[str, np.ndarray], label_space: LabelSpace) -> dict[str, OwnMetrics]:
    """What `_own_arrays` made; raises ValueError where it is none."""
    found = {}
    try:
        for name, its in json.loads(str(stored['head_metrics'])).items():
            number, metrics = label_space.names.index(name), tuple(Metric(**each) for each in its['metrics'])
            check_metric_names(name, [metric.name for metric in metrics])
            rows = stored[f'own_{number}'].T if its['of_rows'] else ()
            names, values = {metric.name for metric in metrics}, its['values']
            if not isinstance(its['has_probabilities'], bool) or not {*values, *its['of_rows']} <= names or not all(
                    isinstance(value, float) for value in values.values()):
                raise ValueError(f"values of head '{name}'")
            for each in rows:
                check_array(name, each, np.float32, len(stored['rows']))
            found[name] = OwnMetrics(metrics, values, dict(zip(its['of_rows'], rows, strict=True)),
                                     its['has_probabilities'])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError('metrics that are not numbers of its heads') from error
    return found


def check_size(rows: int, label_space: LabelSpace, path: str | Path) -> None:
    """Raise UserError where the predictions of so many rows would take too much memory."""
    outputs = sum(label_space.sizes)
    if rows * outputs > _CELLS:
        raise CheckpointError(
            f'{path}: predictions of {rows:,} rows x {outputs:,} classes, tags and numbers would take '
            f'{4 * rows * outputs / 1e9:.1f} GB, and {4 * _CELLS / 1e9:.1f} GB is the most; take a split of at most '
            f'{_CELLS // outputs:,} rows, or score it with validate, which keeps no predictions')


@torch.no_grad()
def predict_rows(
        model: MultiLabelModel,
        loader: Iterable[Batch],
        rows: Rows,
        precision: Precision,
        progress: Progress,
        path: str | Path = 'the model',
) -> Predictions:
    """Run a model over all rows, in order, in one process.

    Args:
        model: In evaluation mode, on the device of the loader's batches.
        loader: Of `create_eval_loader`, over these rows.
        rows: The rows of these batches.
        precision: The device of the model, and the precision of its computations.
        progress: Told of each batch.
        path: The checkpoint, for messages.

    Raises:
        CheckpointError: What the model says is not finite, or takes too much memory.
    """
    check_size(len(rows), model.label_space, path)
    features: list[torch.Tensor] = []
    outputs: dict[str, list[torch.Tensor]] = {name: [] for name in model.named_heads}
    measured: dict[str, list[torch.Tensor]] = {
        name: [] for name, head in model.named_heads.items() if has_own_metrics(head)}
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
        np.array(real_paths(rows.images)),
        rows.targets.numpy().astype(np.float32),
        {name: torch.cat(parts).numpy() for name, parts in outputs.items()},
        torch.cat(features).numpy(),
        own_metrics={
            name: OwnMetrics.of(model.named_heads[name], model.label_space.of(rows.targets, name), torch.cat(parts))
            for name, parts in measured.items()},
    )
