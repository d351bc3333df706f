"""Federated contrastive pre-training of the encoder."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from fedseg.algorithms.fedavg import FedAvg
from fedseg.algorithms.functional.crops import random_crops
from fedseg.algorithms.functional.deepest import deepest_of
from fedseg.algorithms.functional.exchange import Exchange, pack, unpack
from fedseg.algorithms.functional.infonce import (
    Denominator,
    FeatureBank,
    Features,
    masked_contrast,
    structural_contrast,
)
from fedseg.algorithms.functional.moments import representational_similarity, similarity_weights
from fedseg.algorithms.functional.partitions import PartitionRule, slice_partition, slice_position
from fedseg.algorithms.functional.probes import alignment, cross_site_accuracy, linear_accuracy, uniformity
from fedseg.algorithms.functional.trajectory import follow
from fedseg.federation.contract import Batch, Cohort, Site, Split, Task
from fedseg.federation.ranges import PositiveShare, Share
from fedseg.federation.state import State, Tensors, Update
from fedseg.models.select import complement, part, require_parts

LEARNING = ("encoder", "projector")
BANK = "bank"
POSITIONS = 255  # positional pairs: a slice's place in its volume is told in so many steps
RIDGE, NEIGHBOURS, COMPARED = 1e-3, 5, 1024  # of the probes: penalty, k, features of other sites that are looked at
SIMILARITY_BATCHES = 4
SIMILARITY = "similarity"  # the number that travels


class Contrastive(FedAvg):
    """Federated contrastive pre-training (FCL: Wu et al., MICCAI 2021; FedMoCo: Dong and Voiculescu, MICCAI 2021).

    A stage without labels: only the network's encoder and a projection head learn and travel. Two views of a slice are
    pulled together, and with them slices of the same level of other volumes (structural pairs), here and, through the
    features that sites exchange, at other sites (global structural matching); slices of other levels are pushed away.
    Another run then starts from the encoder: ``pretrained=RUN``. There is nothing to segment with, hence no view and no
    Dice; the run reports probes that need no label, and its last round is its result.

    What leaves a site besides weights, by ``exchange``:

    - ``none``: nothing; each site contrasts with its own features only (federated SimCLR or MoCo).
    - ``moments``: mean and deviation per partition, P (8 D + 1) bytes. Statistics of at least ``at_least`` slices;
      others draw virtual features from them.
    - ``prototypes``: one mean direction per partition, P (4 D + 1) bytes. Averages of at least ``at_least`` slices,
      which may be of one patient.
    - ``features``: one vector per slice, M (4 D + 1) bytes, shown to every other site. A vector is a function of one
      patient's slice: whoever holds the encoder may try to invert it or to tell whether a patient took part, and
      partitions say how slices spread over levels. Secure aggregation cannot hide it, as peers read single vectors.

    No slice number, case or patient is ever sent. ``noise`` blurs what is sent; it is not a proof of privacy.

    The paper's code is not public. Not known and chosen here: temperature, momentum, sizes, what becomes of the
    momentum encoder between rounds, and whether slices of the query's own level count as its negatives
    (``denominator``). FedMoCo's moments are those of projected features. A step takes the encoder forward twice and
    back once; there is no decoder.

    Args:
        pairing: what is pulled together. partition: slices of the same partition of any volume. position: slices whose
            relative positions differ by less than ``position_threshold``. instance: the two views of a slice only,
            other features are negatives; the choice for 2-D images.
        partitions: structural partitions of a volume.
        partition_rule: equal cuts volumes into equal parts; official is the rule of positional contrast (Zeng et al.,
            MICCAI 2021), uneven for short volumes.
        position_threshold: of positional pairs.
        exchange: what sites show each other of their features: none, moments, prototypes or features.
        noise: deviation of Gaussian noise on each coordinate that is exchanged; vectors have length 1.
        at_least: slices behind a prototype or behind moments.
        dimensions: length D of a projected feature.
        temperature: of the contrast.
        momentum: of the momentum encoder.
        momentum_policy: what the momentum encoder is at the start of a round: reset is the received encoder, keep is
            the site's own of the round before, federate is the mean of the sites' (the traffic of weights doubles).
        denominator: what a positive is told from: features of other_partitions; all features, the positive itself once
            more, as the formula is written; or all_once, every feature once, as in supervised contrast and the program
            of PCL. Instance pairs count every feature once anyway.
        own_slice_positive: may other views of a slice be its partners in structural pairs?
        w_local: weight of the contrast with the own site's features as positives.
        w_remote: weight of the contrast with all sites' features as positives (structural pairs only; without features
            of other sites there is no such term).
        bank_size: newest features that a site keeps, and sends at most.
        negatives: features a step compares with, drawn from all that a site knows.
        virtual_keys: features drawn from other sites' moments in each step.
        stale_ttl: rounds that a site's features outlive its absence; where sites train one after the other
            (federation.order), turns of other sites.
        crop: least share of the image's area that a view shows; 1 leaves views to data.augment.
        weighting: examples weighs a site by its training images, labelled or not; uniform gives every site the same
            weight; similarity is FedMoCo's: images times how little training re-arranged the site's representation.
    """

    personal = staticmethod(complement(part(*LEARNING)))
    views = ()
    slices_only = "its pairs are slices of volumes, told apart by their place"
    unseen_views = ()
    labelled = False
    leaves_out_unknown = True
    compares_patients = True
    per_site = frozenset({BANK})

    def __init__(
        self,
        model: nn.Module,
        *args: Any,
        pairing: Literal["partition", "position", "instance"] = "partition",
        partitions: Annotated[int, Field(ge=1, le=POSITIONS)] = 4,
        partition_rule: PartitionRule = "equal",
        position_threshold: PositiveShare = 0.35,
        exchange: Exchange = "features",
        noise: NonNegativeFloat = 0.0,
        at_least: PositiveInt = 5,
        dimensions: Annotated[int, Field(ge=2)] = 128,
        temperature: PositiveFloat = 0.1,
        momentum: Share = 0.99,
        momentum_policy: Literal["reset", "keep", "federate"] = "reset",
        denominator: Denominator = "other_partitions",
        own_slice_positive: bool = False,
        w_local: NonNegativeFloat = 1.0,
        w_remote: NonNegativeFloat = 1.0,
        bank_size: PositiveInt = 2048,
        negatives: PositiveInt = 4096,
        virtual_keys: PositiveInt = 256,
        stale_ttl: NonNegativeInt = 1,
        crop: PositiveShare = 0.5,
        weighting: Literal["examples", "uniform", "similarity"] = "examples",
        **kwargs: Any,
    ) -> None:
        if kwargs.get("personal") is not None:
            raise ValueError("algorithm.personal: contrastive pre-training shares its whole encoder; leave it out")
        _add_projector(model, dimensions)
        shared_weighting = "examples" if weighting == "similarity" else weighting
        super().__init__(model, *args, weighting=shared_weighting, **kwargs)
        self.pairing, self.partitions, self.partition_rule = pairing, partitions, partition_rule
        self.reach = math.ceil(position_threshold * POSITIONS) - 1 if pairing == "position" else 0
        self.exchange, self.noise, self.at_least = exchange, noise, at_least
        self.per_site = self.per_site if exchange != "none" else frozenset()
        self.dimensions, self.temperature, self.crop = dimensions, temperature, crop
        self.momentum, self.momentum_policy = momentum, momentum_policy
        self.denominator, self.own_slice_positive = denominator, own_slice_positive
        self.w_local, self.w_remote = w_local, w_remote
        self.bank_size, self.negatives, self.virtual_keys = bank_size, negatives, virtual_keys
        self.stale_ttl = stale_ttl
        self.reads_updates = self.compares = weighting == "similarity"
        self.needed_numbers = frozenset({SIMILARITY}) if self.compares else frozenset()
        self._check()
        self.target = deepcopy(self.learner).requires_grad_(False)
        self.bank = FeatureBank(bank_size, dimensions)
        self._others: list[Tensors] = []
        self._fresh = 0

    @property
    def learner(self) -> Embedder:
        """Encoder and projection head of the model; the modules are the model's own."""
        return Embedder(self.model.get_submodule("encoder"), self.model.get_submodule("projector"))

    # ---------------------------------------------------------------- one local step

    def batches(self, site: Site, seed: int, steps: int) -> Iterable[Batch]:
        """All training images, labelled or not, in two views and without masks."""
        return site.unlabelled_batches(seed, steps, views=2)

    def loss(self, batch: Batch) -> Tensor:
        """Contrast of the first views' features with the momentum encoder's of the second views."""
        follow(self.target, self.learner, self.momentum)
        first, second = batch["image"].unbind(dim=1)
        codes, items = self._codes(batch).to(first.device), _items(batch).to(first.device)
        query = Features(self.learner(self._view(first)), codes, items)
        with torch.no_grad():
            key = self.target(self._view(second))
        if self.pairing == "instance":
            loss = self.w_local * self._instance_contrast(query, key)
            self._push(key, codes, items)
            return loss
        self._push(key, codes, items)
        others = self._received_features(first.device)
        local, remote = structural_contrast(
            query,
            self.bank.features,
            self._pool(others),
            temperature=self.temperature,
            denominator=self.denominator,
            own_slice_positive=self.own_slice_positive,
            reach=self.reach,
        )
        return self.w_local * local.mean() + (self.w_remote * remote.mean() if others is not None else 0.0)

    def _instance_contrast(self, query: Features, key: Tensor) -> Tensor:
        """MoCo's InfoNCE; earlier views of a query's own slice are not held against it."""
        pool = self._pool(self._received_features(key.device))
        own = torch.eye(len(key), dtype=torch.bool, device=key.device)
        others = query.items[:, None] != pool.items[None, :]
        return masked_contrast(query.vectors, key, own, pool.vectors, others, self.temperature).mean()

    def _pool(self, others: Features | None) -> Features:
        """A sample of all features that the site knows: its own and the received ones."""
        own = self.bank.features
        union = own if others is None else Features.join([own, others])
        return union.sample(self.negatives, torch.default_generator)

    def _received_features(self, device: torch.device) -> Features | None:
        found = unpack(self._others, self.exchange, keys=self.virtual_keys, generator=torch.default_generator)
        if found is None:
            return None
        return Features(found.vectors.to(device), found.partitions.to(device), found.items.to(device))

    def _push(self, key: Tensor, codes: Tensor, items: Tensor) -> None:
        self.bank.push(key, codes, items)
        self._fresh += len(key)

    def _view(self, images: Tensor) -> Tensor:
        return self.normalize(random_crops(images, self.crop, torch.default_generator))

    def _codes(self, batch: Batch) -> Tensor:
        """What tells slices that belong together: their partition, their position, or nothing."""
        if self.pairing == "position":
            return (slice_position(batch["slice"], batch["depth"]) * POSITIONS).round().long()
        if self.pairing == "partition":
            return slice_partition(batch["slice"], batch["depth"], self.partitions, self.partition_rule)
        return torch.zeros_like(batch["slice"])

    # ---------------------------------------------------------------- client half

    def check_site(self, site: Site) -> None:
        """Structural pairs need volumes."""
        if self.pairing != "instance" and bool((next(iter(site.unlabelled_batches(0, 1)))["depth"] == 1).all()):
            raise ValueError(
                f"site {site.name!r} holds 2-D images, and algorithm.pairing={self.pairing} needs slices of volumes; "
                "take algorithm.pairing=instance"
            )

    def receive(self, message: State, kept: State, site: Site) -> None:
        """Load encoder and projector, other sites' features, and what the site kept."""
        super().receive(message, kept, site)
        if self.momentum_policy != "keep" or not kept.get("own"):
            follow(self.target, self.learner, 0.0)
            self._load(self.target, message.get("momentum"))
        self.bank = FeatureBank(self.bank_size, self.dimensions)
        if mine := kept.get(BANK):
            self.bank.features = Features(mine["vectors"], mine["partitions"], mine["items"])
        self._others = [message[group] for group in sorted(message.tensors) if group.startswith(f"{BANK}/")]
        self._fresh = 0

    def on_train_end(self) -> None:
        """Of the bank only this round's features remain."""
        super().on_train_end()
        self.bank.features = self.bank.features[-self._fresh :]

    def send(self, site: Site) -> State:
        """Differences of encoder and projector, and what the site shows of its features."""
        answer = super().send(site)
        if self.momentum_policy == "federate":
            answer.tensors["momentum"] = _floats(self.target)
        shown = pack(
            _on_cpu(self.bank.features),
            self.exchange,
            most=self.bank_size,
            at_least=self.at_least,
            noise=self.noise,
            generator=torch.default_generator,
        )
        if shown:
            answer.tensors[BANK] = shown
        if self.compares:
            answer.scalars[SIMILARITY] = self._similarity(site)
        return answer

    def keep(self) -> State:
        """The bank, batch counters, and the momentum encoder where it is the site's own; no decoder."""
        kept = super().keep()
        counters = {name: t for name, t in kept.get("model").items() if name.startswith(_prefixes())}
        kept.tensors["model"] = counters
        if self.momentum_policy != "keep":
            kept.tensors.pop("own", None)
        features = _on_cpu(self.bank.features)
        if len(features):
            kept.tensors[BANK] = {
                "vectors": features.vectors.clone(),
                "partitions": features.partitions.clone(),
                "items": features.items.clone(),
            }
        return State({group: tensors for group, tensors in kept.tensors.items() if tensors})

    @torch.no_grad()
    def _similarity(self, site: Site) -> float:
        """How alike the received and the trained encoder arrange the same images."""
        seed = int(torch.randint(2**62, ()))
        images = torch.cat([batch["image"] for batch in site.unlabelled_batches(seed, SIMILARITY_BATCHES)])
        trained = self.learner
        received = deepcopy(trained)
        prefix = "encoder."
        for group in ("model", "buffers"):
            tensors = self.received.get(group)
            self._load(received, {name: t for name, t in tensors.items() if name.startswith(prefix)})
        inputs = self.normalize(images.to(self.device))
        before, after = (_answer(network, network.pooled, inputs) for network in (received, trained))
        return representational_similarity(before, after)

    @torch.no_grad()
    def probe(self, site: Site, split: Split) -> dict[str, float]:
        """Quality of the projected features of a split, without labels.

        Returns:
            ``uniformity``; with structural partitions also ``partition_accuracy`` (linear classifier fitted to the
            site's bank) and, where features of other sites were received, ``alignment`` with them and
            ``cross_site_accuracy`` (retrieval between them and this site, both ways).
        """
        learner, found = self.learner, []
        for batch in site.eval_batches(split):
            inputs = self.normalize(batch["image"].to(self.device))
            found.append(Features(_answer(learner, learner, inputs).cpu(), self._codes(batch), _items(batch)))
        if sum(map(len, found)) < 2:
            return {}
        mine = Features.join(found)
        numbers = {"uniformity": uniformity(mine.vectors)}
        if self.pairing != "partition":
            return numbers
        bank = _on_cpu(self.bank.features)
        if len(bank):
            numbers["partition_accuracy"] = linear_accuracy(
                bank.vectors, bank.partitions, mine.vectors, mine.partitions, RIDGE
            )
        others = unpack(self._others, self.exchange, keys=self.virtual_keys, generator=torch.Generator().manual_seed(0))
        if others is not None:
            both = Features.join([mine, others.sample(COMPARED, torch.Generator().manual_seed(0))])
            sides = (torch.arange(len(both)) >= len(mine)).long()
            numbers["alignment"] = alignment(both.vectors, both.partitions, sides)
            numbers["cross_site_accuracy"] = cross_site_accuracy(both.vectors, both.partitions, sides, NEIGHBOURS)
        return {name: value for name, value in numbers.items() if math.isfinite(value)}

    # ---------------------------------------------------------------- server half

    def init_server(self, introductions: Mapping[str, State]) -> State:
        """Encoder and projector of the fresh model, and its momentum encoder where that is shared."""
        server = super().init_server(introductions)
        if self.momentum_policy == "federate":
            server.tensors["momentum"] = _floats(self.target)
        return server

    def broadcast(self, server: State, site: str, task: Task) -> State:
        """Shared weights and the other sites' banks, never the own one; who only evaluates must have given one."""
        message = super().broadcast(server, site, task)
        if "momentum" in server.tensors:
            message.tensors["momentum"] = server["momentum"]
        own = f"{BANK}/{site}"
        if task.kind == "train" or own in server.tensors:
            for group in _banks(server):
                if group != own:
                    message.tensors[group] = {name: t for name, t in server[group].items() if name != "age"}
        return message

    def weigh(self, server: State, updates: Sequence[Update]) -> list[float]:
        """By images, uniformly, or by images and representational similarity."""
        if not self.compares:
            return super().weigh(server, updates)
        if not any(update.examples for update in updates):
            return [0.0] * len(updates)
        return similarity_weights(
            [update.examples for update in updates], [update.scalars[SIMILARITY] for update in updates]
        )

    def advance(self, server: State, mean: State, cohort: Cohort) -> State:
        """Move the weights; file the banks that came, and forget those of sites that have been absent too long."""
        moved = super().advance(server, mean, cohort)
        for group in _banks(moved):
            age = 0 if group in mean.tensors else int(server[group]["age"]) + 1
            if age > self.stale_ttl:
                del moved.tensors[group]
            else:
                moved.tensors[group] = {**moved[group], "age": torch.tensor(age)}
        return moved

    def _check(self) -> None:
        """Refuse knobs that do not fit each other."""
        if self.w_local == 0 and (self.w_remote == 0 or self.exchange == "none" or self.pairing == "instance"):
            raise ValueError("algorithm.w_local=0 leaves nothing to learn; without exchange there is no remote term")
        if self.pairing == "position" and self.exchange in ("moments", "prototypes"):
            raise ValueError(
                f"algorithm.exchange={self.exchange} averages over partitions, which algorithm.pairing=position does "
                "not have; take pairing=partition, or exchange features"
            )


