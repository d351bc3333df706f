"""Any folder of sites, or a table that lists the files."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from fedseg.datamodules.base import MultiCenterDataModule
from fedseg.datamodules.cases import Case, stack_slices
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.findings import Finding, Report, few, refuse
from fedseg.datamodules.manifest import Expect, not_listed, read_manifest
from fedseg.datamodules.pairing import (
    RATER,
    Files,
    MissingMasks,
    MissingModalities,
    Paired,
    apart,
    by_modality,
    ending_of,
    layers_of,
    likely_modalities,
    missing_cure,
    pair,
    pairing_cure,
    present,
)
from fedseg.datamodules.per_site import FILES
from fedseg.datamodules.readers import MAJORITY, RANDOM, STAPLE, VOLUMES, suffix_of
from fedseg.datamodules.readers.kinds import there
from fedseg.datamodules.site_folders import files_by_folder, folder_of, site_folders

Raters = tuple[tuple[str, tuple[tuple[str, str], ...]], ...]


class _Hand(NamedTuple):
    """What one rater outlined at a site.

    Attributes:
        rater: Name; empty where there is one mask of each image.
        ending: What a mask's name has after the image's.
        found: Masks by image.
        needed: Regions of which every image has a file.
    """

    rater: str
    ending: str
    found: Paired
    needed: tuple[str, ...]


def _nobodys(hands: Sequence[_Hand], *, shared: bool) -> tuple[set[tuple[str, Path]], dict[Path, list[str]]]:
    """Masks without an image, and those that may be of several; of files that raters share, those that are nobody's."""
    orphans = [{*hand.found.orphans} for hand in hands]
    doubtful = {path: names for hand in hands for path, names in hand.found.doubtful}
    return (set.intersection(*orphans) if shared else set.union(*orphans)), doubtful


