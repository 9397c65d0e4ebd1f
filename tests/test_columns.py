"""What tables are called, how they are read, and what their columns look like, the same for all commands."""
import json
import shutil

import pytest
from PIL import Image

from tests.common import TINY, train_run, write_data
from timm_multilabel.assembly.stored import predictions_path
from timm_multilabel.cells import list_cell
from timm_multilabel.cli.main import run_command
from timm_multilabel.data.columns import look_at
from timm_multilabel.data.table import read_table
from timm_multilabel.data.table_format import TableFormat
from timm_multilabel.errors import UserError


def run(capsys, command, *argv):
    """Exit status, standard output and standard error of a command."""
    status = 0
    try:
        run_command(command, 'x', [str(word) for word in argv])
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


@pytest.fixture(scope='module')
def named(tmp_path_factory):
    """Runs whose splits have names of their own, on a data directory without train.csv and val.csv."""
    folder = tmp_path_factory.mktemp('named')
    data = write_data(folder / 'data', 8, 4)
    (data / 'validation').mkdir()
    shutil.copy(data / 'val.csv', data / 'validation' / 'metadata.csv')
    (data / 'val.csv').rename(data / 'extra.csv')
    (data / 'train.csv').rename(data / 'most.csv')
    train_run(data, folder, '--train-split', 'most', '--val-split', 'extra.csv', epochs=1).rename(folder / 'a')
    train_run(data, folder, '--train-split', 'most.csv', '--val-split', 'validation/metadata.csv', epochs=1).rename(
        folder / 'b')
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('split', [[], ['--split', 'extra.csv'], ['--split', 'extra'],
                                   ['--split', 'validation/metadata.csv']])
def test_validate_finds_splits_as_training_does(capsys, named, split):
    status, out, err = run(capsys, 'validate', named / 'data', '--checkpoint', named / 'a' / 'model_best.pth.tar', '-j',
                           '0', '--device', 'cpu', '--knn', '2', *split)
    assert (status, err.count('error')) == (0, 0)
    assert f'knn_top1: what the 2 nearest of 8 images of {named / "data" / "most.csv"} vote for' in out
    assert '\n4 images, ' in out


@pytest.mark.slow
def test_no_row_finds_itself_whatever_its_table_is_called(capsys, named):
    status, _, err = run(capsys, 'validate', named / 'data', '--checkpoint', named / 'a' / 'model_best.pth.tar', '-j',
                         '0', '--device', 'cpu', '--knn', '2', '--split', 'most.csv')
    assert (status, '--knn: each row of most would find itself; score another split' in err) == (2, True)


@pytest.mark.slow
def test_another_data_directory_has_the_usual_names(capsys, named, tmp_path):
    data = write_data(tmp_path / 'other', 8, 6)
    status, out, _ = run(capsys, 'validate', data, '--checkpoint', named / 'a' / 'model_best.pth.tar', '-j', '0',
                         '--device', 'cpu')
    assert (status, '\n6 images, ' in out) == (0, True)
    assert f"{data}: there is no 'extra.csv' here, which was the val split of the run; 'val' is used instead" in out


@pytest.mark.slow
def test_report_compare_and_export_take_the_splits_of_the_run(capsys, named):
    assert run(capsys, 'report', named / 'b', '-j', '0', '--device', 'cpu')[0] == 0
    status, out, _ = run(capsys, 'compare', named / 'a', named / 'b', '-j', '0', '--device', 'cpu')
    assert (status, 'on 4 images of val' in out) == (0, True)
    assert [path.name for run in 'ab' for path in (named / run).glob('predictions-*')] == [
        'predictions-extra.npz', 'predictions-validation-metadata.npz']
    status, out, _ = run(capsys, 'export', named / 'b' / 'model_best.pth.tar', '--out', named / 'exported', '--formats',
                         'safetensors')
    assert (status, f'images such as {named / "data" / "validation"}' in out) == (0, True)


