"""Kinds of heads: losses with weights and missing labels, metrics, options, files of the user's own."""
from typing import Optional

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import TinyBackbone

from timm_multilabel.errors import UserError
from timm_multilabel.heads import (
    REGISTRY,
    ArcFaceHead,
    Head,
    NumericHead,
    SoftmaxHead,
    TagsHead,
    create_head,
    load_registry,
    options_of,
    parse_option,
    resolve_options,
)
from timm_multilabel.labels import LabelSet, LabelSpace, Quantity, TagSet
from timm_multilabel.losses import binary_cross_entropy, dense_cross_entropy, index_cross_entropy, smooth_l1
from timm_multilabel.model import MultiLabelModel

CLASSES, TAGS, NUMBER = LabelSet('c', ('x', 'y', 'z')), TagSet('t', ('a', 'b')), Quantity('n', 10.0, 4.0)
NAN = float('nan')


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_class_weights_are_those_of_torch(smoothing):
    torch.manual_seed(0)
    logits, target = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 2, -1, 2, 1])
    weights = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    total, count = index_cross_entropy(logits, target, smoothing, weights)
    expected = torch.nn.CrossEntropyLoss(weights, ignore_index=-1, label_smoothing=smoothing)(logits, target)
    assert (total / count).item() == pytest.approx(expected.item(), rel=1e-12)
    dense = F.one_hot(target.clamp(min=0), 3).double() * (target >= 0)[:, None]
    mixed = dense_cross_entropy(logits, dense, 0.0, weights)
    assert [each.item() for each in mixed] == pytest.approx(
        [each.item() for each in index_cross_entropy(logits, target, 0.0, weights)])


@pytest.mark.parametrize('smoothing', [0.0, 0.2])
def test_binary_cross_entropy_over_the_tags_that_are_known(smoothing):
    torch.manual_seed(0)
    logits = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    weights = torch.tensor([2.0, 5.0], dtype=torch.float64)
    total, count = binary_cross_entropy(logits, target, smoothing, weights)
    expected = 0.0
    for row, column in ((0, 0), (0, 1), (1, 1)):
        t = target[row, column].item() * (1 - smoothing) + smoothing / 2
        p = logits[row, column].sigmoid()
        expected = expected - weights[column] * t * p.log() - (1 - t) * (1 - p).log()
    assert (total.item(), count.item()) == (pytest.approx(expected.item(), rel=1e-12), 3)
    total.backward()
    assert (logits.grad[2] == 0).all() and logits.grad[1, 0] == 0


def test_smooth_l1_leaves_missing_numbers_out():
    output = torch.tensor([0.5, 3.0, 7.0, -0.2], dtype=torch.float64, requires_grad=True)
    total, count = smooth_l1(output, torch.tensor([0.0, 0.0, NAN, NAN], dtype=torch.float64))
    assert (total.item(), count.item()) == (pytest.approx(0.125 + 2.5), 2)
    total.backward()
    assert output.grad.tolist() == [0.5, 1, 0, 0]


def test_balanced_weights():
    counts = torch.tensor([0, 0, 0, 1, -1])
    assert SoftmaxHead.balance(counts, CLASSES) == pytest.approx([4 / 9, 4 / 3, 1.0])
    tags = torch.tensor([[1.0, 0], [0, 0], [0, -1]])
    assert TagsHead.balance(tags, TAGS) == [2.0, 1.0]


def test_figures_of_tags():
    head = TagsHead(TAGS, 4)
    target = np.array([[1, 0], [0, 1], [1, -1], [0, 1]], dtype=float)
    measured = np.array([[.9, .8], [.6, .7], [.4, .1], [.1, .2]])
    figures = head.metrics(target, measured)
    # a: ranked 1, 0, 1, 0: (1 + 2/3) / 2; b: ranked 0, 1, 1: (1/2 + 2/3) / 2
    assert figures['map'] == pytest.approx(100 * ((1 + 2 / 3) / 2 + (1 / 2 + 2 / 3) / 2) / 2)
    assert figures['f1'] == pytest.approx(100 * (0.5 + 0.5) / 2)
    assert figures['micro_f1'] == pytest.approx(50) and set(figures) == {*TagsHead.metric_names, 'tags'}


def test_figures_of_numbers_are_in_the_columns_unit():
    target, measured = np.array([[-1.0], [0.0], [1.0]]), np.array([[-1.0], [0.5], [1.0]])
    figures = NumericHead(NUMBER, 4).metrics(target, measured)
    assert figures['mae'] == pytest.approx(4 * 0.5 / 3) and figures['r2'] == pytest.approx(100 * (1 - 0.25 / 2))


def test_options_are_those_of_the_constructor():
    assert set(options_of(ArcFaceHead)) == {'drop', 'smoothing', 'class_weights', 'scale', 'margin'}
    flags = {'drop': 0.3, 'smoothing': 0.1}
    options = resolve_options(CLASSES, {'loss': 'arcface', 'scale': 9.0, 'columns': 'x'}, flags, REGISTRY)
    assert options == {'loss': 'arcface', 'input': 'features', 'drop': 0.3, 'scale': 9.0}
    made = create_head(CLASSES, 4, options, REGISTRY)
    assert (made.scale, made.drop.p, made.smoothing) == (9.0, 0.3, 0.0)
    assert resolve_options(CLASSES, {'drop': 0.5}, flags, REGISTRY) == {
        'loss': 'softmax', 'input': 'features', 'drop': 0.5, 'smoothing': 0.1}
    assert isinstance(create_head(TAGS, 4, resolve_options(TAGS, {}, {}, REGISTRY), REGISTRY), TagsHead)
    for labels, options, message in [
        (CLASSES, {'loss': 'hinge'}, "no loss 'hinge' .there are: softmax, arcface, tags, numeric"),
        (TAGS, {'loss': 'arcface'}, "'arcface' reads classes, and the head has tags"),
        (NUMBER, {'smoothing': 0.1},
         "'numeric' has no option 'smoothing' .it has: loss, weight, input, columns, views, drop"),
    ]:
        with pytest.raises(ValueError, match=message):
            resolve_options(labels, options, {}, REGISTRY)


