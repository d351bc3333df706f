"""The data module that all methods share: sites, splits by patient, one cache, one loader."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray

from fedseg.common.names import nearest
from fedseg.common.seeds import data_seed
from fedseg.datamodules.attainable import Attainable, attainable_dice, attainable_findings
from fedseg.datamodules.cache import Store, build_store
from fedseg.datamodules.cases import SPLITS, Case, Sample, Split
from fedseg.datamodules.consistency import (
    blank_image,
    channels_differ,
    empty_mask,
    mixed_depths,
    palettes_differ,
    planes_differ,
    segments_differ,
)
from fedseg.datamodules.duplicates import Copies, prints
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.findings import Finding, Report, refuse
from fedseg.datamodules.fingerprints import of_case
from fedseg.datamodules.fitting import Box, Fitting
from fedseg.datamodules.listed import listed
from fedseg.datamodules.occurrence import Expected, Occurrence, Vanishing, occurrence_findings, shown
from fedseg.datamodules.patches import Patches
from fedseg.datamodules.per_site import PerSite
from fedseg.datamodules.readers import (
    AXIAL,
    MAJORITY,
    Axis,
    Intensity,
    MaskGeometry,
    Reading,
    Transparency,
    read_case,
    unknown_labels,
)
from fedseg.datamodules.regions import Regions
from fedseg.datamodules.sampling import Batch, Loaders, Sampling
from fedseg.datamodules.site import Shared, SiteData, SliceSet
from fedseg.datamodules.splits import arrivals, assign, budget, check_fractions, check_shares, too_few
from fedseg.datamodules.transforms import load_augmentation, to_grey

Assigned = Literal["train", "val", "test", "unused"]


class OrdinaryFit(pl.LightningDataModule, ABC):
    """What an ordinary Lightning fit, without a federation, sees: the cases of a site, or of all as one."""

    @abstractmethod
    def _whole(self) -> SiteData:
        """Whose cases these are."""

    def train_dataloader(self) -> Iterable[Batch]:
        """Batches of the training data, in a new order every epoch."""
        return Epochs(self._whole(), torch.initial_seed(), self._epoch)

    def val_dataloader(self) -> Iterable[Batch]:
        """Validation cases."""
        return self._whole().eval_batches("val")

    def test_dataloader(self) -> Iterable[Batch]:
        """Test cases."""
        return self._whole().eval_batches("test")

    def predict_dataloader(self) -> Iterable[Batch]:
        """Test cases."""
        return self.test_dataloader()

    def _epoch(self) -> int:
        return self.trainer.current_epoch if self.trainer is not None else 0


class MultiCenterDataModule(OrdinaryFit):
    """Images and masks of several sites.

    A subclass furnishes :meth:`cases`, and :meth:`read` where its cases are not files in a common format.

    Args:
        regions: Region name to label ids, such as {disc: [1, 2], cup: [2]}; 0 is the background.
        exclusive: False: sigmoid per region, regions may nest. True: softmax over background and disjoint regions.
        dimensions: Of what the network sees: 2, images and slices, or 3, volumes.
        size: Side of the network's input in pixels, or its sides: [height, width], of volumes [slices, height, width].
        fit: How images come to that size: "resize" does it once; "patches" leaves images as they are, trains on windows
            of that size and predicts by a sliding one; "auto": resize in 2 dimensions, patches in 3.
        resample: With patches, millimetres per pixel to which images are brought first: [row, column], of volumes
            [slice, row, column]; null: as they are.
        crop_background: Volumes are cut to the box of what is not 0 (in [0, 1], of any channel) before that, and
            predictions brought back: for images of the brain alone.
        foreground_patches: Share of training patches that are centred on some region, small ones as often as large.
        channels: Of an image: 1 (colour becomes grey), 3 (grey is repeated) or "auto", what the images have.
        batch_size: Slices per batch.
        split: Fractions of each site's patients for train, val and test; official splits come first.
        split_seed: Seed of split and label budget; null: the run's seed (0 without a run).
        unseen: Sites that do not train; all their cases are test cases.
        left_out: Sites that are no part of the run, as if they were not there.
        arrives: Training patients that come later, as shares of a site's: {hospital_a: {6: 0.5}} lets half of them be
            there from round 6 on only. Of those with labels some must be there from the start.
        unlabelled: Sites that train without labels, with methods that learn from such images, pre-training among them.
            A site without any mask must be named here; of a site with masks, those of validation and test cases still
            serve for scoring.
        labelled_patients: At most so many training patients per site keep their labels; null: all.
        sampling: "shuffle": every image once before any comes again; "replacement": every draw anew.
        augment: Pipeline for training batches: a file of configs/augment, or the path of a YAML file.
        cache: Where decoded images live: "memory", or "disk" (memory-mapped, kept for later runs).
        cache_dir: Folder of the disk cache; null: .cache/personalised-federated-segmentation in the home folder.
        workers: Processes that prepare batches; 0: none. Does not change results.
        neighbours: Adjacent slices on either side of a slice that join it as channels; the edge slice is repeated.
        foreground_slices_only: Train on slices with a label of some region only (volumes and stacks).
        ignore_labels: Label ids of pixels that nobody annotated, such as [255]; they count neither in loss nor
            in scores.
        background_labels: Label ids that may occur in masks although no region has them; they count as background.
        absent: Regions that never occur at a site, {hospital_b: [lesion]}: a region that no mask of a site shows is
            refused unless it is named here; it has no score there.
        unannotated: Regions that nobody annotated at a site, {hospital_b: [lesion]}: they count neither in its loss nor
            in its scores; masks may not show them.
        lacks: Modalities that a site does not have at all, {hospital_b: [t1c]}: they are 0 in each of its images.
        modality_dropout: Probability with which each modality of a training image is left out, as if it lacked, but for
            one that stays: a model of several modalities then learns to do with some. 0: none.
        vanishing: When more than 5 % of a site's cases with a region lose it on the network's grid: "refuse", or
            "allow" with a warning.
        label_values: Stored mask values to label ids: {255: 1}, {">=128": 1, "<128": 0} or {"255,0,0": 2}.
        transparency: What counts in masks whose colours and opacity both vary: "ignore" opacity, take it as the
            "drawing", or "auto", which refuses where that is not certain.
        intensity: How values other than 8-bit become [0, 1]: by "percentile", "minmax" or "zscore" of a case, a
            fixed "window", or "unit" (they are in [0, 1] already).
        scale_8bit: Also 8-bit images become [0, 1] by data.intensity, so that files of several depths become alike.
        percentiles: Of a case's values, that become 0 and 1 under intensity=percentile.
        window: Values that become 0 and 1 under intensity=window, such as [-160, 240].
        axis: Of volumes, along which slices are cut: 0 sagittal, 1 coronal, 2 axial when canonical; auto: the one
            whose voxels are thickest, at least 1.5 times as thick as the others, else 2; in 3 dimensions always 2.
        canonical: Turn volumes to one orientation first; false: axes and directions as stored.
        mask_geometry: Where a volume's mask lies: as its "header" says, or voxel by voxel on its "image", for masks
            whose header was lost.
        spacing: Millimetres per pixel, [row, column] or [slice, row, column], whatever files say; null: as they say.
        raters_train: What is learnt of cases with masks of several raters: what the "majority" outlines, "staple"
            (truth and raters' reliability by EM), "random" (one of them each time anew), or a rater's name.
        raters_test: What validation and test cases with several masks are scored against: "majority", "staple", or a
            rater's name.
        per_site: What differs by site: {hospital_b: {mask_suffix: _gt, label_values: {255: 2}}}; a folder's
            ROOT/<site>/site.yaml says the same.
        public: Images that all sites and the server have, about which methods exchange answers (algorithm=medisecfed):
            "phantom" draws them; or a folder of images, read as a site's own, without masks; null: none.
        public_images: How many of them: drawn, or at most taken from the folder, evenly over files and slices.

    Attributes:
        regions: What the network outlines.
        findings: What :meth:`setup` found in the data and a user should know.

    Raises:
        DataError: A setting that cannot be used; bad files are found by :meth:`setup`.
    """

    site_keys: Mapping[str, Any] = {
        "absent": tuple[str, ...],
        "unannotated": tuple[str, ...],
        "lacks": tuple[str, ...],
    }  # what ``per_site`` may say besides how files are read, with types

    def __init__(
        self,
        *,
        regions: Mapping[str, Sequence[int]],
        exclusive: bool = False,
        dimensions: int = 2,
        size: int | Sequence[int] = 128,
        fit: Literal["auto", "resize", "patches"] = "auto",
        resample: Sequence[float] | None = None,
        crop_background: bool = False,
        foreground_patches: float = 0.5,
        channels: Literal["auto"] | int = "auto",
        batch_size: int = 8,
        split: Sequence[float] = [0.6, 0.15, 0.25],
        split_seed: int | None = None,
        unseen: Sequence[str] = [],
        left_out: Sequence[str] = [],
        arrives: Mapping[str, Mapping[int, float]] = {},
        unlabelled: Sequence[str] = [],
        labelled_patients: int | None = None,
        sampling: Sampling = "shuffle",
        augment: str = "flips",
        cache: Literal["memory", "disk"] = "memory",
        cache_dir: str | None = None,
        workers: int = 0,
        neighbours: int = 0,
        foreground_slices_only: bool = False,
        ignore_labels: Sequence[int] = [],
        background_labels: Sequence[int] = [],
        absent: Mapping[str, Sequence[str]] = {},
        unannotated: Mapping[str, Sequence[str]] = {},
        lacks: Mapping[str, Sequence[str]] = {},
        modality_dropout: float = 0.0,
        vanishing: Vanishing = "refuse",
        label_values: Mapping[int | str, int] | None = None,
        transparency: Transparency = "auto",
        intensity: Intensity = "percentile",
        scale_8bit: bool = False,
        percentiles: Sequence[float] = [0.5, 99.5],
        window: Sequence[float] | None = None,
        axis: Axis = "auto",
        canonical: bool = True,
        mask_geometry: MaskGeometry = "header",
        spacing: Sequence[float] | None = None,
        raters_train: str = MAJORITY,
        raters_test: str = MAJORITY,
        per_site: Mapping[str, Mapping[str, Any]] = {},
        public: str | None = None,
        public_images: int = 64,
    ) -> None:
        super().__init__()
        if dimensions not in (2, 3):
            raise DataError(f"data.dimensions={dimensions}: 2 for images and slices, or 3 for volumes")
        self.regions = Regions({name: tuple(ids) for name, ids in regions.items()}, exclusive)
        self.dimensions = dimensions
        if crop_background and dimensions == 2:
            raise DataError("data.crop_background is for volumes (data.dimensions=3); leave it out")
        self.fitting = Fitting(
            _sides(size, dimensions),
            _in_patches(fit, dimensions),
            _resampled(resample, fit, dimensions),
            tuple(sorted(self.regions.ids)) if crop_background else None,
        )
        self.foreground_patches = foreground_patches
        self.channels = channels
        self.batch_size = batch_size
        self.split = list(split)
        self.split_seed = 0 if split_seed is None else split_seed
        self.labelled_patients = labelled_patients
        self.sampling: Sampling = sampling
        self.augment = augment
        self.cache: Literal["memory", "disk"] = cache
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else _default_cache()
        self.workers = workers
        self.neighbours = neighbours
        self.foreground_slices_only = foreground_slices_only
        self.ignore_labels = frozenset(ignore_labels)
        self.background_labels = frozenset(background_labels)
        self.reading = Reading(
            intensity=intensity,
            percentiles=_pair("percentiles", percentiles),
            window=None if window is None else _pair("window", window),
            label_values=label_values,
            transparency=transparency,
            ids=tuple(sorted(self.known_labels - {0})),
            regions=self.regions.labels,
            ignored=tuple(sorted(self.ignore_labels)),
            scale_8bit=scale_8bit,
            axis=AXIAL if dimensions == 3 and axis == "auto" else axis,
            canonical=canonical,
            mask_geometry=mask_geometry,
            spacing=None if spacing is None else tuple(spacing),
            raters_train=raters_train,
            raters_test=raters_test,
        )
        self.unannotated = {str(site): tuple(names) for site, names in unannotated.items()}
        self.absent = {str(site): tuple(names) for site, names in absent.items()}
        self.lacks = {str(site): tuple(names) for site, names in lacks.items()}
        self.modality_dropout = modality_dropout
        self.vanishing: Vanishing = vanishing
        self.per_site = PerSite(per_site, self.reading, self.site_keys)
        self.public, self.public_images = public, public_images
        self._only: str | None = None
        self._held_out = tuple(sorted(set(unseen)))
        self._left_out = frozenset(left_out)
        self._arrives = {site: check_shares(site, shares) for site, shares in arrives.items()}
        self._without_labels = tuple(sorted(set(unlabelled)))
        self._sites: dict[str, SiteData] = {}
        self._rows: list[dict[str, Any]] = []
        self._found: dict[Finding, None] = {}  # in the order in which they were told
        check_fractions(self.split)
        self._check_numbers()

    def _check_numbers(self) -> None:
        least_of = {"batch_size": 1, "workers": 0, "neighbours": 0, "labelled_patients": 1, "public_images": 1}
        for name, least in least_of.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise DataError(f"data.{name}={value}: at least {least}")
        if not 0 <= self.modality_dropout < 1:
            raise DataError(f"data.modality_dropout={self.modality_dropout}: a probability, from 0 and below 1")
        if self.channels != "auto" and self.channels < 1:
            raise DataError(f"data.channels={self.channels}: 1, 3 or another number of channels, or auto")
        self._check_volumes()
        self._check_labels()
        self._check_absent(self.absent, "data.absent")
        self._check_absent(self.unannotated, "data.unannotated")

    def _check_volumes(self) -> None:
        """What slices have, volumes cannot have, and what patches have, whole images cannot."""
        if not 0 <= self.foreground_patches <= 1:
            raise DataError(f"data.foreground_patches={self.foreground_patches}: a share, from 0 to 1")
        usual = signature(MultiCenterDataModule).parameters["foreground_patches"].default
        if not self.fitting.patches and self.foreground_patches != usual:
            raise DataError(
                f"data.foreground_patches={self.foreground_patches} has no effect on whole images; take "
                f"data.fit=patches, or leave it at {usual}"
            )
        if self.dimensions == 3:
            for name in ("neighbours", "foreground_slices_only"):
                if getattr(self, name):
                    raise DataError(f"data.{name} is for slices: with data.dimensions=3 the network sees volumes")

    def _check_labels(self) -> None:
        """A label id means one thing."""
        asides = {"ignore_labels": self.ignore_labels, "background_labels": self.background_labels}
        for name, ids in asides.items():
            for label in sorted(ids):
                if not 0 <= label <= 255:
                    raise DataError(f"data.{name} has {label}: label ids run from 0 to 255")
                if label in self.regions.ids:
                    raise DataError(f"data.{name} has {label}, which is in data.regions; take it out of one")
        for label in sorted(self.ignore_labels & self.background_labels):
            raise DataError(
                f"data.ignore_labels and data.background_labels both have {label}: it counts as background or not at "
                "all; take it out of one"
            )

    @property
    def size(self) -> tuple[int, ...]:
        """Sides of the network's input: height and width, of volumes slices, height and width."""
        return self.fitting.size

    @property
    def patches(self) -> Patches | None:
        """How patches are cut; None where images are resized as a whole."""
        if not self.fitting.patches:
            return None
        return Patches(self.size, self.foreground_patches, tuple(sorted(self.regions.ids)))

    @property
    def known_labels(self) -> frozenset[int]:
        """Every label id that masks may hold."""
        return self.regions.ids | self.ignore_labels | self.background_labels | {0}

    def _check_absent(self, absent: Mapping[str, Sequence[str]], source: str) -> None:
        for site, names in absent.items():
            for name in names:
                if name not in self.regions.names:
                    raise DataError(
                        f"{source}: site {site!r} has {name!r}, which is no region; {nearest(name, self.regions.names)}"
                    )

    # --- what a subclass furnishes ------------------------------------------------------------------------------------

    @abstractmethod
    def cases(self) -> list[Case]:
        """Every case of every site, in any order, without decoding images."""

    def modalities_of(self, site: str) -> tuple[str, ...]:
        """What a site calls the images that together are a case; none where a case is one file."""
        return ()

    def lacking(self, site: str) -> tuple[str, ...]:
        """The modalities that a site does not have, as ``data.modalities`` calls them, in that order.

        Raises:
            DataError: No such modality, or none is left.
        """
        said = {*self.lacks.get(site, ()), *self.per_site.get(site, "lacks", ())}
        known = self.modalities_of("")
        for name in sorted(said):
            if len(known) < 2:
                raise DataError(f"site {site!r} lacks {name!r}, but data.modalities names no two; leave it out")
            if name not in known:
                raise DataError(f"site {site!r} lacks {name!r}, which is no modality; {nearest(name, known)}")
        if said and len(said) == len(known):
            raise DataError(f"site {site!r} lacks all of {', '.join(known)}; leave one, or the site out")
        return tuple(name for name in known if name in said)

    def lacking_here(self, site: str) -> tuple[str, ...]:
        """:meth:`lacking`, by the names that the site has for them."""
        lacking = self.lacking(site)
        pairs = zip(self.modalities_of(""), self.modalities_of(site), strict=True)
        return tuple(own for name, own in pairs if name in lacking)

    def survey(self, report: Report) -> list[Case]:
        """:meth:`cases` of data that may be broken: a problem is reported, and what can be read on is still listed.

        Here the first problem hides all cases; a subclass that can go on, or has more to tell than errors, overrides
        this.
        """
        try:
            return self.cases()
        except DataError as error:
            report(Finding.of_error("layout", error))
            return []

    def present(self, report: Report) -> list[Case]:
        """:meth:`survey` without the sites that are left out."""
        cases = self.survey(lambda finding: None if finding.site in self._left_out else report(finding))
        names = {case.site for case in cases}
        for site in sorted(self._left_out - names) if names else ():
            cure = f"{nearest(site, names)}; where its data are gone, take it out of data.left_out"
            report(Finding("layout", f"data.left_out: no site {site!r}", cure))
        present = [case for case in cases if case.site not in self._left_out]
        if cases and not present:
            report(Finding("layout", "data.left_out leaves out every site", "take one out of it"))
        return present

    def states_patients(self, site: str) -> bool:
        """Whether the patients of a site were given, rather than taken from the names of cases."""
        return False

    def read(self, case: Case) -> Sample:
        """Decodes one case at its own size."""
        return read_case(case, self.reading_of(case.site))

    def reading_of(self, site: str) -> Reading:
        """How the files of a site are read."""
        return self.per_site.reading(site)

    def read_new(self, case: Case) -> Sample:
        """Decodes an image that is none of :meth:`cases`, as :meth:`read` would."""
        return self.read(case)

    def at_own_size(self, case: Case) -> Sample:
        """A case as stored, and the box to which it is cut for the network."""
        return self.fitting.boxed(self.read(case))

    def decoding(self) -> dict[str, Any]:
        """What decoded cases depend on besides their files: part of the disk cache's key.

        A subclass with its own :meth:`read` adds its settings to these.
        """
        rules = [[str(key), label] for key, label in (self.reading.label_values or {}).items()]  # their order counts
        own = {"class": type(self).__qualname__, "fitting": vars(self.fitting), "grey": self.channels == 1}
        own |= {"exclusive": self.regions.exclusive}
        return vars(self.reading) | own | {"label_values": rules}

    def restrict(self, site: str, channels: int | None = None) -> None:
        """Prepare this site alone, as on a machine that holds no other. Its splits and batches stay the same.

        Args:
            site: its name.
            channels: of the images at all sites together; None takes this site's own.
        """
        self._only = site
        self.channels = self.channels if channels is None else channels

    # --- findings -----------------------------------------------------------------------------------------------------

    @property
    def findings(self) -> list[Finding]:
        """What was told of the data by :meth:`setup`: warnings and notes, since errors end it."""
        return list(self._found)

    def tell(self, finding: Finding) -> None:
        """The report of a run: an error stops it, all else is kept once.

        Raises:
            DataError: The finding is an error.
        """
        refuse(finding)
        self._found[finding] = None

    # --- preparing ----------------------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:  # Lightning names a stage; all are prepared
        """Lists, checks, splits, decodes and resizes all cases; a second call does nothing.

        Raises:
            DataError: Data that cannot be used, naming site, file and cure.
        """
        if self._sites:
            return
        augmentation = load_augmentation(self.augment)
        by_site = self._listed()
        splits = {site: self.assigned(site, cases) for site, cases in by_site.items()}
        stores = [self._store(cases) for cases in by_site.values()]
        occurring = [self._occurrence(site, store, splits[site]) for site, store in zip(by_site, stores, strict=True)]
        for finding in occurrence_findings(occurring, self.expected, self.setting_that_keeps):
            self.tell(finding)
        best, grid = [self._attainable(store) for store in stores], self.fitting.setting
        for finding in attainable_findings(best, self.expected.annotated, grid, self.setting_that_allows):
            self.tell(finding)
        channels = self._common_channels(stores)
        if self.modality_dropout and channels != (count := len(self.modalities_of(""))):
            raise DataError(
                f"data.modality_dropout leaves out one channel for each modality: {count} are named, and images have "
                f"{channels}; save them in grey, or leave data.modality_dropout out"
            )
        left_out = (self.ignore_labels, self.expected.unannotated)
        slices = SliceSet(
            stores, self.regions, channels, self.neighbours, augmentation, *left_out, self.dimensions, self.patches,
            dropout=self.modality_dropout,
        )  # fmt: skip
        slices.try_augmentation()
        shared = Shared(slices, Loaders(slices, self.workers), self.batch_size, self.sampling, self.at_own_size)
        rows: list[dict[str, Any]] = []
        sites: dict[str, SiteData] = {}
        for index, (site, store) in enumerate(zip(by_site, stores, strict=True)):
            sites[site] = self._site(index, store, splits[site], shared)
            rows += self._split_rows(store, splits[site], sites[site])
        self._sites, self._rows, self._shared = sites, rows, shared
        small = [finding for site, of in by_site.items() for finding in too_few(site, splits[site], of, self.split)]
        for finding in (*small, *self._findings(stores), *self._copies(stores, splits)):
            self.tell(finding)

    @property
    def expected(self) -> Expected:
        """What the settings say of where regions occur."""
        alone = self._only is not None  # others may have the test cases
        absent, unannotated = self._said("absent", self.absent), self._said("unannotated", self.unannotated)
        tested = self.split[2] > 0 and not alone
        return Expected(self.regions, absent, self.vanishing, tested, unannotated)

    def _said(self, key: str, together: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        """Regions of sites, by the setting for all and by what sites say themselves."""
        own: dict[str, tuple[str, ...]] = {site: self.per_site.get(site, key, ()) for site in self.per_site.sites}
        self._check_absent(own, f"per_site, {key}")
        return {site: (*together.get(site, ()), *own.get(site, ())) for site in {*together, *own}}

    def trains(self, site: str) -> bool:
        """Whether a site trains with labels."""
        return site not in (*self._held_out, *self._without_labels)

    def _occurrence(self, site: str, store: Store, split: Mapping[str, Assigned]) -> Occurrence:
        serves = self.serving(site, store.cases, split)
        cases = [
            shown(case, serves.get(case.case), entry.label_ids, store.truth(number), self.regions)
            for number, (case, entry) in enumerate(zip(store.cases, store.entries, strict=True))
            if case.labelled
        ]
        return Occurrence(site, self.trains(site), cases)

    def setting_that_keeps(self, cases: Sequence[Case], region: str) -> str:
        """The setting, of a finer grid, with which all of these cases show a region that their own masks show."""
        ids = list(self.regions.labels[region])
        samples = [(case, self.at_own_size(case)) for case in cases]

        def keeps(fitting: Fitting) -> bool:
            masks = (fitting.labels(case, one.labels, one.spacing, one.box) for case, one in samples)
            return all(np.isin(mask, ids).any() for mask in masks if mask is not None)

        fitting = self.fitting
        while not keeps(fitting):
            fitting = fitting.finer
        return fitting.setting

    def setting_that_allows(self, cases: Sequence[Case], region: str, dice: float) -> str:
        """The setting, of a finer grid, with which perfect masks of these cases have that Dice on average."""
        fitting = self.fitting
        while True:
            fitting = fitting.finer
            found = [self._allowed(case, fitting).get(region) for case in cases]
            if np.mean([one for one in found if one is not None]) >= dice:
                return fitting.setting

    def _allowed(self, case: Case, fitting: Fitting) -> dict[str, float]:
        sample = self.at_own_size(case)
        on_grid = fitting.labels(case, sample.labels, sample.spacing, sample.box)
        return self.attainable(sample.labels, on_grid, sample.box)

    def attainable(
        self, labels: NDArray[np.uint8] | None, grid: NDArray[np.uint8] | None, box: Box | None = None
    ) -> dict[str, float]:
        """Region to the best Dice that a grid allows, of a mask as stored and on that grid, of what it is cut to."""
        if labels is None or grid is None:
            return {}
        return attainable_dice(labels, grid, self.regions, sorted(self.ignore_labels), box)

    def _attainable(self, store: Store) -> Attainable:
        found = Attainable(store.cases[0].site)
        for case, entry in zip(store.cases, store.entries, strict=True):
            found.add(case, dict(entry.attainable))
        return found

    def _listed(self) -> dict[str, list[Case]]:
        """Cases by site, seen sites first, each in the order of names."""
        cases = self.present(self.tell)
        if self._only is not None:
            names = {case.site for case in cases}
            if self._only not in names:
                raise DataError(f"there is no site {self._only!r} in these data; {nearest(self._only, names)}")
            cases = [case for case in cases if case.site == self._only]
        cases = listed(cases, self.states_patients, self.tell)
        cases.sort(key=lambda case: (case.site in self._held_out, case.site, case.case))
        by_site: dict[str, list[Case]] = {}
        for case in cases:
            by_site.setdefault(case.site, []).append(case)
        if self._only is None:
            self.check_named(by_site, self.tell)
        return by_site

    @property
    def named_sites(self) -> Mapping[str, tuple[str, ...]]:
        """Which sites each setting names, of those that must be there."""
        return {
            "unseen": self._held_out,
            "arrives": tuple(self._arrives),
            "unlabelled": self._without_labels,
            "absent": tuple(self.absent),
            "unannotated": tuple(self.unannotated),
            "lacks": tuple(self.lacks),
            "per_site": self.per_site.sites,
        }

    def check_named(self, by_site: Mapping[str, Sequence[Case]], report: Report = refuse) -> None:
        """Report settings that name what the cases of all sites do not have.

        Args:
            by_site: Cases, seen and unseen ones.
            report: Told of each problem.
        """
        for knob, named in self.named_sites.items():
            for site in named:
                if site not in by_site:
                    report(Finding("layout", f"data.{knob}: no site {site!r}", nearest(site, by_site)))
        for site in sorted(set(self._held_out) & set(self._without_labels)):
            what = f"data.unseen and data.unlabelled both name {site!r}"
            report(Finding("layout", what, "name it once: an unseen site never trains"))
        for site in sorted(self._arrives.keys() & set(self._held_out)):
            what = f"data.unseen and data.arrives both name {site!r}"
            report(Finding("layout", what, "name it once: an unseen site never trains"))
        if not by_site.keys() - self._held_out:
            report(Finding("layout", "data.unseen holds every site out", "leave at least one to train"))
        if self.modality_dropout and len(self.modalities_of("")) < 2:
            what = f"data.modality_dropout={self.modality_dropout}: images have one modality each"
            report(Finding("layout", what, "name several, data.modalities=[flair, t1], or leave it out"))
        if len(self.modalities_of("")) < 2:
            try:
                for site in {**self.lacks, **dict.fromkeys(self.per_site.sites)}:
                    self.lacking(site)
            except DataError as error:
                report(Finding.of_error("layout", error))
        try:
            self.per_site.check_common(by_site)
        except DataError as error:
            report(Finding.of_error("layout", error))
        told = [(name, getattr(self.reading, name)) for name in ("raters_train", "raters_test")]
        chosen = [f"data.{name}={how}" for name, how in told if how != MAJORITY]
        if chosen and not any(case.by_several for cases in by_site.values() for case in cases):
            what = f"{chosen[0]} chooses between raters, and every case has one mask"
            report(Finding("layout", what, "name them, data.raters=[...] (docs/imperfect.md), or leave it out"))

    def assigned(self, site: str, cases: Sequence[Case]) -> dict[str, Assigned]:
        """Case to split, of a site.

        Raises:
            DataError: The site has nothing to learn from; with the cure.
        """
        labelled = {case.case for case in cases if case.labelled}
        if not labelled and site not in self._without_labels:
            raise DataError(
                f"site {site!r} has no labelled case; add masks, leave the site out, or let it take part where images "
                f"without labels are learnt from, with data.unlabelled=[{site}]"
            )
        if site in self._held_out:
            return {case.case: "test" if case.labelled else "unused" for case in cases}
        split = assign(cases, self.split, self.split_seed)
        if site not in self._without_labels and not any(split[case] == "train" for case in labelled):
            raise DataError(
                f"site {site!r} has no labelled training case left after its split; correct its official split, change "
                f"data.split, or hold the site out with data.unseen=[{site}]"
            )
        return {case: name if name == "train" or case in labelled else "unused" for case, name in split.items()}

    def _store(self, cases: Sequence[Case]) -> Store:
        site = cases[0].site
        own = {} if self.reading_of(site) == self.reading else {"site": str(self.reading_of(site))}
        key = self.decoding() | own
        store = build_store(cases, self._decode, cache=self.cache, folder=self.cache_dir, key=key)
        known = self.known_labels
        for case, entry in zip(store.cases, store.entries, strict=True):
            if unknown := set(entry.label_ids) - known:
                mask = case.mask or (case.slices and f"of {case.slices[0].mask} and its neighbours") or ""
                raise DataError(
                    f"{case}: mask {mask} has unknown label ids {unknown_labels(unknown, self.regions.ids)}"
                )
        colours = [entry.colours for entry in store.entries]
        for problem in palettes_differ(zip(store.cases, colours, strict=True), self.reading_of(site)):
            self.tell(problem)
        for problem in segments_differ(zip(store.cases, colours, strict=True)):
            self.tell(problem)
        return store

    def _findings(self, stores: Sequence[Store]) -> list[Finding]:
        """What reading the files had to decide, and what only all of them together tell."""
        types = {
            store.cases[0].site: Counter(store.blocks[entry.block].dtype.name for entry in store.entries)
            for store in stores
        }
        channels = {
            store.cases[0].site: Counter(store.blocks[entry.block].shape[-1] for entry in store.entries)
            for store in stores
        }
        notes = [note for store in stores for entry in store.entries for note in entry.notes]
        planes = {store.cases[0].site: Counter(entry.plane for entry in store.entries) for store in stores}
        together = [*mixed_depths(types, self.reading), *channels_differ(channels, self.channels)]
        return [*together, *planes_differ(planes), *notes]

    def _copies(self, stores: Sequence[Store], splits: Mapping[str, Mapping[str, Assigned]]) -> Iterator[Finding]:
        """Images and masks that occur twice."""
        copies, served = Copies(), dict[tuple[str, str], str]()
        for store in stores:
            for case, entry in zip(store.cases, store.entries, strict=True):
                served[case.site, case.patient] = splits[case.site][case.case]
                for part, found in zip(case.slices or (case,), entry.prints, strict=True):
                    copies.add(part, found)
        return copies.findings(served)

    def _decode(self, case: Case) -> tuple[Sample, tuple[int, ...]]:
        """A case at the network's size, and the label ids that it had at its own size."""
        sample = self.at_own_size(case)
        _check_sample(case, sample)
        ids = () if sample.labels is None else tuple(np.flatnonzero(np.bincount(sample.labels.ravel())).tolist())
        parts = zip(case.slices, sample.image, strict=True) if case.slices else [(case, sample.image)]
        seen = [finding for part, image in parts for finding in blank_image(part, image)]
        fitted = self.fitted(case, sample)
        notes = (*sample.notes, *seen, *empty_mask(case, sample.labels))
        best = self.attainable(sample.labels, fitted.labels, sample.box)
        kept = replace(fitted, notes=notes, prints=prints(case, fitted), plane=sample.plane)
        return replace(kept, attainable=tuple(best.items())), ids

    def fitted(self, case: Case, sample: Sample) -> Sample:
        """A case as the network takes it: grey if so asked, on the network's grid.

        Raises:
            DataError: It cannot be brought to the spacing that is asked for.
        """
        if self.channels == 1 and sample.image.shape[-1] == 3:
            sample = to_grey(sample)
        fitted = self.fitting(case, sample)
        taught = [self.fitting.labels(case, labels, sample.spacing, sample.box) for labels in sample.taught]
        return replace(fitted, taught=tuple(labels for labels in taught if labels is not None))

    def _common_channels(self, stores: Sequence[Store]) -> int:
        """Channels of every image: as asked for, or as found, where grey may join colour."""
        found: dict[int, Case] = {}
        for store in stores:
            for case, entry in zip(store.cases, store.entries, strict=True):
                found.setdefault(store.blocks[entry.block].shape[-1], case)
        wanted = max(found) if self.channels == "auto" else self.channels
        for channels, case in found.items():
            if channels != wanted and (channels, wanted) != (1, 3):
                other = f"{found[wanted]} has {wanted}" if wanted in found else f"data.channels={wanted}"
                raise DataError(f"{case} has {channels} channels, but {other}; export all images alike")
        return wanted

    def serving(self, site: str, cases: Sequence[Case], split: Mapping[str, Assigned]) -> dict[str, Split]:
        """What the labelled cases of a site serve for; those over the label budget serve for nothing."""
        taught = [case for case in cases if case.labelled and split[case.case] == "train"]
        paid = budget({case.patient for case in taught}, site, self.labelled_patients, self.split_seed)
        if site in self._without_labels:
            paid = frozenset()
        serves: dict[str, Split] = {case.case: "train" for case in taught if case.patient in paid}
        for name in SPLITS[1:]:
            serves |= {case.case: name for case in cases if case.labelled and split[case.case] == name}
        return serves

    def _site(self, index: int, store: Store, split: dict[str, Assigned], shared: Shared) -> SiteData:
        site = store.cases[0].site
        train = [number for number, case in enumerate(store.cases) if split[case.case] == "train"]
        serves = self.serving(site, store.cases, split)
        scored: dict[Split, list[tuple[int, int]]] = {
            name: [(index, number) for number, case in enumerate(store.cases) if serves.get(case.case) == name]
            for name in SPLITS
        }
        taught = [number for _, number in scored["train"]]
        labelled = self._slices(index, store, taught, self.foreground_slices_only)
        if self.trains(site) and not len(labelled):
            raise DataError(
                f"site {site!r}: no training slice shows any region; set data.foreground_slices_only=false, or check "
                "data.regions and the masks"
            )
        since = self._since(site, [store.cases[number] for number in train], serves)
        return SiteData(
            site,
            index,
            site not in self._held_out,
            shared,
            labelled=labelled,
            images=self._slices(index, store, train, False),
            scored=scored,
            since={(index, store.number(case)): round for case, round in since.items()},
        )

    def _since(self, site: str, train: Sequence[Case], serves: Mapping[str, Split]) -> dict[str, int]:
        """Training cases that come later, and the first round in which they are there.

        Raises:
            DataError: a share of the patients is nobody, or nobody with labels is there from the start.
        """
        if site not in self._arrives:
            return {}
        patients = {case.patient for case in train}
        coming = arrivals(patients, site, self._arrives[site], self.split_seed)
        since = {case.case: coming[case.patient] for case in train if case.patient in coming}
        if self.trains(site) and not any(serves.get(case.case) == "train" and case.case not in since for case in train):
            raise DataError(
                f"site {site!r}: data.arrives lets {len(coming)} of its {len(patients)} training patients come later, "
                "and no labelled one is there from the start; take smaller shares"
            )
        return since

    def _slices(self, index: int, store: Store, numbers: Iterable[int], foreground_only: bool) -> NDArray[np.int64]:
        """(N, 3) rows of store, case, slice; a volume that is seen whole has one row."""
        ids = list(self.regions.ids)
        rows = [
            (index, number, k)
            for number in numbers
            for k in range(store.entries[number].depth if self.dimensions == 2 else 1)
            if not foreground_only or any(np.isin(lesson[k], ids).any() for lesson in store.lessons(number))
        ]
        return np.array(rows, np.int64).reshape(-1, 3)

    def _split_rows(self, store: Store, split: dict[str, Assigned], site: SiteData) -> list[dict[str, Any]]:
        used = {case.case for name in SPLITS for case in site.cases(name)}
        return [
            {
                "site": case.site,
                "case": case.case,
                "patient": case.patient,
                "split": split[case.case],
                "labelled": case.case in used,
                "seen": site.seen,
            }
            for case in store.cases
        ]

    # --- what others read ---------------------------------------------------------------------------------------------

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites that train, sorted."""
        return tuple(site.name for site in self._ready().values() if site.seen)

    @property
    def unseen_sites(self) -> tuple[str, ...]:
        """Names of the sites held out, sorted."""
        return tuple(site.name for site in self._ready().values() if not site.seen)

    @property
    def image_channels(self) -> int:
        """Channels of an image, without neighbouring slices."""
        return self._shared.slices.channels if self._ready() else 0

    @property
    def in_channels(self) -> int:
        """Channels of the network's input, neighbouring slices included."""
        return self.image_channels * (2 * self.neighbours + 1)

    def site(self, name: str) -> SiteData:
        """One site, seen or not.

        Raises:
            DataError: No such site.
        """
        sites = self._ready()
        if name not in sites:
            raise DataError(f"no site {name!r}; {nearest(name, sites)}")
        return sites[name]

    def channels_of(self, site: str) -> int:
        """Channels of a site's images, before grey is repeated where others have colour."""
        (store,) = (store for store in self._shared.slices.stores if store.cases[0].site == self.site(site).name)
        return max(int(store.blocks[entry.block].shape[-1]) for entry in store.entries)

    def absent_at(self, site: str) -> tuple[str, ...]:
        """Modalities that some case of a site lacks, as the site calls them."""
        (store,) = (store for store in self._shared.slices.stores if store.cases[0].site == self.site(site).name)
        names = self.modalities_of(site)
        return tuple(names[place] for place in sorted({place for case in store.cases for place in case.absent}))

    def pooled(self) -> SiteData:
        """The seen sites as one, named "pooled": the data of centralised training."""
        parts = [self.site(name) for name in self.sites]
        return SiteData.union("pooled", parts)

    def splits(self) -> list[dict[str, Any]]:
        """One row per case: site, case, patient, split, labelled, seen.

        ``split`` is "train", "val", "test", or "unused" for a case without mask outside train. ``labelled`` says
        whether its mask is used: false for training cases over the label budget.
        """
        self._ready()
        return [dict(row) for row in self._rows]

    def columns(self) -> dict[tuple[str, str], dict[str, str]]:
        """Site and case to the cells of its row in the manifest, by names in lower case; empty without a manifest."""
        self._ready()
        stores = self._shared.slices.stores
        return {(case.site, case.case): dict(case.columns) for store in stores for case in store.cases}

    def agreement(self) -> list[dict[str, Any]]:
        """One row per case with masks of several raters, and region: site, case, split, region, Dice of their pairs."""
        self._ready()
        splits = {(row["site"], row["case"]): row["split"] for row in self._rows}
        return [
            {
                "site": case.site,
                "case": case.case,
                "split": splits[case.site, case.case],
                "region": region,
                "dice": dice,
            }
            for store in self._shared.slices.stores
            for case, entry in zip(store.cases, store.entries, strict=True)
            for region, dice in entry.agreement
        ]

    def fingerprints(self, *, anew: bool = False) -> list[dict[str, str]]:
        """One row per case: site, case, and digests of the bytes of its image and its mask.

        Empty where there is no file: the data module makes it itself, or the case has no mask.

        Args:
            anew: Of the files as they are now, whatever a cache holds.
        """
        self._ready()
        found = []
        for store in self._shared.slices.stores:
            for case, entry in zip(store.cases, store.entries, strict=True):
                image, mask = of_case(case) if anew else (entry.image_print, entry.mask_print)
                found.append({"site": case.site, "case": case.case, "image": image, "mask": mask})
        return found

    def _ready(self) -> dict[str, SiteData]:
        if not self._sites:
            raise DataError("the data is not prepared; call setup() first")
        return self._sites

    def _whole(self) -> SiteData:
        """All seen sites as one."""
        return self.pooled()

    def of(self, site: str) -> OneSite:
        """One site, seen or not, for an ordinary Lightning fit."""
        self.setup()
        return OneSite(self.site(site))


class OneSite(OrdinaryFit):
    """One site as an ordinary data module: `Trainer.fit`, `validate`, `test` and `predict` see its cases alone.

    Args:
        site: Its prepared data.
    """

    def __init__(self, site: SiteData) -> None:
        super().__init__()
        self.site = site

    def _whole(self) -> SiteData:
        """The site."""
        return self.site


class Epochs:
    """One epoch of training batches each time it is read."""

    def __init__(self, site: SiteData, seed: int, epoch: Callable[[], int]) -> None:
        self._site = site
        self._seed = seed
        self._epoch = epoch

    def __len__(self) -> int:
        return self._site.steps()

    def __iter__(self) -> Iterator[Batch]:
        seed = data_seed(self._seed, "epoch", self._epoch())
        return iter(self._site.train_batches(seed, len(self)))


def _sides(size: int | Sequence[int], dimensions: int) -> tuple[int, ...]:
    sides = [size] * dimensions if isinstance(size, int) else list(size)
    if len(sides) != dimensions or min(sides) < 1:
        names = "[height, width]" if dimensions == 2 else "[slices, height, width], with data.dimensions=3"
        raise DataError(f"data.size={size}: give one side in pixels, or {names}")
    return tuple(sides)


def _in_patches(fit: str, dimensions: int) -> bool:
    if fit == "resize" and dimensions == 3:
        raise DataError("data.fit=resize is for images and slices: volumes are cut in patches; leave data.fit out")
    return fit == "patches" or dimensions == 3


def _resampled(spacing: Sequence[float] | None, fit: str, dimensions: int) -> tuple[float | None, float, float] | None:
    if spacing is None:
        return None
    told = f"data.resample={list(spacing)}"
    if not _in_patches(fit, dimensions):
        raise DataError(f"{told}: images are resized to data.size; set data.fit=patches to keep a spacing")
    if len(spacing) != dimensions or min(spacing) <= 0:
        names = "[row, column]" if dimensions == 2 else "[slice, row, column]"
        raise DataError(f"{told}: give {names} in millimetres, all above 0")
    return (spacing[0] if dimensions == 3 else None, spacing[-2], spacing[-1])


def _pair(name: str, values: Sequence[float]) -> tuple[float, float]:
    if len(values) != 2:
        raise DataError(f"data.{name}={list(values)}: give two numbers, [low, high]")
    return float(values[0]), float(values[1])


def _default_cache() -> Path:
    return Path.home() / ".cache" / "personalised-federated-segmentation"


def _check_sample(case: Case, sample: Sample) -> None:
    """Guards the promises that a data module's own ``read`` makes."""
    if sample.image.ndim != 4 or sample.image.dtype not in (np.uint8, np.float32):
        raise DataError(f"{case}: expected an image (D, H, W, C) of uint8 or float32, got {sample.image.dtype}")
    if (sample.labels is not None) != case.labelled:
        raise DataError(f"{case}: labels and the case's mask disagree on whether the case is labelled")
    if sample.labels is not None and sample.labels.shape != sample.image.shape[:3]:
        raise DataError(f"{case}: the mask is {sample.labels.shape}, the image {sample.image.shape[:3]}")
