"""The front door: a run from its command line to its folder, and back to its scores."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import compare
import evaluate
import train
from fedseg.common.ending import ending
from fedseg.configs.compose import compose, load
from fedseg.evaluation import FULL
from fedseg.federation.checkpoint import Checkpoint
from fedseg.launch.scores.rescore import difference
from fedseg.launch.settings import SCHEMA
from fedseg.reporting.folder import COLUMNS, RunFolder

ROOT = Path(__file__).parent.parent
SMALL = [
    "data.n_sites=2",
    "data.cases_per_site=8",
    "data.amount=0",
    "data.size=32",
    "data.resolution=32",
    "data.batch_size=2",
    "federation.rounds=1",
    "federation.local_steps=1",
    "trainer.threads=1",
    "trainer.accelerator=cpu",
]
PLAIN = [*SMALL, "evaluation.overlays=false", "evaluation.metrics=[dice]"]


@dataclass
class Finished:
    code: int
    out: str
    err: str
    folder: RunFolder


def command(main: object, *arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)  # type: ignore[operator]
    return code, out.getvalue(), err.getvalue()


def run(folder: Path, *arguments: str) -> Finished:
    return Finished(*command(train.main, f"output={folder}", *arguments), RunFolder(folder))


@pytest.fixture(scope="module")
def ditto(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Two rounds of Ditto at two sites, with a third that only tests."""
    folder = tmp_path_factory.mktemp("runs") / "ditto"
    more = ["data.n_sites=3", "data.unseen=[site_03]", "federation.rounds=2", "seed=3"]
    return run(folder, *SMALL, *more)


# ------------------------------------------------------------------------------------------------------ the folder


@pytest.mark.slow
def test_a_run_ends_well_and_leaves_every_file(ditto: Finished) -> None:
    assert ditto.code == 0, ditto.err
    assert "Traceback" not in ditto.err
    files = {str(path.relative_to(ditto.folder.path)) for path in ditto.folder.path.rglob("*") if path.is_file()}
    assert {
        "README.md",
        "config.yaml",
        "environment.json",
        "splits.csv",
        "summary.md",
        "summary.csv",
        "metrics.csv",
        "rounds.csv",
        "communication.csv",
        "plots/curves.png",
        "checkpoints/index.json",
        *(f"overlays/site_0{i}.png" for i in (1, 2, 3)),
    } <= files
    assert not [file for file in files if file.endswith((".part", ".tmp"))]
    told = (ditto.folder.path / "README.md").read_text()
    for file in files - {"README.md"}:
        assert file.split("/")[0] in told or f"{file.split('/')[0]}/" in told, file


@pytest.mark.slow
def test_the_config_reloads_as_it_was_composed(ditto: Finished) -> None:
    more = ["data.n_sites=3", "data.unseen=[site_03]", "federation.rounds=2", "seed=3"]
    assert load(ditto.folder.read_config()) == compose([f"output={ditto.folder.path}", *SMALL, *more], SCHEMA)


def test_seeds_and_versions_are_recorded(ditto: Finished) -> None:
    environment = json.loads(ditto.folder.environment_path.read_text())
    assert "3" in json.dumps(environment["seeds"])
    assert "torch" in json.dumps(environment)


def test_splits_cover_every_case_and_unseen_sites_only_test(ditto: Finished) -> None:
    splits = ditto.folder.splits()
    assert sorted(splits["site"].value_counts()) == [8, 8, 8]
    assert not splits.duplicated(["site", "case"]).any()
    assert set(splits["split"]) == {"train", "val", "test"}
    unseen = splits[splits["site"] == "site_03"]
    assert set(unseen["split"]) == {"test"}
    assert not unseen["seen"].any()
    assert splits[splits["site"] != "site_03"]["seen"].all()


