"""Settings of runs that are over in seconds; a test adds what it is about."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from fedseg.launch.run import read_settings

TINY = (
    "data.cases_per_site=8",
    "data.amount=0",
    "data.size=32",
    "data.resolution=32",
    "data.batch_size=2",
    "model=tiny",
    "model.encoder_depth=2",
    "model.decoder_channels=[16, 8]",
    "federation.local_steps=1",
    "trainer.threads=1",
    "trainer.accelerator=cpu",
    "evaluation.overlays=false",
)


def phantom_run(sites: int, folder: Path, *more: str) -> DictConfig:
    """So many sites of the phantom, the last of which takes no part; two rounds of one step."""
    return read_settings([
        "data=phantom", f"data.n_sites={sites}", "data.cases_per_site=8", "data.amount=0", "data.size=32",
        "data.resolution=32", f"data.unseen=[site_{sites:02}]", "model=tiny", "federation.rounds=2",
        "federation.local_steps=1", "trainer.accelerator=cpu", "trainer.threads=1", "evaluation.metrics=[dice]",
        "evaluation.overlays=false", f"output={folder}", *more,
    ])  # fmt: skip
