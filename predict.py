"""Masks for new images with a model of a run: `python predict.py RUN --site B --images DIR`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

EPILOG = """examples:
  python predict.py runs/ditto --site hospital_b --images new/            hospital_b's own model
  python predict.py runs/ditto --images new/                              the global model
  python predict.py runs/fedavg --images new/ --view own-statistics       the same with these images' statistics
  python predict.py runs/iopfl --images new/ --view adapted               fitted to these images without labels
  python predict.py runs/ditto --site hospital_b --view global --images scan.nii.gz --probabilities

Images are read and prepared as in training (PNG, JPEG, TIFF, NPY, NIfTI, NRRD, DICOM ...); masks have their size
and, of volumes, their geometry and format. docs/prediction.md explains what is written."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python predict.py",
        description="Outline the regions of a run in new images.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("run", type=Path, help="the run's folder")
    made.add_argument(
        "settings", nargs="*", help="of this machine: trainer.accelerator=cpu, trainer.threads=N; or data.root=DIR"
    )
    made.add_argument("--images", type=Path, required=True, help="a folder of images, or one image")
    made.add_argument("--site", help="the site that the images come from; without it a site that took no part")
    made.add_argument(
        "--view",
        choices=("personal", "global", "adapted", "own-statistics", "entropy"),
        help="which model; without it the site's own where there is one, else the global one",
    )
    made.add_argument(
        "--checkpoint", choices=("best", "last"), default="best", help="the best model on validation (default), or last"
    )
    made.add_argument("--out", type=Path, default=Path("predictions"), help="a new folder (default: predictions)")
    made.add_argument("--probabilities", action="store_true", help="write probabilities too")
    made.add_argument("--codes", type=Path, help="YAML that codes regions, for segmentations in DICOM")
    made.add_argument(
        "--overlay", action=argparse.BooleanOptionalAction, default=True, help="a picture of each image with contours"
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    from fedseg.launch.command import guarded

    return guarded(run, arguments)


def run(arguments: Sequence[str]) -> None:
    """Predict, and say what was written."""
    options = parser().parse_intermixed_args(arguments)

    from fedseg.launch.prediction import SIZES, PredictionRequest, predict_folder

    predict_folder(PredictionRequest(**vars(options)))
    written = ["masks/", *(["probabilities/"] * options.probabilities), *(["overlays/"] * options.overlay), SIZES]
    print(f"{options.out}: {', '.join(written)}")


if __name__ == "__main__":
    sys.exit(main())
