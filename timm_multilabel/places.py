"""Files that do not lie on this machine: addresses such as s3://bucket/photos, read and written through fsspec.

Whoever has a path as text makes a path of it by `path_of`, which gives an `Address` where it is one.
"""
from __future__ import annotations

import errno
import os
import posixpath
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path, PosixPath
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from timm_multilabel.errors import DataError, shortened, without_secrets
from timm_multilabel.stores import SCHEMES, STARTS, WEB, ask, is_address, open_address
from timm_multilabel.temporary import temporary_folder

AT_ONCE = 16
"""Requests at a time, where there are several to make."""

_PART = 2 ** 24  # bytes that are copied at once
_RECENT = 5  # seconds that a listing is used again
_FEW = 8  # objects of a folder that are asked for one by one; of more the folder is listed
_ASKED = 50  # of the objects that speak for all of a folder, at most
_TAGS = ('ETag', 'etag', 'md5Hash', 'content_md5', 'blob_id', 'LastModified', 'last_modified', 'Last-Modified',
         'updated', 'mtime', 'created')


def path_of(path: str | Path) -> Path:
    """The path that a text names: an `Address` where it is one, else one of this machine.

    Raises:
        DataError: It has a password in it, which would be written into args.yaml, or is of a kind that is not read.
    """
    text = str(path)
    if isinstance(path, Address) or '://' not in text:
        return Path(path) if isinstance(path, str) else path
    if wrong := refusal(text):
        raise DataError(f'{shortened(without_secrets(text), 200)}: {wrong}')
    return Address(text)


def absolute(path: str | Path) -> str:
    """An address as it is, another path from the root."""
    return str(path) if is_address(path) else os.path.abspath(path)


def local_path(path: str | Path) -> Path:
    """A path of this machine.

    Raises:
        DataError: It is an address.
    """
    if is_address(path):
        raise DataError(f'{path}: an address, where a path of this machine is expected')
    return Path(path)


def refusal(text: str) -> str | None:
    """Why a text with '://' in it is not read; None where it is an address that is.

    Not even read are chained addresses (simplecache::s3://...), whose parts may be of any scheme.
    """
    if '::' in text or not is_address(text):
        return f'not an address that is read ({", ".join(STARTS[:-1])}); of local files write the path alone'
    try:
        urlsplit(text)
    except ValueError:
        return 'not an address'
    return ('an address with a user in it; give the credentials as fsspec has them: by the environment or its '
            'configuration' if has_user(text) else None)


def has_user(text: str) -> bool:
    """Whether a text is an address with a user in it, and perhaps a password."""
    found = re.match('([a-z0-9]+)://[^/?#]*@', text)
    return found is not None and is_address(text) and found[1] not in ('abfs', 'az')  # whose containers stand there


