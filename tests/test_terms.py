"""A site's own terms: read from its file, held against what a run asks for, and kept whatever a server does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from flwr.app import Message

from fedseg.configs.compose import ConfigError, as_yaml, compose
from fedseg.federation.contract import VISITING, EvaluateTask, QueryTask, Task
from fedseg.federation.engine import RoundError
from fedseg.federation.flower.client import RefusedError, SiteClient
from fedseg.federation.flower.envelope import Envelope
from fedseg.federation.flower.records import MOST_ENTRIES, Answer, Facts, Question, oversized, pack, unpack
from fedseg.federation.heterogeneity import LABELS
from fedseg.federation.schedule import Schedule
from fedseg.federation.state import State
from fedseg.federation.terms import Terms
from fedseg.launch.experiment import Experiment
from fedseg.launch.run import execute
from fedseg.launch.settings import SCHEMA
from fedseg.launch.sites.site import Local, Opener
from fedseg.launch.sites.terms import check_terms, read_terms, sites_behind_a_mean
from fedseg.privacy.masked import Masked
from fedseg.reporting.crossing import matrix
from fedseg.reporting.folder import RunFolder
from tests.test_across import SITES, SMALL, across, grid_of
from tests.tiers import firsts
from tests.tiny_run import phantom_run
from tests.world import simulate

MASKED = ("algorithm=fedavg", "privacy.aggregation=masked")
PRIVATE = ["algorithm=fedavg", "privacy.mechanism=patient", "model.norm=group"]
CONSENT = {"model_scored_elsewhere": True, "scores_others": True}


def written(path: Path, terms: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dict(terms)))
    return path


def grid_with(folder: Path, terms: Mapping[str, Mapping[str, Any]]) -> Any:
    """Sites, some of which have terms."""
    grid = grid_of(folder)
    for number, site in enumerate(SITES):
        if site in terms:
            grid.apps[number + 1] = grid_of(
                folder, [site], terms_file=written(folder / f"{site}.yaml", terms[site])
            ).apps[1]
    return grid


# -------------------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("least_site: 3", "unknown key 'least_site'; did you mean 'least_sites'"),
        ("masked: yes please", "masked=yes please should be"),
        ("least_sites: 0", "least_sites=0"),
        ("least_sites: three", "least_sites=three should be"),
        ("max_epsilon: -1", "max_epsilon=-1"),
        ("max_delta: 1", "max_delta=1"),
        ("views: [global, persnal]", "write views=.*personal"),
        ("masked: true\nmasked: false", "masked"),
        ("- least_sites", "write lines such as 'least_sites: 3'"),
        ("methods: [${oc.env:HOME}]", "cannot be read|refers to something"),
        ("a: &x 1", "cannot be read"),
        ("\x00", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_meant_so_is_refused(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "terms.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=told) as error:
        read_terms(path)
    assert str(path) in str(error.value)


def test_terms_are_read_as_they_were_written(tmp_path: Path) -> None:
    told = {"least_sites": 3, "masked": True, "max_epsilon": 8.0, "methods": ["fedavg", "ditto"], "case_scores": False}
    read = read_terms(written(tmp_path / "terms.yaml", told))
    assert read == Terms(3, True, 8.0, methods=("fedavg", "ditto"), case_scores=False)
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_terms(tmp_path / "empty.yaml") == Terms()
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read"):
        read_terms(tmp_path / "none.yaml")
    own = Local.read({"site": "A", "state": str(tmp_path), "terms": str(tmp_path / "terms.yaml")})
    assert own.terms() == read


# ---------------------------------------------------------------------------------------- against a run's settings

PERSONAL = "algorithm=ditto"
COMBAT, COMBAT_OFF = ["algorithm=local", "training.harmonise=combat"], ["training.harmonise=none"]
AGAINST: list[tuple[dict[str, Any], list[str], str, list[str]]] = [
    ({"least_sites": 3}, [], "take federation.min_sites=3", ["federation.min_sites=3"]),
    (
        {"least_sites": 2},
        ["federation.min_sites=3", "federation.combine=krum"],
        "take federation.order=together federation.combine=mean federation.min_sites=3",
        ["federation.combine=mean"],
    ),
    (
        {"least_sites": 2},
        ["algorithm=braintorrent", "federation.order=together", "federation.min_sites=3"],
        "peers see each other's models singly: take algorithm=fedavg federation.order=together federation.min_sites=2",
        ["algorithm=fedavg"],
    ),
    ({"masked": True}, ["algorithm=fedavg"], "take privacy.aggregation=masked", ["privacy.aggregation=masked"]),
    (
        {"max_epsilon": 4},
        ["algorithm=fedavg", "privacy.mechanism=site", "privacy.max_epsilon=3", "model.norm=group"],
        "take privacy.mechanism=patient (or sparse) and privacy.max_epsilon=4, or less",
        ["privacy.mechanism=patient"],
    ),
    (
        {"max_epsilon": 4},
        PRIVATE,
        "privacy.max_epsilon=4, or less",
        ["privacy.max_epsilon=4"],
    ),
    (
        {"max_epsilon": 4},
        [
            *[
                "algorithm=fedavg",
                "privacy.mechanism=patient",
                "model.norm=group",
                "privacy.max_epsilon=4",
                "privacy.delta=0.1",
            ]
        ],
        "take privacy.delta=1e-05",
        ["privacy.delta=1e-05"],
    ),
    ({"least_sites": 3}, COMBAT, "take federation.min_sites=3", ["federation.min_sites=3"]),
    ({"masked": True}, COMBAT, "before round 1 (introduces): take training.harmonise=none", COMBAT_OFF),
    ({"max_epsilon": 8}, COMBAT, "before round 1 (introduces): take training.harmonise=none", COMBAT_OFF),
    (
        {"masked": True},
        ["algorithm=flmrcm", "algorithm.personal=part:encoder,decoder,segmentation_head"],
        "shows the group features of each site singly (per_site): take algorithm=local",
        ["algorithm=local", "algorithm.personal=null"],
    ),
    ({"methods": ["fedavg"]}, [PERSONAL], "take algorithm=fedavg", ["algorithm=fedavg"]),
    ({"views": ["global"]}, [PERSONAL], "take a method that makes no personal models", ["algorithm=fedavg"]),
    (
        {"publishes_model": False},
        ["algorithm=iopfl", "data.unseen=[site_02]"],
        "take data.unseen=[]",
        ["data.unseen=[]"],
    ),
    (
        {"scores_others": True},
        [PERSONAL, "evaluation.cross_sites=true"],
        "model_scored_elsewhere false: take evaluation.cross_sites=false",
        ["evaluation.cross_sites=false"],
    ),
    (
        {"model_scored_elsewhere": True},
        [PERSONAL, "evaluation.cross_sites=true"],
        "scores_others false: take evaluation.cross_sites=false",
        ["evaluation.cross_sites=false"],
    ),
    (
        {**CONSENT, "masked": True},
        ["algorithm=finetune", "privacy.aggregation=masked", "evaluation.cross_sites=true"],
        "its personal model would travel bare: take evaluation.cross_sites=false",
        ["evaluation.cross_sites=false"],
    ),
    (
        {"case_scores": False},
        ["deployment.case_scores=pseudonyms"],
        "take deployment.case_scores=means",
        ["deployment.case_scores=means"],
    ),
    (
        {"label_counts": False},
        ["federation.selection=heterogeneity", "federation.fraction=0.5"],
        "take federation.select_labels=0",
        ["federation.select_labels=0"],
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("terms", "settings", "cure", "cured"), AGAINST)
def test_a_run_against_a_term_is_refused_with_a_cure_that_works(
    terms: dict[str, Any], settings: list[str], cure: str, cured: list[str], tmp_path: Path
) -> None:
    own = read_terms(written(tmp_path / "terms.yaml", terms))

    def check(*more: str) -> None:
        check_terms(Experiment(compose([*SMALL, *settings, *more], SCHEMA)), "site_01", own)

    with pytest.raises(ConfigError, match="site 'site_01' has terms against this run") as error:
        check()
    assert cure in str(error.value)
    check(*cured)


def test_every_term_has_a_case_above() -> None:
    named = {key for terms, *_ in AGAINST for key in terms} | {"max_delta"}
    assert named == {field.name for field in fields(Terms)}


@pytest.mark.parametrize(
    ("knobs", "behind"),
    [
        ({"min_sites": 5}, 5),
        ({"min_sites": 5, "combine": "krum"}, 1),
        ({"min_sites": 5, "combine": "multi_krum"}, 4),
        ({"min_sites": 5, "combine": "trimmed_mean", "hostile": 2}, 1),
        ({"min_sites": 5, "order": "cyclic"}, 1),
        ({"min_sites": 5, "order": "random"}, 1),
    ],
)
def test_how_many_sites_are_behind_a_mean(knobs: dict[str, Any], behind: int) -> None:
    assert sites_behind_a_mean(Schedule(**knobs)) == behind


# -------------------------------------------------------------------------------------------------- across machines


@pytest.mark.slow
def test_all_sites_that_refuse_are_named_and_one_that_is_left_out_stops_nobody(tmp_path: Path) -> None:
    grid = grid_with(tmp_path, {"site_01": {"methods": ["fedavg"]}, "site_03": {"least_sites": 2}})
    with pytest.raises(RoundError, match="'site_01' has terms against this run: methods fedavg") as error:
        across(tmp_path / "one", "algorithm=fedprox", "federation.rounds=1", grid=grid)
    assert "site 'site_03' has terms against this run: least_sites 2, and these let in 1" in str(error.value)
    run = across(
        tmp_path / "two",
        *("algorithm=fedprox", "federation.rounds=1", "federation.min_sites=2", "deployment.sites=[site_02,site_03]"),
        grid=grid,
    )
    listed = yaml.safe_load((run.path / "terms.yaml").read_text())
    assert listed.keys() == {"site_02", "site_03"}
    assert listed["site_03"]["least_sites"] == 2


@pytest.mark.slow
def test_terms_hold_from_the_next_message_on_and_a_broken_file_stays_at_the_site(tmp_path: Path) -> None:
    grid = grid_with(tmp_path, {"site_01": {}})
    settings = ("algorithm=fedavg", "federation.rounds=1")
    across(tmp_path / "one", *settings, grid=grid)
    written(tmp_path / "site_01.yaml", {"masked": True})
    with pytest.raises(RoundError, match=r"take privacy\.aggregation=masked"):
        across(tmp_path / "two", *settings, grid=grid)
    written(tmp_path / "site_01.yaml", {"maskd": True})
    with pytest.raises(RoundError, match=r"an error \(ConfigError\); the site's log tells it"):
        across(tmp_path / "three", *settings, grid=grid)
    assert "did you mean 'masked'" in (tmp_path / "site_01" / "site.log").read_text()


FORBIDDEN: list[tuple[dict[str, Any], Task]] = [
    ({"publishes_model": False}, QueryTask("publish", 1, 0)),
    ({}, QueryTask("publish", 1, 0, checkpoint="best", topic=VISITING)),
    ({"model_scored_elsewhere": True}, EvaluateTask(1, 0, splits=("test",), checkpoint="best", topic=VISITING)),
    ({"views": ["global"]}, EvaluateTask(1, 0, splits=("test",), views=("personal",))),
    ({"label_counts": False}, QueryTask("introduce", 0, 0, topic=LABELS)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("terms", "task"), firsts(FORBIDDEN, 1))
def test_a_server_that_forgets_the_terms_gets_nothing(terms: dict[str, Any], task: Task, tmp_path: Path) -> None:
    """It asks without having asked for leave: the site looks at the task itself."""
    grid = grid_with(tmp_path, {"site_01": terms})
    run = across(tmp_path, "algorithm=fedavg", "federation.rounds=1", grid=grid)
    question = last_question(grid, 1)
    answer, state = asked(grid, 1, replace(question, task=task, held={}))
    assert "its terms forbid this" in answer.refusal
    assert not state.tensors
    assert run.path.exists()


@pytest.mark.parametrize("kind", ["introduce", "publish", "consult"])
def test_a_personal_model_is_given_away_where_it_was_asked_for_in_as_many_words(kind: Any, tmp_path: Path) -> None:
    """The terms look at publications; a task of another kind, on the same topic, must not do the same."""
    outcome = simulate("ditto", tmp_path, rounds=1)
    task = QueryTask(kind, 1, 0, topic=VISITING)
    (update,) = outcome.federation.transport.ask({"s0": task}, {"s0": outcome.federation.algorithm.init_server({})})
    assert bool(update.tensors) == (kind == "publish")
    assert (Terms().forbids(task) == "model_scored_elsewhere: false") == (kind == "publish")


LYING: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"masked": True}, ["privacy.aggregation=masked"], []),
    ({"methods": ["fedavg"]}, [], ["algorithm=finetune"]),
    ({"case_scores": False}, [], ["deployment.case_scores=pseudonyms"]),
    ({"least_sites": 3}, ["federation.min_sites=3"], ["federation.min_sites=2"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("terms", "promised", "asked_for"), firsts(LYING, 1))
def test_a_server_that_asks_for_something_else_than_it_promised_gets_nothing(
    terms: dict[str, Any], promised: list[str], asked_for: list[str], tmp_path: Path
) -> None:
    """The settings of the greeting pass; those of a later message do not."""
    grid = grid_with(tmp_path, {"site_01": terms})
    base = ["algorithm=fedavg", "federation.rounds=1"]
    across(tmp_path, *base, *promised, grid=grid)
    lie = as_yaml(compose([*SMALL, *base, *asked_for], SCHEMA))
    question = replace(last_question(grid, 1, kind="train"), config=lie)
    answer, state = asked(grid, 1, question)
    assert "site 'site_01' has terms against this run" in answer.refusal
    assert not state.tensors


@pytest.mark.slow
def test_a_round_of_fewer_sites_than_the_terms_say_is_refused(tmp_path: Path) -> None:
    """It is the server's word; but it has to give it, and the site signs what it was told."""
    grid = grid_with(tmp_path, {"site_01": {"least_sites": 3}})
    across(tmp_path, "algorithm=fedavg", "federation.rounds=1", "federation.min_sites=3", grid=grid)
    question = last_question(grid, 1, kind="train")
    assert question.task is not None
    assert question.task.sites == 3
    for told in (2, 0):
        answer, state = asked(grid, 1, replace(question, task=replace(question.task, sites=told)))
        assert f"(least_sites: 3, and this round is of {told or 1})" in answer.refusal
        assert not state.tensors
    alone = replace(question.task, sites=1)
    assert Terms(least_sites=3).forbids(alone, tells=False) == "", "nothing is shared"


