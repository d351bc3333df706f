"""Tables of a comparison: to read in the page and on a terminal, and as CSV and LaTeX."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedseg.common.files import write_atomic
from fedseg.common.text import count
from fedseg.evaluation import LOWER_IS_BETTER, METRICS
from fedseg.reporting.compare.analysis import OVERALL, Analysis, Model
from fedseg.reporting.compare.options import Options
from fedseg.reporting.compare.runs import over_patients
from fedseg.reporting.compare.verdicts import Verdict, interval, probability
from fedseg.reporting.folder import file_name
from fedseg.reporting.summary import Table
from fedseg.reporting.units import MIXED, signed, titled

MINUS, ABSENT = "−", "–"
CASE_MEANS = ["method", "view", "seed", "checkpoint", "split", "site", "seen", "metric"]
REGION_MEANS = [*CASE_MEANS, "region"]


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: what it shows.
        key: what it sorts by; a number, or the text.
        detail: small print below.
        mark: "best" or empty.
    """

    text: str
    key: float | str = ""
    detail: str = ""
    mark: str = ""

    @property
    def sort_key(self) -> str:
        """As an attribute: numbers stay numbers, what is missing sorts last."""
        return (
            ""
            if isinstance(self.key, float) and not np.isfinite(self.key)
            else str(self.key if self.key != "" else self.text)
        )


@dataclass(frozen=True)
class Grid:
    """A table of the page.

    Attributes:
        name: of its files.
        title: above it.
        header: one per column.
        rows: cells.
        note: below it.
        muted: numbers of rows that are baselines.
    """

    name: str
    title: str
    header: tuple[str, ...]
    rows: list[list[Cell]]
    note: str = ""
    muted: frozenset[int] = field(default_factory=frozenset)

    def latex(self) -> str:
        """With booktabs; best numbers are bold."""
        body = pd.DataFrame(
            [[_tex(cell) for cell in row] for row in self.rows], columns=[_escaped(h) for h in self.header]
        )
        columns = "l" + "r" * (len(self.header) - 1)
        return str(
            body.to_latex(
                index=False, escape=False, column_format=columns, caption=_escaped(self.title), label=f"tab:{self.name}"
            )
        )

    def plain(self, title: str = "") -> Table:
        """For a terminal, with a title above the rows' names if one is given."""
        return Table(
            (title or self.header[0], *self.header[1:]),
            tuple(tuple(cell.text for cell in row) for row in self.rows),
            self.note,
        )


def number(value: float, scale: float = 1.0, digits: int = 1, *, sign: bool = False) -> Cell:
    """A number as a cell; missing ones as a dash."""
    if not np.isfinite(value):
        return Cell(ABSENT, float("nan"))
    text = signed(value * scale, digits) if sign else f"{value * scale:.{digits}f}".replace("-", MINUS)
    return Cell(text, float(value))


def score_grid(analysis: Analysis, checkpoint: str, *, seen: bool = True) -> Grid:
    """Models x sites: mean, interval below, spread over seeds beside."""
    table = analysis.overview
    table = table[(table["checkpoint"] == checkpoint) & (table["seen"] == seen)] if len(table) else table
    sites = [OVERALL, *sorted(set(table["site"]) - {OVERALL})] if len(table) else [OVERALL]
    found = {(Model(row["method"], row["view"]), row["site"]): row for row in table.to_dict("records")}
    models = [m for m in analysis.models if (m, OVERALL) in found] if seen else sorted({model for model, _ in found})
    scale = analysis.options.scale
    side = analysis if seen else analysis.unseen
    whole = [m for m in models if m in side.complete]
    best = {site: _best([found[m, site]["mean"] for m in whole if (m, site) in found], analysis) for site in sites}
    rows = []
    for model in models:
        cells = [Cell(model.label)]
        for site in sites:
            row = found.get((model, site))
            bold = best[site] if model in whole else float("nan")
            cells.append(Cell(ABSENT, float("nan")) if row is None else _scored(row, analysis.options, bold))
        overall = found[model, OVERALL]
        rows.append([*cells, number(overall["seed_spread"], scale), Cell(str(overall["seeds"]), overall["seeds"])])
    muted = frozenset(i for i, model in enumerate(models) if analysis.is_baseline(model))
    word = "best" if checkpoint == "best" else "last"
    place = analysis.options.on_grid
    title = f"Test {analysis.options.title} of the {word} round" if seen else f"Sites that took no part ({word} round)"
    title += place
    name = f"scores_{word}" if seen else f"unseen_{word}"
    note = (
        f"{analysis.options.unit.capitalize()}. Small print: {analysis.options.confidence:.0%} interval and standard "
        "deviation between seeds; seed spread: the same of the mean over sites. With few seeds or sites an interval is "
        "narrower than its name says."
    )
    note += seeds_note(side)
    return Grid(name, title, ("model", *sites, "seed spread", "seeds"), rows, note, muted)


