"""Methods, networks and data sets from outside the repository, by `package.module:Name`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

import compare
import evaluate
import export
import predict
import train
from fedseg.configs.compose import ConfigError, compose
from fedseg.launch.settings import SCHEMA
from fedseg.launch.site import Local
from fedseg.reporting.folder import RunFolder
from tests.data_files import make_sites

PARTS = '''
from pydantic import NonNegativeFloat
from monai.networks.nets import BasicUNet
from torch import nn

from fedseg.algorithms.fedavg import FedAvg
from fedseg.datamodules import FolderDataModule


class Calm(FedAvg):
    """Calm (a test): the task loss, plus the squared norm of the output.

    Args:
        strength: of the new term.
    """

    leaves_out_unknown = True

    def __init__(self, *args, strength: NonNegativeFloat = 0.1, **kwargs):
        super().__init__(*args, **kwargs)
        self.strength = strength

    def loss(self, batch):
        logits = self.model(self.normalize(batch["image"]))
        return self.task_loss(logits, batch) + self.strength * logits.square().mean()


class Plain(nn.Module):
    """Two convolutions and a normalisation."""

    def __init__(self, in_channels: int, classes: int, *, width: int = 4):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, images):
        return self.head(self.body(images))


def basic_unet(in_channels: int, classes: int, *, first: int = 8):
    """MONAI's BasicUNet."""
    widths = (first, first, 2 * first, 2 * first, 2 * first, first)
    return BasicUNet(spatial_dims=2, in_channels=in_channels, out_channels=classes, features=widths)


class Mine(FolderDataModule):
    """A folder with a batch size of its own."""

    def __init__(self, *, root: str, batch_size: int = 3, **kwargs):
        super().__init__(root=root, batch_size=batch_size, **kwargs)


NUMBER = 3
'''
SMALL = ["data.size=32", "federation.rounds=1", "federation.local_steps=2", "trainer.threads=1"]
SMALL += ["evaluation.overlays=false", "evaluation.metrics=[dice]"]


@pytest.fixture(autouse=True)
def _parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outside_parts.py").write_text(PARTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("network", ["outside_parts:Plain", "outside_parts:basic_unet"])
def test_a_run_of_outside_parts_trains_scores_predicts_and_exports(network: str, tmp_path: Path) -> None:
    root = make_sites(tmp_path / "data", "alpha", "beta")
    parts = ["algorithm=outside_parts:Calm", "algorithm.strength=0.2", "data=outside_parts:Mine", f"data.root={root}"]
    assert train.main([*parts, f"model={network}", "algorithm.personal=normalisation", "output=run", *SMALL]) == 0
    config = RunFolder("run").read_config()
    assert "name: outside_parts:Calm" in config
    assert evaluate.main(["run"]) == 0
    assert compare.main(["run"]) == 0
    assert predict.main(["run", "--site", "alpha", "--images", str(root / "alpha" / "images"), "--out", "masks"]) == 0
    assert list(Path("masks/masks").iterdir())
    assert export.main(["run", "--out", "models"]) == 0
    with safe_open("models/personal-alpha.safetensors", "pt") as file:
        facts = file.metadata()
    assert json.loads(facts["network"])["name"] == network
    assert network in Path("models/personal-alpha.md").read_text()


def test_an_outside_parts_settings_are_checked_as_ours() -> None:
    config = compose(["algorithm=outside_parts:Calm", "model=outside_parts:Plain", "model.width=6"], SCHEMA)
    assert (config.algorithm.strength, config.model.width) == (0.1, 6)
    with pytest.raises(ConfigError, match=r"algorithm\.strength=-1"):
        compose(["algorithm=outside_parts:Calm", "algorithm.strength=-1"], SCHEMA)
    with pytest.raises(ConfigError, match=r"did you mean 'model\.width'"):
        compose(["model=outside_parts:Plain", "model.widht=6"], SCHEMA)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("algorithm=no_such_module:Calm", "there is no module no_such_module, neither in .* nor installed"),
        ("algorithm=outside_parts:Clam", "the module outside_parts has no Clam"),
        ("algorithm=outside_parts:Plain", "Plain is not a subclass of Algorithm"),
        ("data=outside_parts:Plain", "Plain is not a subclass of MultiCenterDataModule"),
        ("model=outside_parts:NUMBER", "NUMBER is not a function or a class"),
        ("algorithm=outside_parts", "algorithm=package.module:Name"),
    ],
)
def test_a_part_that_cannot_be_used_is_refused(setting: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        compose([setting], SCHEMA)


def test_a_method_that_needs_parts_says_which_are_missing(capsys: pytest.CaptureFixture[str]) -> None:
    for method in ("fedper", "lcfed", "contrastive", "feddg"):
        assert train.main([f"algorithm={method}", "model=outside_parts:Plain", f"output={method}", *SMALL]) == 2
        told = capsys.readouterr().err
        assert "segmentation_head" in told or "encoder" in told
        assert "Traceback" not in told
        assert not Path(method).exists()


def test_an_encoder_does_not_pass_to_an_outside_network(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    root = f"data.root={make_sites(tmp_path / 'data', 'alpha', 'beta')}"
    assert train.main(["algorithm=fedavg", "data=folder", root, "output=first", *SMALL]) == 0
    wanted = ["algorithm=fedavg", "data=folder", root, "model=outside_parts:Plain", "pretrained=first", "output=second"]
    assert train.main([*wanted, *SMALL]) == 2
    assert "an encoder passes between networks of this suite only" in capsys.readouterr().err


def test_a_site_imports_an_outside_part_only_where_it_agreed(tmp_path: Path) -> None:
    config = compose(["algorithm=outside_parts:Calm"], SCHEMA)
    with pytest.raises(ConfigError, match=r"once its node-config says parts='outside_parts:Calm'"):
        Local("a", tmp_path).applied(config)
    agreed = Local.read({"site": "a", "state": str(tmp_path), "parts": "outside_parts:Calm"})
    assert agreed.applied(config).algorithm.name == "outside_parts:Calm"
