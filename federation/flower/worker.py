"""A process at the site that stays, since Flower starts a new one for every message and imports alone cost seconds.

Flower's process hands the message over through a socket in the file system, which no other machine and no other user
can reach, and passes the answer on. The worker ends when the SuperNode's process ends, after a while without messages,
or when the code changes. Imports nothing heavy.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

from fedseg.common.files import write_atomic
from fedseg.common.processes import lives
from fedseg.federation.flower.envelope import MOST_DATA, MOST_TEXT, Envelope

START_WITHIN, IDLE, WATCH = 300.0, 3600.0, 1.0
"""Seconds: for a worker to import everything; without a message until it ends; between two looks at its parent."""
STOP = b"stop"
QUESTION = b"question"


class WorkerError(RuntimeError):
    """The worker did not start, or ended without an answer."""


@dataclass(frozen=True)
class Door:
    """Where a worker listens.

    Attributes:
        address: of the socket.
        key: what a caller must know.
        code: which code and settings it was started with.
        pid: its process.
    """

    address: str
    key: str
    code: str
    pid: int


def ask(folder: Path, command: Sequence[str], code: str, envelope: Envelope, cwd: Path) -> Envelope:
    """Hand a message to the site's worker, which is started if there is none.

    Args:
        folder: the site's own; where the worker's door is noted.
        command: starts a worker; the path of the door's file is added.
        code: a worker that was started with other code is replaced.
        envelope: the message.
        cwd: where the command is run.

    Raises:
        WorkerError: it does not start, or ends without an answer (out of memory, killed).
    """
    with _alone(folder):
        connection = _connect(folder, code) or _start(folder, command, code, cwd)
    with connection:
        try:
            connection.send_bytes(QUESTION)
            connection.send_bytes(envelope.text.encode())
            connection.send_bytes(envelope.data)
            return Envelope(connection.recv_bytes(MOST_TEXT).decode(), connection.recv_bytes(MOST_DATA))
        except (EOFError, OSError) as error:
            raise WorkerError("the site's worker ended before it answered (out of memory, or killed)") from error


def serve(door: Path, code: str, answer: Callable[[Envelope], Envelope], parent: int) -> None:
    """Answer messages until the parent ends, or none has come for a while.

    Args:
        door: file to note the address in.
        code: which code this is.
        answer: the site's answer.
        parent: process whose end ends this one.
    """
    home = tempfile.mkdtemp(prefix="site-")  # of this user alone; the site's folder may have too long a path
    key = secrets.token_bytes(32)
    watch = _Watch(parent, home)
    with Listener(f"{home}/socket", "AF_UNIX", authkey=key) as listener:
        _note(door, Door(f"{home}/socket", key.hex(), code, os.getpid()))
        while True:
            try:
                with listener.accept() as connection:
                    watch.busy = True
                    if connection.recv_bytes(16) == STOP:
                        break
                    question = Envelope(connection.recv_bytes(MOST_TEXT).decode(), connection.recv_bytes(MOST_DATA))
                    found = answer(question)
                    connection.send_bytes(found.text.encode())
                    connection.send_bytes(found.data)
            except (EOFError, OSError, AuthenticationError):
                continue  # the caller was killed; the next one asks again
            finally:
                watch.rest()
    shutil.rmtree(home, ignore_errors=True)


def code_of(*parts: str) -> str:
    """A short name for code and settings."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


class _Watch(threading.Thread):
    """Ends the process when its parent has ended, or when it has had nothing to do for long."""

    def __init__(self, parent: int, home: str) -> None:
        super().__init__(daemon=True)
        self.parent, self.home = parent, home
        self.busy = False
        self.last = time.monotonic()
        self.start()

    def rest(self) -> None:
        """Nothing to do from now on."""
        self.busy, self.last = False, time.monotonic()

    def run(self) -> None:
        """Look again and again."""
        while lives(self.parent) and (self.busy or time.monotonic() - self.last < IDLE):
            time.sleep(WATCH)
        shutil.rmtree(self.home, ignore_errors=True)
        os._exit(0)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One caller at a time looks for the worker, so that only one is started."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "worker.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _connect(folder: Path, code: str) -> Connection | None:
    """A connection to the worker that is there; one with other code is asked to stop."""
    try:
        door = Door(**json.loads((folder / "worker.json").read_text(encoding="utf-8")))
        connection = Client(door.address, "AF_UNIX", authkey=bytes.fromhex(door.key))
    except (OSError, EOFError, ValueError, TypeError, AuthenticationError):
        return None
    if door.code == code:
        return connection
    with connection:
        connection.send_bytes(STOP)
    return None


def _start(folder: Path, command: Sequence[str], code: str, cwd: Path) -> Connection:
    door = folder / "worker.json"
    door.unlink(missing_ok=True)
    with (folder / "worker.log").open("ab") as log:
        process = subprocess.Popen([*command, str(door)], cwd=cwd, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    deadline = time.monotonic() + START_WITHIN
    while time.monotonic() < deadline and process.poll() is None:
        if door.exists() and (connection := _connect(folder, code)) is not None:
            return connection
        time.sleep(0.05)
    process.kill()
    raise WorkerError(f"the site's worker did not start; see {folder / 'worker.log'}")


def _note(path: Path, door: Door) -> None:
    write_atomic(path, json.dumps(asdict(door)), private=True)
