"""Images a second and core through the view pipelines, ours and others', two views an image.

`python -m benchmarks.views --help`. Every pipeline starts from the bytes of JPEG files in memory and runs on one core,
in turns with the others; ratios are of one round, so slow changes of the machine's load drop out. Peers: the fork's
way (timm's transform twice, the image decoded for each by Pillow), lightly's SimCLRTransform, torchvision's v2 ones
on uint8 tensors (`pip install '.[bench]'`).

Photos are drawn, or taken from `--photos DIR`, resized where they have not the size, and stored at quality 85.
"""
import os
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import v2

from benchmarks.program import positive, run_benchmark
from benchmarks.step import machine
from timm_multilabel.cli.parser import Parser
from timm_multilabel.data.images import DecodedPhoto, EncodedPhoto, Photo
from timm_multilabel.errors import UserError
from timm_multilabel.views.device import make_views
from timm_multilabel.views.opencv import OpenCVViews
from timm_multilabel.views.pillow import PillowViews, exact_transform, timm_transform
from timm_multilabel.views.recipe import Draws, ViewRecipe, color_matrices, draw

SHAPES = ((80, 60), (700, 500))  # height, width
SIZES = (64, 224)
POLICY = 'rand-m9-mstd0.5'
GOALS = {"fork's way": (3.5, 6, 3, 2), 'lightly': (8, 14, 4, 4)}
OURS = 'simclr'

Pipeline = Callable[[Sequence[bytes]], None]


