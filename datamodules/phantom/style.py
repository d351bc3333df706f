"""What makes one synthetic site unlike another: characters along the dials, image formation, habits of annotation.

Everything here is a pure function of (seed, site, index). Random numbers come in separate streams for anatomy, texture,
image formation and annotation, so that turning one dial leaves untouched what belongs to the others.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from math import exp, log

import cv2
import numpy as np
from numpy.typing import NDArray

from fedseg.datamodules.errors import DataError

FloatArray = NDArray[np.float32]


class Stream(IntEnum):
    """Independent streams of random numbers of one case."""

    ANATOMY = 0
    TEXTURE = 1
    FORMATION = 2
    ANNOTATION = 3
    FURTHER_RATERS = 4
    DIFFUSION = 5


@dataclass(frozen=True)
class Dials:
    """How unlike the sites are, one number in [0, 1] per kind of shift; 0 = identical in distribution, 1 = strong.

    Attributes:
        appearance: Camera or scanner: contrast, gamma, colour, bias field, blur, noise.
        annotation: Habits of the annotators: systematically larger or smaller outlines, smoothed or detailed ones.
        structure: Patients: size of the structures, prevalence of disease.
        amount: Number of cases per site, up to four times more or fewer.
    """

    appearance: float
    annotation: float
    structure: float
    amount: float

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0.0 <= value <= 1.0:
                raise DataError(
                    f"phantom dial {name}={value}: must lie in [0, 1] (0 = sites alike, 1 = strongly different)"
                )


@dataclass(frozen=True)
class SiteStyle:
    """The character of one site. With a dial at zero, its attributes have the same neutral values at every site."""

    gamma: float
    contrast: float
    brightness: float
    gains: tuple[float, float, float]
    """Factors on red, green and blue."""
    tilt: tuple[float, float]
    """Log-gradient of the bias field along columns and rows, from the centre to the border."""
    vignette: float
    """Log-darkening at the border's middle."""
    blur: float
    """Standard deviation, fraction of the image width."""
    noise: float
    """Standard deviation, image range 0 to 1."""
    outline: float
    """Relative change of the annotated radius of the outer structure (0.1 = 10 % larger)."""
    inner_outline: float
    """The same for the inner structure."""
    smoothing: float
    """Share of the outline's detail that the annotators iron out, 0 to 1."""
    size: float
    """Factor on the structures' radii."""
    prevalence: float
    """Probability that a case is diseased (large cup, or a lesion)."""
    cases: float
    """Factor on the number of cases."""


# Each trait walks over the sites in steps of an irrational number modulo 1: that fills [0, 1) evenly whatever the
# number of sites, and traits with different steps are not correlated.
_STEPS = {
    "outline": (5**0.5 - 1) / 2,
    "inner_outline": 11**0.5,
    "smoothing": 23**0.5,
    "contrast": 2**0.5,
    "gamma": 13**0.5,
    "brightness": 19**0.5,
    "noise": 29**0.5,
    "blur": 31**0.5,
    "vignette": 41**0.5,
    "red": 43**0.5,
    "green": 47**0.5,
    "blue": 53**0.5,
    "tilt_x": 59**0.5,
    "tilt_y": 61**0.5,
    "size": 3**0.5,
    "prevalence": 67**0.5,
    "cases": 7**0.5,
}
_ANGLES = 1024


