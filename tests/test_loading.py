"""Rows -> batches on the device."""
import random

import numpy as np
import pytest
import torch
from common import SPACE
from PIL import Image
from timm.data import Mixup, create_loader

from timm_multilabel import MultiLabelDataset
from timm_multilabel.data.images import FilePhotos
from timm_multilabel.data.table import encode_rows, read_table
from timm_multilabel.errors import UserError
from timm_multilabel.loading.batches import Batches, ImageDataset
from timm_multilabel.loading.loaders import MixedBatches, create_eval_loader, create_train_loader, one_hot
from timm_multilabel.loading.sampling import BatchesInOrder, Draw, ShuffledBatches
from timm_multilabel.losses import dense_cross_entropy
from timm_multilabel.views.opencv import OpenCVViews
from timm_multilabel.views.pillow import PillowViews, eval_views, timm_transform
from timm_multilabel.views.recipe import ViewRecipe

CPU = torch.device('cpu')
PLAIN = {'mean': (0.0, 0.0, 0.0), 'std': (1.0, 1.0, 1.0), 'device': CPU}


def rows(data_dir, split='train'):
    return encode_rows(read_table(data_dir / f'{split}.csv'), SPACE)


def plain(size=(16, 16), count=2):
    views = eval_views(size, 'bilinear', 1.0, 'center')
    return PillowViews(views.transforms * count, size)


def timm_views(count=2):
    return PillowViews([timm_transform((16, 16), auto_augment='rand-m9-mstd0.5')] * count, (16, 16))


def part(data_dir, views, split='train'):
    its = rows(data_dir, split)
    return ImageDataset(its, FilePhotos(its), views)


def loader(data_dir, views=None, count=2, batch=4, workers=0, skip_bad=False, **kwargs):
    its = part(data_dir, views or timm_views(count))
    return create_train_loader(
        [(its.skip_bad() if skip_bad else its, batch)], views=count, seed=7, workers=workers, **PLAIN, **kwargs)


def test_batches_are_view_major_with_targets_repeated(data_dir):
    images, targets = next(iter(loader(data_dir, plain())))
    assert images.shape == (8, 3, 16, 16) and targets.shape == (8, 2)
    assert torch.equal(images[:4], images[4:]) and torch.equal(targets[:4], targets[4:])
    # The pictures are plain, so the label can be seen: blue, green, red are classes 0, 1, 2.
    assert (images[:, [2, 1, 0]].mean(dim=(2, 3)).argmax(1) == targets[:, 0]).all()
    assert 0 <= images.min() and images.max() <= 1


@pytest.mark.parametrize('views', [timm_views(), OpenCVViews([ViewRecipe((16, 16))] * 2)])
def test_two_views_differ_and_draws_do_not_depend_on_workers(data_dir, views):
    batches = [list(loader(data_dir, views, workers=workers)) for workers in (0, 1, 2)]
    for (a, targets_a), (b, targets_b), (c, _) in zip(*batches, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c) and torch.equal(targets_a, targets_b)
        assert not torch.equal(*a.chunk(2))


def test_no_two_draws_of_an_epoch_are_alike():
    """Over ranks, parts and rows: each view has a seed of its own."""
    seeds = [
        draw.seed for part in (0, 1) for rank in (0, 1)
        for batch in ShuffledBatches(500, 50, 7, rank, 2, part=part) for draw in batch]
    assert len(set(seeds)) == len(seeds) == 1000


def test_epochs_differ_and_repeat(data_dir):
    def images(epoch):
        train = loader(data_dir)
        train.set_epoch(epoch)
        return torch.cat([batch for batch, _ in train])
    assert torch.equal(images(3), images(3)) and not torch.equal(images(3), images(4))


def test_drawing_views_leaves_the_main_process_random_state_alone(data_dir):
    dataset = Batches([part(data_dir, timm_views())], 2)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    dataset.__getitems__(next(iter(ShuffledBatches(12, 3, 0))))
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


