"""WebDataset shards and Parquet tables -> batches; training and validation on them."""
import io
import json
import shutil
import sys
import tarfile

import numpy as np
import pandas as pd
import pyarrow
import pytest
import torch
from common import assert_same_weights, run_ranks
from datasets import ClassLabel, Features, List, Value
from PIL import Image
from pyarrow import parquet
from test_training import TINY, validated

from timm_multilabel.assembly.splits import Splits
from timm_multilabel.cells import list_cell
from timm_multilabel.cli.main import run_command
from timm_multilabel.config.commands import SHARD_FORMATS
from timm_multilabel.data.packing import pack
from timm_multilabel.data.shards import even_workers, find_shards
from timm_multilabel.data.streams import Stored, encode, read_labels, table_of_labels
from timm_multilabel.data.table import find_label_space, read_table
from timm_multilabel.data.table_format import TableFormat
from timm_multilabel.errors import UserError
from timm_multilabel.labels import LabelSet, LabelSpace, Quantity, TagSet
from timm_multilabel.loading.batches import BadImages
from timm_multilabel.loading.streaming import create_stream_loader
from timm_multilabel.views.opencv import OpenCVViews
from timm_multilabel.views.recipe import ViewRecipe

PLAIN = {'mean': (0.0, 0.0, 0.0), 'std': (1.0, 1.0, 1.0), 'device': torch.device('cpu')}
IDS = LabelSpace((LabelSet('id', tuple(f'{number:02d}' for number in range(12))),))


@pytest.fixture(params=SHARD_FORMATS)
def kind(request):
    return request.param


@pytest.fixture
def shards(data_dir, tmp_path, kind):
    """12 training pictures, each a class of its own, in four shards."""
    path = data_dir / 'train.csv'
    pd.read_csv(path).assign(id=IDS.heads[0].classes).to_csv(path, index=False)
    assert len(pack(read_table(path), tmp_path, 'train', kind, size=3)) == 4
    return find_shards(tmp_path, 'train', 'image_path')


def rows(shards, label_space=IDS):
    return encode(table_of_labels(shards, [read_labels(shards.samples(images=False))]), label_space)


def loader(rows, batch=3, workers=0, **kwargs):
    make = OpenCVViews([ViewRecipe((16, 16))] * 2)
    return create_stream_loader(rows, make, batch, views=2, seed=7, workers=workers, **PLAIN, **kwargs)


