"""From settings to the views that training makes of an image."""
from collections.abc import Callable
from typing import Any

from timm.data import Mixup

from timm_multilabel.config.train import AugmentationSettings, TrainSettings
from timm_multilabel.errors import UserError
from timm_multilabel.loading.batches import Views
from timm_multilabel.views.opencv import OpenCVViews
from timm_multilabel.views.pillow import PillowViews, exact_transform, timm_transform
from timm_multilabel.views.recipe import ViewRecipe, weak_recipe

SIMCLR_VIEWS = {'scale': (0.2, 1.0), 'jitter': (0.4, 0.4, 0.4, 0.1), 'grayscale_prob': 0.1}
"""What `--views simclr` has unless flags say otherwise: half of what SimCLR's own recipe does to colors, which at full
strength takes them from the heads (experiments/views)."""


def which_views(settings: TrainSettings) -> str:
    """The recipe of training views: the one asked for, else SimCLR's where SimCLR is on and no policy of timm's is."""
    views = settings.augmentation
    return views.views or ('simclr' if settings.objective.simclr_loss_weight and not views.aa else 'timm')


def weak_first(settings: TrainSettings) -> bool:
    """Whether the first view of a pair is a weak one."""
    return bool(settings.augmentation.weak_first_view or settings.pool.pseudo_label_weight)


def view_recipe(views: AugmentationSettings, data_config: dict[str, Any]) -> ViewRecipe:
    """SimCLR's recipe at half its strength, with what the flags say otherwise."""
    jitter = views.color_jitter
    wishes = {
        'scale': views.scale and tuple(views.scale),
        'jitter': jitter and tuple((3 * jitter if len(jitter) == 1 else jitter) + [0.0])[:4],
        'jitter_prob': views.color_jitter_prob,
        'grayscale_prob': views.grayscale_prob,
        'blur_prob': views.gaussian_blur_prob,
    }
    return ViewRecipe(
        **_placing(views, data_config, 'bilinear'),
        ratio=tuple(views.ratio),
        rotation=views.rotation,
        **{**SIMCLR_VIEWS, **{name: wish for name, wish in wishes.items() if wish is not None}},
    )


def _placing(views: AugmentationSettings, data_config: dict[str, Any], interpolation: str) -> dict[str, Any]:
    return {
        'size': tuple(data_config['input_size'][-2:]),
        'hflip': views.hflip,
        'vflip': views.vflip,
        'interpolation': views.train_interpolation or interpolation,
    }


def train_views(settings: TrainSettings, data_config: dict[str, Any], count: int, weak_first: bool = False) -> Views:
    """What makes the training views of an image.

    Args:
        settings: Of the run, or of a phase.
        data_config: timm's: size of the input, normalisation.
        count: Views of an image.
        weak_first: Of two, the first is FixMatch's weak one.
    """
    kind, views, weak_first = which_views(settings), settings.augmentation, weak_first and count == 2
    weak = weak_recipe(**_placing(views, data_config, 'random' if kind == 'timm' else 'bilinear'))
    if kind == 'simclr':
        strong = view_recipe(views, data_config)
        return OpenCVViews([weak if weak_first else strong] + [strong] * (count - 1))
    strong = (_timm_transform(views, data_config) if kind == 'timm' else
              exact_transform(view_recipe(views, data_config)))
    return PillowViews([exact_transform(weak) if weak_first else strong] + [strong] * (count - 1), weak.size)


def _timm_transform(views: AugmentationSettings, data_config: dict[str, Any]) -> Callable[[Any], Any]:
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
        raise UserError(f'--aa {views.aa}: timm knows no such policy') from error


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
