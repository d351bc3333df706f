"""Hostile sites against rules of combination: `python -m benchmarks.hostile FIGURE.png [KEY=VALUE ...]`.

Of seven hospitals of the phantom two are hostile. For every attack and rule FedAvg is trained anew; the table holds the
mean test Dice of the five honest sites, and how many of the hostile ones an event named; the figure one honest case.
`algorithm=medisecfed` takes another method, `attacks=none,label_flip` and `rules=mean,median` some of the table.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pandas as pd
import torch
from matplotlib.figure import Figure

from fedseg.algorithms import Algorithm
from fedseg.algorithms.medisecfed import ANSWERS
from fedseg.common.seeds import derive_seed
from fedseg.configs.compose import compose
from fedseg.datamodules import SiteData
from fedseg.federation.checkpoint import Checkpoint
from fedseg.federation.combine import Rule
from fedseg.federation.contract import Batch, Row, Silent, Task
from fedseg.federation.state import State, Tensors, Update
from fedseg.federation.transport import InProcess
from fedseg.launch.experiment import Experiment
from fedseg.launch.scores.scoring import Painter, Scorer
from fedseg.launch.settings import SCHEMA
from fedseg.reporting.overlays import Picture, draw_framed, window

HOSTILE = 2
COMMON = ["algorithm=fedavg", "data.n_sites=7", "data.size=48", "data.resolution=96", "data.cases_per_site=24"]
COMMON += ["federation.rounds=12", "federation.local_steps=8", "federation.evaluate_every=12"]
COMMON += ["federation.checkpoint_every=12", f"federation.hostile={HOSTILE}"]
COMMON += ["trainer.threads=1", "evaluation.metrics=[dice]"]
ON_UPDATES = ("sign_flip", "scaling", "noise", "collusion")
ON_LABELS = ("label_flip", "constant_mask")
ATTACKS = ("none", *ON_UPDATES, *ON_LABELS)


class Hostile(InProcess[Algorithm, SiteData]):
    """Some sites send something else than what they learnt.

    Attributes:
        attack: sign_flip sends the update the wrong way round; scaling ten times of it; noise a Gaussian with its
            norm; collusion lets all hostile sites send the same Gaussian, with three times the norm. Of answers,
            sign_flip sends 1 - p, noise uniform numbers, and collusion the same ones from all hostile sites.
        hostile: who.
    """

    attack = "none"
    hostile: Sequence[str] = ()

    def ask(self, tasks: Mapping[str, Task], messages: Mapping[str, State]) -> Iterator[Update]:
        """As the transport does, with false updates."""
        for update in super().ask(tasks, messages):
            if update.site in self.hostile and tasks[update.site].kind == "train" and self.attack in ON_UPDATES:
                yield replace(update, tensors=self._false(update, tasks[update.site]))
            else:
                yield update

    def _false(self, update: Update, task: Task) -> dict[str, Tensors]:
        if ANSWERS in update.tensors:
            return {ANSWERS: {name: self._lie(answers, update, task) for name, answers in update[ANSWERS].items()}}
        return {**update.tensors, "model": self._bent(update["model"], update, task)}

    def _lie(self, answers: torch.Tensor, update: Update, task: Task) -> torch.Tensor:
        """Other probabilities; ten times some are none, which a server refuses."""
        if self.attack in ("sign_flip", "scaling"):
            return 1 - answers if self.attack == "sign_flip" else 10 * answers
        return torch.rand(answers.shape, generator=self._draws(update, task))

    def _draws(self, update: Update, task: Task) -> torch.Generator:
        who = "all" if self.attack == "collusion" else update.site
        return torch.Generator().manual_seed(derive_seed(task.seed, self.attack, task.round, who))

    def _bent(self, learnt: Tensors, update: Update, task: Task) -> Tensors:
        if self.attack in ("sign_flip", "scaling"):
            factor = -1.0 if self.attack == "sign_flip" else 10.0
            return {name: factor * tensor for name, tensor in learnt.items()}
        generator = self._draws(update, task)
        noise = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in learnt.items()}
        norms = [sum(float(t.square().sum()) for t in ts.values()) ** 0.5 for ts in (learnt, noise)]
        factor = norms[0] / norms[1] * (3 if self.attack == "collusion" else 1)
        return {name: factor * tensor for name, tensor in noise.items()}


class FalseLabels:
    """A site whose training masks are inverted, or mark everything.

    Args:
        site: the site.
        attack: label_flip or constant_mask.
    """

    def __init__(self, site: Any, attack: str) -> None:
        self._site, self._attack = site, attack

    def __getattr__(self, name: str) -> Any:
        return getattr(self._site, name)

    def at(self, round: int) -> FalseLabels:
        """The site as it is in a round, as false."""
        return type(self)(self._site.at(round), self._attack)

    def train_batches(self, seed: int, steps: int) -> Iterable[Batch]:
        """The site's batches, with other masks."""
        return FalseBatches(self._site.train_batches(seed, steps), self._attack)


