"""Run an experiment: every setting with every seed, side by side in tables and a picture; goes on where it stopped."""
import argparse
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from tqdm import tqdm

from timm_multilabel.cli import train_flags
from timm_multilabel.cli.checks import check_phases
from timm_multilabel.cli.device import start_device
from timm_multilabel.cli.flags import Parser, parse_with_config, positive
from timm_multilabel.cli.grid_file import Grid, GridRun, read_grid
from timm_multilabel.cli.jobs import Job, Jobs
from timm_multilabel.cli.stored import stored_predictions
from timm_multilabel.errors import UserError, printable
from timm_multilabel.files import write_whole
from timm_multilabel.reports.experiments import MEAN as MEAN_HEAD
from timm_multilabel.reports.experiments import Answers, compare_groups, run_figures, share
from timm_multilabel.reports.grid import MEAN, GridResults, draw_grid, grid_markdown

NAME = 'grid'
HELP = 'run an experiment of many settings and seeds, and compare them'

RESULTS, DIFFERENCES, TABLES, PICTURE = 'results.csv', 'differences.csv', 'results.md', 'results.png'
_FILES = (RESULTS, DIFFERENCES, TABLES, PICTURE)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument('experiment', metavar='EXPERIMENT',
                        help='folder with a grid.yaml; results.csv, differences.csv, results.md and results.png are '
                             'written there once all runs are done')
    parser.add_argument('data_dir', metavar='DIR', help='data directory')
    parser.add_argument('--output', metavar='DIR',
                        help='where run folders go (default: output/grid/<name of EXPERIMENT>)')
    parser.add_argument('--jobs', type=positive, default=1, metavar='N', help='runs at once; they share the cores')
    parser.add_argument('--split', default='val', metavar='NAME',
                        help='split that is scored; files of another one are called results-NAME.csv, ...')
    parser.add_argument('--flags', nargs=argparse.REMAINDER, default=[], metavar='...',
                        help='all that follows are flags of training, for all runs: --flags --cache ram -j 2')
    parser.add_argument('--tables', action='store_true',
                        help='run nothing: make tables and picture anew, of results.csv and differences.csv')


