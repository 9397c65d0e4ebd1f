"""From the flags of a probe to the features of its splits."""
import os
import shutil

import numpy as np
import torch

from timm_multilabel.assembly.data import Data
from timm_multilabel.assembly.device import loader_options
from timm_multilabel.config.commands import ProbeSettings
from timm_multilabel.config.train import DataSettings, TrainSettings
from timm_multilabel.data.pool import keep_labels
from timm_multilabel.data.table import Rows
from timm_multilabel.distributed import all_objects, world
from timm_multilabel.errors import DataError, SettingError
from timm_multilabel.labels import missing_row
from timm_multilabel.loading.batches import BadImages
from timm_multilabel.loading.cache import stamps_of
from timm_multilabel.loading.shared import format_size, free_memory
from timm_multilabel.log import say
from timm_multilabel.model_names import JOIN
from timm_multilabel.probing.features import Embedder
from timm_multilabel.probing.fit import Labelled
from timm_multilabel.training.progress_bar import ProgressBar

_SHARE = 0.8  # of the memory or the disk that is free, what features may take at most


def as_training(settings: ProbeSettings) -> TrainSettings:
    """What training would be told that trains the heads alone on the same data; args.yaml of the run."""
    if settings.input_size and settings.input_size[0] != 3:
        raise SettingError(f'--input-size {settings.input_size[0]} ...: images are RGB, so the first number is 3')
    if settings.pretrained_path and len(settings.pretrained_path) != len(settings.model):
        raise SettingError(f'--pretrained-path: {len(settings.pretrained_path)} files for {len(settings.model)} '
                           'models; pass one for each --model, in their order')
    for path in settings.pretrained_path if len(settings.model) > 1 else []:
        if os.pathsep in path:
            raise SettingError(f"--pretrained-path {path}: '{os.pathsep}' in its name would separate files; rename it")
    for name in settings.model:
        if JOIN in name and not name.startswith('local-dir:'):
            raise SettingError(f'--model {name}: pass a --model for each')
    flat = settings.flat()
    same = (*DataSettings.settings(), 'img_size', 'input_size', 'pretrained', 'interpolation', 'crop_pct', 'crop_mode',
            'labelled_rows', 'batch_size', 'device', 'amp', 'seed', 'output', 'experiment')
    return TrainSettings.of({
        **{name: flat[name] for name in same if name in flat and name != 'cache_dir'},
        'model': JOIN.join(settings.model), 'pretrained_path': os.pathsep.join(settings.pretrained_path) or None,
        'model_kwargs': {'mirrored': True} if settings.tta else {}, 'freeze_backbone': True, 'simclr_loss_weight': 0.0,
        'smoothing': 0.0})


def choose_rows(settings: ProbeSettings, rows: Rows, data: Data) -> np.ndarray:
    """The places of the rows that heads are fitted on."""
    asked = settings.labelled_rows
    if not asked:
        return np.arange(len(rows))
    if len(rows) < asked:
        raise DataError(f'--labelled-rows {asked}: {rows.source} has {len(rows)} rows with labels; ask for as many at '
                        'most')
    say(f'{rows.source}: the labels of {asked} of {len(rows)} rows, drawn by --seed {settings.seed}')
    kept = keep_labels(rows, data.label_space, asked, settings.seed)
    return np.flatnonzero(data.label_space.labelled(kept.targets).any(dim=1).numpy())


