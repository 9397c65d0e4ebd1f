"""A process whose launcher was killed saves and ends: nobody waits for it any more, and it keeps others out."""
import os
import signal
import threading
import time
from functools import cache

import psutil

from timm_multilabel.training.signals import StopSignals

LAUNCHER = 'TIMM_MULTILABEL_LAUNCHER'
"""The environment variable by which whatever starts training processes gives them its process ID."""

STORE = 'TIMM_MULTILABEL_STORE'
"""The environment variable by which the launcher names the file where the processes of one machine find each other;
each start of them has its own, of this name and a number."""

_POLL = 0.5  # seconds
_TO_SAVE = 30
"""Seconds for the step and the checkpoint, after which the process ends even where it waits for one that is gone."""

_TO_END = 10
"""The same where there is nothing to save yet."""


@cache  # once a process
def watch_launcher() -> None:
    """Tell this process to save and stop, as SIGTERM does, as soon as its launcher is gone; end it if it does not.

    Only processes of a launcher of this package or of torchrun do so. One that a person or a scheduler started
    itself, perhaps by nohup, outlives its parent.
    """
    if LAUNCHER in os.environ:
        launcher = int(os.environ[LAUNCHER])
    elif 'TORCHELASTIC_RUN_ID' in os.environ:
        launcher = os.getppid()
    else:
        return
    threading.Thread(target=_watch, args=(launcher,), name='watch_launcher', daemon=True).start()


def _watch(launcher: int) -> None:
    while not _is_gone(launcher):
        time.sleep(_POLL)
    signals = StopSignals.current
    # By the kernel, since a process that waits within a collective, or hangs while it ends, runs no Python.
    signal.alarm(_TO_SAVE if signals is not None and signals.noting else _TO_END)
    if signals is not None:
        signals.orphaned = True
    if signals is None or signals.received is None:  # a second signal would stop it at once
        main = threading.main_thread().ident
        assert main is not None  # it was started
        signal.pthread_kill(main, signal.SIGTERM)


def _is_gone(launcher: int) -> bool:
    """Whether a process is not an ancestor of this one; also true where it ended before this one could look."""
    # The parents of a child of its own need not be read: that would be risky while loader processes are forked.
    if os.getppid() == launcher:
        return False
    try:
        return all(each.pid != launcher for each in psutil.Process().parents())
    except psutil.Error:  # one of them ended in this moment, or may not be looked at
        return not psutil.pid_exists(launcher)
