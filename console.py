"""What every command needs around it: printing never stops the work, files are its owner's. Imports nothing of ours."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

GROUP = "FEDSEG_GROUP_READABLE"


@contextmanager
def own_files() -> Iterator[None]:
    """While this is open, new files and folders are their owner's only; FEDSEG_GROUP_READABLE=1 lets the group read."""
    before = os.umask(0o027 if os.environ.get(GROUP) == "1" else 0o077)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def steady_output() -> Iterator[None]:
    r"""While this is open, whatever becomes of the terminal, the pipe or the log, the command comes to its end.

    Letters that the console does not have are printed as \xe3 or \u5317. What can no longer be printed (`| head`, a
    closed stream, a full disk behind `> log`) is dropped.
    """
    _fill_closed_descriptors()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_steady(stream) for stream in before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        sys.stdout, sys.stderr = before


class Steady:
    """A text stream that is given up when it cannot be written to; everything else is asked of the stream itself."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Print, or drop it."""
        try:
            return self._stream.write(text)
        except OSError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        """Print what waits, or drop it."""
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        """Let the stream lead nowhere from now on, with what waits in it, so that Python's own last flush succeeds."""
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _steady(stream: TextIO | None) -> Any:
    if stream is None:
        return Path(os.devnull).open("w", encoding="utf-8")
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    return Steady(stream)


def _fill_closed_descriptors() -> None:
    """Where a shell closed a stream (`>&-`), the next file that is opened would be what libraries print to."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
