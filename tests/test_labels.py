"""The label space."""
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from timm_multilabel.errors import UserError
from timm_multilabel.labels import MISSING, UNKNOWN, BadCell, LabelSet, LabelSpace, Quantity, TagSet


def test_classes_are_sorted_texts_and_empty_is_no_class():
    space = LabelSpace.from_columns({'color': ['Red', 'NA', '', 'Blue', 'Red'], 'size': ['10', '9', '9', '', '10']})
    assert space.heads == (LabelSet('color', ('Blue', 'NA', 'Red')), LabelSet('size', ('10', '9')))
    assert space.names == ('color', 'size') and space.sizes == (3, 2)
    assert str(space) == 'color (3), size (2)'


def test_encode():
    head = LabelSet('color', ('Blue', 'NA'))
    cells = pd.DataFrame({'color': ['NA', '', 'Pink', 'Blue']}, index=[2, 3, 4, 7])
    assert head.encode(cells).tolist() == [[1], [MISSING], [UNKNOWN], [0]]
    assert head.unknown(cells) == {'Pink': [4]}


def test_column_without_labels_is_refused():
    with pytest.raises(ValueError, match="'color' has no label"):
        LabelSpace.from_columns({'color': ['', '']})


def test_json_round_trip(tmp_path):
    space = LabelSpace.from_columns({'farbe': ['grün', 'NA', 'a,"b"'], 'type': ['x']})
    space.save(tmp_path / 'label_space.json')
    assert LabelSpace.load(tmp_path / 'label_space.json') == space
    assert json.loads((tmp_path / 'label_space.json').read_text())['heads'][0]['classes'][-1] == 'grün'


@pytest.mark.parametrize('text', [
    '', '[]', '{}', '{"heads": 3}', '{"heads": [{"name": "a"}]}', '{"heads": [{"name": "a", "classes": []}]}',
    '{"heads": [{"name": "a", "classes": ["x", "x"]}]}', '{"heads": [{"name": "a", "classes": [1]}]}',
    '{"heads": [{"name": "a", "classes": ["x"]}, {"name": "a", "classes": ["x"]}]}',
])
def test_damaged_json_is_one_clear_line(tmp_path, text):
    (tmp_path / 'space.json').write_text(text)
    with pytest.raises(UserError, match='space.json: cannot be read as a label space') as error:
        LabelSpace.load(tmp_path / 'space.json')
    assert '\n' not in error.value.line


def frame(**columns):
    return pd.DataFrame(columns, index=range(2, 2 + len(next(iter(columns.values())))))


def test_tags_of_one_column():
    cells = frame(style=['b|a', '', ' a ', 'c|b'])
    tags = TagSet.from_cells('style', cells)
    assert tags.classes == ('a', 'b', 'c') and tags.width == 3 and str(tags) == 'style (3 tags)'
    assert tags.encode(cells).tolist() == [[1, 1, 0], [-1, -1, -1], [1, 0, 0], [0, 1, 1]]
    assert tags.unknown(frame(style=['a|d', 'd', 'e'])) == {'d': [2, 3], 'e': [4]}
    assert tags.encode(frame(style=['a|d', 'd'])).tolist() == [[1, 0, 0], [0, 0, 0]]


def test_tags_of_a_group_of_columns():
    cells = frame(casual=['1', '0', ''], formal=['0', '', '1'])
    tags = TagSet.from_group('style', cells)
    assert (tags.classes, tags.columns) == (('casual', 'formal'), ('casual', 'formal'))
    assert tags.encode(cells).tolist() == [[1, 0], [0, -1], [-1, 1]]
    with pytest.raises(BadCell, match="'maybe' is neither 0 nor 1") as error:
        tags.encode(frame(casual=['1', 'maybe'], formal=['0', '0']))
    assert (error.value.column, error.value.row) == ('casual', 3)


def test_numbers_are_standardised():
    cells = frame(price=['1', '', '3', '5e0'])
    number = Quantity.from_cells('price', cells)
    assert (number.mean, number.std) == (3.0, pytest.approx((8 / 3) ** 0.5))
    encoded = number.encode(cells)[:, 0]
    assert encoded[[0, 2, 3]].tolist() == pytest.approx([-(1.5 ** 0.5), 0, 1.5 ** 0.5]) and math.isnan(encoded[1])
    for same in (['7', '7'], ['0.1', '0.1', '0.1']):
        assert Quantity.from_cells('price', frame(price=same)).std == 1.0
    with pytest.raises(ValueError, match='too large'):
        Quantity.from_cells('price', frame(price=['1e200', '-1e200']))
    for text in ('cheap', 'nan', 'inf', '1,5'):
        with pytest.raises(BadCell, match=f"'{text}' is no number") as error:
            number.encode(frame(price=['1', text]))
        assert error.value.row == 3


MIXED = LabelSpace((LabelSet('c', ('x', 'y')), TagSet('t', ('a', 'b', 'd')), Quantity('n', 1.5, 2.0)))


def test_rows_of_targets_are_split_by_head():
    targets = torch.tensor([[1, 0, 1, -1, 0.5], [-1, -1, -1, -1, math.nan]])
    classes, tags, numbers = MIXED.split(targets)
    assert classes.tolist() == [1, -1] and classes.dtype == torch.int64
    assert tags.tolist() == [[0, 1, -1], [-1, -1, -1]] and numbers[0] == 0.5
    assert MIXED.labelled(targets).tolist() == [[True, True, True], [False, False, False]]
    assert MIXED.sizes == (2, 3, 1)


def test_every_kind_of_label_survives_json(tmp_path):
    space = LabelSpace((*MIXED.heads, TagSet('g', ('p', 'q'), ('p', 'q'))))
    space.save(tmp_path / 'space.json')
    assert LabelSpace.load(tmp_path / 'space.json') == space


def test_an_index_beyond_the_last_class_is_refused():
    labels = LabelSet('color', ('blue', 'red'))
    labels.check(np.array([-1, 0, 1]))
    for index in (2, -2):
        with pytest.raises(ValueError, match="head 'color': a class that there is not"):
            labels.check(np.array([0, index]))


def test_a_stored_number_without_a_spread_is_refused():
    for std in (0.0, float('inf'), float('nan'), -1.0):
        with pytest.raises(ValueError, match="head 'price' has no mean and standard deviation"):
            LabelSpace.from_dict({'heads': [{'name': 'price', 'kind': 'number', 'mean': 1.0, 'std': std}]})
    assert LabelSpace.from_dict({'heads': [{'name': 'price', 'kind': 'number', 'mean': 1.0, 'std': 2.0}]}).heads == (
        Quantity('price', 1.0, 2.0),)
