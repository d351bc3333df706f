"""Flower's grid and messages without processes: what is sent goes through the very bytes that Flower would send."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from fedseg.federation.checkpoint import Checkpoint
from fedseg.federation.contract import EvaluateTask, QueryTask, Row, Task
from fedseg.federation.engine import POOL, Federation
from fedseg.federation.flower.client import SiteClient
from fedseg.federation.flower.envelope import Envelope
from fedseg.federation.flower.records import Facts, Question
from fedseg.federation.flower.transport import FlowerTransport
from fedseg.federation.schedule import Schedule
from fedseg.federation.state import State
from fedseg.federation.terms import Terms
from fedseg.federation.transport import InProcess
from tests.world import CPU, Outcome, Quiet, ToySite, build, evaluate, toy_sites

RUN = "0123456789abcdef" * 2


def through_bytes(message: Message) -> Message:
    """As SuperLink and SuperNode carry it: every object on its own, as bytes; equal blocks once."""
    number = message.object_id
    contents = {name: obj.deflate() for name, obj in get_all_nested_objects(message).items()}
    read: Any = inflate_object_from_contents(number, contents)
    read.metadata.__dict__["_message_id"] = number
    return read


class LoopbackGrid:
    """One ClientApp per node, in this process; `silent` nodes never answer."""

    def __init__(self, apps: Mapping[int, ClientApp]) -> None:
        self.apps = dict(apps)
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # as a ServerApp's process has
        self.silent: set[int] = set()
        self.clients: dict[int, SiteClient] = {}
        self.way: FlowerTransport | None = None
        self.sent: list[Message] = []
        self.replies: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        return list(self.apps)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        numbers = []
        for message in messages:
            arrived = through_bytes(message)
            number = arrived.metadata.message_id
            numbers.append(number)
            self.sent.append(arrived)
            node = message.metadata.dst_node_id
            if node not in self.silent:
                context = Context(0, node, {}, RecordDict(), {})
                self.replies[number] = through_bytes(self.apps[node](arrived, context))
        return numbers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.replies.pop(number) for number in message_ids if number in self.replies]


class ToyOpen:
    """A toy site with its worker."""

    def __init__(self, way: InProcess, site: ToySite) -> None:
        self.transport = way
        self.site = site

    def forbids(self, task: Task) -> str:
        return Terms().forbids(task)

    def facts(self) -> Facts:
        return Facts(self.site.name, self.site.seen, 3, self.site.examples)

    def release(self, before: State, after: State) -> None:
        """Toy sites have no terms, and nothing to account for."""

    def told(self, task: EvaluateTask, rows: list[Row]) -> list[Row]:
        return []


def app_of(answer: Callable[[Envelope], Envelope]) -> ClientApp:
    app = ClientApp()

    def handle(message: Message, context: Context) -> Message:
        return Message(answer(Envelope.from_records(message.content)).to_records(), reply_to=message)

    for register in (app.train(), app.evaluate(), app.query()):
        register(handle)
    return app


def toy_client(name: str, site: ToySite, folder: Path, transforms: Any = (), **knobs: Any) -> SiteClient:
    """A site that rebuilds its worker for every message, as a process per message would."""

    def open_site(question: Question, run: Path) -> ToyOpen:
        return ToyOpen(InProcess(build(name, **knobs), {site.name: site}, CPU, evaluate, transforms), site)

    return SiteClient(site.name, folder, open_site)


def federate(
    name: str,
    folder: Path,
    rounds: int = 2,
    *,
    schedule: Mapping[str, Any] | None = None,
    sites: Mapping[str, ToySite] | None = None,
    before: Callable[[LoopbackGrid, dict[str, int]], None] | None = None,
    timeout: float = 20.0,
    transforms: Sequence[Any] = (),
    site_transforms: Callable[[], Sequence[Any]] = tuple,
    **knobs: Any,
) -> Outcome:
    """`tests.world.simulate`, through Flower's messages; the sites' states lie under the folder.

    The server has `transforms`, every site some of its own from `site_transforms`: nothing is shared in memory.
    """
    sites = {site: data for site, data in (sites or toy_sites()).items() if site != POOL}
    knobs["rounds"] = rounds  # as the run's settings tell every site
    nodes = {site: 100 + number for number, site in enumerate(sites)}
    clients = {s: toy_client(name, data, folder / s, site_transforms(), **knobs) for s, data in sites.items()}
    grid: Any = LoopbackGrid({nodes[site]: app_of(client.answer) for site, client in clients.items()})
    grid.clients = {nodes[site]: client for site, client in clients.items()}
    way = FlowerTransport(grid, Question("hello", RUN, ""), timeout=timeout, poll=0.001)
    grid.way = way
    way.meet(tuple(sites), 1, 0.0)
    if before is not None:
        before(grid, nodes)
    checkpoint, observer = Checkpoint(folder / "server"), Quiet()
    way.goes_back_to = lambda site: {checkpoint.round}
    seen = [site for site, data in sites.items() if data.seen]
    settings = Schedule(rounds=rounds, **{"local_steps": 3, **(schedule or {})})
    federation = Federation(build(name, **knobs), way, seen, settings, 7, checkpoint, observer, transforms)
    server = federation.run()
    return Outcome(server, {site: latest(folder / site) for site in sites}, observer, federation)


def latest(folder: Path) -> State:
    from fedseg.federation.flower.kept import Kept

    return Kept(folder / RUN / "kept").before(QueryTask("publish", 99999, 0))
