"""Image file -> upright RGB."""
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
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = ' '.join(str(error).split())
        raise UserError(
            f'{path} ({where}): cannot be decoded as an image ({reason}); replace it or remove the row') from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode (greyscale, palette, CMYK, transparent) to RGB."""
    if image.has_transparency_data:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image.convert('RGB')
