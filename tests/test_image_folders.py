"""Which files of a folder are images, and names of files that are no UTF-8, hold line breaks, or are very long."""
import csv
import json
import os
import tarfile
from pathlib import Path

import pandas as pd
import pytest
from common import COLORS, TINY, train_run, write_data
from PIL import Image

from timm_multilabel.cli.main import run_command
from timm_multilabel.data.arguments import rows_of_arguments
from timm_multilabel.data.image_names import ENDINGS
from timm_multilabel.data.images import EncodedPhoto
from timm_multilabel.data.pool import rows_of_folder
from timm_multilabel.data.shards import find_shards
from timm_multilabel.errors import UserError
from timm_multilabel.exports.examples import images_of_paths
from timm_multilabel.inference.embeddings import Embeddings
from timm_multilabel.labels import LabelSpace

NO_HEADS = LabelSpace(())
NAMES = ('a.jpg', 'b.png', 'c.webp', 'd.bmp', 'e.tif', 'f.gif', 'g.avif', 'h.jp2', 'i.JPG', 'j.jpeg', 'k.TIFF', 'l.Ppm')
PASSED = ('passed over: .heic (2), hidden files and folders (2), links to folders already taken (2), .txt (1), '
          'files without an ending (1)')


@pytest.fixture
def photos(tmp_path):
    """A folder with 12 kinds of images, one more behind a link and one behind a second link, and what is no image."""
    folder, elsewhere = tmp_path / 'photos', tmp_path / 'elsewhere'
    (folder / '.cache').mkdir(parents=True)
    (elsewhere / 'deeper').mkdir(parents=True)
    picture = Image.new('RGB', (32, 32), COLORS['red'])
    for path in (*(folder / name for name in NAMES), folder / '.hidden.png', folder / '.cache/m.png',
                 elsewhere / 'x.png', elsewhere / 'deeper/y.png'):
        picture.save(path)
    for name in ('notes.txt', 'README', '1.heic', '2.HEIC'):
        (folder / name).write_text('')
    (folder / 'link').symlink_to(elsewhere)
    (elsewhere / 'loop').symlink_to(folder)
    (elsewhere / 'deeper/loop').symlink_to(elsewhere)
    return folder


def expected(folder: Path) -> list[str]:
    return sorted(str(folder / name) for name in (*NAMES, 'link/x.png', 'link/deeper/y.png'))


def test_every_format_is_found_and_what_is_passed_over_is_counted(photos):
    for find in (lambda say: rows_of_folder(photos, NO_HEADS, say).images.tolist(),
                 lambda say: rows_of_arguments([str(photos)], NO_HEADS, say=say).images.tolist(),
                 lambda say: sorted(images_of_paths([str(photos)], say))):
        said = []
        assert find(said.append) == expected(photos)
        assert said == [f'{photos}: 14 images; {PASSED}']
    for path in expected(photos):
        assert EncodedPhoto(Path(path).read_bytes(), path).decode().shape == (32, 32, 3)


def test_a_folder_of_images_alone_needs_no_line(tmp_path):
    Image.new('RGB', (4, 4)).save(tmp_path / 'a.png')
    said = []
    assert len(rows_of_folder(tmp_path, NO_HEADS, said.append)) == 1 and said == []


@pytest.mark.parametrize('ending', sorted(ENDINGS))
def test_endings_are_of_formats_that_are_read(tmp_path, ending):
    path = tmp_path / f'x{ending}'
    Image.new('RGB', (32, 32)).save(path)
    assert EncodedPhoto(path.read_bytes(), 'x').decode().shape == (32, 32, 3)


def test_globs_go_round_no_circle_of_links(photos):
    (photos / 'again').symlink_to(photos)  # with two of them there are 2^40 ways
    for pattern, names in {
        '**/*.png': ['b.png', 'link/deeper/y.png', 'link/x.png'],
        '**/**/y.*': ['link/deeper/y.png'],
        '**/deeper/**/*.png': ['link/deeper/loop/loop/b.png', 'link/deeper/loop/x.png', 'link/deeper/y.png'],
        '**/x.png': ['link/x.png'],
    }.items():
        found = rows_of_arguments([str(photos / pattern)], NO_HEADS).images
        assert [os.path.relpath(path, photos) for path in found] == names, pattern
    assert len(rows_of_arguments([str(photos / '**')], NO_HEADS)) == 14 + 4
    assert len(rows_of_arguments([str(photos / '*.*')], NO_HEADS)) == 12 + 3


