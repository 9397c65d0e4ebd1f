"""Views and batches."""
import random

import numpy as np
import pytest
import torch
from common import SPACE
from PIL import Image
from timm.data import Mixup

from timm_multilabel.data.loaders import (
    MixedBatches,
    MultiLabelDataset,
    ShuffledBatches,
    create_eval_loader,
    create_train_loader,
    one_hot,
)
from timm_multilabel.data.table import encode_rows, read_table
from timm_multilabel.data.views import eval_view, simclr_view, timm_view
from timm_multilabel.errors import UserError
from timm_multilabel.losses import dense_cross_entropy

CPU = torch.device('cpu')
PLAIN = {'mean': (0.0, 0.0, 0.0), 'std': (1.0, 1.0, 1.0), 'device': CPU}


def rows(data_dir, split='train'):
    return encode_rows(read_table(data_dir / f'{split}.csv'), SPACE)


def loader(data_dir, view=None, views=2, batch=4, workers=0, **kwargs):
    dataset = MultiLabelDataset(rows(data_dir), view or timm_view((16, 16), auto_augment='rand-m9-mstd0.5'), views)
    return create_train_loader(dataset, batch, seed=7, workers=workers, **PLAIN, **kwargs)


@pytest.mark.parametrize('view', [
    timm_view((16, 24), auto_augment='rand-m9-mstd0.5'),
    simclr_view((16, 24)),
    eval_view((16, 24), 'bicubic', 0.9, 'center'),
])
def test_views_are_uint8_images_of_the_size(view):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    made = view(image)
    assert made.dtype == torch.uint8 and made.shape == (3, 16, 24)


def test_simclr_recipe():
    """Rates over many draws: flip 0.5, grayscale 0.2."""
    left_red = Image.fromarray(np.repeat([[[200, 60, 20]] * 16 + [[20, 60, 200]] * 16], 32, axis=0).astype(np.uint8))
    view = simclr_view((8, 8), strength=0.0, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    random.seed(0), torch.manual_seed(0), np.random.seed(0)
    made = torch.stack([view(left_red) for _ in range(600)]).float()
    grey = (made[:, 0] - made[:, 2]).abs().amax(dim=(1, 2)) == 0
    flipped = made[~grey, 0, :, 0].mean(1) < made[~grey, 0, :, -1].mean(1)
    assert grey.float().mean().item() == pytest.approx(0.2, abs=0.05)
    assert flipped.float().mean().item() == pytest.approx(0.5, abs=0.07)


def drawn(view, image, count=40):
    random.seed(0), torch.manual_seed(0), np.random.seed(0)
    return torch.stack([view(image) for _ in range(count)]).float()


def test_simclr_jitter_and_blur_and_crop():
    """Each alone: what it changes, and in about the share of views that the paper says (0.8, 0.5, always)."""
    whole = {'scale': (1.0, 1.0), 'ratio': (1.0, 1.0), 'hflip': 0.0, 'interpolation': 'bilinear'}
    plain = Image.new('RGB', (32, 32), (200, 60, 20))
    jittered = (drawn(simclr_view((32, 32), **whole), plain)[:, :, 0, 0] != torch.tensor([200, 60, 20])).any(1)
    assert jittered.float().mean().item() == pytest.approx(0.84, abs=0.1)  # jitter or grayscale
    dots = Image.fromarray(np.indices((40, 40)).sum(0).astype(np.uint8) % 2 * 255).convert('RGB')
    spread = drawn(simclr_view((40, 40), strength=0.0, **whole), dots).std(dim=(1, 2, 3))
    assert (spread < 120).float().mean().item() == pytest.approx(0.5, abs=0.2)
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None].repeat(256, 0)).convert('RGB')
    widths = drawn(simclr_view((16, 16), strength=0.0, hflip=0.0), ramp, 200).amax(dim=(1, 2, 3)) - drawn(
        simclr_view((16, 16), strength=0.0, hflip=0.0), ramp, 200).amin(dim=(1, 2, 3))
    assert widths.min() < 90 and widths.max() > 230


def test_batches_are_view_major_with_targets_repeated(data_dir):
    images, targets = next(iter(loader(data_dir, view=eval_view((16, 16), 'bilinear', 1.0, 'center'))))
    assert images.shape == (8, 3, 16, 16) and targets.shape == (8, 2)
    assert torch.equal(images[:4], images[4:]) and torch.equal(targets[:4], targets[4:])
    # The pictures are plain, so the label can be seen: blue, green, red are classes 0, 1, 2.
    assert (images[:, [2, 1, 0]].mean(dim=(2, 3)).argmax(1) == targets[:, 0]).all()
    assert 0 <= images.min() and images.max() <= 1


