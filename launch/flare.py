"""The sites of `docs/deployment.md` behind NVIDIA FLARE: its server, clients and client API carry the very messages.

All three ends are here. `python -m fedseg.launch.flare job FOLDER KEY=VALUE ...` writes a job with the settings of a
run; `Run` is the job's workflow at the server; `python -m fedseg.launch.flare site` is what NVFlare starts at a site,
once for a job. No code travels: a job names these two, and runs what is installed. A message stays a text and a block
of safetensors (`federation.flower.envelope`), which NVFlare hands on as a string and an array of bytes.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity
from nvflare.apis.controller_spec import ClientTask, Task
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.signal import Signal
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

from fedseg.common.files import write_atomic
from fedseg.configs.compose import ConfigError, read_mapping
from fedseg.console import own_files, steady_output
from fedseg.federation.engine import RoundError
from fedseg.federation.flower.client import SiteClient
from fedseg.federation.flower.envelope import DATA, TEXT, Envelope
from fedseg.federation.flower.records import Answer, pack
from fedseg.launch import flower_server
from fedseg.launch.command import guarded
from fedseg.launch.experiment import Experiment
from fedseg.launch.run import read_settings
from fedseg.launch.sites.across import check_settings
from fedseg.launch.sites.site import Local, Opener
from fedseg.reporting.folder import file_name

SITES = "FEDSEG_SITES"
"""Environment variable of a site: the folder with its SITE.yaml, which holds what node-config holds under Flower."""
TASK = "fedseg"
WORKFLOW = "fedseg.launch.flare.Run"
SITE_COMMAND = "python3 -u -m fedseg.launch.flare site"
EXECUTOR = "nvflare.app_common.executors.client_api_executor.ClientAPIExecutor"


def to_model(envelope: Envelope, round: int | None = None) -> FLModel:
    """A message as NVFlare carries it; the block as an array, since it sends large arrays in pieces."""
    params = {TEXT: envelope.text, DATA: np.frombuffer(envelope.data, np.uint8)}
    return FLModel(params=params, current_round=round)


def from_model(model: FLModel) -> Envelope:
    """Read what `to_model` wrote.

    Raises:
        ValueError: it is something else.
    """
    params = model.params
    if not isinstance(params, Mapping) or set(params) != {TEXT, DATA}:
        raise ValueError(f"a message should hold {TEXT!r} and {DATA!r}; does a filter of NVFlare's change it?")
    text, data = params[TEXT], params[DATA]
    if not isinstance(text, str) or not isinstance(data, np.ndarray) or data.dtype != np.uint8:
        raise ValueError("a message should be a string and an array of bytes; does a filter of NVFlare's change it?")
    return Envelope(text, data.tobytes())


class Mail:
    """What `FlowerTransport` asks of Flower's grid, by tasks of NVFlare.

    Args:
        clients: names of the clients that are connected.
        send: gives a client a message that is valid for so many seconds; what it is given last it calls with the
            answer, and with None where there will be none.
        aborted: whether nobody waits for this run any more.
    """

    def __init__(
        self,
        clients: Callable[[], Iterable[str]],
        send: Callable[[str, FLModel, int, Callable[[FLModel | None], None]], None],
        aborted: Callable[[], bool],
    ) -> None:
        self._clients, self._send, self._aborted = clients, send, aborted
        self._names: list[str] = []
        self._asked: dict[str, Message] = {}
        self._arrived: dict[str, Message] = {}
        # without these, which Flower's own processes get from its SuperLink, it makes no Message
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1

    def get_node_ids(self) -> Collection[int]:
        """A number for each client, the same as long as the run lasts."""
        here = sorted(self._clients())
        self._names += [name for name in here if name not in self._names]
        return [1 + self._names.index(name) for name in here]

    def push_messages(self, messages: Iterable[Message]) -> Iterator[str]:
        """Give each message to its client as a task of its own."""
        for message in messages:
            about, number = message.metadata, uuid.uuid4().hex
            about.__dict__["_message_id"] = number
            self._asked[number] = message
            model = to_model(Envelope.from_records(message.content), int(about.group_id))
            self._send(self._names[about.dst_node_id - 1], model, int(about.ttl), partial(self._take, number))
            yield number

    def pull_messages(self, numbers: Iterable[str]) -> list[Message]:
        """Answers that came to these messages.

        Raises:
            RoundError: the job was aborted.
        """
        if self._aborted():
            raise RoundError("NVFlare ended the job; to go on, submit one with resume=true")
        return [self._arrived.pop(number) for number in numbers if number in self._arrived]

    def _take(self, number: str, model: FLModel | None) -> None:
        """NVFlare calls it, in threads of its own; only the first time counts."""
        message = self._asked.pop(number, None)
        if message is None:
            return
        if model is None:
            self._arrived[number] = Message(Error(ErrorCode.CLIENT_APP_CRASHED), reply_to=message)
            return
        try:
            content = from_model(model).to_records()
        except ValueError as error:  # it goes on empty, and is refused
            logging.getLogger(__name__).warning("an answer cannot be used: %s", error)
            content = RecordDict()
        self._arrived[number] = Message(content, reply_to=message)


class Run(Controller):
    """A run as the workflow of a job.

    Args:
        overrides: settings as on the command line of `train.py`.
    """

    def __init__(self, overrides: str) -> None:
        super().__init__()
        self.overrides = overrides

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """The run, whole; called by NVFlare's server, as all below."""
        engine = fl_ctx.get_engine()

        def send(name: str, model: FLModel, timeout: int, take: Callable[[FLModel | None], None]) -> None:
            def received(client_task: ClientTask, **_: Any) -> None:
                result, client_task.result = client_task.result, None  # it is large
                take(FLModelUtils.from_shareable(result) if result.get_return_code() == ReturnCode.OK else None)

            def done(**_: Any) -> None:
                take(None)

            content = FLModelUtils.to_shareable(model)
            task = Task(TASK, content, timeout=timeout, result_received_cb=received, task_done_cb=done)
            self.broadcast(task, fl_ctx, targets=[name])

        mail: Any = Mail(lambda: [client.name for client in engine.get_clients()], send, lambda: abort_signal.triggered)
        if guarded(partial(flower_server.run, mail), shlex.split(self.overrides)):
            self.system_panic("the run stopped; the line that begins with 'error:' above says why", fl_ctx)

    def start_controller(self, fl_ctx: FLContext) -> None:
        """There is nothing to prepare."""

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """There is nothing to end."""


