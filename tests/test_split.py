"""One CSV of labels into three splits, and what is said of bad ones."""
import re

import pytest

from timm_multilabel.cli import main
from timm_multilabel.data.split import split_csv
from timm_multilabel.data.table import find_images, read_table
from timm_multilabel.errors import UserError

HEADS = [('kind', 'articleType'), ('color', 'baseColour')]
PATTERN = './images/{id}.jpg'


def write_source(folder, rows=43, missing=(), header='id,articleType,baseColour,name', line='{id},kind{id},NA,n{id}'):
    """A styles.csv of rows with ids from 1, and empty files for images."""
    (folder / 'images').mkdir(parents=True)
    ids = range(1, rows + 1)
    (folder / 'styles.csv').write_text('\n'.join([header, *(line.format(id=number) for number in ids)]) + '\n')
    for number in set(ids) - set(missing):
        (folder / 'images' / f'{number}.jpg').touch()
    return folder / 'styles.csv'


def lines(path):
    return path.read_bytes().decode().split('\n')[:-1]


def splits(folder):
    return {name: lines(folder / f'{name}.csv')[1:] for name in ('train', 'val', 'test')}


def test_splits_are_disjoint_and_cover_all(tmp_path):
    source = write_source(tmp_path)
    counts = split_csv(source, tmp_path, image=PATTERN, heads=HEADS)
    assert counts == {'missing': 0, 'train': 34, 'val': 5, 'test': 4, 'all': 43}  # up to 34.4, 38.7 and 43
    everything = lines(tmp_path / 'all.csv')
    assert everything == ['image_path,kind,color', *(f'./images/{n}.jpg,kind{n},NA' for n in range(1, 44))]
    parts = splits(tmp_path)
    assert {name: len(rows) for name, rows in parts.items()} == {'train': 34, 'val': 5, 'test': 4}
    assert sorted(sum(parts.values(), [])) == sorted(everything[1:])
    assert parts['train'] != everything[1:35]  # shuffled


def test_seed_decides_the_splits(tmp_path):
    source = write_source(tmp_path)
    for name, seed in (('a', 42), ('b', 42), ('c', 7)):
        split_csv(source, tmp_path / name, image=PATTERN, heads=HEADS, seed=seed)
    assert splits(tmp_path / 'a') == splits(tmp_path / 'b') != splits(tmp_path / 'c')
    assert lines(tmp_path / 'a' / 'all.csv') == lines(tmp_path / 'c' / 'all.csv')


@pytest.mark.parametrize('ratios, sizes', [
    ((80, 10, 10), [8, 1, 1]), ((0.5, 0.25, 0.25), [5, 3, 2]), ((0, 0, 3), [0, 0, 10]), ((1, 0, 1), [5, 0, 5]),
])
def test_sizes(tmp_path, ratios, sizes):
    counts = split_csv(write_source(tmp_path, rows=10), tmp_path, image=PATTERN, heads=HEADS, ratios=ratios)
    assert [counts[name] for name in ('train', 'val', 'test')] == sizes


def test_cells_are_text_and_surplus_commas_belong_to_the_last_column(tmp_path):
    write_source(tmp_path, rows=4)
    source = tmp_path / 'styles.csv'
    source.write_bytes(
        '\ufeffid,color,name\r\n1,NA,Blue, bold, new\r\n2,,"Red, ""dark"""\r\n\r\n3,007,\r\n4,caf\u00e9,plain\r\n'
        .encode())
    split_csv(source, tmp_path, image=PATTERN, heads=[('name', 'name'), ('color', 'color')], image_column='file')
    assert lines(tmp_path / 'all.csv') == [
        'file,name,color',
        './images/1.jpg,"Blue, bold, new",NA',
        './images/2.jpg,"Red, ""dark""",',
        './images/3.jpg,,007',
        './images/4.jpg,plain,caf\u00e9',
    ]


def test_rows_without_image_are_left_out_and_counted(tmp_path):
    counts = split_csv(write_source(tmp_path, missing=(2, 40, 43)), tmp_path, image=PATTERN, heads=HEADS)
    assert counts == {'missing': 3, 'train': 32, 'val': 4, 'test': 4, 'all': 40}
    assert not {f'./images/{n}.jpg,kind{n},NA' for n in (2, 40, 43)} & set(lines(tmp_path / 'all.csv'))


@pytest.mark.parametrize('pattern, out, written', [
    ('./images/{id}.jpg', 'data', './images/1.jpg'),
    ('./data/images/{id}.jpg', 'data', './data/images/1.jpg'),
    ('images/{id}.jpg', 'data/sub', 'images/1.jpg'),
    ('images/{id}.jpg', 'elsewhere', '../data/images/1.jpg'),
    ('data/images/{id}.jpg', 'far/away', '../../data/images/1.jpg'),
])
def test_paths_lead_from_the_new_folder_to_the_images(tmp_path, pattern, out, written):
    source = write_source(tmp_path / 'data', rows=3)
    split_csv(source, tmp_path / out, image=pattern, heads=HEADS)
    table = read_table(tmp_path / out / 'all.csv')
    assert table.frame['image_path'].iloc[0] == written
    assert len(find_images(table)) == 3


