"""Forget a site: `python -m fedseg.launch.forget RUN SITE output=NEW [proof=true] [data.root=DIR] [trainer.threads=N]`.

Trains RUN again without SITE, in the folder NEW: from the state that RUN kept before the site came by
federation.arrives, else from the start. Then every file of NEW is searched for what stands in the site's name. With
proof=true a run that never had the site is trained as well, from the start, and NEW must equal it bit for bit.
`forget NEW SITE never=FOLDER` trains nothing: it searches NEW, and compares it with a run that was trained without the
site.

Exit code: 0 all fits, 1 it does not, 2 wrong usage. This is training again, not unlearning. RUN stays as it is.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig

from fedseg.common.files import write_atomic
from fedseg.common.names import nearest
from fedseg.common.text import printable
from fedseg.configs.compose import ConfigError, as_yaml, compose, departing, parsed
from fedseg.federation.checkpoint import Checkpoint
from fedseg.federation.ledger import LEDGER, SAVED, digests, read
from fedseg.federation.state import State
from fedseg.launch.command import MISTAKE, guarded
from fedseg.launch.experiment import Experiment
from fedseg.launch.run import anchored, execute, flat, saved_config
from fedseg.launch.settings import SCHEMA
from fedseg.reporting import ReportingError
from fedseg.reporting.circumstance import ELSEWHERE
from fedseg.reporting.folder import ROUNDS, RunFolder, file_name, flattened

UNFIT = 1
LEFT_OUT = "data.left_out"
SECTIONS = ("data.", "federation.", "deployment.")
"""Settings in which sites are named, as entries of lists or keys of mappings."""
OF_LABELS = ("data.regions", "data.label_values")
"""Mappings there whose keys are no sites."""
WORDS = (".md", ".txt", ".svg", ".html")
STATIC = "README.md"
"""The same in every folder."""


def without_site(config: DictConfig, site: str) -> DictConfig:
    """A run's settings as if there were no such site; it is left out of the data, if it is still there.

    Raises:
        ConfigError: the run is not one in one place, or starts from one that had the site.
    """
    if config.engine != "in-process" or config.protocol != "personalised":
        raise ConfigError(
            f"a run with engine={config.engine} and protocol={config.protocol} is not trained again here: start "
            "another one without the site (deployment.sites, or data.left_out for all folds)"
        )
    _check_start(config.pretrained, site)
    changed: dict[str, Any] = {}
    if site in (config.networks or {}):
        changed["networks"] = {name: told for name, told in config.networks.items() if name != site} or None
    for key, value in flat(config).items():
        if not key.startswith(SECTIONS) or key in OF_LABELS:
            continue
        if isinstance(value, list) and site in value:
            changed[key] = [one for one in value if one != site]
        if isinstance(value, dict) and site in value:
            changed[key] = {name: one for name, one in value.items() if name != site}
    rest = departing(config, changed)
    there = {case.site for case in Experiment(rest).data.cases()}
    return departing(rest, {LEFT_OUT: sorted({*rest.data.left_out, site})}) if site in there else rest


def _check_start(pretrained: str | None, site: str) -> None:
    """Refuse an encoder that has learnt from the site."""
    while pretrained:
        folder = RunFolder(pretrained)
        if site in set(folder.splits()["site"]):
            raise ConfigError(
                f"the run starts from pretrained={pretrained}, which has learnt from {site!r}; forget it there first, "
                "and train anew from the folder that this makes"
            )
        pretrained = saved_config(folder).pretrained


def branch(run: RunFolder, config: DictConfig, site: str) -> int:
    """The round after which RUN's state is one that never had the site; 0 for the start."""
    arrives, leaves = config.federation.arrives or {}, config.federation.leaves or {}
    first = arrives.get(site, 1)
    if leaves.get(site, first) < first:
        return 0  # it was there, left, and came back
    return first - 1 if first - 1 in Checkpoint(run.checkpoints).branches() else 0


