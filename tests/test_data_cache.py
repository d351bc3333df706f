"""Everything is decoded once: in memory, or on disk for later runs too."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from fedseg.datamodules import Case, DataError, FolderDataModule, Sample
from tests.data_files import folder, make_sites, picture, save, save_volume, square


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_sites(tmp_path / "data", "alpha", "beta")


def homes(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


def test_disk_and_memory_give_the_same(root: Path, tmp_path: Path) -> None:
    memory = folder(root, size=16, augment="strong")
    disk = folder(root, size=16, augment="strong", cache="disk", cache_dir=str(tmp_path / "cache"))
    again = folder(root, size=16, augment="strong", cache="disk", cache_dir=str(tmp_path / "cache"), workers=1)
    for name in memory.sites:
        for one, two, three in zip(
            *(data.site(name).train_batches(3, 3) for data in (memory, disk, again)), strict=True
        ):
            assert one["case"] == two["case"] == three["case"]
            assert torch.equal(one["image"], two["image"])
            assert torch.equal(one["mask"], three["mask"])
    assert isinstance(disk.site("alpha")._shared.slices.stores[0].blocks[0], np.memmap)


def test_spacing_and_volumes_survive_the_disk(tmp_path: Path) -> None:
    for number in range(4):
        for kind in ("images", "masks"):
            array = np.full((6, 8, 3 + number), number % 2 if kind == "masks" else number + 0.5, np.float32)
            save_volume(tmp_path / "mr" / kind / f"v{number}.nii.gz", array, np.diag([-1.0, -2.0, 3.0, 1.0]))
    knobs = {"cache": "disk", "cache_dir": str(tmp_path / "cache"), "size": [8, 6]}
    for _ in range(2):
        site = folder(tmp_path if not (tmp_path / "cache").is_dir() else _without_cache(tmp_path), **knobs).site("mr")
        (case,) = site.cases("test")
        assert site.spacing(case) == (3.0, 2.0, 1.0)
        assert site.image(case).shape == (3 + int(case.case[1:]), 8, 6, 1)


def _without_cache(root: Path) -> Path:
    """The data beside its cache, seen from a folder that holds only the data."""
    (root / "view").mkdir(exist_ok=True)
    link = root / "view" / "mr"
    if not link.exists():
        (root / "mr").rename(link)
    return root / "view"


def test_the_disk_is_read_instead_of_the_files(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = {"cache": "disk", "cache_dir": str(tmp_path / "cache")}
    folder(root, **knobs)
    decoded: list[str] = []
    original = FolderDataModule.read

    def read(self: FolderDataModule, case: Case) -> Sample:
        decoded.append(case.case)
        return original(self, case)

    monkeypatch.setattr(FolderDataModule, "read", read)
    folder(root, **knobs, split_seed=4, unseen=["beta"], batch_size=2, augment="light", neighbours=1)
    assert decoded == [], "settings that do not change decoded images must not decode again"
    save(root / "beta" / "images" / "case_100.png", picture(999))
    folder(root, **knobs)
    assert {name[5:8] for name in decoded} == {str(number) for number in range(100, 106)}, "only the changed site"
    for change in ({"size": 12}, {"channels": 1}, {"label_values": {1: 1, 255: 1}}, {"label_values": {255: 1, 1: 1}}):
        decoded.clear()
        folder(root, **(knobs | change))
        assert len(decoded) == 12, change


def test_regions_are_checked_against_a_cache_too(root: Path, tmp_path: Path) -> None:
    save(root / "alpha" / "masks" / "case_02.png", square(label=3))
    knobs = {"cache": "disk", "cache_dir": str(tmp_path / "cache")}
    folder(root, **knobs, ignore_labels=[3])
    with pytest.raises(DataError, match=r"case 'case_02': mask .*case_02.png has unknown label ids 3"):
        folder(root, **knobs)


def test_a_label_that_the_resize_loses_is_still_noticed(root: Path) -> None:
    mask = square()
    mask[19, 23] = 9
    save(root / "alpha" / "masks" / "case_02.png", mask)
    with pytest.raises(DataError, match="unknown label ids 9"):
        folder(root, size=[4, 4])


def test_a_run_that_dies_while_writing_leaves_nothing_that_is_used(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "cache"
    knobs = {"cache": "disk", "cache_dir": str(place)}
    original, saved = np.save, []

    def dying(path: object, array: np.ndarray) -> None:
        saved.append(path)
        if len(saved) == 2:
            raise KeyboardInterrupt
        original(path, array)

    monkeypatch.setattr(np, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        folder(root, **knobs)
    monkeypatch.undo()
    assert homes(place) == []
    (place / ".unfinished-killed").mkdir()  # what a killed process cannot tidy
    assert folder(root, **knobs).site("alpha").examples == 4
    assert len(homes(place)) == 3


def test_a_damaged_cache_is_named(root: Path, tmp_path: Path) -> None:
    knobs = {"cache": "disk", "cache_dir": str(tmp_path / "cache")}
    folder(root, **knobs)
    next((tmp_path / "cache").glob("alpha-*/index.json")).write_text("{")
    with pytest.raises(DataError, match=r"alpha-.* is damaged .*; delete that folder"):
        folder(root, **knobs)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be written .*choose another data.cache_dir"):
        folder(root, cache="disk", cache_dir=str(tmp_path / "file"))


def test_a_mapped_store_travels_by_name(root: Path, tmp_path: Path) -> None:
    store = folder(root, cache="disk", cache_dir=str(tmp_path / "c")).site("alpha")._shared.slices.stores[0]
    sent = pickle.dumps(store)
    assert len(sent) < 6 * 20 * 24 * 3
    assert np.array_equal(pickle.loads(sent).blocks[0], store.blocks[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample(np.zeros((1, 4, 4, 1)), None), "uint8 or float32, got float64"),  # type: ignore[arg-type]
        (Sample(np.zeros((1, 4, 4, 1), np.uint8), None), "disagree"),
        (Sample(np.zeros((1, 4, 4, 1), np.uint8), np.zeros((1, 4, 5), np.uint8)), r"the mask is \(1, 4, 5\)"),
    ],
)
def test_a_data_module_of_ones_own_is_checked(
    root: Path, sample: Sample, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(self: FolderDataModule, case: Case) -> Sample:
        return sample

    monkeypatch.setattr(FolderDataModule, "read", read)
    with pytest.raises(DataError, match=f"site 'alpha', case 'case_00': .*{message}"):
        folder(root)
