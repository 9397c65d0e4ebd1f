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
from timm_multilabel.model_names import LARGEST_PROJECTION, LARGEST_SIDE, MOST_PROJECTOR_LAYERS

side = number(int, least=1, most=LARGEST_SIDE)


@dataclass(frozen=True)
class DataSettings(Settings):
    """Where images and labels come from."""
    data_dir: str = required(
        'data directory with train.csv, val.csv and optionally all.csv, or its address (s3://...)', positional=True,
        metavar='DIR')
    image_column: str = shared.image_column('column with the image paths', 'image_path')
    image_root: str | None = shared.image_root()
    class_head: str = shared.class_head()
    train_split: str = setting('train', 'training split: a name such as train, or the path of a table', metavar='NAME')
    val_split: str = setting('val', 'validation split: a name such as val, or the path of a table', metavar='NAME')
    separator: str | None = shared.cell_separator(
        'cell separator: a character, tab, or whitespace for runs of blanks (default: detected)')
    missing_value: str | None = shared.missing_value(
        'cell text that means a missing label, in addition to an empty cell')
    tag_separator: str | None = shared.tags_between('|')
    none_value: str | None = shared.no_tags()
    heads: list[str] | None = shared.heads('label columns to learn (default: all)')
    head: HeadOptions = shared.head(
        'options of a head: loss=softmax|arcface|tags|numeric, weight, input=features|projection, drop, smoothing, '
        'class_weights=balanced, scale, margin, columns=a+b (one 0/1 column per tag), views=plain (learn from views '
        'without color changes only)')
    head_module: str | None = shared.head_module()
    allow_hub: bool = shared.allow_hub()
    unknown_labels: str = setting(
        'error',
        'validation labels that are unknown in training, and classes in which a teacher differs from the data: stop '
        'with an error, or treat them as missing',
        choices=('error', 'ignore'))
    skip_bad_images: bool = switch(
        'skip and report images that cannot be decoded (otherwise the first one stops the run)')
    cache: str | None = setting(
        None,
        'cache decoded images, if they fit: in RAM or on disk (with a local copy of remote images), shared by all '
        'processes of a machine; or on the device, which then also makes the views',
        choices=('ram', 'disk', 'device'))
    cache_dir: str = setting(
        '~/.cache/timm-multilabel',
        'folder for --cache disk, for the predictions of --teacher, and for run folders whose --output is an address',
        metavar='DIR')
    workers: int = shared.workers('data loader workers per GPU')


@dataclass(frozen=True)
class ModelSettings(Settings):
    """The backbone, its initial weights, and how it runs."""
    model: str = setting('efficientnet_b0', 'name of any timm model', metavar='NAME')
    pretrained: bool = switch("start from timm's pretrained weights")
    pretrained_path: str | None = setting(
        None, 'start from a local timm checkpoint or safetensors file', metavar='FILE')
    initial_checkpoint: str | None = setting(
        None, 'start from the matching weights of a timm-multilabel checkpoint', metavar='FILE')
    start_from: str | None = setting(
        None, "in a phase of a recipe: the earlier phase whose final weights it starts from, or 'initial' for the "
        'initial weights (default: the phase before it)', metavar='PHASE')
    img_size: int | None = setting(
        None, "image height and width in pixels (default: the model's own)", side, metavar='N')
    input_size: list[int] | None = setting(None, 'input size as 3 HEIGHT WIDTH, in pixels', side, nargs=3, metavar='N')
    mean: list[float] | None = setting(
        None, 'normalization mean, one for all channels or one per channel', number(least=-1e4, most=1e4), nargs='+',
        metavar='X')
    std: list[float] | None = setting(
        None, 'normalization standard deviation, one for all channels or one per channel', number(least=1e-4, most=1e4),
        nargs='+', metavar='X')
    drop: float = setting(0.0, 'dropout rate of the heads', fraction, metavar='P')
    drop_path: float | None = setting(
        None, 'stochastic depth rate of the backbone', fraction, flags=('--drop-connect',), metavar='P')
    model_kwargs: dict[str, Any] = setting(
        {}, 'extra arguments for the model', nargs='*', metavar='K=V', read=keywords)
    freeze_backbone: bool = switch('train only the heads; batch norm statistics are frozen too; needs -wls 0')
    lora: int | None = setting(
        None,
        'train the heads, and in the frozen backbone adapters of this rank on linear layers and convolutions (LoRA; '
        "needs the extra 'lora')",
        number(int, least=1, most=1024), metavar='RANK')
    grad_checkpointing: bool = switch('recompute activations in the backward pass to save memory')
    channels_last: bool = switch('use the channels-last memory layout')
    torchcompile: str | None = setting(
        None, 'compile the model with torch.compile', nargs='?', const='inductor', metavar='BACKEND')
    sync_bn: bool = switch('synchronize batch norm across GPUs')
    model_ema: bool | None = switch(
        'keep an exponential moving average (EMA) of the weights (default: only with --pseudo-label-weight)',
        default=None)
    model_ema_decay: float = setting(0.9998, 'decay of the EMA', fraction, metavar='P')
    model_ema_warmup: bool | None = switch(
        'warm up the EMA decay (default: only with --pseudo-label-weight, or if there are fewer updates than the EMA '
        'averages: 1 / (1 - decay))',
        default=None)


