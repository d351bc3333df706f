"""The log of a run: every change, drop and reorder is found, and sites hold the server to what it showed them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedseg.federation.checkpoint import CheckpointError
from fedseg.federation.contract import Task, TrainTask
from fedseg.federation.flower.keys import SiteKey
from fedseg.federation.ledger import HASH, LEDGER, START, Ledger, broken, canonical, digests, hashed, read
from fedseg.federation.state import State, Update, from_bytes, to_bytes
from fedseg.launch import flower_server
from fedseg.launch.run import execute
from fedseg.launch.verify import Log, _receipt_in, main, problems
from fedseg.reporting.folder import RunFolder
from tests.test_across import SITES, across, grid_of
from tests.tiny_run import phantom_run

Rows = list[dict[str, Any]]


def lines(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: Rows) -> None:
    path.write_text("".join(canonical(row) + "\n" for row in rows))


def chained(rows: Rows) -> Rows:
    """The same entries as a chain that holds: what somebody writes who rewrites all of it."""
    before, found = START, []
    for number, row in enumerate(rows, 1):
        whole = {**row, "entry": number, "previous": before}
        whole[HASH] = before = hashed(whole)
        found.append(whole)
    return found


# ------------------------------------------------------------------------------------------------- digests and chain


@settings(deadline=None, max_examples=40, suppress_health_check=[*HealthCheck])
@given(st.data())
def test_a_digest_is_of_content_alone_and_of_all_of_it(data: Any) -> None:
    kind = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float64]))
    shape = data.draw(st.lists(st.integers(0, 3), max_size=3))
    tensor = torch.randint(0, 2, shape).to(kind)
    state = State({"model": {"a": tensor, "b": tensor.clone()}}, {"x": data.draw(st.floats(3, 1e9))})
    found = digests(state)
    assert found == digests(from_bytes(to_bytes(state)))
    assert digests(State({"model": {"a": tensor, "c": tensor}}))["model"] != found["model"]
    assert digests(State({"model": {"a": tensor.reshape(1, *shape), "b": tensor}}))["model"] != found["model"]
    assert digests(State(state.tensors, {"y": state.scalars["x"]}))["(numbers)"] != found["(numbers)"]
    assert digests(State(state.tensors, {"x": state.scalars["x"] / 2 + 1}))["(numbers)"] != found["(numbers)"]
    if tensor.numel():
        other = tensor.clone()
        other.view(-1)[-1] = 1 - other.view(-1)[-1].to(torch.int64)
        assert digests(State({"model": {"a": other, "b": tensor}}))["model"] != found["model"]


def ledger_of(path: Path, count: int = 6) -> Rows:
    ledger = Ledger(path)
    ledger.begun(0, "", alike=True)
    for round in range(1, count):
        state = State({"model": {"w": torch.tensor([float(round)])}})
        answers = iter([Update(state.tensors, site="a", examples=round)])
        list(ledger.noted({"a": TrainTask(round, 0)}, {"a": state}, answers))
    return lines(path)


@settings(deadline=None, max_examples=60, suppress_health_check=[*HealthCheck])
@given(st.data())
def test_every_change_drop_and_reorder_is_found(tmp_path_factory: Any, data: Any) -> None:
    rows = ledger_of(tmp_path_factory.mktemp("ledger") / LEDGER)
    assert not broken(rows)
    kind = data.draw(st.sampled_from(["change", "drop", "swap", "insert", "repeat"]))
    place = data.draw(st.integers(0, len(rows) - 2))
    if kind == "change":
        key = data.draw(st.sampled_from(sorted(rows[place])))
        rows[place] = {**rows[place], key: data.draw(st.integers(100, 10**9))}
    elif kind == "drop":
        del rows[place]
    elif kind == "swap":
        rows[place], rows[place + 1] = rows[place + 1], rows[place]
    elif kind == "insert":
        rows.insert(place, {**rows[place], HASH: hashed({**rows[place], "entry": 0})})
    else:
        rows.insert(place, rows[place])
    assert broken(rows)


def test_a_half_written_line_is_taken_away_and_a_damaged_ledger_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / LEDGER
    rows = ledger_of(path)
    path.write_text(path.read_text() + '{"entry": 7, "prev')
    assert len(read(path)) == len(rows)
    Ledger(path).begun(5, "", alike=True)
    assert not broken(lines(path))
    assert Ledger(path, whole=False).head == lines(path)[-1][HASH]
    write(path, rows[1:])
    with pytest.raises(CheckpointError, match=r"ledger\.jsonl is damaged: entry 1 does not follow"):
        Ledger(path)
    path.write_text("no entry\n")
    with pytest.raises(CheckpointError, match="line 1 is no entry"):
        Ledger(path)


# --------------------------------------------------------------------------------------------------- in one process


@pytest.mark.slow
def test_a_run_in_one_process_has_a_chain_that_goes_on_when_it_is_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    execute(phantom_run(3, tmp_path, "algorithm=ditto", "federation.rounds=1"))
    execute(phantom_run(3, tmp_path, "algorithm=ditto", "federation.rounds=2", "resume=true"))
    rows = lines(tmp_path / LEDGER)
    assert [row["round"] for row in rows if row["what"] == "begun"] == [0, 1]
    assert {"train", "evaluate", "checkpoint"} <= {row["what"] for row in rows}
    assert not any("signature" in told for row in rows for told in row.get("sites", {}).values())
    assert main([str(tmp_path)]) == 0
    assert f"all fits; the run's last hash is {rows[-1][HASH]}" in capsys.readouterr().out
    state = next((tmp_path / "checkpoints").glob("server-00002*"))
    held = from_bytes(state.read_bytes())
    held["model"][next(iter(held["model"]))] += 1
    from fedseg.federation.checkpoint import Checkpoint

    Checkpoint(tmp_path / "checkpoints").save(2, held, {}, {})  # with checksums that fit
    assert main([str(tmp_path)]) == 1
    assert "it is not the state that the ledger tells of after round 2" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["nowhere"]])
def test_wrong_usage_is_told(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / word) for word in arguments]) == 2
    told = capsys.readouterr()
    assert "fedseg.launch.verify RUN" in told.out or "there is no ledger" in told.err


# -------------------------------------------------------------------------------------------------- across machines


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three sites, in two parts."""
    folder = tmp_path_factory.mktemp("finished")
    grid = grid_of(folder / "sites")
    run = across(folder, "algorithm=fedavg", "federation.rounds=1", grid=grid)
    flower_server.run(grid, [f"output={run.path}", "resume=true", "federation.rounds=2"])
    return folder