class SplitFeatures:
    """The features of a split, on disk. All ranks make it together.

    Args:
        embedder: What makes them.
        rows: All rows of the split.
        chosen: The places of those that are used (R,).
    """

    def __init__(self, embedder: Embedder, rows: Rows, chosen: np.ndarray):
        self.embedder, self.rows, self.chosen = embedder, rows, chosen
        self.files = embedder.files(rows)
        if world()[0] == 0:
            for file in self.files:
                file.create()
        all_objects(None)

    def lacking(self) -> np.ndarray:
        """Which features (backbones, R) of the chosen rows are not there."""
        stamps = stamps_of(self.rows.images[self.chosen])
        return np.stack([file.missing(self.chosen, stamps) for file in self.files])

    def compute(self, settings: ProbeSettings, stand_in: torch.Tensor | None) -> None:
        """Compute what is missing, each rank its share, and leave out images that cannot be decoded.

        Args:
            settings: Sizes of batches, processes.
            stand_in: Targets (W,) of an image that cannot be decoded; when None, it is an error.

        Raises:
            DataError: An image cannot be decoded, or features are missing afterwards.
        """
        (rank, ranks), embedder = world(), self.embedder
        todo = self.chosen[all_objects(self.lacking().any(axis=0))[0]]
        if not len(todo):
            say(f'{self.rows.source}: the features of {len(self.chosen):,} images are in {embedder.folder}')
            return
        mine = np.array_split(todo, ranks)[rank]
        options = loader_options(embedder.data_config, embedder.precision.device, settings.workers)
        options |= {'rank': 0, 'ranks': 1}
        batches = -(-len(mine) // settings.batch_size)
        title = f'Embed {self.rows.source.name}'
        with ProgressBar(title, batches, rank == 0, settings.batch_size * ranks) as bar:
            part = embedder.embed(
                self.files, self.rows, mine, {**options, 'batch_size': settings.batch_size}, stand_in, bar)
        news = BadImages([part]).news() if stand_in is not None else all_objects(None)
        if isinstance(news, str):
            say(news)
        left = self.lacking().any(axis=0)
        if left.any() and stand_in is None:
            raise DataError(
                f'{embedder.folder}: lacks {int(left.sum())} of {len(self.chosen)} features; images have changed '
                'meanwhile, or the machines do not share this folder: name another with --cache-dir')
        self.chosen = self.chosen[~left]

    def labelled(self) -> Labelled:
        """Features of all backbones and targets of the chosen rows, on the device."""
        device = self.embedder.precision.device
        features = torch.cat([file.read(self.chosen) for file in self.files], dim=1)
        return Labelled(features.to(device), self.rows.targets[torch.from_numpy(self.chosen)].to(device))


def check_room(splits: list[SplitFeatures]) -> None:
    """Raise UserError where features do not fit on the disk, or into the memory of the fit; else tell their size."""
    embedder = splits[0].embedder
    widths = np.array(embedder.backbones.widths)
    on_disk = sum(int(2 * (widths * split.lacking().sum(axis=1)).sum()) for split in splits)
    free = int(_SHARE * shutil.disk_usage(embedder.folder).free)
    if on_disk > free:
        raise SettingError(
            f'--cache-dir {embedder.folder.parent}: features of {format_size(on_disk)} would not fit into the '
            f'{format_size(free)} that may be used; name a folder on another disk, or take --labelled-rows N')
    # As they are, in float32, standardized, and on other axes.
    in_memory = sum(14 * len(split.chosen) * int(widths.sum()) for split in splits)
    device = embedder.precision.device
    free = int(_SHARE * (torch.cuda.mem_get_info(device)[0] if device.type == 'cuda' else free_memory()))
    if in_memory > free:
        raise SettingError(
            f'features of {sum(len(split.chosen) for split in splits):,} images x {int(widths.sum()):,} numbers take '
            f'{format_size(in_memory)} while heads are fitted, and {format_size(free)} of {device} may be used; take '
            '--labelled-rows N, or fewer or narrower models')
    if on_disk:
        say(f'features: {format_size(on_disk)} more in {embedder.folder}, and {format_size(in_memory)} of memory while '
            'heads are fitted')


def stand_in(settings: ProbeSettings, data: Data) -> torch.Tensor | None:
    """The targets of an image that cannot be decoded, where such are left out."""
    return missing_row(data.label_space) if settings.skip_bad_images else None