class Address(PosixPath):
    """An address as a path, so that folder / name, .parent, .suffix and .is_file() are what they are elsewhere."""

    def __str__(self) -> str:
        text = super().__str__()
        scheme, mark, rest = text.partition(':/')
        return f'{scheme}://{rest.lstrip("/")}' if mark and scheme in SCHEMES else text

    def __fspath__(self) -> str:
        return str(self)

    def __truediv__(self, key: str | os.PathLike[str]) -> Path:  # type: ignore[override]
        # An absolute path, and an address, stand alone.
        if is_address(key):
            return path_of(os.fspath(key))
        joined = super().__truediv__(key)
        return joined if is_address(joined) else Path(joined)

    def is_file(self, **kwargs: Any) -> bool:
        return self._kind() == 'file'

    def is_dir(self, **kwargs: Any) -> bool:
        return self._kind() == 'directory'

    def exists(self, **kwargs: Any) -> bool:
        return self._kind() is not None

    def is_symlink(self) -> bool:
        return False

    def resolve(self, strict: bool = False) -> Address:
        return self

    def absolute(self) -> Address:
        return self

    def expanduser(self) -> Address:
        return self

    def mkdir(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: stores have no folders but in the names of objects."""

    def glob(self, pattern: str, **kwargs: Any) -> Iterator[Address]:  # type: ignore[override]  # as pathlib changes
        """What matches in one folder: only the last part of the pattern has wildcards."""
        folder, _, name = pattern.rpartition('/')
        below = Address(self, folder)
        return iter([Address(below, each) for each, (kind, _) in _recent_listing(str(below), *_now()).items()
                     if kind == 'file' and fnmatchcase(each, name)])

    def _kind(self) -> str | None:
        """'file' or 'directory'; None where there is nothing, or we may not know.

        Raises:
            DataError: There is no answer.
        """
        try:
            return str(ask(str(self), lambda system: system.info(str(self)))['type'])
        except (FileNotFoundError, PermissionError):
            return None
        except OSError as error:
            raise DataError(f'{self}: cannot be read ({error.strerror})') from error


def why_missing(path: Path, what: str = 'file') -> str:
    """Why `is_file` or `is_dir` says no, for a message."""
    if not isinstance(path, Address):
        return f'no such {what}'
    try:
        ask(str(path), lambda system: system.info(str(path)))
    except OSError as error:
        return str(error.strerror)
    return f'is not a {what}'


# Reading


@contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """A file on this machine with what a path holds: the file itself, or a copy of an object that is removed at the
    end.

    Raises:
        OSError: It cannot be read.
    """
    if not isinstance(path, Address):
        yield path
        return
    with temporary_folder('timm-multilabel-copy-', Path(tempfile.gettempdir())) as folder:
        fetch(str(path), folder / 'copy')
        yield folder / 'copy'


def fetch(address: str, path: Path) -> None:
    """Copy an object to a file, by parts, so that a cut connection costs one of them.

    Raises:
        OSError: It cannot be read or written.
    """
    with open_address(address) as source, open(path, 'wb') as file:
        shutil.copyfileobj(source, file, _PART)


# Listing


class Entry(NamedTuple):
    """What a store says of an object.

    Args:
        size: Bytes; 0 where it does not say.
        stamp: What changes when the object does; 0 where it does not say.
    """
    size: int
    stamp: int


def list_folder(address: str) -> dict[str, Entry]:
    """The objects of a folder by name, without those of folders below; none where there is no such folder.

    Raises:
        DataError: It may not be listed, or cannot be.
    """
    return {name: entry for name, (kind, entry) in _listing(address).items() if kind == 'file'}


def folders_in(address: str) -> list[str]:
    """The names of the folders in a folder; see `list_folder`."""
    return [name for name, (kind, _) in _recent_listing(address, *_now()).items() if kind == 'directory']


@lru_cache(maxsize=16)
def _recent_listing(address: str, process: int, moment: int) -> dict[str, tuple[str, Entry]]:
    """A listing that is some seconds old at most: to find a split asks for the same folders again and again."""
    return _listing(address)


def _now() -> tuple[int, int]:
    return os.getpid(), int(time.monotonic() // _RECENT)


def _listing(address: str) -> dict[str, tuple[str, Entry]]:
    if address.startswith(WEB):
        return {}
    try:
        found = ask(address, lambda system: system.ls(address, detail=True))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DataError(f'{address}: its folder cannot be listed ({error.strerror})') from error
    names = {posixpath.basename(info['name'].rstrip('/')): (info['type'], _entry(info)) for info in found}
    return {name: each for name, each in names.items() if name}


def files_below(address: str) -> list[str]:
    """The objects in a folder and those below it, in the order of their names; none where there is no such folder.

    Raises:
        DataError: It cannot be listed.
    """
    if address.startswith(WEB):
        raise DataError(f'{address}: web servers do not list folders; name the images in a table')
    def find(system: Any) -> list[str]:
        root = system._strip_protocol(address)
        return [f'{address.rstrip("/")}/{path.removeprefix(root).lstrip("/")}' for path in system.find(address)]

    try:
        return sorted(ask(address, find))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f'{address}: cannot be listed ({error.strerror})') from error


def entries(addresses: Sequence[str]) -> list[Entry | None]:
    """What stores say of objects (N,); None of one that is not there.

    A folder with many of them is listed, which takes a request a thousand objects. Where that is not allowed, and of
    web servers, which list nothing, a few speak for all.

    Raises:
        DataError: A store gives no answer.
    """
    found: list[Entry | None] = [None] * len(addresses)
    by_folder: dict[str, list[int]] = {}
    for number, address in enumerate(addresses):
        web = address.startswith(WEB)
        by_folder.setdefault(
            '/'.join(address.split('/', 3)[:3]) if web else posixpath.dirname(address), []).append(number)

    def one(number: int) -> Entry | None:
        try:
            return _entry(ask(addresses[number], lambda system: system.info(addresses[number])))
        except FileNotFoundError:
            return None
        except PermissionError:  # which shows, with its row, when it is read
            return Entry(0, 0)
        except OSError as error:
            raise DataError(f'{addresses[number]}: cannot be read ({error.strerror})') from error

    def look(folder: str) -> None:
        numbers = by_folder[folder]
        listing = None
        if len(numbers) > _FEW and not folder.startswith(WEB):
            try:
                listing = list_folder(folder)
            except DataError as error:
                if not isinstance(error.__cause__, PermissionError):
                    raise
        if listing is not None:
            for number in numbers:
                found[number] = listing.get(posixpath.basename(addresses[number]))
        elif len(numbers) <= _FEW:
            for number in numbers:
                found[number] = one(number)
        else:
            some = numbers[::-(-len(numbers) // _ASKED)]
            known = any(one(number) is not None for number in some)  # up to the first that is there
            for number in numbers:
                found[number] = Entry(0, 0) if known else None

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(look, by_folder))
    return found


def files_there(paths: Sequence[str]) -> list[bool]:
    """Whether there is a file at each path (N,), on this machine or at an address; see `entries`."""
    remote = [number for number, path in enumerate(paths) if path.startswith(STARTS)]
    if not remote:
        return list(map(os.path.isfile, paths))
    there = [False if path.startswith(STARTS) else os.path.isfile(path) for path in paths]
    for number, entry in zip(remote, entries([paths[number] for number in remote])):
        there[number] = entry is not None
    return there


def entry_of(address: str) -> Entry:
    """What a store says of an object; (0, 0) where it says nothing."""
    try:
        return _entry(ask(address, lambda system: system.info(address)))
    except OSError:
        return Entry(0, 0)


def _entry(info: Mapping[str, Any]) -> Entry:
    size = info.get('size') or 0
    tag = next((info[name] for name in _TAGS if info.get(name)), None)
    stamp = blake2b(repr((size, tag)).encode(), digest_size=7).digest()
    return Entry(size, 0 if tag is None else int.from_bytes(stamp, 'big'))


# Writing


def write_object(path: Path, address: str) -> None:
    """Put a file to an address; stores show it when it is whole.

    Raises:
        OSError: It cannot be written.
    """
    if address.startswith(WEB):
        raise OSError(errno.EROFS, 'web servers are only read')
    ask(address, lambda system: system.put_file(str(path), address))


def remove_object(address: str) -> None:
    """Remove an object, if it is there.

    Raises:
        OSError: It cannot be removed.
    """
    try:
        ask(address, lambda system: system.rm_file(address))
    except FileNotFoundError:
        pass
