"""One run across machines: what `launch.run` does where the data are here, with sites that are not."""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from fedseg.common.files import write_atomic
from fedseg.common.text import FORMULA, printable
from fedseg.configs.compose import ConfigError, as_yaml, departing, read_mapping
from fedseg.federation.admission import bounds
from fedseg.federation.checkpoint import Checkpoint
from fedseg.federation.contract import RoundRecord, event
from fedseg.federation.engine import RoundError
from fedseg.federation.flower.keys import KEY, Pins
from fedseg.federation.flower.records import Facts, Question
from fedseg.federation.flower.transport import FlowerTransport, NotConnectedError
from fedseg.federation.ledger import LEDGER, Ledger
from fedseg.federation.state import State
from fedseg.launch.experiment import Experiment
from fedseg.launch.folders.restore import check_states, open_checkpoint
from fedseg.launch.run import anchored, cross, default_folder, finish, inputs, open_reporter, train_and_score, unused
from fedseg.launch.scores.crossing import check_crossing
from fedseg.launch.sites.terms import listed
from fedseg.reporting.environment import Meter, library_versions
from fedseg.reporting.folder import COLUMNS, KEYS, METRICS, RUN_ID, RunFolder
from fedseg.reporting.reporter import Reporter
from fedseg.reporting.summary import Summary

if TYPE_CHECKING:
    from flwr.serverapp import Grid


@dataclass(frozen=True)
class Across:
    """Runs whose sites are reached through Flower's grid.

    Attributes:
        grid: of this process's run.
        poll: seconds between two looks for answers.
    """

    grid: Grid
    poll: float = 0.2

    def execute(self, config: DictConfig, job_type: str = "train") -> Summary:
        """Train, score, report.

        Args:
            config: of the run.
            job_type: what it is to W&B, within its group.

        Raises:
            ConfigError, ReportingError, RoundError: with a message for the user.
        """
        meter = Meter()
        settings = Experiment(config)
        check_settings(settings)
        folder = RunFolder.create(config.output or default_folder(config), resume=config.resume)
        with folder.beginning():
            checkpoint, ledger = open_checkpoint(folder, config), Ledger(folder.path / LEDGER)
            notes = {"head": lambda: ledger.head, "known": lambda: ledger.known}
            notes |= {"goes_back_to": partial(goes_back_to, checkpoint)}
            transport = self._transport(config, settings, run_id(folder), pinned(folder, settings), **notes)
            sites = _in_order(transport.sites)
            experiment = Experiment(config, channels=agreed(transport.sites, settings))
            transport.agree(experiment.channels)
            check_sites(experiment, transport.sites)
            check_states(experiment.algorithm(), checkpoint)
            # whoever is there at the start must be there again when the run is resumed
            folder.write_config(as_yaml(departing(anchored(config), {"deployment.sites": list(sites)})))
        folder.write_environment({"seed": config.seed})
        folder.write_terms(listed({site: transport.sites[site].terms for site in sites}))
        save_keys(folder, transport.pins.keys)
        folder.write_splits([])  # which case serves for what stands in each site's own folder
        folder.write_inputs(inputs(experiment))
        folder.truncate(checkpoint.round if checkpoint.round else -1)
        with open_reporter(config, folder, job_type, experiment.title) as reporter:
            reporter.progress.say(f"{experiment.title}; {', '.join(sites)}; the run's folder: {folder.path}")
            reporter.notice(other_versions(transport.sites, checkpoint.round))
            reporter.notice(at_first_sight(transport.pins, checkpoint.round))
            seen = [site for site in sites if transport.sites[site].seen]
            ledger.begun(checkpoint.round, run_id(folder), alike=not settings.declared.answers_singly)
            heard = Heard(reporter, transport)
            federation = experiment.federation_over(transport, seen, checkpoint, heard, ledger)
            train_and_score(federation, reporter, experiment.evaluation, unused(experiment))
            cross(federation, reporter, config)
            folder.append_audit(greetings(transport, checkpoint.round + 1))
            folder.append_sent(sent(transport, checkpoint.round + 1))
            return finish(reporter, config, meter)

    def sites(self, config: DictConfig) -> list[str]:
        """Names of all sites that are connected, or should be."""
        return list(config.deployment.sites) or sorted(
            self._transport(config, Experiment(config), secrets.token_hex(16), Pins()).sites
        )

    def _transport(
        self, config: DictConfig, settings: Experiment, run: str, pins: Pins, **notes: Any
    ) -> FlowerTransport:
        way = settings.deployment
        question = Question("hello", run, as_yaml(config))
        start = State()
        if settings.pretrained is not None:
            start = State({"encoder": settings.pretrained.tensors}, {"round": float(settings.pretrained.round)})
            earlier = settings.pretrained.source / RUN_ID
            text = earlier.read_text().strip() if earlier.is_file() else ""
            question = Question("hello", run, question.config, earlier=text)
        transport = FlowerTransport(
            self.grid, question, way.timeout, self.poll, start=start, pins=pins, is_score=is_score, **notes
        )
        try:
            transport.meet(way.sites, config.federation.min_sites, way.patience)
        except NotConnectedError as error:
            raise RoundError(str(error)) from error
        return transport


