"""Resizing once, augmenting always anew: pipelines from YAML, seeded per sample."""

from __future__ import annotations

import copy
import os
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import yaml
from numpy.typing import NDArray

from fedseg.common.names import did_you_mean, nearest
from fedseg.datamodules.cases import Pixels, Sample
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.grid import fit_planes

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # before the import: it would ask the network for a newer version
import albumentations as A  # noqa: N812

FOLDER = Path(__file__).parent.parent / "configs" / "augment"
PARTS = ("geometric", "appearance")
SLICES = "flip_slices"


def resize(sample: Sample, size: tuple[int, int]) -> Sample:
    """Brings a sample to the network's size: images by area (shrinking) or linearly, masks by `fit_planes`.

    Args:
        sample: Of any size.
        size: (height, width) in pixels.

    Returns:
        The sample on the new grid; its spacing accounts for the resize.
    """
    height, width = sample.image.shape[1:3]
    if (height, width) == size:
        return sample
    shrinks = size[0] * size[1] < height * width
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    image = np.stack([_resize(plane, size, how) for plane in sample.image])
    labels = sample.labels
    if labels is not None:
        labels = fit_planes(labels, size)
    spacing = sample.spacing
    if spacing is not None:
        spacing = (spacing[0], spacing[1] * height / size[0], spacing[2] * width / size[1])
    return replace(sample, image=image, labels=labels, spacing=spacing)


