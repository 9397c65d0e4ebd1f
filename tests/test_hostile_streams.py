"""Hostile shards, images and wide tables: each has the outcome that docs/explanation/untrusted-files.md states."""
import gzip
import io
import json
import os
import resource
import socket
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import pyarrow
import pytest
import torch
from common import TINY
from PIL import Image
from pyarrow import parquet

from timm_multilabel import labels
from timm_multilabel.cli.main import run_command
from timm_multilabel.data import shards as shards_module
from timm_multilabel.data.images import EncodedPhoto
from timm_multilabel.data.packing import pack
from timm_multilabel.data.shards import MAX_JSON, find_shards
from timm_multilabel.data.streams import read_labels
from timm_multilabel.data.table import encode_targets, find_label_space, read_table
from timm_multilabel.errors import UserError, listed, shortened
from timm_multilabel.inference.embeddings import Embeddings
from timm_multilabel.labels import LabelSpace


def stopped(capsys, command, *args):
    """The one line of a command that ends with exit status 2."""
    with pytest.raises(SystemExit) as stop:
        run_command(command, 'x', [*map(str, args)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1 and len(error) < 2000, error
    return error


def tar_of(*members):
    """The bytes of a tar of (name or TarInfo, content)."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode='w', format=tarfile.PAX_FORMAT) as file:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return made.getvalue()


def samples(folder, **kwargs):
    return list(find_shards(folder, 'a', 'image').samples(**kwargs))


def refused(folder):
    with pytest.raises(UserError) as error:
        samples(folder)
    return error.value.line


# Names


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['webdataset', 'parquet'])
def test_names_that_are_addresses_or_commands_are_files(data_dir, tmp_path, kind, monkeypatch):
    """Shards below `pipe:touch X;` are trained and scored on, and X is never made."""
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    monkeypatch.setenv('WDS_CACHE', str(tmp_path / 'no such folder'))
    ending = {'webdataset': 'tar', 'parquet': 'parquet'}[kind]
    for folder in ('pipe:touch X;', 'my:photos', 's3:', '[ab]*?', 'hf:{0..9}::x'):
        folder = tmp_path / 'here' / folder
        folder.mkdir()
        pack(read_table(data_dir / 'train.csv'), folder, 'train', kind, size=6)
        first, second = pack(read_table(data_dir / 'val.csv'), folder, 'val', kind, size=3)
        second.rename(folder / f'pipe:touch X;cat {first.name} #.{ending}')
    for folder in ('pipe:touch X;', 'my:photos', 's3:', '[ab]*?', 'hf:{0..9}::x'):
        found = find_shards(Path(folder), 'train', 'image_path')
        assert len(list(found.samples())) == 12 and len(list(found.samples(seed=1))) == 12
    run_command('train', 'train.py', ['pipe:touch X;', *TINY, '--epochs', '1', '--output', 'out', '--experiment', 'run',
                                    '-wls', '0', '--val-split', f'pipe:touch X;/*.{ending}'])
    run_command('validate', 'validate.py', [
        'my:photos', '--checkpoint', 'out/run/last.pth.tar', '--split', f'my:photos/pipe:touch X;cat *.{ending}',
        '-j', '0', '--device', 'cpu', '--results-file', 'out.json'])
    assert not (tmp_path / 'here' / 'X').exists() and json.loads(Path('out.json').read_text())


def test_a_shard_is_written_under_any_name(data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('pipe:cat > X; ').mkdir()
    path, = pack(read_table(data_dir / 'val.csv'), Path('pipe:cat > X; '), 'val', 'webdataset')
    assert path.is_file() and not Path('X').exists()


def test_a_file_whose_name_holds_wildcards_is_found_by_it(tmp_path):
    (tmp_path / 'a[1].tar').write_bytes(tar_of(('0.jpg', b'1')))
    (tmp_path / 'a1.tar').write_bytes(tar_of(('0.jpg', b'2')))
    assert [each.image for each in find_shards(Path('x'), str(tmp_path / 'a[1].tar'), 'image').samples()] == [b'1']


@pytest.mark.parametrize('ending', ['tar', 'parquet'])
@pytest.mark.parametrize('what', ['a pipe', 'a socket', 'a folder', 'a device'])
def test_what_is_no_file_is_refused_at_once(tmp_path, what, ending):
    path = tmp_path / f'a-0.{ending}'
    with socket.socket(socket.AF_UNIX) as listener:
        {'a pipe': os.mkfifo, 'a folder': os.mkdir, 'a device': lambda path: os.symlink('/dev/zero', path),
         'a socket': lambda path: listener.bind(os.path.relpath(path))}[what](path)
        assert f'{path}: cannot be read as' in (line := refused(tmp_path)) and 'not a file' in line


def test_embeddings_are_read_from_a_file_of_any_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('s3:').mkdir()
    parquet.write_table(pyarrow.table({'image': ['a']}), tmp_path / 's3:' / 'x.parquet')
    with pytest.raises(UserError, match='s3:/x.parquet: cannot be read as embeddings ..Column embedding'):
        Embeddings.load('s3:/x.parquet')


# Tars


def sparse():
    info = tarfile.TarInfo('0.jpg')
    info.pax_headers = {'GNU.sparse.major': '0', 'GNU.sparse.minor': '1', 'GNU.sparse.name': '0.jpg',
                        'GNU.sparse.map': '0,4', 'GNU.sparse.size': str(2 ** 40)}
    return info, b'1234'


def claims(size, kind=b'0'):
    """A tar whose first header claims a size or a kind, its checksum right."""
    made = bytearray(tar_of(('0.jpg', b'{}'), ('0.json', b'{}')))
    made[124:136] = size.to_bytes(12, 'big', signed=True)
    made[124] |= 0x80
    made[156:157] = kind
    made[148:156] = b' ' * 8
    made[148:156] = b'%06o\0 ' % sum(made[:512])
    return bytes(made)


TARS = {
    'compressed': (lambda: gzip.compress(claims(2)), 'write it as a plain one, not compressed'),
    'sparse': (lambda: tar_of(sparse()), 'is a sparse file'),
    'larger than it may be': (lambda: claims(2 ** 31 + 1), 'makes more than 2,147,483,648 bytes'),
    'larger than the tar': (lambda: claims(10 ** 6), "'0.jpg' is cut off"),
    'of negative size': (lambda: claims(-1024), "'0.jpg' ends before it begins"),
    'JSON too large': (lambda: tar_of(('0.jpg', b''), ('0.json', b' ' * (MAX_JSON + 1))), 'more than 16,777,216 bytes'),
    'an extended header of gigabytes': (lambda: claims(2 ** 33, b'x'), 'a header of 8,589,934,592 bytes'),
    'a long name of gigabytes': (lambda: claims(2 ** 33, b'L'), 'a header of 8,589,934,592 bytes'),
    'headers without end': (lambda: claims(0, b'L')[:512] * 5000, 'cannot be read as a tar'),
    'the same file twice': (lambda: tar_of(('0.jpg', b''), ('0.jpg', b'')), 'duplicate file name'),
    'tags in tags': (lambda: tar_of(('0.jpg', b''), ('0.json', b'{"a": [["b"]]}')), "'a' is no text, number or list"),
    'tags 900 deep': (lambda: tar_of(('0.jpg', b''), ('0.json', b'{"a": %s1%s}' % (b'[' * 900, b']' * 900))),
                      "'a' is no text, number or list"),
    'half a surrogate pair': (lambda: tar_of(('0.jpg', b''), ('0.json', b'{"a": "\\ud800"}')),
                              'cannot be written as text'),
    'no name of a column': (lambda: tar_of(('0.jpg', b''), ('0.json', b'{"": "b"}')), 'a label column without a name'),
    'a column of escapes': (lambda: tar_of(('0.jpg', b''), ('0.json', b'{"\\u001b": "b"}')), 'cannot be shown'),
}


@pytest.mark.parametrize('what', TARS)
def test_tars_that_are_refused_in_one_line(tmp_path, what):
    make, message = TARS[what]
    (tmp_path / 'a-0.tar').write_bytes(make())
    started = time.process_time()
    line = refused(tmp_path)
    assert message in line and line.startswith((f'{tmp_path}/a-', 'a-0.tar sample 0')) and len(line) < 500
    assert time.process_time() - started < 5


def test_a_sample_of_many_large_members_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, 'MAX_BYTES', 100)
    (tmp_path / 'a-0.tar').write_bytes(tar_of(('0.1.jpg', b' ' * 60), ('0.2.jpg', b' ' * 60)))
    assert "'0.2.jpg' makes more than 100 bytes" in refused(tmp_path)
    (tmp_path / 'a-0.tar').write_bytes(tar_of(('0.jpg', b' ' * 60), ('1.jpg', b' ' * 60)))
    assert len(samples(tmp_path)) == 2


@pytest.mark.parametrize('name', ['../0.jpg', '/0.jpg', '0.jpg'])
def test_names_of_members_are_names_only(tmp_path, name):
    """Whatever members are called, nothing is written, and metadata cannot take the place of the library's own."""
    (tmp_path / 'a-0.tar').write_bytes(tar_of(
        ('__meta__/0.jpg', b'x'), (name, b'image'), (name[:-3] + '__bad__', b'1'), (name[:-3] + '__url__', b'1')))
    sample, = samples(tmp_path)
    assert sample == (f'a-0.tar sample {name[:-4]}', b'image', {})
    assert os.listdir(tmp_path) == ['a-0.tar']


def test_a_name_that_is_not_utf_8_can_be_shown(tmp_path):
    (tmp_path / 'a-0.tar').write_bytes(tar_of(('q.jpg', b'image')).replace(b'q.jpg', b'\xff.jpg', 1))
    data = bytearray((tmp_path / 'a-0.tar').read_bytes())
    data[148:156] = b' ' * 8
    data[148:156] = b'%06o\0 ' % sum(data[:512])
    (tmp_path / 'a-0.tar').write_bytes(data)
    sample, = samples(tmp_path)
    assert sample.name == 'a-0.tar sample \\xff'


def test_samples_with_columns_of_their_own_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr('timm_multilabel.cells._MAX_CELLS', 10 ** 6)
    members = [(f'{number}.json', json.dumps({f'c{number}_{part}': 'x' for part in range(20)}).encode())
               for number in range(300)]
    (tmp_path / 'a-0.tar').write_bytes(tar_of(*(
        each for member in members for each in ((member[0][:-4] + 'jpg', b''), member))))
    with pytest.raises(UserError, match='have 6,000 label columns, nearly all of them empty'):
        read_labels(find_shards(tmp_path, 'a', 'image').samples(images=False))


# Parquet


def write_parquet(path, images, **kwargs):
    table = pyarrow.table({'image': pyarrow.array(images, pyarrow.binary()), 'label': ['a'] * len(images)})
    parquet.write_table(table, path, **kwargs)


READ = """import sys
from pathlib import Path
from timm_multilabel.data.shards import find_shards
from timm_multilabel.errors import UserError
for folder in sys.argv[1:]:
    try:
        print(sum(len(each.image) for each in find_shards(Path(folder), 'a', 'image').samples()))
    except UserError as error:
        print(error.line)
    # Not of getrusage, whose peak is that of the process before it was this one, too.
    print(next(int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith('VmHWM')))"""


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='memory is read from /proc')
def test_parquet_that_expands_is_refused(tmp_path):
    """Zeros, which take a thousandth on disk; one value that a dictionary makes the value of every row."""
    for name in ('small', 'zeros', 'dictionary'):
        (tmp_path / name).mkdir()
    write_parquet(tmp_path / 'small' / 'a.parquet', [b'0'])
    write_parquet(tmp_path / 'zeros' / 'a.parquet', [bytes(2 ** 24)] * 17, compression='zstd', use_dictionary=False)
    images = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1000, pyarrow.int32()), [bytes(2 ** 23)])
    parquet.write_table(pyarrow.table({'image': images}), tmp_path / 'dictionary' / 'a.parquet', compression='zstd',
                        store_schema=False)
    done = subprocess.run([sys.executable, '-c', READ, *(str(tmp_path / name) for name in (
        'small', 'zeros', 'dictionary'))], capture_output=True, text=True, check=True)
    small, least, zeros, _, dictionary, most = done.stdout.splitlines()
    assert small == '1'
    for name, line in (('zeros', zeros), ('dictionary', dictionary)):
        assert line.startswith(f'{tmp_path / name}/a.parquet: cannot be read as Parquet (row group 1 expands to more '
                               'than 268,435,456 bytes, which is out of all proportion')
    assert int(most) - int(least) < 2 ** 27


