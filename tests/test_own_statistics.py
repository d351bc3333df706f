"""The global model with a site's own normalisation statistics: the opponent at sites that took no part."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import export
import predict
from fedseg.algorithms.functional.adaptation import fit_statistics, with_running_statistics
from fedseg.configs.compose import ConfigError
from fedseg.launch.compare import default_settings
from fedseg.launch.experiment import Experiment
from fedseg.launch.exports.card import Card
from fedseg.launch.folders.reopen import Reopened
from fedseg.launch.folders.saved import SavedModels
from fedseg.launch.run import execute
from fedseg.launch.scores import scoring
from fedseg.launch.scores.gallery import predict_choices
from fedseg.launch.scores.rescore import difference, rescore, without_older_definition
from fedseg.launch.scores.scoring import Scorer, fitted, not_served
from fedseg.launch.settings import Evaluation
from fedseg.reporting import ReportingError
from fedseg.reporting.compare.analysis import AGAINST_OWN_STATISTICS, AGAINST_REFERENCE, OVERALL, Analysis
from fedseg.reporting.compare.gather import gather
from fedseg.reporting.compare.options import Options
from fedseg.reporting.compare.report import _unseen_text
from fedseg.reporting.compare.runs import find_runs, read_run
from fedseg.reporting.folder import RunFolder
from fedseg.reporting.summary import ENTROPY, OWN_STATISTICS
from tests.data_files import save
from tests.run_folders import write_run
from tests.tiers import every, firsts
from tests.tiny_run import phantom_run
from tests.world import build

settings = partial(phantom_run, 3)


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_every_normalisation_that_keeps_statistics_takes_the_sites_own(kind: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(kind(2, track_running_stats=True), nn.Conv2d(2, 2, 1), nn.GroupNorm(1, 2)).eval()
    images = [torch.randn(4, 2, 8, 8) * 3 + 5, torch.randn(4, 2, 8, 8) * 3 + 5]
    assert len(with_running_statistics(model)) == 1
    with torch.no_grad():
        fit_statistics(model, images)
    torch.testing.assert_close(model[0].running_mean, torch.stack([i.mean((0, 2, 3)) for i in images]).mean(0))
    assert not model.training
    assert not model[0].training


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["group", "instance"])
def test_networks_without_running_statistics_have_no_such_model(kind: str, tmp_path: Path) -> None:
    execute(settings(tmp_path, "algorithm=fedavg", f"model.norm={kind}"))
    assert set(RunFolder(tmp_path).scores().query("not seen")["view"]) == {"global"}


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", every(["fedavg", "ditto", "pooled"], ["ditto"]))
def test_sites_that_took_no_part_are_also_scored_with_their_own_statistics(algorithm: str, tmp_path: Path) -> None:
    execute(settings(tmp_path, f"algorithm={algorithm}"))
    folder = RunFolder(tmp_path)
    rows = folder.scores()
    outside = rows[~rows["seen"]]
    counts = outside.groupby(["view", "checkpoint"]).size()
    assert set(outside["view"]) == {"global", OWN_STATISTICS}
    assert counts["global", "last"] == counts[OWN_STATISTICS, "last"] == counts[OWN_STATISTICS, "best"] > 0
    assert OWN_STATISTICS not in set(rows.loc[rows["seen"], "view"])
    values = {view: table["value"].to_numpy() for view, table in outside.query("checkpoint == 'last'").groupby("view")}
    assert (values["global"] != values[OWN_STATISTICS]).any()
    again = rescore(folder)
    assert difference(again, rows) == (0, len(again))
    older = rows[rows["view"] != OWN_STATISTICS]  # a folder of an earlier version is scored again to the same numbers
    scores, before, _ = without_older_definition(again, older)
    assert difference(scores, before) == (0, len(scores))


@pytest.mark.exhaustive
def test_the_global_model_itself_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    execute(settings(tmp_path / "with", "algorithm=fedavg"))
    monkeypatch.setattr("fedseg.launch.scores.scoring.with_running_statistics", lambda network: [])
    execute(settings(tmp_path / "without", "algorithm=fedavg"))
    one, two = (RunFolder(tmp_path / name).scores() for name in ("with", "without"))
    pd.testing.assert_frame_equal(one[one["view"] != OWN_STATISTICS].reset_index(drop=True), two)


# --- used elsewhere ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ditto(tmp_path_factory: pytest.TempPathFactory) -> Reopened:
    folder = tmp_path_factory.mktemp("ditto")
    execute(settings(folder, "algorithm=ditto"))
    run = Reopened.read(RunFolder(folder))
    run.prepare_data()
    return run


def stored(run: Reopened, site: str, folder: Path) -> list[str]:
    """The test images of a site as files."""
    splits = run.folder.splits()
    cases = list(splits[(splits["site"] == site) & (splits["split"] == "test")]["case"])
    for case in cases:
        save(folder / f"{case}.png", run.experiment.data.site(site).image(case)[0])
    return cases


def masks_of(out: Path, case: str) -> np.ndarray:
    return np.stack([np.asarray(Image.open(out / f"masks/{case}_{region}.png")) > 0 for region in ("disc", "cup")])


@pytest.mark.slow
@pytest.mark.parametrize("options", every([[], ["--site", "site_03"]], [[]]), ids=["a new place", "a held-out site"])
def test_its_masks_are_those_that_the_run_scored(options: list[str], ditto: Reopened, tmp_path: Path) -> None:
    cases = stored(ditto, "site_03", tmp_path / "new")
    asked = [str(ditto.folder.path), "--images", str(tmp_path / "new"), "--view", OWN_STATISTICS]
    assert predict.main([*asked, *options, "--out", str(tmp_path / "out")]) == 0
    rows = ditto.folder.scores().query("checkpoint == 'best' and metric == 'dice'")
    told = rows[rows["view"] == OWN_STATISTICS].set_index(["case", "region"])["value"]
    site = ditto.experiment.data.site("site_03")
    for case in cases:
        truth = ditto.experiment.data.regions.encode(torch.tensor(site.truth(case))).numpy().astype(bool)[0]
        for region, mask, true in zip(("disc", "cup"), masks_of(tmp_path / "out", case), truth, strict=True):
            dice = 2 * (mask & true).sum() / (mask.sum() + true.sum())
            assert dice == pytest.approx(told[case, region])


@pytest.mark.slow
def test_its_program_answers_as_it_does_and_differs_from_the_global_ones_statistics_only(
    ditto: Reopened, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases, out = stored(ditto, "site_03", tmp_path / "new"), tmp_path / "out"
    new = str(tmp_path / "new")
    assert export.main([str(ditto.folder.path), "--out", str(out), "--images", new, "--site", "site_01"]) == 0
    assert f"own-statistics.{{safetensors,pt,ckpt,md}}: the global model with the statistics of {new}" in (
        capsys.readouterr().out
    )
    asked = ["--images", new, "--view", OWN_STATISTICS, "--probabilities", "--out", str(tmp_path / "masks")]
    assert predict.main([str(ditto.folder.path), *asked]) == 0
    program = torch.jit.load(out / "own-statistics.pt")
    for case in cases:
        image = torch.tensor(np.asarray(Image.open(tmp_path / f"new/{case}.png")) / 255, dtype=torch.float32)
        answers = program(image.permute(2, 0, 1)[None])[0].numpy()
        for region, answer in zip(("disc", "cup"), answers, strict=True):
            predicted = np.load(tmp_path / f"masks/probabilities/{case}_{region}.npy")
            np.testing.assert_allclose(answer, predicted, atol=1e-4)
    own, shared = (load_file(out / f"{name}.safetensors") for name in (OWN_STATISTICS, "global"))
    assert {key for key in own if not torch.equal(own[key], shared[key])} == {
        key for key in own if "running_" in key or "num_batches" in key
    }
    card = (out / "own-statistics.md").read_text()
    assert f"global model with running statistics of {len(cases)} image(s) of another place" in card
    assert "Each was scored with the running statistics of its own images." in card
    assert "another place" not in (out / "global.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "norm", "options", "message"),
    firsts(
        [
            (
                predict,
                "batch",
                ["--view", OWN_STATISTICS, "--site", "site_01"],
                "took part: own statistics are for images",
            ),
            (export, "batch", ["--images", "nothing"], "nothing does not exist; give a folder of images"),
            (predict, "group", ["--view", OWN_STATISTICS], "keeps no running statistics that images could give anew"),
            (export, "group", [], "keeps no running statistics that images could give anew"),
        ],
        2,
    ),
)
def test_where_it_cannot_be_made_that_is_said_with_what_can_be_done(
    command: Any, norm: str, options: list[str], message: str, ditto: Reopened, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = ditto.folder.path
    if norm != "batch":
        run = tmp_path / "run"
        execute(settings(run, "algorithm=fedavg", f"model.norm={norm}"))
    images = stored(ditto, "site_03", tmp_path / "new") and ["--images", str(tmp_path / "new")]
    asked = [str(run), "--out", str(tmp_path / "out"), *images, *options]
    capsys.readouterr()
    assert command.main(asked) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    cured = [word for word in asked if word not in (*options, *(images if command is export else []))]
    assert command.main([*cured, *(["--view", "global"] if command is predict else [])]) == 0


# --- case by case, and where statistics are all that is missing -------------------------------------------------------


@pytest.fixture(scope="module")
def silo(tmp_path_factory: pytest.TempPathFactory) -> Reopened:
    folder = tmp_path_factory.mktemp("silo")
    execute(settings(folder, "algorithm=silobn", "evaluation.statistics_per=case", "evaluation.entropy_passes=1"))
    run = Reopened.read(RunFolder(folder))
    run.prepare_data()
    return run


def by_hand(network: nn.Module, images: torch.Tensor) -> nn.Module:
    """Batch normalisation as PyTorch has it, which forgets everything but this batch."""
    layers = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for layer in layers:
        layer.momentum = 1.0
        layer.train()
    with torch.no_grad():
        network(images)
    return network.eval()


def close(network: nn.Module, expected: nn.Module) -> None:
    found = network.state_dict()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found[name], tensor, msg=name)


def test_statistics_of_a_case_are_those_of_its_slices_alone(tmp_path: Path) -> None:
    run = Experiment(settings(tmp_path / "run", "algorithm=fedavg", "data.anatomy=organ", "data.slices=4"))
    run.data.prepare_data()
    run.data.setup("fit")
    site = run.data.site("site_03")
    worker = run.in_process({"site_03": site}, Scorer(run)).worker
    before = deepcopy(worker.network("global").state_dict())
    models = list(fitted(worker, OWN_STATISTICS, site, Evaluation(statistics_per="case")))
    assert [[case.case for case in part.cases("test")] for _, part in models] == [[c.case] for c in site.cases("test")]
    for network, part in models:
        (batch,) = part.input_batches("test")
        assert len(batch["image"]) == part.image(part.cases("test")[0]).shape[0] > 1
        close(network, by_hand(deepcopy(worker.network("global")), worker.normalize(batch["image"])))
    ((whole, _),) = fitted(worker, OWN_STATISTICS, site, Evaluation())
    first = next(name for name in before if name.endswith("running_mean"))
    means = [before[first], whole.state_dict()[first], *(network.state_dict()[first] for network, _ in models)]
    assert len({tuple(mean.tolist()) for mean in means}) == 2 + len(models)
    assert all(torch.equal(tensor, before[name]) for name, tensor in worker.network("global").state_dict().items())


@pytest.mark.slow
def test_what_is_shared_but_for_statistics_serves_sites_that_took_no_part(
    silo: Reopened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores, predictions and pictures are of one model: the shared weights with statistics of the case."""
    rows = silo.folder.scores()
    outside = rows[~rows["seen"]]
    counts = outside.groupby(["view", "checkpoint"]).size()
    assert set(outside["view"]) == {OWN_STATISTICS, ENTROPY}
    assert len(set(counts)) == 1
    assert len(counts) == 4
    assert set(rows.loc[rows["seen"], "view"]) == {"personal"}
    again = rescore(silo.folder)
    assert difference(again, rows) == (0, len(again))
    cases = stored(silo, "site_03", tmp_path / "new")
    asked = [str(silo.folder.path), "--images", str(tmp_path / "new"), "--out", str(tmp_path / "out"), "--no-overlay"]
    assert predict.main(asked) == 0  # without --view: there is no other
    told = outside.query(f"checkpoint == 'best' and metric == 'dice' and view == '{OWN_STATISTICS}'")
    told, site = told.set_index(["case", "region"])["value"], silo.experiment.data.site("site_03")
    for case in cases:
        truth = silo.experiment.data.regions.encode(torch.tensor(site.truth(case))).numpy().astype(bool)[0]
        for region, mask, true in zip(("disc", "cup"), masks_of(tmp_path / "out", case), truth, strict=True):
            assert 2 * (mask & true).sum() / (mask.sum() + true.sum()) == pytest.approx(told[case, region])
    made: list[str] = []
    original = scoring.fit_to
    monkeypatch.setattr(scoring, "fit_to", lambda *given: (made.append(given[1]), original(*given)))
    drawn = predict_choices(silo, {"site_03": cases[:1]})["site_03", cases[0]]
    assert made == [OWN_STATISTICS]  # for the one case that is drawn
    assert np.array_equal(drawn.masks[OWN_STATISTICS][:, 0], masks_of(tmp_path / "out", cases[0]))
    image = torch.tensor(site.image(cases[0]) / 255, dtype=torch.float32).permute(0, 3, 1, 2)
    worker = SavedModels(silo).load(OWN_STATISTICS, None, images=[image])
    expected, start = silo.experiment.algorithm(in_channels=3).model, silo.snapshot.server
    expected.load_state_dict({**expected.state_dict(), **start["model"]})
    both = torch.cat([image, image.flip(-1)])  # a single image comes with its mirror image
    close(worker.network("global"), by_hand(expected.eval(), worker.normalize(both)))


