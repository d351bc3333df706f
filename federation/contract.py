"""The house rules on one page: who may ask whom for what.

An `Algorithm` carries both halves, with a wall inside: the engine's instance and the worker's are different objects
even in one process, and the server half reads only `State` and `Update`, never a module's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from fedseg.federation.state import State, Tensors, Update

T = TypeVar("T")
W = TypeVar("W", bound="ClientHalf")
S = TypeVar("S", bound="Site")
Batch = dict[str, Any]
Split = Literal["train", "val", "test"]
Row = dict[str, Any]
LOSS, PERSONAL_LOSS = "loss", "loss_personal"
"""Scalars of an update: the mean loss of a round's steps, and of the second model where a step trains two."""
NOISE = "noise/"
"""Before a noise in a scalar of an update: how many private gradients had it. It does not travel as such."""
VISITING = "visiting"
"""Topic of tasks by which a site's personal model is scored at others: it is given away, or came along to be scored."""


class MessageError(ValueError):
    """A site cannot use what came; the reason may be told elsewhere: it names nothing of the site's data."""


def event(round: int, site: str, what: str, detail: str) -> Row:
    """A row of events.csv; without a site it is about all of them."""
    return {"round": round, "site": site, "event": what, "detail": detail}


@dataclass(frozen=True)
class TrainTask:
    """Train at a site, and send what travels.

    Attributes:
        kind: what every task is told by: in seeds, messages, ledgers and tables.
        round: 1 for the first round.
        seed: the run's seed; a turn derives its own from (seed, kind, round, site).
        steps: local optimiser steps; None lets `epochs` decide.
        epochs: passes over the site's labelled training images, or over all where none is labelled, when `steps` is
            None.
        work: share of that work to do (unequal local work), or several times it (pooled training).
        sites: how many sites train at the same time, whose updates may become one; 0 where that is not told.
        peers: sites that can be reached, where these take models from each other.
    """

    kind: Literal["train"] = field(default="train", kw_only=True)
    round: int
    seed: int
    steps: int | None = None
    epochs: float = 1.0
    work: float = 1.0
    sites: int = 0
    peers: tuple[str, ...] = ()


@dataclass(frozen=True)
class EvaluateTask:
    """Score the views of a method at a site.

    Attributes:
        kind: as of a `TrainTask`, as are `round` and `seed`.
        round: rounds done.
        seed: the run's seed.
        splits: which splits to evaluate.
        checkpoint: which model is evaluated: ``round`` while training, ``last`` or ``best`` at the end.
        personalise: whether the method first fits its personal model (fine-tuning methods).
        adapt: whether the method first adapts what was published, to the images of a site that never took part.
        views: views to evaluate; empty for all that the method has.
        topic: `VISITING`, or empty.
    """

    kind: Literal["evaluate"] = field(default="evaluate", kw_only=True)
    round: int
    seed: int
    splits: tuple[Split, ...] = ()
    checkpoint: str = "round"
    personalise: bool = False
    adapt: bool = False
    views: tuple[str, ...] = ()
    topic: str = ""


@dataclass(frozen=True)
class QueryTask:
    """Tell something, and neither train nor score.

    Attributes:
        kind: ``introduce`` before the first round; ``publish`` a personal model; ``consult`` a transform's site side.
        round: rounds done; of a consultation, the round at hand.
        seed: the run's seed.
        checkpoint: which personal model is published: ``round``, or ``best``.
        topic: what a transform's server side asks its site side: ``transform/stage``; of a model that is published,
            `VISITING` where it is to be scored at other sites; of an introduction, what the selection of sites wants to
            know beside it.
    """

    kind: Literal["introduce", "publish", "consult"]
    round: int
    seed: int
    checkpoint: str = "round"
    topic: str = ""


Task = TrainTask | EvaluateTask | QueryTask
"""What one site is asked to do; nobody can write notes on it."""