def test_rows_of_one_picture_are_read(tmp_path):
    """A little expansion is none, and pictures that do not compress may be of any number."""
    write_parquet(tmp_path / 'a.parquet', [b'x' * 1000] * 1000, compression='zstd')
    assert len(samples(tmp_path)) == 1000


def write_with_metadata(path, features, value=1):
    table = pyarrow.table({'image': pyarrow.array([b'x']), 'label': pyarrow.array([value])})
    metadata = {'huggingface': json.dumps({'info': {'features': features}})}
    parquet.write_table(table.replace_schema_metadata(metadata), path)


@pytest.mark.parametrize('features, message', [
    ({'label': {'_type': 'ClassLabel', 'names_file': '/dev/zero'}}, 'metadata of columns cannot be read'),
    ({'label': {'_type': 'NoSuchThing'}}, 'metadata of columns cannot be read'),
    ([], 'metadata of columns cannot be read'),
    ({'label': {'_type': 'ClassLabel', 'names': ['a']}, 'image': {'_type': 'Value', 'dtype': 'binary'}},
     "a.parquet row 1: 'label' is class 1, and its metadata name 1"),
])
def test_metadata_of_parquet_that_lie(tmp_path, features, message):
    write_with_metadata(tmp_path / 'a.parquet', features)
    assert message in refused(tmp_path)


