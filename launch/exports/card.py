"""What a user must know of an exported model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from fedseg.configs.compose import ConfigError
from fedseg.configs.help import first_line
from fedseg.datamodules.new import missing_modalities, stacks
from fedseg.evaluation import METRICS
from fedseg.launch.folders.saved import NEW, Chosen, SavedModels
from fedseg.launch.networks import network_of
from fedseg.launch.run import saved_config
from fedseg.launch.settings import METHODS
from fedseg.reporting import ReportingError
from fedseg.reporting.folder import RunFolder
from fedseg.reporting.summary import Table, site_scores
from fedseg.reporting.units import EXPLAINED, in_common, stated, titled

UNKNOWN = "not stated by whoever exported this model; ask the sites that trained it before using it"
LIMITS = """Research software: not a medical device, and not cleared for diagnosis or treatment. The scores above were
measured on held-out cases of the sites named there; other scanners, protocols, patients and annotation habits may give
worse ones. Check a sample of outlines by eye before relying on any number derived from them."""
CUTS: dict[Any, str] = {
    "auto": "of the thickest voxels (at least 1.5 times the others), else z (foot to head)",
    0: "0 (sagittal: rows run from head to foot, columns from front to back, slices to the patient's left)",
    1: "1 (coronal: rows run from head to foot, columns to the patient's left, slices from front to back)",
    2: "2 (axial: rows run from front to back, columns to the patient's left, slices from foot to head)",
}
"""Of volumes in the common orientation."""


@dataclass(frozen=True)
class Card:
    """The description of one model.

    Attributes:
        models: of the run.
        view: global, personal or own-statistics.
        site: whose it is; None for the global one.
        checkpoint: which saved model.
        name: of its files.
        terms: under which it may be used; None if nobody said.
        images: so many of another place gave it their normalisation statistics; 0 where it keeps those of training.
    """

    models: SavedModels
    view: str
    site: str | None
    checkpoint: Chosen
    name: str
    terms: str | None
    images: int = 0

    def facts(self) -> dict[str, Any]:
        """What a program can read, also stored in the safetensors file."""
        config, data = self.models.run.experiment.config, self.models.run.experiment.data
        network = network_of(config, self.site if self.view == "personal" else None)
        reading = data.reading if self.site is None else data.reading_of(self.site)
        return {
            "view": self.view,
            "site": self.site or "",
            "method": str(config.algorithm.preset),
            "round": self.models.round(self.view, self.site, self.checkpoint),
            "checkpoint": self.checkpoint,
            "seed": int(config.seed),
            "regions": {name: list(ids) for name, ids in data.regions.labels.items()},
            "activation": data.regions.activation,
            "axis": reading.axis,
            "canonical": reading.canonical,
            "intensity": reading.intensity,
            "percentiles": list(reading.percentiles) if reading.intensity == "percentile" else None,
            "window": list(reading.window) if reading.intensity == "window" and reading.window else None,
            "scale_8bit": reading.scale_8bit,
            "spacing": list(reading.spacing) if reading.spacing else None,
            "modalities": list(data.modalities_of(self.site or NEW)),
            "missing_modalities": missing_modalities(data),
            "lacks": list(data.lacking_here(self.site or NEW)),
            "absent": str(config.training.absent),
            "stacked": stacks(data),
            "training_values": self.models.values,
            "colour": "luminance" if data.channels == 1 else "as stored",
            "image_channels": self.models.channels // (2 * data.neighbours + 1),
            "neighbours": data.neighbours,
            "channels": self.models.channels,
            "height": data.size[-2],
            "width": data.size[-1],
            "depth": data.size[0] if data.dimensions == 3 else None,
            "patches": data.patches is not None,
            "resampled": list(data.fitting.spacing) if data.fitting.spacing else None,
            "cropped": data.fitting.crop is not None,
            "overlap": float(config.evaluation.overlap),
            "normalisation": str(config.training.normalize),
            "prepared": self.models.method.prepares,
            "running_statistics": f"of {self.images} image(s) of another place" if self.images else "of training",
            "network": OmegaConf.to_container(network),
            "encoder": encoder_origin(config, network),
            "training_sites": self._sites(),
            "terms": " ".join((self.terms or UNKNOWN).split()),
        }

    def markdown(self) -> str:
        """The card to read."""
        facts = self.facts()
        whose = f"own model of site {self.site}" if self.site else "global model"
        whose += f" with running statistics {facts['running_statistics']}" if self.images else ""
        parts = [
            f"# {self.name}: {whose}",
            _listed(
                {
                    "outlines": ", ".join(facts["regions"]),
                    "method": f"`{facts['method']}`: {first_line(type(self.models.method))}",
                    "saved": f"after round {facts['round']} ({self.checkpoint}), seed {facts['seed']}",
                    "network": _network(facts["network"]),
                    "encoder began with": facts["encoder"],
                    "terms": facts["terms"],
                }
            ),
            "## Input and output",
            _listed(_interface(facts)),
            "## From a file to the input, and back",
            _numbered(_steps(facts)),
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
        """A few lines of Python that outline the regions."""
        shape = f"{facts['channels']}, {_sides(facts)}"
        answer, activate = "model(images)", {"sigmoid": ".sigmoid()", "softmax": ".softmax(1)[:, 1:]"}
        if facts["patches"]:
            shape = ", ".join([str(facts["channels"]), *(["80"] if facts["depth"] else []), "100", "120"])  # any size
            window = f"({_sides(facts)}), 4, model, {facts['overlap']:g}"
            answer = f'sliding_window_inference(images, {window}, mode="gaussian"){activate[facts["activation"]]}'
        lines = [
            "import torch",
            *(["from monai.inferers import sliding_window_inference"] if facts["patches"] else []),
            f'model = torch.jit.load("{self.name}.pt")',
            f"images = torch.rand(1, {shape})  # yours instead, prepared as the six steps above say",
            f"chances = {answer}  # one map per region: {', '.join(facts['regions'])}",
        ]
        if facts["activation"] == "sigmoid":
            lines.append("masks = chances > 0.5")
        else:
            lines.append(
                "labels = torch.cat([1 - chances.sum(1, keepdim=True), chances], 1).argmax(1)  # 0 is the background"
            )
        return "\n".join(lines) + "\n"

    def _sites(self) -> list[str]:
        """Whose cases the model learnt from."""
        return sorted(self.models.trained) if self.models.method.shares or self.site is None else [self.site]

    def _training(self) -> str:
        sites, config = self._sites(), self.models.run.experiment.config.data
        splits = self.models.run.folder.splits()
        used = splits[self.models.taught & splits["site"].isin(sites)]
        kinds = {"cases": ("case", "nunique"), "patients": ("patient", "nunique")}
        if self.models.method.learns_unlabelled:
            kinds["labelled cases"] = ("labelled", "sum")
        counts = used.groupby("site").agg(**kinds)
        rows = tuple((str(site), *(str(int(row[kind])) for kind in kinds)) for site, row in counts.iterrows())
        alone = sites == [self.site] and len(self.models.trained) > 1
        note = "This model saw its own site's cases only; nothing was shared.\n\n" if alone else ""
        source = f"Data set `{config.preset}`"
        if config.preset == "folder":
            source = (
                f"Table `{Path(config.manifest).name}`" if config.manifest else f"Folder `{Path(config.root).name}`"
            )
        return f"{note}{source}.\n\n" + Table(("site", *kinds), rows).markdown()

    def _scores(self) -> str:
        scores = self.models.run.folder.scores()
        if scores.empty:
            return "Missing: the run's folder has no scores (metrics.csv)."
        rows = scores[
            (scores["checkpoint"] == self.checkpoint) & (scores["split"] == "test") & (scores["view"] == self.view)
        ]
        if self.site is not None:
            rows = rows[rows["site"] == self.site]
        if rows.empty and self.images:
            return "None: the run scored no such model; it does so at sites that are held out (data.unseen)."
        if rows.empty:
            return "None: the run was stopped before it scored these models."
        metrics = [name for name in METRICS if (rows["metric"] == name).any()]
        tables = [_score_table(rows[rows["region"] == region], region, metrics) for region in rows["region"].unique()]
        unseen = sorted(set(rows.loc[~rows["seen"], "site"]))
        note = f"\n\nTook no part in training: {', '.join(unseen)}." if unseen else ""
        each = "Each case" if self.models.anew(self.view) else "Each"
        note += f" {each} was scored with the running statistics of its own images." if self.images else ""
        grid = EXPLAINED.get(in_common(rows["grid"]), "")
        return f"Means over cases; definitions in the suite's docs/metrics.md. {grid}\n\n" + "\n\n".join(tables) + note

    def _audience(self) -> str:
        return f"site {self.site}" if self.site else f"the sites {', '.join(self._sites())}"


def _network(settings: Mapping[str, Any]) -> str:
    """In a line; a network from outside says what it is called and set to."""
    if "architecture" in settings:
        return f"{settings['architecture']}, " + (
            f"encoder {settings['encoder']}" if "encoder" in settings else f"width {settings['width']}"
        )
    own = {key: value for key, value in settings.items() if key not in ("name", "preset")}
    return str(settings["name"]) + "".join(f", {key} {value}" for key, value in own.items())


def encoder_origin(config: DictConfig, network: DictConfig) -> str:
    """Where the first weights of a network's encoder came from."""
    if not config.pretrained:
        weights = network.get("encoder_weights")
        return "random weights" if weights is None else f"the weights in {weights} (model.encoder_weights)"
    folder = RunFolder(config.pretrained)
    try:
        earlier, splits = saved_config(folder), folder.splits()
    except (ConfigError, ReportingError, OSError):
        splits = pd.DataFrame()
    if splits.empty:
        return f"the encoder of the run {config.pretrained}, which is no longer there to say what it learnt from"
    learnt = (splits["split"] == "train") & splits["seen"]
    method = METHODS[earlier.algorithm.name]
    if getattr(method, "labelled", True) and not getattr(method, "learns_unlabelled", False):
        learnt &= splits["labelled"]
    sites = ", ".join(sorted({str(site) for site in splits.loc[learnt, "site"]}))
    return (
        f"the encoder of the run {config.pretrained} (`{earlier.algorithm.preset}`, images of {sites}), which began "
        f"with {encoder_origin(earlier, earlier.model)}"
    )


