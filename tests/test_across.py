"""Whole runs across sites, from settings to tables, over Flower's messages without processes of their own."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import train
from fedseg.configs.compose import ConfigError, as_yaml, compose
from fedseg.datamodules.errors import DataError
from fedseg.federation.contract import EvaluateTask
from fedseg.federation.engine import RoundError
from fedseg.federation.flower.client import SiteClient
from fedseg.federation.flower.envelope import Envelope
from fedseg.federation.flower.records import Facts, Question
from fedseg.federation.flower.worker import WorkerError, ask
from fedseg.launch import flower_server
from fedseg.launch.experiment import Experiment
from fedseg.launch.settings import SCHEMA
from fedseg.launch.sites.across import check_sites, check_transforms, other_versions
from fedseg.launch.sites.site import LaunchedSite, Local, Opener
from fedseg.reporting.compare.analysis import Analysis
from fedseg.reporting.compare.gather import gather
from fedseg.reporting.compare.options import Options
from fedseg.reporting.compare.runs import LeftOut, read_run
from fedseg.reporting.environment import library_versions
from fedseg.reporting.folder import COLUMNS, METRICS, RunFolder
from tests.data_files import picture, save, square
from tests.flower_world import LoopbackGrid, app_of
from tests.tiers import every
from tests.tiny_run import TINY

ROOT = Path(__file__).parent.parent
SMALL = [
    *TINY,
    "data.n_sites=3",
    "federation.rounds=2",
    "evaluation.metrics=[dice,hd95]",
]
SITES = ("site_01", "site_02", "site_03")
PSEUDONYMS = "deployment.case_scores=pseudonyms"


def grid_of(folder: Path, sites: Sequence[str] = SITES, **local: Any) -> Any:
    clients = {}
    for number, site in enumerate(sites):
        own = Local(site, folder / site, **local)
        clients[number + 1] = app_of(SiteClient(site, own.state, Opener(own)).answer)
    return LoopbackGrid(clients)


def across(folder: Path, *settings: str, grid: Any = None) -> RunFolder:
    flower_server.run(grid or grid_of(folder / "sites"), [*SMALL, *settings, f"output={folder / 'across'}"])
    return RunFolder(folder / "across")


def here(folder: Path, *settings: str) -> RunFolder:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        assert train.main([*SMALL, *settings, f"output={folder / 'here'}"]) == 0, err.getvalue()
    return RunFolder(folder / "here")


def assert_same_tables(one: RunFolder, two: RunFolder) -> None:
    assert (one.path / "summary.md").read_text() == (two.path / "summary.md").read_text()
    keys = ["round", "checkpoint", "split", "view", "site", "seen", "metric", "region"]
    means, reference = (pd.read_csv(run.path / "summary.csv").set_index(keys)["mean"] for run in (one, two))
    pd.testing.assert_series_equal(means.sort_index(), reference.sort_index(), check_exact=True)


def texts(folder: Path) -> str:
    return "\n".join(p.read_text() for p in folder.rglob("*") if p.suffix in (".csv", ".md", ".json", ".txt", ".yaml"))


@pytest.mark.exhaustive
@pytest.mark.parametrize(("settings", "views"), [
    (["algorithm=iopfl"], {"global", "adapted", "own-statistics"}),
    (["algorithm=silobn", "evaluation.statistics_per=case", "evaluation.entropy_passes=1"],
     {"own-statistics", "entropy"}),
])  # fmt: skip
def test_an_unseen_site_makes_its_models_of_what_is_shared_and_the_table_is_the_same(
    settings: list[str], views: set[str], tmp_path: Path
) -> None:
    settings = [*settings, "data.unseen=[site_02]"]
    run = across(tmp_path, *settings)
    assert_same_tables(run, here(tmp_path, *settings))
    rows = run.scores()
    assert set(rows.loc[~rows["seen"], "view"]) == views
    assert set(rows["case"]) == {""}


@pytest.mark.slow
def test_each_site_splits_and_scores_as_if_all_data_were_in_one_place(tmp_path: Path) -> None:
    """Own folders with names, and pseudonyms at the server that only the site can resolve."""
    settings = ["algorithm=fedbn", "data.labelled_patients=3", PSEUDONYMS, "privacy.noise=4"]
    run, reference = across(tmp_path, *settings), here(tmp_path, *settings)
    assert_same_tables(run, reference)
    for told in (run.events(), reference.events()):
        said = told.query("event == 'no effect'")["detail"].to_list()
        assert said == ["privacy.noise=4.0 with privacy.mechanism=none"]
    name = (run.path / "run-id.txt").read_text().strip()
    own = [RunFolder(tmp_path / "sites" / site / name) for site in SITES]
    pd.testing.assert_frame_equal(pd.concat([o.splits() for o in own], ignore_index=True), reference.splits())
    order = ["round", "checkpoint", "site", "split", "view", "region", "case", "metric"]
    scores = pd.concat([o.scores() for o in own]).query("checkpoint != 'best'").sort_values(order, ignore_index=True)
    wanted = reference.scores().query("checkpoint != 'best'").sort_values(order, ignore_index=True)
    pd.testing.assert_frame_equal(scores, wanted, check_exact=True)
    cases = set(run.scores()["case"])
    assert len(cases) == len(reference.scores().groupby(["site", "case"]))
    assert not any("case_" in case for case in cases)
    compared = read_run(run.path, "dice")
    assert not isinstance(compared, LeftOut)
    assert compared.unknown == set(SITES)
    assert "case_00" not in texts(run.path)


def test_the_order_of_pseudonyms_does_not_tell_that_of_names(tmp_path: Path) -> None:
    """A list of the hospital's cases, in order, would otherwise say who is who."""
    config = as_yaml(compose([*SMALL, "algorithm=fedavg", "data.cases_per_site=30", PSEUDONYMS], SCHEMA))
    opened: Any = Opener(Local("site_01", tmp_path))(Question("turn", "0" * 32, config), tmp_path / "run")
    cases = [row["case"] for row in opened.experiment.data.splits()]
    common = {**dict.fromkeys(COLUMNS[METRICS], ""), "round": 1, "seen": True, "value": 0.5}
    rows = [{**common, "case": case, "metric": metric} for case in cases for metric in ("dice", "iou")]
    told = opened.told(EvaluateTask(1, 0), rows)
    assert [(row["case"], row["metric"]) for row in told] == sorted((row["case"], row["metric"]) for row in told)
    assert sorted({row["case"] for row in told}) == sorted(map(opened.pseudonym, cases))
    assert opened.folder.scores()["case"].to_list() == [row["case"] for row in rows], "at the site as they came"


