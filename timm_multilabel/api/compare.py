"""Compare runs: their settings, their metrics, and which differences are more than chance, as one table."""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from timm_multilabel.api.arguments import api_function, make_settings
from timm_multilabel.assembly.device import loader_workers, start_device
from timm_multilabel.assembly.optimization import cooldown_epochs
from timm_multilabel.assembly.run_settings import read_run_settings
from timm_multilabel.assembly.stored import predictions_path, stored_predictions
from timm_multilabel.config.commands import CompareSettings
from timm_multilabel.config.train import TrainSettings
from timm_multilabel.data.split_names import find_split
from timm_multilabel.errors import UserError, escaped
from timm_multilabel.files import write_atomic
from timm_multilabel.log import say
from timm_multilabel.places import local_path, path_of
from timm_multilabel.progress import OFF_TERMINAL
from timm_multilabel.reports.bootstrap import RESAMPLES
from timm_multilabel.reports.experiment_pages import (
    Experiments,
    SplitResult,
    experiments_csv,
    experiments_html,
    experiments_markdown,
)
from timm_multilabel.reports.experiments import (
    Run,
    RunPredictions,
    compare_groups,
    flat_settings,
    group_runs,
    share,
    shared_heads,
)
from timm_multilabel.training.checkpoint import read_checkpoint
from timm_multilabel.training.run_folder import read_summary

_WRITERS = {'.csv': experiments_csv, '.md': experiments_markdown, '.html': experiments_html}


@dataclass(frozen=True)
class Comparison:
    """How runs compare.

    Args:
        metrics: The metrics of each run on each split, by split.
        differences: Those of each group to the baseline, with intervals, p values and verdicts, by split.
        markdown: All of it as Markdown.
        files: What was written.
    """
    metrics: Mapping[str, pd.DataFrame]
    differences: Mapping[str, pd.DataFrame]
    markdown: str = field(repr=False)
    files: Sequence[Path]


@api_function(CompareSettings)
def compare(runs: Sequence[str | Path], **settings: Any) -> Comparison:
    """Compare runs: their settings, their metrics, and which differences are more than chance.

    Args:
        runs: Run folders; those of one experiment, with other seeds, form a group.
        **settings: The settings, named as the flags.

    Raises:
        UserError: A run folder, data or settings do not allow it.
    """
    return run_comparison(make_settings(CompareSettings, {**settings, 'runs': list(map(str, runs))}))


def run_comparison(settings: CompareSettings) -> Comparison:
    """Compare runs.

    Raises:
        UserError: A run folder, data or settings do not allow it.
    """
    paths = _run_paths(settings.runs)
    outputs = _prepare_outputs(settings.out, settings.force)
    of_runs, flags = [_read_settings(path, settings.head_module) for path in paths], _flag_names()
    runs = [_read_run(path, name, of_run, flags) for (path, name), of_run in zip(_names(paths).items(), of_runs)]
    groups = group_runs(runs)
    baseline = _find_baseline(settings.baseline, paths, groups)
    folders = [path_of(settings.data or _of_last_phase(of_run, 'data_dir')) for of_run in of_runs]
    device = start_device(settings.device)
    results: list[SplitResult] = []
    remarks = _repeated(runs, groups)
    for split in ('val', 'test'):
        names = [_of_last_phase(of_run, 'val_split') if split == 'val' else split for of_run in of_runs]
        missing = {run.name: name for run, path, folder, name in zip(runs, paths, folders, names)
                   if not predictions_path(path, name).is_file() and find_split(folder, name) is None}
        if split == 'val' and missing:
            without, name = next(iter(missing.items()))
            raise UserError(f'{without}: its data directory has no {name} (any more); name one with --data DIR')
        if missing:
            if len(missing) < len(runs):
                remarks.append(f'test is left out: there is none for {", ".join(missing)}')
            continue
        predictions = [
            RunPredictions.of(stored_predictions(
                path, name, path_of(settings.data) if settings.data else None, device, loader_workers(settings.workers),
                say, head_module=settings.head_module, allow_hub=settings.allow_hub))
            for path, name in zip(paths, names)]
        results.append(_compare_split(split, predictions, runs, groups, baseline, remarks.append))
    experiments = Experiments(runs, groups, baseline, results, remarks)
    for ending, path in outputs.items():
        write_atomic(path, _WRITERS[ending](experiments))
    return Comparison(
        {result.name: result.metrics for result in results}, {result.name: result.differences for result in results},
        experiments_markdown(experiments), list(outputs.values()))


def _run_paths(words: list[str]) -> list[Path]:
    """The run folders.

    Raises:
        UserError: One is none, or named twice, or has no finished epoch.
    """
    paths = [local_path(word) for word in words]
    for path in paths:
        if not (path / 'args.yaml').is_file():
            way_out = f'name its folder, {path.parent}' if path.is_file() else 'name one such as output/train/<run>'
            raise UserError(f'{path}: is no run folder (there is no args.yaml in it); {way_out}')
        if not (path / 'summary.csv').is_file() or not (path / 'model_best.pth.tar').is_file():
            raise UserError(f'{path}: no epoch of this run (with phases, of its last one) is finished, so it has no '
                            'metrics yet; leave it out')
    places = [path.resolve() for path in paths]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise UserError(f'{paths[number]}: is named twice; name each run once')
    return paths


