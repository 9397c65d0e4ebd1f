"""What evaluation sees of a photo of another shape than the input, in training and wherever a checkpoint is used."""
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pandas as pd
import pytest
import torch
from common import train_run, write_data
from PIL import Image

import timm_multilabel as tm
from timm_multilabel.assembly.evaluation import create_scoring_loader
from timm_multilabel.data.images import DecodedPhoto
from timm_multilabel.data.table import encode_rows, read_table
from timm_multilabel.exports.examples import read_images
from timm_multilabel.inference.loaded import LoadedModel
from timm_multilabel.training.checkpoint import read_checkpoint
from timm_multilabel.training.trainer import Precision
from timm_multilabel.views.opencv import OpenCVViews
from timm_multilabel.views.pillow import PillowViews, eval_views, exact_transform, timm_transform
from timm_multilabel.views.recipe import ViewRecipe

HEAD, BODY, FEET = (250, 0, 0), (0, 250, 0), (0, 0, 250)


def portrait(width=60, height=80):
    """A photo whose first tenth of the rows is the head, and whose last tenth are the feet."""
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[:], pixels[:height // 10], pixels[-height // 10:] = BODY, HEAD, FEET
    return pixels


def seen(views, photo):
    out = np.empty((1, 1, *views.size, 3), np.uint8)
    views([photo], [0], out)
    return out[0, 0]


@pytest.mark.parametrize('interpolation', ['nearest', 'bilinear', 'bicubic', 'lanczos'])
@pytest.mark.parametrize('mode, column', [
    # 60x80 becomes 64x85, of which the rows from 10 on are seen.
    ('center', [BODY] * 3),
    ('squash', [HEAD, BODY, FEET]),
    ('border', [HEAD, BODY, FEET]),
])
def test_a_portrait_in_a_square(mode, column, interpolation):
    made = seen(eval_views((64, 64), interpolation, 1.0, mode, (0.5, 0.2, 1.5)), DecodedPhoto(portrait()))
    assert made[[3, 32, 60], 32].tolist() == list(map(list, column))
    sides = made[:, [0, 7, 8, 55, 56, 63]]  # 60x80 becomes 48x64, between 8 columns on either side
    is_border = (sides == (128, 51, 255)).all(axis=(0, 2)).tolist()
    assert is_border == ([True, True, False, False, True, True] if mode == 'border' else [False] * 6)


def test_a_portrait_in_its_own_shape_is_whole_in_every_mode():
    made = [seen(eval_views((80, 60), 'bicubic', 1.0, mode), DecodedPhoto(portrait()))
            for mode in ('center', 'squash', 'border')]
    assert all((each == portrait()).all() for each in made)


@pytest.mark.parametrize('mode', ['squash', 'border'])
@pytest.mark.parametrize('width, height', [(1, 20000), (20000, 1), (3, 5000)])
@pytest.mark.parametrize('crop_pct', [0.875, 1.0, 10.0])
def test_a_line_of_pixels_does_not_shrink_to_nothing(mode, width, height, crop_pct):
    made = seen(eval_views((224, 32), 'bilinear', crop_pct, mode), DecodedPhoto(np.full((height, width, 3), 200, 'u1')))
    assert (made == 200).all(axis=2).any()


def test_training_views_of_whole_portraits():
    """`--scale 1 1` shows all of an image whose shape `--ratio` allows, as squash does."""
    squashed = seen(eval_views((64, 64), 'bilinear', 1.0, 'squash'), DecodedPhoto(portrait()))
    recipe = ViewRecipe((64, 64), scale=(1, 1), hflip=0, jitter_prob=0, grayscale_prob=0, blur_prob=0)
    of_timm = timm_transform((64, 64), scale=(1, 1), hflip=0, color_jitter=None, interpolation='bilinear')
    by_pillow = [PillowViews([each], (64, 64)) for each in (exact_transform(recipe), of_timm)]
    for views in (OpenCVViews([recipe]), *by_pillow):
        assert np.abs(seen(views, DecodedPhoto(portrait())).astype(int) - squashed).max() <= 2


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run on portraits with borders, which reads them through a cache."""
    folder = tmp_path_factory.mktemp('borders')
    data = write_data(folder / 'data')
    for path in sorted((data / 'images').iterdir()):
        pixels = portrait(16, 32)
        pixels[:, :4] = np.asarray(Image.open(path))[0, 0]  # the color to learn
        Image.fromarray(pixels).save(path)
    with redirect_stdout(StringIO()) as said:
        made = train_run(data, folder / 'out', '-wls', '0', '--crop-mode', 'border', '--crop-pct', '1', '--mean',
                         '0.25', '--std', '0.5', '--cache', 'ram', epochs=1)
    assert said.getvalue().count('evaluation puts borders around images, which training does not show') == 1
    return made


def test_checkpoints_see_what_training_evaluated(run):
    checkpoint, table = read_checkpoint(run / 'last.pth.tar'), run.parent.parent / 'data' / 'val.csv'
    assert (checkpoint.data_config['crop_mode'], checkpoint.data_config['crop_pct']) == ('border', 1.0)
    rows = encode_rows(read_table(table), checkpoint.label_space)
    loaded = LoadedModel.of(checkpoint, 'plain', Precision(torch.device('cpu')))
    of_predict = next(loaded.batches(loaded.part(rows), 4, 0))
    assert torch.equal(of_predict, read_images(checkpoint, list(map(str, rows.images[:4]))))  # of export
    assert torch.equal(of_predict, next(iter(create_scoring_loader(
        checkpoint, rows, 4, 0, False, torch.device('cpu'))[0]))[0])  # of validate and report
    mean, std = (torch.tensor(checkpoint.data_config[name]) for name in ('mean', 'std'))
    for row, color in ((0, HEAD), (31, FEET)):
        assert torch.allclose(of_predict[:, :, row, 16], (torch.tensor(color) / 255 - mean) / std, atol=1e-6)
    assert of_predict[:, :, :, [0, 7, 24, 31]].abs().max() < 0.01  # borders have the mean color


def test_validate_scores_as_training_did(run):
    loss = pd.read_csv(run / 'summary.csv')['eval_loss'].iloc[-1]
    found = tm.validate(run.parent.parent / 'data', run / 'last.pth.tar', device='cpu', workers=0)
    assert found.mean['loss'] == pytest.approx(loss, rel=1e-5)
