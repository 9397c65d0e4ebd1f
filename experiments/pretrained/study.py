"""What a pretrained start brings with 250, 1,000 and 32,000 labels: probe, fine-tuning, LoRA, and students of them.

    python experiments/pretrained/study.py DIR OUTPUT --weights WEIGHTS --workers 2
    python experiments/pretrained/study.py DIR OUTPUT --table

DIR holds the fashion photos, WEIGHTS lite0.safetensors and lite2.safetensors (see ../fork-table-small/weights.py).
Each run is a process with one thread. What OUTPUT/results has is not run again.
"""
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from studies import Places, Run, Study, checkpoint_of  # noqa: E402

POOL = 8_000  # photos, drawn from those whose labels are not used
WHOLE = {'input_size': (3, 96, 72), 'crop_pct': 1}  # the photos are 60 wide and 80 high
COMMON = {
    'simclr_loss_weight': 0, 'classification_loss_weight': 1, 'workers': 0, 'cache': 'disk', 'channels_last': True,
    'validation_batch_size': 250, 'batch_size': 32, 'opt': 'adamw', 'weight_decay': 0.05, 'sched_on_updates': True,
    'warmup_epochs': 0, 'cooldown_epochs': 0, 'epochs': 1, 'checkpoint_hist': 1, 'views': 'simclr',
    'ratio': (0.6, 0.9), 'gaussian_blur_prob': 0, 'grayscale_prob': 0, 'color_jitter': 0}
LITE0 = {'model': 'tf_efficientnet_lite0', 'lr': 5e-4, 'scale': (0.5, 1), 'epoch_steps': 500, **WHOLE}
SMALL = {'model': 'mobilenetv3_small_050', 'lr': 5e-3, 'input_size': (3, 64, 48), 'crop_pct': 1, 'epoch_steps': 1200}

ARMS: dict[str, tuple[str, dict[str, Any]]] = {  # the arm that must have run before, and the settings
    'probe-lite0': ('', {'model': ('tf_efficientnet_lite0',)}),
    'probe-lite2': ('', {'model': ('tf_efficientnet_lite2',)}),
    'probe-both': ('', {'model': ('tf_efficientnet_lite0', 'tf_efficientnet_lite2')}),
    'fine-tuned': ('', LITE0),
    'lora': ('', {**LITE0, 'lora': 8, 'lr': 2e-3}),
    'from-probe': ('probe-lite0', {**LITE0, 'lr': 1e-4}),
    'small': ('', SMALL),
    'small-long': ('', {**SMALL, 'epoch_steps': 3600}),  # as many labelled photos as small-student has photos
    'small-student': ('fine-tuned', {**SMALL, 'unlabelled': 'unlabelled', 'unlabelled_batch_size': 64}),
    'lite0-student': ('fine-tuned', {**LITE0, 'unlabelled': 'unlabelled', 'unlabelled_batch_size': 32}),
}
SHORT = ('probe-lite0', 'fine-tuned', 'small', 'small-student')
RUNS = [
    *((arm, labels, 0) for arm in (*SHORT, 'lora', 'probe-lite2', 'probe-both') for labels in (1000, 250)),
    *((arm, labels, seed) for seed in (1, 2) for arm in SHORT for labels in (1000, 250)),
    *((arm, labels, seed) for arm in ('probe-lite2', 'probe-both') for seed in (1, 2) for labels in (1000, 250)),
    *(('lite0-student', labels, 0) for labels in (1000, 250)),
    *(('small-long', labels, seed) for seed in (0, 1, 2) for labels in (1000, 250)),
    *((arm, 32_000, 0) for arm in ('probe-lite0', 'fine-tuned')),
    *((arm, labels, seed) for arm in ('lite0-student', 'lora') for seed in (1, 2) for labels in (1000, 250)),
    *((arm, 32_000, 0) for arm in ('lora', 'probe-lite2', 'probe-both')),
    *(('from-probe', labels, seed) for seed in (0, 1, 2) for labels in (1000, 250)),
]
"""Arm, labels and seed, the most telling first."""


def needs(run: Run) -> Sequence[Run]:
    arm, labels, seed = run
    return [(ARMS[arm][0], labels, seed)] if ARMS[arm][0] else []


def train(run: Run, places: Places, where: dict[str, Any]) -> Any:
    import timm_multilabel as tm

    arm, labels, seed = run
    settings = dict(ARMS[arm][1])
    data = places.folder(labels, seed, POOL)
    if arm.startswith('probe'):
        models = settings.pop('model')
        weights = [places.weights / f'{each.removeprefix("tf_efficientnet_")}.safetensors' for each in models]
        return tm.probe(data, models, pretrained_path=weights, workers=0, **WHOLE, **settings, **where)
    for before in needs(run):
        settings['teacher' if arm.endswith('student') else 'initial_checkpoint'] = checkpoint_of(places, before)
    if settings['model'] == LITE0['model'] and 'initial_checkpoint' not in settings:
        settings['pretrained_path'] = places.weights / 'lite0.safetensors'
    return tm.train(data, **COMMON | settings, **where)


if __name__ == '__main__':
    Study(__file__, tuple(ARMS), RUNS, needs, train).main()