def test_a_column_twice_in_parquet_is_refused(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array([b'x']), pyarrow.array(['a']), pyarrow.array(['b'])],
                                      ['image', 'label', 'label'])
    parquet.write_table(table, tmp_path / 'a.parquet')
    assert "two columns are called 'label'" in refused(tmp_path)


def test_lists_in_lists_of_parquet_are_refused(tmp_path):
    kind = pyarrow.string()
    for _ in range(40):
        kind = pyarrow.list_(kind)
    value = 'x'
    for _ in range(40):
        value = [value]
    parquet.write_table(pyarrow.table({'image': [b'x'], 'tags': pyarrow.array([value], kind)}), tmp_path / 'a.parquet')
    assert "a.parquet row 1: 'tags' is no text, number or list of tags" in refused(tmp_path)


# What a data directory says of its shards


@pytest.mark.parametrize('kind', ['webdataset', 'parquet'])
def test_a_count_that_shards_cannot_hold_is_refused(data_dir, tmp_path, kind, capsys):
    for name in ('train', 'val'):
        pack(read_table(data_dir / f'{name}.csv'), tmp_path, name, kind)
    find_label_space([read_table(data_dir / 'train.csv')], None).save(tmp_path / 'label_space.json')
    for count in (10 ** 12, 10 ** 400):
        (tmp_path / 'rows.json').write_text(f'{{"train": {count}, "val": 6}}')
        error = stopped(capsys, 'train', tmp_path, *TINY, '--epochs', '1', '--output', tmp_path / 'out')
        assert 'rows.json' in error and 'remove' in error
    assert not (tmp_path / 'out').exists()
    (tmp_path / 'rows.json').write_bytes(b' ' * 2 ** 21)
    assert 'more than 1,048,576 bytes' in stopped(capsys, 'train', tmp_path, *TINY, '--output', tmp_path / 'out')


