"""What in a data directory would spoil a result: missing and broken images, the same image twice, strange labels.

`data/scan.py` reads tables and images, `report_on` says what is wrong with them.
"""
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from timm_multilabel.data.columns import IDENTIFIER
from timm_multilabel.data.remarks import how_read, useless_labels
from timm_multilabel.data.scan import UNLABELLED, Contents, Scans, Split
from timm_multilabel.data.split import SPLITS
from timm_multilabel.data.table import encode_targets, unknown_labels
from timm_multilabel.errors import shortened
from timm_multilabel.labels import Labels, LabelSet, LabelSpace, Quantity
from timm_multilabel.stores import is_address

ERROR = 'error'
"""Of a finding that spoils a result, or stops training."""

NOTE = 'note'
"""Of a finding that one should know of."""

RARE = 5
"""A class with fewer images than that in train.csv is a rare one."""

LARGE = 16_000_000
"""Pixels above which an image is a very large one."""

_SIZES = 5  # sizes of images that a report names


@dataclass(frozen=True)
class Finding:
    """Something that one should know of a data directory.

    Args:
        kind: What it is, a word for programs.
        severity: `ERROR` or `NOTE`.
        text: A sentence: what, how much of it, and what it does.
        count: How many rows, images, labels or classes it is about.
        splits: The splits that it is about.
        head: The head that it is about.
        examples: The first of these by name.
    """
    kind: str
    severity: str
    text: str
    count: int
    splits: tuple[str, ...] = ()
    head: str | None = None
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What is known of a data directory after a check, as plain values; findings with the errors first.

    Args:
        directory: The directory.
        classes_from: The CSV that names the classes, or None.
        splits: For each split `csv`, `rows`, the numbers of its `images` (files), of rows whose image is `missing` or
            `unreadable`, and `labels` by head.
        columns: What each label column looks like (`looks_like`), its number of `labels`, how many are `different`.
        heads: For each head its `kind`, the number of `classes` or tags and `counts` of each by split.
        images: Number of `files`, their `sizes` (how many `different` ones, `smallest` and `largest` by pixels, and the
            `most_common`, each as width, height and count), `modes` and `formats` with counts.
        findings: What one should know.
    """
    directory: str
    classes_from: str | None
    splits: dict[str, dict[str, Any]]
    columns: dict[str, dict[str, Any]]
    heads: dict[str, dict[str, Any]]
    images: dict[str, Any]
    findings: list[Finding]

    @property
    def errors(self) -> int:
        return sum(finding.severity == ERROR for finding in self.findings)

    @property
    def notes(self) -> int:
        return len(self.findings) - self.errors

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers, for JSON."""
        return {**asdict(self), 'errors': self.errors, 'notes': self.notes}


def report_on(contents: Contents, scans: Scans, examples: int = 5) -> Report:
    """What tables and images tell.

    Args:
        contents: The tables.
        scans: Their image files, `contents.files`.
        examples: Rows, images or labels that a finding names at most.
    """
    groups = _same_images(contents, scans)
    findings = [
        *_images_without_pixels(contents, scans, examples),
        *_same_image_across_splits(contents, groups, examples),
        *_two_labels(contents, groups, examples),
        *_heads_without_labels(contents),
        *_columns_by_look(contents),
        *_unknown_labels(contents, examples),
        *_splits_not_checked(contents),
        *_rows_without_labels(contents, examples),
        *_classes_without_images(contents, examples),
        *_labels_of_little_use(contents),
        *_same_image_twice(contents, scans, examples),
        *_links_that_lead_out(contents, examples),
        *_large_images(contents, scans, examples),
    ]
    return Report(
        directory=str(contents.folder),
        classes_from=str(contents.classes.path) if contents.classes is not None else None,
        splits={name: _describe_split(split, contents, scans) for name, split in contents.splits.items()},
        columns={name: {'looks_like': look.kind, 'labels': look.labels, 'different': look.different}
                 for name, look in contents.columns.looks.items()},
        heads={head.name: _describe_head(head, contents) for head in contents.label_space.heads},
        images=_describe_images(scans),
        findings=sorted(findings, key=lambda finding: finding.severity != ERROR),
    )


