"""The scores of finished runs in one small file, to keep with a document: `python -m fedseg.launch.evidence FILE DIR`.

What a comparison reads of the last and best models stays, of one metric, to six decimals; models, curves, traffic,
costs and logs do not, nor do places on the machine that trained.
"""

from __future__ import annotations

import io
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import pandas as pd
import yaml

from fedseg.common.files import write_atomic
from fedseg.configs.compose import ConfigError
from fedseg.launch.command import guarded
from fedseg.reporting import ReportingError
from fedseg.reporting.compare.runs import PATIENTS_UNKNOWN, LeftOut, find_runs, read_run
from fedseg.reporting.folder import FINDINGS, METRICS, SPLITS, RunFolder, SafeLoader
from fedseg.reporting.summary import CHECKPOINTS

SUFFIX = ".tar.xz"
USAGE = f"python -m fedseg.launch.evidence FILE{SUFFIX} DIR [metric=dice]"
HELP = f"""{USAGE}

Keeps the final scores of all runs below DIR in one file, from which documents are made
(`python -m fedseg.launch.results`).
"""
OF_FINDINGS = ("kind", "site")
DECIMALS = 6


def pack(runs: Path, metric: str) -> bytes:
    """The scores of all runs below a folder; the same bytes for the same runs, whenever and wherever it is called.

    Args:
        runs: the folder.
        metric: whose scores are kept.

    Raises:
        ReportingError: there is no run, or one that no comparison would take.
    """
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz", preset=9) as archive:
        for path in sorted(find_runs([str(runs)])):
            if isinstance(run := read_run(path, metric), LeftOut):
                raise ReportingError(f"{path}: {run.reason}")
            name = path.relative_to(runs).as_posix()
            for file, content in _kept(run.folder, name, metric):
                entry = tarfile.TarInfo(f"{name}/{file}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def _kept(folder: RunFolder, name: str, metric: str) -> Iterator[tuple[str, bytes]]:
    config = {**yaml.load(folder.read_config(), Loader=SafeLoader), "output": name}
    yield folder.config_path.name, yaml.safe_dump(_anywhere(config), sort_keys=False).encode()
    if (splits := folder.path / SPLITS).is_file():
        yield SPLITS, splits.read_bytes()
    if (summary := folder.summary_path).is_file():  # that it is there says that the run ended; its means follow
        yield summary.name, b"".join(summary.read_bytes().partition(b"\n")[:2])
    if (folder.path / FINDINGS).is_file():  # that there are none of a kind says something, too
        found = pd.DataFrame(folder.findings(), columns=list(OF_FINDINGS))
        yield FINDINGS, _table(found[found["kind"] == PATIENTS_UNKNOWN])
    scores = folder.scores()
    final = scores[scores["checkpoint"].isin(CHECKPOINTS) & (scores["metric"] == metric)]
    yield METRICS, _table(final)


def _table(rows: pd.DataFrame) -> bytes:
    return rows.to_csv(index=False, float_format=f"%.{DECIMALS}f", lineterminator="\n").encode()


def _anywhere(setting: object) -> object:
    """A setting whose paths say no more than a name."""
    if isinstance(setting, dict):
        return {key: _anywhere(value) for key, value in setting.items()}
    if isinstance(setting, list):
        return [_anywhere(value) for value in setting]
    return Path(setting).name if isinstance(setting, str) and Path(setting).is_absolute() else setting


def unpack(file: Path, into: Path) -> None:
    """Make run folders of packed scores.

    Raises:
        ReportingError: it is no such file, or one that would write elsewhere.
    """
    try:
        with tarfile.open(file, mode="r:xz") as archive:
            for entry in archive:
                name = PurePosixPath(entry.name)
                if not entry.isfile() or name.is_absolute() or ".." in name.parts:
                    raise ReportingError(
                        f"{file}: {entry.name!r} is no file of a run; take the file from whoever made it"
                    )
                content = archive.extractfile(entry)
                assert content is not None  # it is a file
                (into / name).parent.mkdir(parents=True, exist_ok=True)
                (into / name).write_bytes(content.read())
    except (OSError, EOFError, tarfile.TarError) as error:
        raise ReportingError(f"{file} cannot be read ({error}); it is made by fedseg.launch.evidence") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return guarded(run, arguments, help=HELP)


def run(arguments: Sequence[str]) -> int:
    """Pack runs."""
    metric = next((word.partition("=")[2] for word in arguments if word.startswith("metric=")), "dice")
    match [word for word in arguments if not word.startswith("metric=")]:
        case [file, runs] if file.endswith(SUFFIX):
            content = pack(Path(runs), metric)
            write_atomic(Path(file), content)
            print(f"{file}: {len(find_runs([runs]))} runs, {len(content)} bytes")
            return 0
    raise ConfigError(f"write: {USAGE}")


if __name__ == "__main__":
    sys.exit(main())
