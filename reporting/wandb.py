"""The only module that talks to Weights & Biases."""

import os
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import pandas as pd

from fedseg.common.files import write_atomic
from fedseg.common.text import printable
from fedseg.reporting import ReportingError
from fedseg.reporting.folder import METRICS, SPLITS, RunFolder
from fedseg.reporting.overlays import Picture, best_slice, displayed, shrunk

if TYPE_CHECKING:
    from wandb import Image, Run

Mode = Literal["online", "offline", "disabled"]
LONGEST_SIDE = 1024  # of an image there, in pixels
FINISH_SECONDS = 300.0  # a run whose numbers are in its folder does not wait longer for uploads
MOST_TABLE_ROWS = 10_000  # what W&B shows of one table
RUN_ID = "WANDB_RUN_ID"
AGENT = (RUN_ID, "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH")  # what `wandb agent` tells the process that it starts
_beside: ContextVar[bool] = ContextVar("beside", default=False)  # whether runs opened now belong to an agent's sweep


class RunAddress(NamedTuple):
    """Where a run is at W&B; its folder keeps it as ENTITY/PROJECT/ID, or as much of that as is known."""

    id: str = ""
    project: str | None = None
    entity: str | None = None

    @classmethod
    def of(cls, folder: RunFolder) -> "RunAddress":
        """What the folder remembers; nothing in a new one."""
        path = folder.wandb_id_path
        return cls(*reversed(path.read_text(encoding="utf-8").strip().split("/")[-3:])) if path.exists() else cls()

    def remember(self, folder: RunFolder) -> None:
        """Keep it in the folder."""
        if self != self.of(folder):
            write_atomic(folder.wandb_id_path, "/".join(filter(None, (self.entity, self.project, self.id))) + "\n")


class WandbRun:
    """A run at W&B, or nothing at all when it is disabled: then the client is not even imported.

    `round` is the x-axis of every chart. The run's folder remembers entity, project and id, so that a resumed run goes
    on there; under `wandb agent` the agent's rule. Offline needs no account and no network. Steps of the client are
    rounds, so that the parts of a run that was resumed offline follow each other when they are synced.
    """

    opened: ClassVar[set[str]] = set()  # ids of the runs that this process has opened
    current: ClassVar["WandbRun | None"] = None  # the one that is open

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
        images: bool = False,
    ) -> None:
        """Open the run.

        Args:
            mode: Where to; "disabled" makes every method do nothing.
            folder: The run's folder; W&B's files go into its `wandb/`.
            config: The resolved configuration as plain values.
            project: W&B project of a new run; None leaves it to WANDB_PROJECT.
            entity: W&B user or team of a new run; None leaves it to WANDB_ENTITY.
            name: Display name.
            group: Runs that differ in seed or fold share a group.
            job_type: What kind of run it is, e.g. the method.
            tags: Tags.
            images: Whether pictures of cases may leave this machine.

        Raises:
            ReportingError: If W&B cannot be reached or refuses.
        """
        self.images = images
        self._run: Run | None = None
        self._sent = -1  # the last round that W&B has
        if mode == "disabled":
            return
        if mode == "offline":
            os.environ["WANDB_ERROR_REPORTING"] = "false"  # else the client calls home even offline
        swept, kept = swept_by_agent(), RunAddress.of(folder)
        own = kept if kept.project else RunAddress(kept.id or uuid.uuid4().hex[:12], project, entity)
        self._run = _open(
            mode=mode,
            dir=os.fspath(folder.path),
            id=None if swept else own.id,  # the client takes the agent's, and warns about any other
            resume="allow" if mode == "online" else None,  # offline the id alone joins the parts when they are synced
            config=dict(config),
            allow_val_change=True,
            project=None if swept else own.project,  # the sweep's
            entity=None if swept else own.entity,
            name=name,
            group=group,
            job_type=job_type,
            tags=list(tags),
        )
        RunAddress(self._run.id, self._run.project or own.project, self._run.entity or own.entity).remember(folder)
        self.opened.add(self._run.id)
        WandbRun.current = self
        if self._run.resumed:
            self._sent = int(self._run.summary.get("round", -1))
        self._run.define_metric("round", hidden=True)
        self._run.define_metric("*", step_metric="round")

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """What goes wrong with W&B from now on is told once, and the run goes on without it."""
        try:
            yield
        except Exception as error:  # the client raises what it likes when its service is gone
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        run, self._run = self._run, None
        WandbRun.current = None
        if run is None:
            return
        reason = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
        print(
            f"warning: W&B stopped ({reason}); the run goes on without it, and its folder holds every number",
            file=sys.stderr,
            flush=True,
        )
        _abandon()

    @property
    def goes_on(self) -> bool:
        """Whether this is a run that W&B has from before an interruption."""
        return self._run is not None and self._run.resumed

    @property
    def _step(self) -> int:
        """The client's steps never go back; a resumed run begins where it ended, which `Run.step` does not tell."""
        return max(self._run.step, self._run.starting_step) if self._run is not None else 0

    def log_round(self, round: int, values: Mapping[str, float], *, last: bool = False) -> None:
        """Add points at x = round, e.g. {"train/loss": 0.4, "site_a/val/global/dice": 0.8}; NaN is left out.

        Args:
            round: Its number. A round that W&B has from before an interruption is not sent twice.
            values: Names and numbers.
            last: No other round follows; pictures and tables still join its row.
        """
        known = {printable(key): float(value) for key, value in values.items() if not np.isnan(value)}
        if self._run is not None and known and round > self._sent:
            self._sent = round
            with self._guarded():
                self._run.log({"round": round, **known}, step=max(round, self._step), commit=not last)

    def summarise(self, values: Mapping[str, float]) -> None:
        """Set the numbers that stand for the whole run (what a sweep reads); nothing is logged after that."""
        if self._run is None:
            return
        with self._guarded():
            self._run.log({}, commit=True)  # else the last row, when it ends, would put its own numbers there
            self._run.summary.update({key: float(value) for key, value in values.items() if not np.isnan(value)})

    def log_pictures(self, pictures: Sequence[Picture], regions: Sequence[str]) -> None:
        """Add one image per case with switchable masks of truth and of every view, if pictures may leave."""
        if self._run is None or not pictures or not self.images:
            return
        with self._guarded():
            images = [_wandb_image(picture, regions) for picture in pictures]
            self._log_last({f"{pictures[0].site}/overlays": images})

    def log_cases(self, scores: pd.DataFrame) -> None:
        """Add a table with one row per case, region, view and checkpoint, and one column per metric."""
        if self._run is None or scores.empty:
            return
        import wandb

        keys = ["checkpoint", "split", "round", "site", "seen", "view", "case", "region"]
        wide = scores.pivot_table(index=keys, columns="metric", values="value").reset_index()
        wide = wide.sort_values(["checkpoint", "split"], key=_worth, kind="stable")
        with self._guarded():
            self._log_last({"cases": wandb.Table(dataframe=wide.head(MOST_TABLE_ROWS))})

    def log_checkpoints(self, folder: RunFolder) -> None:
        """Upload the saved models as an artefact of type "model": a folder that `python evaluate.py` reads."""
        if self._run is None:
            return
        import wandb

        with self._guarded():
            artifact = wandb.Artifact(f"run-{self._run.id}-checkpoints", type="model", metadata={"round": self._sent})
            artifact.add_dir(os.fspath(folder.checkpoints), name=folder.checkpoints.name)
            for path in (folder.config_path, folder.path / SPLITS, folder.path / METRICS):
                artifact.add_file(os.fspath(path), name=path.name)
            self._run.log_artifact(artifact)

    def _log_last(self, values: Mapping[str, Any]) -> None:
        """Add to the last round's row, or behind it if that is gone already."""
        if self._run is not None:
            self._run.log({"round": max(self._sent, 0), **values}, step=max(self._sent, self._step), commit=False)

    def finish(self, exit_code: int) -> None:
        """Close the run; an exit code other than 0 marks it as failed."""
        if self._run is not None:
            with self._guarded():
                self._run.finish(exit_code=exit_code)
            self._run = WandbRun.current = None

    def leave(self) -> None:
        """An error passes: the run stays open until `failing_run` has told its log why; one beside an agent's ends."""
        if _beside.get():
            self.finish(exit_code=1)


