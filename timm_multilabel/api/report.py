"""Write one HTML page about a run: settings, curves, metrics, mistakes, calibration, a map of embeddings, views."""
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from timm_multilabel.api.arguments import api_function, make_settings
from timm_multilabel.assembly.device import loader_workers, start_device
from timm_multilabel.assembly.first_views import first_views
from timm_multilabel.assembly.run_settings import last_phase, read_run_settings
from timm_multilabel.assembly.stored import best_checkpoint, stored_predictions
from timm_multilabel.config.commands import ReportSettings
from timm_multilabel.config.files import command_line, read_probe_yaml
from timm_multilabel.config.train import TrainSettings
from timm_multilabel.data.split_names import find_split
from timm_multilabel.data.table_format import TableFormat
from timm_multilabel.errors import UserError, one_line, shortened
from timm_multilabel.files import write_atomic
from timm_multilabel.inference.predictions import Predictions
from timm_multilabel.log import say
from timm_multilabel.places import local_path, path_of
from timm_multilabel.progress import OFF_TERMINAL
from timm_multilabel.reports.curves import all_curves
from timm_multilabel.reports.embedding_map import Coloring, color_points, place_points
from timm_multilabel.reports.head_section import head_section, mean_row
from timm_multilabel.reports.page import Map, Page, render
from timm_multilabel.reports.pictures import Thumbnails, figure_uri, jpeg_uri
from timm_multilabel.task import resolve_head_weights
from timm_multilabel.training.checkpoint import Checkpoint, read_checkpoint
from timm_multilabel.training.run_folder import read_summary

_VIEW_SIDE = 128  # pixels


@dataclass(frozen=True)
class Report:
    """A page about a run.

    Args:
        path: The page.
        images: Images of the split that it is about.
        size: Bytes of the page.
        notes: What could not be shown.
    """
    path: Path
    images: int
    size: int
    notes: Sequence[str]


@api_function(ReportSettings)
def report(run: str | Path, **settings: Any) -> Report:
    """Write one HTML page about a run.

    Args:
        run: The run folder.
        **settings: The settings, named as the flags.

    Raises:
        UserError: The run, its data or settings do not allow it.
    """
    return run_report(make_settings(ReportSettings, {**settings, 'run': run}))


def run_report(settings: ReportSettings) -> Report:
    """Write the page.

    Raises:
        UserError: The run, its data or settings do not allow it.
    """
    folder = local_path(settings.run)
    of_run, summary = read_run_settings(folder, settings.head_module), read_finished_epochs(folder)
    out = prepare_output(path_of(settings.out) if settings.out else folder / 'report.html', settings.force)
    path = path_of(settings.checkpoint) if settings.checkpoint else best_checkpoint(folder)
    checkpoint = read_checkpoint(path, mapped=True)
    data_dir = path_of(settings.data) if settings.data else None
    split = settings.split or default_split(of_run, checkpoint, data_dir)
    device = start_device(settings.device)
    predictions = stored_predictions(
        folder, split, data_dir, device, loader_workers(settings.workers), say,
        checkpoint=path if settings.checkpoint else None, head_module=settings.head_module,
        allow_hub=settings.allow_hub)
    page, notes = build_page(folder, of_run, summary, checkpoint, predictions, split, data_dir)
    content = render(page).encode('utf-8', 'replace')  # names of files may hold what UTF-8 has not
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, content)
    return Report(out, len(predictions), len(content), notes)


def read_finished_epochs(run: Path) -> pd.DataFrame:
    """summary.csv of a run.

    Raises:
        UserError: No epoch has been finished, or the file cannot be read.
    """
    path = run / 'summary.csv'
    summary = read_summary(path) if path.is_file() else ()
    if not len(summary):
        raise UserError(f'{run}: no epoch has been finished, so there is nothing to report; train it first')
    return summary


def prepare_output(path: Path, force: bool) -> Path:
    """The page's path, refused before the work where it cannot be written.

    Raises:
        UserError: It is a folder, or there and `force` is not.
    """
    if path.is_dir():
        raise UserError(f'--out {path}: is a folder; name a file')
    if path.exists() and not force:
        raise UserError(f'{path}: is there already; write over it with --force, or name another with --out')
    return path


def default_split(settings: TrainSettings, checkpoint: Checkpoint, data_dir: Path | None) -> str:
    """The run's validation split; where a run without heads has none, its training split."""
    data = last_phase(settings).data
    there = isinstance(find_split(path_of(data_dir or data.data_dir), data.val_split, TableFormat.of(data)), Path)
    return data.val_split if there or checkpoint.label_space.heads else data.train_split


