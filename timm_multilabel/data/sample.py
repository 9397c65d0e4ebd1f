"""A sample data set drawn on the spot: one textured shape a picture, with three labels to learn."""
import colorsys
import math
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm

from timm_multilabel.config.commands import SampleSettings
from timm_multilabel.data.packing import check_packing, pack
from timm_multilabel.data.streams import Stored
from timm_multilabel.data.table import read_table
from timm_multilabel.errors import DataError
from timm_multilabel.files import write_atomic
from timm_multilabel.places import local_path
from timm_multilabel.progress import OFF_TERMINAL

# Mean and spread of the hue in degrees. Neighbours overlap a little, so that nobody reaches 100 %. Gray shapes are
# called NA, since readers that take the text NA for a missing label lose a whole class without a word.
HUES = {
    'red': (0, 7),
    'orange': (26, 7),
    'yellow': (54, 8),
    'green': (120, 20),
    'blue': (215, 16),
    'purple': (272, 14),
    'pink': (324, 13),
    'NA': (0, 360),
}
_CALLED = {'NA': 'NA (gray)'}  # where people read it
SHAPES = ('circle', 'cross', 'diamond', 'hexagon', 'rectangle', 'square', 'star', 'triangle')
TEXTURES = ('plain', 'stripes', 'checks', 'dots')
HEADS = {'color': tuple(HUES), 'shape': SHAPES, 'texture': TEXTURES}

MISSING_SHARE = 0.05  # of the label cells in train.csv
GREY_SHARE = 0.15  # of the NA pictures, stored with one channel
OVERSAMPLING = 2  # drawn larger, then averaged: smooth edges


def write_sample(
        directory: str | Path,
        *,
        train: int = SampleSettings.train,
        val: int = SampleSettings.val,
        test: int = SampleSettings.test,
        unlabelled: int = SampleSettings.unlabelled,
        size: int = SampleSettings.size,
        seed: int = SampleSettings.seed,
        kind: str = SampleSettings.format,
        force: bool = False,
) -> None:
    """Draw images/, train.csv, val.csv, test.csv, unlabelled.csv and preview.png into a folder; or shards and preview.

    Args:
        directory: Folder to write to, made if it is not there.
        train: Rows of train.csv, where 5 % of the label cells are empty.
        val: Rows of val.csv.
        test: Rows of test.csv.
        unlabelled: Rows of unlabelled.csv, which has the column image_path only; 0 for no such file.
        size: Width and height of the pictures.
        seed: The same seed gives the same bytes.
        kind: 'csv', or a format of `packing`.
        force: Overwrite files of these names.

    Raises:
        DataError: The folder holds such files already, or cannot be made, or a library is missing.
    """
    directory = local_path(directory)
    counts = {'train': train, 'val': val, 'test': test, 'unlabelled': unlabelled}
    tables = [directory / f'{name}.csv' for name in counts]
    for name in counts:
        tables += [*directory.glob(f'{name}-[0-9]*.tar'), *directory.glob(f'{name}-[0-9]*.parquet')]
    tables += [directory / Stored.LABEL_SPACE, directory / Stored.ROWS]
    taken = [path.name for path in (*tables, directory / 'preview.png', directory / 'images') if path.exists()]
    if kind != 'csv':
        check_packing(kind)
    if taken and not force:
        raise DataError(f'{directory} already holds {", ".join(taken)}; overwrite with --force or choose another DIR')
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f'{directory}: cannot make this folder ({error.strerror}); choose another DIR') from error
    for path in tables:  # old tables must not describe new pictures if this run is killed
        path.unlink(missing_ok=True)
    if kind == 'csv':
        _draw(directory, counts, size, seed)
        return
    with TemporaryDirectory(dir=directory, prefix='.sample-') as drawn:
        folder = Path(drawn)
        _draw(folder, counts, size, seed)
        made = [folder / 'preview.png']
        for name in counts:
            if (folder / f'{name}.csv').exists():
                made += pack(read_table(folder / f'{name}.csv'), folder, name, kind)
        for path in made:
            os.replace(path, directory / path.name)


