"""The network that LC-Fed builds for one site: channel selection inside, head calibration behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch
from segmentation_models_pytorch.base import SegmentationModel
from torch import Tensor, nn

from fedseg.algorithms.functional.calibration import (
    ChannelSelection,
    HeadCalibration,
    attention_scale,
    disagreement,
    peaks,
    peer_probabilities,
    standard_deviation,
)
from fedseg.models.heads import Activation, probabilities
from fedseg.models.select import require_parts

Maps = Literal["peaks", "distance", "deviation"]


@dataclass(frozen=True)
class Disagreement:
    """How the answers of several heads to the same features become a map.

    Attributes:
        maps: distance is the root mean squared distance to the own head, divided by its maximum over each image and
            region; peaks is 1 at the local maxima of that, else 0; deviation is the standard deviation over heads.
        threshold: of a peak, exclusive.
    """

    maps: Maps
    threshold: float

    def __call__(self, answers: Tensor, own: int) -> Tensor:
        """Probabilities of K heads, (K, B, R, H, W), the own one at place ``own``, to maps (B, R, H, W) in [0, 1]."""
        if self.maps == "deviation":
            return standard_deviation(answers, normalization="none")
        distance = disagreement(answers, own, normalization="map")
        if self.maps == "distance":
            return distance
        window, _ = attention_scale(*distance.shape[-2:])
        return peaks(distance, window, self.threshold)


class SiteNetwork(nn.Module):
    """Encoder, channel selection, decoder, head, head calibration: normalised images to logits.

    Args:
        model: network with encoder, decoder and segmentation_head, which are called one after the other.
        site: place of the site among the sites' codes.
        selection: gate of the encoder's deepest features, or None.
        calibration: second head, or None.
        heads: what the sites' heads were when the round began, by the head's own names.
        own: place of the site's own head among them; None where it is missing, and nobody is known to disagree.
        maps: how heads disagree.
        activation: of the logits.
    """

    def __init__(
        self,
        model: nn.Module,
        site: int,
        selection: ChannelSelection | None,
        calibration: HeadCalibration | None,
        heads: Sequence[Mapping[str, Tensor]],
        own: int | None,
        maps: Disagreement,
        activation: Activation,
    ) -> None:
        super().__init__()
        self.model = model
        self.site = site
        self.selection = selection
        self.calibration = calibration
        self.heads = heads
        self.own = own
        self.maps = maps
        self.activation = activation
        self.head = model.get_submodule("segmentation_head")

    def body(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images to the deepest features, not gated, and the decoder's output for the gated ones."""
        if isinstance(self.model, SegmentationModel):
            self.model.check_input_shape(images)
        *shallow, deepest = self.model.get_submodule("encoder")(images)
        gated = deepest if self.selection is None else self.selection(deepest, self.site)
        return deepest, self.model.get_submodule("decoder")([*shallow, gated])

    def disagreement(self, features: Tensor, logits: Tensor) -> Tensor:
        """Where the sites' heads disagree about the decoder's output; (B, R, H, W) of the logits' size, no gradient."""
        if self.own is None:
            return torch.zeros_like(probabilities(logits.detach(), self.activation))
        return self.maps(self.answers(features), self.own)

    def answers(self, features: Tensor) -> Tensor:
        """What the heads of all sites say about the same features, (K, B, R, H, W); no gradient."""
        return peer_probabilities(self.head, self.heads, features, lambda x: probabilities(x, self.activation))

    def calibrate(self, features: Tensor, logits: Tensor) -> Tensor:
        """Calibrated logits; a loss on them reaches the calibration alone."""
        if self.calibration is None:
            return logits
        steered: Tensor = self.calibration(
            features, probabilities(logits.detach(), self.activation), self.disagreement(features, logits)
        )
        return steered

    def forward(self, images: Tensor) -> Tensor:
        """Final logits."""
        _, features = self.body(images)
        return self.calibrate(features, self.head(features))


class StandaloneNetwork(SiteNetwork):
    """The same chain with the heads of all sites as modules of its own, so that it can be saved and traced as a whole.

    Args:
        site: the chain of a site; its weights are shared with this one.
    """

    def __init__(self, site: SiteNetwork) -> None:
        super().__init__(
            site.model, site.site, site.selection, site.calibration, site.heads, site.own, site.maps, site.activation
        )
        self.peers = nn.ModuleList(deepcopy(self.head) for _ in site.heads)
        for peer, state in zip(self.peers, site.heads, strict=True):
            peer.load_state_dict(dict(state))

    def answers(self, features: Tensor) -> Tensor:
        """As above."""
        return torch.stack([probabilities(peer(features), self.activation) for peer in self.peers])


def check_chain(model: nn.Module) -> None:
    """Refuse a network that is more than encoder, decoder and head, one after the other.

    Raises:
        ValueError: for such an architecture.
    """
    require_parts(model, "LC-Fed", "encoder", "decoder", "segmentation_head")
    if isinstance(model, SegmentationModel) and type(model).forward is not SegmentationModel.forward:
        raise ValueError(
            f"LC-Fed works between encoder, decoder and head, which {type(model).__name__} does not run one after the "
            "other; take another model.architecture, such as unet, unetplusplus, fpn or deeplabv3plus"
        )


def set_sites(selection: ChannelSelection, sites: int) -> None:
    """Make room for the codes of so many sites, whose values are to be loaded; nothing random is drawn."""
    if selection.sites != sites:
        old = selection.code.weight
        selection.code.weight = nn.Parameter(old.new_zeros(len(old), sites))
        selection.code.in_features = selection.sites = sites


def draw_codes(channels: int, sites: int, seed: int) -> Tensor:
    """Initial codes of the sites, (channels, sites), as of a linear layer; a pure function of the arguments."""
    codes = torch.empty(channels, sites)
    bound = max(sites, 1) ** -0.5
    return codes.uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
