"""CSV -> rows, and what is said of bad ones."""
import os
import re

import pytest
from PIL import Image

from timm_multilabel.data.table import encode_rows, find_images, find_label_space, read_table, unknown_labels
from timm_multilabel.data.table_format import TableFormat
from timm_multilabel.errors import UserError
from timm_multilabel.labels import LabelSpace, Quantity, TagSet


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')
    return path


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (4, 4)).save(path)


def test_cells_are_text_and_rows_keep_their_numbers(tmp_path):
    path = write(tmp_path / 't.csv', '\ufeffimage_path,color,size\n1.jpg,NA,007\n\n2.jpg,, nan \n')
    table = read_table(path)
    assert table.frame.to_dict('list') == {
        'image_path': ['1.jpg', '2.jpg'], 'color': ['NA', ''], 'size': ['007', 'nan']}
    assert table.frame.index.tolist() == [2, 4]
    assert table.label_columns == ['color', 'size']


def test_quotes_and_line_ends(tmp_path):
    path = tmp_path / 't.csv'
    path.write_bytes(b'image_path,color\r\n1.jpg,"red, ""dark"""\r\n')
    assert read_table(path).frame['color'].tolist() == ['red, "dark"']


@pytest.mark.parametrize('text, message', [
    ('', 'cannot be read as a CSV'),
    ('image_path,color\n', 'the table has no rows'),
    ('image_path,color\n\n\n', 'the table has no rows'),
    ('path,color\n1.jpg,red\n', r"no column 'image_path' \(there are: path, color\).*--image-column"),
    ('image_path,,color\n1.jpg,3,red\n', 'row 1: column 2 has no name'),
    ('image_path,color,color\n1.jpg,red,red\n', "row 1: two columns are called 'color'"),
    ('image_path,color\n1.jpg,red,blue\n', 'cannot be read as a CSV.*line 2'),
    ('image_path,color\n1.jpg,red\n,blue\n', "row 3: no image in column 'image_path'"),
])
def test_bad_tables_are_one_clear_line(tmp_path, text, message):
    path = write(tmp_path / 't.csv', text)
    with pytest.raises(UserError, match=message) as error:
        read_table(path)
    assert str(path) in error.value.line and '\n' not in str(error.value)


def test_missing_and_latin1_files(tmp_path):
    with pytest.raises(UserError, match='no such file'):
        read_table(tmp_path / 't.csv')
    (tmp_path / 't.csv').write_bytes('image_path,color\n1.jpg,grün\n'.encode('latin-1'))
    with pytest.raises(UserError, match='UTF-8'):
        read_table(tmp_path / 't.csv')


@pytest.mark.parametrize('written, place', [
    ('images/1.jpg', 'data/images/1.jpg'),  # relative to the CSV's folder
    ('./data/images/1.jpg', 'data/images/1.jpg'),  # to its parent
    ('elsewhere/1.jpg', 'work/elsewhere/1.jpg'),  # to the working directory
    ('C/old/path/1.jpg', 'data/images/1.jpg'),  # by name under images/
])
def test_images_are_found_by_each_rule(tmp_path, monkeypatch, written, place):
    picture(tmp_path / place)
    (tmp_path / 'work').mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / 'work')
    table = read_table(write(tmp_path / 'data' / 't.csv', f'image_path,color\n{written},red\n'))
    found = find_images(table)
    assert len(found) == 1 and os.path.samefile(found[0], tmp_path / place)


def test_missing_images_are_counted_and_named(tmp_path):
    picture(tmp_path / '1.jpg')
    rows = ''.join(f'{number}.jpg,red\n' for number in range(1, 7))
    table = read_table(write(tmp_path / 't.csv', 'image_path,color\n' + rows))
    with pytest.raises(UserError, match=re.escape('5 of 6 images are missing on disk: 2.jpg (row 3), 3.jpg (row 4)')):
        find_images(table)
    (tmp_path / '1.jpg').unlink()
    with pytest.raises(UserError, match='none of its 6 images is on disk: 1.jpg .*; looked in .*working directory'):
        find_images(table)


def test_a_path_that_no_file_system_takes(tmp_path):
    table = read_table(write(tmp_path / 't.csv', f'image_path,color\n{"x" * 300}.jpg,red\n'))
    with pytest.raises(UserError, match='none of its 1 images'):
        find_images(table)


