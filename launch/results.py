"""Documents whose tables, figures and claims come from run folders: `python -m fedseg.launch.results FILE...`.

A document keeps its prose, and marks what is made from runs:

    <!-- from runs: runs/polyp scores -->
    (replaced)
    <!-- end -->

The first word says where runs are, the second what is made of them:

    command                 the command line that trained them
    facts                   methods, runs, seeds, sites, patients, cases
    patients                patients of every site by split
    scores                  models x sites
    against=MODEL           every model against one: "against='fedavg global'"
    headline, answer        the verdicts of compare.py, in short or in full
    tuning                  methods as they come and tuned, and what was found
    across                  every site's model at every site, of runs that have it
    figure=NAME:FILE        a plot of compare.py, written to FILE beside the document

    gains=MODEL             gains over one model: models x the folders of runs at that place
    gains_figure=MODEL:FILE the same as a picture, written to FILE beside the document

and key=value are options of compare.py (checkpoint=last). Runs may also lie in a file of packed scores beside the
document (evidence/bench.tar.xz/amount; made by `python -m fedseg.launch.evidence`). A sentence of one's own stands on
a claim that is checked:

    <!-- true of runs: runs/polyp: fedavg global above local personal at 4 of 4 sites -->
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from matplotlib.figure import Figure

from fedseg.configs.compose import ConfigError, compose
from fedseg.configs.words import written
from fedseg.launch.command import guarded
from fedseg.launch.compare import analysed, requested
from fedseg.launch.documents import Marks, make_anew
from fedseg.launch.evidence import SUFFIX, unpack
from fedseg.launch.run import flat
from fedseg.launch.settings import SCHEMA
from fedseg.reporting import ReportingError
from fedseg.reporting.circumstance import CIRCUMSTANCE
from fedseg.reporting.compare.across import across_text
from fedseg.reporting.compare.analysis import Analysis
from fedseg.reporting.compare.conditions import draw_gains, gains_text
from fedseg.reporting.compare.design import common_settings
from fedseg.reporting.compare.options import Options
from fedseg.reporting.compare.page import save_figures
from fedseg.reporting.compare.plots import LIGHT, draw_all
from fedseg.reporting.compare.report import CAPTIONS
from fedseg.reporting.compare.runs import find_runs, read_run
from fedseg.reporting.compare.sentences import (
    against_text,
    answer_text,
    check_claim,
    facts_text,
    headline_text,
    patients_text,
    scores_text,
)
from fedseg.reporting.compare.tuning import tuning_text
from fedseg.reporting.compare.verdicts import verdicts

MARKS = Marks("runs")
CLAIM = re.compile(r"<!-- true of runs: (?P<place>\S+?): (?P<claim>.*?) -->", re.DOTALL)
TEXTS: dict[str, Callable[[Analysis], str]] = {
    "facts": facts_text,
    "patients": patients_text,
    "scores": scores_text,
    "answer": answer_text,
    "headline": headline_text,
    "across": across_text,
    "tuning": tuning_text,
}
PACKED = re.compile(rf"\S+?{re.escape(SUFFIX)}(?=/|\s|$)")
USAGE = "python -m fedseg.launch.results FILE... [at=DIR] [check=true]"
HELP = f"""{USAGE}

Rewrites, in Markdown files, what is marked as made from runs, and checks claims against them.

  at=DIR        where the places of runs begin; the current folder
  check=true    change nothing; fail where a file is not what its runs say
