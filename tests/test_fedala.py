"""FedALA: merging against the authors' arrays, and what it reduces to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedseg.algorithms.fedala import FedALA
from fedseg.algorithms.recipe import Recipe, Training
from fedseg.federation.client import Compute, turn
from fedseg.federation.contract import Batch, TrainTask
from fedseg.federation.state import State
from tests.lines import golden
from tests.world import CPU, assert_same, build, evaluate, simulate, toy_sites

STILL = Training(optimizer="sgd", lr=1e-300, channels_last=False)  # the local fit moves nothing


class InOrder:
    """The archive's examples, batch after batch."""

    name, index, seen, examples, training_images, patients = "s0", 0, True, 12, 12, 12

    def __init__(self, data: dict[str, Tensor]) -> None:
        size = int(data["batch_size"])
        pairs = zip(data["X"].split(size), data["Y"].split(size), strict=True)
        self._batches = [{"image": x[:, :, None, None], "mask": y[:, None, None]} for x, y in pairs]

    def at(self, round: int) -> InOrder:
        return self

    def steps(self, epochs: float = 1.0, labelled: bool = True) -> int:
        return len(self._batches)

    def train_batches(self, seed: int, steps: int) -> Sequence[Batch]:
        return self._batches[:steps]


def tensors_of(module: nn.Module, flat: Tensor) -> dict[str, Tensor]:
    sizes = [p.numel() for p in module.parameters()]
    named = module.named_parameters()
    return {name: piece.reshape(p.shape) for (name, p), piece in zip(named, flat.split(sizes), strict=True)}


@pytest.mark.parametrize("archive", ["fedala_s85", "fedala_s86"])
def test_merging_in_two_rounds_is_the_programs(archive: str) -> None:
    data = golden(archive)
    d0, d1, d2 = data["dims"].tolist()
    network = nn.Sequential(nn.Conv2d(d0, d1, 1), nn.Tanh(), nn.Conv2d(d1, d2, 1)).double()
    recipe = Recipe(STILL, "softmax", nn.Identity(), lambda logits, mask, _: cross_entropy(logits, mask))
    knobs: dict[str, Any] = {"tensors": int(data["top_tensors"]), "first_passes": int(data["epochs_first"])}
    worker = FedALA(network, recipe, eta=float(data["eta"]), sample=1.0, **knobs).double()
    site: Any = InOrder(data)
    _, kept = turn(worker, site, TrainTask(1, 0, steps=1), message(network, data["local0"]), State(), CPU, evaluate)
    for round in (0, 1):
        sent = message(network, data[f"global{round}"])
        kept.tensors["own"] |= {f"own.{name}": t for name, t in tensors_of(network, data[f"local{round}"]).items()}
        update, kept = turn(worker, site, TrainTask(2 + round, 0, steps=1), sent, kept, CPU, evaluate)
        after = torch.cat([(sent["model"][name] + t).flatten() for name, t in update["model"].items()])
        torch.testing.assert_close(after, data[f"after{round}"], rtol=1e-9, atol=1e-12)
        count = int(data["top_tensors"])
        weights = torch.cat([kept["own"][f"merge.{i}"].flatten() for i in range(count)])
        torch.testing.assert_close(weights, data[f"weights{round}"], rtol=1e-9, atol=1e-12)


def message(network: nn.Module, flat: Tensor) -> State:
    return State({"model": tensors_of(network, flat)})


@pytest.mark.slow
@pytest.mark.parametrize("training", [Training(lr=1e-2), Training(optimizer="sgd", lr=0.05)], ids=["adam", "sgd"])
def test_without_a_step_it_is_fedavg_bit_for_bit(training: Training, tmp_path: Path) -> None:
    fedavg = simulate("fedavg", tmp_path / "a", 3, training=training)
    assert_same(simulate("fedala", tmp_path / "b", 3, training=training, eta=0.0).server, fedavg.server)
    tiny = simulate("fedala", tmp_path / "c", 3, training=training, eta=1e-30)
    assert_same(tiny.server, fedavg.server)
    merged = simulate("fedala", tmp_path / "d", 3, training=training, eta=50.0, tensors=8)
    assert any(not torch.equal(t, fedavg.server["model"][k]) for k, t in merged.server["model"].items())


def test_the_personal_model_is_the_sites_own_after_its_fit() -> None:
    worker, site = build("fedala"), toy_sites()["s1"]
    sent = worker.broadcast(worker.init_server({}), "s1", TrainTask(1, 7))
    update, kept = turn(worker, site, TrainTask(1, 7, steps=3), sent, State(), CPU, evaluate)
    worker.receive(sent, kept, site)
    own = dict(worker.network("personal").named_parameters())
    for name, difference in update["model"].items():
        torch.testing.assert_close(own[name].detach(), sent["model"][name] + difference)


def test_merging_sees_a_sample_of_the_images_in_the_trainers_precision() -> None:
    """In its first merging as often as it is told, later once; then comes the local fit."""
    worker, site, computed = build("fedala", sample=0.5, first_passes=3), toy_sites()["s2"], []
    sent, kept = worker.broadcast(worker.init_server({}), "s2", TrainTask(1, 7)), State()
    worker.model.register_forward_hook(lambda _module, _images, logits: computed.append(logits.dtype))
    assert site.steps() == 4
    for round, merging in ((1, 0), (2, 3 * 2), (3, 2)):
        task = TrainTask(round, 7, steps=1)
        _, kept = turn(worker, site, task, sent, kept, Compute("cpu", "bf16-mixed"), evaluate)
        assert computed == [torch.bfloat16] * (merging + 1)
        computed.clear()
