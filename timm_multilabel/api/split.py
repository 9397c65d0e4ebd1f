"""Split one table of labels, or class folders, into train.csv, val.csv and test.csv, with all.csv beside them."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm_multilabel.api.arguments import api_function, make_settings
from timm_multilabel.config.commands import SplitSettings
from timm_multilabel.data.split import SPLITS, split_csv
from timm_multilabel.places import local_path


@dataclass(frozen=True)
class SplitTable:
    """What came of a split.

    Args:
        folder: Where the splits are.
        rows: The rows of each, and of all; under 'missing' those that were left out, whose image is not there.
        removed: Files of an earlier split, which has no rows now.
    """
    folder: Path
    rows: Mapping[str, int]
    removed: Sequence[Path]


@api_function(SplitSettings)
def split(
        source: str | Path,
        *,
        image: str | None = None,
        heads: Sequence[str] | Mapping[str, str] | None = None,
        **settings: Any,
) -> SplitTable:
    """Split one table of labels, or a folder of class folders, into train.csv, val.csv and test.csv.

    Args:
        source: The table with a row for each image, or a folder with a folder of images for each class.
        image: The path of a row's image, with columns in braces: './images/{id}.jpg'; of a table.
        heads: The label heads, or {head: column} where a column has another name; of a table.
        **settings: The settings, named as the flags.

    Raises:
        UserError: The table or settings do not allow it.
    """
    if isinstance(heads, Mapping):
        heads = [f'{head}={column}' for head, column in heads.items()]
    of_table = {name: value for name, value in (('image', image), ('heads', heads)) if value is not None}
    return run_split(make_settings(SplitSettings, {**settings, 'source': source, **of_table}))


def run_split(settings: SplitSettings) -> SplitTable:
    """Split the table.

    Raises:
        UserError: The table or settings do not allow it.
    """
    source = local_path(settings.source)
    folder = (source if source.is_dir() else source.parent) if settings.out is None else local_path(settings.out)
    before = [path for name, ratio in zip(SPLITS, settings.ratios, strict=True) for ending in ('csv', 'jsonl')
              if not ratio and (path := folder / f'{name}.{ending}').exists()]
    rows = split_csv(
        source, folder, image=settings.image, heads=settings.heads, class_head=settings.class_head,
        image_column=settings.image_column, separator=settings.separator, ratios=settings.ratios, seed=settings.seed,
        stratify=settings.stratify, group=settings.group, force=settings.force)
    return SplitTable(folder, rows, [path for path in before if not path.exists()])
