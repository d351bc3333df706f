"""Methods are LightningModules: a stock Trainer fits, validates, tests and predicts on one site's data module."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from fedseg.algorithms import ALGORITHMS
from fedseg.algorithms.fedprox import FedProx
from fedseg.algorithms.recipe import Recipe, Training
from fedseg.algorithms.stock import dice
from fedseg.datamodules import MultiCenterDataModule
from fedseg.datamodules.phantom.data import PhantomDataModule
from fedseg.evaluation import score
from tests.world import CPU, TinyNet, build, toy_sites


@pytest.fixture(scope="module")
def data() -> MultiCenterDataModule:
    return PhantomDataModule(n_sites=2, cases_per_site=10, amount=0, size=32, resolution=32, batch_size=2)


def trainer(folder: Path, **more: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(max_epochs=1, enable_checkpointing=False, default_root_dir=folder, **{**quiet, **more})


ALONE = [name for name, method in ALGORITHMS.items() if method.views and not method.one_column_per_site]


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
def test_a_stock_trainer_fits_validates_tests_and_predicts(
    name: str, data: MultiCenterDataModule, tmp_path: Path
) -> None:
    module, site = build(name), data.of("site_01")
    stock = trainer(tmp_path)
    stock.fit(module, datamodule=site)
    (validated,) = stock.validate(module, datamodule=site, verbose=False)
    (tested,) = stock.test(module, datamodule=site, verbose=False)
    assert 0 <= validated["val_dice"] <= 1
    assert 0 <= tested["test_dice"] <= 1
    assert tested["test_loss"] > 0
    answers = torch.cat(stock.predict(module, datamodule=site))
    assert len(answers) == len(data.site("site_01").cases("test"))
    assert ((answers >= 0) & (answers <= 1)).all()


def test_the_site_alone_is_shown(data: MultiCenterDataModule, tmp_path: Path) -> None:
    site = data.of("site_02")
    batches = [*site.train_dataloader(), *site.val_dataloader(), *site.test_dataloader()]
    shown = {case for batch in batches for case in batch["case"]}
    assert shown == {row["case"] for row in data.splits() if row["site"] == "site_02"}


def test_forward_is_the_networks_logits_of_the_model_a_site_would_use() -> None:
    images = torch.rand(2, 3, 12, 12)
    shared, own = build("fedavg").eval(), build("ditto").eval()
    torch.testing.assert_close(shared(images).sigmoid(), shared.predict(images, "global"))
    torch.testing.assert_close(own(images).sigmoid(), own.predict(images, "personal"))


def test_a_method_whose_model_is_made_of_several_sites_says_so() -> None:
    with pytest.raises(ValueError, match=r"made of what the sites of a federation send each other; train it with"):
        build("lcfed")(torch.rand(1, 3, 12, 12))


def test_a_method_without_a_model_that_segments_says_so() -> None:
    with pytest.raises(ValueError, match="pre-trains an encoder; it has no model that segments"):
        build("contrastive")(torch.rand(1, 3, 12, 12))


def test_the_quick_dice_is_the_reported_one_case_by_case() -> None:
    torch.manual_seed(1)
    answer, mask = torch.rand(3, 2, 8, 8) > 0.5, (torch.rand(3, 2, 8, 8) > 0.6).float()
    mask[2, 1], answer[2, 1] = 0, False  # nothing there, nothing found: undefined
    pairs = [(answer[i, r].numpy(), mask[i, r].bool().numpy()) for i in range(3) for r in range(2)]
    expected = [score(found[None], true[None], None, ("dice",), 1.0)["dice"] for found, true in pairs[:-1]]
    torch.testing.assert_close(dice(answer, mask), torch.tensor(expected))


def test_settings_are_hyper_parameters_and_a_checkpoint_opens_with_them(
    data: MultiCenterDataModule, tmp_path: Path
) -> None:
    module = build("fedprox", mu=0.3)
    assert dict(module.hparams) == {"mu": 0.3}
    stock = trainer(tmp_path)
    stock.fit(module, datamodule=data.of("site_01"))
    stock.save_checkpoint(tmp_path / "own.ckpt")
    recipe = Recipe.build(Training(lr=1e-2), "sigmoid", in_channels=3)
    again = type(module).load_from_checkpoint(tmp_path / "own.ckpt", model=TinyNet(), recipe=recipe)
    assert isinstance(again, FedProx)
    assert again.mu == 0.3
    images = torch.rand(1, 3, 12, 12)
    torch.testing.assert_close(again.predict(images, "global"), module.predict(images, "global"))


def test_a_round_warns_of_nothing() -> None:
    """A validation step without validation data is what a local fit is meant to be."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        CPU.fit(build("fedavg"), toy_sites()["s0"].train_batches(1, 2))
    assert not [str(w.message) for w in heard if "LeafSpec" not in str(w.message)]