def seeds_note(analysis: Analysis) -> str:
    """Which seeds a table of means is over, where some models have more."""
    more = [model.label for model in analysis.test if analysis.seeds(model) > {*analysis.seeds_of_means[model]}]
    if not more:
        return ""
    seeds = ", ".join(map(str, analysis.ranked_seeds))
    return f" Side by side on seeds {seeds}; {', '.join(sorted(more))} {'has' if len(more) == 1 else 'have'} more."


def _side_by_side(table: pd.DataFrame, analysis: Analysis) -> pd.DataFrame:
    """Rows of the seeds that the models' means are over."""
    told = {(*model, seed) for model, seeds in analysis.seeds_of_means.items() for seed in seeds}
    rows = table[["method", "view", "seed"]].itertuples(index=False, name=None)
    return table[np.array([row in told for row in rows], bool)]


def _scored(row: Mapping[Hashable, Any], options: Options, best: float) -> Cell:
    cell = number(row["mean"], options.scale)
    parts = [interval(row, options, sign=False)]
    if np.isfinite(row["seed_spread"]) and row["site"] != OVERALL:
        parts.append(f"± {number(row['seed_spread'], options.scale).text}")
    return Cell(cell.text, cell.key, ", ".join(parts), "best" if row["mean"] == best else "")


def _best(values: Sequence[float], analysis: Analysis) -> float:
    known = [value for value in values if np.isfinite(value)]
    return (max if analysis.options.higher_is_better else min)(known, default=float("nan"))


def test_grid(analysis: Analysis, question: str, name: str, title: str) -> Grid:
    """All tests of one question."""
    tests = analysis.tests
    rows = []
    for row in analysis.answers_to(question).to_dict("records"):
        scale = analysis.options.scale
        gain = number(row["gain"], scale, sign=True)
        sure = "best" if row["p_holm"] <= analysis.options.alpha else ""
        rows.append([
            Cell(row["site"]), Cell(row["model"]), Cell(row["against"]),
            Cell(gain.text, gain.key, interval(row, analysis.options), sure),
            Cell(f"{row['better']} of {row['patients']}", row["better"] / row["patients"], count(row["cases"], "case")),
            _p(row["p"]), _p(row["p_holm"]),
        ])  # fmt: skip
    header = ("site", "model", "against", "gain", "patients better", "p", "p (Holm)")
    note = (
        f"One declared family of {count(len(tests), 'test')}, all models at all sites and over them, against the "
        f"global model and against local training; bold: p (Holm) at most {analysis.options.alpha:g}."
        if analysis.seen
        else f"One family of {count(len(tests), 'test')}; bold: p (Holm) at most {analysis.options.alpha:g}."
    )
    return Grid(name, title, header, rows, " ".join(filter(None, (note, analysis.hopeless))))


def _p(value: float) -> Cell:
    return Cell(probability(value).removeprefix("p = ").removeprefix("p "), float(value))


