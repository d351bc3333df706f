"""P3SGD: a pass per patient, and noise that is chosen by a mechanism and an account that hold whatever is chosen."""

from __future__ import annotations

import itertools
import math
import os
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from fedseg.algorithms.functional.noise_choice import SCORED, ChosenNoise
from fedseg.algorithms.functional.private import Batch, PrivateStep, by_patient
from fedseg.algorithms.recipe import Training
from fedseg.configs.compose import compose
from fedseg.federation.contract import Guarantee, TrainTask, Transform
from fedseg.federation.flower.kept import Kept
from fedseg.federation.state import State, Update
from fedseg.launch.experiment import Experiment
from fedseg.launch.settings import SCHEMA
from fedseg.launch.sites.spending import Spending, Spent, released
from fedseg.privacy.accounting import (
    Account,
    chosen_event,
    dearest,
    events_of,
    gaussian_event,
    joint,
    pure_event,
)
from fedseg.privacy.build import build_transforms
from fedseg.privacy.patient_level import PatientLevel
from fedseg.privacy.settings import Compression, Privacy
from tests.world import Forgetful, assert_same_outcome, build, simulate, toy_sites

SILENT = 1e-12  # noise too small to see
SGD = Training(optimizer="sgd", lr=0.05)
NOISES = (0.8, 3.0)


def choosing(**more: Any) -> ChosenNoise:
    return ChosenNoise(**{"clip": 1.0, "noise": 0.8, "patients": 1.5, "pass_steps": 2, "noises": NOISES, **more})


def learner(private: PrivateStep, name: str = "fedavg") -> tuple[Any, Batch]:
    """A worker, and all patients of a site in one batch."""
    algorithm = build(name, SGD, private=private, norm="group")
    site = toy_sites()["s2"]
    algorithm.receive(algorithm.init_server({}), State(), site)
    (batch,) = site.patient_batches(seed=3, steps=1, rate=1.0)
    return algorithm, batch


# ------------------------------------------------------------------------------------------------------ the pass


