"""What the command lines share: the parser, types of values, YAML files of flags, groups of flags."""
import argparse
import difflib
import math
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import yaml
from timm.utils import ParseKwargs

from timm_multilabel.data.table import WHITESPACE
from timm_multilabel.errors import UserError
from timm_multilabel.files import read_text
from timm_multilabel.model_names import is_from_elsewhere

_VALUES = 10_000  # in a YAML file of flags, at most
_MOST_BYTES = 2 ** 24

TRUST_FLAGS = ('head_module', 'allow_hub')
"""The flags that let a command run code or look elsewhere, see `add_trust_flags`."""

_TYPED_ONLY = {
    'head_module': 'names the Python file {0}, and a file cannot have code run; if you trust it, pass '
                   '--head-module {0} on the command line, else remove the line',
    'allow_hub': "'allow_hub' counts on the command line only; remove the line, and pass --allow-hub",
    'model': "the model {0} is not one of timm's own, and no model is downloaded because a file asks for it; pass "
             '--allow-hub if you trust it, or name another with --model',
}
"""What a file of flags may not decide, with the message: a recipe or an args.yaml may come from anyone."""


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

    where = ''
    """The file that the words come from, while it is parsed."""

    def error(self, message: str) -> NoReturn:
        where = f'{self.where}: ' if self.where else ''
        print(f'{self.prog}: error: {where}{message} (see {self.prog} --help)', file=sys.stderr)
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


_LARGEST = 1e30  # float32, which is what most numbers become, holds it and its inverse
_MOST = 2 ** 31 - 1

at_least_0 = number(least=0, most=_LARGEST)
above_0 = number(above=1 / _LARGEST, most=_LARGEST)
count = number(int, least=0, most=_MOST)
positive = number(int, least=1, most=_MOST)
fraction = number(least=0, most=1)


def separator(text: str) -> str:
    """A type for flags: one character, or 'whitespace'."""
    text = {'tab': '\t', '\\t': '\t', 'space': ' '}.get(text, text)
    if len(text) != 1 and text != WHITESPACE:
        raise argparse.ArgumentTypeError(f"{text!r} is not one character, 'tab', 'space' or '{WHITESPACE}'")
    return text


def tag_separator(text: str) -> str:
    """A type for flags: any characters, or 'tab', 'space' or 'whitespace'; a blank stands for any run of blanks."""
    text = {'tab': '\t', '\\t': '\t', 'space': ' ', 'whitespace': ' '}.get(text, text)
    if not text:
        raise argparse.ArgumentTypeError("expected a character, 'tab' or 'whitespace'")
    return text if text.isspace() else text.strip()


def none_value(text: str) -> str:
    """A type for flags: a text that is not blank."""
    if not text.strip():
        raise argparse.ArgumentTypeError('an empty cell is a missing label; write a text that means none, such as none')
    return text.strip()


def dialect(args: argparse.Namespace) -> dict[str, str]:
    """How the flags say that tags in one column are written: the options of `TagSet` that were given."""
    given = {'separator': args.tag_separator, 'none': args.none_value}
    return {name: value for name, value in given.items() if value is not None}


def add_dialect_flags(group: Any, default: str) -> None:
    """Add the flags of how tags in one column are written; `default` says what holds without them."""
    group.add_argument('--tag-separator', type=tag_separator, metavar='TEXT',
                       help=f"what is between the tags of a cell, such as ';', or 'whitespace' (default: {default})")
    group.add_argument('--none-value', type=none_value, metavar='TEXT',
                       help='a cell of tags that means none of them, where an empty one is a missing label')


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


class _Heads(str):
    """A word that stands for the options of heads in a YAML file."""
    options: dict[str, dict[str, Any]]


