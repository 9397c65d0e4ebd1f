"""Unlabelled images: where they come from, their batches, their terms of the objective."""
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import run_ranks, tiny_task, train_settings

from timm_multilabel.assembly.data import read_data
from timm_multilabel.assembly.loaders import create_loaders
from timm_multilabel.assembly.views import train_views, view_recipe
from timm_multilabel.data.images import FilePhotos
from timm_multilabel.data.pool import (
    join_rows,
    keep_labels,
    real_paths,
    rows_of_folder,
    rows_of_table,
    split_labelled,
    without_images,
)
from timm_multilabel.data.table import encode_rows, read_table
from timm_multilabel.errors import UserError
from timm_multilabel.labels import LabelSet, LabelSpace, Quantity, TagSet
from timm_multilabel.loading.batches import ImageDataset
from timm_multilabel.loading.loaders import create_train_loader
from timm_multilabel.loading.sampling import JoinedBatches, ShuffledBatches
from timm_multilabel.losses import categorical_entropy, marginal_entropy, nt_xent_loss
from timm_multilabel.task import FeatureTeaching, Pool, Teaching
from timm_multilabel.views.pillow import PillowViews, eval_views
from timm_multilabel.views.recipe import ViewRecipe

SPACE = LabelSpace((LabelSet('color', ('blue', 'green', 'red')), LabelSet('shape', ('disc', 'ring'))))
MIXED = LabelSpace((
    LabelSet('color', ('blue', 'green', 'red')), LabelSet('article', ('a', 'b')), TagSet('style', ('x', 'y')),
    Quantity('price', 10.0, 2.0)))
NAN = float('nan')


def test_rows_of_a_folder_of_a_table_and_of_the_training_table(data_dir):
    found = rows_of_folder(data_dir / 'images', SPACE)
    assert len(found) == 18 and found.targets.unique().tolist() == [-1] and found.where(0) == f'in {data_dir}/images'
    (data_dir / 'pool.csv').write_text('image_path,extra\nimages/3.png,x\nimages/4.png,\n')
    pool = rows_of_table(read_table(data_dir / 'pool.csv'), SPACE)
    (data_dir / 'train.csv').write_text('image_path,color,shape\nimages/3.png,,\nimages/5.png,red,\nimages/6.png,,\n')
    labelled, unlabelled = split_labelled(encode_rows(read_table(data_dir / 'train.csv'), SPACE), SPACE)
    assert [Path(path).name for path in labelled.images] == ['5.png'] and len(unlabelled) == 2
    joined = join_rows([unlabelled, pool, found], SPACE)
    names = [Path(path).name for path in joined.images]
    assert len(names) == len(set(names)) == 18 and names[:3] == ['3.png', '6.png', '4.png']
    assert joined.where(2) == f'{data_dir}/pool.csv row 3' and joined.where(1) == f'{data_dir}/train.csv row 4'
    assert len(without_images(joined, set(real_paths(labelled.images)))) == 17
    assert joined.targets.stride(0) == 0  # the memory of one row


def test_fewer_labels_are_a_part_of_more_and_another_seed_draws_others(data_dir):
    (data_dir / 'train.csv').write_text('image_path,color,shape\n' + ''.join(
        f'images/{number}.png,{"red" if number % 2 else ""},\n' for number in range(12)))
    rows = encode_rows(read_table(data_dir / 'train.csv'), SPACE)
    kept = {(count, seed): set(np.flatnonzero(SPACE.labelled(keep_labels(rows, SPACE, count, seed).targets).any(dim=1)))
            for count in (2, 4, 6) for seed in (0, 1)}
    assert [len(each) for each in kept.values()] == [2, 2, 4, 4, 6, 6]
    assert kept[2, 0] < kept[4, 0] < kept[6, 0] == kept[6, 1] == {1, 3, 5, 7, 9, 11} and kept[4, 0] != kept[4, 1]


