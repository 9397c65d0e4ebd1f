"""From the arguments of the Python API to settings, and from flags in errors to arguments."""
import functools
import hashlib
import inspect
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import pandas as pd

from timm_multilabel.config.files import build
from timm_multilabel.config.settings import Settings, read_values
from timm_multilabel.config.train import TrainSettings
from timm_multilabel.errors import SettingError, UserError
from timm_multilabel.files import write_atomic
from timm_multilabel.places import absolute, local_path

P = ParamSpec('P')
R = TypeVar('R')
S = TypeVar('S', bound=Settings)

Data = str | Path | None
"""A data directory, or None where the splits are DataFrames."""


def api_function(cls: type[Settings], *left_out: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Show the settings among the arguments of a function that takes them as keywords; its errors speak of arguments.

    Args:
        cls: The settings.
        left_out: Those of them that the function has arguments of its own for, or has no use for.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            except UserError as error:
                line = in_arguments(error.line, cls)
                raise type(error)(line) from error.__cause__

        signature = inspect.signature(function)
        own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        shown = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=made.default)
                 for name, made in cls.settings().items()
                 if not made.positional and name not in (*left_out, *signature.parameters)]
        call.__signature__ = signature.replace(parameters=[*own, *shown])  # type: ignore[attr-defined]
        call.__doc__ = (function.__doc__ or '').rstrip() + _describe(cls, [each.name for each in shown])
        return call

    return decorate


def _describe(cls: type[Settings], names: list[str]) -> str:
    """The settings as a section of a docstring."""
    known = cls.settings()
    return '\n\n    Settings:\n' + ''.join(
        f'        {name}: {in_arguments(known[name].help, cls)}\n' for name in names)


def in_arguments(line: str, cls: type[Settings]) -> str:
    """A message that names flags, with the arguments of the same meaning in their place."""
    names = {option: made.name for settings in (TrainSettings, cls) for made in settings.settings().values()
             for option in made.options}

    def replaced(match: re.Match[str]) -> str:
        flag, value = match[1], match[2] or ''
        name = names.get(flag) or flag[2:].replace('-', '_')
        return f'{name}={value.strip()}' if value else name

    short = '|'.join(re.escape(option) for option in names if not option.startswith('--'))
    flag = rf'--[a-z][a-z0-9-]*[a-z0-9]{"|" + short if short else ""}'
    pattern = rf'(?<![\w-])({flag})(?![\w-])(?:( -?\d[\d.e-]*)(?=[\s:;,)]|$))?'
    line = re.sub(pattern, replaced, line).replace('there is no flag', 'there is no argument')
    return re.sub(r'\bargument (\w+)(/\w+)*:', r'argument \1:', line)


def make_settings(cls: type[S], values: Mapping[str, Any]) -> S:
    """Settings of keyword arguments.

    Raises:
        SettingError: There is no such argument, or a value is none that it may have.
    """
    return build(cls, read_values(cls, values))


def refuse_launched() -> None:
    """Raise SettingError in one of several processes that a launcher has started: the API starts its own."""
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        raise SettingError(
            'several processes were started; start one (to train in more, pass devices=N), or use the command line')


def train_values(data: Data, frames: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Checked settings of training by name, of keyword arguments; DataFrames are written where training reads them.

    Args:
        data: The data directory, or None.
        frames: What is given as `train`, `val` and `test`.
        values: The other arguments; `unlabelled` may be a DataFrame.

    Raises:
        SettingError: An argument is none, or data are missing or given twice.
    """
    given = {name: value for name, value in frames.items() if value is not None}
    for name, value in given.items():
        if not isinstance(value, pd.DataFrame):
            raise SettingError(
                f'{name}: a {type(value).__name__}, expected a pandas DataFrame; a data directory comes first, and '
                '--train-split and --val-split name its splits')
    if data is not None and given:
        raise SettingError(f'{", ".join(given)}: DataFrames, and a data directory too; leave one of them out')
    plain = dict(values)
    if isinstance(plain.get('unlabelled'), pd.DataFrame):
        given['unlabelled'] = plain.pop('unlabelled')
    if not given:
        return read_values(TrainSettings, {'data_dir': data, **plain})
    made = TrainSettings.of(read_values(TrainSettings, plain))  # wrong settings show before anything is written
    if data is None and 'train' not in given:
        raise SettingError('train: missing; pass a DataFrame, or a data directory as the first argument')
    if data is None and 'val' not in given and made.objective.classification_loss_weight:
        raise SettingError('val: missing; pass a DataFrame of the rows to score')
    if data is None and made.data.separator not in (None, ','):
        raise SettingError('separator: of files, and the data are DataFrames; leave it out')
    folder = write_frames(given, local_path(made.run.output), made.data.image_column, made.data.tag_separator or '|')
    if 'unlabelled' in given:
        plain['unlabelled'] = str(folder / 'unlabelled.csv')
    if data is None:
        plain['separator'] = ','
    return read_values(TrainSettings, {**plain, 'data_dir': folder if data is None else data})


def write_frames(frames: Mapping[str, pd.DataFrame], output: Path, image_column: str, between_tags: str) -> Path:
    """Write DataFrames as the CSVs of a data directory named after its content; relative paths become absolute.

    A run that goes on, a report and a comparison read them again.

    Args:
        frames: A table for each split.
        output: The folder that gets the data directory.
        image_column: The column of the image paths.
        between_tags: What is between the tags of a cell that is a list.

    Returns:
        The data directory, as an absolute path.

    Raises:
        SettingError: A table has no such column.
    """
    def cell_text(cell: Any) -> Any:
        if isinstance(cell, set | frozenset):
            cell = sorted(cell)
        return between_tags.join(map(str, cell)) if isinstance(cell, list | tuple | np.ndarray) else cell

    texts = {}
    for name, frame in frames.items():
        if image_column not in frame.columns:
            raise SettingError(f"{name}: the DataFrame has no column '{image_column}' with the paths of the images; "
                               'name it with --image-column')
        written = frame.map(cell_text)
        for column in written.columns:  # whole numbers beside a missing one are floats in pandas: 1.0
            values = written[column]
            if values.dtype.kind == 'f' and (values.dropna() % 1 == 0).all():
                written[column] = values.astype('Int64')
        written[image_column] = [absolute(str(path)) for path in frame[image_column]]
        texts[name] = written.to_csv(index=False)
    digest = hashlib.sha256(repr(sorted(texts.items())).encode('utf-8', 'surrogateescape')).hexdigest()
    folder = output.resolve() / f'data-{digest[:12]}'
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_atomic(folder / f'{name}.csv', text)
    return folder
