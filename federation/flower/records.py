"""Questions to sites and their answers, as envelopes and back. What arrives is checked before it is believed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from fedseg.common.text import printable
from fedseg.federation.contract import MessageError, Row, Task, TrainTask
from fedseg.federation.flower.envelope import Envelope
from fedseg.federation.flower.keys import SiteKey
from fedseg.federation.ledger import about
from fedseg.federation.state import State, Update, from_bytes, to_bytes
from fedseg.federation.terms import Terms

Cell = bool | int | float | str
NUMBERS = {"train": ("steps",), "evaluate": ("seconds",)}
"""Numbers that the answer to a task must hold; how long it trained a site need not tell (`Transform.hides_time`)."""
MOST_ROWS = 200_000
NUMBER = 8
"""Bytes of a number."""
MOST_ENTRIES, MOST_SETTING, MOST_VERSION = 64, 65_536, 200
"""Of what a greeting tells: entries of a table, characters of a setting (regions may be many), and of other words."""


@dataclass(frozen=True)
class Question:
    """What the server asks one site.

    Attributes:
        kind: ``hello`` asks what the site is; ``turn`` gives it a task.
        run: identifies the run at the site: 32 hexadecimal digits.
        config: the run's settings, as YAML.
        channels: of the images at all sites; 0 while the sites have not told theirs.
        task: of a turn.
        site: who is asked.
        base: the round at whose end the site kept what it starts from; -1 lets the task's round decide.
        needed: ends of rounds that the server may come back to; the site keeps what it had then.
        earlier: the run whose encoder is the start of this one, if it was one of these sites.
        head: hash of the last entry of the run's ledger; of a greeting, a number that was never used before.
        held: group -> digest, of groups that do not come along since the site holds them (`federation.flower.held`).
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")  # of its task, too

    kind: Literal["hello", "turn"]
    run: str
    config: str
    site: str = ""
    channels: int = 0
    task: Annotated[Task, Field(discriminator="kind")] | None = None
    base: int = -1
    needed: tuple[int, ...] = ()
    earlier: str = ""
    head: str = ""
    held: dict[str, str] = field(default_factory=dict)

    @property
    def about(self) -> Row:
        """What a receipt tells of it."""
        return {"what": self.kind, "round": 0} if self.task is None else about(self.task)


@dataclass(frozen=True)
class Facts:
    """What a site tells of itself before anything else.

    Attributes:
        site: its name.
        seen: whether it trains.
        channels: of its images.
        examples: labelled training images.
        settings: what must be the same at every site, as text: regions, size, classes.
        versions: of the libraries that numbers depend on.
        images: training images, labelled or not.
        terms: its own.
    """

    site: str
    seen: bool
    channels: int
    examples: int
    settings: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    images: int = 0
    terms: Terms = field(default_factory=Terms)

    @property
    def most(self) -> int:
        """The most training images that an update of this site may be made of; some transforms tell 1 for any."""
        return max(self.examples, self.images, 1)


@dataclass(frozen=True)
class Answer:
    """What a site answers.

    Attributes:
        site: who answers.
        examples: training images behind an update.
        refusal: why there is no answer; empty when there is one. It names neither files nor cases of the site.
        facts: answer to a hello.
        rows: scores that the site shows to the server.
        holds: digests of the groups of tensors that the site holds from now on.
        lacks: groups that did not come along and that the site does not hold: it asks for the whole message.
    """

    site: str
    examples: int = 0
    refusal: str = ""
    facts: Facts | None = None
    rows: tuple[dict[str, Cell | None], ...] = ()
    holds: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Signature:
    """Below an answer: who signed its receipt.

    Attributes:
        key: the site's public key.
        signature: of the receipt (`federation.ledger.receipt`), which both sides make from what they have.
    """

    key: str = ""
    signature: str = ""


T = TypeVar("T", Question, Answer)
_READERS: dict[type[Any], TypeAdapter[Any]] = {kind: TypeAdapter(kind) for kind in (Question, Answer, Signature)}
_WRONG = {"union_tag_invalid": ": no such kind", "unexpected_keyword_argument": ": no such field"}


def pack(content: Question | Answer, state: State | None = None) -> Envelope:
    """Put a question or an answer, with a state, into an envelope."""
    text = _READERS[type(content)].dump_json(content).decode()
    return Envelope(text, b"" if state is None else to_bytes(State(state.tensors, state.scalars)))


