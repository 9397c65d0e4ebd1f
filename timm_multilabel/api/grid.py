"""Run an experiment: every setting with every seed, side by side in tables and a picture; goes on where it stopped."""
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from timm_multilabel.api.arguments import api_function, make_settings
from timm_multilabel.assembly.experiment import (
    DIFFERENCES,
    RESULTS,
    check_runs,
    collect,
    file_of,
    read_results,
    train_runs,
    write_tables,
)
from timm_multilabel.assembly.grid_file import read_grid
from timm_multilabel.config.commands import GridSettings
from timm_multilabel.config.files import as_words
from timm_multilabel.config.settings import read_values
from timm_multilabel.config.train import TrainSettings
from timm_multilabel.errors import SettingError
from timm_multilabel.escaping import spreadsheet_csv
from timm_multilabel.files import write_atomic
from timm_multilabel.log import say
from timm_multilabel.places import local_path
from timm_multilabel.training.run_folder import RunLock


@dataclass(frozen=True)
class Experiment:
    """The results of an experiment.

    Args:
        runs: The metrics of each run.
        differences: Of each setting to the first one, with intervals and p values.
        tables: The same as Markdown.
        files: What was written.
    """
    runs: pd.DataFrame
    differences: pd.DataFrame
    tables: str = field(repr=False)
    files: Sequence[Path]


@api_function(GridSettings, 'flags')
def grid(experiment: str | Path, data: str | Path | None = None, **settings: Any) -> Experiment:
    """Run an experiment of many settings and seeds, and compare them; what is done already is not done again.

    Args:
        experiment: A folder with a grid.yaml.
        data: The data directory.
        **settings: The settings, named as the flags; others are settings of training, for all runs.

    Raises:
        UserError: The grid, data or settings do not allow it, or a run failed.
    """
    for name in {'flags', 'data_dir'} & settings.keys():
        raise SettingError(f"there is no argument '{name}'; settings of training are arguments of their own")
    own = {name: value for name, value in settings.items() if name in GridSettings.settings()}
    given = read_values(TrainSettings, {name: value for name, value in settings.items() if name not in own})
    known = TrainSettings.settings()
    words = [word for name, value in given.items() for word in as_words(known[name], value)]
    made = make_settings(GridSettings, {**own, 'experiment': experiment, 'data_dir': data})
    return run_grid(made.replace(flags=words), given)


def run_grid(settings: GridSettings, given: Mapping[str, Any]) -> Experiment:
    """Run an experiment.

    Args:
        settings: Of the experiment.
        given: What `settings.flags` say, as checked values by name.

    Raises:
        UserError: The grid, data or settings do not allow it, or a run failed.
    """
    folder = Path(settings.experiment)
    made = read_grid(folder / 'grid.yaml')
    files = []
    if not settings.tables:
        output = local_path(settings.output or Path('output/grid') / folder.resolve().name)
        of_runs = check_runs(made, settings, given, output)
        with closing(RunLock()) as lock:
            lock.take(output)
            train_runs(made, settings, output)
        results = collect(made, settings, output, of_runs)
        for name, table in ((RESULTS, results.runs), (DIFFERENCES, results.differences)):
            files.append(file_of(folder, name, settings.split))
            write_atomic(files[-1], spreadsheet_csv(table, index=False, float_format='%.6g'))
            say(f'Wrote {files[-1]}')
    results = read_results(folder, settings.split, made)
    tables, written = write_tables(folder, settings.split, results)
    return Experiment(results.runs, results.differences, tables, [*files, *written])
