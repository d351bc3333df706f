"""Plots of a comparison can be seen on their ground, light or dark."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from fedseg.reporting.compare import plots

GROUNDS = re.findall(r"--ground: *(#[0-9a-fA-F]{3,6})", Path(plots.__file__).with_name("page.html.j2").read_text())


def luminance(colour: str) -> float:
    """Relative, as WCAG 2 defines it."""
    channels = np.array(to_rgb(colour))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("theme", "ground"), [(plots.LIGHT, GROUNDS[0]), (plots.DARK, GROUNDS[1])])
def test_words_and_marks_stand_out(theme: plots.Theme, ground: str) -> None:
    """By WCAG 2: 4.5 for words, 3 for what is drawn."""
    assert contrast(theme.ink, ground) >= 4.5
    for mark in (theme.good, theme.bad, theme.shared, theme.neutral, theme.faint):
        assert contrast(mark, ground) >= 3, mark


def test_every_line_stands_out_on_dark_ground() -> None:
    assert len(set(plots.DARK.lines)) == len(plots.LIGHT.lines)
    for line in plots.DARK.lines:
        assert contrast(line, GROUNDS[1]) >= 4, line
