"""SuperLink, SuperNodes and apps as real processes, killed for real; each fault has the outcome of docs/reliability.md.

One federation serves all tests of this file, in their order, since starting one takes time.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import train
from fedseg.federation.checkpoint import Checkpoint
from fedseg.federation.contract import QueryTask
from fedseg.federation.flower.kept import Kept
from fedseg.federation.state import State
from fedseg.reporting.folder import RunFolder
from scripts import deployment_on_loopback
from scripts.loopback import Loopback
from tests.tiers import every
from tests.tiny_run import TINY
from tests.world import assert_same

pytestmark = [pytest.mark.slow, pytest.mark.waits(60), pytest.mark.timeout(900)]

ROOT = Path(__file__).parent.parent
SITES = ("site_01", "site_02", "site_03")
SETTINGS = (
    *TINY,
    "data.n_sites=3",
    "federation.evaluate_every=10",
    "evaluation.metrics=[dice]",
)
ALL = "deployment.sites=[site_01,site_02,site_03]"


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed; the guide's gates need it")
@pytest.mark.exhaustive
def test_the_guide_ends_with_the_table_of_the_run_in_one_process(tmp_path: Path) -> None:
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        code = deployment_on_loopback.main([str(tmp_path / "guide"), "federation.evaluate_every=2"])
    assert code == 0, told.getvalue()
    tables = [table.splitlines()[:7] for table in told.getvalue().split("test dice")[1:]]
    assert len(tables) == 4  # of the run across machines and of that in one process: by site, and by region
    assert tables[:2] == tables[2:]


@dataclass
class Lab:
    """The federation, with a site that can be told to lie, and one whose disk is small."""

    loopback: Loopback
    folder: Path

    @property
    def lie(self) -> Path:
        return self.folder / "lie"

    def start(self, site: str) -> None:
        liar = {"PYTHONPATH": str(ROOT / "tests" / "liar"), "LIE": str(self.lie)} if site == "site_02" else {}
        self.loopback.start_node(site, environment=liar)

    def join(self, site: str) -> None:
        self.loopback.register(site)
        self.start(site)

    def run(self, *settings: str) -> str:
        return self.loopback.run(*SETTINGS, *settings)

    def kept(self, run: RunFolder, site: str) -> State:
        name = (run.path / "run-id.txt").read_text().strip()
        return Kept(self.folder / site / "state" / name / "kept").before(QueryTask("publish", 99999, 0))


@pytest.fixture(scope="module")
def two_sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    with Loopback(folder) as loopback:
        loopback.certificates()
        loopback.start_link()
        lab = Lab(loopback, folder)
        for site in SITES[:2]:
            lab.join(site)
        yield lab


@pytest.fixture(scope="module")
def lab(two_sites: Lab) -> Lab:
    two_sites.join(SITES[2])
    return two_sites


@pytest.fixture
def small_disk(lab: Lab) -> Iterator[Path]:
    """The state of site_03 lies on a disk of its own, too small for what Ditto keeps."""
    state = lab.folder / "site_03" / "state"
    state.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(state)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs the administrator's rights")
    yield state
    lab.loopback.stop("site_03")
    subprocess.run(["umount", "--lazy", str(state)], check=True)
    lab.start("site_03")


def wait_for(sign: Callable[[], bool], loopback: Loopback, run: str, seconds: float = 400.0) -> None:
    """Until the sign; the run must be going on all the while."""
    deadline = time.monotonic() + seconds
    while not sign():
        assert loopback.processes[run].poll() is None, loopback.log(run)[-5000:]
        assert time.monotonic() < deadline, loopback.log(run)[-5000:]
        time.sleep(0.05)


def trained(run: RunFolder, round: int) -> Callable[[], bool]:
    """Whether the run has come to the end of that round."""
    return lambda: (run.path / "rounds.csv").exists() and bool(run.rounds()["round"].max() >= round)


def has_a_task(lab: Lab, site: str, run: str) -> bool:
    """Whether a site has begun to train in this run; messages of a run before it may still lie around."""
    number = re.search(r"started run (\d+)", lab.loopback.log(run))
    if number is None:
        return False
    told = rf"\[RUN {number[1]}, ROUND \d+\]\s+.*Receiving: train message"
    return re.search(told, re.sub(r"\x1b\[[0-9;]*m", "", lab.loopback.log(site))) is not None


def in_one_process(folder: Path, *settings: str) -> RunFolder:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        assert train.main([*SETTINGS, *settings, f"output={folder}"]) == 0, err.getvalue()
    return RunFolder(folder)


def assert_same_run(lab: Lab, across: RunFolder, here: RunFolder, sites: Sequence[str] = SITES) -> None:
    assert (across.path / "summary.md").read_text() == (here.path / "summary.md").read_text()
    one, two = (Checkpoint(run.checkpoints).load() for run in (across, here))
    assert one is not None
    assert two is not None
    assert_same(one.server, two.server)
    for site in sites:
        assert_same(lab.kept(across, site), two.kept[site])


@pytest.mark.exhaustive
def test_lies_silence_and_a_full_disk_leave_the_round_to_the_others(lab: Lab, small_disk: Path) -> None:
    run = RunFolder(lab.folder / "faults")
    settings = [*SETTINGS, "algorithm=ditto", "federation.rounds=4", "deployment.timeout=45", ALL]
    lab.lie.write_text("garbage")
    name = lab.loopback.submit(*settings, f"output={run.path}")
    for round, lie in ((1, "not finite"), (2, "silence")):
        wait_for(trained(run, round), lab.loopback, name)
        lab.lie.write_text(lie)
    wait_for(trained(run, 3), lab.loopback, name)
    lab.lie.unlink()
    lab.loopback.stop("site_02")  # a site that does not answer is restarted by its people
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    lab.start("site_02")
    told = lab.loopback.finish(name)
    events = {(row.round, row.site): row.detail for row in run.events().itertuples()}
    assert "its answer cannot be used: the answer cannot be read" in events[1, "site_02"]
    assert "tensors are not finite" in events[2, "site_02"]
    assert "it did not answer within 45 s" in events[3, "site_02"]
    for round in (1, 2, 3):
        assert "its disk is full" in events[round, "site_03"]
    present = run.rounds().groupby("round")["site"].agg(set)
    assert list(present.loc[:3]) == [{"site_01"}, {"site_01"}, {"site_01"}]
    assert {"site_01", "site_03"} <= present[4]
    assert "test dice" in told


@pytest.mark.exhaustive
@pytest.mark.waits(300)
def test_the_server_and_a_site_are_killed_and_the_run_ends_as_if_nothing_had_happened(lab: Lab) -> None:
    settings = ["algorithm=ditto", "federation.rounds=3", "federation.min_sites=3", "federation.evaluate_every=1"]
    here = in_one_process(lab.folder / "here", *settings)
    run = RunFolder(lab.folder / "killed")
    submitted = [*SETTINGS, *settings, "deployment.timeout=120", ALL, f"output={run.path}"]

    name = lab.loopback.submit(*submitted)
    wait_for(lambda: Checkpoint(run.checkpoints).round > 0, lab.loopback, name)
    lab.loopback.kill("link")  # SuperLink and ServerApp, after round 1
    lab.loopback.kill(name)
    assert 1 <= Checkpoint(run.checkpoints).round < 3
    lab.loopback.start_link()

    # with all three sites needed, the run ends when one is killed in mid-round, and says so
    done = Checkpoint(run.checkpoints).round
    again = lab.loopback.submit(f"output={run.path}", "resume=true")
    wait_for(lambda: has_a_task(lab, "site_01", again), lab.loopback, again)
    lab.loopback.kill("site_01")
    try:
        told = lab.loopback.finish(again)
    finally:
        lab.start("site_01")  # tests that follow need it
    assert f"error: round {done + 1}: 2 usable updates, federation.min_sites=3 needed (site_01: " in told, told[-5000:]
    assert Checkpoint(run.checkpoints).round == done

    told = lab.loopback.run(f"output={run.path}", "resume=true")
    assert "test dice" in told, told[-5000:]
    assert_same_run(lab, run, here)
    # what stays at a site's worker did not travel again, and the process that started anew was not guessed at
    trained_from = run.sent().query("task == 'train'").groupby("round")["held"].agg(list)
    assert trained_from[done + 1] == [0, 0, 0]
    assert all(min(held) > 0 for held in trained_from.loc[done + 2 :])


@pytest.mark.parametrize(("count", "rounds"), every([(2, 1), (3, 2)], [2], at=0))
def test_a_method_that_shows_sites_to_each_other_runs_across_machines(
    count: int, rounds: int, two_sites: Lab, request: pytest.FixtureRequest
) -> None:
    lab: Lab = two_sites if count == 2 else request.getfixturevalue("lab")
    sites = SITES[:count]
    settings = ["algorithm=lcfed", f"federation.rounds={rounds}", f"data.n_sites={count}"]
    here = in_one_process(lab.folder / f"lcfed-here-{count}", *settings)
    run = RunFolder(lab.folder / f"lcfed-{count}")
    told = lab.run(*settings, f"deployment.sites=[{','.join(sites)}]", f"output={run.path}")
    assert "test dice" in told, told[-5000:]
    assert_same_run(lab, run, here, sites)
    patients = set(here.splits()["patient"])
    told_at_the_server = [*run.path.rglob("*"), *lab.folder.glob("run-*.log"), lab.folder / "link.log"]
    for path in told_at_the_server:
        if path.is_file() and path.suffix in (".csv", ".md", ".json", ".yaml", ".txt", ".log"):
            text = path.read_text(errors="replace")
            assert not any(patient in text for patient in patients), path
            assert path.suffix != ".log" or not any(f"{lab.folder / site}/" in text for site in sites), path
    for site in sites:  # a site's logs tell of no other site's folders
        logs = [lab.folder / f"{site}.log", *(lab.folder / site).rglob("*.log")]
        for path in logs:
            others = [f"{lab.folder / other}/" for other in sites if other != site]
            assert not any(other in path.read_text(errors="replace") for other in others), path


@pytest.mark.exhaustive
def test_a_run_whose_updates_nobody_reads_ends_as_in_one_process(lab: Lab) -> None:
    settings = ["algorithm=fedbn", "federation.rounds=2", "privacy.aggregation=masked"]
    here = in_one_process(lab.folder / "masked-here", *settings)
    run = RunFolder(lab.folder / "masked")
    told = lab.run(*settings, ALL, f"output={run.path}")
    assert "test dice" in told, told[-5000:]
    assert_same_run(lab, run, here)
    left = run.audit()
    assert set(left.loc[left["task"] == "train", "group"]) == {"sum:masked", "(numbers)", "(form)"}