@pytest.mark.parametrize('flags, train, pool, steps', [
    (['-wls', '0'], 8, None, 2),  # the others are left out
    (['--unlabelled', 'images'], 8, 4, 2),  # or join the pool (of 18 images 8 are labelled, 6 scored)
    (['--unlabelled', 'images', '-wlc', '0'], 12, None, 3),  # SimCLR alone takes every image
    (['-wls', '0', '--epoch-steps', '7'], 8, None, 7),  # longer than a pass
    (['-wls', '0', '--epoch-steps', '1'], 8, None, 1),
])
def test_labels_of_some_rows_and_steps_of_an_epoch(data_dir, flags, train, pool, steps):
    of_pool = ['--unlabelled-batch-size', '2'] if pool else []
    settings = train_settings(str(data_dir), '-b', '4', *of_pool, '--labelled-rows', '8', *flags)
    data = read_data(settings, lambda line: None)
    assert (len(data.train_rows), data.pool_rows and len(data.pool_rows), data.steps) == (train, pool, steps)


def test_the_first_view_of_a_pair_is_a_weak_one_on_demand(data_dir):
    config = {'input_size': (3, 32, 32), 'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5), 'interpolation': 'bilinear',
              'crop_pct': 1.0, 'crop_mode': 'center'}
    for flags, weak in (([], [False, False]), (['--weak-first-view'], [True, False])):
        args = train_settings(str(data_dir), '-b', '4', '-j', '0', *flags)
        loaders = create_loaders(args, read_data(args, print), config, 2, torch.device('cpu'), print)
        recipes = loaders.train.loader.dataset.parts[0].views.recipes
        assert [recipe.scale == (0.8, 1.0) and not recipe.jitter_prob for recipe in recipes] == weak
    strong = recipes[1]
    assert (strong.scale, strong.jitter, strong.grayscale_prob) == ((0.2, 1.0), (0.4, 0.4, 0.4, 0.1), 0.1)
    assert (strong.jitter_prob, strong.blur_prob) == (0.8, 0.5)
    flags = ['--scale', '0.08', '1', '--color-jitter', '0.8', '0.8', '0.8', '0.2', '--grayscale-prob', '0.2']
    augmentation = train_settings(str(data_dir), *flags).augmentation
    assert view_recipe(augmentation, config) == ViewRecipe((32, 32))  # SimCLR's own
    assert train_views(args, config, 1, weak_first=True).recipes[0].scale == (0.2, 1.0)  # alone it is a strong one


def test_more_labels_than_there_are(data_dir):
    with pytest.raises(UserError, match='--labelled-rows 13: .*train.csv has 12 rows with labels'):
        read_data(train_settings(str(data_dir), '--labelled-rows', '13'), lambda line: None)


def test_a_folder_without_images(tmp_path):
    (tmp_path / 'notes.txt').write_text('')
    with pytest.raises(UserError, match=r'no images in this folder .*\.jpeg.*; passed over: \.txt \(1\)$'):
        rows_of_folder(tmp_path, SPACE)


@pytest.mark.parametrize('ranks', [1, 2, 3])
def test_the_smaller_part_starts_again_reshuffled_and_no_image_comes_twice_in_a_pass(ranks):
    passes = []
    for rank in range(ranks):
        batches = list(ShuffledBatches(13, 2, 0, rank, ranks, steps=7, part=1))
        assert len(batches) == 7 and all(draw.part == 1 for batch in batches for draw in batch)
        per_pass = 13 // ranks // 2
        passes.append([sum(batches[at:at + per_pass], []) for at in range(0, 7, per_pass)])
    for of_ranks in zip(*passes, strict=True):
        seen = [draw.row for draws in of_ranks for draw in draws]
        assert len(seen) == len(set(seen))
    first, second = passes[0][:2]
    assert first[:len(second)] != second[:len(first)] and {d.seed for d in first}.isdisjoint(d.seed for d in second)


def test_parts_draw_apart_and_an_epoch_is_as_long_as_the_shorter():
    labelled, pool = ShuffledBatches(8, 2, 0, steps=3), ShuffledBatches(8, 2, 0, steps=3, part=1)
    joined = JoinedBatches([labelled, pool])
    joined.set_epoch(4)
    batches = list(joined)
    assert len(joined) == len(batches) == 3 and all([d.part for d in batch] == [0, 0, 1, 1] for batch in batches)
    assert [d.row for b in batches for d in b[:2]] != [d.row for b in batches for d in b[2:]]
    assert labelled.epoch == pool.epoch == 4