def begin(run: RunFolder, new: RunFolder, config: DictConfig, site: str, round: int) -> None:
    """Put into a new folder what RUN was after a round, in which nothing is of the site.

    Raises:
        ReportingError: RUN's ledger does not tell of that state.
    """
    checkpoint = Checkpoint(run.checkpoints).copied(round, new.checkpoints)
    entries = read(run.path / LEDGER)
    told = [number for number, entry in enumerate(entries, 1) if (entry.get("what"), entry["round"]) == (SAVED, round)]
    if not told or entries[told[-1] - 1]["state"] != digests(checkpoint.read(checkpoint.index["server"])):
        raise ReportingError(
            f"{run.path / LEDGER} does not tell of the state before {site!r} came; look at the run with "
            "python -m fedseg.launch.verify, or take a copy of it without checkpoints/ to train from the start"
        )
    lines = (run.path / LEDGER).read_text(encoding="utf-8").splitlines(keepends=True)
    write_atomic(new.path / LEDGER, "".join(lines[: told[-1]]))
    new.begin_as(run, round, but=site)
    new.write_config(as_yaml(anchored(config)))


def traces(folder: RunFolder, site: str) -> list[str]:
    """What in a folder stands in the site's name, but for the setting that leaves it out and the command that ran."""
    word, own = re.compile(rf"(?<![\w.-]){re.escape(site)}(?![\w-])"), file_name(site)
    found = []
    for path in sorted(folder.path.rglob("*")):
        place = path.relative_to(folder.path)
        if own in (place.stem, place.name):
            found.append(f"{place}: its name")
        if path.is_file() and any(_names(path, site, word)):
            found.append(f"{place}: names {site!r}")
    checkpoint = Checkpoint(folder.checkpoints)
    named = {site, f"personal/{site}"} & {*checkpoint.index["kept"], *checkpoint.best()}
    found += [f"{checkpoint.folder.name}/index.json: names {name!r}" for name in sorted(named)]
    for file, state in _states(checkpoint).items():
        found += [f"{checkpoint.folder.name}/{file}: {name}" for name in _entries(state) if site in name.split("/")]
    return found


def _names(path: Path, site: str, word: re.Pattern[str]) -> Iterator[bool]:
    """Whether something in a file is the site's."""
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream):
                yield site in row.values() or bool(word.search(row.get("detail") or ""))
    elif path.suffix in WORDS and path.name != STATIC:
        yield bool(word.search(path.read_text(encoding="utf-8")))
    elif path.suffix in (".json", ".jsonl", ".yaml"):
        text = path.read_text(encoding="utf-8")
        contents = map(json.loads, text.splitlines()) if path.suffix == ".jsonl" else [yaml.safe_load(text)]
        for content in contents:
            yield _holds(content, site)


def _holds(content: Any, site: str) -> bool:
    """Whether a key or a value is the site's name."""
    if isinstance(content, dict):
        rest = {key: value for key, value in content.items() if key not in (LEFT_OUT.partition(".")[2], "command")}
        return site in rest or any(_holds(value, site) for value in rest.values())
    if isinstance(content, list):
        return any(_holds(value, site) for value in content)
    return bool(content == site)


def _states(checkpoint: Checkpoint) -> dict[str, State]:
    """Every saved state, by its file."""
    index, best = checkpoint.index, checkpoint.best().values()
    files = {index["server"], *index["kept"].values(), *(file for one in best for file in (one.server, one.kept))}
    return {file: checkpoint.read(file) for file in sorted(files - {""})}


def _entries(state: State) -> list[str]:
    """Names of all that is in a state."""
    return [f"{group}/{name}" for group, tensors in state.tensors.items() for name in tensors] + list(state.scalars)


def unlike(one: RunFolder, other: RunFolder) -> list[str]:
    """In what two runs differ: saved states bit for bit, and every row of every table but for wall times."""
    first, second = Checkpoint(one.checkpoints), Checkpoint(other.checkpoints)
    if not first.round or first.round != second.round:
        return [f"checkpoints: {one.path} stands at round {first.round}, {other.path} at {second.round}"]
    roles = [_roles(checkpoint) for checkpoint in (first, second)]
    differing = [name for name in roles[0].keys() & roles[1].keys() if not _equal(roles[0][name], roles[1][name])]
    found = [f"checkpoints: another {name}" for name in sorted({*differing, *(roles[0].keys() ^ roles[1].keys())})]
    scores = [{name: (b.score, b.round) for name, b in checkpoint.best().items()} for checkpoint in (first, second)]
    found += [] if repr(scores[0]) == repr(scores[1]) else ["checkpoints: other rounds or scores of the best models"]
    names = sorted({path.name for run in (one, other) for path in run.path.glob("*.csv")})
    return [*found, *(f"{name}: other rows" for name in names if _rows(one.path / name) != _rows(other.path / name))]