def _quoted(label: str) -> str:
    return f"'{shortened(label)}'"


def _counted(count: int, one: str, many: str | None = None) -> str:
    return f'{count} {one if count == 1 else many or one + "s"}'


def _class_counts(split: Split, head: Labels) -> Counter[str]:
    """How many rows have each class or tag, those that no row has included; then each label that is none of them."""
    labels, counts = split.labels(head), Counter({name: 0 for name in head.classes})
    if labels is None or not head.classes:
        return counts
    if isinstance(head, LabelSet):
        counts.update(sorted(label for label in labels if label))
        return counts
    cells = split.table.cells(head.columns)
    counts.update(dict(zip(head.classes, (head.encode(cells) == 1).sum(axis=0).tolist())))
    counts.update({tag: len(rows) for tag, rows in head.unknown(cells).items()})
    return counts


def _describe_split(split: Split, contents: Contents, scans: Scans) -> dict[str, Any]:
    labels = {}
    if split.name != UNLABELLED:
        for head in contents.label_space.heads:
            found = split.labels(head)
            labels[head.name] = 0 if found is None else int((found != '').sum())
    return {
        'csv': str(split.table.path),
        'rows': len(split),
        'images': len(set(split.files) - {None}),
        'missing': split.files.count(None),
        'unreadable': sum(file in scans.bad for file in split.files),
        'labels': labels,
    }


def _describe_head(head: Labels, contents: Contents) -> dict[str, Any]:
    counts = {split.name: dict(_class_counts(split, head)) for split in contents.labelled}
    return {'kind': head.kind, 'classes': len(getattr(head, 'classes', ())), 'counts': counts}


def _describe_images(scans: Scans) -> dict[str, Any]:
    sizes = Counter((scan.width, scan.height) for scan in scans.good.values())
    by_pixels = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    return {
        'files': len(scans.good) + len(scans.bad),
        'sizes': {
            'different': len(sizes),
            'smallest': [[*size, sizes[size]] for size in by_pixels[:1]],
            'largest': [[*size, sizes[size]] for size in by_pixels[-1:]],
            'most_common': [[*size, count] for size, count in sizes.most_common(_SIZES)],
        },
        'modes': dict(Counter(scan.mode for scan in scans.good.values()).most_common()),
        'formats': dict(Counter(scan.format for scan in scans.good.values()).most_common()),
    }


def _images_without_pixels(contents: Contents, scans: Scans, limit: int) -> Iterator[Finding]:
    for split in contents.splits.values():
        missing = [position for position, file in enumerate(split.files) if file is None]
        if missing:
            texts = split.table.frame[split.table.image_column]
            yield Finding(
                'missing-images', ERROR,
                f'{split.csv}: {len(missing)} of {_counted(len(split), "image")} not on disk; add them or remove their '
                'rows', len(missing), (split.name,),
                examples=tuple(f'{split.row(position)} ({texts.iloc[position]})' for position in missing[:limit]))
        bad = {position: scans.bad[file] for position, file in enumerate(split.files)
               if file is not None and file in scans.bad}
        if bad:
            yield Finding(
                'unreadable-images', ERROR,
                f'{split.csv}: {len(bad)} of {_counted(len(split), "image")} cannot be decoded; replace them, remove '
                'their rows, or pass over them with --skip-bad-images', len(bad), (split.name,),
                examples=tuple(
                    f'{split.image(position)}: {why}' for position, why in [*bad.items()][:limit]))


def _same_images(contents: Contents, scans: Scans) -> list[dict[str, list[int]]]:
    """The rows of each image that several rows show, by split."""
    found: dict[bytes, dict[str, list[int]]] = {}
    for split in contents.splits.values():
        for position, file in enumerate(split.files):
            if file in scans.good:
                found.setdefault(scans.good[file].digest, {}).setdefault(split.name, []).append(position)
    return [rows for rows in found.values() if sum(map(len, rows.values())) > 1]


