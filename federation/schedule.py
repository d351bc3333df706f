"""How a federation runs: its settings, and which of them do not go together."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from fedseg.common.text import written
from fedseg.federation.combine import COUNTING, Combination, Rule
from fedseg.federation.contract import ServerHalf, Transform
from fedseg.federation.heterogeneity import Heterogeneity
from fedseg.federation.ranges import (
    FinitePositive,
    PositiveShare,
    ProperShare,
    ReadBy,
    Share,
    check_ranges,
    check_read,
    without_reader,
)
from fedseg.federation.roster import Roster
from fedseg.federation.selection import PowerOfChoice, Pruning, Select

LaterRound = Annotated[int, Field(ge=2)]


ASKING = ("fraction", "sampling", "selection", "dropout", "min_sites", "time_limit", "order")
"""Settings of who takes part in a round, when, and how long at most."""
READ_BY: ReadBy = {
    "local_epochs": ("local_steps", (None,)),
    "candidates": ("selection", ("loss",)),
    **dict.fromkeys(("fast_images", "fast_factor", "fast_every"), ("selection", ("fast",))),
    **dict.fromkeys(
        ("select_labels", "select_chance", "select_memory", "select_unbiased"), ("selection", ("heterogeneity",))
    ),
}
"""Settings that only some choices of another one read, and that are refused beside the others."""
OF_RULES: ReadBy = {"hostile": ("combine", COUNTING)}
"""Those that are said and not refused: rules are compared with each other and with the mean."""


@dataclass(frozen=True)
class Schedule:
    """How the federation runs.

    Attributes:
        rounds: communication rounds.
        local_steps: optimiser steps of a site in a round; null lets local_epochs decide.
        local_epochs: passes over a site's training images in a round, when local_steps is null.
        fraction: share of the sites that is asked in a round.
        sampling: fixed asks the same number of sites in every round; poisson asks every site with that probability,
            independently of the others, as accounts of privacy need.
        selection: uniform asks sites by chance alone; loss (power of choice) draws candidates by chance and asks those
            of them that told the highest training loss when they last took part, first those that never did; fast
            leaves out slow sites, by step_seconds and the steps that they told (Yin et al., BrainLes 2021);
            heterogeneity draws sites by chance, rather those whose labels are far from all sites' and whose training
            loss is high (FedACS, Gu et al., CISP-BMEI 2021).
        candidates: share of the sites that selection=loss draws; with that of fraction it is uniform.
        fast_images: share of all images that the sites which selection=fast keeps hold at least.
        fast_factor: how many times the median time such a site may need at most.
        fast_every: rounds between two in which selection=fast asks all sites.
        select_labels: part of the labels in the chances of selection=heterogeneity, against losses; above 0 a site
            tells before round 1 how its cases spread over the share of the image that each region covers.
        select_chance: share of these chances that is the same for all sites; with 1 it is uniform.
        select_memory: how much of its earlier strength a site keeps when it took part in selection=heterogeneity.
        select_unbiased: whether updates weigh inversely to the chances of selection=heterogeneity, so that a step of
            the server is on average the one along all sites' updates, though more by chance.
        dropout: probability that a site which was asked is absent.
        arrives: first round of sites that come later, as in {hospital_c: 5}; before it they are asked nothing, and have
            no part in what is agreed on. What a method lets sites tell before round 1 they tell then.
        leaves: first round without sites that leave, as in {hospital_b: 8}: they are asked nothing more, and what the
            server holds in their names is dropped. A site that arrives in a later round comes back in that one.
        min_sites: updates needed to go on; with fewer present the round is skipped, with fewer usable the run fails.
        work_spread: unequal local work: every site does a share of its steps drawn from [1 - spread, 1] each round.
        work_decay: local work over rounds: round r does this to the power of r - 1 of the first round's steps, and at
            least one (variable local training, Tuladhar et al., BrainLes 2021: 0.9).
        work_decay_rounds: so many rounds long; then the work stays.
        work_every: rounds of equal work before it falls once more; with work_decay_rounds the same it falls once.
        work_patience: validations without a better mean score after which local work is halved (and the count begins
            anew); those in which a site could not be scored are left out; null leaves the work.
        time_limit: mean lets a site of a round stop with the first local step that ends later than the mean of the
            round before, over the sites that trained (Ji et al., PervasiveHealth 2022); of the first round it is not.
        step_seconds: seconds of a site's local step, for time_limit and selection=fast, as in {hospital_b: 4}; sites
            that are not named need 1. They are declared: measured ones would make no run repeatable.
        order: together lets the sites of a round start from one model and averages their updates; cyclic lets one model
            travel from site to site, each going on where the one before it stopped (with one round: once through all
            sites, as in incremental institutional training); random draws whose turn it is, as often as sites take
            part in a round, so that some come twice and others not (algorithm=braintorrent). Both are refused for
            methods that weigh the updates of a round against each other.
        server_lr: step of the server along the mean update; running statistics always take the full mean.
        combine: how updates become one: mean, by weight. Against a few hostile sites: norm_bound brings updates to the
            median norm at most; median and trimmed_mean work coordinate by coordinate; krum takes the update nearest to
            its neighbours, multi_krum the mean of all but `hostile`; geometric_median is RFA. Median, trimmed_mean and
            Krum count sites, not images. Server memory grows with the sites.
        hostile: how many sites of a round may be hostile, for trimmed_mean and Krum.
        evaluate_every: rounds between two validations.
        checkpoint_every: rounds between two checkpoints; the best model is chosen among the saved rounds.
    """

    rounds: PositiveInt = 20
    local_steps: PositiveInt | None = 10
    local_epochs: PositiveFloat = 1.0
    fraction: PositiveShare = 1.0
    sampling: Literal["fixed", "poisson"] = "fixed"
    selection: Literal["uniform", "loss", "fast", "heterogeneity"] = "uniform"
    candidates: PositiveShare = 1.0
    fast_images: PositiveShare = 0.8
    fast_factor: Annotated[float, Field(ge=1, lt=math.inf)] = 2.0
    fast_every: PositiveInt = 5
    select_labels: Share = 0.5
    select_chance: PositiveShare = 0.1
    select_memory: ProperShare = 0.9
    select_unbiased: bool = False
    dropout: ProperShare = 0.0
    arrives: Mapping[str, LaterRound] | None = None
    leaves: Mapping[str, LaterRound] | None = None
    min_sites: PositiveInt = 1
    work_spread: ProperShare = 0.0
    work_decay: PositiveShare = 1.0
    work_decay_rounds: PositiveInt = 10
    work_every: PositiveInt = 1
    work_patience: PositiveInt | None = None
    time_limit: Literal["none", "mean"] = "none"
    step_seconds: Mapping[str, FinitePositive] | None = None
    order: Literal["together", "cyclic", "random"] = "together"
    server_lr: FinitePositive = 1.0
    combine: Rule = "mean"
    hostile: PositiveInt = 1
    evaluate_every: PositiveInt = 1
    checkpoint_every: PositiveInt = 1

    def __post_init__(self) -> None:
        check_ranges(Schedule, vars(self), "federation")
        if self.selection != "uniform" and self.sampling != "fixed":
            raise ValueError(
                f"federation.sampling={self.sampling} asks every site by chance alone, federation.selection="
                f"{self.selection} does not; take federation.sampling=fixed"
            )
        check_read(self, "federation", READ_BY)
        self._check_fast()
        self._check_unbiased()
        self._check_time()
        self._check_work()
        self._check_roster()

    def select(self, sites: Sequence[str]) -> Select:
        """Which of these sites a round asks, where that is not left to chance alone."""
        if self.selection == "loss":
            return PowerOfChoice(sites, self.asked(len(sites)), self.drawn(len(sites)))
        if self.selection == "heterogeneity":
            asked = self.chosen(len(sites))
            return Heterogeneity(sites, asked, self.select_labels, self.select_chance, self.select_memory)
        return Pruning(sites, self.step_seconds or {}, self.fast_images, self.fast_factor, self.fast_every)

    def roster(self, sites: Sequence[str]) -> Roster:
        """Who of these sites takes part in which round."""
        return Roster(sites, self.arrives or {}, self.leaves or {})

    def _check_roster(self) -> None:
        """Refuse arrivals and departures that never happen, and settings that compare rounds of different sites.

        Raises:
            ValueError: naming the setting and the cure.
        """
        for name in ("arrives", "leaves"):
            for site, round in (getattr(self, name) or {}).items():
                if round > self.rounds:
                    raise ValueError(
                        f"federation.{name}={{{site}: {round}}}, and there are federation.rounds={self.rounds}; take "
                        "more of these, or an earlier round"
                    )
        for site in (self.arrives or {}).keys() & (self.leaves or {}).keys():
            if (self.arrives or {})[site] == (self.leaves or {})[site]:
                raise ValueError(f"federation.arrives and federation.leaves name one round for {site!r}; take two")
        if not (self.arrives or self.leaves):
            return
        for told, reason, cure in (
            ("selection=heterogeneity", "compares the labels that all sites told before round 1", "selection=uniform"),
            ("work_patience", "compares mean scores of rounds, whose sites would be others", "work_patience=null"),
        ):
            name, _, value = told.partition("=")
            if (found := getattr(self, name)) == value or (not value and found is not None):
                raise ValueError(
                    f"federation.{name}={found} {reason} (federation.arrives, federation.leaves); take "
                    f"federation.{cure}"
                )

    def _check_unbiased(self) -> None:
        """Refuse weights by chances where weights play no part.

        Raises:
            ValueError: naming the setting and the cure.
        """
        for name in ("order", "combine"):
            if self.select_unbiased and (value := getattr(self, name)) != (usual := getattr(Schedule, name)):
                raise ValueError(
                    f"federation.select_unbiased=true weighs updates of a mean, which federation.{name}={value} does "
                    f"not take; take federation.{name}={usual}"
                )

    def _check_fast(self) -> None:
        """Refuse selection=fast where there is nothing to go by.

        Raises:
            ValueError: naming the setting and the cure.
        """
        if self.selection != "fast":
            return
        if self.step_seconds is None:
            raise ValueError("federation.selection=fast goes by federation.step_seconds; take {SITE: 4} or so")
        if self.fraction != 1.0:
            raise ValueError(
                f"federation.selection=fast chooses among all sites, federation.fraction={self.fraction} asks some by "
                "chance; take federation.fraction=1"
            )

    def _check_time(self) -> None:
        """Refuse settings of time that have no effect, or none that could be meant.

        Raises:
            ValueError: naming the setting and the cure.
        """
        if self.time_limit == "none":
            if self.step_seconds is not None and self.selection != "fast":
                raise ValueError(
                    "federation.step_seconds is for federation.time_limit=mean and federation.selection=fast; take one "
                    "of them, or leave it out"
                )
            return
        if self.local_steps is None:
            raise ValueError("federation.time_limit=mean counts local steps; take federation.local_steps=10 or so")
        if self.order != "together":
            raise ValueError(
                f"federation.time_limit=mean spares sites of a round waiting for each other, and with federation.order="
                f"{self.order} nobody waits; take federation.order=together"
            )

    def work_in(self, round: int) -> float:
        """Share of the first round's local work that sites do in a round."""
        falls = min(round - 1, self.work_decay_rounds) // self.work_every
        return float(self.work_decay**falls)

    def _check_work(self) -> None:
        """Refuse a pace at which the work would never fall.

        Raises:
            ValueError: naming the setting and the cure.
        """
        if self.work_patience is not None:
            first = (self.work_patience + 1) * self.evaluate_every  # the one before it all sets the score to beat
            if first >= self.rounds:
                raise ValueError(
                    f"federation.work_patience={self.work_patience} with federation.evaluate_every="
                    f"{self.evaluate_every} halves local work after round {first} at the earliest, and there are "
                    f"federation.rounds={self.rounds}; take federation.rounds={first + 1} or more, or smaller ones of "
                    "the other two"
                )
        for name in ("work_every", "work_decay_rounds"):
            if self.work_decay == 1.0 and (value := getattr(self, name)) != (usual := getattr(Schedule, name)):
                raise ValueError(
                    f"federation.{name}={value} says when local work falls, and with federation.work_decay=1 it never "
                    f"does; take federation.work_decay=0.5 or so, or federation.{name}={usual}"
                )
        if self.work_every > self.work_decay_rounds:
            raise ValueError(
                f"federation.work_every={self.work_every}: the work stays after {self.work_decay_rounds} rounds and "
                f"would never fall; take federation.work_decay_rounds={self.work_every}"
            )

    def turns(self, present: Sequence[str], rng: random.Random) -> list[list[str]]:
        """Sites that train from one model, one group after the other."""
        if self.order == "together":
            return [list(present)]
        drawn = rng.choices(present, k=len(present)) if self.order == "random" else present
        return [[site] for site in drawn]

    def asked(self, sites: int) -> int:
        """How many of so many sites are asked in a round.

        Raises:
            ValueError: fewer than `min_sites`, so that no round could ever take place.
        """
        asked = max(1, round_half_up(self.fraction * sites))
        if asked < self.min_sites:
            raise ValueError(
                f"federation.min_sites={self.min_sites}, but a round asks {asked} of {sites} sites "
                f"(federation.fraction={self.fraction}); no round could take place"
            )
        return asked

    def chosen(self, sites: int) -> int:
        """How many of so many sites are asked in a round, where it matters which.

        Raises:
            ValueError: there is nothing to choose.
        """
        if (asked := self.asked(sites)) == sites:
            raise ValueError(
                f"federation.selection={self.selection} has no choice where a round asks all {sites} sites "
                f"(federation.fraction={self.fraction}); take a smaller fraction, or federation.selection=uniform"
            )
        return asked

    def drawn(self, sites: int) -> int:
        """How many of so many sites are candidates of a round whose sites are chosen by loss.

        Raises:
            ValueError: there is nothing to choose.
        """
        asked, drawn = self.chosen(sites), round_half_up(self.candidates * sites)
        if drawn < asked:
            raise ValueError(
                f"federation.candidates={self.candidates} draws {drawn} of {sites} sites, and a round asks {asked}; "
                f"take federation.candidates={self.fraction} or more"
            )
        return drawn