def _prepare_outputs(out: str | None, force: bool) -> dict[str, Path]:
    """Find out that the files could not be written before the work, not after it; the files by ending."""
    if out is None:
        return {}
    folder = local_path(out)
    paths = {ending: folder / f'experiments{ending}' for ending in _WRITERS}
    for path in paths.values():
        if path.is_dir() or path.exists() and not force:
            raise UserError(f'{path}: exists already; ' + (
                'it is a folder, remove it' if path.is_dir() else 'overwrite it with --force, or name another --out'))
    folder.mkdir(parents=True, exist_ok=True)
    return paths


def _flag_names() -> dict[str, str]:
    """What the command line of training calls its settings, by their names in args.yaml."""
    return {name: next(option for option in made.options if option.startswith('--'))
            for name, made in TrainSettings.settings().items() if not made.positional}


def _read_settings(path: Path, head_module: str | None) -> dict[str, Any]:
    """The settings of a run as args.yaml holds them; those that it is older than have their defaults."""
    settings = read_run_settings(path, head_module)
    if not settings.phases:  # a run that has the default is the same as one that gave this number
        settings = settings.replace(cooldown_epochs=cooldown_epochs(settings.schedule))
    phases = [{'name': phase.name, **phase.given} for phase in settings.phases]
    values = settings.flat()
    return {**{name: value for name, value in values.items() if name not in ('config', 'allow_hub')}, 'phases': phases}


def _names(paths: list[Path]) -> Mapping[Path, str]:
    """What runs are called: their folder, or the path where two folders are called alike."""
    names = [path.resolve().name for path in paths]
    return {path: escaped(path if names.count(name) > 1 else name) for path, name in zip(paths, names)}


def _read_run(path: Path, name: str, settings: Mapping[str, Any], flags: Mapping[str, str]) -> Run:
    checkpoint = read_checkpoint(path / 'model_best.pth.tar', mapped=True)
    if not checkpoint.label_space.heads:
        raise UserError(f'{path}: trained with -wlc 0, so it has no heads to compare; leave it out')
    summary = read_summary(path / 'summary.csv')
    phases = summary['phase'].tolist() if 'phase' in summary else [None] * len(summary)
    return Run(name, flat_settings(settings, flags), str(settings['seed']), checkpoint.state.get('epoch', 0) + 1,
               phases.count(phases[-1]) if phases else 0)


def _find_baseline(word: str | None, paths: list[Path], groups: list[list[int]]) -> int:
    """The group that others are compared with, by number."""
    places = [path.resolve() for path in paths]
    wanted = places[0] if word is None else Path(word).resolve()
    if wanted not in places:
        raise UserError(f'--baseline {word}: is none of the runs to compare ({", ".join(map(str, paths))})')
    number = places.index(wanted)
    return next(group for group, numbers in enumerate(groups) if number in numbers)


def _repeated(runs: list[Run], groups: list[list[int]]) -> list[str]:
    """Lines on runs of a group that have the same seed, which count as one."""
    lines = []
    for numbers in groups:
        seeds = [runs[number].seed for number in numbers]
        if len(set(seeds)) < len(seeds):
            lines.append(f'{", ".join(runs[number].name for number in numbers)}: the same settings, and some of them '
                         'the same seed: those count as one run in a verdict, and the spread says less than it seems')
    return lines


def _of_last_phase(settings: Mapping[str, Any], name: str) -> str:
    """A setting of the phase that a run's best checkpoint is of; of a run without phases, of the run."""
    phases = settings['phases']
    return str((phases[-1] if phases else {}).get(name, settings[name]))


def _compare_split(
        split: str,
        answers: list[RunPredictions],
        runs: list[Run],
        groups: list[list[int]],
        baseline: int,
        remark: Callable[[str], None],
) -> SplitResult:
    """The metrics and differences on a split."""
    names = [run.name for run in runs]
    heads = shared_heads(answers)
    if not heads:
        raise UserError(f'{split}: the runs ({", ".join(names)}) share no head of the same classes; compare those that '
                        'do')
    answers = share(answers, names, split, remark)
    others = dict.fromkeys(name for each in answers for name in each.labels if name not in heads)
    if others:
        remark(f'{split}: not a head of the same classes in every run, so not compared and not in the mean: '
               f'{", ".join(others)}')
    with tqdm(total=RESAMPLES, desc=f'{split}: bootstrap', leave=False, disable=OFF_TERMINAL) as bar:
        differences = compare_groups(answers, groups, [run.seed for run in runs], baseline, bar.update)
    return SplitResult.of(split, answers, differences)
