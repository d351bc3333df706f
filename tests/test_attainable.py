"""The best score that the network's grid allows is known before training, and told where it is low."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import train
from fedseg.configs.compose import compose
from fedseg.datamodules import FolderDataModule, Regions
from fedseg.datamodules.attainable import LOW, attainable_dice
from fedseg.datamodules.check.command import check
from fedseg.datamodules.check.report import tables
from fedseg.datamodules.grid import fit_planes
from fedseg.evaluation import evaluate
from fedseg.launch.experiment import Experiment
from fedseg.launch.settings import SCHEMA
from tests.data_files import picture, save, save_volume
from tests.tiny_run import TINY

SIDE = 96
REGIONS = {"vessel": [1], "disc": [2]}


def lines_and_a_disc(number: int, width: int = 1) -> np.ndarray:
    """Lines that a coarse grid cannot hold, and a disc that it can."""
    labels = np.zeros((SIDE, SIDE), np.uint8)
    for row in range(3 + number % 4, SIDE, 2 * width + 8):
        labels[row : row + width] = 1
    rows, columns = np.ogrid[:SIDE, :SIDE]
    labels[(rows - 48) ** 2 + (columns - 48) ** 2 < 20**2] = 2
    labels[:4, :4] = 255
    return labels


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for site, width in (("thin", 1), ("thick", 12)):
        for number in range(7):
            save(tmp_path / site / "images" / f"c{number}.png", picture(number + 10 * width, SIDE, SIDE))
            save(tmp_path / site / "masks" / f"c{number}.png", lines_and_a_disc(number, width))
    return tmp_path


def words(root: Path, size: int, exclusive: bool = False) -> list[str]:
    own = ["data=folder", f"data.root={root}", f"data.size={size}", "data.ignore_labels=[255]"]
    return [*own, "data.regions={vessel: [1], disc: [2]}", f"data.exclusive={str(exclusive).lower()}"]


def module(root: Path, size: int, exclusive: bool = False) -> FolderDataModule:
    data = Experiment(compose(words(root, size, exclusive), SCHEMA)).data
    assert isinstance(data, FolderDataModule)
    return data


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("size", [24, 40, 96, 120])
def test_it_is_the_score_of_a_model_that_knows_the_truth(root: Path, size: int, exclusive: bool) -> None:
    data = module(root, size, exclusive)
    data.setup()
    site = data.site("thin")
    truth = torch.cat([batch["mask"] for batch in site.eval_batches("test")])
    given = iter(truth)

    def perfect(images: torch.Tensor) -> torch.Tensor:
        return torch.stack([next(given) for _ in images])

    scores = evaluate(perfect, site, "test", data.regions, metrics=["dice"], tolerance=0, grid="own")
    found = {(row.case, row.region): row.value for row in scores}
    ignored = sorted(data.ignore_labels)
    expected = {}
    for case in site.cases("test"):
        labels = data.read(case).labels
        assert labels is not None
        best = attainable_dice(labels, fit_planes(labels, data.size), data.regions, ignored)
        expected |= {(case.case, region): dice for region, dice in best.items()}
    assert found == pytest.approx(expected, abs=1e-12)
    assert all(value == 1 for value in found.values()) == (size == SIDE)


def test_a_volume_is_one_case_and_a_region_that_does_not_occur_has_no_score() -> None:
    regions = Regions({"a": (1,), "b": (2,)})
    labels = np.zeros((2, 8, 8), np.uint8)
    labels[0, 2:6, 2:6] = 1
    assert attainable_dice(labels, labels, regions, []) == {"a": 1.0}
    labels[1, 1, 1] = 1
    grid = labels.copy()
    grid[1] = 0  # the second slice loses its pixel
    assert attainable_dice(labels, grid, regions, []) == {"a": pytest.approx(2 * 16 / (16 + 17))}


def test_check_and_run_warn_of_the_same_and_the_cure_works(root: Path, tmp_path: Path) -> None:
    coarse = module(root, 48)
    checked = check(coarse)
    coarse = module(root, 48)
    coarse.setup()
    told = [[one for one in found if one.kind == "grid too coarse"] for found in (checked.findings, coarse.findings)]
    assert told[0] == told[1]
    (one,) = told[0]
    assert one.site == "thin"
    assert one.severity == "warning"
    assert "perfect mask of 'vessel'" in one.what
    size = int(one.cure.split("data.size=")[1].split(",")[0])
    finer = module(root, size)
    finer.setup()
    assert not any(finding.kind == "grid too coarse" for finding in finer.findings)
    assert min(site.mean("vessel") for site in check(module(root, size)).attainable) >= LOW


def test_the_check_has_a_table_by_site_and_region(root: Path) -> None:
    data = module(root, 48)
    checked = check(data)
    (table,) = [
        one for one in tables(checked, data.regions, data.fitting.setting) if one.title.startswith("Best attainable")
    ]
    assert [row[:3] for row in table.rows] == [
        (site, region, "7") for site in ("thick", "thin") for region in ("vessel", "disc")
    ]
    means = {(row[0], row[1]): float(row[3]) for row in table.rows}
    assert means["thin", "vessel"] < means["thick", "vessel"] < 1
    assert "data.size=48" in table.title


@pytest.mark.slow
def test_it_is_told_before_training(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = [word for word in TINY if not word.startswith("data.")]
    run = [*words(root, 48), *tiny, "algorithm=fedavg", "federation.rounds=1", f"output={tmp_path / 'run'}"]
    assert train.main(run) == 0
    err = capsys.readouterr().err
    assert "grid too coarse: site 'thin'" in err
    assert err.index("grid too coarse") < err.index("round 1/1")


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_a_cache_keeps_it(root: Path, tmp_path_factory: pytest.TempPathFactory, cache: str) -> None:
    folder = tmp_path_factory.mktemp("cache")
    found = []
    for _ in range(2):
        own = [*words(root, 24), f"data.cache={cache}", f"data.cache_dir={folder}"]
        data = Experiment(compose(own, SCHEMA)).data
        data.setup()
        found.append([one for one in data.findings if one.kind == "grid too coarse"])
    assert found[0] == found[1] != []


def test_volumes_are_told_too(tmp_path: Path) -> None:
    for number in range(6):
        mask = np.stack([lines_and_a_disc(number) % 255] * 3, axis=-1).astype(np.uint8)
        image = np.random.default_rng(number).normal(0, 1, mask.shape).astype(np.float32)
        save_volume(tmp_path / "a" / "images" / f"v{number}.nii.gz", image)
        save_volume(tmp_path / "a" / "masks" / f"v{number}.nii.gz", mask)
    data = module(tmp_path, 24)
    data.setup()
    assert [one.site for one in data.findings if one.kind == "grid too coarse"] == ["a"]