@pytest.mark.parametrize(("stage", "message"), [
    ("keys", State(scalars={"sites": 3.0})),
    ("train", State({"sealed": {"b": torch.zeros(1), "c": torch.zeros(1)}})),
    ("reveal", State(scalars={"a": 1.0, "b": 1.0, "c": 1.0, "d": 0.0})),
])  # fmt: skip
def test_a_site_masks_for_no_sum_that_is_smaller_than_its_terms_say(stage: str, message: State) -> None:
    """Whatever the server announced before: federation.min_sites is only its word."""
    masked = Masked()
    masked.least_here = 4
    if stage != "keys":
        masked.consulted("a", "keys", State(scalars={"sites": 4.0}))
    with pytest.raises(ValueError, match=r"its terms \(least_sites: 4\) let it into no sum of 3 sites"):
        masked.consulted("a", stage, message)


@pytest.mark.slow
def test_terms_reach_the_masks_of_a_site(tmp_path: Path) -> None:
    terms = {"least_sites": 3, "masked": True}
    question = Question("hello", "0" * 32, as_yaml(compose([*SMALL, *MASKED, "federation.min_sites=3"], SCHEMA)))
    own = Local("site_01", tmp_path, terms_file=written(tmp_path / "terms.yaml", terms))
    opened: Any = Opener(own)(question, tmp_path / "run")
    assert [t.least_here for t in opened.transport.transforms] == [3]


