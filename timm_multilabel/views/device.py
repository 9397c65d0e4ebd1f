"""SimCLR's views on a device, for a whole batch of images that lie there.

Everything is a matrix: a crop with its flip and its antialiased resize is one matrix over the rows and one over the
columns of an image, so is a blur, and the colors are one 3x4 matrix. The result is that of `opencv.py` for the same
draws, but for its rounding to bytes after each operation.
"""
import math

import torch
import torch.nn.functional as F

from timm_multilabel.views.recipe import Draws, ViewRecipe, color_matrices, draw, view_seeds


def make_views(
        recipe: ViewRecipe,
        images: torch.Tensor,
        shapes: torch.Tensor,
        sizes: torch.Tensor,
        seeds: torch.Tensor,
        view: int,
) -> torch.Tensor:
    """One view of each of N images: (N, 3, H, W) float32 of 0 to 255.

    Args:
        recipe: The recipe.
        images: Images (N, H_max, 3, W_max), uint8; what is beyond an image's own height and width does not matter.
        shapes: Height and width that each has there (N, 2).
        sizes: Height and width of the whole images, which crops are drawn for (N, 2); larger where images are reduced.
        seeds: Their seeds (N,), int64.
        view: Which of an image's views it is, from 0.
    """
    return make_drawn(recipe, images, shapes, sizes, draw(recipe, view_seeds(seeds, view), *sizes.unbind(1)))


def make_drawn(
        recipe: ViewRecipe,
        images: torch.Tensor,
        shapes: torch.Tensor,
        sizes: torch.Tensor,
        draws: Draws,
) -> torch.Tensor:
    """`make_views` from what was drawn."""
    boxes = draws.box * (shapes / sizes).repeat(1, 2)
    (height, width), radius = recipe.size, recipe.blur_radius
    rows = _placing(boxes[:, 0], boxes[:, 2], images.shape[1], height, draws.vflip, draws.bicubic)
    columns = _placing(boxes[:, 1], boxes[:, 3], images.shape[3], width, draws.hflip, draws.bicubic)
    # Columns first, then rows: in this layout neither product has to move anything.
    views = (images.float().reshape(len(images), -1, images.shape[3]) @ columns.mT).clamp_(0, 255)
    views = (rows @ views.reshape(len(images), images.shape[1], 3 * width)).clamp_(0, 255)
    views = views.reshape(-1, height, 3, width).transpose(1, 2)
    if recipe.rotation:
        views = _rotate(views, draws)
    views = _color(views, draws)
    if recipe.blur_prob and radius:
        views = _along_rows(views, _blur(draws.sigma, radius, width))
        views = _along_rows(views.mT, _blur(draws.sigma, radius, height)).mT
    return views


def _color(views: torch.Tensor, draws: Draws) -> torch.Tensor:
    pixels = views.reshape(len(views), 3, -1)
    matrices = color_matrices(draws, pixels.mean(dim=2))
    return torch.baddbmm(matrices[:, :, 3:], matrices[:, :, :3], pixels).clamp_(0, 255).reshape(views.shape)


def _along_rows(views: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Apply matrices (N, W, W) to the rows of views (N, 3, H, W)."""
    return (views.reshape(len(views), -1, views.shape[3]) @ matrices.mT).reshape(views.shape)


def _placing(
        start: torch.Tensor,
        length: torch.Tensor,
        pixels: int,
        size: int,
        flip: torch.Tensor,
        bicubic: torch.Tensor,
) -> torch.Tensor:
    """Matrices (N, size, pixels) that cut out `length` pixels from `start`, resize them to `size`, and flip them.

    Pillow's resampling: a triangle, or a cubic with a = -0.5, as wide as a pixel of the larger of both scales.
    """
    device = start.device
    step = (length / size)[:, None]
    outputs = torch.arange(size, device=device)
    outputs = torch.where(flip[:, None], size - 1 - outputs, outputs)
    centers = start[:, None] + (outputs + 0.5) * step
    inputs = torch.arange(pixels, device=device) + 0.5
    distance = ((inputs - centers[:, :, None]) / step.clamp(min=1)[:, :, None]).abs()
    weights = (1 - distance).clamp(min=0)
    near = (1.5 * distance - 2.5) * distance ** 2 + 1
    far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    cubic = near.where(distance < 1, far.where(distance < 2, 0.0))
    weights = cubic.where(bicubic[:, None, None], weights)
    # A pixel that the crop cuts through belongs to it by more than half.
    inside = (inputs > start[:, None]) & (inputs < (start + length)[:, None])
    weights = weights * inside[:, None]
    return weights / weights.sum(dim=2, keepdim=True)


def _blur(sigma: torch.Tensor, radius: int, size: int) -> torch.Tensor:
    """Matrices (N, size, size) of a Gaussian blur that reflects at the borders; the identity where sigma is 0."""
    device = sigma.device
    offsets = torch.arange(-radius, radius + 1, device=device)
    kernel = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-6)[:, None]) ** 2)
    kernel = kernel.where(offsets.abs() <= torch.ceil(3 * sigma)[:, None], 0.0)  # as far as opencv.py goes
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    target = torch.arange(size, device=device)[:, None] + offsets
    target = (size - 1) - ((size - 1) - target.abs()).abs()
    rows = torch.arange(size, device=device)[:, None].expand_as(target)
    matrices = torch.zeros(len(sigma), size * size, device=device)
    matrices.index_add_(1, (rows * size + target).flatten(), kernel.repeat(1, size))
    return matrices.reshape(-1, size, size)


def _rotate(views: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Turn the views (N, 3, H, W) about their center; the corners turn black."""
    height, width = views.shape[2:]
    angle = draws.angle * math.pi / 180
    cos, sin, zero = torch.cos(angle), torch.sin(angle), torch.zeros_like(angle)
    # Where each pixel comes from, in coordinates of -1 to 1 on both axes.
    theta = torch.stack([
        torch.stack([cos, -sin * height / width, zero], dim=1),
        torch.stack([sin * width / height, cos, zero], dim=1),
    ], dim=1)
    grid = F.affine_grid(theta, list(views.shape), align_corners=False)
    return F.grid_sample(views, grid, mode='bilinear', padding_mode='zeros', align_corners=False)
