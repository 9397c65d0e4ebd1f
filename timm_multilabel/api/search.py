"""Find the images among embeddings that are nearest to query images."""
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from timm_multilabel.api.arguments import api_function, make_settings, refuse_launched
from timm_multilabel.assembly.reading import batches_of, load_checkpoint_model, new_file, read_rows, workers_of
from timm_multilabel.config.commands import SearchSettings
from timm_multilabel.errors import UserError
from timm_multilabel.files import write_atomic
from timm_multilabel.inference.approximate import import_faiss, nearest_approximately
from timm_multilabel.inference.embedding_parts import open_embeddings
from timm_multilabel.inference.embeddings import check_maker, embed_part
from timm_multilabel.inference.neighbours import nearest_of
from timm_multilabel.log import say
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
        recall: Of an approximate search: the share of the nearest images that it found, measured on a sample of the
            queries.
    """
    rows: Sequence[SheetRow]
    bad: Sequence[str]
    queries: int
    sheet: Path | None
    recall: float | None = None

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
        embeddings: A file, or a folder of parts, that `embed` wrote.
        images: The queries: files, folders, globs or CSVs.
        checkpoint: The checkpoint that made the embeddings.
        **settings: The settings, named as the flags.

    Raises:
        UserError: Embeddings, images or checkpoint do not allow it.
    """
    refuse_launched()
    named = [images] if isinstance(images, str | Path) else images
    return run_search(make_settings(SearchSettings, {
        **settings, 'embeddings': embeddings, 'images': list(map(str, named)), 'checkpoint': checkpoint}))


def run_search(settings: SearchSettings) -> SearchResult:
    """Search, and draw the picture that is asked for.

    Raises:
        UserError: Embeddings, images or checkpoint do not allow it.
    """
    if settings.approximate is not None:
        import_faiss()  # else it would be missed after the work
    embeddings = open_embeddings(settings.embeddings)
    made_by = embeddings.made_by
    checkpoint = read_checkpoint(settings.checkpoint)
    if checkpoint.arch != made_by['arch']:
        raise UserError(f'{settings.embeddings}: made by a {made_by["arch"]}, and {checkpoint.path} is a '
                        f'{checkpoint.arch}; name the checkpoint that made it')
    loaded = load_checkpoint_model(settings, checkpoint, made_by['weights'])
    check_maker(made_by, settings.embeddings, loaded)
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
    if queries.width != embeddings.width:
        raise UserError(f'{settings.embeddings}: its {embeddings.width} numbers an image are not what the checkpoint '
                        'makes; embed the images again')
    vectors, device, recall = torch.from_numpy(queries.vectors), loaded.precision.device, None
    if settings.approximate is None:
        cosines, indices = nearest_of(vectors.to(device), map(torch.from_numpy, embeddings.chunks()), count)
    else:
        approximate = nearest_approximately(
            vectors, embeddings.chunks, len(embeddings), count, settings.approximate, device)
        cosines, indices, recall = approximate.cosines, approximate.indices, approximate.recall
        say(f'--approximate {settings.approximate:g}: finds {100 * recall:.1f} % of the {count} nearest images, as the '
            f'exact search for {approximate.sample} of the queries says')
    found = [
        SheetRow(query, list(zip(names, its_cosines))) for query, names, its_cosines
        in zip(queries.images, embeddings.names(indices.cpu().numpy()).tolist(), cosines.tolist())]
    if sheet is not None:
        picture = io.BytesIO()
        draw_sheet(found).save(picture, format=_PICTURES[sheet.suffix], quality=90)
        write_atomic(sheet, picture.getvalue())
    return SearchResult(found, bad, len(rows), sheet, recall)
