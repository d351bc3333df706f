"""Personalised federated learning for multi-centre medical image segmentation, under one name.

An installed package holds all its parts. In a checkout they are the folders beside this one (the links here are for
tools that read without running); there `import models` works as well as `import fedseg.models`, and is the same module.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

_ROOT = Path(__file__).resolve().parent.parent
_CHECKOUT = (_ROOT / "pyproject.toml").is_file()
if _CHECKOUT:
    __path__.insert(0, str(_ROOT))


# Flower reads it once, when the first of our parts imports it
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

NEEDED = ("numpy", "torch", "pytorch_lightning", "albumentations", "omegaconf", "pydantic", "yaml", "tqdm", "nibabel")


def missing(library: str) -> str:
    """What to do about a library that this Python lacks."""
    return (
        f"{library} is not installed in {sys.executable}; activate the environment of the installation, or install: "
        f"pip install -e {_ROOT}"
    )


if sys.argv[:1] == ["-m"]:  # Python imports a command's package first: what is missing is one line, not a trace
    for _library in NEEDED:
        if find_spec(_library) is None:
            print(f"error: {missing(_library)}", file=sys.stderr)
            sys.exit(2)


class _SameModule(MetaPathFinder, Loader):
    """Finds `models.select` as `fedseg.models.select`, where `models` is known to be ours."""

    def __init__(self) -> None:
        self.parts: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        part, _, inside = fullname.partition(".")
        if part not in self.parts or not inside or inside.endswith("__main__"):
            return None
        found = find_spec(f"fedseg.{fullname}")
        if found is None:
            return None
        spec = ModuleSpec(fullname, self, origin=found.origin)
        spec.submodule_search_locations = found.submodule_search_locations
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(f"fedseg.{spec.name}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It has run under its own name, whose specification it keeps."""
        if module.__spec__ is not None:
            module.__spec__ = module.__spec__.loader_state


_same = _SameModule()


def one_copy(name: str) -> None:
    """Called by a package at its end: imported by its folder's name, it becomes the module of its full name."""
    if _CHECKOUT and not name.startswith(f"{__name__}."):
        _same.parts.add(name)
        if _same not in sys.meta_path:
            sys.meta_path.insert(0, _same)
        sys.modules[name] = importlib.import_module(f"{__name__}.{name}")
