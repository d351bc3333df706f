"""The tables of all methods are what the methods declare, and take up a new method by themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.steps import Fit, write
from fedseg.algorithms import ALGORITHMS
from fedseg.algorithms.fedavg import FedAvg
from fedseg.launch import methods as tables
from fedseg.launch.methods import (
    COSTS,
    Method,
    costs,
    main,
    methods,
    rewritten,
    run,
    short_text,
    table_text,
    together_text,
)
from fedseg.launch.settings import METHODS
from fedseg.reporting import ReportingError
from tests.formulas import BYTES, expected, of_memory, rows, symbols, value

ROOT = Path(__file__).parent.parent
MAIN_JOB = {
    **{"sites": 4, "regions": 2, "images": 32, "others": 62, "shown": 8, "newer": 1},
    **{"public": 64 * 96 * 96, "window": 9},
}
"""What the formulas ask of the run that was measured, of its first site."""


def found(name: str) -> Method:
    return next(method for method in methods() if method.name == name)


def row(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if f"`{name}`" in line.split(" | ")[0]]
    return line.strip("| ").split(" | ")


@pytest.mark.slow
def test_the_documents_are_what_the_methods_declare() -> None:
    assert run(["check=true"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "column", "told"),
    [
        ("local", 5, "nothing"),
        ("scaffold", 5, "`control`"),
        ("harmofl", 5, "tells 2.3 kB before round 1"),
        ("fedavg", 6, "-"),
        ("fedbn", 6, "normalisation"),
        ("fedrep", 6, "segmentation_head"),
        ("apfl", 6, "`alpha`, `twin`"),
        ("iopfl", 4, "global, adapted"),
        ("silobn", 4, "own-statistics"),
        ("contrastive", 7, "images"),
        ("fedprox", 8, "-"),
        ("ditto", 8, "privacy of patients"),
        (
            "lcfed",
            8,
            "privacy of sites, privacy of patients, secure aggregation, volumes, unseen sites, pieces of a batch",
        ),
        ("contrastive", 9, "0.7 (`algorithm.pairing=instance`)"),
        ("fedavg", 12, "1.00"),
        ("scaffold", 13, "arrays"),
        ("fedprox", 13, "arrays"),  # by a test that is given it
        ("feddyn", 13, "the paper"),  # its test reads another method's archive for its data only
        ("pfedme", 13, "the paper"),
    ],
)
def test_a_method_is_told_as_it_is(name: str, column: int, told: str) -> None:
    assert row(table_text(), name)[column] == told


def test_bytes_that_were_measured_are_what_the_formulas_say() -> None:
    known = symbols(found("fedavg").built.model, **MAIN_JOB)
    assert sorted(name for name, _ in rows("methods | sends | receives | keeps | tells")) == sorted(costs())
    for name, measured in costs().items():
        assert {what: int(measured[what]) for what in BYTES} == expected(name, known), name


def test_memory_that_was_measured_is_what_the_formulas_say() -> None:
    usual = int(costs()["fedavg"]["memory"])
    known = symbols(found("fedavg").built.model, **MAIN_JOB)
    known["activations"] = usual - known["copy"] - known["optimizer"]
    assert known["activations"] > 0
    assert sorted(name for name, _ in rows("methods | more than FedAvg | how")) == sorted(costs())
    for name, (how, *formulas) in of_memory().items():
        more, told = int(costs()[name]["memory"]) - usual, [value(formula, known) for formula in formulas]
        if how == "between":
            assert told[0] < more < told[1], name
        else:
            within = {"exact": 0.0, "within 3 %": 0.03 * (usual + more)}[how]
            assert told == [pytest.approx(more, rel=0, abs=within)], name


@pytest.mark.slow
def test_what_goes_together_is_what_is_built_and_what_is_refused() -> None:
    rows = [line.strip("| ").split(" | ") for line in together_text().splitlines()]
    good = {what: names for whats, why, names in rows if why == "goes together" for what in whats.split(", ")}
    for step in ("fedavgm", "fedadagrad", "fedadam", "fedyogi"):
        assert "`fedce`" in good[f"`algorithm=METHOD+{step}`"]
        assert "`scaffold`" not in good[f"`algorithm=METHOD+{step}`"]
    assert {"`fedprox`", "`feddg`"} <= set(good["`algorithm.personal=normalisation`"].split(", "))
    for what, why, names in (
        ("federation.order=cyclic", "(reads_updates)", "fedce, fedcost, qffl, ga, fedawa"),
        ("federation.order=cyclic", "no effect on training in one place", "pooled"),
        ("federation.order=cyclic", "no effect on a method that averages nothing", "local"),
        ("training.harmonise=combat", "the method trains on the images of all sites together", "pooled"),
        ("algorithm.personal=normalisation", "it has no meaning for the method", "local, pooled, medisecfed"),
    ):
        (told,) = [told for told in rows if why in told[1] and f"`{what}`" in told[0]]
        assert told[2].replace("`", "") == names


class Calm(FedAvg):
    """Calm (Nobody, 2026): a method that learns half as much."""

    slices_only = "it is a test"


@pytest.fixture
def calm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(ALGORITHMS, "calm", Calm)
    monkeypatch.setitem(METHODS, "calm", Calm)
    methods.cache_clear()
    yield
    monkeypatch.undo()
    methods.cache_clear()


@pytest.mark.slow
@pytest.mark.usefixtures("calm")
def test_a_new_method_is_taken_up_and_not_said_to_be_measured() -> None:
    told = row(table_text(), "calm")
    assert told[1] == "Calm (Nobody, 2026): a method that learns half as much"
    assert told[8:] == ["volumes", *["not measured"] * 4, "the paper"]
    assert row(short_text(), "calm")[2:] == ["global", "-"]


@pytest.mark.usefixtures("calm")
def test_a_document_that_lags_behind_is_refused_and_made_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "README.md"
    document.write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    assert main([str(document), "check=true"]) == 2
    assert f"python -m fedseg.launch.methods {document}" in capsys.readouterr().err
    assert main([str(document)]) == 0
    assert "| `calm` |" in document.read_text(encoding="utf-8")
    assert main([str(document), "check=true"]) == 0


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("# Nothing\n", "has no table of methods; mark its place: <!-- from methods: table -->"),
        ("<!-- from methods: short -->\n", "lacks its '<!-- end -->'"),
        ("<!-- from methods: long -->\n<!-- end -->\n", "'long' is no table of methods; there are table, refusals"),
    ],
)
def test_marks_that_cannot_be_read_are_refused(text: str, told: str) -> None:
    with pytest.raises(ReportingError, match=r"page\.md") as error:
        rewritten(text, Path("page.md"))
    assert told in str(error.value)


def test_links_lead_to_sections_that_tell_idea_traffic_use_and_cost() -> None:
    for method in methods():
        page, section = method.page
        assert page, f"{method.name} has no paragraph in docs/methods"
        text = (ROOT / "docs" / "methods" / page).read_text(encoding="utf-8")
        _, *parts = re.split(r"^#+ (.*)$", text, flags=re.MULTILINE)
        told = dict(zip(map(tables.slug, parts[::2]), parts[1::2], strict=True))
        assert not section or section in told
        about = " ".join((told[section] if section else text).split())
        for what in ("[Ii]dea", "What leaves", "When it helps", "Cost|Memory and time"):
            assert re.search(rf"(\*\*|# )(The )?({what})", about), (method.name, what)


def test_rows_that_are_measured_again_leave_the_others(tmp_path: Path) -> None:
    path = tmp_path / "costs.csv"
    path.write_text(COSTS.read_text(encoding="utf-8"), encoding="utf-8")
    measured = {
        "method": "ditto algorithm.lam=1",
        "seconds": 1.0,
        "step": 2.5,
        "up": 1,
        "down": 1,
        "kept": 1,
        "told": 0,
        "memory": 7,
    }
    write(path, [{**measured, "sends": "model"}], ["model=unet"], 5)
    before = [line for line in COSTS.read_text(encoding="utf-8").splitlines() if not line.startswith(("#", "ditto"))]
    after = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith(("#", "ditto"))]
    assert before == after
    assert "ditto,2.50,1,1,1,0,7,model,algorithm.lam=1" in path.read_text(encoding="utf-8")
    write(path, [{"method": "ditto algorithm.lam=1", "memory": 9}], ["model=unet"], 5)
    assert "ditto,2.50,1,1,1,0,9,model,algorithm.lam=1" in path.read_text(encoding="utf-8")


@pytest.mark.slow
def test_memory_grows_with_a_second_model_and_is_the_same_when_measured_again() -> None:
    tiny = [
        "data.n_sites=2", "data.cases_per_site=6", "data.amount=0", "data.size=32", "data.resolution=32", "model=tiny",
        "trainer.accelerator=cpu", "trainer.threads=1",
    ]  # fmt: skip
    one, again, two = (Fit(name, tiny, 1) for name in ("fedavg", "fedavg", "ditto"))
    model = sum(t.numel() * t.element_size() for t in one.worker.parameters())
    taken = one.memory()
    assert again.memory() == pytest.approx(taken, rel=1e-3)
    assert 4 * model < taken < two.memory() - model  # weights, gradients, two moments
