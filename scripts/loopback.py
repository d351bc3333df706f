"""A whole federation on this machine: SuperLink and SuperNodes as processes of their own, with TLS and keys.

What docs/deployment.md tells to do on several machines is done here on one: each site has its own folder with its own
keys, data and state, and nothing listens on any other address than 127.0.0.1.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any
from uuid import uuid4

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
LINK = "lab"
CONFIGURATIONS = ROOT / "docs" / "deployment"
SIGNER = "consortium"
ENDS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
MARK = "FEDSEG_LOOPBACK"
"""In the environment of all that was started here, so that it is found wherever it went."""
CURVE = ("ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj")


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Loopback:
    """SuperLink and SuperNodes in one folder; leaving the context ends every process, come what may.

    SIGTERM, SIGINT and SIGHUP leave it, too. Flower detaches some of its processes (1.42: the SuperLink's SuperExec),
    and those are found by their environment, where the system shows it (Linux).

    Attributes:
        folder: for everything.
        environment: more variables for all processes.
        gated: whether gates (nginx) stand between sites and server, and sites run signed apps only, as the guide says;
            without, sites reach the SuperLink itself, which no deployment should.
    """

    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    gated: bool = False
    gate: int = field(default_factory=free_port)
    shelf: int = field(default_factory=free_port)
    local_gates: dict[str, int] = field(default_factory=dict)
    mark: str = field(default_factory=lambda: uuid4().hex)
    handlers: dict[signal.Signals, Any] = field(default_factory=dict)

    def __enter__(self) -> Loopback:
        self.folder.mkdir(parents=True, exist_ok=True)
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in ENDS if signal.getsignal(number) is not signal.SIG_IGN]  # not after `nohup`
            self.handlers = {number: signal.signal(number, _leave) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in self.handlers:
            signal.signal(number, signal.SIG_IGN)  # nothing may keep this from its end
        for name in [*self.processes]:
            self.kill(name)
        while left := _marked(f"{MARK}={self.mark}"):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    # ---------------------------------------------------------------- certificates and keys

    @property
    def certificates_folder(self) -> Path:
        """Of the server, for certificates, its gate and the signed app."""
        return self.folder / "certificates"

    def certificates(self) -> None:
        """A certificate authority, and a certificate of the server for its address."""
        folder = self.certificates_folder
        folder.mkdir(exist_ok=True)
        (folder / "server.ext").write_text("subjectAltName=DNS:fl.example.org,DNS:localhost,IP:127.0.0.1\n")
        (folder / "site.ext").write_text("extendedKeyUsage=clientAuth\n")
        authority = ["-x509", "-newkey", *CURVE, "/CN=consortium", "-days", "3650"]
        _openssl(folder, "req", *authority, "-keyout", "ca.key", "-out", "ca.crt")
        new = ["-newkey", *CURVE, "/CN=fl.example.org", "-keyout", "server.key"]
        _openssl(folder, "req", *new, "-out", "server.csr")
        self._signed("server", "server.ext")

    def _signed(self, name: str, extension: str) -> None:
        authority = ["-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "365"]
        request = ["-req", "-in", f"{name}.csr", *authority, "-extfile", extension]
        _openssl(self.certificates_folder, "x509", *request, "-out", f"{name}.pem")

    def site_certificate(self, site: str) -> Path:
        """What a site needs for its gate: its certificate, signed by the server's people, and one for its own machine.

        Returns:
            The folder.
        """
        own = self.folder / site / "gate"
        if own.exists():
            return own
        own.mkdir(parents=True)
        _openssl(own, "req", "-newkey", *CURVE, f"/CN={site}", "-keyout", "site.key", "-out", "site.csr")
        shutil.copy(own / "site.csr", self.certificates_folder / f"{site}.csr")
        self._signed(site, "site.ext")
        shutil.copy(self.certificates_folder / f"{site}.pem", own / "site.pem")
        shutil.copy(self.certificates_folder / "ca.crt", own / "ca.crt")
        here = ["-x509", "-newkey", *CURVE, "/CN=gate", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "365"]
        _openssl(own, "req", *here, "-keyout", "local.key", "-out", "local.crt")
        return own

    def key(self, site: str) -> Path:
        """The private key of a site; the public one beside it goes to the server."""
        path = self.folder / site / "key"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            make = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", str(path)]
            subprocess.run(make, check=True, capture_output=True)
        return path

    # ---------------------------------------------------------------- the server

    @property
    def address(self) -> str:
        """Of the SuperLink."""
        return f"127.0.0.1:{self.port}"

    def start_link(self) -> None:
        """Start the SuperLink, and let `flwr` know it; before it the gate, which alone is open to others."""
        certificates = self.certificates_folder
        home = self.folder / "server" / "flower"
        home.mkdir(parents=True, exist_ok=True)
        entry = f'address = "{self.address}"\nroot-certificates = "{certificates / "ca.crt"}"\n'
        (home / "config.toml").write_text(f'[superlink]\ndefault = "{LINK}"\n\n[superlink.{LINK}]\n{entry}')
        tls = ["--ssl-certfile", f"{certificates / 'server.pem'}", "--ssl-keyfile", f"{certificates / 'server.key'}"]
        tls += ["--ssl-ca-certfile", f"{certificates / 'ca.crt'}"]
        options = ["--enable-supernode-auth", "--disable-runtime-dependency-installation"]
        options += ["--database", str(home / "link.db")]
        shelf = {"FLWR_SUPERGRID_API_URL": f"http://127.0.0.1:{self.shelf}"} if self.gated else {}
        command = ["flower-superlink", "--host", "127.0.0.1", "--port", str(self.port), *tls, *options]
        self.start("link", *command, environment=shelf)
        self._wait_for(self.port)
        if self.gated and "gate" not in self.processes:
            (certificates / "refused.conf").touch()
            places = {"0.0.0.0:9092": f"127.0.0.1:{self.gate}", "127.0.0.1:9091": self.address}
            places["127.0.0.1:9090"] = f"127.0.0.1:{self.shelf}"
            self.start_gate("gate", certificates, "server-gate.conf", places)
            self._wait_for(self.gate)

    def start_gate(self, name: str, folder: Path, configuration: str, places: Mapping[str, str]) -> None:
        """Start nginx with a configuration of the guide.

        Args:
            name: of the process.
            folder: of its certificates.
            configuration: file in docs/deployment.
            places: what takes the place of the guide's addresses.
        """
        text = (CONFIGURATIONS / configuration).read_text(encoding="utf-8")
        for theirs, ours in places.items():
            text = text.replace(theirs, ours)
        path = folder / configuration
        path.write_text(text)
        owner = "user root; " if os.geteuid() == 0 else ""  # so that it reads folders that only we can
        self.start(name, "nginx", "-p", str(folder), "-c", str(path), "-g", f"{owner}daemon off;")

    def sign_app(self) -> None:
        """Pack the code and sign it, as the consortium's reviewer does."""
        from scripts.signed_app import build, sign

        build(self.certificates_folder / "apps", f"http://127.0.0.1:{self.shelf}")
        sign(self.certificates_folder / "apps", SIGNER, self._signer())

    def _signer(self) -> Path:
        path = self.folder / "reviewer" / "key"
        if not path.exists():
            path.parent.mkdir(parents=True)
            make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)]
            subprocess.run(make, check=True, capture_output=True)
        return path

    @property
    def app(self) -> str:
        """What `flwr run` runs: the signed app, or this repository as it lies."""
        from scripts.signed_app import PACK, name_of

        return name_of(self.certificates_folder / "apps" / PACK) if self.gated else "."

    def register(self, site: str) -> None:
        """Admit a site's public key."""
        self.flwr("supernode", "register", f"{self.key(site)}.pub", LINK)

    def flwr(self, *arguments: str) -> str:
        """Run a `flwr` command at the server, and return what it prints."""
        command = [str(BIN / "flwr"), *arguments]
        done = subprocess.run(command, cwd=ROOT, env=self._env("server"), capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise RuntimeError(f"flwr {' '.join(arguments)} failed: {done.stdout}{done.stderr}")
        return done.stdout

    def run(self, *overrides: str, seconds: float = 600.0) -> str:
        """Run an app to its end, as `flwr run --stream` shows it.

        Returns:
            What the run printed.
        """
        name = self.submit(*overrides)
        return self.finish(name, seconds)

    def submit(self, *overrides: str) -> str:
        """Submit a run; it goes on at the server, whatever becomes of the command that shows its log."""
        name = f"run-{len(list(self.folder.glob('run-*.log'))) + 1}"
        settings = self.folder / f"{name}.toml"
        settings.write_text(f"overrides = {json.dumps(shlex.join(overrides))}\n")
        self.start(name, "flwr", "run", self.app, LINK, "--stream", "-c", str(settings))
        return name

    def finish(self, name: str, seconds: float = 600.0) -> str:
        """Wait until a run has ended; returns what it printed."""
        try:
            self.processes.pop(name).wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"{name} goes on after {seconds:g} s\n{self.log(name)[-6000:]}") from error
        return self.log(name)

    # ---------------------------------------------------------------- the sites

    def start_node(self, site: str, data: Path | None = None, environment: Mapping[str, str] | None = None) -> None:
        """Start a site's SuperNode, and see that it is let in.

        One that was killed is let in again only after its last heartbeat has run out, about a minute later; one that
        was stopped in order, at once.
        """
        deadline = time.monotonic() + 240
        path, before = self.folder / f"{site}.log", 0
        while True:
            before = len(self.log(site)) if path.exists() else 0
            self._start_node(site, data, environment)
            while self.processes[site].poll() is None:
                if "SuperNode ID: " in self.log(site)[before:]:
                    return
                time.sleep(0.2)
            self.kill(site)
            if time.monotonic() > deadline:
                raise TimeoutError(f"{site} is not let in\n{self.log(site)[-4000:]}")
            time.sleep(5)

    def _start_node(self, site: str, data: Path | None, environment: Mapping[str, str] | None) -> None:
        config = {"site": site, "state": str(self.folder / site / "state")}
        config |= {"data-root": str(data)} if data else {}
        node = " ".join(f"{key}='{value}'" for key, value in config.items())
        options = ["--superlink", *self._way_to_the_server(site)]
        options += ["--auth-supernode-private-key", str(self.key(site)), "--node-config", node]
        options += ["--host", "127.0.0.1", "--port", str(free_port())]
        self.start(site, "flower-supernode", *options, environment=environment)

    def _way_to_the_server(self, site: str) -> list[str]:
        if not self.gated:
            return [self.address, "--root-certificates", str(self.certificates_folder / "ca.crt")]
        own = self.site_certificate(site)
        name = f"{site}-gate"
        if name not in self.processes:
            self.local_gates[site] = free_port()
            here = f"127.0.0.1:{self.local_gates[site]}"
            places = {"127.0.0.1:9093": here, "fl.example.org:9092": f"127.0.0.1:{self.gate}"}
            self.start_gate(name, own, "site-gate.conf", places)
            self._wait_for(self.local_gates[site])
        trusted = own / "trusted.yaml"
        trusted.write_text(f"{SIGNER}: {self._signer().with_suffix('.pub').read_text()}")
        address = f"127.0.0.1:{self.local_gates[site]}"
        return [address, "--root-certificates", str(own / "local.crt"), "--trusted-entities", str(trusted)]

    # ---------------------------------------------------------------- processes

    def kill(self, name: str) -> None:
        """Kill a process and all that it started, without warning."""
        process = self.processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def stop(self, name: str) -> None:
        """Stop a process in order, and all that it started."""
        self.processes[name].terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.processes[name].wait(30)
        self.kill(name)

    def log(self, name: str) -> str:
        """What a process has printed."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def start(self, name: str, program: str, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        """Begin a program of the laboratory, which ends with it; its log goes by its name."""
        home = name if (self.folder / name / "key").exists() else "server"
        with (self.folder / f"{name}.log").open("ab") as log:
            command = [program if program == "nginx" else str(BIN / program), *arguments]
            env = {**self._env(home), **(environment or {})}
            self.processes[name] = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True, umask=0o077
            )

    def _env(self, home: str) -> dict[str, str]:
        fixed = {"FLWR_HOME": str(self.folder / home / "flower"), "FLWR_TELEMETRY_ENABLED": "0"}
        fixed |= {"FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1"}
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, "PATH": path, MARK: self.mark, **fixed, **self.environment}

    def _wait_for(self, port: int) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return
            time.sleep(0.1)
        raise TimeoutError(f"the SuperLink does not listen\n{self.log('link')[-4000:]}")


def _leave(number: int, _frame: FrameType | None) -> None:
    """A signal that ends the process ends it through the contexts that are open, once."""
    for again in ENDS:
        signal.signal(again, signal.SIG_IGN)
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def _marked(mark: str) -> list[int]:
    """Processes that were started with this in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended, or is somebody else's
            if mark.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def _openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@contextlib.contextmanager
def federation(folder: Path, sites: Mapping[str, Path | None]) -> Iterator[Loopback]:
    """A SuperLink and the SuperNodes of these sites (name -> folder of its data), admitted and started."""
    with Loopback(folder) as loopback:
        loopback.certificates()
        loopback.start_link()
        for site, data in sites.items():
            loopback.register(site)
            loopback.start_node(site, data)
        yield loopback
