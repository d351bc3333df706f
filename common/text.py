"""Text from elsewhere, fit to be shown or to be a name: no terminal obeys it, and no spreadsheet computes it.

And numbers with their nouns, and values as they are written on the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

FORMULA = ("=", "+", "-", "@")
"""What makes a spreadsheet compute a cell."""
LONGEST_SITE = 100


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


def piped(cells: Sequence[str]) -> str:
    """A line of a Markdown table, in which no cell ends early."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def quoted(text: str, longest: int = 80) -> str:
    """Foreign text, fit for a log: escaped and cut."""
    return ascii(text if len(text) <= longest else f"{text[:longest]}...")


def count(number: int, noun: str) -> str:
    """A number and its noun: "1 site", "4 sites"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def written(value: object, scalar: Callable[[object], str] = str) -> str:
    """A value as a user writes it on the command line or in YAML.

    Args:
        value: of a setting.
        scalar: writes what is neither null, a truth value, a list nor a mapping.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        entries = (f"{written(key, scalar)}: {written(entry, scalar)}" for key, entry in value.items())
        return f"{{{', '.join(entries)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(written(entry, scalar) for entry in value)}]"
    return scalar(value)


def nameless(site: str) -> str:
    """Why a text that a site gives cannot be its name; empty if it can."""
    if not 1 <= len(site) <= LONGEST_SITE or not site.isprintable():
        return f"it must be printable and have 1 to {LONGEST_SITE} characters"
    if site.startswith((".", "~", *FORMULA)) or any(part in site for part in ("/", "\\", "${", "<", ">")):
        return "it must not hold / \\ < > or ${, nor begin with . ~ = + - @"
    return ""
