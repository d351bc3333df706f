"""The template of a new method works as it stands."""

import importlib.util
from pathlib import Path

import pytest
import torch

from fedseg.algorithms import ALGORITHMS
from fedseg.algorithms.recipe import Training
from tests.world import simulate

TEMPLATE = Path(__file__).parent.parent / "docs" / "new_method.py"


@pytest.fixture
def template(monkeypatch: pytest.MonkeyPatch) -> str:
    spec = importlib.util.spec_from_file_location("new_method", TEMPLATE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(ALGORITHMS, "mymethod", module.MyMethod)
    return "mymethod"


@pytest.mark.slow
def test_the_template_trains_and_its_strength_matters(template: str, tmp_path: Path) -> None:
    sgd = Training(optimizer="sgd", lr=0.1)
    fedavg = simulate("fedavg", tmp_path / "fedavg", training=sgd)
    zero = simulate(template, tmp_path / "zero", training=sgd, strength=0.0)
    one = simulate(template, tmp_path / "one", training=sgd, strength=1.0)
    # a term of weight zero may still change the order in which gradients are added
    torch.testing.assert_close(zero.server.tensors, fedavg.server.tensors, rtol=0, atol=1e-6)
    assert (one.server["model"]["segmentation_head.0.bias"] != fedavg.server["model"]["segmentation_head.0.bias"]).all()
