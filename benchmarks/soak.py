"""A training run killed with SIGKILL at random moments and resumed each time, beside one that was left alone.

`python -m benchmarks.soak --help`. Both must end with the same weights, EMA, projector and optimizer state byte for
byte, and the same summary.csv (but for the column of images a second). Now and then the newest checkpoint is damaged
between two lives, so that the run has to go on from the one before. Then files with random damage are read: tables,
images, checkpoints, recipes. Each must end well or in one clear line; the exit status is 1 where one does not.
"""
import collections
import os
import random
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import psutil
import torch

from benchmarks.program import count, positive, run_benchmark
from timm_multilabel.cli.parser import Parser
from timm_multilabel.config.files import build
from timm_multilabel.config.train import TrainSettings
from timm_multilabel.data.images import read_photo
from timm_multilabel.data.sample import write_sample
from timm_multilabel.data.table import encode_rows, find_label_space, read_table
from timm_multilabel.errors import UserError
from timm_multilabel.training.checkpoint import newest_checkpoint, read_checkpoint

ROOT = Path(__file__).parent.parent
SPEED = 'images_per_second'
DAMAGED_SHARE = 0.25  # of the lives begin with a damaged newest checkpoint


class Run:
    """A run that can be started again and again.

    Args:
        folder: Where its data and its run folder are.
        name: Its run folder.
        ranks: Processes.
        args: The flags of this benchmark.
    """

    def __init__(self, folder: Path, name: str, ranks: int, args: Namespace):
        self.output, self.path = folder, folder / name
        self.command = [
            sys.executable, '-m', 'timm_multilabel.cli.launch', '--standalone', '--nproc-per-node', str(ranks),
            str(ROOT / 'train.py'), str(folder / 'data'), '--output', str(folder), '--experiment', name,
            '--resume', 'auto', '--checkpoint-steps', '2', '--checkpoint-hist', '3', '--epochs', str(args.epochs),
            '--model', 'test_resnet', '--img-size', '32', '-b', '8', '-j', '1', '--device', 'cpu', '--drop', '0.2',
            '--reprob', '0.3', '--grad-accum-steps', '2', '--clip-grad', '1', '--model-ema', '--model-ema-decay', '0.9',
            '--opt', 'adamw', '--lr', '1e-3', '--sched-on-updates', '--warmup-epochs', '1', '--cooldown-epochs', '0']
        self.log = folder / f'{name}.log'

    def start(self) -> subprocess.Popen:
        with open(self.log, 'ab') as log:
            return subprocess.Popen(self.command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)

    def kill(self, process: subprocess.Popen) -> None:
        """Kill the launcher, the training processes and their loaders, as the loss of a machine would."""
        while found := [each for each in psutil.process_iter(['cmdline']) if self._is_mine(each)]:
            for each in found:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            psutil.wait_procs(found, timeout=10)
        process.wait()

    def _is_mine(self, process: psutil.Process) -> bool:
        words = process.info['cmdline'] or []
        return str(self.output) in words and self.path.name in words

    def state(self) -> dict[str, torch.Tensor]:
        """Every tensor of its last checkpoint by its place."""
        state = torch.load(self.path / 'last.pth.tar', weights_only=True)
        kept = ('state_dict', 'state_dict_ema', 'task_state', 'task_state_ema', 'optimizer')
        return dict(_tensors({name: state[name] for name in kept}, ''))

    def rows(self) -> list[dict[str, str]]:
        """summary.csv as text, without what a clock says."""
        return pd.read_csv(self.path / 'summary.csv', dtype=str).drop(columns=SPEED).to_dict('records')


