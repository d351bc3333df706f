"""The result of a run: sites x views, for the last round and for the round chosen on validation."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np
import pandas as pd

from fedseg.common.text import piped, printable
from fedseg.evaluation import INVENTED, LOWER_IS_BETTER, METRICS
from fedseg.reporting.units import MIXED, grid_of, in_common, stated, titled

HEADLINE = "dice"
VIEWS = ("global", "personal")
OWN_STATISTICS = "own-statistics"
"""View of sites that never took part: the global model with normalisation statistics of their own images."""
ENTROPY = "entropy"
"""View of sites that never took part: that model, sure of their images by its normalisation's scales and shifts."""
UNSEEN_ONLY = ("adapted", OWN_STATISTICS, ENTROPY)  # views of sites that never took part; shown where there are any
ENCODER = "encoder"  # the view of a pre-training run: probes without labels, no Dice
LAST, BEST = CHECKPOINTS = ("last", "best")
WHOLE = "mean"  # the region of a mean over regions
CASES = "cases"
"""Metric of the rows in which a site that reports means only tells how many cases they are over; ``cases/METRIC`` where
a metric counts others."""
TESTED = "tested"
"""Likewise, of how many cases there are: those that do not show a region do not count."""
OVER_SITES = (("mean over sites", "mean"), ("worst site", "worst"))
FEW_SITES = 12  # with more, tables by region hold means over sites only; summary.csv has every site
MANY_SITES = 30  # a terminal shows the worst of more sites than this; the files always hold all

BOLD, DIM, RESET = "\033[1m", "\033[2m", "\033[0m"
KEYS = ["round", "checkpoint", "split", "view", "site", "seen"]