def sums_only(transforms: Sequence[Transform]) -> str:
    """The transform that leaves no single update to look at, or whose account is that of a mean; empty if none."""
    closed = (t.name for t in transforms if t.hides_updates or t.guarantee is not None or t.accumulator())
    return next(closed, "")


def check_selection(selection: str, transforms: Sequence[Transform]) -> None:
    """Refuse to choose sites by what must not be looked at.

    Args:
        selection: of the schedule; uniform where another one is given in Python.
        transforms: of what travels.

    Raises:
        ValueError: naming what hides single sites.
    """
    if why := sums_only(transforms):
        told, cure = f"federation.selection={selection}", "take federation.selection=uniform"
        if selection == "uniform":
            told, cure = "a selection of your own (Federation.select)", "leave it out, so that chance alone decides"
        raise ValueError(f"{told} asks sites by what single ones told, which {why} does not allow; {cure}")


def check_cohort(schedule: Schedule, transforms: Sequence[Transform], sites: int) -> None:
    """Whether a round can have as many sites as the schedule and the transforms need.

    Raises:
        ValueError: naming who needs more.
    """
    asked = schedule.asked(sites)
    if schedule.selection == "loss":
        schedule.drawn(sites)
    if schedule.selection == "heterogeneity":
        schedule.chosen(sites)
    if schedule.selection != "uniform":
        check_selection(schedule.selection, transforms)
    if schedule.combine != "mean" and (why := sums_only(transforms)):
        raise ValueError(
            f"federation.combine={schedule.combine} compares single updates, which {why} does not allow; take "
            "federation.combine=mean"
        )
    combination = Combination(schedule.combine, schedule.hostile)
    if asked < combination.least:
        raise ValueError(
            f"federation.combine={schedule.combine} with federation.hostile={schedule.hostile} needs "
            f"{combination.least} sites in a round, {asked} take part (federation.fraction={schedule.fraction} of "
            f"{sites})"
        )
    for transform in transforms:
        if asked < transform.least:
            raise ValueError(
                f"{transform.name} needs {transform.least} sites in a round, {asked} take part "
                f"(federation.fraction={schedule.fraction} of {sites})"
            )


