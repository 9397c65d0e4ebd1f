"""From settings to the views that training makes of an image."""
from collections.abc import Sequence
from typing import Any, TypedDict

from timm.data import Mixup

from timm_multilabel.config.train import AugmentationSettings, TrainSettings
from timm_multilabel.errors import SettingError
from timm_multilabel.views.opencv import OpenCVViews
from timm_multilabel.views.pillow import PillowViews, Transform, exact_transform, timm_transform
from timm_multilabel.views.recipe import ViewRecipe, weak_recipe
from timm_multilabel.views.told import Told

PhotoViews = OpenCVViews | PillowViews
"""What makes the views of images."""

SIMCLR_SCALE, SIMCLR_JITTER, SIMCLR_GRAYSCALE_PROB = [0.2, 1.0], [0.4, 0.4, 0.4, 0.1], 0.1
"""What `--views simclr` has unless flags say otherwise: half of what SimCLR's own recipe does to colors, which at full
strength takes them from the heads (experiments/views)."""


class _Placing(TypedDict):
    """What all recipes share: where and how a view lies in its image."""
    size: tuple[int, int]
    hflip: float
    vflip: float
    interpolation: str


def which_views(settings: TrainSettings) -> str:
    """The recipe of training views: the one asked for, else SimCLR's where SimCLR is on and no policy of timm's is."""
    views = settings.augmentation
    return views.views or ('simclr' if settings.objective.simclr_loss_weight and not views.aa else 'timm')


def weak_first(settings: TrainSettings) -> bool:
    """Whether the first view of a pair is a weak one."""
    return bool(settings.augmentation.weak_first_view or settings.pool.pseudo_label_weight)


def view_recipe(views: AugmentationSettings, data_config: dict[str, Any]) -> ViewRecipe:
    """SimCLR's recipe at half its strength, with what the flags say otherwise."""
    jitter = views.color_jitter or SIMCLR_JITTER
    brightness, contrast, saturation, *hue = 3 * jitter if len(jitter) == 1 else jitter
    return ViewRecipe(
        **_placing(views, data_config, 'bilinear'),
        scale=_pair(views.scale or SIMCLR_SCALE),
        ratio=_pair(views.ratio),
        rotation=views.rotation,
        jitter=(brightness, contrast, saturation, hue[0] if hue else 0.0),
        jitter_prob=_chosen(views.color_jitter_prob, ViewRecipe.jitter_prob),
        grayscale_prob=_chosen(views.grayscale_prob, SIMCLR_GRAYSCALE_PROB),
        blur_prob=_chosen(views.gaussian_blur_prob, ViewRecipe.blur_prob),
    )


def _pair(numbers: Sequence[float]) -> tuple[float, float]:
    least, most = numbers
    return least, most


def _chosen(wish: float | None, usual: float) -> float:
    return usual if wish is None else wish


def _placing(views: AugmentationSettings, data_config: dict[str, Any], interpolation: str) -> _Placing:
    height, width = data_config['input_size'][-2:]
    return {
        'size': (height, width),
        'hflip': views.hflip,
        'vflip': views.vflip,
        'interpolation': views.train_interpolation or interpolation,
    }


def train_views(
        settings: TrainSettings,
        data_config: dict[str, Any],
        count: int,
        weak_first: bool = False,
        told: Told = Told(),  # noqa: B008 (frozen)
) -> PhotoViews:
    """What makes the training views of an image.

    Args:
        settings: Of the run, or of a phase.
        data_config: timm's: size of the input, normalisation.
        count: Views of an image.
        weak_first: Of two, the first is FixMatch's weak one.
        told: What training is told of each view.
    """
    kind, views, weak_first = which_views(settings), settings.augmentation, weak_first and count == 2
    weak = weak_recipe(**_placing(views, data_config, 'random' if kind == 'timm' else 'bilinear'))
    if kind == 'simclr':
        strong = view_recipe(views, data_config)
        return OpenCVViews([weak if weak_first else strong] + [strong] * (count - 1), told)
    transform = (_timm_transform(views, data_config) if kind == 'timm' else
                 exact_transform(view_recipe(views, data_config)))
    if kind == 'timm':
        jitter = views.color_jitter_prob != 0 and any(views.color_jitter or [1])
        plain = not (views.aa or jitter or views.grayscale_prob)
    else:
        plain = view_recipe(views, data_config).plain_share == 1
    return PillowViews(
        [exact_transform(weak) if weak_first else transform] + [transform] * (count - 1), weak.size,
        told=told, plain=[weak_first or plain] + [plain] * (count - 1))


def _timm_transform(views: AugmentationSettings, data_config: dict[str, Any]) -> Transform:
    jitter = views.color_jitter or [0.4]
    try:
        return timm_transform(
            **_placing(views, data_config, 'random'),
            scale=views.scale or [0.08, 1.0],
            ratio=views.ratio,
            rotation=views.rotation,
            color_jitter=jitter[0] if len(jitter) == 1 else tuple(jitter),
            color_jitter_prob=views.color_jitter_prob,
            grayscale_prob=views.grayscale_prob or 0.0,
            gaussian_blur_prob=views.gaussian_blur_prob or 0.0,
            auto_augment=views.aa,
            mean=tuple(data_config['mean']),
        )
    except (AssertionError, ValueError, KeyError) as error:
        if not views.aa:
            raise
        raise SettingError(f'--aa {views.aa}: timm knows no such policy') from error


def make_mixup(views: AugmentationSettings, classes: int) -> Mixup:
    """timm's mixing of pictures and labels; `classes` are those of all heads."""
    return Mixup(
        mixup_alpha=views.mixup,
        cutmix_alpha=views.cutmix,
        prob=views.mixup_prob,
        switch_prob=views.mixup_switch_prob,
        mode=views.mixup_mode,
        label_smoothing=0.0,  # the heads' losses smooth
        num_classes=classes,
        multi_label=True,  # targets are one-hot rows of all heads
    )
