"""What a head learns from teachers: their soft labels at a temperature T (Hinton et al. 2015, arXiv 1503.02531).

An answer is what a teacher says in the form that a temperature divides: log-probabilities of classes (B, C), log-odds
of tags (B, C). The loss is T^2 * KL(teacher || student), so that its gradient has the same size at any T.

All compute in float32 at least.
"""
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from timm_multilabel.losses.precision import float32


def mean_of_classes(answers: Sequence[torch.Tensor]) -> torch.Tensor:
    """The logarithm (B, C) of the mean of several teachers' probabilities, from their logarithms (B, C)."""
    return torch.stack([*answers]).logsumexp(dim=0) - math.log(len(answers))


def mean_of_tags(answers: Sequence[torch.Tensor]) -> torch.Tensor:
    """The log-odds (B, C) of the mean of several teachers' probabilities, from their log-odds (B, C).

    NaN is a tag that a teacher does not know: it is in no mean, and NaN where no teacher knows it.
    """
    odds = torch.stack([*answers])
    yes, no = (F.logsigmoid(each).nan_to_num(nan=-math.inf).logsumexp(dim=0) for each in (odds, -odds))
    return yes - no


def distillation_loss(logits: torch.Tensor, answer: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 * KL (B,) between the softmaxes of `answer / T` and of `logits / T`.

    Args:
        logits: Of the student (B, C), or (B, H, C) of H heads, for losses (B, H).
        answer: Log-probabilities of the teacher, likewise; -inf is a class that it never names, and where `logits` are
            -inf too, one that there is not.
        temperature: T.
    """
    log_probabilities = (float32(logits) / temperature).log_softmax(dim=-1)
    taught = (answer.to(log_probabilities.dtype) / temperature).softmax(dim=-1)
    # A probability of 0 adds nothing, whatever it is multiplied with.
    losses = F.kl_div(log_probabilities.masked_fill(taught == 0, 0), taught, reduction='none')
    return temperature ** 2 * losses.sum(dim=-1)


def binary_distillation_loss(logits: torch.Tensor, answer: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 * KL (B,), the mean over the tags that the teacher knows, between the sigmoids of both divided by T.

    Args:
        logits: Of the student (B, C).
        answer: Log-odds of the teacher (B, C); NaN is a tag that it does not know.
        temperature: T.
    """
    logits, known = float32(logits) / temperature, ~answer.isnan()
    odds = answer.nan_to_num().to(logits.dtype) / temperature
    taught = odds.sigmoid()
    entropy = taught * F.softplus(-odds) + (1 - taught) * F.softplus(odds)
    losses = F.binary_cross_entropy_with_logits(logits, taught, reduction='none') - entropy
    return temperature ** 2 * (losses * known).sum(dim=1) / known.sum(dim=1).clamp(min=1)


def feature_loss(features: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
    """1 minus the cosine (B,) between features of the student and those of a teacher, both (B, F).

    The cosine, since features of different models differ in size by orders of magnitude.
    """
    features = float32(features)
    return 1 - F.cosine_similarity(features, taught.to(features.dtype), dim=1)
