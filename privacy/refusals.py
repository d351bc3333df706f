"""Why a method cannot be served: what it needs beyond one weighted mean."""

from __future__ import annotations

from fedseg.federation.contract import ServerHalf


def refuse_single(algorithm: ServerHalf, why: str) -> None:
    """Refuse a method that needs more of a site than its part in a mean.

    Args:
        algorithm: the method.
        why: what forbids it, for the message.

    Raises:
        ValueError: naming everything that stands against it.
    """
    if algorithm.trains_on == "pool":
        raise ValueError(f"{why}, but pooled training holds all data in one place: no update leaves a site")
    if not algorithm.shares:
        raise ValueError(f"{why}, but the method shares nothing: no update leaves a site")
    if reasons := shown_singly(algorithm):
        raise ValueError(f"{why}, but {type(algorithm).__name__} {'; '.join(reasons)}")


def refuse_inexact(algorithm: ServerHalf, why: str) -> None:
    """Refuse a method whose server computes with groups that must arrive as they were sent.

    Args:
        algorithm: the method.
        why: what would change them, for the message.

    Raises:
        ValueError: naming the groups.
    """
    if groups := ", ".join(sorted(algorithm.exact_groups)):
        raise ValueError(f"{why}, but {type(algorithm).__name__} computes with the group {groups} (exact_groups)")


def shown_singly(algorithm: ServerHalf) -> list[str]:
    """What the server or peers see of one site alone, or beside the weighted mean, as declared."""
    groups = ", ".join(sorted(algorithm.per_site))
    uniform = ", ".join(sorted(algorithm.uniform_groups))
    declared = {
        f"shows the group {groups} of each site singly (per_site)": bool(algorithm.per_site),
        f"averages the group {uniform} with weights of its own (uniform_groups)": bool(algorithm.uniform_groups),
        "compares the updates of a round with each other (reads_updates)": algorithm.reads_updates,
        "tells the server of a site's data before round 1 (introduces)": algorithm.introduces,
        "publishes every site's personal model after training (adapts)": algorithm.adapts,
    }
    return [reason for reason, holds in declared.items() if holds]
