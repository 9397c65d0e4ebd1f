"""A stage in a process of its own, with a time limit: what it yields is known as soon as it yields it.

This module needs nothing but Python's own library, so that it can tell which of the others is missing.
"""
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


def run_stage(
        module: str,
        function: str,
        *args: Any,
        limit: float,
        log: Path,
        told: Callable[[dict[str, Any]], None],
        method: str = 'spawn',
) -> dict[str, Any]:
    """Run a stage in a process of its own, and end all that it has started.

    Args:
        module: Where the stage is; only its process imports it.
        function: Its name there; it yields names of cases with their figures, of which later ones take the place of
            earlier ones.
        *args: Its arguments.
        limit: Seconds after which it is killed.
        log: What it prints is added to this file.
        told: Is given what is known so far whenever there is more.
        method: How its process starts. CUDA needs 'spawn'; 'forkserver' imports once for all stages.

    Returns:
        'status', 'seconds', 'limit', 'cases' by name, and 'error' where the status is not 'done'.
    """
    result: dict[str, Any] = {'status': 'running', 'seconds': 0.0, 'limit': round(limit, 1), 'cases': {}}
    log.touch()
    started, began = time.monotonic(), log.stat().st_size
    with TemporaryDirectory() as folder, open(Path(folder) / 'lines', 'w+', encoding='utf-8') as lines:
        told(result)
        process = multiprocessing.get_context(method).Process(
            target=_serve, args=(module, function, args, lines.name, str(log)))
        process.start()
        try:
            ended, rest = False, ''
            while not ended:
                process.join(0.1)
                ended = not process.is_alive()
                seconds = time.monotonic() - started
                *whole, rest = (rest + lines.read()).split('\n')
                result['cases'] |= dict(map(json.loads, whole))
                result['seconds'] = round(seconds, 1)
                if whole:
                    told(result)
                if not ended and seconds > limit:
                    result |= {'status': 'out of time', 'error': f'it printed last: {_last_line(log, began)}'}
                    break
        finally:
            process.kill()
            with suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)  # its loader processes
            process.join()
    if result['status'] == 'running':
        bad = [case for case, figures in result['cases'].items() if 'error' in figures]
        last = _last_line(log, began)
        if process.exitcode:
            lacks = last.startswith(('ImportError', 'ModuleNotFoundError'))
            result |= {'status': 'lacks a library' if lacks else 'failed',
                       'error': last if lacks else f'exit status {process.exitcode}: {last}'}
        elif bad:
            result |= {'status': 'failed', 'error': f'{len(bad)} of {len(result["cases"])} cases: {", ".join(bad)}'}
        else:
            result['status'] = 'done'
    return result


def _serve(module: str, function: str, args: tuple[Any, ...], lines: str, log: str) -> None:
    """Run a stage: a line of JSON for each case."""
    os.setsid()  # a group of its own, so that the processes that it starts end with it
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), stream)
    for case in getattr(import_module(module), function)(*args):
        with open(lines, 'a', encoding='utf-8') as file:
            file.write(json.dumps(case) + '\n')


def _last_line(log: Path, began: int) -> str:
    """The last line that a stage has printed."""
    text = log.read_bytes()[began:].decode(errors='replace').strip()
    return text.splitlines()[-1][:300] if text else 'nothing'
