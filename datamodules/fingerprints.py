"""What tells the bytes of files from others: which are copies, and whether data changed since a run began."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from fedseg.datamodules.cases import Case
from fedseg.datamodules.readers.headers import data_files

CHUNK = 2**20


def fingerprint(files: Iterable[str]) -> str:
    """The digest of the bytes of some files, in this order; empty for none. Names, places and times do not count."""
    digests = [digest for file in files if (digest := file_digest(file))]
    if len(digests) < 2:
        return "".join(digests)
    return hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest()


def of_case(case: Case) -> tuple[str, str]:
    """Digests of a case's images and of its masks; empty where the data module makes them itself."""
    return fingerprint(case.image_files), fingerprint(case.mask_files)


def file_digest(file: str) -> str:
    """The digest of a file's bytes, read once in a process as long as it is not written to; empty for no file.

    Files that hold the voxels of a header count with it, and those of a series in whatever order names put them.
    """
    path = Path(file)
    digests = [_digest_of(part) for part in (path, *data_files(path))] if file else [""]
    if file and path.is_dir():
        digests.sort()
    return digests[0] if len(digests) == 1 else hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest()


def _digest_of(path: Path) -> str:
    if not path.is_file():
        return ""
    status = path.stat()
    return _digest(path, (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino))


@lru_cache(maxsize=2**17)
def _digest(path: Path, _version: tuple[int, ...]) -> str:
    hashed = hashlib.blake2b(digest_size=16)
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            hashed.update(chunk)
    return hashed.hexdigest()
