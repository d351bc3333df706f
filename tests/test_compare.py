"""Comparing runs: what is refused, who is a method, what is found where it was planted, and what is written."""

import io
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from omegaconf import OmegaConf

import compare
from fedseg.common.text import written
from fedseg.configs.knobs import knobs
from fedseg.evaluation.statistics import holm, paired
from fedseg.launch.compare import Destination, default_settings, requested
from fedseg.launch.compare import analysed as analysed_of
from fedseg.launch.scores.second_look import extremes
from fedseg.reporting import ReportingError
from fedseg.reporting.compare.analysis import AGAINST_LOCAL, OVERALL, Analysis, Model
from fedseg.reporting.compare.gather import Gathered, Method, gather, signature
from fedseg.reporting.compare.options import Options
from fedseg.reporting.compare.plots import LIGHT, draw_all
from fedseg.reporting.compare.report import CAPTIONS, Extras, _transfer_text, telling, write
from fedseg.reporting.compare.runs import LeftOut, find_runs, read_run
from fedseg.reporting.compare.sentences import answer_text
from fedseg.reporting.compare.tables import (
    Cell,
    Grid,
    fairness_grid,
    metric_grid,
    region_grid,
    region_site_grids,
    save_tables,
    score_grid,
)
from fedseg.reporting.compare.tables import test_grid as grid_of_tests
from fedseg.reporting.compare.tuning import tuning_text
from fedseg.reporting.compare.verdicts import answer_of, verdicts
from fedseg.reporting.folder import RunFolder
from fedseg.reporting.summary import as_means, summarise
from tests.run_folders import SITES, write_run

FEW = Options(draws=200)


def gathered(folder: Path, metric: str = "dice") -> Gathered:
    return gather(read_run(path, metric) for path in find_runs([str(folder)]))


def analysed(folder: Path, options: Options = FEW) -> Analysis:
    return Analysis(gathered(folder, options.metric), options)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ditto's personal model gains at site_02 and loses at site_03; local training loses everywhere."""
    folder = tmp_path_factory.mktemp("planted")
    for seed in range(3):
        write_run(folder / f"fedavg-{seed}", "fedavg", seed)
        write_run(
            folder / f"ditto-{seed}",
            "ditto",
            seed,
            effects={("personal", "site_02"): 0.08, ("personal", "site_03"): -0.08},
        )
        write_run(folder / f"local-{seed}", "local", seed, effects={("personal", ""): -0.15})
        write_run(folder / f"pooled-{seed}", "pooled", seed, effects={("global", ""): 0.03})
    return folder


# --- tuned methods ----------------------------------------------------------------------------------------------------


def test_tuned_methods_stand_beside_what_they_are_as_they_come(tmp_path: Path) -> None:
    gains = {"ditto": 0.05, "fedavg": -0.05, "fedprox": 0.0}
    for name, gain in gains.items():
        preset = tmp_path / f"{name}_tuned.yaml"
        own = "lam: 0.5\n" if name == "ditto" else ""
        preset.write_text(f"name: {name}\n{own}training: {{lr: 0.002, trials: 8}}\n")
        effects = {("personal", ""): 0.02, ("global", ""): -0.1}
        for seed in (0, 1, 2):
            if name != "fedprox":  # which nobody trained as it comes
                write_run(tmp_path / f"runs/{name}-{seed}", name, seed, effects=effects)
            tuned = {key: effect + gain for key, effect in effects.items()}
            write_run(tmp_path / f"runs/{name}_tuned-{seed}", str(preset), seed, effects=tuned)
    found = analysed(tmp_path / "runs")
    tuned = "{}_tuned (tuned, 8 trials)"
    assert [pair.plain.label for pair in found.tuned] == ["ditto", "fedavg"]
    assert found.tuned[0][2:] == (Model("ditto", "personal"), Model(tuned.format("ditto"), "personal"))
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tuning_text(found).splitlines()]
    assert table[0] == ["test Dice", "as it comes", "tuned", "gain", "found (as it comes)"]
    assert [row[4] for row in table[2:4]] == ["lam 0.5 (0.1), training.lr 0.002 (0.001)", "training.lr 0.002 (0.001)"]
    for row, (name, view, gain) in zip(table[2:4], (("ditto", "personal", 5), ("fedavg", "global", -5)), strict=True):
        means = [100 * float(np.mean([*found.means(Model(m, view)).values()])) for m in (name, tuned.format(name))]
        assert row[0] == f"{name} {view}, 8 trials"
        assert [cell.split(" ")[0] for cell in row[1:3]] == [f"{mean:.1f}" for mean in means]
        told = float(row[3].split(" ")[0].replace("−", "-"))
        assert told == pytest.approx(means[1] - means[0], abs=0.06)
        assert told == pytest.approx(gain, abs=1.5)
    axes = draw_all(found, [], LIGHT)["tuning"].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [row[0] for row in table[2:4]]
    marks = [line for line in axes.lines if line.get_marker() != "None" and len(line.get_xdata())]
    assert [mark.get_markerfacecolor() == "none" for mark in marks] == [True, False] * 2
    assert float(marks[1].get_xdata()[0]) == pytest.approx(float(table[2][2].split(" ")[0]), abs=0.05)


def test_a_method_tuned_with_two_budgets_has_a_row_for_each_on_the_page_too(tmp_path: Path) -> None:
    for trials, gain in ((8, 0.02), (16, 0.04)):
        preset = tmp_path / f"{trials}" / "fedavg_tuned.yaml"
        preset.parent.mkdir()
        preset.write_text(f"name: fedavg\ntraining: {{lr: 0.002, trials: {trials}}}\n")
        for seed in (0, 1):
            effects = {("global", ""): gain}
            write_run(tmp_path / f"runs/{trials}-{seed}", str(preset), seed, effects=effects)
    for seed in (0, 1):
        write_run(tmp_path / f"runs/fedavg-{seed}", "fedavg", seed)
    labels = [pair.label for pair in analysed(tmp_path / "runs").tuned]
    assert labels == ["fedavg global, 16 trials", "fedavg global, 8 trials"]
    assert compare.main([str(tmp_path / "runs"), f"output={tmp_path / 'report'}", "draws=200"]) == 0
    assert (tmp_path / "report/plots/tuning.png").exists()
    assert CAPTIONS["tuning"] in (tmp_path / "report/report.html").read_text()


def test_without_a_pair_on_the_same_seeds_there_is_no_table_of_tuning(planted: Path, tmp_path: Path) -> None:
    preset = tmp_path / "fedavg_tuned.yaml"
    preset.write_text("name: fedavg\ntraining: {lr: 0.002, trials: 8}\n")
    for seed in (0, 1, 2):
        write_run(tmp_path / f"runs/fedavg-{seed}", "fedavg", seed)
    write_run(tmp_path / "runs/tuned", str(preset), 0)
    told = r"tuned \(METHOD_tuned, of `sweep.py tune METHOD`\), both with all seeds"
    for folder in (planted, tmp_path / "runs"):
        with pytest.raises(ReportingError, match=told):
            tuning_text(analysed(folder))
        assert "tuning" not in draw_all(analysed(folder), [], LIGHT)


