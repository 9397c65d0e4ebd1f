"""Images known by their bytes, where names do not tell: a sample of shards has no path."""
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from multiprocessing.pool import ThreadPool

import numpy as np

from timm_multilabel.data.shards import Shards
from timm_multilabel.files import open_regular

_BYTES = 8  # of a hash: of 10^6 images and 10^7 samples two are taken for the same with a probability of 10^-6
_FILES = 64  # that a thread reads at once


@dataclass(frozen=True)
class KeptOut:
    """Images that are not to be among unlabelled samples, as they are labelled or scored.

    Args:
        files: Their paths.
        shards: Shards that hold others.
    """
    files: tuple[str, ...]
    shards: tuple[Shards, ...] = ()


class Fingerprints:
    """Hashes of the bytes of images: 8 bytes of memory for each.

    Args:
        hashes: What `fingerprint` gave for them.
    """

    def __init__(self, hashes: Iterable[int]):
        self.hashes = np.unique(np.fromiter(hashes, np.uint64))

    def __len__(self) -> int:
        return len(self.hashes)

    def __contains__(self, image: bytes) -> bool:
        """Whether the bytes of an image are those of one of them."""
        return self.has(fingerprint(image))

    def has(self, hashed: int) -> bool:
        """Whether it is the hash of one of them."""
        mine = np.uint64(hashed)
        place = int(np.searchsorted(self.hashes, mine))
        return place < len(self.hashes) and bool(self.hashes[place] == mine)


def fingerprint(image: bytes) -> int:
    """The hash of an image's bytes: BLAKE2b, 64 bits."""
    return int.from_bytes(blake2b(image, digest_size=_BYTES).digest(), 'big')


def fingerprints_of_files(paths: Sequence[str], threads: int) -> Iterator[int | None]:
    """The hash of each file, None of one that cannot be read; threads wait for slow disks side by side."""
    with ThreadPool(max(1, threads)) as pool:
        for hashes in pool.imap(_of_files, (paths[at:at + _FILES] for at in range(0, len(paths), _FILES))):
            yield from hashes


def _of_files(paths: Sequence[str]) -> list[int | None]:
    return list(map(_of_file, paths))


def _of_file(path: str) -> int | None:
    digest = blake2b(digest_size=_BYTES)
    try:
        with open_regular(path) as file:
            while part := file.read(2 ** 20):
                digest.update(part)
    except OSError:
        return None
    return int.from_bytes(digest.digest(), 'big')


def fingerprints_of_shards(shards: Shards, rank: int, ranks: int) -> Iterator[tuple[int, int]]:
    """The hash of each image in the share that a rank has of shards, and how many bytes the image has.

    Raises:
        DataError: A shard cannot be read, or a library is missing.
    """
    for sample in shards.samples(rank, ranks):
        assert sample.image is not None  # images were asked for
        yield fingerprint(sample.image), len(sample.image)
