"""Which files of a folder are images, and names of files that are no UTF-8, hold line breaks, or are very long."""
import os
import tarfile
from pathlib import Path

import pytest
from common import COLORS, train_run, write_data
from PIL import Image

from timm_multilabel.cli import embed, export, predict, search
from timm_multilabel.cli.main import run_command
from timm_multilabel.data.arguments import rows_of_arguments
from timm_multilabel.data.images import ENDINGS, EncodedPhoto
from timm_multilabel.data.pool import rows_of_folder
from timm_multilabel.data.shards import find_shards
from timm_multilabel.errors import UserError
from timm_multilabel.export.examples import images_of_paths
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


def test_commands_take_the_same_images(run, photos, tmp_path, capsys):
    line = f'{photos}: 14 images; {PASSED}\n'
    checkpoint, common = str(run / 'model_best.pth.tar'), ['--device', 'cpu', '-j', '0']
    run_command(predict, 'predict', [checkpoint, str(photos), '--out', str(tmp_path / 'p.csv'), *common])
    assert capsys.readouterr().err.count(line) == 1
    assert [row.split(',')[0] for row in (tmp_path / 'p.csv').read_text().splitlines()[1:]] == expected(photos)
    made = str(tmp_path / 'e.npz')
    run_command(embed, 'embed', [checkpoint, str(photos), '--out', made, *common])
    assert capsys.readouterr().err.count(line) == 1
    assert Embeddings.load(made).images.tolist() == expected(photos)
    run_command(search, 'search', [made, str(photos), '--checkpoint', checkpoint, '-k', '1', *common])
    printed = capsys.readouterr()
    assert printed.err.count(line) == 1 and len(printed.out.splitlines()) == 1 + 14
    run_command(export, 'export', [checkpoint, '--formats', 'safetensors', '--images', str(photos), '--out',
                                   str(tmp_path / 'x')])
    assert capsys.readouterr().out.count(line) == 1


def test_unlabelled_folders_take_the_same_images(photos, tmp_path, capsys):
    data = write_data(tmp_path / 'data')
    train_run(data, tmp_path, '--unlabelled', str(photos), epochs=1)
    printed = capsys.readouterr().out
    assert f'{photos}: 14 images; {PASSED}\n' in printed and 'and 14 without labels' in printed
