"""What the tests share: a tiny backbone, a tiny data directory, real processes that talk through gloo."""
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist
from PIL import Image
from processes import SERVER
from torch import nn

from timm_multilabel.cli.main import run_command
from timm_multilabel.cli.parser import parse
from timm_multilabel.config.files import build
from timm_multilabel.config.train import TrainSettings
from timm_multilabel.labels import LabelSet, LabelSpace
from timm_multilabel.model import MultiLabelModel
from timm_multilabel.reports import curves
from timm_multilabel.task import JointTask
from timm_multilabel.training.parent import STORE

SPACE = LabelSpace((LabelSet('color', ('blue', 'green', 'red')), LabelSet('shape', ('disc', 'ring'))))
TINY = ['--model', 'test_resnet', '--img-size', '32', '-b', '4', '-j', '0', '--device', 'cpu', '--lr', '0.05',
        '--warmup-epochs', '0', '--cooldown-epochs', '0', '--drop', '0.2', '--reprob', '0.3']
COLORS = {'red': (200, 30, 30), 'green': (30, 180, 60), 'blue': (40, 60, 210)}


class TinyBackbone(nn.Module):
    """A backbone without batch norm and dropout, so that a batch may be split without changing its gradient."""
    head_hidden_size = 6

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, self.head_hidden_size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.tanh(self.conv(images)).mean(dim=(2, 3)))


def tiny_task(seed: int = 0, space: LabelSpace = SPACE, dtype: torch.dtype | None = None, **kwargs: Any) -> JointTask:
    """A task on the tiny backbone, the same weights for the same seed."""
    torch.manual_seed(seed)
    of_model = {name: kwargs.pop(name) for name in ('smoothing', 'head_options', 'drop', 'registry') if name in kwargs}
    model = MultiLabelModel(TinyBackbone(), space, projection_dim=5, **of_model)
    task = JointTask(model, **{'projection_dim': 5, **kwargs})
    return task if dtype is None else task.to(dtype)


def write_data(folder: Path, train: int = 12, val: int = 6, size: int = 32) -> Path:
    """A data directory with plain pictures: a column color (the picture's) and a column shape (any)."""
    (folder / 'images').mkdir(parents=True)
    number = 0
    for split, rows in (('train', train), ('val', val)):
        lines = ['image_path,color,shape']
        for _ in range(rows):
            color = list(COLORS)[number % 3]
            Image.new('RGB', (size, size), COLORS[color]).save(folder / 'images' / f'{number}.png')
            lines.append(f'images/{number}.png,{color},{("disc", "ring")[number % 2]}')
            number += 1
        (folder / f'{split}.csv').write_text('\n'.join(lines) + '\n')
    return folder


def train_settings(*words: str) -> TrainSettings:
    """The settings that a command line of training means."""
    return build(TrainSettings, parse(TrainSettings, 'train.py', words))


def run_ranks(function: Callable[..., Any], ranks: int, *args: Any, join: bool = True) -> list[Any]:
    """Call `function(rank, *args)` in `ranks` processes that form a gloo group; their results in rank order.

    Without `join` they have no group yet, but the environment of a launcher, from which training makes its own.
    """
    # A server forks the processes, so that they start at once and without the state of this one.
    queue = SERVER.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            SERVER.Process(target=_rank_main, args=(function, rank, ranks, f'{folder}/store', queue, args, join))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        try:
            results = dict(queue.get(timeout=300) for _ in processes)
        finally:
            for process in processes:
                process.join(timeout=20)
                process.kill()
    for result in results.values():
        if isinstance(result, str) and result.startswith('Traceback'):
            raise AssertionError(result)
    return [results[rank] for rank in range(ranks)]


def _rank_main(function, rank: int, ranks: int, store: str, queue, args, join: bool) -> None:
    multiprocessing.set_start_method(None, force=True)  # else loaders start a server of their own
    torch.set_num_threads(1)
    leave_curves_undrawn()
    try:
        if join:
            dist.init_process_group(
                'gloo', init_method=f'file://{store}', rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
        else:
            os.environ |= {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(ranks),
                           'LOCAL_WORLD_SIZE': str(ranks), 'TORCHELASTIC_RESTART_COUNT': '0', STORE: store}
        result = function(rank, *args)
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        result = traceback.format_exc()
    queue.put((rank, result))


def train_ranks(words: list[str]) -> str:
    """Train in two processes, as the launcher has them but without the seconds that it takes to start; what they print.
    """
    with tempfile.NamedTemporaryFile() as log:
        run_ranks(_train_rank, 2, words, log.name, join=False)
        return Path(log.name).read_text()


def _train_rank(rank: int, words: list[str], log: str) -> None:
    with open(log, 'a') as file, redirect_stdout(file), redirect_stderr(file):
        run_command('train', 'train.py', words)


def leave_curves_undrawn() -> None:
    """Have runs make an empty curves.png: to draw it after each epoch is most of what a tiny run takes."""
    curves.write_curves = lambda summary, path: path.touch()


def train_run(data_dir, output, *flags, epochs=2):
    """Train with a tiny model in this process; the run folder."""
    run_command('train', 'train.py', [
        str(data_dir), *TINY, '--epochs', str(epochs), '--output', str(output), '--experiment', 'run', *flags])
    return output / 'run'


def weights(path):
    """The weights of a checkpoint, EMA and projector included, by name."""
    state = torch.load(path, weights_only=True)
    flat = dict(state['state_dict'])
    for part in ('state_dict_ema', 'task_state', 'task_state_ema'):
        for name, value in state.get(part, {}).items():
            flat.update({f'{part}.{name}.{k}': v for k, v in value.items()} if isinstance(value, dict)
                        else {f'{part}.{name}': value})
    return flat


def assert_same_weights(a, b):
    """Two checkpoints have the same weights, bit for bit."""
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def assert_same_summary(a: Path, b: Path) -> None:
    """Two run folders have the same summary.csv, but for what a clock says."""
    rows = [pd.read_csv(folder / 'summary.csv', dtype=str).drop(columns='images_per_second') for folder in (a, b)]
    pd.testing.assert_frame_equal(*rows)
