"""What tests once let pass: the length of a run, and lines whose loss no test noticed."""
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from common import SPACE, tiny_task, train_run, train_settings
from timm.utils import NativeScaler
from torch import nn

from timm_multilabel.api.compare import _read_settings
from timm_multilabel.assembly.optimization import cooldown_epochs
from timm_multilabel.cli.main import run_command
from timm_multilabel.model import MultiLabelModel
from timm_multilabel.optim import create_optimizer
from timm_multilabel.task import JointTask
from timm_multilabel.training.optimizer_step import OptimizerStep
from timm_multilabel.training.progress_bar import ProgressBar, RunLength
from timm_multilabel.training.trainer import Precision, Trainer
from timm_multilabel.training.training_progress import TrainingProgress
from timm_multilabel.training.update_decisions import UpdateDecision, UpdateDecisions

BY_DEFAULT = ['--model', 'test_resnet', '--img-size', '32', '-b', '4', '-j', '0', '--device', 'cpu']


def parsed(*words):
    return train_settings('data', *words).schedule


@pytest.mark.parametrize('flags, cooldown', [
    (['--epochs', '1'], 0), (['--epochs', '3'], 0), (['--epochs', '9'], 0), (['--epochs', '10'], 1),
    (['--epochs', '99'], 9), (['--epochs', '100'], 10), (['--epochs', '300'], 10), ([], 10),
    (['--epochs', '3', '--cooldown-epochs', '10'], 10), (['--epochs', '100', '--cooldown-epochs', '0'], 0),
])
def test_the_cooldown_is_a_tenth_of_the_epochs_and_10_at_most(flags, cooldown):
    assert cooldown_epochs(parsed(*flags)) == cooldown


@pytest.mark.parametrize('epoch, title', [
    (0, 'Epoch 1/100 + 10 of cooldown'), (99, 'Epoch 100/100 + 10 of cooldown'),
    (100, 'Epoch 101/110, cooldown 1/10'), (109, 'Epoch 110/110, cooldown 10/10')])
def test_titles_of_epochs(epoch, title):
    assert RunLength(100, 10).title(epoch) == title
    assert RunLength(110).title(epoch) == f'Epoch {epoch + 1}/110'


@pytest.mark.slow
def test_3_epochs_are_3_epochs(data_dir, tmp_path, capsys):
    run_command('train', 'train.py', [
        str(data_dir), *BY_DEFAULT, '--epochs', '3', '--output', str(tmp_path), '--experiment', 'run'])
    out = capsys.readouterr().out
    assert '\ntest_resnet, 3 epochs, heads: ' in out and f'{tmp_path}/run: 3 epochs done' in out
    assert 'Epoch 3/3  loss' in out and 'cooldown' not in out
    summary = pd.read_csv(tmp_path / 'run' / 'summary.csv')
    assert summary['epoch'].tolist() == [0, 1, 2] and summary['lr'].min() == 1e-4  # warm-up's first rate


@pytest.mark.slow
@pytest.mark.parametrize('on_updates', [[], ['--sched-on-updates']])
def test_the_cooldown_is_said_and_trained(data_dir, tmp_path, capsys, on_updates):
    """10 epochs and their tenth, at the least rate; args.yaml repeats the default, not its number."""
    run_command('train', 'train.py', [
        str(data_dir), *BY_DEFAULT, '-wls', '0', '--epoch-steps', '1', '--epochs', '10', '--warmup-epochs', '0',
        '--output', str(tmp_path), '--experiment', 'run', *on_updates])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith('columns look like: color classes (3), shape classes (2)')
    assert lines[1].startswith('test_resnet, 10 epochs + 1 of cooldown, heads: ')
    assert ', 1 x cpu, 1 step an epoch, run folder ' in lines[2]
    assert sum(line.startswith('Epoch 10/10 + 1 of cooldown  loss ') for line in lines) == 1
    assert sum(line.startswith('Epoch 11/11, cooldown 1/1  loss ') for line in lines) == 1
    assert f'{tmp_path}/run: 10 epochs + 1 of cooldown done' in lines
    rates = pd.read_csv(tmp_path / 'run' / 'summary.csv')['lr']
    assert len(rates) == 11 and rates[10] == pytest.approx(1e-5) and rates[9] > 1e-3
    path = tmp_path / 'run' / 'args.yaml'
    assert cooldown_epochs(parsed('-c', str(path), '--epochs', '3')) == 0
    # A run of before the default was a tenth holds its number, and goes on with it.
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), 'cooldown_epochs': 4}))
    assert cooldown_epochs(parsed('-c', str(path))) == 4


