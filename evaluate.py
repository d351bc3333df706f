"""Score a run's saved models again: `python evaluate.py RUN`. The numbers must equal those of the run."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pandas import DataFrame

    from fedseg.reporting.folder import RunFolder

USAGE = """python evaluate.py RUN [evaluation.grid=own] [data.root=DIR] [trainer.accelerator=cpu] [trainer.threads=N]

  RUN            the folder of a finished or stopped run, or of one that held sites out in turn: each fold is scored
  evaluation.grid=own|network   the grid to score on; without it that of the run, of older runs the cases' own
  evaluation.cross_sites=true   also score every site's personal model at all other sites: RUN/cross_sites.csv
  data.root=DIR  where its data lie now, if they were moved

Scores the last and the best saved models on the validation and test cases of every site, prints the summary, writes
RUN/rescored.csv, and says by how much scores differ from those in RUN/metrics.csv (exit code 1 if they do, or if a run
that did its last round has none there). Final scores on another grid than those in RUN/metrics.csv take their place
there, in the summary and in config.yaml; the earlier ones are kept beside them. A run made on a GPU is scored on the
CPU where there is none; other arithmetic then moves scores by a little."""

TOLERANCE = 1e-6


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    from fedseg.launch.command import guarded

    return guarded(run, arguments)


def run(arguments: Sequence[str]) -> int:
    """Score again, and compare."""
    if {"--help", "-h"} & set(arguments):
        print(USAGE)
        return 0
    if not arguments or "=" in arguments[0]:
        print(USAGE, file=sys.stderr)
        return 2
    from fedseg.launch.protocols.folds import gather_folds
    from fedseg.launch.scores.rescore import folds_of
    from fedseg.reporting import ReportingError
    from fedseg.reporting.folder import RunFolder

    folder = RunFolder(arguments[0])
    if not folder.holds_run:
        raise ReportingError(f"{folder.path} holds no run (no config.yaml)")
    if not (folds := folds_of(folder)):
        return score_again(folder, arguments[1:])
    codes = []
    for fold in folds:
        print(f"\n{fold.path.name} was held out")
        codes.append(score_again(fold, arguments[1:]))
    if folder.summary_path.is_file():
        _, summary = gather_folds(folder, folds)
        print(f"\nall folds\n{summary.text(sys.stdout)}")
    else:
        print(
            f"\nnot all folds are done, and none are gathered; go on: python train.py output={folder.path} resume=true"
        )
    return max(codes)


def score_again(folder: "RunFolder", overrides: Sequence[str]) -> int:
    """One run; returns the exit code."""
    from fedseg.common.files import write_atomic
    from fedseg.launch.scores.rescore import rescore, rescore_across
    from fedseg.reporting.crossing import matrix, matrix_table
    from fedseg.reporting.summary import summarise

    before = folder.scores()
    scores = rescore(folder, overrides)
    write_atomic(folder.path / "rescored.csv", scores.to_csv(index=False))
    print(summarise(scores).text(sys.stdout))
    code = _compared(folder, scores, before)
    if rescore_across(folder, overrides):
        print(f"\n{matrix_table(matrix(folder.cross_sites())).text(sys.stdout)}")
    return code


def _compared(folder: "RunFolder", scores: "DataFrame", before: "DataFrame") -> int:
    """Say by how much new scores differ from those of the run, or let them take their place; the exit code."""
    from fedseg.launch.scores.rescore import adopt, difference, last_round_done, other_grid, without_older_definition

    if grid := other_grid(scores, before):
        kept = adopt(folder, scores)
        print(
            f"\nmetrics.csv held final scores on another grid ({grid}): the new ones took their place, and {kept.name}"
        )
        print("keeps the earlier ones")
        return 0
    scores, before, older = without_older_definition(scores, before)
    gap, compared = difference(scores, before)
    if not before["checkpoint"].isin(["last", "best"]).any():
        print("\nmetrics.csv has no final scores to compare with")
        return int(last_round_done(folder))
    print(f"\n{compared} of {len(scores)} scores are also in metrics.csv; the largest difference is {gap:.2g}")
    if older:
        told = "are not compared: their cases do not show the region, and older versions counted them"
        print(f"{older} scores {told}")
    return 0 if gap <= TOLERANCE and compared == len(scores) else 1


if __name__ == "__main__":
    sys.exit(main())
