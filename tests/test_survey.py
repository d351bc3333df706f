"""The table of the survey's systems names what there is, each reference once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedseg.configs.compose import compose
from fedseg.launch.settings import SCHEMA
from tests.test_configs import ALL_KNOBS

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "survey.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if re.match(r"\| \d", line)]
ELSEWHERE = {17, 18, 19, 20, 21, 31, 43}
NOT_LISTED = {37}
"""A reference that is no system of its own."""


def test_every_reference_has_one_row_and_one_of_three_answers() -> None:
    numbers = [int(row[0]) for row in ROWS]
    assert len(set(numbers)) == len(numbers)
    assert {*numbers, *ELSEWHERE, *NOT_LISTED} == set(range(14, 64))
    assert {row[2] for row in ROWS} == {"here", "in part", "not here"}
    assert all(len(row) == 4 for row in ROWS)


@pytest.mark.parametrize("given", sorted({word for row in ROWS for word in re.findall(r"`([^`]*=[^`]*)`", row[3])}))
def test_what_is_named_can_be_chosen(given: str) -> None:
    compose(given.split(), SCHEMA)


def test_settings_and_files_that_are_named_exist() -> None:
    words = set(re.findall(r"`([\w./]+)`", TEXT))
    known = {prefix + name for prefix, name, _ in ALL_KNOBS}
    for word in words:
        if word.endswith(".py"):
            assert (ROOT / word).is_file(), word
        else:
            assert word in known, word
