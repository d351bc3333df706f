"""What all commands share: a user's mistake ends in one clear message, not in a stack trace."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedseg import missing
from fedseg.common.ending import ending
from fedseg.common.text import printable
from fedseg.console import own_files, steady_output

FAILED, MISTAKE, INTERRUPTED = 1, 2, 130
OLDEST = (3, 10)
ROOT = Path(__file__).resolve().parent.parent
LINES = "\n\t"
MISTAKES = (
    ("common.parts", "PartError"),
    ("configs.compose", "ConfigError"),
    ("datamodules.errors", "DataError"),
    ("reporting", "ReportingError"),
    ("federation.checkpoint", "CheckpointError"),
    ("federation.contract", "MessageError"),
    ("federation.engine", "RoundError"),
    ("federation.workers", "WorkersError"),
)
"""Where the errors are defined whose message is for the user."""


def guarded(
    command: Callable[[Sequence[str]], int | None],
    arguments: Sequence[str] | None = None,
    *,
    go_on: str = "",
    help: str = "",
) -> int:
    """Run a command.

    Args:
        command: the command.
        arguments: of the command line; those of this process where they are left out.
        go_on: how to go on after an interruption; empty where the command is simply given again, or says so itself in
            the KeyboardInterrupt that it ends with.
        help: what is printed instead where it is asked for, or no word is given; empty where the command sees to it.

    Returns:
        What the command returns, or 0; 2 without the installation, after a mistake in settings or data, a damaged
        folder, a file that cannot be read or written, or a federation that cannot go on; 130 when interrupted or asked
        to end (SIGTERM, by which `wandb agent` stops a run).
    """
    if sys.version_info[:2] < OLDEST:
        needed = ".".join(map(str, OLDEST))
        print(f"error: this is Python {sys.version.split()[0]}; {needed} or newer is needed", file=sys.stderr)
        return MISTAKE
    before: dict[signal.Signals, Any] = {}
    with suppress(ValueError):  # only the main thread may
        ending.forget()
        before = {asked: signal.signal(asked, ending.ask) for asked in (signal.SIGTERM, signal.SIGINT)}
    with steady_output(), own_files():
        try:
            words = sys.argv[1:] if arguments is None else arguments
            if help and (not words or {"--help", "-h"} & set(words)):
                print(help)
                return 0 if words else MISTAKE
            return command(words) or 0
        except BaseException as error:
            return _ended_by(error, go_on)
        finally:  # whoever gave the command from Python goes on, and hears of later requests itself
            for asked, heard_by in before.items():
                if heard_by is not None:  # it was not installed from Python
                    signal.signal(asked, heard_by)
            ending.forget()


def _ended_by(error: BaseException, go_on: str) -> int:
    """Say what happened, there and at W&B; an error that is nobody's mistake goes on."""
    if isinstance(error, SystemExit):
        raise error  # the command line's reader has said all
    if told := not_installed(error):
        print(f"error: {told}", file=sys.stderr)
        return MISTAKE
    from fedseg.reporting.wandb import failing_run  # here, for commands that come to a good end without it

    if isinstance(error, KeyboardInterrupt):
        with failing_run(INTERRUPTED):
            how = str(error) or go_on
            print("\nstopped" + (f"; go on with: {how}" if how else ""), file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, mistakes()):
        with failing_run(MISTAKE):
            print(f"error: {printable(_told(error), but=LINES)}", file=sys.stderr)
        return MISTAKE
    with failing_run(FAILED):
        raise error


def whole(name: str, text: str, least: int) -> int:
    """A whole number of the command line.

    Raises:
        ConfigError: it is none, or too small.
    """
    from fedseg.configs.compose import ConfigError  # here, for commands that end without the installation

    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{name}={text} should be a whole number, at least {least}")
    return int(text)


def not_installed(error: BaseException) -> str:
    """What to do about a library that this Python lacks; empty if the error is another one."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return ""
    library = error.name.partition(".")[0]
    if (ROOT / library).exists() or (ROOT / f"{library}.py").exists():
        return ""  # a part of this suite: no matter of the installation
    return missing(library)


def mistakes() -> tuple[type[Exception], ...]:
    """Errors whose message is for the user; one whose module was never imported cannot have been raised."""
    imported = ((sys.modules.get(f"fedseg.{module}"), name) for module, name in MISTAKES)
    return (OSError, *(getattr(module, name) for module, name in imported if module is not None))


def _told(error: Exception) -> str:
    """The message; of an operating system's error, what and where."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)
