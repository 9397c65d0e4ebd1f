"""The stages of `benchmarks.gpu`: each yields the name of a case and its figures as soon as they are known.

A case that has no room or lacks a library is 'skipped', and one that fails has an 'error', each with the reason; the
others go on. What a stage needs is imported within it, so that a missing library costs no other stage.
"""
import gc
import math
import os
import re
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from benchmarks.step import Steps
    from timm_multilabel.training.trainer import Precision

ROOT = Path(__file__).parents[2]
MEBIBYTE = 2 ** 20
TEMPERATURE = 0.5
Figures = dict[str, Any]
Cases = Iterator[tuple[str, Figures]]


@dataclass(frozen=True)
class Sizes:
    """What the stages are run with.

    Args:
        device: Where they run.
        models: Backbones of the joint step.
        model: The backbone of the other stages, the first of `models`.
        size: Height and width of the images.
        photos: Photos of a step.
        n: Images of NT-Xent, the most telling number first.
        heads: Backbone and size of images for steps with many heads.
        inputs: Size of the views, height and width of the photos, and numbers of loader processes.
        count: Photos in files, at most.
        pairs: Photos of the large batch.
        pieces: Photos of a micro-batch.
        rounds: Samples of a figure.
        seconds: Of a sample, about.
        tests: Which tests, as pytest's -k; all when empty.
        data: The data directory of the fork's table; drawn photos where there is none.
    """
    device: torch.device
    models: tuple[str, ...]
    size: int
    photos: int
    n: tuple[int, ...]
    heads: tuple[tuple[str, int], ...]
    inputs: tuple[tuple[int, tuple[int, int], tuple[int, ...]], ...]
    count: int
    pairs: int
    pieces: int
    rounds: int
    seconds: float
    tests: str = ''
    data: str | None = None

    @property
    def model(self) -> str:
        return self.models[0]

    @property
    def cuda(self) -> bool:
        return self.device.type == 'cuda'

    def precision(self, amp: bool = True) -> 'Precision':
        """That of the joint step: bfloat16 and channels-last."""
        from timm_multilabel.assembly.device import choose_precision
        return choose_precision(self.device, amp, 'bfloat16' if amp else None, True)


FULL = Sizes(
    torch.device('cuda'), ('efficientnet_b0', 'convnext_tiny'), 224, 64,
    (65536, 1024, 16384, 4096, 32768, 8192, 2048), (('efficientnet_b0', 224), ('test_resnet', 32)),
    ((224, (700, 500), (12, 8, 4)), (64, (80, 60), (12, 4))), 2048, 4096, 256, 3, 0.15)
DRY = Sizes(
    torch.device('cpu'), ('test_resnet',), 32, 4, (128, 64), (('test_resnet', 32),), ((32, (60, 50), (0,)),),
    16, 16, 8, 1, 0.01, 'entropy')