"""


@dataclass
class Sources:
    """Runs by place and options, each compared once.

    Attributes:
        at: where places begin.
    """

    at: Path
    _known: dict[tuple[Path, Options], Analysis] = field(default_factory=dict)
    _unpacked: dict[Path, TemporaryDirectory[str]] = field(default_factory=dict)
    _drawn: dict[int, dict[str, Figure]] = field(default_factory=dict)

    def drawn(self, analysis: Analysis) -> dict[str, Figure]:
        """Its plots by name, drawn once."""
        if id(analysis) not in self._drawn:
            self._drawn[id(analysis)] = draw_all(analysis, verdicts(analysis), LIGHT)
        return self._drawn[id(analysis)]

    def beginning(self, place: str, document: Path) -> Path:
        """Where a place begins: `at`, or where a file of packed scores beside the document is laid out."""
        if (packed := PACKED.match(place)) is None:
            return self.at
        file = (document.parent / packed[0]).resolve()
        if file not in self._unpacked:
            self._unpacked[file] = TemporaryDirectory(prefix="evidence-")
            unpack(file, Path(self._unpacked[file].name) / packed[0])
        return Path(self._unpacked[file].name)

    def conditions(self, folder: Path, options: Options) -> dict[str, Analysis]:
        """The comparison of every folder of runs in a folder, by name."""
        found = {path.name: self.analysis(path, options) for path in sorted(folder.iterdir()) if path.is_dir()}
        if not found:
            raise ReportingError(f"{folder} holds no folders of runs")
        return found

    def analysis(self, folder: Path, options: Options) -> Analysis:
        """The comparison of the runs in a folder."""
        if (folder, options) not in self._known:
            runs = [read_run(path, options.metric) for path in find_runs([str(folder)])]
            self._known[folder, options] = analysed(runs, options)
        return self._known[folder, options]


def rewritten(text: str, document: Path, sources: Sources, *, figures: bool = True) -> str:
    """The document with all that is made from runs made anew.

    Args:
        text: of the document.
        document: its path, for figures beside it and for messages.
        sources: where runs are.
        figures: write plots too.

    Raises:
        ReportingError: a mark that cannot be read, runs that cannot, or a claim that is not true.
    """
    MARKS.specs(text, document)
    with _naming(document):
        for match in CLAIM.finditer(text):
            check_claim(
                sources.analysis(sources.beginning(match["place"], document) / match["place"], Options()),
                " ".join(match["claim"].split()),
            )

    def made(spec: str) -> str:
        with _naming(f"{document}: from runs: {spec}"):
            body = made_from(spec, document, sources, figures=figures)
        return body.replace(f"{sources.beginning(spec, document)}/", "")  # a document names places as its marks do

    return MARKS.rewritten(text, made)


@contextmanager
def _naming(what: Path | str) -> Iterator[None]:
    """Say in a message where it comes from."""
    try:
        yield
    except (ReportingError, ConfigError, ValueError) as error:
        raise ReportingError(f"{what}: {error}") from error


def made_from(spec: str, document: Path, sources: Sources, *, figures: bool = True) -> str:
    """What one mark asks for.

    Raises:
        ReportingError: it asks for something that there is not.
    """
    place, what, *told = shlex.split(spec) if len(spec.split()) > 1 else ("", "", "")
    _, options, _, _ = requested([place, *told])
    folder = sources.beginning(place, document) / place
    kind, _, value = what.partition("=")
    if kind == "gains" and value:
        return gains_text(sources.conditions(folder, options), value)
    if kind == "gains_figure" and ":" in value:
        model, _, file = value.partition(":")
        figure = draw_gains(sources.conditions(folder, options), model, LIGHT) if figures else None
        return _shown(figure, f"Gains over {model}", file, document)
    analysis = sources.analysis(folder, options)
    if kind in TEXTS and not value:
        return TEXTS[kind](analysis)
    if kind == "command" and not value:
        return command_text(analysis)
    if kind == "against" and value:
        return against_text(analysis, value)
    if kind == "figure" and ":" in value:
        name, _, file = value.partition(":")
        return _figure(sources, analysis, name, file, document, write=figures)
    others = ["command", "against=MODEL", "figure=NAME:FILE", "gains=MODEL", "gains_figure=MODEL:FILE"]
    known = ", ".join([*TEXTS, *others])
    raise ReportingError(f"{what!r} is nothing that can be made from runs; there are {known}")


def command_text(analysis: Analysis) -> str:
    """The command line of these runs, as far as they share it, with METHOD, SEED and DIR for the rest."""
    settings = common_settings(analysis)
    presets = [f"{group}={settings[key]}" for group in ("data", "model") if (key := f"{group}.preset") in settings]
    root = ["data.root=DIR"] if settings.get("data.root") else []
    usual = flat(compose([*presets, *root], SCHEMA))
    own = (*CIRCUMSTANCE, "seed", "algorithm.", "data.name", "data.preset", "model.preset", "model.name")
    departures = [
        f"{key}={shlex.quote(written(value))}"
        for key, value in settings.items()
        if key in usual and not key.startswith(own) and value != usual[key]
    ]
    words = ["python train.py algorithm=METHOD seed=SEED", *presets, *root, *departures]
    return f"```sh\n{_wrapped(words)}\n```\n"


def _wrapped(words: Sequence[str], width: int = 110) -> str:
    lines = [""]
    for word in words:
        if len(lines[-1]) + len(word) + 1 > width:
            lines.append("   ")
        lines[-1] = f"{lines[-1]} {word}" if lines[-1] else word
    return " \\\n".join(lines)


def _figure(sources: Sources, analysis: Analysis, name: str, file: str, document: Path, *, write: bool) -> str:
    drawn = sources.drawn(analysis)
    if name not in drawn:
        raise ReportingError(f"these runs have no plot {name!r}; there are {', '.join(drawn)}")
    return _shown(drawn[name] if write else None, CAPTIONS[name], file, document)


def _shown(figure: Figure | None, caption: str, file: str, document: Path) -> str:
    """How a document shows a figure, which is written if there is one."""
    path = document.parent / file
    if path.suffix != ".png":
        raise ReportingError(f"{file}: figures are PNG files; call it {Path(file).stem}.png")
    if figure is not None:
        save_figures({path.stem: figure}, path.parent)
        path.with_suffix(".svg").unlink()
    return f"![{caption}]({file})\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return guarded(run, arguments, help=HELP)


def run(arguments: Sequence[str]) -> int:
    """Rewrite or check documents."""
    told = dict(argument.split("=", 1) for argument in arguments if argument.startswith(("at=", "check=")))
    documents = [Path(argument) for argument in arguments if not argument.startswith(("at=", "check="))]
    if not documents:
        raise ConfigError(f"no document is named; write: {USAGE}")
    if told.get("check", "false") not in ("true", "false"):
        raise ConfigError(f"check={told['check']}: write check=true or check=false")
    check, sources = told.get("check") == "true", Sources(Path(told.get("at", ".")))
    for document in documents:
        make = partial(rewritten, sources=sources, figures=not check)
        make_anew(document, make, check, told="its runs say", command="fedseg.launch.results")
    return 0


if __name__ == "__main__":
    sys.exit(main())
