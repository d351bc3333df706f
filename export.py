"""A run's models for use elsewhere: `python export.py RUN --out DIR`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

DESCRIPTION = """Write the global model and each site's own: NAME.safetensors (weights), NAME.pt (TorchScript, runs
without this suite), NAME.ckpt (a checkpoint for Lightning) and NAME.md (a card: regions, input, training sites, scores,
terms, limits). With --onnx each is also NAME.onnx; with --bundle also a MONAI bundle, the folder NAME: from files of
images to masks with MONAI alone.

docs/prediction.md says more."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python export.py", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("run", type=Path, help="the run's folder")
    made.add_argument("--out", type=Path, required=True, help="a new folder")
    made.add_argument(
        "--site",
        action="append",
        default=[],
        help="of the sites' own models only this one's, beside the global one; can be repeated",
    )
    made.add_argument(
        "--images",
        type=Path,
        help="of a place that took no part, a folder or one image: also the global model with their normalisation "
        "statistics, estimated without labels",
    )
    made.add_argument(
        "--checkpoint", choices=("best", "last"), default="best", help="best models on validation (default), or last"
    )
    made.add_argument("--terms", help="under which terms the models may be used, for their cards")
    made.add_argument("--bundle", action="store_true", help="also write each model as a MONAI bundle, a folder")
    made.add_argument("--onnx", action="store_true", help="also write each model as ONNX, for other runtimes")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    from fedseg.launch.command import guarded

    return guarded(run, arguments)


def run(arguments: Sequence[str]) -> None:
    """Export, and say what was written."""
    options = parser().parse_args(arguments)

    from fedseg.launch.export import export_models

    found = export_models(
        options.run,
        options.out,
        sites=options.site,
        images=options.images,
        checkpoint=options.checkpoint,
        terms=options.terms,
        bundle=options.bundle,
        onnx=options.onnx,
    )
    for model in found:
        whose = f"site {model.site}'s own model" if model.site else "the global model"
        whose += f" with the statistics of {options.images}" if model.view == "own-statistics" else ""
        print(f"{options.out / model.name}.{{safetensors,pt,ckpt,md}}: {whose}, round {model.round}")
        if options.onnx:
            print(f"{options.out / model.name}.onnx: the same for ONNX Runtime and others that read ONNX")
        if options.bundle:
            print(f"{options.out / model.name}/: the same as a MONAI bundle; its docs/README.md says how it runs")
    print(f"exported programs answer as the models do: they differ by {max(m.gap for m in found):.1g} at most")


if __name__ == "__main__":
    sys.exit(main())