class FolderDataModule(MultiCenterDataModule):
    """ROOT/<site>/images/* with ROOT/<site>/masks/* of the same name, or a manifest.

    The manifest is a table (CSV, separated by comma, semicolon or tab) with the columns site, image, mask and, where
    known, case, patient, group, split, and what differs by site (label_values, spacing, ...: the keys of per_site that
    say how files are read); other columns are ignored. Paths are relative to the manifest. An empty mask is
    a case without label. ``group``, where filled, is what a split may not cut, else ``patient``, else the case itself.
    ROOT/sites.csv is taken as the manifest when it exists. PNG, JPEG, TIFF, PPM, GIF, BMP and NPY hold 2-D images,
    NIfTI, NRRD, MHA and MHD hold volumes.

    Args:
        root: Folder with one folder per site, or with sites.csv.
        manifest: The table; null: ROOT/sites.csv if it exists, else the folders.
        regions: Region name to label ids; 0 is the background. A mask of nothing but 0 and 255 counts as 0 and 1 where
            1 is the only label id.
        stack_slices: The 2-D images of a patient, in the order of the number that ends their name, are one case: one
            stack, split and scored as one.
        patient_pattern: For folders: a regular expression whose first group, found in a case's name, is its patient.
        mask_suffix: For folders: what a mask's name has after the image's, such as _mask; {region} stands for the name
            of a region where each has a file of its own, * for anything where several files make one mask.
        raters: Names of the raters where several outlined each image, such as [anna, ben]: their masks lie in the
            folders masks/anna and masks/ben, in files whose names mask_suffix=_{rater} tells, or in columns mask_anna
            and mask_ben. What missing_masks says is said of each of them: "unlabelled", a rater did not see an image.
        missing_masks: An image without a mask is an "error", "unlabelled", or has an "empty" mask; so has, where each
            region has a file, one whose file lacks. A manifest's empty cells mean unlabelled unless "empty".
        modalities: Names of the images that are one case's channels, in this order, such as [flair, t1]: NAME_flair
            and NAME_t1, NAME in the folders images/flair and images/t1, or columns image_flair and image_t1.
        missing_modalities: A case that lacks one of several modalities is an "error", or "zeros": that channel is 0.
        kwargs: See MultiCenterDataModule.

    Raises:
        DataError: Settings that cannot be used; bad files are found by ``setup``.
    """

    site_keys: Mapping[str, Any] = {**MultiCenterDataModule.site_keys, **FILES}

    def __init__(
        self,
        *,
        root: str,
        manifest: str | None = None,
        regions: Mapping[str, Sequence[int]] = {"foreground": [1]},
        stack_slices: bool = False,
        patient_pattern: str | None = None,
        mask_suffix: str = "",
        raters: Sequence[str] = [],
        missing_masks: MissingMasks = "error",
        modalities: Sequence[str] = [],
        missing_modalities: MissingModalities = "error",
        **kwargs: Any,
    ) -> None:
        super().__init__(regions=regions, **kwargs)
        self.root = Path(root).expanduser().absolute()
        self.manifest = Path(manifest).expanduser().absolute() if manifest else None
        self.stack_slices = stack_slices
        self.patient_pattern = _compiled(patient_pattern)
        self.mask_suffix = mask_suffix
        self.raters = tuple(raters)
        self.missing_masks: MissingMasks = missing_masks
        self.modalities = tuple(modalities)
        self.missing_modalities: MissingModalities = missing_modalities
        _check_modalities(self.modalities, "data.modalities")
        self._check_raters(self.raters, "data.raters")
        if missing_modalities == "zeros" and (stack_slices or len(self.modalities) < 2):
            why = "slices of a stack must have the same ones" if stack_slices else "data.modalities names no two"
            raise DataError(f"data.missing_modalities=zeros: {why}; leave it out, or give whole volumes of several")
        self._stating: set[str] = set()  # sites whose patients the manifest names

    def cases(self) -> list[Case]:
        """Every case of the manifest or the folders; no image is opened.

        Raises:
            DataError: Nothing there, or files that do not pair up.
        """
        return self.survey(refuse)

    def survey(self, report: Report) -> list[Case]:
        """:meth:`cases`, where a problem is reported and what can be read on is still listed.

        A mask that should be there and is not counts as one: its case is labelled, with an empty path.
        """
        table = self.table
        if table is not None:

            def settle(site: str, cells: Mapping[str, str], source: str) -> None:
                self._settle(site, partial(self.per_site.add_cells, site, cells, source), report)

            expect = Expect(
                self.regions.names,
                self.modalities,
                self.wanted,
                self._missing,
                self.missing_modalities,
                self.raters,
                self.lacking,
            )
            found = read_manifest(table, report, settle, expect)
            for site in self.per_site.sites:
                if self.raters_of(site) != self.raters:
                    what = "has raters of its own (data.per_site), and the manifest has columns of data.raters"
                    cure = "name all sites' raters in data.raters; an empty cell says who did not see an image"
                    report(Finding("manifest", what, cure, site, file=str(table)))
            self._stating = {case.site for case, patient in found if patient}
            found = [(case, patient or case.case) for case, patient in found]
            for finding in not_listed([case for case, _ in found]):
                report(finding)
        else:
            found = list(self._folders(report))
        return _stacked(found, report) if self.stack_slices else [case for case, _ in found]

    def states_patients(self, site: str) -> bool:
        """Whether a column or a pattern tells the patients of a site."""
        return self._pattern(site) is not None or site in self._stating

    @property
    def table(self) -> Path | None:
        """The manifest, if there is one."""
        default = self.root / "sites.csv"
        return self.manifest or (default if there(default.is_file) else None)

    def _folders(self, report: Report) -> Iterator[tuple[Case, str]]:
        """Cases of ROOT/<site>/{images,masks}, with their patients."""
        sites = site_folders(self.root, report)
        for site in sites:
            self._settle(site.name, partial(self.per_site.load, site.name, site), report)
        images = {site.name: self._images(site, report) for site in sites}
        masks = {site.name: self._masks(site, report) for site in sites}
        endings = {
            site: ending_of(of, [stem for files in masks[site].values() for stem in files], self.regions.names)
            for site, of in images.items()
            if of and any(masks[site].values()) and not self.raters_of(site)
        }
        for site in sites:
            yield from self._folder(site, images[site.name], masks[site.name], endings, report)

    def _settle(self, site: str, settle: Callable[[], None], report: Report) -> None:
        """Takes up what a site says for itself."""
        try:
            settle()
        except DataError as error:
            report(Finding.of_error("layout", error, site=site))

    def _images(self, site: Path, report: Report) -> dict[str, tuple[Path | None, ...]]:
        """The images of a site's cases by name, each case's in the order of the modalities."""
        modalities = self.modalities_of(site.name)
        folder = folder_of(site, "images", report, self.per_site.get(site.name, "images", None))
        files = files_by_folder(folder, "images", modalities, report, site.name)
        if not any(files.values()):
            cure = "add images; every folder in data.root is a site, so move others away"
            report(Finding("layout", "is missing or empty", cure, site.name, file=str(folder)))
        try:
            without = self.lacking_here(site.name)
        except DataError as error:
            report(Finding.of_error("layout", error))
            without = ()
        return by_modality(files, modalities, site.name, report, self.missing_modalities, without)

    def _masks(self, site: Path, report: Report) -> dict[str, dict[str, Path]]:
        """Files of a site's masks, by region where each has a folder."""
        folder = folder_of(site, "masks", report, self.per_site.get(site.name, "masks", None))
        raters = () if RATER in self._suffix(site.name) else self.raters_of(site.name)
        files = files_by_folder(folder, "masks", raters or self.regions.names, report, site.name)
        if not any(files.values()) and self._missing(site.name) == "error":
            cure = "add masks of the same names, or set data.missing_masks=unlabelled"
            report(Finding("layout", "is missing or empty", cure, site.name, file=str(folder)))
        return files

    def _missing(self, site: str) -> MissingMasks:
        own: MissingMasks = self.per_site.get(site, "missing_masks", self.missing_masks)
        return own

    def modalities_of(self, site: str) -> tuple[str, ...]:
        """What a site calls the modalities.

        Raises:
            DataError: It names others than ``data.modalities`` has.
        """
        own: tuple[str, ...] = self.per_site.get(site, "modalities", self.modalities)
        _check_modalities(own, f"site {site!r}: modalities")
        if len(own) != len(self.modalities):
            raise DataError(
                f"site {site!r}: modalities=[{', '.join(own)}] are {len(own)}, but data.modalities has "
                f"{len(self.modalities)}; name the site's own in the same order"
            )
        return own

    def _folder(
        self,
        site: Path,
        images: Mapping[str, tuple[Path | None, ...]],
        masks: Files,
        endings: Mapping[str, str | None],
        report: Report,
    ) -> Iterator[tuple[Case, str]]:
        hands = self._hands(site.name, images, masks, report)
        suffix, paired = self._suffix(site.name), all(hand.found.masks.keys() == images.keys() for hand in hands)
        orphans, doubtful = _nobodys(hands, shared=RATER in suffix)
        told = not (paired and not orphans) and site.name in endings
        hint = self._pairing_cure(site, images, masks, endings, suffix) if told else ""
        for stem, path in sorted(orphans):
            cure = hint or "remove it, rename it, or add the image"
            report(Finding("missing image", "has no image", cure, site.name, stem, str(path)))
        for path, names in doubtful.items():
            what = f"may be a mask of {few(names)}"
            report(Finding("ambiguous name", what, "rename it, or list masks in sites.csv", site.name, file=str(path)))
        for stem, files in images.items():
            (image, *channels), absent = present(files)
            mask, layers, raters = self._outlines(site.name, stem, image, hands, hint, report)
            patient = self._patient(site.name, stem, report)
            case = Case(site.name, stem, patient, image, mask, channels=tuple(channels), masks=layers, absent=absent)
            yield replace(case, raters=raters), patient

    def _hands(
        self, site: str, images: Mapping[str, tuple[Path | None, ...]], masks: Files, report: Report
    ) -> list[_Hand]:
        """The masks of each rater by image, or of the only one, who has no name."""
        suffix, raters, regions = self._suffix(site), self.raters_of(site), self.regions.names
        if RATER in suffix and not raters:
            cure = "name them, data.raters=[...], or leave it out"
            report(Finding("layout", f"data.mask_suffix={suffix} tells raters apart, and none is named", cure, site))
        if raters and RATER not in suffix and not masks.keys() & {*raters} and any(masks.values()):
            cure = "lay them into one for each rater, or tell raters by names, data.mask_suffix=_{rater}"
            report(Finding("layout", f"its masks lie in none of the folders {few([*raters])}", cure, site))
        hands = []
        for rater in raters or ("",):
            own: Files = masks if not raters or RATER in suffix else {"": masks.get(rater, {})}
            ending = suffix.replace(RATER, rater)
            found = pair(images, own, ending, regions)
            needed = self._needed(site, found.regions, report) if apart(own, ending) and found.masks else ()
            hands.append(_Hand(rater, ending, found, needed))
        return hands

    def _outlines(
        self, site: str, stem: str, image: str, hands: Sequence[_Hand], hint: str, report: Report
    ) -> tuple[str | None, tuple[tuple[str, str], ...], Raters]:
        """``Case.mask``, ``Case.masks`` and ``Case.raters`` of an image."""
        outlined, lacks = [], False
        for hand in hands:
            mask, layers, lacking = layers_of(hand.found.masks.get(stem, []), hand.needed, self._missing(site))
            if lacking:
                what = f"has no mask {stem}{hand.ending}.*" if not hand.needed else f"has no mask of {few(lacking)}"
                what += f" by rater {hand.rater!r}" * bool(hand.rater)
                cure = hint or missing_cure(hand.needed)
                if hand.rater:
                    cure = "add it; where a rater did not see the image, set data.missing_masks=unlabelled"
                report(Finding("missing mask", what, cure, site, stem, image))
            if not hand.rater:
                return mask, layers, ()
            lacks |= bool(lacking)
            if mask is not None and not lacking:
                outlined.append((hand.rater, layers or (("", mask),)))
        return (outlined[0][1][0][1] if outlined else "" if lacks else None), (), tuple(outlined)

    def _suffix(self, site: str) -> str:
        return str(self.per_site.get(site, "mask_suffix", self.mask_suffix))

    def raters_of(self, site: str) -> tuple[str, ...]:
        """The raters of a site; none where images have one mask.

        Raises:
            DataError: A name that cannot be one.
        """
        own: tuple[str, ...] = self.per_site.get(site, "raters", self.raters)
        self._check_raters(own, f"site {site!r}: raters")
        return own

    def _check_raters(self, names: Sequence[str], source: str) -> None:
        for name in names:
            if names.count(name) > 1 or not name:
                raise DataError(f"{source} has {name!r} {names.count(name)} times; every rater needs a name")
            if name in (MAJORITY, STAPLE, RANDOM, *self.regions.names):
                raise DataError(
                    f"{source} has {name!r}, which is a region or a way to choose; call the rater otherwise"
                )

    def _needed(self, site: str, found: Collection[str], report: Report) -> tuple[str, ...]:
        """Regions of which every image of a site has a file; tells of those that no image has, unless declared."""
        wanted = self.wanted(site)
        if self._missing(site) != "empty":
            for region in wanted:
                if region not in found:
                    what = f"no image has a mask of {region!r}, whereas other regions have files of their own"
                    cure = (
                        f"add them, or say 'data.absent={{{site}: [{region}]}}' if it does not occur there, "
                        f"'data.unannotated={{{site}: [{region}]}}' if nobody outlined it"
                    )
                    report(Finding("missing mask", what, cure, site))
        return tuple(region for region in wanted if region in found)

    def wanted(self, site: str) -> tuple[str, ...]:
        """Regions that masks of a site must show, or show not to be there."""
        said = self.expected
        spared = {*said.absent.get(site, ()), *said.unannotated.get(site, ())}
        return tuple(region for region in self.regions.names if region not in spared)

    def _pairing_cure(
        self,
        site: Path,
        images: Mapping[str, tuple[Path | None, ...]],
        masks: Files,
        endings: Mapping[str, str | None],
        suffix: str,
    ) -> str:
        names = [stem for files in masks.values() for stem in files]
        if not self.modalities and (found := likely_modalities(images, names)):
            return f"if these are one patient's images, set data.modalities=[{','.join(found)}]"
        return pairing_cure(self.root, site.name, endings, suffix)

    def _patient(self, site: str, stem: str, report: Report) -> str:
        pattern = self._pattern(site)
        if pattern is None:
            return stem
        found = pattern.search(stem)
        if found is not None and found.group(1):
            return str(found.group(1))
        report(Finding("layout", "data.patient_pattern finds no patient", "correct it, or rename the file", site, stem))
        return stem

    def _pattern(self, site: str) -> re.Pattern[str] | None:
        own = self.per_site.get(site, "patient_pattern", None)
        return self.patient_pattern if own is None else _compiled(own)


