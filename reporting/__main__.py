"""`python -m fedseg.reporting RUN`: write a run's summary and curves again, also if it was killed."""

import argparse
import sys
from pathlib import Path

from fedseg.console import steady_output
from fedseg.reporting import ReportingError
from fedseg.reporting.folder import RunFolder
from fedseg.reporting.reporter import write_report


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code (2 if there is no run)."""
    parser = argparse.ArgumentParser(
        prog="python -m fedseg.reporting", description="Write a run's summary and curves again."
    )
    parser.add_argument("run", type=Path, help="the run's folder")
    folder = RunFolder(parser.parse_args(arguments).run)
    try:
        folder.read_config()
        summary = write_report(folder, folder.scores(), title=folder.path.name)
    except ReportingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary.text(sys.stdout), end="")
    return 0


if __name__ == "__main__":
    with steady_output():
        code = main()
    sys.exit(code)
