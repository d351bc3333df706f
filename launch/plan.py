"""One plan for volumes of several sites: `python -m fedseg.launch.plan DIR [KEY=VALUE ...]`."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from importlib.util import find_spec
from operator import add
from pathlib import Path
from types import ModuleType
from typing import Any, cast, get_args

import numpy as np
import yaml
from numpy.typing import NDArray

from fedseg.common.files import write_atomic
from fedseg.configs.compose import ConfigError
from fedseg.datamodules import DataError, MultiCenterDataModule
from fedseg.datamodules.cases import Case
from fedseg.datamodules.check.reading import open_case
from fedseg.datamodules.findings import Finding, refuse
from fedseg.datamodules.plan import Modality, Plan, Tallies, tally
from fedseg.launch.check import UsageError, build
from fedseg.launch.command import guarded

HELP = """python -m fedseg.launch.plan DIR [KEY=VALUE ...]            one plan for all sites of DIR
python -m fedseg.launch.plan DIR site=NAME tell=FILE.json    what a site tells: histograms of its volumes
python -m fedseg.launch.plan told=[A.json,B.json,...]        one plan from what sites told

With masks, whoever plans sees the sums over all sites and no site's own:
python -m fedseg.launch.plan site=NAME key=FILE              writes FILE, which stays, and FILE.pub, for all other sites
python -m fedseg.launch.plan DIR site=NAME tell=FILE.json key=FILE masked=[A.pub,B.pub,C.pub]
python -m fedseg.launch.plan told=[A.json,B.json,C.json]     of all of them

Writes the plan as an experiment: python train.py experiment=plan.yaml data.root=DIR ...

  output=FILE   of the plan; plan.yaml
  voxels=N      of a patch, at most; 262144 (64 x 64 x 64)
  modality=ct   values in Hounsfield units, one window for all sites; mr scales each volume by itself

Settings of the data are those of python train.py."""
OWN: Mapping[str, str] = {
    "output": "plan.yaml", "voxels": str(64**3), "modality": "mr", "site": "", "tell": "", "told": "", "key": "",
    "masked": "",
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return guarded(_run, arguments)


def _run(arguments: Sequence[str]) -> None:
    if not arguments or {"--help", "-h"} & set(arguments):
        print(HELP)
        return
    own, rest = _split(arguments)
    _refuse_overwriting(own)
    if own["key"] and not own["tell"] and not own["masked"]:
        _make_key(own, rest)
        return
    keys = _keys(own) if own["key"] or own["masked"] else {}  # before any volume is read
    sites = _told(own, rest) if own["told"] else _own_data(own, rest)
    if own["tell"]:
        _tell(sites, own, keys)
        return
    plan = Plan.of(reduce(add, sites.values(), Tallies.nothing()), int(own["voxels"]), cast(Modality, own["modality"]))
    name = next((word.partition("=")[2] for word in rest if word.startswith("data=")), "folder")
    write_atomic(Path(own["output"]), yaml.safe_dump(plan.settings(name), default_flow_style=None, sort_keys=False))
    cases = ", ".join(f"{name} {told.cases}" for name, told in sites.items())
    print(f"volumes: {cases}\n\n{Path(own['output']).read_text(encoding='utf-8')}")
    print(f"python train.py experiment={own['output']} data.root=DIR ...")


def _own_data(own: Mapping[str, str], rest: Sequence[str]) -> dict[str, Tallies]:
    """Of the data in a folder, by site."""
    try:
        data, *_ = build([*rest, "data.dimensions=3"])
    except UsageError as error:
        raise ConfigError(f"{error}\n\n{HELP}") from error
    return dict(_tallies(data, own["site"]))


def _split(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The command's own words, and settings of the data."""
    given = dict(word.split("=", 1) for word in arguments if word.partition("=")[0] in OWN and "=" in word)
    own = {**OWN, **given}
    if own["modality"] not in get_args(Modality):
        raise ConfigError(f"modality={own['modality']}: {' or '.join(get_args(Modality))}")
    if not own["voxels"].isdigit() or not int(own["voxels"]):
        raise ConfigError(f"voxels={own['voxels']}: a whole number of 1 or more")
    return own, [word for word in arguments if word.partition("=")[0] not in OWN or "=" not in word]


