"""What may be said: patients count, not images; one choice for all sites; training alone is a candidate."""

import gc
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import compare
from benchmarks.verdicts import WRONG, power, wrong
from fedseg.configs.compose import compose
from fedseg.datamodules.findings import COLUMNS, Finding, as_rows
from fedseg.launch.settings import SCHEMA
from fedseg.reporting import ReportingError
from fedseg.reporting.compare.analysis import OVERALL, Analysis, Model
from fedseg.reporting.compare.choice import choose
from fedseg.reporting.compare.gather import gather
from fedseg.reporting.compare.options import Options
from fedseg.reporting.compare.page import data_name, small_print
from fedseg.reporting.compare.report import Extras, write
from fedseg.reporting.compare.runs import find_runs, read_run
from fedseg.reporting.compare.verdicts import verdicts
from fedseg.reporting.units import signed
from tests.federations import World
from tests.run_folders import write_run

FEW = Options(draws=200)
PERSONAL, GLOBAL = "personal", "global"


def analysed(folder: Path, options: Options = FEW) -> Analysis:
    return Analysis(gather(read_run(path, options.metric) for path in find_runs([str(folder)])), options)


def told(analysis: Analysis) -> str:
    choice = choose(analysis)
    return "\n".join(small_print(analysis, choice, verdicts(analysis, choice)))


# --- patients ---------------------------------------------------------------------------------------------------------


def test_images_of_a_few_patients_are_no_crowd(tmp_path: Path) -> None:
    """Twenty images of four patients who agree: no test of images may speak, and both numbers are named."""
    sites = {"site_01": 50, "site_02": 125}
    write_run(tmp_path / "ditto", "ditto", sites=sites, effects={("personal", ""): 0.1}, images=5)
    _, small, large = verdicts(analysed(tmp_path))
    assert (small.test["patients"], small.test["cases"]) == (4, 20)
    assert small.answer == "too few patients"
    assert "4 patients, 20 cases" in small.text
    assert small.test["smallest_p"] == 2 / 2**4
    assert small.test["detectable"] == math.inf
    row = large.test
    assert max(row["gain"] - row["low"], row["high"] - row["gain"]) < row["detectable"] < 0.2
    assert (large.test["patients"], large.test["cases"]) == (10, 50)
    assert large.answer == "personal"


def test_a_patient_counts_once_however_many_images(tmp_path: Path) -> None:
    write_run(tmp_path / "fedavg", "fedavg", images=3)
    path = tmp_path / "fedavg" / "metrics.csv"
    table = pd.read_csv(path)
    mine = table["site"].eq("site_01") & table["split"].eq("test") & table["metric"].eq("dice")
    splits = pd.read_csv(tmp_path / "fedavg/splits.csv")
    one = splits.query("site == 'site_01' and split == 'test'")["patient"].iloc[0]
    own = splits.loc[(splits["site"] == "site_01") & (splits["patient"] == one), "case"].tolist()
    table.loc[mine, "value"] = 0.5
    table.loc[mine & table["case"].isin(own), "value"] = 0.9
    table.loc[mine & table["case"].eq(own[0]), "value"] = np.nan  # of this patient two images are left
    table.to_csv(path, index=False)
    patients = splits.query("site == 'site_01' and split == 'test'")["patient"].nunique()
    analysis = analysed(tmp_path)
    mean = analysis.means(Model("fedavg", GLOBAL))["site_01"]
    assert mean == pytest.approx((0.5 * (patients - 1) + 0.9) / patients)
    row = analysis.overview.query("site == 'site_01' and checkpoint == 'best'").iloc[0]
    assert (row["patients"], row["cases"]) == (patients, 3 * patients - 1)


def unknown(folder: Path, *sites: str) -> None:
    found = [
        Finding("patients unknown", "names look like several images of one patient", "a cure", site) for site in sites
    ]
    (folder / "findings.csv").unlink()
    text = [",".join(COLUMNS), *(",".join(row[column] for column in COLUMNS) for row in as_rows(found))]
    (folder / "findings.csv").write_text("\n".join(text) + "\n")


