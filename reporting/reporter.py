"""The engine's observer: what happens in a run goes to its folder, to the terminal and to W&B."""

import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO

import pandas as pd

from fedseg.common.files import write_atomic
from fedseg.reporting.crossing import draw_matrix, matrix, matrix_table
from fedseg.reporting.curves import draw_curves, save_curves
from fedseg.reporting.folder import COLUMNS, DURING_TRAINING, GROUP_SCORES, METRICS, Row, RunFolder, file_name
from fedseg.reporting.groups import group_scores, group_tables
from fedseg.reporting.habits import habits, habits_table
from fedseg.reporting.letters import legible
from fedseg.reporting.loggers import RoundLoggers
from fedseg.reporting.overlays import Picture, draw_overlays, save_overlays
from fedseg.reporting.progress import Progress
from fedseg.reporting.raters import raters_table
from fedseg.reporting.summary import (
    CHECKPOINTS,
    HEADLINE,
    VIEWS,
    Summary,
    over_sites,
    said_of_privacy,
    site_scores,
    summarise,
)
from fedseg.reporting.wandb import WandbRun

LOSSES = ("loss", "loss_personal")
"""Columns of rounds.csv: of the model that is shared or alone, and of the second one where a step trains two."""


class RoundRecord(Protocol):
    """What the engine tells at the end of a round; rows have the columns of the tables in `RunFolder`."""

    @property
    def round(self) -> int:
        """Number of the round."""

    @property
    def scores(self) -> Sequence[Row]:
        """Rows for metrics.csv."""

    @property
    def rounds(self) -> Sequence[Row]:
        """Rows for rounds.csv."""

    @property
    def updates(self) -> Sequence[Row]:
        """Rows for updates.csv."""

    @property
    def traffic(self) -> Sequence[Row]:
        """Rows for communication.csv."""

    @property
    def events(self) -> Sequence[Row]:
        """Rows for events.csv."""

    @property
    def privacy(self) -> Sequence[Row]:
        """Rows for privacy.csv."""

    @property
    def audit(self) -> Sequence[Row]:
        """Rows for audit.csv, each with a ``listing`` of what left."""