def _refuse_overwriting(own: Mapping[str, str]) -> None:
    """Before anything is read: no file of the exchange is written over with an answer."""
    needed = [path for name in ("masked", "told") if own[name] for path in _paths(own[name])]
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


def _tell(sites: Mapping[str, Tallies], own: Mapping[str, str], keys: Mapping[str, bytes]) -> None:
    if len(sites) != 1:
        raise ConfigError(f"tell= is for one site; name it: site={next(iter(sites))}")
    ((name, told),) = sites.items()
    if keys:
        _tell_masked(name, told, own, keys)
        return
    told.save(Path(own["tell"]))
    print(
        f"{own['tell']}: histograms of {told.cases} volumes of {name}. Who reads them sees spacing and extent of each; "
        "key= and masked= hide them in a sum"
    )


def _paths(words: str) -> list[Path]:
    """Files of a list on the command line."""
    return [Path(name.strip()) for name in words.strip("[]").split(",")]


def _told(own: Mapping[str, str], rest: Sequence[str]) -> dict[str, Tallies]:
    """What sites told, by file; what they masked, together."""
    if rest:
        raise ConfigError(f"told= needs no data; leave {' '.join(rest)} out")
    files = _paths(own["told"])
    if not any(path.is_file() and b'"masked"' in path.read_bytes() for path in files):
        return {path.name: Tallies.load(path) for path in files}
    with _exchanged() as exchange:
        words, of = exchange.total(files)
    return {f"{', '.join(of.sites)} together (keys {of.number})": Tallies.of_words(words, len(of.sites))}


def _make_key(own: Mapping[str, str], rest: Sequence[str]) -> None:
    if not own["site"] or rest:
        raise ConfigError("key= without tell= makes keys: give site=NAME key=FILE and nothing else, or add tell=")
    with _exchanged() as exchange:
        public = exchange.make_key(Path(own["key"]), own["site"])
    print(f"{own['key']}: the secret key of {own['site']}, which stays here\n{public}: for every other site")


def _keys(own: Mapping[str, str]) -> dict[str, bytes]:
    """Public keys of all sites."""
    if lacking := [name for name in ("site", "tell", "key", "masked") if not own[name]]:
        raise ConfigError(f"{lacking[0]}= is missing: masked sums need site=NAME tell=FILE.json key=FILE masked=[...]")
    with _exchanged() as exchange:
        keys: dict[str, bytes] = exchange.read_keys(_paths(own["masked"]))
        exchange.secret_key(own["site"], Path(own["key"]), keys)
    return keys


def _tell_masked(name: str, told: Tallies, own: Mapping[str, str], keys: Mapping[str, bytes]) -> None:
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


def _tallies(data: MultiCenterDataModule, only: str) -> Iterator[tuple[str, Tallies]]:
    by_site: dict[str, list[Case]] = defaultdict(list)
    for case in data.survey(refuse):
        if case.labelled:
            by_site[case.site].append(case)
    if only and only not in by_site:
        raise ConfigError(f"site={only}: no labelled volumes of that site; there is {', '.join(sorted(by_site))}")
    for site in [only] if only else sorted(by_site):
        yield site, tally(site, (_looked_at(data, case) for case in by_site[site]))


def _looked_at(
    data: MultiCenterDataModule, case: Case
) -> tuple[Sequence[int], tuple[float, float, float], NDArray[Any]]:
    """Shape, spacing, and values as stored of the voxels of any region; of modalities those of the first."""
    findings: list[Finding] = []
    opened = open_case(data, case, findings)
    for finding in findings:
        if finding.severity == "error":
            refuse(finding)
    labels, (part, *_) = opened.labels, opened.parts
    if labels is None or part.spacing is None:
        raise DataError(f"{case}: its spacing is not known; give data.spacing")
    return labels.shape, part.spacing, part.images[0][np.isin(labels, sorted(data.regions.ids))]


if __name__ == "__main__":
    sys.exit(main())