def _check_modalities(names: Sequence[str], source: str) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{source} has {twice[0]!r} twice; every modality has one place")
    if "" in names:
        raise DataError(f"{source} has an empty name; files are told apart by them")


def _compiled(pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise DataError(f"data.patient_pattern={pattern!r} is no regular expression: {error}") from error
    if compiled.groups < 1:
        raise DataError(rf"data.patient_pattern={pattern!r} needs a group in brackets: '^(.+)_\d+$'")
    return compiled


def _stacked(found: Iterable[tuple[Case, str]], report: Report) -> list[Case]:
    """One case per patient; volumes, which do not belong here, stay as they are."""
    patients: dict[tuple[str, str], list[Case]] = {}
    volumes = []
    for case, patient in found:
        if suffix_of(Path(case.image)) in VOLUMES:
            what, cure = "is a volume", "data.stack_slices is for 2-D images: move it, or set data.stack_slices=false"
            report(Finding("layout", what, cure, case.site, case.case, case.image))
            volumes.append(case)
        else:
            patients.setdefault((case.site, patient), []).append(case)
    if patients and all(len(slices) == 1 for slices in patients.values()):
        what = "data.stack_slices: every patient has a single image"
        cure = r"set data.patient_pattern, such as '^(.+)_\d+$', or fill the manifest's column patient"
        report(Finding("layout", what, cure))
    return volumes + [stack_slices(patient, slices, report) for (_, patient), slices in patients.items()]
