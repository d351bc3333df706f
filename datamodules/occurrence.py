"""Where regions occur: what a site's masks show, what is left of it on the network's grid, and what to tell of that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from fedseg.datamodules.cases import SPLITS, Case, Split
from fedseg.datamodules.findings import Finding, few
from fedseg.datamodules.regions import Regions

Vanishing = Literal["refuse", "allow"]
MOST_LOST = 0.05
"""Part of the cases with a region that may lose it on the network's grid."""


class Shown(NamedTuple):
    """What the mask of one case shows.

    Attributes:
        case: The case.
        split: What it serves for; None for nothing.
        stored: Regions at the mask's own size.
        left: Regions on the network's grid.
    """

    case: Case
    split: Split | None
    stored: frozenset[str]
    left: frozenset[str]


def shown(case: Case, split: Split | None, stored: Iterable[int], grid: NDArray[np.uint8], regions: Regions) -> Shown:
    """What a mask shows, by its label ids at its own size and by its labels on the grid."""
    left = np.flatnonzero(np.bincount(grid.ravel())).tolist()
    return Shown(case, split, *(_named(ids, regions) for ids in (stored, left)))


def _named(ids: Iterable[int], regions: Regions) -> frozenset[str]:
    found = set(ids)
    return frozenset(name for name, own in regions.labels.items() if found & set(own))


@dataclass
class Occurrence:
    """The labelled cases of one site.

    Attributes:
        site: Its name.
        trains: Whether it trains with labels: it is neither unseen nor unlabelled.
        cases: What each shows.
    """

    site: str
    trains: bool
    cases: list[Shown] = field(default_factory=list)

    def of(self, region: str, split: Split | None = None) -> list[Shown]:
        """Cases whose stored mask shows a region."""
        return [one for one in self.cases if region in one.stored and split in (None, one.split)]

    def lost(self, region: str) -> list[Shown]:
        """Cases that show a region at their own size only."""
        return [one for one in self.cases if region in one.stored - one.left]


@dataclass(frozen=True)
class Expected:
    """What a user said of regions.

    Attributes:
        regions: Of the run.
        absent: Site to regions that never occur there.
        vanishing: What to do where many cases of a region lose it on the grid.
        tested: Whether test cases are wanted.
        unannotated: Site to regions that nobody annotated there.
    """

    regions: Regions
    absent: Mapping[str, Sequence[str]]
    vanishing: Vanishing
    tested: bool
    unannotated: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def annotated(self, site: str) -> list[str]:
        """Regions that count at a site."""
        return [name for name in self.regions.names if name not in self.unannotated.get(site, ())]


def occurrence_findings(
    sites: Sequence[Occurrence], expected: Expected, setting_that_keeps: Callable[[Sequence[Case], str], str]
) -> Iterator[Finding]:
    """Everything that is to be told of regions that vanish or do not occur, errors first.

    Args:
        sites: All that are there.
        expected: What a user said.
        setting_that_keeps: Of cases that lose a region: the setting with which they would not, as it is written.
    """
    labelled = [site for site in sites if site.cases]
    if labelled and expected.tested and not any(one.split == "test" for site in labelled for one in site.cases):
        what = "no site has a test case: nothing would be measured"
        cure = (
            "add patients, correct the official splits, give data.split a larger last fraction, or say with 0 as its "
            "last fraction that no test is wanted, such as data.split=[0.8,0.2,0]"
        )
        yield Finding("no test case", what, cure)
    yield from _absences(labelled, expected)
    yield from _not_annotated(labelled, expected)
    for site in labelled:
        for region in expected.annotated(site.site):
            yield from _lost(site, region, expected, setting_that_keeps)
            yield from _unmeasured(site, region)


def _absences(sites: Sequence[Occurrence], expected: Expected) -> Iterator[Finding]:
    missing = {site.site: _missing(site, expected) for site in sites}
    nowhere = [name for name in expected.regions.names if all(name in names for names in missing.values())]
    if nowhere and len(sites) > 1:
        what = f"no mask of any site shows {_quoted(nowhere)}"
        yield Finding("region never occurs", what, _declared(missing, nowhere, expected))
        missing = {site: [name for name in names if name not in nowhere] for site, names in missing.items()}
    for site in sites:
        if names := missing[site.site]:
            empty = not any(one.stored for one in site.cases)
            what = f"none of its {len(site.cases)} masks shows {_quoted(names)}"
            cure = _declared({site.site: names}, names, expected)
            yield Finding("region never occurs" if empty or site.trains else "region not tested", what, cure, site.site)
    for site in sites:
        for region in expected.absent.get(site.site, ()):
            if found := site.of(region):
                told = f"but {len(found)} of {len(site.cases)} masks show it"
                what = f"data.absent says that {region!r} never occurs, {told}"
                cure = f"take it out of data.absent, or correct the masks ({few([one.case.case for one in found])})"
                yield Finding("absent region occurs", what, cure, site.site)


