"""BrainTorrent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fedseg.algorithms.answers import weighted
from fedseg.algorithms.local import Local
from fedseg.federation.contract import Cohort, Site, Task
from fedseg.federation.state import State, Tensors, Update
from fedseg.models.select import named

OFFER, VERSIONS = "offer", "versions"


class BrainTorrent(Local):
    """BrainTorrent (Roy et al., 2019): peers without a server; whose turn it is merges the others' newer models.

    A site keeps its model, how often it has trained (its version), and of every peer the version that it merged last.
    In its turn it takes the models of all peers that can be reached and have a newer one, w_i <- (n_i w_i + sum n_j
    w_j) / (n_i + sum n_j) by labelled training images, running statistics too; then it trains, and its version rises.
    There is no global model. Turns are drawn by chance (federation.order=random, which algorithm=braintorrent sets): a
    round is as many of them as sites take part. After the paper's algorithm; no numbers were compared.

    Args:
        personal: tensors of the model that no peer is given: normalisation, statistics, or part:segmentation_head and
            the like. Null gives all.
    """

    splits_itself = False
    per_site = frozenset({OFFER, VERSIONS})
    answers_singly = True
    among_peers = True

    def __init__(self, *args: Any, personal: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        held_back = named(personal)(self.model) if personal else frozenset[str]()
        state = self.model.state_dict()
        self.parts.taken = [n for n in self.parts.stays if state[n].is_floating_point() and n not in held_back]
        if not self.parts.taken:
            raise ValueError(f"algorithm.personal={personal} leaves nothing to take from a peer; take algorithm=local")
        self._versions: Tensors = {}  # site -> the version that was merged last; of the site itself, its own

    @property
    def shares(self) -> bool:
        """Peers see its models."""
        return True

    # ---------------------------------------------------------------- client half

    def receive(self, message: State, kept: State, site: Site) -> None:
        """Load the site's own model, and merge what came from peers into it."""
        super().receive(message, kept, site)
        self._versions = dict(kept.get(VERSIONS))
        came = {g.removeprefix(f"{OFFER}/"): ts for g, ts in message.tensors.items() if g.startswith(f"{OFFER}/")}
        if not came:
            return
        images = [float(site.examples), *(message.scalars[f"examples/{peer}"] for peer in came)]
        self._load(self.model, weighted([self._now(), *came.values()], [count / sum(images) for count in images]))
        self._versions |= {peer: message[VERSIONS][peer] for peer in came}

    def send(self, site: Site) -> State:
        """The model for peers to take, its new version, and the versions that were merged into it."""
        answer = super().send(site)
        self._versions[site.name] = self._versions.get(site.name, torch.tensor(0)) + 1
        answer.tensors |= {OFFER: {name: t.cpu().clone() for name, t in self._now().items()}}
        answer.tensors |= {VERSIONS: dict(self._versions)}
        return answer

    def keep(self) -> State:
        """The model, and the versions."""
        kept = super().keep()
        if self._versions:
            kept.tensors[VERSIONS] = dict(self._versions)
        return kept

    def _now(self) -> Tensors:
        state = self.model.state_dict()
        return {name: state[name].detach() for name in self.parts.taken}

    # ---------------------------------------------------------------- what lies at the sites, and between them

    def broadcast(self, server: State, site: str, task: Task) -> State:
        """In its turn, the models of peers that can be reached and have trained since they were merged last."""
        message = super().broadcast(server, site, task)
        if task.kind != "train":
            return message
        merged_last = server.get(f"{VERSIONS}/{site}")
        newer: Tensors = {}
        for peer in task.peers:
            version = server.get(f"{VERSIONS}/{peer}").get(peer)
            if peer != site and version is not None and version > merged_last.get(peer, 0):
                newer[peer] = version
                message.tensors[f"{OFFER}/{peer}"] = server[f"{OFFER}/{peer}"]
                message.scalars[f"examples/{peer}"] = server.scalars[f"examples/{peer}"]
        if newer:
            message.tensors[VERSIONS] = newer
        return message

    def weigh(self, server: State, updates: Sequence[Update]) -> list[float]:
        """By number of labelled training images.

        Raises:
            ValueError: a model is not like the others', or no newer version of it.
        """
        for update in updates:
            if _kinds(update.get(OFFER)) != _kinds(self._now()):
                raise ValueError("its model is none of this run: names, shapes or types of its tensors are others")
            _check_versions(update, server.get(f"{VERSIONS}/{update.site}"))
        return super().weigh(server, updates)

    def advance(self, server: State, mean: State, cohort: Cohort) -> State:
        """Every site's newest model, its versions, and by how many images it counts."""
        counts = {f"examples/{site}": weight for site, weight in cohort.weights.items()}
        return State({**server.tensors, **mean.tensors}, {**server.scalars, **counts})


def _kinds(tensors: Tensors) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _check_versions(update: Update, before: Mapping[str, torch.Tensor]) -> None:
    """Refuse versions that are no whole numbers, or that go back.

    Raises:
        ValueError: naming whose.
    """
    told = update.get(VERSIONS)
    if any(version.shape or version.dtype != torch.int64 for version in told.values()):
        raise ValueError("its versions are not whole numbers")
    known = {update.site: 0, **{peer: int(version) for peer, version in before.items()}}
    for peer, version in known.items():
        least = version + (peer == update.site)
        if peer not in told or int(told[peer]) < least:
            raise ValueError(f"its version of {peer!r} goes back behind {least}")
