"""Small sites on disk, made by the tests."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from PIL import Image

from fedseg.datamodules import FolderDataModule


def square(height: int = 20, width: int = 24, label: int = 1) -> np.ndarray:
    """A mask with one 8 x 8 square off the centre."""
    mask = np.zeros((height, width), np.uint8)
    mask[2:10, 3:11] = label
    return mask


def picture(number: int, height: int = 20, width: int = 24, channels: int = 3) -> np.ndarray:
    """A random picture, another one for every number."""
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(array).save(path)
    return path


def save_volume(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def make_site(
    root: Path,
    site: str,
    count: int = 6,
    *,
    channels: int = 3,
    first: int = 0,
    mask: Callable[[int], np.ndarray] = lambda number: square(),
    size: tuple[int, int] = (20, 24),
) -> None:
    for number in range(first, first + count):
        save(root / site / "images" / f"case_{number:02d}.png", picture(number, *size, channels=channels))
        save(root / site / "masks" / f"case_{number:02d}.png", mask(number))


def make_sites(root: Path, *sites: str, count: int = 6) -> Path:
    for number, site in enumerate(sites):
        make_site(root, site, count, first=100 * number)
    return root


def write_manifest(path: Path, rows: Sequence[dict[str, str]], separator: str = ",", encoding: str = "utf-8") -> Path:
    columns = list(rows[0])
    lines = [separator.join(columns), *(separator.join(row[name] for name in columns) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return path


def folder(root: Path, **knobs: Any) -> FolderDataModule:
    """A prepared data module over a folder."""
    data = FolderDataModule(root=str(root), **{"size": [20, 24], "batch_size": 4, "augment": "none"} | knobs)
    data.setup()
    return data
