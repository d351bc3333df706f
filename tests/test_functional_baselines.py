"""Simple methods' arithmetic against reference arrays: APFL's mixture, Ditto's step, the average of states."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedseg.algorithms.functional.mixture import alpha_step
from fedseg.federation.state import Mean, Update, squared_distance

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as archive:
        return {key: torch.from_numpy(np.asarray(archive[key])) for key in archive.files if key != "keys"}


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)


def test_alpha_equals_the_reference_step_by_step() -> None:
    data = golden("apfl_alpha_s84")
    alpha = float(data["alpha"][0])
    for step in range(5):
        tensors = [data[key][step] for key in ("w_personal", "w_local", "grad_personal", "grad_local")]
        halves = [[tensor[:2], tensor[2:]] for tensor in tensors]  # a model of two tensors
        alpha = alpha_step(alpha, *halves, eta=float(data["eta"]))
        assert alpha == pytest.approx(float(data["alpha"][step + 1]), abs=1e-12)


def test_alpha_stays_within_its_range() -> None:
    up, down = [torch.tensor([1.0])], [torch.tensor([-1.0])]
    zero = [torch.tensor([0.0])]
    assert alpha_step(0.5, up, zero, down, down, eta=10.0) == 1.0
    assert alpha_step(0.5, up, zero, up, up, eta=10.0) == 0.0
    assert alpha_step(0.5, up, up, up, up, eta=0.1) == pytest.approx(0.5 - 0.1 * 0.02 * 0.5)


def test_alpha_refuses_models_that_do_not_match() -> None:
    one = [torch.zeros(2)]
    with pytest.raises(ValueError, match="shorter"):
        alpha_step(0.5, one, one, one, [], eta=0.1)
    with pytest.raises(ValueError, match="should be one"):
        alpha_step(0.5, one, one, one, [torch.zeros(3)], eta=0.1)
    with pytest.raises(ValueError, match="alpha must lie"):
        alpha_step(1.5, one, one, one, one, eta=0.1)


def test_ditto_step_is_descent_on_the_loss_plus_the_squared_distance() -> None:
    data = golden("ditto_prox_s83")
    personal = data["personal_init"].clone().requires_grad_()
    optimizer = torch.optim.SGD([personal], lr=float(data["lr"]))
    for expected in data["personal"][1:] if torch.equal(data["personal"][0], personal) else data["personal"]:
        loss = 0.5 * (data["A"] @ personal - data["b"]).square().mean()
        pull = squared_distance({"w": personal}, {"w": data["global_w"]})
        optimizer.zero_grad()
        (loss + data["mu"] / 2 * pull).backward()
        optimizer.step()
        close(personal.detach(), expected)


def test_the_average_of_states_equals_the_reference() -> None:
    data = golden("fedavg_state_s92")
    names = [key.removeprefix("client__") for key in data if key.startswith("client__")]
    assert len(names) == 8
    mean = Mean()
    for client, examples in enumerate(data["n_samples"].tolist()):
        tensors = {name: data[f"client__{name}"][client] for name in names}
        mean.add(Update({"model": tensors}, site=str(client), examples=examples), weight=examples)
    for name, tensor in mean.result()["model"].items():
        close(tensor, data[f"avg__{name}"])


def test_the_average_of_parameters_equals_the_reference() -> None:
    data = golden("iopfl_federation")
    counts = data["agg_counts"].tolist()
    mean = Mean()
    for client, examples in enumerate(counts):
        tensors = {"w": data["agg_params"][client]}
        mean.add(Update({"model": tensors}, site=str(client), examples=examples), weight=examples)
    close(mean.result()["model"]["w"], data["agg_out"])
