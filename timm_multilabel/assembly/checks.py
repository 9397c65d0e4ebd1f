"""What is refused before anything is trained."""
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

import torch

from timm_multilabel.assembly.data import Data
from timm_multilabel.assembly.pool import wants_pool
from timm_multilabel.assembly.pseudo_labels import chosen_by_pseudo_labels
from timm_multilabel.assembly.views import which_views
from timm_multilabel.config.train import Phase, TrainSettings
from timm_multilabel.data.remarks import can_be_scored
from timm_multilabel.errors import SettingError, UserError, listed
from timm_multilabel.heads import Head
from timm_multilabel.labels import LabelSpace
from timm_multilabel.lora import check_peft
from timm_multilabel.metric_names import earlier_name, of_head
from timm_multilabel.metrics import MEANS, default_metric
from timm_multilabel.stores import is_address
from timm_multilabel.task import resolve_head_weights

_OF_PSEUDO_LABELS = (
    'pseudo_label_ramp_up', 'pseudo_label_threshold', 'pseudo_label_reference', 'pseudo_label_alignment')
_RUN_WIDE = (
    'output', 'experiment', 'resume', 'initial_checkpoint', 'device', 'seed', 'log_tensorboard', 'log_wandb')


def check_phases(settings: TrainSettings) -> list[Phase]:
    """The phases of a run, checked; a run without phases is one that has no name.

    Raises:
        SettingError: A phase without epochs or with a setting of the whole run, or settings that do not go together.
    """
    if not settings.phases:
        if settings.backbone.start_from:
            raise SettingError('--start-from would change nothing: the run has no phases; leave it out')
        check_settings(settings, frozenset(settings.settings()))
        return [_with_choices(Phase('', {}, settings))]
    checked = []
    for index, phase in enumerate(settings.phases):
        where = f"{settings.config}, phase '{phase.name}'"
        earlier = ('initial', *(each.name for each in settings.phases[:index]))
        if phase.name == 'initial':
            raise SettingError(f"{where}: 'initial' stands for the initial weights; give the phase another name")
        if phase.settings.backbone.start_from not in (None, *earlier):
            raise SettingError(f"{where}: start_from '{phase.settings.backbone.start_from}' is none of the phases "
                               f'before it (there are: {listed(earlier)})')
        if phase.given.get('epochs') is None:
            raise SettingError(f"{where}: it has no epochs; add 'epochs: N'")
        for name in _RUN_WIDE:
            if name in phase.given:
                raise SettingError(f"{where}: '{name}' applies to the whole run; put it above the phases")
        try:
            check_settings(phase.settings, frozenset(phase.given))
        except UserError as error:
            raise SettingError(f'{where}: {error}') from error
        if not phase.settings.objective.classification_loss_weight:
            phase = replace(phase, settings=_without_heads(phase.settings))
        checked.append(_with_choices(phase))
    return checked


def _with_choices(phase: Phase) -> Phase:
    """A phase with the settings that pseudo-labels choose."""
    chosen = chosen_by_pseudo_labels(phase.settings)
    return replace(phase, settings=phase.settings.replace(**chosen), chosen=chosen)


def _without_heads(settings: TrainSettings) -> TrainSettings:
    """A phase of SimCLR alone without what the recipe, or the command line, says of heads for all phases."""
    of_heads = ('head', 'heads', 'head_weights', 'eval_metric', 'entropy_weight', 'marginal_entropy_weight',
                'pseudo_label_weight', *_OF_PSEUDO_LABELS, 'classify_views', 'teacher', 'teacher_weight',
                'teacher_temperature', 'teacher_views')
    known = settings.settings()
    return settings.replace(**{name: known[name].default for name in of_heads})


