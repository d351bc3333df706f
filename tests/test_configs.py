"""From files and overrides to one checked, read-only config."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ReadonlyConfigError

import train
from fedseg.algorithms import ALGORITHMS
from fedseg.common.text import written
from fedseg.configs import compose as module
from fedseg.configs.compose import FOLDER, ConfigError, Schema, choices, compose, load, told_by, traced
from fedseg.configs.help import explained, help_text
from fedseg.configs.knobs import REQUIRED, described, knobs, unknown
from fedseg.configs.sources import meaning
from fedseg.datamodules import DATASETS, DataError
from fedseg.launch.experiment import Experiment
from fedseg.launch.foreign import FOREIGN
from fedseg.launch.run import default_folder, group_name, read_settings
from fedseg.launch.settings import SCHEMA
from tests.tiers import every

NEEDED = {"folder": ["data.root=DIR"]}


def made(*arguments: str) -> DictConfig:
    return compose(arguments, SCHEMA)


def refused(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(arguments, SCHEMA)
    return str(caught.value)


def needed(owner: Any, group: str) -> list[str]:
    return [f"{group}.{name}=X" for name, knob in knobs(owner).items() if knob.default is REQUIRED]


# ------------------------------------------------------------------------------------------------------ files


def test_the_default_is_the_main_job() -> None:
    config = made()
    assert (config.algorithm.name, config.data.name, config.model.preset) == ("ditto", "phantom", "tiny")
    assert (config.seed, config.resume, config.output, config.wandb.mode) == (0, False, None, "disabled")


CHOICES = [(group, name) for group, owners in SCHEMA.groups.items() for name in choices(group, owners)]


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_every_choice_composes_and_survives_saving(group: str, name: str) -> None:
    owners = SCHEMA.groups[group]
    config = made(f"{group}={name}", *needed(owners.get(name, next(iter(owners.values()))), group))
    assert config[group].preset == name
    assert config[group].name in owners
    assert set(config[group]) == {"name", "preset", *knobs(owners[config[group].name])}
    again = load(OmegaConf.to_yaml(config))
    assert again == config
    with pytest.raises(ReadonlyConfigError):
        again.seed = 3


@pytest.mark.slow
@pytest.mark.parametrize("name", every([name for group, name in CHOICES if group == "algorithm"]))
def test_every_algorithm_can_be_built_from_the_config(name: str) -> None:
    experiment = Experiment(made(f"algorithm={name}", "model=tiny"))
    experiment.check()
    algorithm = experiment.algorithm(in_channels=3)
    assert type(algorithm) is ALGORITHMS[experiment.config.algorithm.name]


def test_every_file_belongs_to_a_group_or_a_known_folder() -> None:
    folders = {path.parent.name for path in FOLDER.rglob("*.yaml")} - {"configs"}
    assert folders <= {*SCHEMA.groups, "augment", "experiment", "sweep"}


@pytest.mark.parametrize("path", sorted((FOLDER / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_composes(path: Path) -> None:
    settings = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(settings, dict)
    data = settings.get("data", {})
    name = data if isinstance(data, str) else data.get("name", "phantom")
    given = {} if isinstance(data, str) else data
    extra = [a for a in needed(DATASETS.get(name, DATASETS["phantom"]), "data") if a.split(".")[1][:-2] not in given]
    made(f"experiment={path.stem}", *extra)


# ------------------------------------------------------------------------------------------------------ overrides


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("federation.rounds=7", 7),
        ("federation.rounds=1e3", 1000),
        ("federation.rounds=5.0", 5),
        ("federation.local_steps=None", None),
        ("federation.local_steps=null", None),
        ("training.lr=1e-05", 1e-5),
        ("training.lr=1", 1.0),
        ("training.optimizer=sgd", "sgd"),
        ("trainer.gradient_clip=0.5", 0.5),
        ("training.channels_last=False", False),
        ("evaluation.overlays=True", True),
        ("output=runs/a=b", "runs/a=b"),
        ("data.size=[64, 32]", [64, 32]),
        ("data.size=64", 64),
        ("data.unseen=['site_01', 'site_02']", ["site_01", "site_02"]),
        ("data.unseen=[]", []),
        ("data.split=[0.5, 0.25, 0.25]", [0.5, 0.25, 0.25]),
        ("data.regions={'all': [1, 2], 'cup': [2]}", {"all": [1, 2], "cup": [2]}),
        ("model.decoder_channels=[32, 16, 8, 8]", [32, 16, 8, 8]),
        ("wandb.tags=['first try', 'b']", ["first try", "b"]),
        ("data.channels=auto", "auto"),
        ("data.channels=1", 1),
        ("algorithm.personal=part:decoder,segmentation_head", "part:decoder,segmentation_head"),
    ],
)
def test_overrides_of_every_type(argument: str, value: object) -> None:
    found = OmegaConf.select(made(argument), argument.partition("=")[0])
    plain = OmegaConf.to_container(found) if OmegaConf.is_config(found) else found
    assert plain == value
    assert type(plain) is type(value)


def test_what_a_wandb_agent_writes_is_read_as_meant() -> None:
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    sweep: dict[str, Any] = {
        "algorithm": "ditto",
        "algorithm.lam": 1e-05,
        "seed": 3,
        "federation.local_steps": None,
        "federation.rounds": 1e3,
        "training.channels_last": True,
        "model.decoder_channels": [64, 32, 16, 16],
        "data.regions": {"all": [1, 2]},
        "data.unseen": ["site_01"],
        "data": {"name": "phantom", "n_sites": 3, "cache_dir": None},
    }
    command = {"args": {key: {"value": value} for key, value in sweep.items()}}
    config = made(*utils.create_sweep_command_args(command)["args_no_hyphens"])
    assert (config.algorithm.name, config.algorithm.lam, config.seed) == ("ditto", 1e-5, 3)
    assert (config.federation.local_steps, config.federation.rounds) == (None, 1000)
    assert config.training.channels_last is True
    assert config.model.decoder_channels == [64, 32, 16, 16]
    assert (config.data.regions, config.data.unseen) == ({"all": [1, 2]}, ["site_01"])
    assert (config.data.n_sites, config.data.cache_dir) == (3, None)


def test_a_choice_and_its_knobs_may_come_in_any_order() -> None:
    assert made("algorithm.mu=0.5", "algorithm=fedprox") == made("algorithm=fedprox", "algorithm.mu=0.5")


def test_the_last_of_equal_keys_counts() -> None:
    assert made("seed=1", "seed=2").seed == 2


# ------------------------------------------------------------------------------------------------------ precedence


def experiment(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return f"experiment={path}"


def test_command_line_over_experiment_over_group_file_over_signature(tmp_path: Path) -> None:
    preset = OmegaConf.load(FOLDER / "model" / "tiny.yaml")
    signature = knobs(SCHEMA.groups["model"]["smp"])
    assert preset.encoder != signature["encoder"].default
    assert made().model.encoder == preset.encoder
    assert made("model=unet").model.encoder == signature["encoder"].default
    mine = experiment(tmp_path, "model: {encoder: resnet34}\nseed: 4\nfederation: {rounds: 9}")
    assert (made(mine).model.encoder, made(mine).seed, made(mine).federation.rounds) == ("resnet34", 4, 9)
    assert made(mine).model.decoder_channels == preset.decoder_channels
    over = made(mine, "model.encoder=resnet50", "seed=5", "federation.rounds=2")
    assert (over.model.encoder, over.seed, over.federation.rounds) == ("resnet50", 5, 2)


def test_an_experiment_may_choose_by_word_or_with_knobs(tmp_path: Path) -> None:
    assert made(experiment(tmp_path, "algorithm: fedprox")).algorithm.mu == 0.01
    assert made(experiment(tmp_path, "algorithm: {name: fedprox, mu: 0.3}")).algorithm.mu == 0.3


def test_another_method_on_the_command_line_drops_the_experiments_knobs(tmp_path: Path) -> None:
    mine = experiment(tmp_path, "algorithm: {name: fedprox, mu: 0.3, weighting: uniform}")
    config = made(mine, "algorithm=ditto")
    assert config.algorithm.name == "ditto"
    assert "mu" not in config.algorithm
    assert made(mine, "algorithm=fedprox", "algorithm.mu=0.7").algorithm.weighting == "uniform"


def test_mappings_are_replaced_not_merged(tmp_path: Path) -> None:
    mine = experiment(tmp_path, "data: {regions: {disc: [1, 2], cup: [2]}}")
    assert made(mine, "data.regions={all: [1, 2]}").data.regions == {"all": [1, 2]}


# ------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["federation.round=3"], "unknown key 'federation.round'; did you mean 'federation.rounds'?"),
        (["fedration.rounds=3"], "unknown key 'fedration'; did you mean 'federation'?"),
        (["data=folder", "dota.root=x"], "unknown key 'dota'; did you mean 'data'?"),
        (["sed=1"], "unknown key 'sed'; did you mean 'seed'?"),
        (["algorithm=dito"], "unknown algorithm 'dito'; did you mean 'ditto'?"),
        (["algorithm=Ditto"], "did you mean 'ditto'?"),
        (["data=fundos"], "unknown data 'fundos'; did you mean 'fundus'?"),
        (["model=unnet"], "unknown model 'unnet'; did you mean 'unet'?"),
        (
            ["algorithm=ditto", "algorithm.mu=1"],
            "algorithm.mu is a setting of algorithm=fedprox, fednova, moon, not of algorithm=ditto",
        ),
        (["data.root=x"], "data.root is a setting of data=folder, "),
        (["wandb=offline"], "wandb=offline names no setting; write wandb.KEY=VALUE, such as wandb.mode=..."),
        (["algorithm=ditto", "algorithm.lamb=1"], "did you mean 'algorithm.lam'?"),
        (["federation.rounds=many"], "federation.rounds=many should be int"),
        (["federation.rounds=1.5"], "federation.rounds=1.5 should be int"),
        (["federation.rounds=True"], "federation.rounds=True should be int"),
        (["training.lr=fast"], "training.lr=fast should be float"),
        (["training.optimizer=rmsprop"], "training.optimizer=rmsprop should be adam|adamw|amsgrad|sgd"),
        (["evaluation.overlays=1"], "evaluation.overlays=1 should be bool"),
        (["data.split=[0.5, half, 0.25]"], "data.split=[0.5, half, 0.25] should be list[float]; 'half' is not"),
        (
            ["data.unseen=site_01,site_02"],
            "data.unseen=site_01,site_02 should be list[str]; write data.unseen=[site_01, ",
        ),
        (["data=folder"], "data.root is needed"),
        (["experiment=nope"], "unknown experiment 'nope'"),
        (["federation"], "'federation' is not of the form key=value"),
        (["--seed=3"], "'--seed=3' is not of the form key=value"),
        (["data.unseen=[1"], "data.unseen=[1 should be list[str]; no YAML: "),
        (["output=${oc.env:SURELY_NOT_SET}"], "output=${oc.env:SURELY_NOT_SET} refers to something"),
        (["federation=3"], "federation=3 names no setting; write federation.KEY=VALUE, such as federation.rounds=..."),
        (["algorithm.lam.x=1"], "algorithm.lam={x: 1} should be float"),
        (["algorithm="], "unknown algorithm"),
        (["output="], "output= should be str or null; write output=null"),
    ],
)
def test_mistakes_are_named_with_the_nearest_known_name(arguments: Sequence[str], expected: str) -> None:
    assert expected in refused(*arguments)


def test_all_mistakes_are_told_at_once() -> None:
    told = refused("algorithm.lm=1", "federation.rounds=x", "trainer.thread=2", "sed=1", "data.n_site=3", "model=u")
    assert len(told.splitlines()) == 6
    for word in ("algorithm.lm", "federation.rounds", "trainer.threads", "'seed'", "data.n_sites", "unknown model 'u'"):
        assert word in told


def test_a_broken_experiment_file_is_named(tmp_path: Path) -> None:
    assert "mine.yaml" in refused(experiment(tmp_path, "a: [1"))
    assert "mine.yaml holds no settings (" in refused(experiment(tmp_path, "- 1\n- 2"))
    assert "unknown key 'federation.rond'" in refused(experiment(tmp_path, "federation: {rond: 3}"))
    assert "missing.yaml" in refused(f"experiment={tmp_path / 'missing.yaml'}")


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("federation.fraction=2", "federation.fraction=2 should be float > 0 and <= 1"),
        ("training.lr=-1", "training.lr=-1 should be float > 0 and < inf"),
        ("algorithm.lam=-1", "algorithm.lam=-1 should be float >= 0"),
        ("trainer.threads=0", "trainer.threads=0 should be int > 0 or null"),
        ("model.encoder=resnet19", "resnet19"),
        ("algorithm.personal=part:head", "no part 'head'"),
        ("training.loss=dice_ce", "dice_ce"),
        ("evaluation.metrics=[dise]", "dise"),
        ("data.split=[0.5, 0.5, 0.5]", "split"),
    ],
)
def test_values_out_of_range_end_the_run_before_images_are_read(argument: str, expected: str) -> None:
    with pytest.raises((ConfigError, DataError)) as caught:
        Experiment(made(argument)).check()
    assert expected in str(caught.value)


def test_the_config_is_read_only() -> None:
    config = made()
    with pytest.raises(ReadonlyConfigError):
        config.seed = 1
    with pytest.raises(ReadonlyConfigError):
        config.data.n_sites = 1
    with pytest.raises(ReadonlyConfigError):
        config.new = 1


# ------------------------------------------------------------------------------------------------------ resume


def saved(folder: Path, *arguments: str) -> DictConfig:
    config = made(f"output={folder}", *arguments)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config))
    return config


def test_resume_takes_the_folders_settings(tmp_path: Path) -> None:
    before = saved(tmp_path, "algorithm=fedprox_bn", "algorithm.mu=0.3", "data.size=64", "seed=3", "model=unet")
    for word in ("true", "True", "yes"):
        config = read_settings([f"output={tmp_path}", f"resume={word}"])
        assert config.resume is True
        assert {**config, "resume": False} == {**before}


def test_resume_may_change_rounds_machine_and_reporting(tmp_path: Path) -> None:
    saved(tmp_path)
    changes = ["federation.rounds=99", "trainer.threads=1", "wandb.mode=offline", "evaluation.overlays=false"]
    config = read_settings([f"output={tmp_path}", "resume=true", *changes])
    assert (config.federation.rounds, config.trainer.threads, config.wandb.mode) == (99, 1, "offline")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("seed=9", "seed: 0 in the folder, 9 now"),
        ("algorithm.lam=9", "algorithm.lam: 0.1 in the folder, 9.0 now"),
        ("algorithm=fedavg", "algorithm.name: 'ditto' in the folder, 'fedavg' now"),
        ("data.size=32", "data.size: 96 in the folder, 32 now"),
        ("federation.local_steps=1", "federation.local_steps: 10 in the folder, 1 now"),
    ],
)
def test_resume_with_another_setting_is_refused(tmp_path: Path, change: str, told: str) -> None:
    saved(tmp_path)
    with pytest.raises(ConfigError, match="goes on with the run as it was started") as caught:
        read_settings([f"output={tmp_path}", "resume=true", change])
    assert told in str(caught.value)


def test_resume_without_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs output=DIR"):
        read_settings(["resume=true"])
    with pytest.raises(ConfigError, match="command line"):
        read_settings([experiment(tmp_path, "resume: true")])


# ------------------------------------------------------------------------------------------------------ knobs


class Base:
    """A parent.

    Args:
        size: of the thing,
            told over two lines.
        name: of it.
    """

    def __init__(self, positional: int, *, size: int = 3, name: str = "a", **rest: Any) -> None: ...


class Child(Base):
    """A child.

    Args:
        name: another default.
    """

    def __init__(self, *args: Any, name: str = "b", extra: float | None = None, **kwargs: Any) -> None: ...


def test_knobs_are_the_keyword_settings_of_all_constructors() -> None:
    found = knobs(Child)
    assert {name: knob.default for name, knob in found.items()} == {"name": "b", "extra": None, "size": 3}
    assert found["size"].description == "of the thing, told over two lines."
    assert found["name"].description == "another default."
    assert found["extra"].type_name == "float or null"


def test_unknown_names_get_the_nearest_or_the_whole_list() -> None:
    assert unknown("rond", ["round", "seed"]) == "unknown key 'rond'; did you mean 'round'?"
    assert unknown("zzz", ["round", "seed"]) == "unknown key 'zzz'; known: round, seed"


@pytest.mark.parametrize("name", sorted(FOREIGN))
def test_settings_of_other_tools_get_an_honest_sentence(name: str) -> None:
    ours = {*SCHEMA.groups, *(prefix + known for prefix, known, _ in ALL_KNOBS)}
    for told in {name, f"trainer.{name}"} - ours:
        assert f"unknown key '{told}'; {FOREIGN[name]}" in refused(f"{told}=3")


def test_what_is_told_of_other_tools_settings_exists_here() -> None:
    ours = {*(prefix + name for prefix, name, _ in ALL_KNOBS), *SCHEMA.groups}
    for sentence in FOREIGN.values():
        for key in re.findall(r"\b[a-z]+\.[a-z_]+\b", sentence):
            assert key in ours, key
        for setting in re.findall(r"[\w.]+=[\w-]+", sentence):
            key, _, value = setting.partition("=")
            assert key in ours, setting
            if value != "DIR":
                made(setting, *NEEDED.get(value, []))


@pytest.mark.parametrize("name", ["batchnorm", "xyz", "federation.quux", "trainer.callbacks", "algorithm.zzz"])
def test_suggestions_are_near_or_absent(name: str) -> None:
    assert "did you mean" not in refused(f"{name}=3")


def test_entries_of_docstrings_are_read() -> None:
    assert described("Title.\n\nArgs:\n    a: one\n        more.\n    b: two.\n\nReturns:\n    c: not one.\n") == {
        "a": "one more.",
        "b": "two.",
    }


ALL_KNOBS = [
    (prefix, name, knob)
    for prefix, owner in [
        ("", SCHEMA.top),
        *((f"{section}.", owner) for section, owner in SCHEMA.sections.items()),
        *((f"{group}.", owner) for group, owners in SCHEMA.groups.items() for owner in owners.values()),
    ]
    for name, knob in knobs(owner).items()
]


def test_every_knob_is_explained() -> None:
    assert not {prefix + name for prefix, name, knob in ALL_KNOBS if not knob.description}


@pytest.mark.slow
def test_help_lists_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--help", "all"]) == 0
    text = capsys.readouterr().out
    flat = " ".join(text.split())
    for owners in SCHEMA.groups.values():
        for name, owner in owners.items():
            if len(owners) > 1:
                first = (inspect.getdoc(owner) or "").partition("\n")[0].rstrip(".")
                assert first
                assert f"{name} {first}" in flat
    names = {line.split()[0] for line in text.splitlines() if line.startswith("  ") and line.strip()}
    assert {name for _, name in CHOICES} <= names
    for prefix, name, knob in ALL_KNOBS:
        if knob.default is REQUIRED:
            assert f"{prefix}{name} (needed)" in text
        else:
            shown = re.findall(rf"^  {re.escape(prefix + name)} = (.*?)(?:   \[.*)?$", text, re.MULTILINE)
            plain = json.loads(json.dumps(knob.default, default=str))  # lists for tuples
            typed = [yaml.safe_load(told) if isinstance(plain, list | dict) else told for told in shown]
            keys = [
                {str(key): one for key, one in value.items()} if isinstance(value, dict) else value for value in typed
            ]
            assert (plain if isinstance(plain, list | dict) else written(plain)) in keys
        assert f"[{knob.type_name}]" in text
        assert " ".join(knob.description.split()) in flat
    assert max(map(len, text.splitlines())) < 130


def test_a_screen_of_help_names_every_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--help"]) == 0
    text = capsys.readouterr().out
    words = set(re.findall(r"[\w.]+", text))
    assert {name for _, name in CHOICES if name not in ("smp", "monai")} <= words
    assert set(SCHEMA.sections) <= words
    assert len(text.splitlines()) <= 24 + len(ALGORITHMS)
    assert max(map(len, text.splitlines())) < 130


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "missing"),
    [
        ("train.main(['--help'])", {"torch", "pydantic", "numpy", "yaml"}),
        ("train.main(['--help', 'ditto', 'folder', 'training', 'data.size'])", {"torch", "numpy", "pandas"}),
        ("train.main(['--help', 'all'])", {"torch", "numpy", "pandas"}),
        ("train.main(['--help', 'ditoo'])", {"torch", "pytorch_lightning"}),
        ("compare.main(['--help'])", {"torch", "numpy", "pandas", "scipy"}),
        ("[called(c.main, ['--help']) for c in (predict, export, sweep, evaluate)]", {"torch", "numpy", "pandas"}),
    ],
)
def test_help_imports_nothing_that_takes_time(call: str, missing: set[str]) -> None:
    code = f"""
