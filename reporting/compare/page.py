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

from fedseg.common.text import count
from fedseg.reporting.compare.analysis import AGAINST_GLOBAL, OVERALL, PERSONAL, Analysis, Model
from fedseg.reporting.compare.choice import Choice
from fedseg.reporting.compare.tables import Grid
from fedseg.reporting.compare.verdicts import SURE_SEEDS, Answer, Verdict, amount, units
from fedseg.reporting.letters import legible
from fedseg.reporting.places import place_name
from fedseg.reporting.summary import said_of_privacy

MOST = 4  # examples in a sentence
BADGES: dict[Answer, tuple[str, str]] = {
    "personal": ("personal", "own"),
    "global": ("global", "shared"),
    "alone": ("alone", "alone"),
    "equivalent": ("equivalent", "open"),
    "not shown": ("not shown", "open"),
    "too few patients": ("too few patients", "open"),
    "not compared": ("not compared", "open"),
}


def badge(verdict: Verdict) -> str:
    """The answer in capitals."""
    return BADGES[verdict.answer][0].upper()


def kind(verdict: Verdict) -> str:
    """Its colour: grey for what is provisional."""
    return "open" if verdict.provisional else BADGES[verdict.answer][1]


@dataclass(frozen=True)
class PagePicture:
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
    pictures: Sequence[PagePicture] = ()
    grids: Sequence[Grid] = ()
    folded: Sequence[Grid] = ()
    gallery: Sequence[tuple[str, PagePicture]] = ()
    problem: str = ""
    anchor: str = field(init=False)

    def __post_init__(self) -> None:
        self.anchor = "".join(c if c.isalnum() else "-" for c in self.title.lower())


