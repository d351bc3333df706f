"""Every case decoded and resized once, in memory or in a memory-mapped file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fedseg.datamodules.cases import Case, Pixels, Sample
from fedseg.datamodules.errors import DataError
from fedseg.datamodules.findings import Finding
from fedseg.datamodules.fingerprints import of_case
from fedseg.datamodules.readers.headers import data_files

Decoded = tuple[Sample, tuple[int, ...]]  # at the network's size, with the label ids of the full size
FORMAT = 13  # raise when what is stored, or how files are decoded, changes


@dataclass(frozen=True)
class Entry:
    """Where a case lies in its store.

    Attributes:
        block: Number of the array that holds its image.
        row: Its first slice there.
        depth: How many slices it has.
        labels: Its first slice in the array of labels of the same number; -1 when it has none.
        label_ids: Label ids that its mask had before the resize.
        spacing: On the stored grid, in mm; None when unknown.
        notes: What reading the files had to decide.
        colours: Label ids and their colours, of an indexed mask.
        prints: Hashes of each image file and its mask, as kept.
        plane: Of a volume's slices; empty where unknown.
        image_print: Digest of the bytes that the image was read from; empty where there is no file.
        mask_print: Likewise of the mask.
        attainable: Regions and the best Dice that the stored grid allows.
        taught: Masks that training draws one of, which follow its own; 0 where it learns that.
        agreement: Regions and the mean Dice of pairs of raters.
    """

    block: int
    row: int
    depth: int
    labels: int
    label_ids: tuple[int, ...]
    spacing: tuple[float, float, float] | None
    notes: tuple[Finding, ...] = ()
    colours: tuple[tuple[int, str], ...] = ()
    prints: tuple[tuple[str, str], ...] = ()
    image_print: str = ""
    mask_print: str = ""
    plane: str = ""
    attainable: tuple[tuple[str, float], ...] = ()
    taught: int = 0
    agreement: tuple[tuple[str, float], ...] = ()


class Store:
    """The cases of one site: few large arrays instead of many small ones.

    Attributes:
        cases: In the order of ``entries``.
        entries: Where each case lies.
        blocks: Images, one (N, h, w, C) array for each type, size and number of channels.
        labels: Of each block the (N, h, w) uint8 label ids of its labelled cases.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        entries: Sequence[Entry],
        blocks: Sequence[NDArray[Any]],
        labels: Sequence[NDArray[np.uint8]],
    ) -> None:
        self.cases = list(cases)
        self.entries = list(entries)
        self.blocks = list(blocks)
        self.labels = list(labels)
        self._number = {case.case: number for number, case in enumerate(cases)}

    def number(self, case: str) -> int:
        """Place of a case in this store."""
        return self._number[case]

    def images(self, number: int) -> Pixels:
        """(D, h, w, C) of a case."""
        entry = self.entries[number]
        return self.blocks[entry.block][entry.row : entry.row + entry.depth]

    def truth(self, number: int) -> NDArray[np.uint8]:
        """(D, h, w) label ids of a labelled case, by which it is scored."""
        return self._mask(number, 0)

    def lessons(self, number: int) -> list[NDArray[np.uint8]]:
        """(D, h, w) label ids that are learnt of a labelled case; of several, one is drawn each time anew."""
        return [self._mask(number, 1 + place) for place in range(self.entries[number].taught)] or [self.truth(number)]

    def _mask(self, number: int, place: int) -> NDArray[np.uint8]:
        entry = self.entries[number]
        first = entry.labels + place * entry.depth
        return self.labels[entry.block][first : first + entry.depth]

    def __getstate__(self) -> dict[str, Any]:
        """Sends a worker process the names of mapped files rather than their content."""
        return self.__dict__ | {
            "blocks": [_unmap(block) for block in self.blocks],
            "labels": [_unmap(block) for block in self.labels],
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {name: [_map(block) for block in state[name]] for name in ("blocks", "labels")})


def _unmap(array: NDArray[Any]) -> NDArray[Any] | str:
    return str(array.filename) if isinstance(array, np.memmap) else array


def _map(array: NDArray[Any] | str) -> NDArray[Any]:
    return np.load(array, mmap_mode="r") if isinstance(array, str) else array


def build_store(
    cases: Sequence[Case],
    decode: Callable[[Case], Decoded],
    *,
    cache: Literal["memory", "disk"],
    folder: Path,
    key: Mapping[str, Any],
) -> Store:
    """Decodes the cases of one site, or finds them decoded.

    Args:
        cases: All of one site, labelled or not.
        decode: Gives a case at the network's size, and the label ids of its mask.
        cache: "memory" keeps the arrays; "disk" writes them to ``folder`` once and maps them from then on.
        folder: Holds one folder per site and setting.
        key: What decoding depends on, besides the files' names, sizes and times of change.

    Raises:
        DataError: From ``decode``.
    """
    if cache == "memory":
        return Store(cases, *_decode(cases, decode))
    home = folder / f"{_safe(cases[0].site)}-{_fingerprint(cases, key)}"
    if not home.is_dir():
        _write(home, *_decode(cases, decode))
    return _open(home, cases)