def test_scores_hold_every_case_region_view_and_checkpoint_once(ditto: Finished) -> None:
    scores, splits = ditto.folder.scores(), ditto.folder.splits()
    assert tuple(scores.columns) == COLUMNS["metrics.csv"]
    single = scores[scores["case"] != ""]
    assert not single.duplicated([column for column in single.columns if column != "value"]).any()
    assert set(single["checkpoint"]) == {"round", "last", "best"}
    during = single[single["checkpoint"] == "round"]
    assert set(during["split"]) == {"val"}
    assert sorted(set(during["round"])) == [1, 2]
    assert "site_03" not in set(during["site"])
    for checkpoint in ("last", "best"):
        for site in ("site_01", "site_02", "site_03"):
            for split in ("val", "test"):
                cases = set(splits[(splits["site"] == site) & (splits["split"] == split)]["case"])
                for view in ("global", "personal"):
                    found = single[
                        (single["checkpoint"] == checkpoint)
                        & (single["site"] == site)
                        & (single["split"] == split)
                        & (single["view"] == view)
                    ]
                    expected = set() if site == "site_03" and view == "personal" else cases
                    assert set(found["case"]) == expected
                    assert len(found) == len(expected) * 2 * len(FULL)  # regions disc and cup
    assert scores.loc[scores["metric"] != "invented", "value"].notna().all()
    assert scores.loc[scores["metric"] == "invented", "value"].isna().all()  # the regions are in every case
    overlap = single[single["metric"].isin(["dice", "iou", "nsd", "missed"])]["value"]
    assert overlap.between(0, 1).all()
    assert set(single[single["site"] == "site_03"]["seen"]) == {False}


def test_rounds_traffic_and_checkpoint_agree(ditto: Finished) -> None:
    rounds, traffic = ditto.folder.rounds(), ditto.folder.traffic()
    assert list(zip(rounds["round"], rounds["site"], strict=True)) == [
        (round, site) for round in (1, 2) for site in ("site_01", "site_02")
    ]
    assert (rounds["steps"] == 2).all()  # one of the shared and one of the own model
    trained = ditto.folder.splits().query("split == 'train' and site == 'site_01'")
    assert (rounds[rounds["site"] == "site_01"]["examples"] == len(trained)).all()
    snapshot = Checkpoint(ditto.folder.checkpoints).load()
    assert snapshot is not None
    assert snapshot.round == 2
    for group, size in snapshot.server.sizes().items():
        assert set(traffic[traffic["group"] == group]["bytes"]) == {size}
    assert set(traffic["group"]) == {"model", "buffers"}
    assert len(traffic) == 2 * 2 * 2 * 2  # rounds, sites, directions, groups


def test_best_is_the_best_round_on_validation(ditto: Finished) -> None:
    scores = ditto.folder.scores()
    dice = scores[(scores["checkpoint"] == "round") & (scores["metric"] == "dice") & (scores["case"] != "")]
    best = Checkpoint(ditto.folder.checkpoints).best()
    shared = dice[dice["view"] == "global"].groupby(["round", "site"])["value"].mean().groupby("round").mean()
    assert best["global"].score == pytest.approx(shared.max())
    assert best["global"].round == shared.idxmax()
    own = dice[(dice["view"] == "personal") & (dice["site"] == "site_02")].groupby("round")["value"].mean()
    assert best["personal/site_02"].round == own.idxmax()
    final = scores[(scores["checkpoint"] == "best") & (scores["view"] == "global")]
    assert set(final["round"]) == {best["global"].round}


def test_the_summary_is_printed_and_sets_unseen_sites_apart(ditto: Finished) -> None:
    for text in ("site_01", "site_02", "site_03 (unseen)", "mean over sites", "global best", "personal best"):
        assert text in ditto.out
    (unseen,) = [line for line in ditto.out.splitlines() if line.startswith("site_03 (unseen)")]
    assert "no personal model" in unseen
    assert str(ditto.folder.path) in ditto.out
    scores = ditto.folder.scores()
    last = scores[
        (scores["checkpoint"] == "last")
        & (scores["split"] == "test")
        & (scores["metric"] == "dice")
        & (scores["view"] == "global")
        & (scores["site"] == "site_01")
        & (scores["case"] != "")
    ]
    assert f"{last['value'].mean():.4f}" in ditto.out


def test_progress_names_rounds(ditto: Finished) -> None:
    assert "round 1/2" in ditto.err
    assert "round 2/2" in ditto.err


