"""What a pretrained start brings with 250, 1,000 and 32,000 labels: probe, fine-tuning, LoRA, and students of them.

    python experiments/pretrained/study.py DIR OUTPUT --weights WEIGHTS --workers 2
    python experiments/pretrained/study.py DIR OUTPUT --table

DIR holds the fashion photos, WEIGHTS lite0.safetensors and lite2.safetensors (see ../fork-table-small/weights.py).
Each run is a process with one thread. What OUTPUT/results has is not run again.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

POOL = 8_000  # photos, drawn from those whose labels are not used
WHOLE = {'input_size': (3, 96, 72), 'crop_pct': 1}  # the photos are 60 wide and 80 high
COMMON = {
    'simclr_loss_weight': 0, 'classification_loss_weight': 1, 'workers': 0, 'cache': 'disk', 'channels_last': True,
    'validation_batch_size': 250, 'batch_size': 32, 'opt': 'adamw', 'weight_decay': 0.05, 'sched_on_updates': True,
    'warmup_epochs': 0, 'cooldown_epochs': 0, 'epochs': 1, 'checkpoint_hist': 1, 'views': 'simclr',
    'ratio': (0.6, 0.9), 'gaussian_blur_prob': 0, 'grayscale_prob': 0, 'color_jitter': 0}
LITE0 = {'model': 'tf_efficientnet_lite0', 'lr': 5e-4, 'scale': (0.5, 1), 'epoch_steps': 500, **WHOLE}
SMALL = {'model': 'mobilenetv3_small_050', 'lr': 5e-3, 'input_size': (3, 64, 48), 'crop_pct': 1, 'epoch_steps': 1200}

Arm = tuple[str, dict[str, Any]]
ARMS: dict[str, Arm] = {  # the arm that must have run before, and the settings
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('data', type=Path)
    parser.add_argument('output', type=Path)
    parser.add_argument('--weights', type=Path, default=Path('output'))
    parser.add_argument('--workers', type=int, default=1)
    parser.add_argument('--one', metavar='ARM-LABELS-SEED', help=argparse.SUPPRESS)
    parser.add_argument('--table', action='store_true', help='only write results.csv and results.md beside this file')
    args = parser.parse_args()
    args.data, args.output, args.weights = args.data.resolve(), args.output.resolve(), args.weights.resolve()
    if args.table:
        table(args.output)
    elif args.one:
        run(args, *parse(args.one))
    else:
        schedule(args)


def parse(name: str) -> tuple[str, int, int]:
    arm, labels, seed = name.rsplit('-', 2)
    return arm, int(labels), int(seed)


def schedule(args: argparse.Namespace) -> None:
    """Run what is missing, an arm after those that it needs."""
    waiting = [job for job in RUNS if not result(args, *job).exists()]
    running: dict[Future[int], str] = {}
    (args.output / 'results').mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.workers) as pool:
        while waiting or running:
            for job in list(waiting):
                arm, labels, seed = job
                need = ARMS[arm][0]
                if len(running) < args.workers and (not need or result(args, need, labels, seed).exists()):
                    waiting.remove(job)
                    name = f'{arm}-{labels}-{seed}'
                    running[pool.submit(process, args, name)] = name
            if not running:
                sys.exit(f'study.py: {len(waiting)} runs wait for others that failed')
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(done)
                print(f'{time.strftime("%H:%M")} {name}: {"done" if done.result() == 0 else "failed"}', flush=True)


def process(args: argparse.Namespace, name: str) -> int:
    command = [sys.executable, __file__, str(args.data), str(args.output), '--weights', str(args.weights),
               '--one', name]
    with (args.output / 'results' / f'{name}.log').open('w') as log:
        return subprocess.call(command, stdout=log, stderr=log, env={**os.environ, 'OMP_NUM_THREADS': '1'})


def result(args: argparse.Namespace, arm: str, labels: int, seed: int) -> Path:
    path: Path = args.output / 'results' / f'{arm}-{labels}-{seed}.json'
    return path


def folder_of(args: argparse.Namespace, labels: int, seed: int) -> Path:
    """A data directory with this many labelled rows, and a pool; the classes are those of all rows."""
    import numpy as np

    if labels == 32_000:
        path: Path = args.data
        return path
    folder: Path = args.output / 'data' / f'{labels}-{seed}'
    if not (folder / 'train.csv').exists():
        folder.mkdir(parents=True, exist_ok=True)
        header, *rows = (args.data / 'train.csv').read_text().splitlines(keepends=True)
        order = np.random.default_rng(seed).permutation(len(rows))
        (folder / 'all.csv').write_text(header + ''.join(rows))
        (folder / 'val.csv').write_text((args.data / 'val.csv').read_text())
        (folder / 'unlabelled.csv').write_text(
            'image_path\n' + ''.join(rows[each].split(',')[0] + '\n' for each in order[labels:labels + POOL]))
        (folder / 'train.csv').write_text(header + ''.join(rows[each] for each in order[:labels]))
    images = args.output / 'data' / 'fashion-product-images'
    if not images.exists():
        images.symlink_to(args.data / 'fashion-product-images')
    return folder


def run(args: argparse.Namespace, arm: str, labels: int, seed: int) -> None:
    """Run an arm in this process and write its metrics and its processor time."""
    import timm_multilabel as tm

    need, settings = ARMS[arm][0], dict(ARMS[arm][1])
    before = json.loads(result(args, need, labels, seed).read_text())['checkpoint'] if need else None
    where = {'seed': seed, 'experiment': f'{arm}-{labels}-{seed}', 'output': args.output / 'runs',
             'cache_dir': args.output / 'cache'}
    data = folder_of(args, labels, seed)
    started = time.perf_counter()
    if arm.startswith('probe'):
        model = settings.pop('model')
        weights = [args.weights / f'{each.removeprefix("tf_efficientnet_")}.safetensors' for each in model]
        made = tm.probe(data, model, pretrained_path=weights, workers=0, **WHOLE, **settings, **where)
    else:
        if before is not None:
            settings['teacher' if arm.endswith('student') else 'initial_checkpoint'] = before
        if settings['model'] == LITE0['model'] and 'initial_checkpoint' not in settings:
            settings['pretrained_path'] = args.weights / 'lite0.safetensors'
        made = tm.train(data, **COMMON | settings, **where)
    summary = made.summary.iloc[-1]
    usage = [resource.getrusage(each) for each in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    written = {
        'arm': arm, 'labels': labels, 'seed': seed, 'mean': summary['eval_top1'],
        **{head: summary[f'eval/{head}/top1'] for head in ('gender', 'article', 'color')},
        'cpu_minutes': sum(each.ru_utime + each.ru_stime for each in usage) / 60,
        'minutes': (time.perf_counter() - started) / 60, 'checkpoint': str(made.best_checkpoint)}
    result(args, arm, labels, seed).write_text(json.dumps(written))


def table(output: Path) -> None:
    """Write what OUTPUT/results has."""
    import pandas as pd

    read = [json.loads(each.read_text()) for each in sorted((output / 'results').glob('*.json'))]
    runs = pd.DataFrame(read).drop(columns='checkpoint')
    runs = runs.sort_values(['labels', 'arm', 'seed'], key=lambda of: of.map(list(ARMS).index) if of.name == 'arm'
                            else of)
    here = Path(__file__).parent
    runs.round(3).to_csv(here / 'results.csv', index=False)
    lines = ['| labels | arm | seeds | mean top-1 | spread | gender | article | color | CPU minutes |',
             '| --- ' * 9 + '|']
    for (labels, arm), of in runs.groupby(['labels', 'arm'], sort=False):
        heads = ' | '.join(f'{of[head].mean():.2f}' for head in ('gender', 'article', 'color'))
        spread = f'{of["mean"].min():.2f} to {of["mean"].max():.2f}' if len(of) > 1 else ''
        lines.append(f'| {labels:,} | {arm} | {len(of)} | {of["mean"].mean():.2f} | {spread} | {heads} | '
                     f'{of["cpu_minutes"].mean():.1f} |')
    (here / 'results.md').write_text('\n'.join(lines) + '\n')
    print('\n'.join(lines))


if __name__ == '__main__':
    main()
