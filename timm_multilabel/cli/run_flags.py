"""The flags of a run, read back from its folder, and the command line that says the same."""
import argparse
import shlex
from pathlib import Path
from typing import Any

from timm_multilabel.cli import train_flags
from timm_multilabel.cli.flags import Assignments, HeadOptions, Parser, Settings, parse_with_config
from timm_multilabel.errors import UserError


def read_run_flags(run: Path) -> argparse.Namespace:
    """The flags of training that a run folder's args.yaml holds, checked as the command line is.

    Raises:
        UserError: The folder is none of a run, or its args.yaml cannot be read.
    """
    path = run / 'args.yaml'
    if not path.is_file():
        what = 'holds no args.yaml' if run.is_dir() else 'no such folder'
        raise UserError(f'{run}: not a run folder ({what}); name one that training made, such as output/train/NAME')
    return parse_with_config(_parser(), ['-c', str(path)])


def command_line(args: argparse.Namespace) -> str:
    """The shortest command line that means the flags of a run without phases, a line a flag."""
    parser = _parser()
    lines = [f'timm-multilabel train {shlex.quote(str(args.data_dir))}']
    for action in parser._actions:
        if not action.option_strings or action.dest in ('help', 'config') or action.help is argparse.SUPPRESS:
            continue
        value = getattr(args, action.dest)
        if value != parser.get_default(action.dest):
            lines.append(' '.join(map(shlex.quote, _words(action, value))))
    return ' \\\n    '.join(lines)


def _parser() -> Parser:
    parser = Parser(prog='timm-multilabel train')
    train_flags.add_flags(parser)
    return parser


def _words(action: argparse.Action, value: Any) -> list[str]:
    """A flag with its value as words."""
    option = next((option for option in action.option_strings if option.startswith('--')), action.option_strings[0])
    if action.nargs == 0:
        return [option if value else action.option_strings[-1]]
    if isinstance(action, HeadOptions):
        return [option, *(
            f'{head}:' + ','.join(f'{name}={part}' for name, part in options.items())
            for head, options in value.items())]
    if isinstance(action, Assignments | Settings):
        return [option, *(f'{name}={part}' for name, part in value.items())]
    values = [str(part) for part in value] if isinstance(value, list | tuple) else [str(value)]
    return [f'{option}={values[0]}'] if values[0].startswith('-') else [option, *values]