def test_a_glob_from_the_working_directory(photos, monkeypatch):
    monkeypatch.chdir(photos)
    assert rows_of_arguments(['**/*.png'], NO_HEADS).images.tolist() == ['b.png', 'link/deeper/y.png', 'link/x.png']


def test_a_glob_that_matches_an_empty_folder_too(photos):
    (photos.parent / 'empty').mkdir()
    said = []
    assert len(rows_of_arguments([str(photos.parent / '[ep]*[yos]')], NO_HEADS, say=said.append)) == 14
    assert said == [f'{photos}: 14 images; {PASSED}']


def test_a_folder_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match='gone: cannot be read .No such file or directory'):
        rows_of_folder(tmp_path / 'gone', NO_HEADS)


def test_a_tar_may_hold_every_format(tmp_path):
    with tarfile.open(tmp_path / 'train.tar', 'w') as tar:
        for number, ending in enumerate(('avif', 'JP2', 'ppm')):
            Image.new('RGB', (32, 32)).save(tmp_path / f'{number}.{ending}')
            (tmp_path / f'{number}.json').write_text('{"color": "red"}')
            tar.add(tmp_path / f'{number}.{ending}', f'{number}.{ending}')
            tar.add(tmp_path / f'{number}.json', f'{number}.json')
    samples = list(find_shards(tmp_path, 'train', 'image').samples())
    assert [EncodedPhoto(sample.image, '').decode().shape for sample in samples] == [(32, 32, 3)] * 3


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    return train_run(write_data(folder / 'data'), folder, epochs=1)


@pytest.mark.slow
def test_commands_take_the_same_images(run, photos, tmp_path, capsys):
    line = f'{photos}: 14 images; {PASSED}\n'
    checkpoint, common = str(run / 'model_best.pth.tar'), ['--device', 'cpu', '-j', '0']
    run_command('predict', 'predict', [checkpoint, str(photos), '--out', str(tmp_path / 'p.csv'), *common])
    assert capsys.readouterr().err.count(line) == 1
    assert [row.split(',')[0] for row in (tmp_path / 'p.csv').read_text().splitlines()[1:]] == expected(photos)
    made = str(tmp_path / 'e.npz')
    run_command('embed', 'embed', [checkpoint, str(photos), '--out', made, *common])
    assert capsys.readouterr().err.count(line) == 1
    assert Embeddings.load(made).images.tolist() == expected(photos)
    run_command('search', 'search', [made, str(photos), '--checkpoint', checkpoint, '-k', '1', *common])
    printed = capsys.readouterr()
    assert printed.err.count(line) == 1 and len(printed.out.splitlines()) == 1 + 14
    run_command('export', 'export', [checkpoint, '--formats', 'safetensors', '--images', str(photos), '--out',
                                   str(tmp_path / 'x')])
    assert capsys.readouterr().out.count(line) == 1


@pytest.mark.slow
def test_unlabelled_folders_take_the_same_images(photos, tmp_path, capsys):
    data = write_data(tmp_path / 'data')
    train_run(data, tmp_path, '--unlabelled', str(photos), epochs=1)
    printed = capsys.readouterr().out
    assert f'{photos}: 14 images; {PASSED}\n' in printed and 'and 14 without labels' in printed


# Names of files

FOREIGN, LONG = 'a\udcff.png', 'x' * 251 + '.png'
UTF_8 = ('b\nc.png', 'd\re.png', 'f\r\ng.png', 'h\u2028i\x85.png', 'j"k,l.png', LONG)
COMMON = ['--device', 'cpu', '-j', '0']


@pytest.fixture
def named(tmp_path):
    """A folder with images of such names, one of them not of UTF-8."""
    folder = tmp_path / 'named'
    folder.mkdir()
    for name in (FOREIGN, *UTF_8):
        Image.new('RGB', (32, 32), COLORS['green']).save(folder / name)
    return folder


