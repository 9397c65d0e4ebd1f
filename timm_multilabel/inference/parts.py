"""A result in Parquet parts: each is written whole, none is made twice, and a manifest comes last.

A part is a fixed range of the images, so parts do not depend on how many processes make them. Names that begin with `_`
are passed over by programs that read a folder of Parquet files.
"""
import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Container, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from timm_multilabel.data.optional import find_library
from timm_multilabel.errors import CheckpointError, DataError, OutputError, UserError
from timm_multilabel.files import atomic_write, open_regular, read_json, reading, write_atomic
from timm_multilabel.stores import is_address

PLAN, MANIFEST = '_plan.json', '_manifest.json'
"""What the parts are of, written first; and what they are, written last."""

_VERSION = 1
_METADATA = b'timm-multilabel-part'  # the key in the metadata of a part
_PART = re.compile(r'part-\d{5,}-of-\d{5,}\.parquet')


def is_folder(name: str | None) -> bool:
    """Whether the user names a folder, for parts, not a file: it ends in a slash, or is there."""
    return name is not None and (name.endswith(os.sep) or os.path.isdir(name))


def refuse_part_rows(changed: Container[str]) -> None:
    """Raise UserError where `--part-rows` was changed; the output is no folder."""
    if 'part_rows' in changed:
        raise UserError('--part-rows would change nothing: --out names no folder; end it with a slash, or leave it out')


def folder_of(name: str) -> Path:
    """The folder that a user names for parts.

    Raises:
        UserError: It is an address.
    """
    if is_address(name):
        raise UserError(f'--out {name}: parts are written to disks that the machines share; name a folder of this '
                        'machine, and copy it there when it is done')
    return Path(name)


def digest_of_images(images: Iterable[str]) -> str:
    """What tells a list of images from others: their paths, in their order."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(os.fsencode(image) + b'\0')
    return digest.hexdigest()


@dataclass(frozen=True)
class Plan:
    """What parts are of. Two runs of one plan make the same parts.

    Args:
        command: The command that makes them.
        made_by: What tells the model from others: plain values.
        settings: The settings that change results, by their names.
        images: How many there are.
        digest: `digest_of_images`.
        part_rows: Images of each part but the last.
    """
    command: str
    made_by: dict[str, Any]
    settings: dict[str, Any]
    images: int
    digest: str
    part_rows: int
    version: int = _VERSION

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return -(-self.images // self.part_rows)

    def rows(self, part: int) -> range:
        """The images of a part, by their numbers."""
        return range(part * self.part_rows, min(self.images, (part + 1) * self.part_rows))

    def name(self, part: int) -> str:
        """The file of a part."""
        return f'part-{part:05d}-of-{self.parts:05d}.parquet'

    @property
    def key(self) -> str:
        """What tells it from other plans."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def differences(self, other: 'Plan') -> list[str]:
        """What another plan has otherwise, in words."""
        found = []
        if (self.command, self.version) != (other.command, other.version):
            found.append(f'{other.command}, version {other.version} of its parts')
        mine, theirs = self.made_by, other.made_by
        flags = [name for name in ('what', 'weights') if mine.get(name) != theirs.get(name)]
        if flags:
            found += [f'--{name} {theirs.get(name)}' for name in flags]
        elif mine != theirs:
            found.append(f'another checkpoint ({theirs.get("arch")}, {str(theirs.get("digest"))[:8]})')
        if (self.images, self.digest) != (other.images, other.digest):
            found.append(f'other images ({other.images:,} of them)')
        if self.part_rows != other.part_rows:
            found.append(f'--part-rows {other.part_rows}')
        changed = [name for name in {**self.settings, **other.settings}
                   if self.settings.get(name) != other.settings.get(name)]
        return found + [f'other settings: {", ".join(f"{name} {other.settings.get(name)}" for name in changed)}'] * (
            len(changed) > 0)

    @classmethod
    def read(cls, path: Path) -> 'Plan':
        """Read one.

        Raises:
            DataError: It is damaged, or something else.
        """
        with reading(path, 'the plan of parts', 'name another folder, or start anew with --force'):
            return cls.of(read_json(path, 'the plan of parts', 'name another folder, or start anew with --force'))

    @classmethod
    def of(cls, stored: Any) -> 'Plan':
        """One from JSON; ValueError, KeyError or TypeError where it is something else."""
        plan = cls(**{each.name: stored[each.name] for each in fields(cls)})
        if not all(isinstance(getattr(plan, name), kind) for name, kind in (
                ('command', str), ('made_by', dict), ('settings', dict), ('images', int), ('digest', str),
                ('part_rows', int))) or min(plan.images, plan.part_rows) < 1:
            raise ValueError('it holds something else')
        return plan


