"""The manifest of what left each site, and private runs from the front door."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from fedseg.configs.compose import ConfigError, compose
from fedseg.federation.checkpoint import Checkpoint
from fedseg.launch.experiment import Experiment
from fedseg.launch.settings import SCHEMA
from fedseg.reporting.folder import AUDIT_SUMMARY, CONTENTS, RunFolder
from tests.test_train import PLAIN, run
from tests.world import simulate

SITES = {"site_01", "site_02"}


@pytest.mark.slow
def test_everything_that_left_a_site_is_in_the_manifest(tmp_path: Path) -> None:
    finished = run(tmp_path / "run", *PLAIN, "algorithm=feddg", "data.n_sites=2", "compression.cast=float16")
    assert finished.code == 0, finished.err
    audit, contents = finished.folder.audit(), finished.folder.contents()
    told = audit[audit["task"] == "introduce"]
    assert set(told["group"]) == {"bank", "(numbers)"}
    assert set(told["site"]) == SITES
    sent = audit[audit["task"] == "train"]
    assert set(sent["group"]) == {"model", "buffers", "(numbers)"}
    assert set(sent[sent["group"] == "model"]["transforms"]) == {"float16"}
    model = contents[contents["content"] == sent[sent["group"] == "model"]["content"].iloc[0]]
    shapes = {row.tensor: row.shape for row in model.itertuples()}
    snapshot = Checkpoint(finished.folder.checkpoints).load()
    assert snapshot is not None
    server = snapshot.server["model"]
    assert shapes == {name: "x".join(map(str, t.shape)) for name, t in server.items()}
    assert set(model["dtype"]) == {"float16"}
    up = finished.folder.traffic().query("direction == 'up'")
    tensors = audit[audit["group"] != "(numbers)"]
    assert tensors["bytes"].sum() == up["bytes"].sum()
    scored = audit[audit["task"] == "evaluate"]
    names = contents[contents["content"].isin(scored["content"])]["tensor"]
    assert {"val/global/dice", "test/global/dice", "seconds"} <= set(names)
    assert set(audit["content"]) == set(contents["content"])
    assert not contents.duplicated(["content", "tensor"]).any()
    summary = pd.read_csv(finished.folder.path / AUDIT_SUMMARY)
    assert summary["times"].sum() == len(audit)
    assert summary["bytes"].sum() == audit["bytes"].sum()


@pytest.mark.exhaustive
def test_publications_are_in_the_manifest(tmp_path: Path) -> None:
    finished = run(tmp_path / "run", *PLAIN, "data.n_sites=3", "data.unseen=[site_03]", "algorithm=iopfl")
    assert finished.code == 0, finished.err
    published = finished.folder.audit().query("task == 'publish'")
    assert set(published["site"]) == SITES
    assert (published["bytes"] > 0).all()


@pytest.mark.slow
def test_a_resumed_run_lists_contents_once_and_rows_as_if_never_stopped(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", *PLAIN, "federation.rounds=2", "algorithm=fedavg", "compression.top_k=0.1")
    run(tmp_path / "parts", *PLAIN, "federation.rounds=1", "algorithm=fedavg", "compression.top_k=0.1")
    resumed = run(tmp_path / "parts", "federation.rounds=2", "resume=true")
    assert resumed.code == 0, resumed.err
    training = [f.folder.audit().query("task == 'train'").reset_index(drop=True) for f in (whole, resumed)]
    pd.testing.assert_frame_equal(*training)
    assert not resumed.folder.contents().duplicated(["content", "tensor"]).any()
    one, two = (Checkpoint(f.folder.checkpoints).load() for f in (whole, resumed))
    assert one is not None
    assert two is not None
    for name, tensor in one.server["model"].items():
        assert torch.equal(tensor, two.server["model"][name])


def test_a_truncated_folder_lists_contents_again(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", resume=False)
    row = {"round": 1, "site": "A", "task": "train", "group": "model", "numbers": 2, "bytes": 8, "transforms": ""}
    for number in (1, 2):
        folder.append_audit([{**row, "round": number, "listing": [(f"w{number}", "2", "float32")]}])
    folder.truncate(1)
    assert folder.contents()["tensor"].tolist() == ["w1"]
    folder.append_audit([{**row, "round": 2, "listing": [("w2", "2", "float32")]}])
    assert folder.contents()["tensor"].tolist() == ["w1", "w2"]
    assert (folder.path / CONTENTS).read_text().count("w1") == 1


@pytest.mark.exhaustive
@pytest.mark.parametrize("algorithm", ["fedavg", "finetune"])
def test_a_run_with_private_patients_reports_its_budget_and_stops(tmp_path: Path, algorithm: str) -> None:
    private = [
        "privacy.mechanism=patient",
        "privacy.noise=1.5",
        "privacy.max_epsilon=4.0",
        "privacy.patients_per_step=2",
    ]
    private += ["privacy.patients_per_step=2", "model.norm=group"]
    more = ["federation.rounds=30", f"algorithm={algorithm}", "data.cases_per_site=12"]
    finished = run(tmp_path / "run", *PLAIN, *private, *more)
    assert finished.code == 0, finished.err
    table = finished.folder.privacy()
    assert 1 < table["round"].max() < 30
    assert set(table["site"]) == SITES
    assert set(table["unit"]) == {"patient"}
    assert (table["epsilon"] <= 4.0).all()
    assert (table["limit"] == 4.0).all()
    assert "epsilon" in finished.err
    assert "stopped" in set(finished.folder.events()["event"])
    assert (finished.folder.path / "summary.md").is_file()
    assert finished.folder.rounds()["loss"].isna().all(), "the training loss of private steps stays at the site"


@pytest.mark.slow
def test_a_budget_too_small_for_a_round_is_a_users_mistake(tmp_path: Path) -> None:
    private = ["privacy.mechanism=patient", "privacy.noise=0.3", "privacy.max_epsilon=0.1", "model.norm=group"]
    finished = run(tmp_path / "run", *PLAIN, *private, "algorithm=fedavg")
    assert finished.code == 2
    assert "raise privacy.noise" in finished.err
    assert "Traceback" not in finished.err


REFUSED: list[tuple[list[str], str]] = [
    (["privacy.mechanism=site", "algorithm=feddg"], r"introduces"),
    (["privacy.mechanism=site", "algorithm=lcfed"], r"per_site"),
    (["privacy.mechanism=patient", "algorithm=fedavg"], r"model\.norm=group"),
    (["privacy.mechanism=patient", "algorithm=ditto", "model.norm=group"], r"second model"),
    (
        ["privacy.mechanism=patient", "algorithm=fedavg", "model.norm=group", "trainer.gradient_clip=1"],
        r"gradient_clip",
    ),
    (["privacy.aggregation=encrypted", "compression.top_k=0.1"], r"cannot go with compression\.top_k"),
    (["privacy.mechanism=site", "privacy.max_epsilon=0.01"], r"one round costs epsilon"),
    (["privacy.mechanism=site", "federation.sampling=poisson", "federation.min_sites=2"], r"min_sites=1"),
    (["privacy.noise=0"], r"privacy\.noise=0"),
    (["privacy.noise=4", "privacy.max_epsilon=3"], r"privacy\.max_epsilon has no effect with privacy\.mechanism=none"),
    (["privacy.aggregation=masked", "privacy.randomness=secret"], r"=none; leave privacy\.randomness at seeded, or"),
    (["compression.top_k=2"], r"compression\.top_k=2"),
]


@pytest.mark.parametrize(("arguments", "reason"), REFUSED)
def test_what_cannot_be_private_is_refused_before_any_image_is_read(
    arguments: list[str], reason: str, monkeypatch: Any
) -> None:
    def refused() -> None:
        experiment = Experiment(compose([*PLAIN, *arguments], SCHEMA))
        monkeypatch.setattr(type(experiment.data), "setup", lambda *_: pytest.fail("images were read"))
        experiment.check()

    with pytest.raises(ConfigError, match=reason):
        refused()


def test_a_record_without_transforms_has_no_privacy_rows(tmp_path: Path) -> None:
    outcome = simulate("fedavg", tmp_path, rounds=1)
    assert outcome.observer.rows("privacy") == []
    assert {row["transforms"] for row in outcome.observer.rows("audit")} == {""}
