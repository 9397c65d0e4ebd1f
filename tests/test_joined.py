"""Heads that are trained as one parameter train as those that each have their own, and checkpoints do not tell."""
import copy
import io

import pytest
import torch
from common import TinyBackbone, run_ranks

from timm_multilabel.labels import LabelSet, LabelSpace
from timm_multilabel.model import MultiLabelModel
from timm_multilabel.optim import create_optimizer
from timm_multilabel.task import JointTask
from timm_multilabel.training.optimizer_state import load_optimizer
from timm_multilabel.training.optimizer_step import OptimizerStep
from timm_multilabel.training.update_decisions import UpdateDecisions

SIZES = {'a': 5, 'b': 7, 'c': 4, 'd': 40, 'e': 6, 'f': 2, 'g': 3}  # a, b, c and e are one group, f and g another
SPACE = LabelSpace(tuple(LabelSet(name, tuple(f'{name}{number}' for number in range(size)))
                         for name, size in SIZES.items()))
OPTIONS = {'b': {'class_weights': [0.5, 2, 1, 0, 3, 1, 1]}, 'c': {'smoothing': 0.0}, 'f': {'input': 'projection'},
           'g': {'input': 'projection'}}
KWARGS = {
    'adamw': {'opt': 'adamw', 'lr': 0.01, 'weight_decay': 0.1},
    'sgd': {'opt': 'sgd', 'lr': 0.1, 'weight_decay': 0.1, 'momentum': 0.9},
    'amsgrad': {'opt': 'adam', 'lr': 0.01, 'amsgrad': True},
}


class Gained(TinyBackbone):
    """With a scalar among its weights, as NFNets have it."""

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(1.))

    def forward(self, images):
        return self.gain * super().forward(images)


def training_of(join, opt='adamw', options=OPTIONS, **settings):
    torch.manual_seed(0)
    model = MultiLabelModel(Gained(), SPACE, smoothing=0.1, head_options=options, projection_dim=5)
    task = JointTask(model, **settings).double()
    clip = 0.5 if opt == 'adamw' else None
    return OptimizerStep(task, create_optimizer(task, **KWARGS[opt], join_heads=join), clip_grad=clip, accumulate=2)


def train(made, steps=range(4), rank=0, ranks=1):
    decisions = UpdateDecisions(torch.device('cpu'))
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(12, 3, 8, 8, generator=generator, dtype=torch.float64)
        target = torch.stack([torch.randint(size, (12,), generator=generator) for size in SIZES.values()], dim=1)
        images, target = (torch.cat([view.chunk(ranks)[rank] for view in each.chunk(2)]) for each in (images, target))
        made.begin()
        update = made.is_update(step, 100)
        made.backward(made.task(images, target)['loss'] / 2, update, decisions, step, stop=False)
    return made


def state_of(made):
    return made.task.get_checkpoint_state()['state_dict'], made.optimizer.state_dict()


