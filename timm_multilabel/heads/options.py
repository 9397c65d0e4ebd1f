"""The options of a kind of head: which there are, of which types, and how texts become their values."""
import inspect
import typing
from types import NoneType, UnionType
from typing import Any


def options_of(kind: type) -> dict[str, Any]:
    """The options that a kind has, beside those that every head has, with their types.

    These are the keyword-only arguments by their annotations; without one, an option has the type of its default.
    """
    initialize = inspect.unwrap(vars(next(base for base in kind.__mro__ if '__init__' in vars(base)))['__init__'])
    options = {name: each for name, each in inspect.signature(initialize).parameters.items()
               if each.kind is inspect.Parameter.KEYWORD_ONLY}

    def annotated() -> None:
        """It has the options' annotations alone: others may be names that only type checkers import."""

    annotated.__annotations__ = {
        name: each.annotation for name, each in options.items() if each.annotation is not each.empty}
    hints = typing.get_type_hints(annotated, initialize.__globals__)
    return {name: hints.get(name, str if each.default is each.empty else type(each.default))
            for name, each in options.items()}


def parse_option(value: Any, hint: Any) -> Any:
    """A text as an option's type says; a value of a YAML file as it is, where that fits.

    Args:
        value: A text, or what YAML makes of one.
        hint: The type: bool, int, float, list or list[...], or a union with one of these; texts of others stay as they
            are.

    Raises:
        ValueError: The value is none of the type.
    """
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)
    kind = next((each for each in kinds if (typing.get_origin(each) or each) in (list, bool, int, float)), NoneType)
    if (typing.get_origin(kind) or kind) is list:
        parts = option_list(value)
        element, = typing.get_args(kind) or (str,)
        return [element(part) for part in parts] if element in (int, float) else parts
    if kind in (int, float) and isinstance(value, bool):
        raise ValueError('expected a number')
    if kind is bool:
        if str(value).lower() not in ('true', 'false'):
            raise ValueError('expected true or false')
        return str(value).lower() == 'true'
    if kind is int:
        return int(str(value))
    return float(value) if kind is float else value


def option_list(value: Any) -> list[str]:
    """A list of a YAML file, in which classes and columns may look like numbers, or text with + between the parts."""
    return [str(part) for part in value] if isinstance(value, list) else str(value).split('+')