def refused(command, argv, capsys) -> str:
    """What a command says that ends with exit status 2."""
    with pytest.raises(SystemExit) as end:
        run_command(command, 'x', argv)
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.slow
def test_names_in_what_predict_writes(run, named, tmp_path, capsys, monkeypatch):
    checkpoint, out = str(run / 'model_best.pth.tar'), tmp_path / 'p.jsonl'
    everything = sorted(str(named / name) for name in (FOREIGN, *UTF_8))
    run_command('predict', 'x', [checkpoint, str(named), '--out', str(out), *COMMON])
    assert [json.loads(line)['image'] for line in out.read_text('ascii').splitlines()] == everything
    run_command(
        'predict', 'x', [checkpoint, str(named), '--format', 'table', '--out', str(tmp_path / 'table'), *COMMON])
    assert len((tmp_path / 'table').read_text('utf-8').split('\n')) == 1 + 7 + 1

    out = tmp_path / 'p.csv'
    monkeypatch.setattr('timm_multilabel.inference.predictor.Predictor.answer', None)  # refused before any work
    for where in (['--out', str(out)], ['--format', 'csv']):
        said = refused('predict', [checkpoint, str(named), *where, *COMMON], capsys)
        assert r'a\udcff.png: this name is not UTF-8, as a CSV needs it; rename it, or pass --format jsonl' in said
    assert not out.exists()
    monkeypatch.undo()
    (named / FOREIGN).unlink()
    run_command('predict', 'x', [checkpoint, str(named), '--out', str(out), *COMMON])
    assert pd.read_csv(out)['image'].tolist() == [path for path in everything if FOREIGN not in path]


@pytest.mark.slow
def test_names_in_embeddings_and_in_what_search_shows(run, named, tmp_path, capsys, monkeypatch):
    checkpoint, everything = str(run / 'model_best.pth.tar'), sorted(str(named / name) for name in (FOREIGN, *UTF_8))
    made = str(tmp_path / 'e.npz')
    run_command('embed', 'x', [checkpoint, str(named), '--out', made, *COMMON])
    assert Embeddings.load(made).images.tolist() == everything
    capsys.readouterr()
    run_command('search', 'x', [made, str(named), '--checkpoint', checkpoint, '-k', '7', *COMMON])
    assert len(capsys.readouterr().out.splitlines()) == 1 + 7 * 7
    sheet = ['--checkpoint', checkpoint, '--sheet', str(tmp_path / 's.png')]
    run_command('search', 'x', [made, str(named), *sheet, *COMMON])
    assert Image.open(tmp_path / 's.png').width == 12 + 8 * 140  # the query and 7 that were found
    pytest.importorskip('pyarrow')
    made = str(tmp_path / 'e.parquet')
    with monkeypatch.context() as patch:
        patch.setattr('timm_multilabel.api.embed.embed_part', None)
        said = refused('embed', [checkpoint, str(named), '--out', made, *COMMON], capsys)
    assert r'a\udcff.png: this name is not UTF-8, as' in said and 'name a .npz file' in said
    assert not Path(made).exists()
    (named / FOREIGN).unlink()
    run_command('embed', 'x', [checkpoint, str(named), '--out', made, *COMMON])
    assert Embeddings.load(made).images.tolist() == [path for path in everything if FOREIGN not in path]


def write_named(folder: Path) -> Path:
    """A data directory whose images have such names, as far as a CSV holds them."""
    write_data(folder)
    for name in ('train', 'val'):
        table = pd.read_csv(folder / f'{name}.csv')
        starts = [f'images/{name[0]}{number:02}' for number in range(len(table))]
        paths = [f'{start}{ending}' for start, ending in zip(starts, 2 * (*UTF_8[:-1], LONG[3:]))]
        for old, new in zip(table['image_path'], paths):
            (folder / old).rename(folder / new)
        lines = [table.columns, *table.assign(image_path=paths).to_numpy()]
        with open(folder / f'{name}.csv', 'w', newline='') as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows(lines)
    return folder


