"""A plan for volumes of several sites: that of all volumes together, from sums."""

from __future__ import annotations

import itertools
import json
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fedseg.configs.compose import compose
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.plan import BIN, Plan, Tallies, tally
from fedseg.launch import plan
from fedseg.launch.experiment import Experiment
from fedseg.launch.settings import SCHEMA
from tests.data_files import save_volume

lengths = st.floats(0.2, 12.0)
cases = st.lists(
    st.tuples(st.tuples(*[st.integers(8, 200)] * 3), st.tuples(*[lengths] * 3), st.just(np.zeros(1))),
    min_size=5, max_size=40,
)  # fmt: skip


@pytest.mark.slow
@given(ours=cases, theirs=cases)
def test_sums_of_sites_tell_what_all_volumes_together_would(ours: Any, theirs: Any) -> None:
    told, pooled = tally("a", ours) + tally("b", theirs), tally("both", [*ours, *theirs])
    assert told.cases == pooled.cases
    assert np.allclose(told.lengths, pooled.lengths)
    for axis, share in itertools.product(range(3), (0.1, 0.5)):
        spacings = sorted(spacing[axis] for _, spacing, _ in (*ours, *theirs))
        exact = np.quantile(spacings, share, method="inverted_cdf")
        assert told.length(axis, share) == pytest.approx(exact, rel=2 ** (1 / 32) - 1 + 1e-9)


def alike(shape: Any, spacing: Any, values: Any = (0.0,)) -> Tallies:
    return tally("a", [(shape, spacing, np.array(values))] * 6)


@pytest.mark.parametrize(
    ("shape", "spacing", "resample", "strides"),
    [
        ((80, 80, 80), (1.5, 1.5, 1.5), (1.5, 1.5, 1.5), [(1, 1, 1)] + [(2, 2, 2)] * 3),
        ((20, 256, 256), (6.0, 1.0, 1.0), (6.0, 1.0, 1.0), [(1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2)]),
    ],
)
def test_thick_slices_are_halved_later(shape: Any, spacing: Any, resample: Any, strides: Any) -> None:
    made = Plan.of(alike(shape, spacing), 64**3 // 8, "mr")
    assert made.resample == resample
    assert list(made.strides)[: len(strides)] == strides or list(made.strides) == strides[: len(made.strides)]
    assert np.prod(made.size) <= 64**3 // 8
    assert all(side % step == 0 for side, step in zip(made.size, np.prod(made.strides, axis=0), strict=True))
    assert all(side <= own for side, own in zip(made.size, shape, strict=True))


def test_where_some_volumes_have_thin_slices_a_thick_axis_is_refined() -> None:
    thick, thin = [((20, 256, 256), (6.0, 1.0, 1.0), np.zeros(1))], [((60, 256, 256), (2.0, 1.0, 1.0), np.zeros(1))]
    made = Plan.of(tally("a", thick * 8 + thin * 2), 64**3, "mr")
    assert made.resample == (2.0, 1.0, 1.0)


def test_ct_gets_one_window_of_the_foreground() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(60, 20, 20_000)
    made = Plan.of(alike((64, 64, 64), (1.0, 1.0, 1.0), values), 64**3, "ct")
    assert made.window == pytest.approx(np.quantile(values, [0.005, 0.995]), abs=BIN)
    assert made.settings()["data"]["intensity"] == "window"
    assert Plan.of(alike((64, 64, 64), (1.0, 1.0, 1.0), values), 64**3, "mr").window is None


def test_too_little_is_refused() -> None:
    with pytest.raises(DataError, match=r"site 'a': 4 labelled volumes are too few"):
        tally("a", [((9, 9, 9), (1.0, 1.0, 1.0), np.zeros(1))] * 4)
    with pytest.raises(DataError, match="raise voxels=100"):
        Plan.of(alike((64, 64, 64), (1.0, 1.0, 1.0)), 100, "mr")
    assert Plan.of(alike((64, 64, 64), (1.0, 1.0, 1.0)), 16**3, "mr").size == (16, 16, 16)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("plan")
    for (place, site), number in itertools.product(enumerate(("north", "south")), range(6)):
        mask = np.zeros((40, 40, 12 + number), np.uint8)
        mask[10:30, 10:30, 3:9] = 1
        image = (np.random.default_rng(number).normal(50, 5, mask.shape) + 60.0 * mask).astype(np.int16)
        affine = np.diag([-1.0, -1.0, 3.0 + place, 1.0])
        save_volume(home / site / "images" / f"v{number}.nii.gz", image, affine)
        save_volume(home / site / "masks" / f"v{number}.nii.gz", mask, affine)
    return home


@pytest.mark.slow
def test_sites_that_only_tell_sums_get_the_plan_of_all_data(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert plan.main([str(root), "modality=ct", "voxels=20000", "output=whole.yaml"]) == 0
    for site in ("north", "south"):
        assert plan.main([str(root), f"site={site}", f"tell={site}.json"]) == 0
    words = ["told=[north.json,south.json]", "modality=ct", "voxels=20000", "output=told.yaml"]
    assert plan.main(words) == 0
    assert Path("told.yaml").read_text() == Path("whole.yaml").read_text()
    assert "python train.py experiment=told.yaml" in capsys.readouterr().out
    settings = ["experiment=told.yaml", f"data.root={root}", "wandb.mode=disabled"]
    experiment = Experiment(compose(settings, SCHEMA))
    experiment.check()
    experiment.data.setup()
    experiment.check_sites()
    assert list(experiment.data.size) == yaml.safe_load(Path("told.yaml").read_text())["data"]["size"]
    assert reduce(add, map(Tallies.load, (Path("north.json"), Path("south.json")))).cases == 12


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["ROOT", "site=nrth", "tell=a.json"], "there is north, south"),
        (["ROOT", "tell=a.json"], "tell= is for one site; name it: site=north"),
        (["ROOT", "modality=pet"], "modality=pet: mr or ct"),
        (["ROOT", "voxels=many"], "voxels=many: a whole number"),
        (["told=[gone.json]"], "gone.json holds no tallies"),
        (["told=[short.json]"], "short.json does not add up to 5 cases or more"),
        (["told=[short.json]", "ROOT"], "told= needs no data"),
        (["nowhere"], "nowhere"),
    ],
)
def test_a_command_line_that_cannot_be_understood_says_why(
    words: list[str], told: str, root: Path, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.json").write_text(json.dumps({"cases": 9, "lengths": {"5": 1.0}, "values": {}}))
    assert plan.main([word.replace("ROOT", str(root)) for word in words]) == 2
    assert told in capsys.readouterr().err
    assert not Path("plan.yaml").exists()
