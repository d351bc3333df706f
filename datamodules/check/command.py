"""The check of data before a run: every file is read once. Its command line is `launch.check`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fedseg.datamodules.attainable import Attainable, attainable_findings
from fedseg.datamodules.base import Assigned, MultiCenterDataModule
from fedseg.datamodules.cases import Case, Sample
from fedseg.datamodules.check.duplicates import Fingerprints
from fedseg.datamodules.check.reading import Opened, open_case
from fedseg.datamodules.check.sheet import Sheet
from fedseg.datamodules.check.statistics import SiteStatistics, site_findings
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.findings import Finding
from fedseg.datamodules.fitting import Box
from fedseg.datamodules.listed import listed
from fedseg.datamodules.occurrence import Occurrence, occurrence_findings, shown
from fedseg.datamodules.splits import too_few


@dataclass(frozen=True)
class Checked:
    """What a check found.

    Attributes:
        sites: Numbers per site, sorted by name.
        findings: Everything worth telling.
        sheet: Small pictures of cases.
        attainable: The best scores that the network's grid allows, by site.
    """

    sites: list[SiteStatistics]
    findings: list[Finding]
    sheet: Sheet
    attainable: list[Attainable]


def check(data: MultiCenterDataModule, progress: bool = False) -> Checked:
    """Reads every file once and goes on after errors; memory does not grow with the number of images.

    Args:
        data: Not set up.
        progress: Show a bar on stderr.
    """
    findings: list[Finding] = []
    cases = data.present(findings.append)
    if cases or not findings:
        cases = listed(cases, data.states_patients, findings.append)
    by_site: dict[str, list[Case]] = {}
    for case in cases:
        by_site.setdefault(case.site, []).append(case)
    planned = {site: _planned(data, site, of_site, findings) for site, of_site in by_site.items()}
    sites = {site: SiteStatistics(site, by_site[site], Counter(split.values())) for site, split in planned.items()}
    served = {(case.site, case.patient): planned[case.site].get(case.case, "unused") for case in cases}
    if not any(finding.severity == "error" for finding in findings):
        data.check_named(by_site, findings.append)
    sheet, prints = Sheet(by_site, data.regions), Fingerprints()
    known = data.known_labels
    serves = {site: data.serving(site, own, planned[site]) if planned[site] else {} for site, own in by_site.items()}
    occurring = {site: Occurrence(site, data.trains(site)) for site in by_site}
    best = {site: Attainable(site) for site in by_site}
    for case in tqdm(cases, desc="reading", unit="case", disable=not progress, leave=False):
        opened = open_case(data, case, findings)
        findings += sites[case.site].add(opened, data.regions, known)
        box = _box(data, opened)
        if (labels := opened.labels) is not None and (grid := _on_grid(data, opened, box, findings)) is not None:
            ids = np.flatnonzero(np.bincount(labels.ravel()))
            of_case = shown(case, serves[case.site].get(case.case), ids.tolist(), grid, data.regions)
            occurring[case.site].cases.append(of_case)
            best[case.site].add(case, data.attainable(labels, grid, box))
        prints.add(opened)
        sheet.offer(opened)
    measured = list(sites.values())
    expected = replace(data.expected, tested=data.expected.tested and all(planned.values()))
    findings += occurrence_findings(list(occurring.values()), expected, data.setting_that_keeps)
    of_sites, grid_of = list(best.values()), data.fitting.setting
    findings += attainable_findings(of_sites, expected.annotated, grid_of, data.setting_that_allows)
    findings += [*prints.findings(served), *site_findings(measured, data)]
    return Checked(measured, findings, sheet, of_sites)


def _box(data: MultiCenterDataModule, opened: Opened) -> Box | None:
    """To which a case is cut; None also where it could not be read."""
    return None if opened.image is None else data.fitting.boxed(Sample(opened.image, None)).box


def _on_grid(
    data: MultiCenterDataModule, opened: Opened, box: Box | None, findings: list[Finding]
) -> NDArray[np.uint8] | None:
    """A case's mask on the network's grid; None where it cannot be brought there."""
    case = opened.case
    try:
        return data.fitting.labels(case, opened.labels, opened.parts[0].spacing, box)
    except DataError as error:
        kind = "no spacing" if opened.parts[0].spacing is None else "mask values"
        findings.append(Finding.of_error(kind, error, site=case.site, case=case.case))
        return None


def _planned(
    data: MultiCenterDataModule, site: str, cases: Sequence[Case], findings: list[Finding]
) -> Mapping[str, Assigned]:
    """Case to split, as a run would split them; empty where it could not."""
    try:
        split = data.assigned(site, cases)
    except DataError as error:
        findings.append(Finding.of_error("split impossible", error, site=site))
        return {}
    findings += too_few(site, split, cases, data.split)
    return split
