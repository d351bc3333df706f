"""Building blocks of LC-Fed (Wang et al., ECCV 2022): channel selection, disagreement of sites, head calibration."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import conv2d, interpolate, max_pool2d

Attention = Literal["raw", "minmax"]
Normalization = Literal["map", "batch", "none"]


class ChannelSelection(nn.Module):
    """Channel gate conditioned on the site (PCS): x * (1 + h), h = sigmoid(g([mean x; e_s]) + g([max x; e_s])).

    e_s is the learnt code of site s; all weights are shared by the sites.

    Args:
        channels: C of the features.
        sites: K, how many sites take part; fixed for good.
        reduction: the gate's hidden layer has max(C // reduction, 1) channels.
    """

    def __init__(self, channels: int, sites: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.sites = sites
        self.code = nn.Linear(sites, channels, bias=False)  # column s: site s
        self.mix = nn.Linear(channels, channels, bias=False)
        self.squeeze = nn.Sequential(
            nn.Linear(2 * channels, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, channels, bias=False)
        )

    def codes(self) -> Tensor:
        """Codes e of all sites, (K, C)."""
        codes: Tensor = self.mix(self.code.weight.T.relu())
        return codes

    def gates(self, features: Tensor) -> Tensor:
        """Gates h of all sites for features (B, C, H, W): (K, B, C), in (0, 1)."""
        return self._gate(features, self.codes())

    def gate(self, features: Tensor, site: int) -> Tensor:
        """Gate h of one site for features (B, C, H, W): (B, C), in (0, 1)."""
        self._check(site)
        return self._gate(features, self.codes()[site : site + 1])[0]

    def forward(self, features: Tensor, site: int) -> Tensor:
        """Features (B, C, H, W) as the site sees them.

        Raises:
            ValueError: if the gate was built without this site.
        """
        return features * (1.0 + self.gate(features, site)[..., None, None])

    def _gate(self, features: Tensor, codes: Tensor) -> Tensor:
        shape = (len(codes), *features.shape[:2])
        code = codes[:, None].expand(shape)
        pooled = features.mean((-2, -1)), features.amax((-2, -1))
        return torch.stack([self.squeeze(torch.cat([p.expand(shape), code], dim=-1)) for p in pooled]).sum(0).sigmoid()

    def _check(self, site: int) -> None:
        if not 0 <= site < self.sites:
            raise ValueError(
                f"channel selection has codes for {self.sites} sites and none for site index {site}: the "
                "sites are fixed when training starts; train anew with this site, or use a method without site codes"
            )


def site_contrast(gates: Tensor, site: int) -> Tensor:
    """Contrastive site embedding: the own gate is pushed away from those of the other sites.

    Args:
        gates: h, (K, B, C) from ``ChannelSelection.gates``, on detached features.
        site: the own site's index.

    Returns:
        Scalar <= 0: minus the mean squared distance to the others, which receive no gradient; 0 for a single site.
    """
    others = torch.cat([gates[:site], gates[site + 1 :]]).detach()
    if len(others) == 0:
        return 0.0 * gates.sum()
    return -(gates[site] - others).square().mean()


@torch.no_grad()
def peer_probabilities(
    head: nn.Module,
    states: Sequence[Mapping[str, Tensor]],
    features: Tensor,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """What the heads of all sites say about the same features, (K, B, R, H, W); no gradient.

    Args:
        head: any site's head; supplies the arithmetic, keeps its weights.
        states: the head's weights at each site, by the head's own parameter names.
        features: input of the head, (B, C, h, w).
        activation: logits to probabilities (B, R, H, W).
    """
    return torch.stack([activation(functional_call(head, dict(state), (features,))) for state in states])


def disagreement(probabilities: Tensor, site: int, *, normalization: Normalization) -> Tensor:
    """How far the sites' heads are from the own one: sqrt(sum_j (p_j - p_own)^2 / (K - 1)).

    Args:
        probabilities: (K, B, R, H, W).
        site: the own site's index.
        normalization: divide by the maximum of each ``"map"`` (image and region, as released), of the whole
            ``"batch"``, or by nothing.

    Returns:
        (B, R, H, W), in [0, 1]; zero where nobody disagrees.
    """
    squares = (probabilities - probabilities[site]).square().sum(0)
    return _normalize((squares / max(len(probabilities) - 1, 1)).sqrt(), normalization)


def standard_deviation(probabilities: Tensor, *, normalization: Normalization) -> Tensor:
    """Older disagreement map: unbiased standard deviation over the sites' heads, (K, B, R, H, W) to (B, R, H, W)."""
    if len(probabilities) < 2:
        return torch.zeros_like(probabilities[0])
    return _normalize(probabilities.std(0), normalization)


def _normalize(maps: Tensor, normalization: Normalization) -> Tensor:
    if normalization == "none":
        return maps
    highest = maps.amax((-2, -1), keepdim=True) if normalization == "map" else maps.amax()
    return torch.where(highest > 0, maps / highest, 0.0)