def case_scores(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean over the regions of each case: columns round, checkpoint, split, view, site, seen, case, metric, value.

    Undefined scores (NaN) do not count; a case without any defined region stays undefined.
    """
    return scores.groupby([*KEYS, "case", "metric"], sort=False)["value"].mean().reset_index()


def site_scores(scores: pd.DataFrame) -> pd.DataFrame:
    """Over each site's cases: columns round, checkpoint, split, view, site, seen, metric, mean, std, median, counts.

    Of all that were ``tested``, ``cases`` count: those in which the score is defined. Of a site that reported its means
    only, they are the values; their spread is not known.
    """
    told = (scores["metric"] == TESTED) | scores["metric"].str.match(rf"{CASES}(/|$)")
    values = case_scores(scores[~told]).groupby([*KEYS, "metric"], sort=False)["value"]
    names = {"count": CASES, "size": TESTED}
    table = values.agg(["mean", "std", "median", "count", "size"]).rename(columns=names).reset_index()
    if not told.any():
        return table
    counts = scores[told].set_index([*KEYS, "metric"])["value"]
    known = _reported(counts, table, CASES)
    known = _reported(counts, table, CASES + "/" + table["metric"]).fillna(known)
    reported = known.notna().to_numpy()
    table[TESTED] = _reported(counts, table, TESTED).fillna(known).fillna(table[TESTED]).astype(int)
    table[CASES] = known.fillna(table[CASES]).astype(int)
    table.loc[reported, "median"] = np.nan
    return table


def _reported(counts: pd.Series, table: pd.DataFrame, name: str | pd.Series) -> pd.Series:
    """The count of that name for every row of a table; NaN where none was reported."""
    wanted = pd.MultiIndex.from_frame(table[KEYS].assign(metric=name))
    return pd.Series(counts.reindex(wanted).to_numpy(), table.index)


def as_means(scores: pd.DataFrame) -> list[dict[str, Any]]:
    """What a site shows that does not show single cases: rows of metrics.csv, whose summary has the same means.

    Args:
        scores: the site's own rows of metrics.csv.
    """
    means = scores[scores["case"] == ""]  # already
    single = scores[scores["case"] != ""]
    if single.empty:
        return _records(means)
    together = site_scores(single).assign(region=WHOLE)
    parts = [together]
    if single["region"].nunique() > 1:
        final = single[single["checkpoint"].isin(CHECKPOINTS)]
        parts += [site_scores(of).assign(region=name) for name, of in final.groupby("region", sort=False)]
    shown = pd.concat(parts, ignore_index=True)
    shown = shown.merge(stated(single, ["checkpoint", "metric"]), on=["checkpoint", "metric"], how="left")
    counts = [row.merge(stated(single, ["checkpoint"])).assign(unit="") for part in parts for row in _counts(part)]
    shown = pd.concat([shown.rename(columns={"mean": "value"}), *counts], ignore_index=True).assign(case="")
    return _records(means) + _records(shown)


def _counts(table: pd.DataFrame) -> list[pd.DataFrame]:
    """Rows that tell over how many cases the means of a table are; most metrics share one number."""
    keys = [*KEYS, "region"]
    usual = table[table["metric"] != INVENTED].groupby(keys, sort=False)[CASES].max().reset_index()
    invented = table[table["metric"] == INVENTED].assign(metric=f"{CASES}/{INVENTED}")
    tested = table.groupby(keys, sort=False)[TESTED].max().reset_index()
    named = [(usual.assign(metric=CASES), CASES), (invented, CASES), (tested.assign(metric=TESTED), TESTED)]
    return [rows.assign(value=rows[column])[[*keys, "metric", "value"]] for rows, column in named if len(rows)]


def _records(scores: pd.DataFrame) -> list[dict[str, Any]]:
    table = scores[[*KEYS, "region", "case", "metric", "value", "unit", "grid"]]
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def final_scores(scores: pd.DataFrame) -> pd.DataFrame:
    """`site_scores` of the checkpoints last and best, per region and for the mean over regions (region "mean")."""
    final = scores[scores["checkpoint"].isin(CHECKPOINTS)]
    of_regions = (final["case"] == "") & (final["region"] != WHOLE)  # a site's mean over a region is no case
    parts = [site_scores(final[~of_regions]).assign(region=WHOLE)]
    regions = final[final["region"] != WHOLE]
    if regions["region"].nunique() > 1:
        parts += [site_scores(rows).assign(region=region) for region, rows in regions.groupby("region", sort=False)]
    keys = ["checkpoint", "site", "metric"]
    return pd.concat(parts, ignore_index=True).merge(stated(final, keys), on=keys, how="left")


def over_sites(values: pd.Series, metric: str = HEADLINE) -> dict[str, float]:
    """Mean over sites (each counts once) and the worst site; NaN if there is no site with a score."""
    known = values.dropna()
    if known.empty:
        return {"mean": float("nan"), "worst": float("nan")}
    if metric in METRICS and METRICS[metric].signed:
        worst = known.iloc[int(known.abs().argmax())]
    else:
        worst = known.max() if metric in LOWER_IS_BETTER else known.min()
    return {"mean": float(known.mean()), "worst": float(worst)}


@dataclass(frozen=True)
class Table:
    """Text in rows and columns.

    Attributes:
        header: One title per column.
        rows: Cells; an empty row is a rule.
        note: What stands below the table.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def text(self, stream: TextIO | None = None) -> str:
        """Aligned text, the first column to the left, the others to the right.

        Args:
            stream: where it will be printed; on a terminal that wants colour (NO_COLOR unset) it is coloured.
        """
        shown = [tuple(map(printable, row)) for row in (self.header, *self.rows)]
        colour = stream is not None and stream.isatty() and not os.environ.get("NO_COLOR")
        widths = [max(len(row[i]) for row in shown if row) for i in range(len(self.header))]
        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        lines = [_aligned(row, widths) if row else rule for row in (shown[0], (), *shown[1:])]
        if colour:
            lines = [f"{DIM}{line}{RESET}" if line == rule else line for line in lines]
            lines[0] = f"{BOLD}{lines[0]}{RESET}"
        return "\n".join([*lines, *([self.note] if self.note else [])]) + "\n"

    def markdown(self) -> str:
        """A Markdown table."""
        body = [row for row in self.rows if row]
        lines = [_piped(self.header), _piped(("---", *("---:" for _ in self.header[1:]))), *(_piped(r) for r in body)]
        return "\n".join([*lines, *(["", self.note] if self.note else [])]) + "\n"


@dataclass(frozen=True)
class Summary:
    """The result of a run.

    Attributes:
        table: Tidy numbers for summary.csv (see `final_scores`).
        sites: Seen sites x (view, checkpoint), headline metric, test cases; short enough for a terminal.
        all_sites: The same with every site.
        metrics: All metrics, mean over seen sites; None if only the headline metric was computed.
        regions: In how many test cases each region occurs, by site; None if in all of them.
        by_region: Sites x (view, checkpoint) for each region, headline metric; None if there is one region only.
        values: Numbers for dashboards: "<checkpoint>/<split>/<view>/<metric>" and ".../worst_site/<metric>".
        crossed: Every model at every site; None if that was not asked for.
        habits: How each site outlines, by the global model; None if that was not asked for.
        raters: How far raters agree; None where cases have one mask.
        groups: One for each column of `evaluation.groups`.
        privacy: What must be said of the run's promise; empty where nothing must.
    """

    table: pd.DataFrame
    sites: Table
    all_sites: Table
    metrics: Table | None
    regions: Table | None
    values: dict[str, float]
    by_region: Table | None = None
    crossed: Table | None = None
    habits: Table | None = None
    raters: Table | None = None
    groups: tuple[Table, ...] = ()
    privacy: str = ""

    def text(self, stream: TextIO) -> str:
        """What to print on `stream`."""
        tables = [self.sites, self.by_region, self.regions, self.metrics, self.raters, self.habits, self.crossed]
        tables += self.groups
        return "\n".join([*(table.text(stream) for table in tables if table is not None), *self._said])

    def markdown(self) -> str:
        """The text of summary.md."""
        parts = ["# Result\n", self.all_sites.markdown()]
        if self.by_region is not None:
            parts += ["## By region\n", self.by_region.markdown()]
        if self.regions is not None:
            parts += ["## In how many test cases each region occurs\n", self.regions.markdown()]
        if self.metrics is not None:
            parts += ["## All metrics, mean over the sites that took part\n", self.metrics.markdown()]
        if self.raters is not None:
            parts += ["## How far raters agree\n", self.raters.markdown()]
        if self.habits is not None:
            parts += ["## How sites outline\n", self.habits.markdown()]
        if self.crossed is not None:
            parts += ["## Every model at every site\n", self.crossed.markdown()]
        if self.groups:
            parts += ["## Groups of patients\n", *(table.markdown() for table in self.groups)]
        return "\n".join([*parts, *self._said])

    @property
    def _said(self) -> list[str]:
        return [f"{self.privacy}\n"] if self.privacy else []


def said_of_privacy(settings: Mapping[str, Any]) -> str:
    """What table and report say of noise that anybody who knows the run's seed can subtract."""
    mechanism = settings.get("privacy.mechanism", "none")
    if mechanism == "none" or settings.get("privacy.randomness") != "seeded":
        return ""
    return f"privacy.mechanism={mechanism}, noise seeded: reproducible, protects nobody"


def summarise(scores: pd.DataFrame) -> Summary:
    """Summarise the scores of a run's last and best checkpoint.

    Args:
        scores: metrics.csv of the run; rows of the checkpoints `last` and `best` are used.
    """
    table = final_scores(scores)
    means = table[table["region"] == "mean"]
    if len(means) and (means["view"] == ENCODER).all():
        return _pretraining_summary(table, means)
    shown = means[(means["split"] == "test") & (means["metric"] == HEADLINE)]
    return Summary(
        table=table,
        sites=_site_table(shown, limit=MANY_SITES),
        all_sites=_site_table(shown, limit=None),
        metrics=_metric_table(means[means["split"] == "test"]) if means["metric"].nunique() > 1 else None,
        regions=_region_table(table, [str(name) for name in scores["region"].unique() if name != WHOLE]),
        values=_flat_values(means),
        by_region=_table_by_region(table[(table["split"] == "test") & (table["metric"] == HEADLINE)]),
    )


def _pretraining_summary(table: pd.DataFrame, means: pd.DataFrame) -> Summary:
    """A run without labels has no Dice and chooses no round: its probes at the end, by site."""
    shown = means[(means["split"] == "test") & (means["checkpoint"] == "last")]
    values = _flat_values(means)
    return Summary(table, _probe_table(shown, MANY_SITES), _probe_table(shown, None), None, None, values)


def _probe_table(shown: pd.DataFrame, limit: int | None) -> Table:
    """Rows: sites, and the mean over those that trained. Columns: probes."""
    metrics = [str(metric) for metric in shown["metric"].unique()]
    rows = []
    for site in sorted(shown["site"].unique())[:limit]:
        own = shown[shown["site"] == site]
        name = str(site) if bool(own["seen"].all()) else f"{site} (unseen)"
        found = dict(zip(own["metric"], own["mean"], strict=True))
        rows.append((name, *(shown_number(float(found[m])) if m in found else "not measured" for m in metrics)))
    seen = shown[shown["seen"]]
    averages = (seen.loc[seen["metric"] == metric, "mean"].mean() for metric in metrics)
    rows += [(), ("mean over sites", *(shown_number(float(value)) for value in averages))]
    note = "The last round; no labels were used, hence there is no Dice and no best round.\n"
    note += "To go on from this encoder: python train.py pretrained=THIS_FOLDER ..."
    return Table(("probes, test cases", *metrics), tuple(rows), note)


def _site_table(shown: pd.DataFrame, limit: int | None) -> Table:
    """Rows: seen sites, mean and worst over them, unseen sites and their mean. Columns: view x checkpoint."""
    columns = _columns(shown)
    header = (_on_grid(f"test {HEADLINE}", shown), "cases", *(f"{view} {checkpoint}" for view, checkpoint in columns))
    if shown.empty:
        return Table(
            header,
            (),
            "No test scores: the run has not come to its end, no site has test cases, or evaluation.test=false.",
        )
    seen, unseen = shown[shown["seen"]], shown[~shown["seen"]]
    rows, left_out = _block(seen, columns, limit)
    rows += [(), *(_over(title, seen, columns, which) for title, which in OVER_SITES)]
    if len(unseen):
        below, more = _block(unseen, columns, limit)
        rows += [(), *((f"{name} (unseen)", *cells) for name, *cells in below)]
        rows += [_over("mean over unseen sites", unseen, columns, "mean")] if unseen["site"].nunique() > 1 else []
        left_out += more
    note = (
        _note(shown)
        + _without_own(seen)
        + (f"\nThe {limit} worst sites; {left_out} more are in summary.csv." if left_out else "")
    )
    return Table(header, tuple(rows), note)


def _on_grid(title: str, table: pd.DataFrame) -> str:
    """A title that says on which grid its numbers stand."""
    grid = grid_of(table)
    return f"{title}, {grid}" if grid else title


def _table_by_region(shown: pd.DataFrame) -> Table | None:
    """Rows: the sites and the mean over those that took part, region after region; of many sites the means only."""
    regions = [str(region) for region in shown["region"].unique() if region != WHOLE]
    if len(regions) < 2:
        return None
    columns = _columns(shown)
    rows: list[tuple[str, ...]] = []
    for region in regions:
        own = shown[shown["region"] == region]
        seen, unseen = own[own["seen"]], own[~own["seen"]]
        rows += [()] * bool(rows)
        if own["site"].nunique() <= FEW_SITES:
            rows += [(f"{region}: {name}", *cells) for name, *cells in _block(seen, columns, None)[0]]
            rows += [(f"{region}: {name} (unseen)", *cells) for name, *cells in _block(unseen, columns, None)[0]]
        rows += [_over(f"{region}: {title}", seen, columns, which) for title, which in OVER_SITES if len(seen)]
    header = (_on_grid(f"test {HEADLINE} by region", shown), "cases", *(" ".join(column) for column in columns))
    return Table(header, tuple(rows))


def _columns(shown: pd.DataFrame) -> list[tuple[str, str]]:
    """View and checkpoint of every column."""
    views = (*VIEWS, *(view for view in UNSEEN_ONLY if (shown["view"] == view).any()))
    return [(view, checkpoint) for view in views for checkpoint in CHECKPOINTS]


def _block(
    rows: pd.DataFrame, columns: Sequence[tuple[str, str]], limit: int | None
) -> tuple[list[tuple[str, ...]], int]:
    """One line per site (the `limit` worst of them, by their best view) and how many were left out."""
    sites = sorted(rows["site"].unique())
    left_out = 0 if limit is None else max(0, len(sites) - limit)
    if left_out:
        sites = list(rows.groupby("site")["mean"].max().sort_values().index[:limit])
    lines = []
    for site in sites:
        own = rows[rows["site"] == site]
        counted, tested = int(own[CASES].max()), int(own[TESTED].max())
        cases = str(tested) if counted == tested else f"{counted} of {tested}"
        lines.append((str(site), cases, *(_cell(own, rows, view, checkpoint) for view, checkpoint in columns)))
    return lines, left_out


def _cell(own: pd.DataFrame, block: pd.DataFrame, view: str, checkpoint: str) -> str:
    value = own.loc[(own["view"] == view) & (own["checkpoint"] == checkpoint), "mean"]
    if len(value):
        return shown_number(float(value.iloc[0]))
    return _absence(block, view)


def _over(title: str, block: pd.DataFrame, columns: Sequence[tuple[str, str]], which: str) -> tuple[str, ...]:
    cells = []
    for view, checkpoint in columns:
        values = block.loc[(block["view"] == view) & (block["checkpoint"] == checkpoint), "mean"]
        cells.append(shown_number(over_sites(values)[which]) if len(values) else _absence(block, view))
    return (title, "", *cells)


def _absence(block: pd.DataFrame, view: str) -> str:
    """Why a cell holds no number: nobody has such a model, or only this one was not scored."""
    return "not scored" if bool((block["view"] == view).any()) else f"no {view} model"


def _note(shown: pd.DataFrame) -> str:
    """Which rounds `last` and `best` are."""
    parts = []
    for checkpoint, reason in (("last", ""), ("best", " (chosen on validation)")):
        rounds = sorted({int(value) for value in shown.loc[shown["checkpoint"] == checkpoint, "round"]})
        if rounds:
            span = f"round {rounds[0]}" if len(rounds) == 1 else f"rounds {rounds[0]} to {rounds[-1]}, by view or site"
            parts.append(f"{checkpoint}: {span}{reason}")
    return "; ".join(parts)


def _without_own(seen: pd.DataFrame) -> str:
    """How many sites a mean of personal models is over, where some have none: those that never trained."""
    sites, own = seen["site"].nunique(), seen.loc[seen["view"] == "personal", "site"].nunique()
    return f"\nPersonal models are those of {own} of {sites} sites, and so are their means." if 0 < own < sites else ""


def _metric_table(test: pd.DataFrame) -> Table:
    """Rows: metrics. Columns: view x checkpoint. Cells: mean over seen sites."""
    columns = [(view, checkpoint) for view in VIEWS for checkpoint in CHECKPOINTS]
    seen = test[test["seen"]]
    rows = []
    for metric in seen["metric"].unique():
        own = seen[seen["metric"] == metric]
        told = titled(str(metric), unit := in_common(own["unit"]))
        title, _, *cells = _over(told, own, columns, "mean")
        rows.append((title, *(["no common unit"] * len(cells) if unit == MIXED else cells)))
    header = (_on_grid("test, mean over sites", seen), *(f"{view} {checkpoint}" for view, checkpoint in columns))
    return Table(header, tuple(rows), _note_on_missed([str(metric) for metric in seen["metric"].unique()]))


def _note_on_missed(metrics: Sequence[str]) -> str:
    """What distances hold where nothing tells how often a region was missed."""
    known = (metric for metric in metrics if metric in METRICS)  # of a pre-training run there are others
    distances = [metric for metric in known if METRICS[metric].is_length and not METRICS[metric].signed]
    if not distances or "missed" in metrics:
        return ""
    told = ", ".join(distances)
    return f"In {told} a missed region counts as the image's diagonal; metric missed tells how many are."


def _region_table(table: pd.DataFrame, regions: Sequence[str]) -> Table | None:
    """Rows: sites. Columns: regions. Cells: test cases that show the region, of all; None where all do."""
    rows = table[(table["split"] == "test") & (table["metric"] != INVENTED)]
    if (rows[CASES] == rows[TESTED]).all():
        return None
    alone = [name for name in regions if (rows["region"] == name).any()] or [WHOLE]
    counted = rows[rows["region"].isin(alone)].groupby(["site", "region"])[[CASES, TESTED]].max()
    lines = [
        (str(site), *(_of(counted, str(site), region) for region in alone)) for site in sorted(rows["site"].unique())
    ]
    titles = regions if len(alone) == 1 and regions else alone
    note = "Scores are over the cases that show a region; in the others only what is invented is counted (invented)."
    return Table(("test cases with", *titles), tuple(lines), note)


def _of(counted: pd.DataFrame, site: str, region: str) -> str:
    if (site, region) not in counted.index:
        return "not scored"
    cases, tested = (int(counted[column][site, region]) for column in (CASES, TESTED))
    return f"{cases} of {tested}"


def _flat_values(means: pd.DataFrame) -> dict[str, float]:
    """Numbers for dashboards; none of lengths that are in mm at some sites and in pixels at others."""
    values: dict[str, float] = {}
    for (checkpoint, split, view, metric), group in means[means["seen"]].groupby(
        ["checkpoint", "split", "view", "metric"], sort=False
    ):
        if in_common(group["unit"]) == MIXED:
            continue
        for which, value in over_sites(group["mean"], str(metric)).items():
            name = str(view) if which == "mean" else f"{view}/worst_site"
            values[f"{checkpoint}/{split}/{name}/{metric}"] = value
    return values


def shown_number(value: float) -> str:
    """A score as tables show it."""
    return "undefined" if np.isnan(value) else f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
    )
    return "  ".join([first, *others]).rstrip()


def _piped(cells: Sequence[str]) -> str:
    return piped([printable(cell).replace("<", "&lt;") for cell in cells])
