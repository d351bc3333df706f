"""Lightning's callbacks by config, in every local fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from fedseg.configs.compose import ConfigError
from fedseg.federation.checkpoint import Checkpoint
from fedseg.federation.client import Compute
from fedseg.launch.experiment import Experiment
from fedseg.launch.run import execute
from fedseg.launch.sites.site import Local
from fedseg.reporting.folder import RunFolder
from tests.tiny_run import phantom_run

HERE = "tests.test_callbacks"
SEEN: list[tuple[str, int]] = []


class Watch(pl.Callback):
    """Writes down every step of a local fit."""

    def __init__(self, name: str = "") -> None:
        self.name, self.steps = name, 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps += 1

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        SEEN.append((self.name, self.steps))


def stop_with(path: str, settings: str = "{}") -> Experiment:
    return Experiment(phantom_run(3, Path("unused"), f"trainer.callbacks={{{path}: {settings}}}"))


@pytest.mark.exhaustive
def test_a_callback_of_ones_own_is_made_anew_for_every_local_fit(tmp_path: Path) -> None:
    SEEN.clear()
    own = f"trainer.callbacks={{{HERE}:Watch: {{name: mine}}}}"
    execute(phantom_run(3, tmp_path / "watched", "algorithm=ditto", "federation.local_steps=2", own))
    assert SEEN == [("mine", 2)] * 4  # two sites, two rounds
    execute(phantom_run(3, tmp_path / "plain", "algorithm=ditto", "federation.local_steps=2"))
    values = [RunFolder(tmp_path / name).scores()["value"].dropna().tolist() for name in ("watched", "plain")]
    assert values[0] == values[1]


class Halve(pl.Callback):
    """Halves all gradients."""

    def on_before_optimizer_step(self, trainer: Any, module: pl.LightningModule, optimizer: Any) -> None:
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)


@pytest.mark.slow
def test_a_callback_changes_what_is_learnt(tmp_path: Path) -> None:
    """Half the gradients are half the learning rate."""
    plain = ("algorithm=fedavg", "training.optimizer=sgd", "federation.local_steps=2")
    halved = ("training.lr=0.02", f"trainer.callbacks={{{HERE}:Halve: {{}}}}")
    for name, more in (("halved", halved), ("half", ("training.lr=0.01",)), ("whole", ("training.lr=0.02",))):
        execute(phantom_run(3, tmp_path / name, *plain, *more))
    found = {name: Checkpoint(tmp_path / name / "checkpoints").load() for name in ("halved", "half", "whole")}
    one, other, third = (snapshot.server["model"] for snapshot in found.values() if snapshot is not None)
    assert all(torch.allclose(tensor, other[name], atol=1e-6) for name, tensor in one.items())
    assert not all(torch.allclose(tensor, third[name], atol=1e-6) for name, tensor in one.items())


@pytest.mark.parametrize(
    ("path", "settings", "told"),
    [
        ("Watch", "{}", r"'Watch' is none; write \{package\.module:Name: \{\}\}"),
        ("nowhere.at_all:Watch", "{}", "there is no module nowhere"),
        (f"{HERE}:Watch", "{speed: 1}", "cannot be called as it should: .*'speed'"),
        ("collections:OrderedDict", "{}", r"made OrderedDict\(\), which is no pytorch_lightning.Callback"),
        (
            "pytorch_lightning.callbacks:ModelCheckpoint",
            "{}",
            r"ModelCheckpoint.*which neither logs",
        ),
    ],
)
def test_what_is_no_callback_is_refused_before_anything_is_read(path: str, settings: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        stop_with(path, settings).check()


def test_the_cure_that_is_named_is_one() -> None:
    stop_with(f"{HERE}:Watch", "{}").check()
    assert Compute(callbacks={f"{HERE}:Watch": {}}).callbacks


def test_private_steps_take_no_callbacks() -> None:
    private = ("algorithm=fedavg", "privacy.mechanism=patient", "model.norm=group", "privacy.randomness=secret")
    with pytest.raises(ConfigError, match=r"trainer\.callbacks may look at and change single gradients.*leave them"):
        Experiment(phantom_run(3, Path("unused"), f"trainer.callbacks={{{HERE}:Watch: {{}}}}", *private)).check()
    Experiment(phantom_run(3, Path("unused"), *private)).check()


def test_a_site_imports_only_what_it_agreed_to(tmp_path: Path) -> None:
    config = phantom_run(3, tmp_path / "run", f"trainer.callbacks={{{HERE}:Watch: {{}}}}")
    with pytest.raises(ConfigError, match=rf"uses trainer\.callbacks={HERE}:Watch.*parts='{HERE}:Watch'"):
        Local("site_01", tmp_path).applied(config)
    assert Local("site_01", tmp_path, parts=(f"{HERE}:Watch",)).applied(config).trainer.callbacks
