"""What a word becomes: by the type of its setting, whichever way it comes (command line, file, sweep, saved config)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from fedseg.configs.compose import ConfigError, as_yaml, compose, load
from fedseg.configs.sweeps import Sweep
from fedseg.launch.settings import SCHEMA
from tests.tiers import every

COMMAND = ["${env}", "${interpreter}", "${program}", "${args_no_hyphens}"]
FOLDER = ("data=folder", "data.root=x")


def value_of(config: DictConfig, key: str) -> Any:
    found = OmegaConf.select(config, key)
    return OmegaConf.to_container(found) if OmegaConf.is_config(found) else found


def on_the_command_line(key: str, word: str, folder: Path) -> DictConfig:
    return compose([*FOLDER, f"{key}={word}"], SCHEMA)


def in_a_file(key: str, word: str, folder: Path) -> DictConfig:
    """The word as it stands in an experiment's YAML."""
    section, _, name = key.rpartition(".")
    path = folder / "mine.yaml"
    data = {"data": "  name: folder\n" + ("" if key == "data.root" else "  root: x\n")}
    if section:
        data[section] = data.get(section, "") + f"  {name}: {word}\n"
    sections = "".join(f"{part}:\n{said}" for part, said in data.items())
    path.write_text(f"{'' if section else f'{name}: {word}'}\n{sections}", encoding="utf-8")
    return compose([f"experiment={path}"], SCHEMA)


def from_an_agent(key: str, word: str, folder: Path) -> DictConfig:
    """The word as the value of a sweep's parameter, as `wandb agent` passes it on."""
    command = {"args": {key: {"value": word}}}
    agent = pytest.importorskip("wandb.sdk.launch.sweeps.utils")  # seconds, and only for these tests
    return compose([*FOLDER, *agent.create_sweep_command_args(command)["args_no_hyphens"]], SCHEMA)


def from_a_saved_config(key: str, word: str, folder: Path) -> DictConfig:
    config = on_the_command_line(key, word, folder)
    again = load(as_yaml(config), SCHEMA)
    assert again == config
    path = folder / "config.yaml"
    path.write_text(as_yaml(config), encoding="utf-8")
    repeated = compose([f"experiment={path}"], SCHEMA)
    if key != "output":  # it belongs to one run
        assert value_of(repeated, key) == value_of(config, key)
    return again


ROUTES = [on_the_command_line, in_a_file, from_an_agent, from_a_saved_config]
routes = pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.__name__)
Route = Callable[[str, str, Path], DictConfig]

PLAIN = [
    *("2024_01_02", "12:30", "1:30:15", "1e3", "123", "007", "0x10", "0o17", "1_000", ".5", "1.", "+1", "1e", ".inf"),
    *("no", "NO", "off", "yes", "on", "y", "n", "true", "False", "2024-01-02", "a=b", "a,b", "ü", "病院", "a/b", "-"),
    *("=", "<<", "nan", "1__0e5", "study #2".replace(" ", "")),
]
ANY = [*PLAIN, "study #2", "/a: b", "#x", "'a'", '"a"', "[a, b]", "[a", "{a: b}", "{", "a b ", " a", "%x", "@a", "&a"]
ANY += ["*a", "!a", "|", ">", "~", "a\\b", "a:", "- a", "?", "`", "a\tb", "\u2028", "\x85", "a\nb", "🩻"]


KEYS = ("output", "data.root", "data.mask_suffix")


@pytest.mark.slow
@routes
@pytest.mark.parametrize("word", every(PLAIN, PLAIN[::3]))
def test_text_is_taken_as_it_stands(route: Route, word: str, tmp_path: Path) -> None:
    if route is in_a_file and word == "-":
        word = "-a"  # alone it begins a list
    for key in KEYS:
        assert value_of(route(key, word, tmp_path), key) == word


