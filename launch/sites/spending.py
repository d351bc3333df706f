"""What a site has spent of its patients' privacy, over all runs: its own ledger, in its own folder.

The events of all runs are composed in one account (Renyi differential privacy, `privacy.accounting`), whose unit is a
patient: what protects a site's whole update protects each of its patients, too. Only what was released counts, once
for every time; a run that goes on from its checkpoint adds what is new, and a turn that is asked again adds itself.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cached_property, reduce
from pathlib import Path
from types import MappingProxyType

from pydantic import TypeAdapter, ValidationError

from fedseg.common.files import write_atomic
from fedseg.federation.checkpoint import CheckpointError
from fedseg.federation.contract import Guarantee, QueryTask, Transform
from fedseg.federation.flower.kept import Kept
from fedseg.federation.state import State
from fedseg.federation.transforms import remembered
from fedseg.privacy.accounting import Account, Ledger, events_of, joint
from fedseg.reporting.folder import RunFolder

SPENDING = "spent.json"
AT_SITE = ("patient", "sparse")
"""Mechanisms whose noise is drawn at the site; that of the others the site would have to believe the server."""
MOST_NAMED = 5
Runs = dict[str, dict[str, float]]
_RUNS: TypeAdapter[Runs] = TypeAdapter(Runs)


class Spent:
    """What runs have spent.

    Args:
        runs: run -> event -> how often it was released.
        delta: at which.
    """

    def __init__(self, runs: Mapping[str, Ledger] = MappingProxyType({}), delta: float = 1e-5) -> None:
        self.runs = runs
        self._guarantee = Guarantee("patient", delta, None)

    @cached_property
    def epsilon(self) -> float:
        """Of all together."""
        together: Ledger = reduce(joint, self.runs.values(), {})
        return Account(self._guarantee).epsilon(together) if together else 0.0

    @property
    def told(self) -> str:
        """In words; the costliest runs are named, each with what it costs alone."""
        account = Account(self._guarantee)
        costs = {run: account.epsilon(events) for run, events in self.runs.items()}
        costly = sorted(costs, key=lambda run: -costs[run])
        more = f", and {len(costly) - MOST_NAMED} more" if len(costly) > MOST_NAMED else ""
        named = ", ".join(f"run {run}: {costs[run]:.3g}" for run in costly[:MOST_NAMED])
        return f"{self.epsilon:.3g} is spent ({named}{more})"


class Spending:
    """The ledger of a site.

    Args:
        folder: the site's own.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / SPENDING

    def runs(self) -> Runs:
        """Run -> event -> how often it was released.

        Raises:
            CheckpointError: the file is damaged.
        """
        try:
            return _RUNS.validate_json(self.path.read_bytes()) if self.path.exists() else self._kept()
        except ValidationError as error:
            raise CheckpointError(
                f"{self.path} is damaged, so that nobody knows what was spent; restore it from a copy"
            ) from error

    def _kept(self) -> Runs:
        """What the accounts tell that the site kept of each run, where this file is missing: lost, or not made yet."""
        found: Runs = {}
        runs = [run for path in self.path.parent.glob("*/kept") if (run := RunFolder(path.parent)).holds_run]
        for run in sorted(
            runs, key=lambda run: run.config_path.stat().st_mtime_ns
        ):  # which fixed its order first counts
            folder, mechanism = run.path, run.settings().get("privacy.mechanism")
            if mechanism in AT_SITE:
                latest = Kept(folder / "kept").before(QueryTask("publish", sys.maxsize, 0))
                found |= {folder.name: events} if (events := events_of(remembered(latest, mechanism))) else {}
        return found

    def add(self, run: str, events: Ledger) -> None:
        """Note what a run releases."""
        write_atomic(self.path, _RUNS.dump_json(self.after(run, events), indent=1), private=True)

    def after(self, run: str, events: Ledger) -> Runs:
        """What would stand there once a run had released that."""
        runs = self.runs()
        return {**runs, run: joint(runs.get(run, {}), events)}

    def elsewhere(self, run: str, delta: float) -> Spent:
        """What all other runs have spent, at this delta."""
        return Spent({name: events for name, events in self.runs().items() if name != run}, delta)


def released(before: State, after: State, transforms: Sequence[Transform]) -> dict[str, float]:
    """Events that a turn added to the accounts that a site keeps.

    Args:
        before: what the site kept before the turn.
        after: what it keeps after it.
        transforms: of the run.
    """
    events: dict[str, float] = {}
    for transform in transforms:
        earlier, now = (events_of(remembered(state, transform.name)) for state in (before, after))
        new = {event: count - earlier.get(event, 0.0) for event, count in now.items()}
        events |= {event: events.get(event, 0.0) + count for event, count in new.items() if count > 0}
    return events