@pytest.mark.slow
def test_a_site_is_opened_once_for_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    original = LaunchedSite.__init__

    def counted(self: LaunchedSite, local: Local, *more: Any) -> None:
        opened.append(local.site)
        original(self, local, *more)

    monkeypatch.setattr(LaunchedSite, "__init__", counted)
    across(tmp_path, "algorithm=fedbn")
    assert sorted(opened) == sorted(SITES)


@pytest.mark.slow
def test_pseudonyms_tell_which_cases_are_of_one_patient_and_such_runs_are_compared(tmp_path: Path) -> None:
    for site in SITES:
        for number in range(12):
            name = f"P{number // 2}_{number % 2}.png"
            save(tmp_path / "data" / site / "images" / name, picture(number + len(site)))
            save(tmp_path / "data" / site / "masks" / name, square())
    data = [
        "data=folder",
        "data.root=there",
        "data.size=32",
        "data.patient_pattern=^(P[0-9])_",
        "data.split=[0.34,0.33,0.33]",
    ]
    own = [setting for setting in SMALL if not setting.startswith("data.")]
    grid = grid_of(tmp_path / "sites", data_root=str(tmp_path / "data"))
    found = []
    for algorithm in ("fedavg", "ditto"):
        output = tmp_path / algorithm
        wanted = [f"algorithm={algorithm}", PSEUDONYMS, f"output={output}"]
        flower_server.run(grid, [*own, *data, *wanted])
        assert not re.search(r"\bP\d", texts(output))
        found.append(read_run(output, "dice"))
    assert not [one for one in found if isinstance(one, LeftOut)]
    analysis = Analysis(gather(found), Options(draws=100))
    assert not analysis.gathered.unknown
    assert set(analysis.overview.query("site != 'mean over sites'")["patients"]) == {2}
    assert set(analysis.overview.query("site != 'mean over sites'")["cases"]) == {4}


