"""How fast a joint step is, beside the bare backbone and beside the way the fork took its steps.

`python -m benchmarks.step --help`. Everything is measured in turns in one process, on one batch that is on the device
already, without a data pipeline. Ratios are of samples of one round, so slow changes of the machine's load drop out.

On a CPU, glibc maps tensors of more than 32 MiB anew each time and two small passes may beat one large one; see what
is left of that with `MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184` before the command.

Variants:
    bare: forward and backward of the backbone alone on both views of all photos; 'bare again' shows the noise.
    joint: what `training/trainer.py` does in a step, without the optimizer: `JointTask`, backward, `TrainingMeter`.
    fork's way: a backbone pass for each view, heads on the first, NT-Xent over masks of the full similarity matrix,
        every loss and accuracy read back in every step. A model of the fork's step, not its code.
    joint + AdamP, AdamP alone: with our AdamP (centralized, as by default) and with timm's.

`--heads 3 40 200` measures whole steps of training with AdamW instead, by the number of softmax heads of 8 classes.
"""
import os
import platform
import re
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

import timm
import torch
import torch.nn.functional as F
from timm.optim import AdamP
from timm.utils import random_seed

from benchmarks.program import count, positive, run_benchmark
from timm_multilabel.assembly.device import choose_precision, start_device
from timm_multilabel.cli.parser import Parser
from timm_multilabel.labels import MISSING, LabelSpace
from timm_multilabel.metrics import TrainingMeter
from timm_multilabel.model import MultiLabelModel, create_backbone
from timm_multilabel.optim import create_optimizer
from timm_multilabel.task import JointTask
from timm_multilabel.training.optimizer_step import OptimizerStep
from timm_multilabel.training.trainer import Precision
from timm_multilabel.training.update_decisions import UpdateDecisions

HEADS = {'gender': 5, 'type': 140, 'colour': 47}
MISSING_SHARE = 0.1
GOAL = 0.95
FORK, TOGETHER, ALONE = "fork's way", 'joint + AdamP', 'AdamP alone'


