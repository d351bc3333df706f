"""SCAFFOLD."""

from __future__ import annotations

from typing import Any

from torch import nn

from fedseg.algorithms.sums import SumsOverRounds
from fedseg.federation.contract import Cohort, Site, Task
from fedseg.federation.state import State, Tensors


class Scaffold(SumsOverRounds):
    """SCAFFOLD (Karimireddy et al., ICML 2020): control variates take the drift out of local steps.

    A site keeps c_i, what its mean gradient was when it last trained; the server c, the mean of all. Local steps are
    y <- y - lr (g + c - c_i); afterwards c_i <- c_i - c + (x - y) / (T lr), option II of the paper, with the site's own
    number of steps T. The difference of c_i travels beside the model's, so that a round costs twice FedAvg's traffic.
    Both are averaged with the same weights: other ones would draw the model to another optimum than theirs. After a
    round with few sites c moves by their part of the weight of all (of the paper, where all sites weigh the same).

    c_i is a mean of gradients only where steps are plain SGD, so others are refused. `trainer.gradient_clip` clips g,
    before the correction; weight decay is part of g. `federation.server_lr` is the paper's global step size.
    """

    exact_groups = frozenset({"control"})
    summed = own_sum = "control"
    control: nn.Module

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recipe.training.require_sgd("scaffold", "a site's gradient is read off the way its steps went")
        self._steps = 0
        self._correction: Tensors | None = None  # c - c_i, made at the first step

    def receive(self, message: State, kept: State, site: Site) -> None:
        """Nothing has been learnt of this site's gradient yet in this turn."""
        super().receive(message, kept, site)
        self._steps, self._correction = 0, None

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """Clip the gradient if so told, then correct it."""
        super().configure_gradient_clipping(*args, **kwargs)
        self._steps += 1
        if self._correction is None:
            c, own = self.received.get("control"), dict(self.control.named_parameters())
            self._correction = {name: c[name].to(self.device) - own[name] for name in c}
        parameters = dict(self.model.named_parameters())
        for name, correction in self._correction.items():
            gradient = parameters[name].grad
            if gradient is not None:
                gradient.add_(correction)

    def send(self, site: Site) -> State:
        """The differences of the model and of the site's control variate."""
        answer = super().send(site)
        c, own = self.received["control"], self.control.state_dict()
        moved = {name: tensor.new_zeros(tensor.shape) for name, tensor in c.items()}
        if self._steps:
            travelled = self._steps * self.recipe.training.lr_in(self.round, self.recipe.rounds)
            moved = {name: -c[name] - answer["model"][name] / travelled for name in c}
        self._load(self.control, {name: own[name].cpu() + moved[name] for name in c})
        answer.tensors["control"] = moved
        return answer

    def broadcast(self, server: State, site: str, task: Task) -> State:
        """The model, and for training the control variate."""
        message = super().broadcast(server, site, task)
        along = {"control": server["control"]} if task.kind == "train" else {}
        return State({**message.tensors, **along}, message.scalars)

    def advance(self, server: State, mean: State, cohort: Cohort) -> State:
        """Move the model by the mean difference, and the control variate by the sites' part of it."""
        after = self.added_up(server, mean, "control", cohort)
        return super().advance(after, State({**mean.tensors, "control": after["control"]}, mean.scalars), cohort)
