"""Segmentation by neural cellular automata: cells of an image that learn one common rule, with about 10^4 weights.

After Med-NCA (Kalkhof, González, Mukhopadhyay, IPMI 2023) and M3D-NCA (Kalkhof, Mukhopadhyay, MICCAI 2023): every pixel
holds a state; in a step all cells see their neighbours and change by the same small network; coarse cells of a smaller
image come first, so that what is far apart meets in few steps, and hand their states to finer ones.

Otherwise than there: pixels learn on the whole image, not on patches of it; a cell's filters lead right to the hidden
layer of its rule; and outside of training, where a part of the cells rests by chance there, all change by their mean,
so that there is one answer.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from fedseg.models.budget import keep_within
from fedseg.models.volumes import PartedNetwork

CONVOLUTIONS: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}


class Automaton(nn.Module):
    """Cells of one size and their rule.

    Args:
        dimensions: of the images, 2 or 3.
        seen: channels of an image, which a cell sees and does not change.
        own: numbers that it changes.
        hidden: width of the rule's network.
        steps: how often all cells change.
        fire_rate: share of the cells that change in a step of training.
    """

    def __init__(self, dimensions: int, seen: int, own: int, hidden: int, steps: int, fire_rate: float) -> None:
        super().__init__()
        convolution = CONVOLUTIONS[dimensions]
        self.look = convolution(seen + own, hidden, 3, padding=1)
        self.change = convolution(hidden, own, 1, bias=False)
        nn.init.zeros_(self.change.weight)  # at first nothing happens
        self.steps, self.fire_rate = steps, fire_rate

    def forward(self, images: Tensor, state: Tensor) -> Tensor:
        """Images (B, seen, ...) and states (B, own, ...) of one size, to states."""
        for _ in range(self.steps):
            change = self.change(self.look(torch.cat([images, state], dim=1)).relu())
            if self.training:
                fires: Tensor | float = (torch.rand_like(change[:, :1]) < self.fire_rate).to(change)
            else:
                fires = self.fire_rate
            state = state + change * fires
        return state


class CoarseCells(nn.Module):
    """All automata but the last, from the coarsest; the encoder.

    Args:
        automata: from coarse to fine.
        scale: sides of a coarser cell in finer ones.
        channels: of images and of states.
    """

    def __init__(self, automata: Sequence[Automaton], scale: int, channels: tuple[int, int]) -> None:
        super().__init__()
        self.automata = nn.ModuleList(automata)
        self.scale, self.out_channels = scale, channels

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, C, ...) to these and the states of the finest of the coarse cells."""
        pool = functional.avg_pool2d if images.ndim == 4 else functional.avg_pool3d
        smaller = [images]
        for _ in self.automata:
            smaller.append(pool(smaller[-1], self.scale))
        cells = torch.zeros_like(smaller[-1][:, :1])
        state = cells.expand(-1, self.out_channels[-1], *[-1] * (images.ndim - 2))
        for level, automaton in enumerate(self.automata):
            if level:
                state = functional.interpolate(state, scale_factor=self.scale, mode="nearest")
            state = automaton(smaller[-1 - level], state)
        return [images, state]


class FineCells(nn.Module):
    """The last automaton, of the image's own pixels; the decoder.

    Args:
        automaton: theirs.
        scale: sides of a coarser cell in pixels.
    """

    def __init__(self, automaton: Automaton, scale: int) -> None:
        super().__init__()
        self.automaton, self.scale = automaton, scale

    def forward(self, features: list[Tensor]) -> Tensor:
        """Images and coarser states, to states of the images' size."""
        images, state = features
        found: Tensor = self.automaton(images, functional.interpolate(state, scale_factor=self.scale, mode="nearest"))
        return found


def create_nca_model(
    in_channels: int,
    classes: int,
    dimensions: int = 2,
    *,
    channels: PositiveInt = 16,
    hidden: PositiveInt = 32,
    levels: Annotated[int, Field(ge=2)] = 2,
    scale: Annotated[int, Field(ge=2)] = 4,
    coarse_steps: PositiveInt = 32,
    fine_steps: PositiveInt = 8,
    fire_rate: Annotated[float, Field(gt=0, le=1)] = 0.5,
    max_parameters: PositiveInt | None = None,
) -> nn.Module:
    """Build a neural cellular automaton with the parts `encoder`, `decoder` and `segmentation_head`.

    It has no normalisation. Random weights come from torch's global generator, as do the cells that rest in training.

    Args:
        in_channels: channels of an image.
        classes: outputs per pixel (logits).
        dimensions: 2 for images, 3 for volumes.
        channels: numbers of a cell, those of the image included.
        hidden: width of the network that is a cell's rule.
        levels: sizes of cells, each with a rule of its own; the finest are pixels.
        scale: how often a cell's side goes into that of the next coarser one; sides of images are multiples of
            scale to the power of levels - 1.
        coarse_steps: how often cells change that are no pixels; what they see moves by one cell in a step.
        fine_steps: how often pixels change; memory and time of training are mostly theirs.
        fire_rate: share of the cells that change in a step of training; outside of it all change by that much.
        max_parameters: the network is refused if it has more; null for no limit.

    Returns:
        Normalised images (B, in_channels, ...) to logits (B, classes, ...) of the same size.

    Raises:
        ValueError: no number of a cell is its own, or more parameters than allowed.
    """
    own = channels - in_channels
    if own < 1:
        raise ValueError(
            f"model.channels={channels}: a cell sees the image's {in_channels} channels and needs numbers of its own; "
            f"take model.channels={in_channels + 12} or so"
        )

    def automaton(steps: int) -> Automaton:
        return Automaton(dimensions, in_channels, own, hidden, steps, fire_rate)

    encoder = CoarseCells([automaton(coarse_steps) for _ in range(levels - 1)], scale, (in_channels, own))
    decoder = FineCells(automaton(fine_steps), scale)
    head = CONVOLUTIONS[dimensions](own, classes, 1)
    model = PartedNetwork(encoder, decoder, head, [scale ** (levels - 1)] * dimensions)
    keep_within(model, max_parameters)
    return model
