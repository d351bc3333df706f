"""VAFL's generative form: networks as their formulas say, and data in another style with the same masks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedseg.datamodules import MultiCenterDataModule
from fedseg.launch import vafl
from fedseg.launch.check import build
from fedseg.models.generative.networks import Critic, Generator, Translator
from fedseg.models.generative.translation import Translation, moved, train_translator, translated
from fedseg.models.generative.wgan import Adversarial, critic_loss, made_by, train_generator
from tests.data_files import picture, save, square
from tests.test_memorised import images

SMALL = Adversarial(steps=30, critic_steps=2, batch=8, width=4, latent=8, lr=5e-3, memory=0.8)


def test_the_critics_loss_is_the_formula() -> None:
    """Of a linear critic the gradient is the same everywhere."""
    slope = torch.linspace(-0.02, 0.03, 3 * 8 * 8)
    linear = nn.Linear(3 * 8 * 8, 1, bias=False)
    linear.load_state_dict({"weight": slope[None]})
    critic = nn.Sequential(nn.Flatten(), linear, nn.Flatten(0))
    real, made = images(0, 5)[..., :8, :8], images(1, 5)[..., :8, :8]
    expected = ((made - real).flatten(1) @ slope).mean() + 10 * (slope.norm() - 1) ** 2
    torch.testing.assert_close(critic_loss(critic, real, made, torch.rand(5), 10.0), expected)


@pytest.mark.parametrize("side", [32, 64, 128])
def test_networks_fit_the_sides_they_say(side: int) -> None:
    made = Generator(1, side, width=2, latent=4)(torch.randn(2, 4))
    assert made.shape == (2, 1, side, side)
    assert 0 <= made.min() <= made.max() <= 1
    assert Critic(1, side, width=2)(made).shape == (2,)


@pytest.mark.slow
def test_a_generator_learns_its_images_and_is_a_function_of_its_seed() -> None:
    real = 0.3 * images(0, 12) + 0.6  # bright
    short = replace(SMALL, steps=1)
    before, again = (made_by(train_generator(real, short, seed=1), 32, seed=2) for _ in range(2))
    assert torch.equal(before, again)
    made = made_by(train_generator(real, SMALL, seed=1), 32, seed=2)
    assert (made.mean() - real.mean()).abs() < 0.3 * (before.mean() - real.mean()).abs()


def test_outlines_that_move_are_seen_and_another_contrast_is_not() -> None:
    real = images(0, 6)
    assert float(moved(real, real)) == pytest.approx(0, abs=1e-6)
    assert float(moved(real, 0.9 - 0.5 * real)) < 0.01
    assert float(moved(real, real.roll(4, 3))) > 0.3
    assert float(moved(real, images(1, 6))) > 0.5


@pytest.mark.slow
def test_a_translator_begins_as_it_finds_images_and_takes_the_style() -> None:
    own, style = 0.5 * images(0, 10), 0.3 * images(1, 10) + 0.6
    torch.testing.assert_close(translated(Translator(3), own), own, atol=1e-3, rtol=0)
    how = Translation(steps=40, batch=2, width=4, blocks=1, lr=4e-3, cycle=1, identity=0, outlines=1)
    short = replace(how, steps=1)
    before, again = (translated(train_translator(own, style, short, seed=3), own) for _ in range(2))
    assert torch.equal(before, again)
    after = translated(train_translator(own, style, how, seed=3), own)
    assert (after.mean() - style.mean()).abs() < 0.7 * (own.mean() - style.mean()).abs()
    assert float(moved(after, own)) < 0.3


# ----------------------------------------------------------------------------- the command

DATA = ["data=phantom", "data.n_sites=3", "data.cases_per_site=14", "data.amount=0", "data.resolution=32"]
DATA += ["data.size=32", "data.split=[0.4,0.4,0.2]", "data.unseen=[site_03]"]
QUICK = ["images=5", "steps=1", "translation_steps=2"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of it, at once."""
    folder = tmp_path_factory.mktemp("vafl")
    assert vafl.main([*DATA, *QUICK, f"give={folder / 'given'}", f"output={folder / 'out'}"]) == 0
    return folder


def read(*words: str) -> MultiCenterDataModule:
    data, *_ = build([*words])
    data.setup()
    return data


def pictures(data: MultiCenterDataModule, site: str) -> dict[str, Tensor]:
    return {case.case: torch.from_numpy(data.site(site).image(case)) for case in data.site(site).cases("train")}


def test_data_in_another_style_have_the_same_masks_patients_and_splits(world: Path) -> None:
    before = read(*DATA)
    regions = "data.regions={disc: [1, 2], cup: [2]}"
    after = read(str(world / "out"), regions, "data.size=32", "data.unseen=[site_03]")
    assert sorted(map(str, after.splits())) == sorted(map(str, before.splits()))
    as_they_are = []
    for site in (*before.sites, *before.unseen_sites):
        for case in before.site(site).cases("test"):
            assert (before.site(site).truth(case) == after.site(site).truth(case.case)).all()
            same = (before.site(site).image(case) == after.site(site).image(case.case)).all()
        as_they_are += [site] if same else []
    assert len(as_they_are) == 2  # the giver, and the site that takes no part
    assert "site_03" in as_they_are
    assert len(list((world / "given").glob("*.png"))) == 5  # so many leave, and no more


