"""The benchmark for GPUs, in small on the CPU: both loops compute the same, and it says what its numbers are not."""

import re
from typing import Any

import pytest
import torch

from benchmarks.gpu import NO_FIGURE, TIMED, main, run_cell, table

VOLUMES = (
    "data.anatomy=organ", "data.slices=8", "data.dimensions=3", "data.size=[8,16,16]", "model=unet3d",
    "model.architecture=dynunet", "model.width=4", "model.levels=3",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(), VOLUMES], ids=["images", "volumes"])
def test_the_bare_loop_computes_what_the_suite_s_fit_does(settings: tuple[str, ...]) -> None:
    cells: dict[str, Any] = {name: [run_cell(name, "cpu", settings, 2, 1)] for name in (*TIMED, "sites")}
    bare, fit = (cells[name][0] for name in TIMED[:2])
    assert bare["loss"] == pytest.approx(fit["loss"], rel=1e-3)
    told = table(cells, "cpu", 2)
    assert NO_FIGURE in told
    ratio = fit["images"][0] / bare["images"][0]
    assert re.search(rf"^fit +[0-9.]+ +{ratio:.3f} +[0-9]+ +{fit['loss']:.4f}$", told, re.MULTILINE)
    assert re.search(r"^2 sites +[0-9]+$", told, re.MULTILINE)


def test_without_a_gpu_it_says_how_to_try_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"finds no GPU here; --device cpu .* no figure of a GPU"):
        main([])
