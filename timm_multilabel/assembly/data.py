"""From the flags of training to its rows: labelled, unlabelled, evaluation."""
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from timm_multilabel.assembly import head_options
from timm_multilabel.assembly.pool import (
    choose_pool_batch,
    find_pool,
    learns_from_all,
    simclr_sets,
    wants_pool,
)
from timm_multilabel.assembly.splits import Splits, read_split_table, read_stored, stored_heads
from timm_multilabel.cells import missing_texts
from timm_multilabel.config.train import DataSettings, TrainSettings
from timm_multilabel.config.values import HeadOptions
from timm_multilabel.data.columns import choose_columns
from timm_multilabel.data.pool import keep_labels, split_labelled
from timm_multilabel.data.remarks import how_read, useless_labels
from timm_multilabel.data.split_names import check_folder, table_of_classes
from timm_multilabel.data.streams import Stored, StreamedRows, StreamedTable, encode
from timm_multilabel.data.table import (
    Rows,
    Table,
    check_single_class,
    describe_unknown,
    find_label_space,
    unknown_labels,
)
from timm_multilabel.data.table_format import TableFormat
from timm_multilabel.distributed import world
from timm_multilabel.errors import DataError, SettingError, listed
from timm_multilabel.heads import Head, load_registry
from timm_multilabel.labels import LabelSet, LabelSpace, TagSet
from timm_multilabel.log import Say
from timm_multilabel.places import path_of


@dataclass(frozen=True)
class Data:
    """What a run, or a phase of it, learns from.

    Args:
        label_space: The heads.
        registry: The kinds of heads there are.
        head: What `--head` says, by head.
        train_rows: The rows of the (labelled) batches.
        pool_rows: The rows of the unlabelled batches, or None.
        eval_rows: The rows that are scored; None where no head is trained.
        batch_size: Images of a batch of `train_rows`, on each rank.
        pool_batch_size: Images of a batch of `pool_rows`, on each rank.
        steps: Batches of an epoch.
    """
    label_space: LabelSpace
    registry: Mapping[str, type[Head]]
    head: HeadOptions
    train_rows: Rows | StreamedRows
    pool_rows: Rows | StreamedRows | None
    eval_rows: Rows | StreamedRows | None
    batch_size: int
    pool_batch_size: int
    steps: int

    def __str__(self) -> str:
        pool = ''
        if self.pool_rows is not None:
            is_counted = isinstance(self.pool_rows, Rows) or self.pool_rows.is_counted
            pool = f' and {len(self.pool_rows) if is_counted else "uncounted ones"} without labels'
        scored = f', {len(self.eval_rows)} to evaluate on' if self.eval_rows is not None else ''
        return f'{len(self.train_rows)} images to train on{pool}{scored}'


