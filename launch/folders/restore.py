"""Whether a run's folder can be gone on with: everything is looked at before anything in it is changed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from omegaconf import DictConfig

from fedseg.algorithms import Algorithm
from fedseg.algorithms.parts import FROZEN, copies
from fedseg.configs.compose import ConfigError
from fedseg.datamodules import MultiCenterDataModule
from fedseg.federation.checkpoint import CURE, Checkpoint, CheckpointError
from fedseg.federation.state import State, Tensors
from fedseg.federation.transforms import forgotten
from fedseg.reporting import ReportingError
from fedseg.reporting.folder import DURING_TRAINING, METRICS, ROUNDS, RunFolder

CHANGED = "restore the data, or start another run"


def open_checkpoint(folder: RunFolder, config: DictConfig) -> Checkpoint:
    """The checkpoint of a new run, or of one to go on with, whose tables are readable.

    Raises:
        ConfigError: more rounds are done than the config has.
        CheckpointError: a file is damaged or gone.
        ReportingError: a table is damaged.
    """
    checkpoint, rounds = Checkpoint(folder.checkpoints), config.federation.rounds
    if checkpoint.round > rounds:
        raise ConfigError(
            f"federation.rounds={rounds}, but {checkpoint.round} rounds are done; take federation.rounds="
            f"{checkpoint.round} or more"
        )
    checkpoint.verify()
    folder.check()
    if not checkpoint.round and (last := folder.last_round()) > config.federation.checkpoint_every:
        raise CheckpointError(
            f"{checkpoint.folder} holds no state, although the run came to round {last} at least; {CURE}"
        )
    _check_scores(folder, checkpoint, rounds, config.federation.evaluate_every)
    return checkpoint


def _check_scores(folder: RunFolder, checkpoint: Checkpoint, rounds: int, every: int) -> None:
    """Scores on validation cases are written before the state that they choose is saved."""
    last, scores = checkpoint.round, folder.scores()
    scored = checkpoint.best() and (last % every == 0 or last == rounds)
    if scored and not ((scores["checkpoint"] == DURING_TRAINING) & (scores["round"] == last)).any():
        raise ReportingError(f"{folder.path / METRICS} has lost the scores of round {last}; {CURE}")
    if scored and folder.rounds().empty:
        raise ReportingError(f"{folder.path / ROUNDS} has lost all its rows; {CURE}")


def check_data(folder: RunFolder, data: MultiCenterDataModule) -> None:
    """Compare the cases, their splits and the bytes of their files with those that a run began with.

    Raises:
        ReportingError: the data changed.
    """
    check_splits(folder, data.splits())
    check_fingerprints(folder, data.fingerprints())


def check_splits(folder: RunFolder, rows: Sequence[Mapping[str, Any]]) -> None:
    """Compare the cases and their splits with those that a run began with.

    Raises:
        ReportingError: the data changed, so that a case may have moved from test to training.
    """
    now = {(r["site"], r["case"]): (r["split"], bool(r["labelled"]), bool(r["seen"])) for r in rows}
    before = {(r.site, r.case): (r.split, bool(r.labelled), bool(r.seen)) for r in folder.splits().itertuples()}
    moved = sorted(case for case in now.keys() | before.keys() if now.get(case) != before.get(case))
    if moved:
        raise ReportingError(
            f"{folder.path}: the data changed since this run began: {len(moved)} cases, the first is {moved[0]} "
            f"({before.get(moved[0])} then, {now.get(moved[0])} now); {CHANGED}"
        )


def check_fingerprints(folder: RunFolder, rows: Sequence[Mapping[str, str]]) -> None:
    """Compare the bytes of images and masks with those that a run began with; a run of an earlier version knows none.

    Raises:
        ReportingError: the content of a file changed, whatever its name, place and time of change.
    """
    now = {(row["site"], row["case"]): row for row in rows}
    changed = [
        (str(row["site"]), str(row["case"]), kind)
        for row in folder.fingerprints().to_dict("records")
        for kind in ("image", "mask")
        if (found := now.get((row["site"], row["case"]))) and row[kind] != found[kind]
    ]
    if changed:
        site, case, kind = changed[0]
        cases = len({place[:2] for place in changed})
        raise ReportingError(
            f"{folder.path}: the data changed since this run began: the files of {cases} cases hold other bytes, the "
            f"first is the {kind} of site {site!r}, case {case!r}; {CHANGED}"
        )


def check_states(
    algorithm: Algorithm,
    checkpoint: Checkpoint,
    sites: Collection[str] | None = None,
    others: Mapping[str, Algorithm] = MappingProxyType({}),
) -> None:
    """Read every saved state, and see whether it is one of this method and network.

    Args:
        algorithm: freshly built.
        checkpoint: whose states.
        sites: of the run; None where they keep their states themselves.
        others: site -> the method over that site's own network.

    Raises:
        CheckpointError: names the file that is damaged, of another run, or of a network whose tensors that do not learn
            cannot be built again here.
    """
    index = checkpoint.index
    if sites is not None and (strange := sorted(index["kept"].keys() - set(sites))):
        raise CheckpointError(f"{checkpoint.folder} is of another run: it has a state of {strange[0]!r}; {CURE}")
    best = checkpoint.best()
    for file in sorted({index["server"], *(one.server for one in best.values())} - {""}):
        saved = read_server(algorithm, checkpoint, file)
        if algorithm.parts.frozen and any(
            not torch.equal(tensor, algorithm.frozen[name]) for name, tensor in saved.get(FROZEN).items()
        ):
            raise CheckpointError(
                f"{checkpoint.folder / file}: the tensors of the network that do not learn (model.freeze_encoder=true, "
                "model.lora_rank) are not those that are built here; give back the file of weights and the libraries' "
                "versions with which the run began (environment.json), or start the run anew with another output="
            )
    kept = {file: site for site, file in index["kept"].items()}
    kept |= {one.kept: name.partition("/")[2] for name, one in best.items()}
    for file in sorted(kept.keys() - {""}):
        read_kept(others.get(kept[file], algorithm), checkpoint, file)


def read_server(algorithm: Algorithm, checkpoint: Checkpoint, file: str) -> State:
    """A saved state of the server.

    Raises:
        CheckpointError: it is damaged, or of another method or network.
    """
    return algorithm.restored(_read(checkpoint, file, partial(misfit_of_server, algorithm)))


def read_kept(algorithm: Algorithm, checkpoint: Checkpoint, file: str) -> State:
    """A saved state of a site.

    Raises:
        CheckpointError: it is damaged, or of another method or network.
    """
    return _read(checkpoint, file, partial(misfit_of_kept, algorithm))


def misfit_of_server(algorithm: Algorithm, state: State) -> str:
    """What in a server's state is not of this method and network; empty when all is."""
    saved = algorithm.restored(state)
    return _misfit(
        Algorithm.init_server(algorithm, {}), saved, {*algorithm.one_column_per_site, *algorithm.parts.frozen}
    )


