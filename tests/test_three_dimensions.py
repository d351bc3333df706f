"""Learning from volumes: networks of MONAI, every method's step, a run from NIfTI files to masks in their geometry."""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
from monai.inferers import sliding_window_inference
from monai.networks.nets import BasicUNet, DynUNet, SegResNet, SwinUNETR
from safetensors.torch import load_file

import compare
import export
import predict
import train
from fedseg.algorithms import ALGORITHMS
from fedseg.configs.compose import ConfigError, compose
from fedseg.federation.contract import EvaluateTask
from fedseg.federation.state import State
from fedseg.launch.check import main as check_command
from fedseg.launch.experiment import Experiment
from fedseg.launch.folders.reopen import Reopened
from fedseg.launch.folders.saved import NamedSite, SavedModels
from fedseg.launch.settings import SCHEMA
from fedseg.models import create_model, create_monai_model, normalisation, part
from fedseg.reporting.folder import RunFolder
from tests.data_files import save_volume
from tests.test_predict import OBLIQUE

SMALL = (
    "data.dimensions=3", "data.size=8", "data.batch_size=2", "model=unet3d", "model.architecture=dynunet",
    "model.levels=3", "model.width=4", "federation.rounds=2", "federation.local_steps=2", "trainer.threads=1",
    "trainer.accelerator=cpu", "evaluation.overlays=false", "evaluation.metrics=[dice]", "training.lr=0.01",
)  # fmt: skip
PAGE = (Path(__file__).parent.parent / "docs" / "volumes.md").read_text()
PHANTOM = (
    "data=phantom", "data.anatomy=organ", "data.slices=10", "data.resolution=32", "data.n_sites=3",
    "data.cases_per_site=6", "data.amount=0",
)  # fmt: skip


def originals(name: str, dimensions: int) -> torch.nn.Module:
    steps = [[1] * dimensions, [2] * dimensions, [2] * dimensions]
    built = {
        "unet": lambda: BasicUNet(dimensions, 2, 3, [4, 4, 8, 16, 32, 4], norm="batch"),
        "segresnet": lambda: SegResNet(dimensions, 4, 2, 3, norm="batch"),
        "dynunet": lambda: DynUNet(dimensions, 2, 3, [3] * 3, steps, steps[1:], [4, 8, 16], norm_name="batch"),
        "swin_unetr": lambda: SwinUNETR(2, 3, feature_size=12, norm_name="batch", spatial_dims=dimensions),
    }
    torch.manual_seed(0)
    return built[name]()


@pytest.mark.parametrize(
    ("name", "dimensions"),
    [
        *itertools.product(("unet", "segresnet", "dynunet"), (2, 3)),
        ("swin_unetr", 2),
        pytest.param("swin_unetr", 3, marks=pytest.mark.slow),
    ],
)
def test_a_network_in_parts_is_monai_s(name: str, dimensions: int) -> None:
    original = originals(name, dimensions).train()
    torch.manual_seed(0)
    width = 12 if name == "swin_unetr" else 4
    more = {"levels": 3} if name == "dynunet" else {}
    ours = create_monai_model(2, 3, dimensions, architecture=name, width=width, norm="batch", **more).train()
    images = torch.rand(2, 2, *[32] * dimensions)
    assert torch.equal(ours(images), original(images))
    assert torch.equal(ours.eval()(images), original.eval()(images))  # after the same step of running statistics
    assert {child for child, _ in ours.named_children()} == {"encoder", "decoder", "segmentation_head"}
    assert [m.shape[1] for m in ours.encoder(images)] == list(ours.encoder.out_channels)
    assert part("segmentation_head")(ours)
    assert normalisation(ours)


