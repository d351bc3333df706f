"""Models that are sure of the images of a site that took no part: entropy minimisation, after any method."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import predict
from fedseg.algorithms.functional.adaptation import affine_weights, minimise_entropy, normalized_entropy
from fedseg.launch.experiment import Experiment
from fedseg.launch.folders.reopen import Reopened
from fedseg.launch.run import execute
from fedseg.launch.scores.rescore import difference, rescore
from fedseg.launch.scores.scoring import Scorer, fitted
from fedseg.launch.settings import Evaluation
from fedseg.reporting.folder import RunFolder
from fedseg.reporting.summary import ENTROPY, OWN_STATISTICS
from tests.test_own_statistics import masks_of, stored
from tests.tiers import every, firsts
from tests.tiny_run import phantom_run

settings = partial(phantom_run, 3)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)], ids=str)
def test_scales_and_shifts_alone_learn_to_be_sure(norm: nn.Module, activation: Literal["sigmoid", "softmax"]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    model[3].requires_grad_(False)
    batches = [torch.rand(3, 3, 8, 8) for _ in range(2)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learning = [parameter.requires_grad for parameter in model.parameters()]

    def entropy() -> float:
        with torch.no_grad():
            return float(sum(normalized_entropy(model(batch), activation) for batch in batches))

    at_first = entropy()
    minimise_entropy(model, batches, activation, passes=20, lr=0.01)
    assert entropy() < at_first
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"1.weight", "1.bias"}
    assert len(affine_weights(model)) == 2
    assert [parameter.requires_grad for parameter in model.parameters()] == learning
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training


def test_no_pass_changes_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    minimise_entropy(model, [torch.rand(2, 3, 4, 4)], "sigmoid", passes=0, lr=0.001)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize(("settled", "views"), firsts([
    (("algorithm=ditto",), {"global", OWN_STATISTICS, ENTROPY}),
    (("algorithm=fedavg", "model.norm=group", "training.harmonise=zscore"), {"global", ENTROPY}),
    (("algorithm=fedbn",), set()),
], 1))  # fmt: skip
def test_it_is_scored_at_sites_that_took_no_part_and_nothing_else_changes(
    settled: tuple[str, ...], views: set[str], tmp_path: Path
) -> None:
    execute(settings(tmp_path / "with", *settled, "evaluation.entropy_passes=2"))
    execute(settings(tmp_path / "without", *settled))
    rows, plain = (RunFolder(tmp_path / name).scores() for name in ("with", "without"))
    outside = rows[~rows["seen"]]
    assert set(outside["view"]) == views
    assert ENTROPY not in set(rows.loc[rows["seen"], "view"])
    pd.testing.assert_frame_equal(rows[rows["view"] != ENTROPY].reset_index(drop=True), plain)
    if views:
        counts = outside.groupby(["view", "checkpoint"]).size()
        assert counts["global", "last"] == counts[ENTROPY, "last"] == counts[ENTROPY, "best"] > 0
        found = {view: table["value"].to_numpy() for view, table in outside.groupby("view")}
        assert all((found[ENTROPY] != found[view]).any() for view in views - {ENTROPY})
        again = rescore(RunFolder(tmp_path / "with"))
        assert difference(again, rows) == (0, len(again))


@pytest.mark.slow
@pytest.mark.parametrize("per", every(["site", "case"], ["case"]))
def test_predictions_are_those_that_were_scored_and_are_refused_where_none_were(
    per: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a model per case answers does not depend on the other images."""
    execute(
        settings(
            tmp_path / "with",
            "algorithm=fedavg",
            "evaluation.entropy_passes=3",
            f"evaluation.entropy_per={per}",
            "evaluation.entropy_lr=0.02",
        )
    )
    execute(settings(tmp_path / "without", "algorithm=fedavg"))
    run: Any = Reopened.read(RunFolder(tmp_path / "with"))
    run.prepare_data()
    cases = stored(run, "site_03", tmp_path / "new")
    asked = ["--images", str(tmp_path / "new"), "--view", ENTROPY, "--out", str(tmp_path / "out")]
    assert predict.main([str(tmp_path / "without"), *asked]) != 0
    assert "no entropy model" in capsys.readouterr().err
    assert predict.main([str(tmp_path / "with"), *asked]) == 0
    rows = run.folder.scores().query("checkpoint == 'best' and metric == 'dice'")
    told = rows[rows["view"] == ENTROPY].set_index(["case", "region"])["value"]
    site = run.experiment.data.site("site_03")
    for case in cases:
        truth = run.experiment.data.regions.encode(torch.tensor(site.truth(case))).numpy().astype(bool)[0]
        for region, mask, true in zip(("disc", "cup"), masks_of(tmp_path / "out", case), truth, strict=True):
            assert 2 * (mask & true).sum() / (mask.sum() + true.sum()) == pytest.approx(told[case, region])
    assert difference(rescore(run.folder), run.folder.scores())[0] == 0
    if per == "case":
        (alone,) = (tmp_path / "new").glob(f"{cases[0]}.*")
        asked = ["--images", str(alone), "--view", ENTROPY, "--out", str(tmp_path / "alone")]
        assert predict.main([str(tmp_path / "with"), *asked]) == 0
        assert np.array_equal(masks_of(tmp_path / "alone", cases[0]), masks_of(tmp_path / "out", cases[0]))


def test_a_site_gives_its_cases_one_by_one(tmp_path: Path) -> None:
    config = settings(tmp_path / "run", "algorithm=fedavg", "data.batch_size=2")
    data = Experiment(config).data
    data.prepare_data()
    data.setup("fit")
    site = data.site("site_03")
    parts = list(site.singly("test"))
    assert [[case.case for case in part.cases("test")] for part in parts] == [[c.case] for c in site.cases("test")]
    whole, apart = (
        torch.cat([b["image"] for one in sites for b in one.input_batches("test")]) for sites in ([site], parts)
    )
    assert torch.equal(whole, apart)


def test_models_per_case_without_passes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"take evaluation\.entropy_passes=3, or leave entropy_per out"):
        Evaluation(entropy_per="case")
    Evaluation(entropy_per="case", entropy_passes=3)


def test_the_learning_rate_is_the_settings_and_none_without_passes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"take evaluation\.entropy_passes=3, or leave entropy_lr out"):
        Evaluation(entropy_lr=0.01)
    run = Experiment(settings(tmp_path / "run", "algorithm=fedavg"))
    run.data.prepare_data()
    run.data.setup("fit")
    site = run.data.site("site_03")
    worker = run.in_process({"site_03": site}, Scorer(run)).worker
    start = affine_weights(worker.network("global"))
    near, far = (
        affine_weights(network)
        for lr in (1e-5, 1e-2)
        for network, _ in fitted(worker, ENTROPY, site, Evaluation(entropy_passes=1, entropy_lr=lr))
    )
    moved = [max(float((a - b).detach().abs().max()) for a, b in zip(one, start, strict=True)) for one in (near, far)]
    assert moved == pytest.approx([1e-5, 1e-2], rel=0.3)  # the first step of Adam has the size of its rate
