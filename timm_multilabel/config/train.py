"""The settings of training, named as timm's training script names them."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from timm_multilabel.config import shared
from timm_multilabel.config.settings import Settings, group, required, setting, switch
from timm_multilabel.config.values import (
    HeadOptions,
    above_0,
    assignments,
    at_least_0,
    count,
    fraction,
    keywords,
    number,
    positive,
)
from timm_multilabel.model_names import LARGEST_PROJECTION, LARGEST_SIDE

side = number(int, least=1, most=LARGEST_SIDE)


@dataclass(frozen=True)
class DataSettings(Settings):
    """Where images and labels come from."""
    data_dir: str = required('folder with train.csv, val.csv and perhaps all.csv', positional=True, metavar='DIR')
    image_column: str = shared.image_column('column of the image paths', 'image_path')
    train_split: str = setting('train', 'train, ... or the path of a CSV', metavar='NAME')
    val_split: str = setting('val', 'val, ... or the path of a CSV', metavar='NAME')
    separator: str | None = shared.cell_separator(
        'between cells: a character, tab, or whitespace for runs of blanks (default: found)')
    missing_value: str | None = shared.missing_value('a cell that means no label, beside the empty one')
    tag_separator: str | None = shared.tags_between('|')
    none_value: str | None = shared.no_tags()
    heads: list[str] | None = shared.heads('label columns to learn (default: all)')
    head: HeadOptions = shared.head(
        'options of a head: loss=softmax|arcface|tags|numeric, weight, input=features|projection, drop, smoothing, '
        'class_weights=balanced, scale, margin, columns=a+b (0/1 columns of tags)')
    head_module: str | None = shared.head_module()
    allow_hub: bool = shared.allow_hub()
    unknown_labels: str = setting(
        'error', 'labels of val.csv that training does not know: stop, or take them as missing',
        choices=('error', 'ignore'))
    skip_bad_images: bool = switch(
        'leave out and report images that cannot be decoded, where else the first one ends the run')
    cache: str | None = setting(
        None,
        'keep decoded images as bytes, if they fit: in memory or on disk, for all processes of a machine; or on the '
        'device, which then makes the views too',
        choices=('ram', 'disk', 'device'))
    cache_dir: str = setting('~/.cache/timm-multilabel', 'where --cache disk is', metavar='DIR')
    workers: int = shared.workers('loader processes a GPU')


@dataclass(frozen=True)
class ModelSettings(Settings):
    """The backbone, its first weights, and what surrounds it."""
    model: str = setting('efficientnet_b0', 'any timm model', metavar='NAME')
    pretrained: bool = switch("start from timm's pretrained weights")
    pretrained_path: str | None = setting(
        None, 'start from a local timm checkpoint or safetensors file', metavar='FILE')
    initial_checkpoint: str | None = setting(
        None, 'start from what fits of a checkpoint of this program', metavar='FILE')
    img_size: int | None = setting(None, "image size (default: the model's own)", side, metavar='N')
    input_size: list[int] | None = setting(None, 'input size: 3 height width', side, nargs=3, metavar='N')
    mean: list[float] | None = setting(
        None, 'mean to normalise with', number(least=-1e4, most=1e4), nargs='+', metavar='X')
    std: list[float] | None = setting(
        None, 'standard deviation to normalise with', number(least=1e-4, most=1e4), nargs='+', metavar='X')
    drop: float = setting(0.0, 'dropout rate of the heads', fraction, metavar='P')
    drop_path: float | None = setting(
        None, 'stochastic depth rate of the backbone', fraction, flags=('--drop-connect',), metavar='P')
    model_kwargs: dict[str, Any] = setting(
        {}, 'further arguments of the model', nargs='*', metavar='K=V', read=keywords)
    freeze_backbone: bool = switch('train the heads alone, batch norm statistics frozen too; needs -wls 0')
    grad_checkpointing: bool = switch('recompute activations in the backward pass to save memory')
    channels_last: bool = switch('channels-last memory layout')
    torchcompile: str | None = setting(None, 'use torch.compile', nargs='?', const='inductor', metavar='BACKEND')
    sync_bn: bool = switch('batch norm over all GPUs')
    model_ema: bool = switch('keep a moving average of the weights')
    model_ema_decay: float = setting(0.9998, 'its decay', fraction, metavar='P')
    model_ema_warmup: bool = switch('warm its decay up')


@dataclass(frozen=True)
class ObjectiveSettings(Settings):
    """`wls * NT-Xent + wlc * mean over heads of their losses`."""
    simclr_loss_weight: float = setting(
        0.5, 'weight of NT-Xent; 0 trains the heads alone, with one view an image', at_least_0, flags=('-wls',),
        metavar='W')
    classification_loss_weight: float = setting(
        0.5, "weight of the heads' losses; 0 is SimCLR alone", at_least_0, flags=('-wlc',), metavar='W')
    temperature: float = setting(0.5, 'temperature of NT-Xent', above_0, flags=('-t',), metavar='T')
    projection_dim: int = setting(
        64, 'width of the projections', number(int, least=1, most=LARGEST_PROJECTION), metavar='N')
    smoothing: float = setting(0.1, 'label smoothing', fraction, metavar='P')
    head_weights: dict[str, float] | None = setting(
        None, 'weight of each head (default: 1 / number of heads)', nargs='+', metavar='HEAD=W', read=assignments)
    classify_views: str = setting('both', 'views that the heads learn from', choices=('both', 'first'))


@dataclass(frozen=True)
class UnlabelledSettings(Settings):
    """The unlabelled images, and the terms of the objective that learn from them."""
    unlabelled: str | None = setting(
        None, 'a CSV, a folder, or the name of a split; rows without any label join it', metavar='SOURCE')
    labelled_rows: int | None = setting(
        None,
        'what would fewer labels do? Use those of N rows, drawn by --seed; the others join the unlabelled images, '
        'where batches have some, and are else left out',
        positive, metavar='N')
    unlabelled_batch_size: int | None = setting(
        None, 'unlabelled images a GPU and step (default: as -b; with -wlc 0: none beside -b)', positive, metavar='N')
    epoch_by: str = setting(
        'larger', 'whose images an epoch is one pass over; the others start again',
        choices=('larger', 'labelled', 'unlabelled'))
    entropy_weight: float = setting(
        0.0, "weight of the heads' mean entropy; it may collapse, see the next two", at_least_0, metavar='W')
    entropy_ramp_up: int = setting(0, 'epochs it grows over', count, metavar='N')
    marginal_entropy_weight: float = setting(
        0.0, 'weight of the reward for the entropy of the mean prediction', at_least_0, metavar='W')
    pseudo_label_weight: float = setting(
        0.0, 'weight of the loss of a strong view against the class that a weak one is taken for', at_least_0,
        metavar='W')
    pseudo_label_threshold: float = setting(0.95, 'least probability of such a class', fraction, metavar='P')


@dataclass(frozen=True)
class AugmentationSettings(Settings):
    """What makes the views of an image."""
    views: str | None = setting(
        None,
        "SimCLR's crop, flip, jitter, greyscale and blur, made fast; the same by the textbook; or timm's transforms "
        "(default: simclr with SimCLR and without --aa, else timm)",
        choices=('simclr', 'simclr-exact', 'timm'))
    weak_first_view: bool = switch(
        'make the first view of a pair a weak one (flip, slight crop), as with pseudo-labels')
    scale: list[float] | None = setting(
        None, "crop area range (default: 0.2 1; with timm's views 0.08 1)", above_0, nargs=2, metavar='X')
    ratio: list[float] = setting([3 / 4, 4 / 3], 'crop aspect range (default: 3/4 4/3)', above_0, nargs=2, metavar='X')
    hflip: float = setting(0.5, 'probability of a horizontal flip', fraction, metavar='P')
    vflip: float = setting(0.0, 'probability of a vertical flip', fraction, metavar='P')
    rotation: float = setting(0.0, 'random rotation, to either side', number(least=0, most=180), metavar='DEG')
    train_interpolation: str | None = setting(
        None, "resampling of the crop (default: bilinear, with timm's views random)",
        choices=('random', 'bilinear', 'bicubic'))
    aa: str | None = setting(None, 'auto augment policy, e.g. rand-m9-mstd0.5', metavar='POLICY')
    color_jitter: list[float] | None = setting(
        None,
        "brightness, contrast, saturation[, hue], or one number for the first three (default: 0.4 0.4 0.4 0.1; with "
        "timm's views 0.4, and off with --aa)",
        at_least_0, nargs='+', metavar='X')
    color_jitter_prob: float | None = setting(
        None, "probability of color jitter (default: 0.8; with timm's views always)", fraction, metavar='P')
    grayscale_prob: float | None = setting(
        None, "probability of greyscale (default: 0.1; with timm's views 0)", fraction, metavar='P')
    gaussian_blur_prob: float | None = setting(
        None, "probability of blur (default: 0.5; with timm's views 0)", fraction, metavar='P')
    reprob: float = setting(0.0, 'probability of random erasing', fraction, metavar='P')
    remode: str = setting('pixel', 'what erased areas hold', choices=('const', 'rand', 'pixel'))
    recount: int = setting(1, 'erased areas an image', number(int, least=1, most=100), metavar='N')
    interpolation: str | None = setting(
        None, "evaluation's resize (default: the model's own)", choices=('nearest', 'bilinear', 'bicubic', 'lanczos'))
    crop_pct: float | None = setting(None, "evaluation's center crop share", number(least=0.1, most=10), metavar='X')
    mixup: float = setting(0.0, 'mixup alpha; needs -wls 0', at_least_0, metavar='A')
    cutmix: float = setting(0.0, 'cutmix alpha; needs -wls 0', at_least_0, metavar='A')
    mixup_prob: float = setting(1.0, 'probability of mixing', fraction, metavar='P')
    mixup_switch_prob: float = setting(0.5, 'probability of cutmix where both are on', fraction, metavar='P')
    mixup_mode: str = setting(
        'batch', 'one share for the batch, each pair or each image', choices=('batch', 'pair', 'elem'))


@dataclass(frozen=True)
class OptimizerSettings(Settings):
    """timm's optimizer."""
    opt: str = setting('sgd', 'any timm optimizer', metavar='NAME')
    opt_eps: float | None = setting(None, 'epsilon', above_0, metavar='X')
    opt_betas: list[float] | None = setting(None, 'betas', number(least=0, most=0.999999), nargs='+', metavar='X')
    opt_kwargs: dict[str, Any] = setting(
        {}, 'further arguments of the optimizer', nargs='*', metavar='K=V', read=keywords)
    momentum: float = setting(0.9, 'momentum', fraction, metavar='X')
    weight_decay: float = setting(2e-5, 'weight decay', at_least_0, metavar='X')
    layer_decay: float | None = setting(
        None, "factor on the learning rate from each of the backbone's layers to the one below",
        number(above=1e-30, most=1), metavar='X')
    gradient_centralization: bool | None = switch(
        'center the updates of convolutions (default: with --opt adamp)', default=None)
    clip_grad: float | None = setting(None, 'clip gradients', above_0, metavar='X')
    clip_mode: str = setting('norm', 'how to clip them', choices=('norm', 'value', 'agc'))
    grad_accum_steps: int = setting(1, 'batches an update; NT-Xent pairs within each of them', positive, metavar='N')