def places(folder: Path) -> tuple[Path, list[Path]]:
    name = (folder / "across" / "run-id.txt").read_text().strip()
    return folder / "across", [folder / "sites" / site / name for site in SITES]


def found_in(folder: Path, *, with_sites: bool = True) -> list[str]:
    run, sites = places(folder)
    return problems(Log.of(run), [Log.of(site) for site in sites] if with_sites else [])


@pytest.mark.slow
def test_an_honest_run_fits_and_every_site_can_prove_what_it_sent(finished: Path) -> None:
    assert found_in(finished) == []
    run, sites = places(finished)
    assert main([str(run), *map(str, sites)]) == 0
    assert main([*map(str, sites)]) == 0
    trained = [row for row in lines(run / LEDGER) if row["what"] == "train"]
    for site, place in zip(SITES, sites, strict=True):
        own = [row for row in lines(place / LEDGER) if row["what"] == "train"]
        assert [row["sites"][site]["signature"] for row in trained] == [row["signature"] for row in own]
        assert [row["sites"][site]["sent"] for row in trained] == [row["sent"] for row in own]


def an_update(rows: Rows) -> dict[str, Any]:
    return next(row for row in reversed(rows) if row["what"] == "train")["sites"]["site_02"]


def another_update(rows: Rows) -> None:
    an_update(rows)["sent"]["model"] = "0" * 64


def another_number(rows: Rows) -> None:
    an_update(rows)["examples"] = 10_000


def another_model(rows: Rows) -> None:
    for told in next(row for row in rows if row["what"] == "train")["sites"].values():
        told["shown"]["model"] = "1" * 64


def unequal_models(rows: Rows) -> None:
    an_update(rows)["shown"]["model"] = "1" * 64


def a_site_less(rows: Rows) -> None:
    del next(row for row in rows if row["what"] == "train")["sites"]["site_02"]


def a_turn_less(rows: Rows) -> None:
    rows.remove(next(row for row in rows if row["what"] == "evaluate"))


