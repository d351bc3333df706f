"""Pixels that nobody annotated count neither in loss nor in scores; they are not the background."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from fedseg.algorithms.fedavg import FedAvg
from fedseg.configs.compose import as_yaml, compose, load
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.folder import FolderDataModule
from fedseg.evaluation import FULL, evaluate
from fedseg.launch.experiment import Experiment
from fedseg.launch.settings import SCHEMA
from tests.data_files import picture, save

NOT_ANNOTATED = 255
REGIONS = {"disc": [1, 2], "cup": [2]}


def label_ids(corner: int = 3) -> np.ndarray:
    """A disc with a cup; the lower half is not annotated."""
    ids = np.zeros((16, 16), np.uint8)
    ids[corner : corner + 6, 3:9], ids[corner + 1 : corner + 3, 5:7] = 1, 2
    ids[8:] = NOT_ANNOTATED
    return ids


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for site in ("a", "b"):
        for number in range(8):
            save(tmp_path / site / f"images/c{number}.png", picture(number, 16, 16))
            save(tmp_path / site / f"masks/c{number}.png", label_ids(2 + number % 2))
    return tmp_path


def data(root: Path, **settings: Any) -> FolderDataModule:
    module = FolderDataModule(root=str(root), **{"regions": REGIONS, "size": 16, "batch_size": 4} | settings)
    module.setup()
    return module


@pytest.mark.parametrize("augment", ["none", "flips", "light"])
def test_a_batch_says_where_labels_count_after_augmentation(root: Path, augment: str) -> None:
    ignoring = data(root, ignore_labels=[NOT_ANNOTATED], augment=augment)
    background = data(root, background_labels=[NOT_ANNOTATED], augment=augment)
    ids = data(root, regions=REGIONS | {"void": [NOT_ANNOTATED]}, augment=augment)
    three = (list(module.site("a").train_batches(0, 3)) for module in (ignoring, background, ids))
    for ours, theirs, drawn in zip(*three, strict=True):
        assert "known" not in theirs
        assert ours["known"].dtype == torch.float32
        assert ours["known"].shape == ours["mask"].shape
        assert torch.equal(ours["mask"], theirs["mask"])
        assert torch.equal(1 - ours["known"], drawn["mask"][:, 2:].expand(-1, 2, -1, -1))


@pytest.mark.parametrize("regions", [REGIONS, {"disc": [1]}])
def test_white_is_not_the_foreground_where_it_is_said_to_be_ignored(root: Path, regions: dict[str, list[int]]) -> None:
    blank = np.where(np.arange(16)[:, None] < 8, 0, NOT_ANNOTATED).astype(np.uint8).repeat(16, axis=1)
    save(root / "a/masks/c0.png", blank)
    for path in (root / "a/masks").iterdir() if regions != REGIONS else ():
        save(path, blank if path.stem == "c0" else np.where(label_ids() == 2, 1, label_ids()).astype(np.uint8))
    for path in (root / "b/masks").iterdir() if regions != REGIONS else ():
        save(path, np.where(label_ids() == 2, 1, label_ids()).astype(np.uint8))
    assert set(np.unique(data(root, regions=regions, ignore_labels=[255]).site("a").truth("c0"))) == {0, NOT_ANNOTATED}


@pytest.mark.parametrize("name", ["ignore_labels", "background_labels"])
def test_both_cures_of_unknown_labels_are_named_and_work(root: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"unknown label ids 255.*data.{name}"):
        data(root)
    data(root, **{name: [NOT_ANNOTATED]})


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"ignore_labels": [2]}, r"data\.ignore_labels has 2, which is in data\.regions"),
        ({"background_labels": [1]}, r"data\.background_labels has 1, which is in data\.regions"),
        ({"ignore_labels": [300]}, "300: label ids run from 0 to 255"),
        ({"ignore_labels": [7], "background_labels": [7, 8]}, "both have 7"),
    ],
)
def test_a_label_id_means_one_thing(root: Path, settings: dict[str, list[int]], told: str) -> None:
    with pytest.raises(DataError, match=told):
        data(root, **settings)


def test_what_is_predicted_on_ignored_pixels_changes_no_score(root: Path) -> None:
    save(root / "a/masks/c7.png", np.full((16, 16), NOT_ANNOTATED, np.uint8))
    module = data(root, ignore_labels=[NOT_ANNOTATED], unseen=["a"], absent={})
    scores = []
    for below in (0.0, 1.0):

        def predict(images: torch.Tensor, below: float = below) -> torch.Tensor:
            answer = torch.zeros(len(images), 2, 16, 16)
            answer[:, :, 2:8, 2:9], answer[:, :, 8:] = 1, below
            return answer

        scores.append(evaluate(predict, module.site("a"), "test", module.regions, metrics=FULL, tolerance=1.0))
    np.testing.assert_equal([one.value for one in scores[0]], [one.value for one in scores[1]])
    undefined = {one.case for one in scores[0] if one.metric in ("dice", "invented") and np.isnan(one.value)}
    assert all(np.isnan(one.value) for one in scores[0] if one.case == "c7")
    assert any(one.value > 0 for one in scores[0] if one.metric == "dice")
    assert "c7" in undefined


def test_a_method_that_does_not_leave_pixels_out_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FedAvg, "leaves_out_unknown", False)
    words = ["data=folder", f"data.root={root}", "model=tiny", "algorithm=fedavg"]
    words.append("data.regions={disc: [1, 2], cup: [2]}")
    with pytest.raises(ValueError, match=r"does not leave out pixels.*data.background_labels"):
        Experiment(compose([*words, "data.ignore_labels=[255]"], SCHEMA)).check()
    Experiment(compose([*words, "data.background_labels=[255]"], SCHEMA)).check()


def test_a_saved_config_keeps_the_meaning_that_it_had(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = compose(["data=folder", f"data.root={root}", "data.ignore_labels=[255]"], SCHEMA)
    assert load(as_yaml(new), SCHEMA).data.ignore_labels == [255]
    assert not capsys.readouterr().err
    old = yaml.safe_load(as_yaml(new))
    del old["data"]["background_labels"]
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(old))
    readings = (
        lambda: load(yaml.safe_dump(old), SCHEMA, "old.yaml"),
        lambda: compose([f"experiment={tmp_path / 'old.yaml'}"], SCHEMA),
    )
    for read in readings:
        config = read()
        assert (config.data.background_labels, config.data.ignore_labels) == ([255], [])
        assert "old.yaml is of an older version" in capsys.readouterr().err


SEPARATE = {"disc": [1], "cup": [2]}


def one_without_cups(root: Path) -> None:
    for site in ("a", "b"):
        for path in (root / site / "masks").iterdir():
            ids = label_ids()
            ids[ids == NOT_ANNOTATED] = 0
            save(path, np.where(ids == 2, 0, ids).astype(np.uint8) if site == "a" else ids)


@pytest.mark.parametrize("exclusive", [False, True])
def test_a_region_that_a_site_did_not_annotate_counts_there_nowhere(root: Path, exclusive: bool) -> None:
    one_without_cups(root)
    settings = {"regions": SEPARATE, "exclusive": exclusive}
    with pytest.raises(DataError, match="none of its 8 masks shows 'cup'"):
        data(root, **settings)
    module = data(root, **settings, unannotated={"a": ["cup"]})
    known = {site: next(iter(module.site(site).train_batches(0, 1)))["known"].amin((2, 3)) for site in ("a", "b")}
    assert known["a"].tolist() == [[1, 0]] * 4
    assert known["b"].tolist() == [[1, 1]] * 4

    def everywhere(images: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(images), 2, 16, 16)

    for site in ("a", "b"):
        scores = evaluate(everywhere, module.site(site), "test", module.regions, metrics=FULL, tolerance=1.0)
        assert all(np.isnan(one.value) for one in scores if one.region == "cup") == (site == "a")
        assert any(one.value > 0 for one in scores if one.region == "disc")


@pytest.mark.parametrize(
    ("unannotated", "told"),
    [
        ({"b": ["cup"], "a": ["cup"]}, "no training site that annotated 'cup'"),
        ({"b": ["cup"], "a": []}, "nobody annotated 'cup', but 8 of 8 masks show it"),
        ({"a": ["cup", "disc"]}, r"names all regions; name the site in data\.unlabelled=\[a\]"),
        ({"a": ["cap"]}, "'cap', which is no region; did you mean 'cup'"),
        ({"c": ["cup"]}, r"data\.unannotated: no site 'c'"),
    ],
)
def test_what_contradicts_that_a_region_was_not_annotated_is_refused(
    root: Path, unannotated: dict[str, list[str]], told: str
) -> None:
    one_without_cups(root)
    with pytest.raises(DataError, match=told):
        data(root, regions=SEPARATE, unannotated=unannotated, absent={} if unannotated.get("a") else {"a": ["cup"]})


def test_the_share_that_a_region_covers_is_one_of_the_pixels_that_count(root: Path) -> None:
    site = data(root, ignore_labels=[NOT_ANNOTATED], unannotated={"b": ["cup"]}).site("a")
    found = {tuple(round(share * 128) for share in row) for row in site.covered().tolist()}
    assert found == {(36, 4), (30, 4)}  # of the upper half, that is 8 rows of 16 pixels
    other = data(root, ignore_labels=[NOT_ANNOTATED], unannotated={"b": ["cup"]}).site("b")
    assert other.covered()[:, 1].isnan().all()
    assert not other.covered()[:, 0].isnan().any()
