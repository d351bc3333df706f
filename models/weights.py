"""Encoder weights from a local file; nothing is ever downloaded."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

log = logging.getLogger(__name__)

DEEPEST = 8
"""Mappings within mappings that are looked into."""


def load_encoder(
    encoder: nn.Module, weights: str, name: str, key: str | None = None, renamed: Mapping[str, str] | None = None
) -> None:
    """Load an encoder's weights from a local file.

    The file must hold every tensor of the encoder (counters of batches excepted, which old files lack), under the
    encoder's names or behind a common prefix such as "encoder." or "state_dict.module.", where mappings within mappings
    count as prefixes. What it holds beyond (a classifier) is left out. Where several encoders fit (query and key,
    student and teacher), the prefix must be named.

    A first convolution of another channel number is adapted as smp does: for one channel the weights are summed over
    the file's channels, otherwise they are repeated in turn and scaled to keep the size of the response.

    Args:
        encoder: receives the weights, in place.
        weights: path of a .pt, .pth or .safetensors file with a state dict, bare or in mappings.
        name: the encoder's name, for messages.
        key: the prefix; None where one alone fits.
        renamed: pieces of names in some files, and what the encoder calls the same.

    Raises:
        FileNotFoundError: no such file; for a word such as "imagenet" the message says how to fetch the weights once.
        ValueError: the file lacks tensors of the encoder, or some have another shape; or several encoders in it fit.
    """
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(_missing_file(weights, name))
    found = _called(read_tensors(path), renamed or {})
    target = encoder.state_dict()
    required = [key for key in target if not key.endswith("num_batches_tracked")]
    sources = _chosen(required, found, key, f"{path}", name)
    loaded = {key: _fitted(found[sources[key]], target[key], f"{key} of {path}") for key in required}
    encoder.load_state_dict(target | loaded)
    log.info("%s: loaded %d tensors from %s, left out %d", name, len(loaded), path, len(found) - len(loaded))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a state dict from a file, without running code that it may hold.

    Raises:
        ValueError: the file holds no state dict.
    """
    try:
        content: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # decoders raise what they like on other bytes, and torch advises to trust them
        raise ValueError(
            f"{path} is no file of weights that can be read safely ({type(error).__name__}); save a state dict with "
            "safetensors or torch.save"
        ) from error
    tensors = dict(_flattened(content)) if isinstance(content, Mapping) else {}
    if not tensors:
        raise ValueError(f"{path} holds no state dict (a mapping from names to tensors)")
    return tensors


def _called(found: dict[str, Tensor], renamed: Mapping[str, str]) -> dict[str, Tensor]:
    for old, new in renamed.items():
        found = {name.replace(old, new): tensor for name, tensor in found.items()}
    return found


def _flattened(content: Mapping[Any, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Tensors by their dotted names."""
    for name, value in content.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping) and depth < DEEPEST:
            yield from _flattened(value, f"{prefix}{name}.", depth + 1)


def _chosen(keys: list[str], found: Mapping[str, Tensor], key: str | None, path: str, name: str) -> dict[str, str]:
    """Name of each encoder tensor in the file.

    Raises:
        ValueError: none, or more than one encoder in the file fits.
    """
    candidates = _candidates(keys, found)
    fits = {prefix: one for prefix, one in candidates.items() if all(source in found for source in one.values())}
    if key is not None:
        candidates = _under(key, candidates)
        fits = {prefix: one for prefix, one in fits.items() if prefix in candidates}
    if not candidates:
        raise ValueError(
            f"{path} holds no encoder {name} under model.encoder_weights_key={key}; the file holds {_some(found)}"
        )
    if not fits:
        nearest = max(candidates.values(), key=lambda one: _count(one, found))
        missing = [k for k in keys if nearest[k] not in found]
        raise ValueError(
            f"{path} does not fit encoder {name}: {len(missing)} of {len(keys)} tensors are missing "
            f"({_some(missing)}); the file holds {_some(found)}"
        )
    first = next(iter(fits.values()))
    if not all(_same(found[first[k]], found[other[k]]) for other in fits.values() for k in keys):
        names = " or ".join(f"model.encoder_weights_key={prefix or '.'}" for prefix in fits)
        raise ValueError(f"{path} holds {len(fits)} encoders that fit {name}; say which one is meant: {names}")
    return first


def _under(key: str, candidates: Mapping[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """The candidates of a prefix as it stands, else of those that end with it: "encoder_q." for "module.encoder_q."."""
    wanted = f"{key.strip('.')}." if key.strip(".") else ""
    exact = {prefix: one for prefix, one in candidates.items() if prefix == wanted}
    return exact or {prefix: one for prefix, one in candidates.items() if wanted and prefix.endswith(f".{wanted}")}


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def _candidates(keys: list[str], found: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """Prefix -> where each encoder tensor would lie in the file, for every prefix that explains the first of them."""
    candidates: dict[str, dict[str, str]] = {}
    for cut in ("", "model."):  # smp wraps timm's networks in a module called "model"
        short = {key: key.removeprefix(cut) for key in keys}
        first = short[keys[0]]
        prefixes = {name[: -len(first)] for name in found if name.endswith(first)} | {""}
        for prefix in sorted(prefixes):
            one = {key: prefix + short[key] for key in keys}
            if one in candidates.values():
                continue  # the same tensors, with and without smp's module
            if prefix not in candidates or _count(one, found) > _count(candidates[prefix], found):
                candidates[prefix] = one
    return candidates


def _count(one: Mapping[str, str], found: Mapping[str, Tensor]) -> int:
    return sum(source in found for source in one.values())


def _fitted(tensor: Tensor, target: Tensor, name: str) -> Tensor:
    """`tensor` with the channels of `target`, if the channels of an image are all that differs."""
    if tensor.shape == target.shape:
        return tensor
    same = tensor.ndim == target.ndim == 4 and tensor[:, 0].shape == target[:, 0].shape
    if not same or tensor.shape[1] not in (1, 3):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the encoder needs {tuple(target.shape)}")
    old, new = tensor.shape[1], target.shape[1]
    if new == 1:
        return tensor.sum(dim=1, keepdim=True)
    return tensor[:, torch.arange(new) % old] * (old / new)


def _missing_file(weights: str, name: str) -> str:
    if Path(weights).suffix or len(Path(weights).parts) > 1:
        return f"encoder_weights={weights} does not exist"
    words = "True" if name.startswith("tu-") else repr(weights)
    return (
        f"encoder_weights={weights} is not a local file. Weights known by name live on the network, and nothing is "
        f"downloaded here. Fetch them once where there is a network:\n"
        f'  python -c "import torch, segmentation_models_pytorch as smp; '
        f"torch.save(smp.encoders.get_encoder('{name}', weights={words}).state_dict(), '{name}.pt')\"\n"
        f"and pass the file: model.encoder_weights={name}.pt"
    )


def _some(keys: Iterable[str], most: int = 5) -> str:
    names = list(keys)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
