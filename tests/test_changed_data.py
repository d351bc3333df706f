"""A run goes on, or is scored again, on the data that it began with."""

from pathlib import Path

import pytest

from fedseg.launch.folders.restore import check_splits
from fedseg.reporting import ReportingError
from fedseg.reporting.folder import RunFolder

ROW = {"site": "a", "case": "1", "patient": "p1", "split": "train", "labelled": True, "seen": True}
OTHER = {**ROW, "case": "2", "patient": "p2", "split": "test"}


@pytest.mark.parametrize(
    ("now", "first"),
    [([ROW, {**OTHER, "split": "train"}], "'2'"), ([ROW], "'2'"), ([ROW, OTHER, {**ROW, "case": "0"}], "'0'")],
    ids=["moved", "gone", "new"],
)
def test_a_case_that_moved_came_or_went_is_named(now: list[dict[str, object]], first: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_splits([ROW, OTHER])
    check_splits(folder, [OTHER, ROW])
    with pytest.raises(ReportingError, match=f"1 cases, the first is .*{first}"):
        check_splits(folder, now)
