"""ArcFace's angular margin."""
import math

import torch

from timm_multilabel.labels import MISSING

_LEAST_SQUARED_SINE = 1e-7  # keeps the sine's gradient finite, and its square positive where a cosine exceeds 1


def arcface_logits(cosine: torch.Tensor, target: torch.Tensor, margin: float) -> torch.Tensor:
    """Put an angular margin between each row and its class: cos(theta) -> cos(theta + margin) at the row's label.

    Deng et al. 2019, "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", eq. 3, before the scale. Where
    theta + margin would pass pi, and cos would rise again, the usual fallback cos(theta) - margin * sin(margin) keeps
    the logit falling with theta.

    The sine is clamped from below, at 3e-4: at a cosine of 1 (and beyond, by rounding) the derivative, which is
    infinite by the formula, is cos(margin), and at -1 it is the fallback's, 1.

    Args:
        cosine: Cosines (B, C) of rows and classes, in float32 or float64.
        target: Class indices (B,), MISSING for rows that are left as they are.
        margin: In radians, from 0 to pi.

    Returns:
        Cosines (B, C) with the margin.
    """
    of_label = cosine.gather(1, target.clamp(min=0)[:, None])
    sine = (1 - of_label.square()).clamp(min=_LEAST_SQUARED_SINE).sqrt()
    turned = of_label * math.cos(margin) - sine * math.sin(margin)
    beyond = of_label < -math.cos(margin)  # theta > pi - margin
    moved = torch.where(beyond, of_label - margin * math.sin(margin), turned)
    moved = torch.where(target[:, None] == MISSING, of_label, moved)
    return cosine.scatter(1, target.clamp(min=0)[:, None], moved)