def verdict_grid(analysis: Analysis, verdicts: Sequence[Verdict]) -> Grid:
    """The answers as numbers: one row for each test."""
    scale = analysis.options.scale
    rows = []
    for verdict in verdicts:
        answer = Cell(verdict.answer, detail="provisional" if verdict.provisional else "")
        for (one, other), test in verdict.tests.items():
            gain = number(test["gain"], scale, sign=True)
            rows.append([
                Cell(verdict.site), answer, Cell(f"{one} over {other}", detail=f"{test['model']}, {test['against']}"),
                Cell(gain.text, gain.key, interval(test, analysis.options),
                     "best" if test["p_holm"] <= analysis.options.alpha else ""),
                Cell(f"{test['better']} of {test['patients']}", test["better"] / test["patients"],
                     count(test["cases"], "case")),
                _p(test["p"]), _p(test["p_holm"]), _could_show(test["detectable"], analysis.options),
            ])  # fmt: skip
        if not verdict.tests:
            rows.append([Cell(verdict.site), answer, *([Cell(ABSENT)] * 6)])
    note = (
        "Families for Holm: the tests over sites, and those at the sites. Could show: the smallest true difference "
        "that these patients and seeds find with 80 % power at the first step of Holm; none: not even the "
        "greatest that the metric allows."
    )
    header = ("site", "answer", "test", "gain", "patients better", "p", "p (Holm)", "could show")
    return Grid("answers", "Personal, global or alone", header, rows, note)


def _could_show(least: float, options: Options) -> Cell:
    return Cell("none", np.inf) if least > options.span else number(least, options.scale)


def fairness_grid(analysis: Analysis) -> Grid:
    """How evenly the models serve sites."""
    scale = analysis.options.scale
    models = analysis.ranked
    rows = [
        [
            Cell(model.label), number(row["mean"], scale),
            Cell(number(row["worst"], scale).text, row["worst"], row["worst_site"]),
            number(row["gap"], scale), number(row["spread"], scale), number(row["decile"], scale),
        ]
        for model, row in zip(models, analysis.fairness.to_dict("records"), strict=True)
    ]  # fmt: skip
    header = ("model", "mean over sites", "worst site", "gap", "spread of sites", "worst decile of patients")
    least = "at most" if analysis.options.higher_is_better else "at least"
    note = (
        "Gap: best site minus worst site. Spread: standard deviation between sites. Worst decile: the worst tenth of "
        f"the patients has {least} this.{seeds_note(analysis)}"
    )
    muted = frozenset(i for i, model in enumerate(models) if analysis.is_baseline(model))
    return Grid("fairness", "Fairness", header, rows, note, muted)


def cost_grid(analysis: Analysis) -> Grid:
    """What models cost, mean over seeds."""
    columns: tuple[tuple[str, str, float, int], ...] = (
        ("rounds_to_target", "rounds to target", 1, 1), ("bytes_to_target", "MB to target", 1e-6, 0),
        ("seconds_to_target", "simulated s to target", 1, 1),
        ("bytes_down", "MB down", 1e-6, 0), ("bytes_up", "MB up", 1e-6, 0), ("steps", "steps", 1, 0),
        ("training_seconds", "training s", 1, 0), ("wall_seconds", "wall s", 1, 0), ("cpu_seconds", "CPU s", 1, 0),
        ("peak_memory_bytes", "peak MB", 1e-6, 0), ("peak_gpu_bytes", "GPU peak MB", 1e-6, 0),
    )  # fmt: skip
    table = analysis.cost
    used = [column for column in columns if len(table) and table[column[0]].notna().any()]
    value, origin = analysis.target
    scored = bool(np.isfinite(value))  # not where sites were held out in turn
    rows = []
    for row in table.to_dict("records"):
        cells = [Cell(Model(row["method"], row["view"]).label), *([Cell(row["reached"])] if scored else [])]
        rows.append([*cells, *(number(row[name], scale, digits) for name, _, scale, digits in used)])
    goal = f" Target: validation Dice {value * 100:.1f}, {origin}; means are over the seeds that reach it."
    note = (
        f"Per run, all sites together, mean over seeds.{goal if scored else ''} Steps and training time hold what is "
        "fitted before a round's scoring. Wall and CPU time are of the whole run with its scoring. A dash: the folder "
        f"does not tell, or nothing travels (pooled data).{_clock(analysis)}"
    )
    header = ("model", *(["seeds that reach it"] if scored else []), *(title for _, title, _, _ in used))
    return Grid("cost", "Cost", header, rows, note)


