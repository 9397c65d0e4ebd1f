"""Training runs as processes of their own, several at once."""
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from timm_multilabel.errors import UserError
from timm_multilabel.files import open_to_append
from timm_multilabel.training.parent import LAUNCHER
from timm_multilabel.training.signals import SAVED

_POLL = 0.1  # seconds


@dataclass(frozen=True)
class Job:
    """A training run.

    Args:
        name: What it is called; its output goes to a file beside its folder.
        words: What follows `timm-multilabel train`.
        after: The name of the job that must be done before, if any.
    """
    name: str
    words: Sequence[str]
    after: str | None = None


@dataclass(frozen=True)
class Cost:
    """What a job took: seconds by the clock, and of processors, of all its processes."""
    seconds: float
    cpu_seconds: float


@dataclass
class _Running:
    """A job and its process."""
    job: Job
    process: subprocess.Popen[bytes]
    started: float
    cpu_seconds: float = 0.0

    def reap(self, options: int = 0) -> bool:
        """Whether it has ended; wait for it, unless the options are os.WNOHANG."""
        pid, status, usage = os.wait4(self.process.pid, options)  # unlike Popen.wait it tells what was used
        if pid:
            self.process.returncode = os.waitstatus_to_exitcode(status)
            self.cpu_seconds = usage.ru_utime + usage.ru_stime
        return bool(pid)


@dataclass
class Jobs:
    """Runs jobs, so many at once, in order as far as what they come after allows.

    Args:
        jobs: All of them.
        done: Names of those that are done already.
        at_once: How many.
        log: The file that the output of a job is added to, by its name.
        starts: Called with the name of a job that is about to start.
        say: Prints a line.
    """
    jobs: Sequence[Job]
    done: set[str]
    at_once: int
    log: Callable[[str], Path]
    starts: Callable[[str], object]
    say: Callable[[str], object]
    running: list[_Running] = field(default_factory=list)

    def run(self) -> Generator[tuple[str, Cost], None, None]:
        """Run them; the name and the cost of each as it ends.

        After one that fails no further one starts; those that run are waited for. Where this is stopped, they are told
        to save and stop, and once more where it is stopped again; no process is left.

        Raises:
            UserError: A job failed.
        """
        left = [job for job in self.jobs if job.name not in self.done]
        failures: list[str] = []
        try:
            while self.running or left and not failures:
                ready = [job for job in left if job.after in (None, *self.done)] if not failures else []
                for job in ready[:self.at_once - len(self.running)]:
                    left.remove(job)
                    self._start(job)
                ended = self._wait()
                if ended.process.returncode:
                    failures.append(self._describe(ended))
                    self.say(failures[-1])
                else:
                    self.done.add(ended.job.name)
                    yield ended.job.name, Cost(time.monotonic() - ended.started, ended.cpu_seconds)
        finally:
            self._stop()
        if failures:
            raise UserError(failures[0])

    def _start(self, job: Job) -> None:
        self.starts(job.name)
        threads = max(1, (os.cpu_count() or 1) // self.at_once)
        environment: Mapping[str, str] = {
            'OMP_NUM_THREADS': str(threads), **os.environ, LAUNCHER: str(os.getpid())}
        with open_to_append(self.log(job.name)) as log:
            process = subprocess.Popen(
                [sys.executable, '-m', 'timm_multilabel', 'train', *job.words], stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, env=environment, start_new_session=True)  # a Ctrl-C is for us to pass on
        self.running.append(_Running(job, process, time.monotonic()))

    def _wait(self) -> _Running:
        while (ended := next((each for each in self.running if each.reap(os.WNOHANG)), None)) is None:
            time.sleep(_POLL)
        self.running.remove(ended)
        return ended

    def _describe(self, ended: _Running) -> str:
        log = self.log(ended.job.name)
        lines = log.read_text(encoding='utf-8', errors='replace').split('\n')
        last = next((line for line in reversed(lines) if line.strip()), '').rpartition('error: ')[2]
        code = ended.process.returncode
        way_out = 'the same command goes on' if code == SAVED else f'all of it is in {log}'
        return f"run '{ended.job.name}' ended with status {code}: {last.strip()}; {way_out}"

    def _stop(self) -> None:
        """Tell what runs to save and stop, and wait for it."""
        if self.running:
            self.say(f'{", ".join(each.job.name for each in self.running)}: to save and stop')
        tell = True
        while self.running:
            try:
                for each in self.running if tell else ():
                    with suppress(ProcessLookupError):
                        os.kill(each.process.pid, signal.SIGTERM)
                tell = False
                with suppress(ChildProcessError):  # it was waited for in the moment of the signal
                    self.running[0].reap()
                self.running.pop(0)
            except KeyboardInterrupt:
                tell = True