@pytest.mark.slow
def test_unknown_patients_are_said_in_the_small_print(tmp_path: Path) -> None:
    for name, images in (("cases", 1), ("patients", 2)):
        write_run(tmp_path / name / "ditto", "ditto", images=images)
        assert "Patients are unknown" not in told(analysed(tmp_path / name))
        unknown(tmp_path / name / "ditto", "site_02")
    line = "Patients are unknown at site_02: each image counts as a patient there, which is optimistic."
    assert line in told(analysed(tmp_path / "cases"))
    assert "Patients are unknown" not in told(analysed(tmp_path / "patients"))  # the table of splits does tell them


@pytest.mark.slow
def test_a_folder_without_findings_is_of_an_earlier_version(tmp_path: Path) -> None:
    """It did not look at names: images are patients, and that is said; the phantom's are patients by design."""
    for name, settings in (("files", ["data=folder", "data.root=/data/flair"]), ("phantom", [])):
        write_run(tmp_path / name / "ditto", "ditto", 0, *settings)
        (tmp_path / name / "ditto/findings.csv").unlink()
    assert "Patients are unknown at site_01, site_02, site_03" in told(analysed(tmp_path / "files"))
    assert "Patients are unknown" not in told(analysed(tmp_path / "phantom"))


# --- three candidates -------------------------------------------------------------------------------------------------


def three(folder: Path, personal: float, alone: float, seeds: Sequence[int] = (0, 1, 2)) -> Analysis:
    for seed in seeds:
        write_run(folder / f"fedavg{seed}", "fedavg", seed)
        write_run(folder / f"fedbn{seed}", "fedbn", seed, effects={("personal", ""): personal})
        write_run(folder / f"local{seed}", "local", seed, effects={("personal", ""): alone})
    return analysed(folder)


@pytest.mark.slow
def test_a_personal_model_that_training_alone_beats_is_not_recommended(tmp_path: Path) -> None:
    found = verdicts(three(tmp_path, 0.13, 0.17))
    assert {verdict.answer for verdict in found} == {"alone"}
    assert "train alone (local), better than the personal model and the global model" in found[1].text
    assert found[1].test["gain"] > 0.1  # and yet it beats the global model


@pytest.mark.slow
def test_fewer_than_three_seeds_are_provisional_and_grey(tmp_path: Path) -> None:
    analysis = three(tmp_path, 0.1, -0.1, seeds=(0, 1))
    found = verdicts(analysis)
    assert all(verdict.provisional for verdict in found)
    assert "Provisional: 2 seeds, fewer than 3" in told(analysis)
    page = write(analysis, tmp_path / "report", lambda _: Extras()).page.read_text()
    assert "<h1>Over all sites: use personal models (fedbn) (provisional)</h1>" in page
    assert 'class="verdict own' not in page
    assert page.count("(provisional)</span>") == 4


@pytest.mark.slow
def test_an_answer_is_as_sure_as_the_least_sure_test_that_it_rests_on(tmp_path: Path) -> None:
    for seed in range(3):
        write_run(tmp_path / f"fedavg{seed}", "fedavg", seed)
        write_run(tmp_path / f"fedbn{seed}", "fedbn", seed, effects={("personal", ""): 0.002})
    write_run(tmp_path / "local", "local", 0, effects={("personal", ""): -0.2})
    analysis = analysed(tmp_path, Options(draws=200, margin=9))
    over = verdicts(analysis)[0]
    assert {row["seeds"] for row in over.tests.values()} == {1, 3}
    assert (over.answer, over.provisional) == ("equivalent", False)  # which asks personal against global alone
    named = verdicts(analysed(tmp_path, Options(draws=200, margin=9, personal="fedbn", global_="fedavg")))
    assert named[0].answer == over.answer
    alone = verdicts(three(tmp_path / "more", 0.2, -0.2, seeds=(0, 1)))[0]
    assert (alone.answer, alone.few_seeds) == ("personal", 2)


