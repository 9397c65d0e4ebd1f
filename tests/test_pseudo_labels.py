"""Pseudo-labels: threshold and alignment against plain loops in float64, what they are good for, what they choose."""
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from common import TinyBackbone, tiny_task, train_settings
from torch import nn

from timm_multilabel.assembly.checks import check_phases
from timm_multilabel.assembly.data import read_data
from timm_multilabel.assembly.loaders import create_loaders
from timm_multilabel.assembly.pseudo_labels import RAND_AUGMENT, ema_warms_up
from timm_multilabel.errors import UserError
from timm_multilabel.heads import SoftmaxHead
from timm_multilabel.labels import LabelSet, LabelSpace, Quantity, TagSet
from timm_multilabel.model import MultiLabelModel
from timm_multilabel.pseudo_labels import PseudoLabels
from timm_multilabel.task import JointTask, Pool

SPACE = LabelSpace((
    LabelSet('color', ('blue', 'green', 'red')), TagSet('style', ('x', 'y')), Quantity('price', 0., 1.)))
# Labels are missing unevenly; in the second step no row has a color.
TARGETS = [
    torch.tensor([[0, 1, 0, .5], [2, -1, 1, math.nan], [-1, 0, -1, 1.]]),
    torch.tensor([[-1, 1, 1, 0.], [-1, -1, -1, 1.], [-1, 0, 0, math.nan]]),
]


def outputs(seed, rows):
    """Logits of all heads."""
    generator = torch.Generator().manual_seed(seed)
    return {labels.name: 2 * torch.randn(rows, labels.outputs, generator=generator, dtype=torch.float64)
            for labels in SPACE.heads}


def expected(steps, aligned, tau=0.9):
    """Threshold and aligned probabilities of each head of the last of some steps, by loops over numbers."""
    # Sums and counts on labelled images, then on the pool.
    sums = {name: [[0.] * 3, [0.] * 3, [0.] * 3, [0.] * 3] for name in ('color', 'style')}
    for labelled, target, pool in steps:
        reference = {}
        for name, of_head in sums.items():
            highest, news = [], [[0.] * 3, [0.] * 3, [0.] * 3, [0.] * 3]
            for row, its in zip(labelled[name], target.tolist(), strict=True):
                p = row.softmax(0).tolist() if name == 'color' else row.sigmoid().tolist()
                known = [its[0] != -1] * 3 if name == 'color' else [value != -1 for value in its[1:3]]
                highest += [max(p)] * known[0] if name == 'color' else [
                    max(q, 1 - q) for q, has in zip(p, known, strict=True) if has]
                for c, has in enumerate(known):
                    news[0][c] += p[c] * has
                    news[1][c] += has
            for row in pool[name]:
                for c, q in enumerate((row.softmax(0) if name == 'color' else row.sigmoid()).tolist()):
                    news[2][c] += q
                    news[3][c] += 1
            for value, count in ((0, 1), (2, 3)):
                for c in range(3):
                    if news[count][c]:
                        of_head[value][c] = 0.99 * of_head[value][c] + news[value][c]
                        of_head[count][c] = 0.99 * of_head[count][c] + news[count][c]
            reference[name] = sum(highest) / len(highest) if highest else 1.
    found = {}
    for name, (a, n, b, m) in sums.items():
        p = (pool[name].softmax(1) if name == 'color' else pool[name].sigmoid()).tolist()
        for row in p if aligned else []:
            for c, q in enumerate(row):
                ours, theirs = a[c] / n[c], b[c] / m[c]
                there = q * (ours + 1e-6) / (theirs + 1e-6)
                absent = (1 - q) * (1 - ours + 1e-6) / (1 - theirs + 1e-6)
                row[c] = there if name == 'color' else there / (there + absent)
            row[:] = [q / sum(row) for q in row] if name == 'color' else row
        found[name] = tau * reference[name], torch.tensor(p, dtype=torch.float64)
    return found


