"""What a run leaves: tables that survive a kill, known summaries, pictures, progress lines and W&B."""

import contextlib
import io
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fedseg.common.files import write_atomic
from fedseg.launch.settings import Wandb
from fedseg.reporting import ReportingError
from fedseg.reporting.__main__ import main as report_again
from fedseg.reporting.curves import COLOURS, draw_curves, loss_curves, save_curves, validation_curves
from fedseg.reporting.folder import COLUMNS, EVENTS, METRICS, RunFolder, file_name
from fedseg.reporting.overlays import (
    Picture,
    best_slice,
    displayed,
    draw_overlays,
    judge_of,
    pick_cases,
    reported_scores,
    shrunk,
    window,
)
from fedseg.reporting.progress import Progress, duration
from fedseg.reporting.reporter import Reporter, validation_values
from fedseg.reporting.summary import said_of_privacy, summarise
from fedseg.reporting.wandb import (
    RunAddress,
    WandbRun,
    _wandb_image,
    failing_run,
    label_map,
    remember_agent,
)

ROOT = Path(__file__).parent.parent
Row = dict[str, Any]


def score(site: str, value: float, **changes: Any) -> Row:
    row = {"round": 3, "checkpoint": "best", "site": site, "seen": True, "split": "test", "view": "global"}
    told = {"region": "disc", "case": "c0", "metric": "dice", "value": value, "unit": "", "grid": "own"}
    return {**row, **told, **changes}


def during(round: int, site: str, value: float, **changes: Any) -> Row:
    return score(site, value, round=round, checkpoint="round", split="val", **changes)


def trained(round: int, site: str, loss: float | None) -> Row:
    row = {"round": round, "site": site, "task": "train", "loss": loss, "steps": 5, "examples": 20, "seconds": 0.5}
    return {**row, "loss_personal": None}


def event(round: int, site: str, kind: str, detail: str = "") -> Row:
    return {"round": round, "site": site, "event": kind, "detail": detail}


@dataclass
class Record:
    round: int
    rounds: Sequence[Row] = ()
    traffic: Sequence[Row] = ()
    events: Sequence[Row] = field(default_factory=list)
    updates: Sequence[Row] = ()
    privacy: Sequence[Row] = ()
    audit: Sequence[Row] = ()
    scores: Sequence[Row] = ()


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder.create(tmp_path / "run", resume=False)
    made.write_config("algorithm: ditto\n")
    return made


# --- the folder -----------------------------------------------------------------------------------


def test_a_folder_with_a_run_is_refused_without_resume(folder: RunFolder) -> None:
    with pytest.raises(ReportingError, match="resume=true or choose another output="):
        RunFolder.create(folder.path, resume=False)
    assert RunFolder.create(folder.path, resume=True).read_config() == "algorithm: ditto\n"


def test_resume_needs_a_run(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ReportingError, match="holds no run to resume"):
            RunFolder.create(path, resume=True)
    assert not (tmp_path / "missing").exists()
    with pytest.raises(ReportingError, match="holds no run"):
        RunFolder(tmp_path).read_config()


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ReportingError, match=r"thesis\.tex"):
        RunFolder.create(tmp_path, resume=False)
    with pytest.raises(ReportingError, match="is a file"):
        RunFolder.create(tmp_path / "thesis.tex", resume=False)