def two_swapped(rows: Rows) -> None:
    places = [number for number, row in enumerate(rows) if row["what"] == "train"]
    rows[places[0]], rows[places[1]] = rows[places[1]], rows[places[0]]


def the_end_gone(rows: Rows) -> None:
    del rows[[number for number, row in enumerate(rows) if row["what"] == "train"][-1] :]


def an_unsigned_answer(rows: Rows) -> None:
    del an_update(rows)["signature"]


REWRITTEN: list[Callable[[Rows], None]] = [
    *(another_update, another_number, another_model, unequal_models, a_site_less, a_turn_less, two_swapped),
    *(the_end_gone, an_unsigned_answer),
]


@pytest.mark.slow
@pytest.mark.parametrize("change", REWRITTEN)
def test_a_ledger_that_was_rewritten_as_a_whole_is_found_by_signatures(
    change: Callable[[Rows], None], finished: Path, tmp_path: Path
) -> None:
    """The server's people know how hashes are made; what they lack is the sites' keys."""
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    path = folder / "across" / LEDGER
    rows = lines(path)
    change(rows)
    write(path, rows)
    assert found_in(folder, with_sites=False)
    write(path, chained(rows))
    assert not broken(lines(path))
    assert found_in(folder, with_sites=False)
    assert found_in(folder)


def test_other_keys_do_not_help_whoever_rewrites(finished: Path, tmp_path: Path) -> None:
    """A history that is invented as a whole, keys included, is not that of the sites."""
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    keys = folder / "across" / "keys.yaml"
    other = SiteKey(tmp_path / "other", "site_02").public
    keys.write_text("".join(f"{site}: {other}\n" for site in SITES))
    assert any("the run has another key under this name" in told for told in found_in(folder))


def test_an_answer_that_a_killed_server_could_not_note_is_not_held_against_it(finished: Path, tmp_path: Path) -> None:
    """Only where the run went on from there: behind its last entry something is missing."""
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    run, sites = places(folder)
    noted, own = lines(run / LEDGER), lines(sites[1] / LEDGER)
    resumed = [row for row in noted if row["what"] == "begun"][-1]
    key = SiteKey(sites[1].parent, "site_02")
    for head, told in ((resumed["previous"], []), (noted[-1][HASH], ["the run's ledger ends before it"])):
        signs = {**_receipt_in(own[-1]), "head": head}
        write(sites[1] / LEDGER, chained([*own, {**signs, "key": key.public, "signature": key.sign(canonical(signs))}]))
        found = found_in(folder)
        assert len(found) == len(told)
        assert all(words in line for words, line in zip(told, found, strict=True))


def test_what_a_site_wrote_afterwards_proves_nothing(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    _, sites = places(folder)
    rows = lines(sites[1] / LEDGER)
    an = next(row for row in rows if row["what"] == "train")
    an["sent"]["model"] = "2" * 64
    write(sites[1] / LEDGER, chained(rows))
    told = found_in(folder)
    assert any("is not signed by the site's key" in line for line in told)


@pytest.mark.slow
def test_two_sites_detect_that_they_were_shown_different_models(tmp_path: Path) -> None:
    """The server sends one site another model, and writes down what it sent to the others."""
    from fedseg.federation.flower.transport import FlowerTransport

    write_honestly = FlowerTransport._write

    def two_faced(self: Any, site: str, task: Task, message: State, whole: bool = False) -> Any:
        if site == "site_02" and task.kind == "train":
            model = {name: t + 1 if t.is_floating_point() else t for name, t in message["model"].items()}
            message = State({**message.tensors, "model": model}, message.scalars)
        return write_honestly(self, site, task, message, whole)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FlowerTransport, "_write", two_faced)
        run = across(tmp_path, "algorithm=fedavg", "federation.rounds=1")
    _, sites = places(tmp_path)
    told = problems(None, [Log.of(sites[0]), Log.of(sites[1])])
    assert told == ["sites 'site_01' and 'site_02' were shown different models (train, round 1)"]
    assert any("site_02" in line for line in found_in(tmp_path))
    assert RunFolder(run.path).rounds()["round"].max() == 1


@pytest.mark.slow
def test_a_method_that_answers_each_site_is_not_accused(tmp_path: Path) -> None:
    execute(phantom_run(3, tmp_path, "algorithm=prrfl"))
    assert main([str(tmp_path)]) == 0