def alone(algorithm: Any, slices: Batch, steps: int) -> list[Tensor]:
    """Where plain SGD takes a copy of the model on one patient."""
    model = deepcopy(algorithm.model)
    optimizer = torch.optim.SGD(model.parameters(), SGD.lr)
    count = len(slices["patient"])
    for step in range(steps):
        rows = slice(step % min(steps, count), count, min(steps, count))
        loss = algorithm.recipe.loss(model(algorithm.normalize(slices["image"][rows])), slices["mask"][rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [a.detach() - b.detach() for a, b in zip(model.parameters(), algorithm.model.parameters(), strict=True)]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_without_noise_and_bound_a_step_is_the_mean_of_what_patients_passes_do(steps: int) -> None:
    private = PrivateStep(1e6, SILENT / 1e6, patients=4.0, pass_steps=steps)
    algorithm, batch = learner(private)
    start = [p.detach().clone() for p in algorithm.model.parameters()]
    ways = [alone(algorithm, slices, steps) for slices in by_patient(batch)]
    assert len(ways) == 4
    optimizer = algorithm.configure_optimizers()
    algorithm.training_step(batch, 0).backward()
    assert all(torch.equal(p, was) for p, was in zip(algorithm.model.parameters(), start, strict=True)), (
        "they came back"
    )
    optimizer.step()
    for p, was, *parts in zip(algorithm.model.parameters(), start, *ways, strict=True):
        torch.testing.assert_close(p.detach() - was, torch.stack(parts).mean(dim=0), rtol=1e-4, atol=1e-6)


def test_one_patient_moves_a_step_by_the_bound_at_most_whatever_its_pass() -> None:
    private = PrivateStep(0.3, SILENT, patients=2.0, pass_steps=3)
    algorithm, batch = learner(private, "fedprox")
    learning = list(algorithm.model.parameters())

    def step(batch: Batch) -> list[Tensor]:
        return list(torch.autograd.grad(private.objective(algorithm.loss, batch, learning, SGD.lr), learning))

    whole = step(batch)
    for left_out in batch["patient"].unique():
        rest = {key: value[batch["patient"] != left_out] for key, value in batch.items() if isinstance(value, Tensor)}
        moved = math.sqrt(sum(float((a - b).double().pow(2).sum()) for a, b in zip(whole, step(rest), strict=True)))
        assert moved == pytest.approx(0.3 / 2.0, rel=1e-3), "all of these are cut"


def test_a_pass_does_not_see_weights_that_autocast_remembers() -> None:
    private = PrivateStep(1e6, SILENT, patients=1.0, pass_steps=2)
    algorithm, batch = learner(private)
    slices, learning = next(by_patient(batch)), list(algorithm.model.parameters())
    ways = []
    for remembers in (True, False):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=remembers):
            ways.append(private.way(algorithm.loss, slices, learning, rate=0.5))
    for one, other in zip(*ways, strict=True):
        assert torch.equal(one, other)


def test_one_noise_and_one_step_are_todays_private_step() -> None:
    common = ["algorithm=fedavg", "model.norm=group", "privacy.mechanism=patient"]
    plain, same = (
        Experiment(compose([*common, more], SCHEMA)) for more in ("privacy.noise=1.3", "privacy.noises=[1.3]")
    )
    assert plain._private_step == same._private_step == PrivateStep(1.0, 1.3, 4.0)
    sent = Update({}, {"steps": 3.0, "rate": 0.2}, site="a", examples=1)
    (before,), (after,) = plain.transforms, same.transforms
    assert before.on_client(sent, State(), 0)[1].scalars == after.on_client(sent, State(), 0)[1].scalars
    assert gaussian_event(1.3, 0.2) in after.on_client(sent, State(), 0)[1].scalars


@pytest.mark.parametrize("secret", [True, False])
def test_what_a_network_draws_in_a_secret_step_follows_from_no_seed(secret: bool) -> None:
    """A turn seeds PyTorch by what the server knows; a patient more shifts what the network draws for all after it."""
    private = choosing(randomness="secret" if secret else "seeded", pass_steps=1)
    algorithm, batch = learner(private)
    learning, drawn = list(algorithm.model.parameters()), []

    def draws(part: Batch) -> Tensor:
        drawn.append(float(torch.rand(())))
        return learning[0].sum()

    for _ in range(2):
        for use in (private.objective, private.settled):
            torch.manual_seed(7)
            use(draws, {**batch, SCORED: batch}, learning, SGD.lr)
    half = len(drawn) // 2
    assert (drawn[:half] == drawn[half:]) is not secret
    assert len(set(drawn)) == (len(drawn) if secret else half)


# ------------------------------------------------------------------------------------------------------ the choice


@pytest.mark.parametrize("kind", ["network", "numbers"])
def test_one_patient_moves_every_chance_in_one_direction_by_epsilon_at_most(kind: str) -> None:
    private = choosing(epsilon=0.7, bound=5.0)
    algorithm, batch = learner(private)
    learning = list(algorithm.model.parameters())
    odd = iter(itertools.cycle([math.nan, math.inf, -math.inf, -1.0, 0.2, 9.0]))

    def numbers(part: Batch) -> Tensor:
        return torch.tensor(next(odd))

    score = partial(algorithm.criterion, algorithm.model) if kind == "network" else numbers

    def logarithms(batch: Batch) -> Tensor:
        return private.log_weights(score, batch, learning, SGD.lr, torch.Generator().manual_seed(1))

    start = [p.detach().clone() for p in learning]
    one_by_one = [logarithms(slices) for slices in by_patient(batch)]
    for moved in one_by_one:
        assert bool(((moved <= 0) & (moved >= -0.7 - 1e-12)).all())
    if kind == "network":
        torch.testing.assert_close(logarithms(batch), torch.stack(one_by_one).sum(dim=0), rtol=1e-6, atol=1e-9)
        assert len(set(one_by_one[0].tolist())) == len(NOISES), "noise does move the loss"
    assert all(torch.equal(p, was) for p, was in zip(learning, start, strict=True))


def test_a_choice_over_a_sample_costs_what_is_charged() -> None:
    """All tables of losses in {0, 1} of three patients under three noises, every sample, without the last and with."""
    epsilon, rate, worst = 1.2, 0.4, 0.0
    charged = float(pure_event(epsilon, rate).split("/")[1])

    def chances(losses: np.ndarray) -> np.ndarray:
        total = np.zeros(3)
        for there in itertools.product([False, True], repeat=len(losses)):
            weights = np.exp(-epsilon * losses[list(there)].sum(axis=0))
            total += np.prod([rate if t else 1 - rate for t in there]) * weights / weights.sum()
        return total

    for entries in itertools.product([0.0, 1.0], repeat=9):
        losses = np.reshape(entries, (3, 3))
        worst = max(worst, float(np.abs(np.log(chances(losses) / chances(losses[:2]))).max()))
    assert 0.5 * charged < worst <= charged < epsilon


def test_noise_that_does_harm_is_chosen_less_and_the_choice_reads_its_own_patients() -> None:
    private = choosing(epsilon=10.0, bound=100.0)
    algorithm, batch = learner(private)
    learning = list(algorithm.model.parameters())
    start = [p.detach().clone() for p in learning]

    def score(part: Batch) -> Tensor:
        return torch.stack([(p - was).square().sum() for p, was in zip(learning, start, strict=True)]).sum()

    settled = [private.settled(score, {SCORED: batch}, learning, 0.3).noise for _ in range(30)]
    assert settled.count(0.8) == 30
    nobody = {SCORED: {key: value[:0] for key, value in batch.items()}}
    settled = [private.settled(score, nobody, learning, 0.3).noise for _ in range(60)]
    assert 15 < settled.count(0.8) < 45, "without a patient nothing is known"
    site: Any = toy_sites()["s2"]
    (first, *_), (again, *_) = (private.batches(site, 5, 4) for _ in range(2))
    assert torch.equal(first[SCORED]["image"], again[SCORED]["image"])
    same = [b["patient"].tolist() == b[SCORED]["patient"].tolist() for b in private.batches(site, 5, 40)]
    assert len(same) == 40
    assert sum(same) < 20, "patients of the choice are drawn for themselves"


# ------------------------------------------------------------------------------------------------------ the account


def divergence(order: float, noise: float, rate: float) -> float:
    """Of a Gaussian mechanism over a Poisson sample, by quadrature, in the worse direction."""

    highest = order * (order - 1) / (2 * noise**2)  # of all patients; taken out, since it may not be a float

    def density(x: float, power: float) -> float:
        ratio = math.log(1 - rate + rate * math.exp((2 * x - 1) / (2 * noise**2)))
        return math.exp(power * ratio - x**2 / (2 * noise**2) - highest) / math.sqrt(2 * math.pi) / noise

    reach, knots = (-12 * noise, 12 * noise + order), [0.0, 1.0, order]
    whole = [quad(density, *reach, (power,), limit=400, points=knots, epsabs=0)[0] for power in (order, 1 - order)]
    return (math.log(max(whole)) + highest) / (order - 1)


def test_the_account_of_chosen_noise_is_that_of_an_independent_integral() -> None:
    counts, rate, choice, delta, order = {0.8: 3, 3.0: 9}, 0.25, 0.3, 1e-4, 6.0
    ledger: dict[str, float] = {chosen_event(noise, rate, order): n for noise, n in counts.items()}
    ledger[chosen_event(2.0, rate, 2.5)] = 4  # of a later run
    ledger[pure_event(choice, rate)] = 12
    small = math.log(1 + rate * (math.exp(choice) - 1))
    spent = sum(n * divergence(order, noise, rate) for noise, n in {**counts, 2.0: 4}.items())
    spent += 12 * min(small, order * small**2 / 2)
    account = Account(Guarantee("patient", delta))
    assert account.epsilon(ledger) == pytest.approx(spent + math.log(1 / delta) / (order - 1), rel=1e-4)
    fixed = {
        event.replace("chosen", "gaussian").rpartition("/")[0]: n for event, n in ledger.items() if event[0] == "c"
    }
    assert account.epsilon(fixed) < account.epsilon(ledger), "noise that was fixed before is cheaper"


def test_the_order_is_the_one_at_which_most_steps_fit_the_limit_and_is_kept() -> None:
    limit, rate, delta = 8.0, 0.2, 1e-5
    account = Account(Guarantee("patient", delta, limit))
    order = account.order(NOISES, rate)

    def fit(order: float) -> float:
        step = sum(divergence(order, noise, rate) for noise in NOISES)
        return (limit - math.log(1 / delta) / (order - 1)) / step

    assert fit(order) > 0
    assert all(fit(order) >= fit(order + more) for more in (-0.1, 0.1, -0.5, 0.5, 3.0))
    _, after = charged(limit, State(), {3.0: 4}, rate)
    _, after = charged(limit, after, {3.0: 4}, 0.9 * rate)  # patients have arrived
    assert {float(event.rpartition("/")[2]) for event in events_of(after) if event.startswith("chosen")} == {order}


def test_the_account_holds_whoever_chooses_and_whenever_he_looks() -> None:
    """Somebody who sees the loss of privacy chooses the small noise while it is large, and looks after every step."""
    delta, runs, steps = 0.05, 20_000, 8
    account = Account(Guarantee("patient", delta))
    table = np.zeros((steps + 1, steps + 1))
    for small, large in itertools.product(range(steps + 1), repeat=2):
        if small + large:
            ledger = {chosen_event(noise, 1.0, 2.0): n for noise, n in ((1.0, small), (4.0, large)) if n}
            table[small, large] = account.epsilon(ledger)
    random, loss = np.random.default_rng(0), np.zeros(runs)
    counts, over, over_cheap = np.zeros((runs, 2), int), np.zeros(runs, bool), np.zeros(runs, bool)
    for step in range(steps):
        chosen = (loss > 1.5) | (step == 0)
        noise = np.where(chosen, 1.0, 4.0)
        loss += 0.5 / noise**2 + random.standard_normal(runs) / noise
        counts[np.arange(runs), np.where(chosen, 0, 1)] += 1
        over |= loss > table[counts[:, 0], counts[:, 1]]
        over_cheap |= loss > table[0, step + 1]
    assert over.mean() <= delta < over_cheap.mean()


def test_the_account_of_all_runs_holds_although_a_later_run_fixes_its_order_by_what_the_first_released() -> None:
    """Somebody ends a first run when its loss is high, and begins a second one of the order that suits him."""
    delta, runs = 0.05, 20_000
    spent = 0.01 * 1.12 ** np.arange(95)  # twice the divergence of order 1 after each step
    noises = 1 / np.sqrt(np.diff(spent, prepend=0.0))
    bounds, least = np.zeros(len(spent)), np.zeros(len(spent))
    first: dict[str, float] = {}
    for step, noise in enumerate(noises.tolist()):
        first = joint(first, {chosen_event(noise, 1.0, 2.0): 1.0})
        order = 1 + math.sqrt(2 * math.log(2 / delta) / spent[step])
        bounds[step] = Spent({"first": first, "second": {chosen_event(1e6, 1.0, order): 1.0}}, delta).epsilon
        least[step] = min(spent[step] * a / 2 + math.log(2 / delta) / (a - 1) for a in (2.0, order))
    draws = np.random.default_rng(0).standard_normal((runs, len(spent)))
    loss = spent / 2 + (draws / noises).cumsum(axis=1)
    assert (loss > bounds).any(axis=1).mean() <= delta < (loss > least).any(axis=1).mean()


def test_a_ledger_that_was_lost_has_its_runs_in_the_order_in_which_they_began(tmp_path: Path) -> None:
    for begun, (name, order) in enumerate([("b" * 32, 6.0), ("a" * 32, 2.5)]):
        kept = State({}, {f"transform/patient/{chosen_event(2.0, 0.5, order)}": 4.0})
        Kept(tmp_path / name / "kept").keep(TrainTask(1, 0, 4, None, 1.0), kept)
        (config := tmp_path / name / "config.yaml").write_text("privacy: {mechanism: patient}")
        os.utime(config, (begun, begun))
    assert list(Spending(tmp_path).runs()) == ["b" * 32, "a" * 32]
    account = Account(Guarantee("patient", 1e-5))
    together = account.epsilon({chosen_event(2.0, 0.5, 6.0): 8.0})
    assert Spending(tmp_path).elsewhere("", 1e-5).epsilon == pytest.approx(together)


@pytest.mark.parametrize("noises", [(1.0,), NOISES])
def test_a_first_turn_that_is_too_dear_spends_nothing_and_is_the_last(noises: tuple[float, ...]) -> None:
    transform = PatientLevel(noises, Account(Guarantee("patient", 1e-5, 0.5)), 0.1)
    sent = Update({}, {"rate": 0.5, "steps": 4.0, "noise/3.0": 4.0}, site="a", examples=1)
    update, after = transform.on_client(sent, State(), 0)
    assert "above privacy.max_epsilon" in update.refusal
    assert after.scalars == {"epsilon": 0.0, "spent": 1.0}
    assert transform.refusal(after).startswith("epsilon 0 of 0.5 at delta 1e-05 (patient) is spent: too little is left")


def charged(limit: float, before: State, chosen: dict[float, int], rate: float = 0.5) -> tuple[Update, State]:
    transform = PatientLevel(NOISES, Account(Guarantee("patient", 1e-5, limit)), 0.1)
    sent = Update(
        {}, {"rate": rate, "steps": 4.0, **{f"noise/{s!r}": float(n) for s, n in chosen.items()}}, site="a", examples=1
    )
    return transform.on_client(sent, before, 0)


def test_what_a_turn_could_have_cost_decides_whether_it_leaves_and_what_was_chosen_is_charged() -> None:
    limit = 30.0
    account = Account(Guarantee("patient", 1e-5, limit))
    order, choices = account.order(NOISES, 0.5), {pure_event(0.1, 0.5): 4.0}
    cheap = joint(choices, {chosen_event(3.0, 0.5, order): 4.0})
    dear = joint(choices, {chosen_event(0.8, 0.5, order): 4.0})
    before = State()
    while not account.exceeded(account.epsilon(joint(events_of(before), dear))):
        assert not before.scalars.get("spent")
        update, before = charged(limit, before, {3.0: 4})
        assert (update.refusal, set(update.scalars)) == ("", {"steps"})
    turns = events_of(before)[pure_event(0.1, 0.5)] / 4
    assert events_of(before) == {event: turns * n for event, n in cheap.items()}
    assert before.scalars["epsilon"] == account.epsilon(events_of(before)) < limit - 1, "another cheap turn would fit"
    assert before.scalars["spent"] == 1.0
    told = f"4 steps take epsilon to {account.epsilon(joint(events_of(before), dear)):.3g}, above privacy.max_epsilon"
    for chosen in ({0.8: 4}, {0.8: 1, 3.0: 3}, {3.0: 4}):
        update, after = charged(limit, before, chosen)
        assert update.refusal == f"{told}; raise privacy.noises"
        assert events_of(after) == events_of(before)
    # the site's own ledger of all runs
    first = charged(limit, State(), {0.8: 1, 3.0: 3})[1]
    kept = State({}, {f"transform/patient/{name}": value for name, value in first.scalars.items()})
    events = released(State(), kept, chain())
    assert events == events_of(first)
    assert dearest(events, 0.8) == dear
    assert Spent({"run": events}).epsilon == first.scalars["epsilon"]


# ------------------------------------------------------------------------------------------------------ runs

CHAIN: dict[str, Any] = {
    "mechanism": "patient",
    "noises": NOISES,
    "pass_steps": 2,
    "patients_per_step": 1.5,
    "max_epsilon": 90.0,
}


def chain() -> tuple[Transform, ...]:
    return build_transforms(Privacy(**CHAIN), Compression(), 1.0)


def run(folder: Path, rounds: int = 2, **more: Any) -> Any:
    return simulate(
        *("fedavg", folder, rounds), training=SGD, transforms=chain(), private=choosing(), norm="group", **more
    )


@pytest.mark.slow
def test_a_run_that_was_killed_spends_and_learns_what_one_that_was_not_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / "whole", transport=Forgetful)
    answered, real = [0], PatientLevel.on_client

    def killed(self: PatientLevel, update: Update, memory: State, seed: int) -> tuple[Update, State]:
        answered[0] += 1
        if answered[0] == 5:  # the second site of the second round
            raise KeyboardInterrupt
        return real(self, update, memory, seed)

    with monkeypatch.context() as patch:
        patch.setattr(PatientLevel, "on_client", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts")
    resumed = run(tmp_path / "parts")
    assert_same_outcome(whole, resumed)
    last = [row for row in whole.observer.rows("privacy") if row["round"] == 2]
    assert last
    assert last == [row for row in resumed.observer.rows("privacy") if row["round"] == 2]
    for site, kept in whole.kept.items():
        events = events_of(State({}, {k.removeprefix("transform/patient/"): v for k, v in kept.scalars.items()}))
        assert sum(n for event, n in events.items() if event.startswith("chosen/")) == 6, site
        assert sum(n for event, n in events.items() if event.startswith("pure/")) == 6, site
    told = {name for row in whole.observer.rows("rounds") for name in row}
    assert not [name for name in told if name.startswith("noise/")]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"noises": (1.0, 1.0)}, "name numbers above 0, each once"),
        ({"noises": (1.0, 2.0), "noise": 3.0}, "privacy.noise has no effect beside privacy.noises"),
        ({"noises": (1.0, 2.0)}, "an account of chosen noise is made for a limit; say privacy.max_epsilon"),
        ({"noises": (1.0, 2.0), "accountant": "prv"}, "privacy.noises needs rdp, or one noise"),
        ({"epsilon_choice": 0.5}, "privacy.epsilon_choice has no effect where no noise is chosen"),
        ({"noises": (1.0,), "loss_bound": 2.0}, "privacy.loss_bound has no effect where no noise is chosen"),
        ({"noises": (1.0, 2.0), "epsilon_choice": 1e3, "max_epsilon": 8.0}, "privacy.epsilon_choice"),
        ({"noises": (1.0, -1.0)}, "name numbers above 0, each once"),
        ({"pass_steps": 0}, "privacy.pass_steps"),
    ],
)
def test_settings_that_promise_nothing_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Privacy(mechanism="patient", **settings)


def test_passes_and_choices_need_sgd_and_what_mixes_patients_is_refused_as_ever() -> None:
    for private in (choosing(), PrivateStep(1.0, 1.0, 1.5, pass_steps=2), choosing(pass_steps=1)):
        with pytest.raises(ValueError, match=r"training\.optimizer=adam: .* take training\.optimizer=sgd"):
            build("fedavg", Training(), private=private, norm="group")
    (transform,) = chain()
    with pytest.raises(ValueError, match=r"normalises over batches \(encoder\.1\); take model\.norm=group"):
        transform.check(build("fedavg", SGD, private=choosing(), norm="batch"))
