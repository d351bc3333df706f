"""Letters of plots: matplotlib's own font lacks the scripts of many names."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from matplotlib import font_manager
from matplotlib.artist import Artist
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text
from matplotlib.ticker import LogFormatter, ScalarFormatter

OTHER_SCRIPTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Source Han Sans SC", "WenQuanYi Zen Hei"),
    *("WenQuanYi Micro Hei", "Droid Sans Fallback", "Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans"),
    *("Yu Gothic", "MS Gothic", "Malgun Gothic", "Apple SD Gothic Neo", "Arial Unicode MS", "Noto Sans Arabic"),
    *("Noto Sans Hebrew", "Noto Sans Devanagari", "Noto Sans Thai"),
)
"""Fonts for the letters that the first font lacks, where they are installed."""


def legible(figure: Figure) -> Figure:
    r"""Lets a figure show every name: in an installed font that has its letters, else escaped as in \u5317.

    A name is never read as a formula, which a dollar would begin; numbers at an axis may be.

    Returns:
        The same figure.
    """
    for text in [*_texts(figure)]:
        text.set_parse_math(False)
        if not text.get_text().isascii():
            text.set_fontfamily([*text.get_fontfamily(), *families()])
            text.set_text(escaped(text.get_text()))
    return figure


def _texts(artist: Artist) -> Iterator[Text]:
    """All texts of a part of a figure but the numbers at its axes."""
    if isinstance(artist, Text):
        yield artist
    elif isinstance(artist, Axis) and isinstance(artist.get_major_formatter(), ScalarFormatter | LogFormatter):
        yield artist.label
    else:
        if isinstance(artist, Axis):
            _ticks(artist)
        for part in artist.get_children():
            yield from _texts(part)


def _ticks(axis: Axis) -> None:
    """Labels of ticks are written anew whenever they are drawn."""
    labels = axis.get_ticklabels()
    if all(label.get_text().isascii() for label in labels):
        return
    shown = [escaped(label.get_text()) for label in labels]
    if shown != [label.get_text() for label in labels]:
        axis.set_ticks(axis.get_majorticklocs(), labels=shown)
    for label in axis.get_ticklabels():
        label.set_fontfamily([*label.get_fontfamily(), *families()])


def escaped(text: str) -> str:
    """A text with the letters that no font has as their codes."""
    return "".join(letter if ord(letter) in _known() or letter.isspace() else _code(letter) for letter in text)


@cache
def families() -> tuple[str, ...]:
    """Installed fonts, the usual one first."""
    installed = set(font_manager.get_font_names())
    return ("DejaVu Sans", *(name for name in OTHER_SCRIPTS if name in installed))


@cache
def _known() -> frozenset[int]:
    """Letters that these fonts have."""
    return frozenset(code for name in families() for code in FT2Font(font_manager.findfont(name)).get_charmap())


def _code(letter: str) -> str:
    return letter.encode("ascii", "backslashreplace").decode("ascii")
