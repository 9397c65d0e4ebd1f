"""Settings as frozen dataclasses whose fields know their flags, and how values from anywhere become them.

A field is made by `setting` (one value, with default, unit, help and flags) or by `group` (another dataclass of
settings). Names are unique over all groups, so that settings are also a flat mapping, which is what a command line,
a YAML file and the keyword arguments of the Python API are.
"""
from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, ClassVar, Literal, TypeVar

from timm_multilabel.errors import SettingError

Words = Sequence[str]
S = TypeVar('S', bound='Settings')
T = TypeVar('T')

REMAINDER = '...'
"""As `nargs`: all words that follow, whatever they look like."""


@dataclass(frozen=True)
class Setting:
    """What a field knows beside its type and default.

    Args:
        help: What it is, for help texts.
        parse: One word -> value; raises ValueError.
        flags: Its flags beside `--its-name`, in the order of the help: the short ones come before it and the long ones
            after it. A field without a flag is a positional argument, see `positional`.
        metavar: What help texts call its value.
        nargs: How many words: None for one, a number, '?', '*', '+' or `REMAINDER`.
        choices: The values that it may have.
        const: Its value where the flag stands without a word (`nargs` is '?').
        read: All words -> value, where it is not the list of parsed words.
        read_mapping: A mapping of a YAML file -> value, or None where it is no such thing.
        merge: Value before, value that comes over it -> value; by default the latter.
        repeats: Whether the flag may be given several times, each with one word.
        required: Whether it has no default.
        positional: Whether it is an argument without a flag.
        hidden_flags: Old flags that mean `true`, read and not shown.
        hidden_note: What is said where one is given.
        switch: Of a truth value: 'on' has `--name` alone, 'both' `--no-name` too.
        name: Set by the dataclass that it is a field of.
        default: Its value where nothing is given.
    """
    help: str
    parse: Callable[[str], Any] = str
    flags: tuple[str, ...] = ()
    metavar: str | tuple[str, ...] | None = None
    nargs: int | str | None = None
    choices: tuple[str, ...] | None = None
    const: str | None = None
    read: Callable[[Words], Any] | None = None
    read_mapping: Callable[[Any], Any] | None = None
    merge: Callable[[Any, Any], Any] | None = None
    repeats: bool = False
    required: bool = False
    positional: bool = False
    hidden_flags: tuple[str, ...] = ()
    hidden_note: str = ''
    switch: Literal['on', 'both'] | None = None
    name: str = ''
    default: Any = None

    @property
    def options(self) -> tuple[str, ...]:
        """Its flags in the order of the help; none of a positional argument."""
        if self.positional:
            return ()
        short = [flag for flag in self.flags if not flag.startswith('--')]
        long = [flag for flag in self.flags if flag.startswith('--')]
        return (*short, f'--{self.name.replace("_", "-")}', *long)

    @property
    def label(self) -> str:
        """What errors call it: its flags, or the name of a positional argument."""
        return '/'.join(self.options) or str(self.metavar)

    def of_words(self, words: Words) -> Any:
        """The value that words say.

        Raises:
            ValueError: They are too few or too many, or one is no such value.
        """
        if isinstance(self.nargs, int) and len(words) != self.nargs:
            raise ValueError(f'expected {self.nargs} argument{"s" * (self.nargs > 1)}')
        if self.nargs == '+' and not words:
            raise ValueError('expected at least one argument')
        if self.nargs in (None, '?') and len(words) > 1:
            raise ValueError('expected one argument')
        if self.read is not None:
            return self.read(words)
        if self.nargs == '?' and not words:
            return self._constant()
        values = []
        for word in words:
            value = self.parse(word)
            if self.choices is not None and value not in self.choices:
                raise ValueError(f'invalid choice: {value!r} (choose from {", ".join(map(repr, self.choices))})')
            values.append(value)
        return values[0] if self.nargs in (None, '?') else values

    def _constant(self) -> Any:
        """Its value where the flag stands without a word."""
        return None if self.const is None else self.parse(self.const)

    def of_value(self, value: Any, where: str) -> Any:
        """The value that a YAML file or Python says, checked as words of a command line are.

        Raises:
            SettingError: It is no such value.
        """
        value = value.tolist() if hasattr(value, 'tolist') else value  # of numpy
        if isinstance(value, bool) and self.switch is None:
            if self.nargs != '?' or self.positional:
                raise SettingError(f"{where}'{self.name}' is {value!r}, expected a text or a number; put it in quotes")
            return self._constant() if value else None
        if self.switch is not None:
            if not isinstance(value, bool):
                raise SettingError(f"{where}'{self.name}' is {value!r}, expected true or false")
            return value
        if isinstance(value, list | tuple | dict) and self.nargs in (None, '?') and not self.repeats:
            raise SettingError(f"{where}'{self.name}' is {value!r}, expected one value")
        if self.read_mapping is not None:
            words = [value] if isinstance(value, str) else value
            if isinstance(words, list | tuple) and words and all(isinstance(word, str) for word in words):
                try:
                    return self.of_words(words)  # as the command line has it
                except ValueError as error:
                    raise SettingError(f'{where}argument {self.label}: {error}', see_help=True) from error
            found = self.read_mapping(value)
            if found is None:
                raise SettingError(f"{where}'{self.name}' is {value!r}, expected heads with their options")
            return found
        if isinstance(value, dict):
            value = [f'{name}={part}' for name, part in value.items()]
        several = isinstance(value, list | tuple)
        try:
            if self.repeats:
                return [self.parse(str(part)) for part in (value if several else [value])]
            return self.of_words([str(part) for part in value] if several else [str(value)])
        except ValueError as error:
            raise SettingError(f'{where}argument {self.label}: {error}', see_help=True) from error