def test_splits_of_one_file_name_have_predictions_of_their_own(tmp_path):
    names = 'val', 'val.csv', 'a/metadata.csv', 'b/metadata.csv', '/x/b/metadata.csv', '../val.csv'
    assert [predictions_path(tmp_path, name).name for name in names] == [
        'predictions-val.npz', 'predictions-val.npz', 'predictions-a-metadata.npz', 'predictions-b-metadata.npz',
        'predictions-b-metadata.npz', 'predictions-val.npz']


TABLE = [['image_path', 'a b', 'c'], ['images/0.png', 'x y', 'u'], ['images/1.png', 'z', 'v'],
         ['images/2.png', 'x y', 'u']]


def write_table(folder, mark):
    """A table with a mark between cells; cells with blanks are quoted."""
    Image.new('RGB', (8, 8)).save(folder / 'images' / '0.png')
    lines = [mark.join(f'"{cell}"' if ' ' in cell else cell for cell in row) for row in TABLE]
    path = folder / 'labels.txt'
    path.write_text('\n'.join(lines) + '\n')
    return path


@pytest.mark.parametrize('mark, flags', [
    (';', []), ('\t', []), ('|', []), (',', []), ('  \t ', ['--separator', 'whitespace']),
    (':', ['--separator', ':'])])
def test_split_reads_what_training_reads(capsys, tmp_path, mark, flags):
    (tmp_path / 'images').mkdir()
    path = write_table(tmp_path, mark)
    for number in (1, 2):
        (tmp_path / 'images' / f'{number}.png').touch()
    separator = flags[1] if flags else None
    assert read_table(path, TableFormat(separator=separator)).frame.to_numpy().tolist() == TABLE[1:]
    status, out, err = run(capsys, 'split', path, '--image', '{image_path}', '--heads', 'a b', 'c', *flags)
    assert (status, err) == (0, '')
    assert (tmp_path / 'all.csv').read_text() == (
        'image_path,a b,c\nimages/0.png,x y,u\nimages/1.png,z,v\nimages/2.png,x y,u\n')


def test_blanks_between_columns_are_told(tmp_path):
    path = tmp_path / 'train.csv'
    path.write_text('image_path   color\n0.png   red\n')
    with pytest.raises(UserError, match='or the blanks between columns with --separator whitespace'):
        read_table(path)
    assert read_table(path, TableFormat(separator='whitespace')).frame.to_numpy().tolist() == [['0.png', 'red']]


def test_a_comma_inside_quotes_is_no_separator(tmp_path):
    path = tmp_path / 'train.csv'
    path.write_text('image_path;"size, in cm"\n0.png;1,5\n')
    table = read_table(path)
    assert (table.label_columns, table.frame.to_numpy().tolist()) == (['size, in cm'], [['0.png', '1,5']])


def test_whitespace_from_training_to_prediction(capsys, tmp_path):
    data = write_data(tmp_path / 'data', 8, 4)
    for name in ('train', 'val'):
        path = data / f'{name}.csv'
        path.write_text(path.read_text().replace(',', '   \t'))
    trained = train_run(data, tmp_path, '--separator', 'whitespace', epochs=1) / 'model_best.pth.tar'
    status, out, _ = run(capsys, 'validate', data, '--checkpoint', trained, '-j', '0', '--device', 'cpu')
    assert (status, '\n4 images, ' in out) == (0, True)
    status, _, _ = run(
        capsys, 'predict', trained, data / 'val.csv', '--out', tmp_path / 'out.csv', '-j', '0', '--device',
                       'cpu')
    assert (status, len((tmp_path / 'out.csv').read_text().splitlines())) == (0, 5)