def build_page(
        run: Path,
        settings: TrainSettings,
        summary: pd.DataFrame,
        checkpoint: Checkpoint,
        predictions: Predictions,
        split: str,
        data_dir: Path | None,
) -> tuple[Page, list[str]]:
    """Work out all that the page says; also what could not be had, as lines."""
    thumbnails = Thumbnails(predictions.images.tolist(), predictions.rows.tolist())
    heads = predictions.label_space.heads
    with tqdm(total=len(heads) + 3, desc='Report', leave=False, disable=OFF_TERMINAL) as bar:
        sections = []
        for labels, known in zip(heads, _known(predictions).T, strict=True):
            bar.set_postfix_str('a head')
            sections.append(head_section(
                labels, predictions.target(labels.name), known, predictions.outputs[labels.name], predictions.rows,
                thumbnails, (predictions.own_metrics or {}).get(labels.name)))
            bar.update()
        bar.set_postfix_str('curves')
        drawn = all_curves(summary)
        curves = '' if drawn is None else figure_uri(drawn)
        bar.update()
        bar.set_postfix_str('map')
        embeddings = build_map(predictions)
        bar.update()
        bar.set_postfix_str('views')
        probe, notes = read_probe_yaml(run), list[str]()
        views_note = ''
        try:
            views: list[list[str]] | str = 'A probe sees each image as evaluation does.'
            if probe is None:
                photos, views_note = first_views(settings, run, data_dir, checkpoint.data_config)
                views = [[jpeg_uri(view, _VIEW_SIDE) for view in photo] for photo in photos]
        except UserError as error:
            views = f'They could not be made again: {error.line}'
            notes.append(f'views: {error.line}')
        bar.update()
    if thumbnails.missing:
        notes.append(f'{len(thumbnails.missing)} images cannot be shown, the first: '
                     f'{next(iter(thumbnails.missing.values()))}')
    return Page(
        title=f'Report of {run.resolve().name} on {split}',
        facts=_facts(checkpoint, summary, predictions, split),
        notes=notes,
        command=f'timm-multilabel train -c {run / "args.yaml"}' if settings.phases else command_line(
            probe or settings),
        command_note='The run again, phase by phase:' if settings.phases else 'The run again; other flags are at their '
        'defaults:',
        settings=(run / 'args.yaml').read_text(encoding='utf-8'),
        recipe=bool(settings.phases),
        curves=curves,
        mean=mean_row(predictions, resolve_head_weights(
            predictions.label_space.names, checkpoint.state.get('head_weights'))),
        heads=sections,
        map=embeddings,
        views=views,
        views_note=views_note,
    ), notes


def build_map(predictions: Predictions) -> Map | str:
    """The map of embeddings, or why there is none."""
    found = place_points(predictions.features)
    if found is None:
        return 'There are too few images that differ.'
    rows, places = found
    colorings = {shortened(labels.name): color_points(labels, predictions.target(labels.name)[rows])
                 for labels in predictions.label_space.heads}
    if not colorings:
        colorings = {'': Coloring([], (), np.full(len(rows), -1), '')}
    titles = [_describe_row(predictions, row) for row in rows]
    return Map(places, titles, colorings, len(predictions))


def _describe_row(predictions: Predictions, row: int) -> str:
    """An image's name and labels."""
    labels = (f'{shortened(labels.name)}: {labels.describe(predictions.target(labels.name)[row])}'
              for labels in predictions.label_space.heads)
    return ' \u00b7 '.join([Path(predictions.images[row]).name, *labels])


def _known(predictions: Predictions) -> np.ndarray:
    """Which labels are there (N, H)."""
    return predictions.label_space.labelled(torch.from_numpy(predictions.targets)).numpy()


def _facts(
        checkpoint: Checkpoint,
        summary: pd.DataFrame,
        predictions: Predictions,
        split: str,
) -> list[tuple[str, str]]:
    """What stands at the top of the page."""
    state = checkpoint.state
    phases = state.get('phases') or []
    phase = f' of phase {phases[state["phase"]]}' if len(phases) > state.get('phase', 0) else ''
    size = 'x'.join(str(side) for side in checkpoint.data_config['input_size'][-2:])
    weights = 'EMA weights' if checkpoint.best_weights == 'ema' else 'plain weights'
    return [
        ('model', f'{checkpoint.arch}, {size} pixels'),
        ('heads', one_line(str(predictions.label_space))),
        ('epochs trained', f'{len(summary)}, in {len(phases)} phases' if phases else str(len(summary))),
        ('checkpoint', f'{checkpoint.path.name}: epoch {state.get("epoch", 0) + 1}{phase}, {weights}'),
        ('split', f'{split}, {len(predictions)} images'),
    ]
