"""What happens between a loss and the weights: accumulation, clipping, precision, EMA, batch norm, ranking."""
import math
from itertools import pairwise
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from common import SPACE, run_ranks, tiny_task, train_settings
from torch import nn

from timm_multilabel.assembly.model import create_model
from timm_multilabel.cli.main import run_command
from timm_multilabel.errors import UserError
from timm_multilabel.heads import REGISTRY
from timm_multilabel.model import MultiLabelModel
from timm_multilabel.task import JointTask
from timm_multilabel.training import trainer
from timm_multilabel.training.checkpoint import read_checkpoint
from timm_multilabel.training.optimizer_step import OptimizerStep
from timm_multilabel.training.progress_bar import ProgressBar
from timm_multilabel.training.trainer import Precision, Trainer, make_scaler
from timm_multilabel.training.training_progress import TrainingProgress
from timm_multilabel.training.update_decisions import UpdateDecisions

CPU = Precision(torch.device('cpu'))


def batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.tensor([[0, 1], [2, 0], [1, -1]]).repeat(2, 1)
    return [(torch.randn(6, 3, 8, 8, generator=generator), target) for _ in range(count)]


def train(task, loader, precision=CPU, epoch=0, **optimizer_step):
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.1)
    fit = Trainer(
        OptimizerStep(task, optimizer, **optimizer_step), precision, Loader(loader), None, images_per_step=6, seed=0)
    return fit.train(TrainingProgress(epoch), 0.1, ProgressBar('', len(loader), False))


def weights(task):
    return [p.detach().clone() for p in task.trainable_module.parameters()]


def test_accumulated_gradients_are_means_and_the_last_group_is_smaller():
    task, loader = tiny_task(), batches(5)
    train(task, loader, accumulate=2)

    by_hand = tiny_task()
    optimizer = torch.optim.SGD(by_hand.trainable_module.parameters(), lr=0.1)
    for group in (loader[:2], loader[2:4], loader[4:]):
        optimizer.zero_grad()
        torch.stack([by_hand(*batch)['loss'] for batch in group]).mean().backward()
        optimizer.step()
    for mine, theirs in zip(weights(task), weights(by_hand), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_clipping_bounds_the_step():
    task = tiny_task()
    before = weights(task)
    train(task, batches(1), clip_grad=0.01)
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, weights(task), strict=True)]).norm()
    assert moved.item() == pytest.approx(0.1 * 0.01, rel=1e-3)  # learning rate times norm


def test_autocast_reaches_the_heads_and_float16_alone_is_scaled():
    seen = []
    task = tiny_task()
    task.trainable_module.model.heads[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    train(task, batches(1), Precision(torch.device('cpu'), torch.bfloat16))
    train(task, batches(1))
    assert seen == [torch.bfloat16, torch.float32]
    assert make_scaler(Precision(torch.device('cpu'), torch.bfloat16)) is None
    assert make_scaler(Precision(torch.device('cpu'), torch.float16)) is not None


def test_channels_last_reaches_the_backbone():
    seen = []
    task = tiny_task()
    task.trainable_module.model.backbone.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last)))
    train(task, batches(1), Precision(torch.device('cpu'), channels_last=True))
    assert seen == [True]


def test_ema_follows_its_formula():
    """timm counts updates from 1: the first copies the weights, the following ones average."""
    task, loader = tiny_task(), batches(3)
    task.setup_ema(decay=0.75)
    history = []
    task.trainable_module.register_forward_pre_hook(lambda module, inputs: history.append(weights(task)[0]))
    train(task, loader)
    after_1, after_2, after_3 = history[1], history[2], weights(task)[0]
    expected = 0.75 * (0.75 * after_1 + 0.25 * after_2) + 0.25 * after_3
    torch.testing.assert_close(next(task.get_trainable_module(ema=True).parameters()), expected)


def test_updates_are_counted_over_epochs():
    task, seen = tiny_task(), []
    task.update_ema = lambda step: seen.append(step)
    for epoch in range(2):
        train(task, batches(5), epoch=epoch, accumulate=2)
    assert seen == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize('metric, best', [('top1', 'eval_ema_top1'), ('loss', 'eval_loss')])
def test_the_better_of_plain_and_ema_ranks_an_epoch(metric, best):
    task = tiny_task()
    task.setup_ema()
    fit = Trainer(OptimizerStep(task, None), CPU, None, eval_loader=[], images_per_step=1, seed=0, metric=metric)
    row = {'eval_top1': 50.0, 'eval_ema_top1': 60.0, 'eval_loss': 1.0, 'eval_ema_loss': 2.0}
    assert fit.score(row) == best


@pytest.mark.slow
def test_lower_losses_are_better_checkpoints(data_dir, tmp_path):
    run_command('train', 'train.py', [
        str(data_dir), '--model', 'test_resnet', '--img-size', '32', '-b', '4', '-j', '0', '--device', 'cpu',
        '--epochs', '3', '--cooldown-epochs', '0', '--warmup-epochs', '0', '--eval-metric', 'loss', '--lr', '0.2',
        '--output', str(tmp_path), '--experiment', 'run', '--mean', '0.1', '--std', '0.3', '--crop-pct', '0.5',
        '--interpolation', 'nearest', '--opt', 'adamw', '--opt-betas', '0.5', '0.6', '--opt-eps', '0.01'])
    losses = pd.read_csv(tmp_path / 'run' / 'summary.csv')['eval_loss']
    best = read_checkpoint(tmp_path / 'run' / 'model_best.pth.tar')
    assert losses.nunique() == 3 and best.state['epoch'] == losses.idxmin()
    config = best.data_config
    assert (config['mean'], config['std'], config['crop_pct'], config['interpolation']) == (
        [0.1] * 3, [0.3] * 3, 0.5, 'nearest')
    group = best.state['optimizer']['param_groups'][0]
    assert (tuple(group['betas']), group['eps']) == ((0.5, 0.6), 0.01)


