"""Text from elsewhere, fit to be shown: no terminal obeys it, and no spreadsheet computes it."""

from __future__ import annotations

FORMULA = ("=", "+", "-", "@")
"""What makes a spreadsheet compute a cell."""


def printable(text: str, but: str = "") -> str:
    r"""The text with every letter that is not printed written as its code, as in \x1b.

    Args:
        text: from anywhere.
        but: letters that stay, such as line ends.
    """
    return "".join(c if c.isprintable() or c in but else c.encode("unicode_escape").decode() for c in text)


def cell(text: str) -> str:
    """The text as a cell of a table: printable, and behind an apostrophe where a spreadsheet would compute it."""
    shown = printable(text)
    return f"'{shown}" if shown.lstrip().startswith(FORMULA) else shown
