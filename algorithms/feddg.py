"""FedDG-ELCFS."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from fedseg.algorithms.fedavg import FedAvg
from fedseg.algorithms.functional.boundary import inner_band, outer_band
from fedseg.algorithms.functional.contrast import Denominator, Group, boundary_contrast
from fedseg.algorithms.functional.episode import Episode, episode
from fedseg.algorithms.functional.fourier import low_frequency_amplitude, mix_amplitude, window_half_width
from fedseg.federation.contract import Batch, Cohort, Site, Task
from fedseg.federation.ranges import Fixed, HalfShare, PositiveShare, Share
from fedseg.federation.state import State, Tensors, Update
from fedseg.models.dice import soft_dice_loss
from fedseg.models.embedding import Embedding
from fedseg.models.heads import probabilities
from fedseg.models.losses import Answer, supervised
from fedseg.models.select import require_parts

BANK = "bank"
"""The group of a site's amplitudes; ``bank/<site>`` where several sites' lie side by side."""
SPECTRA, HELD = "spectra", "bank_held"
"""Scalars: how many spectra a site must hold; ``bank_held/<site>``, a site's receipt for them."""
DECIMALS = 2  # of the released weights


class FedDG(FedAvg):
    """FedDG-ELCFS (Liu et al., CVPR 2021): one model for sites never seen, trained on the styles of all that are seen.

    Before round 1 every site publishes the low-frequency amplitudes of its training images, un-augmented, labelled or
    not: (2b+1)^2 numbers per channel and image, never a phase. Each site keeps those of the others. In a local step an
    image is re-styled by mixing in a donor's amplitudes; after a virtual gradient step on the raw images the network
    must segment the re-styled ones, and tell features on a structure's boundary from those around it:

        loss = L(x; w) + meta_weight L(x'; w - step clamp(dL(x; w)/dw)) + contrast_weight L_contrast

    The server averages as FedAvg does. Defaults follow the paper but for the contrast's denominator, which is the
    authors' program's: without the pair in it the contrast has no lower bound and can keep a network from learning
    (docs/results.md). ``algorithm=feddg_paper`` is the paper in this, too; ``algorithm=feddg_released`` follows the
    program, in which only the mean colour is swapped. Corrected in all: one initial model for all, running statistics
    averaged, empty structures leave the contrast instead of making it NaN, one window that works on crops. A local step
    has two forward passes and three backward ones: 2.7 times FedAvg's.

    Args:
        half_width: b of the window of low frequencies |u|, |v| <= b that is exchanged and mixed, in cycles per image.
        window: L, the window as a share of the spectrum, b = floor(L min(H, W)); null takes half_width.
        bank_share: share of a site's training images whose amplitudes it publishes; at least one image.
        donor_weight: of the donor's amplitude; null draws it from U(0, 1) for every image.
        styles: re-styled versions of an image in a step, each from another site until all have served; null takes one
            from every other site.
        meta_weight: of the task loss of the re-styled images.
        contrast_weight: of the contrast; with meta_weight 0 too, training is FedAvg's.
        temperature: of the contrast.
        denominator: what a pair is told from: positive_and_negatives (the program), or negatives alone (the paper).
        group: contrast each image with its own versions (image, the paper) or the whole batch (the program).
        boundary_steps: width of the band inside of a structure's boundary, in pixels.
        background_steps: width of the band around a structure, in pixels.
        step: alpha, size of the virtual gradient step.
        clip: largest entry of its gradient.
        second_order: differentiate through the virtual step, too.
        outer_updates_statistics: let re-styled images move running statistics, too.
        task_loss: recipe is training.loss; released is the program's soft Dice over the batch.
        weighting: examples weighs a site by its labelled training images; uniform gives every site the same weight;
            rounded is by images, rounded to two decimals with the rest for the last site, as in the program.
    """

    styles_images = True
    slices_only = "its amplitude spectra are of slices"
    fewest_sites = 2
    leaves_out_unknown = True
    one_answer = "its episode reads them in two places"
    compares_patients = True

    def __init__(
        self,
        *args: Any,
        half_width: Fixed[NonNegativeInt] = 1,
        window: HalfShare | None = None,
        bank_share: Fixed[PositiveShare] = 1.0,
        donor_weight: Share | None = None,
        styles: Fixed[PositiveInt | None] = 1,
        meta_weight: NonNegativeFloat = 1.0,
        contrast_weight: NonNegativeFloat = 0.1,
        temperature: Fixed[PositiveFloat] = 0.05,
        denominator: Denominator = "positive_and_negatives",
        group: Group = "image",
        boundary_steps: Fixed[PositiveInt] = 1,
        background_steps: Fixed[PositiveInt] = 5,
        step: NonNegativeFloat = 1e-3,
        clip: Fixed[PositiveFloat] = 100.0,
        second_order: bool = False,
        outer_updates_statistics: bool = False,
        task_loss: Literal["recipe", "released"] = "recipe",
        weighting: Literal["examples", "uniform", "rounded"] = "examples",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, weighting="examples" if weighting == "rounded" else weighting, **kwargs)
        self.half_width, self.window, self.bank_share = half_width, window, bank_share
        self.donor_weight, self._styles = donor_weight, styles
        self.meta_weight, self.contrast_weight = meta_weight, contrast_weight
        self.temperature, self.denominator, self.group = temperature, denominator, group
        self.boundary_steps, self.background_steps = boundary_steps, background_steps
        self.episode = partial(
            episode,
            step=step,
            clip=clip,
            second_order=second_order,
            outer_updates_statistics=outer_updates_statistics,
        )
        self.released_dice = task_loss == "released"
        self.reads_updates = self.rounds_weights = weighting == "rounded"
        if contrast_weight:
            require_parts(self.model, "FedDG's contrast (algorithm.contrast_weight)", "segmentation_head")
        self.donors = Donors({})

    @property
    def styles(self) -> int:
        """Re-styled versions of an image in a step."""
        return self._styles or max(1, len(self.donors.counts))

    # ---------------------------------------------------------------- one local step

    def loss(self, batch: Batch) -> Tensor:
        """Task loss of the raw images, and of the re-styled ones after the virtual step; contrast of their features."""
        if not (self.meta_weight or self.contrast_weight):
            return self.criterion(self.model, batch)
        images = batch["image"]
        result: Episode[tuple[Tensor, Tensor]] = self.episode(
            Embedding(self.model),
            self.normalize(images),
            self.normalize(self.restyle(images)),
            lambda answer: self.task_loss(answer[0], batch),
        )
        (_, raw), (logits, restyled) = result.inner_output, result.outer_output
        loss = result.inner_loss
        if self.meta_weight:
            given = [name for name in ("mask", "known") if name in batch]
            labels: Batch = {name: batch[name].repeat(self.styles, 1, 1, 1) for name in given}
            loss = loss + self.meta_weight * self.task_loss(logits, labels)
        if self.contrast_weight:
            passes = (raw, *restyled.chunk(self.styles))
            loss = loss + self.contrast_weight * self.contrast(passes, batch["mask"], batch.get("known"))
        return loss

    def restyle(self, images: Tensor) -> Tensor:
        """Mix in the amplitudes of donors drawn anew for every image.

        Args:
            images: (B, C, H, W) in [0, 1], not normalised.

        Returns:
            (styles * B, C, H, W) in [0, 1], one style of the whole batch after the other; the images themselves where
            the site holds no donors.

        Raises:
            ValueError: the images are not of the size of the donors'.
        """
        images = images.repeat(self.styles, 1, 1, 1)
        if not len(self.donors):
            return images
        self.donors.check_size(images)
        crops = self.donors.draw(len(images) // self.styles, self.styles)
        weights = torch.rand(len(images)) if self.donor_weight is None else self.donor_weight
        return mix_amplitude(images, crops.to(images), weights).clamp(0, 1)

    def task_loss(self, logits: Answer, batch: Batch) -> Tensor:
        """The recipe's loss, or the soft Dice of the authors' program."""
        if self.released_dice:
            return supervised(self._soft_dice, logits, batch["mask"], batch.get("known"))
        return super().task_loss(logits, batch)

    def _soft_dice(self, logits: Tensor, mask: Tensor, known: Tensor | None = None) -> Tensor:
        return soft_dice_loss(probabilities(logits, self.recipe.activation), mask, known=known)

    def contrast(self, features: tuple[Tensor, ...], mask: Tensor, known: Tensor | None = None) -> Tensor:
        """Boundary against background, over the passes of the same images, summed over regions.

        Args:
            features: one (B, D, h, w) per pass.
            mask: (B, R, H, W).
            known: of the same shape, 1 where the label is known; None: everywhere.
        """
        with torch.autocast(mask.device.type, enabled=False):
            return boundary_contrast(
                tuple(feature.to(torch.promote_types(feature.dtype, torch.float32)) for feature in features),
                inner_band(mask, self.boundary_steps, known),
                outer_band(mask, self.background_steps, known),
                self.temperature,
                denominator=self.denominator,
                group=self.group,
            )

    # ---------------------------------------------------------------- client half

    def check_site(self, site: Site) -> None:
        """The window must fit the images."""
        self._amplitudes(site, next(iter(site.plain_batches())))

    def introduce(self, site: Site) -> State:
        """The site's bank, in random order: low-frequency amplitudes of its training images, and their size (H, W)."""
        batches = [(self._amplitudes(site, batch), batch["image"].shape[-2:]) for batch in site.plain_batches()]
        amplitudes = torch.cat([crops for crops, _ in batches])
        shown = torch.randperm(len(amplitudes))[: max(1, math.floor(len(amplitudes) * self.bank_share))]
        return State({BANK: {"amplitude": amplitudes[shown], "size": torch.tensor(batches[0][1])}})

    def receive(self, message: State, kept: State, site: Site) -> None:
        """Load also the other sites' banks, those that came or those that were kept.

        Raises:
            RuntimeError: the site has lost the banks that it received in an earlier round.
        """
        super().receive(message, kept, site)
        self.donors = Donors(_banks(message) or _banks(kept))
        expected = message.scalars.get(SPECTRA, len(self.donors))
        if len(self.donors) != expected:
            raise RuntimeError(
                f"site {site.name!r} holds {len(self.donors)} spectra of other sites, not the {expected:.0f} that it "
                "received in an earlier round; give it back what it kept, or start the run anew"
            )

    def send(self, site: Site) -> State:
        """What FedAvg sends, and a receipt for the banks."""
        answer = super().send(site)
        if len(self.donors):
            answer.scalars[f"{HELD}/{site.name}"] = 1.0
        return answer

    def keep(self) -> State:
        """What FedAvg keeps, and the banks."""
        kept = super().keep()
        return State({**kept.tensors, **self.donors.banks}, kept.scalars)

    # ---------------------------------------------------------------- server half

    def init_server(self, introductions: Mapping[str, State]) -> State:
        """FedAvg's state, and all banks as ``bank/<site>``.

        Raises:
            ValueError: there is only one site, or sites differ in image size, channels or window.
        """
        server = super().init_server(introductions)
        return _with_banks(server, introductions)

    @property
    def founders_only(self) -> str:
        """Newcomers' banks join the others."""
        return super().founders_only

    def regrouped(self, server: State, arrived: Mapping[str, State], left: Collection[str]) -> State:
        """Banks come and go with their sites; every site is sent those of the others anew.

        Raises:
            ValueError: one site is left, or sites differ in image size, channels or window.
        """
        after = super().regrouped(server, arrived, left)
        receipts = {name for name in after.scalars if name.startswith(f"{HELD}/")}
        again = {name: value for name, value in after.scalars.items() if name not in receipts}
        return _with_banks(State(after.tensors, again), arrived)

    def broadcast(self, server: State, site: str, task: Task) -> State:
        """The model; and to a site that trains, until it gives a receipt, the banks of all others."""
        message = super().broadcast(server, site, task)
        banks = _banks(server)
        if task.kind != "train" or banks.pop(f"{BANK}/{site}", None) is None:
            return message
        if f"{HELD}/{site}" not in server.scalars:
            message.tensors |= banks
        return State(message.tensors, {**message.scalars, SPECTRA: float(len(Donors(banks)))})

    def weigh(self, server: State, updates: Sequence[Update]) -> list[float]:
        """FedAvg's weights, or rounded to two decimals: the last site takes the rest."""
        weights = super().weigh(server, updates)
        if not self.rounds_weights or not sum(weights):
            return weights
        rounded = [round(weight / sum(weights), DECIMALS) for weight in weights[:-1]]
        return [*rounded, max(0.0, 1.0 - sum(rounded))]

    def advance(self, server: State, mean: State, cohort: Cohort) -> State:
        """FedAvg's step; receipts are filed."""
        after = super().advance(server, mean, cohort)
        receipts = {name: 1.0 for name in mean.scalars if name.startswith(f"{HELD}/")}
        return State(after.tensors, {**after.scalars, **receipts})

    # ---------------------------------------------------------------- inside

    def _amplitudes(self, site: Site, batch: Batch) -> Tensor:
        images: Tensor = batch["image"]
        half_width = self.half_width
        if self.window is not None:
            half_width = window_half_width(self.window, images.shape[-2], images.shape[-1])
        try:
            return low_frequency_amplitude(images, half_width)
        except ValueError as error:
            raise ValueError(f"site {site.name!r}: algorithm.{error}") from error


class Donors:
    """The banks of the other sites, as one site holds them.

    Args:
        banks: ``bank/<site>`` -> ``amplitude`` (N, C, 2b+1, 2b+1) and ``size`` (2,), height and width of the images.
    """

    def __init__(self, banks: Mapping[str, Tensors]) -> None:
        self.banks = dict(sorted(banks.items()))
        self.counts = torch.tensor([len(bank["amplitude"]) for bank in self.banks.values()])

    def __len__(self) -> int:
        """Spectra of all sites."""
        return int(self.counts.sum())

    def draw(self, images: int, styles: int) -> Tensor:
        """One donor per image and style: the site uniformly, each once before any comes again, then a spectrum of it.

        Returns:
            (styles * images, C, 2b+1, 2b+1), all images of the first style first.
        """
        order = torch.rand(images, len(self.counts)).argsort(dim=1)
        sites = torch.cat([order[:, style % len(self.counts)] for style in range(styles)])
        within = (torch.rand(len(sites), dtype=torch.float64) * self.counts[sites]).long()
        amplitudes = [bank["amplitude"] for bank in self.banks.values()]
        return torch.stack([amplitudes[s][i] for s, i in zip(sites.tolist(), within.tolist(), strict=True)])

    def check_size(self, images: Tensor) -> None:
        """Amplitudes grow with the number of pixels, so all images must have the donors' size.

        Raises:
            ValueError: they do not.
        """
        size = tuple(next(iter(self.banks.values()))["size"].tolist())
        if images.shape[-2:] != size:
            here = " x ".join(map(str, images.shape[-2:]))
            raise ValueError(f"images of {here} pixels, but the banks are of {size[0]} x {size[1]}; set one data.size")


def _with_banks(server: State, told: Mapping[str, State]) -> State:
    """A server's state, and the banks that sites told."""
    together = State({**server.tensors, **{f"{BANK}/{site}": given[BANK] for site, given in told.items()}})
    _check_banks(_banks(together))
    return State(together.tensors, server.scalars)


def _banks(state: State) -> dict[str, Tensors]:
    return {group: tensors for group, tensors in state.tensors.items() if group.startswith(f"{BANK}/")}


def _check_banks(banks: Mapping[str, Tensors]) -> None:
    names = [group.removeprefix(f"{BANK}/") for group in banks]
    if len(names) == 1:
        raise ValueError(f"feddg borrows styles from other sites, and {names[0]!r} is the only one; take two or more")
    kinds = [(tuple(bank["size"].tolist()), tuple(bank["amplitude"].shape[1:])) for bank in banks.values()]
    for name, kind in zip(names, kinds, strict=True):
        if kind != kinds[0]:
            raise ValueError(
                f"feddg: size of the images and shape of an amplitude are {kinds[0]} at site {names[0]!r}, but {kind} "
                f"at {name!r}; all sites need one data.size and one window"
            )