class Heard:
    """The engine's observer across machines: greetings are part of what left sites, and what was sent is known.

    Args:
        reporter: is told everything.
        transport: where greetings arrive.
    """

    def __init__(self, reporter: Reporter, transport: FlowerTransport) -> None:
        self.reporter, self.transport = reporter, transport
        self.round_started, self.site_done = reporter.round_started, reporter.site_done

    def round_done(self, record: RoundRecord) -> None:
        """One write for all sites."""
        record.audit.extend(greetings(self.transport, record.round))
        self.reporter.round_done(record)
        self.reporter.folder.append_sent(sent(self.transport, record.round))


def greetings(transport: FlowerTransport, round: int) -> list[dict[str, Any]]:
    """Rows for the audit: greetings that came since the last call, their size and whose they were."""
    row = {"round": round, "task": "greet", "group": "(greeting)", "numbers": 0, "transforms": "", "listing": []}
    return [{**row, "site": site, "bytes": size} for site, size in transport.take_greetings()]


def sent(transport: FlowerTransport, round: int) -> list[dict[str, Any]]:
    """Rows for the table of what was sent: messages since the last call."""
    return [{"round": round, **row} for row in transport.take_sent()]


def run_id(folder: RunFolder) -> str:
    """The name of a run at its sites, made once."""
    path = folder.path / RUN_ID
    if not path.exists():
        write_atomic(path, secrets.token_hex(16) + "\n")
    return path.read_text(encoding="utf-8").strip()


def pinned(folder: RunFolder, settings: Experiment) -> Pins:
    """Which name belongs to which key: by a list that was given, and by what this run has seen.

    Raises:
        ConfigError: a file cannot be read, or the two do not agree.
    """
    listed, own = settings.deployment.keys, folder.path / KEYS
    known = read_keys(own) if own.is_file() else {}
    given = {} if listed is None else read_keys(Path(listed))
    if odd := sorted(site for site in known.keys() & given.keys() if known[site] != given[site]):
        raise ConfigError(
            f"deployment.keys={listed} has another key of site {odd[0]!r} than this run saw ({own}); if the site made "
            f"a new one, change its line in {KEYS} too, once the site confirmed the key"
        )
    return Pins({**known, **given}, closed=listed is not None)


def read_keys(path: Path) -> dict[str, str]:
    """Names and their keys.

    Raises:
        ConfigError: the file cannot be read or names nobody, or a line is no key.
    """
    keys = {str(site): str(key) for site, key in read_mapping(path, "north: KEY").items()}
    if not keys:
        raise ConfigError(f"{path} names no site, so that none could take part; write lines such as 'north: KEY'")
    if odd := [site for site, key in keys.items() if not KEY.fullmatch(key)]:
        raise ConfigError(f"{path}: {odd[0]!r} has no key of 64 hexadecimal digits; take the line of its site.pub")
    return keys


def save_keys(folder: RunFolder, keys: Mapping[str, str]) -> None:
    """Keep which name belongs to which key."""
    write_atomic(folder.path / KEYS, "".join(f"{json.dumps(site)}: {key}\n" for site, key in sorted(keys.items())))


def at_first_sight(pins: Pins, round: int) -> list[dict[str, Any]]:
    """Events for names whose key this run took at first sight, and nobody listed."""
    seen, pins.seen = pins.seen, []
    detail = "its name belongs to the key {} from now on; compare it with the site's site.pub"
    return [event(round, site, "first sight", detail.format(pins.keys[site])) for site in seen]


def agreed(sites: Mapping[str, Facts], settings: Experiment) -> int:
    """The channels of the images at all sites, grey ones repeated where others have colour.

    Raises:
        ConfigError: sites differ in what must be the same.
    """
    first = next(iter(sites.values()))
    for facts in sites.values():
        for name, value in facts.settings.items():
            if value != first.settings.get(name):
                told = f"{first.site!r} has {_shown(first.settings.get(name))}, {facts.site!r} has {_shown(value)}"
                raise ConfigError(f"sites must agree on {_shown(name)}: {told}")
    found = {facts.channels: facts.site for facts in sites.values()}
    wanted = max(found) if settings.config.data.channels == "auto" else settings.config.data.channels
    for channels, site in found.items():
        if channels != wanted and (channels, wanted) != (1, 3):
            raise ConfigError(f"site {site!r} has images of {channels} channels, not {wanted}; export all images alike")
    return int(wanted)


