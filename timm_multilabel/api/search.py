"""Find the images among embeddings that are nearest to query images."""
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from timm_multilabel.api.arguments import api_function, make_settings
from timm_multilabel.assembly.reading import batches_of, load_checkpoint_model, new_file, read_rows, workers_of
from timm_multilabel.config.commands import SearchSettings
from timm_multilabel.errors import UserError
from timm_multilabel.files import write_atomic
from timm_multilabel.inference.embeddings import Embeddings, check_maker, embed_part
from timm_multilabel.inference.neighbours import nearest
from timm_multilabel.reports.contact_sheet import SheetRow, draw_sheet, sheet_size
from timm_multilabel.training.checkpoint import read_checkpoint
from timm_multilabel.training.progress_bar import ProgressBar

_PICTURES = {'.png': 'PNG', '.jpg': 'JPEG', '.jpeg': 'JPEG'}


@dataclass(frozen=True)
class SearchResult:
    """What was found for query images.

    Args:
        rows: The images found for each query, the nearest first, with their cosines.
        bad: A line on each query that could not be read.
        queries: Queries asked for.
        sheet: The picture that was drawn, if one was asked for.
    """
    rows: Sequence[SheetRow]
    bad: Sequence[str]
    queries: int
    sheet: Path | None

    @property
    def table(self) -> pd.DataFrame:
        """A row for each image found: query, rank, similarity (cosine), image."""
        return pd.DataFrame(
            [(row.query, rank, cosine, image)
             for row in self.rows for rank, (image, cosine) in enumerate(row.found, 1)],
            columns=['query', 'rank', 'similarity', 'image'])


@api_function(SearchSettings)
def search(
        embeddings: str | Path,
        images: str | Path | Sequence[str | Path],
        checkpoint: str | Path,
        **settings: Any,
) -> SearchResult:
    """Find the images that are nearest to query images.

    Args:
        embeddings: A file that `embed` wrote.
        images: The queries: files, folders, globs or CSVs.
        checkpoint: The checkpoint that made the embeddings.
        **settings: The settings, named as the flags.

    Raises:
        UserError: Embeddings, images or checkpoint do not allow it.
    """
    named = [images] if isinstance(images, str | Path) else images
    return run_search(make_settings(SearchSettings, {
        **settings, 'embeddings': embeddings, 'images': list(map(str, named)), 'checkpoint': checkpoint}))


def run_search(settings: SearchSettings) -> SearchResult:
    """Search, and draw the picture that is asked for.

    Raises:
        UserError: Embeddings, images or checkpoint do not allow it.
    """
    embeddings = Embeddings.load(settings.embeddings)
    made_by = embeddings.made_by
    checkpoint = read_checkpoint(settings.checkpoint)
    if checkpoint.arch != made_by['arch']:
        raise UserError(f'{settings.embeddings}: made by a {made_by["arch"]}, and {checkpoint.path} is a '
                        f'{checkpoint.arch}; name the checkpoint that made it')
    loaded = load_checkpoint_model(settings, checkpoint, made_by['weights'])
    check_maker(embeddings, settings.embeddings, loaded)
    rows = read_rows(settings, checkpoint, loaded.model.label_space)
    count = min(settings.count, len(embeddings))
    sheet = None
    if settings.sheet is not None:
        sheet = new_file(settings.sheet, '--sheet', tuple(_PICTURES), settings.force)
        sheet_size(len(rows), count)  # which raises where it is too large
    dataset = loaded.part(rows, keep_bad=True)
    with ProgressBar('Embed queries', batches_of(settings, checkpoint, rows), visible=True) as progress:
        queries, bad = embed_part(
            loaded, dataset, made_by['what'], settings.batch_size, workers_of(settings), progress)
    if queries.vectors.shape[1] != embeddings.vectors.shape[1]:
        raise UserError(f'{settings.embeddings}: its {embeddings.vectors.shape[1]} numbers an image are not what the '
                        'checkpoint makes; embed the images again')
    device = loaded.precision.device
    cosines, indices = nearest(
        torch.from_numpy(queries.vectors).to(device), torch.from_numpy(embeddings.vectors).to(device), count)
    found = [
        SheetRow(query, [(embeddings.images[index], cosine) for index, cosine in zip(*pair)])
        for query, *pair in zip(queries.images, indices.tolist(), cosines.tolist())]
    if sheet is not None:
        picture = io.BytesIO()
        draw_sheet(found).save(picture, format=_PICTURES[sheet.suffix], quality=90)
        write_atomic(sheet, picture.getvalue())
    return SearchResult(found, bad, len(rows), sheet)
