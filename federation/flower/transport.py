"""The server's end: asks sites through Flower's grid. Whatever a site does, the round has a defined outcome."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from flwr.app import Message
from flwr.common.constant import ErrorCode

from fedseg.common.text import nameless, printable, quoted
from fedseg.federation.contract import Row, Task
from fedseg.federation.flower.envelope import Envelope
from fedseg.federation.flower.held import broadcasts, spared, without
from fedseg.federation.flower.keys import Pins, signed
from fedseg.federation.flower.records import (
    Answer,
    Facts,
    Question,
    beside,
    checked_update,
    oversized,
    pack,
    signature_of,
    size_of,
    unpack,
    unread,
)
from fedseg.federation.ledger import START, canonical, digests, receipt, text_digest
from fedseg.federation.state import State, Update

if TYPE_CHECKING:
    from flwr.serverapp import Grid  # importing it loads all of Flower's strategies

TYPES = {"train": "train", "evaluate": "evaluate", "publish": "evaluate", "introduce": "query", "consult": "query"}
TOLD = {
    ErrorCode.LOAD_CLIENT_APP_EXCEPTION: "its SuperNode cannot load the app (is everything installed there?)",
    ErrorCode.CLIENT_APP_RAISED_EXCEPTION: "its app failed; the SuperNode's log says why",
    ErrorCode.MESSAGE_UNAVAILABLE: "the message did not reach it completely",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "its answer did not arrive completely",
    ErrorCode.NODE_UNAVAILABLE: "its SuperNode is not connected any more",
    ErrorCode.INVALID_FAB: "its SuperNode does not trust the app: sign it, see docs/deployment.md",
    ErrorCode.CLIENT_APP_CRASHED: "its app was killed",
}


PATIENCE, LONGEST = 0.03, 5.0
"""Between two looks for answers: that share of the time waited so far, at most so many seconds. A look costs the
SuperLink work, and sites train for minutes."""
GRACE = 60.0
"""Seconds that a message stays valid after nobody waits for its answer: after them no site begins to work on it."""
GREET = "greet"
LACKS = "(lacks)"
"""What an answer is called that asks for the whole message."""
UNSENT = "the message could not be sent"
NOTHING: frozenset[str] = frozenset()


class NotConnectedError(RuntimeError):
    """The sites that should take part do not."""


def _nowhere(_site: str) -> Collection[int]:
    return ()


def _start() -> str:
    return START


def _anything(_row: Row) -> bool:
    return True


@dataclass(frozen=True)
class Asked:
    """What a site was asked last.

    Attributes:
        question: what it was asked.
        text: the question as it travelled.
        shown: digests of the message.
        held: digests of what the site held before.
    """

    question: Question
    text: str
    shown: dict[str, str]
    held: frozenset[str] = NOTHING


@dataclass(frozen=True)
class Post:
    """A message that is to be sent.

    Attributes:
        site: to whom; empty while its name is not known.
        task: what it is about.
        message: its tensors.
        write: makes the envelope; of the whole message, if that is said.
    """

    site: str
    task: str
    message: State
    write: Callable[[bool], Envelope]


@dataclass
class FlowerTransport:
    """Sites on other machines.

    Attributes:
        grid: Flower's way to the nodes.
        question: of this run; every message is a copy of it.
        timeout: seconds to wait for a site's answer.
        poll: least seconds between two looks for answers.
        sites: name -> what the site told of itself; filled by `meet`.
        pins: which name belongs to which key.
        head: tells the hash of the last entry of the run's ledger.
        known: tells digests of tensors, by identity, that were made of the messages to be sent.
        greeted: site (empty where it gave no name) and bytes of every greeting that came.
        sent: of every message that went to a site (empty in greetings): site, task, its bytes, and bytes of tensors
            that did not travel since the site holds them.
        goes_back_to: rounds whose end the server may come back to, for a site.
        start: what every site is given with the greeting.
        is_score: whether a row that a site showed looks like a score; others are left out.
    """

    grid: Grid
    question: Question
    timeout: float
    poll: float = 0.2
    sites: dict[str, Facts] = field(default_factory=dict)
    pins: Pins = field(default_factory=Pins)
    head: Callable[[], str] = _start
    known: Callable[[], dict[int, str]] = dict
    greeted: list[tuple[str, int]] = field(default_factory=list)
    sent: list[Row] = field(default_factory=list)
    goes_back_to: Callable[[str], Collection[int]] = field(default=_nowhere)
    start: State = field(default_factory=State)
    is_score: Callable[[Row], bool] = _anything
    _nodes: dict[str, int] = field(default_factory=dict)
    _strangers: set[int] = field(default_factory=set)
    _asked: dict[str, Asked] = field(default_factory=dict)
    _holds: dict[str, frozenset[str]] = field(default_factory=dict)  # by the site's own last answer
    _lacked: dict[str, int] = field(default_factory=dict)
    _closed: bool = False
    _known: dict[int, str] = field(default_factory=dict)
    _base: dict[str, int] = field(default_factory=dict)

    # ---------------------------------------------------------------- who is there

    def meet(self, names: Collection[str], least: int, patience: float) -> None:
        """Wait until the sites are connected, and let them tell what they are.

        Args:
            names: sites that must be there; empty for whoever is there.
            least: how many must be there.
            patience: seconds to wait.

        Raises:
            NotConnectedError: they are not there in time, two have one name, or one cannot take part.
        """
        deadline = time.monotonic() + patience
        while True:
            self._greet(patience, names)
            missing = set(names) - set(self.sites)
            if not missing and len(self.sites) >= max(least, 1):
                break
            if time.monotonic() > deadline:
                there = ", ".join(sorted(self.sites)) or "none"
                wanted = f"not {', '.join(sorted(missing))}" if missing else f"{least} are needed"
                raise NotConnectedError(f"after {patience:g} s these sites are connected: {there}; {wanted}")
            time.sleep(self.poll)
        self._closed = True

    def agree(self, channels: int) -> None:
        """From now on sites are told how many channels the images of all of them have."""
        self.question = replace(self.question, channels=channels)

    def take_greetings(self) -> list[tuple[str, int]]:
        """Site and bytes of the greetings that came since the last call."""
        greeted, self.greeted = self.greeted, []
        return greeted

    def take_sent(self) -> list[Row]:
        """Messages that went to sites since the last call."""
        sent, self.sent = self.sent, []
        return sent

    def _greet(self, patience: float, names: Collection[str] = ()) -> None:
        """Ask nodes that are new what they are; a site imports and reads everything before its first answer.

        Raises:
            NotConnectedError: naming every node that cannot take part, but for sites that nobody asked for.
        """
        connected = set(self.grid.get_node_ids())
        self._nodes = {site: node for site, node in self._nodes.items() if node in connected}
        new = sorted(connected - set(self._nodes.values()) - self._strangers)
        question = replace(self.question, kind="hello", task=None, head=secrets.token_hex(32))
        hello = pack(question, self.start)
        self._asked[""] = Asked(question, hello.text, digests(self.start))
        posts = {node: Post("", GREET, self.start, lambda _whole: hello) for node in new}
        arrived = self._exchange(posts, max(patience, self.timeout))
        if refused := [why for node, envelope in arrived if (why := self._welcome(node, envelope, names))]:
            raise NotConnectedError("; ".join(refused))

    def _welcome(self, node: int, envelope: Envelope | str, names: Collection[str]) -> str:
        """Take a node in under the name that it gives; else why it cannot take part."""
        if isinstance(envelope, str):
            return f"a node (id {node}) cannot take part: {envelope}"
        self.greeted.append(("", size_of(envelope)))
        try:
            answer, state = unpack(envelope, Answer)
        except ValueError as error:
            return f"a node (id {node}) cannot take part: {error}"
        if reason := nameless(answer.site):
            return f"a node (id {node}) calls itself {quoted(answer.site)}, which is no name: {reason}"
        self.greeted[-1] = answer.site, size_of(envelope)
        if names and answer.site not in names:
            self._strangers.add(node)
            return ""
        if reason := self._unfit(answer) or self._foreign(envelope, answer, state):
            return f"site {answer.site!r} cannot take part: {reason}"
        facts = answer.facts
        if facts is not None and not self._closed:
            self.sites[answer.site] = facts
        if answer.site in self.sites:
            self._nodes[answer.site] = node
        return ""

    def _unfit(self, answer: Answer) -> str:
        """Why the greeting of a site lets it take no part; empty if it may."""
        if answer.refusal or answer.facts is None or answer.facts.site != answer.site:
            return printable(answer.refusal[:2000]) or "no facts came"
        if reason := oversized(answer.facts):
            return reason
        if answer.site in self._nodes:
            return "two connected nodes call themselves so; a site needs its own name"
        return ""

    def _foreign(self, envelope: Envelope, answer: Answer, state: State) -> str:
        """Why a greeting is not of the site whose name it gives; empty if it is."""
        _, below = signature_of(envelope)
        if not self._seal("", envelope, answer, state, below.key):
            return "its greeting is not signed"
        return self.pins.refusal(answer.site, below.key)

    def _seal(self, site: str, envelope: Envelope, answer: Answer, state: State, key: str) -> dict[str, Any]:
        """What a site signed of its answer; empty if this key did not sign it."""
        asked, question = self._asked[site], self._asked[site].question
        text, below = signature_of(envelope)
        seal = {"question": text_digest(asked.text), "answer": text_digest(text), "examples": answer.examples}
        sent = digests(state)
        own = receipt(question.run, answer.site, question.about, question.head, asked.shown, sent, seal)
        if not signed(key, canonical(own), below.signature):
            return {}
        return {**seal, "sent": sent, "signature": below.signature}

    # ---------------------------------------------------------------- the contract's transport

    def ask(self, tasks: Mapping[str, Task], messages: Mapping[str, State]) -> Iterator[Update]:
        """Updates in the order of the tasks; a site that fails sends a refusal that says why."""
        if set(tasks) - set(self._nodes):
            self._look_again()
        posts = {
            self._nodes[site]: Post(site, task.kind, messages[site], partial(self._write, site, task, messages[site]))
            for site, task in tasks.items()
            if site in self._nodes
        }
        answers: dict[int, Envelope | str] = {}
        self._known = self.known()
        arriving = self._exchange(posts, self.timeout, next(iter(tasks.values())).round if tasks else 0)
        for site, task in tasks.items():
            node = self._nodes.get(site, 0)
            while node in posts and node not in answers:
                arrived, answer = next(arriving)
                answers[arrived] = answer
            found = answers.pop(node, "it is not connected")
            yield self._update(site, task, found)

    def kept(self) -> Mapping[str, State]:
        """Nothing: sites keep their states on their own disks."""
        return {}

    def restore(self, kept: Mapping[str, State], at: Mapping[str, int] | None = None) -> None:
        """From now on these sites start from what they kept at the end of these rounds, the others from the latest."""
        self._base = dict(at or {})

    # ---------------------------------------------------------------- inside

    def _look_again(self) -> None:
        """Sites that were gone may be back; a stranger among them does not end the run."""
        with contextlib.suppress(NotConnectedError):
            self._greet(self.timeout)

    def _write(self, site: str, task: Task, message: State, whole: bool = False) -> Envelope:
        """The question, with those tensors of its message that the site does not hold, or with all of them."""
        shown, holds = digests(message, self._known), self._holds.pop(site, NOTHING)
        held = {} if whole or not broadcasts(task) else spared(message, shown, holds)
        question = replace(self.question, kind="turn", site=site, task=task, head=self.head(), held=held)
        needed, base = tuple(sorted(self.goes_back_to(site))), self._base.get(site, -1)
        question = replace(question, base=base, needed=needed)
        envelope = pack(question, without(message, held))
        self._asked[site] = Asked(question, envelope.text, shown, holds)
        return envelope

    def _update(self, site: str, task: Task, found: Envelope | str) -> Update:
        update = self._read(site, task, found)
        if lacked := self._lacked.pop(site, 0):
            update.beside = {**update.beside, LACKS: (0, lacked)}
        return update

    def _read(self, site: str, task: Task, found: Envelope | str) -> Update:
        if isinstance(found, str):
            return Update(site=site, examples=0, refusal=found)
        try:
            answer, state = unpack(found, Answer)
            update = checked_update(answer, state, self.sites[site], task)
        except ValueError as error:
            return Update(site=site, examples=0, refusal=f"its answer cannot be used: {error}", beside=unread(found))
        update.beside = beside(found, answer, update)
        update.seal = self._seal(site, found, answer, state, self.pins.keys[site])
        if update.seal:  # it can hold what it was shown now or, where this was nothing to hold, before
            asked = self._asked[site]
            self._holds[site] = frozenset(answer.holds) & (
                frozenset(asked.shown.values()) if broadcasts(task) else asked.held
            )
        if not update.refusal and not update.seal:
            update.refusal = "its answer is not signed by the key that its name belongs to"
        if not update.refusal:
            rows = ({**row, "site": site, "seen": self.sites[site].seen} for row in answer.rows)
            update.rows = [row for row in rows if self.is_score(row)]
        return update

    def _exchange(
        self, posts: Mapping[int, Post], timeout: float, round: int = 0
    ) -> Iterator[tuple[int, Envelope | str]]:
        """Send one message to each node, and yield the answers as they come; in the end, words for those missing."""
        waiting: dict[str, int] = {}
        for node, post in posts.items():  # one by one, so that one message is in memory
            if number := self._push(node, post, timeout, round):
                waiting[number] = node
            else:
                yield node, UNSENT
        start = time.monotonic()
        until = dict.fromkeys(waiting, start + timeout)
        while waiting:
            for reply in self.grid.pull_messages(list(waiting)):
                answered = reply.metadata.reply_to_message_id
                node = waiting.pop(answered, 0)
                if node not in posts:
                    continue
                found = _opened(reply)
                if self._lacks(posts[node], found):
                    if number := self._push(node, posts[node], timeout, round, whole=True):
                        waiting[number], until[number] = node, until[answered]
                        continue
                    found = UNSENT
                yield node, found
            now = time.monotonic()
            for number in [number for number in waiting if now >= until[number]]:
                yield waiting.pop(number), f"it did not answer within {timeout:g} s (deployment.timeout)"
            if waiting:
                left = min(until[number] for number in waiting) - now
                time.sleep(min(max(self.poll, PATIENCE * (now - start)), LONGEST, left))

    def _push(self, node: int, post: Post, timeout: float, round: int, whole: bool = False) -> str:
        """Send a message; its number, or nothing."""
        envelope = post.write(whole)
        size, kind = size_of(envelope), TYPES.get(post.task, "query")
        message = Message(envelope.to_records(), node, kind, ttl=timeout + GRACE, group_id=str(round))
        number = next(iter(self.grid.push_messages([message])), None)
        if number:
            sizes, held = post.message.sizes(), self._asked[post.site].question.held
            row = {"site": post.site, "task": post.task, "bytes": size, "held": sum(sizes[group] for group in held)}
            self.sent.append(row)
        return number or ""

    def _lacks(self, post: Post, found: Envelope | str) -> bool:
        """Whether a site does not hold what it was thought to hold; once, since it is sent everything then."""
        if isinstance(found, str) or found.data or not self._asked[post.site].question.held:
            return False
        try:
            answer, _ = unpack(found, Answer)
        except ValueError:
            return False  # whoever reads it says so
        if not answer.lacks:
            return False
        self._lacked[post.site] = size_of(found)
        return True


def _opened(reply: Message) -> Envelope | str:
    if reply.has_error():
        return TOLD.get(reply.error.code, f"Flower's error {reply.error.code}")
    try:
        return Envelope.from_records(reply.content)
    except ValueError as error:
        return f"its answer cannot be used: {error}"