def test_a_start_that_was_killed_in_its_first_write_can_be_started_again(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.123.tmp").write_text("algor")
    assert not RunFolder.create(tmp_path, resume=False).holds_run


@pytest.mark.slow
def test_two_processes_never_write_one_run(tmp_path: Path) -> None:
    code = "import sys; from fedseg.reporting.folder import RunFolder as F\n"
    code += "f = F.create(sys.argv[1], resume=False); f.write_config('seed: 0')\n"
    code += "print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ReportingError, match="another process works on this run"):
            RunFolder.create(tmp_path, resume=True)
        other.communicate("")
    RunFolder.create(tmp_path, resume=True)


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    write_atomic(path, "old")

    def fail(handle: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_tables_return_what_was_written(folder: RunFolder) -> None:
    rows = [
        score("007", 0.1 + 0.2, case="NA", seen=False),
        score('a "b", c', float("nan"), case="0012"),
        score("Zürich", float("inf"), metric="hd95", case="line\nbreak"),
    ]
    folder.append_scores(rows[:1])
    folder.append_scores(rows[1:])
    table = folder.scores()
    assert list(table.columns) == list(COLUMNS[METRICS])
    assert list(table["site"]) == ["007", 'a "b", c', "Zürich"]
    assert list(table["case"]) == ["NA", "0012", "line break"]
    assert table["value"][0] == 0.1 + 0.2
    assert np.isnan(table["value"][1])
    assert np.isinf(table["value"][2])
    assert table["seen"].dtype == bool
    assert list(table["seen"]) == [False, True, True]
    folder.append_rounds([trained(1, "A", None), trained(1, "B", 0.5)])
    assert folder.rounds()["loss"].isna().tolist() == [True, False]


def test_tables_of_a_new_run_are_empty_and_typed(folder: RunFolder) -> None:
    for table in (folder.scores(), folder.rounds(), folder.traffic(), folder.events()):
        assert table.empty
    assert list(folder.scores().columns) == list(COLUMNS[METRICS])


def test_a_row_with_other_columns_is_refused_and_nothing_is_written(folder: RunFolder) -> None:
    with pytest.raises(ReportingError, match=r"metrics\.csv.*'extra'"):
        folder.append_scores([score("A", 1.0), {**score("A", 1.0), "extra": 1}])
    with pytest.raises(ReportingError, match=r"rounds\.csv"):
        folder.append_rounds([{"round": 1}])
    assert not (folder.path / METRICS).exists()


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_half_written_line_is_ignored_then_removed(folder: RunFolder, cut: int) -> None:
    folder.append_scores([during(1, "A", 0.25), during(2, "Zürich", 0.75)])
    path = folder.path / METRICS
    path.write_bytes(path.read_bytes()[:-cut])
    assert folder.scores()["value"].tolist() == [0.25]
    with pytest.raises(ReportingError, match="half-written"):
        folder.append_scores([during(3, "A", 0.5)])
    folder.truncate(2)
    folder.append_scores([during(2, "Zürich", 0.75)])
    assert folder.scores()["value"].tolist() == [0.25, 0.75]


def test_half_a_header_is_an_empty_table(folder: RunFolder) -> None:
    (folder.path / EVENTS).write_text("round,si")
    assert folder.events().empty
    folder.truncate(5)
    folder.append_events([event(1, "A", "absent")])
    assert folder.events().to_dict("records") == [event(1, "A", "absent")]


def test_truncation_keeps_what_the_checkpoint_knows(folder: RunFolder) -> None:
    folder.append_scores([during(k, "A", k / 10) for k in range(5)])
    folder.append_scores([score("A", 0.9, round=2), score("A", 0.9, round=1, checkpoint="last")])
    folder.append_rounds([trained(k, "A, B", 0.1) for k in (1, 2, 10)])
    folder.append_events([event(0, "A", "absent"), event(3, "A", "refused", "not, finite")])
    folder.append_traffic([{"round": 4, "site": "A", "direction": "up", "group": "model", "bytes": 7}])
    folder.truncate(2)
    assert folder.scores()["round"].tolist() == [0, 1, 2]
    assert set(folder.scores()["checkpoint"]) == {"round"}
    assert folder.rounds()["round"].tolist() == [1, 2]
    assert folder.events()["round"].tolist() == [0]
    assert folder.traffic().empty
    folder.truncate(-1)
    assert folder.scores().empty
    assert folder.rounds().empty


@pytest.mark.slow
def test_a_killed_writer_leaves_readable_tables(folder: RunFolder) -> None:
    endless = """
import itertools, sys
from fedseg.reporting.folder import RunFolder
folder = RunFolder(sys.argv[1])
for k in itertools.count(1):
    folder.append_rounds([dict(round=k, site=f"s{i}", task="train", loss=0.5, steps=1, examples=1, seconds=1.0,
                               loss_personal=0.25)
                          for i in range(500)])
"""
    process = subprocess.Popen([sys.executable, "-c", endless, str(folder.path)], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while len(folder.rounds()) < 2000 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)  # reads happen while the writer is at work
    finally:
        process.kill()
        process.wait()
    table = folder.rounds()
    assert len(table) >= 2000
    last_whole = len(table) // 500
    folder.truncate(last_whole)
    assert folder.rounds()["round"].value_counts().tolist() == [500] * last_whole


@pytest.mark.slow
def test_many_rows_are_read_and_truncated_quickly(folder: RunFolder) -> None:
    rows = [during(k, f"site{s}", 0.5, case=f"case{c}") for k in range(30) for s in range(50) for c in range(50)]
    start = time.process_time()
    folder.append_scores(rows)
    folder.truncate(14)
    assert len(folder.scores()) == len(rows) // 2
    assert time.process_time() - start < 8, "75 000 rows should take about a second"


def test_the_environment_lists_every_process_of_the_run(folder: RunFolder) -> None:
    folder.write_environment({"seed": 7})
    folder.write_environment({"seed": 7})
    stored = json.loads(folder.environment_path.read_text())
    assert stored["seeds"] == {"seed": 7}
    first, second = stored["processes"]
    assert first["packages"]["numpy"] == np.__version__
    assert first["python"].split(".") == [str(part) for part in sys.version_info[:3]]
    assert second["command"]
    assert first["git"] is None or len(first["git"]["revision"]) == 40


@pytest.mark.slow
def test_the_folder_explains_every_file_it_holds(folder: RunFolder) -> None:
    folder.write_splits([{"site": "A", "case": "1", "patient": "p", "split": "val", "labelled": True, "seen": True}])
    folder.write_environment({"seed": 1})
    folder.append_scores([score("A", 1.0)])
    folder.append_rounds([trained(1, "A", 0.1)])
    folder.append_traffic([{"round": 1, "site": "A", "direction": "up", "group": "model", "bytes": 7}])
    folder.append_events([event(1, "A", "absent")])
    finish(folder)
    text = (folder.path / "README.md").read_text()
    names = {f"{p.name}/" if p.is_dir() else p.name for p in folder.path.iterdir()} - {"README.md"}
    assert {name for name in names if f"`{name}`" not in text} == set()
    assert folder.splits()["labelled"].tolist() == [True]


def test_site_names_become_distinct_safe_file_names() -> None:
    assert file_name("RIM-ONE r3") == "RIM-ONE r3"
    names = [file_name(site) for site in ("a/b", "a\\b", "a%2Fb", "a:b", "../x")]
    assert len(set(names)) == 5
    assert not any("/" in name or "\\" in name for name in names)


# --- the summary ----------------------------------------------------------------------------------


def example_scores() -> pd.DataFrame:
    """Site A: cases (0.6 + 1.0) / 2 and 0.4, so 0.6; site B: 0.9; unseen U: 0.5. Personal: A 0.7, only for best."""
    rows = [score("A", 0.6), score("A", 1.0, region="cup"), score("A", 0.4, case="c1")]
    rows += [score("A", float("nan"), case="c1", region="cup"), score("B", 0.9), score("U", 0.5, seen=False)]
    rows += [score("A", 0.7, view="personal", round=2), score("B", 0.2, split="val"), score("A", 8.0, metric="hd95")]
    rows += [
        score("B", 30.0, metric="hd95", unit="px"),
        score("A", 0.1, checkpoint="last", round=9),
        during(1, "A", 0.0),
    ]
    return pd.DataFrame(rows)


def cells(text: str) -> dict[str, list[str]]:
    """Row title to cells of aligned text, split where two blanks stand."""
    lines = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]
    return {line[0]: line[1:] for line in lines if line}


def test_the_summary_has_the_known_answers() -> None:
    summary = summarise(example_scores())
    rows = cells(summary.sites.text())
    assert rows["test dice, own grid"] == ["cases", "global last", "global best", "personal last", "personal best"]
    assert rows["A"] == ["2", "0.1000", "0.6000", "not scored", "0.7000"]
    assert rows["B"] == ["1", "not scored", "0.9000", "not scored", "not scored"]
    assert rows["mean over sites"] == ["0.1000", "0.7500", "not scored", "0.7000"]
    assert rows["worst site"] == ["0.1000", "0.6000", "not scored", "0.7000"]
    assert rows["U (unseen)"] == ["1", "not scored", "0.5000", "no personal model", "no personal model"]
    assert "last: round 9; best: rounds 2 to 3, by view or site (chosen on validation)" in summary.sites.text()
    assert summary.metrics is not None
    assert cells(summary.metrics.text())["hd95, px"][1] == "19.00"
    assert summary.metrics.note.startswith("In hd95 a missed region counts as the image's diagonal; metric missed ")
    asked = summarise(pd.concat([example_scores(), pd.DataFrame([score("A", 0.0, metric="missed")])]))
    assert asked.metrics is not None
    assert not asked.metrics.note
    assert summary.values["best/test/global/dice"] == pytest.approx(0.75)
    assert summary.values["best/test/global/worst_site/dice"] == pytest.approx(0.6)
    assert summary.values["best/test/global/worst_site/hd95"] == 30.0
    assert summary.values["best/val/global/dice"] == pytest.approx(0.2)


def test_the_summary_table_has_each_region_and_their_mean() -> None:
    table = summarise(example_scores()).table
    best = table[(table["checkpoint"] == "best") & (table["site"] == "A") & (table["metric"] == "dice")]
    best = best[best["view"] == "global"].set_index("region")
    assert best.loc["mean", "mean"] == pytest.approx(0.6)
    assert best.loc["disc", "mean"] == pytest.approx(0.5)
    assert best.loc["cup", "mean"] == pytest.approx(1.0)
    assert best["cases"].to_dict() == {"mean": 2, "disc": 2, "cup": 1}


def test_a_method_without_a_global_model_says_so() -> None:
    summary = summarise(pd.DataFrame([score("A", 0.5, view="personal"), score("U", 0.4, seen=False)]))
    rows = cells(summary.sites.text())
    assert rows["A"] == ["1", "no global model", "no global model", "not scored", "0.5000"]
    assert rows["worst site"][0] == "no global model"
    assert rows["U (unseen)"][2] == "0.4000"


def test_a_run_without_scores_says_so(folder: RunFolder) -> None:
    text = summarise(folder.scores()).sites.text()
    assert "No test scores" in text
    assert "no global model" not in text


@pytest.mark.slow
def test_a_terminal_shows_the_worst_of_many_sites_and_the_file_all() -> None:
    summary = summarise(pd.DataFrame([score(f"s{k:03d}", k / 100) for k in range(100)]))
    shown = cells(summary.sites.text())
    assert "s029" in shown
    assert "s030" not in shown
    assert "70 more are in summary.csv" in summary.sites.text()
    assert sum(line.startswith("| s") for line in summary.markdown().splitlines()) == 100


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colour_only_on_a_terminal_that_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    summary = summarise(example_scores())
    assert "\033[" in summary.text(Terminal())
    assert "\033[" not in summary.text(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033[" not in summary.text(Terminal())


# --- pictures -------------------------------------------------------------------------------------


def colours_in(path: Path) -> int:
    return len(np.unique(np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3), axis=0))


def test_curves_are_means_over_the_validation_cases_of_seen_sites() -> None:
    rows = [during(1, "A", 0.2), during(1, "A", 0.4, case="c1"), during(2, "A", 0.6), during(2, "B", 0.8)]
    rows += [during(2, "U", 0.1, seen=False), score("A", 0.99), during(2, "A", 5.0, metric="hd95")]
    curve = validation_curves(pd.DataFrame(rows))["global"]
    assert curve["A"].tolist() == pytest.approx([0.3, 0.6])
    assert np.isnan(curve["B"][1])
    assert list(curve.columns) == ["A", "B"]
    loss = loss_curves(
        pd.DataFrame([trained(1, "A", 0.5), trained(2, "A", None), trained(3, "A", 0.1)]).astype({"loss": float})
    )
    assert loss["A"].to_dict() == {1: 0.5, 3: 0.1}


@pytest.mark.parametrize("sites", [1, len(COLOURS), 40])
def test_curves_for_few_and_many_sites(sites: int) -> None:
    names = [f"site {k}" for k in range(sites)]
    scores = pd.DataFrame(
        [during(r, n, 0.5 + 0.01 * r, view=v) for r in (1, 2, 3) for n in names for v in ("global", "personal")]
    )
    rounds = pd.DataFrame([trained(r, n, 1 / r) for r in (1, 2, 3) for n in names])
    figure = draw_curves(scores, rounds, title="a run")
    assert figure is not None
    assert [axis.get_title() for axis in figure.axes] == ["global model", "personal model", "training"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert ("worst site of the round" in labels) == (sites > len(COLOURS))
    assert ("mean over sites" in labels) == (sites > 1)
    assert len(labels) == len(set(labels)) <= len(COLOURS) + 1


@pytest.mark.slow
@pytest.mark.usefixtures("rendered")
def test_curves_are_pictures(tmp_path: Path) -> None:
    scores = pd.DataFrame([during(r, n, 0.1 * r) for r in (1, 2, 3) for n in "AB"])
    figure = draw_curves(scores, pd.DataFrame([trained(r, n, 1 / r) for r in (1, 2, 3) for n in "AB"]))
    assert figure is not None
    png, svg = save_curves(figure, tmp_path / "plots")
    assert Image.open(png).size[0] > 1000
    assert colours_in(png) > 50
    assert svg.read_text().lstrip().startswith("<?xml")


def test_no_curves_before_the_first_round(folder: RunFolder) -> None:
    assert draw_curves(folder.scores(), folder.rounds()) is None


def disc(centre: int, radius: int, depth: int = 1) -> np.ndarray:
    rows, columns = np.mgrid[:64, :64]
    flat = (rows - centre) ** 2 + (columns - centre) ** 2 < radius**2
    return np.repeat(flat[None], depth, axis=0)


def picture(channels: int = 3, depth: int = 1, **changes: Any) -> Picture:
    image = np.random.default_rng(0).integers(0, 255, (depth, 64, 64, channels), dtype=np.uint8)
    truth = np.stack([disc(30, 12, depth), disc(30, 5, depth)])
    moved = np.stack([disc(33, 12, depth), disc(33, 5, depth)])
    fields: dict[str, Any] = {"site": "A", "case": "c0", "image": image, "truth": truth, "role": "worst"}
    fields |= {"predictions": {"global": moved, "personal": truth}, "scores": {"global": {"disc": 0.8, "cup": 0.5}}}
    return Picture(**{**fields, **changes})


def test_worst_median_and_best_by_the_personal_model() -> None:
    rows = [score("A", v, case=f"c{k}", view="personal") for k, v in enumerate((0.9, 0.1, 0.5, 0.7, 0.3))]
    rows += [score("A", v, case=f"c{k}") for k, v in enumerate((0.1, 0.9, 0.5, 0.3, 0.7))]
    rows += [score("A", 0.0, case="val", view="personal", split="val"), score("B", 0.0, case="other", view="personal")]
    table = pd.DataFrame(rows)
    assert pick_cases(table, "A") == {"c1": "worst", "c2": "median", "c0": "best"}
    shared = table[table["view"] == "global"]
    assert pick_cases(shared, "A") == {"c0": "worst", "c2": "median", "c1": "best"}
    assert pick_cases(shared, "B") == {}
    assert [judge_of(rows, site) for rows, site in ((table, "A"), (shared, "A"), (shared, "B"))] == [
        "personal", "global", "",
    ]  # fmt: skip
    assert reported_scores(table, "A", "c1") == {"global": {"disc": 0.9}, "personal": {"disc": 0.1}}


def test_few_cases_have_several_roles() -> None:
    two = pd.DataFrame([score("A", 0.9, case="x"), score("A", 0.2, case="y")])
    assert pick_cases(two, "A") == {"y": "worst, median", "x": "best"}
    assert pick_cases(two[:1], "A") == {"x": "worst, median, best"}


def test_the_slice_with_most_truth_is_shown() -> None:
    truth = np.zeros((1, 4, 64, 64), dtype=bool)
    empty = picture(depth=4, truth=truth, predictions={"global": truth})
    assert best_slice(empty) == 2
    guess = truth.copy()
    guess[0, 3, :2, :2] = True
    assert best_slice(picture(depth=4, truth=truth, predictions={"global": guess})) == 3
    some = truth.copy()
    some[0, 1, 5, 5] = True
    assert best_slice(picture(depth=4, truth=some, predictions={"global": guess})) == 1


def test_the_window_holds_all_contours() -> None:
    left, top, side, tall = window(picture(), 0)
    assert left <= 19
    assert left + side >= 45
    assert (left, side) == (top, tall)
    empty = np.zeros((2, 1, 64, 64), dtype=bool)
    assert window(picture(truth=empty, predictions={"global": empty}), 0) == (0, 0, 64, 64)
    everything = ~empty
    assert window(picture(truth=everything), 0) == (0, 0, 64, 64)


@pytest.mark.parametrize("aspect", [0.25, 1.0, 3.0])
def test_pictures_have_the_true_proportions_of_the_image(aspect: float) -> None:
    """Pixels may be no squares: the frame is one nevertheless, and all contours lie in it."""
    drawn = picture(aspect=aspect)
    left, top, wide, tall = window(drawn, 0)
    assert tall * aspect == pytest.approx(wide, abs=aspect + 1)
    rows, columns = np.nonzero(np.any([mask[:, 0].any(axis=0) for mask in drawn.masks.values()], axis=0))
    if aspect == 1:
        assert (left, top) <= (columns.min(), rows.min())
    assert 0 <= left <= left + wide <= 64
    assert 0 <= top <= top + tall <= 64
    figure = draw_overlays([drawn], ("disc", "cup"))
    assert [axis.get_aspect() for axis in figure.axes if axis.images] == [aspect, aspect]
    height, width = shrunk(drawn.image[0], aspect, 1000).shape[:2]
    assert height / width == pytest.approx(aspect)
    assert max(shrunk(np.zeros((2046, 3072), bool), aspect, 1000).shape) == 1000


def test_one_slice_of_a_volume_says_where_it_was() -> None:
    figure = draw_overlays([picture(channels=3, slices=9, number=4)], ("disc", "cup"))
    assert figure.axes[0].get_title() == "worst: c0, slice 5 of 9"
    assert figure.axes[0].images[0].get_array().ndim == 2  # channels of a volume are no colours


def test_images_are_shown_as_colour_or_stretched_grey() -> None:
    colour = displayed(picture(channels=3).image, 0)
    assert colour.shape == (64, 64, 3)
    assert colour.max() <= 1
    dark = np.linspace(0.1, 0.2, 64 * 64, dtype=np.float32).reshape(1, 64, 64, 1)
    assert displayed(dark, 0).min() == 0
    assert displayed(dark, 0).max() == 1
    assert displayed(picture(channels=3, depth=2).image, 0).shape == (64, 64)
    assert np.isfinite(displayed(np.zeros((1, 8, 8, 1), dtype=np.uint8), 0)).all()


@pytest.mark.parametrize(("channels", "depth", "count"), [(3, 1, 3), (1, 4, 1)])
def test_overlays_show_each_case(tmp_path: Path, channels: int, depth: int, count: int) -> None:
    figure = draw_overlays([picture(channels, depth, case=f"c{k}") for k in range(count)], ("disc", "cup"))
    titles = [axis.get_title() for axis in figure.axes[:count]]
    assert titles[0] == "worst: c0" + (", slice 1 of 4" if depth > 1 else "")
    assert "disc     0.800" in figure.axes[count].get_title(loc="left")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["truth", "global", "personal"]
    figure.savefig(tmp_path / "x.png")
    pixels = np.asarray(Image.open(tmp_path / "x.png").convert("RGB")).reshape(-1, 3)
    for colour in ((255, 255, 255), (63, 169, 245), (255, 216, 0)):
        assert (np.abs(pixels.astype(int) - colour).max(axis=1) < 12).sum() > 50


@pytest.mark.slow
def test_empty_and_full_masks_can_be_drawn(tmp_path: Path) -> None:
    empty = np.zeros((2, 1, 64, 64), dtype=bool)
    figure = draw_overlays(
        [picture(truth=empty, predictions={"global": ~empty, "personal": empty}, scores={})], ("a", "b")
    )
    figure.savefig(tmp_path / "x.png")
    assert colours_in(tmp_path / "x.png") > 50


# --- progress -------------------------------------------------------------------------------------


def test_durations_are_for_people() -> None:
    assert [duration(s) for s in (0.04, 59.97, 185, 3599.6, 7620)] == [
        "0.0 s",
        "1 min 00 s",
        "3 min 05 s",
        "1 h 00 min",
        "2 h 07 min",
    ]


def run_progress(stream: io.StringIO) -> str:
    with Progress(stream) as progress:
        for round in (4, 5):
            progress.round_started(round, 5, ["A", "B"])
            time.sleep(0.12)  # a bar is drawn ten times a second
            progress.site_done("train", "A", {"loss": 0.25})
            progress.site_done("evaluate", "A", {})
            progress.round_done(round, {"loss": 0.25}, ["absent: B"] if round == 4 else [])
    return stream.getvalue()


def test_a_log_has_one_line_per_round() -> None:
    lines = run_progress(io.StringIO()).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("round 4/5  loss 0.2500")
    assert " left" in lines[0]
    assert lines[0].endswith("[absent: B]")
    assert " left" not in lines[1]
    assert "\r" not in "".join(lines)


def test_a_terminal_has_a_bar() -> None:
    text = run_progress(Terminal())
    assert "round 5/5" in text
    assert "train A loss 0.2500" in text
    assert "\r" in text
    assert "round 4: absent: B" in text


# --- reporter -------------------------------------------------------------------------------------


class FakeWandb(WandbRun):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.points: list[tuple[int, dict[str, float]]] = []
        self.summary: dict[str, float] = {}
        self.exit_code: int | None = None
        self._run = None

    def log_round(self, round: int, values: Mapping[str, float], *, last: bool = False) -> None:
        self.points.append((round, dict(values)))

    def summarise(self, values: Mapping[str, float]) -> None:
        self.summary.update(values)

    def log_pictures(self, pictures: Sequence[Picture], regions: Sequence[str]) -> None:
        pass

    def log_cases(self, scores: pd.DataFrame) -> None:
        assert set(scores["checkpoint"]) <= {"last", "best"}

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


def finish(folder: RunFolder) -> tuple[FakeWandb, str]:
    """One round as the engine tells it, then the end; what W&B got and what was printed."""
    wandb, out = FakeWandb(), io.StringIO()
    traffic = [{"round": 1, "site": s, "direction": "up", "group": "model", "bytes": 10} for s in "AB"]
    with Reporter(folder, wandb, progress=Progress(io.StringIO())) as reporter:
        reporter.round_done(Record(0, traffic=[{**traffic[0], "round": 0}]))
        reporter.round_started(1, 1, ["A", "B"])
        reporter.site_done("train", 1, "A", {"loss": 0.5, "steps": 5}, 0.1)
        reporter.site_done("evaluate", 1, "A", {"val/global/dice": 0.75, "seconds": 1.0}, 1.0)
        reporter.scores([during(1, "A", 0.75), during(1, "B", 0.25), during(1, "B", 0.5, view="personal")])
        reporter.round_done(Record(1, [trained(1, "A", 0.5), trained(1, "B", 0.7)], traffic, [event(1, "B", "late")]))
        reporter.training_done(1)
        reporter.site_done("evaluate", 1, "A", {"test/global/dice": 0.9}, 1.0)
        reporter.scores([score("A", 0.9), score("A", 0.8, split="val"), score("B", 0.6, split="val")])
        reporter.overlays([picture(site="A/1")], ("disc", "cup"))
        reporter.finish(out)
    return wandb, out.getvalue()


@pytest.mark.slow
@pytest.mark.usefixtures("rendered")
def test_the_reporter_files_what_the_engine_tells(folder: RunFolder) -> None:
    _, printed = finish(folder)
    scores = folder.scores()
    means = scores[scores["checkpoint"] == "round"]
    assert means[["site", "view", "value"]].values.tolist() == [
        ["A", "global", 0.75],
        ["B", "global", 0.25],
        ["B", "personal", 0.5],
    ]
    assert len(scores) == 6, "the final scoring is not a second validation of the round"
    assert folder.traffic()["round"].tolist() == [0, 1, 1]
    assert folder.events()["event"].tolist() == ["late"]
    assert (folder.overlays / "A%2F1.png").is_file()
    assert (folder.plots / "curves.png").is_file()
    assert "mean over sites" in (folder.path / "summary.md").read_text()
    assert "A" in cells(printed)
    assert str(folder.path) in printed


@pytest.mark.slow
def test_dashboards_get_one_point_per_round_and_sweep_keys(folder: RunFolder) -> None:
    wandb, _ = finish(folder)
    (zero, _), (one, values) = wandb.points
    assert (zero, one) == (0, 1)
    assert values["train/loss"] == pytest.approx(0.6)
    assert values["A/train/loss"] == 0.5
    assert values["A/val/global/dice"] == 0.75
    assert values["val/global/dice"] == 0.5
    assert values["val/personal/dice"] == 0.5
    assert values["val/worst_site/dice"] == 0.5, "of the personal models where there are any"
    assert values["bytes/up"] == 20
    assert wandb.summary["val/global/dice"] == pytest.approx(0.7), "of the best checkpoint"
    assert wandb.summary["val/worst_site/dice"] == pytest.approx(0.6)
    assert wandb.summary["best/test/global/dice"] == 0.9
    assert wandb.exit_code == 0


def test_a_crashed_run_stays_open_until_its_log_says_why(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setattr(WandbRun, "current", wandb)
    with pytest.raises(RuntimeError), Reporter(folder, wandb, progress=Progress(io.StringIO())):
        raise RuntimeError
    assert wandb.exit_code is None
    with failing_run(2):
        assert wandb.exit_code is None
    assert wandb.exit_code == 2
    beside = FakeWandb()
    monkeypatch.setattr(WandbRun, "current", beside)
    monkeypatch.setattr("fedseg.reporting.wandb._beside", ContextVar("beside", default=True))
    with pytest.raises(RuntimeError), Reporter(folder, beside, progress=Progress(io.StringIO())):
        raise RuntimeError
    assert beside.exit_code == 1, "the agent's run tells why; this one ends before that opens"


def test_rounds_that_a_kill_took_from_wandb_are_sent_from_the_tables(folder: RunFolder) -> None:
    folder.append_rounds([trained(round, site, loss) for round in (1, 2) for site, loss in (("A", 0.5), ("B", 0.7))])
    folder.append_scores([during(1, "A", 0.4), during(2, "A", 0.6)])
    folder.append_traffic([{"round": 2, "site": "A", "direction": "up", "group": "model", "bytes": 10}])

    class GoesOn(FakeWandb):
        goes_on = True

    wandb = GoesOn()
    with Reporter(folder, wandb, progress=Progress(io.StringIO())):
        pass
    assert [round for round, _ in wandb.points] == [1, 2]
    assert wandb.points[0][1]["A/val/global/dice"] == 0.4
    assert wandb.points[1][1]["train/loss"] == pytest.approx(0.6)
    assert (wandb.points[1][1]["bytes/up"], wandb.points[1][1]["B/train/steps"]) == (10, 5)


def test_validation_values_of_unseen_sites_are_left_out() -> None:
    values = validation_values([during(1, "A", 0.4), during(1, "U", 0.0, seen=False), during(2, "A", 0.6)])
    assert values == {
        round: {"A/val/global/dice": v, "val/global/dice": v, "val/worst_site/dice": v}
        for round, v in ((1, 0.4), (2, 0.6))
    }
    assert validation_values([]) == {}


def test_a_report_can_be_written_again(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder.append_rounds([trained(1, "A", 0.5)])
    folder.append_scores([score("A", 0.5)])
    assert report_again([str(folder.path)]) == 0
    assert "0.5000" in capsys.readouterr().out
    assert (folder.plots / "curves.png").is_file()
    assert report_again([str(folder.path.parent)]) == 2
    assert "holds no run" in capsys.readouterr().err


# --- W&B ------------------------------------------------------------------------------------------


def test_disabled_imports_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would raise
    run = WandbRun("disabled", RunFolder(tmp_path), {})
    run.log_round(1, {"a": 1.0})
    run.summarise({"a": 1.0})
    run.log_pictures([picture()], ("disc", "cup"))
    run.log_cases(pd.DataFrame([score("A", 0.5)]))
    run.finish(0)
    assert list(tmp_path.iterdir()) == []


def test_nested_regions_share_a_label_map() -> None:
    ids = label_map(np.stack([disc(30, 5)[0], disc(30, 12)[0]]))
    assert ids[30, 30] == 1
    assert ids[30, 40] == 2
    assert ids[0, 0] == 0


def chunks(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: a LevelDB log (blocks of 32 KiB; crc, length, type before each part)."""
    content, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # the whole record, or its last part
            yield parts
            parts = b""


def offline_records(folder: RunFolder) -> list[Any]:
    """Everything that the client wrote for a later sync, oldest run first."""
    from wandb.proto.wandb_internal_pb2 import Record as WandbRecord

    records = []
    for path in sorted(folder.path.glob("wandb/offline-run-*/*.wandb")):
        records += [WandbRecord.FromString(chunk) for chunk in chunks(path)]
    return records


def key(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Whoever connects to the network: all proxies and W&B's own address lead to a listener."""
    seen: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "WANDB_BASE_URL"):
            monkeypatch.setenv(name, url)
        monkeypatch.setenv("NO_PROXY", "")

        def listen() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, address = server.accept()
                    seen.append([address])
                    with connection, contextlib.suppress(OSError):
                        connection.settimeout(5)
                        seen[-1].append(connection.recv(200))  # for whom, which a failure then shows

        threading.Thread(target=listen, daemon=True).start()
        yield seen
        server.shutdown(socket.SHUT_RDWR)


def offline_session(folder: RunFolder, first: int, exit_code: int) -> None:
    config = {"algorithm": "ditto", "federation": {"rounds": 4}}
    told: dict[str, Any] = {"project": "p", "name": "n", "group": "g", "job_type": "ditto", "tags": ["t"]}
    run = WandbRun("offline", folder, config, **told, images=True)
    for round in (first, first + 1):
        run.log_round(round, {"val/global/dice": round / 10, "nothing": float("nan")})
    run.log_pictures([picture()], ("disc", "cup"))
    run.log_cases(pd.DataFrame([score("A", 0.5), score("A", 2.0, metric="hd95")]))
    run.summarise({"val/personal/dice": 0.75})
    run.finish(exit_code)


@pytest.fixture
def offline(folder: RunFolder, calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run that failed after two rounds and was resumed, without account and network."""
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "true")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    offline_session(folder, 1, exit_code=1)
    time.sleep(1.1)  # the client names its folders by the second
    offline_session(folder, 3, exit_code=0)
    wandb.teardown()  # as at the end of a process: until then the client's own process may still be writing
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"
    assert calls == []
    return folder


@pytest.mark.slow
def test_an_offline_run_holds_all_and_a_resumed_one_keeps_its_id(offline: RunFolder) -> None:
    records = offline_records(offline)
    runs = [record.run for record in records if record.HasField("run")]
    assert {run.run_id for run in runs} == {RunAddress.of(offline).id}
    assert {(run.run_group, run.job_type, run.project) for run in runs} == {("g", "ditto", "p")}
    assert {(run.display_name, *run.tags) for run in runs} == {("n", "t")}
    metrics = {m.name or m.glob_name: m.step_metric for r in records if r.HasField("metric") for m in [r.metric]}
    assert metrics["*"] == "round"
    config = {key(update): json.loads(update.value_json) for update in runs[0].config.update}
    assert config["algorithm"] == "ditto"
    assert config["federation"] == {"rounds": 4}
    items = [{key(i): json.loads(i.value_json) for i in r.history.item} for r in records if r.HasField("history")]
    points = [(item["round"], item["val/global/dice"]) for item in items if "val/global/dice" in item]
    assert points == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert not any("nothing" in item for item in items)
    pictures = next(item for item in items if "A/overlays/all_masks" in item)
    assert set(pictures["A/overlays/all_masks"][0]) == {"truth", "global", "personal"}
    table = next(item for item in items if "cases/nrows" in item)
    assert (table["cases/nrows"], table["cases/ncols"]) == (1, 10)
    summary = {key(i): json.loads(i.value_json) for r in records for i in r.summary.update}
    assert summary["val/personal/dice"] == 0.75
    assert [r.exit.exit_code for r in records if r.HasField("exit")] == [1, 0]


def test_a_folder_remembers_where_its_run_is(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert RunAddress.of(folder) == RunAddress()
    folder.wandb_id_path.write_text("abc\n")  # as earlier versions wrote it
    assert RunAddress.of(folder) == RunAddress("abc")
    RunAddress("abc", "trial", "team").remember(folder)
    assert folder.wandb_id_path.read_text() == "team/trial/abc\n"
    remember_agent(folder)  # there is none
    assert RunAddress.of(folder) == RunAddress("abc", "trial", "team")
    for name, value in (("RUN_ID", "r1"), ("SWEEP_ID", "s1"), ("PROJECT", "p"), ("ENTITY", "e")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    remember_agent(folder)
    assert RunAddress.of(folder) == RunAddress("r1", "p", "e")


def test_each_mask_of_an_image_is_its_own_and_its_classes_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[str, Any] = {}
    monkeypatch.setattr("wandb.Image", lambda pixels, **told: shown.update(told, pixels=pixels))
    drawn = picture()
    _wandb_image(drawn, ("disc", "cup"))
    assert shown["caption"] == f"{drawn.role}: {drawn.case}"
    assert set(shown["masks"]) == {"truth", "global", "personal"}
    index = best_slice(drawn)
    for view, mask in shown["masks"].items():
        assert mask["class_labels"] == {1: "disc", 2: "cup"}
        assert np.array_equal(mask["mask_data"], label_map(drawn.masks[view][:, index]))
    assert not np.array_equal(shown["masks"]["truth"]["mask_data"], shown["masks"]["global"]["mask_data"])


def test_online_without_an_account_names_the_cure(
    folder: RunFolder, calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # no stored login
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ReportingError, match=r"wandb login.*wandb\.mode=offline"):
        WandbRun("online", folder, {})


@pytest.mark.parametrize("images", [False, True])
def test_pictures_leave_only_when_that_was_said(images: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    run = WandbRun("disabled", RunFolder(tmp_path), {}, images=images)
    monkeypatch.setattr(run, "_run", object())
    monkeypatch.setattr(run, "_log_last", lambda values: sent.extend(values))
    run.log_pictures([picture()], ("disc", "cup"))
    assert sent == (["A/overlays"] if images else [])
    assert Wandb().images is False


@pytest.mark.parametrize("mechanism", ["site", "patient", "sparse", "none"])
@pytest.mark.parametrize("randomness", ["seeded", "secret"])
def test_the_table_says_that_seeded_noise_protects_nobody(mechanism: str, randomness: str) -> None:
    said = said_of_privacy({"privacy.mechanism": mechanism, "privacy.randomness": randomness})
    assert ("seeded: reproducible, protects nobody" in said) == (mechanism != "none" and randomness == "seeded")
    assert said_of_privacy({}) == ""