@pytest.mark.slow
@pytest.mark.parametrize("word", every(ANY, ANY[::3]))
def test_a_shells_word_may_hold_any_sign(word: str, tmp_path: Path) -> None:
    told = [f"{key}={word}" for key in KEYS]
    config = compose(["data=folder", *told], SCHEMA)
    assert [value_of(config, key) for key in KEYS] == [word] * 3
    assert load(as_yaml(config), SCHEMA) == config


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(
    lambda text: "${" not in text and text not in ("???", "null", "None")
)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(text=TEXT)
def test_any_text_comes_out_and_survives_saving(text: str) -> None:
    config = compose([f"output={text}", f"wandb.group={text}"], SCHEMA)
    assert (config.output, config.wandb.group) == (text, text)
    again = load(as_yaml(config), SCHEMA)
    assert again == config
    assert yaml.safe_load(as_yaml(config))["output"] == text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a\0b", "zero byte"),
        ("\udcff", "not Unicode"),
        ("${oc.env:HOME}", "never looked up"),
        ("a${x}", "never looked up"),
        ("???", "missing value"),
        ("", "write output=null"),
    ],
)
def test_text_that_no_setting_can_be(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        compose([f"output={text}"], SCHEMA)


@pytest.mark.slow
@routes
@pytest.mark.parametrize("word", ["null", "None"])
def test_null_is_nothing_where_that_is_possible(route: Route, word: str, tmp_path: Path) -> None:
    for key in ("output", "federation.local_steps", "data.window", "data.label_values"):
        assert value_of(route(key, word, tmp_path), key) is None


def test_nothing_and_the_word_null_in_a_file(tmp_path: Path) -> None:
    for word in ("~", "Null", ""):
        assert in_a_file("output", word, tmp_path).output is None
    for word in ("'null'", '"None"', "'~'"):
        assert in_a_file("output", word, tmp_path).output == word[1:-1]
    with pytest.raises(ConfigError, match=r"data\.root=null should be str; write data\.root='null' \(mine\.yaml, line"):
        in_a_file("data.root", "null", tmp_path)


# --- numbers, truth values, choices -----------------------------------------------------------------------------------


@pytest.mark.slow
@routes
@pytest.mark.parametrize(
    ("word", "number"),
    [("010", 10), ("08", 8), ("0123", 123), ("+7", 7), ("1e3", 1000), ("5.0", 5), ("1.5e1", 15)],
)
def test_whole_numbers_are_decimal(route: Route, word: str, number: int, tmp_path: Path) -> None:
    for key in ("seed", "federation.rounds"):
        found = value_of(route(key, word, tmp_path), key)
        assert (found, type(found)) == (number, int)


@routes
@pytest.mark.parametrize(("word", "number"), [("1e-4", 1e-4), ("1", 1.0), (".5", 0.5), ("00.5", 0.5), ("1E-2", 0.01)])
def test_fractions(route: Route, word: str, number: float, tmp_path: Path) -> None:
    found = value_of(route("training.lr", word, tmp_path), "training.lr")
    assert (found, type(found)) == (number, float)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(number=st.integers(-(2**63), 2**63 - 1))
def test_any_whole_number(number: int) -> None:
    assert load(as_yaml(compose([f"seed={number}"], SCHEMA))).seed == number


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(number=st.floats(min_value=0, exclude_min=True, allow_infinity=False))
def test_any_fraction(number: float) -> None:
    assert load(as_yaml(compose([f"training.lr={number}"], SCHEMA))).training.lr == number


REFUSED = [
    ("seed", "0x10", "seed=16"),
    ("seed", "0o17", "seed=15"),
    ("seed", "0b11", "seed=3"),
    ("seed", "1_000", "seed=1000"),
    ("training.lr", "0,001", "training.lr=0.001"),
    ("training.lr", "1_0.5", "training.lr=10.5"),
    ("evaluation.overlays", "1", "evaluation.overlays=true"),
    ("evaluation.overlays", "0", "evaluation.overlays=false"),
    ("wandb.mode", "on", "wandb.mode=online"),
    ("wandb.mode", "true", "wandb.mode=online"),
    ("wandb.mode", "Online", "wandb.mode=online"),
    ("wandb.mode", "off", "wandb.mode=disabled"),
    ("wandb.mode", "False", "wandb.mode=disabled"),
    ("wandb.mode", "null", "wandb.mode=disabled"),
    ("privacy.mechanism", "no", "privacy.mechanism=none"),
    ("compression.cast", "None", "compression.cast=none"),
    ("trainer.precision", "32", "trainer.precision=32-true"),
    ("training.optimizer", "SGD", "training.optimizer=sgd"),
    ("data.unseen", "null", "data.unseen=[]"),
    ("data.unseen", "[a, null]", "data.unseen=[a, 'null']"),
    ("data.ignore_labels", "3", "data.ignore_labels=[3]"),
    ("data.ignore_labels", "3, 4", "data.ignore_labels=[3, 4]"),
    ("data.split", "[0x1, 0, 0]", "data.split=[1, 0, 0]"),
    ("data.regions", "{cup: [0x2]}", "data.regions={cup: [2]}"),
    ("data.regions", "{null: [1]}", "data.regions={'null': [1]}"),
]


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES[:3], ids=lambda route: route.__name__)
@pytest.mark.parametrize(("key", "word", "right"), REFUSED)
def test_what_is_ambiguous_is_refused_with_a_spelling_that_works(
    route: Route, key: str, word: str, right: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"write {right}")):
        route(key, word, tmp_path)
    compose([*FOLDER, right], SCHEMA)
    in_a_file(*right.split("=", 1), tmp_path)


@pytest.mark.parametrize(
    "number", ["9" * 5000, "1e999999999", "-1e30", "nan", "inf", "1.5", "1:30", "٣", "1e5x", "'7'"]
)
def test_numbers_that_are_none(number: str) -> None:
    with pytest.raises(ConfigError, match=r"seed=.* should be int") as caught:
        compose([f"seed={number}"], SCHEMA)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("word", ["true", "True", "TRUE", "yes", "on"])
def test_truth(word: str, tmp_path: Path) -> None:
    for route in ROUTES:
        assert route("trainer.deterministic", word, tmp_path).trainer.deterministic is True


