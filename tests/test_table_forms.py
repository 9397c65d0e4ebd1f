"""Data as people have them: class folders, TSV, Excel, JSON lines, Parquet, and images under a root of their own."""
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import timm_multilabel as tm
from timm_multilabel.data.split_names import find_split
from timm_multilabel.data.table import encode_rows, find_label_space, read_table
from timm_multilabel.data.table_files import read_cells
from timm_multilabel.data.table_format import TableFormat
from timm_multilabel.errors import DataError
from timm_multilabel.labels import Quantity

TINY = {'model': 'test_resnet', 'img_size': 32, 'simclr_loss_weight': 0, 'batch_size': 4, 'workers': 0, 'epochs': 1,
        'warmup_epochs': 0, 'cooldown_epochs': 0}
ROWS = [
    {'image_path': 'a.png', 'color': 'red', 'size': 7, 'tags': ['x', 'y']},
    {'image_path': 'b.png', 'color': 'NA', 'size': None, 'tags': ['y']},
    {'image_path': 'c.png', 'color': None, 'size': 8, 'tags': []},
]


def photo(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (40, 40), (shade, 90, 200)).save(path)


@pytest.fixture
def class_folders(tmp_path):
    """train/{boots,shoes}/*.png with a folder below one, and val/."""
    for split, count in (('train', 6), ('val', 3)):
        for name, shade in (('shoes', 20), ('boots', 220)):
            for number in range(count):
                below = 'old/' if name == 'boots' and number == 0 else ''
                photo(tmp_path / 'data' / split / name / f'{below}{number}.png', shade + number + count)
    return tmp_path / 'data'


def test_class_folders_train_score_and_report(class_folders, tmp_path):
    run = tm.train(class_folders, **TINY, output=tmp_path, experiment='run', class_head='article')
    assert (run.folder / 'label_space.json').read_text().count('article') == 1
    found = tm.validate(class_folders, run.best_checkpoint, batch_size=4, workers=0)
    assert found.heads['head'].tolist()[:1] == ['article'] and found.results['heads']['article']['labels'] == 6
    assert 'boots' in tm.report(run.folder, workers=0).path.read_text()
    assert tm.check(class_folders).errors == 0


def test_class_folders_as_a_table(class_folders):
    path = find_split(class_folders, 'train')
    table = read_table(path)
    space = find_label_space([table], None)
    assert [(head.name, list(head.classes)) for head in space.heads] == [('class', ['boots', 'shoes'])]
    rows = encode_rows(table, space)
    assert len(rows) == 12 and rows.targets[:, 0].tolist() == [0] * 6 + [1] * 6
    assert Path(rows.images[0]) == class_folders / 'train' / 'boots' / '1.png'
    assert rows.where(0) == f'in {class_folders / "train"}'


def test_class_folders_beside_tables_are_only_images(class_folders):
    (class_folders / 'train.csv').write_text('image_path,color\ntrain/boots/1.png,red\n')
    assert find_split(class_folders, 'train') == class_folders / 'train.csv'
    assert find_split(class_folders, 'val') is None
    assert find_split(class_folders, str(class_folders / 'val')) == class_folders / 'val'  # asked for by its path
    (class_folders / 'train.csv').rename(class_folders / 'predictions.csv')  # of no split
    assert find_split(class_folders, 'train') == class_folders / 'train'


def test_what_is_wrong_with_class_folders(class_folders):
    photo(class_folders / 'val' / 'caps' / '1.png')
    train, val = (read_table(class_folders / name) for name in ('train', 'val'))
    with pytest.raises(DataError, match=r"val: labels that training does not know: class 'caps' in 1 row; "):
        encode_rows(val, find_label_space([train], None))
    for kind, message in (({'class': Quantity}, "train, column 'class': 'boots' is no number; fix it"),):
        with pytest.raises(DataError, match=message):
            find_label_space([train], None, kind)
    photo(class_folders / 'train' / 'loose.png')
    with pytest.raises(DataError, match=r'loose.png: of no class; move it into the folder of its class'):
        read_table(class_folders / 'train')
    with pytest.raises(DataError, match='--class-head image_path: the column of the images is called so'):
        read_table(class_folders / 'val', TableFormat(class_head='image_path'))


def test_class_folders_are_split(class_folders, tmp_path):
    made = tm.split(class_folders / 'train', out=tmp_path / 'out', class_head='article', ratios=(50, 25, 25),
                    stratify='article')
    assert made.rows == {'missing': 0, 'train': 6, 'val': 3, 'test': 3, 'all': 12}
    table = read_table(tmp_path / 'out' / 'train.csv')
    assert table.frame['article'].value_counts().to_dict() == {'boots': 3, 'shoes': 3}
    assert len(encode_rows(table, find_label_space([table], None))) == 6
    here = tm.split(class_folders / 'val')  # into the folder itself, which then is a data directory
    assert here.folder == class_folders / 'val' and find_split(here.folder, 'train') == here.folder / 'train.csv'
    with pytest.raises(DataError, match='image and heads are of tables'):
        tm.split(class_folders / 'train', image='{id}.jpg', heads=['a'])
    tm.split(class_folders / 'train', out=tmp_path / 'out', class_head='article', ratios=(50, 50, 0), force=True)
    assert not (tmp_path / 'out' / 'test.csv').exists()
    with pytest.raises(DataError, match='name its images and heads'):
        tm.split(here.folder / 'all.csv', out=tmp_path / 'other')