def drawn_photo(height: int, width: int, rng: np.random.Generator) -> Image.Image:
    """Smooth shades, a few edges, and grain: about as many bytes as a photo of the size has."""
    pixels = np.asarray(Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)).resize(
        (width, height), Image.BICUBIC)).astype(int)
    for _ in range(5):
        top, left = rng.integers(0, height), rng.integers(0, width)
        pixels[top:top + height // 3, left:left + width // 3] = rng.integers(0, 256, 3)
    return Image.fromarray((pixels + rng.integers(-20, 21, pixels.shape)).clip(0, 255).astype(np.uint8))


def read_photos(folder: str | None, count: int, height: int, width: int) -> list[bytes]:
    """JPEG files of a size."""
    rng, found = np.random.default_rng(0), []
    paths = sorted(Path(folder).iterdir())[:count] if folder else [None] * count
    if not paths:
        raise UserError(f'--photos {folder}: there are none')
    for path in paths:
        if path is None:
            image = drawn_photo(height, width, rng)
        else:
            with Image.open(path) as opened:
                image = opened.convert('RGB')
            if image.size != (width, height):
                image = image.resize((width, height), Image.BICUBIC)
        file = BytesIO()
        image.save(file, 'JPEG', quality=85)
        found.append(file.getvalue())
    return found


class OurViews:
    """Our pipelines: what a loader's worker does, but for taking the memory of a batch, which the others do not do.

    Args:
        views: Makes the views.
        photos: How many photos.
    """

    def __init__(self, views: OpenCVViews | PillowViews, photos: int):
        self.views, self.out = views, np.zeros((2, photos, *views.size, 3), np.uint8)

    def __call__(self, photos: Sequence[bytes] | Sequence[Photo]) -> None:
        opened = [photo if isinstance(photo, DecodedPhoto) else EncodedPhoto(photo, '') for photo in photos]
        self.views(opened, range(len(opened)), self.out)


def through_pillow(transform: Callable[[Image.Image], object], decodes: int, photos: Sequence[bytes]) -> None:
    """A transform that takes a PIL image: of each of two decoded ones, or one that makes both views itself."""
    for photo in photos:
        for _ in range(decodes):
            transform(Image.open(BytesIO(photo)).convert('RGB'))


def through_tensors(transform: Callable[[torch.Tensor], torch.Tensor], photos: Sequence[bytes]) -> None:
    """A transform of uint8 tensors, twice, from our decoder: torchvision's own is on its way out."""
    for photo in photos:
        image = torch.from_numpy(EncodedPhoto(photo, '').decode()).permute(2, 0, 1).contiguous()
        transform(image), transform(image)


def torchvision_simclr(size: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return v2.Compose([
        v2.RandomResizedCrop(size, scale=(0.08, 1.0), antialias=True),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
        v2.RandomGrayscale(p=0.2),
        v2.RandomApply([v2.GaussianBlur(2 * (size // 20) + 1, (0.1, 2.0))], p=0.5),
    ])


class OnDevice:
    """The views of images that lie on a device, as `--cache device` makes them."""

    def __init__(self, recipe: ViewRecipe, photos: Sequence[bytes], device: torch.device):
        self.recipe, self.device = recipe, device
        pixels = [torch.from_numpy(EncodedPhoto(photo, '').decode().copy()) for photo in photos]
        self.images = torch.stack(pixels).permute(0, 1, 3, 2).contiguous().to(device)
        self.sizes = torch.tensor([image.shape[:2] for image in pixels], device=device)
        self.seeds = torch.arange(len(photos), device=device)

    def __call__(self, photos: Sequence[bytes]) -> None:
        for view in (0, 1):
            made = make_views(self.recipe, self.images, self.sizes, self.sizes, self.seeds, view)
        made[:1, 0, 0, 0].tolist()


def pipelines(size: int, photos: Sequence[bytes], device: torch.device) -> dict[str, tuple[Pipeline, Sequence]]:
    """What is compared, by name, and what each starts from."""
    recipe = ViewRecipe((size, size))
    forks = create_transform((size, size), is_training=True, auto_augment=POLICY, use_prefetcher=True)
    fast = OurViews(OpenCVViews([recipe, recipe]), len(photos))
    exact, policies = (OurViews(PillowViews([each] * 2, recipe.size), len(photos)) for each in (
        exact_transform(recipe), timm_transform((size, size), auto_augment=POLICY)))
    decoded = [DecodedPhoto(EncodedPhoto(photo, '').decode()) for photo in photos]
    found = {
        OURS: (fast, photos),
        f'{OURS}, --cache ram': (fast, decoded),
        'simclr-exact': (exact, photos),
        f'--aa {POLICY}': (policies, photos),
        f'--cache device ({device.type})': (OnDevice(recipe, photos, device), photos),
        "fork's way": (partial(through_pillow, forks, 2), photos),
        'torchvision v2': (partial(through_tensors, torchvision_simclr(size)), photos),
    }
    try:
        from lightly.transforms import SimCLRTransform
        found['lightly'] = partial(through_pillow, SimCLRTransform(input_size=size), 1), photos
    except ImportError:
        pass
    return found


def measure(cases: dict[str, tuple[Pipeline, Sequence]], rounds: int) -> dict[str, list[float]]:
    """Images a second by pipeline and round."""
    found = {name: [] for name in cases}
    for index in range(-1, rounds):
        for name, (pipeline, photos) in cases.items():
            torch.manual_seed(index + 1)
            started = time.perf_counter()
            pipeline(photos)
            if index >= 0:
                found[name].append(len(photos) / (time.perf_counter() - started))
    return found


def report(found: dict[tuple[int, int, int], dict[str, list[float]]]) -> None:
    """Print images a second, and how many times others' speed ours is."""
    names = next(iter(found.values()))
    print(f'{"images a second, two views each":<32}'
          + ''.join(f'{f"{width}x{height} to {size}":>18}' for height, width, size in found))
    for name in names:
        print(f'{name:<32}' + ''.join(f'{statistics.median(each[name]):>18.0f}' for each in found.values()))
    for name in names:
        if name != OURS:
            ratios = [statistics.median(a / b for a, b in zip(each[OURS], each[name])) for each in found.values()]
            goals = GOALS.get(name, [None] * len(ratios))
            print(f'{f"{OURS} / {name}":<32}' + ''.join(
                f'{f"{ratio:.1f}" + (f" (goal {goal})" if goal else ""):>18}' for ratio, goal in zip(ratios, goals)))


def exact_color(image: Image.Image, draws: Draws, n: int) -> Image.Image:
    """Jitter and greyscale of a draw by torchvision's operations."""
    operations = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    for operation in draws.order[n].tolist():
        image = operations[operation](image, draws.factors[n, operation].item())
    return TF.rgb_to_grayscale(image, 3) if draws.gray[n] else image


def differences(photos: Sequence[bytes]) -> None:
    """Print how far the colors of `simclr` are from those of `simclr-exact` for the same draws, of 0 to 255."""
    count = len(photos)
    size = torch.full((count,), 64)
    print(f'{"pixel difference to simclr-exact":<34}{"mean":>8}{"median":>8}{"95 %":>8}')
    for name, jitter, gray in (
            ('brightness', (0.8, 0, 0, 0), 0), ('contrast', (0, 0.8, 0, 0), 0), ('saturation', (0, 0, 0.8, 0), 0),
            ('hue', (0, 0, 0, 0.2), 0), ('all, always', (0.8, 0.8, 0.8, 0.2), 0),
            ('all, as often as SimCLR has them', None, None)):
        options = {} if jitter is None else {'jitter': jitter, 'jitter_prob': 1.0, 'grayscale_prob': gray}
        draws = draw(ViewRecipe((64, 64), **options), torch.arange(count), size, size)
        images = [EncodedPhoto(photo, '').decode() for photo in photos]
        matrices = color_matrices(draws, torch.tensor(np.array([image.mean(axis=(0, 1)) for image in images])).float())
        off = np.concatenate([
            np.abs(cv2.transform(image, matrix.numpy()).astype(int)
                   - np.asarray(exact_color(Image.fromarray(image), draws, n))).ravel()
            for n, (image, matrix) in enumerate(zip(images, matrices))])
        print(f'{name:<34}{off.mean():>8.2f}{np.median(off):>8.0f}{np.quantile(off, 0.95):>8.0f}')


def picture(args: Namespace) -> None:
    """Draw twelve pairs of views: the photo, then its two views."""
    paths = sorted(path for path in Path(args.photos or '.').iterdir() if path.suffix in ('.jpg', '.jpeg', '.png'))
    photos = [EncodedPhoto(paths[n % len(paths)].read_bytes(), str(paths[n % len(paths)])) for n in range(12)]
    views = np.empty((2, 12, 128, 128, 3), np.uint8)
    OpenCVViews([ViewRecipe((128, 128))] * 2)(photos, range(args.seed, args.seed + 12), views)
    sheet = Image.new('RGB', (4 * 416 - 16, 3 * 140 - 12), 'white')
    for n, photo in enumerate(photos):
        left, top = n % 4 * 416, n // 4 * 140
        whole = Image.fromarray(photo.decode())
        whole.thumbnail((128, 128))
        sheet.paste(whole, (left + (128 - whole.width) // 2, top + (128 - whole.height) // 2))
        for view in (0, 1):
            sheet.paste(Image.fromarray(views[view, n]), (left + 136 + 132 * view, top))
    sheet.save(args.picture, quality=90)
    print(f'{args.picture}: twelve photos with two views each')


def add_flags(parser: Parser) -> None:
    parser.add_argument('--photos', metavar='DIR', help='take photos of this folder (default: drawn ones)')
    parser.add_argument('--count', type=positive, default=64, metavar='N', help='photos of each size')
    parser.add_argument('--rounds', type=positive, default=5, metavar='N', help='samples of each pipeline')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu',
                        help='device of --cache device (default: CUDA where there is one)')
    parser.add_argument('--differences', action='store_true',
                        help='print what the approximations of simclr change in pixels, and nothing else')
    parser.add_argument('--picture', metavar='FILE', help='draw twelve pairs of views of --photos, and nothing else')
    parser.add_argument('--seed', type=positive, default=1, metavar='N', help='seed of the picture')


def run(args: Namespace) -> None:
    """Measure, and print the table."""
    if args.picture:
        picture(args)
        return
    if args.differences:
        differences(read_photos(args.photos, args.count, *SHAPES[0]))
        return
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    if hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    device = torch.device(args.device)
    print(machine(device) + f', OpenCV {cv2.__version__}; one core')
    found = {}
    for shape in SHAPES:
        photos = read_photos(args.photos, args.count, *shape)
        print(f'{shape[1]}x{shape[0]}: {len(photos)} photos of {np.mean([len(photo) for photo in photos]):.0f} bytes, '
              f'{args.rounds} rounds', flush=True)
        for size in SIZES:
            found[(*shape, size)] = measure(pipelines(size, photos, device), args.rounds)
    report(found)


if __name__ == '__main__':
    run_benchmark(sys.modules[__name__], sys.argv[1:])
