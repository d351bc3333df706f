"""An independent counter: every byte that left a site is in audit.csv, and every byte that came to one in sent.csv."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fedseg.federation.flower.client import SiteClient
from fedseg.federation.flower.envelope import Envelope
from fedseg.federation.flower.held import Held
from fedseg.privacy.masked import GROUP
from fedseg.reporting.folder import RunFolder
from tests.test_across import SITES, across, grid_of
from tests.tiers import every

CONSENT = "model_scored_elsewhere: true\nscores_others: true\n"
RUNS = {
    "introductions": ["algorithm=feddg"],
    "publications": ["algorithm=iopfl", "data.unseen=[site_02]"],
    "consultations": ["algorithm=fedavg", "privacy.aggregation=masked", "federation.rounds=1"],
    "pseudonyms": ["algorithm=fedbn", "deployment.case_scores=pseudonyms", "compression.cast=float16"],
    "visits": ["algorithm=ditto", "evaluation.cross_sites=true", "federation.rounds=1"],
    "refusals": ["algorithm=fedavg"],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", every(RUNS, ["publications", "visits"]))
def test_the_audit_tells_every_byte_that_passed(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed: Counter[str] = Counter()
    came: Counter[str] = Counter()
    lost: list[SiteClient] = []
    answer = SiteClient.answer

    def counted(self: SiteClient, envelope: Envelope) -> Envelope:
        if kind == "refusals" and self.site == "site_01" and '"kind":"train","round":2' in envelope.text and not lost:
            lost.append(self)
            self._held = Held()  # as another worker has it
        came["" if '"kind":"hello"' in envelope.text else self.site] += len(envelope.text.encode()) + len(envelope.data)
        found = answer(self, envelope)
        if kind == "refusals" and self.site == "site_02" and '"kind":"train"' in envelope.text:
            found = Envelope(found.text, found.data[: len(found.data) // 2])  # a part of it is lost
        if kind == "refusals" and self.site == "site_03" and '"round":2' in envelope.text:
            found = Envelope(found.text[:-9], found.data)  # its signature is spoiled
        passed[self.site] += len(found.text.encode()) + len(found.data)
        return found

    monkeypatch.setattr(SiteClient, "answer", counted)
    (tmp_path / "terms.yaml").write_text(CONSENT)
    grid: Any = grid_of(tmp_path / "sites", terms_file=tmp_path / "terms.yaml")
    run: RunFolder = across(tmp_path, *RUNS[kind], grid=grid)
    audit = run.audit()
    assert audit.groupby("site")["bytes"].sum().to_dict() == dict(passed)
    assert set(passed) == set(SITES)
    sent = run.sent()
    assert sent.groupby("site")["bytes"].sum().to_dict() == dict(came)
    again = sent.query("task == 'train' and round == 2")  # the model came with the validation of round 1
    assert set(again.loc[again["held"] > 0, "site"]) == set(again["site"])
    assert len(again) == again["site"].nunique() + len(lost)
    assert {"greet", "train", "evaluate"} <= set(audit["task"])
    assert {"(greeting)", "(numbers)", "(scores)", "(form)"} <= set(audit["group"])
    expected = {
        "introductions": "introduce",
        "publications": "publish",
        "consultations": "consult",
        "visits": "publish",
    }
    assert expected.get(kind, "train") in set(audit["task"])
    if kind == "consultations":  # the ledger tells of masked rows, too
        entries = [json.loads(line) for line in (run.path / "ledger.jsonl").read_text().splitlines()]
        sent = [set(told["sent"]) for entry in entries if entry["what"] == "train" for told in entry["sites"].values()]
        assert len(sent) == len(SITES)
        assert all(GROUP in groups and "model" not in groups for groups in sent)
    if kind == "refusals":
        assert {"(unread)", "(lacks)"} <= set(audit["group"])
        assert (run.events()["event"] == "refused").sum() >= 3
