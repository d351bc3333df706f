"""Documents made from run folders: what they show is what the runs say, and what is not true is refused."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path

import pytest
import yaml

from fedseg.datamodules.findings import COLUMNS, Finding, as_rows
from fedseg.launch import evidence
from fedseg.launch.results import CLAIM, MARKS, Sources, rewritten, run
from fedseg.reporting import ReportingError
from fedseg.reporting.compare.design import methods_text
from fedseg.reporting.compare.options import Options
from fedseg.reporting.folder import RunFolder
from tests.run_folders import write_run

ROOT = Path(__file__).parent.parent
SITES = {"site_01": 24, "site_02": 24, "site_03": 24}


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of three methods; the personal model gains at two sites and loses at the third."""
    place = tmp_path_factory.mktemp("results")
    effects = {("personal", "site_01"): 0.1, ("personal", "site_02"): 0.1, ("personal", "site_03"): -0.1}
    for seed in (0, 1):
        for name, own in (("fedavg", {}), ("ditto", effects), ("local", {("personal", ""): -0.2})):
            options = ["data.n_sites=3", "data.split_seed=5", "federation.rounds=4"]
            write_run(place / "runs" / "planted" / f"{name}-{seed}", name, seed, *options, sites=SITES, effects=own)
    return place


@pytest.fixture(scope="module")
def sources(at: Path) -> Sources:
    return Sources(at)


def document(*marks: str) -> str:
    return "".join(f"<!-- from runs: runs/planted {mark} -->\nold\n<!-- end -->\n" for mark in marks)


def made(sources: Sources, *marks: str) -> str:
    return rewritten(document(*marks), sources.at / "text.md", sources)


@pytest.mark.slow
def test_a_document_is_made_from_its_runs_and_stays_as_it_is_when_made_again(at: Path, sources: Sources) -> None:
    marks = ["command", "facts", "patients", "scores", "answer", "against='fedavg global'", "figure=gain:figures/g.png"]
    text = "# Prose stays\n" + made(sources, *marks)
    assert "old" not in text
    assert "algorithm=METHOD seed=SEED data=phantom" in text
    assert "data.split_seed=5" in text
    assert "federation.rounds=4" in text
    assert "3 methods; 6 runs; 2 seeds; 3 sites; 27 patients, 27 test cases" in text
    assert "All seeds have the same split" in text
    assert "| site_01 | 24 | 10 | 5 | 9 |" in text
    assert "ditto personal: " in text
    assert "above at 2 of 3 sites (site_01 +" in text
    assert str(at) not in text
    assert (at / "figures" / "g.png").stat().st_size > 1000
    assert not (at / "figures" / "g.svg").exists()
    assert rewritten(text, at / "text.md", sources) == text


def test_seeds_that_change_the_split_are_said_to_do_so(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / "runs" / "planted" / f"fedavg-{seed}", "fedavg", seed, sites=SITES)
    sources = Sources(tmp_path)
    assert "Seeds also change the split." in made(sources, "facts")
    told = methods_text(sources.analysis(tmp_path / "runs" / "planted", Options()))[0]
    assert " No patient is cut by a split." in told
    assert told.endswith("the split. A test patient of one seed may have been a validation patient of another.")


def test_patients_and_cases_are_told_apart_and_unknown_patients_are_marked(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "runs" / "planted" / "fedavg-0", "fedavg", sites={"a": 24, "b": 24}, images=3)
    told = made(Sources(tmp_path), "patients")
    assert "| a | 8 (24) |" in told
    write_run(tmp_path / "runs" / "planted" / "fedavg-0", "fedavg", sites={"a": 24, "b": 24})
    finding = {"severity": "warning", "site": "b", "case": "", "kind": "patients unknown", "detail": ""}
    RunFolder(folder.path).write_findings([finding], tuple(finding))
    sources = Sources(tmp_path)
    told = made(sources, "patients")
    assert "| a | 24 |" in told
    assert "| b * | 24 |" in told
    assert "each image counts as one" in told
    text = methods_text(sources.analysis(tmp_path / "runs" / "planted", Options()))[0]
    assert "No known patient is cut by a split; at b patients are unknown, and each image counts as one." in text
    assert "No patient is cut" not in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "claim",
    [
        "ditto personal above fedavg global at 2 of 3 sites",
        "fedavg global above local personal at 3 of 3 sites",
        "ditto personal above\nlocal personal on average",
        "ditto global above local personal at 3 of 3 sites",
    ],
)
def test_a_true_claim_passes(at: Path, sources: Sources, claim: str) -> None:
    text = f"<!-- true of runs: runs/planted: {claim} -->\nA sentence.\n"
    assert rewritten(text, at / "text.md", sources) == text


