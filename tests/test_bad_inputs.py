"""Whatever is given by mistake ends in one short message that names it and the cure; nothing is lost, nothing hangs."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import pytest

import compare
import evaluate
import export
import predict
import sweep
import train
from fedseg.launch.check import main as check
from tests import bad_inputs as table
from tests.bad_inputs import Bad, World
from tests.data_files import make_sites
from tests.tiers import every

Main = Callable[[Sequence[str]], int]
LONGEST = 900  # characters of a message
pytestmark = pytest.mark.timeout(120)
RUN = [
    *("data=folder", "data.size=[20, 24]", "data.batch_size=2", "data.augment=none", "model=tiny", "algorithm=ditto"),
    *("model.encoder_depth=2", "model.decoder_channels=[16, 8]"),
    *("federation.rounds=2", "federation.local_steps=1", "evaluation.overlays=false", "evaluation.metrics=[dice]"),
    *("trainer.threads=1", "trainer.accelerator=cpu"),
]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> World:
    home = tmp_path_factory.mktemp("original")
    root, run = make_sites(home / "data", "north", "south"), home / "run"
    assert train.main([*RUN, f"data.root={root}", f"output={run}"]) == 0
    return World(root, run, home)


@pytest.fixture
def world(original: World, tmp_path: Path) -> World:
    """A copy of a data set and of a run on it."""
    made = World(tmp_path / "data", tmp_path / "run", tmp_path / "new")
    shutil.copytree(original.root, made.root)
    shutil.copytree(original.run, made.run)
    made.new.mkdir()
    config = (made.run / "config.yaml").read_text()
    (made.run / "config.yaml").write_text(
        config.replace(str(original.root), str(made.root)).replace(str(original.run), str(made.run))
    )
    return made


def answer(main: Main, words: Sequence[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as end:  # argparse
            code = int(end.code or 0)
    return code, out.getvalue(), err.getvalue()


def contents(*folders: Path) -> dict[Path, tuple[int, int]]:
    """Every file's size and time: whatever is written changes the time."""
    return {
        path: (path.stat().st_size, path.stat().st_mtime_ns)
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def refused(main: Main, words: Sequence[str], told: Sequence[str], world: World | None = None) -> str:
    """The message; whatever was there before is there afterwards."""
    before = contents(world.root, world.run) if world else {}
    code, _, err = answer(main, words)
    assert code in (1, 2), err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if "error: " in line]
    assert len(lines) == 1, err
    assert len(err.split("error: ", 1)[1].split("\n\n")[0]) <= LONGEST, err
    for word in told:
        assert word in err, (word, err)
    after = contents(world.root, world.run) if world else {}
    assert {path: after.get(path) for path in before} == before
    return err


def ids(bad: Bad) -> str:
    return bad.name.replace(" ", "-")


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("word", table.OUT_OF_RANGE)
def test_values_that_cannot_be(word: str, original: World, tmp_path: Path) -> None:
    key = word.partition("=")[0]
    refused(train.main, [*RUN, f"data.root={original.root}", f"output={tmp_path / 'run'}", word], [key], original)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("word", table.UNKNOWN)
def test_settings_that_do_not_exist(word: str, tmp_path: Path) -> None:
    key = word.partition("=")[0]
    refused(train.main, [f"output={tmp_path / 'run'}", word], [key])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("word", table.NO_SETTINGS)
def test_words_that_are_no_settings(word: str, tmp_path: Path) -> None:
    refused(train.main, [f"output={tmp_path / 'run'}", word], [word.partition("=")[0]])


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("bad", every(table.BAD_DATA, table.BAD_DATA[::2]), ids=ids)
def test_a_run_refuses_data_before_it_trains(bad: Bad, world: World) -> None:
    bad.spoil(world)
    words = [*RUN, f"data.root={world.root}", f"output={world.new / 'run'}", *bad.words(world)]
    refused(train.main, words, bad.told, world)
    assert not (world.new / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("bad", every(table.BAD_DATA, table.BAD_DATA[::16]), ids=ids)
def test_the_check_names_the_same(bad: Bad, world: World) -> None:
    bad.spoil(world)
    before = contents(world.root)
    code, out, err = answer(check, [str(world.root), f"output={world.new / 'check'}"])
    assert code == 1, out + err
    assert "Traceback" not in err
    findings = pd.read_csv(world.new / "check" / "findings.csv")
    errors = findings[findings["severity"] == "error"]
    text = "\n".join(str(row) for row in errors.fillna("").itertuples()) + out
    for word in bad.told:
        assert word in text, (word, out)
    assert contents(world.root) == before


# --- runs -------------------------------------------------------------------------------------------------------------


def line(command: str, world: World) -> tuple[Main, list[str]]:
    run = str(world.run)
    return {
        "resume": (train.main, [f"output={run}", "resume=true"]),
        "evaluate": (evaluate.main, [run]),
        "compare": (compare.main, [run, f"output={world.new / 'report'}", "pictures=false"]),
        "predict": (
            predict.main,
            [run, "--images", str(world.root / "north/images"), "--out", str(world.new / "masks")],
        ),
        "export": (export.main, [run, "--out", str(world.new / "models")]),
    }[command]


OTHERS = {
    "resume": table.BAD_RESUMES,
    "evaluate": table.BAD_EVALUATIONS,
    "compare": table.BAD_COMPARISONS,
    "predict": table.BAD_PREDICTIONS,
    "export": table.BAD_EXPORTS,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "bad"),
    [
        pytest.param(command, bad, id=f"{command}-{ids(bad)}", marks=[pytest.mark.exhaustive] * bool(place % 2))
        for command, rows in table.BAD_RUNS.items()
        for place, bad in enumerate((*rows, *OTHERS[command]))
    ],
)
def test_commands_on_runs(command: str, bad: Bad, world: World) -> None:
    bad.spoil(world)
    main, words = line(command, world)
    refused(main, [*words, *bad.words(world)], bad.told, world)
    for written in ("report", "masks", "models"):
        assert not (world.new / written).exists()


# --- sweeps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", table.BAD_SWEEPS, ids=ids)
def test_sweeps(bad: Bad, tmp_path: Path) -> None:
    world = World(tmp_path, tmp_path, tmp_path)
    bad.spoil(world)
    words = list(bad.words(world))
    file = [] if words[:1] == ["gone"] else [str(tmp_path / "sweep.yaml")]
    refused(sweep.main, [*file, *words, f"output={tmp_path / 'runs'}"], bad.told)
    assert not list((tmp_path / "runs").glob("*/config.yaml"))


def test_there_are_hundreds() -> None:
    lists = (table.OUT_OF_RANGE, table.UNKNOWN, table.NO_SETTINGS, table.BAD_DATA, table.BAD_SWEEPS, *OTHERS.values())
    assert sum(len(rows) for rows in (*lists, *table.BAD_RUNS.values())) >= 300