@pytest.mark.parametrize('ranks', [1, 2, 5])
def test_sampler_shares_are_equal_and_disjoint(ranks):
    shares = [[batch[0].row for batch in ShuffledBatches(12, 1, 0, rank, ranks)] for rank in range(ranks)]
    assert {len(share) for share in shares} == {12 // ranks}
    everything = sum(shares, [])
    assert len(set(everything)) == len(everything) == 12 // ranks * ranks
    assert everything != sorted(everything)


def test_fewer_steps(data_dir):
    assert len(loader(data_dir, batch=4)) == 3
    assert len(list(loader(data_dir, batch=4, steps=2))) == 2


@pytest.mark.parametrize('ranks', [1, 4])
def test_evaluation_counts_every_row_once(data_dir, ranks):
    its = part(data_dir, plain((8, 8), 1), 'val')
    loaders = [create_eval_loader(its, 4, rank=rank, ranks=ranks, workers=0, **PLAIN) for rank in range(ranks)]
    expected = Batches([its], 1).__getitems__([Draw(index, 0) for index in range(6)])[0].float() / 255
    seen = [image for each in loaders for images, _ in each for image in images]
    assert sum(map(len, (BatchesInOrder(6, 4, rank, ranks) for rank in range(ranks)))) == sum(map(len, loaders))
    order = [index for rank in range(ranks) for index in range(rank, 6, ranks)]
    for image, index in zip(seen, order, strict=True):
        torch.testing.assert_close(image, expected[index])


def test_random_erasing_happens_on_the_batch(data_dir):
    images, _ = next(iter(loader(data_dir, plain(), re_prob=1.0, re_mode='const')))
    assert ((images == 0).all(dim=1).flatten(1).sum(1) > 0).all()


@pytest.mark.parametrize('workers', [0, 1])
def test_a_bad_image_is_named_in_one_line(data_dir, workers):
    (data_dir / 'images' / '3.png').write_bytes(b'nothing')
    with pytest.raises(UserError) as error:
        list(loader(data_dir, workers=workers))
    assert error.value.line.startswith(f'{data_dir}/images/3.png ({data_dir}/train.csv row 5): cannot be decoded')


def spoil(path):
    """A JPEG whose header is well and whose end is missing."""
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(image).save(path, 'JPEG')
    path.write_bytes(path.read_bytes()[:700])


@pytest.mark.parametrize('views', [timm_views(), OpenCVViews([ViewRecipe((16, 16))] * 2)])
@pytest.mark.parametrize('workers', [0, 2])
def test_bad_images_are_left_out_and_counted(data_dir, views, workers):
    """Another row takes the place of a bad one, the same whatever the workers; the good rows keep their views."""
    good = list(loader(data_dir, views))
    spoil(data_dir / 'images' / '3.png')
    (data_dir / 'images' / '7.png').write_bytes(b'')
    batches = loader(data_dir, views, workers=workers, skip_bad=True)
    first, second = list(batches), list(batches)
    assert batches.dataset.parts[0].bad.nonzero().flatten().tolist() == [3, 7]
    changed = 0
    for (images, targets), (again, _), (before, targets_before) in zip(first, second, good, strict=True):
        assert torch.equal(images, again)
        same = (images == before).flatten(1).all(dim=1)
        assert torch.equal(targets[same], targets_before[same])
        changed += int((~same).sum())
    assert changed == 4  # two images, two views


def test_a_bad_image_of_the_evaluation_is_not_scored(data_dir):
    spoil(data_dir / 'images' / '14.png')
    its = part(data_dir, plain(count=1), 'val').skip_bad(stand_in=torch.tensor([-1., -1.]))
    targets = torch.cat([targets for _, targets in create_eval_loader(its, 4, workers=0, **PLAIN)])
    expected = rows(data_dir, 'val').targets.clone()
    expected[2] = -1
    assert torch.equal(targets, expected)


def test_an_error_that_no_image_explains_ends_the_run(data_dir):
    class Broken(PillowViews):
        def __call__(self, photos, seeds, out):
            raise UserError('broken')

    with pytest.raises(UserError, match='broken'):
        list(loader(data_dir, Broken(plain().transforms, (16, 16)), skip_bad=True))


def test_all_images_bad_is_an_error(data_dir):
    for path in (data_dir / 'images').iterdir():
        path.write_bytes(b'')
    with pytest.raises(UserError, match='12 of 12 images are bad'):
        list(loader(data_dir, skip_bad=True))


def test_timms_own_loader_takes_the_rows(data_dir):
    dataset = MultiLabelDataset(rows(data_dir), views=2)
    batches = create_loader(
        dataset, (3, 16, 16), 4, is_training=True, num_workers=0, device=CPU, auto_augment='rand-m9-mstd0.5',
        persistent_workers=False, pin_memory=False)
    images, targets = next(iter(batches))
    assert images.shape == (8, 3, 16, 16) and targets.shape == (8, 2)


def test_one_hot_is_all_heads_side_by_side():
    dense = one_hot(torch.tensor([[2, 0], [-1, 1]]), SPACE)
    assert dense.tolist() == [[0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]


@pytest.mark.parametrize('kind', ['mixup_alpha', 'cutmix_alpha'])
def test_mixing_mixes_images_and_every_head_alike(data_dir, kind):
    options = {'mixup_alpha': 0.0, 'cutmix_alpha': 0.0, kind: 1.0}
    mixup = Mixup(**options, label_smoothing=0.0, num_classes=5, multi_label=True)
    clean_batches = loader(data_dir, plain(count=1), count=1)
    for (clean, targets), (images, dense) in zip(
            clean_batches, MixedBatches(clean_batches, mixup, SPACE, seed=0), strict=True):
        labels = one_hot(targets, SPACE)
        share = ((dense - labels.flip(0)) / (labels - labels.flip(0))).nanmean()  # where the partners differ
        torch.testing.assert_close(dense, share * labels + (1 - share) * labels.flip(0))
        torch.testing.assert_close(images.mean(dim=(2, 3)), share * clean.mean(dim=(2, 3))
                                   + (1 - share) * clean.flip(0).mean(dim=(2, 3)), atol=1e-4, rtol=1e-4)
        total, mass = dense_cross_entropy(torch.zeros(4, 3), dense[:, :3], 0.1)
        assert mass.item() == pytest.approx(4) and total.item() == pytest.approx(4 * np.log(3), rel=1e-5)
