"""`python -m fedseg.datamodules.check` without the installation ends in one line, as the other commands do.

Python imports the package before the command; the libraries of the package must be there by then.
"""

import importlib.util
import sys
from pathlib import Path

NEEDED = ("numpy", "torch", "pytorch_lightning", "albumentations", "omegaconf", "pydantic", "yaml", "tqdm", "nibabel")

if sys.argv[:1] == ["-m"]:  # what Python says there until it has found the module to run
    for _library in NEEDED:
        if importlib.util.find_spec(_library) is None:
            print(
                f"error: {_library} is not installed in {sys.executable}; activate the environment of the "
                f"installation, or install: pip install -e {Path(__file__).resolve().parent.parent}",
                file=sys.stderr,
            )
            sys.exit(2)
