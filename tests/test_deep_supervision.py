"""Heads that answer in training only: their losses, which methods learn with them, and that nobody else hears them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import DynUNet

import export
import train
from fedseg.algorithms import ALGORITHMS
from fedseg.algorithms.fedavg import FedAvg
from fedseg.algorithms.recipe import Recipe, Training
from fedseg.configs.compose import ConfigError, compose
from fedseg.federation.contract import Batch
from fedseg.launch.experiment import Experiment
from fedseg.launch.folders.reopen import Reopened
from fedseg.launch.folders.saved import SavedModels
from fedseg.launch.settings import SCHEMA
from fedseg.models import create_monai_model, part
from fedseg.models.volumes import auxiliary_heads
from fedseg.reporting.folder import RunFolder
from tests.tiers import every

HEADS = 2
REFUSED = {"fedrod", "moe", "prrfl", "apfl", "feddg", "lcfed", "fedvss"}
SETTINGS = (
    "data=phantom", "data.anatomy=organ", "data.slices=6", "data.resolution=32", "data.n_sites=3",
    "data.cases_per_site=6", "data.amount=0", "data.fit=patches", "data.size=16", "data.batch_size=4", "model=unet3d",
    "model.architecture=dynunet", "model.levels=4", "model.width=4", "model.norm=batch",
    f"model.deep_supervision={HEADS}", "federation.rounds=1", "federation.local_steps=2", "trainer.threads=1",
    "trainer.accelerator=cpu", "evaluation.overlays=false", "evaluation.metrics=[dice]",
)  # fmt: skip


def network(heads: int = HEADS) -> torch.nn.Module:
    torch.manual_seed(0)
    return create_monai_model(1, 2, architecture="dynunet", width=4, norm="batch", deep_supervision=heads)


def test_heads_answer_as_monai_s_and_in_training_only() -> None:
    steps = [[1] * 3, *[[2] * 3] * 3]
    torch.manual_seed(0)
    supervision: dict[str, Any] = {"deep_supervision": True, "deep_supr_num": HEADS}
    filters = [4, 8, 16, 32]
    original = DynUNet(3, 1, 2, [3] * 4, steps, steps[1:], filters, norm_name="batch", **supervision).train()
    ours, images = network().train(), torch.rand(2, 1, 16, 16, 16)
    finest = original(images)[:, 0]
    for one, other in zip(ours(images), (finest, *original.heads), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(ours.eval()(images), original.eval()(images))
    assert auxiliary_heads(ours) == HEADS
    inside = {name for name in ours.state_dict() if "auxiliary" in name}
    assert inside
    assert inside <= part("segmentation_head")(ours)
    assert network(0).state_dict().keys() == {
        name.replace("segmentation_head.main.", "segmentation_head.") for name in ours.state_dict().keys() - inside
    }


@pytest.mark.parametrize("labels", ["known", "partly"])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_the_loss_is_the_weighted_mean_over_heads(activation: Any, labels: str) -> None:
    torch.manual_seed(0)
    regions = 2 if activation == "sigmoid" else 1
    recipe = Recipe.build(Training(normalize="none"), activation, 1, regions=("a", "b")[:regions])
    method = FedAvg(network().train(), recipe)
    mask = (torch.rand(2, regions, 16, 16, 16) > 0.6).float()
    batch = {"image": torch.rand(2, 1, 16, 16, 16), "mask": mask}
    if labels == "partly":
        batch["known"] = (torch.rand_like(mask) > 0.3).float()
    found = method.loss(batch)
    fine, half, quarter = method.model(batch["image"].contiguous(memory_format=torch.channels_last_3d))
    assert [tuple(logits.shape[2:]) for logits in (fine, half, quarter)] == [(16,) * 3, (8,) * 3, (4,) * 3]
    terms = []
    for logits, step, first in ((fine, 1, 0), (half, 2, 1), (quarter, 4, 2)):  # the pixel in the middle of its block
        seen = (..., *[slice(first, None, step)] * 3)
        terms.append(recipe.loss(logits, mask[seen], batch["known"][seen] if labels == "partly" else None))
    assert found.item() == pytest.approx((4 * terms[0] + 2 * terms[1] + terms[2]).item() / 7, rel=1e-5)
    assert len({round(term.item(), 4) for term in terms}) == 3


@pytest.fixture(scope="module")
def batch() -> Batch:
    data = Experiment(compose(list(SETTINGS), SCHEMA)).data
    data.setup()
    made: Batch = next(iter(data.site("site_01").train_batches(0, 1)))
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", every([name for name, method in ALGORITHMS.items() if method.labelled]))
def test_every_method_learns_with_all_heads_or_says_why_not(name: str, batch: Batch) -> None:
    experiment = Experiment(compose([f"algorithm={name}", *SETTINGS], SCHEMA))
    if name in REFUSED:
        with pytest.raises(ConfigError, match=re.escape(f"one answer only: {ALGORITHMS[name].one_answer}; take")):
            experiment.check()
        Experiment(compose([f"algorithm={name}", *SETTINGS, "model.deep_supervision=0"], SCHEMA)).check()
        return
    worker = experiment.algorithm(in_channels=1)
    worker.loss(batch).backward()
    auxiliary = [p.grad for key, p in worker.named_parameters() if "auxiliary" in key and p.requires_grad]
    assert sum(gradient is not None and bool(gradient.any()) for gradient in auxiliary) >= 2 * HEADS
    images = torch.rand(1, 1, 20, 24)
    assert worker.predict(images, worker.views[0]).shape == (1, 2, 20, 24)


def test_a_loss_of_one_s_own_is_not_trusted_with_several_answers() -> None:
    class Own(FedAvg):
        def loss(self, batch: Batch) -> torch.Tensor:
            found: torch.Tensor = self.model(batch["image"]).mean()
            return found

    recipe = Recipe.build(Training(), "sigmoid", 1, regions=("a", "b"))
    with pytest.raises(ValueError, match=r"model.deep_supervision=2: Own .* its own loss may read"):
        Own(network(), recipe)
    Own(network(0), recipe)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"architecture": "unet"}, "unet has no auxiliary heads: take model.deep_supervision=0"),
        ({"architecture": "dynunet", "levels": 3}, "3 levels have at most 1 auxiliary heads"),
    ],
)
def test_networks_without_such_heads_refuse_them(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        create_monai_model(1, 1, deep_supervision=HEADS, **settings)


@pytest.mark.slow
def test_heads_stay_with_a_personal_head_and_exported_models_answer_once(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    assert train.main(["algorithm=fedper", *SETTINGS, f"output={run}"]) == 0
    worker = SavedModels(Reopened.read(RunFolder(run))).load("personal", "site_01")
    heads = {name for name in worker.model.state_dict() if "auxiliary" in name}
    assert heads
    assert heads <= {*worker.parts.stays}
    assert export.main([str(run), "--out", str(out), "--site", "site_01"]) == 0
    images = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    answer = torch.jit.load(out / "personal-site_01.pt")(images)
    torch.testing.assert_close(answer.sigmoid(), worker.predict(images, "personal"), rtol=0, atol=1e-5)


def test_the_page_names_the_methods_that_refuse_such_heads() -> None:
    page = (Path(__file__).parent.parent / "docs" / "volumes.md").read_text()
    told = page.partition("refuse: ")[2].partition(". ")[0]
    assert set(re.findall(r"`(\w+)`", told)) == REFUSED == {name for name, m in ALGORITHMS.items() if m.one_answer}
