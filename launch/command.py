"""What all commands share: a user's mistake ends in one clear message, not in a stack trace."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

MISTAKE, INTERRUPTED = 2, 130


def guarded(command: Callable[[Sequence[str]], int | None], arguments: Sequence[str]) -> int:
    """Run a command.

    Returns:
        What the command returns, or 0; 2 after a mistake in settings or data, a damaged folder or a federation that
        cannot go on; 130 when interrupted.
    """
    try:
        return command(arguments) or 0
    except Exception as error:
        if not isinstance(error, mistakes()):
            raise
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("\nstopped; go on with: python train.py output=THE_RUN'S_FOLDER resume=true", file=sys.stderr)
        return INTERRUPTED


def mistakes() -> tuple[type[Exception], ...]:
    """Errors whose message is for the user; imported when there is one, since some come with torch."""
    from configs.compose import ConfigError
    from datamodules.errors import DataError
    from federation.checkpoint import CheckpointError
    from federation.engine import RoundError
    from reporting import ReportingError

    return ConfigError, DataError, ReportingError, CheckpointError, RoundError