class HeadOptions(argparse.Action):
    """HEAD:NAME=VALUE,NAME=VALUE words -> {head: {name: text}}; several flags add up, a head's last word counts."""

    def __call__(self, parser, namespace, values, option_string=None):
        heads = dict(getattr(namespace, self.dest) or {})
        for word in values:
            if isinstance(word, _Heads):
                heads.update(word.options)
                continue
            head, _, text = word.partition(':')
            options = [part.partition('=') for part in text.split(',')]
            if not head or not all(name and mark for name, mark, _ in options):
                parser.error(f'argument {option_string}: {word!r} is not of the form HEAD:NAME=VALUE,NAME=VALUE')
            heads[head] = {name.strip().replace('-', '_'): value.strip() for name, _, value in options}
        setattr(namespace, self.dest, heads)


def parse_with_config(parser: Parser, argv: list[str]) -> argparse.Namespace:
    """Parse a command line in which `-c FILE.yaml` may set any flag; what the line itself says goes first.

    Where the parser has a default for `phases`, the file may be a recipe with a list of them: mappings of flags that go
    before those of the file. They come as `phases`, a namespace each, with `phase` (its name) and `given` (the flags
    that its mapping sets, as they stand there).

    Raises:
        UserError: The file is missing or no mapping of flags, or names a flag that there is none of.
    """
    finder = Parser(add_help=False, prog=parser.prog)
    finder.add_argument('-c', '--config')
    path = finder.parse_known_args(argv)[0].config
    if path is None or not any(action.dest == 'config' for action in parser._actions):
        return parser.parse_args(argv)
    settings = read_yaml(Path(path))
    recipe = 'phases' in settings and parser.get_default('phases') is not None
    phases = settings.pop('phases') if recipe else None
    args = _parse_over(parser, argv, path, settings)
    if not recipe:
        return args
    if not isinstance(phases, list) or not phases or not all(isinstance(phase, dict) for phase in phases):
        raise UserError(f"{path}: 'phases' is no list of mappings, such as '- {{name: pretrain, epochs: 100}}'")
    args.phases = []
    for number, phase in enumerate(phases, 1):
        name = str(phase.pop('name', number))
        where = f"{path}, phase '{name}'"
        if not re.fullmatch(r'[\w.-]+', name) or name in (other.phase for other in args.phases):
            raise UserError(f'{where}: a name is of letters, digits, ., - and _, and no other phase has it')
        if isinstance(settings.get('head'), dict) and isinstance(phase.get('head'), dict):
            phase['head'] = {**settings['head'], **phase['head']}
        given = {named_flag(parser, where, key).dest: value for key, value in phase.items()}
        parsed = _parse_over(parser, argv, where, {**settings, **phase})
        parsed.phase, parsed.given = name, given
        args.phases.append(parsed)
    return args


def _parse_over(parser: Parser, argv: list[str], where: str, settings: dict[Any, Any]) -> argparse.Namespace:
    """Parse the settings of a file, then the command line over them."""
    words = _flags(parser, where, settings)
    positionals = [action for action in parser._actions if not action.option_strings]
    nargs, defaults = [action.nargs for action in positionals], [action.default for action in positionals]
    for action in positionals:
        action.nargs = '?'  # the file may hold it
    parser.where = where
    settings = parser.parse_args(words)
    parser.where = ''
    aside = {name: value for name in _TYPED_ONLY if (value := vars(settings).get(name))}
    if not is_from_elsewhere(aside.get('model', '')):
        aside.pop('model', None)
    for name in aside:
        setattr(settings, name, None)
    for action in positionals:
        action.default = getattr(settings, action.dest)
    args = parser.parse_args(argv, settings)
    for name, value in aside.items():
        if name == 'model' and args.allow_hub and args.model is None:
            args.model = value
        if getattr(args, name) is None:
            raise UserError(f'{where}: ' + _TYPED_ONLY[name].format(shlex.quote(str(value))))
    for action, its_nargs, default in zip(positionals, nargs, defaults):
        action.nargs, action.default = its_nargs, default
        if getattr(args, action.dest) is None:
            parser.error(f'the following arguments are required: {action.metavar}')
    return args


