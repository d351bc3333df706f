"""A generator of images like those of one site, trained against a critic.

WGAN-GP (Gulrajani et al., NeurIPS 2017): the critic estimates how far made images are from real ones by a function
whose gradient has norm 1, and the generator makes that distance small.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedseg.models.generative.networks import Critic, Generator


@dataclass(frozen=True)
class Adversarial:
    """How a generator is trained.

    Attributes:
        steps: of the generator.
        critic_steps: of the critic, before each of them.
        batch: images of a step.
        width: of both networks.
        latent: numbers of which an image is made.
        penalty: weight of the critic's gradients; 10 in the paper.
        lr: of Adam with betas of 0 and 0.9.
        memory: of the moving average of the generator's weights, which is what makes the images.
    """

    steps: int = 500
    critic_steps: int = 3
    batch: int = 16
    width: int = 16
    latent: int = 64
    penalty: float = 10.0
    lr: float = 5e-4
    memory: float = 0.98


def critic_loss(critic: nn.Module, real: Tensor, made: Tensor, between: Tensor, penalty: float) -> Tensor:
    """E D(made) - E D(real) + penalty E (||grad D(x)|| - 1)^2, with x between a made and a real image.

    Args:
        critic: (B, C, H, W) -> (B,).
        real: (B, C, H, W).
        made: of the same shape.
        between: (B,) in [0, 1], where x lies.
        penalty: the weight.
    """
    share = between[:, None, None, None]
    mixed = (share * real + (1 - share) * made).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
    far = (gradient.flatten(1).norm(dim=1) - 1) ** 2
    loss: Tensor = critic(made).mean() - critic(real).mean() + penalty * far.mean()
    return loss


def train_generator(images: Tensor, how: Adversarial, seed: int) -> Generator:
    """A generator of images like these; a pure function of its arguments.

    Args:
        images: (N, C, S, S) in [0, 1].
        how: it is trained.
        seed: of weights and noise.

    Returns:
        Ready to make images.
    """
    channels, side = images.shape[1:3]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator, critic = Generator(channels, side, how.width, how.latent), Critic(channels, side, how.width)
        average = deepcopy(generator).requires_grad_(False)
        moves = torch.optim.Adam(generator.parameters(), how.lr, betas=(0.0, 0.9), fused=True)
        judged = torch.optim.Adam(critic.parameters(), how.lr, betas=(0.0, 0.9), fused=True)
        for _ in range(how.steps):
            for _ in range(how.critic_steps):
                real = images[torch.randint(len(images), (how.batch,))]
                with torch.no_grad():
                    made = generator(torch.randn(how.batch, how.latent))
                judged.zero_grad()
                torch.autograd.backward(critic_loss(critic, real, made, torch.rand(how.batch), how.penalty))
                judged.step()
            moves.zero_grad()
            torch.autograd.backward(-critic(generator(torch.randn(how.batch, how.latent))).mean())
            moves.step()
            _follow(average, generator, how.memory)
    return average.eval()


@torch.no_grad()
def made_by(generator: Generator, count: int, seed: int) -> Tensor:
    """(count, C, S, S) images that a generator makes."""
    noise = torch.randn(count, generator.latent, generator=torch.Generator().manual_seed(seed))
    return torch.cat([generator(part) for part in torch.split(noise, 64)])


@torch.no_grad()
def _follow(average: nn.Module, network: nn.Module, memory: float) -> None:
    state = network.state_dict()
    for name, kept in average.state_dict().items():
        if kept.is_floating_point():
            kept.lerp_(state[name], 1 - memory)
        else:
            kept.copy_(state[name])