@pytest.mark.parametrize(
    ("same", "told"),
    [
        (9, "0.001 (9 methods); 8 methods with a value of their own."),
        (14, "0.001 (14 methods); 0.014 ({}); 0.015 ({}); 0.016 ({})."),  # those that are not as the others are named
    ],
)
def test_a_note_on_many_methods_counts_them(same: int, told: str, tmp_path: Path) -> None:
    for number in range(17):
        rate = 0.001 if number < same else number / 1000
        write_run(tmp_path / str(number), "fedprox", 0, f"algorithm.mu={number}", f"training.lr={rate}")
    found = gathered(tmp_path)
    (note,) = (note for note in found.notes if "training.lr" in note)
    alone = [label for label in found.methods if not label.endswith("training.lr=0.001)")]
    assert note == f"Methods differ in training.lr: {told.format(*alone)}"


# --- which runs -------------------------------------------------------------------------------------------------------


def test_runs_are_found_at_any_depth_by_folder_and_pattern(tmp_path: Path) -> None:
    for name in ("sweep/a/fedavg", "sweep/ditto", "other"):
        write_run(tmp_path / name, "fedavg")
    (tmp_path / "sweep/ditto/wandb").mkdir()
    (tmp_path / "sweep/ditto/wandb/config.yaml").write_text("of W&B")
    assert find_runs([str(tmp_path / "sweep")]) == [tmp_path / "sweep/a/fedavg", tmp_path / "sweep/ditto"]
    assert find_runs([str(tmp_path / "o*"), str(tmp_path / "other")]) == [tmp_path / "other"]
    for place, message in ((tmp_path / "nothing", "no such folder"), (tmp_path / "empty*", "no such folder")):
        with pytest.raises(ReportingError, match=message):
            find_runs([str(place)])
    (tmp_path / "bare").mkdir()
    with pytest.raises(ReportingError, match="holds no run"):
        find_runs([str(tmp_path / "bare")])


def test_unfinished_runs_are_left_out_with_the_cure_and_nothing_is_left_of_them(tmp_path: Path) -> None:
    write_run(tmp_path / "whole", "fedavg")
    write_run(tmp_path / "half", "ditto", finished=False)
    (found,) = gathered(tmp_path).left_out
    assert found.path == tmp_path / "half"
    assert f"python train.py output={tmp_path / 'half'} resume=true" in found.reason
    with pytest.raises(ReportingError, match=r"no run is left[\s\S]*half: not finished"):
        gather([read_run(tmp_path / "half", "dice")])


def test_a_metric_that_a_run_lacks_leaves_it_out(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "fedavg", metrics=("dice",))
    found = read_run(tmp_path / "a", "hd95")
    assert isinstance(found, LeftOut)
    assert "evaluation.metrics=dice" in found.reason


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (["data.size=64"], "data.size"),
        (["evaluation.tolerance=3"], "evaluation.tolerance"),
        (["evaluation.choose_by=nsd"], "evaluation.choose_by"),
        (["data.regions={disc: [1, 2]}"], "data.regions"),
        (["data.annotation=1"], "data.annotation"),
        (["data.split=[0.5, 0.25, 0.25]"], "data.split"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_field_and_folder(
    settings: list[str], field: str, tmp_path: Path
) -> None:
    for name in ("a", "b", "c", "d"):
        write_run(tmp_path / name, "fedavg", seed=ord(name))
    write_run(tmp_path / "e", "ditto", 0, *settings)
    with pytest.raises(ReportingError, match="cannot be compared") as error:
        gathered(tmp_path)
    told = str(error.value)
    assert f"  {field} is " in told
    assert f"in {tmp_path / 'a'}, {tmp_path / 'b'} and 2 more" in told
    assert f"in {tmp_path / 'e'}" in told


def test_public_images_belong_to_the_method_that_asks_for_them(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "fedavg")
    write_run(tmp_path / "b", "ditto", 0, "data.public=phantom", "data.public_images=8")
    assert len(gathered(tmp_path).runs) == 2


def test_other_splits_of_one_seed_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "fedavg")
    moved = write_run(tmp_path / "b", "ditto").path / "splits.csv"
    lines = moved.read_text().splitlines()
    place = next(i for i, line in enumerate(lines) if ",test," in line)
    lines[place] = lines[place].replace(",test,", ",train,")
    moved.write_text("\n".join(lines) + "\n")
    with pytest.raises(ReportingError, match=r"split seed 0: 2 rows differ; the first \(site site_01, case"):
        gathered(tmp_path)


def test_other_cases_are_refused_even_with_another_seed(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "fedavg")
    write_run(tmp_path / "b", "fedavg", 1, sites={**SITES, "site_09": 24})
    with pytest.raises(ReportingError, match=r"cases \(splits.csv\): 24 rows differ.*site_09"):
        gathered(tmp_path)


def test_a_run_counts_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, "fedavg", 0, "trainer.threads=1" if name == "a" else "trainer.threads=2")
    with pytest.raises(ReportingError, match=r"a and .*b have the same settings and seed 0"):
        gathered(tmp_path)


def test_seeds_collapse_and_knobs_stay_apart(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / f"weak{seed}", "ditto", seed, "algorithm.lam=0.1", "wandb.name=x", "data.workers=0")
        write_run(tmp_path / f"strong{seed}", "ditto", seed, "algorithm.lam=1", "training.lr=0.01")
    write_run(tmp_path / "prox", "fedprox", 0)
    found = gathered(tmp_path)
    assert list(found.methods) == ["ditto (lam=0.1, training.lr=0.001)", "ditto (lam=1.0, training.lr=0.01)", "fedprox"]
    assert [method.seeds for method in found.methods.values()] == [(0, 1), (0, 1), (0,)]
    assert any(note.startswith("Methods differ in training.lr") for note in found.notes)
    assert any("fedprox has seeds [0] of [0, 1]" in note for note in found.notes)


def test_where_sites_were_served_makes_no_other_method(tmp_path: Path) -> None:
    write_run(tmp_path / "here", "ditto", 0)
    write_run(
        tmp_path / "spread", "ditto", 1, "engine=flower-simulation", "deployment.sites=[site_01, site_02, site_03]"
    )
    found = gathered(tmp_path)
    assert list(found.methods) == ["ditto"]
    assert found.methods["ditto"].seeds == (0, 1)


def test_runs_of_an_earlier_version_have_todays_defaults_of_what_came_later(tmp_path: Path) -> None:
    for seed in (0, 1):
        run = write_run(tmp_path / f"ditto{seed}", "ditto", seed)
        private = ("privacy.mechanism=site", "data.foreground_slices_only=true")
        write_run(tmp_path / f"private{seed}", "fedavg", seed, *private)
        if seed == 0:
            config = OmegaConf.create(run.read_config())
            for section, key in (("algorithm", "lam"), ("privacy", "mechanism"), ("data", "foreground_slices_only")):
                del config[section][key]
            run.write_config(OmegaConf.to_yaml(config))
    runs = [read_run(path, "dice") for path in find_runs([str(tmp_path)])]
    with pytest.raises(ReportingError, match=r"data\.foreground_slices_only is false in .*ditto0"):
        gather(runs, default_settings)
    found = gather([run for run in runs if "private" not in run.path.name], default_settings)
    assert list(found.methods) == ["ditto"]
    (told,) = (note for note in found.notes if note.startswith("Some runs are older than these settings"))
    assert "algorithm.lam=0.1" in told
    assert "privacy.mechanism=none" in told