@dataclass(frozen=True)
class ObjectiveSettings(Settings):
    """`wls * NT-Xent + wlc * weighted sum of the heads' losses`."""
    simclr_loss_weight: float = setting(
        0.5, 'weight of the NT-Xent loss; 0 turns SimCLR off (then one view per image, or two with pseudo-labels)',
        at_least_0, flags=('-wls',),
        metavar='W')
    classification_loss_weight: float = setting(
        0.5, "weight of the heads' losses; 0 trains with SimCLR only", at_least_0, flags=('-wlc',), metavar='W')
    temperature: float = setting(0.5, 'temperature of NT-Xent', above_0, flags=('-t',), metavar='T')
    projection_dim: int = setting(
        64, 'dimension of the projections', number(int, least=1, most=LARGEST_PROJECTION), metavar='N')
    projector_layers: int = setting(
        2, 'layers of the projector', number(int, least=1, most=MOST_PROJECTOR_LAYERS), metavar='N')
    projector_width: int | None = setting(
        None, "width of the projector's hidden layers (default: that of the features)",
        number(int, least=1, most=LARGEST_PROJECTION), metavar='N')
    condition_projector: bool = switch(
        "tell the projector each view's crop, flip, jitter, grayscale and blur (CASSLE), so that the features need not "
        'lose what these change; with --views simclr')
    smoothing: float = setting(0.1, 'label smoothing factor', fraction, metavar='P')
    head_weights: dict[str, float] | None = setting(
        None, 'loss weight of each head (default: 1 / number of heads)', nargs='+', metavar='HEAD=W', read=assignments)
    classify_views: str = setting('both', "views used for the heads' losses", choices=('both', 'first'))


@dataclass(frozen=True)
class UnlabelledSettings(Settings):
    """The unlabelled images, and the terms of the objective that learn from them."""
    unlabelled: str | None = setting(
        None,
        'unlabelled images: a table, a folder, shards, or the name of a split; training rows without any label are '
        'added, but not to shards',
        metavar='SOURCE')
    labelled_rows: int | None = setting(
        None,
        'use the labels of only N rows, drawn with --seed, to see the effect of fewer labels; the other rows join the '
        'unlabelled images if batches have any in tables or folders, and are left out otherwise',
        positive, metavar='N')
    unlabelled_batch_size: int | None = setting(
        None,
        'unlabelled images per batch and GPU (default: the same as -b; with pseudo-labels and -wls 0: 7 times -b, or '
        'all that there are; with -wlc 0: none in addition to -b)',
        positive, metavar='N')
    epoch_by: str = setting(
        'larger', 'the set of images that one epoch passes over once; the other set starts over when it runs out',
        choices=('larger', 'labelled', 'unlabelled'))
    entropy_weight: float = setting(
        0.0, "weight of the heads' mean entropy; the next two flags help prevent collapse", at_least_0, metavar='W')
    entropy_ramp_up: int = setting(0, 'epochs over which both entropy weights ramp up from 0', count, metavar='N')
    marginal_entropy_weight: float = setting(
        0.0, 'weight of the reward for a high entropy of the mean prediction', at_least_0, metavar='W')
    pseudo_label_weight: float = setting(
        0.0, 'weight of the pseudo-label loss: the strong view learns what is predicted on the weak view', at_least_0,
        metavar='W')
    pseudo_label_ramp_up: float | None = setting(
        None,
        'epochs over which that weight ramps up from 0, step by step (default: half of --epochs; 0 with '
        '--pseudo-label-reference none)',
        at_least_0, metavar='N')
    pseudo_label_threshold: float = setting(
        0.95, 'minimum probability for a prediction to become a pseudo-label, as a share of the reference', fraction,
        metavar='P')
    pseudo_label_reference: str = setting(
        'labelled',
        "reference of that threshold, for each head: the mean highest probability on the batch's labelled images "
        '(labelled), or 1 (none)',
        choices=('labelled', 'none'))
    pseudo_label_alignment: bool = switch(
        'before the threshold, align the mean prediction on unlabelled images with that on labelled ones', default=True)


