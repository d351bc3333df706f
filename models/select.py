"""Which tensors of a network: selectors over the keys of `state_dict()`.

A selector is a function from a network to a set of keys. It goes by module type and sub-module path, never by a
tensor's name: `"bn" in name` finds 85 of the 150 normalisation tensors of an smp Unet/resnet18 and none of a
mobilenet_v2. A selector that matches nothing raises, since a method told to keep tensors that do not exist is silently
another method; `nothing` is the one way to say so on purpose.
"""

from collections.abc import Callable
from itertools import chain

from timm.layers import FrozenBatchNormAct2d, RmsNorm, RmsNorm2d
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torchvision.ops import FrozenBatchNorm2d  # type: ignore[import-untyped]

from fedseg.common.names import did_you_mean, nearest
from fedseg.models.lora import LowRank

Selector = Callable[[nn.Module], frozenset[str]]

NORMS = (
    _NormBase,  # batch and instance normalisation of every dimension, timm's BatchNormAct2d
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    RmsNorm,
    RmsNorm2d,
    FrozenBatchNorm2d,
    FrozenBatchNormAct2d,
)


def nothing(model: nn.Module) -> frozenset[str]:  # noqa: ARG001  (the signature of every selector)
    """Select no tensor, on purpose."""
    return frozenset()


def everything(model: nn.Module) -> frozenset[str]:
    """Select every key of `state_dict()`."""
    return _matched(model, model.state_dict().keys(), "everything")


WITHOUT_NORMS = "the network has no normalisation layers; take another network, or another method"


def normalisation(model: nn.Module) -> frozenset[str]:
    """Select all tensors of normalisation layers: affine weights and running statistics."""
    return _matched(model, _norm_tensors(model, parameters=True), "normalisation", WITHOUT_NORMS)


def statistics(model: nn.Module) -> frozenset[str]:
    """Select the running statistics of normalisation layers (mean, variance, number of batches), not their weights."""
    cure = "group and instance normalisation keep no running statistics; use model.norm=batch"
    cure = cure if _norm_tensors(model, parameters=True) else WITHOUT_NORMS
    return _matched(model, _norm_tensors(model, parameters=False), "statistics", cure)


def lora(model: nn.Module) -> frozenset[str]:
    """Select the adapters: the small matrices beside the encoder's layers (`model.lora_rank`)."""
    return _adapters(model, "lora")


def lora_up(model: nn.Module) -> frozenset[str]:
    """Select of adapters the matrix that begins at 0; in FedSA-LoRA (Guo et al., ICLR 2025) the other is shared."""
    return _adapters(model, "lora_up", "up")


def part(*paths: str) -> Selector:
    """Select all tensors below sub-modules.

    Args:
        paths: dotted paths from the network, as in "segmentation_head" or "decoder.blocks.4".

    Raises:
        ValueError: no path, or (when applied) a path that the network does not have or that holds no tensor.
    """
    if not paths or not all(paths):
        raise ValueError(f"part() needs the paths of sub-modules, got {paths}")

    def select(model: nn.Module) -> frozenset[str]:
        return frozenset(chain.from_iterable(_below(model, path) for path in paths))

    return select


def complement(selector: Selector) -> Selector:
    """Select what `selector` leaves."""

    def select(model: nn.Module) -> frozenset[str]:
        return _matched(model, everything(model) - selector(model), "the complement")

    return select


def union(*selectors: Selector) -> Selector:
    """Select what any of the selectors selects."""

    def select(model: nn.Module) -> frozenset[str]:
        return frozenset(chain.from_iterable(selector(model) for selector in selectors))

    return select


NAMED: dict[str, Selector] = {
    "nothing": nothing,
    "everything": everything,
    "normalisation": normalisation,
    "statistics": statistics,
}
ADAPTERS: dict[str, Selector] = {"lora": lora, "lora_up": lora_up}


def named(text: str) -> Selector:
    """Read a selector from a config.

    Args:
        text: "nothing", "everything", "normalisation", "statistics", "lora", "lora_up", "part:PATH,PATH...", or several
            of them joined by "+" ("normalisation+part:segmentation_head").

    Raises:
        ValueError: an unknown word, with the nearest known one.
    """
    if "+" in text:
        return union(*(named(term) for term in text.split("+")))
    word, colon, paths = text.strip().partition(":")
    if word == "part" and colon:
        return part(*(path.strip() for path in paths.split(",")))
    selectors = NAMED | ADAPTERS
    if word in selectors and not colon:
        return selectors[word]
    known = nearest(word, [*selectors, "part:PATH,PATH"])
    raise ValueError(f"algorithm.personal: unknown selector '{text}'; {known}, joined by '+'")


def require_parts(model: nn.Module, who: str, *names: str) -> None:
    """Make sure that a network has these parts.

    Raises:
        ValueError: naming what is missing, and whose need it is.
    """
    if missing := [name for name in names if name not in dict(model.named_children())]:
        raise ValueError(
            f"{who} needs a network with the parts {', '.join(names)}; {type(model).__name__} has no "
            f"{' and no '.join(missing)} ({_parts(model)})"
        )


def _norm_tensors(model: nn.Module, *, parameters: bool) -> frozenset[str]:
    keys: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, NORMS):
            prefix = f"{name}." if name else ""
            tensors = chain(module._parameters if parameters else (), module._buffers)
            keys.update(prefix + key for key in tensors)
    return frozenset(keys) & model.state_dict().keys()


def _adapters(model: nn.Module, name: str, *names: str) -> frozenset[str]:
    adapters = {path: m for path, m in model.named_modules(remove_duplicate=False) if isinstance(m, LowRank)}
    keys = (f"{path}.{key}" for path, m in adapters.items() for key in names or m.state_dict())
    return _matched(model, keys, name, "it has no adapters; take model.lora_rank=8")


def _below(model: nn.Module, path: str) -> frozenset[str]:
    modules = dict(model.named_modules(remove_duplicate=False))
    if path not in modules:
        meant = did_you_mean(path, modules)
        raise ValueError(f"the network has no part '{path}'; {meant and f'{meant} '}it has {_parts(model)}")
    return _matched(model, (key for key in model.state_dict() if key.startswith(f"{path}.")), f"part:{path}")


def _matched(model: nn.Module, keys: object, name: str, cure: str = "") -> frozenset[str]:
    selected: frozenset[str] = frozenset(keys)  # type: ignore[call-overload]
    if not selected:
        raise ValueError(f"selector '{name}' matches no tensor of {type(model).__name__} ({cure or _parts(model)})")
    return selected


def _parts(model: nn.Module) -> str:
    return "parts: " + ", ".join(name for name, _ in model.named_children())
