"""View recipes: what one augmented copy of an image goes through, PIL image -> uint8 tensor (3, H, W).

Conversion to float, normalisation and random erasing happen on the device for the whole batch (see `loaders`).
"""
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import MaybePILToTensor, RandomResizedCropAndInterpolation
from torchvision import transforms

View = Callable[[Image.Image], torch.Tensor]


def timm_view(size: tuple[int, int], rotation: float = 0.0, **augmentation: Any) -> View:
    """timm's training transform (`timm.data.create_transform`) for an image size (H, W).

    Args:
        rotation: Degrees, to either side, of a random rotation after crop and flip; the corners turn black.
        augmentation: Arguments of timm's.
    """
    place, color, convert = create_transform(
        size, is_training=True, use_prefetcher=True, separate=True, **augmentation)
    return transforms.Compose([place, *_rotations(rotation), color, convert])


def weak_view(size: tuple[int, int], hflip: float = 0.5, interpolation: str = 'random', vflip: float = 0.0) -> View:
    """The weak view of FixMatch (Sohn et al. 2020) for an image size (H, W): flip and a slight crop.

    They shift by up to an eighth of the image; a crop of at least 0.8 of the area moves by as much.
    """
    return transforms.Compose([
        RandomResizedCropAndInterpolation(size, scale=(0.8, 1.0), interpolation=interpolation),
        transforms.RandomHorizontalFlip(hflip),
        transforms.RandomVerticalFlip(vflip),
        MaybePILToTensor(),
    ])


def _rotations(degrees: float) -> list[Callable]:
    bilinear = transforms.InterpolationMode.BILINEAR
    return [transforms.RandomRotation(degrees, interpolation=bilinear)] if degrees else []


def simclr_view(
        size: tuple[int, int],
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
        vflip: float = 0.0,
        interpolation: str = 'random',
        rotation: float = 0.0,
        strength: float = 1.0,
) -> View:
    """SimCLR's recipe for an image size (H, W): crop, flip, color jitter, grayscale, blur.

    Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations", appendix A. The blur's
    kernel is a tenth of the image's height.

    Args:
        rotation: As in `timm_view`.
        strength: Strength of the color jitter; the paper's 1.0 suits ImageNet, 0.5 its CIFAR-10.
    """
    jitter = transforms.ColorJitter(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)
    kernel = 2 * (size[0] // 20) + 1
    return transforms.Compose([
        RandomResizedCropAndInterpolation(size, scale=scale, ratio=ratio, interpolation=interpolation),
        transforms.RandomHorizontalFlip(hflip),
        transforms.RandomVerticalFlip(vflip),
        *_rotations(rotation),
        transforms.RandomApply([jitter], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.RandomApply([transforms.GaussianBlur(kernel, sigma=(0.1, 2.0))], p=0.5),
        MaybePILToTensor(),
    ])


def eval_view(size: tuple[int, int], interpolation: str, crop_pct: float, crop_mode: str) -> View:
    """timm's evaluation transform for an image size (H, W): resize and crop, nothing random."""
    return create_transform(
        size,
        is_training=False,
        use_prefetcher=True,
        interpolation=interpolation,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
    )
