"""The round loop. It knows no method, no network and no data set: it asks for the hooks in `federation.contract`."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from math import nan
from typing import Any

import torch

from fedseg.common.ending import ending
from fedseg.common.seeds import derive_seed
from fedseg.federation.admission import Admission, Limits, unbounded
from fedseg.federation.checkpoint import Checkpoint
from fedseg.federation.combine import Combination, RobustMean
from fedseg.federation.contract import (
    LOSS,
    PERSONAL_LOSS,
    Accumulator,
    Cohort,
    EvaluateTask,
    Guarantee,
    Observer,
    QueryTask,
    RoundRecord,
    Row,
    ServerHalf,
    Session,
    Split,
    T,
    Task,
    TrainTask,
    Transform,
    Transport,
    event,
)
from fedseg.federation.heterogeneity import corrections
from fedseg.federation.ledger import Ledger
from fedseg.federation.pace import counted, left, mean_limit, validated
from fedseg.federation.roster import Roster
from fedseg.federation.schedule import (
    Schedule,
    check_method,
    check_rounds,
    check_selection,
    check_turns,
    sums_only,
)
from fedseg.federation.selection import History, Past, Remembering, Select, checked, history_of, remembering
from fedseg.federation.sketch import SketchedMean
from fedseg.federation.state import Mean, State, Update, told_non_finite
from fedseg.federation.transforms import EPSILON, PREFIX, SPENT, forgotten, joined, remembered, with_memories

POOL = "pooled"
ONCE = Limits(filed_bytes=2**31)
"""What a site may send once in a run: wide spectra of all its images, a whole model."""


class RoundError(RuntimeError):
    """Too few sites are left to go on."""


@dataclass
class Federation:
    """One run: an algorithm's server half, a way to the sites, and a schedule.

    Attributes:
        algorithm: the server half.
        transport: the way to the sites.
        sites: the seen sites, in the order in which they are averaged; those that come later or leave among them.
        schedule: how the federation runs.
        seed: the run's seed.
        checkpoint: where the run is saved.
        observer: told what happens.
        transforms: applied to the mean in reverse order; their client side lives in the transport.
        ledger: notes every exchange, if there is one.
        select: which sites a round asks, and how much each does; None leaves it to the schedule.
        choose_by: the validation score by which models are chosen; more is better.
    """

    algorithm: ServerHalf
    transport: Transport
    sites: Sequence[str]
    schedule: Schedule
    seed: int
    checkpoint: Checkpoint
    observer: Observer
    transforms: Sequence[Transform] = ()
    ledger: Ledger | None = None
    select: Select | None = None
    choose_by: str = "dice"
    _record: RoundRecord = field(init=False, default_factory=lambda: RoundRecord(0, 0.0))

    def __post_init__(self) -> None:
        self._roster.check()
        check_rounds(self.schedule, self.transforms, self._roster)
        if len(set(self._names)) < len(self._names):
            raise ValueError(f"two transforms of one name remember in one place: {', '.join(self._names)}")
        for transform in self.transforms:
            transform.check(self.algorithm)
        if self.schedule.order != "together":
            check_turns(self.schedule, [t.name for t in self.transforms if t.least > 1 or t.guarantee is not None])
        check_method(self.schedule, self.algorithm)
        self._prepare_selection()

    def over(self, transport: Transport) -> Federation:
        """The same federation by another way to its sites, to look at its models."""
        other = copy(self)
        other.transport = transport
        return other

    def _prepare_selection(self) -> None:
        """Take the schedule's selection, if it has one.

        Raises:
            ValueError: there are two.
        """
        if self.schedule.selection != "uniform" and not self._pools:
            if self.select is not None:
                told = f"federation.selection={self.schedule.selection}"
                raise ValueError(f"{told} and one of your own; take federation.selection=uniform")
            self.select = self.schedule.select(self.sites)
        self._check_selection()

    def _check_selection(self) -> None:
        if self.select is not None:
            check_selection(self.schedule.selection, self.transforms)

    @property
    def _names(self) -> list[str]:
        """Of the transforms."""
        return [transform.name for transform in self.transforms]

    @property
    def _roster(self) -> Roster:
        return self.schedule.roster(self.sites)

    def members(self, round: int) -> Sequence[str]:
        """The sites that are there in a round, whether it asks them or not; before round 1 those of round 1."""
        return self._roster.members(max(round, 1))

    def _asked_of(self, round: int) -> Sequence[str]:
        """Who can be asked to train in a round."""
        return (POOL,) if self._pools else self.members(round)

    @property
    def _pools(self) -> bool:
        return self.algorithm.trains_on == "pool"

    @property
    def _needed(self) -> int:
        """Usable updates that a round needs; the pool is one, whatever is asked of sites."""
        least = [self._combination.least, *(transform.least for transform in self.transforms)]
        return 1 if self._pools else max(self.schedule.min_sites, *least)

    @property
    def _combination(self) -> Combination:
        return Combination(self.schedule.combine, self.schedule.hostile)

    def run(self) -> State:
        """Train until all rounds are done, going on from the checkpoint if there is one.

        Raises:
            RoundError: too few sites sent a usable update.
        """
        self._check_selection()
        snapshot = self.checkpoint.load()
        if snapshot is None:
            round, server = 0, self._first(self._introduce())
        else:
            round, server = snapshot.round, self.algorithm.restored(snapshot.server)
            self.transport.restore(snapshot.kept)
        while round < self.schedule.rounds and not self._spent(round, server):
            ending.heed()
            round += 1
            server = self._round(round, server)
        self._record = RoundRecord(round + 1, 0.0)
        return server

    @property
    def late_events(self) -> list[Row]:
        """What happened after the last round, while models were scored; as of the round after it."""
        return [{**row, "round": self._record.round} for row in self._record.events]

    def take_late_audit(self) -> list[Row]:
        """What left sites after the last round, since the last call; as of the round after it."""
        rows = list(self._record.audit)
        self._record.audit.clear()
        return rows

    def ask(self, tasks: Mapping[str, Task], messages: Mapping[str, State]) -> Iterator[Update]:
        """Ask sites; whatever leaves one is noted, used or not."""
        answers = self.transport.ask(tasks, messages)
        for update in answers if self.ledger is None else self.ledger.noted(tasks, messages, answers):
            task = tasks[update.site]
            self._record.audit.extend(_left(self._record.round, task.kind, update, self._passed(task)))
            yield update

    def _passed(self, task: Task) -> str:
        """The transforms that an answer to a task has passed."""
        if isinstance(task, TrainTask):
            return "+".join(self._names)
        return task.topic if task.kind == "consult" else ""

    def sample(self, round: int, history: History | None = None) -> tuple[list[str], list[str]]:
        """Sites that take part in a round, and those that were asked but are absent."""
        work, absent = self._selected(round, history or {})
        return list(work), absent

    def _selected(self, round: int, history: History) -> tuple[dict[str, float], list[str]]:
        """Sites that take part in a round, with the share of its steps that each is to do; those that are absent."""
        if self._pools:
            return {POOL: 1.0}, []
        rng, there = random.Random(derive_seed(self.seed, "sample", round)), self.members(round)
        if (select := self._select_in(round)) is not None:
            asked = checked(select(round, history, rng), there)
        elif self.schedule.sampling == "poisson":
            lots = random.SystemRandom() if any(transform.secret_rounds for transform in self.transforms) else rng
            asked = {site: 1.0 for site in there if lots.random() < self.schedule.fraction}
        else:
            asked = dict.fromkeys(rng.sample(list(there), self.schedule.asked(len(there))), 1.0)
        absent = {site for site in there if rng.random() < self.schedule.dropout} & asked.keys()
        present = {site: asked[site] for site in there if site in asked and site not in absent}
        return present, [site for site in there if site in absent]

    def _select_in(self, round: int) -> Select | None:
        """The selection of a round; that of the schedule knows the sites that are there."""
        if self.schedule.selection == "uniform" or not self._roster.changes:
            return self.select
        return self.schedule.select(self.members(round))

    def evaluate(
        self,
        server: State,
        round: int,
        sites: Sequence[str],
        splits: tuple[Split, ...],
        published: State | None = None,
        **options: Any,
    ) -> dict[str, Update]:
        """Scores of the algorithm's views at some sites, as means and as rows: site -> what it told.

        Args:
            server: the server's state.
            round: rounds done.
            sites: which sites.
            splits: which of their cases.
            published: what `publish` returned, for sites that never took part: they adapt it before they are scored.
            options: go into the task.
        """
        task = EvaluateTask(round, self.seed, splits, adapt=published is not None, **options)
        messages = {site: self.algorithm.broadcast(server, site, task) for site in sites}
        if published is not None:
            messages = {site: State({**m.tensors, **published.tensors}, m.scalars) for site, m in messages.items()}
        scores: dict[str, Update] = {}
        for update in self.ask(dict.fromkeys(sites, task), messages):
            if refusal := update.refusal or Admission(State()).refusal(update):
                self._record.events.append(event(round, update.site, "refused", refusal))
                continue
            if "fit_seconds" in update.scalars:
                row: Row = {"round": round, "site": update.site, "task": "personalise", "examples": update.examples}
                row |= {LOSS: None, PERSONAL_LOSS: None, "steps": update.scalars.get("steps")}
                row |= {"seconds": update.scalars["fit_seconds"]}
                self._record.rounds.append(row)
            scores[update.site] = update
            self.observer.site_done("evaluate", round, update.site, update.scalars, update.scalars.get("seconds", 0.0))
        return scores

    def publish(self, round: int) -> State:
        """What seen sites give, after training, to sites that never took part: groups ``group/site``.

        Raises:
            RoundError: no site has anything to give, since none has trained.
        """
        task, there = QueryTask("publish", round, self.seed), self.members(round)
        answers = self.ask(dict.fromkeys(there, task), dict.fromkeys(there, State()))
        published = State()
        for update in answers:
            if refusal := update.refusal or unbounded(update, ONCE):
                self._record.events.append(event(round, update.site, "refused", refusal))
            else:
                published.tensors |= {f"{group}/{update.site}": ts for group, ts in update.tensors.items()}
        if not published.tensors:
            raise RoundError("no site has a personal model to publish: none of them has trained yet")
        return published

    def record_publication(self, server: State, round: int, published: State, receivers: Sequence[str]) -> None:
        """Tell the observer, after the last round, what travels when it is published to these sites."""
        record = RoundRecord(round + 1, 0.0)
        for group, size in published.sizes().items():
            place = {"round": round + 1, "site": group.partition("/")[2]}
            record.traffic.append({**place, "direction": "up", "group": group, "bytes": size})
        for site in receivers:
            message = self.algorithm.broadcast(server, site, EvaluateTask(round, self.seed, adapt=True))
            record.traffic.extend(_traffic(round + 1, site, "down", State({**message.tensors, **published.tensors})))
        self.observer.round_done(record)

    def _first(self, introductions: Mapping[str, Update]) -> State:
        """The server's state before round 1.

        Raises:
            RoundError: what a site told for the selection cannot be used.
        """
        if not isinstance(self.select, Remembering):
            return self.algorithm.init_server(introductions)
        try:
            history = self.select.introduced(introductions)
        except ValueError as error:
            raise RoundError(f"federation.selection={self.schedule.selection}: {error}") from error
        topic = self.select.topic
        own = {
            site: State({group: ts for group, ts in told.tensors.items() if group != topic}, told.scalars)
            for site, told in introductions.items()
        }
        return remembering(self.algorithm.init_server(own), history)

    def _introduce(self) -> dict[str, Update]:
        topic = self.select.topic if isinstance(self.select, Remembering) else ""
        self._record = RoundRecord(0, 0.0)
        introductions = self._introduced(self._asked_of(1), 0, topic)
        self.observer.round_done(self._record)
        return introductions

    def _introduced(self, sites: Sequence[str], round: int, topic: str = "") -> dict[str, Update]:
        """What sites tell before their first round; of what is at hand they are asked after so many rounds.

        Raises:
            RoundError: one of them cannot tell it.
        """
        task = QueryTask("introduce", round, self.seed, topic=topic)
        introductions: dict[str, Update] = {}
        for update in self.ask(dict.fromkeys(sites, task), dict.fromkeys(sites, State())):
            if refusal := update.refusal or unbounded(update, ONCE):
                raise RoundError(f"site {update.site!r} cannot introduce itself: {refusal}")
            self._record.traffic.extend(_traffic(self._record.round, update.site, "up", update))
            introductions[update.site] = update
        return introductions

    def _regrouped(self, round: int, server: State) -> State:
        """The server's state once those who come with this round have introduced themselves, and others have left.

        Raises:
            RoundError: a newcomer does not introduce itself, or the method cannot go on with these sites.
        """
        arriving, leaving = self._roster.arriving(round), self._roster.leaving(round)
        if not (arriving or leaving):
            return server
        self._record.events.extend(event(round, site, "arrived", "it takes part from now on") for site in arriving)
        told = "it takes part no more, and nothing is held in its name"
        self._record.events.extend(event(round, site, "left", told) for site in leaving)
        arrived = self._introduced(arriving, round - 1) if arriving else {}
        if silent := [site for site in arriving if site not in arrived]:
            raise RoundError(
                f"round {round}: site {silent[0]!r} arrives (federation.arrives) and does not introduce itself; see to "
                "it that it can be reached, and go on with resume=true"
            )
        try:
            after = self.algorithm.regrouped(forgotten(server), arrived, leaving)
        except ValueError as error:
            who = ", ".join([*arriving, *leaving])
            raise RoundError(f"round {round}, in which {who} came or left: {error}") from error
        return with_memories(after, {name: remembered(server, name) for name in self._names})

    def _round(self, round: int, server: State) -> State:
        start = time.perf_counter()
        self._record = RoundRecord(round, 0.0)
        server = self._regrouped(round, server)
        history = history_of(server)
        work, absent = self._selected(round, history)
        present = list(work)
        asked = len(present) + len(absent)
        there = self._asked_of(round)
        self._record.events.extend(event(round, site, "absent", "simulated absence") for site in absent)
        present = self._solvent(round, server, present)
        self.observer.round_started(round, self.schedule.rounds, present)
        if not present and self.schedule.sampling == "poisson" and self.transforms:
            nobody = Cohort({}, self._expected(round), asked, len(there))
            # to skip the round would tell that nobody was drawn
            server = self._advance(round, server, _no_change(server), nobody)
        elif len(present) < self._needed:
            detail = f"{len(present)} of {len(there)} sites present, {self._needed} needed"
            self._record.events.append(event(round, "", "skipped", detail))
        else:
            server = self._turns(round, server, {site: work[site] for site in present}, asked)
            self._check_travelled(round)
            if self.select is not None or self.schedule.time_limit != "none":
                server = remembering(server, self._remembered(history, self._told(round)))
        last = round == self.schedule.rounds
        if not last and self._spent(round, server):
            last = True
            detail = "the privacy budget does not suffice for another round; this is the last one"
            self._record.events.append(event(round, "", "stopped", detail))
        scores: dict[str, float] = {}
        if last or round % self.schedule.evaluate_every == 0:
            found = self.evaluate(server, round, self.members(round), ("val",), personalise=True)
            means = {site: update.scalars for site, update in found.items()}
            scores = selection_scores(means, self.members(round), self.choose_by)
            self._record.scores.extend(row for update in found.values() for row in update.rows)
            if self.schedule.work_patience is not None and round % self.schedule.evaluate_every == 0:
                # not an early last round's: a run that goes on from there would be another one
                these = counted(scores, "global" in self.algorithm.views, found, self.sites)
                server = validated(server, these, self.schedule.work_patience)
                if not scores and round == self.schedule.evaluate_every:
                    detail = "no validation score tells federation.work_patience when to halve local work"
                    self._record.events.append(event(round, "", "no effect", detail))
        self.observer.round_done(replace(self._record, seconds=time.perf_counter() - start))
        due = last or round % self.schedule.checkpoint_every == 0
        branch = not last and bool(self._roster.arriving(round + 1))
        if due or branch:
            if self.ledger is not None:  # first: a state that no entry tells of must not exist
                self.ledger.saved(round, server)
            scores, since = scores if due else {}, self._roster.since(round)
            self.checkpoint.save(round, server, self.transport.kept(), scores, since=since, branch=branch)
        return server

    def _remembered(self, history: History, told: History) -> History:
        """What is known of sites after a round."""
        return self.select.remembered(history, told) if isinstance(self.select, Remembering) else {**history, **told}

    def _told(self, round: int) -> dict[str, Past]:
        """What sites told with the updates of this round that were used."""
        rows = (row for row in self._record.rounds if row["task"] == "train")
        return {row["site"]: Past(round, row["steps"], row[LOSS], row["examples"]) for row in rows}

    def _turns(self, round: int, server: State, work: Mapping[str, float], asked: int) -> State:
        """The server's state after all turns of a round."""
        peers = tuple(work) if self.algorithm.among_peers else ()
        most, share = self._most_steps(server, work), left(server)
        had: Counter[str] = Counter()  # turns in this round
        for together in self.schedule.turns(list(work), random.Random(derive_seed(self.seed, "turns", round))):
            tasks = {
                site: replace(self._task(round, site, work[site] * share, had[site], most.get(site)), peers=peers)
                for site in together
            }
            server = self._train(round, server, tasks, asked)
            had.update(together)
        return server

    def _most_steps(self, server: State, sites: Iterable[str]) -> dict[str, int]:
        """Steps that the time limit leaves to a site, where there is one."""
        if self.schedule.time_limit == "none" or self._pools:
            return {}
        models = self.algorithm.models_per_step  # sites tell the steps of all of them
        return mean_limit(history_of(server), self.schedule.step_seconds or {}, sites, models)

    def _train(self, round: int, server: State, tasks: Mapping[str, TrainTask], asked: int) -> State:
        """The server's state after some sites' turn, its transforms' memories included."""
        mean, present = self._mean(), list(tasks)
        admission = Admission(
            server,
            self.algorithm.per_site,
            limits=ONCE if self.algorithm.among_peers else None,
            unread=not isinstance(mean, Mean),  # it looks itself
            needed={"steps", *self.algorithm.needed_numbers},
        )
        along: Mapping[str, State] = {}
        if isinstance(mean, Session):
            along = mean.begin(present, admission.shared, partial(self._consult, round))
            present = [site for site in present if site in along]
        tasks = {site: replace(tasks[site], sites=len(present)) for site in present}
        messages = {site: self.algorithm.broadcast(server, site, tasks[site]) for site in present}
        messages = {site: joined(message, along[site]) if along else message for site, message in messages.items()}
        for site, message in messages.items():
            self._record.traffic.extend(_traffic(round, site, "down", message))
        waiting: list[Update] = []
        factors = self._corrections(server)
        weights: dict[str, float] = {}
        accounts: dict[str, float] = {}

        def add(update: Update, weight: float) -> None:
            mean.add(update, weight)
            weights[update.site] = weight

        def take(update: Update) -> None:
            if self.algorithm.reads_updates:
                waiting.append(update)
            else:
                add(update, self.algorithm.weigh(server, [update])[0] * factors.get(update.site, 1.0))

        usable = 0
        for arrived in self.ask(tasks, messages):
            accounts |= self._account(round, arrived)
            usable += self._accept(round, arrived, admission, take)
        server = State(server.tensors, {**server.scalars, **accounts})
        if not self._require(round, server, usable):
            return server
        if isinstance(mean, Session):
            try:
                mean.end(partial(self._consult, round))
            except ValueError as error:
                self.observer.round_done(self._record)
                raise RoundError(f"round {round}: {error}") from error
        if not (mean.total or any(update.examples for update in waiting)):
            detail = "none of the sites present has labelled training images"
            self._record.events.append(event(round, "", "skipped", detail))
            return server
        cohort = Cohort(weights, self._expected(round), asked, len(self._asked_of(round)))
        if not waiting:
            return self._advance(round, server, self._result(round, mean), cohort)
        return self._aggregate(round, server, mean, waiting, add, cohort)

    def _aggregate(
        self,
        round: int,
        server: State,
        mean: Accumulator,
        updates: Sequence[Update],
        add: Callable[[Update, float], None],
        cohort: Cohort,
    ) -> State:
        """The server's state after a round whose updates the method compares."""
        memories: dict[str, State] = {name: remembered(server, name) for name in self._names}

        def average(weights: Sequence[float]) -> tuple[State, Cohort]:
            if cohort.weights:
                raise RuntimeError("the mean of a round is taken once")
            for update, weight in zip(updates, weights, strict=True):
                add(update, weight)
            averaged, now = self._undone(round, server, self._result(round, mean), cohort)
            memories.update(now)
            return averaged, cohort

        advanced = self.algorithm.aggregate(server, updates, average)
        return with_memories(advanced, memories) if self.transforms else advanced

    def _result(self, round: int, mean: Accumulator) -> State:
        """The mean of a round; how far its updates are apart is noted."""
        if isinstance(mean, SketchedMean):
            self._record.updates.extend(mean.differences(round))
        result = mean.result()
        if isinstance(mean, RobustMean):
            self._record.events.extend(mean.far(result, round))
        return result

    def _consult(
        self, round: int, topic: str, messages: Mapping[str, State], read: Callable[[str, State], T]
    ) -> dict[str, T]:
        """See `federation.contract.Consult`; what travels is noted."""
        task = QueryTask("consult", round, self.seed, topic=topic)
        said: dict[str, T] = {}
        for site, message in messages.items():
            self._record.traffic.extend(_traffic(round, site, "down", message))
        for update in self.ask(dict.fromkeys(messages, task), messages):
            refusal = update.refusal or unbounded(update)
            if not refusal:
                try:
                    said[update.site] = read(update.site, update)
                except (KeyError, ValueError) as error:
                    refusal = f"its answer to {topic} cannot be used: {error}"
            if refusal:
                self._record.events.append(event(round, update.site, "refused", refusal))
                continue
            self._record.traffic.extend(_traffic(round, update.site, "up", update))
        return said

    def _advance(self, round: int, server: State, mean: State, cohort: Cohort) -> State:
        """The server's state after a mean, and what its transforms remember."""
        mean, memories = self._undone(round, server, mean, cohort)
        advanced = self.algorithm.advance(server, mean, cohort)
        return with_memories(advanced, memories) if self.transforms else advanced

    def _undone(self, round: int, server: State, mean: State, cohort: Cohort) -> tuple[State, dict[str, State]]:
        """A mean as the method sees it, and what transforms remember of it."""
        memories: dict[str, State] = {}
        for index, transform in reversed(list(enumerate(self.transforms))):
            memory, seed = remembered(server, transform.name), derive_seed(self.seed, "server", index, round)
            mean, memories[transform.name] = transform.on_server(mean, cohort, memory, seed)
            if EPSILON in memories[transform.name].scalars and transform.guarantee is not None:
                epsilon = memories[transform.name].scalars[EPSILON]
                self._record.privacy.append(_privacy(round, "", transform, transform.guarantee, epsilon))
        length = self.schedule.server_lr * self._reach(server, cohort)
        if length != 1.0 and "model" in mean.tensors:
            mean.tensors["model"] = {k: t * length for k, t in mean["model"].items()}
        return mean, memories

    def _corrections(self, server: State) -> dict[str, float]:
        """What weights of updates are multiplied by, where these make up for the chances of their sites."""
        if not (self.schedule.select_unbiased and isinstance(self.select, Remembering)):
            return {}
        return corrections(self.select.probabilities(history_of(server)), self._all_weights(server))

    def _reach(self, server: State, cohort: Cohort) -> float:
        """The weights of a round's sites over those of all, by which their mean becomes a part of the mean of all.

        Sites that were asked and sent nothing leave their part to the others.
        """
        if not (self.schedule.select_unbiased and isinstance(self.select, Remembering)):
            return 1.0
        share = sum(cohort.weights.values()) / sum(self._all_weights(server).values())
        return share * cohort.asked / cohort.usable

    def _all_weights(self, server: State) -> dict[str, float]:
        """Weights of all sites, had each of them sent an update."""
        images = {site: int(past.examples) for site, past in history_of(server).items()}
        updates = {site: Update(site=site, examples=count) for site, count in images.items()}
        return {site: self.algorithm.weigh(server, [update])[0] for site, update in updates.items()}

    def _expected(self, round: int) -> float:
        """Updates that a round is to have."""
        if self._pools:
            return 1.0
        count = len(self.members(round))
        return self.schedule.fraction * count if self.schedule.sampling == "poisson" else self.schedule.asked(count)

    def _account(self, round: int, update: Update) -> dict[str, float]:
        """Take a site's accounts of privacy from its update, and note them.

        Returns:
            Scalars for the server's state: which sites have nothing left.
        """
        noted = {}
        for transform in self.transforms:
            epsilon = update.scalars.pop(f"{PREFIX}{transform.name}/{EPSILON}", None)
            spent = update.scalars.pop(f"{PREFIX}{transform.name}/{SPENT}", 0.0)
            if epsilon is not None and transform.guarantee is not None:
                self._record.privacy.append(_privacy(round, update.site, transform, transform.guarantee, epsilon))
                noted[f"{PREFIX}{transform.name}/{SPENT}/{update.site}"] = spent
        return noted

    def _solvent(self, round: int, server: State, sites: Sequence[str]) -> list[str]:
        """Those sites that can afford another round."""
        spent = [s for s in sites if any(server.scalars.get(f"{PREFIX}{name}/{SPENT}/{s}") for name in self._names)]
        self._record.events.extend(event(round, site, "spent", "its privacy budget is spent") for site in spent)
        return [site for site in sites if site not in spent]

    def _spent(self, round: int, server: State) -> bool:
        """Whether the budget of privacy does not suffice for another round than those that are done."""
        if any(remembered(server, transform.name).scalars.get(SPENT) for transform in self.transforms):
            return True
        trainers = (POOL,) if self._pools else self._roster.later(round)
        spent = {s for s in trainers if any(server.scalars.get(f"{PREFIX}{n}/{SPENT}/{s}") for n in self._names)}
        return bool(spent) and len(trainers) - len(spent) < self._needed

    def _mean(self) -> Accumulator:
        """What averages a round; unless a transform forbids it, it also notes how far updates are apart."""
        own = next(filter(None, (transform.accumulator() for transform in self.transforms)), None)
        if own is not None:
            return own
        if sums_only(self.transforms):
            return Mean(self.algorithm.per_site, self.algorithm.uniform_groups)
        seed = derive_seed(self.seed, "sketch")
        if self.schedule.combine != "mean" and not self._pools:
            return RobustMean(self._combination, self.algorithm.per_site, seed, self.algorithm.uniform_groups)
        return SketchedMean(self.algorithm.per_site, seed, self.algorithm.uniform_groups)

    def _task(self, round: int, site: str, share: float = 1.0, had: int = 0, most: int | None = None) -> TrainTask:
        rng = random.Random(derive_seed(self.seed, "work", round, site))
        share *= 1.0 - self.schedule.work_spread * rng.random()
        share *= self.schedule.work_in(round)
        if most is not None and self.schedule.local_steps is not None:
            share = min(share, most / self.schedule.local_steps)
        work = share * (len(self.sites) if site == POOL and self.schedule.local_steps is not None else 1)
        seed = derive_seed(self.seed, "turn", had) if had else self.seed  # not the same images once more
        return TrainTask(round, seed, self.schedule.local_steps, self.schedule.local_epochs, work)

    def _accept(self, round: int, arrived: Update, admission: Admission, take: Callable[[Update], None]) -> bool:
        """Decode what arrived, hand it on and note it; whether it could be used."""
        update, refusal = arrived, arrived.refusal
        if not refusal:
            update, refusal = self._decoded(arrived)
        if not refusal:
            refusal = admission.refusal(update) or told_non_finite(update)
        seconds = update.scalars.pop("seconds", None)
        if not refusal:
            try:
                take(update)
            except ValueError as error:
                refusal = str(error)
        if refusal:
            self._record.events.append(event(round, arrived.site, "refused", refusal))
            return False
        row: Row = {"round": round, "site": update.site, "task": "train", "examples": update.examples}
        told = {**update.scalars, "steps": update.scalars["steps"] * self.algorithm.models_per_step}
        row |= {name: told.get(name) for name in (LOSS, PERSONAL_LOSS, "steps")} | {"seconds": seconds}
        self._record.rounds.append(row)
        if not self.algorithm.among_peers:
            self._record.traffic.extend(_traffic(round, update.site, "up", arrived))
        self.observer.site_done("train", round, update.site, told, nan if seconds is None else seconds)
        return True

    def _decoded(self, update: Update) -> tuple[Update, str]:
        """An update as it was before the site's transforms, or why it cannot be read."""
        try:
            for transform in reversed(self.transforms):
                update = transform.on_arrival(update)
        except Exception as error:  # whatever a site sent: it is that site's update that cannot be used
            return update, f"{type(error).__name__} while it was decoded"
        return update, ""

    def _require(self, round: int, server: State, usable: int) -> bool:
        """Whether there are enough updates for a mean; if there never will be again, as budgets are spent, False.

        Raises:
            RoundError: too few, for another reason, or in round 1: nothing would be learnt at all.
        """
        if usable >= (self._needed if self.schedule.order == "together" else 1):
            return True
        if self.schedule.order != "together":
            return False  # it is the next site's turn
        if round > 1 and self._spent(round, server):
            self._record.events.append(event(round, "", "skipped", "too few sites have a privacy budget left"))
            return False
        raise self._too_few(round, usable)

    def _check_travelled(self, round: int) -> None:
        """Make sure that some site's turn was of use.

        Raises:
            RoundError: no site sent a usable update.
        """
        if self.schedule.order != "together" and not self._record.rounds:
            raise self._too_few(round, 0)

    def _too_few(self, round: int, usable: int) -> RoundError:
        """The error that ends the run; the round is noted first."""
        self.observer.round_done(self._record)
        reasons = "; ".join(f"{e['site']}: {e['detail']}" for e in self._record.events if e["event"] == "refused")
        asked = {"federation.combine": self._combination.least} | {one.name: one.least for one in self.transforms}
        whose = [name for name, least in asked.items() if least == self._needed > self.schedule.min_sites]
        needed = f"{self._needed} needed by {whose[0]}" if whose else f"federation.min_sites={self._needed} needed"
        diverged = "Lower the learning rate, clip gradients (trainer.gradient_clip) or look at these sites' images."
        unconnected = "See to it that these sites can take part, and go on with resume=true."
        return RoundError(
            f"round {round}: {usable} usable updates, {needed} ({reasons or 'no site sent one'}). "
            f"{diverged if 'not finite' in reasons else unconnected}"
        )


