"""An MRI-like scene: a prostate-like organ, at times with a lesion, in grey tissue; one slice or a volume."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedseg.datamodules.phantom.style import (
    FloatArray,
    Outline,
    SiteStyle,
    Stream,
    clouds,
    form_image,
    generator,
    grid,
    hand_of,
    soft_inside,
    waves,
)

GLAND, LESION = 1, 2
T2, DIFFUSION = "t2", "dwi"
FIELD_OF_VIEW = 120.0  # mm across the image
LENGTH = 54.0  # mm from the first to the last slice of a volume


@dataclass(frozen=True)
class _Anatomy:
    organ: Outline
    zone: Outline
    lesion: Outline
    lesion_level: float
    """Height of the lesion's centre, -1 to 1 in units of half the volume's length."""
    diseased: bool
    drift: tuple[float, float]
    """Shift of the organ's centre from the middle to the last slice."""


def draw_organ(
    seed: int,
    site: int,
    index: int,
    style: SiteStyle,
    size: int,
    slices: int,
    rater: int = 0,
    modalities: Sequence[str] = (T2,),
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """One MRI-like case.

    Returns:
        Image (slices, size, size, modalities) uint8, and label ids (slices, size, size) uint8: 0 tissue, 1 organ, 2
        lesion in it.
    """
    body = _anatomy(generator(seed, site, index, Stream.ANATOMY), style)
    texture = generator(seed, site, index, Stream.TEXTURE)
    surroundings = _Surroundings(texture, size)
    hand = hand_of(seed, site, index, rater)
    organ = body.organ.annotated(style.outline, style.smoothing, hand)
    lesion = body.lesion.annotated(style.inner_outline, style.smoothing, hand)
    levels = _levels(slices)
    images = []
    for name in modalities:
        draw, stream = MODALITIES[name]
        coils = int(generator(seed, site, index, stream).integers(2**32))  # field and settings are those of all slices
        for number, level in enumerate(levels):
            grain = np.random.Generator(np.random.Philox(np.random.SeedSequence(coils, spawn_key=(number,))))
            scene = draw(body, surroundings, level)
            images.append(form_image(scene, style, np.random.default_rng(coils), grain=grain))
    volumes = [np.stack(images[first : first + slices]) for first in range(0, len(images), slices)]
    labels = np.stack([_label(body, organ, lesion, level, size) for level in levels])
    return np.concatenate(volumes, axis=-1), labels


def spacing(size: int, slices: int) -> tuple[float, float, float]:
    """Millimetres per voxel: slice, row, column."""
    return (LENGTH / max(slices - 1, 1), FIELD_OF_VIEW / size, FIELD_OF_VIEW / size)


def _levels(slices: int) -> list[float]:
    """Heights of the slices, -1 to 1; a single slice lies in the middle."""
    return [0.0] if slices == 1 else [float(level) for level in np.linspace(-1.0, 1.0, slices)]


def _anatomy(rng: np.random.Generator, style: SiteStyle) -> _Anatomy:
    center = (0.10 * rng.uniform(-1, 1), 0.02 + 0.12 * rng.uniform(-1, 1))
    radius = 0.40 * style.size * float(np.exp(0.12 * rng.standard_normal()))
    organ = Outline(
        center, radius, 0.82 + 0.07 * rng.standard_normal(), 0.1 * rng.standard_normal(), waves(rng, range(2, 8), 0.045)
    )
    share = rng.uniform(0.5, 0.75)
    zone_center = (center[0] + 0.04 * radius * rng.standard_normal(), center[1] - radius * 0.9 * (1 - share) * 0.6)
    zone = Outline(zone_center, radius * share, organ.aspect * 0.95, organ.tilt, waves(rng, range(2, 8), 0.05))
    angle = np.pi / 2 + rng.uniform(-1.2, 1.2)  # lesions sit in the posterior (lower) half
    reach = radius * rng.uniform(0.5, 0.68)
    spot = (center[0] + reach * np.cos(angle), center[1] + reach * organ.aspect * np.sin(angle))
    lesion = Outline(
        spot,
        radius * rng.uniform(0.2, 0.34),
        rng.uniform(0.7, 1.3),
        rng.uniform(0, np.pi),
        waves(rng, range(2, 6), 0.07),
    )
    diseased = bool(rng.random() < style.prevalence)
    drift = 0.06 * rng.standard_normal(2)
    return _Anatomy(organ, zone, lesion, 0.35 * rng.uniform(-1, 1), diseased, (float(drift[0]), float(drift[1])))


def _section(outline: Outline, body: _Anatomy, level: float, middle: float, half_length: float) -> Outline | None:
    """The cut of an egg-shaped body with the plane at a level; None where the plane misses it."""
    away = (level - middle) / half_length
    if abs(away) >= 1.0:
        return None
    center = (outline.center[0] + body.drift[0] * level, outline.center[1] + body.drift[1] * level)
    return replace(outline, center=center, radius=outline.radius * float(np.sqrt(1.0 - away * away)))


def _organ_section(outline: Outline, body: _Anatomy, level: float, like: float) -> Outline | None:
    """Cut of organ or zone. An outline drawn larger than the organ also covers more slices."""
    return _section(outline, body, level, 0.0, 0.85 * outline.radius / like)


def _lesion_section(outline: Outline, body: _Anatomy, level: float) -> Outline | None:
    if not body.diseased:
        return None
    flat = body.lesion_level if level != 0.0 else 0.0
    return _section(outline, body, level, flat, 0.35 * outline.radius / body.lesion.radius)


class _Surroundings:
    """Random fields of a case's tissue; they move smoothly from slice to slice."""

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        self.size = size
        self.fat = [clouds(rng, size, 5, octaves=3) for _ in range(2)]
        self.nodules = [clouds(rng, size, 12, octaves=2) for _ in range(2)]
        self.fibres = [clouds(rng, size, 9, octaves=2) for _ in range(2)]
        self.rectum_gas = bool(rng.random() < 0.5)
        self.rectum = Outline(
            (0.1 * rng.standard_normal(), 0.74),
            rng.uniform(0.17, 0.26),
            rng.uniform(0.7, 0.95),
            0.0,
            waves(rng, range(2, 6), 0.08),
        )
        self.muscles = [
            Outline(
                (side * rng.uniform(0.74, 0.86), rng.uniform(-0.25, 0.15)),
                rng.uniform(0.24, 0.32),
                rng.uniform(1.6, 2.1),
                side * 0.25,
                waves(rng, range(2, 6), 0.06),
            )
            for side in (-1.0, 1.0)
        ]
        self.bladder = Outline(
            (0.08 * rng.standard_normal(), -0.80),
            rng.uniform(0.2, 0.36),
            rng.uniform(0.5, 0.75),
            0.0,
            waves(rng, range(2, 6), 0.06),
        )
        self.bladder_bright = rng.uniform(0.25, 0.95)
        self.zone_grey = rng.uniform(0.30, 0.46)
        self.gland_grey = rng.uniform(0.55, 0.75)
        self.capsule = rng.uniform(0.0, 0.30)
        self.edge = rng.uniform(0.025, 0.05)

    def field(self, pair: list[FloatArray], level: float) -> FloatArray:
        """Blend of two fields; unit variance at every level."""
        angle = 0.6 * level
        return np.asarray(np.cos(angle) * pair[0] + np.sin(angle) * pair[1], np.float32)


def _scene(body: _Anatomy, tissue: _Surroundings, level: float) -> FloatArray:
    """Clean picture (size, size, 1) of one slice."""
    x, y = grid(tissue.size)
    fibres = tissue.field(tissue.fibres, level)
    scene = 0.50 + 0.085 * tissue.field(tissue.fat, level) + 0.03 * fibres
    for muscle in tissue.muscles:
        scene = _paint(scene, muscle.distance(x, y), 0.20 + 0.03 * fibres, 0.03)
    distance = tissue.bladder.distance(x, y, scale=1.0 + 0.35 * level)
    scene = _paint(scene, distance, 0.24 + 0 * fibres, 0.03)
    scene = _paint(scene, distance + 0.05, tissue.bladder_bright + 0.02 * fibres, 0.03)
    distance = tissue.rectum.distance(x, y)
    scene = _paint(scene, distance, 0.30 + 0.05 * fibres, 0.03)
    content = 0.06 if tissue.rectum_gas else 0.58
    scene = _paint(scene, distance + 0.07, content + 0.04 * fibres, 0.03)
    scene = _paint_organ(scene, body, tissue, level)
    return np.asarray(scene, np.float32)[..., None]


def _diffusion(body: _Anatomy, tissue: _Surroundings, level: float) -> FloatArray:
    """Clean picture (size, size, 1) of one slice in which lesions are bright, and the organ hardly differs."""
    x, y = grid(tissue.size)
    scene = 0.26 + 0.04 * tissue.field(tissue.fat, level)
    scene = _paint(scene, tissue.bladder.distance(x, y, scale=1.0 + 0.35 * level), 0.16 + 0 * scene, 0.04)
    scene = _paint(scene, tissue.rectum.distance(x, y), 0.16 + 0 * scene, 0.04)
    organ = _organ_section(body.organ, body, level, body.organ.radius)
    if organ is not None:
        nodules = tissue.field(tissue.nodules, level)
        distance = organ.distance(x, y)
        scene = _paint(scene, distance, 0.36 + 0.06 * nodules, 0.08)
        lesion = _lesion_section(body.lesion, body, level)
        if lesion is not None:
            scene = _paint(scene, np.maximum(lesion.distance(x, y), distance), 0.72 + 0.05 * nodules, 0.05)
    return np.asarray(scene, np.float32)[..., None]


def _paint_organ(scene: FloatArray, body: _Anatomy, tissue: _Surroundings, level: float) -> FloatArray:
    x, y = grid(tissue.size)
    organ = _organ_section(body.organ, body, level, body.organ.radius)
    if organ is None:
        return scene
    nodules = tissue.field(tissue.nodules, level)
    distance = organ.distance(x, y)
    scene = scene * (1 - tissue.capsule * np.exp(-((distance / 0.03) ** 2)))
    scene = _paint(scene, distance, tissue.gland_grey + 0.05 * nodules, tissue.edge)
    zone = _organ_section(body.zone, body, level, body.zone.radius)
    lesion = _lesion_section(body.lesion, body, level)
    if zone is not None:
        inside = np.maximum(zone.distance(x, y), distance + 0.05)
        scene = _paint(scene, inside, tissue.zone_grey + 0.12 * nodules, 0.04)
    if lesion is not None:
        inside = np.maximum(lesion.distance(x, y), distance)
        scene = _paint(scene, inside, 0.17 + 0.02 * nodules, 0.03)
    return scene


def _paint(scene: FloatArray, distance: FloatArray, grey: FloatArray, width: float) -> FloatArray:
    """Cover the inside of an outline, with a soft edge."""
    inside = soft_inside(distance, width)
    return (scene * (1 - inside) + grey * inside).astype(np.float32)


MODALITIES: Mapping[str, tuple[Callable[[_Anatomy, _Surroundings, float], FloatArray], Stream]] = {
    T2: (_scene, Stream.FORMATION),
    DIFFUSION: (_diffusion, Stream.DIFFUSION),
}
"""Picture of a slice, and the stream of its formation."""


def _label(body: _Anatomy, organ: Outline, lesion: Outline, level: float, size: int) -> NDArray[np.uint8]:
    """Label ids (size, size) of one slice, as the site's annotators draw them."""
    x, y = grid(size)
    labels = np.zeros((size, size), np.uint8)
    cut = _organ_section(organ, body, level, body.organ.radius)
    if cut is not None:
        inside = cut.distance(x, y) < 0
        labels[inside] = GLAND
        spot = _lesion_section(lesion, body, level)
        if spot is not None:
            labels[inside & (spot.distance(x, y) < 0)] = LESION
    return labels
