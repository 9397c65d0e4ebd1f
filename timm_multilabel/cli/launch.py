"""torchrun, ended by the error of the process that failed and with its exit status, not by a traceback of its own.

SIGTERM and SIGINT are passed on to the training processes, which save and end; the exit status is then `SAVED`.
"""
import argparse
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType

import psutil
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, parse_min_max_nnodes, run

from timm_multilabel.temporary import temporary_folder
from timm_multilabel.training.parent import LAUNCHER, STORE
from timm_multilabel.training.signals import LAUNCHER_ENDS, SAME, SAVED, SAVED_FILE, say_received


class Forward:
    """Passes signals on to the training processes. `received` are those that came."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.since = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.received and time.monotonic() - self.since <= SAME:
            return
        if not self.received:
            say_received(number)
        self.received.append(number)
        self.since = time.monotonic()
        os.environ[LAUNCHER_ENDS] = '1'  # for processes that torchrun starts again in place of those that end
        training = psutil.Process().children()
        if not training:
            sys.exit(128 + number)
        for process in training:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                pass


def main() -> None:
    """Launch what torchrun's command line says."""
    args = parse_args(sys.argv[1:])
    processes = int(args.nproc_per_node) if args.nproc_per_node.isdigit() else 1
    # torchrun's default of one thread a process is right for GPUs; on CPUs the processes share the cores.
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1) // processes)))
    # A store that outlives a restart gives the new processes the addresses of those that are gone.
    os.environ.setdefault('TORCH_DISABLE_SHARE_RDZV_TCP_STORE', '1')
    logging.getLogger('torch.distributed.elastic').setLevel(logging.CRITICAL)
    forward = Forward()
    if hasattr(args, 'signals_to_handle'):  # an older torchrun takes all signals, and gives processes 30 s to end
        args.signals_to_handle = 'SIGHUP,SIGQUIT'
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, forward)
    if LAUNCHER in os.environ:  # a process of this package has started this one, and may be killed
        end_with(int(os.environ[LAUNCHER]))
    os.environ[LAUNCHER] = str(os.getpid())
    with temporary_folder('timm-multilabel-launch-', Path(tempfile.gettempdir())) as folder:
        os.environ[SAVED_FILE] = str(folder / 'saved')
        args.log_dir = args.log_dir or str(folder)  # torchrun leaves its own behind
        if parse_min_max_nnodes(args.nnodes)[1] == 1:
            meet_by_files(args, folder)
        status = launch(args, forward)
        saved = Path(os.environ[SAVED_FILE]).exists()
    # Where a process was killed, it may be that torchrun told the others to stop and they did so in good order.
    killed = status > 128 and not forward.received
    sys.exit(SAVED if saved and not killed and len(forward.received) < 2 else status)


def end_with(parent: int) -> None:
    """Tell this process to stop, as SIGTERM does, as soon as its parent is gone, so that training saves."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def meet_by_files(args: argparse.Namespace, folder: Path) -> None:
    """Let the processes of one machine find each other by files that this user alone may read.

    torchrun's ports would be open to the network, and it unpickles what it finds there.
    """
    if {'?', '#'} & set(str(folder)):  # the processes find it by a URL
        print(f'launch: error: TMPDIR: {folder.parent} has a ? or a # in it; name another folder', file=sys.stderr)
        sys.exit(2)
    args.standalone, args.rdzv_backend, args.rdzv_id = False, 'c10d', folder.name
    # Each sign of life makes the file longer, and there is no other launcher to read it.
    args.rdzv_endpoint, args.rdzv_conf = str(folder / 'launcher'), 'store_type=file,keep_alive_interval=3600'
    os.environ[STORE] = str(folder / 'processes')


def launch(args: argparse.Namespace, forward: Forward) -> int:
    """Run torchrun; the exit status."""
    try:
        run(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        if forward.received == [-failure.exitcode]:  # before it had anything to save
            return SAVED
        if not forward.received:
            print(f'launch: process {rank} was ended by signal {-failure.exitcode}'
                  + (', perhaps for want of memory' if failure.exitcode == -signal.SIGKILL else ''), file=sys.stderr)
        return 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == '__main__':
    main()
