"""How IOP-FL's adaptation terms are balanced: on seen sites held out in turn, never on an unseen site's labels.

    python -m benchmarks.iopfl_balance            about ten CPU minutes
    python -m benchmarks.iopfl_balance --quick    one site held out, for a first look

Each of the first sites of the phantom is held out in turn; the others train a federation, publish their models, and the
held-out site adapts them to its images. Weights start from those that give the three terms the same gradient norm in
the learning parameters, before any step; each row of the table departs from that. The site's labels only score the
result: in a real federation it is a seen site, whose labels may be used to choose.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from fedseg.algorithms.functional.adaptation import Views, adaptation_terms, set_router_dropout
from fedseg.algorithms.functional.routing import adaptable
from fedseg.algorithms.iopfl import IOPFL
from fedseg.configs.compose import compose
from fedseg.datamodules import SiteData
from fedseg.evaluation import evaluate
from fedseg.federation.checkpoint import Checkpoint
from fedseg.federation.client import Images
from fedseg.federation.contract import EvaluateTask, Scored, Silent
from fedseg.federation.state import State
from fedseg.launch.experiment import Experiment
from fedseg.launch.settings import SCHEMA
from fedseg.models.select import normalisation

TERMS = ("entropy", "consistency", "smoothness")
SETTINGS = (
    "algorithm=iopfl", "data=phantom", "data.n_sites=4", "data.cases_per_site=16", "data.amount=0", "data.size=64",
    "federation.rounds=12", "federation.local_steps=10", "federation.evaluate_every=100",
    "federation.checkpoint_every=100", "trainer.threads=1", "trainer.accelerator=cpu",
)  # fmt: skip


@dataclass(frozen=True)
class Fold:
    """A trained federation and the site that was held out.

    Attributes:
        experiment: what trained.
        worker: an instance at the held-out site, all models received.
        site: the held-out site.
    """

    experiment: Experiment
    worker: IOPFL
    site: SiteData

    @classmethod
    def train(cls, held_out: str) -> Fold:
        """Train without a site, publish, and bring everything there."""
        experiment = Experiment(compose([*SETTINGS, f"data.unseen=[{held_out}]"], SCHEMA))
        experiment.check()
        experiment.data.setup()
        with tempfile.TemporaryDirectory() as folder:
            federation = experiment.federation(Checkpoint(Path(folder)), lambda *_: Scored(), Silent())
            server = federation.run()
        rounds = experiment.schedule.rounds
        message = federation.algorithm.broadcast(server, held_out, EvaluateTask(rounds, 0))
        published = federation.publish(rounds)
        worker = experiment.algorithm()
        assert isinstance(worker, IOPFL)
        site = experiment.data.site(held_out)
        worker.receive(State({**message.tensors, **published.tensors}), State(), site)
        return cls(experiment, worker, site)

    def gradient_norms(self) -> dict[str, float]:
        """Norm of each unweighted term's gradient in all learning parameters, mean over the site's batches."""
        torch.manual_seed(0)
        groups = self.worker.received.tensors
        every = map(self.worker.normalize, Images(self.site, "test"))
        routed = self.worker.mixing.build(self.worker.model, [t for g, t in groups.items() if "/" in g], every)
        learning = adaptable(routed, normalisation(routed))
        set_router_dropout(routed, True)
        alike: Any = {f"{term}_weight": 1.0 for term in TERMS}
        objective = replace(self.worker.adaptation.objective, **alike)
        norms: dict[str, list[float]] = {term: [] for term in TERMS}
        for batch in Images(self.site, "test"):
            images = self.worker.normalize(batch)
            noise = self.worker.adaptation.noise * torch.randn(images.shape)
            views = Views.draw(images, torch.default_generator)
            terms = adaptation_terms(routed, images, noise, views, objective, fresh_pass=False)
            for term in TERMS:
                gradients = torch.autograd.grad(getattr(terms, term), learning, retain_graph=True, allow_unused=True)
                squares = [g.square().sum() for g in gradients if g is not None]
                norms[term].append(float(torch.stack(squares).sum().sqrt()))
        return {term: mean(values) for term, values in norms.items()}

    def dice(self, view: str) -> float:
        """Mean Dice of a view over the held-out site's cases and regions."""
        regions = self.experiment.data.regions
        scores = evaluate(
            lambda images: self.worker.predict(images, view), self.site, "test", regions, metrics=("dice",), tolerance=1
        )
        return mean(score.value for score in scores)

    def adapted(self, weights: dict[str, float], passes: int, lr: float | None = None) -> float:
        """Dice after adapting with these weights, and another learning rate if one is given."""
        before = self.worker.adaptation
        chosen: Any = {f"{term}_weight": weights[term] for term in TERMS}
        objective = replace(before.objective, **chosen)
        self.worker.adaptation = replace(before, objective=objective, passes=passes, lr=lr or before.lr)
        torch.manual_seed(1)
        self.worker.adapt(Images(self.site, "test"))
        self.worker.adaptation = before
        return self.dice("adapted")


def candidates(equal: dict[str, float]) -> Iterator[tuple[str, dict[str, float]]]:
    """Departures from equal gradient norms."""
    yield "equal gradient norms", equal
    for term in TERMS:
        yield f"only {term}", {**dict.fromkeys(TERMS, 0.0), term: equal[term]}
    for term in TERMS:
        yield f"{term} x 10", {**equal, term: 10 * equal[term]}


def main() -> None:
    """Train the folds, print gradient norms and one row per candidate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one fold")
    parser.add_argument(
        "--passes", type=int, nargs="*", default=[5], help="passes over the images, per table of weights"
    )
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of the table of weights")
    parser.add_argument("--rates", type=float, nargs="*", default=[1e-3, 3e-4, 1e-4], help="learning rates to compare")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folds = [Fold.train(f"site_{i:02d}") for i in range(1, 2 if options.quick else 4)]
    norms = {term: mean(fold.gradient_norms()[term] for fold in folds) for term in TERMS}
    print("gradient norms  " + "  ".join(f"{term} {norm:.3g}" for term, norm in norms.items()))
    equal = {term: norms["consistency"] / norm for term, norm in norms.items()}
    print(f"{'':28}{'passes':>7}{'':5}" + "".join(f"{f.site.name:>9}" for f in folds) + f"{'mean':>9}")
    table_row("global model", "", [fold.dice("global") for fold in folds])
    table_row("mixture, not adapted", "0", [fold.adapted(equal, 0) for fold in folds])
    for passes in options.passes:
        for name, weights in candidates(equal):
            table_row(name, str(passes), [fold.adapted(weights, passes, options.lr) for fold in folds])
    objective = folds[0].worker.adaptation.objective
    default = {term: getattr(objective, f"{term}_weight") for term in TERMS}
    for rate in options.rates:
        values = [fold.adapted(default, folds[0].worker.adaptation.passes, rate) for fold in folds]
        table_row(f"default weights, lr {rate:g}", str(folds[0].worker.adaptation.passes), values)


def table_row(name: str, passes: str, values: list[float]) -> None:
    """One line, as soon as it is known."""
    print(f"{name:28}{passes:>7}{'':5}" + "".join(f"{v:9.4f}" for v in values) + f"{mean(values):9.4f}", flush=True)


if __name__ == "__main__":
    main()