def peaks(maps: Tensor, window: int, threshold: float) -> Tensor:
    """1 where a map equals its maximum over a window and exceeds the threshold, else 0.

    Args:
        maps: (B, R, H, W).
        window: side of the window in pixels, odd.
        threshold: exclusive.

    Raises:
        ValueError: if the window is not odd.
    """
    _check_odd(window)
    highest = max_pool2d(maps, window, stride=1, padding=window // 2)
    return ((maps == highest) & (maps > threshold)).to(maps.dtype)


def attention_scale(height: int, width: int) -> tuple[int, float]:
    """Kernel side (odd) and Gaussian sigma in pixels: 31 and 6 at 384 x 384, in proportion at other sizes."""
    share = min(int(height), int(width)) / 384  # while a module is traced, sizes are tensors
    return 2 * max(1, round(15 * share)) + 1, 6.0 * share


def gaussian(side: int, sigma: float) -> Tensor:
    """Factor g (side,) of the separable kernel g g^T = exp(-(i^2 + j^2) / (2 sigma^2)), with peak 1; float64."""
    _check_odd(side)
    offset = torch.arange(side, dtype=torch.float64) - side // 2
    return torch.exp(-offset.square() / (2 * sigma**2))


def gaussian_histogram(side: int) -> Tensor:
    """Factor g (side,) of the older separable kernel g g^T, the outer root of a normal histogram, with sum 1; float64.

    Args:
        side: bins, odd; over four standard deviations on either side, reached by the centres' outer half bins.
    """
    _check_odd(side)
    deviations = 4.0
    bin_width = (2 * deviations + 1) / side
    edges = torch.linspace(-deviations - bin_width / 2, deviations + bin_width / 2, side + 1, dtype=torch.float64)
    root: Tensor = torch.special.ndtr(edges).diff().sqrt()
    return root / root.sum()


def smooth(maps: Tensor, factor: Tensor) -> Tensor:
    """Maps (B, R, H, W) convolved with the kernel g g^T, zero outside; g (side,) is converted to their dtype."""
    factor = factor.to(maps)
    batch, regions, height, width = maps.shape
    rows = conv2d(maps.reshape(-1, 1, height, width), factor.view(1, 1, -1, 1), padding=(len(factor) // 2, 0))
    columns = conv2d(rows, factor.view(1, 1, 1, -1), padding=(0, len(factor) // 2))
    return columns.reshape(batch, regions, height, width)


def minmax(maps: Tensor) -> Tensor:
    """Maps (..., H, W) scaled to [0, 1], each by itself: (t - min) / (max - min + 1e-8)."""
    lowest, highest = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - lowest) / (highest - lowest + 1e-8)


class HeadCalibration(nn.Module):
    """Private second head (HC): features weighted by attention to disagreement and to the first head's answer.

    For each region, features * (1 + A(disagreement)) and features * (1 + A(probability)), concatenated; then a 3 x 3
    convolution. Its inputs are constants, so that a loss on its output trains this head alone. The kernel of A follows
    the size of the maps (``attention_scale``).

    Args:
        channels: channels of the features.
        regions: maps that steer it, R.
        outputs: logits it returns.
        attention: ``"raw"``: A = map * Gaussian of peak 1, not bounded (current release); ``"minmax"``:
            A = max(minmax(map * Gaussian), map), in [0, 1] (older release).
    """

    def __init__(self, channels: int, regions: int, outputs: int, attention: Attention) -> None:
        super().__init__()
        self.attention = attention
        self.head = nn.Conv2d(2 * regions * channels, outputs, kernel_size=3, padding=1)

    def attend(self, maps: Tensor) -> Tensor:
        """Attention of maps (B, R, H, W), of the same shape."""
        side, sigma = attention_scale(*maps.shape[-2:])
        if self.attention == "raw":
            return smooth(maps, gaussian(side, sigma))
        return torch.maximum(minmax(smooth(maps, gaussian_histogram(side))), maps)

    def forward(self, features: Tensor, probabilities: Tensor, disagreement: Tensor) -> Tensor:
        """Calibrated logits.

        Args:
            features: (B, C, h, w); may be coarser than the maps: the attention is then averaged down to it, and the
                logits are enlarged to the maps' size.
            probabilities: the first head's answer, (B, R, H, W).
            disagreement: (B, R, H, W), in [0, 1].

        Returns:
            (B, outputs, H, W).
        """
        features, size = features.detach(), probabilities.shape[-2:]
        maps = torch.stack([self.attend(disagreement.detach()), self.attend(probabilities.detach())], dim=2).flatten(
            1, 2
        )
        if features.shape[-2:] != size:
            maps = interpolate(maps, size=features.shape[-2:], mode="area")
        weighted = (features.unsqueeze(1) * (1.0 + maps.unsqueeze(2))).flatten(1, 2)  # region by region: f1, f2
        logits: Tensor = self.head(weighted)
        if logits.shape[-2:] != size:
            logits = interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return logits


def _check_odd(side: int) -> None:
    if side < 1 or side % 2 == 0:
        raise ValueError(f"a window of {side} pixels has no centre: its side must be odd and positive")