@pytest.mark.parametrize(
    ("claim", "told"),
    [
        ("ditto personal above fedavg global at 3 of 3 sites", "above at 2 of 3 sites"),
        ("local personal above fedavg global on average", "is not what the runs say: −"),
        ("ditto personal above fedavg global at every site", "is no claim; write: MODEL above MODEL at N of M sites"),
        ("apfl personal above fedavg global on average", "no model is called 'apfl personal'; there are ditto global"),
    ],
)
def test_a_claim_that_is_not_true_is_refused(at: Path, sources: Sources, claim: str, told: str) -> None:
    with pytest.raises(ReportingError, match=r"text\.md: ") as error:
        rewritten(f"<!-- true of runs: runs/planted: {claim} -->", at / "text.md", sources)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("mark", "told"),
    [
        ("table", "'table' is nothing that can be made from runs; there are facts, patients"),
        ("scores=5", "'scores=5' is nothing"),
        ("figure=gain:g.svg", "figures are PNG files; call it g.png"),
        ("figure=pie:g.png", "these runs have no plot 'pie'; there are gain"),
        ("scores metric=dise", "dise"),
    ],
)
def test_a_mark_that_asks_for_nothing_is_refused(sources: Sources, mark: str, told: str) -> None:
    with pytest.raises(ReportingError, match="from runs: runs/planted") as error:
        made(sources, mark)
    assert told in str(error.value)


def test_a_mark_without_an_end_is_refused(at: Path, sources: Sources) -> None:
    with pytest.raises(ReportingError, match="lacks its '<!-- end -->'"):
        rewritten("<!-- from runs: runs/planted scores -->\n", at / "text.md", sources)


@pytest.mark.slow
def test_check_changes_nothing_and_fails_where_a_document_is_not_what_its_runs_say(at: Path) -> None:
    path = at / "checked.md"
    path.write_text(document("scores"), encoding="utf-8")
    with pytest.raises(ReportingError, match=r"checked\.md is not what its runs say; make it anew: python -m"):
        run([str(path), f"at={at}", "check=true"])
    assert "old" in path.read_text(encoding="utf-8")
    assert run([str(path), f"at={at}"]) == 0
    assert run([str(path), f"at={at}", "check=true"]) == 0


def test_a_checkpoint_may_be_chosen(sources: Sources) -> None:
    assert "last round;" in made(sources, "scores checkpoint=last")
    assert "best round;" in made(sources, "scores")


@pytest.mark.exhaustive
def test_the_page_of_all_methods_is_what_its_packed_scores_say() -> None:
    assert run([str(ROOT / "docs" / "benchmark.md"), "check=true"]) == 0


