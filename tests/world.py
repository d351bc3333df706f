"""A world small enough to run a federation in a blink: a network of a few hundred weights, sites of a few images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from fedseg import configs
from fedseg.algorithms import ALGORITHMS
from fedseg.algorithms.base import Algorithm
from fedseg.algorithms.composed import composed
from fedseg.algorithms.functional.private import PrivateStep
from fedseg.algorithms.harmonised import harmonised
from fedseg.algorithms.recipe import Recipe, Training
from fedseg.common.seeds import derive_seed
from fedseg.federation.checkpoint import Checkpoint
from fedseg.federation.client import Compute
from fedseg.federation.contract import Batch, EvaluateTask, Scored, Silent, Task
from fedseg.federation.engine import POOL, Federation
from fedseg.federation.schedule import Schedule
from fedseg.federation.state import State, Update
from fedseg.federation.transport import InProcess
from fedseg.models.freeze import freeze
from fedseg.models.lora import Learns, adapt
from fedseg.models.norm import Norm, convert_norm

CPU = Compute(accelerator="cpu")


class TinyEncoder(nn.Sequential):
    def forward(self, images: Tensor) -> list[Tensor]:
        return [images, super().forward(images)]


class TinyDecoder(nn.Sequential):
    def forward(self, features: list[Tensor]) -> Tensor:
        return super().forward(features[-1])


class TinyNet(nn.Module):
    """The parts of an smp network, one convolution each; the encoder answers with a list of maps, as smp's do, and
    the decoder takes it."""

    def __init__(self, in_channels: int = 3, classes: int = 2, width: int = 4) -> None:
        super().__init__()
        self.encoder = TinyEncoder(nn.Conv2d(in_channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.encoder.out_channels = [in_channels, width]
        self.decoder = TinyDecoder(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.segmentation_head = nn.Sequential(nn.Conv2d(width, classes, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.segmentation_head(self.decoder(self.encoder(images)))


@dataclass
class ToySite:
    """Bright discs on a background whose brightness is the site's own; two images make a volume.

    Without labels (`labelled` false) a site still has training images. `known` is 0 where labels are ignored.
    """

    name: str
    index: int
    images: Tensor
    masks: Tensor
    seen: bool = True
    batch_size: int = 2
    labelled: bool = True
    known: Tensor | None = None

    @classmethod
    def make(cls, name: str, index: int, count: int = 6, size: int = 12) -> ToySite:
        generator = torch.Generator().manual_seed(derive_seed("toy", name))
        ys, xs = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
        centre = torch.rand(count, 2, generator=generator) * size / 2 + size / 4
        distance = ((ys - centre[:, 0, None, None]) ** 2 + (xs - centre[:, 1, None, None]) ** 2).sqrt()
        outer, inner = (distance < size / 3).float(), (distance < size / 6).float()
        noise = 0.1 * torch.rand(count, 3, size, size, generator=generator)
        images = (0.1 + 0.1 * index + 0.3 * outer[:, None] + 0.2 * inner[:, None] + noise).clamp(0, 1)
        return cls(name, index, images, torch.stack([outer, inner], dim=1))

    @property
    def examples(self) -> int:
        return len(self.images) if self.labelled else 0

    @property
    def training_images(self) -> int:
        return len(self.images)

    def at(self, round: int) -> ToySite:
        return self

    def covered(self) -> Tensor:
        shares = self.masks.double().mean(dim=(2, 3)) if self.labelled else torch.zeros(0, self.masks.shape[1]).double()
        return shares.unflatten(0, (-1, 2)).mean(dim=1)

    def steps(self, epochs: float = 1.0, labelled: bool = True) -> int:
        return math.ceil(epochs * (self.examples if labelled else self.training_images) / self.batch_size)

    def train_batches(self, seed: int, steps: int) -> Sequence[Batch]:
        generator = torch.Generator().manual_seed(seed)
        picks = torch.randint(self.training_images, (steps, self.batch_size), generator=generator)
        return [self._batch(pick) for pick in picks]

    @property
    def patients(self) -> int:
        return self.examples // 2

    def patient_batches(self, seed: int, steps: int, rate: float) -> Sequence[Batch]:
        generator = torch.Generator().manual_seed(seed)
        drawn = [(torch.rand(self.patients, generator=generator) < rate).nonzero().flatten() for _ in range(steps)]
        picks = [torch.cat([2 * patients, 2 * patients + 1]).sort().values for patients in drawn]
        return [{**self._batch(pick), "patient": pick // 2} for pick in picks]

    def unlabelled_batches(self, seed: int, steps: int, views: int = 1) -> Sequence[Batch]:
        batches = self.train_batches(seed, steps)
        for batch in batches:
            batch.pop("known", None)
            del batch["mask"]
            if views > 1:
                shades = [batch["image"] * (1.0 - 0.1 * view) for view in range(views)]
                batch["image"] = torch.stack(shades, dim=1)
        return batches

    def plain_batches(self) -> Iterator[Batch]:
        for pick in torch.arange(len(self.images)).split(self.batch_size):
            batch = self._batch(pick)
            batch.pop("known", None)
            del batch["mask"]
            yield batch

    def eval_batches(self, split: str) -> Iterator[Batch]:
        yield self._batch(torch.arange(len(self.images)))

    def input_batches(self, split: str) -> Iterator[Batch]:
        return self.eval_batches(split)

    def _batch(self, pick: Tensor) -> Batch:
        return {
            "image": self.images[pick],
            "mask": self.masks[pick],
            "case": [f"case{int(i) // 2}" for i in pick],
            "slice": pick % 2,
            "depth": torch.full_like(pick, 2),
            **({} if self.known is None else {"known": self.known[pick]}),
        }


def toy_sites(count: int = 3) -> dict[str, ToySite]:
    sites = {f"s{i}": ToySite.make(f"s{i}", i, count=4 + 2 * i) for i in range(count)}
    union = [torch.cat([getattr(site, field) for site in sites.values()]) for field in ("images", "masks")]
    return {**sites, POOL: ToySite(POOL, count, *union)}


def training_of(name: str, **knobs: Any) -> Training:
    """How a method trains in the tests, as far as its own file of settings does not say otherwise."""
    own = Path(configs.__file__).parent / "algorithm" / f"{name.partition('+')[0]}.yaml"
    said = yaml.safe_load(own.read_text(encoding="utf-8")).get("training", {}) if own.is_file() else {}
    return Training(**{"lr": 1e-2, **said, **knobs})


def build(
    name: str,
    training: Training | None = None,
    seed: int = 0,
    private: PrivateStep | None = None,
    norm: Norm = "batch",
    rounds: int = 1,
    frozen: bool = False,
    adapters: tuple[int, Learns] | None = None,
    **knobs: Any,
) -> Algorithm:
    torch.manual_seed(seed)
    training = training or training_of(name)
    public = ToySite.make("public", 1, count=10).images
    recipe = Recipe.build(training, "sigmoid", in_channels=3, private=private, rounds=rounds, public=public)
    network = TinyNet()
    convert_norm(network, norm, groups=2)
    if frozen:
        freeze(network.encoder)
    if adapters:
        adapt(network.encoder, adapters[0], None, adapters[1])
    method = reduce(composed, (ALGORITHMS[part] for part in name.split("+")))
    return harmonised(method, training)(network, recipe, **knobs)


def evaluate(algorithm: Algorithm, site: ToySite, task: EvaluateTask) -> Scored:
    """Soft Dice of every view, enough to choose a best round."""
    scores = {}
    for view in algorithm.views if site.seen else algorithm.unseen_views:
        for split in task.splits:
            batch = next(site.eval_batches(split))
            known = batch.get("known", torch.tensor(1.0))
            p, mask = algorithm.predict(batch["image"], view) * known, batch["mask"] * known
            scores[f"{split}/{view}/dice"] = float(2 * (p * mask).sum() / (p + mask).sum())
    return Scored(scores)


class Quiet(Silent):
    """An observer that remembers records."""

    def __init__(self) -> None:
        self.records: list[Any] = []

    def round_done(self, record: Any) -> None:
        self.records.append(record)

    def rows(self, table: str) -> list[dict[str, Any]]:
        return [row for record in self.records for row in getattr(record, table)]


@dataclass
class Outcome:
    server: State
    kept: dict[str, State]
    observer: Quiet
    federation: Federation


class Forgetful(InProcess):
    """Rebuilds the worker for every turn, as ``build`` does."""

    build: Callable[[], Algorithm]

    def ask(self, tasks: Mapping[str, Task], messages: Mapping[str, State]) -> Iterator[Update]:
        for site, task in tasks.items():
            self.worker = self.build()
            yield from super().ask({site: task}, messages)


def simulate(
    name: str,
    folder: Path,
    rounds: int = 2,
    *,
    transport: type[InProcess] = InProcess,
    training: Training | None = None,
    schedule: Mapping[str, Any] | None = None,
    sites: Mapping[str, ToySite] | None = None,
    before: Any = None,
    transforms: Sequence[Any] = (),
    **knobs: Any,
) -> Outcome:
    """Run a federation of toy sites; ``before(federation)`` may tamper with it first."""
    sites = sites or toy_sites()

    def fresh() -> Algorithm:
        return build(name, training, rounds=rounds, **knobs)

    way = transport(fresh(), sites, CPU, evaluate, transforms)
    if isinstance(way, Forgetful):
        way.build = fresh
    observer = Quiet()
    federation = Federation(
        fresh(),
        way,
        [site for site in sites if site != POOL],
        Schedule(**{"rounds": rounds, "local_steps": 3, **(schedule or {})}),
        seed=7,
        checkpoint=Checkpoint(folder),
        observer=observer,
        transforms=transforms,
    )
    if before is not None:
        before(federation)
    server = federation.run()
    return Outcome(server, dict(way.kept()), observer, federation)


def assert_same(a: State, b: State) -> None:
    """Bit for bit."""
    assert a.tensors.keys() == b.tensors.keys()
    for group, tensors in a.tensors.items():
        assert tensors.keys() == b[group].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, b[group][name]), (
                f"{group}/{name} differs by {(tensor - b[group][name]).abs().max()}"
            )
    assert a.scalars == b.scalars


def assert_same_shared(a: State, b: State) -> None:
    """The shared tensors, bit for bit."""
    for group in ("model", "buffers"):
        assert_same(State({group: a.get(group)}), State({group: b.get(group)}))


def assert_same_outcome(a: Outcome, b: Outcome) -> None:
    assert_same(a.server, b.server)
    assert a.kept.keys() == b.kept.keys()
    for site in a.kept:
        assert_same(a.kept[site], b.kept[site])
