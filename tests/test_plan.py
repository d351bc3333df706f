"""A plan for volumes of several sites: that of all volumes together, from sums."""

from __future__ import annotations

import base64
import itertools
import json
import re
import shutil
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from fedseg.configs.compose import compose
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.plan import BIN, FINEST, Plan, Tallies, tally
from fedseg.launch import plan
from fedseg.launch.experiment import Experiment
from fedseg.launch.settings import SCHEMA
from fedseg.privacy import exchanged
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


@pytest.mark.parametrize(
    ("cases", "side", "batch"),
    [(40, 80, 2), (40, 32, 2), (200, 32, 10), (1000, 32, 16)],  # large volumes; 5 % of small ones; memory for 16
)
def test_a_step_sees_more_patches_where_volumes_are_small_and_many(cases: int, side: int, batch: int) -> None:
    made = Plan.of(tally("a", [((side,) * 3, (1.0, 1.0, 1.0), np.zeros(1))] * cases), 64**3, "mr")
    assert made.settings()["data"]["batch_size"] == batch


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
        Path(site).mkdir()
        assert plan.main([str(root), f"site={site}", f"tell={site}/told.json"]) == 0
    words = ["told=[north/told.json,south/told.json]", "modality=ct", "voxels=20000", "output=told.yaml"]
    assert plan.main(words) == 0
    assert Path("told.yaml").read_text() == Path("whole.yaml").read_text()
    assert "python train.py experiment=told.yaml" in capsys.readouterr().out
    settings = ["experiment=told.yaml", f"data.root={root}", "wandb.mode=disabled"]
    experiment = Experiment(compose(settings, SCHEMA))
    experiment.check()
    experiment.data.setup()
    experiment.check_sites()
    assert list(experiment.data.size) == yaml.safe_load(Path("told.yaml").read_text())["data"]["size"]
    assert reduce(add, map(Tallies.load, (Path("north/told.json"), Path("south/told.json")))).cases == 12


