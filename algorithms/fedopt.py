"""FedAvgM, FedAdagrad, FedAdam and FedYogi: optimisers at the server."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fedseg.algorithms.fedavg import FedAvg
from fedseg.algorithms.parts import with_zeros
from fedseg.federation.contract import Cohort
from fedseg.federation.ranges import FinitePositive, Fixed, ProperShare
from fedseg.federation.state import State, Tensors, add

FIRST, SECOND = "moment/first", "moment/second"  # groups that stay at the server


class FedAvgM(FedAvg):
    """FedAvgM (Hsu, Qi, Brown, 2019): the server moves with momentum, m <- momentum m + mean, w <- w + m.

    `federation.server_lr` is the server's step size. Running statistics take the plain mean.

    Args:
        momentum: of the server; 0 is FedAvg.
    """

    def __init__(self, *args: Any, momentum: ProperShare = 0.9, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.momentum = momentum

    def init_server(self, introductions: Mapping[str, State]) -> State:
        """The model, at rest."""
        return with_zeros(super().init_server(introductions), FIRST)

    def advance(self, server: State, mean: State, cohort: Cohort) -> State:
        """Move on, a little turned towards the mean."""
        moved = add(mean.get("model"), server[FIRST], self.momentum)
        tensors = {**mean.tensors, "model": moved, FIRST: moved} if moved else mean.tensors
        return super().advance(server, State(tensors, mean.scalars), cohort)


class AdaptiveServer(FedAvg):
    """Adaptive server optimisers (Reddi et al., ICLR 2021): the mean update d is taken for a gradient.

    m <- beta1 m + (1 - beta1) d; v by the method's rule; w <- w + server_step m / (sqrt(v) + tau). Local steps, and
    what travels, are FedAvg's; running statistics take the plain mean. `federation.server_lr` scales d.

    The rules are the paper's, and so is that moments are not corrected for where they start. Departures are those of
    FLamby's program (Ogier du Terrail et al., NeurIPS 2022), whose arrays the rounds reproduce: v starts at 0, in the
    paper at tau^2 or more, so that first steps are longer here; beta2 is 0.999, in the paper's experiments 0.99;
    FedAdagrad has the momentum beta1, in the paper's none (beta1=0).

    Args:
        server_step: step size of the server.
        beta1: memory of the first moment.
        tau: what is added to the root of the second; the smaller, the more alike are steps of all coordinates.
    """

    def __init__(
        self,
        *args: Any,
        server_step: FinitePositive = 1e-2,
        beta1: Fixed[ProperShare] = 0.9,
        tau: FinitePositive = 1e-3,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.server_step = server_step
        self.beta1 = beta1
        self.tau = tau

    @abstractmethod
    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        """The second moment after an update whose square this is."""

    def init_server(self, introductions: Mapping[str, State]) -> State:
        """The model, and moments of 0."""
        return with_zeros(super().init_server(introductions), FIRST, SECOND)

    def advance(self, server: State, mean: State, cohort: Cohort) -> State:
        """Take the optimiser's step."""
        first: Tensors = {n: self.beta1 * server[FIRST][n] + (1 - self.beta1) * d for n, d in mean.get("model").items()}
        second = {n: self.second_moment(server[SECOND][n], d.square()) for n, d in mean.get("model").items()}
        moved = {name: self.server_step * m / (second[name].sqrt() + self.tau) for name, m in first.items()}
        tensors = {**mean.tensors, "model": moved, FIRST: first, SECOND: second} if moved else mean.tensors
        return super().advance(server, State(tensors, mean.scalars), cohort)


class FedAdagrad(AdaptiveServer):
    """FedAdagrad (Reddi et al., ICLR 2021): v <- v + d^2."""

    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        """The sum of all squares."""
        return v + square


class FedAdam(AdaptiveServer):
    """FedAdam (Reddi et al., ICLR 2021): v <- beta2 v + (1 - beta2) d^2.

    Args:
        beta2: memory of the second moment.
    """

    def __init__(self, *args: Any, beta2: Fixed[ProperShare] = 0.999, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.beta2 = beta2

    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        """A moving mean of squares."""
        return self.beta2 * v + (1 - self.beta2) * square


class FedYogi(FedAdam):
    """FedYogi (Reddi et al., ICLR 2021): v <- v - (1 - beta2) d^2 sign(v - d^2), which forgets large squares slowly."""

    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        """A step towards the square, of a size that does not grow with the distance."""
        return v - (1 - self.beta2) * square * (v - square).sign()