def test_a_name_with_a_line_break_stays_on_one_line(tmp_path):
    picture(tmp_path / '1.jpg')
    table = read_table(write(tmp_path / 't.csv', 'image_path,color\n1.jpg,red\n"a\u2028b\n.jpg",red\n'))
    with pytest.raises(UserError) as error:
        find_images(table)
    assert error.value.line.startswith(f'{tmp_path}/t.csv: 1 of 2 images are missing on disk: a b .jpg (row 3)')


def test_label_space_comes_from_all_csv_and_heads_from_train(tmp_path):
    whole = read_table(write(tmp_path / 'all.csv', 'image_path,id,color\n1.jpg,1,red\n2.jpg,2,blue\n3.jpg,3,NA\n'))
    train = read_table(write(tmp_path / 'train.csv', 'image_path,color\n1.jpg,red\n'))
    space = find_label_space([whole, train], None)
    assert space.to_dict() == {'heads': [{'name': 'color', 'classes': ['NA', 'blue', 'red'], 'kind': 'classes'}]}
    with pytest.raises(UserError, match=r"train.csv: no label column 'id' \(there are: color\)"):
        find_label_space([whole, train], ['id'])


def test_blank_labels_are_missing_and_unknown_ones_are_named(tmp_path):
    for number in range(1, 5):
        picture(tmp_path / f'{number}.jpg')
    table = read_table(write(
        tmp_path / 'val.csv', 'image_path,color,shape\n1.jpg,red,\n2.jpg,pink,disc\n3.jpg,,disc\n4.jpg,pink,\n'))
    space = LabelSpace.from_columns({'color': ['red'], 'shape': ['disc', 'ring'], 'size': ['big']})
    assert unknown_labels(table, space) == {'color': {'pink': [3, 5]}}
    with pytest.raises(UserError, match=r"color 'pink' in 2 rows \(3, 5\); .*--unknown-labels ignore"):
        encode_rows(table, space)
    rows = encode_rows(table, space, ignore_unknown=True)
    assert rows.targets.tolist() == [[0, -1, -1], [-1, 0, -1], [-1, 0, -1], [-1, -1, -1]]
    assert rows.where(1) == f'{tmp_path / "val.csv"} row 3'


def test_every_kind_of_label_is_encoded_side_by_side(tmp_path):
    """A number two standard deviations below the mean is -2 there, which is no class index."""
    rows = [('a', 'x|y', -2), ('', '', 0), ('b', 'y', 0), ('a', 'x', 0), ('a', 'x', 0), ('a', 'x', 0), ('a', 'x', 0),
            ('a', 'x', 2)]
    for number in range(len(rows)):
        picture(tmp_path / f'{number}.jpg')
    table = read_table(write(tmp_path / 'train.csv', 'image_path,c,t,n\n' + ''.join(
        f'{number}.jpg,{c},{t},{n}\n' for number, (c, t, n) in enumerate(rows))))
    space = find_label_space([table], None, {'t': TagSet, 'n': Quantity})
    assert str(space) == 'c (2), t (2 tags), n (number)'
    targets = encode_rows(table, space).targets
    assert targets[[0, 1, 7]].tolist() == [[0, 1, 1, -2], [-1, -1, -1, 0], [0, 1, 0, 2]]


@pytest.mark.parametrize('mark', [',', '\t', ';', '|'])
def test_separators_and_values_that_mean_no_label(tmp_path, mark):
    text = 'id,class,n\n-1.jpg,-1,3\n2.jpg,5,-1\n'.replace(',', mark)
    table = read_table(write(tmp_path / 'list.txt', text), TableFormat('id', missing_value='-1'))
    assert table.frame.to_dict('list') == {'id': ['-1.jpg', '2.jpg'], 'class': ['', '5'], 'n': ['3', '']}
    strange = read_table(write(tmp_path / 'list.txt', text.replace(mark, '~')), TableFormat('id', separator='~'))
    assert strange.label_columns == ['class', 'n']


def test_images_that_are_missing_may_be_passed_over(tmp_path):
    picture(tmp_path / '1.jpg')
    table = read_table(write(tmp_path / 't.csv', 'image_path\n1.jpg\n2.jpg\n'))
    assert find_images(table, passing_over=True) == [str(tmp_path / '1.jpg')]
