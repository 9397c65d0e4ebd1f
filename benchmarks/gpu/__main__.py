"""All that is claimed of GPUs, proved by one command: stages, each in a process of its own with a time limit.

`python -m benchmarks.gpu --help`. It runs from a checkout, without installing the project. `DIR/gpu.json` is written
anew with each figure, so that a run that is cut off still tells; what the stages print is in `DIR/gpu.log`. Where there
is no CUDA it is a dry run: every stage with tiny sizes on the CPU, whose figures mean nothing.

This module needs nothing but Python's own library, so that it can tell which of the others is missing.
"""
import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

ROOT = Path(__file__).parents[2]
STAGES = {'tests': 120, 'nt_xent': 60, 'step': 110, 'heads': 40, 'input': 90, 'large_batch': 30, 'throughput': 30}
"""The stages, most telling first, with their shares of the time; what one leaves goes to those after it."""
LEAST_SECONDS = 3
"""A stage with less time than that is not started."""

Told = Callable[[dict[str, Any]], None]


def run_stage(command: Sequence[str], limit: float, log: IO[bytes], told: Told) -> dict[str, Any]:
    """Run a stage in a process of its own, and end all that it has started.

    Args:
        command: Its command; the path of a file is added, to which it writes a line of JSON for each case: its name and
            its figures, of which later ones take the place of earlier ones.
        limit: Seconds after which it is killed.
        log: Where its output goes.
        told: Is given what is known so far whenever there is more.

    Returns:
        'status', 'seconds', 'limit', 'cases' by name, and 'error' where the status is not 'done'.
    """
    result: dict[str, Any] = {'status': 'running', 'seconds': 0.0, 'limit': round(limit, 1), 'cases': {}}
    started, began = time.monotonic(), os.fstat(log.fileno()).st_size
    with TemporaryDirectory() as folder, open(Path(folder) / 'lines', 'w+', encoding='utf-8') as lines:
        told(result)
        # A session of its own, so that its loader processes end with it.
        process = subprocess.Popen(
            [*command, lines.name], stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
        try:
            ended, rest = False, ''
            while not ended:
                ended = process.poll() is not None
                seconds = time.monotonic() - started
                *whole, rest = (rest + lines.read()).split('\n')
                result['cases'] |= dict(map(json.loads, whole))
                result['seconds'] = round(seconds, 1)
                if whole:
                    told(result)
                if not ended and seconds > limit:
                    result |= {'status': 'out of time', 'error': f'it printed last: {_last_line(log, began)}'}
                    break
                time.sleep(0 if ended else 0.1)
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
    if result['status'] == 'running':
        bad = [case for case, figures in result['cases'].items() if 'error' in figures]
        last = _last_line(log, began)
        if process.returncode:
            lacks = last.startswith(('ImportError', 'ModuleNotFoundError'))
            result |= {'status': 'lacks a library' if lacks else 'failed',
                       'error': last if lacks else f'exit status {process.returncode}: {last}'}
        elif bad:
            result |= {'status': 'failed', 'error': f'{len(bad)} of {len(result["cases"])} cases: {", ".join(bad)}'}
        else:
            result['status'] = 'done'
    return result


def _last_line(log: IO[bytes], began: int) -> str:
    """The last line that a stage has printed."""
    log.seek(began)
    text = log.read().decode(errors='replace').strip()
    return text.splitlines()[-1][:300] if text else 'nothing'


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
        'commit': commit or _output(['git', '-C', str(ROOT), 'rev-parse', 'HEAD']) or 'unknown', 'argv': list(argv)}


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


def run(out: Path, stages: Sequence[str], minutes: float, facts: dict[str, Any]) -> dict[str, Any]:
    """Run stages one after the other, with a line on each.

    Args:
        out: Folder of gpu.json and gpu.log.
        stages: Names of `STAGES`.
        minutes: For all of them together.
        facts: What `environment` says.

    Returns:
        What is in gpu.json: the facts, and 'stages' by name.
    """
    out.mkdir(parents=True, exist_ok=True)
    everything = {**facts, 'stages': {}}
    end = time.monotonic() + 60 * minutes
    (out / 'gpu.log').unlink(missing_ok=True)
    with open(out / 'gpu.log', 'a+b') as log:  # to append: a stage and this process have one place in it
        for index, name in enumerate(stages):
            def told(result: dict[str, Any], name: str = name) -> None:
                everything['stages'][name] = result
                scratch = out / '.gpu.json.tmp'
                scratch.write_text(json.dumps(everything, indent=1) + '\n', encoding='utf-8')
                os.replace(scratch, out / 'gpu.json')

            left = end - time.monotonic()
            limit = left * STAGES[name] / sum(STAGES[each] for each in stages[index:])
            command = [sys.executable, '-m', 'benchmarks.gpu.stages', *(['--dry'] if facts['dry_run'] else []), name]
            if limit < LEAST_SECONDS:
                result = {'status': 'no time left', 'seconds': 0.0, 'limit': round(max(0.0, limit), 1), 'cases': {}}
            else:
                print(f'{name}: up to {limit:.0f} s', flush=True)
                result = run_stage(command, limit, log, told)
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
    args = parser.parse_args(argv)
    if args.table is None and args.out is None:
        parser.error('name a folder with --out, or a file with --table')
    if args.table is not None:
        print(table(json.loads(args.table.read_text(encoding='utf-8'))))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the stage at work ends too
    stages = [name for name in STAGES if not args.only or name in args.only]
    print('\n' + table(run(args.out, stages, args.minutes, environment(argv, args.commit))))


if __name__ == '__main__':
    main(sys.argv[1:])
