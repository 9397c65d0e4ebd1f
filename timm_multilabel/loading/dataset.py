"""Rows for timm's own loaders, one image at a time."""
from collections.abc import Callable

import torch
from PIL import Image
from torch.utils.data import Dataset

from timm_multilabel.data.images import FilePhotos
from timm_multilabel.data.table import Rows


class MultiLabelDataset(Dataset[tuple[torch.Tensor | tuple[torch.Tensor, ...], torch.Tensor]]):
    """Rows as (views, targets): V views of an image from one decode, and its targets (W,).

    For `timm.data.create_loader`, which sets the transform. Our own loaders make whole batches, see `batches.py`.

    Args:
        rows: Image paths with their targets.
        transform: Makes a view of a PIL image.
        views: Views of each image; one gives a tensor, more give a tuple.
    """

    def __init__(self, rows: Rows, transform: Callable[[Image.Image], torch.Tensor] | None = None, views: int = 1):
        self.rows, self.transform, self.views = rows, transform, views
        self.photos = FilePhotos(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor | tuple[torch.Tensor, ...], torch.Tensor]:
        transform = self.transform
        assert transform is not None  # `create_loader` sets it
        image = Image.fromarray(self.photos[index].decode())
        views = tuple(transform(image) for _ in range(self.views))
        return (views if self.views > 1 else views[0]), self.rows.targets[index]
