"""Whether an exported model says what its checkpoint says."""
from collections.abc import Callable

import torch

from timm_multilabel.exports.exportable import Exportable, readable
from timm_multilabel.inference import loaded as finite
from timm_multilabel.labels import Quantity
from timm_multilabel.model import MultiLabelModel

TOLERANCE = 1e-4
"""The largest difference: of probabilities as it is, of numbers in standard deviations of their column, of features as
a part of the largest one."""

Run = Callable[[torch.Tensor], list[torch.Tensor]]
"""A loaded model: images (B, 3, H, W) -> its outputs in the order of the heads, or its features alone."""


@torch.no_grad()
def expected_outputs(model: MultiLabelModel, images: torch.Tensor) -> list[tuple[torch.Tensor, float]]:
    """What each head says of images, and what a difference is divided by."""
    outputs = model(images)
    expected = []
    for name, head in model.named_heads.items():
        scale = 1.0
        if isinstance(head.labels, Quantity):
            # float32 rounds a number far from zero by some 1e-7 of it.
            scale = max(head.labels.std, abs(head.labels.mean) / 100)
        expected.append((readable(head, outputs[name]), scale))
    return expected


@torch.no_grad()
def expected_features(model: MultiLabelModel, images: torch.Tensor) -> list[tuple[torch.Tensor, float]]:
    """The features of images, and what a difference is divided by."""
    features = model.backbone(images)
    return [(features, float(features.abs().max()) or 1.0)]


def check_finite(exportable: Exportable) -> None:
    """Raise UserError where a model gives no numbers, to which nothing could be compared."""
    model, images = exportable.model, exportable.images
    values = [*expected_features(model, images), *expected_outputs(model, images)]
    finite.check_finite([value for value, _ in values], exportable.checkpoint.path)


@torch.no_grad()
def largest_difference(run: Run, exportable: Exportable, of_heads: bool) -> float:
    """The largest difference to the checkpoint's model, for one image and for all, in what `TOLERANCE` is in.

    Args:
        run: The loaded model.
        exportable: What it was made of.
        of_heads: It gives the outputs of heads, not features.

    Raises:
        ValueError: It gives something of another kind.
    """
    expect = expected_outputs if of_heads else expected_features
    largest = 0.0
    for images in (exportable.images[:1], exportable.images):
        made = run(images)
        for values, (expected, scale) in zip(made, expect(exportable.model, images), strict=True):
            if values.shape != expected.shape:
                raise ValueError(f'its output has the shape {tuple(values.shape)}, expected {tuple(expected.shape)}')
            difference = float((values.double() - expected.double()).abs().max()) / scale
            largest = max(largest, difference) if difference == difference else float('inf')  # NaN
            if largest == float('inf'):
                return largest
    return largest
