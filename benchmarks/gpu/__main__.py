"""All that is claimed of GPUs, proved by one command: stages, each in a process of its own with a time limit.

`python -m benchmarks.gpu --help`. It runs from a checkout, without installing the project. `DIR/gpu.json` is written
anew with each figure, so that a run that is cut off still tells; what the stages print is in `DIR/gpu.log`. Where there
is no CUDA it is a dry run: every stage with tiny sizes on the CPU, whose figures mean nothing.

Like `runner.py`, this module needs nothing but Python's own library: it has to tell which of the others is missing.
"""
import argparse
import json
import multiprocessing
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.gpu.runner import run_stage

ROOT = Path(__file__).parents[2]
STAGES = {'tests': 120, 'nt_xent': 60, 'step': 100, 'heads': 35, 'input': 80, 'large_batch': 25, 'throughput': 30,
          'epoch': 60, 'fork_table': 60}
"""The stages, most telling first, with their shares of the time; what one leaves goes to those after it."""
LEAST_SECONDS = 3
"""A stage with less time than that is not started."""


def environment(argv: Sequence[str], commit: str | None) -> dict[str, Any]:
    """What the figures are of: card, driver, versions, date, commit, command line."""
    card, driver = 'none', 'none'
    found = _output(['nvidia-smi', '--query-gpu=name,driver_version', '--format=csv,noheader'])
    if found:
        card, _, driver = found.splitlines()[0].partition(', ')
    versions = {}
    for package in ('torch', 'timm'):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = 'not installed'
    return {
        'card': card, 'driver': driver, 'dry_run': not _has_cuda(), **versions,
        'python': platform.python_version(), 'cores': os.cpu_count(),
        'date': datetime.now(timezone.utc).isoformat(timespec='seconds'),
        'commit': commit or _commit(), 'argv': list(argv)}


def _commit() -> str:
    return _output(['git', '-C', str(ROOT), 'rev-parse', 'HEAD']) or 'unknown'