def _clock(analysis: Analysis) -> str:
    """What the simulated clock was told, if there is one."""
    clock = analysis.options.clock
    if clock is None:
        return ""
    line = "the network takes no time" if clock.megabits is None else f"a site's line has {clock.megabits:g} Mbit/s"
    slow = "".join(f"; {site} is {times:g} times slower" for site, times in clock.slower.items())
    return (
        f" Simulated time, not measured: a step of one model takes {clock.step_seconds:g} s, {line}{slow}. Sites of a "
        "round wait for the slowest; where they take turns, their times add up."
    )


def _means_grid(
    table: pd.DataFrame, analysis: Analysis, by: str, name: str, title: str, shown: Callable[[str, float], Cell]
) -> Grid:
    """Models x what `by` names, of means within each run (`over_patients`)."""
    means = _side_by_side(table, analysis).groupby(["method", "view", by, "site"], observed=True)["value"].mean()
    means = means.groupby(["method", "view", by], observed=True).mean()
    columns = list(dict.fromkeys(means.index.get_level_values(by)))
    rows = []
    for model in analysis.models:
        values = ((column, means.get((model.method, model.view, column), float("nan"))) for column in columns)
        rows.append([Cell(model.label), *(shown(str(column), float(value)) for column, value in values)])
    muted = frozenset(i for i, model in enumerate(analysis.models) if analysis.is_baseline(model))
    note = f"Mean over seeds and seen sites, test patients.{seeds_note(analysis)}"
    return Grid(name, title, ("model", *map(str, columns)), rows, note, muted)


def metric_grid(analysis: Analysis) -> Grid:
    """All metrics, mean over sites; without lengths that are in mm at some sites and in pixels at others."""

    def shown(metric: str, value: float) -> Cell:
        return number(value, 1, 2) if METRICS[metric].is_length else number(value, 100)

    table = analysis.gathered.cases
    mixed = [metric for metric in table["metric"].unique() if analysis.gathered.unit(metric) == MIXED]
    rows = table[(table["checkpoint"] == analysis.options.checkpoint) & (table["split"] == "test") & table["seen"]]
    rows = rows[~rows["metric"].isin(mixed)]
    grid = _means_grid(
        over_patients(rows, CASE_MEANS), analysis, "metric", "metrics", f"All metrics{analysis.options.on_grid}", shown
    )
    lower = ", ".join(metric for metric in grid.header[1:] if metric in LOWER_IS_BETTER)
    header = ("model", *(titled(metric, analysis.gathered.unit(metric)) for metric in grid.header[1:]))
    signed = ", ".join(metric for metric in grid.header[1:] if METRICS[metric].signed)
    note = f"{grid.note} Shares in points of 100; lower is better for {lower}." if lower else grid.note
    return replace(grid, header=header, note=note + f" Of {signed} 0 is best." * bool(signed))


def region_grid(analysis: Analysis) -> Grid:
    """The metric by region, mean over sites."""
    table, options = analysis.gathered.regions, analysis.options
    rows = table[
        (table["checkpoint"] == options.checkpoint)
        & (table["split"] == "test")
        & table["seen"]
        & (table["metric"] == options.metric)
    ]
    title = f"{options.title} by region{options.on_grid}"
    return _means_grid(rows, analysis, "region", "regions", title, lambda _, value: number(value, options.scale))


def region_site_grids(analysis: Analysis, *, seen: bool = True) -> list[Grid]:
    """The metric of each region: models x sites; none where there is one region only."""
    table, options = analysis.gathered.regions, analysis.options
    rows = table[(table["checkpoint"] == options.checkpoint) & (table["split"] == "test") & (table["seen"] == seen)]
    rows = rows[rows["metric"] == options.metric]
    regions = [str(region) for region in rows["region"].unique()]
    if len(regions) < 2:
        return []
    side = analysis if seen else analysis.unseen
    rows = _side_by_side(rows, side)
    return [_region_by_site(rows[rows["region"] == region], side, region) for region in regions]