def test_damaged_runs_and_runs_of_means_are_left_out_by_name(tmp_path: Path) -> None:
    write_run(tmp_path / "fine", "fedavg")
    (write_run(tmp_path / "splits", "fedavg", 1).path / "splits.csv").unlink()
    (write_run(tmp_path / "cost", "fedavg", 2).path / "cost.json").write_text("[{")
    write_run(tmp_path / "config", "fedavg", 3).config_path.write_text("a: [")
    means = write_run(tmp_path / "means", "fedavg", 4)
    rows = as_means(means.scores())
    pd.DataFrame(rows).to_csv(means.path / "metrics.csv", index=False)
    found = gathered(tmp_path)
    assert [method.seeds for method in found.methods.values()] == [(0,)]
    reasons = {one.path.name: one.reason for one in found.left_out}
    assert reasons.keys() == {"splits", "cost", "config", "means"}
    assert all(reasons[name].startswith("damaged: ") for name in ("splits", "cost", "config"))
    assert "deployment.case_scores=pseudonyms" in reasons["means"]


def test_other_folders_of_data_and_sites_without_test_cases_are_noted(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "fedavg", 0, "data=folder", "data.root=/data/flair")
    write_run(tmp_path / "b", "fedavg", 1, "data=folder", "data.root=/data/t1")
    for name in "ab":
        path = tmp_path / name / "metrics.csv"
        pd.read_csv(path).query("not (site == 'site_02' and split == 'test')").to_csv(path, index=False)
    notes = " ".join(gathered(tmp_path).notes)
    assert "different folders (/data/flair, /data/t1)" in notes
    assert "No test cases that show a region, and so no answer: site_02." in notes


def without_region(folder: Path, site: str, every: int) -> int:
    """Leaves every n-th test case of a site without the region; how many are left."""
    table = pd.read_csv(folder / "metrics.csv", dtype={"case": str})
    cases = sorted(table.loc[(table["site"] == site) & (table["split"] == "test"), "case"].unique())
    table.loc[(table["site"] == site) & table["case"].isin(cases[::every]), "value"] = float("nan")
    table.to_csv(folder / "metrics.csv", index=False)
    return len(cases) - len(cases[::every])


def test_cases_without_a_region_count_for_no_model(tmp_path: Path) -> None:
    for algorithm in ("fedavg", "ditto"):
        write_run(tmp_path / algorithm, algorithm)
        left = without_region(tmp_path / algorithm, "site_01", 3)
    found = analysed(tmp_path, Options(draws=200))
    rows = found.overview
    assert set(rows.loc[rows["site"] == "site_01", "cases"]) == {left}
    gains = [found.gain(model, other, "site_01") for model in found.models for other in found.models if model != other]
    assert {gain.shape[1] for gain in gains if gain is not None} == {left}
    nothing = tmp_path / "fedavg" / "metrics.csv"
    for algorithm in ("fedavg", "ditto"):
        without_region(nothing.parent.parent / algorithm, "site_01", 1)
    found = analysed(tmp_path, Options(draws=200))
    assert "site_01" not in found.sites
    assert "No test cases that show a region, and so no answer: site_01." in found.gathered.notes


def test_a_run_that_counts_cases_without_a_region_is_refused(tmp_path: Path) -> None:
    for algorithm in ("fedavg", "ditto"):
        write_run(tmp_path / algorithm, algorithm)
    without_region(tmp_path / "ditto", "site_01", 3)
    with pytest.raises(ReportingError, match=r"do not show a region count in .*fedavg, which an older version made"):
        gathered(tmp_path)


def test_a_run_may_be_named_twice_and_turned_dials_have_a_plot_of_their_own(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "fedavg")
    assert len(find_runs([str(tmp_path / "a"), str(tmp_path / "." / "a" / ".." / "a"), str(tmp_path)])) == 1
    write_run(tmp_path / "c", "fedavg", 1, "data.annotation=0.25")
    with pytest.raises(ReportingError, match=r"(?s)data\.annotation is .*python -m fedseg.reporting\.dials"):
        gathered(tmp_path)


@pytest.mark.slow
def test_encoders_of_one_kind_do_not_split_a_method(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / f"stages{seed}/1", "contrastive", seed, finished=False)
        run = write_run(tmp_path / f"stages{seed}/2", "fedavg", seed)
        settings = yaml.safe_load(run.config_path.read_text())
        run.config_path.write_text(yaml.safe_dump({**settings, "pretrained": str(tmp_path / f"stages{seed}/1")}))
    found = gathered(tmp_path)
    assert list(found.methods) == ["fedavg"]
    assert found.methods["fedavg"].settings["pretrained"] == "contrastive, 20 rounds"


def folds(path: Path, algorithm: str, seed: int) -> None:
    """A run in which every site was held out in turn."""
    parent = write_run(path, algorithm, seed, "protocol=leave_one_site_out").path
    made = [write_run(parent / site, algorithm, seed, unseen=[site]).scores().query("not seen") for site in SITES]
    pd.concat(made).to_csv(parent / "metrics.csv", index=False)


@pytest.mark.slow
def test_folds_are_one_run_of_unseen_sites(tmp_path: Path) -> None:
    for algorithm in ("fedavg", "ditto"):
        folds(tmp_path / algorithm, algorithm, 0)
    write_run(tmp_path / "ordinary", "fedavg")
    found = gathered(tmp_path)
    assert len(found.runs["fedavg"]) == 2
    assert sum(run.held_out for run in found.runs["fedavg"]) == 1
    analysis = Analysis(found, FEW)
    assert [model.label for model in analysis.models] == ["fedavg global"]
    unseen = analysis.overview.query("not seen and checkpoint == 'best'")
    assert set(unseen["site"]) == {OVERALL, *SITES}
    assert set(unseen["method"]) == {"fedavg", "ditto"}
    report = write(analysis, tmp_path / "report", lambda _: Extras())
    assert "Unseen sites" in report.page.read_text()


def test_millimetres_and_pixels_make_no_mean_and_no_answer(tmp_path: Path) -> None:
    for name in ("fedavg", "ditto"):
        scores = pd.read_csv(path := write_run(tmp_path / name, name).path / "metrics.csv")
        scores.loc[(scores["site"] == "site_02") & (scores["metric"] == "hd95"), "unit"] = "mm"
        scores.to_csv(path, index=False)
    read = [read_run(path, "hd95") for path in find_runs([str(tmp_path)])]
    told = r"metric=hd95 has lengths in px at site_01, mm at site_02, px at site_03: .*metric=dice; or state the "
    with pytest.raises(ReportingError, match=told):
        analysed_of(read, Options(metric="hd95"))
    analysis = analysed_of(read, Options(draws=200))
    assert metric_grid(analysis).header == ("model", "dice")
    assert any(note.startswith("hd95: in mm where the spacing is known") for note in analysis.gathered.notes)
    by_site = summarise(RunFolder(tmp_path / "ditto").scores())
    assert {name.rpartition("/")[2] for name in by_site.values} == {"dice"}


