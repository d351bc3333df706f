"""The objects that a config describes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from fedseg.algorithms import Algorithm
from fedseg.algorithms.functional.adaptation import with_running_statistics
from fedseg.algorithms.functional.noise_choice import ChosenNoise
from fedseg.algorithms.functional.private import PrivateStep
from fedseg.algorithms.harmonised import harmonised
from fedseg.algorithms.recipe import Recipe, Training
from fedseg.common.cores import usable_cores
from fedseg.common.seeds import derive_seed
from fedseg.configs.compose import ConfigError
from fedseg.datamodules import MultiCenterDataModule, SiteData
from fedseg.datamodules.public import public_images
from fedseg.evaluation import check_metrics
from fedseg.federation.allocator import keep_freed_memory
from fedseg.federation.checkpoint import Checkpoint
from fedseg.federation.client import Compute
from fedseg.federation.contract import Evaluate, Observer, Transform, Transport
from fedseg.federation.engine import POOL, Federation
from fedseg.federation.ledger import Ledger
from fedseg.federation.schedule import Schedule, check_method, check_roster, check_times
from fedseg.federation.transport import InProcess
from fedseg.federation.workers import SideBySide
from fedseg.launch import networks
from fedseg.launch.folders.pretrained import PretrainedEncoder
from fedseg.launch.settings import DATA, METHODS, NETWORKS, Deployment, Evaluation
from fedseg.models import Window, check_sides
from fedseg.privacy.build import build_transforms
from fedseg.privacy.settings import Compression, Privacy
from fedseg.reporting.loggers import check_loggers

Scoring = Evaluate[Algorithm, SiteData]
OneByOne = InProcess[Algorithm, SiteData]
Way = OneByOne | SideBySide[Algorithm, SiteData]
"""To the sites of one machine."""


@dataclass(frozen=True)
class Experiment:
    """One config, and what is built from it.

    Attributes:
        config: resolved by `configs.compose.compose`.
        channels: of the images, where these lie on other machines; 0 looks at the data.
        encoder: the encoder to start from, where its run's folder lies on another machine.
    """

    config: DictConfig
    channels: int = 0
    encoder: PretrainedEncoder | None = None

    def __post_init__(self) -> None:
        quieten_libraries()
        keep_freed_memory()
        try:
            threads = 1 if self.compute.workers > 1 else self.compute.threads  # a fork must not meet threads
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if threads is not None:
            torch.set_num_threads(threads)

    def check(self) -> None:
        """Build everything that needs no image, so that a wrong setting ends the run before images are read.

        Raises:
            ConfigError: a setting that is out of range, or that does not fit another one.
        """
        try:
            check_loggers(self.config.get("loggers") or ())
            check_metrics(self.evaluation.metrics, self.evaluation.tolerance)
            _ = self.schedule, self.data, self.deployment
            if self.config.protocol == "leave_one_site_out":
                self._check_folds()
            self._check_arrivals()
            if self.compute.workers > 1 and self.data.workers:
                raise ConfigError(
                    f"trainer.workers={self.compute.workers} prepare their batches themselves; leave data.workers=0"
                )
            if self.pretrained is not None:
                self.pretrained.check(self.config.model)
            algorithm = self.declared
            if algorithm.labelled and not algorithm.leaves_out_unknown:
                self._check_all_counts(f"the loss of algorithm={self.config.algorithm.name} does not", "method")
            if algorithm.labelled and not algorithm.recipe.leaves_out_unknown:
                told = f"training.loss={self.config.training.loss} has no argument `known`, so that it cannot"
                self._check_all_counts(told, "loss")
            check_method(self.schedule, algorithm)
            self._check_public(algorithm)
            self._check_statistics(algorithm)
            for one in (algorithm, *(self.algorithm(in_channels=3, site=site) for site in networks.told(self.config))):
                networks.check_method(self.config, one)
            for transform in self.transforms:
                transform.check(algorithm)
                if transform.lives_in != "state" and self.compute.workers > 1:
                    raise ConfigError(
                        f"{transform.name} remembers in one process, and trainer.workers={self.compute.workers} serve "
                        "a site by several; take trainer.workers=1"
                    )
        except (ValueError, FileNotFoundError) as error:
            raise ConfigError(str(error)) from error

    def _check_statistics(self, algorithm: Algorithm) -> None:
        """Refuse statistics of each case for a network that keeps none.

        Raises:
            ConfigError: with the cure.
        """
        per = self.evaluation.statistics_per
        if per != Evaluation.statistics_per and algorithm.views and not with_running_statistics(algorithm.model):
            raise ConfigError(
                f"evaluation.statistics_per={per} says whose images running statistics of normalisation are of, and "
                "the network keeps none; take model.norm=batch, or leave statistics_per out"
            )

    def _check_public(self, algorithm: Algorithm) -> None:
        """Refuse answers about no images, and public images that nobody looks at.

        Raises:
            ConfigError: with the cure.
        """
        told, name = self.config.data.get("public"), self.config.algorithm.preset
        if algorithm.exchanges_answers and told is None:
            raise ConfigError(
                f"algorithm={name} exchanges answers about public images; take data.public=phantom, which draws some, "
                "or data.public=FOLDER of images that all sites and the server have"
            )
        usual = signature(MultiCenterDataModule).parameters["public_images"].default
        if told is None and (many := self.data.public_images) != usual:
            raise ConfigError(
                f"data.public_images={many} is of data.public, which is null; take data.public_images={usual}, or "
                "data.public=phantom"
            )
        if told is not None and not algorithm.exchanges_answers:
            raise ConfigError(
                f"data.public={told}: algorithm={name} looks at no public images; take data.public=null, or "
                "algorithm=medisecfed"
            )

    def _check_folds(self) -> None:
        """Refuse to leave out test cases, or to say something of a site by name, where every site is held out once.

        Raises:
            ConfigError: naming the setting.
        """
        if not self.evaluation.test:
            raise ConfigError(
                "protocol=leave_one_site_out scores the test cases of held-out sites; leave out evaluation.test=false, "
                "or take protocol=personalised"
            )
        for key in ("federation.arrives", "federation.leaves", "data.arrives", "data.unlabelled"):
            if OmegaConf.select(self.config, key):
                raise ConfigError(
                    f"protocol=leave_one_site_out holds out one site after the other, those too that {key} names; take "
                    "protocol=personalised"
                )

    def _check_arrivals(self) -> None:
        """Refuse data that come after the last round.

        Raises:
            ConfigError: naming the site.
        """
        for site, shares in self.config.data.arrives.items():
            if (last := max(shares)) > self.schedule.rounds:
                raise ConfigError(
                    f"data.arrives={{{site}: {{{last}: {shares[last]}}}}}, and there are "
                    f"federation.rounds={self.schedule.rounds}; take more of these, or an earlier round"
                )

    def _check_all_counts(self, told: str, part: str) -> None:
        """Refuse data of which something does not count, for parts that take all of it into account.

        Args:
            told: which one does not, up to "leave out pixels".
            part: what another one is called.
        """
        cures = {
            "ignore_labels": f"take another {part}, or count them as background with data.background_labels",
            "unannotated": f"take another {part}",
        }
        for name, cure in cures.items():
            if self.config.data[name]:
                raise ConfigError(f"data.{name}: {told} leave out pixels; {cure}")

    def check_sites(self) -> None:
        """Check what only the sites can tell, before the run's folder is written.

        Raises:
            ConfigError: a setting that does not fit the data.
        """
        try:
            self.sites()
            data = self.data
            channels = {site: data.channels_of(site) for site in data.sites}
            examples = [data.site(site).examples for site in data.sites]
            self.check_told(channels, examples, [*data.sites, *data.unseen_sites])
            if self.pretrained is not None and self.pretrained.dataset == self.config.data.name:
                self.pretrained.check_splits(data.splits())
            self.check_styles()
            algorithm = self.algorithm()
            for one in (algorithm, *self.others().values()):
                self._check_step(one)
            for site in data.sites:
                algorithm.check_site(data.site(site))
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def check_told(self, channels: Mapping[str, int], examples: Sequence[int], sites: Iterable[str]) -> None:
        """Check what sites tell of themselves, wherever they are.

        Args:
            channels: of the images of every site that trains.
            examples: labelled training images of each of these.
            sites: all of them, and those that take no part.

        Raises:
            ValueError: a setting that does not fit them.
        """
        fewest = self.declared.fewest_sites
        check_roster(self.schedule, self.transforms, channels, self.config.data.channels, fewest)
        check_times(self.schedule, sites)
        networks.check_sites(self.config, channels)
        if self.declared.labelled and not any(examples):
            raise ConfigError("no site has labelled training images (data.unlabelled): there is nothing to learn")

    def check_styles(self) -> None:
        """Refuse styles of other images for images of which some modalities are not there; a site looks at its own.

        Raises:
            ConfigError: naming the site and the cure.
        """
        harmonise, data = self.config.training.harmonise, self.data
        lacking = {site: data.absent_at(site) for site in (*data.sites, *data.unseen_sites)}
        told = [f"site {site!r} lacks {', '.join(names)}" for site, names in lacking.items() if names]
        told += [f"data.modality_dropout={data.modality_dropout} leaves modalities out"] * (data.modality_dropout > 0)
        method = self.config.algorithm.name
        if told and self.declared.styles_images:
            raise ConfigError(
                f"{told[0]}, and algorithm={method} would give what is not there the style of what is; take another "
                "method"
            )
        if harmonise != "none" and told:
            raise ConfigError(
                f"{told[0]}, and training.harmonise={harmonise} would give what is not there the style of what is; "
                "take training.harmonise=none"
            )

    def _check_step(self, algorithm: Algorithm) -> None:
        """Let the network see a small batch as in training: normalisation needs more than one value per channel.

        Raises:
            ConfigError: the network cannot train on batches of this size.
        """
        data, model = self.data, algorithm.model.train()
        images = torch.zeros(min(2, data.batch_size), self.in_channels, *data.size)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            try:
                model(images)
            except (ValueError, RuntimeError) as error:
                reason = str(error).strip().splitlines()[0]
                cures = {
                    "more than 1 value": "take data.batch_size=2 or more, or model.norm=group",
                    "more than 1 spatial element": "take a larger data.size, or model.norm=group",
                }
                cure = next((cure for words, cure in cures.items() if words in reason), "")
                told = f"the network cannot train with data.size={list(data.size)}, data.batch_size={data.batch_size}"
                raise ConfigError(f"{told}: {reason}" + (f"; {cure}" if cure else "")) from error

    @cached_property
    def data(self) -> MultiCenterDataModule:
        """The data module; `setup` has not been called."""
        settings = self._section("data")
        name = settings.pop("name")
        if settings["split_seed"] is None:
            settings["split_seed"] = self.config.seed
        built: MultiCenterDataModule = DATA[name](**settings)
        return built

    @cached_property
    def public(self) -> torch.Tensor | None:
        """The public images, where a method asks for some."""
        return None if self.data.public is None else public_images(self.data, self.in_channels)

    @cached_property
    def pretrained(self) -> PretrainedEncoder | None:
        """The encoder to start from."""
        if self.encoder is not None:
            return self.encoder
        return PretrainedEncoder.read(self.config.pretrained) if self.config.pretrained else None

    @cached_property
    def compute(self) -> Compute:
        """Where training computes."""
        return Compute(**self._section("trainer"))

    @cached_property
    def schedule(self) -> Schedule:
        """How the federation runs."""
        return Schedule(**self._section("federation"))

    @cached_property
    def evaluation(self) -> Evaluation:
        """How models are scored."""
        return Evaluation(**self._section("evaluation"))

    @cached_property
    def privacy(self) -> Privacy:
        """What is promised of what leaves a site."""
        return Privacy(**self._section("privacy"))

    def refuse_seeded(self) -> None:
        """Refuse noise that the server, which knows the seed, could subtract.

        Raises:
            ConfigError: naming the setting and the cure.
        """
        mechanism = self.privacy.mechanism
        if mechanism != "none" and self.privacy.randomness == "seeded":
            raise ConfigError(
                f"privacy.mechanism={mechanism} with privacy.randomness=seeded protects nobody across machines: the "
                "server knows the seed and can subtract the noise; take privacy.randomness=secret"
            )

    @cached_property
    def transforms(self) -> tuple[Transform, ...]:
        """What happens to updates on their way.

        Raises:
            ValueError: settings that do not go together.
        """
        schedule = self.schedule
        poisson = schedule.sampling == "poisson"
        if self.privacy.mechanism == "site" and poisson and schedule.min_sites > 1:
            raise ValueError("federation.sampling=poisson draws few sites at times; it needs federation.min_sites=1")
        if self.privacy.aggregation == "masked" and poisson:
            raise ValueError(
                "federation.sampling=poisson draws few sites at times; privacy.aggregation=masked needs three"
            )
        rate = schedule.fraction if poisson else 1.0
        return build_transforms(self.privacy, Compression(**self._section("compression")), rate)

    @property
    def _private_step(self) -> PrivateStep | None:
        """How local steps hide patients, if they are to.

        Raises:
            ValueError: another setting stands against it.
        """
        privacy = self.privacy
        if privacy.mechanism != "patient":
            return None
        if self.compute.callbacks:
            raise ValueError(
                "trainer.callbacks may look at and change single gradients, which privacy.mechanism=patient bounds; "
                "leave them out"
            )
        if self.compute.gradient_clip is not None:
            raise ValueError(
                "trainer.gradient_clip would clip gradients that carry their noise already; leave it null, "
                "privacy.clip bounds every patient's"
            )
        noises = privacy.candidates
        common: dict[str, Any] = {
            "clip": privacy.clip,
            "noise": min(noises),
            "patients": privacy.patients_per_step,
            "randomness": privacy.randomness,
            "pass_steps": privacy.pass_steps,
        }
        if len(noises) == 1:
            return PrivateStep(**common)
        return ChosenNoise(**common, noises=noises, epsilon=privacy.epsilon_choice, bound=privacy.loss_bound)

    @property
    def _window(self) -> Window | None:
        """How images are predicted that are larger than what the network sees."""
        data = self.data
        return Window(data.size, data.batch_size, self.evaluation.overlap) if data.patches is not None else None

    @cached_property
    def deployment(self) -> Deployment:
        """How sites on other machines take part."""
        return Deployment(**self._section("deployment"))

    @property
    def in_channels(self) -> int:
        """Channels of the network's input."""
        return self.channels * (2 * self.data.neighbours + 1) if self.channels else self.data.in_channels

    @cached_property
    def declared(self) -> Algorithm:
        """The method for what it declares, before anything is known of the images; it never learns."""
        return self.algorithm(in_channels=3)

    def others(self) -> dict[str, Algorithm]:
        """Site -> the method over that site's own network, where it is another one than the run's."""
        return {site: self.algorithm(site=site) for site in networks.told(self.config)}

    def algorithm(self, in_channels: int | None = None, trained: bool = False, site: str | None = None) -> Algorithm:
        """A fresh instance of the method; the same start for every instance of a run, and of a site's network.

        A pre-trained encoder is loaded once the images' channels are known, that is without ``in_channels``. What takes
        a saved model (``trained``) needs the encoder's file no more than that run.
        """
        channels = self.in_channels if in_channels is None else in_channels
        regions = self.data.regions
        training, rounds = Training(**self._section("training")), self.config.federation.rounds
        public = self.public if in_channels is None else None  # what only answers for images needs none
        recipe = Recipe.build(
            training, regions.activation, channels, self._private_step, rounds, regions.names, self._window, public
        )
        torch.manual_seed(derive_seed(self.config.seed, "start"))
        model = self._network(channels, site, trained, known=in_channels is None)
        if in_channels is None and self.pretrained is not None:  # a saved model needs that run no more
            self.pretrained.load_into(model)
        settings = self._section("algorithm")
        why = chosen_method(settings, training).slices_only
        if self.data.dimensions == 3 and why:
            raise ConfigError(
                f"algorithm={settings['name']} cannot learn from volumes: {why}; take data.dimensions=2, or another "
                "method"
            )
        return build_method(settings, model, recipe)

    def _network(self, channels: int, site: str | None, trained: bool, known: bool) -> nn.Module:
        """The run's network, or that of a site which has another one.

        Args:
            channels: of its input.
            site: whose; None for the run's.
            trained: whether its weights come from elsewhere.
            known: whether these channels are those of the images.
        """
        network = self._plain(networks.network_of(self.config, site))
        if trained or (not known and network["name"] == "monai"):  # whose files fit their own channels only
            network |= dict.fromkeys({"encoder_weights", "encoder_weights_key"} & network.keys())
        if trained or not known:  # counted with the images' own channels, before it learns
            network |= dict.fromkeys({"max_parameters"} & network.keys())
        try:
            model = build_network(network, channels, self.data.regions.channels, self.data.dimensions)
            check_sides(model, self.data.size)
        except (ValueError, FileNotFoundError) as error:
            if site not in networks.told(self.config):
                raise
            raise ConfigError(f"networks.{site}: {error}") from error
        return model

    def sites(self) -> dict[str, SiteData]:
        """All sites by name, and the pool of the seen ones.

        Raises:
            ConfigError: a site has the pool's name.
        """
        names = (*self.data.sites, *self.data.unseen_sites)
        if POOL in names:
            raise ConfigError(f"a site is called {POOL!r}, which is the name of pooled training; rename its folder")
        return {**{name: self.data.site(name) for name in names}, POOL: self.data.pooled()}

    def federation(self, checkpoint: Checkpoint, evaluate: Scoring, observer: Observer) -> Federation:
        """The run on this machine."""
        return self.federation_over(self.way(evaluate), self.data.sites, checkpoint, observer)

    def way(self, evaluate: Scoring) -> Way:
        """To all sites: one worker after the other, or several side by side."""
        one = self.in_process(self.sites(), evaluate)
        if (workers := self.compute.workers) == 1:
            return one
        return SideBySide(one, workers, self.compute.threads or max(1, usable_cores() // workers))

    def in_process(self, sites: Mapping[str, SiteData], evaluate: Scoring) -> OneByOne:
        """A worker for these sites, and one for each that has a network of its own."""
        others = {site: worker for site, worker in self.others().items() if site in sites}
        return InProcess(self.algorithm(), sites, self.compute, evaluate, self.transforms, others)

    def federation_over(
        self,
        transport: Transport,
        sites: Sequence[str],
        checkpoint: Checkpoint,
        observer: Observer,
        ledger: Ledger | None = None,
    ) -> Federation:
        """The server's side of the run, whatever the way to the sites that train."""
        seed, transforms = self.config.seed, self.transforms
        method, schedule = self.algorithm(), self.schedule
        by = self.evaluation.choose_by
        return Federation(
            method, transport, sites, schedule, seed, checkpoint, observer, transforms, ledger, choose_by=by
        )

    @property
    def title(self) -> str:
        """Method, data, network and seed in a few words."""
        config = self.config
        return f"{config.algorithm.preset} on {config.data.preset}, network {config.model.preset}, seed {config.seed}"

    def _section(self, name: str) -> dict[str, Any]:
        return self._plain(self.config[name])

    @staticmethod
    def _plain(config: DictConfig) -> dict[str, Any]:
        section = OmegaConf.to_container(config)
        if not isinstance(section, dict):
            raise ConfigError(f"this is no section: {section!r}")
        return {str(key): value for key, value in section.items() if key != "preset"}


def build_network(settings: Mapping[str, Any], channels: int, outputs: int, dimensions: int) -> nn.Module:
    """The network that the section `model` describes."""
    build = NETWORKS[settings["name"]]
    among = (dimensions,) if "dimensions" in signature(build).parameters else ()
    model: nn.Module = build(channels, outputs, *among, **_without_name(settings))
    return model


def build_method(settings: Mapping[str, Any], model: nn.Module, recipe: Recipe) -> Algorithm:
    """The method that the section `algorithm` describes, over a network."""
    return chosen_method(settings, recipe.training)(model, recipe, **_without_name(settings))


def chosen_method(settings: Mapping[str, Any], training: Training) -> type[Algorithm]:
    """The class that the section `algorithm` names, or what it becomes when its data are harmonised."""
    return harmonised(cast(type[Algorithm], METHODS[settings["name"]]), training)


def _without_name(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in ("name", "preset")}


def quieten_libraries() -> None:
    """Lightning greets and advises at every fit; with a fit per site and round that is noise."""
    for name in ("pytorch_lightning", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"pytorch_lightning\..*")
    warnings.filterwarnings("ignore", message=r".*treespec, LeafSpec.*")
