"""Local training: the lower bound of every comparison."""

from fedseg.algorithms.base import Algorithm
from fedseg.models.select import everything


class Local(Algorithm):
    """Local-only training (baseline): every site trains its own model from the common start; nothing travels."""

    personal = staticmethod(everything)
    views = ("personal",)
    splits_itself = True