WRONG = """
import torch
from timm_multilabel.heads import Head

class Mine(Head):
    kind = 'mine'
    metric_names = ('score',)
    def __init__(self, labels, in_features):
        super().__init__(labels)
    def forward(self, features):
        return features[:, :3]
    def loss(self, output, target):
        return output.sum(), torch.tensor(1.0)
    def predict(self, output):
        return output.argmax(1)
    def metrics(self, target, measured):
        return {'score': 1.0}
"""


@pytest.mark.parametrize('old, new, message', [
    ('        super().__init__(labels)', '        self.x = torch.nn.Linear(1, 1)', "'mine' fails with AttributeError"),
    ('output.sum(), torch.tensor(1.0)', 'output.sum()', 'must be two scalar tensors of floats'),
    ('torch.tensor(1.0)', 'len(target)', 'must be two scalar tensors of floats'),
    ('torch.tensor(1.0)', '(target >= 0).sum()', 'must be two scalar tensors of floats'),
    ("{'score': 1.0}", "{'other': 1.0}", 'must be a dict with score'),
    ("('score',)", '()', 'names no metrics'),
    ('output.argmax(1)', 'nowhere', "'mine' fails with NameError"),
])
def test_kinds_of_the_users_are_tried_out(tmp_path, old, new, message):
    def make(text):
        (tmp_path / 'mine').write_text(text)
        return MultiLabelModel(TinyBackbone(), LabelSpace((CLASSES,)), head_options={'c': {'loss': 'mine'}},
                               registry=load_registry(str(tmp_path / 'mine')))

    make(WRONG)
    with pytest.raises(ValueError, match=f"head 'c': .*{message}"):
        make(WRONG.replace(old, new))


def test_every_kind_in_one_model():
    space = LabelSpace((CLASSES, TAGS, NUMBER, LabelSet('d', ('p', 'q'))))
    options = {'d': {'loss': 'arcface', 'input': 'projection'}}
    model = MultiLabelModel(TinyBackbone(), space, head_options=options, projection_dim=7)
    output = model(torch.zeros(2, 3, 8, 8))
    assert {name: tuple(values.shape) for name, values in output.items()} == {
        'c': (2, 3), 't': (2, 2), 'n': (2,), 'd': (2, 2)}
    assert model.named_heads['d'].weight.shape == (2, 7) and model.projector is not None
    with pytest.raises(ValueError, match="head 'd': input is 'pixels'"):
        MultiLabelModel(TinyBackbone(), space, head_options={'d': {'input': 'pixels'}})


@pytest.mark.parametrize('text, message', [
    (None, 'no such file'),
    ('import nowhere_at_all', 'fails with ModuleNotFoundError'),
    ('import sys; sys.exit(0)', 'fails with SystemExit'),
    ('x = 1', "no subclass of timm_multilabel.heads.Head with a 'kind'"),
    ('from timm_multilabel.heads import Head\nclass Mine(Head):\n    kind = "softmax"\n', 'a kind of ours'),
])
def test_head_modules_are_checked(tmp_path, text, message):
    if text is not None:
        (tmp_path / 'mine.py').write_text(text)
    with pytest.raises(UserError, match=message):
        load_registry(str(tmp_path / 'mine.py'))


class Options(Head):
    """Options of many types, some by their defaults alone."""

    def __init__(self, labels, in_features, *, places: 'list[int]', plain: list | None = None, drop: float = 0.5,
                 steps: int = 3, exact: Optional[bool] = None, name: str = 'x', bare=2, nothing=None):  # noqa: UP045
        super().__init__(labels)


@pytest.mark.parametrize('name, given, expected', [
    ('places', '1+2', [1, 2]), ('places', [1, '2'], [1, 2]), ('plain', 'S+M', ['S', 'M']),
    ('plain', [1, 'M'], ['1', 'M']),
    ('drop', '1e-1', 0.1), ('drop', 1, 1.0), ('steps', '7', 7), ('steps', 7, 7), ('exact', 'True', True),
    ('exact', False, False), ('name', '12', '12'), ('bare', '4', 4), ('nothing', 'a', 'a')])
def test_options_are_read_as_their_types_say(name, given, expected):
    made = parse_option(given, options_of(Options)[name])
    assert made == expected and type(made) is type(expected)


@pytest.mark.parametrize('name, given, message', [
    ('places', '1+x', 'invalid literal for int'), ('drop', 'much', 'could not convert string to float'),
    ('drop', True, 'expected a number'), ('steps', '1.5', 'invalid literal for int'),
    ('steps', True, 'expected a number'), ('steps', 1.5, 'invalid literal for int'),
    ('exact', 'yes', 'expected true or false')])
def test_values_that_are_none_of_an_option(name, given, message):
    with pytest.raises(ValueError, match=message):
        parse_option(given, options_of(Options)[name])


def test_options_with_types_that_only_checkers_know():
    def __init__(self, labels: 'Unknown', in_features, *, steps: 'int', order: 'list'):  # noqa: F821
        pass

    assert options_of(type('Kind', (Head,), {'__init__': __init__})) == {'steps': int, 'order': list}
