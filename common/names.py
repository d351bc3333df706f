"""Names that were nearly right."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

NEAR = 0.6
"""Least likeness (difflib's ratio) of a name and what was probably meant."""


def similar(name: str, known: Iterable[str], most: int = 3) -> list[str]:
    """Known names that are like `name`, the likest first, whatever their capitals."""
    lowered: dict[str, str] = {}
    for candidate in sorted(known):
        lowered.setdefault(candidate.lower(), candidate)
    return [lowered[found] for found in get_close_matches(name.lower(), lowered, most, NEAR)]


def near(name: str, known: Iterable[str]) -> str:
    """The known name that is most like `name`; "" where none is near."""
    return next(iter(similar(name, known, 1)), "")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question such as ``did you mean 'kvasir'?``; empty where no known name is near."""
    found = near(name, known)
    return f"did you mean {found!r}?" if found else ""


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