def _same_image_across_splits(contents: Contents, groups: list[dict[str, list[int]]], limit: int) -> Iterator[Finding]:
    learnt = 'training has seen them, so metrics on them say too much'
    left = 'training leaves out the same files only, so they stay in the pool'
    known = {file for split in contents.labelled for file in split.files}
    for first, second, severity, why in (
            ('train', 'val', ERROR, learnt),
            ('train', 'test', ERROR, learnt),
            ('val', 'test', ERROR, 'the best checkpoint is chosen on images that it is tested on'),
            ('train', UNLABELLED, NOTE, left),
            ('val', UNLABELLED, NOTE, left),
            ('test', UNLABELLED, NOTE, left)):
        if first not in contents.splits or second not in contents.splits:
            continue
        one, other = contents.splits[first], contents.splits[second]
        left_out = known if second == UNLABELLED else set()
        pairs: list[tuple[int, int]] = []
        images = 0
        for rows in groups:
            here = [position for position in rows.get(second, ()) if other.files[position] not in left_out]
            if first in rows and here:
                pairs.extend((rows[first][0], position) for position in here)
                images += 1
        if pairs:
            pairs.sort(key=lambda pair: pair[1])
            yield Finding(
                'same-image-across-splits', severity,
                f'{other.csv}: {len(pairs)} of {_counted(len(other), "row")} show{"s" * (len(pairs) == 1)} an image of '
                f'{one.csv} ({_counted(images, "different image", "different images")}): {why}',
                len(pairs), (first, second),
                examples=tuple(f'{other.image(there)} = {one.image(here)}' for here, there in pairs[:limit]))


def _two_labels(contents: Contents, groups: list[dict[str, list[int]]], limit: int) -> Iterator[Finding]:
    for head in contents.label_space.heads:
        columns = {split.name: split.labels(head) for split in contents.labelled}
        conflicts: list[dict[str, str]] = []
        splits: set[str] = set()
        labelled = 0
        for rows in groups:
            found = [
                (column[position], name, position) for name, positions in rows.items()
                if (column := columns.get(name)) is not None for position in positions if column[position]]
            first: dict[str, str] = {}
            for label, name, position in found:
                first.setdefault(label, contents.splits[name].image(position))
            if len(first) > 1:
                conflicts.append(first)
                splits.update(name for _, name, _ in found)
                labelled += len(found)
        if conflicts:
            yield Finding(
                'two-labels', ERROR,
                f"'{head.name}': {_counted(len(conflicts), 'image has', 'images have')} more than one label, on "
                f'{labelled} rows of the same pixels: at most one of them is right', len(conflicts),
                tuple(name for name in SPLITS if name in splits), head.name,
                tuple(' and '.join(f'{_quoted(label)} in {row}' for label, row in first.items())
                      for first in conflicts[:limit]))


def _heads_without_labels(contents: Contents) -> Iterator[Finding]:
    """Heads that training would refuse, or that a split has not."""
    for name, line in contents.bad_heads.items():
        yield Finding('bad-head', ERROR, line, 1, head=name)
    if contents.labelled and not contents.label_space.heads and not contents.bad_heads:
        yield Finding('no-heads', NOTE, 'no label column, so only SimCLR (-wlc 0) can learn from this', 1)
    for split in contents.labelled:
        for head in contents.label_space.heads:
            if bad := split.bad_cell(head):
                yield Finding('bad-cell', ERROR, f'{bad}: training stops; fix it, or leave it empty', 1, (split.name,),
                              head.name)
            for name in head.columns:
                if split.table.has_label(name):
                    continue
                severity = NOTE if split.name == 'test' else ERROR
                why = 'not scored' if severity == NOTE else 'add it, or choose others with --heads'
                of_head = 'a head' if name == head.name else f"of head '{head.name}'"
                yield Finding('no-column', severity, f"{split.csv}: no column '{name}', which is {of_head}: {why}",
                              1, (split.name,), head.name)