def _output(command: Sequence[str]) -> str:
    """What a command prints, nothing where it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ''


def _has_cuda() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def run(out: Path, stages: Sequence[str], minutes: float, facts: dict[str, Any], data: Path | None) -> dict[str, Any]:
    """Run stages one after the other, with a line on each.

    Args:
        out: Folder of gpu.json and gpu.log.
        stages: Names of `STAGES`.
        minutes: For all of them together.
        facts: What `environment` says.
        data: The data directory of the fork's table; drawn photos where there is none.

    Returns:
        What is in gpu.json: the facts, and 'stages' by name.
    """
    out.mkdir(parents=True, exist_ok=True)
    everything = {**facts, 'stages': {}}
    end = time.monotonic() + 60 * minutes
    multiprocessing.set_forkserver_preload(['benchmarks.large_batch', 'benchmarks.train', 'timm_multilabel.api.train'])
    (out / 'gpu.log').unlink(missing_ok=True)
    for index, name in enumerate(stages):
        def told(result: dict[str, Any], name: str = name) -> None:
            everything['stages'][name] = result
            scratch = out / '.gpu.json.tmp'
            scratch.write_text(json.dumps(everything, indent=1) + '\n', encoding='utf-8')
            os.replace(scratch, out / 'gpu.json')

        left = end - time.monotonic()
        limit = left * STAGES[name] / sum(STAGES[each] for each in stages[index:])
        if limit < LEAST_SECONDS:
            result = {'status': 'no time left', 'seconds': 0.0, 'limit': round(max(0.0, limit), 1), 'cases': {}}
        else:
            print(f'{name}: up to {limit:.0f} s', flush=True)
            result = run_stage(
                'benchmarks.gpu.stages', 'run', name, facts['dry_run'], data and str(data.absolute()), limit=limit,
                log=out / 'gpu.log', told=told, method='forkserver' if facts['dry_run'] else 'spawn')
        told(result)
        error = f' ({result["error"]})' if 'error' in result else ''
        print(f'{name}: {result["status"]}{error}, {result["seconds"]:.0f} s', flush=True)
    return everything


def table(everything: dict[str, Any]) -> str:
    """Markdown: what it was run on, how the stages ended, and the figures of each."""
    of = everything
    lines = [
        f'{of["card"]}, driver {of["driver"]}, torch {of["torch"]}, timm {of["timm"]}, {of["cores"]} cores; '
        f'{of["date"][:10]}, commit {of["commit"][:9]}' + ('; **a dry run on a CPU**' if of['dry_run'] else ''), '',
        '| stage | | seconds | limit |', '| --- | --- | --- | --- |']
    for name, stage in of['stages'].items():
        how = ': '.join(filter(None, [stage['status'], stage.get('error')]))
        lines.append(f'| {name} | {_cell(how)} | {_cell(stage["seconds"])} | {_cell(stage["limit"])} |')
    for name, stage in of['stages'].items():
        columns = list(dict.fromkeys(column for figures in stage['cases'].values() for column in figures))
        if columns:
            lines += ['', '| ' + ' | '.join([name, *(column.replace('_', ' ') for column in columns)]) + ' |',
                      '| --- ' * (len(columns) + 1) + '|']
            lines += ['| ' + ' | '.join([_cell(case), *(_cell(figures.get(column)) for column in columns)]) + ' |'
                      for case, figures in stage['cases'].items()]
    return '\n'.join(lines)


def name_of(facts: dict[str, Any]) -> str:
    """What gpu.json is called in benchmarks/results/: the card and the date, 'nvidia-h200-2026-11-30.json'."""
    return f'{re.sub(r"[^a-z0-9]+", "-", facts["card"].lower()).strip("-")}-{facts["date"][:10]}.json'


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f'{value:,.1f}' if abs(value) >= 100 else f'{value:.3g}'
    return '' if value is None else ' '.join(str(value).replace('|', '\\|').split())


def main(argv: Sequence[str]) -> None:
    """Run the stages and print their table, or print that of an earlier run."""
    parser = argparse.ArgumentParser(prog='benchmarks.gpu', description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--minutes', type=float, default=8, metavar='M', help='for all stages together (default: 8)')
    parser.add_argument('--out', type=Path, metavar='DIR', help='folder of gpu.json and gpu.log')
    parser.add_argument('--only', nargs='+', choices=STAGES, metavar='STAGE', help=f'of {", ".join(STAGES)}')
    parser.add_argument('--commit', help='the commit of this copy, where git cannot tell')
    parser.add_argument('--table', type=Path, metavar='FILE.json', help='print the Markdown table of an earlier run')
    parser.add_argument('--data', type=Path, metavar='DIR', help="data directory for the fork's table (default: drawn)")
    parser.add_argument('--wheels', type=Path, metavar='DIR',
                        help='run nothing; download into DIR what a machine without a network lacks')
    parser.add_argument('--has', nargs='+', default=[], metavar='PACKAGE', help='packages that the machine has already')
    parser.add_argument('--images', type=Path, metavar='PATH', help='take along photos of a data directory or a CSV')
    parser.add_argument('--rows', type=int, metavar='N', help='photos to train on; a quarter as many to validate on')
    args = parser.parse_args(argv)
    if args.table is None and args.out is None and args.wheels is None:
        parser.error('name a folder with --out or --wheels, or a file with --table')
    if args.wheels is None and (args.images or args.has or args.rows):
        parser.error('--images, --rows and --has go with --wheels')
    if args.rows is not None and args.rows < 1:
        parser.error(f'--rows {args.rows}: expected 1 or more')
    if args.data is not None and not args.data.is_dir():
        parser.error(f'--data {args.data}: no such folder')
    if args.wheels is not None:
        from benchmarks.gpu.wheels import pack
        from timm_multilabel.cli.main import guarded
        with guarded(parser.prog):
            print(pack(args.wheels, args.has, args.images, args.rows, args.commit or _commit()))
        return
    if args.table is not None:
        print(table(json.loads(args.table.read_text(encoding='utf-8'))))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the stage at work ends too
    stages = [name for name in STAGES if not args.only or name in args.only]
    made = run(args.out, stages, args.minutes, environment(argv, args.commit), args.data)
    print('\n' + table(made))
    if not made['dry_run']:
        print(f'\nTo keep it: cp {args.out / "gpu.json"} benchmarks/results/{name_of(made)}')


if __name__ == '__main__':
    main(sys.argv[1:])