def selection_scores(found: Mapping[str, Mapping[str, float]], sites: Sequence[str], metric: str) -> dict[str, float]:
    """Scores that choose the best models: mean over sites for ``global``, each site's own for ``personal/<site>``.

    Only validation scores of seen sites come in here; sites without validation cases are left out of the mean. A round
    in which a site could not be scored at all (its fine-tuning diverged) has no global score: a mean over the others
    is no match for other rounds' means.
    """
    shared = [values[f"val/global/{metric}"] for values in found.values() if f"val/global/{metric}" in values]
    scores = {"global": sum(shared) / len(shared)} if shared and not set(sites) - found.keys() else {}
    for site, values in found.items():
        if f"val/personal/{metric}" in values:
            scores[f"personal/{site}"] = values[f"val/personal/{metric}"]
    return scores


def _no_change(server: State) -> State:
    """The sum of no updates."""
    groups = {group: server[group] for group in ("model", "buffers") if group in server.tensors}
    return State({group: {name: torch.zeros_like(t) for name, t in ts.items()} for group, ts in groups.items()})


def _privacy(round: int, site: str, transform: Transform, guarantee: Guarantee, epsilon: float) -> Row:
    row: Row = {"round": round, "site": site, "mechanism": transform.name, "unit": guarantee.unit}
    return {**row, "epsilon": epsilon, "delta": guarantee.delta, "limit": guarantee.limit}