def _columns_by_look(contents: Contents) -> Iterator[Finding]:
    """Columns that training asks about, leaves out, or takes for other labels than they look like."""
    columns = contents.columns
    for name in columns.asked:
        yield Finding('looks-like-number', ERROR, f'training stops: {columns.question(name)}', 1, head=name)
    for name in columns.left_out:
        look = columns.looks[name]
        kind = f'an {IDENTIFIER}' if look.kind == IDENTIFIER else look.kind
        yield Finding(
            'left-out', NOTE, f"'{shortened(name)}' looks like {kind} ({look.different} different): training leaves it "
            'out, unless --heads names it', 1, head=name)
    for name in columns.as_classes:
        yield Finding('as-classes', NOTE, columns.remark(name), 1, head=name)


def _unknown_labels(contents: Contents, limit: int) -> Iterator[Finding]:
    """Labels that are no classes; of the table that names the classes there are none."""
    if contents.classes is None:
        return
    effects = {
        'train': f'training stops; add rows with them to {contents.classes.path.name}, or fix them',
        'val': 'training stops, unless --unknown-labels ignore takes them as missing',
        'test': 'they are not scored',
    }
    for split in contents.labelled:
        for head, labels in unknown_labels(split.table, split.readable(contents.label_space)).items():
            rows = sum(map(len, labels.values()))
            yield Finding(
                'unknown-labels', ERROR,
                f"{split.csv}: {_counted(len(labels), 'label')} of '{head}' in {_counted(rows, 'row')}, which "
                f'{contents.classes.path.name} does not know: {effects[split.name]}', len(labels), (split.name,), head,
                tuple(f'{_quoted(label)} in {split.csv}{f" row {numbers[0]}" if numbers[0] else ""}'
                      for label, numbers in labels.items())[:limit])


def _splits_not_checked(contents: Contents) -> Iterator[Finding]:
    for name, source in contents.shards.items():
        yield Finding('shards', NOTE, f'{source}: the split is in shards, which are not checked', 1, (name,))
    for name in ('train', 'val'):
        if name not in contents.splits and name not in contents.shards:
            yield Finding('no-split', NOTE, f'{name}.csv: no such file; training needs it, or --{name}-split', 1,
                          (name,))


def _rows_without_labels(contents: Contents, limit: int) -> Iterator[Finding]:
    for split in contents.labelled if contents.label_space.heads else ():
        if any(map(split.bad_cell, contents.label_space.heads)):
            continue  # whose labels are not known
        labelled = np.zeros(len(split), dtype=bool)
        for head in contents.label_space.heads:
            if (column := split.labels(head)) is not None:
                labelled |= column != ''
        rows = np.flatnonzero(~labelled).tolist()
        if rows:
            what = 'they join the unlabelled images' if split.name == 'train' else 'they are not scored'
            yield Finding(
                'rows-without-labels', NOTE,
                f'{split.csv}: {len(rows)} of {_counted(len(split), "row")} without any label: {what}', len(rows),
                (split.name,), examples=tuple(split.image(position) for position in rows[:limit]))


def _classes_without_images(contents: Contents, limit: int) -> Iterator[Finding]:
    """Classes that train.csv has few images of, and those of it that val.csv has none of."""
    train, val = contents.splits.get('train'), contents.splits.get('val')
    if train is None:
        return
    for head in contents.label_space.heads:
        if isinstance(head, Quantity):
            continue
        one, many = head.noun
        counts = _class_counts(train, head)
        classes = sorted(head.classes, key=lambda name: counts[name])
        rare = [name for name in classes if counts[name] < RARE]
        if rare:
            none = sum(not counts[name] for name in rare)
            yield Finding(
                'rare-classes', NOTE,
                f"'{head.name}': {len(rare)} of {_counted(len(classes), one, many)} with fewer than {RARE} "
                f'images in {train.csv}' + (f', {none} of them with none' if none else ''), len(rare), ('train',),
                head.name, tuple(f'{_quoted(name)} {counts[name]}' for name in rare[:limit]))
        if val is None or val.labels(head) is None:
            continue
        scored = _class_counts(val, head)
        lacking = [name for name in reversed(classes) if counts[name] and not scored[name]]
        if lacking:
            learnt = sum(counts[name] > 0 for name in classes)
            yield Finding(
                'classes-not-in-val', NOTE,
                f"'{head.name}': {len(lacking)} of {_counted(learnt, one, many)} of {train.csv} without "
                f'an image in {val.csv}: not scored', len(lacking), ('train', 'val'), head.name,
                tuple(f'{_quoted(name)} ({counts[name]} in {train.csv})' for name in lacking[:limit]))


