"""The trials of one search, drawn and remembered by Optuna: an interrupted search goes on as if it had not been."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedseg.common.seeds import derive_seed
from fedseg.common.text import count
from fedseg.configs.compose import ConfigError
from fedseg.launch.sweep import FAILED, Result
from fedseg.launch.tuning.search import Axis
from fedseg.reporting import ReportingError

DRAWN = 5
"""Trials drawn at random before results guide the search (a tree-structured Parzen estimator)."""
STUDY = "study.log"
INSTALL = 'sweep.py tune needs Optuna; pip install -e ".[tune]"'
ASKED = "asked"


@dataclass(frozen=True)
class Trial:
    """One trial that has ended.

    Attributes:
        number: of its run.
        values: setting -> value.
        score: what it reached; None if it failed.
        complaint: why it failed.
    """

    number: int
    values: Mapping[str, Any]
    score: float | None
    complaint: str = ""

    @property
    def told(self) -> str:
        """Its score in words."""
        return "failed" if self.score is None else f"{self.score:.4f}"


class Study:
    """As many trials as there are in the budget; the first is the method without tuning.

    Args:
        folder: where they are remembered.
        axes: where settings are searched.
        budget: trials.
        seed: of the draws.
        asked: all that a search must keep to when it goes on.

    Raises:
        ConfigError: Optuna is missing, or the folder holds another search or more trials.
    """

    def __init__(self, folder: Path, axes: Sequence[Axis], budget: int, seed: int, asked: Mapping[str, Any]) -> None:
        self.axes, self.budget, self.seed = axes, budget, seed
        self._optuna = optuna = _optuna()
        self._states = optuna.trial.TrialState
        kept = optuna.storages.journal.JournalFileBackend(str(folder / STUDY))
        self._study = optuna.create_study(
            study_name="tune",
            storage=optuna.storages.JournalStorage(kept),
            direction="maximize",
            load_if_exists=True,
        )
        before = self._study.user_attrs.get(ASKED, asked)
        if changed := [key for key, value in asked.items() if before.get(key) != value]:
            raise ConfigError(f"{folder} holds a search with other {', '.join(changed)}; take another output=DIR")
        if (there := len(self.trials())) > budget:
            raise ConfigError(
                f"{folder} holds {count(there, 'trial')} already, and all methods get as many; take budget={there} or "
                "more, or another output=DIR"
            )
        self._study.set_user_attr(ASKED, dict(asked))

    def trials(self) -> list[Trial]:
        """Those that have ended."""
        complaints = self._study.user_attrs
        return [
            Trial(t.number, self._values(t), t.value, str(complaints.get(str(t.number), "")))
            for t in self._study.trials
            if t.state.is_finished() and self._whole(t)
        ]

    def next(self, places: int) -> list[tuple[int, dict[str, Any]]]:
        """Trials to run now, at most so many: those that were begun before, then new ones; their numbers and values."""
        begun = [trial for trial in self._study.trials if trial.state == self._states.RUNNING]
        for trial in begun:
            if not self._whole(trial):  # the search was killed while it drew
                self._study.tell(trial.number, state=self._states.FAIL)
        again = [(trial.number, self._values(trial)) for trial in begun if self._whole(trial)]
        left = self.budget - len(self.trials()) - len(again)
        return (again + [self._ask() for _ in range(min(left, places - len(again)))])[:places]

    def _ask(self) -> tuple[int, dict[str, Any]]:
        known = self._study.trials
        if not any(self._whole(trial) or trial.state == self._states.WAITING for trial in known):
            self._study.enqueue_trial({axis.key: axis.default for axis in self.axes})
        # what is drawn for a trial follows from its number, whichever process asks
        seed = derive_seed("tune", self.seed, len(known))
        self._study.sampler = self._optuna.samplers.TPESampler(seed=seed, n_startup_trials=DRAWN)
        trial = self._study.ask({axis.key: self._distribution(axis) for axis in self.axes})
        return trial.number, self._values(trial)

    def _values(self, trial: Any) -> dict[str, Any]:
        return {axis.key: trial.params[axis.key] for axis in self.axes}

    def _whole(self, trial: Any) -> bool:
        return len(trial.params) == len(self.axes)

    def _distribution(self, axis: Axis) -> Any:
        kinds = self._optuna.distributions
        if axis.whole:
            return kinds.IntDistribution(int(axis.low), int(axis.high), log=axis.log)
        return kinds.FloatDistribution(axis.low, axis.high, log=axis.log)

    def tell(self, number: int, metric: str, result: Result) -> Trial:
        """Remember what became of a trial: one without a score has failed, and counts.

        Raises:
            ReportingError: its run was killed; it is tried again when the command is given again.
        """
        if result.exit_code < 0:
            raise ReportingError(f"{result.job.name} {result.failure}; the same command goes on with it")
        score = result.values.get(metric, math.nan)
        if result.state == FAILED or not math.isfinite(score):
            why = result.failure if result.state == FAILED else f"it has no {metric}: are there validation cases?"
            self._study.set_user_attr(str(number), why)
            self._study.tell(number, state=self._states.FAIL)
        else:
            self._study.tell(number, score)
        return next(trial for trial in self.trials() if trial.number == number)


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The best trial; of equal ones the first, and None if all failed."""
    scored = [trial for trial in trials if trial.score is not None]
    return max(scored, key=lambda trial: (trial.score or 0.0, -trial.number), default=None)


def _optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ConfigError(INSTALL) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