def render(
    analysis: Analysis,
    verdicts: Sequence[Verdict],
    small: Sequence[str],
    first: PagePicture | None,
    sections: Sequence[Section],
) -> str:
    """The page.

    Args:
        analysis: for the head.
        verdicts: over sites, then one per site.
        small: what a reader of the verdicts must know.
        first: the plot beside the verdicts.
        sections: what follows.
    """
    environment = Environment(
        loader=PackageLoader("fedseg.reporting.compare", "."), autoescape=select_autoescape(default=True),
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("page.html.j2").render(
        headline=headline(verdicts),
        tally=tally(verdicts),
        facts=facts(analysis),
        verdicts=[(verdict, badge(verdict).lower(), kind(verdict)) for verdict in verdicts],
        overall=OVERALL,
        small=small,
        first=first,
        notes=notes(analysis),
        left_out=analysis.gathered.left_out,
        sections=sections,
    )


def headline(verdicts: Sequence[Verdict]) -> str:
    """The federation's answer, in a sentence."""
    if not verdicts:
        return "Every site was held out in turn: scores of sites that took no part in training"
    first = verdicts[0]
    told = {
        "personal": "Over all sites: use personal models",
        "global": "Over all sites: use the global model",
        "alone": "Over all sites: train alone",
        "equivalent": "Personal and global models are equivalent over all sites",
        "not shown": "Over all sites, no kind of model is shown to be the one to use",
        "too few patients": "Too few patients to tell personal and global models apart",
        "not compared": "These runs hold no pair of a personal and a global model",
    }[first.answer]  # fmt: skip
    used = {"personal": first.personal, "global": first.shared, "alone": first.models.get("alone")}.get(first.answer)
    named = f"{told} ({used.method})" if used is not None else told
    return f"{named} (provisional)" if first.provisional and used is not None else named


def tally(verdicts: Sequence[Verdict]) -> str:
    """How many sites have which answer."""
    sites = verdicts[1:]
    counts = Counter(verdict.answer for verdict in sites)
    words = {
        "personal": "should use the personal model", "global": "should use the global model",
        "alone": "should train alone", "equivalent": "with equivalent models", "not shown": "with nothing shown",
        "too few patients": "with too few patients", "not compared": "not compared",
    }  # fmt: skip
    told = [f"{counts[answer]} {words[answer]}" for answer in BADGES if counts[answer]]
    return f"Of {count(len(sites), 'site')}: {', '.join(told)}." if sites else ""


def small_print(analysis: Analysis, choice: Choice, verdicts: Sequence[Verdict]) -> list[str]:
    """What a reader of the verdicts must know: the rule of choice, what is missing, and what is optimistic."""
    if not verdicts:
        return []
    told = choice.rule(analysis)
    runs = [run for _, run in analysis.gathered.ordinary]
    if choice.alone is None and runs:
        told.append(
            "Training alone is missing among these runs, so that nobody knows whether a site should take part at all. "
            f"Run it with each seed: python train.py experiment={runs[0].path}/config.yaml algorithm=local output=NEW"
        )
    told += _others_shown(analysis, verdicts)
    if few := [verdict.few_seeds for verdict in verdicts if verdict.provisional]:
        told.append(
            f"Provisional: {count(min(few), 'seed')}, fewer than {SURE_SEEDS}; another training may turn an answer."
        )
    if unknown := [site for site in analysis.gathered.unknown if site in analysis.sites]:
        told.append(
            f"Patients are unknown at {', '.join(unknown)}: each image counts as a patient there, which is optimistic."
        )
    return told


def _others_shown(analysis: Analysis, verdicts: Sequence[Verdict]) -> list[str]:
    """Personal models that were not chosen, and yet are shown better than their global one at some site."""
    rows = analysis.answers_to(AGAINST_GLOBAL)
    if rows.empty:
        return []
    chosen = verdicts[0].personal
    answers = {verdict.site: verdict.answer for verdict in verdicts}
    found = [
        f"{row['model']} at {row['site']} ({amount(row['gain'], analysis.options)})"
        for row in rows.to_dict("records")
        if row["p_holm"] <= analysis.options.alpha and row["low"] > 0 and answers[row["site"]] != PERSONAL
        if row["site"] != OVERALL and (chosen is None or row["model"] != chosen.label)
    ]
    told = "; ".join(found[:MOST]) + (f" and {len(found) - MOST} more" if len(found) > MOST else "")
    return [f"Not chosen, but shown better than its global model in the table of all models: {told}."] if found else []


def facts(analysis: Analysis) -> list[str]:
    """What was compared, in a few words each."""
    gathered = analysis.gathered
    runs = [run for group in gathered.runs.values() for run in group]
    seeds = sorted({run.seed for run in runs})
    tested = analysis if analysis.sites else analysis.unseen
    return [
        count(len(gathered.methods), "method"), count(len(runs), "run"), count(len(seeds), "seed"),
        count(len(tested.sites), "site") + ("" if analysis.sites else " that took no part"),
        units(counted_once(tested)).replace(" case", " test case"),
        f"data: {data_name(runs[0].settings)}",
        f"{analysis.options.title}, {analysis.options.checkpoint} round{analysis.options.on_grid}",
    ]  # fmt: skip


def counted_once(analysis: Analysis) -> dict[str, int]:
    """Patients and cases of all sites that some model was tested on."""
    known = {(site, *place) for sites in analysis.test.values() for site, v in sites.items() for place in v.columns}
    return {"patients": len({(site, patient) for site, patient, _ in known}), "cases": len(known)}


def data_name(settings: Mapping[str, Any]) -> str:
    """What the place of the data is called where there is one, else the data set's name."""
    root = settings.get("data.root")
    place = place_name(str(root), settings.get("data.manifest")) if root else ""
    return place or str(settings.get("data.preset", settings["data.name"]))


def notes(analysis: Analysis) -> list[str]:
    """What a reader should know: differences between methods, and models that are one and the same."""
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
    return [*alone, *partial, *unprotected(analysis), *same_models(analysis), *analysis.gathered.notes]


def unprotected(analysis: Analysis) -> list[str]:
    """Methods whose noise anybody can subtract who knows the run's seed."""
    found: dict[str, dict[str, None]] = {}
    for method, runs in analysis.gathered.runs.items():
        for told in filter(None, (said_of_privacy(run.settings) for run in runs)):
            found.setdefault(told, {})[method] = None
    return [f"{', '.join(methods)}: {told}." for told, methods in found.items()]


def same_models(analysis: Analysis) -> list[str]:
    """Models that are one and the same."""
    same: dict[str, list[str]] = {}
    for model, first in analysis.twins.items():
        if model != first:
            same.setdefault(first.label, []).append(model.label)
    return [
        f"{first} and {', '.join(others)} have the same scores everywhere; they are shown once."
        for first, others in same.items()
    ]


def _lacking(analysis: Analysis, model: Model) -> str:
    seeds = sorted(set(analysis.ranked_seeds) - analysis.seeds(model))
    sites = sorted(set(analysis.sites) - {s for s, mean in analysis.means(model).items() if mean == mean})
    told = [f"lacks {word} {', '.join(map(str, some))}" for word, some in (("seed", seeds), ("site", sites)) if some]
    return ", ".join(told)


def picture(light: Figure, dark: Figure, alt: str) -> PagePicture:
    """A plot for both grounds."""
    width = int(light.get_size_inches()[0] * 96)
    return PagePicture(svg_uri(light), svg_uri(dark), alt, width)


def svg_uri(figure: Figure) -> str:
    """A figure as data URI; letters become outlines, so that it looks alike everywhere."""
    stream = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "compare"}):
        legible(figure).savefig(stream, format="svg", metadata={"Date": None})
    figure.set_layout_engine("none")  # it is laid out now, also for `save_figures`
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode()


def file_picture(path: Path, alt: str) -> PagePicture:
    """A PNG file as it is."""
    content = path.read_bytes()
    width = int.from_bytes(content[16:20], "big")
    return PagePicture("data:image/png;base64," + base64.b64encode(content).decode(), "", alt, width)


def save_figures(figures: Mapping[str, Figure], folder: Path) -> None:
    """PNG and SVG of every plot, on white."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        options: dict[str, Any] = {"facecolor": "white"}
        legible(figure).savefig(folder / f"{name}.png", dpi=150, **options)
        figure.savefig(folder / f"{name}.svg", **options)
