"""How far a head's probabilities can be taken at their word."""
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from timm_multilabel.labels import MISSING, Labels, LabelSet, TagSet
from timm_multilabel.reports.bootstrap import wilson

BINS = 15


@dataclass(frozen=True)
class Reliability:
    """Probabilities in bins of one width, and what came true.

    Args:
        count: Probabilities in each bin (B,).
        confidence: Their mean (B,), NaN in an empty bin.
        accuracy: The share that came true (B,), NaN in an empty bin.
        ece: The expected calibration error, a fraction.
    """
    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    ece: float

    @property
    def said(self) -> float:
        """The mean of all probabilities."""
        return float(np.nansum(self.count * self.confidence) / self.count.sum())

    @property
    def true(self) -> float:
        """The share of all that came true."""
        return float(self.hits.sum() / self.count.sum())

    @property
    def hits(self) -> np.ndarray:
        """How many of each bin came true (B,)."""
        hits: np.ndarray = np.rint(np.nan_to_num(self.count * self.accuracy)).astype(int)
        return hits

    def intervals(self) -> np.ndarray:
        """Wilson's 95 % interval of the share of each bin (B, 2), NaN of an empty one."""
        return np.array([wilson(*each) for each in zip(self.hits.tolist(), self.count.tolist())])

    def verdict(self) -> str:
        """Whether the probabilities are too high or too low, as far as so many images can tell."""
        low, high = wilson(int(self.hits.sum()), int(self.count.sum()))
        if not low <= self.said <= high:
            return f'on the whole, its probabilities are too {"high" if self.said > high else "low"}'
        # Errors that cancel: the least p of the bins, by Bonferroni.
        tests = [binomtest(hits, count, min(1.0, float(said))).pvalue for hits, count, said in zip(
            self.hits.tolist(), self.count.tolist(), self.confidence) if count]
        if min(tests) * len(tests) < 0.05:
            return 'on average, its probabilities are right, but some are too high and others too low'
        return 'on the whole, its probabilities can be taken at their word'


def reliability(probability: np.ndarray, came_true: np.ndarray, bins: int = BINS) -> Reliability:
    """Sort probabilities (N,) and what came true (N,) into bins ((b - 1) / B, b / B]; the first one holds 0 as well.

    ECE = sum over bins of n_b / N * |accuracy_b - confidence_b| (Naeini et al. 2015; Guo et al. 2017, equation 3).

    Raises:
        ValueError: There are none.
    """
    if not len(probability):
        raise ValueError('no probabilities')
    probability = probability.astype(np.float64)
    # As edges, so that a probability that is one of them falls below it whatever multiplying rounds.
    bin_of = np.searchsorted(np.arange(1, bins) / bins, probability, side='left')
    count = np.bincount(bin_of, minlength=bins)
    with np.errstate(invalid='ignore'):
        confidence = np.bincount(bin_of, probability, bins) / count
        accuracy = np.bincount(bin_of, came_true, bins) / count
    gap = np.nan_to_num(np.abs(accuracy - confidence))
    return Reliability(count, confidence, accuracy, float((count * gap).sum() / count.sum()))


def head_reliability(labels: Labels, target: np.ndarray, output: np.ndarray) -> Reliability | None:
    """Of a head with classes the probability of the predicted class; of tags those of all tags; None of a number.

    Args:
        labels: The head's labels.
        target: As `Predictions.target` gives it, of labelled rows only.
        output: Probabilities (N, C).
    """
    if isinstance(labels, LabelSet):
        predicted = output.argmax(axis=1)
        probability, came_true = output.max(axis=1), predicted == target
    elif isinstance(labels, TagSet):
        known = target != MISSING
        probability, came_true = output[known], target[known] == 1
    else:
        return None
    return reliability(probability, came_true) if len(probability) else None
