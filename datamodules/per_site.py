"""What differs from site to site: a mapping under data.per_site, or DIR/<site>/site.yaml."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from fedseg.common.names import nearest
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.pairing import MissingMasks
from fedseg.datamodules.readers import Reading
from fedseg.datamodules.readers.settings import READ_BY

FILE = "site.yaml"
_types = typing.get_type_hints(Reading)
_of_others = ("ids", "regions", "ignored", "frame")  # what data.regions and its neighbours say for all, and a case
READING: Mapping[str, Any] = {one.name: _types[one.name] for one in fields(Reading) if one.name not in _of_others}
FILES: Mapping[str, Any] = {
    "images": str,
    "masks": str,
    "mask_suffix": str,
    "missing_masks": MissingMasks,
    "modalities": tuple[str, ...],
    "patient_pattern": str,
    "raters": tuple[str, ...],
}
"""Of the layout ROOT/<site>/images: names of the folders, and the settings of the same name under data."""


class PerSite:
    """The settings of every site that departs from ``data.``.

    Args:
        given: Site to key to value.
        common: How files are read where a site says nothing.
        keys: Further keys that a site may set, with their types.

    Raises:
        DataError: An unknown key, or a value that cannot be used.
    """

    def __init__(
        self, given: Mapping[str, Mapping[str, Any]], common: Reading, keys: Mapping[str, Any] | None = None
    ) -> None:
        self.common = common
        self.types = {**READING, **(keys or {})}
        self._told: dict[str, dict[str, Any]] = {}
        self._readings: dict[str, Reading] = {}
        for site, settings in given.items():
            self.add(site, settings, f"data.per_site.{site}")

    def add(self, site: str, settings: Any, source: str) -> None:
        """What a site says; it may say the same twice.

        Args:
            site: Its name.
            settings: Key to value.
            source: Who says so, for messages.

        Raises:
            DataError: An unknown key, a value that cannot be used, or another one than was said before.
        """
        if not isinstance(settings, Mapping):
            raise DataError(f"{source}: expected lines such as 'mask_suffix: _mask', got {settings!r}")
        told = self._told.get(site, {})
        for key, value in settings.items():
            if key not in self.types:
                raise DataError(f"{source}: unknown key {key!r}; {nearest(str(key), self.types)}")
            checked = self._checked(key, value, source)
            if told.get(key, checked) != checked:
                raise DataError(
                    f"{source}: {key} is {checked!r}, but {told[key]!r} was said before (data.per_site, {FILE} or a "
                    "column of the manifest); make them agree"
                )
            told = {**told, key: checked}
        own = {key: value for key, value in told.items() if key in READING}
        try:
            self._readings[site] = _departing(self.common, own)
        except DataError as error:
            raise DataError(f"{source}: {error}") from None
        for key, intensity in READ_BY.items():
            if key in own and (taken := self._readings[site].intensity) != intensity:
                raise DataError(
                    f"{source}: {key} has no effect with intensity={taken}; say intensity: {intensity} beside it, or "
                    "leave it out"
                )
        self._told[site] = told

    def check_common(self, sites: Iterable[str]) -> None:
        """Refuse settings for all sites that the reading of none takes up.

        Args:
            sites: all of them, of whom what each says for itself is known.

        Raises:
            DataError: naming the setting and the cure.
        """
        usual, taken = Reading(), {self.common.intensity, *(self.reading(site).intensity for site in sites)}
        for name, intensity in READ_BY.items():
            if getattr(self.common, name) != getattr(usual, name) and intensity not in taken:
                raise DataError(
                    f"data.{name} has no effect with data.intensity={self.common.intensity}; take "
                    f"data.intensity={intensity}, or leave it out (a site with values of its own says both for itself, "
                    f"under data.per_site, in its {FILE} or in the manifest)"
                )

    def _checked(self, key: str, value: Any, source: str) -> Any:
        try:
            if isinstance(value, Mapping):
                value = {str(name): entry for name, entry in value.items()}  # 255 and '255' are one stored value
            return TypeAdapter(self.types[key]).validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            raise DataError(f"{source}: {key}={value!r} cannot be used ({first['msg']})") from error

    def load(self, site: str, folder: Path) -> None:
        """What ``FILE`` in a site's folder says, if there is one.

        Raises:
            DataError: It cannot be read or used.
        """
        path = folder / FILE
        if not path.is_file():
            return
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read ({error}); save it as text in UTF-8") from error
        self.add(site, _texts(text, str(path)) or {}, str(path))

    def add_cells(self, site: str, cells: Mapping[str, str], source: str) -> None:
        """What columns of a manifest say; see :meth:`add`.

        Raises:
            DataError: It cannot be read or used.
        """
        self.add(site, {key: _texts(cell, f"{source}: {key}") for key, cell in cells.items()}, source)

    @property
    def sites(self) -> tuple[str, ...]:
        """Sites that depart."""
        return tuple(sorted(self._told))

    def get(self, site: str, key: str, common: Any) -> Any:
        """A site's own value, else the common one."""
        return self._told.get(site, {}).get(key, common)

    def reading(self, site: str) -> Reading:
        """How the files of a site are read."""
        return self._readings.get(site, self.common)

    def told(self) -> dict[str, dict[str, Any]]:
        """All of it, as ``data.per_site`` takes it."""
        plain = {
            site: {key: TypeAdapter(self.types[key]).dump_python(value, mode="json") for key, value in told.items()}
            for site, told in self._told.items()
        }
        return {site: settings for site, settings in sorted(plain.items()) if settings}


def _texts(written: str, source: str) -> Any:
    """YAML in which every value stays the text that it is."""
    try:
        return yaml.BaseLoader(written).get_single_data()  # makes texts, lists and mappings only
    except yaml.YAMLError as error:
        raise DataError(f"{source} cannot be read ({error}); write values as in {{255: 1}} or [0.5, 0.5]") from error


def _departing(common: Reading, own: Mapping[str, Any]) -> Reading:
    """The common reading but for a site's own settings."""
    return Reading(**{**{field.name: getattr(common, field.name) for field in fields(Reading)}, **own})
