"""From the flags of training to its rows: labelled, unlabelled, evaluation."""
import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from timm_multilabel.cells import missing_texts
from timm_multilabel.cli import head_options
from timm_multilabel.cli.flags import dialect
from timm_multilabel.cli.splits import Splits, read_stored, stored_heads
from timm_multilabel.data.columns import choose_columns
from timm_multilabel.data.pool import (
    join_rows,
    keep_labels,
    real_paths,
    rows_of_folder,
    rows_of_table,
    split_labelled,
    without_images,
)
from timm_multilabel.data.remarks import how_read, useless_labels
from timm_multilabel.data.shards import Shards
from timm_multilabel.data.split_names import check_folder, find_split, split_path
from timm_multilabel.data.streams import Stored, StreamedRows, StreamedTable, encode
from timm_multilabel.data.table import (
    Rows,
    Table,
    check_single_class,
    describe_unknown,
    find_images,
    find_label_space,
    read_table,
    unknown_labels,
)
from timm_multilabel.distributed import world
from timm_multilabel.errors import UserError
from timm_multilabel.heads import Head, load_registry
from timm_multilabel.labels import LabelSet, LabelSpace, TagSet


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
    head: head_options.Options
    train_rows: Rows | StreamedRows
    pool_rows: Rows | None
    eval_rows: Rows | StreamedRows | None
    batch_size: int
    pool_batch_size: int
    steps: int

    def __str__(self) -> str:
        pool = f' and {len(self.pool_rows)} without labels' if self.pool_rows is not None else ''
        scored = f', {len(self.eval_rows)} to evaluate on' if self.eval_rows is not None else ''
        return f'{len(self.train_rows)} images to train on{pool}{scored}'


def read_data(args: argparse.Namespace, say: Callable[[str], None]) -> Data:
    """Read what the flags name.

    Raises:
        UserError: Something is missing, cannot be read, or is too small for its batches.
    """
    folder = Path(args.data_dir)
    check_folder(folder)
    registry = load_registry(args.head_module)
    splits = _splits(args, folder, registry, say)
    train = splits.read(args.train_split)
    streamed = isinstance(train, StreamedTable)
    if streamed and (args.unlabelled or wants_pool(args)):
        raise UserError(
            f'{train.path}: shards go without --unlabelled and the terms that learn from it; leave them out, or train '
            'on a CSV')
    if not args.classification_loss_weight:
        splits.save(None)
        return _without_heads(args, folder, train, registry, say)

    all_path = folder / 'all.csv'
    tables = [_read(args, all_path)] if all_path.is_file() else []
    given = head_options.match_columns(args.head, train.label_columns)
    head_options.check_groups(given, train.label_columns)
    label_space, heads = splits.label_space if streamed else None, args.heads
    if label_space is None:
        heads = _choose_heads(args, given, train, say)
    head = head_options.expand(given, train.label_columns, heads)
    if label_space is None:
        label_space = find_label_space(
            [*tables, train], heads, head_options.readers(head, registry), head_options.groups(head), dialect(args))
    check_dialect(args, label_space, train.path)
    if not label_space.heads:
        raise UserError(
            f"{train.path}: no label column beside '{args.image_column}'; add one, or pass -wlc 0 for SimCLR alone")
    if (args.mixup or args.cutmix) and not all(isinstance(labels, LabelSet) for labels in label_space.heads):
        raise UserError('--mixup and --cutmix mix classes, not tags or numbers; leave them out, or choose --heads')
    for name, options in head.items():
        if options.get('loss') == 'arcface' and name in label_space.names:
            check_single_class(train, name)
    # What is ignored is to be named, so the labels are read.
    val = splits.read(args.val_split, spare=args.unknown_labels == 'error')
    for labels in label_space.heads:
        for column in labels.columns:
            if column not in val.label_columns:
                raise UserError(
                    f"{val.path}: no column '{column}', which is a head; add it, or choose others with --heads")
    way_out = f'add rows with them to {all_path}'
    if label_space is splits.label_space:
        way_out = f'remove {folder / Stored.LABEL_SPACE}, so that it is made anew'
    train_rows = encode(train, label_space, way_out=f'{way_out}, or fix them')
    eval_rows = encode(val, label_space, args.unknown_labels == 'ignore')
    if unknown := unknown_labels(val, label_space):
        say(f'{val.path}: labels that training does not know, not scored: {describe_unknown(unknown)}')
    splits.save(label_space if streamed and args.heads is None else None)
    if args.labelled_rows:
        train_rows = _hide_labels(args, train_rows, label_space, say)
    pool_rows, pool_batch_size = None, 0
    if wants_pool(args):
        train_rows, pool_rows = split_labelled(train_rows, label_space)
        if not len(train_rows):
            raise UserError(f'{train.path}: no row has a label; pass -wlc 0 for SimCLR alone')
        pool_rows = _find_pool(args, folder, label_space, pool_rows, train_rows, say)
        pool_batch_size = args.unlabelled_batch_size or args.batch_size
    elif args.labelled_rows or not args.simclr_loss_weight and not streamed:
        train_rows, without = split_labelled(train_rows, label_space)
        if args.unlabelled or len(without) and not args.labelled_rows:
            say(f'{train.path}: with -wls 0 and without entropy or pseudo-labels nothing learns from images without '
                'labels: left out')
    for line in (*how_read(train, label_space),
                 *useless_labels(label_space, train_rows.targets, str(train.path), scored=False),
                 *useless_labels(label_space, eval_rows.targets, str(val.path), scored=True)):
        say(line)
    steps = _count_steps(args, train_rows, args.batch_size, pool_rows, pool_batch_size)
    return Data(label_space, registry, head, train_rows, pool_rows, eval_rows, args.batch_size, pool_batch_size, steps)


