"""FedRDN: what is told, what is drawn, and what it reduces to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedseg.algorithms.recipe import Training
from fedseg.federation.contract import EvaluateTask, TrainTask
from fedseg.federation.state import State
from tests.world import ToySite, assert_same, build, simulate, toy_sites

PLAIN = Training(lr=1e-2, normalize="none")
SITES = ("s0", "s1", "s2")


def statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Means over images of the mean and the deviation of each channel."""
    rows = images.double().flatten(2)
    return rows.mean(dim=2).mean(dim=0), rows.std(dim=2, correction=0).mean(dim=0)


def normalised(site: ToySite) -> ToySite:
    """A site whose images are normalised beforehand, in the numbers that the method computes with."""
    mean, std = build("fedrdn").introduce(site)["statistics"].values()
    return replace(site, images=(site.images - mean.view(-1, 1, 1)) / std.view(-1, 1, 1))


@pytest.mark.parametrize("shape", [(5, 3, 12, 12), (4, 2, 6, 7, 5)])
def test_sites_tell_two_numbers_for_each_channel(shape: tuple[int, ...]) -> None:
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)) ** 2
    told = build("fedrdn").introduce(ToySite("s", 0, images, images[:, :2]))
    mean, std = statistics(images)
    assert told.tensors.keys() == {"statistics"}
    torch.testing.assert_close(told["statistics"]["mean"], mean.float())
    torch.testing.assert_close(told["statistics"]["std"], std.float())


def test_what_is_told_is_audited_and_counted(tmp_path: Path) -> None:
    observer = simulate("fedrdn", tmp_path, 1).observer
    audit = [row for row in observer.rows("audit") if row["task"] == "introduce" and row["group"] != "(numbers)"]
    assert {(row["site"], row["group"], row["numbers"]) for row in audit} == {(s, "statistics", 6) for s in SITES}
    traffic = [row for row in observer.rows("traffic") if row["group"].startswith("statistics")]
    assert {row["bytes"] for row in traffic} == {24}
    assert len(traffic) == 3 + 3 * 4  # told once; in a round's message the site's own, and those of all


def only(kind: str) -> dict[str, ToySite]:
    sites = {name: site for name, site in toy_sites().items() if name in SITES}
    if kind == "one":
        return {"s1": sites["s1"]}
    if kind == "equal":
        return {name: replace(sites["s1"], name=name, index=i) for i, name in enumerate(SITES)}
    return sites


@pytest.mark.parametrize(("kind", "share"), [("several", 0.0), ("one", 1.0), ("equal", 1.0)])
def test_it_is_fedavg_on_normalised_images_bit_for_bit(kind: str, share: float, tmp_path: Path) -> None:
    ours = simulate("fedrdn", tmp_path / "a", 2, sites=only(kind), share=share).server
    beforehand = {name: normalised(site) for name, site in only(kind).items()}
    theirs = simulate("fedavg", tmp_path / "b", 2, training=PLAIN, sites=beforehand).server
    for group in ("model", "buffers"):
        assert_same(State({group: ours[group]}), State({group: theirs[group]}))


def received(site: str, kind: type[TrainTask | EvaluateTask], **knobs: Any) -> Any:
    """A worker that has received what a server with three sites sends."""
    worker, sites = build("fedrdn", **knobs), toy_sites()
    server = worker.init_server({name: worker.introduce(sites[name]) for name in SITES})
    worker.receive(worker.broadcast(server, site, kind(1, 7)), State(), replace(sites["s0"], name=site))
    return worker


def test_each_image_is_normalised_by_the_mean_of_one_site_and_the_deviation_of_another() -> None:
    worker, sites = received("s1", TrainTask), toy_sites()
    told = [statistics(sites[name].images) for name in SITES]
    images = torch.rand(400, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    done = worker.redrawn(images)
    found = []
    for one, new in zip(images, done, strict=True):
        fits = [
            (m, d) for m in range(3) for d in range(3)
            if torch.allclose(new, ((one - told[m][0].view(-1, 1, 1)) / told[d][1].view(-1, 1, 1)).float(), atol=1e-4)
        ]  # fmt: skip
        found += fits
        assert len(fits) == 1
    counts = [found.count((m, d)) for m in range(3) for d in range(3)]
    assert min(counts) > 20
    assert max(counts) < 80


@pytest.mark.parametrize(("share", "least", "most"), [(0.0, 1.0, 1.0), (0.5, 0.45, 0.68), (1.0, 0.05, 0.2)])
def test_the_given_share_of_images_is_drawn_for(share: float, least: float, most: float) -> None:
    worker = received("s1", TrainTask, share=share)
    images = torch.rand(400, 3, 2, 2, 2, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    own = (worker.redrawn(images) - worker.normalize(images)).abs().flatten(1).amax(dim=1) < 1e-5
    assert least <= float(own.float().mean()) <= most  # 1 in 9 of those drawn is the site's own


def test_scoring_takes_the_sites_own_statistics_and_elsewhere_the_mean_over_sites() -> None:
    sites = toy_sites()
    told = {name: statistics(sites[name].images) for name in SITES}
    told["elsewhere"] = tuple(torch.stack(parts).mean(dim=0) for parts in zip(*told.values(), strict=True))
    images = sites["s2"].images
    for name, (mean, std) in told.items():
        worker = received(name, EvaluateTask)
        expected = (images - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
        torch.testing.assert_close(worker.normalize(images), expected.float(), rtol=1e-4, atol=1e-5)
        assert worker.answers_with()["statistics"]["mean"].shape == (3,)


def test_a_constant_channel_and_sites_of_other_channels() -> None:
    worker = build("fedrdn")
    flat = ToySite("s", 0, torch.full((2, 3, 4, 4), 0.5), torch.zeros(2, 2, 4, 4))
    server = worker.init_server({"s": worker.introduce(flat)})
    worker.receive(worker.broadcast(server, "s", TrainTask(1, 7)), State(), flat)
    assert not worker.normalize(flat.images).any()
    assert not worker.redrawn(flat.images).any()
    grey = worker.introduce(replace(flat, images=flat.images[:, :1]))
    with pytest.raises(ValueError, match="the same channels"):
        worker.init_server({"s": worker.introduce(flat), "grey": grey})


@pytest.mark.parametrize("kind", ["imagenet", "zscore"])
def test_a_second_normalisation_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match=rf"training\.normalize={kind} .* take training\.normalize=none"):
        build("fedrdn", Training(normalize=kind))
    build("fedrdn", Training(normalize="none"))