# --- lists and mappings -----------------------------------------------------------------------------------------------

NAMES = ["NO", "no", "001", "1", "y", "1e3", "12:30", "0x10", "true", "2024-01-02"]


@pytest.mark.slow
@routes
def test_names_in_lists_and_mappings_stand_as_they_are(route: Route, tmp_path: Path) -> None:
    for word in (f"[{', '.join(NAMES)}]", str(NAMES)):
        assert value_of(route("data.unseen", word, tmp_path), "data.unseen") == NAMES
    regions = {name: [number] for number, name in enumerate(NAMES, 1)}
    for word in ("{" + ", ".join(f"{name}: [{ids[0]}]" for name, ids in regions.items()) + "}", str(regions)):
        assert value_of(route("data.regions", word, tmp_path), "data.regions") == regions


@pytest.mark.slow
@routes
@pytest.mark.parametrize("name", ["hospital_b", *NAMES])
def test_one_name_is_a_list_of_one(route: Route, name: str, tmp_path: Path) -> None:
    assert value_of(route("data.unseen", name, tmp_path), "data.unseen") == [name]


def test_a_sweep_gives_lists_and_mappings_as_python_writes_them(tmp_path: Path) -> None:
    names: Any = ["it's", "b", 'say "x"', "ü", "a, b", "c: d", "#e"]
    assert value_of(from_an_agent("data.unseen", names, tmp_path), "data.unseen") == names
    odd: Any = ["C:\\data"]
    with pytest.raises(ConfigError, match="can be read in two ways"):
        from_an_agent("data.unseen", odd, tmp_path)
    assert value_of(compose(['data.unseen=["C:\\\\data"]'], SCHEMA), "data.unseen") == odd


@routes
def test_label_values_are_decimal(route: Route, tmp_path: Path) -> None:
    found = value_of(route("data.label_values", "{010: 1, 255: 2, '>=9': 3}", tmp_path), "data.label_values")
    assert found == {"10": 1, "255": 2, ">=9": 3}


@pytest.mark.parametrize("word", ["{010: 1, 10: 2}", "{1: 1, 1: 2}", "{1: 1, '1': 2}", "{01: 1, '1': 2}"])
def test_one_key_twice_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.label_values="):
        compose([f"data.label_values={word}"], SCHEMA)


def test_a_comment_behind_a_list_is_no_part_of_it() -> None:
    with pytest.raises(ConfigError, match="begins a comment"):
        compose(["data.unseen=[a] #2"], SCHEMA)


@pytest.mark.parametrize(
    ("word", "right"),
    [("no", "false"), ("010", "10"), ("0x1F", "31"), ("1_000", "1000"), ("no", "'no'"), ("010", "'010'")],
)
def test_where_any_type_may_stand_the_word_must_be_clear(word: str, right: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(right)):
        compose([f"model.options={{a: {word}}}"], SCHEMA)
    plain = {"'no'": "no", "'010'": "010", "false": False}
    assert compose([f"model.options={{a: {right}}}"], SCHEMA).model.options.a == plain.get(right) or int(right)


# --- files of others --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("output: ${oc.env:SECRET}", "never looked up"),
        ("data: {name: phantom, unseen: ['${oc.env:SECRET}']}", "never looked up"),
        ("'${oc.env:SECRET}': 1", "never looked up"),
        ("output: ${oc.decode:${oc.env:SECRET}}", "never looked up"),
        ("seed: &a 1\nfederation: {rounds: *a}", "refers to another part"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "refers to another part"),
        ("output: !!python/object/apply:os.system [ls]", "YAML tag"),
        ("seed: !!int '1'", "YAML tag"),
        ("seed: 1\nseed: 2", "there twice"),
        ("? [a]\n: 1", "cannot be a name"),
        ("[" * 5000, "no YAML"),
        ("seed: 1\x00", "no YAML"),
    ],
)
def test_a_file_of_others_reads_nothing_and_runs_nothing(
    text: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    path = tmp_path / "theirs.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=why) as caught:
        compose([f"experiment={path}"], SCHEMA)
    assert "theirs.yaml" in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_wrong_value_in_a_file_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 1\nfederation:\n  rounds: many\n")
    with pytest.raises(ConfigError, match=r"federation\.rounds=many should be int > 0 \(mine\.yaml, line 3\)"):
        compose([f"experiment={path}"], SCHEMA)


def test_a_sweep_file_runs_with_the_words_that_stand_there(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    parameters = {"output": {"value": "2024_01_02"}, "data.unseen": {"values": [["NO"], ["001"]]}}
    content = {"program": "train.py", "method": "grid", "command": COMMAND, "parameters": parameters}
    path.write_text(yaml.safe_dump(content))
    sweep = Sweep.read(str(path))
    made = [compose(sweep.settings(combination), SCHEMA) for combination in sweep.combinations(None, 0)]
    assert [(config.output, list(config.data.unseen)) for config in made] == [
        ("2024_01_02", ["NO"]),
        ("2024_01_02", ["001"]),
    ]
