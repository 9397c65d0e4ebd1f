"""What is refused before anything is trained."""
import argparse
from collections.abc import Callable, Iterable

from timm_multilabel.cli.batches import which_views
from timm_multilabel.cli.data import Data, wants_pool
from timm_multilabel.data.remarks import can_be_scored
from timm_multilabel.errors import UserError, listed
from timm_multilabel.heads import Head
from timm_multilabel.metric_names import earlier_name, of_head
from timm_multilabel.metrics import MEANS, default_metric
from timm_multilabel.task import resolve_head_weights

_RUN_WIDE = (
    'output', 'experiment', 'resume', 'initial_checkpoint', 'device', 'seed', 'log_tensorboard', 'log_wandb')


def check_phases(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The flags of each phase, or of the one that a run without phases is.

    Raises:
        UserError: A phase without epochs or with a flag of the whole run, or flags that do not go together.
    """
    if not args.phases:
        check_flags(args)
        return [args]
    for phase in args.phases:
        where = f"{args.config}, phase '{phase.phase}'"
        if phase.given.get('epochs') is None:
            raise UserError(f"{where}: it has no epochs; add 'epochs: N'")
        for name in _RUN_WIDE:
            if name in phase.given:
                raise UserError(f"{where}: '{name}' applies to the whole run; put it above the phases")
        try:
            check_flags(phase)
        except UserError as error:
            raise UserError(f'{where}: {error}') from error
        if not phase.classification_loss_weight:
            _forget_heads(phase)
    return args.phases


def _forget_heads(phase: argparse.Namespace) -> None:
    """Take from a phase of SimCLR alone what the recipe, or the command line, says of heads for all phases."""
    phase.head = {}
    phase.heads = phase.head_weights = phase.eval_metric = None
    phase.entropy_weight = phase.marginal_entropy_weight = phase.pseudo_label_weight = 0.0
    phase.classify_views = 'both'


def check_flags(args: argparse.Namespace) -> None:
    """Refuse what contradicts itself, before anything is read.

    What a recipe says for all phases may be of no use in one of them; what a phase says itself may not.

    Raises:
        UserError: Flags that do not go together.
    """
    if not args.simclr_loss_weight and not args.classification_loss_weight:
        raise UserError('-wls 0 with -wlc 0 leaves nothing to train; make one of them more than 0')
    pool = wants_pool(args)
    pool_batch = args.unlabelled_batch_size or (args.batch_size if pool and args.classification_loss_weight else 0)
    images = args.batch_size + pool_batch
    if args.simclr_loss_weight and images == 1:
        raise UserError('-b 1: SimCLR contrasts the images of a batch, so it needs 2 or more; raise -b, or pass -wls 0')
    _check_idle(args, pool)
    if args.freeze_backbone and args.simclr_loss_weight:
        raise UserError('--freeze-backbone trains the heads alone, and SimCLR the backbone: pass -wls 0 with it')
    mixing = args.mixup or args.cutmix
    if mixing and (pool or any(options.get('loss', 'softmax') != 'softmax' for options in args.head.values())):
        raise UserError('--mixup and --cutmix mix the labels of classes; leave them out with other heads or a pool')
    if mixing and args.simclr_loss_weight:
        raise UserError(
            '--mixup and --cutmix make one picture of two photos, which SimCLR would take for one photo: '
            'pass -wls 0 with them')
    if mixing and args.batch_size % 2:
        raise UserError(f'-b {args.batch_size}: --mixup and --cutmix mix pairs, so they need an even batch')
    if args.aa and args.views in ('simclr', 'simclr-exact'):
        raise UserError(f"--aa is a policy of timm's views, and --views {args.views} has its own recipe; leave one out")
    if args.cache == 'device' and which_views(args) != 'simclr':
        raise UserError(
            f"--cache device makes SimCLR's views on the device, and the views here are {which_views(args)}; pass "
            '--views simclr, or --cache ram')
    if args.color_jitter and (len(args.color_jitter) not in (1, 3, 4) or max(args.color_jitter[3:], default=0) > 0.5):
        raise UserError('--color-jitter takes 1, 3 or 4 numbers, the fourth (hue) 0.5 at most')
    if args.aa and args.color_jitter and '3a' not in args.aa:
        raise UserError('--aa has colors of its own, and timm then leaves --color-jitter out; pass one of them')
    if args.aa and args.color_jitter_prob is not None and '3a' not in args.aa:
        raise UserError('--aa has colors of its own, and timm then leaves --color-jitter-prob out; pass one of them')
    for name in ('scale', 'ratio') if args.scale else ('ratio',):
        low, high = getattr(args, name)
        if low > high or name == 'scale' and high > 1:
            raise UserError(f'--{name} {low:g} {high:g}: the least comes first'
                            + (', and the most is 1' if name == 'scale' else ''))
    if args.grad_checkpointing and (args.torchcompile or '').startswith('eager'):
        raise UserError(f'--torchcompile {args.torchcompile} compiles nothing and cannot recompute activations; pass '
                        'another backend, or leave --grad-checkpointing out')
    if args.layer_decay and args.sched == 'none':
        raise UserError('--layer-decay works through the schedule; pass --sched constant in place of none')
    if args.sched == 'plateau' and args.sched_on_updates:
        raise UserError('--sched plateau goes by epochs; leave --sched-on-updates out')
    if args.resume == 'auto' and not args.experiment:
        raise UserError('--resume auto goes on with a run that has a name: add --experiment NAME')
    if args.input_size and args.input_size[0] != 3:
        raise UserError(f'--input-size {args.input_size[0]} ...: images are RGB, so the first number is 3')


def _check_idle(args: argparse.Namespace, pool: bool) -> None:
    """Raise UserError where a flag that was given (in a recipe: by the phase itself) changes nothing."""
    without_heads = '-wlc 0 trains no heads' if not args.classification_loss_weight else ''
    reasons = {
        'head': args.head and without_heads,
        'heads': args.heads and without_heads,
        'head_weights': args.head_weights and without_heads,
        'classify_views': args.classify_views == 'first' and without_heads,
        'eval_metric': args.eval_metric and without_heads,
        'entropy_weight': args.entropy_weight and without_heads,
        'marginal_entropy_weight': args.marginal_entropy_weight and without_heads,
        'pseudo_label_weight': args.pseudo_label_weight and without_heads,
        'labelled_rows': args.labelled_rows and without_heads,
        'epoch_by': args.epoch_by != 'larger' and (
            without_heads or not pool and 'there are no unlabelled batches' or args.epoch_steps and
            '--epoch-steps says how long an epoch is'),
        'entropy_ramp_up': args.entropy_ramp_up and not (args.entropy_weight or args.marginal_entropy_weight)
        and 'there is no entropy weight to ramp up',
        'weak_first_view': args.weak_first_view and not (args.simclr_loss_weight or args.pseudo_label_weight)
        and 'there is one view an image',
        'cache_dir': args.cache_dir != '~/.cache/timm-multilabel' and args.cache != 'disk'
        and 'there is no --cache disk',
        'pseudo_label_threshold': args.pseudo_label_threshold != 0.95 and not args.pseudo_label_weight
        and 'there is no --pseudo-label-weight',
    }
    for name, reason in reasons.items():
        if reason and name in getattr(args, 'given', reasons):
            raise UserError(f'--{name.replace("_", "-")} would change nothing: {reason}; leave it out')


def resolve_weights(args: argparse.Namespace, data: Data, weights: dict[str, float]) -> dict[str, float]:
    """The weight of each head: `--head-weights`, or 1 / H each, and over them what `--head` says.

    Raises:
        UserError: A weight is missing or of a head that there is none of, or all are 0.
    """
    names = data.label_space.names
    base = args.head_weights if args.head_weights is not None else resolve_head_weights(names, None)
    try:
        return resolve_head_weights(names, {**base, **weights})
    except ValueError as error:
        raise UserError(f'--head-weights: {error}') from error


def check_terms(args: argparse.Namespace, heads: Iterable[Head]) -> None:
    """Raise UserError where no head can learn what unlabelled images are asked to teach."""
    if (args.entropy_weight or args.marginal_entropy_weight or args.pseudo_label_weight) and not any(
            head.distribution for head in heads):
        raise UserError('--entropy-weight, --pseudo-label-weight: no head predicts classes or tags; leave them out')


def check_metric(
        args: argparse.Namespace,
        data: Data,
        heads: Iterable[Head],
        weights: dict[str, float],
        say: Callable[[str], None],
) -> str:
    """The metric that ranks checkpoints: by default that of the heads, or the loss where no label allows one.

    Raises:
        UserError: There is no such metric, or the labels of the evaluation do not allow it.
    """
    heads = list(heads)
    metric = args.eval_metric or default_metric(heads)
    if data.eval_rows is None:
        return 'simclr_loss'
    figures = {head.labels.name: ('loss', *head.metric_names) for head in heads}
    known = [mean for mean in MEANS if mean in ('loss', default_metric(heads))
             or any(mean in its for its in figures.values())]
    of_heads = [of_head(name, figure) for name, its in figures.items() for figure in its]
    known += of_heads
    if metric not in known:
        meant = [name for name in of_heads if earlier_name(name) == metric]  # args.yaml of earlier versions has it
        if len(meant) != 1:
            raise UserError(f"--eval-metric '{metric}': no such metric (there are: {listed(known)})")
        metric, = meant
    labelled, scored = _scored_heads(data, weights)
    source = data.eval_rows.source
    if not labelled:
        raise UserError(f'{source}: no row has a label of a head with a weight; there is nothing to score')
    if not scored and args.eval_metric is None:
        say(f'{source}: its labels allow no {metric} of any head, so checkpoints are ranked by loss')
        return 'loss'
    if metric in MEANS and metric != 'loss' and not any(metric in ('score', *figures[name]) for name in scored):
        raise UserError(f'--eval-metric {metric}: {source} has no labels of a head that allow it; choose another, such '
                        'as loss')
    for head in heads:
        name = head.labels.name
        for figure in figures[name]:
            allowed = labelled if figure in ('loss', *head.lower_is_better) else scored
            if metric == of_head(name, figure) and name not in allowed:
                raise UserError(
                    f"--eval-metric {metric}: '{name}' has no weight, or no labels in {source} that allow it; choose "
                    'another')
    return metric


def _scored_heads(data: Data, weights: dict[str, float]) -> tuple[list[str], list[str]]:
    """The heads with a weight that the evaluation has labels of, and those of them whose labels allow a metric."""
    weighted = [name for name in data.label_space.names if weights[name]]
    targets = data.eval_rows.targets
    if not len(targets):  # of shards whose labels were not read before training nothing is known
        return weighted, weighted
    of_head = zip(data.label_space.heads, data.label_space.split(targets), strict=True)
    known = [(labels, target) for labels, target in of_head if labels.name in weighted and labels.known(target).any()]
    return [labels.name for labels, _ in known], [
        labels.name for labels, target in known if can_be_scored(labels, target)]
