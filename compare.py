"""Compare runs: `python compare.py RUN...` says in one HTML report which model each site should use."""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    from fedseg.launch.command import guarded

    return guarded(run, arguments)


def run(arguments: Sequence[str]) -> int:
    """Gather, compare, report."""
    if not arguments or {"--help", "-h"} & set(arguments):
        print(help_text())
        return 0 if arguments else 2
    from fedseg.launch.compare import compare, requested

    report = compare(*requested(arguments))
    print(report.text(sys.stdout))
    return 0


def help_text() -> str:
    """Usage and every setting, read from the sources: no large library is imported."""
    from fedseg.common.text import written
    from fedseg.configs.knobs import knobs
    from fedseg.configs.sources import meaning

    home = "fedseg.launch.compare"
    every = {**knobs(meaning(home, "Options")), **knobs(meaning(home, "Destination"))}
    lines = [f"  {name.removesuffix('_')}={written(knob.default)}   {knob.description}" for name, knob in every.items()]
    return "\n".join([meaning(home, "USAGE"), *lines])


if __name__ == "__main__":
    sys.exit(main())
