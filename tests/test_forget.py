"""Forgetting a site: what is trained again equals a run that never had it, and nothing stands in its name."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from fedseg.configs.compose import ConfigError, compose, departing
from fedseg.federation.checkpoint import BRANCHES, Checkpoint, CheckpointError
from fedseg.federation.ledger import LEDGER, canonical, hashed
from fedseg.launch import forget, verify
from fedseg.launch.forget import branch, traces, unlike, without_site
from fedseg.launch.settings import SCHEMA
from fedseg.reporting import ReportingError
from fedseg.reporting.folder import RunFolder
from tests.test_kill_resume import finish
from tests.tiny_run import TINY

SITE = "site_03"
SETTINGS = [
    *TINY,
    "algorithm=ditto",
    "federation.rounds=3",
    "evaluation.metrics=[dice]",
    "federation.dropout=0.2",
    "federation.checkpoint_every=2",
]
LATE = ["data.n_sites=3", "federation.arrives={site_03: 2}", "data.arrives={site_03: {3: 0.5}, site_01: {2: 0.4}}"]
NEVER = ["data.n_sites=2", "data.arrives={site_01: {2: 0.4}}"]


def said(*arguments: str) -> tuple[int, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = forget.main(arguments)
    return code, out.getvalue() + err.getvalue()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose third site came in round 2, and that run without it; to be read only."""
    folder = tmp_path_factory.mktemp("forget")
    finish(folder / "run", *SETTINGS, *LATE)
    code, told = said(str(folder / "run"), SITE, f"output={folder / 'new'}")
    assert code == 0, told
    assert "from the state after round 1" in told
    assert "nothing is in the name of site_03" in told
    return folder


@pytest.mark.slow
def test_what_is_trained_again_is_a_run_on_data_that_never_had_the_site(world: Path, tmp_path: Path) -> None:
    finish(tmp_path / "never", *SETTINGS, *NEVER)
    code, told = said(str(world / "new"), SITE, f"never={tmp_path / 'never'}")
    assert (code, "equal, bit for bit" in told) == (0, True), told
    ends = [Checkpoint(run / "checkpoints").best() for run in (world / "new", tmp_path / "never")]
    assert ends[0] == ends[1]
    with contextlib.redirect_stdout(io.StringIO()):
        assert [verify.main([str(world / run)]) for run in ("run", "new")] == [0, 0]
    assert said(str(world / "run"), SITE, f"never={tmp_path / 'never'}")[0] == 1


@pytest.mark.slow
def test_every_trace_and_every_difference_is_named(world: Path, tmp_path: Path) -> None:
    left = "\n".join(traces(RunFolder(world / "run"), SITE))
    for place in ("audit.csv", "ledger.jsonl", "splits.csv", "summary.md", "terms.yaml", "config.yaml", "index.json"):
        assert place in left
    assert traces(RunFolder(world / "new"), "site_02")
    copy = RunFolder(tmp_path / "copy")
    shutil.copytree(world / "new", copy.path)
    assert not unlike(copy, RunFolder(world / "new"))
    (copy.path / "predictions" / SITE).mkdir(parents=True)
    text = (copy.path / "metrics.csv").read_text().splitlines()
    (copy.path / "metrics.csv").write_text("\n".join([*text[:-1], text[-1].replace("0", "1")]) + "\n")
    checkpoint = Checkpoint(copy.checkpoints)
    snapshot = checkpoint.load()
    assert snapshot is not None
    snapshot.server.tensors[f"head/{SITE}"] = snapshot.server["model"]
    checkpoint.save(3, snapshot.server, snapshot.kept, {})
    differing = unlike(copy, RunFolder(world / "new"))
    assert "checkpoints: another last state of the server" in differing
    assert "metrics.csv: other rows" in differing
    assert not [told for told in differing if "last state of site" in told]
    found = "\n".join(traces(copy, SITE))
    assert "predictions/site_03: its name" in found
    assert f"server-00003.safetensors: head/{SITE}/" in found


