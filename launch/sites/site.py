"""A site on its own machine: its data, its worker, and its own record of every run."""

from __future__ import annotations

import hashlib
import hmac
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from fedseg.common.files import write_atomic
from fedseg.common.parts import own_parts
from fedseg.configs.compose import ConfigError, as_yaml, compose, departing, load
from fedseg.datamodules.errors import DataError
from fedseg.evaluation import check_metrics
from fedseg.federation.contract import VISITING, EvaluateTask, Row, Task
from fedseg.federation.flower.client import RUN, OpenSite, RefusedError
from fedseg.federation.flower.keys import own_key
from fedseg.federation.flower.records import Facts, Question
from fedseg.federation.state import State, from_bytes
from fedseg.federation.terms import Terms
from fedseg.launch.experiment import Experiment, OneByOne
from fedseg.launch.folders.grouping import group_rows
from fedseg.launch.folders.kept_masks import kept_masks
from fedseg.launch.folders.pretrained import PretrainedEncoder
from fedseg.launch.folders.restore import check_fingerprints, check_splits
from fedseg.launch.networks import named
from fedseg.launch.run import note_findings, with_sites
from fedseg.launch.scores.scoring import Scorer
from fedseg.launch.settings import SCHEMA
from fedseg.launch.sites.spending import Spending, Spent, released
from fedseg.launch.sites.terms import check_terms, read_terms, tells
from fedseg.privacy.accounting import Account, Ledger, dearest
from fedseg.reporting import ReportingError
from fedseg.reporting.environment import library_versions
from fedseg.reporting.folder import METRICS, RunFolder, complete_lines, pseudonym
from fedseg.reporting.summary import as_means

T = TypeVar("T")
FILED = ("round", "checkpoint", "split", "view")
"""What tells the scores of one turn apart from those of another."""
LOCAL = (
    "data.root",
    "data.manifest",
    "data.cache",
    "data.cache_dir",
    "data.public",
    "data.workers",
    "trainer.threads",
    "trainer.accelerator",
)
"""Settings that a site has for itself; all others are the run's."""


@dataclass(frozen=True)
class Local:
    """What a site says for itself, in its SuperNode's node-config.

    Attributes:
        site: its name.
        state: folder for all that it keeps.
        data_root: folder of its data; empty where the data set needs none.
        settings: further settings of its own, such as "trainer.threads=4 data.cache=memory".
        parts: methods, data sets and networks from outside the suite (`package.module:Name`) that a run may use there.
        terms_file: the site's own terms; none where it has none.
        shows_cases: whether the server may see single cases by name; only where server and site are one machine.
    """

    site: str
    state: Path
    data_root: str = ""
    settings: str = ""
    parts: tuple[str, ...] = ()
    terms_file: Path | None = None
    shows_cases: bool = False

    @classmethod
    def read(cls, node: Mapping[str, Any]) -> Local:
        """From a node-config.

        Raises:
            ConfigError: a key is missing or unknown.
        """
        known = {"site", "state", "data-root", "settings", "parts", "terms"}
        if odd := sorted(set(node) - known - {"partition-id", "num-partitions"}):
            raise ConfigError(f"node-config: unknown key {odd[0]!r}; known: {', '.join(sorted(known))}")
        for key in ("site", "state"):
            if not str(node.get(key, "")):
                raise ConfigError(f"node-config: {key!r} is needed, such as --node-config \"site='B' state='/srv/b'\"")
        root, more = str(node.get("data-root", "")), str(node.get("settings", ""))
        parts = tuple(shlex.split(str(node.get("parts", ""))))
        terms = Path(str(node["terms"])).expanduser() if "terms" in node else None
        return cls(str(node["site"]), Path(str(node["state"])).expanduser(), root, more, parts, terms)

    def terms(self) -> Terms:
        """Its own terms, as they are now.

        Raises:
            ConfigError: the file cannot be used.
        """
        return Terms() if self.terms_file is None else read_terms(self.terms_file)

    def applied(self, config: DictConfig) -> DictConfig:
        """The run's settings, with those that are the site's own.

        Raises:
            ConfigError: a setting that is not a site's to choose, that the run's data set does not have, or a value
                that cannot be used; a part from outside the suite that the site has not agreed to.
        """
        chosen = {key: OmegaConf.select(config, key) for key in SCHEMA.parts}  # older runs lack some
        chosen |= {group: config[group].name for group in SCHEMA.groups}
        further = [("trainer.callbacks", name) for name in config.trainer.get("callbacks") or ()]
        further += [("networks", name) for name in named(config)]
        for key, part in ((key, part) for key, name in (*chosen.items(), *further) for part in own_parts(name)):
            if part not in self.parts:
                raise ConfigError(
                    f"the run uses {key}={part}, which is no part of the suite; this site imports it once its "
                    f"node-config says parts='{' '.join((*self.parts, part))}'"
                )
        own: dict[str, Any] = {"data.cache": "disk", "data.cache_dir": str(self.state / "cache")}
        if "manifest" in config.data:
            own["data.manifest"] = None
        if self.data_root and "root" in config.data:
            own["data.root"] = str(Path(self.data_root).expanduser())
        told = shlex.split(self.settings)
        for setting in told:
            if (key := setting.partition("=")[0]) not in LOCAL:
                raise ConfigError(f"node-config: settings may hold {', '.join(LOCAL)}, not {key!r}")
        try:
            return compose(told, SCHEMA, base=departing(config, own))
        except ConfigError as error:
            raise ConfigError(f"node-config: settings={self.settings!r}: {error}") from error