@dataclass(frozen=True)
class ScheduleSettings(Settings):
    """timm's learning rate schedule; epochs."""
    sched: str = setting('cosine', 'any timm schedule, e.g. cosine, step', metavar='NAME')
    sched_on_updates: bool = switch('step it every update, not epoch')
    lr: float = setting(0.05, 'learning rate', above_0, metavar='X')
    epochs: int = setting(100, 'epochs of the schedule; those of the cooldown come after them', positive, metavar='N')
    warmup_epochs: int = setting(3, 'epochs of warm-up', count, metavar='N')
    warmup_lr: float = setting(1e-4, 'rate that warm-up starts at', at_least_0, metavar='X')
    cooldown_epochs: int | None = setting(
        None,
        'epochs at the least rate after those of --epochs, as in "100 epochs + 10 of cooldown" (default: a tenth of '
        '--epochs, 10 at most; --sched cosine, tanh, poly, wsd and rsqrt have a cooldown, the others have none)',
        count, metavar='N')
    min_lr: float = setting(1e-5, 'least rate', at_least_0, metavar='X')
    decay_epochs: float = setting(30, 'epochs between decays (step)', above_0, metavar='X')
    decay_milestones: list[int] = setting([30, 60], 'epochs of decay (multistep)', positive, nargs='+', metavar='N')
    decay_rate: float = setting(0.1, 'factor of a decay', above_0, metavar='X')
    patience_epochs: int = setting(10, 'patience (plateau)', count, metavar='N')


