"""SimCLR's recipe of a view: what is random of it, drawn for many views at once, whoever makes them then.

A draw is a function of a view's seed alone (a counter-based generator), the same on every device, whatever the batch,
the worker or the order. `opencv.py` and `device.py` turn draws into pixels.
"""
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from timm_multilabel.data.images import Photo

GRAY = (0.299, 0.587, 0.114)  # the luma of ITU-R 601-2, as in Pillow and torchvision
NEUTRAL = (1.0, 1.0, 1.0, 0.0)  # brightness, contrast, saturation, hue that change nothing
_TRIES = 10  # of a random crop, as in torchvision


@dataclass(frozen=True)
class ViewRecipe:
    """SimCLR's augmentation (Chen et al. 2020, arXiv:2002.05709, appendix A), in torchvision's terms.

    Args:
        size: Height and width of the views.
        scale: Share of the image's area that a crop has, least and most.
        ratio: Width / height of a crop, least and most.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        rotation: Degrees, to either side, of a random rotation after crop and flip; the corners turn black.
        interpolation: Of the crop: bilinear, bicubic, or random, one of them for each view. Always antialiased.
        jitter: Strength of brightness, contrast, saturation (factors of 1 - x to 1 + x) and hue (turns of -x to x).
            SimCLR's are 0.8, 0.8, 0.8, 0.2 for ImageNet and half of that for CIFAR-10.
        jitter_prob: Probability of color jitter.
        grayscale_prob: Probability of greyscale.
        blur_prob: Probability of blur.
        blur_sigma: Its standard deviation in pixels of the view, least and most.
    """
    size: tuple[int, int]
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    rotation: float = 0.0
    interpolation: str = 'bilinear'
    jitter: tuple[float, float, float, float] = (0.8, 0.8, 0.8, 0.2)
    jitter_prob: float = 0.8
    grayscale_prob: float = 0.2
    blur_prob: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)

    @property
    def blur_radius(self) -> int:
        """Most pixels that the blur reaches to either side: its kernel is a tenth of the view's height."""
        return self.size[0] // 20

    @property
    def plain_share(self) -> float:
        """The share of the views that keep the colors of their image: those without jitter and greyscale."""
        return (1 - (self.jitter_prob if any(self.jitter) else 0.0)) * (1 - self.grayscale_prob)


def weak_recipe(size: tuple[int, int], **flips_and_interpolation: Any) -> ViewRecipe:
    """The weak view of FixMatch (Sohn et al. 2020) for an image size (H, W): flip and a slight crop.

    They shift by up to an eighth of the image; a crop of at least 0.8 of the area moves by as much.
    """
    return ViewRecipe(
        size, scale=(0.8, 1.0), jitter_prob=0.0, grayscale_prob=0.0, blur_prob=0.0, **flips_and_interpolation)


class Draws(NamedTuple):
    """What is random of N views.

    Args:
        box: Crops (N, 4): top, left, height, width, in pixels of the whole image.
        hflip: (N,) bool.
        vflip: (N,) bool.
        angle: Degrees, counterclockwise (N,).
        bicubic: (N,) bool, else bilinear.
        factors: (N, 4): brightness, contrast, saturation, and hue in turns.
        order: (N, 4): the order in which they come, as indices into `factors`.
        gray: (N,) bool.
        sigma: Standard deviation of the blur in pixels of the view (N,); 0 where there is none.
    """
    box: torch.Tensor
    hflip: torch.Tensor
    vflip: torch.Tensor
    angle: torch.Tensor
    bicubic: torch.Tensor
    factors: torch.Tensor
    order: torch.Tensor
    gray: torch.Tensor
    sigma: torch.Tensor


def uniforms(seeds: torch.Tensor, count: int) -> torch.Tensor:
    """Random numbers of [0, 1) by seed: (N,) int64 -> (N, count) float32.

    SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators") as a counter-based generator:
    number k of a seed is the mixed seed + k * gamma, whose upper 24 bits become a float32.
    """
    counters = mix(seeds)[:, None] + torch.arange(1, count + 1, device=seeds.device) * _signed(0x9E3779B97F4A7C15)
    return (_shift(mix(counters), 40)).to(torch.float32) * 2.0 ** -24


def mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's mixing of int64 numbers, as if they were unsigned."""
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """A shift to the right that fills up with zeros, as of unsigned numbers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def view_seeds(seeds: torch.Tensor, view: int) -> torch.Tensor:
    """The seeds (N,) of a view, of the seeds (N,) of the images."""
    return seeds * 16 + view


def draw(recipe: ViewRecipe, seeds: torch.Tensor, height: torch.Tensor, width: torch.Tensor) -> Draws:
    """Draw what is random of N views.

    Args:
        recipe: Their recipe.
        seeds: Their seeds (N,), int64.
        height: Heights of their images in pixels (N,).
        width: Widths (N,).
    """
    random = uniforms(seeds, 2 * _TRIES + 18)
    box = _draw_box(recipe, random[:, :2 * _TRIES + 2], height, width)
    (interpolation, hflip, vflip, angle, jitter, *strengths, gray, blur, sigma) = random[:, 2 * _TRIES + 2:-4].unbind(1)
    # Numbers, not tensors of them: those would have to be copied to the device, and the host would wait.
    factors = torch.stack([
        (neutral + extent * (2 * strength - 1)).where(jitter < recipe.jitter_prob, neutral)
        for neutral, extent, strength in zip(NEUTRAL, recipe.jitter, strengths, strict=True)], dim=1)
    factors[:, :3].clamp_(min=0)
    low, high = recipe.blur_sigma
    return Draws(
        box=box,
        hflip=hflip < recipe.hflip,
        vflip=vflip < recipe.vflip,
        angle=recipe.rotation * (2 * angle - 1),
        bicubic=interpolation < {'bilinear': 0.0, 'random': 0.5, 'bicubic': 1.0}[recipe.interpolation],
        factors=factors,
        order=random[:, -4:].argsort(dim=1),
        gray=gray < recipe.grayscale_prob,
        sigma=(low + (high - low) * sigma).where(blur < recipe.blur_prob, 0.0),
    )


def _draw_box(recipe: ViewRecipe, random: torch.Tensor, height: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
    """Crops (N, 4) as torchvision's RandomResizedCrop draws them: the first of ten tries that fits, else the center."""
    area = (height * width)[:, None] * _between(random[:, :_TRIES], *recipe.scale)
    ratio = _between(random[:, _TRIES:2 * _TRIES], *map(math.log, recipe.ratio)).exp()
    tried = torch.stack([(area / ratio).sqrt().round().long(), (area * ratio).sqrt().round().long()], dim=2)
    fits = (tried > 0).all(dim=2) & (tried[:, :, 0] <= height[:, None]) & (tried[:, :, 1] <= width[:, None])
    first = fits.to(torch.uint8).argmax(dim=1)
    found = tried.gather(1, first[:, None, None].expand(-1, 1, 2))[:, 0]
    h, w = found.where(fits.any(dim=1, keepdim=True), _fallback(recipe, height, width)).unbind(1)
    down, right = random[:, 2 * _TRIES], random[:, 2 * _TRIES + 1]
    top, left = (down * (height - h + 1)).long(), (right * (width - w + 1)).long()
    center = ~fits.any(dim=1)
    top, left = ((height - h) // 2).where(center, top), ((width - w) // 2).where(center, left)
    return torch.stack([top, left, h, w], dim=1)


def _fallback(recipe: ViewRecipe, height: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
    """Height and width (N, 2) of the center crop where no random one fits: all of the image that the ratio allows."""
    low, high = recipe.ratio
    h = torch.minimum(height, (width / low).round().long()).clamp(min=1)
    w = torch.minimum(width, (height * high).round().long()).clamp(min=1)
    return torch.stack([h, w], dim=1)


def _between(random: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return low + (high - low) * random


def find_reduction(ratio: float, reductions: Sequence[int]) -> int:
    """The largest reduction at which a crop has as many pixels as the view, else the least that there is.

    Args:
        ratio: Pixels of the crop at full scale by pixels of the view, in the direction where that is less.
        reductions: Those that there are, in ascending order.
    """
    return max((each for each in reductions if each <= ratio), default=reductions[0])


def useful_reductions(recipes: Sequence[ViewRecipe], photo: Photo) -> list[int]:
    """Those of a photo's reductions that any crop of it could ask for (see `find_reduction`).

    Args:
        recipes: The recipes of its views.
        photo: The photo.
    """
    height, width = photo.height, photo.width
    most = max(min(height / recipe.size[0], width / recipe.size[1]) for recipe in recipes)
    if find_reduction(most, photo.reductions) == photo.reductions[0]:
        return [photo.reductions[0]]
    least = math.inf
    for recipe in recipes:
        h, w = _fallback(recipe, torch.tensor([height]), torch.tensor([width]))[0].tolist()
        area = recipe.scale[0] * height * width
        h, w = min(h, math.sqrt(area / recipe.ratio[1]) - 1), min(w, math.sqrt(area * recipe.ratio[0]) - 1)
        least = min(least, h / recipe.size[0], w / recipe.size[1])
    low, high = (find_reduction(ratio, photo.reductions) for ratio in (least, most))
    return [each for each in photo.reductions if low <= each <= high]


def color_matrices(draws: Draws, mean: torch.Tensor) -> torch.Tensor:
    """Jitter and greyscale of N views as matrices (N, 3, 4), to be applied to (red, green, blue, 1) of 0 to 255.

    Brightness, contrast, saturation and greyscale are affine in the color. Hue, which is not, is a rotation about the
    grey axis here. Where torchvision clamps after each operation, only the result is to be clamped.

    Args:
        draws: Of the views.
        mean: Mean color of each view before (N, 3), which contrast goes by.
    """
    brightness, contrast, saturation, hue = draws.factors.unbind(1)
    keep = torch.stack([brightness, contrast, saturation, torch.ones_like(hue)], dim=1)
    eye = torch.eye(3, device=mean.device)
    linear = keep[:, :, None, None] * eye  # (N, 4, 3, 3), by operation
    for color, share in enumerate(GRAY):
        linear[:, 2, :, color] += share * (1 - saturation)[:, None]
    linear[:, 3] = _hue_rotations(hue, eye)
    matrix = F.pad(eye, (0, 1)).repeat(len(mean), 1, 1)
    rows = torch.arange(len(mean), device=mean.device)
    for operation in draws.order.unbind(1):
        # Contrast moves towards the mean grey of what the image is by then.
        level = luma((matrix[:, :, :3] @ mean[:, :, None])[:, :, 0] + matrix[:, :, 3])
        matrix = linear[rows, operation] @ matrix
        matrix[:, :, 3] += ((1 - contrast) * level).where(operation == 1, 0.0)[:, None]
    gray = luma(matrix.mT)[:, None].expand(-1, 3, 4)
    return gray.where(draws.gray[:, None, None], matrix)


def luma(colors: torch.Tensor) -> torch.Tensor:
    """The grey of colors (..., 3): (...)."""
    red, green, blue = (share * color for share, color in zip(GRAY, colors.unbind(-1), strict=True))
    return red + green + blue


def _hue_rotations(turns: torch.Tensor, eye: torch.Tensor) -> torch.Tensor:
    """Rotations about the grey axis by N angles in turns: (N,) -> (N, 3, 3) (Rodrigues' formula)."""
    cos, sin = torch.cos(2 * math.pi * turns)[:, None, None], torch.sin(2 * math.pi * turns)[:, None, None]
    cross = (eye.roll(1, 0) - eye.roll(-1, 0)) / math.sqrt(3)
    return cos * eye + (1 - cos) / 3 + sin * cross
