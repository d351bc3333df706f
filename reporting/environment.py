"""What a run ran on: versions, machine, git revision, command line."""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve()
SUITE = "federated-segmentation"  # the name of this package
LIBRARIES = ("torch", "numpy", "albumentations", "opencv-python-headless", "segmentation-models-pytorch")
"""Those that numbers depend on."""


def describe_process() -> dict[str, Any]:
    """This process and its machine, as plain values for JSON."""
    import torch  # here, because readers of a run's folder do without it

    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([sys.executable, *sys.argv]),
        "folder": os.fspath(Path.cwd()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "git": git_state(SOURCE),
        "packages": installed_packages(),
    }


@cache
def installed_packages() -> dict[str, str]:
    """Name -> version, by name; read once, since every package has a file of its own to open."""
    return dict(sorted({d.name: d.version for d in distributions()}.items(), key=lambda p: p[0].lower()))


def library_versions() -> dict[str, str]:
    """Library -> version, of those that numbers depend on; without the build (CPU, CUDA)."""
    return {name: version(name).partition("+")[0] for name in LIBRARIES}


def suite_version() -> str:
    """Of this suite; a checkout that was not installed has none."""
    try:
        return version(SUITE)
    except PackageNotFoundError:
        return "not installed"


class Meter:
    """What this process uses from now on: wall and CPU time, memory at its peak."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.monotonic(), _cpu_seconds()

    def read(self) -> dict[str, float | None]:
        """Seconds since the meter was made; bytes of memory (of the whole process) and of the GPU at their peak.

        None where the system does not tell, or there is no GPU.
        """
        import torch

        gpu = torch.cuda.is_available()
        return {
            "wall_seconds": round(time.monotonic() - self._wall, 3),
            "cpu_seconds": round(_cpu_seconds() - self._cpu, 3),
            "peak_memory_bytes": peak_memory(),
            "peak_gpu_bytes": torch.cuda.max_memory_allocated() if gpu else None,
        }


def peak_memory() -> int | None:
    """Resident bytes of this process at their peak; None where the system does not tell."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux: getrusage there counts the parent's memory at the fork, too
        found = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(found[0].split()[1]) * 1024 if found else None
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def _cpu_seconds() -> float:
    """Of this process and its children that have ended (workers that load images)."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def git_state(source: Path) -> dict[str, Any] | None:
    """Revision of the repository that tracks `source` and whether it has changes; None outside of a repository."""
    folder = source.parent
    if (
        _git(folder, "ls-files", "--error-unmatch", source.name) is None
    ):  # also: installed inside someone else's checkout
        return None
    revision, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain")
    return None if revision is None else {"revision": revision, "dirty": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        answer = subprocess.run(
            ["git", "-C", os.fspath(folder), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def extend_environment(before: str | None, seeds: Mapping[str, int], process: Mapping[str, Any]) -> str:
    """The text of environment.json after one more process has joined the run."""
    processes = json.loads(before)["processes"] if before is not None else []
    return json.dumps({"seeds": dict(seeds), "processes": [*processes, process]}, indent=2) + "\n"