@pytest.mark.parametrize("name", ["README.md", "docs/results.md", "docs/benchmark.md"])
def test_the_documents_marks_can_be_read(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert MARKS.specs(text, Path(name))
    assert text.count("<!-- true of runs:") == len(CLAIM.findall(text))


def test_data_and_methods_are_told_from_settings_and_counts(at: Path, sources: Sources) -> None:
    told = " ".join(methods_text(sources.analysis(at / "runs" / "planted", Options())))
    for part in (
        "3 sites, 72 patients, 72 cases",
        "Outlined: disc, cup.",
        "All seeds have the same split",
        "Network: unet with encoder",
        "Optimiser: adam, learning rate 0.001",
        "Methods: ditto, fedavg, local; 6 runs, seeds 0, 1.",
        "4 rounds of 10 local steps a site.",
        "margin 2 points",
        "To be written by the authors",
    ):
        assert part in told, part


def test_what_runs_differ_in_is_not_told_as_shared(tmp_path: Path) -> None:
    for name, rate in (("fedavg", "0.001"), ("ditto", "0.002")):
        write_run(tmp_path / name, name, 0, f"training.lr={rate}", sites=SITES)
    told = " ".join(methods_text(Sources(tmp_path).analysis(tmp_path, Options())))
    assert "Optimiser: adam, batches of" in told


# --- packed scores ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_packed_scores_say_what_their_runs_say(at: Path, sources: Sources, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    file = tmp_path / "docs" / "planted.tar.xz"
    assert evidence.main([str(file), str(at / "runs")]) == 0
    assert file.read_bytes() == evidence.pack(at / "runs", "dice")
    marks = ["command", "facts", "patients", "scores", "answer", "against='fedavg global'", "figure=gain:g.png"]
    text = document(*marks).replace("runs/planted", "planted.tar.xz/planted")
    told = rewritten(text, tmp_path / "docs" / "text.md", Sources(tmp_path / "elsewhere"))
    assert told.replace("planted.tar.xz/planted", "runs/planted") == made(sources, *marks)
    claim = "<!-- true of runs: planted.tar.xz/planted: ditto personal above fedavg global at 3 of 3 sites -->"
    with pytest.raises(ReportingError, match="above at 2 of 3 sites"):
        rewritten(claim, tmp_path / "docs" / "text.md", Sources(tmp_path))


def test_packed_scores_name_no_place_and_hold_scores_only(tmp_path: Path) -> None:
    settings = ["data=folder", f"data.root={tmp_path}/hospital/images"]
    folder = write_run(tmp_path / "runs" / "fedavg-0", "fedavg", 0, *settings, sites=SITES)
    unknown, other = (Finding(kind, "is odd", f"look at {tmp_path}", "a", file=f"{tmp_path}/a") for kind in
                      ("patients unknown", "lossy mask"))  # fmt: skip
    folder.write_findings(as_rows([unknown, other]), COLUMNS)
    file = tmp_path / "scores.tar.xz"
    assert evidence.main([str(file), str(tmp_path / "runs")]) == 0
    evidence.unpack(file, tmp_path / "out")
    kept = {path.name: path for path in (tmp_path / "out" / "fedavg-0").iterdir()}
    assert set(kept) == {"config.yaml", "findings.csv", "metrics.csv", "splits.csv", "summary.csv"}
    assert not [name for name, path in kept.items() if str(tmp_path) in path.read_text(encoding="utf-8")]
    config = yaml.safe_load(kept["config.yaml"].read_text(encoding="utf-8"))
    assert (config["output"], config["data"]["root"]) == ("fedavg-0", "images")
    packed = RunFolder(kept["metrics.csv"].parent)
    assert packed.findings() == [{"kind": "patients unknown", "site": "a"}]
    scores = packed.scores()
    assert set(scores["metric"]) == {"dice"}
    assert set(scores["checkpoint"]) == {"last", "best"}


def test_what_no_comparison_would_take_is_not_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "runs" / "fedavg-0", "fedavg", sites=SITES, finished=False)
    assert evidence.main([str(tmp_path / "scores.tar.xz"), str(tmp_path / "runs")]) == 2
    assert "fedavg-0: not finished; go on with: python train.py output=" in capsys.readouterr().err
    assert not (tmp_path / "scores.tar.xz").exists()
    assert evidence.main(["scores.zip", str(tmp_path / "runs")]) == 2
    assert "write: python -m fedseg.launch.evidence FILE.tar.xz DIR [metric=dice]" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../run/config.yaml", "/run/config.yaml", "link"])
def test_a_file_that_would_write_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / "scores.tar.xz"
    with tarfile.open(file, "w:xz") as archive:
        entry = tarfile.TarInfo(name)
        entry.type = tarfile.SYMTYPE if name == "link" else tarfile.REGTYPE
        entry.linkname = "/etc" if name == "link" else ""
        archive.addfile(entry, io.BytesIO())
    with pytest.raises(ReportingError, match="is no file of a run"):
        evidence.unpack(file, tmp_path / "out")
    file.write_bytes(b"no archive")
    with pytest.raises(ReportingError, match=r"scores\.tar\.xz cannot be read"):
        evidence.unpack(file, tmp_path / "out")


@pytest.mark.slow
def test_gains_under_several_conditions_are_those_of_each(at: Path, tmp_path: Path) -> None:
    for name, effect in (("much", 0.2), ("nothing", 0.0)):
        for seed in (0, 1, 2):
            write_run(tmp_path / "runs" / name / f"fedavg-{seed}", "fedavg", seed, "data.split_seed=5")
            effects = {("personal", ""): effect}
            write_run(tmp_path / "runs" / name / f"fedbn-{seed}", "fedbn", seed, "data.split_seed=5", effects=effects)
    marks = ["gains='fedavg global'", "gains_figure='fedavg global:figures/gains.png'"]
    text = document(*marks).replace("runs/planted", "runs")
    told = rewritten(text, tmp_path / "text.md", Sources(tmp_path))
    assert "| against fedavg global | much | nothing |" in told
    row = re.search(r"\| fedbn personal \| \+(?P<much>[\d.]+) ✱ \(.*?\) \| (?P<nothing>\S+) \(", told)
    assert row is not None
    each = {
        name: rewritten(
            document("against='fedavg global'").replace("runs/planted", f"runs/{name}"),
            tmp_path / "text.md",
            Sources(tmp_path),
        )
        for name in row.groupdict()
    }
    assert f"fedbn personal: +{row['much']} Dice" in each["much"]
    assert f"fedbn personal: {row['nothing']} Dice" in each["nothing"]
    assert (tmp_path / "figures" / "gains.png").stat().st_size > 1000
    with pytest.raises(ReportingError, match="holds no folders of runs"):
        rewritten(
            document(marks[0]).replace("runs/planted", "runs/much/fedavg-0"), tmp_path / "t.md", Sources(tmp_path)
        )
