"""Whether a run is what its ledger tells: `python -m fedseg.launch.verify RUN [SITE ...]`.

RUN is a run's folder; each SITE the folder that a site keeps of that run (state/RUN-ID), or its ledger.jsonl. Without
RUN the sites' own logs are compared with each other, as of a method that shows all sites the same model.
Exit code: 0 all fits, 1 it does not, 2 wrong usage.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from fedseg.common.text import printable
from fedseg.federation.checkpoint import BRANCHES, Checkpoint
from fedseg.federation.contract import Row
from fedseg.federation.ledger import BEGUN, HASH, LEDGER, SAVED, START, broken, canonical, digests, read, receipt
from fedseg.launch.command import guarded
from fedseg.reporting import ReportingError
from fedseg.reporting.folder import KEYS, RunFolder

SHARED = ("model", "buffers")
"""Groups of a message that are the same for every site that is asked at the same time."""
UNFIT = 1
TURN = ("what", "round", "topic", "checkpoint")


@dataclass(frozen=True)
class Log:
    """A ledger, of a run or of a site.

    Attributes:
        path: the file.
        entries: what it holds.
    """

    path: Path
    entries: list[Row]

    @classmethod
    def of(cls, place: Path) -> Log:
        """The ledger of a folder, or a ledger itself.

        Raises:
            ReportingError: there is none.
            CheckpointError: a line of it is no entry.
        """
        path = place / LEDGER if place.is_dir() else place
        entries = read(path)
        if not entries:
            raise ReportingError(f"{path}: there is no ledger, or it is empty; runs of earlier versions have none")
        return cls(path, entries)

    @property
    def site(self) -> str:
        """Whose it is; empty for a run's."""
        return str(self.entries[0].get("site", ""))

    def unchained(self) -> list[str]:
        """Entries that were changed, dropped or put in another order."""
        return [f"{self.path}: {told}" for told in broken(self.entries)]


def problems(run: Log | None, sites: Sequence[Log]) -> list[str]:
    """All that does not fit.

    Args:
        run: the server's ledger, in the run's folder; None to compare sites only.
        sites: the sites' own.
    """
    found = [told for log in (*([run] if run else []), *sites) for told in log.unchained()]
    if run is not None:
        folder = RunFolder(run.path.parent)
        keys = _keys(folder)
        found += [*_unsigned(run, keys), *_unequal(run), *_other_states(run, folder), *_unnoted(run, folder)]
        for site in sites:
            found += _against(run, site, keys)
    for site in sites:
        found += _forged(site)
    if run is None or _alike(run):
        for one, two in combinations(sites, 2):
            found += _shown_differently(one, two)
    return found


def _keys(folder: RunFolder) -> dict[str, str]:
    path = folder.path / KEYS
    if not path.is_file():
        return {}
    from fedseg.launch.sites.across import read_keys

    return read_keys(path)


def _alike(run: Log) -> bool:
    """Whether the run's method shows all sites the same model."""
    return all(entry.get("alike", True) for entry in run.entries)


def _turns(run: Log) -> Iterator[tuple[int, Row]]:
    """Questions to sites, and their number."""
    return ((number, e) for number, e in enumerate(run.entries, 1) if e.get("what") not in (BEGUN, SAVED))


def _unsigned(run: Log, keys: dict[str, str]) -> Iterator[str]:
    """Answers that are not signed, in a run across machines, by the key of their site's name."""
    if not any(entry.get("run") for entry in run.entries):
        return  # in one process nobody signs
    from fedseg.federation.flower.keys import signed

    name = ""
    by_number = dict(_turns(run))
    for number, entry in enumerate(run.entries, 1):
        name = str(entry.get("run", name)) if entry.get("what") == BEGUN else name
        for site, told in by_number.get(number, {}).get("sites", {}).items():
            if told["refusal"] and "signature" not in told:
                continue  # nothing came that counts
            try:
                task = {key: entry[key] for key in TURN}
                own = receipt(name, site, task, entry["previous"], told["shown"], told["sent"], told)
                fits = signed(keys.get(site, ""), canonical(own), told["signature"])
            except KeyError:
                fits = False
            if not fits:
                yield f"{run.path}: entry {number}: site {site!r} did not sign this"


def _unequal(run: Log) -> Iterator[str]:
    """Sites that were asked at the same time and shown different models, where the method shows all the same."""
    if not _alike(run):
        return
    for number, entry in _turns(run):
        for group in SHARED:
            shown = {site: told["shown"].get(group) for site, told in entry["sites"].items()}
            if len(set(shown.values())) > 1:
                yield f"{run.path}: entry {number}: sites were shown different models ({', '.join(sorted(shown))})"
                break