class Site(Protocol):
    """The data of one site, as a worker sees it."""

    name: str
    index: int
    seen: bool

    @property
    def examples(self) -> int:
        """Labelled training images."""

    @property
    def training_images(self) -> int:
        """Training images, labelled or not."""

    @property
    def patients(self) -> int:
        """Patients with labelled training images."""

    def at(self: S, round: int) -> S:
        """The site as it is in a round, where some of its training images come later."""

    def covered(self) -> Tensor:
        """(N, R) share of the images that each region covers in N labelled training cases; NaN where not annotated."""

    def steps(self, epochs: float = 1.0, labelled: bool = True) -> int:
        """Batches in that many passes over the labelled training images, or over all of them."""

    def train_batches(self, seed: int, steps: int) -> Iterable[Batch]:
        """Augmented batches with masks; a pure function of the arguments."""

    def patient_batches(self, seed: int, steps: int, rate: float) -> Iterable[Batch]:
        """Augmented batches of whole patients, told apart by ``patient``, each there with that probability."""

    def unlabelled_batches(self, seed: int, steps: int, views: int = 1) -> Iterable[Batch]:
        """Augmented batches of all training images, without masks."""

    def plain_batches(self) -> Iterable[Batch]:
        """All training images once, labelled or not, neither augmented nor with masks."""

    def eval_batches(self, split: Split) -> Iterable[Batch]:
        """Batches of a split, case after case, not augmented; images are whole, of whatever size."""

    def input_batches(self, split: Split) -> Iterable[Batch]:
        """The same images in the network's size; where patches are cut, patches that cover them."""


@dataclass
class Scored:
    """What an evaluation found at a site.

    Attributes:
        means: name -> number, for the server.
        rows: for the run's tables.
    """

    means: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)


Evaluate = Callable[[W, S, EvaluateTask], Scored]
"""Scores the views of a worker, loaded for a site, on the task's splits."""


class ClientHalf(Protocol):
    """Runs where the data is. One instance serves any site: between turns it keeps nothing.

    Attributes:
        round: of the training task at hand, for learning rates that move; 0 elsewhere.
    """

    round: int

    @property
    def labelled(self) -> bool:
        """Whether it learns from masks; if not, sites without any take part, and all training images count."""

    def examples_at(self, site: Site) -> int:
        """Training images by which the site counts in a mean; without any it does not train."""

    @property
    def personalises(self) -> bool:
        """Whether `personalise` fits a model that exists only for evaluation at the site."""

    def introduce(self, site: Site) -> State:
        """What the site tells the server once, before round 1."""

    def receive(self, message: State, kept: State, site: Site) -> None:
        """Load what came and what this site kept."""

    def batches(self, site: Site, seed: int, steps: int) -> Iterable[Batch]:
        """The images of one local fit."""

    def personalise(self, site: Site, fit: Callable[[int], None]) -> None:
        """Fit the personal model before it is evaluated; ``fit(steps)`` trains the module at this site."""

    def send(self, site: Site) -> State:
        """After the local fit: what travels."""

    def publish(self, site: Site) -> State:
        """After training: what this site gives to sites that never took part; nothing if it has nothing to give."""

    def adapt(self, images: Iterable[Tensor]) -> None:
        """At a site that never took part: fit a model for its images, which can be read again and carry no labels."""

    def keep(self) -> State:
        """What stays at the site until its next turn."""


