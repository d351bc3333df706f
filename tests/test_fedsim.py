"""Fed-Sim's images: painted at a site, of shapes of all sites, beside the site's own data, which stay as they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedseg.launch import fedsim, shapes, vafl
from fedseg.models.generative.painting import Painting, edge_loss, painted, train_painter
from tests.test_memorised import images
from tests.test_vafl import DATA, read

REGIONS = "data.regions={disc: [1, 2], cup: [2]}"
QUICK = ["steps=2", "share=0.25"]


def test_edges_count_and_even_shifts_of_brightness_do_not() -> None:
    real = images(0, 4)
    assert float(edge_loss(real, real + 0.2)) == pytest.approx(0, abs=1e-6)
    assert float(edge_loss(real, real.roll(3, 2))) > 0.02


@pytest.mark.slow
def test_a_painter_paints_regions_and_looks_and_is_a_function_of_its_seed() -> None:
    masks = (images(1, 24).mean(dim=1, keepdim=True) > 0.5).float()
    real = (0.2 * images(0, 24) + 0.5 * masks + 0.2).clamp(0, 1)  # bright where the mask is
    how = Painting(steps=40, width=4, lr=5e-3)
    short = replace(how, steps=1)
    first, again = (painted(train_painter(real, masks, short, 3), masks, real, 5) for _ in range(2))
    assert torch.equal(first, again)
    made = painted(train_painter(real[:12], masks[:12], how, 3), masks[12:], real[:1], 5)
    inside, outside = ((made * m).sum() / (3 * m.sum()) for m in (masks[12:], 1 - masks[12:]))
    assert inside > outside + 0.1
    torch.testing.assert_close(made.mean(dim=(2, 3)), real[:1].mean(dim=(2, 3)).expand(12, -1), atol=0.05, rtol=0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shapes of all sites, and their data with painted images."""
    folder = tmp_path_factory.mktemp("fedsim")
    told = f"shapes={folder / 'shapes.json'}"
    assert shapes.main([*DATA, f"output={folder / 'shapes.json'}"]) == 0
    assert fedsim.main([*DATA, *QUICK, told, f"output={folder / 'out'}"]) == 0
    return folder


def test_painted_images_train_beside_data_that_stay_as_they_are(world: Path) -> None:
    before = read(*DATA)
    after = read(str(world / "out"), REGIONS, "data.size=32", "data.unseen=[site_03]")
    own = [row for row in after.splits() if not row["case"].startswith("painted")]
    made = [row for row in after.splits() if row["case"].startswith("painted")]
    assert sorted(map(str, own)) == sorted(map(str, before.splits()))
    assert {(row["site"], row["split"]) for row in made} == {("site_01", "train"), ("site_02", "train")}
    assert len(made) == 2 * round(before.site("site_01").examples / 3)
    for row in made:
        assert set(np.unique(after.site(row["site"]).truth(row["case"]))) == {0, 1, 2}
    files = {path.suffix for path in (world / "out").rglob("*") if path.is_file()}
    assert files == {".png", ".csv"}  # the painter is nowhere


def test_a_share_of_0_is_the_data_as_they_are(world: Path, tmp_path: Path) -> None:
    told = f"shapes={world / 'shapes.json'}"
    assert fedsim.main([*DATA, "share=0", "site=site_01", told, f"output={tmp_path / 'a'}"]) == 0
    assert vafl.main([*DATA, "site=site_01", f"output={tmp_path / 'b'}"]) == 0
    found = [{p.relative_to(root): p.read_bytes() for p in root.rglob("*.*")} for root in tmp_path.iterdir()]
    assert len(found[0]) > 10
    assert found[0] == found[1]


def test_words_that_cannot_be_meant_are_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told, new = f"shapes={world / 'shapes.json'}", f"output={tmp_path / 'new'}"
    folder = [str(world / "out"), "data.size=32", "data.unseen=[site_03]", *QUICK, told, new]
    for words, said in (
        ([*DATA, new], "shapes= is missing"),
        ([*DATA, told], "output= is missing"),
        ([*DATA, told, new, "share=1"], "share=1 should be a number from 0, below 1"),
        ([*DATA, told, new, "steps=²"], "steps=² should be a whole number, at least 1"),
        ([*DATA, told, new, "seed=-1"], "seed=-1 should be a whole number, at least 0"),
        ([*DATA, told, new, "steps=0"], "steps=0 should be a whole number"),
        ([*DATA, told, f"output={world / 'out'}"], "holds site_01 already"),
        ([*folder, REGIONS], "has a case 'painted_0001'"),
        ([*folder, "data.regions={disc: [1, 2]}"], "not those of disc"),
    ):
        assert fedsim.main(words) == 2, words
        assert said in capsys.readouterr().err, words
