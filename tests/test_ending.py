"""A request to end is heard, also where Python ignores the exception of its handler."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl

import train
from fedseg.common.ending import ending
from fedseg.federation.checkpoint import Checkpoint
from tests.tiny_run import TINY


class Finaliser:
    """Whose exceptions are ignored."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self.number)
        for _ in range(1000):
            pass  # the handler is called here, if not before


class Unheard(pl.Callback):
    """Lets this process be asked to end in a finaliser."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_train_end(self, *_: Any) -> None:
        Finaliser(self.number)


@pytest.fixture
def handlers() -> Any:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    ending.forget()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_ends_after_the_round_in_which_nobody_heard(
    number: signal.Signals, handlers: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unheard = f"trainer.callbacks={{tests.test_ending:Unheard: {{number: {int(number)}}}}}"
    run = [*TINY, "data.n_sites=2", f"output={tmp_path / 'run'}", "federation.rounds=3"]
    assert train.main([*run, unheard]) == 130
    assert Checkpoint(tmp_path / "run" / "checkpoints").round == 1
    assert "stopped; go on with" in capsys.readouterr().err
    # another piece of work in this process is none that was asked to end
    assert train.main([*TINY, "data.n_sites=2", f"output={tmp_path / 'other'}", "federation.rounds=1"]) == 0
