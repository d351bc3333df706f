"""Which files of a site's folders are one case: its image or images, and its mask or masks."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fedseg.datamodules.findings import Finding, Report, few

REGION = "{region}"  # in data.mask_suffix: the name of a region
RATER = "{rater}"  # in data.mask_suffix: the name of a rater
ANY = "*"  # in data.mask_suffix: whatever follows, such as the number of a lesion
BETWEEN = "_. -"  # signs between a case's name and its modality
Files = Mapping[str, Mapping[str, Path]]  # sub-folder (empty: none) to stem to path
MissingModalities = Literal["error", "zeros"]
MissingMasks = Literal["error", "unlabelled", "empty"]
Masks = list[tuple[str, Path]]  # region (empty where a file holds label ids), file


# --- images -----------------------------------------------------------------------------------------------------------


def by_modality(
    files: Files,
    modalities: Sequence[str],
    site: str,
    report: Report,
    missing: MissingModalities = "error",
    without: Collection[str] = (),
) -> dict[str, tuple[Path | None, ...]]:
    """The images of each case, in the order of its modalities.

    Args:
        files: Of the site's folder of images: NAME_MODALITY, or NAME in a sub-folder for each modality.
        modalities: Their names at this site; none: every file is a case.
        site: Its name.
        report: Told of files without a modality, of modalities that a case lacks, and of those that it should not have.
        missing: What it means that a case lacks one; "zeros" leaves its place empty.
        without: Those that the site does not have at all: their places are empty.
    """
    if not modalities:
        return {stem: (path,) for stem, path in files.get("", {}).items()}
    found: dict[str, dict[str, Path]] = defaultdict(dict)
    for name, modality, path in _of_modalities(files, modalities, site, report):
        if modality in found[name]:
            what = f"is the {modality} of {name}, as {found[name][modality].name} is"
            report(Finding("ambiguous name", what, "rename or remove one", site, name, str(path)))
        found[name].setdefault(modality, path)
    whole = {}
    for name, images in found.items():
        for modality in sorted(images.keys() & {*without}):
            what, cure = f"is there, although the site lacks {modality} (data.lacks)", "move it, or correct the setting"
            report(Finding("foreign file", what, cure, site, name, str(images[modality])))
        if lacking := [modality for modality in modalities if modality not in (*images, *without)]:
            first = next(iter(images.values()))
            report(lacking_modalities(lacking, missing, site, name, str(first)))
        if missing == "zeros" or not lacking:
            whole[name] = tuple(images.get(modality) for modality in modalities)
    return whole


def present(files: Sequence[Path | None]) -> tuple[list[str], tuple[int, ...]]:
    """Paths of the modalities that a case has, and the places of those that it lacks."""
    there = [str(path) for path in files if path is not None]
    return there, tuple(place for place, path in enumerate(files) if path is None)


def lacking_modalities(names: Sequence[str], missing: MissingModalities, site: str, case: str, image: str) -> Finding:
    """What is told of modalities that a case lacks."""
    told = ", ".join(names)
    if missing == "zeros":
        what = f"has no {told}: what the network sees of it is 0 everywhere"
        return Finding("missing modality", what, "add it, or leave the case out", site, case, image)
    cure = "add it, leave the case out, or set data.missing_modalities=zeros"
    return Finding("missing image", f"has no {told} beside it", cure, site, case, image)


def _of_modalities(
    files: Files, modalities: Sequence[str], site: str, report: Report
) -> Iterator[tuple[str, str, Path]]:
    """Name, modality and path of every image."""
    for folder, inside in files.items():
        for stem, path in inside.items():
            ends = [modality for modality in modalities if _named(stem, modality)]
            if folder:
                yield _named(stem, folder) or stem, folder, path
            elif ends:
                longest = max(ends, key=len)
                yield _named(stem, longest), longest, path
            else:
                what = f"ends on none of data.modalities ({', '.join(modalities)})"
                report(Finding("foreign file", what, "rename it as NAME_MODALITY, or move it", site, stem, str(path)))


def _named(stem: str, modality: str) -> str:
    """The case's name in NAME_MODALITY; empty where a stem does not end so."""
    name = stem.removesuffix(modality)
    return name[:-1] if name != stem and len(name) > 1 and name[-1] in BETWEEN else ""


def likely_modalities(images: Collection[str], masks: Iterable[str]) -> tuple[str, ...]:
    """Modalities that the names of images end on: the same ones, one or several, in each case that has a mask."""
    tails: dict[str, set[str]] = defaultdict(set)
    for stem in images:
        if told := re.fullmatch(rf"(.+)[{BETWEEN}]([^{BETWEEN}]+)", stem):
            tails[told[1]].add(told[2])
    of_masks = {next((name for name in _starts(mask) if name in tails), "") for mask in masks} - {""}
    kinds = {frozenset(tails[name]) for name in of_masks}
    if len(kinds) != 1 or len(of_masks) < 2:
        return ()
    (found,) = kinds
    return tuple(sorted(found)) if len(found) > 1 or found == {"0000"} else ()


def _starts(name: str) -> Iterator[str]:
    """The name and all that it starts with, the longest first."""
    return (name[:end] for end in range(len(name), 0, -1))


# --- masks ------------------------------------------------------------------------------------------------------------


@dataclass
class Paired:
    """Masks by the name of their image.

    Attributes:
        masks: Those of each image.
        orphans: Name and path of masks without an image.
        doubtful: Paths of masks that may belong to several images, with the names of these.
    """

    masks: dict[str, Masks] = field(default_factory=lambda: defaultdict(list))
    orphans: list[tuple[str, Path]] = field(default_factory=list)
    doubtful: list[tuple[Path, list[str]]] = field(default_factory=list)

    @property
    def regions(self) -> set[str]:
        """Regions that some file shows alone."""
        return {region for of in self.masks.values() for region, _ in of} - {""}


