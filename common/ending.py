"""A request to end that is not lost.

The exception of a signal's handler goes nowhere where Python ignores exceptions: in finalisers, and in callbacks of
libraries written in C. Long work therefore also asks, between two pieces of it, whether this process was to end.
"""

from __future__ import annotations

from types import FrameType


class Ending:
    """Whether this process was asked to end."""

    def __init__(self) -> None:
        self._asked = False

    def ask(self, _number: int, _frame: FrameType | None) -> None:
        """For `signal.signal`: end what the process is doing.

        Raises:
            KeyboardInterrupt: always.
        """
        self._asked = True
        raise KeyboardInterrupt

    def heed(self) -> None:
        """End now, if a request was not heard.

        Raises:
            KeyboardInterrupt: this process was asked to end.
        """
        if self._asked:
            raise KeyboardInterrupt

    def forget(self) -> None:
        """Another piece of work begins in this process."""
        self._asked = False


ending = Ending()
"""Of this process."""
