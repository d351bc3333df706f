"""What never changes (model.freeze_encoder=true) neither travels nor is kept, and nothing else differs by that."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import export
from fedseg.algorithms import ALGORITHMS
from fedseg.algorithms.functional.adaptation import with_running_statistics
from fedseg.algorithms.parts import FROZEN, copies
from fedseg.federation.checkpoint import CheckpointError
from fedseg.federation.client import turn
from fedseg.federation.contract import EvaluateTask, MessageError, TrainTask
from fedseg.federation.flower.client import _told
from fedseg.federation.state import State
from fedseg.launch.run import execute
from fedseg.launch.scores.rescore import difference, rescore
from fedseg.models.factory import create_model
from fedseg.models.freeze import freeze, frozen
from fedseg.models.volumes import create_monai_model
from fedseg.reporting.folder import RunFolder
from tests.test_laws import Recording
from tests.tiers import every
from tests.tiny_run import phantom_run
from tests.world import CPU, TinyNet, build, evaluate, simulate, toy_sites, training_of

PRETRAINING = {name for name, method in ALGORITHMS.items() if not method.labelled}  # nothing of theirs but the encoder
KEEPS_THE_ENCODER = "lgfedavg"
every_method = pytest.mark.parametrize("name", every(sorted(ALGORITHMS.keys() - PRETRAINING - {KEEPS_THE_ENCODER})))
ROUNDS_OFF = {"braintorrent", "fedamp", "prrfl", "softpull", "fedsm"}
"""Their means of equal tensors, by cosines, frequencies and shares, are not equal to these. Adam would make much of
that where a gradient is zero but for rounding."""


def test_what_is_frozen_is_found_in_every_kind_of_network() -> None:
    small: dict[str, Any] = {"encoder_depth": 2, "decoder_channels": [8, 8]}
    for model in (create_model(1, 1, freeze_encoder=True, **small), create_monai_model(1, 1, 2, freeze_encoder=True)):
        assert frozen(model) == {name for name in model.state_dict() if name.startswith("encoder.")}
    assert frozen(create_model(1, 1, **small)) == frozenset()
    adapters = TinyNet().requires_grad_(False)
    adapters.segmentation_head.requires_grad_(True)
    buffers = {name for name, _ in adapters.named_buffers()}  # nobody said that these do not move
    assert frozen(adapters) == adapters.state_dict().keys() - buffers - {
        "segmentation_head.0.weight",
        "segmentation_head.0.bias",
    }
    assert frozen(freeze_all(TinyNet())) == TinyNet().state_dict().keys()


def test_a_stage_that_pre_trains_leaves_the_rest_of_the_network_as_it_is_whatever_normalises() -> None:
    for norm in ("batch", "group"):
        algorithm = build("contrastive", norm=norm, pairing="instance")
        travels = {name.partition(".")[0] for name in algorithm.parts.parameters}
        assert travels
        assert not travels & {"decoder", "segmentation_head"}


def freeze_all(model: nn.Module) -> nn.Module:
    freeze(model)
    return model


@pytest.mark.slow
@every_method
def test_what_never_changes_neither_travels_nor_is_kept(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    """The outcome is, bit for bit, the one of a version in which it did both; and such a version's run can be read."""
    training = training_of(name, optimizer="sgd", momentum=0.0) if name in ROUNDS_OFF else None
    outcome = simulate(name, tmp_path / "now", transport=Recording, training=training, frozen=True)
    method = build(name, frozen=True)
    names = frozenset(method.parts.frozen)
    assert names == {key for key in TinyNet().state_dict() if key.startswith("encoder.")}
    way: Any = outcome.federation.transport
    for _, message, update in way.travelled:
        for state in (message, update):
            assert not any(key in names for group in ("model", "buffers") for key in state.get(group))
    twice = copies(method, method.model, method.parts.frozen)
    for state in outcome.kept.values():
        assert not names & state.get("model").keys()
        assert not twice.keys() & state.get("own").keys()
    monkeypatch.setattr("fedseg.algorithms.parts.frozen", lambda model: frozenset())
    before = simulate(name, tmp_path / "then", training=training, frozen=True)
    monkeypatch.undo()
    old = method.restored(before.server)
    alike: Any = partial(torch.allclose, atol=1e-6) if name in ROUNDS_OFF else torch.equal
    for group in ("model", "buffers", FROZEN):
        # then, what was personal of it lay at the sites
        assert old.get(group).keys() == outcome.server.get(group).keys() or group == FROZEN
        for key, tensor in old.get(group).items():
            assert alike(tensor, outcome.server[group][key])
    for one, other in zip(answers(name, old, before.kept), answers(name, outcome.server, outcome.kept), strict=True):
        assert alike(one, other)


def answers(name: str, server: State, kept: Mapping[str, State]) -> list[Tensor]:
    """What every view says, from saved states alone: the networks began with other weights."""
    method, worker, sites = build(name, seed=1, frozen=True), build(name, seed=1, frozen=True), toy_sites()
    found = []
    for half in (method, worker):
        half.take_frozen(server.get(FROZEN))
    for site in ("s1", "s2"):
        message = method.broadcast(server, site, EvaluateTask(2, 7))
        worker.receive(message, kept.get(site, State()), sites[site])
        found += [worker.predict(sites[site].images, view) for view in worker.views]
    return found