def check_rounds(schedule: Schedule, transforms: Sequence[Transform], roster: Roster) -> None:
    """Whether every round can have as many sites as the schedule and the transforms need, whoever comes or leaves.

    Raises:
        ValueError: naming who needs more, and in which round.
    """
    round = 1
    try:
        for round in (1, *roster.changes):
            check_cohort(schedule, transforms, len(roster.members(round)))
    except ValueError as error:
        if not roster.changes:
            raise
        raise ValueError(f"from round {round} on (federation.arrives, federation.leaves): {error}") from error


def check_roster(
    schedule: Schedule,
    transforms: Sequence[Transform],
    channels: Mapping[str, int],
    asked: int | str,
    fewest: int = 1,
) -> None:
    """Whether the sites of a run can come and leave as the schedule says.

    Args:
        schedule: how the federation runs.
        transforms: of what travels.
        channels: of the images of every site that trains, by its name.
        asked: data.channels.
        fewest: sites that the method needs in every round.

    Raises:
        ValueError: naming the setting and the cure.
    """
    roster = schedule.roster(list(channels))
    roster.check()
    check_rounds(schedule, transforms, roster)
    for round in (1, *roster.changes):
        if (count := len(roster.members(round))) < fewest:
            raise ValueError(
                f"in round {round} there would be {count} of {len(roster.sites)} sites, and the method needs {fewest}, "
                "as each learns from what others tell; let more take part, or take another method"
            )
    widest = max(channels[site] for site in roster.members(1))
    for site, found in channels.items():
        if asked == "auto" and found > widest:
            raise ValueError(
                f"site {site!r} arrives later (federation.arrives) with images of {found} channels, and those before "
                f"it have {widest}: data.channels=auto would let it decide how they are seen; take "
                f"data.channels={widest} or {found}"
            )


