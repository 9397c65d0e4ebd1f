"""`timm-multilabel predict`."""
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from timm_multilabel.api.predict import choose_format, open_prediction, predict_in_parts
from timm_multilabel.cli.output import end_with_bad_images, say
from timm_multilabel.config.commands import PredictSettings
from timm_multilabel.errors import printable
from timm_multilabel.files import atomic_write
from timm_multilabel.inference.parts import is_folder
from timm_multilabel.reports.prediction_formats import FORMATS


def run(settings: PredictSettings) -> None:
    """Predict, and write what is predicted as it comes; exit status 1 where an image could not be read."""
    if is_folder(settings.out):
        manifest = predict_in_parts(settings)
        if manifest is not None:
            images = manifest.plan.images
            say(f'{settings.out}: the labels of {images - manifest.bad} images, in {len(manifest.parts)} Parquet '
                f'part{"s" * (len(manifest.parts) != 1)}')
            end_with_bad_images(manifest.bad, images)
        return
    form = choose_format(settings)
    with open_prediction(settings, form) as prediction:
        lines = FORMATS[form](
            prediction.images, prediction.label_space, settings.top_k, prediction.without_probabilities)
        write_lines(lines, prediction.path, data=form != 'table')
    images = len(prediction.dataset)
    if prediction.path is not None:
        read = images - prediction.bad
        say(f'{prediction.path}: the labels of {read} image{"s" * (read != 1)}, as {form}')
    end_with_bad_images(prediction.bad, images)  # whose rows say what is wrong


def write_lines(lines: Iterable[str], path: Path | None, data: bool) -> None:
    """Write lines as they come, to a file that is whole or not there, or to standard output.

    Data are the same bytes in a file and in a pipe; what people read, and data on a terminal, is printable.
    """
    encoded = ((line + '\n').encode('utf-8', 'surrogateescape') for line in lines)
    if path is not None:
        with atomic_write(path) as file:
            file.writelines(encoded)
        return
    with _reader_may_leave():
        if data and not sys.stdout.isatty():
            sys.stdout.buffer.writelines(encoded)
        else:
            for line in lines:
                print(printable(line))
        sys.stdout.flush()


@contextmanager
def _reader_may_leave() -> Iterator[None]:
    """End quietly where what reads standard output has had enough, as `head` has."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it flushes
        sys.exit(1)
