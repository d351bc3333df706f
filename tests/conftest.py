"""Settings shared by all tests: one thread, no network, no accounts."""

import contextlib
import functools
import logging
import os
import signal

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from lightning_fabric.utilities import registry

torch.set_num_threads(1)
# every Trainer asks every installed package whether it brings callbacks; the answer stays the same
registry.entry_points = functools.cache(registry.entry_points)
os.fsync = lambda _file: None  # what a power failure leaves is nothing that a test can see
# started in the background, a shell lets its processes ignore interrupts (nohup: also the end of the terminal), and so
# would those that tests interrupt
with contextlib.suppress(ValueError):  # only the main thread may
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that wait first, then slow ones, so that no worker is left alone with them at the end."""
    marks = ("waits", "slow")

    def place(item: pytest.Item) -> int:
        return next((at for at, mark in enumerate(marks) if item.get_closest_marker(mark)), len(marks))

    items.sort(key=place)
