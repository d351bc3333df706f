"""One HTML file that opens offline: tables that sort, pictures inside, light and dark, wide and narrow."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from matplotlib.figure import Figure

from datamodules.letters import legible
from reporting.compare.analysis import Analysis, Model
from reporting.compare.tables import Grid
from reporting.compare.verdicts import Answer, Verdict, count

BADGES: dict[Answer, tuple[str, str]] = {
    "personal": ("personal", "own"),
    "global": ("global", "shared"),
    "mixed": ("mixed", "open"),
    "no difference shown": ("no difference shown", "open"),
    "too few cases": ("too few cases", "open"),
    "not compared": ("not compared", "open"),
}


@dataclass(frozen=True)
class Picture:
    """A picture inside the page.

    Attributes:
        light: data URI.
        dark: data URI for dark ground; empty: the light one serves.
        alt: what it shows.
        width: in CSS pixels.
    """

    light: str
    dark: str
    alt: str
    width: int


@dataclass
class Section:
    """One part of the page.

    Attributes:
        title: heading; also its anchor.
        text: paragraphs.
        pictures: plots side by side where there is room.
        grids: tables; those of `folded` can be opened.
        folded: tables shown on demand.
        gallery: pictures of cases with captions, on any ground.
        problem: why a part is missing; shown to the reader.
    """

    title: str
    text: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    grids: Sequence[Grid] = ()
    folded: Sequence[Grid] = ()
    gallery: Sequence[tuple[str, Picture]] = ()
    problem: str = ""
    anchor: str = field(init=False)

    def __post_init__(self) -> None:
        self.anchor = "".join(c if c.isalnum() else "-" for c in self.title.lower())


def render(analysis: Analysis, verdicts: Sequence[Verdict], first: Picture | None, sections: Sequence[Section]) -> str:
    """The page.

    Args:
        analysis: for the head.
        verdicts: one line per site.
        first: the plot beside the lines.
        sections: what follows.
    """
    environment = Environment(
        loader=PackageLoader("reporting.compare", "."), autoescape=select_autoescape(default=True),
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("page.html.j2").render(
        headline=headline(verdicts),
        facts=facts(analysis),
        verdicts=[(verdict, *BADGES[verdict.answer]) for verdict in verdicts],
        first=first,
        notes=notes(analysis),
        left_out=analysis.gathered.left_out,
        sections=sections,
    )


def headline(verdicts: Sequence[Verdict]) -> str:
    """How many sites should use which model, in a sentence."""
    counts = Counter(verdict.answer for verdict in verdicts)
    if not verdicts:
        return "Every site was held out in turn: scores of sites that took no part in training"
    if len(counts) == 1:
        only = verdicts[0].answer
        every = {
            "personal": "Every site should use its personal model", "global": "Every site should use the global model",
            "no difference shown": "No difference between personal and global models is shown at any site",
            "too few cases": "Too few test cases to tell personal and global models apart at any site",
            "not compared": "These runs hold no pair of a personal and a global model",
            "mixed": "Mixed evidence at every site",
        }  # fmt: skip
        return every[only]
    told: dict[Answer, tuple[str, str]] = {
        "personal": ("gains from its personal model", "gain from their personal model"),
        "global": ("is better served by the global one", "are better served by the global one"),
        "mixed": ("has mixed evidence", "have mixed evidence"),
        "no difference shown": ("shows no difference", "show no difference"),
        "too few cases": ("has too few cases to tell", "have too few cases to tell"),
        "not compared": ("cannot be compared", "cannot be compared"),
    }  # fmt: skip
    parts = [f"{counts[answer]} {words[counts[answer] > 1]}" for answer, words in told.items() if counts[answer]]
    return f"Of {len(verdicts)} sites, {', '.join(parts)}"


def facts(analysis: Analysis) -> list[str]:
    """What was compared, in a few words each."""
    gathered = analysis.gathered
    runs = [run for group in gathered.runs.values() for run in group]
    seeds = sorted({run.seed for run in runs})
    cases = {(site, case) for sites in analysis.test.values() for site, v in sites.items() for case in v.columns}
    return [
        count(len(gathered.methods), "method"), count(len(runs), "run"), count(len(seeds), "seed"),
        count(len(analysis.sites), "site"), count(len(cases), "test case"),
        f"data: {data_name(runs[0].settings)}",
        f"{analysis.options.title}, {analysis.options.checkpoint} round",
    ]  # fmt: skip


def data_name(settings: Mapping[str, Any]) -> str:
    """The folder of the data where there is one, else the data set's name."""
    root = settings.get("data.root")
    return Path(str(root)).name if root else str(settings.get("data.preset", settings["data.name"]))


def notes(analysis: Analysis) -> list[str]:
    """What a reader should know: differences between methods, and models that are one and the same."""
    same: dict[str, list[str]] = {}
    for model, first in analysis.twins.items():
        if model != first:
            same.setdefault(first.label, []).append(model.label)
    twins = [
        f"{first} and {', '.join(others)} have the same scores everywhere; they are shown once."
        for first, others in same.items()
    ]
    seeds = sorted({run.seed for _, run in analysis.gathered.ordinary})
    alone = (
        [
            "One seed: intervals and tests are about these trained models; what another training of the same methods "
            "would bring is not in them. Three seeds or more are better."
        ]
        if len(seeds) == 1
        else []
    )
    thin = [model for model in analysis.models if model not in analysis.complete]
    named = "; ".join(f"{model.label} ({_lacking(analysis, model)})" for model in thin)
    partial = (
        [f"Listed last, not ranked and chosen only where nothing else is: {named}; the others have all of it."]
        if thin
        else []
    )
    return [*alone, *partial, *twins, *analysis.gathered.notes]


def _lacking(analysis: Analysis, model: Model) -> str:
    seeds = sorted(set(analysis.ranked_seeds) - analysis.seeds(model))
    sites = sorted(set(analysis.sites) - {s for s, mean in analysis.means(model).items() if mean == mean})
    told = [f"lacks {word} {', '.join(map(str, some))}" for word, some in (("seed", seeds), ("site", sites)) if some]
    return ", ".join(told)


def picture(light: Figure, dark: Figure, alt: str) -> Picture:
    """A plot for both grounds."""
    width = int(light.get_size_inches()[0] * 96)
    return Picture(svg_uri(light), svg_uri(dark), alt, width)


def svg_uri(figure: Figure) -> str:
    """A figure as data URI; letters become outlines, so that it looks alike everywhere."""
    stream = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "compare"}):
        legible(figure).savefig(stream, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode()


def file_picture(path: Path, alt: str) -> Picture:
    """A PNG file as it is."""
    content = path.read_bytes()
    width = int.from_bytes(content[16:20], "big")
    return Picture("data:image/png;base64," + base64.b64encode(content).decode(), "", alt, width)


def save_figures(figures: Mapping[str, Figure], folder: Path) -> None:
    """PNG and SVG of every plot, on white."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        options: dict[str, Any] = {"facecolor": "white"}
        legible(figure).savefig(folder / f"{name}.png", dpi=150, **options)
        legible(figure).savefig(folder / f"{name}.svg", **options)
