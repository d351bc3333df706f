"""One plan for volumes of several sites: `python -m fedseg.launch.plan DIR [KEY=VALUE ...]`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from operator import add
from pathlib import Path
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
from fedseg.launch.command import guarded, whole
from fedseg.launch.telling import WORDS, by_site, data_of, gathered, split

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
OWN: Mapping[str, str] = {"output": "plan.yaml", "voxels": str(64**3), "modality": "mr", **WORDS}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return guarded(_run, arguments, help=HELP)


def _run(arguments: Sequence[str]) -> None:
    own, rest = _split(arguments)
    voxels = whole("voxels", own["voxels"], 1)
    what, seen = "histograms of {cases} volumes of {site}", "spacing and extent of each"
    words = [*rest, "data.dimensions=3"]
    sites = gathered(
        own, rest, Tallies, lambda: dict(_tallies(data_of(words, HELP), own["site"])), what=what, seen=seen
    )
    if sites is None:
        return
    plan = Plan.of(reduce(add, sites.values(), Tallies.nothing()), voxels, cast(Modality, own["modality"]))
    name = next((word.partition("=")[2] for word in rest if word.startswith("data=")), "folder")
    write_atomic(Path(own["output"]), yaml.safe_dump(plan.settings(name), default_flow_style=None, sort_keys=False))
    cases = ", ".join(f"{name} {one.cases}" for name, one in sites.items())
    print(f"volumes: {cases}\n\n{Path(own['output']).read_text(encoding='utf-8')}")
    print(f"python train.py experiment={own['output']} data.root=DIR ...")


def _split(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The command's own words, and settings of the data."""
    own, rest = split(arguments, OWN)
    if own["modality"] not in get_args(Modality):
        raise ConfigError(f"modality={own['modality']}: {' or '.join(get_args(Modality))}")
    return own, rest


def _tallies(data: MultiCenterDataModule, only: str) -> Iterator[tuple[str, Tallies]]:
    labelled = (case for case in data.present(refuse) if case.labelled)
    for site, cases in by_site(labelled, only, "labelled volumes").items():
        yield site, tally(site, (_looked_at(data, case) for case in cases))


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