def check_sites(experiment: Experiment, sites: Mapping[str, Facts]) -> None:
    """What `Experiment.check_sites` checks, by what sites tell of themselves.

    Raises:
        ConfigError: a setting that does not fit the sites.
    """
    seen = [facts for facts in sites.values() if facts.seen]
    for knob, named in experiment.data.named_sites.items():
        for name in named:
            if name not in sites:
                raise ConfigError(f"data.{knob}: no site {name!r} is connected; there are {', '.join(sorted(sites))}")
    if not seen:
        raise ConfigError("data.unseen holds every site out; leave at least one to train")
    try:
        channels = {facts.site: facts.channels for facts in seen}
        experiment.check_told(channels, [facts.examples for facts in seen], sites)
        experiment.algorithm()
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_settings(experiment: Experiment) -> None:
    """Check what needs no site, and refuse what cannot be where sites are not in this process.

    Raises:
        ConfigError: with the cure.
    """
    experiment.check()
    check_crossing(experiment)
    check_carried(experiment)
    check_transforms(experiment, experiment.config.engine)


def check_carried(experiment: Experiment) -> None:
    """Refuse pooled data, and what Flower's messages have no place for: models among peers, a second turn in a round.

    Raises:
        ConfigError: with the cure.
    """
    preset = experiment.config.algorithm.preset
    if experiment.declared.trains_on == "pool":
        raise ConfigError(f"algorithm={preset} needs all data in one place; sites keep theirs")
    if experiment.declared.among_peers:
        raise ConfigError(
            f"algorithm={preset} has no server, and sites reach each other through "
            "Flower's server only, which would see and keep every site's model; take engine=in-process, or "
            "algorithm=softpull"
        )
    if experiment.config.data.left_out:
        raise ConfigError(
            "data.left_out is for data in one place; a site on its own machine is left out by not being in "
            "deployment.sites: leave data.left_out=[]"
        )
    if experiment.schedule.order == "random":
        raise ConfigError(
            "federation.order=random may give a site a second turn in a round, which sites behind Flower take for the "
            "first one asked again; take engine=in-process, or federation.order=cyclic"
        )


def check_transforms(experiment: Experiment, engine: str) -> None:
    """Refuse what must remember in one process, where sites are served by several.

    Raises:
        ConfigError: naming the transform and the engines that serve it.
    """
    if engine == "flower":
        experiment.refuse_seeded()
        if experiment.deployment.terms is not None:
            raise ConfigError(
                "deployment.terms is for runs in one place; across machines each site names its own terms in its "
                "node-config (terms='...'): leave deployment.terms=null"
            )
    for transform in experiment.transforms:
        if transform.lives_in == "run":
            raise ConfigError(
                f"{transform.name} needs all sites in one process, which holds the key: take engine=in-process, or "
                "privacy.aggregation=masked across machines"
            )
        if transform.lives_in == "site" and engine == "flower-simulation":
            raise ConfigError(
                f"{transform.name} needs one process for each site, and a simulation may serve a site by several; take "
                "engine=in-process or sites on their own machines"
            )


def other_versions(sites: Mapping[str, Facts], round: int) -> list[dict[str, Any]]:
    """Events for sites whose libraries are not the server's, although its code runs there: numbers may differ."""
    here = library_versions()
    events = []
    for facts in sites.values():
        other = [
            f"{name} {re.sub('[^ -~]', '?', facts.versions.get(name, 'unknown'))[:20]} (server: {own})"
            for name, own in here.items()
            if facts.versions.get(name) != own
        ]
        if other:
            events.append(event(round, facts.site, "versions", ", ".join(other)))
    return events


def goes_back_to(checkpoint: Checkpoint, site: str) -> set[int]:
    """Rounds whose end the server may come back to: the last checkpoint's, and that of the site's best model."""
    best = checkpoint.best()
    return {checkpoint.round, *(best[name].round for name in (f"personal/{site}", "global") if name in best)}


def _shown(told: str | None) -> str:
    return printable(str(told)[:200])


def _in_order(sites: Mapping[str, Facts]) -> list[str]:
    """As the data module orders them: seen ones first, then by name."""
    return sorted(sites, key=lambda name: (not sites[name].seen, name))


def is_score(row: Mapping[str, Any]) -> bool:
    """Whether what a site showed looks like a row of metrics.csv."""
    if row.keys() != set(COLUMNS[METRICS]):
        return False
    words = ("checkpoint", "site", "split", "view", "region", "case", "metric", "unit", "grid")
    plain = all(isinstance(row[word], str) and len(row[word]) <= 200 and row[word].isprintable() for word in words)
    if not plain or any(row[word].startswith(FORMULA) for word in words) or not isinstance(row["round"], int):
        return False
    value, (least, most) = row["value"], bounds(row["metric"])
    return value is None or (isinstance(value, int | float) and (math.isnan(value) or least <= value <= most))
