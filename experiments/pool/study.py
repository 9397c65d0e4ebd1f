"""What photos without labels bring: SimCLR, self-training and pseudo-labels, against labels alone from the same start.

    python experiments/pool/study.py DIR OUTPUT --weights WEIGHTS --workers 2
    python experiments/pool/study.py DIR OUTPUT --table

DIR holds the fashion photos, WEIGHTS lite0.safetensors (see ../fork-table-small/weights.py). Seed 9 is for tuning: its
runs are scored on rows of train.csv that they do not learn from, never on val.csv.
"""
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from studies import Places, Run, Study, checkpoint_of  # noqa: E402

POOL = 16_000  # photos, drawn from those whose labels are not used
TUNING = 9  # the seed of the runs that chose the settings
COMMON: dict[str, Any] = {
    'simclr_loss_weight': 0, 'classification_loss_weight': 1, 'workers': 0, 'cache': 'disk', 'channels_last': True,
    'validation_batch_size': 250, 'batch_size': 32, 'opt': 'adamw', 'weight_decay': 0.05, 'sched_on_updates': True,
    'warmup_epochs': 0, 'cooldown_epochs': 0, 'epochs': 1, 'checkpoint_hist': 1, 'views': 'simclr',
    'input_size': (3, 64, 48), 'crop_pct': 1, 'scale': (0.4, 1), 'ratio': (0.6, 0.9), 'gaussian_blur_prob': 0,
    'grayscale_prob': 0, 'color_jitter': 0}
SCRATCH = {'model': 'resnet10t', 'amp': True, 'lr': 2e-3}
AFTER = {**SCRATCH, 'lr': 1e-3}
LITE0 = {'model': 'tf_efficientnet_lite0', 'lr': 5e-4}

SIMCLR = {
    **SCRATCH, 'simclr_loss_weight': 1, 'classification_loss_weight': 0, 'batch_size': 128, 'epochs': 8,
    'epoch_steps': 250, 'warmup_epochs': 1, 'temperature': 0.2, 'projection_dim': 128, 'projector_layers': 3,
    'projector_width': 512, 'condition_projector': True, 'scale': (0.2, 1), 'color_jitter': (0.4, 0.4, 0.4, 0.1),
    'grayscale_prob': 0.1}

ADAMATCH = {
    'pseudo_label_weight': 1, 'unlabelled': 'unlabelled', 'unlabelled_batch_size': 96, 'epochs': 5,
    'scale': (0.3, 1), 'color_jitter': (0.3, 0.3, 0.2, 0), 'reprob': 0.5}

STUDENT = {'unlabelled': 'unlabelled', 'unlabelled_batch_size': 64, 'color_jitter': (0.3, 0.3, 0.2, 0), 'reprob': 0.25}

ARMS: dict[str, dict[str, Any]] = {
    'simclr': SIMCLR,
    'r10': {**SCRATCH, 'epoch_steps': 500},
    'r10-1e-3': {**SCRATCH, 'epoch_steps': 500, 'lr': 1e-3},
    'r10-long': {**SCRATCH, 'epoch_steps': 1500},
    'r10-taught': {**SCRATCH, **STUDENT, 'epoch_steps': 500},
    'r10-ada': {**SCRATCH, **ADAMATCH, 'epoch_steps': 100},
    'after-simclr': {**AFTER, 'epoch_steps': 500},
    'after-simclr-b': {**AFTER, 'epoch_steps': 500},
    'after-simclr-c': {**AFTER, 'epoch_steps': 500},
    'after-simclr-student': {**AFTER, **STUDENT, 'epoch_steps': 500},
    'after-simclr-taught': {**AFTER, **STUDENT, 'epoch_steps': 500},
    'after-simclr-ensemble': {**AFTER, **STUDENT, 'epoch_steps': 1000},
    'after-simclr-ada': {**AFTER, **ADAMATCH, 'epoch_steps': 100},
    'lite0-96': {**LITE0, 'epoch_steps': 500, 'input_size': (3, 96, 72), 'scale': (0.5, 1)},
    'lite0': {**LITE0, 'epoch_steps': 500},
    'lite0-long': {**LITE0, 'epoch_steps': 1500},
    'lite0-ada': {**LITE0, **ADAMATCH, 'epoch_steps': 100},
}
PRETRAINED: Run = ('simclr', 32_000, 0)


