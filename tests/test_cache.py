"""Decoded images in memory, on disk and on the device."""
import json
import multiprocessing
import os
import pickle
import shutil
import socket
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from common import SPACE, run_ranks, write_data
from PIL import Image
from test_loading import PLAIN, spoil
from test_views import WAITS, Operations, picture
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from timm_multilabel.cli.main import run_command
from timm_multilabel.data.images import FilePhotos
from timm_multilabel.data.table import encode_rows, read_table
from timm_multilabel.errors import UserError
from timm_multilabel.loading import cache, device
from timm_multilabel.loading.batches import Batches, ImageDataset
from timm_multilabel.loading.cache import CachedPhotos, open_cache
from timm_multilabel.loading.loaders import create_eval_loader, create_train_loader
from timm_multilabel.loading.sampling import Draw
from timm_multilabel.loading.shared import SharedBytes
from timm_multilabel.loading.soft_labels import Answers, SoftLabels
from timm_multilabel.views.opencv import OpenCVViews
from timm_multilabel.views.pillow import eval_views
from timm_multilabel.views.recipe import ViewRecipe
from timm_multilabel.views.told import Told

NOTHING = Told()
VIEWS = OpenCVViews([ViewRecipe((16, 16))] * 2)
CPU = torch.device('cpu')


@pytest.fixture
def photos_dir(tmp_path):
    """12 JPEGs of several sizes for training, among them large ones and one that EXIF turns."""
    folder = write_data(tmp_path / 'data')
    for number in range(12):
        exif = Image.Exif()
        if number == 5:
            exif[0x0112] = 6
        size = [(40, 30), (33, 47), (300, 260)][number % 3]
        Image.fromarray(picture(*size, number)).save(folder / 'images' / f'{number}.png', 'JPEG', exif=exif)
    return folder


def files(folder, split='train'):
    return FilePhotos(encode_rows(read_table(Path(folder) / f'{split}.csv'), SPACE))


def opened(folder, kind='ram', views=VIEWS, skip_bad=False, split='train', said=None):
    return open_cache(
        kind,
        files(folder, split),
        views,
        folder=Path(folder) / 'cache',
        workers=2,
        skip_bad=skip_bad,
        say=said.append if said is not None else lambda line: None,
    )


def batch(photos, views=VIEWS, count=2):
    rows = photos.rows if isinstance(photos, FilePhotos) else photos.files.rows
    return Batches([ImageDataset(rows, photos, views)], count).__getitems__([Draw(row, 10 + row) for row in range(12)])


@pytest.mark.parametrize('kind', ['ram', 'disk'])
@pytest.mark.parametrize('views', [VIEWS, OpenCVViews([ViewRecipe((16, 16), scale=(0.5, 1.0))]),
                                   eval_views((16, 16), 'bicubic', 0.9, 'center'),
                                   eval_views((16, 16), 'bicubic', 1.0, 'border')],
                         ids=['two', 'large', 'eval', 'borders'])
def test_cache_equals_no_cache_to_the_byte(photos_dir, kind, views):
    count = len(getattr(views, 'recipes', [0]))
    cached = opened(photos_dir, kind, views)
    assert isinstance(cached, CachedPhotos)
    expected = batch(files(photos_dir), views, count)
    for photos in (cached, pickle.loads(pickle.dumps(cached)), opened(photos_dir, kind, views)):
        for made, its in zip(batch(photos, views, count), expected, strict=True):
            assert torch.equal(made, its)


def test_large_images_are_kept_at_the_scales_that_crops_ask_for(photos_dir):
    cached = opened(photos_dir)
    levels = {row: [reduction for reduction, _ in cached.contents.levels(row)] for row in range(12)}
    assert levels[0] == [1] and levels[1] == [1, 2] and levels[2] == [4, 8]  # 40x30, 33x47 and 300x260 to 16
    assert cached.contents.lengths()[2] == 3 * (75 * 65 + 38 * 33)


def _read_in_another_process(photos, queue):
    queue.put(photos[3].decode().sum())


