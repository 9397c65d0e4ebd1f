"""Heads that learn from plain views only: what loaders tell of a view, what the step makes of it, what is refused."""
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import (
    assert_same_weights,
    run_ranks,
    tiny_task,
    train_run,
    train_settings,
    write_data,
)
from torch.nn.functional import cross_entropy

from timm_multilabel.assembly.checks import check_phases
from timm_multilabel.assembly.plain_views import check_plain_views
from timm_multilabel.assembly.views import train_views
from timm_multilabel.cli.main import run_command
from timm_multilabel.data.images import DecodedPhoto
from timm_multilabel.data.packing import pack
from timm_multilabel.data.table import read_table
from timm_multilabel.errors import UserError
from timm_multilabel.labels import LabelSet, LabelSpace, Quantity, TagSet
from timm_multilabel.losses import distillation_loss
from timm_multilabel.task import Pool, Teaching
from timm_multilabel.views.device import make_drawn, make_views
from timm_multilabel.views.opencv import OpenCVViews
from timm_multilabel.views.recipe import ViewRecipe, draw, weak_recipe
from timm_multilabel.views.told import PARAMETERS, Told

NAN = float('nan')
CONFIG = {'input_size': (3, 32, 32), 'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5)}
GEOMETRY = {'jitter_prob': 0.0, 'grayscale_prob': 0.0, 'blur_prob': 0.0}


def told_of(recipe, pixels, count=200):
    """Views of an image (H, W, 3) by the host and by the device, float64 (N, h, w, 3), and what is told of them."""
    views, told = np.empty((1, count, *recipe.size, 3), np.uint8), Told(plain=True, parameters=True)
    columns = OpenCVViews([recipe], told)([DecodedPhoto(pixels)] * count, range(count), views)
    images = torch.from_numpy(pixels).permute(0, 2, 1).expand(count, -1, -1, -1)
    sizes = torch.tensor([pixels.shape[:2]] * count)
    device = make_views(recipe, images, sizes, sizes, torch.arange(count), 0).permute(0, 2, 3, 1)
    assert columns.shape == (1, count, told.width)
    _, plain, parameters = told.split(columns[0])
    return views[0].astype(float), device.double().numpy(), plain.numpy(), parameters.double().numpy()


def test_crops_and_flips_are_those_that_were_told():
    """Of an image whose red is the row, and whose green is the column, of each pixel."""
    row, column = np.mgrid[:100, :200]
    pixels = np.stack([2 * row, column, np.zeros_like(row)], axis=2).astype(np.uint8)
    host, device, _, drawn = told_of(ViewRecipe((32, 32), vflip=0.5, **GEOMETRY), pixels, 60)
    for views in (host, device):
        places = views / [200, 200, 1]  # shares of the height and of the width
        np.testing.assert_allclose(places[..., :2].mean(axis=(1, 2)), drawn[:, :2], atol=0.01)
        steps = places[:, 1:, :, 0].mean(axis=(1, 2)) - places[:, :-1, :, 0].mean(axis=(1, 2))
        np.testing.assert_allclose(32 * steps, drawn[:, 2] * (1 - 2 * drawn[:, 5]), atol=0.03)
        steps = places[:, :, 1:, 1].mean(axis=(1, 2)) - places[:, :, :-1, 1].mean(axis=(1, 2))
        np.testing.assert_allclose(32 * steps, drawn[:, 3] * (1 - 2 * drawn[:, 4]), atol=0.03)
        assert 0.3 < drawn[:, 4].mean() < 0.7 and 0.3 < drawn[:, 5].mean() < 0.7


def test_colors_are_those_that_were_told():
    """Of an image of one color: jitter by each factor alone, grayscale, and which views are plain."""
    pixels = np.full((40, 40, 3), (120, 80, 60), np.uint8)
    gray = 0.299 * 120 + 0.587 * 80 + 0.114 * 60
    for place, factor in ((7, 0), (9, 2)):
        jitter = [0.5 * (each == factor) for each in range(4)]
        recipe = ViewRecipe((16, 16), jitter=tuple(jitter), grayscale_prob=0.3, blur_prob=0.0)
        host, device, plain, drawn = told_of(recipe, pixels)
        for views in (host, device):
            means, scale = views.mean(axis=(1, 2)), 1 + drawn[:, [place]]
            expected = np.array([[120, 80, 60]]) * scale if factor == 0 else gray + scale * (
                np.array([[120, 80, 60]]) - gray)
            expected = np.where(drawn[:, [11]], expected @ [[0.299], [0.587], [0.114]], expected)
            np.testing.assert_allclose(means, expected, atol=1.5)
        assert np.array_equal(plain, (drawn[:, 7:12] == 0).all(axis=1))
        assert abs(plain.mean() - recipe.plain_share) < 0.06 and recipe.plain_share == pytest.approx(0.2 * 0.7)
    sharp = np.zeros((40, 40, 3), np.uint8)
    sharp[:, 20:] = 200
    host, _, plain, drawn = told_of(ViewRecipe((40, 40), scale=(1, 1), ratio=(1, 1), jitter_prob=0, grayscale_prob=0,
                                               blur_sigma=(0.5, 2.0)), sharp)
    edges = np.abs(np.diff(host[..., 0], axis=2)).max(axis=(1, 2))
    assert plain.all() and (edges[drawn[:, 12] == 0] == 200).all() and (edges[drawn[:, 12] > 0] < 190).all()
    assert ((0.5 <= drawn[:, 12]) | (drawn[:, 12] == 0)).all()


def test_nothing_is_told_where_nobody_asks():
    recipe = ViewRecipe((8, 8))
    views = np.empty((2, 1, 8, 8, 3), np.uint8)
    assert OpenCVViews([recipe, recipe])([DecodedPhoto(np.zeros((9, 9, 3), np.uint8))], [0], views) is None
    target = torch.ones(2, 3)
    assert Told().split(target) == (target, None, None) and Told().width == 0
    assert weak_recipe((8, 8)).plain_share == 1 and ViewRecipe((8, 8), jitter=(0, 0, 0, 0)).plain_share == 0.8


MIXED = LabelSpace((
    LabelSet('color', ('blue', 'green', 'red')), LabelSet('article', ('a', 'b')), TagSet('style', ('x', 'y')),
    Quantity('price', 10.0, 2.0)))
OPTIONS = {
    'color': {'class_weights': [1., 3., 2.], 'views': 'plain'}, 'style': {'views': 'plain'},
    'price': {'views': 'plain'}}
IS_PLAIN = torch.tensor([1, 0, 1, 0, 0, 1, 0, 1, 1, 0] + [0, 1, 1, 0, 0, 1, 0, 1, 0, 1]).bool()
"""Of two views of ten images, the last four of the pool; of the second image no view is plain."""


def batch(taught=True, drawn=False):
    """Images (20, 3, 8, 8) and targets: labels, missing unevenly, answers of a teacher, and what is told."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(20, 3, 8, 8, generator=generator, dtype=torch.float64)
    target = torch.tensor([
        [0, 1, 1, 0, 0.5], [2, -1, -1, 1, NAN], [-1, -1, -1, -1, NAN], [1, 0, -1, -1, -1.5], [-1, -1, 1, 1, NAN],
        [1, 0, -1, -1, 2.0], *[[1, 1, 1, 1, 1]] * 4], dtype=torch.float64).repeat(2, 1)
    answers = torch.randn(10, 6, generator=generator, dtype=torch.float64).repeat(2, 1)
    parameters = torch.rand(20, PARAMETERS, generator=generator, dtype=torch.float64)
    return images, torch.cat([target, *[answers] * taught, IS_PLAIN[:, None].double(), *[parameters] * drawn], dim=1)


ALL = {
    'space': MIXED, 'head_options': OPTIONS, 'dtype': torch.float64, 'smoothing': 0.1,
    'teaching': Teaching(('article', 'color', 'price'), 0.8, 2.0)}
TERMS = {'pseudo_label_weight': 0.5, 'pseudo_label_threshold': 0.4}


@pytest.mark.parametrize('first_view_only', [False, True])
def test_the_loss_is_the_mean_over_labels_of_plain_views(first_view_only):
    """By hand, for class weights, tags, numbers, missing labels, soft labels and pseudo-labels."""
    task = tiny_task(pool=Pool(4, **TERMS), first_view_only=first_view_only, **ALL)
    assert task.told == Told(plain=True)
    images, target = batch()
    result = task(images, target)
    model = task.joint_module.model
    color, article, style, price = model(images).values()
    labelled = torch.arange(20) % 10 < 6
    labelled &= (torch.arange(20) < 10) | (not first_view_only)
    plain = labelled & IS_PLAIN
    weights = torch.tensor([1., 3., 2.], dtype=torch.float64)
    expected = [
        cross_entropy(color[plain], target[plain, 0].long(), weights, ignore_index=-1, label_smoothing=0.1),
        cross_entropy(article[labelled], target[labelled, 1].long(), ignore_index=-1, label_smoothing=0.1)]
    known = plain[:, None] & (target[:, 2:4] >= 0)
    smoothed = 0.9 * target[:, 2:4] + 0.05
    expected.append(F.binary_cross_entropy_with_logits(style[known], smoothed[known]))
    known = plain & ~target[:, 4].isnan()
    expected.append(F.smooth_l1_loss(price[known], target[known, 4]))
    torch.testing.assert_close(result['head_losses'], torch.stack(expected))

    taught = (F.smooth_l1_loss(price[IS_PLAIN], target[IS_PLAIN, 5 + 5]),  # answers: article, color, price
              distillation_loss(article, target[:, 5:7], 2.0).mean(),
              distillation_loss(color[IS_PLAIN], target[IS_PLAIN, 7:10], 2.0).mean())
    torch.testing.assert_close(result['teacher_loss'], 0.8 * sum(taught) / 4)

    pseudo, learnt = 0, IS_PLAIN[16:]
    for logits, all_views in ((color, False), (article, True)):
        sure, label = logits[6:10].detach().softmax(1).max(1)
        losses = cross_entropy(logits[16:], label, reduction='none') * (sure >= 0.4)
        pseudo += losses.mean() if all_views else losses[learnt].mean()
    sure = style[6:10].detach().sigmoid()
    losses = F.binary_cross_entropy_with_logits(style[16:], (sure > 0.5).double(), reduction='none')
    pseudo += (losses * (torch.maximum(sure, 1 - sure) >= 0.4))[learnt].mean()
    torch.testing.assert_close(result['pseudo_label_loss'], 0.5 * pseudo / 4)
    assert result['pseudo_label_shares'][0] == (color[6:10].softmax(1).max(1).values >= 0.4)[learnt].double().mean()


def test_views_that_are_not_plain_do_not_move_such_a_head():
    """Neither by labels nor by soft labels; without a plain view in the step its loss is 0."""
    task = tiny_task(**ALL)
    images, target = batch()
    target[:, -1] = 0
    result = task(images, target)
    result['loss'].backward()
    heads = task.joint_module.model.named_heads
    assert result['head_losses'][0] == result['head_losses'][3] == 0 and result['head_losses'][1] > 0
    assert not heads['color'].fc.weight.grad.any() and not heads['style'].fc.weight.grad.any()
    assert heads['article'].fc.weight.grad.any()


def test_heads_that_are_computed_together_are_as_each_by_itself():
    space = LabelSpace(tuple(LabelSet(name, ('x', 'y', 'z')) for name in 'abc'))
    images, _ = batch()
    target = torch.cat([torch.arange(60).view(20, 3) % 3, IS_PLAIN[:, None]], dim=1).double()
    teaching = Teaching(('a', 'b', 'c'))
    answers = torch.rand(20, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log()
    target = torch.cat([target[:, :3], answers, target[:, 3:]], dim=1)
    options = {'a': {'views': 'plain'}, 'c': {'views': 'plain'}}
    results = []
    for drop in (0.0, 1e-9):  # dropout has each head run by itself
        task = tiny_task(space=space, head_options=options, dtype=torch.float64, drop=drop, teaching=teaching)
        if drop:
            task._groups, task._taught_groups = [], []
        results.append(task(images, target))
    for name in ('head_losses', 'teacher_loss', 'loss'):
        torch.testing.assert_close(results[0][name], results[1][name])


def test_targets_without_what_is_told_are_an_error():
    with pytest.raises(ValueError, match='targets have 5 columns, and this task needs 1 more'):
        tiny_task(**{**ALL, 'teaching': None})(*(part[:, :5] if part.ndim == 2 else part for part in batch()))


@pytest.mark.parametrize('size', [1, 4])
def test_pieces_of_a_batch_are_told_of_their_views(size):
    settings = {**ALL, 'pool': Pool(4, **TERMS), 'condition_projector': True}
    tasks = [tiny_task(micro_batch=each, **settings) for each in (size, None)]
    results = [task(*batch(drawn=True)) for task in tasks]
    for result in results:
        result['loss'].backward()
    torch.testing.assert_close(results[0]['loss'], results[1]['loss'])
    for mine, theirs in zip(*(task.trainable_module.parameters() for task in tasks), strict=True):
        assert theirs.grad.any()
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-12)


def _rank(rank):
    task = tiny_task(pool=Pool(2, **TERMS), condition_projector=True, **ALL)
    task.prepare_distributed()
    parts = []
    for rows in batch(drawn=True):
        views = [[view[:6].chunk(2)[rank], view[6:].chunk(2)[rank]] for view in rows.chunk(2)]
        parts.append(torch.cat(sum(views, [])))
    result = task(*parts)
    result['loss'].backward()
    return {term: result[f'{term}_loss'].item() for term in task.terms}, {
        name: p.grad.tolist() for name, p in task.trainable_module.module.named_parameters()}


@pytest.mark.slow
def test_two_ranks_are_one_process():
    """Plain views are spread unevenly: in the first rank 8 of 10, in the second 2."""
    task = tiny_task(pool=Pool(4, **TERMS), condition_projector=True, **ALL)
    result = task(*batch(drawn=True))
    result['loss'].backward()
    results = run_ranks(_rank, 2)
    for term in task.terms:
        expected = result[f'{term}_loss'].item()
        assert np.mean([losses[term] for losses, _ in results]) == pytest.approx(expected, rel=1e-9)
    for _, gradients in results:
        for name, p in task.trainable_module.named_parameters():
            torch.testing.assert_close(torch.tensor(gradients[name], dtype=torch.float64), p.grad, rtol=1e-8,
                                       atol=1e-12, msg=name)


def _photos(count, seed):
    """Noisy photos (N, 12, 3, 12) of eight hues, and which one each has."""
    generator = torch.Generator().manual_seed(seed)
    hue = torch.arange(count) % 8
    angle = (hue + 0.5 * torch.rand(count, generator=generator) - 0.25) * torch.pi / 4
    color = 127 + 90 * torch.stack([torch.cos(angle - turn * 2 * torch.pi / 3) for turn in range(3)], dim=1)
    noise = 25 * torch.randn(count, 12, 3, 12, generator=generator)
    return (color[:, None, :, None] + noise).clamp(0, 255).to(torch.uint8), hue


def _learn_hues(views):
    """Top-1, on photos as they are, of a head that learnt 150 steps from views of heavy jitter."""
    space = LabelSpace((LabelSet('color', tuple('01234567')),))
    (photos, hue), (others, truth) = _photos(512, 1), _photos(512, 2)
    recipe = ViewRecipe((8, 8), scale=(0.5, 1.0), jitter=(0.8, 0.8, 0.8, 0.5))
    task = tiny_task(space=space, simclr_weight=0, smoothing=0.0, head_options={'color': {'views': views}})
    optimizer = torch.optim.Adam(task.parameters(), lr=0.03)
    generator, sizes = torch.Generator().manual_seed(3), torch.full((64, 2), 12)
    for step in range(150):
        rows, seeds = torch.randint(512, (64,), generator=generator), torch.arange(64) + 64 * step
        draws = draw(recipe, seeds, *sizes.unbind(1))
        told = task.told.of(draws, *sizes.unbind(1)) if task.told else torch.empty(64, 0)
        made = make_drawn(recipe, photos[rows], sizes, sizes, draws) / 127.5 - 1
        optimizer.zero_grad()
        task(made, torch.cat([hue[rows, None], told], dim=1))['loss'].backward()
        optimizer.step()
    whole = others.permute(0, 2, 1, 3)[..., 2:10, 2:10].float() / 127.5 - 1
    with torch.no_grad():
        predicted = task.get_eval_model()(whole)['color'].argmax(dim=1)
    return (predicted == truth).float().mean().item()


@pytest.mark.slow
def test_a_head_of_colors_learns_them_in_spite_of_jitter():
    """Hues as labels, and a jitter of all hues: 100 % with plain views, 62 % with all, in as many steps."""
    assert _learn_hues('plain') > 0.97 and _learn_hues('all') < 0.8


def said(*flags, heads=('color',)):
    """What is said of a run's plain views."""
    settings, lines = train_settings('data', *flags), []
    check_phases(settings)
    count = 2 if settings.objective.simclr_loss_weight or settings.pool.pseudo_label_weight else 1
    views = train_views(settings, CONFIG, count, settings.augmentation.weak_first_view, Told(plain=True))
    check_plain_views(settings, heads, views, lines.append)
    return lines


@pytest.mark.parametrize(('flags', 'share'), [
    ([], '18'),
    (['--color-jitter-prob', '0.5', '--grayscale-prob', '0'], '50'),
    (['--weak-first-view'], '59'),
    (['--weak-first-view', '--classify-views', 'first'], '100'),
    (['--weak-first-view', '--aa', 'rand-m9'], '50'),
    (['-wls', '0', '--views', 'simclr', '--color-jitter', '0'], '90'),
    (['-wls', '0', '--color-jitter', '0'], '100'),
    (['--views', 'simclr-exact', '--weak-first-view'], '50'),
])
def test_the_share_of_plain_views_is_told(flags, share):
    line, = said(*flags)
    assert line == (f'views=plain of color: {share} % of the labelled views keep their colors (no color jitter, no '
                    'grayscale); learns from these only')


@pytest.mark.parametrize(('flags', 'reason'), [
    (['--color-jitter-prob', '1'], 'no view keeps its colors; lower --color-jitter-prob or --grayscale-prob, whichever '
     'is 1, or pass --weak-first-view'),
    (['-wls', '0'], 'no view keeps its colors; what --views timm did to a view is not known; pass --views simclr'),
    (['--aa', 'rand-m9'], 'no view keeps its colors; what --aa rand-m9 did to a view is not known; leave it out, with '
     '--views simclr, or pass --weak-first-view'),
    (['-wls', '0', '--cutmix', '1'], '--mixup and --cutmix make one picture of two views; leave one of them out'),
    (['--entropy-weight', '1', '--unlabelled', 'x'], '--entropy-weight and --marginal-entropy-weight have heads learn '
     'from all views; leave one of them out'),
])
def test_what_is_refused(flags, reason):
    with pytest.raises(UserError) as error:
        said(*flags)
    assert error.value.line == f'--head color:views=plain: {reason}'


@pytest.mark.slow
def test_a_run_and_its_resumption(tmp_path, capsys):
    """Also with images on the device, and of shards; a checkpoint starts another run without the option."""
    data = write_data(tmp_path / 'data')
    flags = ['--head', 'color:views=plain', '--condition-projector', '--projector-layers', '3',
             '--projector-width', '8']
    run = train_run(data, tmp_path / 'a', *flags)
    out = capsys.readouterr().out
    assert 'views=plain of color: 18 % of the labelled views keep their colors' in out
    again = Path(shutil.copytree(run, tmp_path / 'b' / 'run'))
    for name in ('last', 'checkpoint-1', 'model_best'):
        (again / f'{name}.pth.tar').unlink()
    train_run(data, tmp_path / 'b', *flags, '--resume', 'auto')
    assert_same_weights(run / 'last.pth.tar', again / 'last.pth.tar')
    state = torch.load(run / 'last.pth.tar', weights_only=True)
    assert (state['condition_projector'], state['projector_layers'], state['projector_width']) == (True, 3, 8)
    assert state['head_options']['color']['views'] == 'plain' and 'views' not in state['head_options']['shape']
    assert {name.split('.')[0] for name in state['task_state']['projector']} == {'embed', 'project'}

    (tmp_path / 'shards').mkdir()
    for split in ('train', 'val'):
        pack(read_table(data / f'{split}.csv'), tmp_path / 'shards', split, 'webdataset', size=6)
    train_run(tmp_path / 'shards', tmp_path / 'c', *flags, epochs=1)
    train_run(data, tmp_path / 'd', *flags, '--cache', 'device', epochs=1)
    capsys.readouterr()
    train_run(data, tmp_path / 'e', '--initial-checkpoint', str(run / 'last.pth.tar'), epochs=1)
    out = capsys.readouterr().out
    assert "took backbone, head 'color', head 'shape' (plain weights); starts anew: projector" in out
    with pytest.raises(SystemExit):
        run_command('embed', 'timm-multilabel embed', [
            str(run / 'last.pth.tar'), str(data / 'images'), '--what', 'projections', '--out', str(tmp_path / 'x.npz')])
    assert 'is told what was drawn of each view (--condition-projector)' in capsys.readouterr().err
