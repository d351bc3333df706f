"""What comes from others is read without trust: bytes, updates, index files, tables. Nothing of it is executed."""

from __future__ import annotations

import ast
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fedseg.common.text import quoted
from fedseg.configs.compose import ConfigError, compose, load
from fedseg.datamodules.cases import Case, check_cases
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.manifest import read_manifest
from fedseg.federation.admission import Admission, Limits, unbounded
from fedseg.federation.checkpoint import Checkpoint, CheckpointError
from fedseg.federation.engine import RoundError
from fedseg.federation.state import LARGEST_HEADER, State, Update, from_bytes, to_bytes
from fedseg.federation.transport import InProcess
from fedseg.launch.settings import SCHEMA
from tests.world import simulate

ROOT = Path(__file__).parent.parent
MANY = int(os.environ.get("FUZZ", "1"))  # multiplies how many inputs are tried
quick = settings(deadline=None, database=None, suppress_health_check=[*HealthCheck])

# -------------------------------------------------------------------------------------- nothing executes

FORBIDDEN = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}


def unsafe(source: str) -> list[str]:
    """Calls and imports that execute what they read."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
            call = ast.unparse(node.func)
            if (
                call in {"eval", "exec", "compile", "__import__", "yaml.unsafe_load", "yaml.full_load"}
                or (call == "torch.load" and given.get("weights_only") is not True)
                or (call == "yaml.load" and "SafeLoader" not in ast.unparse(node))
                or given.get("allow_pickle") is True
                or given.get("shell") is True
            ):
                found.append(ast.unparse(node))
    return found


@pytest.mark.slow
def test_nothing_in_the_packages_unpickles_or_executes() -> None:
    packages = [path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name not in {"tests", "docs"}]
    files = [*ROOT.glob("*.py"), *(file for package in packages for file in package.rglob("*.py"))]
    assert len(files) > 50
    assert not {str(file): calls for file in files if (calls := unsafe(file.read_text(encoding="utf-8")))}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "yaml.load(t)",
        "np.load(p, allow_pickle=True)",
        "subprocess.run(c, shell=True)",
    ],
)
def test_the_search_finds_what_it_looks_for(source: str) -> None:
    assert unsafe(source)


# ------------------------------------------------------------------------------------------------------ bytes

VALID = to_bytes(
    State({"model": {"w": torch.rand(3, 2), "b": torch.rand(2)}, "head/ä": {"h": torch.ones(2).half()}}, {"loss": 0.5})
)
HEADER = int.from_bytes(VALID[:8], "little")


def assemble(header: Any, body: bytes) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + body


def header() -> dict[str, Any]:
    return dict(json.loads(VALID[8 : 8 + HEADER]))


def read_or_refuse(data: bytes) -> str:
    """Whatever comes: a state whose names are text, whose tensors fit in the data, or a ValueError."""
    try:
        state = from_bytes(data)
    except ValueError as error:
        if str(error).startswith(f"these {len(data)} bytes are not a serialised state") and len(str(error)) < 1000:
            return "refused"
        raise
    assert sum(state.sizes().values()) <= len(data)
    assert all(isinstance(name, str) for group in state.tensors.values() for name in group)
    assert all(isinstance(group, str) for group in state.tensors)
    assert all(type(value) is float for value in state.scalars.values())
    return "read"


@pytest.mark.slow
@settings(quick, max_examples=700 * MANY)
@given(st.binary(max_size=400))
def test_random_bytes(data: bytes) -> None:
    read_or_refuse(data)
    read_or_refuse(min(len(data), 2**20).to_bytes(8, "little") + data)


@pytest.mark.slow
@settings(quick, max_examples=1500 * MANY)
@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.binary(max_size=4), st.integers(0, 4)), max_size=4))
def test_valid_bytes_with_pieces_replaced(edits: list[tuple[int, bytes, int]]) -> None:
    data = VALID
    for place, piece, removed in edits:
        data = data[:place] + piece + data[place + removed :]
    read_or_refuse(data)


numbers = st.one_of(st.integers(-2, 40), st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64, 10**30]), st.floats())
leaves = st.one_of(
    numbers, st.none(), st.booleans(), st.text(max_size=4), st.sampled_from(["F32", "F64", "F8_E4M3", "I4"])
)
anything = st.recursive(leaves, lambda s: st.lists(s, max_size=4) | st.dictionaries(st.text(max_size=3), s, max_size=3))
WORDS = [
    "0:w",
    "9:w",
    "-1:w",
    "w",
    "٣:w",
    "01:w",
    "dtype",
    "shape",
    "data_offsets",
    "groups",
    "scalars",
    "__metadata__",
]


@pytest.mark.slow
@settings(quick, max_examples=300 * MANY)
@given(st.data())
def test_headers_that_lie(data: st.DataObject) -> None:
    """Structure-aware: a valid header with any of its values, at any depth, replaced, removed or added."""
    changed = header()
    for _ in range(data.draw(st.integers(1, 3))):
        node: Any = changed
        while True:
            key = data.draw(st.sampled_from([*node, *WORDS])) if isinstance(node, dict) else 0
            below = node.get(key) if isinstance(node, dict) else None
            if isinstance(below, dict) and below and data.draw(st.booleans()):
                node = below
                continue
            break
        if key in node and data.draw(st.booleans()):
            del node[key]
        else:
            node[key] = data.draw(anything)
        if isinstance(changed.get("__metadata__"), dict) and data.draw(st.booleans()):
            inner = data.draw(st.sampled_from(["groups", "scalars"]))
            changed["__metadata__"][inner] = json.dumps(data.draw(anything))
    read_or_refuse(assemble(changed, VALID[8 + HEADER :]))


def lie(**changes: Any) -> bytes:
    changed = header()
    for key, value in changes.items():
        changed.setdefault(key.replace("_", ":") if key != "__metadata__" else key, {}).update(value)
    return assemble(changed, VALID[8 + HEADER :])


META = header()["__metadata__"]
TEXT = json.dumps(header())
LIES = {
    "groups that are numbers": lie(__metadata__={"groups": "[0, 1]"}),
    "a group twice": lie(__metadata__={"groups": '["model", "model"]'}),
    "groups that are an object": lie(__metadata__={"groups": '{"model": 0, "head": 1}'}),
    "scalars that are text": lie(__metadata__={"scalars": '{"loss": "0.5"}'}),
    "scalars that are truth values": lie(__metadata__={"scalars": '{"loss": true}'}),
    "a scalar twice": lie(__metadata__={"scalars": '{"loss": 1, "loss": 2}'}),
    "a scalar too large for a float": lie(__metadata__={"scalars": '{"loss": 1' + "0" * 400 + "}"}),
    "nesting without end": lie(__metadata__={"scalars": "[" * 100_000}),
    "a tensor twice": assemble(TEXT.replace('"0:b"', '"0:w"'), VALID[8 + HEADER :]),
    "a group from behind": assemble(TEXT.replace('"0:b"', '"-1:b"'), VALID[8 + HEADER :]),
    "a group that is not there": assemble(TEXT.replace('"0:b"', '"2:b"'), VALID[8 + HEADER :]),
    "other digits": assemble(TEXT.replace('"0:b"', '"00:b"'), VALID[8 + HEADER :]),
    "overlapping tensors": lie(**{"0:b": {"data_offsets": header()["0:w"]["data_offsets"], "shape": [6]}}),
    "a tensor of an exabyte": lie(**{"0:w": {"shape": [2**60]}}),
    "a shape whose product overflows": lie(**{"0:w": {"shape": [2**32, 2**32, 2]}}),
    "negative sizes": lie(**{"0:w": {"shape": [-3, -2]}}),
    "a thousand dimensions": lie(**{"0:w": {"shape": [1] * 1000 + [3, 2]}}),
    "an unknown type": lie(**{"0:w": {"dtype": "object"}}),
    "a header longer than the data": (2**63).to_bytes(8, "little") + VALID[8:],
    "a header longer than any": (LARGEST_HEADER + 1).to_bytes(8, "little") + b" " * (LARGEST_HEADER + 1),
}


@pytest.mark.parametrize("name", LIES)
def test_known_lies_are_refused(name: str) -> None:
    assert LIES[name] != VALID
    with pytest.raises(ValueError, match="not a serialised state"):
        from_bytes(LIES[name])


# ------------------------------------------------------------------------------------------------------ updates

SERVER = State({"model": {"w": torch.zeros(3, 2)}, "buffers": {"m": torch.zeros(2)}, "head/a": {"h": torch.zeros(2)}})
ADMISSION = Admission(SERVER, {"head"}, Limits(filed_bytes=1000, filed_tensors=3, scalars=3, name=20))


def sent(**groups: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"w": torch.ones(3, 2)}, "buffers": {"m": torch.ones(2)}, **groups}


def test_what_was_asked_for_is_let_in() -> None:
    assert ADMISSION.refusal(Update(sent(), {"loss": 1.0}, site="a", examples=3)) == ""
    assert ADMISSION.refusal(Update(sent(head={"h": torch.ones(2)}), site="a", examples=0)) == ""


@pytest.mark.parametrize(
    ("update", "reason"),
    [
        (Update({"model": {"w": torch.ones(3, 2)}}, site="a", examples=1), "left out the group 'buffers'"),
        (Update(sent(other={"x": torch.ones(1)}), site="a", examples=1), "'other', which nobody asked for"),
        (Update(sent(model={"w": torch.ones(2, 3)}), site="a", examples=1), r"shape \(2, 3\), the one"),
        (Update(sent(model={"w": torch.ones(3, 2).double()}), site="a", examples=1), "float64 of shape"),
        (Update(sent(model={"w": torch.ones(3, 2), "v": torch.ones(1)}), site="a", examples=1), "for example 'v'"),
        (Update(sent(model={}), site="a", examples=1), "for example 'w'"),
        (Update(sent(head={"h": torch.ones(251)}), site="a", examples=1), "1004 bytes of its own"),
        (Update(sent(head={str(i): torch.ones(1) for i in range(4)}), site="a", examples=1), "4 tensors of its own"),
        (Update(sent(head={"h": torch.ones(2, dtype=torch.complex64)}), site="a", examples=1), "type or rank"),
        (Update(sent(head={"h": torch.ones([1] * 9)}), site="a", examples=1), "type or rank"),
        (Update(sent(head={"x\n" * 2: torch.ones(1)}), site="a", examples=1), "control characters"),
        (Update(sent(), {"loss": math.nan}, site="a", examples=1), "'loss' is not finite"),
        (Update(sent(), {"l" * 21: 1.0}, site="a", examples=1), "too long"),
        (Update(sent(), {str(i): 1.0 for i in range(4)}, site="a", examples=1), "4 numbers"),
        (Update(sent(), site="a", examples=-1), "number of images"),
        (Update(sent(), site="a", examples=10**12), "number of images"),
        (Update(sent(), site="a", examples=math.inf), "number of images"),  # type: ignore[arg-type]
    ],
)
def test_what_was_not_asked_for_is_refused(update: Update, reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(ADMISSION.refusal(update))


def test_foreign_text_is_cut_and_escaped() -> None:
    assert quoted("a\n\x1b[31mä") == "'a\\n\\x1b[31m\\xe4'"
    assert len(quoted("x" * 10_000)) < 100


class Tampering(InProcess):
    """One site answers with tensors of another shape, in every round."""

    def ask(self, tasks: Any, messages: Any) -> Any:
        for update in super().ask(tasks, messages):
            if update.site == "s1" and next(iter(tasks.values())).kind == "train":
                update.tensors["model"] = {name: t.new_ones(7) for name, t in update["model"].items()}
            yield update


def test_an_update_that_does_not_tell_its_steps_is_refused(tmp_path: Path) -> None:
    class Mute(InProcess):
        def ask(self, tasks: Any, messages: Any) -> Any:
            for update in super().ask(tasks, messages):
                if update.site == "s1":
                    update.scalars = {}
                yield update

    outcome = simulate("fedavg", tmp_path, rounds=1, transport=Mute)
    (event,) = outcome.observer.rows("events")
    assert event["detail"] == "it left out its number 'steps'"


def test_a_round_goes_on_without_an_update_that_does_not_fit(tmp_path: Path) -> None:
    outcome = simulate("fedavg", tmp_path, transport=Tampering)
    events = outcome.observer.rows("events")
    assert [(e["round"], e["site"], e["event"]) for e in events] == [(1, "s1", "refused"), (2, "s1", "refused")]
    assert "the one it was sent is" in events[0]["detail"]
    assert not outcome.server.non_finite()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Update({"bank": {"a": torch.ones(300)}}, site="a", examples=1), "1200 bytes"),
        (Update({"bank": {str(i): torch.ones(1) for i in range(4)}}, site="a", examples=1), "4 tensors"),
        (Update({"bank": {"a": torch.tensor(math.inf)}}, site="a", examples=1), "the first is 'bank/a'"),
        (Update({"b\nk": {"a": torch.ones(1)}}, site="a", examples=1), "control characters"),
        (Update({}, {"x": math.inf}, site="a", examples=1), "'x' is not finite"),
        (Update({"bank": {"a": torch.ones(3)}}, {"x": 1.0}, site="a", examples=1), "^$"),
    ],
)
def test_answers_without_a_counterpart_are_bounded(answer: Update, reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(unbounded(answer, Limits(filed_bytes=1000, filed_tensors=3)))


def answering(kind: str, tensors: dict[str, dict[str, torch.Tensor]], scalars: dict[str, float]) -> type[InProcess]:
    """One site answers questions of one kind with something else."""

    class Lying(InProcess):
        def ask(self, tasks: Any, messages: Any) -> Any:
            for update in super().ask(tasks, messages):
                if update.site == "s1" and tasks[update.site].kind == kind:
                    update.tensors, update.scalars = tensors, {**update.scalars, **scalars}
                yield update

    return Lying


def test_an_introduction_that_is_no_plain_numbers_ends_the_run_before_it_begins(tmp_path: Path) -> None:
    lie = answering("introduce", {"amplitude": {"0": torch.full((3,), math.nan)}}, {})
    with pytest.raises(RoundError, match=r"'s1' cannot introduce itself: 1 tensors are not finite"):
        simulate("feddg", tmp_path, transport=lie)


@pytest.mark.parametrize(
    ("tensors", "scalars", "reason"),
    [
        ({}, {"val/global/dice": math.nan}, "'val/global/dice' is not finite"),
        ({"model": {"w": torch.ones(1)}}, {}, "which nobody asked for"),
    ],
)
def test_scores_that_are_none_choose_no_model(tensors: Any, scalars: Any, reason: str, tmp_path: Path) -> None:
    outcome = simulate("fedavg", tmp_path, rounds=1, transport=answering("evaluate", tensors, scalars))
    (event,) = outcome.observer.rows("events")
    assert reason in event["detail"]
    assert not outcome.federation.checkpoint.best()


def test_a_model_that_is_no_numbers_is_not_published_and_the_table_says_so(tmp_path: Path) -> None:
    lie = answering("publish", {"personal": {"w": torch.full((3,), math.inf)}}, {})
    outcome = simulate("iopfl", tmp_path, rounds=1, transport=lie)
    published = outcome.federation.publish(1)
    assert {group.partition("/")[2] for group in published.tensors} == {"s0", "s2"}
    (event,) = outcome.federation.late_events
    assert (event["round"], event["site"]) == (2, "s1")


# ---------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("name", ["${oc.env:HOME}", "a ${oc.env:HOME} b", "${data.name}"])
def test_settings_from_elsewhere_do_not_read_this_machine(name: str) -> None:
    text = OmegaConf.to_yaml(compose([], SCHEMA)).replace("seed: 0", f"seed: '{name}'")
    assert name in text
    with pytest.raises(ConfigError, match="refers to other values"):
        load(text, SCHEMA)


def test_settings_do_not_grow_by_references() -> None:
    lines = ["a0: &a0 [x, x]", *(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}]" for n in range(60))]
    with pytest.raises(ConfigError, match="refers to other values"):
        load("\n".join(lines))


@pytest.mark.parametrize("word", ["&a 0", "!!str 0", "!!python/object/apply:os.getcwd []", "! 0"])
def test_settings_name_no_types_and_nothing_to_refer_to(word: str) -> None:
    text = OmegaConf.to_yaml(compose([], SCHEMA))
    load(text, SCHEMA)
    with pytest.raises(ConfigError, match="refers to other values or types"):
        load(text.replace("seed: 0", f"seed: {word}"), SCHEMA)


words = st.sampled_from(
    ["a", ":", "- ", "\n", "  ", "{", "}", "[", "]", "!!python/object:os.system ", "&x ", "*x", "'"]
)


@pytest.mark.slow
@settings(quick, max_examples=500 * MANY)
@given(st.one_of(st.text(max_size=40), st.lists(words, max_size=25).map("".join)))
@example("[" * 5000)
@example("!!python/object/apply:os.system ['true']")
def test_any_settings_are_read_or_refused(text: str) -> None:
    try:
        load(text, SCHEMA)
    except ConfigError:
        return
    pytest.fail("a short text cannot hold all settings of a run")


# ---------------------------------------------------------------------------------------------------- paths and tables


@pytest.mark.parametrize("file", ["../../secret", "/etc/passwd", "server.txt", "site-../x-00001.safetensors"])
@pytest.mark.parametrize("place", ["server", "kept", "best"])
def test_an_index_names_files_of_its_folder_only(file: str, place: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path)
    checkpoint.save(1, SERVER, {"a": State()}, {"global": 0.5})
    index = json.loads((tmp_path / "index.json").read_text())
    if place == "server":
        index["server"] = file
    elif place == "kept":
        index["kept"]["a"] = file
    else:
        index["best"]["global"]["server"] = file
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="no state file"):
        Checkpoint(tmp_path)


def test_a_site_of_any_name_keeps_its_files_in_the_folder(tmp_path: Path) -> None:
    names = ["../up", "a/b", "..", "C:\\x", "\x00", "x" * 5000, "ä", "-rf"]
    folder = tmp_path / "checkpoint"
    Checkpoint(folder).save(1, SERVER, {name: State({"g": {"w": torch.ones(1)}}) for name in names}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    snapshot = Checkpoint(folder).load()
    assert snapshot is not None
    assert set(snapshot.kept) == set(names)


@pytest.mark.parametrize("site", ["a/b", "..", "a\nb", "\x1b[31m", "x" * 300, "a\x00"])
def test_names_that_would_harm_files_or_logs_are_refused(site: str) -> None:
    with pytest.raises(DataError, match="names must"):
        check_cases([Case(site, "c", "c", "i.png")])


cells = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["site", "image", "mask", "split", "train", "x.png", '"', ",", ";", "\n", "\x00", "../x"]),
)


@pytest.mark.slow
@settings(quick, max_examples=400 * MANY)
@given(st.lists(st.lists(cells, max_size=6), max_size=5), st.sampled_from([",", ";", "\t"]), st.booleans())
@example([['"' + "x" * 140_000]], ",", True)
@example([["a", "y" * 5000, ""]], ",", True)
@example([["a", "\x00", ""]], ",", True)
def test_any_table_is_read_or_refused(
    tmp_path_factory: Any, rows: list[list[str]], separator: str, headed: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "sites.csv"
    (path.parent / "x.png").touch()
    head = [["site", "image", "mask"]] if headed else []
    path.write_bytes("\n".join(separator.join(row) for row in [*head, *rows]).encode("utf-8", "surrogatepass"))
    try:
        found = read_manifest(path)
    except DataError as error:
        if str(path) in str(error):
            return
        raise
    assert all(case.site and case.image for case, _ in found)


@settings(quick, max_examples=200 * MANY)
@given(st.booleans(), st.binary(max_size=200))
def test_any_file_as_a_table_is_read_or_refused(tmp_path_factory: Any, headed: bool, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.csv"
    path.write_bytes((b"site,image,mask\n" if headed else b"") + data)
    with pytest.raises(DataError):
        read_manifest(path)
