"""Time and memory of NT-Xent, forward and backward, beside lightly, pytorch-metric-learning and the plain dense form.

`python -m benchmarks.nt_xent --help`. Needs `pip install '.[bench]'` and, on a CPU, Linux. Each case has a process of
its own; the processes take turns, so ratios are of one run. Memory is what a step takes beyond what was there before.

Cases:
    ours: `timm_multilabel.losses.nt_xent_loss`.
    dense: the whole similarity matrix through `cross_entropy`, in five lines.
    lightly: `lightly.loss.NTXentLoss`.
    pml: `SelfSupervisedLoss(NTXentLoss)` of pytorch-metric-learning.
    products: on CUDA, the two matrix products (2N, D) x (D, 2N) and (2N, 2N) x (2N, D) alone, tile by tile.
"""
import math
import sys
from argparse import Namespace
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.processes import MEBIBYTE, Figures, measure
from benchmarks.program import above_0, positive, run_benchmark
from benchmarks.step import machine
from timm_multilabel.cli.parser import Parser
from timm_multilabel.losses import nt_xent_loss

PEERS = ('dense', 'lightly', 'pml')
TILE = 4096


def dense_nt_xent(first: torch.Tensor, second: torch.Tensor, temperature: float) -> torch.Tensor:
    """The plain dense form."""
    z = F.normalize(torch.cat([first, second]), dim=1)
    similarity = z @ z.T / temperature
    similarity.fill_diagonal_(-math.inf)
    return F.cross_entropy(similarity, torch.arange(len(z), device=z.device).roll(len(first)))


def loss_function(name: str, temperature: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The loss of a case.

    Raises:
        ImportError: Its library is not installed.
    """
    if name == 'lightly':
        from lightly.loss import NTXentLoss
        return NTXentLoss(temperature)
    if name == 'pml':
        from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss
        return SelfSupervisedLoss(NTXentLoss(temperature))
    return {
        'ours': lambda a, b: nt_xent_loss(a, b, temperature),
        'dense': lambda a, b: dense_nt_xent(a, b, temperature),
    }[name]


def make(name: str, n: int, dim: int, temperature: float, device: str, small: bool = False) -> Callable[[], None]:
    """A step of a case: the loss and its gradient for N images."""
    n = min(n, 64) if small else n
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(n, dim, generator=generator).to(device).requires_grad_() for _ in range(2))
    if name == 'products':
        return lambda: products(torch.cat([first, second]).detach())
    loss = loss_function(name, temperature)

    def step() -> None:
        loss(first, second).backward()
        first.grad = second.grad = None

    return step


def products(z: torch.Tensor) -> torch.Tensor:
    """The two matrix products that no exact NT-Xent can do without, without keeping (2N, 2N)."""
    out = torch.zeros_like(z)
    for row in range(0, len(z), TILE):
        for column in range(0, len(z), TILE):
            out[row:row + TILE].addmm_(z[row:row + TILE] @ z[column:column + TILE].T, z[column:column + TILE])
    return out


def draw(sizes: list[int], results: dict[int, dict[str, Figures]], path: str) -> None:
    """Memory against batch size."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6.4, 4), layout='constrained')
    axes = figure.subplots()
    labels = {'ours': 'timm-multilabel', 'dense': 'plain dense', 'pml': 'pytorch-metric-learning'}
    styles = {'ours': ('#0072b2', 'o'), 'dense': ('#e69f00', 's'), 'lightly': ('#cc79a7', '^'), 'pml': ('#009e73', 'D')}
    for name, (color, marker) in styles.items():
        points = [(n, results[n][name].peak / MEBIBYTE) for n in sizes
                  if n >= 256 and not results[n][name].skipped and results[n][name].peak >= MEBIBYTE]
        if points:
            axes.plot(*zip(*points), marker=marker, color=color, label=labels.get(name, name))
    axes.set(xscale='log', yscale='log', xlabel='images in a batch (N)', ylabel='memory of NT-Xent (MiB)')
    shown = [n for n in sizes if n >= 256]
    axes.set_xticks(shown, [f'{n:,}' for n in shown])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def row(n: int, figures: dict[str, Figures], device: str) -> str:
    """A line of the table."""
    ours = figures['ours']
    if ours.skipped:
        return f'| {n:,} | {ours.skipped} |'
    cells = [f'{1000 * ours.median:.4g}', f'{ours.peak / MEBIBYTE:.0f}']
    for name in PEERS:
        peer = figures[name]
        if peer.skipped:
            cells.append(peer.skipped)
            continue
        memory = f', {peer.peak / ours.peak:.0f}' if ours.peak >= 8 * MEBIBYTE else ''  # less is noise
        cells.append(f'{peer.times_as_long_as(ours):.2f}{memory}')
    if device == 'cuda':
        products_alone = figures['products']
        cells.append(products_alone.skipped or f'{ours.times_as_long_as(products_alone):.2f}')
    return '| ' + ' | '.join([f'{n:,}', *cells]) + ' |'


def add_flags(parser: Parser) -> None:
    parser.add_argument('--sizes', type=positive, nargs='+', metavar='N', help='images in a batch',
                        default=[32, 64, 128, 256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument('--dim', type=positive, default=128, metavar='D', help='width of the projections')
    parser.add_argument('--temperature', type=above_0, default=0.5, metavar='T', help='temperature')
    parser.add_argument('--rounds', type=positive, default=5, metavar='N', help='samples of each case')
    parser.add_argument('--threads', type=positive, metavar='N', help="threads of the CPU (default: torch's)")
    parser.add_argument('--device', choices=('cpu', 'cuda'), help='device (default: CUDA where there is one)')
    parser.add_argument('--plot', metavar='FILE', help='draw memory against batch size')


def run(args: Namespace) -> None:
    """Measure, and print the table."""
    device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    names = ('ours', *PEERS, *(('products',) if device == 'cuda' else ()))
    print(machine(torch.device(device)))
    print(f'NT-Xent and its gradient, float32, D = {args.dim}, T = {args.temperature}; medians of {args.rounds} rounds')
    print('Of the others: how many times as long as ours, and how many times the memory.\n')
    print('| N | ours, ms | ours, MiB | ' + ' | '.join(PEERS) + (' | ours / products |' if device == 'cuda' else ' |'))
    print('| --- ' * (len(PEERS) + 3 + (device == 'cuda')) + '|', flush=True)
    results = {}
    for n in args.sizes:
        cases = {name: (make, (name, n, args.dim, args.temperature, device)) for name in names}
        results[n] = measure(cases, args.rounds, device, args.threads)
        print(row(n, results[n], device), flush=True)
    if args.plot:
        draw(args.sizes, results, args.plot)


if __name__ == '__main__':
    run_benchmark(sys.modules[__name__], sys.argv[1:])