class Projector(nn.Sequential):
    """Two-layer projection head: (B, channels) -> (B, dimensions)."""

    def __init__(self, channels: int, dimensions: int) -> None:
        super().__init__(nn.Linear(channels, channels), nn.ReLU(inplace=True), nn.Linear(channels, dimensions))


class Embedder(nn.Module):
    """Encoder, global average of its deepest map, projection head, unit length."""

    def __init__(self, encoder: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector

    def pooled(self, inputs: Tensor) -> Tensor:
        """(B, C, H, W) network input -> (B, channels) before the projection head."""
        return deepest_of(self.encoder(inputs)).mean(dim=(2, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, C, H, W) network input -> (B, D) unit vectors."""
        return functional.normalize(self.projector(self.pooled(inputs)).float(), dim=1)


def _add_projector(model: nn.Module, dimensions: int) -> None:
    """Hang the projection head on the network, and let only it and the encoder learn."""
    require_parts(model, "Contrastive pre-training", "encoder")
    encoder = model.get_submodule("encoder")
    if not any(parameter.requires_grad for parameter in encoder.parameters()):
        raise ValueError("the encoder is frozen (model.freeze_encoder=true): there is nothing to pre-train")
    channels = int(encoder.out_channels[-1])  # type: ignore[index]
    for name, parameter in model.named_parameters():
        if not name.startswith("encoder."):
            parameter.requires_grad_(False)
    model.add_module("projector", Projector(channels, dimensions))


def _answer(network: nn.Module, function: Any, inputs: Tensor) -> Tensor:
    """A function of a network in evaluation mode, which is left as it was."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    result: Tensor = function(inputs)
    for module, training in modes.items():
        module.training = training
    return result


def _items(batch: Batch) -> Tensor:
    """A number per slice that never leaves the site, the same in every process."""
    names = zip(batch["case"], batch["slice"].tolist(), strict=True)
    return torch.tensor([zlib.crc32(f"{case}\0{index}".encode()) for case, index in names])


def _on_cpu(features: Features) -> Features:
    return Features(features.vectors.cpu(), features.partitions.cpu(), features.items.cpu())


def _floats(module: nn.Module) -> Tensors:
    return {name: t.detach().cpu().clone() for name, t in module.state_dict().items() if t.is_floating_point()}


def _banks(state: State) -> list[str]:
    return sorted(group for group in state.tensors if group.startswith(f"{BANK}/"))


def _prefixes() -> tuple[str, ...]:
    return tuple(f"{name}." for name in LEARNING)
