"""From the flags of training to its batches: view recipes, caches, loaders."""
import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup

from timm_multilabel.cli.data import Data
from timm_multilabel.cli.device import loader_workers
from timm_multilabel.data.images import FilePhotos, Photos
from timm_multilabel.data.streams import StreamedRows
from timm_multilabel.data.table import Rows
from timm_multilabel.distributed import world
from timm_multilabel.errors import UserError
from timm_multilabel.labels import missing_row
from timm_multilabel.loading.batches import BadImages, ImageDataset, Views
from timm_multilabel.loading.cache import CachedPhotos, open_cache
from timm_multilabel.loading.device import DeviceDataset, DeviceEvalLoader, DeviceTrainLoader, fits
from timm_multilabel.loading.loaders import MixedBatches, create_eval_loader, create_train_loader
from timm_multilabel.loading.shared import format_size
from timm_multilabel.loading.streaming import create_stream_loader
from timm_multilabel.task import JointTask
from timm_multilabel.views.opencv import OpenCVViews
from timm_multilabel.views.pillow import PillowViews, eval_views, exact_transform, timm_transform
from timm_multilabel.views.recipe import ViewRecipe, weak_recipe

Say = Callable[[str], None]

SIMCLR_VIEWS = {'scale': (0.2, 1.0), 'jitter': (0.4, 0.4, 0.4, 0.1), 'grayscale_prob': 0.1}
"""What `--views simclr` has unless flags say otherwise: half of what SimCLR's own recipe does to colors, which at full
strength takes them from the heads (experiments/views)."""


def which_views(args: argparse.Namespace) -> str:
    """The recipe of training views: the one asked for, else SimCLR's where SimCLR is on and no policy of timm's is."""
    return args.views or ('simclr' if args.simclr_loss_weight and not args.aa else 'timm')


def weak_first(args: argparse.Namespace) -> bool:
    """Whether the first view of a pair is a weak one."""
    return bool(args.weak_first_view or args.pseudo_label_weight)


def view_recipe(args: argparse.Namespace, data_config: dict[str, Any]) -> ViewRecipe:
    """SimCLR's recipe at half its strength, with what the flags say otherwise."""
    jitter = args.color_jitter
    wishes = {
        'scale': args.scale and tuple(args.scale),
        'jitter': jitter and tuple((3 * jitter if len(jitter) == 1 else jitter) + [0.0])[:4],
        'jitter_prob': args.color_jitter_prob,
        'grayscale_prob': args.grayscale_prob,
        'blur_prob': args.gaussian_blur_prob,
    }
    return ViewRecipe(
        **_placing(args, data_config, 'bilinear'),
        ratio=tuple(args.ratio),
        rotation=args.rotation,
        **{**SIMCLR_VIEWS, **{name: wish for name, wish in wishes.items() if wish is not None}},
    )


def _placing(args: argparse.Namespace, data_config: dict[str, Any], interpolation: str) -> dict[str, Any]:
    return {
        'size': tuple(data_config['input_size'][-2:]),
        'hflip': args.hflip,
        'vflip': args.vflip,
        'interpolation': args.train_interpolation or interpolation,
    }


def train_views(args: argparse.Namespace, data_config: dict[str, Any], count: int, weak_first: bool = False) -> Views:
    """What makes the training views of an image.

    Args:
        args: The flags.
        data_config: timm's.
        count: Views of an image.
        weak_first: Of two, the first is FixMatch's weak one.
    """
    kind, weak_first = which_views(args), weak_first and count == 2
    weak = weak_recipe(**_placing(args, data_config, 'random' if kind == 'timm' else 'bilinear'))
    if kind == 'simclr':
        strong = view_recipe(args, data_config)
        return OpenCVViews([weak if weak_first else strong] + [strong] * (count - 1))
    strong = _timm_transform(args, data_config) if kind == 'timm' else exact_transform(view_recipe(args, data_config))
    return PillowViews([exact_transform(weak) if weak_first else strong] + [strong] * (count - 1), weak.size)


def _timm_transform(args: argparse.Namespace, data_config: dict[str, Any]):
    jitter = args.color_jitter or [0.4]
    try:
        return timm_transform(
            **_placing(args, data_config, 'random'),
            scale=args.scale or [0.08, 1.0],
            ratio=args.ratio,
            rotation=args.rotation,
            color_jitter=jitter[0] if len(jitter) == 1 else tuple(jitter),
            color_jitter_prob=args.color_jitter_prob,
            grayscale_prob=args.grayscale_prob or 0.0,
            gaussian_blur_prob=args.gaussian_blur_prob or 0.0,
            auto_augment=args.aa,
            mean=tuple(data_config['mean']),
        )
    except (AssertionError, ValueError, KeyError) as error:
        if not args.aa:
            raise
        raise UserError(f'--aa {args.aa}: timm knows no such policy') from error


