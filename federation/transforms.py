"""What transforms do at a site, and where they remember what they must."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from fedseg.common.seeds import derive_seed
from fedseg.federation.client import Compute, turn
from fedseg.federation.contract import (
    VISITING,
    Evaluate,
    EvaluateTask,
    QueryTask,
    S,
    Site,
    Task,
    TrainTask,
    Transform,
    W,
)
from fedseg.federation.state import State, Update

PREFIX = "transform/"
EPSILON, SPENT = "epsilon", "spent"
VISITOR = f"{VISITING}/"
"""Before the groups of another site's personal model."""
MODELS = ("model", "own")
"""Groups of what a site keeps that a personal model is made of; the rest is optimisers, banks and memories."""
TRAIN = "train"
"""The stage of a consultation that comes along with the training task."""


def answer(
    worker: W,
    site: S,
    task: Task,
    message: State,
    kept: State,
    compute: Compute,
    evaluate: Evaluate[W, S],
    transforms: Sequence[Transform] = (),
) -> tuple[Update, State]:
    """One site's turn, and what the transforms make of an update before it leaves.

    A consultation is between the two sides of a transform: the method does not hear of it.

    Returns:
        The update that travels, and what the site keeps, memories of the transforms included.
    """
    if task.kind == "consult":
        return _consulted(site, task, message, transforms), kept
    if task.kind == "publish" and task.topic == VISITING:
        return _given_away(site, kept), kept
    if isinstance(task, EvaluateTask) and task.topic == VISITING:
        return _visited(worker, site, task, message, compute, evaluate), kept
    if not transforms:
        return turn(worker, site, task, message, kept, compute, evaluate)
    memories = {transform.name: remembered(kept, transform.name) for transform in transforms}
    own = forgotten(kept)
    if isinstance(task, TrainTask):
        reasons = filter(None, (transform.refusal(memories[transform.name]) for transform in transforms))
        if reason := next(reasons, "") or _prepared(site, message, transforms):
            return _refused(site, reason, told(memories)), kept
        message = forgotten(message)
    update, now = turn(worker, site, task, message, own, compute, evaluate)
    timed = not any(transform.hides_time for transform in transforms) or not isinstance(task, TrainTask)
    if not timed:
        del update.scalars["seconds"]
    if not isinstance(task, TrainTask) or update.refusal:
        return update, kept if now is own else with_memories(now, memories)
    start = time.perf_counter()
    for index, transform in enumerate(transforms):
        seed = derive_seed(task.seed, "transform", index, task.round, site.name)
        update, memories[transform.name] = transform.on_client(update, memories[transform.name], seed)
        if update.refusal:
            update = _refused(site, update.refusal, {})
            break
    if timed:
        update.scalars["seconds"] = update.scalars.get("seconds", 0.0) + time.perf_counter() - start
    update.scalars |= told(memories)
    return update, with_memories(now, memories)


def remembered(state: State, name: str) -> State:
    """What a transform left in a state."""
    prefix = f"{PREFIX}{name}/"
    groups = {group.removeprefix(prefix): ts for group, ts in state.tensors.items() if group.startswith(prefix)}
    return State(groups, {k.removeprefix(prefix): v for k, v in state.scalars.items() if k.startswith(prefix)})


def forgotten(state: State) -> State:
    """A state without what transforms left in it."""
    groups = {group: ts for group, ts in state.tensors.items() if not group.startswith(PREFIX)}
    return State(groups, {k: v for k, v in state.scalars.items() if not k.startswith(PREFIX)})


def with_memories(state: State, memories: Mapping[str, State]) -> State:
    """A state with what transforms remember, in place of what they remembered before."""
    joint = forgotten(state)
    for name, memory in memories.items():
        joint.tensors |= {f"{PREFIX}{name}/{group}": ts for group, ts in memory.tensors.items() if ts}
        joint.scalars |= {f"{PREFIX}{name}/{key}": value for key, value in memory.scalars.items()}
    return joint


def joined(message: State, extra: State) -> State:
    """A message, and what goes along with it."""
    return State({**message.tensors, **extra.tensors}, {**message.scalars, **extra.scalars})


def told(memories: Mapping[str, State]) -> dict[str, float]:
    """What a site tells the server of its accounts."""
    found = {name: memory.scalars for name, memory in memories.items()}
    return {f"{PREFIX}{name}/{key}": s[key] for name, s in found.items() for key in (EPSILON, SPENT) if key in s}


def _consulted(site: Site, task: QueryTask, message: State, transforms: Sequence[Transform]) -> Update:
    name, _, stage = task.topic.partition("/")
    found = next((transform for transform in transforms if transform.name == name), None)
    if found is None or stage == TRAIN:
        return _refused(site, "it was consulted about something that its settings do not have", {})
    try:
        said = found.consulted(site.name, stage, message)
    except ValueError as error:
        return _refused(site, str(error), {})
    return Update(tensors=said.tensors, scalars=said.scalars, site=site.name, examples=0)


def _given_away(site: Site, kept: State) -> Update:
    """This site's personal model."""
    own = {group: kept.tensors[group] for group in MODELS if group in kept.tensors}
    return Update(tensors=own, site=site.name, examples=0)


def _visited(
    worker: W, site: S, task: EvaluateTask, message: State, compute: Compute, evaluate: Evaluate[W, S]
) -> Update:
    """Score the personal model that came from another site."""
    came = {group: ts for group, ts in message.tensors.items() if group.startswith(VISITOR)}
    others = {group.removeprefix(VISITOR): ts for group, ts in came.items()}
    plain = {group: ts for group, ts in message.tensors.items() if group not in came}
    return turn(worker, site, task, State(plain, message.scalars), State(others), compute, evaluate)[0]


def _prepared(site: Site, message: State, transforms: Sequence[Transform]) -> str:
    """Hand over what came along for transforms; why the site cannot take part, or nothing."""
    for transform in transforms:
        extra = remembered(message, transform.name)
        if extra.tensors or extra.scalars:
            try:
                transform.consulted(site.name, TRAIN, extra)
            except ValueError as error:
                return str(error)
    return ""


def _refused(site: Site, reason: str, scalars: Mapping[str, float]) -> Update:
    return Update(site=site.name, examples=site.examples, refusal=reason, scalars={"seconds": 0.0, **scalars})
