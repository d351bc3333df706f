"""What is found in data: a fixed list of kinds, each with its severity.

Whoever lists cases tells its problems to a `Report`: a run refuses the first one, a check collects them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from datamodules.errors import DataError

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
    "duplicate image": "warning",
    "near duplicate": "warning",
    "patient at two sites": "warning",
    "patients unknown": "warning",
    "empty split": "warning",
    "region never occurs": "warning",
    "blank image": "warning",
    "lossy mask": "warning",
    "white is zero": "warning",
    "mixed bit depth": "warning",
    "mask among images": "warning",
    "drawing in transparency": "note",
    "labels rounded": "note",
    "empty mask": "note",
    "identical masks": "note",
    "not labelled": "note",
    "not in the manifest": "note",
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
        return f"{where}{self.file} {self.what}; {self.cure}" if self.file else f"{where}{self.what}; {self.cure}"

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
    """The report of a run: it stops.

    Raises:
        DataError: The problem.
    """
    raise DataError(str(problem))


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
