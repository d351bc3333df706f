"""The round loop. It knows no method, no network and no data set: it asks for the hooks in `federation.contract`."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from federation.admission import Admission
from federation.checkpoint import Checkpoint
from federation.contract import Observer, RoundRecord, Row, ServerHalf, Task, Transform, Transport
from federation.seeds import derive_seed
from federation.state import Mean, State, Update

POOL = "pooled"


class RoundError(RuntimeError):
    """Too few sites are left to go on."""


@dataclass(frozen=True)
class Schedule:
    """How the federation runs.

    Attributes:
        rounds: communication rounds.
        local_steps: optimiser steps of a site in a round; null lets local_epochs decide.
        local_epochs: passes over a site's training images in a round, when local_steps is null.
        fraction: share of the sites that is asked in a round, in (0, 1].
        dropout: probability that a site which was asked is absent, in [0, 1).
        min_sites: updates needed to go on; with fewer present the round is skipped, with fewer usable the run fails.
        work_spread: unequal local work: every site does a share of its steps drawn from [1 - spread, 1] each round.
        server_lr: step of the server along the mean update; running statistics always take the full mean.
        evaluate_every: rounds between two validations.
        checkpoint_every: rounds between two checkpoints; the best model is chosen among the saved rounds.
    """

    rounds: int = 20
    local_steps: int | None = 10
    local_epochs: float = 1.0
    fraction: float = 1.0
    dropout: float = 0.0
    min_sites: int = 1
    work_spread: float = 0.0
    server_lr: float = 1.0
    evaluate_every: int = 1
    checkpoint_every: int = 1

    def __post_init__(self) -> None:
        limits = {
            "rounds": self.rounds >= 1,
            "local_steps": self.local_steps is None or self.local_steps >= 1,
            "local_epochs": self.local_epochs > 0,
            "fraction": 0 < self.fraction <= 1,
            "dropout": 0 <= self.dropout < 1,
            "min_sites": self.min_sites >= 1,
            "work_spread": 0 <= self.work_spread < 1,
            "server_lr": self.server_lr > 0,
            "evaluate_every": self.evaluate_every >= 1,
            "checkpoint_every": self.checkpoint_every >= 1,
        }
        for name, fine in limits.items():
            if not fine:
                raise ValueError(f"federation.{name}={getattr(self, name)} is out of range; see train.py --help")

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


class Algorithm(ServerHalf, Protocol):
    """The server half, as the engine needs it."""


@dataclass
class Federation:
    """One run: an algorithm's server half, a way to the sites, and a schedule.

    Attributes:
        algorithm: the server half.
        transport: the way to the sites.
        sites: the seen sites, in the order in which they are averaged.
        schedule: how the federation runs.
        seed: the run's seed.
        checkpoint: where the run is saved.
        observer: told what happens.
        transforms: applied to the mean in reverse order; their client side lives in the transport.
    """

    algorithm: Algorithm
    transport: Transport
    sites: Sequence[str]
    schedule: Schedule
    seed: int
    checkpoint: Checkpoint
    observer: Observer
    transforms: Sequence[Transform] = ()
    _record: RoundRecord = field(init=False, default_factory=lambda: RoundRecord(0, 0.0))

    def __post_init__(self) -> None:
        self.schedule.asked(len(self.sites))
        for transform in self.transforms:
            transform.check(self.algorithm)

    @property
    def trainers(self) -> Sequence[str]:
        """Who trains: every site, or the pool."""
        return (POOL,) if self._pools else self.sites

    @property
    def _pools(self) -> bool:
        return self.algorithm.trains_on == "pool"

    @property
    def _needed(self) -> int:
        """Usable updates that a round needs; the pool is one, whatever is asked of sites."""
        return 1 if self._pools else self.schedule.min_sites

    def run(self) -> State:
        """Train until all rounds are done, going on from the checkpoint if there is one.

        Raises:
            RoundError: too few sites sent a usable update.
        """
        snapshot = self.checkpoint.load()
        if snapshot is None:
            round, server = 0, self.algorithm.init_server(self._introduce())
        else:
            round, server = snapshot.round, snapshot.server
            self.transport.restore(snapshot.kept)
        while round < self.schedule.rounds:
            round += 1
            server = self._round(round, server)
        return server

    def sample(self, round: int) -> tuple[list[str], list[str]]:
        """Sites that take part in a round, and those that were asked but are absent."""
        if self._pools:
            return [POOL], []
        rng = random.Random(derive_seed(self.seed, "sample", round))
        wanted = self.schedule.asked(len(self.trainers))
        asked = set(rng.sample(list(self.trainers), wanted))
        absent = {site for site in self.trainers if rng.random() < self.schedule.dropout} & asked
        return [s for s in self.trainers if s in asked - absent], [s for s in self.trainers if s in absent]

    def evaluate(
        self,
        server: State,
        round: int,
        sites: Sequence[str],
        splits: tuple[str, ...],
        published: State | None = None,
        **options: object,
    ) -> dict[str, dict[str, float]]:
        """Scores of the algorithm's views at some sites: site -> name -> value.

        Args:
            server: the server's state.
            round: rounds done.
            sites: which sites.
            splits: which of their cases.
            published: what `publish` returned, for sites that never took part: they adapt it before they are scored.
            options: go into the task.
        """
        task = replace(
            Task("evaluate", round, self.seed, splits=splits, adapt=published is not None),
            **options,  # type: ignore[arg-type]
        )
        messages = {site: self.algorithm.broadcast(server, site, task) for site in sites}
        if published is not None:
            messages = {site: State({**m.tensors, **published.tensors}, m.scalars) for site, m in messages.items()}
        scores = {}
        for update in self.transport.ask(dict.fromkeys(sites, task), messages):
            if update.refusal:
                self._record.events.append(_event(round, update.site, "refused", update.refusal))
                continue
            scores[update.site] = update.scalars
            self.observer.site_done("evaluate", round, update.site, update.scalars, update.scalars["seconds"])
        return scores

    def publish(self, round: int) -> State:
        """What seen sites give, after training, to sites that never took part: groups ``group/site``.

        Raises:
            RoundError: no site has anything to give, since none has trained.
        """
        task = Task("publish", round, self.seed)
        answers = self.transport.ask(dict.fromkeys(self.sites, task), dict.fromkeys(self.sites, State()))
        published = State()
        for update in answers:
            if not update.refusal:
                published.tensors |= {f"{group}/{update.site}": ts for group, ts in update.tensors.items()}
        if not published.tensors:
            raise RoundError("no site has a personal model to publish: none of them has trained yet")
        return published

    def record_publication(self, server: State, round: int, published: State, receivers: Sequence[str]) -> None:
        """Tell the observer, after the last round, what travels when it is published to these sites."""
        record = RoundRecord(round + 1, 0.0)
        for group, size in published.sizes().items():
            row = {"round": round + 1, "site": group.partition("/")[2], "direction": "up"}
            record.traffic.append({**row, "group": group, "bytes": size})
        for site in receivers:
            message = self.algorithm.broadcast(server, site, Task("evaluate", round, self.seed, adapt=True))
            record.traffic.extend(_traffic(round + 1, site, "down", State({**message.tensors, **published.tensors})))
        self.observer.round_done(record)

    def _introduce(self) -> dict[str, State]:
        task = Task("introduce", 0, self.seed)
        answers = self.transport.ask(dict.fromkeys(self.trainers, task), dict.fromkeys(self.trainers, State()))
        introductions: dict[str, State] = {}
        record = RoundRecord(0, 0.0)
        for update in answers:
            if update.refusal:
                raise RoundError(f"site {update.site!r} cannot introduce itself: {update.refusal}")
            record.traffic.extend(_traffic(0, update.site, "up", update))
            introductions[update.site] = update
        self.observer.round_done(record)
        return introductions

    def _round(self, round: int, server: State) -> State:
        start = time.perf_counter()
        present, absent = self.sample(round)
        self._record = RoundRecord(round, 0.0)
        self._record.events.extend(_event(round, site, "absent", "simulated absence") for site in absent)
        self.observer.round_started(round, self.schedule.rounds, present)
        if len(present) < self._needed:
            detail = f"{len(present)} of {len(self.trainers)} sites present, {self._needed} needed"
            self._record.events.append(_event(round, "", "skipped", detail))
        else:
            mean = self._train(round, server, present)
            server = server if mean is None else self.algorithm.advance(server, mean)
        last = round == self.schedule.rounds
        scores: dict[str, float] = {}
        if last or round % self.schedule.evaluate_every == 0:
            found = self.evaluate(server, round, self.sites, ("val",), personalise=True)
            scores = selection_scores(found)
        self.observer.round_done(replace(self._record, seconds=time.perf_counter() - start))
        if last or round % self.schedule.checkpoint_every == 0:
            self.checkpoint.save(round, server, self.transport.kept(), scores)
        return server

    def _train(self, round: int, server: State, present: Sequence[str]) -> State | None:
        """The mean of a round's updates, after the transforms; None when no update has any weight."""
        tasks = {site: self._task(round, site) for site in present}
        messages = {site: self.algorithm.broadcast(server, site, tasks[site]) for site in present}
        for site, message in messages.items():
            self._record.traffic.extend(_traffic(round, site, "down", message))
        mean = Mean(self.algorithm.per_site)
        admission = Admission(server, self.algorithm.per_site)
        waiting: list[Update] = []
        usable = 0
        for update in self.transport.ask(tasks, messages):
            if not self._accept(round, update, admission):
                continue
            usable += 1
            if self.algorithm.reads_updates:
                waiting.append(update)
            else:
                mean.add(update, self.algorithm.weigh(server, [update])[0])
        self._require(round, usable)
        if waiting:
            for update, weight in zip(waiting, self.algorithm.weigh(server, waiting), strict=True):
                mean.add(update, weight)
        if not mean.total:
            detail = "none of the sites present has labelled training images"
            self._record.events.append(_event(round, "", "skipped", detail))
            return None
        result = mean.result()
        for index, transform in reversed(list(enumerate(self.transforms))):
            result = transform.on_server(result, usable, derive_seed(self.seed, "server", index, round))
        if self.schedule.server_lr != 1.0 and "model" in result.tensors:
            result.tensors["model"] = {k: t * self.schedule.server_lr for k, t in result["model"].items()}
        return result

    def _task(self, round: int, site: str) -> Task:
        rng = random.Random(derive_seed(self.seed, "work", round, site))
        share = 1.0 - self.schedule.work_spread * rng.random()
        work = share * (len(self.sites) if site == POOL and self.schedule.local_steps is not None else 1)
        return Task("train", round, self.seed, self.schedule.local_steps, self.schedule.local_epochs, work)

    def _accept(self, round: int, update: Update, admission: Admission) -> bool:
        broken = update.non_finite()
        refusal = update.refusal or admission.refusal(update)
        refusal = refusal or (f"{len(broken)} tensors are not finite" if broken else "")
        if refusal:
            self._record.events.append(_event(round, update.site, "refused", refusal))
            return False
        seconds = update.scalars.pop("seconds")
        row: Row = {"round": round, "site": update.site, "task": "train", "examples": update.examples}
        row |= {"loss": update.scalars.get("loss"), "steps": update.scalars["steps"], "seconds": seconds}
        self._record.rounds.append(row)
        self._record.traffic.extend(_traffic(round, update.site, "up", update))
        self.observer.site_done("train", round, update.site, update.scalars, seconds)
        return True

    def _require(self, round: int, usable: int) -> None:
        if usable >= self._needed:
            return
        self.observer.round_done(self._record)
        reasons = "; ".join(f"{e['site']}: {e['detail']}" for e in self._record.events if e["event"] == "refused")
        raise RoundError(
            f"round {round}: {usable} usable updates, federation.min_sites={self._needed} needed "
            f"({reasons}). "
            "Lower the learning rate, clip gradients (trainer.gradient_clip) or look at these sites' images."
        )


def selection_scores(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Scores that choose the best models: mean over sites for ``global``, each site's own for ``personal/<site>``.

    Only validation scores of seen sites come in here; sites without validation cases are left out of the mean.
    """
    shared = [values["val/global/dice"] for values in found.values() if "val/global/dice" in values]
    scores = {"global": sum(shared) / len(shared)} if shared else {}
    for site, values in found.items():
        if "val/personal/dice" in values:
            scores[f"personal/{site}"] = values["val/personal/dice"]
    return scores


def round_half_up(value: float) -> int:
    """Nearest integer; halves go up, unlike Python's `round`."""
    return int(value + 0.5)


def _event(round: int, site: str, event: str, detail: str) -> Row:
    return {"round": round, "site": site, "event": event, "detail": detail}


def _traffic(round: int, site: str, direction: str, state: State) -> list[Row]:
    return [
        {"round": round, "site": site, "direction": direction, "group": group, "bytes": size}
        for group, size in state.sizes().items()
    ]
