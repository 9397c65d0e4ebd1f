"""What pseudo-labels want of the rest of a run: the settings that they choose where no flag says otherwise."""
from collections.abc import Mapping
from typing import Any

from timm_multilabel.assembly.views import which_views
from timm_multilabel.config.files import as_words
from timm_multilabel.config.train import ModelSettings, TrainSettings

RAND_AUGMENT = 'rand-m10-n2-mstd101-inc1'
"""The RandAugment of FixMatch (Sohn et al. 2020) in timm's words: two operations, each with a chance of a half and a
strength that is drawn anew."""

STRONG_VIEW = {
    'aa': RAND_AUGMENT,
    'scale': [0.8, 1.0],  # the crop of the weak view, as in FixMatch: what makes it strong is the policy
    'reprob': 0.5,  # in place of FixMatch's cutout
}
"""The strong view of FixMatch."""


def chosen_by_pseudo_labels(settings: TrainSettings) -> dict[str, Any]:
    """The settings that pseudo-labels choose, by name; flags that are given win.

    - The EMA is the teacher, as in Mean Teacher (Tarvainen and Valpola 2017): it is better than the model is, above all
      while the learning rate is high. Its decay warms up, as there, however long the run is: else the first weights
      would be most of the teacher for thousands of updates.
    - The first view of labelled images is a weak one too, as AdaMatch has it: confidence and distribution on labelled
      images are compared with those on the pool, so both are seen alike.
    - The weight ramps up over half of the epochs, as AdaMatch has it: a relative threshold lets early guesses pass.
    - The second view is FixMatch's strong one, unless views are chosen. Beside NT-Xent it stays SimCLR's, which NT-Xent
      needs (Chen et al. 2020, table 1, find AutoAugment worse) and which is a strong one as well.
    """
    views = settings.augmentation
    if not settings.pool.pseudo_label_weight:
        return {}
    wanted: dict[str, Any] = {'model_ema': True, 'weak_first_view': True}
    if settings.backbone.model_ema is not False:
        wanted['model_ema_warmup'] = True
    if settings.pool.pseudo_label_reference == 'labelled':
        wanted['pseudo_label_ramp_up'] = settings.schedule.epochs / 2
    own = views.views or views.aa or views.color_jitter or views.color_jitter_prob is not None
    if which_views(settings) == 'timm' and not own:
        wanted |= STRONG_VIEW
    now = settings.flat()
    return {name: value for name, value in wanted.items() if now[name] is None}


def as_flags(values: Mapping[str, Any]) -> str:
    """Settings as the flags that would set them."""
    known = TrainSettings.settings()
    return ' '.join(word for name, value in values.items() for word in as_words(known[name], value))


def ema_warms_up(backbone: ModelSettings, updates: int) -> bool:
    """Whether the decay of the EMA warms up: as the flag says, else where it averages more updates than there are.

    Without a warm-up the EMA of such a run would mostly hold the first weights.
    """
    if backbone.model_ema_warmup is not None:
        return backbone.model_ema_warmup
    return bool(backbone.model_ema) and updates * (1 - backbone.model_ema_decay) < 1