@every_method
def test_other_frozen_tensors_than_the_servers_are_refused(name: str) -> None:
    server, worker, site = build(name, frozen=True), build(name, seed=1, frozen=True), toy_sites()["s1"]
    told = {"s1": build(name, frozen=True).introduce(site), "s2": build(name, frozen=True).introduce(toy_sites()["s2"])}
    message = server.broadcast(server.init_server(told), "s1", TrainTask(1, 7, steps=1))
    with pytest.raises(MessageError, match=r"differ from those at the server; take the same file of weights"):
        worker.receive(message, State(), site)
    assert "same file of weights" in _told(MessageError("take the same file of weights"))
    worker.take_frozen(server.frozen)  # the cure: the same weights
    worker.receive(message, State(), site)


def test_what_does_not_learn_and_changes_all_the_same_is_an_error() -> None:
    worker, site = build("fedavg", frozen=True), toy_sites()["s1"]
    message = worker.broadcast(worker.init_server({}), "s1", TrainTask(1, 7, steps=1))

    def drift(*_: Any) -> None:
        with torch.no_grad():
            worker.model.encoder[0].weight.add_(1)

    worker.model.decoder.register_forward_hook(drift)
    with pytest.raises(RuntimeError, match=r"of TinyNet that do not learn have changed .* belongs in buffers"):
        turn(worker, site, TrainTask(1, 7, steps=1), message, State(), CPU, evaluate)


def test_a_method_whose_personal_part_never_changes_is_refused() -> None:
    for chosen in ({"name": KEEPS_THE_ENCODER}, {"name": "fedavg", "personal": "part:encoder"}):
        with pytest.raises(ValueError, match=r"no site could differ .* take model\.freeze_encoder=false"):
            build(frozen=True, **chosen)
    assert build("fedavg", personal="part:encoder").views == ("personal",)
    assert build("fedavg", frozen=True, personal="part:encoder+part:segmentation_head").parts.stays


def test_frozen_normalisation_has_no_statistics_of_its_own_images() -> None:
    network = TinyNet()
    assert len(with_running_statistics(network)) == 2
    freeze(network.encoder)
    assert with_running_statistics(network) == [network.decoder[1]]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of encoder weights, as the runs below take it."""
    path = tmp_path_factory.mktemp("weights") / "encoder.pt"
    torch.manual_seed(11)
    network = create_model(3, 1, encoder="resnet18", encoder_depth=2, decoder_channels=[16, 8])
    torch.save(network.get_submodule("encoder").state_dict(), path)
    return path


FROM_FILE = ("model=unet", "model.encoder=resnet18", "model.encoder_depth=2", "model.decoder_channels=[16,8]")


def run_of(folder: Path, weights: Path, method: str, *more: str) -> RunFolder:
    chosen = (*FROM_FILE, f"model.encoder_weights={weights}", "model.freeze_encoder=true", f"algorithm={method}", *more)
    execute(phantom_run(3, folder, *chosen))
    return RunFolder(folder)


@pytest.mark.slow
@pytest.mark.parametrize("method", every(["fedavg", "ditto", "local"], ["ditto"]))
def test_a_run_is_scored_resumed_and_used_without_the_file(method: str, weights: Path, tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run", weights, method)
    kept = sum(file.stat().st_size for file in folder.checkpoints.glob("site-*"))
    encoder = sum(t.numel() * t.element_size() for t in torch.load(weights).values())
    assert kept < encoder / 10
    tensors = pd.read_csv(folder.path / "tensors.csv")
    assert set(tensors.loc[tensors["tensor"].str.startswith("encoder."), "policy"]) == {"never changes"}
    table = folder.path / "communication.csv"
    assert pd.read_csv(table)["bytes"].max() < encoder / 10 if table.exists() else method == "local"
    rows = folder.scores()
    again = rescore(folder)
    assert difference(again, rows) == (0, len(again))
    moved = weights.rename(weights.with_suffix(".moved"))
    try:
        own = () if method == "fedavg" else ("--site", "site_01")
        assert export.main([str(folder.path), *own, "--out", str(tmp_path / "export")]) == 0
    finally:
        moved.rename(weights)
    longer = run_of(tmp_path / "run", weights, method, "resume=true", "federation.rounds=3")
    straight = run_of(tmp_path / "straight", weights, method, "federation.rounds=3")
    assert difference(longer.scores().query("round == 3"), straight.scores().query("round == 3"))[0] == 0


@pytest.mark.slow
def test_another_file_than_a_run_began_with_is_refused_on_resumption(weights: Path, tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run", weights, "fedavg")
    first = torch.load(weights)
    torch.save({name: tensor * 2 for name, tensor in first.items()}, weights)
    try:
        with pytest.raises(CheckpointError, match=r"server-00002.* not those that are built here; give back the file"):
            run_of(folder.path, weights, "fedavg", "resume=true", "federation.rounds=3")
    finally:
        torch.save(first, weights)
    run_of(folder.path, weights, "fedavg", "resume=true", "federation.rounds=3")  # the cure


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", ["fedavg", "ditto"])
def test_a_run_of_a_version_in_which_all_travelled_is_gone_on_with(
    method: str, weights: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("fedseg.algorithms.parts.frozen", lambda model: frozenset())
    folder = run_of(tmp_path / "run", weights, method)
    monkeypatch.undo()
    rows = folder.scores()
    again = rescore(folder)
    assert difference(again, rows) == (0, len(again))
    longer = run_of(folder.path, weights, method, "resume=true", "federation.rounds=3")
    straight = run_of(tmp_path / "straight", weights, method, "federation.rounds=3")
    assert difference(longer.scores().query("round == 3"), straight.scores().query("round == 3"))[0] == 0
