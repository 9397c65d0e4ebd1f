"""Image file -> photo: its size from the header, its pixels as upright RGB, at a reduced scale where that will do."""
import errno
import os
import re
from collections.abc import Sequence
from functools import cached_property
from io import BytesIO
from typing import BinaryIO, Protocol

import numpy as np
import simplejpeg
from PIL import Image, ImageFile, ImageOps

from timm_multilabel.data.expensive import check_bytes, check_opened, check_scans
from timm_multilabel.data.image_names import FORMATS
from timm_multilabel.data.table import Rows
from timm_multilabel.errors import DataError, UserError
from timm_multilabel.files import open_regular
from timm_multilabel.stores import is_address, read_bytes

MAX_PIXELS = 178_956_970
"""Pixels of an image at most, a gigabyte at 16 bits a color; also what Pillow refuses by itself."""

MAX_BYTES = 2 ** 31
"""Bytes of an image's file at most."""

REDUCTIONS = (1, 2, 4, 8)  # what libjpeg decodes at almost no cost for the pixels that are left out

_ORIENTATION = 0x0112  # the EXIF tag
_MARKS = (b'Exif\0\0', b'eXIf', b'EXIF', b'tiff:Orientation')  # of JPEG, PNG, WebP, XMP
_TURNS = {  # by its values: the pixels as stored -> upright
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: pixels.transpose(1, 0, 2)[:, ::-1],
    7: lambda pixels: pixels.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda pixels: pixels.transpose(1, 0, 2)[::-1],
}


class Photo(Protocol):
    """An image whose size is known, and whose pixels are made when asked for.

    `height` and `width` are of the upright image. `reductions` are the divisors that `decode` takes.
    """
    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def reductions(self) -> Sequence[int]: ...

    def decode(self, reduction: int = 1) -> np.ndarray:
        """The pixels (ceil(height / reduction), ceil(width / reduction), 3), RGB, uint8."""


class Photos(Protocol):
    """The photos of a data set, by the number of the row."""

    def __getitem__(self, index: int) -> Photo: ...


class DecodedPhoto:
    """An image whose pixels are there already.

    Args:
        levels: Pixels (H, W, 3) at full scale, or by their reduction.
        height: Of the whole image; that of the pixels when None.
        width: Of the whole image; that of the pixels when None.
    """

    def __init__(
            self,
            levels: np.ndarray | dict[int, np.ndarray],
            height: int | None = None,
            width: int | None = None,
    ):
        self.levels = levels if isinstance(levels, dict) else {1: levels}
        self.height, self.width = height or self.levels[1].shape[0], width or self.levels[1].shape[1]
        self.reductions = tuple(self.levels)

    def decode(self, reduction: int = 1) -> np.ndarray:
        """The pixels at a reduction that there is."""
        return self.levels[reduction]


