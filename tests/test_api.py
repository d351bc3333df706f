"""The suite from Python: the tutorial runs, tables are those of the folder, mistakes raise what commands print."""

from __future__ import annotations

import json
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedseg import api
from fedseg.configs.compose import ConfigError
from fedseg.datamodules import DataError
from fedseg.launch.export import export_models
from fedseg.reporting import ReportingError
from tests.data_files import make_sites

TUTORIAL = Path(__file__).parent.parent / "docs" / "tutorial.ipynb"
SMALL = ["data.size=32", "federation.rounds=1", "federation.local_steps=1", "trainer.threads=1"]
SMALL += ["evaluation.overlays=false", "evaluation.metrics=[dice]"]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(TUTORIAL.read_text())["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    for cell in cells:
        exec(compile("".join(cell["source"]), "tutorial", "exec"), names)
    assert tuple(names["probabilities"].shape) == (2, 2, 48, 48)
    assert names["report"].page.is_file()
    assert (tmp_path / names["report"].page).parent == tmp_path / "report"


@pytest.mark.slow
def test_a_run_from_python_is_the_commands(tmp_path: Path) -> None:
    root = make_sites(tmp_path / "data", "alpha", "beta")
    folder = ["data=folder", f"data.root={root}"]
    data = api.load_sites(*folder, **{"data.size": 32})
    assert list(data.sites) == ["alpha", "beta"]
    found = api.run("algorithm=fedbn", *folder, *SMALL, output=tmp_path / "run", **{"data.split_seed": 3})
    assert found.settings["data.split_seed"] == 3
    table = found.scores()
    assert set(table["split"]) == {"test"}
    by_site = found.by_site()
    assert list(by_site.index) == ["alpha", "beta"]
    dice = table[(table["metric"] == "dice") & (table["site"] == "alpha") & (table["view"] == "personal")]["value"]
    assert by_site.loc["alpha", "personal"] == pytest.approx(dice.mean(), nan_ok=True)
    again = api.open_run(tmp_path / "run")
    image = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(again.model("alpha")(image), found.model("alpha")(image))
    sizes = again.predict(root / "alpha" / "images", tmp_path / "masks", site="alpha", overlay=False)
    mask = np.asarray(Image.open(next((tmp_path / "masks" / "masks").iterdir())))
    assert set(np.unique(mask)) <= {0, 255}
    assert len(sizes) == len(list((root / "alpha" / "images").iterdir()))
    assert [exported.site for exported in again.export(tmp_path / "models")] == ["alpha", "beta"]
    assert again.plot() is not None
    assert not api.compare(found, output=tmp_path / "report", pictures=False).page.is_relative_to(tmp_path / "run")


def test_an_export_has_what_the_command_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(api, "export_models", lambda run, out, **options: asked.update(options))
    given = {"sites": ["a"], "images": tmp_path, "checkpoint": "last", "terms": "none", "bundle": True, "onnx": True}
    api.Run(tmp_path).export("out", **given)
    assert asked == given
    assert set(given) == set(signature(export_models).parameters) - {"run", "out"}


def test_mistakes_raise_what_the_commands_print(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'algorithm\.lam'"):
        api.run("algorithm=ditto", **{"algorithm.lamb": 1})
    with pytest.raises(DataError, match="nowhere"):
        api.load_sites("data=folder", f"data.root={tmp_path / 'nowhere'}")
    with pytest.raises(ReportingError):
        api.open_run(tmp_path)
    with pytest.raises(ValueError, match=r"make several runs; start them with python train\.py"):
        api.run("protocol=leave_one_site_out")
    with pytest.raises(ConfigError, match="metrik"):
        api.compare(tmp_path, metrik="dice")


def test_values_are_written_as_on_the_command_line() -> None:
    values = {"a": True, "b": None, "c": 0.5, "d": [1, "x"], "e": {"disc": [1, 2]}}
    assert api._words(["f=1"], values) == ["f=1", "a=true", "b=null", "c=0.5", "d=[1, x]", "e={disc: [1, 2]}"]


def test_what_there_is_to_choose() -> None:
    assert {"fedavg", "ditto"} <= set(api.methods())
    assert {"folder", "phantom"} <= set(api.data_sets())
