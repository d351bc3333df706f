"""What a site says of itself is held against ranges, and its files are its own."""

from __future__ import annotations

import math
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from fedseg.common.text import nameless
from fedseg.console import own_files
from fedseg.federation.admission import Admission
from fedseg.federation.contract import TrainTask
from fedseg.federation.flower.records import MOST_ROWS, Answer, Facts, checked_update
from fedseg.federation.state import State, Update
from fedseg.launch.command import guarded
from fedseg.launch.sites.across import is_score

SCORE = {
    **dict.fromkeys(("site", "split", "view", "region", "case", "unit", "grid"), "x"),
    "checkpoint": "round",
    "metric": "dice",
    "round": 1,
    "value": 0.5,
    "seen": True,
}


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a/b",
        "..",
        ".x",
        "a\\b",
        "${oc.env:HOME}",
        "x" * 101,
        "a\x1b[2J",
        "a\nb",
        "=1+1",
        "@x",
        "-x",
        "+x",
        "<b>x</b>",
    ],
)
def test_what_is_no_name_of_a_site(name: str) -> None:
    assert nameless(name)


@pytest.mark.parametrize("name", ["north", "Site 1", "São Paulo", "site_01", "x" * 100, "a-b=c"])
def test_what_is_one(name: str) -> None:
    assert nameless(name) == ""


@pytest.mark.parametrize(
    ("number", "value", "fine"),
    [
        ("val/global/dice", 1e300, False),
        ("val/global/dice", 1.0, True),
        ("val/personal/dice", -0.1, False),
        ("val/global/hd95", 30.0, True),
        ("loss", 1e300, False),
        ("loss", -3.5, True),
        ("seconds", -1.0, False),
        ("steps", 1e12, False),
        ("steps", 10.0, True),
        ("fit_seconds", math.inf, False),
    ],
)
def test_numbers_lie_in_their_ranges(number: str, value: float, fine: bool) -> None:
    refusal = Admission(State()).refusal(Update(site="a", examples=1, scalars={number: value}))
    assert (refusal == "") == fine, refusal


def test_an_update_is_held_against_the_greeting_and_the_task() -> None:
    facts, task = Facts("a", True, 3, 9, images=12), TrainTask(1, 0, steps=5)
    told = {"seconds": 1.0, "steps": 5.0}
    assert checked_update(Answer("a", 12), State({}, told), facts, task).examples == 12
    with pytest.raises(ValueError, match="it tells 13 training images, its greeting told 12"):
        checked_update(Answer("a", 13), State({}, told), facts, task)
    with pytest.raises(ValueError, match="it tells 6 steps, 5 were asked for"):
        checked_update(Answer("a", 9), State({}, {**told, "steps": 6.0}), facts, task)
    with pytest.raises(ValueError, match="rows of scores, at most"):
        checked_update(Answer("a", 9, rows=({},) * (MOST_ROWS + 1)), State({}, told), facts, task)


@pytest.mark.parametrize(
    "change",
    [
        {"value": 1e300},
        {"value": 1.01},
        {"case": "=cmd()"},
        {"region": "\x1b[2J"},
        {"view": "@x"},
        {"metric": "a\u202eb"},
    ],
)
def test_a_score_that_is_none_is_left_out(change: dict[str, Any]) -> None:
    assert is_score(SCORE)
    assert not is_score({**SCORE, **change})


@pytest.mark.parametrize(("group", "folder_mode", "file_mode"), [("", 0o700, 0o600), ("1", 0o750, 0o640)])
def test_files_are_their_owners(
    group: str, folder_mode: int, file_mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSEG_GROUP_READABLE", group)
    before = os.umask(0o022)

    def write(arguments: Any) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "scores.csv").touch()

    try:
        assert guarded(write, []) == 0
        with own_files():
            assert os.umask(0o077) == (0o027 if group else 0o077)
        assert os.umask(0o022) == 0o022, "as it was before"
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("run", "run/scores.csv")]
    assert modes == [folder_mode, file_mode]