def check_settings(settings: TrainSettings, given: Collection[str]) -> None:
    """Refuse what contradicts itself, before anything is read.

    What a recipe says for all phases may be of no use in one of them; what a phase says itself may not.

    Args:
        settings: Of a run, or of a phase.
        given: The settings that may not be idle.

    Raises:
        SettingError: Settings that do not go together.
    """
    objective, views, run, backbone = settings.objective, settings.augmentation, settings.run, settings.backbone
    features = settings.teaching.teacher_features
    if not objective.simclr_loss_weight and not objective.classification_loss_weight and not features:
        raise SettingError('-wls 0 with -wlc 0 leaves nothing to train; make one of them more than 0')
    pool = wants_pool(settings)
    pool_batch = settings.pool.unlabelled_batch_size or (
        run.batch_size if pool and objective.classification_loss_weight else 0)
    if objective.simclr_loss_weight and run.batch_size + pool_batch == 1:
        raise SettingError(
            '-b 1: SimCLR contrasts the images of a batch, so it needs 2 or more; raise -b, or pass -wls 0')
    _check_idle(settings, pool, given)
    if backbone.freeze_backbone and objective.simclr_loss_weight:
        raise SettingError('--freeze-backbone trains the heads alone, and SimCLR the backbone: pass -wls 0 with it')
    if backbone.lora:
        if backbone.freeze_backbone:
            raise SettingError(
                '--lora trains adapters in the backbone, and --freeze-backbone nothing of it; leave one of them out')
        check_peft()
    if backbone.freeze_backbone and features:
        raise SettingError(
            '--freeze-backbone trains the heads alone, and --teacher-features the backbone: leave one out')
    mixing = views.mixup or views.cutmix
    if mixing and (pool or any(options.get('loss', 'softmax') != 'softmax' for options in settings.data.head.values())):
        raise SettingError('--mixup and --cutmix mix the labels of classes; leave them out with other heads or a pool')
    if mixing and objective.simclr_loss_weight:
        raise SettingError(
            '--mixup and --cutmix make one picture of two photos, which SimCLR would take for one photo: '
            'pass -wls 0 with them')
    if mixing and settings.teaching.teacher:
        raise SettingError(
            '--mixup and --cutmix mix photos, and teachers are asked about one photo: leave them out with --teacher')
    if mixing and run.batch_size % 2:
        raise SettingError(f'-b {run.batch_size}: --mixup and --cutmix mix pairs, so they need an even batch')
    if views.aa and views.views in ('simclr', 'simclr-exact'):
        raise SettingError(
            f"--aa is a policy of timm's views, and --views {views.views} has its own recipe; leave one out")
    if settings.data.cache == 'device' and which_views(settings) != 'simclr':
        raise SettingError(
            f"--cache device makes SimCLR's views on the device, and the views here are {which_views(settings)}; pass "
            '--views simclr, or --cache ram')
    if objective.condition_projector and objective.simclr_loss_weight and which_views(settings) != 'simclr':
        raise SettingError(
            f'--condition-projector: what --views {which_views(settings)} draws for a view is not known; pass --views '
            'simclr')
    jitter = views.color_jitter
    if jitter and (len(jitter) not in (1, 3, 4) or max(jitter[3:], default=0) > 0.5):
        raise SettingError('--color-jitter takes 1, 3 or 4 numbers, the fourth (hue) 0.5 at most')
    if views.aa and jitter and '3a' not in views.aa:
        raise SettingError('--aa has colors of its own, and timm then leaves --color-jitter out; pass one of them')
    if views.aa and views.color_jitter_prob is not None and '3a' not in views.aa:
        raise SettingError('--aa has colors of its own, and timm then leaves --color-jitter-prob out; pass one of them')
    for name, range_ in (('scale', views.scale), ('ratio', views.ratio)):
        if range_ and (range_[0] > range_[1] or name == 'scale' and range_[1] > 1):
            raise SettingError(f'--{name} {range_[0]:g} {range_[1]:g}: the least comes first'
                               + (', and the most is 1' if name == 'scale' else ''))
    if backbone.grad_checkpointing and (backbone.torchcompile or '').startswith('eager'):
        raise SettingError(f"--torchcompile {backbone.torchcompile} compiles nothing and cannot recompute activations; "
                           "pass another backend, or leave --grad-checkpointing out")
    if settings.optimizer.layer_decay and settings.schedule.sched == 'none':
        raise SettingError('--layer-decay works through the schedule; pass --sched constant in place of none')
    if settings.schedule.sched == 'plateau' and settings.schedule.sched_on_updates:
        raise SettingError('--sched plateau goes by epochs; leave --sched-on-updates out')
    if run.resume == 'auto' and not run.experiment:
        raise SettingError('--resume auto goes on with a run that has a name: add --experiment NAME')
    if backbone.input_size and backbone.input_size[0] != 3:
        raise SettingError(f'--input-size {backbone.input_size[0]} ...: images are RGB, so the first number is 3')