def misfit_of_kept(algorithm: Algorithm, state: State) -> str:
    """What in a site's state is not of this method and network; empty when all is."""
    own = forgotten(state)
    copied = copies(algorithm, algorithm.model, algorithm.parts.frozen)  # kept by earlier versions
    return _misfit(algorithm.keep(), own, {*algorithm.parts.frozen, *copied}) if own.tensors else ""


def _misfit(expected: State, found: State, but: Collection[str]) -> str:
    for group, tensors in expected.tensors.items():
        wanted, there = _shapes(tensors), _shapes(found.get(group))
        names = (wanted.keys() | there.keys()) - set(but)
        odd = sorted(name for name in names if wanted.get(name) != there.get(name))
        if odd:
            name = odd[0]
            told = f"{there.get(name, 'nothing')} for {group}/{name}, this run {wanted.get(name, 'nothing')}"
            return f"it has {told} ({len(odd)} tensors differ)"
    return ""


def _shapes(tensors: Tensors) -> dict[str, str]:
    return {name: f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for name, t in tensors.items()}


def _read(checkpoint: Checkpoint, file: str, misfit: Callable[[State], str]) -> State:
    state = checkpoint.read(file)
    if problem := misfit(state):
        raise CheckpointError(f"{checkpoint.folder / file} is of another network or method: {problem}; {CURE}")
    return state