def check_dialect(args: argparse.Namespace, label_space: LabelSpace, source: Path) -> None:
    """Raise UserError where a flag says how tags in one column are written, and no head reads such tags."""
    for name, value in dialect(args).items():
        flag = {'separator': '--tag-separator', 'none': '--none-value'}[name]
        if not any(isinstance(labels, TagSet) and not labels.group for labels in label_space.heads):
            raise UserError(f"{flag} '{value}': no head of {source} reads tags in one column; leave it out, or pass "
                            '--head COLUMN:loss=tags')
        if name == 'none' and value in missing_texts(args.missing_value):
            raise UserError(f"{flag} '{value}': --missing-value is the same text; leave one of them out")


def _hide_labels(
        args: argparse.Namespace,
        rows: Rows | StreamedRows,
        label_space: LabelSpace,
        say: Callable[[str], None],
) -> Rows:
    """The labels of `--labelled-rows` rows alone.

    Raises:
        UserError: There are not so many, or they are in shards.
    """
    if isinstance(rows, StreamedRows):
        raise UserError(f'--labelled-rows {args.labelled_rows}: {rows.source} are shards; train on a CSV')
    labelled = int(label_space.labelled(rows.targets).any(dim=1).sum())
    if labelled < args.labelled_rows:
        raise UserError(f'--labelled-rows {args.labelled_rows}: {rows.source} has {labelled} rows with labels; ask for '
                        'as many at most')
    say(f'{rows.source}: the labels of {args.labelled_rows} of {labelled} rows, drawn by --seed {args.seed}')
    return keep_labels(rows, label_space, args.labelled_rows, args.seed)


def _choose_heads(
        args: argparse.Namespace,
        given: head_options.Options,
        train: Table,
        say: Callable[[str], None],
) -> list[str]:
    """The heads to learn, after a look at the columns, which is told.

    Raises:
        UserError: A column looks like a number, and no flag says what it is.
    """
    columns = choose_columns(train, args.heads, given, head_options.groups(given), args.tag_separator)
    for line in columns.lines():
        say(f'{train.path}: {line}')
    for name in columns.asked:
        raise UserError(f'{train.path}: {columns.question(name)}')
    return columns.heads


def _without_heads(
        args: argparse.Namespace,
        folder: Path,
        train: Table,
        registry: Mapping[str, type[Head]],
        say: Callable[[str], None],
) -> Data:
    """SimCLR alone: no image has a label that counts, so all of them are one set, and both batches of it."""
    label_space = LabelSpace(())
    rows = encode(train, label_space)
    if args.unlabelled:
        unlabelled = _leave_out(_read_unlabelled(args, folder, label_space, say), _scored(args, folder, say), say)
        rows = join_rows([rows, unlabelled], label_space)
    batch_size = args.batch_size + (args.unlabelled_batch_size or 0)
    return Data(label_space, registry, {}, rows, None, None, batch_size, 0, _count_steps(args, rows, batch_size))


def wants_pool(args: argparse.Namespace) -> bool:
    """Whether batches hold unlabelled images of their own: a flag asks for them, and a term learns from them."""
    terms = args.entropy_weight or args.marginal_entropy_weight or args.pseudo_label_weight
    return bool(terms or args.simclr_loss_weight and (args.unlabelled or args.unlabelled_batch_size))


