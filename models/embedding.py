"""Networks that tell what enters their head."""

from __future__ import annotations

from collections.abc import Sequence

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
        """(B, C, H, W) normalised images -> logits, and the decoder's output (B, D, h, w), of several maps the finest.

        Raises:
            ValueError: the network answers without its head.
        """
        entered: list[Tensor | Sequence[Tensor]] = []
        head = self.network.get_submodule("segmentation_head")
        handle = head.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
        try:
            logits = self.network(images)
        finally:
            handle.remove()
        if not entered:
            raise ValueError(
                f"{type(self.network).__name__} answers without its segmentation_head, so that nothing is known of "
                "what enters it; call that module in the network's forward"
            )
        return logits, entered[0] if isinstance(entered[0], Tensor) else entered[0][0]
