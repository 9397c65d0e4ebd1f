"""Files that are broken, absurd or hostile: each has the outcome that docs/explanation/untrusted-files.md states."""
import csv
import io
import json
import os
import pickle
import struct
import time
import zlib

import numpy as np
import pandas as pd
import pytest
import torch
from common import TINY, train_run, write_data
from PIL import Image
from test_cli import fails

from timm_multilabel.cli.main import run_command
from timm_multilabel.data.images import MAX_PIXELS, EncodedPhoto, read_photo
from timm_multilabel.data.pool import rows_of_folder
from timm_multilabel.data.table import encode_rows, find_label_space, read_table
from timm_multilabel.errors import UserError
from timm_multilabel.labels import LabelSet, LabelSpace, Quantity
from timm_multilabel.reports.confusion import write_confusion
from timm_multilabel.training.checkpoint import load_model, read_checkpoint


def saved(image, kind, **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def ramp(size=(5, 3)):
    return Image.fromarray(np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(size[1], size[0], 3))


def decode(data):
    return EncodedPhoto(data, 'x (row 2)').decode()


def huge_png(width, height):
    """A few bytes whose header speaks of so many pixels."""
    def chunk(name, data):
        return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
    header = struct.pack('>IIBBBBB', width, height, 1, 0, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(b'')) + chunk(b'IEND', b'')


def huge_jpeg(width, height):
    data = bytearray(saved(Image.new('RGB', (16, 16)), 'JPEG'))
    place = data.index(b'\xff\xc0')
    data[place + 5:place + 9] = struct.pack('>HH', height, width)
    return bytes(data)


PROGRAM = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(x) print showpage\n%%EOF\n'
REFUSED = {
    'zero bytes': b'',
    'no image': b'nothing',
    'HTML of a failed download': b'<!DOCTYPE html><title>404</title>',
    'a broken JPEG header': b'\xff\xd8\xff\xe0\x00\x10JFIF',
    'a cut PNG': saved(ramp((50, 50)), 'PNG')[:-60],
    'a cut GIF': saved(ramp(), 'GIF')[:20],
    'a PNG of 1e9 pixels in a few bytes': huge_png(40000, 25000),
    'a JPEG of more pixels than the limit': huge_jpeg(16384, 10923),
    'an image without height': huge_png(10, 0),
    'PostScript, which Pillow would run': PROGRAM,
    'float pixels': saved(Image.fromarray(np.zeros((2, 2), np.float32)), 'TIFF'),
    'a pickle': pickle.dumps([1]),
    'an SVG': b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>alert(1)</script></svg>',
}


@pytest.mark.parametrize('what', REFUSED)
def test_images_that_are_refused_in_one_line(tmp_path, what):
    (tmp_path / 'x.jpg').write_bytes(REFUSED[what])
    started = time.process_time()
    with pytest.raises(UserError, match=r'x\.jpg \(train\.csv row 7\): cannot be decoded as an image \(.+\)') as error:
        read_photo(str(tmp_path / 'x.jpg'), 'train.csv row 7').decode()
    assert '\n' not in error.value.line and 'BytesIO' not in error.value.line
    assert time.process_time() - started < 5  # a bomb is not decoded


def test_the_limit_of_pixels_is_stated():
    assert 16384 * 10922 <= MAX_PIXELS < 16384 * 10923
    with pytest.raises(UserError, match='16384x10923 pixels are more than 178,956,970'):
        decode(huge_jpeg(16384, 10923))
    EncodedPhoto(huge_jpeg(16384, 10922), 'x')  # its header is well


def animation(kind):
    frames = [Image.new('RGB', (4, 4), color) for color in ('red', 'blue')]
    options = {'lossless': True} if kind == 'WEBP' else {}
    return saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)


@pytest.mark.parametrize('kind', ['GIF', 'WEBP', 'PNG', 'TIFF'])
def test_of_an_animation_the_first_picture_counts(kind):
    assert decode(animation(kind))[0, 0].tolist() == [255, 0, 0]


def with_exif(exif, kind='PNG'):
    return saved(ramp(), kind, exif=exif)


def tiff_of(kind, count, value):
    """EXIF with one entry, the orientation, of any type."""
    return b'Exif\0\0' + struct.pack('<2sHIHHHII', b'II', 42, 8, 1, 0x0112, kind, count, value) + b'\0' * 4


@pytest.mark.parametrize('exif', [
    tiff_of(3, 1, 0), tiff_of(3, 1, 9), tiff_of(4, 1, 2 ** 32 - 1), tiff_of(2, 4, 0x36363636), tiff_of(10, 1, 0),
    tiff_of(3, 2 ** 31, 8), b'Exif\0\0', b'Exif\0\0II*\0\xff\xff\xff\xff', b'Exif\0\0MM\0*\0\0\0\x08\xff\xff',
    b'Exif\0\0' + b'\xff' * 60000], ids=range(10))
