"""HarmoFL."""

from __future__ import annotations

from typing import Any, Literal

from fedseg.algorithms.fedsam import FedSAM
from fedseg.algorithms.functional.styles import Amplitude
from fedseg.algorithms.harmonised import Harmonised
from fedseg.federation.ranges import Fixed, HalfShare, Share


class HarmoFL(Harmonised, FedSAM):
    """HarmoFL (Jiang, Wang, Dou, AAAI 2022): images of one amplitude at all sites, and local steps to flat minima.

    Every image takes the federation's amplitude of spatial frequencies and keeps its phase; the weight perturbation is
    FedSAM's. The authors' program does less than the paper says: its window has width 0, so that only the mean grey is
    replaced, and its momentum is cut to the integer 0, so that a site tells the amplitude of its first batch. There a
    site harmonises to its own amplitude in the first round, and the mean is taken after it; here before it, so that
    sites which join later, and models of round 1, know it. The program averages uniformly: algorithm.weighting=uniform.

    Args:
        amplitude: official is the program's: the mean grey of images, from the first batch; window replaces low
            frequencies; full replaces all.
        window: L of amplitude=window: frequencies up to floor(L * min(height, width)).
        momentum: of the running amplitude of a site's batches, for window and full.
    """

    styles_images = True
    slices_only = "its amplitude spectra are of slices"

    def __init__(
        self,
        *args: Any,
        amplitude: Literal["official", "window", "full"] = "window",
        window: HalfShare = 0.1,
        momentum: Fixed[Share] = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if amplitude == "official" and self.recipe.training.normalize == "zscore":
            raise ValueError(
                "algorithm.amplitude=official sets the mean grey of images, which training.normalize=zscore takes away "
                "again; take training.normalize=imagenet, or algorithm.amplitude=window"
            )
        fractions = {"official": 0.0, "window": window, "full": None}
        self._style = Amplitude(fractions[amplitude], 0.0 if amplitude == "official" else momentum)

    @property
    def style(self) -> Amplitude:
        """Amplitudes."""
        return self._style