@pytest.mark.slow
def test_without_local_training_its_command_is_told_and_can_be_run(tmp_path: Path) -> None:
    write_run(tmp_path / "ditto", "ditto", 0, "federation.rounds=7", "data.size=32")
    (line,) = re.findall(r"Run it with each seed: python train.py (.*)", told(analysed(tmp_path)))
    settings = line.replace("output=NEW", f"output={tmp_path / 'new'}").split()
    config = compose(settings, SCHEMA)
    assert (config.algorithm.name, config.federation.rounds, config.data.size) == ("local", 7, 32)
    write_run(tmp_path / "local", "local", 0, "federation.rounds=7", "data.size=32")
    assert "Training alone is missing" not in told(analysed(tmp_path))


# --- one choice for all sites -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_another_run_changes_what_is_told_and_not_what_is_asked_of_a_site(tmp_path: Path) -> None:
    """At a single site a newcomer has the best validation mean; the choice over all sites stays, and says its odds."""
    for seed in range(3):
        write_run(tmp_path / f"ditto{seed}", "ditto", seed, effects={("personal", ""): 0.05})
    before = verdicts(analysed(tmp_path))
    for seed in range(3):
        effects = {("personal", ""): 0.01, ("personal", "site_03"): 0.09}
        write_run(tmp_path / f"finetune{seed}", "finetune", seed, effects=effects)
    analysis = analysed(tmp_path)
    assert [v.personal for v in verdicts(analysis)] == [v.personal for v in before]
    choice = choose(analysis)
    assert sum(choice.shares[PERSONAL].values()) == pytest.approx(1)
    assert choice.shares[PERSONAL][Model("ditto", PERSONAL)] > 0.6
    assert re.search(
        r"The personal model is ditto: of 2, it has the best validation Dice, mean over sites\. With validation "
        r"patients drawn again it is chosen in \d+% of the draws",
        told(analysis),
    )


@pytest.mark.slow
def test_a_model_that_suits_one_site_only_is_not_hidden(tmp_path: Path) -> None:
    for seed in range(3):
        effects = {("personal", "site_02"): 0.1, ("personal", "site_03"): -0.12}
        write_run(tmp_path / f"ditto{seed}", "ditto", seed, effects=effects)
        write_run(tmp_path / f"finetune{seed}", "finetune", seed, effects={("personal", ""): 0.005})
    line = (
        r"Not chosen, but shown better than its global model in the table of all models: ditto personal at site_02 \(\+"
    )
    assert re.search(line, told(analysed(tmp_path)))


def test_models_that_validation_cannot_tell_apart_share_the_choice() -> None:
    shares = choose(World(patients=10).draw(3, {})).shares[PERSONAL]
    assert len(shares) == 3
    assert sorted(shares.values())[1] > 0.05


@pytest.mark.slow
def test_models_can_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for algorithm, gain in (("ditto", 0.0), ("finetune", 0.1), ("fedavg", 0.0)):
        write_run(tmp_path / algorithm, algorithm, effects={("personal", ""): gain})
    write_run(tmp_path / "strong", "ditto", 0, "algorithm.lam=1", effects={("personal", ""): 0.02})
    options = Options(draws=200, personal="ditto (lam=1.0)", global_="fedavg")
    found = verdicts(analysed(tmp_path, options))
    assert {(v.personal, v.shared) for v in found} == {(Model("ditto (lam=1.0)", PERSONAL), Model("fedavg", GLOBAL))}
    assert "The personal model is ditto (lam=1.0): named, not chosen." in told(analysed(tmp_path, options))
    for name, message in (
        ("ditto", "personal=ditto: 2 personal models are of that name; choose among: personal='ditto (lam=0.1)', "),
        ("local", "personal=local: no personal model is of that name; choose among: personal='ditto (lam=0.1)', "),
    ):
        with pytest.raises(ReportingError, match=re.escape(message)):
            verdicts(analysed(tmp_path, Options(draws=200, personal=name)))
    arguments = [str(tmp_path), "draws=200", f"output={tmp_path / 'report'}", "pictures=false"]
    assert compare.main([*arguments, "personal=finetune", "global=fedavg", "margin=1.5"]) == 0
    assert "- The global model is fedavg: named, not chosen." in capsys.readouterr().out
    assert compare.main([*arguments, "global=fedavgg"]) == 2
    assert "global=fedavgg: no global model is of that name; choose among: " in capsys.readouterr().err
    assert compare.main(["--help"]) == 0
    assert "  global=null   method whose global model" in capsys.readouterr().out


