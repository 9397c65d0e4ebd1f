"""Texts of the user's data, made harmless for the programs that open reports."""
import re

from timm_multilabel.errors import printable


def spreadsheet_text(text: str) -> str:
    """A cell of a CSV that spreadsheets show as it is: with a `'` before what they would compute as a formula.

    See https://owasp.org/www-community/attacks/CSV_Injection.
    """
    return f"'{text}" if text.startswith(('=', '+', '-', '@', '\t', '\r')) else text


def markdown_text(text: str) -> str:
    """A text within a line or a table cell of Markdown, shown as it is: no markup, HTML, or end of line or cell."""
    return re.sub(r'([\\`*_\[\]<>|~&$#@:!{}])', r'\\\1', printable(text))
