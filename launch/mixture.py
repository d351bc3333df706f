"""One mixture of Gaussians of several sites' intensities: `python -m fedseg.launch.mixture DIR [KEY=VALUE ...]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np

from fedseg.common.files import write_atomic
from fedseg.configs.compose import ConfigError
from fedseg.datamodules import DataError, MultiCenterDataModule
from fedseg.datamodules.cases import Case
from fedseg.datamodules.check.reading import open_case
from fedseg.datamodules.check.report import components_table, shares_table
from fedseg.datamodules.check.statistics import level_counts
from fedseg.datamodules.findings import Finding, refuse
from fedseg.datamodules.mixture import Levels, Mixture
from fedseg.datamodules.told import FEWEST
from fedseg.launch.command import guarded, whole
from fedseg.launch.telling import WORDS, by_site, data_of, gathered, split

HELP = """python -m fedseg.launch.mixture DIR [KEY=VALUE ...]            of all sites of DIR
python -m fedseg.launch.mixture DIR site=NAME tell=FILE.json    what a site tells: how many pixels have each level
python -m fedseg.launch.mixture told=[A.json,B.json,...]        one mixture from what sites told
python -m fedseg.launch.mixture DIR site=NAME common=FILE.json  what a site is in a mixture that was made

With masks, whoever fits the mixture sees the sums over all sites and no site's own:
python -m fedseg.launch.mixture site=NAME key=FILE              writes FILE, which stays, and FILE.pub, for the others
python -m fedseg.launch.mixture DIR site=NAME tell=FILE.json key=FILE masked=[A.pub,B.pub,C.pub]
python -m fedseg.launch.mixture told=[A.json,B.json,C.json]     of all of them

  output=FILE   of the mixture; mixture.json
  components=K  how many Gaussians; 3

Settings of the data are those of python train.py."""
OWN: Mapping[str, str] = {"output": "mixture.json", "components": "3", "common": "", **WORDS}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return guarded(_run, arguments, help=HELP)


def _run(arguments: Sequence[str]) -> None:
    own, rest = split(arguments, OWN)
    components = whole("components", own["components"], 1)
    known = _read(Path(own["common"])) if own["common"] else []
    what, seen = "how many pixels of {cases} cases of {site} have each level", "its histogram"
    sites = gathered(own, rest, Levels, lambda: dict(_levels(data_of(rest, HELP), own["site"])), what=what, seen=seen)
    if sites is None:
        return
    levels = reduce(add, sites.values())
    common = known or Mixture.of_channels([levels.counts], components)
    if len(common) != len(levels.counts):
        raise ConfigError(f"common={own['common']} is of {len(common)} channels, the images have {len(levels.counts)}")
    counts = {name: one.counts for name, one in sites.items()}
    together = bool(own["told"]) and len(sites) == 1  # a sum, of which nobody knows the parts
    shown = [components_table(common), *([] if together else [shares_table(counts, common)])]
    print("\n\n".join(table.text() for table in shown))
    if not known:
        write_atomic(
            Path(own["output"]), json.dumps({"cases": levels.cases, "channels": _plain(common)}, indent=1) + "\n"
        )
        print(f"\n{own['output']}: the mixture; a site looks itself up with site=NAME common={own['output']}")


def _plain(common: Sequence[Mixture]) -> list[dict[str, list[float]]]:
    return [{name: numbers.tolist() for name, numbers in vars(one).items()} for one in common]


def _read(path: Path) -> list[Mixture]:
    """A mixture for each channel.

    Raises:
        ConfigError: the file does not hold them.
    """
    try:
        channels = json.loads(path.read_text(encoding="utf-8"))["channels"]
        found = [Mixture(**{name: np.array(numbers, float) for name, numbers in one.items()}) for one in channels]
        whole = all(len({len(numbers) for numbers in vars(one).values()}) == 1 for one in found)
        if not found or not whole or any(one.deviations.min() <= 0 or one.shares.min() < 0 for one in found):
            raise ValueError("its numbers are none of a mixture")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"common={path} holds no mixture ({error}); take what output= wrote") from error
    return found


def _levels(data: MultiCenterDataModule, only: str) -> Iterator[tuple[str, Levels]]:
    for site, cases in by_site(data.present(refuse), only, "images").items():
        yield site, _counted(data, site, cases)


def _counted(data: MultiCenterDataModule, site: str, cases: Sequence[Case]) -> Levels:
    """Of a site's images as a network gets them, before normalisation.

    Raises:
        DataError: an image cannot be read, or they are too few to be told of.
    """
    if len(cases) < FEWEST:
        raise DataError(f"site {site!r}: {len(cases)} cases are too few to tell sums of; {FEWEST} are needed")
    return reduce(add, (Levels(1, level_counts(_image(data, case))) for case in cases))


def _image(data: MultiCenterDataModule, case: Case) -> np.ndarray:
    findings: list[Finding] = []
    image = open_case(data, case, findings).image
    for finding in findings:
        if finding.severity == "error":
            refuse(finding)
    if image is None:
        raise DataError(f"{case} cannot be read; python -m fedseg.datamodules.check says why")
    return image


if __name__ == "__main__":
    sys.exit(main())
