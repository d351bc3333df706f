"""Files that are whole at any instant."""

from __future__ import annotations

import os
import re
from pathlib import Path

PART = re.compile(r"\.[^/\\]+\.(part|\d+\.tmp)")
"""Names of what a killed process leaves of a file; nothing else is swept away."""


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace a file; the old file or the new one is there, whatever happens at whatever instant.

    A kill, a loss of power and a full disk may happen. Text is written as UTF-8, its line ends as they are.

    Raises:
        OSError: the disk is full, or will not be written to; it names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise naming(error, path) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
