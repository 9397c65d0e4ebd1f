"""The unlabelled images of a run: rows without a label, and what `--unlabelled` names."""
from collections.abc import Iterable
from glob import escape

from timm_multilabel.assembly.device import loader_workers
from timm_multilabel.assembly.pool_shards import scored_images, stream_of, without_images_of
from timm_multilabel.assembly.splits import Splits, read_split_table
from timm_multilabel.config.train import TrainSettings
from timm_multilabel.data.pool import join_rows, real_paths, rows_of_folder, rows_of_table, without_images
from timm_multilabel.data.shards import Shards, find_shards
from timm_multilabel.data.split_names import find_split, split_path
from timm_multilabel.data.streams import StreamedRows
from timm_multilabel.data.table import Rows
from timm_multilabel.data.table_format import TableFormat
from timm_multilabel.distributed import world
from timm_multilabel.errors import DataError
from timm_multilabel.labels import LabelSpace
from timm_multilabel.log import Say
from timm_multilabel.places import path_of
from timm_multilabel.stores import is_address

_TIMES_LABELLED = 7  # FixMatch's ratio of unlabelled to labelled images


def wants_pool(settings: TrainSettings) -> bool:
    """Whether batches hold unlabelled images of their own: a setting asks for them, and a term learns from them."""
    pool = settings.pool
    terms = pool.entropy_weight or pool.marginal_entropy_weight or pool.pseudo_label_weight
    asked_for = pool.unlabelled or pool.unlabelled_batch_size
    return bool(terms or learns_from_all(settings) and asked_for)


def learns_from_all(settings: TrainSettings) -> bool:
    """Whether something learns from every image, labelled or not: SimCLR, or what learns from teachers."""
    teaching = settings.teaching
    return bool(settings.objective.simclr_loss_weight or teaching.teacher or teaching.teacher_features)


def find_pool(
        settings: TrainSettings,
        label_space: LabelSpace,
        unlabelled: Rows | None,
        labelled: Rows | StreamedRows,
        splits: Splits,
        say: Say,
) -> Rows | StreamedRows:
    """The unlabelled images: rows of the training table, and what `--unlabelled` names; no labelled or scored image.

    Args:
        settings: Of the run, or of a phase.
        label_space: The heads.
        unlabelled: The rows of the training table that have no label; None of shards.
        labelled: The others.
        splits: Counts samples.
        say: Tells a line.

    Raises:
        DataError: There are none.
    """
    named = find_unlabelled(settings, label_space, say) if settings.pool.unlabelled else None
    files = real_paths(labelled.images) if isinstance(labelled, Rows) else []
    if isinstance(named, Shards):
        if unlabelled is not None and len(unlabelled):
            say(f'{unlabelled.source}: {len(unlabelled):,} rows without a label are left out, as the unlabelled images '
                f'are in shards; write them into {named.source} too, if they are not there')
        counted = not settings.run.epoch_steps and settings.pool.epoch_by != 'labelled'
        return stream_of(settings, named, label_space, files, splits, counted, say)
    parts = [unlabelled] if unlabelled is not None and len(unlabelled) else []
    parts += [named] if named is not None else []
    if not parts:
        raise DataError(
            f'{labelled.source}: every row has a label, so there is no unlabelled image; name some with --unlabelled')
    pool = without_scored(settings, join_rows(parts, label_space), files, say)
    if not len(pool):
        raise DataError(
            f'{pool.source}: all of its images are labelled or scored elsewhere; name others with --unlabelled')
    return pool


