"""Whatever a site says of itself is escaped wherever it is shown: no terminal obeys it, nothing computes or runs it."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from matplotlib.figure import Figure

from fedseg.common.text import FORMULA
from fedseg.configs.compose import ConfigError
from fedseg.federation.contract import TrainTask
from fedseg.federation.engine import RoundError
from fedseg.federation.flower.keys import SiteKey, signed
from fedseg.federation.flower.records import Answer, Facts, checked_update
from fedseg.federation.flower.transport import FlowerTransport
from fedseg.federation.state import State
from fedseg.launch.command import guarded
from fedseg.launch.sites.across import agreed
from fedseg.reporting.compare.analysis import Analysis
from fedseg.reporting.compare.gather import gather
from fedseg.reporting.compare.options import Options
from fedseg.reporting.compare.report import Extras, write
from fedseg.reporting.compare.runs import LeftOut, read_run
from fedseg.reporting.folder import RunFolder
from fedseg.reporting.letters import legible
from fedseg.reporting.progress import Progress
from fedseg.reporting.reporter import Reporter
from fedseg.reporting.summary import Table
from fedseg.reporting.wandb import WandbRun
from tests.run_folders import write_run

HOSTILE = {
    "ansi": "\x1b[2J\x1b]0;owned\x07",
    "formula": "=HYPERLINK(1)",
    "at": " @SUM(1)",
    "lines": "a\r\n-2+3",
    "html": "<img src=x onerror=alert(1)>",
    "bidi": "a\u202egnp.exe",
    "surrogate": "a\udcff",
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def line(folder: Path, text: str) -> str:
    """One line per event, in a log."""
    stream = io.StringIO()
    progress = Progress(stream)
    progress.round_started(1, 2, ["a"])
    progress.round_done(1, {"loss": 0.1}, [f"refused: a {text}"])
    return stream.getvalue()


def bar(folder: Path, text: str) -> str:
    """The bar of a terminal; what moves its cursor is its own."""
    stream = Terminal()
    with Progress(stream) as progress:
        progress.round_started(1, 2, ["a"])
        progress.site_done("train", text, {"loss": 0.1})
        progress.round_done(1, {"loss": 0.1}, [f"refused: a {text}"])
    return re.sub(r"\x1b\[A|\r", "\n", stream.getvalue())


def table(folder: Path, text: str) -> str:
    return Table(("site", text), ((text, "0.5"), (), ("mean", "0.5"))).text()


def markdown(folder: Path, text: str) -> str:
    return Table(("site", text), ((text, "0.5"), ("mean", "0.5"))).markdown()


def error(folder: Path, text: str, capsys: pytest.CaptureFixture[str]) -> str:
    def command(_: Any) -> int:
        raise RoundError(f"site 'a': {text}")

    assert guarded(command, []) == 2
    return capsys.readouterr().err


def tables(folder: Path, text: str) -> str:
    """events.csv, audit.csv, audit_tensors.csv and communication.csv."""
    run = RunFolder(folder)
    run.append_events([{"round": 1, "site": "a", "event": "refused", "detail": text}])
    row = {"round": 1, "site": "a", "task": "train", "group": text, "numbers": 1, "bytes": 8, "transforms": ""}
    run.append_audit([{**row, "listing": [(text, "1", "float32")]}])
    run.append_traffic([{"round": 1, "site": "a", "direction": "up", "group": text, "bytes": 8}])
    run.write_audit_summary()
    return "".join(path.read_text() for path in sorted(folder.glob("*.csv")))


def wandb_keys(folder: Path, text: str) -> str:
    run: Any = WandbRun("disabled", RunFolder(folder), {})
    told: list[str] = []
    run._run = SimpleNamespace(log=lambda values, **_: told.extend(values), step=0, starting_step=0)
    reporter = Reporter(RunFolder(folder), run, progress=Progress(io.StringIO()))
    reporter.round_started(1, 1, ["a"])
    reporter.site_done("train", 1, "a", {text.replace("/", ""): 0.5}, 0.1)
    tables = ("scores", "rounds", "updates", "traffic", "events", "privacy", "audit")
    record: Any = SimpleNamespace(round=1, **{table: [] for table in tables})
    reporter.round_done(record)
    assert len(told) > 1
    return "\n".join(told)


def refusal(folder: Path, text: str) -> str:
    """Why a site says that it did not train; what the engine then notes and tells."""
    return checked_update(Answer("a", refusal=text), State(), Facts("a", True, 3, 2), TrainTask(1, 0)).refusal


def greeting(folder: Path, text: str) -> str:
    """Why a site says that it cannot take part."""
    way: Any = FlowerTransport
    return str(way._unfit(SimpleNamespace(_nodes={}), Answer("a", refusal=text)))


def settings(folder: Path, text: str) -> str:
    """Settings that must be alike at all sites."""
    sites = {name: Facts(name, True, 3, 2, {"size": told}) for name, told in (("a", "[32, 32]"), ("b", text))}
    settings_of_the_run: Any = SimpleNamespace()
    with pytest.raises(ConfigError) as refused:
        agreed(sites, settings_of_the_run)
    return str(refused.value)


SINKS: list[Callable[..., str]] = [
    line,
    bar,
    table,
    markdown,
    error,
    tables,
    wandb_keys,
    refusal,
    greeting,
    settings,
]


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("sink", SINKS, ids=lambda sink: sink.__name__)
def test_what_a_site_says_is_harmless_where_it_is_shown(
    sink: Callable[..., str], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = HOSTILE[kind]
    shown = sink(tmp_path, text, *([capsys] if sink is error else []))
    assert all(part.isprintable() for part in shown.split("\n"))
    word = re.search(r"[A-Za-z0-9]+", text.replace("\x1b[2J", ""))
    assert word is not None
    assert word[0] in shown, "it is shown, and not dropped"
    if sink is tables:
        cells = [cell for row in csv.reader(io.StringIO(shown)) for cell in row]
        assert not [cell for cell in cells if cell.lstrip().startswith(FORMULA)]
    if sink is markdown:
        assert "<" not in shown


@pytest.mark.slow
@pytest.mark.usefixtures("rendered")
def test_the_page_of_a_comparison_runs_nothing_and_says_what_protects_nobody(tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)>"
    private = ("privacy.mechanism=patient", "model.norm=group")
    for algorithm, more in (("fedavg", private), ("local", ())):
        write_run(tmp_path / algorithm, algorithm, 0, *more, sites={"site_01": 24, name: 24})
    found = [read_run(tmp_path / algorithm, "dice") for algorithm in ("fedavg", "local")]
    assert not [run for run in found if isinstance(run, LeftOut)]
    nothing = pd.DataFrame(columns=["site", "other", "measure", "value"])
    write(Analysis(gather(found), Options(draws=100)), tmp_path / "report", lambda _: Extras(nothing, "", []))
    page = next((tmp_path / "report").glob("*.html")).read_text()
    assert "<img src=x" not in page
    assert "&lt;img src=x" in page
    assert "fedavg: privacy.mechanism=patient, noise seeded: reproducible, protects nobody." in page
    assert "local: privacy" not in page


def test_a_name_in_a_figure_is_no_formula(tmp_path: Path) -> None:
    r"""Matplotlib reads what stands between dollars, and fails where it is none; powers of ten stay what they are."""
    name = r"$\no$"
    figure = Figure()
    axes = figure.subplots()
    axes.plot([1, 2], [1, 1000], label=name)
    axes.set(title=name, xlabel=name, ylabel=name, yscale="log")
    axes.set_xticks([1, 2], labels=[name, "b"])
    axes.legend()
    with pytest.raises(ValueError, match="Unknown symbol"):
        figure.savefig(tmp_path / "a.png")
    legible(figure).savefig(tmp_path / "a.png")
    assert all(label.get_parse_math() for label in axes.get_yticklabels())


@pytest.mark.parametrize("change", [str.upper, lambda key: f"{key[:8]} {key[8:]}", lambda key: f"{key}\n"])
def test_a_key_is_written_in_one_way_only(change: Callable[[str], str], tmp_path: Path) -> None:
    """Else one key could have two names, and a line of keys.yaml of its own."""
    key = SiteKey(tmp_path, "a")
    assert signed(key.public, "text", key.sign("text"))
    assert not signed(change(key.public), "text", key.sign("text"))