@dataclass(frozen=True)
class TeacherSettings(Settings):
    """Checkpoints that the heads learn from."""
    teacher: list[str] | None = setting(
        None,
        'also learn what these checkpoints predict (their mean), on labelled and unlabelled images; in a recipe, the '
        'name of an earlier phase stands for its best checkpoint',
        nargs='+', metavar='CHECKPOINT')
    teacher_weight: float = setting(1.0, "weight of the loss against the teachers' predictions", above_0, metavar='W')
    teacher_temperature: float = setting(
        1.0, 'temperature of that loss: more than 1 gives unlikely classes more weight', above_0, metavar='T')
    teacher_views: bool = switch(
        'ask the teachers in every step, for each view (otherwise once before training, for each image)')
    teacher_features: str | None = setting(
        None,
        'also learn the pooled features of this timm model, which stays as it is, for each view of labelled and '
        'unlabelled images; with -wls 0 -wlc 0 nothing else is learnt',
        metavar='NAME')
    teacher_features_path: str | None = setting(
        None, "weights of that model, a local timm checkpoint or safetensors file (default: timm's pretrained ones)",
        metavar='FILE')
    teacher_features_weight: float = setting(1.0, 'weight of the loss against its features', above_0, metavar='W')


@dataclass(frozen=True)
class AugmentationSettings(Settings):
    """What makes the views of an image."""
    views: str | None = setting(
        None,
        "SimCLR's crop, flip, jitter, grayscale and blur, fast (simclr) or exact (simclr-exact), or timm's transforms "
        "(default: simclr with SimCLR and without --aa, else timm)",
        choices=('simclr', 'simclr-exact', 'timm'))
    weak_first_view: bool | None = switch(
        'use a weak first view in each pair (flip and slight crop); with pseudo-labels, unlabelled images always have '
        'one (default: only with --pseudo-label-weight)',
        default=None)
    scale: list[float] | None = setting(
        None,
        "range of the crop area, as fractions of the image (default: 0.2 1; with timm's views 0.08 1, or 0.8 1 with "
        'the default --aa of pseudo-labels)',
        above_0, nargs=2, metavar='X')
    ratio: list[float] = setting(
        [3 / 4, 4 / 3], 'range of the crop aspect ratio (default: 3/4 4/3)', above_0, nargs=2, metavar='X')
    hflip: float = setting(0.5, 'probability of a horizontal flip', fraction, metavar='P')
    vflip: float = setting(0.0, 'probability of a vertical flip', fraction, metavar='P')
    rotation: float = setting(
        0.0, 'maximum random rotation in either direction, in degrees', number(least=0, most=180), metavar='DEG')
    train_interpolation: str | None = setting(
        None, "interpolation of training crops (default: bilinear; with timm's views random)",
        choices=('random', 'bilinear', 'bicubic'))
    aa: str | None = setting(
        None,
        'auto-augmentation policy of timm, e.g. rand-m9-mstd0.5 (default: none; with pseudo-labels and -wls 0 '
        'rand-m10-n2-mstd101-inc1, unless --views or --color-jitter is given)',
        metavar='POLICY')
    color_jitter: list[float] | None = setting(
        None,
        "strength of brightness, contrast, saturation[, hue], or one number for the first three (default: 0.4 0.4 0.4 "
        "0.1; with timm's views 0.4, and off with --aa)",
        at_least_0, nargs='+', metavar='X')
    color_jitter_prob: float | None = setting(
        None, "probability of color jitter (default: 0.8; with timm's views always)", fraction, metavar='P')
    grayscale_prob: float | None = setting(
        None, "probability of grayscale (default: 0.1; with timm's views 0)", fraction, metavar='P')
    gaussian_blur_prob: float | None = setting(
        None, "probability of blur (default: 0.5; with timm's views 0)", fraction, metavar='P')
    reprob: float | None = setting(
        None, 'probability of random erasing (default: 0; 0.5 with the default --aa of pseudo-labels)', fraction,
        metavar='P')
    remode: str = setting(
        'pixel', 'fill of erased areas: constant, random color, or random pixels', choices=('const', 'rand', 'pixel'))
    recount: int = setting(1, 'erased areas per image', number(int, least=1, most=100), metavar='N')
    interpolation: str | None = setting(
        None, "interpolation of the resize in evaluation (default: the model's own)",
        choices=('nearest', 'bilinear', 'bicubic', 'lanczos'))
    crop_pct: float | None = setting(
        None, "share of height and width that evaluation keeps of the resized image (default: the model's own)",
        number(least=0.1, most=10), metavar='X')
    crop_mode: str | None = setting(
        None,
        'what evaluation sees of an image of another shape than the input: its middle (center), all of it in another '
        'aspect ratio (squash), or all of it with borders (border); with --crop-pct 1 nothing else is cut off '
        "(default: the model's own, mostly center)",
        choices=('center', 'squash', 'border'))
    mixup: float = setting(0.0, 'mixup alpha; needs -wls 0', at_least_0, metavar='A')
    cutmix: float = setting(0.0, 'cutmix alpha; needs -wls 0', at_least_0, metavar='A')
    mixup_prob: float = setting(1.0, 'probability of mixing when mixup or cutmix is on', fraction, metavar='P')
    mixup_switch_prob: float = setting(
        0.5, 'probability of cutmix instead of mixup when both are on', fraction, metavar='P')
    mixup_mode: str = setting(
        'batch', 'draw one mixing ratio per batch, per pair or per image', choices=('batch', 'pair', 'elem'))


