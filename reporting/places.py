"""What data are called by the place where they lie."""

from __future__ import annotations

from pathlib import Path

USUAL_TABLE = "sites"  # a manifest of this name says nothing of its data
COMMON_NAMES = ("data", "dataset", "images", "train", "table", "manifest")  # names of folders that say as little


def place_name(root: str | Path, manifest: str | None = None) -> str:
    """The name of a data set's folder or table, with that of the folder above where many have the same.

    Args:
        root: the folder; without folders above it nothing is said of these.
        manifest: the table that lists its cases.

    Returns:
        As ``study`` or ``study/images``; empty for the root of a file system.
    """
    table = Path(manifest or USUAL_TABLE).stem
    folder = Path(root)
    name, above = (folder.name, folder.parent.name) if table == USUAL_TABLE else (table, folder.name)
    return f"{above}/{name}" if above and name.lower() in COMMON_NAMES else name