@pytest.mark.slow
def test_scoring_again_gives_the_same_numbers(ditto: Finished) -> None:
    before = ditto.folder.path.joinpath("metrics.csv").read_bytes()
    code, out, err = command(evaluate.main, str(ditto.folder.path))
    assert code == 0, err
    final = ditto.folder.scores().query("checkpoint != 'round' and case != ''")
    assert f"{len(final)} of {len(final)} scores are also in metrics.csv; the largest difference is 0" in out
    assert (ditto.folder.path / "rescored.csv").is_file()
    assert ditto.folder.path.joinpath("metrics.csv").read_bytes() == before


def test_scoring_again_notices_other_numbers(ditto: Finished, tmp_path: Path) -> None:
    scores = ditto.folder.scores().query("checkpoint == 'last' and case != ''")
    assert difference(scores, scores) == (0, len(scores))
    moved = scores.copy()
    moved.iloc[3, moved.columns.get_loc("value")] += 0.25
    assert difference(moved, scores)[0] == pytest.approx(0.25)
    vanished = scores.copy()
    vanished.iloc[3, vanished.columns.get_loc("value")] = float("nan")
    assert difference(vanished, scores)[0] == float("inf")
    assert difference(vanished, vanished)[0] == 0


# ------------------------------------------------------------------------------------------------------ mistakes


def mistake(*arguments: str, main: object = train.main) -> str:
    code, _, err = command(main, *arguments)
    assert code == 2
    assert "Traceback" not in err
    assert any(line.startswith("error: ") for line in err.splitlines())
    return err


@pytest.mark.slow
def test_a_users_mistakes_end_in_a_message(ditto: Finished, tmp_path: Path) -> None:
    folder = ditto.folder.path
    assert "did you mean 'federation.rounds'" in mistake("federation.round=3")
    assert "data.root" in mistake("data=folder")
    absent = tmp_path / "absent"
    assert str(absent) in mistake("data=folder", f"data.root={absent}", f"output={tmp_path / 'a'}")
    assert "already holds a run" in mistake(f"output={folder}", *SMALL)
    assert "holds no run" in mistake(f"output={absent}", "resume=true")
    assert "seed: 3 in the folder, 4 now" in mistake(f"output={folder}", "resume=true", "seed=4")
    assert "min_sites=5, but a round asks 2 of 2 sites" in mistake(
        f"output={tmp_path / 'b'}", *SMALL, "federation.min_sites=5"
    )
    assert "no site 'site_9'" in mistake(f"output={tmp_path / 'c'}", *SMALL, "data.unseen=[site_9]")
    assert "holds no run" in mistake(str(absent), main=evaluate.main)
    assert not (tmp_path / "b" / "config.yaml").exists()