@pytest.mark.parametrize('aligned', [True, False])
def test_threshold_alignment_and_loss_of_each_head_against_plain_loops(aligned):
    heads = MultiLabelModel(TinyBackbone(), SPACE).named_heads
    rules = PseudoLabels(heads, 0.9, relative=True, aligned=aligned)
    steps = []
    for seed, target in enumerate(TARGETS):
        labelled, pool, strong = outputs(seed, 3), outputs(10 + seed, 5), outputs(20 + seed, 5)
        steps.append((labelled, target, pool))
        columns = dict(zip(SPACE.names, SPACE.split(target), strict=True))
        made = rules(heads, labelled, columns, pool)
        assert set(made) == {'color', 'style'}  # a number has no distribution
        for name, (threshold, p) in expected(steps, aligned).items():
            weak, found = made[name]
            probabilities = weak.softmax(1) if name == 'color' else weak.sigmoid()
            torch.testing.assert_close(probabilities, p, rtol=1e-10, atol=1e-14)
            assert float(found) == pytest.approx(threshold, rel=1e-10)
            loss, passed = heads[name].pseudo_label_loss(strong[name], weak, found)
            if name == 'color':
                sure = p.amax(1) >= threshold
                losses = F.cross_entropy(strong[name], p.argmax(1), reduction='none') * sure
            else:
                sure = torch.maximum(p, 1 - p) >= threshold
                losses = sure / 2 * F.binary_cross_entropy_with_logits(
                    strong[name], (p > 0.5).double(), reduction='none')
            assert loss.item() == pytest.approx(losses.sum().item(), rel=1e-10)
            assert passed.item() == (sure.sum() / (1 if name == 'color' else 2)).item()
    assert float(made['color'][1]) == 0.9  # no row has a color: the threshold is FixMatch's


def test_a_step_that_is_no_number_leaves_the_means_as_they_were():
    heads = MultiLabelModel(TinyBackbone(), SPACE).named_heads
    rules = PseudoLabels(heads, 0.9, relative=True, aligned=True)
    columns = dict(zip(SPACE.names, SPACE.split(TARGETS[0]), strict=True))
    rules(heads, outputs(0, 3), columns, outputs(1, 5))
    before = {name: value.clone() for name, value in rules.state_dict().items()}
    bad = outputs(2, 5)
    bad['color'][0, 0] = math.nan
    rules(heads, outputs(3, 3), columns, bad)
    assert set(before) == {'sums', 'counts'}
    assert all(torch.equal(value, before[name]) for name, value in rules.state_dict().items())


class Bare(SoftmaxHead):
    """A user's head whose outputs are no logits to add to."""
    kind = 'bare'
    is_logits = False


def test_a_head_that_is_no_logits_has_a_reference_and_no_alignment():
    heads = {'color': Bare(SPACE.heads[0], 6), 'style': MultiLabelModel(TinyBackbone(), SPACE).named_heads['style']}
    columns = dict(zip(SPACE.names, SPACE.split(TARGETS[0]), strict=True))
    pool = outputs(1, 5)
    made = PseudoLabels(heads, 0.9, relative=True, aligned=True)(heads, outputs(0, 3), columns, pool)
    assert made['color'][0] is pool['color'] and float(made['color'][1]) < 0.9
    assert not torch.equal(made['style'][0], pool['style'])


@pytest.mark.parametrize('reference, aligned', [('labelled', True), ('none', False)])
def test_the_ema_sees_labelled_images_where_it_is_to_be_compared_on_them(reference, aligned):
    task = tiny_task(simclr_weight=0, pool=Pool(
        2, pseudo_label_weight=1., pseudo_label_reference=reference, pseudo_label_alignment=aligned))
    task.setup_ema()
    task.train()
    seen = []
    task.get_trainable_module(ema=True).module.model.backbone.register_forward_pre_hook(
        lambda module, inputs: seen.append((module.training, inputs[0])))
    images, target = torch.randn(10, 3, 8, 8), torch.tensor([[0, 1]] * 3 + [[-1, -1]] * 2).repeat(2, 1)
    task(images, target)
    (training, views), = seen
    assert not training and torch.equal(views, images[:5] if aligned else images[3:5])
    # The student sees no more than it learns from: of the pool the second views.
    learnt, module = [], task.trainable_module.model.backbone
    module.register_forward_pre_hook(lambda module, inputs: learnt.append(inputs[0]))
    task(images, target)
    assert torch.equal(learnt[0], torch.cat([images[:3], images[5:]]))
    task.trainable_module.zero_grad()
    task(images, target)['loss'].backward()
    few = [each.grad.clone() for each in task.trainable_module.parameters()]
    task.pool = replace(task.pool, entropy_weight=1e-9)  # a term that needs the first views too
    task.trainable_module.zero_grad()
    task(images, target)['loss'].backward()
    assert len(learnt[-1]) == 10
    for parameter, before in zip(task.trainable_module.parameters(), few, strict=True):
        assert torch.allclose(parameter.grad, before, atol=1e-6)
    assert ('pseudo_labels' in task.get_task_state()) and 'pseudo_labels' not in task.get_task_state(ema=True)


