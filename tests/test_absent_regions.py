"""Regions that never occur, vanish on the network's grid, or lack in a split: run and check say the same."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from fedseg.datamodules import DataError, FolderDataModule
from fedseg.datamodules.cases import SPLITS, Split
from fedseg.datamodules.check.command import check
from fedseg.datamodules.findings import Finding
from fedseg.datamodules.occurrence import MOST_LOST
from tests.data_files import make_site, make_sites, square, write_manifest

TWO = {"disc": [1], "cup": [2]}
Mask = Callable[[int], np.ndarray]


def nothing(number: int) -> np.ndarray:
    return np.zeros((20, 24), np.uint8)


def both(number: int) -> np.ndarray:
    mask = square()
    mask[12:16, 12:20] = 2
    return mask


def crowded(number: int) -> np.ndarray:
    """Three labels in a corner of 2 x 2 pixels: a grid of 5 x 6 has a single pixel for them."""
    mask = np.zeros((20, 24), np.uint8)
    mask[0, 0], mask[1, 1], mask[1, 0] = 1, 2, 3
    return mask


def data_of(root: Path, **knobs: Any) -> FolderDataModule:
    return FolderDataModule(root=str(root), **{"size": [20, 24], "augment": "none"} | knobs)


def told(root: Path, **knobs: Any) -> list[Finding]:
    """What a run finds of regions, the error that stops it included; the check must find the same."""
    data = data_of(root, **knobs)
    checked = [one for one in check(data_of(root, **knobs)).findings if "region" in one.kind or "no test" in one.kind]
    if errors := [one for one in checked if one.severity == "error"]:
        with pytest.raises(DataError) as refused:
            data.setup()
        assert str(refused.value) == str(errors[0])
    else:
        data.setup()
        assert [one for one in data.findings if "region" in one.kind] == checked
    return checked


def kinds(root: Path, **knobs: Any) -> list[tuple[str, str]]:
    return [(finding.kind, finding.site) for finding in told(root, **knobs)]


def settings_of(cure: str) -> dict[str, Any]:
    """The settings that a cure names between quotes, as a command line reads them."""
    quoted = re.findall(r"""(['"])data\.(.+?)\1(?:$|[ ,;)])""", cure)
    read: Any = OmegaConf.to_container(OmegaConf.from_dotlist([setting for _, setting in quoted]))
    return read


def test_sound_sites_have_nothing_to_tell(tmp_path: Path) -> None:
    for site in ("a", "b"):
        make_site(tmp_path, site, 8, mask=both)
    assert told(tmp_path, regions=TWO) == []


@pytest.mark.parametrize("names", [("a", "b"), ("a b", "c"), ("001", "no"), ("a: b", "it's")])
@pytest.mark.parametrize(
    ("masks", "expected"),
    [
        ((nothing, nothing), [("region never occurs", "")]),
        ((both, nothing), [("region never occurs", 1)]),
        ((both, lambda n: square()), [("region never occurs", 1)]),
        ((lambda n: square(), lambda n: square()), [("region never occurs", "")]),
        ((lambda n: square(label=2), lambda n: square()), [("region never occurs", 0), ("region never occurs", 1)]),
    ],
)
def test_a_region_that_never_occurs_is_refused_until_it_is_declared(
    tmp_path: Path, names: tuple[str, str], masks: tuple[Mask, Mask], expected: list[tuple[str, Any]]
) -> None:
    for site, mask in zip(names, masks, strict=True):
        make_site(tmp_path, site, 6, mask=mask, first=0 if site == names[0] else 50)
    in_order = sorted(names)
    found = told(tmp_path, regions=TWO)
    wanted = sorted((kind, site if site == "" else names[site]) for kind, site in expected)
    assert [(one.kind, one.site) for one in found] == sorted(wanted, key=lambda one: one[1] and in_order.index(one[1]))
    absent: dict[str, Any] = {}
    for one in found:
        for site, regions in settings_of(one.cure)["absent"].items():
            absent.setdefault(site, []).extend(regions)
    assert told(tmp_path, regions=TWO, absent=absent) == []


def test_a_cure_keeps_what_was_declared_before(tmp_path: Path) -> None:
    make_site(tmp_path, "a", mask=lambda n: square())
    make_site(tmp_path, "b", mask=lambda n: square(label=2), first=50)
    (one,) = told(tmp_path, regions=TWO, absent={"a": ["cup"]})
    assert settings_of(one.cure) == {"absent": {"a": ["cup"], "b": ["disc"]}}
    assert told(tmp_path, regions=TWO, **settings_of(one.cure)) == []


def test_of_a_site_that_does_not_train_only_all_masks_must_not_be_empty(tmp_path: Path) -> None:
    make_site(tmp_path, "a", 8, mask=both)
    make_site(tmp_path, "b", 8, mask=lambda n: square(), first=50)
    for knob in ("unseen", "unlabelled"):
        (one,) = told(tmp_path, regions=TWO, **{knob: ["b"]})
        assert (one.kind, one.severity, one.site) == ("region not tested", "warning", "b")
        assert told(tmp_path, regions=TWO, **{knob: ["b"]}, **settings_of(one.cure)) == []
    make_site(tmp_path, "b", 8, mask=nothing, first=50)
    for knob in ("unseen", "unlabelled"):
        assert kinds(tmp_path, regions=TWO, **{knob: ["b"]}) == [("region never occurs", "b")]


def test_what_is_declared_must_be_so(tmp_path: Path) -> None:
    make_sites(tmp_path, "a", "b")
    (one,) = told(tmp_path, absent={"a": ["foreground"]})
    assert (one.kind, one.site) == ("absent region occurs", "a")
    assert "6 of 6 masks show it" in one.what
    with pytest.raises(DataError, match=r"data.absent: no site 'c'"):
        data_of(tmp_path, absent={"c": ["foreground"]}).setup()
    with pytest.raises(DataError, match=r"data.absent: site 'a' has 'cop', which is no region; did you mean 'cup'"):
        data_of(tmp_path, regions=TWO, absent={"a": ["cop"]})


@pytest.mark.slow
@pytest.mark.parametrize("lost", [1, 2, 19])
def test_regions_that_vanish_are_counted_and_many_refused(tmp_path: Path, lost: int) -> None:
    regions = {"one": [1], "two": [2], "three": [3]}
    knobs = {"regions": regions, "size": [5, 6], "split_seed": 3}
    tiled = np.kron(np.array([[1, 2], [3, 0]], np.uint8), np.ones((10, 12), np.uint8))
    make_site(tmp_path, "a", 20, mask=lambda n: crowded(n) if n < lost else tiled)
    found = [one for one in told(tmp_path, **knobs) if "vanish" in one.kind]
    many = lost > MOST_LOST * 20
    assert [one.kind for one in found] == ["region vanishes" if many else "region vanishes in some cases"] * 2
    assert f"in {lost} of the 20 cases that show it (case_00" in found[0].what
    allowed = [one for one in told(tmp_path, **knobs, vanishing="allow") if "vanish" in one.kind]
    assert [one.kind for one in allowed] == ["region vanishes in some cases"] * 2
    size = re.search(r"data\.size=(\S+), which", found[0].cure)
    assert size is not None
    kept = [int(side) for side in size[1].strip("[]").split(",")]
    assert not [one for one in told(tmp_path, **knobs | {"size": kept}) if "vanish" in one.kind]
    smaller = [side // 2 for side in kept]
    assert [one for one in told(tmp_path, **knobs | {"size": smaller}) if "vanish" in one.kind]


def test_small_lesions_stay_and_are_counted_as_such(tmp_path: Path) -> None:
    def lesion(number: int) -> np.ndarray:
        mask = np.zeros((128, 128), np.uint8)
        mask[9 + 3 * number : 11 + 3 * number, 101:103] = 1
        return mask

    for site in ("a", "b"):
        make_site(tmp_path, site, 8, mask=lesion, size=(128, 128))
    data = data_of(tmp_path, size=32)
    data.setup()
    sites = [data.site(name) for name in data.sites]
    assert {int(site.truth(c).sum()) for site in sites for split in SPLITS for c in site.cases(split)} == {1}
    assert told(tmp_path, size=32) == []


def test_no_test_case_at_all(tmp_path: Path) -> None:
    make_sites(tmp_path, "a", "b", count=3)
    rows = [
        {"site": site, "image": f"{site}/images/{name}", "mask": f"{site}/masks/{name}", "split": split}
        for site, first in (("a", 0), ("b", 100))
        for name, split in ((f"case_{first:02d}.png", "train"), (f"case_{first + 1:02d}.png", "val"))
    ]
    write_manifest(tmp_path / "sites.csv", rows)
    assert kinds(tmp_path) == [("no test case", "")]
    assert kinds(tmp_path, split=[0.8, 0.2, 0]) == []  # as the cure says
    data = data_of(tmp_path)
    data.restrict("a")
    data.setup()  # others may have the test cases


@pytest.mark.parametrize(("split", "effect"), [("train", "cannot learn"), ("val", "best round"), ("test", "undefined")])
def test_a_region_that_lacks_in_one_split_is_told(tmp_path: Path, split: Split, effect: str) -> None:
    make_site(tmp_path, "a", 12, mask=both)
    data = data_of(tmp_path, regions=TWO)
    data.setup()
    lacking = {case.case for case in data.site("a").cases(split)}
    make_site(tmp_path, "a", 12, mask=lambda n: square() if f"case_{n:02d}" in lacking else both(n))
    (one,) = told(tmp_path, regions=TWO)
    assert (one.kind, one.severity) == ("region not in every split", "warning")
    assert f"of 12 masks show: {'the site ' if split == 'train' else ''}" in one.what
    assert effect in one.what


def test_a_label_budget_may_leave_a_region_untaught(tmp_path: Path) -> None:
    make_site(tmp_path, "a", 12, mask=both)
    data = data_of(tmp_path, regions=TWO, labelled_patients=1)
    data.setup()
    (taught,) = data.site("a").cases("train")
    make_site(tmp_path, "a", 12, mask=lambda n: square() if f"case_{n:02d}" == taught.case else both(n))
    assert kinds(tmp_path, regions=TWO, labelled_patients=1) == [("region not in every split", "a")]
    assert kinds(tmp_path, regions=TWO) == []


def test_a_site_alone_sees_its_own_regions_only(tmp_path: Path) -> None:
    make_site(tmp_path, "a", 8, mask=both)
    make_site(tmp_path, "b", 8, mask=lambda n: square(), first=50)
    for site, fails in (("a", False), ("b", True)):
        data = data_of(tmp_path, regions=TWO)
        data.restrict(site)
        if fails:
            with pytest.raises(DataError, match=r"site 'b': none of its 8 masks shows 'cup'"):
                data.setup()
        else:
            data.setup()
    data = data_of(tmp_path, regions=TWO, absent={"b": ["cup"], "elsewhere": ["disc"]})
    data.restrict("b")
    data.setup()


def test_volumes_count_as_cases(tmp_path: Path) -> None:
    """A region in one slice of a stack is in the case."""
    make_site(tmp_path, "a", 40, mask=lambda n: both(n) if n % 4 == 0 else nothing(n))
    assert kinds(tmp_path, regions=TWO, stack_slices=True, patient_pattern=r"^case_(\d)\d$") == []