# --- what is found ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_planted_gain_and_loss_are_found_where_they_are(planted: Path) -> None:
    found = {verdict.site: verdict for verdict in verdicts(analysed(planted))}
    assert list(found) == [OVERALL, "site_01", "site_02", "site_03"]
    assert found["site_02"].answer == "personal"
    assert found["site_03"].answer == "global"
    assert found["site_01"].answer == "equivalent"
    assert re.fullmatch(
        r"site_02: use the personal model \(ditto\), better than the global model and training alone "
        r"\(\d+ patients, \d+ cases\)\.",
        found["site_02"].text,
    )
    assert re.fullmatch(
        r"personal over global \((ditto, fedavg|ditto)\): \+\d\.\d Dice \(95% interval \+\d+\.\d to \+\d+\.\d\), "
        r"\d+ of \d+ patients better, corrected p (=|<) 0\.\d+",
        found["site_02"].details[0],
    )
    assert found["site_02"].test["gain"] == pytest.approx(0.08, abs=0.02)
    assert not any(verdict.provisional for verdict in found.values())


@pytest.mark.slow
def test_no_end_of_a_signed_distance_is_called_better(planted: Path) -> None:
    found = gathered(planted)
    signed = found.cases[found.cases["metric"] == "dice"].assign(metric="offset")
    assert "0 is best" not in metric_grid(Analysis(found, FEW)).note
    both = replace(found, cases=pd.concat([found.cases, signed]))
    assert metric_grid(Analysis(both, FEW)).note.endswith(" Of offset 0 is best.")


def test_the_difference_of_a_case_is_averaged_over_its_seeds(planted: Path) -> None:
    analysis = analysed(planted)
    row = analysis.compare(Model("ditto", "personal"), Model("fedavg", "global"), "site_02")
    assert row is not None
    test_cases = {
        case
        for seed in range(3)
        for case in RunFolder(planted / f"ditto-{seed}").splits().query("site == 'site_02' and split == 'test'")["case"]
    }
    assert row["cases"] == row["patients"] == len(test_cases)
    scores = [RunFolder(planted / f"{name}").scores() for name in ("ditto-1", "fedavg-1")]
    mine, theirs = (
        table.query(
            f"checkpoint == 'best' and split == 'test' and site == 'site_02' and metric == 'dice' and view == '{view}'"
        )
        .groupby("case")["value"]
        .mean()
        for table, view in zip(scores, ("personal", "global"), strict=True)
    )
    gain = analysis.gain(Model("ditto", "personal"), Model("fedavg", "global"), "site_02")
    assert gain is not None
    apart = gain.droplevel("patient", axis=1).loc[1].dropna().sort_index()
    pd.testing.assert_series_equal(apart, mine - theirs, check_names=False)


def test_the_pair_is_chosen_on_validation_never_on_test(tmp_path: Path) -> None:
    write_run(tmp_path / "fedavg", "fedavg")
    write_run(tmp_path / "ditto", "ditto", effects={("personal", ""): 0.05})
    worse = write_run(tmp_path / "finetune", "finetune", effects={("personal", ""): 0.02}).path / "metrics.csv"
    table = pd.read_csv(worse)  # best on test cases, but not on validation cases
    table.loc[(table["split"] == "test") & (table["view"] == "personal") & (table["metric"] == "dice"), "value"] = 0.99
    table.to_csv(worse, index=False)
    assert {verdict.personal for verdict in verdicts(analysed(tmp_path))} == {Model("ditto", "personal")}


@pytest.mark.slow
def test_negative_transfer_is_named(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / f"fedavg{seed}", "fedavg", seed, effects={("global", "site_02"): -0.2})
        write_run(tmp_path / f"local{seed}", "local", seed)
    analysis = analysed(tmp_path)
    found = {verdict.site: verdict for verdict in verdicts(analysis)}
    assert found["site_02"].answer == "alone"
    assert found["site_02"].text.startswith("site_02: train alone (local), better than the global model (")
    assert found["site_01"].text.startswith(
        "site_01: personal and global model cannot be compared, these runs have no "
    )
    assert found["site_02"].provisional
    page = write(analysis, tmp_path / "report", lambda _: Extras()).page.read_text()
    assert re.search(
        r"Negative transfer against local training, significant after Holm: site_02 with fedavg "
        r"global \(−\d+\.\d Dice\)",
        page,
    )


def test_too_few_patients_say_which_p_they_could_give(tmp_path: Path) -> None:
    sites = {"site_01": 10, "site_02": 24}
    write_run(tmp_path / "ditto", "ditto", sites=sites, effects={("personal", ""): 0.1})
    _, small, large = verdicts(analysed(tmp_path))
    assert small.answer == "too few patients"
    told = "4 patients, 4 cases. With 4 patients that differ and 2 tests, corrected p cannot be below 0.12."
    assert told in small.text
    assert large.answer == "personal"
    assert large.provisional


def test_a_family_too_large_for_any_test_says_so(planted: Path) -> None:
    """All patients agree in every test, and what can be shown hangs on how many tests there are."""
    strong = {"model": "m", "against": "l", "site": "a", "cases": 40, "low": 0.09, "high": 0.11, "no_interval": ""}
    strong |= paired({"a": np.random.default_rng(0).normal(0.1, 0.01, (1, 40))}).__dict__
    runs = gathered(planted)
    for size, told in ((500, False), (501, True)):
        analysis = Analysis(runs, FEW)
        table = pd.DataFrame([{"question": AGAINST_LOCAL, **strong}] * size)
        analysis.__dict__["tests"] = table.assign(p_holm=holm(table["p"].to_list()))
        grid = grid_of_tests(analysis, AGAINST_LOCAL, "x", "x")
        assert (grid.rows[0][3].mark == "best") is not told
        line = "No test of this family could be significant: none of 501 can be below 0.0501 corrected."
        assert (line in grid.note) is (line in _transfer_text(analysis)) is told


@pytest.mark.slow
def test_an_interval_is_within_what_gains_can_be_and_two_patients_have_none(tmp_path: Path) -> None:
    """Of four patients who gain and lose much, t alone would tell of gains beyond 100 points of Dice."""
    sites = {"few": 5, "wild": 10, "many": 40}
    write_run(tmp_path / "ditto", "ditto", sites=sites, effects={("personal", ""): -0.3}, noise=0.6)
    write_run(tmp_path / "local", "local", sites=sites, noise=0.6)
    analysis = analysed(tmp_path)
    report = write(analysis, tmp_path / "report", lambda _: Extras())
    shown, page = report.text(io.StringIO()), report.page.read_text()
    for name in ("answers", "tests", "scores"):
        table = pd.read_csv(tmp_path / f"report/tables/{name}.csv").set_index("site")
        assert set(table.loc["few", "no_interval"]) == {"no interval: 2 patients"}
        assert table.loc["few", ["low", "high"]].isna().all(axis=None)
        rest = table.drop(index="few")
        assert rest["no_interval"].isna().all()
        assert rest[["low", "high"]].abs().max(axis=None) <= 1
        assert name == "scores" or rest.loc["wild", ["low", "high"]].abs().max(axis=None) == 1
    for text in (shown, page, answer_text(analysis)):
        assert "(no interval: 2 patients)" in text
        assert max(abs(float(end)) for end in re.findall(r"interval [+−]([\d.]+) to", text)) <= 100
    for name in ("answers", "scores_best", "against_local"):
        assert "no interval: 2 patients" in (tmp_path / f"report/tables/{name}.tex").read_text()
    assert not re.search(r"\bnan\b", shown + answer_text(analysis))


