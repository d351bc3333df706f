"""The process that stays at a site: `python -m fedseg.launch.sites.site_worker PARENT KEY=VALUE ... DOOR`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fedseg.console import own_files, steady_output
from fedseg.federation.flower.client import SiteClient
from fedseg.federation.flower.worker import code_of, serve
from fedseg.launch.sites.site import Local, Opener


def main(arguments: Sequence[str]) -> None:
    """Answer until the parent ends."""
    parent, *node, door = arguments
    local = Local.read(dict(pair.split("=", 1) for pair in node))
    client = SiteClient(local.site, local.state, Opener(local))
    here = Path(__file__).resolve().parents[2]
    serve(Path(door), code_of(str(here), *node), client.answer, int(parent))


if __name__ == "__main__":
    with steady_output(), own_files():
        main(sys.argv[1:])