def assert_same(found, expected):
    """Weights and optimizer states of the same names and shapes, and the same to rounding."""
    torch.testing.assert_close(dict(found[0]), dict(expected[0]), rtol=1e-10, atol=1e-12)
    assert list(found[0]) == list(expected[0])
    assert found[1]['param_groups'] == expected[1]['param_groups']
    assert list(found[1]['state']) == list(expected[1]['state'])
    torch.testing.assert_close(found[1]['state'], expected[1]['state'], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize('opt', KWARGS)
@pytest.mark.parametrize('settings', [{}, {'micro_batch': 2, 'first_view_only': True}], ids=str)
def test_training_is_that_of_heads_with_their_own_weights(opt, settings):
    made, expected = (train(training_of(join, opt, **settings)) for join in (True, False))
    assert_same(state_of(made), state_of(expected))
    assert [each.names for each in made.task.joint_module.joined] == [('a', 'b', 'c', 'e'), ('f', 'g')]
    # Backbone 5, projector 2, d 2, and 2 for each group.
    assert sum(len(group['params']) for group in made.optimizer.param_groups) == 5 + 2 + 2 + 2 * 2
    assert {group['weight_decay'] for group in made.optimizer.param_groups if made.task.joint_module.joined[0].bias
            in set(group['params'])} == {0.0}


@pytest.mark.parametrize('opt', KWARGS)
@pytest.mark.parametrize('before', [True, False])
def test_a_run_goes_on_either_way(opt, before):
    """The checkpoint of a run with or without joined heads, loaded by one of the other kind."""
    file = io.BytesIO()
    torch.save(state_of(train(training_of(before, opt))), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in weights.values())
    moments = [value for moments in state['state'].values() for value in moments.values() if torch.is_tensor(value)]
    assert len({value.data_ptr() for value in moments}) == len(moments)
    made = training_of(not before, opt)
    made.task.load_checkpoint_state(weights, made.task.get_task_state())
    load_optimizer(made.optimizer, state)
    assert_same(state_of(made), (weights, state))
    assert_same(state_of(train(made, range(4, 8))), state_of(train(training_of(False, opt), range(8))))


@pytest.mark.parametrize(('change', 'line'), [
    (lambda state, place: state['state'].pop(place), 'some heads only'),
    (lambda state, place: state['state'][place].update(step=torch.tensor(7.0)), 'more steps'),
    (lambda state, place: state['state'][place].update(exp_avg=torch.zeros(1)), 'other shapes'),
    (lambda state, place: state['param_groups'][0]['params'].pop(), 'other parameters')])
def test_a_state_that_cannot_be_joined_is_refused(change, line):
    state = train(training_of(False)).optimizer.state_dict()
    change(state, next(place for place, its in state['state'].items() if its['exp_avg'].shape == (5,)))
    with pytest.raises(ValueError, match=line):
        load_optimizer(training_of(True).optimizer, state)


def test_hooks_of_a_head_are_called_and_its_weights_trained():
    made, expected, seen = training_of(True), train(training_of(False)), []
    made.task.heads['b'].fc.register_forward_hook(lambda *_: seen.append('b'))
    assert_same(state_of(train(made)), state_of(expected))
    assert seen == ['b'] * 4


def test_copies_and_conversions_stay_joined():
    made = training_of(True)
    for task in (copy.deepcopy(made.task), made.task.float().double()):
        joined, head = task.joint_module.joined[0], task.heads['b']
        assert joined.layers[1] is head.fc
        with torch.no_grad():
            joined.weight.fill_(2.0)
            head.fc.bias.fill_(3.0)
        assert (head.fc.weight == 2).all() and (joined.bias[5:12] == 3).all() and not (joined.bias[12:] == 3).any()
    made.task.setup_ema(decay=0.5)
    with torch.no_grad():
        joined.weight.fill_(4.0)
    made.task.update_ema()
    torch.testing.assert_close(
        made.task.get_eval_model(ema=True).named_heads['b'].fc.weight, torch.full((7, 6), 3.0, dtype=torch.float64),
        check_dtype=False)


def test_what_is_not_joined():
    def names(opt='adamw', options=OPTIONS, **settings):
        return [each.names for each in training_of(True, opt, options, **settings).task.joint_module.joined]

    assert names(options={**OPTIONS, 'b': {'drop': 0.5}}) == [('f', 'g')]
    assert names(simclr_weight=1.0, classification_weight=0.0) == []
    task = training_of(True).task
    with pytest.raises(ValueError, match='another optimizer'):
        create_optimizer(task, 'adamw', lr=0.1)
    torch.manual_seed(0)
    other = JointTask(MultiLabelModel(TinyBackbone(), SPACE, projection_dim=5))
    create_optimizer(other, 'lamb', lr=0.1, join_heads=True)  # whose rate depends on the norm of a whole weight
    assert not len(other.joint_module.joined)


def _rank(rank, join):
    made = training_of(join)
    made.task.prepare_distributed()
    return [part.numpy() for part in state_of(train(made, rank=rank, ranks=2))[0].values()]


@pytest.mark.slow
def test_two_processes_train_as_one():
    expected = state_of(train(training_of(False)))[0]
    for found in run_ranks(_rank, 2, True):
        for part, value in zip(found, expected.values(), strict=True):
            torch.testing.assert_close(torch.from_numpy(part), value, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_compiled_heads_are_trained_joined():
    made, expected = training_of(True), train(training_of(False), range(2))
    made.task.compile(backend='aot_eager')
    assert_same(state_of(train(made, range(2))), state_of(expected))