def site_style(seed: int, site: int, dials: Dials) -> SiteStyle:
    """Character of a site; does not depend on how many sites there are.

    Args:
        seed: Seed of the phantom.
        site: Number of the site, from 0.
        dials: Strength of each kind of shift.
    """
    offsets = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed))).random(len(_STEPS))
    u = {
        trait: 2.0 * ((offset + site * step) % 1.0) - 1.0  # in [-1, 1), evenly spread over the sites
        for (trait, step), offset in zip(_STEPS.items(), offsets, strict=True)
    }
    look, habit, build = dials.appearance, dials.annotation, dials.structure
    return SiteStyle(
        gamma=exp(0.5 * look * u["gamma"]),
        contrast=exp(0.35 * look * u["contrast"]),
        brightness=0.10 * look * u["brightness"],
        gains=(exp(0.22 * look * u["red"]), exp(0.28 * look * u["green"]), exp(0.45 * look * u["blue"])),
        tilt=(0.45 * look * u["tilt_x"], 0.45 * look * u["tilt_y"]),
        vignette=0.15 + 0.35 * look * (u["vignette"] + 1.0) / 2.0,
        blur=0.003 + 0.008 * look * (u["blur"] + 1.0) / 2.0,
        noise=0.012 + 0.05 * look * (u["noise"] + 1.0) / 2.0,
        outline=0.30 * habit * u["outline"],
        inner_outline=0.40 * habit * u["inner_outline"],
        smoothing=habit * (u["smoothing"] + 1.0) / 2.0,
        size=exp(0.35 * build * u["size"]),
        prevalence=0.4 + 0.35 * build * u["prevalence"],
        cases=exp(log(4.0) * dials.amount * u["cases"]),
    )


def rater_style(style: SiteStyle, rater: int) -> SiteStyle:
    """The style of one of a site's several raters: larger or smaller than the site's habit is."""
    outer, inner = (2.0 * ((0.5 + rater * step) % 1.0) - 1.0 for step in (_STEPS["outline"], _STEPS["inner_outline"]))
    return replace(style, outline=style.outline + 0.15 * outer, inner_outline=style.inner_outline + 0.2 * inner)


def hand_of(seed: int, site: int, index: int, rater: int) -> np.random.Generator:
    """The hand with which a rater outlines a case; the first is that of a single one."""
    if rater == 0:
        return generator(seed, site, index, Stream.ANNOTATION)
    keys = (site, index, int(Stream.FURTHER_RATERS), rater)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=keys)))