def _missing(site: Occurrence, expected: Expected) -> list[str]:
    declared = expected.absent.get(site.site, ())
    return [name for name in expected.annotated(site.site) if name not in declared and not site.of(name)]


def _not_annotated(sites: Sequence[Occurrence], expected: Expected) -> Iterator[Finding]:
    """What contradicts that regions were not annotated."""
    for region in expected.regions.names:
        train = [site for site in sites if site.trains]
        if len(sites) > 1 and train and not any(region in expected.annotated(site.site) for site in train):
            what = f"data.unannotated leaves no training site that annotated {region!r}"
            yield Finding("region never occurs", what, "take it out of data.regions, or a site out of data.unannotated")
    for site in sites:
        annotated = expected.annotated(site.site)
        if site.trains and not annotated:
            what, cure = "data.unannotated names all regions", f"name the site in data.unlabelled=[{site.site}] instead"
            yield Finding("region never occurs", what, cure, site.site)
        shared = {label for name in annotated for label in expected.regions.labels[name]}
        for region in expected.unannotated.get(site.site, ()):
            found = [] if shared & set(expected.regions.labels[region]) else site.of(region)
            if found:
                told = f"but {len(found)} of {len(site.cases)} masks show it"
                what = f"data.unannotated says that nobody annotated {region!r}, {told}"
                cure = f"take it out of data.unannotated, or correct the masks ({few([o.case.case for o in found])})"
                yield Finding("absent region occurs", what, cure, site.site)


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


def _declared(missing: Mapping[str, Sequence[str]], names: Sequence[str], expected: Expected) -> str:
    """The cure for regions that are missing at sites; the setting holds all that was declared before."""
    sites = list(dict.fromkeys([*expected.absent, *missing]))
    told = {
        site: [*expected.absent.get(site, ()), *(name for name in missing.get(site, ()) if name in names)]
        for site in sites
    }
    setting = f"data.absent={yaml.safe_dump(told, default_flow_style=True, width=10**6, allow_unicode=True).strip()}"
    quote = '"' if "'" in setting else "'"
    ids = ", ".join(f"{name}: {list(expected.regions.labels[name])}" for name in names)
    return (
        f"check the masks' label ids, data.regions ({ids}) and data.label_values; if this is so, say "
        f"{quote}{setting}{quote}"
    )


def _lost(
    site: Occurrence, region: str, expected: Expected, setting_that_keeps: Callable[[Sequence[Case], str], str]
) -> Iterator[Finding]:
    had, lost = site.of(region), site.lost(region)
    if not lost:
        return
    names = few([one.case.case for one in lost])
    what = f"{region!r} vanishes on the network's grid in {len(lost)} of the {len(had)} cases that show it ({names})"
    cure = f"set {setting_that_keeps([one.case for one in lost], region)}, which keeps it"
    if len(lost) > MOST_LOST * len(had) and expected.vanishing == "refuse":
        yield Finding("region vanishes", what, f"{cure}, or data.vanishing=allow to do without it", site.site)
    else:
        yield Finding("region vanishes in some cases", what, cure, site.site)


def _unmeasured(site: Occurrence, region: str) -> Iterator[Finding]:
    """A region that occurs at a site, but not where it is learnt, chosen by or measured."""
    if not site.of(region):
        return
    empty = [
        split
        for split in SPLITS
        if any(one.split == split for one in site.cases) and not site.of(region, split)
        if split != "train" or site.trains
    ]
    if not empty:
        return
    effects = {
        "train": "the site cannot learn it",
        "val": "no validation case helps to choose its best round",
        "test": "its scores there are undefined",
    }
    splits = " and no ".join(f"{'training' if split == 'train' else split} case" for split in empty)
    what = f"no {splits} shows {region!r}, which {len(site.of(region))} of {len(site.cases)} masks show: "
    what += ", ".join(effects[split] for split in empty)
    yield Finding(
        "region not in every split", what, "add patients, or set another data.split_seed or data.split", site.site
    )
