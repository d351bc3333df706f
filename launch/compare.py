"""A comparison from its command line to its folder.

Reading runs needs neither torch nor images; what does (pictures of cases, differences
between sites) is imported when asked.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedseg.configs.compose import ConfigError, Schema, parsed
from fedseg.configs.knobs import REQUIRED, knobs, validated
from fedseg.reporting import ReportingError
from fedseg.reporting.circumstance import ELSEWHERE
from fedseg.reporting.compare.analysis import Analysis
from fedseg.reporting.compare.gather import gather
from fedseg.reporting.compare.options import Options, Stated
from fedseg.reporting.compare.report import CASES, PAGE, PARTS, Extras, Report, without_images, write
from fedseg.reporting.compare.runs import LeftOut, Run, find_runs, read_run
from fedseg.reporting.compare.verdicts import Verdict
from fedseg.reporting.folder import RunFolder
from fedseg.reporting.units import UNKNOWN

USAGE = """python compare.py RUN... [key=value ...]

  python compare.py runs/compare_phantom                     every run in a folder, at any depth (a sweep's folder)
  python compare.py runs/fedavg-0 runs/ditto-0               folders of runs
  python compare.py 'runs/*-seed[012]' output=report         a pattern, in quotes
  python compare.py runs/fedavg-0 data.root=DIR              data that were moved, for the pictures

Runs that differ in their seed only are one method. Runs whose scores do not mean the same (data, splits, regions, grid,
metric definitions) are refused; unfinished ones are left out. docs/comparison.md explains every number and test.
"""


@dataclass(frozen=True)
class Destination:
    """Where the report goes, and what it takes.

    Attributes:
        output: folder of the report; null makes RUN/report for a folder of runs, else comparison here. An earlier
            report there is replaced.
        pictures: also read images again: how sites differ, and the cases with the largest gain and loss; takes longer.
        cases: pictures per site of the largest gain, and as many of the largest loss.
    """

    output: str | None = None
    pictures: bool = True
    cases: int = 2


def requested(arguments: Sequence[str]) -> tuple[list[str], Options, Destination, list[str]]:
    """The command line read: where runs are, how to compare them, where to write, where data lie and how to compute.

    Raises:
        ConfigError: an unknown key, a value of the wrong type or out of range, or no run.
    """
    told = [a for a in arguments if "=" in a and not Path(a).exists() and "/" not in a.partition("=")[0]]
    places = [argument for argument in arguments if argument not in told]
    elsewhere = [argument for argument in told if argument.partition("=")[0] in ELSEWHERE]
    told = [_to_python(argument) for argument in told if argument not in elsewhere]
    values = parsed(told, Schema({}, {}, Options))
    known = {name: owner for owner in (Options, Destination) for name in knobs(owner)}
    settings, errors = [], []
    for owner in (Options, Destination):
        own = {key: value for key, value in values.items() if known.get(key, Options) is owner}
        valid, problems = validated(owner, own, "", known.keys() - knobs(owner))
        settings.append(valid)
        errors += [f"{problem.replace('global_', 'global')} (see compare.py --help)" for problem in problems]
    if errors:
        raise ConfigError("\n".join(errors))
    if not places:
        raise ConfigError("no run is named: python compare.py RUN... (see compare.py --help)")
    try:
        return places, Options(**settings[0]), Destination(**settings[1]), elsewhere
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _to_python(argument: str) -> str:
    """Python keeps the word global for itself; the setting of that name is the field global_."""
    return argument.replace("global=", "global_=", 1) if argument.startswith("global=") else argument


def compare(places: Sequence[str], options: Options, place: Destination, elsewhere: Sequence[str] = ()) -> Report:
    """Gather runs, compare them, write the report.

    Args:
        places: where runs are.
        options: how to compare them.
        place: where to write.
        elsewhere: where their data lie now and how to compute (`ELSEWHERE`), for what looks at images again.

    Raises:
        ReportingError: there is no run, runs cannot be compared, or the output folder holds something else.
    """
    output = destination(places, place)
    read = [read_run(path, options.metric) for path in find_runs(places)]
    for one in read:
        if isinstance(one, LeftOut):
            print(f"left out: {one.path}: {one.reason}", file=sys.stderr)
    analysis = analysed(read, options)
    output.mkdir(parents=True, exist_ok=True)  # a place that cannot be written is known before the work
    _clear(output)
    return write(analysis, output, lambda verdicts: _extras(analysis, verdicts, place, output, elsewhere))


def analysed(read: Iterable[Run | LeftOut], options: Options) -> Analysis:
    """Runs as one comparison, which knows the unit and the grid of their numbers.

    Raises:
        ReportingError: they cannot be compared.
    """
    gathered = gather(read, default_settings)
    gathered.check_unit(options.metric)
    length = gathered.unit(options.metric) or UNKNOWN
    known = {str(site) for runs in gathered.runs.values() for run in runs for site in run.work["site"]}
    if odd := sorted(set(options.slower or {}) - known):
        raise ReportingError(f"slower names {odd[0]!r}; the sites that train are {', '.join(sorted(known))}")
    return Analysis(gathered, Stated(**vars(options), length=length, grid=gathered.grid))


def default_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Today's defaults of all settings that a run with these could have."""
    from fedseg.launch.settings import SCHEMA  # methods, data sets and networks; for runs of an earlier version only

    owners = {f"{section}.": owner for section, owner in SCHEMA.sections.items()}
    owners |= {f"{group}.": known[settings[f"{group}.name"]] for group, known in SCHEMA.groups.items()}
    owners[""] = SCHEMA.top
    return {
        f"{prefix}{name}": list(knob.default) if isinstance(knob.default, tuple) else knob.default
        for prefix, owner in owners.items()
        for name, knob in knobs(owner).items()
        if knob.default is not REQUIRED
    }


def destination(places: Sequence[str], place: Destination) -> Path:
    """The report's folder.

    Raises:
        ReportingError: it holds something that is no report.
    """
    only = Path(places[0])
    inside = len(places) == 1 and only.is_dir() and not RunFolder(only).holds_run
    output = Path(place.output) if place.output is not None else only / "report" if inside else Path("comparison")
    if output.is_file():
        raise ReportingError(f"output={output} is a file; choose a folder")
    if output.is_dir() and any(output.iterdir()) and not (output / PAGE).is_file():
        raise ReportingError(f"output={output} holds something that is no report (no {PAGE}); choose another folder")
    return output


def _clear(output: Path) -> None:
    """Remove an earlier report, so that no table or picture of it stays behind.

    An empty page marks the folder as a report's at once, also if this comparison is stopped.
    """
    (output / PAGE).write_text("")
    for part in PARTS:
        shutil.rmtree(output / part, ignore_errors=True)


def _extras(
    analysis: Analysis, verdicts: Sequence[Verdict], place: Destination, output: Path, elsewhere: Sequence[str]
) -> Extras:
    if not place.pictures:
        return without_images(analysis, "pictures=false.")
    if not any(run.folder.has_checkpoint for _, run in analysis.gathered.ordinary):
        return without_images(analysis, "these runs' folders hold no saved models (checkpoints/).")
    from fedseg.launch.scores.second_look import look_again  # torch, networks, images

    print(
        "looking at images again: how sites differ, cases that gain and lose most (pictures=false leaves it out)",
        file=sys.stderr,
    )
    return look_again(analysis, verdicts, place.cases, output / CASES, elsewhere)


__all__ = ["Destination", "Run", "compare", "requested"]
