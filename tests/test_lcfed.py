"""LC-Fed: what learns when, what travels to whom, and what it reduces to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import Tensor

from fedseg.algorithms.functional.calibration import disagreement, peaks, peer_probabilities
from fedseg.algorithms.lcfed import CODES, LCFed
from fedseg.algorithms.recipe import Recipe, Training
from fedseg.federation.client import turn
from fedseg.federation.contract import EvaluateTask, Task, TrainTask
from fedseg.federation.state import State, Update
from fedseg.federation.transport import InProcess
from fedseg.models import create_model
from tests.world import (
    CPU,
    POOL,
    Forgetful,
    ToySite,
    assert_same,
    assert_same_outcome,
    build,
    evaluate,
    simulate,
    toy_sites,
)

HEAD = {"model.segmentation_head.0.weight", "model.segmentation_head.0.bias"}
CALIBRATION = {"calibration.head.weight", "calibration.head.bias"}
SITES = ("s0", "s1", "s2")
PLAIN = {"alpha": 0.0, "channel_selection": False}


def welcome(algorithm: LCFed, site: str = "s1", kind: Any = TrainTask, sites: tuple[str, ...] = SITES) -> State:
    """The first message, with heads that disagree."""
    server = algorithm.init_server({name: State() for name in sites})
    generator = torch.Generator().manual_seed(5)
    for name in sites:
        head = algorithm._head.state_dict()
        server.tensors[f"head/{name}"] = {
            k: t + 0.5 * torch.randn(t.shape, generator=generator) for k, t in head.items()
        }
    return algorithm.broadcast(server, site, kind(1, 7))


def ready(site: str = "s1", **knobs: Any) -> LCFed:
    """A worker that has received."""
    worker = build("lcfed", **{"reduction": 1, **knobs})
    assert isinstance(worker, LCFed)
    worker.receive(welcome(worker, site), State(), toy_sites()[site])
    return worker


def one_turn(worker: LCFed, steps: int, kept: State | None = None) -> tuple[Update, State]:
    task = TrainTask(1, 7, steps=steps)
    return turn(worker, toy_sites()["s1"], task, welcome(worker), kept or State(), CPU, evaluate)


def moves(worker: LCFed, steps: int, kept: State | None = None) -> list[set[str]]:
    """Parameters that changed, step by step."""
    history: list[dict[str, Tensor]] = []

    def snapshot(*_: Any) -> None:
        history.append({name: p.detach().clone() for name, p in worker.named_parameters()})

    worker.on_train_batch_start = snapshot  # type: ignore[method-assign, assignment]
    end = worker.on_train_end
    worker.on_train_end = lambda: (snapshot(), end())[0]  # type: ignore[method-assign, func-returns-value]
    one_turn(worker, steps, kept)
    return [
        {name for name in after if not torch.equal(before[name], after[name])} for before, after in pairwise(history)
    ]


class Recording(InProcess):
    """Remembers what travelled."""

    def ask(self, tasks: Mapping[str, Task], messages: Mapping[str, State]) -> Iterator[Update]:
        for update in super().ask(tasks, messages):
            task, message = tasks[update.site], messages[update.site]
            self.__dict__.setdefault("travelled", []).append((task, update.site, message, update))
            yield update


# ------------------------------------------------------------------------------------------------- what learns when


@pytest.mark.parametrize("state", ["reset", "keep"])
@pytest.mark.parametrize(
    "training",
    [Training(lr=1e-2, weight_decay=0.1), Training(optimizer="sgd", lr=0.05, momentum=0.9, weight_decay=0.1)],
    ids=["adam", "momentum"],
)
def test_p6_first_the_head_then_the_body_and_frozen_weights_stand_still(training: Training, state: Any) -> None:
    training = replace(training, optimizer_state=state)
    _, kept = one_turn(build("lcfed", training, head_share=0.5, reduction=1), steps=4)
    worker = build("lcfed", training, head_share=0.5, reduction=1)
    body = {name for name, _ in worker.named_parameters()} - HEAD - CALIBRATION
    assert {f"model.{CODES}", "model.selection.mix.weight", "model.encoder.0.weight"} <= body
    assert moves(worker, 4, kept) == [HEAD | CALIBRATION] * 2 + [body | CALIBRATION] * 2


def test_p5_two_losses_each_reaching_its_own() -> None:
    worker = ready()
    site = worker.network("personal")
    (batch,) = toy_sites()["s1"].train_batches(3, 1)
    _, features = site.body(worker.normalize(batch["image"]))
    logits = worker._head(features)
    worker.recipe.loss(site.calibrate(features, logits), batch["mask"]).backward()  # type: ignore[no-untyped-call]
    assert {name for name, p in worker.named_parameters() if p.grad is not None} == CALIBRATION
    assert all(p.grad.any() for p in worker.calibration.parameters())  # type: ignore[union-attr]

    worker = ready(head_calibration=False)
    worker.loss(batch).backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.any() for p in worker.parameters())


def test_p1_the_contrast_moves_channel_selection_only() -> None:
    (batch,) = toy_sites()["s1"].train_batches(3, 1)
    with_contrast, without = ready(alpha=0.5), ready(alpha=0.0)
    losses = [worker.loss(batch) for worker in (with_contrast, without)]
    assert losses[0] < losses[1], "the contrast is negative"
    for loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]
    pairs = zip(with_contrast.named_parameters(), without.parameters(), strict=True)
    different = {name for (name, p), q in pairs if not torch.equal(p.grad, q.grad)}  # type: ignore[arg-type]
    assert different == {name for name, _ in with_contrast.named_parameters() if name.startswith("model.selection.")}


def test_p2_channel_selection_is_shared_and_learns_each_site_its_own_code() -> None:
    update, kept = one_turn(build("lcfed", reduction=1), steps=5)
    assert update["model"][CODES].shape == (4, 3)
    assert update["model"][CODES][:, 1].any()
    assert not update["model"][CODES][:, [0, 2]].any()
    assert all(update["model"][f"selection.{name}.weight"].any() for name in ("mix", "squeeze.0", "squeeze.2"))
    assert not any("selection" in name for name in kept["model"])


# ------------------------------------------------------------------------------------------------- what travels


@pytest.mark.slow
def test_p7_heads_go_to_every_site_and_are_never_averaged(tmp_path: Path) -> None:
    outcome = simulate("lcfed", tmp_path, rounds=3, transport=Recording)
    travelled = outcome.federation.transport.travelled  # type: ignore[attr-defined]
    sent = {(task.round, site): update["head"] for task, site, _, update in travelled if task.kind == "train"}
    for task, _, message, _ in travelled:
        heads = {group: tensors for group, tensors in message.tensors.items() if group.startswith("head/")}
        last = task.round - (task.kind == "train")
        expected = {f"head/{site}" for site in SITES} if last > 0 else set()
        assert set(heads) == expected, "before the first round there is no trained head"
        for group, tensors in heads.items():
            assert_same(State({"head": tensors}), State({"head": sent[last, group.partition("/")[2]]}))
    for site in SITES:
        kept = outcome.kept[site]["model"]
        assert all(torch.equal(t, kept[f"segmentation_head.{k}"]) for k, t in outcome.server[f"head/{site}"].items())
    weights = [outcome.server[f"head/{site}"]["0.weight"] for site in SITES]
    assert not any(torch.equal(a, b) for a, b in pairwise(weights))
    assert set(outcome.server.tensors) == {"model", "buffers", *(f"head/{site}" for site in SITES)}


@pytest.mark.slow
def test_p7_the_calibration_never_leaves_its_site(tmp_path: Path) -> None:
    outcome = simulate("lcfed", tmp_path, rounds=2, transport=Recording)
    secrets = {site: kept["own"]["calibration.head.weight"] for site, kept in outcome.kept.items()}
    assert not torch.equal(secrets["s0"], secrets["s1"])
    for _, _, message, update in outcome.federation.transport.travelled:  # type: ignore[attr-defined]
        for tensors in (*message.tensors.values(), *update.tensors.values()):
            assert not any("calibration" in name for name in tensors)
            assert not any(t.shape == s.shape for t in tensors.values() for s in secrets.values())


@pytest.mark.parametrize(("weighting", "weights"), [("uniform", [1.0, 1.0, 0.0]), ("examples", [4.0, 9.0, 0.0])])
def test_p8_uniform_or_by_examples(weighting: str, weights: list[float]) -> None:
    updates = [Update(site=f"s{i}", examples=examples) for i, examples in enumerate((4, 9, 0))]
    assert build("lcfed", weighting=weighting).weigh(State(), updates) == weights


def test_a_head_that_was_never_trained_is_shown_to_nobody(tmp_path: Path) -> None:
    sites = {name: site for name, site in toy_sites().items() if name != POOL}
    sites["s1"].labelled = False
    outcome = simulate("lcfed", tmp_path, sites=sites)
    assert {group for group in outcome.server.tensors if "/" in group} == {"head/s0", "head/s2"}
    worker = build("lcfed")
    assert isinstance(worker, LCFed)
    worker.receive(worker.broadcast(outcome.server, "s1", EvaluateTask(2, 7)), outcome.kept["s1"], sites["s1"])
    assert not disagreement_at(worker, sites["s1"].images).any()


# ------------------------------------------------------------------------------------------------- reductions


@pytest.mark.slow
@pytest.mark.parametrize("calibrated", [False, True])
def test_p9_without_its_parts_it_is_fedrep_and_calibration_disturbs_nothing(tmp_path: Path, calibrated: bool) -> None:
    ours = simulate("lcfed", tmp_path / "a", head_share=0.4, head_calibration=calibrated, **PLAIN)
    fedrep = simulate("fedrep", tmp_path / "b", head_share=0.4)
    for group in ("model", "buffers"):
        assert_same(State({group: ours.server[group]}), State({group: fedrep.server[group]}))
    for site, kept in fedrep.kept.items():
        assert_same(State({"model": ours.kept[site]["model"]}), State({"model": kept["model"]}))
    heads = {f"head/{site}" for site in SITES} if calibrated else set()
    assert set(ours.server.tensors) - set(fedrep.server.tensors) == heads
    if not calibrated:
        images = toy_sites()["s1"].images
        answers = []
        for name, outcome, knobs in (("lcfed", ours, {**PLAIN, "head_calibration": False}), ("fedrep", fedrep, {})):
            worker = build(name, **knobs)  # type: ignore[arg-type]
            message = worker.broadcast(outcome.server, "s1", EvaluateTask(2, 7))
            worker.receive(message, outcome.kept["s1"], toy_sites()["s1"])
            answers.append(worker.predict(images, "personal"))
        assert torch.equal(*answers)


# ------------------------------------------------------------------------------------------------- prediction


def disagreement_at(worker: LCFed, images: Tensor) -> Tensor:
    site = worker.network("personal").eval()
    with torch.no_grad():
        _, features = site.body(worker.normalize(images))
        maps = site.disagreement(features, site.head(features))
    site.train()
    return maps


def test_the_personal_answer_is_the_chain_of_its_parts() -> None:
    worker, images = ready(), toy_sites()["s1"].images
    answer = worker.predict(images, "personal")
    worker.eval()
    with torch.no_grad():
        deepest = worker.model.encoder(worker.normalize(images))[-1]
        gated = worker.model.selection(deepest, 1)
        features = worker.model.decoder([gated])
        own = worker.model.segmentation_head(features).sigmoid()
        heads = [worker.received[f"head/{site}"] for site in SITES]
        answers = peer_probabilities(worker.model.segmentation_head, heads, features, torch.sigmoid)
        maps = peaks(disagreement(answers, 1, normalization="map"), window=3, threshold=0.2)
        assert maps.any()
        expected = worker.calibration(features, own, maps).sigmoid()  # type: ignore[misc]
    torch.testing.assert_close(answer, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("maps", ["peaks", "distance", "deviation"])
def test_p3_disagreement_needs_heads_that_differ(maps: str) -> None:
    worker = ready(disagreement=maps)
    images = toy_sites()["s1"].images
    found = disagreement_at(worker, images)
    assert found.shape == (6, 2, 12, 12)
    assert found.any()
    assert 0 <= found.min() <= found.max() <= 1
    if maps != "deviation":
        assert (found.amax((-2, -1)) == 1).all()
    own = worker.received["head/s1"]
    worker._heads = dict.fromkeys(worker._heads, own)
    assert not disagreement_at(worker, images).any()
    assert worker.predict(images, "personal").isfinite().all()


def test_before_the_first_round_and_with_a_single_site_nobody_disagrees(tmp_path: Path) -> None:
    worker = build("lcfed")
    assert isinstance(worker, LCFed)
    server = worker.init_server({name: State() for name in SITES})
    worker.receive(worker.broadcast(server, "s1", TrainTask(1, 7)), State(), toy_sites()["s1"])
    assert not disagreement_at(worker, toy_sites()["s1"].images).any()
    alone = simulate("lcfed", tmp_path, sites={"s0": ToySite.make("s0", 0)})
    assert not alone.server.non_finite()
    assert alone.server["model"][CODES].shape == (4, 1)


def test_raw_and_minmax_attention_answer_differently() -> None:
    images = toy_sites()["s1"].images
    raw, minmax = (ready(attention=attention).predict(images, "personal") for attention in ("raw", "minmax"))
    assert not torch.allclose(raw, minmax)


# ------------------------------------------------------------------------------------------------- sites


def test_codes_are_as_many_as_sites_and_making_room_draws_nothing() -> None:
    worker = build("lcfed")
    assert isinstance(worker, LCFed)
    many = tuple(f"s{i}" for i in range(40))
    message = welcome(worker, "s2", sites=many)
    assert message["model"][CODES].shape == (4, 40)
    assert message.scalars["site"] == sorted(many).index("s2")
    assert message["model"][CODES].std() > 0
    before = torch.get_rng_state()
    worker.receive(message, State(), toy_sites()["s2"])
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(worker.model.state_dict()[CODES], message["model"][CODES])


def test_a_site_that_joins_later_gets_a_clear_answer() -> None:
    worker = build("lcfed")
    assert isinstance(worker, LCFed)
    assert worker.unseen_views == ()
    with pytest.raises(ValueError, match=r"'late' was not there when LC-Fed started.*Train anew"):
        welcome(worker, "late")
    stranger = ToySite.make("late", 3)
    worker.receive(welcome(worker, "late", kind=EvaluateTask), State(), stranger)
    with pytest.raises(ValueError, match="'late' was not there when LC-Fed started"):
        worker.predict(stranger.images, "personal")


def test_wrong_settings_are_refused() -> None:
    for knobs in ({"alpha": -0.1}, {"alpha": float("nan")}, {"reduction": 0}, {"peak_threshold": 1.0}):
        with pytest.raises(ValueError, match=f"algorithm.{next(iter(knobs))}="):
            build("lcfed", **knobs)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="include part:segmentation_head"):
        build("lcfed", personal="normalisation")
    assert build("lcfed", personal="part:segmentation_head+normalisation").views == ("personal",)

    class Odd(smp.Unet):  # type: ignore[misc]
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images)

    with pytest.raises(ValueError, match=r"Odd does not run one after the other; take another model\.architecture"):
        LCFed(Odd("resnet18", encoder_weights=None), Recipe.build(Training(), "sigmoid", 3))


# ------------------------------------------------------------------------------------------------- real networks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "activation", "stride"),
    [
        ("unet", "sigmoid", 1),
        ("unetplusplus", "softmax", 1),
        ("fpn", "sigmoid", 4),
        ("deeplabv3plus", "softmax", 4),
    ],
)
def test_real_networks_take_a_step_and_answer_in_full_size(architecture: str, activation: Any, stride: int) -> None:
    small = {"decoder_channels": [16, 8, 8, 8, 4]} if stride == 1 else {}
    torch.manual_seed(0)
    network = create_model(3, 2 + (activation == "softmax"), architecture=architecture, encoder="resnet18", **small)  # type: ignore[arg-type]
    site = ToySite.make("s1", 1, count=2, size=64)
    site.masks[:, 0] -= site.masks[:, 1]  # regions do not overlap
    worker = LCFed(network, Recipe.build(Training(), activation, 3), head_share=0.5)
    message = welcome(worker)
    assert message["model"][CODES].shape == (512, 3)
    update, kept = turn(worker, site, TrainTask(1, 7, steps=2), message, State(), CPU, evaluate)
    assert not update.non_finite()
    assert all(update["model"][name].any() for name in ("encoder.conv1.weight", CODES))
    assert not torch.equal(kept["own"]["calibration.head.weight"], worker._pristine["own"]["calibration.head.weight"])  # type: ignore[index]
    _, features = worker.network("personal").body(site.images)
    assert features.shape[-1] == 64 // stride
    maps = disagreement_at(worker, site.images)
    assert maps.shape == (2, 2, 64, 64)
    assert maps.any()
    answer = worker.predict(site.images, "personal")
    assert answer.shape == (2, 2, 64, 64)
    assert 0 <= answer.min() <= answer.max() <= 1
    if isinstance(network, smp.UnetPlusPlus):
        with pytest.raises(RuntimeError, match="divisible"):
            worker.predict(site.images[..., :60], "personal")


@pytest.mark.slow
def test_kept_optimiser_state_fits_the_codes_of_a_rebuilt_worker(tmp_path: Path) -> None:
    keeping = Training(lr=1e-2, optimizer_state="keep")
    whole = simulate("lcfed", tmp_path / "a", rounds=3, training=keeping)
    simulate("lcfed", tmp_path / "b", rounds=1, training=keeping, transport=Forgetful)
    assert_same_outcome(whole, simulate("lcfed", tmp_path / "b", rounds=3, training=keeping, transport=Forgetful))
