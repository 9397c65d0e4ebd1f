"""The unlabelled images of a run: rows without a label, and what `--unlabelled` names."""
from pathlib import Path

from timm_multilabel.config.train import DataSettings, TrainSettings
from timm_multilabel.data.pool import join_rows, real_paths, rows_of_folder, rows_of_table, without_images
from timm_multilabel.data.shards import Shards
from timm_multilabel.data.split_names import find_split, split_path
from timm_multilabel.data.streams import StreamedRows
from timm_multilabel.data.table import Rows, Table, find_images, read_table
from timm_multilabel.data.table_format import TableFormat
from timm_multilabel.distributed import world
from timm_multilabel.errors import DataError, UserError
from timm_multilabel.labels import LabelSpace
from timm_multilabel.log import Say
from timm_multilabel.places import path_of

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


def read_split_table(data: DataSettings, path: Path) -> Table:
    """The CSV of a split, read as the settings say."""
    return read_table(path, TableFormat.of(data))


def find_pool(
        settings: TrainSettings,
        label_space: LabelSpace,
        unlabelled: Rows,
        labelled: Rows,
        say: Say,
) -> Rows:
    """The unlabelled images: rows of the training table, and what `--unlabelled` names; no labelled or scored image.

    Raises:
        DataError: There are none.
    """
    parts = [unlabelled] if len(unlabelled) else []
    if settings.pool.unlabelled:
        parts.append(_read_unlabelled(settings.data, settings.pool.unlabelled, label_space, say))
    if not parts:
        raise DataError(
            f'{unlabelled.source}: every row has a label, so there is no unlabelled image; name some with --unlabelled')
    taken = _scored(settings, say) | set(real_paths(labelled.images))
    pool = _leave_out(join_rows(parts, label_space), taken, say)
    if not len(pool):
        raise DataError(
            f'{pool.source}: all of its images are labelled or scored elsewhere; name others with --unlabelled')
    return pool


def choose_pool_batch(settings: TrainSettings, pool: Rows, say: Say) -> int:
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


def with_unlabelled(
        settings: TrainSettings,
        rows: Rows | StreamedRows,
        label_space: LabelSpace,
        say: Say,
) -> Rows | StreamedRows:
    """Rows, and those that `--unlabelled` names; for SimCLR alone, where all images are one set."""
    if not settings.pool.unlabelled or isinstance(rows, StreamedRows):
        return rows
    unlabelled = _read_unlabelled(settings.data, settings.pool.unlabelled, label_space, say)
    return join_rows([rows, _leave_out(unlabelled, _scored(settings, say), say)], label_space)


def _read_unlabelled(data: DataSettings, source: str, label_space: LabelSpace, say: Say) -> Rows:
    folder = path_of(data.data_dir)
    split = find_split(folder, source, TableFormat.of(data))
    if isinstance(split, Shards):
        raise DataError(f'--unlabelled {source}: {split.source} are shards; name a CSV or a folder of images')
    if split is not None and not split.is_dir():
        return rows_of_table(read_split_table(data, split), label_space)
    for path in (path_of(source), folder / source):
        if path.is_dir():
            return rows_of_folder(path, label_space, say)
    raise DataError(
        f'--unlabelled {source}: no such CSV, folder or split; looked for {split_path(folder, source)}, '
        f'{folder / source} and {source}; name your own photos with --unlabelled FOLDER')


def _scored(settings: TrainSettings, say: Say) -> set[str]:
    """The images that a model is scored on: those of the validation and the test split, unless asked for by name."""
    data, folder = settings.data, path_of(settings.data.data_dir)
    asked_for = [split_path(folder, name).resolve() for name in (data.train_split, settings.pool.unlabelled) if name]
    found: set[str] = set()
    for name in (data.val_split, 'test'):
        split = find_split(folder, name, TableFormat.of(data))
        if isinstance(split, Shards):
            say(f'{split.source}: cannot keep the images of shards out of the unlabelled ones')
        elif split is not None and split.resolve() not in asked_for:
            try:
                found.update(real_paths(find_images(read_split_table(data, split), passing_over=True)))
            except UserError as error:
                say(f'{error.line}: cannot keep its images out of the unlabelled ones')
    return found


def _leave_out(rows: Rows, taken: set[str], say: Say) -> Rows:
    """Rows whose images are not labelled or scored, which would be counted or known twice."""
    left = without_images(rows, taken)
    if len(left) < len(rows):
        say(f'{len(rows) - len(left)} of {len(rows)} unlabelled images are labelled, or of the val or test split: '
            'left out')
    return left
