"""A checkpoint as a Python call: images -> each head's labels with their probabilities."""
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from timm_multilabel.data.images import DecodedPhoto, Photo, read_photo, to_rgb
from timm_multilabel.data.table import Rows, missing_targets
from timm_multilabel.errors import UserError
from timm_multilabel.heads import load_registry
from timm_multilabel.inference.image_predictions import Guess, ImagePrediction, Thresholds, check_thresholds, guess_all
from timm_multilabel.inference.loaded import LoadedModel, reason_of
from timm_multilabel.labels import LabelSpace
from timm_multilabel.loading.batches import ImageDataset
from timm_multilabel.training.checkpoint import read_checkpoint
from timm_multilabel.training.trainer import Precision

ImageLike = str | Path | Image.Image | np.ndarray

_BATCH = 64  # images at once of a list


class Predictor:
    """Says what the heads of a checkpoint make of images.

        predictor = Predictor.load('output/train/run/model_best.pth.tar')
        predictor('photo.jpg')['color'][0]  # Guess(label='Blue', probability=0.93)

    Args:
        loaded: The model of a checkpoint, ready to look at images; `load` makes it.

    Raises:
        UserError: It has no heads.
    """

    def __init__(self, loaded: LoadedModel):
        if not loaded.model.label_space.heads:
            raise UserError(
                f'{loaded.checkpoint.path}: trained with -wlc 0, so it has no heads to predict with; train some from '
                'it with --initial-checkpoint')
        self.loaded = loaded

    @classmethod
    def load(
            cls,
            path: str | Path,
            device: str | torch.device | None = None,
            weights: str = 'best',
            head_module: str | None = None,
            allow_hub: bool = False,
    ) -> 'Predictor':
        """Read a checkpoint.

        Args:
            path: The checkpoint file.
            device: Where to compute; CUDA where there is one when None.
            weights: 'best' (those that made the checkpoint what it is), 'plain' or 'ema'.
            head_module: Python file with the kinds of heads of your own.
            allow_hub: Look up a model that the file names and that is none of timm's own (`hf-hub:...`).

        Raises:
            UserError: The file cannot be used.
        """
        device = torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))
        return cls(LoadedModel.of(
            read_checkpoint(path), weights, Precision(device), load_registry(head_module), allow_hub))

    @property
    def label_space(self) -> LabelSpace:
        """The heads with their classes."""
        return self.loaded.model.label_space

    @property
    def without_probabilities(self) -> frozenset[str]:
        """The heads of classes whose kind has no probabilities, which say their label alone."""
        return self.loaded.model.without_probabilities

    def __call__(
            self,
            images: ImageLike | Sequence[ImageLike],
            top_k: int = 1,
            threshold: float | Thresholds | None = None,
    ) -> dict[str, list[Guess]] | list[dict[str, list[Guess]]]:
        """What the heads make of an image, {head: guesses}, or of each image of a list.

        Args:
            images: A path, a PIL image or pixels (H, W, 3) or (H, W), uint8, RGB or grey; or a list of them.
            top_k: How many classes of a head to name at most.
            threshold: The least probability of a label, or {head: probability}, see `image_predictions.guess`.

        Raises:
            UserError: An image cannot be read.
        """
        if isinstance(images, ImageLike):
            return self.of_list([images], top_k, threshold)[0]
        return self.of_list(images, top_k, threshold)

    def of_list(
            self,
            images: Sequence[ImageLike],
            top_k: int = 1,
            threshold: float | Thresholds | None = None,
    ) -> list[dict[str, list[Guess]]]:
        """What the heads make of each image of a list; see `__call__`."""
        photos = _Given(images)
        thresholds: Thresholds
        if isinstance(threshold, Mapping):
            thresholds = threshold
        else:
            thresholds = {} if threshold is None else {'': threshold}
        check_thresholds(thresholds, self.label_space, self.without_probabilities)
        if top_k < 1:
            raise UserError(f'top_k is {top_k}, expected 1 or more')
        part = self.loaded.part(photos.rows(self.label_space), photos)
        return [answer.guesses for answers in self.answer(part, _BATCH, 0, top_k, thresholds) for answer in answers]

    def answer(
            self,
            part: ImageDataset,
            batch_size: int,
            workers: int,
            top_k: int,
            thresholds: Thresholds,
            block: int | None = None,
    ) -> Iterator[Iterator[ImagePrediction]]:
        """What is said of the images of a part, in order, a batch at a time, which is to be read before the next one.

        Args:
            part: Of `LoadedModel.part`; where it keeps bad images, they have answers with an error.
            batch_size: Images of a batch.
            workers: Loader processes; none for a single batch.
            top_k: See `image_predictions.guess`, as the next.
            thresholds: Those that `check_thresholds` has let pass.
            block: No batch has images of two blocks of so many.
        """
        first = 0
        for images in self.loaded.batches(part, batch_size, workers, block):
            guesses = guess_all(
                self.label_space, self.loaded.probabilities(images), top_k, thresholds, self.without_probabilities
            )
            yield (_answer(part, index, of_image) for index, of_image in enumerate(guesses, first))
            first += len(images)


def _answer(part: ImageDataset, index: int, guesses: dict[str, list[Guess]]) -> ImagePrediction:
    """What is said of an image of a part; of a bad one why it is so."""
    bad = part.bad is not None and bool(part.bad[index])
    image = str(part.rows.images[index])
    return ImagePrediction(image, {}, reason_of(part, index)) if bad else ImagePrediction(image, guesses, None)


class _Given:
    """The photos of a list of paths, PIL images and arrays.

    Args:
        images: Paths, PIL images or arrays, in any mixture.

    Raises:
        UserError: One of them is nothing of the kind.
    """

    def __init__(self, images: Sequence[ImageLike]):
        self.images = list(images)
        for number, image in enumerate(self.images):
            if not isinstance(image, ImageLike):
                raise UserError(f'image {number}: a {type(image).__name__}, expected a path, a PIL image '
                                'or a numpy array')
            if isinstance(image, np.ndarray) and (
                    image.dtype != np.uint8 or image.ndim not in (2, 3) or image.ndim == 3 and image.shape[2] != 3
                    or not image.size):
                raise UserError(f'image {number}: {image.dtype} pixels of shape {image.shape}, expected '
                                'uint8 (H, W, 3) in RGB, or (H, W)')

    def rows(self, label_space: LabelSpace) -> Rows:
        """Rows without labels for them."""
        names = [image if isinstance(image, str) else str(image) if isinstance(image, Path) else '' for image
                 in self.images]
        count = len(names)
        return Rows(
            np.array(names, dtype=object), missing_targets(label_space, count), np.zeros(count, np.int64),
            (Path('the list'),), np.zeros(count, np.int64))

    def __getitem__(self, index: int) -> Photo:
        image = self.images[index]
        if isinstance(image, str | Path):
            return read_photo(str(image), f'image {index}')
        try:
            image = Image.fromarray(image) if isinstance(image, np.ndarray) else ImageOps.exif_transpose(image)
            return DecodedPhoto(np.asarray(to_rgb(image)))
        except Exception as error:  # Pillow reads the pixels only now, and each decoder raises its own kind
            raise UserError(f'image {index}: cannot be decoded ({error})') from error
