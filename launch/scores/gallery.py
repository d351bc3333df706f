"""Chosen cases as several runs predict them, one picture per case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fedseg.launch.folders.reopen import Reopened
from fedseg.launch.folders.saved import Chosen
from fedseg.launch.scores.scoring import PAINTED, Painter, score_sites, show_all_best
from fedseg.reporting import ReportingError
from fedseg.reporting.folder import RunFolder, file_name
from fedseg.reporting.overlays import TRUTH, Picture, draw_case, save_overlays
from fedseg.reporting.summary import LAST

CaseKey = tuple[str, str]
"""Site and case."""


def draw_cases(
    runs: Mapping[str, RunFolder],
    choices: Mapping[str, Sequence[str]],
    out: Path,
    *,
    checkpoint: Chosen = "best",
    elsewhere: Sequence[str] = (),
) -> dict[CaseKey, Path]:
    """Draw test cases with the contours of the truth and of what every run's models predict.

    The runs' data is read again, one run at a time, and saved models predict anew.

    Args:
        runs: the name to show -> a run; all over the same data.
        choices: site -> names of test cases.
        out: a picture goes to OUT/SITE/CASE.png.
        checkpoint: the models that validation chose, or the last ones.
        elsewhere: see `launch.folders.reopen.settings`.

    Returns:
        (site, case) -> its picture.

    Raises:
        ReportingError: no run is named, a run's data changed or can no longer be read, a site or case is none of the
            run's test cases, or runs disagree about the truth.
        CheckpointError: a saved model is damaged or gone.
    """
    if not runs:
        raise ReportingError("no run is named whose cases could be drawn")
    found: dict[CaseKey, dict[str, Picture]] = {(site, case): {} for site, cases in choices.items() for case in cases}
    regions: Sequence[str] = ()
    for name, folder in runs.items():
        run = Reopened.read(folder, elsewhere)
        run.prepare_data()
        regions = run.experiment.data.regions.names
        for place, picture in predict_choices(run, choices, checkpoint).items():
            found[place][name] = picture
            _check_alike(place, found[place])
    drawn = {}
    for (site, case), pictures in found.items():
        drawn[site, case] = out / file_name(site) / f"{file_name(case)}.png"
        save_overlays(draw_case(pictures, regions), drawn[site, case])
    return drawn


def predict_choices(
    run: Reopened, choices: Mapping[str, Sequence[str]], checkpoint: Chosen = "best"
) -> dict[CaseKey, Picture]:
    """Predict test cases of a run, whose data is prepared, with its best or its last models.

    Raises:
        ReportingError: a site or case is none of the run's test cases.
    """
    data = run.experiment.data
    for site, cases in choices.items():
        known = {case.case for case in data.site(site).cases("test")} if site in _names(run) else set()
        unknown = [case for case in cases if case not in known]
        if unknown:
            raise ReportingError(
                f"{run.folder.path}: {unknown[0]!r} is no test case of site {site!r}; "
                f"sites: {', '.join(_names(run))}; test cases there: {', '.join(sorted(known)) or 'none'}"
            )
    painter = Painter(data.regions, choices, run.experiment.evaluation)
    federation = run.federation(painter)
    if checkpoint == LAST:
        server, round = run.snapshot.server, federation.checkpoint.round
        score_sites(federation, server, round, splits=PAINTED, checkpoint=LAST)
    else:
        show_all_best(federation)
    scores = run.folder.scores()
    places = [(site, case) for site, cases in choices.items() for case in cases]
    return {
        (site, case): painter.picture(data.site(site), case, scores, checkpoint=checkpoint) for site, case in places
    }


def _names(run: Reopened) -> tuple[str, ...]:
    return (*run.experiment.data.sites, *run.experiment.data.unseen_sites)


def _check_alike(place: CaseKey, pictures: Mapping[str, Picture]) -> None:
    (first, expected), *others = pictures.items()
    for name, picture in others:
        if not np.array_equal(picture.masks[TRUTH], expected.masks[TRUTH]):
            raise ReportingError(
                f"site {place[0]!r}, case {place[1]!r}: the truth of {name} is another one than that of {first} "
                "(other regions or other masks); draw them apart"
            )
