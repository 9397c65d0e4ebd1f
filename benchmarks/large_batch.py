"""A step of SimCLR with batches larger than the memory, beside the whole batch at once with anybody's loss.

`python -m benchmarks.large_batch --help`. Needs `pip install '.[bench]'` and, on a CPU, Linux. Each case has a process
of its own; the processes take turns, so ratios are of one run. A step is both views of N images through backbone and
projector, NT-Xent, and the backward pass, without optimizer. Memory is what it takes beyond model and images.

Cases:
    a piece: a batch of M images, as many as N is taken in pieces of.
    pieces: `JointTask(micro_batch=M)` on N images: what `--micro-batch M -b N` does.
    whole: `JointTask` on N images at once; dense, lightly, pml: backbone and projector at once, with their NT-Xent.
"""
import sys
from argparse import Namespace
from collections.abc import Callable

import torch

from benchmarks.nt_xent import loss_function
from benchmarks.processes import MEBIBYTE, Figures, measure
from benchmarks.program import positive, run_benchmark
from benchmarks.step import machine
from timm_multilabel.cli.parser import Parser
from timm_multilabel.labels import LabelSpace
from timm_multilabel.model import MultiLabelModel, create_backbone
from timm_multilabel.task import JointTask

TEMPERATURE = 0.5
OTHERS = ('whole', 'dense', 'lightly', 'pml')


def make(name: str, model: str, size: int, n: int, micro_batch: int, device: str,
         small: bool = False) -> Callable[[], None]:
    """A step of a case."""
    torch.manual_seed(0)
    n = micro_batch if name == 'a piece' else min(n, 2 * micro_batch) if small else n
    backbone = create_backbone(model, input_size={'img_size': size, 'input_size': None})
    task = JointTask(
        MultiLabelModel(backbone, LabelSpace(())),
        simclr_weight=1,
        classification_weight=0,
        temperature=TEMPERATURE,
        projection_dim=128,
        micro_batch=micro_batch if name == 'pieces' else None,
        device=torch.device(device),
    ).to(device).train()
    images, target = torch.randn(2 * n, 3, size, size, device=device), torch.zeros(2 * n, 0, device=device)
    loss = None if name in ('a piece', 'pieces', 'whole') else loss_function(name, TEMPERATURE)

    def step() -> None:
        if loss is None:
            task(images, target)['loss'].backward()
        else:
            loss(*task.trainable_module(images)[1].chunk(2)).backward()
        task.zero_grad()

    return step


def row(n: int, figures: dict[str, Figures], micro_batch: int) -> str:
    """A line of the table."""
    ours, piece = figures['pieces'], figures['a piece']
    if ours.skipped or piece.skipped:
        return f'| {n:,} | {ours.skipped or piece.skipped} |'
    per_image = ours.times_as_long_as(piece) * micro_batch / n
    cells = [f'{1000 * ours.median / n:.3g}', f'{ours.peak / MEBIBYTE:.0f}',
             f'{per_image:.2f}, {ours.peak / piece.peak:.2f}']
    for name in OTHERS:
        other = figures[name]
        cells.append(other.skipped or f'{ours.times_as_long_as(other):.2f}, {ours.peak / other.peak:.3f}')
    return '| ' + ' | '.join([f'{n:,}', *cells]) + ' |'


def add_flags(parser: Parser) -> None:
    parser.add_argument('--sizes', type=positive, nargs='+', default=[128, 512, 2048], metavar='N',
                        help='images in a batch')
    parser.add_argument('--micro-batch', type=positive, default=32, metavar='M', help='images of a piece')
    parser.add_argument('--model', default='efficientnet_b0', help='a timm model')
    parser.add_argument('--img-size', type=positive, default=64, metavar='N', help='height and width of the images')
    parser.add_argument('--rounds', type=positive, default=3, metavar='N', help='samples of each case')
    parser.add_argument('--threads', type=positive, metavar='N', help="threads of the CPU (default: torch's)")
    parser.add_argument('--device', choices=('cpu', 'cuda'), help='device (default: CUDA where there is one)')


def run(args: Namespace) -> None:
    """Measure, and print the table."""
    device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    print(machine(torch.device(device)))
    print(f'{args.model}, two views of N images of {args.img_size} pixels in pieces of M = {args.micro_batch}, '
          f'float32; medians of {args.rounds} rounds')
    print('Pieces beside others: how many times as long (beside a piece: an image), and how many times the memory.\n')
    beside = ' | '.join(f'beside {name}' for name in ('a piece', *OTHERS))
    print(f'| N | pieces, ms an image | pieces, MiB | {beside} |')
    print('| --- ' * (4 + len(OTHERS)) + '|', flush=True)
    for n in args.sizes:
        cases = {
            name: (make, (name, args.model, args.img_size, n, args.micro_batch, device))
            for name in ('pieces', 'a piece', *OTHERS)}
        print(row(n, measure(cases, args.rounds, device, args.threads), args.micro_batch), flush=True)


if __name__ == '__main__':
    run_benchmark(sys.modules[__name__], sys.argv[1:])
