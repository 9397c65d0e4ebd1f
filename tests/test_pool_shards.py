"""The pool in shards: beside a table and beside shards, in its own share of batches, without images known otherwise."""
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from common import TINY, assert_same_summary, assert_same_weights, run_ranks, train_run, train_settings
from PIL import Image
from test_resume import killed_run
from test_streams import PLAIN

from timm_multilabel.assembly.data import read_data
from timm_multilabel.assembly.first_views import first_views
from timm_multilabel.assembly.pool_shards import read_fingerprints
from timm_multilabel.assembly.splits import Splits
from timm_multilabel.data.fingerprints import Fingerprints, KeptOut, fingerprint, fingerprints_of_files
from timm_multilabel.data.images import FilePhotos
from timm_multilabel.data.packing import pack
from timm_multilabel.data.shards import find_shards
from timm_multilabel.data.streams import Stored, encode, read_labels, table_of_labels
from timm_multilabel.data.table import encode_rows, read_table
from timm_multilabel.data.table_format import TableFormat
from timm_multilabel.labels import LabelSet, LabelSpace
from timm_multilabel.loading.batches import ImageDataset
from timm_multilabel.loading.loaders import create_train_loader
from timm_multilabel.loading.streaming import KeptOutOfPool, StreamedImages, create_joined_loader
from timm_multilabel.training.checkpoint import read_checkpoint
from timm_multilabel.views.opencv import OpenCVViews
from timm_multilabel.views.recipe import ViewRecipe

IDS = LabelSpace((LabelSet('id', tuple(f'{number:02d}' for number in range(12))),))


def photos(folder, others=(), count=8):
    """A table of photos of noise, and of copies of others under new names."""
    (folder / 'photos').mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / 'photos' / f'{number:02d}.png')
    for number, other in enumerate(others, count):
        shutil.copy(other, folder / 'photos' / f'{number:02d}.png')
    names = [f'photos/{number:02d}.png' for number in range(count + len(others))]
    pd.DataFrame({'image_path': names, 'id': [name[-6:-4] for name in names]}).to_csv(folder / 'pool.csv', index=False)
    return read_table(folder / 'pool.csv')


def pool_of(data_dir, tmp_path, kind='webdataset', place=None):
    """Shards `pool` of 8 photos, of a labelled one and of a scored one."""
    table = photos(tmp_path / 'photos', [data_dir / 'images' / name for name in ('3.png', '14.png')])
    pack(table, place or data_dir, 'pool', kind, size=2)


def read(data_dir, *words):
    """The data of a run, and what is said of them."""
    said = []
    flags = ['-b', '4', '--unlabelled-batch-size', '2', '--unlabelled', 'pool']
    return read_data(train_settings(str(data_dir), *flags, *words), said.append), '\n'.join(said)


def test_images_are_known_by_their_bytes(tmp_path):
    for name in 'abc':
        (tmp_path / name).write_bytes(name.encode() * 3_000_000)
    known = Fingerprints(each for each in fingerprints_of_files([str(tmp_path / name) for name in 'ab'], 2))
    assert len(known) == 2 and b'a' * 3_000_000 in known and b'c' * 3_000_000 not in known and b'' not in known
    assert list(fingerprints_of_files([str(tmp_path / 'none'), str(tmp_path)], 1)) == [None, None]
    assert fingerprint(b'a' * 3_000_000) in known.hashes.tolist() and b'a' not in Fingerprints([])


def test_scored_images_of_tables_and_of_shards_are_kept_out(data_dir, tmp_path):
    table = photos(tmp_path / 'more', count=4)
    pack(table, tmp_path, 'test', 'parquet')
    images, said = sorted((data_dir / 'images').iterdir()), []
    shards = find_shards(tmp_path, 'test', 'image_path')
    known = read_fingerprints(KeptOut((str(images[0]), str(tmp_path / 'gone.png')), (shards,)), 2, said.append)
    assert len(known) == 5 and all(path.read_bytes() in known for path in (tmp_path / 'more' / 'photos').iterdir())
    assert '1 labelled or scored images cannot be read' in said[1] and len(said) == 2
    (tmp_path / 'test-00000-of-00001.parquet').write_bytes(b'nothing')
    assert len(read_fingerprints(KeptOut((str(images[0]),), (shards,)), 2, said.append)) == 1
    assert 'cannot be read as Parquet' in said[-1] and 'cannot keep its images out' in said[-1]