def brought_back(planes: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Brings maps from the network's grid to that of an image, interpolated as images are.

    Args:
        planes: (D, R, h, w), such as probabilities.
        size: (height, width) of the image.

    Returns:
        (D, R, H, W).
    """
    moved = resize(Sample(planes.transpose(0, 2, 3, 1), None), size).image
    return moved.transpose(0, 3, 1, 2).astype(np.float32, copy=False)


def to_grey(sample: Sample) -> Sample:
    """Colour (red, green, blue) to one channel of luminance."""
    return replace(
        sample, image=np.stack([cv2.cvtColor(plane, cv2.COLOR_RGB2GRAY) for plane in sample.image])[..., None]
    )


def _resize(plane: NDArray[Any], size: tuple[int, int], how: int) -> NDArray[Any]:
    fours = [plane[..., first : first + 4] for first in range(0, plane.shape[-1], 4)]  # OpenCV averages no more at once
    resized = [cv2.resize(np.ascontiguousarray(four), size[::-1], interpolation=how) for four in fours]
    return np.concatenate([part.reshape(*size, -1) for part in resized], axis=-1)


@dataclass(frozen=True)
class Augmentation:
    """A pipeline in two parts: geometry, shared by everything derived from an image, then appearance.

    Attributes:
        geometric: Moves pixels of image and mask alike.
        appearance: Changes the image's values only.
        source: The file it came from.
        flip_slices: Probability that the slices of a volume come in reverse order, before all else.
    """

    geometric: A.Compose
    appearance: A.Compose
    source: str
    flip_slices: float = 0.0

    def __call__(
        self, image: Pixels, labels: NDArray[np.uint8] | None, seed: int, views: int = 1
    ) -> tuple[list[Pixels], NDArray[np.uint8] | None]:
        """Augments one slice or one volume, whose slices all move alike: a pure function of its arguments.

        Args:
            image: (H, W, C) or (D, H, W, C).
            labels: (H, W) or (D, H, W) label ids, or None.
            seed: Of this sample.
            views: How many versions of the image, which share their geometry and differ in appearance.

        Returns:
            The views, each of the image's shape, and the labels.
        """
        one, its = ("image", "mask") if image.ndim == 3 else ("images", "masks")  # albumentations' names
        # One stream for all transforms of a part: Compose.set_random_seed would give each transform the same seed, and
        # two flips with probability 1/2 would then always flip together.
        stream = random.Random(seed)
        if self.flip_slices and stream.random() < self.flip_slices:
            image = cast(Pixels, np.ascontiguousarray(image[::-1]))
            labels = None if labels is None else np.ascontiguousarray(labels[::-1])
        if self.geometric.transforms:
            _seed(self.geometric, stream)
            given = {one: image} if labels is None else {one: image, its: labels}
            moved = self.geometric(**given)
            image, labels = moved[one], moved.get(its)
        if not self.appearance.transforms:
            return [image] * views, labels
        seen = []
        for _ in range(views):
            _seed(self.appearance, stream)
            seen.append(self.appearance(**{one: image})[one])
        return seen, labels

    def try_on(self, image: Pixels) -> None:
        """Runs every transform once.

        Args:
            image: (H, W, C) or (D, H, W, C), of the kind that will come.

        Raises:
            DataError: A transform that cannot take such an image, or that changes its size.
        """
        if self.flip_slices and image.ndim == 3:
            raise DataError(
                f"{self.source}: {SLICES} is for volumes (data.dimensions=3), the network sees images; leave it out, "
                "or take VerticalFlip"
            )
        for transform in (*_leaves(self.geometric), *_leaves(self.appearance)):
            _try_on(transform, image, self.source)


def _try_on(transform: Any, image: Pixels, source: str) -> None:
    name = type(transform).__name__
    always = A.Compose([copy.deepcopy(transform)])
    always.transforms[0].p = 1.0
    for seed in range(6):  # a rotation by a random quarter fits an oblong image at times
        _seed(always, random.Random(seed))
        one, its = ("image", "mask") if image.ndim == 3 else ("images", "masks")
        try:
            result = always(**{one: image, its: np.zeros(image.shape[:-1], np.uint8)})[one]
        except Exception as error:  # a transform raises what it likes
            raise DataError(
                f"{source}: {name} fails on images of {image.shape[-1]} channels, {image.dtype}: {error}"
            ) from error
        if result.shape != image.shape or result.dtype != image.dtype:
            raise DataError(
                f"{source}: {name} turns {image.shape} {image.dtype} into {result.shape} {result.dtype}; a pipeline "
                "must keep size and type (data.size sets the size before it)"
            )


def _leaves(group: A.BaseCompose) -> Iterator[Any]:
    for member in group.transforms:
        if isinstance(member, A.BaseCompose):
            yield from _leaves(member)
        else:
            yield member


def _seed(pipeline: A.Compose, stream: random.Random) -> None:
    seed = stream.getrandbits(32)
    pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))


def load_augmentation(name: str) -> Augmentation:
    """Reads a pipeline.

    Args:
        name: A file of ``configs/augment`` without ``.yaml``, or the path of a YAML file.

    Raises:
        DataError: No such file, an unknown transform, a bad argument, or a transform in the wrong part; names them all.
    """
    path = _find(name)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise DataError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict) or not set(content) <= {*PARTS, SLICES}:
        raise DataError(
            f"{path}: expected two lists of transforms at most, named {' and '.join(PARTS)}, and of volumes {SLICES}"
        )
    share = content.get(SLICES, 0.0)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise DataError(f"{path}: {SLICES} is a probability from 0 to 1, such as 0.5, not {share!r}")
    parts = {part: [_build(entry, part, path) for entry in content.get(part) or []] for part in PARTS}
    return Augmentation(_compose(parts["geometric"]), _compose(parts["appearance"]), str(path), float(share))


def _compose(transforms: list[Any]) -> A.Compose:
    return A.Compose(transforms, strict=True)


def _find(name: str) -> Path:
    path = FOLDER / f"{name}.yaml"
    if path.is_file():
        return path
    if Path(name).is_file():
        return Path(name)
    known = [file.stem for file in FOLDER.glob("*.yaml")]
    raise DataError(f"data.augment={name}: {nearest(name, known)}, or give the path of a YAML file")


def _build(entry: Any, part: str, path: Path) -> Any:
    """One transform from ``Name`` or ``{Name: {argument: value}}``, or a choice such as OneOf with its own list."""
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise DataError(f"{path}, {part}: expected 'Name: {{argument: value}}', found {entry!r}")
    name, arguments = next(iter(entry.items()))
    arguments = dict(arguments or {})
    cls = _transform_class(name, part, path)
    if issubclass(cls, A.BaseCompose):
        arguments["transforms"] = [_build(inner, part, path) for inner in arguments.get("transforms") or []]
    elif issubclass(cls, A.ImageOnlyTransform) != (part == "appearance"):
        other = next(p for p in PARTS if p != part)
        raise DataError(f"{path}, {part}: {name} belongs under {other}")
    return _construct(cls, arguments, f"{path}, {part}: {name}")


def _transform_class(name: str, part: str, path: Path) -> type[Any]:
    kinds = (A.ImageOnlyTransform, A.DualTransform, A.OneOf, A.SomeOf, A.RandomOrder, A.Sequential)
    everything = {key: value for key, value in vars(A).items() if isinstance(value, type) and issubclass(value, kinds)}
    if name not in everything:
        hint = did_you_mean(name, everything) or "see its list of transforms"
        raise DataError(f"{path}, {part}: albumentations has no {name}; {hint}")
    return everything[name]


def _construct(cls: type[Any], arguments: dict[str, Any], where: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # albumentations warns of arguments that it then ignores
            return cls(**arguments)
    except (ValueError, TypeError, UserWarning) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise DataError(f"{where}: {' '.join(line for line in lines if 'errors.pydantic.dev' not in line)}") from error