def test_a_site_that_is_left_out_has_no_part_in_a_plan(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([str(root), "site=south", "data.left_out=[south]", f"output={root / 'none.yaml'}"]) == 2
    assert "there is north" in capsys.readouterr().err


# --- masked sums ------------------------------------------------------------------------------------------------------

MASKED = ("north", "south", "east")


@pytest.fixture(scope="module")
def three(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys and masked files of three sites, as their commands wrote them; and each site's in the clear."""
    home = tmp_path_factory.mktemp("three")
    for site in MASKED:
        assert plan.main([f"site={site}", f"key={home / site}.key"]) == 0
    keys = f"masked=[{','.join(str(home / f'{site}.key.pub') for site in MASKED)}]"
    for site in MASKED:
        shutil.copy(home / f"{site}.key", home / f"{site}.kept")
        data = root / ("north" if site == "north" else "south")
        shutil.copytree(data, home / "data" / site)
        assert plan.main([str(home / "data"), f"site={site}", f"tell={home / site}.clear"]) == 0
        assert (
            plan.main([str(home / "data"), f"site={site}", f"tell={home / site}.json", f"key={home / site}.key", keys])
            == 0
        )
    return home


def listed(home: Path, *names: str) -> str:
    return f"[{','.join(str(home / name) for name in names)}]"


def test_masked_sums_give_the_plan_of_sums_in_the_clear(
    three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for kind in ("clear", "json"):
        told = listed(three, *(f"{site}.{kind}" for site in MASKED))
        assert plan.main([f"told={told}", "modality=ct", "voxels=20000", f"output={kind}.yaml"]) == 0
    assert Path("json.yaml").read_text() == Path("clear.yaml").read_text()
    shown = capsys.readouterr().out
    assert f"east, north, south together (keys {exchanged.read_told(three / 'north.json').number}) 18" in shown
    whole = reduce(add, (Tallies.load(three / f"{site}.clear") for site in MASKED))
    words, of = exchanged.total(three / f"{site}.json" for site in MASKED)
    found = Tallies.of_words(words, len(of.sites))
    assert found.cases == whole.cases
    assert np.array_equal(found.values, whole.values)
    assert np.array_equal(found.lengths[..., 0], whole.lengths[..., 0])
    assert np.abs(found.lengths[..., 1] - whole.lengths[..., 1]).max() <= whole.cases / FINEST


def test_a_masked_file_alone_is_noise(three: Path) -> None:
    clear = Tallies.load(three / "south.clear").words(3)
    masked = exchanged.read_told(three / "south.json").words
    bits = np.unpackbits(masked.view(np.uint8))
    assert abs(bits.mean() - 0.5) < 5 * 0.5 / bits.size**0.5  # of a fair coin
    pads = masked - clear
    assert len({*pads.tolist()}) == len(pads)  # nothing stands out where the clear file has zeros
    two = (
        masked + exchanged.read_told(three / "north.json").words - Tallies.load(three / "north.clear").words(3) - clear
    )
    assert len({*two.tolist()}) == len(two)  # nor of two of three
    assert (three / "south.kept").stat().st_mode & 0o077 == 0


def test_a_number_tells_the_keys_of_all_and_a_key_serves_once(three: Path, tmp_path: Path) -> None:
    exchanged.make_key(tmp_path / "other.key", "south")
    files = [three / f"{site}.key.pub" for site in MASKED]
    numbers = {exchanged.read_told(three / f"{site}.json").number for site in MASKED}
    assert numbers == {exchanged.number(exchanged.read_keys(files[::-1]))}
    assert exchanged.number(exchanged.read_keys([files[0], tmp_path / "other.key.pub", files[2]])) not in numbers
    assert not any((three / f"{site}.key").exists() for site in MASKED)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["told=[H/north.json,H/south.json]"], "told= lacks the file of east: without it"),
        (["told=[H/north.json,H/south.json,H/gone.json]"], "gone.json"),
        (["told=[H/north.json,H/south.json,H/south.json]"], "lacks the file of east"),
        (["told=[H/north.json,H/south.json,H/east.json,H/copy.json]"], "the file of a site twice"),
        (["told=[H/north.json,H/south.json,H/east.clear]"], "east.clear holds no masked numbers"),
        (["told=[H/north.json,H/south.json,H/stale.json]"], "was masked with other keys than"),
        (["told=[H/north.json,H/south.json,H/bent.json]"], "a file was changed on its way"),
        (["H/data", "site=north", "tell=a.json", "key=H/north.key", "masked=PUBS"], "a key serves once"),
        (["H/data", "site=north", "tell=a.json", "key=H/south.kept", "masked=PUBS"], "the public key of north that"),
        (["H/data", "site=north", "tell=a.json", "key=H/north.json", "masked=PUBS"], "holds no secret key"),
        (["H/data", "site=north", "tell=a.json", "key=H/north.kept"], "masked= is missing"),
        (["H/data", "site=north", "tell=a.json", "masked=PUBS"], "key= is missing"),
        (
            ["H/data", "site=north", "tell=a.json", "key=H/north.kept", "masked=[H/north.key.pub,H/east.key.pub]"],
            "masked= names 2 sites: 3 or more",
        ),
        (["H/data", "site=north", "tell=a.json", "key=H/north.kept", "masked=[H/north.json]"], "holds no public key"),
        (
            ["H/data", "site=north", "tell=a.json", "key=H/north.kept", "masked=[H/north.key.pub,H/north.key.pub]"],
            "has a site or a key that another file has",
        ),
        (["site=north", "key=H/north.kept"], "north.kept is there already"),
        (["key=new.key"], "give site=NAME key=FILE and nothing else"),
    ],
)  # fmt: skip
def test_masked_files_that_do_not_fit_are_refused(
    words: list[str], told: str, three: Path, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(three / "south.json", three / "copy.json")
    own = json.loads((three / "east.json").read_text())
    (three / "stale.json").write_text(json.dumps(own | {"number": "of other keys"}))
    (three / "bent.json").write_text(json.dumps(own | {"masked": "A" * 8 + own["masked"][8:]}))
    pubs = listed(three, *(f"{site}.key.pub" for site in MASKED))
    assert plan.main([word.replace("PUBS", pubs).replace("H/", f"{three}/") for word in words]) == 2
    assert told in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("site", "kind", "told"),
    [
        ("third", lambda: rsa.generate_private_key(65537, 1024), "that others cannot share a mask with"),
        ("third", lambda: ec.generate_private_key(ec.SECP256R1()), "they are on the curve secp384r1"),
        ("third", None, "has a site or a key that another file has"),
        ("\x1b[2Jevil", lambda: ec.generate_private_key(ec.SECP384R1()), r"site '\x1b[2Jevil', which is no name"),
    ],
)  # fmt: skip
def test_public_keys_that_serve_nobody_are_refused_when_they_are_read(
    site: str, kind: Any, told: str, tmp_path: Path
) -> None:
    files = [exchanged.make_key(tmp_path / f"{name}.key", name) for name in ("north", "south")]
    if kind is None:  # a key that is there already, written otherwise
        content = base64.b64decode(json.loads(files[0].read_text())["key"]) + b"\n"
    else:
        content = kind().public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    third = tmp_path / "third.pub"
    third.write_text(json.dumps({"site": site, "key": base64.b64encode(content).decode()}))
    with pytest.raises(ValueError, match=re.escape(f"{third} ") + ".*" + re.escape(told)):
        exchanged.read_keys([*files, third])