def _interface(facts: dict[str, Any]) -> dict[str, str]:
    size, regions = _sides(facts), facts["regions"]
    given = [facts["prepared"]] if facts["prepared"] else []
    given += [facts["normalisation"]] if facts["normalisation"] != "none" or not given else []
    given += ["a channel that is 0 everywhere stays 0"] if facts["absent"] == "zero" else []
    kind = "nested or overlapping regions" if facts["activation"] == "sigmoid" else "exclusive regions"
    answer = f"probabilities, by {facts['activation']},"
    if facts["patches"]:
        answer = f"scores before {facts['activation']}{', the background first,' * (facts['activation'] == 'softmax')}"
    return {
        "images": f"(B, {facts['channels']}, {size}) float32 in [0, 1]",
        "normalisation": f"{', then '.join(given)}, inside of the program",
        "answer": f"(B, {outputs(facts)}, {size}) {answer} of {', '.join(regions)} ({kind})",
        "size": "the program is made for these sides; the number of images in a batch is free",
    }


def outputs(facts: Mapping[str, Any]) -> int:
    """Channels of the program's answer: probabilities of regions, or of patches the scores that make them."""
    return len(facts["regions"]) + int(facts["patches"] and facts["activation"] == "softmax")


def _steps(facts: dict[str, Any]) -> list[str]:
    """What datamodules does to a file before the network sees it, in its order, and to the answer."""
    whole = "a patient's stack of slices (never of one slice alone)" if facts["stacked"] else "the image or volume"
    some = f"of all values of {whole}, all slices together; channels of a picture together, of a volume each by itself"
    low, high = facts["percentiles"] or facts["window"] or (0, 1)
    limits = {
        "percentile": f"the percentiles {low:g} and {high:g} {some} (smallest and largest where these coincide)",
        "minmax": f"the smallest and the largest {some}",
        "window": f"{low:g} and {high:g}",
        "zscore": f"4 standard deviations below and above the mean {some.replace('all values', 'all values but 0')}",
    }
    rule = f"v becomes (v - low) / (high - low), clipped to [0, 1]; low and high are {limits.get(facts['intensity'])}"
    rule += "; 0 stays 0" if facts["intensity"] == "zscore" else ""
    if facts["intensity"] == "unit":
        rule = "they are in [0, 1] already"
    stay = not facts["scale_8bit"] or facts["intensity"] == "unit"
    eight = "8-bit values stay as they are until step 5. Of all others " if stay else "of all values, 8-bit ones too, "
    seen = {"uint8": "8-bit", "float32": "not 8-bit"}
    told = " and ".join(seen.get(kind, kind) for kind in facts["training_values"])
    cut = (
        f"turned to the orientation left, back, head (LPS), then cut along axis {CUTS[facts['axis']]}"
        if facts["canonical"]
        else f"cut along axis {facts['axis']} as stored; of the other two axes the earlier one gives the rows"
    )
    repeated = f"; a grey image is repeated in all {facts['image_channels']}" if facts["image_channels"] == 3 else ""
    colour = "as stored, without transparency" + repeated
    if facts["modalities"]:
        colour = f"the modalities {', '.join(facts['modalities'])} are the channels, in this order"
        colour += "; one that a case lacks is 0 everywhere" * (facts["missing_modalities"] == "zeros")
        if facts["lacks"]:
            colour += f"; the site has no {', '.join(facts['lacks'])}, which is 0 everywhere"
    if facts["colour"] == "luminance":
        colour = "red, green and blue become luminance, 0.299 R + 0.587 G + 0.114 B (8-bit values are rounded)"
    count = facts["neighbours"]
    slices = "every slice by itself"
    if count:
        slices = (
            f"slices k - {count} to k + {count}, in this order, each with all its channels, are the input for slice "
            "k; beyond an end the volume's last slice on that side is repeated"
        )
    threshold = "masks are what lies above 0.5"
    if facts["activation"] == "softmax":
        threshold = "each pixel goes to the most probable of background (1 minus the sum) and regions"
    return [
        f"Orientation: a volume is {cut}. Flat images stay as stored.",
        f"Intensity, at full size: {eight}{rule}." + (f" Images of training were {told}." if told else ""),
        f"Colour: {colour}.",
        f"Size: {_sizing(facts)}.",
        f"Input: {slices if facts['depth'] is None else 'the volume'}. 8-bit values are divided by 255."
        + (_windows(facts) if facts["patches"] else ""),
        f"Back: the probabilities are {_returning(facts)}. There, {threshold}; slices go back to where step 1 took "
        "them.",
    ]


