"""Finished runs whose scores are drawn, with planted effects: for tests and benchmarks of comparisons."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import OmegaConf

from fedseg.common.seeds import derive_seed
from fedseg.configs.compose import compose
from fedseg.datamodules.findings import COLUMNS as FINDING_COLUMNS
from fedseg.evaluation import LENGTHS
from fedseg.launch.settings import SCHEMA
from fedseg.reporting.folder import COLUMNS, METRICS, ROUNDS, SPLITS, TRAFFIC, RunFolder

REGIONS = ("disc", "cup")
SITES = {"site_01": 24, "site_02": 24, "site_03": 24}
VIEWS = {
    "local": ("personal",),
    "fedbn": ("personal",),
    "ditto": ("global", "personal"),
    "finetune": ("global", "personal"),
}
SHARES = {"train": 0.4, "val": 0.2, "test": 0.4}


def write_run(
    path: Path,
    algorithm: str,
    seed: int = 0,
    *settings: str,
    sites: Mapping[str, int] = SITES,
    effects: Mapping[tuple[str, str], float] | None = None,
    noise: float = 0.02,
    rounds: int = 4,
    unseen: Sequence[str] = (),
    metrics: Sequence[str] = ("dice", "hd95"),
    finished: bool = True,
    images: int = 1,
    grid: str = "own",
) -> RunFolder:
    """Write a run's folder as train.py leaves it.

    Args:
        path: the folder.
        algorithm: its name.
        seed: of the run; the split follows it.
        settings: further ``key=value``.
        sites: name -> cases in all splits together.
        effects: (view, site) -> what the model adds to a case's Dice; site "" for all others.
        noise: deviation of a case's Dice from its difficulty and the effect, drawn anew for every run.
        rounds: with validation.
        unseen: sites that only test.
        metrics: dice, and others made from it.
        grid: that the final scores stand on.
        finished: whether the last and best models were scored.
        images: cases of each patient; with one, cases are patients.
    """
    folder = RunFolder(path)
    extra = [f"data.unseen=[{','.join(unseen)}]"] if unseen else []
    config = compose([f"algorithm={algorithm}", f"seed={seed}", f"output={path}", *extra, *settings], SCHEMA)
    folder.write_config(OmegaConf.to_yaml(config))
    splits = _splits(sites, seed if config.data.split_seed is None else config.data.split_seed, unseen, images)
    splits.to_csv(path / SPLITS, index=False)
    folder.write_findings([], FINDING_COLUMNS)
    views = VIEWS.get(config.algorithm.name, ("global",))
    parts = [
        _scores(splits, view, f"{algorithm} {view} {seed}", effects or {}, noise, metrics, rounds, finished)
        for view in views
    ]
    scores = pd.concat(parts, ignore_index=True)
    scores["unit"] = scores["metric"].map(lambda metric: "px" if metric in LENGTHS else "")
    scores["grid"] = scores["checkpoint"].map(lambda checkpoint: "network" if checkpoint == "round" else grid)
    scores[list(COLUMNS[METRICS])].to_csv(path / METRICS, index=False)
    seen = [site for site in sites if site not in unseen]
    _bookkeeping(path, seen, rounds, travels=algorithm != "local")
    if finished:
        folder.write_summary(pd.DataFrame(), "")
    return folder


def _splits(sites: Mapping[str, int], split_seed: int, unseen: Sequence[str], images: int) -> pd.DataFrame:
    rows = []
    for site, count in sites.items():
        generator = np.random.default_rng(derive_seed(split_seed, site))
        bounds = np.cumsum([round(share * (count // images)) for share in SHARES.values()])
        order = generator.permutation(count // images)
        for place, case in ((p, patient * images + k) for p, patient in enumerate(order) for k in range(images)):
            split = (
                "test" if site in unseen else list(SHARES)[min(int(np.searchsorted(bounds, place, side="right")), 2)]
            )
            name = f"case_{case:04d}"
            rows.append(
                {
                    "site": site,
                    "case": name,
                    "patient": name if images == 1 else f"patient_{case // images:04d}",
                    "split": split,
                    "labelled": True,
                    "seen": site not in unseen,
                }
            )
    return pd.DataFrame(rows).sort_values(["site", "case"])


def _scores(
    splits: pd.DataFrame,
    view: str,
    name: str,
    effects: Mapping[tuple[str, str], float],
    noise: float,
    metrics: Sequence[str],
    rounds: int,
    finished: bool,
) -> pd.DataFrame:
    there = splits[splits["split"] != "train"]
    if view == "personal":
        there = there[there["seen"]]
    generator = np.random.default_rng(derive_seed(0, name))
    difficulty = np.array(
        [
            np.random.default_rng(derive_seed(1, s, c)).uniform(-0.1, 0.1)
            for s, c in zip(there["site"], there["case"], strict=True)
        ]
    )
    effect = np.array([effects.get((view, site), effects.get((view, ""), 0.0)) for site in there["site"]])
    checkpoints = [("round", round) for round in range(1, rounds + 1)]
    checkpoints += [("last", rounds), ("best", max(1, rounds - 1))] if finished else []
    parts = []
    for (checkpoint, round), region in product(checkpoints, REGIONS):
        rows = there[(there["split"] == "val") & there["seen"]] if checkpoint == "round" else there
        chosen = there.index.isin(rows.index)
        learnt = 0.75 - (0.4 / round if checkpoint == "round" else 0.4 / rounds)
        dice = np.clip(learnt + (difficulty + effect)[chosen] + generator.normal(0, noise, chosen.sum()), 0, 1)
        common = rows[["site", "case", "split", "seen"]].assign(
            round=round, checkpoint=checkpoint, view=view, region=region
        )
        for metric in ("dice", "iou") if checkpoint == "round" else metrics:
            value = {"dice": dice, "iou": dice / (2 - dice)}.get(metric, 30 * (1 - dice))
            parts += [common.assign(metric=metric, value=value)]
    return pd.concat(parts, ignore_index=True)


def _bookkeeping(path: Path, sites: Sequence[str], rounds: int, *, travels: bool) -> None:
    pairs = list(product(range(1, rounds + 1), sites))
    trained = [
        {"round": r, "site": s, "task": "train", "loss": 1 / r, "steps": 10, "examples": 20, "seconds": 0.5}
        for r, s in pairs
    ]
    sent = [
        {"round": r, "site": s, "direction": way, "group": "model", "bytes": 1_000_000}
        for r, s in pairs
        for way in ("down", "up")
        if travels
    ]
    pd.DataFrame(trained, columns=list(COLUMNS[ROUNDS])).to_csv(path / ROUNDS, index=False)
    if sent:
        pd.DataFrame(sent, columns=list(COLUMNS[TRAFFIC])).to_csv(path / TRAFFIC, index=False)
    cost: dict[str, Any] = {"wall_seconds": 9.0, "cpu_seconds": 8.0, "peak_memory_bytes": 5e8, "peak_gpu_bytes": None}
    (path / "environment.json").write_text(json.dumps({"seeds": {}, "processes": [{}]}))
    (path / "cost.json").write_text(json.dumps([cost]))
