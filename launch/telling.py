"""How sites tell numbers that add up by exchanging files: in the clear, or with masks that cancel in the sum."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedseg.configs.compose import ConfigError
from fedseg.datamodules import MultiCenterDataModule
from fedseg.datamodules.cases import Case
from fedseg.launch.check import UsageError, build

WORDS: Mapping[str, str] = {"site": "", "tell": "", "told": "", "key": "", "masked": ""}
"""Of a command line, in which these are about what is told; each command adds its own."""


class Told(Protocol):
    """What a site, or several together, tell.

    Attributes:
        cases: behind it.
    """

    @property
    def cases(self) -> int:
        """How many cases are behind it."""

    def save(self, path: Path) -> None:
        """Write it in the clear."""

    def words(self, sites: int) -> NDArray[np.uint64]:
        """As whole numbers whose sum modulo 2^64 tells the sum."""


T = TypeVar("T", bound="Told", covariant=True)


class Kind(Protocol[T]):
    """How it is read again."""

    def load(self, path: Path) -> T:
        """What `Told.save` wrote."""

    def of_words(self, words: NDArray[np.uint64], sites: int) -> T:
        """From the sum of what so many sites made."""


def data_of(words: Sequence[str], help: str) -> MultiCenterDataModule:
    """The data that words of a command line name.

    Raises:
        ConfigError: they name none; with the command's help.
    """
    try:
        data, *_ = build(words)
    except UsageError as error:
        raise ConfigError(f"{error}\n\n{help}") from error
    return data


def by_site(cases: Iterable[Case], only: str, what: str) -> dict[str, list[Case]]:
    """Cases of every site, in the order of names, or of only one.

    Args:
        cases: of all sites.
        only: the site; empty for all.
        what: the cases are, in a word or two.

    Raises:
        ConfigError: there are none, or no such site.
    """
    found: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        found[case.site].append(case)
    if not found:
        raise ConfigError(f"no site has {what}; look at data.root, data.unlabelled and data.left_out")
    if only and only not in found:
        raise ConfigError(f"site={only}: no {what} of that site; there is {', '.join(sorted(found))}")
    return {site: found[site] for site in ([only] if only else sorted(found))}


def split(arguments: Sequence[str], words: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """A command's own words, and settings of the data.

    Args:
        arguments: of the command line.
        words: its own, with their defaults.
    """
    given = dict(word.split("=", 1) for word in arguments if word.partition("=")[0] in words and "=" in word)
    return {**words, **given}, [word for word in arguments if word.partition("=")[0] not in words or "=" not in word]


def gathered(
    own: Mapping[str, str],
    rest: Sequence[str],
    kind: Kind[T],
    counted: Callable[[], dict[str, T]],
    *,
    what: str,
    seen: str,
) -> dict[str, T] | None:
    """What sites tell, from their files or from data; None where the command's part was a key or a file for others.

    Args:
        own: the command's own words.
        rest: settings of the data.
        kind: of what is told.
        counted: it, by site, of the data that are here.
        what: see `tell`.
        seen: see `tell`.

    Raises:
        ConfigError, DataError: words that do not go together, or files and data that cannot be used.
    """
    refuse_overwriting(own)
    if own["key"] and not own["tell"] and not own["masked"]:
        make_key(own, rest)
        return None
    keys = keys_of(own) if own["key"] or own["masked"] else {}  # before any image is read
    sites = told(own, rest, kind) if own["told"] else counted()
    if own["tell"]:
        tell(sites, own, keys, what, seen)
        return None
    return sites


def refuse_overwriting(own: Mapping[str, str]) -> None:
    """Before anything is read: no file of the exchange is written over with an answer."""
    needed = [path for name in ("masked", "told") if own[name] for path in paths_of(own[name])]
    if own["key"]:
        needed += [Path(own["key"]), Path(own["key"] + ".pub")]
    for name in ("tell", "output"):
        if own[name] and any(_same(Path(own[name]), path) for path in needed):
            raise ConfigError(
                f"{name}={own[name]} is a key or a file that this command reads, which it would write over; take "
                f"another {name}="
            )


def _same(one: Path, other: Path) -> bool:
    """Whether two paths are one file, by whatever names."""
    there = one.exists() and other.exists()
    return one.samefile(other) if there else one.resolve() == other.resolve()


def tell(sites: Mapping[str, Told], own: Mapping[str, str], keys: Mapping[str, bytes], what: str, seen: str) -> None:
    """Write what a site tells.

    Args:
        sites: what there is to tell, by site; one.
        own: the command's own words.
        keys: public ones of all sites, where it is masked.
        what: it is, in words.
        seen: what whoever reads it in the clear sees of the site.

    Raises:
        ConfigError: there are several sites.
    """
    if len(sites) != 1:
        raise ConfigError(f"tell= is for one site; name it: site={next(iter(sites))}")
    ((name, told),) = sites.items()
    if keys:
        _tell_masked(name, told, own, keys)
        return
    told.save(Path(own["tell"]))
    print(
        f"{own['tell']}: {what.format(cases=told.cases, site=name)}. Who reads them sees {seen}; key= and masked= hide "
        "them in a sum"
    )


def told(own: Mapping[str, str], rest: Sequence[str], kind: Kind[T]) -> dict[str, T]:
    """What sites told, by file; what they masked, together.

    Raises:
        ConfigError: settings of data stand beside it, a file is named twice, or masked files do not belong together.
    """
    if rest:
        raise ConfigError(f"told= needs no data; leave {' '.join(rest)} out")
    files = paths_of(own["told"])
    if not any(path.is_file() and b'"masked"' in path.read_bytes() for path in files):
        places = [path.resolve() for path in files]
        if twice := [str(path) for path, place in zip(files, places, strict=True) if places.count(place) > 1]:
            raise ConfigError(f"told= names {twice[-1]} twice, whose cases would count twice; leave one out")
        return {str(path): kind.load(path) for path in files}
    with _exchanged() as exchange:
        words, of = exchange.total(files)
    return {f"{', '.join(of.sites)} together (keys {of.number})": kind.of_words(words, len(of.sites))}


def paths_of(words: str) -> list[Path]:
    """Files of a list on the command line."""
    return [Path(name.strip()) for name in words.strip("[]").split(",")]


def make_key(own: Mapping[str, str], rest: Sequence[str]) -> None:
    """Make a site's pair of keys.

    Raises:
        ConfigError: more or less is said than that.
    """
    if not own["site"] or rest:
        raise ConfigError("key= without tell= makes keys: give site=NAME key=FILE and nothing else, or add tell=")
    with _exchanged() as exchange:
        public = exchange.make_key(Path(own["key"]), own["site"])
    print(f"{own['key']}: the secret key of {own['site']}, which stays here\n{public}: for every other site")


def keys_of(own: Mapping[str, str]) -> dict[str, bytes]:
    """Public keys of all sites."""
    if lacking := [name for name in ("site", "tell", "key", "masked") if not own[name]]:
        raise ConfigError(f"{lacking[0]}= is missing: masked sums need site=NAME tell=FILE.json key=FILE masked=[...]")
    with _exchanged() as exchange:
        keys: dict[str, bytes] = exchange.read_keys(paths_of(own["masked"]))
        exchange.secret_key(own["site"], Path(own["key"]), keys)
    return keys


def _tell_masked(name: str, told: Told, own: Mapping[str, str], keys: Mapping[str, bytes]) -> None:
    with _exchanged() as exchange:
        exchange.mask(told.words(len(keys)), name, Path(own["key"]), keys, Path(own["tell"]))
        number = exchange.number(keys)
    print(
        f"{own['tell']}: {name}'s part of a sum over {', '.join(sorted(keys))}; noise without the others'\n"
        f"keys {number}: compare this number with the other sites, by telephone for instance; {own['key']} is used up"
    )


@contextmanager
def _exchanged() -> Iterator[ModuleType]:
    """What masks files; its errors are for the user."""
    if find_spec("flwr") is None:
        raise ConfigError('masked sums need Flower\'s key agreement; pip install -e ".[flower]"')
    from fedseg.privacy import exchanged

    try:
        yield exchanged
    except ValueError as error:
        raise ConfigError(str(error)) from error