def _other_states(run: Log, folder: RunFolder) -> Iterator[str]:
    """Saved states of the server that are not those of the ledger."""
    checkpoint = Checkpoint(folder.checkpoints)
    told = {entry["round"]: entry["state"] for entry in run.entries if entry.get("what") == SAVED}
    best = [(one.round, one.server) for one in checkpoint.best().values()]
    best += [(branch["round"], branch["server"]) for branch in checkpoint.index.get(BRANCHES, ())]
    for round, file in sorted({(checkpoint.round, str(checkpoint.index["server"])), *best}):
        if file and digests(checkpoint.read(file)) != told.get(round):
            yield f"{checkpoint.folder / file}: it is not the state that the ledger tells of after round {round}"


def _unnoted(run: Log, folder: RunFolder) -> Iterator[str]:
    """Updates in the run's table of rounds of which the ledger tells nothing."""
    told = {(e["round"], site) for _, e in _turns(run) if e["what"] == "train" for site in e["sites"]}
    began = min((entry["round"] for entry in run.entries if entry.get("what") == BEGUN), default=0)
    trained = folder.rounds().query("task == 'train'")
    for round, site in sorted({*zip(trained["round"], trained["site"], strict=True)} - told):
        if round > began:
            yield f"{run.path}: it tells nothing of the update of site {site!r} in round {round}"


def _forged(site: Log) -> Iterator[str]:
    """Entries of a site's own log that it did not sign."""
    from fedseg.federation.flower.keys import signed

    for number, entry in enumerate(site.entries, 1):
        if not signed(str(entry.get("key", "")), canonical(_receipt_in(entry)), str(entry.get("signature", ""))):
            yield f"{site.path}: entry {number} is not signed by the site's key"


def _receipt_in(entry: Row) -> Row:
    return {k: v for k, v in entry.items() if k not in ("entry", "previous", HASH, "key", "signature")}


def _against(run: Log, site: Log, keys: dict[str, str]) -> Iterator[str]:
    """What a site holds, and the run's ledger does not tell so."""
    after: dict[Any, Row] = {entry["previous"]: entry for entry in run.entries}
    heads = {START, *(entry[HASH] for entry in run.entries)}
    for number, entry in enumerate(site.entries, 1):
        where = f"site {site.site!r}, entry {number} ({entry.get('what')}, round {entry.get('round')})"
        if entry.get("key") != keys.get(site.site):
            yield f"{where}: the run has another key under this name"
            return
        if entry.get("what") == "hello":
            continue
        told = after.get(entry.get("head"))
        if entry.get("head") not in heads:
            yield f"{where}: it was told of a history that the run's ledger does not have"
        elif told is None:
            yield f"{where}: the run's ledger ends before it"
        elif told.get("what") == BEGUN:
            continue  # the server was stopped before it could note the answer
        else:
            yield from _unlike(where, entry, told)


def _unlike(where: str, entry: Row, told: Row) -> Iterator[str]:
    noted = told.get("sites", {}).get(entry["site"])
    if noted is None or any(told.get(key) != entry.get(key) for key in TURN):
        yield f"{where}: the run's ledger tells of something else there"
    elif noted["shown"] != entry["shown"]:
        yield f"{where}: it was shown another message than the run's ledger tells"
    elif "signature" not in noted and noted["refusal"]:
        return  # it came too late or not at all, as the ledger says
    elif noted.get("signature") != entry["signature"]:
        yield f"{where}: it sent something else than the run's ledger tells"


def _shown_differently(one: Log, two: Log) -> Iterator[str]:
    """Two sites that were shown different models in the same turn of the same history."""

    def shown(log: Log) -> dict[Any, Any]:
        turns = [entry for entry in log.entries if entry.get("what") != "hello"]
        key = ("run", "head", *TURN)
        return {tuple(e.get(k) for k in key): {g: e["shown"].get(g) for g in SHARED} for e in turns}

    first, second = shown(one), shown(two)
    for turn in first.keys() & second.keys():
        if first[turn] != second[turn]:
            yield f"sites {one.site!r} and {two.site!r} were shown different models ({turn[2]}, round {turn[3]})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return guarded(_run, arguments, help=__doc__ or "")


def _run(arguments: Sequence[str]) -> int:
    logs = [Log.of(Path(place)) for place in arguments]
    runs, sites = [log for log in logs if not log.site], [log for log in logs if log.site]
    if len(runs) > 1:
        raise ReportingError(f"{runs[0].path} and {runs[1].path} are both ledgers of runs; name one run, and sites")
    found = problems(runs[0] if runs else None, sites)
    for told in found:
        print(printable(told))
    checked = ", ".join(f"{log.site or 'run'}: {len(log.entries)} entries" for log in logs)
    head = f"; the run's last hash is {runs[0].entries[-1][HASH]}" if runs else ""
    print(f"{printable(checked)}: {f'{len(found)} things do not fit' if found else 'all fits'}{head}")
    return UNFIT if found else 0


if __name__ == "__main__":
    sys.exit(main())
