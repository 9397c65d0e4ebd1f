"""Images beside those that are nearest to them, as one picture."""
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from timm_multilabel.data.images import read_photo
from timm_multilabel.errors import UserError

_SIDE, _GAP, _TEXT, _LETTERS = 128, 12, 18, 18  # pixels of a picture, between them, of its caption; letters of that
_COLUMNS = 10  # pictures found in a line; more go on in the next one
_MOST = 65_000  # pixels of a sheet's height, which JPEG can hold
_INK, _PAPER, _QUERY = '#222222', '#ffffff', '#0072b2'


@dataclass(frozen=True)
class SheetRow:
    """A query with what was found.

    Args:
        query: The image.
        found: Images with their similarity, the nearest first.
    """
    query: str
    found: Sequence[tuple[str, float]]


def sheet_size(queries: int, found: int) -> tuple[int, int]:
    """Width and height of a sheet.

    Raises:
        UserError: It would be too high for a picture.
    """
    columns, lines = min(found, _COLUMNS), -(-found // _COLUMNS)
    height = _GAP + queries * (lines * (_SIDE + _TEXT) + _GAP)
    if height > _MOST:
        raise UserError(f'a sheet of {queries} queries with {found} images each would be {height} pixels high, and '
                        f'{_MOST} is the most; ask for fewer, or leave --sheet out')
    return _GAP + (1 + columns) * (_SIDE + _GAP), height


def draw_sheet(rows: Sequence[SheetRow]) -> Image.Image:
    """The queries, framed, each with what was found beside it and its similarity below; a missing image is grey.

    Raises:
        UserError: It would be too high for a picture.
    """
    sheet = Image.new('RGB', sheet_size(len(rows), max(len(row.found) for row in rows)), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    top = _GAP
    for row in rows:
        _place(sheet, draw, font, row.query, 'query', _GAP, top)
        draw.rectangle((_GAP - 4, top - 4, _GAP + _SIDE + 3, top + _SIDE + 3), outline=_QUERY, width=3)
        for number, (image, similarity) in enumerate(row.found):
            line, column = divmod(number, _COLUMNS)
            left = _GAP + (1 + column) * (_SIDE + _GAP)
            _place(sheet, draw, font, image, f'{similarity:.3f}', left, top + line * (_SIDE + _TEXT))
        top += max(1, -(-len(row.found) // _COLUMNS)) * (_SIDE + _TEXT) + _GAP
    return sheet


def _place(
        sheet: Image.Image,
        draw: ImageDraw.ImageDraw,
        font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
        path: str,
        caption: str,
        left: int,
        top: int,
) -> None:
    """One image, fitted into its square, with its caption and name."""
    try:
        image = Image.fromarray(read_photo(path, 'on the sheet').decode())
        scale = _SIDE / max(image.size)
        image = image.resize([max(1, round(edge * scale)) for edge in image.size], Image.Resampling.BICUBIC)
        sheet.paste(image, (left + (_SIDE - image.width) // 2, top + (_SIDE - image.height) // 2))
    except UserError:  # moved or gone since it was embedded
        draw.rectangle((left, top, left + _SIDE - 1, top + _SIDE - 1), fill='#dddddd')
        draw.text((left + _SIDE // 2, top + _SIDE // 2), 'cannot be read', fill=_INK, font=font, anchor='mm')
    name = ''.join(letter if letter.isprintable() else '?' for letter in Path(path).name)
    name = name if len(name) <= _LETTERS - len(caption) else '\u2026' + name[len(caption) - _LETTERS + 1:]
    draw.text((left, top + _SIDE + 2), f'{caption}  {name}', fill=_INK, font=font)