import sys, train, compare, predict, export, sweep, evaluate
def called(main, arguments):
    try:
        main(arguments)
    except SystemExit as ended:
        assert not ended.code
{call}
assert not {missing} & {{*sys.modules}}"""
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=FOLDER.parent, **quiet)


@pytest.mark.slow
def test_help_from_the_sources_is_that_of_the_live_signatures() -> None:
    read = meaning("fedseg.launch.settings", "SCHEMA")
    assert read.groups["algorithm"]["ditto"] is not ALGORITHMS["ditto"]
    assert help_text(read, "") == help_text(SCHEMA, "")
    names = [f"{group}={name}" for group, name in CHOICES]
    names += [*SCHEMA.sections, *(prefix + name for prefix, name, _ in ALL_KNOBS)]
    assert len(names) > 150
    for name in names:
        assert explained(read, name) == explained(SCHEMA, name)


def test_what_was_only_read_cannot_be_called() -> None:
    with pytest.raises(TypeError, match="only the signature was read"):
        meaning("fedseg.models.factory", "create_model")()
    with pytest.raises(LookupError, match=r"fedseg\.models\.factory defines no nothing"):
        meaning("fedseg.models.factory", "nothing")


def test_help_explains_what_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--help", "algorithm=feddg_released", "wandb", "data.size", "tiny"]) == 0
    text = capsys.readouterr().out
    assert "FedDG-ELCFS (Liu et al., CVPR 2021)" in text
    assert "  donor_weight: 1.0" in text  # the preset's file
    assert "algorithm.contrast_weight = 0.1" in text
    assert "wandb.mode = " in text
    assert "data.size = 128" in text
    assert "  encoder: tu-resnet10t" in text
    assert train.main(["ditoo", "--help"]) == 2
    assert "did you mean 'ditto'" in capsys.readouterr().err
    assert train.main(["--help", "no_such_module:Name"]) == 2
    assert "there is no module no_such_module" in capsys.readouterr().err


def test_config_prints_what_would_run_and_stops(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.main(["algorithm=fedprox", "algorithm.mu=0.25", "--config"]) == 0
    assert load(capsys.readouterr().out) == made("algorithm=fedprox", "algorithm.mu=0.25")
    assert not list(tmp_path.iterdir())


def test_a_group_file_that_names_no_owner_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fruit").mkdir()
    (tmp_path / "default.yaml").write_text("fruit: apple\n")
    (tmp_path / "fruit" / "odd.yaml").write_text("name: aple\nsize: 3\n")
    monkeypatch.setattr(module, "FOLDER", tmp_path)

    def apple(*, size: int = 1) -> None:
        """An apple."""

    def pear(*, size: int = 1) -> None:
        """A pear."""

    schema = Schema({"fruit": {"apple": apple, "pear": pear}}, {}, apple)
    assert compose([], schema).fruit == {"name": "apple", "preset": "apple", "size": 1}
    with pytest.raises(ConfigError, match=r"odd\.yaml: unknown fruit\.name 'aple'; did you mean 'apple'"):
        compose(["fruit=odd"], schema)


# ------------------------------------------------------------------------------------------- a run's config, again


def test_a_runs_config_is_an_experiment(tmp_path: Path) -> None:
    before = saved(tmp_path, "algorithm=fedprox_bn", "algorithm.mu=0.3", "data.size=64", "seed=3", "model=unet")
    path = tmp_path / "config.yaml"
    again = made(f"experiment={path}")
    own = {"output": None, "resume": False, "experiment": str(path)}
    assert {**again} == {**before, **own}, "all but what belongs to that run alone"
    other = made(f"experiment={path}", "algorithm=ditto", "seed=4")
    assert (other.algorithm.preset, other.seed, other.data.size) == ("ditto", 4, 64)
    assert "mu" not in other.algorithm


@pytest.mark.parametrize("text", ["data: [", "", "- 1", "seed: 3", "\0\0\0"])
def test_a_damaged_config_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml is damaged"):
        read_settings([f"output={tmp_path}", "resume=true"])


# --------------------------------------------------------------------------------------------------- under an agent


@pytest.mark.slow
def test_an_agent_puts_runs_online_into_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_RUN_ID", "run1")
    config = read_settings(["algorithm=ditto", "seed=2"])
    assert config.wandb.mode == "online"
    assert read_settings(["wandb.mode=disabled"]).wandb.mode == "disabled"
    folder = default_folder(config)
    assert folder == Path("runs/sweep1/phantom-ditto-seed2-run1")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config))
    again = read_settings(["algorithm=ditto", "seed=2"])  # the agent starts a run that was pre-empted once more
    assert (again.resume, again.output) == (True, str(folder))


def test_seeds_folds_and_machines_share_a_group_and_other_settings_do_not() -> None:
    base = group_name(made("algorithm=ditto"))
    assert re.fullmatch(r"phantom-ditto-[0-9a-f]{6}", base)
    for same in ("seed=3", "output=x", "trainer.threads=1", "wandb.tags=[a]", "data.unseen=[site_01]"):
        assert group_name(made("algorithm=ditto", same)) == base
    for other in ("algorithm.lam=0.9", "federation.rounds=3", "data.size=32", "protocol=leave_one_site_out"):
        assert group_name(made("algorithm=ditto", other)) != base
    assert group_name(made("wandb.group=mine")) == "mine"


@pytest.mark.parametrize(
    ("root", "manifest", "name"),
    [
        ("/data/study_a", None, "folder-study_a"),
        ("/data/study #2", None, "folder-study_2"),
        ("/data/study_a/", None, "folder-study_a"),
        ("/mine/data", None, "folder-mine_data"),
        ("/x", "/y/brain.csv", "folder-brain"),
        ("/x/study", "/x/study/sites.csv", "folder-study"),
        ("/x/study", "/x/study/table.csv", "folder-study_table"),
        ("/\u75c5\u9662", None, "folder-\u75c5\u9662"),
        ("/", None, "folder"),
        ("/" + "x" * 300, None, "folder-" + "x" * 60),
    ],
)
def test_runs_of_ones_own_images_are_named_after_them(root: str, manifest: str | None, name: str) -> None:
    table = [f"data.manifest={manifest}"] if manifest else []
    config = made("data=folder", f"data.root={root}", *table, "algorithm=fedavg")
    assert default_folder(config).name.startswith(f"{name}-fedavg-seed0-")
    assert group_name(config).startswith(f"{name}-fedavg-")
    assert default_folder(made()).name.startswith("phantom-ditto-seed0-")


# ------------------------------------------------------------------------------- a method's preset, and other parts


def test_a_preset_trains_as_its_program_does_and_the_users_own_words_win(tmp_path: Path) -> None:
    released = compose(["algorithm=lcfed_released"], SCHEMA)
    assert (released.training.loss, released.training.optimizer_state) == ("smooth_dice", "keep")
    assert (released.data.batch_size, released.data.n_sites, released.federation.local_steps) == (6, 4, 50)
    own = compose(["data.batch_size=3", "algorithm=lcfed_released", "training.loss=dice"], SCHEMA)
    assert (own.data.batch_size, own.training.loss, own.training.optimizer_state) == (3, "dice", "keep")
    experiment = tmp_path / "mine.yaml"
    experiment.write_text("training: {loss: bce}\ndata: {augment: strong}\n")
    mixed = compose([f"experiment={experiment}", "algorithm=lcfed_released"], SCHEMA)
    assert (mixed.training.loss, mixed.data.augment, mixed.data.batch_size) == ("bce", "strong", 6)


def test_a_preset_holds_on_other_data_and_not_for_another_method() -> None:
    elsewhere = compose(["algorithm=lcfed_released", "data=folder", "data.root=x"], SCHEMA)
    assert (elsewhere.data.batch_size, elsewhere.data.sampling) == (6, "replacement")
    other = compose(["algorithm=lcfed"], SCHEMA)
    assert (other.training.loss, other.federation.local_steps) == ("auto", 10)


def test_what_a_run_saved_is_not_overruled_by_its_preset() -> None:
    saved = compose(["algorithm=lcfed_released", "training.loss=dice", "data.batch_size=2"], SCHEMA)
    again = compose([], SCHEMA, base=saved)
    assert again == saved


def test_who_said_what_is_told() -> None:
    _, sources = traced(["algorithm=lcfed_released", "training.loss=dice", "seed=3"], SCHEMA)
    preset = "configs/algorithm/lcfed_released.yaml"
    assert sources["data.batch_size"] == sources["algorithm.alpha"] == sources["training.normalize"] == preset
    assert sources["training.loss"] == sources["seed"] == "the command line"
    assert sources["data.n_sites"] == "configs/default.yaml"
    assert "training.lr" not in sources  # a default
    assert f"# {preset}: algorithm.weighting, " in told_by(sources)


@pytest.mark.parametrize("name", [path.stem for path in sorted((FOLDER / "algorithm").glob("*.yaml"))])
def test_every_preset_of_a_method_composes(name: str) -> None:
    assert compose([f"algorithm={name}"], SCHEMA).algorithm.preset == name


def test_a_preset_with_a_mistake_in_another_part_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(FOLDER, tmp_path / "configs")
    (folder / "algorithm" / "wrong.yaml").write_text("name: fedavg\ntraining: {los: dice}\ndata: [1]\n")
    monkeypatch.setattr(module, "FOLDER", folder)
    with pytest.raises(ConfigError, match="expected settings of the form key: value"):
        compose(["algorithm=wrong"], SCHEMA)
    (folder / "algorithm" / "wrong.yaml").write_text("name: fedavg\ntraining: {los: dice}\n")
    with pytest.raises(ConfigError, match=r"unknown key 'training\.los'"):
        compose(["algorithm=wrong"], SCHEMA)