@pytest.mark.slow
@pytest.mark.parametrize('method', ['fork', 'spawn'])
def test_memory_is_shared_with_workers(photos_dir, method):
    cached = opened(photos_dir)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_read_in_another_process, args=(cached, queue))
    process.start()
    assert queue.get(timeout=240) == cached[3].decode().sum()
    process.join()


def test_memory_is_given_back(photos_dir):
    before = len(os.listdir('/proc/self/fd'))
    for _ in range(3):
        opened(photos_dir)
    assert len(os.listdir('/proc/self/fd')) == before


def test_disk_cache_is_made_once_and_never_stale(photos_dir):
    said = []
    opened(photos_dir, 'disk', said=said)
    opened(photos_dir, 'disk', said=said)
    assert 'decodes 12 images into' in said[0] and said[1].endswith('whole and up to date') and len(said) == 2
    path = photos_dir / 'images' / '4.png'
    times = os.stat(path)
    Image.fromarray(255 - picture(33, 47, 4)).save(path, 'JPEG')
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a copy that keeps times would
    cached = opened(photos_dir, 'disk', said=said)
    assert '1 of 12 images have changed' in said[2] and 'decodes 12 images' in said[3]
    assert torch.equal(batch(cached)[0], batch(files(photos_dir))[0])
    other = opened(photos_dir, 'disk', OpenCVViews([ViewRecipe((32, 32))]), said=said)
    assert 'decodes 12' in said[4] and other.shared.path != cached.shared.path
    assert {path.suffix for path in (photos_dir / 'cache').iterdir()} == {'.bin', '.npz'}


@pytest.mark.parametrize('damage', ['index', 'half', 'none'])
def test_a_damaged_cache_is_made_again(photos_dir, damage):
    expected = batch(files(photos_dir))[0]
    opened(photos_dir, 'disk')
    (path,) = (photos_dir / 'cache').glob('*.bin')
    if damage == 'half':
        os.truncate(path, 1000)
    elif damage == 'index':
        next((photos_dir / 'cache').glob('*.npz')).write_bytes(b'PK\3\4 nothing')
    else:
        path.unlink()
    assert torch.equal(batch(opened(photos_dir, 'disk'))[0], expected)


def test_a_run_keeps_its_cache_while_another_makes_it_anew(photos_dir):
    mine = opened(photos_dir, 'disk')
    expected = batch(mine)[0]
    Image.fromarray(picture(90, 90, 99)).save(photos_dir / 'images' / '0.png', 'JPEG')
    opened(photos_dir, 'disk')
    assert torch.equal(batch(mine)[0], expected)
    assert torch.equal(batch(pickle.loads(pickle.dumps(mine)))[0], expected)
    assert len(list((photos_dir / 'cache').iterdir())) == 2  # the old file is gone


def test_what_does_not_fit_is_left_out_with_a_line(photos_dir, monkeypatch):
    said = []
    monkeypatch.setattr(cache, 'free_memory', lambda: 50_000)
    assert isinstance(opened(photos_dir, said=said), FilePhotos)
    assert len(said) == 1 and 'would not fit into the 0.0 MB' in said[0] and said[0].endswith('goes on without it')


def test_an_estimate_is_enough_for_a_large_data_set(photos_dir, monkeypatch):
    said, asked = [], []
    monkeypatch.setattr(cache, 'free_memory', lambda: 10_000)
    monkeypatch.setattr(cache, '_SAMPLED', 3)
    monkeypatch.setattr(FilePhotos, '__getitem__', lambda self, index, get=FilePhotos.__getitem__: (
        asked.append(index), get(self, index))[1])
    assert isinstance(opened(photos_dir, said=said), FilePhotos)
    assert said[0].partition(': ')[2].startswith('--cache ram: some ') and asked == [0, 4, 8]


