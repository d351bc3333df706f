"""A stock Trainer trains on the pooled data."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from fedseg.datamodules import FolderDataModule
from tests.data_files import make_sites


class Pixelwise(pl.LightningModule):
    """A 1 x 1 convolution that notes what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(3, 1, 1)
        self.shown: list[list[str]] = []
        self.scored: list[str] = []

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        self.shown.append(batch["case"])
        return nn.functional.binary_cross_entropy_with_logits(self.net(batch["image"]), batch["mask"])

    def validation_step(self, batch: dict[str, Any], index: int) -> None:
        self.scored += batch["case"]

    def test_step(self, batch: dict[str, Any], index: int) -> None:
        self.scored += batch["case"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(root: Path, tmp_path: Path) -> tuple[Pixelwise, FolderDataModule]:
    pl.seed_everything(3)
    module = Pixelwise()
    data = FolderDataModule(root=str(root), size=16, batch_size=4)
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, datamodule=data)
    assert len(module.scored) == 2 * len(data.pooled().cases("val"))
    module.scored.clear()
    trainer.test(module, datamodule=data, verbose=False)
    return module, data


def test_a_stock_trainer_fits_and_tests(tmp_path: Path) -> None:
    root = make_sites(tmp_path / "data", "alpha", "beta")
    module, data = fit(root, tmp_path)
    pooled = data.pooled()
    assert len(module.shown) == 2 * pooled.steps()
    first, second = module.shown[: pooled.steps()], module.shown[pooled.steps() :]
    assert first != second, "every epoch has an order of its own"
    assert {name for names in first for name in names} == {case.case for case in pooled.cases("train")}
    assert module.scored == [case.case for case in pooled.cases("test")]
    again, _ = fit(root, tmp_path)
    assert again.shown == module.shown
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))