def test_images_in_the_working_directory(tmp_path, monkeypatch):
    source = write_source(tmp_path / 'here', rows=3)
    table = tmp_path / 'there' / 'tables' / 'styles.csv'
    table.parent.mkdir(parents=True)
    source.rename(table)
    monkeypatch.chdir(tmp_path / 'here')
    assert split_csv(table, table.parent, image=PATTERN, heads=HEADS)['all'] == 3
    assert lines(table.with_name('all.csv'))[1] == './images/1.jpg,kind1,NA'


@pytest.mark.parametrize('changes, message', [
    ({'heads': [('kind', 'type')]}, 'styles.csv: no column type (there are: id, articleType, baseColour, name)'),
    ({'heads': [('kind', 'name'), ('kind', 'id')]}, 'image_path, kind, kind: expected'),
    ({'heads': [('image_path', 'name')]}, 'all named differently'),
    ({'heads': []}, 'one or more heads'),
    ({'image': './images/{number}.jpg'}, "styles.csv ('number'); put its columns in braces, such as {id} (there are: "),
    ({'image': './images/{}.jpg'}, 'cannot be filled'),
    ({'image': './images/{id.jpg'}, 'cannot be filled'),
    ({'image': './images/1.jpg'}, 'styles.csv row 3: its image ./images/1.jpg is that of row 2 already'),
    ({'image': './photos/{id}.jpg'}, 'styles.csv: none of its 3 images is on disk: ./photos/1.jpg, ...; looked in '),
    ({'ratios': (80, 20)}, 'ratios 80 20: expected three numbers'),
    ({'ratios': (90, 20, -10)}, 'ratios 90 20 -10'),
    ({'ratios': (0, 0, 0)}, 'not all 0'),
    ({'ratios': (80, 10, float('nan'))}, 'ratios 80 10 nan'),
])
def test_bad_arguments(tmp_path, changes, message):
    source = write_source(tmp_path, rows=3)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        split_csv(source, tmp_path / 'out', **{'image': PATTERN, 'heads': HEADS, **changes})
    assert '\n' not in str(caught.value)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('content, message', [
    (b'', 'styles.csv: cannot be read as a CSV (no columns in the first row)'),
    (b'id,name,id\n1,a,1\n', "styles.csv row 1: two columns are called 'id'"),
    (b'id,name\n', 'styles.csv: the table has no rows'),
    (b'id,name\n1,a\n\n2\n', 'styles.csv row 4: 1 cells for 2 columns; complete the row or remove it'),
    (b'id,name\n1,caf\xe9\n', 'styles.csv row 2: byte 0xe9 is not UTF-8; save the file as UTF-8'),
])
def test_bad_source(tmp_path, content, message):
    source = write_source(tmp_path, rows=2)
    source.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)):
        split_csv(source, tmp_path / 'out', image=PATTERN, heads=[('name', 'name')])
    assert not (tmp_path / 'out').exists()


def test_missing_source_and_folder_that_cannot_be_made(tmp_path):
    with pytest.raises(UserError, match='none.csv: no such file'):
        split_csv(tmp_path / 'none.csv', tmp_path, image=PATTERN, heads=HEADS)
    source = write_source(tmp_path, rows=3)
    with pytest.raises(UserError, match='styles.csv: cannot make this folder'):
        split_csv(source, source, image=PATTERN, heads=HEADS)


def test_existing_files_are_kept_unless_forced(tmp_path):
    source = write_source(tmp_path)
    (tmp_path / 'val.csv').write_text('mine')
    with pytest.raises(UserError, match='val.csv: already there; overwrite with --force or choose another --out'):
        split_csv(source, tmp_path, image=PATTERN, heads=HEADS)
    assert (tmp_path / 'val.csv').read_text() == 'mine'
    assert not (tmp_path / 'train.csv').exists()
    split_csv(source, tmp_path, image=PATTERN, heads=HEADS, force=True)
    assert len(lines(tmp_path / 'val.csv')) == 6


def test_source_is_never_overwritten(tmp_path):
    source = write_source(tmp_path).rename(tmp_path / 'all.csv')
    before = source.read_bytes()
    with pytest.raises(UserError, match='all.csv would be overwritten by its own split'):
        split_csv(source, tmp_path, image=PATTERN, heads=HEADS, force=True)
    assert source.read_bytes() == before


def run_command(*arguments):
    main.run_command('split', 'split', [str(argument) for argument in arguments])


def test_command(tmp_path, capsys):
    source = write_source(tmp_path, missing=(1, 2, 3))
    run_command(source, '--image', PATTERN, '--heads', 'name', 'color=baseColour', '--ratios', 50, 25, 25)
    assert capsys.readouterr().out.splitlines() == [
        f'Wrote 40 rows (20 train, 10 val, 10 test) to {tmp_path}',
        'Left out 3 rows whose image is not there',
    ]
    assert lines(tmp_path / 'all.csv')[:2] == ['image_path,name,color', './images/4.jpg,n4,NA']


@pytest.mark.parametrize('head', ['=color', 'color=', ''])
def test_command_names_bad_heads(tmp_path, capsys, head):
    with pytest.raises(SystemExit):
        run_command(tmp_path / 'styles.csv', '--image', PATTERN, '--heads', head)
    assert f"{head!r} is not NAME or NAME=COLUMN" in capsys.readouterr().err
