"""Time and memory of comparing 60 runs with 200 test cases each, in a fresh process: `python -m benchmarks.compare`.

The runs' folders are drawn, not trained (12 methods x 5 seeds, six sites). Limits: 30 seconds, 1 GB.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.run_folders import write_run

SECONDS, BYTES = 30.0, 1e9
SEEDS = 5
SITES = {f"site_{number:02d}": 83 for number in range(1, 7)}  # 40 % of them test: 33 cases each, about 200 in all
METHODS = ("local", "pooled", "fedavg", "fedbn", "ditto", "finetune", "fedprox")
KNOBS = (
    "ditto algorithm.lam=1",
    "ditto algorithm.lam=0.01",
    "fedprox algorithm.mu=0.1",
    "fedprox algorithm.mu=1.0",
    "finetune algorithm.finetune_steps=40",
)
ALL_METRICS = ("dice", "iou", "hd95", "assd", "nsd", "missed")
MEASURE = """
import sys, time
start = time.perf_counter()
import compare
from fedseg.reporting.environment import peak_memory
code = compare.main([sys.argv[1], "output=" + sys.argv[2]])
print(f"MEASURED {time.perf_counter() - start} {time.process_time()} {peak_memory()} {code}")
"""


def main() -> int:
    """Make the folders, compare them, print one table; 1 if a limit is exceeded."""
    with tempfile.TemporaryDirectory() as place:
        runs = Path(place) / "runs"
        started = time.perf_counter()
        for line in (*METHODS, *KNOBS):
            algorithm, *settings = line.split()
            for seed in range(SEEDS):
                effects = {("personal", ""): 0.02, ("personal", "site_03"): -0.03}
                write_run(
                    runs / f"{line}-{seed}",
                    algorithm,
                    seed,
                    *settings,
                    sites=SITES,
                    effects=effects,
                    rounds=20,
                    metrics=ALL_METRICS,
                )
        made = time.perf_counter() - started
        size = sum(path.stat().st_size for path in runs.rglob("*") if path.is_file())
        command = [sys.executable, "-c", MEASURE, str(runs), str(Path(place) / "report")]
        answer = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    measured = [line.split()[1:] for line in answer.stdout.splitlines() if line.startswith("MEASURED")]
    if answer.returncode or not measured or measured[0][3] != "0":
        print(answer.stdout, answer.stderr, sep="\n", file=sys.stderr)
        return 1
    seconds, cpu, peak = (float(value) for value in measured[0][:3])
    print(f"{len(METHODS + KNOBS) * SEEDS} runs, {size / 1e6:.0f} MB of folders, made in {made:.0f} s")
    print(f"{'':<12}{'measured':>10}{'limit':>8}")
    print(f"{'wall s':<12}{seconds:>10.1f}{SECONDS:>8.0f}\n{'CPU s':<12}{cpu:>10.1f}")
    print(f"{'peak MB':<12}{peak / 1e6:>10.0f}{BYTES / 1e6:>8.0f}")
    return 0 if seconds <= SECONDS and peak <= BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
