"""Exported models: they answer as the run's do, run without the suite, and say what they are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime
import pytest
import pytorch_lightning as pl
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import export
import predict
import train
from fedseg import api
from fedseg.algorithms.harmonised import Combatted, Harmonised, InStyle, InStyleOfOne
from fedseg.federation.state import State
from fedseg.launch.export import Deployed, traced
from fedseg.launch.folders.reopen import Reopened
from fedseg.launch.folders.saved import SavedModels
from fedseg.reporting import ReportingError
from fedseg.reporting.folder import RunFolder
from tests.data_files import picture, save
from tests.tiers import every

SMALL = (
    "data.n_sites=3", "data.unseen=[site_03]", "data.cases_per_site=6", "data.amount=0", "data.size=32",
    "data.resolution=32", "data.batch_size=2", "federation.rounds=2", "federation.local_steps=1", "trainer.threads=1",
    "trainer.accelerator=cpu", "evaluation.overlays=false", "evaluation.metrics=[dice]",
    "model=tiny", "model.encoder_depth=2", "model.decoder_channels=[16, 8]",
)  # fmt: skip
OF_SITES = {"personal-site_01", "personal-site_02"}
METHODS: dict[str, tuple[set[str], tuple[str, ...]]] = {
    "fedavg": ({"global"}, ("data.exclusive=true", "data.regions={rim: [1], cup: [2]}")),
    "ditto": ({"global"} | OF_SITES, ("training.normalize=zscore", "training.harmonise=combat")),
    "apfl": ({"global"} | OF_SITES, ("training.harmonise=histogram",)),
    "lcfed": (OF_SITES, ()),
    "local": (OF_SITES, ("training.harmonise=zscore", "training.harmonise_target=least_complex")),
    "pooled": ({"global"}, ("training.harmonise=fda",)),
    "harmofl": ({"global"}, ()),
    "iopfl": ({"global"} | OF_SITES, ("algorithm.adapt_passes=1",)),
}
HARMONISED = {"apfl": InStyle, "local": InStyleOfOne, "pooled": InStyle, "harmofl": Harmonised, "ditto": Combatted}


def call(*arguments: Any) -> int:
    return export.main([str(argument) for argument in arguments])


def trained(folder: Path, *settings: str) -> RunFolder:
    assert train.main([f"output={folder}", *SMALL, *settings]) == 0
    return RunFolder(folder)


@pytest.fixture(scope="module", params=every(METHODS, ["ditto"]))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, RunFolder, Path]:
    home = tmp_path_factory.mktemp(request.param)
    run = trained(home / "run", f"algorithm={request.param}", *METHODS[request.param][1])
    assert call(run.path, "--out", home / "out") == 0
    return request.param, run, home / "out"


@pytest.mark.slow
def test_programs_answer_as_the_run_does(exported: tuple[str, RunFolder, Path]) -> None:
    method, folder, out = exported
    names = METHODS[method][0]
    assert {path.name for path in out.iterdir()} == {
        f"{n}.{e}" for n in names for e in ("pt", "safetensors", "ckpt", "md")
    }
    run = Reopened.read(folder)
    run.prepare_data()
    models = SavedModels(run)
    for name in names:
        view, _, site = name.partition("-")
        worker = models.load(view, site or None)
        program = torch.jit.load(out / f"{name}.pt")
        for batch in run.experiment.data.site(site or "site_01").eval_batches("test"):
            expected = worker.predict(batch["image"], view)
            torch.testing.assert_close(program(batch["image"]), expected, rtol=0, atol=1e-5)
            assert expected.std() > 0


def stock_trainer(folder: Path) -> pl.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(accelerator="cpu", max_epochs=1, default_root_dir=folder, **quiet)


@pytest.mark.slow
def test_a_checkpoint_opens_in_lightning_and_answers_bit_for_bit(
    exported: tuple[str, RunFolder, Path], tmp_path: Path
) -> None:
    method, folder, out = exported
    run = Reopened.read(folder)
    run.prepare_data()
    stock = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, default_root_dir=tmp_path
    )
    for name in sorted(METHODS[method][0])[:2]:
        view, _, site = name.partition("-")
        module = api.TrainedModel.load_from_checkpoint(out / f"{name}.ckpt")
        settings = run.experiment.config
        assert (module.hparams.view, module.hparams.site) == (view, site or None)
        assert (module.hparams.algorithm["name"], module.hparams.training["lr"]) == (method, settings.training.lr)
        data = run.experiment.data.of(site or "site_01")
        worker = SavedModels(run).load(view, site or None)
        answers = stock.predict(module, datamodule=data)
        expected = [worker.predict(batch["image"], view) for batch in data.test_dataloader()]
        assert len(answers) == len(expected) > 0
        assert all(torch.equal(answer, own) for answer, own in zip(answers, expected, strict=True))
        (validated,), (tested,) = stock.validate(module, data, verbose=False), stock.test(module, data, verbose=False)
        assert {"val_loss", "val_dice"} <= validated.keys()
        assert {"test_loss", "test_dice"} <= tested.keys()


@pytest.mark.slow
def test_an_exported_model_goes_on_training_at_a_site(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "algorithm=fedavg", "training.lr=0.05")
    assert call(run.path, "--out", tmp_path / "out") == 0
    module = api.TrainedModel.load_from_checkpoint(tmp_path / "out/global.ckpt")
    before = {name: t.clone() for name, t in module.state_dict().items()}
    reopened = Reopened.read(run)
    reopened.prepare_data()
    stock = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, default_root_dir=tmp_path
    )
    stock.fit(module, datamodule=reopened.experiment.data.of("site_01"))
    assert any(not torch.equal(before[name], t) for name, t in module.state_dict().items())
    assert stock.optimizers[0].param_groups[0]["lr"] == 0.05


@pytest.mark.slow
def test_a_model_that_needs_more_than_its_network_says_what_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(tmp_path / "run", "algorithm=fedavg", "training.harmonise=zscore")
    with monkeypatch.context() as patched:
        patched.setattr(Harmonised, "answers_with", lambda self: State())
        assert call(run.path, "--out", tmp_path / "out") == 2
    assert "let FedAvg.answers_with() return what came beside it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert call(run.path, "--out", tmp_path / "out") == 0


@pytest.mark.slow
def test_sites_have_models_of_their_own(exported: tuple[str, RunFolder, Path]) -> None:
    method, _, out = exported
    if method == "fedavg":
        return
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    answers = [torch.jit.load(out / f"{name}.pt")(images) for name in sorted(METHODS[method][0])]
    for place, answer in enumerate(answers):
        assert all(not torch.equal(answer, other) for other in answers[:place])


@pytest.mark.slow
def test_weights_alone_rebuild_the_network(exported: tuple[str, RunFolder, Path]) -> None:
    method, folder, out = exported
    models = SavedModels(Reopened.read(folder))
    for name in METHODS[method][0]:
        view, _, site = name.partition("-")
        deployed = Deployed(models.load(view, site or None), view)
        images = torch.rand(1, 3, 32, 32)
        expected = deployed(images)
        with safe_open(out / f"{name}.safetensors", "pt") as file:
            facts = file.metadata()
        tensors = load_file(out / f"{name}.safetensors")
        for tensor in deployed.network.state_dict().values():
            tensor.zero_()
        assert not torch.equal(deployed(images), expected)
        deployed.network.load_state_dict(tensors)
        torch.testing.assert_close(deployed(images), expected)
        assert json.loads(facts["regions"]) == ({"rim": [1], "cup": [2]} if method == "fedavg" else facts_of_phantom())
        assert facts["activation"] == ("softmax" if method == "fedavg" else "sigmoid")
        assert (facts["view"], facts["site"], facts["method"]) == (view, site, method)
        learnt_from = [site] if method == "local" else ["site_01", "site_02"]
        assert json.loads(facts["training_sites"]) == learnt_from
        prepared = {"intensity": "percentile", "percentiles": "[0.5, 99.5]", "window": "null", "axis": "auto"}
        prepared |= {"canonical": "true", "neighbours": "0", "channels": "3", "image_channels": "3", "stacked": "false"}
        prepared |= {"training_values": '["uint8"]'}
        prepared |= {"normalisation": "zscore" if method == "ditto" else "imagenet", "height": "32", "width": "32"}
        prepared |= {"seed": "0", "encoder": "random weights", "colour": "as stored", "checkpoint": "best"}
        assert {key: facts[key] for key in prepared} == prepared


def facts_of_phantom() -> dict[str, list[int]]:
    return {"disc": [1, 2], "cup": [2]}


def test_the_card_says_what_the_run_says(exported: tuple[str, RunFolder, Path]) -> None:
    method, folder, out = exported
    scores = folder.scores().query("checkpoint == 'best' and split == 'test'")
    for name in METHODS[method][0]:
        view, _, site = name.partition("-")
        card = (out / f"{name}.md").read_text()
        rows = scores[scores["view"] == view]
        for (where, region), group in rows.groupby(["site", "region"]):
            told = f"| {where} | {group['case'].nunique()} | {group['value'].mean():.4g} |"
            assert (told in card) == (where == site or not site), (told, region)
        assert ("Took no part in training: site_03" in card) == (view == "global")
        assert "terms: not stated by whoever exported this model" in card
        assert "not a medical device" in card
        used = folder.splits().query("split == 'train' and labelled")["site"].value_counts()
        for where, count in used.items():
            alone = method == "local" and where != site
            assert (f"| {where} | {count} | {count} |" in card) == (not alone)
        assert ("saw its own site's cases only" in card) == (method == "local")
        styled = f"{HARMONISED[method].prepares}, then " if method in HARMONISED else ""
        assert f"- normalisation: {styled}{'zscore' if method == 'ditto' else 'imagenet'}, inside" in card
        assert "- images: (B, 3, 32, 32) float32 in [0, 1]" in card
        assert ", seed 0" in card
        assert "Data set `phantom`." in card


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FedAvg on one site's labels, from an encoder that saw the images of both."""
    home = tmp_path_factory.mktemp("stages")
    earlier = ("algorithm=contrastive", "algorithm.pairing=instance")
    for name, settings in {"1": earlier, "2": ("algorithm=fedavg", f"pretrained={home / '1'}")}.items():
        trained(home / name, *settings, "federation.rounds=1", "data.unlabelled=[site_02]")
    return home


