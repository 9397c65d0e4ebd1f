"""The label space."""
import json

import pandas as pd
import pytest

from timm_multilabel.errors import UserError
from timm_multilabel.labels import MISSING, UNKNOWN, LabelSet, LabelSpace


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