@dataclass(frozen=True)
class Part:
    """A part that is there.

    Args:
        file: Its name.
        rows: Its rows; images that could not be read may have none.
        bad: Images of it that could not be read.
    """
    file: str
    rows: int
    bad: int


@dataclass(frozen=True)
class Manifest:
    """Parts that are all there.

    Args:
        plan: What they are of.
        columns: The types of their columns, by name.
        parts: The parts, in order.
        reasons: Why images could not be read: the first lines of them.
    """
    plan: Plan
    columns: dict[str, str]
    parts: Sequence[Part]
    reasons: Sequence[str]

    @property
    def rows(self) -> int:
        """Rows of all parts."""
        return sum(part.rows for part in self.parts)

    @property
    def bad(self) -> int:
        """Images that could not be read."""
        return sum(part.bad for part in self.parts)

    def text(self) -> str:
        """As JSON."""
        return json.dumps({
            **asdict(self.plan), 'rows': self.rows, 'bad': self.bad, 'columns': self.columns,
            'reasons': list(self.reasons), 'parts': [asdict(part) for part in self.parts]}, indent=1) + '\n'

    @classmethod
    def read(cls, folder: Path) -> 'Manifest':
        """That of a folder, without trust in what it says.

        Raises:
            CheckpointError: There is none, or the parts are not finished.
            DataError: It is damaged, or something else.
        """
        path = folder / MANIFEST
        if not path.is_file():
            if (folder / PLAN).is_file():
                raise CheckpointError(f'{folder}: its parts are not finished; run the same command once more, which '
                                      'goes on with them')
            raise CheckpointError(f'{folder}: no folder of parts ({MANIFEST} is missing); name one that embed wrote')
        way_out = 'write the parts again with --force'
        with reading(path, 'the manifest of parts', way_out):
            stored = read_json(path, 'the manifest of parts', way_out)
            parts = [Part(each['file'], each['rows'], each['bad']) for each in stored['parts']]
            for part in parts:
                if not _PART.fullmatch(part.file) or not all(
                        type(number) is int and number >= 0 for number in (part.rows, part.bad)):
                    raise ValueError('a part that is none')
            return cls(Plan.of(stored), dict(stored['columns']), parts, [str(line) for line in stored['reasons']])