def test_a_site_alone_does_the_same_and_its_translator_serves_new_images(world: Path, tmp_path: Path) -> None:
    (kept,) = (world / "out").glob("*/translator.safetensors")
    site = kept.parent.name
    words = [*DATA, *QUICK, f"site={site}"]
    assert vafl.main([*words, f"given={world / 'given'}", f"output={tmp_path / 'a'}"]) == 0
    assert vafl.main([*words, f"translator={kept}", f"output={tmp_path / 'b'}"]) == 0
    files = sorted(path.relative_to(kept.parent) for path in kept.parent.rglob("*.png"))
    assert len(files) == 28
    for name in files:
        found = {(root / site / name).read_bytes() for root in (world / "out", tmp_path / "a", tmp_path / "b")}
        assert len(found) == 1, name


def test_nothing_leaves_of_a_generator_that_remembers_its_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = read(*DATA)
    remembered = torch.cat([batch["image"] for batch in data.site("site_01").plain_batches()])
    monkeypatch.setattr(vafl, "made_by", lambda *_: 0.9 * remembered)
    assert vafl.main([*DATA, *QUICK, "site=site_01", f"give={tmp_path / 'given'}"]) == 2
    assert "the generator remembers its images, and nothing leaves" in capsys.readouterr().err
    assert not (tmp_path / "given").exists()


@pytest.mark.slow
def test_a_site_that_takes_no_part_and_raters_of_a_site_are_written_as_they_are(tmp_path: Path) -> None:
    raters = ["data.raters=2", "data.raters_train=rater_2", "data.raters_test=rater_1"]
    for site in ("site_01", "site_03"):
        assert vafl.main([*DATA, *raters, f"site={site}", f"output={tmp_path / 'a'}"]) == 0
    after = read(str(tmp_path / "a"), "data.regions={disc: [1, 2], cup: [2]}", "data.size=32", "data.unseen=[site_03]")
    for split, rater in (("train", "rater_2"), ("test", "rater_1")):
        before = read(*DATA, "data.raters=2", f"data.raters_test={rater}").site("site_01")
        for case in before.cases(split):
            assert (before.truth(case) == after.site("site_01").truth(case.case)).all()


def test_a_table_of_other_data_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*DATA, "site=site_01", f"output={tmp_path}"]
    for table, told in (
        ("site,image,mask\nsite_01,a.png,b.png\n", "sites.csv of other data, which would be lost"),
        ("site,image,mask,patient,split\nsite_01,a.png,b.png,a,train\n", "holds site_01 already"),
    ):
        (tmp_path / "sites.csv").write_text(table)
        assert vafl.main(words) == 2
        assert told in capsys.readouterr().err
        assert (tmp_path / "sites.csv").read_text() == table
        assert not (tmp_path / "site_01").exists()


def test_modalities_that_lack_are_not_painted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(6):
        for name in ("x", "y", "z")[: 3 if number else 2]:
            save(tmp_path / f"a/images/p{number}_{name}.png", picture(number, 32, 32, channels=1))
        save(tmp_path / f"a/masks/p{number}.png", square(32, 32))
    words = [str(tmp_path), "data.modalities=[x,y,z]", "data.missing_modalities=zeros", "data.size=32"]
    assert vafl.main([*words, "site=a", f"output={tmp_path / 'new'}"]) == 2
    assert "site 'a' lacks z, and generative networks would paint what is not there" in capsys.readouterr().err


def test_words_that_do_not_go_together_are_refused(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, given = str(world / "out"), str(world / "given")
    for words, told in (
        ([*DATA, f"give={given}"], "is not empty"),
        ([*DATA, "give=x", f"given={given}"], "name one"),
        ([*DATA, f"given={given}"], "output=OUT is missing"),
        ([*DATA, "output=x"], "output= alone"),
        ([*DATA, f"given={given}", "output=x"], "given= is for a site"),
        ([*DATA, "site=site_9"], "there is site_01, site_02, site_03"),
        ([*DATA, "site=site_01", f"output={out}"], "holds site_01 already"),
        ([*DATA, "images=²"], "images=² should be a whole number, at least 1"),
        ([*DATA, "steps=0"], "steps=0 should be a whole number, at least 1"),
        ([*DATA, "translator=x", "output=y"], "site=NAME translator=FILE"),
        ([*DATA, "site=site_01", f"translator={given}/made_0001.png", "output=y"], "holds no translator"),
        ([*DATA, "data.size=48"], "square images of [32, 64, 128] pixels"),
        ([*DATA, "data.fit=patches"], "data.fit=resize"),
        ([*DATA, "data.unseen=[site_01,site_03]", "site=site_01", "give=x"], "takes no part (data.unseen)"),
        ([*DATA, "data.raters=2", "data.raters_train=random", "site=site_01", "output=y"], "draws one of 2 masks"),
        ([*DATA, "data.size=64", f"given={given}", "output=y", "site=site_01"], "give all sites one data.size"),
        ([*DATA, f"given={out}", "output=y", "site=site_01"], "holds no PNG"),
    ):
        assert vafl.main(words) == 2, words
        assert told in capsys.readouterr().err, words