def reason(error: Exception) -> Figures:
    """Why a case has no figures."""
    if isinstance(error, ImportError):
        return {'skipped': f'not installed ({error})'}
    if isinstance(error, torch.OutOfMemoryError):
        return {'skipped': 'out of memory'}
    traceback.print_exception(error)
    return {'error': f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'}


def attempt(function: Callable[..., Figures], *args: Any) -> Figures:
    """The figures of a case, or why there are none."""
    try:
        return function(*args)
    except Exception as error:  # whatever it is, the other cases are to be told too
        return reason(error)
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def wait(sizes: Sizes) -> None:
    """Until the device has done what it was told."""
    if sizes.cuda:
        torch.cuda.synchronize()


def timed(step: Callable[[], Any], sizes: Sizes) -> float:
    """Seconds of a step, the median of a few samples, after one step to warm up; none of its own waits is needed."""
    step()
    found = []
    for _ in range(sizes.rounds):
        steps, seconds = 1, 0.0
        while seconds < sizes.seconds:
            steps = steps if not seconds else math.ceil(1.2 * steps * sizes.seconds / seconds)
            wait(sizes)
            started = time.perf_counter()
            for _ in range(steps):
                step()
            wait(sizes)
            seconds = time.perf_counter() - started
        found.append(seconds / steps)
    return statistics.median(found)


def peak(step: Callable[[], Any], sizes: Sizes) -> float | None:
    """Take a step: the MiB of the device's memory that it takes beyond what was there, unknown on a CPU."""
    if not sizes.cuda:
        step()
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / MEBIBYTE


def flags_of(module: ModuleType, *words: str) -> Namespace:
    """The arguments of a benchmark."""
    from timm_multilabel.cli.parser import Parser
    parser = Parser()
    module.add_flags(parser)
    return parser.parse_args(list(words))


def tests(sizes: Sizes) -> Cases:
    """The tests marked `cuda`, each as it ends: their counts, and what did not pass."""
    files = [str(path) for path in sorted((ROOT / 'tests').glob('test_*.py')) if 'mark.cuda' in path.read_text()]
    counts = dict.fromkeys(('passed', 'failed', 'errors', 'skipped'), 0)
    import pytest  # noqa: F401  # else the process below would be what fails
    process = subprocess.Popen(
        [sys.executable, '-u', '-m', 'pytest', '-v', '-rfEs', '--tb=short', '-p', 'no:cacheprovider', '-m', 'cuda',
         '-o', 'addopts=--strict-markers', *(['-k', sizes.tests] if sizes.tests else []), *files],
        stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | {'TEST_DEVICE': sizes.device.type, 'COLUMNS': '200'})
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end='', flush=True)
        if ended := re.match(r'\S+::(.+?) (PASSED|FAILED|ERROR|SKIPPED)\b', line):
            counts[{'ERROR': 'errors'}.get(ended[2], ended[2].lower())] += 1
            yield 'tests', counts
        elif why := re.match(r'(FAILED|ERROR|SKIPPED) \S+?(?:::(\S+))?(?: - |: )(.*)', line):
            yield why[2] or why[3][:80], {'why' if why[1] == 'SKIPPED' else 'error': why[3]}
    if process.wait() or not counts['passed']:
        yield 'tests', {**counts, 'error': f'pytest ended with status {process.returncode}'}


def reference(first: torch.Tensor, second: torch.Tensor, tile: int = 4096) -> tuple[torch.Tensor, torch.Tensor]:
    """NT-Xent and its gradient (2N, D) by their formulas in float64, tile by tile; nothing of it is ours."""
    x = torch.cat([first, second]).detach().double()
    count, length = len(x), x.norm(dim=1, keepdim=True)
    z = x / length
    other = z.roll(len(first), dims=0)
    rows = range(0, count, tile)

    def logits(start: int) -> torch.Tensor:
        made = z[start:start + tile] @ z.T / TEMPERATURE
        own = torch.arange(len(made), device=z.device)
        made[own, own + start] = -math.inf
        return made

    log_sums = torch.cat([logits(start).logsumexp(dim=1) for start in rows])
    loss = (log_sums - (z * other).sum(dim=1) / TEMPERATURE).mean()
    gradient = torch.empty_like(z)
    for start in rows:
        made = logits(start)
        shares = (made - log_sums[start:start + tile, None]).exp_() + made.sub_(log_sums).exp_()
        gradient[start:start + tile] = shares @ z - 2 * other[start:start + tile]
    gradient /= TEMPERATURE * count
    return loss, (gradient - z * (z * gradient).sum(dim=1, keepdim=True)) / length


