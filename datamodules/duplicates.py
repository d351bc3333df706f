"""Images and masks that occur twice, by a hash of their pixels."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from fedseg.datamodules.cases import Case, Sample
from fedseg.datamodules.findings import Finding, few
from fedseg.datamodules.readers import Array

Print = tuple[str, str]  # hashes of an image and of its mask; empty where there is nothing to compare
Owner = tuple[Case, str]


def digest(array: Array) -> str:
    """A hash of size, type and values; empty for an array of one value everywhere."""
    if array.size and (array == array.flat[0]).all():
        return ""
    hashed = hashlib.blake2b(f"{array.shape}{array.dtype.str}".encode(), digest_size=16)
    hashed.update(np.ascontiguousarray(array).data)
    return hashed.hexdigest()


def prints(case: Case, sample: Sample) -> tuple[Print, ...]:
    """The hashes of a case, or of each slice of a stack of files."""
    if not case.slices:
        return ((digest(sample.image), _of_mask(sample.labels)),)
    labels = [None] * len(sample.image) if sample.labels is None else list(sample.labels)
    return tuple((digest(image), _of_mask(mask)) for image, mask in zip(sample.image, labels, strict=True))


def _of_mask(labels: Array | None) -> str:
    return "" if labels is None else digest(labels)


@dataclass
class Copies:
    """Who has which image and which mask."""

    images: dict[str, list[Owner]] = field(default_factory=lambda: defaultdict(list))
    masks: dict[str, list[Owner]] = field(default_factory=lambda: defaultdict(list))

    def add(self, case: Case, print: Print) -> None:
        """Takes one image with its mask."""
        image, mask = print
        if image:
            self.images[image].append((case, mask))
        if mask:
            self.masks[mask].append((case, image))

    def findings(self, splits: Mapping[tuple[str, str], str]) -> Iterator[Finding]:
        """Duplicates of images and masks; one file that is listed twice was told when it was listed.

        Args:
            splits: Site and patient to the split that they are in.
        """
        for owners in self.images.values():
            files = {os.path.realpath(case.image) if case.image else str(case): (case, mask) for case, mask in owners}
            if len(files) > 1:
                yield _duplicate(list(files.values()), splits)
        for owners in self.masks.values():
            if len({image for _, image in owners}) > 1:
                first = owners[0][0]
                what = f"the same mask as {few([name(case, first) for case, _ in owners[1:]])}, on other images"
                cure = "right for coarse or copied labels; else correct the pairing"
                yield Finding("identical masks", what, cure, first.site, first.case, first.mask or "")


def _duplicate(copies: list[Owner], splits: Mapping[tuple[str, str], str]) -> Finding:
    first = copies[0][0]
    others = few([name(case, first) for case, _ in copies[1:]])
    masks = {mask for _, mask in copies}
    differ = "; their masks differ" if len(masks) > 1 else ""
    sites = {case.site for case, _ in copies}
    patients = {(case.site, case.patient): None for case, _ in copies}
    where = (
        "at another site" if len(sites) > 1 else "of another patient" if len(patients) > 1 else "of the same patient"
    )
    served = dict.fromkeys(splits[patient] for patient in patients if splits.get(patient, "unused") != "unused")
    leak = f", in {' and '.join(served)}" if len(served) > 1 else ""
    cure = "keep one"
    if len(masks) > 1:
        cure += ", with the right mask"
    if len(patients) > 1:
        cure += "; copies in training and test make scores too good"
    what = f"pixel for pixel {others}, {where}{leak}{differ}"
    return Finding("duplicate image", what, cure, first.site, first.case, first.image)


def name(case: Case, seen_from: Case) -> str:
    """How a message about one case names another."""
    return case.case if case.site == seen_from.site else f"{case.site}/{case.case}"
