"""A run's folder: every file in it, and how it survives a process that is killed at any instant.

Small files are replaced as a whole (`write_atomic`). Tables only ever grow, one `write` and `fsync` per batch of rows,
so the worst a kill can leave is a last line without its end, which readers ignore and `RunFolder.truncate` removes.
"""

import csv
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from reporting import ReportingError
from reporting.environment import describe_process, extend_environment

Row = Mapping[str, Any]

METRICS = "metrics.csv"
ROUNDS = "rounds.csv"
TRAFFIC = "communication.csv"
EVENTS = "events.csv"
SPLITS = "splits.csv"
TENSORS = "tensors.csv"

DURING_TRAINING = "round"
COLUMNS: dict[str, tuple[str, ...]] = {
    METRICS: ("round", "checkpoint", "site", "seen", "split", "view", "region", "case", "metric", "value"),
    ROUNDS: ("round", "site", "task", "loss", "steps", "examples", "seconds"),
    TRAFFIC: ("round", "site", "direction", "group", "bytes"),
    EVENTS: ("round", "site", "event", "detail"),
}
# Columns that are not text. Everything else is read as text, so that a site "007" or a case "NA" keeps its name.
TYPES = {
    "round": "int64",
    "seen": "bool",
    "labelled": "bool",
    "value": "float64",
    "loss": "float64",
    "seconds": "float64",
    "steps": "float64",
    "examples": "float64",
    "bytes": "int64",
}

README = """# The folder of one training run

| file | what it holds |
|---|---|
| `config.yaml` | every setting of the run, resolved; `python train.py` with these settings repeats it |
| `environment.json` | seeds; for each process that worked on the run: command, versions, machine, git revision |
| `splits.csv` | which case of which patient served for training, validation and testing, at each site |
| `tensors.csv` | every tensor of the network: parameter, running statistic or counter; averaged, or kept at the site |
| `summary.md`, `summary.csv` | the result: mean scores per site and view (written when the run ends) |
| `metrics.csv` | every score: one row per round, site, split, view, region, case and metric |
| `rounds.csv` | training loss, optimiser steps, examples and seconds per round and site |
| `communication.csv` | bytes down (server to site) and up (site to server) per round, site and group of tensors |
| `events.csv` | what was unusual: sites that were absent or whose update was refused |
| `plots/` | learning curves |
| `overlays/` | per site the worst, median and best test case with the contours of truth and predictions |
| `checkpoints/` | `last`: where the run stands; `best`: the round with the best validation score |
| `run-id.txt`, `sites/` | present if Flower carried the run: its name at the sites; what they keep, in a simulation |
| `wandb/`, `wandb-id.txt` | present if W&B was on; `wandb sync wandb/offline-run-*` uploads an offline run |

*View*: which model answers: `global` is shared by all sites, `personal` is a site's own, `adapted` was fitted to an
unseen site's images without labels. *Seen*: the site took part in training; an unseen site only tests. *Checkpoint* in
`metrics.csv`: `round` for scores during training (validation); `last` and `best` for the two checkpoints scored at the
end; `best` is chosen on validation cases, never on test cases.

In the summary a case's score is the mean over its regions, a site's score is the mean over its cases, and a mean over
sites counts each site once. Rows of `metrics.csv` with region `mean` and no case hold a site's mean itself. Undefined
scores (empty or `nan`) do not count.

A run that was stopped continues with `python train.py ... output=THIS_FOLDER resume=true`.
"""


def file_name(name: str) -> str:
    """A file name for any site: characters that a file system may refuse become `%XX`, distinct names stay distinct."""
    return re.sub(r'[\x00-\x1f/\\:*?"<>|%]', lambda match: f"%{ord(match.group()):02X}", name)