def test_bad_images_while_a_cache_is_made(photos_dir):
    (photos_dir / 'images' / '1.png').write_bytes(b'')
    spoil(photos_dir / 'images' / '2.png')
    with pytest.raises(UserError, match=r'images/[12]\.png \(.*train\.csv row [34]\): cannot be decoded'):
        opened(photos_dir, 'disk')
    assert not list((photos_dir / 'cache').iterdir())
    index = cache._indices(files(photos_dir), VIEWS, photos_dir / 'cache')[0]
    left = photos_dir / 'cache' / f'.{index.stem}-{"0" * 16}.tmp'
    left.write_bytes(b'of a run that was killed')
    os.utime(left, (0, 0))
    for kind in ('ram', 'disk', 'disk'):
        cached = opened(photos_dir, kind, skip_bad=True)
        assert cached.contents.bad.nonzero()[0].tolist() == [1, 2]
        part = ImageDataset(cached.files.rows, cached, VIEWS).skip_bad()
        train = create_train_loader([(part, 4)], views=2, seed=0, workers=0, **PLAIN)
        uncached = ImageDataset(cached.files.rows, cached.files, VIEWS).skip_bad()
        for (made, _), (expected, _) in zip(
                train, create_train_loader([(uncached, 4)], views=2, seed=0, workers=0, **PLAIN), strict=True):
            assert torch.equal(made, expected)
        assert part.bad.nonzero().flatten().tolist() == [1, 2]
    assert not left.exists()


def _open_in_a_rank(rank, folder, kind, machines, free):
    socket.gethostname = lambda: machines[rank]
    cache.free_memory = lambda: free[rank]
    said = []
    cached = opened(f'{folder}/{machines[rank]}', kind, said=said)
    result = batch(cached)[0].long().sum().item(), type(cached).__name__, said
    torch.distributed.barrier()  # the first rank's memory is there while the others map it
    return result


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['ram', 'disk'])
def test_ranks_of_a_machine_share_a_cache(photos_dir, kind):
    expected = batch(files(photos_dir))[0].long().sum().item()
    (photos_dir / 'one').symlink_to(photos_dir)
    first, second = run_ranks(_open_in_a_rank, 2, str(photos_dir), kind, ['one', 'one'], [1e9, 1e9])
    assert first[:2] == second[:2] == (expected, 'CachedPhotos')
    assert len(first[2]) == 1 and not second[2]


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['ram', 'disk'])
def test_machines_may_differ(photos_dir, tmp_path, kind):
    """One has the cache, or room for it, and the other has not: none waits for ever."""
    for name in ('one', 'two'):
        shutil.copytree(photos_dir, photos_dir.parent / 'machines' / name)
    folder = photos_dir.parent / 'machines'
    if kind == 'disk':
        opened(folder / 'two', 'disk')
    first, second = run_ranks(_open_in_a_rank, 2, str(folder), kind, ['one', 'two'], [1000, 1e9])
    assert first[0] == second[0]
    assert [first[1], second[1]] == (['FilePhotos', 'CachedPhotos'] if kind == 'ram' else ['CachedPhotos'] * 2)


def device_part(folder, recipes, split='train', skip_bad=False, soft_labels=None, told=NOTHING):
    cached = opened(folder, 'ram', OpenCVViews(recipes), skip_bad, split)
    return cached, device.DeviceDataset.copy(cached, recipes, CPU, soft_labels, told)