def test_the_default_cooldown_and_the_same_number_are_one_setting(tmp_path):
    read = []
    for cooldown in (None, 10):
        (tmp_path / 'args.yaml').write_text(yaml.safe_dump({'data_dir': 'data', 'cooldown_epochs': cooldown}))
        read.append(_read_settings(Path(tmp_path), None))
    assert read[0] == read[1] and read[0]['cooldown_epochs'] == 10


@pytest.mark.slow
def test_a_schedule_without_cooldown_says_so(data_dir, tmp_path, capsys):
    for flags, said in (([], False), (['--cooldown-epochs', '2'], True), (['--cooldown-epochs', '0'], False)):
        folder = train_run(data_dir, tmp_path / str(flags), '--sched', 'step', '--epoch-steps', '1', *flags, epochs=1)
        line = '--cooldown-epochs 2: --sched step has no cooldown; trains 1 epoch\n'
        assert (line in capsys.readouterr().out) == said and len(pd.read_csv(folder / 'summary.csv')) == 1


class Normed(nn.Module):
    """A backbone that is batch norm over the means of three channels."""
    head_hidden_size = 3

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, images):
        return self.norm(images.mean(dim=(2, 3)))


class Loader(list):
    def set_epoch(self, epoch, first=0):
        pass


def batches(count):
    """Batches of two views of three photos."""
    generator = torch.Generator().manual_seed(0)
    target = torch.tensor([[0, 1], [2, 0], [1, -1]]).repeat(2, 1)
    return [(torch.randn(6, 3, 8, 8, generator=generator), target) for _ in range(count)]


def fitted(task, loader, optimizer=None, momentum=0, **optimizer_step):
    """The optimizer_step, after an epoch, of SGD by default."""
    optimizer = optimizer or torch.optim.SGD(task.trainable_module.parameters(), lr=0.1, momentum=momentum)
    made = OptimizerStep(task, optimizer, **optimizer_step)
    fit = Trainer(made, Precision(torch.device('cpu')), Loader(loader), None, images_per_step=6, seed=0)
    fit.train(TrainingProgress(0), 0.1, ProgressBar('', len(loader), False))
    return made


def weights(task):
    return [p.detach().clone() for p in task.trainable_module.parameters()]


@pytest.mark.parametrize('accumulate, bad, counted', [(1, 1, (0, 2, 3)), (2, 0, (2, 3)), (2, 1, (2, 3)), (2, 3, (0, 1)),
                                                      (3, 3, (0, 1, 2))])
def test_a_skipped_update_leaves_no_trace_in_batch_norm(accumulate, bad, counted):
    """Its running statistics are those of the batches of the other updates, by their formula."""
    torch.manual_seed(0)
    task, loader = JointTask(MultiLabelModel(Normed(), SPACE), projection_dim=3), batches(4)
    loader[bad][0][0] = math.inf
    fitted(task, loader, accumulate=accumulate)
    mean, variance = torch.zeros(3), torch.ones(3)
    for step in counted:
        features = loader[step][0].mean(dim=(2, 3))
        mean, variance = 0.9 * mean + 0.1 * features.mean(0), 0.9 * variance + 0.1 * features.var(0)
    norm = task.trainable_module.model.backbone.norm
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)
    assert norm.num_batches_tracked == len(counted)
    assert all(weight.isfinite().all() for weight in weights(task))


@pytest.mark.parametrize('clip', [{}, {'clip_grad': 0.01}, {'clip_grad': 0.001, 'clip_mode': 'value'}])
def test_a_loss_scaler_changes_no_update_and_skips_a_bad_one(clip):
    """In float32: the weights after a good, a bad and a good batch are those without scaler and without the bad one."""
    scaled, plain, loader = tiny_task(), tiny_task(), batches(3)
    fitted(plain, [loader[0], loader[2]], **clip)
    loader[1][0].fill_(math.inf)
    optimizer_step = fitted(scaled, loader, scaler=NativeScaler(device='cpu'), **clip)
    for mine, expected in zip(weights(scaled), weights(plain), strict=True):
        torch.testing.assert_close(mine, expected)
    assert optimizer_step.scaler._scaler.get_scale() == 2 ** 15  # half of it, for the skipped update


