"""`timm-multilabel search`."""
import sys
from collections.abc import Sequence

from timm_multilabel.api.search import run_search
from timm_multilabel.cli.output import end_with_bad_images, say
from timm_multilabel.config.commands import SearchSettings
from timm_multilabel.errors import shortened
from timm_multilabel.reports.contact_sheet import SheetRow


def run(settings: SearchSettings) -> None:
    """Search, and print what was found as a table unless it is drawn; exit status 1 where a query could not be read."""
    found = run_search(settings)
    for line in found.bad:
        say(line, sys.stderr)
    if found.sheet is None:
        print('\n'.join(table_lines(found.rows)))
    else:
        say(f'sheet: {found.sheet}')
    end_with_bad_images(len(found.bad), found.queries)


def table_lines(rows: Sequence[SheetRow]) -> list[str]:
    """A line for each image found: query, rank, similarity, image."""
    width = max(len('query'), *(len(_path(row.query)) for row in rows))
    lines = [f'{"query":<{width}}  rank  similarity  image']
    for row in rows:
        lines += [f'{_path(row.query):<{width}}  {rank:>4}  {cosine:>10.4f}  {_path(image)}'
                  for rank, (image, cosine) in enumerate(row.found, 1)]
    return lines


def _path(path: str) -> str:
    return shortened(path, 4096)
