"""What differs from site to site: site.yaml, columns of the manifest and data.per_site say the same."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from fedseg.configs.compose import ConfigError, load
from fedseg.datamodules import DataError, FolderDataModule
from fedseg.datamodules.check.command import check
from fedseg.datamodules.new import NewImages
from fedseg.launch.run import differences, execute, read_settings
from fedseg.launch.settings import SCHEMA
from tests.data_files import folder, make_sites, picture, save, square, write_manifest
from tests.tiny_run import TINY

KNOBS = {"size": [20, 24]}


def write(root: Path, site: str, text: str) -> None:
    (root / site / "site.yaml").write_text(text)


def renamed(root: Path, site: str, ending: str) -> None:
    for path in (root / site / "masks").iterdir():
        path.rename(path.with_name(f"{path.stem}{ending}{path.suffix}"))


def truths(data: FolderDataModule, site: str) -> set[int]:
    found = data.site(site)
    return {int(label) for case in found.cases("train") for label in np.unique(found.truth(case))}


def test_each_site_names_its_masks_as_it_likes(tmp_path: Path) -> None:
    """The cure that the error names for each site is tried, one after the other, until nothing is wrong."""
    make_sites(tmp_path, "a", "b", "c")
    renamed(tmp_path, "a", "_mask")
    renamed(tmp_path, "b", "_gt")
    for _ in range(2):
        with pytest.raises(DataError, match=r"into .*site\.yaml") as error:
            folder(tmp_path)
        told = str(error.value).split("write '")[1]
        line, _, rest = told.partition("' into ")
        Path(rest).write_text(line + "\n")
    assert len(folder(tmp_path).splits()) == 18
    with pytest.raises(DataError, match=r"write 'mask_suffix: \"\"' into .*c/site\.yaml"):
        folder(tmp_path, mask_suffix="_mask")


def test_names_that_nothing_pairs_up_lead_to_a_table(tmp_path: Path) -> None:
    make_sites(tmp_path, "a", "b")
    for path in (tmp_path / "a/masks").iterdir():
        path.rename(path.with_name(path.name.replace("case", "truth")))
    with pytest.raises(DataError, match=r"list the pairs in .*/sites.csv \(columns site,image,mask\)"):
        folder(tmp_path)
    pairs = [(s, p.name) for s in "ab" for p in sorted((tmp_path / s / "images").iterdir())]
    masks = {"a": "truth", "b": "case"}
    rows = [
        {"site": s, "image": f"{s}/images/{n}", "mask": f"{s}/masks/{n.replace('case', masks[s])}"} for s, n in pairs
    ]
    write_manifest(tmp_path / "sites.csv", rows)
    assert len(folder(tmp_path).splits()) == 12


def mapped(root: Path) -> None:
    make_sites(root, "a", "b")
    for path in (root / "b/masks").iterdir():
        save(path, square(label=7))


def as_file(root: Path) -> dict[str, Any]:
    write(root, "b", "label_values: {7: 1}\nspacing: [0.5, 0.25]\n")
    return {}


def as_columns(root: Path) -> dict[str, Any]:
    rows = [
        {"site": s, "image": f"{s}/images/{p.name}", "mask": f"{s}/masks/{p.name}"}
        | {"label_values": "{7: 1}" if s == "b" else "", "spacing": '"[0.5, 0.25]"' if s == "b" else ""}
        for s in "ab"
        for p in sorted((root / s / "images").iterdir())
    ]
    write_manifest(root / "sites.csv", rows)
    return {}


def as_setting(root: Path) -> dict[str, Any]:
    return {"per_site": {"b": {"label_values": {7: 1}, "spacing": [0.5, 0.25]}}}


@pytest.mark.parametrize("cache", ["memory", "disk"])
@pytest.mark.parametrize("say", [as_file, as_columns, as_setting])
def test_labels_and_spacing_are_those_of_the_site(tmp_path: Path, say: Any, cache: str) -> None:
    mapped(tmp_path / "data")
    place = {"cache": cache, "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(DataError, match="unknown label ids 7"):
        folder(tmp_path / "data", **place)
    data = folder(tmp_path / "data", **place, **say(tmp_path / "data"))
    assert truths(data, "a") == truths(data, "b") == {0, 1}
    case = data.site("b").cases("train")[0]
    assert data.site("b").spacing(case) == (1.0, 0.5, 0.25)
    assert data.site("a").spacing(data.site("a").cases("train")[0]) is None
    assert data.per_site.told() == {"b": {"label_values": {"7": 1}, "spacing": [0.5, 0.25]}}
    again = FolderDataModule(root=str(tmp_path / "data"), **KNOBS, per_site=data.per_site.told())
    again.setup()  # what a run saved agrees with what the site says
    assert truths(again, "b") == {0, 1}
    checked = check(FolderDataModule(root=str(tmp_path / "data"), **KNOBS, **say(tmp_path / "data")))
    assert not [finding for finding in checked.findings if finding.severity == "error"]


def test_intensities_are_those_of_the_site_for_new_images_too(tmp_path: Path) -> None:
    for site in "ab":
        for number in range(6):
            values = picture(number, channels=1).astype(np.float32) * 10
            save((tmp_path / "data" / site / "images" / f"c{number}.npy"), values)
            save((tmp_path / "data" / site / "masks" / f"c{number}.png"), square())
    write(tmp_path / "data", "b", "intensity: window\nwindow: [0, 5100]\n")
    data = folder(tmp_path / "data")
    case = data.site("b").cases("train")[0]
    assert data.site("b").image(case).max() <= 0.5
    saved = FolderDataModule(root=str(tmp_path / "gone"), **KNOBS, per_site=data.per_site.told())
    image = tmp_path / "data/b/images" / f"{case.case}.npy"
    for site, most in (("b", 0.5), ("a", 1.0)):
        (batch,) = NewImages(saved, image, 1, site).batches(0)
        assert (most - 0.01) < float(batch.max()) <= most


def test_a_setting_for_all_is_read_where_a_site_says_so_itself_and_nobody_is_asked_who_is_alone(tmp_path: Path) -> None:
    make_sites(tmp_path, "a", "b")
    data = FolderDataModule(root=str(tmp_path), **KNOBS, window=[0, 200])
    with pytest.raises(DataError, match=r"data\.window has no effect with data\.intensity=percentile"):
        data.setup()
    told = [str(finding) for finding in check(data).findings if finding.severity == "error"]
    assert len(told) == 1
    assert "data.window has no effect" in told[0]
    alone = FolderDataModule(root=str(tmp_path), **KNOBS, window=[0, 200])
    alone.restrict("a")
    alone.setup()
    write(tmp_path, "b", "intensity: window\n")
    folder(tmp_path, window=[0, 200])
    write(tmp_path, "b", "")
    rows = [
        {"site": s, "image": f"{s}/images/{p.name}", "mask": f"{s}/masks/{p.name}", "intensity": "window" * (s == "b")}
        for s in "ab"
        for p in sorted((tmp_path / s / "images").iterdir())
    ]
    write_manifest(tmp_path / "sites.csv", rows)
    folder(tmp_path, window=[0, 200])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("mask_sufix: _gt", "unknown key 'mask_sufix'; did you mean 'mask_suffix'?"),
        ("axis: left", "axis='left' cannot be used"),
        ("axis: 5", "data.axis=5: a volume is cut along axis 0, 1 or 2"),
        ("window: [1]", "window=.* cannot be used"),
        ("spacing: [0, 1]", "data.spacing=.*: give"),
        ("label_values: {red: 1}", "label_values: key 'red' is neither"),
        ("- images", "expected lines such as 'mask_suffix: _mask'"),
        ("images: [", "cannot be read"),
        ("missing_masks: maybe", "cannot be used"),
    ],
)
def test_what_cannot_be_used_is_refused_with_file_and_cure(tmp_path: Path, text: str, told: str) -> None:
    make_sites(tmp_path, "a", "b")
    write(tmp_path, "b", text)
    with pytest.raises(DataError, match=f"b/site.yaml.*{told}"):
        folder(tmp_path)
    found = check(FolderDataModule(root=str(tmp_path))).findings
    assert [finding.site for finding in found if finding.kind == "layout"] == ["b"]


def test_two_that_disagree_are_refused(tmp_path: Path) -> None:
    make_sites(tmp_path, "a", "b")
    write(tmp_path, "b", "axis: 1")
    with pytest.raises(DataError, match="axis is 1, but 0 was said before"):
        folder(tmp_path, per_site={"b": {"axis": 0}})
    with pytest.raises(DataError, match=r"data.per_site: no site 'c'; .*Known: a, b"):
        folder(tmp_path, per_site={"c": {"axis": 0}})


@pytest.mark.parametrize("key", ["images", "masks"])
def test_folders_of_other_names_are_told_or_named(tmp_path: Path, key: str) -> None:
    make_sites(tmp_path, "a", "b")
    (tmp_path / "b" / key).rename(tmp_path / "b/odd")
    with pytest.raises(DataError, match=f"b/{key} is missing or empty"):
        folder(tmp_path)
    write(tmp_path, "b", f"{key}: odd")
    assert len(folder(tmp_path).splits()) == 12


def test_patients_and_missing_masks_of_one_site(tmp_path: Path) -> None:
    make_sites(tmp_path, "a", "b")
    (tmp_path / "b/masks/case_100.png").unlink()
    write(tmp_path, "b", "missing_masks: unlabelled\npatient_pattern: '^case_1(..)$'")
    rows = {row["case"]: row for row in folder(tmp_path).splits()}
    assert rows["case_100"]["patient"] == "00"
    assert not rows["case_100"]["labelled"]
    assert rows["case_00"]["patient"] == "case_00"


def run_on(root: Path, *settings: str) -> list[str]:
    own = ("data.cases_per_site", "data.amount", "data.resolution")
    tiny = [setting for setting in TINY if not setting.startswith(own)]
    return ["data=folder", f"data.root={root}", *tiny, "federation.rounds=1", "wandb.mode=disabled", *settings]


@pytest.mark.slow
def test_a_run_saves_what_its_sites_said(tmp_path: Path) -> None:
    mapped(tmp_path / "data")
    as_file(tmp_path / "data")
    execute(read_settings(run_on(tmp_path / "data", f"output={tmp_path / 'run'}", "algorithm=fedavg")))
    saved = load((tmp_path / "run/config.yaml").read_text(), SCHEMA)
    assert saved.data.per_site == {"b": {"label_values": {"7": 1}, "spacing": [0.5, 0.25]}}
    assert (tmp_path / "run/findings.csv").read_text().startswith("severity,kind,what,cure,site,case,file\n")
    again = [f"output={tmp_path / 'run'}", "resume=true", "federation.rounds=2"]
    execute(read_settings(again))
    assert not differences(saved, read_settings([*again, "data.per_site={b: {spacing: [0.5, 0.25]}}"]))
    with pytest.raises(ConfigError, match=r"data.per_site: .* in the folder"):
        read_settings([*again, "data.per_site={b: {spacing: [1, 1]}}"])


@pytest.mark.slow
def test_a_run_that_is_older_than_a_setting_goes_on(tmp_path: Path) -> None:
    make_sites(tmp_path / "data", "a", "b")
    execute(read_settings(run_on(tmp_path / "data", f"output={tmp_path / 'run'}", "algorithm=fedavg")))
    config = OmegaConf.load(tmp_path / "run/config.yaml")
    for key in ("per_site", "spacing"):
        del config.data[key]
    OmegaConf.save(config, tmp_path / "run/config.yaml")
    again = [f"output={tmp_path / 'run'}", "resume=true", "federation.rounds=2"]
    execute(read_settings(again))
    OmegaConf.save(config, tmp_path / "run/config.yaml")
    with pytest.raises(ConfigError, match=r"data.spacing: None in the folder"):
        read_settings([*again, "data.spacing=[1, 1]"])


def test_a_site_says_what_never_occurs_there(tmp_path: Path) -> None:
    make_sites(tmp_path, "a", "b")
    for path in (tmp_path / "b/masks").iterdir():
        save(path, square(label=2))
    regions = {"disc": [1, 2], "cup": [2]}
    with pytest.raises(DataError, match=r"site 'a': none of its .* masks shows 'cup'"):
        folder(tmp_path, regions=regions)
    write(tmp_path, "a", "absent: [cup]")
    assert folder(tmp_path, regions=regions).per_site.told() == {"a": {"absent": ["cup"]}}
    write(tmp_path, "a", "absent: [cups]")
    with pytest.raises(DataError, match=r"which is no region; did you mean 'cup'"):
        folder(tmp_path, regions=regions)


def test_a_site_says_what_nobody_outlined_there(tmp_path: Path) -> None:
    make_sites(tmp_path, "a", "b")
    for path in (tmp_path / "b/masks").iterdir():
        save(path, square(label=2))
    regions = {"disc": [1], "cup": [2]}
    write(tmp_path, "a", "unannotated: [cup]")
    write(tmp_path, "b", "unannotated: [disc]")
    own = folder(tmp_path, regions=regions)
    knob = folder(tmp_path, regions=regions, per_site={}, unannotated={"a": ["cup"], "b": ["disc"]})
    for site, known in (("a", [1.0, 0.0]), ("b", [0.0, 1.0])):
        for module in (own, knob):
            batch = next(iter(module.site(site).train_batches(0, 1)))
            assert batch["known"].amax(dim=(0, 2, 3)).tolist() == known
    write(tmp_path, "a", "unannotated: [cups]")
    with pytest.raises(DataError, match=r"which is no region; did you mean 'cup'"):
        folder(tmp_path, regions=regions)