@pytest.mark.slow
def test_a_state_of_which_the_ledger_does_not_tell_is_not_gone_on_with(world: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(world / "run", copy)
    entries = [json.loads(line) for line in (copy / LEDGER).read_text().splitlines()]
    for entry in entries:
        if entry["what"] == "checkpoint" and entry["round"] == 1:
            entry["state"]["model"] = "0" * 64
    (copy / LEDGER).write_text("".join(canonical({**e, "hash": hashed(e)}) + "\n" for e in entries))
    code, told = said(str(copy), SITE, f"output={tmp_path / 'new'}")
    assert code == 2
    assert "does not tell of the state before 'site_03' came" in told
    assert said(str(copy), "site_9", f"output={tmp_path / 'x'}")[1].startswith(f"error: {copy} has no site 'site_9'")


def config_of(*settings: str) -> Any:
    return compose([*SETTINGS, *LATE, *settings], SCHEMA)


def test_settings_are_as_if_there_were_no_such_site() -> None:
    more = ["data.unlabelled=[site_03]", "data.absent={site_03: [cup], site_02: [cup]}", "federation.time_limit=mean"]
    config = without_site(
        config_of(*more, "federation.step_seconds={site_03: 4, site_01: 2}", "networks.site_03=model=unet"), SITE
    )
    plain: Any = OmegaConf.to_container(config)
    assert plain["data"].pop("left_out") == [SITE]
    assert SITE not in json.dumps(plain)
    assert plain["data"]["absent"] == {"site_02": ["cup"]}
    assert plain["data"]["arrives"] == {"site_01": {2: 0.4}}
    assert plain["federation"]["step_seconds"] == {"site_01": 2.0}
    assert not config.federation.arrives
    gone = without_site(departing(config_of(), {"data.n_sites": 2}), SITE)  # its data are deleted
    assert gone.data.left_out == []


def test_what_is_not_trained_again_here_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="engine=flower and protocol=personalised is not trained again here"):
        without_site(config_of("engine=flower"), SITE)
    earlier = RunFolder(tmp_path)
    row = {"site": SITE, "case": "a", "patient": "a", "split": "train", "labelled": True, "seen": True}
    earlier.write_splits([row])
    with pytest.raises(ConfigError, match=r"pretrained=.* has learnt from 'site_03'; forget it there first"):
        without_site(config_of(f"pretrained={tmp_path}"), SITE)
    assert [said(*told)[0] for told in ((), ("run",), ("run", SITE), ("run", SITE, "output=a", "never=b"))] == [2] * 4
    code, told = said("run", SITE, "output=new", "federation.rounds=9")
    assert (code, "federation.rounds belongs to the run" in told) == (2, True)


@pytest.mark.parametrize(
    ("settings", "kept", "expected"),
    [
        ({"arrives": {SITE: 5}}, [4], 4),
        ({"arrives": {SITE: 5}}, [], 0),
        ({"arrives": {SITE: 5, "site_01": 3}}, [2, 4], 4),
        ({"arrives": {SITE: 5}, "leaves": {SITE: 3}}, [4], 0),
        ({"leaves": {SITE: 3}}, [], 0),
    ],
)
def test_it_goes_on_from_before_the_first_round_of_the_site(
    settings: Mapping[str, Any], kept: list[int], expected: int, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path)
    index = {BRANCHES: [{"round": round} for round in kept]}
    config = OmegaConf.create({"federation": {"arrives": None, "leaves": None, **settings}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "branches", lambda _: [branch["round"] for branch in index[BRANCHES]])
        assert branch(run, config, SITE) == expected


def test_branches_that_cannot_be_are_refused(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(json.dumps({"round": 0, "server": "", "kept": {}, "best": {}, BRANCHES: {}}))
    with pytest.raises(CheckpointError, match="no list of indices"):
        Checkpoint(tmp_path)


def test_a_folder_without_a_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(ReportingError, match="holds no run"):
        forget.forget(RunFolder(tmp_path), SITE, RunFolder(tmp_path / "new"))
