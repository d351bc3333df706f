"""Membership inference: does the loss of a model tell a site's training images from others of the same site?

The attacker holds a model and the labelled image in question, and says "member" where the loss is low. Members are a
site's training images, the others its validation and test images, none augmented. AUC per site, mean over sites, with
the 95 % bootstrap interval over images. Models: the global one of FedAvg, Ditto's personal one, a local one, LC-Fed's
whole chain, and what LC-Fed's peers can build: the shared body with the head that a site shows them.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.attacks.scores import Floats, mean_auc
from benchmarks.steps import Traffic
from fedseg.algorithms.lcfed import HEAD, PEERS
from fedseg.configs.compose import compose
from fedseg.datamodules.site import SiteData
from fedseg.federation.checkpoint import Checkpoint
from fedseg.federation.contract import EvaluateTask, Scored
from fedseg.federation.state import State
from fedseg.launch.experiment import Experiment, quieten_libraries
from fedseg.launch.settings import SCHEMA
from fedseg.models.heads import probabilities

COMMON = """data=phantom data.n_sites=3 data.cases_per_site=24 data.amount=0 data.size=32 data.resolution=32
    data.batch_size=4 data.augment=none model=tiny trainer.threads=1 federation.rounds=25 federation.local_steps=10
    federation.evaluate_every=25 federation.checkpoint_every=25"""
MODELS = [("fedavg", "global"), ("ditto", "personal"), ("local", "personal"), ("lcfed", "personal"), ("lcfed", "shown")]


class Trained:
    """A federation that has run, and the losses of its models.

    Args:
        method: of the suite.
        common: settings.
    """

    def __init__(self, method: str, common: str = COMMON) -> None:
        self.experiment = Experiment(compose([*common.split(), f"algorithm={method}"], SCHEMA))
        self.experiment.data.setup()
        with tempfile.TemporaryDirectory() as folder:
            federation = self.experiment.federation(Checkpoint(Path(folder)), lambda *_: Scored(), Traffic())
            self.server = federation.run()
            self.algorithm, self.kept = federation.algorithm, dict(federation.transport.kept())
        self.worker = self.experiment.algorithm()

    def scores(self, site: SiteData, view: str) -> tuple[Floats, Floats]:
        """Minus the loss of every image: of members, and of others."""
        round = self.experiment.schedule.rounds
        message = self.algorithm.broadcast(self.server, site.name, EvaluateTask(round, 0))
        kept = self.kept.get(site.name, State()) if view != "shown" else State()
        self.worker.receive(message, kept, site)
        network = self.worker.model if view == "shown" else self.worker.network(view)
        if view == "shown":
            self.worker.model.get_submodule(HEAD).load_state_dict(message[f"{PEERS}/{site.name}"])
        others = np.concatenate([self._scores(site, split, network) for split in ("val", "test")])
        return self._scores(site, "train", network), others

    @torch.no_grad()
    def _scores(self, site: SiteData, split: str, network: nn.Module) -> Floats:
        network.eval()
        found: list[float] = []
        for batch in site.eval_batches(split):  # type: ignore[arg-type]
            logits = network(self.worker.normalize(batch["image"]))
            answer = probabilities(logits, self.worker.recipe.activation).clamp(1e-6, 1 - 1e-6)
            loss = nn.functional.binary_cross_entropy(answer, batch["mask"], reduction="none")
            found += (-loss.mean((1, 2, 3))).tolist()
        return np.array(found)


def main(_folder: Path) -> None:
    """Print the table."""
    quieten_libraries()
    print("Membership inference by the loss: mean AUC over sites (95 %); 0.5 is chance")
    trained: dict[str, Trained] = {}
    for method, view in MODELS:
        run = trained[method] if method in trained else Trained(method)
        trained[method] = run
        sites = [run.experiment.data.site(name) for name in run.experiment.data.sites]
        mean, low, high = mean_auc([run.scores(site, view) for site in sites])
        print(f"  {method:8}{view:10}{mean:.2f} ({low:.2f} to {high:.2f})", flush=True)