def nt_xent(sizes: Sizes) -> Cases:
    """Loss and gradient of N images: milliseconds, memory, how many times the bare products, errors."""
    from benchmarks.nt_xent import loss_function, products
    dim = 128

    def case(name: str, views: tuple[torch.Tensor, torch.Tensor], exact: tuple[torch.Tensor, torch.Tensor],
             bare: float) -> Figures:
        loss = loss_function(name, TEMPERATURE)

        def step() -> torch.Tensor:
            for view in views:
                view.grad = None
            value = loss(*views)
            value.backward()
            return value.detach()

        def error(found: torch.Tensor, expected: torch.Tensor) -> float:
            return ((found.double() - expected).norm() / expected.norm()).item()

        value = step()
        errors = error(value, exact[0]), error(torch.cat([view.grad for view in views]), exact[1])
        seconds = timed(step, sizes)
        return {'ms': 1000 * seconds, 'MiB': peak(step, sizes), 'times_products': seconds / bare,
                'error_of_loss': errors[0], 'error_of_gradient': errors[1]}

    for n in sizes.n:
        for dtype in (torch.float32, torch.bfloat16):
            what = f'{n:,} {str(dtype).removeprefix("torch.")}'
            generator = torch.Generator().manual_seed(0)
            first, second = (torch.randn(n, dim, generator=generator).to(sizes.device, dtype).requires_grad_()
                             for _ in range(2))
            z = torch.cat([first, second]).detach()
            bare = timed(partial(products, z.float()), sizes)
            yield f'{what}: products in float32', {'ms': 1000 * bare, 'times_products': 1.0}
            if dtype == torch.bfloat16:
                its = timed(partial(products, z), sizes)
                yield f'{what}: products in bfloat16', {'ms': 1000 * its, 'times_products': its / bare}
            exact = reference(first, second)
            for name in ('ours', 'dense', 'lightly'):
                yield f'{what}: {name}', attempt(case, name, (first, second), exact, bare)


def step(sizes: Sizes) -> Cases:
    """A joint step against the bare backbone and the fork's way, and the host's waits in a step of training."""
    from benchmarks import step as steps_module
    from benchmarks.step import FORK, Steps, measure, ratios

    class CompiledSteps(Steps):
        """Both the task and the bare backbone compiled; the fork's way stays as it is."""

        def __init__(self, args: Namespace, precision: 'Precision'):
            super().__init__(args, precision)
            self.backbone = torch.compile(self.task.joint_module.model.backbone)
            self.task.compile()

        def bare(self) -> None:
            with self.precision.autocast():
                loss = self.backbone(self.laid_out).sum()
            loss.backward()
            self.task.joint_module.zero_grad(set_to_none=True)

    def case(model: str, compiled: bool) -> Figures:
        args = flags_of(steps_module, '--model', model, '--img-size', str(sizes.size), '--photos', str(sizes.photos),
                        '--rounds', str(2 * sizes.rounds), '--warmup', '1', '--steps', '10' if sizes.cuda else '1')
        made = (CompiledSteps if compiled else Steps)(args, sizes.precision())
        variants = {'bare': made.bare, 'joint': made.joint, **({} if compiled else {FORK: made.forks_way})}
        times = measure(variants, args, sizes.device)
        return {
            'bare_ms': 1000 * statistics.median(times['bare']),
            'joint_ms': 1000 * statistics.median(times['joint']),
            'inputs/s': 2 * sizes.photos / statistics.median(times['joint']),
            'joint/bare': ratios(times, 'joint', 'bare')[1],
            "joint/fork's_way": None if compiled else ratios(times, 'joint', FORK)[1],
        } | (host_waits(made) if sizes.cuda else {})

    for compiled in (False, True):
        for model in sizes.models:
            if not compiled or sizes.cuda:  # on a CPU it takes a minute
                yield f'{model}{", compiled" * compiled}', attempt(case, model, compiled)


