"""What a model says of images as a table of pyarrow, with a row an image."""
from collections.abc import Collection, Sequence
from typing import Any

from timm_multilabel.data.optional import find_library
from timm_multilabel.errors import escaped
from timm_multilabel.inference.image_predictions import Guess, ImagePrediction
from timm_multilabel.labels import LabelSpace, TagSet
from timm_multilabel.reports.prediction_formats import csv_columns, places_of


def prediction_table(
        answers: Sequence[ImagePrediction],
        label_space: LabelSpace,
        top_k: int,
        without_probabilities: Collection[str] = (),
) -> Any:
    """The columns of the CSV with their types: texts, float32 probabilities, float64 numbers, and tags as lists.

    Where an image could not be read, `error` says why, and the rest is null.
    """
    pyarrow = find_library('pyarrow')
    text, probability = pyarrow.string(), pyarrow.float32()
    columns: list[Any] = [
        pyarrow.array([answer.image for answer in answers], text),
        pyarrow.array([None if answer.error is None else escaped(answer.error) for answer in answers], text)]
    for labels in label_space.heads:
        guesses = [None if answer.error is not None else answer.guesses[labels.name] for answer in answers]
        if not labels.classes:
            columns.append(pyarrow.array([each and each[0].label for each in guesses], pyarrow.float64()))
        elif isinstance(labels, TagSet):
            for which, kind in ((0, text), (1, probability)):
                cells = [None if each is None else [_value(guess, which) for guess in each] for each in guesses]
                columns.append(pyarrow.array(cells, pyarrow.list_(kind)))
        else:
            kinds = ((0, text),) if labels.name in without_probabilities else ((0, text), (1, probability))
            for place in range(places_of(labels, top_k, without_probabilities)):
                for which, kind in kinds:
                    cells = [_value(each[place], which) if each and place < len(each) else None for each in guesses]
                    columns.append(pyarrow.array(cells, kind))
    return pyarrow.table(columns, names=list(map(escaped, csv_columns(label_space, top_k, without_probabilities))))


def _value(guess: Guess, which: int) -> Any:
    """The label of a guess, or its probability."""
    return guess.probability if which else escaped(guess.label)
