"""How much of a training step is spent waiting for data, by the number of loader processes.

`python -m benchmarks.train --help`. Every epoch goes through `training.trainer.Trainer.train`, twice in turns: with the
loader, and with one of its batches again and again, which waits for nothing. The share that waits is what the second
saves of the first. Photos are drawn, or taken from `--photos DIR`, and lie in files.
"""
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.program import count, positive, run_benchmark
from benchmarks.step import HEADS, machine
from benchmarks.views import read_photos
from timm_multilabel.assembly.checks import check_phases
from timm_multilabel.assembly.device import loader_workers, start_device
from timm_multilabel.assembly.loaders import create_loaders
from timm_multilabel.assembly.phases import BuiltPhase, build_phase, prepare_phase
from timm_multilabel.cli.parser import Parser, parse
from timm_multilabel.config.files import build
from timm_multilabel.config.train import TrainSettings
from timm_multilabel.log import silent
from timm_multilabel.training.progress_bar import ProgressBar
from timm_multilabel.training.trainer import Trainer
from timm_multilabel.training.training_progress import TrainingProgress

GOAL = 0.05


class OneBatch:
    """A batch again and again.

    Args:
        loader: Whose first batch it is.
    """

    def __init__(self, loader: Any):
        self.steps, self.batch = len(loader), next(iter(loader))

    def __len__(self) -> int:
        return self.steps

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """An epoch is like the other."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in range(self.steps):
            yield self.batch


def write_photos(folder: Path, args: Namespace) -> None:
    """A data directory: photos, and labels that mean nothing."""
    (folder / 'images').mkdir()
    photos = read_photos(args.photos, min(args.count, 256), *args.photo_size)
    lines = ['image_path,' + ','.join(HEADS)]
    for number in range(args.count):
        name = f'images/{number}.jpg'
        (folder / name).write_bytes(photos[number % len(photos)])
        lines.append(name + ''.join(f',{number % size}' for size in HEADS.values()))
    for split in ('train', 'val'):
        (folder / f'{split}.csv').write_text('\n'.join(lines) + '\n')


def seconds(built: BuiltPhase, loader: Any, device: torch.device) -> float:
    """Seconds of an epoch."""
    started = time.perf_counter()
    prepared = built.prepared
    trainer = Trainer(
        built.optimizer_step, prepared.precision, loader, None, prepared.images_per_step, seed=0,
        log_interval=len(loader))
    with ProgressBar('', len(loader), visible=False) as progress:
        trainer.train(TrainingProgress(0), 0.0, progress)
    if device.type == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - started


def shares(args: Namespace, folder: str, device: torch.device) -> Iterator[tuple[int, float, float]]:
    """For each number of loader processes: their number, the seconds of a step, the share of it that waits.

    Args:
        args: Those of `add_flags`.
        folder: A data directory.
        device: Where it trains.
    """
    settings = build(TrainSettings, parse(TrainSettings, 'train.py', training_flags(args, folder, device)))
    prepared = prepare_phase(check_phases(settings)[0], None, device, silent)
    built = build_phase(prepared, None, None, silent, {}, {}, rehearsal=True)
    for asked in args.workers:
        train = create_loaders(
            settings.replace(workers=asked), prepared.data, built.data_config, built.task.views, device, print).train
        seconds(built, train, device)  # starts the processes
        one = OneBatch(train)
        pairs = [(seconds(built, train, device), seconds(built, one, device)) for _ in range(args.rounds)]
        share = statistics.median(1 - idle / real for real, idle in pairs)
        yield loader_workers(asked), statistics.median(real for real, _ in pairs) / len(train), share
        del train, one


def training_flags(args: Namespace, folder: str, device: torch.device) -> list[str]:
    """The command line of a training."""
    flags = [folder, '--model', args.model, '--img-size', str(args.img_size), '-b', str(args.batch_size), '--views',
             args.views, '--device', str(device)]
    if args.amp_dtype != 'float32':
        flags += ['--amp', '--amp-dtype', args.amp_dtype, '--channels-last']
    if args.cache == 'disk':
        flags += ['--cache-dir', f'{folder}/cache']
    for name in ('aa', 'cache'):
        flags += [f'--{name}', getattr(args, name)] if getattr(args, name) else []
    return flags


def measure(args: Namespace, folder: str, device: torch.device) -> None:
    """Print the table."""
    found = []
    for workers, taken, share in shares(args, folder, device):
        if not found:
            print(f'{"loader processes":<18}{"images/s":>10}{"ms a step":>11}{"waiting":>9}')
        print(f'{workers:<18}{args.batch_size / taken:>10.0f}{1000 * taken:>11.1f}{share:>8.1%}', flush=True)
        found.append((workers, share))
    enough = next((workers for workers, share in found if share < GOAL), None)
    which = 'none of these' if enough is None else f'{enough} loader process{"es" * (enough != 1)}'
    print(f'under {GOAL:.0%} of a step is spent waiting with {which}, {args.model} on {device}')


def add_flags(parser: Parser) -> None:
    parser.add_argument('--model', default='efficientnet_b0', help='a timm model')
    parser.add_argument('--img-size', type=positive, default=224, metavar='N', help='height and width of the views')
    parser.add_argument('-b', '--batch-size', type=positive, default=128, metavar='N', help='photos a step')
    parser.add_argument('--photos', metavar='DIR', help='take photos of this folder (default: drawn ones)')
    parser.add_argument('--photo-size', type=positive, nargs=2, default=[700, 500], metavar='N', help='height, width')
    parser.add_argument('--count', type=positive, default=4096, metavar='N', help='photos')
    parser.add_argument('--workers', type=count, nargs='+', default=[1, 2, 4, 8, 16], metavar='N',
                        help='loader processes to try; no more than the machine has cores are started')
    parser.add_argument('--views', choices=('simclr', 'simclr-exact', 'timm'), default='simclr', help="as training's")
    parser.add_argument('--aa', metavar='POLICY', help="as training's; with --views timm")
    parser.add_argument('--cache', choices=('ram', 'disk', 'device'), help="as training's")
    parser.add_argument('--amp-dtype', choices=('float16', 'bfloat16', 'float32'),
                        help='precision (default: bfloat16 on CUDA, else float32)')
    parser.add_argument('--device', help='device (default: CUDA where there is one)')
    parser.add_argument('--rounds', type=positive, default=3, metavar='N', help='epochs of each kind')


def run(args: Namespace) -> None:
    """Measure."""
    device = start_device(args.device)
    args.amp_dtype = args.amp_dtype or ('bfloat16' if device.type == 'cuda' else 'float32')
    print(machine(device))
    print(f'{args.model}, {args.batch_size} photos a step of {args.photo_size[1]}x{args.photo_size[0]} to '
          f'{args.img_size}, two views, {args.amp_dtype}, --views {args.views}'
          + (f', --aa {args.aa}' if args.aa else '') + (f', --cache {args.cache}' if args.cache else ''), flush=True)
    with TemporaryDirectory() as folder:
        write_photos(Path(folder), args)
        measure(args, folder, device)


if __name__ == '__main__':
    run_benchmark(sys.modules[__name__], sys.argv[1:])
