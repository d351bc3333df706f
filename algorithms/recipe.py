"""What all methods share of a training step: normalisation, loss, optimiser."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from fedseg.algorithms.functional.private import PrivateStep
from fedseg.common.parts import OwnPart, PartError, called, imported, is_path
from fedseg.federation.ranges import (
    FinitePositive,
    HalfShare,
    PositiveShare,
    ProperShare,
    Share,
    check_ranges,
    check_read,
)
from fedseg.models.heads import Activation
from fedseg.models.losses import Loss, LossName, OwnLoss, build_loss
from fedseg.models.normalize import build_normalizer
from fedseg.models.window import Window

POWER = 0.9  # of the polynomial schedule, as in nnU-Net (Isensee et al., Nature Methods 2021)
BACKGROUND = "background"
FALLING = ("cosine", "poly")
"""Schedules that end at 0, and so need to know when."""
READ_BY = {
    "harmonise_target": ("harmonise", ("histogram", "fda", "zscore", "combat", "mixstyle")),
    "harmonise_window": ("harmonise", ("fda",)),
    "mixstyle_probability": ("harmonise", ("mixstyle",)),
    "mixstyle_alpha": ("harmonise", ("mixstyle",)),
    "mixstyle_after": ("harmonise", ("mixstyle",)),
    "schedule_rounds": ("schedule", FALLING),
    "decay": ("schedule", ("step",)),
    "decay_every": ("schedule", ("step",)),
    "momentum": ("optimizer", ("sgd",)),
}
"""Settings that only some choices of another one read."""


def ends(schedule: str) -> bool:
    """Whether a schedule is told how many rounds there are."""
    return schedule in FALLING or is_path(schedule)


@dataclass(frozen=True)
class Training:
    """The training step's knobs.

    Attributes:
        loss: dice_bce, dice, smooth_dice, bce or focal for sigmoid regions; dice_ce, dice, smooth_dice or ce for
            exclusive ones; tversky, jaccard, lovasz or mcc for both; auto takes dice_bce or dice_ce. smooth_dice counts
            absent regions, too, and the background of exclusive ones, smoothed by 1e-5. Or one of your own.
        loss_options: settings of the loss itself, such as {alpha: 0.3, beta: 0.7}; --help training.loss=tversky lists
            them.
        region_weights: of regions in the loss, such as {cup: 3}; those that are not named have 1, as has the
            background, which cross entropies and smooth_dice of exclusive regions count, too.
        normalize: of the network's input, on its device: imagenet (mean and deviation), zscore (per image), none.
        absent: what the network sees of modalities that an image lacks: black, 0 before it is normalised, as if the
            image were black there; or zero, 0 after it is normalised.
        harmonise: give all images, before they are normalised, the style that the sites agree on before round 1:
            histogram matches grey values; fda replaces amplitudes of low frequencies (FDA); zscore sets mean and
            deviation. What sites tell is a mean over their images. combat takes from grey values what sets sites
            apart and leaves how images of a site differ; sites tell sums. mixstyle gives nobody a style: in local steps
            images of a batch take some of each other's (MixStyle), and nothing is told.
        harmonise_target: whose style that is: the mean over sites, or that of the least_complex one, whose images have
            the least entropy and stay as they are.
        harmonise_window: L of harmonise=fda: frequencies up to floor(L * min(height, width)).
        mixstyle_probability: that the images of a batch are mixed (harmonise=mixstyle).
        mixstyle_alpha: an image keeps a share drawn from Beta(alpha, alpha) of its own mean and deviation.
        mixstyle_after: parts of the network whose answers are mixed, such as [encoder.layer1, encoder.layer2], the
            paper's choice of a ResNet; none mixes the images themselves.
        optimizer: of the local steps; amsgrad is Adam with the largest second moment so far (Reddi et al., ICLR 2018).
            Or one of PyTorch's or your own, such as torch.optim:RMSprop.
        optimizer_options: settings of such an optimiser, such as {alpha: 0.9}; weight_decay and momentum too.
        lr: learning rate.
        schedule: of the learning rate over rounds, within which it stays: constant; cosine to 0; poly, to 0 as
            (1 - p)^0.9 (nnU-Net's); step, times `decay` after every `decay_every` rounds. What is fitted for an
            evaluation only (fine-tuning) takes lr itself. Or a function of your own.
        schedule_options: settings of such a function.
        warmup: rounds in which the learning rate rises in equal steps, before the schedule begins.
        schedule_rounds: the round at whose end cosine and poly would come to 0; later rounds keep the last rate; null
            takes federation.rounds.
        decay: factor of schedule=step.
        decay_every: rounds between its steps.
        weight_decay: L2 penalty (decoupled for adamw).
        momentum: of SGD.
        optimizer_state: reset makes a fresh optimiser each round; keep stores its state at the site.
        pieces: parts in which a batch is computed one after the other, their gradients added up (gradient
            accumulation): data.batch_size=32 and 4 pieces make steps of 32 images in the memory of 8. Steps, cost and
            privacy count as without; batch normalisation and Dice see a piece at a time.
        trials: how many trials of `sweep.py tune` found these settings; it changes nothing, and comparisons show it.
        channels_last: memory layout; faster for convolutions, differs from the other layout by rounding.
    """

    loss: Literal["auto", LossName] | OwnPart = "auto"
    loss_options: Mapping[str, Any] | None = None
    region_weights: Mapping[str, PositiveFloat] | None = None
    normalize: Literal["imagenet", "zscore", "none"] = "imagenet"
    absent: Literal["black", "zero"] = "black"
    harmonise: Literal["none", "histogram", "fda", "zscore", "combat", "mixstyle"] = "none"
    harmonise_target: Literal["mean", "least_complex"] = "mean"
    harmonise_window: HalfShare = 0.05
    mixstyle_probability: Share = 0.5
    mixstyle_alpha: FinitePositive = 0.1
    mixstyle_after: tuple[str, ...] = ()
    optimizer: Literal["adam", "adamw", "amsgrad", "sgd"] | OwnPart = "adam"
    optimizer_options: Mapping[str, Any] | None = None
    lr: FinitePositive = 1e-3
    schedule: Literal["constant", "cosine", "poly", "step"] | OwnPart = "constant"
    schedule_options: Mapping[str, Any] | None = None
    warmup: NonNegativeInt = 0
    schedule_rounds: PositiveInt | None = None
    decay: PositiveShare = 0.1
    decay_every: PositiveInt = 10
    weight_decay: NonNegativeFloat = 0.0
    momentum: ProperShare = 0.0
    optimizer_state: Literal["reset", "keep"] = "reset"
    pieces: PositiveInt = 1
    trials: NonNegativeInt = 0
    channels_last: bool = True

    def __post_init__(self) -> None:
        check_ranges(Training, vars(self), "training")
        if self.schedule_rounds is not None and self.warmup >= self.schedule_rounds:
            raise ValueError(
                f"training.warmup={self.warmup} leaves no round of training.schedule_rounds={self.schedule_rounds} to "
                "the schedule; warm up in fewer rounds"
            )
        for name in ("weight_decay", "momentum"):
            if is_path(self.optimizer) and getattr(self, name):
                raise ValueError(
                    f"training.{name} is of the suite's optimisers; to training.optimizer={self.optimizer} it is said "
                    f"as training.optimizer_options={{{name}: {getattr(self, name)}}}"
                )
        if is_path(self.loss) and self.region_weights:
            raise ValueError(
                f"training.region_weights is of the suite's losses; training.loss={self.loss} takes weights in "
                "training.loss_options, if it has any; leave training.region_weights out"
            )
        told = ("schedule_rounds",) if ends(self.schedule) else ()  # one's own schedule is told of rounds, too
        check_read(self, "training", {name: by for name, by in READ_BY.items() if name not in told})

    def lr_in(self, round: int, rounds: int) -> float:
        """The learning rate in a round; it follows from the round alone, whoever was absent or resumed.

        Args:
            round: 1 for the first; 0 outside of training tasks, where `lr` holds.
            rounds: of the run.
        """
        if not round:
            return self.lr
        if round <= self.warmup:
            return self.lr * round / (self.warmup + 1)
        past, whole = round - self.warmup - 1, (self.schedule_rounds or rounds) - self.warmup
        done = min(past, whole - 1) / whole
        if is_path(self.schedule):
            return self.lr * self._own_factor(past, whole)
        factors = {
            "constant": 1.0,
            "cosine": 0.5 * (1 + math.cos(math.pi * done)),
            "poly": math.pow(1 - done, POWER),
            "step": math.pow(self.decay, past // self.decay_every),
        }
        return self.lr * factors[self.schedule]

    def _own_factor(self, past: int, whole: int) -> float:
        """The factor of a schedule from outside.

        Raises:
            ValueError: it is none.
        """
        factor = called(self.schedule, "training.schedule", past, whole, **self.schedule_options or {})
        if not isinstance(factor, int | float) or not 0 <= factor < math.inf:
            raise ValueError(
                f"training.schedule={self.schedule} returned {factor!r} for round {past} of {whole}; it should be a "
                "factor of training.lr, a number from 0"
            )
        return float(factor)

    def require_sgd(self, method: str, why: str, *, momentum: bool = False, instead: str = "") -> None:
        """Refuse other optimisers.

        Args:
            method: that needs SGD.
            why: it does.
            momentum: whether SGD may have momentum.
            instead: what else can be done, after a comma.

        Raises:
            ValueError: another optimiser, or momentum where there must be none.
        """
        if self.optimizer != "sgd":
            raise ValueError(
                f"algorithm={method}: {why}, so take training.optimizer=sgd, not {self.optimizer}{instead}"
            )
        if self.momentum and not momentum:
            raise ValueError(f"algorithm={method}: {why}, so take training.momentum=0, not {self.momentum}{instead}")

    def build_optimizer(self, parameters: Iterable[nn.Parameter], lr: float | None = None) -> torch.optim.Optimizer:
        """The optimiser over these parameters, the suite's in PyTorch's fused form; `lr` instead of the setting."""
        chosen, lr = list(parameters), self.lr if lr is None else lr
        if is_path(self.optimizer):
            made = called(self.optimizer, "training.optimizer", chosen, lr=lr, **self.optimizer_options or {})
            if not isinstance(made, torch.optim.Optimizer):
                raise PartError(f"training.optimizer={self.optimizer} made {made!r}, which is no torch.optim.Optimizer")
            return made
        if self.optimizer == "sgd":
            return torch.optim.SGD(chosen, lr, momentum=self.momentum, weight_decay=self.weight_decay, fused=True)
        kind = torch.optim.AdamW if self.optimizer == "adamw" else torch.optim.Adam
        amsgrad = self.optimizer == "amsgrad"
        return kind(chosen, lr, weight_decay=self.weight_decay, amsgrad=amsgrad, fused=True)


@dataclass(frozen=True)
class Recipe:
    """A training step for one data set.

    Attributes:
        training: the knobs.
        activation: sigmoid per region, or softmax over background and regions.
        normalize: (B, C, H, W) images in [0, 1] -> network input; a module without state.
        loss: (logits, (B, R, H, W) masks, the same of what is known, or None) -> scalar.
        private: how local steps hide every patient; None where they need not.
        rounds: of the run, over which the learning rate may move.
        window: slides over images that are larger than what the network sees; None where it sees them whole.
        in_channels: channels of the network's input.
        public: (N, C, ...) images in [0, 1] that all sites and the server have; None where no method asks for them.
    """

    training: Training
    activation: Literal["sigmoid", "softmax"]
    normalize: nn.Module
    loss: Loss
    private: PrivateStep | None = None
    rounds: int = 1
    window: Window | None = None
    in_channels: int = 3
    public: Tensor | None = field(default=None, compare=False, repr=False)

    @classmethod
    def build(
        cls,
        training: Training,
        activation: Literal["sigmoid", "softmax"],
        in_channels: int,
        private: PrivateStep | None = None,
        rounds: int = 1,
        regions: Sequence[str] = (),
        window: Window | None = None,
        public: Tensor | None = None,
    ) -> Recipe:
        """Make the recipe that the knobs describe; `regions` are the names of the network's outputs.

        Raises:
            ValueError: the loss does not exist or does not fit the activation, or no round is left to the schedule.
            PartError: a part from outside cannot be used.
        """
        if ends(training.schedule) and training.warmup >= rounds:
            raise ValueError(
                f"training.warmup={training.warmup} leaves no round of federation.rounds={rounds} to "
                f"training.schedule={training.schedule}; warm up in fewer rounds"
            )
        if private is not None and training.pieces > 1:
            raise ValueError(
                f"training.pieces={training.pieces}: privacy.mechanism=patient computes gradients patient by patient, "
                "in the memory of a few slices already; take training.pieces=1"
            )
        if private is not None and private.needs_sgd and training.optimizer != "sgd":
            raise ValueError(
                f"training.optimizer={training.optimizer}: privacy.pass_steps and privacy.noises count on steps of the "
                "learning rate's length, as SGD takes them; take training.optimizer=sgd"
            )
        if is_path(training.optimizer):  # here and below: what would stop the run later is raised now
            training.build_optimizer([nn.Parameter(torch.zeros(1))])
        for round in range(1, rounds + 1) if is_path(training.schedule) else ():
            training.lr_in(round, rounds)
        normalize = build_normalizer(training.normalize, in_channels, absent_as_zero=training.absent == "zero")
        loss = _loss(training, activation, regions)
        return cls(training, activation, normalize, loss, private, rounds, window, in_channels, public)

    @property
    def leaves_out_unknown(self) -> bool:
        """Whether the loss leaves out pixels whose label is not known."""
        return not isinstance(self.loss, OwnLoss) or self.loss.leaves_out_unknown


def _loss(training: Training, activation: Activation, regions: Sequence[str]) -> Loss:
    chosen: str = training.loss
    if is_path(chosen):
        return OwnLoss(imported(chosen, "training.loss"), training.loss_options or {}, chosen)
    if chosen == "auto":
        chosen = "dice_bce" if activation == "sigmoid" else "dice_ce"
    named = training.region_weights or {}
    classes = (BACKGROUND, *regions)
    known = classes if activation == "softmax" else classes[1:]
    if odd := sorted(named.keys() - set(known)):
        raise ValueError(f"training.region_weights: {odd[0]!r} is no region; known: {', '.join(known)}")
    weights = [named.get(name, 1.0) for name in classes] if named else None
    return build_loss(cast(LossName, chosen), activation, training.loss_options, weights)
