"""Say what each head of a checkpoint makes of images: labels with their probabilities."""
import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from timm_multilabel.cli.flags import fraction, positive
from timm_multilabel.cli.images import (
    add_image_flags,
    batches_of,
    check_names,
    end,
    load_checkpoint_model,
    new_file,
    read_rows,
    workers_of,
)
from timm_multilabel.cli.output import say
from timm_multilabel.data.arguments import HELP as IMAGES_HELP
from timm_multilabel.errors import UserError, printable
from timm_multilabel.files import atomic_write
from timm_multilabel.inference.image_predictions import ImagePrediction, check_thresholds
from timm_multilabel.inference.predictor import Predictor
from timm_multilabel.reports.prediction_formats import FORMATS, csv_columns
from timm_multilabel.training.checkpoint import read_checkpoint
from timm_multilabel.training.progress_bar import ProgressBar

NAME = 'predict'
HELP = 'say what each head makes of images'


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='checkpoint of a run')
    parser.add_argument('images', nargs='+', metavar='IMAGES...', help=IMAGES_HELP)
    parser.add_argument('--top-k', type=positive, default=1, metavar='K', help='the K likeliest classes of each head')
    parser.add_argument(
        '--threshold', type=_threshold, action='append', default=[], metavar='[HEAD=]T',
        help='leave out labels of a lower probability; where no class is left the label is unknown. Give it again for '
        'other heads (default: 0, and 0.5 for tags)')
    parser.add_argument('--format', choices=tuple(FORMATS), help='(default: the ending of --out, else table)')
    parser.add_argument('--out', metavar='FILE', help='where to write (default: standard output)')
    parser.add_argument('--force', action='store_true', help='overwrite what is there')
    parser.add_argument('--weights', choices=('best', 'plain', 'ema'), default='best',
                        help='weights to use (default: those that made the checkpoint what it is)')
    add_image_flags(parser)


def run(args: argparse.Namespace) -> None:
    """Predict; exit status 1 where an image could not be read."""
    checkpoint = read_checkpoint(args.checkpoint)
    thresholds = dict(args.threshold)
    form = choose_format(args.format, args.out)
    predictor = Predictor(load_checkpoint_model(args, checkpoint, args.weights))
    without = predictor.without_probabilities
    check_thresholds(thresholds, checkpoint.label_space, without)
    if form == 'csv':
        csv_columns(checkpoint.label_space, args.top_k, without)
    rows = read_rows(args, args.images, checkpoint, checkpoint.label_space)
    if form == 'csv':
        check_names(rows, 'a CSV', 'pass --format jsonl')
    path = None
    if args.out is not None:
        path = new_file(args.out, '--out', (Path(args.out).suffix,), args.force)
    part = predictor.loaded.part(rows, keep_bad=True)

    def answers(progress: ProgressBar) -> Iterator[ImagePrediction]:
        for batch in predictor.answer(part, args.batch_size, workers_of(args), args.top_k, thresholds):
            yield from batch
            progress.advance()

    with ProgressBar('Predict', batches_of(args, checkpoint, rows), visible=True) as progress:
        lines = FORMATS[form](answers(progress), predictor.label_space, args.top_k, without)
        write_lines(lines, path, data=form != 'table')
    if path is not None:
        read = len(part) - int(part.bad.sum())
        say(f'{path}: the labels of {read} image{"s" * (read != 1)}, as {form}')
    end(int(part.bad.sum()), len(part))  # whose rows say what is wrong


def choose_format(given: str | None, out: str | None) -> str:
    """The format that the flags ask for."""
    if given is not None:
        return given
    ending = Path(out or '').suffix.lower()[1:]
    if out is not None and ending not in FORMATS:
        raise UserError(f'--out {out}: the ending is none of {", ".join(FORMATS)}; name the format with --format')
    return ending or 'table'


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


def _threshold(text: str) -> tuple[str, float]:
    head, mark, value = text.rpartition('=')
    if mark and not head:
        raise argparse.ArgumentTypeError(f'{text!r} is not of the form T or HEAD=T')
    return head, fraction(value)
