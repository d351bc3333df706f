"""A run whose sites are spread over cores or GPUs by Flower's simulation, on this machine.

The same questions and answers as across machines; only here sites lie in one place, so single cases may be shown.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from omegaconf import DictConfig

from fedseg.configs.compose import ConfigError, departing
from fedseg.federation.terms import Terms
from fedseg.launch.experiment import Experiment
from fedseg.launch.run import default_folder
from fedseg.launch.sites.across import Across, check_settings, run_id
from fedseg.launch.sites.site import Local, Opener
from fedseg.launch.sites.terms import check_folder, terms_of
from fedseg.reporting.folder import RunFolder, file_name
from fedseg.reporting.summary import Summary

if TYPE_CHECKING:
    from flwr.app import Context, Message

SITES = "sites"
"""Folder within the run's that holds what sites keep."""


@dataclass(frozen=True)
class Simulated(Local):
    """A site on this machine: it has no settings of its own, and nothing to hide from the server.

    Attributes:
        terms_folder: holds SITE.yaml with its terms, if it has some.
    """

    shows_cases: bool = True
    terms_folder: str | None = None

    def applied(self, config: DictConfig) -> DictConfig:
        """The run's settings as they are."""
        return config

    def terms(self) -> Terms:
        """Those that its file states."""
        return terms_of(self.terms_folder, self.site)


def execute_in_simulation(config: DictConfig, job_type: str = "train") -> Summary:
    """Train, score, report, as `launch.run.execute` does.

    Args:
        config: of the run.
        job_type: what it is to W&B, within its group.

    Raises:
        ConfigError: Flower or Ray is not installed, or a setting cannot be used.
        DataError, ReportingError, RoundError: with a message for the user.
    """
    for package in ("flwr", "ray"):
        if importlib.util.find_spec(package) is None:
            cure = 'pip install -e ".[simulation]", or take engine=in-process'
            raise ConfigError(f"engine=flower-simulation needs the package {package!r}: {cure}")
    experiment = Experiment(config)
    check_settings(experiment)
    names = tuple(sorted({case.site for case in experiment.data.cases()}))
    check_folder(config.deployment.terms, names)
    chosen = _with_output(config, names)
    with _environment(RAY_USAGE_STATS_ENABLED="0"):
        summary = _simulate(chosen, experiment, names, job_type)
    _gather_splits(RunFolder(chosen.output), names)
    return summary


def _simulate(config: DictConfig, experiment: Experiment, names: Sequence[str], job_type: str) -> Summary:
    logging.getLogger("flwr").setLevel(logging.ERROR)
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    client, server = ClientApp(), ServerApp()
    handle = partial(answer, tuple(names), str(Path(config.output).absolute() / SITES), config.deployment.terms)
    for register in (client.train(), client.evaluate(), client.query()):
        register(handle)
    outcome: list[Summary | BaseException] = []

    @server.main()
    def main(grid: Grid, _context: Context) -> None:
        try:
            outcome.append(Across(grid, poll=0.02).execute(config, job_type))
        except BaseException as error:  # the thread's end must not hide it
            outcome.append(error)

    way = experiment.deployment
    backend: Any = {"client_resources": {"num_cpus": way.cores, "num_gpus": way.gpus}}
    backend["init_args"] = {"include_dashboard": False, "logging_level": "error"}
    run_simulation(server, client, len(names), backend_config=backend)
    (found,) = outcome
    if isinstance(found, BaseException):
        raise found
    return found


@contextmanager
def _environment(**usual: str) -> Iterator[None]:
    """These variables where they are not set, and afterwards all as they were: Ray and Flower change some."""
    before = dict(os.environ)
    os.environ.update({**usual, **before})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def answer(names: Sequence[str], folder: str, terms: str | None, message: Message, context: Context) -> Message:
    """One site's answer, in a process of the simulation."""
    from flwr.app import Message

    from fedseg.federation.flower.envelope import Envelope

    site = names[int(context.node_config["partition-id"])]
    found = _client(site, folder, terms).answer(Envelope.from_records(message.content))
    return Message(found.to_records(), reply_to=message)


@lru_cache(maxsize=4)
def _client(site: str, folder: str, terms: str | None) -> Any:
    """The sites that this process served last stay open."""
    from fedseg.federation.flower.client import SiteClient

    local = Simulated(site, Path(folder) / file_name(site), terms_folder=terms)
    return SiteClient(site, local.state, Opener(local), holds=False)  # another process may answer next


def _with_output(config: DictConfig, names: Sequence[str]) -> DictConfig:
    output = str(config.output or default_folder(config))
    return departing(config, {"output": output, "deployment.sites": list(names)})


def _gather_splits(folder: RunFolder, names: Sequence[str]) -> None:
    run = run_id(folder)
    tables = [RunFolder(folder.path / SITES / file_name(site) / run).splits() for site in names]
    rows: Any = pd.concat(tables, ignore_index=True).to_dict("records")
    folder.write_splits(rows)