def _draw(directory: Path, counts: dict[str, int], size: int, seed: int) -> None:
    """Draw the data set as pictures and CSVs."""
    (directory / 'images').mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    splits: dict[str, list[dict[str, str]]] = {}
    number = 0
    with tqdm(total=sum(counts.values()), unit='picture', disable=OFF_TERMINAL) as progress:
        for name, count in counts.items():
            truth = pick_labels(count, rng)
            rows = empty_cells(truth, MISSING_SHARE, rng) if name == 'train' else truth
            splits[name] = []
            for labels, row in zip(truth, rows):
                number += 1
                picture_rng = np.random.default_rng([seed, number])
                picture = draw_picture(**labels, size=size, rng=picture_rng)
                if row['color'] == 'NA' and picture_rng.random() < GREY_SHARE:
                    picture = picture.convert('L')
                path = f'images/{number:06d}.jpg'
                picture.save(directory / path, quality=90)
                splits[name].append({'image_path': path, **row})
                progress.update()
    draw_preview(directory, splits['train'][:32]).save(directory / 'preview.png')
    for name, rows in splits.items():
        if not rows:
            continue
        columns = ['image_path'] if name == 'unlabelled' else ['image_path', *HEADS]
        table = pd.DataFrame(rows, columns=columns)
        write_atomic(directory / f'{name}.csv', table.to_csv(index=False, lineterminator='\n'))


def pick_labels(count: int, rng: np.random.Generator) -> list[dict[str, str]]:
    """Labels of `count` pictures: heads independent of each other, classes of a head equally frequent."""
    columns = {
        head: [classes[index] for index in rng.permutation(np.arange(count) % len(classes))]
        for head, classes in HEADS.items()
    }
    return [dict(zip(columns, labels)) for labels in zip(*columns.values())]


