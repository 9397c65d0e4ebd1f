"""YAML in and out: files of settings, recipes with phases, the args.yaml of a run."""
from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from timm_multilabel.config.commands import ProbeSettings
from timm_multilabel.config.settings import NOTES, Setting, Settings, layered, named_setting, read_values
from timm_multilabel.config.train import Phase, TrainSettings
from timm_multilabel.errors import SettingError, without_secrets
from timm_multilabel.files import read_text
from timm_multilabel.model_names import is_from_elsewhere
from timm_multilabel.places import has_user, refusal

S = TypeVar('S', bound=Settings)

_VALUES = 10_000  # in a YAML file of settings, at most
_MOST_BYTES = 2 ** 24

TRUST = ('head_module', 'allow_hub')
"""The settings that let code run or models be looked up elsewhere, which no file may decide."""

_MODELS = ('model', 'teacher_features')
"""The settings that name a model, which may be one on a hub."""

_TYPED_ONLY = {
    'head_module': 'names the Python file {0}, and a file cannot have code run; if you trust it, pass '
                   '--head-module {0} on the command line, else remove the line',
    'allow_hub': "'allow_hub' counts on the command line only; remove the line, and pass --allow-hub",
    **{name: "the model {0} is not one of timm's own, and no model is downloaded because a file asks for it; pass "
             f'--allow-hub if you trust it, or name another with --{name.replace("_", "-")}' for name in _MODELS},
}
"""What a file may not decide, with the message: a recipe or an args.yaml may come from anyone."""

PROBE_YAML = 'probe.yaml'
"""The file in a run folder with the settings of `probe`; args.yaml has those of training that mean the same."""

_OF_THE_START = ('config', 'resume', 'allow_hub')
"""Settings that name one start of a run, which args.yaml does not hold."""


def read_yaml(path: Path) -> dict[Any, Any]:
    """A YAML file of settings, or of what else is a mapping.

    Raises:
        SettingError: It cannot be read, or is no mapping.
    """
    import yaml  # here, so that a command without a file answers sooner

    try:
        settings = yaml.safe_load(read_text(path, _MOST_BYTES))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise SettingError(f'{path}: cannot be read as YAML ({" ".join(str(error).split())})') from error
    if not isinstance(settings, dict):
        raise SettingError(f'{path}: expected a mapping of flags to values, such as "lr: 0.1"')
    _check_extent(path, settings)
    return settings


def _check_extent(path: Path, settings: Any) -> None:
    """Raise UserError where aliases (`*name`) make more of a small file than anyone has written."""
    left, seen = [settings], 0
    while left:
        value, seen = left.pop(), seen + 1
        if seen > _VALUES:
            raise SettingError(f'{path}: holds more than {_VALUES} values, or itself; expected flags and their values')
        if isinstance(value, dict | list):
            left.extend([*value, *value.values()] if isinstance(value, dict) else value)


def build(cls: type[S], given: Mapping[str, Any]) -> S:
    """Settings of checked values by name.

    Of training, `config` may name a YAML file that sets any of them, or a recipe with a list of phases: mappings that
    go before what the file says for all. What is given goes before both.

    Raises:
        SettingError: A required setting is missing, or the file cannot be read, names a setting that there is none of,
            or
            decides what only the user may.
    """
    path = given.get('config')
    if path is None:
        check_required(cls, given)
        return _with_notes(cls, given)
    content = read_yaml(Path(path))
    recipe = content.pop('phases') if 'phases' in content else None
    values = _over_file(cls, content, given, str(path))
    made = _with_notes(cls, values)
    if recipe is None or not isinstance(made, TrainSettings):
        return made
    return made.replace(phases=_phases(recipe, content, given, str(path)))


def _with_notes(cls: type[S], values: Mapping[str, Any]) -> S:
    return cls.of(values, **({NOTES: frozenset(values[NOTES])} if NOTES in values else {}))


def _phases(recipe: Any, content: Mapping[Any, Any], given: Mapping[str, Any], path: str) -> tuple[Phase, ...]:
    """The phases of a recipe.

    Raises:
        SettingError: One is no mapping of settings, or its name is none or taken.
    """
    if not isinstance(recipe, list) or not recipe or not all(isinstance(phase, dict) for phase in recipe):
        raise SettingError(f"{path}: 'phases' is no list of mappings, such as '- {{name: pretrain, epochs: 100}}'")
    phases: list[Phase] = []
    for number, mapping in enumerate(recipe, 1):
        own = dict(mapping)
        name = str(own.pop('name', number))
        where = f"{path}, phase '{name}'"
        if not re.fullmatch(r'[\w.-]+', name) or name in (phase.name for phase in phases):
            raise SettingError(f'{where}: a name is of letters, digits, ., - and _, and no other phase has it')
        if isinstance(content.get('head'), dict) and isinstance(own.get('head'), dict):
            own['head'] = {**content['head'], **own['head']}
        overrides = {named_setting(TrainSettings, f'{where}: ', key).name: value for key, value in own.items()}
        values = _over_file(TrainSettings, {**content, **own}, given, where)
        phases.append(Phase(name, overrides, TrainSettings.of(values)))
    return tuple(phases)


