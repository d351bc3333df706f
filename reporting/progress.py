"""How far a run is: a bar on a terminal, one line per round in a log."""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

from fedseg.common.text import printable

BAR = "{desc} {bar} {percentage:3.0f}%{postfix} [{elapsed}, {remaining} left]"
NARROW = 79


def duration(seconds: float) -> str:
    """Seconds for people: "4.2 s", "3 min 05 s", "2 h 07 min"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Progress:
    """Follows rounds and sites.

    Args:
        stream: Where to write; a bar if it is a terminal, else one line per round.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self._bar: tqdm[Any] | None = None
        self._rounds = 0
        self._first: int | None = None
        self._started = self._round_started = time.monotonic()

    def round_started(self, round: int, rounds: int, sites: Sequence[str]) -> None:
        """A round begins.

        Args:
            round: Its number, from 1.
            rounds: How many there are in the whole run.
            sites: The sites that take part in it.
        """
        self._rounds, self._round_started = rounds, time.monotonic()
        if self._first is None:
            self._first, self._started = round, self._round_started
        if not self.stream.isatty():
            return
        each = max(1, len(sites))
        if self._bar is None:
            self._bar = tqdm(
                desc=f"round {round}/{rounds}",
                initial=(round - 1) * each,
                total=rounds * each,
                file=self.stream,
                ncols=None if self._width_known() else NARROW,
                dynamic_ncols=self._width_known(),
                smoothing=0.1,
                bar_format=BAR,
            )
        self._bar.total = self._bar.n + (rounds - round + 1) * each
        self._bar.set_description_str(f"round {round}/{rounds}")

    def site_done(self, task: str, site: str, scalars: Mapping[str, float]) -> None:
        """A site has answered; only training moves the bar."""
        if self._bar is not None:
            shown = f"{task} {site}" + (f" loss {scalars['loss']:.4f}" if "loss" in scalars else "")
            self._bar.set_postfix_str(printable(shown), refresh=False)
            self._bar.update(1 if task == "train" else 0)

    def round_done(self, round: int, values: Mapping[str, float], events: Sequence[str] = ()) -> None:
        """A round has ended.

        Args:
            round: Its number.
            values: What to show, e.g. {"loss": 0.4, "val global dice": 0.8}.
            events: What was unusual, e.g. "absent: B".
        """
        now = time.monotonic()
        done = round - (self._first or round) + 1
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        if self._bar is None:
            left = (now - self._started) / done * (self._rounds - round)
            line = f"round {round}/{self._rounds}  {shown}  {duration(now - self._round_started)}"
            self.say(line + (f"  {duration(left)} left" if left else "") + "".join(f"  [{event}]" for event in events))
        else:
            self._bar.set_postfix_str(shown)
            for event in events:
                self.say(f"round {round}: {event}")

    def _width_known(self) -> bool:
        """Whether the terminal tells its width; some report 0 columns, in which tqdm would draw nothing."""
        try:
            return os.get_terminal_size(self.stream.fileno()).columns > 0
        except OSError:
            return False

    def say(self, text: str) -> None:
        """Write a line without tearing the bar."""
        tqdm.write(printable(text, but="\n"), file=self.stream)
        self.stream.flush()

    def close(self) -> None:
        """Leave the terminal tidy."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
