"""Heads fitted for a grid of learning rates and weight decays at once, beside scikit-learn; embedding beside timm.

`python -m benchmarks.probe --help`. Features are drawn, or those of a .npz file with `features` (N, F), `labels`
(N, H) of class indices, and `val_features` and `val_labels`. All heads are fitted for the whole grid as
`timm-multilabel probe` does it; then scikit-learn's LogisticRegression fits each head for one weight decay, on the
same standardized features with the same penalty. `--embed` measures how fast features are made, loaded images
included, beside the bare backbone on images in memory.
"""
import sys
import tempfile
import time
import warnings
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.program import above_0, positive, run_benchmark
from benchmarks.step import machine
from timm_multilabel.cli.parser import Parser
from timm_multilabel.config.commands import ProbeSettings
from timm_multilabel.heads import REGISTRY, create_head
from timm_multilabel.labels import LabelSet
from timm_multilabel.probing.fit import Grid, Labelled, default_epochs, fit_heads

Data = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Features (N, F) and labels (N, H) to fit on, and the same of val."""


class Steps:
    """Counts nothing: the time is for the fit."""

    def advance(self) -> None:
        pass


def draw(rows: int, features: int, classes: list[int], noise: float = 1.0) -> Data:
    """Features with the spectrum of a network's, whose best linear classes are right on some three rows in four."""
    generator = np.random.default_rng(0)
    total = rows + rows // 8
    basis = np.linalg.qr(generator.standard_normal((features, features)))[0]
    scale = np.arange(1, features + 1) ** -0.7
    x = (generator.standard_normal((total, features)) * scale @ basis).astype(np.float32)
    x /= x.std(axis=0)
    labels = []
    for count in classes:
        rule = generator.standard_normal((features, count)).astype(np.float32) / features ** 0.5
        logits = x @ rule * 3
        labels.append((logits + noise * generator.gumbel(size=logits.shape)).argmax(axis=1))
    y = np.stack(labels, axis=1)
    return x[:rows], y[:rows], x[rows:], y[rows:]


def read(path: str) -> Data:
    """Features and labels of a file."""
    stored = np.load(path)
    return stored['features'], stored['labels'], stored['val_features'], stored['val_labels']


def fit(data: Data, grid: Grid) -> tuple[float, list[list[dict[str, float]]]]:
    """Seconds of the fit of all heads for the whole grid, and the table of each head."""
    x, y, val_x, val_y = (torch.from_numpy(np.ascontiguousarray(part)) for part in data)
    torch.manual_seed(0)
    heads = {}
    for column in range(y.shape[1]):
        classes = tuple(map(str, range(int(max(y[:, column].max(), val_y[:, column].max())) + 1)))
        heads[str(column)] = create_head(
            LabelSet(str(column), classes), x.shape[1], {'loss': 'softmax', 'input': 'features'}, REGISTRY)
    started = time.perf_counter()
    fitted = fit_heads(heads, Labelled(x, y.float()), Labelled(val_x, val_y.float()), grid, Steps())
    return time.perf_counter() - started, [each.table for each in fitted.values()]


def fit_with_sklearn(data: Data, decay: float) -> tuple[float, list[float]]:
    """Seconds of scikit-learn's fit of each head for one weight decay, and the accuracies on val."""
    from sklearn.linear_model import LogisticRegression

    x, y, val_x, val_y = data
    started, found = time.perf_counter(), []
    mean, std = x.astype(np.float32).mean(axis=0), x.astype(np.float32).std(axis=0)
    x, val_x = ((part - mean) / np.where(std > 0, std, 1) for part in (x, val_x))
    for column in range(y.shape[1]):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of the iterations, which the table says
            model = LogisticRegression(C=1 / (decay * len(x)), max_iter=500).fit(x, y[:, column])
        found.append(100 * float((model.predict(val_x) == val_y[:, column]).mean()))
    return time.perf_counter() - started, found