def test_a_distance_has_no_greatest_gain(tmp_path: Path) -> None:
    sites = {"site_01": 10, "site_02": 10}
    write_run(tmp_path / "ditto", "ditto", sites=sites, effects={("personal", ""): -0.3}, noise=0.6)
    rows = verdicts(analysed(tmp_path, Options(draws=200, metric="hd95")))
    assert max(abs(row.test["low"]) for row in rows) > 10


@pytest.mark.parametrize("values", [[1, True, 1.0, "1"], [0, False, None, ""], [[1], ["1"], {"a": 1}, {"a": True}]])
def test_settings_of_different_kinds_are_different(values: list[Any]) -> None:
    assert len({signature(value) for value in values}) == len(values)
    assert [signature(value) for value in values] == [signature(value) for value in values]


SURE: Mapping[str, Any] = {"p_holm": 0.01, "smallest_p_holm": 0.001, "smallest_p_at_all": 0.001, "family": 3}
NOTHING = {"p_holm": 0.4, "low": -0.03, "high": 0.03}


def rows(**tests: Mapping[str, float]) -> dict[Any, Any]:
    """Tests of one place: pg, pl and gl are personal against global, personal and global against alone."""
    names = {"pg": ("personal", "global"), "pl": ("personal", "alone"), "gl": ("global", "alone")}
    return {names[key]: {**SURE, **row} for key, row in tests.items()}


UP, DOWN = {"low": 0.01, "high": 0.05}, {"low": -0.05, "high": -0.01}


@pytest.mark.parametrize(
    ("tests", "answer"),
    [
        (rows(pg=UP), "personal"),  # training alone is missing
        (rows(pg=UP, pl=UP, gl=NOTHING), "personal"),
        (rows(pg=DOWN, pl=NOTHING, gl=UP), "global"),
        (rows(pg=NOTHING, pl=DOWN, gl=DOWN), "alone"),
        (rows(pg=UP, pl=NOTHING, gl=NOTHING), "not shown"),  # it may be worse than training alone, beyond the margin
        (rows(pg=UP, pl={**NOTHING, "low": -0.015}, gl=NOTHING), "personal"),  # not worse beyond the margin
        (rows(pg=UP, pl=DOWN, gl=DOWN), "alone"),  # better than the global model, and yet no reason to take part
        (rows(pg=UP, pl={"low": -0.015, "high": -0.005}, gl=DOWN), "alone"),  # within the margin, but shown worse
        (rows(pg={**NOTHING, "low": -0.01, "high": 0.015}), "equivalent"),
        (rows(pg={**NOTHING, "low": -0.01, "high": 0.025}), "not shown"),
        (rows(pg={**NOTHING, "low": -0.01, "high": 0.015}, pl=UP, gl=UP), "equivalent"),  # either will do
        (rows(pg={**NOTHING, "low": -0.01, "high": 0.015}, pl=DOWN, gl=NOTHING), "not shown"),
        (rows(pg={"low": -0.01, "high": 0.05}), "not shown"),  # the test speaks, the interval holds 0
        (rows(pg={"low": np.nan, "high": np.nan}), "not shown"),
        (rows(pg={**NOTHING, "p_holm": 0.0625, "smallest_p_at_all": 0.0625}), "too few patients"),
        (rows(pg={**NOTHING, "low": -0.01, "high": 0.01, "smallest_p_at_all": 0.0625}), "too few patients"),
        (rows(pg={**NOTHING, "low": 0.0, "high": 0.002, "smallest_p_holm": 0.25}), "equivalent"),  # most of them tie
        (rows(pg=UP, pl={**NOTHING, "low": -0.01, "high": 0.012}, gl=DOWN), "not shown"),  # both beat the global one
        (rows(pg=DOWN, pl=DOWN, gl={**NOTHING, "low": -0.01, "high": 0.012}), "not shown"),
        (rows(gl=UP), "global"),
        (rows(gl=NOTHING), "not compared"),
        ({}, "not compared"),
    ],
)
def test_answers(tests: Mapping[Any, Any], answer: str) -> None:
    assert answer_of(tests, FEW) == answer


def test_the_margin_moves_what_is_not_worse_and_equivalent() -> None:
    tests = rows(pg={**NOTHING, "low": -0.01, "high": 0.025})
    assert answer_of(tests, Options(margin=3)) == "equivalent"
    tests = rows(pg=UP, pl={**NOTHING, "low": -0.015}, gl=NOTHING)
    assert answer_of(tests, Options(margin=1)) == "not shown"


@pytest.mark.slow
def test_many_sites_can_make_patients_too_few(tmp_path: Path) -> None:
    """Seven patients who all agree give p = 0.016; with eight sites Holm's correction takes that away."""
    sites = {f"site_{number:02d}": 18 for number in range(8)}
    write_run(tmp_path / "ditto", "ditto", sites=sites, effects={("personal", "site_00"): 0.2})
    over, *found = verdicts(analysed(tmp_path))
    assert found[0].test["smallest_p"] < 0.05
    assert {verdict.answer for verdict in found} == {"too few patients"}
    assert over.answer == "not shown"


def test_models_that_agree_in_one_metric_only_stay_two(tmp_path: Path) -> None:
    """Nothing is missed by either: that is not the same model. Nor is a personal model that equals a global one."""
    write_run(tmp_path / "fedavg", "fedavg", metrics=("dice", "missed"))
    write_run(tmp_path / "ditto", "ditto", metrics=("dice", "missed"))
    for name in ("fedavg", "ditto"):
        path = tmp_path / name / "metrics.csv"
        table = pd.read_csv(path)
        table.loc[table["metric"] == "missed", "value"] = 0.0
        table.to_csv(path, index=False)
    assert len(analysed(tmp_path, Options(metric="missed", draws=200)).models) == 3
    same = tmp_path / "ditto" / "metrics.csv"
    table = pd.read_csv(same).query("view == 'global'")
    pd.concat([table, table.assign(view="personal").query("seen")]).to_csv(same, index=False)
    analysis = analysed(tmp_path)
    assert {verdict.personal for verdict in verdicts(analysis)} == {Model("ditto", "personal")}
    row = analysis.compare(Model("ditto", "personal"), Model("ditto", "global"), "site_01")
    assert row is not None
    assert (row["gain"], row["p"]) == (0, 1)


