"""A run's folder: every file in it, and how it survives a process that is killed at any instant.

Small files are replaced as a whole (`write_atomic`). Tables only ever grow, one `write` and `fsync` per batch of rows,
so the worst a kill can leave is a last line without its end, which readers ignore and `RunFolder.truncate` removes.
"""

import csv
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import pandas as pd
import yaml

from fedseg.common.files import PART, ends_a_line, naming, sweep_parts, write_atomic
from fedseg.common.text import cell
from fedseg.reporting import ReportingError
from fedseg.reporting.environment import Meter, describe_process, extend_environment

Row = Mapping[str, Any]

METRICS = "metrics.csv"
ROUNDS = "rounds.csv"
UPDATES = "updates.csv"
TRAFFIC = "communication.csv"
EVENTS = "events.csv"
PRIVACY = "privacy.csv"
SENT = "sent.csv"
AUDIT = "audit.csv"
CONTENTS = "audit_tensors.csv"
AUDIT_SUMMARY = "audit_summary.csv"
SPLITS = "splits.csv"
FINGERPRINTS = "fingerprints.csv"
TENSORS = "tensors.csv"
INPUTS = "inputs.json"
RUN_ID = "run-id.txt"
CONFIG = "config.yaml"
COST = "cost.json"
FINDINGS = "findings.csv"
GROUPS, GROUP_SCORES = "groups.csv", "group_scores.csv"
CROSS_SITES = "cross_sites.csv"
RATERS = "raters.csv"
SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same by libyaml, where it is there: ten times as fast
TERMS = "terms.yaml"
KEYS = "keys.yaml"

DURING_TRAINING = "round"
COLUMNS: dict[str, tuple[str, ...]] = {
    METRICS: (
        *("round", "checkpoint", "site", "seen", "split", "view", "region", "case", "metric", "value"),
        *("unit", "grid"),
    ),
    ROUNDS: ("round", "site", "task", "loss", "steps", "examples", "seconds", "loss_personal"),
    UPDATES: ("round", "site", "norm", "cosine", "cosine_others"),
    TRAFFIC: ("round", "site", "direction", "group", "bytes"),
    EVENTS: ("round", "site", "event", "detail"),
    PRIVACY: ("round", "site", "mechanism", "unit", "epsilon", "delta", "limit"),
    AUDIT: ("round", "site", "task", "group", "content", "numbers", "bytes", "transforms"),
    CONTENTS: ("round", "content", "tensor", "shape", "dtype"),
    SENT: ("round", "site", "task", "bytes", "held"),
}
SPLIT_COLUMNS = ("site", "case", "patient", "split", "labelled", "seen")
GROUP_COLUMNS = ("site", "case", "column", "value")
RATER_COLUMNS = ("site", "case", "split", "region", "dice")
FINGERPRINT_COLUMNS = ("site", "case", "image", "mask")
FOREIGN = ("event", "detail", "group", "tensor")
"""Columns for words of a site that nothing is found by, so that they may be changed to be harmless."""
NETWORK_GRID = "network"
YOUNGER: dict[str, dict[str, str | float]] = {
    METRICS: {"unit": "", "grid": NETWORK_GRID},
    ROUNDS: {"loss_personal": float("nan")},
}
"""Columns, at the end of their tables, that folders of earlier versions lack, and what was so in these."""
NEEDED = {**COLUMNS, SPLITS: SPLIT_COLUMNS, FINGERPRINTS: FINGERPRINT_COLUMNS}
# Columns that are not text. Everything else is read as text, so that a site "007" or a case "NA" keeps its name.
TYPES = {
    "round": "int64",
    "seen": "bool",
    "labelled": "bool",
    "value": "float64",
    "loss": "float64",
    "loss_personal": "float64",
    "seconds": "float64",
    "norm": "float64",
    "cosine": "float64",
    "cosine_others": "float64",
    "steps": "float64",
    "examples": "float64",
    "bytes": "int64",
    "held": "int64",
    "numbers": "int64",
    "epsilon": "float64",
    "delta": "float64",
    "limit": "float64",
}