def read_data(settings: TrainSettings, say: Say) -> Data:
    """Read what the flags name.

    Raises:
        DataError: Something is missing, cannot be read, or is too small for its batches.
    """
    folder = path_of(settings.data.data_dir)
    check_folder(folder)
    registry = load_registry(settings.data.head_module)
    dialect = head_options.dialect(settings.data)
    splits = _splits(settings, folder, registry, say)
    train = splits.read(settings.data.train_split)
    streamed = isinstance(train, StreamedTable)
    if settings.data.class_head != DataSettings.class_head and not train.path.is_dir():
        say(f'{train.path}: --class-head has no effect, since the heads are columns')
    if not settings.objective.classification_loss_weight:
        splits.save(None)
        return _without_heads(settings, train, registry, splits, say)
    if streamed and wants_pool(settings) and not settings.pool.unlabelled:
        raise DataError(
            f'{train.path}: all samples of shards are labelled ones, so there is no unlabelled image; name some with '
            '--unlabelled')

    all_path = table_of_classes(folder, TableFormat.of(settings.data))
    tables = [read_split_table(settings.data, all_path)] if all_path.is_file() else []
    given = head_options.match_columns(settings.data.head, train.label_columns)
    head_options.check_groups(given, train.label_columns)
    label_space, heads = splits.label_space if streamed else None, settings.data.heads
    if label_space is None:
        heads = _choose_heads(settings, given, train, say)
    head = head_options.expand(given, train.label_columns, heads)
    if label_space is None:
        label_space = find_label_space(
            [*tables, train], heads, head_options.readers(head, registry), head_options.groups(head), dialect)
    check_dialect(dialect, settings.data.missing_value, label_space, train.path)
    if not label_space.heads:
        raise DataError(
            f"{train.path}: no label column beside '{settings.data.image_column}'; add one, or pass -wlc 0 for SimCLR "
            'alone'
        )
    views = settings.augmentation
    if (views.mixup or views.cutmix) and not all(isinstance(labels, LabelSet) for labels in label_space.heads):
        raise DataError('--mixup and --cutmix mix classes, not tags or numbers; leave them out, or choose --heads')
    for name, options in head.items():
        if options.get('loss') == 'arcface' and name in label_space.names:
            check_single_class(train, name)
    # What is ignored is to be named, so the labels are read.
    val = splits.read(settings.data.val_split, spare=settings.data.unknown_labels == 'error')
    for labels in label_space.heads:
        for column in labels.columns:
            if column not in val.label_columns:
                raise DataError(
                    f"{val.path}: no column '{column}', which is a head; add it, or choose others with --heads")
    way_out = f'add rows with them to {all_path}'
    if label_space is splits.label_space:
        way_out = f'remove {folder / Stored.LABEL_SPACE}, so that it is made anew'
    train_rows = encode(train, label_space, way_out=f'{way_out}, or fix them')
    eval_rows = encode(val, label_space, settings.data.unknown_labels == 'ignore')
    if unknown := unknown_labels(val, label_space):
        say(f'{val.path}: labels that training does not know, not scored: {describe_unknown(unknown)}')
    splits.save(label_space if streamed and settings.data.heads is None else None)
    train_rows, pool_rows = _divide(settings, train_rows, label_space, splits, say)
    pool_batch_size = 0 if pool_rows is None else choose_pool_batch(settings, pool_rows, say)
    for line in (
        *how_read(train, label_space),
        *useless_labels(label_space, train_rows.targets, str(train.path), scored=False),
        *useless_labels(label_space, eval_rows.targets, str(val.path), scored=True),
    ):
        say(line)
    steps = _count_steps(settings, train_rows, settings.run.batch_size, pool_rows, pool_batch_size)
    return Data(
        label_space, registry, head, train_rows, pool_rows, eval_rows, settings.run.batch_size, pool_batch_size, steps)


def check_dialect(
        dialect: Mapping[str, str],
        missing_value: str | None,
        label_space: LabelSpace,
        source: Path,
) -> None:
    """Raise UserError where a flag says how tags in one column are written, and no head reads such tags."""
    for name, value in dialect.items():
        flag = {'separator': '--tag-separator', 'none': '--none-value'}[name]
        if not any(isinstance(labels, TagSet) and not labels.group for labels in label_space.heads):
            raise DataError(f"{flag} '{value}': no head of {source} reads tags in one column; leave it out, or pass "
                            '--head COLUMN:loss=tags')
        if name == 'none' and value in missing_texts(missing_value):
            raise DataError(f"{flag} '{value}': --missing-value is the same text; leave one of them out")


def _divide(
        settings: TrainSettings,
        rows: Rows | StreamedRows,
        label_space: LabelSpace,
        splits: Splits,
        say: Say,
) -> tuple[Rows | StreamedRows, Rows | StreamedRows | None]:
    """The rows of the (labelled) batches, and those of the unlabelled ones, if there are to be such.

    Raises:
        DataError: There are none of them, or fewer labels than `--labelled-rows` asks for.
    """
    asked = settings.pool.labelled_rows
    idle = 'with -wls 0 and without teachers, entropy or pseudo-labels nothing learns from images without labels'
    if isinstance(rows, StreamedRows):
        if asked:
            raise DataError(f'--labelled-rows {asked}: {rows.source} are shards; train on a CSV')
        if wants_pool(settings):
            return rows, find_pool(settings, label_space, None, rows, splits, say)
        if settings.pool.unlabelled:
            say(f'--unlabelled {settings.pool.unlabelled}: {idle}: left out')
        return rows, None
    if asked:
        rows = _hide_labels(rows, label_space, asked, settings.run.seed, say)
    if wants_pool(settings):
        labelled, without = split_labelled(rows, label_space)
        if not len(labelled):
            raise DataError(f'{rows.source}: no row has a label; pass -wlc 0 for SimCLR alone')
        return labelled, find_pool(settings, label_space, without, labelled, splits, say)
    if learns_from_all(settings) and not asked:
        return rows, None
    labelled, without = split_labelled(rows, label_space)
    if settings.pool.unlabelled or len(without) and not asked:
        say(f'{rows.source}: {idle}: left out')
    return labelled, None