@dataclass(frozen=True)
class RunSettings(Settings):
    """Batches, device, run folder, what is saved and logged."""
    batch_size: int = setting(128, 'images a GPU and step', positive, flags=('-b',), metavar='N')
    micro_batch: int | None = setting(
        None,
        'images that go through the model at once, labelled and unlabelled, where a step has more: the same gradient '
        '(batch norm sees M images) in less memory, at some 4/3 of the time',
        positive, metavar='M')
    validation_batch_size: int | None = setting(
        None, 'the same in evaluation (default: as --micro-batch, else as -b)', positive, flags=('-vb',), metavar='N')
    device: str | None = shared.device('cpu, cuda, cuda:1, mps (default: cuda where there is one)')
    amp: bool = switch(
        'mixed precision', hidden_flags=('--apex-amp', '--native-amp'),
        hidden_note='--apex-amp and --native-amp are read as --amp: PyTorch has mixed precision of its own')
    amp_dtype: str | None = setting(
        None, 'its lower precision (default: float16 on CUDA, bfloat16 elsewhere)', choices=('float16', 'bfloat16'))
    seed: int = setting(42, 'makes a run repeatable', number(int, least=0, most=2 ** 31), metavar='N')
    output: str = setting('output/train', 'where run folders go', metavar='DIR')
    experiment: str | None = setting(None, 'name of the run folder (default: time-model-size)', metavar='NAME')
    resume: str | None = setting(
        None,
        "go on from a checkpoint; from the newest whole one of a run folder; or 'auto': of that of --experiment, "
        "where there is one, else start",
        metavar='FILE')
    checkpoint_steps: int | None = setting(
        None, 'save within an epoch too, every N steps (the last two are kept until its end)', positive, metavar='N')
    eval_metric: str | None = setting(
        None,
        "what makes a checkpoint the best: loss, top1, HEAD/top1, HEAD/map, ... (default: top1, or score, the mean of"
        " the heads' main metrics, where a head has tags or numbers)",
        metavar='NAME')
    checkpoint_hist: int = setting(10, 'checkpoints kept', positive, metavar='N')
    log_interval: int = setting(50, 'steps between metrics', positive, metavar='N')
    log_tensorboard: bool = switch(
        "write the metrics for TensorBoard too, into the run folder (needs the extra 'tensorboard')")
    log_wandb: bool = switch(
        "tell the metrics to Weights & Biases (needs the extra 'wandb'; WANDB_MODE=offline keeps them in the run "
        "folder)")
    epoch_steps: int | None = setting(
        None, 'steps of an epoch (default: one pass over the images)', positive, flags=('--limit-steps',), metavar='N')


