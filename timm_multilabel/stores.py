"""Asking and reading the stores behind addresses through fsspec: again where that may help, anew in each process.

Its errors are OSErrors whose `strerror` is for people, as those of local files are, so that callers name file and row
alike.
"""
import errno
import io
import os
import random
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, BinaryIO, TypeVar

from timm_multilabel.errors import DataError, shortened

T = TypeVar('T')

SCHEMES = ('s3', 'gs', 'gcs', 'az', 'abfs', 'hf', 'https', 'http', 'memory')
"""Those of addresses. Not those of fsspec that read local files, unpack archives or ask other programs."""

STARTS = tuple(f'{scheme}://' for scheme in SCHEMES)

WEB = ('http://', 'https://')
"""How addresses of web servers begin, which list nothing."""

WAITS = [0.5, 1.0, 2.0, 4.0]
"""Seconds between tries, each times a number from 0.5 to 1.5, so that many processes do not come again at once."""

_LIBRARIES = {
    's3': "'.[remote]'", 'gs': 'gcsfs', 'gcs': 'gcsfs', 'az': 'adlfs', 'abfs': 'adlfs', 'http': 'aiohttp',
    'https': 'aiohttp'}
_BLOCK = 2 ** 22  # bytes that a stream asks for at once
_MOST = 2 ** 30  # bytes of an object whose size is not told
_TIMEOUT = 30  # seconds without a byte from a web server


def is_address(path: object) -> bool:
    """Whether a path, or its text, is an address."""
    return str(path).startswith(STARTS)


def ask(address: str, work: Callable[[Any], T]) -> T:
    """Do something with the file system of an address, again after a while where that may help.

    Raises:
        OSError: It failed, with a `strerror` for people.
        DataError: The library for such addresses is not installed.
    """
    scheme = address.partition('://')[0]
    for wait in (*WAITS, None):
        try:
            return work(_system(scheme, os.getpid()))
        except Exception as raised:  # each library raises its own
            error = _true_error(raised, scheme)
            if (final := _final(error, scheme)) is not None:
                raise final from error
            if wait is None:
                reason = shortened(' '.join(str(error).split()), 200) or type(error).__name__
                raise OSError(errno.EIO, f'{reason}; tried {len(WAITS) + 1} times') from error
        time.sleep(wait * (0.5 + random.SystemRandom().random()))
    raise AssertionError


def read_bytes(address: str, most: int) -> bytes:
    """All bytes of an object, or the first `most` and one more.

    Raises:
        OSError: It cannot be read.
    """
    return read_range(address, 0, most + 1)


def read_range(address: str, start: int, end: int) -> bytes:
    """Some bytes of an object, fewer at its end.

    Raises:
        OSError: They cannot be read.
    """
    if address.startswith(WEB):
        return ask(address, lambda system: _read_web(system, address, start, end))
    data: bytes = ask(address, lambda system: system.cat_file(address, start=start, end=end))
    return data


def _read_web(system: Any, address: str, start: int, end: int) -> bytes:
    from fsspec.asyn import sync
    return bytes(sync(system.loop, _web_range, system, address, start, end))


async def _web_range(system: Any, address: str, start: int, end: int) -> bytearray:
    """Some bytes of what a web server sends, which is the whole where it knows no ranges; no more of it is read."""
    options = dict(system.kwargs)
    headers = {**options.pop('headers', {}), 'Range': f'bytes={start}-{end - 1}', 'Accept-Encoding': 'identity'}
    session = await system.set_session()
    data = bytearray()
    async with session.get(system.encode_url(address), headers=headers, **options) as answer:
        if answer.status == 416:  # nothing is left there
            return data
        answer.raise_for_status()
        before = 0 if answer.status == 206 else start
        async for part in answer.content.iter_chunked(2 ** 20):
            data += part[before:]
            before = max(0, before - len(part))
            if len(data) >= end - start:
                break
    return data[:end - start]


