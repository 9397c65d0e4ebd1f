"""Nearest neighbours by cosine through faiss: only the clusters near a query are searched."""
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch

from timm_multilabel.errors import UserError
from timm_multilabel.inference.neighbours import directions, nearest_of

_LEAST, _MOST = 39, 64  # points for each cluster: faiss warns below, and more of them do not help
_SAMPLE = 64  # queries that are searched exactly too
_ROUNDING = 1e-5  # of cosines: images that are the same are equally near


@dataclass(frozen=True)
class Found:
    """What was found for Q queries.

    Args:
        cosines: (Q, k), the largest first.
        indices: Numbers of the points (Q, k).
        recall: The share of the nearest that was found, of the queries that were searched exactly too.
        sample: How many these are.
    """
    cosines: torch.Tensor
    indices: torch.Tensor
    recall: float
    sample: int


def import_faiss() -> ModuleType:
    """faiss.

    Raises:
        UserError: It is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise UserError("--approximate needs faiss; pip install '.[search]', or leave it out for the exact search"
                        ) from error
    module: ModuleType = faiss
    return module


def nearest_approximately(
        queries: torch.Tensor,
        chunks: Callable[[], Iterable[np.ndarray]],
        count: int,
        k: int,
        share: float,
        exact_on: torch.device,
) -> Found:
    """Search only the clusters whose centers are nearest to a query: k-means on a sample, then all points by cluster.

    Inverted lists as in Jegou et al. 2011 (https://doi.org/10.1109/TPAMI.2010.57), of whole vectors.

    Args:
        queries: The points whose neighbours are wanted (Q, D).
        chunks: Gives all points in order, some at a time, (n, D) each; called twice.
        count: How many points there are.
        k: How many neighbours a query has, `count` at most.
        share: Of the clusters, those that are searched.
        exact_on: Where a sample of the queries is searched exactly too.

    Raises:
        UserError: faiss is not installed.
    """
    faiss, width = import_faiss(), queries.shape[1]
    clusters = max(1, min(int(4 * math.sqrt(count)), count // _LEAST))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, clusters, faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1  # else it prints a warning where there are few points
    step, seen, sample = max(1, count // (_MOST * clusters)), 0, []
    for chunk in chunks():
        sample.append(_directions(chunk[-seen % step::step]))
        seen += len(chunk)
    index.train(np.concatenate(sample))

    def added() -> Iterator[torch.Tensor]:
        """The points on their way into the index, so that the exact search needs no third pass."""
        for chunk in chunks():
            index.add(_directions(chunk))
            yield torch.from_numpy(chunk)

    places = np.unique(np.linspace(0, len(queries) - 1, min(_SAMPLE, len(queries))).round().astype(int))
    exact, _ = nearest_of(queries[torch.from_numpy(places)].to(exact_on), added(), k)
    wanted = _directions(queries.numpy())
    index.nprobe = max(1, round(share * clusters))
    cosines, indices = index.search(wanted, k)
    while index.nprobe < clusters and (lacking := (indices < 0).any(axis=1)).any():
        index.nprobe = min(clusters, 2 * index.nprobe)  # those that were searched have fewer points than k
        cosines[lacking], indices[lacking] = index.search(wanted[lacking], k)
    least = exact[:, -1:].cpu().numpy() - _ROUNDING
    return Found(torch.from_numpy(cosines), torch.from_numpy(indices), float((cosines[places] >= least).mean()),
                 len(places))


def _directions(points: np.ndarray) -> np.ndarray:
    made: np.ndarray = directions(torch.from_numpy(np.ascontiguousarray(points))).numpy()
    return made