def empty_cells(rows: list[dict[str, str]], share: float, rng: np.random.Generator) -> list[dict[str, str]]:
    """A copy of the rows in which a share of all cells is empty."""
    heads = list(HEADS)
    emptied = [dict(row) for row in rows]
    cells = len(rows) * len(heads)
    for cell in rng.choice(cells, round(share * cells), replace=False) if cells else ():
        emptied[cell // len(heads)][heads[cell % len(heads)]] = ''
    return emptied


def draw_picture(color: str, shape: str, texture: str, size: int, rng: np.random.Generator) -> Image.Image:
    """One textured shape on a cluttered background, in uneven light and with sensor noise."""
    side = size * OVERSAMPLING
    picture = _draw_background(side, rng)

    mask = Image.new('L', (side, side))
    ImageDraw.Draw(mask).polygon(_outline(shape, side, rng), fill=255)
    contrast = rng.uniform(0.14, 0.32)
    light = 1 + contrast * _pattern(texture, side, rng)
    fill = np.multiply.outer(light, _pick_color(color, rng))
    picture.paste(_to_image(fill), mask=mask)

    pixels = np.asarray(picture.reduce(OVERSAMPLING), dtype=np.float32)
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    across, down = rng.uniform(-0.2, 0.2, 2).astype(np.float32)
    light = np.float32(rng.uniform(0.75, 1.1)) * (1 + across * ramp + down * ramp[:, None])
    noise = rng.standard_normal((size, size, 3), dtype=np.float32) * np.float32(rng.uniform(3, 9))
    return _to_image(pixels * light[..., None] + noise)


def draw_preview(directory: str | Path, rows: list[dict[str, str]], columns: int = 8) -> Image.Image:
    """A contact sheet of the rows' pictures with the labels written below each."""
    side, gap, line = 128, 10, 17
    width, height = side + gap, side + gap + line * len(HEADS)
    sheet = Image.new('RGB', (gap + width * columns, gap + height * math.ceil(len(rows) / columns)), 'white')
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    for index, row in enumerate(rows):
        left, top = gap + width * (index % columns), gap + height * (index // columns)
        with Image.open(Path(directory) / row['image_path']) as picture:
            sheet.paste(picture.convert('RGB').resize((side, side), Image.Resampling.BICUBIC), (left, top))
        for place, head in enumerate(HEADS):
            label = row[head]
            text, ink = (_CALLED.get(label, label), 'black') if label else (f'(no {head})', '#a0a0a0')
            draw.text((left, top + side + line * place), text, fill=ink, font=font)
    return sheet


def _draw_background(side: int, rng: np.random.Generator) -> Image.Image:
    """Soft clouds of dull colors with lines and small blobs of any color."""
    clouds = rng.integers(60, 190) + rng.integers(-25, 26, 3) + rng.integers(-25, 26, (4, 4, 3))
    picture = _to_image(clouds).resize((side, side), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(1, 5)):
        ends = [tuple(end) for end in rng.uniform(0, side, (2, 2)).tolist()]
        draw.line(ends, fill=_pick_ink(rng), width=int(rng.integers(1, 1 + max(2, side // 28))))
    for _ in range(rng.integers(1, 6)):
        x, y = rng.uniform(0, side, 2)
        radius = side * rng.uniform(0.02, 0.07)
        box = (x - radius, y - radius, x + radius, y + radius)
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)(box, fill=_pick_ink(rng))
    return picture


def _outline(shape: str, side: int, rng: np.random.Generator) -> list[tuple[float, float]]:
    """The corners of a shape, somewhat stretched, turned, scaled and moved."""
    stretch = rng.uniform(0.9, 1.1)
    if shape == 'star':
        radii = np.tile([1, rng.uniform(0.45, 0.62)], 5)
        points = radii[:, None] * _circle(10) @ _rotation(-math.pi / 2)
    elif shape == 'cross':
        arm = rng.uniform(0.28, 0.45)
        corner = np.array([(1, -arm), (1, arm), (arm, arm)])
        points = np.concatenate([corner @ _rotation(quarter * math.pi / 2) for quarter in range(4)])
    else:
        corners = {'triangle': 3, 'square': 4, 'rectangle': 4, 'diamond': 4, 'hexagon': 6, 'circle': 48}[shape]
        points = _circle(corners) @ _rotation(math.pi / 2 + math.pi / corners)  # a flat side down
        if shape == 'rectangle':
            stretch = rng.uniform(1.3, 2)
        elif shape == 'diamond':
            points = points @ _rotation(math.pi / 4)
            stretch = rng.uniform(0.5, 0.8)
    points = points * [math.sqrt(stretch), 1 / math.sqrt(stretch)]
    points = points @ _rotation(math.radians(rng.uniform(-15, 15)))
    radius = rng.uniform(0.34, 0.46)
    center = rng.uniform(radius, 1 - radius, 2)
    return [tuple(point) for point in (side * (center + radius * points)).tolist()]


def _pattern(texture: str, side: int, rng: np.random.Generator) -> np.ndarray:
    """A pattern of -1 and 1, at a slant, over the whole picture."""
    if texture == 'plain':
        return np.zeros((side, side), np.float32)
    grid = np.arange(side, dtype=np.float32) * np.float32(2 * math.pi / (side * rng.uniform(0.14, 0.22)))
    (cosine, sine), _ = _rotation(math.radians(rng.uniform(25, 65))).astype(np.float32)
    shift = rng.uniform(0, 2 * math.pi, 2).astype(np.float32)
    across = cosine * grid + sine * grid[:, None] + shift[0]
    along = cosine * grid[:, None] - sine * grid + shift[1]
    pattern: np.ndarray
    if texture == 'stripes':
        pattern = np.sign(np.sin(across))
    elif texture == 'checks':
        pattern = np.sign(np.sin(across) * np.sin(along))
    else:  # dots
        pattern = np.where(np.cos(across) + np.cos(along) > 0.8, 1, -1) * rng.choice([-1, 1])
    return pattern


def _pick_color(color: str, rng: np.random.Generator) -> np.ndarray:
    """Red, green and blue from 0 to 255 of a shade that goes by this name."""
    mean, spread = HUES[color]
    hue = rng.normal(mean, spread) / 360 % 1
    saturation = rng.uniform(0, 0.12) if color == 'NA' else rng.uniform(0.35, 0.9)
    return 255 * np.array(colorsys.hsv_to_rgb(hue, saturation, rng.uniform(0.5, 0.95)), np.float32)


def _pick_ink(rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(rng.integers(30, 226, 3).tolist())


def _circle(corners: int) -> np.ndarray:
    angles = np.arange(corners) * (2 * math.pi / corners)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _rotation(angle: float) -> np.ndarray:
    cosine, sine = math.cos(angle), math.sin(angle)
    return np.array([(cosine, sine), (-sine, cosine)])


def _to_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
