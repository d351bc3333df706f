"""LC-Fed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from fedseg.algorithms.fedper import FedRep
from fedseg.algorithms.functional.calibrated import (
    Disagreement,
    Maps,
    SiteNetwork,
    StandaloneNetwork,
    check_chain,
    draw_codes,
    set_sites,
)
from fedseg.algorithms.functional.calibration import Attention, ChannelSelection, HeadCalibration, site_contrast
from fedseg.algorithms.recipe import Recipe
from fedseg.federation.contract import Batch, Site, Task
from fedseg.federation.ranges import Fixed, ProperShare, Share
from fedseg.federation.state import State, Tensors

HEAD, SELECTION = "segmentation_head", "selection"
PEERS = "head"
"""The group of head snapshots: filed per site, shown to every site."""
CODES = f"{SELECTION}.code.weight"
"""The codes of the sites, a column for each."""
SITE = "site"
"""A site's column, in a message; ``site/NAME`` at the server."""


class LCFed(FedRep):
    """LC-Fed (Wang, Jin, Wang, ECCV 2022): local calibration of features and of predictions.

    Encoder and decoder are averaged; each site keeps its head, fitted first in every round as in FedRep. Two things are
    added. Channel selection (averaged): a gate on the deepest features that depends on a code of the site, and is
    pushed away from what it would be with the codes of others. Head calibration (private): a second head whose input is
    weighted by attention to where the heads of all sites disagree on the same features, and to the first head's answer.
    For that, heads travel to all sites; they are never averaged. The calibration never leaves the site.

    The personal model is the whole chain. Sites are fixed when training starts: one that joins later has no code, head
    or calibration. A head that was never trained is shown to nobody, so that round 1 sees no disagreement.

    This is the authors' joint form, in which all parts train together; their later release trains the calibration in a
    second program, never trains or averages channel selection (it is in no parameter list) and lets frozen weights
    drift through Adam's momentum. Here frozen weights stand still. Their program makes a second forward pass for the
    calibration's step; here both losses come from one pass: they reach disjoint parameters, hence one optimiser over
    their sum makes both steps (only with ``trainer.gradient_clip`` do they meet). ``algorithm=lcfed_released`` has the
    released choices. With alpha 0, no channel selection and no head calibration this is FedRep.

    Args:
        head_share: share of the local steps that fit the head; the rest fits body and channel selection. The
            calibration learns in all of them.
        alpha: weight of the contrast between sites' gates; without channel selection there is none.
        channel_selection: gate the deepest features by site.
        reduction: the gate's hidden layer has the features' channels divided by this.
        head_calibration: predict with a second, private head; without it no head leaves its site.
        attention: of the calibration. minmax lies in [0, 1]; raw, as released, is unbounded.
        disagreement: map of where heads disagree. distance: root mean squared distance to the own head, divided by its
            maximum over each image and region. peaks: 1 at local maxima of that, else 0, as released. deviation:
            standard deviation over heads, an older release.
        peak_threshold: least distance of a peak; exclusive.
    """

    one_column_per_site = frozenset({CODES})

    per_site = frozenset({PEERS})
    leaves_out_unknown = True
    one_answer = "sites exchange heads of one map"
    slices_only = "its calibration looks at slices"

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        *,
        head_share: Share = 0.2,
        alpha: NonNegativeFloat = 0.1,
        channel_selection: bool = True,
        reduction: Fixed[PositiveInt] = 16,
        head_calibration: bool = True,
        attention: Attention = "minmax",
        disagreement: Maps = "peaks",
        peak_threshold: Fixed[ProperShare] = 0.2,
        **kwargs: Any,
    ) -> None:
        check_chain(model)
        if channel_selection:
            channels: int = model.get_submodule("encoder").out_channels[-1]  # type: ignore[index, assignment]
            model.add_module(SELECTION, ChannelSelection(channels, 1, reduction))  # the sites' codes come with them
        super().__init__(model, recipe, head_share=head_share, **kwargs)
        if not {f"{HEAD}.{name}" for name in self._head.state_dict()} <= self.personal(model):
            raise ValueError("LC-Fed needs a personal head: let algorithm.personal include part:segmentation_head")
        self.alpha = alpha
        self.maps = Disagreement(disagreement, peak_threshold)
        self.calibration = self._new_calibration(attention) if head_calibration else None
        self.per_site = self.per_site if head_calibration else frozenset()
        self._seed = torch.initial_seed()
        self._name = ""
        self._heads: dict[str, Tensors] = {}

    def _new_calibration(self, attention: Attention) -> HeadCalibration:
        first = next(module for module in self._head.modules() if isinstance(module, nn.Conv2d))
        regions = first.out_channels - (self.recipe.activation == "softmax")
        return HeadCalibration(first.in_channels, regions, first.out_channels, attention)

    @property
    def _head(self) -> nn.Module:
        return self.model.get_submodule(HEAD)

    @property
    def _selection(self) -> ChannelSelection | None:
        selection = dict(self.model.named_children()).get(SELECTION)
        return selection if isinstance(selection, ChannelSelection) else None

    # ---------------------------------------------------------------- client half

    def receive(self, message: State, kept: State, site: Site) -> None:
        """Make room for the codes of all sites, and load."""
        selection, codes = self._selection, message.get("model").get(CODES)
        if selection is not None and codes is not None:
            set_sites(selection, codes.shape[1])
        super().receive(message, kept, site)
        self._name = site.name
        self._heads = {group: ts for group, ts in message.tensors.items() if group.startswith(f"{PEERS}/")}

    def loss(self, batch: Batch) -> Tensor:
        """Loss of the first head, contrast of the gates, and loss of the calibration, which it alone learns from."""
        site = self.network("personal")
        deepest, features = site.body(self.normalize(batch["image"]))
        logits = self._head(features)
        loss = self.task_loss(logits, batch)
        if site.selection is not None and self.alpha:
            loss = loss + self.alpha * site_contrast(site.selection.gates(deepest.detach()), site.site)
        if site.calibration is not None:
            loss = loss + self.task_loss(site.calibrate(features, logits), batch)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """As ever, with the calibration in a group of its own: it learns before the body does.

        PyTorch's fused SGD needs all weights of a group to start their momentum in the same step.
        """
        optimizer = super().configure_optimizers()
        if self.calibration is not None:
            (group,) = optimizer.param_groups
            last = len(list(self.calibration.parameters()))
            group["params"], own = group["params"][:-last], group["params"][-last:]
            optimizer.add_param_group({**group, "params": own})
        return optimizer

    def network(self, view: str) -> SiteNetwork:
        """The whole chain of this site, with the heads of the others as they came.

        Raises:
            ValueError: the site was not there when training started.
        """
        if SITE not in self.received.scalars:
            raise ValueError(_stranger(self._name))
        self._heads = {g: {name: t.to(self.device) for name, t in ts.items()} for g, ts in self._heads.items()}
        names = sorted(self._heads)
        own = f"{PEERS}/{self._name}"
        return SiteNetwork(
            self.model,
            int(self.received.scalars[SITE]),
            self._selection,
            self.calibration,
            [self._heads[name] for name in names],
            names.index(own) if own in names else None,
            self.maps,
            self.recipe.activation,
        )

    def standalone(self, view: str) -> StandaloneNetwork:
        """The whole chain, the heads of the others included."""
        return StandaloneNetwork(self.network(view))

    def answers_with(self) -> State:
        """The heads of all sites, their codes, and the site's place among them."""
        codes = {name: t for name, t in self.received.get("model").items() if name == CODES}
        place = {SITE: self.received.scalars[SITE]} if SITE in self.received.scalars else {}
        return State({**self._heads, **({"model": codes} if codes else {})}, place)

    def send(self, site: Site) -> State:
        """The shared differences, and the head for all to see, once it was trained."""
        answer = super().send(site)
        if self.calibration is not None and site.examples:
            answer.tensors[PEERS] = {name: t.detach().cpu().clone() for name, t in self._head.state_dict().items()}
        return answer

    # ---------------------------------------------------------------- server half

    @property
    def founders_only(self) -> str:
        """Site codes are a column for each site."""
        return "it has a code for each site that was there at the start, and the codes cannot grow"

    def init_server(self, introductions: Mapping[str, State]) -> State:
        """The shared tensors, with a code for every site that introduced itself, in alphabetical order."""
        server = super().init_server(introductions)
        if self._selection is not None:
            server["model"][CODES] = draw_codes(len(server["model"][CODES]), len(introductions), self._seed)
        places = {f"{SITE}/{name}": float(place) for place, name in enumerate(sorted(introductions))}
        return State(server.tensors, {**server.scalars, **places})

    def broadcast(self, server: State, site: str, task: Task) -> State:
        """The shared tensors, the heads of all sites, and the site's place among them.

        Raises:
            ValueError: the site is to train, and was not there when training started.
        """
        message = super().broadcast(server, site, task)
        message.tensors |= {group: ts for group, ts in server.tensors.items() if group.startswith(f"{PEERS}/")}
        if f"{SITE}/{site}" in server.scalars:
            message.scalars[SITE] = server.scalars[f"{SITE}/{site}"]
        elif task.kind == "train":
            raise ValueError(_stranger(site))
        return message


def _stranger(site: str) -> str:
    if not site:
        return "LC-Fed's model is made of what the sites of a federation send each other; train it with train.py"
    return (
        f"site {site!r} was not there when LC-Fed started: it has no site code, no head and no calibration, and the "
        "codes cannot grow. Train anew with this site, or use a method with a global model (such as fedavg) there"
    )
