"""IOP-FL as a method: the trajectory inside, publication, adaptation outside. Its mathematics has tests of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fedseg.launch.run
from fedseg.algorithms.functional.outside import Dropping
from fedseg.algorithms.functional.routing import adaptable, mixtures, routed_layers
from fedseg.algorithms.iopfl import IOPFL
from fedseg.algorithms.recipe import Recipe, Training
from fedseg.configs.compose import compose
from fedseg.federation.client import Images
from fedseg.federation.contract import EvaluateTask
from fedseg.federation.engine import RoundError
from fedseg.federation.state import State, add
from fedseg.launch.run import execute, read_settings
from fedseg.launch.scores.rescore import difference, rescore
from fedseg.launch.settings import SCHEMA
from fedseg.models.select import normalisation
from fedseg.reporting.folder import RunFolder
from tests.test_laws import Recording, Wire
from tests.world import Outcome, ToySite, assert_same, build, simulate, toy_sites

GOLDEN = Path(__file__).parent / "golden" / "iopfl_federation.npz"
SHARED = ("model", "buffers")
RELEASED = dict(compose(["algorithm=iopfl_released"], SCHEMA).algorithm.items())
del RELEASED["name"], RELEASED["preset"]


def outsider() -> ToySite:
    return replace(ToySite.make("out", 9, count=5), seen=False)


def trained(folder: Path, **options: Any) -> Outcome:
    """A federation that has trained, with a site beside it that never took part."""
    outcome = simulate("iopfl", folder, **{"adapt_passes": 2, **options})
    outcome.federation.transport.sites["out"] = outsider()  # type: ignore[attr-defined]
    return outcome


def arrive(outcome: Outcome, **knobs: Any) -> tuple[IOPFL, State]:
    """A worker at the outside site, with the message it received."""
    federation = outcome.federation
    task = EvaluateTask(2, 7, adapt=True)
    message = federation.algorithm.broadcast(outcome.server, "out", task)  # type: ignore[attr-defined]
    message = State({**message.tensors, **federation.publish(2).tensors})
    worker = build("iopfl", **{"adapt_passes": 2, **knobs})
    assert isinstance(worker, IOPFL)
    worker.receive(message, State(), outsider())
    return worker, message


def adapt(worker: IOPFL, site: ToySite | None = None, seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    worker.adapt(Images(site or outsider(), "test"))
    return worker.network("adapted")


def same_states(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


# ------------------------------------------------------------------------------------------------------ inside


class Bare(nn.Module):
    """A weight, a running statistic and a counter, beside the normalisation that the method asks for."""

    def __init__(self, weight: Tensor, statistic: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.register_buffer("running_mean", statistic.clone())
        self.register_buffer("count", torch.tensor(0))
        self.norm = nn.LayerNorm(1)


def test_the_trajectory_equals_the_reference_through_the_rounds() -> None:
    with np.load(GOLDEN) as archive:
        reference = {key: torch.from_numpy(np.asarray(archive[key])) for key in archive.files}
    recipe = Recipe.build(Training(), "sigmoid", in_channels=3)
    for a, alpha in enumerate(reference["alpha"].tolist()):
        weights, statistics = reference["local_weight"], reference["local_buffer"]
        worker = IOPFL(Bare(weights[0, 0], statistics[0, 0]).double(), recipe, alpha=alpha)
        kept = {client: State() for client in range(3)}
        for r in range(5):
            for client in range(3):
                worker.receive(State(), kept[client], outsider())
                with torch.no_grad():  # what a local fit would do
                    worker.model.weight.copy_(weights[client, r])
                    worker.model.running_mean.copy_(statistics[client, r])
                    worker.model.count.fill_(r + 1)
                worker.on_train_end()
                kept[client] = worker.keep()
                own = kept[client]["own"]
                torch.testing.assert_close(own["trajectory.weight"], reference["traj_weight"][a, client, r])
                torch.testing.assert_close(own["trajectory.running_mean"], reference["traj_buffer"][a, client, r])
                assert int(own["trajectory.count"]) == r + 1


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_the_trajectory_averages_what_the_site_trained_in_the_engine(alpha: float, tmp_path: Path) -> None:
    outcome = simulate("iopfl", tmp_path, rounds=3, transport=Recording, alpha=alpha)
    locals_: dict[str, list[dict[str, Tensor]]] = {}
    for site, message, update in outcome.federation.transport.travelled:  # type: ignore[attr-defined]
        if update.tensors:
            local = {name: t for group in SHARED for name, t in add(message[group], update[group]).items()}
            locals_.setdefault(site, []).append(local)
    assert locals_.keys() == {"s0", "s1", "s2"}
    for site, states in locals_.items():
        assert len(states) == 3
        own = outcome.kept[site]["own"]
        for name in states[0]:
            expected = states[0][name]
            for state in states[1:]:
                expected = alpha * expected + (1 - alpha) * state[name]
            torch.testing.assert_close(own[f"trajectory.{name}"], expected, atol=1e-6, rtol=1e-5)
        assert int(own["trajectory.encoder.1.num_batches_tracked"]) == 9
        assert bool(own["trained"])


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_the_averaged_model_is_fedavgs_bit_for_bit(alpha: float, tmp_path: Path) -> None:
    assert_same(
        simulate("iopfl", tmp_path / "a", alpha=alpha).server,
        simulate("fedavg", tmp_path / "b").server,
    )


def test_a_site_answers_with_the_received_model_until_its_first_fit() -> None:
    worker = build("iopfl")
    assert worker.network("personal") is worker.model
    worker.on_train_end()
    assert worker.network("personal") is worker.trajectory  # type: ignore[attr-defined]
    live = {t.data_ptr() for t in worker.model.state_dict().values()}
    assert live.isdisjoint(t.data_ptr() for t in worker.trajectory.state_dict().values())  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------------ publication


@pytest.mark.slow
def test_nothing_personal_travels_before_it_is_published_and_then_to_outside_sites_only(tmp_path: Path) -> None:
    outcome = trained(tmp_path, transport=Recording)
    federation: Any = outcome.federation
    travelled = federation.transport.travelled
    assert all({*message.tensors, *update.tensors} <= set(SHARED) for _, message, update in travelled)
    travelled.clear()
    published = federation.publish(2)
    assert [(site, set(message.tensors), set(update.tensors)) for site, message, update in travelled] == [
        (site, set(), {"personal"}) for site in ("s0", "s1", "s2")
    ]
    travelled.clear()
    federation.evaluate(outcome.server, 2, ["s0"], ("test",))
    federation.evaluate(outcome.server, 2, ["out"], ("test",), published)
    to_peer, to_outside = (set(message.tensors) for _, message, _ in travelled)
    assert to_peer == set(SHARED)
    assert to_outside == {*SHARED, "personal/s0", "personal/s1", "personal/s2"}


def test_what_is_published_is_the_whole_trajectory_and_no_alias_of_it(tmp_path: Path) -> None:
    outcome = trained(tmp_path)
    published = outcome.federation.publish(2)
    for site in ("s0", "s1", "s2"):
        own = outcome.kept[site]["own"]
        assert same_states(
            published[f"personal/{site}"],
            {name.removeprefix("trajectory."): t for name, t in own.items() if name.startswith("trajectory.")},
        )
    assert set(published["personal/s0"]) == set(build("iopfl").model.state_dict())
    again = outcome.federation.publish(2)
    assert {t.data_ptr() for t in published["personal/s2"].values()}.isdisjoint(
        t.data_ptr() for t in again["personal/s0"].values()
    )


def test_bytes_of_the_publication_are_counted(tmp_path: Path) -> None:
    outcome = trained(tmp_path)
    federation = outcome.federation
    before = len(outcome.observer.records)
    federation.record_publication(outcome.server, 2, federation.publish(2), ["out"])
    (record,) = outcome.observer.records[before:]
    model = sum(t.numel() * t.element_size() for t in build("iopfl").model.state_dict().values())
    assert record.round == 3
    up = [(row["site"], row["group"], row["bytes"]) for row in record.traffic if row["direction"] == "up"]
    assert up == [(site, f"personal/{site}", model) for site in ("s0", "s1", "s2")]
    down = [row for row in record.traffic if row["direction"] == "down"]
    assert {row["site"] for row in down} == {"out"}
    counters = 2 * 8  # of two batch normalisations; they stay at the site in the global model
    assert sum(row["bytes"] for row in down) == 4 * model - counters


def test_a_site_that_never_trained_publishes_nothing(tmp_path: Path) -> None:
    outcome = trained(tmp_path, rounds=1, schedule={"fraction": 0.34})
    assert len(outcome.federation.publish(1).tensors) == 1
    outcome.federation.transport.restore({})
    with pytest.raises(RoundError, match="none of them has trained"):
        outcome.federation.publish(1)


# ------------------------------------------------------------------------------------------------------ outside


@pytest.mark.parametrize("knobs", [{}, RELEASED], ids=["corrected", "released"])
def test_every_layer_mixes_every_site_and_the_global_model_and_every_router_learns(
    knobs: dict[str, Any], tmp_path: Path
) -> None:
    outcome = trained(tmp_path, sites=toy_sites(5), rounds=1)
    worker, message = arrive(outcome, **{**knobs, "adapt_passes": 1})
    network = adapt(worker)
    routed = network.routed if isinstance(network, Dropping) else network
    layers = routed_layers(routed)
    convolutions = [name for name, layer in worker.model.named_modules() if isinstance(layer, nn.Conv2d)]
    assert list(layers) == convolutions
    sources = [message[f"personal/s{i}"] for i in range(5)] + [message["model"]]
    for name, layer in layers.items():
        assert layer.experts == 6
        for expert, source in enumerate(sources):
            assert torch.equal(layer.weight[expert], source[f"{name}.weight"])
    torch.manual_seed(3)
    images = map(worker.normalize, Images(outsider(), "test"))
    fresh = worker.mixing.build(worker.model, sources[:-1], images).state_dict()
    moved = {name for name, tensor in routed.state_dict().items() if not torch.equal(tensor, fresh[name])}
    learning = {id(parameter) for parameter in adaptable(routed, normalisation(routed))}
    assert moved == {name for name, parameter in routed.named_parameters() if id(parameter) in learning}
    routers = {name for name, _ in routed.named_parameters() if ".router." in name}
    assert routers < moved
    assert moved - routers == {f"{part}.1.{kind}" for part in ("encoder", "decoder") for kind in ("weight", "bias")}


@pytest.mark.parametrize(("steps", "done"), [(None, 8), (5, 5), (100, 8)])
def test_steps_are_limited_whatever_the_passes(steps: int | None, done: int, tmp_path: Path) -> None:
    worker, message = arrive(trained(tmp_path, rounds=1), adapt_steps=steps)
    batches = [outsider().images] * 2
    routed = worker.mixing.build(worker.model, [t for g, t in message.tensors.items() if g.startswith("personal/")])
    assert len(replace(worker.adaptation, passes=4).run(routed, batches, worker.normalize)) == done


@pytest.mark.slow
def test_equal_models_with_a_convex_mixture_are_the_global_model(tmp_path: Path) -> None:
    worker, message = arrive(trained(tmp_path), statistics="running")
    same = {**worker.model.state_dict()}
    groups = {group: same if group.startswith("personal/") else ts for group, ts in message.tensors.items()}
    worker.receive(State(groups), State(), outsider())
    worker.adaptation = replace(worker.adaptation, passes=0)
    adapt(worker)
    images = outsider().images
    torch.testing.assert_close(worker.predict(images, "adapted"), worker.predict(images, "global"))


@pytest.mark.slow
def test_the_outside_sites_own_statistics_take_the_place_of_the_global_models(tmp_path: Path) -> None:
    """Of its images only, and not of the published models: these and the global one stay as they are."""
    outcome = trained(tmp_path)
    found = {}
    for kind in ("site", "running"):
        worker, _ = arrive(outcome, adapt_passes=0, statistics=kind)
        before = {name: t.clone() for name, t in worker.model.state_dict().items()}
        adapt(worker)
        assert all(torch.equal(before[name], t) for name, t in worker.model.state_dict().items())
        found[kind] = {n: t for n, t in worker.network("adapted").state_dict().items() if n.endswith("running_mean")}
        if kind == "running":
            assert all(torch.equal(t, before[name]) for name, t in found[kind].items())
    assert found["site"]
    assert all(not torch.allclose(t, found["running"][name]) for name, t in found["site"].items())


@pytest.mark.slow
def test_adaptation_lowers_its_objective_and_depends_on_its_knobs(tmp_path: Path) -> None:
    worker, message = arrive(trained(tmp_path))
    personal = [ts for group, ts in message.tensors.items() if group.startswith("personal/")]
    torch.manual_seed(0)
    adaptation = replace(worker.adaptation, passes=30, steps=None, lr=1e-2)
    routed = worker.mixing.build(worker.model, personal)
    history = adaptation.run(routed, Images(outsider(), "test"), worker.normalize)
    totals = [float(terms.total) for terms in history]
    assert len(totals) == 30
    assert sum(totals[-5:]) < 0.98 * sum(totals[:5])
    assert not any(terms.total.requires_grad for terms in history)


@pytest.mark.slow
def test_random_labels_change_nothing_but_the_score(tmp_path: Path) -> None:
    outcome = trained(tmp_path)
    federation: Any = outcome.federation
    honest = outsider()
    shuffled = replace(honest, masks=torch.rand_like(honest.masks).round())
    networks, scores = [], []
    for site in (honest, shuffled):
        federation.transport.sites["out"] = site
        found = federation.evaluate(outcome.server, 2, ["out"], ("test",), federation.publish(2))
        scores.append(found["out"].scalars["test/adapted/dice"])
        networks.append(federation.transport.worker.network("adapted").state_dict())
    assert same_states(*networks)
    assert scores[0] != scores[1]


def test_an_adaptation_is_given_images_and_nothing_else() -> None:
    seen: list[Tensor] = []

    class Curious(IOPFL):
        def adapt(self, images: Iterable[Tensor]) -> None:
            for _ in range(2):
                seen.extend(images)

    site = outsider()
    Curious.adapt(build("iopfl"), Images(site, "test"))  # type: ignore[arg-type]
    assert len(seen) == 2
    assert all(isinstance(batch, Tensor) and torch.equal(batch, site.images) for batch in seen)


@pytest.mark.slow
@pytest.mark.parametrize("knobs", [{}, RELEASED], ids=["corrected", "released"])
def test_adapting_is_reproducible_and_forgotten_at_the_next_site(knobs: dict[str, Any], tmp_path: Path) -> None:
    outcome = trained(tmp_path)
    (one, message), (two, _) = arrive(outcome, **knobs), arrive(outcome, **knobs)
    first, second = adapt(one), adapt(two)
    assert same_states(first.state_dict(), second.state_dict())
    images = outsider().images
    assert torch.equal(one.predict(images, "adapted"), one.predict(images, "adapted"))
    assert torch.equal(one.predict(images, "adapted"), two.predict(images, "adapted"))
    assert not same_states(adapt(two, seed=4).state_dict(), first.state_dict())
    one.receive(message, State(), outsider())
    with pytest.raises(RuntimeError, match="after `adapt`"):
        one.network("adapted")
    assert same_states(adapt(one).state_dict(), first.state_dict())


@pytest.mark.slow
def test_evaluation_without_dropout_takes_each_image_by_itself(tmp_path: Path) -> None:
    worker, _ = arrive(trained(tmp_path))
    network = adapt(worker)
    images = outsider().images
    together = worker.predict(images, "adapted")
    alone = torch.cat([worker.predict(image[None], "adapted") for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)
    network.eval()
    weights = mixtures(network, worker.normalize(images))
    for mixture in weights.values():
        torch.testing.assert_close(mixture.sum(1), torch.ones(len(images)))


@pytest.mark.slow
def test_the_released_choices_keep_dropout_and_the_batchs_statistics(tmp_path: Path) -> None:
    worker, _ = arrive(trained(tmp_path), **RELEASED)
    network = adapt(worker)
    assert isinstance(network, Dropping)
    assert not any("running" in name for name in network.state_dict())
    images = outsider().images
    together = worker.predict(images, "adapted")
    assert not torch.allclose(together[:1], worker.predict(images[:1], "adapted"), atol=1e-4)
    state = torch.get_rng_state()
    worker.predict(images, "adapted")
    assert torch.equal(state, torch.get_rng_state())
    assert any(layer.router.training for layer in routed_layers(network).values())


@pytest.mark.slow
def test_scores_through_bytes_equal_those_in_process(tmp_path: Path) -> None:
    scores = []
    for index, transport in enumerate((Recording, Wire)):
        outcome = trained(tmp_path / str(index), transport=transport)
        federation = outcome.federation
        found = federation.evaluate(outcome.server, 2, ["out"], ("test",), federation.publish(2))["out"]
        scores.append({name: value for name, value in found.scalars.items() if name != "seconds"})
    assert set(scores[0]) == {"test/global/dice", "test/adapted/dice"}
    assert scores[0] == scores[1]


def test_a_method_with_personal_layers_has_no_whole_model_to_offer() -> None:
    worker = build("iopfl", personal="normalisation")
    assert worker.views == ("personal",)
    assert not worker.unseen_views
    assert not worker.adapts


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"alpha": 1.5}, r"algorithm\.alpha=1\.5 should be"),
        ({"adapt_passes": -1}, r"algorithm\.adapt_passes=-1"),
        ({"adapt_steps": 0}, r"algorithm\.adapt_steps=0"),
        ({"adapt_lr": 0.0}, r"algorithm\.adapt_lr=0\.0"),
        ({"noise": -0.1}, r"algorithm\.noise=-0\.1"),
        ({"expansion": 0.0}, r"algorithm\.expansion=0\.0"),
        ({"dropout": 1.0}, r"algorithm\.dropout=1\.0"),
        ({"entropy_weight": -1.0}, r"algorithm\.entropy_weight=-1\.0"),
        ({"radius": 0}, r"algorithm\.radius=0"),
    ],
)
def test_knobs_out_of_range_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("iopfl", **knobs)


# ------------------------------------------------------------------------------------------------------ whole runs


def settings(folder: Path, *more: str) -> Any:
    return read_settings([
        "algorithm=iopfl", "algorithm.adapt_passes=1", "data=phantom", "data.n_sites=3", "data.cases_per_site=8",
        "data.amount=0", "data.size=32", "data.resolution=32", "data.unseen=[site_03]", "model=tiny",
        "federation.rounds=2", "federation.local_steps=1", "trainer.accelerator=cpu", "evaluation.metrics=[dice]",
        f"output={folder}", *more,
    ])  # fmt: skip


@pytest.mark.exhaustive
def test_a_run_killed_before_its_final_scores_resumes_to_the_same_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = execute(settings(tmp_path / "whole", "evaluation.overlays=false"))
    header = whole.sites.header
    assert header[-4:] == ("adapted last", "adapted best", "own-statistics last", "own-statistics best")
    outside = next(row for row in whole.sites.rows if row and row[0] == "site_03 (unseen)")
    assert all(0 <= float(cell) <= 1 for cell in outside[-4:])
    assert outside[4] == "no personal model"

    score = fedseg.launch.run.score_checkpoints

    def killed(*arguments: Any) -> Any:
        score(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(fedseg.launch.run, "score_checkpoints", killed)
    with pytest.raises(KeyboardInterrupt):
        execute(settings(tmp_path / "parts", "evaluation.overlays=false"))
    monkeypatch.setattr(fedseg.launch.run, "score_checkpoints", score)
    execute(settings(tmp_path / "parts", "resume=true", "evaluation.overlays=true"))
    one, two = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts")
    gap, compared = difference(two.scores(), one.scores())
    assert gap == 0
    assert compared == len(one.scores()) == len(two.scores())
    assert one.traffic().equals(two.traffic())
    assert set(one.traffic().query("round == 3")["site"]) == {"site_01", "site_02", "site_03"}
    assert (tmp_path / "parts" / "overlays" / "site_03.png").exists()

    again = rescore(one)
    gap, compared = difference(again, one.scores())
    assert gap == 0
    assert compared == len(again)
    assert {"adapted", "global", "own-statistics"} == set(again.query("site == 'site_03'")["view"])
