"""Training runs as processes of their own, several at once."""
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from timm_multilabel.errors import UserError
from timm_multilabel.training.signals import SAVED

_TRAIN = 'import sys; from timm_multilabel.cli.main import main; sys.argv[0] = "timm-multilabel"; main()'


@dataclass(frozen=True)
class Job:
    """A training run.

    Args:
        name: What it is called; its output goes to a file beside its folder.
        words: What follows `timm-multilabel train`.
        after: Names of jobs that must be done before.
    """
    name: str
    words: Sequence[str]
    after: Sequence[str] = ()


@dataclass(frozen=True)
class Cost:
    """What a job took: seconds by the clock, and of processors, of all its processes."""
    seconds: float
    cpu_seconds: float


@dataclass
class Jobs:
    """Runs jobs, so many at once, in order as far as what they come after allows.

    Args:
        jobs: All of them.
        done: Names of those that are done already.
        at_once: How many.
        log: The file that the output of a job goes to, by its name.
    """
    jobs: Sequence[Job]
    done: set[str]
    at_once: int
    log: Callable[[str], Path]
    running: dict[int, tuple[Job, float]] = field(default_factory=dict)

    def run(self) -> Iterator[tuple[str, Cost]]:
        """Run them; the name and the cost of each as it ends.

        However this ends, no process is left: those that run are told to save and stop.

        Raises:
            UserError: A job failed.
        """
        left = [job for job in self.jobs if job.name not in self.done]
        try:
            while left or self.running:
                ready = [job for job in left if self.done.issuperset(job.after)]
                for job in ready[:self.at_once - len(self.running)]:
                    left.remove(job)
                    self._start(job)
                yield self._wait()
        finally:
            self._stop()

    def _start(self, job: Job) -> None:
        threads = max(1, (os.cpu_count() or 1) // self.at_once)
        environment: Mapping[str, str] = {'OMP_NUM_THREADS': str(threads), **os.environ}
        with open(self.log(job.name), 'wb') as log:
            process = subprocess.Popen(
                [sys.executable, '-c', _TRAIN, 'train', *job.words], stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, env=environment, start_new_session=True)  # a Ctrl-C is for us to pass on
        self.running[process.pid] = job, time.monotonic()

    def _wait(self) -> tuple[str, Cost]:
        pid, status, usage = os.wait3(0)
        job, started = self.running.pop(pid)
        code = os.waitstatus_to_exitcode(status)
        if code:
            log = self.log(job.name)
            lines = log.read_text(encoding='utf-8', errors='replace').split('\n')
            last = next((line for line in reversed(lines) if line.strip()), '').rpartition('error: ')[2]
            way_out = 'the same command goes on' if code == SAVED else f'all of it is in {log}'
            raise UserError(f"run '{job.name}' ended with status {code}: {last.strip()}; {way_out}")
        self.done.add(job.name)
        return job.name, Cost(time.monotonic() - started, usage.ru_utime + usage.ru_stime)

    def _stop(self) -> None:
        for pid in self.running:
            os.kill(pid, 15)
        while self.running:
            pid, _, _ = os.wait3(0)
            self.running.pop(pid, None)