class Normed(nn.Module):
    head_hidden_size = 4

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, images):
        return self.norm(images.mean(dim=(2, 3)).repeat(1, 2)[:, :4])


class Loader(list):
    def set_epoch(self, epoch, first=0):
        pass


def _train_rank(rank):
    torch.manual_seed(0)
    task = JointTask(MultiLabelModel(Normed(), SPACE), projection_dim=3)
    task.setup_ema(decay=0.5)
    task.prepare_distributed()
    optimizer_step = OptimizerStep(task, torch.optim.SGD(task.trainable_module.parameters(), lr=0.1))
    fit = Trainer(optimizer_step, CPU, Loader(batches(3, seed=rank)), None, images_per_step=6, seed=0)
    fit.run_epoch(TrainingProgress(0), '')
    return [{name: value.tolist() for name, value in task.get_trainable_module(ema).state_dict().items()}
            for ema in (False, True)]


@pytest.mark.slow
def test_ranks_end_an_epoch_with_the_same_weights_and_batch_norm_statistics():
    first, second = run_ranks(_train_rank, 2)
    assert first == second
    assert any('running_mean' in name for name in first[0])


def test_gradient_checkpointing_and_image_sizes_reach_the_backbone():
    settings = train_settings(*'data --model test_vit --img-size 64 --grad-checkpointing --drop 0.4'.split())
    data = SimpleNamespace(label_space=SPACE, registry=REGISTRY, batch_size=4, pool_batch_size=0)
    model, config = create_model(settings, data, {}, True, print)
    assert model.backbone.grad_checkpointing and model.heads[0].drop.p == 0.4
    assert config['input_size'] == [3, 64, 64] and model(torch.zeros(1, 3, 64, 64))['color'].shape == (1, 3)


def _poisoned_rank(rank):
    """Three steps of which the second is no number on the second rank alone."""
    task, loader = tiny_task(simclr_weight=0), Loader(batches(3, seed=rank))
    task.prepare_distributed()
    optimizer_step = OptimizerStep(task, torch.optim.AdamW(task.trainable_module.parameters(), lr=0.1))
    seen = []

    class Meter(UpdateDecisions):
        def verdicts(self, all_of_them=False):
            found = super().verdicts(all_of_them)
            seen.extend((verdict.step, verdict.bad, verdict.bad_here) for verdict in found)
            return found

    history = [weights(task)]
    task.trainable_module.register_forward_pre_hook(lambda module, inputs: history.append(weights(task)))
    if rank == 1:
        loader[1][0].fill_(math.inf)
    trainer.UpdateDecisions, before = Meter, trainer.UpdateDecisions
    try:
        fit = Trainer(optimizer_step, CPU, loader, None, images_per_step=6, seed=0)
        fit.train(TrainingProgress(0), 0.1, ProgressBar('', 3, False))
    finally:
        trainer.UpdateDecisions = before
    same = [all(torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in pairwise([*history, weights(task)])]
    return seen, same, [weight.tolist() for weight in weights(task)]


@pytest.mark.slow
def test_a_loss_that_is_no_number_on_one_rank_is_skipped_on_all():
    (first, first_same, ours), (second, second_same, theirs) = run_ranks(_poisoned_rank, 2)
    assert first == [(0, False, False), (1, True, False), (2, False, False)]
    assert second == [(0, False, False), (1, True, True), (2, False, False)]
    # The first pair is before the first step: nothing has changed there either.
    assert first_same == second_same == [True, False, True, False]
    assert ours == theirs and all(math.isfinite(value) for weight in ours for value in torch.tensor(weight).flatten())


def _ended_rank(rank):
    """A run whose losses are no numbers on the second rank; its error. NT-Xent would spread them over all ranks."""
    task, loader = tiny_task(simclr_weight=0), Loader(batches(30, seed=rank))
    loader.rows_of = lambda epoch, step: [f'rank {rank} epoch {epoch} step {step}']
    task.prepare_distributed()
    if rank == 1:
        for images, _ in loader:
            images.fill_(math.nan)
    made = OptimizerStep(task, torch.optim.SGD(task.trainable_module.parameters(), lr=0.1), accumulate=1)
    fit = Trainer(made, CPU, loader, None, images_per_step=6, seed=0)
    with pytest.raises(UserError) as error:
        fit.train(TrainingProgress(0), 0.1, ProgressBar('', 30, False))
    return error.value.line


@pytest.mark.slow
def test_too_many_of_them_end_all_ranks_at_the_same_step_with_the_rows_of_the_guilty_one():
    first, second = run_ranks(_ended_rank, 2)
    assert first == second and 'last at step 20 of epoch 1' in first
    assert first.endswith('the rows of that batch: rank 1 epoch 0 step 19')


def test_verdicts_of_a_device_are_read_later_and_all_of_them_at_the_end():
    decisions = UpdateDecisions(torch.device('cpu'))
    decisions.lag = 2  # as on a device that runs behind its host
    good, bad = torch.tensor(True), torch.tensor(False)
    found = []
    for step in range(4):
        decisions.reach(step, bad if step == 1 else good, good, stop=step == 2)
        found.append([verdict.step for verdict in decisions.verdicts()])
    assert found == [[], [], [0], [1]]
    assert [(each.step, each.bad, each.stop) for each in decisions.verdicts(True)] == [(2, False, True),
                                                                                     (3, False, False)]