def compare_embedding(name: str, size: int, images: int, workers: int) -> tuple[float, float]:
    """Images per second that a probe embeds, and that the bare backbone takes from memory, in turns; the medians."""
    import timm

    from timm_multilabel.backbones import JoinedBackbones
    from timm_multilabel.data.table import Rows
    from timm_multilabel.probing.features import Embedder
    from timm_multilabel.training.trainer import Precision
    from timm_multilabel.views.pillow import scoring_views

    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    backbone = timm.create_model(name, num_classes=0).eval()
    config = timm.data.resolve_data_config({'img_size': size}, model=backbone)
    batch = 64
    rates: tuple[list[float], list[float]] = ([], [])
    with tempfile.TemporaryDirectory() as folder:
        paths = [f'{folder}/{number}.jpg' for number in range(images)]
        for number, path in enumerate(paths):
            pixels = np.random.default_rng(number).integers(0, 255, (size // 8, size // 8, 3), np.uint8)
            Image.fromarray(pixels).resize((size, size)).save(path)
        rows = Rows(np.array(paths, object), torch.zeros(images, 1), np.zeros(images, np.int64), (Path('images'),),
                    np.zeros(images, np.int64))
        joined = JoinedBackbones([backbone], False).to(device).eval()
        memory = torch.randn(batch, 3, size, size, device=device)
        for turn in range(4):  # the first is not counted
            embedder = Embedder(
                joined, [name], config, scoring_views(config), Precision(device), Path(folder) / f'cache{turn}')
            files = embedder.files(rows)
            for file in files:
                file.create()
            started = time.perf_counter()
            embedder.embed(files, rows, np.arange(images), {
                'batch_size': batch, 'mean': config['mean'], 'std': config['std'], 'device': device,
                'workers': workers}, None, Steps())
            ours = images / (time.perf_counter() - started)
            started = time.perf_counter()
            with torch.inference_mode():
                for _ in range(images // batch):
                    made = backbone(memory)
                made.cpu()
            bare = images // batch * batch / (time.perf_counter() - started)
            if turn:
                rates[0].append(ours)
                rates[1].append(bare)
    return float(np.median(rates[0])), float(np.median(rates[1]))


def add_flags(parser: Parser) -> None:
    parser.add_argument('--features', metavar='FILE', help='features of a .npz file (default: drawn)')
    parser.add_argument('--rows', type=positive, default=32_000, metavar='N', help='rows that are drawn')
    parser.add_argument('--width', type=positive, default=1280, metavar='F', help='width of drawn features')
    parser.add_argument('--classes', type=positive, nargs='+', default=[5, 38, 83], metavar='C',
                        help='classes of each drawn head (default: 5 38 83)')
    parser.add_argument('--decays', type=above_0, nargs='*', default=[0.01], metavar='X',
                        help='weight decays that scikit-learn fits too')
    parser.add_argument('--threads', type=positive, metavar='N', help="threads (default: torch's)")
    parser.add_argument('--embed', metavar='MODEL', help='measure embedding with this timm model instead')
    parser.add_argument('--size', type=positive, default=224, metavar='N', help='image size of --embed')
    parser.add_argument('--images', type=positive, default=512, metavar='N', help='images of --embed')
    parser.add_argument('--workers', type=int, default=1, metavar='N', help='loader processes of --embed')


def run(args: Namespace) -> None:
    """Measure, and print the ratios."""
    if args.threads:
        torch.set_num_threads(args.threads)
    print(machine(torch.device('cuda' if torch.cuda.is_available() and args.embed else 'cpu')))
    if args.embed:
        ours, bare = compare_embedding(args.embed, args.size, args.images, args.workers)
        print(f'{args.embed}, {args.size} px: embedding {ours:.0f} images/s, bare backbone {bare:.0f}: '
              f'{ours / bare:.2f} times its speed')
        return
    data = read(args.features) if args.features else draw(args.rows, args.width, args.classes)
    known = ProbeSettings.settings()
    lrs = known['lrs'].default
    decays = sorted({*known['weight_decays'].default, *args.decays}, reverse=True)
    size = known['fit_batch_size'].default
    grid = Grid(lrs, decays, default_epochs(len(data[0]), size), size, 0)
    ours, tables = fit(data, grid)
    print(f'{len(data[0]):,} x {data[0].shape[1]:,} features, {len(tables)} heads, a grid of {len(grid.members)}: '
          f'{ours:.1f} s', flush=True)
    if not args.decays:
        return
    print('\n| weight decay | scikit-learn, s | times as long as the whole grid | accuracy of each head, ours | '
          'scikit-learn |\n| --- | --- | --- | --- | --- |', flush=True)
    for decay in args.decays:
        theirs, accuracies = fit_with_sklearn(data, decay)
        best = [max(row['top1'] for row in table if row['weight_decay'] == decay) for table in tables]
        print(f'| {decay:g} | {theirs:.1f} | {theirs / ours:.2f} | {" ".join(f"{each:.2f}" for each in best)} | '
              f'{" ".join(f"{each:.2f}" for each in accuracies)} |', flush=True)


if __name__ == '__main__':
    run_benchmark(sys.modules[__name__], sys.argv[1:])