def check_times(schedule: Schedule, sites: Iterable[str]) -> None:
    """Whether seconds are declared for sites that there are, held out or not.

    Raises:
        ValueError: naming one that there is not.
    """
    if odd := sorted(set(schedule.step_seconds or {}) - set(sites)):
        raise ValueError(f"federation.step_seconds names {odd[0]!r}; there are {', '.join(sorted(sites))}")


def check_turns(schedule: Schedule, of_a_mean: Sequence[str]) -> None:
    """Refuse what speaks of the mean of a round: there is one update at a time.

    Raises:
        ValueError: naming the setting.
    """
    if of_a_mean:
        raise ValueError(
            f"federation.order={schedule.order} shows every site's model to the next; {of_a_mean[0]} protects means"
        )
    if schedule.combine != "mean":
        raise ValueError(
            f"federation.order={schedule.order} combines nothing, so that federation.combine={schedule.combine} has no "
            "meaning; take federation.combine=mean"
        )


def check_order(schedule: Schedule, algorithm: ServerHalf) -> None:
    """Refuse one update at a time for a method that weighs the updates of a round against each other.

    Raises:
        ValueError: naming the setting and the cure.
    """
    if schedule.order != "together" and algorithm.reads_updates:
        raise ValueError(
            f"federation.order={schedule.order} takes in one update at a time, and the method weighs those of a round "
            "against each other (reads_updates): each would have all the weight; take federation.order=together, or "
            "another method"
        )