def test_scored_images_of_shards_are_kept_out_of_a_folder_by_their_bytes(data_dir, tmp_path):
    table = photos(tmp_path / 'more', [data_dir / 'images' / name for name in ('3.png', '14.png')])
    pack(table, data_dir, 'test', 'webdataset', size=5)
    pictures = tmp_path / 'pictures'
    pictures.mkdir()
    for number, path in enumerate(sorted((tmp_path / 'more' / 'photos').iterdir())[:3]):
        shutil.copy(path, pictures / f'x{number}.png')
        (pictures / f'y{number}.png').write_bytes(path.read_bytes()[:-1] + b'x')  # as long, and another one
    data, said = read(data_dir, '--unlabelled', str(pictures))
    assert [name[-6:] for name in data.pool_rows.images] == ['y0.png', 'y1.png', 'y2.png']
    assert f'hashing the images of {data_dir}/test-*.tar' in said
    assert '3 of 6 unlabelled images are labelled, or of the val or test split: left out' in said


def test_tars_are_counted_once_and_only_where_it_matters(data_dir, tmp_path):
    pool_of(data_dir, tmp_path)
    data, said = read(data_dir, '--epoch-steps', '7')
    assert 'counting' not in said and data.steps == 7 and str(data).endswith('and uncounted ones without labels, 6 to '
                                                                             'evaluate on')
    assert 'counting' not in read(data_dir, '--epoch-by', 'labelled')[1] and not (data_dir / 'rows.json').exists()
    data, said = read(data_dir)
    assert f'{data_dir}/pool-*.tar: counting the samples; --epoch-by labelled' in said
    assert (len(data.pool_rows), data.steps, data.pool_batch_size) == (10, 5, 2)
    assert (data_dir / 'rows.json').read_text().split() == ['{', '"pool":', '10', '}']
    data, said = read(data_dir)
    assert 'counting' not in said and data.steps == 5
    flags = ['-b', '4', '--unlabelled', 'pool', '-wls', '0', '--pseudo-label-weight', '1']
    assert read_data(train_settings(str(data_dir), *flags), print).pool_batch_size == 10  # all that there are
    (data_dir / 'rows.json').unlink()
    assert read_data(train_settings(str(data_dir), *flags, '--epoch-steps', '2'), print).pool_batch_size == 28


def test_parquet_knows_its_count_wherever_it_lies(data_dir, tmp_path, monkeypatch):
    (tmp_path / 'elsewhere').mkdir()
    pool_of(data_dir, tmp_path, 'parquet', tmp_path / 'elsewhere')
    monkeypatch.chdir(tmp_path)
    for source in ('elsewhere', 'elsewhere/*.parquet', str(tmp_path / 'elsewhere' / 'pool')):
        data, said = read(data_dir, '--unlabelled', source)
        assert len(data.pool_rows) == 10 and 'counting' not in said and len(data.pool_rows.shards.files) == 5
    assert len(data.pool_rows.kept_out.files) == 18  # 12 labelled ones, 6 scored ones


def test_rows_without_a_label_and_shards_of_splits_are_left_out(data_dir, tmp_path):
    pool_of(data_dir, tmp_path)
    pack(read_table(data_dir / 'val.csv'), data_dir, 'val', 'webdataset', size=3)
    (data_dir / 'val.csv').unlink()
    data, said = read(data_dir, '--unlabelled', '*.tar', '--labelled-rows', '8', '--heads', 'color')
    assert '4 rows without a label are left out, as the unlabelled images are in shards' in said
    assert '2 of 7 unlabelled shards are of the training, val or test split: left out' in said
    assert len(data.train_rows) == 8 and len(data.pool_rows) == 10 and len(data.pool_rows.kept_out.files) == 8
    assert [shards.source.name for shards in data.pool_rows.kept_out.shards] == ['val-*.tar']


def test_simclr_alone_takes_rows_and_shards_by_their_share(data_dir, tmp_path):
    pool_of(data_dir, tmp_path, 'parquet')
    data, _ = read(data_dir, '-wlc', '0')  # 12 rows, 10 samples; 4 + 2 images a step
    assert (data.batch_size, data.pool_batch_size, data.steps) == (3, 3, 3)
    rare = data_dir / 'train.csv'
    rare.write_text('\n'.join(rare.read_text().splitlines()[:2]) + '\n')
    data, said = read(data_dir, '-wlc', '0', '-b', '2')
    assert data.pool_rows is None and (data.batch_size, len(data.train_rows), data.steps) == (4, 10, 2)
    assert f'{rare}: 1 of 11 images are less than one in a batch of 4: left out' in said


