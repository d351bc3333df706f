"""The processors that this process may use."""

from __future__ import annotations

import os
import sys


def usable_cores() -> int:
    """How many; a container or a scheduler may grant fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