def check_method(schedule: Schedule, algorithm: ServerHalf) -> None:
    """Refuse settings that have no effect on a method.

    Raises:
        ValueError: naming the setting and the cure.
    """
    if algorithm.answers_singly:
        check_answers(schedule, algorithm.among_peers)
    if algorithm.exchanges_answers:
        check_consensus(schedule)
    check_weights(schedule, algorithm)
    check_order(schedule, algorithm)
    check_newcomers(schedule, algorithm)
    if schedule.work_patience is not None and not algorithm.views:
        raise ValueError(
            f"federation.work_patience={schedule.work_patience} goes by validation scores, and the method has no model "
            "that is scored; take federation.work_patience=null"
        )


def check_consensus(schedule: Schedule) -> None:
    """Refuse settings of models and their differences, for a method whose sites send answers about public images.

    Raises:
        ValueError: naming the setting and the cure.
    """
    usual = Schedule()
    reasons = {
        "order": "a consensus is of sites that answered together",
        "server_lr": "no model is moved",
        "select_unbiased": "no model is moved",
    }
    for name, why in reasons.items():
        if (value := getattr(schedule, name)) != (default := getattr(usual, name)):
            raise ValueError(
                f"federation.{name}={written(value)} has no meaning where sites send answers (exchanges_answers): "
                f"{why}; take federation.{name}={written(default)}"
            )
    if schedule.combine == "norm_bound":
        raise ValueError(
            "federation.combine=norm_bound shortens differences of models, and sites send answers, which are "
            "probabilities (exchanges_answers); take federation.combine=median"
        )


