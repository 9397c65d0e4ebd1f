"""Data sets of Hugging Face become tables and image files."""
import json
from pathlib import Path
from typing import Any

import pytest
from common import train_run
from PIL import Image

import timm_multilabel as tm
from timm_multilabel.data.table import read_table
from timm_multilabel.errors import DataError

datasets = pytest.importorskip('datasets')
pyarrow = pytest.importorskip('pyarrow')
parquet = pytest.importorskip('pyarrow.parquet')


def make_set(folder: Path, splits: dict[str, int]) -> Any:
    """A data set with two columns of classes, tags, a number and a column that is no label, by splits."""
    files = []
    for number, (form, color) in enumerate([('PNG', 'red'), ('JPEG', 'blue')]):
        files.append(folder / f'{number}.{form.lower()}')
        folder.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (20, 20), color).save(files[-1], form)
    features = datasets.Features({
        'img': datasets.Image(), 'color': datasets.ClassLabel(names=['red', 'blue']),
        'shape': datasets.ClassLabel(names=['disc', 'ring']), 'price': datasets.Value('float32'),
        'style': datasets.Sequence(datasets.ClassLabel(names=['old', 'new'])), 'where': {'x': datasets.Value('int32')}})
    made = {}
    for split, rows in splits.items():
        bare = split == 'unsupervised'
        made[split] = datasets.Dataset.from_dict({
            'img': [{'bytes': files[row % 2].read_bytes(), 'path': None} for row in range(rows)],
            'color': [-1 if bare else row % 2 for row in range(rows)],
            'shape': [None if bare else row % 2 for row in range(rows)],
            'price': [row + 0.5 for row in range(rows)],
            'style': [[0, 1] if row % 2 else [] for row in range(rows)],
            'where': [{'x': 1}] * rows}, features=features)
    return datasets.DatasetDict(made)


def test_a_stored_set_keeps_names_splits_and_bytes(tmp_path: Path) -> None:
    made = make_set(tmp_path / 'files', {'train': 4, 'validation': 2, 'test': 2, 'unsupervised': 2})
    made.save_to_disk(tmp_path / 'set')
    converted = tm.convert(tmp_path / 'set', tmp_path / 'data')
    assert converted.form == 'Hugging Face'
    assert dict(converted.rows) == {'train': 4, 'val': 2, 'test': 2, 'unlabelled': 2}
    assert list(converted.heads) == ['color', 'shape', 'price', 'style'] and list(converted.tags) == ['style']
    assert converted.skipped == ["column 'where': no column of classes, texts, numbers or lists of these"]
    rows = [json.loads(line) for line in (tmp_path / 'data/train.jsonl').read_text().splitlines()]
    assert rows[1] == {'image_path': 'images/train/0000001.jpg', 'color': 'blue', 'shape': 'ring', 'price': 1.5,
                       'style': ['old', 'new']}
    assert rows[0]['style'] == [] and rows[0]['image_path'] == 'images/train/0000000.png'
    assert (tmp_path / 'data/images/train/0000001.jpg').read_bytes() == (tmp_path / 'files/1.jpeg').read_bytes()
    bare = read_table(tmp_path / 'data/unlabelled.jsonl').frame
    assert list(bare['color']) == ['', ''] and list(bare['shape']) == ['', '']
    assert sorted(path.name for path in (tmp_path / 'data').iterdir()) == [
        'images', 'test.jsonl', 'train.jsonl', 'unlabelled.jsonl', 'val.jsonl']
    with pytest.raises(DataError, match='already there'):
        tm.convert(tmp_path / 'set', tmp_path / 'data')


@pytest.mark.slow
def test_a_stored_set_trains_with_its_pool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_set(tmp_path / 'files', {'train': 8, 'validation': 4, 'unsupervised': 4}).save_to_disk(tmp_path / 'set')
    tm.convert(tmp_path / 'set', tmp_path / 'data')
    run = train_run(tmp_path / 'data', tmp_path, '--heads', 'color', 'style', '--head', 'style:loss=tags',
                    '--unlabelled', 'unlabelled', epochs=1)
    assert '8 images to train on and 4 without labels' in capsys.readouterr().out
    assert len(tm.predict(run / 'last.pth.tar', tmp_path / 'data/images/val', workers=0).images) == 4


def test_parquet_of_one_split_becomes_a_table_to_divide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
    (tmp_path / 'set/data').mkdir(parents=True)
    made = make_set(tmp_path / 'files', {'train': 3})
    made['train'].to_parquet(tmp_path / 'set/data/train-00000-of-00001.parquet')
    assert dict(tm.convert(tmp_path / 'set', tmp_path / 'data').rows) == {'table': 3}
    assert read_table(tmp_path / 'data/table.jsonl').frame['color'].tolist() == ['red', 'blue', 'red']


def test_the_hub_is_asked_for_a_name_and_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked = make_set(tmp_path / 'files', {'train': 2, 'test': 2}), []

    def load_dataset(*args: Any) -> Any:  # the hub itself cannot be reached here
        asked.append(args)
        if args[0] == 'me/none':
            raise ConnectionError('Couldn\'t reach the Hugging Face Hub')
        return made

    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    assert dict(tm.convert('hf://me/photos', tmp_path / 'data').rows) == {'train': 2, 'test': 2}
    tm.convert('hf://datasets/me/photos/small', tmp_path / 'small')
    assert asked == [('me/photos', None), ('me/photos', 'small')]
    with pytest.raises(DataError, match=(
            r"^hf://me/none: cannot be loaded as a data set of Hugging Face \(Couldn't reach the Hugging Face Hub\); "
            r'check the name, the network and, of a private set, the token \(HF_TOKEN\)$')):
        tm.convert('hf://me/none', tmp_path / 'none')
    assert not (tmp_path / 'none').exists()


def test_an_image_that_is_only_a_path_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
    Image.new('RGB', (20, 20)).save(tmp_path / 'secret.png')
    features = datasets.Features({'image': datasets.Image(), 'color': datasets.Value('string')})
    row = {'image': {'bytes': None, 'path': str(tmp_path / 'secret.png')}, 'color': 'red'}
    (tmp_path / 'set').mkdir()
    parquet.write_table(pyarrow.Table.from_pylist([row], features.arrow_schema), tmp_path / 'set/train.parquet')
    with pytest.raises(DataError, match='row 1: its image is a path .*, not the image'):
        tm.convert(tmp_path / 'set', tmp_path / 'data')
    assert not list((tmp_path / 'data').iterdir())


def test_a_damaged_set_is_one_line(tmp_path: Path) -> None:
    (tmp_path / 'set').mkdir()
    (tmp_path / 'set/dataset_dict.json').write_text('{')
    with pytest.raises(DataError, match=f'^{tmp_path}/set: cannot be loaded as a data set of Hugging Face'):
        tm.convert(tmp_path / 'set', tmp_path / 'data')
