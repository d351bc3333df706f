"""Run a sweep file on this machine, without W&B: `python sweep.py method_comparison`."""

import shlex
import sys
from collections.abc import Sequence

USAGE = """python sweep.py SWEEP [output=DIR] [jobs=N] [count=N] [sweep_seed=N] [key=value ...]

  SWEEP        configs/sweep/SWEEP.yaml, or the path of a YAML file that `wandb sweep` reads
  output       folder for all runs; without it runs/NAME_OF_THE_SWEEP
  jobs         runs at a time; without it one per GPU, else one per core and thread of a run
  count        how many runs; without it all of a grid, or as many as the file's run_cap; needed where settings are
               drawn at random and there is no run_cap
  sweep_seed   of these draws
  key=value    settings for all runs, as in train.py; a setting that the sweep varies is then fixed

The same command goes on with what was stopped, and skips what is finished. Each run has a folder, and a log beside it;
sweep.csv lists all runs. Exit code 1 if a run failed; the others go on.

python sweep.py tune METHOD[,METHOD...] budget=N [output=DIR] [presets=DIR] [jobs=N] [sweep_seed=N] [metric=NAME]
                     [key=value ...]

  tune         tries settings of methods, as many trials for each, and writes presets for algorithm=FILE
  budget       trials of each method; the first is the method untuned
  output       folder of the trials; without it runs/tune
  presets      folder of the presets; without it that of the trials
  jobs         trials at a time; without it one
  metric       what is maximised: val/personal/dice, val/global/dice or val/worst_site/dice

  python sweep.py method_comparison data=folder data.root=DIR federation.rounds=50
  python sweep.py tune_ditto count=20 jobs=4
  python sweep.py tune ditto,fedprox budget=8 data=folder data.root=DIR federation.rounds=50"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    from fedseg.launch.command import guarded

    given = sys.argv[1:] if arguments is None else arguments
    return guarded(run, given, go_on=f"python sweep.py {shlex.join(given)}")


def run(arguments: Sequence[str]) -> int:
    """Run the sweep, or show help."""
    if {"--help", "-h"} & set(arguments):
        print(USAGE)
        return 0
    if not arguments or "=" in arguments[0]:
        print(USAGE, file=sys.stderr)
        return 2
    if arguments[0] == "tune":
        from fedseg.launch.tune import run_tune

        return run_tune(arguments[1:])
    from fedseg.launch.sweep import run_sweep

    return run_sweep(arguments)


if __name__ == "__main__":
    sys.exit(main())