def _sides(facts: Mapping[str, Any]) -> str:
    return ", ".join(str(facts[side]) for side in ("depth", "height", "width") if facts[side] is not None)


def _sizing(facts: Mapping[str, Any]) -> str:
    if not facts["patches"]:
        return (
            f"every slice is resized to {facts['height']} x {facts['width']}, whatever its aspect: by area where that "
            "means fewer pixels (OpenCV's INTER_AREA), else linearly (INTER_LINEAR); 8-bit values are rounded"
        )
    cut = "every image is cut to the box of what is not 0 in some channel; then " * facts["cropped"]
    if facts["resampled"] is None:
        return f"{cut}every image keeps its own grid"
    lengths = " x ".join(f"{length:g}" if length else "its own" for length in facts["resampled"])
    return (
        f"{cut}every image is brought to voxels of {lengths} mm (slice, row, column; sides rounded to whole voxels): "
        "along axes that become shorter by area, then along the others linearly; 8-bit values are rounded"
    )


def _windows(facts: Mapping[str, Any]) -> str:
    return (
        f" The program slides over it as a window of ({_sides(facts)}), in MONAI's sliding_window_inference with "
        f'overlap={facts["overlap"]:g} and mode="gaussian"; what is shorter is padded with 0. Its scores are averaged '
        f"before {facts['activation']} makes probabilities of them."
    )


def _returning(facts: Mapping[str, Any]) -> str:
    if not facts["patches"]:
        return "resized to the image's size by the rule of step 4, in float32"
    back = "on the image's own grid" if facts["resampled"] is None else "brought back to the image's grid as in step 4"
    return f"{back}, and 0 outside of the box" if facts["cropped"] else back


def _score_table(rows: pd.DataFrame, region: str, metrics: Sequence[str]) -> str:
    means = site_scores(rows)
    body = []
    for site, group in means.groupby("site"):
        values = group.set_index("metric")["mean"]
        body.append((str(site), str(int(group["cases"].max())), *(f"{values[name]:.4g}" for name in metrics)))
    units = stated(rows, ["metric"]).set_index("metric")["unit"]
    titles = (titled(metric, units[metric]) for metric in metrics)
    return Table((region, "cases", *titles), tuple(body)).markdown().rstrip("\n")


def _listed(facts: dict[str, str]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())


def _numbered(steps: Sequence[str]) -> str:
    return "\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1))
