"""The guide's server and a site as real processes, and outsiders at the door: all fail, nothing of theirs runs."""

from __future__ import annotations

import base64
import datetime
import json
import os
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.cli.build import build_fab_from_disk
from flwr.proto.control_pb2 import ListRunsRequest, RegisterNodeRequest, StartRunRequest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

from scripts.loopback import BIN, LINK, Loopback, free_port
from tests.tiers import every, firsts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.waits(60),
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed; the guide's gates need it"),
]

APP = """
from pathlib import Path
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

app = ClientApp()
server = ServerApp()

@app.query()
def answer(message, context):
    Path({proof!r}, "client").touch()
    return Message(RecordDict(), reply_to=message)

@server.main()
def main(grid, context):
    Path({proof!r}, "server").touch()
    posts = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
    replies = grid.send_and_receive(posts, timeout=60)
    codes = [str(reply.error.code) if reply.has_error() else "answered" for reply in replies]
    Path({proof!r}, "replies").write_text(",".join(codes))
"""
SETTINGS = """
[project]
name = "evil"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[tool.flwr.app]
publisher = "evil"
[tool.flwr.app.components]
serverapp = "evil:server"
clientapp = "evil:app"
[tool.flwr.app.config]
x = 1
"""
OUTSIDERS = ("with nothing", "with ca.crt", "with a stolen certificate and key")


