"""The command line of the data check: `python -m fedseg.datamodules.check DIR [KEY=VALUE ...]`.

Settings are read as `train.py` reads them, so that a check and a run see the same data.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile, mkdtemp

from fedseg.configs.compose import ConfigError, compose
from fedseg.configs.knobs import knobs
from fedseg.datamodules import DataError, MultiCenterDataModule
from fedseg.datamodules.check.command import Checked, check
from fedseg.datamodules.check.report import as_markdown, as_text, headline, tables, write_findings
from fedseg.datamodules.check.sheet import draw_sheet, save_sheet
from fedseg.datamodules.readers.kinds import there
from fedseg.datamodules.transforms import load_augmentation
from fedseg.launch.command import MISTAKE, guarded
from fedseg.launch.experiment import Experiment
from fedseg.launch.settings import SCHEMA
from fedseg.reporting.letters import legible

USAGE = """python -m fedseg.datamodules.check DIR [KEY=VALUE ...] [output=FOLDER]
python -m fedseg.datamodules.check MANIFEST.csv [KEY=VALUE ...]
python -m fedseg.datamodules.check data=fundus data.root=DIR [data.KEY=VALUE ...]

Looks at every file of DIR/<site>/{images,masks}, of the manifest or of a named data set, and reports what would stop a
run or make its scores mislead. Settings are those of `python train.py` (all of a run's may stand here); "data." may be
left out, as in regions='{disc: [1, 2], cup: [2]}'. Leaves report.md, findings.csv and contact_sheet.png in FOLDER
(data-check, or DIR-data-check where that would lie among the data).

Exit code: 0 ready (warnings may remain), 1 errors found, 2 wrong usage or a report that cannot be written."""

READY, FAULTY = 0, 1
OUTPUT = "data-check"


class UsageError(ValueError):
    """A command line that cannot be understood."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return guarded(_run, arguments)


def _run(arguments: Sequence[str]) -> int:
    if {"--help", "-h"} & set(arguments):
        print(USAGE)
        return READY
    try:
        data, title, output = build(arguments)
        output = beside(output, data)
        _claim(output)
    except (UsageError, ConfigError, DataError) as error:
        print(f"error: {error}\n\n{USAGE}", file=sys.stderr)
        return MISTAKE
    checked = check(data, progress=sys.stderr.isatty())
    try:
        write(checked, data, title, output)
    except OSError as error:
        print(f"error: output={output}: {error}; make room, or name another folder", file=sys.stderr)
        return MISTAKE
    return FAULTY if any(finding.severity == "error" for finding in checked.findings) else READY


def beside(output: Path, data: MultiCenterDataModule) -> Path:
    """Where the report goes: never among the data that are listed.

    Args:
        output: As given, or the default.
        data: Its ``root``, if it has one, holds the data.

    Raises:
        UsageError: A folder was named that is the data's, or a site's.
    """
    root = getattr(data, "root", None)
    if root is None:
        return output
    home, asked = Path(root).resolve(), output.resolve()
    if asked == home or (home / "images" in (asked, *asked.parents)):
        raise UsageError(f"output={output} is the folder of the data; name one beside it")
    if home not in asked.parents:
        return output
    site = home / asked.relative_to(home).parts[0]
    if any((site / kind).is_dir() for kind in ("images", "masks")):
        raise UsageError(f"output={output} lies in a site's folder; name one beside {home}")
    if output != Path(OUTPUT):
        return output
    if os.access(home.parent, os.W_OK):
        return home.parent / f"{home.name}-{OUTPUT}"
    return Path(mkdtemp(prefix=f"{OUTPUT}-"))


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
    named = data.modalities_of("")  # as data.modalities calls them, whatever a site does
    all_tables = tables(checked, data.regions, data.fitting.setting, named) if checked.sites else []
    print(as_text(title, line, all_tables, checked.findings))
    write_findings(checked.findings, output / "findings.csv")
    (output / "report.md").write_text(as_markdown(title, line, all_tables, checked.findings), encoding="utf-8")
    if checked.sites:
        save_sheet(legible(draw_sheet(checked.sheet, checked.sites, title)), output / "contact_sheet.png")
    print(f"report.md, findings.csv{', contact_sheet.png' if checked.sites else ''}: {output}")


def build(arguments: Sequence[str]) -> tuple[MultiCenterDataModule, str, Path]:
    """The data module that a command line describes, a title, and the folder for the report.

    Raises:
        UsageError: No data is named.
        ConfigError: Unknown names, or values of a wrong type.
        DataError: Settings that the data module refuses.
    """
    told, output = _as_for_a_run(arguments)
    if not told:
        raise UsageError("name the folder of the data")
    config = compose(told, SCHEMA)
    root = config.data.get("root")
    if root is not None and not there(Path(root).expanduser().is_dir):
        raise UsageError(f"{root} is no folder")
    data = Experiment(config).data
    load_augmentation(data.augment)
    return data, f"Data check: {config.data.get('manifest') or root or config.data.preset}", output


def _as_for_a_run(arguments: Sequence[str]) -> tuple[list[str], Path]:
    """The settings as `train.py` takes them, and the folder for the report."""
    others = {*SCHEMA.groups, *SCHEMA.sections, *knobs(SCHEMA.top)}
    told, output = [], OUTPUT
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or "/" in key or there(Path(argument).exists):
            told += _place(argument)
        elif key == "output":
            output = value
        elif key.partition(".")[0] in others:
            told.append(argument)
        else:
            told.append(f"data.{argument}")
    if told and not any(word.startswith(("data=", "data.name=", "experiment=")) for word in told):
        told.insert(0, "data=folder")
    return told, Path(output)


def _place(path: str) -> list[str]:
    """A folder of data, or a table that lists them."""
    if path.lower().endswith((".csv", ".tsv")):
        return [f"data.manifest={path}", f"data.root={Path(path).parent}"]
    return [f"data.root={path}"]