class ServerHalf(Protocol):
    """Sees `State` and `Update` only."""

    @property
    def views(self) -> tuple[str, ...]:
        """Models that can be scored at a site that takes part: global, personal; none of a pre-training stage."""

    @property
    def per_site(self) -> frozenset[str]:
        """Groups that are filed per site instead of averaged."""

    @property
    def uniform_groups(self) -> frozenset[str]:
        """Groups in whose mean every update counts the same, whatever `weigh` says."""

    @property
    def exact_groups(self) -> frozenset[str]:
        """Groups that the next state is computed from: clipped, noised or thinned out they would mean nothing."""

    @property
    def needed_numbers(self) -> frozenset[str]:
        """Names of numbers without which an update is refused."""

    @property
    def reads_updates(self) -> bool:
        """Whether it must see all updates of a round side by side: then `aggregate` is asked, not `advance`."""

    @property
    def answers_singly(self) -> bool:
        """Whether every site is answered with a model of its own instead of the mean."""

    @property
    def steady_weights(self) -> bool:
        """Whether means are added up over rounds, in which a site has to weigh the same."""

    @property
    def among_peers(self) -> bool:
        """Whether sites take each other's models and nothing goes to a server; what is filed per site lies there."""

    @property
    def exchanges_answers(self) -> bool:
        """Whether sites send what their networks answer about public images, and no tensor of the networks."""

    @property
    def adapts(self) -> bool:
        """Whether sites publish models after training, which sites that never took part adapt without labels."""

    @property
    def introduces(self) -> bool:
        """Whether sites tell the server something of their data before round 1, each by itself."""

    @property
    def founders_only(self) -> str:
        """Why no site can join after round 1; empty where one can."""

    @property
    def shares(self) -> bool:
        """Whether anything is averaged at all."""

    @property
    def models_per_step(self) -> int:
        """How many models a local step trains."""

    @property
    def mixes_patients(self) -> str:
        """Why a local step cannot be made private patient by patient; empty when it can."""

    @property
    def trains_on(self) -> Literal["sites", "pool"]:
        """Whether every site trains, or one place that holds the union of all training data."""

    def init_server(self, introductions: Mapping[str, State]) -> State:
        """The server's state before round 1."""

    def regrouped(self, server: State, arrived: Mapping[str, State], left: Collection[str]) -> State:
        """The server's state when the sites of a run change after round 1.

        Args:
            server: before.
            arrived: site -> what it told when it introduced itself.
            left: sites that are asked no more.
        """

    def restored(self, server: State) -> State:
        """A saved state of the server, whatever version wrote it."""

    def broadcast(self, server: State, site: str, task: Task) -> State:
        """The message for one site."""

    def weigh(self, server: State, updates: Sequence[Update]) -> list[float]:
        """Weights of the updates; they need not sum to one."""

    def advance(self, server: State, mean: State, cohort: Cohort) -> State:
        """The server's state after a round.

        Args:
            server: before it.
            mean: of the updates.
            cohort: whose updates are behind it.
        """

    def aggregate(self, server: State, updates: Sequence[Update], average: Average) -> State:
        """The server's state after a round, from single updates.

        Args:
            server: before it.
            updates: those that can be used, in the order of the sites.
            average: takes their mean with these weights, once, and says whose it is.
        """


class Present(Protocol):
    """What the server knows of a site."""

    @property
    def seen(self) -> bool:
        """Whether it takes part in training."""


class Transport(Protocol):
    """Carries tasks to sites and updates back."""

    @property
    def sites(self) -> Mapping[str, Present]:
        """All that can be asked."""

    def ask(self, tasks: Mapping[str, Task], messages: Mapping[str, State]) -> Iterator[Update]:
        """Updates in the order of `tasks`; those of sites that did not answer are missing."""

    def kept(self) -> Mapping[str, State]:
        """What sites keep, as far as it lives in this process."""

    def restore(self, kept: Mapping[str, State], at: Mapping[str, int] | None = None) -> None:
        """Go on from an earlier time.

        Args:
            kept: what `kept` returned then.
            at: site -> the round at whose end that was, for sites that keep their states themselves; the others go on
                from their latest.
        """


@dataclass(frozen=True)
class Guarantee:
    """What an account of privacy is about.

    Attributes:
        unit: whose presence is hidden: site or patient.
        delta: probability with which the bound may fail.
        limit: epsilon that must not be exceeded; None for no limit.
    """

    unit: str
    delta: float
    limit: float | None = None


@dataclass(frozen=True)
class Cohort:
    """Whose updates are behind a mean.

    Attributes:
        weights: site -> its weight in the mean; they need not sum to one.
        expected: how many updates a round is to have, whatever happens in it.
        asked: how many sites were asked, absent ones included.
        population: how many sites could be asked.
    """

    weights: Mapping[str, float]
    expected: float
    asked: int
    population: int

    @property
    def usable(self) -> int:
        """How many updates were averaged."""
        return len(self.weights)


Average = Callable[[Sequence[float]], tuple[State, Cohort]]


class Accumulator(Protocol):
    """Averages updates as they arrive; `federation.state.Mean` does so in the clear."""

    total: float

    def add(self, update: Update, weight: float) -> None:
        """Take one update in."""

    def result(self) -> State:
        """The mean of what was taken in."""


class Consult(Protocol):
    """A way from the server side of a transform to its site sides, within a round."""

    def __call__(self, topic: str, messages: Mapping[str, State], read: Callable[[str, State], T]) -> dict[str, T]:
        """Ask sites; those that do not answer, or whose answer cannot be read, are missing.

        Args:
            topic: ``transform/stage``.
            messages: site -> what it is told.
            read: makes something of a site's answer; a ValueError or KeyError refuses it.
        """


