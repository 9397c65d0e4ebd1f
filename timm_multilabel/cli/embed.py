"""Write where images lie in a checkpoint's space: features or projections with the images' paths, for search."""
import argparse
import sys

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
from timm_multilabel.inference.embeddings import SUFFIXES, embed_part, import_pyarrow
from timm_multilabel.inference.loaded import WHAT
from timm_multilabel.training.checkpoint import read_checkpoint
from timm_multilabel.training.progress_bar import ProgressBar

NAME = 'embed'
HELP = "write images' features or projections to a file"

_NAMED = 10  # bad images on standard error


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='checkpoint of a run, with heads or without')
    parser.add_argument('images', nargs='+', metavar='IMAGES...', help=IMAGES_HELP)
    parser.add_argument('--out', required=True, metavar='FILE', help='file to write: .npz or .parquet')
    parser.add_argument('--what', choices=WHAT, default=WHAT[0],
                        help="pooled features of the backbone, or the projector's output, which NT-Xent compares")
    parser.add_argument('--force', action='store_true', help='overwrite what is there')
    parser.add_argument('--weights', choices=('best', 'plain', 'ema'), default='best',
                        help='weights to use (default: those that made the checkpoint what it is)')
    add_image_flags(parser)


def run(args: argparse.Namespace) -> None:
    """Embed; exit status 1 where an image could not be read."""
    path = new_file(args.out, '--out', SUFFIXES, args.force)
    if path.suffix == '.parquet':
        import_pyarrow(path)  # else it would be missed after the work
    checkpoint = read_checkpoint(args.checkpoint)
    loaded = load_checkpoint_model(args, checkpoint, args.weights)
    rows = read_rows(args, args.images, checkpoint, loaded.model.label_space)
    if path.suffix == '.parquet':
        check_names(rows, f'{path}, a Parquet file,', 'name a .npz file')
    part = loaded.part(rows, keep_bad=True)
    with ProgressBar('Embed', batches_of(args, checkpoint, rows), visible=True) as progress:
        embeddings, bad = embed_part(loaded, part, args.what, args.batch_size, workers_of(args), progress)
    embeddings.save(path)
    for line in bad[:_NAMED]:
        say(line, sys.stderr)
    if len(bad) > _NAMED:
        say('...', sys.stderr)
    say(f'{path}: {args.what} of {len(embeddings)} images, {embeddings.vectors.shape[1]} numbers each, by '
        f'the {loaded.weights} weights of {checkpoint.path}')
    end(len(bad), len(rows))