@pytest.mark.parametrize('texts, kind, different', [
    (['red', 'blue'] * 20, 'classes', 2),
    ([''] * 50, 'classes', 0),
    ([str(2000 + number % 20) for number in range(60)], 'classes', 20),  # years
    ([f'{1 + number % 9 / 2}' for number in range(60)], 'classes', 9),  # grades
    ([str(number % 100) for number in range(500)], 'classes', 100),  # indices of classes
    ([str(7 * (number % 100)) for number in range(5000)], 'classes', 100),  # 50 of each
    ([str(7 * (number % 100)) for number in range(4999)], 'number', 100),
    ([f'{number * 1.37:.2f}' for number in range(40)], 'number', 40),
    ([f'{number % 30 / 8}' for number in range(6000)], 'number', 30),
    ([*(str(7 * number) for number in range(38)), '7', '7'], 'number', 38),
    ([str(15970 + 3 * number) for number in range(40)], 'identifier', 40),
    ([f'SK{number}' for number in range(36)] + ['SK1'] * 4, 'identifier', 36),
    ([f'SK{number}' for number in range(35)] + ['SK1'] * 5, 'classes', 35),
    ([f'SK{number}' for number in range(19)], 'classes', 19),  # too few to tell
    ([f'a shirt number {number % 20}' for number in range(40)], 'free text', 20),
    ([f'a shirt number {number % 19}' for number in range(40)], 'classes', 19),
    (['a|b', *['a'] * 19], 'tags', 2),
    (['a|b', *['a'] * 20], 'classes', 2),
    ([f'{number}|a' for number in range(40)], 'tags', 40),
    (['nan', *map(str, range(39))], 'identifier', 40),
])
def test_what_a_column_looks_like(texts, kind, different):
    look = look_at(texts)
    assert (look.kind, look.labels, look.different) == (kind, len([text for text in texts if text]), different)


@pytest.fixture
def shop(tmp_path):
    """40 training and 20 validation rows with a price, an identifier, a text and tags beside the classes."""
    folder = write_data(tmp_path / 'shop', 40, 20)
    for name, first in (('train', 0), ('val', 100)):
        header, *rows = (folder / f'{name}.csv').read_text().splitlines()
        rows = [f'{row},{1.25 * number:.2f},SK{number},a shirt of number {number},{("a|b", "b")[number % 2]}'
                for number, row in enumerate(rows, first)]
        (folder / f'{name}.csv').write_text('\n'.join([f'{header},price,sku,title,tags', *rows]) + '\n')
    return folder


LOOKS = ('columns look like: color classes (3), shape classes (2), price number (40 different), sku identifier '
         '(40 different), title free text (40 different), tags tags (2 different)')


def test_training_asks_what_a_number_is(capsys, shop, tmp_path):
    status, out, err = run(capsys, 'train', shop, *TINY, '--epochs', '1', '--output', tmp_path, '--experiment', 'run')
    assert (status, f'{shop / "train.csv"}: {LOOKS}' in out) == (2, True)
    assert ("train.csv: column 'price' looks like a number (40 different in 40 labels); learn it as one with --head "
            'price:loss=numeric, as classes with --head price:loss=softmax, or choose others with --heads') in err
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
@pytest.mark.parametrize('flags, heads, told', [
    (['--head', 'price:loss=numeric', 'tags:loss=tags'],
     'color (3), shape (2), price (number), tags (2 tags)', [
         LOOKS, 'left out: sku (identifier), title (free text); name a column in --heads to keep it',
         "'tags' has 1 of 2 tags without a 0 (b): nothing to learn"]),
    (['--heads', 'color', 'sku', 'tags'], 'color (3), sku (40), tags (2)', [
        'columns look like: color classes (3), sku identifier (40 different), tags tags (2 different)',
        "'tags' looks like tags and is learnt as 2 classes; change that with --head tags:loss=tags"]),
    (['--heads', 'color', 'price'], 'color (3), price (40)', [
        'columns look like: color classes (3), price number (40 different)',
        "'price' looks like a number and is learnt as 40 classes; change that with --head price:loss=numeric"]),
])
def test_identifiers_are_left_out_unless_they_are_named(capsys, shop, tmp_path, flags, heads, told):
    status, out, _ = run(capsys, 'train', shop, *TINY, '--epochs', '1', '--output', tmp_path, '--eval-metric', 'loss',
                         '--unknown-labels', 'ignore', '-wls', '0', *flags)
    found = [line.removeprefix(f'{shop / "train.csv"}: ') for line in out.splitlines() if 'train.csv: ' in line]
    assert (found, f'test_resnet, 1 epoch, heads: {heads}' in out) == (told, True)


