"""Names that were nearly right."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

NEAR, SLIP = 0.6, 0.7
"""Least likeness (difflib's ratio) of a name and what was probably meant; SLIP: they differ by a slip or two."""


def similar(name: str, known: Iterable[str], most: int = 3, least: float = NEAR) -> list[str]:
    """Known names that are like `name`, the most similar first, whatever their capitals."""
    lowered: dict[str, str] = {}
    for candidate in sorted(known):
        lowered.setdefault(candidate.lower(), candidate)
    return [lowered[found] for found in get_close_matches(name.lower(), lowered, most, least)]


def near(name: str, known: Iterable[str], least: float = NEAR) -> str:
    """The known name that is most like `name`; "" where none is near."""
    return next(iter(similar(name, known, 1, least)), "")


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