def site() -> None:
    """Answer, as one site, until the job ends."""
    from nvflare import client as flare

    end_with(os.getppid())
    flare.init()
    answer: Callable[[FLModel], FLModel] | None = None
    while flare.is_running() and (model := flare.receive()) is not None:
        answer = answer or answers_of(flare.get_site_name())
        flare.send(answer(model))


def end_with(parent: int, look: float = 1.0) -> None:
    """End this process once its parent, a job's process of NVFlare's, has ended: nobody else would.

    Args:
        parent: the process.
        look: seconds between two looks.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(look)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def answers_of(name: str) -> Callable[[FLModel], FLModel]:
    """How a site answers: by its worker, or with a refusal where its own settings or the message cannot be used.

    Args:
        name: NVFlare's of the client.
    """
    client: SiteClient | None = None
    refusal = ""
    try:
        local = local_of(name)
        client = SiteClient(local.site, local.state, Opener(local))
    except ConfigError as error:
        logging.getLogger(__name__).error("site %s: %s", name, error)
        refusal = f"its own settings ({SITES}) cannot be used; the log of its NVFlare client says why"

    def answer(model: FLModel) -> FLModel:
        if client is None:
            return to_model(pack(Answer(name, refusal=refusal)))
        try:
            question = from_model(model)
        except ValueError as error:
            return to_model(pack(Answer(client.site, refusal=str(error))))
        return to_model(client.answer(question))

    return answer


def local_of(name: str) -> Local:
    """What a site says for itself, from its own file.

    Args:
        name: NVFlare's of the client, which is the site's where the file names no other.

    Raises:
        ConfigError: there is no such file, or it cannot be used.
    """
    folder = os.environ.get(SITES)
    if not folder:
        raise ConfigError(f"{SITES} is not set where this client was started; it names the folder with {name}.yaml")
    path = Path(folder) / f"{file_name(name)}.yaml"
    return Local.read({"site": name, **read_mapping(path, f"state: /srv/fl-{name}")})


def write_job(folder: Path, settings: Sequence[str]) -> None:
    """Write a job for `nvflare job submit` or NVFlare's simulator.

    Args:
        folder: new; its name is the job's.
        settings: of the run, as on the command line of `train.py`.

    Raises:
        ConfigError: a setting cannot be used, the output is missing or not absolute, or the folder is there already.
    """
    config = read_settings([*settings, "engine=flower"])
    experiment = Experiment(config)
    check_settings(experiment)
    if not config.output or not Path(config.output).is_absolute():
        raise ConfigError(
            "output: NVFlare runs a job in a folder of its own; name the run's with output=/ABSOLUTE/PATH"
        )
    if folder.exists():
        raise ConfigError(f"{folder} exists already; name a new folder for the job")
    workflow = {"id": "run", "path": WORKFLOW, "args": {"overrides": shlex.join(settings)}}
    raw = {"params_exchange_format": "raw", "server_expected_format": "raw"}
    executor = {"path": EXECUTOR, "args": {"execution_mode": "external_process", "command": SITE_COMMAND, **raw}}
    filters: dict[str, list[str]] = {"task_data_filters": [], "task_result_filters": [], "components": []}
    files = {
        "meta.json": {
            "name": folder.name,
            "resource_spec": {},
            "min_clients": config.federation.min_sites,
            "deploy_map": {"app": ["@ALL"]},
        },
        "app/config/config_fed_server.json": {"format_version": 2, "workflows": [workflow], **filters},
        "app/config/config_fed_client.json": {
            "format_version": 2,
            "executors": [{"tasks": [TASK], "executor": executor}],
            **filters,
        },
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(content, indent=1))


def command(arguments: Sequence[str]) -> None:
    """What a user asks for."""
    match arguments:
        case ["job", folder, *settings]:
            write_job(Path(folder), settings)
        case _:
            raise ConfigError("say 'job FOLDER KEY=VALUE ...' to write a job; 'site' is NVFlare's to say")


if __name__ == "__main__":
    if sys.argv[1:] != ["site"]:
        sys.exit(guarded(command, help=__doc__ or ""))
    with steady_output(), own_files():  # unguarded, so that it ends when NVFlare asks it to
        site()
