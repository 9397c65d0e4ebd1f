"""What the values of settings may be: from the words of a command line, a YAML file or Python to a checked value.

Each function here takes one word and raises ValueError where it is not such a value.
"""
import ast
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

WHITESPACE = 'whitespace'
"""The separator that stands for any run of blanks."""

HeadOptions = dict[str, dict[str, Any]]
"""Options of heads: {head: {name: text, or a value of a YAML file}}."""


def number(
        kind: type = float,
        least: float = -math.inf,
        above: float = -math.inf,
        most: float = math.inf,
) -> Callable[[str], Any]:
    """Numbers that are finite, at least `least`, more than `above` and at most `most`."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f'{text!r} is not a {"whole " if kind is int else ""}number')
        if value < least or value <= above or value > most:
            bound = f'{least:g} or more' if above == -math.inf else f'more than {above:g}'
            bound += f', {most:g} at most' if most < math.inf else ''
            raise ValueError(f'{text} is out of range, expected {bound}')
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
    """One character, or 'whitespace'."""
    text = {'tab': '\t', '\\t': '\t', 'space': ' '}.get(text, text)
    if len(text) != 1 and text != WHITESPACE:
        raise ValueError(f"{text!r} is not one character, 'tab', 'space' or '{WHITESPACE}'")
    return text


def tag_separator(text: str) -> str:
    """Any characters, or 'tab', 'space' or 'whitespace'; a blank stands for any run of blanks."""
    text = {'tab': '\t', '\\t': '\t', 'space': ' ', 'whitespace': ' '}.get(text, text)
    if not text:
        raise ValueError("expected a character, 'tab' or 'whitespace'")
    return text if text.isspace() else text.strip()


def none_value(text: str) -> str:
    """A text that is not blank."""
    if not text.strip():
        raise ValueError('an empty cell is a missing label; write a text that means none, such as none')
    return text.strip()


def head_and_column(text: str) -> tuple[str, str]:
    """NAME or NAME=COLUMN -> (name, column)."""
    name, _, column = text.partition('=')
    if not name or text.endswith('='):
        raise ValueError(f'{text!r} is not NAME or NAME=COLUMN')
    return name, column or name


def threshold(text: str) -> tuple[str, float]:
    """T or HEAD=T -> (head, threshold); the head is '' where it is for all."""
    head, mark, value = text.rpartition('=')
    if mark and not head:
        raise ValueError(f'{text!r} is not of the form T or HEAD=T')
    return head, fraction(value)


def keywords(words: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE words -> {name: value}; a value that is not a Python literal is a text."""
    found = {}
    for word in words:
        name, mark, value = word.partition('=')
        if not mark:
            raise ValueError(f'{word!r} is not of the form NAME=VALUE')
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def assignments(words: Sequence[str]) -> dict[str, float]:
    """NAME=NUMBER words -> {name: number}, each number 0 or more."""
    numbers: dict[str, float] = {}
    for word in words:
        name, _, value = word.rpartition('=')
        if not name or name in numbers:
            raise ValueError(f'{word!r} is not of the form NAME=NUMBER, a name once')
        try:
            numbers[name] = at_least_0(value)
        except ValueError as error:
            raise ValueError(f'{word!r}: {error}') from error
    return numbers


def head_options(words: Sequence[str]) -> HeadOptions:
    """HEAD:NAME=VALUE,NAME=VALUE words -> {head: {name: text}}; the last word on a head counts."""
    heads: HeadOptions = {}
    for word in words:
        head, _, text = word.partition(':')
        options = [part.partition('=') for part in text.split(',')]
        if not head or not all(name and mark for name, mark, _ in options):
            raise ValueError(f'{word!r} is not of the form HEAD:NAME=VALUE,NAME=VALUE, such as price:loss=numeric')
        heads[head] = {name.strip().replace('-', '_'): value.strip() for name, _, value in options}
    return heads


def head_options_of_mapping(value: Any) -> HeadOptions | None:
    """The same of a mapping of mappings, as YAML files and Python have it; None where it is no such thing."""
    if not isinstance(value, Mapping) or not all(isinstance(options, Mapping) for options in value.values()):
        return None
    return {str(head): {str(name).replace('-', '_'): part for name, part in options.items()}
            for head, options in value.items()}
