"""The global model with a site's own normalisation statistics: the opponent at sites that took no part."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

from fedseg.algorithms.functional.adaptation import fit_statistics, with_running_statistics
from fedseg.launch.rescore import difference, rescore, without_older_definition
from fedseg.launch.run import execute
from fedseg.reporting.compare.analysis import AGAINST_OWN_STATISTICS, AGAINST_REFERENCE, OVERALL, Analysis
from fedseg.reporting.compare.gather import gather
from fedseg.reporting.compare.options import Options
from fedseg.reporting.compare.report import _unseen_text
from fedseg.reporting.compare.runs import find_runs, read_run
from fedseg.reporting.folder import RunFolder
from fedseg.reporting.summary import OWN_STATISTICS
from tests.run_folders import write_run
from tests.tiny_run import phantom_run

settings = partial(phantom_run, 3)


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_every_normalisation_that_keeps_statistics_takes_the_sites_own(kind: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(kind(2, track_running_stats=True), nn.Conv2d(2, 2, 1), nn.GroupNorm(1, 2)).eval()
    images = [torch.randn(4, 2, 8, 8) * 3 + 5, torch.randn(4, 2, 8, 8) * 3 + 5]
    assert len(with_running_statistics(model)) == 1
    with torch.no_grad():
        fit_statistics(model, images)
    torch.testing.assert_close(model[0].running_mean, torch.stack([i.mean((0, 2, 3)) for i in images]).mean(0))
    assert not model.training
    assert not model[0].training


@pytest.mark.parametrize("kind", ["group", "instance"])
def test_networks_without_running_statistics_have_no_such_model(kind: str, tmp_path: Path) -> None:
    execute(settings(tmp_path, "algorithm=fedavg", f"model.norm={kind}"))
    assert set(RunFolder(tmp_path).scores().query("not seen")["view"]) == {"global"}


@pytest.mark.parametrize("algorithm", ["fedavg", "ditto", "pooled"])
def test_sites_that_took_no_part_are_also_scored_with_their_own_statistics(algorithm: str, tmp_path: Path) -> None:
    execute(settings(tmp_path, f"algorithm={algorithm}"))
    folder = RunFolder(tmp_path)
    rows = folder.scores()
    outside = rows[~rows["seen"]]
    counts = outside.groupby(["view", "checkpoint"]).size()
    assert set(outside["view"]) == {"global", OWN_STATISTICS}
    assert counts["global", "last"] == counts[OWN_STATISTICS, "last"] == counts[OWN_STATISTICS, "best"] > 0
    assert OWN_STATISTICS not in set(rows.loc[rows["seen"], "view"])
    values = {view: table["value"].to_numpy() for view, table in outside.query("checkpoint == 'last'").groupby("view")}
    assert (values["global"] != values[OWN_STATISTICS]).any()
    again = rescore(folder)
    assert difference(again, rows) == (0, len(again))
    older = rows[rows["view"] != OWN_STATISTICS]  # a folder of an earlier version is scored again to the same numbers
    scores, before, _ = without_older_definition(again, older)
    assert difference(scores, before) == (0, len(scores))


def test_the_global_model_itself_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    execute(settings(tmp_path / "with", "algorithm=fedavg"))
    monkeypatch.setattr("fedseg.launch.scoring.with_running_statistics", lambda network: [])
    execute(settings(tmp_path / "without", "algorithm=fedavg"))
    one, two = (RunFolder(tmp_path / name).scores() for name in ("with", "without"))
    pd.testing.assert_frame_equal(one[one["view"] != OWN_STATISTICS].reset_index(drop=True), two)


def planted(folder: Path, gain: float) -> Analysis:
    """FedAvg and another method at a site that took no part; own statistics gain, the method itself does not."""
    sites = {"a": 24, "b": 24, "outside": 24}
    for seed in (0, 1, 2):
        for name in ("fedavg", "ditto"):
            run = write_run(folder / f"{name}-{seed}", name, seed, sites=sites, unseen=["outside"])
            rows = run.scores()
            own = deepcopy(rows[~rows["seen"] & (rows["view"] == "global") & (rows["checkpoint"] != "round")])
            own = own.assign(view=OWN_STATISTICS, value=own["value"] + gain)
            pd.concat([rows, own]).to_csv(run.path / "metrics.csv", index=False)
    runs = [read_run(path, "dice") for path in find_runs([str(folder)])]
    return Analysis(gather(runs), Options(draws=100)).unseen


def test_it_is_an_opponent_in_the_tests_at_such_sites(tmp_path: Path) -> None:
    unseen = planted(tmp_path, 0.1)
    tests = unseen.tests.set_index(["question", "model", "site"])
    own = tests.loc[AGAINST_REFERENCE, f"fedavg {OWN_STATISTICS}", OVERALL]
    assert own["gain"] == pytest.approx(0.1)
    assert own["p_holm"] < 0.05
    lost = tests.loc[AGAINST_OWN_STATISTICS, "ditto global", OVERALL]
    assert lost["against"] == f"fedavg {OWN_STATISTICS}"
    assert lost["gain"] == pytest.approx(-0.1, abs=0.02)
    told = " ".join(_unseen_text(unseen))
    assert "Against FedAvg with the site's own statistics, mean over sites: " in told
    assert "ditto global −" in told
