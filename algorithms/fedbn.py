"""FedBN and SiloBN: personal normalisation."""

from fedseg.algorithms.fedavg import FedAvg
from fedseg.models.select import normalisation, statistics


class FedBN(FedAvg):
    """FedBN (Li et al., ICLR 2021): normalisation layers stay at the site, affine parameters and statistics alike.

    Layers are found by type, in encoder and decoder. A name rule such as ``"bn" in name`` misses 43 % of the
    normalisation tensors of an smp Unet with a ResNet-18 encoder. There is no global model.
    """

    personal = staticmethod(normalisation)


class SiloBN(FedAvg):
    """SiloBN (Andreux et al., DART 2020): running statistics stay at the site, affine parameters are averaged.

    There is no global model: a site that took no part estimates its own statistics first (the view own-statistics).
    """

    personal = staticmethod(statistics)
