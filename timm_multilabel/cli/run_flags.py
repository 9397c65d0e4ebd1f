"""The flags of a run, read back from its folder, and the command line that says the same."""
import argparse
import shlex
from pathlib import Path
from typing import Any

from timm_multilabel.cli import train_flags
from timm_multilabel.cli.flags import Assignments, HeadOptions, Parser, Settings, parse_with_config
from timm_multilabel.errors import UserError


def read_run_flags(run: Path, head_module: str | None = None) -> argparse.Namespace:
    """The flags of training that a run folder's args.yaml holds, checked as the command line is.

    Args:
        run: The folder.
        head_module: What the command line of this command says of it; that of args.yaml does not count.

    Raises:
        UserError: The folder is none of a run, its args.yaml cannot be read, or it names a file of heads and nobody
            else does.
    """
    path = run / 'args.yaml'
    if not path.is_file():
        what = 'holds no args.yaml' if run.is_dir() else 'no such folder'
        raise UserError(f'{run}: not a run folder ({what}); name one that training made, such as output/train/NAME')
    words = ['-c', str(path), '--allow-hub']  # which allows nothing: no model is made of these flags
    flags = parse_with_config(_parser(), [*words, f'--head-module={head_module}'] if head_module else words)
    for each in (flags, *flags.phases):
        each.allow_hub = False
    return flags


def last_phase(flags: argparse.Namespace) -> argparse.Namespace:
    """The flags of the phase that a run's best checkpoint is of; of a run without phases, its flags."""
    return flags.phases[-1] if flags.phases else flags


def changed_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The flags of a run that are not at their defaults, by name, without the data directory."""
    parser = _parser()
    return {
        action.dest: getattr(args, action.dest) for action in parser._actions
        if action.option_strings and action.dest in vars(args) and action.dest != 'config'
        and action.help is not argparse.SUPPRESS and getattr(args, action.dest) != parser.get_default(action.dest)}


def command_line(args: argparse.Namespace) -> str:
    """The shortest command line that means the flags of a run without phases, a line a flag."""
    actions = {action.dest: action for action in _parser()._actions}
    lines = [f'timm-multilabel train {shlex.quote(str(args.data_dir))}']
    lines += [' '.join(map(shlex.quote, _words(actions[name], value))) for name, value in changed_flags(args).items()]
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
