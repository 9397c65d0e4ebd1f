"""Tables of texts for Markdown and HTML, whatever the texts hold."""
from collections.abc import Collection, Mapping
from typing import Any

import pandas as pd

from timm_multilabel.escaping import cell_text, markdown_text


def markdown_table(table: pd.DataFrame, strong: Collection[int] = ()) -> str:
    """A table of texts as Markdown, lined up for those who read it as it is.

    Args:
        table: The texts.
        strong: The rows in bold, by number.
    """
    rows = [list(table.columns), *table.to_numpy().tolist()]
    rows = [[markdown_text(cell_text(cell)) for cell in row] for row in rows]
    for number in strong:
        rows[1 + number] = [f'**{cell}**' if cell else '' for cell in rows[1 + number]]
    widths = [max(3, *map(len, column)) for column in zip(*rows)]
    lines = ['| ' + ' | '.join(f'{cell:<{width}}' for cell, width in zip(row, widths)) + ' |' for row in rows]
    lines.insert(1, '| ' + ' | '.join('-' * width for width in widths) + ' |')
    return '\n'.join(lines)


def html_table(table: pd.DataFrame, classes: Mapping[int, str]) -> dict[str, Any]:
    """A table of texts as experiments.html shows it: titles as lists of words, and rows.

    Args:
        table: The texts; the first column is that of the row headings.
        classes: The CSS class of rows, by number.
    """
    return {
        'titles': [cell_text(name).split() for name in table.columns],
        'rows': [{'css': classes.get(number, ''), 'cells': [cell_text(cell) for cell in cells]}
                 for number, cells in enumerate(table.to_numpy().tolist())]}
