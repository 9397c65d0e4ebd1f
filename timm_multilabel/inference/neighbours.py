"""Nearest neighbours by cosine, exact, and what they vote for."""
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F

_QUERIES, _BANK = 1024, 16384  # rows and columns of a tile of similarities: 64 MiB

TEMPERATURE = 0.07
"""Of the weights of votes (Wu et al. 2018, https://arxiv.org/abs/1805.01978; DINO has the same)."""


def nearest(queries: torch.Tensor, bank: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The points nearest to each query by cosine, the nearest first; through tiles, so memory grows linearly.

    Args:
        queries: The points whose neighbours are wanted (Q, D).
        bank: The points (N, D), on the same device.
        k: How many neighbours a query has; all points where there are fewer.

    Returns:
        Cosines and indices of the points (Q, min(k, N)).
    """
    return nearest_of(queries, [bank], k)


@torch.no_grad()
def nearest_of(
        queries: torch.Tensor,
        chunks: Iterable[torch.Tensor],
        k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`nearest` of points that come some at a time, (n, D) each on any device; the result is the same however many."""
    queries, first = directions(queries), 0
    cosines = queries.new_empty(len(queries), 0)
    indices = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for tile in _tiles(chunks):
        bank = directions(tile.to(queries.device))
        merged = [_merge(*each, bank, first, k) for each in zip(
            queries.split(_QUERIES), cosines.split(_QUERIES), indices.split(_QUERIES))]
        cosines, indices = torch.cat([best for best, _ in merged]), torch.cat([places for _, places in merged])
        first += len(tile)
    return cosines, indices


def _tiles(chunks: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The same points, `_BANK` at a time: products of other sizes differ in the last digits."""
    rest: list[torch.Tensor] = []
    for chunk in chunks:
        for piece in chunk.split(_BANK):
            rest.append(piece)
            if sum(map(len, rest)) >= _BANK:
                joined = torch.cat(rest) if len(rest) > 1 else piece
                yield joined[:_BANK]
                rest = [joined[_BANK:]] if len(joined) > _BANK else []
    if rest:
        yield torch.cat(rest)


def directions(points: torch.Tensor) -> torch.Tensor:
    """Points (N, D) on the unit sphere, whatever their length; 0 has a cosine of 0 with everything."""
    points = points.float()
    largest = points.abs().amax(dim=1, keepdim=True)  # the square of which may be no number of float32
    return F.normalize(points / torch.where(largest > 0, largest, 1), dim=1)


def _merge(
        queries: torch.Tensor,
        cosines: torch.Tensor,
        indices: torch.Tensor,
        bank: torch.Tensor,
        first: int,
        k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best of a tile among those found so far."""
    best, places = (queries @ bank.T).topk(min(k, len(bank)), dim=1)
    cosines, indices = torch.cat([cosines, best], 1), torch.cat([indices, places + first], 1)
    cosines, places = cosines.topk(min(k, cosines.shape[1]), dim=1)
    return cosines, indices.gather(1, places)


def vote(
        cosines: torch.Tensor,
        labels: torch.Tensor,
        temperature: float = TEMPERATURE,
) -> torch.Tensor:
    """The class that the neighbours of each query vote for, each with the weight exp(cosine / temperature): (Q,).

    Votes are added up by neighbour, not by class, so memory is the same however many classes there are.

    Args:
        cosines: Cosines of the neighbours of each query (Q, K).
        labels: Class indices of the same neighbours (Q, K).
        temperature: The less, the more the nearest count.
    """
    # The nearest weighs 1: the same order of classes, and nothing overflows.
    weights = ((cosines - cosines.max(dim=1, keepdim=True).values) / temperature).exp()
    labels, order = labels.sort(dim=1, stable=True)
    candidate = (labels.diff(dim=1) != 0).cumsum(dim=1)
    candidate = torch.cat([torch.zeros_like(labels[:, :1]), candidate], dim=1)  # each class has a number of its own
    votes = torch.zeros_like(weights).scatter_add_(1, candidate, weights.gather(1, order))
    chosen = votes.argmax(dim=1, keepdim=True)
    return labels.gather(1, (candidate == chosen).int().argmax(dim=1, keepdim=True))[:, 0]


def knn_predictions(
        queries: torch.Tensor,
        bank: torch.Tensor,
        targets: list[torch.Tensor],
        k: int,
) -> list[torch.Tensor | None]:
    """What the K nearest labelled points say each query is, for each of several heads.

    Args:
        queries: The points to classify (Q, D).
        bank: The points to compare them with (N, D), on the same device.
        targets: By head the class indices of the points (N,), -1 where there is no label.
        k: How many neighbours vote; all labelled points where there are fewer.

    Returns:
        By head class indices (Q,), or None where no point has a label.
    """
    predictions: list[torch.Tensor | None] = []
    mask = None
    for target in targets:
        known = target >= 0
        if not known.any():
            predictions.append(None)
            continue
        if mask is None or not torch.equal(known, mask):  # heads mostly have labels on the same rows
            mask = known
            cosines, indices = nearest(queries, bank[known], k)
        predictions.append(vote(cosines, target[known][indices]))
    return predictions
