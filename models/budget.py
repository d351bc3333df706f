"""How large a network may be."""

from torch import nn


def keep_within(model: nn.Module, most: int | None) -> None:
    """Refuse a network with more parameters than a site can hold or send.

    Args:
        model: the network.
        most: so many numbers; None for no limit.

    Raises:
        ValueError: with the numbers of its parts.
    """
    if most is None or (count := sum(p.numel() for p in model.parameters())) <= most:
        return
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    told = ", ".join(f"{name} {numbers:,}" for name, numbers in parts.items())
    raise ValueError(
        f"model.max_parameters={most}: the network has {count:,} parameters ({told}); take a smaller one "
        f"(model=tiny has 1.6 million, model=nca ten thousand), or model.max_parameters={count}"
    )
