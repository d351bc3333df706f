"""What goes wrong with data, told with the site, the file and the cure."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class DataError(ValueError):
    """Input data or a data setting that cannot be used; the message names the culprit and the cure."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question such as ``did you mean 'kvasir'?``; empty where no known name is near."""
    close = get_close_matches(name, sorted(known), n=1, cutoff=0.4)
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
    return f"{did_you_mean(name, names)} Known: {', '.join(names)}".lstrip()