@dataclass(frozen=True)
class OptimizerSettings(Settings):
    """timm's optimizer."""
    opt: str = setting('sgd', 'name of any timm optimizer', metavar='NAME')
    opt_eps: float | None = setting(None, "epsilon (default: the optimizer's own)", above_0, metavar='X')
    opt_betas: list[float] | None = setting(
        None, "betas (default: the optimizer's own)", number(least=0, most=0.999999), nargs='+', metavar='X')
    opt_kwargs: dict[str, Any] = setting(
        {}, 'extra arguments for the optimizer', nargs='*', metavar='K=V', read=keywords)
    momentum: float = setting(0.9, 'momentum', fraction, metavar='X')
    weight_decay: float = setting(2e-5, 'weight decay', at_least_0, metavar='X')
    layer_decay: float | None = setting(
        None, 'layer-wise learning rate decay: factor from each backbone layer to the one below',
        number(above=1e-30, most=1), metavar='X')
    gradient_centralization: bool | None = switch(
        'centralize the updates of convolution weights (default: only with --opt adamp)', default=None)
    clip_grad: float | None = setting(None, 'gradient clipping threshold (default: no clipping)', above_0, metavar='X')
    clip_mode: str = setting('norm', 'gradient clipping mode', choices=('norm', 'value', 'agc'))
    grad_accum_steps: int = setting(
        1, 'batches per optimizer update; NT-Xent contrasts images within each batch only', positive, metavar='N')


@dataclass(frozen=True)
class ScheduleSettings(Settings):
    """timm's learning rate schedule, in epochs."""
    sched: str = setting('cosine', 'name of any timm schedule, e.g. cosine or step', metavar='NAME')
    sched_on_updates: bool = switch('advance the schedule after every update instead of every epoch')
    lr: float = setting(0.05, 'learning rate', above_0, metavar='X')
    epochs: int = setting(100, 'epochs of the schedule; cooldown epochs are added after them', positive, metavar='N')
    warmup_epochs: int = setting(3, 'warmup epochs, counted within --epochs', count, metavar='N')
    warmup_lr: float = setting(1e-4, 'learning rate at the start of warmup', at_least_0, metavar='X')
    cooldown_epochs: int | None = setting(
        None,
        'epochs at the minimum learning rate after --epochs, as in "100 epochs + 10 of cooldown" (default: a tenth of '
        '--epochs, at most 10; only --sched cosine, tanh, poly, wsd and rsqrt have a cooldown)',
        count, metavar='N')
    min_lr: float = setting(1e-5, 'minimum learning rate', at_least_0, metavar='X')
    decay_epochs: float = setting(
        30, 'epochs between decays (step), or of the final decay (wsd, rsqrt)', above_0, metavar='X')
    decay_milestones: list[int] = setting(
        [30, 60], 'epochs at which the learning rate decays (multistep)', positive, nargs='+', metavar='N')
    decay_rate: float = setting(
        0.1, 'factor of each decay (step, multistep, plateau); the power with poly', above_0, metavar='X')
    patience_epochs: int = setting(10, 'epochs without improvement before a decay (plateau)', count, metavar='N')


