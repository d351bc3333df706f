"""The only module that talks to Weights & Biases."""

import os
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from reporting import ReportingError
from reporting.folder import RunFolder, write_atomic
from reporting.overlays import Picture, best_slice, displayed

if TYPE_CHECKING:
    from wandb import Image, Run

Mode = Literal["online", "offline", "disabled"]
MOST_TABLE_ROWS = 10_000  # what W&B shows of one table


class WandbRun:
    """A run at W&B, or nothing at all when it is disabled: then the client is not even imported.

    `round` is the x-axis of every chart. The run's id is kept in the run's folder, so that a resumed run goes on
    there; under `wandb agent` the agent's id rules. Offline needs no account and no network.
    """

    def __init__(
        self,
        mode: Mode,
        folder: RunFolder,
        config: Mapping[str, Any],
        *,
        project: str | None = None,
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: Sequence[str] = (),
    ) -> None:
        """Open the run.

        Args:
            mode: Where to; "disabled" makes every method do nothing.
            folder: The run's folder; W&B's files go into its `wandb/`.
            config: The resolved configuration as plain values.
            project: W&B project; None leaves it to WANDB_PROJECT.
            entity: W&B user or team; None leaves it to WANDB_ENTITY.
            name: Display name.
            group: Runs that differ in seed or fold share a group.
            job_type: What kind of run it is, e.g. the method.
            tags: Tags.

        Raises:
            ReportingError: If W&B cannot be reached or refuses.
        """
        self._run: Run | None = None
        if mode == "disabled":
            return
        if mode == "offline":
            os.environ["WANDB_ERROR_REPORTING"] = "false"  # else the client calls home even offline
        import wandb

        try:
            self._run = wandb.init(
                mode=mode,
                dir=os.fspath(folder.path),
                id=run_id(folder),
                resume="allow"
                if mode == "online"
                else None,  # offline the id alone joins the parts when they are synced
                config=dict(config),
                allow_val_change=True,
                project=project,
                entity=entity,
                name=name,
                group=group,
                job_type=job_type,
                tags=list(tags),
            )
        except wandb.errors.Error as error:
            raise ReportingError(
                f"W&B did not open the run ({error}). Log in with `wandb login`, or set wandb.mode=offline or disabled."
            ) from error
        self._run.define_metric("round", hidden=True)
        self._run.define_metric("*", step_metric="round")

    @property
    def active(self) -> bool:
        """Whether anything is recorded."""
        return self._run is not None

    def log_round(self, round: int, values: Mapping[str, float]) -> None:
        """Add points at x = round, e.g. {"train/loss": 0.4, "site_a/val/global/dice": 0.8}; NaN is left out."""
        known = {key: float(value) for key, value in values.items() if not np.isnan(value)}
        if self._run is not None and known:
            self._run.log({"round": round, **known})

    def summarise(self, values: Mapping[str, float]) -> None:
        """Set the numbers that stand for the whole run (what a sweep reads)."""
        if self._run is not None:
            self._run.summary.update({key: float(value) for key, value in values.items() if not np.isnan(value)})

    def log_pictures(self, pictures: Sequence[Picture], regions: Sequence[str]) -> None:
        """Add one image per case with switchable masks of truth and of every view."""
        if self._run is None or not pictures:
            return
        images = [_wandb_image(picture, regions) for picture in pictures]
        self._run.log({f"{pictures[0].site}/overlays": images})

    def log_cases(self, scores: pd.DataFrame) -> None:
        """Add a table with one row per case, region, view and checkpoint, and one column per metric."""
        if self._run is None or scores.empty:
            return
        import wandb

        keys = ["checkpoint", "round", "split", "site", "seen", "view", "case", "region"]
        wide = scores.pivot_table(
            index=keys, columns="metric", values="value", dropna=False, observed=True
        ).reset_index()
        self._run.log({"cases": wandb.Table(dataframe=wide.head(MOST_TABLE_ROWS))})

    def finish(self, exit_code: int) -> None:
        """Close the run; an exit code other than 0 marks it as failed."""
        if self._run is not None:
            self._run.finish(exit_code=exit_code)
            self._run = None


def run_id(folder: RunFolder) -> str:
    """The agent's id, else the one in the folder, else a new one; kept in the folder."""
    kept = folder.wandb_id_path.read_text(encoding="utf-8").strip() if folder.wandb_id_path.exists() else ""
    chosen = os.environ.get("WANDB_RUN_ID") or kept or uuid.uuid4().hex[:12]
    if chosen != kept:
        write_atomic(folder.wandb_id_path, chosen + "\n")
    return chosen


def label_map(masks: np.ndarray[Any, np.dtype[np.bool_]]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Region index + 1 per pixel, 0 for background, from (R, H, W) bool; of overlapping regions the smaller shows."""
    ids = np.zeros(masks.shape[-2:], dtype=np.uint8)
    for region in sorted(range(len(masks)), key=lambda index: -int(masks[index].sum())):
        ids[masks[region]] = region + 1
    return ids


def _wandb_image(picture: Picture, regions: Sequence[str]) -> "Image":
    import wandb

    index = best_slice(picture)
    names = {number + 1: name for number, name in enumerate(regions)}
    layers = picture.masks
    masks = {view: {"mask_data": label_map(mask[:, index]), "class_labels": names} for view, mask in layers.items()}
    pixels = np.round(displayed(picture.image, index) * 255).astype(np.uint8)
    return wandb.Image(pixels, caption=f"{picture.role}: {picture.case}", masks=masks)
