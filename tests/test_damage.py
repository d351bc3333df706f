"""Files of a run that were damaged, lost or swapped end in one line, and nothing is changed."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedseg.common import files
from fedseg.common.files import write_atomic
from fedseg.federation.checkpoint import Checkpoint, CheckpointError, Snapshot
from fedseg.federation.state import State
from fedseg.reporting.folder import RunFolder
from tests.world import assert_same

# ------------------------------------------------------------------------------------------------------- checkpoints


def state(value: float) -> State:
    return State({"model": {"w": torch.tensor([value, 1.0])}}, {"total": value})


def saved(folder: Path) -> Checkpoint:
    """Three rounds of two sites; the best models are of different rounds."""
    checkpoint = Checkpoint(folder)
    for round, (shared, own) in enumerate([(0.2, 0.9), (0.8, 0.1), (0.5, 0.3)], 1):
        kept = {"a": state(10 + round), "b ä": state(20 + round)}
        checkpoint.save(round, state(round), kept, {"global": shared, "personal/a": own, "personal/b ä": float("nan")})
    return checkpoint


def everything(folder: Path) -> tuple[Snapshot, dict[str, Any]]:
    checkpoint = Checkpoint(folder)
    checkpoint.verify()
    snapshot = checkpoint.load()
    assert snapshot is not None
    return snapshot, {name: (repr(best), checkpoint.read(best.server)) for name, best in checkpoint.best().items()}


def assert_refused_or_same(folder: Path, expected: tuple[Snapshot, dict[str, Any]]) -> bool:
    """Whether it was refused."""
    try:
        snapshot, best = everything(folder)
    except CheckpointError as error:
        told = str(error)
        assert all(("\n" not in told, str(folder) in told, "output=" in told)), told
        return True
    assert snapshot.round == expected[0].round
    assert snapshot.kept.keys() == expected[0].kept.keys()
    assert_same(snapshot.server, expected[0].server)
    for site, kept in snapshot.kept.items():
        assert_same(kept, expected[0].kept[site])
    assert {name: told for name, (told, _) in best.items()} == {name: told for name, (told, _) in expected[1].items()}
    return False


@pytest.mark.slow
def test_a_bit_that_flips_anywhere_in_a_checkpoint_is_never_loaded_in_silence(tmp_path: Path) -> None:
    saved(tmp_path)
    expected = everything(tmp_path)
    refused = tried = 0
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for place in range(0, len(whole), 1 if path.suffix == ".json" else 5):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
            tried += 1
            refused += assert_refused_or_same(tmp_path, expected)
        path.write_bytes(whole)
    assert refused > 0.9 * tried  # but for blanks in the index


@pytest.mark.parametrize("left", [0.0, 0.3, 0.99])
def test_a_file_of_a_checkpoint_that_was_cut_or_emptied_is_named(left: float, tmp_path: Path) -> None:
    saved(tmp_path)
    expected = everything(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        path.write_bytes(whole[: int(left * len(whole))])
        assert assert_refused_or_same(tmp_path, expected)
        path.unlink()
        assert assert_refused_or_same(tmp_path, expected)
        path.mkdir()
        if path.name != "index.json":
            assert assert_refused_or_same(tmp_path, expected)
        path.rmdir()
        path.write_bytes(whole)


CHANGES = {
    "negative round": {"round": -1},
    "round zero": {"round": 0},
    "another round": {"round": 2},
    "a site is lost": {"kept": {}},
    "no best models": {"best": {}},
    "no server": {"server": ""},
    "round is true": {"round": True},
    "best of the future": {"best": {"global": {"score": 0.9, "round": 9, "server": "server-00009.safetensors"}}},
    "best without score": {"best": {"global": {"score": None, "round": 2, "server": "server-00002.safetensors"}}},
    "unknown entry": {"rounds": 3},
}


@pytest.mark.parametrize("signed", [True, False], ids=["of this version", "of an earlier version"])
@pytest.mark.parametrize("change", CHANGES)
def test_an_index_that_cannot_be_true_is_refused(change: str, signed: bool, tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "index.json"
    index = json.loads(path.read_text())
    if not signed:
        del index["checksum"], index["checksums"]
        path.write_text(json.dumps(index))
        everything(tmp_path)  # it still opens
    path.write_text(json.dumps({**index, **CHANGES[change]}))
    if not signed and change == "no best models":
        return  # nothing tells that there were some
    with pytest.raises(CheckpointError, match=r"index\.json is damaged .*restore the folder from a copy"):
        everything(tmp_path)


def test_a_checkpoint_of_an_earlier_version_has_checksums_from_the_next_round_on(tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "index.json"
    index = json.loads(path.read_text())
    del index["checksum"], index["checksums"]
    path.write_text(json.dumps(index))
    again = Checkpoint(tmp_path)
    snapshot = again.load()
    assert snapshot is not None
    again.save(4, state(4), snapshot.kept, {"global": 0.1})
    expected = everything(tmp_path)
    assert set(again.index["checksums"]) == {file.name for file in tmp_path.glob("*.safetensors")}
    best = tmp_path / again.best()["global"].server
    best.write_bytes(best.read_bytes()[:-1] + b"\x01")
    assert assert_refused_or_same(tmp_path, expected)


def test_an_index_that_is_lost_is_no_new_start_but_a_kill_before_the_first_one_is(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    class Short(Checkpoint):
        def _write(self, name: str, data: bytes) -> str:
            if name.startswith("site"):
                raise Killed
            return super()._write(name, data)

    with pytest.raises(Killed):
        Short(tmp_path / "killed").save(1, state(1), {"a": state(1)}, {})
    assert Checkpoint(tmp_path / "killed").load() is None
    Checkpoint(tmp_path / "killed").save(1, state(1), {"a": state(1)}, {})
    (tmp_path / "killed" / "index.json").unlink()
    with pytest.raises(CheckpointError, match=r"index\.json is missing, although .* holds s.*restore the folder"):
        Checkpoint(tmp_path / "killed")
    assert Checkpoint(tmp_path / "new").round == 0
    assert not (tmp_path / "new").exists(), "looking at a folder makes none"


# ------------------------------------------------------------------------------------------------------ single files


@pytest.mark.parametrize("content", ["new", b"new"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError()])
def test_a_write_that_fails_leaves_the_old_file_alone_and_names_it(
    content: str | bytes, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(_: int) -> None:
        raise error

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(type(error)) as raised:
        write_atomic(path, content)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"
    assert not isinstance(error, OSError) or raised.value.filename == str(path)


def test_a_rename_is_made_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(files, "sync_directory", synced.append)
    write_atomic(tmp_path / "file", b"new")
    assert synced == [tmp_path]


def test_a_private_file_is_its_owners_whatever_others_may_read(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_atomic(tmp_path / "private", "x", private=True)
        write_atomic(tmp_path / "plain", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "plain").stat().st_mode & 0o777 == 0o666


@given(st.lists(st.integers(0, 9000), max_size=5), st.integers(0, 9000))
def test_the_last_whole_line_is_found_from_the_end(lengths: list[int], rest: int) -> None:
    lines = [b"x" * length for length in lengths]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "table"
        path.write_bytes(b"".join(line + b"\n" for line in lines) + b"y" * rest)
        assert files.last_line(path) == (lines[-1] if lines else b"")


def test_what_a_killed_write_leaves_is_swept_away_and_nothing_else(tmp_path: Path) -> None:
    for name in (".a.csv.123.part", ".a.csv.123.tmp", ".a.part", "a.csv", ".hidden"):
        (tmp_path / name).touch()
    files.sweep_parts(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"a.csv", ".hidden"}


def test_a_full_disk_is_told_with_the_table_that_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = RunFolder.create(tmp_path / "run", resume=False)
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left") as raised:
        folder.append_events([{"round": 1, "site": "a", "event": "absent", "detail": ""}])
    assert raised.value.filename == str(tmp_path / "run" / "events.csv")


def test_temporary_files_of_a_killed_run_are_swept_and_no_others(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, resume=False)
    folder.write_config("seed: 1\n")
    mine = [tmp_path / name for name in (".notes.tmp", "a.123.tmp", ".hidden")]
    for path in [*mine, tmp_path / ".metrics.csv.4711.tmp"]:
        path.write_text("half")
    RunFolder.create(tmp_path, resume=True)
    assert not (tmp_path / ".metrics.csv.4711.tmp").exists()
    assert all(path.exists() for path in mine)
