"""Settings as a command line: argparse, generated from their fields."""
import argparse
import difflib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from timm_multilabel.config.settings import NOTES, REMAINDER, Setting, Settings, put


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=38, width=118)


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line and ends with exit status 2."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{'allow_abbrev': False, 'formatter_class': _HelpFormatter, **kwargs})
        self.closing, self.flags = '', list[str]()

    def format_help(self) -> str:
        """The help, with an example and the page of the documentation at its end."""
        return super().format_help() + self.closing

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r'unrecognized arguments: (--[\w-]+)', message)
        near = difflib.get_close_matches(unknown[1], self.flags, n=1, cutoff=0.8) if unknown else []
        hint = f'; did you mean {near[0]}?' if near else ''
        print(f'{self.prog}: error: {message}{hint} (see {self.prog} --help)', file=sys.stderr)
        sys.exit(2)


class _Put(argparse.Action):
    """Puts the value of a setting over what the words before may have said."""

    def __init__(self, made: Setting, **kwargs: Any):
        super().__init__(**kwargs)
        self.made = made

    def __call__(
            self,
            parser: argparse.ArgumentParser,
            namespace: argparse.Namespace,
            values: Any,
            option_string: str | None = None,
    ) -> None:
        made, words = self.made, values if isinstance(values, list) else [] if values is None else [values]
        try:
            if made.switch is not None:
                value: Any = not (option_string or '').startswith('--no-')
            else:
                value = [made.parse(words[0])] if made.repeats else made.of_words(words)
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from error
        if option_string in made.hidden_flags:
            setattr(namespace, NOTES, {made.hidden_note})
        put(vars(namespace), made, value)


def make_parser(cls: type[Settings], prog: str, kind: type[Parser] = Parser, positionals: bool = True) -> Parser:
    """The parser of a command; what it parses is only what the command line says, without defaults."""
    description = ' '.join((cls.__doc__ or '').split('\n\n')[0].split())
    parser = kind(prog=prog, description=description, argument_default=argparse.SUPPRESS)
    for title, settings in cls.groups():
        where = parser if title is None else parser.add_argument_group(title)
        for made in settings.values():
            if positionals or not made.positional:
                _add(where, made, 'config' in cls.settings())
    named = [str(made.metavar) for made in cls.settings().values() if made.positional]
    parser.usage = ' '.join(['%(prog)s', *named, '[flags]'])
    parser.flags = [option for made in cls.settings().values() for option in made.options]
    if cls.EXAMPLE:
        parser.closing = f'\nexample: {prog} {cls.EXAMPLE}\ndocumentation: docs/{cls.PAGE}\n'
    return parser


def _add(where: Any, made: Setting, may_be_in_file: bool) -> None:
    """Add the flag, or the argument, of a setting."""
    common: dict[str, Any] = {'action': _Put, 'made': made, 'help': help_of(made).replace('%', '%%')}
    if made.switch is not None:
        options = [*made.options, *([f'--no-{made.options[-1][2:]}'] if made.switch == 'both' else [])]
        where.add_argument(*options, dest=made.name, nargs=0, **common)
        for flag in made.hidden_flags:
            where.add_argument(flag, dest=made.name, nargs=0, **{**common, 'help': argparse.SUPPRESS})
        return
    nargs = argparse.REMAINDER if made.nargs == REMAINDER else made.nargs
    if made.choices is not None:
        common['choices'] = made.choices
    if made.positional:
        nargs = '?' if may_be_in_file and nargs is None else nargs
        where.add_argument(made.name, metavar=made.metavar, nargs=nargs, **common)
    else:
        where.add_argument(*made.options, dest=made.name, metavar=made.metavar, nargs=nargs, required=made.required,
                           **common)


def help_of(made: Setting) -> str:
    """The help of a setting, with its default where that says something and the help does not say it already."""
    silent = made.default is None or made.default in (False, [], {}) or 'default' in made.help
    return made.help if silent else f'{made.help} (default: {made.default})'


def parse(cls: type[Settings], prog: str, argv: Sequence[str]) -> Mapping[str, Any]:
    """What a command line says, as checked values by name."""
    return vars(make_parser(cls, prog).parse_args(list(argv)))


def argument_type(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """What reads one word, as the type of an argument of argparse, whose errors say what is wrong."""

    def parse_word(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse_word
