"""Who owns which setting, and the settings that belong to a run as a whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from fedseg.algorithms import ALGORITHMS, Algorithm
from fedseg.algorithms.composed import composed
from fedseg.algorithms.recipe import Training
from fedseg.common.parts import OwnPart
from fedseg.configs.compose import Schema
from fedseg.configs.parts import OpenTable
from fedseg.datamodules import DATASETS, MultiCenterDataModule
from fedseg.evaluation import FULL
from fedseg.federation.client import Compute
from fedseg.federation.contract import Split
from fedseg.federation.ranges import FinitePositive, ProperShare, check_ranges
from fedseg.federation.schedule import Schedule
from fedseg.launch.foreign import FOREIGN
from fedseg.models import create_model, create_monai_model, create_nca_model
from fedseg.models.losses import LOSSES as REGION_LOSSES
from fedseg.privacy.settings import Compression, Privacy


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        seed: of initial weights, splits, sampling and batches.
        output: the run's folder; null makes runs/DATA-ALGORITHM-seedN-TIME, under `wandb agent` runs/SWEEP/...-RUN_ID.
        resume: go on in the folder `output`; what it saved is the config; only rounds, the place of the data and how it
            is cached, device, threads, W&B and overlays may change.
        protocol: personalised scores every site's own test cases; leave_one_site_out runs a fold per site, in which the
            site takes no part in training and all its cases are the test.
        pretrained: folder of an earlier run whose encoder is the start of this one, at the server and at every site.
        networks: of single sites that train others than `model`, each given by its settings in one string, as in
            {hospital_b: model=unet model.encoder=resnet34}; for methods that share no tensor (medisecfed, local).
        stages: runs in a row, each given by its settings in one string ("algorithm=contrastive federation.rounds=40",
            "algorithm=ditto data.labelled_patients=2") and starting from the encoder of the one before.
        engine: in-process trains all sites in this process; flower-simulation spreads them over cores or GPUs with
            Flower's simulation; flower is for runs across machines, which `flwr run` starts (docs/deployment.md).
        loggers: Lightning's, told of every round what W&B is told: csv, tensorboard, mlflow, in the run's folder (or
            where MLFLOW_TRACKING_URI says), or package.module:Name of one that takes save_dir.
        experiment: a file configs/experiment/NAME.yaml, or the path of a YAML file, for example another run's
            config.yaml; merged below the command line.
    """

    seed: int = 0
    output: str | None = None
    resume: bool = False
    protocol: Literal["personalised", "leave_one_site_out"] = "personalised"
    pretrained: str | None = None
    networks: Mapping[str, str] | None = None
    stages: tuple[str, ...] = ()
    engine: Literal["in-process", "flower-simulation", "flower"] = "in-process"
    loggers: tuple[Literal["csv", "tensorboard", "mlflow"] | OwnPart, ...] = ()
    experiment: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """How models are scored.

    Attributes:
        metrics: of the final scoring: dice, iou, hd95, assd, nsd, sensitivity, precision, rvd, missed,
            invented; on request lesion_f1, ece, brier, hd95_pooled and offset too, which adds a table of how sites
            outline. Validation during training takes dice and iou, and the one of `choose_by`.
        choose_by: the validation score by which the best round is chosen: dice, iou, nsd or lesion_f1.
        tolerance: of nsd (surface Dice), in millimetres where the spacing is known, else in pixels.
        overlap: of neighbouring windows, as a share of their size, where images are predicted by a sliding window
            (data.fit=patches); more is smoother and slower.
        grid: of the final scoring: each case's own pixels, to which probabilities are brought back, or the network's.
            Validation during training takes the network's.
        predictions: keep the masks of every test case in the run's folder, in the case's own geometry; across machines
            in the folder of its site.
        groups: columns of the manifest, such as [sex,scanner]: tables of the scores by their values, over patients.
        group_minimum: patients of a group; what fewer would show is not shown.
        overlays: draw the worst, median and best test case of every site.
        cross_sites: also score every site's best personal model at all other sites (cross_sites.csv, a table and a heat
            map); costs sites times sites predictions; across machines only if all sites' terms agree.
        test: score test cases; false is for runs that choose settings: no test case is predicted, scored or drawn.
        statistics_per: at sites that took no part, whose images the running statistics of the view own-statistics are
            of: site is all images of the site, one model; case is those of each case alone, a model for each.
        entropy_passes: at sites that took no part, passes over their test images, without labels, in which scales and
            shifts of the global model's normalisation learn to be sure (TENT): the view entropy; 0 leaves it out.
        entropy_per: site is one such model for all images of the site; case is one for each case, from the global model
            anew. Its running statistics are of the same images, whatever statistics_per says.
        entropy_lr: learning rate of these passes (Adam).
    """

    metrics: tuple[str, ...] = FULL
    choose_by: Literal["dice", "iou", "nsd", "lesion_f1"] = "dice"
    tolerance: float = 2.0
    overlap: ProperShare = 0.25
    grid: Literal["own", "network"] = "own"
    predictions: bool = False
    groups: tuple[str, ...] = ()
    group_minimum: PositiveInt = 5
    overlays: bool = True
    cross_sites: bool = False
    test: bool = True
    statistics_per: Literal["site", "case"] = "site"
    entropy_passes: NonNegativeInt = 0
    entropy_per: Literal["site", "case"] = "site"
    entropy_lr: FinitePositive = 1e-3

    @property
    def splits(self) -> tuple[Split, ...]:
        """Splits of the final scoring."""
        return ("val", "test") if self.test else ("val",)

    def __post_init__(self) -> None:
        check_ranges(Evaluation, vars(self), "evaluation")
        of_test = {"predictions": self.predictions, "cross_sites": self.cross_sites, "groups": bool(self.groups)}
        if not self.test and (told := [f"evaluation.{name}" for name, asked in of_test.items() if asked]):
            raise ValueError(
                f"evaluation.test=false scores no test case, and {', '.join(told)} is of these; leave it out"
            )
        for name, what in (
            ("entropy_per", "whose images a model becomes sure of"),
            ("entropy_lr", "how fast a model becomes sure"),
        ):
            value = getattr(self, name)
            if value != getattr(Evaluation, name) and not self.entropy_passes:
                raise ValueError(
                    f"evaluation.{name}={value} says {what}, and evaluation.entropy_passes=0 "
                    f"makes none; take evaluation.entropy_passes=3, or leave {name} out"
                )
        if self.predictions and self.grid != "own":
            raise ValueError(
                "evaluation.predictions=true keeps masks in the cases' own geometry, but evaluation.grid=network has "
                "others; take evaluation.grid=own, or leave evaluation.predictions=false"
            )


