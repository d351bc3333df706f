"""Scores by groups of patients: any column of the manifest, and nothing of groups of few."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import train
from fedseg.datamodules.cases import Case, stack_slices
from fedseg.launch import flower_server
from fedseg.reporting.__main__ import main as reporting
from fedseg.reporting.folder import RunFolder
from fedseg.reporting.groups import EVERYWHERE, NOT_STATED, group_scores, group_tables
from tests.data_files import picture, save, write_manifest
from tests.test_across import grid_of
from tests.test_own_grid import blob
from tests.tiny_run import TINY

PATIENTS = 12
WORDS = [word for word in TINY if not word.startswith("data.")]
WORDS += ["data=folder", "data.size=32", "data.batch_size=2", "algorithm=fedavg", "federation.rounds=1"]
WORDS += ["evaluation.metrics=[dice]", "data.split=[0.3,0.2,0.5]"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sites of twelve patients with two images each; the scanner is known of some."""
    home = tmp_path_factory.mktemp("groups")
    rows = []
    for site in ("a", "b"):
        for patient in range(PATIENTS):
            for eye in range(2):
                number, name = 2 * patient + eye, f"p{patient:02d}_{eye}"
                image = save(home / site / "images" / f"{name}.png", picture(number + 100 * (site == "b"), 40, 40))
                mask = save(home / site / "masks" / f"{name}.png", blob(40, 40, number))
                told = {"site": site, "image": str(image.relative_to(home)), "mask": str(mask.relative_to(home))}
                scanner = "" if patient == 0 else "Ωmega, 2" if patient % 3 else "rare"
                rows.append({**told, "patient": f"p{patient:02d}", "Sex": "FM"[patient % 2], "scanner": f'"{scanner}"'})
    write_manifest(home / "sites.csv", rows)
    return home