@pytest.mark.parametrize(('ranks', 'told'), [(1, NOTHING), (2, NOTHING), (1, Told(plain=True, parameters=True))])
def test_the_device_makes_the_loaders_batches(photos_dir, ranks, told):
    """The same rows, targets and views, pool behind labelled ones in each view. Pixels: see test_views."""
    recipes = [ViewRecipe((16, 16))] * 2
    pool_recipes = [ViewRecipe((16, 16), scale=(0.8, 1.0), blur_prob=0.0), recipes[0]]
    (cached, labelled), (pool_cached, pool) = (
        device_part(photos_dir, recipes, told=told), device_part(photos_dir, pool_recipes, 'val', told=told))
    for rank in range(ranks):
        common = {'views': 2, 'seed': 3, 'rank': rank, 'ranks': ranks, 'steps': 5}
        made = device.DeviceTrainLoader([(labelled, 3), (pool, 2)], mean=(0.0,) * 3, std=(1.0,) * 3, **common)
        expected = create_train_loader(
            [
                (ImageDataset(cached.files.rows, cached, OpenCVViews(recipes, told)), 3),
                (ImageDataset(pool_cached.files.rows, pool_cached, OpenCVViews(pool_recipes, told)), 2),
            ],
            workers=0,
            **PLAIN,
            **common,
        )
        for epoch in (0, 1):
            made.set_epoch(epoch), expected.set_epoch(epoch)
            pairs = list(zip(made, expected, strict=True))
            assert len(pairs) == len(made) == 5
            for (images, targets), (theirs, their_targets) in pairs:
                assert images.shape == (10, 3, 16, 16) and targets.shape[1] == 2 + told.width
                torch.testing.assert_close(targets, their_targets, check_dtype=False)
                off = 255 * (images - theirs).abs()
                # Large images are kept at half scale, where the host may take a quarter.
                small = off.mean(dim=(1, 2, 3)) < 0.6
                assert off.mean() < 3 and small.float().mean() >= 0.4


def test_a_step_on_device_images_waits_for_nothing(photos_dir):
    _, part = device_part(photos_dir, [ViewRecipe((16, 16))] * 2, told=Told(plain=True, parameters=True))
    batches = iter(device.DeviceTrainLoader(
        [(part, 4)], views=2, seed=0, mean=(0.5,) * 3, std=(0.2,) * 3, re_prob=1.0, re_mode='pixel'))
    next(batches)  # the draws of the pass came to the device with it
    with Operations() as seen:
        next(batches)
    assert len(seen.names) > 20 and not seen.names & WAITS


def test_the_device_replaces_bad_images_as_a_loader_does(photos_dir):
    """With the soft labels of the image that takes the place."""
    spoil(photos_dir / 'images' / '2.png')
    (photos_dir / 'images' / '7.png').write_bytes(b'')
    recipes = [ViewRecipe((16, 16), jitter_prob=0.0, blur_prob=0.0, grayscale_prob=0.0)] * 2
    answers = Answers(SharedBytes.in_memory(Answers.size(12, 2)), 2)
    answers.array[:] = np.arange(24).reshape(12, 2)
    soft_labels = SoftLabels(answers, np.arange(12)[::-1].copy())
    cached, part = device_part(photos_dir, recipes, skip_bad=True, soft_labels=soft_labels)
    common = {'views': 2, 'seed': 5, 'steps': 6}
    host = create_train_loader(
        [(ImageDataset(cached.files.rows, cached.files, OpenCVViews(recipes), soft_labels=soft_labels).skip_bad(), 12)],
        workers=0,
        **PLAIN,
        **common,
    )
    made = device.DeviceTrainLoader([(part, 12)], mean=(0.0,) * 3, std=(1.0,) * 3, **common)
    for (images, targets), (theirs, their_targets) in zip(made, host, strict=True):
        assert torch.equal(targets, their_targets) and targets.shape == (24, 4)
        assert set(targets[:, 2].tolist()) <= set(range(0, 24, 2)) - {2 * (11 - 2), 2 * (11 - 7)}
        assert 255 * (images - theirs).abs().mean() < 3
    for path in (photos_dir / 'images').iterdir():
        path.write_bytes(b'')
    with pytest.raises(UserError, match='all of its 12 images are bad'):
        device_part(photos_dir, recipes, skip_bad=True)