def open_address(address: str) -> BinaryIO:
    """An object as a file to read, some megabytes at a time, each with tries of its own.

    Raises:
        OSError: It is not there, or cannot be read.
    """
    size = ask(address, lambda system: system.info(address)).get('size')
    if size is None:  # a web server that does not tell
        data = read_bytes(address, _MOST)
        if len(data) > _MOST:
            raise OSError(errno.EFBIG, f'more than {_MOST:,} bytes, and its server does not say how many')
        return io.BytesIO(data)
    return io.BufferedReader(_Ranges(address, size), _BLOCK)


class _Ranges(io.RawIOBase):
    """An object of known size, read by ranges."""

    def __init__(self, address: str, size: int):
        self.address, self.size, self.at = address, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence])
        return self.at

    def readinto(self, buffer: Any) -> int:
        end = min(self.size, self.at + len(buffer))
        if end <= self.at:
            return 0
        data = read_range(self.address, self.at, end)
        if len(data) < end - self.at:
            raise OSError(errno.EIO, 'it has become shorter while it was read')
        buffer[:len(data)] = data
        self.at = end
        return len(data)


@lru_cache(maxsize=64)
def _system(scheme: str, process: int) -> Any:
    """The file system of a scheme, one for each process: connections do not outlive a fork."""
    try:
        import fsspec
        from fsspec import asyn
        if asyn.iothread[0] is not None and not asyn.iothread[0].is_alive():
            # That of the process which this one was forked from; versions before 2025 leave it there, and wait for it.
            asyn.reset_lock()
            asyn.iothread[0] = asyn.loop[0] = None
        options: dict[str, Any] = {'use_listings_cache': False}  # objects come and go
        if scheme in ('http', 'https') and 'client_kwargs' not in fsspec.config.conf.get(scheme, {}):
            import aiohttp
            options['client_kwargs'] = {
                'timeout': aiohttp.ClientTimeout(total=None, sock_connect=_TIMEOUT, sock_read=_TIMEOUT)}
        return fsspec.filesystem(scheme, skip_instance_cache=True, **options)
    except ImportError as error:
        library = _LIBRARIES.get(scheme, 'fsspec')
        raise DataError(f'{scheme}:// addresses need a library ({error}): pip install {library}') from error


def _true_error(error: Exception, scheme: str) -> Exception:
    """What went wrong: of a web server, fsspec says that an object is missing whatever that is."""
    cause = error.__cause__
    return cause if scheme in ('http', 'https') and isinstance(error, FileNotFoundError) and isinstance(
        cause, Exception) else error


def _final(error: Exception, scheme: str) -> Exception | None:
    """The error to raise where trying again would not help; None where it may."""
    if isinstance(error, DataError):
        return error
    status = _status(error) or _status(error.__cause__)  # fsspec's own errors may stand for any
    if status in (404, 410) or isinstance(error, FileNotFoundError) and status is None:
        return FileNotFoundError(errno.ENOENT, 'there is no such object')
    if isinstance(error, PermissionError) or status in (401, 403) or 'Credential' in type(error).__name__:
        reason = shortened(' '.join(str(error).split()), 100)
        return PermissionError(errno.EACCES, f'forbidden: {reason}; check the credentials that {scheme}:// has from '
                               'the environment, and what they allow')
    refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
    useless = isinstance(error, ValueError | TypeError | NotImplementedError | IsADirectoryError | NotADirectoryError)
    if refused or useless or isinstance(error, OSError) and error.errno == errno.EINVAL:
        return OSError(errno.EINVAL, shortened(' '.join(str(error).split()), 200) or type(error).__name__)
    return None


def _status(error: BaseException | None) -> int | None:
    """The HTTP status that an error of aiohttp, botocore or requests tells of."""
    response = getattr(error, 'response', None)
    if isinstance(response, dict):
        response = response.get('ResponseMetadata') or {}
        return response.get('HTTPStatusCode') if isinstance(response, dict) else None
    status = getattr(error, 'status', None) or getattr(response, 'status_code', None)
    return status if isinstance(status, int) else None
