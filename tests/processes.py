"""Commands as real processes, forked from one that has imported torch and timm: starting Python anew takes 6 s of CPU.

tests/test_scripts.py starts commands as users do.
"""
import importlib
import io
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload([
    'timm_multilabel.api.train', 'timm_multilabel.api.validate', 'timm_multilabel.cli.main', 'torch.distributed.run',
    'torch._dynamo', 'timm_multilabel.reports.curves'])


class Forked:
    """What `subprocess.Popen([sys.executable, *words])` is; a launcher's own processes are its children, also so.

    Args:
        words: A script, or -m and a module, or -c and a text, and what follows.
        out: A file that its output is added to.
        errors: Likewise; the same one by default.
        cwd: Where it runs.
        environment: What differs from this process's.
    """

    def __init__(
            self, words: Sequence[str | Path], out: Path, errors: Path | None = None, cwd: Path = ROOT,
            **environment: str):
        self._start(SERVER, words, {**os.environ, **environment}, (out, errors or out), cwd)

    def _start(
            self, context: Any, words: Sequence[str | Path], env: Mapping[str, str], files: Sequence[Path],
            cwd: Path | None) -> None:
        self.process = context.Process(target=_python, args=([str(word) for word in words], dict(env), files, cwd))
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    returncode = property(poll)

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.process.name, timeout or 0)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _OfLauncher(Forked):
    """A process that the launcher starts. Its words begin with the name of Python's program and -u."""

    def __init__(self, args: Sequence[str], env: Mapping[str, str], **_: Any):
        self._start(multiprocessing.get_context('fork'), args[2:], env, (), None)


def _python(words: list[str], env: dict[str, str], files: Sequence[Path], cwd: Path | None) -> None:
    """What a new Python would do, without what it inherits from the process that it is forked from."""
    multiprocessing.set_start_method(None, force=True)  # else loaders start a server of their own
    os.setsid()
    if cwd is not None:
        os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, path in enumerate(files, 1):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(open(number, 'wb', 0, closefd=False), 'utf-8', write_through=True) for number in (1, 2))
    torch.set_num_threads(int(env['OMP_NUM_THREADS']))
    # No public name of torch's has its launcher start processes otherwise than by a new program.
    importlib.import_module('torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler') \
        .Popen = _OfLauncher
    kind, *rest = words
    if kind == '-c':
        sys.argv = ['-c', *rest[1:]]
        exec(rest[0], {'__name__': '__main__'})
    elif kind == '-m':
        sys.argv = rest
        runpy.run_module(rest[0], run_name='__main__', alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(kind).parent))
        runpy.run_path(kind, run_name='__main__')
