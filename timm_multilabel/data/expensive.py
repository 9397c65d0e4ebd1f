"""Images of few bytes that would take minutes or gigabytes to decode, recognised before a decoder sees them."""
import re
import struct

from PIL import Image, ImageFile, TiffImagePlugin

MAX_SCANS = 2 ** 32
"""Scans of a progressive JPEG times its pixels at most, about two seconds; the largest photo may have 23 scans."""

_FEWEST_PIXELS = 2 ** 16  # that a JPEG counts as, since each scan takes some time of its own
_MAX_CHUNKS = 100_000  # of a PNG, those of pixels left out
_MAX_HEADER = 2 ** 16  # bytes of a PPM's header, which Pillow reads byte by byte
_MAX_SLOW_BYTES, _MAX_SLOW_PIXELS = 2 ** 22, 2 ** 24  # of an image that Pillow decodes in Python
_TILE = 322, 323  # TIFF's tags of a tile's width and height
_MARKER = re.compile(rb'\xff[\xc0-\xcf\xd8-\xfe]')  # of JPEG, but for those that may be within a scan


def check_bytes(data: bytes) -> None:
    """Check an image file whose header would already take long to read.

    Raises:
        ValueError: It would.
    """
    if data.startswith(b'\x89PNG'):
        place, chunks = 8, 0
        while place + 8 <= len(data):
            size, kind = struct.unpack_from('>I4s', data, place)
            chunks += kind != b'IDAT'
            place += 12 + size
            if chunks > _MAX_CHUNKS:
                raise ValueError(f'more than {_MAX_CHUNKS:,} chunks')
    elif re.match(rb'P[0-9fFy]', data) and len(data) > _MAX_HEADER:
        if len(re.sub(rb'#[^\r\n]*', b'', data[:_MAX_HEADER]).split(maxsplit=4)) < 4:
            raise ValueError(f'a header of more than {_MAX_HEADER:,} bytes')


def check_scans(data: bytes, height: int, width: int) -> None:
    """Check the number of a JPEG's scans, each of which is a pass over all of its pixels.

    Raises:
        ValueError: There are too many.
    """
    blocks = -(-height // 32) * -(-width // 32)  # a scan is of whole blocks, of up to 32 pixels
    most = MAX_SCANS // max(_FEWEST_PIXELS, blocks * 32 ** 2)
    if data.count(b'\xff\xda') <= most:  # most files end here; in others it may be of a preview or a video behind
        return
    scans, place = 0, 2
    while scans <= most and (marker := _MARKER.search(data, place)):
        kind, place = marker.group()[1], marker.end()
        if kind == 0xd9:  # the end, which some cameras put a video behind
            break
        scans += kind == 0xda
        place += int.from_bytes(data[place:place + 2], 'big')
    if scans > most:
        raise ValueError(f'more than {most:,} scans of {width}x{height} pixels')


def check_opened(image: ImageFile.ImageFile, size: int) -> None:
    """Check an image whose header has been read, before its pixels are.

    Args:
        image: As Pillow opened it, not yet decoded.
        size: Bytes of its file.

    Raises:
        ValueError: It would take long, or more memory than its pixels do.
    """
    width, height = image.size
    if image.tile and image.tile[0][0] in Image.DECODERS and (
            size > _MAX_SLOW_BYTES or width * height > _MAX_SLOW_PIXELS):
        raise ValueError(f'a {image.format} of a kind that is slow to decode, and larger than {_MAX_SLOW_BYTES:,} '
                         f'bytes or {_MAX_SLOW_PIXELS:,} pixels')
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tile = [image.tag_v2.get(tag) or 1 for tag in _TILE]
        if tile[0] * tile[1] > 16 * max(2 ** 20, width * height):
            raise ValueError(f'{width}x{height} pixels in tiles of {tile[0]}x{tile[1]}')
