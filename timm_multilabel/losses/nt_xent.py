"""NT-Xent, the contrastive loss of SimCLR, in memory that grows linearly with the batch."""
import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from timm_multilabel.config.train import ObjectiveSettings
from timm_multilabel.distributed import assert_same_on_all_ranks, gather, world

_SHORTEST = 1e-12
"""Least length that a projection is divided by, as in `torch.nn.functional.normalize`."""
_LARGEST_EXPONENT = 50
"""exp(50) times any batch, and exp(-50) by itself, are normal numbers of float32."""


# A loop over tiles is nothing to compile: the graph would grow with the batch.
@torch.compiler.disable  # type: ignore[untyped-decorator]  # PyTorch's has no types
def nt_xent_loss(
        view_a: torch.Tensor,
        view_b: torch.Tensor,
        temperature: float = ObjectiveSettings.temperature,
) -> torch.Tensor:
    """Normalised temperature-scaled cross-entropy over all pairs of the global batch.

    With z the 2N normalised projections of all ranks and p(i) the other view of i's image, the mean over the anchors i
    of -log(exp(z_i . z_p(i) / T) / sum over k != i of exp(z_i . z_k / T)) (Chen et al. 2020, "A Simple Framework for
    Contrastive Learning of Visual Representations", eq. 1).

    It is exact, and takes memory for the projections and for a few tiles of their similarities. The gradient, where one
    is needed, is computed with the loss; there is no second derivative. Within a compiled function it runs as it is,
    between two graphs.

    With several ranks the loss is the mean over this rank's anchors, against the views of all ranks: its mean over
    ranks is the loss of one process on the whole batch. The gradient is that of the sum of all ranks' losses, so what
    DDP averages is the gradient of one process, given that every rank calls backward with the same factor on its loss.
    All ranks must have the same N. Ranks meet three times, all in the forward pass: over N, the projections, and the
    sums of their rows.

    Args:
        view_a: Projections (N, D) of one view of each image; they need not be normalised.
        view_b: Projections (N, D) of the other view; row i is of the same image as row i of `view_a`.
        temperature: T, more than 0.

    Returns:
        The loss, a scalar, computed in float32 (in float64 for float64 input) whatever the autocast.

    Raises:
        ValueError: The shapes differ or are not (N, D) with images, or the temperature is not more than 0.
        RuntimeError: Ranks have different numbers of images (on CUDA as a device-side assertion), or a backward pass
            that is to be differentiated itself.
    """
    if view_a.ndim != 2 or view_a.shape != view_b.shape or not len(view_a):
        raise ValueError(
            f'NT-Xent expects two tensors of one shape (N, D), got {tuple(view_a.shape)} and {tuple(view_b.shape)}')
    if not 0 < temperature < math.inf:
        raise ValueError(f'NT-Xent expects a temperature of more than 0, got {temperature}')
    with_gradient = torch.is_grad_enabled() and (view_a.requires_grad or view_b.requires_grad)
    autocast = torch.is_autocast_enabled(view_a.device.type)
    with torch.autocast(view_a.device.type, enabled=False) if autocast else nullcontext():
        loss: torch.Tensor = _NTXent.apply(view_a, view_b, temperature, with_gradient)
    return loss


class _NTXent(torch.autograd.Function):
    """The loss, and its gradient in the same pass: all that the backward pass has to keep is that gradient.

    Rows are the normalised projections of this rank, two in a row for each image, and columns those of all ranks, this
    rank's first, both divided by sqrt(T ln 2): their products are logits (similarities / T) in base 2, since exp2 is
    faster than exp. With P_ij = exp(logit_ij) / sum over k != i of exp(logit_ik), which the row sums give for any tile,
    the gradient of the sum of all losses at row i is in the direction of the sum over j of (P_ij + P_ji) times column
    j, with P_ij - 1 in place of P_ij where j is i's other view.
    """

    @staticmethod
    def forward(
            ctx: Any,
            view_a: torch.Tensor,
            view_b: torch.Tensor,
            temperature: float,
            with_gradient: bool,
    ) -> torch.Tensor:
        rows = torch.stack([view_a, view_b], dim=1).flatten(0, 1)
        if rows.dtype != torch.float64:
            rows = rows.float()
        length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        divisor = length.clamp(min=_SHORTEST).mul_(math.sqrt(temperature * math.log(2)))
        rows.div_(divisor)
        if world()[1] > 1:
            assert_same_on_all_ranks(len(rows), rows.device, 'NT-Xent expects as many images on every rank')
        columns = _own_first(rows)
        plain = 1 / temperature <= _LARGEST_EXPONENT
        # Relative to the positive pair the loss is softplus(logsumexp over negatives), which keeps its digits where the
        # pair is much closer than the rest and log(1 + tiny) would round to 0.
        positive = (rows[::2] * rows[1::2]).sum(dim=1, keepdim=True).mul_(math.log(2))
        tiles = _Tiles(columns, len(rows), plain)
        losses = F.softplus(_log_sums(tiles).view(-1, 2) - positive, threshold=40)
        if with_gradient:
            towards_positive = torch.expm1(-losses).sum(dim=1)  # P_ij - 1 + P_ji - 1, without rounding P to 1
            log_sums = _own_first((losses + positive).flatten())  # now over all other columns
            gradient = _gradient(tiles, log_sums, towards_positive)
            # Through the division by the length: what points along a row changes nothing, unless a least length was
            # put in place of its own.
            along = (rows * gradient).sum(dim=1, keepdim=True).mul_(length > _SHORTEST)
            gradient.addcmul_(rows, along, value=-temperature * math.log(2)).div_(divisor.mul_(len(rows) / math.log(2)))
            ctx.save_for_backward(gradient)
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError('NT-Xent has no second derivative here: call backward without create_graph=True')
        gradient = ctx.saved_tensors[0] * factor
        return gradient[::2], gradient[1::2], None, None


