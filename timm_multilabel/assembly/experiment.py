"""An experiment: its runs, what is noted of them, and the tables of their results."""
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from tqdm.auto import tqdm

from timm_multilabel.assembly.checks import check_phases
from timm_multilabel.assembly.device import start_device
from timm_multilabel.assembly.grid_file import OWN_FLAGS, Grid, GridRun
from timm_multilabel.assembly.jobs import Job, Jobs
from timm_multilabel.assembly.stored import stored_predictions
from timm_multilabel.config.commands import GridSettings
from timm_multilabel.config.files import build
from timm_multilabel.config.train import TrainSettings
from timm_multilabel.data.split_names import find_split, no_split
from timm_multilabel.errors import UserError, escaped, one_line, shortened
from timm_multilabel.escaping import spreadsheet_text_back
from timm_multilabel.files import read_json, reading, write_atomic
from timm_multilabel.log import say
from timm_multilabel.places import path_of
from timm_multilabel.progress import OFF_TERMINAL
from timm_multilabel.reports.experiments import (
    IMAGES,
    SEEDS_AND_IMAGES,
    TOP1,
    RunPredictions,
    compare_groups,
    describe_metrics,
    run_metrics,
    share,
)
from timm_multilabel.reports.experiments import MEAN as MEAN_HEAD
from timm_multilabel.reports.grid import (
    MEAN,
    GridResults,
    draw_grid,
    grid_markdown,
    metric_columns,
    metrics_text,
    read_metrics,
)
from timm_multilabel.reports.pictures import png

RESULTS, DIFFERENCES, TABLES, PICTURE = 'results.csv', 'differences.csv', 'results.md', 'results.png'
_WHERE = ('commit', 'machine', 'torch')  # what is noted of the program and the machine
_LARGEST = 1e12  # number in a table
_TEXTS = ('setting', 'head', 'over', 'command', 'metrics', *_WHERE)  # columns that are texts, whatever they look like


def file_of(folder: Path, name: str, split: str) -> Path:
    """A file of results: of the validation split as it is called, of another one with that in its name."""
    stem, ending = name.split('.')
    return folder / (name if split == 'val' else f'{stem}-{re.sub(r"[^A-Za-z0-9_.-]+", "-", split)}.{ending}')


def recipe_words(run: GridRun, settings: GridSettings, output: Path) -> list[str]:
    """The words that train a run, after the recipe that `write_recipe` has written."""
    return [settings.named_data_dir, '-c', str(output / f'{run.name}.yaml'), '--seed', str(run.seed), '--output',
            str(output), '--experiment', run.name, '--resume', 'auto', *settings.flags]


def write_recipe(run: GridRun, output: Path) -> None:
    """Write a run's recipe."""
    recipe = dict(run.recipe)
    if run.start is not None:
        recipe['initial_checkpoint'] = str(output / run.start.name / 'last.pth.tar')
    write_atomic(output / f'{run.name}.yaml', yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))


def record_of(run: GridRun, settings: GridSettings) -> dict[str, Any]:
    """What a run is of, as JSON has it: two runs of one name with different ones are not the same."""
    made = {'flags': run.recipe, 'start': run.start and run.start.recipe, 'command line': settings.flags,
            'data': str(path_of(settings.named_data_dir).resolve())}
    record: dict[str, Any] = json.loads(json.dumps(made, default=str))
    return record


def read_record(run: GridRun, output: Path) -> dict[str, Any]:
    """What was noted of a run when it began, and when it ended; nothing of one that never did.

    Raises:
        UserError: The note is damaged.
    """
    path = output / f'{run.name}.json'
    if not path.is_file():
        return {}
    record: dict[str, Any] = read_json(
        path, 'the record of a run', 'remove it, and the run goes on where it stopped', _is_record)
    return record


def _is_record(record: Any) -> bool:
    """Whether it is what `write_record` was given when a run began or ended."""
    return isinstance(record['run'], dict) and all(isinstance(record['where'][name], str) for name in _WHERE) and all(
        seconds is None or isinstance(seconds, int | float) and 0 <= seconds < 1e12
        for seconds in (record.get('seconds'), record.get('cpu_seconds'))) and (
            'seconds' not in record or 'cpu_seconds' in record)


