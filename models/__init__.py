"""Networks, their heads and losses, and which of their tensors are meant."""

from fedseg import one_copy
from fedseg.models.factory import create_model
from fedseg.models.heads import Activation, decide, probabilities
from fedseg.models.losses import Loss, LossName, build_loss
from fedseg.models.nca import create_nca_model
from fedseg.models.norm import Norm, convert_norm
from fedseg.models.normalize import Normalization, build_normalizer
from fedseg.models.select import (
    Selector,
    complement,
    everything,
    named,
    normalisation,
    nothing,
    part,
    require_parts,
    statistics,
    union,
)
from fedseg.models.sides import check_sides
from fedseg.models.volumes import create_monai_model
from fedseg.models.window import Window

__all__ = [
    "Activation",
    "Loss",
    "LossName",
    "Norm",
    "Normalization",
    "Selector",
    "Window",
    "build_loss",
    "build_normalizer",
    "check_sides",
    "complement",
    "convert_norm",
    "create_model",
    "create_monai_model",
    "create_nca_model",
    "decide",
    "everything",
    "named",
    "normalisation",
    "nothing",
    "part",
    "probabilities",
    "require_parts",
    "statistics",
    "union",
]

one_copy(__name__)
