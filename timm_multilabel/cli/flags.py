"""What the command lines share: the parser, types of values, YAML files of flags, groups of flags."""
import argparse
import difflib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import yaml
from timm.utils import ParseKwargs

from timm_multilabel.errors import UserError


class _HelpFormatter(argparse.HelpFormatter):
    """Names the default of a flag, where it has one that says something and the help does not say it already."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=38, width=118)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ''
        silent = action.default is None or action.default in (False, argparse.SUPPRESS, [], {}) or 'default' in text
        return text if silent else f'{text} (default: %(default)s)'


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line and ends with exit status 2."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{'allow_abbrev': False, 'formatter_class': _HelpFormatter, **kwargs})

    def error(self, message: str) -> NoReturn:
        print(f'{self.prog}: error: {message} (see {self.prog} --help)', file=sys.stderr)
        sys.exit(2)


def number(
        kind: type = float,
        least: float = -math.inf,
        above: float = -math.inf,
        most: float = math.inf,
) -> Callable[[str], float]:
    """A type for flags: a finite number that is at least `least`, more than `above` and at most `most`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f'{text!r} is not a {"whole " if kind is int else ""}number')
        if value < least or value <= above or value > most:
            bound = f'{least:g} or more' if above == -math.inf else f'more than {above:g}'
            bound += f', {most:g} at most' if most < math.inf else ''
            raise argparse.ArgumentTypeError(f'{text} is out of range, expected {bound}')
        return value

    return parse


at_least_0 = number(least=0)
above_0 = number(above=0)
count = number(int, least=0)
positive = number(int, least=1)
fraction = number(least=0, most=1)


class Settings(ParseKwargs):
    """timm's NAME=VALUE words -> {name: value}."""

    def __call__(self, parser, namespace, values, option_string=None):
        for word in values:
            if not word.partition('=')[1]:
                parser.error(f'argument {option_string}: {word!r} is not of the form NAME=VALUE')
        super().__call__(parser, namespace, values, option_string)


class Assignments(argparse.Action):
    """NAME=NUMBER words -> {name: number}, each number 0 or more."""

    def __call__(self, parser, namespace, values, option_string=None):
        numbers = {}
        for word in values:
            name, _, value = word.rpartition('=')
            if not name or name in numbers:
                parser.error(f'argument {option_string}: {word!r} is not of the form NAME=NUMBER, a name once')
            try:
                numbers[name] = at_least_0(value)
            except argparse.ArgumentTypeError as error:
                parser.error(f'argument {option_string}: {word!r}: {error}')
        setattr(namespace, self.dest, numbers)


def parse_with_config(parser: Parser, argv: list[str]) -> argparse.Namespace:
    """Parse a command line in which `-c FILE.yaml` may set any flag; what the line itself says goes first.

    Raises:
        UserError: The file is missing or no mapping of flags, or names a flag that there is none of.
    """
    finder = Parser(add_help=False, prog=parser.prog)
    finder.add_argument('-c', '--config')
    path = finder.parse_known_args(argv)[0].config
    if path is None or not any(action.dest == 'config' for action in parser._actions):
        return parser.parse_args(argv)
    positionals = [action for action in parser._actions if not action.option_strings]
    for action in positionals:
        action.nargs = '?'  # the file may hold it
    settings = parser.parse_args(_flags_from_yaml(parser, Path(path)))
    for action in positionals:
        action.default = getattr(settings, action.dest)
    args = parser.parse_args(argv, settings)
    for action in positionals:
        if getattr(args, action.dest) is None:
            parser.error(f'the following arguments are required: {action.metavar}')
    return args


def _flags_from_yaml(parser: Parser, path: Path) -> list[str]:
    """A YAML file as command-line words, so that its values are read and checked as those of the command line are."""
    try:
        settings = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f'{path}: cannot be read as YAML ({" ".join(str(error).split())})') from error
    if not isinstance(settings, dict):
        raise UserError(f'{path}: expected a mapping of flags to values, such as "lr: 0.1"')
    actions = {}
    for action in parser._actions:
        for name in (action.dest, *action.option_strings):
            actions[name.lstrip('-').replace('-', '_')] = action
    for name in ('h', 'help', 'c', 'config'):
        actions.pop(name, None)
    positional, words = [], []
    for key, value in settings.items():
        name = str(key).lstrip('-').replace('-', '_')
        if name not in actions:
            near = difflib.get_close_matches(name, actions, n=1)
            raise UserError(f"{path}: there is no flag '{key}'" + (f"; did you mean '{near[0]}'?" if near else ''))
        # Positional words first, where no flag that takes several words can swallow them.
        (words if actions[name].option_strings else positional).extend(_words(path, actions[name], value))
    return positional + words


def _words(path: Path, action: argparse.Action, value: Any) -> list[str]:
    """One setting of a YAML file as command-line words."""
    if value is None:
        return []
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f"{path}: '{action.dest}' is {value!r}, expected true or false")
        if not isinstance(action, argparse.BooleanOptionalAction):
            return [action.option_strings[0]] if value else []
        return [action.option_strings[0 if value else -1]]
    if isinstance(value, list | dict) and action.nargs in (None, '?'):
        raise UserError(f"{path}: '{action.dest}' is {value!r}, expected one value")
    if isinstance(value, dict):
        value = [f'{name}={part}' for name, part in value.items()]
    values = [str(part) for part in value] if isinstance(value, list) else [str(value)]
    if not action.option_strings:
        return values
    option = action.option_strings[-1]
    # One word, so that a value such as -1 is not taken for a flag.
    return [f'{option}={values[0]}'] if action.nargs is None and len(values) == 1 else [option, *values]