@pytest.mark.parametrize('head, message', [
    ({'name': 'a', 'kind': 'number', 'mean': 0, 'std': 0}, "head 'a' has no mean and standard deviation"),
    ({'name': 'a', 'kind': 'number', 'mean': float('nan'), 'std': 1}, "head 'a' has no mean and standard deviation"),
    ({'name': 'a', 'kind': 'tags', 'classes': ['b'], 'group': ['c', 'd']},
     "head 'a' has no classes, has one twice, or those of other columns"),
    ({'name': 'a', 'classes': ['\ud800']}, 'a name or a label that is no text'),
])
def test_label_spaces_that_no_run_would_write_are_refused(tmp_path, head, message):
    (tmp_path / 'x.json').write_text(json.dumps({'heads': [head]}))
    with pytest.raises(UserError, match=message):
        LabelSpace.load(tmp_path / 'x.json')


# Images


def saved(image, kind, **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def with_scans(scans, width, height, mode='RGB'):
    """A progressive JPEG with its last scan so many times more, of a size that only its header has."""
    data = bytearray(saved(Image.new(mode, (16, 16)), 'JPEG', progressive=True))
    place = data.index(b'\xff\xc2')
    data[place + 5:place + 9] = struct.pack('>HH', height, width)
    last = bytes(data[data.rindex(b'\xff\xda'):-2])
    return bytes(data[:-2]) + last * scans + b'\xff\xd9'


def chunk(name, data):
    return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))


