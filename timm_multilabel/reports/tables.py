"""Tables of texts as Markdown and HTML, whatever the texts hold."""
from collections.abc import Collection, Mapping

import pandas as pd

from timm_multilabel.escaping import cell_text, html_text, markdown_text


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


def html_table(table: pd.DataFrame, classes: Mapping[int, str]) -> str:
    """A table of texts as HTML, its first column as row headings.

    Args:
        table: The texts.
        classes: The CSS class of rows, by number.
    """
    # Words in spans, so that a page can keep the dashes of a flag with its name.
    words = [' '.join(f'<span>{html_text(word)}</span>' for word in cell_text(name).split()) for name in table.columns]
    head = ''.join(f'<th scope="col">{name}</th>' for name in words)
    lines = ['<div class="scroll"><table>', f'<thead><tr>{head}</tr></thead>', '<tbody>']
    for number, (first, *cells) in enumerate(table.to_numpy().tolist()):
        row = ''.join(f'<td>{html_text(cell_text(cell))}</td>' for cell in cells)
        of_row = f' class="{classes[number]}"' if number in classes else ''
        lines.append(f'<tr{of_row}><th scope="row">{html_text(cell_text(first))}</th>{row}</tr>')
    return '\n'.join([*lines, '</tbody>', '</table></div>'])