@runtime_checkable
class Session(Accumulator, Protocol):
    """An accumulator that talks to the sites before they train and after they have answered."""

    def begin(self, sites: Sequence[str], shared: Mapping[str, Tensors], consult: Consult) -> Mapping[str, State]:
        """Before training.

        Args:
            sites: that are to train.
            shared: tensors of which updates are differences.
            consult: asks the sites.

        Returns:
            What the message of each site is to carry in addition; sites that are missing take no part in the round.
        """

    def end(self, consult: Consult) -> None:
        """After the last update, before `result`.

        Raises:
            ValueError: the sum cannot be had.
        """


class Transform:
    """Changes what travels, never what is learned; a subclass says only what it does, the rest does nothing.

    On the way back transforms are undone in reverse order. What one must remember is a `State` that it is given and
    gives back: a site keeps its own, the server's is part of the server's state, so that a resumed run goes on with it.
    One that keeps account (`guarantee`) leaves two numbers in it: ``epsilon``, what has been spent, and ``spent``, 1
    when another round costs more than there is; a site tells the server both.
    """

    name: str
    """Under which it remembers and is reported; unique in a run."""
    guarantee: Guarantee | None = None
    """What its account is about; None where it keeps none."""

    hides_updates: bool = False
    """Whether the server must not look at single updates, and notes nothing about them; an `accumulator` implies it."""
    least: int = 1
    """Fewest updates that a mean may be made of."""
    least_here: int = 1
    """At a site: fewest sites of a sum that it lets its update into; its terms may ask for more."""
    hides_time: bool = False
    """Whether how long a site trains would tell what it hides; then no time leaves the site."""
    secret_rounds: bool = False
    """Whether what it promises counts on nobody knowing which sites a round draws, not even with the run's seed."""
    lives_in: Literal["state", "site", "run"] = "state"
    """Where its site side remembers: in what the site keeps; in the one process that serves the site while a round
    lasts; or in the one process of the whole run."""

    def check(self, algorithm: ServerHalf) -> None:
        """Refuse a method that this transform cannot serve, before anything runs.

        Raises:
            ValueError: naming the declared group or need that forbids it.
        """

    def refusal(self, memory: State) -> str:
        """At a site, before it trains: why it does not; empty when it does."""
        return ""

    def consulted(self, site: str, stage: str, message: State) -> State:
        """At a site: answer the transform's server side; the stage ``train`` is what came along with the training task.

        Raises:
            ValueError: there is no answer; the message travels, and names nothing of the site's data.
        """
        raise ValueError(f"{self.name!r} has nothing to talk about")

    def on_client(self, update: Update, memory: State, seed: int) -> tuple[Update, State]:
        """Before the update leaves the site."""
        return update, memory

    def on_arrival(self, update: Update) -> Update:
        """At the server, before anything reads the update."""
        return update

    def accumulator(self) -> Accumulator | None:
        """How updates are added up that must not be read one by one; None leaves the mean in the clear."""
        return None

    def on_server(self, mean: State, cohort: Cohort, memory: State, seed: int) -> tuple[State, State]:
        """After the mean was taken."""
        return mean, memory


@dataclass(frozen=True)
class RoundRecord:
    """What happened in one round, as rows for the run's tables; `scores` are those of its validation."""

    round: int
    seconds: float
    scores: list[Row] = field(default_factory=list)
    rounds: list[Row] = field(default_factory=list)
    traffic: list[Row] = field(default_factory=list)
    events: list[Row] = field(default_factory=list)
    updates: list[Row] = field(default_factory=list)
    privacy: list[Row] = field(default_factory=list)
    audit: list[Row] = field(default_factory=list)


class Observer(Protocol):
    """Told what happens; it cannot change it."""

    def round_started(self, round: int, rounds: int, sites: Sequence[str]) -> None:
        """A round begins with these sites."""

    def site_done(self, task: str, round: int, site: str, scalars: Mapping[str, float], seconds: float) -> None:
        """A site has answered a task."""

    def round_done(self, record: RoundRecord) -> None:
        """A round has ended; record 0 is the introduction, and one after the last round may be a publication."""


class Silent:
    """An observer that heeds nothing; one that heeds a part of what happens derives from it."""

    def round_started(self, round: int, rounds: int, sites: Sequence[str]) -> None:
        """Nothing."""

    def site_done(self, task: str, round: int, site: str, scalars: Mapping[str, float], seconds: float) -> None:
        """Nothing."""

    def round_done(self, record: RoundRecord) -> None:
        """Nothing."""
