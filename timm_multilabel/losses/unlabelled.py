"""What a head can learn from images without labels: to be sure, to be even.

All take logits without a margin and compute in float32 at least.
"""
import torch
import torch.nn.functional as F

from timm_multilabel.distributed import gather
from timm_multilabel.losses.precision import float32


def categorical_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy in nats (B,) of the softmax of logits (B, C).

    Entropy minimisation: Grandvalet & Bengio 2004, "Semi-supervised Learning by Entropy Minimization".

    As a loss it collapses easily: giving every image the same class has an entropy of 0 too. It happens when the weight
    is large while the predictions still mean little, or when few labels hold against many unlabelled images. Let the
    weight ramp up, so that labels come first, and reward the entropy of the mean prediction (`marginal_entropy`), which
    is 0 for the collapsed one; and watch whether the loss falls while the validation accuracy does too.
    """
    log_probabilities = float32(logits).log_softmax(dim=1)
    return -(log_probabilities.exp() * log_probabilities).sum(dim=1)


def binary_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Mean entropy in nats over tags (B,) of the sigmoids of logits (B, C); see `categorical_entropy`."""
    logits = float32(logits)
    p = logits.sigmoid()
    return (p * F.softplus(-logits) + (1 - p) * F.softplus(logits)).mean(dim=1)


def marginal_entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Entropy in nats, a scalar, of the mean over all rows of all ranks of probabilities (B, C), each row summing to 1.

    Krause et al. 2010, "Discriminative Clustering by Regularized Information Maximization". Differentiable; every rank
    has the same value, and DDP's average of the ranks' gradients is that of one process. Ranks must have the same B.
    """
    return _entropy(_mean_over_ranks(probabilities))


def binary_marginal_entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """The mean over tags of the entropy of each one's mean probability; probabilities are (B, C), see above."""
    mean = _mean_over_ranks(probabilities)
    return _entropy(torch.stack([mean, 1 - mean])) / len(mean)


def _mean_over_ranks(rows: torch.Tensor) -> torch.Tensor:
    return gather(rows.mean(dim=0, keepdim=True)).mean(dim=0)


def _entropy(p: torch.Tensor) -> torch.Tensor:
    information: torch.Tensor = torch.special.xlogy(p, p.clamp(min=torch.finfo(p.dtype).tiny))
    return -information.sum()
