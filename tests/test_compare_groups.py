"""Groups of patients in a comparison: models by group, and nothing of groups of few."""

from __future__ import annotations

import io
from pathlib import Path

import pandas as pd
import pytest

from fedseg.reporting import ReportingError
from fedseg.reporting.compare.analysis import Analysis
from fedseg.reporting.compare.by_group import group_grids, group_means
from fedseg.reporting.compare.gather import gather
from fedseg.reporting.compare.options import Options
from fedseg.reporting.compare.report import Extras, Report, write
from fedseg.reporting.compare.runs import find_runs, read_run
from fedseg.reporting.folder import RunFolder
from fedseg.reporting.groups import EVERYWHERE, NOT_STATED
from tests.run_folders import write_run

SITES = {"site_01": 24, "site_02": 24, "site_03": 24}


def sex(case: str) -> str:
    return "FM"[int(case[-2:]) % 2]


def scanner(case: str) -> str:
    return "Zeta-9" if case == "case_0007" else "" if int(case[-2:]) < 9 else "Ωmega & co"


def with_groups(folder: RunFolder, changed: str = "") -> None:
    """Write groups.csv as a run does; the sex of one case is another one if that is asked for."""
    cases = folder.splits()[["site", "case"]].itertuples(index=False)
    folder.write_groups([
        {"site": site, "case": case, "column": column, "value": "X" if (case, column) == (changed, "sex") else of(case)}
        for site, case in cases
        for column, of in (("sex", sex), ("Scanner", scanner))
    ])  # fmt: skip


def analysed(folder: Path) -> Analysis:
    return Analysis(gather([read_run(path, "dice") for path in find_runs([str(folder)])]), Options(draws=100))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds; only FedAvg's runs know the groups, with different minima, and one site took no part."""
    folder = tmp_path_factory.mktemp("groups")
    for seed in range(2):
        words = ["evaluation.groups=[sex,Scanner]", f"evaluation.group_minimum={3 + seed}"]
        run = write_run(folder / f"runs/fedavg-{seed}", "fedavg", seed, *words, sites=SITES, unseen=["site_03"])
        with_groups(run)
        write_run(folder / f"runs/ditto-{seed}", "ditto", seed, sites=SITES, unseen=["site_03"])
    return folder


@pytest.fixture(scope="module")
def report(home: Path) -> Report:
    return write(analysed(home / "runs"), home / "report", lambda _: Extras())


@pytest.mark.slow
def test_means_are_over_the_patients_of_a_group(home: Path, report: Report) -> None:
    told = pd.read_csv(home / "report/tables/groups.csv").set_index(["column", "group", "site", "method", "view"])
    scores = pd.concat(RunFolder(home / f"runs/ditto-{seed}").scores() for seed in range(2))
    scores = scores.query("checkpoint == 'best' and split == 'test' and view == 'personal' and metric == 'dice'")
    patients = scores.groupby(["site", "case"])["value"].mean().reset_index()
    for group in "FM":
        for site in ("site_01", "site_02", EVERYWHERE):
            own = patients[patients["case"].map(sex).eq(group) & ((patients["site"] == site) | (site == EVERYWHERE))]
            row = told.loc[("sex", group, site, "ditto", "personal")]
            assert row["patients"] == len(own)
            assert row["mean"] == pytest.approx(own["value"].mean())
    number = f"{100 * told.loc[('sex', 'F', EVERYWHERE, 'ditto', 'personal'), 'mean']:.1f}"
    (table,) = [table for table in report.groups if table.header[0].startswith("Dice by sex")]
    assert number in next(row for row in table.rows if row[0] == "ditto personal")
    shown, page = report.text(io.StringIO()), report.page.read_text()
    for text in (shown, page):
        assert "Dice by sex" in text
        assert NOT_STATED in text
    assert "Groups of patients" in page
    assert r"Ωmega \& co" in (home / "report/tables/groups_scanner.tex").read_text()
    unseen = pd.read_csv(home / "report/tables/unseen_groups.csv")
    assert set(unseen["site"]) == {EVERYWHERE}  # one site: no second table of the same
    assert (home / "report/tables/unseen_groups_sex.tex").is_file()


@pytest.mark.slow
def test_groups_of_few_are_shown_nowhere(home: Path, report: Report) -> None:
    """The strictest minimum counts: four, of the run with seed 1."""
    told = pd.read_csv(home / "report/tables/groups.csv")
    few = told[told["mean"].isna()]
    assert (few["group"] == "Zeta-9").any()
    assert few["patients"].isna().all()
    assert told["patients"].dropna().min() >= 4
    by_scanner = [table for table in report.groups if "scanner" in table.header[0]]
    assert by_scanner
    assert all("of fewer than 4 patients: not shown" in table.note for table in by_scanner)
    assert "Zeta-9" not in report.text(io.StringIO()) + report.page.read_text().partition("Groups of patients")[2]


def test_runs_that_disagree_about_a_group_are_refused_with_the_cure(tmp_path: Path) -> None:
    for name, changed in (("fedavg", ""), ("fedprox", "case_0007")):
        with_groups(write_run(tmp_path / name, name, 0, "evaluation.groups=[sex]", sites=SITES), changed)
    with pytest.raises(ReportingError, match=r"site_01, case case_0007: sex is 'M' in .*fedavg/groups.csv, but 'X' in"):
        analysed(tmp_path)
    (tmp_path / "fedprox" / "groups.csv").unlink()
    told = group_means(analysed(tmp_path))
    assert set(told["method"]) == {"fedavg", "fedprox"}
    assert "X" not in set(told["group"])


def test_runs_without_groups_have_no_such_table(tmp_path: Path) -> None:
    write_run(tmp_path / "fedavg", "fedavg", sites=SITES)
    analysis = analysed(tmp_path)
    assert group_grids(analysis) == ([], [])
    assert group_means(analysis).empty
