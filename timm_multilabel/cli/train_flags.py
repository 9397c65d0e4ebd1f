"""The flags of training, named as timm's training script names them."""
import argparse

from timm_multilabel.cli.flags import (
    Assignments,
    HeadOptions,
    Settings,
    above_0,
    add_dialect_flags,
    add_trust_flags,
    at_least_0,
    count,
    fraction,
    number,
    positive,
    separator,
)
from timm_multilabel.model_names import LARGEST_PROJECTION, LARGEST_SIDE

_SWITCH = argparse.BooleanOptionalAction
side = number(int, least=1, most=LARGEST_SIDE)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add all flags of training to a parser."""
    parser.add_argument('-c', '--config', metavar='FILE',
                        help='YAML file that sets any of the flags below, or a recipe of phases')
    parser.set_defaults(phases=())
    _add_data(parser.add_argument_group('data'))
    _add_model(parser.add_argument_group('model'))
    _add_loss(parser.add_argument_group('objective'))
    _add_pool(parser.add_argument_group('unlabelled images'))
    _add_views(parser.add_argument_group('views and augmentation'))
    _add_optimizer(parser.add_argument_group('optimizer'))
    _add_schedule(parser.add_argument_group('learning rate schedule'))
    _add_run(parser.add_argument_group('run'))


def _add_data(group) -> None:
    group.add_argument('data_dir', metavar='DIR', help='folder with train.csv, val.csv and perhaps all.csv')
    group.add_argument('--image-column', default='image_path', metavar='NAME', help='column of the image paths')
    group.add_argument('--train-split', default='train', metavar='NAME', help='train, ... or the path of a CSV')
    group.add_argument('--val-split', default='val', metavar='NAME', help='val, ... or the path of a CSV')
    group.add_argument('--separator', type=separator, metavar='CHAR',
                       help='between cells: a character, tab, or whitespace for runs of blanks (default: found)')
    group.add_argument('--missing-value', metavar='TEXT', help='a cell that means no label, beside the empty one')
    add_dialect_flags(group, '|')
    group.add_argument('--heads', nargs='+', metavar='NAME', help='label columns to learn (default: all)')
    group.add_argument('--head', action=HeadOptions, nargs='+', default={}, metavar='HEAD:NAME=VALUE,...',
                       help='options of a head: loss=softmax|arcface|tags|numeric, weight, input=features|projection, '
                            'drop, smoothing, class_weights=balanced, scale, margin, columns=a+b (0/1 columns of tags)')
    add_trust_flags(group)
    group.add_argument('--unknown-labels', choices=('error', 'ignore'), default='error',
                       help='labels of val.csv that training does not know: stop, or take them as missing')
    group.add_argument('--skip-bad-images', action=_SWITCH, default=False,
                       help='leave out and report images that cannot be decoded, where else the first one ends the run')
    group.add_argument('--cache', choices=('ram', 'disk', 'device'),
                       help='keep decoded images as bytes, if they fit: in memory or on disk, for all processes of a '
                            'machine; or on the device, which then makes the views too')
    group.add_argument('--cache-dir', default='~/.cache/timm-multilabel', metavar='DIR', help='where --cache disk is')
    group.add_argument('-j', '--workers', type=count, default=4, metavar='N', help='loader processes a GPU')


def _add_model(group) -> None:
    group.add_argument('--model', default='efficientnet_b0', metavar='NAME', help='any timm model')
    group.add_argument('--pretrained', action=_SWITCH, default=False, help="start from timm's pretrained weights")
    group.add_argument('--pretrained-path', metavar='FILE',
                       help='start from a local timm checkpoint or safetensors file')
    group.add_argument('--initial-checkpoint', metavar='FILE',
                       help='start from what fits of a checkpoint of this program')
    group.add_argument('--img-size', type=side, metavar='N', help="image size (default: the model's own)")
    group.add_argument('--input-size', type=side, nargs=3, metavar='N', help='input size: 3 height width')
    group.add_argument('--mean', type=number(least=-1e4, most=1e4), nargs='+', metavar='X',
                       help='mean to normalise with')
    group.add_argument('--std', type=number(least=1e-4, most=1e4), nargs='+', metavar='X',
                       help='standard deviation to normalise with')
    group.add_argument('--drop', type=fraction, default=0.0, metavar='P', help='dropout rate of the heads')
    group.add_argument('--drop-path', '--drop-connect', type=fraction, metavar='P',
                       help='stochastic depth rate of the backbone')
    group.add_argument('--model-kwargs', nargs='*', default={}, action=Settings, metavar='K=V',
                       help='further arguments of the model')
    group.add_argument('--freeze-backbone', action=_SWITCH, default=False,
                       help='train the heads alone, batch norm statistics frozen too; needs -wls 0')
    group.add_argument('--grad-checkpointing', action=_SWITCH, default=False,
                       help='recompute activations in the backward pass to save memory')
    group.add_argument('--channels-last', action=_SWITCH, default=False, help='channels-last memory layout')
    group.add_argument('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='use torch.compile')
    group.add_argument('--sync-bn', action=_SWITCH, default=False, help='batch norm over all GPUs')
    group.add_argument('--model-ema', action=_SWITCH, default=False, help='keep a moving average of the weights')
    group.add_argument('--model-ema-decay', type=fraction, default=0.9998, metavar='P', help='its decay')
    group.add_argument('--model-ema-warmup', action=_SWITCH, default=False, help='warm its decay up')


def _add_loss(group) -> None:
    group.add_argument('-wls', '--simclr-loss-weight', type=at_least_0, default=0.5, metavar='W',
                       help='weight of NT-Xent; 0 trains the heads alone, with one view an image')
    group.add_argument('-wlc', '--classification-loss-weight', type=at_least_0, default=0.5, metavar='W',
                       help="weight of the heads' losses; 0 is SimCLR alone")
    group.add_argument('-t', '--temperature', type=above_0, default=0.5, metavar='T', help='temperature of NT-Xent')
    group.add_argument('--projection-dim', type=number(int, least=1, most=LARGEST_PROJECTION), default=64,
                       metavar='N', help='width of the projections')
    group.add_argument('--smoothing', type=fraction, default=0.1, metavar='P', help='label smoothing')
    group.add_argument('--head-weights', action=Assignments, nargs='+', metavar='HEAD=W',
                       help='weight of each head (default: 1 / number of heads)')
    group.add_argument('--classify-views', choices=('both', 'first'), default='both',
                       help='views that the heads learn from')


def _add_pool(group) -> None:
    group.add_argument('--unlabelled', metavar='SOURCE',
                       help='a CSV, a folder, or the name of a split; rows without any label join it')
    group.add_argument('--labelled-rows', type=positive, metavar='N',
                       help='what would fewer labels do? Use those of N rows, drawn by --seed; the others join the '
                            'unlabelled images, where batches have some, and are else left out')
    group.add_argument('--unlabelled-batch-size', type=positive, metavar='N',
                       help='unlabelled images a GPU and step (default: as -b; with -wlc 0: none beside -b)')
    group.add_argument('--epoch-by', choices=('larger', 'labelled', 'unlabelled'), default='larger',
                       help='whose images an epoch is one pass over; the others start again')
    group.add_argument('--entropy-weight', type=at_least_0, default=0.0, metavar='W',
                       help="weight of the heads' mean entropy; it may collapse, see the next two")
    group.add_argument('--entropy-ramp-up', type=count, default=0, metavar='N', help='epochs it grows over')
    group.add_argument('--marginal-entropy-weight', type=at_least_0, default=0.0, metavar='W',
                       help='weight of the reward for the entropy of the mean prediction')
    group.add_argument('--pseudo-label-weight', type=at_least_0, default=0.0, metavar='W',
                       help='weight of the loss of a strong view against the class that a weak one is taken for')
    group.add_argument('--pseudo-label-threshold', type=fraction, default=0.95, metavar='P',
                       help='least probability of such a class')


def _add_views(group) -> None:
    group.add_argument('--views', choices=('simclr', 'simclr-exact', 'timm'),
                       help="SimCLR's crop, flip, jitter, greyscale and blur, made fast; the same by the textbook; or "
                            "timm's transforms (default: simclr with SimCLR and without --aa, else timm)")
    group.add_argument('--weak-first-view', action=_SWITCH, default=False,
                       help='make the first view of a pair a weak one (flip, slight crop), as with pseudo-labels')
    group.add_argument('--scale', type=above_0, nargs=2, metavar='X',
                       help="crop area range (default: 0.2 1; with timm's views 0.08 1)")
    group.add_argument('--ratio', type=above_0, nargs=2, default=[3 / 4, 4 / 3], metavar='X',
                       help='crop aspect range (default: 3/4 4/3)')
    group.add_argument('--hflip', type=fraction, default=0.5, metavar='P', help='probability of a horizontal flip')
    group.add_argument('--vflip', type=fraction, default=0.0, metavar='P', help='probability of a vertical flip')
    group.add_argument('--rotation', type=number(least=0, most=180), default=0.0, metavar='DEG',
                       help='random rotation, to either side')
    group.add_argument('--train-interpolation', choices=('random', 'bilinear', 'bicubic'),
                       help="resampling of the crop (default: bilinear, with timm's views random)")
    group.add_argument('--aa', metavar='POLICY', help='auto augment policy, e.g. rand-m9-mstd0.5')
    group.add_argument('--color-jitter', type=at_least_0, nargs='+', metavar='X',
                       help="brightness, contrast, saturation[, hue], or one number for the first three (default: 0.4 "
                            "0.4 0.4 0.1; with timm's views 0.4, and off with --aa)")
    group.add_argument('--color-jitter-prob', type=fraction, metavar='P',
                       help="probability of color jitter (default: 0.8; with timm's views always)")
    group.add_argument('--grayscale-prob', type=fraction, metavar='P',
                       help="probability of greyscale (default: 0.1; with timm's views 0)")
    group.add_argument('--gaussian-blur-prob', type=fraction, metavar='P',
                       help="probability of blur (default: 0.5; with timm's views 0)")
    group.add_argument('--reprob', type=fraction, default=0.0, metavar='P', help='probability of random erasing')
    group.add_argument('--remode', choices=('const', 'rand', 'pixel'), default='pixel', help='what erased areas hold')
    group.add_argument('--recount', type=number(int, least=1, most=100), default=1, metavar='N',
                       help='erased areas an image')
    group.add_argument('--interpolation', choices=('nearest', 'bilinear', 'bicubic', 'lanczos'),
                       help="evaluation's resize (default: the model's own)")
    group.add_argument('--crop-pct', type=number(least=0.1, most=10), metavar='X',
                       help="evaluation's center crop share")
    group.add_argument('--mixup', type=at_least_0, default=0.0, metavar='A', help='mixup alpha; needs -wls 0')
    group.add_argument('--cutmix', type=at_least_0, default=0.0, metavar='A', help='cutmix alpha; needs -wls 0')
    group.add_argument('--mixup-prob', type=fraction, default=1.0, metavar='P', help='probability of mixing')
    group.add_argument('--mixup-switch-prob', type=fraction, default=0.5, metavar='P',
                       help='probability of cutmix where both are on')
    group.add_argument('--mixup-mode', choices=('batch', 'pair', 'elem'), default='batch',
                       help='one share for the batch, each pair or each image')


def _add_optimizer(group) -> None:
    group.add_argument('--opt', default='sgd', metavar='NAME', help='any timm optimizer')
    group.add_argument('--opt-eps', type=above_0, metavar='X', help='epsilon')
    group.add_argument('--opt-betas', type=number(least=0, most=0.999999), nargs='+', metavar='X', help='betas')
    group.add_argument('--opt-kwargs', nargs='*', default={}, action=Settings, metavar='K=V',
                       help='further arguments of the optimizer')
    group.add_argument('--momentum', type=fraction, default=0.9, metavar='X', help='momentum')
    group.add_argument('--weight-decay', type=at_least_0, default=2e-5, metavar='X', help='weight decay')
    group.add_argument('--layer-decay', type=number(above=1e-30, most=1), metavar='X',
                       help="factor on the learning rate from each of the backbone's layers to the one below")
    group.add_argument('--gradient-centralization', action=_SWITCH, default=None,
                       help='center the updates of convolutions (default: with --opt adamp)')
    group.add_argument('--clip-grad', type=above_0, metavar='X', help='clip gradients')
    group.add_argument('--clip-mode', choices=('norm', 'value', 'agc'), default='norm', help='how to clip them')
    group.add_argument('--grad-accum-steps', type=positive, default=1, metavar='N',
                       help='batches an update; NT-Xent pairs within each of them')


def _add_schedule(group) -> None:
    group.add_argument('--sched', default='cosine', metavar='NAME', help='any timm schedule, e.g. cosine, step')
    group.add_argument('--sched-on-updates', action=_SWITCH, default=False, help='step it every update, not epoch')
    group.add_argument('--lr', type=above_0, default=0.05, metavar='X', help='learning rate')
    group.add_argument('--epochs', type=positive, default=100, metavar='N',
                       help='epochs of the schedule; those of the cooldown come after them')
    group.add_argument('--warmup-epochs', type=count, default=3, metavar='N', help='epochs of warm-up')
    group.add_argument('--warmup-lr', type=at_least_0, default=1e-4, metavar='X', help='rate that warm-up starts at')
    group.add_argument('--cooldown-epochs', type=count, metavar='N',
                       help='epochs at the least rate after those of --epochs, as in "100 epochs + 10 of cooldown" '
                            '(default: a tenth of --epochs, 10 at most; --sched cosine, tanh, poly, wsd and rsqrt '
                            'have a cooldown, the others have none)')
    group.add_argument('--min-lr', type=at_least_0, default=1e-5, metavar='X', help='least rate')
    group.add_argument('--decay-epochs', type=above_0, default=30, metavar='X', help='epochs between decays (step)')
    group.add_argument('--decay-milestones', type=positive, nargs='+', default=[30, 60], metavar='N',
                       help='epochs of decay (multistep)')
    group.add_argument('--decay-rate', type=above_0, default=0.1, metavar='X', help='factor of a decay')
    group.add_argument('--patience-epochs', type=count, default=10, metavar='N', help='patience (plateau)')


def _add_run(group) -> None:
    group.add_argument('-b', '--batch-size', type=positive, default=128, metavar='N', help='images a GPU and step')
    group.add_argument('--micro-batch', type=positive, metavar='M',
                       help='images that go through the model at once, labelled and unlabelled, where a step has more: '
                            'the same gradient (batch norm sees M images) in less memory, at some 4/3 of the time')
    group.add_argument('-vb', '--validation-batch-size', type=positive, metavar='N',
                       help='the same in evaluation (default: as --micro-batch, else as -b)')
    group.add_argument('--device', metavar='NAME', help='cpu, cuda, cuda:1, mps (default: cuda where there is one)')
    group.add_argument('--amp', action=_SWITCH, default=False, help='mixed precision')
    group.add_argument('--amp-dtype', choices=('float16', 'bfloat16'),
                       help='its lower precision (default: float16 on CUDA, bfloat16 elsewhere)')
    group.add_argument('--apex-amp', '--native-amp', dest='old_amp', action='store_true', help=argparse.SUPPRESS)
    group.add_argument('--seed', type=number(int, least=0, most=2 ** 31), default=42, metavar='N',
                       help='makes a run repeatable')
    group.add_argument('--output', default='output/train', metavar='DIR', help='where run folders go')
    group.add_argument('--experiment', metavar='NAME', help='name of the run folder (default: time-model-size)')
    group.add_argument('--resume', metavar='FILE',
                       help="go on from a checkpoint; from the newest whole one of a run folder; or 'auto': of that of "
                            '--experiment, where there is one, else start')
    group.add_argument('--checkpoint-steps', type=positive, metavar='N',
                       help='save within an epoch too, every N steps (the last two are kept until its end)')
    group.add_argument('--eval-metric', metavar='NAME',
                       help='what makes a checkpoint the best: loss, top1, HEAD/top1, HEAD/map, ... (default: top1, or '
                            "score, the mean of the heads' main metrics, where a head has tags or numbers)")
    group.add_argument('--checkpoint-hist', type=positive, default=10, metavar='N', help='checkpoints kept')
    group.add_argument('--log-interval', type=positive, default=50, metavar='N', help='steps between figures')
    group.add_argument('--log-tensorboard', action=_SWITCH, default=False,
                       help="write the figures for TensorBoard too, into the run folder (needs the extra "
                            "'tensorboard')")
    group.add_argument('--log-wandb', action=_SWITCH, default=False,
                       help="tell the figures to Weights & Biases (needs the extra 'wandb'; WANDB_MODE=offline keeps "
                            'them in the run folder)')
    group.add_argument('--epoch-steps', '--limit-steps', type=positive, metavar='N',  # its name in earlier args.yaml
                       help='steps of an epoch (default: one pass over the images)')
