"""Cases of a benchmark, each in a process of its own: its peak memory is its own, and what it breaks is its own."""
import ctypes
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch

MEBIBYTE = 2 ** 20
LEAST_SECONDS = 0.5
"""What is faster is repeated until it takes that long, and divided."""


@dataclass
class Figures:
    """What was measured of a case.

    Args:
        seconds: Of a step, in each round.
        peak: The most memory beyond that of the process before its first real step, in bytes.
        skipped: Why there is nothing, if so.
    """
    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    skipped: str = ''

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)

    def times_as_long_as(self, other: 'Figures') -> float:
        """The median over rounds of the ratio of seconds."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def measure(cases: dict[str, tuple[Callable[..., Callable[[], Any]], tuple]], rounds: int, device: str,
            threads: int | None = None) -> dict[str, Figures]:
    """Measure cases in turns, round by round, so that a machine's slow hours hit all of them.

    Args:
        cases: By name a function at the top of a module, and its arguments; it returns a step. To warm up it is also
            called with `small=True`.
        rounds: Samples of each case.
        device: 'cpu' or 'cuda'.
        threads: Threads of the CPU; torch's own number when None.
    """
    workers = {name: _Worker(make, args, device, threads) for name, (make, args) in cases.items()}
    figures = {name: Figures() for name in cases}
    try:
        for name, worker in workers.items():
            worker.ask(figures[name])  # to make its case; one after the other too
        for first in range(rounds):
            names = list(cases)
            for name in names[first % len(names):] + names[:first % len(names)]:
                if not figures[name].skipped:
                    workers[name].ask(figures[name])
    finally:
        for worker in workers.values():
            worker.end()
    return figures


class _Worker:
    """A process that waits to be asked for a sample."""

    def __init__(self, make: Callable, args: tuple, device: str, threads: int | None):
        context = multiprocessing.get_context('spawn')
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, args, device, threads), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, figures: Figures) -> None:
        """Have it do the next thing, and add to figures what it measured or why it could not."""
        try:
            self.connection.send('next')
            answer = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            answer = f'its process was killed ({self.process.exitcode}): out of memory?'
        if isinstance(answer, str):
            figures.skipped = answer
            self.end()  # now: what it has still to free would cost the others time
        elif answer is not None:
            figures.seconds.append(answer[0])
            figures.peak = max(figures.peak, answer[1])

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def _serve(connection: Connection, make: Callable, args: tuple, device: str, threads: int | None) -> None:
    """Make a case and take samples of it, each when asked to."""
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        connection.recv()
        if device == 'cpu':
            _limit_memory()
        make(*args, small=True)()
        step = make(*args)
        before = _allocated(device)
        step()
        connection.send(None)
        while connection.recv():
            connection.send((_seconds(step, device), _most_allocated(device) - before))
    except ImportError as error:
        connection.send(f"not installed ({error}); pip install '.[bench]'")
    except (RuntimeError, MemoryError) as error:
        text = ' '.join(str(error).split())
        connection.send('out of memory' if 'memory' in text or isinstance(error, MemoryError) else text[:100])
    except EOFError:
        pass


def _seconds(step: Callable[[], Any], device: str) -> float:
    """Seconds of a step."""
    steps, started = 0, time.perf_counter()
    while not steps or time.perf_counter() - started < LEAST_SECONDS:
        step()
        steps += 1
        if device == 'cuda':
            torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / steps
    if device == 'cuda':
        torch.cuda.empty_cache()  # for the cases of the other processes
    return seconds


def _allocated(device: str) -> int:
    """Bytes of memory that this process has; the most that it has had starts again from there."""
    gc.collect()
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # else what the step before has freed would be there already
    with suppress(OSError):
        Path('/proc/self/clear_refs').write_text('5')
    return _resident('VmRSS')


def _most_allocated(device: str) -> int:
    """Bytes of memory that this process had at most."""
    return torch.cuda.max_memory_allocated() if device == 'cuda' else _resident('VmHWM')


def _resident(name: str) -> int:
    """Resident memory of this process in bytes, now ('VmRSS') or at most ('VmHWM')."""
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise OSError(f'/proc/self/status: no {name}')


def _limit_memory() -> None:
    """Let an allocation that the machine has no memory for fail, rather than have the kernel kill some process."""
    import resource
    available = psutil.virtual_memory().available  # with what the kernel's file cache would give back
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + int(0.9 * available), resource.RLIM_INFINITY))
