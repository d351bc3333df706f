"""What the documents on safety say is tested: each of their paragraphs and tables names what shows it, and that exists.

A comment below each says `shown by` (tests), `measured by` (a program) or `a limit` (something that is not promised).
"""

from __future__ import annotations

import ast
import inspect
import itertools
import math
import re
import shlex
import stat
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from fedseg.algorithms import ALGORITHMS
from fedseg.algorithms.functional.private import PrivateStep
from fedseg.common.files import write_atomic
from fedseg.common.text import LONGEST_SITE, quoted
from fedseg.configs.compose import ConfigError, compose
from fedseg.console import own_files
from fedseg.datamodules import manifest
from fedseg.datamodules.errors import DataError
from fedseg.federation import combine
from fedseg.federation.admission import Limits, bounds
from fedseg.federation.contract import Guarantee
from fedseg.federation.engine import ONCE, POOL
from fedseg.federation.flower.keys import SiteKey
from fedseg.federation.flower.records import MOST_ENTRIES, MOST_ROWS, MOST_SETTING, MOST_VERSION
from fedseg.federation.state import HIGHEST_RANK, LARGEST_HEADER, State, Update
from fedseg.launch.experiment import Experiment
from fedseg.launch.run import finish
from fedseg.launch.settings import SCHEMA
from fedseg.launch.sites.across import check_carried, check_transforms
from fedseg.launch.sites.site import Pseudonyms
from fedseg.launch.sites.terms import check_terms, read_terms
from fedseg.privacy.accounting import Account, gaussian_event
from fedseg.privacy.encryption import DEGREE
from fedseg.privacy.masked import Masked, threshold
from fedseg.privacy.masks import FRACTION
from fedseg.reporting.folder import RunFolder

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("hardening", "privacy", "reliability")
LINK = re.compile(r"<!-- (shown by|measured by|a limit): ")


@cache
def text_of(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def blocks(name: str) -> list[str]:
    """Paragraphs, lists and tables, and the comments below them, section by section; "" between sections."""
    plain = re.sub(r"```.*?```", "", text_of(name), flags=re.DOTALL)
    found = [block.strip() for block in re.split(r"\n\s*\n", plain)]
    return ["" if re.fullmatch(r"#[^\n]*", block) else block for block in found if block] + [""]


@cache
def named_in(file: str) -> frozenset[str]:
    path = ROOT / "tests" / file
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


@cache
def all_tests() -> frozenset[str]:
    return frozenset(name for path in (ROOT / "tests").glob("test_*.py") for name in named_in(path.name))


def test_who_sees_what_is_told_of_each_method_once() -> None:
    table = text_of("attacks").partition("## Who sees what")[2].partition("\n## ")[0]
    first = re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE)
    assert sorted(name for cell in first for name in re.findall(r"`(\w+)`", cell)) == sorted(ALGORITHMS)


def rows_of(name: str, section: str) -> dict[str, list[str]]:
    """Method -> its row in the section's table, without the first cell."""
    lines = [line for line in text_of(name).partition(f"## {section}")[2].partition("\n## ")[0].splitlines() if line]
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {method: cells for first, *cells in split for method in re.findall(r"`(\w+)`", first)}


def test_what_hides_an_update_is_what_the_table_of_settings_allows() -> None:
    """Each method's last cell in docs/attacks.md against docs/privacy.md, whose table the code writes."""
    served = rows_of("privacy", "Which method goes with what")
    words = {"secure aggregation": 3, "noise of sites": 0, "noise of patients": 1}  # column of the setting
    for method, cells in rows_of("attacks", "Who sees what").items():
        allowed = {word for word, column in words.items() if served[method][column] == "yes"}
        told = cells[-1].replace("noise of sites and of patients", "noise of sites; noise of patients")
        hides = {word for word in words if word in told and "secure aggregation and noise are refused" not in told}
        assert hides == allowed, method