@pytest.mark.parametrize(
    ("told", "settings"),
    [
        ("introduces", ["algorithm=harmofl", "privacy.aggregation=masked"]),
        ("per_site", [*PRIVATE, "algorithm=flmrcm", "privacy.randomness=secret"]),
    ],
)
def test_a_site_itself_refuses_what_travels_past_masks_and_noise(
    told: str, settings: list[str], tmp_path: Path
) -> None:
    """A server refuses such settings, too, unless it lies."""
    question = Question("turn", "0" * 32, as_yaml(compose([*SMALL, *settings], SCHEMA)))
    opened: Any = Opener(Local("site_01", tmp_path))(question, tmp_path / "run")
    with pytest.raises(RefusedError, match=told):
        opened.forbids(QueryTask("introduce", 0, 0))


@pytest.mark.parametrize(
    ("settings", "terms", "refused"),
    [
        ([*PRIVATE, "privacy.randomness=secret"], {}, True),
        (["algorithm=local"], {"max_epsilon": 8}, True),
        (["algorithm=local"], {}, False),
    ],
)
def test_a_private_site_scores_no_training_patient_for_anybody(
    settings: list[str], terms: dict[str, Any], refused: bool, tmp_path: Path
) -> None:
    """Scores without noise, as often as a server asks, would tell who is a training patient."""
    own = Local("site_01", tmp_path, terms_file=written(tmp_path / "terms.yaml", terms))
    config, task = as_yaml(compose([*SMALL, *settings], SCHEMA)), EvaluateTask(0, 0, splits=("val", "train"))
    answered = SiteClient("site_01", tmp_path, Opener(own)).answer(pack(Question("turn", "0" * 32, config, task=task)))
    told = (
        "its terms forbid this, whatever the run's settings say (scores of training patients would leave without noise)"
    )
    assert unpack(answered, Answer)[0].refusal == (told if refused else "")