def _over_file(
        cls: type[Settings],
        content: Mapping[Any, Any],
        given: Mapping[str, Any],
        where: str,
) -> dict[str, Any]:
    """What is given, over the content of a file, by name."""
    of_file = read_values(cls, content, f'{where}: ')
    aside = {name: of_file.pop(name) for name in _TYPED_ONLY
             if of_file.get(name) and (name not in _MODELS or is_from_elsewhere(of_file[name]))}
    values = layered(cls, of_file, given)
    for name, value in aside.items():
        if name in _MODELS and values.get('allow_hub'):
            values.setdefault(name, value)
        if name not in values:
            raise SettingError(f'{where}: ' + _TYPED_ONLY[name].format(shlex.quote(str(value))))
    check_required(cls, values)
    return values


def check_required(cls: type[Settings], values: Mapping[str, Any]) -> None:
    """Raise SettingError where a setting that has no default is missing."""
    missing = [made.label for name, made in cls.settings().items() if made.required and values.get(name) is None]
    if missing:
        raise SettingError(f'the following arguments are required: {", ".join(missing)}', see_help=True)


def args_yaml(settings: TrainSettings) -> dict[str, Any]:
    """What args.yaml of a run holds: what `-c` takes, without what names this one start."""
    values = {name: value for name, value in settings.flat().items() if name not in _OF_THE_START}
    if not settings.phases:
        return values
    # A phase's own settings, with what the command line said over them.
    return {**values, 'phases': [
        {'name': phase.name, **{name: value for name, value in phase.settings.flat().items()
                                if name in phase.given and name not in _OF_THE_START}}
        for phase in settings.phases]}


def check_no_users(name: str, value: Any) -> None:
    """Raise SettingError where a setting, or one in it, is an address with a user in it, which args.yaml would hold."""
    if isinstance(value, Mapping):
        for part in value:
            check_no_users(str(part), value[part])
    elif isinstance(value, list | tuple):
        for part in value:
            check_no_users(name, part)
    elif isinstance(value, str) and has_user(value):
        raise SettingError(f'{name}: {without_secrets(value)}: {refusal(value)}')


def as_words(made: Setting, value: Any) -> list[str]:
    """A setting with its value as the words of a command line."""
    option = next((option for option in made.options if option.startswith('--')), '')
    if made.switch == 'on' and not value:
        return []
    if made.switch is not None:
        return [option if value else f'--no-{option[2:]}']
    if made.read_mapping is not None:
        return [option, *(
            f'{head}:' + ','.join(f'{name}={_joined(part)}' for name, part in options.items())
            for head, options in value.items())]
    if isinstance(value, dict):
        return [option, *(f'{name}={part}' for name, part in value.items())]
    values = [str(part) for part in value] if isinstance(value, list | tuple) else [str(value)]
    if made.repeats:
        return [word for each in values for word in (option, each)]
    return [f'{option}={values[0]}'] if len(values) == 1 and values[0].startswith('-') else [option, *values]


def _joined(value: Any) -> str:
    """An option of a head as a command line has it: + between the parts of a list, CLASS:WEIGHT of a mapping."""
    if isinstance(value, dict):
        return '+'.join(f'{name}:{part}' for name, part in value.items())
    return '+'.join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def probe_yaml(settings: ProbeSettings) -> str:
    """What `PROBE_YAML` of a run holds: its settings without those that no file may decide."""
    import yaml  # see `read_yaml`

    values = {name: value for name, value in settings.flat().items() if name not in TRUST}
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def read_probe_yaml(run: Path) -> ProbeSettings | None:
    """The settings of a run that `probe` made; None of another run.

    Raises:
        SettingError: The file cannot be read, or holds something else.
    """
    path = run / PROBE_YAML
    return ProbeSettings.of(_over_file(ProbeSettings, read_yaml(path), {}, str(path))) if path.is_file() else None


def command_line(settings: TrainSettings | ProbeSettings) -> str:
    """The shortest command line that means the settings of a run without phases, a line a flag."""
    known, name = settings.settings(), 'probe' if isinstance(settings, ProbeSettings) else 'train'
    lines = [f'timm-multilabel {name} {shlex.quote(str(settings.flat()["data_dir"]))}']
    lines += [' '.join(map(shlex.quote, as_words(known[name], value))) for name, value in settings.changed().items()
              if name not in ('data_dir', 'config')]
    return ' \\\n    '.join(lines)