class Steps:
    """The steps that are compared, all with the same weights on the same batch.

    Args:
        args: Those of `add_flags`: model, img_size and photos.
        precision: The device, and the precision of its computations.
        heads: The heads by name, with their numbers of classes.
    """

    def __init__(self, args: Namespace, precision: Precision, heads: Mapping[str, int] = MappingProxyType(HEADS)):
        device, self.precision = precision.device, precision
        label_space = LabelSpace.from_columns({name: map(str, range(size)) for name, size in heads.items()})
        backbone = create_backbone(args.model, input_size={'img_size': args.img_size, 'input_size': None})
        layout = torch.channels_last if precision.channels_last else torch.preserve_format
        model = MultiLabelModel(backbone, label_space).to(device=device, memory_format=layout)
        self.task = JointTask(model, device=device)
        self.task.train()
        self.meter = TrainingMeter(self.task.terms, self.task.heads, device)
        self.images = torch.randn(2 * args.photos, 3, args.img_size, args.img_size, device=device)
        # The joint step lays the loader's images out by itself; the bare backbone need not.
        self.laid_out = precision.layout(self.images)
        target = torch.stack([torch.randint(size, (args.photos,)) for size in label_space.sizes], dim=1)
        target[torch.rand(target.shape) < MISSING_SHARE] = MISSING
        self.target = target.repeat(2, 1).to(device)

    def bare(self) -> None:
        backbone = self.task.trainable_module.model.backbone
        with self.precision.autocast():
            loss = backbone(self.laid_out).sum()
        loss.backward()
        backbone.zero_grad(set_to_none=True)

    def joint(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        with self.precision.autocast():
            result = self.task(self.precision.layout(self.images), self.target)
        result['loss'].backward()
        if optimizer is not None:
            optimizer.step()
        self.task.trainable_module.zero_grad(set_to_none=True)
        self.meter.update(result)

    def forks_way(self) -> None:
        model, projector = self.task.trainable_module.model, self.task.trainable_module.projector
        target = self.target.chunk(2)[0].unbind(1)
        with self.precision.autocast():
            first, second = (model.backbone(view) for view in self.precision.layout(self.images).chunk(2))
            logits = model.forward_heads(first).values()
            simclr = 0.5 * naive_nt_xent(projector(first), projector(second))
            losses = [
                F.cross_entropy(output, column, ignore_index=MISSING, label_smoothing=0.1)
                for output, column in zip(logits, target, strict=True)
            ]
            classification = 0.5 * torch.stack(losses).mean()
            loss = simclr + classification
        loss.backward()
        self.task.trainable_module.zero_grad(set_to_none=True)
        for value in (loss, simclr, classification, *losses):
            value.item()
        for output, column in zip(logits, target, strict=True):
            (output.argmax(dim=1) == column).float().mean().item()

    def with_adamw(self) -> Callable[[], None]:
        """A step of training with its update, as `training/optimizer_step.py` does it."""
        update = OptimizerStep(self.task, create_optimizer(self.task, 'adamw', lr=1e-9, join_heads=True))
        decisions = UpdateDecisions(self.precision.device)

        def step() -> None:
            update.begin()
            with self.precision.autocast():
                result = self.task(self.precision.layout(self.images), self.target)
            update.backward(result['loss'], True, decisions, step=0, stop=False)
            decisions.verdicts()
            self.meter.update(result)

        return step

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Our AdamP and timm's on the same parameters; they hardly move them."""
        ours = create_optimizer(self.task, 'adamp', lr=1e-9, weight_decay=0.01)
        groups = [{'params': group['params'], 'weight_decay': group['weight_decay']} for group in ours.param_groups]
        return {'ours': ours, 'timm': AdamP(groups, lr=1e-9)}

    def variants(self) -> dict[str, Callable[[], None]]:
        module = self.task.trainable_module
        self.task(self.laid_out, self.target)['loss'].backward()
        gradients = {p: p.grad for p in module.parameters()}
        module.zero_grad(set_to_none=True)
        variants = {'bare': self.bare, 'bare again': self.bare, 'joint': self.joint, FORK: self.forks_way}
        for name, optimizer in self.optimizers().items():
            variants[f'{TOGETHER}, {name}'] = partial(self.joint, optimizer)
            variants[f'{ALONE}, {name}'] = partial(optimizer_step, optimizer, gradients)
        return variants


def naive_nt_xent(first: torch.Tensor, second: torch.Tensor, temperature: float = 0.5) -> torch.Tensor:
    """NT-Xent as it is mostly written: masks of the full similarity matrix, positives and negatives picked out."""
    n = len(first)
    z = F.normalize(torch.cat([first, second]).float(), dim=1)
    similarity = z @ z.T / temperature
    positive = torch.cat([similarity.diag(n), similarity.diag(-n)])[:, None]
    mask = torch.ones(2 * n, 2 * n, dtype=torch.bool, device=z.device)
    for offset in (0, n, -n):
        mask.diagonal(offset).fill_(False)
    logits = torch.cat([positive, similarity[mask].reshape(2 * n, -1)], dim=1)
    return F.cross_entropy(logits, torch.zeros(2 * n, dtype=torch.long, device=z.device))


def optimizer_step(optimizer: torch.optim.Optimizer, gradients: dict[torch.nn.Parameter, torch.Tensor]) -> None:
    for p, gradient in gradients.items():
        p.grad = gradient
    optimizer.step()
    for p in gradients:
        p.grad = None


def seconds(step: Callable[[], None], steps: int, device: torch.device) -> float:
    """Seconds a step, of several in a row: the host may run ahead of the device between them, as in training."""
    wait = torch.cuda.synchronize if device.type == 'cuda' else (lambda: None)
    wait()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    return (time.perf_counter() - started) / steps


def measure(variants: dict[str, Callable[[], None]], args: Namespace, device: torch.device) -> dict[str, list[float]]:
    """Seconds a step by variant and round; each round starts with another variant, so that none has the best place."""
    times = {name: [] for name in variants}
    names = list(variants)
    for index in range(-args.warmup, args.rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            taken = seconds(variants[name], args.steps, device)
            if index >= 0:
                times[name].append(taken)
    return times


def ratios(times: dict[str, list[float]], name: str, other: str) -> list[float]:
    """How many times as fast as another a variant is: the quartiles over rounds."""
    of_rounds = [b / a for a, b in zip(times[name], times[other], strict=True)]
    return statistics.quantiles(of_rounds, n=4, method='inclusive') if len(of_rounds) > 1 else 3 * of_rounds


def machine(device: torch.device) -> str:
    info = Path('/proc/cpuinfo')
    found = re.search(r'model name\s*: (.*)', info.read_text()) if info.exists() else None
    gpu = f'{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}; ' if device.type == 'cuda' else ''
    load = f', load {os.getloadavg()[0]:.1f}' if hasattr(os, 'getloadavg') else ''
    return (f'{found[1] if found else platform.processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads'
            f'{load}; {gpu}torch {torch.__version__}, timm {timm.__version__}')


def by_heads(args: Namespace, precision: Precision) -> dict[str, dict[str, float]]:
    """By number of heads, from the first of `args.heads`: 'ms' a step, and its ratio to the first."""
    variants = {f'{count} heads': Steps(args, precision, {f'head_{n}': 8 for n in range(count)}).with_adamw()
                for count in args.heads}
    times = measure(variants, args, precision.device)
    first = next(iter(variants))
    ratio = f'times_{first.replace(" ", "_")}'
    return {name: {'ms': 1000 * statistics.median(values), ratio: ratios(times, first, name)[1]}
            for name, values in times.items()}


def report(times: dict[str, list[float]], photos: int) -> None:
    """Print the table and the ratios that matter."""
    print(f'{"variant":<24}{"ms/step":>10}{"photos/s":>10}{"inputs/s":>10}   speed / bare (quartiles)')
    for name, values in times.items():
        median = statistics.median(values)
        line = f'{name:<24}{1000 * median:>10.2f}'
        if not name.startswith(ALONE):
            low, middle, high = ratios(times, name, 'bare')
            line += f'{photos / median:>10.1f}{2 * photos / median:>10.1f}   {middle:.3f} ({low:.3f} to {high:.3f})'
        print(line)
    print(f'joint / bare = {ratios(times, "joint", "bare")[1]:.2f} (goal {GOAL} or better)')
    print(f"joint / fork's way = {ratios(times, 'joint', FORK)[1]:.2f}")
    for what in (TOGETHER, ALONE):
        low, middle, high = ratios(times, f'{what}, ours', f'{what}, timm')
        print(f'{what}, speed of ours / timm = {middle:.2f} ({low:.2f} to {high:.2f})')


def add_flags(parser: Parser) -> None:
    parser.add_argument('--model', default='efficientnet_b0', help='a timm model')
    parser.add_argument('--img-size', type=positive, default=224, metavar='N', help='height and width of the images')
    parser.add_argument('--photos', type=positive, default=64, metavar='N', help='photos a step, of two views each')
    parser.add_argument('--device', help='device (default: CUDA where there is one)')
    parser.add_argument('--amp', action='store_true', help='mixed precision')
    parser.add_argument('--amp-dtype', choices=('float16', 'bfloat16'), help='its dtype, as in training')
    parser.add_argument('--channels-last', action='store_true', help='channels-last memory layout')
    parser.add_argument('--heads', type=positive, nargs='+', metavar='N',
                        help='compare steps by number of heads instead')
    parser.add_argument('--rounds', type=positive, default=10, metavar='N', help='samples of each variant')
    parser.add_argument('--warmup', type=count, default=2, metavar='N', help='rounds before them')
    parser.add_argument('--steps', type=positive, metavar='N', help='steps a sample (default: 20 on CUDA, else 1)')


def run(args: Namespace) -> None:
    """Measure, and print the table."""
    device = start_device(args.device)
    precision = choose_precision(device, args.amp, args.amp_dtype, args.channels_last)
    args.steps = args.steps or (20 if device.type == 'cuda' else 1)
    random_seed(0, 0)
    print(machine(device))
    print(f'{args.model}, {args.photos} photos a step ({2 * args.photos} backbone inputs) of {args.img_size} pixels, '
          f'{device}, {str(precision.amp_dtype or torch.float32).removeprefix("torch.")}, '
          f'{"channels-last" if args.channels_last else "contiguous"}, '
          f'heads {args.heads or list(HEADS.values())}, '
          f'{args.rounds} rounds x {args.steps} steps after {args.warmup} to warm up', flush=True)
    if args.heads:
        for name, metrics in by_heads(args, precision).items():
            ms, ratio = metrics.values()
            print(f'{name:<12}{ms:>10.2f} ms/step {ratio:>8.2f} times {args.heads[0]} heads')
    else:
        report(measure(Steps(args, precision).variants(), args, device), args.photos)


if __name__ == '__main__':
    run_benchmark(sys.modules[__name__], sys.argv[1:])
