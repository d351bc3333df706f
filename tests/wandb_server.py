"""A W&B server for tests, on loopback: it answers what the real client, agent and `wandb sync` ask, and remembers it.

Only what the tests need is understood: sweeps by grid, runs with config, history, summary, files and artefacts. An
operation that it does not know gets an error, which the client takes for an older server.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import threading
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

ENTITY = "team"
KEY = "k" * 40
Json = dict[str, Any]


@dataclass
class Run:
    """What a server knows about one run.

    Attributes:
        name: the run's id.
        upserts: how often a process opened it.
        config: key -> value, as the client told at last.
        history: one row per step, in the order of arrival.
        summary: the last one.
        exit_code: of the process; None while it runs.
        files: names of uploaded files.
    """

    name: str
    project: str = ""
    display_name: str = ""
    group: str = ""
    job_type: str = ""
    sweep: str = ""
    tags: list[str] = field(default_factory=list)
    upserts: int = 0
    config: Json = field(default_factory=dict)
    history: list[Json] = field(default_factory=list)
    event_lines: int = 0
    log_lines: int = 0
    output: str = ""
    summary: Json = field(default_factory=dict)
    exit_code: int | None = None
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """As W&B's pages call it."""
        return "running" if self.exit_code is None else "finished" if self.exit_code == 0 else "failed"


@dataclass
class Sweep:
    """A sweep and the combinations that no agent has taken yet."""

    name: str
    project: str
    config: Json
    waiting: list[Json] = field(default_factory=list)
    given: dict[str, Json] = field(default_factory=dict)


@dataclass
class Artifact:
    """A version of an artefact: its type, its name, its files, and whether it was committed."""

    name: str
    type: str
    project: str
    aliases: list[str] = field(default_factory=list)
    metadata: Json = field(default_factory=dict)
    manifest: Json = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    committed: bool = False


