"""Every site's model at every site: the matrix, what it costs nobody, and where it is refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

import evaluate
from fedseg.configs.compose import ConfigError
from fedseg.launch.experiment import Experiment
from fedseg.launch.run import execute
from fedseg.launch.scores.crossing import check_crossing
from fedseg.launch.sites.across import Across
from fedseg.reporting import ReportingError
from fedseg.reporting.compare.across import across_section, across_text
from fedseg.reporting.compare.analysis import Analysis
from fedseg.reporting.compare.gather import gather
from fedseg.reporting.compare.options import Options
from fedseg.reporting.compare.runs import find_runs, read_run
from fedseg.reporting.crossing import COLUMNS, matrix, matrix_table, off_home
from fedseg.reporting.folder import RunFolder
from tests.run_folders import write_run
from tests.tiers import every
from tests.tiny_run import phantom_run

settings = partial(phantom_run, 4)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", every(["fedbn", "ditto", "finetune", "lcfed", "local"], ["ditto"]))
@pytest.mark.usefixtures("rendered")
def test_a_personal_model_at_home_is_the_one_of_the_table_and_elsewhere_another(
    algorithm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = execute(settings(tmp_path, f"algorithm={algorithm}", "evaluation.cross_sites=true"))
    folder = RunFolder(tmp_path)
    values = matrix(folder.cross_sites())
    seen = ["site_01", "site_02", "site_03"]
    assert list(values.columns) == [*seen, "site_04"]
    assert [name for name in values.index if name != "global"] == seen
    assert values.notna().all(axis=None)
    assert len({round(float(values.loc[name, "site_04"]), 9) for name in seen}) == 3
    scores = folder.scores().query("checkpoint == 'best' and split == 'test' and metric == 'dice'")
    home = scores.query("view == 'personal'").groupby(["site", "case"])["value"].mean().groupby("site").mean()
    np.testing.assert_allclose([values.loc[name, name] for name in seen], home[seen])
    told = capsys.readouterr().out
    assert "model, tested at" in told
    assert summary.crossed is not None
    assert "## Every model at every site" in (tmp_path / "summary.md").read_text()
    assert (tmp_path / "plots" / "cross_sites.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_finished_run_gets_its_matrix_from_evaluate_and_its_home_scores_are_recomputed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    execute(settings(tmp_path / "run", "algorithm=fedbn", "evaluation.cross_sites=true"))
    folder = RunFolder(tmp_path / "run")
    before = folder.cross_sites()
    (tmp_path / "run" / "cross_sites.csv").unlink()
    assert folder.cross_sites().empty
    assert evaluate.main([str(tmp_path / "run"), "evaluation.cross_sites=true"]) == 0
    pd.testing.assert_frame_equal(folder.cross_sites(), before)
    assert "model, tested at" in capsys.readouterr().out
    execute(settings(tmp_path / "global", "algorithm=fedavg"))
    assert evaluate.main([str(tmp_path / "global"), "evaluation.cross_sites=true"]) == 2
    assert "algorithm=fedavg has none" in capsys.readouterr().err


@pytest.mark.parametrize("engine", ["in-process", "flower-simulation"])
def test_what_cannot_be_had_is_refused_before_anything_is_written(engine: str, tmp_path: Path) -> None:
    told = ("algorithm=fedavg", f"engine={engine}")
    config = settings(tmp_path / "run", *told, "evaluation.cross_sites=true")
    with pytest.raises(ConfigError, match=r"evaluation\.cross_sites=true .*algorithm=fedavg has none"):
        check_crossing(Experiment(config))
    nowhere: Any = SimpleNamespace()
    with pytest.raises(ConfigError):
        (Across(nowhere).execute if engine != "in-process" else execute)(config)
    assert not (tmp_path / "run").exists()
    check_crossing(Experiment(settings(tmp_path / "run", *told, "evaluation.cross_sites=false")))


def test_images_that_are_prepared_by_their_site_are_not_shown_to_others_models(tmp_path: Path) -> None:
    told = ("algorithm=ditto", "training.harmonise=zscore", "training.harmonise_target=least_complex")
    with pytest.raises(ConfigError, match=r"prepared by the site .* take evaluation\.cross_sites=false"):
        check_crossing(Experiment(settings(tmp_path / "run", *told, "evaluation.cross_sites=true")))
    check_crossing(Experiment(settings(tmp_path / "run", *told, "evaluation.cross_sites=false")))
    check_crossing(Experiment(settings(tmp_path / "run", *told[:2], "evaluation.cross_sites=true")))


def planted(folder: Path) -> RunFolder:
    """A run whose personal models have .8 at home and .5 elsewhere, its global one .6 everywhere."""
    run = write_run(folder, "ditto", sites={"a": 24, "b": 24})
    rows = [
        {"model": model, "site": site, "seen": True, "case": f"c{case}", "region": region, "metric": "dice"}
        | {"value": 0.6 if model == "global" else 0.8 if model == site else 0.5}
        for model in ("b", "a", "global")
        for site in ("b", "a")
        for case in range(3)
        for region in ("disc", "cup")
    ]
    run.write_cross_sites(rows, COLUMNS)
    return run


def test_the_matrix_is_a_mean_over_cases_with_the_global_model_first(tmp_path: Path) -> None:
    values = matrix(planted(tmp_path).cross_sites())
    assert values.index.tolist() == ["global", "a", "b"]
    np.testing.assert_allclose(values.to_numpy(), [[0.6, 0.6], [0.8, 0.5], [0.5, 0.8]])
    np.testing.assert_allclose(off_home(values), (0.8, 0.5))
    assert matrix_table(values).rows[1] == ("a", "0.800*", "0.500")


def test_a_patients_cases_count_once(tmp_path: Path) -> None:
    table = planted(tmp_path).cross_sites()
    table.loc[(table["model"] == "a") & (table["site"] == "a") & (table["case"] == "c0"), "value"] = 0.2
    assert matrix(table).loc["a", "a"] == pytest.approx((0.2 + 0.8 + 0.8) / 3)
    table["patient"] = table["case"].map({"c0": "one", "c1": "other", "c2": "other"})
    assert matrix(table).loc["a", "a"] == pytest.approx((0.2 + 0.8) / 2)


def test_a_document_has_the_matrix_and_says_how_to_get_one(tmp_path: Path) -> None:
    planted(tmp_path / "ditto-0")
    runs = [read_run(path, "dice") for path in find_runs([str(tmp_path)])]
    told = across_text(Analysis(gather(runs), Options()))
    assert "| a | 80.0 | 50.0 |" in told
    (tmp_path / "ditto-0" / "cross_sites.csv").unlink()
    with pytest.raises(ReportingError, match=r"evaluate\.py RUN evaluation\.cross_sites=true"):
        across_text(Analysis(gather(runs), Options()))


def test_the_page_shows_it_where_runs_have_it(tmp_path: Path) -> None:
    planted(tmp_path / "ditto-0")
    write_run(tmp_path / "fedavg-0", "fedavg", sites={"a": 24, "b": 24})
    runs = [read_run(path, "dice") for path in find_runs([str(tmp_path)])]
    section = across_section(Analysis(gather(runs), Options()))
    assert section is not None
    assert "ditto, 1 seed: personal models have 80.0 at home and 50.0 at the other sites" in " ".join(section.text)
    assert len(section.pictures) == len(section.folded) == 1
    (tmp_path / "ditto-0" / "cross_sites.csv").unlink()
    assert across_section(Analysis(gather(runs), Options())) is None


@pytest.mark.exhaustive
def test_the_matrix_of_a_run_across_machines_is_not_overwritten_from_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its personal models are not in its folder."""
    run = tmp_path / "run"
    execute(settings(run, "algorithm=fedbn", "evaluation.cross_sites=true", "federation.rounds=1"))
    before = (run / "cross_sites.csv").read_bytes()
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("engine: in-process", "engine: flower"))
    assert evaluate.main([str(run)]) == 2
    assert "take evaluation.cross_sites=false here" in capsys.readouterr().err
    assert (run / "cross_sites.csv").read_bytes() == before
    assert evaluate.main([str(run), "evaluation.cross_sites=false"]) == 0