def png_with(chunks):
    data = saved(Image.new('RGB', (4, 4)), 'PNG')
    return data[:33] + chunks + data[33:]


def tiff_of_a_huge_tile():
    entries = [(256, 10), (257, 10), (258, 8), (259, 32773), (262, 1), (322, 45000), (323, 45000), (324, 122), (325, 8)]
    return b'II*\0\x08\0\0\0' + struct.pack('<H', 9) + b''.join(
        struct.pack('<HHII', tag, 4, 1, value) for tag, value in entries) + bytes(4) + b'\x81\0' * 4


BOMBS = {
    'scans': (lambda: with_scans(2000, 4000, 4000), 'more than 268 scans of 4000x4000 pixels'),
    'scans of CMYK': (lambda: with_scans(2000, 4000, 4000, 'CMYK'), 'more than 268 scans'),
    'scans of the largest photo': (lambda: with_scans(50, 16384, 10922), 'more than 23 scans'),
    'scans of a few columns': (lambda: with_scans(70000, 1, 8000), 'more than 16,777 scans'),
    'chunks': (lambda: png_with(chunk(b'prVt', b'') * 100_001), 'more than 100,000 chunks'),
    'a comment of megabytes': (lambda: b'P6 #' + b'a' * 2 ** 20 + b'\n4 4 255 ' + bytes(48), 'a header of more than'),
    'a picture as text': (lambda: b'P3 2000 800 255 ' + b'1 ' * 4_800_000, 'slow to decode'),
    'a picture of values up to 1000': (lambda: b'P6 2000 800 1000 ' + bytes(9_600_000), 'slow to decode'),
    'runs of a BMP': (lambda: bmp_of_runs(16384, 10922), 'slow to decode'),
    'a tile': (tiff_of_a_huge_tile, '10x10 pixels in tiles of 45000x45000'),
}


def bmp_of_runs(width, height):
    header = struct.pack('<IiiHHIIiiII', 40, width, height, 1, 8, 1, 4, 0, 0, 256, 0)
    return b'BM' + struct.pack('<IHHI', 1082, 0, 0, 1078) + header + bytes(1024) + b'\xff\0\0\1'


@pytest.mark.parametrize('what', BOMBS)
def test_images_that_are_slow_to_decode_are_refused(what):
    make, message = BOMBS[what]
    data = make()
    started = time.process_time()
    with pytest.raises(UserError, match=rf'x \(row 2\): cannot be decoded as an image \(.*{message}'):
        EncodedPhoto(data, 'x (row 2)').decode()
    assert time.process_time() - started < 3


def test_photos_of_a_few_scans_and_with_a_video_behind_are_decoded():
    plain = saved(Image.new('RGB', (640, 480), 'red'), 'JPEG')
    behind = with_scans(30000, 4000, 4000)  # not part of the photo
    for data in (with_scans(10, 640, 480), plain, plain + behind):
        assert EncodedPhoto(data, 'x').decode().shape == (480, 640, 3)
    EncodedPhoto(with_scans(13, 16384, 10922), 'x')  # 23 scans, not decoded here
    # A preview within the photo, as cameras put it there, is none of its scans.
    preview = with_scans(4000, 64, 64)[:60000]
    segment = b'\xff\xe2' + struct.pack('>H', len(preview) + 2) + preview
    assert EncodedPhoto(plain[:2] + segment + plain[2:], 'x').decode().shape == (480, 640, 3)


def test_slow_kinds_of_images_are_decoded_where_they_are_small():
    assert EncodedPhoto(b'P3 2 1 255 255 0 0 0 255 0', 'x').decode().tolist() == [[[255, 0, 0], [0, 255, 0]]]
    assert EncodedPhoto(b'P6 #c\n2 1 1000 ' + b'\3\xe8' * 6, 'x').decode().tolist() == [[[255] * 3] * 2]
    assert EncodedPhoto(png_with(chunk(b'tEXt', b'a\0b') * 1000), 'x').decode().shape == (4, 4, 3)


# Tables and labels


