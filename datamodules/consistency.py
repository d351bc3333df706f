"""What only many files together tell: depths that differ, palettes that contradict each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from datamodules.cases import Case
from datamodules.findings import Finding, few
from datamodules.readers import Reading

EIGHT_BIT = "uint8"


def mixed_depths(types: Mapping[str, Counter[str]], reading: Reading) -> Iterator[Finding]:
    """8-bit images beside deeper ones: only those are stretched, so they differ although their pixels may not.

    Args:
        types: Site to types of images once scaled, "uint8" or "float32", and how many cases have them.
        reading: How images are scaled.
    """
    if reading.scale_8bit or reading.intensity == "unit":
        return
    shallow = [f"{site} ({found[EIGHT_BIT]})" for site, found in types.items() if found[EIGHT_BIT]]
    deep = [f"{site} ({number})" for site, found in types.items() if (number := found.total() - found[EIGHT_BIT])]
    if shallow and deep:
        what = (
            f"8-bit images at {few(shallow)}, deeper ones at {few(deep)}: data.intensity={reading.intensity} changes "
            "the brightness of the deeper ones only, so that the way of storing tells sites apart"
        )
        yield Finding("mixed bit depth", what, "set data.scale_8bit=true, or export all images with one depth")


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
            names[colour] = None
            known, other = first.setdefault(label, (colour, case))
            if known != colour and culprit is None:
                culprit = case
                clash = f"has {colour} as index {label} of its palette, case {other.case!r} has {known}"
    if culprit is not None:
        pairs = ", ".join(f"'{name}': ID" for name in names if name != "0,0,0")
        cure = f"say what the colours mean, data.label_values={{{pairs}}}"
        yield Finding("palettes differ", clash, cure, culprit.site, culprit.case, culprit.mask or "")
