"""From the flags of training to its batches: view recipes, caches, loaders."""
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch

from timm_multilabel.assembly.data import Data
from timm_multilabel.assembly.device import loader_options
from timm_multilabel.assembly.pool_shards import read_fingerprints
from timm_multilabel.assembly.views import PhotoViews, make_mixup, train_views, weak_first
from timm_multilabel.config.train import DataSettings, TrainSettings
from timm_multilabel.data.images import FilePhotos, Photos
from timm_multilabel.data.streams import StreamedRows
from timm_multilabel.data.table import Rows
from timm_multilabel.errors import SettingError
from timm_multilabel.labels import missing_row
from timm_multilabel.loading.batches import BadImages, EvalBatches, ImageDataset, LeavesOutBad, TrainBatches
from timm_multilabel.loading.cache import CachedPhotos, open_cache
from timm_multilabel.loading.copies import with_copies
from timm_multilabel.loading.device import DeviceDataset, DeviceEvalLoader, DeviceTrainLoader, fits
from timm_multilabel.loading.loaders import MixedBatches, WatchedLoader, create_eval_loader, create_train_loader
from timm_multilabel.loading.shared import format_size
from timm_multilabel.loading.soft_labels import SoftLabels
from timm_multilabel.loading.streaming import (
    KeptOutOfPool,
    StreamedImages,
    create_joined_loader,
    create_stream_loader,
)
from timm_multilabel.log import Say
from timm_multilabel.places import local_path
from timm_multilabel.views.opencv import OpenCVViews
from timm_multilabel.views.pillow import scoring_views
from timm_multilabel.views.told import Told


@dataclass(frozen=True)
class Loaders:
    """The batches of a run, or of a phase of it.

    Args:
        train: Training batches.
        eval: Evaluation batches; None where nothing is scored.
        bad: The bad images that were left out; None where one ends the run.
        kept_out: Counts what is kept out of unlabelled samples; None where they do not come of shards.
    """
    train: TrainBatches
    eval: EvalBatches | None
    bad: BadImages | None
    kept_out: KeptOutOfPool | None = None


class _TrainOptions(TypedDict):
    """What the loaders of training share beside `LoaderOptions`."""
    views: int
    seed: int
    steps: int
    re_prob: float
    re_mode: str
    re_count: int
    re_num_splits: int


