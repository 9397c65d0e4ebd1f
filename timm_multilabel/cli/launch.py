"""torchrun, ended by the error of the process that failed and with its exit status, not by a traceback of its own."""
import logging
import os
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run


def main() -> None:
    """Launch what torchrun's command line says."""
    args = parse_args(sys.argv[1:])
    processes = int(args.nproc_per_node) if args.nproc_per_node.isdigit() else 1
    # torchrun's default of one thread a process is right for GPUs; on CPUs the processes share the cores.
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1) // processes)))
    logging.getLogger('torch.distributed.elastic').setLevel(logging.CRITICAL)
    try:
        run(args)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f'launch: process {failure.global_rank} was ended by signal {-failure.exitcode}', file=sys.stderr)
        sys.exit(failure.exitcode if failure.exitcode > 0 else 1)
    except SignalException as error:
        sys.exit(128 + error.sigval)


if __name__ == '__main__':
    main()
