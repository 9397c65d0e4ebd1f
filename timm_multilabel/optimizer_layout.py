"""The state of an optimizer of joined parameters, as checkpoints have it: for each part by itself."""
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn


class FormerLayout:
    """Has an optimizer of joined parameters write and read its state as if each head had its own.

    So a checkpoint does not tell whether heads were joined, and a run may go on either way.

    Args:
        groups: The optimizer's groups of the parameters that there are without joining.
        joined: The joined parameters, each with its parts, all of which are of one group.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], joined: Mapping[nn.Parameter, Sequence[nn.Parameter]]):
        whole = {part: each for each, parts in joined.items() for part in parts}
        places = {p: place for place, p in enumerate(chain.from_iterable(group['params'] for group in groups))}
        self.groups = [
            {**group, 'params': list(dict.fromkeys(whole.get(p, p) for p in group['params']))} for group in groups]
        self.counts = [len(group['params']) for group in groups]
        self.parts = [[(places[part], part.shape) for part in joined.get(p, [p])]
                      for group in self.groups for p in group['params']]

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Change what the optimizer, made with `self.groups`, writes and reads from now on."""
        optimizer.register_state_dict_post_hook(self._apart)
        optimizer.register_load_state_dict_pre_hook(self._together)

    def _apart(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for place, moments in state['state'].items():
            parts = self.parts[place]
            if len(parts) == 1:  # of any shape, which may be that of a scalar
                found[parts[0][0]] = moments
                continue
            its = {name: _apart(value, [shape[0] for _, shape in parts]) for name, value in moments.items()}
            for number, (former, _) in enumerate(parts):
                found[former] = {name: values[number] for name, values in its.items()}
        numbers = iter(range(sum(self.counts)))
        groups = [{**group, 'params': [next(numbers) for _ in range(count)]}
                  for group, count in zip(state['param_groups'], self.counts, strict=True)]
        return {**state, 'state': dict(sorted(found.items())), 'param_groups': groups}

    def _together(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """The inverse.

        Raises:
            ValueError: The state is of other parameters, or heads differ in what they keep.
        """
        if [len(group['params']) for group in state['param_groups']] != self.counts:
            raise ValueError('its optimizer has other parameters')
        names = list(chain.from_iterable(group['params'] for group in state['param_groups']))
        found = {}
        for place, parts in enumerate(self.parts):
            moments = [state['state'][names[former]] for former, _ in parts if names[former] in state['state']]
            if len(parts) == 1 and moments:
                found[place] = moments[0]
            elif moments:
                if len(moments) != len(parts) or any(each.keys() != moments[0].keys() for each in moments):
                    raise ValueError('its optimizer has moments of some heads only')
                shapes = [shape for _, shape in parts]
                found[place] = {name: _joined([each[name] for each in moments], shapes) for name in moments[0]}
        places = iter(range(len(self.parts)))
        groups = [{**group, 'params': [next(places) for _ in ours['params']]}
                  for group, ours in zip(state['param_groups'], self.groups, strict=True)]
        return {**state, 'state': found, 'param_groups': groups}


def _apart(value: Any, rows: list[int]) -> Sequence[Any]:
    """What each part has of a moment: its rows, or the same as all where it is a count."""
    if len(rows) == 1 or not isinstance(value, torch.Tensor):
        return len(rows) * [value]
    return [part.clone() for part in (value.split(rows) if value.ndim else len(rows) * [value])]  # of a memory each


def _joined(values: list[Any], shapes: list[torch.Size]) -> Any:
    first = values[0]
    if isinstance(first, torch.Tensor) and first.ndim:
        if [each.shape for each in values] != shapes:
            raise ValueError('its optimizer has moments of other shapes')
        return torch.cat(values)
    if any(value != first for value in values):
        raise ValueError('its optimizer made more steps of some heads than of others')
    return first