def test_names_that_no_site_has_are_neither_made_nor_read(tmp_path: Path, three: Path) -> None:
    with pytest.raises(ValueError, match="is no name"):
        exchanged.make_key(tmp_path / "a.key", "\x1b[2Jevil")
    told = json.loads((three / "north.json").read_text())
    for more in ({"site": "\x1b[2Jevil"}, {"sites": ["north", "\x1b"]}, {"number": "\x1b[2J"}):
        (tmp_path / "told.json").write_text(json.dumps(told | more))
        with pytest.raises(ValueError, match=r"told\.json names sites or keys in a way that no site does"):
            exchanged.read_told(tmp_path / "told.json")


@pytest.mark.parametrize(
    "words",
    [
        ["tell=a.key"],
        ["tell=./link"],
        ["tell=a.key.pub"],
        ["tell=b.pub"],
        ["tell=t.json", "output=a.key"],
        ["told=[b.pub]", "output=b.pub"],
    ],
)
def test_no_key_is_written_over(
    words: list[str], tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.key", "a.key.pub", "b.pub"):
        Path(name).write_text(name)
    Path("link").symlink_to("a.key")
    masked = [] if words[0].startswith("told") else ["DIR", "site=a", "key=a.key", "masked=[a.key.pub,b.pub,c.pub]"]
    assert plan.main([*masked, *words]) == 2
    assert "which it would write over; take another" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in tmp_path.iterdir() if path.name != "link"} == {
        name: name for name in ("a.key", "a.key.pub", "b.pub")
    }


def test_what_does_not_fit_into_a_masked_sum_is_refused() -> None:
    many = alike((64, 64, 64), (1.0, 1.0, 1.0))
    with pytest.raises(DataError, match="tell it unmasked"):
        Tallies(many.cases, many.lengths, many.values * 1e18).words(3)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["ROOT", "site=nrth", "tell=a.json"], "there is north, south"),
        (["ROOT", "tell=a.json"], "tell= is for one site; name it: site=north"),
        (["ROOT", "modality=pet"], "modality=pet: mr or ct"),
        (["ROOT", "voxels=²"], "voxels=² should be a whole number, at least 1"),
        (["ROOT", "voxels=many"], "voxels=many should be a whole number, at least 1"),
        (["told=[gone.json]"], "gone.json holds no tallies"),
        (["told=[short.json]"], "short.json does not add up to 5 cases or more"),
        (["told=[short.json]", "ROOT"], "told= needs no data"),
        (["told=[short.json, ./short.json]"], "told= names short.json twice"),
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