@pytest.mark.parametrize('workers', [0, 2])
def test_batches_hold_the_pool_last_in_each_view(data_dir, workers):
    plain = eval_views((8, 8), 'bilinear', 1.0, 'center').transforms[0]
    dark = lambda image: plain(image).point(lambda value: value // 2)  # noqa: E731
    rows = encode_rows(read_table(data_dir / 'train.csv'), SPACE)
    pool = rows_of_table(read_table(data_dir / 'val.csv'), SPACE)
    parts = [
        (ImageDataset(rows, FilePhotos(rows), PillowViews([plain, plain], (8, 8))), 4),
        (ImageDataset(pool, FilePhotos(pool), PillowViews([dark, plain], (8, 8))), 2),
    ]
    loader = create_train_loader(
        parts, views=2, seed=0, mean=(0.,) * 3, std=(1.,) * 3, device=torch.device('cpu'), workers=workers, steps=3)
    batches = list(loader)
    assert len(batches) == 3
    for images, targets in batches:
        assert images.shape == (12, 3, 8, 8) and targets.shape == (12, 2)
        first, second = images.chunk(2)
        assert torch.equal(first[:4], second[:4]) and (first[4:] < 0.51 * second[4:].amax()).all()
        assert (targets.chunk(2)[0][:4] >= 0).all() and (targets.chunk(2)[0][4:] == -1).all()


def batch(space=SPACE, labelled=3, pool=2, views=2):
    """Labels are missing unevenly; the pool's targets must not matter, so they are wild."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(views * (labelled + pool), 3, 8, 8, generator=generator)
    if space is SPACE:
        target = torch.tensor([[0, 1], [2, -1], [-1, -1], [1, 1], [2, 0], [0, 0]])[:labelled]
    else:
        target = torch.tensor([
            [0, 1, 1, 0, 0.5], [2, -1, -1, 1, NAN], [-1, -1, -1, -1, NAN], [1, 0, -1, -1, -1.5], [-1, -1, 1, 1, NAN],
            [-1, 0, -1, -1, 2.0]])[:labelled]
    wild = torch.ones(pool, target.shape[1])
    return images, torch.cat([target, wild]).repeat(views, 1)


def test_terms_of_the_pool_by_hand():
    pool = Pool(2, entropy_weight=0.7, marginal_entropy_weight=0.3)
    task = tiny_task(simclr_weight=0.4, classification_weight=0.6, pool=pool, smoothing=0.1)
    images, target = batch()
    result = task(images, target)
    module = task.trainable_module
    features = module.model.backbone(images)
    rows, unlabelled = [0, 1, 2, 5, 6, 7], [3, 4, 8, 9]
    simclr = nt_xent_loss(*module.projector(features).chunk(2), 0.5)
    classification = entropy = marginal = 0
    for head, column in zip(module.model.heads, target[rows].unbind(1), strict=True):
        logits = head(features)
        classification += 0.5 * F.cross_entropy(logits[rows], column.long(), ignore_index=-1, label_smoothing=0.1)
        entropy += 0.5 * categorical_entropy(logits[unlabelled]).mean()
        marginal += 0.5 * marginal_entropy(logits[unlabelled].softmax(1))
    expected = {'simclr': 0.4 * simclr, 'classification': 0.6 * classification, 'entropy': 0.7 * entropy,
                'marginal_entropy': -0.3 * marginal}
    assert task.terms == tuple(expected)
    for term, value in expected.items():
        torch.testing.assert_close(result[f'{term}_loss'], value)
    torch.testing.assert_close(result['loss'], sum(expected.values()))
    assert len(result['output']['color']) == len(result['target']['color']) == 6


def test_entropy_ramps_up_over_epochs():
    task = tiny_task(pool=Pool(2, entropy_weight=1.0, entropy_ramp_up=4))
    losses = []
    for epoch in (0, 1, 4, 9):
        task.start_epoch(epoch)
        losses.append(task(*batch())['entropy_loss'].item())
    assert losses == pytest.approx([0, losses[2] / 4, losses[2], losses[2]]) and losses[2] > 0


@pytest.mark.parametrize('ema', [False, True])
def test_pseudo_labels_come_from_the_first_view_by_the_ema_where_there_is_one(ema):
    task = tiny_task(simclr_weight=0, classification_weight=1,
                     pool=Pool(2, pseudo_label_weight=2.0, pseudo_label_threshold=0.4, pseudo_label_reference='none',
                               pseudo_label_alignment=False))
    assert task.views == 2 and task.trainable_module.projector is None
    model = task.trainable_module.model
    teacher = model
    if ema:
        task.setup_ema(decay=0.5)
        teacher = task.get_trainable_module(ema=True).module.model
        with torch.no_grad():
            for p in teacher.heads.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))
    images, target = batch()
    task.train()
    result = task(images, target)
    total, shares = 0, []
    for name in ('color', 'shape'):
        p = teacher(images[[3, 4]])[name].softmax(1)
        passed = p.amax(1) >= 0.4
        losses = F.cross_entropy(model(images[[8, 9]])[name], p.argmax(1), reduction='none')
        total = total + 0.5 * (losses * passed).sum() / 2
        shares.append(passed.float().mean())
    torch.testing.assert_close(result['pseudo_label_loss'], 2 * total)
    torch.testing.assert_close(result['pseudo_label_shares'], torch.stack(shares))
    assert not ema or not teacher.training


def test_first_view_only_still_minimises_entropy_on_both():
    images, target = batch()
    pool = Pool(2, entropy_weight=1.0)
    both, first = tiny_task(pool=pool)(images, target), tiny_task(pool=pool, first_view_only=True)(images, target)
    assert len(first['output']['color']) == 3
    torch.testing.assert_close(both['entropy_loss'], first['entropy_loss'])


def test_terms_without_a_pool_are_refused():
    with pytest.raises(ValueError, match='there are none'):
        Pool(entropy_weight=1.0)


TERMS = {'entropy_weight': 0.3, 'marginal_entropy_weight': 0.2, 'pseudo_label_weight': 0.5,
         'pseudo_label_threshold': 0.95, 'pseudo_label_reference': 'labelled', 'pseudo_label_alignment': True}
OPTIONS = {
    'article': {'loss': 'arcface', 'input': 'projection', 'scale': 4.0}, 'color': {'class_weights': [1., 3., 2.]}}


def _colors(images):
    """What a teacher of features gives."""
    return images.mean(dim=(2, 3))


TAUGHT = {'teaching': Teaching(MIXED.names, 0.8, 2.0), 'feature_teaching': FeatureTeaching(3, _colors)}


def taught_batch():
    """A batch with what a teacher says of every head after the targets."""
    images, target = batch(MIXED, labelled=6, pool=4)
    answers = torch.randn(10, sum(MIXED.sizes), generator=torch.Generator().manual_seed(4))
    return images, torch.cat([target, answers.repeat(2, 1)], dim=1)


def _take(views, rank, ranks, labelled, pool):
    """A rank's labelled and unlabelled part of a view-major batch."""
    parts = []
    for view in views.chunk(2):
        parts += [view[:labelled].chunk(ranks)[rank], view[labelled:].chunk(ranks)[rank]]
    return torch.cat(parts)


def _rank(rank):
    ranks = torch.distributed.get_world_size()
    task = tiny_task(space=MIXED, dtype=torch.float64, head_options=OPTIONS, pool=Pool(4 // ranks, **TERMS), **TAUGHT)
    task.prepare_distributed()
    images, target = taught_batch()
    losses = []
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.1)
    for _ in range(2):
        result = task(_take(images.double(), rank, ranks, 6, 4), _take(target, rank, ranks, 6, 4))
        optimizer.zero_grad()
        result['loss'].backward()
        optimizer.step()
        losses.append({term: result[f'{term}_loss'].item() for term in task.terms})
    means = {name: value.tolist() for name, value in task.pseudo_labels.state_dict().items()}
    return losses, {name: p.tolist() for name, p in task.trainable_module.module.named_parameters()}, means


@pytest.mark.slow
def test_two_ranks_train_every_kind_of_head_and_term_as_one_process():
    """Labels are missing unevenly: the first rank has two of the three prices, the second most of the tags."""
    task = tiny_task(space=MIXED, dtype=torch.float64, head_options=OPTIONS, pool=Pool(4, **TERMS), **TAUGHT)
    images, target = taught_batch()
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.1)
    expected = []
    for _ in range(2):
        result = task(images.double(), target)
        optimizer.zero_grad()
        result['loss'].backward()
        optimizer.step()
        expected.append({term: result[f'{term}_loss'].item() for term in task.terms})
    assert set(expected[0]) == {'simclr', 'classification', 'entropy', 'marginal_entropy', 'pseudo_label', 'teacher',
                                'teacher_features'}
    assert all(value for value in expected[0].values())
    results = run_ranks(_rank, 2)
    for step in range(2):
        for term, value in expected[step].items():
            assert np.mean([losses[step][term] for losses, *_ in results]) == pytest.approx(value, rel=1e-9), term
    assert results[0][2] == results[1][2]  # the running means of pseudo-labels
    for name, value in task.pseudo_labels.state_dict().items():
        np.testing.assert_allclose(results[0][2][name], value, rtol=1e-9)
    for _, weights, _ in results:
        for name, p in task.trainable_module.named_parameters():
            torch.testing.assert_close(torch.tensor(weights[name], dtype=torch.float64), p.detach(),
                                       rtol=1e-9, atol=1e-12, msg=name)


def test_frozen_backbone_keeps_weights_and_statistics():
    from test_trainer import Normed

    from timm_multilabel.model import MultiLabelModel
    from timm_multilabel.task import JointTask
    task = JointTask(MultiLabelModel(Normed(), SPACE), simclr_weight=0, classification_weight=1, freeze_backbone=True)
    before = {name: value.clone() for name, value in task.trainable_module.state_dict().items()}
    task.train()
    assert not task.trainable_module.model.backbone.training and task.trainable_module.model.heads.training
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.1)
    images, target = batch(pool=0, views=1)
    task(images, target)['loss'].backward()
    optimizer.step()
    for name, value in task.trainable_module.state_dict().items():
        assert torch.equal(value, before[name]) == ('backbone' in name), name
    with pytest.raises(ValueError, match='frozen'):
        JointTask(MultiLabelModel(Normed(), SPACE), freeze_backbone=True)


