"""Every kind of file that a command reads, damaged at random and read again.

`python -m benchmarks.damaged_files --help`. Each must be read or refused in one line; the exit status is 1 where one
does something else. Most damages flip a single bit; some cut a file off, or put zeros in place of a part of it.
"""
import argparse
import collections
import contextlib
import io
import json
import random
import sys
import time
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.program import positive, run_benchmark
from timm_multilabel.assembly import experiment
from timm_multilabel.assembly.grid_file import read_grid
from timm_multilabel.assembly.run_settings import read_run_settings
from timm_multilabel.assembly.stored import stored_predictions
from timm_multilabel.cli.main import run_command
from timm_multilabel.config.commands import GridSettings
from timm_multilabel.data.images import FilePhotos, read_photo
from timm_multilabel.data.sample import write_sample
from timm_multilabel.data.shards import find_shards
from timm_multilabel.data.streams import Stored, read_labels, table_of_labels
from timm_multilabel.data.table import encode_rows, find_label_space, read_table
from timm_multilabel.errors import UserError
from timm_multilabel.exports.examples import images_of_run
from timm_multilabel.exports.weights import read_exported
from timm_multilabel.inference.embeddings import Embeddings
from timm_multilabel.inference.predictions import Predictions
from timm_multilabel.labels import LabelSpace
from timm_multilabel.loading.cache import open_cache
from timm_multilabel.reports.grid import grid_markdown
from timm_multilabel.training.checkpoint import read_checkpoint
from timm_multilabel.training.run_folder import RunFolder, find_launched, read_summary, running_epochs
from timm_multilabel.training.trackers import WandbTracker
from timm_multilabel.views.pillow import eval_views

EXPERIMENT = Path(__file__).parent.parent / 'experiments' / 'fork-table-small'
RUN = ['--model', 'test_resnet', '--img-size', '32', '-b', '8', '-j', '0', '--device', 'cpu', '--epochs', '2',
       '--warmup-epochs', '0', '--cooldown-epochs', '0']

Kinds = dict[str, tuple[Path, Callable[[Path], Any]]]
"""The kinds of files: a whole one each, and what reads it; its result is of no interest."""


def make_kinds(folder: Path) -> Kinds:
    """Make a file of each kind."""
    data, run = folder / 'data', folder / 'run'
    write_sample(data, train=16, val=8, test=1, unlabelled=0, size=32)
    run_command('train', 'train', [str(data), *RUN, '--output', str(folder), '--experiment', 'run'])
    run_command('export', 'export', [
        str(run / 'last.pth.tar'), '--formats', 'safetensors', '--out', str(folder / 'out')])
    return _of_runs(folder, run) | _of_models(folder, data, run) | _of_grids(folder) | _of_data(folder, data)


def _of_runs(folder: Path, run: Path) -> Kinds:
    """What a run writes into its folder."""
    space = LabelSpace.load(run / 'label_space.json')

    other = RunFolder(folder / 'other', {}, space)
    (other.path / 'summary.csv').write_bytes((run / 'summary.csv').read_bytes())

    def go_on(path: Path) -> None:
        running_epochs(read_summary(path))
        other.add_summary({'epoch': 1, 'train_loss': 0.5})

    checkpoint = read_checkpoint(run / 'last.pth.tar')
    tracker = run / 'wandb.json'
    tracker.write_text(json.dumps({'id': '0a1b2c3d', 'epochs': 2, 'steps': {'progress': 4}}))
    (run / '.launch').write_text('host 1\nhost 2')
    return {
        'summary.csv': (other.path / 'summary.csv', go_on),
        'args.yaml': (run / 'args.yaml', lambda path: read_run_settings(path.parent)),
        'args.yaml, by export': (run / 'args.yaml', lambda path: images_of_run(checkpoint)),
        'label_space.json': (run / 'label_space.json', LabelSpace.load),
        'wandb.json': (tracker, _start_tracker),
        '.launch': (run / '.launch', lambda path: find_launched([path.parent], ['host 1'])),
    }


def _start_tracker(path: Path) -> None:
    """Read wandb.json as a run does that goes on, without W&B."""
    tracker = WandbTracker.__new__(WandbTracker)
    tracker.path, tracker.folder, tracker.settings, tracker.goes_on = path, path.parent, {}, True
    tracker.known, tracker.run = {'id': '0', 'epochs': 0, 'steps': {}}, None
    online = Namespace(offline=False, url='')
    tracker.wandb = Namespace(init=lambda **kwargs: online, Settings=Namespace)
    tracker.start()


def _of_models(folder: Path, data: Path, run: Path) -> Kinds:
    """What models are, and what is made by them."""
    made = stored_predictions(run, 'val', data, torch.device('cpu'), 0, lambda line: None)
    made_by = {'arch': 'test_resnet', 'what': 'features', 'weights': 'plain', 'digest': '0'}
    embeddings = Embeddings(made.images.astype(object), made.features, made_by)
    for suffix in ('npz', 'parquet'):
        embeddings.save(folder / f'embeddings.{suffix}')
    return {
        'predictions': (run / 'predictions-val.npz', Predictions.load),
        'embeddings, npz': (folder / 'embeddings.npz', Embeddings.load),
        'embeddings, Parquet': (folder / 'embeddings.parquet', Embeddings.load),
        'checkpoint': (run / 'last.pth.tar', read_checkpoint),
        'checkpoint, mapped': (run / 'last.pth.tar', lambda path: read_checkpoint(path, mapped=True)),
        'exported weights': (folder / 'out' / 'multilabel.safetensors', read_exported),
        'exported description': (folder / 'out' / 'multilabel.json',
                                 lambda path: read_exported(path.with_suffix('.safetensors'))),
    }