class Training:
    """Steps of `training/trainer.py` with its optimizer on one batch that lies on the device.

    Args:
        steps: Its task, batch and precision.
    """

    def __init__(self, steps: 'Steps'):
        from timm_multilabel.optim import create_optimizer
        from timm_multilabel.training.optimizer_step import OptimizerStep
        self.steps = steps
        self.optimizer_step = OptimizerStep(steps.task, create_optimizer(steps.task, 'adamp', lr=1e-9))

    def __call__(self, count: int) -> None:
        """Take so many steps; figures are read from the device after the last."""
        from benchmarks.train import OneBatch
        from timm_multilabel.training.progress_bar import ProgressBar
        from timm_multilabel.training.trainer import Trainer
        from timm_multilabel.training.training_progress import TrainingProgress
        loader = OneBatch([(self.steps.images, self.steps.target)] * count)
        trainer = Trainer(self.optimizer_step, self.steps.precision, loader, None, len(self.steps.target) // 2, seed=0,
                          log_interval=count)
        with ProgressBar('', count, visible=False) as progress:
            trainer.train(TrainingProgress(0), 0.0, progress)

    def seconds(self, count: int) -> float:
        """Seconds of a step."""
        started = time.perf_counter()
        self(count)
        return (time.perf_counter() - started) / count