def ids(batches):
    return [int(index) for _, targets in batches for index in targets[:len(targets) // 2, 0]]


@pytest.mark.slow
@pytest.mark.parametrize('ranks', [1, 2, 3, 5])
@pytest.mark.parametrize('workers', [0, 2])
def test_evaluation_counts_every_sample_once(shards, ranks, workers):
    """Also where there are more ranks than shards."""
    shares = [ids(loader(rows(shards), rank=rank, ranks=ranks, workers=workers)) for rank in range(ranks)]
    assert sorted(sum(shares, [])) == list(range(12))
    assert all(shares)


def test_evaluation_without_workers_is_in_order(shards):
    batches = loader(rows(shards), batch=5)
    assert ids(batches) == list(range(12)) and len(batches) == 3
    images, targets = next(iter(batches))
    assert images.shape == (10, 3, 16, 16) and torch.equal(targets[:5], targets[5:])


@pytest.mark.slow
@pytest.mark.parametrize('workers', [0, 2])
def test_ranks_have_as_many_steps_and_disjoint_samples(shards, workers):
    shares = [ids(loader(rows(shards), rank=rank, ranks=2, steps=2, workers=workers)) for rank in range(2)]
    assert [len(set(share)) for share in shares] == [6, 6] and sorted(sum(shares, [])) == list(range(12))
    assert shares[0] + shares[1] != sorted(shares[0] + shares[1])


@pytest.mark.slow
@pytest.mark.parametrize('workers', [0, 2])
def test_epochs_differ_and_repeat_and_go_on_with_another_pass(shards, workers):
    batches = loader(rows(shards), steps=10, workers=workers)

    def epoch(number):
        batches.set_epoch(number)
        return ids(batches)

    first = epoch(3)
    assert len(first) == 30 and set(first) == set(range(12))
    assert epoch(4) != first and epoch(3) == first


@pytest.mark.slow
def test_views_of_a_sample_do_not_depend_on_workers(shards):
    def views(workers):
        return {(int(target[0]), view): image for images, targets in loader(rows(shards), steps=4, workers=workers)
                for view in (0, 1) for image, target in zip(images.chunk(2)[view], targets)}

    alone, shared = views(0), views(2)
    assert len(alone) == 24 and alone.keys() == shared.keys()
    assert all(torch.equal(image, shared[key]) for key, image in alone.items())
    assert not torch.equal(alone[0, 0], alone[0, 1])


def test_no_more_workers_than_shards_can_be_dealt_out_to(shards):
    assert [even_workers([shards], asked, 1) for asked in (0, 1, 2, 3, 4, 9)] == [0, 1, 2, 2, 4, 4]
    assert [even_workers([shards], 9, ranks) for ranks in (2, 5)] == [2, 4]


def spoil(path):
    """A picture whose header is well and whose end is missing."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path, 'JPEG')
    path.write_bytes(path.read_bytes()[:700])


@pytest.fixture
def spoilt(data_dir, tmp_path, kind):
    """Shards with a picture of which nothing can be read, and one of which only the header can."""
    spoil(data_dir / 'images' / '3.png')
    (data_dir / 'images' / '7.png').write_bytes(b'nothing')
    pack(read_table(data_dir / 'train.csv'), tmp_path, 'train', kind, size=6)
    space = find_label_space([read_table(data_dir / 'train.csv')], None)
    return rows(find_shards(tmp_path, 'train', 'image_path'), space)


@pytest.mark.slow
@pytest.mark.parametrize('workers', [0, 1])
def test_a_bad_image_is_named(spoilt, workers, kind, tmp_path):
    with pytest.raises(UserError) as error:
        list(loader(spoilt, workers=workers))
    places = {'webdataset': ('train-000000.tar sample 3', 'train-000001.tar sample 7'),
              'parquet': ('train-00000-of-00002.parquet row 4', 'train-00001-of-00002.parquet row 2')}[kind]
    assert error.value.line.startswith(tuple(f'{tmp_path}/{place}: cannot be decoded' for place in places))


@pytest.mark.slow
def test_bad_images_are_left_out(spoilt, kind):
    assert [len(targets) // 2 for _, targets in loader(spoilt, batch=4, skip_bad=True)] == [4, 4, 2]
    batches = loader(spoilt, batch=4, steps=4, skip_bad=True, workers=2)
    assert [len(targets) for _, targets in batches] == [8] * 4
    news = BadImages([batches.loader.dataset]).news()
    names = {'webdataset': ('0.tar sample 3', '1.tar sample 7'), 'parquet': ('0-of-00002.parquet row 4', 'row 2')}[kind]
    assert news.startswith('2 images that cannot be decoded, left out') and all(name in news for name in names)


@pytest.mark.parametrize('spoil, message', [
    (spoil, 'cannot be decoded'), (lambda path: path.write_bytes(b''), 'no image that can be read')])
def test_all_images_bad_is_an_error(data_dir, tmp_path, kind, spoil, message):
    for path in (data_dir / 'images').iterdir():
        spoil(path)
    pack(read_table(data_dir / 'train.csv'), tmp_path, 'train', kind)
    with pytest.raises(UserError, match=message):
        list(loader(rows(find_shards(tmp_path, 'train', 'image_path'), LabelSpace(())), steps=3, skip_bad=True))


def write_tar(path, members):
    with tarfile.open(path, 'w') as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def test_labels_of_every_type_are_texts(tmp_path):
    cells = [{'size': 1, 'tags': ['a', 'b'], 'on': True, 'name': ' x '}, {'size': 2.5, 'tags': [], 'name': None}]
    write_tar(tmp_path / 'a-0.tar', {
        '0.jpg': b'image', '0.json': json.dumps(cells[0]).encode(), '1.json': json.dumps(cells[1]).encode(),
        '1.webp': b'', '2.png': b''})
    first, *others = sorted(find_shards(tmp_path, 'a', 'image_path', 'x').samples())
    assert first == ('a-0.tar sample 0', b'image', {'size': '1', 'tags': list_cell('ab'), 'on': '1', 'name': ''})
    assert [each.cells for each in others] == [{'size': '2.5', 'tags': list_cell(''), 'name': ''}, {}]


def test_columns_of_parquet(tmp_path):
    """Plain image bytes under any name, classes as Hugging Face numbers them, tags, nulls."""
    features = Features({
        'photo': Value('binary'), 'label': ClassLabel(names=['cat', 'dog']), 'tags': List(ClassLabel(names=['a', 'b'])),
        'price': Value('float32'), 'box': {'x': Value('int32')}})
    cells = [{'label': 1, 'tags': [0, 1], 'price': 1.5}, {'label': -1, 'tags': None, 'price': None}]
    table = pyarrow.Table.from_pylist([{'photo': b'image', **each, 'box': {'x': 0}} for each in cells],
                                      features.arrow_schema)
    parquet.write_table(table, tmp_path / 'train.parquet')
    with pytest.raises(UserError, match="no column 'image_path' or 'image' .there are: photo, label, tags, price, box"):
        list(find_shards(tmp_path, 'train', 'image_path').samples())
    with pytest.raises(UserError, match="train.parquet row 1: 'box' is no text, number or list of tags"):
        list(find_shards(tmp_path, 'train', 'photo').samples())
    table = Splits(Stored.load(tmp_path), None, print, TableFormat('photo'), ['label', 'tags', 'price']).read('train')
    assert table.frame.to_dict('list') == {'label': ['dog', ''], 'tags': [list_cell('ab'), ''], 'price': ['1.5', '']}
    space = find_label_space([table], None, {'tags': TagSet, 'price': Quantity})
    found = encode(table, space)
    for targets in (found.targets, found.encode(list(found.shards.samples()))):
        assert targets.nan_to_num(9).tolist() == [[0, 1, 1, 0], [-1, -1, -1, 9]]


def test_an_epoch_shorter_than_a_shard_may_begin_anywhere_in_it(tmp_path):
    """Of a shard with more samples than are shuffled in memory; a pass has each sample once, with all of its files."""
    numbers = [f'{number:05d}' for number in range(1300)]
    write_tar(tmp_path / 'a-0.tar', {f'{each}.{ending}': data for each in numbers for ending, data in (
        ('jpg', each.encode()), ('json', json.dumps({'id': f'x{each}'}).encode()))})
    table = pyarrow.Table.from_pylist([{'image': each.encode(), 'id': f'x{each}'} for each in numbers])
    parquet.write_table(table, tmp_path / 'b.parquet', row_group_size=1000)
    for name in 'ab':
        shards = find_shards(tmp_path, name, 'image')
        seen = list(shards.samples(seed=5))
        assert sorted(each.image.decode() for each in seen) == numbers
        assert all(each.cells == {'id': f'x{each.image.decode()}'} for each in seen)
        assert sorted(each.name for each in seen) == sorted(each.name for each in shards.samples(images=False))
        first = [int(next(shards.samples(seed=seed)).image) for seed in range(6)]
        assert any(each >= 1000 for each in first) and any(each < 1000 for each in first), first


@pytest.mark.parametrize('name, members, message', [
    ('a-0.tar', {'1.json': b'{}'}, 'a-0.tar sample 1: no image .* side by side in the tar: json'),
    ('a-0.tar', {'1.jpg': b'', '1.json': b'{'}, 'a-0.tar sample 1: its JSON cannot be read'),
    ('a-0.tar', {'1.jpg': b'', '1.json': b'[]'}, 'a-0.tar sample 1: its JSON is no mapping'),
    ('a-0.tar', {}, 'there are no samples in these shards'),
    ('a-0.tar', None, 'a-0.tar: cannot be read as a tar'),
    ('a.parquet', None, 'a.parquet: cannot be read as Parquet'),
])
def test_broken_shards_are_named(tmp_path, name, members, message):
    (tmp_path / name).write_bytes(b'no such thing')
    if members is not None:
        write_tar(tmp_path / name, members)
    with pytest.raises(UserError, match=message):
        rows(find_shards(tmp_path, 'a', 'image_path'))


def test_which_files_are_the_shards_of_a_split(tmp_path):
    for name in ('train-0.tar', 'train-1.tar', 'train-small-0.tar', 'val.parquet'):
        (tmp_path / name).write_bytes(b'')
    (tmp_path / 'test').mkdir()
    (tmp_path / 'test' / 'x.parquet').write_bytes(b'')

    def names(split):
        found = find_shards(tmp_path, split, 'image_path')
        return found and [path.removeprefix(f'{tmp_path}/') for path in found.files]

    assert names('train') == ['train-0.tar', 'train-1.tar'] and names('train-small-*.tar') == ['train-small-0.tar']
    assert names('val') == ['val.parquet'] and names('test') == ['test/x.parquet'] and names('all') is None
    assert names(str(tmp_path / 'train-1.tar')) == ['train-1.tar']


def _pass(rank, folder):
    splits = Splits(Stored.load(folder), None, print, TableFormat())
    table = splits.read('train')
    splits.save(find_label_space([table], None))
    return table.frame, ids(loader(encode(table, IDS), rank=rank, ranks=2, steps=2))


@pytest.mark.slow
def test_two_processes_share_the_pass_over_the_labels(shards, tmp_path):
    (frame, first), (other, second) = run_ranks(_pass, 2, tmp_path)
    pd.testing.assert_frame_equal(frame, other)
    assert sorted(frame['id']) == list(IDS.heads[0].classes)
    assert sorted(first + second) == list(range(12))
    assert json.loads((tmp_path / 'rows.json').read_text()) == {'train': 12}


def run(data_dir, output, *flags):
    run_command('train', 'train.py', [
        str(data_dir), *TINY, '--epochs', '1', '--output', str(output), '--experiment', 'run', *flags])
    return output / 'run'


def read_run(folder):
    """The only row of a run's summary.csv, without what a clock says."""
    return pd.read_csv(folder / 'summary.csv').drop(columns='images_per_second').iloc[0].to_dict()


def stopped(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        run(*args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1
    return error


@pytest.fixture
def packed(data_dir, tmp_path, kind):
    """The tiny data directory in shards."""
    (tmp_path / 'packed').mkdir()
    for name in ('train', 'val'):
        pack(read_table(data_dir / f'{name}.csv'), tmp_path / 'packed', name, kind, size=3)
    return tmp_path / 'packed'


@pytest.mark.slow
def test_a_run_on_shards(data_dir, packed, tmp_path, capsys):
    folder = run(packed, tmp_path / 'a')
    lines = capsys.readouterr().out.splitlines()
    assert f'{packed}: wrote label_space.json and rows.json; remove them when the shards change' in lines
    assert json.loads((packed / 'rows.json').read_text()) == {'train': 12, 'val': 6}
    space = find_label_space([read_table(data_dir / 'train.csv')], None)
    assert LabelSpace.load(packed / 'label_space.json') == LabelSpace.load(folder / 'label_space.json') == space
    row = pd.read_csv(folder / 'summary.csv').iloc[0]
    assert 0 < row['classification_loss'] and 0 < row['simclr_loss'] and 0 <= row['eval_top1'] <= 100

    again = run(packed, tmp_path / 'b')  # without a pass over the labels
    assert 'wrote' not in capsys.readouterr().out
    same = [pd.read_csv(each / 'summary.csv').drop(columns='images_per_second') for each in (folder, again)]
    pd.testing.assert_frame_equal(*same)

    figures, expected = validated(packed, folder), validated(data_dir, folder)
    assert figures['heads']['color']['labels'] == expected['heads']['color']['labels'] == 6
    for head, values in expected['heads'].items():
        assert figures['heads'][head] == pytest.approx(values, rel=1e-5)
    assert row['eval_loss'] == pytest.approx(expected['mean']['loss'], rel=1e-5)
    (packed / 'label_space.json').unlink()
    assert validated(packed, folder)['heads'] == figures['heads']


@pytest.mark.slow
def test_skipping_bad_images_of_shards(data_dir, packed, tmp_path, kind, capsys):
    folder = run(packed, tmp_path)
    (data_dir / 'images' / '13.png').write_bytes(b'nothing')
    pack(read_table(data_dir / 'val.csv'), packed, 'val', kind, size=3)
    assert pd.read_csv(run(packed, tmp_path / 'b', '--skip-bad-images') / 'summary.csv')['bad_images'].tolist() == [1]
    assert validated(packed, folder, '--skip-bad-images')['heads']['color']['labels'] == 5
    assert capsys.readouterr().out.count('1 image that cannot be decoded, left out') == 2


@pytest.mark.slow
@pytest.mark.parametrize('flags', [
    ['-wlc', '0', '-j', '2'],
    ['-wls', '0', '--head', 'color:class_weights=balanced', '--heads', 'color'],
    ['-wls', '0', '--mixup', '0.5', '-j', '2'],
])
def test_flags_with_shards(packed, tmp_path, flags):
    for name in ('a', 'b'):  # with and without a pass
        assert pd.read_csv(run(packed, tmp_path / name, *flags) / 'summary.csv')['train_loss'].notna().all()


@pytest.mark.slow
def test_shards_and_csvs_may_be_mixed(data_dir, packed, tmp_path):
    expected = read_run(run(packed, tmp_path / 'whole'))
    streamed = read_run(run(packed, tmp_path / 'a', '--val-split', str(data_dir / 'val.csv')))
    # The same images are trained on in the same order, and the same 6 are evaluated on, wherever they lie.
    assert streamed == pytest.approx(expected, rel=1e-5)
    for path in packed.glob('val*'):
        shutil.copy(path, data_dir)
    on_csvs = validated(data_dir, run(data_dir, tmp_path / 'c'))  # scored on val.csv
    (data_dir / 'val.csv').unlink()
    mixed = run(data_dir, tmp_path / 'b')
    assert_same_weights(tmp_path / 'c' / 'run' / 'last.pth.tar', mixed / 'last.pth.tar')
    assert read_run(mixed)['eval_loss'] == pytest.approx(on_csvs['mean']['loss'], rel=1e-5)
    assert validated(data_dir, mixed)['heads']['color']['labels'] == on_csvs['heads']['color']['labels'] == 6


def test_a_missing_library_is_named_with_its_extra(packed, kind, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, {'parquet': 'datasets'}.get(kind, kind), None)
    assert f"these data need it: pip install '.[{kind}]'" in stopped(capsys, packed, tmp_path)


def test_what_is_refused(data_dir, packed, tmp_path, capsys):
    assert '--cache ram: shards are streamed' in stopped(capsys, packed, tmp_path, '--cache', 'ram')
    assert 'name some with --unlabelled' in stopped(capsys, packed, tmp_path, '--entropy-weight', '1')
    LabelSpace((LabelSet('color', ('blue', 'green')), LabelSet('shape', ('disc', 'ring')))).save(
        packed / 'label_space.json')
    (packed / 'rows.json').unlink()
    error = stopped(capsys, packed, tmp_path)
    assert "color 'red' in 4 rows" in error and f'remove {packed}/label_space.json' in error
    (packed / 'rows.json').write_text('{"train": 12, "val": 6}')  # now it is met in training
    assert "color 'red' in" in stopped(capsys, packed, tmp_path)
    (packed / 'rows.json').write_text('[]')
    error = stopped(capsys, packed, tmp_path)
    assert 'rows.json: cannot be read as JSON' in error and 'expected the number of samples' in error


@pytest.mark.slow
def test_sample_in_shards_has_the_labels_of_the_sample_in_csvs(tmp_path, kind, capsys):
    flags = '--train 40 --val 8 --test 8 --unlabelled 4 --size 16'.split()
    for name, form in (('csv', 'csv'), ('packed', kind), ('again', kind)):
        run_command('sample', 'sample', [str(tmp_path / name), *flags, '--format', form])
    packed = tmp_path / 'packed'
    assert {path.name.split('-')[0] for path in packed.iterdir()} == {
        'preview.png', 'train', 'val', 'test', 'unlabelled'}
    for path in packed.iterdir():
        assert path.read_bytes() == (tmp_path / 'again' / path.name).read_bytes()
    table = read_table(tmp_path / 'csv' / 'train.csv')
    samples = list(find_shards(packed, 'train', 'image_path').samples())
    assert [each.cells for each in samples] == table.frame.drop(columns='image_path').to_dict('records')
    for each, path in zip(samples, table.frame['image_path'], strict=True):
        assert each.image == (tmp_path / 'csv' / path).read_bytes()
    folder = run(packed, tmp_path, '--img-size', '16')
    assert LabelSpace.load(folder / 'label_space.json') == find_label_space([table], None)
    with pytest.raises(SystemExit):
        run_command('sample', 'sample', [str(packed), *flags])
    assert 'already holds' in capsys.readouterr().err
    run_command('sample', 'sample', [str(packed), *flags, '--force'])
    assert not list(packed.glob('train-*')) and not (packed / 'label_space.json').exists()

