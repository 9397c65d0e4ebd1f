"""A timm model with the weights of a local file: all of them, and a line on what else the file holds."""
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
from timm.models import load_state_dict
from torch import nn

from timm_multilabel.errors import CheckpointError

_COUNTS = 'num_batches_tracked'  # of batch norm; no result depends on it, and old files have none


def create_from_file(kwargs: dict[str, Any], path: str, say: Callable[[str], None]) -> nn.Module:
    """A timm model with the weights of a local file, whose names may be those of a wrapper around it.

    timm passes over what a file lacks, since it expects another classifier, and its models read files of other names
    and shapes too. So the model is made twice, from the file and from other values under the same names: what is the
    same in both did not come from the file.

    Args:
        kwargs: The arguments of `timm.create_model`.
        path: The file.
        say: Prints a line.

    Raises:
        CheckpointError: The file lacks a weight or a buffer of the model.
    """
    if path.endswith('.npz'):  # of JAX; its reader asks for every weight by name
        return timm.create_model(**kwargs, pretrained=True, pretrained_cfg_overlay={'file': path})
    with torch.random.fork_rng():
        names = list(timm.create_model(**kwargs).state_dict())
    state, prefix = _without_prefix(_flat(load_state_dict(path)), names, path)
    with torch.random.fork_rng():
        others = _create(kwargs, {name: _other(value) for name, value in state.items()}).state_dict()
    model = _create(kwargs, state)
    lacking = [name for name, value in model.state_dict().items() if torch.equal(value, others[name])]
    counts = [name for name in lacking if name.endswith(_COUNTS)]
    lacking = [name for name in lacking if name not in counts]
    if lacking:
        raise CheckpointError(
            f'--pretrained-path {path}: lacks {len(lacking)} of the {len(names)} weights and buffers of '
            f'{kwargs["model_name"]} ({_some(lacking)}); name a file of that model, or with --initial-checkpoint one '
            'of a run')
    parts = [f"took the weights under '{prefix}'"] if prefix else []
    left = [name for name in state if name not in names]
    if left and set(names) <= state.keys() | set(counts):  # else they go by other names, which the model translates
        parts.append(f'left out {len(left)} that {kwargs["model_name"]} has not ({_some(left)})')
    if counts:
        parts.append(f'{_COUNTS} of {len(counts)} layers is not in it, and no result depends on it')
    if parts:
        say(f'--pretrained-path {path}: {"; ".join(parts)}')
    return model


def _create(kwargs: dict[str, Any], state: dict[str, torch.Tensor]) -> nn.Module:
    model = timm.create_model(**kwargs, pretrained=True, pretrained_cfg_overlay={'state_dict': state})
    config = model.pretrained_cfg
    assert isinstance(config, dict)  # as timm's models have it
    config.pop('state_dict', None)  # else the model, and each copy of it, would hold the file
    return model


def _flat(values: Mapping[str, Any], before: str = '') -> dict[str, torch.Tensor]:
    """The tensors of nested mappings, under their names with dots between."""
    found: dict[str, torch.Tensor] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found.update(_flat(value, f'{before}{name}.'))
        elif isinstance(value, torch.Tensor):
            found[f'{before}{name}'] = value
    return found


def _without_prefix(
        state: dict[str, torch.Tensor],
        names: list[str],
        path: str,
) -> tuple[dict[str, torch.Tensor], str]:
    """The weights of a model, where a wrapper (`module.`, `model.backbone.`, ...) stands before their names.

    Returns:
        The weights without the prefix that most names of the model have, and that prefix.

    Raises:
        CheckpointError: Two models of this kind are in the file.
    """
    wanted = set(names)
    found: Counter[str] = Counter()
    for name in state:
        parts = name.split('.')
        found.update('.'.join(parts[:place]) for place in range(len(parts)) if '.'.join(parts[place:]) in wanted)
    ranked = [(f'{prefix}.' if prefix else '', number) for prefix, number in found.most_common()]
    if not ranked or not ranked[0][0]:
        return state, ''
    best, number = ranked[0]
    if found[''] == number:
        return state, ''
    rivals = [prefix for prefix, other in ranked if other == number]
    if len(rivals) > 1:
        raise CheckpointError(
            f'--pretrained-path {path}: holds the weights of {len(rivals)} such models, under {", ".join(rivals)}; '
            'save one of them into a file of its own')
    # The others keep their whole names, as what is left out.
    return {name.removeprefix(best): value for name, value in state.items()}, best


def _other(value: torch.Tensor) -> torch.Tensor:
    """Another value for each element, of the same size and kind."""
    return ~value if value.dtype == torch.bool else -value - 1


def _some(names: list[str]) -> str:
    return ', '.join(names[:3]) + (', ...' if len(names) > 3 else '')
