"""SimCLR's views on the host: one decode an image, bytes all the way."""
from collections.abc import Sequence

import cv2
import numpy as np
import torch

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


class OpenCVViews:
    """The views of images by a recipe each, from one decode.

    Crops are drawn first, from the header's size: where all crops of an image allow it, a JPEG is decoded at 1/2, 1/4
    or 1/8 of its scale.

    Args:
        recipes: A recipe for each view, all of one size.
    """

    def __init__(self, recipes: Sequence[ViewRecipe]):
        self.recipes = tuple(recipes)
        self.size = self.recipes[0].size

    def __call__(self, photos: Sequence[Photo], seeds: Sequence[int], out: np.ndarray) -> None:
        """Write the views of N images into `out` (V, N, H, W, 3), uint8.

        Args:
            photos: The images.
            seeds: A seed each.
            out: Where to.

        Raises:
            UserError: An image cannot be decoded.
        """
        seeds = torch.tensor(seeds)
        height, width = (torch.tensor([getattr(photo, side) for photo in photos]) for side in ('height', 'width'))
        draws = [draw(recipe, view_seeds(seeds, view), height, width) for view, recipe in enumerate(self.recipes)]
        self._place(photos, draws, out)
        for recipe, drawn, views in zip(self.recipes, draws, out, strict=True):
            _rotate(views, drawn)
            _color(views, drawn)
            _blur(views, drawn, recipe.blur_radius)

    def useful_reductions(self, photo: Photo) -> Sequence[int]:
        """The reductions of a photo that some view of it could ask for."""
        return useful_reductions(self.recipes, photo)

    @property
    def scales_key(self) -> str:
        """What these depend on."""
        return repr([(recipe.size, recipe.scale, recipe.ratio) for recipe in self.recipes])

    def _place(self, photos: Sequence[Photo], draws: list[Draws], out: np.ndarray) -> None:
        """Crop, resize and flip."""
        boxes = np.stack([drawn.box.numpy() for drawn in draws], axis=1)  # (N, V, 4)
        ratios = (boxes[:, :, 2:] / self.size).min(axis=(1, 2)).tolist()
        boxes = boxes.tolist()
        flips = [list(zip(*(mask.tolist() for mask in (drawn.hflip, drawn.vflip, drawn.bicubic)))) for drawn in draws]
        for n, photo in enumerate(photos):
            reduction = find_reduction(ratios[n], photo.reductions)
            pixels = photo.decode(reduction)
            for view, box in enumerate(boxes[n]):
                hflip, vflip, bicubic = flips[view][n]
                crop_and_resize(pixels, _reduce(box, reduction, pixels.shape), out[view, n], bicubic)
                if hflip or vflip:
                    cv2.flip(out[view, n], -1 if hflip and vflip else int(hflip), dst=out[view, n])


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
        # What torch.nn.functional.interpolate calls, but for its detour through another layout of the result.
        resize = torch.ops.aten._upsample_bicubic2d_aa if bicubic else torch.ops.aten._upsample_bilinear2d_aa
        images = _as_torch_images(np.require(crop, requirements='CW'))
        resize.out(images, out.shape[:2], False, out=_as_torch_images(out))


def _as_torch_images(pixels: np.ndarray) -> torch.Tensor:
    """Pixels (H, W, 3) as a tensor (1, 3, H, W) in the same memory."""
    return torch.from_numpy(pixels[None]).permute(0, 3, 1, 2)


def _rotate(views: np.ndarray, draws: Draws) -> None:
    height, width = views.shape[1:3]
    center = ((width - 1) / 2, (height - 1) / 2)
    for view, angle in zip(views, draws.angle.tolist()):
        if angle:
            view[...] = cv2.warpAffine(view, cv2.getRotationMatrix2D(center, angle, 1.0), (width, height))


def _color(views: np.ndarray, draws: Draws) -> None:
    changed = ((draws.factors != torch.tensor([1.0, 1.0, 1.0, 0.0])).any(dim=1) | draws.gray).tolist()
    if not any(changed):
        return
    mean = torch.tensor([cv2.mean(view)[:3] if at else (0.0, 0.0, 0.0) for view, at in zip(views, changed)])
    matrices = color_matrices(draws, mean).numpy()
    for view, matrix, at in zip(views, matrices, changed):
        if at:
            cv2.transform(view, matrix, dst=view)


def _blur(views: np.ndarray, draws: Draws, radius: int) -> None:
    for view, sigma in zip(views, draws.sigma.tolist()):
        if sigma and radius:
            kernel = blur_kernel(sigma, radius)
            cv2.sepFilter2D(view, -1, kernel, kernel, dst=view, borderType=cv2.BORDER_REFLECT_101)


def blur_kernel(sigma: float, radius: int) -> np.ndarray:
    """A Gaussian of odd size, `radius` to either side or, where that is less, three standard deviations."""
    return cv2.getGaussianKernel(2 * min(radius, int(np.ceil(3 * sigma))) + 1, sigma, cv2.CV_32F)
