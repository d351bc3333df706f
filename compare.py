"""Compare runs: `python compare.py RUN...` says in one HTML report which model each site should use."""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    from fedseg.launch.command import guarded

    return guarded(run, arguments)


def run(arguments: Sequence[str]) -> int:
    """Gather, compare, report."""
    from fedseg.launch.compare import compare, help_text, requested

    if not arguments or {"--help", "-h"} & set(arguments):
        print(help_text())
        return 0 if arguments else 2
    report = compare(*requested(arguments))
    print(report.text(sys.stdout))
    return 0


if __name__ == "__main__":
    sys.exit(main())
