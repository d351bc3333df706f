"""Encoder weights from a local file; nothing is ever downloaded."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

log = logging.getLogger(__name__)

WRAPPERS = ("state_dict", "model_state_dict", "model", "encoder")


def load_encoder(encoder: nn.Module, weights: str, name: str) -> int:
    """Load an encoder's weights from a local file.

    The file must hold every tensor of the encoder (counters of batches excepted, which old files lack), under the
    encoder's names or behind a common prefix such as "encoder." or "module.". What it holds beyond (a classifier) is
    left out. A first convolution of another channel number is adapted as smp does: for one channel the weights are
    summed over the file's channels, otherwise they are repeated in turn and scaled to keep the size of the response.

    Args:
        encoder: receives the weights, in place.
        weights: path of a .pt, .pth or .safetensors file with a state dict, bare or in a usual wrapper.
        name: the encoder's name, for messages.

    Returns:
        Number of tensors loaded.

    Raises:
        FileNotFoundError: no such file; for a word such as "imagenet" the message says how to fetch the weights once.
        ValueError: the file lacks tensors of the encoder, or some have another shape.
    """
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(_missing_file(weights, name))
    found = read_tensors(path)
    target = encoder.state_dict()
    required = [key for key in target if not key.endswith("num_batches_tracked")]
    sources = _sources(required, found)
    missing = [key for key in required if sources[key] not in found]
    if missing:
        raise ValueError(
            f"{path} does not fit encoder {name}: {len(missing)} of {len(required)} tensors are missing "
            f"({_some(missing)}); the file holds {_some(found)}"
        )
    loaded = {key: _fitted(found[sources[key]], target[key], f"{key} of {path}") for key in required}
    encoder.load_state_dict(target | loaded)
    log.info("%s: loaded %d tensors from %s, left out %d", name, len(loaded), path, len(found) - len(loaded))
    return len(loaded)


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
    while isinstance(content, Mapping):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise ValueError(f"{path} holds no state dict (a mapping from names to tensors)")
    return tensors


def _sources(keys: list[str], found: Iterable[str]) -> dict[str, str]:
    """Name of each encoder tensor in the file, under the prefix that explains most of them."""
    names = set(found)
    candidates = []
    for cut in ("", "model."):  # smp wraps timm's networks in a module called "model"
        short = {key: key.removeprefix(cut) for key in keys}
        ends = [name for name in names if name.endswith(short[keys[0]])]
        prefixes = {name[: -len(short[keys[0]])] for name in ends} | {""}
        candidates += [{key: prefix + short[key] for key in keys} for prefix in sorted(prefixes)]
    return max(candidates, key=lambda candidate: len(names.intersection(candidate.values())))


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
