"""Any text as a table, any option of a head, any recipe: a result or one clean line that names the place.

Each test draws the same examples every time; `test_with_other_draws` draws others, by the seed that pytest's header and
a failure name. `FUZZ_SEED=<it> pytest tests/test_fuzz.py` repeats them.
"""
import inspect
import os
import re
import sys
from io import StringIO
from unittest.mock import patch

import pytest
import yaml
from common import TinyBackbone, train_settings, write_data
from hypothesis import HealthCheck, example, given, seed, settings
from hypothesis import strategies as st
from test_hostile import ramp, saved

from timm_multilabel.assembly import head_options
from timm_multilabel.assembly.checks import check_phases
from timm_multilabel.config.train import TrainSettings
from timm_multilabel.data.images import EncodedPhoto
from timm_multilabel.data.split import split_csv
from timm_multilabel.data.table import encode_rows, find_label_space, read_table
from timm_multilabel.data.table_format import TableFormat
from timm_multilabel.errors import UserError, one_line
from timm_multilabel.heads import REGISTRY
from timm_multilabel.labels import LabelSpace, Quantity
from timm_multilabel.model import MultiLabelModel

QUIET = settings(
    max_examples=150, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
SEED = int(os.environ['FUZZ_SEED'])  # conftest.py draws one where none is given
OTHERS = []

ROW = re.compile(r'\brows? (\d+)')
OF_A_TABLE = ('column', 'images', 'no rows', 'cannot be read', 'head', 'labels')
"""What else than a row may be wrong with a table."""


def fuzz(**strategies):
    """A test with drawn arguments, and once more in OTHERS, for `test_with_other_draws`."""
    def wrap(function):
        drawn = given(**strategies)
        OTHERS.append(seed(SEED)(settings(QUIET, derandomize=False, max_examples=50)(drawn(function))))
        return QUIET(drawn(function))

    return wrap


def ends_well(work, names):
    """What some work gives, or None where it ends in one clean line that names the file or flag, and the place."""
    try:
        return work()
    except UserError as error:
        assert error.line.isprintable()
        assert names(error.line), error.line
        return None


def of_table(path, flags=()):
    """Whether a line names a table, and a row that it has or what else is wrong with it; or one of some flags."""
    text = path.read_bytes()

    def names(line):
        if line.startswith(tuple(flags)):
            return True
        rows = [int(row) for row in ROW.findall(line.replace(str(path), '', 1).split("'")[0])]
        return str(path) in line and all(1 <= row <= len(re.split(rb'\r\n|\r|\n', text)) for row in rows) and (
            bool(rows) or any(word in line for word in OF_A_TABLE))

    return names


def of_recipe(path):
    """Whether a line names a recipe, or the flag that two settings of it do not go together in."""
    return lambda line: str(path) in line or re.search(r'(?<!\w)--?[a-z]', line) is not None


CELLS = st.one_of(
    st.sampled_from(['', 'red', 'blue', 'NA', 'a|b', '1.5', '-1', '"', '""', 'images/0.png', 'images/1.png', ' ', '\t',
                     "'", '1e999', 'nan', '\x1b', 'image_path']),
    st.text(max_size=8))
LINES = st.lists(st.lists(CELLS, min_size=1, max_size=4).map(lambda cells: ','.join(cells)), max_size=6)
TABLES = st.one_of(
    LINES.map('\n'.join),
    LINES.map(lambda lines: '\n'.join(['image_path,color,size', *(f'images/0.png,{line}' for line in lines)])),
    st.text(max_size=60),
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp('fuzz') / 'data', train=2, val=1, size=8)


@pytest.mark.slow
@fuzz(content=st.one_of(TABLES.map(lambda text: text.encode('utf-8', 'surrogatepass')), st.binary(max_size=60)),
       separator=st.sampled_from([None, ',', '\t', '|', 'a', '"', '\\', '.', '*']),
       missing=st.sampled_from([None, '-1', '']))
@example(b'image_path\n"', None, None)
@example(b'image_path,a\nimages/0.png,\n', None, None)
def test_tables(folder, content, separator, missing):
    path = folder / 'fuzz.csv'
    path.write_bytes(content)

    def read():
        table = read_table(path, TableFormat(separator=separator, missing_value=missing))
        space = find_label_space([table], None)
        rows = encode_rows(table, space)
        assert len(rows) == len(table.frame) and LabelSpace.from_dict(space.to_dict()) == space

    ends_well(read, of_table(path))


@pytest.mark.slow
@fuzz(content=st.one_of(TABLES.map(lambda text: text.encode('utf-8', 'surrogatepass')), st.binary(max_size=60)),
       image=st.one_of(st.sampled_from(['{image_path}', '{0}', '{', '{image_path.__class__}', '{image_path!x}']),
                       st.text(max_size=10)))
def test_split(folder, content, image):
    (folder / 'source.csv').write_bytes(content)
    ends_well(
        lambda: split_csv(folder / 'source.csv', folder / 'out', image=image, heads=[('color', 'color')], force=True),
        of_table(folder / 'source.csv', flags=[f'--image {one_line(image)}']))


OPTIONS = st.dictionaries(
    st.sampled_from(['loss', 'drop', 'smoothing', 'class_weights', 'scale', 'margin', 'weight', 'input', 'columns',
                     'x']),
    st.one_of(
        st.sampled_from(['softmax', 'arcface', 'tags', 'numeric', 'balanced', 'projection', 'features', 'red:2',
                         'red:x', 'shape+size', '', '0', '-1', '1e400', 'nan', 'true']),
        st.text(max_size=5), st.floats(), st.integers(-5, 5), st.booleans(), st.none(),
        st.lists(st.one_of(st.text(max_size=3), st.integers(0, 3)), max_size=3),
        st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)),
    max_size=4)