def create(labelled, pool, rank=0, ranks=1, workers=0, steps=4):
    """Two labelled images and two of the pool in a batch; the loader."""
    views = OpenCVViews([ViewRecipe((16, 16))] * 2)
    known = Fingerprints(each for each in fingerprints_of_files(labelled.images.tolist(), 1))
    parts = [(ImageDataset(labelled, FilePhotos(labelled), views), 2), (StreamedImages(pool, views, known), 2)]
    return create_joined_loader(
        parts, views=2, seed=7, steps=steps, rank=rank, ranks=ranks, workers=workers, **PLAIN)


def ids(batches, first, last):
    return [int(index) for _, targets in batches for index in targets[first:last, 0]]


def halves(folder):
    """Rows of a table with every third photo of the pool, and the pool, whose targets tell the samples here."""
    few = pd.read_csv(folder / 'pool.csv', dtype=str)[::3]
    few.to_csv(folder / 'few.csv', index=False)
    shards = find_shards(folder, 'pool', 'image_path')
    return encode_rows(read_table(folder / 'few.csv'), IDS), encode(
        table_of_labels(shards, [read_labels(shards.samples(images=False))]), IDS)


def _pass(rank, folder):
    labelled, pool = halves(folder)
    loader = create(labelled, pool, rank, 2, steps=2)
    batches = list(loader)
    news = KeptOutOfPool(loader.streamed[0])
    counted = Splits(Stored.load(folder), None, print, TableFormat()).count(pool.shards, 'pool')
    known = read_fingerprints(KeptOut(tuple(labelled.images), (pool.shards,)), 1, print)
    return ids(batches, 0, 2), ids(batches, 2, 4), news.news(), news.news(), counted, known.hashes.tolist()


@pytest.mark.slow
def test_two_processes_share_a_pass_as_one_has_it(tmp_path):
    """Of 12 samples four are labelled, one in each of four shards."""
    pack(photos(tmp_path, count=12), tmp_path, 'pool', 'webdataset', size=3)
    labelled, pool = halves(tmp_path)
    alone = create(labelled, pool)
    batches = list(alone)
    assert sorted(ids(batches, 2, 4)) == [1, 2, 4, 5, 7, 8, 10, 11] and set(ids(batches, 0, 2)) == {0, 3, 6, 9}
    (rows, samples, line, again, *found), (others, theirs, same, _, *its) = run_ranks(_pass, 2, tmp_path)
    images = sorted(fingerprint(path.read_bytes()) for path in (tmp_path / 'photos').iterdir())
    assert found == its == [12, images] and (tmp_path / 'rows.json').read_text().split()[1:3] == ['"pool":', '12']
    assert sorted(samples + theirs) == [1, 2, 4, 5, 7, 8, 10, 11] and sorted(rows + others) == sorted(2 * [0, 3, 6, 9])
    assert line == same and again is None
    kept_out, read = map(int, re.search(r'/pool-\*.tar: (\d+) of the (\d+) samples read', line).groups())
    assert read - kept_out == 8 and kept_out <= 4


@pytest.mark.parametrize('workers', [0, 2])
def test_labelled_batches_are_those_without_shards(tmp_path, workers):
    pack(photos(tmp_path, count=12), tmp_path, 'pool', 'webdataset', size=3)
    labelled, pool = halves(tmp_path)
    views = OpenCVViews([ViewRecipe((16, 16))] * 2)
    plain = create_train_loader([(ImageDataset(labelled, FilePhotos(labelled), views), 2)], views=2, seed=7, steps=5,
                                workers=0, **PLAIN)
    joined = create(labelled, pool, workers=workers, steps=5)
    for loader in (plain, joined):
        loader.set_epoch(3, 1)
    expected, batches = list(plain), list(joined)
    assert len(batches) == 4
    for (images, targets), (theirs, their_targets) in zip(batches, expected, strict=True):
        assert torch.equal(images.unflatten(0, (2, 4))[:, :2].flatten(0, 1), theirs)
        assert torch.equal(targets.unflatten(0, (2, 4))[:, :2].flatten(0, 1), their_targets)
    assert joined.order_depends_on == workers and joined.rows_of(3, 1)[2:] == [
        f'batch 2 of epoch 4 of the shards {tmp_path}/pool-*.tar']
    assert joined.rows_of(3, 1)[:2] == plain.rows_of(3, 1)


