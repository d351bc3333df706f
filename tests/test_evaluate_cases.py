"""Slices become cases, and cases become scores."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedseg.datamodules import Case, Regions
from fedseg.evaluation import CaseScore, evaluate, predict_cases

REGIONS = Regions({"disc": (1, 2), "cup": (2,)})


@dataclass
class FakeSite:
    """Images whose pixels are label ids / 10: the truth can be read off the image."""

    labels: dict[str, NDArray[np.uint8]]  # case to (D, H, W)
    batch_size: int = 3
    regions: Regions = REGIONS
    spacings: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    name: str = "here"

    def cases(self, split: str) -> list[Case]:
        return [Case(self.name, name.split("/")[0], name) for name in self.labels] if split == "test" else []

    def spacing(self, case: Case) -> tuple[float, float, float] | None:
        return self.spacings.get(case.case)

    def eval_batches(self, split: str) -> Iterator[dict[str, Any]]:
        slices = [
            (case.case, number, volume)
            for case, volume in zip(self.cases(split), self.labels.values(), strict=False)
            for number in range(len(volume))
        ]
        for start in range(0, len(slices), self.batch_size):
            part = slices[start : start + self.batch_size]
            labels = torch.from_numpy(np.stack([volume[number] for _, number, volume in part]))
            yield {
                "image": labels[:, None].float() / 10,
                "mask": self.regions.encode(labels),
                "case": [name for name, _, _ in part],
                "slice": torch.tensor([number for _, number, _ in part]),
                "depth": torch.tensor([len(volume) for _, _, volume in part]),
            }


def oracle(images: Tensor) -> Tensor:
    """Disc where the label is 1 or 2, cup where it is 2."""
    return torch.cat([images > 0.05, images > 0.15], dim=1).float()


def volumes() -> dict[str, NDArray[np.uint8]]:
    rng = np.random.default_rng(0)
    return {name: rng.integers(0, 3, (depth, 6, 5)).astype(np.uint8) for name, depth in [("a", 4), ("b", 1), ("c", 5)]}


def as_dict(scores: list[CaseScore]) -> dict[tuple[str, str, str], float]:
    return {row[:3]: row.value for row in scores}


def test_a_perfect_model_and_the_order_of_rows() -> None:
    scores = evaluate(oracle, FakeSite(volumes()), "test", REGIONS, metrics=["dice", "hd95"], tolerance=1)
    assert [row[:3] for row in scores] == [
        (case, region, metric) for case in "abc" for region in ("disc", "cup") for metric in ("dice", "hd95")
    ]
    assert {row.value for row in scores} == {1.0, 0.0}


def test_a_volume_is_scored_as_a_whole() -> None:
    labels = np.zeros((2, 4, 4), np.uint8)
    labels[0, :2, :2], labels[1, 0, 0] = 1, 1  # 4 and 1 pixels of disc

    def first_slice_only(images: Tensor) -> Tensor:
        large = (images > 0.05).sum(dim=(1, 2, 3), keepdim=True) > 1
        return oracle(images) * large

    scores = as_dict(
        evaluate(first_slice_only, FakeSite({"v": labels}), "test", REGIONS, metrics=["dice"], tolerance=1)
    )
    assert scores["v", "disc", "dice"] == pytest.approx(2 * 4 / (4 + 5))  # not the mean of 1 and 0
    assert np.isnan(scores["v", "cup", "dice"])  # the case does not show it


@pytest.mark.parametrize("batch_size", [1, 2, 3, 10])
def test_scores_do_not_depend_on_the_batches(batch_size: int) -> None:
    def model(images: Tensor) -> Tensor:
        return torch.cat([images > 0.15, images < 0.05], dim=1).float()

    def scores(size: int) -> dict[tuple[str, str, str], float]:
        return as_dict(
            evaluate(model, FakeSite(volumes(), size), "test", REGIONS, metrics=["dice", "nsd"], tolerance=1)
        )

    assert scores(batch_size) == scores(4)


def test_the_order_of_cases_changes_no_score() -> None:
    def model(images: Tensor) -> Tensor:
        return torch.cat([images > 0.15, images < 0.05], dim=1).float()

    turned = dict(reversed(volumes().items()))
    runs = [evaluate(model, FakeSite(v), "test", REGIONS, metrics=["assd"], tolerance=1) for v in (volumes(), turned)]
    assert runs[0] != runs[1]
    assert as_dict(runs[0]) == as_dict(runs[1])


def test_spacing_is_each_case_s_own() -> None:
    labels = np.zeros((1, 1, 9), np.uint8)
    labels[0, 0, 2] = 1

    def shifted(images: Tensor) -> Tensor:
        return oracle(images).roll(4, dims=-1)

    site = FakeSite({"known": labels, "unknown": labels}, spacings={"known": (5.0, 1.0, 0.25)})
    scores = as_dict(evaluate(shifted, site, "test", REGIONS, metrics=["hd95", "nsd"], tolerance=1))
    assert scores["known", "disc", "hd95"] == pytest.approx(1.0)
    assert scores["unknown", "disc", "hd95"] == pytest.approx(4.0)
    assert (scores["known", "disc", "nsd"], scores["unknown", "disc", "nsd"]) == (1, 0)


def test_exclusive_regions_are_decided_against_the_background() -> None:
    regions = Regions({"one": (1,), "two": (2,)}, exclusive=True)
    site = FakeSite({"a": np.array([[[0, 1, 2]]], np.uint8)}, regions=regions)

    def unsure(images: Tensor) -> Tensor:  # background .6 .25 .3, one .3 .4 .3, two .1 .35 .4
        table = torch.tensor([[[0.3, 0.4, 0.3]], [[0.1, 0.35, 0.4]]])
        return table.expand(len(images), -1, -1, -1)

    assert {row.value for row in evaluate(unsure, site, "test", regions, metrics=["dice"], tolerance=1)} == {1.0}


def test_masks_of_chosen_cases_are_predicted_alone() -> None:
    seen = []

    def counting(images: Tensor) -> Tensor:
        seen.append(len(images))
        return oracle(images)

    site = FakeSite(volumes())
    (masks,) = predict_cases(counting, site, "test", REGIONS, only={"c"})
    assert masks.case.case == "c"
    assert masks.prediction.shape == masks.truth.shape == (2, 5, 6, 5)
    assert masks.prediction.dtype == masks.truth.dtype == np.bool_
    assert (masks.truth[1] == (volumes()["c"] == 2)).all()
    assert sum(seen) == 5


def test_cases_of_the_same_name_follow_each_other() -> None:
    labels = volumes()
    site = FakeSite({"x/1": labels["a"], "x/2": labels["c"]})
    depths = [masks.truth.shape[1] for masks in predict_cases(oracle, site, "test", REGIONS)]
    assert depths == [4, 5]


def test_one_case_at_a_time() -> None:
    site = FakeSite(volumes(), batch_size=1)
    taken = []

    def watching(images: Tensor) -> Tensor:
        taken.append(len(images))
        return oracle(images)

    stream = predict_cases(watching, site, "test", REGIONS)
    next(stream)
    assert sum(taken) == 4  # the slices of the first case, none of the next


def test_a_split_without_cases_has_no_scores() -> None:
    assert evaluate(oracle, FakeSite(volumes()), "val", REGIONS, metrics=["dice"], tolerance=1) == []


def test_no_gradient_is_kept() -> None:
    weight = torch.ones(1, requires_grad=True)
    flags = []

    def model(images: Tensor) -> Tensor:
        flags.append((oracle(images) * weight).requires_grad)
        return oracle(images) * weight

    evaluate(model, FakeSite(volumes()), "test", REGIONS, metrics=["dice"], tolerance=1)
    assert not any(flags)


def test_what_cannot_be_scored_raises() -> None:
    site = FakeSite(volumes())
    with pytest.raises(ValueError, match=r"site 'here'.*not finite.*a"):
        evaluate(lambda images: oracle(images) * float("nan"), site, "test", REGIONS, metrics=["dice"], tolerance=1)
    with pytest.raises(ValueError, match="regions disc, cup"):
        evaluate(lambda images: images, site, "test", REGIONS, metrics=["dice"], tolerance=1)
    with pytest.raises(ValueError, match="did you mean"):
        evaluate(oracle, site, "val", REGIONS, metrics=["dise"], tolerance=1)


def test_slices_out_of_order_raise() -> None:
    class Shuffled(FakeSite):
        def eval_batches(self, split: str) -> Iterator[dict[str, Any]]:
            for batch in super().eval_batches(split):
                batch["slice"] = batch["slice"].flip(0)
                yield batch

    class Short(FakeSite):
        def eval_batches(self, split: str) -> Iterator[dict[str, Any]]:
            yield next(super().eval_batches(split))

    for site in (Shuffled(volumes()), Short(volumes())):
        with pytest.raises(ValueError, match=r"slice 0|slice 3"):
            evaluate(oracle, site, "test", REGIONS, metrics=["dice"], tolerance=1)