def pair(images: Collection[str], masks: Files, suffix: str, regions: Sequence[str]) -> Paired:
    """Finds the masks of every image.

    Args:
        images: Names of a site's images.
        masks: Of its folder of masks, or of its sub-folders, one for each region.
        suffix: What a mask's name has after the image's; ``REGION`` and ``ANY`` stand for a region and for anything.
        regions: Names of all regions.
    """
    paired = Paired()
    for folder, files in masks.items():
        pattern = _pattern(suffix, [folder] if folder else regions)
        for name, path in files.items():
            fits = [
                (image, folder or (found.groupdict().get("region") or ""))
                for image in _starts(name)
                if image in images and (found := pattern.fullmatch(name[len(image) :]))
            ]
            if len(fits) == 1:
                paired.masks[fits[0][0]].append((fits[0][1], path))
            elif fits:
                paired.doubtful.append((path, [image for image, _ in fits]))
            else:
                paired.orphans.append((name, path))
    return paired


def _pattern(suffix: str, regions: Sequence[str]) -> re.Pattern[str]:
    """What a mask's name must have after its image's."""
    one = "|".join(re.escape(region) for region in sorted(regions, key=len, reverse=True))
    parts = [re.escape(part).replace(re.escape(ANY), ".*") for part in suffix.split(REGION)]
    return re.compile(f"(?P<region>{one})".join(parts[:2]) + "".join(parts[2:]))


def apart(masks: Files, suffix: str) -> bool:
    """Whether every mask's file shows a single region, which its name or folder tells."""
    return REGION in suffix or "" not in masks


def layers_of(
    found: Masks, needed: Sequence[str], missing: MissingMasks
) -> tuple[str | None, tuple[tuple[str, str], ...], list[str]]:
    """``Case.mask`` and ``Case.masks`` of an image, and what lacks.

    Args:
        found: Its masks.
        needed: Regions that must have a file each; none where files hold label ids.
        missing: What a missing file means.

    Returns:
        Mask, masks, and the regions whose file lacks ("" where there is none at all) if that is an error.
    """
    if not found and missing != "error":
        return (None, (), []) if missing == "unlabelled" else ("", (("", ""),), [])
    layers = [(region, str(path)) for region, path in found]
    lacking = [region for region in needed if region not in dict(layers)] if layers else [*needed] or [""]
    if lacking and missing != "empty":
        return "", (), lacking
    if len(layers) == 1 and not layers[0][0]:
        return layers[0][1], (), []
    return layers[0][1], (*layers, *((region, "") for region in lacking)), []


def missing_cure(needed: Sequence[str]) -> str:
    """What to do about a missing mask."""
    if not needed:
        return "add it, remove the image, or set data.missing_masks=unlabelled"
    return "add it, remove the image, or, if files lack where they would show nothing, set data.missing_masks=empty"


def ending_of(images: Collection[str], masks: Sequence[str], regions: Sequence[str] = ()) -> str | None:
    """What the names of masks have after those of their images, as data.mask_suffix says it; None if nothing does."""
    found: dict[str, list[str]] = defaultdict(list)
    for mask in masks:
        if image := next((name for name in _starts(mask) if name in images), ""):
            found[image].append(mask.removeprefix(image))
    endings = Counter(ending for of in found.values() for ending in of)
    if not endings:
        return None
    several = max(len(of) for of in found.values()) > 1
    named = {_with_region(ending, regions) for ending in endings}
    if several and len(named) == 1 and (told := named.pop()):
        return told
    shared = min(endings, key=len).rstrip("0123456789")
    if several and shared and all(ending.startswith(shared) for ending in endings):
        return shared + ANY
    ending, count = endings.most_common(1)[0]
    return ending if not ending or (count > 1 and not ending.isdigit()) else None


def _with_region(ending: str, regions: Sequence[str]) -> str:
    """An ending with its region's name left open; empty where it names none."""
    for region in sorted(regions, key=len, reverse=True):
        if region in ending:
            return ending.replace(region, REGION, 1)
    return ""


def pairing_cure(root: Path, site: str, endings: Mapping[str, str | None], suffix: str) -> str:
    """The cure where a site's masks are not named as its images are.

    Args:
        root: The folder of all sites.
        site: Its name.
        endings: What each site's masks have after the names of their images; None where nothing pairs them up.
        suffix: data.mask_suffix.

    Returns:
        Empty where names pair up but for single files.
    """
    ending = endings[site]
    if ending is None:
        return f"rename the masks as their images, or list the pairs in {root}/sites.csv (columns site,image,mask)"
    if ending == suffix:
        return ""
    if set(endings.values()) == {ending}:
        return f"set 'data.mask_suffix={ending}'" if {*ending} & {*"*{} "} else f"set data.mask_suffix={ending}"
    return f"write 'mask_suffix: \"{ending}\"' into {root}/{site}/site.yaml"


# --- sub-folders ------------------------------------------------------------------------------------------------------


def folder_cure(kind: str, folders: Sequence[str]) -> str:
    """The setting that makes sub-folders those of modalities, or of regions."""
    if kind == "images":
        return f"if each holds a modality, set data.modalities=[{','.join(folders)}]; else move them"
    ids = {name: [label for label in range(1, 2 ** len(folders)) if label >> k & 1] for k, name in enumerate(folders)}
    regions = ", ".join(f"{name}: {labels}" for name, labels in ids.items())
    setting = f"'data.regions={{{regions}}}'" if len(folders) <= 3 else f"data.regions with {few([*folders])}"
    raters = f"if those of a rater, data.raters=[{','.join(folders)}]"
    return f"if each holds the masks of a region, set {setting}; {raters}; else move them"
