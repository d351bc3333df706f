"""A site's end: it answers the server's questions, and keeps what is its own on its own disk."""

from __future__ import annotations

import errno
import logging
import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from fedseg.common.files import write_atomic
from fedseg.federation.checkpoint import CheckpointError
from fedseg.federation.contract import EvaluateTask, MessageError, Row, Task, Transport
from fedseg.federation.flower.envelope import Envelope
from fedseg.federation.flower.held import Held
from fedseg.federation.flower.kept import AFTER, Kept, stage
from fedseg.federation.flower.keys import SiteKey
from fedseg.federation.flower.records import Answer, Facts, Question, pack, sealed, unpack
from fedseg.federation.ledger import LEDGER, Ledger, canonical, digests, receipt, text_digest
from fedseg.federation.state import State, in_one_piece, to_bytes

RUN = re.compile(r"[0-9a-f]{32}")
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class RefusedError(Exception):
    """A site cannot take part; the message may travel: it names neither files nor cases of the site."""


class OpenSite(Protocol):
    """One site with its data and its worker, ready for turns of one run."""

    @property
    def transport(self) -> Transport:
        """The worker and what it trains on."""

    def forbids(self, task: Task) -> str:
        """Which of the site's terms stands against a task; empty if none does."""

    def facts(self) -> Facts:
        """What the site tells of itself."""

    def release(self, before: State, after: State) -> None:
        """Note what leaves with a turn, before it does, from what the site kept before and after the turn.

        Raises:
            RefusedError: it would be more than the site's terms, or the run's limit, allow.
        """

    def told(self, task: EvaluateTask, rows: Sequence[Row]) -> Sequence[Row]:
        """File the scores of a turn at the site, and give those that the server may see."""


class SiteClient:
    """Answers questions, one at a time.

    Args:
        site: its name.
        folder: the site's own; one folder for each run is made in it.
        open_site: prepares data and worker for the run of a question, in the folder of that run.
        holds: whether this process holds the tensors of the last message, so that they need not come again; for a site
            whose next message another process may answer, False.
    """

    def __init__(
        self, site: str, folder: Path, open_site: Callable[[Question, Path], OpenSite], holds: bool = True
    ) -> None:
        self.site = site
        self.folder = folder
        self.open_site = open_site
        self._held = Held(holds)

    def answer(self, envelope: Envelope) -> Envelope:
        """The answer, whatever happens: what goes wrong here is told in full in the site's own log only."""
        try:
            question, came = unpack(envelope, Question)
            message, lacks = self._held.take(question, came)
            if lacks:
                return pack(Answer(self.site, lacks=lacks))
            answer, state = self._answer(question, message)
            answer = replace(answer, holds=self._held.digests)
            return self.signed(envelope.text, question, message, answer, state)
        except Exception as error:
            self._log(error)
            return pack(Answer(self.site, refusal=_told(error)))

    def signed(self, text: str, question: Question, message: State, answer: Answer, state: State) -> Envelope:
        """The answer under the site's name, once its receipt is in the site's own ledger.

        Args:
            text: of the question as it came.
            question: what it says.
            message: what came with it.
            answer: the answer.
            state: what goes with it.
        """
        state = in_one_piece(state)
        found, key = pack(answer, state), SiteKey(self.folder, self.site)
        seal = {"question": text_digest(text), "answer": text_digest(found.text), "examples": answer.examples}
        shown = digests(message, dict(self._held.known))
        own = receipt(question.run, self.site, question.about, question.head, shown, digests(state), seal)
        signs = canonical(own)
        log = Ledger(self.folder / question.run / LEDGER, whole=False)
        log.append({**own, "key": key.public, "signature": key.sign(signs)})
        return sealed(found, key, signs)

    def _answer(self, question: Question, message: State) -> tuple[Answer, State]:
        if not RUN.fullmatch(question.run):
            raise RefusedError("the run's name is not one of ours")
        if question.site not in ("", self.site):
            raise RefusedError("another site was meant")
        folder = self.folder / question.run
        if question.task is None and message.tensors:  # what every site starts from comes along with the greeting
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / "start.safetensors", to_bytes(message))
        opened = self.open_site(question, folder)
        if question.task is None:
            return Answer(self.site, facts=opened.facts()), State()
        return self._turn(opened, Kept(folder / "kept"), question, question.task, message)

    def _turn(
        self, opened: OpenSite, kept: Kept, question: Question, task: Task, message: State
    ) -> tuple[Answer, State]:
        if term := opened.forbids(task):
            raise RefusedError(f"its terms forbid this, whatever the run's settings say ({term})")
        before = kept.before(task, question.base)
        opened.transport.restore({self.site: before})
        (update,) = opened.transport.ask({self.site: task}, {self.site: message})
        after = opened.transport.kept()[self.site]
        opened.release(before, after)
        if after is not before and stage(task) < AFTER:
            kept.keep(task, after)
        rows = opened.told(task, update.rows) if isinstance(task, EvaluateTask) else ()
        kept.forget(question.needed)
        answer = Answer(self.site, update.examples, update.refusal, rows=tuple(dict(row) for row in rows))
        return answer, State(update.tensors, update.scalars)

    def _log(self, error: Exception) -> None:
        logging.getLogger(__name__).error("site %s: %s", self.site, error, exc_info=error)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "site.log").open("a", encoding="utf-8") as log:
                log.write("".join(traceback.format_exception(error)) + "\n")
        except OSError:
            pass  # the disk is full, which is then what the answer says


def _told(error: Exception) -> str:
    """What may be said elsewhere about an error at the site."""
    if isinstance(error, RefusedError | MessageError):
        return str(error)
    if isinstance(error, OSError) and error.errno in DISK:
        return f"it cannot keep its state: its disk is full or read-only ({errno.errorcode[error.errno]})"
    if isinstance(error, CheckpointError):
        return "a file that it kept is damaged; the site's log names it"
    return f"an error ({type(error).__name__}); the site's log tells it"