class WandbServer:
    """Use it as a context manager: `with WandbServer() as server: ... server.environment()`."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.sweeps: dict[str, Sweep] = {}
        self.agents: dict[str, str] = {}
        self.artifacts: list[Artifact] = []
        self.unknown: list[str] = []
        self.operations: list[str] = []
        self.lock = threading.RLock()
        owner = self

        class Handler(_Handler):
            server_data = owner

        self._http = _Http(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def environment(self) -> dict[str, str]:
        """Variables that lead the client here, and nowhere else."""
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": KEY,
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_ENTITY": ENTITY,
            "WANDB_MODE": "online",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def __enter__(self) -> WandbServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()

    # -------------------------------------------------------------------------------------------------- operations

    def answer(self, operation: str, query: str, variables: Json) -> Json | None:
        """The answer to a GraphQL operation, None if it is unknown."""
        with self.lock:
            self.operations.append(operation)
            known: Mapping[str, Callable[[str, Json], Json]] = {
                "Viewer": self._viewer,
                "GetDefaultEntity": self._viewer,
                "UpsertSweep": self._upsert_sweep,
                "SweepWithRuns": self._sweep_with_runs,
                "CreateAgent": self._create_agent,
                "Heartbeat": self._heartbeat,
                "UpsertBucket": self._upsert_bucket,
                "RunResumeStatus": self._resume_status,
                "CreateRunFiles": self._create_run_files,
                "CreateArtifact": self._create_artifact,
                "CreateArtifactManifest": self._create_manifest,
                "CreateArtifactFiles": self._create_artifact_files,
                "CommitArtifact": self._commit_artifact,
                "UpdateArtifactManifest": self._create_manifest,
            }
            if operation not in known:
                self.unknown.append(operation)
                return None
            return known[operation](query, variables)

    def _viewer(self, query: str, variables: Json) -> Json:
        return {
            "viewer": {
                "id": "user",
                "entity": ENTITY,
                "username": ENTITY,
                "email": "nobody@example.org",
                "flags": "{}",
                "teams": {"edges": [{"node": {"name": ENTITY}}]},
            }
        }

    def _upsert_sweep(self, query: str, variables: Json) -> Json:
        config = yaml.safe_load(variables["config"])
        name = f"sweep{len(self.sweeps)}"
        keys = list(config["parameters"])
        values = [_grid(config["parameters"][key]) for key in keys]
        waiting = [dict(zip(keys, combination, strict=True)) for combination in itertools.product(*values)]
        self.sweeps[name] = Sweep(name, variables["projectName"], config, waiting)
        project = {"id": "p", "name": variables["projectName"], "entity": {"id": "e", "name": ENTITY}}
        return {
            "upsertSweep": {"sweep": {"id": name, "name": name, "project": project}, "configValidationWarnings": []}
        }

    def _sweep_with_runs(self, query: str, variables: Json) -> Json:
        sweep = self.sweeps[variables["sweep"]]
        found = {"id": sweep.name, "name": sweep.name, "config": yaml.safe_dump(sweep.config), "state": "RUNNING"}
        return {"project": {"sweep": {**found, "description": "", "runs": {"edges": []}}}}

    def _create_agent(self, query: str, variables: Json) -> Json:
        name = f"agent{len(self.agents)}"
        self.agents[name] = variables["sweep"]
        return {"createAgent": {"agent": {"id": name}}}

    def _heartbeat(self, query: str, variables: Json) -> Json:
        sweep = self.sweeps[self.agents[variables["id"]]]
        commands: list[Json] = []
        if not json.loads(variables["runState"]):
            if sweep.waiting:
                args = sweep.waiting.pop(0)
                name = f"{sweep.name}run{len(sweep.given)}"
                sweep.given[name] = args
                self.runs[name] = Run(name, sweep.project, sweep=sweep.name)  # as W&B does: before the process opens it
                told = {key: {"value": value} for key, value in args.items()}
                commands = [{"type": "run", "run_id": name, "program": sweep.config["program"], "args": told}]
            else:
                commands = [{"type": "exit"}]
        return {"agentHeartbeat": {"agent": {"id": variables["id"]}, "commands": json.dumps(commands)}}

    def _upsert_bucket(self, query: str, variables: Json) -> Json:
        name = variables.get("name") or variables["id"]
        there, project = self.runs.get(name), variables.get("project")
        if there is not None and project and there.project not in ("", project):
            name = f"{project}/{name}"  # another project's run of the same name is another run
        new = name not in self.runs
        run = self.runs.setdefault(name, Run(name))
        run.upserts += 1
        run.exit_code = None
        run.project = variables.get("project") or run.project
        run.display_name = variables.get("displayName") or run.display_name or name
        run.group = variables.get("groupName") or run.group
        run.job_type = variables.get("jobType") or run.job_type
        run.sweep = variables.get("sweep") or run.sweep
        run.tags = variables.get("tags") or run.tags
        if variables.get("config"):
            run.config = {k: v["value"] for k, v in json.loads(variables["config"]).items() if k != "_wandb"}
        shown = {"id": "p", "name": run.project, "entity": {"id": "e", "name": ENTITY}}
        bucket = {"id": name, "name": name, "displayName": run.display_name, "description": "", "project": shown}
        bucket |= {"config": "{}", "sweepName": run.sweep or None, "historyLineCount": len(run.history)}
        return {"upsertBucket": {"bucket": bucket, "inserted": new}}

    def _resume_status(self, query: str, variables: Json) -> Json:
        run = self.runs.get(variables["name"])
        model: Json = {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": ENTITY}}
        if run is None or not run.upserts or run.project != variables["project"]:
            return {"model": {**model, "bucket": None}}
        last = json.dumps([json.dumps(run.history[-1])] if run.history else [])
        bucket = {
            "id": run.name,
            "name": run.name,
            "displayName": run.display_name,
            "groupName": run.group,
            "jobType": run.job_type,
            "tags": run.tags,
            "sweepName": run.sweep or None,
            "config": json.dumps({key: {"value": value} for key, value in run.config.items()}),
            "summaryMetrics": json.dumps(run.summary),
            "historyLineCount": len(run.history),
            "eventsLineCount": run.event_lines,
            "logLineCount": run.log_lines,
            "historyTail": last,
            "eventsTail": "[]",
            "wandbConfig": json.dumps({"t": 1}),
        }
        return {"model": {**model, "bucket": bucket}}

    def _create_run_files(self, query: str, variables: Json) -> Json:
        run = variables["run"]
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/run/{run}/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}

    def _create_artifact(self, query: str, variables: Json) -> Json:
        given = variables.get("input", variables)
        name = (given.get("artifactCollectionNames") or [given.get("artifactCollectionName")])[0]
        aliases = [entry["alias"] for entry in given.get("aliases") or []]
        made = Artifact(name, given["artifactTypeName"], given["projectName"], aliases)
        made.metadata = json.loads(given.get("metadata") or "{}")
        self.artifacts.append(made)
        number = len(self.artifacts) - 1
        artifact = {
            "id": f"artifact{number}",
            "state": "PENDING",
            "artifactSequence": {"id": name, "latestArtifact": None},
        }
        return {"createArtifact": {"artifact": artifact}}

    def _create_manifest(self, query: str, variables: Json) -> Json:
        given = variables.get("input", variables)
        number = given.get("artifactID") or given.get("artifactManifestID")
        number = str(number).removeprefix("manifest").removeprefix("artifact")
        url = f"{self.url}/upload/artifact/{number}/wandb_manifest.json"
        file = {
            "id": f"file{number}",
            "name": "wandb_manifest.json",
            "displayName": "",
            "uploadUrl": url,
            "uploadHeaders": [],
        }
        manifest = {"artifactManifest": {"id": f"manifest{number}", "file": file}}
        return {"createArtifactManifest": manifest, "updateArtifactManifest": manifest}

    def _create_artifact_files(self, query: str, variables: Json) -> Json:
        edges = []
        for spec in variables["artifactFiles"] if "artifactFiles" in variables else variables["input"]["artifactFiles"]:
            number = spec["artifactID"].removeprefix("artifact")
            url = f"{self.url}/upload/artifact/{number}/{spec['name']}"
            node = {"id": spec["name"], "name": spec["name"], "displayName": spec["name"], "uploadUrl": url}
            node |= {"uploadHeaders": [], "storagePath": spec["name"], "uploadMultipartUrls": None}
            edges.append({"node": {**node, "artifact": {"id": spec["artifactID"]}}})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _commit_artifact(self, query: str, variables: Json) -> Json:
        given = variables.get("input", variables)
        self.artifacts[int(given["artifactID"].removeprefix("artifact"))].committed = True
        return {"commitArtifact": {"artifact": {"id": given["artifactID"], "digest": "d"}}}

    # ------------------------------------------------------------------------------------------------------- files

    def stream(self, run_id: str, body: Json) -> Json:
        """What a run sends while it goes on."""
        with self.lock:
            run = self.runs.setdefault(run_id, Run(run_id))
            for name, chunk in (body.get("files") or {}).items():
                lines = chunk["content"]
                if name == "wandb-history.jsonl":  # from this line on: what stood there before is gone
                    run.history[chunk["offset"] :] = [json.loads(line) for line in lines]
                elif name == "wandb-summary.json":
                    run.summary = json.loads(lines[-1])
                elif name == "wandb-events.jsonl":
                    run.event_lines += len(lines)
                elif name == "output.log":
                    run.output += "\n".join(lines)
                    run.log_lines += len(lines)
            if body.get("complete"):
                run.exit_code = int(body["exitcode"])
            return {"limits": {}}

    def upload(self, path: str, content: bytes) -> None:
        """A file of a run or of an artefact."""
        kind, owner, name = path.removeprefix("/upload/").split("/", 2)
        with self.lock:
            if kind == "run":
                self.runs.setdefault(owner, Run(owner)).files[unquote(name)] = content
            else:
                self.artifacts[int(owner)].files[unquote(name)] = content


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that end drop their connections; everything else is a mistake of this server, and shows."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server_data: WandbServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        body = self._body()
        path = urlsplit(self.path).path
        if path == "/graphql":
            asked = json.loads(body)
            query = asked["query"]
            named = re.search(r"\b(?:query|mutation)\s+(\w+)", query)
            operation = asked.get("operationName") or (named[1] if named else "")
            data = self.server_data.answer(operation, query, asked.get("variables") or {})
            if data is None:
                self._send({"errors": [{"message": f"unknown operation {operation}"}], "data": None})
            else:
                self._send({"data": data})
        elif path.endswith("/file_stream"):
            self._send(self.server_data.stream(path.split("/")[-2], json.loads(body)))
        else:
            self.server_data.unknown.append(f"POST {path}")
            self._send({})

    def do_PUT(self) -> None:
        self.server_data.upload(urlsplit(self.path).path, self._body())
        self._send({})

    def do_GET(self) -> None:
        self.server_data.unknown.append(f"GET {self.path}")
        self._send({}, 404)

    def _body(self) -> bytes:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return zlib.decompress(content, 47) if self.headers.get("Content-Encoding") == "gzip" else content

    def _send(self, answer: Json, code: int = 200) -> None:
        content = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _grid(parameter: Mapping[str, Any]) -> list[Any]:
    return list(parameter["values"]) if "values" in parameter else [parameter["value"]]