class Loaders:
    """The batches of a run, or of a phase of it.

    `train` are training batches, `eval` evaluation batches or None, `bad` the bad images that were left out, or None
    where one ends the run.

    Args:
        args: The flags.
        task: What is trained.
        data: The rows.
        data_config: timm's.
        device: Where the batches go.
        say: Prints a line.
        cache: Open the cache that the flags ask for.
    """

    def __init__(
            self,
            args: argparse.Namespace,
            task: JointTask,
            data: Data,
            data_config: dict[str, Any],
            device: torch.device,
            say: Say,
            cache: bool = True,
    ):
        self.args, self.device, self.say = args, device, say
        self.workers = loader_workers(args.workers)
        rank, ranks = world()
        shared = {
            'mean': tuple(data_config['mean']), 'std': tuple(data_config['std']), 'rank': rank, 'ranks': ranks}
        of_train = {
            'views': task.views,
            'seed': args.seed,
            'steps': data.steps,
            're_prob': args.reprob,
            're_mode': args.remode,
            're_count': args.recount,
            're_num_splits': 2 if task.views == 2 and weak_first(args) else 0,  # the first, weak views stay whole
        }
        streamed = [isinstance(rows, StreamedRows) for rows in (data.train_rows, data.eval_rows)]
        if args.cache and any(streamed):
            raise UserError(f'--cache {args.cache}: shards are streamed, and nothing of them is kept; leave it out')
        of_stream = {'device': device, 'workers': self.workers, 'skip_bad': args.skip_bad_images, **shared}
        kind = args.cache if cache else None
        on_device = None
        if streamed[0]:
            self.train = create_stream_loader(
                data.train_rows, train_views(args, data_config, task.views, args.weak_first_view), data.batch_size,
                **of_stream, **of_train)
            parts = [self.train.loader.dataset]
        else:
            parts, on_device = self._train_on_files(task, data, data_config, kind, shared, of_train)
        if args.mixup or args.cutmix:
            self.train = MixedBatches(self.train, _mixup(args, task), task.label_space, args.seed, rank)
        self.eval = None
        if data.eval_rows is not None:
            views = eval_views(
                tuple(data_config['input_size'][-2:]), data_config['interpolation'], data_config['crop_pct'],
                data_config['crop_mode'])
            size = args.validation_batch_size or args.micro_batch or args.batch_size
            if streamed[1]:
                self.eval = create_stream_loader(data.eval_rows, views, size, **of_stream)
                parts.append(self.eval.loader.dataset)
            else:
                photos = self._open(data.eval_rows, views, None if kind == 'device' else kind)
                part = ImageDataset(data.eval_rows, photos, views)
                if args.skip_bad_images:
                    part.skip_bad(stand_in=missing_row(task.label_space))
                parts.append(part)
                self.eval = create_eval_loader(part, size, device=device, workers=self.workers, **shared)
            if cache and not streamed[1]:
                self.eval.loader.start()
            if on_device is not None:
                self.eval = DeviceEvalLoader(self.eval, shared['mean'], shared['std'])
        self.bad = BadImages(parts) if args.skip_bad_images else None

    def _train_on_files(
            self,
            task: JointTask,
            data: Data,
            data_config: dict[str, Any],
            kind: str | None,
            shared: dict[str, Any],
            of_train: dict[str, Any],
    ) -> tuple[list[ImageDataset], list[DeviceDataset] | None]:
        """Make the training batches of image files; their parts, and those on the device, if they are there."""
        views = train_views(self.args, data_config, task.views, self.args.weak_first_view)
        sets = [(data.train_rows, views, data.batch_size)]
        if data.pool_rows is not None:
            views = train_views(self.args, data_config, task.views, weak_first(self.args))
            sets.append((data.pool_rows, views, data.pool_batch_size))
        sizes = [size for _, _, size in sets]
        photos = [self._open(rows, views, 'ram' if kind == 'device' else kind) for rows, views, _ in sets]
        on_device = None
        if kind == 'device' and all(isinstance(each, CachedPhotos) for each in photos):
            evaluated = 0 if data.eval_rows is None else -(-len(data.eval_rows) // world()[1])
            further = evaluated * math.prod(data_config['input_size'])
            on_device = self._copy(photos, [views for _, views, _ in sets], further)
        parts = [ImageDataset(rows, each, views) for (rows, views, _), each in zip(sets, photos)]
        if self.args.skip_bad_images:
            for part in parts:
                part.skip_bad()
                if isinstance(part.photos, CachedPhotos):
                    part.bad |= torch.from_numpy(part.photos.contents.bad)
                    part.photos = part.photos if on_device is None else part.photos.files  # its memory is given back
        if on_device is not None:
            self.train = DeviceTrainLoader(list(zip(on_device, sizes)), **shared, **of_train)
        else:
            self.train = create_train_loader(
                list(zip(parts, sizes)), device=self.device, workers=self.workers, **shared, **of_train)
        return parts, on_device

    def _open(self, rows: Rows, views: Views, kind: str | None) -> Photos:
        """The photos of rows, from a cache where one is asked for."""
        files = FilePhotos(rows)
        if kind is None:
            return files
        return open_cache(
            kind, files, views, folder=Path(self.args.cache_dir).expanduser(), workers=self.workers,
            skip_bad=self.args.skip_bad_images, say=self.say, flag=self.args.cache)

    def _copy(
            self,
            photos: Sequence[CachedPhotos],
            views: Sequence[OpenCVViews],
            further: int,
    ) -> list[DeviceDataset] | None:
        """The photos on the device; None if they, and so many further bytes, would not fit."""
        size, free = fits(photos, further, self.device)
        if size > free:
            self.say(f'--cache device: {format_size(size)} (every image takes the room of the largest) would not '
                     f'fit into the {format_size(free)} of {self.device} that may be used; goes on with --cache ram')
            return None
        self.say(f'--cache device: {format_size(size)} on {self.device}, where the views are made')
        return [DeviceDataset.copy(each, its.recipes, self.device) for each, its in zip(photos, views)]


def _mixup(args: argparse.Namespace, task: JointTask) -> Mixup:
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=0.0,  # the heads' losses smooth
        num_classes=sum(task.label_space.sizes),
        multi_label=True,  # targets are one-hot rows of all heads
    )