README = """# The folder of one training run

| file | what it holds |
|---|---|
| `config.yaml` | every setting of the run, resolved; `python train.py` with these settings repeats it |
| `environment.json` | seeds; for each process that worked on the run: command, versions, machine, git revision |
| `cost.json` | for each of them, when it ended: wall and CPU seconds, peak memory |
| `splits.csv` | which case of which patient served for training, validation and testing, at each site |
| `findings.csv` | what was noticed in the data when the run began: warnings and notes, each with its cure |
| `groups.csv`, `group_scores.csv` | if asked for: groups of patients, and their mean scores but for small groups |
| `raters.csv` | if cases have masks of several raters: how far these agree, case by case |
| `fingerprints.csv` | digests of the files of every case: the run goes on, and is scored again, on these bytes only |
| `.lock` | held by the process that works on the run, so that no second one does |
| `inputs.json` | what the network takes and answers: channels, height, width, regions; whether images had 8 bit |
| `tensors.csv` | every tensor of the network: parameter, running statistic or counter; averaged, kept or constant |
| `summary.md`, `summary.csv` | the result: mean scores per site and view (written when the run ends) |
| `metrics.csv` | every score: one row per round, site, split, view, region, case and metric |
| `rounds.csv` | loss, optimiser steps of all models that a step trains, examples and seconds per round and site |
| `updates.csv` | how long each site's update was and where it pointed, in every round; absent if updates are hidden |
| `communication.csv` | bytes down (from server or peer) and up (to the server) per round, site and group of tensors |
| `events.csv` | what was unusual: sites that were absent or whose update was refused |
| `audit.csv` | what left each site, every time: group of tensors or of numbers, size, and the transforms it passed |
| `audit_tensors.csv` | name, shape and type of everything in a group, once for each `content` in `audit.csv` |
| `audit_summary.csv` | the same by site and group: how often, how much (written when the run ends) |
| `sent.csv` | across machines: every message to a site, its bytes, and those of tensors that it held and was not sent |
| `privacy.csv` | present if differential privacy was on: epsilon at delta spent after each round |
| `plots/` | learning curves |
| `ledger.jsonl` | what each site was shown and sent, as hashes in a chain: `python -m fedseg.launch.verify FOLDER` |
| `keys.yaml` | across machines: the public key that each site's name belongs to |
| `terms.yaml` | every site's own terms, in which it took part |
| `cross_sites.csv` | every site's best model, and the global one, at every site (`evaluation.cross_sites=true`) |
| `overlays/` | per site the worst, median and best test case with the contours of truth and predictions |
| `predictions/` | if asked for: the best models' masks of test cases, SITE/VIEW/CASE_REGION, as `predict.py` has them |
| `checkpoints/` | models of the last round, from which the run goes on, and of the best one; `index.json` tells which |
| `run-id.txt`, `sites/` | present if Flower carried the run: its name at the sites; what they keep, in a simulation |
| `wandb/`, `wandb-id.txt` | present if W&B was on; `wandb sync wandb/offline-run-*` uploads an offline run |
| `csv/`, `tensorboard/`, `mlflow.db` | of Lightning's loggers, if `loggers` named them |

*View*: which model answers: `global` is shared by all sites, `personal` is a site's own, `adapted` was fitted to an
unseen site's images without labels; `own-statistics` is the global model with normalisation statistics of an unseen
site's images, taken without labels; `entropy` is that model after it learnt to be sure of these images; `encoder` is
the encoder of pre-training. *Seen*: the site took part in training; an unseen site only tests. *Checkpoint* in
`metrics.csv`: `round` for scores during training (validation); `last` and `best` for the two checkpoints scored at the
end; `best` is chosen on validation cases, never on test cases.

In the summary a case's score is the mean over the regions that it shows, a site's score is the mean over the cases
that show any (`cases`, of `tested`), and a mean over sites counts each site once. Rows of `metrics.csv` with region
`mean` and no case hold a site's mean itself. Undefined scores (empty or `nan`: the case does not show the region) do
not count; only `invented` is for those cases.

A run that was stopped continues with `python train.py ... output=THIS_FOLDER resume=true`.
"""


def file_name(name: str) -> str:
    """A file name for any site: characters that a file system may refuse become `%XX`, distinct names stay distinct."""
    return re.sub(r'[\x00-\x1f/\\:*?"<>|%]', lambda match: f"%{ord(match.group()):02X}", name)


def pseudonym(case: str, patient: str) -> str:
    """A case's name at the server of sites on machines of their own, from keyed hashes of it and of its patient."""
    return f"{patient}.{case}" if patient else case


def patient_of(name: str) -> str:
    """The patient whom a pseudonym tells; the case itself, where patients are unknown."""
    return name.partition(".")[0]


