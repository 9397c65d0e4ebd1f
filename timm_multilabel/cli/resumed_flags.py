"""The flags of a run that goes on: what differs from those it had, and what has no effect any more."""
import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from timm_multilabel.cli.flags import read_yaml
from timm_multilabel.errors import UserError

_AT_START = ('pretrained', 'pretrained_path', 'initial_checkpoint')
"""The flags that say what a run starts from."""


def flags_of_resumed(
        args: argparse.Namespace,
        flags: dict[str, Any],
        folder: Path,
        say: Callable[[str], None],
) -> dict[str, Any]:
    """The flags that args.yaml of a run that goes on holds; lines say what differs, and what has no effect.

    Args:
        args: What the command line says now.
        flags: The same as args.yaml would hold it.
        folder: The run folder, with the args.yaml from before, if there is one.
        say: Prints a line.
    """
    before: Mapping[str, Any] = {}
    path = folder / 'args.yaml'
    if path.is_file():
        try:
            before = read_yaml(path)
        except UserError as error:
            say(f'{error.line}: cannot tell which flags differ')
    for name in _AT_START:
        if flags[name] and flags[name] != before.get(name):
            say(f'--{name.replace("_", "-")} has no effect: the run goes on with the weights of its checkpoint')
    if args.experiment or args.output != 'output/train':  # its default, with which --resume may name any folder
        named = Path(args.output) / args.experiment if args.experiment else Path(args.output) / folder.name
        if named.absolute() != folder.absolute():
            say(f'--output, --experiment have no effect: the run goes on in {folder}')
    kept = {name: before[name] for name in (*_AT_START, 'output', 'experiment') if name in before}
    flags = {**flags, **kept}
    differs = _differences(before, yaml.safe_load(yaml.safe_dump(flags)))
    if differs:
        say(f'{path}: goes on with other flags: {"; ".join(differs)}')
    return flags


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], phase: str = '') -> list[str]:
    """Each flag that differs, with its value before and now."""
    found = [
        f'{phase}{_option(name)} {_text(value)} ({_text(before[name])} before)' for name, value in now.items()
        if name in before and before[name] != value and name not in ('phases', 'name')]
    phases = [each.get('phases') for each in (before, now)]
    if all(isinstance(each, list) for each in phases):
        for theirs, ours in zip(*phases):  # their names are the same
            missing = dict.fromkeys([*theirs, *ours])
            found += _differences({**missing, **theirs}, {**missing, **ours}, f"phase '{ours.get('name')}': ")
    return found


def _option(name: str) -> str:
    return 'DIR' if name == 'data_dir' else f'--{name.replace("_", "-")}'


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ' '.join(map(str, value))
    return 'unset' if value in (None, {}) else str(value).lower() if isinstance(value, bool) else str(value)
