"""Where images lie in a checkpoint's space: features or projections with the images' paths, for search."""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from timm_multilabel.api.arguments import api_function, make_settings, refuse_launched
from timm_multilabel.assembly.in_parts import write_in_parts
from timm_multilabel.assembly.reading import (
    batches_of,
    check_names,
    in_one_process,
    load_checkpoint_model,
    new_file,
    read_rows,
    workers_of,
)
from timm_multilabel.config.commands import EmbedSettings
from timm_multilabel.data.table import Rows
from timm_multilabel.inference.embedding_parts import open_embeddings
from timm_multilabel.inference.embeddings import (
    SUFFIXES,
    Embeddings,
    embed_part,
    embeddings_of,
    import_pyarrow,
    points_of,
)
from timm_multilabel.inference.loaded import LoadedModel
from timm_multilabel.inference.parts import Plan, folder_of, is_folder, refuse_part_rows
from timm_multilabel.loading.batches import ImageDataset
from timm_multilabel.training.checkpoint import read_checkpoint
from timm_multilabel.training.progress_bar import ProgressBar


@dataclass(frozen=True)
class Embedded:
    """Embeddings that were written, and what could not be read.

    Args:
        path: The file, or the folder of parts.
        count: Images that were embedded.
        width: Numbers of each.
        weights: The weights of the checkpoint that made them.
        images: Images asked for.
        bad: A line on each image that could not be read; of a folder, on the first ten.
    """
    path: Path
    count: int
    width: int
    weights: str
    images: int
    bad: Sequence[str]

    @property
    def embeddings(self) -> Embeddings:
        """The vectors (N, D), float32, with the images' paths, read from the file or from all parts."""
        return open_embeddings(self.path).whole()


@api_function(EmbedSettings)
def embed(
        checkpoint: str | Path,
        images: str | Path | Sequence[str | Path],
        out: str | Path,
        **settings: Any,
) -> Embedded:
    """Write images' features or projections to a file.

    Args:
        checkpoint: A checkpoint of a run.
        images: Files, folders, globs or CSVs.
        out: The file to write, .npz or .parquet; or a folder of Parquet parts, which ends in / or is there.
        **settings: The settings, named as the flags.

    Raises:
        UserError: Checkpoint, images or settings do not allow it.
    """
    refuse_launched()
    named = [images] if isinstance(images, str | Path) else images
    made = run_embedding(make_settings(EmbedSettings, {
        **settings, 'checkpoint': checkpoint, 'images': list(map(str, named)), 'out': out}))
    assert made is not None  # only ranks other than the first have none
    return made


def run_embedding(settings: EmbedSettings) -> Embedded | None:
    """Embed images, into a folder of parts also in several processes.

    Returns:
        What was written; None on ranks other than the first.

    Raises:
        UserError: Checkpoint, images or settings do not allow it.
    """
    if is_folder(settings.out):
        return _embed_in_parts(settings)
    refuse_part_rows(settings.changed())
    path = new_file(settings.out, '--out', SUFFIXES, settings.force, f', or a folder for parts: {settings.out}/')
    if path.suffix == '.parquet':
        import_pyarrow(path)  # else it would be missed after the work
    checkpoint = read_checkpoint(settings.checkpoint)
    loaded = load_checkpoint_model(settings, checkpoint, settings.weights, in_one_process(settings.out))
    rows = read_rows(settings, checkpoint, loaded.model.label_space)
    if path.suffix == '.parquet':
        check_names(rows, f'{path}, a Parquet file,', 'name a .npz file')
    dataset = loaded.part(rows, keep_bad=True)
    with ProgressBar('Embed', batches_of(settings, checkpoint, rows), visible=True) as progress:
        embeddings, bad = embed_part(
            loaded, dataset, settings.what, settings.batch_size, workers_of(settings), progress)
    embeddings.save(path)
    return Embedded(path, len(embeddings), embeddings.width, loaded.weights, len(rows), bad)


def _embed_in_parts(settings: EmbedSettings) -> Embedded | None:
    """`run_embedding` into a folder."""
    folder = folder_of(settings.out)
    import_pyarrow(folder)
    checkpoint = read_checkpoint(settings.checkpoint)
    loaded = load_checkpoint_model(settings, checkpoint, settings.weights, '')
    made_by = loaded.maker(settings.what)

    def read() -> Rows:
        rows = read_rows(settings, checkpoint, loaded.model.label_space)
        check_names(rows, f'{folder}, a folder of Parquet files,', 'name a .npz file')
        return rows

    plan = partial(Plan, 'embed', made_by, {'--amp': settings.amp}, part_rows=settings.part_rows)
    manifest = write_in_parts(folder, read, plan, loaded, _Points(settings, loaded, made_by), settings.force)
    if manifest is None:
        return None
    bank = open_embeddings(folder)
    return Embedded(folder, len(bank), bank.width, loaded.weights, manifest.plan.images, manifest.reasons)


@dataclass(frozen=True)
class _Points:
    """Makes embeddings in parts; see `Work`."""
    settings: EmbedSettings
    loaded: LoadedModel
    made_by: dict[str, Any]

    def batches(self, part: ImageDataset, block: int) -> Iterator[np.ndarray]:
        its = self.settings
        return points_of(self.loaded, part, its.what, its.batch_size, workers_of(its), block)

    def table(self, part: ImageDataset, made: Sequence[np.ndarray], rows: slice) -> Any:
        return embeddings_of(self.loaded, part, self.made_by, made, rows).table()