def _traffic(round: int, site: str, direction: str, state: State) -> list[Row]:
    """Bytes by group; what a transform made of one (``group:part``) counts as the group's."""
    sizes: dict[str, int] = {}
    for part, size in state.sizes().items():
        group = part.partition(":")[0]
        sizes[group] = sizes.get(group, 0) + size
    return [
        {"round": round, "site": site, "direction": direction, "group": group, "bytes": size}
        for group, size in sizes.items()
    ]


def _left(round: int, task: str, update: Update, passed: str) -> list[Row]:
    """All that left a site in one answer: group by group how much, and the name, shape and type of every tensor."""
    common = {"round": round, "site": update.site, "task": task, "transforms": passed}
    rows = []
    for group, size in update.sizes().items():
        tensors = update[group]
        listing = [
            (
                name,
                "x".join(map(str, t.shape)) if t.dtype != torch.uint8 else "bytes",
                str(t.dtype).removeprefix("torch."),
            )
            for name, t in tensors.items()
        ]
        numbers = sum(t.numel() for t in tensors.values())
        rows.append({**common, "group": group, "numbers": numbers, "bytes": size, "listing": listing})
    if update.scalars:
        named = [(name, "", "number") for name in sorted(update.scalars)]
        rows.append({**common, "group": "(numbers)", "numbers": len(named), "bytes": 8 * len(named), "listing": named})
    for name, (count, size) in update.beside.items():
        rows.append({**common, "group": name, "numbers": count, "bytes": size, "listing": []})
    return rows