@pytest.mark.slow
def test_across_machines_sites_come_and_go_as_in_one_place(tmp_path: Path) -> None:
    settings = ["algorithm=feddg", "federation.rounds=3", "federation.arrives={site_03: 2}"]
    settings.append("federation.leaves={site_01: 3}")
    run, reference = across(tmp_path, *settings), here(tmp_path, *settings)
    assert_same_tables(run, reference)
    scores = reference.scores()
    shown = scores[scores["checkpoint"] == "round"].groupby("round")["site"].agg(lambda sites: sorted(set(sites)))
    assert shown.to_dict() == {
        1: ["site_01", "site_02"],
        2: ["site_01", "site_02", "site_03"],
        3: ["site_02", "site_03"],
    }
    assert set(scores.loc[scores["checkpoint"] != "round", "site"]) == {"site_02", "site_03"}


@pytest.mark.slow
@pytest.mark.exhaustive
def test_leave_one_site_out_and_stages_run_across_sites(tmp_path: Path) -> None:
    out = ["protocol=leave_one_site_out", "algorithm=fedavg", "federation.rounds=1"]
    assert_same_tables(across(tmp_path / "folds", *out), here(tmp_path / "folds", *out))
    stages = ["stages=['algorithm=contrastive algorithm.pairing=instance federation.rounds=1','algorithm=lgfedavg']"]
    run = across(tmp_path / "stages", *stages)
    assert_same_tables(RunFolder(run.path / "2"), RunFolder(here(tmp_path / "stages", *stages).path / "2"))


@pytest.mark.slow
def test_what_an_encoder_learnt_from_does_not_score_the_next_run(tmp_path: Path) -> None:
    grid = grid_of(tmp_path / "sites")
    first = across(tmp_path, "algorithm=contrastive", "algorithm.pairing=instance", "federation.rounds=1", grid=grid)
    with pytest.raises(RoundError, match="learnt from images that validate or test here"):
        across(tmp_path / "second", "algorithm=fedavg", f"pretrained={first.path}", "data.split_seed=5", grid=grid)