@pytest.mark.slow
def test_of_one_model_under_two_names_the_one_with_more_seeds_stays(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        write_run(tmp_path / f"ditto{seed}", "ditto", seed, effects={("personal", ""): 0.1})
    fedavg = write_run(tmp_path / "fedavg", "fedavg", 0).path / "metrics.csv"
    pd.read_csv(tmp_path / "ditto0/metrics.csv").query("view == 'global'").to_csv(fedavg, index=False)
    analysis = analysed(tmp_path)
    assert set(analysis.models) == {Model("ditto", "personal"), Model("ditto", "global")}
    assert analysis.tests["seeds"].tolist() == [3, 3, 3, 3]


@pytest.mark.slow
def test_a_method_that_lacks_seeds_is_listed_last_and_not_ranked(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        write_run(tmp_path / f"fedavg{seed}", "fedavg", seed)
        write_run(tmp_path / f"finetune{seed}", "finetune", seed, effects={("personal", ""): 0.02})
    write_run(tmp_path / "ditto", "ditto", 1, effects={("personal", ""): 0.2})
    analysis = analysed(tmp_path)
    assert analysis.ranked_seeds == [0, 1, 2]
    thin = {Model("ditto", "personal"), Model("ditto", "global")}
    assert set(analysis.models[-2:]) == thin
    assert set(analysis.patient_table.columns).isdisjoint(model.label for model in thin)
    assert {verdict.personal for verdict in verdicts(analysis)} == {Model("finetune", "personal")}
    page = write(analysis, tmp_path / "report", lambda _: Extras()).page.read_text()
    assert "ditto personal (lacks seed 0, 2)" in page
    assert "Not ranked, for want of seeds or sites: ditto personal" in page
    assert np.isfinite(analysis.ranks.p)
    told = r"\(seeds 0, 1, 2\) the ranks of these trained models [^.]* \(Friedman p = .*; what other trainings would "
    assert re.search(told + r"bring is not in it\.", page)
    best = pd.read_csv(tmp_path / "report/tables/ranking.csv")
    assert best["model"].tolist()[0] == "finetune personal"


@pytest.mark.slow
def test_more_seeds_make_no_better_mean(tmp_path: Path) -> None:
    """FedAvg's two other seeds are lucky; on those that all have it is the worst."""
    for seed in range(5):
        write_run(tmp_path / f"fedavg{seed}", "fedavg", seed, effects={("global", ""): 0.1 * (seed > 2)})
        if seed < 3:
            write_run(tmp_path / f"fedbn{seed}", "fedbn", seed, effects={("personal", ""): 0.02})
    analysis = analysed(tmp_path)
    more, less = Model("fedbn", "personal"), Model("fedavg", "global")
    assert analysis.models == [more, less]
    assert analysis.complete == {more, less}
    assert analysis.fairness["mean"].is_monotonic_decreasing
    row = analysis.compare(more, less, OVERALL)
    assert row is not None
    means = {model: float(np.mean([*analysis.means(model).values()])) for model in analysis.models}
    assert means[more] - means[less] == pytest.approx(row["gain"])
    scores, metrics = score_grid(analysis, "best"), metric_grid(analysis)
    assert [cells[1].key for cells in scores.rows] == pytest.approx([means[model] for model in analysis.models])
    assert [cells[1].mark for cells in scores.rows] == ["best", ""]
    assert [cells[-1].text for cells in scores.rows] == ["3", "3"]
    dice = metrics.header.index("dice")
    assert [cells[dice].key for cells in metrics.rows] == pytest.approx([cells[1].key for cells in scores.rows])
    for grid in (scores, metrics, fairness_grid(analysis), region_site_grids(analysis)[0]):
        assert " Side by side on seeds 0, 1, 2; fedavg global has more." in grid.note


@pytest.mark.slow
def test_a_mean_over_fewer_sites_is_no_better_mean(tmp_path: Path) -> None:
    write_run(tmp_path / "fedavg", "fedavg", effects={("global", "site_03"): -0.4})
    partial = write_run(tmp_path / "ditto", "ditto").path / "metrics.csv"
    pd.read_csv(partial).query("site != 'site_03'").to_csv(partial, index=False)
    analysis = analysed(tmp_path)
    assert analysis.models[0] == Model("fedavg", "global")
    assert analysis.fairness["method"].tolist() == ["fedavg"]
    report = write(analysis, tmp_path / "report", lambda _: Extras())
    assert "ditto personal (lacks site site_03)" in report.page.read_text()


@pytest.mark.slow
def test_two_models_that_share_no_seed_are_not_a_pair(tmp_path: Path) -> None:
    write_run(tmp_path / "fedavg", "fedavg", 0, effects={("global", ""): 0.1})
    write_run(tmp_path / "ditto", "ditto", 1, effects={("personal", ""): 0.2})
    found = verdicts(analysed(tmp_path))
    assert {(v.personal, v.shared) for v in found} == {(Model("ditto", "personal"), Model("ditto", "global"))}


def test_training_luck_is_no_recommendation(tmp_path: Path) -> None:
    """The patients agree about the models of each seed, and the seeds do not: another training may turn it."""
    for seed, luck in enumerate((0.09, -0.02, 0.02)):
        write_run(tmp_path / f"ditto{seed}", "ditto", seed, "data.split_seed=0", effects={("personal", ""): luck})
    found = verdicts(analysed(tmp_path))
    assert {verdict.answer for verdict in found} == {"not shown"}
    for verdict in found:
        assert verdict.test["p_patients"] < 0.01 < 0.1 < verdict.test["p"]
        assert "could have shown a difference of " in verdict.text


def test_one_model_under_two_names_is_one(tmp_path: Path) -> None:
    write_run(tmp_path / "fedavg", "fedavg")
    ditto = write_run(tmp_path / "ditto", "ditto").path / "metrics.csv"
    own = pd.read_csv(ditto).query("view == 'personal'")
    pd.concat([own, pd.read_csv(tmp_path / "fedavg/metrics.csv")]).to_csv(ditto, index=False)
    analysis = analysed(tmp_path)
    assert set(analysis.models) == {Model("ditto", "personal"), Model("fedavg", "global")}
    assert analysis.counterpart(Model("ditto", "personal")) == Model("fedavg", "global")


@pytest.mark.slow
def test_folds_alone_make_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a sweep of configs/sweep/leave_one_site_out.yaml leaves behind."""
    for seed in (0, 1):
        folds(tmp_path / f"fedavg-{seed}", "fedavg", seed)
    assert compare.main([str(tmp_path), f"output={tmp_path / 'report'}", "draws=200"]) == 0
    told = capsys.readouterr().out
    assert "Every site was held out in turn" in told
    assert "fedavg global" in told
    assert "No other model stands beside FedAvg here" in told
    page = (tmp_path / "report/report.html").read_text()
    assert "<li>3 sites that took no part</li><li>72 patients, 72 test cases</li>" in page
    cost = pd.read_csv(tmp_path / "report/tables/unseen_cost.csv")
    assert cost["steps"].tolist() == [3 * 80]  # three folds of two sites each
    assert "Unseen sites" in (tmp_path / "report/report.html").read_text()
    folds(tmp_path / "ditto-0", "ditto", 0)
    write_run(tmp_path / "ditto-out", "ditto", 0, unseen=["site_02"])
    with pytest.raises(ReportingError, match=r"site_02 took no part in .*ditto-out .*held out in turn in .*ditto-0"):
        gathered(tmp_path)


def test_a_method_without_a_global_model_is_held_against_the_most_similar_fedavg(tmp_path: Path) -> None:
    write_run(tmp_path / "bn", "fedbn", 0, "training.lr=0.01")
    write_run(tmp_path / "a", "fedavg", 0)
    write_run(tmp_path / "b", "fedavg", 0, "training.lr=0.01", effects={("global", ""): 0.01})
    assert analysed(tmp_path).counterpart(Model("fedbn", "personal")) == Model("fedavg (training.lr=0.01)", "global")


@pytest.mark.slow
def test_a_distance_is_better_when_lower(planted: Path) -> None:
    found = {verdict.site: verdict for verdict in verdicts(analysed(planted, Options(metric="hd95", draws=200)))}
    assert found["site_02"].answer == "personal"
    assert found["site_02"].test["gain"] > 1
    assert "(+ is better)" in found["site_02"].details[0]


@pytest.mark.slow
def test_tables_hold_means_spread_and_cost(planted: Path) -> None:
    analysis = analysed(planted)
    scores = (
        RunFolder(planted / "pooled-0").scores().query("checkpoint == 'best' and split == 'test' and metric == 'dice'")
    )
    pooled = analysis.overview.query("method == 'pooled' and checkpoint == 'best'").set_index("site")
    by_seed = [
        RunFolder(planted / f"pooled-{seed}")
        .scores()
        .query("checkpoint == 'best' and split == 'test' and metric == 'dice'")
        .groupby("site")["value"]
        .mean()
        for seed in range(3)
    ]
    assert pooled.loc["site_01", "mean"] == pytest.approx(np.mean([means["site_01"] for means in by_seed]))
    assert pooled.loc[OVERALL, "seed_spread"] == pytest.approx(np.std([means.mean() for means in by_seed], ddof=1))
    assert (pooled["low"] < pooled["mean"]).all()
    assert pooled.loc[OVERALL, "seeds"] == 3
    assert len(scores)
    cost = analysis.cost.set_index("method")
    assert (cost.loc["fedavg", "bytes_up"], cost.loc["local", "bytes_up"]) == (12e6, 0)
    assert cost.loc["fedavg", "steps"] == 120
    assert cost.loc["fedavg", "cpu_seconds"] == 8
    assert 3 <= cost.loc["fedavg", "rounds_to_target"] <= 4  # validation climbs in every one of four rounds
    assert cost.loc["fedavg", "reached"] == "3 of 3"
    (planted / "fedavg-0/environment.json").write_text('{"seeds": {}, "processes": [{}, {}]}')  # a process was killed
    fedavg = analysed(planted).cost.set_index("method").loc["fedavg"]
    assert fedavg["cpu_seconds"] == 8  # of the two other seeds
    assert np.isnan(analysed(planted).cost.set_index("method").loc["ditto", "peak_gpu_bytes"]).all()


@pytest.mark.exhaustive
@pytest.mark.slow
def test_without_a_difference_comparisons_find_one_at_the_stated_rate() -> None:
    """Whole comparisons of methods that are alike, chosen on validation: at most 5 % find a difference at some site.

    The cases' luck is shared by the seeds; the models' is not part of it (see the test of training luck).
    """
    trials, tested, found = 150, 0, 0
    for trial in range(trials):
        answers = verdicts(_alike(trial))
        tested += bool(min(verdict.test["p_holm"] for verdict in answers) <= 0.05)
        found += any(verdict.answer in ("personal", "global", "alone") for verdict in answers)
    assert 1 <= tested <= 0.05 * trials + 3 * np.sqrt(0.05 * 0.95 * trials)
    assert found <= tested


def _alike(trial: int) -> Analysis:
    """Three methods, three sites, two seeds, twelve cases for each purpose; no method is better anywhere."""
    generator = np.random.default_rng(trial)
    models = (("fedavg", "global"), ("ditto", "personal"), ("fedbn", "personal"))
    index = pd.MultiIndex.from_product(
        [models, ("a", "b", "c"), (0, 1), ("val", "test"), [f"case{n}" for n in range(12)]],
        names=["model", "site", "seed", "split", "case"],
    )
    luck = np.broadcast_to(generator.normal(0, 0.05, (3, 3, 1, 2, 12)), (3, 3, 2, 2, 12))
    cases = index.to_frame(index=False)
    cases["method"], cases["view"] = cases["model"].str[0], cases["model"].str[1]
    cases["value"] = 0.7 + luck.ravel() + generator.normal(0, 0.02, luck.size)
    cases = cases.drop(columns="model").assign(checkpoint="best", seen=True, metric="dice", patient=cases["case"])
    methods = {name: Method(name, name, {}, (0, 1)) for name in ("fedavg", "ditto", "fedbn")}
    return Analysis(Gathered(methods, {}, cases, cases, [], []), Options(draws=100))


def test_tables_of_one_page_average_a_patients_images_first(tmp_path: Path) -> None:
    """Every other patient has three images, the others one, which is much worse: a mean over images is not theirs."""
    of_seeds = []
    for seed in (0, 1):
        folder = write_run(tmp_path / f"fedavg{seed}", "fedavg", seed, sites={"a": 30, "b": 24}, images=3).path
        splits, scores = (pd.read_csv(folder / f"{name}.csv") for name in ("splits", "metrics"))
        for name, table in (("splits", splits), ("metrics", scores)):
            number = table["case"].str[-4:].astype(int)
            rich = number // 3 % 2 == 0
            table["value"] = np.where(rich, 0.9, 0.1 + 0.01 * seed)
            kept = table[rich | (number % 3 == 0)]
            (kept if name == "metrics" else kept.drop(columns="value")).to_csv(folder / f"{name}.csv", index=False)
        patients = splits[splits["split"] == "test"].drop_duplicates(["site", "patient"])
        of_seeds.append(patients.groupby("site")["value"].mean())
    expected = pd.concat(of_seeds, axis=1).mean(axis=1)
    analysis = analysed(tmp_path)
    overall, *sites = [cell.key for cell in score_grid(analysis, "best").rows[0][1:4]]
    assert sites == pytest.approx([*expected])
    by_metric = metric_grid(analysis)
    assert by_metric.rows[0][by_metric.header.index("dice")].key == pytest.approx(overall)
    assert [cell.key for cell in region_grid(analysis).rows[0][1:]] == pytest.approx([overall] * 2)
    for grid in region_site_grids(analysis):
        assert [cell.key for cell in grid.rows[0][1:]] == pytest.approx([overall, *sites])
    save_tables([], analysis, [], {}, tmp_path)
    for name in ("metrics", "regions"):
        saved = pd.read_csv(tmp_path / f"{name}.csv").query("checkpoint == 'best' and split == 'test'")
        assert [*saved.query("metric == 'dice'").groupby("site")["value"].mean()] == pytest.approx(sites)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("rendered")
def test_the_command_writes_page_tables_and_plots_and_replaces_its_own(
    planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "report"
    assert compare.main([str(planted), f"output={output}", "draws=200"]) == 0
    told = capsys.readouterr()
    assert (
        "PERSONAL  site_02: use the personal model (ditto), better than the global model and training alone" in told.out
    )
    assert "- The personal model is ditto: there is no other." in told.out
    assert "\033[" not in told.out
    assert f"The report: {output / 'report.html'}" in told.out
    assert {
        "answers.csv",
        "scores.csv",
        "tests.csv",
        "fairness.csv",
        "cost.csv",
        "scores_best.tex",
        "scores_last.tex",
    } <= {p.name for p in (output / "tables").iterdir()}
    for name in ("gain", "scores", "transfer", "critical_difference", "ranks", "win_tie_loss", "progress"):
        assert (output / f"plots/{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (output / f"plots/{name}.svg").read_text()
    tests = pd.read_csv(output / "tables/tests.csv")
    assert set(tests["question"]) == {"personal against global", "against local training"}
    assert (tests["p_holm"] >= tests["p"]).all()
    page = (output / "report.html").read_text()
    assert "Not drawn: these runs&#39; folders hold no saved models" in page
    for name in ("ranking", "curves", "metrics", "regions"):
        assert len(pd.read_csv(output / f"tables/{name}.csv"))
    (output / "report.html").write_text("")  # what a comparison leaves that is stopped
    (output / "tables/old.csv").write_text("")
    assert compare.main([str(planted), f"output={output}", "draws=200", "metric=hd95"]) == 0
    assert not (output / "tables/old.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["metrc=dice"], "unknown key 'metrc'; did you mean 'metric'?"),
        (["metric=dise"], "did you mean 'dice'"),
        (["alpha=0"], "alpha=0.0 is out of range"),
        (["draws=many"], "draws=many should be int"),
        (["output={}/fedavg-0"], "holds something that is no report"),
        (["nowhere"], "nowhere: there is no such folder"),
    ],
)
def test_mistakes_are_told_in_one_line(
    arguments: Sequence[str], message: str, planted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main([str(planted), *(argument.format(planted) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.slow
def test_runs_are_compared_without_torch(planted: Path, tmp_path: Path) -> None:
    told = "import sys, compare; code = compare.main(sys.argv[1:]); sys.exit(code or 'torch' in sys.modules)"
    command = [sys.executable, "-c", told, str(planted), f"output={tmp_path}", "draws=200"]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0


def test_somebodys_tables_are_no_report(planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "paper" / "tables" / "mine.csv"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert compare.main([str(planted), f"output={tmp_path / 'paper'}", "draws=200"]) == 2
    assert "holds something that is no report" in capsys.readouterr().err
    assert mine.read_text() == "mine"


def test_the_largest_gain_is_found_whichever_seed_tested_it(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        write_run(tmp_path / f"ditto{seed}", "ditto", seed)
    tested = [
        set(RunFolder(tmp_path / f"ditto{seed}").splits().query("site == 'site_01' and split == 'test'")["case"])
        for seed in (0, 1, 2)
    ]
    case = min(tested[2] - tested[0] - tested[1])
    path = tmp_path / "ditto2" / "metrics.csv"
    table = pd.read_csv(path)
    own = (table["site"] == "site_01") & (table["case"] == case) & (table["metric"] == "dice")
    table.loc[own & (table["view"] == "personal"), "value"] = 0.9
    table.loc[own & (table["view"] == "global"), "value"] = 0.2
    table.to_csv(path, index=False)
    found = extremes(analysed(tmp_path), Model("ditto", "personal"), Model("ditto", "global"), "site_01", 2)
    assert len(found) == 4
    assert (found[0].case, found[0].seed, found[0].seeds) == (case, 2, 1)
    assert found[0].gain == found[0].own_gain == pytest.approx(0.7)
    assert found[-1].gain == min(one.gain for one in found) < 0
    for one in found:
        assert one.case in tested[one.seed], "drawn with a seed that tested it"


def test_values_are_read_as_train_reads_them(tmp_path: Path) -> None:
    given = [str(tmp_path), "alpha=1e-2", "output=2024-01-01", "data.root=moved"]
    places, options, place, elsewhere = requested(given)
    assert elsewhere == ["data.root=moved"]
    assert (places, options.alpha, place.output) == ([str(tmp_path)], 0.01, "2024-01-01")


def test_help_names_every_knob_and_no_argument_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["--help"]) == 0
    told = capsys.readouterr().out
    assert "metric=dice" in told
    assert "pictures=true" in told
    live = {**knobs(Options), **knobs(Destination)}
    assert told == f"{compare.help_text()}\n"
    for name, knob in live.items():
        assert f"  {name.removesuffix('_')}={written(knob.default)}   {knob.description}" in told.splitlines()
    assert compare.main([]) == 2
    assert compare.main(["metric=dice"]) == 2


@pytest.mark.slow
def test_every_region_has_its_table_by_site_in_the_terminal(planted: Path, tmp_path: Path) -> None:
    report = write(analysed(planted), tmp_path, lambda _: Extras())
    text = report.text(io.StringIO())
    scores = RunFolder(planted / "pooled-0").scores()
    for region in ("disc", "cup"):
        (table,) = [one for one in report.regions if f"Dice of {region} by site" in one.header[0]]
        assert table.header[1:] == ("mean over sites", "site_01", "site_02", "site_03")
        assert table.header[0] in text
        (row,) = [row for row in table.rows if row[0] == "pooled global"]
        per_seed = []
        for seed in range(3):
            scores = RunFolder(planted / f"pooled-{seed}").scores()
            own = scores.query("checkpoint == 'best' and split == 'test' and metric == 'dice' and region == @region")
            per_seed.append(own.groupby("site")["value"].mean())
        means = pd.concat(per_seed, axis=1).mean(axis=1) * 100
        assert row[2:] == tuple(f"{value:.1f}" for value in means)
        assert row[1] == f"{means.mean():.1f}"


@pytest.mark.slow
def test_the_terminal_is_coloured_the_pipe_is_not(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    report = write(analysed(planted), tmp_path, lambda _: Extras())
    assert "\033[1m" in report.text(Terminal())
    assert "\033[" not in report.text(io.StringIO())


def test_latex_is_escaped() -> None:
    grid = Grid("x", "50 % & more", ("model", "a_b"), [[Cell("ditto_1"), Cell("−1.5", -1.5, "1 to 2", "best")]])
    text = grid.latex()
    assert r"ditto\_1 & \textbf{$-$1.5} {\scriptsize 1 to 2} \\" in text
    assert r"\caption{50 \% \& more}" in text


def test_differences_of_sites_that_say_nothing_are_left_out() -> None:
    rows = [
        ("a", "", "size", 1.0),
        ("b", "", "size", 2.0),
        ("a", "b", "size", 9.0),
        ("a", "", "presence", 0.0),
        ("b", "", "presence", 0.0),
    ]
    table = telling(pd.DataFrame(rows, columns=["site", "other", "measure", "value"]), {"a": 0.1, "b": 0.2})
    assert table["value"].tolist() == [1.0, 2.0]
