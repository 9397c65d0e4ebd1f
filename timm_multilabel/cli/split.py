"""Split one CSV of labels into train.csv, val.csv and test.csv, with all.csv beside them."""
import argparse
from pathlib import Path

from timm_multilabel.cli.flags import at_least_0, count, separator
from timm_multilabel.cli.output import say
from timm_multilabel.data.split import SPLITS, split_csv

NAME = 'split'
HELP = 'split one CSV of labels into train.csv, val.csv and test.csv'


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument('source', metavar='CSV', help='table with a row for each image')
    parser.add_argument('--out', metavar='DIR', help='folder to write to (default: that of the CSV)')
    parser.add_argument(
        '--image', required=True, metavar='PATTERN',
        help="path of a row's image, with columns in braces: './images/{id}.jpg'",
    )
    parser.add_argument(
        '--heads', required=True, nargs='+', type=_head, metavar='NAME[=COLUMN]',
        help='label heads, each with its column where that has another name',
    )
    parser.add_argument('--image-column', default='image_path', metavar='NAME', help='column of paths to write')
    parser.add_argument(
        '--separator', type=separator, metavar='CHAR',
        help='what is between cells: a character, tab, or whitespace for runs of blanks (default: found)',
    )
    parser.add_argument(
        '--ratios', nargs=3, type=at_least_0, default=(80, 10, 10), metavar=('TRAIN', 'VAL', 'TEST'),
        help='shares of the rows; a split with 0 gets no file (default: 80 10 10)',
    )
    parser.add_argument(
        '--stratify', metavar='HEAD', help='give each split the same share of the rows of each label of this head')
    parser.add_argument(
        '--group', metavar='COLUMN',
        help='keep rows of one value of this column in one split, such as the photos of one product')
    parser.add_argument('--seed', type=count, default=42, metavar='N', help='same seed, same splits')
    parser.add_argument('--force', action='store_true', help='overwrite what is there')


def run(args: argparse.Namespace) -> None:
    """Split the CSV and say how many rows went where."""
    directory = Path(args.source).parent if args.out is None else Path(args.out)
    before = [path for name in SPLITS if (path := directory / f'{name}.csv').exists()]
    counts = split_csv(
        args.source, directory, image=args.image, heads=args.heads, image_column=args.image_column,
        separator=args.separator, ratios=args.ratios, seed=args.seed, stratify=args.stratify, group=args.group,
        force=args.force,
    )
    described = ', '.join(f'{counts[name]} {name}' for name in ('train', 'val', 'test'))
    say(f'Wrote {counts["all"]} rows ({described}) to {directory}')
    removed = [str(path) for path in before if not path.exists()]
    if removed:
        say(f'Removed {", ".join(removed)}, whose ratio is 0')
    if counts['missing']:
        print(f'Left out {counts["missing"]} rows whose image is not there')


def _head(text: str) -> tuple[str, str]:
    name, _, column = text.partition('=')
    if not name or text.endswith('='):
        raise argparse.ArgumentTypeError(f'{text!r} is not NAME or NAME=COLUMN')
    return name, column or name
