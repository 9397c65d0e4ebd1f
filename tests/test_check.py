"""`check`: each finding on a small data directory made for it, in exact numbers; the text, the JSON, exit statuses."""
import json
import os
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from timm_multilabel.cli.main import main, run_command
from timm_multilabel.data.images import read_photo
from timm_multilabel.data.scan import read_contents, scan_images
from timm_multilabel.data.table import look_for_images, read_table
from timm_multilabel.errors import UserError
from timm_multilabel.reports.data_check import report_on

HEADER = 'image_path,color,shape'


def picture(seed: int, width: int = 8, height: int = 6, mode: str = 'RGB') -> Image.Image:
    """Pixels that no other seed has."""
    shape = (height, width) if mode == 'L' else (height, width, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def write(folder: Path, name: str, *rows: str, header: str = HEADER) -> None:
    """A CSV with an image for each row that has none yet; a picture `N.png` is that of seed N."""
    (folder / 'images').mkdir(parents=True, exist_ok=True)
    (folder / f'{name}.csv').write_text('\n'.join([header, *(f'images/{row}' for row in rows)]) + '\n')
    for row in rows:
        path = folder / 'images' / row.split(',')[0]
        if not path.exists():
            picture(int(path.stem)).save(path)


def rows(first: int, number: int, labels: str = 'red,disc') -> list[str]:
    return [f'{seed}.png,{labels}' for seed in range(first, first + number)]


@pytest.fixture
def clean(tmp_path):
    """12 training and 2 validation pictures of which all is as it should be."""
    folder = tmp_path / 'data'
    write(folder, 'train', *rows(0, 7, 'red,disc'), *rows(7, 5, 'blue,disc'))
    write(folder, 'val', *rows(20, 1, 'red,disc'), *rows(21, 1, 'blue,disc'))
    return folder


def check_folder(folder, examples=5, **kwargs):
    contents = read_contents(folder, **kwargs)
    return report_on(contents, scan_images(contents.files, 2), examples)


def findings(folder, **kwargs):
    """Severity, count, splits, head and examples of each finding, by kind."""
    found = {}
    for finding in check_folder(folder, **kwargs).findings:
        found.setdefault(finding.kind, []).append(
            (finding.severity, finding.count, finding.splits, finding.head, finding.examples))
    return found


def run(capsys, *argv):
    """Exit status, standard output and standard error of the command."""
    status = 0
    try:
        run_command('check', 'check', [str(word) for word in argv])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    return status, out, err


def test_a_clean_directory(capsys, clean):
    status, out, err = run(capsys, clean)
    assert (status, err) == (0, '')
    assert out.splitlines() == [
        'train.csv  12 rows, 12 images, 24 labels',
        'val.csv    2 rows, 2 images, 4 labels',
        'columns look like: color classes (2), shape classes (1)',
        '',
        'head   classes  labels in train  labels in val  rarest in train  most frequent in train',
        'color        2               12              2  blue 5           red 7 (58.3 %)',
        'shape        1               12              2  disc 12          disc 12 (100.0 %)',
        '',
        '14 image files',
        'sizes: 1 different, smallest 8x6, largest 8x6; 8x6 (14)',
        'modes: RGB (14)',
        'formats: PNG (14)',
        '',
        '0 errors, 0 notes',
    ]


def test_missing_images(clean):
    (clean / 'images' / '3.png').unlink()
    (clean / 'images' / '21.png').unlink()
    (clean / 'images' / '21.png').symlink_to('nowhere')
    assert findings(clean) == {'missing-images': [
        ('error', 1, ('train',), None, ('train.csv row 5 (images/3.png)',)),
        ('error', 1, ('val',), None, ('val.csv row 3 (images/21.png)',))]}
    splits = check_folder(clean).splits
    assert [(split['rows'], split['images'], split['missing']) for split in splits.values()] == [(12, 11, 1), (2, 1, 1)]


def test_no_image_at_all_is_there(clean):
    for path in (clean / 'images').iterdir():
        path.unlink()
    assert [finding[1] for finding in findings(clean)['missing-images']] == [12, 2]
    assert check_folder(clean).images == {
        'files': 0, 'sizes': {'different': 0, 'smallest': [], 'largest': [], 'most_common': []}, 'modes': {},
        'formats': {}}


def test_where_a_table_finds_its_images(clean):
    (clean / 'images' / '3.png').unlink()
    paths, exists = look_for_images(read_table(clean / 'train.csv'))
    assert paths == [str(clean / 'images' / f'{seed}.png') for seed in range(12)]
    assert exists == [seed != 3 for seed in range(12)]


def test_unreadable_images(clean):
    (clean / 'images' / '3.png').write_bytes(b'x')
    picture(4, 64, 64).save(clean / 'images' / 'whole.jpg')  # cut in the middle, its header is well
    (clean / 'images' / '4.png').write_bytes((clean / 'images' / 'whole.jpg').read_bytes()[:1500])
    write(clean, 'test', *rows(3, 1, 'red,disc'))
    found = findings(clean)
    assert list(found) == ['unreadable-images']
    (severity, count, splits, _, examples), second = found['unreadable-images']
    assert (severity, count, splits, len(examples)) == ('error', 2, ('train',), 2)
    assert examples[0].startswith('train.csv row 5 (3.png): cannot be decoded as an image (cannot identify')
    assert examples[1].startswith('train.csv row 6 (4.png): cannot be decoded as an image (image file is truncated')
    assert second[:3] == ('error', 1, ('test',)) and second[4][0].startswith('test.csv row 2 (3.png): cannot be')
    assert check_folder(clean).splits['train']['unreadable'] == 2


def test_links_that_lead_out(clean, tmp_path):
    elsewhere = tmp_path / f'{clean.name}-of-before'
    elsewhere.mkdir()
    (clean / 'images' / '3.png').rename(elsewhere / '3.png')
    (clean / 'images' / '3.png').symlink_to(elsewhere / '3.png')
    (clean / 'images' / '4.png').rename(clean / '4.png')
    (clean / 'images' / '4.png').symlink_to(clean / '4.png')  # stays within
    real = os.path.realpath(elsewhere / '3.png')
    expected = [('note', 1, ('train',), None, (f'train.csv row 5 (3.png) -> {real}',))]
    assert findings(clean) == {'links-out': expected}
    (tmp_path / 'link').symlink_to(clean)  # the directory itself may be one
    assert findings(tmp_path / 'link') == {'links-out': expected}
    (clean / 'images').rename(tmp_path / 'photos')
    (clean / 'images').symlink_to(tmp_path / 'photos')  # from where 4.png leads back
    assert [(finding[1], finding[2]) for finding in findings(clean)['links-out']] == [(11, ('train',)), (2, ('val',))]


def test_images_outside_by_their_paths_are_no_links(clean):
    (clean / 'images').rename(clean.parent / 'images')
    assert findings(clean) == {}


def test_rows_without_labels(clean):
    write(clean, 'train', *rows(0, 6, 'red,disc'), *rows(6, 5, 'blue,'), *rows(11, 1, ' ,'))
    write(clean, 'val', *rows(20, 1, 'red,disc'), *rows(21, 1, 'blue,'), *rows(22, 2, ','))
    assert findings(clean) == {'rows-without-labels': [
        ('note', 1, ('train',), None, ('train.csv row 13 (11.png)',)),
        ('note', 2, ('val',), None, ('val.csv row 4 (22.png)', 'val.csv row 5 (23.png)'))]}
    assert check_folder(clean).splits['train']['labels'] == {'color': 11, 'shape': 6}


def test_rare_classes_and_those_that_val_lacks(clean):
    write(clean, 'train', *rows(0, 6, 'red,disc'), *rows(6, 5, 'blue,disc'), *rows(11, 4, 'pink,disc'),
          *rows(15, 1, 'grey,disc'))
    assert findings(clean) == {
        'rare-classes': [('note', 2, ('train',), 'color', ("'grey' 1", "'pink' 4"))],
        'classes-not-in-val': [
            ('note', 2, ('train', 'val'), 'color', ("'pink' (4 in train.csv)", "'grey' (1 in train.csv)"))],
    }


def test_classes_of_all_csv(clean):
    write(clean, 'all', *rows(0, 1, 'red,disc'), *rows(7, 1, 'blue,disc'), *rows(30, 1, 'pink,disc'),
          *rows(31, 1, 'grey,disc'))
    write(clean, 'val', *rows(20, 1, 'red,disc'), *rows(21, 1, 'blue,disc'), *rows(22, 1, 'pink,disc'))
    report = check_folder(clean)
    assert [(finding.kind, finding.count, finding.examples) for finding in report.findings] == [
        ('rare-classes', 2, ("'grey' 0", "'pink' 0"))]
    assert report.findings[0].text == (
        "'color': 2 of 4 classes with fewer than 5 images in train.csv, 2 of them with none")
    assert report.classes_from == str(clean / 'all.csv')
    assert report.images['files'] == 15  # those of all.csv alone are not looked at
    assert report.heads['color'] == {'kind': 'classes', 'classes': 4, 'counts': {
        'train': {'blue': 5, 'grey': 0, 'pink': 0, 'red': 7}, 'val': {'blue': 1, 'grey': 0, 'pink': 1, 'red': 1}}}


def test_unknown_labels(clean):
    write(clean, 'val', *rows(20, 1, 'red,disc'), *rows(21, 1, 'blue,disc'), *rows(22, 2, 'pink,disc'),
          *rows(24, 1, 'grey,ring'))
    write(clean, 'test', *rows(40, 1, 'teal,disc'))
    report = check_folder(clean)
    assert findings(clean) == {'unknown-labels': [
        ('error', 2, ('val',), 'color', ("'grey' in val.csv row 6", "'pink' in val.csv row 4")),
        ('error', 1, ('val',), 'shape', ("'ring' in val.csv row 6",)),
        ('error', 1, ('test',), 'color', ("'teal' in test.csv row 2",))]}
    assert report.findings[0].text == (
        "val.csv: 2 labels of 'color' in 3 rows, which train.csv does not know: training stops, unless "
        '--unknown-labels ignore takes them as missing')
    assert report.findings[2].text.endswith('they are not scored')
    assert report.heads['color']['counts']['val'] == {'blue': 1, 'red': 1, 'grey': 1, 'pink': 2}


def test_label_of_train_that_all_csv_lacks(clean):
    write(clean, 'all', *rows(7, 1, 'blue,disc'))
    write(clean, 'val', *rows(21, 1, 'blue,disc'))
    (finding,) = check_folder(clean).findings
    assert (finding.kind, finding.severity, finding.splits, finding.head) == (
        'unknown-labels', 'error', ('train',), 'color')
    assert finding.text == ("train.csv: 1 label of 'color' in 7 rows, which all.csv does not know: training stops; add "
                            'rows with them to all.csv, or fix them')


@pytest.mark.parametrize('first, second, severity', [
    ('train', 'val', 'error'), ('train', 'test', 'error'), ('val', 'test', 'error'), ('train', 'unlabelled', 'note'),
    ('val', 'unlabelled', 'note'), ('test', 'unlabelled', 'note'),
])
def test_same_image_in_two_splits(clean, first, second, severity):
    write(clean, 'test', *rows(40, 1))
    write(clean, 'unlabelled', '50.png', header='image_path')
    seeds = {'train': 0, 'val': 20, 'test': 40, 'unlabelled': 50}
    picture(seeds[first]).save(clean / 'images' / f'{seeds[second]}.png', compress_level=0)
    assert findings(clean) == {'same-image-across-splits': [(severity, 1, (first, second), None, (
        f'{second}.csv row 2 ({seeds[second]}.png) = {first}.csv row 2 ({seeds[first]}.png)',))]}


def write_as_other_file(source: Path, path: Path) -> None:
    with Image.open(source) as image:
        image.load()
    if path.stem == 'metadata':
        text = PngImagePlugin.PngInfo()
        text.add_text('Comment', 'taken elsewhere')
        image.save(path, pnginfo=text)
    elif path.stem == 'turned':
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees
        image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    elif path.stem == 'palette':
        image.quantize(64).save(path)  # of its 48 pixels none is lost
    else:
        image.save(path)


@pytest.mark.parametrize('name', ['other.bmp', 'other.tiff', 'metadata.png', 'turned.png', 'palette.gif'])
def test_same_pixels_in_other_files(clean, name):
    path = clean / 'images' / name
    write_as_other_file(clean / 'images' / '2.png', path)
    assert path.read_bytes() != (clean / 'images' / '2.png').read_bytes()
    (clean / 'val.csv').write_text((clean / 'val.csv').read_text() + f'images/{name},red,disc\n')
    assert findings(clean) == {'same-image-across-splits': [
        ('error', 1, ('train', 'val'), None, (f'val.csv row 4 ({name}) = train.csv row 4 (2.png)',))]}


def test_a_jpeg_and_its_pixels_in_a_png(clean):
    picture(22, 40, 30).save(clean / 'images' / '22.jpg', quality=80)
    pixels = read_photo(str(clean / 'images' / '22.jpg'), '').decode()
    Image.fromarray(pixels).save(clean / 'images' / '22.png')
    write(clean, 'val', *rows(20, 3, 'red,disc'))
    write(clean, 'train', *rows(0, 7, 'red,disc'), *rows(7, 5, 'blue,disc'), '22.jpg,red,disc')
    assert findings(clean)['same-image-across-splits'][0][4] == ('val.csv row 4 (22.png) = train.csv row 14 (22.jpg)',)


def test_nearly_the_same_image_is_another_one(clean):
    pixels = np.asarray(picture(2)).copy()
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(clean / 'images' / '20.png')
    Image.fromarray(np.asarray(picture(3)).reshape(8, 6, 3)).save(clean / 'images' / '21.png')  # the same bytes
    assert findings(clean) == {}


def test_counts_of_rows_and_of_images(clean):
    """Two images of train in three rows of val, one of them in two rows of train."""
    write(clean, 'train', *rows(0, 7, 'red,disc'), *rows(7, 5, 'blue,disc'), *rows(12, 2, 'red,disc'))
    for copy, original in ((12, 0), (30, 1), (31, 0), (32, 0)):
        picture(original).save(clean / 'images' / f'{copy}.png')
    write(clean, 'val', *rows(20, 1, 'red,disc'), *rows(21, 1, 'blue,disc'), *rows(30, 3, 'red,disc'))
    leak, *repeats = check_folder(clean, examples=2).findings
    assert leak.text == ('val.csv: 3 of 5 rows show an image of train.csv (2 different images): training has seen '
                         'them, so metrics on them say too much')
    assert (leak.count, leak.examples) == (3, (
        'val.csv row 4 (30.png) = train.csv row 3 (1.png)', 'val.csv row 5 (31.png) = train.csv row 2 (0.png)'))
    assert [(finding.kind, finding.severity, finding.count, finding.examples) for finding in repeats] == [
        ('same-image-twice', 'note', 1, ('train.csv row 14 (12.png) = train.csv row 2 (0.png)',)),
        ('same-image-twice', 'note', 1, ('val.csv row 6 (32.png) = val.csv row 5 (31.png)',))]


def test_unlabelled_rows_that_training_leaves_out(clean):
    """It leaves out the same files, even by other paths; what stays is the same picture in another file."""
    picture(21).save(clean / 'images' / '60.png')
    picture(21).save(clean / 'images' / '61.png')
    (clean / 'images' / '62.png').symlink_to('20.png')
    write(clean, 'unlabelled', '3.png', '21.png', '60.png', '61.png', '62.png', '63.png', header='image_path')
    assert findings(clean) == {
        'same-image-across-splits': [('note', 2, ('val', 'unlabelled'), None, (
            'unlabelled.csv row 4 (60.png) = val.csv row 3 (21.png)',
            'unlabelled.csv row 5 (61.png) = val.csv row 3 (21.png)'))],
        'same-image-twice': [('note', 2, ('unlabelled',), None, (
            'unlabelled.csv row 4 (60.png) = unlabelled.csv row 3 (21.png)',
            'unlabelled.csv row 5 (61.png) = unlabelled.csv row 3 (21.png)'))],
    }


def test_unlabelled_image_of_val_whose_copy_is_in_train(clean):
    """The file of val is left out of the pool, so its copy in train tells nothing of the pool."""
    picture(0).save(clean / 'images' / '20.png')
    write(clean, 'unlabelled', '20.png', header='image_path')
    assert [finding[2] for finding in findings(clean)['same-image-across-splits']] == [('train', 'val')]


def test_same_file_twice(clean):
    (clean / 'images' / 'link.png').symlink_to('1.png')
    write(clean, 'train', *rows(0, 7, 'red,disc'), *rows(7, 5, 'blue,disc'), '1.png,red,disc',
          '../images/1.png,red,disc', 'link.png,red,disc')
    assert findings(clean) == {'same-file-twice': [('note', 3, ('train',), None, tuple(
        f'train.csv row {row} ({name}.png) = train.csv row 3 (1.png)' for row, name in (
            (14, '1'), (15, '1'), (16, 'link'))))]}


def test_two_labels(clean):
    write(clean, 'train', *rows(0, 7, 'red,disc'), *rows(7, 5, 'blue,disc'), '12.png,blue,disc', '13.png,red,',
          '14.png,,disc', '15.png,blue,disc')
    write(clean, 'val', *rows(20, 1, 'red,disc'), *rows(21, 1, 'blue,disc'), '22.png,pink,disc')
    for copy, original in ((12, 0), (13, 1), (14, 2), (15, 3), (22, 3)):
        picture(original).save(clean / 'images' / f'{copy}.png')
    found = findings(clean)
    assert found['two-labels'] == [('error', 2, ('train', 'val'), 'color', (
        "'red' in train.csv row 2 (0.png) and 'blue' in train.csv row 14 (12.png)",
        "'red' in train.csv row 5 (3.png) and 'blue' in train.csv row 17 (15.png) and 'pink' in val.csv row 4 (22.png)",
    ))]
    assert check_folder(clean).findings[1].text == (
        "'color': 2 images have more than one label, on 5 rows of the same pixels: at most one of them is right")
    assert [finding[1] for finding in found['same-image-twice']] == [4]


def test_sizes_modes_and_formats(clean):
    for name, image in {
            '30.png': picture(30, 9, 2), '31.png': picture(31, 2, 9, 'L'), '32.bmp': picture(32, 30, 20),
            '33.jpg': picture(33, 30, 20, 'L'), '34.png': picture(34).convert('RGBA'),
            '35.png': picture(35).quantize(256), '36.jpg': picture(36).convert('CMYK')}.items():
        image.save(clean / 'images' / name)
    write(clean, 'unlabelled', *(path.name for path in sorted((clean / 'images').glob('3?.*'))), header='image_path')
    assert check_folder(clean).images == {
        'files': 21,
        'sizes': {
            'different': 4, 'smallest': [[2, 9, 1]], 'largest': [[30, 20, 2]],
            'most_common': [[8, 6, 17], [30, 20, 2], [9, 2, 1], [2, 9, 1]]},
        'modes': {'RGB': 16, 'L': 2, 'RGBA': 1, 'P': 1, 'CMYK': 1},
        'formats': {'PNG': 18, 'JPEG': 2, 'BMP': 1},
    }


@pytest.mark.parametrize('height, large', [(4000, 0), (4001, 1)])
def test_large_images(clean, height, large):
    Image.new('1', (4000, height)).save(clean / 'images' / '3.png')
    expected = [('note', 1, (), None, (f'train.csv row 5 (4000x{height})',))]
    assert findings(clean) == ({'large-images': expected} if large else {})


def test_shards_are_not_checked(capsys, clean):
    (clean / 'val.csv').rename(clean / 'v.csv')
    with tarfile.open(clean / 'val-000000.tar', 'w'):
        pass
    (finding,) = check_folder(clean).findings
    assert (finding.kind, finding.severity, finding.splits) == ('shards', 'note', ('val',))
    assert finding.text == f'{clean / "val-*.tar"}: the split is in shards, which are not checked'
    (clean / 'train.csv').rename(clean / 't.csv')
    status, out, err = run(capsys, clean)
    assert (status, out) == (2, '') and err.endswith(f'{clean / "val-*.tar"} are shards, which are not checked\n')


def test_splits_that_are_not_there(clean):
    (clean / 'train.csv').rename(clean / 'test.csv')
    (clean / 'val.csv').unlink()
    report = check_folder(clean)
    assert [(finding.kind, finding.severity, finding.splits) for finding in report.findings] == [
        ('no-split', 'note', ('train',)), ('no-split', 'note', ('val',))]
    assert report.classes_from is None and report.heads['color']['counts'] == {'test': {'blue': 5, 'red': 7}}


def test_without_the_table_that_names_the_classes_no_label_is_unknown(clean):
    (clean / 'train.csv').unlink()
    write(clean, 'test', *rows(40, 1, 'teal,disc'))
    assert list(findings(clean)) == ['no-split']


def test_unlabelled_images_alone(clean, capsys):
    (clean / 'train.csv').unlink()
    (clean / 'val.csv').unlink()
    write(clean, 'unlabelled', *(f'{seed}.png' for seed in range(3)), header='image_path')
    status, out, _ = run(capsys, clean)
    assert status == 0 and out.startswith('unlabelled.csv  3 rows, 3 images\n3 image files\n')
    assert out.endswith('0 errors, 2 notes\n')


def test_heads_that_training_would_refuse(clean):
    write(clean, 'train', *rows(0, 7, 'red,disc,'), *rows(7, 5, 'blue,disc,'), header=f'{HEADER},note')
    errors = [finding for finding in check_folder(clean).findings if finding.severity == 'error']
    path = clean / 'train.csv'
    assert [(finding.kind, finding.head, finding.text) for finding in errors] == [
        ('bad-head', 'note', f"{path}: column 'note' has no label in any row; leave it out with --heads")]
    assert findings(clean, heads=['color', 'shape']) == {}


def test_heads_that_a_split_lacks(clean):
    write(clean, 'val', *(row.rpartition(',')[0] for row in (*rows(20, 1), *rows(21, 1, 'blue,disc'))),
          header='image_path,color')
    write(clean, 'test', *(row.rpartition(',')[0] for row in rows(40, 1)), header='image_path,color')
    assert findings(clean) == {'no-column': [
        ('error', 1, ('val',), 'shape', ()), ('note', 1, ('test',), 'shape', ())]}


def test_a_directory_without_labels(clean):
    for name, seeds in (('train', range(12)), ('val', (20, 21))):
        write(clean, name, *(f'{seed}.png' for seed in seeds), header='image_path')
    assert findings(clean) == {'no-heads': [('note', 1, (), None, ())]}


def test_flags_of_tables(capsys, clean):
    for name in ('train', 'val'):
        text = (clean / f'{name}.csv').read_text()
        (clean / f'{name}.csv').write_text(text.replace('image_path', 'file').replace(',', '\t').replace('blue', '-1'))
    flags = ['--image-column', 'file', '--missing-value', '-1', '--separator', 'tab', '--heads', 'color']
    status, out, _ = run(capsys, clean, *flags)
    assert status == 0
    assert out.splitlines()[:5] == [
        'train.csv  12 rows, 12 images, 7 labels', 'val.csv    2 rows, 2 images, 1 labels',
        'columns look like: color classes (1)', '',
        'head   classes  labels in train  labels in val  rarest in train  most frequent in train']
    assert 'train.csv: 5 of 12 rows without any label' in out and out.endswith('0 errors, 2 notes\n')


def test_number_of_threads_and_progress(clean):
    write(clean, 'unlabelled', *(f'{seed}.png' for seed in range(100, 250)), header='image_path')
    (clean / 'images' / '105.png').write_bytes(b'x')
    contents = read_contents(clean)
    steps = []
    one, four = scan_images(contents.files, 1, steps.append), scan_images(contents.files, 4)
    assert one.good == four.good
    assert list(one.bad) == list(four.bad) == [os.path.realpath(clean / 'images' / '105.png')]
    assert len({scan.digest for scan in one.good.values()}) == 163
    assert (sum(steps), len(steps)) == (164, 3)


def test_images_are_decoded_side_by_side(clean, monkeypatch):
    write(clean, 'unlabelled', *(f'{seed}.png' for seed in range(100, 214)), header='image_path')
    both = threading.Barrier(2, timeout=120)  # the first and the last image are of two threads, which meet

    def meet(path, where):
        if os.path.basename(path) in ('0.png', '213.png'):
            both.wait()
        return read_photo(path, where)

    monkeypatch.setattr('timm_multilabel.data.scan.read_photo', meet)
    contents = read_contents(clean)
    assert len(contents.files) == 128
    assert len(scan_images(contents.files, 2).good) == 128


def spoil(folder):
    """Two errors and a note: a leak and a missing file, and an image twice in val."""
    picture(0).save(folder / 'images' / '20.png')
    (folder / 'images' / '3.png').unlink()
    write(folder, 'val', *rows(20, 1, 'red,disc'), *rows(21, 1, 'blue,disc'), '20.png,red,disc')
    return folder


def test_a_directory_with_errors(capsys, clean):
    status, out, err = run(capsys, spoil(clean), '--examples', '1')
    assert (status, err) == (1, '')
    assert out.splitlines()[13:] == [
        'error: train.csv: 1 of 12 images not on disk; add them or remove their rows',
        '    train.csv row 5 (images/3.png)',
        'error: val.csv: 2 of 3 rows show an image of train.csv (1 different image): training has seen them, so '
        'metrics on them say too much',
        '    val.csv row 2 (20.png) = train.csv row 2 (0.png); ...',
        'note: val.csv: 1 of 3 rows with an image file that a row before has: each counts once more',
        '    val.csv row 4 (20.png) = val.csv row 2 (20.png)',
        '2 errors, 1 note',
    ]
    (clean / 'val.csv').unlink()
    assert run(capsys, clean)[1].endswith('1 error, 1 note\n')
    assert '    ' not in run(capsys, clean, '--examples', '0')[1].split('files\n')[1]


def test_json(capsys, clean, tmp_path):
    path = tmp_path / 'new' / 'report.json'
    status, text, _ = run(capsys, spoil(clean), '--json', path)
    assert status == 1 and text.endswith('2 errors, 1 note\n')
    report = json.loads(path.read_text())
    assert report == {
        'directory': str(clean),
        'classes_from': str(clean / 'train.csv'),
        'splits': {
            'train': {'csv': str(clean / 'train.csv'), 'rows': 12, 'images': 11, 'missing': 1, 'unreadable': 0,
                      'labels': {'color': 12, 'shape': 12}},
            'val': {'csv': str(clean / 'val.csv'), 'rows': 3, 'images': 2, 'missing': 0, 'unreadable': 0,
                    'labels': {'color': 3, 'shape': 3}},
        },
        'columns': {'color': {'looks_like': 'classes', 'labels': 12, 'different': 2},
                    'shape': {'looks_like': 'classes', 'labels': 12, 'different': 1}},
        'heads': {
            'color': {'kind': 'classes', 'classes': 2, 'counts': {
                'train': {'blue': 5, 'red': 7}, 'val': {'blue': 1, 'red': 2}}},
            'shape': {'kind': 'classes', 'classes': 1, 'counts': {
                'train': {'disc': 12}, 'val': {'disc': 3}}},
        },
        'images': {
            'files': 13,
            'sizes': {'different': 1, 'smallest': [[8, 6, 13]], 'largest': [[8, 6, 13]], 'most_common': [[8, 6, 13]]},
            'modes': {'RGB': 13}, 'formats': {'PNG': 13}},
        'findings': [
            {'kind': 'missing-images', 'severity': 'error', 'count': 1, 'splits': ['train'], 'head': None,
             'text': 'train.csv: 1 of 12 images not on disk; add them or remove their rows',
             'examples': ['train.csv row 5 (images/3.png)']},
            {'kind': 'same-image-across-splits', 'severity': 'error', 'count': 2, 'splits': ['train', 'val'],
             'head': None, 'text': 'val.csv: 2 of 3 rows show an image of train.csv (1 different image): training has '
                                   'seen them, so metrics on them say too much',
             'examples': ['val.csv row 2 (20.png) = train.csv row 2 (0.png)',
                          'val.csv row 4 (20.png) = train.csv row 2 (0.png)']},
            {'kind': 'same-file-twice', 'severity': 'note', 'count': 1, 'splits': ['val'], 'head': None,
             'text': 'val.csv: 1 of 3 rows with an image file that a row before has: each counts once more',
             'examples': ['val.csv row 4 (20.png) = val.csv row 2 (20.png)']},
        ],
        'errors': 2,
        'notes': 1,
    }
    status, printed, err = run(capsys, clean, '--json', '-')
    assert (status, err) == (1, '') and json.loads(printed) == report


def test_cells_do_nothing_to_a_terminal(capsys, clean):
    label = 'p\x1b[31mink\x9b1m\x07'
    write(clean, 'val', *rows(20, 1, 'red,disc'), *rows(21, 1, 'blue,disc'), f'22.png,{label},disc',
          f'23.png,{"long" * 30},disc')
    with open(clean / 'train.csv', 'a') as file:
        file.write('"images/no\nsuch\x1b[2J.png",red,disc\n')
    status, out, _ = run(capsys, clean)
    assert status == 1 and all(line.isprintable() for line in out.split('\n'))
    assert "'p [31mink 1m ' in val.csv row 4" in out and '(images/no such [2J.png)' in out
    assert f"'{'long' * 19}lon\u2026' in val.csv row 5" in out
    status, out, _ = run(capsys, clean, '--json', '-')
    assert status == 1 and all(line.isprintable() for line in out.split('\n'))
    assert label in json.loads(out)['heads']['color']['counts']['val']


@pytest.mark.parametrize('change, flags, message', [
    (lambda folder: folder.rename(folder.with_name('moved')), [], 'data: no such data directory; it holds train.csv'),
    (lambda folder: [(folder / name).unlink() for name in ('train.csv', 'val.csv')], [],
     'data: no train.csv, val.csv, test.csv or unlabelled.csv to check'),
    (lambda folder: (folder / 'val.csv').write_bytes(b'image_path,color\ncaf\xe9.png,red\n'), [],
     'val.csv row 2: byte 0xe9 is not UTF-8'),
    (lambda folder: (folder / 'val.csv').write_text('file,color\na.png,red\n'), [],
     "val.csv: no column 'image_path' (there are: file, color)"),
    (lambda folder: (folder / 'test.csv').write_text('image_path,color\n'), [], 'test.csv: the table has no rows'),
    (lambda folder: (folder / 'all.csv').write_text(''), [], 'all.csv: cannot be read as a CSV'),
    (lambda folder: None, ['--heads', 'colour'],
     "train.csv: no label column 'colour' (there are: color, shape); choose columns with --heads"),
    (lambda folder: None, ['--json', 'images'], '--json images: is a folder; name a file'),
    (lambda folder: None, ['--examples', '-1'], 'argument --examples: -1 is out of range, expected 0 or more'),
    (lambda folder: None, ['-j', '0'], 'argument -j/--workers: 0 is out of range, expected 1 or more'),
])
def test_bad_input(capsys, monkeypatch, clean, change, flags, message):
    monkeypatch.chdir(clean)
    change(clean)
    status, out, err = run(capsys, clean, *flags)
    assert (status, out) == (2, '')
    assert err.startswith('check: error: ') and err.count('\n') == 1 and message in err


def test_all_csv_alone_is_nothing_to_check(clean):
    (clean / 'train.csv').rename(clean / 'all.csv')
    (clean / 'val.csv').unlink()
    with pytest.raises(UserError, match='to check'):
        read_contents(clean)


def test_it_is_a_subcommand(capsys, monkeypatch, clean):
    monkeypatch.setattr(sys, 'argv', ['timm-multilabel', 'check', str(clean), '-j', '1'])
    main()
    assert capsys.readouterr().out.endswith('0 errors, 0 notes\n')
    spoil(clean)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
