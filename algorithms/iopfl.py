"""IOP-FL."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from fedseg.algorithms.fedavg import FedAvg
from fedseg.algorithms.functional.adaptation import Objective
from fedseg.algorithms.functional.outside import Adaptation, Dropping, Mixing
from fedseg.algorithms.functional.routing import Squash
from fedseg.algorithms.functional.trajectory import average_states
from fedseg.federation.contract import Site
from fedseg.federation.ranges import Fixed, ProperShare, Share
from fedseg.federation.state import State
from fedseg.models.select import normalisation

PERSONAL = "personal"
"""The group that holds a published personal model."""


class IOPFL(FedAvg):
    """IOP-FL (Jiang et al., IEEE TMI 2023): a trajectory for each site inside, a mixture of them for sites outside.

    Inside: the personal model T is a moving average of the site's locally trained models, T <- alpha T + (1 - alpha) w,
    running statistics included. It is never trained, averaged or uploaded while training; the global model is FedAvg's.
    Outside: after training the sites publish T once. At a site that never took part, the K personal models and the
    global one become experts of every convolution; a small router per layer mixes their kernels anew for each image.
    Routers and normalisation (scale and shift) learn on the site's images without labels; everything else is frozen.

    The defaults correct the authors' release: entropy per pixel, a convex mixture, batch normalisation with statistics
    fitted once to the site's images (so that no mask depends on the other images of a batch), no dropout in the result,
    and weights that were chosen on seen sites held out in turn (benchmarks/iopfl_balance.py).
    ``algorithm=iopfl_released`` has the released choices. Its slips (the fifth site left out of most layers, two layers
    never trained, a trajectory that aliased the live model) are repeated in neither. A local step costs as much as
    FedAvg's.

    Args:
        alpha: weight of the old value in the trajectory; 0 keeps the latest local model.
        adapt_passes: passes over an unseen site's images; 0 leaves the routers as they are initialised.
        adapt_steps: at most so many steps, whatever the passes; null for all of them. The terms alone prefer an empty
            mask: with many images, and so many steps, masks vanish (docs/methods/iopfl.md).
        adapt_lr: learning rate (Adam) of the adaptation.
        entropy_weight: of the entropy of the predictions.
        consistency_weight: of the squared difference between the predictions for an image and for a noisy, turned view.
        smoothness_weight: of the local range of the predicted masks.
        entropy: per_pixel is the mean, in [0, 1]; released is that times batch size over classes.
        smoothness: mean of the local range, in [0, 1], or its norm over the batch, as released.
        radius: of the window of the local range, in pixels.
        noise: deviation of the view's noise, on the scale of the normalised image.
        squash: softmax mixes convexly; logistic, as released, changes the scale of kernels with the mixture.
        statistics: of batch normalisation: site fits them once to the site's images; running are the global model's;
            batch are those of the batch, as released.
        expansion: width of a router's hidden layer over the channels of its layer.
        dropout: on a router's hidden layer while adapting.
        keep_dropout: predict with that dropout too, as released (the same draw for every batch).
        fresh_pass: compare the view with another pass on the image instead of the first, as released; costs half more.
        same_draws: draw the same noise, views and dropout in every step, as released.
        linear: route linear layers too (transformer encoders).
    """

    views = ("global", "personal")
    unseen_views = ("global", "adapted")
    trained: Tensor

    def __init__(
        self,
        *args: Any,
        alpha: Share = 0.1,
        adapt_passes: Fixed[NonNegativeInt] = 5,
        adapt_steps: Fixed[PositiveInt | None] = 10,
        adapt_lr: Fixed[PositiveFloat] = 1e-4,
        entropy_weight: Fixed[NonNegativeFloat] = 0.07,
        consistency_weight: Fixed[NonNegativeFloat] = 1.0,
        smoothness_weight: Fixed[NonNegativeFloat] = 0.03,
        entropy: Literal["per_pixel", "released"] = "per_pixel",
        smoothness: Literal["norm", "mean"] = "mean",
        radius: Fixed[PositiveInt] = 10,
        noise: Fixed[NonNegativeFloat] = 0.5,
        squash: Squash = "softmax",
        statistics: Literal["site", "running", "batch"] = "site",
        expansion: Fixed[PositiveFloat] = 2.0,
        dropout: Fixed[ProperShare] = 0.2,
        keep_dropout: bool = False,
        fresh_pass: bool = False,
        same_draws: bool = False,
        linear: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        normalisation(self.model)  # which learns at sites outside: a network without any is refused here
        self.alpha = alpha
        self.keep_dropout = keep_dropout
        self.mixing = Mixing(expansion, dropout, squash, statistics, linear)
        weights = (entropy_weight, consistency_weight, smoothness_weight)
        objective = Objective(self.recipe.activation, *weights, entropy=entropy, smoothness=smoothness, radius=radius)
        self.adaptation = Adaptation(objective, adapt_passes, adapt_lr, noise, fresh_pass, same_draws, adapt_steps)
        self.trajectory = deepcopy(self.model).requires_grad_(False)
        self.register_buffer("trained", torch.tensor(False))
        self._adapted: tuple[nn.Module, ...] = ()  # in a tuple: no sub-module, so it is neither kept nor published

    def receive(self, message: State, kept: State, site: Site) -> None:
        """Load the trajectory with the rest; what an earlier site adapted is gone."""
        super().receive(message, kept, site)
        self._adapted = ()

    def on_train_end(self) -> None:
        """Let the trajectory follow the locally trained model; after the first local fit it is a copy of it."""
        super().on_train_end()
        local = self.model.state_dict()
        old = self.trajectory.state_dict() if self.trained else local
        self.trajectory.load_state_dict({**average_states(old, local, self.alpha), **self.frozen})
        self.trained.fill_(True)

    def network(self, view: str) -> nn.Module:
        """The received model; the trajectory, or before its first fit the received model; or the adapted mixture."""
        if view == "adapted":
            if not self._adapted:
                raise RuntimeError("the view 'adapted' exists after `adapt`, at a site that never took part")
            return self._adapted[0]
        return self.trajectory if view == "personal" and self.trained else self.model

    def publish(self, site: Site) -> State:
        """The whole trajectory, running statistics and counters included; nothing if the site never trained."""
        if not self.trained:
            return State()
        moves = {name: t for name, t in self.trajectory.state_dict().items() if name not in self.parts.frozen}
        return State({PERSONAL: {name: t.detach().cpu().clone() for name, t in moves.items()}})

    def adapt(self, images: Iterable[Tensor]) -> None:
        """Mix the published models for these images; reads the images only and changes none of the models."""
        published = [tensors for group, tensors in self.received.tensors.items() if group.startswith(f"{PERSONAL}/")]
        personal = [{**self.frozen, **tensors} for tensors in published]
        seed = torch.initial_seed()

        def ready(batch: Tensor) -> Tensor:
            return self.normalize(batch.to(self.device))

        routed = self.mixing.build(self.model, personal, map(ready, images))
        self.adaptation.run(routed, images, ready)
        self._adapted = (Dropping(routed, seed) if self.keep_dropout else routed,)
