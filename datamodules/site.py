"""What a worker sees of the data: one site's batches, cases and truth."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from types import MappingProxyType
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from fedseg.common.names import did_you_mean
from fedseg.common.seeds import data_seed
from fedseg.datamodules.cache import Store
from fedseg.datamodules.cases import SPLITS, Case, Pixels, Sample, Split
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.findings import few
from fedseg.datamodules.patches import Patches
from fedseg.datamodules.regions import Regions
from fedseg.datamodules.sampling import Batch, Feed, Loaders, Pick, Plan, Sampling, patient_plans, training_plans
from fedseg.datamodules.transforms import Augmentation


class SliceSet(Dataset[Batch]):
    """Answers a plan with a batch, from the stores of all sites.

    Args:
        stores: One per site.
        regions: Turn label ids into masks.
        channels: Of an image; grey images are repeated where it is 3.
        neighbours: Slices on either side that join a slice as further channels.
        augmentation: For plans that ask for it.
        ignored: Label ids whose pixels do not count.
        unannotated: Site to regions that do not count there.
        dimensions: 2: an image is a slice; 3: it is a volume.
        patches: How patches are cut of images; None where images have the network's size.
        dropout: Probability with which a channel of an augmented image becomes 0.
    """

    def __init__(
        self,
        stores: Sequence[Store],
        regions: Regions,
        channels: int,
        neighbours: int,
        augmentation: Augmentation,
        ignored: Collection[int] = (),
        unannotated: Mapping[str, Sequence[str]] = MappingProxyType({}),
        dimensions: int = 2,
        patches: Patches | None = None,
        dropout: float = 0.0,
    ) -> None:
        self.stores = stores
        self.regions = regions
        self.channels = channels
        self.neighbours = neighbours
        self.augmentation = augmentation
        self.ignored = tuple(sorted(ignored))
        self.unannotated = {site: names for site, names in unannotated.items() if names}
        self.dimensions = dimensions
        self.patches = patches
        self.dropout = dropout

    def __getitem__(self, plan: Plan) -> Batch:
        """A batch: see :class:`SiteData`."""
        if not plan.picks:
            nothing = torch.empty(0, dtype=torch.int64)
            return {"image": torch.empty(0), "mask": torch.empty(0), "case": [], "patient": nothing}
        images: list[Tensor] = []
        labels: list[NDArray[np.uint8]] = []
        for pick in plan.picks:
            image, truth = self._cut(pick, plan)
            views: list[Pixels] = [image] * plan.views
            if plan.augment:
                views, truth = self.augmentation(image, truth, pick.seed, plan.views)
                self._blank(views, self._left_out(self.stores[pick.store].cases[pick.case].absent, pick.seed))
            images.append(_to_tensor(views))
            if truth is not None:
                labels.append(truth)
        stacked = torch.stack(images)
        batch: Batch = {
            "image": stacked if plan.views > 1 else stacked[:, 0],
            "case": [self.stores[pick.store].cases[pick.case].case for pick in plan.picks],
            "slice": torch.tensor([pick.slice for pick in plan.picks]),
            "depth": torch.tensor([self.stores[pick.store].entries[pick.case].depth for pick in plan.picks]),
        }
        if plan.patients is not None:
            batch["patient"] = torch.tensor(plan.patients)
        if plan.masks:
            ids = torch.from_numpy(np.stack(labels))
            batch["mask"] = self.regions.encode(ids, self.dimensions)
            if self.leaves_out:
                annotated = torch.stack([self._annotated(self.stores[pick.store].cases[0].site) for pick in plan.picks])
                known = self.regions.known(ids, self.ignored, self.dimensions)
                batch["known"] = known * annotated.view(*annotated.shape[:2], *[1] * self.dimensions)
        return batch

    def _left_out(self, absent: Sequence[int], seed: int) -> Sequence[int]:
        """Places of the modalities that a case lacks, and of those that are drawn to be left out; some one stays."""
        if not self.dropout:
            return absent
        random = np.random.default_rng(data_seed(seed, "modalities"))
        there = random.permutation([place for place in range(self.channels) if place not in absent])
        dropped = there[random.random(len(there)) < self.dropout].tolist()
        return [*absent, *(dropped if len(dropped) < len(there) else dropped[1:])]

    def _blank(self, views: list[Pixels], places: Sequence[int]) -> None:
        """Makes modalities 0 in all views, in a slice and its neighbours, whatever augmentation made of them."""
        for number, view in enumerate(views):
            if any(view[..., place :: self.channels].any() for place in places):
                views[number] = view.copy()  # it may be the cache's
                for place in places:
                    views[number][..., place :: self.channels] = 0

    def _cut(self, pick: Pick, plan: Plan) -> tuple[Pixels, NDArray[np.uint8] | None]:
        """An image and its truth; where patches are cut, the patch that a pick names or, for training, draws."""
        image = self.image(pick)
        truth = self._truth(pick, taught=plan.augment) if plan.masks else None
        if self.patches is None or not (plan.augment or pick.corner is not None):
            return image, truth
        corner = pick.corner
        if corner is None:
            corner = self.patches.corner(image.shape[:-1], truth, data_seed(pick.seed, "patch"))
        return self.patches.cut(image, corner), None if truth is None else self.patches.cut(truth, corner)

    def counts(self, pick: Pick) -> Tensor:
        """(2, R) float64: pixels of each region, and pixels that count; of several masks to learn, the mean."""
        site, found = self.stores[pick.store].cases[pick.case].site, []
        for lesson in self.stores[pick.store].lessons(pick.case):
            labels = torch.tensor(self._part(pick, lesson))
            masks = self.regions.encode(labels, self.dimensions).double().flatten(1)
            known = self.regions.known(labels, self.ignored, self.dimensions)
            counting = (known.double() * self._annotated(site).double().view(-1, *[1] * self.dimensions)).flatten(1)
            found.append(torch.stack([(masks * counting).sum(dim=1), counting.sum(dim=1)]))
        return torch.stack(found).mean(dim=0)

    @property
    def leaves_out(self) -> bool:
        """Whether there are pixels or regions that do not count."""
        return bool(self.ignored or self.unannotated)

    def known(self, case: Case, labels: NDArray[np.uint8]) -> NDArray[np.bool_] | None:
        """Where labels (..., H, W) of a case count: (..., R, H, W); None where all do."""
        if not self.leaves_out:
            return None
        counts = self.regions.known(torch.from_numpy(labels), self.ignored) * self._annotated(case.site)
        return (counts > 0.5).numpy()

    def _annotated(self, site: str) -> Tensor:
        """(R, 1, 1), 0 for regions that were not annotated at a site."""
        names = self.unannotated.get(site, ())
        return torch.tensor([float(name not in names) for name in self.regions.names])[:, None, None]

    def image(self, pick: Pick) -> Pixels:
        """As the network sees it, before patch and augmentation.

        (h, w, channels * (2 * neighbours + 1)), or (d, h, w, channels).
        """
        volume = self.stores[pick.store].images(pick.case)
        if self.dimensions == 3:
            return self._coloured(volume)
        around = range(pick.slice - self.neighbours, pick.slice + self.neighbours + 1)
        planes = [self._coloured(volume[min(max(k, 0), len(volume) - 1)]) for k in around]
        return planes[0] if len(planes) == 1 else cast(Pixels, np.concatenate(planes, axis=-1))

    def shape(self, pick: Pick) -> tuple[int, ...]:
        """(h, w) or (d, h, w) of what `image` gives."""
        store = self.stores[pick.store]
        entry = store.entries[pick.case]
        height, width = store.blocks[entry.block].shape[1:3]
        return (entry.depth, height, width) if self.dimensions == 3 else (height, width)

    def try_augmentation(self) -> None:
        """Runs every transform once on each kind of image there is.

        Raises:
            DataError: From :meth:`Augmentation.try_on`.
        """
        tried: set[tuple[str, int]] = set()
        for number, store in enumerate(self.stores):
            for case, entry in enumerate(store.entries):
                block = store.blocks[entry.block]
                if (kind := (block.dtype.name, block.shape[-1])) not in tried:
                    tried.add(kind)
                    image = self.image(Pick(number, case, 0))
                    if self.patches is not None:
                        image = self.patches.cut(image, self.patches.corners(self.shape(Pick(number, case, 0)))[0])
                    self.augmentation.try_on(image)

    def _coloured(self, plane: Pixels) -> Pixels:
        if plane.shape[-1] == self.channels:
            return plane
        return cast(Pixels, np.repeat(plane, self.channels, axis=-1))

    def _truth(self, pick: Pick, *, taught: bool = False) -> NDArray[np.uint8]:
        """The mask that a pick is scored by, or, for training, that it learns."""
        store = self.stores[pick.store]
        if not taught:
            return self._part(pick, store.truth(pick.case))
        lessons = store.lessons(pick.case)
        return self._part(pick, lessons[data_seed(pick.seed, "rater") % len(lessons) if len(lessons) > 1 else 0])

    def _part(self, pick: Pick, labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return labels if self.dimensions == 3 else cast("NDArray[np.uint8]", labels[pick.slice])


def _to_tensor(views: Sequence[Pixels]) -> Tensor:
    """(V, C, H, W) or (V, C, D, H, W), float32 in [0, 1]."""
    stacked = np.ascontiguousarray(np.moveaxis(np.stack(views), -1, 1))
    if stacked.dtype == np.uint8:
        return torch.from_numpy(stacked).float().div_(255)
    return torch.from_numpy(stacked).clamp_(0, 1)


@dataclass(frozen=True)
class Shared:
    """What all sites of a data module have in common."""

    slices: SliceSet
    loaders: Loaders
    batch_size: int
    sampling: Sampling
    read: Callable[[Case], Sample]


class SiteData:
    """One site, as a worker sees it.

    A batch is a dict of ``image`` float32 (B, C, H, W) in [0, 1], not normalised; ``mask`` float32 (B, R, H, W), absent
    from unlabelled batches; ``known`` of the shape of ``mask``, 0 at pixels that do not count, absent from data that
    ignores no label; ``case`` list of B names; ``slice`` and ``depth`` int64 (B,), 0 and 1 for a 2-D image. With
    data.dimensions=3 images are volumes, (B, C, D, H, W), ``slice`` is 0, and ``depth`` the slices of the whole case.
    Where patches are cut, training batches have the network's size, and evaluation sees every image as a whole.

    Attributes:
        name: Of the site, or "pooled".
        index: Place among all sites, seen ones first; -1 for "pooled".
        seen: Whether the site trains.
        examples: Labelled training images (slices of volumes): the weight of FedAvg.
    """

    def __init__(
        self,
        name: str,
        index: int,
        seen: bool,
        shared: Shared,
        *,
        labelled: NDArray[np.int64],
        images: NDArray[np.int64],
        scored: Mapping[Split, Sequence[tuple[int, int]]],
        since: Mapping[tuple[int, int], int] = MappingProxyType({}),
    ) -> None:
        self.name = name
        self.index = index
        self.seen = seen
        self.examples = len(labelled)
        self._shared = shared
        self._labelled = labelled  # (N, 3) rows of store, case, slice
        self._images = images
        self._scored = scored  # split to (store, case)
        self._since = since  # (store, case) of training cases that come later, to their first round

    @classmethod
    def union(cls, name: str, sites: Sequence[SiteData]) -> SiteData:
        """Several sites as one."""
        return cls(
            name,
            -1,
            True,
            sites[0]._shared,
            labelled=np.concatenate([site._labelled for site in sites]),
            images=np.concatenate([site._images for site in sites]),
            scored={split: [place for site in sites for place in site._scored[split]] for split in SPLITS},
            since={place: round for site in sites for place, round in site._since.items()},
        )

    def __repr__(self) -> str:
        return f"SiteData({self.name!r}, examples={self.examples})"

    def at(self, round: int) -> SiteData:
        """The site with the training images that are there in a round; before round 1 those of round 1."""
        waiting = {place for place, first in self._since.items() if first > max(round, 1)}
        if not waiting:
            return self
        there = copy.copy(self)
        there._labelled, there._images = (
            items[[(store, case) not in waiting for store, case, _ in items.tolist()]]
            for items in (self._labelled, self._images)
        )
        there.examples = len(there._labelled)
        return there

    @property
    def training_images(self) -> int:
        """Training images (slices of volumes), labelled or not."""
        return len(self._images)

    @property
    def patients(self) -> int:
        """Patients with labelled training images."""
        return len(set(self._patients()))

    def covered(self) -> Tensor:
        """(N, R) float64: the share of its labelled training images that each region covers, case by case.

        Pixels that do not count are left out; NaN where none count, as for a region that was not annotated here.
        """
        sums: dict[tuple[int, int], Tensor] = {}
        for store, case, number in self._labelled.tolist():
            found = self._shared.slices.counts(Pick(store, case, number))
            sums[store, case] = sums[store, case] + found if (store, case) in sums else found
        if not sums:
            return torch.zeros(0, len(self._shared.slices.regions.names), dtype=torch.float64)
        hits, all_pixels = torch.stack(list(sums.values())).unbind(dim=1)
        return hits / all_pixels

    def steps(self, epochs: float = 1.0, labelled: bool = True) -> int:
        """Batches in that many local epochs over the labelled training images, or over all of them."""
        count = self.examples if labelled else self.training_images
        return ceil(epochs * count / self._shared.batch_size - 1e-9)

    def train_batches(self, seed: int, steps: int) -> Iterable[Batch]:
        """Augmented labelled batches: a pure function of seed and steps, whatever the number of workers.

        Args:
            seed: Of order and augmentation.
            steps: Number of batches, each exactly ``batch_size`` long.

        Returns:
            A sized iterable that can be read again.

        Raises:
            DataError: The site does not train.
        """
        return self._training(self._labelled, seed, steps, masks=True, views=1)

    def patient_batches(self, seed: int, steps: int, rate: float) -> Iterable[Batch]:
        """Augmented labelled batches of whole patients, each there with probability ``rate``; they may be empty.

        ``patient`` int64 (B,) tells the patients of a batch apart.

        Args:
            seed: Of patients and augmentation.
            steps: Number of batches.
            rate: In (0, 1].

        Raises:
            DataError: The site does not train.
        """
        self._require(self._labelled)
        numbers = {patient: number for number, patient in enumerate(dict.fromkeys(self._patients()))}
        patients = np.array([numbers[patient] for patient in self._patients()], np.int64)
        return Feed(self._shared.loaders, patient_plans(self._labelled, patients, steps, rate, seed))

    def _patients(self) -> list[tuple[int, str]]:
        """The patient of every labelled training image: store and name."""
        stores = self._shared.slices.stores
        return [(store, stores[store].cases[case].patient) for store, case, _ in self._labelled.tolist()]

    def unlabelled_batches(self, seed: int, steps: int, views: int = 1) -> Iterable[Batch]:
        """Augmented batches of all training images, those over the label budget included, without masks.

        Args:
            seed: Of order and augmentation.
            steps: Number of batches.
            views: Above 1, ``image`` is (B, V, C, H, W): views of one image share their geometry.

        Raises:
            DataError: The site does not train.
        """
        return self._training(self._images, seed, steps, masks=False, views=views)

    def _training(self, items: NDArray[np.int64], seed: int, steps: int, *, masks: bool, views: int) -> Feed:
        self._require(items)
        if views < 1:
            raise DataError(f"views={views}: at least one view per image")
        shared = self._shared
        plans = training_plans(items, steps, shared.batch_size, shared.sampling, seed, masks=masks, views=views)
        return Feed(shared.loaders, plans)

    def _require(self, items: NDArray[np.int64]) -> None:
        if not len(items):
            kind, cause = (
                ("labelled training images", "listed in data.unlabelled")
                if self.seen
                else ("training images", "held out by data.unseen")
            )
            raise DataError(f"site {self.name!r} has no {kind}: it is {cause}")

    def plain_batches(self) -> Iterable[Batch]:
        """All training images once, labelled or not, neither augmented nor with masks; the last batch may be shorter.

        Where patches are cut: patches that cover the images, side by side.

        Raises:
            DataError: The site does not train.
        """
        if not len(self._images):
            raise DataError(f"site {self.name!r} has no training images: it is held out by data.unseen")
        return self._covering([Pick(*row) for row in self._images.tolist()], masks=False)

    def input_batches(self, split: Split) -> Iterable[Batch]:
        """The images of `eval_batches` in the network's size: where patches are cut, patches that cover them."""
        return self._covering(self._scored_picks(split), masks=True)

    def _covering(self, picks: Sequence[Pick], *, masks: bool) -> Feed:
        slices, size = self._shared.slices, self._shared.batch_size
        if (patches := slices.patches) is not None:
            picks = [pick._replace(corner=c) for pick in picks for c in patches.corners(slices.shape(pick))]
        plans = [Plan(tuple(picks[i : i + size]), masks=masks) for i in range(0, len(picks), size)]
        return Feed(self._shared.loaders, plans)

    def eval_batches(self, split: Split) -> Iterable[Batch]:
        """Batches of the labelled cases of a split, not augmented: case after case, slices in order.

        A batch may hold slices of several cases, and the last one may be shorter. Where patches are cut, images have
        sizes of their own, and a batch holds one image.
        """
        picks = self._scored_picks(split)
        size = self._shared.batch_size if self._shared.slices.patches is None else 1
        return Feed(self._shared.loaders, [Plan(tuple(picks[i : i + size])) for i in range(0, len(picks), size)])

    def _scored_picks(self, split: Split) -> list[Pick]:
        slices = self._shared.slices
        return [
            Pick(store, case, number)
            for store, case in self._scored[split]
            for number in range(slices.stores[store].entries[case].depth if slices.dimensions == 2 else 1)
        ]

    def cases(self, split: Split) -> list[Case]:
        """Labelled cases of a split, in the order of ``eval_batches``; those over the label budget do not train."""
        stores = self._shared.slices.stores
        return [stores[store].cases[case] for store, case in self._scored[split]]

    def singly(self, split: Split) -> Iterator[SiteData]:
        """The site with one labelled case of a split alone, for each of them in the order of ``cases``."""
        for place in self._scored[split]:
            alone = copy.copy(self)
            alone._scored = {split: [place]}
            yield alone

    def truth(self, case: Case | str) -> NDArray[np.uint8]:
        """(D, h, w) label ids on the network's grid.

        Raises:
            DataError: An unknown or unlabelled case.
        """
        store, number = self._labelled_case(case)
        return store.truth(number)

    def taught(self, case: Case | str) -> NDArray[np.uint8]:
        """(D, h, w) label ids on the network's grid that are learnt of a case.

        Raises:
            DataError: an unknown or unlabelled case, or one of several raters' masks is drawn each time anew.
        """
        store, number = self._labelled_case(case)
        masks = store.lessons(number)
        if len(masks) > 1:
            raise DataError(
                f"{store.cases[number]}: data.raters_train=random draws one of {len(masks)} masks each time anew, and "
                "here one is needed; take majority, staple or a rater's name"
            )
        return masks[0]

    def image(self, case: Case | str) -> Pixels:
        """(D, h, w, C) uint8, or float32 in [0, 1], on the network's grid, without neighbouring slices."""
        store, number = self._find(case)
        return store.images(number)

    def spacing(self, case: Case | str) -> tuple[float, float, float] | None:
        """Millimetres per voxel (slice, row, column) on the network's grid; None when unknown."""
        store, number = self._find(case)
        return store.entries[number].spacing

    def at_own_size(self, case: Case) -> Sample:
        """The case, read again from its files: image, label ids and spacing as stored."""
        return self._shared.read(case)

    def known(self, case: Case, labels: NDArray[np.uint8]) -> NDArray[np.bool_] | None:
        """Where labels (..., H, W) of a case count: (..., R, H, W); None where all do."""
        return self._shared.slices.known(case, labels)

    def _labelled_case(self, case: Case | str) -> tuple[Store, int]:
        store, number = self._find(case)
        if store.entries[number].labels < 0:
            raise DataError(f"site {self.name!r}: case {store.cases[number].case!r} has no mask")
        return store, number

    def _find(self, case: Case | str) -> tuple[Store, int]:
        """The store of a case; a bare name is looked up at this site, so the pooled view needs the Case itself."""
        stores = self._shared.slices.stores
        site, name = (case.site, case.case) if isinstance(case, Case) else (self.name, case)
        for store in stores:
            if store.cases[0].site == site:
                try:
                    return store, store.number(name)
                except KeyError:
                    names = [known.case for known in store.cases]
                    hint = did_you_mean(name, names) or f"its cases are {few(names)}"
                    raise DataError(f"site {site!r} has no case {name!r}; {hint}") from None
        raise DataError(f"no site {site!r}; a case of the pooled view is looked up by its Case, not by its name")
