"""The sample data set: its files, its labels, and that they are drawn from the seed alone."""
import pandas as pd
import pytest
from PIL import Image

from timm_multilabel.cli.main import run_command
from timm_multilabel.data.sample import HEADS, write_sample
from timm_multilabel.errors import UserError

COUNTS = {'train': 200, 'val': 40, 'test': 24, 'unlabelled': 16}


def read(folder, name):
    return pd.read_csv(folder / f'{name}.csv', dtype=str, keep_default_na=False)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob('*.*'))}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sample')
    write_sample(folder, **COUNTS, size=32)
    return folder


def test_files_and_columns(folder):
    assert {path.name for path in folder.iterdir()} == {*(f'{name}.csv' for name in COUNTS), 'images', 'preview.png'}
    paths = []
    for name, count in COUNTS.items():
        table = read(folder, name)
        assert len(table) == count
        labels = [] if name == 'unlabelled' else ['color', 'shape', 'texture']
        assert table.columns.tolist() == ['image_path', *labels]
        paths += table['image_path'].tolist()
    assert paths == [f'images/{number:06d}.jpg' for number in range(1, 281)]
    assert len({(folder / path).read_bytes() for path in paths}) == 280
    with Image.open(folder / paths[0]) as picture:
        assert (picture.format, picture.size) == ('JPEG', (32, 32))


def test_classes_are_equally_frequent_and_one_is_the_text_na(folder):
    assert {head: len(classes) for head, classes in HEADS.items()} == {'color': 8, 'shape': 8, 'texture': 4}
    val = read(folder, 'val')
    for head, classes in HEADS.items():
        assert val[head].value_counts().to_dict() == {label: 40 // len(classes) for label in classes}
    assert (val['color'] == 'NA').sum() == 5


def test_only_train_has_empty_cells(folder):
    assert (read(folder, 'train') == '').sum().sum() == 30  # 5 % of 200 x 3
    assert not (read(folder, 'train')['image_path'] == '').any()
    assert not (read(folder, 'val') == '').any(axis=None)
    assert not (read(folder, 'test') == '').any(axis=None)


def test_greyscale_pictures_are_labelled_na(folder):
    colors = []
    for name in ('train', 'val', 'test'):
        for path, color in read(folder, name)[['image_path', 'color']].itertuples(index=False):
            with Image.open(folder / path) as picture:
                if picture.mode == 'L':
                    colors.append(color)
    assert 1 <= len(colors) <= 15  # of 33 NA pictures
    assert set(colors) == {'NA'}


@pytest.mark.slow
def test_seed_decides_every_byte(folder, tmp_path):
    write_sample(tmp_path / 'same', **COUNTS, size=32)
    write_sample(tmp_path / 'other', **COUNTS, size=32, seed=1)
    first, same, other = contents(folder), contents(tmp_path / 'same'), contents(tmp_path / 'other')
    assert same == first
    differing = {path.name for path in first if first[path] != other[path]}
    assert len(differing) == 280 + 4  # unlabelled.csv has the paths only
    assert 'unlabelled.csv' not in differing


def test_existing_folder_is_refused_unless_forced(tmp_path):
    (tmp_path / 'train.csv').write_text('mine')
    with pytest.raises(UserError, match='already holds train.csv; overwrite with --force or choose another DIR'):
        write_sample(tmp_path, train=8, val=8, test=8, unlabelled=0, size=16)
    assert contents(tmp_path) == {(tmp_path / 'train.csv').relative_to(tmp_path): b'mine'}
    write_sample(tmp_path, train=8, val=8, test=8, unlabelled=0, size=16, force=True)
    assert len(read(tmp_path, 'train')) == 8
    assert not (tmp_path / 'unlabelled.csv').exists()


def test_killed_run_leaves_no_table(tmp_path, monkeypatch):
    write_sample(tmp_path, train=8, val=8, test=8, unlabelled=8, size=16)

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr('timm_multilabel.data.sample.draw_preview', interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_sample(tmp_path, train=8, val=8, test=8, unlabelled=8, size=16, force=True)
    assert not list(tmp_path.glob('*.csv'))


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='file/sample: cannot make this folder'):
        write_sample(tmp_path / 'file' / 'sample', train=8, val=8, test=8, unlabelled=8)


def test_command(tmp_path, capsys):
    folder = tmp_path / 'drawn'
    words = '--train 8 --val 4 --test 4 --unlabelled 2 --size 16'.split()
    run_command('sample', 'sample', [str(folder), *words])
    assert capsys.readouterr().out.splitlines() == [
        f'Wrote 18 pictures (8 train, 4 val, 4 test, 2 unlabelled) to {folder}, see preview.png there; '
        'the color NA is gray',
        f'Next: timm-multilabel train {folder} --model resnet10t --img-size 16 -b 64 --opt adamw --lr 2e-3 --epochs 6 '
        '--cooldown-epochs 0',
    ]
    assert len(list((folder / 'images').iterdir())) == 18
