"""Ways from the server to the sites. In process: one worker serves all sites, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from typing import Generic

from fedseg.federation.client import Compute
from fedseg.federation.contract import Evaluate, S, Task, Transform, W
from fedseg.federation.state import State, Update
from fedseg.federation.transforms import answer


class InProcess(Generic[W, S]):
    """All sites in this process. Memory is one worker and what the sites keep, whatever the number of sites.

    Args:
        worker: the client half; another object than the server's.
        sites: name -> data.
        compute: where local training computes.
        evaluate: scores the worker's views at a site.
        transforms: applied to every update before it leaves the site.
        others: site -> the worker that serves it instead, where networks differ from site to site.
    """

    def __init__(
        self,
        worker: W,
        sites: Mapping[str, S],
        compute: Compute,
        evaluate: Evaluate[W, S],
        transforms: Sequence[Transform] = (),
        others: Mapping[str, W] | None = None,
    ) -> None:
        self.worker = worker
        self.others = dict(others or {})
        self.sites = sites
        self.compute = compute
        self.evaluate = evaluate
        self.transforms = tuple(transforms)
        self._kept: dict[str, State] = {}

    def ask(self, tasks: Mapping[str, Task], messages: Mapping[str, State]) -> Iterator[Update]:
        """Answer the tasks one by one; an error carries site, task and round."""
        for name, task in tasks.items():
            kept = self._kept.get(name, State())
            try:
                update, self._kept[name] = answer(
                    self.others.get(name, self.worker),
                    self.sites[name],
                    task,
                    messages[name],
                    kept,
                    self.compute,
                    self.evaluate,
                    self.transforms,
                )
            except Exception as error:
                # add_note needs Python 3.11
                error.args = (f"[site {name!r}, task {task.kind}, round {task.round}] {error}",)
                raise
            yield update

    def scored_by(self, evaluate: Evaluate[W, S]) -> InProcess[W, S]:
        """The same way to the same worker, whose views something else scores."""
        other = copy(self)
        other.evaluate = evaluate
        return other

    def kept(self) -> Mapping[str, State]:
        """What every site keeps."""
        return self._kept

    def remember(self, site: str, kept: State) -> None:
        """What a site keeps from now on."""
        self._kept[site] = kept

    def close(self) -> None:
        """There is nothing to end."""

    def restore(self, kept: Mapping[str, State], at: Mapping[str, int] | None = None) -> None:
        """Continue from what sites kept earlier; when that was does not matter here."""
        self._kept = dict(kept)
