"""Checks data before a run: `python -m datamodules.check DIR [KNOB=VALUE ...]`."""

from __future__ import annotations

import inspect
import json
import sys
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError
from tqdm import tqdm

from datamodules import DATASETS
from datamodules.base import MultiCenterDataModule
from datamodules.cases import Case
from datamodules.check.duplicates import Fingerprints
from datamodules.check.reading import open_case
from datamodules.check.report import as_markdown, as_text, headline, tables, write_findings
from datamodules.check.sheet import Sheet, draw_sheet, save_sheet
from datamodules.check.statistics import SiteStatistics, site_findings
from datamodules.errors import DataError, did_you_mean, nearest
from datamodules.findings import Finding
from datamodules.folder import there
from datamodules.listed import listed
from datamodules.splits import too_few
from datamodules.transforms import load_augmentation

USAGE = """python -m datamodules.check DIR [KNOB=VALUE ...] [output=FOLDER]
python -m datamodules.check MANIFEST.csv [KNOB=VALUE ...]
python -m datamodules.check data=fundus data.root=DIR [data.KNOB=VALUE ...]

Looks at every file of DIR/<site>/{images,masks}, of the manifest or of a named data set, and reports what would stop a
run or make its scores mislead. Knobs are those of `python train.py data=...`, with or without "data." before them, such
as regions='{disc: [1, 2], cup: [2]}'. Leaves report.md, findings.csv and contact_sheet.png in FOLDER (data-check).

Exit code: 0 ready (warnings may remain), 1 errors found, 2 wrong usage or a report that cannot be written."""

READY, FAULTY, MISTAKE, INTERRUPTED = 0, 1, 2, 130
PRESETS = Path(__file__).parent.parent.parent / "configs" / "data"
OUTPUT = "data-check"


@dataclass(frozen=True)
class Checked:
    """What a check found.

    Attributes:
        sites: Numbers per site, sorted by name.
        findings: Everything worth telling.
        sheet: Small pictures of cases.
    """

    sites: list[SiteStatistics]
    findings: list[Finding]
    sheet: Sheet


def check(data: MultiCenterDataModule, progress: bool = False) -> Checked:
    """Reads every file once and goes on after errors; memory does not grow with the number of images.

    Args:
        data: Not set up.
        progress: Show a bar on stderr.
    """
    findings: list[Finding] = []
    cases = data.survey(findings.append)
    if cases or not findings:
        cases = listed(cases, data.states_patients, findings.append)
    by_site: dict[str, list[Case]] = {}
    for case in cases:
        by_site.setdefault(case.site, []).append(case)
    planned = {site: _planned(data, site, of_site, findings) for site, of_site in by_site.items()}
    sites = {site: SiteStatistics(site, by_site[site], Counter(split.values())) for site, split in planned.items()}
    served = {(case.site, case.patient): planned[case.site].get(case.case, "unused") for case in cases}
    if not any(finding.severity == "error" for finding in findings):
        data._check_named(by_site, findings.append)
    sheet, prints = Sheet(by_site, data.regions), Fingerprints()
    known = data.regions.ids | data.ignore_labels | {0}
    for case in tqdm(cases, desc="reading", unit="case", disable=not progress, leave=False):
        opened = open_case(data, case, findings)
        findings += sites[case.site].add(opened, data.regions, known)
        prints.add(opened)
        sheet.offer(opened)
    measured = list(sites.values())
    findings += [*prints.findings(served), *site_findings(measured, data.regions, data.channels, data.reading)]
    return Checked(measured, findings, sheet)


def _planned(
    data: MultiCenterDataModule, site: str, cases: Sequence[Case], findings: list[Finding]
) -> Mapping[str, str]:
    """Case to split, as a run would split them."""
    try:
        split = data._assign(site, cases)
    except DataError as error:
        findings.append(Finding.of_error("split impossible", error, site=site))
        return {}
    findings += too_few(site, split, cases, data.split)
    return split


# --- command line -----------------------------------------------------------------------------------------------------


