"""Federated contrastive pre-training: its laws beyond those of all methods, and the start of a second run from it."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional

from fedseg.algorithms.contrastive import Contrastive
from fedseg.algorithms.functional.crops import random_crops
from fedseg.algorithms.functional.exchange import pack, unpack
from fedseg.algorithms.functional.infonce import FOREIGN, Features
from fedseg.algorithms.functional.partitions import slice_partition
from fedseg.configs.compose import ConfigError, compose, load
from fedseg.datamodules import DataError
from fedseg.federation.checkpoint import Checkpoint
from fedseg.federation.contract import Cohort, EvaluateTask, TrainTask
from fedseg.federation.engine import POOL
from fedseg.federation.state import State, Update
from fedseg.launch.experiment import Experiment
from fedseg.launch.protocols.stages import execute_stages
from fedseg.launch.settings import SCHEMA
from fedseg.models import create_model
from fedseg.reporting.folder import RunFolder
from fedseg.reporting.summary import summarise
from tests.test_laws import Recording
from tests.world import Outcome, ToySite, build, simulate, toy_sites

TRAIN = TrainTask(1, 0, steps=2)
SMALL = {"dimensions": 16, "at_least": 1}


def method(**knobs: Any) -> Contrastive:
    built = build("contrastive", **{**SMALL, **knobs})
    assert isinstance(built, Contrastive)
    return built


def ready(site: ToySite, *, banks: Mapping[str, Features] | None = None, **knobs: Any) -> Contrastive:
    """A worker at a site that has received what a server sends, other sites' features among it."""
    worker = method(**knobs)
    server = worker.init_server({})
    for name, features in (banks or {}).items():
        server.tensors[f"bank/{name}"] = {**features.payload(), "age": torch.tensor(0)}
    worker.receive(worker.broadcast(server, site.name, TRAIN), State(), site)
    return worker


def unit(count: int, dimensions: int = 16, seed: int = 0) -> Tensor:
    return functional.normalize(torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed)), dim=1)


def foreign(count: int, seed: int) -> Features:
    return Features(unit(count, seed=seed), torch.arange(count) % 4 + 1, torch.full((count,), FOREIGN))


def messages(outcome: Outcome) -> Iterator[tuple[str, State, Update]]:
    """What travelled in training, in order: site, message, update."""
    travelled = outcome.federation.transport.travelled  # type: ignore[attr-defined]
    yield from (each for each in travelled if "steps" in each[2].scalars)


# ------------------------------------------------------------------------------------------------- the loss of a step


def test_without_exchange_instance_pairs_are_moco_with_the_local_queue() -> None:
    site = toy_sites()["s1"]
    worker = ready(site, pairing="instance", exchange="none", w_remote=0.0, crop=1.0, temperature=0.2)
    queue = unit(7)
    worker.bank.push(queue, torch.zeros(7), torch.arange(7))
    batch = site.unlabelled_batches(3, 1, views=2)[0]
    first, second = (worker.normalize(batch["image"][:, view]) for view in (0, 1))
    query, key = worker.learner(first), worker.target(second)
    by_hand = [
        -torch.log((q @ k / 0.2).exp() / ((q @ k / 0.2).exp() + sum((q @ n / 0.2).exp() for n in queue)))
        for q, k in zip(query, key, strict=True)
    ]
    torch.testing.assert_close(worker.loss(batch), torch.stack(by_hand).mean())