def _tensors(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _tensors(part, f'{name}.{key}')


def damage(path: Path, rng: random.Random) -> str:
    """Put a damaged file in a file's place; what was done to it."""
    data = bytearray(path.read_bytes())
    kind = rng.choice(['cut off', 'bytes changed', 'bytes put in', 'emptied', 'of another kind'])
    if kind == 'cut off':
        del data[rng.randrange(len(data)):]
    elif kind == 'bytes changed':
        for _ in range(rng.choice([1, 10, 1000])):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == 'bytes put in':
        place = rng.randrange(len(data))
        data[place:place] = rng.randbytes(rng.choice([1, 100]))
    else:
        data = bytearray() if kind == 'emptied' else bytearray(rng.randbytes(1000))
    beside = path.with_name('damaged')
    beside.write_bytes(data)
    beside.replace(path)  # in place it would damage the other names of the same file
    return kind


def soak(folder: Path, ranks: int, args: Namespace) -> bool:
    """Kill and resume a run; whether nothing was lost."""
    rng = random.Random(args.seed + ranks)
    alone, killed = Run(folder, f'alone-{ranks}', ranks, args), Run(folder, f'killed-{ranks}', ranks, args)
    started = time.perf_counter()
    process, first = alone.start(), None
    while process.poll() is None:
        time.sleep(0.05)
        if first is None and any(alone.path.glob('*.pth.tar')):
            first = time.perf_counter() - started
    if process.returncode:
        raise UserError(f'the undisturbed run failed; see {alone.log.read_text()[-500:]}')
    whole = time.perf_counter() - started
    print(f'{ranks} ranks: undisturbed in {whole:.0f} s, first checkpoint after {first:.1f} s', flush=True)

    kills, damaged, moments = 0, 0, collections.Counter()
    while True:
        newest = newest_checkpoint(killed.path)[0] if killed.path.is_dir() else None
        others = len(list(killed.path.glob('*.pth.tar'))) > 1
        if kills and newest is not None and others and rng.random() < DAMAGED_SHARE:
            kind = damage(newest, rng)
            damaged += 1
            print(f'  {newest.name}: {kind}', flush=True)
        process = killed.start()
        if kills == args.kills:
            process.wait(timeout=600)
            break
        try:
            process.wait(timeout=rng.uniform(0.3 * first, first + args.span))
            raise UserError(f'the run ended by itself after {kills} kills ({killed.log.read_text()[-500:]}); raise '
                            '--epochs')
        except subprocess.TimeoutExpired:
            killed.kill(process)
            kills += 1
            writing = any(killed.path.glob('.*.tmp'))
            moments['while writing' if writing else 'with checkpoints' if newest else 'before the first one'] += 1
    if process.returncode:
        print(killed.log.read_text()[-2000:])
        return False
    ours, theirs = killed.state(), alone.state()
    different = [name for name in theirs if name not in ours or not torch.equal(ours[name], theirs[name])]
    different += sorted(ours.keys() - theirs.keys())
    same_rows = killed.rows() == alone.rows()
    print(f'{ranks} ranks: {kills} kills ({", ".join(f"{n} {moment}" for moment, n in moments.items())}), {damaged} '
          f'damaged checkpoints; {len(theirs)} tensors, {len(different)} different; {len(alone.rows())} rows of '
          f'summary.csv, {"the same" if same_rows else "NOT the same"}', flush=True)
    return not different and same_rows


def read_data(path: Path) -> None:
    """Read a table as training does."""
    table = read_table(path)
    encode_rows(table, find_label_space([table], None))


def read_recipe(path: Path) -> None:
    """Read a YAML file of flags as training does."""
    build(TrainSettings, {'config': str(path)})


def bad_inputs(folder: Path, tries: int, seed: int) -> bool:
    """Read files with random damage; whether each ended well or in one clear line."""
    rng = random.Random(seed)
    recipe = folder / 'recipe.yaml'
    checkpoint = next(folder.glob('alone-*/last.pth.tar'))
    recipe.write_bytes((ROOT / 'recipes' / 'sample.yaml').read_bytes())
    registry: dict[str, tuple[Path, Callable[[Path], Any]]] = {
        'tables': (folder / 'data' / 'train.csv', read_data),
        'images': (next((folder / 'data' / 'images').iterdir()), lambda path: read_photo(str(path), 'row').decode()),
        'checkpoints': (checkpoint, read_checkpoint),
        'recipes': (recipe, read_recipe),
    }
    crashed = 0
    for name, (path, read) in registry.items():
        before, outcomes = path.read_bytes(), collections.Counter()
        for _ in range(tries):
            damage(path, rng)
            try:
                with open(os.devnull, 'w') as nothing, _stderr(nothing):
                    read(path)
                outcomes['read'] += 1
            except UserError:
                outcomes['refused in one line'] += 1
            except Exception as error:
                outcomes['crashed'] += 1
                print(f'  {name}: {type(error).__name__}: {error}', flush=True)
            path.write_bytes(before)
        crashed += outcomes['crashed']
        print(f'{tries} damaged {name}: ' + ', '.join(f'{number} {what}' for what, number in outcomes.items()))
    return not crashed


class _stderr:
    """Send what is printed as an error elsewhere."""

    def __init__(self, file: Any):
        self.file = file

    def __enter__(self) -> None:
        self.before, sys.stderr = sys.stderr, self.file

    def __exit__(self, *args: Any) -> None:
        sys.stderr = self.before


def add_flags(parser: Parser) -> None:
    parser.add_argument('--kills', type=positive, default=20, metavar='N', help='kills of each run')
    parser.add_argument('--ranks', type=positive, nargs='+', default=[1, 2], metavar='N', help='processes of the runs')
    parser.add_argument('--epochs', type=positive, default=60, metavar='N', help='epochs of the runs')
    parser.add_argument('--span', type=positive, default=6, metavar='S',
                        help='seconds after the first checkpoint in which a life ends')
    parser.add_argument('--bad-inputs', type=count, default=200, metavar='N', help='damaged files of each kind')
    parser.add_argument('--seed', type=count, default=0, metavar='N', help='of what is random here')


def run(args: Namespace) -> None:
    """Soak."""
    with TemporaryDirectory(prefix='soak-') as name:
        folder = Path(name)
        write_sample(folder / 'data', train=256, val=32, test=1, unlabelled=0, size=32)
        good = all([soak(folder, ranks, args) for ranks in args.ranks])
        good = bad_inputs(folder, args.bad_inputs, args.seed) and good
    print('lost: nothing' if good else 'lost: see above')
    sys.exit(0 if good else 1)


if __name__ == '__main__':
    run_benchmark(sys.modules[__name__], sys.argv[1:])