class Opener:
    """Opens the site for a question; what was opened for the question before is used again if it is of the same run.

    Args:
        local: what the site says for itself.
    """

    def __init__(self, local: Local) -> None:
        self.local = local
        self._for: tuple[str, str, int, Terms] | None = None
        self._open: LaunchedSite | None = None

    def __call__(self, question: Question, folder: Path) -> OpenSite:
        """See `federation.flower.client.SiteClient`."""
        terms = self.local.terms()
        if self._open is None or not self._serves(self._open, question, terms):
            self._for = None  # first, since opening may fail
            self._open = LaunchedSite(self.local, question, folder, terms)
        self._for = (question.run, question.config, question.channels, terms)
        return self._open

    def _serves(self, opened: LaunchedSite, question: Question, terms: Terms) -> bool:
        """Whether what is open is of this run; the channels that sites agreed on may be those that it has anyway."""
        if self._for is None or question.kind == "hello":  # a greeting looks at everything anew
            return False
        run, config, channels, known = self._for
        fits = question.channels in (channels, opened.experiment.data.image_channels)
        return fits and (run, config, known) == (question.run, question.config, terms)


class LaunchedSite:
    """One site, opened for one run.

    Args:
        local: what the site says for itself.
        question: the first one of the run.
        folder: the site's record of this run.
        terms: the site's own.

    Raises:
        RefusedError: the run cannot take place here.
    """

    def __init__(self, local: Local, question: Question, folder: Path, terms: Terms) -> None:
        self.terms, self.run = terms, question.run
        self.spending = Spending(local.state)
        self._filed: set[tuple[Any, ...]] | None = None  # whose scores the site's table holds
        self.local, self.folder = local, RunFolder(folder)
        elsewhere = Spent()
        if terms.max_epsilon is not None:
            elsewhere = self.spending.elsewhere(self.run, terms.max_delta)
        self.experiment = _refusing(lambda: self._experiment(question, elsewhere))
        self.scorer = Scorer(self.experiment, kept_masks(self.experiment, self.folder))
        self.pseudonym = Pseudonyms(local.state)
        self._record()

    def _experiment(self, question: Question, elsewhere: Spent) -> Experiment:
        config = self.local.applied(load(question.config, SCHEMA, "the run's config"))
        experiment = Experiment(config, channels=question.channels, encoder=_encoder(config, self.folder.path))
        if not self.local.shows_cases:
            experiment.refuse_seeded()
        check_terms(experiment, self.local.site, self.terms, elsewhere)
        for transform in experiment.transforms:
            transform.least_here = self.terms.least_sites
        check_metrics(experiment.evaluation.metrics, experiment.evaluation.tolerance)
        experiment.data.restrict(self.local.site, question.channels or None)
        experiment.data.setup()
        self._check_encoder(question, experiment)
        return experiment

    def _check_encoder(self, question: Question, experiment: Experiment) -> None:
        """What the earlier run learnt from here must not score this one."""
        if experiment.encoder is None or not RUN.fullmatch(question.earlier):
            return
        earlier = RunFolder(self.folder.path.parent / question.earlier)
        try:
            experiment.encoder.check_splits(experiment.data.splits(), earlier.splits())
        except ConfigError as error:
            raise RefusedError(
                "the encoder to start from learnt from images that validate or test here; take that run's data.split, "
                "data.split_seed and data.unseen"
            ) from error

    def _record(self) -> None:
        """The site's own record of the run: settings, and which case serves for what; on a repeat, they must agree."""
        rows, prints = self.experiment.data.splits(), self.experiment.data.fingerprints(anew=True)
        if self.folder.holds_run:
            try:
                check_splits(self.folder, rows)
                check_fingerprints(self.folder, prints)
            except ReportingError as error:
                raise RefusedError(
                    "its data changed since this run began; the site's log names the first case"
                ) from error
            table = self.folder.path / METRICS
            if table.exists():
                write_atomic(table, "".join(complete_lines(table)))  # a kill may have left a part of a line
            return
        groups = _refusing(partial(group_rows, self.experiment))
        self.folder.path.mkdir(parents=True, exist_ok=True)
        self.folder.write_splits(rows)
        self.folder.write_groups(groups)
        self.folder.write_raters(self.experiment.data.agreement())
        note_findings(self.folder, self.experiment.data.findings)
        self.folder.write_fingerprints(prints)
        self.folder.write_environment({"seed": self.experiment.config.seed})
        self.folder.write_config(as_yaml(with_sites(self.experiment.config, self.experiment.data)))

    @cached_property
    def transport(self) -> OneByOne:
        """The worker."""
        site = self.experiment.data.site(self.local.site)
        way = _refusing(lambda: self.experiment.in_process({self.local.site: site}, self.scorer))
        method: Any = way.worker
        for transform in self.experiment.transforms:  # what travels past masks or noise is not for the server to allow
            _refusing(partial(transform.check, method))
        _refusing(self.experiment.check_styles)
        _refusing(partial(method.check_site, site))
        return way

    def facts(self) -> Facts:
        """What the site tells of itself."""
        data = self.experiment.data
        site = data.site(self.local.site)
        regions = {name: list(ids) for name, ids in data.regions.labels.items()}
        settings = {"regions": json.dumps(regions), "exclusive": str(data.regions.exclusive), "size": str(data.size)}
        return Facts(
            self.local.site,
            site.seen,
            data.image_channels,
            site.examples,
            settings,
            library_versions(),
            images=site.training_images,
            terms=self.terms,
        )

    def forbids(self, task: Task) -> str:
        """Which of the site's terms stands against a task; see `federation.flower.client.OpenSite`.

        Scores of the patients whom noise hides would tell who they are, and no run asks for them.
        """
        method: Any = self.transport.worker
        private = self.experiment.privacy.mechanism != "none" or self.terms.max_epsilon is not None
        if private and isinstance(task, EvaluateTask) and "train" in task.splits:
            return "scores of training patients would leave without noise"
        return self.terms.forbids(task, tells(method))

    def release(self, before: State, after: State) -> None:
        """Charge a turn to the site's own ledger of all runs; see `federation.flower.client.OpenSite`.

        Which state a turn starts from is the server's word, and so is the account that lies in that state. The ledger
        tells what this run has released.
        """
        events, most = released(before, after, self.experiment.transforms), self.terms.max_epsilon
        if not events:
            return
        dear = self.spending.after(self.run, dearest(events, min(self.experiment.privacy.candidates)))
        if most is not None and (now := Spent(dear, self.terms.max_delta)).epsilon > most:
            raise RefusedError(
                f"its terms (max_epsilon: {most:g}) let no more of it leave, in whatever run: with this turn "
                f"epsilon {now.told}; end the run, or let the site's people raise max_epsilon"
            )
        if why := self._exhausted(dear[self.run]):
            raise RefusedError(why)
        self.spending.add(self.run, events)

    def _exhausted(self, events: Ledger) -> str:
        """Whether these events of the run are above its own limit, in words; empty if they are not.

        Noise that is seeded, in simulations, repeats with its turn, which then tells nothing new.
        """
        privacy = self.experiment.privacy
        for promise in (transform.guarantee for transform in self.experiment.transforms):
            if promise is not None and promise.limit is not None and privacy.randomness == "secret":
                account = Account(promise, privacy.accountant)
                if account.exceeded(epsilon := account.epsilon(events)):
                    return f"{account.told(epsilon)}, by its own ledger, in which turns asked again count again"
        return ""

    def told(self, task: EvaluateTask, rows: Sequence[Row]) -> Sequence[Row]:
        """File the scores with the names of cases; give means, or scores under pseudonyms."""
        if not rows:
            return []
        if task.topic != VISITING:  # the site's table is of its own models
            self._file(rows)
        if self.local.shows_cases:
            return rows
        if self.experiment.deployment.case_scores == "means":
            return as_means(pd.DataFrame(rows))
        named = [{**row, "case": self._pseudonymous(row["case"]) if row["case"] else ""} for row in rows]
        return sorted(named, key=lambda row: str(row["case"]))  # cases come in the order of their real names

    def _pseudonymous(self, case: str) -> str:
        """The pseudonym of a case; where its patient has several, it tells which cases are of one."""
        patient = self._patients[case]
        return pseudonym(self.pseudonym(case), "" if patient == case else self.pseudonym(f"patient {patient}"))

    @cached_property
    def _patients(self) -> dict[str, str]:
        rows = self.experiment.data.splits()
        return {row["case"]: row["patient"] for row in rows if row["site"] == self.local.site}

    def _file(self, rows: Sequence[Row]) -> None:
        """Append scores; those of a turn that is asked again are there already, and are the same."""
        filed = self._read_filed() if self._filed is None else self._filed
        self._filed = None  # read again after an append that fails
        self.folder.append_scores(row for row in rows if tuple(row[key] for key in FILED) not in filed)
        self._filed = filed | {tuple(row[key] for key in FILED) for row in rows}

    def _read_filed(self) -> set[tuple[Any, ...]]:
        return set(self.folder.scores()[[*FILED]].itertuples(index=False, name=None))


