"""Sites of one machine side by side: processes that answer tasks, forked from the one that holds the data."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic

import torch

from fedseg.federation.contract import Evaluate, S, Task, W
from fedseg.federation.state import State, Update, from_bytes, to_bytes
from fedseg.federation.transport import InProcess

PATIENCE = 5.0  # seconds after which a process that waits looks whether its parent is still there


class WorkersError(RuntimeError):
    """A process that answers tasks ended on its own."""


class SideBySide(Generic[W, S]):
    """Answers of several sites at a time, with the results of `InProcess`, bit for bit.

    Processes are forked when the first task comes: they share the data, and each has a worker of its own. Answers are
    handed on in the order of the tasks.

    Args:
        inner: what answers one task after the other; it keeps what sites keep.
        count: how many processes.
        threads: of PyTorch in each of them.
    """

    def __init__(self, inner: InProcess[W, S], count: int, threads: int) -> None:
        self.inner = inner
        self._count, self._threads = count, threads
        self._processes: list[tuple[BaseProcess, Connection]] = []

    @property
    def sites(self) -> Mapping[str, S]:
        """All that can be asked."""
        return self.inner.sites

    def scored_by(self, evaluate: Evaluate[W, S]) -> InProcess[W, S]:
        """One task after the other, by something else that scores, which may remember what it saw."""
        return self.inner.scored_by(evaluate)

    def kept(self) -> Mapping[str, State]:
        """What every site keeps."""
        return self.inner.kept()

    def restore(self, kept: Mapping[str, State], at: Mapping[str, int] | None = None) -> None:
        """Continue from what sites kept earlier."""
        self.inner.restore(kept, at)

    def ask(self, tasks: Mapping[str, Task], messages: Mapping[str, State]) -> Iterator[Update]:
        """Answer the tasks; an error carries site, task and round."""
        if len(tasks) < 2:
            yield from self.inner.ask(tasks, messages)
            return
        waiting, answers = list(tasks), dict[str, Any]()
        idle, busy = [connection for _, connection in self._running()], dict[Connection, str]()
        try:
            for name in tasks:
                while name not in answers:
                    while idle and waiting:
                        connection, next_ = idle.pop(), waiting.pop(0)
                        kept = self.inner.kept().get(next_, State())
                        connection.send((next_, tasks[next_], to_bytes(messages[next_]), to_bytes(kept)))
                        busy[connection] = next_
                    for ready in wait(list(busy)):
                        assert isinstance(ready, Connection)
                        answers[busy.pop(ready)] = self._received(ready)
                        idle.append(ready)
                yield self._taken(name, answers.pop(name))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End all processes."""
        for process, connection in self._processes:
            connection.close()
            process.terminate()
            process.join()
        self._processes = []

    def __del__(self) -> None:
        self.close()

    def _running(self) -> list[tuple[BaseProcess, Connection]]:
        context = multiprocessing.get_context("fork")
        while len(self._processes) < self._count:
            ours, theirs = context.Pipe()
            others = [connection for _, connection in self._processes]
            process = context.Process(target=self._serve, args=(theirs, [ours, *others], os.getpid()), daemon=True)
            process.start()
            theirs.close()
            self._processes.append((process, ours))
        return self._processes

    @staticmethod
    def _received(connection: Connection) -> Any:
        try:
            return connection.recv()
        except (EOFError, ConnectionError) as error:
            raise WorkersError(
                "a process that answers for sites ended on its own, perhaps for want of memory; take fewer "
                "(trainer.workers)"
            ) from error

    def _taken(self, name: str, answer: Any) -> Update:
        kind, *told = answer
        if issubclass(kind, Exception):
            raise kind(*told)
        sent, examples, refusal, kept, rows = told
        update = from_bytes(sent)
        self.inner.remember(name, from_bytes(kept))
        return Update(update.tensors, update.scalars, site=name, examples=examples, refusal=refusal, rows=rows)

    def _serve(self, connection: Connection, others: list[Connection], parent: int) -> None:
        """In a process of its own: answer until the parent ends."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for other in others:
            other.close()
        torch.set_num_threads(self._threads)
        while True:
            while not connection.poll(PATIENCE):
                if os.getppid() != parent:
                    return
            try:
                name, task, message, kept = connection.recv()
            except EOFError:
                return
            connection.send(self._answer(name, task, from_bytes(message), from_bytes(kept)))

    def _answer(self, name: str, task: Task, message: State, kept: State) -> tuple[Any, ...]:
        """The kind of what happened, and of an update all that there is to tell; of an error its message."""
        self.inner.restore({name: kept})
        try:
            (update,) = self.inner.ask({name: task}, {name: message})
        except Exception as error:
            return _sendable(error)
        sent, now = to_bytes(update), to_bytes(self.inner.kept()[name])
        return (Update, sent, update.examples, update.refusal, now, update.rows)


def _sendable(error: Exception) -> tuple[type, str]:
    """An error's kind and message; the kind is another one where it takes more than a message."""
    kind = type(error)
    try:
        kind(str(error))
    except TypeError:
        return WorkersError, f"{kind.__name__}: {error}"
    return kind, str(error)