def read_yaml(path: Path) -> dict[Any, Any]:
    """A YAML file of flags, or of what else is a mapping.

    Raises:
        UserError: It cannot be read, or is no mapping.
    """
    try:
        settings = yaml.safe_load(read_text(path, _MOST_BYTES))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f'{path}: cannot be read as YAML ({" ".join(str(error).split())})') from error
    if not isinstance(settings, dict):
        raise UserError(f'{path}: expected a mapping of flags to values, such as "lr: 0.1"')
    _check_extent(path, settings)
    return settings


def _check_extent(path: Path, settings: Any) -> None:
    """Raise UserError where aliases (`*name`) make more of a small file than anyone has written."""
    left, seen = [settings], 0
    while left:
        value, seen = left.pop(), seen + 1
        if seen > _VALUES:
            raise UserError(f'{path}: holds more than {_VALUES} values, or itself; expected flags and their values')
        if isinstance(value, dict | list):
            left.extend([*value, *value.values()] if isinstance(value, dict) else value)


def named_flag(parser: Parser, where: str, key: Any) -> argparse.Action:
    """The flag that a key of a YAML file names.

    Raises:
        UserError: There is no such flag.
    """
    actions = {}
    for action in parser._actions:
        for name in (action.dest, *action.option_strings):
            actions[name.lstrip('-').replace('-', '_')] = action
    for name in ('h', 'help', 'c', 'config'):
        actions.pop(name, None)
    name = str(key).lstrip('-').replace('-', '_')
    if name not in actions:
        near = difflib.get_close_matches(name, actions, n=1)
        raise UserError(f"{where}: there is no flag '{key}'" + (f"; did you mean '{near[0]}'?" if near else ''))
    return actions[name]


def _flags(parser: Parser, where: str, settings: dict[Any, Any]) -> list[str]:
    """Settings of a YAML file as command-line words, so that they are read and checked as the command line is."""
    positional, words = [], []
    for key, value in settings.items():
        action = named_flag(parser, where, key)
        # Positional words first, where no flag that takes several words can swallow them.
        (words if action.option_strings else positional).extend(_words(where, action, value))
    return positional + words


def _words(where: str, action: argparse.Action, value: Any) -> list[str]:
    """One setting of a YAML file as command-line words."""
    if value is None:
        return []
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f"{where}: '{action.dest}' is {value!r}, expected true or false")
        if not isinstance(action, argparse.BooleanOptionalAction):
            return [action.option_strings[0]] if value else []
        return [action.option_strings[0 if value else -1]]
    if isinstance(value, list | dict) and action.nargs in (None, '?'):
        raise UserError(f"{where}: '{action.dest}' is {value!r}, expected one value")
    if isinstance(action, HeadOptions):
        if not isinstance(value, dict) or not all(isinstance(options, dict) for options in value.values()):
            raise UserError(f"{where}: '{action.dest}' is {value!r}, expected heads with their options")
        word = _Heads('heads')
        word.options = {
            str(head): {str(name).replace('-', '_'): part for name, part in options.items()}
            for head, options in value.items()}
        return [action.option_strings[0], word] if word.options else []
    if isinstance(value, dict):
        value = [f'{name}={part}' for name, part in value.items()]
    values = [str(part) for part in value] if isinstance(value, list) else [str(value)]
    if not action.option_strings:
        return values
    option = action.option_strings[-1]
    # One word, so that a value such as -1 is not taken for a flag.
    return [f'{option}={values[0]}'] if action.nargs is None and len(values) == 1 else [option, *values]


def add_trust_flags(parser: Any) -> None:
    """Add what lets a command run code, or look elsewhere, for a run or a checkpoint that asks for it."""
    parser.add_argument('--head-module', metavar='FILE', help='Python file with kinds of heads of your own')
    parser.add_argument('--allow-hub', action='store_true',
                        help="let a model that a file names, and that is not timm's own, be looked up (hf-hub:...)")