def test_the_order_of_sites_and_features_does_not_matter() -> None:
    site = toy_sites()["s1"]
    banks = {"s0": foreign(9, 1), "s2": foreign(6, 2)}
    shuffled = {"s0": banks["s2"][torch.randperm(6)], "s2": banks["s0"][torch.randperm(9)]}
    batch = site.unlabelled_batches(3, 1, views=2)[0]
    losses = [float(ready(site, banks=b, crop=1.0).loss(batch).detach()) for b in (banks, shuffled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_features_of_other_sites_change_the_loss_only_when_they_are_exchanged() -> None:
    site = toy_sites()["s1"]
    batch = site.unlabelled_batches(3, 1, views=2)[0]
    alone = ready(site, crop=1.0).loss(batch)
    near, blind = (ready(site, banks={"s0": foreign(9, 1)}, crop=1.0, w_remote=w).loss(batch) for w in (1.0, 0.0))
    assert near > blind > alone  # more negatives, and then one more term


def test_positional_pairs_reach_less_than_the_threshold() -> None:
    worker = method(pairing="position", position_threshold=0.15)
    codes = worker._codes({"slice": torch.arange(10), "depth": torch.full((10,), 10)})
    together = (codes[:, None] - codes[None]).abs() <= worker.reach
    assert together[0, 1]
    assert not together[0, 2]
    assert together[4, [3, 5]].all()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_short_volumes_have_partitions_too(depth: int) -> None:
    for rule in ("equal", "official"):
        worker = method(partition_rule=rule)
        codes = worker._codes({"slice": torch.arange(depth), "depth": torch.full((depth,), depth)})
        assert ((codes >= 1) & (codes <= 4)).all()
        assert torch.equal(codes, slice_partition(torch.arange(depth), torch.full((depth,), depth), 4, rule))


def test_views_differ_in_geometry_and_a_share_of_one_changes_nothing() -> None:
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    assert random_crops(images, 1.0, generator) is images
    first, second = random_crops(images, 0.4, generator), random_crops(images, 0.4, generator)
    assert first.shape == images.shape
    assert not torch.allclose(first, second)
    assert first.min() >= images.min()
    assert first.max() <= images.max()
    flat = torch.full((2, 1, 8, 8), 0.3)
    torch.testing.assert_close(random_crops(flat, 0.2, generator), flat)
    with pytest.raises(ValueError, match="a crop shows a share"):
        random_crops(images, 0.0, generator)


# --------------------------------------------------------------------------------------------------- who learns, what


def test_encoder_and_projector_learn_and_nothing_else_moves(tmp_path: Path) -> None:
    start = method()
    outcome = simulate("contrastive", tmp_path, **SMALL)
    server = outcome.server
    assert all(name.startswith(("encoder.", "projector.")) for name in {**server["model"], **server["buffers"]})
    moved = [name for name, t in server["model"].items() if not torch.equal(t, start.model.state_dict()[name])]
    assert moved == list(server["model"])
    worker: Any = outcome.federation.transport.worker  # type: ignore[attr-defined]
    for name, tensor in worker.model.state_dict().items():
        if not name.startswith(("encoder.", "projector.")):
            assert torch.equal(tensor, start.model.state_dict()[name])


@pytest.mark.parametrize("policy", ["reset", "keep", "federate"])
def test_the_momentum_encoder_follows_and_is_where_the_policy_says(policy: str, tmp_path: Path) -> None:
    outcome = simulate("contrastive", tmp_path, rounds=2, transport=Recording, momentum_policy=policy, **SMALL)
    kept = {name for state in outcome.kept.values() for name in state.get("own")}
    assert bool(kept) == (policy == "keep")
    assert all(name.startswith("target.") for name in kept)
    assert ("momentum" in outcome.server.tensors) == (policy == "federate")
    sent = [update for _, _, update in messages(outcome) if "momentum" in update.tensors]
    assert len(sent) == (6 if policy == "federate" else 0)
    if sent:
        last = sent[-3:]
        total = sum(update.examples for update in last)
        for name, tensor in outcome.server["momentum"].items():
            mean = sum(update["momentum"][name] * update.examples for update in last) / total
            torch.testing.assert_close(tensor, mean)


def test_the_momentum_encoder_averages_parameters_and_copies_buffers() -> None:
    site = toy_sites()["s0"]
    worker = ready(site, momentum=0.9)
    before = {name: tensor.clone() for name, tensor in worker.target.state_dict().items()}
    assert all(torch.equal(tensor, worker.learner.state_dict()[name]) for name, tensor in before.items())
    with torch.no_grad():
        for parameter in worker.learner.parameters():
            parameter.add_(1.0)
    worker.loss(site.unlabelled_batches(0, 1, views=2)[0])
    for name, parameter in worker.target.named_parameters():
        torch.testing.assert_close(parameter, before[name] + 0.1)


def test_sites_without_labels_take_part(tmp_path: Path) -> None:
    sites = {name: replace(site, labelled=name != "s2") for name, site in toy_sites().items() if name != POOL}
    outcome = simulate("contrastive", tmp_path, sites=sites, schedule={"local_steps": None}, **SMALL)
    rows = [row for row in outcome.observer.rows("rounds") if row["round"] == 1]
    assert [row["examples"] for row in rows] == [4, 6, 8]
    assert [row["steps"] for row in rows] == [2, 3, 4]
    supervised = simulate("fedavg", tmp_path / "second", sites=sites)
    assert [r["steps"] for r in supervised.observer.rows("rounds") if r["round"] == 1] == [3, 3, 0]


def test_similarity_weighs_by_images_and_by_how_little_training_rearranged(tmp_path: Path) -> None:
    algorithm = method(weighting="similarity")
    updates = [Update(site=s, examples=n, scalars={"similarity": r}) for s, n, r in (("a", 10, 0.5), ("b", 20, 1.0))]
    assert algorithm.weigh(State(), updates) == pytest.approx([0.2, 0.8])
    outcome = simulate("contrastive", tmp_path, rounds=1, transport=Recording, weighting="similarity", **SMALL)
    found = [update.scalars["similarity"] for _, _, update in messages(outcome)]
    assert len(found) == 3
    assert all(-1 <= value <= 1 for value in found)


# ------------------------------------------------------------------------------------------------------- what travels


def test_features_travel_as_unit_vectors_and_partitions_and_nothing_else(tmp_path: Path) -> None:
    outcome = simulate("contrastive", tmp_path, transport=Recording, **SMALL)
    seen = list(messages(outcome))
    assert len(seen) == 6
    for site, message, update in seen:
        assert f"bank/{site}" not in message.tensors
        assert update["bank"].keys() == {"vectors", "partitions"}
        vectors, partitions = update["bank"]["vectors"], update["bank"]["partitions"]
        assert vectors.shape == (6, 16)  # this round's: 3 steps of 2
        assert update.sizes()["bank"] == 6 * (4 * 16 + 1)
        assert not vectors.requires_grad
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(6))
        assert partitions.dtype == torch.uint8
        assert set(partitions.tolist()) <= {1, 3}  # of two slices
        for state in (message, update):
            tensors = [t for named in state.tensors.values() for t in named.values()]
            assert not any(t.shape[-2:] == (12, 12) for t in tensors if t.ndim >= 2)
            assert "case" not in str({**state.scalars, **{k: list(v) for k, v in state.tensors.items()}})
    received = {site: {g for g in message.tensors if g.startswith("bank/")} for site, message, _ in seen[3:]}
    assert received == {"s0": {"bank/s1", "bank/s2"}, "s1": {"bank/s0", "bank/s2"}, "s2": {"bank/s0", "bank/s1"}}


def test_after_a_round_the_bank_is_its_newest_features_and_partitions_stay_with_them(tmp_path: Path) -> None:
    outcome = simulate("contrastive", tmp_path, transport=Recording, bank_size=4, **SMALL)
    for site, _, update in list(messages(outcome))[3:]:
        kept, sent = outcome.kept[site]["bank"], update["bank"]
        assert len(kept["vectors"]) == len(sent["vectors"]) == 4
        for vector, partition in zip(sent["vectors"], sent["partitions"], strict=True):
            place = (kept["vectors"] == vector).all(dim=1)
            assert place.sum() == 1
            assert kept["partitions"][place] == partition


@pytest.mark.parametrize(("exchange", "size"), [("none", 0), ("prototypes", 4 * 16 + 1), ("moments", 8 * 16 + 1)])
def test_less_can_be_exchanged(exchange: str, size: int, tmp_path: Path) -> None:
    outcome = simulate("contrastive", tmp_path, transport=Recording, exchange=exchange, noise=0.1, **SMALL)
    for _, message, update in messages(outcome):
        partitions = len(update.get("bank").get("partitions", ()))
        assert update.sizes().get("bank", 0) == partitions * size
        assert partitions in ((0,) if exchange == "none" else (1, 2))
        assert any(group.startswith("bank/") for group in message.tensors) <= (exchange != "none")
    assert not outcome.server.non_finite()


def test_small_partitions_and_noise_are_hidden() -> None:
    generator = torch.Generator().manual_seed(0)
    features = Features(unit(7), torch.tensor([1, 1, 1, 1, 1, 2, 2]), torch.arange(7))
    settings: dict[str, Any] = {"most": 7, "at_least": 5, "generator": generator}
    for exchange in ("prototypes", "moments"):
        assert pack(features, exchange, noise=0.0, **settings)["partitions"].tolist() == [1]
        assert pack(features[5:], exchange, noise=0.0, **settings) == {}
    clear, noisy = (pack(features, "moments", noise=noise, **settings) for noise in (0.0, 0.5))
    torch.testing.assert_close(clear["mean"][0], features.vectors[:5].mean(0))
    assert (noisy["deviation"] >= 0).all()
    assert not torch.allclose(noisy["mean"], clear["mean"])
    drawn = unpack([clear], "moments", keys=50, generator=generator)
    assert drawn is not None
    torch.testing.assert_close(drawn.vectors.norm(dim=1), torch.ones(50))
    assert set(drawn.partitions.tolist()) == {1}
    assert unpack([], "features", keys=1, generator=generator) is None


def test_features_of_an_absent_site_expire() -> None:
    algorithm = method(stale_ttl=1)
    server = algorithm.init_server({})
    zero = {group: {k: torch.zeros_like(t) for k, t in server[group].items()} for group in ("model", "buffers")}

    def after(server: State, *sites: str) -> State:
        mean = State({**zero, **{f"bank/{s}": foreign(3, 0).payload() for s in sites}})
        return algorithm.advance(server, mean, Cohort(dict.fromkeys(sites, 1.0), 2.0, 2, 2))

    first = after(server, "a", "b")
    second = after(first, "b")
    assert {"bank/a", "bank/b"} <= second.tensors.keys()
    third = after(second, "b")
    assert "bank/a" not in third.tensors
    assert "bank/b" in third.tensors
    assert "bank/a" in after(second, "a").tensors
    message = algorithm.broadcast(second, "b", TRAIN)
    assert message["bank/a"].keys() == {"vectors", "partitions"}
    outsider = algorithm.broadcast(second, "new", EvaluateTask(1, 0))
    assert not any(group.startswith("bank/") for group in outsider.tensors)


# ------------------------------------------------------------------------------------------------------------- probes


def test_probes_need_no_labels_and_speak_of_other_sites_only_when_these_were_received(tmp_path: Path) -> None:
    outcome = simulate("contrastive", tmp_path, **SMALL)
    site = toy_sites()["s1"]
    worker = method()
    algorithm = outcome.federation.algorithm
    evaluate = EvaluateTask(2, 0)
    worker.receive(algorithm.broadcast(outcome.server, "s1", evaluate), outcome.kept["s1"], site)
    found = worker.probe(site, "val")
    assert found.keys() == {"uniformity", "partition_accuracy", "alignment", "cross_site_accuracy"}
    assert found["uniformity"] <= 0
    assert 0 <= found["partition_accuracy"] <= 1
    worker.receive(algorithm.broadcast(outcome.server, "stranger", evaluate), State(), site)
    assert worker.probe(site, "val").keys() == {"uniformity"}


def test_a_run_without_labels_is_summarised_by_its_probes() -> None:
    common = {"round": 3, "checkpoint": "last", "split": "test", "view": "encoder", "region": "mean", "case": ""}
    rows = [
        {**common, "site": site, "seen": True, "metric": metric, "value": value}
        for site, value in (("a", 0.25), ("b", 0.75))
        for metric in ("uniformity", "alignment")
    ]
    summary = summarise(pd.DataFrame(rows[:3]))
    assert summary.sites.header == ("probes, test cases", "uniformity", "alignment")
    assert summary.sites.rows[0] == ("a", "0.2500", "0.2500")
    assert summary.sites.rows[1] == ("b", "0.7500", "not measured")
    assert summary.sites.rows[-1][:2] == ("mean over sites", "0.5000")
    assert "no Dice" in summary.sites.note
    assert summary.values["last/test/encoder/uniformity"] == pytest.approx(0.5)


# ----------------------------------------------------------------------------------------------------- failure paths


@pytest.mark.parametrize(
    ("knobs", "told"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"momentum": 1.1}, "momentum"),
        ({"crop": 0.0}, "crop"),
        ({"partitions": 0}, "partitions"),
        ({"position_threshold": 0.0}, "position_threshold"),
        ({"noise": -1.0}, "noise"),
        ({"personal": "normalisation"}, "shares its whole encoder"),
        ({"pairing": "position", "exchange": "moments"}, "averages over partitions"),
        ({"w_local": 0.0, "exchange": "none"}, "nothing to learn"),
    ],
)
def test_knobs_that_cannot_work_are_refused(knobs: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        method(**knobs)


def test_structural_pairs_need_volumes() -> None:
    class Flat(ToySite):
        def _batch(self, pick: Tensor) -> dict[str, Any]:
            return {**super()._batch(pick), "slice": torch.zeros_like(pick), "depth": torch.ones_like(pick)}

    flat = Flat.make("flat", 0)
    with pytest.raises(ValueError, match=r"'flat' holds 2-D images.*pairing=instance"):
        method().check_site(flat)
    method(pairing="instance").check_site(flat)


# ---------------------------------------------------------------------------------------------- the start of a run


TINY = ["data=phantom", "data.n_sites=2", "data.cases_per_site=8", "data.size=32", "data.resolution=32"]


def pretrained_run(folder: Path, *settings: str) -> State:
    """A run's folder as far as a second run reads it, with an encoder that no fresh one equals."""
    config = compose([*TINY, "algorithm=contrastive", "algorithm.pairing=instance", *settings], SCHEMA)
    experiment = Experiment(config)
    experiment.data.setup()
    run = RunFolder.create(folder, resume=False)
    run.write_config(OmegaConf.to_yaml(config))
    run.write_splits(experiment.data.splits())
    server = experiment.algorithm().init_server({})
    for group in ("model", "buffers"):
        server.tensors[group] = {name: t + 0.125 for name, t in server[group].items()}
    Checkpoint(run.checkpoints).save(5, server, {}, {})
    return server


@pytest.mark.slow
def test_an_encoder_is_taken_over_bit_for_bit_by_server_and_workers(tmp_path: Path) -> None:
    server = pretrained_run(tmp_path / "first")
    experiment = Experiment(compose([*TINY, "algorithm=ditto", f"pretrained={tmp_path / 'first'}"], SCHEMA))
    fresh = Experiment(compose([*TINY, "algorithm=ditto"], SCHEMA))
    for each in (experiment, fresh):
        each.check()
        each.data.setup()
        each.check_sites()
    before = {**server["model"], **server["buffers"]}
    one, other, scratch = experiment.algorithm(), experiment.algorithm(), fresh.algorithm()
    for algorithm in (one, other):
        for prefix in ("model.", "twin."):
            for name, tensor in algorithm.state_dict().items():
                if name.startswith(f"{prefix}encoder.") and tensor.is_floating_point():
                    assert torch.equal(tensor, before[name.removeprefix(prefix)])
                elif name.startswith(prefix):
                    assert torch.equal(tensor, scratch.state_dict()[name])
    assert experiment.pretrained is not None
    encoder = [
        name for name, t in one.model.state_dict().items() if name.startswith("encoder.") and t.is_floating_point()
    ]
    assert experiment.pretrained.load_into(one.model) == len(encoder)
    assert f"round 5: {len(encoder)} tensors" in experiment.pretrained.told()


@pytest.mark.slow
def test_an_encoder_that_does_not_fit_is_refused_with_the_cure(tmp_path: Path) -> None:
    first = tmp_path / "first"
    pretrained_run(first)

    def start(*settings: str) -> None:
        experiment = Experiment(compose([*TINY, "algorithm=fedavg", f"pretrained={first}", *settings], SCHEMA))
        experiment.check()
        experiment.data.setup()
        experiment.check_sites()

    start()
    with pytest.raises(ConfigError, match=r"take model.encoder=tu-resnet10t"):
        start("model.encoder=resnet18")
    with pytest.raises(ConfigError, match="same number of channels"):
        start("data.channels=1")
    with pytest.raises(ConfigError, match=r"learnt from images of \d+ cases .* take that run's data.split"):
        start("data.split_seed=3")
    with pytest.raises(ConfigError, match="is not the folder of a run"):
        start(f"pretrained={tmp_path / 'nothing'}")
    with pytest.raises(ConfigError, match="there is nothing to pre-train"):
        start("algorithm=contrastive", "model.freeze_encoder=true")


def test_an_encoder_that_sites_keep_is_no_start(tmp_path: Path) -> None:
    server = pretrained_run(tmp_path / "first")
    shared = {name: t for name, t in server["model"].items() if "bn" not in name}
    Checkpoint(RunFolder(tmp_path / "first").checkpoints).save(6, State({"model": shared}), {}, {})
    experiment = Experiment(compose([*TINY, "algorithm=fedavg", f"pretrained={tmp_path / 'first'}"], SCHEMA))
    experiment.data.setup()
    with pytest.raises(ConfigError, match="its sites keep the others"):
        experiment.check_sites()


def test_a_site_without_labels_must_be_named_and_then_trains_only_without_them() -> None:
    silent = Experiment(compose([*TINY, "data.unlabelled=[site_01]"], SCHEMA))
    silent.data.setup()
    site = silent.data.site("site_01")
    assert site.examples == 0
    training = [row for row in silent.data.splits() if row["site"] == "site_01" and row["split"] == "train"]
    assert site.training_images == len(training) > 0
    assert site.cases("test")  # still scored
    with pytest.raises(DataError, match=r"no labelled training images: it is listed in data.unlabelled"):
        site.train_batches(0, 1)
    assert next(iter(site.unlabelled_batches(0, 1, views=2)))["image"].shape[1] == 2
    silent.check_sites()
    mute = Experiment(compose([*TINY, "data.unlabelled=[site_01,site_02]"], SCHEMA))
    mute.data.setup()
    with pytest.raises(ConfigError, match="nothing to learn"):
        mute.check_sites()
    for wrong in (["data.unlabelled=[site_09]"], ["data.unlabelled=[site_01]", "data.unseen=[site_01]"]):
        with pytest.raises(DataError, match=r"data.unlabelled"):
            Experiment(compose([*TINY, *wrong], SCHEMA)).data.setup()


def test_a_frozen_encoder_neither_learns_nor_follows_the_images() -> None:
    network = create_model(
        3, 1, encoder="tu-resnet10t", encoder_depth=3, decoder_channels=[16, 8, 8], freeze_encoder=True
    )
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    network.train()
    for _ in range(2):
        loss = network(torch.rand(2, 3, 32, 32)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, tensor in network.state_dict().items():
        if name.startswith("encoder."):
            assert torch.equal(tensor, before[name]), name
    head = network.get_submodule("segmentation_head")
    assert isinstance(head, nn.Module)
    assert any(not torch.equal(t, before[f"segmentation_head.{n}"]) for n, t in head.state_dict().items())


@pytest.mark.slow
def test_stages_start_from_each_other_and_are_not_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    brief = [
        "federation.rounds=1",
        "federation.local_steps=1",
        "evaluation.overlays=false",
        "evaluation.metrics=[dice]",
    ]
    stages = 'stages=["algorithm=contrastive algorithm.pairing=instance", "algorithm=local data.labelled_patients=1"]'
    arguments = [*TINY, *brief, stages, f"output={tmp_path / 'run'}"]
    execute_stages(arguments, compose(arguments, SCHEMA))
    first, second = (RunFolder(tmp_path / "run" / name) for name in ("1", "2"))
    assert load(second.read_config()).pretrained == str(first.path)
    assert "starts from the encoder of" in capsys.readouterr().out
    assert set(first.scores()["view"]) == {"encoder"}
    assert set(second.scores()["view"]) == {"personal"}
    written = (first.path / "metrics.csv").stat().st_mtime_ns
    execute_stages(arguments, compose(arguments, SCHEMA))
    assert (first.path / "metrics.csv").stat().st_mtime_ns == written


def test_every_stage_is_checked_before_the_first_one_runs(tmp_path: Path) -> None:
    arguments = [
        *TINY,
        'stages=["algorithm=contrastive", "algorithm=ditto algorithm.lam=-1"]',
        f"output={tmp_path / 'x'}",
    ]
    with pytest.raises(ConfigError, match=r"stage 2: algorithm.lam"):
        execute_stages(arguments, compose(arguments, SCHEMA))
    assert not (tmp_path / "x").exists()
    with pytest.raises(ConfigError, match="stages start from each other"):
        execute_stages([], compose([*arguments, "pretrained=somewhere"], SCHEMA))
