"""A payload as one vector: norms, flat groups, and the shapes to undo it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fedseg.federation.seeds import unforeseeable
from fedseg.federation.state import Tensors, Update
from fedseg.privacy.settings import Randomness

VALUES, PLACES, SHAPES = "values", "places", "shapes"
"""Parts of a group of which only some coordinates travel."""
PUBLIC = ("steps", "seconds")


def public_scalars(update: Update) -> dict[str, float]:
    """The scalars that may leave a site in the clear: no loss, nothing else of the images."""
    return {name: value for name, value in update.scalars.items() if name in PUBLIC}


def norm(tensors: Mapping[str, Tensors]) -> float:
    """L2 norm over every floating tensor of every group."""
    floats = (t for ts in tensors.values() for t in ts.values() if t.is_floating_point())
    return math.sqrt(sum(float(t.double().square().sum()) for t in floats))


def clipped(update: Update, limit: float) -> Update:
    """The update, shrunk as a whole so that its norm is not above the limit; a payload without a norm becomes zero.

    Float rounding cannot push it over: what is still above after shrinking is shrunk again.
    """
    length = norm(update.tensors)
    while not length <= limit:
        factor = limit / length * (1 - 1e-6) if math.isfinite(length) else 0.0
        update = replace(update, tensors={g: _scaled(ts, factor) for g, ts in update.tensors.items()})
        length = norm(update.tensors)
    return update


def flat(tensors: Tensors) -> Tensor:
    """All tensors of a group in a row, in alphabetical order: a message need not keep the order of names."""
    return torch.cat([tensors[name].reshape(-1) for name in sorted(tensors)])


def shapes(tensors: Tensors) -> Tensors:
    """The shape of every tensor."""
    return {name: torch.tensor(tensor.shape, dtype=torch.int32) for name, tensor in tensors.items()}


def restored(row: Tensor, sizes: Tensors) -> Tensors:
    """Undo `flat`.

    Raises:
        ValueError: the row is not as long as the shapes say.
    """
    forms = {name: tuple(int(n) for n in sizes[name]) for name in sorted(sizes)}
    counts = [math.prod(form) for form in forms.values()]
    if any(n < 0 for form in forms.values() for n in form) or sum(counts) != len(row):
        raise ValueError(f"{len(row)} numbers do not fill tensors of {sum(counts)}")
    return {name: part.reshape(forms[name]) for name, part in zip(forms, torch.split(row, counts), strict=True)}


def sparse(group: str, tensors: Tensors, row: Tensor, places: Tensor) -> dict[str, Tensors]:
    """A group of which only some coordinates travel, as three groups ``group:part``.

    Args:
        group: its name.
        tensors: for their shapes.
        row: all coordinates, as `flat` gives them.
        places: of those that travel.
    """
    return {
        f"{group}:{VALUES}": {VALUES: row[places]},
        f"{group}:{PLACES}": {PLACES: places.to(torch.int32)},
        f"{group}:{SHAPES}": shapes(tensors),
    }


def dense(update: Update) -> Update:
    """Undo `sparse`: zeros where nothing travelled.

    Raises:
        ValueError: parts are missing, or do not fit each other.
    """
    groups = dict.fromkeys(part.partition(":")[0] for part in update.tensors)
    return replace(update, tensors={group: _dense(update, group) for group in groups})


def generator(seed: int, randomness: Randomness) -> torch.Generator:
    """Random numbers that repeat (a simulation), or that nobody can foretell."""
    return torch.Generator().manual_seed(seed) if randomness == "seeded" else unforeseeable()


def as_tensor(content: bytes) -> Tensor:
    """Bytes as a tensor."""
    return torch.from_numpy(np.frombuffer(content, np.uint8).copy())


def as_bytes(content: Tensor | None) -> bytes:
    """Undo `as_tensor`.

    Raises:
        ValueError: there is none, or it does not hold bytes.
    """
    if content is None or content.dtype != torch.uint8 or content.ndim != 1:
        raise ValueError("bytes are missing, or are no bytes")
    return content.numpy().tobytes()


def _dense(update: Update, group: str) -> Tensors:
    try:
        values, places, sizes = (update[f"{group}:{part}"] for part in (VALUES, PLACES, SHAPES))
        chosen = places[PLACES].long()
        row = torch.zeros(sum(math.prod(shape.tolist()) for shape in sizes.values()))
        if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < len(row):
            raise ValueError("coordinates lie outside of the tensors")
        return restored(row.index_put((chosen,), values[VALUES].float()), sizes)
    except (KeyError, IndexError, RuntimeError, ValueError) as error:
        raise ValueError(f"site {update.site!r} sent no readable group {group!r}: {error}") from error


def _scaled(tensors: Tensors, factor: float) -> Tensors:
    """Every floating tensor times a factor; times zero is zero, whatever it was."""
    if factor == 0.0:
        return {name: torch.zeros_like(t) if t.is_floating_point() else t for name, t in tensors.items()}
    return {name: t * factor if t.is_floating_point() else t for name, t in tensors.items()}
