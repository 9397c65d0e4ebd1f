"""How the tables of a data directory are written: what commands know of them before they are read."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from timm_multilabel.config.train import DataSettings


@dataclass(frozen=True)
class TableFormat:
    """How tables are written.

    Args:
        image_column: The column of the image paths.
        separator: The character between the cells of a CSV, or `WHITESPACE`; by default a comma if the header has one
            outside of quotes, else a tab, `;` or `|` that it has.
        missing_value: A further text that means a missing label; see `missing_texts`.
        image_root: The folder that image paths are relative to; None to look for it, see `find_images`.
        class_head: What the head of class folders is called.
    """
    image_column: str = DataSettings.image_column
    separator: str | None = None
    missing_value: str | None = None
    image_root: str | None = None
    class_head: str = DataSettings.class_head

    @classmethod
    def of(cls, *sources: Any) -> TableFormat:
        """The format that settings, or those of a checkpoint, say; the first of them that says something counts."""
        def said(name: str) -> Any:
            values = (source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)
                      for source in sources)
            return next((value for value in values if value is not None), None)

        return cls(**{each.name: value for each in fields(cls) if (value := said(each.name)) is not None})
