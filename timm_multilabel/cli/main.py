"""`timm-multilabel SUBCOMMAND ...`, and the same for the scripts in the repository's root."""
import os
import sys
import time
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from types import ModuleType

from timm_multilabel import __version__
from timm_multilabel.cli import (
    check,
    compare,
    embed,
    export,
    grid,
    predict,
    report,
    sample,
    search,
    split,
    train,
    validate,
)
from timm_multilabel.cli.flags import Parser, parse_with_config
from timm_multilabel.cli.output import print_traceback, printed_streams, say
from timm_multilabel.errors import UserError
from timm_multilabel.training.signals import Stopped, exit_when_stopped

COMMANDS = (train, validate, predict, embed, search, export, report, compare, grid, sample, split, check)


def main() -> None:
    """Run the subcommand that the command line names."""
    parser = Parser(prog='timm-multilabel', description='Several labels a photo and SimCLR, on any timm backbone.')
    parser.add_argument('--version', action='version', version=_versions())
    subparsers = parser.add_subparsers(metavar='COMMAND')
    for command in COMMANDS:
        subparsers.add_parser(command.NAME, help=command.HELP, add_help=False).set_defaults(command=command)
    with printed_streams():
        command = getattr(parser.parse_args(sys.argv[1:2]), 'command', None)
        if command is None:
            parser.print_help(sys.stderr)
            sys.exit(2)
    run_command(command, f'timm-multilabel {command.NAME}', sys.argv[2:])


def _versions() -> str:
    python = '.'.join(map(str, sys.version_info[:3]))
    timm, torch = (version(package) for package in ('timm', 'torch'))
    return f'%(prog)s {__version__} (timm {timm}, torch {torch}, Python {python})'


def run_command(command: ModuleType, prog: str, argv: Sequence[str]) -> None:
    """Run a subcommand; what the user can fix becomes one line on standard error and exit status 2."""
    sys.excepthook = print_traceback
    with printed_streams(patient=command is train):
        _run(command, prog, argv)


def _run(command: ModuleType, prog: str, argv: Sequence[str]) -> None:
    warnings.filterwarnings('ignore', module=r'PIL\.|torch\._weights')  # of absurd files, which are named
    parser = Parser(prog=prog, description=command.__doc__.split('\n')[0])
    command.add_flags(parser)
    positionals = [action.metavar for action in parser._actions if not action.option_strings]
    parser.usage = ' '.join(['%(prog)s', *positionals, '[flags]'])
    try:
        command.run(parse_with_config(parser, list(argv)))
    except Stopped as stop:
        if not int(os.environ.get('RANK', 0)):
            say(f'{prog}: {stop}', sys.stderr)
        exit_when_stopped()
    except KeyboardInterrupt:
        say(f'{prog}: stopped', sys.stderr)
        sys.exit(130)
    except Exception as error:
        status, line = describe(error)
        if line is None:
            if int(os.environ.get('WORLD_SIZE', 1)) > 1:
                # Where another rank has ended, its error is the one to read: the launcher ends this one while it waits.
                time.sleep(5)
            raise
        if status == 2 and int(os.environ.get('RANK', 0)):
            # All ranks meet most errors alike. The first one has the word; it ends, and the launcher ends the others.
            time.sleep(3)
        say(f'{prog}: error: {line}', sys.stderr)
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