def check_newcomers(schedule: Schedule, algorithm: ServerHalf) -> None:
    """Refuse sites that arrive or leave where there are no sites, and newcomers that a method has no place for.

    Raises:
        ValueError: naming the setting and the cure.
    """
    for name in ("arrives", "leaves"):
        if getattr(schedule, name) and algorithm.trains_on == "pool":
            raise ValueError(
                f"federation.{name} is for sites, and the method trains in one place that holds all data; leave it out"
            )
    if schedule.arrives and (why := algorithm.founders_only):
        raise ValueError(
            f"federation.arrives: no site can join this method after round 1: {why}; take another method, or let all "
            "sites take part from the start"
        )


def without_effect(schedule: Schedule, algorithm: ServerHalf) -> list[str]:
    """Settings that somebody chose and a method, or a rule of combination, does not read: it runs beside those that do.

    Pooled training asks nobody, and training alone averages nothing; both are yardsticks of comparisons that set the
    same for all methods, as the mean is one of rules, so that this is said and not refused.
    """
    names: tuple[str, ...]
    if algorithm.trains_on == "pool":
        names, on = (*ASKING, "combine", "hostile"), "training in one place"
    elif not (algorithm.shares or algorithm.answers_singly or algorithm.exchanges_answers):
        names, on = ("combine", "hostile", "server_lr"), "a method that averages nothing"
        if schedule.order == "cyclic":  # random asks some sites twice
            names = (*names, "order")
    else:
        return without_reader(schedule, "federation", OF_RULES)
    usual = Schedule()
    values = {name: getattr(schedule, name) for name in names if getattr(schedule, name) != getattr(usual, name)}
    return [f"federation.{name}={value} on {on}" for name, value in values.items()]


def check_weights(schedule: Schedule, algorithm: ServerHalf) -> None:
    """Refuse weights by chances where nothing is averaged, and beside a method's own ways of weighing.

    Raises:
        ValueError: naming the setting and the cure.
    """
    if not schedule.select_unbiased:
        return
    if not algorithm.shares:
        raise ValueError(
            "federation.select_unbiased=true weighs updates of a mean, and the method averages nothing; take "
            "federation.select_unbiased=false"
        )
    if algorithm.reads_updates or algorithm.answers_singly:
        raise ValueError(
            "federation.select_unbiased=true weighs updates by the chances of their sites, and the method by what it "
            "finds in them, or takes no mean; take federation.select_unbiased=false"
        )
    if algorithm.steady_weights:
        raise ValueError(
            "federation.select_unbiased=true weighs updates anew in every round, and the method adds them up over "
            "rounds, in which a site has to weigh the same (steady_weights); take federation.select_unbiased=false"
        )


def check_answers(schedule: Schedule, among_peers: bool) -> None:
    """Refuse settings of the mean, for a method that answers every site with a model of its own.

    Args:
        schedule: how the federation runs.
        among_peers: whether sites merge each other's models, in whatever order.

    Raises:
        ValueError: naming the setting and the cure.
    """
    usual = Schedule()
    for name in ("combine", "server_lr", *(() if among_peers else ("order",))):
        if getattr(schedule, name) != getattr(usual, name):
            raise ValueError(
                f"federation.{name}={getattr(schedule, name)} has no effect on a method that answers every site with a "
                f"model of its own (answers_singly); take federation.{name}={getattr(usual, name)}"
            )


def round_half_up(value: float) -> int:
    """Nearest integer; halves go up, unlike Python's `round`."""
    return int(value + 0.5)