@pytest.mark.slow
def test_the_card_says_whose_images_the_encoder_saw(staged: Path, tmp_path: Path) -> None:
    assert call(staged / "2", "--out", tmp_path / "a") == 0
    with safe_open(tmp_path / "a" / "global.safetensors", "pt") as file:
        facts = file.metadata()
    assert json.loads(facts["training_sites"]) == ["site_01"]
    origin = f"the encoder of the run {staged / '1'} (`contrastive`, images of site_01, site_02)"
    assert facts["encoder"] == f"{origin}, which began with random weights"
    assert facts["encoder"] in (tmp_path / "a" / "global.md").read_text()
    shutil.copytree(staged / "2", tmp_path / "alone")
    settings = (tmp_path / "alone" / "config.yaml").read_text().replace(str(staged / "1"), "gone")
    (tmp_path / "alone" / "config.yaml").write_text(settings)
    assert call(tmp_path / "alone", "--out", tmp_path / "b") == 0
    assert "the encoder of the run gone, which is no longer there" in (tmp_path / "b" / "global.md").read_text()


@pytest.mark.slow
def test_the_cards_steps_lead_to_what_predict_writes(exported: tuple[str, RunFolder, Path], tmp_path: Path) -> None:
    method, run, out = exported
    name = sorted(METHODS[method][0])[0]
    program = torch.jit.load(out / f"{name}.pt")
    site = ("--site", "site_01") if method in ("lcfed", "local") else ()
    save(tmp_path / "new" / "colour.png", picture(1, 50, 70))
    deep = picture(2, 20, 24, 1).astype(np.uint16) * 100
    save(tmp_path / "new" / "deep.png", deep)
    arguments = ("--images", tmp_path / "new", "--out", tmp_path / "out", "--probabilities", "--no-overlay")
    assert predict.main([str(argument) for argument in (run.path, *arguments, *site)]) == 0
    low, high = np.percentile(deep, (0.5, 99.5))
    grey = np.clip((deep.astype(np.float32) - low) / (high - low), 0, 1).astype(np.float32)[..., None].repeat(3, 2)
    small = cv2.resize(picture(1, 50, 70), (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    inputs = {"colour": small, "deep": cv2.resize(grey, (32, 32), interpolation=cv2.INTER_LINEAR)}
    back = {"colour": ((70, 50), cv2.INTER_LINEAR), "deep": ((24, 20), cv2.INTER_AREA)}
    for image, array in inputs.items():
        chances = program(torch.from_numpy(array.transpose(2, 0, 1)[None].copy()))[0].numpy()
        for region, chance in zip(("rim", "cup") if method == "fedavg" else ("disc", "cup"), chances, strict=True):
            written = np.load(tmp_path / "out" / "probabilities" / f"{image}_{region}.npy")
            size, how = back[image]
            np.testing.assert_allclose(written, cv2.resize(chance, size, interpolation=how), atol=1e-5)


@pytest.mark.slow
def test_a_folder_is_whole_or_not_there(fedavg: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(fedavg.path, tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints").rglob("*.safetensors"):
        file.unlink()  # found to be gone after the folder was made
    assert call(tmp_path / "run", "--out", tmp_path / "out") == 2
    assert "Traceback" not in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
def test_the_cards_lines_run_without_the_suite(exported: tuple[str, RunFolder, Path]) -> None:
    method, _, out = exported
    name = sorted(METHODS[method][0])[-1]
    found = re.search(r"```python\n(.*?)```", (out / f"{name}.md").read_text(), re.DOTALL)
    assert found is not None
    code = found.group(1)
    assert len(code.strip().splitlines()) == 5
    result = "labels" if method == "fedavg" else "masks"
    blocked = "algorithms launch models federation datamodules segmentation_models_pytorch"
    guard = f"import sys\nfor name in {blocked!r}.split(): sys.modules[name] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{guard}{code}print(tuple({result}.shape))"],
        cwd=out,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ("(1, 32, 32)" if method == "fedavg" else "(1, 2, 32, 32)")


# ---------------------------------------------------------------------------------------------------------------- ONNX


@pytest.mark.slow
def test_onnx_files_answer_as_the_run_does(tmp_path: Path) -> None:
    settings = ("training.normalize=zscore", *METHODS["fedavg"][1])
    folder = trained(tmp_path / "run", "algorithm=ditto", "federation.rounds=1", *settings)
    assert call(folder.path, "--out", tmp_path / "out", "--onnx", "--site", "site_02") == 0
    run = Reopened.read(folder)
    run.prepare_data()
    models = SavedModels(run)
    for name, site in (("global", None), ("personal-site_02", "site_02")):
        view = "personal" if site else "global"
        session = onnxruntime.InferenceSession(tmp_path / "out" / f"{name}.onnx", providers=["CPUExecutionProvider"])
        worker = models.load(view, site)
        images = torch.cat([b["image"] for b in run.experiment.data.site("site_02").eval_batches("test")])
        for some in (images[:1], images):
            (answers,) = session.run(["answers"], {"images": some.numpy()})
            torch.testing.assert_close(torch.from_numpy(answers), worker.predict(some, view), rtol=0, atol=1e-5)
        assert answers.std() > 0


@pytest.mark.slow
def test_what_onnx_has_no_words_for_is_refused_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained(tmp_path / "run", "algorithm=fedavg", "federation.rounds=1", "training.harmonise=fda")
    assert call(folder.path, "--out", tmp_path / "out", "--onnx") == 2
    told = capsys.readouterr().err
    assert "global cannot be written as ONNX" in told
    assert "export without --onnx" in told
    assert not (tmp_path / "out").exists()
    assert call(folder.path, "--out", tmp_path / "out") == 0


@pytest.mark.slow
def test_a_package_that_onnx_needs_is_named(
    fedavg: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedseg.launch.exports.onnx.find_spec", lambda name: None if name == "onnxscript" else name)
    assert call(fedavg.path, "--out", tmp_path / "out", "--onnx") == 2
    assert '--onnx needs onnxscript; pip install -e ".[onnx]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.fixture(scope="module")
def fedavg(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return trained(tmp_path_factory.mktemp("runs") / "fedavg", "algorithm=fedavg", "federation.rounds=1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--site", "site_01"), "site 'site_01' has no model of its own; there is: global"),
        (("--site", "nowhere"), "no site 'nowhere'"),
    ],
)
def test_models_that_do_not_exist_are_refused(
    options: tuple[str, ...], message: str, fedavg: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(fedavg.path, "--out", tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_terms_are_told_and_nothing_is_overwritten(
    fedavg: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert call(fedavg.path, "--out", out, "--terms", "CC BY-NC\n\n  4.0", "--checkpoint", "last") == 0
    assert "- terms: CC BY-NC 4.0\n" in (out / "global.md").read_text()
    assert "after round 1 (last)" in (out / "global.md").read_text()
    capsys.readouterr()
    assert call(fedavg.path, "--out", out) == 2
    assert "is not empty; choose another --out" in capsys.readouterr().err


@pytest.mark.slow
def test_an_encoder_without_views_has_nothing_to_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tmp_path / "run", "algorithm=contrastive", "algorithm.pairing=instance", "federation.rounds=1")
    capsys.readouterr()
    assert call(run.path, "--out", tmp_path / "out") == 2
    assert "has no model that segments" in capsys.readouterr().err


@pytest.mark.slow
def test_missing_scores_are_said_to_be_missing(fedavg: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(fedavg.path, tmp_path / "run")
    (tmp_path / "run" / "metrics.csv").unlink()
    assert call(tmp_path / "run", "--out", tmp_path / "out") == 0
    assert "Missing: the run's folder has no scores (metrics.csv)." in (tmp_path / "out" / "global.md").read_text()


class Moody(nn.Module):
    """Answers by the number of images, which a trace cannot hold."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images * len(images)


def test_a_program_that_answers_differently_is_refused() -> None:
    with pytest.raises(ReportingError, match=r"global: the exported program answers differently"):
        traced(Moody(), 3, (8, 8), "global")
