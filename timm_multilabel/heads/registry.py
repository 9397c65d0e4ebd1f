"""The kinds of heads by name: ours, and those of a file of the user's."""
import importlib.util
import sys
from collections.abc import Callable, Mapping
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import torch

from timm_multilabel.errors import UserError
from timm_multilabel.heads.classes import ArcFaceHead, SoftmaxHead
from timm_multilabel.heads.head import Head
from timm_multilabel.heads.numeric import NumericHead
from timm_multilabel.heads.options import options_of
from timm_multilabel.heads.tags import TagsHead
from timm_multilabel.labels import Labels, LabelSet, LabelSpace, Quantity, TagSet, missing_row
from timm_multilabel.metric_names import check_metric_names

REGISTRY: Mapping[str, type[Head]] = {kind.kind: kind for kind in (SoftmaxHead, ArcFaceHead, TagsHead, NumericHead)}
"""The kinds of heads by name."""

COMMON_OPTIONS = ('loss', 'weight', 'input', 'columns', 'views')
"""Options of every head: its kind, its weight, 'features' or 'projection', the 0/1 columns of a group of tags, and
whether it learns from 'all' views or from 'plain' ones only."""


def load_registry(path: str | None) -> dict[str, type[Head]]:
    """The kinds of heads: ours and, of a Python file of the user's, every subclass of `Head` in it that has a `kind`.

    Raises:
        UserError: The file is missing, fails, or has no such class.
    """
    if path is None:
        return dict(REGISTRY)
    if not Path(path).is_file():
        raise UserError(f'--head-module {path}: no such file')
    name = f'timm_multilabel_head_module_{Path(path).stem}'
    spec = importlib.util.spec_from_file_location(name, path, loader=SourceFileLoader(name, path))
    assert spec is not None and spec.loader is not None  # there is a loader, since one is given
    try:
        module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the file does
        raise UserError(f'--head-module {path}: it fails with {type(error).__name__}: {error}') from error
    found = {
        value.kind: value for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Head) and value.kind and value.__module__ == module.__name__}
    if not found:
        raise UserError(f"--head-module {path}: has no subclass of timm_multilabel.heads.Head with a 'kind'")
    for name in found.keys() & REGISTRY.keys():
        raise UserError(f"--head-module {path}: '{name}' is a kind of ours; give yours another name")
    return {**REGISTRY, **found}


def resolve_options(
        labels: Labels,
        options: Mapping[str, Any],
        defaults: Mapping[str, Any],
        registry: Mapping[str, type[Head]],
) -> dict[str, Any]:
    """All that makes a head: 'loss', 'input', and options of its kind, given or inherited.

    Args:
        labels: Its labels.
        options: 'loss', the kind, by default that of the labels; 'input', by default 'features'; 'views', by default
            'all', of which nothing is kept; options of the kind.
        defaults: Values of the flags that a kind may inherit.
        registry: The kinds by name.

    Raises:
        ValueError: There is no such kind, it reads other labels, or it does not have an option.
    """
    name, read = options.get('loss', default_kind(labels)), options.get('input', 'features')
    if name not in registry:
        raise ValueError(f"there is no loss '{name}' (there are: {', '.join(registry)}); --head-module brings your own")
    if read not in ('features', 'projection'):
        raise ValueError(f"input is '{read}', expected features or projection")
    views = options.get('views', 'all')
    if views not in ('all', 'plain'):
        raise ValueError(f"views is '{views}', expected all or plain (the views that keep their image's colors)")
    kind = registry[name]
    if not isinstance(labels, kind.reads):
        raise ValueError(f"'{name}' reads {kind.reads.kind}, and the head has {labels.kind}")
    known = options_of(kind)
    given = {key: value for key, value in options.items() if key not in COMMON_OPTIONS}
    for key in given:
        if key not in known:
            raise ValueError(f"'{name}' has no option '{key}' (it has: {', '.join([*COMMON_OPTIONS, *known])})")
    inherited = {key: value for key, value in defaults.items() if key in kind.inherits and key in known}
    return {'loss': name, 'input': read, **({'views': views} if views == 'plain' else {}), **inherited, **given}


def create_head(
        labels: Labels,
        in_features: int,
        options: Mapping[str, Any],
        registry: Mapping[str, type[Head]],
) -> Head:
    """Make a head of the options that `resolve_options` gives; one of the user's own kind is tried out.

    Raises:
        ValueError: The kind does not take a value, or does not do what a kind must.
    """
    kind = registry[options['loss']]
    make: Callable[..., Head] = kind
    own = {key: value for key, value in options.items() if key not in COMMON_OPTIONS}
    if kind in REGISTRY.values():
        return make(labels, in_features, **own)
    try:
        head = make(labels, in_features, **own)
        _try_out(head, in_features)
    except ValueError:
        raise
    except Exception as error:  # whatever the user's code does
        raise ValueError(f"'{kind.kind}' fails with {type(error).__name__}: {error}") from error
    return head


def _try_out(head: Head, in_features: int) -> None:
    """Call a head as training and evaluation will.

    Raises:
        ValueError: It does not give what it must.
    """
    check_metric_names(head.kind, head.metric_names)
    for name in head.metric_names:
        head.metric(name)
    for name in (*head.lower_is_better, *head.compared):
        if name not in head.metric_names:
            raise ValueError(f"'{head.kind}' has no metric '{name}', which its lower_is_better or compared names")
    target = torch.zeros(2, head.labels.width)
    space = LabelSpace((head.labels,))
    with torch.no_grad():
        output = head(torch.zeros(2, in_features))
        for values in (target, missing_row(space).expand(2, -1)):
            loss = head.loss(output, space.split(values)[0])
            if not isinstance(loss, tuple) or len(loss) != 2 or not all(
                    isinstance(part, torch.Tensor) and part.ndim == 0 and part.is_floating_point() for part in loss):
                raise ValueError(f"the loss of '{head.kind}' must be two scalar tensors of floats: a sum, and a number")
        measured = head.measure(output)
        if isinstance(head.labels, LabelSet) and head.predict(output).shape != (2,):
            raise ValueError(f"what '{head.kind}' predicts must be class indices (B,)")
        if head.distribution:
            head.entropy(output), head.marginal_entropy(output), head.pseudo_label_loss(output, output, 0.5)
    if measured.ndim != 2 or len(measured) != 2:
        raise ValueError(f"what '{head.kind}' measures must be (B, K), and is {tuple(measured.shape)} for B = 2")
    metrics = head.metrics(target.numpy(), measured.numpy())
    if not isinstance(metrics, dict) or not set(head.metric_names) <= metrics.keys():
        raise ValueError(f"the metrics of '{head.kind}' must be a dict with {', '.join(head.metric_names)}")


def has_own_metrics(head: Head) -> bool:
    """Whether a head measures itself in another way than our kinds, whose metrics follow from stored predictions."""
    return not head.has_probabilities and bool(head.labels.classes) or type(head).metrics not in {
        kind.metrics for kind in REGISTRY.values()}


def standard_head(labels: Labels) -> Head:
    """A head of the default kind of labels without weights, to ask for their metrics."""
    with torch.device('meta'):
        return create_head(labels, 1, {'loss': default_kind(labels)}, REGISTRY)


def default_kind(labels: Labels) -> str:
    """The kind of head that labels have where none is named."""
    kinds: dict[str, type[Head]] = {LabelSet.kind: SoftmaxHead, TagSet.kind: TagsHead, Quantity.kind: NumericHead}
    return kinds[labels.kind].kind