@pytest.mark.parametrize('wrong', ['loss', 'gradient'])
def test_a_loss_or_a_gradient_alone_is_enough_to_skip_an_update(wrong):
    task, decisions, (batch, *_) = tiny_task(), UpdateDecisions(torch.device('cpu')), batches(1)
    before = weights(task)
    optimizer_step = OptimizerStep(task, torch.optim.SGD(task.trainable_module.parameters(), lr=0.1))
    if wrong == 'gradient':
        next(task.trainable_module.parameters()).register_hook(lambda gradient: gradient * math.inf)
    optimizer_step.begin()
    optimizer_step.backward(task(*batch)['loss'] + (math.inf if wrong == 'loss' else 0), True, decisions, 4, stop=False)
    assert decisions.verdicts() == [UpdateDecision(step=4, bad=True, bad_here=wrong == 'loss', stop=False)]
    assert all(torch.equal(a, b) for a, b in zip(before, weights(task), strict=True))


def test_momentum_sees_a_gradient_of_zero_where_an_update_is_skipped():
    task, by_hand, loader = tiny_task(), tiny_task(), batches(3)
    parameters = list(by_hand.trainable_module.parameters())
    velocity = [torch.zeros_like(p) for p in parameters]
    for batch in (loader[0], None, loader[2]):
        gradients = [torch.zeros_like(p) for p in parameters] if batch is None else torch.autograd.grad(
            by_hand(*batch)['loss'], parameters)
        velocity = [0.9 * v + g for v, g in zip(velocity, gradients, strict=True)]
        if batch is not None:  # an update that is skipped leaves the weights, whatever the momentum
            with torch.no_grad():
                for p, v in zip(parameters, velocity, strict=True):
                    p -= 0.1 * v
    loader[1][0].fill_(math.inf)
    fitted(task, loader, momentum=0.9)
    for mine, expected in zip(weights(task), parameters, strict=True):
        torch.testing.assert_close(mine, expected.detach())


@pytest.mark.parametrize('opt', ['adam', 'adamw', 'sgd'])
@pytest.mark.parametrize('bad, clip', [(0, {}), (1, {'clip_grad': 0.01})])
def test_a_fused_optimizer_leaves_out_an_update_that_is_skipped(opt, bad, clip):
    """Its weights, moments and count of steps are those of PyTorch's plain optimizer without the bad batch."""
    fused, plain, loader = tiny_task(), tiny_task(), batches(3)
    good = [batch for place, batch in enumerate(loader) if place != bad]
    made = {'lr': 0.01, 'weight_decay': 0.1, 'momentum': 0.9}
    expected = fitted(plain, good, create_optimizer(plain, opt, foreach=False, **made), **clip).optimizer
    loader[bad][0].fill_(math.inf)
    optimizer = fitted(fused, loader, create_optimizer(fused, opt, **made), **clip).optimizer
    assert optimizer.defaults['fused'] and not expected.defaults['fused']
    for mine, other in zip(weights(fused), weights(plain), strict=True):
        torch.testing.assert_close(mine, other)
    torch.testing.assert_close(optimizer.state_dict()['state'], expected.state_dict()['state'])


def test_adaptive_clipping_leaves_the_heads_alone():
    clipped, free = tiny_task(), tiny_task()
    fitted(clipped, batches(1), clip_grad=1e-6, clip_mode='agc')
    fitted(free, batches(1))
    for (name, mine), other in zip(clipped.trainable_module.named_parameters(), weights(free), strict=True):
        if name.startswith(('model.backbone', 'projector')):
            assert not torch.equal(mine, other), name
        else:
            assert torch.equal(mine, other), name


@pytest.mark.parametrize('steps, accumulate, updates, sizes', [
    (5, 1, 5, [1, 1, 1, 1, 1]), (5, 2, 3, [2, 2, 2, 2, 1]), (8, 3, 3, [3] * 6 + [2, 2]),
    (2, 4, 1, [2, 2])])
def test_groups_of_batches(steps, accumulate, updates, sizes):
    optimizer_step = OptimizerStep(None, None, accumulate=accumulate)
    assert optimizer_step.updates_per_epoch(steps) == updates
    assert [optimizer_step.batches_in_update(step, steps) for step in range(steps)] == sizes
    assert sum(optimizer_step.is_update(step, steps) for step in range(steps)) == updates and optimizer_step.is_update(
        steps - 1, steps)