def _own_first(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks, in rank order but beginning with this one's."""
    rank, ranks = world()
    return rows if ranks == 1 else gather(rows).roll(-rank * len(rows), dims=0)


def _tile_rows(device: torch.device) -> int:
    """Rows, and columns, of a tile, an even number: few enough for a CPU's caches, enough to keep a GPU busy."""
    return 512 if device.type == 'cpu' else 4096


class _Tiles:
    """Rows, columns and exp(logit) of tile after tile; an image has no exp(logit) with itself.

    Of the square of a rank's own columns there are the tiles on the diagonal and right of it, since similarity is
    symmetric. The first tiles are kept for the next pass, in which they may be changed; each of the others takes the
    memory of the one before it, and is made again.

    Args:
        columns: As in `_NTXent` (M, D).
        rows: How many of them are this rank's.
        plain: Logits are such that exp neither overflows nor vanishes; else tiles hold logits.
    """
    keep = 3 * 2 ** 20
    """Numbers in the tiles that are kept."""

    def __init__(self, columns: torch.Tensor, rows: int, plain: bool):
        self.columns, self.rows, self.plain = columns, rows, plain
        self.step = _tile_rows(columns.device)
        self._kept: list[torch.Tensor] = []
        self._room = self.keep

    def memory(self) -> torch.Tensor:
        """Memory for the largest tile; one for all, since what an allocator maps anew for each costs time."""
        return self.columns.new_empty(min(self.step, self.rows) * min(self.step, len(self.columns)))

    def is_mirrored(self, row: slice, column: slice) -> bool:
        """Whether a tile stands for that of its columns and rows too."""
        mirrored: bool = row.start < column.start < self.rows
        return mirrored

    def __iter__(self) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        kept, memory = iter(list(self._kept)), None
        for row, column in self._places():
            tile = next(kept, None)
            if tile is None:
                shape = row.stop - row.start, column.stop - column.start
                if shape[0] * shape[1] <= self._room:
                    tile = self.columns.new_empty(shape)
                    self._kept.append(tile)
                    self._room -= tile.numel()
                else:
                    self._room = 0  # only the first ones
                    memory = self.memory() if memory is None else memory
                    tile = _part(memory, shape)
                self._fill(tile, row, column)
            yield row, column, tile

    def _places(self) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of the tiles."""
        end = len(self.columns)
        for row in range(0, self.rows, self.step):
            for column in (*range(row, self.rows, self.step), *range(self.rows, end, self.step)):
                yield (slice(row, min(row + self.step, self.rows)),
                       slice(column, min(column + self.step, self.rows if column < self.rows else end)))

    def _fill(self, tile: torch.Tensor, row: slice, column: slice) -> None:
        """Compute a tile."""
        torch.mm(self.columns[row], self.columns[column].T, out=tile)
        if self.plain:
            tile.exp2_()
        else:
            tile.mul_(math.log(2))
        if column == row:
            images = len(tile) // 2
            tile.view(images, 2, images, 2).diagonal(dim1=0, dim2=2).fill_(0 if self.plain else -math.inf)


def _part(memory: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The beginning of some memory, in a shape."""
    return memory[:shape[0] * shape[1]].view(shape)


def _log_sums(tiles: _Tiles) -> torch.Tensor:
    """For each row the log of the sum of exp(logit) over the columns of other images; -inf without any."""
    nothing, add, add_up = (0, torch.add, torch.sum) if tiles.plain else (-math.inf, torch.logaddexp, torch.logsumexp)
    sums = tiles.columns.new_full((tiles.rows,), nothing)
    for row, column, tile in tiles:
        add(sums[row], add_up(tile, dim=1), out=sums[row])
        if tiles.is_mirrored(row, column):
            add(sums[column], add_up(tile, dim=0), out=sums[column])
    return sums.log_() if tiles.plain else sums


def _gradient(tiles: _Tiles, log_sums: torch.Tensor, towards_positive: torch.Tensor) -> torch.Tensor:
    """The gradient of the sum of all losses at this rank's rows (rows, D), but for a factor. It changes the tiles.

    Args:
        tiles: After a first pass.
        log_sums: For each column the log of the sum of exp(logit) over all others (M,).
        towards_positive: P_ij + P_ji - 2 for the two views of each of this rank's images (rows / 2,).
    """
    columns = tiles.columns
    positives: torch.Tensor = columns[:tiles.rows].unflatten(0, (-1, 2)).flip(1)
    gradient = positives.mul_(towards_positive[:, None, None]).flatten(0, 1)
    shares = log_sums.neg().exp_() if tiles.plain else None
    memory = tiles.memory()
    for row, column, tile in tiles:
        factors = _part(memory, tile.shape)
        if shares is not None:
            tile.mul_(torch.add(shares[row, None], shares[column], out=factors))
        else:
            torch.sub(tile, log_sums[column], out=factors).exp_()
            tile.sub_(log_sums[row, None]).exp_().add_(factors)
        gradient[row].addmm_(tile, columns[column])
        if tiles.is_mirrored(row, column):
            gradient[column].addmm_(tile.T, columns[row])
    return gradient