@pytest.mark.slow
def test_check_takes_time_in_proportion_to_columns(tmp_path, capsys):
    def seconds(columns):
        folder = tmp_path / str(columns)
        folder.mkdir()
        Image.new('RGB', (4, 4)).save(folder / '0.png')
        for name in ('train', 'val'):
            (folder / f'{name}.csv').write_text(
                'image_path,' + ','.join(f'column {number}' for number in range(columns)) + '\n'
                + ''.join('0.png,' + ','.join([text] * columns) + '\n' for text in 'ab'))
        started = resource.getrusage(resource.RUSAGE_SELF).ru_utime
        with pytest.raises(SystemExit):  # a picture is in both splits
            run_command('check', 'check', [str(folder), '--missing-value', 'none'])
        assert f'column {columns - 1} ' in capsys.readouterr().out
        table = read_table(folder / 'train.csv')
        assert encode_targets(table, find_label_space([table], None), False, '').shape == (2, columns)
        return resource.getrusage(resource.RUSAGE_SELF).ru_utime - started

    seconds(10)  # what is loaded once
    assert seconds(1200) < 12 * seconds(200)  # 36 times where it grows with the square


def test_a_message_names_some_of_many_columns(tmp_path):
    (tmp_path / 'a.csv').write_text('x,' + ','.join(f'c{number}' for number in range(5000)) + '\n1\n')
    with pytest.raises(UserError, match=r'c18 and 4,981 more\)') as error:
        read_table(tmp_path / 'a.csv')
    assert len(error.value.line) < 400


def test_a_hole_of_terabytes_is_no_table(tmp_path):
    with open(tmp_path / 'a.csv', 'wb') as file:
        file.write(b'image_path,label\n')
        file.truncate(2 ** 38)  # takes no room on disk
    with pytest.raises(UserError, match='a.csv row 2: holds a zero byte'):
        read_table(tmp_path / 'a.csv')


def test_more_classes_than_float32_can_count_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(labels, 'MAX_CLASSES', 2)
    (tmp_path / 'a.csv').write_text('image_path,label\n' + ''.join(f'0.png,{text}\n' for text in 'abc'))
    with pytest.raises(UserError, match="a.csv: column 'label' has 3 different labels, and 2 are the most; leave it"):
        find_label_space([read_table(tmp_path / 'a.csv')], None)
    monkeypatch.setattr(labels, 'MAX_CLASSES', 3)
    space = find_label_space([read_table(tmp_path / 'a.csv')], None)
    space.save(tmp_path / 'x.json')
    monkeypatch.setattr(labels, 'MAX_CLASSES', 2)
    with pytest.raises(UserError, match="head 'label' has more than 2 classes"):
        LabelSpace.load(tmp_path / 'x.json')


def test_class_indices_up_to_the_limit_are_exact():
    assert labels.MAX_CLASSES - 1 == int(torch.tensor(labels.MAX_CLASSES - 1, dtype=torch.float32))


@pytest.mark.slow
def test_a_label_of_megabytes_is_shortened_in_messages(data_dir, capsys, tmp_path):
    path = data_dir / 'val.csv'
    path.write_text(path.read_text().replace('red', 'x' * 10 ** 7, 1))
    error = stopped(capsys, 'train', data_dir, *TINY, '--epochs', '1', '--output', tmp_path / 'out')
    assert f"color '{'x' * 79}\u2026' in 1 row" in error
    with pytest.raises(SystemExit) as stop:
        run_command('check', 'check', [str(data_dir)])
    assert stop.value.code == 1 and max(map(len, capsys.readouterr().out.splitlines())) < 500
    for options in (['--head', 'color:loss=numeric'], ['--head', 'color:loss=arcface']):
        cell = 'y|' * 10 ** 6
        (data_dir / 'train.csv').write_text(f'image_path,color\nimages/0.png,{cell}\n')
        assert 'row 2' in stopped(capsys, 'train', data_dir, *TINY, *options, '--output', tmp_path / 'out')


def test_shortened_and_listed():
    assert shortened('a' * 80) == 'a' * 80 and shortened('a' * 81) == 'a' * 79 + '\u2026'
    assert listed(['a', 'b']) == 'a, b' and listed([]) == '' and listed(['a'] * 22) == 'a, ' * 19 + 'a and 2 more'