@contextmanager
def waits() -> Iterator[list[str]]:
    """The places at which the host waits for the device."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        torch.cuda.set_sync_debug_mode('warn')
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode('default')
            found += [f'{Path(each.filename).name}:{each.lineno}' for each in caught
                      if 'synchronizing CUDA operation' in str(each.message)]


def host_waits(steps: 'Steps') -> Figures:
    """Waits of the host for the device in a step of training; what an epoch has at its ends drops out."""
    training = Training(steps)
    training(4)  # to warm up
    counted = []
    for count in (4, 12):
        with waits() as found:
            training(count)
        counted.append(len(found))
    places = sorted({place for place in found if found.count(place) >= 8})
    return {'host_waits_a_step': (counted[1] - counted[0]) / 8, 'at': ', '.join(places) or None}


def heads(sizes: Sizes) -> Cases:
    """A step of training with 200 and 40 softmax heads of 8 classes against one with 3, in turns."""
    from benchmarks import step as steps_module
    for model, size in sizes.heads:
        args = flags_of(
            steps_module, '--model', model, '--img-size', str(size), '--photos', str(sizes.photos),
            '--heads', '3', '40', '200', '--rounds', str(sizes.rounds), '--warmup', '1',
            '--steps', str(20 if sizes.cuda else 1))
        what = f'{model}, {size} px, {sizes.photos} photos'
        metrics = attempt(steps_module.by_heads, args, sizes.precision())
        if metrics.keys() & {'skipped', 'error'}:
            yield what, metrics
        else:
            yield from ((f'{what}: {name}', its) for name, its in metrics.items())


def input(sizes: Sizes) -> Cases:
    """Images a second and the share of a step that waits for data, by cache and number of loader processes."""
    from benchmarks import train
    from timm_multilabel.assembly.device import start_device
    start_device(sizes.device.type)
    for size, shape, workers in sizes.inputs:
        with TemporaryDirectory() as folder:
            args = flags_of(
                train, '--model', sizes.model, '--img-size', str(size), '-b', str(2 * sizes.photos), '--count',
                str(sizes.count), '--photo-size', *map(str, shape), '--rounds', str(max(1, sizes.rounds - 1)))
            args.amp_dtype = 'bfloat16'
            train.write_photos(Path(folder), args)
            for cache in ('device', None, 'ram'):
                # The device's own images need no processes but to be decoded, once.
                args.cache, args.workers = cache, workers[:1] if cache == 'device' else workers
                what = f'{size} px, {"cache " + cache if cache else "files"}'
                try:
                    for processes, seconds, share in train.shares(args, folder, sizes.device):
                        yield f'{what}, {processes} processes', {
                            'images/s': args.batch_size / seconds, 'ms_a_step': 1000 * seconds,
                            'waiting_%': 100 * share}
                except Exception as error:
                    yield what, reason(error)


def large_batch(sizes: Sizes) -> Cases:
    """A step of SimCLR on a large batch in pieces, beside one piece and the whole batch at once."""
    from benchmarks.large_batch import make

    def case(name: str, amp: bool) -> Figures:
        made = make(name, sizes.model, sizes.size, sizes.pairs, sizes.pieces, sizes.device.type)

        def step() -> None:
            with sizes.precision(amp).autocast():
                made()

        step()
        wait(sizes)
        started = time.perf_counter()
        memory = peak(step, sizes)
        wait(sizes)
        seconds = time.perf_counter() - started
        pairs = sizes.pieces if name == 'a piece' else sizes.pairs
        return {'pairs': pairs, 'seconds': seconds, 'ms_a_pair': 1000 * seconds / pairs, 'MiB': memory}

    for name in ('pieces', 'a piece', 'whole'):
        for amp in (True, False):
            yield f'{name}, {"bfloat16" if amp else "float32"}', attempt(case, name, amp)


def throughput(sizes: Sizes) -> Cases:
    """Images a second of predictions and features, against the bare backbone's forward on a batch of the same size."""
    from benchmarks import train
    from timm_multilabel.assembly.device import choose_precision, loader_workers
    from timm_multilabel.cli.main import run_command
    from timm_multilabel.data.arguments import rows_of_arguments
    from timm_multilabel.inference.embeddings import embed_part
    from timm_multilabel.inference.loaded import LoadedModel
    from timm_multilabel.inference.predictor import Predictor
    from timm_multilabel.training.checkpoint import read_checkpoint
    from timm_multilabel.training.progress_bar import ProgressBar
    size, shape, (workers, *_) = sizes.inputs[0]
    batch = 4 * sizes.photos
    with TemporaryDirectory() as folder:
        args = flags_of(train, '--count', str(sizes.count), '--photo-size', *map(str, shape))
        train.write_photos(Path(folder), args)
        run_command('train', 'train.py', [
            folder, '--model', sizes.model, '--img-size', str(size), '-b', str(sizes.photos), '-j', str(workers),
            '--epochs', '1', '--warmup-epochs', '0', '--cooldown-epochs', '0', '--lr', '1e-4', '--amp', '--amp-dtype',
            'bfloat16', '--device', sizes.device.type, '--output', folder, '--experiment', 'run'])
        checkpoint = read_checkpoint(f'{folder}/run/last.pth.tar')
        loaded = LoadedModel.of(checkpoint, 'plain', choose_precision(sizes.device, True, None, False))
        images = torch.randn(batch, 3, size, size, device=sizes.device)

        @torch.no_grad()
        def forward(model: torch.nn.Module) -> torch.Tensor:
            with loaded.precision.autocast():
                return model(images)

        bare = batch / timed(lambda: forward(loaded.model.backbone), sizes)
        yield 'bare backbone', {'images/s': bare, 'of_bare': 1.0}
        for name, step in (('features', lambda: forward(loaded.embedder('features')).float().cpu()),
                           ('probabilities', lambda: loaded.probabilities(images))):
            rate = batch / timed(step, sizes)
            yield f'{name} of a batch on the device', {'images/s': rate, 'of_bare': rate / bare}
        rows = rows_of_arguments([f'{folder}/images'], checkpoint.label_space, say=print)
        predictor, processes = Predictor(loaded), loader_workers(workers)

        def embed() -> None:
            with ProgressBar('', 1, visible=False) as progress:
                embed_part(loaded, loaded.part(rows, keep_bad=True), 'features', batch, processes, progress)

        def predict() -> None:
            for answers in predictor.answer(loaded.part(rows, keep_bad=True), batch, processes, 1, {}):
                list(answers)

        for name, step in (('embed', embed), ('predict', predict)):
            started = time.perf_counter()
            step()
            rate = len(rows) / (time.perf_counter() - started)
            yield f'{name}, {len(rows):,} files, {processes} processes', {'images/s': rate, 'of_bare': rate / bare}