def swept_by_agent() -> bool:
    """Whether `wandb agent` started this process."""
    return bool(os.environ.get("WANDB_SWEEP_ID") and os.environ.get(RUN_ID))


@contextmanager
def beside_the_agent() -> Iterator[None]:
    """Runs opened here (folds, early stages) are runs of their own: the agent's id waits for the result of them all."""
    swept = swept_by_agent()
    hidden = {name: os.environ.pop(name) for name in AGENT if name in os.environ}
    token = _beside.set(swept)
    try:
        yield
    finally:
        _beside.reset(token)
        os.environ.update(hidden)
        if hidden and "wandb" in sys.modules:
            sys.modules["wandb"].teardown()  # the client reads its environment once


def remember_agent(folder: RunFolder) -> None:
    """Let a folder know which run it will be before that opens: stopped folds and stages go on as the agent's run."""
    if swept_by_agent():
        folder.path.mkdir(parents=True, exist_ok=True)
        RunAddress(os.environ[RUN_ID], os.environ.get("WANDB_PROJECT"), os.environ.get("WANDB_ENTITY")).remember(folder)


@contextmanager
def failing_run(exit_code: int) -> Iterator[None]:
    """Mark the open run as failed; where this process ends before it opened the agent's run, mark that one.

    What is printed inside is the run's log at W&B, so that it can be read there why a run failed or was refused.
    """
    opened = WandbRun.current
    run = None
    if opened is None and swept_by_agent() and os.environ[RUN_ID] not in WandbRun.opened:
        with suppress(ReportingError):  # what went wrong first is what counts, and is printed
            run = _open(mode="online")
    try:
        yield
    finally:
        if opened is not None:
            opened.finish(exit_code)
        if run is not None:
            run.finish(exit_code=exit_code)


def _abandon() -> None:
    """Let the client forget its service, so that it does not wait for it when this process ends."""
    import wandb

    with suppress(Exception):
        wandb.teardown(exit_code=0)


def _open(**settings: Any) -> "Run":
    import wandb

    limits = wandb.Settings(finish_timeout=FINISH_SECONDS)
    try:
        return wandb.init(settings=limits, **settings)
    except wandb.errors.Error as error:
        raise ReportingError(
            f"W&B did not open the run ({error}). Log in with `wandb login`, or set wandb.mode=offline or disabled."
        ) from error


def _worth(column: pd.Series) -> pd.Series:
    """What must not be cut from a long table comes first: the best checkpoint's test cases."""
    return column.map({"best": 0, "last": 1, "test": 0, "val": 1})


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
    masks = {
        view: {"mask_data": shrunk(label_map(mask[:, index]), picture.aspect, LONGEST_SIDE), "class_labels": names}
        for view, mask in layers.items()
    }
    pixels = np.round(displayed(picture.image, index, flat=picture.depth == 1) * 255).astype(np.uint8)
    pixels = shrunk(pixels, picture.aspect, LONGEST_SIDE)
    role = f"{picture.role} by {picture.judge}" if picture.judge else picture.role
    return wandb.Image(pixels, caption=f"{role}: {picture.case}", masks=masks)
