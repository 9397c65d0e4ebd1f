"""Heads on the features of backbones that stay as they are, fitted for a grid at once: a checkpoint in minutes."""
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from timm.utils import random_seed

from timm_multilabel.api.arguments import api_function, make_settings, refuse_launched
from timm_multilabel.assembly import head_options
from timm_multilabel.assembly.checks import check_metric, resolve_weights
from timm_multilabel.assembly.data import read_data
from timm_multilabel.assembly.device import choose_precision, start_device
from timm_multilabel.assembly.model import create_model
from timm_multilabel.assembly.probe import SplitFeatures, as_training, check_room, choose_rows, stand_in
from timm_multilabel.assembly.task import create_task
from timm_multilabel.backbones import JoinedBackbones
from timm_multilabel.config.commands import ProbeSettings
from timm_multilabel.config.files import PROBE_YAML, args_yaml, probe_yaml
from timm_multilabel.data.table import Rows
from timm_multilabel.distributed import world
from timm_multilabel.errors import DataError, SettingError
from timm_multilabel.files import atomic_write, write_atomic
from timm_multilabel.log import say
from timm_multilabel.metric_names import in_summary, of_head
from timm_multilabel.places import local_path
from timm_multilabel.probing.features import Embedder
from timm_multilabel.probing.fit import Fitted, Grid, Labelled, default_epochs, fit_heads
from timm_multilabel.task import JointTask
from timm_multilabel.training.progress_bar import ProgressBar
from timm_multilabel.training.run_folder import RunFolder, RunLock, read_summary, run_folder_path
from timm_multilabel.views.pillow import scoring_views


@dataclass(frozen=True)
class Probe:
    """Heads that were fitted on frozen features.

    Args:
        folder: The run folder.
        best_checkpoint: The backbones with the best heads.
        metric: The mean over the heads that summary.csv has.
        best: Its value on val.
        chosen: A row for each head: the learning rate and weight decay that were best, and its metrics on val.
        notes: What may be worth another look.
    """
    folder: Path
    best_checkpoint: Path
    metric: str
    best: float
    chosen: pd.DataFrame
    notes: Sequence[str]

    @property
    def grid(self) -> pd.DataFrame:
        """The metrics on val of each head for every learning rate and weight decay."""
        return pd.read_csv(self.folder / 'probe.csv', keep_default_na=False, na_values=[''])

    @property
    def summary(self) -> pd.DataFrame:
        """The metrics of the best heads, in one row."""
        return read_summary(self.folder / 'summary.csv')


@api_function(ProbeSettings)
def probe(data: str | Path, model: str | Sequence[str], **settings: Any) -> Probe:
    """Fit heads on the features of pretrained backbones that stay as they are.

    Args:
        data: The data directory.
        model: A timm model, or several whose features are concatenated.
        **settings: The settings, named as the flags.

    Returns:
        The run: its folder, checkpoint and metrics.

    Raises:
        UserError: Data or settings do not allow it.
    """
    refuse_launched()
    made = run_probe(make_settings(ProbeSettings, {**settings, 'data_dir': data, 'model': model}))
    assert made is not None  # only ranks other than the first have none
    return made