def write_record(run: GridRun, output: Path, record: Mapping[str, Any]) -> None:
    """Write what is noted of a run, which `read_record` reads."""
    write_atomic(output / f'{run.name}.json', json.dumps(record, indent=1, ensure_ascii=False))


def check_runs(
        grid: Grid,
        settings: GridSettings,
        given: Mapping[str, Any],
        output: Path,
) -> dict[str, TrainSettings]:
    """Check all that can be checked before hours of training; the settings of each run (of its last phase) by name.

    Raises:
        UserError: Settings that do not go together or that the grid sets itself, a run of this name with others, a
            setting without heads, a split that is not there.
    """
    data_dir = settings.named_data_dir
    for name in given:
        if name in (*OWN_FLAGS, grid.axis):
            options = TrainSettings.settings()[name].options
            word = next((word for word in settings.flags if word.partition('=')[0] in options), options[-1])
            raise UserError(f"--flags {word}: set by the grid itself; leave it out, or change grid.yaml")
    if settings.split != 'val' and find_split(path_of(data_dir), settings.split) is None:
        raise no_split(path_of(data_dir), settings.split)
    for run in grid.runs:
        record = read_record(run, output)
        if record and record['run'] != record_of(run, settings):
            raise UserError(
                f'{output / run.name}: a run of other flags than grid.yaml and the command line have now; remove it '
                f'and {output / run.name}.json, or choose another --output')
    output.mkdir(parents=True, exist_ok=True)
    found = {}
    for run in grid.runs:
        write_recipe(run, output)
        try:
            of_run = {
                'data_dir': data_dir, 'config': str(output / f'{run.name}.yaml'), 'seed': run.seed,
                'output': str(output), 'experiment': run.name, 'resume': 'auto'}
            found[run.name] = check_phases(build(TrainSettings, {**of_run, **given}))[-1].settings
        except UserError as error:
            raise UserError(f"setting '{run.setting}': {error.line}") from error
        if not run.is_start and not found[run.name].objective.classification_loss_weight:
            raise UserError(f"setting '{run.setting}': trains no heads, so it has no metrics; make it a start")
    return found


def train_runs(grid: Grid, settings: GridSettings, output: Path) -> None:
    """Run what is not done yet, and note what it took."""
    runs = {run.name: run for run in grid.runs}
    done = {name for name, run in runs.items() if 'seconds' in read_record(run, output)}
    resumed = {name for name in runs if (output / name).is_dir()}

    def starts(name: str) -> None:
        write_record(runs[name], output, {'run': record_of(runs[name], settings), 'where': where()})

    with tqdm(total=len(runs), initial=len(done), desc=shortened(grid.title), disable=OFF_TERMINAL) as bar:
        def write(line: str) -> None:
            bar.write(one_line(line), file=sys.stderr)

        jobs = Jobs(
            [Job(name, recipe_words(run, settings, output), None if run.start is None else run.start.name)
             for name, run in runs.items()],
            set(done), settings.jobs, lambda name: output / f'{name}.log', starts, write)
        with closing(jobs.run()) as ended:
            for name, cost in ended:
                # What a run that was resumed took before is not known.
                known = name not in resumed
                write_record(runs[name], output, {
                    **read_record(runs[name], output), 'seconds': cost.seconds if known else None,
                    'cpu_seconds': cost.cpu_seconds if known else None})
                bar.update()
                write(f'{name}: done in {cost.seconds:.0f} s')


def where() -> dict[str, str]:
    """The commit of this program, the machine, and torch's version."""
    here = Path(__file__)
    commit = ''
    with suppress(OSError, subprocess.CalledProcessError):
        def git(*words: str) -> str:
            return subprocess.check_output(
                ['git', '-C', str(here.parent), *words], text=True, stderr=subprocess.DEVNULL).strip()

        git('ls-files', '--error-unmatch', here.name)  # else the repository is another one that this is installed in
        commit = git('rev-parse', '--short', 'HEAD') + (
            ' with changes' if git('status', '--porcelain', '--', str(here.parents[1])) else '')
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return dict(zip(_WHERE, (commit, f'{device}, {os.cpu_count()} cores', torch.__version__), strict=True))


