"""What a checkpoint may hold, found out before anything is made of it: a file may come from anyone."""
import math
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from timm_multilabel.config.values import WHITESPACE
from timm_multilabel.model_names import LARGEST_PROJECTION, LARGEST_SIDE, MOST_PROJECTOR_LAYERS, check_arguments
from timm_multilabel.training.pickle_checks import check_pickle

_LARGEST_RESIZED = 2 ** 13  # pixels that the shorter edge of an image is resized to before the center is cropped
_LARGEST = 1e6  # of a number among the options of a head
_INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'lanczos', 'box', 'hamming')
_CROP_MODES = ('center', 'squash', 'border')
_WEIGHTS = ('state_dict', 'state_dict_ema', 'task_state', 'task_state_ema')


def check_archive(path: Path) -> None:
    """Raise ValueError where a file would take more memory than it is large, or is not in PyTorch's zip format."""
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
            raise ValueError('it is compressed')
        for name in archive.namelist():
            if name.endswith('.pkl'):
                check_pickle(archive.read(name))


def is_data_config(value: Any) -> bool:
    """Whether a value is what `resolve_data_config` gives: how images are resized, cropped and normalised."""
    size, mean, std = (value[name] for name in ('input_size', 'mean', 'std'))
    return (
        len(size) == 3 and size[0] == 3 and all(_is_count(side, LARGEST_SIDE) and side for side in size)
        and len(mean) == len(std) == 3 and all(map(_is_number, (*mean, *std)))
        and all(abs(each) <= 1e4 for each in mean) and all(1e-4 <= each <= 1e4 for each in std)
        and _is_number(value['crop_pct']) and 0.1 <= value['crop_pct'] <= 10
        and min(size[1:]) / value['crop_pct'] >= 1 and max(size[1:]) / value['crop_pct'] <= _LARGEST_RESIZED
        and value['interpolation'] in _INTERPOLATIONS and value['crop_mode'] in _CROP_MODES)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any, most: int = 2 ** 40) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_option(value: Any) -> bool:
    """Whether a value is one of an option of a head: a text, a number, or a list of these."""
    if isinstance(value, list | tuple):
        return not any(isinstance(part, list | tuple) for part in value) and all(map(_is_option, value))
    return value is None or isinstance(value, str | bool) or _is_number(value) and abs(value) <= _LARGEST


def _are_options(value: Any) -> bool:
    return value is None or all(
        isinstance(name, str) and isinstance(options.get('loss', ''), str)
        and all(isinstance(key, str) and _is_option(part) for key, part in options.items())
        for name, options in value.items())


def _is_run(bad_images: Any = (), plateau: Any = None, **numbers: Any) -> bool:
    return (all(isinstance(name, str) for name in bad_images) and (plateau is None or isinstance(plateau, dict))
            and all(value is None or _is_number(value) for value in numbers.values()))


def _are_arguments(value: Any) -> bool:
    check_arguments(value or {})
    return True


_SETTINGS: Mapping[str, Callable[[Any], bool]] = {
    'arch': lambda value: isinstance(value, str) and re.fullmatch(r'[\w.:/@+-]{1,1024}', value) is not None,
    'model_kwargs': _are_arguments,
    'head_module': _is_text,
    'head_options': _are_options,
    'head_weights': lambda value: value is None or all(
        isinstance(name, str) and _is_number(weight) and weight >= 0 for name, weight in value.items()),
    'projection_dim': lambda value: _is_count(value, LARGEST_PROJECTION) and value > 0,
    'projector_layers': lambda value: _is_count(value, MOST_PROJECTOR_LAYERS) and value > 0,
    'projector_width': lambda value: value is None or _is_count(value, LARGEST_PROJECTION) and value > 0,
    'condition_projector': lambda value: isinstance(value, bool),
    'data_config': is_data_config,
    'train_split': _is_text,
    'val_split': _is_text,
    'image_column': lambda value: isinstance(value, str),
    'separator': lambda value: value is None or value == WHITESPACE or isinstance(
        value, str) and len(value) == 1,
    'missing_value': _is_text,
    'image_root': _is_text,
    'class_head': _is_text,
    'eval_metric': _is_text,
    'best_weights': lambda value: value in ('plain', 'ema'),
    'phases': lambda value: isinstance(value, list) and all(
        re.fullmatch(r'[\w.-]+', name) and name.strip('.') for name in value),
    'phase': _is_count,
    'epoch': _is_count,
    'state_dict_ema': lambda value: value is None or isinstance(value, dict),
    'run': lambda value: _is_run(**value),
    # Its names are those of files that may be removed one day.
    'saver': lambda value: isinstance(value, dict) and all(
        re.fullmatch(r'[\w-]+\.pth\.tar', name) for name, _ in value.get('checkpoint_files', [])),
    'within': lambda value: isinstance(value.get('ranks'), list) and all(
        _is_count(value.get(name)) and value[name] for name in ('step', 'steps')),
}
"""The settings of a checkpoint, and whether a value can be one that this program wrote."""


def wrong_setting(state: Mapping[str, Any]) -> str | None:
    """The name of a setting that this program did not write, with the reason where there is one; None if all are well.

    The phase is one of the phases.
    """
    for name, is_well in _SETTINGS.items():
        try:
            if name in state and not is_well(state[name]):
                return f"its '{name}'"
        except ValueError as error:
            return f"its '{name}' ({error})"
        except (TypeError, AttributeError, KeyError, RecursionError):
            return f"its '{name}'"
    if state.get('phase', 0) >= max(1, len(state.get('phases', []))):
        return "its 'phase'"
    return None


def wrong_tensors(state: Mapping[str, Any], size: int) -> str | None:
    """What is wrong with the tensors of a checkpoint, or None: each is a plain one, and the weights fit into its file.

    A tensor may be a view that repeats a few stored numbers endlessly, sparse, or without any content.

    Args:
        state: What the checkpoint file holds.
        size: The bytes of that file.
    """
    if not all(_is_plain(tensor) for tensor in _tensors(state)):
        return 'a tensor that is not plainly stored'
    for name, tensor in [*state['state_dict'].items(), *(state.get('state_dict_ema') or {}).items()]:
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.is_complex():
            return 'weights that are no tensors of real numbers'
    for part in _WEIGHTS:
        # Twice, since a model may use one tensor in two places.
        if sum(tensor.nbytes for tensor in _tensors(state.get(part))) > 2 * size:
            return 'more weights than it has room for'
    return None


def _is_plain(tensor: torch.Tensor) -> bool:
    return (tensor.layout is torch.strided and tensor.device.type == 'cpu' and not tensor.is_quantized
            and tensor.nbytes <= tensor.untyped_storage().nbytes())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested containers; a container that is met again is not looked into again."""
    left, seen = [value], set()
    while left:
        value = left.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict | list | tuple | set | frozenset) and id(value) not in seen:
            seen.add(id(value))
            left.extend(value.values() if isinstance(value, dict) else value)
