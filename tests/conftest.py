"""Settings shared by all tests: one thread, no network, no accounts."""

import contextlib
import copy
import functools
import gc
import itertools
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import timm
import torch
from lightning_fabric.utilities import registry
from matplotlib.figure import Figure

from fedseg.datamodules.phantom import data as phantom
from fedseg.reporting import environment

torch.set_num_threads(1)
# the code that tests run stays the same, and so does what git says of it
pytest.MonkeyPatch().setattr(environment, "git_state", functools.cache(environment.git_state))
# every Trainer asks every installed package whether it brings callbacks; the answer stays the same
registry.entry_points = functools.cache(registry.entry_points)
# without its device, torch remembers for every seed where it was set, and looks for devices before every step
if not torch.cuda.is_available():
    torch.cuda.manual_seed_all = lambda seed: None
    torch.cuda.device_count = lambda: 0
for devices in (torch.xpu, torch.mtia):
    if not devices.is_available():
        devices.manual_seed_all = lambda seed: None
os.fsync = lambda _file: None  # what a power failure leaves is nothing that a test can see
# started in the background, a shell lets its processes ignore interrupts (nohup: also the end of the terminal), and so
# would those that tests interrupt
with contextlib.suppress(ValueError):  # only the main thread may
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


def _remembered(make: Callable[..., Any], most: int, *, draws: bool = False) -> Callable[..., Any]:
    """What is made again of the same arguments is a copy.

    Args:
        make: a function of its arguments and, if it ``draws`` from torch's generator, of that, which a copy leaves
            where a call would.
        most: so many are kept.
    """
    kept: dict[tuple[str, bytes], tuple[Any, torch.Tensor]] = {}

    @functools.wraps(make)
    def remembered(*args: Any, **options: Any) -> Any:
        surroundings = torch.get_default_device(), torch.get_default_dtype()
        numbers = torch.get_rng_state() if draws else torch.empty(0)
        key = repr((args, options, surroundings)), numbers.numpy().tobytes()
        if key not in kept:
            if len(kept) == most:
                del kept[next(iter(kept))]
            kept[key] = make(*args, **options), torch.get_rng_state() if draws else numbers
        made, numbers = kept[key]
        if draws:
            torch.set_rng_state(numbers)
        return copy.deepcopy(made)

    return remembered


# smp builds each encoder twice, and a run builds its network several times: a twelfth of all tests' time
timm.create_model = _remembered(timm.create_model, 16, draws=True)
DRAWN = {"draw_fundus": phantom.draw_fundus, "draw_organ": phantom.draw_organ}
for _name, _draw in DRAWN.items():  # most tests take the same few cases
    pytest.MonkeyPatch().setattr(phantom, _name, _remembered(_draw, 2000))


@pytest.fixture
def drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases of the phantom are no copies of those that an earlier test took."""
    for name, draw in DRAWN.items():
        monkeypatch.setattr(phantom, name, draw)


EMPTY = b'<svg xmlns="http://www.w3.org/2000/svg"/>'
_render = Figure.savefig


def _sketch(figure: Figure, target: Any, **options: Any) -> None:
    if options.get("format") == "svg":  # in a comparison's page
        target.write(EMPTY)
    elif isinstance(target, Path) and (target.stem == "contact_sheet" or target.parent.name in {"overlays", "plots"}):
        target.write_bytes(b"drawn, and not rendered")
    else:
        _render(figure, target, **options)


pytest.MonkeyPatch().setattr(Figure, "savefig", _sketch)


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots become pictures; for other tests they are drawn only, which saves a third of a tiny run's time."""
    monkeypatch.setattr(Figure, "savefig", _render)


@pytest.fixture(scope="module")
def all_rendered() -> Iterator[None]:
    """As `rendered`, for what tests of a file share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", _render)
        yield


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.get_closest_marker("exhaustive"):
        item.add_marker("slow")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that wait first, then slow ones, and of each kind a share for every worker.

    pytest-xdist gives workers equal stretches of the list; those that are done take from the ends of others'.
    """
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    kinds: dict[str, list[pytest.Item]] = {"waits": [], "slow": [], "": []}
    for item in items:
        kinds[next((kind for kind in kinds if kind and item.get_closest_marker(kind)), "")].append(item)
    shared: list[pytest.Item] = []
    rest = len(items)
    for left, share in zip(range(workers, 0, -1), _fair(kinds["waits"], workers), strict=True):
        size = rest // left
        share += _cut(kinds["slow"], len(kinds["slow"]) // left)
        share += _cut(kinds[""], size - len(share))
        shared += share
        rest -= size
    items[:] = shared


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported stays; looking through it again and again takes a tenth of the tests' time
    gc.set_threshold(10_000, 20, 20)  # and looking for what is lost after every 700 new objects a fiftieth


def _fair(waiting: list[pytest.Item], workers: int) -> list[list[pytest.Item]]:
    """Whole files for every worker, so that it waits about as long as the others."""
    shares: list[list[pytest.Item]] = [[] for _ in range(workers)]
    seconds = [0.0] * workers
    files = [[*tests] for _, tests in itertools.groupby(waiting, key=lambda item: item.path)]
    for tests in sorted(files, key=_seconds, reverse=True):
        place = seconds.index(min(seconds))
        shares[place] += tests
        seconds[place] += _seconds(tests)
    return shares


def _seconds(tests: list[pytest.Item]) -> float:
    return max(float(mark.args[0]) for item in tests if (mark := item.get_closest_marker("waits")))


def _cut(items: list[pytest.Item], number: int) -> list[pytest.Item]:
    """The first of a list, which loses them."""
    first = items[:number]
    del items[:number]
    return first