class EncodedPhoto:
    """An image as it lies in a file. JPEGs go through libjpeg-turbo (simplejpeg), all else through Pillow.

    Both give the same pixels for a JPEG. Whatever its mode, an image comes out as upright RGB, and an animation as its
    first picture. EXIF that cannot be read says nothing.

    Args:
        data: The whole content of the image file.
        name: What messages call it: the file, and where the file is named.

    Raises:
        DataError: The header cannot be read, or says that the image has more than `MAX_PIXELS`, or is a bomb.
    """

    def __init__(self, data: bytes, name: str):
        self.data, self.name = data, name
        self.reductions: tuple[int, ...] = REDUCTIONS[:1]
        self.orientation = 1
        if data[:2] == b'\xff\xd8':
            try:
                self.height, self.width, colors, _ = simplejpeg.decode_jpeg_header(data)
            except ValueError:
                colors = 'unknown'
            if colors in ('YCbCr', 'Gray', 'RGB'):
                self.reductions = REDUCTIONS
        # Without the marks of an orientation, as most are, JPEGs need no look by Pillow, and PNGs no decoding for it.
        marked = any(mark in data for mark in _MARKS)
        try:
            check_bytes(data)
            if marked or len(self.reductions) == 1:
                self._look(marked)
            if self.height * self.width > MAX_PIXELS:
                raise ValueError(f'{self.width}x{self.height} pixels are more than {MAX_PIXELS:,}')
            if data[:2] == b'\xff\xd8':
                check_scans(data, self.height, self.width)
        except UserError:
            raise
        except Exception as error:  # each decoder of Pillow raises its own kind
            raise self._unreadable(error) from error

    def _look(self, marked: bool) -> None:
        """Let Pillow read size and orientation."""
        with open_image(BytesIO(self.data)) as image:
            self.width, self.height = image.size
            check_opened(image, len(self.data))
            tiff = image.format == 'TIFF'
            if marked or tiff:
                self.orientation = _orientation(image)
        if self.orientation >= 5:
            if tiff:  # some versions of Pillow have turned the size already
                self.height, self.width = self._decode_by_pillow().shape[:2]
            else:
                self.height, self.width = self.width, self.height

    def decode(self, reduction: int = 1) -> np.ndarray:
        """The pixels, RGB, uint8: (ceil(height / reduction), ceil(width / reduction), 3).

        Raises:
            DataError: They cannot be decoded.
        """
        pixels = self._decode_jpeg(reduction) if len(self.reductions) > 1 else self._decode_by_pillow()
        expected = -(-self.height // reduction), -(-self.width // reduction)
        if pixels.shape[:2] != expected:
            raise self._unreadable(f'its header speaks of {self.width}x{self.height} pixels, and it has others')
        return pixels

    def _decode_by_pillow(self) -> np.ndarray:
        try:
            with open_image(BytesIO(self.data)) as image:
                return np.asarray(to_rgb(image if _orientation(image) == 1 else ImageOps.exif_transpose(image)))
        except Exception as error:
            raise self._unreadable(error) from error

    def _decode_jpeg(self, reduction: int) -> np.ndarray:
        height, width = (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)
        try:
            pixels = simplejpeg.decode_jpeg(
                self.data, 'RGB', min_height=-(-height // reduction), min_width=-(-width // reduction), min_factor=1)
        except ValueError:  # Pillow, which is more patient, has no say in the scale
            pixels = self._decode_by_pillow()
            return pixels if reduction == 1 else np.asarray(Image.fromarray(pixels).reduce(reduction))
        turn = _TURNS.get(self.orientation)
        return pixels if turn is None else np.ascontiguousarray(turn(pixels))

    def _unreadable(self, error: Exception | str) -> DataError:
        reason = ' '.join(re.sub(r'<_io.BytesIO .*?>', '', str(error)).split()) or type(error).__name__
        return DataError(f'{self.name}: cannot be decoded as an image ({reason}); replace it or leave it out')


def open_image(file: BinaryIO | str) -> ImageFile.ImageFile:
    """Pillow's `Image.open`, of photos only.

    Raises:
        Exception: Of many kinds, as Pillow's decoders raise them.
    """
    Image.init()
    return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation that an image says it has."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # whatever an absurd EXIF makes of the reader
        return 1
    return orientation if isinstance(orientation, int) and orientation in _TURNS else 1


def read_photo(path: str, where: str, file: str | None = None) -> EncodedPhoto:
    """Read an image file, not yet decoded.

    Args:
        path: The image file, or its address.
        where: Where the file is named ("train.csv row 7"), for the message.
        file: A copy of it to read.

    Raises:
        DataError: It cannot be read, or its header cannot.
    """
    try:
        data = read_image(file or path)
    except OSError as error:
        raise DataError(
            f'{path} ({where}): cannot be read ({error.strerror}); fix that or leave it out') from error
    return EncodedPhoto(data, f'{path} ({where})')


def read_image(path: str) -> bytes:
    """The bytes of an image file, of this machine or at an address.

    Raises:
        OSError: It cannot be read, or has more than `MAX_BYTES`.
    """
    if is_address(path):
        data = read_bytes(path, MAX_BYTES)  # in one request
        large = len(data) > MAX_BYTES
    else:
        with open_regular(path) as file:
            large = os.fstat(file.fileno()).st_size > MAX_BYTES
            data = b'' if large else file.read()
    if large:
        raise OSError(errno.EFBIG, f'more than {MAX_BYTES:,} bytes, which is no image')
    return data


class FilePhotos:
    """The photos of rows, each read from its file when asked for.

    Args:
        rows: They name the image files.
        paths: Where the files are read (N,), such as copies of what addresses name; as rows name them when None.
    """

    def __init__(self, rows: Rows, paths: Sequence[str] | np.ndarray | None = None):
        self.rows = rows
        self.paths = rows.images if paths is None else paths

    @cached_property
    def are_remote(self) -> bool:
        """Whether some are read from addresses."""
        return any(map(is_address, self.paths))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Photo:
        return read_photo(str(self.rows.images[index]), self.rows.where(index), str(self.paths[index]))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode (greyscale of 8 or 16 bits, palette, CMYK, transparent) to RGB.

    Raises:
        ValueError: A mode whose range of values is unknown (32-bit integers, floats).
    """
    if image.mode.startswith('I;16'):
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))  # Pillow would clip at 255
    if image.mode in ('I', 'F'):
        raise ValueError(f'pixels of mode {image.mode}')
    if image.has_transparency_data:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image if image.mode == 'RGB' else image.convert('RGB')  # which would copy it