@pytest.mark.parametrize("norm", ["instance", "group"])
def test_normalisation_is_exchanged_everywhere(norm: Any) -> None:
    network = create_monai_model(1, 1, 3, width=4, norm=norm)
    assert not any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in network.modules())
    images = torch.rand(2, 1, 32, 32, 32)
    one, both = network.eval()(images[:1]), network(images)
    assert torch.allclose(one, both[:1], atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"architecture": "unett"}, "one of unet, segresnet, dynunet, swin_unetr"),
        ({"strides": [[1, 1, 1]] * 3}, "belongs to model.architecture=dynunet"),
        ({"architecture": "dynunet", "levels": 2}, "three levels or more"),
        ({"levels": 3}, "belongs to model.architecture=dynunet; unet has its own: take model.levels=4"),
        ({"architecture": "segresnet", "levels": 5}, "belongs to model.architecture=dynunet; segresnet has its own"),
        (
            {"architecture": "dynunet", "levels": 5, "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]]},
            "are 3 levels; take model.levels=3",
        ),
        ({"architecture": "dynunet", "strides": [[1, 1], [2, 2], [2, 2]]}, "each with 3 steps"),
        ({"architecture": "swin_unetr", "width": 16}, r"multiples of 12, .*; take model.width=12"),
        ({"encoder_weights": "imagenet"}, "encoder_weights=imagenet is no file"),
        ({"encoder_weights_key": "student."}, "belongs to encoder_weights=FILE"),
    ],
)
def test_networks_refuse_what_does_not_fit(settings: dict[str, Any], told: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        create_monai_model(1, 1, 3, **settings)


@pytest.mark.parametrize(
    ("model", "size", "told"),
    [
        (
            ("model.architecture=swin_unetr", "data.dimensions=2", "data.fit=patches"),
            "[40,20]",
            r"multiples of 32, .*; take data.size=\[64, 32\]",
        ),
        (
            ("model.architecture=segresnet", "model.width=4"),
            "[8,8,8]",
            r"multiples of 8, .*; take data.size=\[8, 8, 16\], or model.norm=group",
        ),
        (
            ("model.architecture=dynunet", "model.width=4"),
            "[8,9,6]",
            r"multiples of 8, with model.norm=instance one of them twice .*; take data.size=\[8, 16, 8\]",
        ),
        (("model.architecture=segresnet",), "[8,8,13]", r"multiples of 8; take data.size=\[8, 8, 16\]"),
        (
            ("model.architecture=dynunet", "model.strides=[[1,1,1],[1,2,2],[2,2,2]]"),
            "[6,10,12]",
            r"multiples of 2 x 4 x 4; take data.size=\[6, 8, 12\]",
        ),
    ],
)
def test_sides_that_a_network_cannot_halve_are_refused_before_images_are_read(
    model: tuple[str, ...], size: str, told: str
) -> None:
    settings = [*PHANTOM, "data.dimensions=3", "model=unet3d", *model]
    with pytest.raises(ConfigError, match=told) as refused:
        Experiment(compose([*settings, f"data.size={size}"], SCHEMA)).check()
    for cure in str(refused.value).partition("; take ")[2].split(", or "):
        experiment = Experiment(compose([*settings, f"data.size={size}", cure], SCHEMA))
        experiment.check()
        with torch.no_grad():
            experiment.algorithm(in_channels=1).model.train()(torch.zeros(1, 1, *experiment.data.size))


def test_steps_of_thick_slices_keep_their_number() -> None:
    steps = [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
    network = create_monai_model(1, 2, 3, architecture="dynunet", width=4, strides=steps)
    assert network(torch.rand(1, 1, 6, 16, 16)).shape == (1, 2, 6, 16, 16)
    assert network.encoder(torch.rand(1, 1, 6, 16, 16))[1].shape[2:] == (6, 8, 8)


def test_images_networks_refuse_volumes_with_a_cure() -> None:
    with pytest.raises(ValueError, match=r"take model=unet3d with data.dimensions=3"):
        create_model(1, 1, 3)
    settings = [*PHANTOM, "data.dimensions=3", "data.size=16", "wandb.mode=disabled"]
    with pytest.raises(ConfigError, match="see images, not volumes: take model=unet3d"):
        Experiment(compose(settings, SCHEMA)).check()
    Experiment(compose([*settings, "model=unet3d"], SCHEMA)).check()


@pytest.mark.slow
def test_patches_too_small_for_the_network_are_refused_with_two_cures() -> None:
    settings = [*PHANTOM, *SMALL, "model.architecture=unet", "model.levels=4", "data.size=16"]
    with pytest.raises(ConfigError, match=r"take a larger data.size, or model.norm=group"):
        prepared(settings).check_sites()
    for cure in ("data.size=32", "model.norm=group"):
        prepared([*settings, cure]).check_sites()


def prepared(settings: list[str]) -> Experiment:
    experiment = Experiment(compose(settings, SCHEMA))
    experiment.data.setup()
    return experiment


@pytest.fixture(scope="module")
def batch() -> dict[str, Any]:
    data = Experiment(compose([*PHANTOM, *SMALL], SCHEMA)).data
    data.setup()
    return next(iter(data.site("site_01").train_batches(0, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_method_takes_a_step_on_volumes_or_says_why_not(name: str, batch: dict[str, Any]) -> None:
    more = ["model.norm=batch"] if name == "silobn" else []
    experiment = Experiment(compose([f"algorithm={name}", *PHANTOM, *SMALL, *more], SCHEMA))
    if ALGORITHMS[name].slices_only:
        with pytest.raises(ConfigError, match=r"cannot learn from volumes: its .*; take data.dimensions=2"):
            experiment.check()
        return
    worker = experiment.algorithm(in_channels=1)
    loss = worker.loss(batch)
    loss.backward()
    assert loss.isfinite()
    assert worker.predict(torch.rand(1, 1, 11, 20, 9), worker.views[0]).shape == (1, 2, 11, 20, 9)


def test_styles_of_slices_are_refused_for_volumes() -> None:
    settings = [*PHANTOM, *SMALL, "training.harmonise=fda"]
    with pytest.raises(ConfigError, match=r"replaces amplitudes of slices, and histogram, zscore and combat know vol"):
        Experiment(compose(settings, SCHEMA)).check()


@pytest.mark.parametrize("kind", ["histogram", "zscore", "combat"])
def test_grey_values_of_volumes_are_harmonised_patch_by_patch(kind: str, batch: dict[str, Any]) -> None:
    """The target's mean and deviation, which all of them keep, and nothing of the place of a voxel's value."""
    experiment = Experiment(compose([*PHANTOM, *SMALL, f"training.harmonise={kind}"], SCHEMA))
    experiment.check()
    worker, site = experiment.algorithm(in_channels=1), NamedSite("a")
    images = {"a": batch["image"], "b": batch["image"].flip(-1).square()}
    told = {name: State({"style": worker.style.told([given])}) for name, given in images.items()}
    worker.receive(worker.broadcast(worker.init_server(told), "a", EvaluateTask(1, 0)), State(), site)
    assert worker.loss(batch).isfinite()
    found = worker.preparation[0](batch["image"])
    assert found.shape == batch["image"].shape
    assert not torch.equal(found, batch["image"])
    between = torch.stack([given.mean() for given in images.values()]).mean()
    assert float(found.mean()) == pytest.approx(float(between), abs=0.01)
    turned = worker.preparation[0](batch["image"].flip(2))
    torch.testing.assert_close(turned.flip(2), found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "more"),
    [
        pytest.param(
            "iopfl",
            ("data.unseen=[site_03]", "model.norm=batch", "evaluation.entropy_passes=1"),
            marks=pytest.mark.exhaustive,
        ),
        pytest.param("fedsm", ("data.unseen=[site_03]", "algorithm.gamma=0"), marks=pytest.mark.exhaustive),
        ("fedavg", ("privacy.mechanism=patient", "model.norm=group")),
        ("fedrep", ("data.fit=patches", "data.dimensions=2", "data.size=16", "model=tiny", "model.encoder_depth=2",
                    "model.decoder_channels=[16,8]", "data.unseen=[site_03]")),
    ],
)  # fmt: skip
def test_runs_on_patches_score_every_view_on_whole_cases(method: str, more: tuple[str, ...], tmp_path: Path) -> None:
    small = [word for word in SMALL if not (method == "fedrep" and word.startswith("model"))]
    assert train.main([f"algorithm={method}", *PHANTOM, *small, *more, f"output={tmp_path}/run"]) == 0
    scores = RunFolder(tmp_path / "run").scores()
    tested = scores[(scores["split"] == "test") & (scores["checkpoint"] == "best")]
    assert set(tested["grid"]) == {"own"}
    assert (
        set(tested["view"])
        == {
            "iopfl": {"global", "personal", "adapted", "own-statistics", "entropy"},
            "fedsm": {"global", "personal", "adapted"},
            "fedavg": {"global"},
            "fedrep": {"personal"},
        }[method]
    )


def test_monai_s_own_weights_fill_the_encoder(tmp_path: Path) -> None:
    """Of the whole network, and of a self-supervised transformer, whose file calls two layers otherwise."""
    original = originals("swin_unetr", 2)
    transformer = {f"module.{name}": t for name, t in original.swinViT.state_dict().items()}
    older = {name.replace("mlp.linear", "mlp.fc"): t for name, t in transformer.items()}
    assert older.keys() != transformer.keys()
    for place, content in enumerate((original.state_dict(), {"state_dict": older})):
        torch.save(content, tmp_path / f"{place}.pt")
        settings: dict[str, Any] = {"architecture": "swin_unetr", "freeze_encoder": True}
        ours = create_monai_model(2, 3, 2, encoder_weights=str(tmp_path / f"{place}.pt"), **settings)
        images = torch.rand(1, 2, 64, 32)
        for one, other in zip(ours.encoder(images)[1:], original.swinViT(images), strict=True):
            assert torch.equal(one, other)
    with pytest.raises(ValueError, match=r"the encoder needs \(12, 1, 2, 2\)"):
        create_monai_model(1, 3, 2, encoder_weights=str(tmp_path / "0.pt"), **settings)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_transformer_s_models_are_exported_and_their_encoder_is_the_start_of_another_run(tmp_path: Path) -> None:
    small = [word for word in SMALL if not word.startswith(("model.", "data."))]
    words = [*PHANTOM, *small, "data.fit=patches", "data.dimensions=2", "data.size=32", "data.batch_size=2"]
    words += ["model.architecture=swin_unetr", "model.norm=group", "algorithm=fedrep"]
    first, second, out = (tmp_path / name for name in ("first", "second", "out"))
    assert train.main([*words, f"output={first}"]) == 0
    assert export.main([str(first), "--out", str(out), "--site", "site_01", "--bundle"]) == 0
    name = "personal-site_01"
    weights = load_file(out / f"{name}.safetensors")
    worker = SavedModels(Reopened.read(RunFolder(first))).load("personal", "site_01")
    assert weights.keys() == worker.model.state_dict().keys()
    program = torch.jit.load(out / name / "models" / "model.ts")
    images = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(program(images).sigmoid(), worker.predict(images, "personal"), rtol=0, atol=1e-5)
    start = f"model.encoder_weights={out / name}.safetensors"
    assert train.main([*words, start, "model.freeze_encoder=true", f"output={second}"]) == 0
    again = SavedModels(Reopened.read(RunFolder(second))).load("personal", "site_02").model.state_dict()
    encoder = {key for key in weights if key.startswith("encoder.")}
    assert encoder
    assert all(torch.equal(again[key], weights[key]) for key in encoder)
    assert not all(torch.equal(again[key], weights[key]) for key in weights.keys() - encoder)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two modalities at three sites, oblique, of several sizes and spacings; and a run that resamples them."""
    home = tmp_path_factory.mktemp("volumes")
    for (place, site), number in itertools.product(enumerate(("hospital_a", "hospital_b", "hospital_c")), range(6)):
        rng = np.random.default_rng(10 * place + number)
        mask = np.zeros((20 + number, 24, 10 - place), np.uint8)
        mask[5:15, 6:16, 2:6] = 1
        affine = OBLIQUE @ np.diag([1, 1, 1 + 0.3 * place, 1])
        for modality, level in (("flair", 60), ("t1", -40)):
            image = (rng.normal(100, 10, mask.shape) + level * mask.astype(float)).astype(np.int16)
            save_volume(home / "data" / site / "images" / f"v{number}_{modality}.nii.gz", image, affine)
        save_volume(home / "data" / site / "masks" / f"v{number}.nii.gz", mask, affine)
    words = ["data=folder", f"data.root={home / 'data'}", "data.modalities=[flair,t1]", "data.resample=[3,1,1]"]
    more = ["algorithm=ditto", "evaluation.predictions=true", "federation.local_steps=6", "data.augment=strong"]
    assert train.main([*words, *SMALL, *more, f"output={home / 'run'}"]) == 0
    return home


@pytest.mark.slow
def test_predicted_masks_lie_in_the_volumes_own_geometry_and_score_as_the_run_did(volumes: Path) -> None:
    run = RunFolder(volumes / "run")
    scores = run.scores()
    best = scores[(scores["split"] == "test") & (scores["checkpoint"] == "best") & (scores["metric"] == "dice")]
    best = best[(best["site"] == "hospital_b") & (best["view"] == "personal")].set_index("case")["value"]
    images = str(volumes / "data" / "hospital_b" / "images")
    arguments = [
        str(run.path),
        "--images",
        images,
        "--site",
        "hospital_b",
        "--out",
        str(volumes / "masks"),
        "--probabilities",
    ]
    assert predict.main(arguments) == 0
    for case, dice in best.items():
        truth = nibabel.load(volumes / "data" / "hospital_b" / "masks" / f"{case}.nii.gz")
        (path,) = (volumes / "masks" / "masks").glob(f"{case}_*.nii.gz")
        mask = nibabel.load(path)
        assert np.allclose(mask.affine, truth.affine)
        both = np.asarray(mask.dataobj).astype(bool), np.asarray(truth.dataobj).astype(bool)
        assert 2 * (both[0] & both[1]).sum() / (both[0].sum() + both[1].sum()) == pytest.approx(dice, abs=1e-6)
    sizes = pd.read_csv(volumes / "masks" / "sizes.csv")
    assert (sizes["volume_mm3"] > 0).any()
    assert sizes["area_mm2"].isna().all()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_exported_program_with_monai_s_window_answers_as_the_run(volumes: Path) -> None:
    assert export.main([str(volumes / "run"), "--out", str(volumes / "exported"), "--site", "hospital_a"]) == 0
    card = (volumes / "exported" / "global.md").read_text()
    assert "brought to voxels of 3 x 1 x 1 mm" in card
    snippet = card.partition("```python\n")[2].partition("```")[0]
    code = snippet.replace("global.pt", str(volumes / "exported" / "global.pt")) + "print(tuple(masks.shape))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=volumes)
    assert told.stdout.strip() == "(1, 1, 80, 100, 120)"
    program = torch.jit.load(volumes / "exported" / "global.pt")
    images = torch.rand(1, 2, 12, 14, 9, generator=torch.Generator().manual_seed(0))
    found = sliding_window_inference(images, (8, 8, 8), 2, program, 0.25, mode="gaussian").sigmoid()
    worker = SavedModels(Reopened.read(RunFolder(volumes / "run"))).load("global", None)
    torch.testing.assert_close(found, worker.predict(images, "global"), rtol=0, atol=1e-5)
    assert found.std() > 0.01


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_page_s_way_from_files_to_models_can_be_gone(
    volumes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    block = PAGE.partition("## From files")[2].partition("```sh\n")[2].partition("```")[0]
    lines = block.replace("DIR", str(volumes / "data")).replace("[16,64,64]", "8").replace("\\\n", "").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    programs = [words[2] if words[1] == "-m" else words[1] for words in commands]
    assert programs == ["fedseg.datamodules.check", "train.py", "train.py", "compare.py", "predict.py", "export.py"]
    mains = {"train.py": train.main, "compare.py": compare.main, "predict.py": predict.main, "export.py": export.main}
    assert check_command(commands[0][3:]) == 0
    for program, words in zip(programs[1:], commands[1:], strict=True):
        less = [
            word for word in SMALL if word.startswith(("federation", "trainer", "evaluation", "model.l", "model.w"))
        ]
        assert mains[program]([*words[2:], *(less if program == "train.py" else [])]) == 0
    for name in ("global", "personal-hospital_a"):
        assert (tmp_path / "exported" / name / "configs" / "inference.json").is_file()
    assert {path.name for path in Path("masks/masks").iterdir()} == {f"v{n}_foreground.nii.gz" for n in range(6)}
    assert {path.suffix for path in Path("exported").glob("*.*")} == {".pt", ".md", ".safetensors", ".ckpt"}


def test_the_page_names_the_methods_that_refuse_volumes() -> None:
    told = PAGE.partition("## Methods")[2].partition("So does")[0]
    assert set(re.findall(r"`(\w+)`", told)) == {name for name, method in ALGORITHMS.items() if method.slices_only}
