"""Networks that tell what enters their head."""

from __future__ import annotations

from torch import Tensor, nn


class Embedding(nn.Module):
    """A network that also tells what enters its segmentation head.

    Args:
        network: any with a ``segmentation_head``; used as it is, not copied.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) normalised images -> logits, and the decoder's output (B, D, h, w)."""
        entered: list[Tensor] = []
        head = self.network.get_submodule("segmentation_head")
        handle = head.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
        try:
            logits = self.network(images)
        finally:
            handle.remove()
        return logits, entered[0]
