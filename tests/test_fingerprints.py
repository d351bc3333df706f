"""A run goes on, and is scored again, on the bytes that it began with, wherever these lie."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import compare
import evaluate
import predict
import train
from fedseg.datamodules import fingerprints
from fedseg.datamodules.cases import Case
from fedseg.datamodules.fingerprints import file_digest, of_case
from fedseg.reporting.compare.report import PAGE
from fedseg.reporting.folder import FINGERPRINTS, RunFolder
from tests.data_files import make_sites, picture, save, square
from tests.test_train import command, mistake
from tests.tiers import every
from tests.tiny_run import TINY

SETTINGS = [*(s for s in TINY if not s.startswith(("data.cases", "data.amount", "data.resolution"))), "data=folder"]
SETTINGS += ["algorithm=ditto", "federation.rounds=1", "evaluation.metrics=[dice]"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and a finished run over them, whose root was given as a relative path."""
    place = tmp_path_factory.mktemp("made")
    make_sites(place / "data", "a", "b", count=8)
    before = Path.cwd()
    os.chdir(place)
    try:
        code, _, err = command(train.main, *SETTINGS, "data.root=data", "output=run")
    finally:
        os.chdir(before)
    assert code == 0, err
    return place


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """The same at another place, with other times of change; the run still names the old place."""
    shutil.copytree(made / "data", tmp_path / "data", copy_function=shutil.copyfile)
    shutil.copytree(made / "run", tmp_path / "run")
    return tmp_path


@pytest.mark.slow
def test_paths_are_saved_as_what_they_mean_and_a_run_is_scored_from_anywhere(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert RunFolder(made / "run").settings()["data.root"] == str(made / "data")
    assert RunFolder(made / "run").settings()["output"] == str(made / "run")
    monkeypatch.chdir(tmp_path)
    code, out, err = command(evaluate.main, str(made / "run"))
    assert code == 0, err
    assert "the largest difference is 0" in out
    code, _, err = command(train.main, f"output={made / 'run'}", "resume=true", f"data.root={made / 'data'}")
    assert code == 0, err


@pytest.mark.slow
def test_every_case_has_the_digests_of_its_files(made: Path) -> None:
    table = RunFolder(made / "run").fingerprints().set_index(["site", "case"])
    assert len(table) == 16
    assert table["image"].nunique() == 16
    assert table["mask"].nunique() == 1
    assert table["image"]["a", "case_00"] == file_digest(str(made / "data" / "a" / "images" / "case_00.png"))


def retouch(path: Path) -> None:
    """One pixel changes; size and time of change stay as far as the format allows."""
    status = path.stat()
    image = picture(0)
    image[0, 0] ^= 1
    save(path, image)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "image": ("the image of site 'a', case 'case_00'", lambda data: retouch(data / "a" / "images" / "case_00.png")),
    "mask": (
        "the mask of site 'a', case 'case_03'",
        lambda data: save(data / "a" / "masks" / "case_03.png", np.roll(square(), 1)) and None,
    ),
    "exchanged": ("hold other bytes", lambda data: exchange(data / "a" / "images", "case_01.png", "case_02.png")),
}


def exchange(folder: Path, one: str, two: str) -> None:
    (folder / one).rename(folder / "third")
    (folder / two).rename(folder / one)
    (folder / "third").rename(folder / two)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["memory", "disk"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_pixels_are_refused_and_nothing_is_touched(change: str, cache: str, copied: Path) -> None:
    told, apply = CHANGES[change]
    apply(copied / "data")
    where = [f"data.root={copied / 'data'}", f"data.cache={cache}", f"data.cache_dir={copied / 'cache'}"]
    before = contents(copied / "run")
    for said in (
        mistake(f"output={copied / 'run'}", "resume=true", "federation.rounds=2", *where),
        mistake(str(copied / "run"), *where, main=evaluate.main),
    ):
        assert "the data changed since this run began" in said
        assert told in said
        assert "restore the data, or start another run" in said
        assert contents(copied / "run") == before


@pytest.mark.slow
@pytest.mark.parametrize("cache", every(["memory", "disk"], ["disk"]))
def test_data_that_moved_are_accepted_by_every_command(cache: str, copied: Path) -> None:
    run, where = str(copied / "run"), f"data.root={copied / 'data'}"
    settings = [where, f"data.cache={cache}", f"data.cache_dir={copied / 'cache'}"]
    code, out, err = command(evaluate.main, run, *settings)
    assert code == 0, err
    assert "the largest difference is 0" in out
    images = str(copied / "data" / "a" / "images")
    code, _, err = command(predict.main, run, "--images", images, "--out", str(copied / "masks"), where)
    assert code == 0, err
    code, _, err = command(train.main, f"output={run}", "resume=true", "federation.rounds=2", *settings)
    assert code == 0, err
    assert RunFolder(run).settings()["data.root"] == str(copied / "data")


@pytest.mark.slow
def test_what_cannot_be_read_any_more_is_told_with_a_way_out(copied: Path) -> None:
    run = copied / "run"
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(RunFolder(run).settings()["data.root"]), str(copied / "gone")))
    told = mistake(str(run), main=evaluate.main)
    assert str(copied / "gone") in told
    assert "data.root=DIR" in told
    code, _, err = command(evaluate.main, str(run), f"data.root={copied / 'data'}")
    assert code == 0, err
    code, _, err = command(predict.main, str(run), "--images", str(copied / "data"), "--out", "x", "seed=3")
    assert code == 2
    assert "seed belongs to the run; only data.root" in err


@pytest.mark.exhaustive
def test_a_comparison_draws_cases_of_data_that_moved(made: Path, copied: Path) -> None:
    run = copied / "run"
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(made / "data"), str(copied / "gone")))
    code, _, err = command(compare.main, str(run), f"output={copied / 'gone-report'}")
    assert code == 0, err
    report = copied / "report"
    code, _, err = command(compare.main, str(run), f"output={report}", f"data.root={copied / 'data'}")
    assert code == 0, err
    pages = [(place / PAGE).read_text() for place in (copied / "gone-report", report)]
    assert ["cannot be looked at again" in page for page in pages] == [True, False]


@pytest.mark.slow
def test_a_run_of_an_earlier_version_knows_no_digests_and_goes_on(copied: Path) -> None:
    (copied / "run" / FINGERPRINTS).unlink()
    code, _, err = command(evaluate.main, str(copied / "run"), f"data.root={copied / 'data'}")
    assert code == 0, err


def test_digests_are_of_bytes_and_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / name for name in ("one", "two", "three")]
    for path, data in zip(paths, (b"same", b"same", b"other"), strict=True):
        path.write_bytes(data)
    one, two, three = (file_digest(str(path)) for path in paths)
    assert one == two != three
    assert file_digest("") == file_digest(str(tmp_path / "absent")) == ""
    reads: list[object] = []
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *args: reads.append(self) or real(self, *args))
    assert file_digest(str(paths[0])) == one
    assert not reads
    slices = tuple(Case("s", str(n), "p", str(path), str(paths[2])) for n, path in enumerate(paths))
    stack, turned = (Case("s", "p", "p", mask="", slices=order) for order in (slices, slices[::-1]))
    assert of_case(stack) != of_case(turned)
    assert of_case(Case("s", "made", "p")) == ("", "")
    fingerprints._digest.cache_clear()


def contents(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, byte for byte."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