def _check_idle(settings: TrainSettings, pool: bool, given: Collection[str]) -> None:
    """Raise UserError where a setting that was given (in a recipe: by the phase itself) changes nothing."""
    changed, of_pool = settings.changed(), settings.pool
    of_heads = dict.fromkeys(
        ('head', 'heads', 'head_weights', 'classify_views', 'eval_metric', 'entropy_weight', 'marginal_entropy_weight',
         'pseudo_label_weight', 'labelled_rows', 'teacher'),
        '' if settings.objective.classification_loss_weight else '-wlc 0 trains no heads')
    reasons = {
        **of_heads,
        'epoch_by': of_heads['head'] or not pool and 'there are no unlabelled batches' or
        settings.run.epoch_steps and '--epoch-steps says how long an epoch is',
        'entropy_ramp_up': not (of_pool.entropy_weight or of_pool.marginal_entropy_weight)
        and 'there is no entropy weight to ramp up',
        'weak_first_view': settings.augmentation.weak_first_view
        and not (settings.objective.simclr_loss_weight or of_pool.pseudo_label_weight)
        and 'there is one view an image',
        'condition_projector': not settings.objective.simclr_loss_weight and 'there is no SimCLR',
        'cache_dir': settings.data.cache != 'disk' and (
            not settings.teaching.teacher or settings.teaching.teacher_views)
        and not any(map(is_address, (settings.run.output, settings.run.resume))) and 'there is no --cache disk',
        **dict.fromkeys(('teacher_weight', 'teacher_temperature', 'teacher_views'),
                        not settings.teaching.teacher and 'there is no --teacher'),
        **dict.fromkeys(('teacher_features_path', 'teacher_features_weight'),
                        not settings.teaching.teacher_features and 'there is no --teacher-features'),
        **dict.fromkeys(_OF_PSEUDO_LABELS, not of_pool.pseudo_label_weight and 'there is no --pseudo-label-weight'),
    }
    for name, reason in reasons.items():
        if reason and name in changed and name in given:
            raise SettingError(f'--{name.replace("_", "-")} would change nothing: {reason}; leave it out')


def without_effect(phases: Collection[Phase]) -> list[str]:
    """A line for each setting that was changed and has no effect in any phase, as what it belongs to is off."""
    found = [_without_effect(phase.settings) for phase in phases]
    return [f'--{name.replace("_", "-")} has no effect {reason}' for name, reason in found[0].items()
            if all(name in each for each in found)]


def _without_effect(settings: TrainSettings) -> dict[str, str]:
    """Why, by name. They are not refused: a recipe may keep them for the day that the other is on."""
    views, optimizer, sched = settings.augmentation, settings.optimizer, settings.schedule.sched
    no_ema = not settings.backbone.model_ema and 'without --model-ema'
    no_mixing = not (views.mixup or views.cutmix) and 'without --mixup or --cutmix'
    no_erasing = not views.reprob and 'without --reprob'
    no_simclr = not settings.objective.simclr_loss_weight and 'without SimCLR (-wls 0)'
    no_projector = not any(its.get('input') == 'projection' for its in settings.data.head.values()) and no_simclr
    reasons = {
        'temperature': no_simclr,
        'projection_dim': no_projector,
        'projector_layers': no_projector,
        'projector_width': no_projector or settings.objective.projector_layers == 1 and 'with --projector-layers 1',
        'model_ema_decay': no_ema,
        'model_ema_warmup': settings.backbone.model_ema_warmup and no_ema,
        'amp_dtype': not settings.run.amp and 'without --amp',
        'clip_mode': optimizer.clip_grad is None and 'without --clip-grad',
        'mixup_prob': no_mixing,
        'mixup_mode': no_mixing,
        'mixup_switch_prob': not (views.mixup and views.cutmix) and 'without both --mixup and --cutmix',
        'remode': no_erasing,
        'recount': no_erasing,
        'warmup_lr': not settings.schedule.warmup_epochs and 'with --warmup-epochs 0',
    }
    reasons |= {name: sched not in scheds and f'with --sched {sched}' for name, scheds in (
        ('patience_epochs', ('plateau',)), ('decay_milestones', ('multistep',)),
        ('decay_epochs', ('step', 'wsd', 'rsqrt')), ('decay_rate', ('step', 'multistep', 'plateau', 'poly')))}
    changed = settings.changed()
    return {name: reason for name, reason in reasons.items() if reason and name in changed}