def write_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text`: a reader, or a kill at any instant, finds the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


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
        self.config_path = self.path / "config.yaml"
        self.environment_path = self.path / "environment.json"
        self.checkpoints = self.path / "checkpoints"
        self.plots = self.path / "plots"
        self.overlays = self.path / "overlays"
        self.wandb_id_path = self.path / "wandb-id.txt"

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
        folder.path.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def holds_run(self) -> bool:
        """Whether a run was started in this folder."""
        return self.config_path.is_file()

    def _foreign_files(self) -> list[str]:
        """What stands in the folder, but for temporary files of a process that was killed in its first write."""
        if not self.path.exists():
            return []
        return sorted(p.name for p in self.path.iterdir() if not (p.name.startswith(".") and p.name.endswith(".tmp")))

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
        return self.config_path.read_text(encoding="utf-8")

    def write_environment(self, seeds: Mapping[str, int]) -> None:
        """Record seeds and this process: versions, machine, git revision, command; a resumed run lists each."""
        before = self.environment_path.read_text(encoding="utf-8") if self.environment_path.exists() else None
        write_atomic(self.environment_path, extend_environment(before, seeds, describe_process()))

    def write_splits(self, rows: Sequence[Row]) -> None:
        """Save the split of every case; all rows have the columns of the first."""
        columns = tuple(rows[0]) if rows else ("site", "case", "patient", "split", "labelled", "seen")
        write_atomic(self.path / SPLITS, _header(columns) + _lines(rows, columns, SPLITS))

    def write_tensors(self, rows: Sequence[Row]) -> None:
        """Save what becomes of every tensor of the network, averaged or kept at the site (tensors.csv)."""
        columns = tuple(rows[0]) if rows else ()
        write_atomic(self.path / TENSORS, _header(columns) + _lines(rows, columns, TENSORS))

    def append_scores(self, rows: Iterable[Row]) -> None:
        """Append scores to metrics.csv.

        Args:
            rows: Dicts with exactly these columns: round, checkpoint, site, seen, split, view, region, case, metric,
                value.

        Raises:
            ReportingError: If a row has other columns.
        """
        self._append(METRICS, rows)

    def append_rounds(self, rows: Iterable[Row]) -> None:
        """Append to rounds.csv: round, site, task, loss, steps, examples, seconds (None where there is no number)."""
        self._append(ROUNDS, rows)

    def append_traffic(self, rows: Iterable[Row]) -> None:
        """Append to communication.csv: round, site, direction (`down` | `up`), group, bytes."""
        self._append(TRAFFIC, rows)

    def append_events(self, rows: Iterable[Row]) -> None:
        """Append to events.csv: round, site, event (`absent`, `refused`, ...), detail."""
        self._append(EVENTS, rows)

    def scores(self) -> pd.DataFrame:
        """metrics.csv as a table (empty if nothing was scored yet)."""
        return self._read(METRICS)

    def rounds(self) -> pd.DataFrame:
        """rounds.csv as a table."""
        return self._read(ROUNDS)

    def traffic(self) -> pd.DataFrame:
        """communication.csv as a table."""
        return self._read(TRAFFIC)

    def events(self) -> pd.DataFrame:
        """events.csv as a table."""
        return self._read(EVENTS)

    def splits(self) -> pd.DataFrame:
        """splits.csv as a table."""
        return self._read(SPLITS)

    def truncate(self, round: int) -> None:
        """Forget what came after a checkpoint, before training goes on from it.

        Args:
            round: The last round to keep; -1 forgets everything (a run killed before its first checkpoint).
        """
        for name, columns in COLUMNS.items():
            path = self.path / name
            if path.exists():
                lines = [line for line in complete_lines(path)[1:] if _belongs(line, name, round)]
                write_atomic(path, _header(columns) + "".join(lines))

    def write_summary(self, table: pd.DataFrame, markdown: str) -> None:
        """Save the result, as a table (summary.csv) and to read (summary.md)."""
        write_atomic(self.path / "summary.csv", table.to_csv(index=False, lineterminator="\n"))
        write_atomic(self.path / "summary.md", markdown)

    def _append(self, name: str, rows: Iterable[Row]) -> None:
        path, columns = self.path / name, COLUMNS[name]
        text = _lines(rows, columns, name)
        if not text:
            return
        with path.open("ab", buffering=0) as stream:
            if stream.tell() == 0:
                text = _header(columns) + text
            elif not _ends_a_line(path):
                raise ReportingError(f"{path} ends in a half-written line; call truncate() before appending to it.")
            payload = memoryview(text.encode("utf-8"))
            while payload:  # one call but for a full disk or a signal
                payload = payload[stream.write(payload) :]
            os.fsync(stream.fileno())

    def _read(self, name: str) -> pd.DataFrame:
        lines = complete_lines(self.path / name)
        columns = next(csv.reader(lines)) if lines else list(COLUMNS.get(name, ()))
        types = {column: TYPES.get(column, "str") for column in columns}
        numbers = {column: ["", "nan"] for column, kind in types.items() if kind == "float64"}
        if not lines:
            return pd.DataFrame({column: pd.Series(dtype=kind) for column, kind in types.items()})
        return pd.read_csv(io.StringIO("".join(lines)), dtype=types, keep_default_na=False, na_values=numbers)


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
        writer.writerow([_one_line(row[column]) for column in columns])
    return stream.getvalue()


def _one_line(value: Any) -> Any:
    return re.sub(r"[\r\n]+", " ", value) if isinstance(value, str) else value


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read() == b"\n"


def _sync_directory(path: Path) -> None:
    """Make a rename durable; only POSIX systems open folders."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
