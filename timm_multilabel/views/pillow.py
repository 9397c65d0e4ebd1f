"""Views through Pillow and torchvision: timm's policies as they are, SimCLR's recipe to the letter, evaluation."""
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation, ResizeKeepRatio
from torch.utils.data import get_worker_info
from torchvision import transforms

from timm_multilabel.data.images import Photo
from timm_multilabel.views.opencv import crop_and_resize
from timm_multilabel.views.recipe import ViewRecipe
from timm_multilabel.views.told import Told

Transform = Callable[[Image.Image], Image.Image]

_LONGEST = 16  # times its shorter edge: what an image keeps of its longer one in evaluation by square models


class PillowViews:
    """The views of images by a transform each, PIL image -> PIL image, from one decode.

    Args:
        transforms: A transform for each view.
        size: (H, W) of what they give.
        random: They draw random numbers.
        told: What is told of each view; their draws are not known.
        plain: For each view whether it always has the colors of its image; those of any other view may be changed.
    """

    scales_key = 'whole'
    """What the reductions depend on that views could ask for."""

    def __init__(
            self,
            transforms: Sequence[Transform],
            size: tuple[int, int],
            random: bool = True,
            told: Told = Told(),  # noqa: B008 (frozen)
            plain: Sequence[bool] = (),
    ):
        if told.parameters:
            raise ValueError('what these views draw is not known')
        self.transforms, self.size, self.random, self.told = tuple(transforms), size, random, told
        self.plain_shares = [float(each) for each in plain]

    def __call__(self, photos: Sequence[Photo], seeds: Sequence[int], out: np.ndarray) -> torch.Tensor | None:
        """Write the views of N images into `out` (V, N, H, W, 3), uint8; what is told of them (V, N, 1), or None."""
        for n, (photo, seed) in enumerate(zip(photos, seeds, strict=True)):
            image = Image.fromarray(photo.decode())
            with seeded(seed) if self.random else nullcontext():
                for view, transform in enumerate(self.transforms):
                    out[view, n] = transform(image)
        return torch.tensor(self.plain_shares)[:, None, None].expand(-1, len(photos), 1) if self.told else None

    def useful_reductions(self, photo: Photo) -> Sequence[int]:
        """The reductions of a photo that some view of it could ask for."""
        return photo.reductions[:1]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the random generators that augmentations use, so that a view depends on its seed alone.

    In a loader's worker they are seeded for each image anyway; in the main process they also serve dropout and random
    erasing, so they get their state back.
    """
    in_main_process = get_worker_info() is None
    if in_main_process:
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        if in_main_process:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])


def timm_transform(size: tuple[int, int], rotation: float = 0.0, **augmentation: Any) -> Transform:
    """timm's training transform (`timm.data.create_transform`) for an image size (H, W).

    Args:
        rotation: Degrees, to either side, of a random rotation after crop and flip; the corners turn black.
        augmentation: Arguments of timm's.
    """
    place, color, _ = create_transform(size, is_training=True, use_prefetcher=True, separate=True, **augmentation)
    transform: Transform = transforms.Compose([place, *_rotations(rotation), color])
    return transform


def exact_transform(recipe: ViewRecipe) -> Transform:
    """A recipe of SimCLR by the operations that define it: every one in turn, rounded and clamped, hue by HSV."""
    kernel = 2 * recipe.blur_radius + 1
    transform: Transform = transforms.Compose([
        RandomResizedCropAndInterpolation(
            recipe.size, scale=recipe.scale, ratio=recipe.ratio, interpolation=recipe.interpolation),
        transforms.RandomHorizontalFlip(recipe.hflip),
        transforms.RandomVerticalFlip(recipe.vflip),
        *_rotations(recipe.rotation),
        transforms.RandomApply([transforms.ColorJitter(*recipe.jitter)], p=recipe.jitter_prob),
        transforms.RandomGrayscale(p=recipe.grayscale_prob),
        transforms.RandomApply([transforms.GaussianBlur(kernel, sigma=recipe.blur_sigma)], p=recipe.blur_prob),
    ])
    return transform


def _rotations(degrees: float) -> list[Transform]:
    bilinear = transforms.InterpolationMode.BILINEAR
    return [transforms.RandomRotation(degrees, interpolation=bilinear)] if degrees else []


def scoring_views(data_config: Mapping[str, Any]) -> PillowViews:
    """What resizes and crops images in evaluation, as timm's data config says."""
    height, width = data_config['input_size'][-2:]
    return eval_views(
        (height, width), data_config['interpolation'], data_config['crop_pct'], data_config['crop_mode'],
        data_config['mean'])