def test_a_link_to_a_folder_is_the_folder(data_dir, tmp_path):
    (tmp_path / 'link').symlink_to(data_dir / 'images')
    there, linked = rows_of_folder(data_dir / 'images', SPACE), rows_of_folder(tmp_path / 'link', SPACE)
    assert len(linked) == len(join_rows([there, linked], SPACE)) == 18
    assert not len(without_images(linked, set(real_paths(there.images))))


@pytest.mark.parametrize('compiled', [False, True])
def test_frozen_means_the_projector_and_a_compiled_model_too(compiled):
    options = {'color': {'input': 'projection'}}
    task = tiny_task(simclr_weight=0, classification_weight=1, freeze_backbone=True, head_options=options)
    if compiled:
        task.compile(backend='eager')
    task.train()
    model = task.get_eval_model(task.get_trainable_module())
    assert not model.backbone.training and model.heads.training
    assert {name.split('.')[0] for name, p in model.named_parameters() if p.requires_grad} == {'heads'}


@pytest.mark.slow
@pytest.mark.parametrize('kwargs', [
    {'pool': Pool(2, **TERMS)}, {'simclr_weight': 0, 'freeze_backbone': True, 'pool': Pool(2, entropy_weight=1.0)}],
    ids=['pool', 'frozen'])
def test_compiled_terms_are_the_same(kwargs):
    expected, task = tiny_task(space=MIXED, **kwargs), tiny_task(space=MIXED, **kwargs)
    task.compile(backend='eager')
    images, target = batch(MIXED, views=task.views)
    mine, theirs = task(images, target), expected(images, target)
    for term in task.terms:
        torch.testing.assert_close(mine[f'{term}_loss'], theirs[f'{term}_loss'])
    mine['loss'].backward()
    theirs['loss'].backward()
    for a, b in zip(task.trainable_module.parameters(), expected.trainable_module.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)
