"""However a federation on this machine ends, none of its processes is left."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from scripts.loopback import CONFIGURATIONS, Loopback, free_port

NOBODY = 65534
PORTS = ("SuperLink", "its gate", "the shelf of signed apps", "the gate of a site", "its SuperNode")
ROOT = Path(__file__).parent.parent
PLAY = """
import sys
import time
from pathlib import Path
from scripts.loopback import Loopback

with Loopback(Path(sys.argv[1])) as loopback:
    loopback.start("link", "/bin/sh", "-c", "setsid sleep 600 & sleep 600")
    print("started", flush=True)
    if sys.argv[2] == "error":
        time.sleep(1)
        raise RuntimeError("as it happens")
    time.sleep(600)
"""


def family(ancestor: int) -> set[int]:
    """The pids of all that a process has started, and of what these have started."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = {ancestor}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {ancestor}


def alive(pids: set[int]) -> list[str]:
    """The commands of those that still run."""
    paths = [Path(f"/proc/{pid}/cmdline") for pid in sorted(pids)]
    return [path.read_text().replace("\0", " ") for path in paths if path.exists() and path.read_text()]


def listening(pids: set[int]) -> list[tuple[str, int]]:
    """Addresses (as the system writes them) and ports on which these processes listen."""
    sockets = set()
    for pid in pids:
        for file in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                sockets.add(str(file.readlink()))
    rows = [line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()]
    found = {row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets}
    return sorted((place.rpartition(":")[0], int(place.rpartition(":")[2], 16)) for place in found)


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["SIGTERM", "SIGINT", "SIGHUP", "error"])
def test_signals_and_errors_end_all_that_was_started_also_what_went_its_own_way(ending: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PLAY, str(tmp_path), ending]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"started\n"
        deadline = time.monotonic() + 30
        while len(started := family(process.pid)) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)  # the shell, a sleep in its group, and one in a session of its own
        assert len(started) == 3
        if ending != "error":
            process.send_signal(getattr(signal, ending))
        code = process.wait(60)
    assert alive(started) == []
    assert code == {"SIGTERM": 143, "SIGINT": -signal.SIGINT, "SIGHUP": 129, "error": 1}[ending]


NEEDS_NGINX = pytest.mark.skipif(
    shutil.which("nginx") is None, reason="nginx is not installed; the guide's gates need it"
)


GATES = pytest.mark.parametrize("gate", ["server-gate.conf", "site-gate.conf"])


@NEEDS_NGINX
@GATES
def test_a_gate_has_its_own_place_for_all_that_nginx_puts_down(gate: str) -> None:
    """Elsewhere it would need folders that only an administrator makes."""
    built = subprocess.run(["nginx", "-V"], capture_output=True, text=True, check=True).stderr
    text = (CONFIGURATIONS / gate).read_text()
    kinds = re.findall(r"--http-([\w-]+)-temp-path", built)
    assert kinds
    for kind in {"client-body" if kind == "client" else kind for kind in kinds}:
        assert f"{kind.replace('-', '_')}_temp_path gate-tmp;" in text
    assert "pid gate.pid;" in text
    assert "error_log gate-errors.log;" in text


@NEEDS_NGINX
@GATES
def test_a_gate_needs_no_rights_beyond_its_folder(gate: str) -> None:
    """The guide's own line, as somebody who may write nothing else."""
    with tempfile.TemporaryDirectory() as name, Loopback(Path(name)) as loopback:
        loopback.certificates()
        folder = loopback.site_certificate("north") if gate.startswith("site") else loopback.certificates_folder
        (folder / "refused.conf").touch()
        port, text = free_port(), (CONFIGURATIONS / gate).read_text()
        for address in ("0.0.0.0:9092", "127.0.0.1:9093"):
            text = text.replace(f"listen {address}", f"listen 127.0.0.1:{port}")
        text = text.replace("listen 127.0.0.1:9090", f"listen 127.0.0.1:{free_port()}")
        (folder / gate).write_text(text.replace("fl.example.org:9092", "127.0.0.1:1"))
        user = NOBODY if os.geteuid() == 0 else None
        if user is not None:
            for path in [Path(name), *Path(name).rglob("*")]:
                os.chown(path, user, user)
        nginx = ["nginx", "-p", str(folder), "-c", str(folder / gate)]
        subprocess.run(nginx, user=user, group=user, extra_groups=None if user is None else [], check=True)
        try:
            told = ssl.get_server_certificate(("127.0.0.1", port))
        finally:
            subprocess.run([*nginx, "-s", "stop"], user=user, group=user, check=True)
        assert told.split() == (folder / ("local.crt" if gate.startswith("site") else "server.pem")).read_text().split()


@pytest.mark.waits(25)
@pytest.mark.slow
@NEEDS_NGINX
@pytest.mark.exhaustive
def test_sigterm_ends_superlink_gates_and_supernodes_of_the_guide(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.deployment_on_loopback", str(tmp_path)]
    log = tmp_path / "north.log"
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while not (log.exists() and "SuperNode ID: " in log.read_text()):
            assert process.poll() is None
            time.sleep(0.1)
        started = family(process.pid)
        commands, doors = " ".join(alive(started)), listening(started)
        process.terminate()
        assert process.wait(60) == 143
    assert len(doors) == len(PORTS), "each is in the table of docs/hardening.md"
    assert {address for address, _ in doors} == {"0100007F"}, "127.0.0.1; the guide's own gate alone is for others"
    for program in ("flower-superlink", "flower-supernode", "flower-superexec", "nginx: worker"):
        assert program in commands
    assert alive(started) == []
