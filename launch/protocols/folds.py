"""Leave one site out: every site in turn takes no part in training and is the test, and one table gathers the folds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig

from fedseg.common.files import write_atomic
from fedseg.configs.compose import ConfigError, as_yaml, departing
from fedseg.datamodules.findings import refuse
from fedseg.launch.experiment import Experiment
from fedseg.launch.folders.restore import open_checkpoint
from fedseg.launch.run import (
    Execute,
    anchored,
    beside,
    default_folder,
    execute,
    finished,
    group_name,
    open_wandb,
    saved_config,
)
from fedseg.reporting.folder import METRICS, RunFolder, file_name
from fedseg.reporting.reporter import sweep_values
from fedseg.reporting.summary import Summary, summarise
from fedseg.reporting.wandb import beside_the_agent, remember_agent


def execute_folds(
    config: DictConfig, execute: Execute = execute, list_sites: Callable[[], Sequence[str]] | None = None
) -> Summary:
    """Run every fold in a folder of its own, and gather the scores of the sites held out.

    When the protocol is resumed, finished folds are not repeated unless they now have more rounds, and stopped ones go
    on. At W&B every fold is a run, and so is what they make together; under `wandb agent` the latter is the agent's.

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
    for site in sites if config.resume else ():
        open_checkpoint(RunFolder(output / file_name(site)), config)  # before anything is changed
    parent = _open(output, config)
    with beside_the_agent():
        for number, site in enumerate(sites, 1):
            folder = RunFolder(output / file_name(site))
            if finished(folder, config.federation.rounds):
                continue
            print(f"\nfold {number} of {len(sites)}: {site} is held out", flush=True)
            execute(departing(_fold(config, site, folder), beside(parent)), job_type="fold")
    held_out, summary = gather_folds(parent, [RunFolder(output / file_name(site)) for site in sites])
    run = open_wandb(config, parent, job_type=config.protocol)
    run.log_cases(held_out)
    run.summarise({**summary.values, **sweep_values(summary)})
    run.finish(exit_code=0)
    return summary


def gather_folds(parent: RunFolder, folds: Sequence[RunFolder]) -> tuple[pd.DataFrame, Summary]:
    """Write the scores of the sites held out into the folder of all folds, with their summary."""
    scores = pd.concat([fold.scores() for fold in folds], ignore_index=True)
    held_out = scores[~scores["seen"].astype(bool)]
    summary = summarise(held_out.assign(seen=True))  # one row per site, as in an ordinary run
    write_atomic(parent.path / METRICS, held_out.to_csv(index=False))
    parent.write_summary(summary.table, summary.markdown())
    return held_out, summary


def folds_finished(config: DictConfig, output: Path) -> bool:
    """Whether the protocol came to its end in a folder, with the rounds of the config or more.

    Raises:
        ConfigError, CheckpointError: the folder is damaged.
    """
    parent = RunFolder(output)
    done = parent.summary_path.is_file() and saved_config(parent).federation.rounds >= config.federation.rounds
    return done and all(finished(fold, config.federation.rounds) for fold in parent.folds())


def _sites(config: DictConfig, list_sites: Callable[[], Sequence[str]] | None) -> list[str]:
    experiment = Experiment(config)
    experiment.check()
    if config.data.unseen:
        raise ConfigError("protocol=leave_one_site_out holds every site out in turn; leave data.unseen empty")
    if not experiment.declared.unseen_views:
        raise ConfigError(
            f"algorithm={config.algorithm.preset} has no model for a site that took no part in training, since "
            f"{experiment.declared.none_elsewhere or 'it pre-trains an encoder'}; protocol=leave_one_site_out needs a "
            "method that has one"
        )
    sites = sorted({case.site for case in experiment.data.present(refuse)} if list_sites is None else list_sites())
    if len(sites) < 3:
        raise ConfigError(f"protocol=leave_one_site_out needs at least three sites, found {', '.join(sites)}")
    return sites


def _open(output: Path, config: DictConfig) -> RunFolder:
    folder = RunFolder.create(output, resume=config.resume)
    remember_agent(folder)
    write_atomic(folder.config_path, as_yaml(anchored(config)))
    folder.summary_path.unlink(missing_ok=True)  # until all folds are done again
    return folder


def _fold(config: DictConfig, site: str, folder: RunFolder) -> DictConfig:
    group = group_name(config)
    return departing(
        config,
        {
            "data.unseen": [site],
            "protocol": "personalised",
            "output": str(folder.path),
            "resume": folder.holds_run,
            "wandb.group": group,
            "wandb.name": f"{config.wandb.name or group}-{site}-seed{config.seed}",
        },
    )