def resolve_weights(settings: TrainSettings, data: Data, weights: dict[str, float]) -> dict[str, float]:
    """The weight of each head: `--head-weights`, or 1 / H each, and over them what `--head` says.

    Raises:
        SettingError: A weight is missing or of a head that there is none of, or all are 0.
    """
    names = data.label_space.names
    base = settings.objective.head_weights
    base = resolve_head_weights(names, None) if base is None else base
    try:
        return resolve_head_weights(names, {**base, **weights})
    except ValueError as error:
        raise SettingError(f'--head-weights: {error}') from error


def check_terms(settings: TrainSettings, heads: Iterable[Head]) -> None:
    """Raise UserError where no head can learn what unlabelled images are asked to teach."""
    pool = settings.pool
    if (pool.entropy_weight or pool.marginal_entropy_weight or pool.pseudo_label_weight) and not any(
            head.distribution for head in heads):
        raise SettingError('--entropy-weight, --pseudo-label-weight: no head predicts classes or tags; leave them out')


def check_metric(
        settings: TrainSettings,
        data: Data,
        heads: Iterable[Head],
        weights: dict[str, float],
        say: Callable[[str], None],
) -> str:
    """The metric that ranks checkpoints: by default that of the heads, or the loss where no label allows one.

    Raises:
        SettingError: There is no such metric, or the labels of the evaluation do not allow it.
    """
    heads = list(heads)
    metric = settings.run.eval_metric or default_metric(heads)
    if data.eval_rows is None:
        return 'simclr_loss' if settings.objective.simclr_loss_weight else 'teacher_features_loss'
    metrics_of = {head.labels.name: ('loss', *head.metric_names) for head in heads}
    known = [mean for mean in MEANS if mean in ('loss', default_metric(heads))
             or any(mean in its for its in metrics_of.values())]
    of_heads = [of_head(name, each) for name, its in metrics_of.items() for each in its]
    known += of_heads
    if metric not in known:
        meant = [name for name in of_heads if earlier_name(name) == metric]  # args.yaml of earlier versions has it
        if len(meant) != 1:
            raise SettingError(f"--eval-metric '{metric}': no such metric (there are: {listed(known)})")
        metric, = meant
    labelled, scored = _scored_heads(data.label_space, data.eval_rows.targets, weights)
    source = data.eval_rows.source
    if not labelled:
        raise SettingError(f'{source}: no row has a label of a head with a weight; there is nothing to score')
    if not scored and settings.run.eval_metric is None:
        say(f'{source}: its labels allow no {metric} of any head, so checkpoints are ranked by loss')
        return 'loss'
    if metric in MEANS and metric != 'loss' and not any(metric in ('score', *metrics_of[name]) for name in scored):
        raise SettingError(
            f'--eval-metric {metric}: {source} has no labels of a head that allow it; choose another, such '
                        'as loss')
    for head in heads:
        name = head.labels.name
        for each in metrics_of[name]:
            allowed = labelled if each in ('loss', *head.lower_is_better) else scored
            if metric == of_head(name, each) and name not in allowed:
                raise SettingError(
                    f"--eval-metric {metric}: '{name}' has no weight, or no labels in {source} that allow it; choose "
                    'another')
    return metric


def _scored_heads(
        label_space: LabelSpace,
        targets: torch.Tensor,
        weights: dict[str, float],
) -> tuple[list[str], list[str]]:
    """The heads with a weight that the evaluation has labels of, and those of them whose labels allow a metric."""
    weighted = [name for name in label_space.names if weights[name]]
    if not len(targets):  # of shards whose labels were not read before training nothing is known
        return weighted, weighted
    of_head = zip(label_space.heads, label_space.split(targets), strict=True)
    known = [(labels, target) for labels, target in of_head if labels.name in weighted and labels.known(target).any()]
    return [labels.name for labels, _ in known], [
        labels.name for labels, target in known if can_be_scored(labels, target)]
