"""`timm-multilabel COMMAND ...`, and the same for the scripts in the repository's root."""
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import NoReturn

from timm_multilabel import __version__
from timm_multilabel.cli.commands import COMMANDS, LINES_BESIDE_DATA, SHARED
from timm_multilabel.cli.output import LogLines, print_traceback, printed_streams, say
from timm_multilabel.cli.parser import Parser, parse
from timm_multilabel.config.files import build
from timm_multilabel.config.settings import Settings
from timm_multilabel.errors import SettingError, UserError


def main() -> None:
    """Run the command that the command line names."""
    parser = Parser(prog='timm-multilabel', description='Several labels a photo and SimCLR, on any timm backbone.')
    if sys.argv[1:2] == ['--version']:
        parser.add_argument('--version', action='version', version=_versions())
    else:
        parser.add_argument('--version', action='store_true', help="show program's version number and exit")
    subparsers = parser.add_subparsers(metavar='COMMAND', dest='command')
    for name, settings in COMMANDS.items():
        subparsers.add_parser(name, help=settings.HELP, add_help=False)
    with printed_streams():
        name = parser.parse_args(sys.argv[1:2]).command
        if name is None:
            parser.print_help(sys.stderr)
            sys.exit(2)
    run_command(name, f'timm-multilabel {name}', sys.argv[2:])


def _versions() -> str:
    from importlib.metadata import version

    python = '.'.join(map(str, sys.version_info[:3]))
    timm, torch = (version(package) for package in ('timm', 'torch'))
    return f'%(prog)s {__version__} (timm {timm}, torch {torch}, Python {python})'


def run_command(name: str, prog: str, argv: Sequence[str]) -> None:
    """Run a command; what the user can fix becomes one line on standard error and exit status 2."""
    sys.excepthook = print_traceback
    with printed_streams(patient=name == 'train'):
        settings = parse_settings(name, prog, argv)
        with guarded(prog, name in LINES_BESIDE_DATA):
            if name not in SHARED and 'RANK' in os.environ and int(os.environ.get('WORLD_SIZE', 1)) > 1:
                raise UserError('several processes were started, and this command runs in one; start it without '
                                'torchrun, or unset WORLD_SIZE')
            import_module(f'timm_multilabel.cli.{name}').run(settings)


def parse_settings(name: str, prog: str, argv: Sequence[str]) -> Settings:
    """The settings that a command line means; ends with exit status 2 where it means none."""
    cls = COMMANDS[name]
    try:
        return build(cls, parse(cls, prog, argv))
    except UserError as error:
        _end(prog, error)


@contextmanager
def guarded(prog: str, beside_data: bool = False) -> Iterator[None]:
    """Print what is logged, and end the process where an error leaves: with one line, or with a traceback.

    Args:
        prog: What messages begin with.
        beside_data: Standard output is for data, so lines go to standard error.
    """
    warnings.filterwarnings('ignore', module=r'PIL\.|torch\._weights')  # of absurd files, which are named
    logger, lines = logging.getLogger('timm_multilabel'), LogLines(sys.stderr if beside_data else None)
    level, propagate = logger.level, logger.propagate
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    except KeyboardInterrupt:
        say(f'{prog}: stopped', sys.stderr)
        sys.exit(130)
    except BaseException as error:
        _end(prog, error)
    finally:
        logger.removeHandler(lines)
        logger.setLevel(level)
        logger.propagate = propagate


def _end(prog: str, error: BaseException) -> NoReturn:
    """End the process because of an error: one line where the user can do something about it, else a traceback."""
    from timm_multilabel.training.signals import Stopped, exit_when_stopped

    rank = int(os.environ.get('RANK', 0))
    if isinstance(error, Stopped):
        if not rank:
            say(f'{prog}: {error}', sys.stderr)
        exit_when_stopped()
    if not isinstance(error, Exception):
        raise error
    status, line = describe(error)
    if line is None:
        if int(os.environ.get('WORLD_SIZE', 1)) > 1:
            # Where another rank has ended, its error is the one to read: the launcher ends this one while it waits.
            time.sleep(5)
        raise error
    if status == 2 and rank:
        # All ranks meet most errors alike. The first one says so and ends, and the launcher ends the others, unless
        # the error is this rank's own.
        time.sleep(10)
    more = f' (see {prog} --help)' if isinstance(error, SettingError) and error.see_help else ''
    say(f'{prog}: error: {line}{more}', sys.stderr)
    sys.exit(status)


def describe(error: Exception) -> tuple[int, str | None]:
    """Exit status and line of an error; no line where only a traceback tells what happened."""
    if isinstance(error, UserError):
        return 2, error.line
    if isinstance(error, OSError) and error.filename is not None:  # a folder that is a file, a missing permission
        return 2, f'{error.filename}: {error.strerror}'
    if isinstance(error, MemoryError):
        return 1, f'out of memory ({str(error) or "no more can be had"}); lower -b, or take fewer rows or classes'
    if str(error).startswith('DataLoader worker'):
        return 1, f'{" ".join(str(error).split())} -- a loader process has died; if for want of memory, lower -j or -b'
    return 1, None
