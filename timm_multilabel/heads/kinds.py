"""The kinds of heads by name: ours, and those of a file of the user's."""
import importlib.util
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm_multilabel.errors import UserError
from timm_multilabel.heads.classes import ArcFaceHead, SoftmaxHead
from timm_multilabel.heads.head import Head
from timm_multilabel.heads.numeric import NumericHead
from timm_multilabel.heads.tags import TagsHead
from timm_multilabel.labels import Labels, LabelSet, Quantity, TagSet

KINDS: Mapping[str, type[Head]] = {kind.kind: kind for kind in (SoftmaxHead, ArcFaceHead, TagsHead, NumericHead)}
"""The kinds of heads by name."""

COMMON_OPTIONS = ('loss', 'weight', 'input', 'columns')
"""Options of every head: its kind, its weight, 'features' or 'projection', the 0/1 columns of a group of tags."""


def load_kinds(path: str | None) -> dict[str, type[Head]]:
    """The kinds of heads: ours and, of a Python file of the user's, every subclass of `Head` in it that has a `kind`.

    Raises:
        UserError: The file is missing, fails, or has no such class.
    """
    if path is None:
        return dict(KINDS)
    if not Path(path).is_file():
        raise UserError(f'--head-module {path}: no such file')
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file does
        raise UserError(f'--head-module {path}: it fails with {type(error).__name__}: {error}') from error
    found = {
        value.kind: value for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Head) and value.kind and value.__module__ == module.__name__}
    if not found:
        raise UserError(f"--head-module {path}: has no subclass of timm_multilabel.heads.Head with a 'kind'")
    for name in found.keys() & KINDS.keys():
        raise UserError(f"--head-module {path}: '{name}' is a kind of ours; give yours another name")
    return {**KINDS, **found}


def options_of(kind: type[Head]) -> dict[str, inspect.Parameter]:
    """The options that a kind has, beside those that every head has."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    return {each.name: each for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}


def create_head(
        labels: Labels,
        in_features: int,
        options: Mapping[str, Any],
        defaults: Mapping[str, Any],
        kinds: Mapping[str, type[Head]],
) -> Head:
    """Make a head of its options.

    Args:
        labels: Its labels.
        in_features: Width of its input.
        options: 'loss', the kind, by default that of the labels; options of the kind; the other `COMMON_OPTIONS` are
            passed over.
        defaults: Values of the flags that a kind may inherit.
        kinds: The kinds by name.

    Raises:
        ValueError: There is no such kind, it reads other labels, or it does not take an option or a value.
    """
    name = options.get('loss', default_kind(labels))
    if name not in kinds:
        raise ValueError(f"there is no loss '{name}' (there are: {', '.join(kinds)}); --head-module brings your own")
    kind = kinds[name]
    if not isinstance(labels, kind.reads):
        raise ValueError(f"'{name}' reads {kind.reads.kind}, and the head has {labels.kind}")
    known = options_of(kind)
    given = {key: value for key, value in options.items() if key not in COMMON_OPTIONS}
    for key in given:
        if key not in known:
            raise ValueError(f"'{name}' has no option '{key}' (there are: {', '.join([*COMMON_OPTIONS, *known])})")
    inherited = {key: value for key, value in defaults.items() if key in kind.inherits and key in known}
    return kind(labels, in_features, **{**inherited, **given})


def default_kind(labels: Labels) -> str:
    """The kind of head that labels have where none is named."""
    return {LabelSet: SoftmaxHead, TagSet: TagsHead, Quantity: NumericHead}[type(labels)].kind
