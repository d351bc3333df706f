"""A new folder of results that is whole or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedseg.reporting import ReportingError


@contextmanager
def draft(out: Path) -> Iterator[Path]:
    """A folder to write to; it becomes `out` at the end, and is removed if there is an error or an interruption.

    It is made at once, so that a place that cannot be written is known before the work.

    Raises:
        ReportingError: `out` holds something.
        OSError: it cannot be made.
    """
    there = out.is_dir()
    if out.exists() and (not there or any(out.iterdir())):
        raise ReportingError(f"{out} is not empty; choose another --out")
    folder = (out if there else out.parent) / f".unfinished-{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        yield folder
        if there:  # it may be a mount, which cannot be replaced
            for path in folder.iterdir():
                path.rename(out / path.name)
        else:
            folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
