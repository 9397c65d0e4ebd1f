"""What an optimizer takes over from a checkpoint: its moments and counters, and none of its settings."""
import math
from collections.abc import Mapping
from typing import Any

import torch
from timm.scheduler import PlateauLRScheduler

_COUNTERS = ('step', 'lookahead_step')  # what optimizers of timm count in a group, beside its settings


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Bring an optimizer's state back; the settings of its groups stay those that the flags gave it.

    Args:
        optimizer: One that has not made a step.
        saved: The `state_dict` of one like it, which may come from anyone.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, RuntimeError: It is of other parameters, or of settings that
            keep other moments.
    """
    groups = [{**group, 'params': list(theirs['params'])} | _counters(theirs)
              for group, theirs in zip(optimizer.param_groups, saved['param_groups'], strict=True)]
    known = {place for group in groups for place in group['params']}
    state = {place: moments for place, moments in saved['state'].items() if place in known}
    if not all(isinstance(name, str) for moments in state.values() for name in moments):
        raise ValueError('its moments have no names')
    changed = any(_settings(group) != _settings(theirs)
                  for group, theirs in zip(optimizer.param_groups, saved['param_groups'], strict=True))
    needed = _names_of_state(optimizer) if changed else {}
    optimizer.load_state_dict({'state': state, 'param_groups': groups})
    for parameter, names in needed.items():
        found = optimizer.state[parameter]
        if found and not names <= found.keys():
            raise ValueError(f'its settings keep {", ".join(sorted(names - found.keys()))}, which the file has not')


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a group; the schedule sets its learning rate."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in group.items()
            if name not in ('params', 'lr', 'initial_lr', *_COUNTERS)}


def _counters(group: Mapping[str, Any]) -> dict[str, Any]:
    """The counters of a saved group."""
    found = {name: group[name] for name in _COUNTERS if name in group}
    for name, value in found.items():
        if not isinstance(value, int | float | torch.Tensor) or not 0 <= float(value) < math.inf:
            raise ValueError(f'its {name} is no count')
    return found


def _names_of_state(optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, set[str]]:
    """The names of what an optimizer keeps of each parameter, found out by a step of a zero gradient that is undone."""
    before = [(p, p.detach().clone(), p.grad) for group in optimizer.param_groups for p in group['params']]
    settings = [dict(group) for group in optimizer.param_groups]
    try:
        with torch.random.fork_rng(devices=[]):
            for p, _, _ in before:
                p.grad = torch.zeros_like(p)
            optimizer.step()
        return {p: set(moments) for p, moments in optimizer.state.items()}
    finally:
        optimizer.state.clear()
        for group, old in zip(optimizer.param_groups, settings, strict=True):
            group.clear()
            group.update(old)
        with torch.no_grad():
            for p, value, gradient in before:
                p.copy_(value)
                p.grad = gradient


def load_plateau(scheduler: PlateauLRScheduler, saved: Mapping[str, Any], groups: list[Mapping[str, Any]]) -> None:
    """Bring back what a plateau schedule has seen and how far it has lowered the rate; its settings stay as they are.

    Args:
        scheduler: Of an optimizer whose groups have their settings.
        saved: The state of torch's `ReduceLROnPlateau`.
        groups: The saved groups of the optimizer.

    Raises:
        ValueError, KeyError, TypeError: It is none.
    """
    plateau = scheduler.lr_scheduler
    for name in ('best', 'num_bad_epochs', 'cooldown_counter', 'last_epoch'):
        setattr(plateau, name, type(getattr(plateau, name))(saved[name]))
    if not plateau.last_epoch:
        return  # the rate is still that of the warm-up
    for group, theirs in zip(plateau.optimizer.param_groups, groups, strict=True):
        start, theirs_start = (each['initial_lr'] * each.get('lr_scale', 1.0) for each in (group, theirs))
        # Not by a factor where nothing differs, which would round.
        lr = float(theirs['lr'] if start == theirs_start else start * (theirs['lr'] / theirs_start))
        if not 0 <= lr <= start:
            raise ValueError('its learning rate is none that the schedule gives')
        group['lr'] = lr
