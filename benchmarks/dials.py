"""When does personalising pay? Personal minus global Dice on the phantom, dial by dial.

    python -m benchmarks.dials OUT [--seeds 0 1]      prints the table, writes OUT/dials.csv and OUT/dials.png

Every setting is a run of FedAvg with local fine-tuning (both views in one run), at 64 px with the tiny network. Runs
that are in OUT already are not repeated, and a stopped one goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from launch.run import execute, read_settings

DIALS = ("appearance", "annotation", "structure", "amount")
SETTINGS = {
    "all dials 0": dict.fromkeys(DIALS, 0.0),
    **{f"{dial} 1": {**dict.fromkeys(DIALS, 0.0), dial: 1.0} for dial in DIALS},
    "all dials 1": dict.fromkeys(DIALS, 1.0),
}
COMMON = (
    "algorithm=finetune", "algorithm.finetune_steps=40", "data=phantom", "data.n_sites=4", "data.size=64",
    "data.cases_per_site=60", "model=tiny", "federation.rounds=30", "federation.evaluate_every=10",
    "federation.checkpoint_every=10", "trainer.threads=1", "evaluation.overlays=false",
)  # fmt: skip


def main() -> None:
    """Run all settings, then show the differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options = parser.parse_args()
    rows = [row for seed in options.seeds for name in SETTINGS for row in differences(options.out, name, seed)]
    table = pd.DataFrame(rows)
    table.to_csv(options.out / "dials.csv", index=False)
    print(table.groupby("setting", sort=False)[["global", "personal", "gain"]].mean().round(3).to_string())
    draw(table, options.out / "dials.png")


def differences(out: Path, name: str, seed: int) -> list[dict[str, object]]:
    """Test Dice of both views per site, for one setting and seed."""
    folder = out / f"{name.replace(' ', '-')}-seed{seed}"
    if not (folder / "summary.csv").exists():
        resume = ["resume=true"] if (folder / "config.yaml").exists() else []
        dials = [f"data.{dial}={value}" for dial, value in SETTINGS[name].items()]
        arguments = [f"output={folder}", *(resume or [*COMMON, *dials, f"seed={seed}"])]
        execute(read_settings(arguments))
    scores = pd.read_csv(folder / "metrics.csv")
    final = scores[(scores["checkpoint"] == "best") & (scores["split"] == "test") & (scores["metric"] == "dice")]
    means = final.groupby(["site", "view"])["value"].mean().unstack()
    return [
        {"setting": name, "seed": seed, "site": site, **row, "gain": row["personal"] - row["global"]}
        for site, row in means.to_dict("index").items()
    ]


def draw(table: pd.DataFrame, path: Path) -> None:
    """Gain per setting: one dot per site and seed, a bar for the mean."""
    figure = Figure(figsize=(8, 3.6), dpi=130, layout="constrained")
    axis = figure.subplots()
    for place, (_, rows) in enumerate(table.groupby("setting", sort=False)):
        axis.bar(place, rows["gain"].mean(), color="#9ecae1", width=0.7, zorder=1)
        axis.plot([place] * len(rows), rows["gain"], "o", color="#08519c", markersize=4, alpha=0.7, zorder=2)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(range(table["setting"].nunique()), list(dict.fromkeys(table["setting"])))
    axis.set_ylabel("personal minus global\n(test Dice)")
    axis.set_title("Phantom, FedAvg with fine-tuning: one dot per site and seed, bars are means", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
