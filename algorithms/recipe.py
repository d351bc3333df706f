"""What all methods share of a training step: normalisation, loss, optimiser."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import NonNegativeFloat
from torch import nn

from algorithms.functional.private import PrivateStep
from federation.ranges import FinitePositive, ProperShare, check_ranges
from models.losses import Loss, build_loss
from models.normalize import build_normalizer


@dataclass(frozen=True)
class Training:
    """The training step's knobs.

    Attributes:
        loss: dice_bce, dice, bce or focal for sigmoid regions; dice_ce, ce or focal for exclusive ones; auto takes
            dice_bce or dice_ce.
        normalize: of the network's input, on its device: imagenet (mean and deviation), zscore (per image), none.
        optimizer: of the local steps.
        lr: learning rate.
        weight_decay: L2 penalty (decoupled for adamw).
        momentum: of SGD.
        optimizer_state: reset makes a fresh optimiser each round; keep stores its state at the site.
        channels_last: memory layout; faster for convolutions, differs from the other layout by rounding.
    """

    loss: Literal["auto", "dice_bce", "dice", "bce", "focal", "dice_ce", "ce"] = "auto"
    normalize: Literal["imagenet", "zscore", "none"] = "imagenet"
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    lr: FinitePositive = 1e-3
    weight_decay: NonNegativeFloat = 0.0
    momentum: ProperShare = 0.0
    optimizer_state: Literal["reset", "keep"] = "reset"
    channels_last: bool = True

    def __post_init__(self) -> None:
        check_ranges(Training, vars(self), "training")

    def build_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser over these parameters, in PyTorch's fused form."""
        chosen = list(parameters)
        if self.optimizer == "sgd":
            return torch.optim.SGD(chosen, self.lr, momentum=self.momentum, weight_decay=self.weight_decay, fused=True)
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return kind(chosen, self.lr, weight_decay=self.weight_decay, fused=True)


@dataclass(frozen=True)
class Recipe:
    """A training step for one data set.

    Attributes:
        training: the knobs.
        activation: sigmoid per region, or softmax over background and regions.
        normalize: (B, C, H, W) images in [0, 1] -> network input; a module without state.
        loss: (logits, (B, R, H, W) masks, the same of what is known, or None) -> scalar.
        private: how local steps hide every patient; None where they need not.
    """

    training: Training
    activation: Literal["sigmoid", "softmax"]
    normalize: nn.Module
    loss: Loss
    private: PrivateStep | None = None

    @classmethod
    def build(
        cls,
        training: Training,
        activation: Literal["sigmoid", "softmax"],
        in_channels: int,
        private: PrivateStep | None = None,
    ) -> Recipe:
        """Make the recipe that the knobs describe.

        Raises:
            ValueError: the loss does not exist or does not fit the activation.
        """
        name = training.loss
        if name == "auto":
            name = "dice_bce" if activation == "sigmoid" else "dice_ce"
        normalize = build_normalizer(training.normalize, in_channels)
        return cls(training, activation, normalize, build_loss(name, activation), private)