def test_what_examples_in_python_import_exists() -> None:
    examples = [page.read_text(encoding="utf-8") for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]]
    code = [ast.parse(block) for text in examples for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]
    imports = {ast.unparse(node) for tree in code for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert len(imports) > 5
    for line in imports:
        exec(line, {})


@pytest.mark.slow
def test_the_guides_private_run_is_one_that_runs_across_machines_and_meets_its_terms(tmp_path: Path) -> None:
    part = text_of("deployment").partition("### A private run, whole")[2]
    own, settings = (re.findall(rf"```{kind}\n(.*?)```", part, re.DOTALL)[0] for kind in ("yaml", "toml"))
    (tmp_path / "terms.yaml").write_text(own)
    terms = read_terms(tmp_path / "terms.yaml")
    assert (terms.masked, terms.max_epsilon) == (True, 8)
    run = Experiment(compose([*shlex.split(settings.split('"""')[1]), "engine=flower"], SCHEMA), channels=3)
    run.check()
    check_carried(run)
    check_transforms(run, "flower")
    check_terms(run, "north", terms)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_paragraph_says_what_shows_it(name: str) -> None:
    """One that leads to a table or a list is shown with it."""
    found = [(one, below) for one, below in pairwise(blocks(name)) if one and not LINK.match(one)]
    bare = [one[:80] for one, below in found if not below.startswith(("|", "- ", "<!-- "))]
    assert found
    assert bare == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_what_is_named_exists(name: str) -> None:
    links = [" ".join(block.split()) for block in blocks(name) if LINK.match(block)]
    named = []
    for link in links:
        for file, tests in re.findall(r"(test_\w+\.py): ((?:test_\w+(?:, )?)+)", link):
            named += [(file, test) for test in tests.strip(", ").split(", ")]
        for program in re.findall(r"measured by: ([\w.]+)", link):
            assert (ROOT / f"{program.replace('.', '/')}.py").is_file(), program
    assert len(named) > 5
    assert [pair for pair in named if pair[1] not in named_in(pair[0])] == []
    words = {word for link in links for word in re.findall(r"\btest_\w+\b(?!\.py)", link)}
    assert words == {test for _, test in named}, "every name stands behind its file"


@pytest.mark.slow
def test_faults_are_shown_by_tests_that_exist() -> None:
    """The table of docs/reliability.md names them itself, by how they begin."""
    rows = [line for line in text_of("reliability").splitlines() if line.startswith("| ") and line.count("|") == 4]
    named = [row.split("|")[3] for row in rows[1:]]
    for beginning in re.findall(r"`(test_\w+)\.\.\.`", " ".join(named)):
        assert any(test.startswith(beginning) for test in all_tests()), beginning
    for file in re.findall(r"`tests/(test_\w+\.py)`", " ".join(named)):
        assert named_in(file), file
    assert all("test" in cell or "the same" in cell for cell in named)


def spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def short(number: float) -> str:
    return f"{number:.0e}".replace("e+0", "e").replace("e+", "e")


def tiny() -> int:
    """Numbers that the tiny network learns."""
    model = Experiment(compose(["data=phantom", "model=tiny"], SCHEMA)).algorithm(in_channels=3).model
    return sum(parameter.numel() for parameter in model.parameters())


def fuzzed() -> int:
    """Inputs that tests/test_hardening.py tries."""
    source = (ROOT / "tests" / "test_hardening.py").read_text(encoding="utf-8")
    return sum(int(count) for count in re.findall(r"max_examples=(\d+) \* MANY", source))


def lasting(patients: int, noise: float = 1.0) -> int:
    """Rounds of ten steps of four patients that fit epsilon 8 at delta 1e-4."""
    account, step = Account(Guarantee("patient", 1e-4)), gaussian_event(noise, 4 / patients)
    return next(past for past in itertools.count() if account.epsilon({step: 10.0 * (past + 1)}) > 8)


@pytest.mark.slow
def test_figures_are_those_of_the_code() -> None:
    limits, steps, others = Limits(), bounds("train/steps"), bounds("loss")
    quotes = inspect.signature(quoted).parameters["longest"].default
    deviation, numbers = 4.0 / 6, tiny()
    shares = {sites: threshold(sites) for sites in (3, 4, 5, 6)}
    figures = {
        "hardening": [
            f"header of at most {LARGEST_HEADER >> 20} MiB",
            f"at most {HIGHEST_RANK} dimensions",
            f"bounded in number, type, rank and {limits.filed_bytes >> 20} MiB",
            f"named in at most {limits.name} printable characters",
            f"at most {spaced(ONCE.filed_tensors)} tensors, and {ONCE.filed_bytes >> 30} GiB "
            f"({limits.filed_bytes >> 20} MiB within secure aggregation)",
            f"seconds and steps from {steps[0]:g} to {short(steps[1])}",
            f"others at most {short(others[1])} in size",
            f"at most {spaced(MOST_ROWS)} rows an answer",
            f"at most {MOST_ENTRIES} settings and versions, of {spaced(MOST_SETTING)} and {MOST_VERSION} characters",
            f"1 to {LONGEST_SITE} printable characters",
            f"at most {manifest.LARGEST_MANIFEST >> 20} MiB, UTF-8",
            f"Refusals quote at most {quotes} characters",
            f"tries {spaced(fuzzed())} inputs",
            {3.0: "more than three times as far"}[combine.FAR],
        ],
        "privacy": [
            f"a deviation of {deviation:.2f} on each of {numbers / 1e6:.1f} million weights",
            f"a vector of norm {deviation * math.sqrt(numbers):.0f} beside updates of norm 1",
            f"the tiny network ({numbers:,} numbers, {numbers * 4 / 1e6:.1f} MB)",
            {8: "in pieces of eight"}[PrivateStep(1.0, 1.0, 1.0).piece],
            f"degree {DEGREE}",
            f"2^-{int(math.log2(FRACTION))} per weighted number",
            {3: "A round needs three sites"}[Masked.least],
            f"({shares[3]} of 3, {shares[4]} of 4 or 5, {shares[6]} of 6)",
            f"24 training patients last {lasting(24)} rounds, 30 last {lasting(30)}, 60 last {lasting(60)} and 100 "
            f"last {lasting(100)}; with `privacy.noise=2` 24 last {lasting(24, noise=2.0)}",
        ],
    }
    assert shares[4] == shares[5]
    assert limits.filed_tensors == ONCE.filed_tensors
    for name, wanted in figures.items():
        told = " ".join(text_of(name).split())
        assert [figure for figure in wanted if figure not in told] == []


# ----------------------------------------------------------------------------- claims that have no better place


def test_a_site_is_not_called_as_the_pool_is() -> None:
    named: Any = SimpleNamespace(data=SimpleNamespace(sites=("a", POOL), unseen_sites=()))
    with pytest.raises(ConfigError, match=r"a site is called 'pooled', .* rename its folder"):
        Experiment.sites(named)


def test_a_table_of_files_has_a_largest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sites.csv"
    path.write_text("site,image,mask\n" + "a,b.png,c.png\n" * 9)
    monkeypatch.setattr(manifest, "LARGEST_MANIFEST", 100)
    data = Experiment(compose(["data=folder", f"data.root={tmp_path}", f"data.manifest={path}"], SCHEMA)).data
    with pytest.raises(DataError, match=r"sites\.csv has more than 0 MiB"):
        data.cases()


def test_keys_of_a_site_are_its_owners(tmp_path: Path) -> None:
    SiteKey(tmp_path, "a")
    Pseudonyms(tmp_path)
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert found["site.key"] == found["pseudonyms.key"] == 0o600


def test_rights_of_files_that_exist(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for name in ("events.csv", "run-id.txt"):
        (tmp_path / name).touch()
        (tmp_path / name).chmod(0o644)
    with own_files():
        run.append_events([{"round": 1, "site": "a", "event": "absent", "detail": ""}])
        write_atomic(tmp_path / "run-id.txt", "0")
    found = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("events.csv", "run-id.txt")]
    assert found == [0o644, 0o600]


def private(*settings: str) -> Any:
    """The transform of a run with noise at the server."""
    base = ["data=phantom", "model=tiny", "model.norm=group", "algorithm=fedavg", "privacy.mechanism=site"]
    (found,) = Experiment(compose([*base, *settings], SCHEMA)).transforms
    return found


def test_what_stays_at_a_site_under_noise_at_the_server() -> None:
    """The loss and the number of images."""
    scalars = {"loss": 0.3, "steps": 2.0}
    update = Update({"model": {"w": torch.ones(3)}}, scalars, site="a", examples=77)
    sent, _ = private().on_client(update, State(), 0)
    assert sent.examples == 1
    assert "loss" not in sent.scalars


@pytest.mark.parametrize(("sampling", "rate"), [("fixed", 1.0), ("poisson", 0.5)])
def test_participation_counts_only_where_it_is_drawn_in_secret(sampling: str, rate: float) -> None:
    found = private("federation.fraction=0.5", f"federation.sampling={sampling}")
    assert found.event == gaussian_event(1.0, rate)


@pytest.mark.parametrize("said", [False, True])
def test_models_go_to_wandb_only_when_that_was_said(said: bool) -> None:
    told: list[Any] = []
    folder = SimpleNamespace(write_cost=lambda _: None)
    wandb = SimpleNamespace(log_checkpoints=told.append)
    reporter: Any = SimpleNamespace(folder=folder, finish=lambda: None, wandb=wandb)
    settings = compose(["wandb.artifacts=true"] if said else [], SCHEMA)
    meter: Any = None
    finish(reporter, settings, meter)
    assert told == ([folder] if said else [])


def test_the_reading_of_the_attack_table_is_what_the_table_says() -> None:
    rows = re.findall(r"^\| (\w+) \|((?: [\d.]+ \(\d\) \|){7})$", text_of("hardening"), re.MULTILINE)
    rules = [f"{rule}" for rule in get_args(combine.Rule)]
    cells = {attack: dict(zip(rules, re.findall(r"([\d.]+) \((\d)\)", row), strict=True)) for attack, row in rows}
    dice = {attack: {rule: float(value) for rule, (value, _) in row.items()} for attack, row in cells.items()}
    named = {(attack, rule) for attack, row in cells.items() for rule, (_, count) in row.items() if count == "2"}
    attacks = [attack for attack in dice if attack != "none"]
    assert len(attacks) == 6
    assert min(dice["none"], key=dice["none"].get) == "krum"
    assert all(value >= dice["none"]["mean"] - 4 for value in dice["none"].values())
    assert (dice["none"]["krum"], dice["none"]["mean"]) == (77.1, 80.9)
    assert (dice["scaling"]["mean"], dice["label_flip"]["mean"]) == (2.8, 12.5)
    assert (dice["scaling"]["norm_bound"], dice["scaling"]["geometric_median"]) == (82.2, 78.7)
    assert (dice["label_flip"]["norm_bound"], dice["label_flip"]["geometric_median"]) == (27.9, 9.0)
    assert min(dice[attack][rule] for attack in attacks for rule in ("median", "trimmed_mean")) == 72.5
    assert min(dice[attack]["multi_krum"] for attack in attacks) == 80.2
    assert named == {("scaling", rule) for rule in rules if rule != "mean"} | {("collusion", "multi_krum")}