def run_probe(settings: ProbeSettings) -> Probe | None:
    """Embed and fit, in this process and perhaps in others that run the same.

    Returns:
        The run; None on ranks other than the first.

    Raises:
        UserError: Data or settings do not allow it.
    """
    of_training = as_training(settings)
    device = start_device(settings.device)
    precision = choose_precision(device, settings.amp, None, False)
    data = read_data(of_training.replace(labelled_rows=None, batch_size=1), say)
    train, val = data.train_rows, data.eval_rows
    if not isinstance(train, Rows) or not isinstance(val, Rows):
        raise DataError(f'{data.train_rows.source}: a probe reads tables, not shards; write the splits as CSVs, or '
                        'train the heads with --freeze-backbone')
    chosen = choose_rows(settings, train, data)
    targets = data.label_space.split(train.targets[torch.from_numpy(chosen)])
    options, weights = head_options.resolve(data.head, data.registry, data.label_space, targets)
    weights = resolve_weights(of_training, data, weights)
    for name, its in options.items():
        if its.get('input') == 'projection':
            raise SettingError(f'--head {name}:input=projection: a probe has no projector; leave it out')
        if its.get('views') == 'plain':
            raise SettingError(f'--head {name}:views=plain: a probe sees all photos in their colors; leave it out')
    random_seed(settings.seed, 0)  # the same first weights on every rank
    model, data_config = create_model(of_training, data, options, True, say)
    for name, head in model.named_heads.items():
        if head.remark:
            say(f"head '{name}': {head.remark}")
    metric = check_metric(of_training, data, model.named_heads.values(), weights, say)
    folder = run_folder_path(
        settings.output, settings.experiment, of_training.backbone.model, data_config['input_size'][-1],
        can_resume=False)
    with closing(RunLock()) as lock:
        if world()[0] == 0:
            lock.take(folder)
        task = create_task(of_training, model, data, data_config, weights, device)
        task.metadata['eval_metric'] = metric
        task.eval()
        backbone = model.backbone
        embedder = Embedder(
            backbone if isinstance(backbone, JoinedBackbones) else JoinedBackbones([backbone], False).to(device).eval(),
            settings.model, data_config, scoring_views(data_config), precision,
            local_path(settings.cache_dir).expanduser() / 'features')
        splits = [SplitFeatures(embedder, train, chosen), SplitFeatures(embedder, val, np.arange(len(val)))]
        check_room(splits)
        started = time.perf_counter()
        for split in splits:
            split.compute(settings, stand_in(settings, data))
        embedded = time.perf_counter()
        made = None
        if world()[0] == 0:
            fitted, row = _fit(settings, task, splits[0].labelled(), splits[1].labelled())
            say(f'{len(splits[0].chosen):,} and {len(splits[1].chosen):,} images: features in '
                f'{embedded - started:.0f} s, {len(fitted)} heads x {len(settings.lrs) * len(settings.weight_decays)} '
                f'fits in {time.perf_counter() - embedded:.0f} s')
            writer = RunFolder(folder, args_yaml(of_training), data.label_space)
            made = _write(writer, settings, task, fitted, row, metric)
    if dist.is_initialized():
        dist.destroy_process_group()
    return made


def _fit(
        settings: ProbeSettings,
        task: JointTask,
        train: Labelled,
        val: Labelled,
) -> tuple[dict[str, Fitted], dict[str, Any]]:
    """Fit the heads and put the best into the task's model.

    Returns:
        What was fitted by head, and the metrics on val as a row of summary.csv.
    """
    epochs = settings.epochs or default_epochs(len(train.targets), settings.fit_batch_size)
    grid = Grid(settings.lrs, settings.weight_decays, epochs, settings.fit_batch_size, settings.seed)
    steps = epochs * grid.steps_per_epoch(len(train.targets))
    with ProgressBar('Fit', steps, visible=True) as progress:
        fitted = fit_heads(task.heads, train, val, grid, progress)
    for name, head in task.heads.items():
        head.load_state_dict(fitted[name].head.state_dict())
        if not fitted[name].together:
            say(f"head '{name}': its kind has no batched form, so its {len(grid.members)} fits ran one after the other")
    model, evaluator = task.joint_module.model, task.create_evaluator()
    with torch.no_grad():
        for features, targets in zip(val.features.split(1024), val.targets.split(1024), strict=True):
            evaluator.update(model.forward_heads(features.float()), targets)
    row = {'epoch': 0, 'train_loss': sum(task.head_weights[name] * its.train_loss for name, its in fitted.items())}
    row |= {in_summary('train', of_head(name, 'loss')): its.train_loss for name, its in fitted.items()}
    row |= {in_summary('eval', name): value for name, value in evaluator.compute().items()}
    return fitted, row


def _write(
        writer: RunFolder,
        settings: ProbeSettings,
        task: JointTask,
        fitted: dict[str, Fitted],
        row: dict[str, Any],
        metric: str,
) -> Probe:
    """Write the checkpoint, the metrics of the whole grid and those of the best."""
    value = row[in_summary('eval', metric)]
    path = writer.path / 'model_best.pth.tar'
    with atomic_write(path) as file:
        torch.save({'epoch': 0, 'version': 2, 'metric': value, **task.get_checkpoint_state()}, file)
    rows = [{'head': name, **each} for name, its in fitted.items() for each in its.table]
    write_atomic(writer.path / 'probe.csv', pd.DataFrame(rows).to_csv(index=False))
    write_atomic(writer.path / PROBE_YAML, probe_yaml(settings))
    writer.add_summary(row)
    chosen, notes = [], []
    for name, its in fitted.items():
        best = next(each for each in its.table if (each['lr'], each['weight_decay']) == (its.lr, its.weight_decay))
        chosen.append({'head': name, **best})
        decays = sorted({each['weight_decay'] for each in its.table})
        if len(decays) > 2 and its.weight_decay == decays[-1]:
            notes.append(f"head '{name}': best at the largest weight decay; add larger ones with --weight-decays")
    return Probe(writer.path, path, metric, float(value), pd.DataFrame(chosen), notes)
