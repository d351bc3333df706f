"""What decoded files tell: blank ones, and depths, channels and palettes that do not go together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from fedseg.datamodules.cases import Case, Pixels
from fedseg.datamodules.findings import Finding, few
from fedseg.datamodules.readers import SEGMENT, Array, Reading

EIGHT_BIT = "uint8"


def blank_image(case: Case, image: Pixels | Array) -> Iterator[Finding]:
    """An image of one value."""
    if image.size and (image == image.flat[0]).all():
        what, cure = "has one value everywhere", "replace the image or leave it out"
        yield Finding("blank image", what, cure, case.site, case.case, case.image)


def empty_mask(case: Case, labels: Array | None) -> Iterator[Finding]:
    """A mask of nothing but background."""
    if labels is not None and not labels.any():
        cure = "none needed if this is so"
        yield Finding("empty mask", "nothing is outlined", cure, case.site, case.case, case.mask or "")


def channels_differ(found: Mapping[str, Counter[int]], wanted: int | str) -> Iterator[Finding]:
    """Images of other channels than the rest.

    Args:
        found: Site to channels of images and how many cases have them.
        wanted: Channels that were asked for, or "auto".
    """
    total = sum(found.values(), Counter[int]())
    if not total:
        return
    colour = set(total) <= {1, 3}
    target = int(wanted) if wanted != "auto" else 3 if colour else total.most_common(1)[0][0]
    for site, counted in found.items():
        for channels, count in counted.items():
            told = f"{count} case(s) have {channels} channels, others {target}"
            if channels != target and {channels, target} != {1, 3}:
                yield Finding("channels differ", told, "export all images with the same channels", site)
            elif channels < target and wanted == "auto" and len(total) > 1:
                cure = "none needed: grey is repeated; data.channels=1 makes all images grey instead"
                yield Finding("grey and colour", told, cure, site)


def mixed_depths(types: Mapping[str, Counter[str]], reading: Reading) -> Iterator[Finding]:
    """8-bit images, which are not stretched: beside deeper ones, or where it was asked for.

    Args:
        types: Site to types of images once scaled, "uint8" or "float32", and how many cases have them.
        reading: How images are scaled.
    """
    if reading.scale_8bit or reading.intensity == "unit":
        return
    shallow = [f"{site} ({found[EIGHT_BIT]})" for site, found in types.items() if found[EIGHT_BIT]]
    deep = [f"{site} ({number})" for site, found in types.items() if (number := found.total() - found[EIGHT_BIT])]
    if shallow and not deep and reading.intensity in ("window", "zscore"):
        what = f"all images are 8-bit, which data.intensity={reading.intensity} leaves as they are"
        yield Finding("intensity not applied", what, "set data.scale_8bit=true, or leave data.intensity out")
    if shallow and deep:
        what = (
            f"8-bit images at {few(shallow)}, deeper ones at {few(deep)}: data.intensity={reading.intensity} changes "
            "the brightness of the deeper ones only, so that the way of storing tells sites apart"
        )
        yield Finding("mixed bit depth", what, "set data.scale_8bit=true, or export all images with one depth")


def planes_differ(found: Mapping[str, Counter[str]]) -> Iterator[Finding]:
    """Volumes that are cut in different planes of the patient.

    Args:
        found: Site to planes of slices, empty where unknown, and how many cases have them.
    """
    by_plane: dict[str, list[str]] = {}
    for site, counted in found.items():
        for plane, count in counted.items():
            if plane:
                by_plane.setdefault(plane, []).append(f"{site} ({count})")
    if len(by_plane) > 1:
        told = ", ".join(f"{plane} at {few(sites)}" for plane, sites in by_plane.items())
        cure = "none needed if this is so; data.axis=2 (with data.canonical=true) cuts all volumes in the axial plane"
        yield Finding("planes differ", f"slices are {told}", cure)


def palettes_differ(cases: Iterable[tuple[Case, Iterable[tuple[int, str]]]], reading: Reading) -> Iterator[Finding]:
    """Indexed masks of one site that give a label id several colours: a program numbered each file's colours anew.

    Args:
        cases: Cases of the site and the colours of their label ids.
        reading: How masks are read; with one id, black and another colour mean the same in every file.
    """
    if reading.binary:
        return
    first: dict[int, tuple[str, Case]] = {}
    clash = ""
    culprit: Case | None = None
    names: dict[str, None] = {}
    for case, colours in cases:
        for label, colour in colours:
            if colour.startswith(SEGMENT):
                continue
            names[colour] = None
            known, other = first.setdefault(label, (colour, case))
            if known != colour and culprit is None:
                culprit = case
                clash = f"has {colour} as index {label} of its palette, case {other.case!r} has {known}"
    if culprit is not None:
        pairs = ", ".join(f"'{name}': ID" for name in names if name != "0,0,0")
        cure = f"say what the colours mean, data.label_values={{{pairs}}}"
        yield Finding("palettes differ", clash, cure, culprit.site, culprit.case, culprit.mask or "")


def segments_differ(cases: Iterable[tuple[Case, Iterable[tuple[int, str]]]]) -> Iterator[Finding]:
    """Segmentations of one site that name a label, or number a name, in several ways: each was numbered for itself.

    Args:
        cases: Cases of the site, their label ids and what they are called.
    """
    names: dict[int, tuple[str, Case]] = {}
    labels: dict[str, tuple[int, Case]] = {}
    clashes: list[tuple[str, Case]] = []
    for case, told in cases:
        for label, called in told:
            name = called.removeprefix(SEGMENT).strip().casefold()
            if not called.startswith(SEGMENT) or not name:
                continue
            known, first = names.setdefault(label, (name, case))
            number, earlier = labels.setdefault(name, (label, case))
            if number != label:
                clashes.append((f"has {name!r} as label {label}, case {earlier.case!r} has it as {number}", case))
            elif known != name:
                clashes.append((f"has {name!r} as label {label}, case {first.case!r} has {known!r}", case))
    if clashes:
        what, case = clashes[0]
        cure = (
            "none needed where labels mean the same; else give each segment one label in all files (3D Slicer: export "
            "them with one colour table)"
        )
        more = f" ({len(clashes)} in all)" if len(clashes) > 1 else ""
        yield Finding("segments differ", what + more, cure, case.site, case.case, case.mask or "")