def flattened(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Sections taken apart: dotted key -> value; a mapping that is a value (regions) stays one."""
    rows: dict[str, Any] = {}
    for key, value in settings.items():
        rows |= (
            {f"{key}.{name}": entry for name, entry in value.items()} if isinstance(value, Mapping) else {key: value}
        )
    return rows


def complete_lines(path: Path) -> list[str]:
    """The lines of a table with their ends, [] if there is no file. A half-written last line is left out."""
    if not path.exists():
        return []
    content = path.read_bytes()
    return list(io.StringIO(content[: content.rfind(b"\n") + 1].decode("utf-8")))


class RunFolder:
    """One run's folder. Every write is atomic (whole files) or append-only (tables)."""

    def __init__(self, path: Path | str) -> None:
        """Name the folder; nothing is read or written yet.

        Args:
            path: The run's folder (`output=`).
        """
        self.path = Path(path)
        self.config_path = self.path / CONFIG
        self.environment_path = self.path / "environment.json"
        self.cost_path = self.path / COST
        self.checkpoints = self.path / "checkpoints"
        self.plots = self.path / "plots"
        self.overlays = self.path / "overlays"
        self.predictions = self.path / "predictions"
        self.summary_path = self.path / "summary.csv"
        self.wandb_id_path = self.path / "wandb-id.txt"
        self._contents: set[str] | None = None
        self._held: IO[str] | None = None  # locked while a process works on the run
        self._made: list[Path] = []  # the folder and its parents, as far as they were made for this run

    @classmethod
    def create(cls, path: Path | str, *, resume: bool) -> "RunFolder":
        """Make or reopen a run's folder.

        Args:
            path: The run's folder.
            resume: Continue the run that the folder holds.

        Raises:
            ReportingError: Without `resume` if the folder holds anything; with it if the folder holds no run.
        """
        folder = cls(path)
        if folder.path.exists() and not folder.path.is_dir():
            raise ReportingError(f"output={folder.path} is a file; choose a folder.")
        if resume and not folder.holds_run:
            raise ReportingError(
                f"{folder.path} holds no run to resume (no config.yaml); start it without resume=true."
            )
        if not resume and folder.holds_run:
            raise ReportingError(
                f"{folder.path} already holds a run; continue it with resume=true or choose another output=."
            )
        if not resume and folder._foreign_files():
            names = ", ".join(folder._foreign_files()[:3])
            raise ReportingError(f"{folder.path} is not empty and holds no run ({names}, ...); choose another output=.")
        folder._made = [place for place in (folder.path, *folder.path.parents) if not place.exists()]
        folder.path.mkdir(parents=True, exist_ok=True)
        folder._lock()
        sweep_parts(folder.path)
        return folder

    @contextmanager
    def beginning(self) -> Iterator[None]:
        """Until the folder holds a run: one that is refused or interrupted meanwhile leaves nothing behind."""
        try:
            yield
        except BaseException:
            if not self.holds_run:
                self._withdraw()
            raise

    def _withdraw(self) -> None:
        """Take away what was made for a run that did not begin; whatever else lies there stays."""
        if self._held is not None:
            (self.path / ".lock").unlink(missing_ok=True)
            self._held.close()
        (self.path / RUN_ID).unlink(missing_ok=True)
        for place in (self.checkpoints, *self._made):
            with suppress(OSError):  # not there, or not empty
                place.rmdir()

    def _lock(self) -> None:
        """Hold the folder for as long as this process lives: two processes would write every row twice.

        Raises:
            ReportingError: Another process works here.
        """
        if sys.platform == "win32":
            return
        import fcntl

        self._held = (self.path / ".lock").open("a")
        try:
            fcntl.lockf(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise ReportingError(f"{self.path}: another process works on this run; wait for it, or end it") from error
        except OSError:
            pass  # a file system without locks

    @property
    def holds_run(self) -> bool:
        """Whether a run was started in this folder."""
        return self.config_path.is_file()

    def folds(self) -> list["RunFolder"]:
        """Runs in folders of this one, by name: the folds of leave-one-site-out, once they began."""
        return [RunFolder(path.parent) for path in sorted(self.path.glob(f"*/{CONFIG}"))]

    def _foreign_files(self) -> list[str]:
        """What stands in the folder, but for what a process leaves that was killed before its first write was done."""
        if not self.path.exists():
            return []
        files = [path for path in self.path.iterdir() if not PART.fullmatch(path.name)]
        ours = {self.checkpoints} if self.checkpoints.is_dir() and not any(self.checkpoints.iterdir()) else set()
        return sorted(p.name for p in files if p not in {*ours, self.wandb_id_path, self.path / ".lock"})

    def write_config(self, yaml_text: str) -> None:
        """Save the resolved configuration; from here on the folder holds a run."""
        write_atomic(self.config_path, yaml_text)
        write_atomic(self.path / "README.md", README)

    def read_config(self) -> str:
        """The configuration as saved.

        Raises:
            ReportingError: If the folder holds no run.
        """
        if not self.holds_run:
            raise ReportingError(f"{self.path} holds no run (no config.yaml).")
        with _readable(self.config_path):
            return self.config_path.read_text(encoding="utf-8")

    def write_environment(self, seeds: Mapping[str, int]) -> None:
        """Record seeds and this process: versions, machine, git revision, command; a resumed run lists each."""
        with _readable(self.environment_path):
            before = self.environment_path.read_text(encoding="utf-8") if self.environment_path.exists() else None
            text = extend_environment(before, seeds, describe_process())
        write_atomic(self.environment_path, text)

    @property
    def has_checkpoint(self) -> bool:
        """Whether models were saved."""
        return (self.checkpoints / "index.json").is_file()

    def settings(self) -> dict[str, Any]:
        """The configuration, one level deep: dotted key to value.

        Raises:
            ReportingError: If the folder holds no run, or its configuration cannot be read.
        """
        try:
            return flattened(yaml.load(self.read_config(), Loader=SafeLoader))
        except (yaml.YAMLError, AttributeError) as error:
            why = " ".join(str(error).split())[:200]
            raise ReportingError(f"{self.config_path} is damaged ({why}); restore it, or start another run") from error

    def write_cost(self, meter: Meter) -> None:
        """Add what this process used to those that worked on the run before."""
        write_atomic(self.cost_path, json.dumps([*self.costs(), meter.read()], indent=2) + "\n")

    def costs(self) -> list[dict[str, Any]]:
        """cost.json: one entry per process that came to its end; empty if there is none."""
        if not self.cost_path.exists():
            return []
        with _readable(self.cost_path):
            costs = json.loads(self.cost_path.read_text(encoding="utf-8"))
            if not isinstance(costs, list) or not all(isinstance(entry, dict) for entry in costs):
                raise ValueError("it should be a list of what processes used")
            return costs

    def processes(self) -> int:
        """How many processes worked on the run."""
        if not self.environment_path.exists():
            return 0
        with _readable(self.environment_path):
            return len(json.loads(self.environment_path.read_text(encoding="utf-8"))["processes"])

    def write_splits(self, rows: Sequence[Row]) -> None:
        """Save the split of every case; all rows have the columns of the first."""
        columns = tuple(rows[0]) if rows else SPLIT_COLUMNS
        self._write(SPLITS, rows, columns)

    def write_groups(self, rows: Sequence[Row]) -> None:
        """Save which case belongs to which group of patients (groups.csv); no file where there are no groups."""
        if rows:
            self._write(GROUPS, rows, GROUP_COLUMNS)

    def groups(self) -> pd.DataFrame:
        """groups.csv as a table of words; empty if there is none."""
        rows = list(csv.DictReader(complete_lines(self.path / GROUPS)))
        return pd.DataFrame(rows, columns=list(GROUP_COLUMNS))

    def write_raters(self, rows: Sequence[Row]) -> None:
        """Save how far raters agree in each case (raters.csv); no file where cases have one mask."""
        if rows:
            self._write(RATERS, rows, RATER_COLUMNS)

    def raters(self) -> pd.DataFrame:
        """raters.csv as a table; empty if there is none."""
        rows = list(csv.DictReader(complete_lines(self.path / RATERS)))
        return pd.DataFrame(rows, columns=list(RATER_COLUMNS)).astype({"dice": float})

    def write_findings(self, rows: Sequence[Row], columns: Sequence[str]) -> None:
        """Save what was noticed in the data (findings.csv); ``columns`` are those of every row."""
        self._write(FINDINGS, rows, columns)

    def findings(self) -> list[dict[str, str]]:
        """findings.csv, row by row; empty if there is none."""
        return list(csv.DictReader(complete_lines(self.path / FINDINGS)))

    def write_terms(self, terms: Mapping[str, Mapping[str, Any]]) -> None:
        """Save every site's terms (terms.yaml)."""
        write_atomic(self.path / TERMS, yaml.safe_dump(dict(terms), sort_keys=False, allow_unicode=True))

    def write_cross_sites(self, rows: Sequence[Row], columns: Sequence[str]) -> None:
        """Save how every site's model does at every site (cross_sites.csv)."""
        self._write(CROSS_SITES, rows, columns)

    def cross_sites(self) -> pd.DataFrame:
        """cross_sites.csv as a table; empty, without columns, if there is none."""
        return self._read(CROSS_SITES) if (self.path / CROSS_SITES).is_file() else pd.DataFrame()

    def write_fingerprints(self, rows: Sequence[Row]) -> None:
        """Save what tells the files of every case from others: site, case, image, mask (fingerprints.csv)."""
        self._write(FINGERPRINTS, rows, FINGERPRINT_COLUMNS)

    def write_tensors(self, rows: Sequence[Row]) -> None:
        """Save what becomes of every tensor of the network: averaged, kept, or never changed (tensors.csv)."""
        columns = tuple(rows[0]) if rows else ()
        self._write(TENSORS, rows, columns)

    def write_inputs(self, inputs: Mapping[str, Any]) -> None:
        """Save what the network takes, so that it can be built without the data (inputs.json)."""
        write_atomic(self.path / INPUTS, json.dumps(dict(inputs), indent=2) + "\n")

    def read_inputs(self) -> dict[str, Any]:
        """What the network takes.

        Raises:
            ReportingError: if the file is missing or damaged.
        """
        path = self.path / INPUTS
        try:
            inputs: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ReportingError(
                f"{path} cannot be read ({error}); train.py output={self.path} resume=true writes it again"
            ) from error
        return inputs

    def append_scores(self, rows: Iterable[Row]) -> None:
        """Append scores to metrics.csv.

        Args:
            rows: Dicts with exactly these columns: round, checkpoint, site, seen, split, view, region, case, metric,
                value, unit ("mm" or "px" where lengths count), grid ("own" or "network").

        Raises:
            ReportingError: If a row has other columns.
        """
        self._append(METRICS, rows)

    def append_rounds(self, rows: Iterable[Row]) -> None:
        """Append to rounds.csv, with all its columns (None where there is no number)."""
        self._append(ROUNDS, rows)

    def append_updates(self, rows: Iterable[Row]) -> None:
        """Append to updates.csv: round, site, norm, cosine, cosine_others (None where there is no number)."""
        self._append(UPDATES, rows)

    def append_traffic(self, rows: Iterable[Row]) -> None:
        """Append to communication.csv: round, site, direction (`down` | `up`), group, bytes."""
        self._append(TRAFFIC, rows)

    def append_events(self, rows: Iterable[Row]) -> None:
        """Append to events.csv: round, site, event (`absent`, `refused`, ...), detail."""
        self._append(EVENTS, rows)

    def append_privacy(self, rows: Iterable[Row]) -> None:
        """Append to privacy.csv: round, site (empty for the server), mechanism, unit, epsilon, delta, limit or None."""
        self._append(PRIVACY, rows)

    def append_sent(self, rows: Iterable[Row]) -> None:
        """Append to sent.csv: round, site (empty for a greeting), task, bytes, held (bytes that needed not travel)."""
        self._append(SENT, rows)

    def append_audit(self, rows: Iterable[Row]) -> None:
        """Append to audit.csv, and to audit_tensors.csv what was not listed there yet.

        Args:
            rows: Dicts of round, site, task, group, numbers, bytes, transforms, and ``listing``: name, shape and type
                of everything that left.
        """
        audit, contents = [], []
        if self._contents is None:
            self._contents = set(self._read(CONTENTS)["content"])
        for row in rows:
            plain = {key: value for key, value in row.items() if key != "listing"}
            content = sha256(repr(row["listing"]).encode()).hexdigest()[:12]
            audit.append({**plain, "content": content})
            if content not in self._contents:
                self._contents.add(content)
                contents += [
                    {"round": row["round"], "content": content, "tensor": name, "shape": shape, "dtype": dtype}
                    for name, shape, dtype in row["listing"]
                ]
        self._append(CONTENTS, contents)
        self._append(AUDIT, audit)

    def privacy(self) -> pd.DataFrame:
        """privacy.csv as a table."""
        return self._read(PRIVACY)

    def audit(self) -> pd.DataFrame:
        """audit.csv as a table."""
        return self._read(AUDIT)

    def sent(self) -> pd.DataFrame:
        """sent.csv as a table (empty where no messages travelled)."""
        return self._read(SENT)

    def contents(self) -> pd.DataFrame:
        """audit_tensors.csv as a table."""
        return self._read(CONTENTS)

    def write_audit_summary(self) -> None:
        """Save what left each site by task and group: from which round to which, how often, how many bytes in all."""
        keys = ["site", "task", "group", "content", "transforms"]
        grouped = self.audit().groupby(keys, sort=False)
        table = grouped.agg(
            first_round=("round", "min"), last_round=("round", "max"), times=("round", "size"), bytes=("bytes", "sum")
        ).reset_index()
        write_atomic(self.path / AUDIT_SUMMARY, table.to_csv(index=False, lineterminator="\n"))

    def scores(self) -> pd.DataFrame:
        """metrics.csv as a table (empty if nothing was scored yet)."""
        return self._read(METRICS)

    def rounds(self) -> pd.DataFrame:
        """rounds.csv as a table."""
        return self._read(ROUNDS)

    def updates(self) -> pd.DataFrame:
        """updates.csv as a table (empty where nothing is shared, or updates are hidden)."""
        return self._read(UPDATES)

    def traffic(self) -> pd.DataFrame:
        """communication.csv as a table."""
        return self._read(TRAFFIC)

    def events(self) -> pd.DataFrame:
        """events.csv as a table."""
        return self._read(EVENTS)

    def splits(self) -> pd.DataFrame:
        """splits.csv as a table."""
        return self._read(SPLITS)

    def fingerprints(self) -> pd.DataFrame:
        """fingerprints.csv as a table; empty for a run of an earlier version."""
        return self._read(FINGERPRINTS)

    def truncate(self, round: int) -> None:
        """Forget what came after a checkpoint, and the summary, before training goes on from it.

        Args:
            round: The last round to keep; -1 forgets everything (a run killed before its first checkpoint).
        """
        kept = dict(self._rows_until(round))  # all are read before the first is changed
        self.summary_path.unlink(missing_ok=True)
        self.summary_path.with_suffix(".md").unlink(missing_ok=True)
        self._contents = None
        for name, lines in kept.items():
            write_atomic(self.path / name, _header(COLUMNS[name]) + "".join(lines))

    def begin_as(self, other: "RunFolder", round: int, but: str) -> None:
        """Take over what another run noted up to a round, and its cases without those of a site.

        Args:
            other: its folder.
            round: the last one to take.
            but: the site.
        """
        for name, lines in other._rows_until(round):
            write_atomic(self.path / name, _header(COLUMNS[name]) + "".join(lines))
        for name in (SPLITS, FINGERPRINTS):
            lines = complete_lines(other.path / name)
            place = next(csv.reader(lines[:1])).index("site")
            rest = (line for line, cells in zip(lines, csv.reader(lines), strict=True) if cells[place] != but)
            write_atomic(self.path / name, "".join(rest))

    def check(self) -> None:
        """Read whatever a run that goes on will read, and change nothing.

        Raises:
            ReportingError: A file is damaged; it is named.
        """
        for _ in self._rows_until(0):
            pass
        for name in (*COLUMNS, SPLITS, FINGERPRINTS):
            self._read(name)
        self.costs()
        self.processes()

    def last_round(self) -> int:
        """The last round that left a row; 0 if there is none."""
        rows = pd.concat([self.rounds()["round"], self.scores()["round"]])
        return int(rows.max()) if len(rows) else 0

    def _rows_until(self, round: int) -> Iterator[tuple[str, list[str]]]:
        """Tables that are there, and their rows up to a round, without those of a finished run's checkpoints."""
        for name in COLUMNS:
            path = self.path / name
            if path.exists():
                with _readable(path):
                    lines = [line for line in _current_lines(path, name)[1:] if _belongs(line, name, round)]
                yield name, lines

    def write_summary(self, table: pd.DataFrame, markdown: str) -> None:
        """Save the result, as a table (summary.csv) and to read (summary.md)."""
        write_atomic(self.path / "summary.md", markdown)
        write_atomic(
            self.summary_path, table.to_csv(index=False, lineterminator="\n")
        )  # last: it says that all is done

    def _write(self, name: str, rows: Iterable[Row], columns: Sequence[str]) -> None:
        write_atomic(self.path / name, _header(columns) + _lines(rows, columns, name))

    def _append(self, name: str, rows: Iterable[Row]) -> None:
        path, columns = self.path / name, COLUMNS[name]
        text = _lines(rows, columns, name)
        if not text:
            return
        try:
            if name in YOUNGER and path.exists():
                _bring_up_to_date(path, name)
            with path.open("ab", buffering=0) as stream:
                if stream.tell() == 0:
                    text = _header(columns) + text
                elif not ends_a_line(path):
                    raise ReportingError(f"{path} ends in a half-written line; call truncate() before appending to it.")
                payload = memoryview(text.encode("utf-8"))
                while payload:  # one call but for a full disk or a signal
                    payload = payload[stream.write(payload) :]
                os.fsync(stream.fileno())
        except OSError as error:
            raise naming(error, path) from error

    def _read(self, name: str) -> pd.DataFrame:
        path = self.path / name
        with _readable(path):
            lines = complete_lines(path)
            columns = next(csv.reader(lines)) if lines else list(NEEDED.get(name, ()))
            if not lines and name not in COLUMNS and path.exists():
                raise ValueError("it is empty")
            younger = YOUNGER.get(name, {})
            if missing := sorted({*NEEDED.get(name, ())} - set(columns) - younger.keys()):
                raise ValueError(f"it has no column {missing[0]!r}")
            types = {column: TYPES.get(column, "str") for column in columns}
            numbers = {column: ["", "nan"] for column, kind in types.items() if kind == "float64"}
            if not lines:
                return pd.DataFrame({column: pd.Series(dtype=kind) for column, kind in types.items()})
            table = pd.read_csv(io.StringIO("".join(lines)), dtype=types, keep_default_na=False, na_values=numbers)
            for column, value in younger.items():
                table[column] = table[column].replace("", value) if column in table else value
            return table


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """A file of ours that cannot be read is named."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise ReportingError(f"{path} cannot be read ({why}); restore it, or start another run.") from error
    except (  # also what JSON and pandas raise, and bytes that are no text
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
        csv.Error,
    ) as error:
        why = " ".join(str(error).split())[:200]
        raise ReportingError(f"{path} is damaged ({why}); restore it, or start another run.") from error


def _current_lines(path: Path, name: str) -> list[str]:
    """The lines of a table under today's header; an earlier version's rows are empty in what is younger."""
    lines = complete_lines(path)
    lacking = _lacking(lines[0], name) if lines else []
    if not lacking:
        return lines
    return [_header(COLUMNS[name]), *(line.rstrip("\r\n") + "," * len(lacking) + "\n" for line in lines[1:])]


def _lacking(header: str, name: str) -> list[str]:
    """Younger columns that a table's header has not."""
    columns = next(csv.reader([header]), [])
    return [column for column in YOUNGER.get(name, ()) if column not in columns]


def _bring_up_to_date(path: Path, name: str) -> None:
    """Give a table of an earlier version today's header, so that rows can be appended."""
    with path.open(encoding="utf-8", newline="") as stream:
        header = stream.readline()
    if header.endswith("\n") and _lacking(header, name) and ends_a_line(path):
        write_atomic(path, "".join(_current_lines(path, name)))


def _belongs(line: str, name: str, round: int) -> bool:
    """Whether a line is of this round or an earlier one, and not of a finished run's last or best checkpoint."""
    first, second, *_ = line.split(",", 2)
    return int(first) <= round and (name != METRICS or second == DURING_TRAINING)


def _header(columns: Sequence[str]) -> str:
    return ",".join(columns) + "\n"


def _lines(rows: Iterable[Row], columns: Sequence[str], name: str) -> str:
    """Rows as CSV text, one line each: line breaks within a value become blanks, so that a line is always a row."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    expected = set(columns)
    for row in rows:
        if row.keys() != expected:
            raise ReportingError(f"{name}: a row has the columns {sorted(row)}, not {sorted(expected)}.")
        writer.writerow([_told(row[column], column) for column in columns])
    return stream.getvalue()


def _told(value: Any, column: str) -> Any:
    if not isinstance(value, str):
        return value
    line = re.sub(r"[\r\n]+", " ", value)
    return cell(line) if column in FOREIGN else line