def setting(default: Any, help: str, parse: Callable[[str], Any] = str, **further: Any) -> Any:
    """A field of settings; see `Setting` for `further`."""
    made = Setting(help, parse, default=default, **further)
    mutable = isinstance(default, list | dict)
    return field(
        **({'default_factory': default.copy} if mutable else {'default': default}), metadata={'setting': made})


def required(help: str, parse: Callable[[str], Any] = str, **further: Any) -> Any:
    """A field that has no default: one that must be given."""
    return setting(None, help, parse, required=True, **further)


def switch(help: str, both: bool = True, default: bool | None = False, **further: Any) -> Any:
    """A field that is true or false."""
    return setting(default, help, switch='both' if both else 'on', **further)


def group(title: str, kind: type[Settings]) -> Any:
    """A field that is a group of settings, with its title in help texts."""
    return field(default_factory=kind, metadata={'group': kind, 'title': title})


@dataclass(frozen=True)
class Settings:
    """Base of all settings: a flat mapping and nested dataclasses at once."""

    HELP: ClassVar[str] = ''
    """What the list of commands says."""
    EXAMPLE: ClassVar[str] = ''
    """The arguments of an example, which its help ends with."""
    PAGE: ClassVar[str] = ''
    """The page of the documentation that shows its use."""

    @classmethod
    def settings(cls) -> Mapping[str, Setting]:
        """All settings by name, those of groups included, in the order of the help."""
        return {name: made for _, of_group in cls.groups() for name, made in of_group.items()}

    @classmethod
    def groups(cls) -> Sequence[tuple[str | None, Mapping[str, Setting]]]:
        """The groups with their titles, and settings outside of any under None."""
        return _groups(cls)

    @classmethod
    def of(cls: type[S], values: Mapping[str, Any], **further: Any) -> S:
        """Settings of checked values by name; others have their defaults. `further` are fields that are no settings."""
        made: dict[str, Any] = dict(further)
        for each in dataclasses.fields(cls):
            kind = each.metadata.get('group')
            if kind is not None:
                made[each.name] = kind.of(values)
            elif 'setting' in each.metadata and each.name in values:
                made[each.name] = values[each.name]
        return cls(**made)

    def flat(self) -> dict[str, Any]:
        """All values by name."""
        return dict(self._flat())

    def _flat(self) -> Iterator[tuple[str, Any]]:
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if 'group' in each.metadata:
                yield from value._flat()
            elif 'setting' in each.metadata:
                yield each.name, value

    def replace(self: S, **values: Any) -> S:
        """These settings with other values for some, by their flat names."""
        changes: dict[str, Any] = {}
        for each in dataclasses.fields(self):
            kind = each.metadata.get('group')
            if kind is not None:
                own = {name: value for name, value in values.items() if name in kind.settings()}
                if own:
                    changes[each.name] = getattr(self, each.name).replace(**own)
            elif each.name in values:
                changes[each.name] = values[each.name]
        return dataclasses.replace(self, **changes)

    def changed(self) -> dict[str, Any]:
        """The values that differ from their defaults, by name."""
        known = self.settings()
        return {name: value for name, value in self._flat() if value != known[name].default}