class PartsFolder:
    """A folder of the parts of a plan.

    Args:
        path: The folder.
        plan: What the parts are of.
    """

    def __init__(self, path: Path, plan: Plan):
        self.path, self.plan = path, plan

    def start(self, force: bool) -> set[int]:
        """Make the folder or go on with it; one process does so, before any other writes to it.

        Args:
            force: Remove the parts of another plan, or of this one.

        Returns:
            The parts that are there already.

        Raises:
            OutputError: It is a folder of something else, or begun with another plan, or cannot be written to.
        """
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f'--out {self.path}: is a file, not a folder; name another')
        self.path.mkdir(parents=True, exist_ok=True)
        entries = [name for name in os.listdir(self.path) if not name.startswith('.')]
        ours = [name for name in entries if name in (PLAN, MANIFEST) or _PART.fullmatch(name)]
        if len(ours) < len(entries) or ours and PLAN not in ours and not force:
            raise OutputError(f'--out {self.path}: a folder with other files in it; name a new folder')
        plan = self.path / PLAN
        if force:
            # Not the plan: were this process killed now, it would still say of what the parts are that are left.
            for name in sorted(set(ours) - {PLAN}):
                (self.path / name).unlink()
            plan.unlink(missing_ok=True)
        if plan.exists():
            if found := self.plan.differences(Plan.read(plan)):
                raise OutputError(
                    f'--out {self.path}: begun with {"; ".join(found)}; pass the same, name another folder, or start '
                    'anew with --force')
        else:
            write_atomic(plan, json.dumps(asdict(self.plan), indent=1) + '\n')
        present = self.present()
        # A part with images that could not be read is made again: the disk or the store may be well now.
        with ThreadPoolExecutor(16) as pool:
            stored = dict(zip(present, pool.map(self._read, present), strict=True))
        done = {part for part, its in stored.items() if its is not None and not its[0].bad}
        for part in present - done:
            (self.path / self.plan.name(part)).unlink()
        if len(done) < self.plan.parts:
            (self.path / MANIFEST).unlink(missing_ok=True)
        return done

    def wait_for_plan(self, seconds: int = 60) -> None:
        """Wait until this machine sees what the process has written that started the folder.

        Raises:
            OutputError: It does not; a network file system may need half a minute.
        """
        until = time.monotonic() + seconds
        while not (self.path / PLAN).is_file():
            if time.monotonic() > until:
                raise OutputError(f'--out {self.path}: {socket.gethostname()} does not see this folder of the first '
                                  'process; name one that all machines share')
            time.sleep(1)

    def present(self) -> set[int]:
        """The parts whose files are there."""
        names = set(os.listdir(self.path))
        return {part for part in range(self.plan.parts) if self.plan.name(part) in names}

    def write(self, part: int, table: Any, reasons: Sequence[str]) -> None:
        """Write a part.

        Args:
            part: Its number.
            table: Its rows, as a table of pyarrow.
            reasons: Why images of it could not be read: a line for each.

        Raises:
            OutputError: It cannot be written.
        """
        own = json.dumps({'plan': self.plan.key, 'part': part, 'reasons': list(reasons)}).encode()
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), _METADATA: own})
        # A dictionary of numbers that are all different only takes time.
        texts = [field.name for field in table.schema if str(field.type) == 'string']
        with atomic_write(self.path / self.plan.name(part)) as file:
            find_library('pyarrow.parquet').write_table(table, file, use_dictionary=texts)

    def _read(self, part: int) -> tuple[Part, dict[str, str], list[str]] | None:
        """What a part's file says of it; None where it is damaged or of another plan."""
        parquet, name = find_library('pyarrow.parquet'), self.plan.name(part)
        try:
            with open_regular(self.path / name) as opened, parquet.ParquetFile(opened) as file:
                schema, rows = file.schema_arrow, file.metadata.num_rows
                own = json.loads(schema.metadata[_METADATA])
                if own['plan'] != self.plan.key or own['part'] != part:
                    return None
                columns = {field.name: str(field.type) for field in schema}
                return Part(name, rows, len(own['reasons'])), columns, own['reasons']
        except Exception:  # damaged files make pyarrow raise nearly anything
            return None

    def finish(self, most_reasons: int = 10) -> Manifest:
        """Write the manifest, when all parts are there.

        Args:
            most_reasons: Lines on bad images that it has at most.

        Raises:
            DataError: No image could be read, and there is no row.
            OutputError: A part has been changed meanwhile, or the manifest cannot be written.
        """
        parts, columns, reasons = [], dict[str, str](), list[str]()
        for number in range(self.plan.parts):
            found = self._read(number)
            if found is None:
                raise OutputError(f'{self.path / self.plan.name(number)}: missing or damaged; remove it, and run the '
                                  'same command once more')
            part, columns, lines = found
            parts.append(part)
            reasons += lines[:most_reasons - len(reasons)]
        manifest = Manifest(self.plan, columns, parts, reasons)
        if not manifest.rows:
            raise DataError(f'none of {manifest.bad} images can be read; the first: {reasons[0]}')
        write_atomic(self.path / MANIFEST, manifest.text())
        return manifest
