"""Methods, networks and data sets from outside the repository, by `package.module:Name`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import compare
import evaluate
import export
import predict
import train
from fedseg.algorithms.optimizer_state import pack_optimizer
from fedseg.common.parts import imported
from fedseg.configs.compose import ConfigError, compose
from fedseg.configs.help import explained
from fedseg.launch.experiment import Experiment
from fedseg.launch.settings import SCHEMA
from fedseg.launch.sites.site import Local
from fedseg.models.losses import OwnLoss
from fedseg.reporting.folder import RunFolder
from tests.data_files import make_sites
from tests.tiers import every

PARTS = '''
import torch
from pydantic import NonNegativeFloat, PositiveInt
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


def pixelwise(logits, mask, known=None, *, scale: NonNegativeFloat = 1.0):
    """Cross entropy of a region's pixels.

    Args:
        scale: of the loss.
    """
    terms = nn.functional.binary_cross_entropy_with_logits(logits.float(), mask, reduction="none")
    return scale * (terms.mean() if known is None else (terms * known).sum() / known.sum().clamp(min=1))


class Everywhere(nn.Module):
    """A loss that knows nothing of pixels without labels; its arguments are settings."""

    def __init__(self, scale: float = 1.0, reduction: str = "mean"):
        super().__init__()
        self.scale, self.reduction = scale, reduction

    def forward(self, logits, mask):
        found = nn.functional.binary_cross_entropy_with_logits(logits.float(), mask, reduction=self.reduction)
        return self.scale * found


def no_optimizer(parameters, lr):
    return lr


def halving(past, rounds, *, every: PositiveInt = 1):
    """Half of it after every few rounds."""
    return 0.5 ** (past // every)


def rising(past, rounds):
    return float("inf") if past else 1.0


NUMBER = 3
'''
SMALL = ["data.size=32", "federation.rounds=1", "federation.local_steps=2", "trainer.threads=1"]
SMALL += ["evaluation.overlays=false", "evaluation.metrics=[dice]"]


@pytest.fixture(autouse=True)
def _parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outside_parts.py").write_text(PARTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("network", every(["outside_parts:Plain", "outside_parts:basic_unet"], ["outside_parts:Plain"]))
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


@pytest.mark.slow
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


# ------------------------------------------------------------------------------------------- parts of a training step

STEP = ["algorithm=fedavg", "training.lr=0.02", "federation.rounds=2"]


OWN = "training.loss=outside_parts:pixelwise"


def scores_of(output: str, *settings: str) -> str:
    assert train.main([*SMALL, *STEP, *settings, f"output={output}"]) == 0
    return told_by(output)


def told_by(output: str) -> str:
    """Losses to the last digit, and scores."""
    folder = RunFolder(output)
    losses = folder.rounds()[["round", "site", "loss"]].to_csv()
    return losses + (folder.path / "metrics.csv").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss", every([f"outside_parts:{name}" for name in ("pixelwise", "Everywhere")], ["outside_parts:Everywhere"])
)
def test_loss_optimiser_and_schedule_from_outside_train_as_the_suites_own(loss: str, tmp_path: Path) -> None:
    data = ["data=folder", f"data.root={make_sites(tmp_path / 'data', 'alpha', 'beta')}"]
    ours = ["training.loss=bce", "training.optimizer=sgd", "training.momentum=0.5"]
    ours += ["training.schedule=step", "training.decay=0.5", "training.decay_every=1"]
    theirs = [f"training.loss={loss}", "training.optimizer=torch.optim:SGD", "training.schedule=outside_parts:halving"]
    theirs += ["training.optimizer_options={momentum: 0.5, fused: true}"]
    expected = scores_of("ours", *data, *ours)
    assert scores_of("theirs", *data, *theirs) == expected
    assert scores_of("other", *data, *theirs, "training.loss_options={scale: 3}") != expected
    assert predict.main(["theirs", "--images", str(tmp_path / "data/alpha/images"), "--out", "masks"]) == 0
    assert train.main(["output=theirs", "resume=true", "federation.rounds=3"]) == 2, "its schedule may know its end"


@pytest.mark.exhaustive
def test_an_optimiser_of_a_library_keeps_its_state_at_the_site(tmp_path: Path) -> None:
    data = ["data=folder", f"data.root={make_sites(tmp_path / 'data', 'alpha', 'beta')}"]
    chosen = ["training.optimizer=torch.optim:RMSprop", "training.optimizer_options={alpha: 0.9}"]
    kept = scores_of("kept", *data, *chosen, "training.optimizer_state=keep")
    assert kept != scores_of("reset", *data, *chosen)
    parts = scores_of("parts", *data, *chosen, "training.optimizer_state=keep", "federation.rounds=1")
    assert parts != kept
    assert train.main(["output=parts", "resume=true", "federation.rounds=2"]) == 0
    assert told_by("parts") == kept


def test_settings_of_parts_of_a_step_are_checked_by_their_signatures() -> None:
    config = compose(["training.loss=outside_parts:pixelwise", "training.loss_options.scale=2"], SCHEMA)
    assert config.training.loss_options == {"scale": 2.0}
    again = compose(["training.loss=tversky"], SCHEMA, base=config)
    assert again.training.loss_options is None, "another loss drops the settings of the one before"
    helped = explained(SCHEMA, "training.loss=outside_parts:pixelwise")
    assert "training.loss_options.scale = 1.0   [float >= 0]\n      of the loss." in helped
    assert "training.optimizer_options.alpha = 0.99" in explained(SCHEMA, "training.optimizer=torch.optim:RMSprop")
    assert "training.loss_options.beta = 0.5" in explained(SCHEMA, "training.loss=tversky")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            ["training.loss=outside_parts:pixelwise", "training.loss_options={scale: -1}"],
            r"loss_options\.scale=-1 should",
        ),
        (["training.loss=outside_parts:pixelwise", "training.loss_options={scael: 1}"], r"did you mean .*scale"),
        (["training.loss_options={alpha: 1}"], r"training\.loss=auto has no settings of its own; leave out"),
        (["training.loss=outside_parts:none"], "the module outside_parts has no none"),
        (["training.loss=outside_parts:NUMBER"], "NUMBER is not a function or a class"),
        (["training.loss=outside_parts"], "or package.module:Name"),
        (["training.loss=Dice"], "write training.loss=dice"),
        (["training.optimizer=no_such:Name"], "there is no module no_such"),
        (["training.optimizer=outside_parts:no_optimizer"], r"which is no torch\.optim\.Optimizer"),
        (["training.optimizer=outside_parts:halving"], "cannot be called as it should: missing a required"),
        (["training.optimizer=torch.optim:SGD", "training.momentum=0.5"], r"optimizer_options=\{momentum: 0\.5\}"),
        (["training.schedule=outside_parts:rising"], "returned inf for round 1 of 3; it should be a factor"),
        (["training.schedule=outside_parts:halving", "training.warmup=3"], "leaves no round of federation.rounds=3"),
        (["training.loss=tversky", "training.loss_options={alpha: 0, beta: 0}"], "make one of them positive"),
        (["training.region_weights={disk: 2}"], "'disk' is no region; known: disc, cup"),
        (["training.region_weights={background: 2}"], "'background' is no region; known: disc, cup"),
        (["training.region_weights={disc: 0}"], "region_weights"),
        (
            ["training.region_weights={disc: 2}", "training.loss=outside_parts:pixelwise"],
            "leave training.region_weights out",
        ),
        (
            ["data.ignore_labels=[3]", "training.loss=outside_parts:Everywhere"],
            "has no argument `known`.*background_labels",
        ),
    ],
)
def test_a_part_of_a_step_that_cannot_be_used_is_refused(settings: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check("federation.rounds=3", *settings)


def check(*settings: str) -> None:
    root = ["data=folder", "data.root=nowhere", "data.regions={disc: [1, 2], cup: [2]}"]
    Experiment(compose(["algorithm=fedavg", *root, *settings], SCHEMA)).check()


@pytest.mark.parametrize(
    "settings",
    [
        ["training.optimizer=torch.optim:SGD", "training.optimizer_options={momentum: 0.5}"],
        ["training.loss=outside_parts:Everywhere", "data.background_labels=[3]"],
        [OWN, "data.ignore_labels=[3]"],
        ["training.region_weights={cup: 2}", "training.loss=lovasz", "data.ignore_labels=[3]"],
        ["training.region_weights={background: 2}", "data.exclusive=true", "data.regions={rim: [1], cup: [2]}"],
    ],
)
def test_the_cures_are_taken(settings: list[str]) -> None:
    check("federation.rounds=3", *settings)


def test_a_loss_that_is_no_mean_is_refused_where_it_is_computed() -> None:
    loss = build_own("Everywhere", reduction="none")
    with pytest.raises(ValueError, match=r"returned a tensor of shape \(1, 2, 4, 4\), not a scalar; take its mean"):
        loss(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4))
    with pytest.raises(ValueError, match="has no argument `known`"):
        build_own("Everywhere")(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4), torch.ones(1, 2, 4, 4))


def build_own(name: str, **options: Any) -> OwnLoss:
    return OwnLoss(imported(f"outside_parts:{name}", "training.loss"), options, name)


def test_what_an_optimiser_keeps_beside_tensors_cannot_be_stored() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.LBFGS([weight])
    optimizer.step(lambda: (weight**2).sum())
    with pytest.raises(ValueError, match=r"LBFGS keeps \w+ as \w+.* take training\.optimizer_state=reset"):
        pack_optimizer(optimizer, ["weight"])


@pytest.mark.parametrize("key", ["loss", "optimizer", "schedule"])
def test_a_site_imports_parts_of_a_step_only_where_it_agreed(key: str, tmp_path: Path) -> None:
    path = {"optimizer": "torch.optim:SGD", "loss": "outside_parts:pixelwise", "schedule": "outside_parts:halving"}[key]
    config = compose([f"training.{key}={path}"], SCHEMA)
    with pytest.raises(ConfigError, match=rf"the run uses training\.{key}={path}.*parts='{path}'"):
        Local("a", tmp_path).applied(config)
    agreed = Local.read({"site": "a", "state": str(tmp_path), "parts": path})
    assert agreed.applied(config).training[key] == path