@dataclass
class World:
    loopback: Loopback
    folder: Path
    stolen_gate: int

    @property
    def app(self) -> Path:
        return self.folder / "app"

    @property
    def proof(self) -> Path:
        return self.folder / "proof"

    def address(self, outsider: str) -> str:
        """With a stolen certificate `flwr` goes through a gate of the thief's own, that shows it."""
        return f"127.0.0.1:{self.stolen_gate if 'stolen' in outsider else self.loopback.gate}"

    def flwr(self, outsider: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        home = self.folder / outsider.replace(" ", "-")
        home.mkdir(exist_ok=True)
        roots = {
            OUTSIDERS[0]: "",
            OUTSIDERS[1]: f'root-certificates = "{self.loopback.certificates_folder / "ca.crt"}"\n',
            OUTSIDERS[2]: f'root-certificates = "{self.folder / "stolen" / "local.crt"}"\n',
        }[outsider]
        entry = f'[superlink]\ndefault = "there"\n\n[superlink.there]\naddress = "{self.address(outsider)}"\n{roots}'
        (home / "config.toml").write_text(entry)
        env = {**os.environ, "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        command = [str(BIN / "flwr"), *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)

    def client(self, outsider: str) -> httpx.Client:
        context = ssl.create_default_context(cafile=str(self.loopback.certificates_folder / "ca.crt"))
        if outsider == OUTSIDERS[0]:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if "stolen" in outsider:
            context.load_cert_chain(self.folder / "stolen" / "site.pem", self.folder / "stolen" / "site.key")
        return httpx.Client(base_url=f"https://127.0.0.1:{self.loopback.gate}", verify=context, timeout=20)

    def nothing_ran(self) -> None:
        assert not [*self.proof.iterdir()]
        listed = json.loads(self.loopback.flwr("list", LINK, "--format", "json"))
        assert listed["success"]
        assert listed["runs"] == []
        nodes = json.loads(self.loopback.flwr("supernode", "list", LINK, "--format", "json"))
        assert len(nodes["nodes"]) == 1


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("outside")
    with Loopback(folder / "inside", gated=True) as loopback:
        loopback.certificates()
        loopback.start_link()
        loopback.register("site_01")
        loopback.start_node("site_01")
        world = World(loopback, folder, free_port())
        world.proof.mkdir()
        world.app.mkdir()
        (world.app / "evil.py").write_text(APP.format(proof=str(world.proof)))
        (world.app / "pyproject.toml").write_text(SETTINGS)
        shutil.copytree(loopback.site_certificate("site_01"), folder / "stolen")
        shutil.rmtree(folder / "stolen" / "gate-tmp", ignore_errors=True)
        places = {"127.0.0.1:9093": f"127.0.0.1:{world.stolen_gate}"}
        places["fl.example.org:9092"] = f"127.0.0.1:{loopback.gate}"
        loopback.start_gate("thief", folder / "stolen", "site-gate.conf", places)
        yield world


@pytest.mark.parametrize("outsider", every(OUTSIDERS, ["with a stolen certificate and key"]))
def test_commands_of_flower_are_refused(world: World, outsider: str) -> None:
    commands = [
        ("run", str(world.app), "there"),
        ("supernode", "register", f"{world.loopback.key('site_01')}.pub", "there"),
        ("list", "there"),
    ]
    for arguments in commands:
        done = world.flwr(outsider, *arguments)
        said = " ".join((done.stdout + done.stderr).split())
        assert done.returncode != 0, (arguments, said)
        if outsider == OUTSIDERS[1]:
            assert "the gate opens for certificates of the consortium only" in said, said
        if outsider == OUTSIDERS[2]:
            assert "the gate lets the requests of a SuperNode pass and no others" in said, said
    world.nothing_ran()


@pytest.mark.parametrize("outsider", every(OUTSIDERS, OUTSIDERS[2:]))
def test_raw_requests_are_refused(world: World, outsider: str) -> None:
    start = StartRunRequest()
    start.fab.content = build_fab_from_disk(world.app)
    bodies = {
        "control/start-run": start.SerializeToString(),
        "control/register-node": RegisterNodeRequest(public_key=_key()[1]).SerializeToString(),
        "control/list-runs": ListRunsRequest().SerializeToString(),
        "runtime/acquire-task": b"",
        "fleet/register-node": b"",
        "fleet/unregister-node": b"",
        "responses": b"",
    }
    spellings = ("/v1/{}", "//v1//{}", "/v1/fleet/../{}", "/v1/fleet/pull-messages/../../{}", "/v1/%63ontrol/../{}")
    spellings += ("/v1/fleet/pull-messages%2f..%2f..%2f{}", "/v1/fleet/pull-messages;/../../{}", "/V1/{}")
    with world.client(outsider) as client:
        for path, body in bodies.items():
            for spelling in spellings:
                url = httpx.URL(raw_path=spelling.format(path).encode(), scheme="https", host="127.0.0.1")
                url = url.copy_with(port=world.loopback.gate)
                answer = client.post(url, content=body, headers={"content-type": "application/x-protobuf"})
                assert answer.status_code in (400, 403, 404), (spelling, path, answer.status_code, answer.text)
        for path in ("/docs", "/openapi.json", "/health", "/hub/fetch-fab", "/app.fab", "/v1/fleet/pull-messages"):
            assert client.get(path).status_code in (400, 403, 404, 405), path
    world.nothing_ran()


def _key() -> tuple[ec.EllipticCurvePrivateKey, bytes]:
    key = ec.generate_private_key(ec.SECP384R1())
    return key, public_key_to_bytes(key.public_key())


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_a_stolen_certificate_without_a_key_of_a_site_gets_no_message(world: World) -> None:
    key, public = _key()
    now = datetime.datetime.now(datetime.timezone.utc).isoformat()
    headers = {FLEET_HTTP_PUBLIC_KEY_HEADER: _base64(public), "flwr-timestamp": now}
    headers |= {FLEET_HTTP_SIGNATURE_HEADER: _base64(sign_message(key, now.encode()))}
    headers |= {"content-type": "application/x-protobuf"}
    asked = {
        "activate-node": ActivateNodeRequest(public_key=public, heartbeat_interval=30),
        "pull-messages": PullMessagesRequest(),
    }
    with world.client(OUTSIDERS[2]) as client:
        for path, request in asked.items():
            for given in (headers, {"content-type": "application/x-protobuf"}):
                answer = client.post(f"/v1/fleet/{path}", content=request.SerializeToString(), headers=given)
                assert 400 <= answer.status_code < 500, (path, answer.status_code, answer.text)
    world.nothing_ran()


@pytest.mark.parametrize(
    ("outsider", "reason"),
    firsts(
        [
            (OUTSIDERS[2], "the server lets no SuperNode in under this key"),
            (OUTSIDERS[1], "the gate opens for certificates of the consortium only"),
        ],
        1,
    ),
)
def test_a_supernode_that_is_not_let_in_says_why(world: World, outsider: str, reason: str) -> None:
    key = world.folder / f"key-{'stolen' in outsider}"
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", str(key)], check=True)
    roots = (
        world.folder / "stolen" / "local.crt" if "stolen" in outsider else world.loopback.certificates_folder / "ca.crt"
    )
    options = ["--superlink", world.address(outsider), "--root-certificates", str(roots), "--port", str(free_port())]
    name = f"outsider-{key.name}"
    world.loopback.start(name, "flower-supernode", *options, "--auth-supernode-private-key", str(key))
    deadline = time.monotonic() + 40
    while reason not in " ".join(world.loopback.log(name).split()):
        assert time.monotonic() < deadline, world.loopback.log(name)
        time.sleep(0.2)
    world.loopback.kill(name)
    world.nothing_ran()


def test_a_site_runs_no_app_that_nobody_signed_whom_it_trusts(world: World) -> None:
    """Even when the server's own people start it: the server's half runs at the server, nothing at the site."""
    world.loopback.flwr("run", str(world.app), LINK)
    deadline = time.monotonic() + 120
    while not (world.proof / "replies").exists():
        assert time.monotonic() < deadline, world.loopback.log("link")[-3000:]
        time.sleep(0.2)
    time.sleep(0.2)
    assert (world.proof / "replies").read_text() == "7"  # ErrorCode.INVALID_FAB
    assert not (world.proof / "client").exists()


def test_every_connection_shows_its_certificate_anew(world: World) -> None:
    """No session is resumed, in which a certificate counts as it did when that began: before it expired."""
    stolen = world.folder / "stolen"
    context = ssl.create_default_context(cafile=str(world.loopback.certificates_folder / "ca.crt"))
    context.load_cert_chain(stolen / "site.pem", stolen / "site.key")
    session = None
    for _ in range(2):
        with (
            socket.create_connection(("127.0.0.1", world.loopback.gate), timeout=20) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1", session=session) as talk,
        ):
            talk.sendall(b"GET / HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n")
            assert b"the gate lets the requests of a SuperNode pass" in talk.makefile("rb").read()
            assert not talk.session_reused
            session = talk.session


@pytest.mark.exhaustive
def test_a_certificate_that_was_withdrawn_opens_nothing(world: World) -> None:
    folder = world.loopback.certificates_folder
    with world.client(OUTSIDERS[2]) as client:
        assert "withdrawn" not in client.post("/v1/fleet/pull-messages").text
    show = ["openssl", "x509", "-serial", "-noout", "-in", str(world.folder / "stolen" / "site.pem")]
    serial = subprocess.run(show, check=True, capture_output=True, text=True).stdout.strip().removeprefix("serial=")
    (folder / "refused.conf").write_text(f"{serial} 1;\n")
    configuration = str(folder / "server-gate.conf")
    reload = ["nginx", "-p", str(folder), "-c", configuration, "-s", "reload"]
    subprocess.run(reload, check=True, capture_output=True)
    time.sleep(1)
    with world.client(OUTSIDERS[2]) as client:
        answer = client.post("/v1/fleet/pull-messages")
    assert answer.status_code == 400
    assert "this certificate was withdrawn" in answer.text
