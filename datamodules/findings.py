"""What is found in data: a fixed list of kinds, each with its severity.

Whoever looks at data tells a `Report`. A run stops at the first error and keeps the rest, a check collects them all:
both look with the same functions, and see the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from fedseg.datamodules.errors import DataError

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

# error: a run stops before training; warning: it runs, but its scores may mislead; note: good to know
KINDS: Mapping[str, Severity] = {
    "layout": "error",
    "missing image": "error",
    "missing mask": "error",
    "foreign file": "error",
    "ambiguous name": "error",
    "manifest": "error",
    "patient in two splits": "error",
    "unreadable file": "error",
    "size mismatch": "error",
    "geometry mismatch": "error",
    "image values": "error",
    "mask values": "error",
    "unknown label ids": "error",
    "palettes differ": "error",
    "slices differ": "error",
    "channels differ": "error",
    "split impossible": "error",
    "region never occurs": "error",
    "absent region occurs": "error",
    "region vanishes": "error",
    "no test case": "error",
    "duplicate image": "warning",
    "near duplicate": "warning",
    "image at two sites": "warning",
    "patient at two sites": "warning",
    "not a site": "warning",
    "patients unknown": "warning",
    "empty split": "warning",
    "region not tested": "warning",
    "region not in every split": "warning",
    "region vanishes in some cases": "warning",
    "grid too coarse": "warning",
    "blank image": "warning",
    "lossy mask": "warning",
    "white is zero": "warning",
    "missing modality": "warning",
    "mixed bit depth": "warning",
    "intensity not applied": "warning",
    "planes differ": "warning",
    "segments differ": "warning",
    "slice order": "warning",
    "mask among images": "warning",
    "drawing in transparency": "note",
    "labels rounded": "note",
    "image listed twice": "note",
    "empty mask": "note",
    "identical masks": "note",
    "slice axis": "note",
    "fourth axis": "note",
    "not labelled": "note",
    "not in the manifest": "note",
    "folder name": "note",
    "left out": "note",
    "suspicious name": "note",
    "grey and colour": "note",
    "sites differ": "note",
    "not searched": "note",
}


@dataclass(frozen=True)
class Finding:
    """One thing that a user should know.

    Attributes:
        kind: A key of ``KINDS``, which gives its severity.
        what: What is the matter, in half a sentence; where there is a file, about it.
        cure: What to do about it.
        site: Where; empty when it concerns all sites.
        case: Which case, if one.
        file: Which file, if one.
    """

    kind: str
    what: str
    cure: str
    site: str = ""
    case: str = ""
    file: str = ""

    @property
    def severity(self) -> Severity:
        """How bad it is."""
        return KINDS[self.kind]

    def __str__(self) -> str:
        """The message of an error: where, what and cure."""
        where = place(self.site, self.case) + ": " if self.site else ""
        cure = f"; {self.cure}" if self.cure else ""
        return f"{where}{self.file} {self.what}{cure}" if self.file else f"{where}{self.what}{cure}"

    @classmethod
    def of_error(cls, kind: str, error: DataError, *, site: str = "", case: str = "", file: str = "") -> Finding:
        """A finding from an error, whose message reads ``where: what; cure``."""
        message = str(error)
        for prefix in (f"{place(site, case)}: ", f"{place(site)}: "):
            message = message.removeprefix(prefix)
        if file:
            for role in ("image ", "mask "):
                message = message.removeprefix(f"{role}{file}").removeprefix(": ").lstrip()
        what, _, cure = message.partition("; ")
        return cls(kind, what, cure, site, case, file)


Report = Callable[[Finding], None]


def refuse(problem: Finding) -> None:
    """The report of whoever cannot go on after an error; warnings and notes pass.

    Raises:
        DataError: The problem is an error.
    """
    if problem.severity == "error":
        raise DataError(str(problem))


@dataclass(frozen=True)
class Cause:
    """What one cure would mend.

    Attributes:
        findings: Of one kind with one cure, in the order in which they were found; never empty.
    """

    findings: tuple[Finding, ...]

    @property
    def first(self) -> Finding:
        """An example of all."""
        return self.findings[0]

    def __str__(self) -> str:
        """One line: an example, how many more there are and where, and the cure."""
        first, more = self.first, len(self.findings) - 1
        if not more:
            return str(first)
        by_site = Counter(finding.site for finding in self.findings if finding.site)
        where = f"; {few([f'{site} {count}' for site, count in by_site.most_common()])}" if by_site else ""
        return f"{str(first).removesuffix(f'; {first.cure}')} (and {more} more{where}); {first.cure}"


def causes(findings: Iterable[Finding]) -> list[Cause]:
    """Findings grouped by what would mend them, the worst first."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.kind, finding.cure), []).append(finding)
    order = {kind: number for number, kind in enumerate(KINDS)}
    of_one_cause = sorted(groups.values(), key=lambda group: order[group[0].kind])
    return sorted(map(Cause, map(tuple, of_one_cause)), key=lambda cause: SEVERITIES.index(cause.first.severity))


COLUMNS = ("severity", *(field.name for field in fields(Finding)))


def as_rows(findings: Sequence[Finding]) -> list[dict[str, str]]:
    """Rows of ``COLUMNS``, the worst first."""
    return [
        {name: getattr(finding, name) for name in COLUMNS}
        for severity in SEVERITIES
        for finding in findings
        if finding.severity == severity
    ]


def place(site: str, case: str = "") -> str:
    """How messages name a site, or a case at it."""
    return f"site {site!r}, case {case!r}" if case else f"site {site!r}"


def counts(findings: list[Finding]) -> dict[Severity, int]:
    """How many findings there are of each severity."""
    return {severity: sum(finding.severity == severity for finding in findings) for severity in SEVERITIES}


def few(names: list[str], most: int = 4) -> str:
    """The first names and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