class Pseudonyms:
    """Names for cases and patients that only this site can resolve: keyed hashes; the key lies in its own folder.

    Args:
        folder: of the site.

    Raises:
        CheckpointError: the file of the key holds none; under a key that others know, names could be tried.
    """

    def __init__(self, folder: Path) -> None:
        self._key = own_key(folder / "pseudonyms.key", "the same cases then have other pseudonyms")

    def __call__(self, name: str) -> str:
        """The same for the same name in every run at this site."""
        return hmac.new(self._key, name.encode(), hashlib.sha256).hexdigest()[:16]


def _encoder(config: DictConfig, folder: Path) -> PretrainedEncoder | None:
    """The encoder that came with the first question of the run."""
    if not config.pretrained:
        return None
    path = folder / "start.safetensors"
    if not path.is_file():
        raise RefusedError("the encoder to start from (pretrained) did not come with the run's first question")
    state = from_bytes(path.read_bytes())
    round = int(state.scalars["round"])
    return PretrainedEncoder(Path(config.pretrained), round, state["encoder"], config.model, config.data.name)


def _refusing(build: Callable[[], T]) -> T:
    """Errors in settings may be told to the server, whose settings they are; errors in data name files, and may not."""
    try:
        return build()
    except DataError:
        raise
    except ValueError as error:
        raise RefusedError(f"the run's settings cannot be used there: {error}") from error