def _processor() -> str:
    """What the processor calls itself."""
    with suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text(encoding='utf-8').split('\n'):
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    return platform.processor() or platform.machine()


def collect(
        grid: Grid,
        settings: GridSettings,
        output: Path,
        flags: Mapping[str, TrainSettings],
) -> GridResults:
    """The metrics of all runs, and the differences of settings to the first one, value by value."""
    runs = [run for run in grid.runs if not run.is_start]
    device = start_device(None)
    answers = []
    for run in runs:
        of_run = flags[run.name].data
        split = of_run.val_split if settings.split == 'val' else settings.split
        answers.append(RunPredictions.of(stored_predictions(
            output / run.name, split, path_of(settings.named_data_dir), device, 0, lambda line: None,
            head_module=of_run.head_module)))
    answers = share(answers, [run.name for run in runs], settings.split, say)
    metrics, described = run_metrics(answers), describe_metrics(answers)
    columns = metric_columns(metrics)
    of_columns = {column: described[key] for column, key in columns.items()}
    top1 = [key for key in ((MEAN_HEAD, TOP1), *columns.values()) if key in metrics and key[1] == TOP1]
    means = metrics[top1[0]] if top1 else pd.Series(np.nan, metrics.index)
    facts = {} if all(metric.name == TOP1 for metric in of_columns.values()) else {'metrics': metrics_text(of_columns)}
    taken = {*_TEXTS, grid.axis, 'seed', MEAN, 'minutes', 'cpu_minutes'}.intersection(columns)
    if taken:
        raise UserError(
            f"{output}: a head is called '{taken.pop()}', as a column of {RESULTS}; rename it in the CSVs")
    words = ['timm-multilabel', 'grid', settings.experiment, settings.named_data_dir,
             *(['--output', settings.output] if settings.output else []),
             *(['--jobs', str(settings.jobs)] if settings.jobs > 1 else []),
             *(['--split', settings.split] if settings.split != 'val' else []),
             *(['--flags', *settings.flags] if settings.flags else [])]
    command = escaped(shlex.join(words))
    rows = []
    for number, run in enumerate(runs):
        row = {'setting': run.setting, **({grid.axis: run.value} if grid.axis else {}), 'seed': run.seed}
        row |= {column: metrics[key].iloc[number] for column, key in columns.items()} | {MEAN: means.iloc[number]}
        records = [read_record(each, output) for each in (run, run.start) if each is not None]
        for name, key in (('minutes', 'seconds'), ('cpu_minutes', 'cpu_seconds')):
            spent = [record[key] for record in records]
            row[name] = sum(spent) / 60 if None not in spent else None
        rows.append({**row, **records[0]['where'], 'command': command, **facts})
    differences = []
    for value in grid.values or [None]:
        of_value = [number for number, run in enumerate(runs) if run.value == value]
        names = [name for name in grid.settings if any(runs[number].setting == name for number in of_value)]
        groups = [[place for place, number in enumerate(of_value) if runs[number].setting == name] for name in names]
        found = compare_groups(
            [answers[number] for number in of_value], groups, [runs[number].seed for number in of_value], 0)
        names_of = {key: column for column, key in columns.items()} | {(MEAN_HEAD, TOP1): MEAN}
        for row in found.itertuples(index=False):
            differences.append({
                **({grid.axis: value} if grid.axis else {}), 'setting': names[row.group],
                'head': names_of[row.head, row.metric], 'difference': row.difference, 'low': row.low, 'high': row.high,
                'p': row.p, 'holm': row.holm, 'over': row.over})
    return GridResults(
        grid.title, grid.about, settings.split, grid.axis, grid.settings, pd.DataFrame(rows), pd.DataFrame(differences),
        of_columns)


