"""The protocol that holds every site out in turn."""

from pathlib import Path

import pandas as pd
import pytest

import compare
import train
from fedseg.reporting.summary import OWN_STATISTICS

TINY = (
    "algorithm=fedavg", "protocol=leave_one_site_out", "data.n_sites=3", "data.cases_per_site=8", "data.amount=0",
    "data.size=32", "data.resolution=32", "federation.rounds=1", "federation.local_steps=1", "trainer.threads=1",
    "evaluation.overlays=false", "evaluation.metrics=[dice]",
)  # fmt: skip


@pytest.mark.slow
def test_every_site_is_held_out_once_and_folds_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "folds"
    assert train.main([*TINY, f"output={output}"]) == 0
    gathered = pd.read_csv(output / "metrics.csv")
    assert not gathered["seen"].any()
    counts = gathered.groupby(["site", "checkpoint", "view"]).size().unstack()
    assert (counts["global"] == counts[OWN_STATISTICS]).all()
    assert compare.main([str(output), "output=" + str(tmp_path / "report"), "draws=100"]) == 0
    told = capsys.readouterr().out
    assert f"fedavg {OWN_STATISTICS}" in told
    assert "Against FedAvg, mean over sites: fedavg own-statistics" in told
    assert set(gathered["site"]) == {"site_01", "site_02", "site_03"}
    for site, rows in gathered[gathered["checkpoint"] == "last"].groupby("site"):
        splits = pd.read_csv(output / str(site) / "splits.csv")
        assert set(rows["case"]) == set(splits.loc[splits["site"] == site, "case"])
        assert not splits.loc[splits["site"] == site, "seen"].any()
        assert splits.loc[splits["site"] != site, "seen"].all()
    # a fold that was stopped goes on, the others are left alone
    before = (output / "metrics.csv").read_text()
    (output / "site_02" / "summary.csv").unlink()
    untouched = (output / "site_01" / "metrics.csv").stat().st_mtime_ns
    capsys.readouterr()
    assert train.main([f"output={output}", "resume=true"]) == 0
    assert (output / "metrics.csv").read_text() == before
    assert (output / "site_01" / "metrics.csv").stat().st_mtime_ns == untouched
    told = capsys.readouterr().out
    assert "fold 2 of 3: site_02" in told
    assert "fold 1" not in told
    # finished folds go on when there are more rounds
    assert train.main([f"output={output}", "resume=true", "federation.rounds=2"]) == 0
    for site in ("site_01", "site_02", "site_03"):
        assert sorted(set(pd.read_csv(output / site / "rounds.csv")["round"])) == [1, 2]
    assert set(pd.read_csv(output / "metrics.csv").query("checkpoint == 'last'")["round"]) == {2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["algorithm=fedbn"], "fedbn has no model for a site that took no part"),
        (["data.unseen=[site_01]"], "leave data.unseen empty"),
        (["data.n_sites=2"], "at least three sites"),
        (["data.left_out=[site_02]"], "at least three sites, found site_01, site_03"),
        (["data.arrives={site_02: {2: 0.5}}", "federation.rounds=2"], "those too that data.arrives names"),
        (["data.unlabelled=[site_02]", "algorithm=mfedlo"], "those too that data.unlabelled names"),
        (["federation.leaves={site_02: 2}", "federation.rounds=2"], "those too that federation.leaves names"),
    ],
)
def test_what_cannot_be_left_out_is_said_before_anything_runs(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*TINY, f"output={tmp_path / 'folds'}", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "folds").exists()