@pytest.mark.slow
@fuzz(given_options=st.dictionaries(st.sampled_from(['color', 'shape', '*', 'no']), OPTIONS, max_size=3))
def test_head_options(folder, given_options):
    def make():
        table = read_table(folder / 'train.csv')
        head_options.check_groups(given_options, table.label_columns)
        head = head_options.expand(given_options, table.label_columns, None)
        space = find_label_space([table], None, head_options.readers(head, REGISTRY), head_options.groups(head))
        targets = space.split(encode_rows(table, space).targets)
        options, _ = head_options.resolve(head, REGISTRY, space, targets)
        try:
            return MultiLabelModel(TinyBackbone(), space, head_options=options)
        except ValueError as error:  # as assembly/model.py takes it
            assert str(error)

    named = {*given_options, *(('color', 'shape') if '*' in given_options else ())}
    places = tuple(f'--head {quote}{name}' for name in named for quote in ("'", ''))
    in_table = of_table(folder / 'train.csv')
    ends_well(make, lambda line: line.startswith(places) or in_table(line))


def parsed(path, *argv):
    """What a recipe comes to; the parser's own line, with which it ends the program with status 2, as an error."""
    errors = StringIO()
    with patch.object(sys, 'stderr', errors):
        try:
            return check_phases(train_settings(*argv, '-c', str(path)))
        except SystemExit as stop:
            line = errors.getvalue()
            assert stop.code == 2 and line.startswith('train.py: error: ') and line.count('\n') == 1
            raise UserError(line.removeprefix('train.py: error: ').removesuffix('\n')) from stop


def flag_names():
    return sorted({*TrainSettings.settings()} - {'config'})


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 10 ** 12), st.floats(), st.text(max_size=6),
              st.sampled_from(['simclr', 'auto', '0.1', '--lr', '-1', 'color', 'adamw'])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6)
SETTINGS = st.dictionaries(st.one_of(st.sampled_from(flag_names()), st.text(max_size=6)), VALUES, max_size=5)
RECIPES = st.one_of(
    SETTINGS,
    st.builds(lambda above, phases: {**above, 'phases': phases}, SETTINGS, st.lists(SETTINGS, max_size=3)))


@pytest.mark.slow
@fuzz(recipe=RECIPES)
def test_recipes(folder, recipe):
    path = folder / 'recipe.yaml'
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding='utf-8')
    ends_well(lambda: parsed(path, 'data'), of_recipe(path))


@pytest.mark.slow
@fuzz(content=st.one_of(st.binary(max_size=100), st.text(max_size=100).map(lambda text: text.encode()),
                         st.text('[]{}&*!:-?,| \n"\'%@`#abc', max_size=60).map(str.encode)))
def test_texts_as_recipes(folder, content):
    path = folder / 'recipe.yaml'
    path.write_bytes(content)
    ends_well(lambda: parsed(path, 'data'), of_recipe(path))


@pytest.mark.slow
@fuzz(kind=st.sampled_from(['JPEG', 'PNG', 'GIF', 'BMP', 'TIFF', 'WEBP']), data=st.data())
def test_images(kind, data):
    content = bytearray(saved(ramp((9, 7)), kind))
    changes = st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=5)
    for place, value in data.draw(changes):
        content[place] = value
    content = content[:data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    pixels = ends_well(
        lambda: EncodedPhoto(bytes(content), 'photo 7').decode(), lambda line: line.startswith('photo 7: cannot be'))
    assert pixels is None or pixels.ndim == 3 and pixels.shape[2] == 3


DAMAGE = {
    'no image': (lambda line: ',' + line.split(',', 1)[1], "no image in column 'image_path'"),
    'not UTF-8': (lambda line: line + '\udcff', 'byte 0xff is not UTF-8'),
    'zero byte': (lambda line: line + '\0', 'holds a zero byte'),
    'no number': (lambda line: line.replace('1.5', 'much'), "'much'"),
}


@pytest.mark.slow
@fuzz(before=st.lists(st.sampled_from(['', 'red', '"a, b"', '"two""quotes"']), max_size=5), after=st.integers(0, 5),
      damage=st.sampled_from(sorted(DAMAGE)), end=st.sampled_from(['\n', '\r\n']))
def test_the_row_that_is_wrong_is_the_row_that_is_named(folder, before, after, damage, end):
    spoil, message = DAMAGE[damage]
    good = [f'images/0.png,{color},1.5' for color in before]
    lines = ['image_path,color,size', *good, spoil('images/0.png,red,1.5'), *['images/1.png,red,1.5'] * after]
    path = folder / 'row.csv'
    path.write_bytes(end.join(lines).encode('utf-8', 'surrogateescape'))
    with pytest.raises(UserError) as error:
        table = read_table(path)
        encode_rows(table, find_label_space([table], None, {'size': Quantity}))
    assert error.value.line.startswith(str(path)) and message in error.value.line
    assert ROW.findall(error.value.line) == [str(len(before) + 2)]


@pytest.mark.slow
@pytest.mark.parametrize('test', OTHERS, ids=lambda test: test.__name__)
def test_with_other_draws(folder, test):
    """A failure shows the seed."""
    print(f'FUZZ_SEED={SEED}')
    test(**{'folder': folder} if 'folder' in inspect.signature(test).parameters else {})