def _roles(checkpoint: Checkpoint) -> dict[str, State]:
    """Every saved state by what it is: the server's and a site's, last and best."""
    files = {"last state of the server": checkpoint.index["server"]}
    files |= {f"last state of {site}": file for site, file in checkpoint.index["kept"].items()}
    for name, best in checkpoint.best().items():
        files |= {f"best {name}, server": best.server, f"best {name}, site": best.kept}
    return {name: checkpoint.read(file) for name, file in files.items() if file}


def _equal(one: State, other: State) -> bool:
    if one.scalars != other.scalars or sorted(_entries(one)) != sorted(_entries(other)):
        return False
    pairs = ((t, other[group][name]) for group, tensors in one.tensors.items() for name, t in tensors.items())
    return all(torch.equal(*pair) for pair in pairs)


def _rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table, without wall times; none of one in which nothing was ever noted."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    return [{k: v for k, v in row.items() if path.name != ROUNDS or k != "seconds"} for row in rows]


def forget(run: RunFolder, site: str, new: RunFolder, overrides: Sequence[str] = ()) -> DictConfig:
    """Train a run again without a site.

    Args:
        run: its folder.
        site: the name.
        new: where to; it holds nothing.
        overrides: of `ELSEWHERE`.

    Returns:
        The settings of a run that never had the site.

    Raises:
        ConfigError, ReportingError: with a message for the user.
    """
    saved, known = saved_config(run), sorted(set(run.splits()["site"]))
    if site not in known:
        raise ReportingError(f"{run.path} has no site {site!r}; {nearest(site, known)}")
    base = compose(overrides, SCHEMA, base=saved)
    config = departing(without_site(base, site), {"output": str(new.path), "resume": False})
    round = branch(run, base, site)
    print(
        f"training again without {site}, from {f'the state after round {round}' if round else 'the start'}", flush=True
    )
    if round:
        RunFolder.create(new.path, resume=False)
        begin(run, new, config, site, round)
    execute(departing(config, {"resume": bool(round)}))
    return config


def prove(new: RunFolder, config: DictConfig) -> list[str]:
    """Train a run that never had the site from the start, and tell in what a new folder differs from it."""
    place = Path(tempfile.mkdtemp(prefix="never-", dir=new.path.absolute().parent))
    try:
        print("\ntraining a run that never had it, from the start", flush=True)
        aside = {"output": str(place / "run"), "wandb.mode": "disabled", "loggers": [], "evaluation.overlays": False}
        execute(departing(config, aside))
        return unlike(new, RunFolder(place / "run"))
    finally:
        shutil.rmtree(place)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return guarded(_run, arguments, help=__doc__ or "")


def _run(arguments: Sequence[str]) -> int:
    places, told = [one for one in arguments if "=" not in one], [one for one in arguments if "=" in one]
    own = {key: value for key, _, value in (one.partition("=") for one in told) if key in ("output", "proof", "never")}
    overrides = [one for one in told if one.partition("=")[0] not in own]
    if len(places) != 2 or ("output" in own) == ("never" in own) or own.get("proof", "false") not in ("true", "false"):
        print(__doc__, file=sys.stderr)
        return MISTAKE
    if odd := [key for key in flattened(parsed(overrides, SCHEMA)) if key not in ELSEWHERE]:
        raise ConfigError(f"{odd[0]} belongs to the run; only {', '.join(ELSEWHERE)} may change")
    run, site = RunFolder(places[0]), places[1]
    if "never" in own:
        return _say(run, site, unlike(run, RunFolder(own["never"])))
    new = RunFolder(own["output"])
    config = forget(run, site, new, overrides)
    return _say(new, site, prove(new, config) if own.get("proof") == "true" else None)


def _say(new: RunFolder, site: str, differing: list[str] | None) -> int:
    """Print what was found; the exit code."""
    left = traces(new, site)
    print(f"\n{new.path}: nothing is in the name of {site}" if not left else f"\n{new.path} still names {site}:")
    for line in left:
        print(f"  {printable(line)}")
    if differing is None:
        return UNFIT if left else 0
    same = "equal, bit for bit, to a run that never had it: every saved state, and every row of every table"
    print(f"{new.path}: {same}" if not differing else f"{new.path} is not a run that never had it:")
    for line in differing:
        print(f"  {printable(line)}")
    return UNFIT if left or differing else 0


if __name__ == "__main__":
    sys.exit(main())
