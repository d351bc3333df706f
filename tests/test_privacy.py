"""What transforms promise: sensitivity, noise, account, budget, refusals; and that they obey the laws."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.accountants.analysis import rdp

from fedseg.algorithms import ALGORITHMS
from fedseg.algorithms.functional.private import PrivateStep
from fedseg.federation.contract import Cohort, Guarantee, Transform
from fedseg.federation.seeds import unforeseeable
from fedseg.federation.state import State, Tensors, Update
from fedseg.privacy.accounting import Account, gaussian_event, pure_event
from fedseg.privacy.build import build_transforms
from fedseg.privacy.encryption import Encrypted, KeyHolder
from fedseg.privacy.masked import Masked
from fedseg.privacy.patient_level import PatientLevel
from fedseg.privacy.payload import clipped, dense, flat, norm, restored, shapes, sparse
from fedseg.privacy.settings import READ_BY, Compression, Privacy
from fedseg.privacy.site_level import SiteLevel
from fedseg.privacy.sparse_vector import SparseVector, laplace
from tests.test_laws import Wire
from tests.tiers import every
from tests.world import Forgetful, Outcome, assert_same, assert_same_outcome, build, simulate

PRIVATE = PrivateStep(clip=1.0, noise=1.0, patients=1.5)


def cohort(usable: int, expected: float) -> Cohort:
    return Cohort({f"s{i}": 1.0 for i in range(usable)}, expected, usable, usable)


def transforms(compression: Mapping[str, Any] | None = None, rate: float = 1.0, **privacy: Any) -> Sequence[Transform]:
    return build_transforms(Privacy(**privacy), Compression(**(compression or {})), rate)


def account(limit: float | None = None, kind: Any = "rdp", unit: str = "site") -> Account:
    return Account(Guarantee(unit, 1e-5, limit), kind)


def update(**groups: Tensors) -> Update:
    return Update(groups, {"steps": 2.0, "seconds": 0.1, "loss": 0.7}, site="a", examples=9)


# ------------------------------------------------------------------------------------------------------ laws

KINDS: dict[str, dict[str, Any]] = {
    "site": {"mechanism": "site", "max_epsilon": 40.0},
    "sparse": {"mechanism": "sparse", "clip": 0.01, "max_epsilon": 40.0},
    "patient": {"mechanism": "patient", "max_epsilon": 40.0},
    "top_k": {"compression": {"top_k": 0.2}},
    "float16": {"compression": {"cast": "float16"}},
    "bfloat16 of top_k": {"compression": {"cast": "bfloat16", "top_k": 0.5}},
    "all": {"mechanism": "site", "compression": {"cast": "float16", "top_k": 0.5}},
}
BOTH = [(name, kind) for kind in KINDS for name in ("fedavg", "ditto") if (name, kind) != ("ditto", "patient")]


def run(name: str, kind: str, folder: Path, **more: Any) -> Outcome:
    private = {"private": PRIVATE, "norm": "group"} if kind == "patient" else {}
    return simulate(name, folder, transforms=transforms(**KINDS[kind]), **private, **more)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), every(BOTH, ["site", "sparse", "all"], at=1))
def test_amnesia_and_wire_hold_with_each_transform(name: str, kind: str, tmp_path: Path) -> None:
    whole = run(name, kind, tmp_path / "whole")
    assert not whole.server.non_finite()
    assert_same_outcome(whole, run(name, kind, tmp_path / "b", transport=Forgetful))
    assert_same_outcome(whole, run(name, kind, tmp_path / "c", transport=Wire))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), every(BOTH, ["sparse", "patient", "all"], at=1))
def test_resume_holds_with_each_transform_and_does_not_reset_the_account(name: str, kind: str, tmp_path: Path) -> None:
    whole = run(name, kind, tmp_path / "whole", rounds=3)
    run(name, kind, tmp_path / "parts", rounds=1)
    resumed = run(name, kind, tmp_path / "parts", rounds=3)
    assert_same_outcome(whole, resumed)
    spent = [row for row in whole.observer.rows("privacy") if row["round"] == 3]
    assert spent == [row for row in resumed.observer.rows("privacy") if row["round"] == 3]
    assert bool(spent) == (kind in ("site", "sparse", "patient", "all"))
    assert all(row["epsilon"] > 0 for row in spent)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedavg", "ditto"])
def test_settings_that_are_off_are_no_transform_at_all(name: str, tmp_path: Path) -> None:
    assert transforms() == ()
    assert_same_outcome(simulate(name, tmp_path / "a"), simulate(name, tmp_path / "b", transforms=transforms()))


# ------------------------------------------------------------------------------------------------------ payload

SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
NUMBERS = st.floats(-(2.0**100), 2.0**100, width=32)


@st.composite
def payloads(draw: Any, numbers: Any = NUMBERS) -> dict[str, Tensors]:
    groups = draw(st.lists(st.sampled_from(["model", "buffers", "momentum", "control"]), min_size=1, unique=True))
    found: dict[str, Tensors] = {}
    for group in groups:
        found[group] = {}
        for index in range(draw(st.integers(1, 3))):
            shape = draw(SHAPES)
            count = math.prod(shape)
            values = draw(st.lists(numbers, min_size=count, max_size=count))
            found[group][f"t{index}"] = torch.tensor(values, dtype=torch.float32).reshape(shape)
    return found


@pytest.mark.slow
@given(payloads(), st.floats(1e-3, 1e3))
@settings(max_examples=200, deadline=None)
def test_whatever_the_payload_its_norm_over_all_groups_is_bounded(payload: dict[str, Tensors], limit: float) -> None:
    before = update(**payload)
    after = clipped(before, limit)
    exact = math.sqrt(sum(float(v) ** 2 for ts in after.tensors.values() for t in ts.values() for v in t.flatten()))
    assert exact <= limit * (1 + 1e-12)
    if norm(payload) <= limit:
        assert_same(State(after.tensors), State(before.tensors))
    elif norm(payload) < 1e18:
        assert norm(after.tensors) == pytest.approx(limit, rel=1e-4)


@given(payloads(st.floats(width=32)))
@settings(max_examples=100, deadline=None)
def test_not_even_infinities_escape_the_bound(payload: dict[str, Tensors]) -> None:
    assert norm(clipped(update(**payload), 1.0).tensors) <= 1.0


@pytest.mark.slow
@given(payloads(), st.randoms())
@settings(max_examples=100, deadline=None)
def test_flat_and_sparse_groups_come_back(payload: dict[str, Tensors], random: Any) -> None:
    sent: dict[str, Tensors] = {}
    for group, tensors in payload.items():
        row = flat(tensors)
        assert_same(State({group: restored(row, shapes(tensors))}), State({group: tensors}))
        places = torch.tensor(sorted(random.sample(range(len(row)), random.randint(0, len(row)))), dtype=torch.int64)
        sent |= sparse(group, tensors, row, places)
        payload[group] = restored(torch.zeros_like(row).index_put((places,), row[places]), shapes(tensors))
    assert_same(State(dense(update(**sent)).tensors), State(payload))


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t.pop("model:shapes"),
        lambda t: t.update({"model:places": {"places": torch.tensor([7], dtype=torch.int32)}}),
        lambda t: t.update({"model:places": {"places": torch.tensor([-1], dtype=torch.int32)}}),
        lambda t: t.update({"model:values": {"values": torch.ones(2)}}),
        lambda t: t.update({"model:shapes": {"w": torch.tensor([-2, -3], dtype=torch.int32)}}),
        lambda t: t.update({"model": {"w": torch.ones(3)}}),
    ],
)
def test_a_sparse_group_that_does_not_fit_is_refused_by_site_and_group(damage: Any) -> None:
    sent = sparse("model", {"w": torch.ones(2, 3)}, torch.ones(6), torch.tensor([5]))
    damage(sent)
    if "model" in sent:
        sent = {"model": sent["model"]}
    with pytest.raises(ValueError, match="site 'a' sent no readable group 'model'"):
        dense(update(**sent))


# ------------------------------------------------------------------------------------------------------ site level


def site_level(clip: float = 1.0, noise: float = 1.0, limit: float | None = None, rate: float = 1.0) -> SiteLevel:
    return SiteLevel(clip, noise, account(limit), rate, "seeded")


@pytest.mark.slow
@given(payloads(), payloads(), st.floats(0.1, 10))
@settings(max_examples=100, deadline=None)
def test_one_site_moves_the_mean_by_clip_over_the_expected_number(
    one: dict[str, Tensors], other: dict[str, Tensors], clip: float
) -> None:
    """Whatever a site sends: running statistics and every other group count, and its number of images does not."""
    transform = site_level(clip)
    for payload in (one, other):
        sent, _ = transform.on_client(update(**payload), State(), 0)
        assert norm(sent.tensors) <= clip
        assert sent.examples == 1
        assert set(sent.scalars) == {"steps", "seconds"}
        careless = transform.on_arrival(update(**payload))
        assert norm(careless.tensors) <= clip, "the server does not rely on the sites"
        assert careless.examples == 1


def test_noise_has_the_stated_deviation_and_depends_on_seed_and_nothing_else() -> None:
    transform = site_level(clip=0.5, noise=3.0)
    mean = State({"model": {"w": torch.full((200_000,), 2.0)}, "buffers": {"m": torch.zeros(50_000)}})
    noised, memory = transform.on_server(mean, cohort(3, 4.0), State(), seed=1)
    assert float(noised["model"]["w"].mean()) == pytest.approx(2.0 * 3 / 4, abs=0.005)
    for tensor in (noised["model"]["w"], noised["buffers"]["m"]):
        assert float(tensor.std()) == pytest.approx(3.0 * 0.5 / 4, rel=0.01)
    again, _ = transform.on_server(mean, cohort(3, 4.0), memory, seed=1)
    other, _ = transform.on_server(mean, cohort(3, 4.0), memory, seed=2)
    assert_same(State(noised.tensors), State(again.tensors))
    assert not torch.equal(noised["model"]["w"], other["model"]["w"])


def test_secret_noise_does_not_follow_from_the_seed() -> None:
    transform = SiteLevel(1.0, 1.0, account(), 1.0, "secret")
    mean = State({"model": {"w": torch.zeros(8)}})
    draws = [transform.on_server(mean, cohort(1, 1.0), State(), seed=1)[0]["model"]["w"] for _ in range(2)]
    assert not torch.equal(*draws)


def test_a_run_ends_scored_and_saved_before_its_budget_is_exceeded(tmp_path: Path) -> None:
    per_round = [account().epsilon({gaussian_event(2.0, 1.0): n}) for n in range(1, 6)]
    limit = (per_round[2] + per_round[3]) / 2  # three rounds, not four
    chain = transforms(mechanism="site", noise=2.0, max_epsilon=limit)
    outcome = simulate(
        "fedavg", tmp_path, rounds=9, transforms=chain, schedule={"evaluate_every": 5, "checkpoint_every": 5}
    )
    checkpoint = outcome.federation.checkpoint
    assert checkpoint.round == 3
    assert checkpoint.best()["global"].round == 3
    assert [row["epsilon"] for row in outcome.observer.rows("privacy")] == pytest.approx(per_round[:3])
    (event,) = outcome.observer.rows("events")
    assert (event["round"], event["event"]) == (3, "stopped")
    assert "privacy budget" in event["detail"]
    again = simulate("fedavg", tmp_path, rounds=9, transforms=chain)
    assert again.observer.rows("rounds") == []
    assert_same(again.server, outcome.server)


def test_a_budget_below_one_round_is_refused_before_anything_runs() -> None:
    with pytest.raises(ValueError, match=r"one round costs epsilon .*privacy\.max_epsilon=0\.5; raise privacy\.noise"):
        site_level(limit=0.5).check(build("fedavg"))
    with pytest.raises(ValueError, match=r"privacy\.epsilon_round=1\.0 is more than privacy\.max_epsilon=0\.5"):
        transforms(mechanism="sparse", max_epsilon=0.5)[0].check(build("fedavg"))


@pytest.mark.slow
def test_sites_drawn_independently_and_a_round_without_any_is_noise(tmp_path: Path) -> None:
    chain = transforms(mechanism="site", rate=0.3)
    poisson = {"fraction": 0.3, "sampling": "poisson"}
    outcome = simulate("fedavg", tmp_path, rounds=12, transforms=chain, schedule=poisson)
    federation = outcome.federation
    drawn = [len(federation.sample(round)[0]) for round in range(1, 201)]
    assert sum(drawn) / 200 == pytest.approx(0.9, abs=0.15)
    assert set(drawn) == {0, 1, 2, 3}
    assert 0 in drawn[:12], "otherwise this test shows nothing"
    rows = outcome.observer.rows("privacy")
    assert [row["round"] for row in rows] == list(range(1, 13)), "every round is charged, whoever was drawn"
    expected = RDPAccountant()
    expected.history = [(1.0, 0.3, 12)]
    assert rows[-1]["epsilon"] == pytest.approx(expected.get_epsilon(1e-5))
    assert not outcome.observer.rows("events")


@pytest.mark.parametrize("randomness", ["secret", "seeded"])
def test_who_takes_part_in_a_secret_round_does_not_follow_from_the_seed(randomness: str, tmp_path: Path) -> None:
    """Whoever knows the seed draws as the server does; by chance 300 draws are the same once in 2^300 times."""
    chain = transforms(mechanism="site", rate=0.5, randomness=randomness)
    poisson = {"fraction": 0.5, "sampling": "poisson"}
    drawn = []
    for name in ("run", "attack"):
        federation = simulate("fedavg", tmp_path / name, 1, transforms=chain, schedule=poisson).federation
        drawn.append([federation.sample(round) for round in range(1, 101)])
    assert (drawn[0] == drawn[1]) == (randomness == "seeded")


def test_running_variances_stay_variances_under_noise(tmp_path: Path) -> None:
    outcome = simulate("fedavg", tmp_path, rounds=3, transforms=transforms(mechanism="site", noise=5.0, clip=5.0))
    variances = [t for name, t in outcome.server["buffers"].items() if name.endswith("running_var")]
    assert variances
    assert all(bool((t >= 0).all()) for t in variances)
    assert any(bool((t == 0).any()) for t in variances), "the noise did reach below zero"


# ------------------------------------------------------------------------------------------------------ account


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rdp", "prv"])
def test_the_account_is_opacus_own(kind: Any) -> None:
    theirs = {"rdp": RDPAccountant, "prv": PRVAccountant}[kind]()
    ours = account(kind=kind)
    memory = State()
    for noise, rate, steps in ((1.1, 0.2, 30), (1.1, 0.2, 10), (2.0, 0.5, 5)):
        memory = ours.charged(memory, gaussian_event(noise, rate), steps)
        for _ in range(steps):
            theirs.step(noise_multiplier=noise, sample_rate=rate)
    assert memory.scalars["epsilon"] == theirs.get_epsilon(1e-5)
    assert memory.scalars["spent"] == 0


def test_pure_mechanisms_add_up_and_join_gaussian_ones() -> None:
    ours = account()
    few, many = {pure_event(0.1): 3.0}, {pure_event(0.1): 500.0}
    assert ours.epsilon(few) == pytest.approx(0.3)
    assert ours.epsilon(many) < 50.0, "advanced composition beats the sum"
    gaussian = {gaussian_event(2.0, 1.0): 4.0}
    joint = ours.epsilon({**gaussian, **few})
    assert ours.epsilon(gaussian) < joint <= ours.epsilon(gaussian) + 0.3 + 1e-9
    orders = RDPAccountant.DEFAULT_ALPHAS
    divergence = rdp.compute_rdp(q=1.0, noise_multiplier=2.0, steps=4, orders=orders)
    divergence = [d + 3 * min(0.1, order * 0.1**2 / 2) for d, order in zip(divergence, orders, strict=True)]
    assert joint == rdp.get_privacy_spent(orders=orders, rdp=divergence, delta=1e-5)[0]
    assert ours.epsilon({}) == 0


def test_what_is_spent_is_known_before_it_is_exceeded() -> None:
    ours = account(limit=2.5)
    memory = ours.charged(State(), pure_event(1.0))
    assert (memory.scalars["epsilon"], memory.scalars["spent"]) == (1.0, 0.0)
    assert ours.refusal(memory) == ""
    memory = ours.charged(memory, pure_event(1.0))
    assert (memory.scalars["epsilon"], memory.scalars["spent"]) == (2.0, 1.0)
    assert "epsilon 2 of 2.5 at delta 1e-05 (site) is spent" in ours.refusal(memory)


# ------------------------------------------------------------------------------------------------------ sparse vector


def sparse_vector(share: float = 0.5, epsilon: float = 1.0, clip: float = 0.01, threshold: float = 0.1) -> SparseVector:
    return SparseVector(clip, share, epsilon, account(), "seeded", threshold)


@pytest.mark.slow
@given(payloads(), st.floats(0.05, 1.0), st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_every_coordinate_that_travels_is_noised_and_bounded_and_all_others_are_zero(
    payload: dict[str, Tensors], share: float, seed: int
) -> None:
    transform = sparse_vector(share)
    count = sum(t.numel() for ts in payload.values() for t in ts.values())
    sent, memory = transform.on_client(update(**payload), State(), seed)
    arrived = transform.on_arrival(sent)
    assert memory.scalars["epsilon"] == 1.0
    assert set(sent.scalars) == {"steps", "seconds"}
    there = 0
    for group, tensors in payload.items():
        shared, raw = flat(arrived[group]), flat(tensors)
        travelled = torch.zeros(len(raw), dtype=torch.bool)
        travelled[sent[f"{group}:places"]["places"].long()] = True
        there += int(travelled.sum())
        assert not shared[~travelled].any()
        assert bool((shared.abs() <= 0.01 * 2 * (1 + 1e-6)).all())
    assert there <= math.ceil(share * count)


def test_no_coordinate_leaves_as_it_is() -> None:
    row = torch.rand(2000, generator=torch.Generator().manual_seed(0)).double() * 0.02 - 0.01
    transform = sparse_vector(share=0.5, epsilon=1e7)
    places, values = transform.choose(row, torch.Generator().manual_seed(1))
    assert len(places) == 1000
    inside = values.abs() < 0.01
    assert int(inside.sum()) > 900
    assert not torch.isclose(values[inside], row[places][inside], rtol=0, atol=1e-12).any()


def test_noise_of_the_sparse_vector_technique_is_calibrated_to_what_is_released() -> None:
    """Threshold Lap(g/e1), sizes Lap(2cg/e2), values Lap(2cg/e3): measured where nothing is clipped off."""
    transform = SparseVector(1.0, 1.0, 1.0, account(), "seeded", threshold=-1e9)
    first, second, third = transform.split(100)
    assert first + second + third == pytest.approx(1.0)
    assert (third, second / first) == (0.5, pytest.approx(200 ** (2 / 3)))
    draws = laplace(200_000, 3.0, torch.Generator().manual_seed(0))
    assert float(draws.abs().mean()) == pytest.approx(3.0, rel=0.02)
    assert float(draws.mean()) == pytest.approx(0.0, abs=0.05)
    scales: list[float] = []

    def recorded(count: int, scale: float, draws: torch.Generator) -> torch.Tensor:
        scales.append(scale)
        return torch.zeros(count, dtype=torch.float64)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedseg.privacy.sparse_vector.laplace", recorded)
        transform.choose(torch.zeros(100, dtype=torch.float64), torch.Generator())
    assert scales == pytest.approx([1 / first, 200 / second, 200 / third])


def test_large_coordinates_are_chosen_when_the_budget_allows() -> None:
    row = torch.zeros(1000, dtype=torch.float64)
    row[:100] = 0.01
    places, values = sparse_vector(share=0.1, epsilon=1e6, threshold=0.5).choose(row, torch.Generator().manual_seed(0))
    assert set(places.tolist()) == set(range(100))
    assert float((values - 0.01).abs().max()) < 1e-3


def test_a_site_whose_budget_is_spent_is_not_asked_and_refuses_if_it_is(tmp_path: Path) -> None:
    chain = transforms(mechanism="sparse", epsilon_round=1.0, max_epsilon=2.5, clip=0.01)
    outcome = simulate("fedavg", tmp_path, rounds=5, transforms=chain)
    assert outcome.federation.checkpoint.round == 2
    assert {state.scalars["transform/sparse/epsilon"] for state in outcome.kept.values()} == {2.0}
    assert outcome.observer.rows("events")[-1]["event"] == "stopped"
    server = State(outcome.server.tensors)  # a server that forgot, or pretends to
    task = outcome.federation._task(3, "s0")
    message = outcome.federation.algorithm.broadcast(server, "s0", task)
    (answer,) = outcome.federation.transport.ask({"s0": task}, {"s0": message})
    assert "epsilon 2 of 2.5" in answer.refusal
    assert not answer.tensors


@pytest.mark.slow
def test_sites_with_a_budget_left_go_on_without_the_others(tmp_path: Path) -> None:
    chain = transforms(mechanism="sparse", epsilon_round=1.0, max_epsilon=2.0, clip=0.01)
    half = {"fraction": 0.34}  # one of three
    outcome = simulate("fedavg", tmp_path, rounds=40, transforms=chain, schedule=half)
    trained = [row["site"] for row in outcome.observer.rows("rounds")]
    assert sorted(trained) == ["s0", "s0", "s1", "s1", "s2", "s2"]
    spent = [row for row in outcome.observer.rows("events") if row["event"] == "spent"]
    assert spent
    assert outcome.federation.checkpoint.round < 40


# ------------------------------------------------------------------------------------------------------ compression


def test_what_top_k_left_out_is_caught_up() -> None:
    (transform,) = transforms(compression={"top_k": 0.1})
    generator = torch.Generator().manual_seed(0)
    memory = State()
    sent, true = torch.zeros(50), torch.zeros(50)
    for round in range(200):
        row = torch.randn(50, generator=generator) if round < 20 else torch.zeros(50)
        true += row
        coded, memory = transform.on_client(update(model={"w": row.reshape(5, 10)}), memory, 0)
        assert coded["model:values"]["values"].numel() == 5
        sent += transform.on_arrival(coded)["model"]["w"].flatten()
        torch.testing.assert_close(sent + memory["model"]["left"], true)
    torch.testing.assert_close(sent, true, rtol=1e-4, atol=1e-4)
    assert float(memory["model"]["left"].abs().max()) < 1e-4


def test_top_k_sends_the_largest() -> None:
    (transform,) = transforms(compression={"top_k": 0.4})
    coded, memory = transform.on_client(update(model={"a": torch.tensor([3.0, -5.0]), "b": torch.ones(3)}), State(), 0)
    assert coded["model:values"]["values"].tolist() == [3.0, -5.0]
    assert memory["model"]["left"].tolist() == [0, 0, 1, 1, 1]


@pytest.mark.slow
def test_bytes_that_travel_are_counted_and_small(tmp_path: Path) -> None:
    def up(**compression: Any) -> int:
        name = "-".join(map(str, compression.values())) or "none"
        chain = transforms(compression)
        outcome = simulate("fedavg", tmp_path / name, rounds=1, transforms=chain)
        rows = outcome.observer.rows("traffic")
        assert {row["group"] for row in rows} == {"model", "buffers"}
        return sum(row["bytes"] for row in rows if row["direction"] == "up")

    whole = up()
    assert up(cast="float16") == up(cast="bfloat16") == whole // 2
    shapes = 3 * 4 * sum(t.dim() for t in build("fedavg").init_server({}).tensors["model"].values())
    assert up(top_k=0.1) < whole * 0.1 * 2 + shapes + 3 * 64 + 3 * 4 * 8


def test_float16_saturates_instead_of_overflowing() -> None:
    (transform,) = transforms(compression={"cast": "float16"})
    coded, _ = transform.on_client(update(model={"w": torch.tensor([1e6, -1e6, 0.1])}), State(), 0)
    assert coded["model"]["w"].dtype == torch.float16
    assert transform.on_arrival(coded)["model"]["w"].tolist() == pytest.approx([65504, -65504, 0.1], rel=1e-3)


def test_the_order_is_choose_make_private_round() -> None:
    chain = transforms({"top_k": 0.5, "cast": "float16"}, mechanism="site")
    assert [transform.name for transform in chain] == ["top_k", "site", "float16"]


# ------------------------------------------------------------------------------------------------------ encryption


@pytest.fixture(scope="module")
def keys() -> KeyHolder:
    return KeyHolder()


def test_a_decrypted_sum_is_the_weighted_mean_and_the_server_cannot_decrypt(keys: KeyHolder) -> None:
    transform = Encrypted(keys)
    total = transform.accumulator()
    assert not total.context.is_private()
    rows = {site: torch.randn(5000, generator=torch.Generator().manual_seed(site)) * 0.1 for site in range(3)}
    for site, row in rows.items():
        plain = update(model={"w": row.reshape(50, 100)}, buffers={"m": row[:3]})
        sent, _ = transform.on_client(plain, State(), 0)
        assert {t.dtype for group, ts in sent.tensors.items() for t in ts.values()} == {torch.uint8, torch.int32}
        assert set(sent.scalars) == {"steps", "seconds"}
        total.add(sent, 10.0 * site)  # the first has no weight
    with pytest.raises(ValueError, match="secret"):
        total._sums["model:cipher"]["0"].decrypt()
    mean, _ = transform.on_server(total.result(), cohort(3, 3.0), State(), 0)
    expected = (10 * rows[1] + 20 * rows[2]) / 30
    torch.testing.assert_close(mean["model"]["w"].flatten(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(mean["buffers"]["m"], expected[:3], rtol=0, atol=1e-6)


def test_the_holder_of_the_key_does_not_open_a_single_update(keys: KeyHolder) -> None:
    with pytest.raises(ValueError, match="would show a site's own"):
        keys.decrypt(State(), 1)


def test_rubbish_and_other_shapes_are_refused_by_site(keys: KeyHolder) -> None:
    transform = Encrypted(keys)
    total = transform.accumulator()
    sent, _ = transform.on_client(update(model={"w": torch.ones(2)}), State(), 0)
    total.add(sent, 1.0)
    other, _ = transform.on_client(update(model={"w": torch.ones(3)}), State(), 0)
    with pytest.raises(ValueError, match="site 'a' sent other tensors"):
        total.add(other, 1.0)
    sent["model:cipher"]["0"] = torch.zeros(10, dtype=torch.uint8)
    with pytest.raises(ValueError, match="site 'a' sent something in 'model:cipher' that is no ciphertext"):
        total.add(sent, 1.0)


@pytest.mark.parametrize("name", ["fedavg", "ditto"])
def test_an_encrypted_round_is_the_plain_one_within_ckks_precision(name: str, tmp_path: Path) -> None:
    plain = simulate(name, tmp_path / "a", rounds=1)
    hidden = simulate(name, tmp_path / "b", rounds=1, transforms=transforms(aggregation="encrypted"))
    for group, tensors in plain.server.tensors.items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(hidden.server[group][key], tensor, rtol=1e-5, atol=1e-6)
    up = [row for row in hidden.observer.rows("traffic") if row["direction"] == "up"]
    assert {row["group"] for row in up} == {"model", "buffers"}


def test_encryption_goes_with_noise_and_not_with_compression() -> None:
    chain = transforms(mechanism="site", aggregation="encrypted")
    assert [transform.name for transform in chain] == ["site", "encrypted"]
    for compression in ({"top_k": 0.5}, {"cast": "float16"}):
        with pytest.raises(ValueError, match=r"encrypted adds up whole updates; it cannot go with compression\."):
            transforms(compression, aggregation="encrypted")


def test_a_private_and_encrypted_round_has_clip_and_noise(tmp_path: Path) -> None:
    private = simulate("fedavg", tmp_path / "a", rounds=1, transforms=transforms(mechanism="site"))
    chain = transforms(mechanism="site", aggregation="encrypted")
    both = simulate("fedavg", tmp_path / "b", rounds=1, transforms=chain)
    for key, tensor in private.server["model"].items():
        torch.testing.assert_close(both.server["model"][key], tensor, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ refusals

SINGLY = {
    "pooled": "pooled training holds all data in one place",
    "local": "shares nothing",
    "feddg": r"tells the server of a site's data before round 1 \(introduces\)",
    "harmofl": r"tells the server of a site's data before round 1 \(introduces\)",
    "fedrdn": r"tells the server of a site's data before round 1 \(introduces\)",
    "lcfed": r"shows the group head of each site singly \(per_site\)",
    "fedce": r"compares the updates of a round with each other \(reads_updates\)",
    "prrfl": r"compares the updates of a round with each other \(reads_updates\)",
    **dict.fromkeys(
        ("fedcost", "qffl", "ga", "fedawa"), r"compares the updates of a round with each other \(reads_updates\)"
    ),
    "softpull": r"compares the updates of a round with each other \(reads_updates\)",
    "fedsm": r"\(reads_updates\); publishes every site's personal model after training \(adapts\)",
    "cfl": r"compares the updates of a round with each other \(reads_updates\)",
    "fedamp": r"compares the updates of a round with each other \(reads_updates\)",
    "iopfl": r"publishes every site's personal model after training \(adapts\)",
    "flmrcm": r"shows the group features of each site singly \(per_site\)",
    "braintorrent": r"shows the group offer, versions of each site singly \(per_site\)",
    "contrastive": r"shows the group bank of each site singly \(per_site\)",
}
EXACT = {name: r"computes with the group \w+ \(exact_groups\)" for name, m in ALGORITHMS.items() if m.exact_groups}
PATIENT = SINGLY | {
    "ditto": r"trains a second model in the same step \(twin\.",
    "fedsam": r"its step takes a second gradient, of patients unclipped \(perturbation\)",
    "fedala": r"its start is fitted to patients' images without noise \(merge\)",
    "fedsoup": r"what it sends is chosen by validation images without noise \(soup\)",
    "perfedavg": r"its step takes a second gradient, of patients unclipped \(perturbation\)",
    "pfedme": r"trains a second model in the same step \(twin\.",
    "fedrod": r"trains a second model in the same step \(head\.",
    "apfl": r"trains a second model in the same step \(twin\.",
    "moe": r"trains a second model in the same step \(twin\.",
    **dict.fromkeys(("meanteacher", "mfedlo"), r"which are not drawn by patient \(learns_unlabelled\)"),
}


def refusals() -> list[tuple[str, str, str]]:
    chains = {
        "site": EXACT | SINGLY,
        "sparse": EXACT | SINGLY,
        "patient": PATIENT,
        "encrypted": SINGLY,
        "masked": SINGLY,
    }
    chains["top_k"] = dict.fromkeys(
        ("lcfed", "flmrcm", "contrastive", *EXACT), r"compression\.top_k sends parts of differences"
    )
    chains["top_k"] |= {"braintorrent": r"peers hand on whole models; take compression\.top_k=null"}
    return [(kind, name, table.get(name, "")) for kind, table in chains.items() for name in ALGORITHMS]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name", "reason"), every(refusals(), at=1))
def test_each_method_is_served_or_refused_with_its_reason(kind: str, name: str, reason: str, keys: KeyHolder) -> None:
    made: dict[str, Transform] = {
        "site": site_level(),
        "sparse": sparse_vector(),
        "patient": PatientLevel((1.0,), account()),
        "encrypted": Encrypted(keys),
        "masked": Masked(),
        "top_k": transforms({"top_k": 0.1})[0],
    }
    plain = name == "silobn"  # it has running statistics or nothing to keep
    algorithm = build(name, norm="group" if kind == "patient" and not plain else "batch")
    if kind == "patient" and plain:
        reason = r"normalises over batches \(encoder\.1\); take model\.norm=group"
    if not reason:
        made[kind].check(algorithm)
        return
    with pytest.raises(ValueError, match=reason):
        made[kind].check(algorithm)


def test_a_method_that_shows_nothing_of_single_sites_after_all_is_served() -> None:
    site_level().check(build("lcfed", head_calibration=False))
    site_level().check(build("contrastive", exchange="none", pairing="instance"))
    with pytest.raises(ValueError, match=r"compares the updates of a round with each other \(reads_updates\)"):
        site_level().check(build("contrastive", exchange="none", weighting="similarity"))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_methods_declare_truthfully_whether_they_introduce_themselves(name: str) -> None:
    from tests.world import toy_sites

    algorithm = build(name, **({"pairing": "instance"} if name == "contrastive" else {}))
    told = algorithm.introduce(toy_sites()["s0"])  # type: ignore[arg-type]
    assert bool(told.tensors or told.scalars) == algorithm.introduces


@pytest.mark.parametrize(
    ("knob", "value"),
    [("clip", 0.0), ("noise", -1.0), ("delta", 1.0), ("max_epsilon", 0.0), ("share", 1.5), ("epsilon_round", 0.0)],
)
def test_senseless_settings_are_refused_by_name(knob: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"privacy\.{knob}={value}"):
        Privacy(**{knob: value})
    with pytest.raises(ValueError, match=r"privacy\.accountant=prv"):
        Privacy(mechanism="sparse", accountant="prv")
    with pytest.raises(ValueError, match=r"compression\.top_k=0"):
        Compression(top_k=0.0)


OTHERS: dict[str, Any] = {"noises": (0.5,), "pass_steps": 2, "accountant": "prv", "randomness": "secret"}
CHOOSING = {"noises": (0.5, 1.0), "max_epsilon": 3.0}  # beside what says how noises are chosen


@pytest.mark.parametrize("name", READ_BY)
def test_a_promise_that_nothing_keeps_is_refused_and_a_strength_that_nothing_reads_is_said(name: str) -> None:
    _, readers = READ_BY[name]
    value, usual = OTHERS.get(name, 0.25), getattr(Privacy(), name)
    for mechanism in {"none", "site"} - set(readers):
        if name in ("max_epsilon", "delta", "randomness"):
            cures = f"leave privacy.{name} at {'null' if usual is None else usual}, or take privacy.mechanism=site"
            told = f"privacy.{name} has no effect with privacy.mechanism={mechanism}; {cures}"
            with pytest.raises(ValueError, match=rf"^{re.escape(told)}$"):
                Privacy(mechanism=mechanism, **{name: value})
        else:
            written = "[0.5]" if name == "noises" else value
            said = f"privacy.{name}={written} with privacy.mechanism={mechanism}"
            assert Privacy(mechanism=mechanism, **{name: value}).without_effect() == [said]
        assert Privacy(mechanism=mechanism, **{name: usual}).without_effect() == []
    beside = CHOOSING if name in ("epsilon_choice", "loss_bound") else {}
    for mechanism in readers:
        assert Privacy(mechanism=mechanism, **{name: value}, **beside).without_effect() == []


def test_secret_numbers_do_not_follow_from_a_seed_of_32_bits() -> None:
    """PyTorch folds a seed to 32 bits, which can be tried; the whole state is drawn instead."""
    five, folded = (torch.Generator().manual_seed(seed) for seed in (5, 5 + 2**32))
    assert torch.equal(torch.randn(9, generator=five), torch.randn(9, generator=folded))
    here, there = unforeseeable(), unforeseeable()
    words = here.get_state()[24 : 24 + 8 * 624].reshape(624, 8)
    assert not words[:, 4:].any(), "words of 32 bits in eight bytes"
    assert len({bytes(word.tolist()) for word in words}) > 620
    assert not torch.equal(torch.randn(5, generator=here), torch.randn(5, generator=there))
    numbers = torch.randn(200_000, generator=here)
    assert abs(float(numbers.mean())) < 0.02
    assert float(numbers.std()) == pytest.approx(1.0, abs=0.02)