@pytest.mark.parametrize(("engine", "refused"), [("flower", False), ("flower-simulation", True)])
def test_masks_need_one_process_for_each_site(engine: str, refused: bool) -> None:
    experiment = Experiment(compose([*SMALL, "algorithm=fedavg", "privacy.aggregation=masked"], SCHEMA))
    if not refused:
        check_transforms(experiment, engine)
        return
    with pytest.raises(ConfigError, match="masked needs one process for each site"):
        check_transforms(experiment, engine)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["algorithm=pooled"], "algorithm=pooled needs all data in one place"),
        (["algorithm=braintorrent"], "see and keep every site's model; take engine=in-process, or algorithm=softpull"),
        (["federation.time_limit=mean", "federation.step_seconds={site_09: 2}"], "step_seconds names 'site_09'"),
        (["federation.order=random"], "second turn in a round.* or federation.order=cyclic"),
        (["data.unseen=[site_09]"], "data.unseen: no site 'site_09' is connected"),
        (["data.unseen=[site_01,site_02,site_03]"], "data.unseen holds every site out"),
        (["data.unlabelled=[site_01,site_02,site_03]"], "there is nothing to learn"),
        (["federation.min_sites=4", "deployment.patience=0"], "4 are needed"),
        (["deployment.sites=[site_01,site_09]", "deployment.patience=0"], "not site_09"),
        (["deployment.timeout=0"], "deployment.timeout=0"),
        (["privacy.mechanism=site"], "protects nobody across machines: .* take privacy.randomness=secret"),
        (["algorithm=fedavg", "privacy.mechanism=patient", "model.norm=group"], "take privacy.randomness=secret"),
        (["privacy.mechanism=sparse", "privacy.aggregation=plain"], "take privacy.randomness=secret"),
        (["privacy.aggregation=encrypted"], "encrypted needs all sites in one process"),
        (["privacy.aggregation=masked", "algorithm=feddg"], "before round 1 .introduces."),
        (["privacy.aggregation=masked", "data.unseen=[site_02]"], "masked needs 3 sites in a round, 2 take part"),
    ],
)
def test_what_cannot_run_across_sites_says_why_at_once(settings: list[str], told: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, RoundError), match=told.replace("[", r"\[")):
        across(tmp_path, *settings)
    assert not (tmp_path / "across" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("knob", "said"),
    [
        ("unseen", "[{}]"),
        ("arrives", "{{{}: {{2: 0.5}}}}"),
        ("unlabelled", "[{}]"),
        ("absent", "{{{}: [lesion]}}"),
        ("unannotated", "{{{}: [lesion]}}"),
        ("lacks", "{{{}: [dwi]}}"),
        ("per_site", "{{{}: {{axis: 1}}}}"),
    ],
)
def test_a_site_that_a_setting_names_must_be_connected(knob: str, said: str) -> None:
    sites = {name: Facts(name, True, 2, 9) for name in SITES}
    organ = [*SMALL, "algorithm=fedavg", "data.anatomy=organ", "data.modalities=[t2,dwi]"]
    odd, experiment = (
        Experiment(compose([*organ, f"data.{knob}={said.format(name)}"], SCHEMA), channels=2)
        for name in ("site_09", "site_02")
    )
    with pytest.raises(ConfigError, match=rf"data\.{knob}: no site 'site_09' is connected; there are site_01, site_02"):
        check_sites(odd, sites)
    check_sites(experiment, sites)
    assert [name for name, named in experiment.data.named_sites.items() if named] == [knob]
    assert len(experiment.data.named_sites) == 7


@pytest.mark.slow
def test_a_site_refuses_seeded_noise_whatever_the_server_lets_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("algorithm=fedavg", "privacy.mechanism=site", "federation.rounds=1")
    grid = grid_of(tmp_path / "sites")
    run = across(tmp_path / "secret", *settings, "privacy.randomness=secret", grid=grid)
    assert "protects nobody" not in (run.path / "summary.md").read_text()
    monkeypatch.setattr("fedseg.launch.sites.across.check_transforms", lambda *_: None)
    with pytest.raises(RoundError, match=r"privacy\.randomness=secret"):
        across(tmp_path / "seeded", *settings, grid=grid)


@pytest.mark.slow
def test_a_site_sees_for_itself_that_a_modality_lacks(tmp_path: Path) -> None:
    organ = ("data.anatomy=organ", "data.modalities=[t2,dwi]", "data.lacks={site_02: [dwi]}")
    with pytest.raises(RoundError, match=r"site 'site_02' lacks dwi, and algorithm=feddg would give"):
        across(tmp_path, *organ, "algorithm=feddg")


@pytest.mark.slow
def test_a_site_reads_its_scores_once_and_appends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, reads = LaunchedSite._read_filed, []

    def counted(site: LaunchedSite) -> Any:
        reads.append(site.local.site)
        return read(site)

    monkeypatch.setattr(LaunchedSite, "_read_filed", counted)
    run = across(tmp_path, "algorithm=fedavg", "federation.rounds=3", grid=grid_of(tmp_path / "sites"))
    assert set(reads) == set(SITES)
    assert len(reads) <= 2 * len(SITES), "the site is opened for the greeting and for the run, not for every round"
    name = (run.path / "run-id.txt").read_text().strip()
    own = RunFolder(tmp_path / "sites" / "site_01" / name).scores()
    assert {1, 2, 3} <= set(own["round"])
    assert not own.duplicated().any()


