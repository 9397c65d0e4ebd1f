"""Where images lie in a checkpoint's space: features or projections with the images' paths, for search."""
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm_multilabel.api.arguments import api_function, make_settings
from timm_multilabel.assembly.reading import (
    batches_of,
    check_names,
    load_checkpoint_model,
    new_file,
    read_rows,
    workers_of,
)
from timm_multilabel.config.commands import EmbedSettings
from timm_multilabel.inference.embeddings import SUFFIXES, Embeddings, embed_part, import_pyarrow
from timm_multilabel.training.checkpoint import read_checkpoint
from timm_multilabel.training.progress_bar import ProgressBar


@dataclass(frozen=True)
class Embedded:
    """The embeddings of images, and what could not be read.

    Args:
        embeddings: The vectors (N, D), float32, with the images' paths.
        weights: The weights of the checkpoint that made them.
        bad: A line on each image that could not be read.
        images: Images asked for.
        path: The file that was written.
    """
    embeddings: Embeddings
    weights: str
    bad: Sequence[str]
    images: int
    path: Path


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
        out: The file to write: .npz or .parquet.
        **settings: The settings, named as the flags.

    Raises:
        UserError: Checkpoint, images or settings do not allow it.
    """
    named = [images] if isinstance(images, str | Path) else images
    return run_embedding(make_settings(EmbedSettings, {
        **settings, 'checkpoint': checkpoint, 'images': list(map(str, named)), 'out': out}))


def run_embedding(settings: EmbedSettings) -> Embedded:
    """Embed images.

    Raises:
        UserError: Checkpoint, images or settings do not allow it.
    """
    path = new_file(settings.out, '--out', SUFFIXES, settings.force)
    if path.suffix == '.parquet':
        import_pyarrow(path)  # else it would be missed after the work
    checkpoint = read_checkpoint(settings.checkpoint)
    loaded = load_checkpoint_model(settings, checkpoint, settings.weights)
    rows = read_rows(settings, checkpoint, loaded.model.label_space)
    if path.suffix == '.parquet':
        check_names(rows, f'{path}, a Parquet file,', 'name a .npz file')
    dataset = loaded.part(rows, keep_bad=True)
    with ProgressBar('Embed', batches_of(settings, checkpoint, rows), visible=True) as progress:
        embeddings, bad = embed_part(
            loaded, dataset, settings.what, settings.batch_size, workers_of(settings), progress)
    embeddings.save(path)
    return Embedded(embeddings, loaded.weights, bad, len(rows), path)
