"""What a model says of images as text: a table, CSV or JSON lines; each takes answers as they come and gives lines."""
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import numpy as np

from timm_multilabel.errors import UserError, one_line, shortened
from timm_multilabel.escaping import csv_line, spreadsheet_text
from timm_multilabel.inference.image_predictions import Guess, ImagePrediction
from timm_multilabel.labels import Labels, LabelSet, LabelSpace, TagSet

_COLUMNS = 16_384
"""Columns that spreadsheets take."""

_PATH = 4096
"""Letters of a path."""

_WORDS = 200
"""Letters of a head's labels in a cell of the table for people."""


def csv_columns(
        label_space: LabelSpace,
        top_k: int,
        without_probabilities: Collection[str] = (),
        form: str = 'the CSV',
) -> list[str]:
    """The columns of the CSV: image, error, and of each head its labels, each with its probability if it has one.

    Args:
        label_space: The heads.
        top_k: Classes of a head at most.
        without_probabilities: The heads that have none.
        form: What errors call the file.

    Raises:
        UserError: Two would have the same name, or there would be too many.
    """
    places = {labels.name: places_of(labels, top_k, without_probabilities) for labels in label_space.heads}
    alone = {labels.name for labels in label_space.heads if not labels.classes} | set(without_probabilities)
    count = 2 + sum((2 - (name in alone)) * number for name, number in places.items())
    if count > _COLUMNS:
        raise UserError(f'--top-k {top_k}: {form} would have {count:,} columns, and {_COLUMNS:,} is the most; lower '
                        'it, or pass --format jsonl')
    columns = ['image', 'error']
    for head, number in places.items():
        for place in range(1, 1 + number):
            name = head if place == 1 else f'{head}_{place}'
            columns += [name] if head in alone else [name, f'{name}_probability']
    for name, count in Counter(columns).items():
        if count > 1:
            raise UserError(f"two columns of {form} would be called '{name}', after heads of the checkpoint; pass "
                            '--format jsonl')
    return columns


def places_of(labels: Labels, top_k: int, without_probabilities: Collection[str]) -> int:
    """How many labels a head has columns for; tags share one cell."""
    if not isinstance(labels, LabelSet) or labels.name in without_probabilities:
        return 1
    return min(top_k, len(labels.classes))


def csv_lines(
        answers: Iterable[ImagePrediction],
        label_space: LabelSpace,
        top_k: int,
        without_probabilities: Collection[str] = (),
) -> Iterator[str]:
    """A row an image. Tags of a head stand in one cell, as do their probabilities, written as in training.

    Between them is `|`, or --tag-separator; a cell without any is empty, or --none-value.
    """
    yield csv_line(map(spreadsheet_text, csv_columns(label_space, top_k, without_probabilities)))
    for answer in answers:
        cells = [spreadsheet_text(answer.image), spreadsheet_text(answer.error or '')]
        for labels in label_space.heads:
            guesses = answer.guesses.get(labels.name, [])
            places = places_of(labels, top_k, without_probabilities)
            texts = [guess.label if isinstance(guess.label, str) else _number(guess.label) for guess in guesses]
            probabilities = [_number(guess.probability) for guess in guesses]
            if not labels.classes:
                cells += texts or ['']
            elif isinstance(labels, TagSet):
                none = '' if answer.error is not None else labels.none or ''
                cells += [spreadsheet_text(labels.separator.join(texts) or none), labels.separator.join(probabilities)]
            elif labels.name in without_probabilities:
                cells += [spreadsheet_text(text) for text in texts] or ['']
            else:
                pairs = [(spreadsheet_text(text), number) for text, number in zip(texts, probabilities)]
                cells += [cell for pair in pairs + [('', '')] * (places - len(pairs)) for cell in pair]
        yield csv_line(cells)


def _number(value: float | None) -> str:
    return '' if value is None else f'{value:.6g}'


def json_lines(
        answers: Iterable[ImagePrediction],
        label_space: LabelSpace,
        top_k: int,
        without_probabilities: Collection[str] = (),
) -> Iterator[str]:
    """An object an image: {"image": ..., "heads": {head: [{"label": ..., "probability": ...}]}}, or with "error".

    A number has a "value" in place of the two, and the label of a kind without probabilities stands alone. In the name
    of an image a byte that is not UTF-8, such as ff, is written as `\\udcff`, which Python reads back, and
    `os.fsencode` makes that byte of.
    """
    for answer in answers:
        made: dict[str, Any] = {'image': answer.image}
        if answer.error is not None:
            made['error'] = answer.error
        else:
            made['heads'] = {
                name: [_json_guess(guess) for guess in guesses]
                for name, guesses in answer.guesses.items()}
        yield json.dumps(made)


def _json_guess(guess: Guess) -> dict[str, Any]:
    if not isinstance(guess.label, str):
        return {'value': _finite(guess.label)}
    if guess.probability is None:
        return {'label': guess.label}
    return {'label': guess.label, 'probability': _finite(guess.probability)}


def _finite(value: float) -> float | None:
    """A number for JSON, which has no NaN."""
    return float(_number(value)) if math.isfinite(value) else None


def table_lines(
        answers: Iterable[ImagePrediction],
        label_space: LabelSpace,
        top_k: int,
        without_probabilities: Collection[str] = (),
) -> Iterator[str]:
    """A table for people, with columns as wide as their widest cell."""
    rows = [['image', *map(shortened, label_space.names)]]
    errors = {}
    for answer in answers:
        if answer.error is not None:
            errors[len(rows)] = answer.error
            rows.append([answer.image])
        else:
            rows.append([answer.image, *(
                _words(answer.guesses[name]) for name in label_space.names)])
    rows = [[shortened(row[0], _PATH), *row[1:]] for row in rows]
    widths = [max((len(row[place]) for row in rows if place < len(row)), default=0) for place in range(len(rows[0]))]
    for number, row in enumerate(rows):
        if number in errors:
            row = [row[0], f'error: {one_line(errors[number])}']
        yield '  '.join(f'{cell:<{width}}' for cell, width in zip(row, widths)).rstrip()


def _words(guesses: list[Guess]) -> str:
    """What a head says, in a cell: as many labels as fit."""
    texts = [_word(guess) for guess in guesses[:_WORDS]]
    ends = np.cumsum([len(text) + 2 for text in texts])
    fit = max(1, int((ends <= _WORDS).sum()))
    more = f', {len(guesses) - fit} more' if len(guesses) > fit else ''
    return ', '.join(texts[:fit]) + more or '-'


def _word(guess: Guess) -> str:
    """A label in a cell."""
    if not isinstance(guess.label, str):
        return f'{guess.label:.4g}'
    return shortened(guess.label) + ('' if guess.probability is None else f' {guess.probability:.3f}')


FORMATS: dict[str, Callable[[Iterable[ImagePrediction], LabelSpace, int, Collection[str]], Iterator[str]]] = {
    'table': table_lines, 'csv': csv_lines, 'jsonl': json_lines}
"""The formats by name."""
