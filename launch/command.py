"""What all commands share: a user's mistake ends in one clear message, not in a stack trace."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from configs.compose import ConfigError
from datamodules.errors import DataError
from federation.checkpoint import CheckpointError
from federation.engine import RoundError
from reporting import ReportingError

MISTAKE, INTERRUPTED = 2, 130


def guarded(command: Callable[[Sequence[str]], int | None], arguments: Sequence[str]) -> int:
    """Run a command.

    Returns:
        What the command returns, or 0; 2 after a mistake in settings or data, a damaged folder or a federation that
        cannot go on; 130 when interrupted.
    """
    try:
        return command(arguments) or 0
    except (ConfigError, DataError, ReportingError, CheckpointError, RoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("\nstopped; go on with: python train.py output=THE_RUN'S_FOLDER resume=true", file=sys.stderr)
        return INTERRUPTED
