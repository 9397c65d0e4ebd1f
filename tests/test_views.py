"""SimCLR's views: what is drawn, and what the three ways of making them make of it."""
import math
from io import BytesIO

import cv2
import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter, ImageOps
from timm.data import create_transform
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import RandomResizedCrop

from timm_multilabel.data.images import DecodedPhoto, EncodedPhoto
from timm_multilabel.errors import UserError
from timm_multilabel.views.device import make_views
from timm_multilabel.views.opencv import OpenCVViews, crop_and_resize
from timm_multilabel.views.pillow import PillowViews, eval_views, exact_transform
from timm_multilabel.views.recipe import (
    ViewRecipe,
    color_matrices,
    draw,
    find_reduction,
    uniforms,
    useful_reductions,
    view_seeds,
    weak_recipe,
)

PLAIN = {'jitter_prob': 0.0, 'grayscale_prob': 0.0, 'blur_prob': 0.0}
WHOLE = {'scale': (1.0, 1.0), 'ratio': (1.0, 1.0), 'hflip': 0.0}
ROTATED = (0.3, 3) if cv2.__version__ >= '5' else (0.35, 5)  # OpenCV 4 rotates by way of 32nds of a pixel
N = 4000


def picture(height, width, seed=0):
    """A colorful picture with smooth areas, edges and some noise, as photos have."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    pixels = np.asarray(coarse).astype(int)
    pixels[height // 3:height // 2, width // 4:width // 2] = rng.integers(0, 256, 3)
    return (pixels + rng.integers(-8, 9, pixels.shape)).clip(0, 255).astype(np.uint8)


def jpeg(pixels, **options):
    file = BytesIO()
    Image.fromarray(pixels).save(file, 'JPEG', quality=90, **options)
    return EncodedPhoto(file.getvalue(), 'x.jpg')


def many(recipe, height=300, width=200, count=N):
    return draw(recipe, torch.arange(count), torch.full((count,), height), torch.full((count,), width))


def by_opencv(recipe, photos):
    out = np.empty((1, len(photos), *recipe.size, 3), np.uint8)
    OpenCVViews([recipe])(photos, range(len(photos)), out)
    return out[0].astype(np.float32)


def by_device(recipe, pixels):
    height, width = (max(image.shape[side] for image in pixels) for side in (0, 1))
    images = torch.full((len(pixels), height, 3, width), 77, dtype=torch.uint8)  # 77: never to be seen
    for image, its in zip(images, pixels):
        image[:its.shape[0], :, :its.shape[1]] = torch.from_numpy(its).permute(0, 2, 1)
    shapes = torch.tensor([image.shape[:2] for image in pixels])
    made = make_views(recipe, images, shapes, shapes, torch.arange(len(pixels)), 0)
    return made.permute(0, 2, 3, 1).numpy()


def test_uniforms_are_those_of_splitmix64():
    """By Python's own integers; a seed's numbers do not depend on the others."""
    def mix(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2 ** 64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2 ** 64
        return x ^ x >> 31

    seeds = [0, 1, 12345, 2 ** 36 - 1]
    found = uniforms(torch.tensor(seeds), 5)
    expected = [[(mix((mix(seed) + k * 0x9E3779B97F4A7C15) % 2 ** 64) >> 40) / 2 ** 24 for k in range(1, 6)]
                for seed in seeds]
    assert found.tolist() == expected
    assert torch.equal(uniforms(torch.tensor(seeds[2:3]), 5), found[2:3])


def test_uniforms_are_uniform_and_uncorrelated():
    found = uniforms(view_seeds(torch.arange(20000), 1), 4).double()
    assert found.mean(dim=0).tolist() == pytest.approx([0.5] * 4, abs=0.01)
    assert found.var(dim=0).tolist() == pytest.approx([1 / 12] * 4, abs=0.002)
    other = uniforms(view_seeds(torch.arange(20000), 0), 4).double()
    assert torch.corrcoef(torch.cat([found, other], dim=1).T).fill_diagonal_(0).abs().max() < 0.03


@pytest.mark.slow
@pytest.mark.parametrize('height, width', [(300, 200), (60, 400)])
def test_crops_are_drawn_as_torchvision_draws_them(height, width):
    """Area, aspect ratio and place, by the Kolmogorov-Smirnov test."""
    recipe = ViewRecipe((64, 64))
    top, left, h, w = many(recipe, height, width).box.double().unbind(1)
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= height).all() and (left + w <= width).all()
    from scipy.stats import ks_2samp  # here, since test_cuda.py needs this module where there is no SciPy
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    params = torch.tensor([RandomResizedCrop.get_params(image, recipe.scale, recipe.ratio) for _ in range(N)]).double()
    for ours, theirs in (
            (h * w, params[:, 2] * params[:, 3]), (w / h, params[:, 3] / params[:, 2]),
            (top, params[:, 0]), (left, params[:, 1])):
        assert ks_2samp(ours.numpy(), theirs.numpy()).statistic < 0.036  # a chance of 1 % under equal distributions


def test_crop_of_an_image_that_no_crop_fits_is_its_center():
    assert many(ViewRecipe((8, 8)), 4, 400, count=2).box.tolist() == [[0, 197, 4, 5]] * 2
    assert many(ViewRecipe((8, 8)), 400, 4, count=1).box.tolist() == [[197, 0, 5, 4]]


def test_rates_and_ranges():
    recipe = ViewRecipe((64, 64), vflip=0.1, rotation=20.0, interpolation='random')
    drawn = many(recipe)
    jittered = (drawn.factors != torch.tensor([1.0, 1.0, 1.0, 0.0])).any(dim=1)
    rates = {'hflip': 0.5, 'vflip': 0.1, 'gray': 0.2, 'bicubic': 0.5}
    for name, rate in rates.items():
        assert getattr(drawn, name).float().mean().item() == pytest.approx(rate, abs=0.03)
    assert jittered.float().mean().item() == pytest.approx(0.8, abs=0.03)
    assert (drawn.sigma > 0).float().mean().item() == pytest.approx(0.5, abs=0.03)
    sigma, factors = drawn.sigma[drawn.sigma > 0], drawn.factors[jittered]
    assert 0.1 <= sigma.min() < 0.15 and 1.95 < sigma.max() <= 2.0
    assert factors.amin(dim=0).tolist() == pytest.approx([0.2, 0.2, 0.2, -0.2], abs=0.01)
    assert factors.amax(dim=0).tolist() == pytest.approx([1.8, 1.8, 1.8, 0.2], abs=0.01)
    assert drawn.angle.min() < -19 and drawn.angle.max() > 19
    orders = {tuple(order) for order in drawn.order.tolist()}
    assert len(orders) == 24


def test_weak_recipe_is_a_slight_crop_and_a_flip():
    drawn = many(weak_recipe((64, 64)))
    area = drawn.box[:, 2] * drawn.box[:, 3] / 60000
    assert area.min() > 0.79 and drawn.hflip.any() and not drawn.gray.any() and not drawn.sigma.any()


@pytest.mark.parametrize('bicubic', [False, True])
@pytest.mark.parametrize('box, size', [
    ((3, 5, 40, 30), (64, 64)), ((0, 0, 80, 60), (64, 64)), ((7, 2, 64, 50), (32, 24)), ((1, 1, 20, 70), (33, 33)),
    ((4, 4, 64, 64), (64, 64))])
def test_resize_is_pillows(box, size, bicubic):
    """Antialiased where it shrinks. Tolerances: 1 of 255 at most, bicubic 6; 0.3 on average."""
    pixels = picture(90, 90)
    out = np.empty((*size, 3), np.uint8)
    crop_and_resize(pixels, box, out, bicubic)
    top, left, height, width = box
    expected = Image.fromarray(pixels[top:top + height, left:left + width]).resize(
        size[::-1], Image.BICUBIC if bicubic else Image.BILINEAR)
    off = np.abs(out.astype(int) - np.asarray(expected))
    assert off.max() <= (6 if bicubic else 1) and off.mean() < 0.3


@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic', 'nearest'])
@pytest.mark.parametrize('crop_mode, crop_pct', [('center', 0.875), ('squash', 1.0), ('border', 0.9)])
@pytest.mark.parametrize('size', [(32, 32), (32, 48)])
def test_evaluation_is_timms_through_pillow(interpolation, crop_mode, crop_pct, size):
    """Within 6 of 255, 0.3 on average."""
    pixels = picture(75, 61)
    out = np.empty((1, 1, *size, 3), np.uint8)
    eval_views(size, interpolation, crop_pct, crop_mode)([DecodedPhoto(pixels)], [0], out)
    theirs = create_transform(size, interpolation=interpolation, crop_pct=crop_pct, crop_mode=crop_mode,
                              use_prefetcher=True)(Image.fromarray(pixels))
    off = np.abs(out[0, 0].astype(int) - np.asarray(theirs).transpose(1, 2, 0))
    assert off.max() <= 6 and off.mean() < 0.3


def test_color_matrix_is_torchvisions_operations_where_nothing_is_clamped():
    """Brightness, contrast, saturation in any order, then greyscale: within 1 of 255, which is their rounding."""
    pixels = torch.from_numpy(picture(20, 30)).permute(2, 0, 1) // 4 + 90
    drawn = many(ViewRecipe((20, 30), jitter=(0.2, 0.3, 0.4, 0.0), jitter_prob=1.0), count=40)
    matrices = color_matrices(drawn, pixels.float().mean(dim=(1, 2)).expand(40, 3))
    for n in range(40):
        expected = pixels.float() / 255
        for operation in drawn.order[n].tolist()[:4]:
            factor = drawn.factors[n, operation].item()
            adjust = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, lambda image, _: image][operation]
            expected = adjust(expected, factor)
        if drawn.gray[n]:
            expected = TF.rgb_to_grayscale(expected, 3)
        made = torch.einsum('ij,jhw->ihw', matrices[n, :, :3], pixels.float()) + matrices[n, :, 3, None, None]
        assert (made / 255 - expected).abs().max() < 0.002


def test_hue_is_a_rotation_about_the_grey_axis():
    drawn = many(ViewRecipe((8, 8), jitter=(0.0, 0.0, 0.0, 0.5), jitter_prob=1.0, grayscale_prob=0.0), count=1)
    third = drawn._replace(factors=torch.tensor([[1.0, 1.0, 1.0, 1 / 3]]))
    matrix = color_matrices(third, torch.zeros(1, 3))[0]
    expected = torch.tensor([[0., 0., 1., 0.], [1., 0., 0., 0.], [0., 1., 0., 0.]])  # red -> green -> blue
    torch.testing.assert_close(matrix, expected, atol=1e-6, rtol=0)
    grey = color_matrices(drawn, torch.zeros(1, 3))[0] @ torch.tensor([100., 100., 100., 1.])
    torch.testing.assert_close(grey, torch.full((3,), 100.0))


@pytest.mark.slow
def test_colors_are_distributed_as_the_textbooks():
    """Mean and spread, over many views of a few pictures, of brightness and of saturation: within 8 of 255."""
    recipe = ViewRecipe((16, 16), **WHOLE, blur_prob=0.0)
    pixels = [picture(16, 16, seed) for seed in range(8)]
    photos = [DecodedPhoto(pixels[n % 8]) for n in range(800)]
    fast, exact = by_opencv(recipe, photos), np.empty((1, 800, 16, 16, 3), np.uint8)
    PillowViews([exact_transform(recipe)], (16, 16))(photos, range(800), exact)
    for measure in (
            lambda views: views.mean(axis=(1, 2, 3)), lambda views: views.max(axis=3) - views.min(axis=3),
            lambda views: views.std(axis=(1, 2)).mean(axis=1)):
        ours, theirs = measure(fast), measure(exact[0].astype(np.float32))
        assert ours.mean() == pytest.approx(theirs.mean(), abs=8)
        assert ours.std() == pytest.approx(theirs.std(), abs=8)


@pytest.mark.parametrize('sigma', [0.1, 0.7, 1.3, 2.0])
def test_blur_is_a_gaussian(sigma):
    """Beside Pillow-free torchvision's, over the same kernel: within 2 of 255."""
    recipe = ViewRecipe((64, 64), **WHOLE, jitter_prob=0.0, grayscale_prob=0.0, blur_prob=1.0,
                        blur_sigma=(sigma, sigma))
    pixels = picture(64, 64)
    expected = TF.gaussian_blur(torch.from_numpy(pixels).permute(2, 0, 1), 7, sigma).permute(1, 2, 0).numpy()
    for made in (by_opencv(recipe, [DecodedPhoto(pixels)]), by_device(recipe, [pixels])):
        assert np.abs(made[0] - expected).max() <= 2


