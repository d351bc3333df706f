"""What IOP-FL's adaptation at an unseen site costs: tensors, bytes, seconds and memory.

    python -m benchmarks.iopfl_outside                       K = 5 sites, Unet with a ResNet-34, 4 images of 3x128x128
    python -m benchmarks.iopfl_outside --expansion 0.25      narrower routers

One thread on a CPU, or a GPU with --device cuda. The weights are random: costs do not depend on them.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from fedseg.algorithms.functional.routing import adaptable, routing_size
from fedseg.algorithms.iopfl import IOPFL
from fedseg.algorithms.recipe import Recipe, Training
from fedseg.models import create_model
from fedseg.models.select import normalisation


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=5)
    parser.add_argument("--encoder", default="resnet34")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3, help="timed steps after one to warm up")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--expansion", type=float, default=2.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    recipe = Recipe.build(Training(channels_last=False), "sigmoid", 3)
    worker = IOPFL(create_model(3, 1, encoder=options.encoder), recipe, expansion=options.expansion)
    worker.to(options.device)
    images = torch.rand(options.batch, 3, options.size, options.size, device=options.device)
    masks = (torch.rand(options.batch, 1, options.size, options.size, device=options.device) > 0.5).float()

    optimizer = torch.optim.Adam(worker.model.parameters(), lr=1e-3)

    def train() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(worker.loss({"image": images, "mask": masks}))
        optimizer.step()

    plain = seconds(train, options.steps)
    state = {name: tensor.cpu() for name, tensor in worker.model.state_dict().items()}
    routed = worker.mixing.build(worker.model, [state] * options.sites)
    size = routing_size(routed)
    learning = sum(p.numel() for p in adaptable(routed, normalisation(routed)))
    once = replace(worker.adaptation, passes=1)
    adapting = seconds(lambda: once.run(routed, [images], worker.normalize), options.steps)
    model = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    rows = {
        "routed convolutions": f"{size.layers}, {size.experts} experts each",
        "frozen expert values": f"{size.expert_values / 1e6:.1f} M, {4 * size.expert_values / 1e6:.0f} MB",
        "learning parameters": f"{learning / 1e6:.2f} M",
        "published by a site, once": f"{model / 1e6:.1f} MB",
        "sent to an unseen site": f"{(options.sites + 1) * model / 1e6:.0f} MB",
        "a plain training step": f"{plain:.2f} s",
        "an adaptation step": f"{adapting:.2f} s, {adapting / plain:.1f} times as long",
        "peak memory of this process": f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB",
    }
    print(f"K = {options.sites}, Unet/{options.encoder}, {options.batch} images of 3x{options.size}x{options.size}")
    for name, value in rows.items():
        print(f"  {name:30}{value}")


def seconds(work: Callable[[], object], steps: int) -> float:
    """Median CPU (on a GPU: wall-clock) seconds of some runs after one to warm up."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    work()
    taken = []
    for _ in range(steps):
        start = clock()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(clock() - start)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
