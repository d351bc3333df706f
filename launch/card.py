"""What a user must know of an exported model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from evaluation import METRICS
from launch.saved import Chosen, SavedModels
from reporting.summary import Table, site_scores

UNKNOWN = "not stated by whoever exported this model; ask the sites that trained it before using it"
LIMITS = """Research software: not a medical device, and not cleared for diagnosis or treatment. The scores above were
measured on held-out cases of the sites named there; other scanners, protocols, patients and annotation habits may give
worse ones. Check a sample of outlines by eye before relying on any number derived from them."""


@dataclass(frozen=True)
class Card:
    """The description of one model.

    Attributes:
        models: of the run.
        view: global or personal.
        site: whose it is; None for the global one.
        checkpoint: which saved model.
        name: of its files.
        terms: under which it may be used; None if nobody said.
    """

    models: SavedModels
    view: str
    site: str | None
    checkpoint: Chosen
    name: str
    terms: str | None

    def facts(self) -> dict[str, Any]:
        """What a program can read, also stored in the safetensors file."""
        config, data = self.models.run.experiment.config, self.models.run.experiment.data
        return {
            "view": self.view,
            "site": self.site or "",
            "method": str(config.algorithm.preset),
            "round": self.models.round(self.view, self.site, self.checkpoint),
            "checkpoint": self.checkpoint,
            "seed": int(config.seed),
            "regions": {name: list(ids) for name, ids in data.regions.labels.items()},
            "activation": data.regions.activation,
            "normalisation": str(config.training.normalize),
            "channels": self.models.channels,
            "height": data.size[0],
            "width": data.size[1],
            "network": OmegaConf.to_container(config.model),
            "training_sites": sorted(self.models.trained),
            "terms": self.terms or UNKNOWN,
        }

    def markdown(self) -> str:
        """The card to read."""
        facts = self.facts()
        whose = f"own model of site {self.site}" if self.site else "global model"
        parts = [
            f"# {self.name}: {whose}",
            _listed(
                {
                    "outlines": ", ".join(facts["regions"]),
                    "method": f"`{facts['method']}`: {_first_line(self.models.method)}",
                    "saved": f"after round {facts['round']} ({self.checkpoint}), seed {facts['seed']}",
                    "network": f"{facts['network']['architecture']}, encoder {facts['network']['encoder']}",
                    "terms": facts["terms"],
                }
            ),
            "## Input and output",
            _listed(self._interface(facts)),
            "## Load it without the suite that trained it",
            f"```python\n{self.snippet(facts)}```",
            f"`{self.name}.safetensors` holds the weights alone, under the network's own names, with these facts.",
            "## Trained on",
            self._training(),
            "## Scores on held-out test cases",
            self._scores(),
            "## Intended use and limits",
            f"Outlining {', '.join(facts['regions'])} in images like those of {self._audience()}, to study "
            f"personalised federated learning.\n\n{LIMITS}",
        ]
        return "\n\n".join(parts) + "\n"

    def snippet(self, facts: dict[str, Any]) -> str:
        """Five lines of Python that outline the regions."""
        shape = f"{facts['channels']}, {facts['height']}, {facts['width']}"
        lines = [
            "import torch",
            f'model = torch.jit.load("{self.name}.pt")',
            f"images = torch.rand(1, {shape})  # yours instead: values from 0 to 1, resized to this height and width",
            f"chances = model(images)  # one map per region: {', '.join(facts['regions'])}",
        ]
        if facts["activation"] == "sigmoid":
            lines.append("masks = chances > 0.5")
        else:
            lines.append(
                "labels = torch.cat([1 - chances.sum(1, keepdim=True), chances], 1).argmax(1)  # 0 is the background"
            )
        return "\n".join(lines) + "\n"

    def _interface(self, facts: dict[str, Any]) -> dict[str, str]:
        data = self.models.run.experiment.data
        reading = data.reading
        low, high = reading.percentiles
        rules = {
            "percentile": f"percentiles {low:g} and {high:g} of an image or volume",
            "minmax": "smallest and largest value of an image or volume",
            "window": f"{reading.window}",
            "unit": "0 and 1, as stored",
        }
        neighbours = f", of {data.neighbours} neighbouring slice(s) on either side" if data.neighbours else ""
        kind = "nested or overlapping regions" if facts["activation"] == "sigmoid" else "exclusive regions"
        return {
            "images": f"(B, {facts['channels']}, {facts['height']}, {facts['width']}) float32 in [0, 1]{neighbours}; "
            "resized by area when shrinking, else linearly",
            "intensity": f"8-bit values are divided by 255; of others, 0 and 1 are: {rules[reading.intensity]}",
            "normalisation": f"{facts['normalisation']}, inside of the program",
            "answer": f"(B, {len(facts['regions'])}, {facts['height']}, {facts['width']}) probabilities of "
            f"{', '.join(facts['regions'])} ({facts['activation']}, {kind})",
            "size": "the program is made for this height and width; the number of images in a batch is free",
        }

    def _training(self) -> str:
        splits = self.models.run.folder.splits()
        used = splits[(splits["split"] == "train") & splits["labelled"]]
        counts = used.groupby("site").agg(cases=("case", "nunique"), patients=("patient", "nunique"))
        rows = tuple((str(site), str(row["cases"]), str(row["patients"])) for site, row in counts.iterrows())
        data = self.models.run.experiment.config.data
        shares = self.models.method.parts.parameters or self.models.method.parts.buffers
        note = "" if shares else "This model saw its own site's cases only; nothing was shared.\n\n"
        return f"{note}Data set `{data.preset}`.\n\n" + Table(("site", "cases", "patients"), rows).markdown()

    def _scores(self) -> str:
        scores = self.models.run.folder.scores()
        rows = scores[
            (scores["checkpoint"] == self.checkpoint) & (scores["split"] == "test") & (scores["view"] == self.view)
        ]
        if self.site is not None:
            rows = rows[rows["site"] == self.site]
        if rows.empty:
            return "None: the run was not finished."
        metrics = [name for name in METRICS if (rows["metric"] == name).any()]
        tables = [_score_table(rows[rows["region"] == region], region, metrics) for region in rows["region"].unique()]
        unseen = sorted(set(rows.loc[~rows["seen"], "site"]))
        note = f"\n\nTook no part in training: {', '.join(unseen)}." if unseen else ""
        return "Means over cases; definitions in the suite's docs/metrics.md.\n\n" + "\n\n".join(tables) + note

    def _audience(self) -> str:
        return f"site {self.site}" if self.site else f"the sites {', '.join(sorted(self.models.trained))}"


def _score_table(rows: pd.DataFrame, region: str, metrics: Sequence[str]) -> str:
    means = site_scores(rows)
    body = []
    for site, group in means.groupby("site"):
        values = group.set_index("metric")["mean"]
        body.append((str(site), str(int(group["cases"].max())), *(f"{values[name]:.4g}" for name in metrics)))
    return Table((region, "cases", *metrics), tuple(body)).markdown().rstrip("\n")


def _listed(facts: dict[str, str]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())


def _first_line(method: object) -> str:
    return (type(method).__doc__ or "").strip().partition("\n")[0]
