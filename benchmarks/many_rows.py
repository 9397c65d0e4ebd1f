"""Memory and speed of `embed` into parts by the number of rows.

`python -m benchmarks.many_rows --help`. A table of many rows repeats a few small photos, and a tiny model embeds them
into a folder of Parquet parts, before and after a table of few rows. Speed is in images for each second of CPU time,
over all threads and loader processes, so that it is that of one core and other programs do not count.
"""
import os
import resource
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import timm_multilabel as tm
from benchmarks.program import count, positive, run_benchmark
from benchmarks.step import machine
from timm_multilabel.cli.parser import Parser

_PHOTOS = 16


def write_photos(folder: Path, size: int) -> list[str]:
    """A few photos of noise and a table that trains a model on them; their paths."""
    (folder / 'images').mkdir()
    generator = np.random.default_rng(0)
    paths = [f'images/{number}.jpg' for number in range(_PHOTOS)]
    for path in paths:
        Image.fromarray(generator.integers(0, 256, (size, size, 3), np.uint8)).save(folder / path)
    for split in ('train', 'val'):
        lines = [f'{path},{("red", "blue")[number % 2]}' for number, path in enumerate(paths)]
        (folder / f'{split}.csv').write_text('\n'.join(['image_path,color', *lines]) + '\n')
    return paths


def write_rows(path: Path, photos: Sequence[str], rows: int) -> Path:
    """A table that repeats photos."""
    with open(path, 'w') as file:
        file.write('image_path\n')
        file.writelines(f'{photos[number % len(photos)]}\n' for number in range(rows))
    return path


def cpu_seconds() -> float:
    """Of this process and of its loader processes that have ended."""
    return sum(os.times()[:4])


def embed_rows(args: Namespace, folder: Path, checkpoint: Path, table: Path, rows: int) -> float:
    """Images for each second of CPU time."""
    before = cpu_seconds()
    made = tm.embed(checkpoint, table, f'{folder / "parts"}/', force=True, batch_size=args.batch_size,
                    workers=args.workers, part_rows=args.part_rows, device='cpu')
    assert made.count == rows
    return rows / (cpu_seconds() - before)


def add_flags(parser: Parser) -> None:
    parser.add_argument('--rows', type=positive, default=200_000, metavar='N', help='rows of the large table')
    parser.add_argument('--few', type=positive, default=10_000, metavar='N', help='rows of the small table')
    parser.add_argument('--model', default='test_resnet', metavar='NAME', help='timm model')
    parser.add_argument('--size', type=positive, default=32, metavar='N', help='image size in pixels')
    parser.add_argument('-b', '--batch-size', type=positive, default=128, metavar='N', help='images per batch')
    parser.add_argument('-j', '--workers', type=count, default=0, metavar='N', help='loader processes')
    parser.add_argument('--part-rows', type=positive, default=4096, metavar='N', help='images of a part')
    parser.add_argument('--threads', type=positive, default=1, metavar='N', help='threads (default: 1)')


def run(args: Namespace) -> None:
    """Measure, and print the speeds, their ratio and the memory."""
    torch.set_num_threads(args.threads)
    print(machine(torch.device('cpu')), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photos = write_photos(folder, args.size)
        checkpoint = tm.train(
            folder, model=args.model, img_size=args.size, simclr_loss_weight=0, batch_size=8, epochs=1, workers=0,
            device='cpu', warmup_epochs=0, cooldown_epochs=0, output=folder / 'runs').last_checkpoint
        few, many = (write_rows(folder / f'{rows}.csv', photos, rows) for rows in (args.few, args.rows))
        embed_rows(args, folder, checkpoint, few, args.few)  # to warm up
        speeds = [embed_rows(args, folder, checkpoint, few, args.few)]
        small = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        speed = embed_rows(args, folder, checkpoint, many, args.rows)
        large = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        speeds.append(embed_rows(args, folder, checkpoint, few, args.few))
    print('\n| rows | images a second and core | peak memory of the main process |\n| --- | --- | --- |')
    print(f'| {args.few:,} | {speeds[0]:.0f} before, {speeds[1]:.0f} after | {small / 2 ** 20:.2f} GiB |')
    print(f'| {args.rows:,} | {speed:.0f} | {large / 2 ** 20:.2f} GiB |')
    print(f'\n{args.rows:,} rows: {2 * speed / sum(speeds):.2f} times the speed of {args.few:,}')


if __name__ == '__main__':
    run_benchmark(sys.modules[__name__], sys.argv[1:])
