"""Features of many images as places on a plane, and colors for them."""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.colors import CSS4_COLORS, XKCD_COLORS, to_hex, to_rgb
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from timm_multilabel.errors import shortened
from timm_multilabel.labels import MISSING, Labels, Quantity, TagSet

POINTS = 2000
COLORS = ('#4477aa', '#ee6677', '#228833', '#ccbb44', '#66ccee', '#aa3377', '#ee7733', '#004488', '#999933',
          '#882255', '#44aa99', '#9970ab')  # Paul Tol's, told apart by the color-blind
NUMBERS = ('#440154', '#443983', '#31688e', '#21918c', '#35b779', '#90d743')  # viridis: dark is little
_DIMENSIONS = 50
_LEAST = 5  # images on a map
_NO_COLOR = ('na', 'n/a', 'none', 'unknown')  # classes, beside names of colors, that are drawn gray
_APART = 0.3  # least distance of two colors in RGB, of which each part is from 0 to 1


@dataclass(frozen=True)
class Coloring:
    """What the colors on a map mean.

    Args:
        names: What the colors stand for, in the order of `colors`.
        colors: One each.
        of_point: The color of each point (P,), -1 for grey.
        rest: What grey stands for; '' where there is none.
    """
    names: list[str]
    colors: tuple[str, ...]
    of_point: np.ndarray
    rest: str


def place_points(features: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray] | None:
    """Places of images on a plane by t-SNE of their first 50 principal components.

    Args:
        features: Of N images (N, F).
        seed: Of the choice among more than 2,000 of them, and of t-SNE.

    Returns:
        The rows that were placed (P,), and where (P, 2), from 0 to 1; None where too few are different.
    """
    rows = np.flatnonzero(np.isfinite(features).all(axis=1))
    if len(rows) > POINTS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, POINTS, replace=False))
    chosen = features[rows].astype(np.float64)
    if len(np.unique(chosen, axis=0)) < _LEAST:
        return None
    components = PCA(min(_DIMENSIONS, *chosen.shape), random_state=seed).fit_transform(chosen)
    perplexity = min(30.0, (len(rows) - 1) / 3)
    init = 'pca' if components.shape[1] > 1 else 'random'
    places = TSNE(2, perplexity=perplexity, init=init, random_state=seed).fit_transform(components)
    low, high = places.min(axis=0), places.max(axis=0)
    return rows, (places - low) / np.maximum(high - low, 1e-12)


def color_points(labels: Labels, target: np.ndarray) -> Coloring:
    """Colors by a head's labels: the dozen most frequent classes or tags, or six equal shares of the numbers.

    Where at least half of those classes are called as colors are, they have these colors.

    Args:
        labels: The head's labels.
        target: As `Predictions.target` gives it, of the points.
    """
    if isinstance(labels, Quantity):
        return _color_numbers(labels, target)
    tags = isinstance(labels, TagSet)
    counts = (target == 1).sum(axis=0) if tags else np.bincount(
        target[target != MISSING], minlength=len(labels.classes))
    order = [index for index in np.argsort(-counts, kind='stable')[:len(COLORS)].tolist() if counts[index]]
    of_point = np.full(len(target), -1)
    for color, index in reversed(list(enumerate(order))):  # of several tags the most frequent one
        of_point[(target[:, index] == 1) if tags else target == index] = color
    others = int((counts > 0).sum()) - len(order)
    rest = f'{others} other {labels.noun[1]}' if others else ''
    known = labels.known(torch.from_numpy(target)).numpy()
    bare = tags and bool((known & ~(target == 1).any(axis=1)).any())
    unlabelled = not known.all()
    rest = ', '.join(filter(None, [rest, 'no tag' if bare else '', 'no label' if unlabelled else '']))
    names = [f'{shortened(labels.classes[index])} ({counts[index]})' for index in order]
    return Coloring(names, _class_colors([labels.classes[index] for index in order]), of_point, rest)


def _class_colors(names: Sequence[str]) -> tuple[str, ...]:
    """A color for each of up to twelve classes, no two alike."""
    named = [_color_called(name) for name in names]
    if 2 * len(set(named) - {None}) < len(names):
        return COLORS[:len(names)]
    found = ['' if color is None or color in named[:place] else color for place, color in enumerate(named)]

    def distance(color: str) -> float:
        """That to the nearest of the colors that are taken."""
        return min(float(np.linalg.norm(np.subtract(to_rgb(color), to_rgb(other)))) for other in found if other)

    for place, color in enumerate(found):
        if not color:
            found[place] = next((free for free in COLORS if distance(free) > _APART), max(COLORS, key=distance))
    return tuple(found)


def _color_called(name: str) -> str | None:
    """The color that goes by a name in English, or None."""
    name = ' '.join(name.lower().replace('_', ' ').replace('-', ' ').split())
    if name in _NO_COLOR:
        name = 'gray'
    color = XKCD_COLORS.get(f'xkcd:{name}') or CSS4_COLORS.get(name.replace(' ', ''))
    return None if color is None else to_hex(color)


def _color_numbers(labels: Quantity, target: np.ndarray) -> Coloring:
    """Numbers in six parts of about equal size, or fewer where many are equal."""
    known = ~np.isnan(target)
    of_point = np.full(len(target), -1)
    if not known.any():
        return Coloring([], (), of_point, 'no label')
    edges = np.unique(np.quantile(target[known], np.linspace(0, 1, len(NUMBERS) + 1)))
    part = np.searchsorted(edges[1:-1], target[known], side='right')
    of_point[known] = part
    in_unit = labels.in_unit(edges)
    parts = max(1, len(edges) - 1)
    names = [f'{in_unit[index]:.4g} to {in_unit[min(index + 1, len(edges) - 1)]:.4g} ({(part == index).sum()})'
             for index in range(parts)]
    return Coloring(names, NUMBERS[:parts], of_point, '' if known.all() else 'no label')
