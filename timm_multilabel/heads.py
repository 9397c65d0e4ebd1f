"""What a head is: its layer, its loss, its prediction, its figures. A new kind is a subclass of `Head`."""
import importlib.util
import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, f1_score
from torch import nn

from timm_multilabel.errors import UserError
from timm_multilabel.labels import MISSING, Labels, LabelSet, Quantity, TagSet
from timm_multilabel.losses import (
    arcface_logits,
    binary_cross_entropy,
    binary_entropy,
    binary_marginal_entropy,
    binary_pseudo_label_loss,
    categorical_entropy,
    dense_cross_entropy,
    index_cross_entropy,
    marginal_entropy,
    pseudo_label_loss,
    smooth_l1,
)


class Head(nn.Module):
    """One kind of head. Subclasses take `(labels, in_features, *, options)`; the options are those of `--head`.

    An output is made of features (B, F) by `forward`. Targets come as `LabelSpace.split` gives them: class indices (B,)
    with -1 where a label is missing, tags (B, C) with -1, or standardised numbers (B,) with NaN.

    Args:
        labels: The head's labels, of the type `reads`.
    """

    kind = ''
    """Its name in `--head COLUMN:loss=NAME`."""
    reads: type = LabelSet
    """The type of labels it learns: `LabelSet`, `TagSet` or `Quantity`."""
    figures: tuple[str, ...] = ()
    """The names of what `metrics` gives; the first ranks checkpoints: a percentage, higher is better."""
    inherits: tuple[str, ...] = ('drop', 'smoothing')
    """Options that, where they are not given, have the value of the flag of that name."""

    def __init__(self, labels: Labels):
        super().__init__()
        self.labels = labels

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The training loss: the sum over the labels that are there and their number, both scalars."""
        raise NotImplementedError

    def eval_loss(self, output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss that evaluation reports, without what is there for training only."""
        return self.loss(output, target)

    def predict(self, output: torch.Tensor) -> torch.Tensor:
        """Class indices (B,), probabilities of tags (B, C), or standardised numbers (B,)."""
        raise NotImplementedError

    def measure(self, output: torch.Tensor) -> torch.Tensor:
        """What evaluation keeps of each row (B, K), float32; the first columns are those of `predict`."""
        return self.predict(output).float().reshape(len(output), -1)

    def metrics(self, target: np.ndarray, measured: np.ndarray) -> dict[str, float]:
        """Figures of all labelled rows: what `labels` encodes (N, W), and what `measure` kept (N, K)."""
        raise NotImplementedError

    def entropy(self, output: torch.Tensor) -> torch.Tensor | None:
        """Entropy of the prediction (B,), or None where the head predicts no distribution."""
        return None

    def marginal_entropy(self, output: torch.Tensor) -> torch.Tensor | None:
        """Entropy of the mean prediction over all ranks, a scalar, or None."""
        return None

    def pseudo_label_loss(
            self,
            strong: torch.Tensor,
            weak: torch.Tensor,
            threshold: float,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The sum of losses against what the weak outputs say, and the number of rows that pass, or None."""
        return None

    @staticmethod
    def balance(target: torch.Tensor, labels: Labels) -> list[float]:
        """The class weights that `class_weights=balanced` means for the training targets."""
        raise NotImplementedError


class _ClassHead(Head):
    """What heads of one class an image share; outputs are logits (B, C) without a margin."""
    figures = ('top1', 'top5')

    def predict(self, output: torch.Tensor) -> torch.Tensor:
        return output.argmax(dim=1)

    def measure(self, output: torch.Tensor) -> torch.Tensor:
        """The five likeliest classes, the likeliest first."""
        return output.topk(min(5, output.shape[1]), dim=1).indices.float()

    def metrics(self, target: np.ndarray, measured: np.ndarray) -> dict[str, float]:
        hits = measured == target
        return {'top1': 100 * hits[:, 0].mean(), 'top5': 100 * hits.any(axis=1).mean()}

    def eval_loss(self, output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return index_cross_entropy(output, target)

    def entropy(self, output: torch.Tensor) -> torch.Tensor:
        return categorical_entropy(output)

    def marginal_entropy(self, output: torch.Tensor) -> torch.Tensor:
        return marginal_entropy(_wide(output).softmax(dim=1))

    def pseudo_label_loss(self, strong, weak, threshold):
        return pseudo_label_loss(strong, weak, threshold)

    @staticmethod
    def balance(target: torch.Tensor, labels: LabelSet) -> list[float]:
        """N / (C * rows of the class), as scikit-learn has it; 1 for a class without rows."""
        counts = torch.bincount(target[target != MISSING], minlength=len(labels.classes))
        weights = counts.sum() / (len(labels.classes) * counts.clamp(min=1))
        return torch.where(counts > 0, weights, 1.0).tolist()


class SoftmaxHead(_ClassHead):
    """One of several classes: a linear layer, trained with softmax cross-entropy.

    Args:
        labels: The classes.
        in_features: Width of the input.
        drop: Dropout rate before the layer.
        smoothing: Label smoothing.
        class_weights: A weight for each class, in their order.
    """
    kind = 'softmax'

    def __init__(
            self,
            labels: LabelSet,
            in_features: int,
            *,
            drop: float = 0.0,
            smoothing: float = 0.0,
            class_weights: list | None = None,
    ):
        super().__init__(labels)
        _check_fractions(drop=drop, smoothing=smoothing)
        self.smoothing = smoothing
        self.drop = nn.Dropout(drop)
        self.fc = nn.Linear(in_features, len(labels.classes))
        self.register_buffer('class_weights', _weights(class_weights, labels), persistent=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (B, C) of features (B, F)."""
        return self.fc(self.drop(features))

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy; `target` may also be mixed labels (B, C)."""
        loss = index_cross_entropy if target.ndim == 1 else dense_cross_entropy
        return loss(output, target, self.smoothing, self.class_weights)


class ArcFaceHead(_ClassHead):
    """One of several classes by the angle between features and class: ArcFace (Deng et al. 2019).

    Outputs are `scale * cosine`, without the margin, which only the training loss puts in.

    Args:
        labels: The classes.
        in_features: Width of the input.
        drop: Dropout rate before the layer.
        smoothing: Label smoothing, off by default: it asks for angles that the margin forbids, and cancels it.
        class_weights: A weight for each class, in their order.
        scale: Factor on cosines.
        margin: Angle, in radians, that a row must be nearer to its class.
    """
    kind = 'arcface'
    inherits = ('drop',)

    def __init__(
            self,
            labels: LabelSet,
            in_features: int,
            *,
            drop: float = 0.0,
            smoothing: float = 0.0,
            class_weights: list | None = None,
            scale: float = 30.0,
            margin: float = 0.5,
    ):
        super().__init__(labels)
        _check_fractions(drop=drop, smoothing=smoothing)
        if not scale > 0:
            raise ValueError(f'scale is {scale:g}, expected more than 0')
        if not 0 <= margin <= np.pi:
            raise ValueError(f'margin is {margin:g}, expected an angle from 0 to pi')
        if smoothing:
            warnings.warn(f"head '{labels.name}': label smoothing works against ArcFace's margin", stacklevel=2)
        self.smoothing, self.scale, self.margin = smoothing, scale, margin
        self.drop = nn.Dropout(drop)
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(len(labels.classes), in_features)))
        self.register_buffer('class_weights', _weights(class_weights, labels), persistent=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`scale * cosine` (B, C) of features (B, F), in float32 at least."""
        with torch.autocast(features.device.type, enabled=False):
            features = self.drop(features)
            features = _wide(features)
            weight = self.weight.to(features.dtype)
            return self.scale * (F.normalize(features, dim=1) @ F.normalize(weight, dim=1).T)

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.scale * arcface_logits(output / self.scale, target, self.margin)
        return index_cross_entropy(logits, target, self.smoothing, self.class_weights)


class TagsHead(Head):
    """Any number of tags: a linear layer, trained with binary cross-entropy.

    Args:
        labels: The tags.
        in_features: Width of the input.
        drop: Dropout rate before the layer.
        smoothing: Label smoothing.
        class_weights: A weight for the ones of each tag, in their order.
    """
    kind = 'tags'
    reads = TagSet
    figures = ('map', 'f1', 'micro_f1')

    def __init__(
            self,
            labels: TagSet,
            in_features: int,
            *,
            drop: float = 0.0,
            smoothing: float = 0.0,
            class_weights: list | None = None,
    ):
        super().__init__(labels)
        _check_fractions(drop=drop, smoothing=smoothing)
        self.smoothing = smoothing
        self.drop = nn.Dropout(drop)
        self.fc = nn.Linear(in_features, len(labels.classes))
        self.register_buffer('class_weights', _weights(class_weights, labels), persistent=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (B, C) of features (B, F)."""
        return self.fc(self.drop(features))

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return binary_cross_entropy(output, target, self.smoothing, self.class_weights)

    def eval_loss(self, output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return binary_cross_entropy(output, target)

    def predict(self, output: torch.Tensor) -> torch.Tensor:
        return output.float().sigmoid()

    def metrics(self, target: np.ndarray, measured: np.ndarray) -> dict[str, float]:
        """'map', the mean average precision of the tags that occur, and F1 at 0.5: their mean, and over all labels."""
        precisions, f1s = [], []
        for tag in range(target.shape[1]):
            known = target[:, tag] != MISSING
            true, probability = target[known, tag], measured[known, tag]
            if true.any():
                precisions.append(average_precision_score(true, probability))
                f1s.append(f1_score(true, probability >= 0.5, zero_division=0))
        known = target != MISSING
        micro = f1_score(target[known], measured[known] >= 0.5, zero_division=0)
        mean = np.mean if precisions else (lambda values: np.nan)
        return {'map': 100 * mean(precisions), 'f1': 100 * mean(f1s), 'micro_f1': 100 * micro}

    def entropy(self, output: torch.Tensor) -> torch.Tensor:
        return binary_entropy(output)

    def marginal_entropy(self, output: torch.Tensor) -> torch.Tensor:
        return binary_marginal_entropy(_wide(output).sigmoid())

    def pseudo_label_loss(self, strong, weak, threshold):
        return binary_pseudo_label_loss(strong, weak, threshold)

    @staticmethod
    def balance(target: torch.Tensor, labels: TagSet) -> list[float]:
        """Zeros for each one of a tag; 1 for a tag without either."""
        zeros, ones = (target == 0).sum(dim=0), (target == 1).sum(dim=0)
        return torch.where((zeros > 0) & (ones > 0), zeros / ones.clamp(min=1), 1.0).tolist()


class NumericHead(Head):
    """A number: a linear layer on standardised values, trained with smooth L1.

    Args:
        labels: Mean and standard deviation.
        in_features: Width of the input.
        drop: Dropout rate before the layer.
    """
    kind = 'numeric'
    reads = Quantity
    figures = ('r2', 'mae')

    def __init__(self, labels: Quantity, in_features: int, *, drop: float = 0.0):
        super().__init__(labels)
        _check_fractions(drop=drop)
        self.drop = nn.Dropout(drop)
        self.fc = nn.Linear(in_features, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Standardised predictions (B,) of features (B, F)."""
        return self.fc(self.drop(features))[:, 0]

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return smooth_l1(output, target)

    def predict(self, output: torch.Tensor) -> torch.Tensor:
        return output

    def metrics(self, target: np.ndarray, measured: np.ndarray) -> dict[str, float]:
        """'mae', the mean absolute error in the column's unit, and 'r2', the explained variance in percent."""
        error = (measured[:, 0] - target[:, 0]).astype(np.float64)
        variance = target[:, 0].astype(np.float64).var()
        r2 = 100 * (1 - np.square(error).mean() / variance) if variance else np.nan
        return {'mae': self.labels.std * np.abs(error).mean(), 'r2': r2}


KINDS: Mapping[str, type[Head]] = {kind.kind: kind for kind in (SoftmaxHead, ArcFaceHead, TagsHead, NumericHead)}
"""The kinds of heads by name."""

COMMON_OPTIONS = ('loss', 'weight', 'input', 'columns')
"""Options of every head: its kind, its weight, 'features' or 'projection', the 0/1 columns of a group of tags."""


def load_kinds(path: str | None) -> dict[str, type[Head]]:
    """The kinds of heads: ours and, of a Python file of the user's, every subclass of `Head` in it that has a `kind`.

    Raises:
        UserError: The file is missing, fails, or has no such class.
    """
    if path is None:
        return dict(KINDS)
    if not Path(path).is_file():
        raise UserError(f'--head-module {path}: no such file')
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file does
        raise UserError(f'--head-module {path}: it fails with {type(error).__name__}: {error}') from error
    found = {
        value.kind: value for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Head) and value.kind and value.__module__ == module.__name__}
    if not found:
        raise UserError(f"--head-module {path}: has no subclass of timm_multilabel.heads.Head with a 'kind'")
    for name in found.keys() & KINDS.keys():
        raise UserError(f"--head-module {path}: '{name}' is a kind of ours; give yours another name")
    return {**KINDS, **found}


def options_of(kind: type[Head]) -> dict[str, inspect.Parameter]:
    """The options that a kind has, beside those that every head has."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    return {each.name: each for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}


def create_head(
        labels: Labels,
        in_features: int,
        options: Mapping[str, Any],
        defaults: Mapping[str, Any],
        kinds: Mapping[str, type[Head]],
) -> Head:
    """Make a head of its options.

    Args:
        labels: Its labels.
        in_features: Width of its input.
        options: 'loss', the kind, by default that of the labels; options of the kind; the other `COMMON_OPTIONS` are
            passed over.
        defaults: Values of the flags that a kind may inherit.
        kinds: The kinds by name.

    Raises:
        ValueError: There is no such kind, it reads other labels, or it does not take an option or a value.
    """
    name = options.get('loss', default_kind(labels))
    if name not in kinds:
        raise ValueError(f"there is no loss '{name}' (there are: {', '.join(kinds)}); --head-module brings your own")
    kind = kinds[name]
    if not isinstance(labels, kind.reads):
        raise ValueError(f"'{name}' reads {kind.reads.kind}, and the head has {labels.kind}")
    known = options_of(kind)
    given = {key: value for key, value in options.items() if key not in COMMON_OPTIONS}
    for key in given:
        if key not in known:
            raise ValueError(f"'{name}' has no option '{key}' (there are: {', '.join([*COMMON_OPTIONS, *known])})")
    inherited = {key: value for key, value in defaults.items() if key in kind.inherits and key in known}
    return kind(labels, in_features, **{**inherited, **given})


def default_kind(labels: Labels) -> str:
    """The kind of head that labels have where none is named."""
    return {LabelSet: SoftmaxHead, TagSet: TagsHead, Quantity: NumericHead}[type(labels)].kind


def _wide(logits: torch.Tensor) -> torch.Tensor:
    """In float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _check_fractions(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f'{name} is {value:g}, expected a number from 0 to 1')


def _weights(weights: list | None, labels: Labels) -> torch.Tensor | None:
    if weights is None:
        return None
    tensor = torch.tensor(weights, dtype=torch.float32)
    if tensor.shape != (len(labels.classes),) or not (tensor.isfinite() & (tensor >= 0)).all():
        raise ValueError(f'class_weights are {weights}, expected a number of 0 or more for each class')
    return tensor
