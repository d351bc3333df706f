"""Flower's ServerApp: `flwr run . LINK -c "overrides='algorithm=ditto output=/srv/runs/ditto'"`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import partial

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


class StoppedError(RuntimeError):
    """The run ended before its end; the message says why and what to do."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what the overrides describe."""
    from fedseg.launch.command import guarded

    if guarded(partial(run, grid), shlex.split(str(context.run_config["overrides"]))):
        raise StoppedError("the run stopped; the line that begins with 'error:' above says why")


def run(grid: Grid, arguments: Sequence[str]) -> None:
    """One run, or stages or folds of one."""
    from fedseg.launch.protocols.folds import execute_folds
    from fedseg.launch.protocols.stages import execute_stages
    from fedseg.launch.run import read_settings
    from fedseg.launch.sites.across import Across

    across = Across(grid)
    config = read_settings([*arguments, "engine=flower"])
    if config.stages:
        execute_stages([*arguments, "engine=flower"], config, across.execute)
    elif config.protocol == "leave_one_site_out":
        summary = execute_folds(config, across.execute, partial(across.sites, config))
        print(summary.markdown(), flush=True)
    else:
        across.execute(config)
