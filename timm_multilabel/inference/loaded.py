"""A checkpoint's model on its device, with images loaded as in its evaluation; what all inference goes through."""
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from timm_multilabel.data.images import FilePhotos, Photos
from timm_multilabel.data.table import Rows
from timm_multilabel.errors import CheckpointError, UserError
from timm_multilabel.heads import REGISTRY, Head
from timm_multilabel.labels import missing_row
from timm_multilabel.loading.batches import ImageDataset
from timm_multilabel.loading.loaders import create_eval_loader
from timm_multilabel.model import MultiLabelModel
from timm_multilabel.projector import Projector, projector_shape
from timm_multilabel.training.checkpoint import Checkpoint, load_model
from timm_multilabel.training.trainer import Precision
from timm_multilabel.views.pillow import scoring_views


class Progress(Protocol):
    """What is told how far a pass over images is, such as a progress bar."""

    def advance(self) -> None:
        """One batch is done."""


WHAT = ('features', 'projections')
"""What embeddings are made of: pooled features of the backbone, or what NT-Xent compares."""


def check_finite(values: Iterable[torch.Tensor], path: str | Path) -> None:
    """Raise UserError where what a checkpoint's model says is not finite; one wait for the device, however many."""
    if not torch.stack([each.isfinite().all() for each in values]).all():
        raise CheckpointError(f'{path}: its outputs are not finite (did training diverge?); take another checkpoint')


def add_weights(digest: Any, module: nn.Module) -> None:
    """Add the names, types and values of a module's weights to a digest of `hashlib`."""
    for name, value in sorted(module.state_dict().items()):
        digest.update(f'{name} {value.dtype} {tuple(value.shape)}'.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint ready to look at images.

    Args:
        checkpoint: Where the model comes from.
        weights: 'plain' or 'ema', those of the model.
        model: In evaluation mode, on the device.
        precision: The device of the model, and the precision of its computations.
    """
    checkpoint: Checkpoint
    weights: str
    model: MultiLabelModel
    precision: Precision

    @classmethod
    def of(
            cls,
            checkpoint: Checkpoint,
            weights: str,
            precision: Precision,
            registry: Mapping[str, type[Head]] = REGISTRY,
            allow_hub: bool = False,
    ) -> 'LoadedModel':
        """Make the model of a checkpoint, with its 'best', 'plain' or 'ema' weights.

        Raises:
            CheckpointError: See `load_model`.
        """
        weights = checkpoint.best_weights if weights == 'best' else weights
        model = load_model(checkpoint, weights, registry, allow_hub)
        return cls(checkpoint, weights, model.to(precision.device), precision)

    def part(self, rows: Rows, photos: Photos | None = None, keep_bad: bool = False) -> ImageDataset:
        """Rows with their photos (by default those of their files), resized as in training's evaluation.

        Args:
            rows: The images, whose targets do not matter.
            photos: A photo for each row; those of their files when None.
            keep_bad: Let a black picture stand in for an image that cannot be decoded, and note it in
                `ImageDataset.bad`; else the first such image raises UserError.
        """
        views = scoring_views(self.checkpoint.data_config)
        part = ImageDataset(rows, FilePhotos(rows) if photos is None else photos, views)
        return part.skip_bad(stand_in=missing_row(self.model.label_space)) if keep_bad else part

    def batches(
            self,
            part: ImageDataset,
            batch_size: int,
            workers: int,
            block: int | None = None,
    ) -> Iterator[torch.Tensor]:
        """Images (B, 3, H, W) of a part in order, normalised, on the device; one batch is loaded without processes.

        Args:
            part: Of `part`.
            batch_size: Images of a batch.
            workers: Loader processes.
            block: No batch has images of two blocks of so many.
        """
        config, batch_size = self.checkpoint.data_config, self.checkpoint.batch_size(batch_size)
        loader = create_eval_loader(
            part, batch_size, mean=tuple(config['mean']), std=tuple(config['std']), device=self.precision.device,
            workers=workers if len(part) > batch_size else 0, block=block)
        for images, _ in loader:
            yield self.precision.layout(images)

    @torch.no_grad()
    def probabilities(self, images: torch.Tensor) -> dict[str, np.ndarray]:
        """{head: what `Head.probabilities` gives} of images, float32.

        Raises:
            CheckpointError: It is not finite.
        """
        with self.precision.autocast():
            features = self.model.backbone(images)
            outputs = self.model.forward_heads(features)
        made = {name: head.probabilities(outputs[name]).float() for name, head in self.model.named_heads.items()}
        check_finite([features, *made.values()], self.checkpoint.path)
        return {name: values.cpu().numpy() for name, values in made.items()}

    def embedder(self, what: str) -> nn.Module:
        """What turns images (B, 3, H, W) into 'features' (B, F) or 'projections' (B, D).

        Raises:
            CheckpointError: The checkpoint has no projector.
        """
        if what == 'features':
            return nn.Sequential(self.model.backbone)
        return nn.Sequential(self.model.backbone, self._projector().to(self.precision.device).eval())

    def _projector(self) -> nn.Module:
        """The model's own projector, where a head reads it; else that of the training task."""
        if self.model.projector is not None:
            return self.model.projector
        path, state = self.checkpoint.path, self.checkpoint.state
        if state.get('condition_projector'):
            raise CheckpointError(
                f'{path}: its projector is told what was drawn of each view (--condition-projector), and nothing is '
                'drawn here; take the features')
        stored = state.get('task_state' if self.weights == 'plain' else 'task_state_ema')
        stored = stored.get('projector') if isinstance(stored, dict) else None
        if not stored:
            raise CheckpointError(
                f'{path}: holds no projector of its {self.weights} weights (trained with -wls 0, perhaps); take the '
                'features')
        try:
            with torch.device('meta'):  # no memory for what a file may ask for, but for what it holds
                projector = Projector(self.model.num_features, *projector_shape(state).values())
            projector.load_state_dict(stored, assign=True)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise CheckpointError(f'{path}: its projector does not fit its model') from error
        return projector.float()

    def maker(self, what: str) -> dict[str, Any]:
        """What tells embeddings of this model from those of another: plain values, a digest of weights and input."""
        return {'arch': self.checkpoint.arch, 'what': what, 'weights': self.weights,
                'digest': self.digest(self.embedder(what))}

    def digest(self, module: nn.Module) -> str:
        """What tells what a module of it makes of images from that of others: its weights, and the model's input."""
        digest = hashlib.sha256(json.dumps(self.checkpoint.data_config, sort_keys=True, default=str).encode())
        add_weights(digest, module)
        return digest.hexdigest()


def reason_of(part: ImageDataset, index: int) -> str:
    """Why an image that was noted as bad is so: the line of its error."""
    try:
        part.photos[index].decode()
    except UserError as error:
        return error.line
    return f'{part.rows.images[index]} ({part.rows.where(index)}): could not be read, and can be now; try again'