def _of_grids(folder: Path) -> Kinds:
    """What an experiment is, and what it writes."""
    place = folder / 'experiment'
    place.mkdir()
    for name in ('grid.yaml', 'results.csv', 'differences.csv'):
        (place / name).write_bytes((EXPERIMENT / name).read_bytes())
    whole = read_grid(place / 'grid.yaml')
    experiment.write_record(whole.runs[0], place, {
        'run': experiment.record_of(whole.runs[0], GridSettings(data_dir='data')), 'where': experiment.where(),
        'seconds': 1.5, 'cpu_seconds': 1.5})

    def tables(path: Path) -> None:
        grid_markdown(experiment.read_results(place, 'val', whole))

    return {
        'grid.yaml': (place / 'grid.yaml', read_grid),
        'record of a run': (place / f'{whole.runs[0].name}.json',
                            lambda path: experiment.read_record(whole.runs[0], place)['run'] == {}),
        'results.csv': (place / 'results.csv', tables),
        'differences.csv': (place / 'differences.csv', tables),
    }


def _of_data(folder: Path, data: Path) -> Kinds:
    """What a data directory holds, and the cache of it."""
    rows = encode_rows(read_table(data / 'train.csv'), find_label_space([read_table(data / 'train.csv')], None))
    views = eval_views((32, 32), 'bilinear', 1.0, 'center')
    for kind, name in (('webdataset', 'tars'), ('parquet', 'parquet')):
        write_sample(folder / name, train=4, val=1, test=0, unlabelled=0, size=16, kind=kind)
    (data / 'rows.json').write_text('{"train": 16}')

    def cache() -> FilePhotos:
        return open_cache('disk', FilePhotos(rows), views, folder=folder / 'cache', workers=1, skip_bad=False,
                          say=lambda line: None)

    expected = cache()[3].decode().tobytes()

    def again(path: Path) -> None:
        assert cache()[3].decode().tobytes() == expected

    def table(path: Path) -> None:
        found = read_table(path)
        encode_rows(found, find_label_space([found], None))

    def shards(path: Path) -> None:
        found = find_shards(path.parent, 'train', 'image_path')
        table_of_labels(found, [read_labels(found.samples())])

    return {
        'rows.json': (data / 'rows.json', lambda path: Stored.load(path.parent)),
        'index of a cache': (next((folder / 'cache').glob('*.npz')), again),
        'table': (data / 'train.csv', table),
        'image': (data / 'images' / '000001.jpg', lambda path: read_photo(str(path), 'row').decode()),
        'tar': (next((folder / 'tars').glob('train-*.tar')), shards),
        'Parquet shard': (next((folder / 'parquet').glob('train-*.parquet')), shards),
    }


def damaged(content: bytes, tries: int, seed: int) -> Iterator[bytes]:
    """A file's bytes, damaged in so many ways."""
    rng = random.Random(seed)
    for number in range(tries):
        data, place = bytearray(content), rng.randrange(len(content))
        if number % 10 == 8:
            del data[place:]
        elif number % 10 == 9:
            end = min(len(data), place + rng.choice([1, 16, 512]))
            data[place:end] = bytes(end - place)
        else:
            data[place] ^= 1 << rng.randrange(8)
        yield bytes(data)


def try_kind(path: Path, read: Callable[[Path], Any], tries: int, seed: int) -> collections.Counter:
    """Read a file with damage so many times.

    Returns:
        How often it was 'read' and 'refused', and other outcomes by what they were.
    """
    whole, outcomes = path.read_bytes(), collections.Counter()
    for content in damaged(whole, tries, seed):
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(errors):
                read(path)
            outcome = 'read'
        except UserError as error:
            outcome = 'refused' if error.line.isprintable() and len(error.line) < 1000 else f'not one line: {error}'
        except SystemExit as stop:  # of the parser of flags
            outcome = 'refused' if stop.code == 2 and errors.getvalue().count('\n') == 1 else errors.getvalue()
        except Exception as error:
            outcome = f'{type(error).__name__}: {error}'
        outcomes[outcome] += 1
    path.unlink(missing_ok=True)
    path.write_bytes(whole)
    read(path)
    return outcomes


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    parser.add_argument('--tries', type=positive, default=1000, metavar='N', help='damaged files of each kind')
    parser.add_argument('--kinds', nargs='+', metavar='NAME', help='kinds to try (default: all)')
    parser.add_argument('--seed', type=int, default=0, metavar='N', help='of the damage')


def run(args: argparse.Namespace) -> None:
    """Damage and read."""
    good = True
    with TemporaryDirectory(prefix='damaged-') as name, np.errstate(all='ignore'):
        kinds = make_kinds(Path(name))
        print('| kind | damaged | refused | read | anything else |\n| --- | --- | --- | --- | --- |')
        for kind, (path, read) in kinds.items():
            if args.kinds and kind not in args.kinds:
                continue
            started = time.perf_counter()
            outcomes = try_kind(path, read, args.tries, args.seed + zlib.crc32(kind.encode()))
            others = {what: number for what, number in outcomes.items() if what not in ('refused', 'read')}
            good &= not others
            print(f'| {kind} | {args.tries} | {outcomes["refused"]} | {outcomes["read"]} | {sum(others.values())} |',
                  flush=True)
            print(f'{kind}: {time.perf_counter() - started:.1f} s', file=sys.stderr)
            for what, number in sorted(others.items(), key=lambda pair: -pair[1])[:10]:
                print(f'{kind}: {number} x {what[:300]!r}', file=sys.stderr, flush=True)
    sys.exit(0 if good else 1)


if __name__ == '__main__':
    run_benchmark(sys.modules[__name__], sys.argv[1:])
