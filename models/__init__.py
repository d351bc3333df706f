"""Networks, their heads and losses, and which of their tensors are meant."""

from models.factory import create_model
from models.heads import Activation, decide, probabilities
from models.losses import Loss, LossName, build_loss
from models.norm import Norm, convert_norm
from models.normalize import Normalization, build_normalizer
from models.select import (
    Selector,
    complement,
    everything,
    named,
    normalisation,
    nothing,
    part,
    statistics,
    union,
)

__all__ = [
    "Activation",
    "Loss",
    "LossName",
    "Norm",
    "Normalization",
    "Selector",
    "build_loss",
    "build_normalizer",
    "complement",
    "convert_norm",
    "create_model",
    "decide",
    "everything",
    "named",
    "normalisation",
    "nothing",
    "part",
    "probabilities",
    "statistics",
    "union",
]