def _once_a_class(find: Callable[[type[Settings]], T]) -> Callable[[type[Settings]], T]:
    """Find something of each class once."""
    found: dict[type[Settings], T] = {}

    def find_once(cls: type[Settings]) -> T:
        if cls not in found:
            found[cls] = find(cls)
        return found[cls]

    return find_once


@_once_a_class
def _groups(cls: type[Settings]) -> Sequence[tuple[str | None, Mapping[str, Setting]]]:
    found: list[tuple[str | None, Mapping[str, Setting]]] = []
    own: dict[str, Setting] = {}
    for each in dataclasses.fields(cls):
        if 'group' in each.metadata:
            for _, of_group in each.metadata['group'].groups():
                found.append((each.metadata['title'], of_group))
        elif 'setting' in each.metadata:
            own[each.name] = dataclasses.replace(each.metadata['setting'], name=each.name)
    return [*([(None, own)] if own else []), *found]


@_once_a_class
def _by_spelling(cls: type[Settings]) -> Mapping[str, Setting]:
    """Settings by each name that a YAML file may use: that of the setting, and those of its flags."""
    found: dict[str, Setting] = {}
    for made in cls.settings().values():
        for flag in (made.name, *made.options, *made.hidden_flags):
            found[flag.lstrip('-').replace('-', '_')] = made
    return found


def named_setting(cls: type[Settings], where: str, key: Any) -> Setting:
    """The setting that a key of a YAML file, or a keyword argument, names.

    Raises:
        SettingError: There is none.
    """
    known = dict(_by_spelling(cls))
    if where:  # a file names no other file
        known = {name: made for name, made in known.items() if made.name != 'config'}
    name = str(key).lstrip('-').replace('-', '_')
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise SettingError(f"{where}there is no flag '{key}'" + (f"; did you mean '{near[0]}'?" if near else ''))
    return known[name]


def read_values(cls: type[Settings], values: Mapping[Any, Any], where: str = '') -> dict[str, Any]:
    """Checked values by name, of a mapping in a YAML file or of keyword arguments; None is as if it were not there.

    Args:
        cls: The settings.
        values: The mapping; its keys may be names or flags.
        where: What comes before an error: the file, or nothing.

    Raises:
        SettingError: A key names no setting, or a value is none that it may have.
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        made = named_setting(cls, where, key)
        if str(key).replace('_', '-') in [flag.lstrip('-') for flag in made.hidden_flags]:
            if value is not True:
                continue
            found[NOTES] = {made.hidden_note}
        if value is not None:
            value = str(value) if isinstance(value, PurePath) else value
            put(found, made, made.of_value(value, where))
    return found


NOTES = 'notes'
"""Among values by name: what is to be said of them."""


def put(values: dict[str, Any], made: Setting, value: Any) -> None:
    """Put a value over the one that may be there."""
    before = values.get(made.name)
    values[made.name] = value if made.merge is None or before is None else made.merge(before, value)


def layered(cls: type[Settings], *layers: Mapping[str, Any]) -> dict[str, Any]:
    """Checked values of several layers, later ones over earlier ones."""
    known = cls.settings()
    found: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            if name == NOTES:
                found[NOTES] = found.get(NOTES, set()) | value
            else:
                put(found, known[name], value)
    return found