@pytest.mark.parametrize('options, mean, most', [
    (PLAIN, 0.3, 1.1),
    ({**PLAIN, 'interpolation': 'bicubic'}, 0.35, 8),
    ({**PLAIN, 'vflip': 0.5, 'scale': (0.5, 1.0)}, 0.3, 1.1),
    ({**PLAIN, 'blur_prob': 1.0}, 0.3, 2),
    ({**PLAIN, 'rotation': 40.0}, *ROTATED),
    ({}, 0.4, 6),
], ids=['crop', 'bicubic', 'flips', 'blur', 'rotation', 'all'])
@pytest.mark.parametrize('size', [(64, 64), (32, 56)])
def test_the_device_makes_the_hosts_views(options, mean, most, size):
    """The same draws, image by image, of images of several sizes: the tolerances are of 0 to 255."""
    recipe = ViewRecipe(size, **options)
    pixels = [picture(*shape, seed) for seed, shape in enumerate([(80, 60), (60, 60), (77, 60), (40, 90)] * 5)]
    off = np.abs(by_device(recipe, pixels) - by_opencv(recipe, [DecodedPhoto(image) for image in pixels]))
    assert off.mean() < mean and off.max() <= most


WAITS = {'aten::lift_fresh', 'aten::_local_scalar_dense', 'aten::nonzero', 'aten::masked_select'}


