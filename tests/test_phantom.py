"""The phantom: pure cases, dials that move what they should and nothing else, valid labels, volumes, errors."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from fedseg.datamodules.cases import Sample
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.phantom import data
from fedseg.datamodules.phantom.data import FEWEST_CASES, REGIONS, Anatomy, PhantomDataModule, draw_case
from fedseg.datamodules.phantom.fundus import CUP, RIM
from fedseg.datamodules.phantom.organ import FIELD_OF_VIEW, LENGTH, LESION
from fedseg.datamodules.phantom.style import Dials, site_style

ANATOMIES: tuple[Anatomy, ...] = ("fundus", "organ")
REMEMBERED = {name: getattr(data, name) for name in ("draw_fundus", "draw_organ")}  # of conftest
pytestmark = pytest.mark.usefixtures("drawn_anew")
NONE = Dials(0, 0, 0, 0)
ALL = Dials(1, 1, 1, 1)


def draw(anatomy: Anatomy, site: int, index: int, dials: Dials = ALL, seed: int = 0, **kwargs: Any) -> Sample:
    return draw_case(anatomy, seed, site, index, dials, **{"resolution": 64, **kwargs})


def equal(a: Sample, b: Sample) -> bool:
    return np.array_equal(a.image, b.image) and np.array_equal(a.labels, b.labels)


def area(sample: Sample, ids: tuple[int, ...] = (1, 2)) -> float:
    return float(np.isin(sample.labels, ids).mean())


@pytest.mark.parametrize("anatomy", ANATOMIES)
def test_a_case_depends_on_seed_site_and_index_only(anatomy: Anatomy) -> None:
    forward = [draw(anatomy, site, index) for site in (0, 1) for index in (0, 1)]
    np.random.seed(5)  # noqa: NPY002 - the global state must not matter
    backward = [draw(anatomy, site, index) for site in (1, 0) for index in (1, 0)][::-1]
    assert all(equal(a, b) for a, b in zip(forward, backward, strict=True))
    for i, a in enumerate(forward):
        assert not any(np.array_equal(a.image, b.image) for b in forward[i + 1 :])
    assert not equal(draw(anatomy, 0, 0, seed=1), forward[0])


def test_cases_stay_when_sites_are_added_and_amounts_change() -> None:
    few = PhantomDataModule(n_sites=2, cases_per_site=10, amount=0.0, resolution=64)
    many = PhantomDataModule(n_sites=12, cases_per_site=30, amount=1.0, resolution=64)
    larger = {(case.site, case.case): case for case in many.cases()}
    for case in few.cases()[::4]:
        if (case.site, case.case) in larger:
            assert equal(few.read(case), many.read(larger[case.site, case.case]))
    assert sum((case.site, case.case) in larger for case in few.cases()[::4]) >= 3


def test_cases_that_other_tests_copy_are_those_that_are_drawn() -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, remembering in REMEMBERED.items():
            patch.setattr(data, name, remembering)
        copies = [draw(anatomy, 0, 0) for anatomy in ANATOMIES]
        for copied in copies:
            copied.image[:] = 7
        again = [draw(anatomy, 0, 0) for anatomy in ANATOMIES]
    assert all(equal(copied, draw(anatomy, 0, 0)) for copied, anatomy in zip(again, ANATOMIES, strict=True))


def test_names_sort_in_the_order_of_the_sites() -> None:
    cases = PhantomDataModule(n_sites=11, cases_per_site=5, amount=0.0).cases()
    names = list(dict.fromkeys(case.site for case in cases))
    assert names == sorted(names)
    assert names[0] == "site_01"
    assert names[-1] == "site_11"
    assert len({(case.site, case.case) for case in cases}) == len(cases) == 55


@pytest.mark.slow
@pytest.mark.parametrize("anatomy", ANATOMIES)
def test_dials_at_zero_give_sites_of_one_distribution(anatomy: Anatomy) -> None:
    assert len({site_style(0, site, NONE) for site in range(20)}) == 1
    count = 36
    for measure in (lambda s: float(s.image.mean()), lambda s: float(s.image.std()), area):
        values = np.array([[measure(draw(anatomy, site, i, NONE)) for i in range(count)] for site in range(3)])
        error = np.sqrt(values.var(axis=1, ddof=1).mean() / count)
        assert np.ptp(values.mean(axis=1)) < 5 * error


@pytest.mark.parametrize("anatomy", ANATOMIES)
def test_the_appearance_dial_moves_images_and_not_labels(anatomy: Anatomy) -> None:
    brightness = []
    for site in range(4):
        plain, styled = draw(anatomy, site, 0, NONE), draw(anatomy, site, 0, Dials(1, 0, 0, 0))
        assert np.array_equal(plain.labels, styled.labels)
        assert not np.array_equal(plain.image, styled.image)
        brightness.append(np.mean([draw(anatomy, site, i, Dials(1, 0, 0, 0)).image.mean() for i in range(8)]))
    assert np.ptp(brightness) > 40


@pytest.mark.slow
@pytest.mark.parametrize("anatomy", ANATOMIES)
def test_the_annotation_dial_moves_labels_and_not_images(anatomy: Anatomy) -> None:
    dials = Dials(0, 1, 0, 0)
    for site in range(6):
        ratios = []
        for index in range(8):
            plain, drawn = draw(anatomy, site, index, NONE), draw(anatomy, site, index, dials)
            assert np.array_equal(plain.image, drawn.image)
            ratios.append(area(drawn) / area(plain))
        outline = site_style(0, site, dials).outline
        assert np.mean(ratios) == pytest.approx((1 + outline) ** 2, abs=0.08)


def test_some_annotators_draw_larger_and_some_smaller() -> None:
    for seed in range(10):
        outlines = [site_style(seed, site, ALL).outline for site in range(4)]
        assert min(outlines) < -0.05
        assert max(outlines) > 0.05


@pytest.mark.parametrize("anatomy", ANATOMIES)
def test_the_structure_dial_moves_sizes_and_prevalence(anatomy: Anatomy) -> None:
    dials = Dials(0, 0, 1, 0)
    for site in range(4):
        ratios = [area(draw(anatomy, site, i, dials)) / area(draw(anatomy, site, i, NONE)) for i in range(5)]
        assert np.mean(ratios) == pytest.approx(site_style(0, site, dials).size ** 2, rel=0.12)
    styles = [site_style(0, site, dials) for site in range(6)]
    assert max(s.prevalence for s in styles) - min(s.prevalence for s in styles) > 0.3
    frequent = max(range(6), key=lambda site: styles[site].prevalence)
    rare = min(range(6), key=lambda site: styles[site].prevalence)
    if anatomy == "organ":
        share = [
            np.mean([area(draw("organ", s, i, dials), (LESION,)) > 0 for i in range(40)]) for s in (frequent, rare)
        ]
        assert share[0] - share[1] > 0.2


def test_each_dial_sets_its_own_traits_only() -> None:
    neutral = asdict(site_style(0, 3, NONE))
    owned = {
        "appearance": {"gamma", "contrast", "brightness", "gains", "tilt", "vignette", "blur", "noise"},
        "annotation": {"outline", "inner_outline", "smoothing"},
        "structure": {"size", "prevalence"},
        "amount": {"cases"},
    }
    for dial, traits in owned.items():
        turned = asdict(site_style(0, 3, replace(NONE, **{dial: 1.0})))
        assert {trait for trait in turned if turned[trait] != neutral[trait]} == traits


def test_traits_spread_evenly_over_the_sites() -> None:
    for count in (4, 6, 20):
        outlines = sorted(site_style(3, site, ALL).outline for site in range(count))
        assert np.diff(outlines).max() < 2.7 * 0.6 / count
    styles = [asdict(site_style(0, site, ALL)) for site in range(60)]
    table = np.array(
        [[s[t] for t in ("outline", "inner_outline", "contrast", "gamma", "size", "cases")] for s in styles]
    )
    correlation = np.corrcoef(table.T) - np.eye(table.shape[1])
    assert np.abs(correlation).max() < 0.3


def test_the_amount_dial_moves_counts_only() -> None:
    level = PhantomDataModule(amount=0.0, cases_per_site=24)
    steep = PhantomDataModule(amount=1.0, cases_per_site=24)
    assert {level.amount(site) for site in range(6)} == {24}
    counts = [steep.amount(site) for site in range(6)]
    assert max(counts) > 3 * min(counts)
    assert all(FEWEST_CASES <= count <= 4 * 24 for count in counts)
    assert equal(level.read(level.cases()[0]), steep.read(steep.cases()[0]))


@pytest.mark.parametrize("dials", [NONE, ALL], ids=["none", "all"])
def test_the_cup_lies_in_the_disc(dials: Dials) -> None:
    for site in range(4):
        for index in range(10):
            labels = draw("fundus", site, index, dials, resolution=96).labels
            assert labels is not None
            assert set(np.unique(labels)) <= {0, RIM, CUP}
            disc = np.isin(labels[0], REGIONS["fundus"]["disc"])
            assert disc.any()
            assert (labels == CUP).any()
            assert not disc[[0, -1]].any()  # not cut by the border
            assert not disc[:, [0, -1]].any()


@pytest.mark.parametrize("anatomy", ANATOMIES)
def test_the_resolution_changes_the_grid_and_not_the_anatomy(anatomy: Anatomy) -> None:
    for index in range(4):
        coarse, fine = (area(draw(anatomy, 0, index, NONE, resolution=r)) for r in (64, 192))
        assert coarse == pytest.approx(fine, rel=0.06)


def test_volumes() -> None:
    sample = draw("organ", 0, 0, slices=9, resolution=48)
    assert sample.image.shape == (9, 48, 48, 1)
    assert sample.labels is not None
    assert sample.labels.shape == (9, 48, 48)
    areas = (sample.labels > 0).sum(axis=(1, 2))
    assert areas[0] == areas[-1] == 0  # the first and last slice miss the organ, as in a real volume
    assert areas.argmax() in (3, 4, 5)
    assert (np.diff(areas[:4]) >= 0).all()
    assert sample.spacing == (LENGTH / 8, FIELD_OF_VIEW / 48, FIELD_OF_VIEW / 48)
    assert not np.array_equal(sample.image[3], sample.image[4])


def test_volumes_are_annotated_in_three_dimensions() -> None:
    generous = max(range(6), key=lambda site: site_style(0, site, ALL).outline)
    plain = draw("organ", generous, 0, NONE, slices=25)
    drawn = draw("organ", generous, 0, Dials(0, 1, 0, 0), slices=25)
    assert np.array_equal(plain.image, drawn.image)
    slices = [int((s.labels > 0).any(axis=(1, 2)).sum()) for s in (plain, drawn) if s.labels is not None]
    assert slices[1] > slices[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"anatomy": "heart"}, "fundus, organ"),
        ({"appearance": 1.5}, "appearance=1.5"),
        ({"annotation": -0.1}, "annotation=-0.1"),
        ({"anatomy": "fundus", "slices": 4}, "anatomy=organ"),
        ({"anatomy": "organ", "slices": 0}, "slices=0"),
        ({"anatomy": "organ", "slices": 2}, "slices=2 .* take 1, or 3 or more"),
        ({"n_sites": 0}, "n_sites=0"),
        ({"cases_per_site": 2}, "cases_per_site=2"),
        ({"resolution": 8}, "resolution=8"),
        ({"phantom_seed": -1}, "phantom_seed=-1"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        PhantomDataModule(**arguments)


@pytest.mark.parametrize("arguments", [{"anatomy": "fundus"}, {"anatomy": "organ", "slices": 5}], ids=["2d", "volumes"])
def test_the_data_module_hands_out_batches(arguments: dict[str, Any]) -> None:
    data = PhantomDataModule(n_sites=2, cases_per_site=8, amount=0.0, resolution=64, size=64, batch_size=4, **arguments)
    data.setup()
    assert data.sites == ("site_01", "site_02")
    regions = len(REGIONS[arguments["anatomy"]])
    channels = 3 if arguments["anatomy"] == "fundus" else 1
    batch = next(iter(data.site("site_02").train_batches(seed=0, steps=2)))
    assert batch["image"].shape == (4, channels, 64, 64)
    assert batch["mask"].shape == (4, regions, 64, 64)
    assert 0.0 <= float(batch["image"].min()) < float(batch["image"].max()) <= 1.0
    assert {float(v) for v in batch["mask"].unique()} <= {0.0, 1.0}
    assert {row["split"] for row in data.splits()} == {"train", "val", "test"}


def test_what_nobody_annotated_at_a_site_is_not_outlined_there() -> None:
    regions = {"rim": [RIM], "cup": [CUP]}
    left_out = {"site_01": ["cup"], "site_02": ["rim"]}
    size = {"n_sites": 3, "cases_per_site": FEWEST_CASES, "resolution": 64}
    apart = PhantomDataModule(regions=regions, exclusive=True, unannotated=left_out, **size)
    whole = PhantomDataModule(regions=regions, exclusive=True, **size)
    for case in apart.cases():
        drawn, all_of_it = apart.read(case), whole.read(case)
        assert np.array_equal(drawn.image, all_of_it.image)
        lost = {"site_01": CUP, "site_02": RIM}.get(case.site)
        assert np.array_equal(drawn.labels, np.where(all_of_it.labels == lost, 0, all_of_it.labels))
    nested = PhantomDataModule(unannotated={"site_01": ["cup"]}, **size)
    case = nested.cases()[0]
    assert np.array_equal(nested.read(case).labels, whole.read(case).labels > 0)  # the cup is disc, too
    assert apart.decoding() != whole.decoding()


def test_a_nested_region_cannot_lie_in_one_that_nobody_annotated() -> None:
    left_out = {"site_01": ["disc"]}
    refused = PhantomDataModule(unannotated=left_out, n_sites=2, cases_per_site=FEWEST_CASES, resolution=64)
    with pytest.raises(DataError, match=r"leaves pixels of cup within it without a label; take regions that do not"):
        refused.read(refused.cases()[0])
    cured = {"rim": [RIM], "cup": [CUP]}
    left_out = {"site_01": ["rim"]}
    PhantomDataModule(regions=cured, unannotated=left_out, n_sites=2, resolution=64).read(refused.cases()[0])


def test_each_number_of_slices_that_is_taken_shows_the_organ() -> None:
    for slices in (1, 3, 4):
        labels = draw("organ", 0, 0, NONE, slices=slices).labels
        assert labels is not None
        assert labels.any()