@dataclass(frozen=True)
class Deployment:
    """A run across machines (docs/deployment.md), or in Flower's simulation.

    Attributes:
        sites: that must be connected before the run starts; empty for all that are connected by then.
        patience: seconds to wait for them, at least until federation.min_sites are there.
        timeout: seconds to wait for a site's answer; a later one does not count: the round goes on without the site.
        case_scores: what the server is told of scores: means and numbers of cases of each site, or pseudonyms: every
            case's scores under a name that only the site can resolve, and that tells which cases are of one patient.
        cores: of the simulation: CPU cores of one site's turn.
        gpus: of the simulation: GPUs of one site's turn, such as 0.25.
        keys: file with a line `NAME: KEY` for every site that may take part across machines, such as the keys.yaml of
            an earlier run; null binds each name to the first key that this run sees, and keeps that in its keys.yaml.
        terms: where all data are in one place: a folder with SITE.yaml, the terms of each site that has some; across
            machines each site names its own in its node-config.
    """

    sites: tuple[str, ...] = ()
    patience: NonNegativeFloat = 300.0
    timeout: Annotated[float, Field(gt=0, lt=math.inf)] = 3600.0
    case_scores: Literal["means", "pseudonyms"] = "means"
    cores: PositiveInt = 1
    gpus: NonNegativeFloat = 0.0
    keys: str | None = None
    terms: str | None = None

    def __post_init__(self) -> None:
        check_ranges(Deployment, vars(self), "deployment")


@dataclass(frozen=True)
class Wandb:
    """Weights & Biases.

    Attributes:
        mode: online, offline (no account, no network; `wandb sync` uploads later) or disabled. `wandb agent` makes it
            online, unless the command line says otherwise.
        project: W&B project; null is that of WANDB_PROJECT, else federated-segmentation.
        entity: W&B user or team; null is your default.
        name: of the run; null makes one from algorithm, data and seed.
        group: runs that differ in their seed only; null makes it from data, algorithm and a digest of the settings.
        tags: of the run.
        artifacts: upload the saved models when the run ends.
        images: upload pictures of test cases, which are pictures of patients where the data are.
    """

    mode: Literal["online", "offline", "disabled"] = "disabled"
    project: str | None = None
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    artifacts: bool = False
    images: bool = False


METHODS = OpenTable(ALGORITHMS, "algorithm", Algorithm, join=composed)
DATA = OpenTable(DATASETS, "data", MultiCenterDataModule)
NETWORKS = OpenTable({"smp": create_model, "monai": create_monai_model, "nca": create_nca_model}, "model")
"""Functions (in_channels, classes, *, settings) -> network, or (in_channels, classes, dimensions, *, settings); ours
have the parts encoder, decoder and segmentation_head."""
LOSSES = OpenTable(REGION_LOSSES, "training.loss", given=0)
"""Classes, and functions (logits, mask, known, *, settings) -> scalar."""
OPTIMIZERS = OpenTable({}, "training.optimizer", given=2)
"""Functions and classes (parameters, lr, settings) -> torch.optim.Optimizer."""
SCHEDULES = OpenTable({}, "training.schedule")
"""Functions (past, rounds, *, settings) -> factor of training.lr in a round before which so many are past."""

SCHEMA = Schema(
    groups={"algorithm": METHODS, "data": DATA, "model": NETWORKS},
    sections={
        "training": Training,
        "trainer": Compute,
        "federation": Schedule,
        "privacy": Privacy,
        "compression": Compression,
        "evaluation": Evaluation,
        "deployment": Deployment,
        "wandb": Wandb,
    },
    top=Run,
    own=("output", "resume", "experiment"),
    foreign=FOREIGN,
    parts={"training.loss": LOSSES, "training.optimizer": OPTIMIZERS, "training.schedule": SCHEDULES},
)