@pytest.mark.slow
def test_one_exported_model_is_of_one_case(silo: Reopened, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored(silo, "site_03", tmp_path / "new")
    asked = [str(silo.folder.path), "--site", "site_01", "--out", str(tmp_path / "out"), "--images"]
    assert export.main([*asked, str(tmp_path / "new")]) == 2
    assert "evaluation.statistics_per=case), and an exported one is of one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    card = Card(SavedModels(silo), OWN_STATISTICS, None, "best", "own-statistics", None, images=1).markdown()
    assert "Each case was scored with the running statistics of its own images." in card


def test_statistics_of_cases_are_refused_where_a_network_keeps_none(tmp_path: Path) -> None:
    asked = ("algorithm=fedavg", "evaluation.statistics_per=case")
    with pytest.raises(ConfigError, match=r"take model\.norm=batch, or leave statistics_per out"):
        Experiment(settings(tmp_path, *asked, "model.norm=group")).check()
    Experiment(settings(tmp_path, *asked, "model.norm=batch")).check()


@pytest.mark.parametrize(("name", "why"), [
    ("local", "no tensor of its network is averaged"),
    ("fedbn", "weights in encoder, decoder stay at the sites"),
    ("fedper", "weights in segmentation_head stay at the sites"),
    ("silobn", ""), ("fedavg", ""),
])  # fmt: skip
def test_what_a_method_without_such_a_model_was_asked_for_is_said(name: str, why: str) -> None:
    asked, sites = Evaluation(entropy_passes=3, statistics_per="case"), {"new": SimpleNamespace(seen=False)}
    federation: Any = SimpleNamespace(algorithm=build(name), transport=SimpleNamespace(sites=sites))
    told = not_served(federation, asked)
    assert [line.partition(" on a method")[0] for line in told] == (
        ["data.unseen=new", "evaluation.statistics_per=case", "evaluation.entropy_passes=3"] if why else []
    )
    assert all(line.endswith(f"sites that took no part: {why}") for line in told)
    sites["new"].seen = True
    assert not not_served(federation, Evaluation())


def planted(folder: Path, gain: float) -> Analysis:
    """FedAvg and another method at a site that took no part; own statistics gain, the method itself does not."""
    sites = {"a": 24, "b": 24, "outside": 24}
    for seed in (0, 1, 2):
        for name in ("fedavg", "ditto"):
            run = write_run(folder / f"{name}-{seed}", name, seed, sites=sites, unseen=["outside"])
            rows = run.scores()
            own = deepcopy(rows[~rows["seen"] & (rows["view"] == "global") & (rows["checkpoint"] != "round")])
            own = own.assign(view=OWN_STATISTICS, value=own["value"] + gain)
            pd.concat([rows, own]).to_csv(run.path / "metrics.csv", index=False)
    runs = [read_run(path, "dice") for path in find_runs([str(folder)])]
    return Analysis(gather(runs), Options(draws=100)).unseen


def test_runs_whose_models_of_that_name_are_of_other_images_are_not_compared(tmp_path: Path) -> None:
    """A run of an earlier version took those of the site."""
    asked = (("fedavg", ()), ("ditto", ("evaluation.statistics_per=case",)))
    runs = [write_run(tmp_path / n, n, 0, *more, sites={"a": 6, "out": 6}, unseen=["out"]) for n, more in asked]
    gather([read_run(run.path, "dice") for run in runs])  # nobody scored such a model
    for run in runs:
        rows = run.scores()
        own = rows[~rows["seen"] & (rows["view"] == "global") & (rows["checkpoint"] != "round")]
        pd.concat([rows, own.assign(view=OWN_STATISTICS)]).to_csv(run.path / "metrics.csv", index=False)
    before = runs[0].config_path.read_text()
    for text in (before, before.replace("  statistics_per: site\n", "")):
        runs[0].config_path.write_text(text)
        with pytest.raises(
            ReportingError, match=r"evaluation\.statistics_per is .*site in .*fedavg, but .*case in .*di"
        ):
            gather([read_run(run.path, "dice") for run in runs], default_settings)
    assert text != before


@pytest.mark.slow
def test_it_is_an_opponent_in_the_tests_at_such_sites(tmp_path: Path) -> None:
    unseen = planted(tmp_path, 0.1)
    tests = unseen.tests.set_index(["question", "model", "site"])
    own = tests.loc[AGAINST_REFERENCE, f"fedavg {OWN_STATISTICS}", OVERALL]
    assert own["gain"] == pytest.approx(0.1)
    assert own["p_holm"] < 0.05
    lost = tests.loc[AGAINST_OWN_STATISTICS, "ditto global", OVERALL]
    assert lost["against"] == f"fedavg {OWN_STATISTICS}"
    assert lost["gain"] == pytest.approx(-0.1, abs=0.02)
    told = " ".join(_unseen_text(unseen))
    assert "Against FedAvg with the site's own statistics, mean over sites: " in told
    assert "ditto global −" in told