class Operations(TorchDispatchMode):
    """The names of what PyTorch computes."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


def test_the_host_neither_waits_nor_copies_while_a_device_makes_views():
    """No number is read back, no shape depends on data, and no constant is made on the host."""
    with Operations() as seen:
        by_device(ViewRecipe((32, 32), rotation=5.0), [picture(40, 30)])
    inside = Operations()
    shapes, images = torch.tensor([[40, 30]]), torch.zeros(1, 40, 3, 30, dtype=torch.uint8)
    with inside:
        make_views(ViewRecipe((32, 32), rotation=5.0), images, shapes, shapes, shapes[:, 0], 0)
    assert 'aten::lift_fresh' in seen.names and len(inside.names) > 20  # the test sees what it looks for
    assert not inside.names & WAITS


def test_both_views_of_an_image_differ_and_repeat():
    photo = DecodedPhoto(picture(80, 60))
    made = np.empty((2, 2, 32, 32, 3), np.uint8)
    again = np.empty_like(made)
    views = OpenCVViews([ViewRecipe((32, 32))] * 2)
    views([photo, photo], [5, 6], made)
    views([photo, photo], [6, 5], again)
    assert np.array_equal(made[:, ::-1], again)
    assert len({made[v, n].tobytes() for v in (0, 1) for n in (0, 1)}) == 4


class Counted:
    """A photo that tells how it was decoded."""

    def __init__(self, photo):
        self.photo, self.asked = photo, []
        self.height, self.width, self.reductions = photo.height, photo.width, photo.reductions

    def decode(self, reduction=1):
        self.asked.append(reduction)
        return self.photo.decode(reduction)


@pytest.mark.slow
def test_an_image_is_decoded_once_at_the_scale_that_both_crops_allow():
    photo = jpeg(picture(700, 500))
    asked = []
    for seed in range(40):
        counted = Counted(photo)
        out = np.empty((2, 1, 64, 64, 3), np.uint8)
        views = OpenCVViews([ViewRecipe((64, 64))] * 2)
        views([counted], [seed], out)
        boxes = [draw(recipe, view_seeds(torch.tensor([seed]), view), torch.tensor([700]), torch.tensor([500])).box[0]
                 for view, recipe in enumerate(views.recipes)]
        ratio = min(box[2:].min().item() / 64 for box in boxes)
        assert counted.asked == [2 ** int(math.log2(ratio))]
        asked += counted.asked
    assert set(asked) == {2, 4}


def test_a_reduced_decode_gives_nearly_the_same_view():
    """Mean difference of less than 2 of 255: the scaled inverse DCT is an antialiasing filter of its own."""
    recipe = ViewRecipe((64, 64), **PLAIN)
    photo = jpeg(picture(700, 500))
    whole = DecodedPhoto(photo.decode())
    off = np.abs(by_opencv(recipe, [photo] * 10) - by_opencv(recipe, [whole] * 10))
    assert 0 < off.mean() < 2


@pytest.mark.parametrize('height, width', [(700, 500), (300, 2000), (129, 128), (64, 64), (1500, 1400), (40, 4000)])
@pytest.mark.parametrize('scale', [(0.08, 1.0), (0.5, 0.9)])
def test_useful_reductions_are_all_that_a_crop_asks_for(height, width, scale):
    recipe = ViewRecipe((64, 48), scale=scale)
    photo = DecodedPhoto({1: None, 2: None, 4: None, 8: None}, height, width)
    useful = useful_reductions([recipe], photo)
    box = many(recipe, height, width, 2000).box
    ratios = torch.minimum(box[:, 2] / 64, box[:, 3] / 48).tolist()
    asked = {find_reduction(ratio, photo.reductions) for ratio in ratios}
    assert asked <= set(useful) and {find_reduction(ratio, useful) for ratio in ratios} == asked


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('reduction', [1, 2, 4])
def test_jpegs_come_out_upright_at_any_scale(orientation, reduction):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.asarray(Image.fromarray(picture(4, 6)).resize((96, 64), Image.BICUBIC))
    photo = jpeg(pixels, exif=exif)
    made = photo.decode(reduction)
    assert (photo.height, photo.width) == ((64, 96) if orientation < 5 else (96, 64))
    assert made.shape == (photo.height // reduction, photo.width // reduction, 3)
    with Image.open(BytesIO(photo.data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    if reduction == 1:
        assert np.array_equal(made, expected)
    else:
        smaller = np.asarray(Image.fromarray(expected).reduce(reduction)).astype(int)
        assert np.abs(made - smaller).mean() < 2


@pytest.mark.parametrize('mode', ['L', 'RGB'])
def test_jpegs_have_pillows_pixels(mode):
    file = BytesIO()
    image = Image.fromarray(picture(61, 83)).convert(mode).filter(ImageFilter.GaussianBlur(1))
    image.save(file, 'JPEG', quality=80)
    photo = EncodedPhoto(file.getvalue(), 'x.jpg')
    with Image.open(BytesIO(photo.data)) as theirs:
        assert len(photo.reductions) == 4 and np.array_equal(photo.decode(), np.asarray(theirs.convert('RGB')))


@pytest.mark.parametrize('orientation', [1, 3, 6, 8, 9])
@pytest.mark.parametrize('form', ['JPEG', 'PNG', 'WEBP', 'TIFF'])
def test_the_header_tells_the_upright_size(form, orientation):
    """In every format, and whatever nonsense stands where the orientation should."""
    exif, file = Image.Exif(), BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(picture(40, 60)).save(file, form, exif=exif)
    photo = EncodedPhoto(file.getvalue(), 'x')
    with Image.open(BytesIO(photo.data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert('RGB'))
    assert photo.decode().shape == (photo.height, photo.width, 3)
    assert (photo.height, photo.width) == ((60, 40) if orientation in (6, 8) else (40, 60))
    assert np.array_equal(photo.decode(), expected)


def test_an_image_that_is_not_what_its_header_says_is_bad():
    photo = jpeg(picture(40, 60))
    photo.height = 50
    with pytest.raises(UserError, match='its header speaks of 60x50 pixels'):
        photo.decode()