def generator(seed: int, site: int, index: int, stream: Stream) -> np.random.Generator:
    """Random numbers of one stream of one case."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(site, index, int(stream)))))


@dataclass(frozen=True)
class Outline:
    """A star-shaped closed curve: radius as a function of the angle, in units of half the image width."""

    center: tuple[float, float]
    """Column and row, -1 to 1."""
    radius: float
    aspect: float
    """Height over width."""
    tilt: float
    """Rotation in radians."""
    waves: tuple[tuple[int, float, float], ...]
    """Harmonics of the radius: order, relative amplitude, phase."""

    def distance(self, x: FloatArray, y: FloatArray, scale: float = 1.0) -> FloatArray:
        """Approximate signed distance to the curve, negative inside.

        Args:
            x: Column coordinates (H, W), -1 to 1.
            y: Row coordinates (H, W).
            scale: Factor on the radius.
        """
        dx, dy = x - np.float32(self.center[0]), y - np.float32(self.center[1])
        cos, sin = np.float32(np.cos(self.tilt)), np.float32(np.sin(self.tilt))
        u, v = cos * dx + sin * dy, (cos * dy - sin * dx) * np.float32(1.0 / self.aspect)
        length, angle = cv2.cartToPolar(u, v)  # angle in [0, 2 pi]
        turns = np.linspace(
            0.0, 2.0 * np.pi, _ANGLES + 1
        )  # radius by table: much faster than a cosine per pixel and order
        radius = self.radius * scale * (1.0 + sum(a * np.cos(k * turns + phase) for k, a, phase in self.waves))
        nearest = (angle * np.float32(_ANGLES / (2.0 * np.pi)) + np.float32(0.5)).astype(np.int32)
        return np.asarray(length - np.asarray(radius, np.float32)[nearest])

    def annotated(self, grow: float, smoothing: float, rng: np.random.Generator) -> Outline:
        """The curve as an annotator draws it: larger or smaller, with part of its detail, by a hand that trembles.

        Args:
            grow: Relative change of the radius.
            smoothing: Share of the detail that is lost, 0 to 1.
            rng: The case's stream for annotation.
        """
        kept = tuple((order, amplitude * (1.0 - smoothing), phase) for order, amplitude, phase in self.waves)
        hand = tuple((order, 0.012 * rng.standard_normal(), rng.uniform(0, 2 * np.pi)) for order in (1, 2, 3))
        factor = (1.0 + grow) * (1.0 + 0.02 * rng.standard_normal())
        return Outline(self.center, self.radius * factor, self.aspect, self.tilt, kept + hand)


def waves(rng: np.random.Generator, orders: range, amplitude: float) -> tuple[tuple[int, float, float], ...]:
    """Random harmonics whose amplitude falls with the order."""
    return tuple((k, amplitude * rng.standard_normal() * orders.start / k, rng.uniform(0, 2 * np.pi)) for k in orders)


def grid(size: int) -> tuple[FloatArray, FloatArray]:
    """Column and row coordinates of the pixel centres, -1 to 1, each (size, size)."""
    axis = ((np.arange(size) + 0.5) / size * 2.0 - 1.0).astype(np.float32)
    return np.tile(axis[None, :], (size, 1)), np.tile(axis[:, None], (1, size))


def clouds(rng: np.random.Generator, size: int, cells: int, octaves: int = 1) -> FloatArray:
    """Smooth random field (size, size) of about unit variance.

    Args:
        rng: Random numbers.
        size: Pixels across.
        cells: Bumps across.
        octaves: Number of layers, each twice as fine and half as strong as the one before.
    """
    field = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        n = cells * 2**octave
        coarse = rng.standard_normal((n + 2, n + 2)).astype(np.float32)
        fine = cv2.resize(
            coarse,
            None,
            fx=(size + 2 * size / n) / (n + 2),
            fy=(size + 2 * size / n) / (n + 2),
            interpolation=cv2.INTER_CUBIC,
        )
        start = (fine.shape[0] - size) // 2
        field += np.float32(1.3 * 0.5**octave) * fine[start : start + size, start : start + size]
    return field


def soft_inside(distance: FloatArray, width: float) -> FloatArray:
    """1 inside, 0 outside, with a soft edge of the given width (same unit as the distance)."""
    return np.asarray(0.5 - 0.5 * np.tanh(distance * np.float32(1.0 / width)), np.float32)


def form_image(
    scene: FloatArray,
    style: SiteStyle,
    rng: np.random.Generator,
    grain: np.random.Generator | None = None,
) -> NDArray[np.uint8]:
    """Turn a clean scene into the image that the site's device would store.

    Args:
        scene: (H, W, C) float32, about 0 to 1; C is 1 or 3.
        style: Character of the site.
        rng: The case's stream for image formation.
        grain: Stream for the pixel noise; None takes `rng` (slices of a volume share all but the noise).

    Returns:
        (H, W, C) uint8.
    """
    size, channels = scene.shape[0], scene.shape[2]
    x, y = grid(size)
    tilt = np.asarray(style.tilt) + 0.18 * rng.standard_normal(2)
    gains = np.asarray(style.gains[:channels] if channels == 3 else (1.0,)) * np.exp(
        0.06 * rng.standard_normal(channels)
    )
    gamma = style.gamma * exp(0.12 * rng.standard_normal())
    contrast = style.contrast * exp(0.08 * rng.standard_normal())
    brightness = style.brightness + 0.03 * rng.standard_normal()
    blur = max(0.0, style.blur * (1.0 + 0.3 * rng.standard_normal())) * size
    noise = style.noise * exp(0.25 * rng.standard_normal())

    field = np.exp(tilt[0] * x + tilt[1] * y - style.vignette * (x * x + y * y)).astype(np.float32)
    image = scene * field[..., None] * gains.astype(np.float32)
    image = (image - 0.4) * np.float32(contrast) + np.float32(0.4 + brightness)
    image = np.power(np.clip(image, 0.0, 1.0), np.float32(gamma))
    if blur > 0.2:
        image = cv2.GaussianBlur(image, (0, 0), blur).reshape(scene.shape)
    pixels = grain or rng
    common = pixels.standard_normal((size, size, 1), dtype=np.float32)
    image = image + np.float32(0.7 * noise) * (common + pixels.standard_normal(scene.shape, dtype=np.float32))
    return np.asarray(np.clip(image, 0.0, 1.0) * 255.0 + 0.5, np.uint8)
