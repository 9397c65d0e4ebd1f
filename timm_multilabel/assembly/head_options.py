"""`--head`: from texts to the options of heads."""
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Protocol

from timm_multilabel.config.values import HeadOptions, at_least_0
from timm_multilabel.errors import SettingError, listed
from timm_multilabel.heads import Head, default_kind, options_of, parse_option
from timm_multilabel.heads.options import option_list
from timm_multilabel.labels import Labels, LabelSpace, Quantity, TagSet


class WrittenTags(Protocol):
    """Settings on how tags in one column are written."""

    @property
    def tag_separator(self) -> str | None: ...

    @property
    def none_value(self) -> str | None: ...


def dialect(settings: WrittenTags) -> dict[str, str]:
    """How tags in one column are written, where settings say it: options of `TagSet`."""
    given = {'separator': settings.tag_separator, 'none': settings.none_value}
    return {name: value for name, value in given.items() if value is not None}


def is_pattern(text: str) -> bool:
    """Whether a name among `columns=` may stand for several columns."""
    return '*' in text or '?' in text


def match_columns(given: HeadOptions, columns: Sequence[str]) -> HeadOptions:
    """What `--head` says, with the matching columns in place of each pattern such as `columns=attr_*`.

    `*` matches any letters and `?` any one, unless there is a column of that very name. A column that the head has
    already is not added again.

    Args:
        given: What `--head` says.
        columns: The label columns.

    Raises:
        SettingError: A pattern that no column matches.
    """
    found = {}
    for name, options in given.items():
        group = []
        for each in option_list(options.get('columns', [])):
            if each in columns or not is_pattern(each):
                group.append(each)
                continue
            matching = [column for column in columns if fnmatchcase(column, each.replace('[', '[[]'))]
            if not matching:
                raise SettingError(
                    f"--head {name}:columns: no label column matches '{each}' (there are: {listed(columns) or 'none'})")
            group += [column for column in matching if column not in group]
        found[name] = {**options, 'columns': group} if 'columns' in options else options
    return found


def expand(given: HeadOptions, columns: list[str], heads: list[str] | None) -> HeadOptions:
    """What '*' says, said of every head that has no options of its own.

    Args:
        given: What `--head` says.
        columns: The label columns.
        heads: The heads that are learnt; all when None.
    """
    grouped = {column for group in groups(given).values() for column in group}
    names = heads if heads is not None else [column for column in columns if column not in grouped]
    every = given.get('*')
    named = {name: options for name, options in given.items() if name != '*'}
    return named if every is None else {name: dict(every) for name in names if name not in named} | named


def check_groups(given: HeadOptions, columns: list[str]) -> None:
    """Check which columns make groups of tags.

    Args:
        given: What `--head` says.
        columns: The label columns.

    Raises:
        SettingError: A column that there is none of, that is named twice, or that is the name of another head.
    """
    if 'columns' in given.get('*', {}):
        raise SettingError("--head '*': columns are of one head; name it")
    taken: dict[str, str] = {}
    for name, group in groups(given).items():
        for column in group:
            if column not in columns:
                raise SettingError(
                    f"--head {name}:columns: no label column '{column}' (there are: {listed(columns) or 'none'})")
            if column in taken:
                raise SettingError(
                    f"--head {name}:columns: '{column}' is named twice; each column is one tag of one head")
            taken[column] = name
        if name in columns and name not in group:
            raise SettingError(f"--head {name}:columns: there is a column '{name}' too; give the group another name")


def readers(given: HeadOptions, registry: Mapping[str, type[Head]]) -> dict[str, type[Labels]]:
    """The labels that each head reads, where its kind is named.

    Raises:
        SettingError: There is no such kind.
    """
    found = {}
    for name, options in given.items():
        loss = options.get('loss', 'tags' if 'columns' in options else 'softmax')
        if not isinstance(loss, str) or loss not in registry:
            raise SettingError(
                f"--head {name}:loss={loss}: there is no such loss (there are: {', '.join(registry)}); --head-module "
                'brings your own')
        if 'columns' in options and registry[loss].reads is not TagSet:
            raise SettingError(f"--head {name}: columns are of tags, and '{loss}' reads {registry[loss].reads.kind}")
        found[name] = registry[loss].reads
    return found


def groups(given: HeadOptions) -> dict[str, tuple[str, ...]]:
    """The 0/1 columns of heads of tags; patterns as they are, unless `match_columns` has replaced them."""
    return {name: tuple(option_list(options['columns'])) for name, options in given.items() if 'columns' in options}


def resolve(
        given: HeadOptions,
        registry: Mapping[str, type[Head]],
        label_space: LabelSpace,
        targets: list[Any],
) -> tuple[HeadOptions, dict[str, float]]:
    """The options of heads as `MultiLabelModel` and checkpoints take them, and the weights among them.

    Args:
        given: What `--head` says.
        registry: The kinds of heads.
        label_space: The heads.
        targets: The training targets of each head, for balanced class weights.

    Raises:
        SettingError: A head or an option that there is none of, or a value that it does not take.
    """
    resolved: HeadOptions = {}
    weights: dict[str, float] = {}
    labels = {head.name: (head, target) for head, target in zip(label_space.heads, targets, strict=True)}
    for name, options in given.items():
        if name not in labels:
            raise SettingError(f"--head {name}: there is no such head (there are: {', '.join(label_space.names)})")
        head, target = labels[name]
        kind = registry[options.get('loss', default_kind(head))]
        known = options_of(kind)
        made = resolved[name] = {}
        for key, value in options.items():
            try:
                if key == 'weight':
                    weights[name] = at_least_0(str(value))
                elif key == 'class_weights' and key in known:
                    made[key] = _class_weights(value, kind, head, target)
                elif key in known:
                    made[key] = parse_option(value, known[key])
                elif key != 'columns':  # they are in the label space
                    made[key] = value  # also an option that the kind has not, which the model names
            except Exception as error:
                raise SettingError(f'--head {name}:{key}={value}: {error}') from error
    return resolved, weights


def _class_weights(value: Any, kind: type[Head], labels: Labels, target: Any) -> list[float]:
    """'balanced', {class: weight} or CLASS:WEIGHT+CLASS:WEIGHT; other classes weigh 1."""
    if value == 'balanced':
        return kind.balance(target, labels)
    if not isinstance(value, dict):
        value = dict(part.rpartition(':')[::2] for part in str(value).split('+'))
    if isinstance(labels, Quantity):
        raise ValueError('a number has no classes')
    value = {str(name): weight for name, weight in value.items()}
    for name in value:
        if name not in labels.classes:
            raise ValueError(f"there is no class '{name}'; expected balanced or CLASS:WEIGHT+CLASS:WEIGHT")
    return [at_least_0(str(value.get(name, 1))) for name in labels.classes]

