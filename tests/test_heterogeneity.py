"""How different sites are: known answers, and the phantom's dials, each of which must move its own measure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import train
from fedseg.configs.compose import compose
from fedseg.evaluation.heterogeneity import (
    LEVELS,
    grey_levels,
    intensity_distance,
    log_amplitudes,
    size_distance,
    spectrum_distance,
    update_differences,
)
from fedseg.launch.experiment import Experiment
from fedseg.launch.scores.differences import COLUMNS, site_differences
from fedseg.launch.settings import SCHEMA
from fedseg.reporting.folder import RunFolder
from tests.data_files import save


def experiment(**data: object) -> Experiment:
    plain = {"n_sites": 3, "cases_per_site": 30, "size": 64, "resolution": 64, **dict.fromkeys(DIALS, 0), **data}
    return Experiment(compose(["data=phantom", *(f"data.{key}={value}" for key, value in plain.items())], SCHEMA))


DIALS = ("appearance", "annotation", "structure", "amount")


# --------------------------------------------------------------------------------------------------------- measures


def test_values_are_counted_by_channel() -> None:
    images = np.zeros((2, 2, 1, 3), np.float32)
    images[:, 1] = [[[0, 0.5, 1]], [[1, 1, 1.2]]]
    counts = grey_levels(images)
    assert counts.shape == (2, LEVELS)
    assert counts[0, 0] == 6
    assert {int(level): int(counts[1, level]) for level in np.flatnonzero(counts[1])} == {0: 1, 128: 1, 255: 4}


def test_intensity_is_how_far_values_move() -> None:
    def at(*levels: int, pixels: int = 1) -> np.ndarray:
        counts = np.zeros((1, LEVELS), np.int64)
        counts[0, list(levels)] = pixels
        return counts

    assert intensity_distance(at(0), at(255)) == pytest.approx(1)
    assert intensity_distance(at(10, 20), at(61, 71, pixels=5)) == pytest.approx(51 / 255)
    assert intensity_distance(at(0, 255), at(0, 255, pixels=9)) == 0
    both = intensity_distance(np.vstack([at(0), at(7)]), np.vstack([at(255), at(7)]))
    assert both == pytest.approx(0.5)


def test_size_counts_doublings() -> None:
    areas = np.array([10.0, 20.0, 40.0])
    assert size_distance(areas, 2 * areas) == pytest.approx(1)
    assert size_distance(4 * areas, np.repeat(areas, 3)) == pytest.approx(2)
    assert size_distance(areas, areas[::-1]) == 0
    assert np.isnan(size_distance(areas, np.empty(0)))


def test_spectrum_compares_mean_log_amplitudes() -> None:
    amplitudes = np.random.default_rng(0).uniform(0.1, 1, (5, 3, 9, 9)) * 64
    plain, double = log_amplitudes(amplitudes, 64), log_amplitudes(2 * amplitudes, 64)
    assert plain.shape == (3, 9, 9)
    assert plain == pytest.approx(np.log(amplitudes / 64).mean(axis=0), abs=1e-4)
    assert spectrum_distance(plain, double) == pytest.approx(np.log(2), abs=1e-4)
    assert spectrum_distance(plain, plain) == 0
    assert np.isfinite(log_amplitudes(np.zeros((1, 1, 3, 3)), 64)).all()


# ------------------------------------------------------------------------------------------------------------ sites


def against_all(table: pd.DataFrame) -> pd.Series:
    """Mean over sites of the difference to all others."""
    return table[table["other"] == ""].groupby("measure")["value"].mean()


@pytest.fixture(scope="module")
def alike() -> pd.DataFrame:
    return site_differences(experiment())


@pytest.mark.slow
def test_the_table_holds_every_pair_and_the_others_together(alike: pd.DataFrame) -> None:
    assert tuple(alike.columns) == COLUMNS
    measures = {"intensity", "spectrum", "size/disc", "size/cup", "presence/disc", "presence/cup"}
    for site in ("site_01", "site_02", "site_03"):
        for other in {"site_01", "site_02", "site_03", ""} - {site}:
            rows = alike[(alike["site"] == site) & (alike["other"] == other)]
            assert set(rows["measure"]) == measures
            assert len(rows) == len(measures)
    values = alike.set_index(["site", "other", "measure"])["value"].sort_index()
    assert values["site_01", "site_02"].equals(values["site_02", "site_01"])
    assert (values >= 0).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dial", "moved", "still"),
    [
        ("appearance", ["intensity", "spectrum"], ["size/disc", "size/cup"]),
        ("annotation", ["size/disc"], ["intensity", "spectrum"]),
        ("structure", ["size/disc"], []),
    ],
)
def test_each_dial_moves_its_own_measures(dial: str, moved: list[str], still: list[str], alike: pd.DataFrame) -> None:
    turned, before = against_all(site_differences(experiment(**{dial: 1}))), against_all(alike)
    for measure in moved:
        assert turned[measure] > 1.5 * before[measure], measure
    for measure in still:
        assert turned[measure] == pytest.approx(before[measure], rel=0.05), measure


def test_only_training_cases_of_sites_that_train_count(tmp_path: Path) -> None:
    lines = ["site,image,mask,split"]
    for site, value in (("a", 50), ("b", 100), ("c", 250)):
        for split in ("train", "val", "test"):
            for number in range(2):
                name = f"{site}_{split}{number}"
                shown = value if split == "train" else 255 - value
                save(tmp_path / f"{name}.png", np.full((16, 16), shown, np.uint8))
                mask = np.zeros((16, 16), np.uint8)
                mask[: {"a": 2, "b": 8, "c": 2}[site] if split == "train" else 16] = number if site == "c" else 1
                save(tmp_path / f"{name}_mask.png", mask)
                lines.append(f"{site},{name}.png,{name}_mask.png,{split}")
    (tmp_path / "sites.csv").write_text("\n".join(lines) + "\n")
    settings = ["data=folder", f"data.root={tmp_path}", "data.size=16"]
    found = (
        site_differences(Experiment(compose(settings, SCHEMA)))
        .set_index(["site", "other", "measure"])["value"]
        .sort_index()
    )
    assert found["a", "b", "intensity"] == pytest.approx(50 / 255)
    assert found["a", "", "intensity"] == pytest.approx((50 + 200) / 2 / 255)
    assert found["a", "b", "size/foreground"] == pytest.approx(2)  # 8 rows are two doublings of 2 rows
    assert found["a", "c", "size/foreground"] == 0
    assert found["a", "c", "presence/foreground"] == 0.5
    assert found["b", "a", "spectrum"] > 0
    held_out = site_differences(Experiment(compose([*settings, "data.unseen=[c]"], SCHEMA)))
    assert set(held_out["site"]) == {"a", "b"}


# ---------------------------------------------------------------------------------------------------------- updates


def test_updates_are_summed_up_over_rounds() -> None:
    rows = [(1, "a", 1.0, 0.9, 0.5), (1, "b", 3.0, 0.9, 1.0), (2, "a", 2.0, 0.9, 0.7), (2, "b", 2.0, 0.9, None)]
    updates = pd.DataFrame(rows, columns=["round", "site", "norm", "cosine", "cosine_others"])
    found = update_differences(updates).set_index(["site", "measure"])["value"].sort_index()
    assert found["a", "update direction"] == pytest.approx(0.4)
    assert found["b", "update direction"] == pytest.approx(0.0)
    assert found["a", "update length"] == pytest.approx(0.25)
    assert tuple(update_differences(updates).columns) == COLUMNS


@pytest.mark.slow
def test_a_run_leaves_a_row_per_round_and_site_also_after_resuming(tmp_path: Path) -> None:
    small = ["data.n_sites=2", "data.cases_per_site=8", "data.amount=0", "data.size=32", "data.resolution=32",
             "federation.local_steps=1", "trainer.threads=1", "evaluation.overlays=false",
             "evaluation.metrics=[dice]", "algorithm=fedavg"]  # fmt: skip
    assert train.main([f"output={tmp_path / 'whole'}", *small, "federation.rounds=2"]) == 0
    assert train.main([f"output={tmp_path / 'parts'}", *small, "federation.rounds=1"]) == 0
    assert train.main([f"output={tmp_path / 'parts'}", "resume=true", "federation.rounds=2"]) == 0
    whole, parts = RunFolder(tmp_path / "whole").updates(), RunFolder(tmp_path / "parts").updates()
    assert [*zip(whole["round"], whole["site"], strict=True)] == [(r, f"site_0{s}") for r in (1, 2) for s in (1, 2)]
    pd.testing.assert_frame_equal(whole, parts)
    found = update_differences(whole)
    assert set(found["measure"]) == {"update direction", "update length"}
    assert found["value"].notna().all()


def test_a_run_without_updates_has_no_differences(tmp_path: Path) -> None:
    assert update_differences(RunFolder(tmp_path).updates()).empty
