"""Texts of the user's data, made harmless for the programs that show or open them."""
import csv
import io
import re
from collections.abc import Iterable
from typing import Any

import pandas as pd

from timm_multilabel.errors import printable, shortened

_CELL = 200  # letters of a cell in a table for people
_FORMULA = tuple('=+-@\uff1d\uff0b\uff0d\uff20')  # the last four are full-width, which some spreadsheets take as well
_MARKUP = re.compile(
    r'[\\`*\[\]<>|~${}]|(?<![^\W_])_|_(?![^\W_])|&(?=[#\w])|[#@](?=\w)|^#|:(?=//|[\w+-]+:)|(?<=[wW]{3})\.')


def spreadsheet_text(text: str) -> str:
    """A cell of a CSV that spreadsheets show as it is: with a `'` before what they would compute as a formula.

    Blanks and control characters before a formula do not count, since programs drop them; nor does a `'`, so that
    `spreadsheet_text_back` gives every text back. See https://owasp.org/www-community/attacks/CSV_Injection.
    """
    bare = re.sub(r"^[\s\x00-\x1f\x7f-\x9f\u200b-\u200f\u2060\ufeff']+", '', text)
    return f"'{text}" if bare.startswith(_FORMULA) or text.startswith(('\t', '\r', '\n')) else text


def spreadsheet_text_back(text: str) -> str:
    """The text of which `spreadsheet_text` made a cell."""
    return text[1:] if text.startswith("'") and spreadsheet_text(text[1:]) == text else text


def csv_line(cells: Iterable[str]) -> str:
    """A row of a CSV, without its line end; cells that hold a line end of any kind are quoted."""
    line = io.StringIO()
    csv.writer(line, lineterminator='\r\n').writerow(cells)  # it quotes what holds a letter of its line end
    return line.getvalue().removesuffix('\r\n')


def spreadsheet_csv(table: pd.DataFrame, **options: Any) -> str:
    """A table as CSV whose texts, as cells and as names of rows and columns, no spreadsheet computes.

    Args:
        table: The table.
        options: Further ones of `DataFrame.to_csv`.
    """
    table = table.map(_spreadsheet_cell).rename(index=_spreadsheet_cell, columns=_spreadsheet_cell)
    text: str = table.to_csv(**options)
    if '\r' in text:  # the module csv does not quote a carriage return, which ends a row for those that read it
        text = table.to_csv(quoting=csv.QUOTE_NONNUMERIC, **options)
    return text


def _spreadsheet_cell(value: Any) -> Any:
    return spreadsheet_text(value) if isinstance(value, str) else value


def markdown_text(text: str) -> str:
    """A text within a line or a table cell of Markdown, shown as it is: no markup, HTML, link, or end of line or cell.

    Signs that are markup in some places alone, such as an underscore between letters, stay bare in others.
    """
    return _MARKUP.sub(r'\\\g<0>', printable(text))


def markdown_code(text: str) -> str:
    """A text as a span of code in Markdown, whatever backticks it holds."""
    text = printable(text)
    fence = '`' * (1 + max(map(len, re.findall('`+', text)), default=0))
    blank = ' ' * (text[:1] in ('`', '') or text[-1:] == '`')
    return f'{fence}{blank}{text}{blank}{fence}'


def cell_text(text: object) -> str:
    """A cell of a table for people: on one line, and of a bounded length."""
    return shortened(str(text), _CELL)


def shown(text: str) -> str:
    """A text of several lines, without anything else that is not printable, such as marks that turn its direction."""
    return printable(text, keep='\n\t')


def picture_text(text: str, most: int) -> str:
    """A text as matplotlib shows it literally and at no great length: a dollar sign would start a formula."""
    return shortened(text, most).replace('$', r'\$')
