"""Which slices make which batch, and the loader that fetches them."""

import gc
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch

from fedseg.common.seeds import data_seed
from fedseg.datamodules import FolderDataModule, SiteData
from fedseg.datamodules.sampling import draw
from tests.data_files import folder, make_sites


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sites(tmp_path_factory.mktemp("sites"), "alpha", "beta", count=8)


def batches(site: SiteData, seed: int = 1, steps: int = 3) -> list[dict]:
    return list(site.train_batches(seed, steps))


def equal(one: list[dict], other: list[dict]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if k != "case" else a[k] == b[k] for k in a)
        for a, b in zip(one, other, strict=True)
    )


def test_shuffling_shows_everything_once_before_anything_twice() -> None:
    order = draw(7, 24, "shuffle", 3)
    assert [sorted(order[i : i + 7].tolist()) for i in (0, 7, 14)] == [list(range(7))] * 3
    assert not np.array_equal(order[:7], order[7:14])


def test_replacement_draws_independently() -> None:
    order = draw(50, 50, "replacement", 3)
    assert len(set(order.tolist())) < 50
    assert set(draw(3, 500, "replacement", 0).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("mode", ["shuffle", "replacement"])
def test_a_short_draw_begins_a_long_one(mode: str) -> None:
    assert np.array_equal(draw(5, 6, mode, 9), draw(5, 17, mode, 9)[:6])  # type: ignore[arg-type]
    assert draw(5, 0, mode, 9).size == 0  # type: ignore[arg-type]


def test_seeds_depend_on_every_part_and_its_place() -> None:
    seeds = {data_seed(1, 2), data_seed(2, 1), data_seed("1", 2), data_seed(12), data_seed(1, 2, 0)}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert data_seed(7, "a") == 8084930300841125593  # the same on every machine


def test_batches_are_full_counted_and_typed(root: Path) -> None:
    site = folder(root, batch_size=4).site("alpha")
    assert site.examples == 5
    assert [site.steps(), site.steps(2), site.steps(0.8), site.steps(0.1)] == [2, 3, 1, 1]
    feed = site.train_batches(1, 3)
    assert len(feed) == 3  # type: ignore[arg-type]
    for batch in feed:
        assert batch["image"].shape == (4, 3, 20, 24)
        assert batch["image"].dtype == torch.float32
        assert 0 <= batch["image"].min() < batch["image"].max() <= 1
        assert batch["mask"].shape == (4, 1, 20, 24)
        assert set(batch["mask"].unique().tolist()) == {0, 1}
        assert len(batch["case"]) == 4
        assert batch["slice"].tolist() == [0] * 4
        assert batch["depth"].tolist() == [1] * 4
        assert batch["slice"].dtype == torch.int64


def test_batches_are_a_function_of_their_seed(root: Path) -> None:
    site = folder(root, augment="strong").site("alpha")
    feed = site.train_batches(1, 3)
    assert equal(list(feed), list(feed))
    assert equal(batches(site, steps=2), batches(site, steps=3)[:2])
    assert not equal(batches(site, seed=1), batches(site, seed=2))
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    batches(site)
    assert torch.equal(torch.random.get_rng_state(), before), "fetching moved the training's random stream"


def test_unlabelled_batches_show_all_training_images_without_masks(root: Path) -> None:
    site = folder(root, labelled_patients=1).site("alpha")
    assert site.examples == 1
    assert {name for batch in site.train_batches(0, 4) for name in batch["case"]} == {site.cases("train")[0].case}
    unlabelled = list(site.unlabelled_batches(0, 4))
    assert len({name for batch in unlabelled for name in batch["case"]}) == 5
    assert all("mask" not in batch for batch in unlabelled)


def test_views_share_geometry_and_differ_in_appearance(root: Path, tmp_path: Path) -> None:
    def views(pipeline: str) -> torch.Tensor:
        (tmp_path / "a.yaml").write_text(pipeline)
        site = folder(root, augment=str(tmp_path / "a.yaml")).site("alpha")
        return next(iter(site.unlabelled_batches(3, 1, views=2)))["image"]

    flips = "geometric: [{HorizontalFlip: {p: 0.5}}, {VerticalFlip: {p: 0.5}}]\n"
    moved = views(flips)
    assert moved.shape == (4, 2, 3, 20, 24)
    assert torch.equal(moved[:, 0], moved[:, 1])
    both = views(flips + "appearance: [{GaussNoise: {std_range: [0.02, 0.02], p: 1}}]")
    difference = (both[:, 0] - both[:, 1]).abs()
    assert difference.max() > 0.01
    assert difference.mean() < 0.05
    assert (both[:, 0] - moved[:, 0]).abs().mean() < 0.05, "the geometry changed with the appearance"


def test_evaluation_is_plain_and_in_order(root: Path) -> None:
    data = folder(root, augment="strong", batch_size=3)
    site = data.site("beta")
    for split in ("train", "val", "test"):
        got = list(site.eval_batches(split))
        assert [name for batch in got for name in batch["case"]] == [case.case for case in site.cases(split)]
        images = torch.cat([batch["image"] for batch in got])
        expected = np.concatenate([site.image(case) for case in site.cases(split)]).transpose(0, 3, 1, 2)
        assert torch.equal(images, torch.from_numpy(expected.copy()).float() / 255)
        masks = torch.cat([batch["mask"] for batch in got])
        assert torch.equal(masks[:, 0], torch.from_numpy(np.concatenate([site.truth(c) for c in site.cases(split)])))


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing_and_they_live_on(root: Path) -> None:
    alone, helped = folder(root, augment="strong"), folder(root, augment="strong", workers=2)
    assert equal(batches(alone.site("alpha")), batches(helped.site("alpha")))
    before = _worker_ids(helped)
    for _ in range(2):
        for name in ("beta", "alpha"):
            assert equal(batches(alone.site(name), seed=5), batches(helped.site(name), seed=5))
    assert _worker_ids(helped) == before
    next(iter(helped.site("alpha").train_batches(1, 3)))  # left half-way
    assert equal(batches(alone.site("beta"), seed=7), batches(helped.site("beta"), seed=7))
    assert _worker_ids(helped) == before
    labelled, unlabelled = alone.site("alpha").train_batches(1, 3), alone.site("beta").unlabelled_batches(2, 3)
    both = zip(helped.site("alpha").train_batches(1, 3), helped.site("beta").unlabelled_batches(2, 3), strict=True)
    together = list(both)  # two feeds at once must not share a loader
    assert equal([a for a, _ in together], list(labelled))
    assert equal([b for _, b in together], list(unlabelled))


def test_workers_end_by_themselves_with_their_data(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = multiprocessing.active_children()
    data = folder(root, size=16, workers=1)
    assert list(data.site("alpha").train_batches(2, 2))
    (worker,) = [one for one in multiprocessing.active_children() if one not in others]
    killed: list[bool] = []
    monkeypatch.setattr(worker, "terminate", lambda: killed.append(True))
    # seconds that it is given; left to itself it looks every 5
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 3)
    del data
    gc.collect()
    assert not killed


def _worker_ids(data: FolderDataModule) -> list[int]:
    ((_, loader),) = data.site("alpha")._shared.loaders._idle
    return [worker.pid for worker in loader._iterator._workers]  # type: ignore[union-attr]