@pytest.mark.slow
def test_sites_must_agree_and_have_names_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(RoundError, match="'site_01' cannot take part: two connected nodes call themselves so"):
        across(tmp_path / "twice", grid=grid_of(tmp_path / "twice", ["site_01", "site_01"]))
    grid = grid_of(tmp_path / "odd", SITES[:2])
    other = Local("site_03", tmp_path / "odd" / "site_03")

    def another_size(config: Any) -> Any:
        return compose([*SMALL, "data.size=64"], SCHEMA)

    object.__setattr__(other, "applied", another_size)
    grid.apps[9] = app_of(SiteClient("site_03", other.state, Opener(other)).answer)
    with pytest.raises(
        ConfigError, match=r"sites must agree on size: 'site_01' has \(32, 32\), 'site_03' has \(64, 64\)"
    ):
        across(tmp_path / "odd", grid=grid)


@pytest.mark.slow
def test_data_that_changed_at_a_site_are_named_there_and_only_there(tmp_path: Path) -> None:
    grid = grid_of(tmp_path / "sites")
    run = across(tmp_path, "algorithm=fedavg", "federation.rounds=1", grid=grid)
    name = (run.path / "run-id.txt").read_text().strip()
    splits = tmp_path / "sites" / "site_02" / name / "splits.csv"
    splits.write_text(
        splits.read_text().replace("case_0001,case_0001,", "case_0001,case_0009,").replace("train", "val")
    )
    grid = grid_of(tmp_path / "sites")  # its workers start anew
    with pytest.raises(RoundError, match="site 'site_02' cannot take part: its data changed since this run began"):
        flower_server.run(grid, [f"output={run.path}", "resume=true", "federation.rounds=2"])
    del grid.apps[2]
    with pytest.raises(RoundError, match="not site_02"):  # named in no setting, but it was there when the run began
        flower_server.run(grid, [f"output={run.path}", "resume=true", "federation.rounds=2", "deployment.patience=0"])
    assert "cases, the first is ('site_02', 'case_" in (tmp_path / "sites" / "site_02" / "site.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("cache", every(["disk", "memory"], ["disk"]))
def test_a_worker_that_stays_and_its_cache_do_not_hide_that_a_file_changed(cache: str, tmp_path: Path) -> None:
    """Size and time of the file are what they were, and the server asks for what it asked for before."""
    for site in SITES[:2]:
        for number in range(8):
            save(tmp_path / "data" / site / "images" / f"{number}.png", picture(number + len(site)))
            save(tmp_path / "data" / site / "masks" / f"{number}.png", square())
    data = ["data=folder", "data.root=there", "data.size=32", "algorithm=fedavg", "federation.rounds=1"]
    own = [setting for setting in SMALL if not setting.startswith("data.")]
    root, settings = str(tmp_path / "data"), f"data.cache={cache}"
    grid = grid_of(tmp_path / "sites", SITES[:2], data_root=root, settings=settings)
    flower_server.run(grid, [*own, *data, f"output={tmp_path / 'run'}"])
    again = [f"output={tmp_path / 'run'}", "resume=true"]
    flower_server.run(grid, again)
    file = tmp_path / "data" / "site_02" / "images" / "0.png"
    before, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1  # behind the picture's end: decoders do not mind
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(RoundError, match="site 'site_02' cannot take part: its data changed since this run began"):
        flower_server.run(grid, again)


def test_one_site_alone_is_prepared_as_among_all(tmp_path: Path) -> None:
    def data(*settings: str) -> Any:
        return Experiment(compose([*SMALL, *settings], SCHEMA)).data

    whole, alone = data("data.unseen=[site_03]"), data("data.unseen=[site_03]")
    whole.setup()
    alone.restrict("site_02", 3)
    alone.setup()
    assert alone.sites == ("site_02",)
    assert alone.splits() == [row for row in whole.splits() if row["site"] == "site_02"]
    batches = [[b["image"] for b in d.site("site_02").train_batches(5, 3)] for d in (whole, alone)]
    assert all((one == two).all() for one, two in zip(*batches, strict=True))
    missing = data()
    missing.restrict("site_07")
    with pytest.raises(DataError, match="there is no site 'site_07' in these data"):
        missing.setup()


@pytest.mark.parametrize(
    ("node", "told"),
    [
        ({"site": "A"}, "'state' is needed"),
        ({"state": "s"}, "'site' is needed"),
        ({"site": "A", "state": "s", "sate": "x"}, "unknown key 'sate'"),
    ],
)
def test_a_node_config_that_cannot_be_used_says_why(node: Mapping[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Local.read(node)


def test_a_site_chooses_its_own_settings_and_no_others(tmp_path: Path) -> None:
    config = compose(["data=folder", "data.root=theirs", "data.manifest=theirs.csv"], SCHEMA)
    own = Local("A", tmp_path, "/data/mine", "trainer.threads=4 data.cache=memory").applied(config)
    assert (own.data.root, own.data.manifest, own.data.cache, own.trainer.threads) == ("/data/mine", None, "memory", 4)
    with pytest.raises(ConfigError, match=r"not 'training\.lr'"):
        Local("A", tmp_path, "", "training.lr=1").applied(config)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("trainer.threads=four", r"trainer\.threads=four should be int"),
        ("data.cache=ram", r"data\.cache=ram should be"),
        ("data.workers", "'data.workers' is not of the form key=value"),
        ("data.manifest=mine.csv", r"data\.manifest is a setting of data=folder, not of data=phantom"),
    ],
)
def test_a_sites_own_settings_are_checked_like_those_of_a_run(tmp_path: Path, settings: str, told: str) -> None:
    config = compose(["data=phantom"], SCHEMA)
    with pytest.raises(ConfigError, match=rf"node-config: settings='{settings}': .*{told}"):
        Local("A", tmp_path, "", settings).applied(config)


def test_a_site_with_other_libraries_than_the_server_is_named() -> None:
    here = library_versions()
    assert "+" not in here["torch"]
    same = Facts("A", True, 3, 9, versions=here)
    other = Facts("B", True, 3, 9, versions={**here, "torch": "1.0\x1b[2J", "numpy": ""})
    (row,) = other_versions({"A": same, "B": other}, 4)
    assert (row["round"], row["site"], row["event"]) == (4, "B", "versions")
    assert row["detail"].startswith(f"torch 1.0?[2J (server: {here['torch']})")
    assert "numpy" in row["detail"]
    assert "albumentations" not in row["detail"]


def test_the_guide_uses_the_options_that_its_script_uses() -> None:
    guide = [ROOT / "docs" / "deployment.md", *(ROOT / "docs" / "deployment").glob("*.service")]
    options = {option for page in guide for option in re.findall(r"--[a-z][a-z-]+", page.read_text())}
    options -= {"--user", "--now"}  # of systemd
    played = (ROOT / "scripts" / "loopback.py").read_text()
    assert {option for option in options if option not in played} == set()


# ---------------------------------------------------------------- the worker that stays

ECHO = """
import sys
from pathlib import Path
from fedseg.federation.flower.envelope import Envelope
from fedseg.federation.flower.worker import serve
parent, code, door = sys.argv[1:]
def answer(envelope):
    if envelope.text == "die":
        import os
        os._exit(9)
    return Envelope(f"{envelope.text} from {os_pid}", envelope.data)
import os
os_pid = os.getpid()
serve(Path(door), code, answer, int(parent))
"""


@pytest.mark.slow
def test_the_worker_stays_is_replaced_by_new_code_and_ends_with_its_parent(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:

        def call(text: str, code: str = "one", data: bytes = b"") -> Envelope:
            command = [sys.executable, "-c", ECHO, str(parent.pid), code]
            return ask(tmp_path, command, code, Envelope(text, data), ROOT)

        first = call("hello", data=b"\x00" * 10_000_000)
        assert first.data == b"\x00" * 10_000_000
        pid = int(first.text.split()[-1])
        assert call("again").text == f"again from {pid}"
        with pytest.raises(WorkerError, match="ended before it answered"):
            call("die")
        second = int(call("hello").text.split()[-1])
        third = int(call("hello", code="two").text.split()[-1])
        assert len({pid, second, third}) == 3
        assert (tmp_path / "worker.json").stat().st_mode & 0o777 == 0o600
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{third}").exists() and "Z" not in Path(f"/proc/{third}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "the worker outlived its parent"
        time.sleep(0.1)
    assert os.getpid() != third