def test_two_views_differ_and_draws_do_not_depend_on_workers(data_dir):
    batches = [list(loader(data_dir, workers=workers)) for workers in (0, 2)]
    for (a, targets_a), (b, targets_b) in zip(*batches, strict=True):
        assert torch.equal(a, b) and torch.equal(targets_a, targets_b)
        assert not torch.equal(*a.chunk(2))


def test_epochs_differ_and_repeat(data_dir):
    def images(epoch):
        train = loader(data_dir)
        train.set_epoch(epoch)
        return torch.cat([batch for batch, _ in train])
    assert torch.equal(images(3), images(3)) and not torch.equal(images(3), images(4))


def test_drawing_views_leaves_the_main_process_random_state_alone(data_dir):
    dataset = loader(data_dir).dataset.parts[0]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    dataset[next(iter(ShuffledBatches(12, 1, 0)))[0]]
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


@pytest.mark.parametrize('ranks', [1, 2, 5])
def test_sampler_shares_are_equal_and_disjoint(ranks):
    shares = [[batch[0].index for batch in ShuffledBatches(12, 1, 0, rank, ranks)] for rank in range(ranks)]
    assert {len(share) for share in shares} == {12 // ranks}
    everything = sum(shares, [])
    assert len(set(everything)) == len(everything) == 12 // ranks * ranks
    assert everything != sorted(everything)


def test_fewer_steps(data_dir):
    assert len(loader(data_dir, batch=4)) == 3
    assert len(list(loader(data_dir, batch=4, steps=2))) == 2


@pytest.mark.parametrize('ranks', [1, 4])
def test_evaluation_counts_every_row_once(data_dir, ranks):
    dataset = MultiLabelDataset(rows(data_dir, 'val'), eval_view((8, 8), 'bilinear', 1.0, 'center'))
    loaders = [create_eval_loader(dataset, 4, rank=rank, ranks=ranks, workers=0, **PLAIN) for rank in range(ranks)]
    expected = [dataset[index][0].float() / 255 for index in range(6)]
    seen = [image for each in loaders for images, _ in each for image in images]
    order = [index for rank in range(ranks) for index in range(rank, 6, ranks)]
    for image, index in zip(seen, order, strict=True):
        torch.testing.assert_close(image, expected[index])


def test_random_erasing_happens_on_the_batch(data_dir):
    view = eval_view((16, 16), 'bilinear', 1.0, 'center')
    images, _ = next(iter(loader(data_dir, view=view, re_prob=1.0, re_mode='const')))
    assert ((images == 0).all(dim=1).flatten(1).sum(1) > 0).all()


@pytest.mark.parametrize('workers', [0, 1])
def test_a_bad_image_is_named_in_one_line(data_dir, workers):
    (data_dir / 'images' / '3.png').write_bytes(b'nothing')
    with pytest.raises(UserError) as error:
        list(loader(data_dir, workers=workers))
    assert error.value.line.startswith(f'{data_dir}/images/3.png ({data_dir}/train.csv row 5): cannot be decoded')


def test_one_hot_is_all_heads_side_by_side():
    dense = one_hot(torch.tensor([[2, 0], [-1, 1]]), SPACE)
    assert dense.tolist() == [[0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]


@pytest.mark.parametrize('kind', ['mixup_alpha', 'cutmix_alpha'])
def test_mixing_mixes_images_and_every_head_alike(data_dir, kind):
    options = {'mixup_alpha': 0.0, 'cutmix_alpha': 0.0, kind: 1.0}
    mixup = Mixup(**options, label_smoothing=0.0, num_classes=5, multi_label=True)
    plain = loader(data_dir, view=eval_view((16, 16), 'bilinear', 1.0, 'center'), views=1)
    np.random.seed(0)
    for (clean, targets), (images, dense) in zip(plain, MixedBatches(plain, mixup, SPACE), strict=True):
        labels = one_hot(targets, SPACE)
        share = ((dense - labels.flip(0)) / (labels - labels.flip(0))).nanmean()  # where the partners differ
        torch.testing.assert_close(dense, share * labels + (1 - share) * labels.flip(0))
        torch.testing.assert_close(images.mean(dim=(2, 3)), share * clean.mean(dim=(2, 3))
                                   + (1 - share) * clean.flip(0).mean(dim=(2, 3)), atol=1e-4, rtol=1e-4)
        total, mass = dense_cross_entropy(torch.zeros(4, 3), dense[:, :3], 0.1)
        assert mass.item() == pytest.approx(4) and total.item() == pytest.approx(4 * np.log(3), rel=1e-5)
