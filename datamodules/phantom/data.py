"""Synthetic images of several sites, with one dial for each way in which real sites differ.

`python -m fedseg.datamodules.phantom.picture FILE` draws an overview of the dials.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedseg.datamodules.base import MultiCenterDataModule
from fedseg.datamodules.cases import Case, Sample
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.phantom.fundus import CUP, RIM, draw_fundus
from fedseg.datamodules.phantom.organ import GLAND, LESION, MODALITIES, T2, draw_organ, spacing
from fedseg.datamodules.phantom.style import Dials, rater_style, site_style
from fedseg.datamodules.readers import settled

Anatomy = Literal["fundus", "organ"]
REGIONS: Mapping[str, dict[str, list[int]]] = {
    "fundus": {"disc": [RIM, CUP], "cup": [CUP]},
    "organ": {"organ": [GLAND, LESION], "lesion": [LESION]},
}
DRAWING = 1  # raise when the pictures change, so that no disk cache keeps old ones
FEWEST_CASES = 5  # a site with fewer could not be split


def draw_case(
    anatomy: Anatomy,
    seed: int,
    site: int,
    index: int,
    dials: Dials,
    *,
    resolution: int,
    slices: int = 1,
    rater: int | None = None,
    modalities: Sequence[str] = (),
) -> Sample:
    """One synthetic case, a pure function of the arguments.

    Args:
        anatomy: "fundus" (colour) or "organ" (grey).
        seed: Seed of the phantom.
        site: Number of the site, from 0.
        index: Number of the case at the site, from 0.
        dials: Strength of each kind of shift between sites.
        resolution: Pixels across.
        slices: Slices of a volume; 1 is a plain image. The fundus has no volumes.
        rater: Who of the site's several raters outlines it, from 0; None: there is one.
        modalities: Of the organ, the images that are the channels; none: T2 alone.

    Returns:
        Image (slices, resolution, resolution, channels) uint8 and label ids (slices, resolution, resolution) uint8.
    """
    style, hand = site_style(seed, site, dials), rater or 0
    if rater is not None:
        style = rater_style(style, rater)
    if anatomy == "fundus":
        image, labels = draw_fundus(seed, site, index, style, resolution, hand)
        return Sample(image=image, labels=labels, spacing=None)
    image, labels = draw_organ(seed, site, index, style, resolution, slices, hand, modalities or (T2,))
    return Sample(image=image, labels=labels, spacing=spacing(resolution, slices))


class PhantomDataModule(MultiCenterDataModule):
    """Synthetic multi-centre images: any number of sites, every case a pure function of (seed, site, index).

    All dials lie in [0, 1]; 0 makes the sites identical in distribution. A site keeps its character and its cases when
    sites are added, when the amounts change, and when another dial is turned.

    Args:
        anatomy: "fundus": colour image of a retina, regions disc and cup. "organ": MRI-like image, regions organ and
            lesion.
        n_sites: Number of sites, named site_01, site_02, ...
        cases_per_site: Cases per site before the amount dial.
        slices: Slices per case; 3 or more make volumes (organ only).
        resolution: Pixels across of the images drawn; the network's size is `size`.
        appearance: Dial of the device: contrast, gamma, colour, bias field, blur, noise.
        annotation: Dial of the annotators: outlines systematically too large or too small (disc and organ up to 30 %,
            cup and lesion up to 40 % of the radius), ironed smooth or detailed. Nothing in the image tells.
        structure: Dial of the patients: size of the structures (radius up to a factor 1.4), prevalence of disease.
        amount: Dial of the number of cases (up to a factor 4).
        modalities: Of the organ, the images that are the channels: t2 (default) shows the organ, and lesions dark; dwi
            lesions bright, and the organ hardly. Sites that have one alone: data.lacks={site_02: [dwi]}.
        raters: Who outline every image of a site, rater_1 ...; of several each has a habit besides the site's: outlines
            up to 15 % (disc, organ) or 20 % (cup, lesion) of the radius larger or smaller.
        phantom_seed: Seed of the images. It is not the seed of the run: repeated runs see the same hospitals.
        regions: Region name to label ids; null: all regions of the anatomy.
        kwargs: See MultiCenterDataModule.

    Raises:
        DataError: An argument is out of its range.
    """

    def __init__(
        self,
        *,
        anatomy: Anatomy = "fundus",
        n_sites: int = 6,
        cases_per_site: int = 40,
        slices: int = 1,
        resolution: int = 128,
        appearance: float = 0.5,
        annotation: float = 0.5,
        structure: float = 0.3,
        amount: float = 0.5,
        modalities: Sequence[str] = [],
        raters: int = 1,
        phantom_seed: int = 0,
        regions: Mapping[str, Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> None:
        if anatomy not in REGIONS:
            raise DataError(f"phantom: unknown anatomy {anatomy!r}; choose one of {', '.join(REGIONS)}")
        for name, value, least in (
            ("n_sites", n_sites, 1),
            ("cases_per_site", cases_per_site, FEWEST_CASES),
            ("slices", slices, 1),
            ("resolution", resolution, 32),
            ("raters", raters, 1),
            ("phantom_seed", phantom_seed, 0),
        ):
            if value < least:
                raise DataError(f"phantom: {name}={value} is too small; the least is {least}")
        if anatomy == "fundus" and slices > 1:
            raise DataError(
                f"phantom: a fundus image has no slices (slices={slices}); choose anatomy=organ for volumes"
            )
        if slices == 2:
            raise DataError("phantom: the two slices of slices=2 lie above and below the organ; take 1, or 3 or more")
        if odd := [name for name in modalities if anatomy != "organ" or name not in MODALITIES]:
            raise DataError(
                f"phantom: data.modalities has {odd[0]!r}; known: {', '.join(MODALITIES)}, of data.anatomy=organ"
            )
        if len({*modalities}) < len(modalities):
            raise DataError(f"phantom: data.modalities=[{', '.join(modalities)}] names one twice; name each once")
        super().__init__(regions=regions or REGIONS[anatomy], **kwargs)
        self.modalities = tuple(modalities)
        self.anatomy: Anatomy = anatomy
        self.dials = Dials(appearance=appearance, annotation=annotation, structure=structure, amount=amount)
        self.n_sites, self.cases_per_site = n_sites, cases_per_site
        self.raters = tuple(f"rater_{number + 1}" for number in range(raters)) if raters > 1 else ()
        self.slices, self.resolution, self.phantom_seed = slices, resolution, phantom_seed

    def cases(self) -> list[Case]:
        """All cases of all sites; their images are drawn when read."""
        raters = tuple((rater, (("", ""),)) for rater in self.raters)
        names = [f"site_{site + 1:02d}" for site in range(self.n_sites)]
        absent = {name: tuple(self.modalities.index(one) for one in self.lacking(name)) for name in names}
        return [
            Case(site, case, case, mask="", raters=raters, absent=absent[site])
            for number, site in enumerate(names)
            for case in (f"case_{index + 1:04d}" for index in range(self.amount(number)))
        ]

    def decoding(self) -> dict[str, Any]:
        """Adds what the images depend on."""
        drawing: dict[str, Any] = {"unannotated": self.unannotated} if self.unannotated else {}
        drawing |= {"modalities": self.modalities} if self.modalities else {}
        drawing |= {"raters": self.raters} if self.raters else {}
        drawing |= {"dials": self.dials, "phantom_seed": self.phantom_seed, "anatomy": self.anatomy}
        return super().decoding() | drawing | {"resolution": self.resolution, "slices": self.slices, "drawing": DRAWING}

    def amount(self, site: int) -> int:
        """Number of cases at a site (number from 0)."""
        factor = site_style(self.phantom_seed, site, self.dials).cases
        return max(FEWEST_CASES, round(self.cases_per_site * factor))

    def read(self, case: Case) -> Sample:
        """Draw a case; a region that nobody annotated at its site is not outlined."""
        drawn = {rater: self._drawn(case, number) for number, rater in enumerate(self.raters)} or {
            "": self._drawn(case, None)
        }
        masks = {rater: one.labels for rater, one in drawn.items() if one.labels is not None}
        if self.unannotated.get(case.site):
            masks = {rater: self._outlined(case.site)[labels] for rater, labels in masks.items()}
        first = next(iter(drawn.values()))
        image = first.image.copy()
        image[..., list(case.absent)] = 0
        first = replace(first, image=image)
        return settled(first, masks, self.reading_of(case.site)) if self.raters else replace(first, labels=masks[""])

    def modalities_of(self, site: str) -> tuple[str, ...]:
        """The same at every site."""
        return self.modalities

    def _drawn(self, case: Case, rater: int | None) -> Sample:
        site, index = (int(name.rsplit("_", 1)[1]) - 1 for name in (case.site, case.case))
        return draw_case(
            self.anatomy, self.phantom_seed, site, index, self.dials,
            resolution=self.resolution, slices=self.slices, rater=rater, modalities=self.modalities,
        )  # fmt: skip

    def _outlined(self, site: str) -> NDArray[np.uint8]:
        """Which label id is drawn at a site in place of each: one of the same regions, less those without annotation.

        Raises:
            DataError: there is none, since regions nest.
        """
        known = (*REGIONS[self.anatomy].values(), *self.regions.labels.values())
        ids = range(1 + max(label for labels in known for label in labels))
        regions = {label: {name for name, of in self.regions.labels.items() if label in of} for label in ids}
        left = {label: names - set(self.unannotated[site]) for label, names in regions.items()}
        found = {label: [other for other in ids if regions[other] == left[label]] for label in ids}
        if lost := [label for label in ids if not found[label]]:
            raise DataError(
                f"phantom: data.unannotated={{{site}: {list(self.unannotated[site])}}} leaves pixels of "
                f"{', '.join(sorted(left[lost[0]]))} within it without a label; take regions that do not nest, as "
                "'data.regions={rim: [1], cup: [2]}'"
            )
        return np.array([label if label in found[label] else found[label][0] for label in ids], np.uint8)

    def read_new(self, case: Case) -> Sample:
        """Read a file: what is none of the phantom's cases cannot be drawn."""
        return super().read(case)
