"""Leave one site out: every site in turn takes no part in training and is the test, and one table gathers the folds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from configs.compose import ConfigError
from launch.experiment import Experiment
from launch.run import Execute, default_folder, execute
from reporting.folder import RunFolder, file_name, write_atomic
from reporting.summary import Summary, summarise


def execute_folds(
    config: DictConfig, execute: Execute = execute, list_sites: Callable[[], Sequence[str]] | None = None
) -> Summary:
    """Run every fold in a folder of its own, and gather the scores of the sites held out.

    Finished folds are not repeated when the protocol is resumed, and a stopped fold goes on.

    Args:
        config: of all folds.
        execute: runs one of them.
        list_sites: names all sites, where their data are not here.

    Raises:
        ConfigError: sites are held out already, there are fewer than three, or the method has no model for an unseen
            site.
        ReportingError: the folder holds another run.
    """
    sites = _sites(config, list_sites)
    output = Path(config.output or default_folder(config))
    _open(output, config)
    for site in sites:
        folder = RunFolder(output / file_name(site))
        if folder.path.joinpath("summary.csv").is_file():
            continue
        print(f"\nfold {sites.index(site) + 1} of {len(sites)}: {site} is held out", flush=True)
        execute(_fold(config, site, folder))
    scores = pd.concat([RunFolder(output / file_name(site)).scores() for site in sites], ignore_index=True)
    held_out = scores[~scores["seen"].astype(bool)]
    summary = summarise(held_out.assign(seen=True))  # one row per site, as in an ordinary run
    write_atomic(output / "metrics.csv", held_out.to_csv(index=False))
    write_atomic(output / "summary.csv", summary.table.to_csv(index=False))
    write_atomic(output / "summary.md", summary.markdown())
    return summary


def _sites(config: DictConfig, list_sites: Callable[[], Sequence[str]] | None) -> list[str]:
    experiment = Experiment(config)
    experiment.check()
    if config.data.unseen:
        raise ConfigError("protocol=leave_one_site_out holds every site out in turn; leave data.unseen empty")
    if not experiment.algorithm(in_channels=3).unseen_views:
        raise ConfigError(
            f"algorithm={config.algorithm.preset} has no model for a site that took no part in training; "
            "protocol=leave_one_site_out needs a method with a global or an adapted model"
        )
    sites = sorted({case.site for case in experiment.data.cases()} if list_sites is None else list_sites())
    if len(sites) < 3:
        raise ConfigError(f"protocol=leave_one_site_out needs at least three sites, found {', '.join(sites)}")
    return sites


def _open(output: Path, config: DictConfig) -> None:
    RunFolder.create(output, resume=config.resume)
    write_atomic(output / "config.yaml", OmegaConf.to_yaml(config))


def _fold(config: DictConfig, site: str, folder: RunFolder) -> DictConfig:
    fold: DictConfig = config.copy()
    OmegaConf.set_readonly(fold, False)
    fold.data.unseen = [site]
    fold.protocol = "personalised"
    fold.output = str(folder.path)
    fold.resume = folder.holds_run
    fold.wandb.group = config.wandb.group or f"{config.data.preset}-{config.algorithm.preset}-leave-one-site-out"
    fold.wandb.name = f"{config.wandb.name or fold.wandb.group}-{site}-seed{config.seed}"
    OmegaConf.set_readonly(fold, True)
    return fold