@pytest.mark.slow
def test_a_diverging_federation_says_who_and_what_to_do(tmp_path: Path) -> None:
    wild = [*PLAIN, "training.lr=1e30", "training.optimizer=sgd"]
    assert "probabilities are not finite" in mistake(f"output={tmp_path / 'b'}", *wild)
    told = mistake(f"output={tmp_path / 'a'}", *wild, "federation.local_steps=2")
    assert "round 1: 0 usable updates" in told
    assert "site_01" in told
    assert "learning rate" in told
    events = RunFolder(tmp_path / "a").events()
    assert list(events["site"]) == ["site_01", "site_02"]
    assert "no checkpoint yet" in mistake(str(tmp_path / "a"), main=evaluate.main)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named(ditto: Finished, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(ditto.folder.path, copy)
    server = copy / "checkpoints" / Checkpoint(copy / "checkpoints").index["server"]
    server.write_bytes(server.read_bytes()[:1000])
    assert f"{server} is damaged" in mistake(str(copy), main=evaluate.main)
    shutil.copy(ditto.folder.checkpoints / server.name, server)
    (copy / "metrics.csv").unlink()
    code, out, _ = command(evaluate.main, str(copy))
    assert (code, "no final scores to compare with" in out) == (1, True)
    (copy / "checkpoints" / "index.json").write_text("{")
    assert "index.json is damaged" in mistake(f"output={copy}", "resume=true")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.yaml", b"\xff\xfe", "config.yaml is damaged"),
        ("config.yaml", b"seed: 3", "config.yaml is damaged"),
        ("metrics.csv", b"hello\nworld\n", "metrics.csv is damaged"),
        ("metrics.csv", b"\xff\xfe\n\xff\n", "metrics.csv is damaged"),
        ("splits.csv", b"a,b\n1,2\n", "splits.csv is damaged (it has no column 'case')"),
        ("environment.json", b"{", "environment.json is damaged"),
        ("rounds.csv", b"hello\nworld\n", "rounds.csv is damaged"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(
    ditto: Finished, tmp_path: Path, file: str, content: bytes, message: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(ditto.folder.path, copy)
    (copy / file).write_bytes(content)
    told = mistake(f"output={copy}", "resume=true", "federation.rounds=3")
    assert message in told
    assert str(copy) in told


@pytest.mark.slow
def test_what_cannot_be_written_or_read_is_named(ditto: Finished, tmp_path: Path) -> None:
    file = ditto.folder.config_path
    assert f"Not a directory: {file}/x" in mistake(*PLAIN, f"output={file}/x")
    assert "is a file; choose a folder" in mistake(*PLAIN, f"output={file}")
    odd = tmp_path / "odd.yaml"
    odd.write_text("algorithm: 3")
    assert "unknown algorithm '3'" in mistake(f"experiment={odd}")
    assert "seed belongs to the run" in mistake(str(ditto.folder.path), "seed=4", main=evaluate.main)
    code, _, err = command(evaluate.main)
    assert (code, "python evaluate.py RUN" in err) == (2, True)


@pytest.mark.exhaustive
def test_a_run_made_on_a_gpu_is_scored_where_there_is_none(
    ditto: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(ditto.folder.path, copy)
    text = ditto.folder.read_config()
    assert "accelerator: cpu" in text
    (copy / "config.yaml").write_text(text.replace("accelerator: cpu", "accelerator: gpu"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for overrides in ([], ["trainer.accelerator=cpu", "trainer.threads=1"]):
        code, out, err = command(evaluate.main, str(copy), *overrides)
        assert code == 0, err
        assert "the largest difference is 0" in out
    told = mistake(str(copy), "trainer.accelerator=gpu", main=evaluate.main)
    assert "PyTorch finds no CUDA device" in told


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_and_a_request_to_end_say_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sign: signal.Signals
) -> None:
    monkeypatch.setattr("fedseg.launch.run.score_checkpoints", lambda *_: os.kill(os.getpid(), sign))
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    code, _, err = command(train.main, *PLAIN, "algorithm=fedavg", f"output={tmp_path / 'run'}")
    assert code == 130
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert f"stopped; go on with: python train.py output={tmp_path / 'run'} resume=true" in err
    ending.heed()  # it ended with the command: another federation in this process is not stopped
    assert not (tmp_path / "run" / "summary.csv").exists()


def test_how_to_go_on_fits_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.go_on("my runs/a") == ""  # nothing was saved yet
    RunFolder("my runs/a").write_config("seed: 1\n")
    assert train.go_on("my runs/a") == "python train.py 'output=my runs/a' resume=true"
    assert train.go_on("x", stages=True) == "the same command, with output=x"
    monkeypatch.setattr("fedseg.launch.compare.compare", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    code, _, err = command(compare.main, "runs")
    assert (code, err.strip()) == (130, "stopped")  # there is nothing to go on with


# ------------------------------------------------------------------------------------------------------ other methods


def final_views(finished: Finished) -> set[tuple[str, str]]:
    scores = finished.folder.scores().query("checkpoint == 'best'")
    return set(zip(scores["site"], scores["view"], strict=True))


@pytest.mark.slow
def test_a_method_without_a_global_model_says_so(tmp_path: Path) -> None:
    more = ["algorithm=fedbn", "data.n_sites=3", "data.unseen=[site_03]"]
    finished = run(tmp_path / "a", *PLAIN, *more)
    assert finished.code == 0, finished.err
    assert "no global model" in finished.out
    assert final_views(finished) == {("site_01", "personal"), ("site_02", "personal")}
    assert set(finished.folder.traffic()["group"]) == {"model"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "views"),
    [("pooled", {"global"}), ("finetune", {"global", "personal"})],
)
def test_baselines_run_to_their_table(tmp_path: Path, algorithm: str, views: set[str]) -> None:
    more = ["algorithm.finetune_steps=1"] if algorithm == "finetune" else []
    finished = run(tmp_path / "a", *PLAIN, f"algorithm={algorithm}", *more)
    assert finished.code == 0, finished.err
    assert final_views(finished) == {(site, view) for site in ("site_01", "site_02") for view in views}
    trainers = {"pooled"} if algorithm == "pooled" else {"site_01", "site_02"}
    assert set(finished.folder.rounds()["site"]) == trainers
    code, out, _ = command(evaluate.main, str(finished.folder.path))
    assert code == 0, out


@pytest.mark.slow
def test_volumes_with_exclusive_regions_are_scored_per_volume(tmp_path: Path) -> None:
    more = [
        "algorithm=fedavg",
        "data.anatomy=organ",
        "data.slices=3",
        "data.exclusive=true",
        "data.regions={gland: [1], lesion: [2]}",
        "model.norm=group",
    ]
    finished = run(tmp_path / "a", *SMALL, *more)
    assert finished.code == 0, finished.err
    scores = finished.folder.scores()
    assert set(scores["region"]) >= {"gland", "lesion"}
    cases = set(finished.folder.splits().query("split == 'test'")["case"])
    tested = scores.query("split == 'test' and case != ''")
    assert set(tested["case"]) <= cases
    assert not tested.duplicated([column for column in tested.columns if column != "value"]).any()
    assert set(finished.folder.traffic()["group"]) == {"model"}  # group normalisation has no running statistics
    assert (finished.folder.overlays / "site_01.png").is_file()
    code, out, _ = command(evaluate.main, str(finished.folder.path))
    assert (code, "the largest difference is 0" in out) == (0, True)


@pytest.mark.slow
def test_a_run_without_validation_cases_takes_the_last_model(tmp_path: Path) -> None:
    finished = run(tmp_path / "a", *PLAIN, "algorithm=fedavg", "data.split=[0.75, 0, 0.25]")
    assert finished.code == 0, finished.err
    scores = finished.folder.scores()
    last, best = (scores[scores["checkpoint"] == which].drop(columns="checkpoint") for which in ("last", "best"))
    assert len(last)
    assert last.reset_index(drop=True).equals(best.reset_index(drop=True))


@pytest.mark.slow
def test_a_run_in_its_own_process_logs_offline_without_network(tmp_path: Path) -> None:
    nowhere = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9", "PYTHONPATH": str(ROOT)}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | nowhere
    arguments = [*PLAIN, "algorithm=fedavg", f"output={tmp_path / 'run'}", "wandb.mode=offline"]
    line = [sys.executable, str(ROOT / "train.py"), *arguments]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "mean over sites" in done.stdout
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


@pytest.mark.slow
def test_what_a_yardstick_does_not_read_is_said_once(tmp_path: Path) -> None:
    words = ["federation.combine=median", "federation.server_lr=0.5"]
    unread = ["federation.hostile=2", "privacy.noise=4"]
    pooled = run(tmp_path / "pooled", *PLAIN, "algorithm=pooled", *words, *unread, "federation.fraction=0.5")
    local = run(tmp_path / "local", *PLAIN, "algorithm=local", *words)
    assert (pooled.code, local.code) == (0, 0)
    for name in ("fraction=0.5", "combine=median", "hostile=2"):
        assert f"no effect: federation.{name} on training in one place" in pooled.err
    assert "no effect: privacy.noise=4.0 with privacy.mechanism=none" in pooled.err
    assert len(pooled.folder.events()) == 4
    events = local.folder.events()
    assert events["event"].to_list() == ["no effect", "no effect"]
    assert set(events["detail"].str.split().str[0]) == {"federation.combine=median", "federation.server_lr=0.5"}
    assert run(tmp_path / "local", *PLAIN, "algorithm=local", *words, "federation.rounds=2", "resume=true").code == 0
    assert len(local.folder.events()) == 2
    assert run(tmp_path / "plain", *PLAIN, "algorithm=pooled").folder.events().empty
