"""The process at a site that stays: `python -m launch.site_worker PARENT KEY=VALUE ... DOOR`, run by the ClientApp."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from console import steady_output
from federation.flower.client import SiteClient
from federation.flower.worker import code_of, serve
from launch.site import Local, Opener


def main(arguments: Sequence[str]) -> None:
    """Answer until the parent ends."""
    parent, *node, door = arguments
    local = Local.read(dict(pair.split("=", 1) for pair in node))
    client = SiteClient(local.site, local.state, Opener(local))
    here = Path(__file__).resolve().parent.parent
    serve(Path(door), code_of(str(here), *node), client.answer, int(parent))


if __name__ == "__main__":
    with steady_output():
        main(sys.argv[1:])
