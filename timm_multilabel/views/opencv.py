"""SimCLR's views on the host: one decode an image, bytes all the way."""
from collections.abc import Sequence
from itertools import groupby

import cv2
import numpy as np
import torch

from timm_multilabel.compat import resize_antialiased
from timm_multilabel.data.images import Photo
from timm_multilabel.views.recipe import (
    Draws,
    ViewRecipe,
    color_matrices,
    draw,
    find_reduction,
    useful_reductions,
    view_seeds,
)
from timm_multilabel.views.told import Told, is_plain


class OpenCVViews:
    """The views of images by a recipe each, from one decode.

    Crops are drawn first, from the header's size: where all crops of an image allow it, a JPEG is decoded at 1/2, 1/4
    or 1/8 of its scale.

    Args:
        recipes: A recipe for each view, all of one size.
        told: What is told of each view.
    """

    def __init__(self, recipes: Sequence[ViewRecipe], told: Told = Told()):  # noqa: B008 (frozen)
        self.recipes, self.told = tuple(recipes), told
        self.size = self.recipes[0].size

    def __call__(self, photos: Sequence[Photo], seeds: Sequence[int], out: np.ndarray) -> torch.Tensor | None:
        """Write the views of N images into `out` (V, N, H, W, 3), uint8.

        Args:
            photos: The images.
            seeds: A seed each.
            out: Where to.

        Returns:
            What is told of the views (V, N, K), if anything is.

        Raises:
            UserError: An image cannot be decoded.
        """
        drawn_from = torch.tensor(seeds)
        height, width = (torch.tensor([getattr(photo, side) for photo in photos]) for side in ('height', 'width'))
        # Views of one recipe are drawn at once: what a draw costs is the number of its operations.
        groups = [(recipe, [view for view, _ in group])
                  for recipe, group in groupby(enumerate(self.recipes), key=lambda item: item[1])]
        draws = [
            draw(recipe, torch.cat([view_seeds(drawn_from, view) for view in views]), height.repeat(len(views)),
                 width.repeat(len(views))) for recipe, views in groups]
        _place(photos, self.size, draws, out)
        for (recipe, views), drawn in zip(groups, draws, strict=True):
            images = [image for view in views for image in out[view]]
            _rotate(images, drawn)
            _color(images, drawn)
            _blur(images, drawn, recipe.blur_radius)
        if not self.told:
            return None
        told = [self.told.of(drawn, height.repeat(len(views)), width.repeat(len(views)))
                for (_, views), drawn in zip(groups, draws, strict=True)]
        return torch.cat(told).view(len(out), len(photos), self.told.width)

    @property
    def plain_shares(self) -> list[float]:
        """The share of each view that keeps the colors of its image, by the probabilities of its recipe."""
        return [recipe.plain_share for recipe in self.recipes]

    def useful_reductions(self, photo: Photo) -> Sequence[int]:
        """The reductions of a photo that some view of it could ask for."""
        return useful_reductions(self.recipes, photo)

    @property
    def scales_key(self) -> str:
        """What these depend on."""
        return repr([(recipe.size, recipe.scale, recipe.ratio) for recipe in self.recipes])


def _place(photos: Sequence[Photo], size: tuple[int, int], draws: list[Draws], out: np.ndarray) -> None:
    """Crop, resize and flip."""
    count = len(photos)
    drawn_boxes = np.concatenate([drawn.box.numpy() for drawn in draws]).reshape(-1, count, 4)  # (V, N, 4)
    ratios = (drawn_boxes[:, :, 2:] / size).min(axis=(0, 2)).tolist()
    boxes = drawn_boxes.tolist()
    hflips, vflips, bicubics = (
        np.concatenate([getattr(drawn, name).numpy() for drawn in draws]).reshape(-1, count).tolist()
        for name in ('hflip', 'vflip', 'bicubic'))
    for n, photo in enumerate(photos):
        reduction = find_reduction(ratios[n], photo.reductions)
        pixels = photo.decode(reduction)
        for view, made in enumerate(out[:, n]):
            box = _reduce(boxes[view][n], reduction, pixels.shape)
            crop_and_resize(pixels, box, made, bicubics[view][n])
            if hflips[view][n] or vflips[view][n]:
                cv2.flip(made, int(hflips[view][n]) if not vflips[view][n] else -int(hflips[view][n]), dst=made)


def _reduce(box: list[int], reduction: int, shape: tuple[int, ...]) -> list[int]:
    """A crop in an image that is reduced."""
    if reduction == 1:
        return box
    top, left, height, width = (round(number / reduction) for number in box)
    top, left = min(top, shape[0] - 1), min(left, shape[1] - 1)
    return [top, left, max(1, min(height, shape[0] - top)), max(1, min(width, shape[1] - left))]


def crop_and_resize(pixels: np.ndarray, box: Sequence[int], out: np.ndarray, bicubic: bool = False) -> None:
    """Cut out (top, left, height, width) and resize it into `out` (H, W, 3), antialiased, as Pillow does.

    Where nothing shrinks there is nothing to antialias, and OpenCV's bilinear resize, which is the fastest, gives what
    Pillow's gives. The other cases go through PyTorch's port of Pillow's algorithm.
    """
    top, left, height, width = box
    crop = pixels[top:top + height, left:left + width]
    if (height, width) == out.shape[:2]:
        out[...] = crop
    elif not bicubic and height <= out.shape[0] and width <= out.shape[1]:
        cv2.resize(crop, (out.shape[1], out.shape[0]), dst=out, interpolation=cv2.INTER_LINEAR)
    else:
        images = _as_torch_images(np.require(crop, requirements=['C', 'W']))
        resize_antialiased(images, bicubic, _as_torch_images(out))


def _as_torch_images(pixels: np.ndarray) -> torch.Tensor:
    """Pixels (H, W, 3) as a tensor (1, 3, H, W) in the same memory."""
    return torch.from_numpy(pixels[None]).permute(0, 3, 1, 2)


def _rotate(views: list[np.ndarray], draws: Draws) -> None:
    height, width = views[0].shape[:2]
    center = ((width - 1) / 2, (height - 1) / 2)
    for view, angle in zip(views, draws.angle.tolist()):
        if angle:
            view[...] = cv2.warpAffine(view, cv2.getRotationMatrix2D(center, angle, 1.0), (width, height))


def _color(views: list[np.ndarray], draws: Draws) -> None:
    changed = (~is_plain(draws)).tolist()
    if not any(changed):
        return
    mean = torch.tensor([cv2.mean(view)[:3] if at else (0.0, 0.0, 0.0) for view, at in zip(views, changed)])
    matrices = color_matrices(draws, mean).numpy()
    for view, matrix, at in zip(views, matrices, changed):
        if at:
            cv2.transform(view, matrix, dst=view)


def _blur(views: list[np.ndarray], draws: Draws, radius: int) -> None:
    for view, sigma in zip(views, draws.sigma.tolist()):
        if sigma and radius:
            kernel = blur_kernel(sigma, radius)
            cv2.sepFilter2D(view, -1, kernel, kernel, dst=view, borderType=cv2.BORDER_REFLECT_101)


def blur_kernel(sigma: float, radius: int) -> np.ndarray:
    """A Gaussian of odd size, `radius` to either side or, where that is less, three standard deviations."""
    return cv2.getGaussianKernel(2 * min(radius, int(np.ceil(3 * sigma))) + 1, sigma, cv2.CV_32F)
