"""Earlier names work, each with one warning that names the new one."""
import warnings

import pytest

from timm_multilabel.deprecation import RenamedAttribute, take_earlier_names
from timm_multilabel.heads import Head, NumericHead, load_registry
from timm_multilabel.labels import Quantity
from timm_multilabel.metrics import less_is_better


def test_a_kind_with_the_earlier_names_works():
    with pytest.warns(FutureWarning) as caught:
        class Old(NumericHead):
            kind = 'old'
            figures = ('r2', 'rmse')
            decreasing = ('rmse',)

    assert sorted(str(each.message) for each in caught) == [
        f"Old: '{old}' is now called '{new}'; the earlier name works for two minor releases"
        for old, new in (('decreasing', 'lower_is_better'), ('figures', 'metric_names'))]
    assert {each.filename for each in caught} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter('error')

        class Newer(Old):
            """It defines neither name."""

        for kind in (Old, Newer):
            head = kind(Quantity('n', 0.0, 1.0), 2)
            assert head.metric_names == head.figures == ('r2', 'rmse') and head.lower_is_better == ('rmse',)
            assert less_is_better('n/rmse', {'n': head}) and not less_is_better('n/r2', {'n': head})


def test_the_new_name_alone_makes_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter('error')

        class Both(Head):
            metric_names = ('exact',)
            figures = ('exact',)  # for an earlier version

    assert Both.metric_names == ('exact',)


def test_an_earlier_name_that_is_read_warns():
    head = NumericHead(Quantity('n', 0.0, 1.0), 2)
    for read in (lambda: head.figures, lambda: NumericHead.figures):
        with pytest.warns(FutureWarning, match="NumericHead: 'figures' is now called 'metric_names'") as caught:
            assert read() == ('r2', 'mae')
        assert caught[0].filename == __file__


def test_a_file_of_the_users_warns_at_its_own_line(tmp_path):
    path = tmp_path / 'kinds.py'
    path.write_text('from timm_multilabel.heads import SoftmaxHead\n\n\nclass Mine(SoftmaxHead):\n    kind = "mine"\n'
                    '    figures = ("top1", "top5")\n')
    with pytest.warns(FutureWarning, match='metric_names') as caught:
        assert load_registry(str(path))['mine'].metric_names == ('top1', 'top5')
    assert (caught[0].filename, caught[0].lineno) == (str(path), 4)


def test_other_classes_can_use_it():
    class Base:
        new = 1
        old = RenamedAttribute('new')

        def __init_subclass__(cls):
            take_earlier_names(cls)

    with pytest.warns(FutureWarning, match="Sub: 'old' is now called 'new'"):
        class Sub(Base):
            old = 2

    assert (Base.new, Sub.new) == (1, 2)
