"""What goes wrong with data, told with the site, the file and the cure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DataError(ValueError):
    """Input data or a data setting that cannot be used; the message names the culprit and the cure."""


def closest(name: str, known: Iterable[str]) -> str:
    """Ends an error about an unknown name: ``did you mean 'kvasir'?``, or nothing where no known name is near."""
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.4)
    return f"did you mean {close[0]!r}?" if close else ""


def nearest(name: str, known: Iterable[str]) -> str:
    """Ends an error about an unknown name: the nearest known name, then all of them.

    Args:
        name: What the user wrote.
        known: The names that would have been right.

    Returns:
        A phrase such as ``did you mean 'kvasir'? Known: etis, kvasir``.
    """
    names = sorted(known)
    return f"{closest(name, names)} Known: {', '.join(names)}".lstrip()