@dataclass(frozen=True)
class Phase:
    """A phase of a recipe: a set of overrides, and the settings that come of them.

    Args:
        name: What it is called.
        given: What its mapping in the recipe sets, by name, as it stands there.
        settings: All of its settings; it is a run without phases.
    """
    name: str
    given: Mapping[str, Any]
    settings: TrainSettings


@dataclass(frozen=True)
class TrainSettings(Settings):
    """Train a timm backbone on several labels at once, together with SimCLR and with images that have no label."""
    HELP = 'train a backbone on the labels of a CSV, together with SimCLR'
    EXAMPLE = 'my-photos --model convnext_tiny --pretrained -b 64 --opt adamw --lr 5e-4 --amp'
    PAGE = 'how-to/own-labels.md'

    config: str | None = setting(
        None, 'YAML file that sets any of the flags below, or a recipe of phases', flags=('-c',), metavar='FILE')
    data: DataSettings = group('data', DataSettings)
    backbone: ModelSettings = group('model', ModelSettings)
    objective: ObjectiveSettings = group('objective', ObjectiveSettings)
    pool: UnlabelledSettings = group('unlabelled images', UnlabelledSettings)
    augmentation: AugmentationSettings = group('views and augmentation', AugmentationSettings)
    optimizer: OptimizerSettings = group('optimizer', OptimizerSettings)
    schedule: ScheduleSettings = group('learning rate schedule', ScheduleSettings)
    run: RunSettings = group('run', RunSettings)
    phases: tuple[Phase, ...] = field(default=(), kw_only=True)
    notes: frozenset[str] = field(default=frozenset(), kw_only=True, compare=False)