def _labels_of_little_use(contents: Contents) -> Iterator[Finding]:
    """Tags that seem to be written otherwise than they are read; tags and numbers that can teach or score nothing."""
    for name in ('train', 'val'):
        split = contents.splits.get(name)
        if split is None:
            continue
        for head in split.readable(contents.label_space).heads:
            if isinstance(head, LabelSet):
                continue
            label_space = LabelSpace((head,))
            for line in how_read(split.table, label_space) if name == 'train' else ():
                yield Finding('how-read', NOTE, line, 1, (name,), head.name)
            targets = encode_targets(split.table, label_space, ignore_unknown=True, way_out='')
            for line in useless_labels(label_space, targets, split.csv, scored=name == 'val'):
                yield Finding('useless-labels', NOTE, line, 1, (name,), head.name)


def _same_image_twice(contents: Contents, scans: Scans, limit: int) -> Iterator[Finding]:
    """Rows of a split that name the file of a row before, and other files of the same pixels."""
    for split in contents.splits.values():
        files: dict[str, int] = {}
        pixels: dict[bytes, int] = {}
        same_file, same_pixels = [], []
        for position, file in enumerate(split.files):
            if file is None:
                continue
            if file in files:
                same_file.append((position, files[file]))
                continue
            files[file] = position
            if file in scans.good:
                first = pixels.setdefault(scans.good[file].digest, position)
                if first != position:
                    same_pixels.append((position, first))
        of_rows = f'of {_counted(len(split), "row")}'
        for kind, pairs, what in (
                ('same-file-twice', same_file, 'with an image file that a row before has'),
                ('same-image-twice', same_pixels, 'with another file of the same pixels as a row before')):
            if pairs:
                why = 'each counts once more' if split.name in SPLITS[1:] else 'SimCLR takes them for different images'
                yield Finding(
                    kind, NOTE, f'{split.csv}: {len(pairs)} {of_rows} {what}: {why}', len(pairs), (split.name,),
                    examples=tuple(f'{split.image(later)} = {split.image(first)}' for later, first in pairs[:limit]))


def _links_that_lead_out(contents: Contents, limit: int) -> Iterator[Finding]:
    apparent, real = (os.path.join(each(contents.folder), '') for each in (os.path.abspath, os.path.realpath))
    for split in contents.splits.values():
        rows = [
            position for position, (path, file) in enumerate(zip(split.paths, split.files))
            if file is not None and not is_address(path) and os.path.abspath(path).startswith(apparent)
            and not file.startswith(real)]
        if rows:
            yield Finding(
                'links-out', NOTE,
                f'{split.csv}: {len(rows)} of {_counted(len(split), "image")} reached by a link that leads out of the '
                'directory: a copy of it may lack them', len(rows), (split.name,),
                examples=tuple(f'{split.image(position)} -> {split.files[position]}' for position in rows[:limit]))


def _large_images(contents: Contents, scans: Scans, limit: int) -> Iterator[Finding]:
    large = [path for path, scan in scans.good.items() if scan.width * scan.height > LARGE]
    if large:
        yield Finding(
            'large-images', NOTE,
            f'{_counted(len(large), "image")} of more than {LARGE // 1_000_000} million pixels: slow to decode, epoch '
            'after epoch', len(large), examples=tuple(
                f'{contents.files[path]} ({scans.good[path].width}x{scans.good[path].height})'
                for path in large[:limit]))