class UsageError(ValueError):
    """A command line that cannot be understood."""


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    if {"--help", "-h"} & set(arguments):
        print(USAGE)
        return READY
    try:
        data, title, output = build(arguments)
        _claim(output)
    except (UsageError, DataError) as error:
        print(f"error: {error}\n\n{USAGE}", file=sys.stderr)
        return MISTAKE
    try:
        checked = check(data, progress=sys.stderr.isatty())
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return INTERRUPTED
    try:
        write(checked, data, title, output)
    except OSError as error:
        print(f"error: output={output}: {error}; make room, or name another folder", file=sys.stderr)
        return MISTAKE
    return FAULTY if any(finding.severity == "error" for finding in checked.findings) else READY


def _claim(output: Path) -> None:
    """Makes the folder for the report, before hours of reading would be in vain."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise UsageError(f"output={output} cannot be written ({error.strerror}); name another folder") from error


def write(checked: Checked, data: MultiCenterDataModule, title: str, output: Path) -> None:
    """Prints the report, and leaves it with findings and contact sheet in a folder."""
    line = headline(checked.sites, checked.findings)
    all_tables = tables(checked.sites, data.regions, checked.findings) if checked.sites else []
    print(as_text(title, line, all_tables, checked.findings))
    write_findings(checked.findings, output / "findings.csv")
    (output / "report.md").write_text(as_markdown(title, line, all_tables, checked.findings), encoding="utf-8")
    if checked.sites:
        save_sheet(draw_sheet(checked.sheet, checked.sites, title), output / "contact_sheet.png")
    print(f"report.md, findings.csv{', contact_sheet.png' if checked.sites else ''}: {output}")


def build(arguments: Sequence[str]) -> tuple[MultiCenterDataModule, str, Path]:
    """The data module that a command line describes, a title, and the folder for the report.

    Raises:
        UsageError: Unknown names, or values of a wrong type.
        DataError: Settings that the data module refuses.
    """
    settings, name, output = _parse(arguments)
    preset = PRESETS / f"{name}.yaml"
    departures = (yaml.safe_load(preset.read_text(encoding="utf-8")) if preset.is_file() else None) or {}
    owner = departures.pop("name", name)
    if owner not in DATASETS:
        raise UsageError(f"unknown data set {owner!r}; {nearest(owner, DATASETS)}")
    given = _checked(DATASETS[owner], departures | settings)
    root = given.get("root")
    if root is not None and not there(Path(root).expanduser().is_dir):
        raise UsageError(f"{root} is no folder")
    data = DATASETS[owner](**given)
    load_augmentation(data.augment)
    return data, f"Data check: {given.get('manifest') or root or name}", output


def _parse(arguments: Sequence[str]) -> tuple[dict[str, Any], str, Path]:
    name, dotted, output = "folder", [], OUTPUT
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            kind = "root" if not argument.lower().endswith((".csv", ".tsv")) else "manifest"
            dotted += [f"{kind}={argument}"] + ([f"root={Path(argument).parent}"] if kind == "manifest" else [])
        elif key in ("data", "data.name"):
            name = value
        elif key == "output":
            output = value
        else:
            dotted.append(argument.removeprefix("data."))
    try:
        settings = OmegaConf.to_container(OmegaConf.from_dotlist(dotted), resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UsageError(f"cannot read {' '.join(dotted)}: {error}") from error
    assert isinstance(settings, dict)  # a list of key=value is a mapping
    return {str(key): value for key, value in settings.items()}, name, Path(output)


def _checked(owner: type[MultiCenterDataModule], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the types that the data module's signature names."""
    knobs = _knobs(owner)
    given: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in knobs:
            raise UsageError(
                f"unknown knob {name!r}; {did_you_mean(name, knobs) or 'python train.py --help lists them'}"
            )
        try:
            given[name] = TypeAdapter(knobs[name][0]).validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            raise UsageError(f"{name}={value!r}: {error.errors()[0]['msg']}") from error
    for name, (_, default) in knobs.items():
        if default is inspect.Parameter.empty and name not in given:
            raise UsageError("name the folder of the data" if name == "root" else f"data.{name} is needed")
    return given


def _knobs(owner: type) -> dict[str, tuple[Any, Any]]:
    """Name to type and default, over a class and its parents; the class's own come first."""
    found: dict[str, tuple[Any, Any]] = {}
    for layer in owner.__mro__[: owner.__mro__.index(MultiCenterDataModule) + 1]:
        if constructor := layer.__dict__.get("__init__"):
            types = typing.get_type_hints(constructor)
            for name, parameter in inspect.signature(constructor).parameters.items():
                if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                    found.setdefault(name, (types[name], parameter.default))
    return found
