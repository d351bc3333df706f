"""What Flower alone costs: `python -m benchmarks.floor FOLDER [cores=N] [megabytes=N] [rounds=N]`.

The same SuperLink, SuperNodes, TLS and keys as in `benchmarks.engines`, with an app that computes nothing
(`benchmarks/empty_app.py`): a block of bytes to each site in every round, and one back. Prints seconds per round and
CPU seconds by program, as the rows of `benchmarks.engines`: a run's cannot be below them with messages of that size.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

from benchmarks.engines import MARK, POLL, SITES, pinned, told, watching
from scripts.loopback import LINK, Loopback

APP = """[project]
name = "empty"
version = "1.0.0"
license = {{text = "Apache-2.0"}}
dependencies = []

[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[tool.flwr.app]
publisher = "nobody"

[tool.flwr.app.components]
serverapp = "empty_app:server"
clientapp = "empty_app:client"

[tool.flwr.app.config]
size = {size}
rounds = {rounds}
sites = {sites}
index = "{index}"
"""


def main(arguments: Sequence[str]) -> int:
    """Measure, and print a line."""
    folder = Path(arguments[0]).absolute()
    own = {"megabytes": "97.8", "rounds": "4", **dict(word.split("=") for word in arguments[1:])}
    pinned(own)
    app, index = folder / "app", folder / "rounds-done"
    app.mkdir(parents=True)
    size = round(float(own["megabytes"]) * 1e6)
    text = APP.format(size=size, rounds=own["rounds"], sites=len(SITES), index=index)
    (app / "pyproject.toml").write_text(text, encoding="utf-8")
    shutil.copy(Path(__file__).with_name("empty_app.py"), app)
    os.environ[MARK] = mark = uuid4().hex
    with watching(index, mark, index.exists) as measured, Loopback(folder / "lab", {POLL: "1"}) as loopback:
        loopback.certificates()
        loopback.start_link()
        for site in SITES:
            loopback.register(site)
            loopback.start_node(site)
        loopback.start("run", "flwr", "run", str(app), LINK, "--stream")
        loopback.finish("run", 3600)
    moved = 2 * len(SITES) * size / 1e6
    numbers = f"{measured.seconds:9.2f}{sum(measured.cpu.values()):8.2f}{moved:10.1f}"
    print(f"{'Flower, empty app':20}{numbers}   {told(measured)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
