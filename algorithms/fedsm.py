"""FedSM."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from fedseg.algorithms.answers import REPLY, SHARED, joined
from fedseg.algorithms.functional.selected import GROUPS, Selected, SiteClassifier
from fedseg.algorithms.optimizer_state import load_optimizer, pack_optimizer
from fedseg.algorithms.softpull import SoftPull
from fedseg.federation.contract import PERSONAL_LOSS, Average, Batch, EvaluateTask, Site, Task
from fedseg.federation.ranges import Fixed, Share
from fedseg.federation.state import State, Tensors, Update, subtract

PERSONAL = "personal"
"""The group of a site's own model: its difference in an update, itself when it is published; at the server the mean of
what sites trained."""
SELECTOR, MOMENTS = "selector", "moments"
"""The groups of the selector, and of its optimiser's state."""
SITE = "site"
"""A site's label, in a message for training; ``site/NAME`` at the server, and where a model is selected."""


class FedSM(SoftPull):
    """FedSM (Xu et al., CVPR 2022): a global model, SoftPull's personal ones, and a selector of one for each new image.

    Global and personal model step on the same batches, and one optimiser over the sum of their losses makes both steps,
    as their parameters are disjoint (only with ``trainer.gradient_clip`` do they meet). The first is FedAvg's, the
    second SoftPull's, bit for bit. On each of these batches the selector, a small convolutional network, learns which
    site it is from. A site shows it but one label, its own; so selectors are averaged with the moments of their Adam,
    from which all sites go on. A local step trains three networks, the third a small one.

    At a site that never took part, an image goes to the personal model of the site that it is likeliest from if the
    selector gives that more than ``gamma``, else to the global model. For this the sites publish their personal models
    once, after training, as they trained them, and these are pulled anew among those published. A site that joins later
    has no label: its model is in the others' pull, and no image goes to it.

    After the paper and NVIDIA's program, which was read and not compared: there the selector is a VGG-11 that steps
    once a pass, along the sum of its gradients. Here it is small, normalises over parts of one image, as batches are of
    one site, and steps with the others. The default of gamma is that program's.

    Args:
        gamma: what the selector must give the likeliest site for its model to answer; 1 always takes the global model.
        selector: train it; without, sites that took no part have the global model, and nothing is published.
        selector_lr: learning rate of its Adam, whatever ``training`` says of the others.
        selector_width: channels after its first convolution, a multiple of 4.
    """

    views = ("global", "personal")
    unseen_views: tuple[str, ...] = ("global", "adapted")
    exact_groups = frozenset({SELECTOR, MOMENTS})
    models_per_step = 3
    leaves_out_unknown = True
    adds_up = True

    def __init__(
        self,
        *args: Any,
        gamma: Fixed[Share] = 0.9,
        selector: bool = True,
        selector_lr: Fixed[PositiveFloat] = 1e-3,
        selector_width: Fixed[PositiveInt] = 16,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.gamma, self.selector_lr = gamma, selector_lr
        self.adapts = self.adapts and selector
        if not self.adapts:
            self.unseen_views = tuple(view for view in self.unseen_views if view != "adapted")
            self.exact_groups, self.models_per_step = frozenset(), 2
        self.twin = deepcopy(self.model)
        # in tuples: no sub-modules, so that they are neither kept nor published
        self._selector: tuple[SiteClassifier, ...] = ()
        if self.adapts:
            self._selector = (_classifier(self.model, self.recipe.in_channels, selector_width),)
        self._adapted: tuple[nn.Module, ...] = ()
        self._adam: torch.optim.Optimizer | None = None

    # ---------------------------------------------------------------- client half

    def receive(self, message: State, kept: State, site: Site) -> None:
        """Load what came, the selector too; what an earlier site selected is gone."""
        super().receive(message, kept, site)
        self._adapted, self._adam = (), None
        for selector in self._selector if SELECTOR in message.tensors else ():
            selector.set_sites(len(message[SELECTOR]["bias"]))
            self._load(selector, message[SELECTOR])

    def take(self, own: Tensors) -> None:
        """The personal model is trained beside the global one, and is that where no other came."""
        self._load(self.twin, own or joined(_shared(self.received)))

    def loss(self, batch: Batch) -> Tensor:
        """Losses of the global model and of the personal one; each is told by itself."""
        shared, own = super().loss(batch), self.criterion(self.twin, batch)
        self.note(shared)
        self.note(own, PERSONAL_LOSS)
        return shared + own

    def on_train_start(self) -> None:
        """The selector's optimiser goes on from the mean of all sites' moments."""
        super().on_train_start()
        if SITE not in self.received.scalars:
            return
        for selector in self._selector:
            selector.to(self.device)
            self._adam = torch.optim.Adam(selector.parameters(), lr=self.selector_lr)
            load_optimizer(self._adam, [name for name, _ in selector.named_parameters()], self.received[MOMENTS])

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """The selector learns that these images are this site's."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        if self._adam is None:
            return
        with torch.enable_grad():
            logits = self._selector[0](self.normalize(batch["image"]))
            label = torch.full((len(logits),), int(self.received.scalars[SITE]), device=logits.device)
            torch.autograd.backward(nn.functional.cross_entropy(logits, label))
        self._adam.step()
        self._adam.zero_grad()

    def network(self, view: str) -> nn.Module:
        """The global model; the site's own; or, after `adapt`, the one that selects."""
        if view == "adapted":
            if not self._adapted:
                raise RuntimeError("the view 'adapted' exists after `adapt`, at a site that never took part")
            return self._adapted[0]
        return self.twin if view == "personal" else self.model

    def send(self, site: Site) -> State:
        """The differences of both models, and the selector with its optimiser's state."""
        answer = super().send(site)
        if own := self.received.get(REPLY):
            answer.tensors[PERSONAL] = subtract(self._own(), own)
        for selector in self._selector:
            names = [name for name, _ in selector.named_parameters()]
            answer.tensors[SELECTOR] = {name: t.detach().cpu().clone() for name, t in selector.state_dict().items()}
            answer.tensors[MOMENTS] = (
                self.received[MOMENTS] if self._adam is None else pack_optimizer(self._adam, names)
            )
        return answer

    def publish(self, site: Site) -> State:
        """The personal model as it was trained; nothing if it never was."""
        return State({PERSONAL: self._own()}) if self.trained else State()

    def adapt(self, images: Iterable[Tensor]) -> None:
        """Pull the published models, and let the selector take each image to one of them; no image is looked at yet."""
        groups = self.received.tensors.items()
        published = {group.partition("/")[2]: ts for group, ts in groups if group.startswith(f"{PERSONAL}/")}
        places = {site: self.received.scalars.get(f"{SITE}/{site}") for site in published}
        own = {}
        for site, tensors in self.pulled(published).items():
            if (place := places[site]) is not None:
                own[int(place)] = deepcopy(self.model)
                self._load(own[int(place)], tensors)
        selector = deepcopy(self._selector[0]).to(self.device)
        self._adapted = (Selected(selector, deepcopy(self.model), own, self.gamma).requires_grad_(False),)

    def _own(self) -> Tensors:
        """The personal model's parameters and running statistics."""
        state = self.twin.state_dict()
        return {name: state[name].detach().cpu().clone() for name in (*self.parts.parameters, *self.parts.buffers)}

    # ---------------------------------------------------------------- server half

    @property
    def founders_only(self) -> str:
        """The selector has an answer for each site."""
        learnt = "its selector tells the sites apart that were there at the start (algorithm.selector=true)"
        return learnt if self.adapts else super().founders_only

    def init_server(self, introductions: Mapping[str, State]) -> State:
        """The global model, the same as personal one, and a selector with a label for every site, in their order."""
        server = super().init_server(introductions)
        beside = {PERSONAL: {name: t.clone() for name, t in joined(_shared(server)).items()}}
        for selector in self._selector:
            selector.set_sites(len(introductions))
            beside[SELECTOR] = {name: t.detach().clone() for name, t in selector.state_dict().items()}
            beside[MOMENTS] = _no_moments(selector)
        places = {f"{SITE}/{name}": float(place) for place, name in enumerate(sorted(introductions))}
        return State({**server.tensors, **beside}, {**server.scalars, **(places if self.adapts else {})})

    def own(self, server: State, site: str, task: Task) -> Tensors:
        """For scores, the site's pulled model; where it trains that comes beside the global one."""
        return {} if task.kind == "train" else super().own(server, site, task)

    def broadcast(self, server: State, site: str, task: Task) -> State:
        """The global model and the site's; to train, the selector and the site's label, too; to select, all labels."""
        message = super().broadcast(server, site, task)
        labels = {name: place for name, place in server.scalars.items() if name.startswith(f"{SITE}/")}
        if task.kind == "train":
            message.tensors[REPLY] = super().own(server, site, task) or server[PERSONAL]
            message.tensors |= {group: server[group] for group in (SELECTOR, MOMENTS) if group in server.tensors}
            if (own := f"{SITE}/{site}") in labels:
                message.scalars[SITE] = labels[own]
        elif isinstance(task, EvaluateTask) and self.adapts and (task.adapt or "adapted" in task.views):
            message.tensors[SELECTOR] = server[SELECTOR]
            message.scalars |= labels
        return message

    def aggregate(self, server: State, updates: Sequence[Update], average: Average) -> State:
        """FedAvg of global models, selectors and moments; the personal models are pulled."""
        mean, cohort = average(self.weigh(server, updates))
        shared = State({group: ts for group, ts in mean.tensors.items() if group != PERSONAL}, mean.scalars)
        after = self.advance(server, shared, cohort)
        personal = State({**server.tensors, **self._parted(server)})
        trained = [replace(update, tensors=self._parted(update)) for update in updates]
        pulled = super().aggregate(personal, trained, lambda _: (State(self._parted(mean)), cohort))
        replies = {group: ts for group, ts in pulled.tensors.items() if group.startswith(f"{REPLY}/")}
        return State({**after.tensors, PERSONAL: joined(_shared(pulled)), **replies}, after.scalars)

    def _parted(self, state: State) -> dict[str, Tensors]:
        """The group of personal models as parameters and running statistics, as those of the global one stand."""
        own, names = state.get(PERSONAL), zip(SHARED, (self.parts.parameters, self.parts.buffers), strict=True)
        return {kind: {name: own[name] for name in held} for kind, held in names if held}


def _shared(state: State) -> State:
    return State({group: state[group] for group in SHARED if group in state.tensors})


def _no_moments(selector: nn.Module) -> Tensors:
    """The state of Adam before its first step."""
    zeros: Tensors = {}
    for name, parameter in selector.named_parameters():
        zeros |= {f"{name}/{slot}": torch.zeros_like(parameter).detach() for slot in ("exp_avg", "exp_avg_sq")}
        zeros[f"{name}/step"] = torch.zeros(())
    return zeros


def _classifier(model: nn.Module, in_channels: int, width: int) -> SiteClassifier:
    """A selector of the images that a network takes, drawn without disturbing what is drawn later.

    Raises:
        ValueError: no convolution tells whether the network sees images or volumes; the width is no multiple of 4.
    """
    if width % GROUPS:
        raise ValueError(f"algorithm.selector_width={width} must be a multiple of {GROUPS}")
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Conv3d)), None)
    if first is None:
        raise ValueError(
            f"algorithm=fedsm selects models by images, and {type(model).__name__} has no convolution that would tell "
            "what these are like; take algorithm.selector=false, or algorithm=softpull"
        )
    with torch.random.fork_rng(devices=[]):
        return SiteClassifier(in_channels, first.weight.ndim - 2, width)