def read_results(folder: Path, split: str, grid: Grid) -> GridResults:
    """The results of an experiment, as its CSVs have them.

    Raises:
        UserError: There are none yet, or they are of another grid.yaml.
    """
    tables: list[pd.DataFrame] = []
    for name in (RESULTS, DIFFERENCES):
        path = file_of(folder, name, split)
        if not path.is_file():
            raise UserError(f'{path}: not there; run the experiment (without --tables) first')
        with reading(path, 'results of an experiment', 'run the experiment again, without --tables'):
            tables.append(_read_table(path, grid, name == RESULTS))
            if name == RESULTS:
                columns = list(tables[0].columns)
                metrics = read_metrics(tables[0], columns[columns.index('seed') + 1:columns.index(MEAN)])
                if not metrics:
                    raise ValueError('no heads')
            elif len(tables[1]) and not tables[1]['head'].isin([MEAN, *metrics]).all():
                raise ValueError('a head that the results have not')
    runs, differences = tables
    return GridResults(grid.title, grid.about, split, grid.axis, grid.settings, runs, differences, metrics)


def _read_table(path: Path, grid: Grid, of_runs: bool) -> pd.DataFrame:
    """A CSV of results, or of differences; raises ValueError where it is none of this grid."""
    try:
        columns = pd.read_csv(path, nrows=0).columns
    except pd.errors.EmptyDataError:  # of one setting
        if of_runs:
            raise
        return pd.DataFrame()
    columns = [spreadsheet_text_back(name) for name in columns]
    if grid.axis is not None and grid.axis not in columns:
        raise ValueError(f"it has no column '{grid.axis}', which grid.yaml varies")
    table = pd.read_csv(
        path, header=0, names=columns, dtype={name: str for name in _TEXTS if name in columns}, keep_default_na=False,
        index_col=False, na_values={name: [''] for name in columns if name not in (*_TEXTS, grid.axis)})
    table = table.map(lambda cell: spreadsheet_text_back(cell) if isinstance(cell, str) else cell)
    needed = ('setting', 'seed', MEAN, 'minutes', 'cpu_minutes', 'command', *_WHERE) if of_runs else (
        'setting', 'head', 'difference', 'low', 'high', 'p', 'holm')
    if not of_runs and 'over' not in columns:  # made before seeds were resampled too
        table['over'] = IMAGES
    missing = [name for name in needed if name not in columns]
    if missing or of_runs and not len(table):
        raise ValueError(f"it has no column '{missing[0]}'" if missing else 'it has no rows')
    for name, cells in table.drop(columns=[*_TEXTS, grid.axis], errors='ignore').items():
        if cells.dtype.kind not in 'if' or np.isinf(cells).any() or (cells.abs() > _LARGEST).any():
            raise ValueError(f"column '{name}' holds something other than numbers")
    if not of_runs and not table['over'].isin([IMAGES, SEEDS_AND_IMAGES]).all():
        raise ValueError(f"column 'over' holds something other than '{IMAGES}' and '{SEEDS_AND_IMAGES}'")
    unknown = set(table['setting']) - set(grid.settings)
    keys = ['setting', 'seed' if of_runs else 'head', *([grid.axis] if grid.axis else [])]
    if unknown or table[keys].isna().any(axis=None) or table.duplicated(keys).any():
        raise ValueError(f"grid.yaml has no setting '{unknown.pop()}'" if unknown else 'a row twice, or without a name')
    if of_runs and not table['setting'].eq(grid.settings[0]).any():
        raise ValueError(f"it has no run of '{grid.settings[0]}'")
    return table


def write_tables(folder: Path, split: str, results: GridResults) -> tuple[str, list[Path]]:
    """Write tables and picture; the tables, and the files."""
    tables, paths = grid_markdown(results), [file_of(folder, name, split) for name in (TABLES, PICTURE)]
    write_atomic(paths[0], tables)
    write_atomic(paths[1], png(draw_grid(results)))
    return tables, paths
