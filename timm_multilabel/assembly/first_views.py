"""The views that training made of a few photos, made again."""
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from timm_multilabel.assembly.checks import check_phases
from timm_multilabel.assembly.data import read_data
from timm_multilabel.assembly.loaders import create_loaders
from timm_multilabel.assembly.model import has_one_view
from timm_multilabel.assembly.views import which_views
from timm_multilabel.config.train import TrainSettings
from timm_multilabel.data.streams import StreamedRows
from timm_multilabel.log import silent
from timm_multilabel.training.checkpoint import read_checkpoint
from timm_multilabel.training.run_folder import phase_folder


def first_views(
        settings: TrainSettings,
        run: Path,
        data_dir: Path | None,
        data_config: dict[str, Any],
        count: int = 12,
) -> tuple[list[list[np.ndarray]], str]:
    """Views of some photos as the first epoch had them, after random erasing and mixing.

    Of a run with phases they are of the last phase with SimCLR, or else of the last one.

    Args:
        settings: Of the whole run, with its phases.
        run: Its folder.
        data_dir: The data directory; that of the run when None.
        data_config: Of the run's best checkpoint.
        count: Photos, half of them of the unlabelled ones where batches have some.

    Returns:
        For each photo its views (H, W, 3), uint8, and a line on what they are.

    Raises:
        UserError: The training images cannot be read.
    """
    phases = check_phases(settings)
    index = max((number for number, phase in enumerate(phases)
                 if phase.settings.objective.simclr_loss_weight), default=len(phases) - 1)
    folder, chosen = phase_folder(run, [phase.name for phase in phases], index), phases[index].settings
    if folder != run and (folder / 'last.pth.tar').is_file():
        data_config = read_checkpoint(folder / 'last.pth.tar', mapped=True).data_config  # sizes may differ
    chosen = chosen.replace(data_dir=str(data_dir or chosen.data.data_dir), workers=0, cache=None)
    data = read_data(chosen, silent)
    if isinstance(data.pool_rows, StreamedRows):  # which came first depends on the loader processes
        data = replace(data, pool_rows=None)
    of_pool = min(count // 2, len(data.pool_rows)) if data.pool_rows is not None else 0
    labelled = min(count - of_pool, len(data.train_rows))
    if chosen.augmentation.mixup or chosen.augmentation.cutmix:
        labelled -= labelled % 2  # pairs are mixed
    data = replace(data, eval_rows=None, batch_size=labelled, pool_batch_size=of_pool, steps=1)
    views = 1 if has_one_view(chosen) else 2
    loader = create_loaders(chosen, data, data_config, views, torch.device('cpu'), silent, cache=False).train
    loader.set_epoch(0)
    images, _ = next(iter(loader))
    mean, std = (torch.tensor(data_config[name]).view(1, 3, 1, 1) for name in ('mean', 'std'))
    pixels = ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    made = pixels.permute(0, 2, 3, 1).unflatten(0, (views, -1)).numpy()
    return [list(made[:, photo]) for photo in range(made.shape[1])], _describe(
        chosen, phases[index].name if len(phases) > 1 else '', made.shape[2:4], views, of_pool)


def _describe(settings: TrainSettings, phase: str, size: tuple[int, int], views: int, of_pool: int) -> str:
    of_phase = f' of phase {phase}' if phase else ''
    pairs = 'Pairs of views' if views == 2 else 'Views, one a photo,'
    pool = f'; the last {of_pool} photos are unlabelled ones' if of_pool else ''
    weak = ''
    if views == 2 and settings.augmentation.weak_first_view:
        weak = '; the first view of each pair is the weak one'
    elif of_pool and settings.pool.pseudo_label_weight:
        weak = ', whose first view is the weak one'
    return (f'{pairs} as the model saw them in the first epoch{of_phase}: {size[1]}x{size[0]} pixels, made by --views '
            f'{which_views(settings)}{pool}{weak}.')
