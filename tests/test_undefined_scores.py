"""Cases that do not show a region: in no mean, counted beside every mean, the same ones for every model."""

import io

import numpy as np
import pandas as pd
import pytest

from fedseg.launch.scores.rescore import difference, without_older_definition
from fedseg.launch.scores.scoring import _means
from fedseg.reporting.folder import COLUMNS, METRICS
from fedseg.reporting.overlays import pick_cases
from fedseg.reporting.reporter import validation_values
from fedseg.reporting.summary import as_means, final_scores, summarise

NAN = float("nan")
VALUES = {  # site, case -> lesion, organ
    ("a", "1"): (0.4, 0.8),
    ("a", "2"): (NAN, 0.6),
    ("a", "3"): (NAN, NAN),
    ("b", "1"): (NAN, 0.5),
}


def table(
    regions: tuple[str, ...] = ("lesion", "organ"), checkpoints: tuple[str, ...] = ("last", "best")
) -> pd.DataFrame:
    rows = []
    for (site, case), values in VALUES.items():
        for region, value in zip(("lesion", "organ"), values, strict=True):
            for metric, told in (("dice", value), ("invented", NAN if value == value else 0.0)):
                common = {"round": 1, "site": site, "seen": True, "split": "test", "view": "global", "region": region}
                rows += [
                    {**common, "checkpoint": checkpoint, "case": case, "metric": metric, "value": told}
                    for checkpoint in checkpoints
                    if region in regions
                ]
    return pd.DataFrame(rows, columns=list(COLUMNS[METRICS]))


def shown(scores: pd.DataFrame, site: str, region: str = "mean", metric: str = "dice") -> tuple[float, int, int]:
    final = final_scores(scores)
    row = final[(final["checkpoint"] == "last") & (final["site"] == site)]
    (one,) = row[(row["region"] == region) & (row["metric"] == metric)].to_dict("records")
    return round(float(one["mean"]), 6), int(one["cases"]), int(one["tested"])


@pytest.mark.slow
@pytest.mark.parametrize("told", ["cases", "means"])
def test_means_run_over_the_cases_that_count(told: str) -> None:
    scores = table()
    if told == "means":
        rows = [row for _, own in scores.groupby("site") for row in as_means(own)]
        scores = pd.DataFrame(rows, columns=list(COLUMNS[METRICS]))
        assert (scores["case"] == "").all()
    assert shown(scores, "a") == (0.6, 2, 3)  # the mean of (.4 + .8) / 2 and .6
    assert shown(scores, "a", "lesion") == (0.4, 1, 3)
    assert shown(scores, "a", "organ") == (0.7, 2, 3)
    assert shown(scores, "b") == (0.5, 1, 1)
    assert shown(scores, "a", "lesion", "invented") == (0.0, 2, 3)
    final = final_scores(scores)
    lesion = final[(final["site"] == "b") & (final["region"] == "lesion") & (final["metric"] == "dice")]
    assert lesion["mean"].isna().all()
    assert set(lesion["cases"]) <= {0}


def test_tables_say_in_how_many_cases_a_region_occurs() -> None:
    summary = summarise(table())
    assert ("a", "2 of 3") in {row[:2] for row in summary.sites.rows if row}
    assert ("b", "1") in {row[:2] for row in summary.sites.rows if row}
    assert summary.regions is not None
    assert summary.regions.rows == (("a", "1 of 3", "2 of 3"), ("b", "0 of 1", "1 of 1"))
    assert "1 of 3" in summary.markdown()
    alone = summarise(table(("lesion",)))
    assert alone.regions is not None
    assert (alone.regions.header, alone.regions.rows) == (
        ("test cases with", "lesion"),
        (("a", "1 of 3"), ("b", "0 of 1")),
    )
    assert "undefined" in next(row for row in alone.sites.rows if row and row[0] == "b")
    assert alone.values["last/test/global/dice"] == pytest.approx(0.4)  # b has none


def test_where_every_case_shows_every_region_nothing_is_added() -> None:
    scores = table()
    summary = summarise(scores[(scores["site"] == "b") & (scores["region"] == "organ") & (scores["metric"] == "dice")])
    assert summary.regions is None


def test_pictures_are_of_cases_that_count() -> None:
    assert set(pick_cases(table(), "a")) == {"1", "2"}
    assert pick_cases(table(("lesion",)), "b") == {}


def test_means_for_the_server_leave_out_what_is_undefined() -> None:
    rows = table(checkpoints=("last",)).to_dict("records")
    own = [{str(key): value for key, value in row.items()} for row in rows if row["site"] == "a"]
    assert _means(own) == {"dice": pytest.approx(0.6), "invented": 0.0}
    assert _means([row for row in own if row["case"] == "3"]) == {"invented": 0.0}
    assert _means([]) == {}


def test_curves_have_a_gap_where_no_case_counts() -> None:
    during = table(("lesion",), ("round",)).assign(split="val").to_dict("records")
    values = validation_values([{str(key): value for key, value in row.items()} for row in during])[1]
    assert values["a/val/global/dice"] == pytest.approx(0.4)
    assert np.isnan(values["b/val/global/dice"])
    assert values["val/global/dice"] == pytest.approx(0.4)


def test_scores_of_an_older_definition_are_told_and_not_compared() -> None:
    now = table()
    before = now[now["metric"] == "dice"].fillna({"value": 1.0})
    kept, earlier, older = without_older_definition(now, before)
    assert older == 8  # 4 of 8 scores of 2 checkpoints
    assert difference(kept, earlier) == (0.0, 8)
    again = without_older_definition(now, now)
    assert (again[2], difference(again[0], again[1])[0]) == (0, 0.0)


def test_every_region_has_a_table_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    summary = summarise(table())
    found = summary.by_region
    assert found is not None
    rows = {row[0]: row[1:4] for row in found.rows if row}
    assert rows["lesion: a"] == ("1 of 3", "0.4000", "0.4000")
    assert rows["lesion: b"] == ("0 of 1", "undefined", "undefined")
    assert rows["lesion: mean over sites"] == ("", "0.4000", "0.4000")
    assert rows["organ: mean over sites"] == ("", "0.6000", "0.6000")
    assert found.text() in summary.text(io.StringIO())
    assert "organ: worst site" in summary.markdown()
    assert summarise(table(regions=("lesion",))).by_region is None