def _region_by_site(rows: pd.DataFrame, analysis: Analysis, region: str) -> Grid:
    means = rows.groupby(["method", "view", "site"], observed=True)["value"].mean().unstack()
    sites, options = sorted(map(str, means.columns)), analysis.options
    body = []
    means = means.sort_index()
    for (method, view), own in zip(means.index, means[sites].to_numpy(), strict=True):
        over = float(np.nanmean(own)) if np.isfinite(own).any() else float("nan")
        cells = (number(float(value), options.scale) for value in (over, *own))
        body.append([Cell(Model(str(method), str(view)).label), *cells])
    title = f"{options.title} of {region} by site{options.on_grid}"
    note = f"{options.unit.capitalize()}. Mean over seeds, test patients who show the region.{seeds_note(analysis)}"
    return Grid(f"region_{file_name(region)}", title, ("model", OVERALL, *sites), body, note)


def run_grid(analysis: Analysis) -> Grid:
    """Which folders were compared."""
    rows = [
        [Cell(label), Cell(str(run.seed), run.seed), Cell(str(run.split_seed), run.split_seed), Cell(str(run.path))]
        for label, runs in analysis.gathered.runs.items()
        for run in runs
    ]
    return Grid("runs", "Runs", ("method", "seed", "split seed", "folder"), rows)


def answers(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """The verdicts with all digits: one row for each test."""
    rows = []
    for verdict in verdicts:
        told = {"site": verdict.site, "answer": verdict.answer, "provisional": verdict.provisional}
        tests = [{"test": " over ".join(pair), **row} for pair, row in verdict.tests.items()] or [{}]
        rows += [{**told, **test, "site": verdict.site, "sentence": verdict.text} for test in tests]
    return pd.DataFrame(rows)


def ranking_table(analysis: Analysis) -> pd.DataFrame:
    """Average ranks over patients, and the numbers of the ranking as a whole in every row."""
    found, stability = analysis.ranks, analysis.stability
    table = pd.DataFrame({"model": list(analysis.patient_table.columns), "average_rank": found.ranks})
    return table.sort_values("average_rank").assign(
        patients=found.blocks, friedman_p=found.p, kendall_w=found.agreement,
        critical_difference=found.critical_difference,
        tau_of_seeds=stability["seed"], tau_of_sites=stability["site"],
    )  # fmt: skip


def save_tables(
    grids: Sequence[Grid],
    analysis: Analysis,
    verdicts: Sequence[Verdict],
    beside: Mapping[str, pd.DataFrame | None],
    folder: Path,
) -> None:
    """CSV with all digits, and LaTeX of what the page shows."""
    raw: dict[str, pd.DataFrame | None] = {
        "answers": answers(verdicts),
        "scores": analysis.overview, "tests": analysis.tests, "fairness": analysis.fairness, "cost": analysis.cost,
        **_unseen_tables(analysis.unseen),
        "ranks": analysis.rank_table.reset_index(), "wins": analysis.wins.rename_axis("model").reset_index(),
        "ranking": ranking_table(analysis), "curves": analysis.curves, **beside,
        "metrics": over_patients(analysis.gathered.cases, CASE_MEANS).sort_values(CASE_MEANS),
        "regions": analysis.gathered.regions[[*REGION_MEANS, "value"]].sort_values(REGION_MEANS),
    }  # fmt: skip
    for name, table in raw.items():
        if table is not None:
            write_atomic(folder / f"{name}.csv", table.to_csv(index=False, lineterminator="\n"))
    for grid in grids:
        write_atomic(folder / f"{grid.name}.tex", grid.latex())


def _unseen_tables(unseen: Analysis) -> dict[str, pd.DataFrame]:
    return {"unseen_tests": unseen.tests, "unseen_cost": unseen.cost} if unseen.sites else {}


def _tex(cell: Cell) -> str:
    text = _escaped(cell.text)
    text = f"\\textbf{{{text}}}" if cell.mark == "best" else text
    return f"{text} {{\\scriptsize {_escaped(cell.detail)}}}" if cell.detail else text


def _escaped(text: str) -> str:
    special = {
        "\\": r"\textbackslash{}",
        **{c: f"\\{c}" for c in "&%$#_{}"},
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
    }
    plain = {MINUS: "$-$", ABSENT: "--", "<": "$<$"}
    return "".join(plain.get(c, special.get(c, c)) for c in text)