def run(args: argparse.Namespace) -> None:
    """Run the experiment."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # runs are to be told, whatever stops this
    folder = Path(args.experiment)
    grid = read_grid(folder / 'grid.yaml')
    if args.tables:
        write_tables(folder, args.split, read_results(folder, args.split, grid))
        return
    output = Path(args.output or Path('output/grid') / folder.resolve().name)
    output.mkdir(parents=True, exist_ok=True)
    recipes = {run.name: _write_recipe(grid, run, args, output) for run in grid.runs}
    done = {name for name, (recipe, _) in recipes.items() if _is_done(output / name, recipe)}
    jobs = Jobs(
        [Job(run.name, words, [run.start] if run.start else [])
         for run in grid.runs for words in [recipes[run.name][1]]],
        set(done), args.jobs, lambda name: output / f'{name}.log')
    resumed = {run.name for run in grid.runs if (output / run.name).is_dir()}
    with tqdm(total=len(grid.runs), initial=len(done), desc=grid.title, disable=None) as bar:
        for name, cost in jobs.run() if len(done) < len(grid.runs) else ():
            # What a run that was resumed took before is not known.
            taken = asdict(cost) if name not in resumed else {'seconds': None, 'cpu_seconds': None}
            write_whole(output / name / 'done.json', json.dumps(
                {'recipe': recipes[name][0], 'where': _where(), **taken}, indent=1, ensure_ascii=False))
            bar.update()
            bar.write(f'{name}: done in {cost.seconds:.0f} s', file=sys.stderr)
    results = collect(grid, output, args)
    for name, table in ((RESULTS, results.runs), (DIFFERENCES, results.differences)):
        write_whole(file_of(folder, name, args.split), table.to_csv(index=False, float_format='%.6g'))
    write_tables(folder, args.split, read_results(folder, args.split, grid))


def file_of(folder: Path, name: str, split: str) -> Path:
    """A file of results: of the validation split as it is called, of another one with that in its name."""
    stem, ending = name.split('.')
    return folder / (name if split == 'val' else f'{stem}-{Path(split).stem}.{ending}')


def _write_recipe(
        grid: Grid,
        run: GridRun,
        args: argparse.Namespace,
        output: Path,
) -> tuple[dict[str, Any], list[str]]:
    """A run's recipe, written and checked, and the words that train it.

    Raises:
        UserError: Its flags do not go together.
    """
    recipe = dict(run.recipe)
    if run.start is not None:
        recipe['initial_checkpoint'] = str(output / run.start / 'last.pth.tar')
    path = output / f'{run.name}.yaml'
    write_whole(path, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
    words = [args.data_dir, '-c', str(path), '--seed', str(run.seed), '--output', str(output), '--experiment', run.name,
             '--resume', 'auto', *args.flags]
    parser = Parser(prog='timm-multilabel grid')
    train_flags.add_flags(parser)
    try:
        check_phases(parse_with_config(parser, words))
    except UserError as error:
        raise UserError(f"setting '{run.setting}': {error.line}") from error
    return {'flags': recipe, 'command line': args.flags, 'data': os.path.realpath(args.data_dir)}, words


def _is_done(folder: Path, recipe: dict[str, Any]) -> bool:
    """Whether a run is finished.

    Raises:
        UserError: What is there is another run.
    """
    path = folder / 'done.json'
    if not path.is_file():
        return False
    if json.loads(path.read_text(encoding='utf-8'))['recipe'] != json.loads(json.dumps(recipe)):
        raise UserError(f'{folder}: a run of other flags than grid.yaml and the command line have now; remove it, or '
                        'choose another --output')
    return True


def _where() -> dict[str, str]:
    """The commit of this program and the machine."""
    here = Path(__file__).parent
    commit = ''
    with suppress(OSError, subprocess.CalledProcessError):
        git = ['git', '-C', str(here)]
        commit = subprocess.check_output([*git, 'rev-parse', '--short', 'HEAD'], text=True, stderr=subprocess.DEVNULL)
        changed = subprocess.check_output(
            [*git, 'status', '--porcelain', '--', str(here)], text=True, stderr=subprocess.DEVNULL)
        commit = commit.strip() + (' with changes' if changed.strip() else '')
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {'commit': commit, 'machine': f'{device}, {os.cpu_count()} cores', 'torch': torch.__version__}


def _processor() -> str:
    """What the processor calls itself."""
    with suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text(encoding='utf-8').split('\n'):
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    return platform.processor() or platform.machine()


def collect(grid: Grid, output: Path, args: argparse.Namespace) -> GridResults:
    """The figures of all runs, and the differences of settings to the first one, value by value."""
    runs = [run for run in grid.runs if not run.is_start]
    if any((output / run.name / 'summary.csv').is_file() and 'eval_loss' not in
           pd.read_csv(output / run.name / 'summary.csv', nrows=1) for run in runs):
        raise UserError(f'{output}: a setting trains no heads, so it has no figures; make it one of the starts')
    device = start_device(None)
    answers = {}
    for run in tqdm(runs, desc='predictions', leave=False, disable=None):
        answers[run.name] = Answers.of(stored_predictions(
            output / run.name, args.split, Path(args.data_dir), device, 0, lambda line: None))
    names = list(answers)
    shared = dict(zip(names, share(list(answers.values()), names, args.split, _say)))
    figures = run_figures(list(shared.values()))
    heads = [head for head, figure in figures.columns if figure == 'top1' and head != MEAN_HEAD]
    if not heads:
        raise UserError(f'{output}: no head of classes, which alone are compared here; see timm-multilabel compare')
    taken = {'setting', grid.axis, 'seed', MEAN, 'minutes', 'cpu_minutes', 'command', *_where()}.intersection(heads)
    if taken:
        raise UserError(f"{output}: a head is called '{taken.pop()}', as a column of {RESULTS}; rename it in the CSVs")
    ready = {run.name: json.loads((output / run.name / 'done.json').read_text(encoding='utf-8')) for run in grid.runs}
    command = shlex.join(['timm-multilabel', 'grid', args.experiment, args.data_dir,
                          *(['--jobs', str(args.jobs)] if args.jobs > 1 else []),
                          *(['--split', args.split] if args.split != 'val' else []),
                          *(['--flags', *args.flags] if args.flags else [])])
    rows = []
    for number, run in enumerate(runs):
        found = figures.iloc[number]
        row = {'setting': run.setting, **({grid.axis: run.value} if grid.axis else {}), 'seed': run.seed}
        row |= {head: found[head, 'top1'] for head in heads}
        row[MEAN] = sum(row[head] for head in heads) / len(heads)
        for name, key in (('minutes', 'seconds'), ('cpu_minutes', 'cpu_seconds')):
            spent = [ready[each][key] for each in (run.name, run.start) if each is not None]
            row[name] = sum(spent) / 60 if None not in spent else None
        rows.append({**row, **ready[run.name]['where'], 'command': command})
    differences = []
    for value in grid.values or [None]:
        of_value = [run for run in runs if run.value == value]
        names = [name for name in grid.settings if any(run.setting == name for run in of_value)]
        groups = [[number for number, run in enumerate(of_value) if run.setting == name] for name in names]
        if names[0] != grid.settings[0]:
            continue  # there is nothing to compare with
        found = compare_groups([shared[run.name] for run in of_value], groups, 0)
        found = found[found['figure'] == 'top1']
        for row in found.itertuples(index=False):
            differences.append({
                **({grid.axis: value} if grid.axis else {}), 'setting': names[row.group],
                'head': row.head or MEAN, 'difference': row.difference, 'low': row.low, 'high': row.high, 'p': row.p,
                'holm': row.holm})
    return GridResults(
        grid.title, grid.about, args.split, grid.axis, pd.DataFrame(rows), pd.DataFrame(differences), heads)


def read_results(folder: Path, split: str, grid: Grid) -> GridResults:
    """The results of an experiment, as its CSVs have them.

    Raises:
        UserError: There are none yet.
    """
    for name in (RESULTS, DIFFERENCES):
        if not (path := file_of(folder, name, split)).is_file():
            raise UserError(f'{path}: not there; run the experiment (without --tables) first')
    unknown = {'minutes': [''], 'cpu_minutes': ['']}  # of runs that were resumed
    runs = pd.read_csv(file_of(folder, RESULTS, split), keep_default_na=False, na_values=unknown)
    try:
        differences = pd.read_csv(file_of(folder, DIFFERENCES, split), keep_default_na=False)
    except pd.errors.EmptyDataError:  # of one setting
        differences = pd.DataFrame()
    columns = list(runs.columns)
    heads = columns[columns.index('seed') + 1:columns.index(MEAN)]
    return GridResults(grid.title, grid.about, split, grid.axis, runs, differences, heads)


def write_tables(folder: Path, split: str, results: GridResults) -> None:
    """Write tables and picture, and print the tables."""
    tables = grid_markdown(results)
    picture = BytesIO()
    draw_grid(results).savefig(picture, format='png', dpi=110)
    write_whole(file_of(folder, TABLES, split), tables)
    write_whole(file_of(folder, PICTURE, split), picture.getvalue())
    print(tables)
    _say(f'Wrote {", ".join(str(file_of(folder, name, split)) for name in _FILES)}')


def _say(line: str) -> None:
    """Standard output is for the tables."""
    print(printable(line), file=sys.stderr)
