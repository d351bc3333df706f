"""Run the attacks and print their tables.

OMP_NUM_THREADS=1 python -m benchmarks.attacks OUT                     all of them, figure in OUT
OMP_NUM_THREADS=1 python -m benchmarks.attacks OUT --only recognition
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.attacks import inversion, membership, recognition

ATTACKS: dict[str, Callable[[Path], None]] = {
    "inversion": inversion.main,
    "recognition": recognition.main,
    "membership": membership.main,
}


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the figure")
    parser.add_argument("--only", nargs="+", choices=[*ATTACKS], default=[*ATTACKS])
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        ATTACKS[name](options.out)


if __name__ == "__main__":
    main()
