"""A fundus-like scene: retina with vessels, optic disc with cup."""

from __future__ import annotations

import cv2
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

RIM, CUP = 1, 2
_STEP, _STEPS_OF_A_VESSEL = 0.05, 26
Path = tuple[NDArray[np.float64], float]  # points (N, 2) as column, row in -1..1; width at the start, same unit


def draw_fundus(
    seed: int, site: int, index: int, style: SiteStyle, size: int, rater: int = 0
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """One fundus-like case.

    Returns:
        Image (1, size, size, 3) uint8 and label ids (1, size, size) uint8: 0 retina, 1 rim of the disc, 2 cup.
    """
    disc, cup, temporal = _outlines(generator(seed, site, index, Stream.ANATOMY), style)
    texture = generator(seed, site, index, Stream.TEXTURE)
    scene = _retina(texture, size, disc, temporal)
    scene = _papilla(texture, scene, disc, cup, temporal)
    scene = _vessels(texture, scene, cup, temporal)
    scene = _aperture(texture, scene)
    image = form_image(scene, style, generator(seed, site, index, Stream.FORMATION))

    hand = hand_of(seed, site, index, rater)
    x, y = grid(size)
    drawn_disc = disc.annotated(style.outline, style.smoothing, hand).distance(x, y) < 0
    drawn_cup = cup.annotated(style.inner_outline, style.smoothing, hand).distance(x, y) < 0
    labels = np.where(drawn_disc, np.where(drawn_cup, CUP, RIM), 0).astype(np.uint8)
    return image[None], labels[None]


def _outlines(rng: np.random.Generator, style: SiteStyle) -> tuple[Outline, Outline, float]:
    """Disc, cup and the side of the macula (-1 left, 1 right)."""
    temporal = float(rng.choice((-1.0, 1.0)))
    center = tuple(0.22 * rng.uniform(-1, 1, 2))
    radius = 0.31 * style.size * float(np.exp(0.12 * rng.standard_normal()))
    aspect = 1.08 + 0.06 * rng.standard_normal()
    tilt = 0.25 * rng.standard_normal()
    disc = Outline((center[0], center[1]), radius, aspect, tilt, waves(rng, range(2, 8), 0.028))
    diseased = rng.random() < style.prevalence
    ratio = float(np.clip((0.64 if diseased else 0.40) + 0.07 * rng.standard_normal(), 0.25, 0.8))
    shift = 0.5 * (1.0 - ratio) * radius * np.array([0.4 * temporal, 0.0]) + 0.03 * radius * rng.standard_normal(2)
    cup = Outline(
        (center[0] + shift[0], center[1] + shift[1]), radius * ratio, aspect + 0.05, tilt, waves(rng, range(2, 8), 0.05)
    )
    return disc, cup, temporal


def _retina(rng: np.random.Generator, size: int, disc: Outline, temporal: float) -> FloatArray:
    """Background with choroidal texture, bright nerve fibres near the disc, a dark macula and a few deposits."""
    x, y = grid(size)
    pigment = rng.uniform(0.0, 1.0)
    colour = _rgb(0.80, 0.40, 0.20) * (1 - pigment) + _rgb(0.62, 0.26, 0.12) * pigment
    mottle = 0.035 * clouds(rng, size, 4, octaves=3) + 0.02 * clouds(rng, size, 20)
    tessellation = np.abs(clouds(rng, size, 9, octaves=2)) * np.float32(rng.uniform(0.0, 0.09))
    macula = _spot(x, y, disc.center[0] + 1.25 * temporal, disc.center[1] + 0.1, 0.32)
    fibres = _spot(x, y, disc.center[0], disc.center[1], 0.55)
    light = 1.0 + mottle - tessellation - 0.35 * macula + 0.16 * fibres
    deposits = np.zeros((size, size), np.float32)
    for _ in range(rng.poisson(1.5)):  # drusen and exudates: pale spots that are not the disc
        deposits += _spot(x, y, rng.uniform(-1, 1), rng.uniform(-1, 1), rng.uniform(0.02, 0.07))
    return _blend(light[..., None] * colour, _rgb(0.95, 0.78, 0.42), 0.7 * np.clip(deposits, 0, 1))


def _papilla(rng: np.random.Generator, scene: FloatArray, disc: Outline, cup: Outline, temporal: float) -> FloatArray:
    """Disc, cup and, in many eyes, a pale crescent of atrophy beside the disc that does not belong to it."""
    size = scene.shape[0]
    x, y = grid(size)
    to_disc, to_cup = disc.distance(x, y), cup.distance(x, y)
    grain = 1.0 + 0.035 * clouds(rng, size, 12, octaves=2)[..., None]
    pallor = rng.uniform(0.0, 1.0)
    rim = _rgb(0.86, 0.50, 0.26) * (1 - pallor) + _rgb(0.93, 0.63, 0.36) * pallor
    hollow = _rgb(0.98, 0.88, 0.64) + _rgb(*(0.04 * rng.standard_normal(3)))

    crescent = rng.random() < 0.45
    side = np.clip((x - disc.center[0]) * (temporal / disc.radius), 0, 1)
    atrophy = (
        soft_inside(to_disc - np.float32(rng.uniform(0.04, 0.10)), 0.03)
        * side
        * np.float32(rng.uniform(0.35, 0.75) * crescent)
    )
    scene = _blend(scene, _rgb(0.86, 0.58, 0.36) * grain, atrophy)
    scene = _blend(
        scene, rim * grain, soft_inside(to_disc, rng.uniform(0.025, 0.06)) * np.float32(rng.uniform(0.8, 0.97))
    )
    return _blend(
        scene, hollow * grain, soft_inside(to_cup, rng.uniform(0.03, 0.08)) * np.float32(rng.uniform(0.6, 0.95))
    )


def _rgb(red: float, green: float, blue: float) -> FloatArray:
    return np.array([red, green, blue], np.float32)


def _spot(x: FloatArray, y: FloatArray, column: float, row: float, radius: float) -> FloatArray:
    """Gaussian bump of height 1."""
    dx, dy = x - np.float32(column), y - np.float32(row)
    return np.exp((dx * dx + dy * dy) * np.float32(-1.0 / radius**2))


def _blend(scene: FloatArray, colour: FloatArray, weight: FloatArray) -> FloatArray:
    """Cover the scene (H, W, 3) with a colour where the weight (H, W) is 1."""
    return np.asarray(scene + (colour - scene) * weight[..., None], np.float32)


def _vessels(rng: np.random.Generator, scene: FloatArray, cup: Outline, temporal: float) -> FloatArray:
    """Arteries and veins: two arcades that bend towards the macula, and nasal branches; drawn over disc and cup."""
    size = scene.shape[0]
    absorb = np.zeros((size, size, 3), np.float32)
    source = np.array(cup.center) - np.array([0.35 * temporal * cup.radius, 0.0])
    for dark, wide in ((_rgb(0.50, 0.64, 0.53), 0.046), (_rgb(0.28, 0.50, 0.43), 0.032)):  # veins, arteries
        paths: list[Path] = []
        for up in (-1.0, 1.0):
            start = source + 0.05 * rng.standard_normal(2)
            heading = up * np.pi / 2 - up * temporal * rng.uniform(-0.35, 0.35)
            bend = -up * temporal * rng.uniform(0.5, 1.0)
            paths += _branch(rng, start, heading, bend, wide * rng.uniform(0.85, 1.15), depth=2)
            nasal = np.pi / 2 + temporal * np.pi / 2 + up * temporal * rng.uniform(0.15, 0.8)
            paths += _branch(rng, start, nasal, rng.uniform(-0.3, 0.3), 0.6 * wide, depth=1)
        absorb = np.maximum(absorb, _stroke(paths, size)[..., None] * dark)
    return np.asarray(scene * (1.0 - np.float32(rng.uniform(0.6, 1.0)) * absorb), np.float32)


def _branch(
    rng: np.random.Generator, start: NDArray[np.float64], heading: float, bend: float, width: float, depth: int
) -> list[Path]:
    """A winding vessel and its branches.

    Args:
        rng: Random numbers.
        start: Column and row of the first point.
        heading: Direction in radians at the start.
        bend: Curvature, radians per unit of length.
        width: Width at the start.
        depth: Generations of branches.
    """
    count = _STEPS_OF_A_VESSEL
    turns = heading + bend * _STEP * np.arange(count) + np.cumsum(0.13 * rng.standard_normal(count))
    points = np.empty((count + 1, 2))
    points[0] = start
    points[1:, 0] = start[0] + _STEP * np.cumsum(np.cos(turns))
    points[1:, 1] = start[1] + _STEP * np.cumsum(np.sin(turns))
    paths: list[Path] = [(points, width)]
    for _ in range(rng.integers(1, 4) if depth else 0):
        at = int(rng.integers(4, count - 2))
        fork = turns[at] + rng.choice((-1.0, 1.0)) * rng.uniform(0.4, 0.9)
        paths += _branch(rng, points[at], fork, -0.3 * bend, width * 0.6, depth - 1)
    return paths


def _stroke(paths: list[Path], size: int, fine: int = 3) -> FloatArray:
    """Coverage (size, size), 0 to 1, of tapering paths; drawn `fine` times finer and averaged."""
    canvas = np.zeros((size * fine, size * fine), np.uint8)
    scale = size * fine / 2.0
    by_thickness: dict[int, list[NDArray[np.int32]]] = {}
    for points, width in paths:
        pixels = np.round((points + 1.0) * (scale * 16)).astype(np.int32)
        for piece, taper in enumerate((1.0, 0.8, 0.6)):
            thickness = max(1, round(width * taper * scale))
            by_thickness.setdefault(thickness, []).append(pixels[piece * 9 : piece * 9 + 10])
    for thickness, pieces in by_thickness.items():
        cv2.polylines(canvas, pieces, False, 255, thickness, cv2.LINE_AA, shift=4)
    return np.asarray(cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA), np.float32) / np.float32(255.0)


def _aperture(rng: np.random.Generator, scene: FloatArray) -> FloatArray:
    """The black frame of the camera's round field, which cuts corners off."""
    x, y = grid(scene.shape[0])
    cx, cy = 0.25 * rng.uniform(-1, 1, 2)
    inside = soft_inside(np.hypot(x - cx, y - cy) - np.float32(rng.uniform(1.05, 1.45)), 0.015)
    return np.asarray(scene * inside[..., None], np.float32)