@pytest.mark.parametrize('kind', ['PNG', 'JPEG', 'WEBP'])
def test_absurd_exif_says_nothing(exif, kind):
    plain = decode(saved(ramp(), kind))
    assert (decode(with_exif(exif, kind)) == plain).all()


def test_16_bits_keep_their_upper_half():
    deep = Image.fromarray((np.arange(6, dtype=np.uint16) * 257 * 40).reshape(2, 3))
    assert decode(saved(deep, 'PNG'))[..., 0].tolist() == [[0, 40, 80], [120, 160, 200]]


def test_what_is_no_file_is_named(tmp_path):
    folder = tmp_path / 'images'
    folder.mkdir()
    ramp().save(folder / 'a.png')
    os.mkfifo(folder / 'pipe.png')
    with pytest.raises(UserError, match='pipe.png: is no file'):
        rows_of_folder(folder, LabelSpace(()))
    with pytest.raises(UserError, match=r'pipe.png \(row 2\): cannot be read .it is a folder, a pipe'):
        read_photo(str(folder / 'pipe.png'), 'row 2')
    (folder / 'pipe.png').unlink()
    (folder / 'link.png').symlink_to(tmp_path / 'nowhere')
    with pytest.raises(UserError, match='link.png: is no file'):
        rows_of_folder(folder, LabelSpace(()))


@pytest.mark.slow
def test_links_out_of_the_data_directory_are_followed(data_dir, tmp_path):
    (data_dir / 'images').rename(tmp_path / 'store')
    (data_dir / 'images').symlink_to(tmp_path / 'store')
    assert read_checkpoint(train_run(data_dir, tmp_path, epochs=1) / 'last.pth.tar').label_space.names == (
        'color', 'shape')


@pytest.mark.slow
@pytest.mark.parametrize('content', [b'', b'nothing', huge_png(40000, 25000)], ids=['empty', 'text', 'huge'])
def test_a_bad_image_stops_a_run_or_is_left_out(data_dir, tmp_path, capsys, content):
    (data_dir / 'images' / '3.png').write_bytes(content)
    line = fails(capsys, 'train', [data_dir, *TINY, '--epochs', '1', '--output', tmp_path])
    assert '3.png (' in line and 'train.csv row 5): cannot be decoded' in line and 'replace it' in line
    folder = train_run(data_dir, tmp_path, '--skip-bad-images', epochs=1)
    assert pd.read_csv(folder / 'summary.csv')['bad_images'].tolist() == [1]


# Tables


def table(tmp_path, content, images=('a.png', 'b.png', 'c.png')):
    (tmp_path / 'images').mkdir(exist_ok=True)
    for name in images:
        ramp().save(tmp_path / 'images' / name)
    path = tmp_path / 'train.csv'
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


PLAIN = 'image_path,color\nimages/a.png,red\nimages/b.png,\nimages/c.png,NA\n'
SAME = {
    'as it is': PLAIN.encode(),
    'a byte-order mark': b'\xef\xbb\xbf' + PLAIN.encode(),
    'CRLF': PLAIN.replace('\n', '\r\n').encode(),
    'CR alone': PLAIN.replace('\n', '\r').encode(),
    'no line end at the end': PLAIN.rstrip('\n').encode(),
    'quotes': b'"image_path","color"\n"images/a.png","red"\n"images/b.png",""\n"images/c.png","NA"\n',
    'blanks and blank lines': b'image_path , color\n images/a.png, red\n\nimages/b.png,  \n   \nimages/c.png,NA \n\n',
    'semicolons': PLAIN.replace(',', ';').encode(),
    'tabs and a byte-order mark': b'\xef\xbb\xbf' + PLAIN.replace(',', '\t').encode(),
}


@pytest.mark.parametrize('how', SAME)
def test_tables_that_are_the_same(tmp_path, how):
    read = read_table(table(tmp_path, SAME[how]))
    assert read.label_columns == ['color'] and read.frame['color'].tolist() == ['red', '', 'NA']
    assert find_label_space([read], None).heads == (LabelSet('color', ('NA', 'red')),)


def test_the_header_ends_at_its_own_line_end(tmp_path):
    read = read_table(table(tmp_path, 'image_path;color\rimages/a.png;a,b\r'))
    assert read.frame['color'].tolist() == ['a,b']


