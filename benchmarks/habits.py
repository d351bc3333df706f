"""Are sites' habits of outlining found? FedAvg on the phantom, whose habits are known, with and without other devices.

    python -m benchmarks.habits                       three phantoms, six sites, with data.appearance of 0 and of 1
    python -m benchmarks.habits --method finetune     any method with a global model

The estimate is that of the run's table (`reporting.habits`): best global model, validation cases. What is known is the
same distance of the drawn outline from the true one, which the phantom draws with data.annotation=0.
"""

from __future__ import annotations

import argparse
import tempfile

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from fedseg import api
from fedseg.datamodules.phantom.data import PhantomDataModule, draw_case
from fedseg.datamodules.phantom.style import Dials
from fedseg.evaluation import OFFSET, score
from fedseg.reporting.habits import habits

COMMON = ("experiment=benchmark", "data.n_sites=6", "data.annotation=1", "evaluation.metrics=[dice,offset]")


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="fedavg")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--appearance", type=float, nargs="+", default=[0.0, 1.0])
    options = parser.parse_args()
    print("appearance  seed  region  correlation  rank correlation  slope  largest error, px  spread known, px")
    for appearance in options.appearance:
        for seed in options.seeds:
            for region, both in found(options.method, seed, appearance).groupby("region"):
                line = np.polyfit(both["known"], both["larger"], 1)[0]
                r, rank = np.corrcoef(both["known"], both["larger"])[0, 1], spearmanr(both["known"], both["larger"])[0]
                miss, spread = (both["known"] - both["larger"]).abs().max(), both["known"].std()
                told = f"{r:11.2f}  {rank:16.2f}  {line:5.2f}  {miss:17.2f}  {spread:16.2f}"
                print(f"{appearance:10}  {seed:4}  {region:6}  {told}", flush=True)


def found(method: str, seed: int, appearance: float) -> pd.DataFrame:
    """Columns of `habits`, and beside them what is known."""
    with tempfile.TemporaryDirectory() as folder:
        settings = (f"algorithm={method}", f"data.appearance={appearance}", f"output={folder}/run")
        run = api.run(*COMMON, *settings, f"seed={seed}", f"data.phantom_seed={seed}")
        estimate = habits(run.folder.scores())
        data = api.load_sites(*COMMON, *settings, f"data.phantom_seed={seed}", f"data.split_seed={seed}")
    assert isinstance(data, PhantomDataModule)
    known = habits(true_offsets(data))
    return estimate.merge(known[["site", "region", "larger"]].rename(columns={"larger": "known"}))


def true_offsets(data: PhantomDataModule) -> pd.DataFrame:
    """Scores of a model that draws the true outline at every validation case, as of metrics.csv."""
    careful = Dials(data.dials.appearance, 0, data.dials.structure, data.dials.amount)
    fixed = {"round": 0, "checkpoint": "best", "seen": True, "split": "val", "view": "global", "metric": OFFSET}
    rows = []
    for site in data.sites:
        for case in data.site(site).cases("val"):
            place, index = (int(name.rsplit("_", 1)[1]) - 1 for name in (case.site, case.case))
            drawn, true = (
                np.asarray(
                    draw_case(data.anatomy, data.phantom_seed, place, index, dials, resolution=data.resolution).labels
                )
                for dials in (data.dials, careful)
            )
            for region, ids in data.regions.labels.items():
                value = score(np.isin(true, ids), np.isin(drawn, ids), None, [OFFSET], 1.0)[OFFSET]
                rows.append({**fixed, "site": site, "region": region, "case": case.case, "value": value, "unit": "px"})
    return pd.DataFrame(rows).assign(grid="own")


if __name__ == "__main__":
    main()
