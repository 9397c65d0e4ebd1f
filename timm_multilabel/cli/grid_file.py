"""grid.yaml: an experiment's settings, seeds and what varies, and the runs that it asks for."""
import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm_multilabel.cli.flags import read_yaml
from timm_multilabel.errors import UserError

_KEYS = ('title', 'about', 'flags', 'seeds', 'axis', 'starts', 'settings')


@dataclass(frozen=True)
class GridRun:
    """A run of an experiment.

    Args:
        setting: Its setting, or the start that it is.
        value: The value of what varies; None of a start, and where nothing varies.
        seed: Its seed.
        recipe: Its flags, and perhaps phases, as a recipe has them.
        start: The name of the run that it starts from, if any.
        is_start: Whether others start from it.
    """
    setting: str
    value: Any
    seed: int
    recipe: Mapping[str, Any]
    start: str | None = None
    is_start: bool = False

    @property
    def name(self) -> str:
        """Its run folder's."""
        parts = [self.setting, *([] if self.value is None else [str(self.value)]), f's{self.seed}']
        return re.sub(r'[^\w.-]+', '-', '-'.join(parts))


@dataclass(frozen=True)
class Grid:
    """An experiment: every setting with every value and every seed.

    Args:
        title: What it is called.
        about: What it asks, for its report.
        seeds: The seeds.
        axis: The flag that varies; None where nothing does.
        values: Its values.
        settings: The names of the settings; the others are compared with the first one.
        runs: All runs; starts come first.
    """
    title: str
    about: str
    seeds: Sequence[int]
    axis: str | None
    values: Sequence[Any]
    settings: Sequence[str]
    runs: Sequence[GridRun] = field(repr=False)


def read_grid(path: Path) -> Grid:
    """Read a grid.yaml.

    Its keys: `title`, `about`, `flags` of all runs, `seeds`, `axis` ({flag: values}), `starts` (name: flags; runs that
    are trained once a seed, for others to start from), `settings` (name: flags, with `start: NAME` where they start
    from one, and `values: [...]` where they are run with some values of the axis only).

    Raises:
        UserError: It cannot be read, or is something else.
    """
    content = read_yaml(path)
    unknown = [key for key in content if key not in _KEYS]
    if unknown:
        raise UserError(f"{path}: there is no '{unknown[0]}' in a grid; there are {', '.join(_KEYS)}")
    seeds = content.get('seeds', [0])
    axis = content.get('axis') or {}
    flags, starts, settings = (_mappings(path, content, key) for key in ('flags', 'starts', 'settings'))
    if not settings or not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) for seed in seeds):
        raise UserError(f"{path}: expected 'settings' by name, each a mapping of flags, and 'seeds', a list of numbers")
    if not isinstance(axis, dict) or len(axis) > 1 or not all(isinstance(each, list) for each in axis.values()):
        raise UserError(f"{path}: expected one flag and a list of its values as 'axis', such as {{lr: [0.1, 0.2]}}")
    flag, values = next(iter(axis.items())) if axis else (None, [None])
    runs = [GridRun(name, None, seed, _merge(flags, own, None, None), is_start=True)
            for seed in seeds for name, own in starts.items()]
    for value in values:
        for seed in seeds:
            for name, own in settings.items():
                own = dict(own or {})
                start, wanted = own.pop('start', None), own.pop('values', values)
                if not isinstance(wanted, list) or any(each not in values for each in wanted):
                    raise UserError(f"{path}: the 'values' of '{name}' are no list of some of the axis' {values}")
                if value not in wanted:
                    continue
                if start is not None and start not in starts:
                    raise UserError(f"{path}: '{name}' starts from '{start}', which is none of the 'starts'")
                runs.append(GridRun(
                    name, value, seed, _merge(flags, own, flag, value),
                    None if start is None else GridRun(start, None, seed, {}).name))
    names = [run.name for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"{path}: two runs would be called '{twice}'; name settings otherwise, and a seed once")
    return Grid(str(content.get('title', path.parent.name)), str(content.get('about', '')), seeds, flag,
                [] if flag is None else values, list(settings), runs)


def _mappings(path: Path, content: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = content.get(key) or {}
    if not isinstance(found, dict) or key != 'flags' and not all(
            isinstance(each, dict | None) for each in found.values()):
        raise UserError(f"{path}: '{key}' is no mapping" + (' of names to flags' if key != 'flags' else ''))
    return found


def _merge(flags: Mapping[str, Any], own: Mapping[str, Any] | None, axis: str | None, value: Any) -> dict[str, Any]:
    merged = copy.deepcopy({**flags, **(own or {})})
    return merged if axis is None else {axis: value, **merged}