def last_question(grid: Any, node: int, kind: str = "") -> Question:
    found = [m for m in grid.sent if m.metadata.dst_node_id == node]
    read = [unpack(Envelope.from_records(message.content), Question)[0] for message in found]
    return [q for q in read if q.task is not None and kind in ("", q.task.kind)][-1]


def asked(grid: Any, node: int, question: Question) -> Any:
    (number,) = grid.push_messages([Message(pack(question).to_records(), node, "query")])
    (reply,) = grid.pull_messages([number])
    return unpack(Envelope.from_records(reply.content), Answer)


# ---------------------------------------------------------------------------------------- every model everywhere


@pytest.mark.exhaustive
def test_with_the_consent_of_all_the_matrix_is_the_one_of_a_run_in_one_place(tmp_path: Path) -> None:
    settings = ("algorithm=ditto", "data.unseen=[site_03]", "evaluation.cross_sites=true", "evaluation.metrics=[dice]")
    run = across(tmp_path, *settings, grid=grid_with(tmp_path, dict.fromkeys(SITES, CONSENT)))
    here = execute(compose([*SMALL, *settings, f"output={tmp_path / 'here'}"], SCHEMA))
    there, wanted = matrix(run.cross_sites()), matrix(RunFolder(tmp_path / "here").cross_sites())
    pd.testing.assert_frame_equal(there, wanted, rtol=1e-9)
    assert there.notna().all(axis=None)
    assert "## Every model at every site" in (run.path / "summary.md").read_text()
    assert here.crossed is not None


