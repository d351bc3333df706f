"""How sites outline: the signed distance, the table that is made of it, and the phantom whose habits are known."""

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import binary_dilation, generate_binary_structure

from fedseg.datamodules.phantom.data import draw_case
from fedseg.datamodules.phantom.style import Dials, site_style
from fedseg.evaluation import score
from fedseg.reporting.compare.options import Options
from fedseg.reporting.folder import COLUMNS, METRICS
from fedseg.reporting.habits import habits, habits_table


def table(offsets: dict[str, dict[str, list[float]]], **column: object) -> pd.DataFrame:
    """metrics.csv of best global models: site -> region -> offset of each validation case."""
    fixed = {"round": 3, "checkpoint": "best", "seen": True, "split": "val", "view": "global", "metric": "offset"}
    rows = [
        {**fixed, "unit": "px", "grid": "own", **column, "site": site, "region": region, "case": str(n), "value": value}
        for site, of in offsets.items()
        for region, values in of.items()
        for n, value in enumerate(values)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS[METRICS]))


@pytest.mark.parametrize("spacing", [None, (1.0, 0.5, 0.5)])
def test_an_outline_drawn_larger_is_told_by_how_much(spacing: tuple[float, float, float] | None) -> None:
    y, x = np.mgrid[:41, :41]
    small = np.hypot(y - 20, x - 20) < 9
    large = binary_dilation(small, generate_binary_structure(2, 1), iterations=3)
    unit = 1.0 if spacing is None else 0.5
    found = score(large, small, spacing, ["offset", "assd"], 1.0)
    assert found["offset"] == pytest.approx(found["assd"])  # one lies all around the other
    assert 2.2 * unit < found["offset"] <= 3 * unit
    assert score(small, large, spacing, ["offset"], 1.0)["offset"] == -found["offset"]
    square = np.zeros((1, 20, 20), bool)
    square[:, 5:15, 5:15] = True
    beside = np.roll(square, 2, axis=2)
    assert score(square, beside, spacing, ["offset"], 1.0)["offset"] == pytest.approx(0)  # moved, not larger
    assert np.isnan(score(np.zeros_like(square), square, spacing, ["offset"], 1.0)["offset"])


def test_a_site_is_held_against_the_others() -> None:
    scores = table({"a": {"disc": [-2, -4], "cup": [1, 1]}, "b": {"disc": [1, 1], "cup": [1, 3]}, "c": {"disc": [2]}})
    found = habits(scores).set_index(["region", "site"])
    assert found.loc[("disc", "a"), "larger"] == pytest.approx(1.5 + 3)
    assert found.loc[("disc", "c"), "larger"] == pytest.approx(-1 - 2)
    assert found.loc[("cup", "b"), "larger"] == pytest.approx(1 - 2)
    assert found.loc[("cup", "a"), "error"] == pytest.approx(1)  # variances 0 / 2 and 2 / 2
    assert found["error"].isna().tolist() == [True, True, True, False, False]  # of one case nobody knows the spread
    shown = habits_table(habits(scores))
    assert shown is not None
    assert shown.header == ("outlines drawn larger by, px", "cases", "disc", "cup")
    assert shown.rows[2] == ("c", "1", "−3.00", "no case")
    alone = habits(table({"a": {"disc": [-2]}, "b": {"disc": [1]}}))
    assert alone["region"].unique() == ["disc"]  # also where it is the only one
    assert alone["larger"].tolist() == [3, -3]


@pytest.mark.parametrize("column", [{"split": "test"}, {"view": "personal"}, {"checkpoint": "last"}, {"seen": False}])
def test_only_validation_cases_of_sites_that_train_tell_a_habit(column: dict[str, object]) -> None:
    scores = table({"a": {"disc": [-2]}, "b": {"disc": [1]}})
    others = table({"a": {"disc": [9]}, "b": {"disc": [9]}}, **column)
    assert habits(pd.concat([scores, others]))["larger"].tolist() == [3, -3]
    assert habits_table(habits(others)) is None
    mixed = pd.concat([scores, table({"c": {"disc": [1]}}, unit="mm")])
    assert habits(mixed).empty


def test_no_model_wins_by_a_sign() -> None:
    with pytest.raises(ValueError, match=r"metric=offset has no better end.*assd"):
        Options(metric="offset")


def test_the_phantom_s_habits_are_found_where_the_model_draws_the_true_outline() -> None:
    sites, offsets = range(4), {}
    for site in sites:
        drawn, true = (
            [np.asarray(draw_case("fundus", 5, site, n, Dials(0, dial, 0, 0), resolution=64).labels) for n in range(3)]
            for dial in (1.0, 0.0)
        )
        offsets[f"site_{site}"] = {
            "cup": [score(b == 2, a == 2, None, ["offset"], 1.0)["offset"] for a, b in zip(drawn, true, strict=True)]
        }
    dial = [site_style(5, site, Dials(0, 1, 0, 0)).inner_outline for site in sites]
    found = habits(table(offsets))["larger"]
    assert np.argsort(found).tolist() == np.argsort(dial).tolist()
    assert np.corrcoef(found, dial)[0, 1] > 0.9