WRONG = {
    'Latin-1': (PLAIN.replace('NA', 'caf\xe9').encode('latin-1'), 'row 4: byte 0xe9 is not UTF-8; save the file'),
    'Latin-1, CR alone': (PLAIN.replace('NA', 'caf\xe9').replace('\n', '\r').encode('latin-1'), 'row 4: byte 0xe9 is'),
    'UTF-16': (PLAIN.encode('utf-16'), r'row 1: byte 0xff is not UTF-8 \(it looks like UTF-16\)'),
    'UTF-16 without a mark': (PLAIN.encode('utf-16-le'), 'row 1: holds a zero byte'),
    'a workbook': (b'PK\x03\x04\x14\0\x06\0\x08\0\0\0!\0', 'row 1: holds a zero byte'),
    'nothing': (b'', 'cannot be read as a CSV'),
    'a column twice': (b'image_path,color,color\nimages/a.png,red,blue\n', "row 1: two columns are called 'color'"),
    'the image column twice': (b'image_path,image_path\na,b\n', "row 1: two columns are called 'image_path'"),
    'a surplus cell': (b'image_path,color\nimages/a.png,red,blue\n', 'cannot be read as a CSV'),
    'a quote that does not end': (b'image_path,color\nimages/a.png,"red\n', 'cannot be read as a CSV'),
    'an escape sequence as a name': (b'image_path,\x1b[31m\nimages/a.png,red\n', 'row 1: the name of column 2 holds'),
    'no image': (b'image_path,color\n,red\n', 'row 2: no image in column'),
    'a path out of this world': ('image_path,color\n' + 'x' * 5000 + ',red\n', 'images is on disk'),
    'a path with a zero byte': (b'image_path,color\nimages/a\0.png,red\n', 'row 2: holds a zero byte'),
}


@pytest.mark.parametrize('what', WRONG)
def test_tables_that_are_refused_in_one_line(tmp_path, what):
    content, message = WRONG[what]
    with pytest.raises(UserError, match=message) as error:
        read = read_table(table(tmp_path, content))
        encode_rows(read, find_label_space([read], None))
    assert '\n' not in error.value.line and str(tmp_path / 'train.csv') in error.value.line


LABELS = ['=HYPERLINK("http://x","y")', '+1', '-1', '@SUM(A1)', '<script>alert(1)</script>', 'a,b', 'say "yes"',
          '$\\frac{1}{0}$', '\u202eevil', 'line\nbreak', 'NaN', 'None', '1e5', 'true', '\U0001f9e6', "'", '&amp;']


def test_labels_of_any_kind_stay_what_they_are(tmp_path):
    text = io.StringIO()
    csv.writer(text).writerows([['image_path', 'head'], *(['images/a.png', label] for label in LABELS)])
    read = read_table(table(tmp_path, text.getvalue()))
    space = find_label_space([read], None)
    assert sorted(LABELS) == list(space.heads[0].classes)
    space.save(tmp_path / 'space.json')
    assert LabelSpace.load(tmp_path / 'space.json') == space
    targets = encode_rows(read, space).targets[:, 0]
    assert [space.heads[0].classes[int(index)] for index in targets] == LABELS


@pytest.mark.slow
def test_reports_show_labels_and_compute_nothing(tmp_path):
    labels = LabelSet('=1+1 $x', tuple(sorted(LABELS)))
    target = np.arange(len(LABELS), dtype=float)[:, None]
    written, picture = write_confusion(tmp_path, 'confusion', labels, target, target[::-1])
    assert picture.read_bytes().startswith(b'\x89PNG')
    with open(written, newline='') as file:
        rows = list(csv.reader(file))
    cells = rows[0][1:] + [row[0] for row in rows[1:]]
    assert not [cell for cell in cells if cell[:1] in ('=', '+', '-', '@', '\t', '\r')]
    assert [cell.removeprefix("'") if cell != "'" else cell for cell in rows[0][1:]] == list(labels.classes)
    write_confusion(tmp_path, 'numbers', Quantity('=x', 0.0, 1.0), target, target)


@pytest.mark.slow
def test_a_table_that_speaks_to_a_terminal_does_not(data_dir, tmp_path, capsys):
    folder = train_run(data_dir, tmp_path, epochs=1)
    (data_dir / 'odd.csv').write_text('image_path,color\nimages/0.png,\x1b[31mred\nimages/1.png,blue\n')
    run_command('validate', 'validate.py', [
        str(data_dir), '--checkpoint', str(folder / 'last.pth.tar'), '--split', 'odd', '-j', '0', '--device', 'cpu'])
    out = capsys.readouterr().out
    assert '\x1b' not in out and "color ' [31mred' in 1 row (2)" in out


@pytest.mark.slow
def test_a_million_rows(tmp_path):
    path = table(tmp_path, 'image_path,color,size\n' + ''.join(
        f'images/{"abc"[number % 3]}.png,{number % 47},{number % 5}\n' for number in range(1_000_000)))
    read = read_table(path)
    rows = encode_rows(read, find_label_space([read], None))
    assert len(rows) == 1_000_000 and rows.where(999_999) == f'{path} row 1000001'
    places = [sorted(map(str, range(47))).index(str(number)) for number in range(47)]
    assert rows.targets.sum(dim=0).tolist() == pytest.approx([
        sum(places[number % 47] for number in range(1_000_000)), 2_000_000])