@pytest.mark.slow
def test_all_models_at_all_sites_are_one_declared_family(tmp_path: Path) -> None:
    analysis = three(tmp_path, 0.1, -0.1)
    tests = analysis.tests
    assert len(tests) == 3 * 4  # fedbn against FedAvg, fedbn and FedAvg against local: over sites, and at three
    assert set(tests["site"]) == {OVERALL, "site_01", "site_02", "site_03"}
    page = write(analysis, tmp_path / "report", lambda _: Extras()).page.read_text()
    assert "One declared family of 12 tests" in page


# --- sites that took no part ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_unseen_sites_have_counts_tests_and_cost(tmp_path: Path) -> None:
    for seed in range(3):
        for algorithm, gain in (("fedavg", 0.0), ("fedprox", 0.06), ("ditto", 0.0)):
            run = write_run(tmp_path / f"{algorithm}{seed}", algorithm, seed, unseen=["site_02", "site_03"], images=2,
                effects={("global", "site_02"): gain, ("global", "site_03"): gain})  # fmt: skip
            if algorithm == "ditto":  # its global model is FedAvg's
                own = pd.read_csv(run.path / "metrics.csv").query("view != 'global'")
                theirs = pd.read_csv(tmp_path / f"fedavg{seed}/metrics.csv")
                pd.concat([own, theirs]).to_csv(run.path / "metrics.csv", index=False)
    analysis = analysed(tmp_path)
    unseen = analysis.unseen
    assert [model.label for model in unseen.models] == ["fedprox global", "fedavg global"]
    assert unseen.tests["site"].tolist() == [OVERALL, "site_02", "site_03"]
    first = unseen.tests.iloc[0]
    assert (first["patients"], first["cases"], first["seeds"]) == (24, 48, 3)
    assert first["gain"] == pytest.approx(0.06, abs=0.02)
    assert (unseen.tests["p_holm"] < 0.05).all()
    assert unseen.cost.set_index("method").loc["fedprox", "bytes_up"] == 4e6
    page = write(analysis, tmp_path / "report", lambda _: Extras()).page.read_text()
    assert "2 sites, 24 patients, 48 cases." in page
    assert "fedavg global and ditto global have the same scores everywhere; they are shown once." in page
    assert re.search(
        r"Against FedAvg, mean over sites: fedprox global \+\d\.\d Dice, 24 patients, 48 cases, corrected p", page
    )


# --- planted truths ---------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers_are_rare(name: str) -> None:
    """At most 5 % of the federations; `python -m benchmarks.verdicts` draws more of them."""
    gc.freeze()
    over, site, _ = wrong(name, trials=60)
    gc.unfreeze()
    assert max(over, site) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 60)


@pytest.mark.exhaustive
def test_a_large_gain_is_found() -> None:
    over, site = power(World(patients=24), 6, trials=20)
    assert over >= 0.9
    assert site >= 0.5


@pytest.mark.parametrize(
    ("value", "told"), [(-0.04, "+0.0"), (0.04, "+0.0"), (-0.06, "−0.1"), (12.34, "+12.3"), (math.inf, "+inf")]
)
def test_a_difference_that_rounds_to_nothing_has_one_sign(value: float, told: str) -> None:
    assert signed(value) == told


@pytest.mark.parametrize(
    ("root", "manifest", "told"),
    [
        ("/x/polyp", None, "polyp"),
        ("/x/polyp/images", None, "polyp/images"),
        ("images", None, "images"),  # as packed scores name it
        ("/x/polyp", "/x/polyp/table.csv", "polyp/table"),
        ("/", None, "folder"),
        (None, None, "folder"),
    ],
)
def test_data_are_called_on_the_page_as_in_a_runs_name(root: str | None, manifest: str | None, told: str) -> None:
    settings = {"data.name": "folder", "data.preset": "folder", "data.root": root, "data.manifest": manifest}
    assert data_name(settings) == told