def stopped(capsys, data_dir, tmp_path, *flags):
    with pytest.raises(SystemExit) as stop:
        train_run(data_dir, tmp_path / 'refused', '--unlabelled', 'pool', *flags, epochs=1)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1 and not (tmp_path / 'refused').exists()
    return error


def test_what_is_refused(data_dir, tmp_path, capsys):
    photos(tmp_path / 'photos', [data_dir / 'images' / '3.png'] * 4, count=0)
    pack(read_table(tmp_path / 'photos' / 'pool.csv'), data_dir, 'pool', 'parquet')
    error = stopped(capsys, data_dir, tmp_path, '--cache', 'device')
    assert '--cache device: the unlabelled images of' in error and 'pass --cache ram or disk' in error
    error = stopped(capsys, data_dir, tmp_path, '--unlabelled-batch-size', '5')
    assert '4 unlabelled images do not fill a batch of 5' in error
    (data_dir / 'rows.json').write_text('{"pool": 100000}')
    with pytest.raises(SystemExit):
        train_run(data_dir, tmp_path, '--unlabelled', 'pool', epochs=1)
    assert 'all images in the share of process 1 of 1 are labelled or scored elsewhere' in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize('kind, workers, flags', [
    ('webdataset', '2', ['--cache', 'ram', '--entropy-weight', '0.1', '--marginal-entropy-weight', '0.1']),
    ('parquet', '0', ['-wls', '0', '--pseudo-label-weight', '1', '--pseudo-label-threshold', '0.5',
                      '--unlabelled-batch-size', '3', '--skip-bad-images']),
])
def test_killed_and_resumed_with_a_pool_in_shards(data_dir, tmp_path, monkeypatch, capsys, kind, workers, flags):
    pool_of(data_dir, tmp_path, kind)
    flags = ['--unlabelled', 'pool', '-j', workers, '--checkpoint-steps', '1', '--epoch-steps', '4', *flags]
    whole = train_run(data_dir, tmp_path / 'whole', *flags)
    said = capsys.readouterr().out
    assert 'hashing 18 labelled and scored images' in said
    assert int(re.search(r'(\d+) of the \d+ samples read in this epoch are images that are labelled', said)[1]) >= 2
    part = killed_run(data_dir, tmp_path / 'part', monkeypatch, 5, *flags, epochs=2)
    train_run(data_dir, tmp_path / 'part', *flags, '--resume', 'auto')
    assert_same_weights(whole / 'last.pth.tar', part / 'last.pth.tar')
    assert_same_summary(whole, part)
    row = pd.read_csv(whole / 'summary.csv').iloc[-1]
    assert row[['entropy_loss', 'simclr_loss'] if '--cache' in flags else ['pseudo_label_loss']].notna().all()
    if '--cache' in flags:
        assert '--cache ram: keeps the images of tables; those of' in said
        teacher = ['--teacher', str(whole / 'last.pth.tar')]
        assert 'nothing is kept of shards' in stopped(capsys, data_dir, tmp_path, *teacher)
        taught = train_run(data_dir, tmp_path / 'taught', '--unlabelled', 'pool', *teacher, '--teacher-views', epochs=1)
        assert pd.read_csv(taught / 'summary.csv')['teacher_loss'].notna().all()
        settings = train_settings(str(data_dir), *TINY, '--unlabelled', 'pool')
        pictures, line = first_views(settings, taught, None, read_checkpoint(taught / 'last.pth.tar').data_config)
        assert len(pictures) == 12 and 'unlabelled' not in line  # for the report: labelled photos alone


@pytest.mark.slow
def test_shards_beside_a_pool(data_dir, tmp_path):
    """Labelled shards beside a pool in shards of the other kind, and beside a folder."""
    pool_of(data_dir, tmp_path, 'parquet')
    for name in ('train', 'val'):
        pack(read_table(data_dir / f'{name}.csv'), data_dir, name, 'webdataset', size=3)
        (data_dir / f'{name}.csv').unlink()
    for number, source in enumerate(('pool', str(tmp_path / 'photos' / 'photos'))):
        folder = train_run(data_dir, tmp_path / str(number), '--unlabelled', source, '--entropy-weight', '0.1',
                           '--unlabelled-batch-size', '2', '-j', '2', epochs=1)
        assert pd.read_csv(folder / 'summary.csv')['entropy_loss'].notna().all()