@pytest.mark.slow
def test_names_in_tables(tmp_path, capsys):
    data = write_named(tmp_path / 'data')
    made = train_run(data, tmp_path, epochs=1)
    with pytest.raises(SystemExit):  # images that are alike
        run_command('check', 'x', [str(data), '--json', str(tmp_path / 'c.json')])
    assert json.loads((tmp_path / 'c.json').read_text())['images']['files'] == 18
    run_command('validate', 'x', [str(data), '--checkpoint', str(made / 'model_best.pth.tar'), *COMMON])
    run_command('report', 'x', [str(made), '--device', 'cpu', '-j', '0'])
    assert (made / 'report.html').is_file()
    run_command('split', 'x', [str(data / 'train.csv'), '--image', '{image_path}', '--heads', 'color', '--out',
                             str(tmp_path / 'elsewhere')])
    with open(data / 'train.csv', newline='') as file:
        expected = [os.path.join('..', 'data', row[0]) for row in csv.reader(file)][1:]
    assert len(expected) == 12 and '../data/images/t01d\re.png' in expected
    assert pd.read_csv(tmp_path / 'elsewhere/all.csv')['image_path'].tolist() == expected


@pytest.mark.slow
def test_folders_that_are_not_utf_8(tmp_path, capsys):
    base = tmp_path / 'd\udcff'
    data = write_data(base / 'data')
    first = train_run(data, base, epochs=1)
    second = train_run(data, base, '--lr', '0.01', '--experiment', '\udcfe', epochs=1).parent / '\udcfe'
    run_command(
        'train',
        'x',
        [str(data), *TINY, '--epochs', '2', '--output', str(base), '--resume', str(first / 'last.pth.tar')],
    )
    checkpoint = str(first / 'model_best.pth.tar')
    out = tmp_path / 'compared'
    run_command('compare', 'x', [str(first), str(second), '--out', str(out), '--device', 'cpu', '-j', '0'])
    assert set(pd.read_csv(out / 'experiments.csv')['runs']) == {'run', r'\udcfe'}
    run_command('report', 'x', [str(first), '--device', 'cpu', '-j', '0'])
    run_command(
        'validate', 'x', [str(data), '--checkpoint', checkpoint, *COMMON, '--results-file', str(base / 'r.json')])
    assert json.loads((base / 'r.json').read_text())['checkpoint'] == checkpoint
    run_command('export', 'x', [checkpoint, '--formats', 'safetensors', '--out', str(tmp_path / 'exported')])
    said = refused('export', [checkpoint, '--formats', 'safetensors', '--out', str(base / 'exported')], capsys)
    assert r'd\udcff/exported: this path is not UTF-8' in said and not (base / 'exported').exists()
    said = refused('split', [str(data / 'train.csv'), '--image', '{image_path}', '--heads', 'color', '--out',
                           str(tmp_path / 'split')], capsys)
    assert r'd\udcff/data/images/0.png: this path to an image is not UTF-8' in said
    assert not (tmp_path / 'split').exists()


def test_trackers_that_need_utf_8(tmp_path, capsys):
    pytest.importorskip('tensorboard')
    data = write_data(tmp_path / 'data')
    said = refused('train', [str(data), *TINY, '--output', str(tmp_path), '--experiment', 'a\udcff',
                           '--log-tensorboard'], capsys)
    assert r'a\udcff is not UTF-8, as tensorboard needs it' in said and not (tmp_path / 'a\udcff').exists()


@pytest.mark.slow
def test_shards_that_are_not_utf_8(tmp_path):
    data = write_data(tmp_path / 'data')
    with tarfile.open(data / 'train-0\udcff.tar', 'w') as tar:
        for number in range(12):
            (data / f'{number}.json').write_text(f'{{"color": "{list(COLORS)[number % 3]}"}}')
            tar.add(data / f'images/{number}.png', f'{number}.png')
            tar.add(data / f'{number}.json', f'{number}.json')
    (data / 'train.csv').unlink()
    assert (train_run(data, tmp_path, '--heads', 'color', epochs=1) / 'summary.csv').is_file()
