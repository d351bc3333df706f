"""The report of a check: tables per site, then findings by severity; as text, as Markdown and as CSV."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedseg.common.text import count, piped
from fedseg.datamodules.attainable import Attainable
from fedseg.datamodules.cases import SPLITS
from fedseg.datamodules.check.command import Checked
from fedseg.datamodules.check.statistics import Distances, SiteStatistics, brightness, moments, percentiles, sizes
from fedseg.datamodules.findings import COLUMNS, SEVERITIES, Finding, as_rows, causes, counts, few
from fedseg.datamodules.mixture import Mixture
from fedseg.datamodules.regions import Regions

T = TypeVar("T")
SHOWN = 5  # findings of one kind in the report; the table has all
MOST_LABELS = 12  # label ids of a site in the table
WIDEST_MATRIX = 12  # sites
COMPONENTS = 3  # of the mixture of intensities: about background, tissue, and what is bright
HEADINGS = {
    "error": "Errors: a run would stop",
    "warning": "Warnings: a run would work, but its scores may mislead",
    "note": "Notes",
}


@dataclass(frozen=True)
class Table:
    """A table of the report.

    Attributes:
        title: Above it.
        columns: Their names.
        rows: Their cells: names first, then numbers or short texts.
        note: How to read it.
        names: Columns that are names, aligned left.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""
    names: int = 1

    def text(self) -> str:
        """Aligned columns."""
        lines = [self.columns, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        body = ["  ".join(self._aligned(line, widths)).rstrip() for line in lines]
        body.insert(1, "-" * max(len(line) for line in body))
        notes = [self.note] if self.note else []
        return "\n".join([self.title, *(f"  {line}" for line in (*body, *notes))])

    def _aligned(self, line: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
        for number, (cell, width) in enumerate(zip(line, widths, strict=True)):
            yield cell.ljust(width) if number < self.names else cell.rjust(width)

    def markdown(self) -> str:
        """A pipe table."""
        rule = ["---"] * self.names + ["---:"] * (len(self.columns) - self.names)
        lines = [piped(line) for line in (self.columns, rule, *self.rows)]
        return "\n".join([f"## {self.title}", "", *lines, *(["", self.note] if self.note else [])])


def tables(checked: Checked, regions: Regions, grid: str, modalities: Sequence[str] = ()) -> list[Table]:
    """All tables.

    Args:
        checked: What was found.
        regions: Of the run.
        grid: the setting that the network's grid follows from, as it is written: data.size=128.
        modalities: what the channels are, where they are known.
    """
    sites = checked.sites
    found = [_cases(sites, checked.findings), _images(sites), _regions(sites, regions)]
    found += [_agreement(sites, regions)] if any(site.agreement for site in sites) else []
    found += [_attainable(checked.attainable, regions, grid), _intensities(sites, modalities)]
    measured = [brightness(sites), *(sizes(sites, region) for region in regions.names)]
    found += _mixtures(sites, modalities)
    return [*found, *(_distances(one) for one in measured if one is not None)]


def _cases(sites: Sequence[SiteStatistics], findings: Sequence[Finding]) -> Table:
    rows = []
    for site in sites:
        own = counts([finding for finding in findings if finding.site == site.site])
        planned = (str(site.planned.get(split, 0)) for split in SPLITS)
        patients = str(len({case.patient for case in site.cases}))
        labelled = str(sum(case.labelled for case in site.cases))
        numbers = (str(len(site.cases)), patients, labelled, str(site.official), *planned)
        rows.append((site.site, *numbers, *(str(own[severity]) for severity in SEVERITIES)))
    columns = ("site", "cases", "patients", "labelled", "official split", *SPLITS, "errors", "warnings", "notes")
    return Table("Cases", columns, rows, "train, val, test: cases as a run with these settings would split them.")


def _images(sites: Sequence[SiteStatistics]) -> Table:
    rows = []
    for site in sites:
        stored = f"{site.lowest:g} to {site.highest:g}" if site.sizes else "-"
        rows.append(
            (
                site.site,
                str(site.sizes.total()),
                _most(site.sizes, lambda size: f"{size[0]} x {size[1]}"),
                _range(site.depths),
                _most(site.channels, str),
                _most(site.types, str),
                stored,
                _most(site.spacings, lambda sides: " x ".join(f"{side:g}" for side in sides)) if site.spacings else "?",
                few([str(label) for label in sorted(site.labels)], MOST_LABELS) or "-",
            )
        )
    columns = ("site", "images", "height x width", "slices", "channels", "values", "from to", "spacing mm", "label ids")
    return Table("Images and masks", columns, rows, "The most frequent value, and how many others there are.")


def _regions(sites: Sequence[SiteStatistics], regions: Regions) -> Table:
    rows = []
    for site in sites:
        for name in regions.names:
            counted = site.regions[name]
            size = (_percent(value) for value in (np.quantile(counted.shares, [0.5, 0, 1]) if counted.shares else ()))
            cells = (str(len(counted.shares)), str(site.with_labels - len(counted.shares)))
            slices = _percent(counted.slices / site.slices) if site.slices else "-"
            rows.append((site.site, name, *cells, slices, *(tuple(size) or ("-", "-", "-"))))
    columns = ("site", "region", "cases with", "without", "slices with", "size (median)", "smallest", "largest")
    return Table("Regions", columns, rows, "Size: share of the image or volume, over cases that show the region.", 2)


def _agreement(sites: Sequence[SiteStatistics], regions: Regions) -> Table:
    rows = [
        (site.site, name, str(len(dice)), f"{np.mean(dice):.3f}", f"{min(dice):.3f}")
        for site in sites
        for name in regions.names
        if (dice := site.agreement.get(name))
    ]
    note = "Dice of one rater's mask with another's, mean over pairs, on the images' own grid."
    return Table("Agreement between raters", ("site", "region", "cases", "mean", "lowest"), rows, note, 2)


def _attainable(sites: Sequence[Attainable], regions: Regions, grid: str) -> Table:
    rows = [
        (site.site, name, str(len(cases)), f"{site.mean(name):.3f}", f"{site.lowest(name):.3f}")
        for site in sorted(sites, key=lambda site: site.site)
        for name in regions.names
        if (cases := site.cases.get(name))
    ]
    note = "Dice of a perfect mask reduced to that grid and brought back: no model can be expected to score more."
    title = f"Best attainable Dice on the network's grid ({grid}), on the images' own grid"
    return Table(title, ("site", "region", "cases", "mean", "lowest"), rows, note, 2)


def _intensities(sites: Sequence[SiteStatistics], modalities: Sequence[str]) -> Table:
    rows = []
    for site in sites:
        for channels, histogram in sorted(site.histograms.items()):
            for channel in range(channels):
                names = (site.site, _channel(channel, channels, modalities))
                if not histogram[channel].any():
                    rows.append((*names, *["lacks"] * 7))
                    continue
                mean, sd = moments(histogram[channel])
                values = (mean, sd, *percentiles(histogram[channel], (1, 25, 50, 75, 99)))
                rows.append((*names, *(f"{value:.3f}" for value in values)))
    columns = ("site", "channel", "mean", "sd", "1 %", "25 %", "50 %", "75 %", "99 %")
    return Table("Intensities", columns, rows, "Of pixels as a network gets them, 0 to 1, before any normalisation.", 2)


def mixture_tables(sites: Mapping[str, NDArray[np.int64]], modalities: Sequence[str] = ()) -> list[Table]:
    """Two tables of the mixture of several sites' intensities: what it is, and what each site is in it.

    Args:
        sites: name -> (channels, 256) pixels of each level.
        modalities: what the channels are, where they are known.
    """
    common = Mixture.of_channels(list(sites.values()), COMPONENTS)
    return [components_table(common, modalities), shares_table(sites, common, modalities)]


def components_table(common: Sequence[Mixture], modalities: Sequence[str] = ()) -> Table:
    """A mixture for each channel."""
    rows = [
        (_channel(channel, len(common), modalities), str(place), *(f"{value:.3f}" for value in numbers))
        for channel, one in enumerate(common)
        for place, numbers in enumerate(zip(one.means, one.deviations, one.shares, strict=True), 1)
    ]
    title = f"All sites' intensities as a mixture of {len(common[0].shares)} Gaussians"
    return Table(title, ("channel", "component", "mean", "sd", "share"), rows, names=2)


def shares_table(
    sites: Mapping[str, NDArray[np.int64]], common: Sequence[Mixture], modalities: Sequence[str] = ()
) -> Table:
    """What part of each site's pixels the components of a mixture answer for, and how well it tells them."""
    rows = [
        (
            site,
            _channel(channel, len(common), modalities),
            *(f"{share:.3f}" for share in one.shares_of(counts[channel])),
            f"{one.bits_beside(counts[channel]):.3f}",
        )
        for site, counts in sites.items()
        for channel, one in enumerate(common)
        if counts[channel].any()
    ]
    components = (f"component {place}" for place in range(1, len(common[0].shares) + 1))
    note = (
        "Bits per pixel by which a mixture of its own would tell a site's intensities better: 0 where sites are alike."
    )
    return Table("Sites in that mixture", ("site", "channel", *components, "bits beside"), rows, note, 2)


def _mixtures(sites: Sequence[SiteStatistics], modalities: Sequence[str]) -> list[Table]:
    """Where two sites or more have the same number of channels, the most frequent one."""
    frequent = Counter(channels for site in sites for channels in site.histograms).most_common(1)
    alike = {site.site: site.histograms[n] for site in sites for n, _ in frequent if n in site.histograms}
    shown = len(alike) > 1 and np.sum([*alike.values()], axis=0).any(axis=1).all()
    return mixture_tables(alike, modalities) if shown else []


def _distances(measured: Distances) -> Table:
    names, matrix = measured.names, measured.matrix
    title = f"Distance between sites: {measured.of}"
    note = "Difference of means in units of the sd between images of one site"
    note += " (channel that differs most)." if measured.centres.shape[1] > 1 else "."
    if len(names) <= WIDEST_MATRIX:
        rows = [(name, *(f"{value:.1f}" for value in row)) for name, row in zip(names, matrix, strict=True)]
        return Table(title, ("site", *names), rows, note)
    rows = []
    for number, name in enumerate(names):
        others = np.delete(matrix[number], number)
        farthest = names[int(matrix[number].argmax())]
        rows.append((name, f"{np.median(others):.1f}", f"{others.max():.1f}", farthest))
    return Table(title, ("site", "median", "largest", "from"), rows, note)


def headline(sites: Sequence[SiteStatistics], findings: list[Finding]) -> str:
    """The check in one line."""
    cases = sum(len(site.cases) for site in sites)
    number = counts(findings)
    of_cause = counts([cause.first for cause in causes(findings)])
    told = ", ".join(_counted(of_cause[severity], number[severity], severity) for severity in SEVERITIES)
    verdict = "not ready" if number["error"] else "ready, with warnings" if number["warning"] else "ready"
    return f"{count(len(sites), 'site')}, {count(cases, 'case')}: {told} - {verdict}"


def _counted(causes: int, places: int, severity: str) -> str:
    return count(places, severity) + (f" of {count(causes, 'cause')}" if places > causes else "")


def grouped(findings: Sequence[Finding]) -> Iterator[tuple[str, str, list[str]]]:
    """Severity's heading, each cause with its count and cure, and its first few places."""
    for cause in causes(findings):
        of_cause, first = cause.findings, cause.first
        lines = [f"{_where(finding)}{finding.what}" for finding in of_cause[:SHOWN]]
        if len(of_cause) > SHOWN:
            by_site = Counter(finding.site for finding in of_cause if finding.site)
            told = ", ".join(f"{site} {places}" for site, places in by_site.most_common(SHOWN))
            lines.append(f"... and {len(of_cause) - SHOWN} more, all in findings.csv (by site: {told})")
        title = f"{first.kind} ({len(of_cause)})"
        yield HEADINGS[first.severity], f"{title}. Cure: {first.cure}" if first.cure else title, lines


def as_text(title: str, line: str, all_tables: Sequence[Table], findings: Sequence[Finding]) -> str:
    """The report for a terminal."""
    parts = [title, *(table.text() for table in all_tables)]
    heading = ""
    for severity, kind, lines in grouped(findings):
        if severity != heading:
            heading = severity
            parts.append(heading)
        parts.append("\n".join([f"  {kind}", *(f"    {entry}" for entry in lines)]))
    return "\n\n".join([*parts, line])


def as_markdown(title: str, line: str, all_tables: Sequence[Table], findings: Sequence[Finding]) -> str:
    """The report as a file."""
    parts = [f"# {title}", line, "![Cases of every site](contact_sheet.png)"]
    heading = ""
    for severity, kind, lines in grouped(findings):
        if severity != heading:
            heading = severity
            parts.append(f"## {heading}")
        parts.append("\n".join([f"**{kind}**", "", *(f"- {entry}" for entry in lines)]))
    return "\n\n".join([*parts, *(table.markdown() for table in all_tables)]) + "\n"


def write_findings(findings: Sequence[Finding], path: Path) -> None:
    """All findings as a table."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(as_rows(findings))


def _where(finding: Finding) -> str:
    name = Path(finding.file).name if finding.file else finding.case
    place = ", ".join(part for part in (finding.site, name) if part)
    return f"{place}: " if place else ""


def _most(counter: Counter[T], show: Callable[[T], str]) -> str:
    if not counter:
        return "-"
    others = len(counter) - 1
    return show(counter.most_common(1)[0][0]) + (f" (+{others})" if others else "")


def _range(counter: Counter[int]) -> str:
    low, high = min(counter, default=0), max(counter, default=0)
    return f"{low} to {high}" if low < high else str(high)


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def _channel(channel: int, channels: int, modalities: Sequence[str]) -> str:
    if len(modalities) == channels:
        return modalities[channel]
    if channels in (1, 3):
        return {1: ("grey",), 3: ("red", "green", "blue")}[channels][channel]
    return f"channel {channel + 1}"