def choose_pool_batch(settings: TrainSettings, pool: Rows | StreamedRows, say: Say) -> int:
    """Unlabelled images of a batch on each rank: those asked for, else as many as labelled ones.

    With pseudo-labels alone, which need many of them to find some that are sure, it is FixMatch's 7 times as many, or
    all that there are.
    """
    asked, size, ranks = settings.pool.unlabelled_batch_size, settings.run.batch_size, world()[1]
    if asked or not settings.pool.pseudo_label_weight or settings.objective.simclr_loss_weight:
        return asked or size
    wanted, most = _TIMES_LABELLED * size, max(1, len(pool) // ranks)
    found = min(wanted, most)
    say(f'--unlabelled-batch-size {found}: ' + (
        f'{_TIMES_LABELLED} times -b, as pseudo-labels have it without SimCLR' if found == wanted else
        f'all of the {len(pool)} unlabelled images in each step, as they are fewer than {_TIMES_LABELLED} times -b'))
    return found


def simclr_sets(
        settings: TrainSettings,
        rows: Rows | StreamedRows,
        label_space: LabelSpace,
        splits: Splits,
        batch_size: int,
        say: Say,
) -> list[tuple[Rows | StreamedRows, int]]:
    """For SimCLR alone, where all images are one set: the training rows and what `--unlabelled` names, and how many of
    each a batch holds. Where one of them is in shards, each of both has its share of the batch.

    Args:
        settings: Of the run, or of a phase.
        rows: The training rows, whatever labels they have.
        label_space: No heads.
        splits: Counts samples.
        batch_size: Images of a batch.
        say: Tells a line.

    Raises:
        DataError: `--unlabelled` names nothing that can be read.
    """
    if not settings.pool.unlabelled:
        return [(rows, batch_size)]
    named = find_unlabelled(settings, label_space, say)
    if isinstance(named, Shards):
        files = real_paths(rows.images) if isinstance(rows, Rows) else []
        further: Rows | StreamedRows = stream_of(settings, named, label_space, files, splits, True, say)
    elif isinstance(rows, Rows):
        return [(join_rows([rows, without_scored(settings, named, [], say)], label_space), batch_size)]
    else:
        further = without_scored(settings, named, [], say)
    share = round(batch_size * len(further) / (len(rows) + len(further)))
    sets = [(rows, batch_size - share), (further, share)]
    for its, size in sets:
        if not size:
            say(f'{its.source}: {len(its):,} of {len(rows) + len(further):,} images are less than one in a batch of '
                f'{batch_size}: left out')
    return [(its, size) for its, size in sets if size]


def find_unlabelled(settings: TrainSettings, label_space: LabelSpace, say: Say) -> Rows | Shards:
    """What `--unlabelled` names: a table, a folder of images, or shards, which may lie in a folder too.

    Raises:
        DataError: There is no such thing, or images are missing.
    """
    data, source = settings.data, settings.pool.unlabelled
    assert source is not None  # else nobody asks
    folder, written = path_of(data.data_dir), TableFormat.of(data)
    split = find_split(folder, source, written)
    if isinstance(split, Shards):
        return split
    if split is not None and not split.is_dir():
        return rows_of_table(read_split_table(data, split), label_space)
    for place in (path_of(source), folder / source):
        if place.is_dir():
            inside = str(place) if is_address(place) else escape(str(place.absolute()))
            found = [find_shards(folder, f'{inside}/*{ending}', written.image_column, written.missing_value)
                     for ending in ('.tar', '.parquet')]
            return found[0] or found[1] or rows_of_folder(place, label_space, say)
    looked = '' if is_address(source) else (
        f'; looked for {split_path(folder, source)}, {folder / source} and {source}')
    raise DataError(
        f'--unlabelled {source}: no such CSV, folder, shards or split{looked}; name your own photos with '
        '--unlabelled FOLDER')


def without_scored(settings: TrainSettings, rows: Rows, taken: Iterable[str], say: Say) -> Rows:
    """Unlabelled rows whose images are not labelled or scored, which would be counted or known twice.

    Args:
        settings: Of the run, or of a phase.
        rows: Unlabelled ones.
        taken: The files of labelled images.
        say: Tells a line.
    """
    files, shards = scored_images(settings, None, say)
    left = without_images_of(
        without_images(rows, {*files, *taken}), shards, loader_workers(settings.data.workers), say)
    if len(left) < len(rows):
        say(f'{len(rows) - len(left)} of {len(rows)} unlabelled images are labelled, or of the val or test split: '
            'left out')
    return left