class Reporter:
    """Writes tables, progress and W&B while a run goes on, and its summary and pictures at the end.

    Use it as a context manager: leaving it on an exception marks the W&B run as failed and tidies the terminal.

    Args:
        folder: The run's folder.
        wandb: The run at W&B (possibly disabled).
        progress: The bar.
        title: What the run is, for plots.
        loggers: Lightning's, beside W&B.
    """

    def __init__(
        self,
        folder: RunFolder,
        wandb: WandbRun,
        *,
        progress: Progress | None = None,
        title: str = "",
        loggers: RoundLoggers | None = None,
    ) -> None:
        self.folder = folder
        self.wandb = wandb
        self.progress = Progress() if progress is None else progress
        self.title = title
        self.loggers = RoundLoggers((), folder, {}) if loggers is None else loggers
        self._validation: dict[str, float] = {}  # of the round that is under way, for the progress line
        self._round: int | None = None
        self._rounds = 0
        self._values: dict[str, float] = {}  # of the round that is under way: one point per round at W&B
        self._trained: int | None = None  # rounds, once training is over

    def round_started(self, round: int, rounds: int, sites: Sequence[str]) -> None:
        """A round begins (see `Progress.round_started`)."""
        self._round, self._rounds, self._values = round, rounds, {}
        self._validation = {}
        self.progress.round_started(round, rounds, sites)

    def site_done(self, task: str, round: int, site: str, scalars: Mapping[str, float], seconds: float) -> None:
        """A site has answered.

        Args:
            task: "train", "evaluate", ...
            round: Number of the round.
            site: Name of the site.
            scalars: What it reports, e.g. "loss", or means over its cases as "<split>/<view>/<metric>", whose rows
                come through `scores`.
            seconds: How long it took.
        """
        self.progress.site_done(task, site, scalars)
        if self._trained is not None:  # the final scoring, as of the round after the last whichever model is scored
            return
        plain = {name: value for name, value in scalars.items() if "/" not in name}
        self._values |= {f"{site}/{task}/{name}": value for name, value in {**plain, "seconds": seconds}.items()}

    def scores(self, rows: Sequence[Row]) -> None:
        """New scores: appended to metrics.csv; those during training also go to W&B and to the progress line."""
        self.folder.append_scores(rows)
        during = [row for row in rows if row["checkpoint"] == DURING_TRAINING]
        for round, values in validation_values(during).items():
            if round == self._round:
                self._values |= values
            else:
                self._log_round(round, values)
            shown = ((f"val {view} {HEADLINE}", f"val/{view}/{HEADLINE}") for view in VIEWS)
            self._validation = {name: values[key] for name, key in shown if key in values}

    def round_done(self, record: RoundRecord) -> None:
        """A round has ended: its rows go to the tables, its means to W&B and the progress line."""
        if record.scores:
            self.scores(record.scores)
        self.folder.append_rounds(record.rounds)
        self.folder.append_updates(record.updates)
        self.folder.append_traffic(record.traffic)
        self.folder.append_events(record.events)
        self.folder.append_privacy(record.privacy)
        self.folder.append_audit(record.audit)
        spent = max((row["epsilon"] for row in record.privacy), default=None)
        if spent is not None:
            self._values["privacy/epsilon"] = spent
        trained = [row for row in record.rounds if row["task"] == "train"]
        losses = {name: _mean(row[name] for row in trained if row[name] is not None) for name in LOSSES}
        sizes: dict[str, float] = defaultdict(float)
        for row in record.traffic:
            sizes[f"bytes/{row['direction']}"] += row["bytes"]
        told = {f"train/{name}": loss for name, loss in losses.items() if name == LOSSES[0] or not math.isnan(loss)}
        values = {**self._values, **told, "events": len(record.events), **sizes}
        self._log_round(record.round, values, last=record.round == self._rounds)
        if record.round != self._round:
            return  # the introduction, before the first round
        self._round, self._values = None, {}
        names = {name: name.replace("_", " ") for name in LOSSES}
        shown = {names[name]: loss for name, loss in losses.items() if not math.isnan(loss)}
        shown |= {} if spent is None else {"epsilon": spent}
        events = [f"{row['event']}: {row['site']} {row['detail']}".rstrip() for row in record.events]
        self.progress.round_done(record.round, {**shown, **self._validation}, events)

    def _log_round(self, round: int, values: Mapping[str, float], *, last: bool = False) -> None:
        self.wandb.log_round(round, values, last=last)
        self.loggers.log_round(round, values)

    def training_done(self, rounds: int) -> None:
        """All rounds are done; what is told from now on belongs to the scoring of saved models."""
        self._trained, self._round = rounds, None

    def notice(self, events: Sequence[Row]) -> None:
        """What happened outside of a round: other versions at a site, a site that could not be scored at the end."""
        self.folder.append_events(events)
        for row in events:
            self.progress.say(f"{row['event']}: {' '.join(filter(None, (row['site'], row['detail'])))}")

    def overlays(self, pictures: Sequence[Picture], regions: Sequence[str]) -> None:
        """Draw cases of one site into overlays/<site>.png and add them to W&B.

        Args:
            pictures: Worst, median, best case (see `reporting.overlays.pick_cases`); nothing is drawn if empty.
            regions: Names of the regions.
        """
        if pictures:
            path = self.folder.overlays / f"{file_name(pictures[0].site)}.png"
            with drawing(path):
                save_overlays(draw_overlays(pictures, regions), path)
            self.wandb.log_pictures(pictures, regions)

    def finish(self, stream: TextIO | None = None) -> Summary:
        """Write summary and curves from the tables, print the summary and say where everything is.

        Args:
            stream: Where to print; standard output if None.
        """
        self.progress.close()
        scores = self.folder.scores()
        summary = write_report(self.folder, scores, title=self.title)
        self.folder.write_audit_summary()
        self.wandb.log_cases(scores[scores["checkpoint"].isin(CHECKPOINTS)])
        self.wandb.summarise({**summary.values, **sweep_values(summary)})
        self.loggers.log_round(self._trained or 0, summary.values)
        out = sys.stdout if stream is None else stream
        print(f"\n{summary.text(out)}\nThe run's folder: {self.folder.path}", file=out)
        return summary

    def close(self, exit_code: int = 0) -> None:
        """End the bar and the W&B run; another exit code than 0 marks the run as failed."""
        self.progress.close()
        self.loggers.finish(exit_code)
        self.wandb.finish(exit_code)

    def __enter__(self) -> "Reporter":
        if self.wandb.goes_on:
            self._catch_up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.progress.close()
            self.loggers.finish(1)
            self.wandb.leave()

    def _catch_up(self) -> None:
        """Send rounds that are in the tables and not at W&B: a kill takes what the client has not sent yet."""
        scores, rounds, traffic = self.folder.scores(), self.folder.rounds(), self.folder.traffic()
        during: Any = scores[scores["checkpoint"] == DURING_TRAINING].to_dict("records")
        values = validation_values(during)
        trained = rounds[rounds["task"] == "train"]
        for round in sorted({*trained["round"], *traffic["round"]}):
            own = trained[trained["round"] == round]
            names = [name for name in LOSSES if name == LOSSES[0] or own[name].notna().any()]
            told = {f"train/{name}": _mean(own[name].dropna()) for name in names} | values.get(round, {})
            for row in own.to_dict("records"):
                told |= {f"{row['site']}/train/{name}": row[name] for name in (*names, "steps", "seconds")}
            sizes = traffic[traffic["round"] == round].groupby("direction")["bytes"].sum()
            self.wandb.log_round(int(round), told | {f"bytes/{way}": size for way, size in sizes.items()})