@pytest.mark.slow
def test_without_consent_the_matrix_is_refused_and_the_sites_are_named(tmp_path: Path) -> None:
    settings = ("algorithm=ditto", "evaluation.cross_sites=true")
    grid = grid_with(tmp_path, {"site_02": CONSENT})
    with pytest.raises(RoundError) as error:
        across(tmp_path, *settings, grid=grid)
    told = str(error.value)
    assert "site 'site_01' has terms against this run: model_scored_elsewhere false" in told
    assert "site 'site_03' has terms" in told
    assert "site 'site_02' has terms" not in told


# -------------------------------------------------------------------------------------------------- in one place


@pytest.mark.slow
def test_in_one_place_terms_are_those_of_a_folder(tmp_path: Path) -> None:
    written(tmp_path / "terms" / "site_02.yaml", {"methods": ["fedavg"]})
    run = ("algorithm=ditto", f"deployment.terms={tmp_path / 'terms'}")
    with pytest.raises(ConfigError, match="site 'site_02' has terms against this run: methods fedavg"):
        execute(phantom_run(3, tmp_path / "run", *run))
    assert not (tmp_path / "run").exists()
    execute(phantom_run(3, tmp_path / "run", "algorithm=fedavg", run[1], "federation.rounds=1"))
    listed = yaml.safe_load((tmp_path / "run" / "terms.yaml").read_text())
    assert listed["site_02"]["methods"] == ["fedavg"]
    written(tmp_path / "terms" / "site_9.yaml", {})
    with pytest.raises(ConfigError, match=r"unknown file 'site_9.yaml'; did you mean 'site_0"):
        execute(phantom_run(3, tmp_path / "other", "algorithm=fedavg", run[1]))
    with pytest.raises(ConfigError, match=r"should be a folder with site_01\.yaml"):
        execute(phantom_run(3, tmp_path / "other", f"deployment.terms={tmp_path / 'none'}"))
    with pytest.raises(ConfigError, match=r"leave deployment.terms=null"):
        across(tmp_path / "far", run[1])


# -------------------------------------------------------------------------------------------------- greetings


@pytest.mark.parametrize("told", ["settings", "versions"])
def test_a_greeting_is_bounded(told: str) -> None:
    facts: Any = {"site": "A", "seen": True, "channels": 3, "examples": 2}
    many, long, key = {f"k{n}": "" for n in range(MOST_ENTRIES + 1)}, {"k": "x" * 70_000}, {"x" * 300: ""}
    for table in (many, long, key):
        assert told in oversized(Facts(**facts, **{told: table}))
    assert not oversized(Facts(**facts, **{told: {"k": "v"}}, terms=Terms(methods=("fedavg",))))
    assert "methods" in oversized(Facts(**facts, terms=Terms(methods=("x",) * 65)))