def test_evaluation_stays_on_the_device(photos_dir):
    normal = {'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD}
    part = ImageDataset(files(photos_dir).rows, files(photos_dir), eval_views((16, 16), 'bilinear', 1.0, 'center'))
    loader = create_eval_loader(part, 5, workers=0, device=CPU, **normal)
    kept = device.DeviceEvalLoader(loader, **normal)
    expected = [(images.clone(), targets) for images, targets in loader]
    first = list(kept)
    part.photos = None
    for made in (first, list(kept)):
        for (images, targets), (theirs, their_targets) in zip(made, expected, strict=True):
            assert torch.equal(images, theirs) and torch.equal(targets, their_targets)


def run(folder, output, *flags):
    run_command('train', 'train.py', [
        str(folder), '--model', 'test_resnet', '--img-size', '32', '-b', '4', '-j', '0', '--device', 'cpu', '--lr',
        '0.01', '--epochs', '2', '--warmup-epochs', '0', '--cooldown-epochs', '0', '--output', str(output), *flags])
    folder = next(output.iterdir())
    return torch.load(folder / 'last.pth.tar', weights_only=True)['state_dict'], pd.read_csv(folder / 'summary.csv')


@pytest.mark.slow
def test_a_run_is_the_same_with_and_without_a_cache(photos_dir, tmp_path, capsys):
    plain, _ = run(photos_dir, tmp_path / 'plain')
    for kind in ('ram', 'disk'):
        cached, _ = run(photos_dir, tmp_path / kind, '--cache', kind, *(
            ['--cache-dir', str(tmp_path / 'cache')] if kind == 'disk' else []))
        assert all(torch.equal(cached[name], value) for name, value in plain.items())
    assert 'val.csv: --cache disk: decodes 6 images' in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_on_device_images(photos_dir, tmp_path, capsys):
    _, plain = run(photos_dir, tmp_path / 'plain')
    _, device_run = run(photos_dir, tmp_path / 'device', '--cache', 'device')
    assert 'on cpu, where the views are made' in capsys.readouterr().out
    assert device_run['train_loss'].to_numpy() == pytest.approx(plain['train_loss'].to_numpy(), rel=0.05)


@pytest.mark.slow
def test_a_run_that_leaves_bad_images_out_says_so(photos_dir, tmp_path, capsys):
    spoil(photos_dir / 'images' / '2.png')
    spoil(photos_dir / 'images' / '14.png')
    with pytest.raises(SystemExit) as stop:
        run(photos_dir, tmp_path / 'stops')
    assert stop.value.code == 2 and 'images/2.png' in capsys.readouterr().err
    for flags in ([], ['--cache', 'ram'], ['--cache', 'device']):
        _, summary = run(photos_dir, tmp_path / '-'.join(['out', *flags]), '--skip-bad-images', *flags)
        assert summary['bad_images'].tolist() == [2, 2]
        out = capsys.readouterr().out
        assert out.count('2 images that cannot be decoded, left out (2 so far)') == 1 and 'train.csv row 4)' in out


@pytest.mark.slow
def test_validation_leaves_bad_images_out(photos_dir, tmp_path, capsys):
    run(photos_dir, tmp_path / 'run')
    spoil(photos_dir / 'images' / '14.png')
    checkpoint = next((tmp_path / 'run').glob('*/last.pth.tar'))
    flags = [str(photos_dir), '--checkpoint', str(checkpoint), '-j', '0', '--device', 'cpu']
    with pytest.raises(SystemExit):
        run_command('validate', 'validate.py', flags)
    capsys.readouterr()
    run_command('validate', 'validate.py', [*flags, '--skip-bad-images', '--results-file', str(tmp_path / 'r.json')])
    assert '1 image that cannot be decoded, left out (1 so far): ' in capsys.readouterr().out
    assert json.loads((tmp_path / 'r.json').read_text())['heads']['color']['labels'] == 5


@pytest.mark.slow
def test_the_device_that_is_too_small(photos_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(device, 'free_memory', lambda: 1000)
    plain, _ = run(photos_dir, tmp_path / 'plain')
    made, _ = run(photos_dir, tmp_path / 'device', '--cache', 'device')
    assert 'of cpu that may be used; goes on with --cache ram' in capsys.readouterr().out
    assert all(torch.equal(made[name], value) for name, value in plain.items())
    assert np.isfinite(sum(value.double().sum().item() for value in made.values()))
