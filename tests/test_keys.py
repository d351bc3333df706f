"""A site's name belongs to a key: at first sight or from a list, after a restart too, and under every answer."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from fedseg.configs.compose import ConfigError
from fedseg.federation.checkpoint import CheckpointError
from fedseg.federation.engine import RoundError
from fedseg.federation.flower.keys import Pins, SiteKey, signed
from fedseg.launch import flower_server
from fedseg.launch.sites.across import read_keys
from fedseg.launch.sites.site import Pseudonyms
from fedseg.reporting.folder import RunFolder
from tests.test_across import SITES, across, grid_of

QUICK = ("algorithm=fedavg", "federation.rounds=1", "deployment.patience=0")


@pytest.mark.parametrize(("text", "other"), [("", ""), ("a", "00"), ("ä\n{}", "zz"), ("x" * 9999, "a" * 64)])
def test_a_signature_is_of_one_text_and_one_key(tmp_path: Path, text: str, other: str) -> None:
    folder = tmp_path
    one, two = SiteKey(folder / "a", "a"), SiteKey(folder / "b", "b")
    assert signed(one.public, text, one.sign(text))
    assert signed(SiteKey(folder / "a", "a").public, text, one.sign(text))
    assert not signed(two.public, text, one.sign(text))
    assert not signed(one.public, text + "x", one.sign(text))
    assert not signed(other, text, one.sign(text))
    assert not signed(one.public, text, other)
    assert (folder / "a" / "site.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("made", [Pseudonyms, lambda folder: SiteKey(folder, "a")])
def test_a_key_is_whole_or_not_there_and_nothing_else_is_taken_for_one(
    made: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            made(tmp_path)
    assert not list(tmp_path.iterdir())
    made(tmp_path)
    (path,) = tmp_path.glob("*.key")
    assert re.fullmatch("[0-9a-f]{64}", path.read_text())
    for other in (b"", path.read_bytes()[:32], path.read_bytes() * 2, b"\xff" * 64):
        path.write_bytes(other)
        with pytest.raises(CheckpointError, match=rf"{path.name} holds no key of 64 .* delete it, which makes another"):
            made(tmp_path)
    path.unlink()
    made(tmp_path)
    assert re.fullmatch("[0-9a-f]{64}", path.read_text())
    for told in tmp_path.glob("site.pub"):
        assert told.read_text() == f"a: {SiteKey(tmp_path, 'a').public}\n"


@pytest.mark.parametrize("links", [True, False])
def test_two_first_starts_of_a_site_at_once_have_one_key(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other: list[str] = []
    original = os.fsync

    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "no hard links here")

    def meanwhile(file: int) -> None:
        """Between what one start writes and its name, another one comes and goes."""
        monkeypatch.setattr(os, "fsync", original)
        other.append(Pseudonyms(tmp_path)("case_01"))
        original(file)

    monkeypatch.setattr(os, "fsync", meanwhile)
    if not links:
        monkeypatch.setattr(os, "link", refused)
    assert [Pseudonyms(tmp_path)("case_01")] == other == [Pseudonyms(tmp_path)("case_01")]
    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_name_belongs_to_one_key_and_a_key_to_one_name() -> None:
    pins = Pins()
    assert pins.refusal("north", "aa") == ""
    assert pins.refusal("north", "aa") == ""
    assert "the name 'north' belongs to the key aa" in pins.refusal("north", "bb")
    assert "its key belongs to the name 'north'" in pins.refusal("south", "aa")
    assert pins.seen == ["north"]
    closed = Pins({"north": "aa"}, closed=True)
    assert "add the line south: bb" in closed.refusal("south", "bb")
    assert closed.refusal("north", "aa") == ""


@pytest.mark.slow
def test_another_key_under_a_known_name_is_refused_after_a_restart_and_for_later_runs(tmp_path: Path) -> None:
    run = across(tmp_path, *QUICK, grid=grid_of(tmp_path / "sites"))
    keys = yaml.safe_load((run.path / "keys.yaml").read_text())
    assert keys == {site: SiteKey(tmp_path / "sites" / site, site).public for site in SITES}
    assert set(run.events().query("event == 'first sight'")["site"]) == set(SITES)
    listed = f"deployment.keys={run.path / 'keys.yaml'}"
    later = across(tmp_path / "later", *QUICK, listed, grid=grid_of(tmp_path / "sites"))
    assert later.events().query("event == 'first sight'").empty
    shutil.copytree(tmp_path / "sites", tmp_path / "impostor")
    (tmp_path / "impostor" / "site_02" / "site.key").unlink()
    grid = grid_of(tmp_path / "impostor")
    again = [f"output={run.path}", "resume=true", "federation.rounds=2", "deployment.patience=0"]
    with pytest.raises(RoundError, match=r"'site_02' cannot take part: its key is .* belongs to the key"):
        flower_server.run(grid, again)
    with pytest.raises(RoundError, match="'site_02' cannot take part: its key is"):
        across(tmp_path / "third", *QUICK, listed, grid=grid_of(tmp_path / "impostor"))
    flower_server.run(grid_of(tmp_path / "sites"), again)
    assert set(RunFolder(run.path).rounds()["round"]) == {1, 2}
    new = tmp_path / "impostor" / "site_02" / "site.pub"
    new.unlink()
    SiteKey(new.parent, "site_02")
    changed = (run.path / "keys.yaml").read_text().replace(keys["site_02"], new.read_text().split()[1])
    (run.path / "keys.yaml").write_text(changed)  # the cure, once the site confirmed that it made a new one
    flower_server.run(grid, [*again[:2], "federation.rounds=3", "deployment.patience=0"])


@pytest.mark.slow
def test_a_list_lets_nobody_else_in_and_a_broken_one_is_refused(tmp_path: Path) -> None:
    grid = grid_of(tmp_path / "sites", SITES[:2])
    listed = tmp_path / "keys.yaml"
    listed.write_text(f"site_01: {SiteKey(tmp_path / 'sites' / 'site_01', 'site_01').public}\n")
    with pytest.raises(RoundError, match=r"its name is not among those of deployment.keys; .* add the line") as error:
        across(tmp_path / "one", *QUICK, f"deployment.keys={listed}", grid=grid)
    line = str(error.value).split("add the line ")[1].split("'")[0]
    listed.write_text(listed.read_text() + line + "\n")
    across(tmp_path / "two", *QUICK, f"deployment.keys={listed}", grid=grid)
    for text in ("site_01: short", "[a]", "a: &x b", "site_01:", "# nobody"):
        listed.write_text(text)
        with pytest.raises(ConfigError, match=r"keys\.yaml"):
            read_keys(listed)
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read"):
        read_keys(tmp_path / "none.yaml")


@pytest.mark.slow
def test_two_sites_of_one_folder_have_one_key_and_are_refused(tmp_path: Path) -> None:
    first, second = grid_of(tmp_path, ["site_01"]), grid_of(tmp_path, ["site_02"])
    SiteKey(tmp_path / "site_01", "site_01")
    shutil.copytree(tmp_path / "site_01", tmp_path / "site_02")
    first.apps[2] = second.apps[1]
    with pytest.raises(RoundError, match="'site_02' cannot take part: its key belongs to the name 'site_01'"):
        across(tmp_path / "run", *QUICK, grid=first)
