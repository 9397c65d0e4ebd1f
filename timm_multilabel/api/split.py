"""Split one CSV of labels into train.csv, val.csv and test.csv, with all.csv beside them."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm_multilabel.api.arguments import api_function, make_settings
from timm_multilabel.config.commands import SplitSettings
from timm_multilabel.data.split import SPLITS, split_csv


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
def split(source: str | Path, *, image: str, heads: Sequence[str] | Mapping[str, str], **settings: Any) -> SplitTable:
    """Split one CSV of labels into train.csv, val.csv and test.csv.

    Args:
        source: The table with a row for each image.
        image: The path of a row's image, with columns in braces: './images/{id}.jpg'.
        heads: The label heads, or {head: column} where a column has another name.
        **settings: The settings, named as the flags.

    Raises:
        UserError: The table or settings do not allow it.
    """
    named = [f'{head}={column}' for head, column in heads.items()] if isinstance(heads, Mapping) else list(heads)
    return run_split(make_settings(SplitSettings, {**settings, 'source': source, 'image': image, 'heads': named}))


def run_split(settings: SplitSettings) -> SplitTable:
    """Split the CSV.

    Raises:
        UserError: The table or settings do not allow it.
    """
    folder = Path(settings.source).parent if settings.out is None else Path(settings.out)
    before = [path for name in SPLITS if (path := folder / f'{name}.csv').exists()]
    rows = split_csv(
        settings.source, folder, image=settings.image, heads=settings.heads, image_column=settings.image_column,
        separator=settings.separator, ratios=settings.ratios, seed=settings.seed, stratify=settings.stratify,
        group=settings.group, force=settings.force)
    return SplitTable(folder, rows, [path for path in before if not path.exists()])