def write(path: Path) -> Path:
    frame = pd.DataFrame(ROWS)
    if path.suffix == '.jsonl':
        path.write_text(''.join(json.dumps(row) + '\n' for row in ROWS))
    elif path.suffix == '.xlsx':
        frame.assign(tags=frame['tags'].map('|'.join)).astype({'size': 'Int64'}).to_excel(path, index=False)
    elif path.suffix == '.parquet':
        frame.astype({'size': 'Int64'}).to_parquet(path, index=False)
    else:
        frame.assign(tags=frame['tags'].map('|'.join)).astype({'size': 'Int64'}).to_csv(path, sep='\t', index=False)
    return path


@pytest.mark.parametrize('ending', ['tsv', 'xlsx', 'jsonl', 'parquet'])
def test_a_table_of_every_kind(tmp_path, ending):
    for row in ROWS:
        photo(tmp_path / row['image_path'])
    path = write(tmp_path / f'train.{ending}')
    assert find_split(tmp_path, 'train') == path
    table = read_table(path)
    assert table.frame['color'].tolist() == ['red', 'NA', ''] and table.frame['size'].tolist() == ['7', '', '8']
    first = 1 if ending in ('jsonl', 'parquet') else 2
    assert table.frame.index.tolist() == [first, first + 1, first + 2]
    space = find_label_space([table], ['color', 'tags'], {'tags': tm.labels.TagSet})
    rows = encode_rows(table, space)
    assert rows.targets[:, 0].tolist() == [1, 0, -1]  # NA, red
    assert rows.targets[:2, 1:].tolist() == [[1, 1], [0, 1]]
    assert space.heads[1].known(rows.targets[:, 1:])[2].all() == (ending in ('jsonl', 'parquet'))  # [] says none


@pytest.mark.parametrize('name, content, message', [
    ('t.jsonl', '{"image_path": "a"}\n[1]\n', 'row 2: is no JSON object'),
    ('t.jsonl', '{"image_path": "a"\n', 'row 1: cannot be read as JSON'),
    ('t.jsonl', '{"image_path": "a", "b": {"c": 1}}\n', "row 1: 'b' is no text, number or list of tags"),
    ('t.xlsx', 'no archive', 'cannot be read as an Excel file .*; fix it, or save it as a CSV'),
    ('t.parquet', 'no table', 'cannot be read as Parquet'),
])
def test_tables_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_cells(tmp_path / name)


def test_an_excel_file_that_unpacks_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr('timm_multilabel.data.table_files._EXPANDED', 1000)
    with pytest.raises(DataError, match='it unpacks to more than 1,000 bytes'):
        read_cells(write(tmp_path / 't.xlsx'))


def test_rows_of_columns_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr('timm_multilabel.cells._MAX_CELLS', 100)
    (tmp_path / 't.jsonl').write_text(''.join(json.dumps({f'c{n}': 1}) + '\n' for n in range(200)))
    with pytest.raises(DataError, match='nearly all of them missing in each row'):
        read_cells(tmp_path / 't.jsonl')


@pytest.mark.parametrize('ending', ['tsv', 'jsonl', 'xlsx'])
def test_a_separator_is_of_csvs(tmp_path, ending):
    """A checkpoint remembers that of its run, whose other splits may be files of another kind."""
    table = read_table(write(tmp_path / f't.{ending}'), TableFormat(separator=';'))
    assert table.frame['color'].tolist() == ['red', 'NA', '']


def test_a_sheet_with_a_cell_far_away(tmp_path):
    import openpyxl
    book = openpyxl.Workbook()
    book.active['A1'], book.active['B1'], book.active['A3'] = 'image_path', 'n', 'a.png'
    book.save(tmp_path / 'good.xlsx')
    frame = read_cells(tmp_path / 'good.xlsx')
    assert frame.to_dict('index') == {3: {'image_path': 'a.png', 'n': ''}}
    book.active['XFD1048576'] = 1
    book.save(tmp_path / 'far.xlsx')
    with pytest.raises(DataError, match='row 1048576 has more cells than the header'):
        read_cells(tmp_path / 'far.xlsx')


def test_images_under_a_root(class_folders, tmp_path):
    data, elsewhere = tmp_path / 'tables', tmp_path / 'elsewhere'
    shutil.copytree(class_folders / 'train', elsewhere)
    data.mkdir()
    lines = [f'{kind}/{number}.png,{kind}\n' for kind in ('boots', 'shoes') for number in range(1, 6)]
    for split in ('train', 'val'):
        (data / f'{split}.csv').write_text('image_path,article\n' + ''.join(lines))
    with pytest.raises(DataError, match='none of its 10 images is on disk'):
        tm.train(data, **TINY, output=tmp_path, experiment='without')
    run = tm.train(data, **TINY, output=tmp_path, experiment='with', image_root=elsewhere)
    assert tm.validate(data, run.best_checkpoint, batch_size=4, workers=0).images == 10  # known from the checkpoint
    moved = tmp_path / 'moved'
    elsewhere.rename(moved)
    with pytest.raises(DataError, match='looked in '):
        tm.validate(data, run.best_checkpoint, batch_size=4, workers=0)
    assert tm.validate(data, run.best_checkpoint, image_root=moved, batch_size=4, workers=0).images == 10
    assert np.isfinite(run.best)
