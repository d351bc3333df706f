"""A model as a MONAI bundle: a folder that outlines regions in files of images with MONAI alone."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedseg.common.files import write_atomic
from fedseg.datamodules import MultiCenterDataModule
from fedseg.launch.exports import bundle_steps
from fedseg.launch.exports.card import LIMITS, Card, outputs
from fedseg.reporting.folder import file_name

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
"""Against which MONAI's own command checks metadata; nothing here reads it."""
STEPS = "scripts.steps"
COMMAND = "python -m monai.bundle run --config_file configs/inference.json --dataset_dir IMAGES --output_dir MASKS"
GUIDE = f"""# {{name}} as a MONAI bundle

In this folder, with MONAI, nibabel, Pillow, OpenCV and the package fire (MONAI's command line needs it) installed:

```sh
{COMMAND}
```

IMAGES is a folder of {{files}}. MASKS gets one mask of every region, NAME_REGION, in the size and geometry of its
image. configs/inference.json holds the settings, scripts/steps.py the steps from a file to the network and back. The
card of the model follows.

"""


def reads_plainly(data: MultiCenterDataModule) -> bool:
    """Whether new images are decoded by this suite's readers alone, which a bundle repeats, and not by a data set's."""
    kind, plain = type(data), MultiCenterDataModule
    told = kind.read_new is not plain.read_new and kind.read_new.__module__.startswith("fedseg.")
    return kind.read is plain.read or told  # those of ours that say how new images are read take plain files


def write_bundle(folder: Path, program: Path, card: Card, batch: int) -> None:
    """Write the bundle of one model.

    Args:
        folder: to make, named as the model.
        program: TorchScript of the model.
        card: of the model.
        batch: images that the network sees at a time.
    """
    facts = card.facts()
    for part in ("configs", "models", "scripts", "docs"):
        (folder / part).mkdir(parents=True)
    shutil.copyfile(program, folder / "models" / "model.ts")
    shutil.copyfile(bundle_steps.__file__, folder / "scripts" / "steps.py")
    write_atomic(folder / "scripts" / "__init__.py", "")
    for name, content in (("metadata", _metadata(card, facts)), ("inference", _inference(facts, batch))):
        write_atomic(folder / "configs" / f"{name}.json", json.dumps(content, indent=2) + "\n")
    files = " and ".join(f"NAME_{one}" for one in facts["modalities"]) or "images"
    guide = GUIDE.format(name=card.name, files=f"{files} ({', '.join(bundle_steps.VOLUMES + bundle_steps.PICTURES)})")
    write_atomic(folder / "docs" / "README.md", guide + card.markdown())


def _metadata(card: Card, facts: dict[str, Any]) -> dict[str, Any]:
    regions = ", ".join(facts["regions"])
    packages = ("nibabel", "pillow", "opencv-python-headless")
    return {
        "schema": SCHEMA,
        "version": "1.0.0",
        "changelog": {"1.0.0": f"exported after round {facts['round']} ({facts['checkpoint']})"},
        **{f"{name}_version": version(package) for name, package in _BASIS.items()},
        "required_packages_version": {name: version(name) for name in packages},
        "name": card.name,
        "task": f"Segmentation of {regions}",
        "description": f"{facts['view']} model of {facts['method']}, trained at {', '.join(facts['training_sites'])}",
        "authors": f"the sites {', '.join(facts['training_sites'])}",
        "copyright": facts["terms"],
        "intended_use": " ".join(LIMITS.split()),
        "network_data_format": _data_format(facts),
        "provenance": facts,
    }


_BASIS = {"monai": "monai", "pytorch": "torch", "numpy": "numpy"}


def _data_format(facts: dict[str, Any]) -> dict[str, Any]:
    sides = [facts[side] for side in ("depth", "height", "width") if facts[side] is not None]
    common = {"type": "image", "modality": "n/a", "spatial_shape": sides, "dtype": "float32"}
    common["is_patch_data"] = facts["patches"]
    answers = list(facts["regions"])
    if outputs(facts) > len(answers):
        answers.insert(0, "background")
    pictures = ["grey"] if facts["image_channels"] == 1 else ["red", "green", "blue"]
    own = facts["modalities"] or (pictures if facts["image_channels"] in (1, 3) else [])
    own = own or [f"channel {number}" for number in range(facts["image_channels"])]
    count = facts["neighbours"]
    seen = [f"{name} of slice {k:+d}" if count else name for k in range(-count, count + 1) for name in own]
    return {
        "inputs": {"image": common | _channels(seen) | {"format": "magnitude", "value_range": [0, 1]}},
        "outputs": {
            "pred": common
            | _channels(answers)
            | {"format": "classes", "value_range": [] if facts["patches"] else [0, 1]}
        },
    }


def _channels(names: list[str]) -> dict[str, Any]:
    return {"num_channels": len(names), "channel_def": {str(place): name for place, name in enumerate(names)}}


def _inference(facts: dict[str, Any], batch: int) -> dict[str, Any]:
    """Settings of every step, in the keys that MONAI knows."""
    window = {
        "_target_": "SlidingWindowInferer",
        "roi_size": [facts[side] for side in ("depth", "height", "width") if facts[side] is not None],
        "sw_batch_size": batch,
        "overlap": facts["overlap"],
        "mode": "gaussian",
    }
    return {
        "imports": ["$import torch"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/images'",
        "output_dir": "$@bundle_root + '/masks'",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": "$torch.jit.load(@bundle_root + '/models/model.ts', map_location=@device).eval()",
        "preprocessing": {"_target_": "Compose", "transforms": _before(facts)},
        "dataset": {
            "_target_": "Dataset",
            "data": _step(
                "cases", folder="@dataset_dir", modalities=facts["modalities"],
                zeros=facts["missing_modalities"] == "zeros", lacks=facts["lacks"],
            ),
            "transform": "@preprocessing",
        },
        "inferer": window if facts["patches"] else {"_target_": "SimpleInferer"},
        "postprocessing": {"_target_": "Compose", "transforms": _after(facts)},
        "evaluator": _step(
            "Outlining", dataset="@dataset", network="@network_def", inferer="@inferer",
            postprocessing="@postprocessing", device="@device", batch=batch,
        ),
        "run": ["$@evaluator.run()"],
    }  # fmt: skip


def _before(facts: dict[str, Any]) -> list[dict[str, Any]]:
    scaling = {name: facts[name] for name in ("intensity", "percentiles", "window", "scale_8bit", "stacked")}
    size = None if facts["patches"] else [facts["height"], facts["width"]]
    luminance, dimensions = facts["colour"] == "luminance", 2 if facts["depth"] is None else 3
    return [
        _step("Read", axis=facts["axis"], canonical=facts["canonical"], spacing=facts["spacing"]),
        _step("Scale", **scaling),
        _step("Fit", size=size, resample=facts["resampled"], luminance=luminance, crop=facts["cropped"]),
        _step(
            "ToInput", channels=facts["image_channels"], neighbours=facts["neighbours"], dimensions=dimensions
        ),
    ]  # fmt: skip


def _after(facts: dict[str, Any]) -> list[dict[str, Any]]:
    regions = [file_name(region) for region in facts["regions"]]
    return [
        _step("Activate", activation=facts["activation"] if facts["patches"] else "none"),
        _step("ToOwnGrid"),
        _step("Decide", exclusive=facts["activation"] == "softmax"),
        _step("Write", folder="@output_dir", regions=regions, canonical=facts["canonical"]),
    ]


def _step(name: str, **settings: Any) -> dict[str, Any]:
    return {"_target_": f"{STEPS}.{name}", **settings}
