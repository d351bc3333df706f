"""Train one federated method on one data set: `python train.py algorithm=ditto data=phantom federation.rounds=20`."""

import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedseg.configs.compose import Schema

USAGE = """python train.py [key=value ...]

  python train.py                                                    synthetic sites, a few minutes on two cores
  python train.py algorithm=fedbn data=folder data.root=DIR          your own images: DIR/<site>/{images,masks}
  python train.py algorithm=fedavg protocol=leave_one_site_out       each site in turn as a site never seen
  python train.py output=DIR resume=true                             go on with a run that was stopped
  python train.py algorithm=ditto algorithm.lam=0.5 --config         show the resolved settings, and stop
  python train.py --help ditto                                       explain a method, a data set, a section, a setting

Text is taken as it stands (output='study #2'), whole numbers are decimal, null is nothing; lists are [a, b], mappings
{a: [1], b: [2]}; what the shell would change goes in quotes.

A run leaves a folder (output=DIR) with tables, curves, overlays and checkpoints; its README.md explains every file."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    from fedseg.launch.command import guarded

    return guarded(run, arguments)


def go_on(output: str, *, stages: bool = False) -> str:
    """How to go on with what an interruption left in a folder; empty where it left nothing to go on with."""
    from fedseg.reporting.folder import RunFolder

    told = shlex.quote(f"output={output}")
    if stages:
        return f"the same command, with {told}"
    return f"python train.py {told} resume=true" if RunFolder(output).holds_run else ""


def told(arguments: Sequence[str]) -> str:
    """The help that is asked for: a screen, or what is named beside it."""
    names = [argument for argument in arguments if argument not in ("--help", "-h")]
    if not names:
        from fedseg.configs.outline import outline

        return outline(USAGE)
    from fedseg.configs.help import explained, help_text

    schema = settings_to_explain(names)
    return help_text(schema, USAGE) if names == ["all"] else "\n".join(explained(schema, name) for name in names)


def settings_to_explain(names: Sequence[str]) -> "Schema":
    """Who owns which settings, read from the sources; imported where a part is named that no source has."""
    from fedseg.common.parts import JOIN, own_parts
    from fedseg.configs.sources import meaning

    if any(JOIN in name or own_parts(name.rpartition("=")[2]) for name in names):
        from fedseg.launch.settings import SCHEMA

        return SCHEMA
    read: Schema = meaning("fedseg.launch.settings", "SCHEMA")
    return read


def run(arguments: Sequence[str]) -> None:
    """Train, or show help or settings."""
    if {"--help", "-h"} & set(arguments):
        print(told(arguments))
        return
    from fedseg.configs.compose import departing
    from fedseg.launch.protocols.folds import execute_folds
    from fedseg.launch.protocols.stages import execute_stages
    from fedseg.launch.run import Execute, default_folder, execute, traced_settings

    config, sources = traced_settings([argument for argument in arguments if argument != "--config"])
    if "--config" in arguments:
        from fedseg.configs.compose import as_yaml, told_by

        print(as_yaml(config) + told_by(sources), end="")
        return
    config = departing(config, {"output": config.output or str(default_folder(config))})
    chosen: Execute = execute
    if config.engine == "flower-simulation":
        from fedseg.launch.sites.simulation import execute_in_simulation as chosen
    try:
        if config.stages:
            execute_stages(arguments, config, chosen)
        elif config.protocol == "leave_one_site_out":
            summary = execute_folds(config, chosen)
            print(f"\nall folds, each site scored by a federation that never saw it\n\n{summary.text(sys.stdout)}")
        else:
            chosen(config)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(go_on(config.output, stages=bool(config.stages))) from error


if __name__ == "__main__":
    sys.exit(main())