def _splits(
        args: argparse.Namespace,
        folder: Path,
        registry: Mapping[str, type[Head]],
        say: Callable[[str], None],
) -> Splits:
    stored, columns = read_stored(folder), args.heads
    if columns is not None:
        columns = [*columns, *(column for group in head_options.groups(args.head).values() for column in group)]
        columns = None if any(map(head_options.is_pattern, columns)) else columns  # which need the names of all
    known = LabelSpace(())
    if args.classification_loss_weight:
        known = stored_heads(stored, args.head, args.heads, registry, dialect(args))
    return Splits(stored, known, say, args.image_column, args.separator, args.missing_value, columns)


def _read(args: argparse.Namespace, path: Path) -> Table:
    return read_table(path, args.image_column, args.separator, args.missing_value)


def _find_pool(
        args: argparse.Namespace,
        folder: Path,
        label_space: LabelSpace,
        unlabelled: Rows,
        labelled: Rows,
        say: Callable[[str], None],
) -> Rows:
    """The unlabelled images: rows of the training table, and what `--unlabelled` names; no labelled or scored image."""
    parts = [unlabelled] if len(unlabelled) else []
    if args.unlabelled:
        parts.append(_read_unlabelled(args, folder, label_space, say))
    if not parts:
        raise UserError(
            f'{unlabelled.source}: every row has a label, so there is no unlabelled image; name some with --unlabelled')
    taken = _scored(args, folder, say) | set(real_paths(labelled.images))
    pool = _leave_out(join_rows(parts, label_space), taken, say)
    if not len(pool):
        raise UserError(
            f'{pool.source}: all of its images are labelled or scored elsewhere; name others with --unlabelled')
    return pool


def _read_unlabelled(
        args: argparse.Namespace,
        folder: Path,
        label_space: LabelSpace,
        say: Callable[[str], None],
) -> Rows:
    split = find_split(folder, args.unlabelled, args.image_column)
    if isinstance(split, Shards):
        raise UserError(f'--unlabelled {args.unlabelled}: {split.source} are shards; name a CSV or a folder of images')
    if split is not None:
        return rows_of_table(_read(args, split), label_space)
    for place in (Path(args.unlabelled), folder / args.unlabelled):
        if place.is_dir():
            return rows_of_folder(place, label_space, say)
    raise UserError(
        f'--unlabelled {args.unlabelled}: no such CSV, folder or split; looked for '
        f'{split_path(folder, args.unlabelled)}, {folder / args.unlabelled} and {args.unlabelled}')


def _scored(args: argparse.Namespace, folder: Path, say: Callable[[str], None]) -> set[str]:
    """The images that a model is scored on: those of the validation and the test split, unless asked for by name."""
    asked_for = [split_path(folder, name).resolve() for name in (args.train_split, args.unlabelled) if name]
    found: set[str] = set()
    for name in (args.val_split, 'test'):
        split = find_split(folder, name, args.image_column)
        if isinstance(split, Shards):
            say(f'{split.source}: cannot keep the images of shards out of the unlabelled ones')
        elif split is not None and split.resolve() not in asked_for:
            try:
                found.update(real_paths(find_images(_read(args, split), passing_over=True)))
            except UserError as error:
                say(f'{error.line}: cannot keep its images out of the unlabelled ones')
    return found


def _leave_out(rows: Rows, taken: set[str], say: Callable[[str], None]) -> Rows:
    """Rows whose images are not labelled or scored, which would be counted or known twice."""
    left = without_images(rows, taken)
    if len(left) < len(rows):
        say(f'{len(rows) - len(left)} of {len(rows)} unlabelled images are labelled, or of the val or test split: '
            'left out')
    return left


def _count_steps(
        args: argparse.Namespace,
        rows: Rows,
        batch_size: int,
        pool: Rows | None = None,
        pool_batch_size: int = 0,
) -> int:
    """The batches of an epoch.

    Raises:
        UserError: Rows do not fill a batch.
    """
    ranks = world()[1]
    steps = labelled = len(rows) // ranks // batch_size
    if not labelled:
        raise UserError(
            f'{rows.source}: {len(rows)} rows do not fill a batch of {batch_size} on each of {ranks} processes; '
            'lower -b')
    if pool is not None:
        unlabelled = len(pool) // ranks // pool_batch_size
        if not unlabelled:
            raise UserError(
                f'{pool.source}: {len(pool)} unlabelled images do not fill a batch of {pool_batch_size} on each of '
                f'{ranks} processes; lower --unlabelled-batch-size')
        steps = {'labelled': labelled, 'unlabelled': unlabelled, 'larger': max(labelled, unlabelled)}[args.epoch_by]
    return args.epoch_steps or steps
