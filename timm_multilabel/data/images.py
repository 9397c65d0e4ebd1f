"""Image file -> upright RGB."""
import numpy as np
from PIL import Image, ImageOps

from timm_multilabel.errors import UserError


def read_image(path: str, where: str) -> Image.Image:
    """Decode an image file of any mode as upright RGB; what is transparent becomes white.

    Args:
        path: The file.
        where: Where the file is named ("train.csv row 7"), for the message.

    Raises:
        UserError: The file cannot be read or decoded.
    """
    try:
        with Image.open(path) as file:
            return to_rgb(ImageOps.exif_transpose(file))
    except Exception as error:  # each decoder of Pillow raises its own kinds
        reason = ' '.join(str(error).split())
        raise UserError(
            f'{path} ({where}): cannot be decoded as an image ({reason}); replace it or remove the row') from error


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
    return image.convert('RGB')