def unpack(envelope: Envelope, kind: type[T]) -> tuple[T, State]:
    """Read what `pack` wrote.

    Raises:
        ValueError: it is something else; the message quotes nothing of it but names of fields.
    """
    try:
        content: T = _READERS[kind].validate_json(envelope.text.partition("\n")[0], strict=True)
    except ValidationError as error:
        where = ", ".join(_place(*found["loc"]) + _WRONG.get(found["type"], "") for found in error.errors()[:3])
        raise MessageError(f"the {kind.__name__.lower()} cannot be read ({where})") from error
    return content, from_bytes(envelope.data) if envelope.data else State()


def _place(*parts: str | int) -> str:
    """Where in a message something stands."""
    return ".".join(printable(str(part)[:24]) for part in parts) or "text"


def size_of(envelope: Envelope) -> int:
    """Bytes of a message."""
    return len(envelope.text.encode()) + len(envelope.data)


def unread(envelope: Envelope) -> dict[str, tuple[int, int]]:
    """What came in a message that cannot be read."""
    return {"(unread)": (0, size_of(envelope))}


def beside(envelope: Envelope, answer: Answer, update: Update) -> dict[str, tuple[int, int]]:
    """What came with the tensors and numbers of an answer: rows of scores, and the names and fields around it all."""
    rows = len(json.dumps(answer.rows).encode()) if answer.rows else 0
    rest = size_of(envelope) - sum(update.sizes().values()) - NUMBER * len(update.scalars) - rows
    return {**({"(scores)": (len(answer.rows), rows)} if rows else {}), "(form)": (0, rest)}


def sealed(envelope: Envelope, key: SiteKey, text: str) -> Envelope:
    """An answer with a signature of its receipt, on a line of its own."""
    below = _READERS[Signature].dump_json(Signature(key.public, key.sign(text))).decode()
    return Envelope(f"{envelope.text}\n{below}", envelope.data)


def signature_of(envelope: Envelope) -> tuple[str, Signature]:
    """The text above the signature, and the signature; an empty one where there is none that can be read."""
    text, _, below = envelope.text.partition("\n")
    try:
        found: Signature = _READERS[Signature].validate_json(below, strict=True)
    except ValidationError:
        return text, Signature()
    return text, found


def oversized(facts: Facts) -> str:
    """What of a greeting is too large to be kept, logged and listed; empty if nothing is."""
    for told, longest in (("settings", MOST_SETTING), ("versions", MOST_VERSION)):
        table: dict[str, str] = getattr(facts, told)
        if len(table) > MOST_ENTRIES or any(len(key) > MOST_VERSION or len(v) > longest for key, v in table.items()):
            return f"its {told} are more than {MOST_ENTRIES}, or longer than {longest} characters"
    for term in ("methods", "views"):
        names: tuple[str, ...] = getattr(facts.terms, term)
        if len(names) > MOST_ENTRIES or any(len(name) > MOST_VERSION for name in names):
            return f"the {term} of its terms are more than {MOST_ENTRIES}, or longer than {MOST_VERSION} characters"
    return ""


def checked_update(answer: Answer, state: State, facts: Facts, task: Task) -> Update:
    """The update that an answer carries; what its tensors may be is for `federation.admission`, once they are decoded.

    Raises:
        ValueError: another site's name, or numbers that are missing or no numbers.
    """
    site = facts.site
    if answer.site != site:
        raise ValueError("it carries another site's name")
    if answer.refusal:
        return Update(site=site, examples=0, refusal=printable(answer.refusal[:500]))
    if answer.lacks:
        raise ValueError("it says that it lacks tensors that it was sent")
    if answer.examples < 0:
        raise ValueError("it tells a negative number of images")
    if answer.examples > facts.most:
        raise ValueError(f"it tells {answer.examples} training images, its greeting told {facts.most}")
    if len(answer.rows) > MOST_ROWS:
        raise ValueError(f"it shows {len(answer.rows)} rows of scores, at most {MOST_ROWS} are let in")
    if isinstance(task, TrainTask) and task.steps is not None and state.scalars.get("steps", 0.0) > task.steps:
        raise ValueError(f"it tells {state.scalars['steps']:g} steps, {task.steps} were asked for")
    for name, value in state.scalars.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name[:60]!r} is not a number")
    missing = [name for name in NUMBERS.get(task.kind, ()) if not math.isfinite(state.scalars.get(name, math.nan))]
    if missing:
        raise ValueError(f"it lacks {' and '.join(missing)}")
    scalars = {name: float(value) for name, value in state.scalars.items()}
    return Update(tensors=state.tensors, scalars=scalars, site=site, examples=answer.examples)