def toy(aligned, ramp_up, steps=150):
    """Four of five images are of the common class. On the pool both classes look more like it than on the 20 labelled
    images: the rare one lies on the boundary. Accuracies of both classes on the pool, in percent.
    """
    class Flat(nn.Module):
        head_hidden_size = 3

        def forward(self, images):
            return images.flatten(1)

    def draw(count, shift):
        rare = (torch.arange(count) >= 0.8 * count).long()
        images = torch.zeros(count, 3, 1, 1)
        images[:, 0, 0, 0] = 2. * rare - 1 + shift + 0.25 * torch.randn(count, generator=generator)
        return images, rare

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    (labelled, known), (pool, hidden) = draw(20, 0.), draw(60, -1.2)
    space = LabelSpace((LabelSet('kind', ('common', 'rare')),))
    task = JointTask(MultiLabelModel(Flat(), space), simclr_weight=0, classification_weight=1, pool=Pool(
        60, pseudo_label_weight=2., pseudo_label_ramp_up=ramp_up, pseudo_label_threshold=0.7,
        pseudo_label_reference='labelled', pseudo_label_alignment=aligned))
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.3)
    weak, target = torch.cat([labelled, pool]), torch.cat([known, -torch.ones(60)])[:, None].repeat(2, 1)
    task.train()
    for step in range(steps):
        task.start_step(step / steps)
        strong = weak.clone()
        strong[:, 0] += 0.1 * torch.randn(80, 1, 1, generator=generator)
        optimizer.zero_grad()
        task(torch.cat([weak, strong]), target)['loss'].backward()
        optimizer.step()
    found = task.get_eval_model()(pool)['kind'].argmax(dim=1)
    return [100 * (found[hidden == c] == c).float().mean().item() for c in (0, 1)]


def test_alignment_finds_a_rare_class_that_pseudo_labels_alone_give_up():
    """ReMixMatch and AdaMatch: predictions of the pool are distributed as those on labelled images."""
    assert toy(aligned=False, ramp_up=0.5) == [100, 0]
    common, rare = toy(aligned=True, ramp_up=0.5)
    assert common == 100 and rare >= 75


def test_the_ramp_keeps_first_guesses_from_becoming_labels():
    """At first no prediction is sure, and so nearly all of them are as sure as those on labelled images."""
    assert toy(aligned=False, ramp_up=0.) == [0, 100]
    task = tiny_task(simclr_weight=0, pool=Pool(2, pseudo_label_weight=1., pseudo_label_ramp_up=4.))
    ramps = []
    for epochs in (0, 1, 2, 4, 9.5):
        task.start_step(epochs)
        ramps.append(task.pseudo_label_ramp)
    assert ramps == pytest.approx([0, 0.5 - 0.5 ** 1.5, 0.5, 1, 1])


PSEUDO = ['-b', '2', '-j', '0', '--unlabelled', 'images', '--labelled-rows', '4', '--pseudo-label-weight', '1']
ALWAYS = {'model_ema': True, 'model_ema_warmup': True, 'weak_first_view': True, 'pseudo_label_ramp_up': 50.0}
VIEWS = {'aa': RAND_AUGMENT, 'scale': [0.8, 1.0], 'reprob': 0.5}


