"""The results of a validation as text: a block for each kind of head, none wider than a page."""
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from timm_multilabel.errors import abbreviated

_WIDTH = 100  # columns of a line
_NAME, _TITLE = 40, 24  # letters of a head's name and of a metric's
_LAST = ('loss', 'labels')  # metrics that stand at the end of a line


def results_lines(results: Mapping[str, Any], kinds: Mapping[str, str]) -> Iterator[str]:
    """A block for each kind of head: its metrics as columns, a line for each head, a dash where there is no value.

    A block of more columns than a line has room for goes on below itself. The means over heads stand in the block where
    there is one, else in a block of their own.

    Args:
        results: 'heads' {head: {metric: value}} and 'mean' {metric: value}; values that are no numbers are left out.
        kinds: The kind of each head; none of heads that only neighbours were asked about.
    """
    blocks: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for name, values in results['heads'].items():
        blocks.setdefault(kinds.get(name, ''), []).append((abbreviated(name, _NAME), values))
    mean = ('weighted mean', results['mean'])
    if len(blocks) == 1:
        next(iter(blocks.values())).append(mean)
    else:
        blocks['all kinds'] = [mean]
    for number, (kind, rows) in enumerate(blocks.items()):
        if number:
            yield ''
        yield from _block(kind, rows)


def _block(kind: str, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[str]:
    """The lines of a block."""
    titles = list(dict.fromkeys(
        title for _, values in rows for title, value in values.items() if isinstance(value, int | float)))
    titles.sort(key=lambda title: _LAST.index(title) + 1 if title in _LAST else 0)
    columns = []
    for title in titles:
        cells = [abbreviated(title, _TITLE), *(_cell(values.get(title)) for _, values in rows)]
        width = max(map(len, cells))
        columns.append([f'  {cell:>{width}}' for cell in cells])
    names = [abbreviated(kind, _NAME), *(name for name, _ in rows)]
    width = max(map(len, names))
    names = [f'{name:<{width}}' for name in names]
    while columns:
        taken = 1
        while taken < len(columns) and width + sum(len(column[0]) for column in columns[:taken + 1]) <= _WIDTH:
            taken += 1
        yield from (''.join(cells).rstrip() for cells in zip(names, *columns[:taken]))
        columns = columns[taken:]


def _cell(value: Any) -> str:
    """A value; a dash where there is none, or it cannot be computed."""
    if value is None or value != value:
        return '-'
    return f'{value:.3f}' if isinstance(value, float) else str(value)