def _decode(
    cases: Sequence[Case], decode: Callable[[Case], Decoded]
) -> tuple[list[Entry], list[NDArray[Any]], list[NDArray[np.uint8]]]:
    kinds: dict[tuple[Any, ...], tuple[list[NDArray[Any]], list[NDArray[np.uint8]]]] = {}
    slices, labelled = Counter[tuple[Any, ...]](), Counter[tuple[Any, ...]]()
    entries: list[Entry] = []
    for case, sample, ids in _samples(cases, decode):
        kind = (sample.image.dtype.name, *sample.image.shape[1:])
        images, labels = kinds.setdefault(kind, ([], []))
        entries.append(
            Entry(
                list(kinds).index(kind),
                slices[kind],
                len(sample.image),
                labelled[kind] if case.labelled else -1,
                ids,
                sample.spacing,
                sample.notes,
                sample.colours,
                sample.prints,
                *of_case(case),
                sample.plane,
                sample.attainable,
                len(sample.taught),
                sample.agreement,
            )
        )
        images.append(sample.image)
        slices[kind] += len(sample.image)
        if sample.labels is not None:
            labels += [sample.labels, *sample.taught]
            labelled[kind] += len(sample.labels) * (1 + len(sample.taught))
    blocks, masks = [], []
    for (_, *size, _), (images, labels) in kinds.items():
        blocks.append(_joined(images, (0, *size)))
        masks.append(_joined(labels, (0, *size)))
    return entries, blocks, masks


def _joined(pieces: list[NDArray[Any]], empty: Sequence[int]) -> NDArray[Any]:
    """One array; the list of pieces is emptied, so that the site is never in memory twice."""
    whole = np.concatenate(pieces) if pieces else np.empty(empty, np.uint8)
    pieces.clear()
    whole.flags.writeable = False  # a transform that works in place fails loudly instead of spoiling the cache
    return whole


def _samples(
    cases: Sequence[Case], decode: Callable[[Case], Decoded]
) -> Iterator[tuple[Case, Sample, tuple[int, ...]]]:
    bar: Iterable[Case] = tqdm(cases, desc=f"Reading {cases[0].site}", unit="case", disable=None, leave=False, delay=1)
    for case in bar:
        yield case, *decode(case)


def _fingerprint(cases: Sequence[Case], key: Mapping[str, Any]) -> str:
    text = json.dumps([FORMAT, key, [_identity(case) for case in cases]], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _identity(case: Case) -> list[Any]:
    parts = case.slices or (case,)
    files = [_stamp(name) for part in parts for name in (*part.image_files, *part.mask_files)]
    layers = [layer for part in parts for layer in part.masks]
    raters = [[rater, *of] for part in parts for rater, of in part.raters]
    absent = [list(part.absent) for part in parts if part.absent]
    frames = [["frame", part.frame] for part in parts if part.frame is not None]
    return [case.site, case.case, case.labelled, *files, *layers, *raters, *absent, *frames]


def _stamp(name: str) -> list[Any]:
    path = Path(name)
    if not path.exists():
        return [name]  # decoding will complain
    states = [part.stat() for part in (path, *data_files(path)) if part.is_file()]  # no folder itself
    return [name, *(number for state in states for number in (state.st_size, state.st_mtime_ns))]


def _write(home: Path, entries: list[Entry], blocks: list[NDArray[Any]], labels: list[NDArray[np.uint8]]) -> None:
    """Writes beside, then renames: a folder of the final name is always whole, whoever was killed when."""
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=home.parent))
    except OSError as error:
        raise _unwritable(home, error) from error
    try:
        for number, block in enumerate(blocks):
            np.save(draft / f"images{number}.npy", block)
            np.save(draft / f"labels{number}.npy", labels[number])
        (draft / "index.json").write_text(json.dumps([asdict(entry) for entry in entries]), encoding="utf-8")
        draft.chmod(0o777 & ~_umask())  # mkdtemp lets the owner only; a cache may be shared where that was said
        draft.rename(home)
    except OSError as error:
        if not home.is_dir():  # else another process was faster, and wrote the same
            raise _unwritable(home, error) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _umask() -> int:
    """What the process takes away; it can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _unwritable(home: Path, error: OSError) -> DataError:
    return DataError(f"the cache {home} cannot be written ({error}); choose another data.cache_dir")


def _open(home: Path, cases: Sequence[Case]) -> Store:
    try:
        rows = json.loads((home / "index.json").read_text(encoding="utf-8"))
        entries = [_entry(row) for row in rows]
        numbers = range(1 + max(entry.block for entry in entries))
        blocks = [np.load(home / f"images{number}.npy", mmap_mode="r") for number in numbers]
        labelled = {entry.block for entry in entries if entry.labels >= 0}  # what is empty cannot be mapped
        labels = [np.load(home / f"labels{n}.npy", mmap_mode="r" if n in labelled else None) for n in numbers]
        return Store(cases, entries, blocks, labels)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"the cache {home} is damaged ({error}); delete that folder") from error


def _entry(row: Mapping[str, Any]) -> Entry:
    """What JSON made lists and mappings."""
    return Entry(
        **dict(row)
        | {
            "label_ids": tuple(row["label_ids"]),
            "spacing": row["spacing"] and tuple(row["spacing"]),
            "notes": tuple(Finding(**note) for note in row["notes"]),
            "colours": tuple((int(label), str(colour)) for label, colour in row["colours"]),
            "prints": tuple((str(image), str(mask)) for image, mask in row["prints"]),
            "attainable": tuple((str(region), float(dice)) for region, dice in row["attainable"]),
            "agreement": tuple((str(region), float(dice)) for region, dice in row["agreement"]),
        }
    )


def _safe(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)
