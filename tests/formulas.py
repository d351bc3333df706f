"""Bytes and memory of methods as the formulas of docs/methods/costs.md have them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

PAGE = Path(__file__).parent.parent / "docs" / "methods" / "costs.md"
BYTES = ("up", "down", "kept", "told")


@cache
def table(header: str) -> tuple[tuple[str, ...], ...]:
    """Rows of the page's table with these columns."""
    text = PAGE.read_text(encoding="utf-8")
    (found,) = re.findall(rf"^\| {re.escape(header)} \|\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    return tuple(tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in found.splitlines())


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]*)`", cell)


def of_network(model: nn.Module) -> dict[str, int]:
    """What the formulas ask of a network."""

    def size(part: nn.Module, floating: bool = True) -> int:
        return sum(
            t.numel() * t.element_size() for t in part.state_dict().values() if t.is_floating_point() == floating
        )

    encoder: Any = model.get_submodule("encoder")
    head = model.get_submodule("segmentation_head")
    parameters = list(model.parameters())
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    own = sum(p.numel() * p.element_size() for p in parameters)
    return {
        "P": own,
        "B": size(model) - own,
        "I": size(model, floating=False),
        "head": size(head),
        "encoder": size(encoder),
        "norms": sum(p.numel() * p.element_size() for module in norms for p in module.parameters()),
        "encoder_counters": size(encoder, floating=False),
        "tensors": len(parameters),
        "deepest": encoder.out_channels[-1],
        "last": next(m for m in head.modules() if isinstance(m, nn.Conv2d)).in_channels,
    }


def symbols(model: nn.Module, **run: int) -> dict[str, int]:
    """All symbols of the formulas, those that follow from others, too."""
    known = {**of_network(model), **run}
    for name, formula, _ in table("symbol | formula | what it is"):
        known[quoted(name)[0]] = value(quoted(formula)[0], known)
    return known


def value(formula: str, known: Mapping[str, int]) -> int:
    return int(eval(formula, {"__builtins__": {}, "max": max}, dict(known)))


def rows(header: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each method of a table and the other cells of its row."""
    for names, *cells in table(header):
        yield from ((name, tuple(cells)) for name in quoted(names))


@cache
def of_bytes() -> dict[str, tuple[str, ...]]:
    """Method -> formulas of what a site sends, receives, keeps and tells."""
    return {
        name: tuple(quoted(cell)[0] for cell in cells)
        for name, cells in rows("methods | sends | receives | keeps | tells")
    }


@cache
def of_memory() -> dict[str, tuple[str, ...]]:
    """Method -> how it is held to its formula, and that, or two."""
    return {name: (how, *quoted(formulas)) for name, (formulas, how) in rows("methods | more than FedAvg | how")}


def expected(name: str, known: Mapping[str, int]) -> dict[str, int]:
    """Bytes of a method."""
    return {what: value(formula, known) for what, formula in zip(BYTES, of_bytes()[name], strict=True)}