def test_neighbours_do_not_vote_for_identifiers(capsys, shop, tmp_path):
    trained = train_run(shop, tmp_path, '-wlc', '0', epochs=1) / 'model_best.pth.tar'
    capsys.readouterr()
    status, out, _ = run(capsys, 'validate', shop, '--checkpoint', trained, '-j', '0', '--device', 'cpu', '--knn', '2')
    assert (status, f'{shop / "train.csv"}: no classes, so left out of --knn: price (number), sku (identifier), title '
            '(free text)' in out) == (0, True)


def check_shop(capsys, shop, *flags):
    """Exit status, the report, and of its findings those that are on columns or labels of heads."""
    status, out, err = run(capsys, 'check', shop, '--json', '-', '--examples', '1', *flags)
    report = json.loads(out)
    return status, report, [(each['kind'], each['severity'], each['head']) for each in report['findings']
                            if each['kind'] not in ('same-image-across-splits', 'same-image-twice', 'two-labels')]


def test_check_says_what_training_would_do(capsys, shop):
    _, report, found = check_shop(capsys, shop)
    assert {name: tuple(look.values()) for name, look in report['columns'].items()} == {
        'color': ('classes', 40, 3), 'shape': ('classes', 40, 2), 'price': ('number', 40, 40),
        'sku': ('identifier', 40, 40), 'title': ('free text', 40, 40), 'tags': ('tags', 40, 2)}
    assert list(report['heads']) == ['color', 'shape', 'tags']
    assert found == [('looks-like-number', 'error', 'price'), ('left-out', 'note', 'sku'),
                     ('left-out', 'note', 'title'), ('as-classes', 'note', 'tags')]


def test_check_takes_the_kinds_of_heads(capsys, shop):
    _, report, found = check_shop(capsys, shop, '--head', 'price:loss=numeric', 'tags:loss=tags')
    assert found == [('left-out', 'note', 'sku'), ('left-out', 'note', 'title'),
                     *[('useless-labels', 'note', 'tags')] * 2]
    assert [each['text'] for each in report['findings'] if each['kind'] == 'useless-labels'] == [
        "train.csv: 'tags' has 1 of 2 tags without a 0 (b): nothing to learn",
        "val.csv: 'tags' has 1 of 2 tags without a 0 (b): not scored"]
    assert report['heads']['price'] == {'kind': 'number', 'classes': 0, 'counts': {'train': {}, 'val': {}}}
    assert report['heads']['tags'] == {
        'kind': 'tags', 'classes': 2, 'counts': {'train': {'a': 20, 'b': 40}, 'val': {'a': 10, 'b': 20}}}
    assert report['splits']['val']['labels'] == {'color': 20, 'shape': 20, 'price': 20, 'tags': 20}


def test_check_finds_what_stops_training_on_tags_and_numbers(capsys, shop):
    path = shop / 'val.csv'
    path.write_text(path.read_text().replace(',125.00,', ',dear,').replace(',b\n', ',new|b\n', 1))
    _, report, found = check_shop(capsys, shop, '--head', 'price:loss=numeric', 'tags:loss=tags')
    assert found[:2] == [('bad-cell', 'error', 'price'), ('unknown-labels', 'error', 'tags')]
    texts = [each['text'] for each in report['findings'] if each['kind'] == 'bad-cell']
    assert texts == ["val.csv row 2, column 'price': 'dear' is no number: training stops; fix it, or leave it empty"]
    assert report['heads']['tags']['counts']['val'] == {'a': 10, 'b': 20, 'new': 1}


