"""The curve of what personalising pays against each dial of the phantom."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from omegaconf import OmegaConf
from PIL import Image

from fedseg.configs.compose import FOLDER, compose
from fedseg.launch.settings import SCHEMA
from fedseg.reporting import ReportingError
from fedseg.reporting.compare.runs import find_runs
from fedseg.reporting.dials import DIALS, draw_gains, gains, main, summary_table
from fedseg.reporting.folder import RunFolder


def planted(path: Path, gain: float, *settings: str, views: tuple[str, ...] = ("global", "personal")) -> RunFolder:
    """The folder of a finished run whose personal models are better by `gain` at site_01, by twice that at site_02."""
    folder = RunFolder.create(path, resume=False)
    folder.write_config(OmegaConf.to_yaml(compose(["experiment=when_does_it_pay", *settings], SCHEMA)))
    rows = [
        {"round": 3, "checkpoint": "best", "site": site, "seen": site != "site_03", "split": "test", "view": view,
         "region": region, "case": case, "metric": "dice", "unit": "", "grid": "own",
         "value": 0.5 + shift + (gain * factor if view == "personal" else 0)}
        for site, factor in (("site_01", 1), ("site_02", 2), ("site_03", 50))
        for view in views
        for case, shift in (("a", 0.1), ("b", -0.1))
        for region in ("disc", "cup")
    ]  # fmt: skip
    folder.append_scores(rows)
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    for seed in (0, 1):
        planted(tmp_path / f"none-{seed}", 0.0, f"seed={seed}")
        for level in (0.5, 1):
            name = f"annotation-{level}-{seed}"
            planted(tmp_path / name, 0.1 * level, f"data.annotation={level}", f"seed={seed}")
            planted(tmp_path / f"structure-{level}-{seed}", -0.01, f"data.structure={level}", f"seed={seed}")
    return tmp_path


def test_gains_are_those_that_were_planted(sweep: Path) -> None:
    table, left_out = gains(find_runs([str(sweep)]))
    assert not left_out
    planted(sweep / "none-0" / "sites" / "site_01" / "its-own-record", 9.0)  # a run within a run is no other run
    assert gains(find_runs([str(sweep)]))[0].equals(table)
    assert set(table["site"]) == {"site_01", "site_02"}  # an unseen site has no personal model of its own
    mean = table.groupby(["dial", "level"])["gain"].mean()
    assert mean["annotation"].to_dict() == pytest.approx({0.0: 0.0, 0.5: 0.075, 1.0: 0.15})
    assert mean["structure"].to_dict() == pytest.approx({0.0: 0.0, 0.5: -0.015, 1.0: -0.015})
    assert mean["appearance"].to_dict() == mean["amount"].to_dict() == pytest.approx({0.0: 0.0})
    assert (table.groupby(["dial", "level"])["seed"].nunique() == 2).all()
    row = next(row for row in summary_table(table).rows if row[1:3] == ("annotation", "1"))
    assert row == ("finetune", "annotation", "1", "2", "0.5000", "0.6500", "+0.1500", "+0.1000", "+0.2000")


def test_only_dials_that_were_turned_have_a_panel(sweep: Path) -> None:
    figure = draw_gains(gains(find_runs([str(sweep)]))[0])
    assert [axis.get_title().split("\n")[0] for axis in figure.axes] == ["annotation", "structure"]
    line = figure.axes[0].lines[-1]
    assert line.get_xdata().tolist() == [0, 0.5, 1]
    assert line.get_ydata().tolist() == pytest.approx([0, 0.075, 0.15])


def test_methods_have_a_line_each(sweep: Path) -> None:
    for level in (0.5, 1):
        planted(sweep / f"ditto-{level}", 0.2, f"data.annotation={level}", "algorithm=ditto")
    figure = draw_gains(gains(find_runs([str(sweep)]))[0])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ditto", "finetune"]


@pytest.mark.slow
def test_the_command_writes_table_and_plot(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(sweep)]) == 0
    told = capsys.readouterr()
    assert "annotation" in told.out
    assert "\033" not in told.out
    assert pd.read_csv(sweep / "dials.csv").shape[1] == 9
    assert len(np.unique(np.asarray(Image.open(sweep / "dials.png").convert("L")))) > 5
    assert (sweep / "dials.svg").read_text().startswith("<?xml")


@pytest.mark.slow
def test_what_cannot_be_used_is_named(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planted(sweep / "both", 0.1, "data.annotation=1", "data.structure=1")
    planted(sweep / "fedbn", 0.1, "algorithm=fedbn", views=("personal",))
    assert main([str(sweep), "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().err
    assert "both: more than one dial is turned (annotation, structure)" in told
    assert "fedbn: it has no final scores of both models" in told
    assert (tmp_path / "out" / "dials.csv").is_file()
    assert main([str(sweep / "both")]) == 2
    assert "none of these runs can be used" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty")]) == 2
    assert "holds no run" in capsys.readouterr().err


@pytest.mark.slow
def test_runs_of_another_length_make_no_curve(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planted(sweep / "longer", 0.1, "data.annotation=0.25", "federation.rounds=99")
    assert main([str(sweep)]) == 2
    assert "federation.rounds is 30 in" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["training.lr=0.5", "algorithm.finetune_steps=9"])
def test_other_settings_make_no_curve_and_no_run_counts_twice(
    sweep: Path, capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    planted(sweep / "other", 0.9, "data.annotation=0.5", "seed=2", setting)
    assert main([str(sweep)]) == 2
    assert f"{setting.partition('=')[0]} is " in capsys.readouterr().err
    (sweep / "other").rename(sweep.with_name(f"{sweep.name}-aside"))
    planted(sweep / "twin", 0.9, "data.annotation=0.5", "seed=1")
    assert main([str(sweep)]) == 2
    assert "have the same settings and seed" in capsys.readouterr().err


def test_the_sweep_turns_one_dial_at_a_time() -> None:
    sweep = yaml.safe_load((FOLDER / "sweep" / "when_does_it_pay.yaml").read_text())
    turned: dict[str, list[float]] = {dial: [] for dial in DIALS}
    for value in sweep["parameters"]["data"]["values"]:
        config = compose([f"experiment={sweep['parameters']['experiment']['value']}", f"data={value}"], SCHEMA)
        levels = {dial: config.data[dial] for dial in DIALS if config.data[dial]}
        assert len(levels) <= 1
        for dial, level in levels.items():
            turned[dial].append(level)
        assert (config.data.n_sites, config.data.size, config.algorithm.name) == (4, 64, "finetune")
    assert all(levels == [0.25, 0.5, 1] for levels in turned.values())


@pytest.mark.slow
def test_runs_on_two_grids_are_refused_with_the_cure(sweep: Path) -> None:
    path = sweep / "none-0" / "metrics.csv"
    path.write_text(path.read_text().replace(",own\n", ",network\n"))
    with pytest.raises(
        ReportingError, match=r"network's grid, own grid.*python evaluate.py .*none-0 evaluation.grid=own"
    ):
        gains(find_runs([str(sweep)]))
