"""grid.yaml: an experiment's settings, seeds and what varies, and the runs that it asks for."""
import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm_multilabel.config.files import TRUST, read_yaml
from timm_multilabel.config.settings import named_setting
from timm_multilabel.config.train import TrainSettings
from timm_multilabel.errors import SettingError

_KEYS = ('title', 'about', 'flags', 'seeds', 'axis', 'starts', 'settings')

OWN_FLAGS = ('config', 'data_dir', 'seed', 'output', 'experiment', 'resume', 'initial_checkpoint')
"""Flags of training that a grid sets itself."""


@dataclass(frozen=True)
class GridRun:
    """A run of an experiment.

    Args:
        setting: Its setting, or the start that it is.
        value: The value of what varies; None of a start, and where nothing varies.
        seed: Its seed.
        recipe: Its flags, and perhaps phases, as a recipe has them.
        start: The run that it starts from, if any.
        is_start: Whether others start from it.
    """
    setting: str
    value: Any
    seed: int
    recipe: Mapping[str, Any]
    start: 'GridRun | None' = None
    is_start: bool = False

    @property
    def name(self) -> str:
        """Its run folder's."""
        parts = [self.setting, *([] if self.value is None else [str(self.value)]), f's{self.seed}']
        return re.sub(r'[^\w.-]+', '-', '-'.join(parts)).lstrip('-')


@dataclass(frozen=True)
class Grid:
    """An experiment: every setting with every value and every seed.

    Args:
        title: What it is called.
        about: What it asks, for its report.
        axis: The flag that varies, as args.yaml calls it; None where nothing does.
        values: Its values.
        settings: The names of the settings; the others are compared with the first one.
        runs: All runs; starts come first.
    """
    title: str
    about: str
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
        SettingError: It cannot be read, or is something else.
    """
    content = read_yaml(path)
    unknown = [key for key in content if key not in _KEYS]
    if unknown:
        raise SettingError(f"{path}: there is no '{unknown[0]}' in a grid; there are {', '.join(_KEYS)}")
    seeds = content.get('seeds', [0])
    flags, starts, settings = (_mappings(path, content, key) for key in ('flags', 'starts', 'settings'))
    if not settings or not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) for seed in seeds):
        raise SettingError(
            f"{path}: expected 'settings' by name, each a mapping of flags, and 'seeds', a list of numbers")
    axis = content.get('axis') or {}
    if not isinstance(axis, dict) or len(axis) > 1 or not all(
            isinstance(each, list) and each for each in axis.values()):
        raise SettingError(f"{path}: expected one flag and a list of its values as 'axis', such as {{lr: [0.1, 0.2]}}")
    flag, values = next(iter(axis.items())) if axis else (None, [None])
    if flag is not None:
        flag = _check_flags(path, 'axis', {flag: None}, None)[0]
    _check_flags(path, 'flags', flags, flag)
    for name, own in starts.items():
        _check_flags(path, f"start '{name}'", own, None)
    runs = [GridRun(name, None, seed, _merge(flags, own), is_start=True)
            for seed in seeds for name, own in starts.items()]
    by_seed = {(run.setting, run.seed): run for run in runs}
    plain, wanted = {}, {}
    for name, own in settings.items():
        plain[name] = {key: value for key, value in own.items() if key not in ('start', 'values')}
        _check_flags(path, f"setting '{name}'", plain[name], flag)
        if 'start' in own and not (isinstance(own['start'], str) and own['start'] in starts):
            raise SettingError(f"{path}: '{name}' starts from '{own['start']}', which is none of the 'starts'")
        wanted[name] = own.get('values', values)
        if not isinstance(wanted[name], list) or any(each not in values for each in wanted[name]):
            raise SettingError(f"{path}: the 'values' of '{name}' are no list of some of the axis' {values}")
    first = next(iter(settings))
    if 'values' in settings[first]:
        raise SettingError(f"{path}: '{first}' is what the others are compared with, so it takes no 'values'")
    idle = set(starts) - {own.get('start') for own in settings.values()}
    if idle:
        raise SettingError(f"{path}: no setting starts from '{idle.pop()}'; leave it out")
    for value in values:
        for seed in seeds:
            for name, own in settings.items():
                if value in wanted[name]:
                    recipe = {**({} if flag is None else {flag: value}), **_merge(flags, plain[name])}
                    runs.append(GridRun(name, value, seed, recipe, by_seed.get((own.get('start'), seed))))
    names = [run.name for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise SettingError(
            f"{path}: two runs would be called '{twice}'; name settings and starts otherwise, and a seed "
                        'once')
    return Grid(str(content.get('title') or path.parent.name), str(content.get('about') or ''), flag,
                [] if flag is None else values, list(settings), runs)


def _mappings(path: Path, content: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A mapping of flags, or one of names to such."""
    found = content.get(key) or {}
    if isinstance(found, dict):
        if key == 'flags':
            return found
        if all(isinstance(each, dict | None) for each in found.values()):
            return {str(name): each or {} for name, each in found.items()}
    raise SettingError(f"{path}: '{key}' is no mapping" + (' of names to flags' if key != 'flags' else ''))


def _check_flags(path: Path, where: str, flags: Mapping[str, Any], axis: str | None) -> list[str]:
    """The flags that a mapping names, as args.yaml calls them.

    Raises:
        SettingError: One is no flag, set by the grid itself, or what varies.
    """
    phases = flags.get('phases') or []
    keys = [key for key in flags if key != 'phases']
    keys += [key for phase in phases if isinstance(phase, dict) for key in phase if key != 'name']
    names = [named_setting(TrainSettings, f'{path}, {where}: ', key).name for key in keys]
    for name in names:
        if name in OWN_FLAGS or name == axis:
            what = 'what varies' if name == axis else 'set by the grid itself'
            raise SettingError(f"{path}, {where}: '{name}' is {what}; leave it out")
        if name in TRUST:
            raise SettingError(f"{path}, {where}: '{name}' counts on the command line only; leave it out, and end the "
                               f"command with --flags --{name.replace('_', '-')} ...")
    return names


def _merge(flags: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    return copy.deepcopy({**flags, **own})