@pytest.mark.slow
def test_check_of_a_run_takes_its_flags(capsys, shop, tmp_path):
    (shop / 'val.csv').rename(shop / 'scored.csv')
    trained = train_run(shop, tmp_path, '--val-split', 'scored.csv', '--heads', 'color', 'tags', 'price', '--head',
                        'tags:loss=tags', 'price:loss=numeric', epochs=1)
    capsys.readouterr()
    _, report, found = check_shop(capsys, shop, '--run', trained)
    assert ({name: head['kind'] for name, head in report['heads'].items()}, found) == (
        {'color': 'classes', 'tags': 'tags', 'price': 'number'}, [('useless-labels', 'note', 'tags')] * 2)
    assert report['splits']['val']['csv'] == str(shop / 'scored.csv')


@pytest.mark.slow
def test_check_reads_tags_in_the_dialect_of_the_flags_or_the_run(capsys, shop, tmp_path):
    for name in ('train', 'val'):
        path = shop / f'{name}.csv'
        path.write_text(path.read_text().replace('a|b', 'a;b').replace(',b\n', ',nil\n'))
    heads = ['--heads', 'tags', '--head', 'tags:loss=tags']
    dialect = ['--tag-separator', ';', '--none-value', 'nil']
    report = check_shop(capsys, shop, *heads)[1]
    assert list(report['heads']['tags']['counts']['train']) == ['a;b', 'nil']
    expected = {'train': {'a': 20, 'b': 20}, 'val': {'a': 10, 'b': 10}}
    trained = train_run(shop, tmp_path, *heads, *dialect, '-wls', '0', epochs=1)
    capsys.readouterr()
    for flags in ([*heads, *dialect], ['--run', trained]):
        _, report, found = check_shop(capsys, shop, *flags)
        assert (report['heads']['tags']['counts'], found) == (expected, [])
        assert report['columns']['tags'] == {'looks_like': 'tags', 'labels': 40, 'different': 2}
        assert report['splits']['val']['labels'] == {'tags': 20}
    path = shop / 'val.csv'
    path.write_text(path.read_text().replace(',nil\n', ',nil;a\n', 1))
    _, report, found = check_shop(capsys, shop, *heads, *dialect)
    assert found == [('bad-cell', 'error', 'tags')]
    status, _, err = run(capsys, 'check', shop, '--heads', 'color', '--none-value', 'nil')
    assert (status, "--none-value 'nil': no head of" in err) == (2, True)


def test_lists_of_shards_look_like_tags():
    cells = [list_cell([name]) for name in ('red', 'blue')] * 20
    assert look_at(cells) == look_at(['red', 'blue'] * 20)
    assert [look_at([*cells, *[list_cell(tags)] * 3]).kind for tags in ([], ['red', 'blue'], ['a|b'])] == [
        'tags', 'tags', 'classes']


def test_check_of_groups_and_wrong_heads(capsys, tmp_path):
    folder = write_data(tmp_path / 'data', 6, 3)
    for name in ('train', 'val'):
        header, *rows = (folder / f'{name}.csv').read_text().splitlines()
        rows = [f'{row},{number % 2},{int(number < 2)}' for number, row in enumerate(rows)]
        (folder / f'{name}.csv').write_text('\n'.join([f'{header},wet,cold', *rows]) + '\n')
    _, report, found = check_shop(capsys, folder, '--head', 'weather:columns=wet+cold')
    assert (report['heads']['weather']['counts']['train'], [each for each in found if each[0] != 'rare-classes']) == (
        {'wet': 3, 'cold': 2}, [])
    status, _, err = run(capsys, 'check', folder, '--head', 'wether:loss=tags')
    assert (status, '--head wether: there is no such head (there are: color, shape, wet, cold)' in err) == (2, True)
