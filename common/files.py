"""Files that are whole at any instant."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

PART = re.compile(r"\.[^/\\]+\.(part|\d+\.tmp)")
"""Names of what a killed process leaves of a file; nothing else is swept away."""


WRITTEN = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL


def write_atomic(path: Path, content: str | bytes, *, private: bool = False) -> None:
    """Replace a file; the old file or the new one is there, whatever happens at whatever instant.

    A kill, a loss of power and a full disk may happen. Text is written as UTF-8, its line ends as they are.

    Args:
        path: the file; its folder is made if need be.
        content: all of it.
        private: whether nobody but the owner may read it, whatever the process lets others read.

    Raises:
        OSError: the disk is full, or will not be written to; it names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        _write(temporary, WRITTEN, 0o600 if private else 0o666, content)
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise naming(error, path) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_once(path: Path, content: str | bytes) -> None:
    """Make a file that nobody but its owner may read, if it is not there: of several processes at once, one makes it.

    It is whole or not there, whatever happens; only where the file system has no hard links can a kill leave part of
    it, which is replaced as little as a whole one.

    Args:
        path: the file; its folder is made if need be.
        content: all of it.

    Raises:
        OSError: as of `write_atomic`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        _write(temporary, NEW, 0o600, content)
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:  # no hard links here
            _write(path, NEW, 0o600, content)
        sync_directory(path.parent)
    except FileExistsError:
        return
    except OSError as error:
        raise naming(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def _write(path: Path, flags: int, mode: int, content: str | bytes) -> None:
    """Write a file through to the disk."""
    with os.fdopen(os.open(path, flags, mode), "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def ends_a_line(path: Path) -> bool:
    """Whether the last line of a file, which is not empty, is whole."""
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def last_line(path: Path) -> bytes:
    """The last line that is whole, without its end, found from the end of the file; nothing if there is none."""
    block = 4096
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        while True:
            file.seek(max(0, size - block))
            tail = file.read()
            end = tail.rfind(b"\n")
            start = tail.rfind(b"\n", 0, max(end, 0))
            if start >= 0 or block >= size:
                return tail[start + 1 : end] if end >= 0 else b""
            block *= 2


def sweep_parts(folder: Path) -> None:
    """Remove what `write_atomic` left of files whose process was killed."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if PART.fullmatch(path.name):
            path.unlink(missing_ok=True)


def naming(error: OSError, path: Path) -> OSError:
    """The same error with the file, which a full disk does not tell."""
    return OSError(error.errno, error.strerror or str(error), str(path))


def sync_directory(path: Path) -> None:
    """Make a rename durable; only POSIX systems open folders."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
