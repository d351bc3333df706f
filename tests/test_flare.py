"""NVFlare carries the messages that Flower carries: the same tensors and tables as in one process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import train
from fedseg.configs.compose import ConfigError
from fedseg.federation.checkpoint import Checkpoint
from fedseg.federation.contract import QueryTask
from fedseg.federation.engine import RoundError
from fedseg.federation.flower.envelope import Envelope
from fedseg.federation.flower.kept import Kept
from fedseg.federation.flower.records import Answer, unpack
from fedseg.reporting.folder import RunFolder
from tests.tiny_run import TINY
from tests.world import assert_same

pytest.importorskip("nvflare", reason="needs the extra 'nvflare'")

from fedseg.launch import flare

ROOT = Path(__file__).parent.parent
SITES = ("site_01", "site_02")
SETTINGS = [
    *TINY,
    "algorithm=ditto",
    "data.n_sites=2",
    "federation.rounds=2",
    "evaluation.metrics=[dice]",
    "deployment.sites=[site_01, site_02]",
]
ALLOWED = ["fedseg.launch.flare.Run", "nvflare.app_common.executors.client_api_executor.ClientAPIExecutor"]


@pytest.mark.waits(90)
@pytest.mark.slow
@pytest.mark.exhaustive
def test_nvflares_simulator_ends_as_the_run_in_one_process(tmp_path: Path) -> None:
    """Server and sites in processes of their own, NVFlare's between them; the log is shown where it fails."""
    run = RunFolder(tmp_path / "flare")
    flare.write_job(tmp_path / "job", [*SETTINGS, f"output={run.path}"])
    (tmp_path / "sites").mkdir()
    for name in SITES:
        (tmp_path / "sites" / f"{name}.yaml").write_text(f"state: {tmp_path / 'state' / name}\n")
    (tmp_path / "work" / "local").mkdir(parents=True)
    (tmp_path / "work" / "local" / "resources.json").write_text(
        json.dumps({"format_version": 2, "class_allow_list": ALLOWED})
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    simulator = [sys.executable, "-m", "nvflare.cli", "simulator", "-c", ",".join(SITES), "-t", "2"]
    done = subprocess.run(
        [*simulator, "-w", str(tmp_path / "work"), str(tmp_path / "job")],
        cwd=ROOT,
        env={**os.environ, flare.SITES: str(tmp_path / "sites"), "PATH": path, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    here = RunFolder(tmp_path / "here")
    with contextlib.redirect_stdout(io.StringIO()):
        assert train.main([*SETTINGS, f"output={here.path}"]) == 0
    one, two = (Checkpoint(folder.checkpoints).load() for folder in (here, run))
    assert one is not None
    assert two is not None
    assert_same(one.server, two.server)
    name = (run.path / "run-id.txt").read_text().strip()
    for site, kept in one.kept.items():
        assert_same(kept, Kept(tmp_path / "state" / site / name / "kept").before(QueryTask("publish", 2, 0)))
    assert (here.path / "summary.md").read_text() == (run.path / "summary.md").read_text()
    entries = [json.loads(line) for line in (run.path / "ledger.jsonl").read_text().splitlines()]
    signed = [entry["sites"] for entry in entries if "sites" in entry]
    assert all(set(sites) == {*SITES} and all(own["signature"] for own in sites.values()) for sites in signed)
    assert len(signed) > 2


@pytest.mark.parametrize("data", [b"", bytes(range(256))])
def test_a_message_comes_back_as_it_was(data: bytes) -> None:
    assert flare.from_model(flare.to_model(Envelope("what is asked", data), 3)) == Envelope("what is asked", data)


@pytest.mark.parametrize(
    "params",
    [None, {"text": "t"}, {"text": "t", "data": np.zeros(2)}, {"text": 1, "data": np.zeros(2, np.uint8)}],
)
def test_what_a_filter_changed_is_refused_by_the_site_and_by_the_server(
    params: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = flare.to_model(Envelope("t"))
    model.params = params
    (tmp_path / "north.yaml").write_text(f"state: {tmp_path}")
    monkeypatch.setenv(flare.SITES, str(tmp_path))
    answer, _ = unpack(flare.from_model(flare.answers_of("north")(model)), Answer)
    assert "does a filter of NVFlare's change it?" in answer.refusal
    reply = reply_to(model)
    with pytest.raises(ValueError, match="should hold"):
        Envelope.from_records(reply.content)


def reply_to(*taken: Any) -> Any:
    """What the transport gets where NVFlare tells that of a client, one after the other."""

    def send(name: str, model: Any, timeout: int, take: Any) -> None:
        assert (name, timeout) == ("north", 5)
        for found in taken:
            take(found)

    mail = flare.Mail(lambda: ["south", "north"], send, lambda: False)
    assert mail.get_node_ids() == [1, 2]
    question: Any = flare.Message(Envelope("t").to_records(), 1, "query", group_id="0", ttl=5.5)
    (number,) = mail.push_messages([question])
    (reply,) = mail.pull_messages([number])
    assert reply.metadata.reply_to_message_id == number
    assert mail.pull_messages([number]) == []
    return reply


def test_a_client_that_fails_is_told_at_once_and_the_end_of_its_task_changes_no_answer() -> None:
    """NVFlare ends each task, also one that was answered."""
    assert reply_to(None, None).error.code == flare.ErrorCode.CLIENT_APP_CRASHED
    answered = reply_to(flare.to_model(Envelope("an answer")), None)
    assert Envelope.from_records(answered.content) == Envelope("an answer")


def test_a_run_whose_job_is_aborted_ends() -> None:
    with pytest.raises(RoundError, match="resume=true"):
        flare.Mail(list, lambda *_: None, lambda: True).pull_messages([])


def test_a_client_keeps_its_number_whoever_comes_and_goes() -> None:
    here = ["south", "north"]
    mail = flare.Mail(lambda: here, lambda *_: None, lambda: False)
    assert mail.get_node_ids() == [1, 2]
    here[:] = ["east", "south"]
    assert mail.get_node_ids() == [3, 2]


def test_a_site_ends_with_the_process_that_started_it() -> None:
    """A pipe tells it: it is closed once nobody holds its end."""
    read, write = os.pipe()
    if not os.fork():
        between = os.getpid()
        if os.fork():
            os._exit(0)
        os.close(read)
        flare.end_with(between, look=0.01)
        time.sleep(60)
        os._exit(0)
    os.close(write)
    os.wait()
    with os.fdopen(read) as pipe:
        ready, _, _ = select.select([pipe], [], [], 20)
    assert ready


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "cannot be read"),
        ("data-root: /data", "'state' is needed"),
        ("- state", "holds no settings"),
        ("state: s\nroot: /data", "unknown key 'root'"),
    ],
)
def test_a_site_whose_own_settings_cannot_be_used_refuses_and_tells_its_log_why(
    text: str | None, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if text is not None:
        (tmp_path / "north.yaml").write_text(text)
    monkeypatch.setenv(flare.SITES, str(tmp_path))
    answer, _ = unpack(flare.from_model(flare.answers_of("north")(flare.to_model(Envelope("hello")))), Answer)
    assert "its own settings (FEDSEG_SITES) cannot be used" in answer.refusal
    assert str(tmp_path) not in answer.refusal
    assert told in caplog.text


def test_without_the_variable_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(flare.SITES, raising=False)
    with pytest.raises(ConfigError, match=r"FEDSEG_SITES is not set .*north\.yaml"):
        flare.local_of("north")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["output=runs/x"], "name the run's with output=/ABSOLUTE/PATH"),
        ([], "name the run's with output=/ABSOLUTE/PATH"),
        (["algorithm=braintorrent", "output=/x"], "has no server"),
        (["algorithm=pooled", "output=/x"], "needs all data in one place"),
        (["federation.round=2", "output=/x"], "federation.rounds"),
    ],
)
def test_a_job_that_cannot_run_is_not_written(settings: list[str], told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        flare.write_job(tmp_path / "job", [*TINY, *settings])
    assert not (tmp_path / "job").exists()


def test_a_job_names_what_is_installed_and_carries_no_code(tmp_path: Path) -> None:
    flare.write_job(tmp_path / "job", [*TINY, "federation.min_sites=2", "output=/srv/run"])
    files = {path.relative_to(tmp_path / "job").as_posix() for path in (tmp_path / "job").rglob("*.*")}
    assert files == {"meta.json", "app/config/config_fed_server.json", "app/config/config_fed_client.json"}
    assert json.loads((tmp_path / "job" / "meta.json").read_text())["min_clients"] == 2
    with pytest.raises(ConfigError, match="exists already"):
        flare.write_job(tmp_path / "job", [*TINY, "output=/srv/run"])
