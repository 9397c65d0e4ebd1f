"""What every kind of head says of itself."""
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from timm_multilabel.deprecation import RenamedAttribute, take_earlier_names
from timm_multilabel.labels import Labels, LabelSet, Quantity, TagSet
from timm_multilabel.metric_names import Metric


class Head(nn.Module):
    """One kind of head. Subclasses take `(labels, in_features, *, options)`; the options are those of `--head`.

    An output is made of features (B, F) by `forward`. Targets come as `LabelSpace.split` gives them: class indices (B,)
    with -1 where a label is missing, tags (B, C) with -1, or standardised numbers (B,) with NaN.

    Args:
        labels: The head's labels, of the type `reads`.
    """

    kind = ''
    """Its name in `--head COLUMN:loss=NAME`."""
    reads: type[LabelSet] | type[TagSet] | type[Quantity] = LabelSet
    """The type of labels it learns: `LabelSet`, `TagSet` or `Quantity`."""
    metric_names: tuple[str, ...] = ()
    """The names of what `metrics` gives; the first ranks checkpoints: a percentage, higher is better."""
    lower_is_better: tuple[str, ...] = ()
    """The metrics that are better when they are lower."""
    metric_titles: Mapping[str, str] = {}
    """What reports call metrics that have no readable name."""
    metric_formats: Mapping[str, str] = {}
    """How their values are written, such as '.4g', or '.2f %' with a unit; '.2f' where nothing is said."""
    compared: tuple[str, ...] = ()
    """The metrics that comparisons of runs show; all of them where it is empty."""
    figures = RenamedAttribute('metric_names')
    decreasing = RenamedAttribute('lower_is_better')
    distribution = False
    """Whether it predicts a distribution, and so learns from unlabelled images: `entropy`, `marginal_entropy` and
    `pseudo_label_loss`."""
    is_logits = False
    """Whether outputs are logits (B, C), whose softmax (of tags: sigmoid) are the probabilities: pseudo-labels are
    aligned by adding to them."""
    inherits: tuple[str, ...] = ('drop', 'smoothing')
    """Options that, where they are not given, have the value of the flag of that name."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        take_earlier_names(cls)

    def __init__(self, labels: Labels):
        super().__init__()
        self.labels = labels
        self.remark = ''  # what is worth telling of its options before training

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The training loss: the sum over the labels that are there and their number, both scalars."""
        raise NotImplementedError

    def eval_loss(self, output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss that evaluation reports, without what is there for training only."""
        return self.loss(output, target)

    def predict(self, output: torch.Tensor) -> torch.Tensor:
        """Class indices (B,), probabilities of tags (B, C), or standardised numbers (B,)."""
        raise NotImplementedError

    def probabilities(self, output: torch.Tensor) -> torch.Tensor:
        """Probabilities of classes or tags (B, C), or standardised numbers (B, 1), float32.

        A kind of classes that does not override this has no probabilities: 1 marks the class that it predicts.
        """
        predicted = self.predict(output)
        if isinstance(self.labels, LabelSet):
            return F.one_hot(predicted, len(self.labels.classes)).float()
        return predicted.float().reshape(output.shape[0], -1)  # not len(), which export would take for a constant

    @property
    def has_probabilities(self) -> bool:
        """Whether `probabilities` are such; otherwise they only say what `predict` says."""
        if isinstance(self.labels, LabelSet):
            return type(self).probabilities is not Head.probabilities
        return isinstance(self.labels, TagSet)

    @property
    def gives(self) -> str:
        """What `probabilities` are, in words."""
        if not self.labels.classes:
            return 'numbers'
        return 'probabilities' if self.has_probabilities else '1 of the predicted class, 0 of others'

    def measure(self, output: torch.Tensor) -> torch.Tensor:
        """What evaluation keeps of each row (B, K), float32; the first columns are those of `predict`."""
        return self.predict(output).float().reshape(len(output), -1)

    def metrics(self, target: np.ndarray, measured: np.ndarray) -> dict[str, float]:
        """The metrics of all labelled rows: what `labels` encodes (N, W), and what `measure` kept (N, K).

        Beside them there may be 'tags': {tag: {metric: value}}.
        """
        raise NotImplementedError

    def row_metrics(self, target: np.ndarray, measured: np.ndarray) -> dict[str, np.ndarray]:
        """The metrics that are means over the rows, each with the values of the rows (N,).

        Differences between runs are of these metrics. They are found by asking `metrics` for each row alone, and for
        some sets of rows whether the mean is what it gives for them; a kind may know them without.
        """
        def of(rows: np.ndarray) -> dict[str, float]:
            return self.metrics(target[rows], measured[rows])

        everything = np.arange(len(target))
        sets = everything, everything[::2], np.random.default_rng(0).integers(len(target), size=len(target))
        try:
            with warnings.catch_warnings(), np.errstate(all='ignore'):
                warnings.simplefilter('ignore')  # of metrics that a single row does not allow
                alone = [of(rows) for rows in np.split(everything, len(target))]
                whole = [of(rows) for rows in sets]
            values = {name: np.array([each[name] for each in alone], dtype=float) for name in self.metric_names}
        except Exception:  # whatever the metrics of the user's kind do with a single row
            return {}
        return {name: of_rows for name, of_rows in values.items() if all(
            np.isclose(of_rows[rows].mean(), each[name], rtol=1e-5) for rows, each in zip(sets, whole))}

    @classmethod
    def metric(cls, name: str) -> Metric:
        """What there is to say of a metric."""
        return Metric(name, cls.metric_titles.get(name, name), name in cls.lower_is_better,
                      cls.metric_formats.get(name, Metric.form))

    def entropy(self, output: torch.Tensor) -> torch.Tensor:
        """Entropy of the prediction (B,)."""
        raise NotImplementedError

    def marginal_entropy(self, output: torch.Tensor) -> torch.Tensor:
        """Entropy of the mean prediction over all ranks, a scalar."""
        raise NotImplementedError

    def pseudo_label_loss(
            self,
            strong: torch.Tensor,
            weak: torch.Tensor,
            threshold: float | torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of losses against what the weak outputs say, and the number of rows that pass, both scalars.

        The threshold is a number or a scalar tensor. Rows of weak outputs that are NaN (views that a head with
        `views=plain` does not learn from) may not pass, nor add anything to the sum.
        """
        raise NotImplementedError

    @property
    def can_teach(self) -> bool:
        """Whether `answer` says more than which class it predicts."""
        return self.has_probabilities or not isinstance(self.labels, LabelSet)

    def answer(self, output: torch.Tensor) -> torch.Tensor:
        """What it teaches a head of the same labels: log-probabilities of classes (B, C), log-odds of tags (B, C), or
        standardised numbers (B, 1); float32 at least.
        """
        probabilities = self.probabilities(output)
        if isinstance(self.labels, LabelSet):
            return probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()
        return probabilities.logit(eps=1e-6) if isinstance(self.labels, TagSet) else probabilities

    @property
    def can_be_taught(self) -> bool:
        """Whether it learns from a teacher's answers: `teacher_loss`."""
        return type(self).teacher_loss is not Head.teacher_loss

    def teacher_loss(self, output: torch.Tensor, answer: torch.Tensor, temperature: float) -> torch.Tensor:
        """The loss (B,) of outputs against what `answer` of a teacher's head gave, at a temperature."""
        raise NotImplementedError

    @staticmethod
    def balance(target: torch.Tensor, labels: Labels) -> list[float]:
        """The class weights that `class_weights=balanced` means for the training targets, for a kind that has them."""
        raise ValueError('this kind has no balanced weights; give one for each class')


class LinearHead(Head):
    """Dropout and a linear layer with an output for each class or tag.

    Args:
        labels: The classes or tags.
        in_features: Width of the input.
        drop: Dropout rate before the layer.
        smoothing: Label smoothing.
        class_weights: A weight for each class, or for the ones of each tag, in their order.
    """
    class_weights: torch.Tensor | None

    def __init__(
            self,
            labels: LabelSet | TagSet,
            in_features: int,
            *,
            drop: float = 0.0,
            smoothing: float = 0.0,
            class_weights: list[float] | None = None,
    ):
        super().__init__(labels)
        check_fractions(drop=drop, smoothing=smoothing)
        self.smoothing = smoothing
        self.drop = nn.Dropout(drop)
        self.fc = nn.Linear(in_features, len(labels.classes))
        self.register_buffer('class_weights', class_weights_tensor(class_weights, labels), persistent=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (B, C) of features (B, F)."""
        logits: torch.Tensor = self.fc(self.drop(features))
        return logits


def check_fractions(**values: float) -> None:
    """Raise ValueError unless options are numbers from 0 to 1."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f'{name} is {value:g}, expected a number from 0 to 1')


def class_weights_tensor(weights: list[float] | None, labels: Labels) -> torch.Tensor | None:
    """Weights of an option (C,), checked."""
    if weights is None:
        return None
    tensor = torch.tensor(weights, dtype=torch.float32, device='cpu')  # also where a model is only measured, on meta
    if tensor.shape != (len(labels.classes),) or not (tensor.isfinite() & (tensor >= 0)).all():
        raise ValueError(f'class_weights are {weights}, expected a number of 0 or more for each class')
    return tensor
