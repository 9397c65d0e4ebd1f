"""Pictures inside a page: figures and thumbnails as data URIs."""
import base64
import warnings
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from timm_multilabel.data.images import read_photo
from timm_multilabel.errors import UserError

if TYPE_CHECKING:  # since it imports SciPy, which takes a second, and a run draws only its curves
    from timm_multilabel.reports.calibration import Reliability

_DPI = 110
_SIDE = 96  # pixels of a thumbnail's longer side
_QUALITY = 82


def png(figure: Figure, dpi: int = _DPI) -> bytes:
    """A figure as a PNG."""
    drawn = BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph .* missing')  # the fonts at hand may lack a script
        figure.savefig(drawn, format='png', dpi=dpi)
    return drawn.getvalue()


def figure_uri(figure: Figure) -> str:
    """A figure as a PNG of 256 colors at most."""
    small = BytesIO()
    with Image.open(BytesIO(png(figure))) as image:
        image.convert('RGB').quantize(256, dither=Image.Dither.NONE).save(small, 'PNG', optimize=True)
    return _uri('png', small.getvalue())


def jpeg_uri(pixels: np.ndarray, side: int = _SIDE) -> str:
    """Pixels (H, W, 3), uint8, as a JPEG no side of which is longer than `side`."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    made = BytesIO()
    image.save(made, 'JPEG', quality=_QUALITY, optimize=True)
    return _uri('jpeg', made.getvalue())


def _uri(kind: str, data: bytes) -> str:
    return f'data:image/{kind};base64,{base64.b64encode(data).decode()}'


class Thumbnails:
    """Small pictures of images by their number.

    Args:
        images: The files.
        rows: Where each is named, for messages.
    """

    def __init__(self, images: Sequence[str], rows: Sequence[str]):
        self.images, self.rows = images, rows
        self.missing: dict[int, str] = {}  # what could not be read, and why

    def __call__(self, index: int) -> str:
        """The data URI of an image; '' where it cannot be read."""
        try:
            photo = read_photo(str(self.images[index]), str(self.rows[index]))
            reduction = max(each for each in photo.reductions
                            if each == 1 or min(photo.height, photo.width) >= 2 * _SIDE * each)
            return jpeg_uri(photo.decode(reduction))
        except UserError as error:
            self.missing[index] = error.line
            return ''


def reliability_figure(found: 'Reliability') -> Figure:
    """A reliability diagram: what came true by what was said, with 95 % intervals, and how many said so."""
    figure = Figure(figsize=(4.6, 4.6), layout='constrained')
    axes, counts = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    bins, there = len(found.count), found.count > 0
    share = found.accuracy[there]
    low, high = found.intervals()[there].T
    axes.plot([0, 1], [0, 1], color='black', linewidth=0.8, linestyle='--', label='ideal')
    # Points, not bars: of a bin of one image a bar would fill the height, where an interval says how little is known.
    axes.errorbar(found.confidence[there], share, yerr=np.maximum([share - low, high - share], 0), fmt='o',
                  color='#4477aa', markersize=5, linewidth=1, capsize=2, label='probabilities of a bin, 95 % interval')
    axes.set(ylabel='share that came true', xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    figure.legend(frameon=False, fontsize=8, loc='outside upper left', ncols=2, columnspacing=1, handlelength=1.5)
    counts.bar(np.arange(bins) / bins, found.count, 1 / bins, align='edge', color='#bbbbbb', edgecolor='white',
               linewidth=0.8)
    counts.set(xlabel='probability', ylabel='number')
    counts.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    for each in (axes, counts):
        each.spines[['top', 'right']].set_visible(False)
    return figure


Thumbnail = Callable[[int], str]
"""The data URI of an image by its number, '' where there is none."""
