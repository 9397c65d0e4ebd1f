"""Confusion matrices as files."""
import numpy as np
import pandas as pd

from timm_multilabel.labels import LabelSet
from timm_multilabel.reports.confusion import confusion_stems, draw_confusion, write_confusion


def test_small_and_large_heads_and_awkward_names(tmp_path):
    for classes in (3, 140):
        names = ('$5-$10', '$\\x$', '\u9752') + tuple(f'class {number}' for number in range(classes - 3))
        head = LabelSet('price $', names)
        rng = np.random.default_rng(0)
        true, predicted = rng.integers(classes, size=(2, 500))
        files = write_confusion(tmp_path, f'confusion-{classes}', head, true[:, None], predicted[:, None])
        assert [path.name for path in files] == [f'confusion-{classes}.csv', f'confusion-{classes}.png']
        table = pd.read_csv(files[0], index_col=0)
        assert tuple(table.columns) == tuple(table.index) == names
        assert table.to_numpy()[2, 1] == ((true == 2) & (predicted == 1)).sum()
        assert files[1].read_bytes().startswith(b'\x89PNG')


def test_every_head_has_files_of_its_own():
    assert confusion_stems(['a', 'a b', 'a/b', 'a_b']) == [
        'confusion-a', 'confusion-a_b', 'confusion-a_b~2', 'confusion-a_b~3']


def test_names_of_any_length_leave_room_for_the_matrix():
    figure = draw_confusion(
        LabelSet('$h', ('x' * 500, 'y')), np.array([[0], [1], [1]]), np.array([[0], [1], [0]]))[1]
    figure.draw_without_rendering()
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ['x' * 31 + '\u2026', 'y']
    assert axes.get_position().width > 0.3 and axes.get_title() == r'\$h: accuracy 66.7 % of 3 images'