@pytest.mark.slow
def test_tables_by_group_are_means_over_patients(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    least = 3
    groups = ["evaluation.groups=[sex,scanner]", f"evaluation.group_minimum={least}"]
    assert train.main([*WORDS, *groups, f"data.root={root}", f"output={tmp_path / 'run'}"]) == 0
    out = capsys.readouterr().out
    run = RunFolder(tmp_path / "run")
    found = pd.read_csv(run.path / "group_scores.csv")
    scores = (
        run.scores().query("checkpoint == 'best' and split == 'test'").merge(run.splits()[["site", "case", "patient"]])
    )
    by_patient = scores.groupby(["site", "patient"])["value"].mean().reset_index()
    sex = by_patient["patient"].map(lambda patient: "FM"[int(patient[1:]) % 2])
    shown = 0
    for site in ("a", "b", EVERYWHERE):
        for value in "FM":
            own = by_patient[(sex == value) & ((by_patient["site"] == site) | (site == EVERYWHERE))]
            (row,) = found.query(
                "column == 'sex' and group == @value and site == @site and checkpoint == 'best'"
            ).itertuples()
            if len(own) < least:
                assert np.isnan(row.patients)
                assert np.isnan(row.mean)
                continue
            shown += 1
            assert (row.patients, row.mean) == (len(own), pytest.approx(own["value"].mean()))
            name = value if site == EVERYWHERE else f"{site}: {value}"
            (line,) = [line for line in out.splitlines() if line.startswith(f"{name} ") and f" {len(own)} " in line]
            assert f"{own['value'].mean():.4f}" in line
    assert shown
    assert "test dice by scanner, own grid" in out
    assert "Ωmega, 2" in out
    text = (run.path / "summary.md").read_text()
    assert "test dice by sex, own grid" in text


def drawn(counts: dict[str, int]) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Scores, groups and splits of a site with so many patients of each group."""
    places = [(group, number) for group, count in counts.items() for number in range(count)]
    cases = pd.DataFrame({"site": "a", "case": [f"{group}{number}" for group, number in places]})
    told = {"round": 1, "checkpoint": "best", "split": "test", "view": "global", "seen": True, "region": "r"}
    scores = cases.assign(**told, metric="dice", value=0.5, unit="", grid="own")
    groups = cases.assign(column="kind", value=[group for group, _ in places])
    return scores, groups, cases.assign(patient=cases["case"])


@pytest.mark.slow
@pytest.mark.parametrize("least", [1, 2, 5])
def test_groups_of_few_patients_are_not_shown(least: int) -> None:
    counts = {"one": 1, "two": 2, "four": 4, "five": 5, "": 6}
    scores, groups, splits = drawn(counts)
    found = group_scores(scores, groups, splits, least).set_index("group")
    assert found["patients"].dropna().to_dict() == {
        group or NOT_STATED: count for group, count in counts.items() if count >= least
    }
    (table,) = group_tables(found.reset_index(), scores, least)
    assert {row[0] for row in table.rows if row} == {group or NOT_STATED for group in counts if counts[group] >= least}
    hidden = sum(count < least for count in counts.values())
    assert (f"{hidden} groups of fewer than {least} patients" in table.note) == bool(hidden)
    assert str(counts["two"]) not in table.text() or least <= 2


def test_patients_without_the_region_do_not_count() -> None:
    scores, groups, splits = drawn({"x": 3})
    scores.loc[0, "value"] = float("nan")
    assert group_scores(scores, groups, splits, 1)["patients"].tolist() == [2]
    assert group_scores(scores, groups, splits, 3)["patients"].isna().all()


def test_a_stack_has_the_values_of_all_its_images() -> None:
    columns = [(("sex", "F"), ("scanner", "x")), (("sex", "F"), ("scanner", "y"))]
    slices = [Case("s", f"p_{number}", "p", mask="m", columns=own) for number, own in enumerate(columns)]
    assert stack_slices("p", slices).columns == (("sex", "F"), ("scanner", "x and y"))


@pytest.mark.slow
def test_a_column_that_does_not_exist_is_refused_with_its_cure(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*WORDS, f"data.root={root}", f"output={tmp_path / 'run'}"]
    assert train.main([*words, "evaluation.groups=[scaner]"]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "the manifest has no column 'scaner'; did you mean 'scanner'" in err
    assert "patient, scanner, sex, site" in err
    assert not (tmp_path / "run").exists()
    assert train.main([*words, "evaluation.groups=[scanner]"]) == 0  # the cure


@pytest.mark.slow
def test_data_without_a_manifest_are_refused_with_the_cure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*TINY, "algorithm=fedavg", "federation.rounds=1", "evaluation.groups=[sex]", f"output={tmp_path / 'run'}"]
    assert train.main(words) == 2
    assert "come without a manifest; list their cases in a table with a column 'sex'" in capsys.readouterr().err


@pytest.mark.slow
def test_no_groups_leave_no_file(root: Path, tmp_path: Path) -> None:
    assert train.main([*WORDS, f"data.root={root}", f"output={tmp_path / 'run'}"]) == 0
    assert not list((tmp_path / "run").glob("group*"))


@pytest.mark.slow
def test_across_machines_groups_stay_at_their_site(root: Path, tmp_path: Path) -> None:
    grid = grid_of(tmp_path / "sites", ("a", "b"), data_root=str(root))
    local = [word for word in WORDS if not word.startswith("data.root")]
    settings = [*local, "data.root=unknown", "evaluation.groups=[sex]", f"output={tmp_path / 'run'}"]
    flower_server.run(grid, settings)
    run = RunFolder(tmp_path / "run")
    assert not list(run.path.glob("group*"))
    name = (run.path / "run-id.txt").read_text().strip()
    for site in ("a", "b"):
        own = RunFolder(tmp_path / "sites" / site / name)
        assert set(own.groups()["site"]) == {site}
        assert reporting([str(own.path)]) == 0
        assert set(pd.read_csv(own.path / "group_scores.csv")["group"]) <= {"F", "M"}