def epoch(sizes: Sizes) -> Cases:
    """A SimCLR epoch of the same backbone, photos and batch: ours, and lightly-train's where it is installed.

    Of each, three epochs less one, halved: what a training takes at its ends drops out. A first one warms up.
    """
    import timm

    import timm_multilabel
    from benchmarks import train
    size, shape, (workers, *_) = sizes.inputs[0]
    batch = min(4 * sizes.photos, sizes.count)

    def ours(folder: str, output: str, epochs: int) -> None:
        timm_multilabel.train(
            folder, model=sizes.model, img_size=size, batch_size=batch, workers=workers, epochs=epochs,
            warmup_epochs=0, cooldown_epochs=0, simclr_loss_weight=1, classification_loss_weight=0, amp=True,
            amp_dtype='bfloat16', device=sizes.device.type, output=output)

    def lightly_train(folder: str, output: str, epochs: int) -> None:
        import lightly_train
        lightly_train.pretrain(
            out=output, data=f'{folder}/images', model=timm.create_model(sizes.model),
            method='simclr', epochs=epochs, batch_size=batch, num_workers=workers, devices=1, precision='bf16-mixed',
            accelerator='gpu' if sizes.cuda else 'cpu', transform_args={'image_size': (size, size)})

    def case(train_epochs: Callable[[str, str, int], None], folder: str) -> Figures:
        taken = {}
        for number, epochs in enumerate((1, 1, 3)):
            started = time.perf_counter()
            train_epochs(folder, f'{folder}/{train_epochs.__name__}-{number}', epochs)
            taken[epochs] = time.perf_counter() - started
        seconds = (taken[3] - taken[1]) / 2
        return {'images/s': sizes.count / seconds, 'seconds': seconds}

    with TemporaryDirectory() as folder:
        args = flags_of(train, '--count', str(sizes.count), '--photo-size', *map(str, shape))
        train.write_photos(Path(folder), args)
        mine = attempt(case, ours, folder)
        yield 'ours', mine
        theirs = attempt(case, lightly_train, folder)
        if 'seconds' in mine and 'seconds' in theirs:
            theirs['ours/theirs'] = mine['images/s'] / theirs['images/s']
        yield 'lightly-train', theirs


def fork_table(sizes: Sizes) -> Cases:
    """Two passes of runs of `experiments/fork-table` at 60x80, without ImageNet weights: accuracies in percent.

    Weights are not averaged, since an average over 10,000 steps says nothing of so few.
    """
    import timm_multilabel
    from timm_multilabel.assembly.grid_file import read_grid
    grid = read_grid(ROOT / 'experiments' / 'fork-table' / 'grid.yaml')

    def case(flags: dict[str, Any], data: str, output: str) -> Figures:
        started = time.perf_counter()
        trained = timm_multilabel.train(data, **flags, output=output)
        last = trained.summary.iloc[-1]
        top1 = {str(name)[len('eval_'):]: float(value) for name, value in last.items()
                if str(name).startswith('eval') and str(name).endswith('top1')}
        return {'seconds': time.perf_counter() - started, **top1}

    with TemporaryDirectory() as folder:
        data = sizes.data
        if data is None:
            data = f'{folder}/sample'
            few = {} if sizes.cuda else {'train': 32, 'val': 16, 'unlabelled': 0}
            timm_multilabel.sample(data, **few)
        for run in (run for run in grid.runs if run.seed == grid.runs[0].seed and run.setting in grid.settings[:2]):
            flags = {**run.recipe, 'model': sizes.model, 'pretrained': False, 'input_size': [3, 80, 60], 'epochs': 2,
                     'warmup_epochs': 0, 'cooldown_epochs': 0, 'model_ema': False, 'workers': sizes.inputs[0][2][0],
                     'device': sizes.device.type, 'seed': run.seed, 'unknown_labels': 'ignore'}
            yield f'{run.setting}{", sample data" if sizes.data is None else ""}', attempt(case, flags, data, folder)


def run(stage: str, dry: bool, data: str | None = None) -> Cases:
    """The cases of a stage; with tiny sizes on the CPU where it is a dry run."""
    if dry:
        torch.set_num_threads(1)  # as tests have it, beside which it may run
    torch.backends.cudnn.benchmark = not dry  # as in training
    torch.manual_seed(0)
    stages = {each.__name__: each for each in (
        tests, nt_xent, step, heads, input, large_batch, throughput, epoch, fork_table)}
    return stages[stage](replace(DRY if dry else FULL, data=data))
