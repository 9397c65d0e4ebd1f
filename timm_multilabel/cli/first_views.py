"""The views that training made of a few photos, made again."""
import argparse
import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from timm_multilabel.cli.batches import Loaders, which_views
from timm_multilabel.cli.checks import check_phases
from timm_multilabel.cli.data import read_data
from timm_multilabel.training.checkpoint import read_checkpoint
from timm_multilabel.training.run_folder import phase_folder


def first_views(
        flags: argparse.Namespace,
        run: Path,
        data_dir: Path | None,
        data_config: dict[str, Any],
        count: int = 12,
) -> tuple[list[list[np.ndarray]], str]:
    """Views of some photos as the first epoch had them, after random erasing and mixing.

    Of a run with phases they are of the last phase with SimCLR, or else of the last one.

    Args:
        flags: Of the run.
        run: Its folder.
        data_dir: The data directory; that of the run when None.
        data_config: Of the run's best checkpoint.
        count: Photos, half of them of the unlabelled ones where batches have some.

    Returns:
        For each photo its views (H, W, 3), uint8, and a line on what they are.

    Raises:
        UserError: The training images cannot be read.
    """
    phases = check_phases(copy.deepcopy(flags))
    index = max((number for number, phase in enumerate(phases) if phase.simclr_loss_weight), default=len(phases) - 1)
    args = phases[index]
    folder = phase_folder(run, [getattr(phase, 'phase', '') for phase in phases], index)
    if folder != run and (folder / 'last.pth.tar').is_file():
        data_config = read_checkpoint(folder / 'last.pth.tar', mapped=True).data_config  # sizes may differ
    args.data_dir = str(data_dir or args.data_dir)
    args.workers, args.cache = 0, None
    data = read_data(args, lambda line: None)
    of_pool = min(count // 2, len(data.pool_rows)) if data.pool_rows is not None else 0
    labelled = min(count - of_pool, len(data.train_rows))
    if args.mixup or args.cutmix:
        labelled -= labelled % 2  # pairs are mixed
    data = replace(data, eval_rows=None, batch_size=labelled, pool_batch_size=of_pool, steps=1)
    views = 2 if args.simclr_loss_weight or args.pseudo_label_weight else 1
    task = SimpleNamespace(views=views, label_space=data.label_space)
    loader = Loaders(args, task, data, data_config, torch.device('cpu'), lambda line: None, cache=False).train
    loader.set_epoch(0)
    images, _ = next(iter(loader))
    mean, std = (torch.tensor(data_config[name]).view(1, 3, 1, 1) for name in ('mean', 'std'))
    pixels = ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    made = pixels.permute(0, 2, 3, 1).unflatten(0, (views, -1)).numpy()
    return [list(made[:, photo]) for photo in range(made.shape[1])], _describe(
        args, len(phases), made.shape[2:4], views, of_pool)


def _describe(args: argparse.Namespace, phases: int, size: tuple[int, int], views: int, of_pool: int) -> str:
    of_phase = f' of phase {args.phase}' if phases > 1 else ''
    pairs = 'Pairs of views' if views == 2 else 'Views, one a photo,'
    pool = f'; the last {of_pool} photos are unlabelled ones' if of_pool else ''
    of_weak = views == 2 and (args.weak_first_view or of_pool and args.pseudo_label_weight)
    weak = ', whose first view is the weak one' if of_weak else ''
    return (f'{pairs} as the model saw them in the first epoch{of_phase}: {size[1]}x{size[0]} pixels, made by --views '
            f'{which_views(args)}{pool}{weak}.')