def create_loaders(
        settings: TrainSettings,
        data: Data,
        data_config: dict[str, Any],
        views: int,
        device: torch.device,
        say: Say,
        cache: bool = True,
        soft_labels: Sequence[SoftLabels] = (),
        told: Told = Told(),  # noqa: B008 (frozen)
) -> Loaders:
    """Make the loaders, and the cache that the settings ask for.

    Args:
        settings: Of the run, or of a phase.
        data: Rows of training and evaluation, and the sizes of batches.
        data_config: Input size, normalisation and resizing, as timm names them.
        views: Training views of an image.
        device: Where the batches go.
        say: Tells a line.
        cache: Open the cache; without it nothing is read, and no process is started.
        soft_labels: Those of the training rows and of the pool, if there are any.
        told: What training is told of each view.

    Raises:
        SettingError: A cache that cannot be had.
    """
    of_data, augmentation, run = settings.data, settings.augmentation, settings.run
    options = loader_options(data_config, device, of_data.workers)
    rank, ranks = options['rank'], options['ranks']
    of_train: _TrainOptions = {
        'views': views,
        'seed': run.seed,
        'steps': data.steps,
        're_prob': augmentation.reprob or 0.0,
        're_mode': augmentation.remode,
        're_count': augmentation.recount,
        're_num_splits': 2 if views == 2 and weak_first(settings) else 0,  # the first, weak views stay whole
    }
    _check_cache(of_data.cache, data, say)
    photos = _Photos(of_data, options['workers'], device, say, of_data.cache if cache else None)
    sets = [(data.train_rows, train_views(settings, data_config, views, bool(augmentation.weak_first_view), told))]
    sizes = [data.batch_size]
    if data.pool_rows is not None:
        sets.append((data.pool_rows, train_views(settings, data_config, views, weak_first(settings), told)))
        sizes.append(data.pool_batch_size)
    of_rows = [(rows, its_views) for rows, its_views in sets if isinstance(rows, Rows)]
    evaluated = 0 if data.eval_rows is None else -(-len(data.eval_rows) // ranks)
    parts, on_device = photos.datasets(
        of_rows, further=evaluated * math.prod(data_config['input_size']), soft_labels=soft_labels)
    train: TrainBatches
    evaluation: EvalBatches | None = None
    datasets: list[LeavesOutBad] = [*parts]
    kept_out = None
    if len(parts) < len(sets):
        rest = iter(parts)
        images = [_streamed(rows, its_views, options['workers'], say, cache) if isinstance(rows, StreamedRows)
                  else next(rest) for rows, its_views in sets]
        train = joined = create_joined_loader(
            list(zip(images, sizes)), skip_bad=of_data.skip_bad_images, **options, **of_train)
        datasets = [joined.batches]
        kept_out = next((KeptOutOfPool(part) for part in joined.streamed if part.images.kept_out is not None), None)
        if joined.order_depends_on < options['workers']:
            say(f'{joined.order_depends_on} of {options["workers"]} loader processes, to which the shards can be dealt '
                'out evenly; write more shards to use more')
    elif on_device is not None:
        train = DeviceTrainLoader(
            list(zip(on_device, sizes)), mean=options['mean'], std=options['std'], rank=rank, ranks=ranks, **of_train)
    else:
        train = create_train_loader(list(zip(parts, sizes)), **options, **of_train)
    if augmentation.mixup or augmentation.cutmix:
        mixup = make_mixup(augmentation, sum(data.label_space.sizes))
        train = MixedBatches(train, mixup, data.label_space, run.seed, rank)
    if data.eval_rows is not None:
        if data_config['crop_mode'] == 'border':
            say('--crop-mode border: evaluation puts borders around images, which training does not show; compare with '
                '--crop-mode center and squash')
        resized, size = scoring_views(data_config), run.validation_batch_size or run.micro_batch or run.batch_size
        if isinstance(data.eval_rows, StreamedRows):
            evaluation = streamed = create_stream_loader(
                data.eval_rows, resized, size, skip_bad=of_data.skip_bad_images, **options)
            datasets.append(streamed.batches)
        else:
            kind = None if photos.kind == 'device' else photos.kind
            dataset = ImageDataset(data.eval_rows, photos.open(data.eval_rows, resized, kind), resized)
            if of_data.skip_bad_images:
                dataset.skip_bad(stand_in=missing_row(data.label_space))
            datasets.append(dataset)
            evaluation = made = create_eval_loader(dataset, size, **options)
            if cache and isinstance(made.loader, WatchedLoader):
                made.loader.start()
        if on_device is not None:
            evaluation = DeviceEvalLoader(evaluation, options['mean'], options['std'])
    return Loaders(train, evaluation, BadImages(datasets) if of_data.skip_bad_images else None, kept_out)


def _check_cache(kind: str | None, data: Data, say: Say) -> None:
    """Raise UserError where a cache would have to keep images of shards; say what it does not keep."""
    if kind is None:
        return
    if any(isinstance(rows, StreamedRows) for rows in (data.train_rows, data.eval_rows)):
        raise SettingError(f'--cache {kind}: shards are streamed, and nothing of them is kept; leave it out')
    if isinstance(data.pool_rows, StreamedRows):
        if kind == 'device':
            raise SettingError(f'--cache device: the unlabelled images of {data.pool_rows.source} are streamed, and '
                               'their views are not made on the device; pass --cache ram or disk')
        say(f'--cache {kind}: keeps the images of tables; those of {data.pool_rows.source} are streamed')


def _streamed(rows: StreamedRows, views: PhotoViews, workers: int, say: Say, is_read: bool) -> StreamedImages:
    """Streamed samples with their views; what is kept out of them is known only where it may be read."""
    if rows.kept_out is None or not is_read:
        return StreamedImages(rows, views)
    return StreamedImages(rows, views, read_fingerprints(rows.kept_out, workers, say))


@dataclass(frozen=True)
class _Photos:
    """Opens photos, from a cache where one is asked for; `kind` is the cache."""
    settings: DataSettings
    workers: int
    device: torch.device
    say: Say
    kind: str | None

    def open(self, rows: Rows, views: PhotoViews, kind: str | None) -> Photos:
        """The photos of rows."""
        files, folder = FilePhotos(rows), local_path(self.settings.cache_dir).expanduser()
        if kind == 'disk':
            files = with_copies(files, folder / 'copies', self.settings.skip_bad_images, self.say)
        if kind is None:
            return files
        return open_cache(
            kind, files, views, folder=folder, workers=self.workers,
            skip_bad=self.settings.skip_bad_images, say=self.say, flag=self.settings.cache)

    def datasets(
            self,
            sets: Sequence[tuple[Rows, PhotoViews]],
            further: int,
            soft_labels: Sequence[SoftLabels] = (),
    ) -> tuple[list[ImageDataset], list[DeviceDataset] | None]:
        """The datasets of training, and those on the device, if they are there.

        Args:
            sets: Rows with their views.
            further: Bytes that the device must hold beside them.
            soft_labels: Of each set, if there are any.
        """
        soft: Sequence[SoftLabels | None] = soft_labels or [None] * len(sets)
        photos = [self.open(rows, views, 'ram' if self.kind == 'device' else self.kind) for rows, views in sets]
        cached = [each for each in photos if isinstance(each, CachedPhotos)]
        fast = [views for _, views in sets if isinstance(views, OpenCVViews)]
        on_device = None
        if self.kind == 'device' and len(cached) == len(fast) == len(sets):
            on_device = self._copy(cached, fast, further, soft)
        datasets = [ImageDataset(rows, each, views, soft_labels=its) for (rows, views), each, its
                    in zip(sets, photos, soft, strict=True)]
        if self.settings.skip_bad_images:
            for dataset in datasets:
                dataset.skip_bad()
                if isinstance(dataset.photos, CachedPhotos) and dataset.bad is not None:
                    dataset.bad |= torch.from_numpy(dataset.photos.contents.bad)
                    # On the device, the memory of the copy on the host is given back.
                    dataset.photos = dataset.photos if on_device is None else dataset.photos.files
        return datasets, on_device

    def _copy(
            self,
            photos: Sequence[CachedPhotos],
            views: Sequence[OpenCVViews],
            further: int,
            soft_labels: Sequence[SoftLabels | None],
    ) -> list[DeviceDataset] | None:
        """The photos on the device; None if they, and so many further bytes, would not fit."""
        further += sum(4 * len(each) * its.width for each, its in zip(photos, soft_labels, strict=True) if its)
        size, free = fits(photos, further, self.device)
        if size > free:
            self.say(f'--cache device: {format_size(size)} (every image takes the room of the largest) would not '
                     f'fit into the {format_size(free)} of {self.device} that may be used; goes on with --cache ram')
            return None
        self.say(f'--cache device: {format_size(size)} on {self.device}, where the views are made')
        return [DeviceDataset.copy(each, its.recipes, self.device, soft, its.told) for each, its, soft
                in zip(photos, views, soft_labels, strict=True)]