def needs(run: Run) -> Sequence[Run]:
    arm, labels, seed = run
    found = [PRETRAINED] if arm.startswith('after-simclr') else []
    return [*found, *teachers(run)]


def teachers(run: Run) -> Sequence[Run]:
    """A pretrained network; three models that start differently; or three that differ by their seeds."""
    arm, labels, seed = run
    if arm.endswith('-taught'):
        return [('lite0-96', labels, seed)]
    if arm.endswith('-ensemble'):
        return [(each, labels, seed) for each in ('lite0-96', 'after-simclr', 'r10')]
    start = arm.removesuffix('-student')
    return [(start + end, labels, seed) for end in ('', '-b', '-c')] if arm != start else []


def train(run: Run, places: Places, where: dict[str, Any]) -> Any:
    import timm_multilabel as tm

    arm, labels, seed = run
    settings = dict(ARMS[arm])
    data = places.data if arm == 'simclr' else places.folder(labels, seed, POOL)
    if arm.startswith('lite0'):
        settings['pretrained_path'] = places.weights / 'lite0.safetensors'
    if arm.startswith('after-simclr'):
        settings['initial_checkpoint'] = checkpoint_of(places, PRETRAINED)
    if teachers(run):
        settings['teacher'] = [checkpoint_of(places, each) for each in teachers(run)]
    where['seed'] += {'-b': 100, '-c': 200}.get(arm[-2:], 0)
    if seed == TUNING:
        settings['val_split'] = tuning_rows(data)
    return tm.train(data, **COMMON | settings, **where)


def tuning_rows(data: Path) -> str:
    """2,000 rows of all.csv that are neither labelled nor in the pool."""
    if not (data / 'tune.csv').exists():
        header, *rows = (data / 'all.csv').read_text().splitlines(keepends=True)
        used = {line.split(',')[0].strip() for name in ('train.csv', 'unlabelled.csv')
                for line in (data / name).read_text().splitlines()}
        kept = [row for row in rows if row.split(',')[0] not in used][:2000]
        whole = data / f'tune-{os.getpid()}.part'
        whole.write_text(header + ''.join(kept))
        whole.replace(data / 'tune.csv')
    return 'tune'


RUNS = [
    ('simclr', 32_000, 0),
    *((arm, 1000, TUNING) for arm in ('r10', 'r10-1e-3', 'lite0', 'lite0-ada')),
    *((arm, labels, seed) for seed in (0, 1, 2) for arm in ('r10', 'lite0-96', 'after-simclr-taught')
      for labels in (1000, 250)),
    *((arm, labels, 0) for arm in ('after-simclr', 'r10-taught', 'r10-long', 'after-simclr-ensemble')
      for labels in (1000, 250)),
    # What has not been run yet, the most telling first.
    *((arm, labels, 0) for arm in ('after-simclr-b', 'after-simclr-c', 'after-simclr-student', 'after-simclr-ada')
      for labels in (1000, 250)),
    *((arm, labels, seed) for seed in (1, 2) for arm in ('after-simclr', 'r10-taught', 'r10-long')
      for labels in (1000, 250)),
    *((arm, labels, 0) for arm in ('lite0', 'lite0-long', 'lite0-ada', 'r10-ada') for labels in (1000, 250)),
    *((arm, 32_000, 0) for arm in ('r10', 'lite0-96', 'after-simclr-taught')),
]
"""Arm, labels and seed, the most telling first."""



if __name__ == '__main__':
    Study(__file__, tuple(ARMS), RUNS, needs, train, TUNING).main()