class FalseBatches:
    """Batches with other masks.

    Args:
        batches: the true ones.
        attack: label_flip or constant_mask.
    """

    def __init__(self, batches: Any, attack: str) -> None:
        self._batches, self._attack = batches, attack

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches:
            mask = batch["mask"]
            yield {**batch, "mask": 1 - mask if self._attack == "label_flip" else torch.ones_like(mask)}


class Listening(Silent):
    """An observer that keeps the names of sites that were far off, or refused."""

    def __init__(self) -> None:
        self.named: set[str] = set()

    def round_done(self, record: Any) -> None:
        """Note the events."""
        rows: list[Row] = record.events
        self.named |= {row["site"] for row in rows if row["event"] in ("far", "refused")}


class Outcome(NamedTuple):
    """What one training came to.

    Attributes:
        dice: mean test Dice of the honest sites after the last round.
        named: how many hostile sites an event named.
        picture: the first test case of the first honest site.
    """

    dice: float
    named: int
    picture: Picture


def trained(attack: str, rule: Rule, more: Sequence[str]) -> Outcome:
    """Train under an attack, and look at the honest sites."""
    experiment = Experiment(compose([*COMMON, f"federation.combine={rule}", *more], SCHEMA))
    experiment.data.setup()
    hostile = experiment.data.sites[-HOSTILE:]
    sites: dict[str, Any] = dict(experiment.sites())
    if attack in ON_LABELS:
        sites |= {name: FalseLabels(sites[name], attack) for name in hostile}
    scorer = Scorer(experiment)
    way = Hostile(experiment.algorithm(), sites, experiment.compute, scorer, ())
    way.attack, way.hostile = attack, hostile
    observer = Listening()
    with tempfile.TemporaryDirectory() as folder:
        federation = experiment.federation_over(way, experiment.data.sites, Checkpoint(Path(folder)), observer)
        server = federation.run()
        honest = [site for site in experiment.data.sites if site not in hostile]
        found = federation.evaluate(server, experiment.schedule.rounds, honest, ("test",))
        site = sites[honest[0]]
        case = site.cases("test")[0].case
        painter = Painter(experiment.data.regions, {site.name: [case]}, experiment.evaluation)
        painted = federation.over(way.scored_by(painter))
        painted.evaluate(server, experiment.schedule.rounds, honest[:1], ("test",))
    view = experiment.declared.own_view
    scores = [update.scalars[f"test/{view}/dice"] for update in found.values()]
    rows = [row for update in found.values() for row in update.rows]
    picture = painter.picture(site, case, pd.DataFrame(rows), checkpoint="last")
    return Outcome(sum(scores) / len(scores), len(observer.named & set(hostile)), picture)


def draw(outcomes: Mapping[tuple[str, str], Outcome], path: Path) -> None:
    """One honest case under every attack (rows) and rule (columns)."""
    attacks, rules = (list(dict.fromkeys(key[place] for key in outcomes)) for place in (0, 1))
    figure = Figure(figsize=(1.55 * len(rules), 2.2 * len(attacks) + 0.5), layout="constrained")
    axes = figure.subplots(len(attacks), len(rules), squeeze=False)
    reference = outcomes[attacks[0], rules[0]].picture
    for (row, attack), (column, rule) in product(enumerate(attacks), enumerate(rules)):
        outcome, axis = outcomes[attack, rule], axes[row][column]
        draw_framed(axis, outcome.picture, (), 0, window(reference, 0), f"{attack}\n{rule}\n{100 * outcome.dice:.1f}")
    figure.suptitle(
        "Mean test Dice of five honest sites, two of seven being hostile; white: truth, dashed blue: the model",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)


def main(words: Sequence[str]) -> None:
    """Print the table, a line for each attack, and draw the figure."""
    path, attacks, more = Path(words[0]), _chosen("attacks", ATTACKS, words), words[1:]
    rules: list[Rule] = _chosen("rules", get_args(Rule), words)
    more = [word for word in more if not word.startswith(("attacks=", "rules="))]
    outcomes: dict[tuple[str, str], Outcome] = {}
    print("| attack | " + " | ".join(f"`{rule}`" for rule in rules) + " |\n|---|" + "---:|" * len(rules), flush=True)
    for attack in attacks:
        print(f"| {attack} |", end="", flush=True)
        for rule in rules:
            outcomes[attack, rule] = outcome = trained(attack, rule, more)
            print(f" {100 * outcome.dice:.1f} ({outcome.named}) |", end="", flush=True)
        print(flush=True)
    draw(outcomes, path)


def _chosen(what: str, there: Sequence[Any], words: Sequence[str]) -> list[Any]:
    """Some of what there is, as ``what=A,B`` says, else all of it."""
    told = [word.partition("=")[2].split(",") for word in words if word.startswith(f"{what}=")]
    if odd := [name for name in (told[-1] if told else ()) if name not in there]:
        sys.exit(f"{what}: no {odd[0]!r}; there are {', '.join(there)}")
    return list(told[-1] if told else there)


if __name__ == "__main__":
    if len(sys.argv) < 2 or "=" in sys.argv[1]:
        sys.exit(f"the first word names the figure\n\n{__doc__}")
    main(sys.argv[1:])
