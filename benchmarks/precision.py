"""What bfloat16 saves on this processor: `OMP_NUM_THREADS=1 python -m benchmarks.precision`.

CPU seconds of a training step of an Unet/resnet18 at 128 px, batch 4, in 32 bits and with autocast to bfloat16
(`trainer.precision=bf16-mixed`), in plain PyTorch: medians of steps that take turns, the first ones left out. Whether
scores stay the same is another question, which takes runs with several seeds.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

SIZE, BATCH, STEPS, WARM = 128, 4, 12, 2


class Trained:
    """A network and its optimiser.

    Args:
        reduced: whether it computes in bfloat16 where PyTorch thinks that safe.
    """

    def __init__(self, reduced: bool) -> None:
        torch.manual_seed(0)
        self.network: nn.Module = smp.Unet("resnet18", encoder_weights=None, classes=2)
        self.network.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(self.network.parameters(), fused=True)
        self.reduced = reduced

    def step(self, images: Tensor, masks: Tensor) -> float:
        """CPU seconds of a step."""
        start = time.process_time()
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.reduced):
            logits = self.network(images)
        loss: Any = binary_cross_entropy_with_logits(logits.float(), masks)
        loss.backward()
        self.optimizer.step()
        return time.process_time() - start


def main() -> None:
    """Print both medians and their ratio."""
    torch.set_num_threads(1)
    images = torch.randn(BATCH, 3, SIZE, SIZE).to(memory_format=torch.channels_last)
    masks = (torch.rand(BATCH, 2, SIZE, SIZE) > 0.5).float()
    both = Trained(reduced=False), Trained(reduced=True)
    taken = [[one.step(images, masks) for one in both] for _ in range(STEPS)][WARM:]
    full, reduced = (median(column) for column in zip(*taken, strict=True))
    print(f"a step in 32 bits {full:.3f} CPU s, in bfloat16 {reduced:.3f}: {reduced / full:.2f} of it")


if __name__ == "__main__":
    main()
