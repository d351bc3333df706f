"""Settings that are no part of what a run computes."""

CIRCUMSTANCE = (
    "output",
    "resume",
    "experiment",
    "wandb.",
    "loggers",
    "trainer.accelerator",
    "trainer.threads",
    "trainer.workers",
    "trainer.deterministic",
    "data.root",
    "data.cache",
    "data.cache_dir",
    "data.workers",
    "deployment.patience",
    "deployment.timeout",
    "deployment.cores",
    "deployment.gpus",
    "evaluation.overlays",
    "evaluation.predictions",
)
"""Beginnings of their keys: where, how fast and under which name a run computes. A resumed run may change them."""
ENGINE = ("engine", "deployment.")
"""Where sites are. The result is the same everywhere, but a run stays where it began: what sites keep lies there."""
ELSEWHERE = (
    "data.root",
    "data.manifest",
    "data.public",
    "data.left_out",
    "data.cache",
    "data.cache_dir",
    "data.workers",
    "trainer.accelerator",
    "trainer.threads",
)
"""Settings that say where a run's data lie now, and how this machine computes."""
