"""The one currency: arithmetic, bytes, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedseg.algorithms.parts import Parts
from fedseg.federation.state import (
    Mean,
    State,
    Update,
    add,
    from_bytes,
    squared_distance,
    subtract,
    to_bytes,
    told_non_finite,
)
from fedseg.models.select import nothing
from tests.world import assert_same

GOLDEN = Path(__file__).parent / "golden"
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def update(
    site: str, examples: int = 1, scalars: dict[str, float] | None = None, **groups: dict[str, Tensor]
) -> Update:
    return Update(groups, scalars or {}, site=site, examples=examples)


def mean_of(*weighted: tuple[Update, float], per_site: tuple[str, ...] = (), uniform: tuple[str, ...] = ()) -> State:
    mean = Mean(per_site, uniform)
    for one, weight in weighted:
        mean.add(one, weight)
    return mean.result()


# ------------------------------------------------------------------------------------------------------ arithmetic


def test_add_subtract_and_distance_are_the_textbook_ones() -> None:
    a, b = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([10.0, 20.0])}
    assert add(a, b)["w"].tolist() == [11, 22]
    assert add(a, b, scale=0.5)["w"].tolist() == [6, 12]
    assert subtract(b, a)["w"].tolist() == [9, 18]
    assert float(squared_distance(a, b)) == 81 + 324


def test_distance_runs_over_the_second_operand_only() -> None:
    a = {"w": torch.tensor([3.0]), "personal": torch.tensor([100.0])}
    assert float(squared_distance(a, {"w": torch.tensor([1.0])})) == 4


@pytest.mark.parametrize("operation", [add, subtract])
def test_arithmetic_refuses_other_names(operation: object) -> None:
    with pytest.raises(ValueError, match="extra"):
        operation({"w": torch.ones(1)}, {"w": torch.ones(1), "extra": torch.ones(1)})  # type: ignore[operator]


def test_clone_shares_no_storage() -> None:
    state = State({"g": {"w": torch.zeros(2)}}, {"loss": 1.0})
    copy = state.clone()
    state["g"]["w"].fill_(7)
    state.scalars["loss"] = 7.0
    assert copy["g"]["w"].tolist() == [0, 0]
    assert copy.scalars == {"loss": 1.0}


def test_sizes_count_bytes_per_group_and_type() -> None:
    state = State({"a": {"w": torch.zeros(3, 2), "n": torch.zeros((), dtype=torch.int64)}, "b": {}})
    assert state.sizes() == {"a": 3 * 2 * 4 + 8, "b": 0}
    assert State({"h": {"w": torch.zeros(5, dtype=torch.bfloat16)}}).sizes() == {"h": 10}


def test_non_finite_names_every_broken_tensor_and_only_those() -> None:
    broken = State({"g": {"a": torch.tensor([1.0, math.nan]), "b": torch.tensor([math.inf]), "c": torch.ones(2)}})
    broken.tensors["h"] = {"n": torch.tensor([3])}
    assert broken.non_finite() == ["g/a", "g/b"]
    odd = State({"g\x1b": {"b": torch.tensor([math.inf])}})
    assert told_non_finite(odd, broken) == r"3 tensors are not finite, the first is 'g\x1b/b'"
    assert told_non_finite(State({"g": {"c": torch.ones(2)}}), State()) == ""


# ------------------------------------------------------------------------------------------------------ weighted mean


def test_weighted_mean_is_the_textbook_one_scalars_included() -> None:
    one = update("one", w={"x": torch.tensor([0.0, 4.0])}, scalars={"loss": 1.0})
    two = update("two", w={"x": torch.tensor([4.0, 0.0])}, scalars={"loss": 5.0})
    mean = mean_of((one, 1.0), (two, 3.0))
    assert mean["w"]["x"].tolist() == [3, 1]
    assert mean.scalars == {"loss": 4.0}


def test_groups_of_single_sites_are_filed_not_averaged() -> None:
    one = update("one", w={"x": torch.tensor([0.0])}, head={"h": torch.tensor([1.0])})
    two = update("two", w={"x": torch.tensor([2.0])}, head={"h": torch.tensor([5.0])})
    mean = mean_of((one, 1), (two, 1), per_site=("head",))
    assert set(mean.tensors) == {"w", "head/one", "head/two"}
    assert (float(mean["w"]["x"]), float(mean["head/one"]["h"]), float(mean["head/two"]["h"])) == (1, 1, 5)


def test_in_uniform_groups_every_update_that_has_a_say_counts_the_same() -> None:
    one = update("one", w={"x": torch.tensor([0.0])}, control={"x": torch.tensor([0.0])})
    two = update("two", w={"x": torch.tensor([4.0])}, control={"x": torch.tensor([4.0])})
    idle = update("idle", w={"x": torch.tensor([9.0])}, control={"x": torch.tensor([9.0])})
    mean = mean_of((one, 1.0), (two, 3.0), (idle, 0.0), uniform=("control",))
    assert (float(mean["w"]["x"]), float(mean["control"]["x"])) == (3, 2)


def test_the_mean_does_not_touch_the_updates() -> None:
    one, two = update("one", w={"x": torch.ones(2)}), update("two", w={"x": torch.zeros(2)})
    mean_of((one, 3.0), (two, 1.0))
    assert one["w"]["x"].tolist() == [1, 1]
    assert two["w"]["x"].tolist() == [0, 0]


def test_weight_zero_has_no_say_but_must_fit() -> None:
    one, silent = update("one", w={"x": torch.tensor([2.0])}), update("silent", w={"x": torch.tensor([50.0])})
    assert float(mean_of((silent, 0.0), (one, 2.0))["w"]["x"]) == 2
    for order in ([(silent, 0.0), (update("odd", v={"x": torch.ones(1)}), 1.0)], [(one, 1.0), (update("odd"), 1.0)]):
        with pytest.raises(ValueError, match="'odd' sent the groups"):
            mean_of(*order)


def test_mean_refuses_what_makes_no_sense() -> None:
    one = update("one", w={"x": torch.ones(1)})
    with pytest.raises(ValueError, match="'one' has the negative weight"):
        mean_of((one, -1.0))
    with pytest.raises(ValueError, match="nothing to average"):
        mean_of()
    with pytest.raises(ValueError, match="nothing to average"):
        mean_of((one, 0.0))
    with pytest.raises(ValueError, match="name different tensors"):
        mean_of((one, 1.0), (update("two", w={"y": torch.ones(1)}), 1.0))


def test_fedavg_state_equals_the_golden_mean_and_counters_stay() -> None:
    golden = np.load(GOLDEN / "fedavg_state_s92.npz")
    network = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))
    parts = Parts(network, nothing)
    assert set(parts.parameters + parts.buffers + parts.stays) == set(golden["keys"])
    assert parts.stays == ["1.num_batches_tracked"]
    assert set(parts.buffers) == {"1.running_mean", "1.running_var"}
    mean = Mean()
    for site, examples in enumerate(golden["n_samples"]):
        groups = {
            group: {name: torch.from_numpy(golden[f"client__{name}"][site]) for name in names}
            for group, names in (("model", parts.parameters), ("buffers", parts.buffers))
        }
        mean.add(Update(groups, site=f"s{site}", examples=int(examples)), float(examples))
    result = mean.result()
    for name, tensor in {**result["model"], **result["buffers"]}.items():
        np.testing.assert_allclose(tensor.numpy(), golden[f"avg__{name}"], rtol=1e-12, atol=1e-12)


values = st.floats(-1e3, 1e3, width=32)
vectors = st.lists(st.lists(values, min_size=3, max_size=3), min_size=1, max_size=5)
weights = st.floats(0.1, 100.0)


@quick
@given(vectors, st.data())
def test_the_mean_lies_between_the_extremes_whatever_the_order(rows: list[list[float]], data: st.DataObject) -> None:
    parts = [update(f"s{i}", w={"x": torch.tensor(row, dtype=torch.float64)}) for i, row in enumerate(rows)]
    pairs = [(part, data.draw(weights)) for part in parts]
    mean = mean_of(*pairs)["w"]["x"]
    stacked = torch.stack([part["w"]["x"] for part in parts])
    slack = 1e-9 * (1 + stacked.abs().max())
    assert (mean >= stacked.min(0).values - slack).all()
    assert (mean <= stacked.max(0).values + slack).all()
    shuffled = mean_of(*data.draw(st.permutations(pairs)))["w"]["x"]
    torch.testing.assert_close(shuffled, mean, rtol=1e-9, atol=1e-9)


@quick
@given(st.lists(values, min_size=1, max_size=5), weights)
def test_one_update_is_its_own_mean_whatever_its_weight(row: list[float], weight: float) -> None:
    one = update("one", w={"x": torch.tensor(row, dtype=torch.float64)}, scalars={"loss": 2.0})
    mean = mean_of((one, weight))
    torch.testing.assert_close(mean["w"]["x"], one["w"]["x"], rtol=1e-12, atol=1e-12)
    assert mean.scalars["loss"] == pytest.approx(2.0)


# ------------------------------------------------------------------------------------------------------ bytes

ODD_NAMES = ["", ":", "0:x", "a.b.c", "__metadata__", "ä/ß\n\"'", "site 1/head", "日本", "\\", "group/x"]


def test_names_of_any_kind_and_empty_groups_survive_the_wire() -> None:
    tensors = {group: {name: torch.rand(2) for name in ODD_NAMES} for group in ODD_NAMES}
    state = State({**tensors, "empty": {}}, {name: float(i) for i, name in enumerate(ODD_NAMES)})
    assert_same(from_bytes(to_bytes(state)), state)
    assert_same(from_bytes(to_bytes(State())), State())


def test_every_type_and_layout_survives_the_wire() -> None:
    odd = {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "int": torch.tensor([2**40, -1]),
        "bool": torch.tensor([True, False]),
        "half": torch.rand(3).half(),
        "bfloat": torch.rand(3).bfloat16(),
        "double": torch.rand(3, dtype=torch.float64),
        "transposed": torch.rand(2, 3).T,
        "channels_last": torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "expanded": torch.rand(1).expand(4),
        "window": torch.rand(6)[2:4],
        "with_gradient": torch.rand(2, requires_grad=True),
        "nan": torch.tensor([math.nan, math.inf, -0.0]),
    }
    odd["shares_storage"] = odd["double"]
    back = from_bytes(to_bytes(State({"g": odd})))["g"]
    assert back.keys() == odd.keys()
    for name, tensor in odd.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].shape == tensor.shape
        assert torch.equal(torch.nan_to_num(back[name], 7.0), torch.nan_to_num(tensor.detach(), 7.0)), name


def test_numbers_that_are_not_finite_survive_the_wire() -> None:
    back = from_bytes(to_bytes(State({}, {"nan": math.nan, "inf": -math.inf, "tiny": 5e-324})))
    assert math.isnan(back.scalars["nan"])
    assert (back.scalars["inf"], back.scalars["tiny"]) == (-math.inf, 5e-324)


names = st.text(max_size=12)
arrays = st.lists(st.floats(allow_nan=False, width=32), max_size=4).map(torch.tensor)
states = st.builds(
    State,
    st.dictionaries(names, st.dictionaries(names, arrays, max_size=3), max_size=3),
    st.dictionaries(names, st.floats(allow_nan=False), max_size=3),
)


@quick
@given(states)
def test_any_state_survives_the_wire(state: State) -> None:
    assert_same(from_bytes(to_bytes(state)), state)


GOOD = to_bytes(State({"g": {"w": torch.arange(4.0)}}, {"loss": 1.0}))


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"not a state at all",
        b"\x00" * 64,
        b"\xff" * 64,
        GOOD[:7],
        GOOD[:-1],
        GOOD[: len(GOOD) // 2],
        GOOD + b"\x00",
        GOOD[8:],
        GOOD.replace(b'"groups"', b'"gruops"'),
        GOOD.replace(b"__metadata__", b"__metadatb__"),
        GOOD.replace(b"0:w", b"7:w"),
        GOOD.replace(b"0:w", b"00w"),
        (2).to_bytes(8, "little") + json.dumps({}).encode(),
    ],
    ids=range(14),
)
def test_bytes_that_are_no_state_are_refused(damaged: bytes) -> None:
    assert damaged != GOOD
    with pytest.raises(ValueError, match=f"these {len(damaged)} bytes are not a serialised state"):
        from_bytes(damaged)


@quick
@given(st.integers(0, len(GOOD) - 1))
def test_a_state_cut_anywhere_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="not a serialised state"):
        from_bytes(GOOD[:length])
