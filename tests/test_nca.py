"""A neural cellular automaton: small, the same everywhere, and a network like any other to the suite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import export
from fedseg.algorithms.fedsm import FedSM
from fedseg.algorithms.recipe import Recipe, Training
from fedseg.configs.compose import ConfigError, compose
from fedseg.launch.experiment import Experiment
from fedseg.launch.run import execute
from fedseg.launch.settings import SCHEMA
from fedseg.models import create_model, create_nca_model
from tests.tiny_run import phantom_run


def restless(network: nn.Module) -> nn.Module:
    """The network after some training: at first its cells do nothing."""
    for name, parameter in network.named_parameters():
        if name.endswith("change.weight"):
            nn.init.normal_(parameter, std=0.1)
    return network


@pytest.mark.parametrize("dimensions", [2, 3])
def test_cells_answer_for_images_and_volumes_with_ten_thousand_weights(dimensions: int) -> None:
    network = restless(create_nca_model(3, 2, dimensions, coarse_steps=2, fine_steps=2))
    images = torch.rand(2, 3, *[8, 16, 12][:dimensions])
    assert network(images).shape == (2, 2, *images.shape[2:])
    assert 1e4 < sum(p.numel() for p in network.parameters()) < 3.1e4
    network.train()(images).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    tried = [network(images) for _ in range(2)]
    assert not torch.equal(*tried)  # some cells rest by chance
    network.eval()
    assert torch.equal(network(images), network(images))


def test_every_cell_has_the_same_rule_and_sees_as_far_as_its_steps_go() -> None:
    """A step is that of a definition written out: state += fire_rate * change(relu(look([image, state])))."""
    network: Any = restless(create_nca_model(1, 1, coarse_steps=1, fine_steps=1, fire_rate=0.25)).eval()
    images = torch.rand(1, 1, 32, 32)
    rule = network.encoder.automata[0]
    coarse = nn.functional.avg_pool2d(images, 4)
    seen = torch.cat([coarse, torch.zeros(1, 15, 8, 8)], dim=1)
    state = 0.25 * rule.change(rule.look(seen).relu())
    assert torch.allclose(network.encoder(images)[1], state, atol=1e-7)
    other = images.clone()
    other[..., 0, 0] += 1  # a coarse cell of 4 x 4, its neighbours, and the pixels beside these
    changed = (network(other) - network(images)).abs().amax(dim=(0, 1)) > 0
    assert changed[:8, :8].any()
    assert not changed[9:].any()
    assert not changed[:, 9:].any()


def test_levels_hand_their_states_on() -> None:
    network: Any = restless(create_nca_model(1, 1, levels=3, scale=2, coarse_steps=1, fine_steps=1)).eval()
    assert len(network.encoder.automata) == 2
    assert network.encoder(torch.rand(1, 1, 8, 8))[1].shape == (1, 15, 4, 4)


def test_what_selects_models_by_images_sees_images_though_cells_see_their_states_too() -> None:
    method = FedSM(create_nca_model(1, 2), Recipe.build(Training(), "sigmoid", 1))
    (selector,) = method._selector
    selector.set_sites(3)
    assert selector(torch.rand(2, 1, 16, 16)).shape == (2, 3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("model=nca", "data.size=30"), r"multiples of 4; take data\.size=\[32, 32\]"),
        (("model=nca", "model.channels=3"), r"model\.channels=3: .* take model\.channels=15"),
        (("model=nca", "algorithm=fedbn"), "'normalisation' matches no tensor"),
        (("model=nca", "algorithm=iopfl"), "no normalisation layers; take another network, or another method"),
    ],
)
def test_what_does_not_fit_is_refused_before_images_are_read(settings: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Experiment(compose(["data=folder", "data.root=nowhere", *settings], SCHEMA)).check()


def test_a_network_over_its_budget_is_refused_with_the_numbers_before_it_learns() -> None:
    exact = sum(p.numel() for p in create_nca_model(3, 2).parameters())

    def start(*settings: str) -> None:
        words = ["data.n_sites=2", "data.cases_per_site=8", "data.size=32", "data.resolution=32", *settings]
        experiment = Experiment(compose(words, SCHEMA))
        experiment.check()
        experiment.data.setup()
        experiment.check_sites()

    start("model=nca", f"model.max_parameters={exact}")
    with pytest.raises(ConfigError, match=rf"{exact:,} parameters \(encoder .*, decoder .*\); take a smaller one"):
        start("model=nca", f"model.max_parameters={exact - 1}")
    with pytest.raises(ValueError, match=r"model\.max_parameters=10000: the network has 14,328,"):
        create_model(3, 1, max_parameters=10_000)


@pytest.mark.slow
def test_a_run_learns_and_is_exported(tmp_path: Path) -> None:
    execute(
        phantom_run(3, tmp_path / "run", "model=nca", "model.coarse_steps=4", "model.fine_steps=2", "algorithm=fedavg")
    )
    assert export.main([str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "global.pt").is_file()