def _hide_labels(rows: Rows, label_space: LabelSpace, asked: int, seed: int, say: Say) -> Rows:
    """The labels of so many rows alone.

    Raises:
        DataError: There are not so many.
    """
    labelled = int(label_space.labelled(rows.targets).any(dim=1).sum())
    if labelled < asked:
        raise DataError(f'--labelled-rows {asked}: {rows.source} has {labelled} rows with labels; ask for as many at '
                        'most')
    say(f'{rows.source}: the labels of {asked} of {labelled} rows, drawn by --seed {seed}')
    return keep_labels(rows, label_space, asked, seed)


def _choose_heads(
        settings: TrainSettings,
        given: HeadOptions,
        train: Table,
        say: Say,
) -> list[str]:
    """The heads to learn, after a look at the columns, which is told.

    Raises:
        DataError: A column looks like a number, and no flag says what it is.
    """
    columns = choose_columns(train, settings.data.heads, given, head_options.groups(given), settings.data.tag_separator)
    for line in columns.lines():
        say(f'{train.path}: {line}')
    for name in columns.asked:
        for head, options in given.items():
            if head not in ('*', *train.label_columns) and not options.get('columns'):
                raise SettingError(f"--head {head}: no such column (there are: {listed(train.label_columns)})")
        raise DataError(f'{train.path}: {columns.question(name)}')
    return columns.heads


def _without_heads(
        settings: TrainSettings,
        train: Table,
        registry: Mapping[str, type[Head]],
        splits: Splits,
        say: Say,
) -> Data:
    """SimCLR alone: no image has a label that counts, so all of them are one set, and both batches of it."""
    label_space = LabelSpace(())
    batch_size = settings.run.batch_size + (settings.pool.unlabelled_batch_size or 0)
    (rows, size), *others = simclr_sets(
        settings, encode(train, label_space), label_space, splits, batch_size, say)
    if not others:
        return Data(label_space, registry, {}, rows, None, None, size, 0, _count_steps(settings, rows, size))
    pool, pool_size = others[0]
    _count_steps(settings, rows, size, pool, pool_size)
    steps = settings.run.epoch_steps or (len(rows) + len(pool)) // world()[1] // batch_size
    return Data(label_space, registry, {}, rows, pool, None, size, pool_size, steps)


def _splits(settings: TrainSettings, folder: Path, registry: Mapping[str, type[Head]], say: Say) -> Splits:
    data, stored, columns = settings.data, read_stored(folder), settings.data.heads
    if columns is not None:
        columns = [*columns, *(column for group in head_options.groups(data.head).values() for column in group)]
        columns = None if any(map(head_options.is_pattern, columns)) else columns  # which need the names of all
    known: LabelSpace | None = LabelSpace(())
    if settings.objective.classification_loss_weight:
        known = stored_heads(stored, data.head, data.heads, registry, head_options.dialect(data))
    return Splits(stored, known, say, TableFormat.of(data), columns)


def _count_steps(
        settings: TrainSettings,
        rows: Rows | StreamedRows,
        batch_size: int,
        pool: Rows | StreamedRows | None = None,
        pool_batch_size: int = 0,
) -> int:
    """The batches of an epoch.

    Raises:
        DataError: Rows do not fill a batch.
    """
    ranks = world()[1]
    steps = labelled = len(rows) // ranks // batch_size
    if not labelled:
        raise DataError(
            f'{rows.source}: {len(rows)} rows do not fill a batch of {batch_size} on each of {ranks} processes; '
            'lower -b')
    if pool is not None:
        unlabelled = len(pool) // ranks // pool_batch_size
        if not unlabelled:
            raise DataError(
                f'{pool.source}: {len(pool)} unlabelled images do not fill a batch of {pool_batch_size} on each of '
                f'{ranks} processes; lower --unlabelled-batch-size')
        by = {'labelled': labelled, 'unlabelled': unlabelled, 'larger': max(labelled, unlabelled)}
        steps = by[settings.pool.epoch_by]
    return settings.run.epoch_steps or steps
