"""Networks of single sites that differ from the run's `model`: the setting `networks`."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping

from omegaconf import DictConfig

from fedseg.algorithms import Algorithm
from fedseg.common.names import nearest
from fedseg.configs.compose import ConfigError, compose
from fedseg.launch.settings import SCHEMA


def told(config: DictConfig) -> Mapping[str, str]:
    """Site -> settings of its network, in one string; none where all sites have the run's."""
    return config.get("networks") or {}  # older runs lack it


def network_of(config: DictConfig, site: str | None) -> DictConfig:
    """The section `model` of a site; None is the run's own.

    Raises:
        ConfigError: the site's settings are not of a network, or cannot be used.
    """
    own = told(config).get(site) if site is not None else None
    if own is None:
        found: DictConfig = config.model
        return found
    words = _words(str(site), own)
    for word in words:
        key, _, value = word.partition("=")
        if not (key == "model" or key.startswith("model.")) or key == "model.name" or value.endswith((".yaml", ".yml")):
            raise ConfigError(
                f"networks.{site}: {word!r} cannot be said of one site; write settings of its network, as in "
                "networks={" + f"{site}: model=unet model.encoder=resnet34" + "}"
            )
    try:
        found = compose(words, SCHEMA, base=config).model
    except ConfigError as error:
        raise ConfigError(f"networks.{site}: {error}") from error
    return found


def named(config: DictConfig) -> list[str]:
    """Names of all networks of single sites, which may be parts from outside the suite."""
    words = (word for site, own in told(config).items() for word in _words(site, own))
    return [word.removeprefix("model=") for word in words if word.startswith("model=")]


def _words(site: str, own: str) -> list[str]:
    """The settings in a site's string.

    Raises:
        ConfigError: it is quoted in half.
    """
    try:
        return shlex.split(own)
    except ValueError as error:
        raise ConfigError(f"networks.{site}: {own!r} cannot be read ({error}); close what it quotes") from error


def check_method(config: DictConfig, algorithm: Algorithm) -> None:
    """Refuse networks that differ where tensors of them are shared, or something of them is the same everywhere.

    Raises:
        ConfigError: naming the method or the setting, and the cure.
    """
    if not told(config):
        return
    parts = algorithm.parts
    if parts.parameters or parts.buffers or parts.taken or algorithm.trains_on == "pool":
        raise ConfigError(
            f"networks: algorithm={config.algorithm.preset} shares tensors of one network; leave networks out, or take "
            "a method whose sites may differ: algorithm=medisecfed or algorithm=local"
        )
    for setting, brings in (
        ("pretrained=null", config.pretrained),
        ("evaluation.cross_sites=false", config.evaluation.cross_sites),
        ("model.freeze_encoder=false model.lora_rank=0", parts.frozen),
    ):
        if brings:
            raise ConfigError(
                f"networks: tensors of one network would be brought to, or be the same at, all sites; take {setting}"
            )


def check_sites(config: DictConfig, seen: Collection[str]) -> None:
    """Refuse networks of sites that do not train.

    Raises:
        ConfigError: naming one.
    """
    if odd := [site for site in told(config) if site not in seen]:
        raise ConfigError(f"networks: no site {odd[0]!r} trains; {nearest(odd[0], seen)}")