@pytest.mark.parametrize('flags, chosen', [
    (['-wls', '0'], ALWAYS | VIEWS),
    ([], ALWAYS),  # beside NT-Xent the views stay SimCLR's
    (['-wls', '0', '--color-jitter', '0', '--epochs', '5'], ALWAYS | {'pseudo_label_ramp_up': 2.5}),
    (['-wls', '0', '--aa', 'rand-m5', '--no-model-ema', '--pseudo-label-ramp-up', '0'], {'weak_first_view': True}),
    (['-wls', '0', '--no-weak-first-view', '--scale', '0.5', '1', '--reprob', '0', '--pseudo-label-reference', 'none'],
     {'model_ema': True, 'model_ema_warmup': True, 'aa': RAND_AUGMENT}),
])
def test_pseudo_labels_choose_what_no_flag_says(data_dir, flags, chosen):
    settings = train_settings(str(data_dir), *PSEUDO, *flags)
    phase, = check_phases(settings)
    assert phase.chosen == chosen and {name: phase.settings.flat()[name] for name in chosen} == chosen
    assert settings.flat()['model_ema'] is (False if '--no-model-ema' in flags else None)  # as args.yaml has it
    without = {'pseudo_label_weight': 0.0, 'pseudo_label_ramp_up': None, 'pseudo_label_reference': 'labelled'}
    assert not check_phases(settings.replace(**without))[0].chosen


def test_strong_views_and_the_size_of_the_batch(data_dir):
    """Of 18 images 6 are scored and 4 labelled: 8 are left, fewer than 7 times -b."""
    said = []
    settings = check_phases(train_settings(str(data_dir), *PSEUDO, '-wls', '0'))[0].settings
    data = read_data(settings, said.append)
    assert (data.batch_size, data.pool_batch_size, data.steps) == (2, 8, 2)
    assert said[-1].startswith('--unlabelled-batch-size 8: all of the 8 unlabelled images in each step, as they are')
    assert read_data(settings.replace(batch_size=1), said.append).pool_batch_size == 7
    assert said[-1] == '--unlabelled-batch-size 7: 7 times -b, as pseudo-labels have it without SimCLR'
    assert read_data(settings.replace(unlabelled_batch_size=3), said.append).pool_batch_size == 3
    assert read_data(settings.replace(simclr_loss_weight=0.5), said.append).pool_batch_size == 2
    config = {'input_size': (3, 32, 32), 'mean': (0.5,) * 3, 'std': (0.5,) * 3, 'interpolation': 'bilinear',
              'crop_pct': 1.0, 'crop_mode': 'center'}
    train = create_loaders(settings, data, config, 2, torch.device('cpu'), print).train
    for part in train.loader.dataset.parts:  # labelled images and pool alike
        weak, strong = map(repr, part.views.transforms)
        assert 'scale=(0.8, 1.0)' in weak and 'RandAugment' not in weak
        assert 'scale=(0.8, 1.0)' in strong and 'RandAugment(n=2' in strong and 'm=10, mstd=inf' in strong
    assert train.erasing.erase.probability == 0.5 and train.erasing.erase.num_splits == 2  # first views stay whole


def test_the_decay_of_the_ema_warms_up_where_the_run_is_shorter_than_its_memory():
    for flags, updates, expected in (
            (['--model-ema'], 4900, True), (['--model-ema'], 5100, False), ([], 10, False),
            (['--model-ema', '--no-model-ema-warmup'], 10, False), (['--model-ema', '--model-ema-warmup'], 9999, True),
            (['--model-ema', '--model-ema-decay', '0.9'], 11, False)):
        assert ema_warms_up(train_settings('d', *flags).backbone, updates) == expected, flags


@pytest.mark.parametrize('flags, line', [
    (['--no-pseudo-label-alignment'], '--pseudo-label-alignment would change nothing: there is no --pseudo-label-w'),
    (['--pseudo-label-reference', 'none'], '--pseudo-label-reference would change nothing'),
    (['--pseudo-label-ramp-up', '2'], '--pseudo-label-ramp-up would change nothing'),
    (['--pseudo-label-weight', '1', '-wls', '0', '--cache', 'device'], 'the views here are timm; pass --views simclr'),
])
def test_what_is_refused(flags, line):
    with pytest.raises(UserError, match=line):
        check_phases(train_settings('d', *flags))


def test_running_means_are_left_out_where_there_are_none():
    """A run may go on with --pseudo-label-reference none --no-pseudo-label-alignment, and back."""
    heads = MultiLabelModel(TinyBackbone(), SPACE).named_heads
    aligned, plain = (PseudoLabels(heads, 0.9, relative=on, aligned=on) for on in (True, False))
    aligned.sums += 1
    plain.load_state_dict(aligned.state_dict())
    aligned.load_state_dict(plain.state_dict())
    assert not plain.needs_labelled and (aligned.sums == 1).all()