@dataclass(frozen=True)
class RunSettings(Settings):
    """Batches, device, run folder, what is saved and logged."""
    batch_size: int = setting(128, 'images per batch and GPU', positive, flags=('-b',), metavar='N')
    micro_batch: int | None = setting(
        None,
        'process larger batches in pieces of at most M images, labelled and unlabelled together: the same gradient '
        '(but batch norm sees M images) with less memory, in about 4/3 of the time',
        positive, metavar='M')
    validation_batch_size: int | None = setting(
        None, 'images per batch and GPU in evaluation (default: --micro-batch if given, else -b)', positive,
        flags=('-vb',), metavar='N')
    device: str | None = shared.device('cpu, cuda, cuda:1, mps (default: cuda if available)')
    amp: bool = switch(
        'train with mixed precision', hidden_flags=('--apex-amp', '--native-amp'),
        hidden_note='--apex-amp and --native-amp are read as --amp: PyTorch has mixed precision of its own')
    amp_dtype: str | None = setting(
        None, 'data type for --amp (default: float16 on CUDA, bfloat16 elsewhere)', choices=('float16', 'bfloat16'))
    seed: int = setting(42, 'random seed, for repeatable runs', number(int, least=0, most=2 ** 31), metavar='N')
    output: str = setting('output/train', 'parent folder of run folders, or its address (s3://...)', metavar='DIR')
    experiment: str | None = setting(None, 'name of the run folder (default: time-model-size)', metavar='NAME')
    resume: str | None = setting(
        None,
        "resume from a checkpoint, or from the newest intact one in a run folder; 'auto' takes the run folder of "
        "--experiment, or starts a new run if there is none",
        metavar='FILE')
    checkpoint_steps: int | None = setting(
        None, 'also save within an epoch, every N steps (the last two are kept until the epoch ends)', positive,
        metavar='N')
    eval_metric: str | None = setting(
        None,
        "metric that ranks checkpoints: loss, top1, HEAD/top1, HEAD/map, ... (default: top1; if any head predicts tags "
        "or numbers: score, the mean of the heads' main metrics)",
        metavar='NAME')
    checkpoint_hist: int = setting(10, 'number of best checkpoints to keep', positive, metavar='N')
    log_interval: int = setting(50, 'steps between reports of training metrics', positive, metavar='N')
    log_tensorboard: bool = switch(
        "also log metrics for TensorBoard in the run folder (needs the extra 'tensorboard')")
    log_wandb: bool = switch(
        "also log metrics to Weights & Biases (needs the extra 'wandb'; WANDB_MODE=offline keeps them in the run "
        "folder)")
    epoch_steps: int | None = setting(
        None, 'steps per epoch (default: one pass over the images)', positive, flags=('--limit-steps',), metavar='N')


@dataclass(frozen=True)
class Phase:
    """A phase of a recipe: a set of overrides, and the settings that come of them.

    Args:
        name: What it is called.
        given: What its mapping in the recipe sets, by name, as it stands there.
        settings: All of its settings; it is a run without phases.
        chosen: Of these, what no flag says and pseudo-labels want, by name.
    """
    name: str
    given: Mapping[str, Any]
    settings: TrainSettings
    chosen: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainSettings(Settings):
    """Train a timm backbone on several labels at once, together with SimCLR and unlabelled images."""
    HELP = 'train a backbone on the labels of a CSV, together with SimCLR'
    EXAMPLE = 'my-photos --model convnext_tiny --pretrained -b 64 --opt adamw --lr 5e-4 --amp'
    PAGE = 'how-to/own-labels.md'

    config: str | None = setting(
        None, 'YAML file that sets any of the flags below, or a recipe with training phases', flags=('-c',),
        metavar='FILE')
    data: DataSettings = group('data', DataSettings)
    backbone: ModelSettings = group('model', ModelSettings)
    objective: ObjectiveSettings = group('objective', ObjectiveSettings)
    pool: UnlabelledSettings = group('unlabelled images', UnlabelledSettings)
    teaching: TeacherSettings = group('teachers', TeacherSettings)
    augmentation: AugmentationSettings = group('views and augmentation', AugmentationSettings)
    optimizer: OptimizerSettings = group('optimizer', OptimizerSettings)
    schedule: ScheduleSettings = group('learning rate schedule', ScheduleSettings)
    run: RunSettings = group('run', RunSettings)
    phases: tuple[Phase, ...] = field(default=(), kw_only=True)
    notes: frozenset[str] = field(default=frozenset(), kw_only=True, compare=False)
