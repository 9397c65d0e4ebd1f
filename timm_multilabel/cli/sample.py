"""Draw a small data set with three label heads, without any download."""
import argparse

from timm_multilabel.cli.flags import count, number, positive
from timm_multilabel.cli.output import say
from timm_multilabel.data.packing import FORMATS
from timm_multilabel.data.sample import write_sample

NAME = 'sample'
HELP = 'draw a small data set with three label heads, without any download'


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument('directory', metavar='DIR', help='folder to write to')
    parser.add_argument('--train', type=positive, default=2400, metavar='N', help='rows of train.csv')
    parser.add_argument('--val', type=positive, default=400, metavar='N', help='rows of val.csv')
    parser.add_argument('--test', type=positive, default=400, metavar='N', help='rows of test.csv')
    parser.add_argument('--unlabelled', type=count, default=1200, metavar='N', help='rows of unlabelled.csv, or 0')
    parser.add_argument('--size', type=number(int, 16), default=64, metavar='N', help='width and height in pixels')
    parser.add_argument('--seed', type=count, default=0, metavar='N', help='same seed, same bytes')
    parser.add_argument('--format', choices=('csv', *FORMATS), default='csv',
                        help='write images/ and CSVs, or shards with images and labels in them')
    parser.add_argument('--force', action='store_true', help='overwrite what is there')


def run(args: argparse.Namespace) -> None:
    """Draw the data set and say what to try next."""
    counts = {name: getattr(args, name) for name in ('train', 'val', 'test', 'unlabelled')}
    write_sample(args.directory, **counts, size=args.size, seed=args.seed, kind=args.format, force=args.force)
    described = ', '.join(f'{rows} {name}' for name, rows in counts.items())
    say(f'Wrote {sum(counts.values())} pictures ({described}) to {args.directory}, see preview.png there; '
        'the color NA is gray')
    say(f'Next: timm-multilabel train {args.directory} --model resnet10t --img-size {args.size} -b 64 '
          '--opt adamw --lr 2e-3 --epochs 6 --cooldown-epochs 0')