# Checkpoints, label spaces, recipes


class Harm:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('trained')
    return train_run(write_data(folder / 'data'), folder, epochs=1) / 'last.pth.tar'


@pytest.mark.parametrize('where', ['state_dict', 'optimizer', 'label_space', 'alone', 'plain pickle'])
def test_a_pickle_that_would_run_code_is_refused(trained, tmp_path, where):
    path, harm = tmp_path / 'x.pth.tar', tmp_path / 'harm'
    state = torch.load(trained, weights_only=True)
    if where == 'plain pickle':
        path.write_bytes(pickle.dumps(Harm(harm)))
    else:
        torch.save(Harm(harm) if where == 'alone' else {**state, where: Harm(harm)}, path)
    with pytest.raises(UserError, match=r'x.pth.tar: cannot be loaded as a checkpoint \(') as error:
        read_checkpoint(path)
    assert '\n' not in error.value.line and not harm.exists()
    if where != 'plain pickle':
        torch.load(path, weights_only=False)
        assert harm.exists()  # so it would have


@pytest.mark.parametrize('name, value', [
    ('arch', 7), ('arch', 'no_such_model'), ('model_kwargs', {'no_such': 1}), ('model_kwargs', 'x'),
    ('head_options', {'color': {'loss': 'none'}}), ('head_options', [1]), ('projection_dim', -1),
    ('data_config', {}), ('data_config', {'input_size': [3, 10 ** 9, 10 ** 9]}), ('epoch', 'one'),
    ('label_space', {'heads': [{'name': 'color', 'classes': []}]}), ('label_space', None), ('phase', 1), ('run', 5),
    ('saver', {'checkpoint_files': [('../../harm.pth.tar', 1.0)]}), ('saver', 7), ('within', {'step': 1}),
    ('state_dict', {'backbone.x': 'y'}), ('state_dict', [])])
def test_settings_of_a_checkpoint_that_nobody_wrote(trained, tmp_path, name, value):
    state = torch.load(trained, weights_only=True)
    torch.save({**state, name: value}, tmp_path / 'x.pth.tar')
    with pytest.raises(UserError, match='x.pth.tar: ') as error:
        load_model(read_checkpoint(tmp_path / 'x.pth.tar'), 'plain')
    assert '\n' not in error.value.line


@pytest.mark.parametrize('content', [
    b'', b'{', b'[]', b'null', b'{"heads": 3}', b'{"heads": [{"name": "a", "classes": ["b", "b"]}]}',
    b'{"heads": [{"name": "a", "kind": "number", "mean": "x", "std": 1}]}', b'\xff\xfe', b'[' * 100_000])
def test_label_spaces_that_are_none(tmp_path, content):
    (tmp_path / 'label_space.json').write_bytes(content)
    with pytest.raises(UserError, match='label_space.json: cannot be read as a label space'):
        LabelSpace.load(tmp_path / 'label_space.json')


BOMB = 'a: &a [x, x, x, x, x, x, x, x, x]\n' + ''.join(
    f'{new}: &{new} [{", ".join([f"*{old}"] * 9)}]\n' for old, new in zip('abcdefgh', 'bcdefghi'))


@pytest.mark.slow
@pytest.mark.parametrize('content, message', [
    (BOMB, 'holds more than 10000 values'), ('a: &a [*a]\n', 'holds more than 10000 values, or itself'),
    ('lr: !!python/object/apply:os.system [touch harm]\n', 'cannot be read as YAML'),
    ('[' * 5000, 'cannot be read as YAML'), ('\x00', 'cannot be read as YAML'), ('- lr\n', 'expected a mapping'),
    ('lr: [1, 2]\n', "'lr' is"), ('phases: 3\n', "'phases' is no list"), ('? [a, b]\n: c\n', 'cannot be read as YAML'),
])
def test_recipes_that_are_refused_in_one_line(capsys, data_dir, tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'recipe.yaml').write_text(content)
    line = fails(capsys, 'train', [data_dir, '-c', tmp_path / 'recipe.yaml'])
    assert message in line and len(line) < 1000 and not (tmp_path / 'harm').exists()


def test_json_of_a_data_directory_that_is_none(data_dir, capsys, tmp_path):
    for content in ('[' * 100_000, '{"train": -1}', 'x'):
        (data_dir / 'rows.json').write_text(content)
        assert 'rows.json: ' in fails(capsys, 'train', [data_dir, *TINY, '--output', tmp_path / 'out'])
    (data_dir / 'rows.json').write_text(json.dumps({'train': 3}))