def eval_views(
        size: tuple[int, int],
        interpolation: str,
        crop_pct: float,
        crop_mode: str,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
) -> PillowViews:
    """timm's evaluation transform for an image size (H, W): resize and crop, nothing random.

    Bilinear and bicubic resizing is the one of the training views (`crop_and_resize`), which is Pillow's, only faster.

    Args:
        size: (H, W) of what it gives.
        interpolation: Of the resize.
        crop_pct: The share of the resized image, in height and width, that is kept of it.
        crop_mode: 'center' resizes the shorter edge and keeps the middle, 'squash' resizes each edge, and 'border'
            resizes the longer edge and puts borders around it.
        mean: Of each channel, for pixels of 0 to 1: the color of the borders.
    """
    steps = create_transform(
        size, is_training=False, use_prefetcher=True, interpolation=interpolation, crop_pct=crop_pct,
        crop_mode=crop_mode, mean=tuple(min(max(value, 0.0), 1.0) for value in mean)).transforms[:-1]
    longest = {
        'center': _LONGEST * max(size) / min(size),
        'squash': math.inf,
        'border': max(1, math.floor(min(size) / crop_pct)),  # so that a pixel is left of its shorter edge
    }[crop_mode]
    trim = [partial(_trim, longest)]
    return PillowViews([transforms.Compose([*trim, *(_quicker(step) for step in steps)])], size, random=False)


def _trim(longest: float, image: Image.Image) -> Image.Image:
    """The middle of a very long or very high image.

    A line of 1 x 65,535 pixels, whose shorter edge is resized to 224, would otherwise grow to 224 x 14,679,840; with
    borders around it, it would shrink to nothing.
    """
    short, long = sorted(image.size)
    if long <= longest * short:
        return image
    width, height = (min(edge, round(longest * short)) for edge in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _quicker(step: Transform) -> Transform:
    modes = {transforms.InterpolationMode.BILINEAR: False, transforms.InterpolationMode.BICUBIC: True}
    if isinstance(step, transforms.Resize | ResizeKeepRatio) and step.interpolation in modes:
        return _Resize(step, modes[step.interpolation])
    return step


class _Resize:
    """torchvision's or timm's resizing of PIL images, by `crop_and_resize`.

    Args:
        step: The transform that it is in place of; its size is (H, W), or the length of the shorter edge.
        bicubic: Not bilinear.
    """

    def __init__(self, step: transforms.Resize | ResizeKeepRatio, bicubic: bool):
        self.step, self.bicubic = step, bicubic

    def __call__(self, image: Image.Image) -> Image.Image:
        height, width, size = image.height, image.width, self.step.size
        shape: Sequence[int]
        if isinstance(self.step, ResizeKeepRatio):
            shape = self.step.get_params(image, size, self.step.longest)
        elif isinstance(size, int):
            short, long = min(height, width), max(height, width)
            edges = size, int(size * long / short)
            shape = edges if height <= width else edges[::-1]
        else:
            shape = size
        out = np.empty((*shape, 3), np.uint8)
        crop_and_resize(np.asarray(image), (0, 0, height, width), out, self.bicubic)
        return Image.fromarray(out)