def write_report(folder: RunFolder, scores: pd.DataFrame, *, title: str = "") -> Summary:
    """Write summary.csv, summary.md and plots/ of a run from its tables.

    Args:
        folder: The run's folder.
        scores: Its metrics.csv.
        title: What the run is, above the plots.
    """
    summary = replace(summarise(scores), privacy=said_of_privacy(folder.settings() if folder.holds_run else {}))
    crossed = folder.cross_sites()
    if len(crossed):
        summary = replace(summary, crossed=matrix_table(matrix(crossed)))
        with drawing(folder.plots):
            folder.plots.mkdir(parents=True, exist_ok=True)
            legible(draw_matrix(matrix(crossed))).savefig(folder.plots / "cross_sites.png", dpi=130)
    raters = raters_table(folder.raters(), scores)
    summary = replace(summary, habits=habits_table(habits(scores)), raters=raters)
    groups = folder.groups()
    if len(groups):
        least = int(folder.settings()["evaluation.group_minimum"])
        found = group_scores(scores, groups, folder.splits(), least)
        write_atomic(folder.path / GROUP_SCORES, found.to_csv(index=False, lineterminator="\n"))
        summary = replace(summary, groups=tuple(group_tables(found, scores, least)))
    folder.write_summary(summary.table, summary.markdown())
    with drawing(folder.plots):
        figure = draw_curves(scores, folder.rounds(), title=title)
        if figure is not None:
            save_curves(figure, folder.plots)
    return summary


@contextmanager
def drawing(path: Path) -> Iterator[None]:
    """A picture that cannot be drawn or written is told; what it shows stands in the tables all the same."""
    try:
        yield
    except Exception as error:  # whatever fonts, disks and plotting libraries come up with
        reason = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
        print(f"warning: {path} was not drawn ({reason}); the tables are complete", file=sys.stderr)


def validation_values(rows: Sequence[Row]) -> dict[int, dict[str, float]]:
    """Per round the numbers for dashboards, from scores on validation cases.

    Returns:
        Round to {"<site>/val/<view>/<metric>", "val/<view>/<metric>" (mean over seen sites) and
        "val/worst_site/<metric>" (of the personal models where there are any, else of the global one)}.
    """
    table = pd.DataFrame(rows, columns=list(COLUMNS[METRICS]))
    sites = site_scores(table[(table["split"] == "val") & table["seen"].astype(bool)])
    values: dict[int, dict[str, float]] = defaultdict(dict)
    for row in sites.to_dict("records"):
        values[int(row["round"])][f"{row['site']}/val/{row['view']}/{row['metric']}"] = float(row["mean"])
    for (round, metric), group in sites.groupby(["round", "metric"], sort=False):
        views = {str(view): over_sites(of_view["mean"], str(metric)) for view, of_view in group.groupby("view")}
        values[int(str(round))] |= {f"val/{view}/{metric}": means["mean"] for view, means in views.items()}
        answering = next((view for view in ("personal", "global") if view in views), None)
        if answering is not None:
            values[int(str(round))][f"val/worst_site/{metric}"] = views[answering]["worst"]
    return dict(values)


def sweep_values(summary: Summary) -> dict[str, float]:
    """The best checkpoint's validation scores under the names that charts have too, so that a sweep optimises them."""
    best = {k.removeprefix("best/"): value for k, value in summary.values.items() if k.startswith("best/val/")}
    worst = best.get(f"val/personal/worst_site/{HEADLINE}", best.get(f"val/global/worst_site/{HEADLINE}"))
    plain = {key: value for key, value in best.items() if "worst_site" not in key}
    return plain if worst is None else {**plain, f"val/worst_site/{HEADLINE}": worst}


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return sum(known) / len(known) if known else float("nan")
